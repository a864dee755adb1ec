#!/usr/bin/env python3
"""Replace every person and every e-mail address in Enron rows by invented ones.

python data/replace_pii.py --input data/enron.jsonl                                # writes data/replaced_data.arrow
python data/replace_pii.py --input data/enron.jsonl --output replaced_data.arrow --overwrite
python data/replace_pii.py --input enron.jsonl --output r.arrow --save_map map.json  # old → new; keep it safe (0600)
python run_peft.py -i data/replaced_data.arrow                                     # trains on its rows, split as usual

Replacement is consistent over the whole file: each person and each address has one stand-in in every text column,
including quoted mail and signatures. People are taken from gt-name and gt-email, from names next to addresses and from
header lines in the texts. Stand-ins come from Faker and keep the shape: number of words, case, initials, the name rule
of an address and its digits (without a rule: random letters of the same shape), the number of labels of a domain.
data/replacement.py specifies what is rewritten and which ordinary words are left alone.

Before the output is published, the leak check reads it back from disk: if it contains an old full name ('First Last',
'First M. Last', 'Last, First'), an old address or a pair of them, in any case, the run ends with exit status 1 and
writes no file. The check only knows people that were found; nicknames, truncated names and first names of unknown
people do not count as full names.
"""

import sys

from common import cli
from common.process import entry
from data.replacing.config import DEFAULT_NAME, ReplaceConfig


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Replace every person and e-mail address in Enron rows consistently, and check the result for leaks.",
        "python data/replace_pii.py --input data/enron.jsonl --output data/replaced_data.arrow",
        ReplaceConfig,
    )
    parser.add_argument("--input", "--data", metavar="FILE", help="Enron rows (.jsonl, .arrow)")
    parser.add_argument(
        "--output", metavar="FILE", help=f"the .arrow file to write; None: {DEFAULT_NAME} next to --input"
    )
    parser.add_argument(
        "--save_map",
        metavar="FILE",
        help="also write the old → new map as JSON, mode 0600 (it reverses the replacement)",
    )
    parser.add_argument("--strict", action="store_true", help="fail if a row is malformed, instead of leaving it out")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output and --save_map")
    cli.add_dry_run(parser)
    parser.add_argument("--seed", type=cli.seed, help="seed of the stand-ins")
    return parser


def main(argv: list[str] | None = None) -> int:
    config = make_parser().parse_args(argv)
    from data.replacing.run import run

    return run(config)


if __name__ == "__main__":
    sys.exit(entry(main))
