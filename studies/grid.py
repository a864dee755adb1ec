"""A sweep of settings: the cells of a grid, the calls of each, its line of results, and means over seeds.

A cell is one fine-tuning run: run_peft.py → evaluate_purified.py, perplexity.py and mia.py on its last checkpoint.
Every step is a process of its own, so that a cell is the same wherever it runs; each resumes its own work.
"""

from __future__ import annotations

import itertools
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from common import cli, json_files, publication, results, stats, strict_json
from common.checkpoints import find_checkpoints
from common.problems import Problems, UserError
from common.schema import HEADLINE_ATTACK, HEADLINE_TEMPERATURE
from extraction.config import EvaluateConfig
from mia.config import MiaConfig
from perplexity.config import PerplexityConfig
from training.config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
CELL_FILE = "cell.json"
AXES = {
    "models": "model",
    "data": "data",
    "peft_types": "peft_type",
    "learning_rates": "learning_rate",
    "seeds": "seed",
}
STEPS = {  # step: (its script, its configuration, the flags that the cell sets)
    "run_peft": ("run_peft.py", TrainConfig, {"model", "input", "peft_type", "learning_rate", "seed", "output_root"}),
    "evaluate": ("evaluate_purified.py", EvaluateConfig, {"model", "dataset"}),
    "perplexity": ("perplexity/perplexity.py", PerplexityConfig, {"model", "dir", "dataset", "output_dir"}),
    "mia": ("mia/mia.py", MiaConfig, {"model", "dir", "members", "output_dir"}),
}
SHARES = ("exact", "matches", "auc", "tpr_at_1")  # between 0 and 1
METRICS = ("exact", "matches", "perplexity", "auc", "tpr_at_1")


@dataclass(frozen=True)
class Cell:
    """One fine-tuning run."""

    model: str
    data: str
    peft_type: str
    learning_rate: float
    seed: int

    @property
    def arm(self) -> str:
        """Its settings without the seed."""
        return f"{Path(self.model).name}, {Path(self.data).stem}, {self.peft_type}, lr {self.learning_rate:g}"

    @property
    def name(self) -> str:
        """Of its folder."""
        words = (Path(self.model).name, Path(self.data).stem, self.peft_type, f"{self.learning_rate:g}")
        return f"{'-'.join(words)}-seed{self.seed}"


@dataclass(frozen=True)
class Sweep:
    """launch: the words before each script; options: flags of each step."""

    cells: list[Cell]
    launch: list[str]
    options: dict[str, dict[str, Any]]


def read(path: str) -> Sweep:
    """The sweep in a YAML or JSON file; UserError with every problem."""
    content, problems = cli.read_config(path, "--sweep"), Problems()
    for key in content.keys() - {*AXES, *STEPS, "launch"}:
        problems.add(f"--sweep {path}: unknown key {key!r}; known are {', '.join([*AXES, *STEPS, 'launch'])}")
    axes: dict[str, list[Any]] = {}
    kinds: dict[str, tuple[type, ...]] = {"learning_rates": (int, float), "seeds": (int,)}
    for key in AXES:
        values, kind = content.get(key), kinds.get(key, (str,))
        values = values if isinstance(values, list) else []
        right = values and all(type(value) in kind for value in values)
        if not right:
            words = {"learning_rates": "numbers (write 1.0e-3, not 1e-3)", "seeds": "whole numbers"}.get(key, "words")
            problems.add(f"--sweep {path}: {key}: expected a list of {words}")
        elif len({repr(value) for value in values}) < len(values):
            problems.add(f"--sweep {path}: {key}: a value occurs twice")
        axes[key] = values
    options = {}
    for step, (script, config, own) in STEPS.items():
        given = content.get(step)
        given = {} if given is None else given
        if given is False and step != "run_peft":
            continue  # left out
        if not isinstance(given, dict):
            problems.add(
                f"--sweep {path}: {step}: expected flags of {script}{'' if step == 'run_peft' else ', or false'}"
            )
            continue
        known = {field.name for field in fields(config)} - own
        for key in given.keys() - known:
            problems.add(
                f"--sweep {path}: {step}: {key!r} is {'set by the sweep' if key in own else f'no flag of {script}'}"
            )
        options[step] = given
    launch = content.get("launch", "")
    if not isinstance(launch, str):
        problems.add(f"--sweep {path}: launch: expected the words of a launcher, e.g. torchrun --nproc_per_node=8")
    if not problems.lines:
        for name in axes["data"]:
            if not Path(name).is_file():
                problems.add(f"--sweep {path}: data: {name}: no such file")
    problems.check()
    cells = [Cell(*values) for values in itertools.product(*axes.values())]
    if len({cell.name for cell in cells}) < len(cells):
        raise UserError(f"--sweep {path}: two models or data files have the same name; rename one")
    return Sweep(cells, shlex.split(launch), options)


def words_of(options: dict[str, Any]) -> list[str]:
    """Flags as the words of a command line."""
    words: list[str] = []
    for key, value in options.items():
        if value is True:
            words.append(f"--{key}")
        elif isinstance(value, list):
            words += [f"--{key}", *map(str, value)]
        elif value is not None and value is not False:
            words.append(f"--{key}={value}")
    return words


