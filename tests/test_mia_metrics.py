"""mia/metrics.py and mia/baselines.py: against brute force, exact counts and slow routes."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.stats import auc, interval, roc
from common.text import near_duplicates
from mia import baselines, metrics


def slow_auc(members, nonmembers) -> float:
    wins = [(m > n) + 0.5 * (m == n) for m in members for n in nonmembers]
    return sum(wins) / len(wins)


def brute_tpr(members, nonmembers, most: int) -> float:
    """The best TPR of any threshold that at most `most` non-members exceed."""
    cuts = [-np.inf, *members, *nonmembers]
    fine = [cut for cut in cuts if sum(n > cut for n in nonmembers) <= most]
    return max(sum(m > cut for m in members) for cut in fine) / len(members)


few = st.lists(st.integers(-5, 5), min_size=1, max_size=40)  # many ties


@settings(max_examples=60, deadline=None)
@given(few, few)
def test_auc_and_roc_equal_counting_pairs(members, nonmembers):
    assert auc(members, nonmembers) == pytest.approx(slow_auc(members, nonmembers))
    false, true = roc(members, nonmembers)
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(true, false) == pytest.approx(slow_auc(members, nonmembers))
    assert auc(nonmembers, members) == pytest.approx(1 - slow_auc(members, nonmembers))


@settings(max_examples=60, deadline=None)
@given(few, st.lists(st.integers(-5, 5), min_size=9, max_size=60))
def test_tpr_at_ten_percent_by_brute_force(members, nonmembers):
    point = metrics.tpr_at(np.array(members), np.array(nonmembers), "0.1")
    most = metrics.allowed("0.1", len(nonmembers))
    assert most == (len(nonmembers) + 1) // 10 - 1
    assert point["tpr"] == brute_tpr(members, nonmembers, most)
    assert point["false_positives"] <= most


@pytest.mark.parametrize("level, n", (("0.1", 9), ("0.1", 47), ("0.01", 99), ("0.01", 250), ("0.001", 1000)))
def test_expected_fpr_is_at_most_the_level(level, n):
    """Each of n + 1 distinct scores in turn is the fresh non-member: its share above the threshold is exact."""
    values, hits = np.arange(n + 1.0), 0
    for fresh in range(n + 1):
        hits += fresh > metrics.threshold(np.delete(values, fresh), metrics.allowed(level, n))
    assert hits / (n + 1) <= float(level)
    assert hits == (n + 1) // metrics.LEVELS[level]  # and as many as that allows


def test_allowed_false_positives():
    assert metrics.allowed("0.01", 2899) == 28
    assert [metrics.allowed("0.1", n) for n in (8, 9, 18, 19)] == [-1, 0, 0, 1]


def test_small_sets_are_refused_and_coarse_ones_flagged():
    members = np.arange(50.0)
    for n, level, tpr in (
        (8, "0.1", None),
        (9, "0.1", 1.0),
        (98, "0.01", None),
        (99, "0.01", 1.0),
        (999, "0.001", None),
        (1000, "0.001", 1.0),
    ):
        point = metrics.tpr_at(members + 2000, np.arange(float(n)), level)
        assert point["tpr"] == tpr and (point["undefined"] is None) == (tpr is not None)
    assert metrics.tpr_at(members, np.arange(1000.0), "0.001")["coarse"] is True
    assert metrics.tpr_at(members, np.arange(10000.0), "0.001")["coarse"] is False
    assert metrics.tpr_at(members, np.arange(1000.0), "0.01")["coarse"] is False


def test_equal_scores_are_no_true_positives():
    """A constant score calls nobody a member: the threshold must be exceeded."""
    assert metrics.tpr_at(np.zeros(20), np.zeros(100), "0.01")["tpr"] == 0
    assert auc(np.zeros(20), np.zeros(100)) == 0.5


def test_clopper_pearson_known_values():
    """0 of n: [0, 1 − 0.025^(1/n)]; 5 of 10 by R's binom.test(5, 10): 0.187086, 0.812914."""
    assert metrics.clopper_pearson(0, 20) == pytest.approx([0, 1 - 0.025 ** (1 / 20)])
    assert metrics.clopper_pearson(20, 20) == pytest.approx([0.025 ** (1 / 20), 1])
    assert metrics.clopper_pearson(5, 10) == pytest.approx([0.187086, 0.812914], abs=1e-6)


