"""Simulate the lower bounds on ε from one run, for Gaussian mechanisms of known ε; prints a table of docs/coverage.md.

python bench/bounds.py                                   # 2,000 runs per setting
python bench/bounds.py --figure docs                     # also draws docs/bounds.svg
python bench/bounds.py --runs 200 --canaries 100 --epsilons 1

Each canary is in or out by a fair coin, and its score is drawn from N(μ/2, 1) or N(−μ/2, 1): a Gaussian mechanism
whose μ gives exactly this ε at --delta. The bounds are those of canary/measure.py, with its fixed shares of guesses:
Steinke, Nasr and Jagielski (2023); by f-DP (Mahloujifar, Melis and Chaudhuri 2024), of any training; and of a Gaussian
mechanism. above: the share of runs whose bound exceeds the true ε, which --level limits (Monte Carlo error: 0.5 % at
2,000 runs and 5 %). bound / ε: the median over the runs, with the 5 % and 95 % quantiles. A bound depends on a run only
through its numbers of right guesses, so that of each number is computed once. Exit status 1 if a bound is above ε in
more than --level and three standard errors of the runs.
"""

import sys
import time
from pathlib import Path

from common import cli
from common.process import entry

SEED = 20250
NAMES = {"steinke": "Steinke", "epsilon_delta": "f-DP", "gaussian": "f-DP if Gaussian"}
LOOKS = {"steinke": ("vermillion", "^"), "epsilon_delta": ("purple", "D"), "gaussian": ("green", "P")}


def make_parser() -> cli.Parser:
    parser = cli.Parser("Simulate the lower bounds on ε.", "python bench/bounds.py --runs 2000 --figure docs")
    add = parser.add_argument
    add("--runs", type=cli.positive_int, default=2000, help="simulated audits per setting")
    add("--canaries", type=cli.positive_int, nargs="+", default=[100, 300, 1000, 3000], help="numbers of canaries")
    add("--epsilons", type=cli.positive_float, nargs="+", default=[0.5, 1.0, 2.0, 4.0, 8.0], help="true values of ε")
    add("--delta", type=cli.share, default=1e-5, help="δ of every ε")
    add("--level", type=cli.share, default=0.05, help="allowed share of bounds above the true ε")
    add("--seed", type=cli.seed, default=SEED, help="seed of the simulation")
    add("--figure", metavar="DIR", help="also draw bounds.svg in this folder")
    return parser


def mu_of(epsilon: float, delta: float) -> float:
    """The μ of the Gaussian mechanism that has this ε at δ."""
    from scipy.optimize import brentq

    from canary.fdp import gaussian_epsilon

    return float(brentq(lambda mu: gaussian_epsilon(mu, delta) - epsilon, 1e-3, 40, xtol=1e-12))


def right_guesses(m: int, mu: float, runs: int, rng):
    """[runs, shares] numbers of right guesses, with the fixed shares of canary/audit.py."""
    import numpy as np

    from canary.audit import halves

    counts = []
    for start in range(0, runs, 200):
        coins = rng.random((min(200, runs - start), m)) < 0.5
        scores = rng.normal(size=coins.shape) + np.where(coins, mu / 2, -mu / 2)
        ranked = np.take_along_axis(coins, np.argsort(-scores, axis=1), axis=1)
        counts.append([ranked[:, :n].sum(1) + (~ranked[:, -n:]).sum(1) for n in halves(m).values()])
    return np.concatenate([np.array(part).T for part in counts])


def bounds_of(counts, m: int, delta: float, level: float, method):
    """[runs] bounds: the largest over the shares, each at its part of the level."""
    import numpy as np

    from canary.audit import SHARES, halves

    best = np.zeros(len(counts))
    for column, half in zip(counts.T, halves(m).values()):
        distinct, where = np.unique(column, return_inverse=True)
        found = method(distinct.tolist(), [2 * half] * len(distinct), m, delta, level / len(SHARES))
        best = np.maximum(best, np.array(found)[where])
    return best