def call(sweep: Sweep, step: str, own: dict[str, Any]) -> None:
    """Run one step; RuntimeError if it fails."""
    script = STEPS[step][0]
    words = words_of(own | sweep.options[step])
    print(f"\n$ {' '.join(sweep.launch) or 'python'} {script} {shlex.join(words)}", flush=True)
    launcher = sweep.launch or [sys.executable]
    done = subprocess.run([*launcher, str(ROOT / script), *words], check=False)
    if done.returncode:
        raise RuntimeError(f"{script} ended with status {done.returncode}")


def settings_of(cell: Cell, sweep: Sweep) -> dict[str, Any]:
    """What a finished cell must have been made with."""
    return {"cell": asdict(cell), "options": sweep.options, "data_sha256": results.sha256(cell.data)}


def finished(cell: Cell, sweep: Sweep, folder: Path) -> dict[str, Any] | None:
    """The line of a cell that is finished with these settings."""
    file = folder / cell.name / CELL_FILE
    if not file.is_file():
        return None
    stored = json_files.read_json(file, f"remove {file}")
    line: dict[str, Any] | None = stored.get("line")
    return line if stored.get("settings") == strict_json.plain(settings_of(cell, sweep)) else None


def run_cell(cell: Cell, sweep: Sweep, folder: Path) -> dict[str, Any]:
    """Run what is left of a cell below `folder`; its line, which is also in its cell.json."""
    if line := finished(cell, sweep, folder):
        return line
    own = folder / cell.name
    own.mkdir(parents=True, exist_ok=True)
    fixed: dict[str, Any] = {"model": cell.model, "input": cell.data, "peft_type": cell.peft_type}
    fixed |= {"learning_rate": cell.learning_rate, "seed": cell.seed, "output_root": own, "resume": True}
    call(sweep, "run_peft", fixed)
    last = find_checkpoints(own)[-1]
    if "evaluate" in sweep.options:
        call(sweep, "evaluate", {"model": last, "dataset": cell.data})
    if "perplexity" in sweep.options:
        call(sweep, "perplexity", {"dir": last, "dataset": cell.data, "output_dir": own})
    if "mia" in sweep.options:
        call(sweep, "mia", {"dir": last, "members": cell.data})
    line = {"arm": cell.arm, **asdict(cell), "checkpoint": str(last), **measured(sweep, own, last)}
    publication.write_json(own / CELL_FILE, {"settings": settings_of(cell, sweep), "line": line})
    return line


def measured(sweep: Sweep, own: Path, last: Path) -> dict[str, float | None]:
    """The headline numbers of a cell; None for what was left out or is undefined."""
    found: dict[str, float | None] = dict.fromkeys(METRICS)
    if "evaluate" in sweep.options:
        lines = {line["temperature"]: line for line in json_files.read_jsonl(last / "results_purified.jsonl")}
        line = lines.get(HEADLINE_TEMPERATURE) or lines[min(lines)]
        labels = [label for label in line["matches"] if label != "total"]
        for name in ("exact", "matches"):
            known = [line[name][label] for label in labels if line[name][label] is not None]
            found[name] = sum(known) / (len(known) * line[name]["total"]) if known else None
    if "perplexity" in sweep.options:
        found["perplexity"] = json_files.read_jsonl(own / "perplexity.jsonl")[-1]["mean"]
    if "mia" in sweep.options:
        attacks = {line["attack"]: line for line in json_files.read_jsonl(last / "results_mia.jsonl")}
        line = attacks.get(HEADLINE_ATTACK) or next(iter(attacks.values()))
        found["auc"] = line["auc"]
        found["tpr_at_1"] = (line["points"].get("0.01") or {}).get("tpr")
    return found


def means(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per arm: the mean of each number over seeds with its Student interval (None without a spread)."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        arms.setdefault(line["arm"], []).append(line)
    made = []
    for own in arms.values():
        line = {key: own[0][key] for key in ("arm", "model", "data", "peft_type", "learning_rate")}
        line |= {"seed": None, "seeds": [one["seed"] for one in own]}
        for metric in METRICS:
            values = [one[metric] for one in own if one[metric] is not None]
            low, high = (stats.student_interval(values) if len(set(values)) > 1 else None) or (None, None)
            if low is not None and high is not None and metric in SHARES:
                low, high = max(low, 0.0), min(high, 1.0)
            line[metric] = {"mean": stats.mean_or_none(values), "low": low, "high": high, "n": len(values)}
        made.append(line)
    return made


def said(line: dict[str, Any]) -> str:
    """The line of a finished cell in words."""
    forms = {"exact": "{:.1%}", "matches": "{:.1%}", "perplexity": "{:.4g}", "auc": "{:.3f}", "tpr_at_1": "{:.1%}"}
    numbers = [f"{name} {forms[name].format(line[name])}" for name in METRICS if line[name] is not None]
    return f"{line['arm']}, seed {line['seed']}: {', '.join(numbers)}"
