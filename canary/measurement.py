"""The run of canary/measure.py: every model, then every text, and the result files."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

from canary.config import MeasureConfig
from canary.key import KeyLine
from canary.likelihoods import SCORES, measure_model
from canary.lines import Line, audit_line_of_model, count_lines, exposure_lines, text_lines, text_signals
from canary.report import report
from canary.seen import Seen
from canary.task import RECORD, RESULTS, ROWS, Task, prepare
from common import distributed, json_files, locks, models, provenance, results
from common.distributed import World


class Outcome(TypedDict):
    """All result lines, and the ones whose lower bound exceeds the accountant's ε at 99.9 %."""

    lines: list[Line]
    violations: list[Line]


def run(config: MeasureConfig) -> Outcome:
    """Measure and write the results, or read them if they already exist."""
    with locks.output_folder(config.output_dir, config.dry_run, "canary") as target:
        task = prepare(config)
        if task.finished:
            return {"lines": json_files.read_jsonl(Path(config.output_dir) / RESULTS), "violations": []}
        if config.dry_run:
            words = f"{len(task.canaries)} canaries in models {list(task.models)} and files {list(task.texts)}"
            print(f"would measure {words}")
            return {"lines": [], "violations": []}
        return measure(config, task, target)


def measure(config: MeasureConfig, task: Task, target: locks.Output) -> Outcome:
    """Measure every arm, write the files, print the results."""
    import torch

    world = distributed.start(model_parallel=config.model_parallel)
    dtype = models.resolve_dtype(config.dtype, "cuda" if torch.cuda.is_available() else "cpu")
    folder = Path(config.output_dir)
    for name, arm in task.models.items():
        if arm.seen is None and world.main:
            print(f"{name}: has no trained_rows.jsonl: unknown which canaries it was trained on", file=sys.stderr)
    lines: list[Line] = []
    rows: list[Line] = []
    with results.Run(folder / RECORD, config, task.inputs, world, target, weights=task.weights) as record:
        for name in task.models:
            model_lines, model_rows = of_model(config, task, name, dtype, world)
            lines += model_lines
            rows += model_rows
        if world.main:
            lines += count_lines(task)
            for name in task.texts:
                signals = text_signals(task.canaries, task.texts[name].texts)
                lines += text_lines(task, name, signals)
                values = [dict(zip(signals, scores)) for scores in zip(*signals.values())]
                rows += canary_rows(name, "text", task.canaries, values)
            record.files.write_jsonl(folder / ROWS, rows)
            record.files.write_jsonl(folder / RESULTS, [{"schema": results.SCHEMA, **line} for line in lines])
        lines = world.broadcast(lines)
        violations = [line for line in lines if line.get("above_upper", {}).get("99.9")]
        if violations:
            record["error"] = f"{len(violations)} lower bounds of ε exceed the accountant's at 99.9 %"
    if world.main:
        report(lines)
        for arm in task.models.values():
            provenance.say_if_hardly_moved(arm.ref)
        print(f"{len(lines)} lines in {folder / RESULTS}")
    world.close()
    return {"lines": lines, "violations": violations}


def of_model(config: MeasureConfig, task: Task, name: str, dtype: Any, world: World) -> tuple[list[Line], list[Line]]:
    """(result lines, lines per canary) of one arm's model."""
    arm = task.models[name]
    bits, scores, signal = measure_model(config, task, arm, dtype, world)
    lines = exposure_lines(task, name, bits, config.references)
    if task.audited:
        lines.append(audit_line_of_model(task, name, scores, signal))
    audited: Iterator[Line] = iter(
        [
            {"audit_signal": scores[task.headline][place], **{f"audit_{of}": scores[of][place] for of in SCORES}}
            for place in range(len(task.audited))
        ]
    )
    values: list[Line] = [
        next(audited) if canary["kind"] == "audit" else dict(bits[index]) for index, canary in enumerate(task.canaries)
    ]
    return lines, canary_rows(name, "model", task.canaries, values, arm.seen)


def canary_rows(
    arm: str, source: str, canaries: Sequence[KeyLine], values: list[Line], seen: Seen | None = None
) -> list[Line]:
    """One line per canary, without its text; for a model also how many copies were trained on."""
    rows: list[Line] = []
    for canary, measured in zip(canaries, values, strict=True):
        row: Line = {"arm": arm, "source": source, "id": canary["id"], "kind": canary["kind"]}
        row |= {"repetitions": canary["repetitions"], "included": canary["included"]}
        if source == "model":
            row["copies_trained"] = seen.copies(canary) if seen else None
        rows.append(row | measured)
    return rows
