#!/usr/bin/env python3
"""Self-instruct (Wang et al. 2023): instructions and instances that a model makes up from data/seedTasks.json.

python data/self_instruct/generate.py --model EleutherAI/pythia-12b --output data/self-instruct.jsonl
python data/self_instruct/generate.py -m EleutherAI/pythia-12b --output data/alpaca.jsonl --format alpaca --num_rows 500
python run_peft.py -i data/self-instruct.jsonl --loss_on completion

A round: prompts of 6 seed and 2 machine-made instructions (more seeds while there are none) → new instructions →
filters (length, keywords, start, ROUGE-L F ≤ 0.7 against every seed and every instruction kept so far) → is it a
classification? → instances, output first when it is, input first when not → filters (empty output, output equal to
input, repeated, conflicting). Rounds go on until there are --num_rows instances; a killed run continues with the round
it was in. Rows: `instruction`, `input`, `output` (alpaca); also `task`, `classification`, `row_id` (instances);
or `prompt`, `generation`, `text` = prompt + generation + EOS (text). Also written: manifest, run_generate.json.
"""

import random
import sys
from collections import Counter
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace

from common import cli, dataset, distributed, results
from data import generation

SEEDS_SHOWN, MACHINE_SHOWN = 6, 2  # instructions in a prompt for new ones
INSTANCE_SEEDS = 3  # seed tasks in a prompt for instances
KIND_SEEDS = 6  # seed tasks of either kind in the question of kind
KIND_TOKENS = 4
TOO_LONG = "prompts longer than the context"
PATIENCE = 10  # rounds in a row without a row, after which the generator is given up
SAMPLED = ("temperature", "instance_temperature", "top_k", "max_tokens", "seed", "round_size")
STAGES = ("instructions", "kind", "instances")  # the position is the noise's template


@dataclass(frozen=True, kw_only=True)
class SelfInstructConfig(cli.ModelConfig):
    """The flags of data/self_instruct/generate.py."""

    model: str = "EleutherAI/pythia-12b"
    seed_tasks: str = "./data/seedTasks.json"
    output: str | None = None
    format: str = "instances"
    num_rows: int = 2220
    top_k: int = 100
    max_tokens: int = 400
    temperature: float = 0.75
    instance_temperature: float = 0.0
    round_size: int = 32
    batch_size: int = 16
    strict: bool = False
    overwrite: bool = False


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Let a model make up instructions with inputs and outputs from seed tasks (self-instruct).",
        "python data/self_instruct/generate.py --model EleutherAI/pythia-12b --output data/self-instruct.jsonl",
        SelfInstructConfig,
    )
    parser.add_argument("-m", "--model", help="the generator: directory or hub name")
    parser.add_argument("--seed_tasks", help="JSON array of instruction and examples")
    parser.add_argument("--output", help="the .jsonl file to write (default: data/self-instruct-<generator>.jsonl)")
    parser.add_argument(
        "--format",
        choices=("instances", "alpaca", "text"),
        help="instances: all fields; alpaca: instruction, input and output only; text: whole training texts",
    )
    parser.add_argument("--num_rows", type=cli.positive_int, help="instances wanted")
    parser.add_argument("--top_k", type=cli.positive_int, help="tokens kept before sampling")
    parser.add_argument("-mt", "--max_tokens", type=cli.positive_int, help="tokens of a completion")
    parser.add_argument("--temperature", type=cli.non_negative_float, help="of new instructions")
    parser.add_argument("--instance_temperature", type=cli.non_negative_float, help="of instances; 0 is greedy")
    parser.add_argument("--round_size", type=cli.positive_int, help="prompts of a round")
    parser.add_argument("--batch_size", type=cli.positive_int, help="prompts decoded together")
    parser.add_argument("--strict", action="store_true", help="fail when a seed task is broken; else it is left out")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output or unfinished run")
    cli.add_model_flags(parser)
    return parser


def read_seed_tasks(path, strict: bool = False) -> tuple[list[dict], int]:
    """(the whole tasks of seedTasks.json, number of broken ones, which are said on stderr); UserError when `strict` or
    when too few are left."""
    path = Path(path)
    try:
        tasks = results.read_json(path, "give an array of tasks", list)
    except cli.UserError as error:
        raise cli.UserError(*(f"--seed_tasks {line}" for line in error.problems)) from None
    whole = [is_whole(task) for task in tasks]
    lines = [
        f"--seed_tasks {path}: task {number}: needs an instruction and examples of input and output, all text"
        for number, good in enumerate(whole)
        if not good
    ]
    cli.report_broken("tasks", lines, len(lines), strict)
    if sum(whole) < SEEDS_SHOWN + MACHINE_SHOWN:
        raise cli.UserError(
            f"--seed_tasks {path}: {sum(whole)} whole tasks; at least {SEEDS_SHOWN + MACHINE_SHOWN} are needed"
        )
    return [task for task, good in zip(tasks, whole) if good], len(lines)