def simulate(args) -> list[dict]:
    """One line per number of canaries, ε and bound."""
    import numpy as np

    from canary.audit import lower_bounds
    from canary.lines import F_DP

    lines = []
    for m in args.canaries:
        for epsilon in args.epsilons:
            rng = np.random.default_rng([args.seed, m, round(1000 * epsilon)])
            counts = right_guesses(m, mu_of(epsilon, args.delta), args.runs, rng)
            for name, method in {"steinke": lower_bounds, **F_DP}.items():
                found = bounds_of(counts, m, args.delta, args.level, method)
                low, middle, high = np.quantile(found / epsilon, (0.05, 0.5, 0.95)).tolist()
                line = {"m": m, "epsilon": epsilon, "name": name, "above": float((found > epsilon).mean())}
                lines.append(line | {"low": low, "middle": middle, "high": high})
    return lines


def table(lines: list[dict], limit: float) -> str:
    rows = ["| bound | canaries | true ε | above | bound / ε, median (5 %–95 %) |", "|---|---|---|---|---|"]
    for line in sorted(lines, key=lambda line: list(NAMES).index(line["name"])):
        mark = "" if line["above"] <= limit else " **>**"
        share = f"{line['middle']:.2f} ({line['low']:.2f}–{line['high']:.2f})"
        row = f"| {NAMES[line['name']]} | {line['m']:,} | {line['epsilon']:g} | {line['above']:.4f}{mark} | {share} |"
        rows.append(row)
    return "\n".join(rows)


def draw(lines: list[dict], level: float, delta: float, folder: Path) -> Path:
    """bounds.svg: a panel for each number of canaries, bound / true ε against the true ε."""
    import matplotlib

    matplotlib.use("Agg")
    from reporting.svg import AXIS, COLOURS, SETTINGS, Figure, Panel, whole

    epsilons = sorted({line["epsilon"] for line in lines})

    def panel(m: int) -> Panel:
        def draw_bounds(axes):
            axes.axhline(1.0, color=AXIS, linestyle="--", linewidth=1.2)
            for place, (name, (colour, marker)) in enumerate(LOOKS.items()):
                own = [line for line in lines if line["m"] == m and line["name"] == name]
                x = [line["epsilon"] * 1.12 ** (place - 1) for line in own]  # beside each other, not on top
                ends = [[line["middle"] - line["low"] for line in own], [line["high"] - line["middle"] for line in own]]
                middles = [line["middle"] for line in own]
                axes.errorbar(x, middles, yerr=ends, color=COLOURS[colour][0], fmt=marker, elinewidth=1.4)
            axes.set_xscale("log", base=2)
            axes.set_xticks(epsilons, [f"{epsilon:g}" for epsilon in epsilons])
            axes.minorticks_off()
            axes.set(xlabel="true ε", ylabel="bound / true ε", ylim=(-0.03, 1.05))
            axes.grid(axis="y")

        return Panel(f"{m:,} canaries", draw_bounds)

    keys = [(NAMES[name], COLOURS[colour][0], marker, None) for name, (colour, marker) in LOOKS.items()]
    keys.append(("the true ε", AXIS, None, "--"))
    panels = [panel(m) for m in sorted({line["m"] for line in lines})]
    title = f"Lower bounds at {100 * (1 - level):g} %, δ {delta:g}: median and 5 %–95 % of the runs"
    figure = Figure("bounds", title, "", "", panels, keys, 2)
    with matplotlib.rc_context({**SETTINGS, "svg.hashsalt": "bounds"}):
        path = folder / "bounds.svg"
        whole(figure).savefig(path, metadata={"Date": None, "Creator": None})
    return path


def main(argv=None) -> int:
    args = make_parser().parse_args(argv)
    start = time.monotonic()
    print(f"Level {100 * (1 - args.level):g} %, δ {args.delta:g}, {args.runs} runs, seed {args.seed}.\n")
    lines = simulate(args)
    limit = args.level + 3 * (args.level * (1 - args.level) / args.runs) ** 0.5
    print(table(lines, limit))
    print(f"\n{time.monotonic() - start:.0f} s")
    if args.figure:
        print(draw(lines, args.level, args.delta, Path(args.figure)))
    return 1 if any(line["above"] > limit for line in lines) else 0


if __name__ == "__main__":
    sys.exit(entry(main))
