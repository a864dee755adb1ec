"""The run of data/synthetic/generate.py: prompts, the model's continuations, the rows and their manifest."""

import sys
from collections import Counter
from dataclasses import replace
from typing import Any

from common import dataset, distributed, locks, manifests, models, results
from common.problems import UserError
from common.publication import Publication
from common.tokenization import encode_prompt
from data import generation
from data.synthetic.config import SyntheticConfig
from data.synthetic.metadata import Planned, Released, plan, release_histogram
from data.synthetic.summary import Summary, near_copies, privacy_block, report
from data.synthetic.task import Task, prepare

SAMPLED = ("condition", "temperature", "top_k", "max_new_tokens", "seed")


def run(config: SyntheticConfig) -> Summary:
    """Write the file; returns what is also printed and kept in run_generate_<arm>.json; {} if nothing is left to do."""
    output = config.output_file
    with locks.output_file(output, dry_run=config.dry_run) as target:
        task = prepare(config)
        if task.finished:
            manifests.say_finished(output)
            return {}
        generation.read_partials(output, task.settings, config.overwrite)  # rejects those of a different run
        if config.dry_run:
            n = config.num or len(task.rows)
            print(
                f"would write {n} reviews of arm {config.arm} with {config.model} from {config.condition}, to {output}"
            )
            return {}
        return generate(config, task, target)


def generate(config: SyntheticConfig, task: Task, target: locks.Output) -> Summary:
    """Load the model, continue every prompt, write the files."""
    output = config.output_file
    world = distributed.start(model_parallel=config.model_parallel)
    run_file = output.parent / f"run_generate_{config.arm}.json"
    with results.Run(run_file, config, [config.input], world, target) as record:
        if task.source:
            record["inputs"].append({key: value for key, value in task.source.items() if key != "rows"})
        dtype = models.resolve_dtype(config.dtype, world.device)
        released: Released | None = None
        if config.samples_metadata:
            released = world.together(lambda: release_histogram(config, task) if world.main else None)[0]
            digest = {"histogram": results.sha256(config.histogram_file)}
            of_file = task.file_settings and task.file_settings | digest
            task = replace(task, settings=task.settings | digest, file_settings=of_file)
        context = models.context_of(task.ref)
        planned, prompts, rooms, dropped = fit(config, task.tokenizer, plan(config, task, released), context)
        with generation.generator(config, task.ref, dtype, world) as model:
            continuations = generation.continue_prompts(
                model,
                task.tokenizer,
                prompts,
                rooms,
                [row.key for row in planned],
                output=output,
                settings=task.settings,
                overwrite=config.overwrite,
                temperature=config.temperature,
                top_k=config.top_k,
                seed=config.seed,
                batch_size=config.batch_size,
                world=world,
            )
        summary: Summary = {}
        if world.main:
            summary = finish(config, task, record.files, planned, continuations, released, dropped)
            record["statistics"] = {key: value for key, value in summary.items() if key != "privacy"}
            record["privacy"] = summary["privacy"]
        summary = world.broadcast(summary)
        world.barrier()
    if world.main:
        report(config, summary)
    world.close()
    return summary


def fit(
    config: SyntheticConfig, tokenizer: Any, planned: list[Planned], context: int
) -> tuple[list[Planned], list[list[int]], list[int], Counter[str]]:
    """(rows whose prompt leaves the context room for a review, their prompts, how many tokens each may have, how many
    were dropped, by reason)."""
    least = min(generation.MIN_ROOM, config.max_new_tokens)
    dropped: Counter[str] = Counter()
    kept: list[Planned] = []
    prompts: list[list[int]] = []
    rooms: list[int] = []
    for row in planned:
        prompt = encode_prompt(tokenizer, dataset.review_prompt(row.fields))
        room = min(config.max_new_tokens, context - len(prompt))
        if room < least:
            dropped[f"prompt leaves fewer than {least} of the context's {context:,} tokens"] += 1
            continue
        kept.append(row)
        prompts.append(prompt)
        rooms.append(room)
    if not kept:
        raise UserError(f"{config.input}: every prompt is too long for the model's {context} tokens")
    return kept, prompts, rooms, dropped


def finish(
    config: SyntheticConfig,
    task: Task,
    files: Publication,
    planned: list[Planned],
    continuations: list[dict[str, Any]],
    released: Released | None,
    dropped: Counter[str],
) -> Summary:
    """Rank 0: filter, count, write the rows and their manifest."""
    output = config.output_file
    filtered: Counter[str] = Counter()
    rows = []
    for row, continuation in zip(planned, continuations):
        ended = "eos" if continuation["ended"] else "length"
        text = continuation["generation"].removeprefix(" ")
        if "empty" in config.filter and not text.strip():
            filtered["empty"] += 1
        elif "length" in config.filter and ended == "length":
            filtered["length"] += 1
        else:
            facts = {"finish_reason": ended, "generated_tokens": continuation["generated_tokens"]}
            facts |= {"seed": config.seed, "sample": row.sample}
            rows.append({**row.fields, "generated_text": text, **facts})
    texts = [row["generated_text"] for row in rows]
    held_out, training = ([row["Review"] for row in real] for real in (task.rows, task.training))
    summary: Summary = {
        "n_requested": config.num or len(task.rows),
        "n_scored": len(rows),
        "n_dropped": sum(dropped.values()) + sum(filtered.values()),
        "dropped": dict(dropped),
        "filtered": {name: filtered[name] for name in config.filter},
        "ended": sum(row["finish_reason"] == "eos" for row in rows),
        "empty": sum(not text.strip() for text in texts),
        "near_copies": near_copies(texts, training, held_out),
        "tokens": sum(continuation["generated_tokens"] for continuation in continuations),
    }
    privacy = privacy_block(task.privacy, released)
    files.write_jsonl(output, rows)
    manifests.write_manifest(
        files,
        output,
        tag=f"synthetic-{config.arm}",
        script="data/synthetic/generate.py",
        argv=sys.argv,
        rows=len(rows),
        source=[(config.input, len(task.rows)), *([task.source] if task.source else [])],
        generator={key: task.settings[key] for key in ("model", "revision", "weights")},
        sampling=generation.sampling_of(task.settings, SAMPLED),
        settings=task.file_settings,
        more={"privacy": privacy, **summary},
    )
    for file in generation.partial_files(output):
        files.remove(file)
    return summary | {"privacy": privacy}
