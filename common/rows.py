"""Rows of large files, which stay on disk: a few bytes per row are held in memory, and a row is parsed when asked for.

`Lines` and `Table` (text and Arrow) are sequences of dicts like the lists that small files are read into. A file that
changes while it is read is refused. Text is read with `pread`, which a truncated file cannot kill (SIGBUS); Arrow is
memory-mapped, and its pages are the page cache's.
"""

from __future__ import annotations

import bisect
import codecs
import gzip
import json
import mmap
import os
import shutil
import tempfile
import weakref
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar, overload

from common.problems import AnyPath, UserError

if TYPE_CHECKING:
    import pyarrow as pa

Row = dict[str, Any]
T = TypeVar("T")

LARGE = 64 << 20  # bytes: smaller files are read into lists
MANY = 100_000  # rows: the same, of columnar files
RATIO = 8  # of a gzipped file to its text, at most: one of LARGE / RATIO bytes counts as large
BLOCK = 1000  # rows of a table that are converted together when they are read in order
SHOWN = 5  # problems of one kind that are listed individually


class Faults:
    """The first problems of one kind, and how many there are: millions of bad lines take no memory."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.n = 0

    def add(self, line: str) -> None:
        self.n += 1
        if len(self.lines) < SHOWN:
            self.lines.append(line)

    def check(self) -> None:
        """UserError with the first few lines, if there are any."""
        more = self.n - len(self.lines)
        if self.n:
            raise UserError(
                *self.lines, *([f"{self.lines[0].split(':')[0]}: … and {more} more like these"] * (more > 0))
            )


class Lazy(Sequence[T]):
    """A sequence of `n` items, each made when asked for by `make(position)`; a slice is lazy too."""

    def __init__(self, make: Callable[[int], T], n: int) -> None:
        self._make, self._n = make, n

    def __len__(self) -> int:
        return self._n

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[T]: ...
    def __getitem__(self, place: int | slice) -> T | Sequence[T]:
        if isinstance(place, slice):
            return select(self, range(self._n)[place])
        index = place + self._n if place < 0 else place
        if not 0 <= index < self._n:
            raise IndexError(f"item {place} of {self._n}")
        return self._make(index)

    def __iter__(self) -> Iterator[T]:
        for index in range(self._n):
            yield self._make(index)


def select(items: Sequence[T], places: Sequence[int]) -> Sequence[T]:
    """The items at these places: a list of a list's, otherwise lazy."""
    if isinstance(items, list):
        return [items[place] for place in places]
    return Lazy(lambda index: items[places[index]], len(places))


def convert(rows: Sequence[Row], change: Callable[[Row], Row]) -> Sequence[Row]:
    """The rows, each changed when asked for (of a list: at once)."""
    if isinstance(rows, list):
        return [change(row) for row in rows]
    return Lazy(lambda index: change(rows[index]), len(rows))


def join(parts: Sequence[Sequence[Row]]) -> Sequence[Row]:
    """The rows of several files, one after another."""
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(part, list) for part in parts):
        return [row for part in parts for row in part]
    ends = list(accumulate(map(len, parts)))

    def row(index: int) -> Row:
        part = bisect.bisect_right(ends, index)
        return parts[part][index - (ends[part] - len(parts[part]))]

    return Lazy(row, ends[-1])


class TextFile:
    """A text file that is read in pieces. `path` is for messages; a gzipped file is unpacked into a temporary file."""

    def __init__(self, path: Path, gzipped: bool) -> None:
        self.path = path
        self.file: IO[bytes] = unpacked(path) if gzipped else open(path, "rb")  # noqa: SIM115 (closed with self)
        weakref.finalize(self, self.file.close)
        self.state = self._state()

    def _state(self) -> tuple[int, int]:
        status = os.fstat(self.file.fileno())
        return status.st_size, status.st_mtime_ns

    @property
    def size(self) -> int:
        return self.state[0]

    def read(self, start: int, end: int) -> bytes:
        """The bytes from `start` to `end`; UserError if the file has changed since it was opened."""
        content = os.pread(self.file.fileno(), end - start, start)
        if self._state() != self.state:
            raise UserError(f"{self.path}: changed while it was read; start again once it is complete")
        return content


