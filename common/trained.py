"""Which rows a run of run_peft.py was trained on, and which of their characters the loss saw.

run_peft.py writes trained_rows.jsonl (mode 0600) beside run.json before its first step: a header {"schema", "salt",
"loss_on", "max_length"}, then one line per training row. Rows that training left out (held out, before --train_rows,
above --max_rows_per_user) have no line. run.json's `trained` block sums it up and holds the file's SHA-256.

Texts are told by SHA-256(salt + text). The salt is empty but under --dp: there run.json may be published with the
model, and a plain hash of the private file would confirm a guessed copy of it. The salt stays in the side file, with
the owner of the data.
"""

import hashlib
import hmac
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from common import models, records, results
from common.cli import AnyPath, UserError

FILE = "trained_rows.jsonl"
SCHEMA = 1
REMEDY = "remove it if it is lost (what was trained on is then unknown)"


@dataclass(frozen=True)
class TrainedRow:
    """One training row. row: index in the input file; tokens: kept, EOS included; loss_tokens: those that the loss was
    taken on; cut: text was cut off at --max_length; kept: each [from, to) of the row text's characters that
    loss_tokens spell (in the file a single one stands by itself). A character that is only partly spelled does not
    count; the first token of a row is never predicted."""

    row: int
    sha256: str
    tokens: int
    loss_tokens: int
    cut: bool
    kept: tuple[tuple[int, int], ...]

    def covers(self, start: int, end: int) -> bool:
        """Was the loss taken on every character of text[start:end]?"""
        return self.loss_tokens > 0 and any(first <= start and end <= last for first, last in self.kept)

    def line(self) -> dict[str, Any]:
        """The row as a line of the file."""
        spans = [list(span) for span in self.kept] or [[0, 0]]
        return asdict(self) | {"kept": spans[0] if len(spans) == 1 else spans}

    @classmethod
    def of_line(cls, line: dict[str, Any]) -> "TrainedRow":
        """The row of a line of the file; KeyError or TypeError for another line."""
        spans = line["kept"] if line["kept"] and isinstance(line["kept"][0], list) else [line["kept"]]
        return cls(**line | {"kept": tuple(map(tuple, spans))})


@dataclass(frozen=True)
class TrainedRows:
    """What trained_rows.jsonl says. salt: hexadecimal, "" without --dp."""

    salt: str
    loss_on: str
    max_length: int
    rows: tuple[TrainedRow, ...]

    @cached_property
    def _by_hash(self) -> dict[str, list[TrainedRow]]:
        found: dict[str, list[TrainedRow]] = {}
        for row in self.rows:
            found.setdefault(row.sha256, []).append(row)
        return found

    def find(self, text: str) -> list[TrainedRow]:
        """The rows with exactly this text (dataset.row_text); several where it was repeated, [] where none was."""
        return self._by_hash.get(text_sha256(text, self.salt), [])


def text_sha256(text: str, salt: str = "") -> str:
    """SHA-256 of salt (hexadecimal) + text."""
    return hashlib.sha256(bytes.fromhex(salt) + text.encode("utf-8", "surrogatepass")).hexdigest()


def salted(sha256: str, salt: str) -> str:
    """A file's hash as run.json has it: itself without a salt, else its HMAC-SHA256 under the salt."""
    return hmac.digest(bytes.fromhex(salt), sha256.encode(), "sha256").hex() if salt else sha256


def write(run_folder: AnyPath, header: TrainedRows, tokens_cut: int, tokens_masked: int) -> dict[str, Any]:
    """Write trained_rows.jsonl; returns run.json's `trained` block.

    tokens_cut: text tokens beyond --max_length; tokens_masked: kept ones that were context only, beside each row's
    first one.
    """
    file, rows = Path(run_folder) / FILE, header.rows
    first = {"schema": SCHEMA, "salt": header.salt, "loss_on": header.loss_on, "max_length": header.max_length}
    results.write_jsonl(file, [first, *(row.line() for row in rows)], permissions=0o600)
    return {
        "rows": len(rows),
        "tokens": sum(row.tokens for row in rows),
        "loss_tokens": sum(row.loss_tokens for row in rows),
        "rows_cut": sum(row.cut for row in rows),
        "tokens_cut": tokens_cut,
        "rows_without_loss": sum(row.loss_tokens == 0 for row in rows),
        "tokens_masked": tokens_masked,
        "file": FILE,
        "sha256": results.sha256(file),
    }


def read(checkpoint: AnyPath) -> TrainedRows | None:
    """The trained_rows.jsonl of the run that a checkpoint belongs to; None without one (an older run, a merged model).

    UserError when it is damaged, or not the one that run.json describes.
    """
    return read_folder(Path(checkpoint).expanduser().absolute().parent)


def read_folder(run_folder: AnyPath) -> TrainedRows | None:
    """`read`, given the run's own directory."""
    file = Path(run_folder) / FILE
    if not file.is_file():
        return None
    digest = results.sha256(file)
    record_file = file.parent / "run.json"
    if record_file.is_file():
        block = results.read_json(record_file, "remove it if it is lost").get("trained")
        if isinstance(block, dict) and block.get("sha256") not in (None, digest):
            raise UserError(f"{file}: is not the list that run.json describes; {REMEDY}")
    return _parse(str(file.resolve()), digest)


@cache
def _parse(path: str, digest: str) -> TrainedRows:
    try:
        first, *lines = results.read_jsonl(path)
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); {REMEDY}") from None
    header = records.check(first, records.TrainedHeader, path, REMEDY)
    for number, line in enumerate(lines):
        records.check(line, records.TrainedLine, f"{path}: row {number}", REMEDY)
    if header.schema != SCHEMA:
        raise UserError(f"{path}: its schema is {header.schema}, not {SCHEMA}; {REMEDY}")
    try:
        bytes.fromhex(header.salt)
    except ValueError:
        raise UserError(f"{path}: its salt is not hexadecimal; {REMEDY}") from None
    rows = tuple(map(TrainedRow.of_line, lines))
    return TrainedRows(header.salt, header.loss_on, header.max_length, rows)


def trained_on(checkpoint: AnyPath, sha256: str) -> bool | None:
    """Was a checkpoint trained on the file with this SHA-256? None where nothing tells: no run.json beside it, or one
    of a --dp run that lost its trained_rows.jsonl (the salt is in it)."""
    record = models.training_record(checkpoint)
    return input_is(Path(checkpoint).expanduser().absolute().parent, record, sha256) if record else None


def input_is(run_folder: AnyPath, record: dict[str, Any], sha256: str) -> bool | None:
    """`trained_on`, given the run's directory and its run.json."""
    if not record.get("inputs"):
        return None
    first, salt = record["inputs"][0], ""
    if first.get("salted"):
        rows = read_folder(run_folder)
        if rows is None or not rows.salt:
            return None
        salt = rows.salt
    return bool(salted(sha256, salt) == first["sha256"])
