#!/usr/bin/env python3
"""Write texts that the embedded models were pre-trained on, and texts of the same generator that they never saw.

python data/embedded/make_membership.py --output pretraining
python mia/mia.py --model data/embedded/mini-pythia --members pretraining/members.jsonl \\
    --nonmembers pretraining/nonmembers.jsonl --output_dir results

Both sets are about the same people; only the seed of the mails differs. In --output: members.jsonl, nonmembers.jsonl.
"""

import sys

from common import cli
from common.process import entry
from data.embedded.config import MembershipConfig


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Write pre-training texts of the embedded models, and texts of the same generator that they never saw.",
        "python data/embedded/make_membership.py --output pretraining",
        MembershipConfig,
    )
    add = parser.add_argument
    add("--output", "--output_dir", help="folder of the two files")
    add("--num_rows", type=cli.positive_int, help="texts in each file")
    add("--corpus_seed", type=int, help="seed of the corpus that the model was trained on")
    add("--seed", type=int, help="seed of the non-members, and of what is drawn")
    add("--overwrite", action="store_true", help="replace existing files")
    cli.add_dry_run(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    config = make_parser().parse_args(argv)
    from data.embedded.membership import run

    run(config)
    return 0


if __name__ == "__main__":
    sys.exit(entry(main))
