"""The command line of every script: its parser, the types of its flags, and the flags that several scripts share.

Every problem of a command line is reported at once (see `problems`).
"""

import argparse
import contextlib
import dataclasses
import difflib
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from common import __version__, strict_json
from common.problems import AnyPath, UserError, is_utf8

Number = TypeVar("Number", int, float)

DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("nf4", "int8")


def defaults_of(config: type[Any]) -> dict[str, Any]:
    """{field: its default} of a configuration class, without the required fields."""
    fields = dataclasses.fields(config)
    return {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}


Settle = Callable[[argparse.Namespace, list[str]], None]


class Parser(argparse.ArgumentParser):
    """ArgumentParser that reports every problem of a command line at once, as UserError (exit 2, no usage text).

    description, example: shown by --help.
    config: a frozen dataclass whose fields are the flags, with their defaults; `parse_args` returns one.
    settle: called before that with the parsed namespace and a list to add problems to; may change flags.

    Every script has --config FILE (JSON or YAML, the same keys; command-line flags take precedence) and --version.
    Flags cannot be abbreviated.
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
        self.add_argument(
            "--version", action="version", version=f"%(prog)s {__version__}", help="print the version and exit"
        )
        self.add_argument(
            "--config", metavar="FILE", default=None, help="JSON or YAML with the same keys; flags override it"
        )

    @contextlib.contextmanager
    def section(self, title: str) -> Iterator[None]:
        """Arguments added inside are listed under this heading in --help."""
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
        if options.pop("required", False):  # reported by parse_args, with everything else
            self._required[name] = "/".join(flags)
        return self._group.add_argument(*flags, **options) if self._group else super().add_argument(*flags, **options)

    def _collecting(
        self, flags: Sequence[str], kind: Callable[[str], Any], choices: Sequence[Any] | None, default: Any
    ) -> Callable[[str], Any]:
        """`kind`, but a bad value is added to the problems and replaced by the default."""

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
        """The configuration (a Namespace if the parser has none). UserError with every problem."""
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
        """The keys of --config as command-line words, so that both are checked alike."""
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument("--config", nargs="?")  # without a value: this parser says so
        path = finder.parse_known_args(words)[0].config
        if path is None:
            return []
        flags: list[str] = []
        for key, value in read_config(path).items():
            flag = f"--{key}"
            if flag not in self._flags or key in ("config", "help", "version"):
                near = difflib.get_close_matches(flag, self._flags, 1, 0.75)
                hint = f" (did you mean {near[0][2:]}?)" if near else ""
                self._problems.append(f"--config {path}: unknown key {key!r}{hint}")
            elif isinstance(value, dict):
                self._problems.append(f"--config {path}: {key}: expected a value or a list")
            elif value is True:
                flags.append(flag)
            elif isinstance(value, list):
                flags += [flag, *map(str, value)]
            elif value is not None and value is not False:
                flags.append(f"{flag}={value}")
        return flags

    def error(self, message: str) -> NoReturn:
        """argparse's own error, with the problems so far, as UserError."""
        raise UserError(*dict.fromkeys([*self._problems, message]))


def words_of(config: Any) -> list[str]:
    """The words of a command line that give this configuration: its fields that differ from their defaults, in order.

    Fields whose metadata says `positional` come first, without a flag. ValueError when a field is empty and its default
    is not: no word says that.
    """
    first: list[str] = []
    words: list[str] = []
    for option in dataclasses.fields(config):
        value = getattr(config, option.name)
        if value == option.default:
            continue
        values = [str(item) for item in value] if isinstance(value, tuple) else [str(value)]
        if value is None or value is False or not values:
            raise ValueError(f"--{option.name}: no word on a command line gives {value!r}")
        if option.metadata.get("positional"):
            first += values
        elif value is True:
            words.append(f"--{option.name}")
        elif len(values) == 1 and values[0].startswith("-"):
            words.append(f"--{option.name}={values[0]}")
        else:
            words += [f"--{option.name}", *values]
    return first + words


def no_names(words: Iterable[object]) -> list[str]:
    """A problem for each word that cannot be a file name: not UTF-8 (records and manifests are UTF-8, so they could not
    name such a file), with a NUL (from a --config file), or too long. Also if the working directory is not UTF-8."""
    lines = []
    for word in map(str, words):
        if not is_utf8(word):
            lines.append(f"{word}: not UTF-8; rename the file or folder")
        elif "\0" in word:
            lines.append(f"{word}: contains a NUL character")
        elif not word.startswith("{") and max(map(len, os.fsencode(word).split(b"/"))) > 255:
            lines.append(f"{word[:40]}…: longer than a file name can be")
    if not is_utf8(os.getcwd()):
        lines.append(f"{os.getcwd()}: this working directory's name is not UTF-8; rename it, or work elsewhere")
    return lines