def is_whole(task) -> bool:
    """Whether an item of seedTasks.json is {instruction, examples: [{input, output}, …]}, all text."""
    examples = task.get("examples") if isinstance(task, dict) else None
    if not isinstance(examples, list) or not examples or not isinstance(task.get("instruction"), str):
        return False
    return all(
        isinstance(one, dict) and isinstance(one.get("input"), str) and isinstance(one.get("output"), str)
        for one in examples
    )


def complete(
    model, tokenizer, prompts: list[str], stage: str, first: int, config: SelfInstructConfig, world
) -> list[tuple[str, bool] | None]:
    """(completion, the model ended it) of every prompt, on every rank; None for one that the context cannot hold.

    first: number of the first prompt of this stage in the whole run, which with the stage fixes the noise.
    """
    import torch

    from common import models, sampling

    temperature = {"instructions": config.temperature, "kind": 0.0, "instances": config.instance_temperature}[stage]
    max_tokens = KIND_TOKENS if stage == "kind" else config.max_tokens
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    room = models.context_length(base) - max_tokens
    ids = models.encode_texts(tokenizer, prompts)
    fit = sorted((i for i in range(len(ids)) if len(ids[i]) <= room), key=lambda i: (len(ids[i]), i))
    batches = [fit[start : start + config.batch_size] for start in range(0, len(fit), config.batch_size)]
    stop = torch.zeros(base.config.get_text_config().vocab_size, dtype=torch.bool)
    stop[tokenizer.eos_token_id] = True
    stop[len(tokenizer) :] = True  # ids that pad the vocabulary and have no text

    def mine() -> list[tuple[int, tuple[str, bool]]]:
        made = []
        for batch in world.shard(batches):
            answers = sampling.sweep(
                model,
                [ids[i] for i in batch],
                [(first + i, STAGES.index(stage)) for i in batch],
                [temperature],
                top_k=config.top_k,
                max_tokens=max_tokens,
                seed=config.seed,
                stop=stop,
                batch_size=len(batch),
            )
            for i, answer in zip(batch, answers):
                tokens = answer.tokens[0]
                ended = bool(stop[tokens[-1]])
                made.append((i, (tokenizer.decode(tokens, skip_special_tokens=True), ended)))
        return made

    found = dict(item for part in world.together(mine) for item in part)
    return [found.get(i) for i in range(len(prompts))]


def one_round(ask, seeds: list[dict], pool, machine: list[str], rng: random.Random, round_size: int) -> dict:
    """{'tasks': [{instruction, classification, instances}], 'counts': {…}} of one round; `pool` takes what is kept.

    ask(prompts, stage) → [(completion, ended) or None]; machine: instructions kept in earlier rounds.
    """
    from data.self_instruct import filters

    counts = Counter()
    prompts = []
    for _ in range(round_size):
        shown = rng.sample(machine, min(MACHINE_SHOWN, len(machine)))
        shown += [task["instruction"] for task in rng.sample(seeds, SEEDS_SHOWN + MACHINE_SHOWN - len(shown))]
        rng.shuffle(shown)
        prompts.append(filters.instruction_prompt(shown))
    kept = []
    for answer in ask(prompts, "instructions"):
        if answer is None:
            counts[TOO_LONG] += 1
            continue
        found, cut = filters.parse_instructions(*answer)
        counts["instructions: candidates"] += len(found) + cut
        counts["instructions: cut"] += cut
        for instruction in found:
            fault = filters.instruction_fault(instruction)
            if fault is None and pool.alike(instruction):
                fault = "alike"
            if fault:
                counts[f"instructions: {fault}"] += 1
            else:
                pool.add(instruction)
                kept.append(instruction)
    counts["instructions: kept"] += len(kept)

    by_kind = {True: [], False: []}
    for task in seeds:
        by_kind[filters.is_classification(task)].append(task)
    # taking turns: a small model repeats the answer that it saw several times in a row
    turns = zip_longest(by_kind[True][:KIND_SEEDS], by_kind[False][:KIND_SEEDS])
    shots = [task for pair in turns for task in pair if task]
    answers = ask([filters.kind_prompt(shots, instruction) for instruction in kept], "kind")
    counts[TOO_LONG] += answers.count(None)
    kinds = [answer is not None and answer[0].strip().casefold().startswith("yes") for answer in answers]
    prompts = [
        filters.instance_prompt(
            rng.sample(by_kind[kind] or seeds, min(INSTANCE_SEEDS, len(by_kind[kind] or seeds))), instruction, kind
        )
        for instruction, kind in zip(kept, kinds)
    ]
    tasks = []
    for instruction, kind, answer in zip(kept, kinds, ask(prompts, "instances")):
        counts[TOO_LONG] += answer is None
        instances, lost = filters.parse_instances(*answer, kind) if answer else ([], Counter())
        good, dropped = filters.filter_instances(instances)
        counts["instances: candidates"] += len(instances) + sum(lost.values())
        counts.update({f"instances: {reason}": number for reason, number in (lost + dropped).items()})
        counts["instances: kept"] += len(good)
        counts["classification tasks"] += kind
        counts["tasks without an instance"] += not good
        tasks.append({"instruction": instruction, "classification": kind, "instances": good})
    return {"tasks": tasks, "counts": dict(counts)}


