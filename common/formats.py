"""Rows of a data file in any of its formats."""

import gzip
import os
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from common import rows as row_files
from common import strict_json, tables
from common.arrow_files import open_arrow, open_parquet
from common.problems import AnyPath, UserError
from common.rows import Faults, Row, TextFile
from common.sources import data_files

FORMATS = ".jsonl, .json, .csv, .tsv, .arrow or .parquet"


def read_rows(path: AnyPath, broken: dict[int, str] | None = None, columns: Sequence[str] = ()) -> list[Row]:
    """All rows of a .jsonl, .json, .csv or .tsv (gzipped or not), .arrow (stream or file format) or .parquet file, of
    the files that a pattern matches, or of a folder of `Dataset.save_to_disk`.

    A .json file is a list of objects, {"data": such a list}, or one object per line.
    Raises UserError naming the file (and the line of broken JSON) if it is missing, empty or unreadable. With a dict
    `broken`, an unusable line is not an error: its row is {}, and `broken[index]` says why. Values that JSON lacks are
    converted: NaN in an Arrow column becomes None, dates and decimals become text. `columns`:
    "NEW=OLD" for each field to rename.
    """
    rows: list[Row] = []
    for file in data_files(path):
        own: dict[int, str] | None = None if broken is None else {}
        rows_of_file = _read_file(file, own)
        if broken is not None and own:
            broken.update({len(rows) + index: reason for index, reason in own.items()})
        rows += rows_of_file
    return list(rename(path, rows, columns)) if columns else rows


def open_rows(path: AnyPath, columns: Sequence[str] = ()) -> Sequence[Row]:
    """`read_rows`, but the rows of large files (`rows.LARGE`, `rows.MANY`) stay on disk until they are asked for."""
    rows = row_files.join([_read_file(file, None, on_disk=True) for file in data_files(path)])
    return rename(path, rows, columns) if columns else rows


def rename(path: AnyPath, rows: Sequence[Row], columns: Sequence[str]) -> Sequence[Row]:
    """The rows with fields renamed, "NEW=OLD" each. UserError for other words, a field that no row has, and a new name
    that a row has already."""
    names: dict[str, str] = {}
    problems = []
    for text in columns:
        new, _, old = text.partition("=")
        if not new or not old or old in names or new in names.values():
            problems.append(f"--columns {text}: give NEW=OLD, each name once")
        elif not any(old in row for row in rows):
            problems.append(f"--columns {text}: no row of {path} has the field {old!r}")
        names[old] = new
    fresh = {new: old for old, new in names.items() if new not in names}
    taken = sorted({new for row in rows for new, old in fresh.items() if new in row and old in row})
    problems += [f"--columns: rows of {path} have a field {name!r} already; rename it too" for name in taken]
    if problems:
        raise UserError(*problems)
    return row_files.convert(rows, lambda row: {names.get(key, key): value for key, value in row.items()})


def _read_file(path: Path, broken: dict[int, str] | None, on_disk: bool = False) -> Sequence[Row]:
    """The rows of one file; a list, unless they may stay `on_disk` and are many."""
    if not os.path.isfile(path):
        what = (
            "is a directory, not a file" if path.is_dir() else "not a file" if os.path.exists(path) else "no such file"
        )
        hint = ", or build it from raw mail with data/enron/prepare.py" if path.name == "enron.jsonl" else ""
        raise UserError(f"{path}: {what}; give a {FORMATS} file{hint}")
    name = path.name.removesuffix(".gz")
    text = name.endswith((".json", ".jsonl", ".csv", ".tsv"))
    try:
        gzipped = text and is_gzip(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}); copy or download it again") from None
    rows: Sequence[Row] | None
    if text and on_disk and row_files.is_large(path, gzipped):
        rows = _map_text(path, name, gzipped)
    elif name.endswith(".json") and (listed := tables.read_json_list(path, gzipped)) is not None:
        rows = listed
    elif name.endswith((".jsonl", ".json")):
        rows = _read_jsonl(path, broken)
    elif name.endswith((".csv", ".tsv")):
        rows = tables.read_csv(path, "\t" if name.endswith(".tsv") else ",", gzipped)
    elif name.endswith(".arrow"):
        rows = open_arrow(path, on_disk)
    elif name.endswith(".parquet"):
        rows = open_parquet(path, on_disk)
    else:
        raise UserError(f"{path}: unknown extension; give a {FORMATS} file")
    if not rows:
        raise UserError(f"{path}: the file has no rows")
    return rows


def _map_text(path: Path, name: str, gzipped: bool) -> Sequence[Row]:
    """The rows of a large text file, which stay on disk, except those of a .json list, which is one document."""
    if name.endswith((".csv", ".tsv")):
        return tables.map_csv(path, "\t" if name.endswith(".tsv") else ",", gzipped)
    if name.endswith(".json") and not tables.is_json_lines(path, gzipped):
        listed = tables.read_json_list(path, gzipped)
        if listed is not None:
            return listed
    file, starts, faults = TextFile(path, gzipped), array("q"), Faults()

    def refuse(number: int, reason: str, advice: str, row: Row | None) -> None:
        faults.add(f"{path}:{number}: {reason}{advice}")

    for start, _ in _parsed(path, file.file, refuse):
        starts.append(start)
    faults.check()
    return row_files.jsonl(file, starts)


def _read_jsonl(path: Path, broken: dict[int, str] | None = None) -> list[Row]:
    rows: list[Row] = []
    faults = Faults()

    def refuse(number: int, reason: str, advice: str, row: Row | None) -> None:
        if broken is None:
            faults.add(f"{path}:{number}: {reason}{advice}")
        else:
            broken[len(rows)] = reason
            rows.append(row or {})

    try:
        with gzip.open(path, "rb") if is_gzip(path) else open(path, "rb") as file:
            for _, row in _parsed(path, file, refuse):
                rows.append(row)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); copy or download it again") from None
    faults.check()
    return rows


def _parsed(
    path: Path, file: Iterable[bytes], refuse: Callable[[int, str, str, Row | None], None]
) -> Iterator[tuple[int, Row]]:
    """(its first byte, row) of each line with an object. The others go to `refuse`: line number, reason, advice, and
    the row of a line whose text has a lone surrogate, to keep its row_id."""
    end = 0
    for number, line in enumerate(file, 1):
        start, end = end, end + len(line)
        if not line.strip():
            continue
        if number == 1 and line.startswith(strict_json.UTF16):
            raise UserError(f"{path}: UTF-16 text; save the file as UTF-8")
        try:
            row = strict_json.parse(line)
        except ValueError as error:
            item = getattr(error, "item", None)
            refuse(number, str(error), "; fix or remove the line", item if isinstance(item, dict) else None)
            continue
        if isinstance(row, dict):
            yield start, row
        else:
            what = "an array; write one object per line" if isinstance(row, list) else type(row).__name__
            refuse(number, f"expected a JSON object, not {what}", "", None)


def is_gzip(path: AnyPath) -> bool:
    """Whether a file starts with the gzip magic number, whatever its name."""
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"
