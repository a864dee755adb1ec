"""Every result file below some directories → one tidy table (a Row a number) with the line each number came from.

Files of the toolkit and of the released System P tool (lines with matches, model, temperature, top_k only) are read.
What cannot be read is kept as Damage, never skipped in silence. No text of a data set or an answer is read here.
"""

import json
import math
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path

from common.cli import is_utf8, one_line

HEADLINE_TEMPERATURE = 0.2  # fixed in advance; greedy stands beside it
GREEDY_BELOW = 0.01
HEADLINE_ATTACK = "ref"
MEASURES = ("matches", "exact", "local_part", "domain", "no_pattern")
TREE = re.compile(r"(?P<tag>[^/]+)/(?P<decay>[0-9.e+-]+)_(?P<rate>[0-9.]+(?:e[+-]?\d+)?)(?:-(?P<name>[^/]+))?$")
TAG = re.compile(r"(?P<data>.+?)-(?P<peft>lora|dora|pissa|full)(?:-dp-(?P<noise>eps|sigma)(?P<amount>[^/]+))?$")
CHECKPOINT = re.compile(r"checkpoint-(\d+)$")
KINDS = {
    "extraction": re.compile(r"results_purified\d*\.?jsonl$"),  # the released tool writes results_purified1jsonl too
    "perplexity": re.compile(r"perplexity\.jsonl$"),
    "perplexity_text": re.compile(r"perplexity\.txt$"),
    "mia": re.compile(r"results_mia\.jsonl$"),
    "canary": re.compile(r"results_canary\.jsonl$"),
    "fidelity": re.compile(r"results_fidelity\.json$"),
    "utility": re.compile(r"results_utility\.jsonl$"),
    "importance": re.compile(r"feature_importance\.json$"),
    "human": re.compile(r"human_evaluation\.json$"),
    "run": re.compile(r"run(_(?!plot_results)\w+)?\.json$"),
    "metrics": re.compile(r"metrics\.jsonl$"),
    "privacy": re.compile(r"privacy\.json$"),
    "adapter": re.compile(r"adapter_config\.json$"),
    "responses": re.compile(r"results_purified\d*_rows\.jsonl$"),
}
LEFT_OUT = {"mia_cache", "private", "__pycache__"}  # folders that hold no results
UNEXPECTED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)  # of content of another form
CURVES = ("loss", "eval_loss", "grad_norm")


@dataclass
class Model:
    """One measured model. `key` is its path; `label` is unique in a study and set when all files are read."""

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
    origin: str = ""  # key of the checkpoint whose weights it has: itself, or what was merged
    label: str = ""

    @property
    def is_base(self) -> bool:
        return self.arm == "base"


@dataclass(slots=True)
class Row:
    """One number. `low`, `high` are the ends of `interval`; `n` what it is over; `file`, `line` where it stands."""

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
    group: str | None = None  # numbers of one group may be compared: same rows, prompts and settings
    template: str | None = None
    temperature: float | None = None
    attack: str | None = None
    level: str | None = None
    repetitions: int | None = None
    seed: int | None = None
    headline: bool = False
    settings: dict = field(default_factory=dict)
    file: str = ""
    line: int = 1
    shown: bool = False  # a table of the page has it

    @property
    def source(self) -> str:
        return f"{self.file}:{self.line}"


COLUMNS = [one.name for one in fields(Row) if one.name != "shown"]
ROW_NUMBERS = ("value", "low", "high", "count", "n", "n_requested", "n_dropped", "temperature", "repetitions")
ROW_TEXTS = ("arm", "interval", "undefined", "template", "attack", "level")
MODEL_TEXTS = ("arm", "base", "peft_type", "run_name")
MODEL_COLUMNS = [one.name for one in fields(Model) if one.name not in ("label", "arm", "key", "last", "origin")]


@dataclass
class Damage:
    """A line or file that could not be read. `torn`: the unfinished last line of a file that is still appended to."""

    file: str
    line: int
    reason: str
    torn: bool = False


