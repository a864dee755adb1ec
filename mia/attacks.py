"""Membership scores of one text, from per-token statistics: arrays in, one number out.

Every score is oriented the same way: HIGHER = MORE LIKELY A MEMBER. Log-probabilities are in nats. All arrays of a text
are [n] over its scored tokens, 2 … T as the tokenizer gives them (the first token has nothing before it), n = T − 1:

    logp       log p of the token that stands there          mean, deviation  of log p over the vocabulary, under p
    hit        1.0 where that token was the most likely one  entropy          = −mean, in nats

A score without a value raises `Undefined` with the reason; none of these functions returns NaN.
"""

import zlib

import numpy as np

PERCENTS = tuple(range(10, 101, 10))  # of min_k and min_k_pp
SMALLEST_DEVIATION = 1e-6
SURP_PERCENT, SURP_ENTROPY = 40, 2.0
CON_RECALL_GAMMA = 0.5
DC_PDD_CEILING = 0.01
WINDOWS = (2, 3, 4, 6, 9, 13, 18, 25, 32, 40)
N_NEIGHBOURS = 25


class Undefined(ValueError):
    """A text has no such score; the message is the reason, one of a few fixed sentences."""


def loss(logp) -> float:
    """ℓ = mean log p: minus the loss (Yeom et al. 2018)."""
    if not len(logp):
        raise Undefined("under 2 tokens")
    return float(np.mean(logp, dtype=np.float64))


def zlib_ratio(logp, text: str) -> float:
    """ℓ / bytes of zlib(UTF-8 of the text), the loss per compressed byte (Carlini et al. 2021)."""
    return loss(logp) / len(zlib.compress(text.encode()))


def difference(logp, other) -> float:
    """ℓ − ℓ of another pass over its own tokens: `lowercase` (the same model, text in lower case; Carlini et al. 2021)
    and `ref` (a reference model; Watson et al. 2022)."""
    return loss(logp) - loss(other)


def lowest(n: int, percent: int) -> int:
    """How many of n tokens are the lowest `percent` %: ⌊percent·n/100⌋ in integers, at least 1."""
    return max(1, percent * n // 100)


def min_k(logp, percents=PERCENTS) -> list[float]:
    """Mean of the lowest k % of the token log-probabilities, for each k in `percents` (Shi et al. 2024); k 100 is ℓ."""
    if not len(logp):
        raise Undefined("under 2 tokens")
    sums = np.cumsum(np.sort(np.asarray(logp, np.float64)))
    counts = [lowest(len(sums), percent) for percent in percents]
    return [float(sums[count - 1] / count) for count in counts]


def min_k_pp(logp, mean, deviation, percents=PERCENTS) -> list[float]:
    """min_k of (log p − μ)/σ, with μ and σ the probability-weighted mean and deviation of log p over the vocabulary at
    that position, σ at least 1e-6 (Zhang et al. 2024, Min-K%++)."""
    deviation = np.maximum(np.asarray(deviation, np.float64), SMALLEST_DEVIATION)
    return min_k((np.asarray(logp, np.float64) - mean) / deviation, percents)


def surp(logp, entropy, percent: int = SURP_PERCENT, most: float = SURP_ENTROPY) -> float:
    """Mean log p of surprising tokens: among the lowest `percent` % of the whole text and with entropy < `most` nats
    (Zhang and Wu 2024). None there: the lowest log p among tokens with entropy < `most`; none at all: undefined."""
    if not len(logp):
        raise Undefined("under 2 tokens")
    logp, sure = np.asarray(logp, np.float64), np.asarray(entropy) < most
    if not sure.any():
        raise Undefined(f"no token with entropy below {most} nats")
    low = np.zeros(len(logp), bool)
    low[np.argsort(logp, kind="stable")[: lowest(len(logp), percent)]] = True
    chosen = logp[low & sure]
    return float(chosen.mean() if len(chosen) else logp[sure].min())


def recall(logp, given_nonmembers) -> float:
    """ℓ(x | P) / ℓ(x), P a prefix of non-members (Xie et al. 2024): both are negative, and non-members profit more from
    P, so the ratio is larger for members. `given_nonmembers` [n]: log p of the same tokens after P."""
    return loss(given_nonmembers) / _divisor(logp)


def con_recall(logp, given_nonmembers, given_members, gamma: float = CON_RECALL_GAMMA) -> float:
    """(ℓ(x | P_non) − γ ℓ(x | P_mem)) / ℓ(x) (Wang et al. 2025, Con-ReCall)."""
    return (loss(given_nonmembers) - gamma * loss(given_members)) / _divisor(logp)


def _divisor(logp) -> float:
    value = loss(logp)
    if value == 0:
        raise Undefined("log-probability 0: nothing to divide by")
    return value


def dc_pdd(tokens, logp, counts, ceiling: float = DC_PDD_CEILING) -> float:
    """Mean over the first occurrence of each scored token of min(p · ln(1/freq), ceiling), with
    freq = (count + 1)/(total + V) in a reference corpus (Zhang et al. 2024, DC-PDD).

    tokens [n]: ids of the scored tokens. counts [V]: how often each token stands in the corpus.
    """
    if not len(logp):
        raise Undefined("under 2 tokens")
    counts = np.asarray(counts, np.float64)
    tokens, first = np.unique(np.asarray(tokens), return_index=True)
    frequency = (counts[tokens] + 1) / (counts.sum() + len(counts))
    return float(np.minimum(np.exp(np.asarray(logp, np.float64)[first]) * -np.log(frequency), ceiling).mean())


def neighborhood(logp, neighbours) -> float:
    """ℓ(x) − mean ℓ of its neighbours (Mattern et al. 2023). neighbours: ℓ of each."""
    if not len(neighbours):
        raise Undefined("no neighbours")
    return loss(logp) - float(np.mean(neighbours, dtype=np.float64))


def ez(logp, reference, hit) -> float:
    """Error zone: on the tokens that the target mispredicts, P/(P + N), with P and N the sums of the positive and of
    the absolute negative Δ = log p − log p of the reference."""
    if not len(logp):
        raise Undefined("under 2 tokens")
    change = (np.asarray(logp, np.float64) - reference)[np.asarray(hit) == 0]
    total = float(np.abs(change).sum())
    if total == 0:
        raise Undefined("no change against the reference on mispredicted tokens")
    return float(change[change > 0].sum()) / total


def wbc(logp, reference, windows=WINDOWS) -> float:
    """Window-based comparison: the share of windows of w neighbouring tokens whose loss under the target is below that
    under the reference, averaged over the sizes w (each at most n)."""
    if not len(logp):
        raise Undefined("under 2 tokens")
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(logp, np.float64) - reference)])
    shares = []
    for size in windows:
        size = min(size, len(logp))
        shares.append(float(np.mean(sums[size:] - sums[:-size] > 0)))
    return float(np.mean(shares))
