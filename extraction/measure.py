"""Measuring one model: from answers to result lines and files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common import (
    adapters,
    checkpoints,
    dataset,
    distributed,
    formats,
    json_files,
    locks,
    models,
    provenance,
    results,
    stats,
    vllm_engine,
)
from common.distributed import World
from common.problems import Problems, UserError, check_writable
from common.publication import Publication
from common.schema import GREEDY_BELOW, HEADLINE_TEMPERATURE, MEASURES, next_free, outcomes_path, responses_path
from common.stats import mean_or_none
from extraction import metrics
from extraction.attack import Reply, attack, chat_renderer
from extraction.config import AttackConfig, MeasureConfig
from extraction.task import ExtractionTask, prepare

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from common.models import Model, ModelRef
    from common.problems import AnyPath
    from common.sampling import Sampler

    Lines = list[dict[str, Any]]  # of a result file

KEY = "purified"  # lock name: other scripts write to checkpoints too


def find_results(
    folder: AnyPath, task: ExtractionTask, model_key: dict[str, Any], responses: bool = False
) -> list[tuple[Path, Lines]]:
    """(result file, its lines) of each earlier file of this same measurement, newest last. Files of the released tool
    never match.

    responses: only files with a responses file next to them.
    """
    matching, wanted = [], {"engine": None, **task.settings, **model_key}
    for path in sorted(Path(folder).glob("results_purified*.jsonl"), key=lambda path: (len(path.name), path.name)):
        if path.stem.endswith("_rows"):
            continue
        try:
            lines = formats.read_rows(path)
        except UserError:
            continue
        if (
            all(line.get(key) == value for line in lines for key, value in wanted.items())
            and outcomes_path(path).is_file()
            and (not responses or responses_path(path).is_file())
        ):
            matching.append((path, lines))
    return matching


def newest(matching: list[tuple[Path, Lines]]) -> Lines:
    """The newest line of each temperature among the results of `find_results`, sorted by temperature."""
    last = {line["temperature"]: line for _, lines in matching for line in lines}
    return [last[temperature] for temperature in sorted(last)]


def model_key(ref: ModelRef) -> dict[str, Any]:
    """The keys that identify the measured weights in a result line."""
    return {"model_sha256": provenance.weights_sha256(ref), "revision": ref.revision}


def summarise(
    task: ExtractionTask, replies: list[Reply], temperatures: Sequence[float], model_info: dict[str, Any]
) -> tuple[Lines, Lines, Lines]:
    """(result lines, outcome lines, response lines) of a finished attack."""
    result_lines: Lines = []
    outcome_lines: Lines = []
    response_lines: Lines = []
    n_rows = len(task.people)
    dropped = [reply.dropped for reply in replies if reply.responses is None]
    logp: dict[str, list[list[float]]] = {label: [] for label in task.labels}
    truth: dict[str, list[float | None]] = {label: [] for label in task.labels}
    for reply in replies:
        if reply.responses is not None and reply.truth_logp is not None:
            logp[reply.template].append(reply.truth_logp)
            truth[reply.template].append(reply.truth_logprob)
    scored = {
        label: sum(reply.template == label and reply.responses is not None for reply in replies)
        for label in task.labels
    }
    # addresses longer than max_tokens: their probability is 0 by definition
    limit = task.settings["max_tokens"]
    too_long = {
        label: sum(reply.template == label and reply.truth_tokens > limit for reply in replies) for label in task.labels
    }
    for number, temperature in enumerate(temperatures):
        hits = {measure: np.full((n_rows, len(task.labels)), np.nan) for measure in MEASURES}
        for reply in replies:
            where = {"row": reply.row, "template": reply.template, "temperature": temperature}
            if reply.responses is None:
                empty = dict.fromkeys(("match", "exact", "local_part", "domain", "no_pattern"))
                outcome_lines.append({**where, **empty, "dropped": reply.dropped})
                continue
            response = reply.responses[number]
            outcome = metrics.outcome(*task.people[reply.row], response)
            outcome_lines.append({**where, **outcome})
            response_lines.append({**where, "response": response})
            for measure in MEASURES:
                key = "match" if measure == "matches" else measure
                hits[measure][reply.row, task.labels.index(reply.template)] = outcome[key]
        line: dict[str, Any] = {}
        for measure in MEASURES:
            counts = {label: int(np.nansum(hits[measure][:, i])) for i, label in enumerate(task.labels)}
            line[measure] = {label: counts[label] if scored[label] else None for label in task.labels}
            line[measure]["total"] = n_rows
        line["ci95"] = {
            measure: {
                **{label: stats.clopper_pearson(line[measure][label], scored[label]) for label in task.labels},
                "total": stats.clustered_rate(hits[measure]),
            }
            for measure in MEASURES
        }
        line["floor"] = task.floor
        line["truth_logprob"] = {label: mean_or_none(truth[label]) for label in task.labels}
        line["probabilistic"] = {
            label: stats.probabilistic_extraction(np.array([values[number] for values in logp[label]]))
            for label in task.labels
        }
        line["truth_too_long"] = too_long
        if task.baseline:
            line["baseline"] = _compare(task, outcome_lines[-len(replies) :])
        line |= {
            **model_info,
            "temperature": temperature,
            "greedy": temperature <= GREEDY_BELOW,
            "headline": temperature == HEADLINE_TEMPERATURE,
            "dataset": task.dataset,
            **task.settings,
            "n_requested": len(replies),
            "n_scored": len(replies) - len(dropped),
            "n_dropped": len(dropped),
            "n_scored_by_template": scored,
            "dropped": {reason: dropped.count(reason) for reason in set(dropped)},
        }
        result_lines.append(line)
    return result_lines, outcome_lines, response_lines


def _compare(task: ExtractionTask, outcome_lines: Lines) -> dict[str, Any]:
    """Per measure and template: pairs scored in both, hits gained and lost against the baseline, exact McNemar p.

    Not computed for the total.
    """
    compared: dict[str, Any] = {"path": str(task.baseline_path)}
    for measure in MEASURES:
        key = "match" if measure == "matches" else measure
        compared[measure] = {}
        for label in task.labels:
            n = gained = lost = 0
            for now in outcome_lines:
                if now["template"] != label:
                    continue
                before = task.baseline[now["row"], label, now["temperature"]]
                if now[key] is None or before[key] is None:
                    continue
                n += 1
                gained += now[key] and not before[key]
                lost += before[key] and not now[key]
            compared[measure][label] = {"n": n, "gained": gained, "lost": lost, "p": stats.mcnemar(gained, lost)}
    return compared


def write(
    files: Publication,
    path: Path,
    lines: Lines,
    outcome_lines: Lines,
    response_lines: Lines,
    save_responses: bool,
    append: bool = False,
) -> None:
    """Write the files of one measurement. append: existing files at `path` keep their lines of other temperatures."""
    earlier = [json_files.read_jsonl(file) if append else [] for file in (outcomes_path(path), path)]
    if save_responses:
        before = json_files.read_jsonl(responses_path(path)) if append and responses_path(path).is_file() else []
        before = [line for line in before if line["temperature"] not in {line["temperature"] for line in lines}]
        files.write_jsonl(responses_path(path), before + response_lines, permissions=0o600)
    new = {line["temperature"] for line in lines}
    kept = [line for line in earlier[0] if line["temperature"] not in new]
    files.write_jsonl(outcomes_path(path), kept + outcome_lines)
    files.write_jsonl(path, earlier[1] + lines)


def measure_model(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    task: ExtractionTask,
    config: AttackConfig,
    model_info: dict[str, Any],
    world: World,
    folder: AnyPath,
    path: Path | None = None,
    temperatures: Sequence[float] | None = None,
    sampler: Sampler | None = None,
) -> Path:
    """Attack a loaded model and write its files into `folder`; returns the result file's path.

    model_info: from `describe`. path: an earlier, partial result file to add `temperatures` (None: all) to.
    sampler: see `attack`.
    """
    todo = config.temperatures if temperatures is None else temperatures
    replies = attack(model, tokenizer, task, config, todo, world, sampler)
    target = path or next_free(folder)
    if world.main:
        lines = summarise(task, replies, todo, model_info)
        with locks.output_folder(target.parent, key=KEY) as locked, locked.publication() as files:
            write(files, target, *lines, config.save_responses, append=path is not None)
    world.barrier()
    return target


def print_table(lines: Lines, task: ExtractionTask) -> None:
    """One row per temperature: loose matches and exact hits by template."""
    heads = [f"{measure} {label}" for measure in ("match", "exact") for label in task.labels]
    print(f"{'T':>5} " + " ".join(f"{head:>9}" for head in [*heads, "no_pattern"]) + f"   of {len(task.people)} rows")
    for line in lines:
        cells = [line[measure][label] for measure in ("matches", "exact") for label in task.labels]
        cells.append(sum(line["no_pattern"][label] or 0 for label in task.labels))
        print(f"{line['temperature']:>5g} " + " ".join(f"{'-' if cell is None else cell:>9}" for cell in cells))
    floor = task.floor
    if floor["rule"]:
        guess = f"{floor['rule']}@{floor['domain_guess']}"
        print(f"name-rule floor ({guess}): {floor['matches']} match, {floor['exact']} exact")


def print_comparison(lines: Lines) -> None:
    """Hits gained and lost against --baseline, by temperature and template, with McNemar's p."""
    for line in lines:
        compared: dict[str, Any] = line.get("baseline") or {}
        for name in ("matches", "exact") if compared else ():
            pairs = {label: pair for label, pair in compared[name].items() if pair["n"]}
            words = [f"{label} +{pair['gained']} −{pair['lost']} (p {pair['p']:.2g})" for label, pair in pairs.items()]
            what = "match" if name == "matches" else name
            print(f"T {line['temperature']:g}, {what}, gained and lost against {compared['path']}: {', '.join(words)}")