@dataclass
class Study:
    """All that was found. Paths are shown relative to `root`."""

    root: Path
    rows: list[Row] = field(default_factory=list)
    models: dict[str, Model] = field(default_factory=dict)
    runs: dict[str, dict] = field(default_factory=dict)  # path of run.json → content
    curves: dict[str, list[dict]] = field(default_factory=dict)  # run directory → lines of metrics.jsonl
    scores: dict[str, Path] = field(default_factory=dict)  # results_mia.jsonl, shown → its scores_mia.jsonl
    lines: dict[str, list[tuple[str, int, dict]]] = field(default_factory=dict)  # kind → (file, line, content)
    files: dict[str, list[Path]] = field(default_factory=dict)
    groups: dict[str, dict[str, dict]] = field(default_factory=dict)  # area → label → settings
    damage: list[Damage] = field(default_factory=list)
    index: dict = field(default_factory=dict)

    def shown(self, path) -> str:
        return literal(os.path.relpath(path, self.root))

    @contextmanager
    def guard(self, file: str, line: int = 1):
        """What the content of this file raises inside becomes Damage with the exception's type and message."""
        try:
            yield
        except UNEXPECTED as error:
            self.damage.append(Damage(file, line, f"not of the expected form ({error!r})"))

    def select(self, area: str, metric: str | None = None, **wanted) -> list[Row]:
        """Rows of an area (and metric) whose attributes equal `wanted`; a callable value is a test."""
        if not self.index:
            for row in self.rows:
                self.index.setdefault((row.area, None), []).append(row)
                self.index.setdefault((row.area, row.metric), []).append(row)
        found = self.index.get((area, metric), [])
        for name, value in wanted.items():
            test = value if callable(value) else value.__eq__
            found = [row for row in found if test(getattr(row, name)) is True]
        return found


def literal(text: str) -> str:
    """`text` on one line: control characters, halves of surrogate pairs and what turns the reading direction as \\x07,
    \\ud800, …: no font has them, and UTF-8 not all of them."""
    odd = r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
    return re.sub(odd, lambda found: found[0].encode("unicode_escape").decode(), text)


# ---------------------------------------------------------------- files


def readable(path: Path, study: Study) -> bool:
    """Whether a result file is a file, with a name that can be shown; what is not goes to study.damage."""
    reason = None if path.is_file() else "not a file"
    if not is_utf8(str(path)):
        reason = "its name, or a folder's above it, is not UTF-8; rename it"
    if reason:
        study.damage.append(Damage(one_line(study.shown(path)), 1, reason))
    return not reason


def find(directories: list[Path], output: Path | None = None) -> dict[str, list[Path]]:
    """{kind: sorted paths} of the result files below `directories`; nothing below `output`, nothing hidden."""
    from common.checkpoints import natural_key

    found: dict[str, dict[Path, Path]] = {kind: {} for kind in KINDS}  # true path → path; a linked file is read once
    for directory in directories:
        for folder, folders, names in os.walk(directory):
            inside = Path(folder)
            folders[:] = sorted(
                name
                for name in folders
                if not name.startswith(".") and name not in LEFT_OUT and Path(os.path.realpath(inside / name)) != output
            )
            for name in names:
                for kind, pattern in KINDS.items():
                    if pattern.fullmatch(name):
                        path, true = inside / name, Path(os.path.realpath(inside / name))
                        found[kind][true] = true if path == true else found[kind].get(true, path)

    def order(path: Path) -> tuple:  # results_purified.jsonl before results_purified1.jsonl, the newer one
        return natural_key(path.parent), len(path.name), path.name

    return {kind: sorted(paths.values(), key=order) for kind, paths in found.items()}


def _constant(text: str):
    return None if text == "NaN" else float(text.replace("Infinity", "inf"))


def parse(path: Path, study: Study) -> list[tuple[int, dict]]:
    """[(line number from 1, object)] of a .json or .jsonl file; what is broken goes to study.damage."""
    shown, raw = study.shown(path), path.read_bytes()
    if not raw.strip():
        study.damage.append(Damage(shown, 1, "empty: the measurement it was made for never finished"))
        return []
    whole = path.suffix == ".json"
    pieces = [raw] if whole else raw.split(b"\n")
    found = []
    for number, piece in enumerate(pieces, 1):
        if not piece.strip():
            continue
        try:
            item = json.loads(piece, parse_constant=_constant)
        except (ValueError, RecursionError) as error:
            torn = number == len(pieces) and path.name == "metrics.jsonl"
            study.damage.append(Damage(shown, number, f"not JSON ({error})", torn))
            continue
        if isinstance(item, dict):
            found.append((number, item))
        else:
            study.damage.append(Damage(shown, number, f"a JSON {type(item).__name__}, not an object"))
    return found


