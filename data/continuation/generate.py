#!/usr/bin/env python3
"""LLM-generated training data: a model continues the prompts of the training rows.

python data/continuation/generate.py --model EleutherAI/pythia-12b --data_set ./data/enron.jsonl
python data/continuation/generate.py -m data/embedded/mini-pythia-xl -d data/embedded/enron.jsonl -mt 150
torchrun --nproc_per_node=4 data/continuation/generate.py -m EleutherAI/pythia-12b --output data/gen/data.arrow

Only rows to train on are continued (dataset.split: 1,110 to the end of the published file). Output: their columns and
`row_id` (index in the source), `generation`, `text` = prompt + generation + EOS, `finish_reason` ('stop': the model
ended there; 'length': cut at --max_tokens or at the end of its context) and `generated_tokens`. The file is the same
whatever the number of processes. Broken rows are left out and keep their places in the split. A killed run continues
from the hidden partial file beside the output. Also written: the manifest and run_generate.json with the statistics
that are printed.
"""

import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

from common import cli, dataset, distributed, results
from common.models import encode_prompt
from data import generation
from data.continuation import text_statistics

FIELDS = ("gt-name", "gt-email", "prompt")  # of a row that is not broken
SAMPLED = ("temperature", "top_k", "max_tokens", "seed")
MAX_PROMPT_TOKENS = 2048  # prompts are shorter than this


@dataclass(frozen=True, kw_only=True)
class ContinuationConfig(cli.ModelConfig):
    """The flags of data/continuation/generate.py."""

    model: str = "EleutherAI/pythia-12b"
    data_set: str = "./data/enron.jsonl"
    top_k: int = 100
    max_tokens: int = 1000
    temperature: float = 0.75
    output: str | None = None
    batch_size: int = 0
    strict: bool = False
    overwrite: bool = False


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Let a model continue the prompts of the training rows: the LLM-generated training data.",
        "python data/continuation/generate.py --model EleutherAI/pythia-12b --data_set ./data/enron.jsonl",
        ContinuationConfig,
    )
    parser.add_argument("-m", "--model", help="the generator: directory or hub name")
    parser.add_argument("-d", "--data_set", "--dataset", "--data", help="rows in the Enron format")
    parser.add_argument("--top_k", type=cli.positive_int, help="tokens kept before sampling")
    parser.add_argument("-mt", "--max_tokens", type=cli.positive_int, help="tokens of a generation")
    parser.add_argument("--temperature", type=cli.non_negative_float, help="0 is greedy")
    parser.add_argument(
        "--output", help="the .arrow file to write (default: data/<generator>-continuations/data.arrow)"
    )
    parser.add_argument("--batch_size", type=cli.non_negative_int, help="rows decoded together; 0: by memory")
    parser.add_argument("--strict", action="store_true", help="fail when a row is broken; else it is left out")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output or unfinished run")
    cli.add_model_flags(parser)
    return parser


# ---------------------------------------------------------------- preparation


@dataclass
class Task:
    """Everything that is known before the model is loaded."""

    ref: object
    tokenizer: object
    config: object
    rows: list[dict]
    asked: list[int]  # indices of the rows continued
    prompts: list[list[int]]  # token ids of each
    rooms: list[int]  # tokens that each may generate
    head: list[int]
    split_start: int | None
    settings: dict  # what a resumed run must have in common with the killed one
    finished: bool  # the output stands already
    dropped: dict[str, int] = field(default_factory=dict)


def destination(config: ContinuationConfig) -> Path:
    return Path(config.output or f"data/{Path(config.model).name}-continuations/data.arrow")


