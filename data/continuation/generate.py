#!/usr/bin/env python3
"""Generate training data: a model continues the prompts of the training rows.

python data/continuation/generate.py --model EleutherAI/pythia-12b --data_set ./data/enron.jsonl
python data/continuation/generate.py -m data/embedded/mini-pythia-xl -d data/embedded/enron.jsonl -mt 150
torchrun --nproc_per_node=4 data/continuation/generate.py -m EleutherAI/pythia-12b --output data/gen/data.arrow

Only training rows are continued (dataset.split: from row 1,110 on in the published file). Output columns: those of the
source plus `row_id` (index in the source), `generation`, `text` = prompt + generation + EOS, `finish_reason` ('stop':
the model ended there; 'length': cut at --max_tokens or at the end of the context) and `generated_tokens`. The output
does not depend on the number of processes. Malformed rows are left out but keep their positions in the split. A killed
run resumes from the hidden partial file next to the output. Also written: the manifest, and run_generate.json with the
printed statistics.
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

FIELDS = ("gt-name", "gt-email", "prompt")  # that every well-formed row has
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
        "Generate training data by letting a model continue the prompts of the training rows.",
        "python data/continuation/generate.py --model EleutherAI/pythia-12b --data_set ./data/enron.jsonl",
        ContinuationConfig,
    )
    parser.add_argument("-m", "--model", help="the generator: directory or hub name")
    parser.add_argument("-d", "--data_set", "--dataset", "--data", help="rows in the Enron format")
    parser.add_argument("--top_k", type=cli.positive_int, help="sample from the k most likely tokens")
    parser.add_argument("-mt", "--max_tokens", type=cli.positive_int, help="maximum tokens per generation")
    parser.add_argument("--temperature", type=cli.non_negative_float, help="0 is greedy")
    parser.add_argument(
        "--output", help="the .arrow file to write (default: data/<generator>-continuations/data.arrow)"
    )
    parser.add_argument("--batch_size", type=cli.non_negative_int, help="rows decoded together; 0: as memory allows")
    parser.add_argument("--strict", action="store_true", help="fail if a row is malformed, instead of leaving it out")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output or unfinished run")
    cli.add_model_flags(parser)
    return parser


@dataclass
class Task:
    """The checked inputs and settings of a run, complete before the model is loaded."""

    ref: object
    tokenizer: object
    config: object
    rows: list[dict]
    asked: list[int]  # indices of the rows to continue
    prompts: list[list[int]]  # their token ids
    rooms: list[int]  # maximum tokens to generate for each
    head: list[int]
    split_start: int | None
    settings: dict  # what a resumed run must share with the killed one
    finished: bool  # the output already exists
    dropped: dict[str, int] = field(default_factory=dict)


def destination(config: ContinuationConfig) -> Path:
    return Path(config.output or f"data/{Path(config.model).name}-continuations/data.arrow")


def check(config: ContinuationConfig) -> Task:
    """Read and check all arguments and files; problems raise one UserError."""
    from common import models

    problems = cli.Problems()
    distributed.check_environment(problems, config.device_map)
    output = destination(config)
    cli.check_output_file(output, ".arrow", problems, (config.data_set,))
    rows, broken = problems.absorb(dataset.read_with_broken, config.data_set, FIELDS) or ([], {})
    manifest = problems.absorb(dataset.read_manifest, config.data_set) if rows else None
    if any("text" in row for row in rows[:1]):
        problems.add(
            f"{config.data_set}: already has a `text` column (generated rows); pass the rows it was generated from"
        )
    elif rows:
        lines = [f"{config.data_set}: row {index}: {reason}" for index, reason in sorted(broken.items())]
        problems.absorb(cli.report_broken, "rows", lines, len(lines), config.strict)
        if len(rows) - len(broken) < 3:
            problems.add(
                f"{config.data_set}: {len(rows) - len(broken)} valid rows with {', '.join(FIELDS)}; "
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
        raise cli.UserError(f"{config.data_set}: all rows belong to the evaluation head; there are none to continue")
    task = Task(ref, tokenizer, architecture, rows, [], [], [], split.head, start, settings, finished)
    context = models.context_length(SimpleNamespace(config=architecture))
    least = min(generation.MIN_ROOM, config.max_tokens)
    counts = Counter({"broken": len(broken)} if broken else {})
    for index in split.train:
        # without the trailing space, which tokenizers attach to the next word: the generation starts with it
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
    """The columns that a continuation adds to its row."""
    text = item["generation"]
    if task.rows[task.asked[item["index"]]]["prompt"].endswith(" "):
        text = text.removeprefix(" ")
    reason = "stop" if item["ended"] else "length"
    return {"generation": text, "finish_reason": reason, "generated_tokens": item["generated_tokens"]}


def run(config: ContinuationConfig) -> dict:
    """Write the file and return the statistics, which are also printed and written to run_generate.json; {} if there is
    nothing to do."""
    config = replace(config, data_set=str(dataset.default_dataset(config.data_set)))
    output = destination(config)
    with results.output_file(output, dry_run=config.dry_run) as locked:
        task = check(config)
        if task.finished:
            dataset.say_finished(output)
            return {}
        generation.read_partials(output, task.settings, config.overwrite)  # rejects those of a different run
        if config.dry_run:
            print(
                f"would continue {len(task.asked)} prompts ({sum(task.dropped.values())} dropped) of {config.data_set} "
                f"with {config.model}, at most {config.max_tokens} tokens each, and write {output}"
            )
            return {}
        return generate(config, task, output, locked)


def generate(config: ContinuationConfig, task: Task, output: Path, locked: results.Output) -> dict:
    from common import models

    settings = task.settings
    world = distributed.start()
    with results.Run(output.parent / "run_generate.json", config, [config.data_set], world, locked) as record:
        dtype = models.resolve_dtype(config.dtype, world.device)
        base = models.load_base(task.ref, dtype, world.device, config.device_map)
        with models.adapted(base, task.ref.adapter) as (model, _):
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
