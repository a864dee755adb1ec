#!/usr/bin/env python3
"""Check replaced rows against the originals: does an old full name, an old address or a pair of them still stand there?

python data/leak_check.py --input data/enron.jsonl --replaced data/replaced_data.arrow

Prints, for each kind, how many rows and their numbers (from 0), never a value. Exit status 1: there is a leak.
data/replace_pii.py makes this check itself before it writes; here it runs on any file, also one edited by hand.
"""

import sys
from dataclasses import dataclass

from common import cli, dataset


@dataclass(frozen=True, kw_only=True)
class LeakConfig:
    """The flags of data/leak_check.py."""

    input: str = "./data/enron.jsonl"
    replaced: str
    dry_run: bool = False
    seed: int = 3407


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Look for names and addresses of the original rows in replaced ones. Exit status 1: some are left.",
        "python data/leak_check.py --input data/enron.jsonl --replaced data/replaced_data.arrow",
        LeakConfig,
    )
    add = parser.add_argument
    add("--input", "--data", metavar="FILE", help="the original Enron rows (.jsonl, .arrow)")
    add("--replaced", required=True, metavar="FILE", help="the rows made from them (default: none, required)")
    cli.add_dry_run(parser)
    add("--seed", type=cli.seed, help="seed of the stand-ins, which the check does not read")
    return parser


def run(config: LeakConfig) -> int:
    """0, or 1 when something leaks. UserError with every problem of the files."""
    problems = cli.Problems()
    source = dataset.default_dataset(config.input)
    rows, broken = problems.absorb(dataset.read_with_broken, source, dataset.REQUIRED["enron"]) or ([], {})
    replaced = problems.absorb(dataset.read_rows, config.replaced)
    rows = [row for index, row in enumerate(rows) if index not in broken]
    problems.check()
    if config.dry_run:
        print(f"would look for the people of {len(rows):,} rows in {len(replaced):,} rows of {config.replaced}")
        return 0
    from data import leaks
    from data.people import read_people

    people, *_ = read_people(rows)
    found = leaks.leaks(replaced, people)
    for kind, numbers in found.items():
        print(
            f"old {kind} in {len(numbers):,} of {len(replaced):,} rows"
            + (f": {leaks.shown(numbers)}" if numbers else "")
        )
    return 1 if any(found.values()) else 0


def main(argv: list[str] | None = None) -> int:
    return run(make_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(cli.entry(main))
