"""The one-run bounds against brute force: linear programs over all mechanisms, hand-worked cases, and jax_privacy."""

import json
import math
import os
import subprocess
from itertools import combinations, product

import numpy as np
import pytest
from scipy.optimize import linprog
from scipy.stats import binom, norm

from bench import bounds
from canary import audit, fdp, lines


def p_value(correct, guesses, canaries, inverse, parameter, choices=2) -> float:
    """The smallest level at which the recursion refutes f: its bound on P(at least `correct` right)."""
    low, high = 0.0, 1.0
    if not fdp.refuted(correct, guesses, canaries, 1.0, inverse, parameter, choices):
        return 1.0
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        beyond = fdp.refuted(correct, guesses, canaries, middle, inverse, parameter, choices)
        low, high = (low, middle) if beyond else (middle, high)
    return high


def of_epsilon_delta(correct, guesses, canaries, epsilon, delta, choices=2) -> float:
    return p_value(correct, guesses, canaries, fdp.epsilon_delta_inverse(delta), epsilon, choices)


# ---------------------------------------------------------------- by hand


@pytest.mark.parametrize("mu", (0.0, 0.5, 2.0))
def test_one_canary_under_a_gaussian_mechanism(mu):
    """Scores N(±μ/2, 1), the best guess is the sign: right with probability Φ(μ/2)."""
    assert p_value(1, 1, 1, fdp.gaussian_inverse, mu) == pytest.approx(norm.cdf(mu / 2), abs=1e-9)


@pytest.mark.parametrize(("epsilon", "delta"), ((0.0, 0.0), (math.log(3), 0.0), (1.0, 0.1), (0.0, 0.2)))
def test_one_canary_under_epsilon_and_delta(epsilon, delta):
    """Right with probability (e^ε + δ) / (1 + e^ε): the truth with probability δ, else randomised response."""
    assert of_epsilon_delta(1, 1, 1, epsilon, delta) == pytest.approx(
        (math.exp(epsilon) + delta) / (1 + math.exp(epsilon)), abs=1e-9
    )


def test_two_canaries():
    """ε = ln 3, δ = 0. Both right with τ = (3/4)²: p_1 / 2 = τ / 3, p_0 = (τ + p_1 / 2) / 3; τ + p_1 + p_0 = 1.

    At least one right: from p_1 = τ, the canaries wrong (τ / 2) already suffice for those right (τ / 2), so τ may be 1.
    """
    assert of_epsilon_delta(2, 2, 2, math.log(3), 0.0) == pytest.approx(9 / 16, abs=1e-9)
    assert of_epsilon_delta(1, 2, 2, math.log(3), 0.0) == 1.0
    assert of_epsilon_delta(0, 2, 2, math.log(3), 0.0) == 1.0


def test_all_right_without_delta_is_the_binomial_tail():
    """With δ = 0 the recursion from all right downwards is the binomial distribution, as in Steinke's bound."""
    for n in (1, 2, 5, 40):
        for epsilon in (0.0, 0.5, 2.0):
            q = math.exp(epsilon) / (1 + math.exp(epsilon))
            assert of_epsilon_delta(n, n, n, epsilon, 0.0) == pytest.approx(q**n, rel=1e-6)
            assert of_epsilon_delta(n, n, 3 * n, epsilon, 0.0) == pytest.approx(q**n, rel=1e-6)


@pytest.mark.parametrize("choices", (2, 3, 10))
def test_several_choices(choices):
    """One canary drawn from k: right with 1/k by chance, with e^ε / (e^ε + k − 1) under randomised response."""
    assert of_epsilon_delta(1, 1, 1, 0.0, 0.0, choices) == pytest.approx(1 / choices, abs=1e-9)
    assert of_epsilon_delta(1, 1, 1, 1.5, 0.0, choices) == pytest.approx(
        math.exp(1.5) / (math.exp(1.5) + choices - 1), abs=1e-9
    )
    assert of_epsilon_delta(5, 5, 5, 0.0, 0.0, choices) == pytest.approx(choices**-5, rel=1e-6)


# ---------------------------------------------------------------- by linear programs


def solve(cost, a_ub, b_ub, a_eq, b_eq) -> float:
    """The maximum of cost · x over x ≥ 0."""
    done = linprog(-np.asarray(cost), a_ub, b_ub, a_eq, b_eq, method="highs")
    assert done.status == 0, done.message
    return -done.fun