def read_config(path: AnyPath, flag: str = "--config") -> dict[str, Any]:
    """The keys and values of a JSON or YAML file, given by `flag`. UserError if it is neither, or not a mapping."""
    try:
        if not os.path.isfile(path):  # reading a pipe might never end
            raise UserError(f"{flag} {path}: {'not a file' if os.path.exists(path) else 'no such file'}")
        raw = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be read ({error.strerror})") from None
    kind = "JSON" if Path(path).suffix == ".json" else "YAML"
    try:
        if kind == "JSON":
            content = strict_json.parse(raw)
        else:
            import yaml

            content = yaml.safe_load(raw.decode())
    except Exception as error:  # yaml's and json's errors have no common class
        raise UserError(f"{flag} {path}: not {kind} ({' '.join(str(error).split())})") from None
    content = {} if content is None else content  # an empty YAML file
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{flag} {path}: expected a mapping of keys to values")
    return content


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The flags of every script that loads a model."""

    dtype: str = "auto"
    device_map: str | None = None
    revision: str | None = None
    dry_run: bool = False
    seed: int = 3407


@dataclass(frozen=True, kw_only=True)
class MeasuringConfig(ModelConfig):
    """The flags of every script that only runs a model. model_parallel: number of ranks that hold it between them."""

    model_parallel: int = 1


@dataclass(frozen=True, kw_only=True)
class EngineConfig(MeasuringConfig):
    """Of those that sample answers. engine: what draws them."""

    engine: str = "transformers"


@dataclass(frozen=True, kw_only=True)
class QuantizedConfig(ModelConfig):
    """Of those that can load its base in fewer bits."""

    quantization: str | None = None


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
    """argparse type: a seed that every library accepts, 0 … 2³² − 1."""
    value = _number(int, text, "a whole number")
    if not 0 <= value < 1 << 32:
        raise argparse.ArgumentTypeError(f"must be 0 to 4294967295, got {text}")
    return value


def device_map(text: str) -> str:
    """argparse type: a one-word device_map of transformers."""
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


def add_model_flags(parser: Parser, seed_help: str = "random seed") -> None:
    """The flags of `ModelConfig`: --dtype --device_map --revision --dry_run --seed; of a `QuantizedConfig` also
    --quantization."""
    add = parser.add_argument
    words = "auto: float32 on CPU; on a GPU bfloat16 if supported, else float16"
    add("--dtype", choices=DTYPES, help=words)
    words = "passed to transformers ('auto' spreads one model over all GPUs); None: one device per process"
    add("--device_map", type=device_map, help=words)
    if "quantization" in parser.defaults:
        words = "load the (base) model's linear layers in 4 or 8 bits, with bitsandbytes"
        add("--quantization", choices=QUANTIZATIONS, help=words)
    add("--revision", help="branch, tag or commit of a hub model")
    add("--dry_run", action="store_true", help="check every argument and file, print the plan, load no model")
    add("--seed", type=seed, help=seed_help)


def add_parallel_flag(parser: Parser) -> None:
    """The flag of `MeasuringConfig`."""
    words = "under torchrun: spread the model over groups of this many processes, for models larger than one GPU"
    parser.add_argument("--model_parallel", metavar="M", type=positive_int, help=words)


def add_engine_flag(parser: Parser) -> None:
    """The flag of `EngineConfig`."""
    words = "what draws the answers; vllm: for GPU nodes, its draws depend on its own batching"
    parser.add_argument("--engine", choices=("transformers", "vllm"), help=words)


def add_base_model(parser: Parser, adapters: str = "an adapter") -> None:
    """--base_model, where a base has moved since its adapter was trained."""
    parser.add_argument("--base_model", help=f"base of {adapters}, overriding adapter_config.json")


def add_columns(parser: Parser) -> None:
    """--columns."""
    words = "fields to rename, e.g. text=body prompt=question"
    parser.add_argument("--columns", nargs="+", action="extend", metavar="NEW=OLD", help=words)


def add_row_flags(parser: Parser) -> None:
    """--chat_template, --columns, --split and --data_config: how the rows of a data file are read."""
    words = "for chat rows: a Jinja file, or chatml (default: the tokenizer's own)"
    parser.add_argument("--chat_template", metavar="FILE", help=words)
    add_columns(parser)
    words = "of a data set on the hub given by its name (default: train; NAME:SPLIT overrides it for one file)"
    parser.add_argument("--split", help=words)
    parser.add_argument(
        "--data_config", metavar="NAME", help="of a data set on the hub that has several configurations"
    )


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """--dry_run for a script that loads no model."""
    parser.add_argument(
        "--dry_run", action="store_true", help="check every argument and file, print the plan, write nothing"
    )
