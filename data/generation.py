"""Continue prompts with a model: batches of similar length, split over the ranks, resumable, batch-independent text.

A killed run leaves hidden files next to the output, one per process: a line of settings, then one line per finished
batch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import adapters, checkpoints, json_files, models, provenance, publication, sampling, vllm_engine
from common.cli import EngineConfig
from common.distributed import World, progress_bar

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

Row = dict[str, Any]  # {index, generation, ended, generated_tokens}

MAX_BATCH = 64  # rows decoded together if memory allows
VLLM_BATCH = 512  # prompts handed to vLLM at once
MIN_ROOM = 16  # a prompt that leaves fewer context tokens than this (and than requested) is dropped


def settings_of(config: Any, ref: models.ModelRef, flags: tuple[str, ...], **inputs: str) -> dict[str, Any]:
    """What a run must share with the killed run that it resumes: input hashes, model, weights, sampling."""
    import torch

    dtype = models.resolve_dtype(config.dtype, "cuda" if torch.cuda.is_available() else "cpu")
    return {
        **inputs,
        "model": config.model,
        "revision": config.revision,
        "weights": provenance.weights_sha256(ref),
        **{flag: getattr(config, flag) for flag in flags},
        "dtype": str(dtype).removeprefix("torch."),
        **({"engine": config.engine} if config.engine != "transformers" else {}),
    }


def sampling_of(settings: dict[str, Any], flags: tuple[str, ...]) -> dict[str, Any]:
    """The manifest's `sampling`: those flags, the data type, and an engine other than transformers."""
    return {key: settings[key] for key in (*flags, "dtype", *(("engine",) if "engine" in settings else ()))}


@contextmanager
def generator(
    config: EngineConfig, ref: models.ModelRef, dtype: "torch.dtype", world: World
) -> Iterator["models.Model | sampling.Sampler"]:
    """The model that continues prompts, or vLLM with it."""
    if config.engine == "vllm":
        with vllm_engine.opened(ref, dtype) as sampler:
            yield sampler
        return
    base = checkpoints.load_base(ref, dtype, world, config.device_map)
    with adapters.adapted(base, ref.adapter) as (model, _):
        yield model


def plan_batches(
    lengths: Sequence[int],
    rooms: Sequence[int],
    row_bytes: Callable[[int, int], int],
    budget: int,
    batch_size: int = 0,
) -> list[list[int]]:
    """Group prompt indices into batches, shortest prompts first; all prompts of a batch have the same room.

    lengths: tokens per prompt; rooms: maximum tokens to generate per prompt; row_bytes(length, room): bytes per row;
    budget: bytes per batch. batch_size > 0 fixes the number of rows and ignores the budget.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (lengths[index], index)):
        room = rooms[index]
        size = batch_size or max(1, min(MAX_BATCH, budget // row_bytes(lengths[index], room)))
        if not batches or len(batches[-1]) >= size or rooms[batches[-1][0]] != room:
            batches.append([])
        batches[-1].append(index)
    return batches


def row_bytes_of(config: "PretrainedConfig", element_size: int) -> Callable[[int, int], int]:
    """The row_bytes function of a model: KV cache, prompt attention scores (float32, three copies), logits."""
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


def read_partials(output: Path, settings: dict[str, Any], overwrite: bool) -> tuple[int | None, dict[int, list[Row]]]:
    """(memory budget of the unfinished run or None, {batch number: rows}); rejects like `json_files.read_partial`."""
    budget: int | None = None
    done: dict[int, list[Row]] = {}
    for file in partial_files(output):
        for line in json_files.read_partial(file, settings, overwrite):
            budget = line.get("budget", budget)
            done.update({line["batch"]: line["rows"]} if "batch" in line else {})
    return budget, done


def continue_prompts(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: list[list[int]],
    rooms: list[int],
    keys: list[tuple[int, int]],
    *,
    output: Path,
    settings: dict[str, Any],
    overwrite: bool,
    temperature: float,
    top_k: int,
    seed: int,
    batch_size: int,
    world: World,
) -> list[Row]:
    """[{index, generation, ended, generated_tokens}] of every prompt, in order, on every rank.

    prompts: token ids; rooms: maximum tokens to generate per prompt; keys: two integers per prompt that key its
    sampling noise; settings: what a resumed run must share with the killed one. ended: the model emitted a stop token.
    """
    import torch

    partials = world.gather(read_partials(output, settings, overwrite))
    budgets = [budget for budget, _ in partials if budget] or world.gather(sampling.memory_budget(world.device))
    budget, done = min(budgets), {number: rows for _, part in partials for number, rows in part.items()}
    if isinstance(model, sampling.Sampler):
        row_bytes, batch_size = (lambda length, room: 1), batch_size or VLLM_BATCH
    else:
        row_bytes = row_bytes_of(model.config, next(model.parameters()).element_size())
    batches = plan_batches([len(prompt) for prompt in prompts], rooms, row_bytes, budget, batch_size)
    header = {"settings": settings, "budget": budget}
    if world.main:
        lines = [{"batch": number, "rows": rows} for number, rows in sorted(done.items())]
        publication.write_jsonl(partial_file(output, 0), [header, *lines])
        for file in partial_files(output):
            if file != partial_file(output, 0):
                file.unlink()
        if done:
            world.say(f"resuming: {sum(map(len, done.values()))} rows were already generated")
    world.barrier()

    vocabulary = model.config.get_text_config().vocab_size
    stop = torch.zeros(vocabulary, dtype=torch.bool)
    stop[tokenizer.eos_token_id] = True
    stop[len(tokenizer) :] = True  # ids that only pad the vocabulary

    def continue_mine() -> list[Row]:
        todo = [number for number in range(len(batches)) if number not in done]
        mine = world.shard(todo[::-1])  # longest first, so that running out of memory shows at once
        generated: list[Row] = []
        with (
            open(partial_file(output, world.rank), "a", encoding="utf-8") as file,
            progress_bar(sum(len(batches[number]) for number in mine), "rows", world) as bar,
        ):
            if world.rank:
                publication.append_line(file, header)
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
                publication.append_line(file, {"batch": number, "rows": rows})
                generated += rows
                bar.update(len(batch))
        return generated

    generated = [row for part in world.together(continue_mine) for row in part]
    generated += [row for rows in done.values() for row in rows]
    return sorted(generated, key=lambda row: row["index"])


def _finish(
    tokenizer: "PreTrainedTokenizerBase", prompt: list[int], index: int, tokens: list[int], stop: "torch.Tensor"
) -> Row:
    ended = bool(stop[tokens[-1]])
    new = tokens[:-1] if ended else tokens
    # decode together with the prompt: some tokenizers drop a leading space
    before, whole = tokenizer.batch_decode(
        [prompt, prompt + new], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    generation = whole[len(before) :]
    if not ended:
        generation = generation.rstrip("\ufffd")  # cut inside a multi-byte character
    return {"index": index, "generation": generation, "ended": ended, "generated_tokens": len(new)}
