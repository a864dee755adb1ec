"""Locks of outputs: while a run writes a folder or file, no other run does.

`output_folder` / `output_file` hold a lock for the life of the run (rank 0), finish a publication interrupted by a
kill, and remove leftovers of dead runs.
"""

import contextlib
import fcntl
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from common.problems import AnyPath, Problems, UserError, check_writable
from common.publication import Publication, carry_out, naming, remove_leftovers
from common.results import now

JOURNAL_WAIT = 60  # seconds that other ranks wait for rank 0 to finish the publication of a killed run

_locked: dict[Path, int] = {}  # lock file → descriptor, of this process


def _forget_locks() -> None:
    """In a forked child: a lock must end with the run that took it, even if its workers live on."""
    for descriptor in _locked.values():
        os.close(descriptor)
    _locked.clear()


os.register_at_fork(after_in_child=_forget_locks)


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
                    carry_out(journal)
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
