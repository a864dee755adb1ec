#!/usr/bin/env python3
"""Training and held-out rows of invented people with secrets, to try an audit on a model with known training data.

python data/planted/make_rows.py --num_rows 400 --output planted           # planted/train.jsonl, planted/heldout.jsonl
python data/planted/make_rows.py --num_rows 60 --output planted --text     # plain text instead of chats

Each row holds the phone number, the card and the e-mail address of one invented person; nobody is in both files. The
people are drawn in one sequence that is cut in half, so the split is fair and random.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from common import cli, locks
from common.problems import Problems, check_writable
from common.process import entry
from data.planted import people


@dataclass(frozen=True, kw_only=True)
class PlantedConfig:
    """num_rows: of each of the two files."""

    output: str = "./planted"
    num_rows: int = 400
    text: bool = False
    seed: int = 3407
    dry_run: bool = False


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Training and held-out rows of invented people with phone, card and e-mail address.",
        "python data/planted/make_rows.py --num_rows 400 --output planted",
        PlantedConfig,
    )
    parser.add_argument("--output", help="the folder of train.jsonl and heldout.jsonl")
    parser.add_argument("--num_rows", type=cli.positive_int, help="rows of each file")
    parser.add_argument("--text", action="store_true", help="plain text instead of chats")
    parser.add_argument("--seed", type=cli.seed, help="seed of the people and the rows")
    cli.add_dry_run(parser)
    return parser


def run(config: PlantedConfig) -> None:
    folder = Path(config.output)
    problems = Problems()
    check_writable(folder, problems, "--output")
    problems.check()
    if config.dry_run:
        print(f"would write {config.num_rows} rows each to {folder / 'train.jsonl'} and {folder / 'heldout.jsonl'}")
        return
    rows = people.chat_rows(people.make_people(2 * config.num_rows, config.seed), config.seed)
    if config.text:
        rows = [people.as_text(row) for row in rows]
    with locks.output_folder(folder) as target, target.publication() as files:
        files.write_jsonl(folder / "train.jsonl", rows[: config.num_rows])
        files.write_jsonl(folder / "heldout.jsonl", rows[config.num_rows :])
    print(f"{config.num_rows} rows each are in {folder / 'train.jsonl'} and {folder / 'heldout.jsonl'}")


def main(argv: list[str] | None = None) -> int:
    run(make_parser().parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(entry(main))