def check(content, names, kind=float) -> None:
    """TypeError where `content`, an object or a Row, has something but null or a `kind` at one of `names`.

    float: any number; ValueError for an infinite one, which no figure has a place for.
    """
    for name in names:
        value = content.get(name) if isinstance(content, dict) else getattr(content, name)
        number = kind is float and isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not number and (kind is float or not isinstance(value, kind)):
            raise TypeError(f"{name}: a {type(value).__name__} where a {kind.__name__} belongs")
        if number and not math.isfinite(value):
            raise ValueError(f"{name}: {value}")


def need(content: dict, *names: str, kind=float) -> None:
    """As `check`; null is a TypeError too, and absence a KeyError."""
    check(content, names, kind)
    for name in names:
        if content[name] is None:
            raise TypeError(f"{name}: null where a {kind.__name__} belongs")


def check_run(run: dict) -> None:
    """UNEXPECTED where a run file holds another form of what a report uses of it."""
    args = run.get("args", {})
    check(run, ("status", "commit", "data_tag"), str)
    check(run, ("steps", "seconds", "tokens_per_second", "relative_change"))
    check(run, ("peak_memory", "packages", "dataset_inference"), dict)
    check(run, ("argv",), list)
    check(run.get("peak_memory") or {}, ("cpu_bytes", "gpu_bytes"))
    check(args, args.keys() & {"peft_type", "run_name"}, str)
    if run.get("steps") is not None:  # a training run
        check(args, ("epochs",))
    for found in (run.get("dataset_inference") or {}).values():
        if found:
            need(found, "n_members")
            check({name: found[name] for name in ("p", "t")}, ("p", "t"))


def check_line(line: dict) -> None:
    """UNEXPECTED where a result line holds another form of what stands beside its numbers."""
    check(line, ("relative_change", "ceiling", "sample_rate", "delta", "upper"))
    check(line, ("model", "base_model", "model_sha256", "void"), str)
    for flag in line.get("flags", []):
        need({"flag": flag}, "flag", kind=str)
    need(line, *(line.keys() & {"arm", "attack"}), kind=str)
    if line.get("mcnemar_against_real"):
        need(line["mcnemar_against_real"], "gained", "lost", "p")


def make_literal(item: Model | Row, names) -> None:
    """The texts of `item` that tables and figures show, each as `literal` has it."""
    for name in names:
        text = getattr(item, name)
        if text:
            setattr(item, name, literal(text))


def check_row(row: Row) -> None:
    check(row, ROW_NUMBERS)
    check(row, ROW_TEXTS, str)
    if (row.low is None) != (row.high is None):
        raise ValueError(f"{row.metric}: an interval with one end")


def curve(path: Path, study: Study) -> list[dict]:
    """The lines of a metrics.jsonl; one with another thing where a number belongs is damage, an infinity is a gap."""
    lines = []
    for number, line in parse(path, study) if path.stat().st_size else ():
        with study.guard(study.shown(path), number):
            line = {name: None if value in ("inf", "-inf") else value for name, value in line.items()}
            need(line, "step")
            check(line, CURVES)
            lines.append(line)
    return lines


def scores_of(path: Path, study: Study) -> Path | None:
    """The scores beside a results_mia.jsonl; None, and damage, when they are not all of the texts of its lines."""
    file, shown = path.parent / "scores_mia.jsonl", study.shown(path)
    wanted = {line["n_requested"] for name, _, line in study.lines.get("mia", []) if name == shown}
    if not file.is_file() or not wanted:
        return None
    before = len(study.damage)
    found = parse(file, study)
    if len(study.damage) == before and wanted != {len(found)}:
        reason = f"scores of {len(found):,} texts beside results over {', '.join(sorted(map(str, wanted)))}"
        study.damage.append(Damage(study.shown(file), len(found), reason))
    return file if len(study.damage) == before else None


# ---------------------------------------------------------------- models


