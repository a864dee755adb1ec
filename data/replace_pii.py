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

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from common import cli, dataset, results
from data.scanner import MAX_ADDRESS, MAX_NAME

DEFAULT_NAME = "replaced_data.arrow"


@dataclass(frozen=True, kw_only=True)
class ReplaceConfig:
    """The flags of data/replace_pii.py."""

    input: str = "./data/enron.jsonl"
    output: str | None = None
    save_map: str | None = None
    strict: bool = False
    overwrite: bool = False
    seed: int = 3407
    dry_run: bool = False


def make_parser() -> argparse.ArgumentParser:
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


@dataclass
class Task:
    """The checked inputs and settings of a run."""

    source: Path
    output: Path
    save_map: Path | None
    rows: list[dict]  # well-formed ones, with row_id
    split_start: int | None
    n_broken: int
    settings: dict
    finished: bool


def destinations(config: ReplaceConfig) -> tuple[Path, Path, Path | None]:
    """(source, output, map file or None)."""
    source = dataset.default_dataset(config.input)
    output = Path(config.output) if config.output else source.with_name(DEFAULT_NAME)
    return source, output, Path(config.save_map) if config.save_map else None


def check(config: ReplaceConfig) -> Task:
    """Check the arguments and files; problems raise one UserError."""
    problems = cli.Problems()
    source, output, save_map = destinations(config)
    rows, broken = problems.absorb(dataset.read_with_broken, source, dataset.REQUIRED["enron"]) or ([], {})
    manifest = problems.absorb(dataset.read_manifest, source)
    cli.check_output_file(output, ".arrow", problems, [source])
    if save_map:
        cli.check_output_file(save_map, None, problems, [source, output], "--save_map")
    for index, row in enumerate(rows):
        if index not in broken:
            if not any(c.isalpha() for c in row["gt-name"]):
                broken[index] = "gt-name has no letters"
            elif len(row["gt-name"]) > MAX_NAME or len(row["gt-email"]) > MAX_ADDRESS:
                broken[index] = f"gt-name or gt-email is too long (at most {MAX_NAME} and {MAX_ADDRESS} characters)"
    lines = [f"{source}: row {index}: {reason}" for index, reason in sorted(broken.items())]
    problems.absorb(cli.report_broken, "rows", lines, len(lines), config.strict)
    start = None
    if rows:
        rows, _, start = dataset.split_source(rows, broken, manifest)
    columns = dict.fromkeys(column for row in rows for column in row)  # every Arrow row has the same columns
    kept = [{column: row.get(column) for column in columns} for index, row in enumerate(rows) if index not in broken]
    if rows and len(kept) < 3 and not (broken and config.strict):
        problems.add(
            f"{source}: {len(kept)} valid rows with gt-name, gt-email, prompt, continuation; at least 3 are needed"
        )
    problems.absorb(dataset.check_columns, source, kept)
    settings = None
    if not problems.lines:
        settings = dataset.settings_of(config, ("output", "save_map"), input=results.sha256(source))
    others = [("--save_map", save_map)] if save_map else []
    finished = problems.absorb(dataset.finished, [("--output", output)], settings, config.overwrite, others)
    problems.check()
    return Task(source, output, save_map, kept, start, len(broken), settings, finished)


def replace(rows: list[dict], people, scan) -> list[dict]:
    """The rows with every string replaced; gt-name is always replaced by its person's stand-in, whatever its form."""
    from data.people import parse_name
    from data.scanner import map_strings, strings

    replaced = []
    for row in rows:
        first, _, last = parse_name(row["gt-name"])
        person = people.of_name[first, last]
        texts = iter(scan.replace(strings(row)))
        new = map_strings(row, lambda _, texts=texts: next(texts))
        replaced.append(new | {"gt-name": person.rename(row["gt-name"])})
    return replaced


def run(config: ReplaceConfig) -> int:
    """Build the file. Return 0, or 1 if the leak check fails; then nothing is published."""
    _, output, save_map = destinations(config)
    with results.output_file(output, *([save_map] if save_map else []), dry_run=config.dry_run) as locked:
        task = check(config)
        if task.finished:
            dataset.say_finished(output, *([save_map] if save_map else []))
            return 0
        if config.dry_run:
            print(f"would replace names and addresses in {len(task.rows):,} rows of {task.source}, to {output}")
            return 0
        return build(config, task, locked)


def build(config: ReplaceConfig, task: Task, locked: results.Output) -> int:
    from data import replacement
    from data.leaks import leaks

    rows, output, broken = task.rows, task.output, task.n_broken
    with results.Run(output.parent / "run_replace_pii.json", config, inputs=[task.source], output=locked) as record:
        started = time.monotonic()
        people, scan = replacement.meet(rows, config.seed)
        replaced = replace(rows, people, scan)
        seconds = time.monotonic() - started
        with record.files.open(output, "wb") as file:
            dataset.write_arrow(file, replaced)
        leaked = leaks(dataset.read_arrow(record.files.hidden(output)), people)  # the written file, before publication
        total = time.monotonic() - started
        record["counts"] = counts = {
            "rows": len(rows),
            "broken rows left out": broken,
            "people": len(people.of_name),
            "addresses": len(people.of_address),
            "rows changed": sum(old != new for old, new in zip(rows, replaced)),
            "rows_per_s": round(len(rows) / seconds, 1),
            "rows_per_s_with_check": round(len(rows) / total, 1),
        }
        record["leaks"] = {kind: len(numbers) for kind, numbers in leaked.items()}
        if any(leaked.values()):
            record["error"] = "leak check failed"
            record.files.discard()
            report_leaks(leaked, output)
            return 1
        dataset.write_manifest(
            record.files,
            output,
            tag="replaced",
            script="data/replace_pii.py",
            argv=sys.argv,
            rows=len(rows),
            source=[(task.source, len(rows) + broken)],
            split_start=task.split_start,
            sampling={"seed": config.seed},
            settings=task.settings,
        )
        if task.save_map:
            write_map(record.files, task.save_map, people)
    for key in ("rows", "broken rows left out", "people", "addresses", "rows changed"):
        print(f"{counts[key]:>10,}  {key}")
    print("leak check: no old full name, address or pair")
    print(f"{counts['rows_per_s']:,.0f} rows/s, {counts['rows_per_s_with_check']:,.0f} with the leak check; {output}")
    return 0


def report_leaks(leaked: dict[str, list[int]], output: Path) -> None:
    """Print the counts and numbers of leaking output rows (from 0), never their text."""
    from data.leaks import shown

    for kind, numbers in leaked.items():
        if numbers:
            print(f"leak check: old {kind} in {len(numbers):,} rows: {shown(numbers)}", file=sys.stderr)
    print(f"leak check failed: {output} was not written", file=sys.stderr)


def write_map(files: results.Publication, path: Path, people) -> None:
    names = {name: person.rename(name) for person in people.of_name.values() for name in person.spellings}
    replacements = {"people": dict(sorted(names.items())), "addresses": dict(sorted(people.new_address.items()))}
    with files.open(path, permissions=0o600) as file:
        file.write(json.dumps(replacements, ensure_ascii=False, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    return run(make_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(cli.entry(main))
