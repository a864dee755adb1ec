"""What every model is asked: people, prompts, the floor, settings. All known before a model is loaded."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from common import chat, dataset, formats, manifests, results
from common.problems import Problems, UserError
from common.schema import EXTRACTION_SETTINGS, MEASURES, outcomes_path
from extraction import metrics, prompts
from extraction.config import AttackConfig

if TYPE_CHECKING:
    from common.problems import AnyPath

NUM_ROWS = 1000
Question = tuple[str, list[str]]  # the prompt, the true texts that could follow it
Outcomes = dict[tuple[int, str, float], dict[str, Any]]  # (row, template, temperature) → outcome line


@dataclass
class ExtractionTask:
    """Everything about a measurement that does not depend on the model."""

    dataset: str
    people: list[tuple[str, str]]  # (name, address) of each row asked, in file order
    asked: list[list[Question]]  # [row][template]
    labels: list[str]  # template letters, or ['prefix']
    floor: dict[str, Any]  # from `metrics.name_rule_floor`
    settings: dict[str, Any]  # the EXTRACTION_SETTINGS of the result lines
    inputs: list[str]
    baseline: Outcomes = field(default_factory=dict)  # for every prompt; empty without --baseline
    baseline_path: str | None = None
    chat_template: str | None = None  # --chat_template; `settings` says whether prompts are asked in chat form


def prepare(config: AttackConfig, problems: Problems) -> ExtractionTask | None:
    """Read and check every file that the measurement needs; problems are collected, None if there are any."""
    before = len(problems.lines)
    rows = problems.absorb(formats.read_rows, config.dataset)
    manifest = problems.absorb(manifests.read_manifest, config.dataset) if rows else None
    if len(set(config.temperatures)) < len(config.temperatures):
        problems.add("--temperatures: the same temperature twice")
    if config.chat and config.attack == "prefix":
        problems.add("--chat: goes with --attack templates; audit.py asks chat rows with their own text")
    if config.chat_template and not config.chat:
        problems.add("--chat_template: needs --chat")
    given = problems.absorb(chat.read_template, config.chat_template, None, "") if config.chat_template else None
    demonstrations = problems.absorb(_read_demonstrations, config.demonstrations) if config.demonstrations else None
    if rows is None:
        return None
    fields = ("gt-name", "gt-email") + (("prompt",) if config.attack == "prefix" else ())
    problems.absorb(dataset.validate, config.dataset, rows, fields)
    if len(rows) < 3:
        problems.add(f"{config.dataset}: {len(rows)} rows; at least 3 are needed")
    if config.num_rows and config.num_rows > len(rows):
        problems.add(f"--num_rows {config.num_rows}: {config.dataset} has only {len(rows)} rows")
    if len(problems.lines) > before:
        return None

    evaluated = list(range(config.num_rows)) if config.num_rows else list(dataset.split(rows, manifest).pii)
    if not evaluated:
        problems.add(f"{config.dataset}: no row belongs to the evaluation head; pass --num_rows")
        return None
    people = [(rows[index]["gt-name"], rows[index]["gt-email"]) for index in evaluated]
    if config.attack == "prefix":
        labels, demonstrations = ["prefix"], []
        asked = [[_prefix_question(rows[index])] for index in evaluated]
    else:
        if demonstrations is None:
            demonstrations = prompts.spread_demonstrations(rows, evaluated)
        if len(demonstrations) < prompts.N_DEMONSTRATIONS:
            problems.add(
                f"{config.dataset}: only {len(demonstrations)} rows outside the {len(evaluated)} evaluated ones are "
                f"left for {prompts.N_DEMONSTRATIONS} demonstrations; pass --demonstrations or a smaller --num_rows"
            )
            return None
        labels = list(prompts.TEMPLATES)
        asked = [_template_questions(labels, demonstrations, one, config) for one in people]
    inside = set(evaluated)
    outside = [row["gt-email"] for index, row in enumerate(rows) if index not in inside]
    as_released = (config.attack, config.templates) == ("templates", "released")
    settings = {
        "dataset_sha256": results.sha256(config.dataset),
        "rows": [evaluated[0], evaluated[-1] + 1, len(evaluated)],
        "attack": config.attack,
        "templates": config.templates,
        "trailing_space": config.trailing_space,
        "stop": config.stop or ("released" if as_released else "newline"),
        "demonstrations_sha256": hashlib.sha256(json.dumps(demonstrations).encode()).hexdigest(),
        "top_k": config.top_k,
        "max_tokens": config.max_tokens,
        "seed": config.seed,
        "chat": (hashlib.sha256(given.encode()).hexdigest() if given else "own") if config.chat else None,
    }
    if config.engine != "transformers":
        settings["engine"] = config.engine
    floor = metrics.name_rule_floor(people, outside)
    inputs = [str(config.dataset), *([config.demonstrations] if config.demonstrations else [])]
    task = ExtractionTask(
        str(config.dataset), people, asked, labels, floor, settings, inputs, chat_template=config.chat_template
    )
    if config.baseline:
        task.baseline = problems.absorb(_read_baseline, task, config.baseline, config.temperatures) or {}
        task.baseline_path = config.baseline
    return task if len(problems.lines) == before else None


def _prefix_question(row: dict[str, Any]) -> Question:
    """The row's own text before the address, without its trailing space; the answer with that space comes first."""
    prompt, address = row["prompt"].rstrip(" "), row["gt-email"]
    lead = row["prompt"][len(prompt) :]
    return prompt, [lead + address, ("" if lead else " ") + address]


