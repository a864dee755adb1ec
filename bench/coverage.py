"""Simulate how often the intervals in the result files cover the true value; prints the table of docs/coverage.md.

python bench/coverage.py                 # 2,000 runs per setting, a few minutes on one core
python bench/coverage.py --runs 500 --only auc

rate     Clopper–Pearson for the rate of one template (one draw per row)
total    the total over four templates whose answers are correlated within a row: the rate of a row is drawn from a beta
         distribution with intraclass correlation ρ
auc      the AUC of m members against n non-members: normal scores, and heavy-tailed ones (t with 3 degrees of freedom)
         in which a fifth of the members scores far higher, so that the ROC curve has another shape
tpr      the TPR at a true FPR of 1 %, for normal scores
jackknife   the 20-group jackknife of fidelity.py, for two metrics: Wasserstein-1 and the Fréchet distance. Both are
         biased by sample size, so the true value is the metric's mean at this size over the runs themselves
Nominal 95 %. `below` and `above`: the share of runs whose interval lies below and above the true value. Monte Carlo
error: about 0.5 % at 2,000 runs.
"""

import sys
from pathlib import Path

from common import cli, stats
from common.process import entry

KINDS = ("rate", "total", "auc", "tpr", "jackknife")
SEED = 20250


def make_parser() -> cli.Parser:
    parser = cli.Parser("Simulate the coverage of the intervals.", "python bench/coverage.py --runs 2000")
    parser.add_argument("--runs", type=cli.positive_int, default=2000, help="simulated samples per setting")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of interval to simulate")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of the simulation")
    return parser


def tally(bounds, truth: float) -> dict:
    """Coverage, mean width, and the shares of the intervals [S, 2] that lie below and above the truth."""
    import numpy as np

    low, high = np.asarray(bounds, float).T
    return {
        "coverage": float(((low <= truth) & (truth <= high)).mean()),
        "width": float((high - low).mean()),
        "below": float((high < truth).mean()),
        "above": float((low > truth).mean()),
    }


def rate(runs: int, rng):
    import numpy as np

    for n in (20, 100, 1000):
        for p in (0.001, 0.005, 0.05, 0.5):
            low, high = stats._clopper_pearson(rng.binomial(n, p, runs), np.full(runs, n), 0.95)
            yield "rate, Clopper–Pearson", f"{n} rows, p {p:g}", tally(np.stack([low, high], 1), p)


def clustered(rows: int, p: float, correlation: float, runs: int, rng):
    """[runs, rows, 4] outcomes; the row rates are beta-distributed with mean p and this intraclass correlation."""
    if correlation == 0:
        own = p
    elif correlation == 1:
        own = (rng.random((runs, rows, 1)) < p).astype(float)
    else:
        scale = 1 / correlation - 1
        own = rng.beta(p * scale, (1 - p) * scale, (runs, rows, 1))
    return (rng.random((runs, rows, 4)) < own).astype(float)


def total(runs: int, rng):
    import numpy as np

    for rows in (100, 500, 1000):
        for p in (0.001, 0.005, 0.05, 0.5):
            for correlation in (0.0, 0.3, 0.9):
                bounds = []
                for start in range(0, runs, 250):
                    drawn = clustered(rows, p, correlation, min(250, runs - start), rng)
                    bounds.append(np.stack(stats._clustered_rates(drawn), 1))
                where = f"{rows} rows × 4, p {p:g}, ρ {correlation:g}"
                yield "total, Korn–Graubard", where, tally(np.concatenate(bounds), p)


def shifts(kind: str):
    """(draw(rng, m, n, shift) → scores of members and non-members; function from shift to true AUC)."""
    import numpy as np
    from scipy import stats

    if kind == "normal":
        return (lambda rng, m, n, s: (rng.normal(s, 1, m), rng.normal(0, 1, n))), lambda s: stats.norm.cdf(s / 2**0.5)
    reference = np.sort(np.random.default_rng(0).standard_t(3, 400_000))

    def draw(rng, m, n, s):
        far = rng.random(m) < 0.2
        return rng.standard_t(3, m) + np.where(far, 4 * s, s), rng.standard_t(3, n)

    def area(s):
        others = np.random.default_rng(1).standard_t(3, 400_000)
        parts = [np.searchsorted(reference, others + far).mean() / len(reference) for far in (s, 4 * s)]
        return 0.8 * parts[0] + 0.2 * parts[1]

    return draw, area


