"""Exact interval and paired test of counts, for every script that reports a rate."""


def clopper_pearson(hits: int | None, n: int, level: float = 0.95) -> list[float] | None:
    """Exact binomial interval of a rate [low, high] (Clopper & Pearson 1934); None for n = 0."""
    from scipy import stats

    if n == 0:
        return None
    tail = (1 - level) / 2
    low = stats.beta.ppf(tail, hits, n - hits + 1) if hits else 0.0
    high = stats.beta.ppf(1 - tail, hits + 1, n - hits) if hits < n else 1.0
    return [float(low), float(high)]


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided McNemar p-value of paired outcomes: `gained` hit only now, `lost` only before (McNemar 1947)."""
    from scipy import stats

    n = gained + lost
    return 1.0 if n == 0 else float(min(1.0, 2 * stats.binom.cdf(min(gained, lost), n, 0.5)))
