#!/usr/bin/env python3
"""Synthetic reviews: a fine-tuned model writes a review for the metadata of each row.

python data/synthetic/generate.py --model run/checkpoint-276 --input data/amazon/test.jsonl --arm with_dp \\
    --training data/amazon/train.jsonl
torchrun --nproc_per_node=4 data/synthetic/generate.py --model run/checkpoint-276 --input test.jsonl --arm no_dp
python data/synthetic/generate.py --model run/checkpoint-276 --input test.jsonl --arm with_dp --num 10000 \\
    --condition sampled --metadata_epsilon 1 --training train.jsonl     # under torchrun: --num_rows, it has a --num…

The prompt is dataset.review_prompt, as trained (run_peft.py --loss_on completion): product title, categories, rating.
Never a word of the review. --condition title adds the review's title, which is private text too; train such a model on
rows that say "condition": "title". --condition sampled uses no row of --input but draws rating, categories and product
title from a histogram of --training that is released once, under its own (ε, δ), to --histogram; another run with the
same settings uses the same release. The manifest's `privacy` block adds both (basic composition).

Rows: row_id (None when sampled), arm, condition, the fields of the prompt, generated_text (the continuation alone),
finish_reason ('eos' | 'length'), generated_tokens, seed, sample (0, 1, … where --num exceeds the rows). The file is the
same whatever the batch and the number of processes; a killed run goes on from the hidden partial file beside it.
Counted, in the manifest and run_generate_<arm>.json: rows that --filter takes out, and near-copies (a common run of 50
characters or more) of the rows of --input and --training, beside what the rows of --input share with --training.
"""

import math
import secrets
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from common import cli, dataset, distributed, models, results, reviews, trained
from common.models import encode_prompt
from data import generation

CONDITIONS = ("metadata", "title", "sampled")
FIELDS = ("Rating", "Product Categories", "Product Title")  # of the histogram
FILTERS = ("empty", "length")
COPY = 50  # characters: a common run of this length is a near-copy
RESUMED = ("arm", "num", "condition", "temperature", "top_k", "max_new_tokens", "seed", "batch_size")
SAMPLED = ("condition", "temperature", "top_k", "max_new_tokens", "seed")


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig(cli.ModelConfig):
    """The flags of data/synthetic/generate.py."""

    model: str
    input: str = "./data/amazon/test.jsonl"
    arm: str = "with_dp"
    num: int | None = None
    condition: str = "metadata"
    training: str | None = None
    metadata_epsilon: float | None = None
    metadata_delta: float | None = None
    metadata_fields: tuple[str, ...] = tuple(FIELDS)
    histogram: str | None = None
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 50
    filter: tuple[str, ...] = ()
    batch_size: int = 0
    output: str | None = None
    overwrite: bool = False


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Write synthetic reviews with a fine-tuned model, from metadata alone.",
        "python data/synthetic/generate.py --model run/checkpoint-276 --input test.jsonl --arm with_dp",
        SyntheticConfig,
    )
    add = parser.add_argument
    add("-m", "--model", required=True, help="adapter or model directory, or hub name (default: none, required)")
    add("-i", "--input", "--data", help="review rows whose metadata is used")
    add("--arm", help="name of what is compared: with_dp, no_dp, …")
    add("--num", "--num_rows", type=cli.positive_int, help="rows to write; None: one a row of --input")
    add("--condition", choices=CONDITIONS, help="what the prompt is made from")
    add("--training", help="the generator's training rows: near-copies, and --condition sampled")
    add("--metadata_epsilon", type=cli.positive_float, help="ε of the histogram of --condition sampled")
    add("--metadata_delta", type=cli.positive_float, help="its δ; None: the model's, or 1/(10 · units)")
    add("--metadata_fields", nargs="+", choices=FIELDS, help="fields that are drawn together")
    add("--histogram", help="the released histogram (default: metadata_histogram.json beside --output)")
    add("--max_new_tokens", type=cli.positive_int, help="tokens of a review")
    add("--temperature", type=cli.non_negative_float, help="0 is greedy")
    add("--top_k", type=cli.non_negative_int, help="tokens kept before sampling; 0: all")
    add("--filter", nargs="+", choices=FILTERS, help="leave out empty reviews, or those cut at the length")
    add("--batch_size", type=cli.non_negative_int, help="rows decoded together; 0: by memory")
    add("--output", help="the .jsonl file (default: generated_sequences_<arm>.jsonl)")
    add("--overwrite", action="store_true", help="replace an existing --output or unfinished run")
    cli.add_model_flags(parser)
    return parser