def best_mechanism(correct, guesses, canaries, epsilon, delta) -> float:
    """The largest P(at least `correct` right) of any (ε, δ)-DP mechanism from coins to guesses: every one is tried.

    Unknowns: P(guesses | coins), and for each pair of neighbouring coins and each answer the excess
    s ≥ P(answer | coins) − e^ε P(answer | neighbour), whose sum over the answers is at most δ.
    """
    coins = list(product((0, 1), repeat=canaries))
    answers = [
        dict(zip(chosen, values))
        for chosen in combinations(range(canaries), guesses)
        for values in product((0, 1), repeat=guesses)
    ]
    numbered = list(enumerate(coins))
    pairs = [(i, j) for i, one in numbered for j, other in numbered if np.abs(np.subtract(one, other)).sum() == 1]
    width, start = len(answers), len(coins) * len(answers)
    size = start + len(pairs) * width
    cost = np.zeros(size)
    for row, truth in enumerate(coins):
        for column, answer in enumerate(answers):
            right = sum(truth[index] == value for index, value in answer.items())
            cost[row * width + column] = (right >= correct) / len(coins)
    a_ub, b_ub = [], []
    for number, (one, other) in enumerate(pairs):
        slack = start + number * width
        for column in range(width):
            line = np.zeros(size)
            line[one * width + column], line[other * width + column], line[slack + column] = 1, -math.exp(epsilon), -1
            a_ub.append(line)
            b_ub.append(0.0)
        line = np.zeros(size)
        line[slack : slack + width] = 1
        a_ub.append(line)
        b_ub.append(delta)
    a_eq = np.zeros((len(coins), size))
    for row in range(len(coins)):
        a_eq[row, row * width : (row + 1) * width] = 1
    return solve(cost, np.array(a_ub), b_ub, a_eq, np.ones(len(coins)))


def best_symmetric(correct, canaries, epsilon, delta) -> float:
    """The same with a guess for every canary, where only the number of errors matters (average over relabellings).

    Unknowns: P_w, the probability of w errors, and the excesses in both directions between neighbours. A pattern of w
    errors has (m − w) / m of its weight where a given canary is right, one of w + 1 has (w + 1) / m where it is wrong.
    """
    m, grow = canaries, math.exp(epsilon)
    a_ub, b_ub = np.zeros((2 * m + 1, 3 * m + 1)), np.zeros(2 * m + 1)
    for w in range(m):
        right, wrong = (w, (m - w) / m), (w + 1, (w + 1) / m)
        for row, (one, other) in ((2 * w, (right, wrong)), (2 * w + 1, (wrong, right))):
            a_ub[row, one[0]], a_ub[row, other[0]], a_ub[row, m + 1 + row] = one[1], -grow * other[1], -1
            a_ub[2 * m, m + 1 + row] = 1
    b_ub[2 * m] = delta
    cost, total = np.zeros(3 * m + 1), np.zeros((1, 3 * m + 1))
    total[0, : m + 1] = 1
    cost[: m + 1] = m - np.arange(m + 1) >= correct
    return solve(cost, a_ub, b_ub, total, [1.0])


def best_counts(correct, guesses, canaries, epsilon, delta, every_set: bool) -> float:
    """The largest P(at least `correct` right) that the theorem's inequalities allow.

    Σ_{j in T} j p_j / m ≤ 1 − f(Σ_{j in T} (c − j + 1) p_{j−1} / m), for T = {i + 1, …, c} alone or for every set T.
    """
    c, m = guesses, canaries
    tops = [range(i + 1, c + 1) for i in range(c)]
    sets = [t for r in range(1, c + 1) for t in combinations(range(1, c + 1), r)] if every_set else tops
    a_ub, b_ub = [], []
    for chosen in sets:
        gained, lost = np.zeros(c + 1), np.zeros(c + 1)
        for j in chosen:
            gained[j] += j / m
            lost[j - 1] += (c - j + 1) / m
        a_ub += [gained - math.exp(epsilon) * lost, gained - math.exp(-epsilon) * lost]
        b_ub += [delta, 1 - math.exp(-epsilon) * (1 - delta)]
    cost = (np.arange(c + 1) >= correct).astype(float)
    return solve(cost, np.array(a_ub), b_ub, np.ones((1, c + 1)), [1.0])


SETTINGS = ((0.0, 0.0), (0.7, 0.0), (1.0, 1e-3), (0.5, 0.05), (2.0, 0.02))


