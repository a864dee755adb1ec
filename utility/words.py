"""Word importance: how much a model trained on one sample relies on each word, and how well two models agree."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from common import reviews
from common.problems import UserError
from utility.arms import Row, ratings
from utility.metrics import expected_permutation_importance, top_jaccard

TOPS = (10, 20, 50)


def vocabulary(heldout: list[Row], min_rows: int) -> list[str]:
    """The words in at least `min_rows` held-out rows, sorted. UserError if there are none."""
    counter = TfidfVectorizer(min_df=min_rows)
    try:
        counter.fit([reviews.text_of(row) for row in heldout])
    except ValueError as error:  # "no terms remain"; the text says what to change
        raise UserError(f"--min_rows {min_rows}: no word is in that many held-out rows ({error})") from None
    return sorted(counter.vocabulary_)


def importances(rows: list[Row], words: list[str], heldout: list[Row], seed: int) -> np.ndarray:
    """[words] expected permutation importance on the held-out rows, for a TF-IDF logistic regression on `rows`."""
    vectorizer = TfidfVectorizer(vocabulary=words)
    model = LogisticRegression(max_iter=2000, random_state=seed)
    features = vectorizer.fit_transform([reviews.text_of(row) for row in rows])
    model.fit(features, ratings(rows))
    weights, bias = (
        np.zeros((len(words), 5)),
        np.full(5, -30.0),
    )  # bias of a rating that no row has: probability practically 0
    classes = [int(label) - 1 for label in model.classes_]
    if len(classes) == 2:  # scikit-learn keeps one vector for two classes
        weights[:, classes] = np.column_stack([np.zeros(len(words)), model.coef_[0]])
        bias[classes] = 0, model.intercept_[0]
    else:
        weights[:, classes], bias[classes] = model.coef_.T, model.intercept_
    features = vectorizer.transform([reviews.text_of(row) for row in heldout]).tocsc()
    truth = np.array(ratings(heldout)) - 1
    return expected_permutation_importance(features, weights, bias, truth)


def compare(reference: np.ndarray, other: np.ndarray) -> dict[str, float | None]:
    """Spearman, Pearson and Jaccard@k of two importance vectors [words].

    None if either is constant; Jaccard@k is also None if there are at most k words, which would all be in both tops.
    """
    constant = np.ptp(reference) == 0 or np.ptp(other) == 0
    agreement: dict[str, float | None] = {
        "spearman": None if constant else float(stats.spearmanr(reference, other).statistic),
        "pearson": None if constant else float(stats.pearsonr(reference, other).statistic),
    }
    for k in TOPS:
        agreement[f"jaccard@{k}"] = None if constant or k >= len(reference) else top_jaccard(reference, other, k)
    return agreement


def measure(samples: dict[int, dict[str, list[Row]]], words: list[str], heldout: list[Row]) -> dict[str, Any]:
    """The content of feature_importance.json; samples: seed → arm → rows, including the arm 'reference'."""
    lines: dict[str, list[dict[str, Any]]] = {}
    top: list[str] = []
    for seed, arms in samples.items():
        vectors = {arm: importances(rows, words, heldout, seed) for arm, rows in arms.items()}
        reference = vectors.pop("reference")
        top = top or [words[index] for index in np.argsort(-reference, kind="stable")[: TOPS[0]]]
        for arm, vector in vectors.items():
            lines.setdefault(arm, []).append({"seed": seed, **compare(reference, vector)})
    return {
        "schema": 1,
        "rows": len(next(iter(samples.values()))["reference"]),
        "heldout_rows": len(heldout),
        "words": len(words),
        "top_words": top,
        "arms": {arm: summary(own) for arm, own in lines.items()},
    }


def summary(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The lines of an arm with mean and standard deviation over seeds; None if no seed has a value."""
    known = {name: [line[name] for line in lines if line[name] is not None] for name in lines[0] if name != "seed"}
    scored = sum(line["spearman"] is not None for line in lines)
    return {
        "mean": {name: float(np.mean(values)) if values else None for name, values in known.items()},
        "sd": {name: float(np.std(values, ddof=1)) if len(values) > 1 else None for name, values in known.items()},
        "seeds": list(lines),
        "n_requested": len(lines),
        "n_scored": scored,
        "n_dropped": len(lines) - scored,
    }