# ---------------------------------------------------------------- before the model is loaded


def destination(config: SyntheticConfig) -> Path:
    return Path(config.output or f"generated_sequences_{config.arm}.jsonl")


def check(config: SyntheticConfig) -> SimpleNamespace:
    """Every argument and file; UserError with all problems."""
    problems = cli.Problems()
    distributed.check_environment(problems, config.device_map)
    if not reviews.ARM.fullmatch(config.arm):
        problems.add(f"--arm {config.arm}: letters, digits, _ and - only, a letter first")
    output = destination(config)
    cli.check_output_file(output, ".jsonl", problems, (config.input, config.training, config.histogram))
    if (config.condition == "sampled") != (config.metadata_epsilon is not None):
        problems.add("--metadata_epsilon: goes with --condition sampled, which needs it")
    if config.condition == "sampled" and not config.training:
        problems.add("--condition sampled: give the rows that the histogram counts as --training")
    if "Rating" not in config.metadata_fields:
        problems.add("--metadata_fields: Rating must be among them, every review has one")
    if config.metadata_delta is not None and config.metadata_delta >= 1:
        problems.add(f"--metadata_delta {config.metadata_delta:g}: must be below 1")
    if config.metadata_epsilon == math.inf:
        problems.add("--metadata_epsilon inf: must be finite")
    rows = problems.absorb(reviews.read_reviews, config.input) or []
    training = (problems.absorb(reviews.read_reviews, config.training) or []) if config.training else []
    if config.condition == "title" and rows and any(not row.get("Review Title") for row in rows):
        count = sum(not row.get("Review Title") for row in rows)
        problems.add(f"{config.input}: {count} rows have no Review Title, which --condition title puts into the prompt")
    if config.condition == "sampled" and len({row.get("System prompt") for row in rows}) > 1:
        problems.add(f"{config.input}: the System prompt differs between rows; --condition sampled needs one for all")
    if config.condition != "sampled" and (shared := reviews.shared_rows(rows, training)):
        problems.add(
            f"{config.input}: {shared} of its rows are training rows, whose metadata would stand unprotected in the "
            "output; name other rows, or draw metadata with --condition sampled"
        )
    ref, tokenizer = models.look_up(problems, config.model, config.revision)
    block = models.privacy(ref) if ref else None
    unit = (block or {}).get("unit", "record")
    if config.condition == "sampled" and unit == "user" and any(dataset.user_of(row) is None for row in training):
        problems.add(f"{config.training}: rows without user_id; the model's privacy unit is the user")
    histogram = Path(config.histogram) if config.histogram else output.with_name("metadata_histogram.json")
    source = problems.absorb(training_source, config.training, len(training), ref) if ref and training else None
    settings = whole = None
    if not problems.lines:
        settings = generation.settings_of(config, ref, RESUMED, input=results.sha256(config.input))
        if config.condition == "sampled":
            settings |= {"metadata_epsilon": config.metadata_epsilon, "metadata_fields": list(config.metadata_fields)}
        told = {
            "filter": config.filter,
            "metadata_delta": config.metadata_delta,
            "training": source and source["sha256"],
        }
        drawn = config.condition == "sampled" and histogram.is_file()
        whole = settings | told | {"histogram": results.sha256(histogram) if drawn else None}
        if source and source["sha256"] is None:
            whole = None  # nothing could tell whether the output stands for these training rows
    finished = problems.absorb(dataset.finished, [("--output", output)], whole, config.overwrite)
    problems.check()
    return SimpleNamespace(
        output=output,
        rows=rows,
        training=training,
        ref=ref,
        tokenizer=tokenizer,
        privacy=block,
        unit=unit,
        histogram=histogram,
        source=source,
        settings=settings,
        whole=whole,
        finished=finished,
    )


