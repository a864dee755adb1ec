"""Evaluating scores: ROC-AUC, TPR at low FPR, confidence intervals, the set-level test. Arrays in, numbers out.

members [M], nonmembers [N]: scores, higher = more likely a member. TPR is the share of members classified as members,
FPR the share of non-members classified as members. FPR levels are named as in the result files: "0.1", "0.01", "0.001".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from common.stats import auc, auc_interval, clopper_pearson, interval

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

Floats = npt.NDArray[np.float64]
Features = list[Any] | npt.NDArray[Any]  # of n items
Counts = npt.NDArray[np.uint8]  # [B, n] of `draw`

LEVELS = {"0.1": 10, "0.01": 100, "0.001": 1000}  # name → 1/level, so that ⌊level·(N+1)⌋ is exact
SMALLEST = {"0.001": 1000}  # with fewer non-members the level is rejected, although a threshold would exist
COARSE = {"0.001": 10000}  # with fewer non-members the level depends on a handful of them
BOOTSTRAP_FROM = 9  # allowed false positives; below, the threshold is an extreme value and resampling is meaningless
FOLDS = 5
CROSS_FITTED = 2**0.5  # factor by which intervals of cross-fitted classifiers are widened, see `widened`
BLOCK = 1 << 18  # resamples × items per block: a few MB, which fit the CPU cache


def allowed(level: str, n: int) -> int:
    """False positives allowed among n non-members: ⌊level·(n + 1)⌋ − 1, so that the *expected* FPR is ≤ level."""
    return (n + 1) // LEVELS[level] - 1


def threshold(nonmembers: Floats, most: int) -> float:
    """The score that must be exceeded: the (most + 1)-th largest non-member, so at most `most` of them exceed it."""
    return float(np.sort(nonmembers)[::-1][most])


def tpr_at(members: Floats, nonmembers: Floats, level: str) -> dict[str, Any]:
    """One operating point, null if N is too small: {tpr, tpr_ci, tpr_ci_at_threshold, false_positives, fpr, fpr_ci,
    coarse, undefined}.

    tpr_ci is `tpr_interval`; `summarize` replaces it where a bootstrap is tighter. tpr_ci_at_threshold is
    Clopper–Pearson with the threshold held fixed: sampling error of the members only.
    """
    n, most = len(nonmembers), allowed(level, len(nonmembers))
    needed = max(LEVELS[level] - 1, SMALLEST.get(level, 0))
    if n < needed:
        blank = dict.fromkeys(("tpr", "tpr_ci", "tpr_ci_at_threshold", "false_positives", "fpr", "fpr_ci"))
        return {**blank, "coarse": None, "undefined": f"{n} non-members; at least {needed} are needed"}
    above = threshold(nonmembers, most)
    true, false = int(np.sum(members > above)), int(np.sum(nonmembers > above))
    return {
        "tpr": true / len(members),
        "tpr_ci": tpr_interval(members, nonmembers, 1 / LEVELS[level]),
        "tpr_ci_at_threshold": clopper_pearson(true, len(members)),
        "false_positives": false,
        "fpr": false / n,
        "fpr_ci": clopper_pearson(false, n),
        "coarse": n < COARSE.get(level, 0),
        "undefined": None,
    }


def tpr_interval(members: Floats, nonmembers: Floats, level: float, confidence: float = 0.95) -> list[float]:
    """Distribution-free interval of the TPR at a true FPR of `level`, valid for any number of non-members.

    With few non-members the threshold is an extreme order statistic, whose noise outweighs that of the members. The
    true FPR at the j-th largest of N non-members is ~ Beta(j, N − j + 1). One rank has an FPR of at most `level` with
    confidence 1 − α/4, another of at least `level`; together with one-sided binomial limits (1 − α/4 each) for the
    members above them, the four errors add up to α. If not even the largest non-member qualifies, the lower end is 0.
    """
    from scipy import stats

    error, n = (1 - confidence) / 4, len(nonmembers)
    ordered, ranks = np.sort(nonmembers)[::-1], np.arange(1, n + 1)
    few = ranks[stats.beta.sf(level, ranks, n - ranks + 1) <= error]
    many = ranks[stats.beta.cdf(level, ranks, n - ranks + 1) <= error]
    above = int(np.sum(members > ordered[few[-1] - 1])) if len(few) else 0
    below = int(np.sum(members >= ordered[many[0] - 1])) if len(many) else len(members)
    ends = [clopper_pearson(hits, len(members), 1 - 2 * error) for hits in (above, below)]
    if ends[0] is None or ends[1] is None:
        raise ValueError("no members: the TPR has no interval")
    return [ends[0][0], ends[1][1]]


def draw(n: int, resamples: int, rng: np.random.Generator) -> Counts:
    """[resamples, n] how often each of n items occurs in a resample of n with replacement.

    Stored as bytes: for n > 255, the probability of drawing an item 256 times is below n / 256!.
    """
    counts = np.empty((resamples, n), np.uint8)
    for part in blocks(resamples, n):
        size = len(counts[part])
        picked = rng.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
        counts[part] = np.bincount(picked.ravel(), minlength=size * n).reshape(size, n)
    return counts


def blocks(resamples: int, n: int) -> list[slice]:
    """Slices of 0 … resamples − 1, each with at most BLOCK cells in n columns (or a single row)."""
    rows = max(1, BLOCK // n)
    return [slice(start, start + rows) for start in range(0, resamples, rows)]


def bootstrap(
    members: Floats, nonmembers: Floats, member_draws: Counts, nonmember_draws: Counts, levels: Iterable[str]
) -> dict[str, Floats]:
    """{level: TPR [B]} over B resamples; draws [B, M] and [B, N] from `draw`, each class resampled separately.

    The scores are sorted once: a resample only changes how often each score counts, so its threshold is where the
    cumulative count from the top exceeds the allowed number.
    """
    down = np.argsort(-nonmembers, kind="stable")
    ordered = nonmembers[down]
    up = np.argsort(-members, kind="stable")
    sorted_members = members[up]
    exceeding = np.searchsorted(-sorted_members, -ordered, "left")  # members strictly above each non-member
    rates = {level: np.empty(len(member_draws)) for level in levels}
    for part in blocks(len(member_draws), max(len(members), len(nonmembers))):
        counts = running(nonmember_draws[part][:, down])  # of non-members, from the largest down
        member_counts = running(member_draws[part][:, up])
        for level in levels:
            cut = (counts[:, 1:] > allowed(level, len(nonmembers))).argmax(1)
            rates[level][part] = member_counts[np.arange(len(member_counts)), exceeding[cut]] / len(members)
    return rates


def running(counts: Counts) -> npt.NDArray[np.int32]:
    """[B, n + 1] sums of the first 0 … n columns of counts [B, n]."""
    sums = np.zeros((len(counts), counts.shape[1] + 1), np.int32)
    np.cumsum(counts, axis=1, out=sums[:, 1:])
    return sums


def widened(bounds: list[float] | None, point: float | None) -> list[float] | None:
    """Widen the interval of a rate from cross-fitted scores by √2 around the rate, clipped to [0, 1].

    Resampling treats the fitted classifiers as fixed. But the scores of texts i and j are dependent: i helped to fit
    the classifier of j, and j that of i. For a linear score f(j) = Σᵢ yᵢ·K(i, j) with labels y = ±1 and no signal, the
    statistic Σⱼ yⱼ·f(j) counts every pair twice, so its variance is 4·Σ_{i<j} K², while resampling sees
    Σⱼ f(j)² = 2·Σ_{i<j} K²: half. With signal the pairs matter less, and the interval is conservative.
    """
    if bounds is None or point is None:
        return bounds
    low, high = (point + CROSS_FITTED * (bound - point) for bound in bounds)
    return [max(0.0, low), min(1.0, high)]


class Draws:
    """Bootstrap draws by class sizes, from one seed: attacks on the same texts share their resamples.

    The last two pairs of sizes are cached, at one byte per item and resample.
    """

    def __init__(self, resamples: int, seed: int) -> None:
        self.resamples, self.seed = resamples, seed
        self.made: dict[tuple[int, int], tuple[Counts, Counts]] = {}

    def __call__(self, m: int, n: int) -> tuple[Counts, Counts]:
        """(draws [B, m] for the members, [B, n] for the non-members)."""
        if (m, n) not in self.made:
            if len(self.made) == 2:
                self.made.pop(next(iter(self.made)))
            rng = np.random.default_rng(self.seed)
            self.made[m, n] = draw(m, self.resamples, rng), draw(n, self.resamples, rng)
        return self.made[m, n]


def summarize(
    members: npt.ArrayLike, nonmembers: npt.ArrayLike, draws: Draws, cross_fitted: bool = False
) -> dict[str, Any]:
    """{auc, auc_ci, auc_ci99, tpr_at_fpr, tpr_at_fpr_ci, points, undefined} of one attack; null with a reason, not NaN.

    AUC intervals: `stats.auc_interval`. TPR intervals: with 9 or more allowed false positives, the hull of a bootstrap
    and Clopper–Pearson at the threshold; otherwise the conservative `tpr_interval`.
    cross_fitted: the scores come from `cross_fit`, so the intervals of AUC and TPR are `widened`.
    """
    members, nonmembers = np.asarray(members, np.float64), np.asarray(nonmembers, np.float64)
    blank = dict.fromkeys(LEVELS)
    if not len(members) or not len(nonmembers):
        empty = "members" if not len(members) else "non-members"
        nothing = {"auc": None, "auc_ci": None, "auc_ci99": None, "tpr_at_fpr": blank, "tpr_at_fpr_ci": blank}
        return {**nothing, "points": blank, "undefined": f"no scored {empty}"}
    points = {level: tpr_at(members, nonmembers, level) for level in LEVELS}
    many = [level for level in LEVELS if points[level]["tpr"] is not None]
    many = [level for level in many if allowed(level, len(nonmembers)) >= BOOTSTRAP_FROM]
    rates = bootstrap(members, nonmembers, *draws(len(members), len(nonmembers)), many)
    for level, values in rates.items():
        low, high = interval(values)
        at = points[level]["tpr_ci_at_threshold"]  # resampling is degenerate if no member, or every member, is above
        points[level]["tpr_ci"] = [min(low, at[0]), max(high, at[1])]
    area = auc(members, nonmembers)
    intervals: dict[str, list[float] | None] = {
        name: auc_interval(members, nonmembers, level) for name, level in (("auc_ci", 0.95), ("auc_ci99", 0.99))
    }
    if cross_fitted:
        intervals = {name: widened(bounds, area) for name, bounds in intervals.items()}
        for point in points.values():
            point["tpr_ci"] = widened(point["tpr_ci"], point["tpr"])
    return {
        "auc": area,
        **intervals,
        "tpr_at_fpr": {level: point["tpr"] for level, point in points.items()},
        "tpr_at_fpr_ci": {level: point["tpr_ci"] for level, point in points.items()},
        "points": points,
        "undefined": None,
    }


def cross_fit(features: Features, labels: npt.ArrayLike, make: Callable[[], Pipeline], seed: int) -> Floats | None:
    """Log-odds [n] of membership, five-fold cross-fitted; None below 5 texts per class.

    features: array [n, F] or a list of n items; make() → a scikit-learn classifier or pipeline.
    """
    from sklearn.model_selection import StratifiedKFold

    labels = np.asarray(labels)
    if np.bincount(labels, minlength=2).min() < FOLDS:
        return None
    log_odds = np.zeros(len(labels))
    for fit, held_out in StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(labels, labels):
        model = make().fit(_take(features, fit), labels[fit])
        log_odds[held_out] = model.decision_function(_take(features, held_out))
    return log_odds


def _take(features: Features, rows: npt.NDArray[np.int64]) -> Features:
    return [features[row] for row in rows] if isinstance(features, list) else features[rows]


def logistic() -> Pipeline:
    """Logistic regression over standardised scores; missing scores are imputed with the training median."""
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(SimpleImputer(strategy="median"), StandardScaler(), LogisticRegression(max_iter=1000))


def usable(scores: npt.ArrayLike) -> Floats:
    """The columns of scores [n, A] (missing: NaN) that are not constant and known for at least half of the texts."""
    scores = np.asarray(scores, np.float64)
    known = ~np.isnan(scores)
    spread = [len(np.unique(column[mask])) > 1 for column, mask in zip(scores.T, known.T)]
    return scores[:, (known.mean(0) >= 0.5) & np.array(spread, bool)]


def halves(labels: npt.ArrayLike, seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Indices of two halves of the texts, each with half of either class."""
    from sklearn.model_selection import train_test_split

    own = np.asarray(labels)
    fit, held_out = train_test_split(np.arange(len(own)), test_size=0.5, stratify=own, random_state=seed)
    return fit, held_out


