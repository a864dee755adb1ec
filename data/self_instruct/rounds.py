"""Rounds of self-instruct: new instructions, whether they are classifications, their instances."""

import random
from collections import Counter
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypedDict, cast

from common import json_files, publication
from common.distributed import World, progress_bar
from common.problems import UserError
from data.self_instruct import filters
from data.self_instruct.completion import Answer, complete
from data.self_instruct.config import SelfInstructConfig
from data.self_instruct.seed_tasks import SHOWN, SeedTask

GENERATED_SHOWN = 2  # of the SHOWN instructions in a prompt for new ones
INSTANCE_SEEDS = 3  # seed tasks in a prompt for instances
KIND_SEEDS = 6  # seed tasks of each kind in the prompt that asks for the kind
TOO_LONG = "prompts longer than the context"
PATIENCE = 10  # give up after so many rounds in a row without an instance

Ask = Callable[[list[str], str], list[Answer | None]]  # (prompts, stage) → answers


class NoInstanceError(UserError):
    """The generator writes nothing that passes the filters."""


class GeneratedTask(TypedDict):
    """instances: (input, output) of each."""

    instruction: str
    classification: bool
    instances: list[tuple[str, str]]


class Round(TypedDict):
    """counts: what was kept and what each filter dropped."""

    tasks: list[GeneratedTask]
    counts: dict[str, int]


def make_rounds(
    model: Any,
    tokenizer: Any,
    seeds: list[SeedTask],
    config: SelfInstructConfig,
    settings: dict[str, Any],
    partial: Path,
    world: World,
) -> list[Round]:
    """Rounds until there are --num_rows instances, each appended to the partial file as it ends."""
    earlier_rounds = json_files.read_partial(partial, settings, config.overwrite)[1:]
    rounds = world.broadcast(cast(list[Round], earlier_rounds))
    if world.main:
        publication.write_jsonl(partial, [{"settings": settings}, *rounds])
    pool = filters.RougePool()
    generated = [task["instruction"] for earlier in rounds for task in earlier["tasks"]]
    for instruction in [task["instruction"] for task in seeds] + generated:
        pool.add(instruction)
    done = sum(map(size, rounds))
    with progress_bar(config.num_rows, "rows", world) as bar:
        bar.update(done)
        while done < config.num_rows:
            if len(rounds) >= PATIENCE and not any(map(size, rounds[-PATIENCE:])):
                lost = sum((Counter(earlier["counts"]) for earlier in rounds), Counter[str]())
                raise NoInstanceError(
                    f"--model {config.model}: {PATIENCE} rounds in a row gave no instance ({done} of {config.num_rows} "
                    f"so far; {dict(lost)}); use a stronger generator or other settings"
                )
            number, n_generated = len(rounds), len(generated)

            def ask(
                prompts: list[str], stage: str, number: int = number, n_generated: int = n_generated
            ) -> list[Answer | None]:
                first = number * config.round_size if stage == "instructions" else n_generated
                return complete(model, tokenizer, prompts, stage, first, config, world)

            rng = random.Random(f"{config.seed}/{number}")
            latest = one_round(ask, seeds, pool, generated, rng, config.round_size)
            rounds.append(latest)
            generated += [task["instruction"] for task in latest["tasks"]]
            done += size(latest)
            bar.update(size(latest))
            if world.main:
                with open(partial, "a", encoding="utf-8") as file:
                    publication.append_line(file, latest)
    return rounds


def size(finished: Round) -> int:
    """Instances of a round."""
    return sum(len(task["instances"]) for task in finished["tasks"])


def one_round(
    ask: Ask,
    seeds: list[SeedTask],
    pool: filters.RougePool,
    generated: list[str],
    rng: random.Random,
    round_size: int,
) -> Round:
    """One round. generated: instructions kept in earlier rounds; those kept now are added to `pool`."""
    counts: Counter[str] = Counter()
    prompts = [instruction_prompt(seeds, generated, rng) for _ in range(round_size)]
    kept = keep_new(ask(prompts, "instructions"), pool, counts)
    by_kind: dict[bool, list[SeedTask]] = {True: [], False: []}
    for seed in seeds:
        by_kind[filters.is_classification(seed)].append(seed)
    kinds = ask_kinds(ask, by_kind, kept, counts)
    prompts = []
    for instruction, kind in zip(kept, kinds):
        shown = by_kind[kind] or seeds
        shown = rng.sample(shown, min(INSTANCE_SEEDS, len(shown)))
        prompts.append(filters.instance_prompt(shown, instruction, kind))
    tasks: list[GeneratedTask] = []
    for instruction, kind, answer in zip(kept, kinds, ask(prompts, "instances")):
        counts[TOO_LONG] += answer is None
        instances, lost = filters.parse_instances(*answer, kind) if answer else ([], Counter[str]())
        good, dropped = filters.filter_instances(instances)
        counts["instances: candidates"] += len(instances) + sum(lost.values())
        counts.update({f"instances: {reason}": number for reason, number in (lost + dropped).items()})
        counts["instances: kept"] += len(good)
        counts["classification tasks"] += kind
        counts["tasks without an instance"] += not good
        tasks.append({"instruction": instruction, "classification": kind, "instances": good})
    return {"tasks": tasks, "counts": dict(counts)}


def instruction_prompt(seeds: list[SeedTask], generated: list[str], rng: random.Random) -> str:
    """A prompt for new instructions that shows those of seed tasks and, after the first round, generated ones."""
    shown = rng.sample(generated, min(GENERATED_SHOWN, len(generated)))
    shown += [task["instruction"] for task in rng.sample(seeds, SHOWN - len(shown))]
    rng.shuffle(shown)
    return filters.instruction_prompt(shown)


def keep_new(answers: list[Answer | None], pool: filters.RougePool, counts: Counter[str]) -> list[str]:
    """The instructions that pass the filters, each added to the pool at once."""
    kept = []
    for answer in answers:
        if answer is None:
            counts[TOO_LONG] += 1
            continue
        candidates, cut = filters.parse_instructions(*answer)
        counts["instructions: candidates"] += len(candidates) + cut
        counts["instructions: cut"] += cut
        for instruction in candidates:
            fault = filters.instruction_fault(instruction)
            if fault is None and pool.alike(instruction):
                fault = "alike"
            if fault:
                counts[f"instructions: {fault}"] += 1
            else:
                pool.add(instruction)
                kept.append(instruction)
    counts["instructions: kept"] += len(kept)
    return kept


def ask_kinds(
    ask: Ask, by_kind: dict[bool, list[SeedTask]], instructions: list[str], counts: Counter[str]
) -> list[bool]:
    """For each instruction, whether the model calls it a classification."""
    # alternating, as a small model repeats an answer that it saw several times in a row
    turns = zip_longest(by_kind[True][:KIND_SEEDS], by_kind[False][:KIND_SEEDS])
    shown = [seed for turn in turns for seed in turn if seed]
    answers = ask([filters.kind_prompt(shown, instruction) for instruction in instructions], "kind")
    counts[TOO_LONG] += answers.count(None)
    return [answer is not None and answer[0].strip().casefold().startswith("yes") for answer in answers]
