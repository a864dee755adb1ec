"""User errors, the same in every script.

They are collected, never raised one at a time: a script creates one `Problems`, every check adds its lines to it, and
`check()` ends the run with exit status 2 and all lines at once, before a model is loaded.
"""

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import ParamSpec, TypeVar

AnyPath = str | os.PathLike[str]
T = TypeVar("T")
P = ParamSpec("P")
SHOWN_BROKEN = 3  # broken rows of an input that are reported individually


class UserError(Exception):
    """Bad input. `problems` is a list of one-line strings, each naming the file, row or flag and what to do."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


class Problems:
    """Collects one-line problems; `check()` raises them all as one UserError."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, line: str) -> None:
        """Add a line, once."""
        if line not in self.lines:  # two checks may find the same broken file
            self.lines.append(line)

    def absorb(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Call `function`; if it raises UserError, add its problems and return None."""
        try:
            return function(*args, **kwargs)
        except UserError as error:
            for line in error.problems:
                self.add(line)
            return None

    def check(self) -> None:
        """Raise UserError with every problem, if there are any."""
        if self.lines:
            raise UserError(*self.lines)


def is_utf8(text: str) -> bool:
    """Whether a text has no lone surrogate (how Python decodes a non-UTF-8 byte of a file name)."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def one_line(text: str) -> str:
    """`text` with its control characters escaped (a file name may hold line breaks or terminal escape sequences)."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


NAME_BYTES = 200  # of a file or folder name; hidden names next to it are longer, and file systems allow 255


def check_writable(folder: AnyPath, problems: Problems, flag: str = "--output_dir") -> None:
    """Add a problem unless `folder` exists and is writable, or can be created. Creates nothing."""
    existing = Path(folder).absolute()
    while True:
        try:
            os.stat(existing)
            break
        except (FileNotFoundError, NotADirectoryError):
            if existing.is_symlink():
                problems.add(f"{flag} {folder}: {existing} is a dangling symbolic link; create its target or remove it")
                return
            if check_name(existing, problems, flag):
                return
            existing = existing.parent
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            problems.add(f"{flag} {folder}: cannot be used ({reason}); choose another directory")
            return
    if not existing.is_dir():
        problems.add(f"{flag} {folder}: {existing} is a file, not a directory; choose another directory")
    elif not _can_write(existing):
        problems.add(f"{flag} {folder}: {existing} is not writable; choose another directory or fix its permissions")


def check_name(path: Path, problems: Problems, flag: str) -> bool:
    """Add a problem, and return True, if the last part of a path is too long for the hidden names next to it."""
    if len(os.fsencode(path.name)) <= NAME_BYTES:
        return False
    problems.add(f"{flag}: the name {path.name[:20]}… is longer than {NAME_BYTES} bytes; choose a shorter one")
    return True


def check_output_file(
    output: Path, suffix: str | None, problems: Problems, inputs: Iterable[AnyPath | None] = (), flag: str = "--output"
) -> None:
    """Add a problem unless `output` ends in `suffix` (None: any), is not a directory or one of the `inputs`, and is
    writable.

    `manifests.finished` decides whether it may be replaced.
    """
    if suffix and output.suffix != suffix:
        problems.add(f"{flag} {output}: the name must end in {suffix}")
    if os.path.realpath(output) in {os.path.realpath(file) for file in inputs if file}:
        problems.add(f"{flag} {output}: is also an input; choose another file")
    elif os.path.isdir(output):
        problems.add(f"{flag} {output}: is a directory; give a file name")
    elif os.path.islink(output):  # renaming a file to it would replace the link
        problems.add(f"{flag} {output}: is a symbolic link; give its target {os.path.realpath(output)} instead")
    check_name(output, problems, flag)
    check_writable(output.parent, problems, flag)


def report_broken(what: str, lines: list[str], n: int, strict: bool) -> None:
    """Report on stderr which rows of an input are skipped: the first few of `n`. UserError if `strict`."""
    shown = lines[:SHOWN_BROKEN]
    if n > len(shown):
        shown.append(f"broken {what}: … and {n - len(shown):,} more")
    if strict and shown:
        raise UserError(*shown)
    if int(os.environ.get("RANK", 0)) == 0:
        for line in shown:
            print(one_line(line), file=sys.stderr)


def report_failures(failures: dict[str, str], main: bool) -> int:
    """Print the failures {what: why} to stderr if `main` (rank 0); returns the exit status."""
    for what, why in failures.items() if main else ():
        print(f"failed: {one_line(f'{what}: {why}')}", file=sys.stderr)
    return 1 if failures else 0


def _can_write(folder: Path) -> bool:
    # access() always allows root to write; the mode bits say what the owner intended.
    writable_by_mode = bool(folder.stat().st_mode & 0o222)
    return os.access(folder, os.W_OK | os.X_OK) and writable_by_mode