@pytest.mark.parametrize(("epsilon", "delta"), SETTINGS)
def test_no_mechanism_is_right_more_often(epsilon, delta):
    """Over every (ε, δ)-DP mechanism with up to three canaries, abstaining or not, and with five: both bounds hold."""
    best = {
        (correct, n, m): best_mechanism(correct, n, m, epsilon, delta)
        for m, n in ((1, 1), (2, 1), (2, 2), (3, 2), (3, 3))
        for correct in range(1, n + 1)
    }
    for (correct, n, m), found in best.items():
        if n == m:
            assert best_symmetric(correct, m, epsilon, delta) == pytest.approx(found, abs=1e-7)
    for m in (5, 20):
        best |= {(correct, m, m): best_symmetric(correct, m, epsilon, delta) for correct in range(1, m + 1)}
    for (correct, n, m), found in best.items():
        assert of_epsilon_delta(correct, n, m, epsilon, delta) >= found - 1e-7
        if found <= 0.5:  # an audit's level is 0.05 or less
            assert audit.p_value(correct, n, m, epsilon, delta) >= found - 1e-7
    # where the bounds are the truth: one canary, and all right without δ
    assert of_epsilon_delta(1, 1, 1, epsilon, delta) == pytest.approx(best[1, 1, 1], abs=1e-7)
    if not delta:
        assert of_epsilon_delta(5, 5, 5, epsilon, delta) == pytest.approx(best[5, 5, 5], rel=1e-6)
        assert audit.p_value(5, 5, 5, epsilon, delta) == pytest.approx(best[5, 5, 5], rel=1e-6)


def test_where_the_published_formula_of_steinke_falls_short():
    """Its term in δ is too small for few right guesses, where P is near 1: no audit's level is there.

    ε = 1, δ = 0.001, one or two of two right. Error patterns with P(1 0) = P(0 1) = e P(1 1) + δ and P(0 0) = e P(1 0)
    are (1, 0.001)-DP, and P(1 1) = (1 − (e + 2) δ) / (1 + e)²; the formula has 4 δ instead of (e + 2) δ.
    """
    both_wrong = (1 - (math.e + 2) * 0.001) / (1 + math.e) ** 2
    assert best_mechanism(1, 2, 2, 1.0, 0.001) == pytest.approx(1 - both_wrong, abs=1e-9)
    formula = audit.p_value(1, 2, 2, 1.0, 0.001)
    assert formula == pytest.approx(1 - (1 - 0.004) / (1 + math.e) ** 2) and formula < 1 - both_wrong - 5e-5
    assert of_epsilon_delta(1, 2, 2, 1.0, 0.001) == 1.0


@pytest.mark.parametrize(("epsilon", "delta"), SETTINGS)
def test_the_recursion_solves_its_inequalities(epsilon, delta):
    """Not only a bound: the recursion finds the maximum over all distributions that its inequalities allow."""
    for m, n in ((1, 1), (2, 2), (5, 5), (5, 3), (9, 4), (8, 8)):
        for correct in range(1, n + 1):
            ours = of_epsilon_delta(correct, n, m, epsilon, delta)
            assert ours == pytest.approx(best_counts(correct, n, m, epsilon, delta, False), abs=1e-7)
            if n <= 5:  # further inequalities of the theorem, which the algorithm leaves out
                assert ours >= best_counts(correct, n, m, epsilon, delta, True) - 1e-7


@pytest.mark.parametrize("mu", (0.0, 0.5, 1.5, 3.0))
def test_a_gaussian_mechanism_is_not_right_more_often(mu):
    """Independent scores N(±μ/2, 1): the sign of each is right with probability Φ(μ/2)."""
    for m in (1, 2, 5, 30):
        for correct in range(1, m + 1, 1 + m // 10):
            tail = binom.sf(correct - 1, m, norm.cdf(mu / 2))
            assert p_value(correct, m, m, fdp.gaussian_inverse, mu) >= tail - 1e-9
    assert p_value(30, 30, 30, fdp.gaussian_inverse, 0.0) == pytest.approx(0.5**30, rel=1e-3, abs=1e-12)


def test_inverses():
    """f̄(f̄⁻¹(y)) = y, by the trade-off functions written out (Dong, Roth and Su 2022)."""
    y = np.linspace(0.05, 0.95, 19)
    x = fdp.gaussian_inverse(y, np.array(1.3))
    assert norm.cdf(norm.ppf(x) + 1.3) == pytest.approx(y)
    epsilon, delta = 0.8, 0.01
    x = fdp.epsilon_delta_inverse(delta)(y, np.array(epsilon))
    f = np.maximum(0, np.maximum(1 - delta - np.exp(epsilon) * x, np.exp(-epsilon) * (1 - delta - x)))
    assert 1 - f == pytest.approx(y)


def test_epsilon_of_a_gaussian_mechanism():
    """δ(ε) of μ = 1 at ε = 1 is Φ(−1/2) − e Φ(−3/2) = 0.126937 (Dong, Roth and Su 2022, corollary 1)."""
    assert fdp.gaussian_epsilon(1.0, norm.cdf(-0.5) - math.e * norm.cdf(-1.5)) == pytest.approx(1.0, abs=1e-6)
    for mu in (0.01, 0.3, 2.0, 8.0):
        for delta in (1e-9, 1e-5, 1e-3):
            epsilon = fdp.gaussian_epsilon(mu, delta)
            back = norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)
            assert back == pytest.approx(delta, rel=1e-4)
    assert fdp.gaussian_epsilon(1e-6, 1e-5) == 0.0 and fdp.gaussian_epsilon(0.0, 1e-5) == 0.0


