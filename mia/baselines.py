"""What can be told without any model: baselines on the text alone, and texts that stand in both sets.

A set of members and non-members that differ in date, topic or length is told apart by these already; whatever an attack
reaches on such a set says nothing about the model (Duan et al. 2024; Meeus et al. 2024; Das et al. 2024).
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
    """Log-odds [n] of membership for each of BASELINES, cross-fitted over five folds; None below 5 texts a class."""
    return {name: cross_fit(features, labels, make, seed) for name, (features, make) in classifiers(texts).items()}


def dataset_inference(texts: list[str], labels: npt.ArrayLike, seed: int) -> dict[str, Any]:
    """`metrics.dataset_inference` of the text alone: half of each class fits the four baselines and a logistic
    regression over their (cross-fitted) log-odds; the other half, which nothing was fitted on, is tested."""
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
    """{baseline: (features of each text, make() → classifier of them)}.

    length  log(1 + characters) and its square   zlib   compressed share of the bytes and its square
    bow     counts of words                      tfidf  TF-IDF of words and pairs of words
    The squares let a set be told by the middle of a range. All by logistic regression, C = 1.
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
    made = ((sizes, curve), (ratios, curve), (shown, words), (shown, tfidf))
    return dict(zip(BASELINES, made))
