"""Metrics of the utility of synthetic rows and of agreement between raters. Pure functions of arrays."""

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from common.stats import mcnemar

SCORES = ("accuracy", "macro_f1", "mae")


def rating_scores(truth: ArrayLike, predicted: ArrayLike) -> dict[str, float]:
    """SCORES of predicted ratings: accuracy, macro-F1 and mean absolute error in stars.

    Macro-F1: the unweighted mean of F1 over the ratings that occur in `truth` (0 if never predicted).
    """
    right, given = np.asarray(truth), np.asarray(predicted)
    f1 = []
    for label in np.unique(right):
        hits = np.sum((right == label) & (given == label))
        f1.append(2 * hits / (np.sum(right == label) + np.sum(given == label)))
    return {
        "accuracy": float(np.mean(right == given)),
        "macro_f1": float(np.mean(f1)),
        "mae": float(np.mean(np.abs(right - given))),
    }


def paired(truth: Sequence[int], real: Sequence[int], other: Sequence[int]) -> dict[str, Any]:
    """Rows that only `other` rates correctly (gained), rows that only `real` does (lost), exact McNemar p."""
    right = [(a == t, b == t) for t, a, b in zip(truth, real, other)]
    gained, lost = sum(b and not a for a, b in right), sum(a and not b for a, b in right)
    return {"gained": gained, "lost": lost, "p": mcnemar(gained, lost)}


def seed_summary(arm: str, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean, standard deviation and range of SCORES over the seeds of an arm's lines."""
    summary: dict[str, Any] = {"arm": arm, "seed": None, "seeds": [line["seed"] for line in lines]}
    for name in SCORES:
        values = [line[name] for line in lines]
        deviation = statistics.stdev(values) if len(values) > 1 else None
        summary[name] = {"mean": statistics.mean(values), "sd": deviation, "low": min(values), "high": max(values)}
    return summary


def majority(ratings: Sequence[int]) -> int:
    """The most common rating; the lowest one in a tie."""
    values, counts = np.unique(np.asarray(ratings), return_counts=True)
    return int(values[counts.argmax()])


def expected_permutation_importance(
    features: Any, weights: np.ndarray, bias: np.ndarray, truth: np.ndarray
) -> np.ndarray:
    """[F] increase in mean log-loss (nats) of a linear softmax model when a feature's column is shuffled over the rows.

    features: [n, F] sparse CSC; weights: [F, C]; bias: [C]; truth: [n] class indices.
    The expectation over all permutations, hence free of sampling noise: a row is equally likely to get the value of
    each of the n rows (Breiman 2001 shuffles once). A column with z distinct values costs one [n, C] × [C, z] product.
    """
    n = features.shape[0]
    logits = np.asarray(features @ weights) + bias
    logits -= logits.max(1, keepdims=True)
    base = np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(n), truth])
    importance = np.zeros(features.shape[1])
    for column in range(features.shape[1]):
        part = slice(features.indptr[column], features.indptr[column + 1])
        held, w = np.zeros(n), weights[column]
        held[features.indices[part]] = features.data[part]
        values, counts = np.unique(held, return_counts=True)
        if len(values) == 1 or np.ptp(w) == 0:
            continue
        others = logits - held[:, None] * w  # the logits without this column
        losses = np.log(np.exp(others) @ np.exp(w[:, None] * values)) - w[truth, None] * values  # [n, z]
        importance[column] = (losses @ counts).mean() / n - others[np.arange(n), truth].mean() - base
    return importance


def top_jaccard(first: ArrayLike, second: ArrayLike, k: int) -> float:
    """Jaccard similarity of the k most important features of two vectors [F]; ties go to the lower index."""
    tops = [set(np.argsort(-np.asarray(values), kind="stable")[:k].tolist()) for values in (first, second)]
    return len(tops[0] & tops[1]) / len(tops[0] | tops[1])


def fleiss_kappa(counts: ArrayLike) -> float | None:
    """Fleiss' κ of [items, categories] counts of ratings; every item has the same number of raters, at least 2.

    (P̄ − P̄ₑ) / (1 − P̄ₑ) (Fleiss 1971). None if all ratings are in one category: chance explains all agreement.
    """
    table = np.asarray(counts, float)
    raters = table[0].sum()
    if raters < 2 or (table.sum(1) != raters).any():
        raise ValueError("every item needs the same number of ratings, at least 2")
    observed = np.mean((np.sum(table**2, 1) - raters) / (raters * (raters - 1)))
    expected = np.sum((table.sum(0) / table.sum()) ** 2)
    return None if expected == 1 else float((observed - expected) / (1 - expected))


def cohen_kappa(first: ArrayLike, second: ArrayLike) -> float | None:
    """Cohen's κ of two raters' labels (Cohen 1960). None if both gave the same single label throughout."""
    a, b = np.asarray(first), np.asarray(second)
    expected = sum(np.mean(a == label) * np.mean(b == label) for label in np.union1d(a, b))
    return None if expected == 1 else float((np.mean(a == b) - expected) / (1 - expected))