def test_a_bound_is_where_the_recursion_meets_the_level():
    for found, inverse, parameter in (
        (fdp.gaussian_mu([75], [80], 200, 0.01), fdp.gaussian_inverse, "μ"),
        (fdp.epsilon_delta_bounds([75], [80], 200, 1e-5, 0.01), fdp.epsilon_delta_inverse(1e-5), "ε"),
    ):
        bound = found[0]
        assert bound > 0.5, parameter
        assert p_value(75, 80, 200, inverse, bound) <= 0.01 < p_value(75, 80, 200, inverse, bound + 2e-5)
    assert fdp.epsilon_delta_bounds([40, 80], [80, 80], 200, 1e-5, 0.01)[0] == 0.0
    together = fdp.gaussian_mu([9, 75, 3, 0], [10, 80, 3, 4], 200, 0.01)  # in one call or each by itself
    alone = [fdp.gaussian_mu([c], [n], 200, 0.01)[0] for c, n in ((9, 10), (75, 80), (3, 3), (0, 4))]
    assert together.tolist() == pytest.approx(alone, abs=1e-12)


# ---------------------------------------------------------------- by simulation


def test_the_simulation_measures_what_an_audit_does(capsys):
    """bench/bounds.py: its counts and bounds are one_run's on the same scores, its μ has the ε asked for."""
    m, mu, runs = 100, 3.0, 5
    counts = bounds.right_guesses(m, mu, runs, np.random.default_rng(3))
    rng = np.random.default_rng(3)  # the same draws, in the same order
    coins = rng.random((runs, m)) < 0.5
    scores = rng.normal(size=coins.shape) + np.where(coins, mu / 2, -mu / 2)
    for method in (audit.lower_bounds, *lines.F_DP.values()):
        found = bounds.bounds_of(counts, m, 1e-5, 0.05, method)
        direct = [audit.one_run(scores[run], coins[run], 1e-5, 0.05, method=method) for run in range(runs)]
        assert found.tolist() == pytest.approx([one["epsilon"] for one in direct], abs=1e-12) and found.max() > 0.5
    assert fdp.gaussian_epsilon(bounds.mu_of(2.0, 1e-5), 1e-5) == pytest.approx(2.0)
    # 100 audits of a mechanism with ε = 1: none above 5 % and three standard errors, or the exit status is 1
    assert bounds.main(["--runs", "100", "--canaries", "300", "--epsilons", "1"]) == 0
    assert "| f-DP if Gaussian | 300 | 1 | 0.0" in capsys.readouterr().out


# ---------------------------------------------------------------- against jax_privacy

# (correct, guesses, canaries, δ, level): ε by epsilon_one_run and by epsilon_one_run_fdp of CanaryScoreAuditor in
# jax_privacy 2.0.0 (dp-accounting 0.6.0), with Explicit(0.5) and scores that are 1 for the guessed canaries
PINNED: dict[tuple[int, int, int, float, float], tuple[float, float]] = {
    (1, 1, 2, 1e-05, 0.4): (0.000000, 0.000000),
    (2, 2, 4, 0.001, 0.2): (0.000000, 0.000000),
    (5, 5, 6, 1e-05, 0.05): (0.197473, 0.454850),
    (4, 5, 6, 0.01, 0.05): (0.000000, 0.000000),
    (20, 20, 100, 1e-05, 0.01): (1.343620, 2.157318),
    (37, 40, 100, 1e-05, 0.01): (1.205734, 2.075679),
    (37, 40, 100, 1e-05, 0.0002): (0.638699, 1.010490),
    (110, 120, 300, 1e-05, 0.01): (1.648076, 2.673717),
    (40, 60, 300, 1e-06, 0.05): (0.214841, 0.352966),
    (184, 200, 1000, 1e-05, 0.01): (1.840287, 2.676327),
    (400, 400, 1000, 1e-05, 0.0002): (1.352838, 5.136173),
    (912, 1200, 3000, 1e-05, 0.01): (0.992446, 1.370060),
    (600, 1200, 3000, 1e-05, 0.05): (0.000000, 0.000000),
}


