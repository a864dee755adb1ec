#!/usr/bin/env python3
"""Membership inference: which texts was a model trained on? Every known attack from one pass, with its controls.

python mia/mia.py --model ./pythia-1.4b/run/checkpoint-276 --members data/enron.jsonl --output_dir ./results
python mia/mia.py --dir ./pythia-1.4b --members data/enron.jsonl               # every checkpoint-* below, each in place
python mia/mia.py --model ./model --ref_model ./base --members a.jsonl --nonmembers b.jsonl --combine
torchrun --nproc_per_node=4 mia/mia.py --config mia.json                       # the same keys, as JSON

Leaves results_mia.jsonl (a line an attack), scores_mia.jsonl (a line a text, members first; the text only as a hash),
roc_mia.png and run_mia.json, which has the set-level test. Every score: higher = more likely a member.
Controls always run: baselines that never see the model, the same attacks on the base model, texts that stand nearly
alike in both sets. A set that fails one is flagged in every line, in the table and in the figure.
Where run_peft.py's run.json stands beside a checkpoint, only rows that it was trained on are members (with --dir: that
all were) and rows that it was trained on are no non-members; `members_trained` is false for a run on another file than
--members, null where no run.json tells.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # else `mia` would be this file, not its folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import cli
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
        add("--base_model", help="base of every adapter, instead of the one it names itself")
        add("--ref_model", help="reference model (default: of an adapter its base, the adapter switched off)")
        add("--neighbor_model", help="directory of a masked LM (default: proposals of the target itself)")
        cli.add_model_flags(parser)
    with parser.section("data"):
        add("--members", "--data", help="texts trained on (.jsonl, .json, .csv, .arrow, .parquet)")
        add(
            "--nonmembers",
            help="texts not trained on (default: the held-out head of --members, whose other rows are the members)",
        )
        cli.add_row_flags(parser)
        add("--text_field", help="field that holds the text (default: as trained, e.g. prompt + continuation)")
        add(
            "--prefix_file",
            help=f'the {SHOTS} shots of recall: non-members, and members where "label" is 1 (default: rows of the two '
            "sets, which are then not scored)",
        )
        add(
            "--freq_corpus",
            help="data file of dc_pdd's token frequencies; rows like scored ones are left out",
        )
        add("--max_length", type=cli.positive_int, help="tokens of a text; the rest is cut off")
        add(
            "--max_samples",
            "--num_rows",
            type=cli.positive_int,
            help="texts of each set, drawn by --seed (default: all)",
        )
    with parser.section("attacks"):
        add(
            "--attacks",
            nargs="+",
            metavar="ATTACK",
            help=f"of {' '.join(FAMILIES)}, one size as min_k_20, core or all (default: core: {' '.join(CORE)}; recall "
            "and con_recall with --prefix_file, dc_pdd with --freq_corpus, neighborhood with --neighbor_model)",
        )
        add("--combine", action="store_true", help="also a cross-fitted logistic regression over all scores")
        add("--bootstrap", type=cli.positive_int, help="resamples of the intervals")
        add("--token_budget", type=cli.positive_int, help="positions a forward pass")
    with parser.section("output"):
        add(
            "--output_dir",
            help="where the result files go (default: each checkpoint's own directory; ./ with --model)",
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these words (default: the command line's); the exit status. UserError as of `measure.run`."""
    config: MiaConfig = make_parser().parse_args(argv)
    from mia.measure import run

    return run(config)


if __name__ == "__main__":
    sys.exit(cli.entry(main))