def rows_of(rounds: list[dict]) -> list[dict]:
    """The instances of all rounds, a row each, in the order in which they were made."""
    tasks = [task for one in rounds for task in one["tasks"]]
    rows = []
    for number, task in enumerate(tasks):
        for given, output in task["instances"]:
            rows.append(
                {
                    "instruction": task["instruction"],
                    "input": given,
                    "output": output,
                    "task": number,
                    "classification": task["classification"],
                    "row_id": len(rows),
                }
            )
    return rows


def formatted(rows: list[dict], style: str, eos: str) -> list[dict]:
    """Rows of `rows_of` in one of the --format styles; run_peft.py knows the completion's start in each."""
    if style == "instances":
        return rows
    if style == "alpaca":
        return [{key: row[key] for key in ("instruction", "input", "output")} for row in rows]
    prompts = [dataset.instruction_prompt(row) for row in rows]
    return [
        {"prompt": prompt, "generation": row["output"], "text": prompt + row["output"] + eos}
        for prompt, row in zip(prompts, rows)
    ]


def make_rounds(
    model, tokenizer, seeds, config: SelfInstructConfig, settings: dict, partial: Path, world
) -> list[dict]:
    """Rounds until there are --num_rows instances, each appended to the partial file as it ends."""
    from common.distributed import progress_bar
    from data.self_instruct import filters

    rounds = world.broadcast(results.read_partial(partial, settings, config.overwrite)[1:])
    if world.main:
        results.write_jsonl(partial, [{"settings": settings}, *rounds])
    pool = filters.RougePool()
    machine = [task["instruction"] for one in rounds for task in one["tasks"]]
    for instruction in [task["instruction"] for task in seeds] + machine:
        pool.add(instruction)
    made = len(rows_of(rounds))
    with progress_bar(config.num_rows, "rows", world) as bar:
        bar.update(made)
        while made < config.num_rows:
            if len(rounds) >= PATIENCE and not rows_of(rounds[-PATIENCE:]):
                lost = sum((Counter(one["counts"]) for one in rounds), Counter())
                raise cli.UserError(
                    f"--model {config.model}: {PATIENCE} rounds in a row gave no instance ({made} of {config.num_rows} "
                    f"so far; {dict(lost)}); use a stronger generator or other settings"
                )
            number, n_machine = len(rounds), len(machine)

            def ask(prompts, stage, number=number, n_machine=n_machine):
                first = number * config.round_size if stage == "instructions" else n_machine
                return complete(model, tokenizer, prompts, stage, first, config, world)

            rng = random.Random(f"{config.seed}/{number}")
            one = one_round(ask, seeds, pool, machine, rng, config.round_size)
            rounds.append(one)
            machine += [task["instruction"] for task in one["tasks"]]
            made += len(rows_of([one]))
            bar.update(len(rows_of([one])))
            if world.main:
                with open(partial, "a", encoding="utf-8") as file:
                    results.append_line(file, one)
    return rounds


