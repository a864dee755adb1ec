"""Blind baselines: how well members and non-members can be told apart from the text alone, without any model.

If the two sets differ in date, topic or length, these baselines separate them; an attack's success on such sets says
nothing about the model (Duan et al. 2024; Meeus et al. 2024; Das et al. 2024).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from common.text import WORD
from mia.metrics import FOLDS, NO_TEST, cross_fit, halves, logistic, set_test

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

    from mia.metrics import Floats

BASELINES = ("blind_length", "blind_zlib", "blind_bow", "blind_tfidf")
MOST_WORDS = 20000


def scores(texts: list[str], labels: npt.ArrayLike, seed: int) -> dict[str, Floats | None]:
    """Log-odds [n] of membership for each of BASELINES, five-fold cross-fitted; None below 5 texts per class."""
    return {name: cross_fit(features, labels, make, seed) for name, (features, make) in classifiers(texts).items()}


def dataset_inference(texts: list[str], labels: npt.ArrayLike, seed: int) -> dict[str, Any]:
    """`metrics.dataset_inference` from the text alone: the four baselines and a logistic regression over their
    (cross-fitted) log-odds are fitted on half of each class; the other half is tested."""
    labels = np.asarray(labels)
    if np.bincount(labels, minlength=2).min() < 2 * FOLDS:
        return {**NO_TEST, "undefined": f"under {2 * FOLDS} texts in a class"}
    fit, held_out = halves(labels, seed)
    fitted, tested = [], []
    for features, make in classifiers(texts).values():
        mine, others = ([features[i] for i in part] for part in (fit, held_out))
        fitted.append(cross_fit(mine, labels[fit], make, seed))
        tested.append(make().fit(mine, labels[fit]).decision_function(others))
    odds = logistic().fit(np.array(fitted).T, labels[fit]).decision_function(np.array(tested).T)
    return set_test(odds, labels[held_out])


def classifiers(texts: list[str]) -> dict[str, tuple[list[Any], Callable[[], Pipeline]]]:
    """{baseline: (features of each text, make() → classifier for them)}.

    length  log(1 + characters) and its square   zlib   compression ratio and its square
    bow     word counts                          tfidf  TF-IDF of words and word bigrams
    The squares let the classifier separate a set in the middle of a range. All are logistic regressions, C = 1.
    """
    from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import MaxAbsScaler, PolynomialFeatures, StandardScaler

    def curve() -> Pipeline:
        squares = PolynomialFeatures(2, include_bias=False)
        return make_pipeline(StandardScaler(), squares, LogisticRegression(max_iter=1000))

    def words() -> Pipeline:
        counts = CountVectorizer(max_features=MOST_WORDS, token_pattern=WORD)
        return make_pipeline(counts, MaxAbsScaler(), LogisticRegression(max_iter=200))

    def tfidf() -> Pipeline:
        pairs = TfidfVectorizer(max_features=MOST_WORDS, token_pattern=WORD, ngram_range=(1, 2), sublinear_tf=True)
        return make_pipeline(pairs, LogisticRegression(max_iter=200))

    sizes = [[np.log1p(len(text))] for text in texts]
    ratios = [[len(zlib.compress(text.encode())) / max(1, len(text.encode()))] for text in texts]
    shown = [text.strip() or "." for text in texts]
    return dict(zip(BASELINES, ((sizes, curve), (ratios, curve), (shown, words), (shown, tfidf))))
