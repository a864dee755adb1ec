"""Confidence intervals for rates and for the AUC, and tests on counts. bench/coverage.py checks them by simulation."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Scores = Sequence[float] | Floats


def clopper_pearson(hits: int | None, n: int, level: float = 0.95) -> list[float] | None:
    """Exact binomial interval [low, high] of a rate (Clopper & Pearson 1934); None for n = 0 or without a count."""
    return None if n == 0 or hits is None else [float(end) for end in _clopper_pearson(hits, n, level)]


def _clopper_pearson(hits: npt.ArrayLike, n: npt.ArrayLike, level: float) -> tuple[Floats, Floats]:
    """(low, high) for arrays; `hits` and `n` need not be integers."""
    from scipy import stats

    hits, n, tail = np.asarray(hits, float), np.asarray(n, float), (1 - level) / 2
    with np.errstate(invalid="ignore"):
        low = np.where(hits > 0, stats.beta.ppf(tail, hits, n - hits + 1), 0.0)
        high = np.where(hits < n, stats.beta.ppf(1 - tail, hits + 1, n - hits), 1.0)
    return low, high


FEW = 10  # with fewer hits or misses, the within-row correlation cannot be estimated


def clustered_rate(hits: Floats, level: float = 0.95) -> list[float] | None:
    """Interval of the mean of `hits` [rows, templates] (1, 0, NaN = not scored), correlated within a row.

    Clopper–Pearson with the effective sample size (Korn & Graubard 1998, Survey Methodology 24): the number of cells
    divided by the design effect, i.e. the variance between rows relative to independent cells; clipped to at least the
    number of rows and at most the number of cells. With fewer than 10 hits or misses it is the number of rows, as if a
    row's templates always agreed, so the interval is exact or conservative at 0 and at 1. None without a scored cell.
    """
    return None if np.isnan(hits).all() else [float(end[0]) for end in _clustered_rates(hits[None], level)]


def _clustered_rates(hits: Floats, level: float = 0.95) -> tuple[Floats, Floats]:
    """`clustered_rate` for a stack [S, rows, templates], each with a scored cell: (low [S], high [S])."""
    from scipy import stats

    known = ~np.isnan(hits)
    total, count = np.nansum(hits, 2), known.sum(2)
    cells, rows = count.sum(1), (count > 0).sum(1)
    rate = total.sum(1) / cells
    with np.errstate(divide="ignore", invalid="ignore"):
        between = ((total - rate[:, None] * count) ** 2).sum(1) * rows / np.maximum(rows - 1, 1) / cells**2
        effective = rate * (1 - rate) / between
        # degrees of freedom: the number of rows, not of cells
        effective = effective * (stats.norm.ppf(0.975) / stats.t.ppf(0.975, np.maximum(rows - 1, 1))) ** 2
    few = np.minimum(total.sum(1), cells - total.sum(1)) < FEW
    effective = np.where(few | ~np.isfinite(effective), rows, np.clip(effective, rows, cells))
    return _clopper_pearson(rate * effective, effective, level)


AUC_METHOD = "wider of DeLong on the logit scale and Newcombe"


def auc_interval(members: Scores, nonmembers: Scores, level: float = 0.95) -> list[float]:
    """Distribution-free interval of the area under the ROC curve of scores [M], [N].

    The hull of two intervals: DeLong's (DeLong, DeLong & Clarke-Pearson 1988) on the logit scale, which adapts to the
    distributions but has zero variance under perfect separation; and Newcombe's method 5 (2006, Statistics in Medicine
    25), which depends on the area alone and is valid at 0 and 1, but ignores heavy tails. Conservative.
    """
    from scipy import stats

    members, nonmembers = np.asarray(members, float), np.asarray(nonmembers, float)
    m, n, z = len(members), len(nonmembers), float(stats.norm.ppf((1 + level) / 2))
    ordered, others = np.sort(nonmembers), np.sort(members)
    above = (np.searchsorted(ordered, members, "left") + np.searchsorted(ordered, members, "right")) / (2 * n)
    below = 1 - (np.searchsorted(others, nonmembers, "left") + np.searchsorted(others, nonmembers, "right")) / (2 * m)
    area = float(above.mean())
    low, high = newcombe(area, m, n, z)
    if m > 1 and n > 1 and 0 < area < 1:
        error = z * np.sqrt(above.var(ddof=1) / m + below.var(ddof=1) / n) / (area * (1 - area))
        logit = np.log(area / (1 - area))
        low, high = min(low, 1 / (1 + np.exp(error - logit))), max(high, 1 / (1 + np.exp(-error - logit)))
    return [float(low), float(high)]


def direction(bounds: list[float] | None, of: str = "members") -> str | None:
    """What an interval of an AUC shows: `of` score higher, lower, or neither."""
    if bounds is None:
        return None
    if bounds[1] < 0.5:
        return "distinguishable, opposite direction: the sets are confounded or exchanged"
    return f"{of} higher" if bounds[0] > 0.5 else "not distinguishable"


def newcombe(area: float, m: int, n: int, z: float) -> tuple[float, float]:
    """(low, high): the areas θ with |θ − area| = z √V(θ), V(θ) = θ(1 − θ) [1 + (N − 1)((1 − θ)/(2 − θ) + θ/(1 + θ))] /
    (mn), N = (m + n)/2 (Newcombe 2006, method 5: Hanley and McNeil's variance at θ instead of at the estimate)."""
    from scipy.optimize import brentq

    def gap(theta: float) -> float:
        shape = 1 + ((m + n) / 2 - 1) * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return float(abs(theta - area) - z * np.sqrt(theta * (1 - theta) * shape / (m * n)))

    low = 0.0 if area == 0 or gap(1e-12) <= 0 else brentq(gap, 1e-12, min(area, 1 - 1e-9))
    high = 1.0 if area == 1 or gap(1 - 1e-12) <= 0 else brentq(gap, max(area, 1e-9), 1 - 1e-12)
    return low, high


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided McNemar p-value of paired outcomes: `gained` hit only now, `lost` only before (McNemar 1947)."""
    from scipy import stats

    n = gained + lost
    return 1.0 if n == 0 else float(min(1.0, 2 * stats.binom.cdf(min(gained, lost), n, 0.5)))


def holm(values: list[float]) -> list[float]:
    """Holm-adjusted p-values, in the given order (Holm 1979)."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    adjusted, highest = [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = highest
    return adjusted


def mean_or_none(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are not None; None if all are."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def student_interval(values: Sequence[float], level: float = 0.95) -> list[float] | None:
    """[low, high] of the mean of independent values, e.g. over seeds (Student's t); None under two values."""
    if len(values) < 2:
        return None
    from scipy import stats

    mean, n = math.fsum(values) / len(values), len(values)
    spread = (math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n) ** 0.5
    reach = float(stats.t.ppf((1 + level) / 2, n - 1)) * spread
    return [mean - reach, mean + reach]


def auc(members: Scores, nonmembers: Scores) -> float:
    """P(member > non-member) + ½ P(equal): the area under the ROC curve (Mann–Whitney)."""
    ordered = np.sort(nonmembers)
    below = np.searchsorted(ordered, members, "left") + np.searchsorted(ordered, members, "right")
    return float(below.sum() / (2 * len(members) * len(nonmembers)))


def interval(values: Scores, confidence: float = 0.95) -> list[float]:
    """Percentile interval [low, high] of simulated or resampled values [n]."""
    tail = (1 - confidence) / 2
    ends: list[float] = np.quantile(values, (tail, 1 - tail), method="inverted_cdf").tolist()
    return ends


def roc(members: Scores, nonmembers: Scores) -> tuple[Floats, Floats]:
    """(FPR, TPR) at every threshold, from (0, 0) to (1, 1); tied scores form one step."""
    cuts = np.unique(np.concatenate([members, nonmembers]))[::-1]
    false = len(nonmembers) - np.searchsorted(np.sort(nonmembers), cuts, "left")
    true = len(members) - np.searchsorted(np.sort(members), cuts, "left")
    return np.concatenate([[0], false / len(nonmembers)]), np.concatenate([[0], true / len(members)])


SAMPLE_SIZES = (1, 10, 100, 1000)


def probabilistic_extraction(log_p: npt.ArrayLike, counted: str = "rows") -> dict[str, dict[str, int | float]]:
    """(n, p)-discoverable extraction (Hayes et al. 2024, arXiv:2410.19482) from exact log probabilities [rows].

    log_p: natural log of the probability that one sample gives the row's secret (−inf if impossible). For each n in
    SAMPLE_SIZES (as text keys): the number of rows with 1 − (1−p)^n ≥ 0.5, under the key `counted`, and the `expected`
    number of rows hit at least once in n samples. No sampling noise.
    """
    p = np.exp(np.minimum(np.asarray(log_p, float), 0.0))
    result: dict[str, dict[str, int | float]] = {}
    for n in SAMPLE_SIZES:
        with np.errstate(divide="ignore"):
            reached = -np.expm1(n * np.log1p(-p))
        result[str(n)] = {counted: int((reached >= 0.5).sum()), "expected": float(reached.sum())}
    return result