@pytest.mark.parametrize("ties", (False, True))
def test_bootstrap_equals_the_slow_one(ties):
    rng = np.random.default_rng(5)
    members, nonmembers = rng.normal(0.7, 1, 43), rng.normal(0, 1, 121)
    if ties:
        members, nonmembers = members.round(), nonmembers.round()
    draws = metrics.draw(43, 50, rng), metrics.draw(121, 50, rng)
    rates = metrics.bootstrap(members, nonmembers, *draws, ("0.1", "0.01"))
    for b in range(50):
        ms, ns = np.repeat(members, draws[0][b]), np.repeat(nonmembers, draws[1][b])
        assert len(ms) == 43 and len(ns) == 121
        for level in ("0.1", "0.01"):
            assert rates[level][b] == brute_tpr(ms, ns, metrics.allowed(level, 121))


def test_bootstrap_in_blocks_is_the_same(monkeypatch):
    """Against resamples drawn at once from the same generator, for any block size."""
    rng = np.random.default_rng(5)
    members, nonmembers = rng.normal(0.7, 1, 43), rng.normal(0, 1, 1021)
    picked = np.random.default_rng(8).integers(1021, size=(30, 1021))
    at_once = np.array([np.bincount(row, minlength=1021) for row in picked])
    found = []
    for block in (1, 5000, 1 << 30):
        monkeypatch.setattr(metrics, "BLOCK", block)
        assert (metrics.draw(1021, 30, np.random.default_rng(8)) == at_once).all()
        found.append(metrics.summarize(members, nonmembers, metrics.Draws(30, 3)))
    assert found[0] == found[1] == found[2]


