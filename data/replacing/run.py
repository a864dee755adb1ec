"""The run of data/replace_pii.py: replace, check what was written for leaks, then publish it."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from common import arrow_files, locks, manifests, results
from common.publication import Publication
from data.leaks import leaks, shown
from data.people import People, parse_name
from data.replacement import Scan, meet
from data.replacing.config import ReplaceConfig
from data.replacing.task import Row, Task, check, destinations
from data.scanner import map_strings, strings


def run(config: ReplaceConfig) -> int:
    """Build the file. Return 0, or 1 if the leak check fails; then nothing is published."""
    _, output, save_map = destinations(config)
    with locks.output_file(output, *([save_map] if save_map else []), dry_run=config.dry_run) as target:
        task = check(config)
        if task.finished:
            manifests.say_finished(output, *([save_map] if save_map else []))
            return 0
        if config.dry_run:
            print(f"would replace names and addresses in {len(task.rows):,} rows of {task.source}, to {output}")
            return 0
        return build(config, task, target)


def build(config: ReplaceConfig, task: Task, target: locks.Output) -> int:
    """Replace, check, publish; the exit status."""
    rows, output, broken = task.rows, task.output, task.n_broken
    with results.Run(output.parent / "run_replace_pii.json", config, inputs=[task.source], output=target) as record:
        started = time.monotonic()
        people, scan = meet(rows, config.seed)
        replaced = replace(rows, people, scan)
        seconds = time.monotonic() - started
        with record.files.open(output, "wb") as file:
            arrow_files.write_arrow(file, replaced)
        leaked = leaks(
            arrow_files.read_arrow(record.files.hidden(output)), people
        )  # the written file, before publication
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
        manifests.write_manifest(
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
    print(f"{counts['rows_per_s']:,.0f} rows/s, {counts['rows_per_s_with_check']:,.0f} with the leak check")
    print(f"rows are in {output}")
    return 0


def replace(rows: list[Row], people: People, scan: Scan) -> list[Row]:
    """The rows with every string replaced; gt-name is always replaced by its person's stand-in, whatever its form."""
    replaced: list[Row] = []
    for row in rows:
        parts = parse_name(row["gt-name"])
        assert parts  # it has a letter: see `check`
        person = people.of_name[parts[0], parts[2]]
        new = with_strings(row, iter(scan.replace(strings(row))))
        replaced.append(new | {"gt-name": person.rename(row["gt-name"])})
    return replaced


def with_strings(row: Row, texts: Iterator[str]) -> Row:
    """The row with `texts` in the places of its strings."""
    new: Row = map_strings(row, lambda _: next(texts))
    return new


def report_leaks(leaked: dict[str, list[int]], output: Path) -> None:
    """Print the counts and numbers of leaking output rows (from 0), never their text."""
    for kind, numbers in leaked.items():
        if numbers:
            print(f"leak check: old {kind} in {len(numbers):,} rows: {shown(numbers)}", file=sys.stderr)
    print(f"leak check failed: {output} was not written", file=sys.stderr)


def write_map(files: Publication, path: Path, people: People) -> None:
    """The map from old to new, which reverses the replacement."""
    names = {name: person.rename(name) for person in people.of_name.values() for name in person.spellings}
    replacements = {"people": dict(sorted(names.items())), "addresses": dict(sorted(people.new_address.items()))}
    with files.open(path, permissions=0o600) as file:
        file.write(json.dumps(replacements, ensure_ascii=False, indent=1) + "\n")