def training_source(path: str, rows: int, ref) -> dict:
    """The manifest's entry for --training. A plain hash would confirm a guessed copy of a private model's training file
    to whoever reads the manifest: there it is salted as in run.json (the salt lies in the run's trained_rows.jsonl), or
    None where that file is gone."""
    entry = {"path": path, "sha256": results.sha256(path), "rows": rows}
    if not models.privacy(ref):
        return entry
    taken = trained.read(ref.adapter or ref.base) if Path(ref.adapter or ref.base).is_dir() else None
    salt = taken.salt if taken else ""
    return entry | {"sha256": trained.salted(entry["sha256"], salt) if salt else None, "salted": True}


def release_histogram(config: SyntheticConfig, task) -> dict:
    """The released histogram: read when it is there with the same settings, else made (noise from the system)."""
    from data.synthetic import histogram

    units = len(set(map(dataset.user_of, task.training))) if task.unit == "user" else len(task.training)
    delta = config.metadata_delta or (task.privacy or {}).get("delta") or 1 / (10 * units)
    wanted = {
        "training": task.source["sha256"],
        "fields": list(config.metadata_fields),
        "epsilon": config.metadata_epsilon,
        "delta": delta,
        "unit": task.unit,
    }
    made = results.read_json(task.histogram, "name another file") if task.histogram.is_file() else None
    if made and wanted["training"] is None:
        raise cli.UserError(
            f"--histogram {task.histogram}: nothing tells whether it was released from --training, as the model's "
            "trained_rows.jsonl is gone; name another file"
        )
    differ = [key for key, value in wanted.items() if made and made.get(key) != value]
    if differ:
        raise cli.UserError(
            f"--histogram {task.histogram}: was released with another {', '.join(differ)}; name another file"
        )
    if not made:
        import numpy as np

        rng = np.random.default_rng(secrets.randbits(256))
        rows = histogram.one_row_a_user(task.training, rng) if task.unit == "user" else task.training
        cells = [tuple(row.get(field) or "" for field in config.metadata_fields) for row in rows]
        made = {
            **wanted,
            "mechanism": "two-sided geometric noise, L1 sensitivity 1 (one cell a unit), add/remove adjacency; noisy "
            "counts below the threshold are not released",
            "threshold": histogram.threshold(config.metadata_epsilon, delta),
            "cells": [
                [*cell, count] for cell, count in histogram.release(cells, config.metadata_epsilon, delta, rng).items()
            ],
        }
        results.write_json(task.histogram, made)  # an empty release too has spent its ε: it is not drawn again
    if not made["cells"]:
        raise cli.UserError(
            f"--metadata_epsilon {config.metadata_epsilon:g}: no cell of {' × '.join(config.metadata_fields)} reaches "
            f"the threshold of {made['threshold']}; raise ε or name fewer --metadata_fields, with another --histogram "
            f"(the ε of {task.histogram} is spent: the two add up)"
        )
    return made


def privacy_block(model: dict | None, released: dict | None) -> dict:
    """The manifest's `privacy`: what the model spent, what the metadata spent, and their sum (basic composition).

    epsilon is None where the model's training, and hence the whole, has no bound; δ is None where it named none.
    """
    model_epsilon = (model or {}).get("epsilon")
    parts = [model, released] if released else [model]
    bounded = model_epsilon is not None
    return {
        "private": bool((model or {}).get("private")),
        "epsilon": math.fsum(part["epsilon"] for part in parts) if bounded else None,
        "delta": math.fsum(part["delta"] for part in parts) if (model or {}).get("delta") is not None else None,
        "unit": (model or released or {}).get("unit"),
        "void": (model or {}).get("void"),
        "composition": "basic: sum over model and metadata",
        "model": model and {key: model.get(key) for key in ("private", "epsilon", "delta", "unit", "void")},
        "metadata": released and {key: value for key, value in released.items() if key not in ("cells", "training")},
        "outside_epsilon": "counts of near-copies and, unless sampled, the metadata of the rows of --input",
    }


