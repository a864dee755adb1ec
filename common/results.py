"""Result files: complete or absent, next to a record of the run that made them.

How a script writes its output:

    with results.output_folder(folder, dry_run=args.dry_run) as output:       # or output_file(path, key_file, …)
        …checks that look at existing files…                                  # locked: nobody else changes them
        with results.Run(folder / "run_x.json", args, inputs, world, output=output) as run:
            run.files.write_jsonl(folder / "results.jsonl", lines)            # hidden until the block succeeds

`output_folder` / `output_file` hold a lock for the life of the run (rank 0), finish a publication interrupted by a
kill, and remove leftovers of dead runs. `run.files` is a `Publication`: its files and the run's record are renamed
into place together. `atomic`, `atomic_folder`, `write_json` and `write_jsonl` publish one file or folder at once;
`temporary_folder` is for scratch files. All modes are `permissions & ~umask`.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import resource
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self, TypeVar, overload

from common import rows, strict_json
from common.problems import AnyPath, Problems, UserError, check_writable
from common.sources import data_files
from common.strict_json import plain

if TYPE_CHECKING:
    from common.distributed import World

T = TypeVar("T")

SCHEMA = 1
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "scikit-learn", "rapidfuzz")


LEFTOVER = re.compile(r"\.(?P<name>.+)\.[0-9a-z_]{8}\.(tmp|old)", re.DOTALL)  # our hidden names
NO_ROOM = 1 << 16  # with fewer free bytes, a library's error is blamed on the full disk
JOURNAL_WAIT = 60  # seconds that other ranks wait for rank 0 to finish the publication of a killed run

_locked: dict[Path, int] = {}  # lock file → descriptor, of this process
_held: set[int] = set()  # descriptors whose lock marks a temporary as in use


def _forget_locks() -> None:
    """In a forked child: a lock must end with the run that took it, even if its workers live on."""
    for descriptor in (*_locked.values(), *_held):
        os.close(descriptor)
    _locked.clear()
    _held.clear()


os.register_at_fork(after_in_child=_forget_locks)


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
            file.write(_pretty(item))

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
                _finish(self.journal)
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


def _finish(journal: Path) -> None:
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


class Output:
    """A locked output; `publication()` publishes several files together.

    `after_kill`: the last run here was killed, possibly after publishing its files.
    """

    def __init__(self, journal: Path, after_kill: bool = False) -> None:
        self.journal, self.after_kill = journal, after_kill

    def publication(self) -> Publication:
        """A new `Publication` under this lock."""
        return Publication(self.journal)


@contextlib.contextmanager
def output_folder(folder: AnyPath, dry_run: bool = False, key: str = "") -> Iterator[Output]:
    """Lock a folder that a run writes to (created if missing); yields an `Output`.

    key: names the kind of files, if runs of other scripts may write to the same folder meanwhile. UserError naming the
    holder if another run has it. Under torchrun rank 0 locks. Nothing is written or locked in a dry run, or if the
    folder cannot be created or written (the script's own checks report that). A folder created here is removed again
    if it stays empty.
    """
    folder, name = Path(folder), f".{key}" if key else ""
    lock, journal = folder / f"{name}.lock", folder / f"{name}.publish"
    with _locked_places([(lock, journal, folder)], [folder], dry_run) as after_kill:
        yield Output(journal, after_kill)


@contextlib.contextmanager
def output_file(*paths: AnyPath, dry_run: bool = False) -> Iterator[Output]:
    """Lock output files in folders that other runs may also write to; otherwise like `output_folder`."""
    files = list(dict.fromkeys(map(Path, paths)))
    locks = [(path.with_name(f".{path.name}.lock"), path.with_name(f".{path.name}.publish"), path) for path in files]
    with _locked_places(locks, list(dict.fromkeys(path.parent for path in files)), dry_run) as after_kill:
        yield Output(locks[0][1], after_kill)


def tidy(folders: Iterable[AnyPath], key: str = "") -> None:
    """Finish or remove what killed runs left in folders that this run may not write to itself."""
    for folder in folders:
        with output_folder(folder, key=key):
            pass


@contextlib.contextmanager
def _locked_places(places: list[tuple[Path, Path, Path]], folders: list[Path], dry_run: bool) -> Iterator[bool]:
    """Hold the locks of (lock file, journal, what it protects). Yields whether a killed run left one behind."""
    problems = Problems()
    for folder in folders:
        check_writable(folder, problems)
    if dry_run or problems.lines:
        yield False
        return
    if int(os.environ.get("RANK", 0)):
        deadline = time.monotonic() + JOURNAL_WAIT
        while any(journal.exists() for _, journal, _ in places) and time.monotonic() < deadline:
            time.sleep(0.1)
        yield False
        return
    with contextlib.ExitStack() as stack:
        left = [stack.enter_context(_lock(lock, place)) for lock, _, place in sorted(places)]
        if None not in left:  # else this process already writes there
            for _, journal, _ in places:
                if journal.is_file():
                    _finish(journal)
            for folder in folders:
                remove_leftovers(folder)
        yield any(left)


@contextlib.contextmanager
def _lock(path: Path, place: Path) -> Iterator[bool | None]:
    """Hold a lock file, which the kernel releases when the process ends. Yields whether a killed run left it behind;
    None if this process already holds it."""
    path = Path(os.path.abspath(path))
    if path in _locked:
        yield None
        return
    missing = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    descriptor, left = _take(path, place)
    _locked[path] = descriptor
    try:
        yield left
    finally:
        if _locked.pop(path, None) is not None:  # None: a forked child
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            os.close(descriptor)
            with contextlib.suppress(OSError):
                for folder in missing:
                    if any(folder.iterdir()):
                        break
                    folder.rmdir()


def _take(path: Path, place: Path) -> tuple[int, bool]:
    """(descriptor of the locked lock file, whether a killed run left it); UserError naming `place` and its holder."""
    for _ in range(100):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # its last holder has just removed the folder it had created
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 10000, 0).decode("utf-8", "replace")
            os.close(descriptor)
            raise UserError(
                f"{place}: in use by another run{holder and f' ({holder})'}; wait for it or choose another output"
            ) from None
        except OSError as error:
            print(
                f"{path}: file locks unavailable ({error.strerror}); do not run twice with one output", file=sys.stderr
            )
            return descriptor, False
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):  # else its last holder has just removed it
                left = os.fstat(descriptor).st_size > 0
                words = shlex.join(sys.argv)[:2000]
                holder = f"process {os.getpid()} on {socket.gethostname()} since {now()}: {words}"
                os.ftruncate(descriptor, 0)
                try:
                    with naming(path):
                        os.pwrite(descriptor, holder.encode("utf-8", "replace"), 0)
                except OSError:
                    os.unlink(path)
                    os.close(descriptor)
                    raise
                return descriptor, left
        os.close(descriptor)
    raise OSError(f"{path}: cannot be locked; another process keeps removing it")


def dumps(item: object) -> str:
    """One line of strict JSON; NaN raises (it is a bug), infinities become 'inf'."""
    return json.dumps(plain(item), ensure_ascii=False, allow_nan=False)


def _pretty(item: object) -> str:
    return json.dumps(plain(item), ensure_ascii=False, allow_nan=False, indent=1) + "\n"


def write_json(path: AnyPath, item: object, permissions: int = 0o644) -> None:
    """Publish a file of one JSON value (see `atomic`)."""
    with atomic(path, permissions=permissions) as file:
        file.write(_pretty(item))


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


def write_jsonl(path: AnyPath, items: Iterable[object], permissions: int = 0o644) -> None:
    """Publish a file with one JSON value per line (see `atomic`)."""
    with atomic(path, permissions=permissions) as file:
        for item in items:
            file.write(dumps(item) + "\n")


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


def append_line(file: IO[str], item: object) -> None:
    """Append a line to an open text file and fsync it."""
    with naming(file.name):
        file.write(dumps(item) + "\n")
        file.flush()
        os.fsync(file.fileno())


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


@cache
def _sha256(path: str, size: int, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256(path: AnyPath) -> str:
    """SHA-256 of a file, hexadecimal; of several files (`sources.data_files`), over their digests in order. Cached
    until a size or a modification time changes."""
    digests = []
    for file in data_files(path):
        status = os.stat(file)
        digests.append(_sha256(str(file.resolve()), status.st_size, status.st_mtime_ns))
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


@cache
def commit() -> dict[str, Any]:
    """{'commit': hash or None, 'dirty': bool or None} of this repository."""
    try:
        head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        state = subprocess.run(
            ["git", "-C", ROOT, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    return {"commit": head.stdout.strip(), "dirty": bool(state.stdout.strip())}


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def peak_memory() -> dict[str, int]:
    """Peak resident bytes of this process and, with a GPU, peak allocated bytes on it."""
    scale = 1 if sys.platform == "darwin" else 1024
    peak = {"cpu_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        peak["gpu_bytes"] = torch.cuda.max_memory_allocated()
    return peak


def finished(
    record_file: AnyPath,
    outputs: Sequence[AnyPath],
    args: object,
    inputs: Iterable[AnyPath],
    overwrite: bool,
    **more: object,
) -> bool:
    """Whether an earlier run of the same script made `outputs` from the same arguments and inputs, successfully.

    more: what else its record must say. UserError for each existing output that was made differently, unless
    `overwrite`.
    """
    existing = [path for path in map(Path, outputs) if path.exists()]
    if overwrite or not existing:
        return False
    try:
        record = read_json(record_file, "") if Path(record_file).is_file() else {}
        free = {"overwrite", "dry_run", "output_dir"}
        ours, theirs = ({k: v for k, v in x.items() if k not in free} for x in (plain(vars(args)), record["args"]))
        hashes = [entry["sha256"] for entry in record["inputs"]]
        same = record["status"] == "ok" and theirs == ours and hashes == [sha256(file) for file in inputs]
    except (UserError, OSError, KeyError, TypeError, AttributeError):
        same = False
    if same and len(existing) == len(outputs) and all(record.get(key) == plain(value) for key, value in more.items()):
        print(f"{record_file}: already finished with the same inputs and settings; nothing to do")
        return True
    raise UserError(
        *(f"--output_dir: {path} exists; give --overwrite to replace it, or another directory" for path in existing)
    )


class Run:
    """`run.json` / `run_<script>.json`: status 'running', then 'ok' or 'failed' when the block ends.

    with Run(path, args, inputs=[file, …], world=world, output=output) as run:
        run["tokens"] = 123          # anything worth recording
        run.files.write_json(…)      # with an `Output`: published together with the record if the block succeeds
    A block that succeeds but sets run["error"] is 'failed' too. Only rank 0 writes. `args` is the parsed namespace or
    configuration; environment variables are never recorded.
    """

    def __init__(
        self,
        path: AnyPath,
        args: object,
        inputs: Iterable[AnyPath] = (),
        world: "World | None" = None,
        output: Output | None = None,
        **more: object,
    ) -> None:
        self.path, self.world = Path(path), world
        self._files = output.publication() if output else None
        self.started = time.monotonic()
        versions = {}
        for package in PACKAGES:
            with contextlib.suppress(metadata.PackageNotFoundError):
                versions[package] = metadata.version(package)
        self.record: dict[str, Any] = {
            "schema": SCHEMA,
            "script": Path(sys.argv[0]).name,
            "argv": sys.argv,
            "args": {key: value for key, value in vars(args).items() if not key.startswith("_")},
            **commit(),
            "python": platform.python_version(),
            "packages": versions,
            "device": world.device if world else "cpu",
            "world_size": world.size if world else 1,
            "seed": getattr(args, "seed", None),
            "inputs": [{"path": str(file), "sha256": sha256(file)} for file in inputs],
            **more,
            "start": now(),
            "end": None,
            "status": "running",
        }

    @property
    def files(self) -> Publication:
        """Files published together with the record. ValueError without an `Output`."""
        if self._files is None:
            raise ValueError(f"{self.path}: a run without an output publishes no files")
        return self._files

    def __setitem__(self, key: str, value: object) -> None:
        self.record[key] = value

    def __getitem__(self, key: str) -> Any:
        return self.record[key]

    def write(self) -> None:
        """Write the record as it stands (rank 0)."""
        if self.world is None or self.world.main:
            write_json(self.path, self.record)

    def __enter__(self) -> Self:
        self.write()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.record["end"] = now()
        self.record["seconds"] = round(time.monotonic() - self.started, 3)
        self.record["peak_memory"] = peak_memory()
        if kind is not None:
            self.record["error"] = f"{kind.__name__}: {error}"
        self.record["status"] = "failed" if "error" in self.record else "ok"
        main = self.world is None or self.world.main
        if kind is None and self._files and main:
            self._files.write_json(self.path, self.record)
            self._files.commit()
            return
        if self._files:
            self._files.discard()
        self.write()
