"""common/stats.py: closed forms by hand, and coverage by simulation at the points where intervals fail."""

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from bench import coverage
from common import stats


def test_no_hit_and_all_hits_are_exact():
    """0 of n: 1 − (α/2)^(1/n) (Clopper & Pearson): 20 → 0.1684; a total of 20 rows × 4 counts its rows."""
    high = 1 - 0.025 ** (1 / 20)
    assert high == pytest.approx(0.16843, abs=1e-5)
    assert stats.clopper_pearson(0, 20) == pytest.approx([0, high])
    assert stats.clustered_rate(np.zeros((20, 4))) == pytest.approx([0, high])
    assert stats.clustered_rate(np.ones((20, 4))) == pytest.approx([1 - high, 1])
    assert stats.clustered_rate(np.full((5, 2), np.nan)) is None and stats.clopper_pearson(None, 0) is None


def test_a_row_that_always_agrees_counts_once_and_independent_cells_count_each():
    agreeing = np.repeat([[1.0] * 4, [0.0] * 4], 25, axis=0)
    low, high = stats.clustered_rate(agreeing)
    assert [low, high] == pytest.approx(stats.clopper_pearson(25, 50))  # 50 rows, not 200 cells
    apart = np.random.default_rng(0).integers(0, 2, (400, 4)).astype(float)
    low, high = stats.clustered_rate(apart)
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(1600), rel=0.1)
    apart[0, 1] = np.nan  # an answer that was not scored
    assert stats.clustered_rate(apart) == pytest.approx([low, high], abs=2e-3)


def test_newcombe_by_hand():
    """At an area of 1 the lower end solves 1 − θ = z √V(θ); m = n = 20: checked by putting it back."""
    low, high = stats.newcombe(1.0, 20, 20, 1.959964)
    shape = 1 + 19 * ((1 - low) / (2 - low) + low / (1 + low))
    assert high == 1 and 1 - low == pytest.approx(1.959964 * math.sqrt(low * (1 - low) * shape / 400), rel=1e-6)
    assert 0.88 < low < 0.92
    assert stats.newcombe(0.0, 20, 20, 1.959964) == pytest.approx((0.0, 1 - low), abs=1e-6)


def test_separated_classes_are_not_certain():
    low, high = stats.auc_interval(np.arange(20) + 100.0, np.arange(20.0))
    assert high == 1 and low < 0.92
    assert stats.auc_interval(np.arange(20.0), np.arange(20) + 100.0) == pytest.approx([0, 1 - low])
    wide = stats.auc_interval(np.arange(20) + 100.0, np.arange(20.0), 0.99)
    assert wide[0] < low


def test_delong_variance_against_the_definition():
    """Placement values by loops (DeLong et al. 1988), ties at one half; where DeLong is the wider of the two."""
    rng = np.random.default_rng(3)
    members, others = np.round(rng.normal(0, 6, 15)), np.round(rng.normal(0, 1, 400))
    psi = [[1.0 if x > y else 0.5 if x == y else 0.0 for y in others] for x in members]
    rows, columns = np.mean(psi, 1), np.mean(psi, 0)
    area = float(np.mean(psi))
    error = math.sqrt(np.var(rows, ddof=1) / 15 + np.var(columns, ddof=1) / 400) / (area * (1 - area))
    logit = math.log(area / (1 - area))
    wanted = [1 / (1 + math.exp(-(logit + sign * scipy_stats.norm.ppf(0.975) * error))) for sign in (-1, 1)]
    assert stats.auc_interval(members, others) == pytest.approx(wanted, abs=1e-9)


def test_holm_by_hand():
    """0.01·3, max(0.02·2, …), max(0.04·1, …): 0.03, 0.04, 0.04, in their order; never above 1."""
    assert stats.holm([0.02, 0.01, 0.04]) == pytest.approx([0.04, 0.03, 0.04])
    assert stats.holm([0.6, 0.9]) == [1.0, 1.0] and stats.holm([]) == []


LEAST = scipy_stats.binom.ppf(1e-3, 600, 0.93) / 600  # 600 runs with a coverage of 93 % fall below this once in 1,000


def test_coverage_of_totals_where_the_bootstrap_failed():
    """Rates of 0.1 % and 0.5 % with 100 to 1,000 rows, answers of a row independent, correlated, identical."""
    rng = np.random.default_rng(1)
    for rows in (100, 500, 1000):
        for rate in (0.001, 0.005, 0.05):
            for correlation in (0.0, 0.3, 1.0):
                low, high = stats._clustered_rates(coverage.clustered(rows, rate, correlation, 600, rng))
                assert ((low <= rate) & (rate <= high)).mean() >= LEAST, (rows, rate, correlation)


@pytest.mark.parametrize("kind", ("normal", "heavy-tailed"))
def test_coverage_of_the_auc_where_the_bootstrap_failed(kind):
    """Areas of 0.95 and 0.99 with 20 and 50 texts per side: the bootstrap covered 75 to 93 %."""
    from scipy.optimize import brentq

    draw, area = coverage.shifts(kind)
    rng = np.random.default_rng(2)
    for target in (0.95, 0.99):
        shift = brentq(lambda s, target=target: area(s) - target, 0, 40, xtol=1e-4)
        for m, n in ((20, 20), (50, 50)):
            bounds = [stats.auc_interval(*draw(rng, m, n, shift)) for _ in range(600)]
            assert coverage.tally(bounds, area(shift))["coverage"] >= LEAST, (target, m, n)
