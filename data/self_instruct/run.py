"""The run of data/self_instruct/generate.py: checks, rounds of generation, rows and manifest."""

import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import dataset, distributed, json_files, locks, manifests, models, results, vllm_engine
from common.problems import Problems, check_output_file
from data import generation
from data.self_instruct.config import SelfInstructConfig
from data.self_instruct.rounds import TOO_LONG, make_rounds
from data.self_instruct.rows import formatted, rows_of
from data.self_instruct.seed_tasks import SeedTask, read_seed_tasks

SAMPLED = ("temperature", "instance_temperature", "top_k", "max_tokens", "seed", "round_size")


@dataclass(frozen=True)
class Task:
    """What is known before the model is loaded. settings: what a resumed run must have in common with the killed one;
    file_settings: these and what else decides the content of the finished file, for its manifest."""

    seeds: list[SeedTask]
    broken: int
    ref: models.ModelRef
    tokenizer: Any
    settings: dict[str, Any]
    file_settings: dict[str, Any]
    finished: bool


def run(config: SelfInstructConfig) -> dict[str, int]:
    """Write the file; returns the counts by filter, which are also printed and kept in run_generate.json; {} if
    there is nothing to do."""
    config = replace(config, seed_tasks=str(dataset.default_dataset(config.seed_tasks)))
    output = config.output_file
    partial = output.with_name(f".{output.name}.partial.jsonl")
    with locks.output_file(output, dry_run=config.dry_run) as target:
        task = check(config)
        if task.finished:
            manifests.say_finished(output)
            return {}
        json_files.read_partial(partial, task.settings, config.overwrite)  # rejects those of a different run
        if config.dry_run:
            print(f"would make {config.num_rows} rows from {len(task.seeds)} seed tasks with {config.model}: {output}")
            return {}
        return generate(config, task, partial, target)


def check(config: SelfInstructConfig) -> Task:
    """Read and check every argument and file. UserError with all problems."""
    problems = Problems()
    distributed.check_environment(problems, config.device_map, config.model_parallel)
    output = config.output_file
    check_output_file(output, ".jsonl", problems, (config.seed_tasks,))
    seeds, broken = problems.absorb(read_seed_tasks, config.seed_tasks, config.strict) or ([], 0)
    ref, tokenizer = models.look_up(problems, config.model, config.revision, config.base_model)
    vllm_engine.check(config, problems, ref, (config.temperature, config.instance_temperature))
    settings: dict[str, Any] = {}
    file_settings: dict[str, Any] | None = None
    if ref and not problems.lines:
        settings = generation.settings_of(config, ref, SAMPLED, seed_tasks=results.sha256(config.seed_tasks))
        file_settings = settings | {key: getattr(config, key) for key in ("num_rows", "format", "strict")}
    finished = problems.absorb(manifests.finished, [("--output", output)], file_settings, config.overwrite)
    problems.check()
    assert ref and file_settings is not None
    return Task(seeds, broken, ref, tokenizer, settings, file_settings, bool(finished))


def generate(config: SelfInstructConfig, task: Task, partial: Path, target: locks.Output) -> dict[str, int]:
    """Load the model, make the rounds, write the rows and their manifest."""
    output, settings = config.output_file, task.settings
    world = distributed.start(model_parallel=config.model_parallel)
    with results.Run(output.parent / "run_generate.json", config, [config.seed_tasks], world, target) as record:
        dtype = models.resolve_dtype(config.dtype, world.device)
        with generation.generator(config, task.ref, dtype, world) as model:
            rounds = make_rounds(model, task.tokenizer, task.seeds, config, settings, partial, world)
        rows = formatted(rows_of(rounds)[: config.num_rows], config.format, task.tokenizer.eos_token)
        counts = sum((Counter(done["counts"]) for done in rounds), Counter({"broken seed tasks": task.broken}))
        record["counts"], record["rounds"] = counts, len(rounds)
        record["keep_rate"] = {
            kind: counts[f"{kind}: kept"] / max(1, counts[f"{kind}: candidates"])
            for kind in ("instructions", "instances")
        }
        if world.main:
            record.files.write_jsonl(output, rows)
            manifests.write_manifest(
                record.files,
                output,
                tag=f"self-instruct-{Path(config.model).name}",
                script="data/self_instruct/generate.py",
                argv=sys.argv,
                rows=len(rows),
                source=[(config.seed_tasks, len(task.seeds) + task.broken)],
                generator={key: settings[key] for key in ("model", "revision", "weights")},
                sampling=generation.sampling_of(settings, SAMPLED),
                settings=task.file_settings,
            )
            record.files.remove(partial)
        world.barrier()
    world.say(report(counts, len(rows), output))
    world.close()
    return dict(counts)


def report(counts: Counter[str], rows: int, output: Path) -> str:
    """What was kept and what each filter dropped, as text."""
    lines = [f"{rows:>9,}  rows"]
    for kind in ("instructions", "instances"):
        total = counts[f"{kind}: candidates"]
        lines.append(f"{total:>9,}  candidate {kind}")
        reasons = sorted(key for key in counts if key.startswith(f"{kind}: ") and not key.endswith(": candidates"))
        lines += [f"{counts[key]:>9,}  {key} ({counts[key] / max(1, total):.1%})" for key in reasons]
    others = ("broken seed tasks", "classification tasks", "tasks without an instance", TOO_LONG)
    lines += [f"{counts[key]:>9,}  {key}" for key in others]
    return "\n".join([*lines, f"rows are in {output}"])
