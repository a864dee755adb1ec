"""Compare data/amazon/prepare.py with pandas on the same fictional files: reviews/s and peak memory.

python bench/amazon.py                                                        # 200,000 reviews, 12,000 products
python bench/amazon.py --reviews 5000000 --products 300000 --runs 1 --no_pandas   # only memory

The pandas version is what a user would write: read_json(lines=True) of both files, merge on parent_asin, dropna,
drop_duplicates, a split by user, to_json(lines=True). It does less than the builder: no unescaping, no hashes, no line
checks. Each measurement is a separate process, startup included; the two alternate, and the median of --runs is
reported. Memory is the peak resident set size. The goals: three times the throughput, and 2 GB at 5 million reviews.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import cli
from common.process import entry

ROOT = Path(__file__).resolve().parents[1]
GOAL_RATIO = 3
GOAL_BYTES = 2e9
PANDAS = """
import sys
import numpy as np, pandas as pd
reviews, meta, folder, train, test, seed = *sys.argv[1:4], *map(int, sys.argv[4:])
rows = pd.read_json(reviews, lines=True)[["rating", "title", "text", "parent_asin", "user_id"]]
products = pd.read_json(meta, lines=True)[["parent_asin", "title", "main_category", "categories"]]
products["categories"] = products["categories"].str.join(" > ")
rows = rows.merge(products, on="parent_asin", suffixes=("", "_product"))
rows = rows.replace("", np.nan).dropna(subset=["text", "user_id", "rating"])
rows = rows.drop_duplicates(["rating", "title", "text", "title_product", "categories"])
users = np.random.default_rng(seed).permutation(rows["user_id"].unique())
place = rows["user_id"].map(pd.Series(range(len(users)), index=users))
rows = rows.iloc[place.argsort(kind="stable")]
for name, part in (("train", rows[:train]), ("test", rows[train:train + test]), ("validation", rows[train + test:])):
    part.to_json(f"{folder}/{name}.jsonl", orient="records", lines=True)
"""


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Time the Amazon builder against pandas on fictional reviews.",
        "python bench/amazon.py --reviews 200000 --products 12000 --runs 3",
    )
    parser.add_argument("--reviews", type=cli.positive_int, default=200000, help="review lines")
    parser.add_argument("--products", type=cli.positive_int, default=12000, help="product lines")
    parser.add_argument("--gzip", action="store_true", help="compressed inputs")
    parser.add_argument("--memory_limit", default="1.2GB", help="memory limit of the builder")
    parser.add_argument("--threads", type=cli.non_negative_int, default=0, help="builder threads; 0: one per core")
    parser.add_argument("--runs", type=cli.positive_int, default=3, help="runs of each; the median is reported")
    parser.add_argument("--no_pandas", action="store_true", help="only run the builder")
    parser.add_argument("--work_dir", default=None, help="directory for the files; None: the temporary directory")
    parser.add_argument("--seed", type=int, default=3407, help="seed of the files and the split")
    return parser


def measure(command: list) -> tuple[float, float, int]:
    """(wall seconds, CPU seconds, peak resident bytes) of a process; raises if it fails."""
    begun = time.monotonic()
    process = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run(args) -> dict:
    with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
        make = [ROOT / "data/amazon/make_reviews.py", "--output_dir", folder, "--reviews", args.reviews]
        make += ["--products", args.products, "--category", "Goods", "--seed", args.seed]
        measure([*make, "--gzip"] if args.gzip else make)
        ending = ".jsonl.gz" if args.gzip else ".jsonl"
        reviews, meta = Path(folder, f"Goods{ending}"), Path(folder, f"meta_Goods{ending}")
        train, test = min(100_000, args.reviews // 2), min(10_000, args.reviews // 20)
        builder = [ROOT / "data/amazon/prepare.py", "--reviews", reviews, "--meta", meta, "--overwrite"]
        builder += ["--output_dir", Path(folder, "ours"), "--train", train, "--test", test, "--seed", args.seed]
        builder += ["--memory_limit", args.memory_limit, "--threads", args.threads]
        Path(folder, "pandas").mkdir()
        commands = {"builder": builder}
        if not args.no_pandas:
            commands["pandas"] = ["-c", PANDAS, reviews, meta, Path(folder, "pandas"), train, test, args.seed]
        size = (reviews.stat().st_size + meta.stat().st_size) / 1e6
        cores = len(os.sched_getaffinity(0))
        print(f"{args.reviews:,} reviews, {args.products:,} products, {size:,.0f} MB of {ending}; {cores} cores")
        print(f"load {os.getloadavg()[0]:.1f} at the start", flush=True)
        runs = {name: [] for name in commands}
        for _ in range(args.runs):
            for name, command in commands.items():
                runs[name].append(measure(command))
    print(f"{'':>8} {'seconds':>8} {'reviews/s':>10} {'CPU seconds':>12} {'peak MB':>8}")
    results = {}
    for name, measurements in runs.items():
        seconds, cpu, peak = (statistics.median(measured[i] for measured in measurements) for i in range(3))
        results[name] = {"seconds": seconds, "reviews_per_s": args.reviews / seconds, "cpu": cpu, "peak_bytes": peak}
        print(f"{name:>8} {seconds:>8.2f} {args.reviews / seconds:>10,.0f} {cpu:>12.2f} {peak / 1e6:>8,.0f}")
    if not args.no_pandas:
        ratio = results["builder"]["reviews_per_s"] / results["pandas"]["reviews_per_s"]
        cpu = results["pandas"]["cpu"] / results["builder"]["cpu"]
        verdict = "reached" if ratio >= GOAL_RATIO else "missed"
        print(f"throughput × {ratio:.2f} by wall time, × {cpu:.2f} by CPU time: goal of × {GOAL_RATIO} {verdict}")
    peak = max(measured[2] for measured in runs["builder"])
    verdict = "within" if peak <= GOAL_BYTES else "above"
    print(f"largest peak of the builder {peak / 1e6:,.0f} MB, {verdict} {GOAL_BYTES / 1e6:,.0f} MB")
    return results


def main(argv: list[str] | None = None) -> int:
    run(make_parser().parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(entry(main))
