#!/usr/bin/env python3
"""Check that replaced rows contain no full name or address of the originals, and no matching name–address pair.

python data/leak_check.py --input data/enron.jsonl --replaced data/replaced_data.arrow

Prints, for each kind of leak, the number of rows and their row numbers (from 0), never a value. Exit status 1: there is
a leak. data/replace_pii.py runs the same check before it publishes its output; this script runs it on any file, e.g.
one edited by hand.
"""

import sys
from dataclasses import dataclass

from common import cli, dataset, formats
from common.problems import Problems
from common.process import entry


@dataclass(frozen=True, kw_only=True)
class LeakConfig:
    """The flags of data/leak_check.py."""

    input: str = "./data/enron.jsonl"
    replaced: str
    dry_run: bool = False
    seed: int = 3407


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Search replaced rows for names and addresses of the original ones. Exit status 1: some are left.",
        "python data/leak_check.py --input data/enron.jsonl --replaced data/replaced_data.arrow",
        LeakConfig,
    )
    add = parser.add_argument
    add("--input", "--data", metavar="FILE", help="the original Enron rows (.jsonl, .arrow)")
    add("--replaced", required=True, metavar="FILE", help="the replaced rows (default: none, required)")
    cli.add_dry_run(parser)
    add("--seed", type=cli.seed, help="accepted for uniformity; the check does not use it")
    return parser


def run(config: LeakConfig) -> int:
    """Return 0, or 1 if something leaks; problems with the files raise one UserError."""
    problems = Problems()
    source = dataset.default_dataset(config.input)
    rows, broken = problems.absorb(dataset.read_with_broken, source, dataset.REQUIRED["enron"]) or ([], {})
    replaced = problems.absorb(formats.read_rows, config.replaced)
    rows = [row for index, row in enumerate(rows) if index not in broken]
    problems.check()
    assert replaced is not None
    if config.dry_run:
        print(f"would search {len(replaced):,} rows of {config.replaced} for the people of {len(rows):,} rows")
        return 0
    from data import leaks
    from data.people import read_people

    people, *_ = read_people(rows)
    leaked = leaks.leaks(replaced, people)
    for kind, numbers in leaked.items():
        print(
            f"old {kind} in {len(numbers):,} of {len(replaced):,} rows"
            + (f": {leaks.shown(numbers)}" if numbers else "")
        )
    return 1 if any(leaked.values()) else 0


def main(argv: list[str] | None = None) -> int:
    return run(make_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(entry(main))