def check(config: ContinuationConfig) -> Task:
    """Read and check every argument and file; UserError with all problems."""
    from common import models

    problems = cli.Problems()
    distributed.check_environment(problems, config.device_map)
    output = destination(config)
    cli.check_output_file(output, ".arrow", problems, (config.data_set,))
    rows, broken = problems.absorb(dataset.read_with_broken, config.data_set, FIELDS) or ([], {})
    manifest = problems.absorb(dataset.read_manifest, config.data_set) if rows else None
    if any("text" in row for row in rows[:1]):
        problems.add(f"{config.data_set}: has a `text` already (generated rows); name the rows it was made from")
    elif rows:
        lines = [f"{config.data_set}: row {index}: {reason}" for index, reason in sorted(broken.items())]
        problems.absorb(cli.report_broken, "rows", lines, len(lines), config.strict)
        if len(rows) - len(broken) < 3:
            problems.add(
                f"{config.data_set}: {len(rows) - len(broken)} whole rows with {', '.join(FIELDS)}; "
                "at least 3 are needed"
            )
        problems.absorb(dataset.check_columns, config.data_set, [r for i, r in enumerate(rows) if i not in broken])
    ref, tokenizer = models.look_up(problems, config.model, config.revision)
    settings = None
    if not problems.lines:
        data_set = results.sha256(config.data_set)
        settings = generation.settings_of(config, ref, (*SAMPLED, "batch_size", "strict"), data_set=data_set)
    finished = problems.absorb(dataset.finished, [("--output", output)], settings, config.overwrite)
    problems.check()

    architecture = models.read_config(ref.base, ref.revision, "--model")
    rows, split, start = dataset.split_source(rows, broken, manifest)
    if not split.train:
        raise cli.UserError(f"{config.data_set}: every row belongs to the evaluation head; none is left to continue")
    task = Task(ref, tokenizer, architecture, rows, [], [], [], split.head, start, settings, finished)
    context = models.context_length(SimpleNamespace(config=architecture))
    least = min(generation.MIN_ROOM, config.max_tokens)
    counts = Counter({"broken": len(broken)} if broken else {})
    for index in split.train:
        # a trailing space would be cut off the word that follows it; the generation brings its own
        prompt = encode_prompt(tokenizer, rows[index]["prompt"].rstrip(" "))
        room = min(config.max_tokens, context - len(prompt))
        if not prompt:
            counts["empty prompt"] += 1
        elif len(prompt) >= MAX_PROMPT_TOKENS:
            counts[f"prompt of {MAX_PROMPT_TOKENS:,} tokens or more"] += 1
        elif room < least:
            counts[f"prompt leaves fewer than {least} of the context's {context:,} tokens"] += 1
        else:
            task.asked.append(index)
            task.prompts.append(prompt)
            task.rooms.append(room)
    if not task.asked:
        raise cli.UserError(f"{config.data_set}: no prompt is left to continue ({dict(counts)})")
    task.dropped = dict(counts)
    return task


def as_columns(task: Task, item: dict) -> dict:
    """What a row gets of its continuation."""
    text = item["generation"]
    if task.rows[task.asked[item["index"]]]["prompt"].endswith(" "):
        text = text.removeprefix(" ")
    reason = "stop" if item["ended"] else "length"
    return {"generation": text, "finish_reason": reason, "generated_tokens": item["generated_tokens"]}


# ---------------------------------------------------------------- the run


def run(config: ContinuationConfig) -> dict:
    """Write the file; returns the statistics, which are also printed and kept in run_generate.json; {} with nothing to
    do."""
    config = replace(config, data_set=str(dataset.default_dataset(config.data_set)))
    output = destination(config)
    with results.output_file(output, dry_run=config.dry_run) as place:
        task = check(config)
        if task.finished:
            dataset.say_finished(output)
            return {}
        generation.read_partials(output, task.settings, config.overwrite)  # refuses another run's
        if config.dry_run:
            print(
                f"would continue {len(task.asked)} prompts ({sum(task.dropped.values())} dropped) of {config.data_set} "
                f"with {config.model}, at most {config.max_tokens} tokens each, and write {output}"
            )
            return {}
        return generate(config, task, output, place)


def generate(config: ContinuationConfig, task: Task, output: Path, place: results.Output) -> dict:
    from common import models

    settings = task.settings
    world = distributed.start()
    with results.Run(output.parent / "run_generate.json", config, [config.data_set], world, place) as record:
        dtype = models.resolve_dtype(config.dtype, world.device)
        base = models.load_base(task.ref, dtype, world.device, config.device_map)
        with models.adapted(base, task.ref.adapter) as (model, _):
            made = generation.continue_prompts(
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
        for item in made:
            row, more = task.rows[task.asked[item["index"]]], as_columns(task, item)
            rows.append({**row, **more, "text": row["prompt"] + more["generation"] + eos})
        numbers = text_statistics.statistics(rows, [task.rows[index] for index in task.head])
        record["statistics"], record["dropped"] = numbers, task.dropped
        if world.main:
            with record.files.open(output, "wb", 0o600) as file:
                dataset.write_arrow(file, rows)
            dataset.write_manifest(
                record.files,
                output,
                tag=f"self-generated-{Path(config.model).name}",
                script="data/continuation/generate.py",
                argv=sys.argv,
                rows=len(rows),
                source=[(config.data_set, len(task.rows))],
                split_start=task.split_start,
                generator={key: settings[key] for key in ("model", "revision", "weights")},
                sampling={key: settings[key] for key in (*SAMPLED, "dtype")},
                settings=settings,
            )
            for file in generation.partial_files(output):
                record.files.remove(file)
        world.barrier()
    if world.main:
        print(f"{len(rows):>9,}  rows in {output}")
        for reason, count in task.dropped.items():
            print(f"{count:>9,}  rows dropped: {reason}")
        print(text_statistics.report(numbers))
        print(f"{record['seconds']:.0f} s, {numbers['tokens_total'] / record['seconds']:,.0f} tokens/s")
    world.close()
    return numbers


def main(argv: list[str] | None = None) -> int:
    run(make_parser().parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(cli.entry(main))
