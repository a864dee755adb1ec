"""A model continues prompts: batches of similar length, dealt to the ranks, resumable, the same text in any batch.

A killed run leaves hidden files beside the output, one a process: a line of settings, then a line a finished batch.
"""

from collections.abc import Sequence
from pathlib import Path

from common import models, results
from common.distributed import World

MAX_BATCH = 64  # rows decoded together when memory does not bind
MIN_ROOM = 16  # a prompt that leaves the context fewer tokens than this (and than what is asked for) is dropped


def settings_of(args, ref, flags: tuple[str, ...], **inputs) -> dict:
    """What a run must have in common with the killed one it continues: inputs' hashes, model, weights, sampling."""
    import torch

    dtype = models.resolve_dtype(args.dtype, "cuda" if torch.cuda.is_available() else "cpu")
    return {
        **inputs,
        "model": args.model,
        "revision": args.revision,
        "weights": models.weights_sha256(ref),
        **{flag: getattr(args, flag) for flag in flags},
        "dtype": str(dtype).removeprefix("torch."),
    }


def plan_batches(
    lengths: Sequence[int], rooms: Sequence[int], row_bytes, budget: int, batch_size: int = 0
) -> list[list[int]]:
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


def partial_file(output: Path, rank: int) -> Path:
    return output.with_name(f".{output.name}.partial-{rank}.jsonl")


def partial_files(output: Path) -> list[Path]:
    return sorted(output.parent.glob(f".{output.name}.partial-*.jsonl"))


def read_partials(output: Path, settings: dict, overwrite: bool) -> tuple[int | None, dict[str, list]]:
    """(memory budget of the unfinished run or None, batch number → its rows); refuses as `results.read_partial`."""
    budget, done = None, {}
    for file in partial_files(output):
        for line in results.read_partial(file, settings, overwrite):
            budget = line.get("budget", budget)
            done.update({line["batch"]: line["rows"]} if "batch" in line else {})
    return budget, done


def continue_prompts(
    model,
    tokenizer,
    prompts: list[list[int]],
    rooms: list[int],
    keys: list[tuple[int, int]],
    *,
    output: Path,
    settings: dict,
    overwrite: bool,
    temperature: float,
    top_k: int,
    seed: int,
    batch_size: int,
    world: World,
) -> list[dict]:
    """[{index, generation, ended, generated_tokens}] of every prompt, in order, on every rank.

    prompts: token ids; rooms: tokens each may generate; keys: the noise's identity of each (two whole numbers);
    settings: what a resumed run must have in common with the killed one. ended: the model ended the text itself.
    """
    import torch

    from common import sampling
    from common.distributed import progress_bar

    found = world.gather(read_partials(output, settings, overwrite))
    budgets = [budget for budget, _ in found if budget] or world.gather(sampling.memory_budget(world.device))
    budget, done = min(budgets), {number: rows for _, part in found for number, rows in part.items()}
    row_bytes = row_bytes_of(model.config, next(model.parameters()).element_size())
    batches = plan_batches([len(prompt) for prompt in prompts], rooms, row_bytes, budget, batch_size)
    header = {"settings": settings, "budget": budget}
    if world.main:
        lines = [{"batch": number, "rows": rows} for number, rows in sorted(done.items())]
        results.write_jsonl(partial_file(output, 0), [header, *lines])
        for file in partial_files(output):
            if file != partial_file(output, 0):
                file.unlink()
        if done:
            world.say(f"{sum(map(len, done.values()))} rows were generated before the run was interrupted")
    world.barrier()

    vocabulary = model.config.get_text_config().vocab_size
    stop = torch.zeros(vocabulary, dtype=torch.bool)
    stop[tokenizer.eos_token_id] = True
    stop[len(tokenizer) :] = True  # ids that pad the vocabulary and have no text

    def continue_mine() -> list:
        todo = [number for number in range(len(batches)) if number not in done]
        mine = world.shard(todo[::-1])  # the longest first: a batch that does not fit memory shows at once
        made = []
        with (
            open(partial_file(output, world.rank), "a", encoding="utf-8") as file,
            progress_bar(sum(len(batches[number]) for number in mine), "rows", world) as bar,
        ):
            if world.rank:
                results.append_line(file, header)
            for number in mine:
                batch = batches[number]
                answers = sampling.sweep(
                    model,
                    [prompts[i] for i in batch],
                    [keys[i] for i in batch],
                    [temperature],
                    top_k=top_k or vocabulary,
                    max_tokens=rooms[batch[0]],
                    seed=seed,
                    stop=stop,
                    batch_size=len(batch),
                )
                rows = [_finish(tokenizer, prompts[i], i, answer.tokens[0], stop) for i, answer in zip(batch, answers)]
                results.append_line(file, {"batch": number, "rows": rows})
                made += rows
                bar.update(len(batch))
        return made

    made = [row for part in world.together(continue_mine) for row in part]
    made += [row for rows in done.values() for row in rows]
    return sorted(made, key=lambda row: row["index"])


def _finish(tokenizer, prompt: list[int], index: int, tokens: list[int], stop) -> dict:
    ended = bool(stop[tokens[-1]])
    new = tokens[:-1] if ended else tokens
    # decoded together with the prompt: some tokenizers drop the space a text begins with
    before, whole = tokenizer.batch_decode(
        [prompt, prompt + new], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    generation = whole[len(before) :]
    if not ended:
        generation = generation.rstrip("\ufffd")  # cut within a character's bytes
    return {"index": index, "generation": generation, "ended": ended, "generated_tokens": len(new)}