@pytest.mark.parametrize("case", PINNED)
def test_the_numbers_of_jax_privacy(case):
    """Ours are rounded down: by 1e-4 (Steinke), by 1e-5 in μ (f-DP)."""
    correct, guesses, canaries, delta, level = case
    steinke, gaussian = PINNED[case]
    assert 0 <= steinke - audit.lower_bound(correct, guesses, canaries, delta, level) <= 1.1e-4
    assert 0 <= gaussian - fdp.gaussian_bounds([correct], [guesses], canaries, delta, level)[0] <= 1.1e-4


PEER = """
import json, sys
import numpy as np
from jax_privacy.auditing import CanaryScoreAuditor, Explicit

for line in sys.stdin:
    case = json.loads(line)
    auditor = CanaryScoreAuditor(np.array(case["included"]), np.array(case["others"]))
    asked = case["level"], case["delta"]
    cut = Explicit(case["cut"])
    steinke = auditor.epsilon_one_run(*asked, threshold_strategy=cut)
    print(json.dumps([float(steinke), float(auditor.epsilon_one_run_fdp(*asked, threshold_strategy=cut))]))
"""


def of_jax_privacy(cases: list[dict]) -> list[list[float]]:
    """[Steinke's, f-DP's] bounds of each case by jax_privacy, under the interpreter that JAX_PRIVACY_PYTHON names."""
    asked = "".join(json.dumps(case) + "\n" for case in cases)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    python = os.environ["JAX_PRIVACY_PYTHON"]
    done = subprocess.run(
        [python, "-c", PEER], input=asked, capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


needs_peer = pytest.mark.skipif(
    not os.environ.get("JAX_PRIVACY_PYTHON"), reason="JAX_PRIVACY_PYTHON names no interpreter that has jax_privacy"
)


@pytest.mark.slow
@needs_peer
def test_jax_privacy_agrees_on_random_scores():
    """100 sets of 5 to 1,000 canaries, all above a threshold guessed "in": both bounds, random δ, level, strength."""
    rng, cases, ours = np.random.default_rng(0), [], []
    for _ in range(100):
        m = int(rng.integers(5, 1000))
        included = rng.random(m) < 0.5
        scores = rng.normal(size=m) + rng.uniform(0, 6) * included
        cut = float(np.quantile(scores, rng.uniform(0.01, 0.99)))
        level, delta = float(rng.choice([0.05, 0.01, 0.001, 0.0002])), float(rng.choice([1e-7, 1e-5, 1e-3, 0.02]))
        sides = {"included": scores[included].tolist(), "others": scores[~included].tolist()}
        cases.append({**sides, "cut": cut, "level": level, "delta": delta})
        n, correct = int((scores >= cut).sum()), int(included[scores >= cut].sum())
        gaussian = fdp.gaussian_bounds([correct], [n], m, delta, level)[0]
        ours.append([audit.lower_bound(correct, n, m, delta, level), gaussian])
    gap = np.array(of_jax_privacy(cases)) - ours
    assert (np.array(ours) > 0).mean(0).min() > 0.3  # not all are zeros
    assert gap.min() >= -2e-6 and gap.max() <= 1.1e-4


@pytest.mark.slow
@needs_peer
def test_jax_privacy_still_gives_the_pinned_numbers():
    cases = []
    for correct, guesses, canaries, delta, level in PINNED:
        rest = canaries - guesses
        included = [1.0] * correct + [0.0] * (rest // 2)
        others = [1.0] * (guesses - correct) + [0.0] * (rest - rest // 2)
        cases.append({"included": included, "others": others, "cut": 0.5, "level": level, "delta": delta})
    for found, pinned in zip(of_jax_privacy(cases), PINNED.values(), strict=True):
        assert found == pytest.approx(pinned, abs=2e-6)
