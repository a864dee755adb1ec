"""The key file of inserted canaries: format, reading and validation."""

from typing import Any, NotRequired, TypedDict, cast

from canary.canaries import FAMILIES, SECRETS, TOKEN_FAMILIES, Canary
from common import dataset, formats
from common.problems import UserError

SCHEMA = 1
KINDS = ("audit", "ladder", "share", "held_out")
HEADER_FIELDS = {"schema": int, "secret": str, "words": list, "privacy_unit": str}
FIELDS = {
    "id": int,
    "kind": str,
    "repetitions": int,
    "included": bool,
    "context": str,
    "sentence": str,
    "before": str,
    "secret": str,
    "parts": dict,
    "rows": list,
}
NOT_OURS = "is not what canary/inject.py writes; create the key again"


class Header(TypedDict):
    """The first line. words: vocabulary of text and random secrets, spare secrets of other families; training: SHA-256
    of the file with the canaries; whole: a chat template wrote the special tokens of the contexts; family: `template`
    if there is none; tokenizer: the model whose tokens the secrets are made of;
    generator, generator_weights (SHA-256) and temperature: of sampled canaries."""

    schema: int
    secret: str
    words: list[str]
    privacy_unit: str
    training: NotRequired[str | None]
    seed: NotRequired[int]
    canaries: NotRequired[int]
    whole: NotRequired[bool]
    family: NotRequired[str]
    tokenizer: NotRequired[str]
    generator: NotRequired[str]
    generator_weights: NotRequired[str | None]
    temperature: NotRequired[float]


class KeyLine(Canary):
    """A canary and its location. context: the text before it in its first row (or in the row it would go into); starts:
    index of its first character in the text of each row; rows: row indices in the training file."""

    id: int
    kind: str
    repetitions: int
    included: bool
    context: str
    starts: NotRequired[list[int]]
    rows: list[int]
    user_id: NotRequired[Any]


def read_key(path: str) -> tuple[Header, list[KeyLine]]:
    """(header, canaries) of a key file. UserError if it is not one."""
    header, *lines = formats.read_rows(path)
    check_header(path, header)
    for number, line in enumerate(lines):
        if missing := [field for field in FIELDS if line.get(field) is None]:
            raise UserError(f"{path}: canary {number}: no {', '.join(missing)}; create the key again")
        wrong = [field for field, kind in FIELDS.items() if type(line[field]) is not kind] or impossible(line)
        if wrong:
            raise UserError(f"{path}: canary {number}: its {', '.join(wrong)} {NOT_OURS}")
        if header.get("family") in TOKEN_FAMILIES and not line.get("tokens"):
            raise UserError(f"{path}: canary {number}: no tokens; create the key again")
    if len(lines) != header.get("canaries", len(lines)) or not lines:
        raise UserError(f"{path}: {len(lines)} of {header.get('canaries', 'its')} canaries; the file is truncated")
    return cast(Header, header), cast(list[KeyLine], lines)


def check_header(path: str, header: dict[str, Any]) -> None:
    """UserError unless this is a header as written by canary/inject.py."""
    if not set(HEADER_FIELDS) <= set(header):
        raise UserError(f"{path}: its first line is not a header; give the key file that canary/inject.py wrote")
    wrong = [name for name, kind in HEADER_FIELDS.items() if type(header[name]) is not kind]
    wrong += ["training"] if not isinstance(header.get("training"), str | None) else []
    wrong += ["whole"] if not isinstance(header.get("whole", False), bool) else []
    family = header.get("family", "template")
    wrong += ["family"] if family not in FAMILIES else []
    secrets = SECRETS if family == "template" else (family,)
    wrong += ["secret"] if not wrong and header["secret"] not in secrets else []
    words = header["words"]
    if not wrong and not (all(isinstance(word, str) for word in words) and len(set(words)) == len(words)):
        wrong = ["words"]
    if wrong or (header["secret"] in ("text", "random") and not words):
        raise UserError(f"{path}: the {', '.join(wrong or ['words'])} of its first line {NOT_OURS}")


def impossible(line: dict[str, Any]) -> list[str]:
    """Fields with the right type but a value that canary/inject.py never writes."""
    rows, starts, tokens = line["rows"], line.get("starts") or [], line.get("tokens", [])
    starts = (starts or rows) if isinstance(starts, list) else [None]
    faults = {
        "kind": line["kind"] not in KINDS,
        "repetitions": line["repetitions"] < 0,
        "rows": not all(map(dataset.is_count, rows)),
        "starts": len(starts) != len(rows) or not all(map(dataset.is_count, starts)),
        "tokens": not (isinstance(tokens, list) and all(map(dataset.is_count, tokens))),
        "parts": not all(isinstance(part, str) for part in line["parts"].values()),
        "secret": not line["sentence"].startswith(line["before"] + line["secret"]),
    }
    return [field for field, faulty in faults.items() if faulty]
