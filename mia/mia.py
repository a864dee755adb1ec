#!/usr/bin/env python3
"""Membership inference: which texts was a model trained on? All attacks from shared passes, with controls.

python mia/mia.py --model ./pythia-1.4b/run/checkpoint-276 --members data/enron.jsonl --output_dir ./results
python mia/mia.py --dir ./pythia-1.4b --members data/enron.jsonl        # every checkpoint-* below, results beside each
python mia/mia.py --model ./model --ref_model ./base --members a.jsonl --nonmembers b.jsonl --combine
python mia/mia.py --model ./run/checkpoint-276 --members data/enron.jsonl --shadows ./shadows  # of mia/shadow.py
torchrun --nproc_per_node=4 mia/mia.py --config mia.json                       # the same keys, as JSON

Writes results_mia.jsonl (one line per attack), scores_mia.jsonl (one line per text, members first; texts only as
hashes), roc_mia.png and run_mia.json, which has the set-level test; with --shadows also risk_mia.jsonl (one line per
row: its score calibrated by the shadows, and its rank). For every score, higher = more likely a member.
Controls always run: blind baselines that never see the model, the same attacks on the base model, near-duplicates
across the two sets. Sets that fail a control are flagged in every line, in the table and in the figure.
If run_peft.py's run.json is beside a checkpoint, members are only rows that it was trained on (with --dir: that all
were), and those are never non-members. `members_trained` is false if the training used a different file than
--members, null without a run.json.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # otherwise `mia` would be this file, not its folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import cli
from common.process import entry
from common.schema import CORE, FAMILIES
from mia.config import MiaConfig
from mia.dataset import SHOTS


def make_parser() -> cli.Parser:
    """The parser of mia/mia.py; `parse_args` gives a MiaConfig."""
    parser = cli.Parser(
        "Membership inference on a model, an adapter, or every checkpoint-* below a directory.",
        "python mia/mia.py --model ./pythia-1.4b/run/checkpoint-276 --members data/enron.jsonl --output_dir ./results",
        MiaConfig,
    )
    add = parser.add_argument
    with parser.section("model"):
        add("--model", help="model directory, adapter directory or hub name")
        add("--dir", help="instead of --model: every checkpoint-* below this directory")
        cli.add_base_model(parser, "every adapter")
        add("--ref_model", help="reference model (default: an adapter's base)")
        add("--neighbor_model", help="directory of a masked LM (default: the target model proposes neighbours)")
        cli.add_model_flags(parser)
        cli.add_parallel_flag(parser)
    with parser.section("data"):
        add("--members", "--data", help="texts the model was trained on (.jsonl, .json, .csv, .arrow, .parquet)")
        add(
            "--nonmembers",
            help="texts it was not trained on (default: the held-out head of --members; its other rows are members)",
        )
        cli.add_row_flags(parser)
        add("--text_field", help="text field (default: the training text, e.g. prompt + continuation)")
        add(
            "--prefix_file",
            help=f'the {SHOTS} shots of recall: non-members, and members with "label": 1 (default: rows of the two '
            "sets, which are then not scored)",
        )
        add(
            "--freq_corpus",
            help="data file for dc_pdd's token frequencies; near-duplicates of scored texts are excluded",
        )
        add("--max_length", type=cli.positive_int, help="tokens per text; longer texts are truncated")
        add(
            "--max_samples",
            "--num_rows",
            type=cli.positive_int,
            help="texts per set, sampled with --seed (default: all)",
        )
    with parser.section("attacks"):
        add(
            "--attacks",
            nargs="+",
            metavar="ATTACK",
            help=f"any of {' '.join(FAMILIES)}, one size like min_k_20, core, or all (default: core: {' '.join(CORE)}; "
            "plus recall and con_recall with --prefix_file, dc_pdd with --freq_corpus, neighborhood with "
            "--neighbor_model)",
        )
        add(
            "--shadows",
            metavar="DIR",
            help="the --output_dir of mia/shadow.py: adds lira_offline, lira and rmia, and risk_mia.jsonl",
        )
        add("--combine", action="store_true", help="add a cross-fitted logistic regression over all scores")
        add("--bootstrap", type=cli.positive_int, help="bootstrap resamples for the intervals")
        add("--token_budget", type=cli.positive_int, help="positions per forward pass")
    with parser.section("output"):
        add(
            "--output_dir",
            help="where the result files go (default: each checkpoint's own directory; ./ with --model)",
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these arguments (default: sys.argv); returns the exit status. UserError: see `measure.run`."""
    config: MiaConfig = make_parser().parse_args(argv)
    from mia.measure import run

    return run(config)


if __name__ == "__main__":
    sys.exit(entry(main))