def unpacked(path: Path) -> IO[bytes]:
    """An unnamed temporary file with the content of a gzipped one. UserError if it is damaged or the disk is full."""
    file = tempfile.TemporaryFile(prefix="rows-")  # noqa: SIM115 (returned)
    try:
        with gzip.open(path, "rb") as packed:
            shutil.copyfileobj(packed, file, 1 << 20)
        file.seek(0)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        file.close()
        raise UserError(f"{path}: cannot be read ({error}); copy or download it again") from None
    except OSError as error:
        file.close()
        raise UserError(f"{path}: cannot be unpacked into {tempfile.gettempdir()} ({error}); set TMPDIR") from None
    return file


def lines(file: TextFile) -> Iterator[tuple[int, bytes]]:
    """(first byte, content) of each line."""
    end = 0
    file.file.seek(0)
    for line in file.file:
        start, end = end, end + len(line)
        yield start, line


class Lines(Lazy[Row]):
    """Rows of a text file, by the byte where each starts; `parse` makes a row of its bytes."""

    def __init__(self, file: TextFile, starts: array[int], parse: Callable[[bytes], Row]) -> None:
        self.file, self.starts, self.parse = file, starts, parse
        super().__init__(self._row, len(starts))

    def _row(self, index: int) -> Row:
        end = self.starts[index + 1] if index + 1 < len(self.starts) else self.file.size
        return self.parse(self.file.read(self.starts[index], end))


def jsonl(file: TextFile, starts: array[int]) -> Lines:
    """Rows of a .jsonl file whose lines `strict_json.parse` has accepted: json.loads gives the same values, faster."""
    return Lines(file, starts, json.loads)


def decoded(file: TextFile) -> Iterator[tuple[int, str]]:
    """(byte after it, text) of each line with its end (LF, CR or CRLF); UserError if it is not UTF-8, or has a NUL."""
    file.file.seek(0)
    start = 3 if file.file.read(3) == codecs.BOM_UTF8 else 0
    file.file.seek(start)
    rest = b""
    while True:
        block = file.file.read(max(1 << 20, len(rest)))
        last = not block
        # of \r\n, the \n may be in the next block: keep an unfinished line, and one that ends in \r
        lines = (rest + block).splitlines(keepends=True)
        rest = b"" if last or not lines or lines[-1].endswith(b"\n") else lines.pop()
        for line in lines:
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                place = start + error.start
                raise UserError(f"{file.path}: not UTF-8 (byte {place}); save the file as UTF-8") from None
            if "\0" in text:
                raise UserError(f"{file.path}: contains a NUL character; save the file as text")
            start += len(line)
            yield start, text
        if last:
            return


class Table(Lazy[Row]):
    """Rows of Arrow batches that lie in a mapped file; `convert` makes rows of a few of them."""

    def __init__(self, batches: Sequence[pa.RecordBatch], to_rows: Callable[[pa.Table], list[Row]]) -> None:
        self.batches = [batch for batch in batches if batch.num_rows]
        self.ends = list(accumulate(batch.num_rows for batch in self.batches))
        self.to_rows = to_rows
        self.block: tuple[int, list[Row]] = (0, [])  # the first row of those converted last, and they
        self.last = -1  # the row asked for last
        super().__init__(self._row, self.ends[-1] if self.ends else 0)

    def _row(self, index: int) -> Row:
        import pyarrow as pa

        first, rows = self.block
        if not first <= index < first + len(rows):
            part = bisect.bisect_right(self.ends, index)
            batch = self.batches[part]
            start = index - (self.ends[part] - batch.num_rows)
            piece = batch.slice(start, BLOCK if index == self.last + 1 else 1)
            first, rows = self.block = index, self.to_rows(pa.Table.from_batches([piece]))
        self.last = index
        return rows[index - first]


def map_batches(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> list[pa.RecordBatch]:
    """Batches copied into an unnamed temporary file and mapped from there: rows of a compressed file."""
    import pyarrow as pa

    with tempfile.TemporaryFile(prefix="rows-") as file:
        try:
            with pa.ipc.new_stream(file, schema) as writer:
                for batch in batches:
                    writer.write_batch(batch)
            file.flush()
        except OSError as error:
            if isinstance(error, pa.ArrowException) or error.errno is None:
                raise
            raise UserError(f"{tempfile.gettempdir()}: cannot hold the rows ({error}); set TMPDIR") from None
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    return list(pa.ipc.open_stream(pa.BufferReader(pa.py_buffer(mapped))))


def is_large(path: AnyPath, gzipped: bool) -> bool:
    """Whether the rows of a text file are left on disk."""
    return os.path.getsize(path) * (RATIO if gzipped else 1) > LARGE
