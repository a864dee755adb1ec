"""Which rows a run of run_peft.py trained on, and on which of their characters the loss was taken.

run_peft.py writes trained_rows.jsonl (mode 0600) next to run.json before its first step: a header {"schema", "salt",
"loss_on", "max_length"}, then one line per training row. Rows not used in training (held out, before --train_rows,
above --max_rows_per_user) have no line. run.json's `trained` block summarises the file and holds its SHA-256.

Texts are identified by SHA-256(salt + text). The salt is empty except under --dp: there run.json may be published with
the model, and a plain hash of the private file would confirm a guessed copy of it. The salt stays in the side file,
with the owner of the data.
"""

import hashlib
import hmac
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import json_files, provenance, publication, records, results
from common.problems import AnyPath, UserError
from common.rows import Lazy

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

FILE = "trained_rows.jsonl"
SCHEMA = 1
REMEDY = "restore it, or remove it (the training rows are then unknown)"


@dataclass(frozen=True)
class TrainedRow:
    """One training row. row: index in the input file; tokens: number kept, EOS included; loss_tokens: number that the
    loss was taken on; cut: the text was truncated at --max_length; kept: [from, to) spans of the row text's characters
    covered by loss_tokens (the file stores a single span unnested). A partly covered character does not count; the
    first token of a row is never predicted."""

    row: int
    sha256: str
    tokens: int
    loss_tokens: int
    cut: bool
    kept: tuple[tuple[int, int], ...]

    def covers(self, start: int, end: int) -> bool:
        """Whether the loss was taken on every character of text[start:end]."""
        return self.loss_tokens > 0 and any(first <= start and end <= last for first, last in self.kept)

    def line(self) -> dict[str, Any]:
        """The row as a line of the file."""
        spans = [list(span) for span in self.kept] or [[0, 0]]
        return asdict(self) | {"kept": spans[0] if len(spans) == 1 else spans}

    @classmethod
    def of_line(cls, line: dict[str, Any]) -> "TrainedRow":
        """The row from a line of the file; KeyError or TypeError for any other line."""
        spans = line["kept"] if line["kept"] and isinstance(line["kept"][0], list) else [line["kept"]]
        return cls(**line | {"kept": tuple(map(tuple, spans))})


@dataclass(frozen=True)
class Header:
    """The first line of trained_rows.jsonl. salt: hexadecimal, "" without --dp."""

    salt: str
    loss_on: str
    max_length: int


@dataclass(frozen=True)
class TrainedRows(Header):
    """The content of trained_rows.jsonl; the rows of a large file stay on disk."""

    rows: Sequence[TrainedRow]

    @cached_property
    def _by_hash(self) -> "tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]":
        """The first 8 bytes of each row's hash, sorted, and the place of each in `rows`."""
        import numpy as np

        keys = np.fromiter((_key(row.sha256) for row in self.rows), np.uint64, len(self.rows))
        order = np.argsort(keys, kind="stable")
        return keys[order], order

    def find(self, text: str) -> list[TrainedRow]:
        """The rows with exactly this text (dataset.row_text): several if it was repeated, [] if there is none."""
        import numpy as np

        digest, (keys, order) = text_sha256(text, self.salt), self._by_hash
        key = np.uint64(_key(digest))
        places = order[np.searchsorted(keys, key, "left") : np.searchsorted(keys, key, "right")]
        return [row for row in (self.rows[int(place)] for place in places) if row.sha256 == digest]


def _key(sha256: str) -> int:
    return int(sha256[:16] or "0", 16)


def text_sha256(text: str, salt: str = "") -> str:
    """SHA-256 of salt (hexadecimal) + text."""
    return hashlib.sha256(bytes.fromhex(salt) + text.encode("utf-8", "surrogatepass")).hexdigest()


def salted(sha256: str, salt: str) -> str:
    """A file's hash as stored in run.json: unchanged without a salt, else its HMAC-SHA256 keyed with the salt."""
    return hmac.digest(bytes.fromhex(salt), sha256.encode(), "sha256").hex() if salt else sha256


def write(run_folder: AnyPath, header: Header, rows: Iterable[TrainedRow]) -> dict[str, Any]:
    """Write trained_rows.jsonl; returns run.json's `trained` block, where the caller fills in tokens_cut (text tokens
    beyond --max_length) and tokens_masked (kept tokens used only as context, not counting each row's first)."""
    file = Path(run_folder) / FILE
    names = ("rows", "tokens", "loss_tokens", "rows_cut", "tokens_cut", "rows_without_loss", "tokens_masked")
    block: dict[str, Any] = dict.fromkeys(names, 0)

    def lines() -> Iterator[dict[str, Any]]:
        yield {"schema": SCHEMA} | asdict(header)
        for row in rows:
            block["rows"] += 1
            block["tokens"] += row.tokens
            block["loss_tokens"] += row.loss_tokens
            block["rows_cut"] += row.cut
            block["rows_without_loss"] += row.loss_tokens == 0
            yield row.line()

    publication.write_jsonl(file, lines(), permissions=0o600)
    return block | {"file": FILE, "sha256": results.sha256(file)}


def read(checkpoint: AnyPath) -> TrainedRows | None:
    """The trained_rows.jsonl of a checkpoint's run; None without one (an older run, a merged model).

    UserError if it is damaged or does not match run.json.
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
        block = json_files.read_json(record_file, "remove it if it is lost").get("trained")
        if isinstance(block, dict) and block.get("sha256") not in (None, digest):
            raise UserError(f"{file}: does not match run.json; {REMEDY}")
    return _parse(str(file.resolve()), digest)


@cache
def _parse(path: str, digest: str) -> TrainedRows:
    try:
        lines = json_files.open_jsonl(path)
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); {REMEDY}") from None
    if not lines:
        raise UserError(f"{path}: damaged (empty); {REMEDY}")
    header = records.check(lines[0], records.TrainedHeader, path, REMEDY)
    for number, line in enumerate(lines[1:]):
        records.check(line, records.TrainedLine, f"{path}: row {number}", REMEDY)
    if header.schema != SCHEMA:
        raise UserError(f"{path}: its schema is {header.schema}, not {SCHEMA}; {REMEDY}")
    try:
        bytes.fromhex(header.salt)
    except ValueError:
        raise UserError(f"{path}: its salt is not hexadecimal; {REMEDY}") from None
    rows: Sequence[TrainedRow]
    if isinstance(lines, list):
        rows = tuple(map(TrainedRow.of_line, lines[1:]))
    else:
        rows = Lazy(lambda place: TrainedRow.of_line(lines[place + 1]), len(lines) - 1)
    return TrainedRows(header.salt, header.loss_on, header.max_length, rows)


def trained_on(checkpoint: AnyPath, sha256: str) -> bool | None:
    """Whether a checkpoint was trained on the file with this SHA-256. None if unknown: it has no run.json, or the
    run.json is from a --dp run whose trained_rows.jsonl (which holds the salt) is lost."""
    record = provenance.training_record(checkpoint)
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