def auc(runs: int, rng):
    from scipy.optimize import brentq

    for kind in ("normal", "heavy-tailed"):
        draw, area = shifts(kind)
        for target in (0.5, 0.7, 0.9, 0.95, 0.99):
            shift = (
                0.0 if target == 0.5 else brentq(lambda s, area=area, target=target: area(s) - target, 0, 40, xtol=1e-4)
            )
            truth = area(shift)
            for m, n in ((20, 20), (50, 50), (20, 200), (200, 200), (1000, 1000)):
                bounds = [stats.auc_interval(*draw(rng, m, n, shift)) for _ in range(runs)]
                yield "AUC, logit DeLong or Newcombe", f"{m} + {n}, {kind}, AUC {target:g}", tally(bounds, truth)


def tpr(runs: int, rng):
    import numpy as np
    from scipy import stats

    from mia import metrics

    for m, n in ((200, 200), (1000, 1000)):
        for shift in (0.0, 1.0, 2.0):
            truth = float(stats.norm.sf(stats.norm.ppf(0.99) - shift))
            bounds = []
            for _ in range(runs // 4):
                points = metrics.tpr_at(rng.normal(shift, 1, m), rng.normal(0, 1, n), "0.01")
                bounds.append(points["tpr_ci"])
            yield "TPR at 1 % FPR, order statistics", f"{m} + {n}, TPR {truth:.3f}", tally(np.array(bounds), truth)


def jackknife(runs: int, rng):
    import numpy as np
    from scipy import stats

    from fidelity import metrics

    n = 400
    intervals = {"Wasserstein-1": [], "Fréchet": []}
    for number in range(max(50, runs // 10)):
        x, y = rng.normal(0.3, 1, n), rng.normal(0, 1, n)
        vectors_x, vectors_y = rng.normal(0.3, 1, (n, 8)), rng.normal(0, 1, (n, 8))

        def measure(keep, x=x, y=y, vectors_x=vectors_x, vectors_y=vectors_y):
            left, right = keep[:n], keep[n:]
            return {
                "Wasserstein-1": float(stats.wasserstein_distance(x[left], y[right])),
                "Fréchet": metrics.frechet_distance(vectors_x[left], vectors_y[right]),
            }

        groups = np.concatenate([metrics.deal(n, 2 * number), metrics.deal(n, 2 * number + 1)])
        for name, values in metrics.replicate(measure, groups).items():
            estimate = metrics.interval(values, metrics.WIDER["Wasserstein-1 words a review"] if name[0] == "W" else 1)
            intervals[name].append([estimate["value"], estimate["low"], estimate["high"]])
    for name, simulated in intervals.items():
        values, bounds = np.array(simulated)[:, 0], np.array(simulated)[:, 1:]
        yield f"{name}, jackknife", f"{n} + {n} rows, its mean at this size", tally(bounds, float(values.mean()))


def main(argv=None) -> int:
    args = make_parser().parse_args(argv)
    import numpy as np

    print(f"Nominal 95 %, {args.runs} runs, seed {args.seed}.\n")
    print("| interval | setting | coverage | mean width | below | above |\n|---|---|---|---|---|---|")
    for kind in args.only:
        rng = np.random.default_rng([args.seed, KINDS.index(kind)])
        for name, setting, line in globals()[kind](args.runs, rng):
            mark = "" if line["coverage"] >= 0.92 else " **<**"
            print(
                f"| {name} | {setting} | {line['coverage']:.3f}{mark} | {line['width']:.4f} | {line['below']:.3f} | "
                f"{line['above']:.3f} |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # otherwise bench/ shadows the packages fidelity and mia
    sys.exit(entry(main))
