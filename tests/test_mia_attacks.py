"""mia/attacks.py and the token statistics: every formula against a case worked out by hand or by a plain loop."""

import math
import zlib

import numpy as np
import pytest

from mia import attacks
from mia.forward import token_statistics

LOGP = [-1.0, -3.0, -2.0, -4.0]


def test_loss_is_the_mean_log_probability():
    assert attacks.loss(LOGP) == -2.5
    assert attacks.loss([-0.1]) > attacks.loss([-5.0])  # likelier text: higher


def test_zlib():
    text = "aaaa bbbb é"
    assert attacks.zlib_ratio(LOGP, text) == pytest.approx(-2.5 / len(zlib.compress(text.encode("utf-8"))))


def test_difference_of_passes_of_unequal_length():
    assert attacks.difference(LOGP, [-4.0, -5.0]) == pytest.approx(-2.5 + 4.5)


def test_min_k_by_hand():
    """Four tokens: k 10 and 20 keep the lowest one, 50 two, 70 two (⌊2.8⌋), 80 three, 100 all."""
    assert attacks.min_k(LOGP, [10, 20, 50, 70, 80, 100]) == pytest.approx([-4, -4, -3.5, -3.5, -3, -2.5])
    assert attacks.min_k([-1.5]) == [-1.5] * 10


def test_min_k_counts_in_integers():
    assert int(0.29 * 100) == 28  # what a float would give
    assert attacks.lowest(100, 29) == 29
    assert [attacks.lowest(n, 10) for n in (1, 9, 10, 19, 20)] == [1, 1, 1, 1, 2]


def test_min_k_pp_by_hand():
    """(−1+2)/1 = 1, (−3+2)/0.5 = −2, and σ = 0 counts as 1e-6: (−2+2)/1e-6 = 0."""
    made = attacks.min_k_pp([-1.0, -3.0, -2.0], [-2.0, -2.0, -2.0], [1.0, 0.5, 0.0], [34, 67, 100])
    assert made == pytest.approx([-2, -1, -1 / 3])


def loop_statistics(logits: np.ndarray, target: int) -> list[float]:
    """[log p, μ, σ, hit] of one position, a vocabulary entry at a time in float64."""
    largest = max(float(value) for value in logits)
    total = math.fsum(math.exp(float(value) - largest) for value in logits)
    logs = [float(value) - largest - math.log(total) for value in logits]
    mean = math.fsum(math.exp(log) * log for log in logs)
    variance = math.fsum(math.exp(log) * (log - mean) ** 2 for log in logs)
    return [logs[target], mean, math.sqrt(variance), float(logits[target] == logits.max())]


@pytest.mark.parametrize("scale", (0.1, 3.0, 30.0))  # nearly uniform … one token has almost everything
def test_statistics_equal_a_loop_over_the_vocabulary(scale):
    import torch

    rng = np.random.default_rng(int(scale * 10))
    logits = (rng.normal(size=(70, 500)) * scale + 40).astype(np.float32)  # +40: only differences count
    targets = rng.integers(500, size=70)
    targets[::7] = logits[::7].argmax(1)
    found = token_statistics(torch.tensor(logits), torch.tensor(targets)).numpy()
    wanted = np.array([loop_statistics(row, target) for row, target in zip(logits, targets)])
    assert found[:, :2] == pytest.approx(wanted[:, :2], rel=2e-5, abs=2e-5)
    assert found[:, 2] == pytest.approx(wanted[:, 2], rel=1e-4, abs=1e-6)
    assert (found[:, 3] == wanted[:, 3]).all() and found[:, 3].sum() >= 10


def test_surp_by_hand():
    logp = [-1.0, -5.0, -4.0, -3.0, -2.0]  # lowest 40 %: the second and the third
    assert attacks.surp(logp, [3, 1, 1, 1, 1]) == pytest.approx(-4.5)
    assert attacks.surp(logp, [3, 1, 3, 1, 1]) == -5
    assert attacks.surp(logp, [1, 3, 3, 1, 1]) == -3  # none of the two is sure: the lowest among the sure ones
    with pytest.raises(attacks.Undefined, match=r"entropy below 2\.0"):
        attacks.surp(logp, [2.0, 3, 3, 3, 3])


def test_recall_and_con_recall_by_hand():
    logp, after, after_members = [-1.0, -2.0], [-0.5, -1.0], [-1.0, -1.5]
    assert attacks.recall(logp, after) == pytest.approx(0.5)
    assert attacks.con_recall(logp, after, after_members) == pytest.approx((-0.75 + 0.5 * 1.25) / -1.5)
    # a non-member profits more from other non-members
    assert attacks.recall([-2.0], [-1.8]) > attacks.recall([-2.0], [-1.0])
    with pytest.raises(attacks.Undefined, match="divide"):
        attacks.recall([0.0], [-1.0])


def test_dc_pdd_by_hand():
    """Tokens 5, 7, 5 with p 0.5, 0.001, 0.9; 90 corpus tokens and a vocabulary of 10: frequencies 4/100 and 1/100."""
    counts = np.zeros(10)
    counts[[0, 5]] = 87, 3
    made = attacks.dc_pdd([5, 7, 5], np.log([0.5, 0.001, 0.9]), counts)
    assert made == pytest.approx(
        (0.01 + 0.001 * math.log(100)) / 2
    )  # 0.5·ln 25 is cut to 0.01; the second 5 is no first


def test_neighborhood_by_hand():
    assert attacks.neighborhood([-1.0], [-1.5, -2.5]) == pytest.approx(1.0)
    with pytest.raises(attacks.Undefined):
        attacks.neighborhood([-1.0], [])


def test_ez_by_hand():
    """Mispredicted tokens change by +1 and −0.5: 1/(1 + 0.5); the third is predicted and does not count."""
    assert attacks.ez([-1.0, -2.0, -9.0], [-2.0, -1.5, -1.0], [0, 0, 1]) == pytest.approx(2 / 3)
    for hit, reference in (([1, 1], [-2.0, -2.0]), ([0, 0], [-1.0, -1.0])):
        with pytest.raises(attacks.Undefined, match="mispredicted"):
            attacks.ez([-1.0, -1.0], reference, hit)


def test_wbc_by_hand():
    """Gains 1, −0.5, −0.2: windows of 2 sum to 0.5 and −0.7; every larger size is cut to 3 and sums to 0.3."""
    assert attacks.wbc([-1.0, -1.0, -1.0], [-2.0, -0.5, -0.8]) == pytest.approx((0.5 + 9) / 10)
    assert attacks.wbc([-1.0], [-2.0]) == 1.0 and attacks.wbc([-1.0], [-1.0]) == 0.0  # equal is not below


@pytest.mark.parametrize(
    "score",
    (
        attacks.loss,
        lambda logp: attacks.zlib_ratio(logp, ""),
        attacks.min_k,
        lambda logp: attacks.min_k_pp(logp, [], []),
        lambda logp: attacks.surp(logp, []),
        lambda logp: attacks.recall(logp, []),
        lambda logp: attacks.dc_pdd([], logp, [1, 2]),
        lambda logp: attacks.ez(logp, [], []),
        lambda logp: attacks.wbc(logp, []),
    ),
)
def test_nothing_to_score_is_undefined_not_nan(score):
    with pytest.raises(attacks.Undefined, match="under 2 tokens"):
        score([])
