"""The run of data/continuation/generate.py: the model's continuations, the rows, their statistics and manifest."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import arrow_files, dataset, distributed, locks, manifests, models, results
from data import generation
from data.continuation import text_statistics
from data.continuation.config import ContinuationConfig
from data.continuation.task import SAMPLED, Row, Task, check


def run(config: ContinuationConfig) -> dict[str, Any]:
    """Write the file and return the statistics, which are also printed and written to run_generate.json; {} if there is
    nothing to do."""
    config = replace(config, data_set=str(dataset.default_dataset(config.data_set)))
    output = config.output_file
    with locks.output_file(output, dry_run=config.dry_run) as target:
        task = check(config)
        if task.finished:
            manifests.say_finished(output)
            return {}
        generation.read_partials(output, task.settings, config.overwrite)  # rejects those of a different run
        if config.dry_run:
            print(
                f"would continue {len(task.asked)} prompts ({sum(task.dropped.values())} dropped) of {config.data_set} "
                f"with {config.model}, at most {config.max_tokens} tokens each, and write {output}"
            )
            return {}
        return generate(config, task, target)


def generate(config: ContinuationConfig, task: Task, target: locks.Output) -> dict[str, Any]:
    """Load the model, continue every prompt, write the rows and their manifest; their statistics."""
    output, settings = config.output_file, task.settings
    world = distributed.start(model_parallel=config.model_parallel)
    with results.Run(output.parent / "run_generate.json", config, [config.data_set], world, target) as record:
        dtype = models.resolve_dtype(config.dtype, world.device)
        with generation.generator(config, task.ref, dtype, world) as model:
            continuations = generation.continue_prompts(
                model,
                task.tokenizer,
                task.prompts,
                task.rooms,
                [(index, 0) for index in task.asked],
                output=output,
                settings=settings,
                overwrite=config.overwrite,
                temperature=config.temperature,
                top_k=config.top_k,
                seed=config.seed,
                batch_size=config.batch_size,
                world=world,
            )
        eos = task.tokenizer.eos_token
        rows = []
        for item in continuations:
            row, columns = task.rows[task.asked[item["index"]]], as_columns(task, item)
            rows.append({**row, **columns, "text": row["prompt"] + columns["generation"] + eos})
        numbers = text_statistics.statistics(rows, [task.rows[index] for index in task.head])
        record["statistics"], record["dropped"] = numbers, task.dropped
        if world.main:
            with record.files.open(output, "wb", 0o600) as file:
                arrow_files.write_arrow(file, rows)
            manifests.write_manifest(
                record.files,
                output,
                tag=f"self-generated-{Path(config.model).name}",
                script="data/continuation/generate.py",
                argv=sys.argv,
                rows=len(rows),
                source=[(config.data_set, len(task.rows))],
                split_start=task.split_start,
                generator={key: settings[key] for key in ("model", "revision", "weights")},
                sampling=generation.sampling_of(settings, SAMPLED),
                settings=settings,
            )
            for partial in generation.partial_files(output):
                record.files.remove(partial)
        world.barrier()
    if world.main:
        print(f"{len(rows):>9,}  rows")
        for reason, count in task.dropped.items():
            print(f"{count:>9,}  rows dropped: {reason}")
        print(text_statistics.report(numbers))
        print(f"{record['seconds']:.0f} s, {numbers['tokens_total'] / record['seconds']:,.0f} tokens/s")
        print(f"rows are in {output}")
    world.close()
    return numbers


def as_columns(task: Task, item: Row) -> Row:
    """The columns that a continuation adds to its row."""
    text = item["generation"]
    if task.rows[task.asked[item["index"]]]["prompt"].endswith(" "):
        text = text.removeprefix(" ")
    reason = "stop" if item["ended"] else "length"
    return {"generation": text, "finish_reason": reason, "generated_tokens": item["generated_tokens"]}
