"""What must be in the files of ours that scripts read back: manifests, run.json, privacy.json, trained_rows.jsonl,
pool.jsonl."""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

import msgspec

from common.problems import AnyPath, UserError

Record = TypeVar("Record", bound=msgspec.Struct)
Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class Source(msgspec.Struct):
    path: str | None = None
    sha256: str | None = None


class Spent(msgspec.Struct):
    """Of a privacy budget. ε is null where the noise gives no bound."""

    epsilon: float | None
    delta: float | None
    unit: str


class SpentByGenerator(msgspec.Struct):
    epsilon: float | None = None
    delta: float | None = None


class Manifest(msgspec.Struct):
    """FILE.meta.json."""

    tag: str | None = None
    rows: Count | None = None
    split_start: Count | None = None
    sha256: str | None = None
    source: list[Source] | None = None
    privacy: SpentByGenerator | None = None
    settings: dict[str, Any] | None = None


class Input(msgspec.Struct):
    sha256: str | None


class RunRecord(msgspec.Struct):
    """run.json of a training run: what measuring scripts use of it."""

    args: dict[str, Any] = {}
    inputs: list[Input] = []


class TrainedHeader(msgspec.Struct):
    schema: int
    salt: str
    loss_on: str
    max_length: int


class TrainedLine(msgspec.Struct):
    """kept: [from, to), or a list of these."""

    row: Count
    sha256: str
    tokens: Count
    loss_tokens: Count
    cut: bool
    kept: list[int | Annotated[list[int], msgspec.Meta(min_length=2, max_length=2)]]

    def __post_init__(self) -> None:
        numbers = sum(isinstance(item, int) for item in self.kept)
        if numbers and (numbers, len(self.kept)) != (2, 2):
            raise ValueError("kept is neither [from, to) nor a list of these")


class PoolHeader(msgspec.Struct):
    """pool.jsonl of mia/shadow.py, its first line."""

    schema: int
    seed: Count
    settings: dict[str, Any]


class PoolLine(msgspec.Struct):
    row: Count
    sha256: str


def check(item: object, kind: type[Record], file: AnyPath, remedy: str) -> Record:
    """`item` as a record; UserError naming the field that is not what it must be. Unknown fields are ignored."""
    try:
        return msgspec.convert(item, kind)
    except msgspec.ValidationError as error:
        raise UserError(f"{file}: {reason(error)}; {remedy}") from None


def reason(error: msgspec.ValidationError) -> str:
    """'rows: expected int, got str', of msgspec's 'Expected `int`, got `str` - at `$.rows`'."""
    words, _, place = str(error).replace("`", "").partition(" - at $")
    words = words[:1].lower() + words[1:].replace(" | null", "")
    words = re.sub(r"object missing required field (\w+)", r"has no field '\1'", words)
    return f"{place.lstrip('.')}: {words}" if place else words
