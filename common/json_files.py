"""Our own JSON and JSON Lines files: reading them, and the text that is written."""

import json
import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

from common import rows, strict_json
from common.problems import AnyPath, UserError
from common.strict_json import plain

T = TypeVar("T")


def dumps(item: object) -> str:
    """One line of strict JSON; NaN raises (it is a bug), infinities become 'inf'."""
    return json.dumps(plain(item), ensure_ascii=False, allow_nan=False)


def pretty(item: object) -> str:
    """Strict JSON over several lines."""
    return json.dumps(plain(item), ensure_ascii=False, allow_nan=False, indent=1) + "\n"


@overload
def read_json(path: AnyPath, remedy: str) -> dict[str, Any]: ...
@overload
def read_json(path: AnyPath, remedy: str, kind: type[T]) -> T: ...
def read_json(path: AnyPath, remedy: str, kind: type[Any] = dict) -> Any:
    """The JSON object (or `kind`) in a file; UserError with `remedy` if it is damaged or something else."""
    try:
        if not os.path.isfile(path):  # reading a pipe might never end
            raise UserError(f"{path}: {'not a file' if os.path.exists(path) else 'no such file'}")
        item = strict_json.parse(Path(path).read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: {error}; {remedy}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); fix its permissions") from None
    if not isinstance(item, kind):
        what = "array" if kind is list else "object"
        raise UserError(f"{path}: expected a JSON {what}; {remedy}")
    return item


def read_jsonl(path: AnyPath) -> list[dict[str, Any]]:
    """Every line of one of our result files; ValueError for a broken line, OSError if it cannot be read."""
    with open(path, "rb") as file:
        return [strict_json.parse(line) for line in file if line.strip()]


def open_jsonl(path: AnyPath) -> Sequence[dict[str, Any]]:
    """`read_jsonl`, but the lines of a large file stay on disk."""
    if not rows.is_large(path, False):
        return read_jsonl(path)
    file, starts = rows.TextFile(Path(path), False), array("q")
    for start, line in rows.lines(file):
        if line.strip():
            strict_json.parse(line)
            starts.append(start)
    return rows.jsonl(file, starts)


def read_partial(file: AnyPath, settings: dict[str, Any], overwrite: bool) -> list[dict[str, Any]]:
    """Lines of an unfinished run's hidden file: first {'settings': …}, then one per finished piece.

    An incomplete last line is ignored. [] if there is no file. If it is damaged or its settings differ: [] with
    `overwrite`, else UserError.
    """
    file = Path(file)
    try:
        lines = (
            [dict(strict_json.parse(line)) for line in file.read_bytes().split(b"\n")[:-1]] if file.is_file() else []
        )
        differ = [key for key, value in plain(settings).items() if lines and lines[0]["settings"].get(key) != value]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if overwrite:
            return []
        raise UserError(
            f"--output: the unfinished run in {file} is damaged ({error!r}); give --overwrite to discard it"
        ) from None
    if differ and not overwrite:
        raise UserError(
            f"--output: {file} is from an unfinished run with a different {', '.join(differ)}; repeat its arguments "
            "to resume it, or give --overwrite to discard it"
        )
    return [] if differ else lines
