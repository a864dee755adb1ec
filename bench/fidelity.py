"""Time fidelity/fidelity.py at full size: one arm of 10,000 rows against 10,000 real ones, by part.

python bench/fidelity.py                         # words, copies, figures; then with embeddings; then with MAUVE too
python bench/fidelity.py --rows 1000 --runs 1    # a quick look

The rows are fictional reviews of about 59 words (the mean of the published Amazon sample): 1 to 4 reviews from
data/amazon/make_reviews.py, joined; the arm has other rows of the same kind. Each measurement is a separate process, up
to its finished files; the median of --runs is reported. The goal: 3 minutes without embedding and MAUVE on two cores.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import cli, manifests
from common.process import entry

ROOT = Path(__file__).resolve().parents[1]
GOAL = 180  # seconds without embedding and MAUVE
PARTS = {"without embedding and MAUVE": ("embedding", "mauve"), "without MAUVE": ("mauve",), "whole": ()}


def make_parser() -> cli.Parser:
    parser = cli.Parser("Time fidelity/fidelity.py by part.", "python bench/fidelity.py --rows 10000 --runs 3")
    parser.add_argument("--rows", type=cli.positive_int, default=10000, help="rows per sample")
    parser.add_argument("--runs", type=cli.positive_int, default=3, help="runs of each; the median is reported")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--threads", type=cli.positive_int, default=os.cpu_count(), help="OMP_NUM_THREADS")
    parser.add_argument("--seed", type=int, default=3407, help="seed of the rows")
    return parser


def make_rows(folder: Path, n: int, seed: int) -> float:
    """Write train.jsonl (n rows), arm.jsonl (n generated rows) and real.jsonl (the rest); return mean words per row."""
    script = [sys.executable, str(ROOT / "data/amazon/make_reviews.py"), "--output_dir", str(folder / "raw")]
    subprocess.run([*script, "--reviews", str(6 * n), "--seed", str(seed)], check=True, stdout=subprocess.DEVNULL)
    reviews, meta = folder / "raw/Fictional_Goods.jsonl", folder / "raw/meta_Fictional_Goods.jsonl"
    words = ["--reviews", reviews, "--meta", meta, "--output_dir", folder, "--train", n, "--test", n, "--seed", seed]
    script = [sys.executable, str(ROOT / "data/amazon/prepare.py"), *map(str, words)]
    subprocess.run(script, check=True, stdout=subprocess.DEVNULL)
    rng, lengths = random.Random(seed), []
    for name, target in (("train", "train"), ("test", "arm"), ("validation", "real")):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        texts = [row["Review"] for row in rows]
        for row in rows:
            row["Review"] = " ".join([row["Review"], *rng.sample(texts, rng.randint(0, 3))])
            lengths.append(len(row["Review"].split()))
            if target == "arm":
                row["generated_text"] = row["Review"]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{target}.jsonl").write_text(text, encoding="utf-8")
        manifests.manifest_path(folder / f"{name}.jsonl").unlink()  # it describes the rows before joining
    return statistics.mean(lengths)


def measure(folder: Path, rows: int, left_out: tuple, threads: int) -> dict:
    """Seconds of one run, and the number of rows it compared."""
    words = ["--real", folder / "real.jsonl", "--train", folder / "train.jsonl", "--num_rows", rows]
    words += ["--synthetic", f"arm={folder / 'arm.jsonl'}", "--output_dir", folder / "out", "--overwrite"]
    words += ["--without", *left_out] if left_out else []
    environment, begun = {**os.environ, "OMP_NUM_THREADS": str(threads)}, time.monotonic()
    script = [sys.executable, str(ROOT / "fidelity/fidelity.py"), *map(str, words)]
    done = subprocess.run(script, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    content = json.loads((folder / "out/results_fidelity.json").read_text(encoding="utf-8"))
    return {"seconds": time.monotonic() - begun, "rows": content["rows"]}


def main(argv=None) -> int:
    args = make_parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        words = make_rows(Path(folder), args.rows, args.seed)
        print(
            f"{args.threads} threads, load {os.getloadavg()[0]:.1f} at the start, {words:.1f} words per row",
            flush=True,
        )
        for part in args.parts:
            runs = [measure(Path(folder), args.rows, PARTS[part], args.threads) for _ in range(args.runs)]
            middle = statistics.median(run["seconds"] for run in runs)
            goal = f" (goal {GOAL} s)" if part == next(iter(PARTS)) else ""
            print(
                f"{part}: {middle:.1f} s{goal}, {runs[0]['rows']:,} rows per sample, median of {args.runs}", flush=True
            )
    return 0


if __name__ == "__main__":
    sys.exit(entry(main))