def test_memory_of_the_bootstrap():
    """500 resamples of 20,000 scores per class: 10 million cells per class, a byte each, and some MB."""
    rng = np.random.default_rng(0)
    members, nonmembers = rng.normal(size=20_000), rng.normal(size=20_000)
    tracemalloc.start()
    metrics.summarize(members, nonmembers, metrics.Draws(500, 0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6  # at once: 250 MB


def test_interval_of_the_auc_has_the_width_of_theory():
    """Equal normal classes of 400: the AUC's standard error is √((2n + 1)/(12 n²)) = 0.02043."""
    rng = np.random.default_rng(0)
    made = metrics.summarize(rng.normal(size=400), rng.normal(size=400), metrics.Draws(1000, 1))
    low, high = made["auc_ci"]
    assert high - low == pytest.approx(2 * 1.96 * 0.02043, rel=0.12)
    assert low < made["auc"] < high and made["auc_ci99"][0] < low


def test_intervals_of_tpr_change_with_the_number_of_allowed_false_positives():
    """≥ 9 allowed: bootstrap; fewer: with the threshold's noise, next to Clopper–Pearson at the threshold."""
    rng = np.random.default_rng(2)
    members, nonmembers = rng.normal(1, 1, 200), rng.normal(0, 1, 300)
    made = metrics.summarize(members, nonmembers, metrics.Draws(300, 0))
    point = made["points"]["0.01"]  # 2 allowed
    assert point["tpr_ci_at_threshold"] == metrics.clopper_pearson(round(point["tpr"] * 200), 200)
    assert point["tpr_ci"] == metrics.tpr_interval(members, nonmembers, 0.01)
    rates = metrics.bootstrap(members, nonmembers, *metrics.Draws(300, 0)(200, 300), ["0.1"])
    wide, (low, high) = made["points"]["0.1"], interval(rates["0.1"])  # 29 allowed
    at = wide["tpr_ci_at_threshold"]
    assert wide["tpr_ci"] == [min(low, at[0]), max(high, at[1])]
    apart = metrics.summarize(members + 20, nonmembers, metrics.Draws(300, 0))
    assert apart["tpr_at_fpr"]["0.1"] == 1 and apart["tpr_at_fpr_ci"]["0.1"][0] < 0.99  # no certainty at the edge
    assert made["tpr_at_fpr"]["0.001"] is None and made["tpr_at_fpr_ci"]["0.001"] is None


def test_tpr_interval_by_the_binomial_of_exceedances():
    """N = 500 at 1 %: the ranks from the binomial law of how many of 500 exceed the true threshold (1 and 12, as
    P(Bin = 0) = 0.0066, P(Bin ≥ 12) = 0.0053), the ends from the binomial tails of the members above them."""
    from scipy.stats import binom

    assert binom.cdf(0, 500, 0.01) < 0.0125 < binom.cdf(1, 500, 0.01)
    assert binom.sf(11, 500, 0.01) < 0.0125 < binom.sf(10, 500, 0.01)
    nonmembers = np.arange(500.0)  # largest 499, 12th largest 488
    members = np.r_[np.full(30, 499.5), np.full(20, 498.5), np.full(50, 488.0), np.full(100, 487.5)]
    low, high = metrics.tpr_interval(members, nonmembers, 0.01)
    assert binom.sf(29, 200, low) == pytest.approx(0.0125) and binom.cdf(100, 200, high) == pytest.approx(0.0125)
    low, high = metrics.tpr_interval(members, nonmembers[:150], 0.01)  # even the largest may leave over 1 % above it
    assert low == 0.0 and high == 1.0


@pytest.mark.parametrize(("n", "shift"), [(200, 1.0), (500, 0.42), (500, 2.0)])
def test_tpr_interval_covers(n, shift):
    """400 draws of normal scores: the 95 % interval misses the true TPR at 1 % in at most 5 % (binomial: 34 at 99.9 %);
    the interval at the threshold, as published tools would print it, misses over a quarter."""
    from scipy.stats import norm

    rng, true = np.random.default_rng(5), norm.sf(norm.isf(0.01) - shift)
    missed = {"tpr_ci": 0, "tpr_ci_at_threshold": 0}
    for _ in range(400):
        point = metrics.tpr_at(rng.normal(shift, 1, 1000), rng.normal(size=n), "0.01")
        for name in missed:
            low, high = point[name]
            missed[name] += not low <= true <= high
    assert missed["tpr_ci"] <= 34 and missed["tpr_ci_at_threshold"] > 100


def test_summary_of_an_empty_class():
    made = metrics.summarize([], [1.0], metrics.Draws(10, 0))
    assert made["auc"] is None and made["undefined"] == "no scored members"


# ---- many scores together


def test_dataset_inference_sees_a_shift_and_none():
    rng = np.random.default_rng(3)
    labels = np.repeat([1, 0], 200)
    scores = rng.normal(size=(400, 6))
    assert metrics.dataset_inference(scores, labels, 0)["p"] > 0.01
    shifted = scores + 0.4 * labels[:, None]
    shifted[::17, 2] = np.nan  # some texts have no such score
    shifted[:, 4] = np.nan  # no text has it
    made = metrics.dataset_inference(shifted, labels, 0)
    assert made["p"] < 1e-4 and made["t"] > 0 and (made["n_members"], made["n_nonmembers"]) == (100, 100)
    # one-sided with a fitted direction: lower scores of members are used as well
    assert metrics.dataset_inference(-shifted, labels, 0)["p"] < 1e-4
    assert metrics.dataset_inference(scores[:6], [1, 1, 1, 0, 0, 0], 0)["undefined"] == "under 4 texts in a class"


def test_dataset_inference_is_calibrated_without_a_shift():
    """p-values of 200 sets without any difference: under 5 % in about 5 % (binomial 99.9 % range of 10 ± …: 1 … 23)."""
    rng = np.random.default_rng(11)
    labels = np.repeat([1, 0], 30)
    low = sum(metrics.dataset_inference(rng.normal(size=(60, 3)), labels, 0)["p"] < 0.05 for _ in range(200))
    assert 1 <= low <= 23


def test_set_test_of_the_text_is_calibrated():
    """p-values of 120 sets of texts with random labels: under 5 % in about 6 (binomial 99.9 % range 0 … 15)."""
    rng = np.random.default_rng(3)
    vocabulary = np.array([f"word{n}" for n in range(200)])
    texts = [" ".join(rng.choice(vocabulary, rng.integers(10, 40))) for _ in range(100)]
    low = 0
    for seed in range(120):
        labels = rng.permutation(np.repeat([1, 0], 50))
        low += baselines.dataset_inference(texts, labels, seed)["p"] < 0.05
    assert low <= 15
    told = [text + (" zebra" if n < 50 else "") for n, text in enumerate(texts)]
    assert baselines.dataset_inference(told, [1] * 50 + [0] * 50, 0)["p"] < 1e-4
    assert baselines.dataset_inference(texts[:18], [1, 0] * 9, 0)["undefined"] == "under 10 texts in a class"


def test_cross_fitting_cannot_learn_noise():
    """Fitted and scored on the same 80 texts, 60 columns of noise would give an AUC near 1."""
    rng = np.random.default_rng(4)
    labels, noise = np.repeat([1, 0], 40), rng.normal(size=(80, 60))
    odds = metrics.cross_fit(noise, labels, metrics.logistic, 0)
    fitted = metrics.logistic().fit(noise, labels).decision_function(noise)
    assert auc(fitted[:40], fitted[40:]) > 0.9
    assert auc(odds[:40], odds[40:]) < 0.65
    assert metrics.cross_fit(noise[:44], labels[:44], metrics.logistic, 0) is None  # 4 per class


def test_intervals_of_cross_fitted_scores_cover_chance():
    """200 sets without any difference: the 95 % interval misses 0.5 in about 10 (binomial 99.9 % range 1 … 23); as
    resampling leaves it, in over 25."""
    labels, missed = np.repeat([1, 0], 100), {True: 0, False: 0}
    draws = metrics.Draws(200, 0)
    for seed in range(200):
        noise = np.random.default_rng(seed).normal(size=(200, 25))
        odds = metrics.cross_fit(noise, labels, metrics.logistic, seed)
        for cross_fitted in missed:
            low, high = metrics.summarize(odds[:100], odds[100:], draws, cross_fitted)["auc_ci"]
            missed[cross_fitted] += not low <= 0.5 <= high
    assert 1 <= missed[True] <= 23 and missed[False] > 25


def test_widened_by_hand():
    """√2 times [0.1, 0.2] about 0.7 is 0.7 − 0.1414 … 0.7 + 0.2828; a rate ends at 1; an undefined one stays."""
    assert metrics.widened([0.6, 0.9], 0.7) == pytest.approx([0.558579, 0.982843], abs=1e-6)
    assert metrics.widened([0.6, 0.99], 0.8)[1] == 1.0 and metrics.widened(None, 0.5) is None
    made = metrics.summarize(np.arange(50) + 10.0, np.arange(50.0), metrics.Draws(200, 1))
    wide = metrics.summarize(np.arange(50) + 10.0, np.arange(50.0), metrics.Draws(200, 1), cross_fitted=True)
    assert made["auc"] == wide["auc"] and made["tpr_at_fpr"] == wide["tpr_at_fpr"]
    for name, at in (("auc_ci", "auc"), ("auc_ci99", "auc")):
        assert wide[name] == pytest.approx(metrics.widened(made[name], made[at]))
    assert wide["tpr_at_fpr_ci"]["0.1"] == metrics.widened(made["tpr_at_fpr_ci"]["0.1"], made["tpr_at_fpr"]["0.1"])


# ---- blind


def test_blind_baselines_see_length_and_words_but_not_nothing():
    rng = np.random.default_rng(6)
    words = [f"word{k}" for k in range(50)]
    texts = [" ".join(rng.choice(words, size=rng.integers(10, 30))) for _ in range(200)]
    labels = [1] * 100 + [0] * 100

    def aucs(texts):
        made = baselines.scores(texts, labels, 0)
        return {name: auc(values[:100], values[100:]) for name, values in made.items()}

    assert set(aucs(texts)) == set(baselines.BASELINES)
    assert all(0.3 < value < 0.65 for value in aucs(texts).values())
    longer = [text + " word1" * 40 * label for text, label in zip(texts, labels)]
    assert aucs(longer)["blind_length"] > 0.99 and aucs(longer)["blind_zlib"] > 0.99
    dated = [text + (" 2019" if label else " 2024") for text, label in zip(texts, labels)]
    found = aucs(dated)
    assert found["blind_bow"] > 0.99 and found["blind_tfidf"] > 0.95 and found["blind_length"] < 0.65
    # members in the middle of the lengths: no straight line tells them
    middle = ["x" * int(rng.integers(100, 120) if label else rng.choice([10, 1000])) for label in labels]
    assert aucs(middle)["blind_length"] > 0.99


def test_near_duplicates():
    base = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
    others = [base.upper() + "\n", base.replace("eight", "other"), "one two", base + " seventeen"]
    assert near_duplicates([base, "one  TWO", "else"], others) == [(0, 0), (0, 3), (1, 2)]
    assert near_duplicates([""], [""]) == [(0, 0)]
