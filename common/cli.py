"""Parser conventions and user errors, the same in every script.

A user error is collected, never raised one at a time: a script makes one `Problems`, every check adds a line to it,
and `check()` ends the run with exit status 2 and all lines at once, before a model is loaded.
"""

import argparse
import math
import os
import re
import signal
import sys
import textwrap
import threading
import time
from pathlib import Path

DTYPES = ("auto", "float32", "bfloat16", "float16")
SHOWN_BROKEN = 3  # broken rows of an input that are spelled out


class UserError(Exception):
    """Bad input. `problems` is a list of one-line strings, each naming the file, row or flag and what to do."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = list(problems)


class Problems:
    """Collects one-line problems; `check()` raises them all as one UserError."""

    def __init__(self):
        self.lines: list[str] = []

    def add(self, line: str) -> None:
        if line not in self.lines:  # two checks may meet the same broken file
            self.lines.append(line)

    def absorb(self, function, *args, **kwargs):
        """Call `function`; add the problems of a UserError it raises and return None in that case."""
        try:
            return function(*args, **kwargs)
        except UserError as error:
            for line in error.problems:
                self.add(line)
            return None

    def check(self) -> None:
        if self.lines:
            raise UserError(*self.lines)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the example as written and ends every flag's help in `(default: X)`."""

    def _get_help_string(self, action):
        text = action.help or ""
        if action.default is not argparse.SUPPRESS and "(default:" not in text:
            text += " (default: %(default)s)"
        return text.strip()


class Parser(argparse.ArgumentParser):
    """ArgumentParser that reports every problem of a command line at once, as UserError (exit 2, no usage text).

    `description` and `example` are shown by --help; flags cannot be abbreviated.
    """

    def __init__(self, description: str, example: str):
        epilog = "example:\n" + textwrap.indent(textwrap.dedent(example).strip(), "  ")
        super().__init__(description=description, epilog=epilog, formatter_class=_Formatter, allow_abbrev=False)
        self._problems: list[str] = []

    def _get_value(self, action, arg_string):
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError as error:
            self._problems.append(self._line(error))
            return action.default

    def _check_value(self, action, value):
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            if value is not action.default:  # a value that _get_value already refused is not refused twice
                self._problems.append(self._line(error))

    @staticmethod
    def _line(error: argparse.ArgumentError) -> str:
        name = (error.argument_name or "").split("/")[-1]
        return f"{name}: {error.message}" if name else error.message

    def parse_args(self, args=None, namespace=None):
        self._problems = []
        parsed, extras = self.parse_known_args(args, namespace)
        self._problems += [f"{extra}: unknown argument (see --help)" for extra in extras]
        if self._problems:
            raise UserError(*self._problems)
        return parsed

    def error(self, message):
        raise UserError(*self._problems, message)


def positive_int(text: str) -> int:
    """argparse type: an integer ≥ 1."""
    value = _number(int, text, "a whole number")
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {text}")
    return value


def non_negative_int(text: str) -> int:
    """argparse type: an integer ≥ 0."""
    value = _number(int, text, "a whole number")
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {text}")
    return value


def seed(text: str) -> int:
    """argparse type: a seed that every library takes, 0 … 2³² − 1."""
    value = _number(int, text, "a whole number")
    if not 0 <= value < 1 << 32:
        raise argparse.ArgumentTypeError(f"must be 0 to 4294967295, got {text}")
    return value


def device_map(text: str) -> str:
    """argparse type: what transformers takes as device_map, as one word."""
    if not re.fullmatch(r"auto|balanced|balanced_low_0|sequential|cpu|mps|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"auto, balanced, balanced_low_0, sequential, cpu, cuda or cuda:N, got {text}")
    return text


def non_negative_float(text: str) -> float:
    """argparse type: a float ≥ 0 (inf allowed, nan not)."""
    value = _number(float, text, "a number")
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {text}")
    return value


def positive_float(text: str) -> float:
    """argparse type: a float > 0 (inf allowed, nan not)."""
    value = _number(float, text, "a number")
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def share(text: str) -> float:
    """argparse type: a float in [0, 1)."""
    value = _number(float, text, "a number")
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, got {text}")
    return value


def _number(kind, text, words):
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be {words}, got {text!r}") from None


def add_model_flags(parser: argparse.ArgumentParser, default_seed=3407, seed_help="seed of everything random") -> None:
    """The flags of every script that loads a model: --dtype --device_map --revision --dry_run --seed."""
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="auto: float32 on CPU; on a GPU bfloat16 where it has it, else float16",
    )
    parser.add_argument(
        "--device_map",
        type=device_map,
        default=None,
        help="passed to transformers ('auto' spreads one model over all GPUs); None: one device a process",
    )
    parser.add_argument("--revision", default=None, help="branch, tag or commit of a hub model")
    parser.add_argument(
        "--dry_run", action="store_true", help="check every argument and file, print the plan, load no model"
    )
    parser.add_argument("--seed", type=seed, default=default_seed, help=seed_help)