def dataset_inference(scores: npt.ArrayLike, labels: npt.ArrayLike, seed: int) -> dict[str, Any]:
    """{p, t, n_members, n_nonmembers, undefined}: is the *set* of members in the training data? (Maini et al. 2024)

    A logistic regression over all scores [n, A] (missing: NaN) is fitted on half of each class; on the other half its
    log-odds are compared (`set_test`). The scores must not depend on the labels; for the text alone see
    `baselines.dataset_inference`.
    """
    labels, scores = np.asarray(labels), usable(scores)
    fewest = np.bincount(labels, minlength=2).min()
    if fewest < 4 or not scores.shape[1]:
        reason = "under 4 texts in a class" if fewest < 4 else "no score that half of the texts have"
        return {**NO_TEST, "undefined": reason}
    fit, held_out = halves(labels, seed)
    odds = logistic().fit(scores[fit], labels[fit]).decision_function(scores[held_out])
    return set_test(odds, labels[held_out])


NO_TEST = dict.fromkeys(("p", "t", "n_members", "n_nonmembers"))


def set_test(odds: Floats, labels: npt.NDArray[np.int64]) -> dict[str, Any]:
    """One-sided Welch's t-test on log-odds [n] of held-out texts: members (label 1) higher."""
    from scipy.stats import ttest_ind

    members, nonmembers = odds[labels == 1], odds[labels == 0]
    if np.ptp(odds) == 0:
        return {**NO_TEST, "undefined": "every text has the same score"}
    test = ttest_ind(members, nonmembers, equal_var=False, alternative="greater")
    sizes = {"n_members": len(members), "n_nonmembers": len(nonmembers)}
    return {"p": float(test.pvalue), "t": float(test.statistic), **sizes, "undefined": None}
