"""Reading tables and lists from other tools: .csv, .tsv, and .json files that contain one list of rows."""

from __future__ import annotations

import csv
import gzip
import io
import sys
import zlib
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from common import rows, strict_json
from common.problems import UserError

COUNTS = ("row_id",)  # columns that are integers in every other format


def read_csv(path: Path, delimiter: str, gzipped: bool) -> list[dict[str, Any]]:
    """The rows of a table with a header line; every value is text except `row_id`, and an empty field is empty text.

    UserError for a file that is not UTF-8, a header with duplicate or unnamed columns, and (with its number) a line
    with more or fewer fields than the header.
    """
    csv.field_size_limit(sys.maxsize)
    raw = _content(path, gzipped)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}); save the file as UTF-8") from None
    if "\0" in text:
        raise UserError(f"{path}: contains a NUL character; save the file as text")
    lines = _reader(io.StringIO(text, newline=""), delimiter)
    try:
        header = _header(path, lines)
        return list(_rows(path, header, lines))
    except csv.Error as error:
        raise UserError(f"{path}:{lines.line_num}: not a table ({error}); fix the line") from None


def map_csv(path: Path, delimiter: str, gzipped: bool) -> rows.Lines:
    """`read_csv` of a large file, whose rows stay on disk. The same checks and values."""
    csv.field_size_limit(sys.maxsize)
    file, starts, end = rows.TextFile(path, gzipped), array("q"), 0

    def text() -> Iterator[str]:
        nonlocal end
        for after, line in rows.decoded(file):
            end = after
            yield line

    lines = _reader(text(), delimiter)
    try:
        header = _header(path, lines)
        start = end
        for values in lines:
            if values:
                _row(path, lines.line_num, header, values)
                starts.append(start)
            start = end
    except csv.Error as error:
        raise UserError(f"{path}:{lines.line_num}: not a table ({error}); fix the line") from None

    def parse(content: bytes) -> dict[str, Any]:
        return next(_rows(path, header, _reader(io.StringIO(content.decode(), newline=""), delimiter)))

    return rows.Lines(file, starts, parse)


def _reader(text: Iterable[str], delimiter: str) -> Any:
    return csv.reader(text, delimiter=delimiter, strict=True)


def _header(path: Path, lines: Any) -> list[str]:
    header: list[str] = next(lines, [])
    if len(set(header)) < len(header) or not all(header):
        raise UserError(f"{path}:1: the header has a duplicate or unnamed column; fix it")
    return header


def _content(path: Path, gzipped: bool) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if gzipped else raw
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); copy or download it again") from None


def _rows(path: Path, header: list[str], lines: Any) -> Iterator[dict[str, Any]]:
    for values in lines:
        if values:
            yield _row(path, lines.line_num, header, values)


def _row(path: Path, line: int, header: list[str], values: list[str]) -> dict[str, Any]:
    if len(values) != len(header):
        raise UserError(f"{path}:{line}: {len(values)} fields, the header has {len(header)}; fix the line")
    row: dict[str, Any] = dict(zip(header, values))
    for name in COUNTS:
        if row.get(name, "").isascii() and row.get(name, "").isdigit():
            row[name] = int(row[name])
    return row


def is_json_lines(path: Path, gzipped: bool) -> bool:
    """Whether a .json file has one object per line, judged by its first line and whether more follow."""
    with gzip.open(path, "rb") if gzipped else open(path, "rb") as file:
        first = next((line for line in file if line.strip(b"\xef\xbb\xbf \t\r\n")), b"")
        try:
            return isinstance(strict_json.parse(first), dict) and any(line.strip() for line in file)
        except ValueError:
            return False


def read_json_list(path: Path, gzipped: bool) -> list[dict[str, Any]] | None:
    """The rows of a JSON document that is a list, or an object with a list as `data`; None if it is neither.

    UserError naming the first item that is not an object.
    """
    raw = _content(path, gzipped)
    if raw.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] not in (b"[", b"{"):
        return None
    try:
        document = strict_json.parse(raw)
    except ValueError as error:
        if raw.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":  # not JSON lines either
            raise UserError(f"{path}: not a JSON list ({error})") from None
        return None
    items = document.get("data") if isinstance(document, dict) else document
    if not isinstance(items, list):
        return None
    for number, item in enumerate(items):
        if not isinstance(item, dict):
            raise UserError(f"{path}: item {number} is a {type(item).__name__}, not an object")
    return items
