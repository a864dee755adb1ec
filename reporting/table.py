"""The types of a report (models, rows of numbers, damage) and the checks of file contents."""

import math
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from common.problems import AnyPath

Record = dict[str, Any]  # an object of a result file

UNEXPECTED = (
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    ArithmeticError,
)  # raised by content of an unexpected form


@dataclass
class Model:
    """One measured model. `key` is its path; `label` is unique within a study and set after all files are read."""

    key: str
    arm: str = ""
    run: str = ""  # its run directory, as a path
    base: str = ""
    peft_type: str | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    step: int | None = None
    epoch: float | None = None
    run_name: str | None = None
    last: bool = True  # the last checkpoint of its run
    change: float | None = None  # ‖ΔW‖/‖W‖
    origin: str = ""  # key of the checkpoint whose weights it has: itself, or the merged adapter
    label: str = ""

    @property
    def is_base(self) -> bool:
        return self.arm == "base"


@dataclass(slots=True)
class Row:
    """One number. `low`, `high`: ends of its `interval`; `n`: sample size; `file`, `line`: where it was read."""

    area: str
    metric: str
    value: float | None
    low: float | None = None
    high: float | None = None
    interval: str | None = None
    count: int | None = None
    n: int | None = None
    n_requested: int | None = None
    n_dropped: int | None = None
    undefined: str | None = None
    model: Model | None = None
    arm: str | None = None
    role: str = "target"  # target | base | blind | floor | baseline
    group: str = ""  # numbers within a group are comparable: same rows, prompts and settings
    template: str | None = None
    temperature: float | None = None
    attack: str | None = None
    level: str | None = None
    repetitions: int | None = None
    seed: int | None = None
    headline: bool = False
    settings: Record = field(default_factory=dict)
    file: str = ""
    line: int = 1
    shown: bool = False  # whether a table of the page has it

    @property
    def source(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def measured(self) -> Model:
        """Its model, which every row of extraction, perplexity, membership inference and privacy has."""
        assert self.model is not None
        return self.model

    @property
    def number(self) -> float:
        """Its value, if the caller knows that it is defined."""
        assert self.value is not None
        return self.value


COLUMNS = [column.name for column in fields(Row) if column.name != "shown"]
ROW_NUMBERS = ("value", "low", "high", "count", "n", "n_requested", "n_dropped", "temperature", "repetitions")


ROW_TEXTS = ("arm", "interval", "undefined", "template", "attack", "level")
MODEL_TEXTS = ("arm", "base", "peft_type", "run_name")


MODEL_COLUMNS = [
    column.name for column in fields(Model) if column.name not in ("label", "arm", "key", "last", "origin")
]


@dataclass
class Damage:
    """A line or file that could not be read. `torn`: the incomplete last line of a log that may still be growing."""

    file: str
    line: int
    reason: str
    torn: bool = False


@dataclass
class Study:
    """Everything read from the result files. Paths are shown relative to `root`."""

    root: Path
    rows: list[Row] = field(default_factory=list)
    models: dict[str, Model] = field(default_factory=dict)
    runs: dict[str, Record] = field(default_factory=dict)  # path of run.json → content
    curves: dict[str, list[Record]] = field(default_factory=dict)  # run directory → lines of metrics.jsonl
    scores: dict[str, Path] = field(default_factory=dict)  # results_mia.jsonl, shown → its scores_mia.jsonl
    lines: dict[str, list[tuple[str, int, Record]]] = field(default_factory=dict)  # kind → (file, line, content)
    files: dict[str, list[Path]] = field(default_factory=dict)
    canaries: dict[str, Path] = field(
        default_factory=dict
    )  # results_canary.jsonl, shown → its results_canary_rows.jsonl
    same: dict[str, str] = field(default_factory=dict)  # arm of a model → the name that other files give it
    groups: dict[str, dict[str, Record]] = field(default_factory=dict)  # area → label → settings
    audits: list[tuple[str, Record]] = field(default_factory=list)  # (file, its content) of each audit.json
    damage: list[Damage] = field(default_factory=list)
    index: dict[tuple[str, str | None], list[Row]] = field(default_factory=dict)

    def shown(self, path: AnyPath) -> str:
        return literal(os.path.relpath(path, self.root))

    @contextmanager
    def guard(self, file: str, line: int = 1) -> Iterator[None]:
        """Turn an exception that this file's content raises into Damage with its type and message."""
        try:
            yield
        except UNEXPECTED as error:
            self.damage.append(Damage(file, line, f"not of the expected form ({error!r})"))

    def select(self, area: str, metric: str | None = None, **wanted: object) -> list[Row]:
        """Rows of an area (and metric) whose attributes equal `wanted`; a callable value is a predicate."""
        if not self.index:
            for row in self.rows:
                self.index.setdefault((row.area, None), []).append(row)
                self.index.setdefault((row.area, row.metric), []).append(row)
        rows = self.index.get((area, metric), [])
        for name, value in wanted.items():
            test = value if callable(value) else value.__eq__
            rows = [row for row in rows if test(getattr(row, name)) is True]
        return rows


def literal(text: str) -> str:
    """`text` on one line: control characters, lone surrogates and bidirectional controls are escaped as \\x07, \\ud800,
    …, because fonts have no glyphs for them and UTF-8 cannot encode all of them."""
    odd = r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
    return re.sub(odd, lambda match: match[0].encode("unicode_escape").decode(), text)


def check(content: Record | Row, names: Iterable[str], kind: type = float) -> None:
    """TypeError unless the values of `content` (a dict or a Row) at `names` are null or of type `kind`.

    float: any number; ValueError if it is infinite, which no figure could show.
    """
    for name in names:
        value: Any = content.get(name) if isinstance(content, dict) else getattr(content, name)
        number = kind is float and isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not number and (kind is float or not isinstance(value, kind)):
            raise TypeError(f"{name}: a {type(value).__name__} where a {kind.__name__} belongs")
        if number and not math.isfinite(value):
            raise ValueError(f"{name}: {value}")


def need(content: Record, *names: str, kind: type = float) -> None:
    """Like `check`, but null is a TypeError too, and a missing key a KeyError."""
    check(content, names, kind)
    for name in names:
        if content[name] is None:
            raise TypeError(f"{name}: null where a {kind.__name__} belongs")


def check_run(run: Record) -> None:
    """Raise one of UNEXPECTED if a field of a run file that the report uses has an unexpected form."""
    args = run.get("args", {})
    check(run, ("status", "commit", "data_tag"), str)
    check(run, ("steps", "seconds", "tokens_per_second", "relative_change"))
    check(run, ("peak_memory", "packages", "dataset_inference"), dict)
    check(run, ("argv",), list)
    check(run.get("peak_memory") or {}, ("cpu_bytes", "gpu_bytes"))
    check(args, args.keys() & {"peft_type", "run_name"}, str)
    if run.get("steps") is not None:  # a training run
        check(args, ("epochs",))
    for inference in (run.get("dataset_inference") or {}).values():
        if inference:
            need(inference, "n_members")
            check({name: inference[name] for name in ("p", "t")}, ("p", "t"))


def check_line(line: Record) -> None:
    """Raise one of UNEXPECTED if a field of a result line other than its numbers has an unexpected form."""
    check(line, ("relative_change", "ceiling", "sample_rate", "delta", "upper"))
    check(line, ("model", "base_model", "model_sha256", "void"), str)
    for flag in line.get("flags", []):
        need({"flag": flag}, "flag", kind=str)
    need(line, *(line.keys() & {"arm", "attack"}), kind=str)
    if line.get("mcnemar_against_real"):
        need(line["mcnemar_against_real"], "gained", "lost", "p")


def check_audit(audit: Record) -> None:
    """UNEXPECTED if an audit.json lacks what the page shows of it."""
    need(audit, "verdict", "model", kind=dict)
    need(audit["model"], "name", kind=str)
    need(audit["verdict"], "answer", "words", kind=str)
    for question in audit["verdict"]["questions"].values():
        need(question, "answer", "title", "measured", kind=str)
        check(question, ("p", "p_adjusted"))
        check(question, ("why",), str)


def make_literal(item: Model | Row, names: Iterable[str]) -> None:
    """Apply `literal` to the texts of `item` that tables and figures show."""
    for name in names:
        text = getattr(item, name)
        if text:
            setattr(item, name, literal(text))


def check_row(row: Row) -> None:
    check(row, ROW_NUMBERS)
    check(row, ROW_TEXTS, str)
    if (row.low is None) != (row.high is None):
        raise ValueError(f"{row.metric}: an interval with only one end")