def _template_questions(
    labels: Sequence[str], demonstrations: list[tuple[str, str]], person: tuple[str, str], config: AttackConfig
) -> list[Question]:
    """One question per template about one person; the answer formatted like the demonstrations' comes first."""
    name, address = person
    style, space = config.templates, config.trailing_space
    answers = [lead + address for lead in (("", " ") if space else (" ", ""))]
    return [(prompts.build_prompt(label, demonstrations, name, style, space), answers) for label in labels]


def _read_demonstrations(path: AnyPath) -> list[tuple[str, str]]:
    """The (name, email) pairs of --demonstrations; UserError unless there are exactly as many as the prompts need."""
    rows = formats.read_rows(path)
    dataset.validate(path, rows, ("name", "email"))
    if len(rows) != prompts.N_DEMONSTRATIONS:
        raise UserError(f"{path}: {len(rows)} demonstrations; {prompts.N_DEMONSTRATIONS} are needed")
    return [(row["name"], row["email"]) for row in rows]


def _read_baseline(task: ExtractionTask, path: AnyPath, temperatures: Sequence[float]) -> Outcomes:
    """The baseline's outcome of every prompt of `task` at every temperature; UserError if any is missing."""
    settings, lines = task.settings, formats.read_rows(path)
    outcomes_file = outcomes_path(path)
    if not outcomes_file.is_file():
        raise UserError(
            f"--baseline {path}: {outcomes_file.name} is not next to it; measure the baseline with this tool"
        )
    problems = Problems()
    for key in EXTRACTION_SETTINGS:
        if lines[0].get(key) != settings[key]:
            problems.add(f"--baseline {path}: measured with {key} {lines[0].get(key)}, this run has {settings[key]}")
    measured = [line.get("temperature") for line in lines]
    unmeasured = sorted(one for one in set(temperatures) if one not in measured)
    if unmeasured:
        problems.add(f"--baseline {path}: has no line for temperature {', '.join(map(str, unmeasured))}")
    problems.check()
    outcomes = formats.read_rows(outcomes_file)
    for number, line in enumerate(outcomes):
        types = [type(line.get(key)) for key in ("row", "template", "temperature")]
        told = [line.get("match" if measure == "matches" else measure, "") for measure in MEASURES]
        right = types in ([int, str, float], [int, str, int])
        if not right or not all(one is None or isinstance(one, bool | int) for one in told):
            problems.add(
                f"--baseline {path}: row {number} of {outcomes_file.name} is damaged; measure the baseline again"
            )
            break
    problems.check()
    known: Outcomes = {(line["row"], line["template"], line["temperature"]): line for line in outcomes}
    asked = set(itertools.product(range(len(task.people)), task.labels, temperatures))
    if missing := asked - set(known):
        raise UserError(
            f"--baseline {path}: {outcomes_file.name} has no outcome for {len(missing)} of {len(asked)} prompts and "
            "temperatures; measure the baseline again"
        )
    return known