class Models:
    """Finds the Model of a result line. `folders`: the checkpoint directories that exist below the directories."""

    def __init__(self, study: Study, folders: set[Path]):
        self.study, self.bases = study, set()
        self.siblings: dict[Path, list[Path]] = {}
        for folder in sorted(folders, key=lambda path: int(CHECKPOINT.search(path.name)[1])):
            self.siblings.setdefault(folder.parent, []).append(folder)
        self.by_tail: dict[tuple, list[Path]] = {}
        for folder in folders:
            self.by_tail.setdefault(folder.parts[-4:], []).append(folder)
        for path, content in study.runs.items():
            if Path(path).name == "run.json" and content.get("args", {}).get("model"):
                self.bases.add(str(content["args"]["model"]))
        for run in self.siblings:
            self.bases.add(run.parent.parent.name)

    def resolve(self, name, file: Path) -> Path | str:
        """The checkpoint directory that a line means: the one it lies in, or the one named, also in a moved tree."""
        if CHECKPOINT.fullmatch(file.parent.name):
            return file.parent
        if name is None:
            return file.parent
        path = Path(str(name))
        same = self.by_tail.get(path.absolute().parts[-4:], [])
        if not CHECKPOINT.fullmatch(path.name) or not same:
            return str(name)
        return max(same, key=lambda folder: len(os.path.commonpath([folder.absolute(), file.absolute()])))

    def of(self, name, file: Path, base=None) -> Model:
        target = self.resolve(name, file)
        key = str(target)
        if key in self.study.models:
            return self.study.models[key]
        model = Model(key, origin=key)
        if CHECKPOINT.fullmatch(Path(key).name):
            self.describe(model, Path(key))
        else:
            last = Path(key).name
            known = {one for base in self.bases for one in (base, Path(base).name)}
            model.arm = "base" if key == str(base) or key in self.bases or last in known else last
            model.base = last if model.arm == "base" else Path(str(base)).name if base else ""
            model.run = key
            merge = self.study.runs.get(str(Path(key) / "run_merge_peft.json"), {})
            if merge.get("args", {}).get("model"):
                model.origin = str(self.resolve(merge["args"]["model"], Path(key) / "run_merge_peft.json"))
                model.change = merge.get("relative_change")
        self.study.models[key] = model
        return model

    def describe(self, model: Model, folder: Path) -> None:
        """Everything that the run's run.json or, without one, its place in the tree says."""
        run = folder.parent
        model.run, model.step = str(run), int(CHECKPOINT.search(folder.name)[1])
        content = self.study.runs.get(str(run / "run.json"), {})
        args = content.get("args", {})
        place = TREE.search(run.as_posix())
        tag = TAG.fullmatch(place["tag"]) if place else None
        data = content.get("data_tag") or (tag["data"] if tag else place["tag"] if place else run.name)
        noise = f", DP {'ε' if tag['noise'] == 'eps' else 'σ'} = {tag['amount']}" if tag and tag["noise"] else ""
        model.arm = data + noise
        model.base = Path(str(args["model"])).name if args.get("model") else run.parent.parent.name if place else ""
        model.peft_type = args.get("peft_type") or (tag["peft"] if tag else None)
        rate, decay = (place["rate"], place["decay"]) if place else (None, None)
        model.learning_rate = as_float(rate if args.get("learning_rate") is None else args["learning_rate"])
        model.weight_decay = as_float(decay if args.get("weight_decay") is None else args["weight_decay"])
        model.run_name = args.get("run_name") or (place["name"] if place else None)
        siblings = self.siblings.get(run, [folder])
        model.last = folder == siblings[-1] if folder in siblings else True
        model.change = content.get("relative_change") if model.last else None
        if content.get("steps") and args.get("epochs"):
            model.epoch = round(model.step * args["epochs"] / content["steps"], 2)
        elif folder in siblings:
            model.epoch = float(siblings.index(folder) + 1)  # one checkpoint an epoch


def as_float(value) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def short_arm(arm: str, arms: set[str]) -> str:
    """'self-generated-pythia-12b' → 'generated', where no other generator's arm stands beside it."""
    for long, short in (("self-generated-", "generated"), ("self-instruct-", "self-instruct")):
        if arm.startswith(long):
            data, comma, noise = arm.partition(",")
            others = {one.partition(",")[0] for one in arms if one.startswith(long)}
            return (short if len(others) == 1 else f"{short} ({data.removeprefix(long)})") + comma + noise
    return arm


