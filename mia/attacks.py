"""Membership scores of one text from per-token statistics: arrays in, one number out.

All scores have the same orientation: HIGHER = MORE LIKELY A MEMBER. Log-probabilities are in nats. All arrays of a text
are [n] over its scored tokens 2 … T (the first token has no context), n = T − 1:

    logp       log p of the actual token               mean, deviation  of log p over the vocabulary, under p
    hit        1.0 if that token was the most likely   entropy          = −mean, in nats

A score that is not defined raises `Undefined` with the reason; none of these functions returns NaN.
"""

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Values = Sequence[float] | npt.NDArray[np.floating[Any]]  # [n], one per scored token
PERCENTS = tuple(range(10, 101, 10))  # of min_k and min_k_pp
SMALLEST_DEVIATION = 1e-6
SURP_PERCENT, SURP_ENTROPY = 40, 2.0
CON_RECALL_GAMMA = 0.5
DC_PDD_CEILING = 0.01
WINDOWS = (2, 3, 4, 6, 9, 13, 18, 25, 32, 40)
N_NEIGHBOURS = 25
AGAINST_BASE = ("ref", "ez", "wbc")  # these compare with the base, so they have no score for the base itself


class Undefined(ValueError):
    """The score is not defined for a text; the message is the reason, one of a few fixed sentences."""


def loss(logp: Values) -> float:
    """ℓ = mean log p: minus the loss (Yeom et al. 2018)."""
    if not len(logp):
        raise Undefined("under 2 tokens")
    return float(np.mean(logp, dtype=np.float64))


def zlib_ratio(logp: Values, text: str) -> float:
    """ℓ / bytes of zlib(UTF-8 of the text), the loss per compressed byte (Carlini et al. 2021)."""
    return loss(logp) / len(zlib.compress(text.encode()))


def difference(logp: Values, other: Values) -> float:
    """ℓ minus the ℓ of another pass over its own tokens: `lowercase` (same model, lower-cased; Carlini et al. 2021)
    or `ref` (a reference model; Watson et al. 2022)."""
    return loss(logp) - loss(other)


def lowest(n: int, percent: int) -> int:
    """The number of tokens in the lowest `percent` % of n: ⌊percent·n/100⌋, at least 1."""
    return max(1, percent * n // 100)


def min_k(logp: Values, percents: Sequence[int] = PERCENTS) -> list[float]:
    """Mean of the lowest k % of the token log-probabilities, for each k in `percents` (Shi et al. 2024); k 100 is ℓ."""
    if not len(logp):
        raise Undefined("under 2 tokens")
    sums = np.cumsum(np.sort(np.asarray(logp, np.float64)))
    counts = [lowest(len(sums), percent) for percent in percents]
    return [float(sums[count - 1] / count) for count in counts]


def min_k_pp(logp: Values, mean: Values, deviation: Values, percents: Sequence[int] = PERCENTS) -> list[float]:
    """min_k of (log p − μ)/σ, with μ and σ the probability-weighted mean and deviation of log p over the vocabulary at
    that position, σ at least 1e-6 (Zhang et al. 2024, Min-K%++)."""
    spread = np.maximum(np.asarray(deviation, np.float64), SMALLEST_DEVIATION)
    return min_k((np.asarray(logp, np.float64) - mean) / spread, percents)


def surp(logp: Values, entropy: Values, percent: int = SURP_PERCENT, most: float = SURP_ENTROPY) -> float:
    """Mean log p of surprising tokens: those in the lowest `percent` % of the text with entropy < `most` nats (Zhang
    and Wu 2024). If there are none: the lowest log p among tokens with entropy < `most`, or undefined without any."""
    if not len(logp):
        raise Undefined("under 2 tokens")
    values, sure = np.asarray(logp, np.float64), np.asarray(entropy) < most
    if not sure.any():
        raise Undefined(f"no token with entropy below {most} nats")
    low = np.zeros(len(values), bool)
    low[np.argsort(values, kind="stable")[: lowest(len(values), percent)]] = True
    chosen = values[low & sure]
    return float(chosen.mean() if len(chosen) else values[sure].min())


def recall(logp: Values, given_nonmembers: Values) -> float:
    """ℓ(x | P) / ℓ(x), P a prefix of non-members (Xie et al. 2024): both are negative, and P helps non-members more, so
    the ratio is larger for members. `given_nonmembers` [n]: log p of the same tokens after P."""
    return loss(given_nonmembers) / _divisor(logp)


def con_recall(logp: Values, given_nonmembers: Values, given_members: Values, gamma: float = CON_RECALL_GAMMA) -> float:
    """(ℓ(x | P_non) − γ ℓ(x | P_mem)) / ℓ(x) (Wang et al. 2025, Con-ReCall)."""
    return (loss(given_nonmembers) - gamma * loss(given_members)) / _divisor(logp)


def _divisor(logp: Values) -> float:
    value = loss(logp)
    if value == 0:
        raise Undefined("log-probability 0: nothing to divide by")
    return value


def dc_pdd(
    tokens: Sequence[int] | npt.NDArray[np.integer[Any]],
    logp: Values,
    counts: npt.ArrayLike,
    ceiling: float = DC_PDD_CEILING,
) -> float:
    """Mean over the first occurrence of each scored token of min(p · ln(1/freq), ceiling), with
    freq = (count + 1)/(total + V) in a reference corpus (Zhang et al. 2024, DC-PDD).

    tokens [n]: ids of the scored tokens. counts [V]: how often each token occurs in the corpus.
    """
    if not len(logp):
        raise Undefined("under 2 tokens")
    corpus = np.asarray(counts, np.float64)
    distinct, first = np.unique(np.asarray(tokens), return_index=True)
    frequency = (corpus[distinct] + 1) / (corpus.sum() + len(corpus))
    return float(np.minimum(np.exp(np.asarray(logp, np.float64)[first]) * -np.log(frequency), ceiling).mean())


def neighborhood(logp: Values, neighbours: Values) -> float:
    """ℓ(x) minus the mean ℓ of its neighbours (Mattern et al. 2023). neighbours: ℓ of each."""
    if not len(neighbours):
        raise Undefined("no neighbours")
    return loss(logp) - float(np.mean(neighbours, dtype=np.float64))


def ez(logp: Values, reference: Values, hit: Values) -> float:
    """Error zone: P/(P + N) over the tokens that the target mispredicts, where P and N are the sums of the positive and
    of the absolute negative Δ = log p − log p under the reference."""
    if not len(logp):
        raise Undefined("under 2 tokens")
    change = (np.asarray(logp, np.float64) - reference)[np.asarray(hit) == 0]
    total = float(np.abs(change).sum())
    if total == 0:
        raise Undefined("no change against the reference on mispredicted tokens")
    return float(change[change > 0].sum()) / total


def wbc(logp: Values, reference: Values, windows: Sequence[int] = WINDOWS) -> float:
    """Window-based comparison: the share of windows of w consecutive tokens with a lower loss under the target than
    under the reference, averaged over the window sizes w (capped at n)."""
    if not len(logp):
        raise Undefined("under 2 tokens")
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(logp, np.float64) - reference)])
    shares = []
    for size in windows:
        size = min(size, len(logp))
        shares.append(float(np.mean(sums[size:] - sums[:-size] > 0)))
    return float(np.mean(shares))