def check_writable(folder, problems: Problems, flag: str = "--output_dir") -> None:
    """Add a problem unless `folder` exists and is writable, or can be made. Makes nothing."""
    path = Path(folder).absolute()
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        problems.add(f"{flag} {folder}: {existing} is a file, not a directory; name another place")
    elif not _can_write(existing):
        problems.add(f"{flag} {folder}: no permission to write in {existing}; name another place or mend its mode")


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """--dry_run of a script that loads no model."""
    parser.add_argument(
        "--dry_run", action="store_true", help="check every argument and file, print the plan, write nothing"
    )


def check_output_file(output: Path, suffix: str | None, problems: Problems, inputs=(), flag: str = "--output") -> None:
    """Add a problem unless `output` ends in `suffix` (None: in anything), is no directory, is none of the `inputs`, and
    can be written.

    Whether it may be replaced: `dataset.finished`.
    """
    if suffix and output.suffix != suffix:
        problems.add(f"{flag} {output}: the name must end in {suffix}")
    if output.resolve() in {Path(file).resolve() for file in inputs if file}:
        problems.add(f"{flag} {output}: is an input too; name another file")
    elif output.is_dir():
        problems.add(f"{flag} {output}: is a directory; name a file")
    check_writable(output.parent, problems, flag)


def report_broken(what: str, lines: list[str], n: int, strict: bool) -> None:
    """Say on stderr which rows of an input are left out: the first lines of all `n`. UserError when `strict`."""
    shown = lines[:SHOWN_BROKEN]
    if n > len(shown):
        shown.append(f"broken {what}: … and {n - len(shown):,} more")
    if strict and shown:
        raise UserError(*shown)
    if int(os.environ.get("RANK", 0)) == 0:
        for line in shown:
            print(line, file=sys.stderr)


def report_failures(failures: dict[str, str], main: bool) -> int:
    """Name on stderr what failed among many, {what: why}, where `main` (rank 0); the exit status."""
    for what, why in failures.items() if main else ():
        print(f"failed: {what}: {why}", file=sys.stderr)
    return 1 if failures else 0


def _can_write(folder: Path) -> bool:
    # access() says yes to root on a read-only mode; the mode bits are what the owner asked for.
    writable_by_mode = bool(folder.stat().st_mode & 0o222)
    return os.access(folder, os.W_OK | os.X_OK) and writable_by_mode


def plain(value):
    """`value` as strict JSON: paths to strings, infinities to 'inf'/'-inf', tuples to lists. NaN stays (and fails)."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if isinstance(value, Path):
        return str(value)
    return value


def end_with_parent() -> None:
    """From now on this process ends within a second of its parent's death, however that died: for workers."""
    from multiprocessing import parent_process

    spawned_by = parent_process()  # which may be dead before this line
    parent = spawned_by.pid if spawned_by else os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Terminated(KeyboardInterrupt):
    """SIGTERM: like Ctrl-C it ends workers and removes temporaries on its way out."""


def _terminate(number, frame):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends at once
    raise Terminated("SIGTERM")


def entry(main) -> int:
    """Run `main()`; a UserError becomes one stderr line a problem and status 2, Ctrl-C one line and 130, SIGTERM 143.

    Other exceptions stay tracebacks. A process of torchrun's ends with it. Of several processes SIGTERM ends each at
    once: one that waits for a dead rank would not come to handle it.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
    if os.environ.get("WORLD_SIZE", "1") == "1":
        signal.signal(signal.SIGTERM, _terminate)
    try:
        return main() or 0
    except UserError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            for line in error.problems:
                print(line, file=sys.stderr)
        return 2
    except KeyboardInterrupt as reason:
        print("terminated" if isinstance(reason, Terminated) else "interrupted", file=sys.stderr)
        return 143 if isinstance(reason, Terminated) else 130
