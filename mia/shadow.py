#!/usr/bin/env python3
"""Train shadow models of a checkpoint, so that mia/mia.py can calibrate every row's score (LiRA, RMIA).

python mia/shadow.py --like ./pythia-1.4b/original-lora/0e+00_2e-06/checkpoint-276 --shadows 8 --output_dir shadows
torchrun --nproc_per_node=4 mia/shadow.py --like CHECKPOINT --shadows 16     # each rank trains its own shadows
python mia/mia.py --model CHECKPOINT --members data/enron.jsonl --shadows shadows

A shadow is an adapter, trained as --like was (the arguments in its run.json; one process has the batches of all of its
processes), on a random half of its members and non-members, the two sets that mia/mia.py compares. Shadows come in
pairs: one is trained on what the other is not, so with an even number each row is in half of the shadows. Equal texts
stay together. All are trained on one loaded base (PiSSA changes its base and loads it for each).

Writes to --output_dir: pool.jsonl (the settings, then the rows, by index and hash), shadow-<k>/ (a run directory, with
one checkpoint per epoch and trained_rows.jsonl: which rows it saw) and run_shadow.json. No text. The same command
resumes what was interrupted; with more --shadows it trains only the new ones. --shadows below 4 leaves some attacks
null: each needs 2 shadows that saw a row, 2 that did not, or both. Keep the directory outside the one that mia/mia.py
--dir measures.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # otherwise `mia` would be the script mia.py beside this file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import cli
from common.process import entry
from shadowing.config import ShadowConfig


def make_parser() -> cli.Parser:
    """The parser of mia/shadow.py; `parse_args` gives a ShadowConfig."""
    parser = cli.Parser(
        "Train shadow models as a checkpoint was trained, each on a random half of its members and non-members.",
        "python mia/shadow.py --like ./pythia-1.4b/run/checkpoint-276 --shadows 8 --output_dir shadows",
        ShadowConfig,
    )
    add = parser.add_argument
    add("--like", required=True, metavar="CHECKPOINT", help="an adapter of run_peft.py (default: none, required)")
    add("--shadows", type=cli.positive_int, help="number of shadows; 64 and more give each row its own deviation")
    add("--members", "--data", help="texts it was trained on; None: the file in its run.json")
    add("--nonmembers", help="texts it was not trained on (default: the held-out head of --members)")
    add("--base_model", help="its base, overriding adapter_config.json")
    add("--output_dir", help="where the shadows go")
    cli.add_dry_run(parser)
    add("--seed", type=cli.seed, help="of the halves, and of each shadow's training")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these arguments (default: sys.argv); returns the exit status."""
    config: ShadowConfig = make_parser().parse_args(argv)
    from shadowing.run import run

    return run(config)


if __name__ == "__main__":
    sys.exit(entry(main))