def make_rows(config: SyntheticConfig, task, released: dict | None) -> list[dict]:
    """The rows to write, in order, without their text: prompt fields, row_id, arm, seed; `key` identifies their noise.

    --num below the number of rows takes as many, drawn by --seed, in the order of the file; above it goes round again.
    """
    import random

    n = config.num or len(task.rows)
    common = {"arm": config.arm, "condition": config.condition}
    if released:
        from data.synthetic import histogram

        system = task.rows[0].get("System prompt") or ""
        cells = {tuple(cell): count for *cell, count in released["cells"]}
        drawn = histogram.draw(cells, n, config.seed)
        empty = dict.fromkeys(dataset.REVIEW_FIELDS[1:], "") | {"System prompt": system}
        fields = [{**empty, **dict(zip(config.metadata_fields, cell))} for cell in drawn]
        picked = [(i, 0, None, row) for i, row in enumerate(fields)]
    else:
        order = list(range(len(task.rows)))
        random.Random(config.seed).shuffle(order)
        rest = set(order[: n % len(order)])
        rounds = n // len(order)
        picked = [
            (i, sample, row.get("row_id"), row)
            for sample in range(rounds + 1)
            for i, row in enumerate(task.rows)
            if sample < rounds or i in rest
        ]
    names = [name for name in dataset.REVIEW_FIELDS if name != "Review"]
    if config.condition != "title":
        names.remove("Review Title")
    return [
        {"row_id": row_id, **common, **{name: row.get(name) for name in names}, "sample": sample, "key": (i, sample)}
        for i, sample, row_id, row in picked
    ]


# ---------------------------------------------------------------- after it


def near_copies(texts: list[str], training: list[str], held_out: list[str]) -> dict:
    """Shares of texts with a run of COPY characters out of --training or --input; None without training rows.

    `held_out_in_training` is the floor: what the real reviews of --input, written by others, share with --training.
    """
    from common.text import copied_lengths

    def share(of: list[str], source: list[str]) -> float | None:
        return float((copied_lengths(of, source, (COPY,)) >= COPY).mean()) if of and source else None

    return {
        "characters": COPY,
        "training": share(texts, training),
        "held_out": share(texts, held_out),
        "held_out_in_training": share(held_out, training),
    }


def run(config: SyntheticConfig) -> dict:
    """Write the file; returns what is also printed and kept in run_generate_<arm>.json; {} with nothing to do."""
    output = destination(config)
    with results.output_file(output, dry_run=config.dry_run) as place:
        task = check(config)
        if task.finished:
            dataset.say_finished(output)
            return {}
        generation.read_partials(output, task.settings, config.overwrite)  # refuses another run's
        if config.dry_run:
            n = config.num or len(task.rows)
            print(
                f"would write {n} reviews of arm {config.arm} with {config.model} from {config.condition}, to {output}"
            )
            return {}
        return generate(config, task, place)


def generate(config: SyntheticConfig, task, place: results.Output) -> dict:
    settings = task.settings
    world = distributed.start()
    run_file = task.output.parent / f"run_generate_{config.arm}.json"
    with results.Run(run_file, config, [config.input], world, place) as record:
        if task.source:
            record["inputs"].append({key: value for key, value in task.source.items() if key != "rows"})
        dtype = models.resolve_dtype(config.dtype, world.device)
        released = None
        if config.condition == "sampled":
            released = world.together(lambda: release_histogram(config, task) if world.main else None)[0]
            settings["histogram"] = results.sha256(task.histogram)
            if task.whole:
                task.whole["histogram"] = settings["histogram"]
        rows = make_rows(config, task, released)
        dropped, filtered = Counter(), Counter()
        base = models.load_base(task.ref, dtype, world.device, config.device_map)
        prompts, rooms, kept = [], [], []
        context, least = models.context_length(base), min(generation.MIN_ROOM, config.max_new_tokens)
        for row in rows:
            prompt = encode_prompt(task.tokenizer, dataset.review_prompt(row))
            room = min(config.max_new_tokens, context - len(prompt))
            if room < least:
                dropped[f"prompt leaves fewer than {least} of the context's {context:,} tokens"] += 1
                continue
            prompts.append(prompt)
            rooms.append(room)
            kept.append(row)
        if not kept:
            raise cli.UserError(f"{config.input}: every prompt is too long for the model's {context} tokens")
        with models.adapted(base, task.ref.adapter) as (model, _):
            made = generation.continue_prompts(
                model,
                task.tokenizer,
                prompts,
                rooms,
                [row["key"] for row in kept],
                output=task.output,
                settings=settings,
                overwrite=config.overwrite,
                temperature=config.temperature,
                top_k=config.top_k,
                seed=config.seed,
                batch_size=config.batch_size,
                world=world,
            )
        if world.main:
            answer = finish(config, task, record, kept, made, released, settings, dropped, filtered)
        answer = world.broadcast(answer if world.main else None)
        world.barrier()
    if world.main:
        report(config, task, answer)
    world.close()
    return answer


