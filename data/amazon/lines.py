"""Lines of the raw files: which are broken and why, without their text."""

import gzip
import itertools
import json
import zlib
from pathlib import Path

from data.amazon.fields import READ_BY, user_key


def is_gzip(path: Path) -> bool:
    """Whether a file begins as gzip does, whatever its name."""
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def damage(path: Path) -> str | None:
    """What is wrong with a .gz file, after reading all of it, or None. Needed because DuckDB does not check the CRC."""
    try:
        with gzip.open(path, "rb") as file:
            while file.read(1 << 20):
                pass
    except (OSError, EOFError, zlib.error) as error:
        return str(error)
    return None


def broken_line(path: Path, wanted: list[int]) -> list[str]:
    """'broken line PATH:NUMBER: reason' for positions among the non-blank lines of a file."""
    lines: list[str] = []
    with (gzip.open if is_gzip(path) else open)(path, "rb") as file:
        filled = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        for position, (number, line) in enumerate(itertools.islice(filled, max(wanted) + 1)):
            if position in wanted:
                lines.append(f"broken line {path}:{number}: {reason_of(line)}")
    return lines


def reason_of(line: bytes) -> str:
    """Why a line is broken, without its text."""
    try:
        row = json.loads(line)
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
        return f"not JSON ({str(error).split(':')[0]})"
    if line.startswith(b"\xef\xbb\xbf"):
        return "starts with a byte order mark; save the file without one"
    for field, (_, kind) in READ_BY.items():
        value = row.get(field) if isinstance(row, dict) else None
        known = user_key(json.dumps(value)) is not None if field == "user_id" else isinstance(value, str)
        if value is not None and not known:
            return f"field '{field}' must be {kind}, not {type(value).__name__}"
    return "not one JSON object with the fields of this format"