def report(counts: Counter, rows: int, output: Path) -> str:
    """What was kept and what each filter took, in words."""
    lines = [f"{rows:>9,}  rows in {output}"]
    for kind in ("instructions", "instances"):
        total = counts[f"{kind}: candidates"]
        lines.append(f"{total:>9,}  candidate {kind}")
        reasons = sorted(key for key in counts if key.startswith(f"{kind}: ") and not key.endswith(": candidates"))
        lines += [f"{counts[key]:>9,}  {key} ({counts[key] / max(1, total):.1%})" for key in reasons]
    others = ("broken seed tasks", "classification tasks", "tasks without an instance", TOO_LONG)
    lines += [f"{counts[key]:>9,}  {key}" for key in others]
    return "\n".join(lines)


def destination(config: SelfInstructConfig) -> Path:
    return Path(config.output or f"data/self-instruct-{Path(config.model).name}.jsonl")


def check(config: SelfInstructConfig) -> SimpleNamespace:
    """Read and check every argument and file; UserError with all problems."""
    from common import models

    problems = cli.Problems()
    distributed.check_environment(problems, config.device_map)
    output = destination(config)
    cli.check_output_file(output, ".jsonl", problems, (config.seed_tasks,))
    seeds, broken = problems.absorb(read_seed_tasks, config.seed_tasks, config.strict) or ([], 0)
    ref, tokenizer = models.look_up(problems, config.model, config.revision)
    settings = whole = None
    if not problems.lines:
        settings = generation.settings_of(config, ref, SAMPLED, seed_tasks=results.sha256(config.seed_tasks))
        whole = settings | {key: getattr(config, key) for key in ("num_rows", "format", "strict")}
    finished = problems.absorb(dataset.finished, [("--output", output)], whole, config.overwrite)
    problems.check()
    return SimpleNamespace(
        seeds=seeds, broken=broken, ref=ref, tokenizer=tokenizer, settings=settings, whole=whole, finished=finished
    )


def run(config: SelfInstructConfig) -> dict:
    """Write the file; returns the counts by filter, which are also printed and kept in run_generate.json; {} with
    nothing to do."""
    config = replace(config, seed_tasks=str(dataset.default_dataset(config.seed_tasks)))
    output = destination(config)
    partial = output.with_name(f".{output.name}.partial.jsonl")
    with results.output_file(output, dry_run=config.dry_run) as place:
        task = check(config)
        if task.finished:
            dataset.say_finished(output)
            return {}
        results.read_partial(partial, task.settings, config.overwrite)  # refuses another run's
        if config.dry_run:
            print(f"would make {config.num_rows} rows from {len(task.seeds)} seed tasks with {config.model}: {output}")
            return {}
        return generate(config, task, output, partial, place)


def generate(config: SelfInstructConfig, task, output: Path, partial: Path, place: results.Output) -> dict:
    from common import models

    settings = task.settings
    world = distributed.start()
    with results.Run(output.parent / "run_generate.json", config, [config.seed_tasks], world, place) as record:
        dtype = models.resolve_dtype(config.dtype, world.device)
        base = models.load_base(task.ref, dtype, world.device, config.device_map)
        with models.adapted(base, task.ref.adapter) as (model, _):
            rounds = make_rounds(model, task.tokenizer, task.seeds, config, settings, partial, world)
        rows = formatted(rows_of(rounds)[: config.num_rows], config.format, task.tokenizer.eos_token)
        counts = sum((Counter(one["counts"]) for one in rounds), Counter({"broken seed tasks": task.broken}))
        record["counts"], record["rounds"] = counts, len(rounds)
        record["keep_rate"] = {
            kind: counts[f"{kind}: kept"] / max(1, counts[f"{kind}: candidates"])
            for kind in ("instructions", "instances")
        }
        if world.main:
            record.files.write_jsonl(output, rows)
            dataset.write_manifest(
                record.files,
                output,
                tag=f"self-instruct-{Path(config.model).name}",
                script="data/self_instruct/generate.py",
                argv=sys.argv,
                rows=len(rows),
                source=[(config.seed_tasks, len(task.seeds) + task.broken)],
                generator={key: settings[key] for key in ("model", "revision", "weights")},
                sampling={key: settings[key] for key in (*SAMPLED, "dtype")},
                settings=task.whole,
            )
            record.files.remove(partial)
        world.barrier()
    world.say(report(counts, len(rows), output))
    world.close()
    return dict(counts)


def main(argv: list[str] | None = None) -> int:
    run(make_parser().parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(cli.entry(main))
