"""The canaries of canary/inject.py in a training file, as far as training needs them: where their secrets stand.

They are listed in the key, by default beside the file. Nothing is known here of a key that is kept elsewhere.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import formats, results
from common.problems import AnyPath, UserError


@dataclass(frozen=True)
class Inserted:
    """One canary. secret: [from, to) in its sentence; copies: (row of the file, index of the sentence's first character
    in the row's text) of each."""

    sentence: str
    secret: tuple[int, int]
    copies: tuple[tuple[int, int], ...]


def key_beside(file: AnyPath) -> Path:
    """Where the key is unless --key_file says otherwise."""
    path = Path(file)
    return path.with_name(f"{path.stem}_key.jsonl")


def read(file: AnyPath) -> list[Inserted] | None:
    """The canaries in a file; None if no key that belongs to it is beside it. UserError for a key that is damaged."""
    key = key_beside(file)
    if not (Path(file).is_file() and key.is_file()):
        return None
    header, *lines = formats.read_rows(key)
    if "training" not in header or header["training"] != results.sha256(file):
        return None
    found = []
    for number, line in enumerate(lines):
        try:
            if line["included"]:
                found.append(_inserted(line))
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{key}: canary {number} is damaged; create the key again, or remove it") from None
    return found


def _inserted(line: dict[str, Any]) -> Inserted:
    start = len(line["before"])
    starts = line.get("starts") or [len(line["context"])] * len(line["rows"])
    copies = tuple((int(row), int(at)) for row, at in zip(line["rows"], starts, strict=True))
    return Inserted(str(line["sentence"]), (start, start + len(line["secret"])), copies)
