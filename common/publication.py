"""Files that are complete or absent.

`atomic`, `atomic_folder`, `write_json` and `write_jsonl` publish one file or folder at once; a `Publication` several
together; `temporary_folder` is for scratch files. All modes are `permissions & ~umask`.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from common.json_files import dumps, pretty, read_json
from common.problems import AnyPath, UserError

LEFTOVER = re.compile(r"\.(?P<name>.+)\.[0-9a-z_]{8}\.(tmp|old)", re.DOTALL)  # our hidden names
NO_ROOM = 1 << 16  # with fewer free bytes, a library's error is blamed on the full disk
_held: set[int] = set()  # descriptors whose lock marks a temporary as in use


def _forget_held() -> None:
    """In a forked child: a temporary is in use until the run that made it ends, even if its workers live on."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget_held)


def _hold(descriptor: int) -> int | None:
    """Mark an open temporary as in use; a descriptor for `_let_go`, None if `remove_leftovers` was faster."""
    descriptor = os.dup(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:  # no locks on this file system: its temporaries are never treated as leftovers
        pass
    _held.add(descriptor)
    return descriptor


def _let_go(descriptor: int) -> None:
    if descriptor in _held:
        _held.remove(descriptor)
        os.close(descriptor)


def _make_hidden(path: Path, make: Callable[[Path], int]) -> tuple[Path, int, int]:
    """(hidden name next to `path`, descriptor that `make(name)` opened, descriptor that holds it)."""
    while True:
        hidden = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        descriptor = make(hidden)
        held = _hold(descriptor)
        if held is not None and hidden.exists():
            return hidden, descriptor, held
        os.close(descriptor)  # removed as a leftover just before it was locked
        if held is not None:
            _let_go(held)


def _make_hidden_folder(path: Path, permissions: int) -> tuple[Path, int]:
    """(hidden new folder next to `path`, descriptor that holds it)."""

    def make(hidden: Path) -> int:
        os.mkdir(hidden, permissions)
        return os.open(hidden, os.O_RDONLY)

    path.parent.mkdir(parents=True, exist_ok=True)
    hidden, descriptor, held = _make_hidden(path, make)
    os.close(descriptor)
    return hidden, held


def _in_use(path: Path) -> bool:
    """Whether a process holds a temporary; also True if the file system cannot tell."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def remove_leftovers(folder: AnyPath) -> None:
    """Remove the temporaries of dead runs in a folder (not below it); restore a folder that was being replaced."""
    folder = Path(folder)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = LEFTOVER.fullmatch(path.name)
        if not match or path.is_symlink() or _in_use(path):
            continue
        with contextlib.suppress(FileNotFoundError):  # another rank was faster
            if path.suffix == ".old" and not (folder / match["name"]).exists():
                os.rename(path, folder / match["name"])
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                os.unlink(path)


@contextlib.contextmanager
def atomic(path: AnyPath, mode: str = "w", permissions: int = 0o644) -> Iterator[IO[Any]]:
    """Open a temporary file next to `path`; on success fsync and rename it to `path`, else remove it."""
    with Publication() as files, files.open(path, mode, permissions) as file:
        yield file


@contextlib.contextmanager
def naming(path: AnyPath) -> Iterator[None]:
    """Make an OSError without a file name refer to `path`, and turn a library's error on a full disk into one."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    except UserError:
        raise
    except Exception as error:
        with contextlib.suppress(FileNotFoundError):
            full = os.strerror(errno.ENOSPC) in str(error)  # safetensors' own error, DuckDB's
            if full or shutil.disk_usage(path if os.path.isdir(path) else Path(path).parent).free < NO_ROOM:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


def csv_rows(rows: Iterable[Iterable[object]]) -> list[list[object]]:
    """`rows` for csv.writer: texts that a spreadsheet would evaluate get a leading ', numbers stay as they are."""

    def cell(value: object) -> object:
        return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value

    return [[cell(value) for value in row] for row in rows]


def sync_folder(folder: AnyPath) -> None:
    """fsync a directory, so that a rename in it survives a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def temporary_folder(parent: AnyPath, name: str) -> Iterator[Path]:
    """Yield a new hidden directory in `parent` (mode 0700), removed at the end (after a kill, by the next run)."""
    path, held = _make_hidden_folder(Path(parent) / name, 0o700)
    try:
        with naming(path.parent):
            yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        _let_go(held)


@contextlib.contextmanager
def atomic_folder(folder: AnyPath) -> Iterator[Path]:
    """Yield a temporary sibling directory; on success fsync its files and rename it to `folder`, replacing it.

    If `folder` is a symbolic link, its target is replaced.
    """
    folder = Path(os.path.realpath(folder))
    temporary, held = _make_hidden_folder(folder, 0o777)
    try:
        with naming(folder):
            yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                sync_folder(file)
        if folder.exists():
            old = temporary.with_suffix(".old")
            os.rename(folder, old)
            os.rename(temporary, folder)
            shutil.rmtree(old)
        else:
            os.rename(temporary, folder)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        _let_go(held)


class Publication:
    """Files that are published together or not at all.

    with Publication(journal) as files:
        with files.open(path) as file: …
        files.remove(partial)               # no longer needed once the files are published

    Each file is written under a hidden name next to its final one. On success the renames are written to `journal` and
    carried out: manifests first (their hash exposes a data file that does not match), then in the order of writing.
    After a kill, `output_folder` / `output_file` carry out the journal at the next start; without a journal the hidden
    files are leftovers. A single file needs no journal.
    """

    def __init__(self, journal: Path | None = None) -> None:
        self.journal = journal
        self.temporaries: dict[Path, tuple[Path, int]] = {}  # path → hidden name, descriptor that holds it
        self.needless: list[Path] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.commit()
        else:
            self.discard()

    @contextlib.contextmanager
    def open(self, path: AnyPath, mode: str = "w", permissions: int = 0o644) -> Iterator[IO[Any]]:
        """Open the hidden file that becomes `path`; a second one for the same path replaces the first."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        hidden, handle, held = _make_hidden(path, lambda hidden: os.open(hidden, flags, permissions))
        try:
            with naming(path), os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            _let_go(held)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(hidden)
            raise
        self._drop(path)
        self.temporaries[path] = hidden, held

    def write_json(self, path: AnyPath, item: object, permissions: int = 0o644) -> None:
        """`open`, with one JSON value."""
        with self.open(path, permissions=permissions) as file:
            file.write(pretty(item))

    def write_jsonl(self, path: AnyPath, items: Iterable[object], permissions: int = 0o644) -> None:
        """`open`, with one JSON value per line."""
        with self.open(path, permissions=permissions) as file:
            for item in items:
                file.write(dumps(item) + "\n")

    def hidden(self, path: AnyPath) -> Path:
        """The hidden file that will become `path`."""
        return self.temporaries[Path(path)][0]

    def remove(self, path: AnyPath) -> None:
        """Remove `path` once the files are published."""
        self.needless.append(Path(path))

    def _drop(self, path: Path) -> None:
        if path in self.temporaries:
            hidden, held = self.temporaries.pop(path)
            _let_go(held)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(hidden)

    def discard(self) -> None:
        """Remove the hidden files; nothing else changes."""
        for path in list(self.temporaries):
            self._drop(path)
        self.needless = []

    def commit(self) -> None:
        """Rename all files into place. ValueError for several without a journal."""
        paths = sorted(self.temporaries, key=lambda path: not path.name.endswith(".meta.json"))
        renames = [(self.temporaries[path][0], path) for path in paths]
        try:
            if len(renames) + len(self.needless) > 1:
                if self.journal is None:
                    raise ValueError("several files can only be published together under a lock")
                base = self.journal.parent
                relative = [[os.path.relpath(path, base) for path in pair] for pair in renames]
                needless = [os.path.relpath(path, base) for path in self.needless]
                write_json(self.journal, {"rename": relative, "remove": needless})
                carry_out(self.journal)
            else:
                for hidden, path in renames:
                    os.replace(hidden, path)
                    sync_folder(path.parent)
                for path in self.needless:
                    path.unlink(missing_ok=True)
        except BaseException:
            if self.journal is None or not self.journal.exists():
                self.discard()
            raise
        finally:
            for _, held in self.temporaries.values():
                _let_go(held)
        self.temporaries, self.needless = {}, []


def carry_out(journal: Path) -> None:
    """Carry out a journal, from wherever it was interrupted, and remove it."""
    content, base = read_json(journal, "remove it"), journal.parent
    try:
        renames = [(base / hidden, base / path) for hidden, path in content["rename"]]
        needless = [base / name for name in content["remove"]]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{journal}: not a list of renames; remove it") from None
    matches = [LEFTOVER.fullmatch(hidden.name) for hidden, _ in renames]
    ours = [match and match["name"] == path.name for match, (_, path) in zip(matches, renames)]
    same_folder = [hidden.parent == path.parent for hidden, path in renames]
    if not all(ours + same_folder + [path.parent == base and path.name.startswith(".") for path in needless]):
        raise UserError(f"{journal}: not written by this toolkit; remove it")  # it could rename or remove anything
    for hidden, path in renames:
        if hidden.exists():  # else the killed run has renamed it
            os.replace(hidden, path)
            sync_folder(path.parent)
    for path in needless:
        path.unlink(missing_ok=True)
    os.unlink(journal)
    sync_folder(base)


def write_json(path: AnyPath, item: object, permissions: int = 0o644) -> None:
    """Publish a file of one JSON value (see `atomic`)."""
    with atomic(path, permissions=permissions) as file:
        file.write(pretty(item))


def write_jsonl(path: AnyPath, items: Iterable[object], permissions: int = 0o644) -> None:
    """Publish a file with one JSON value per line (see `atomic`)."""
    with atomic(path, permissions=permissions) as file:
        for item in items:
            file.write(dumps(item) + "\n")


def append_line(file: IO[str], item: object) -> None:
    """Append a line to an open text file and fsync it."""
    with naming(file.name):
        file.write(dumps(item) + "\n")
        file.flush()
        os.fsync(file.fileno())