def described(matching: list[tuple[Path, Lines]]) -> list[str]:
    """Each result file of `find_results`, with its temperatures."""
    listed = [(path, ", ".join(f"{line['temperature']:g}" for line in lines)) for path, lines in matching]
    return [f"{path} (temperatures {temperatures})" for path, temperatures in listed]


def describe(ref: ModelRef, dtype: torch.dtype, change: float | None) -> dict[str, Any]:
    """The model's part of a result line. change: ‖ΔW‖/‖W‖, None without an adapter."""
    return {
        "model": ref.name,
        "base_model": ref.base,
        **model_key(ref),
        "dtype": models.dtype_name(dtype, ref),
        "relative_change": change,
        "privacy": provenance.privacy(ref),
    }


def written_before_a_kill(
    run_file: Path, config: MeasureConfig, task: ExtractionTask, ref: ModelRef, after_kill: bool
) -> Path | None:
    """The complete result next to `run_file` of a run with the same arguments that was killed before it could record
    success."""
    if not run_file.is_file():
        return None
    record = json_files.read_json(run_file, "remove it")
    unfinished = record.get("status") == "running" or after_kill
    if not unfinished or record.get("args") != json.loads(json_files.dumps(vars(config))):
        return None
    for path, lines in reversed(find_results(run_file.parent, task, model_key(ref), config.save_responses)):
        if set(config.temperatures) <= {line["temperature"] for line in lines}:
            return path
    return None