def name_models(models: list[Model]) -> None:
    """Set `label`: arm, then only what differs between models; unique."""
    arms = {model.arm for model in models}

    def differ(name: str) -> bool:
        return len({getattr(model, name) for model in models if not model.is_base} - {None, ""}) > 1

    shown = {name: differ(name) for name in ("base", "peft_type", "learning_rate", "weight_decay", "run_name")}
    shown["base"] = len({model.base for model in models} - {""}) > 1
    for model in models:
        model.arm = short_arm(model.arm, arms)
    for model in models:
        parts = [model.arm]
        if shown["base"] and model.base and model.base != model.arm:
            parts.insert(0, model.base)
        if not model.is_base:
            parts += [model.peft_type] if shown["peft_type"] and model.peft_type else []
            parts += [f"lr {model.learning_rate:g}"] if shown["learning_rate"] and model.learning_rate else []
            parts += [f"wd {model.weight_decay:g}"] if shown["weight_decay"] and model.weight_decay is not None else []
            parts += [model.run_name] if shown["run_name"] and model.run_name else []
            parts += [f"epoch {model.epoch:g}"] if model.epoch is not None else []
        model.label = " · ".join(parts)
    taken: dict[str, list[Model]] = {}
    for model in models:
        taken.setdefault(model.label, []).append(model)
    for label, same in taken.items():
        for model in same if len(same) > 1 else ():
            model.label = f"{label} · {literal(model.key)}"


def fixed_models(models: list[Model]) -> tuple[list[Model], float | None]:
    """(of each arm the last checkpoint at one learning rate: that of most runs, the smallest of equals; the rate, None
    where all have the same). An arm without a run there: its smallest rate. Nothing measured enters the choice.
    """
    last = [model for model in models if model.last]
    rates = [model.learning_rate for model in last if model.learning_rate is not None]
    fixed = min(set(rates), key=lambda rate: (-rates.count(rate), rate)) if rates else None
    arms: dict[tuple, list[Model]] = {}
    for model in last:
        arms.setdefault((model.base, model.arm, model.peft_type, model.run_name), []).append(model)
    chosen = []
    for runs in arms.values():
        own = [model for model in runs if model.learning_rate == fixed]
        chosen += own or [min(runs, key=lambda model: model.learning_rate or 0)]
    return chosen, fixed if len(set(rates)) > 1 else None


def side_by_side(study: Study) -> dict[tuple, dict[str, Model]]:
    """{(area, group, base): {key: trained model}}: whose numbers stand beside each other; each ε alone."""
    found: dict[tuple, dict[str, Model]] = {}
    for row in study.rows:
        if row.model and row.model.step is not None and row.role == "target":
            group = row.model.key if row.area == "privacy" else row.group
            found.setdefault((row.area, group, row.model.base), {})[row.model.key] = row.model
    return found


def choose(study: Study) -> tuple[list[Model], str, list[str]]:
    """(models compared in headlines, the rule in words, what is compared at different learning rates all the same).

    Every base, and `fixed_models` of each set of models that some group of numbers joins.
    """
    beside = side_by_side(study)
    sets: list[dict[str, Model]] = []
    for own in beside.values():
        joined = [one for one in sets if one.keys() & own.keys()]
        sets = [
            *(one for one in sets if one not in joined),
            {key: model for one in (*joined, own) for key, model in one.items()},
        ]
    chosen, rates = [model for model in study.models.values() if model.step is None], []
    for models in sets:
        fixed, rate = fixed_models(list(models.values()))
        chosen, rates = chosen + fixed, rates + [rate] * (rate is not None)
    mixed = []
    for (_, group, _), models in beside.items():
        at = {model.label: model.learning_rate for model in chosen if model.key in models}
        if len(set(at.values()) - {None}) > 1:
            mixed.append(
                f"{group}: "
                + ", ".join(
                    f"{label} at {'an unknown rate' if rate is None else f'{rate:g}'}" for label, rate in at.items()
                )
            )
    words = " or ".join(f"{rate:g}" for rate in sorted(set(rates)))
    said = f" at learning rate {words} (that of most runs, the smallest of equals)" if rates else ""
    return chosen, "the last checkpoint of each run" + said, list(dict.fromkeys(mixed))


# ---------------------------------------------------------------- all of it


