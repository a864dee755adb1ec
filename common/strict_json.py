"""Strict JSON: parsing of untrusted text, with one-line errors that never quote its content; values for writing."""

import json
import math
import re
from pathlib import Path
from typing import Any, NoReturn

MAX_DEPTH = 100  # of nested lists and objects; our own files stay far below it
UTF16 = (b"\xff\xfe", b"\xfe\xff")  # byte order marks
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class HalfPair(ValueError):
    """A text with a lone surrogate, which UTF-8 cannot encode; `item` is the parsed value."""

    def __init__(self, item: object) -> None:
        super().__init__("half of a surrogate pair in its text")
        self.item = item


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    item = dict(pairs)
    if len(item) < len(pairs):
        seen: set[str] = set()
        for double, _ in pairs:
            if double in seen:
                break
            seen.add(double)
        raise ValueError(f"the field {double[:40]!r} is given twice")
    return item


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON; write a number or null")


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError("a number too large for a float")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)


def parse(text: str | bytes) -> Any:
    """The value of one JSON document in UTF-8 (a byte order mark is skipped).

    Raises ValueError, one line without any value, also for input that json.loads accepts or rejects with a different
    exception: duplicate fields, NaN and infinities, integers of more than 4,300 digits, nesting deeper than MAX_DEPTH,
    lone surrogates.
    """
    if isinstance(text, bytes):
        if text.startswith(UTF16):
            raise ValueError("UTF-16 text; save the file as UTF-8")
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 (byte {error.start}); save the file as UTF-8") from None
    try:
        item = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        advice = "; its lines end in CR alone" if re.search(r"\}\s*\r\s*\{", text) else ""
        raise ValueError(f"not JSON ({error}){advice}") from None
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} deep") from None
    except ValueError as error:
        reason = "an integer of more than 4,300 digits" if "integer string conversion" in str(error) else str(error)
        raise ValueError(f"not JSON ({reason})") from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(item) > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    if SURROGATE.search(text) and not is_unicode(item):
        raise HalfPair(item)
    return item


def is_unicode(item: object) -> bool:
    """Whether every text in a JSON value can be encoded as UTF-8, i.e. has no lone surrogate."""
    try:
        json.dumps(item, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _depth(item: object) -> int:
    depth, level = 0, [item]
    while level:
        level = [
            inner
            for outer in level
            if isinstance(outer, (list, dict))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        depth += 1
    return depth


def plain(value: object) -> Any:
    """`value` for strict JSON: paths to strings, infinities to 'inf'/'-inf', tuples to lists. NaN stays (and fails)."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if isinstance(value, Path):
        return str(value)
    return value
