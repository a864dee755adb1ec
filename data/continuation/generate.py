#!/usr/bin/env python3
"""LLM-generated training data: a model continues the prompts of the training rows.

python data/continuation/generate.py --model EleutherAI/pythia-12b --data_set ./data/enron.jsonl
python data/continuation/generate.py -m data/embedded/mini-pythia-xl -d data/embedded/enron.jsonl -mt 150
torchrun --nproc_per_node=4 data/continuation/generate.py -m EleutherAI/pythia-12b --output data/gen/data.arrow

Only rows to train on are continued (records.split: 1,110 to the end of the published file). Output: their columns and
`row_id` (index in the source), `generation`, `text` = prompt + generation + EOS, `finish_reason` ('stop': the model
ended there; 'length': cut at --max_tokens or at the end of its context) and `generated_tokens`. The file is the same
whatever the number of processes. Broken rows are left out and keep their places in the split. A killed run continues
from the hidden partial file beside the output. Also written: the manifest and run_generate.json with the statistics
that are printed.
"""

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import cli, distributed, records, results
from data.continuation import measures

FIELDS = ("gt-name", "gt-email", "prompt")  # of a row that is not broken
MAX_PROMPT_TOKENS = 2048  # prompts are shorter than this
MIN_ROOM = 16  # a prompt that leaves the context fewer tokens than this (and than --max_tokens) is dropped
MAX_BATCH = 64  # rows decoded together when memory does not bind


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Let a model continue the prompts of the training rows: the LLM-generated training data.",
        "python data/continuation/generate.py --model EleutherAI/pythia-12b --data_set ./data/enron.jsonl",
    )
    parser.add_argument("-m", "--model", default="EleutherAI/pythia-12b", help="the generator: directory or hub name")
    parser.add_argument("-d", "--data_set", "--dataset", default="./data/enron.jsonl", help="rows in the Enron format")
    parser.add_argument("--top_k", type=cli.positive_int, default=100, help="tokens kept before sampling")
    parser.add_argument("-mt", "--max_tokens", type=cli.positive_int, default=1000, help="tokens of a generation")
    parser.add_argument("--temperature", type=cli.non_negative_float, default=0.75, help="0 is greedy")
    parser.add_argument(
        "--output", help="the .arrow file to write (default: data/<generator>-continuations/data.arrow)"
    )
    parser.add_argument(
        "--batch_size", type=cli.non_negative_int, default=0, help="rows decoded together; 0: by memory"
    )
    parser.add_argument("--strict", action="store_true", help="fail when a row is broken; else it is left out")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output or unfinished run")
    cli.add_model_flags(parser)
    return parser


# ---------------------------------------------------------------- batches (pure functions)


