#!/usr/bin/env python3
"""Perplexity of every checkpoint below a directory, or of one model, on the evaluation head of a dataset.

python perplexity/perplexity.py ./pythia-1.4b --dataset ./data/enron.jsonl    # every checkpoint-* below the directory
python perplexity/perplexity.py --model ./pythia-1.4b/run/checkpoint-276 --output_dir ./results   # one adapter or model
torchrun --nproc_per_node=4 perplexity/perplexity.py ./pythia-1.4b            # the rows split across four GPUs

A document is prompt + continuation; its perplexity is exp(mean NLL of its tokens 1 … T after a start token (BOS, else
EOS)). perplexity.txt has one line per checkpoint (mean over documents), perplexity.jsonl all of its metrics. Documents
longer than the context are scored in windows with a stride of half the context, each token once (`n_windowed` counts
these documents). Checkpoints already measured with the same settings and weights are skipped, so an interrupted run
can be rerun.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # otherwise `import perplexity` would find this file, not the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import cli
from common.process import entry
from perplexity.config import DEFAULT_DIR, PerplexityConfig


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Perplexity of every checkpoint-* below a directory, or of one model.",
        "python perplexity/perplexity.py ./pythia-1.4b --dataset ./data/enron.jsonl",
        PerplexityConfig,
        settle_directory,
    )
    add = parser.add_argument
    add("directory", nargs="?", metavar="DIR", default=None, help="same as --dir (default: --dir)")
    with parser.section("model"):
        add("--dir", help="directory searched for checkpoint-*, at any depth")
        add("--model", help="instead of --dir: one model directory, adapter or hub name")
        add("--base_model", help="base of every adapter, instead of the one named in its configuration")
        cli.add_model_flags(parser)
        cli.add_parallel_flag(parser)
        add("--token_budget", type=cli.positive_int, help="positions per forward pass")
    with parser.section("data"):
        add("-d", "--dataset", "--data", help="data file (.jsonl, .json, .csv, .arrow, .parquet)")
        add(
            "--num_rows",
            type=cli.positive_int,
            help="first N rows of the file (default: its evaluation head, at most 1110 rows)",
        )
        cli.add_row_flags(parser)
    with parser.section("output"):
        add("--output_dir", help="directory for the result files (default: that of --dir; ./ with --model)")
    return parser


def settle_directory(parsed: argparse.Namespace, problems: list[str]) -> None:
    """Treat DIR as --dir; reject either together with --model."""
    if parsed.directory is not None:
        if parsed.dir not in (DEFAULT_DIR, parsed.directory):
            problems.append(f"--dir {parsed.dir}: differs from {parsed.directory}; give only one")
        parsed.dir = parsed.directory
    if parsed.model and parsed.dir != DEFAULT_DIR:
        problems.append(f"--model {parsed.model}: cannot be combined with the directory {parsed.dir}; give only one")
    del parsed.directory


def main(argv: list[str] | None = None) -> int:
    config = make_parser().parse_args(argv)
    from perplexity.measure import run

    return run(config)


if __name__ == "__main__":
    sys.exit(entry(main))
