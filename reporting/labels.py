"""Name the models and arms of a report, from their paths and records."""

import os
import re
from pathlib import Path
from typing import Any

from reporting.table import Model, Study, literal

TREE = re.compile(r"(?P<tag>[^/]+)/(?P<decay>[0-9.e+-]+)_(?P<rate>[0-9.]+(?:e[+-]?\d+)?)(?:-(?P<name>[^/]+))?$")
TAG = re.compile(r"(?P<data>.+?)-(?P<peft>lora|dora|pissa|full)(?:-dp-(?P<noise>eps|sigma)(?P<amount>[^/]+))?$")
CHECKPOINT = re.compile(r"checkpoint-(\d+)$")


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint directory."""
    match = CHECKPOINT.search(folder.name)
    assert match
    return int(match[1])


class Models:
    """Finds the Model of a result line. `folders`: all checkpoint directories below the report's directories."""

    def __init__(self, study: Study, folders: set[Path]):
        self.study = study
        self.bases: set[str] = set()
        self.siblings: dict[Path, list[Path]] = {}
        for folder in sorted(folders, key=step_of):
            self.siblings.setdefault(folder.parent, []).append(folder)
        self.by_tail: dict[tuple[str, ...], list[Path]] = {}
        for folder in folders:
            self.by_tail.setdefault(folder.parts[-4:], []).append(folder)
        for path, content in study.runs.items():
            if Path(path).name == "run.json" and content.get("args", {}).get("model"):
                self.bases.add(str(content["args"]["model"]))
        for run in self.siblings:
            self.bases.add(run.parent.parent.name)

    def resolve(self, name: object, file: Path) -> Path | str:
        """The checkpoint directory that a line is about: the one it is in, or the named one, even if the tree moved."""
        if CHECKPOINT.fullmatch(file.parent.name):
            return file.parent
        if name is None:
            return file.parent
        path = Path(str(name))
        same = self.by_tail.get(path.absolute().parts[-4:], [])
        if not CHECKPOINT.fullmatch(path.name) or not same:
            return str(name)
        return max(same, key=lambda folder: len(os.path.commonpath([folder.absolute(), file.absolute()])))

    def of(self, name: object, file: Path, base: object = None) -> Model:
        target = self.resolve(name, file)
        key = str(target)
        if key in self.study.models:
            return self.study.models[key]
        model = Model(key, origin=key)
        if CHECKPOINT.fullmatch(Path(key).name):
            self.describe(model, Path(key))
        else:
            last = Path(key).name
            known = {name for base in self.bases for name in (base, Path(base).name)}
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
        """Fill in everything that the run's run.json or, without one, its path says."""
        run = folder.parent
        model.run, model.step = str(run), step_of(folder)
        content = self.study.runs.get(str(run / "run.json"), {})
        args = content.get("args", {})
        path = TREE.search(run.as_posix())
        tag = TAG.fullmatch(path["tag"]) if path else None
        data = content.get("data_tag") or (tag["data"] if tag else path["tag"] if path else run.name)
        noise = f", DP {'ε' if tag['noise'] == 'eps' else 'σ'} = {tag['amount']}" if tag and tag["noise"] else ""
        model.arm = data + noise
        model.base = Path(str(args["model"])).name if args.get("model") else run.parent.parent.name if path else ""
        model.peft_type = args.get("peft_type") or (tag["peft"] if tag else None)
        rate, decay = (path["rate"], path["decay"]) if path else (None, None)
        model.learning_rate = as_float(rate if args.get("learning_rate") is None else args["learning_rate"])
        model.weight_decay = as_float(decay if args.get("weight_decay") is None else args["weight_decay"])
        model.run_name = args.get("run_name") or (path["name"] if path else None)
        siblings = self.siblings.get(run, [folder])
        model.last = folder == siblings[-1] if folder in siblings else True
        model.change = content.get("relative_change") if model.last else None
        if content.get("steps") and args.get("epochs"):
            model.epoch = round(model.step * args["epochs"] / content["steps"], 2)
        elif folder in siblings:
            model.epoch = float(siblings.index(folder) + 1)  # one checkpoint per epoch


def as_float(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def same_arms(study: Study, models: Models) -> dict[str, str]:
    """{arm of a model: its name in the results of canaries and of synthetic text}, so that it has one colour.

    Known from the --models of run_canary.json and from the runs ARM-seedN of downstream.py.
    """
    same: dict[str, str] = {}
    for path, run in study.runs.items():
        if Path(path).name == "run_canary.json":
            for word in run.get("args", {}).get("models") or []:
                name, _, checkpoint = str(word).partition("=")
                model = study.models.get(str(models.resolve(checkpoint, Path(path))))
                if model and not model.is_base:
                    same.setdefault(model.arm, literal(name))
    known = {row.arm for row in study.rows if row.arm and row.area in ("utility", "canary", "fidelity")}
    for model in study.models.values():
        arm, seed, number = model.arm.rpartition("-seed")
        if seed and number.isdigit() and arm in known:
            same.setdefault(model.arm, arm)
    return same


def find_paired(study: Study) -> None:
    """Give each paired difference of study privacy the model that its summary.json names by its noise alone."""
    for row in study.rows:
        if row.area == "paired" and row.template and row.arm:
            noise = ", DP σ = 0" if row.arm.startswith("no noise") else f", DP {row.arm}"
            folder = (study.root / row.file).parent
            models = [
                model
                for model in study.models.values()
                if model.arm.endswith(noise) and folder in Path(model.run).parents and model.last
            ]
            if len(models) == 1:
                row.model = models[0]


def short_arm(arm: str, arms: set[str]) -> str:
    """'self-generated-pythia-12b' → 'generated', unless there is an arm of another generator."""
    for long, short in (("self-generated-", "generated"), ("self-instruct-", "self-instruct")):
        if arm.startswith(long):
            data, comma, noise = arm.partition(",")
            others = {other.partition(",")[0] for other in arms if other.startswith(long)}
            return (short if len(others) == 1 else f"{short} ({data.removeprefix(long)})") + comma + noise
    return arm


def name_models(models: list[Model]) -> None:
    """Set each model's unique `label`: the arm, then only what differs between models."""
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
    """(last checkpoint of each arm at a common learning rate; that rate, or None if all runs have the same).

    The rate is the most common one among runs, the smallest in a tie; an arm without a run at it uses its smallest
    rate. The choice does not depend on any measurement.
    """
    last = [model for model in models if model.last]
    rates = [model.learning_rate for model in last if model.learning_rate is not None]
    fixed = min(set(rates), key=lambda rate: (-rates.count(rate), rate)) if rates else None
    arms: dict[tuple[object, ...], list[Model]] = {}
    for model in last:
        arms.setdefault((model.base, model.arm, model.peft_type, model.run_name), []).append(model)
    chosen = []
    for runs in arms.values():
        own = [model for model in runs if model.learning_rate == fixed]
        chosen += own or [min(runs, key=lambda model: model.learning_rate or 0)]
    return chosen, fixed if len(set(rates)) > 1 else None
