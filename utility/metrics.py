"""Measures of what synthetic rows are good for, and of agreement between raters. Pure functions of arrays."""

from collections.abc import Sequence

import numpy as np


def rating_scores(truth: Sequence[int], predicted: Sequence[int]) -> dict[str, float]:
    """Accuracy, macro-F1 and mean absolute error in stars.

    Macro-F1: the unweighted mean of F1 over the ratings that occur in `truth` (0 for one never predicted).
    """
    truth, predicted = np.asarray(truth), np.asarray(predicted)
    f1 = []
    for label in np.unique(truth):
        hits = np.sum((truth == label) & (predicted == label))
        f1.append(2 * hits / (np.sum(truth == label) + np.sum(predicted == label)))
    return {
        "accuracy": float(np.mean(truth == predicted)),
        "macro_f1": float(np.mean(f1)),
        "mae": float(np.mean(np.abs(truth - predicted))),
    }


def majority(ratings: Sequence[int]) -> int:
    """The most common rating; the lowest of several."""
    values, counts = np.unique(np.asarray(ratings), return_counts=True)
    return int(values[counts.argmax()])


def expected_permutation_importance(features, weights: np.ndarray, bias: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """[F] rise of the mean log-loss (nats) of a linear softmax model when a feature's column is shuffled over the rows.

    features [n, F] sparse CSC;  weights [F, C], bias [C];  truth [n] class numbers.
    The expectation over all permutations, so without sampling noise: a row is equally likely to get the value of each
    of the n rows (Breiman 2001 shuffles once). A column with z distinct values costs one [n, C] × [C, z] product.
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


def top_jaccard(first: np.ndarray, second: np.ndarray, k: int) -> float:
    """Jaccard similarity of the k features of highest importance in two vectors [F]; ties: the lower index."""
    tops = [set(np.argsort(-np.asarray(values), kind="stable")[:k].tolist()) for values in (first, second)]
    return len(tops[0] & tops[1]) / len(tops[0] | tops[1])


def fleiss_kappa(counts) -> float | None:
    """Fleiss' κ of [items, categories] counts of ratings, each item rated by the same number of raters ≥ 2.

    (P̄ − P̄ₑ) / (1 − P̄ₑ) (Fleiss 1971). None where every rating is of one category: chance explains all agreement.
    """
    counts = np.asarray(counts, float)
    raters = counts[0].sum()
    if raters < 2 or (counts.sum(1) != raters).any():
        raise ValueError("every item needs the same number of ratings, at least 2")
    observed = np.mean((np.sum(counts**2, 1) - raters) / (raters * (raters - 1)))
    expected = np.sum((counts.sum(0) / counts.sum()) ** 2)
    return None if expected == 1 else float((observed - expected) / (1 - expected))


def cohen_kappa(first: Sequence, second: Sequence) -> float | None:
    """Cohen's κ of two raters' labels (Cohen 1960). None where both gave one and the same label throughout."""
    first, second = np.asarray(first), np.asarray(second)
    labels = np.union1d(first, second)
    expected = sum(np.mean(first == label) * np.mean(second == label) for label in labels)
    return None if expected == 1 else float((np.mean(first == second) - expected) / (1 - expected))
