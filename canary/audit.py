"""Empirical lower bounds on ε from canaries that were each inserted with probability ½. Pure functions."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

TIES = 3407  # seed for breaking ties between equal scores
SHARES = (0.02, 0.05, 0.1, 0.2, 0.4)  # of the canaries guessed; fixed in advance, never chosen by the result


class Guesses(TypedDict):
    """The bound from one share of the canaries."""

    share: float
    guesses: int
    correct: int
    epsilon: float


class Bound(TypedDict):
    """The largest bound over all shares. most: the bound if every guess were correct, i.e. the audit's power.

    epsilon is None if `most` is None (fewer than five canaries) or 0: then the audit could not have shown anything.
    """

    epsilon: float | None
    most: float | None
    canaries: int
    included: int
    level: float
    delta: float
    guesses: list[Guesses]


# (correct, guesses, canaries, δ, level) → the bound of each pair of counts
Method = Callable[[Sequence[int], Sequence[int], int, float, float], Sequence[float]]


def p_value(correct: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """Bound on the probability, under any (ε, δ)-DP training, of at least `correct` correct guesses out of `guesses`.

    P(B ≥ v) + 2 m δ max_i [P(B ≥ v − i) − P(B ≥ v)] / i with B ~ Bin(guesses, e^ε / (1 + e^ε)) and m the number of
    canaries, abstentions included (Steinke, Nasr and Jagielski 2023, theorem 5.2).
    """
    from scipy.special import expit
    from scipy.stats import binom

    q = expit(epsilon)
    tail = binom.sf(correct - 1, guesses, q)
    steps = np.arange(1, correct + 1)
    slope = ((binom.sf(correct - 1 - steps, guesses, q) - tail) / steps).max() if correct else 0.0
    return float(min(1.0, tail + 2 * canaries * delta * slope))


def lower_bound(correct: int, guesses: int, canaries: int, delta: float, level: float) -> float:
    """The largest ε that `correct` correct guesses reject at `level` (one-sided); 0 if not even ε = 0 is rejected."""
    low, high = 0.0, 64.0
    if p_value(correct, guesses, canaries, low, delta) > level:
        return 0.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(correct, guesses, canaries, middle, delta) <= level else (low, middle)
    return low


def lower_bounds(
    correct: Sequence[int], guesses: Sequence[int], canaries: int, delta: float, level: float
) -> list[float]:
    """`lower_bound` of each pair of counts (Steinke, Nasr and Jagielski 2023)."""
    return [lower_bound(right, n, canaries, delta, level) for right, n in zip(correct, guesses, strict=True)]


def ranking(scores: Sequence[float] | NDArray[Any], seed: int = TIES) -> NDArray[np.intp]:
    """(m,) indices, highest score first; ties are broken at random, so that the order in the file does not matter."""
    values = np.asarray(scores, dtype=float)
    return np.lexsort((np.random.default_rng(seed).permutation(len(values)), -values))


def halves(canaries: int) -> dict[float, int]:
    """{share: guesses "in", and as many "out"} of the shares that give any."""
    return {share: half for share in SHARES if (half := math.floor(share * canaries / 2))}


def one_run(
    scores: Sequence[float],
    included: Sequence[bool],
    delta: float,
    level: float = 0.05,
    seed: int = TIES,
    method: Method = lower_bounds,
) -> Bound:
    """Lower bound on ε, valid with probability 1 − level, from one training run.

    scores (m,): higher = more likely included; included (m,): the coin flips. For each share in SHARES, the highest
    scores are guessed "in", as many of the lowest "out", and the rest abstain; each share is tested at level / 5. Ties
    are broken at random by `seed`: their order carries no information. method: whose bound; fdp.py has others.
    """
    if np.isnan(np.asarray(scores, dtype=float)).any():
        raise ValueError("a canary has no score")
    coins = np.asarray(included, dtype=bool)
    order, m = ranking(scores, seed), len(scores)
    pairs = halves(m)
    guesses = [2 * half for half in pairs.values()]
    correct = [int(coins[order[:half]].sum() + (~coins[order[-half:]]).sum()) for half in pairs.values()]
    bounds = method([*correct, *guesses], [*guesses, *guesses], m, delta, level / len(SHARES))
    found = [float(bound) for bound in bounds[: len(pairs)]]
    most = max((float(bound) for bound in bounds[len(pairs) :]), default=None)
    return {
        "epsilon": max(found) if most else None,
        "most": most,
        "canaries": m,
        "included": int(coins.sum()),
        "level": level,
        "delta": delta,
        "guesses": [
            {"share": share, "guesses": n, "correct": right, "epsilon": bound}
            for share, n, right, bound in zip(pairs, guesses, correct, found)
        ],
    }
