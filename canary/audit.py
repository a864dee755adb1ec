"""Empirical lower bounds of ε from canaries that were each included by a fair coin. Pure functions."""

import math

import numpy as np

TIES = 3407  # seed of the order of equal scores
SHARES = (0.02, 0.05, 0.1, 0.2, 0.4)  # of the canaries guessed about; fixed beforehand, never chosen by the result


def p_value(correct: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """Probability, under any (ε, δ)-private training, of at least `correct` right guesses out of `guesses`.

    P(B ≥ v) + 2 m δ max_i [P(B ≥ v − i) − P(B ≥ v)] / i with B ~ Bin(guesses, e^ε / (1 + e^ε)) and m all canaries,
    abstentions included (Steinke, Nasr and Jagielski 2023, theorem 5.2).
    """
    from scipy.special import expit
    from scipy.stats import binom

    q = expit(epsilon)
    tail = binom.sf(correct - 1, guesses, q)
    steps = np.arange(1, correct + 1)
    slope = ((binom.sf(correct - 1 - steps, guesses, q) - tail) / steps).max() if correct else 0.0
    return float(min(1.0, tail + 2 * canaries * delta * slope))


def lower_bound(correct: int, guesses: int, canaries: int, delta: float, level: float) -> float:
    """The largest ε that `correct` right guesses reject at `level` (one-sided); 0 when even ε = 0 is not rejected."""
    low, high = 0.0, 64.0
    if p_value(correct, guesses, canaries, low, delta) > level:
        return 0.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(correct, guesses, canaries, middle, delta) <= level else (low, middle)
    return low


def ranking(scores, seed: int = TIES) -> np.ndarray:
    """(m,) indices, highest score first; equal scores in random order, so that places in the file tell nothing."""
    scores = np.asarray(scores, dtype=float)
    return np.lexsort((np.random.default_rng(seed).permutation(len(scores)), -scores))


def one_run(scores, included, delta: float, level: float = 0.05, seed: int = TIES) -> dict:
    """Lower bound of ε, valid with probability 1 − level, from one training run.

    scores (m,): higher = more likely included; included (m,) bool: the coins. For each share of SHARES the highest
    half of the guesses says "in", the lowest half "out", the rest abstains; every share is tested at level / 5.
    Equal scores are ranked at random by `seed`: they carry no information, wherever their canaries stand.
    Returns {epsilon, most, canaries, included, level, delta, guesses: [{share, guesses, correct, epsilon}]}; most: the
    bound that only right guesses would have given, the audit's power. Both are null with fewer than five canaries, of
    which no share is a pair of guesses.
    """
    scores, included = np.asarray(scores, dtype=float), np.asarray(included, dtype=bool)
    if np.isnan(scores).any():
        raise ValueError("a canary has no score")
    order, m = ranking(scores, seed), len(scores)
    found = []
    for share in SHARES:
        half = math.floor(share * m / 2)
        if half:
            correct = int(included[order[:half]].sum() + (~included[order[-half:]]).sum())
            bound = lower_bound(correct, 2 * half, m, delta, level / len(SHARES))
            found.append({"share": share, "guesses": 2 * half, "correct": correct, "epsilon": bound})
    alone = level / len(SHARES)
    most = [lower_bound(one["guesses"], one["guesses"], m, delta, alone) for one in found]
    return {
        "epsilon": max((one["epsilon"] for one in found), default=None),
        "most": max(most, default=None),
        "canaries": m,
        "included": int(included.sum()),
        "level": level,
        "delta": delta,
        "guesses": found,
    }
