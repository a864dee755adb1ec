"""Statistics of the scores of secrets and decoys. Arrays in, numbers out.

The control needs no ground truth: secrets of rows that were never trained on, measured the same way. "Excess" is how
much more exposed the secrets of the training rows are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from common.stats import auc, auc_interval, clopper_pearson, mcnemar

Floats = npt.NDArray[np.float64]


def place_among(scores: Sequence[float] | Floats) -> float:
    """Share of decoys that score higher than the secret (ties count half), in [0, 1]; scores [1 + decoys], the secret's
    first. 0: the secret is the likeliest of all."""
    values = np.asarray(scores, float)
    decoys = values[1:]
    return float((np.sum(decoys > values[0]) + 0.5 * np.sum(decoys == values[0])) / len(decoys))


def exposure_bits(place: float, decoys: int) -> float:
    """log₂(number of candidates / the secret's rank among them) (Carlini et al. 2019, over the sampled decoys instead
    of the whole space): 0 … log₂(decoys + 1)."""
    return math.log2((decoys + 1) / (1 + place * decoys))


def excess(trained: Sequence[float], control: Sequence[float]) -> dict[str, object]:
    """How much more exposed the secrets of training rows are than those of held-out rows.

    value = P(a training secret ranks higher) + ½ P(tie) − ½, in [−½, ½]; low and high: 95 % interval from
    `stats.auc_interval`; p: one-sided Mann–Whitney test. All null with fewer than two secrets on either side.
    """
    if min(len(trained), len(control)) < 2:
        return {"value": None, "low": None, "high": None, "p": None, "undefined": "fewer than 2 secrets on a side"}
    members, others = -np.asarray(trained, float), -np.asarray(control, float)
    low, high = auc_interval(members, others)
    return {
        "value": auc(members, others) - 0.5,
        "low": low - 0.5,
        "high": high - 0.5,
        "p": mann_whitney(members, others),
    }


def mann_whitney(higher: Floats, lower: Floats) -> float:
    """One-sided p-value for `higher` being stochastically larger; 1 if all values are equal."""
    from scipy import stats

    if np.ptp(np.concatenate([higher, lower])) == 0:
        return 1.0
    return float(stats.mannwhitneyu(higher, lower, alternative="greater").pvalue)


def rate(hits: int, n: int) -> dict[str, object]:
    """A rate with its exact 95 % interval, low to high (Clopper–Pearson); null for n = 0."""
    low, high = clopper_pearson(hits, n) or (None, None)
    return {"hits": hits, "n": n, "rate": hits / n if n else None, "low": low, "high": high}


def fisher(hits: int, n: int, control_hits: int, control_n: int) -> float | None:
    """One-sided p-value for the first rate being larger (Fisher's exact test); None if either side is empty."""
    from scipy import stats

    if not n or not control_n:
        return None
    return float(stats.hypergeom.sf(hits - 1, n + control_n, hits + control_hits, n))


def rate_excess(hits: Sequence[int], n: Sequence[int]) -> dict[str, object]:
    """How much larger the share of the training side is, of (training, held-out) hits and items; p by Fisher."""
    return {
        "value": hits[0] / n[0] - hits[1] / n[1] if all(n) else None,
        "p": fisher(hits[0], n[0], hits[1], n[1]),
        "smallest_seen": smallest_hits(*n),
    }


def gained(now: Sequence[bool], before: Sequence[bool]) -> dict[str, float]:
    """Hits gained and lost relative to the base on the same items, with McNemar's exact two-sided p."""
    up = sum(a and not b for a, b in zip(now, before, strict=True))
    down = sum(b and not a for a, b in zip(now, before, strict=True))
    return {"gained": up, "lost": down, "p": mcnemar(up, down)}


# power: the smallest detectable effect


@lru_cache
def smallest_excess(n: int, control_n: int, alpha: float = 0.05) -> float | None:
    """The smallest excess at which the one-sided Mann–Whitney test of n against control_n has 80 % power at level alpha
    (normal approximation, two shifted normals); None if not even full separation reaches it."""
    from scipy import stats

    if not n or not control_n or 1 / math.comb(n + control_n, n) > alpha:
        return None
    sigma = math.sqrt((n + control_n + 1) / (12 * n * control_n))
    needed = (stats.norm.ppf(1 - alpha) + stats.norm.ppf(0.8)) * sigma
    return float(min(0.5, needed))


def smallest_hits(n: int, control_n: int, alpha: float = 0.05) -> int | None:
    """The smallest number of hits among n with p ≤ alpha against none among control_n; None if n is not enough."""
    return _first(n, lambda hits: (fisher(hits, n, 0, control_n) or 1.0) <= alpha) if n and control_n else None


def _first(n: int, holds: Callable[[int], bool]) -> int | None:
    low, high = 1, n
    if not holds(n):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low