@dataclass(frozen=True)
class Plan:
    """A measurement with checked arguments and files."""

    config: MeasureConfig
    task: ExtractionTask
    ref: ModelRef
    tokenizer: PreTrainedTokenizerBase
    folder: Path  # for the results


def check(config: MeasureConfig) -> Plan:
    """Read everything except the model; UserError with every problem."""
    problems = Problems()
    config = replace(config, dataset=str(dataset.default_dataset(config.dataset)))
    distributed.check_environment(problems, config.device_map, config.model_parallel, config.quantization)
    for name in ("model", "output_dir"):
        if getattr(config, name) is None:
            problems.add(f"--{name}: required")
    if config.output_dir:
        check_writable(config.output_dir, problems)
    task = prepare(config, problems)
    ref = tokenizer = None
    if config.model:
        ref, tokenizer = models.look_up(
            problems, config.model, config.revision, config.base_model, quantized=config.quantization
        )
        vllm_engine.check(config, problems, ref, config.temperatures, quantization=config.quantization)
        if tokenizer and task and config.chat:
            problems.absorb(chat_renderer, task, tokenizer, config.model)
    if problems.lines or task is None or ref is None or tokenizer is None or config.output_dir is None:
        raise UserError(*problems.lines)
    return Plan(config, task, ref, tokenizer, Path(config.output_dir))


def run(config: MeasureConfig) -> int:
    """Measure one model; prints the table. UserError with every problem before the model is loaded."""
    plan = check(config)
    config, task, ref, folder = plan.config, plan.task, plan.ref, plan.folder
    if config.dry_run:
        words = f"{len(task.people)} rows × {len(task.labels)} prompts × {len(config.temperatures)} temperatures"
        print(f"would ask {words} of {ref.name} (base {ref.base}) and write {next_free(folder)}")
        return 0

    world = distributed.start(model_parallel=config.model_parallel)
    dtype = models.resolve_dtype(config.dtype, world.device)
    run_file = folder / "run_measure_purified.json"
    with locks.output_folder(folder, key=KEY) as place:
        known = written_before_a_kill(run_file, config, task, ref, place.after_kill) if world.main else None
        path = world.broadcast(known)
        with results.Run(run_file, config, task.inputs, world) as record:
            if path is None:
                base = checkpoints.load_base(ref, dtype, world, config.device_map)
                with (
                    adapters.adapted(base, ref.adapter) as (model, change),
                    vllm_engine.beside(config, ref, dtype) as sampler,
                ):
                    about = describe(ref, dtype, change)
                    path = measure_model(model, plan.tokenizer, task, config, about, world, folder, sampler=sampler)
            record["results"] = str(path)
    if world.main:
        lines = json_files.read_jsonl(path)
        print_table(lines, task)
        print_comparison(lines)
        provenance.say_if_hardly_moved(ref, lines[-1]["relative_change"])
        matching = find_results(folder, task, model_key(ref))
        for words in described([(other, found) for other, found in matching if other != path]):
            print(f"measured before with the same settings: {words}")
    world.say(f"results are in {path}")
    world.close()
    return 0
