#!/usr/bin/env python3
"""Inserts canaries into the reviews of a training file, and writes the key that measure.py reads.

python canary/inject.py --input data/amazon/train.jsonl --repetitions 1 2 4 8 16          # ladder, 10 canaries each
python canary/inject.py --input data/amazon/train.jsonl --share 0.01      # System S: one canary, in 1 % of rows
python canary/inject.py --input data/amazon/train.jsonl --audit 1000 --privacy_unit user # for the one-run ε bound

A canary is a sentence with a secret drawn from a space of known size (--secret). It is inserted at a random place of a
review, never at its start. For every canary of --repetitions and --share there is a held-out one that is inserted
nowhere. The three modes can share a file: a row holds at most one canary.

--audit M: M canaries, each inserted once with probability ½, into a row of its own (under --privacy_unit user the first
row of a user of its own). A canary that is left out takes its row along (under user, all rows of its user): the two
possible files differ by one added or removed unit, as the accountant's ε means it. About M/2 units are left out.

Writes --output (rows), its manifest, and --key_file (mode 0600: where each canary stands, its secret and its context).
"""

import sys

from canary.canaries import SECRETS
from canary.config import InjectConfig
from common import cli


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Place canaries in a training file of reviews.",
        "python canary/inject.py --input data/amazon/train.jsonl --repetitions 1 2 4 8 16",
        InjectConfig,
    )
    add = parser.add_argument
    add("-i", "--input", "--data", help="review rows to train on")
    add("--output", help="the .jsonl file to train on (default: <input>_canaries.jsonl)")
    add("--key_file", help="the .jsonl key (default: <output>_key.jsonl)")
    add("--share", type=cli.positive_float, help="one canary in this share of the rows: 0.01, 0.1, 1")
    add("--repetitions", nargs="+", type=cli.positive_int, help="ladder: rows that hold a canary")
    add("--canaries", type=cli.positive_int, help="canaries of each count in --repetitions")
    add("--audit", type=cli.positive_int, help="canaries placed once or not at all, by a fair coin")
    add("--privacy_unit", choices=("record", "user"), help="what --audit adds or leaves out")
    add("--secret", choices=SECRETS, help="what varies; text: words alone, no person")
    add("--within", type=cli.non_negative_int, help="first characters of the review; 0: anywhere")
    add("--condition", choices=("metadata", "title"), help="title: prompts have the review's title")
    add("--overwrite", action="store_true", help="replace existing files")
    cli.add_dry_run(parser)
    add("--seed", type=cli.seed, help="seed of everything random, the coins too")
    return parser


def main(argv: list[str] | None = None) -> int:
    config = make_parser().parse_args(argv)
    from canary.injection import run

    run(config)
    return 0


if __name__ == "__main__":
    sys.exit(cli.entry(main))
