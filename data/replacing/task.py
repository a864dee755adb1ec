"""What is to be replaced: the well-formed rows, checked before the search for people starts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import arrow_files, dataset, manifests, results
from common.problems import Problems, check_output_file, report_broken
from data.replacing.config import DEFAULT_NAME, ReplaceConfig
from data.scanner import MAX_ADDRESS, MAX_NAME

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """rows: the well-formed ones, with row_id; n_broken: how many others; settings: those of the manifest; finished:
    the output is there already."""

    source: Path
    output: Path
    save_map: Path | None
    rows: list[Row]
    split_start: int | None
    n_broken: int
    settings: dict[str, Any]
    finished: bool


def destinations(config: ReplaceConfig) -> tuple[Path, Path, Path | None]:
    """(source, output, map file or None)."""
    source = dataset.default_dataset(config.input)
    output = Path(config.output) if config.output else source.with_name(DEFAULT_NAME)
    return source, output, Path(config.save_map) if config.save_map else None


def check(config: ReplaceConfig) -> Task:
    """Check the arguments and files; problems raise one UserError."""
    problems = Problems()
    source, output, save_map = destinations(config)
    rows: list[Row]
    broken: dict[int, str]
    rows, broken = problems.absorb(dataset.read_with_broken, source, dataset.REQUIRED["enron"]) or ([], {})
    manifest = problems.absorb(manifests.read_manifest, source)
    check_output_file(output, ".arrow", problems, [source])
    if save_map:
        check_output_file(save_map, None, problems, [source, output], "--save_map")
    for index, row in enumerate(rows):
        if index not in broken:
            if not any(c.isalpha() for c in row["gt-name"]):
                broken[index] = "gt-name has no letters"
            elif len(row["gt-name"]) > MAX_NAME or len(row["gt-email"]) > MAX_ADDRESS:
                broken[index] = f"gt-name or gt-email is too long (at most {MAX_NAME} and {MAX_ADDRESS} characters)"
    lines = [f"{source}: row {index}: {reason}" for index, reason in sorted(broken.items())]
    problems.absorb(report_broken, "rows", lines, len(lines), config.strict)
    start: int | None = None
    if rows:
        rows, _, start = dataset.split_source(rows, broken, manifest)
    columns = dict.fromkeys(column for row in rows for column in row)  # every Arrow row has the same columns
    kept = [{column: row.get(column) for column in columns} for index, row in enumerate(rows) if index not in broken]
    if rows and len(kept) < 3 and not (broken and config.strict):
        problems.add(
            f"{source}: {len(kept)} valid rows with gt-name, gt-email, prompt, continuation; at least 3 are needed"
        )
    problems.absorb(arrow_files.check_columns, source, kept)
    settings: dict[str, Any] | None = None
    if not problems.lines:
        settings = manifests.settings_of(config, ("output", "save_map"), input=results.sha256(source))
    others = [("--save_map", save_map)] if save_map else []
    finished = problems.absorb(manifests.finished, [("--output", output)], settings, config.overwrite, others)
    problems.check()
    assert settings is not None
    return Task(source, output, save_map, kept, start, len(broken), settings, bool(finished))
