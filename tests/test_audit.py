"""The one-run audit: worked numbers, an exact-ε mechanism it must not exceed, and one it must catch."""

import math

import numpy as np
import pytest

from canary import audit


def test_p_value_by_hand():
    """δ = 0, ε = ln 3 (q = 3/4): 4 of 4 right has (3/4)^4 = 0.31640625; with δ the worst slope is at i = 1."""
    assert audit.p_value(4, 4, 4, math.log(3), 0.0) == pytest.approx(0.31640625)
    # P(B ≥ 3) = 0.73828125, so max_i [P(B ≥ 4−i) − P(B ≥ 4)]/i = 0.421875 at i = 1; 2 · 10 · 1e-3 · 0.421875
    assert audit.p_value(4, 4, 10, math.log(3), 1e-3) == pytest.approx(0.31640625 + 0.0084375)
    assert audit.p_value(0, 4, 10, 1.0, 0.0) == 1.0


@pytest.mark.parametrize(("epsilon", "needed"), [(1, 23), (2, 55), (4, 381)])
def test_all_right_guesses_needed_at_999(epsilon, needed):
    """(e^ε/(1+e^ε))^r ≤ 0.001: 23, 55 and 381 right guesses for ε = 1, 2, 4 (δ = 0)."""
    assert audit.lower_bound(needed, needed, needed, 0.0, 0.001) > epsilon
    assert audit.lower_bound(needed - 1, needed - 1, needed, 0.0, 0.001) <= epsilon


def test_bound_is_where_the_p_value_meets_the_level():
    bound = audit.lower_bound(75, 80, 200, 1e-5, 0.01)
    assert audit.p_value(75, 80, 200, bound, 1e-5) <= 0.01 < audit.p_value(75, 80, 200, bound + 1e-3, 1e-5)
    assert audit.lower_bound(40, 80, 200, 1e-5, 0.01) == 0.0


def test_randomised_response_is_rarely_above_its_epsilon():
    """Each coin is reported truly with e^ε/(1+e^ε): exactly ε-private, so at most 5 % of audits may exceed ε."""
    rng, epsilon, above, bounds = np.random.default_rng(0), 1.0, 0, []
    for _ in range(300):
        included = rng.random(200) < 0.5
        truthful = rng.random(200) < math.exp(epsilon) / (1 + math.exp(epsilon))
        scores = np.where(truthful, included, ~included) + 1e-3 * rng.random(200)
        found = audit.one_run(scores, included, 0.0)
        bounds.append(found["epsilon"])
        above += found["epsilon"] > epsilon
    assert above <= 300 * 0.05 + 3 * math.sqrt(300 * 0.05 * 0.95)
    assert np.median(bounds) > 0.2  # and it does see that there is some


def test_perfect_scores_are_caught():
    included = np.random.default_rng(1).random(200) < 0.5
    found = audit.one_run(included + 0.0, included, 1e-5)
    assert found["epsilon"] > 2 and found["included"] == included.sum() and len(found["guesses"]) == 5
    assert audit.one_run(np.zeros(1), [True], 1e-3)["epsilon"] is None
    with pytest.raises(ValueError, match="no score"):
        audit.one_run([float("nan"), 1], [True, False], 0.1)


@pytest.mark.parametrize("first", (True, False))
def test_equal_scores_carry_no_information(first):
    """100 in, then 100 out, one score for all: ranked by position, every guess would be right (ε ≥ 2.83)."""
    included = [first] * 100 + [not first] * 100
    assert audit.one_run(np.zeros(200), included, 1e-5)["epsilon"] == 0
    above = sum(audit.one_run(np.zeros(200), included, 1e-5, seed=seed)["epsilon"] > 0 for seed in range(100))
    assert above <= 5 + 3 * math.sqrt(100 * 0.05 * 0.95)
    half = np.r_[np.ones(50), np.zeros(150)]  # the first 50 are told apart, the rest not
    assert audit.ranking(half)[:50].max() < 50 and audit.ranking(half).tolist() != list(range(200))


def test_scores_without_ties_are_ranked_by_themselves():
    scores = np.random.default_rng(2).normal(size=50)
    assert audit.ranking(scores).tolist() == np.argsort(-scores).tolist()