def finish(config: SyntheticConfig, task, record, kept, made, released, settings, dropped, filtered) -> dict:
    """Rank 0: filter, count, write the rows and their manifest."""
    rows = []
    for row, item in zip(kept, made):
        sample = row.pop("sample")
        del row["key"]
        ended = "eos" if item["ended"] else "length"
        text = item["generation"].removeprefix(" ")
        if "empty" in config.filter and not text.strip():
            filtered["empty"] += 1
        elif "length" in config.filter and ended == "length":
            filtered["length"] += 1
        else:
            made_here = {"finish_reason": ended, "generated_tokens": item["generated_tokens"]}
            rows.append({**row, "generated_text": text, **made_here, "seed": config.seed, "sample": sample})
    texts = [row["generated_text"] for row in rows]
    held_out, trained = ([row["Review"] for row in one] for one in (task.rows, task.training))
    answer = {
        "n_requested": config.num or len(task.rows),
        "n_scored": len(rows),
        "n_dropped": sum(dropped.values()) + sum(filtered.values()),
        "dropped": dict(dropped),
        "filtered": {name: filtered[name] for name in config.filter},
        "ended": sum(row["finish_reason"] == "eos" for row in rows),
        "empty": sum(not text.strip() for text in texts),
        "near_copies": near_copies(texts, trained, held_out),
        "tokens": sum(item["generated_tokens"] for item in made),
    }
    privacy = privacy_block(task.privacy, released)
    record["statistics"], record["privacy"] = answer, privacy
    record.files.write_jsonl(task.output, rows)
    dataset.write_manifest(
        record.files,
        task.output,
        tag=f"synthetic-{config.arm}",
        script="data/synthetic/generate.py",
        argv=sys.argv,
        rows=len(rows),
        source=[(config.input, len(task.rows)), *([task.source] if task.source else [])],
        generator={key: settings[key] for key in ("model", "revision", "weights")},
        sampling={key: settings[key] for key in (*SAMPLED, "dtype")},
        settings=task.whole,
        more={"privacy": privacy, **answer},
    )
    for file in generation.partial_files(task.output):
        record.files.remove(file)
    return answer | {"privacy": privacy}


def report(config: SyntheticConfig, task, answer: dict) -> None:
    print(f"{answer['n_scored']:>9,}  reviews of arm {config.arm} in {task.output}")
    for reason, count in (answer["dropped"] | {f"--filter {k}": n for k, n in answer["filtered"].items()}).items():
        print(f"{count:>9,}  left out: {reason}")
    print(f"{answer['ended']:>9,}  ended by themselves, {answer['empty']:,} empty")
    copies = answer["near_copies"]
    words = {"training": "training rows", "held_out": "rows of --input", "held_out_in_training": "(real, floor)"}
    for key, name in words.items():
        if copies[key] is not None:
            print(f"{copies[key]:>9.2%}  share a run of {COPY} characters with {name}")
    spent = answer["privacy"]
    if spent["epsilon"] is None:
        print("          privacy: none, the model was trained without")
    else:
        note = "" if spent["private"] else " (void: see the model's privacy.json)"
        print(f"          privacy: ε {spent['epsilon']:.3f} at δ {spent['delta']:.3g}, unit {spent['unit']}{note}")


def main(argv: list[str] | None = None) -> int:
    run(make_parser().parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(cli.entry(main))
