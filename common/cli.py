"""Parser conventions and user errors, the same in every script.

A user error is collected, never raised one at a time: a script makes one `Problems`, every check adds a line to it,
and `check()` ends the run with exit status 2 and all lines at once, before a model is loaded.
"""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import math
import os
import re
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, ParamSpec, TypeVar

from common import __version__, strict_json

AnyPath = str | os.PathLike[str]
T = TypeVar("T")
P = ParamSpec("P")
Number = TypeVar("Number", int, float)

DTYPES = ("auto", "float32", "bfloat16", "float16")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room for what a script writes
SHOWN_BROKEN = 3  # broken rows of an input that are spelled out


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
        """Keep a line, once."""
        if line not in self.lines:  # two checks may meet the same broken file
            self.lines.append(line)

    def absorb(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Call `function`; add the problems of a UserError it raises and return None in that case."""
        try:
            return function(*args, **kwargs)
        except UserError as error:
            for line in error.problems:
                self.add(line)
            return None

    def check(self) -> None:
        """UserError with every problem, if there is one."""
        if self.lines:
            raise UserError(*self.lines)


def defaults_of(config: type[Any]) -> dict[str, Any]:
    """{field: its default} of a configuration, without those that must be given."""
    return {one.name: one.default for one in dataclasses.fields(config) if one.default is not dataclasses.MISSING}


Settle = Callable[[argparse.Namespace, list[str]], None]


class Parser(argparse.ArgumentParser):
    """ArgumentParser that reports every problem of a command line at once, as UserError (exit 2, no usage text).

    description, example: shown by --help.
    config: a frozen dataclass whose fields are the flags, with their defaults; `parse_args` returns one.
    settle: called before that with what was parsed and a list that takes problems; may change flags.

    Every script has --config FILE (JSON or YAML, the same keys; flags given beside it win) and --version. Flags cannot
    be abbreviated.
    """

    def __init__(
        self, description: str, example: str, config: type[Any] | None = None, settle: Settle | None = None
    ) -> None:
        self.configuration, self._settle = config, settle
        self.defaults = defaults_of(config) if config else {}
        self._problems: list[str] = []
        self._flags: list[str] = []
        self._required: dict[str, str] = {}
        self._group: argparse._ArgumentGroup | None = None
        epilog = "example:\n" + textwrap.indent(textwrap.dedent(example).strip(), "  ")
        shown = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, epilog=epilog, formatter_class=shown, allow_abbrev=False)
        self.add_argument("--version", action="version", version=f"%(prog)s {__version__}", help="print it and stop")
        self.add_argument(
            "--config", metavar="FILE", default=None, help="JSON or YAML with the same keys; flags beside it win"
        )

    @contextlib.contextmanager
    def section(self, title: str) -> Iterator[None]:
        """What is added inside stands under this heading of --help."""
        before = self._group
        self._group = self.add_argument_group(title)
        yield
        self._group = before

    def add_argument(self, *flags: str, **options: Any) -> argparse.Action:
        """argparse's, with the default from the configuration, '(default: …)' in the help, and bad values collected."""
        name = options.get("dest") or next((flag for flag in flags if flag.startswith("--")), flags[0]).lstrip("-")
        if "default" not in options and name in self.defaults:
            default = self.defaults[name]
            options["default"] = list(default) if isinstance(default, tuple) else default
        if options.get("action", "store") in ("store", "append", "extend"):
            choices = options.pop("choices", None)
            if choices:
                options.setdefault("metavar", "{" + ",".join(map(str, choices)) + "}")
            options["type"] = self._collecting(flags, options.get("type", str), choices, options.get("default"))
        if options.get("action") not in ("help", "version") and "(default:" not in options.get("help", ""):
            options["help"] = f"{options.get('help', '')} (default: %(default)s)".strip()
        self._flags += [flag for flag in flags if flag.startswith("--")]
        if options.pop("required", False):  # told by parse_args, with everything else
            self._required[name] = "/".join(flags)
        return self._group.add_argument(*flags, **options) if self._group else super().add_argument(*flags, **options)

    def _collecting(
        self, flags: Sequence[str], kind: Callable[[str], Any], choices: Sequence[Any] | None, default: Any
    ) -> Callable[[str], Any]:
        """`kind` that notes a bad value as a problem, and stands in for it with the default."""

        def convert(text: str) -> Any:
            try:
                value = kind(text)
            except argparse.ArgumentTypeError as error:
                self._problems.append(f"{flags[-1]}: {error}")
                return default
            if choices and value not in choices:
                listed = ", ".join(map(repr, choices))
                self._problems.append(f"{flags[-1]}: invalid choice: {value!r} (choose from {listed})")
                return default
            return value

        return convert

    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        """The configuration (a Namespace where the parser has none). UserError with every problem."""
        words = list(sys.argv[1:] if args is None else args)
        self._problems = no_names(words)
        if self._problems:
            raise UserError(*self._problems)
        from_file = self._config_words(words)
        self._problems += no_names(from_file)
        words = [*from_file, *words]
        parsed, extras = self.parse_known_args(words, namespace)
        for extra in extras:
            near = difflib.get_close_matches(extra.partition("=")[0], self._flags, 1, 0.75) if extra[:2] == "--" else []
            hint = f"did you mean {near[0]}?" if near else "see --help"
            self._problems.append(f"{extra}: unknown argument ({hint})")
        if self._settle and not extras:  # the value of an unknown flag looks like a positional argument
            self._settle(parsed, self._problems)
        if missing := [flag for name, flag in self._required.items() if getattr(parsed, name) is None]:
            self._problems.append(f"the following arguments are required: {', '.join(missing)}")
        if self._problems:
            raise UserError(*dict.fromkeys(self._problems))
        del parsed.config
        if self.configuration is None:
            return parsed
        return self.configuration(**{k: tuple(v) if isinstance(v, list) else v for k, v in vars(parsed).items()})

    def _config_words(self, words: list[str]) -> list[str]:
        """The keys of --config as words of a command line, so that both are checked alike."""
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument("--config", nargs="?")  # without a value: this parser says so
        path = finder.parse_known_args(words)[0].config
        if path is None:
            return []
        made: list[str] = []
        for key, value in read_config(path).items():
            flag = f"--{key}"
            if flag not in self._flags or key in ("config", "help", "version"):
                near = difflib.get_close_matches(flag, self._flags, 1, 0.75)
                hint = f" (did you mean {near[0][2:]}?)" if near else ""
                self._problems.append(f"--config {path}: unknown key {key!r}{hint}")
            elif isinstance(value, dict):
                self._problems.append(f"--config {path}: {key}: a value or a list was expected")
            elif value is True:
                made.append(flag)
            elif isinstance(value, list):
                made += [flag, *map(str, value)]
            elif value is not None and value is not False:
                made.append(f"{flag}={value}")
        return made

    def error(self, message: str) -> NoReturn:
        """argparse's own complaint, with the problems so far, as UserError."""
        raise UserError(*dict.fromkeys([*self._problems, message]))


def words_of(config: Any) -> list[str]:
    """The words of a command line that give this configuration: its fields that differ from their defaults, in order.

    Fields whose metadata says `positional` come first, without a flag. ValueError when a field is empty and its default
    is not: no word says that.
    """
    first: list[str] = []
    words: list[str] = []
    for one in dataclasses.fields(config):
        value = getattr(config, one.name)
        if value == one.default:
            continue
        values = [str(item) for item in value] if isinstance(value, tuple) else [str(value)]
        if value is None or value is False or not values:
            raise ValueError(f"--{one.name}: no word on a command line gives {value!r}")
        if one.metadata.get("positional"):
            first += values
        elif value is True:
            words.append(f"--{one.name}")
        elif len(values) == 1 and values[0].startswith("-"):
            words.append(f"--{one.name}={values[0]}")
        else:
            words += [f"--{one.name}", *values]
    return first + words


def no_names(words: Iterable[object]) -> list[str]:
    """A problem for each word that can be no name of a file: not UTF-8 (records and manifests are, and could not name
    such a file), with a NUL (from a --config file), or too long. Also for a working directory that is not UTF-8."""
    lines = []
    for word in map(str, words):
        if not is_utf8(word):
            lines.append(f"{word}: not UTF-8; rename the file or folder")
        elif "\0" in word:
            lines.append(f"{word}: has a NUL character in it")
        elif not word.startswith("{") and max(map(len, os.fsencode(word).split(b"/"))) > 255:
            lines.append(f"{word[:40]}…: longer than any name of a file can be")
    if not is_utf8(os.getcwd()):
        lines.append(f"{os.getcwd()}: this working directory's name is not UTF-8; rename it, or work elsewhere")
    return lines


def is_utf8(text: str) -> bool:
    """Whether a text has no lone surrogate, as which Python reads a byte of a name that is not UTF-8."""
    return not any("\ud800" <= sign <= "\udfff" for sign in text)


def one_line(text: str) -> str:
    """`text` with its control characters (a name may have a line break or a terminal's escapes) spelled out."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def read_config(path: AnyPath) -> dict[str, Any]:
    """The keys and values of a JSON or YAML file. UserError when it is neither, or no mapping."""
    try:
        if not os.path.isfile(path):  # of a pipe nobody may ever write the end
            raise UserError(f"--config {path}: {'not a file' if os.path.exists(path) else 'no such file'}")
        raw = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror})") from None
    kind = "JSON" if Path(path).suffix == ".json" else "YAML"
    try:
        if kind == "JSON":
            content = strict_json.parse(raw)
        else:
            import yaml

            content = yaml.safe_load(raw.decode())
    except Exception as error:  # yaml's errors share no class with json's
        raise UserError(f"--config {path}: not {kind} ({' '.join(str(error).split())})") from None
    content = {} if content is None else content  # an empty YAML file
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"--config {path}: keys with values were expected")
    return content


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The flags of every script that loads a model."""

    dtype: str = "auto"
    device_map: str | None = None
    revision: str | None = None
    dry_run: bool = False
    seed: int = 3407


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


def _number(kind: Callable[[str], Number], text: str, words: str) -> Number:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be {words}, got {text!r}") from None


def add_model_flags(parser: Parser, seed_help: str = "seed of everything random") -> None:
    """The flags of `ModelConfig`: --dtype --device_map --revision --dry_run --seed."""
    add = parser.add_argument
    words = "auto: float32 on CPU; on a GPU bfloat16 where it has it, else float16"
    add("--dtype", choices=DTYPES, help=words)
    words = "passed to transformers ('auto' spreads one model over all GPUs); None: one device a process"
    add("--device_map", type=device_map, help=words)
    add("--revision", help="branch, tag or commit of a hub model")
    add("--dry_run", action="store_true", help="check every argument and file, print the plan, load no model")
    add("--seed", type=seed, help=seed_help)


def add_row_flags(parser: Parser) -> None:
    """--chat_template and --columns: how the rows of a data file are read."""
    words = "for rows of messages: a Jinja file, or chatml (default: the tokenizer's own)"
    parser.add_argument("--chat_template", metavar="FILE", help=words)
    words = "fields to rename, e.g. text=body prompt=question"
    parser.add_argument("--columns", nargs="+", action="extend", metavar="NEW=OLD", help=words)


NAME_BYTES = 200  # of a file or folder; hidden names beside it are longer, and 255 is what file systems take


def check_writable(folder: AnyPath, problems: Problems, flag: str = "--output_dir") -> None:
    """Add a problem unless `folder` exists and is writable, or can be made. Makes nothing."""
    existing = Path(folder).absolute()
    while True:
        try:
            os.stat(existing)
            break
        except (FileNotFoundError, NotADirectoryError):
            if existing.is_symlink():
                problems.add(f"{flag} {folder}: {existing} is a symbolic link to nothing; make its target or remove it")
                return
            if check_name(existing, problems, flag):
                return
            existing = existing.parent
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            problems.add(f"{flag} {folder}: cannot be used ({reason}); name another place")
            return
    if not existing.is_dir():
        problems.add(f"{flag} {folder}: {existing} is a file, not a directory; name another place")
    elif not _can_write(existing):
        problems.add(f"{flag} {folder}: no permission to write in {existing}; name another place or mend its mode")


def check_name(path: Path, problems: Problems, flag: str) -> bool:
    """Add a problem, and return True, when the last part of a path is too long for the hidden names beside it."""
    if len(os.fsencode(path.name)) <= NAME_BYTES:
        return False
    problems.add(f"{flag}: the name {path.name[:20]}… has more than {NAME_BYTES} bytes; choose a shorter one")
    return True


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """--dry_run of a script that loads no model."""
    parser.add_argument(
        "--dry_run", action="store_true", help="check every argument and file, print the plan, write nothing"
    )


def check_output_file(
    output: Path, suffix: str | None, problems: Problems, inputs: Iterable[AnyPath | None] = (), flag: str = "--output"
) -> None:
    """Add a problem unless `output` ends in `suffix` (None: in anything), is no directory, is none of the `inputs`, and
    can be written.

    Whether it may be replaced: `dataset.finished`.
    """
    if suffix and output.suffix != suffix:
        problems.add(f"{flag} {output}: the name must end in {suffix}")
    if os.path.realpath(output) in {os.path.realpath(file) for file in inputs if file}:
        problems.add(f"{flag} {output}: is an input too; name another file")
    elif os.path.isdir(output):
        problems.add(f"{flag} {output}: is a directory; name a file")
    elif os.path.islink(output):  # a file that is renamed to it would take the link's place
        problems.add(f"{flag} {output}: is a symbolic link; name the file {os.path.realpath(output)} itself")
    check_name(output, problems, flag)
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
            print(one_line(line), file=sys.stderr)


def report_failures(failures: dict[str, str], main: bool) -> int:
    """Name on stderr what failed among many, {what: why}, where `main` (rank 0); the exit status."""
    for what, why in failures.items() if main else ():
        print(f"failed: {one_line(f'{what}: {why}')}", file=sys.stderr)
    return 1 if failures else 0


def _can_write(folder: Path) -> bool:
    # access() says yes to root on a read-only mode; the mode bits are what the owner asked for.
    writable_by_mode = bool(folder.stat().st_mode & 0o222)
    return os.access(folder, os.W_OK | os.X_OK) and writable_by_mode


def plain(value: object) -> Any:
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


class Interrupted(Exception):
    """SIGTERM arrived and the state is saved: exit status 143."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: like Ctrl-C it ends workers and removes temporaries on its way out."""


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends at once
    raise Terminated("SIGTERM")


def entry(main: Callable[[], int | None]) -> int:
    """Run `main()`; a UserError becomes one stderr line a problem and status 2, as does a full disk (of any rank);
    Ctrl-C one line and 130, SIGTERM 143.

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
                print(one_line(line), file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in FULL:
            raise
        place = error.filename if isinstance(error.filename, str | bytes) else "a file"
        print(one_line(f"{os.fsdecode(place)}: {error.strerror}; make room there and start again"), file=sys.stderr)
        return 2
    except Interrupted as reason:
        print(reason, file=sys.stderr)
        return 143
    except KeyboardInterrupt as reason:
        print("terminated" if isinstance(reason, Terminated) else "interrupted", file=sys.stderr)
        return 143 if isinstance(reason, Terminated) else 130
