"""The generator's completions of prompts."""

from typing import Any

from common import limits, sampling, tokenization
from common.distributed import World
from data.self_instruct.config import SelfInstructConfig

STAGES = ("instructions", "kind", "instances")  # of a round; their positions key the sampling noise
KIND_TOKENS = 4

Answer = tuple[str, bool]  # a completion, and whether the model ended it itself


def complete(
    model: Any, tokenizer: Any, prompts: list[str], stage: str, first: int, config: SelfInstructConfig, world: World
) -> list[Answer | None]:
    """The answer to every prompt, on every rank; None for a prompt that is too long for the context.

    first: number of the first prompt within its stage, counted over the whole run; with the stage it keys the noise.
    """
    import torch

    temperature = {"instructions": config.temperature, "kind": 0.0, "instances": config.instance_temperature}[stage]
    max_tokens = KIND_TOKENS if stage == "kind" else config.max_tokens
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    room = limits.context_length(base) - max_tokens
    ids = tokenization.encode_texts(tokenizer, prompts)
    fitting = sorted((i for i in range(len(ids)) if len(ids[i]) <= room), key=lambda i: (len(ids[i]), i))
    size = max(1, len(fitting)) if isinstance(model, sampling.Sampler) else config.batch_size
    batches = [fitting[start : start + size] for start in range(0, len(fitting), size)]
    stop = torch.zeros(base.config.get_text_config().vocab_size, dtype=torch.bool)
    stop[tokenizer.eos_token_id] = True
    stop[len(tokenizer) :] = True  # ids that only pad the vocabulary

    def complete_batches() -> list[tuple[int, Answer]]:
        """(prompt, answer) of this rank's batches."""
        completions = []
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
                text: str = tokenizer.decode(tokens, skip_special_tokens=True)
                completions.append((i, (text, bool(stop[tokens[-1]]))))
        return completions

    by_prompt: dict[int, Answer] = dict(item for part in world.together(complete_batches) for item in part)
    return [by_prompt.get(i) for i in range(len(prompts))]