def read(directories: list[Path], output: Path | None = None) -> Study:
    """The Study below `directories` (existing); nothing below `output` is read."""
    from reporting import canary, parsers

    directories = [Path(directory).resolve() for directory in directories]  # however it is called, a run is read once
    study = Study(Path(os.path.commonpath(directories)))
    found = find(directories, Path(os.path.realpath(output)) if output else None)
    study.files = {kind: [path for path in paths if readable(path, study)] for kind, paths in found.items()}
    for path in study.files["run"]:
        for number, content in parse(path, study):
            with study.guard(study.shown(path), number):
                check_run(content)
                study.runs[str(path)] = content
    inside = [path.parent for paths in study.files.values() for path in paths]
    models = Models(study, {folder for folder in inside if CHECKPOINT.fullmatch(folder.name)})
    converters = {
        "extraction": parsers.extraction_rows,
        "perplexity": parsers.perplexity_rows,
        "mia": parsers.mia_rows,
        "canary": canary.rows,
        "fidelity": parsers.fidelity_rows,
        "utility": parsers.utility_rows,
        "importance": parsers.importance_rows,
        "human": parsers.human_rows,
        "privacy": parsers.privacy_rows,
    }
    for kind, convert in converters.items():
        for path in study.files[kind]:
            for number, line in parse(path, study):
                shown = study.shown(path)
                with study.guard(shown, number):
                    check_line(line)
                    made = convert(line, study, models, path, number)
                    for row in made:
                        check_row(row)
                        row.file, row.line = shown, number
                        row.arm = row.arm or (row.model.arm if row.model else None)
                        if row.model and line.get("relative_change") is not None:
                            known = [one for one in (row.model.change, line["relative_change"]) if one is not None]
                            row.model.change = min(known)
                    study.rows += made
                    study.lines.setdefault(kind, []).append((shown, number, line))
            scores = scores_of(path, study) if kind == "mia" else None
            if scores:
                study.scores[study.shown(path)] = scores
    for path in study.files["perplexity_text"]:
        if not (path.parent / "perplexity.jsonl").exists():
            parsers.text_perplexity(path, study, models)
    for path in study.files["metrics"]:
        study.curves[str(path.parent)] = curve(path, study)
    for path in study.files["adapter"]:
        if CHECKPOINT.fullmatch(path.parent.name):
            models.of(None, path)
            study.lines.setdefault("adapter", []).extend((study.shown(path), n, one) for n, one in parse(path, study))
    for model in study.models.values():
        make_literal(model, MODEL_TEXTS)
    name_models(list(study.models.values()))
    for row in study.rows:
        row.arm = row.model.arm if row.model else row.arm
        make_literal(row, ("metric", *ROW_TEXTS))
    newest(study)
    return study


def newest(study: Study) -> None:
    """Where a model was measured twice with the same settings, keep the rows of the newest file; note the others."""
    last: dict[tuple, str] = {}

    def key(row: Row) -> tuple:
        return row.area, row.metric, row.model.key, row.group, row.template, row.temperature, row.attack, row.level

    rows = [row for row in study.rows if row.model and row.area in ("extraction", "perplexity", "mia")]
    order = {study.shown(path): place for kind in study.files.values() for place, path in enumerate(kind)}
    for row in rows:
        if row.role in ("target",):
            last[key(row)] = max(last.get(key(row), row.source), row.source, key=lambda s: _place(s, order))
    older = {id(row) for row in rows if row.role == "target" and last[key(row)] != row.source}
    sources = {row.source for row in rows if id(row) in older}
    study.lines["superseded"] = [(source.rpartition(":")[0], int(source.rpartition(":")[2]), {}) for source in sources]
    study.rows = [row for row in study.rows if row.source not in sources]


def _place(source: str, order: dict[str, int]) -> tuple:
    file, _, line = source.rpartition(":")
    return order.get(file, -1), int(line)


def table(study: Study):
    """Header and rows of results.csv: a number a row, the model's columns after those of the number."""
    yield [*COLUMNS, *MODEL_COLUMNS]
    for row in study.rows:
        values = {name: getattr(row, name) for name in COLUMNS}
        values["model"] = row.model.label if row.model else None
        values["settings"] = json.dumps(row.settings, ensure_ascii=False, default=str) if row.settings else None
        cells = [values[name] for name in COLUMNS] + [getattr(row.model, name, None) for name in MODEL_COLUMNS]
        yield [literal(cell) if isinstance(cell, str) else cell for cell in cells]
