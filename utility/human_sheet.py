#!/usr/bin/env python3
"""Make a blinded sheet of reviews for human raters, and score the returned sheets.

python utility/human_sheet.py make --synthetic no_dp=no_dp.jsonl dp=dp.jsonl --real test.jsonl --output_dir human
python utility/human_sheet.py score --sheets human/sheet-anna.csv human/sheet-ben.csv --key human/key.jsonl \\
    --output_dir human

make: draws --num_rows rows, split evenly over the arms, and writes them in random order to sheet.csv (sheet id, number,
product, rating, text, an empty `label` column), with rubric.md and key.jsonl (mode 0600). Only the key says which arm a
row is from: keep it from the raters.
score: every row of every sheet needs exactly one label from the rubric and the sheet id of the key (any other choice,
order or arm assignment of rows has another id). Writes human_evaluation.json: counts per arm and label with
Clopper–Pearson intervals, and agreement (Cohen's κ of each pair of sheets, Fleiss' κ of all).
"""

import sys

from common import cli
from common.process import entry
from utility.config import SheetConfig


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Make a blinded sheet of reviews for human raters, or score the returned sheets.",
        "python utility/human_sheet.py make --synthetic no_dp=no_dp.jsonl dp=dp.jsonl --output_dir human",
        SheetConfig,
    )
    add = parser.add_argument
    add("action", choices=("make", "score"), help="make a sheet, or score returned ones")
    add("--synthetic", nargs="+", action="extend", metavar="ARM=FILE", help="make: generated rows (default: none)")
    add("--real", metavar="FILE", help="make: review rows for an additional arm `real`")
    cli.add_columns(parser)
    add("--num_rows", type=cli.positive_int, help="make: rows in the sheet")
    add("--sheets", nargs="+", metavar="FILE", help="score: completed sheets (default: none)")
    add("--key", metavar="FILE", help="score: the key.jsonl written by make")
    add("--output_dir", help="directory for the output files")
    add("--overwrite", action="store_true", help="replace existing files")
    cli.add_dry_run(parser)
    add("--seed", type=cli.seed, help="seed for choosing and ordering the rows")
    return parser


def main(argv: list[str] | None = None) -> int:
    config = make_parser().parse_args(argv)
    from utility.human import run

    run(config)
    return 0


if __name__ == "__main__":
    sys.exit(entry(main))