def plan_batches(lengths: list[int], rooms: list[int], row_bytes, budget: int, batch_size: int = 0) -> list[list[int]]:
    """Indices of prompts in batches, shortest prompts first; every batch has one room.

    lengths: tokens of each prompt; rooms: tokens that each may generate; row_bytes(length, room): bytes that a row of a
    batch needs; budget: bytes a batch may use. batch_size > 0 takes that many rows and leaves memory to the user.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (lengths[index], index)):
        room = rooms[index]
        size = batch_size or max(1, min(MAX_BATCH, budget // row_bytes(lengths[index], room)))
        if not batches or len(batches[-1]) >= size or rooms[batches[-1][0]] != room:
            batches.append([])
        batches[-1].append(index)
    return batches


def row_bytes_of(config, element_size: int):
    """row_bytes of plan_batches for a model: cache, attention scores of the prompt (float32, three copies), logits."""
    config = config.get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    position = 2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * size
    return lambda length, room: (
        position * element_size * (length + room) + (12 * heads + 2) * length**2 + 8 * config.vocab_size
    )


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
    output: Path
    dropped: dict[str, int] = field(default_factory=dict)


def check(args) -> Task:
    """Read and check every argument and file; UserError with all problems."""
    from transformers import AutoConfig

    from common import models

    problems = cli.Problems()
    distributed.check_environment(problems, args.device_map)
    args.data_set = str(records.default_dataset(args.data_set))
    generator = Path(args.model).name
    output = Path(args.output or f"data/{generator}-continuations/data.arrow")
    cli.check_output_file(output, ".arrow", args.overwrite, problems)
    cli.check_writable(output.parent, problems, "--output")
    rows, broken = problems.absorb(records.read_with_broken, args.data_set, FIELDS) or ([], {})
    manifest = problems.absorb(records.read_manifest, args.data_set) if rows else None
    if any("text" in row for row in rows[:1]):
        problems.add(f"{args.data_set}: has a `text` already (generated rows); name the rows it was made from")
    elif rows:
        lines = [f"{args.data_set}: row {index}: {reason}" for index, reason in sorted(broken.items())]
        problems.absorb(cli.report_broken, "rows", lines, len(lines), args.strict)
        if len(rows) - len(broken) < 3:
            problems.add(
                f"{args.data_set}: {len(rows) - len(broken)} whole rows with {', '.join(FIELDS)}; at least 3 are needed"
            )
    ref = problems.absorb(models.find_model, args.model, args.revision)
    tokenizer = problems.absorb(models.load_tokenizer, ref) if ref else None
    problems.check()

    config = AutoConfig.from_pretrained(ref.base, revision=ref.revision)
    rows, split, start = records.split_source(rows, broken, manifest)
    if not split.train:
        raise cli.UserError(f"{args.data_set}: every row belongs to the evaluation head; none is left to continue")
    task = Task(ref, tokenizer, config, rows, [], [], [], split.head, start, output)
    context = models.context_length(SimpleNamespace(config=config))
    least = min(MIN_ROOM, args.max_tokens)
    counts = Counter({"broken": len(broken)} if broken else {})
    for index in split.train:
        # a trailing space would be cut off the word that follows it; the generation brings its own
        prompt = tokenizer(rows[index]["prompt"].rstrip(" "), verbose=False).input_ids
        while prompt and prompt[-1] == tokenizer.eos_token_id and len(prompt) > 1:
            prompt.pop()
        room = min(args.max_tokens, context - len(prompt))
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
        raise cli.UserError(f"{args.data_set}: no prompt is left to continue ({dict(counts)})")
    task.dropped = dict(counts)
    return task


# ---------------------------------------------------------------- the partial file


def partial_files(output: Path) -> list[Path]:
    """The hidden files of an unfinished run, one a process: a line of settings, then a line a finished batch."""
    return sorted(output.parent.glob(f".{output.name}.partial-*.jsonl"))


def read_partials(output: Path, settings: dict, overwrite: bool) -> tuple[int | None, dict[str, list]]:
    """(memory budget of the unfinished run or None, batch number → its rows); refuses as `results.read_partial`."""
    budget, done = None, {}
    for file in partial_files(output):
        for line in results.read_partial(file, settings, overwrite):
            budget = line.get("budget", budget)
            done.update({line["batch"]: line["rows"]} if "batch" in line else {})
    return budget, done


def generate(model, task: Task, args, settings: dict, world) -> list[dict]:
    """[{index, generation, finish_reason, generated_tokens}] of every row asked, on every rank, in file order."""
    import torch

    from common import sampling
    from common.progress import progress_bar

    found = world.gather(read_partials(task.output, settings, args.overwrite))
    budgets = [budget for budget, _ in found if budget] or world.gather(sampling.memory_budget(world.device))
    budget, done = min(budgets), {number: rows for _, part in found for number, rows in part.items()}
    element_size = next(model.parameters()).element_size()
    batches = plan_batches(
        [len(prompt) for prompt in task.prompts],
        task.rooms,
        row_bytes_of(task.config, element_size),
        budget,
        args.batch_size,
    )
    header = {"settings": settings, "budget": budget}
    mine_file = task.output.with_name(f".{task.output.name}.partial-{world.rank}.jsonl")
    if world.main:
        first = task.output.with_name(f".{task.output.name}.partial-0.jsonl")
        lines = [{"batch": number, "rows": rows} for number, rows in sorted(done.items())]
        results.write_jsonl(first, [header, *lines])
        for file in partial_files(task.output):
            if file != first:
                file.unlink()
        if done:
            world.say(f"{sum(map(len, done.values()))} rows were generated before the run was interrupted")
    world.barrier()

    stop = torch.zeros(task.config.get_text_config().vocab_size, dtype=torch.bool)
    stop[task.tokenizer.eos_token_id] = True
    stop[len(task.tokenizer) :] = True  # ids that pad the vocabulary and have no text

    def continue_mine() -> list:
        todo = [number for number in range(len(batches)) if number not in done]
        # the longest first: a batch that does not fit memory shows at once
        mine = world.shard(todo[::-1])
        made = []
        with (
            open(mine_file, "a", encoding="utf-8") as file,
            progress_bar(sum(len(batches[number]) for number in mine), "rows", world) as bar,
        ):
            if world.rank:
                results.append_line(file, header)
            for number in mine:
                batch = batches[number]
                answers = sampling.sweep(
                    model,
                    [task.prompts[i] for i in batch],
                    [(task.asked[i], 0) for i in batch],
                    [args.temperature],
                    top_k=args.top_k,
                    max_tokens=task.rooms[batch[0]],
                    seed=args.seed,
                    stop=stop,
                    batch_size=len(batch),
                )
                rows = [finish(task, i, answer.tokens[0], stop) for i, answer in zip(batch, answers)]
                results.append_line(file, {"batch": number, "rows": rows})
                made += rows
                bar.update(len(batch))
        return made

    made = [row for part in world.together(continue_mine) for row in part]
    made += [row for rows in done.values() for row in rows]
    return sorted(made, key=lambda row: row["index"])


def finish(task: Task, i: int, tokens: list[int], stop) -> dict:
    """The partial file's item of one prompt and the tokens sampled after it."""
    ended = bool(stop[tokens[-1]])
    new = tokens[:-1] if ended else tokens
    # decoded together with the prompt: some tokenizers drop the space a text begins with
    before, whole = task.tokenizer.batch_decode(
        [task.prompts[i], task.prompts[i] + new], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    generation = whole[len(before) :]
    if task.rows[task.asked[i]]["prompt"].endswith(" "):
        generation = generation.removeprefix(" ")
    if not ended:
        generation = generation.rstrip("\ufffd")  # cut within a character's bytes
    return {
        "index": task.asked[i],
        "generation": generation,
        "finish_reason": "stop" if ended else "length",
        "generated_tokens": len(new),
    }


# ---------------------------------------------------------------- the run


def run(args) -> dict:
    """Write the file; returns the statistics, which are also printed and kept in run_generate.json."""
    task = check(args)
    import torch

    from common import models

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = models.resolve_dtype(args.dtype, device)
    settings = {
        "data_set": results.sha256(args.data_set),
        "model": args.model,
        "revision": args.revision,
        "weights": models.weights_sha256(task.ref),
        **{key: getattr(args, key) for key in ("temperature", "top_k", "max_tokens", "seed", "batch_size")},
        "dtype": str(dtype).removeprefix("torch."),
    }
    read_partials(task.output, settings, args.overwrite)  # refuses another run's before the model is loaded
    if args.dry_run:
        print(
            f"would continue {len(task.asked)} prompts ({sum(task.dropped.values())} dropped) of {args.data_set} with "
            f"{args.model}, at most {args.max_tokens} tokens each, and write {task.output}"
        )
        return {}

    world = distributed.start()
    with results.Run(task.output.parent / "run_generate.json", args, [args.data_set], world) as record:
        base = models.load_base(task.ref, dtype, world.device, args.device_map)
        with models.adapted(base, task.ref.adapter) as (model, _):
            made = generate(model, task, args, settings, world)
        eos = task.tokenizer.eos_token
        rows = []
        for item in made:
            row = task.rows[item.pop("index")]
            rows.append({**row, **item, "text": row["prompt"] + item["generation"] + eos})
        numbers = measures.statistics(rows, [task.rows[index] for index in task.head])
        record["statistics"], record["dropped"] = numbers, task.dropped
        if world.main:
            records.manifest_path(task.output).unlink(missing_ok=True)  # it describes the file that is now replaced
            records.write_arrow(task.output, rows)
            records.write_manifest(
                task.output,
                tag=f"self-generated-{Path(args.model).name}",
                script="data/continuation/generate.py",
                argv=sys.argv,
                rows=len(rows),
                source=[(args.data_set, len(task.rows))],
                split_start=task.split_start,
                generator={key: settings[key] for key in ("model", "revision", "weights")},
                sampling={key: settings[key] for key in ("temperature", "top_k", "max_tokens", "seed", "dtype")},
            )
            for file in partial_files(task.output):
                file.unlink()
        world.barrier()
    if world.main:
        print(f"{len(rows):>9,}  rows in {task.output}")
        for reason, count in task.dropped.items():
            print(f"{count:>9,}  rows dropped: {reason}")
        print(measures.report(numbers))
        print(f"{record['seconds']:.0f} s, {numbers['tokens_total'] / record['seconds']:,.0f} tokens/s")
    world.close()
    return numbers


def main(argv: list[str] | None = None) -> int:
    run(make_parser().parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(cli.entry(main))
