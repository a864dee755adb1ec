"""Lower bounds on ε from one training run by f-DP (Mahloujifar, Melis and Chaudhuri 2024). Pure functions.

A training is f-DP if whoever decides from its result whether a canary was inserted, wrongly with probability α where it
was not, is wrong with probability f(α) or more where it was (Dong, Roth and Su 2022). In other words: no event has a
probability above 1 − f(x) with the canary if it has x without, or the other way round. Two families of f are tested:
Gaussian mechanisms, f(α) = Φ(Φ⁻¹(1 − α) − μ), and all (ε, δ)-DP trainings.
"""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy.special import log_ndtr, ndtr, ndtri

Floats = npt.NDArray[np.float64]
Counts = npt.ArrayLike
Inverse = Callable[[Floats, Floats], Floats]  # (probability y, parameter) → the smallest x with 1 − f(x) ≥ y

MOST_MU, MOST_EPSILON = 16.0, 64.0  # no audit shows more
FINE = 1e-5  # bounds are rounded down by at most this


def gaussian_inverse(y: Floats, mu: Floats) -> Floats:
    """1 − f(x) = Φ(Φ⁻¹(x) + μ)."""
    return np.asarray(ndtr(ndtri(y) - mu))


def epsilon_delta_inverse(delta: float) -> Inverse:
    """1 − f(x) = min(1, e^ε x + δ, 1 − e^−ε (1 − δ − x)); an x below 0 means that any x will do."""

    def inverse(y: Floats, epsilon: Floats) -> Floats:
        return np.maximum((y - delta) * np.exp(-epsilon), 1 - delta - np.exp(epsilon) * (1 - y))

    return inverse


def refuted(
    correct: Counts, guesses: Counts, canaries: int, level: float, inverse: Inverse, parameter: Counts, choices: int = 2
) -> npt.NDArray[np.bool_]:
    """Whether, under f, P(at least `correct` of `guesses` are right) is at most `level`; elementwise.

    Let p_j be the probability of exactly j right guesses. For every canary, the event that its guess is right and j or
    more are right in all becomes, with the canary's other choice, the event that it is wrong and j − 1 or more are
    right. Hence, with m canaries and c guesses (theorem and algorithm of the paper),

        Σ_{j>i} j p_j / m  ≤  1 − f( Σ_{j≥i} (c − j) p_j / (m (choices − 1)) )     for every i.

    If P(at least `correct`) were `level`, the least demanding way would be to have exactly `correct` right. From there
    down, p_i is the smallest that satisfies the inequality; the claim is refuted if the p_i then add up to more than 1.
    choices: what each canary is drawn from at random; 2 for inserted or not.
    """
    arrays = np.broadcast_arrays(correct, guesses, parameter)
    correct, guesses, parameter = (np.asarray(array, dtype=float) for array in arrays)
    right, wrong = level * correct / canaries, level * (guesses - correct) / canaries  # Σ j p_j / m, Σ (c − j) p_j / m
    total = guesses / canaries
    for i in range(int(correct.max(initial=0)) - 1, -1, -1):
        open_ = (i < correct) & (right + wrong <= total)
        needed = (choices - 1) * inverse(np.where(open_, right, 0.5), parameter)
        more = np.where(open_, np.maximum(needed - wrong, 0.0), 0.0)
        wrong = wrong + more
        right = right + more * i / np.maximum(guesses - i, 1)
        if i < correct.min() and not more.any():
            break  # nothing changes any more
    return np.asarray(right + wrong > total)


def largest_refuted(
    correct: Counts, guesses: Counts, canaries: int, level: float, inverse: Inverse, most: float, choices: int = 2
) -> Floats:
    """The largest parameter of a family that is refuted at `level`, rounded down; 0 if not even 0 is."""
    correct, guesses = (np.asarray(array, dtype=float) for array in np.broadcast_arrays(correct, guesses))
    low, high = np.zeros(correct.shape), np.full(correct.shape, most)
    some = refuted(correct, guesses, canaries, level, inverse, low, choices)
    for _ in range(math.ceil(math.log2(most / FINE))):
        middle = (low + high) / 2
        beyond = refuted(correct, guesses, canaries, level, inverse, middle, choices)
        low, high = np.where(beyond, middle, low), np.where(beyond, high, middle)
    return np.where(some, low, 0.0)


def gaussian_mu(correct: Counts, guesses: Counts, canaries: int, level: float, choices: int = 2) -> Floats:
    """Lower bounds on the μ of a Gaussian mechanism."""
    return largest_refuted(correct, guesses, canaries, level, gaussian_inverse, MOST_MU, choices)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The ε of a μ-Gaussian mechanism at δ > 0: Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ) = δ (Balle and Wang 2018)."""
    from scipy.optimize import brentq

    if 2 * ndtr(mu / 2) - 1 <= delta:
        return 0.0

    def excess(epsilon: float) -> float:
        first, second = log_ndtr(mu / 2 - epsilon / mu), epsilon + log_ndtr(-mu / 2 - epsilon / mu)
        return float(first + np.log(-np.expm1(min(second - first, -1e-300))) - math.log(delta))

    found: float = brentq(excess, 0.0, mu * (mu / 2 - float(ndtri(delta))), xtol=1e-9)
    return found


def gaussian_bounds(correct: Counts, guesses: Counts, canaries: int, delta: float, level: float) -> list[float]:
    """Lower bounds on ε at δ > 0 if the training is a Gaussian mechanism."""
    mu = gaussian_mu(correct, guesses, canaries, level)
    return [gaussian_epsilon(float(value), delta) for value in mu]


def epsilon_delta_bounds(correct: Counts, guesses: Counts, canaries: int, delta: float, level: float) -> list[float]:
    """Lower bounds on ε at δ, whatever the training."""
    bounds = largest_refuted(correct, guesses, canaries, level, epsilon_delta_inverse(delta), MOST_EPSILON)
    return [float(bound) for bound in bounds]
