"""Model likelihoods of secrets and sentences in the canaries' own contexts."""

import math
import random
from collections.abc import Sequence
from typing import Any

from canary import metrics
from canary.config import MeasureConfig
from canary.key import KeyLine
from canary.task import ModelArm, Task
from common import adapters, chat, checkpoints, limits, models, sampling, scoring, tokenization
from common.distributed import World, progress_bar

Bits = dict[int, dict[str, float]]  # canary index → nll, exposure, and bits and ks_p if extrapolated
Scores = dict[str, list[float]]  # of each audit canary, by what they were taken over: SCORES
SCORES = ("whole", "secret")


def tokens_from(tokenizer: Any, context: str, text: str, most: int, whole: bool = False) -> tuple[list[int], list[int]]:
    """(tokens before, tokens of `text`): `text` starts at the first token that covers one of its characters.

    At most `most` tokens in total (the context is truncated on the left), without any that the tokenizer appends.
    whole: a chat template wrote the special tokens of the context.
    """
    encoded = tokenizer(context + text, return_offsets_mapping=True, add_special_tokens=not whole, verbose=False)
    first = next(number for number, (_, end) in enumerate(encoded["offset_mapping"]) if end > len(context))
    ids, extra = encoded["input_ids"], tokenization.extra_start(tokenizer, encoded["input_ids"])
    ids, first = tokenization.without_end(tokenizer, ids[extra:], first - extra + 1), first - extra
    return ids[max(0, len(ids) - most) : first], ids[first:]


def secret_nlls(model: Any, tokenizer: Any, context: str, secrets: list[str], whole: bool = False) -> list[float]:
    """Total NLL in nats of each secret's tokens after the same context, which is encoded once."""
    import torch

    most = limits.context_length(model)
    split = [tokens_from(tokenizer, context, secret, most, whole) for secret in secrets]
    by_context: dict[tuple[int, ...], list[int]] = {}
    for index, (before, _) in enumerate(split):
        by_context.setdefault(tuple(before), []).append(index)
    nlls = [0.0] * len(secrets)
    never = torch.zeros(model.config.get_text_config().vocab_size, dtype=torch.bool)
    for shared, indices in by_context.items():
        targets = [split[index][1] for index in indices]
        answers = sampling.sweep(
            model,
            [list(shared)] * len(indices),
            [(0, 0)] * len(indices),
            [0.0],
            top_k=1,
            max_tokens=1,
            seed=0,
            stop=never,
            targets=[[target] for target in targets],
        )
        for index, target, answer in zip(indices, targets, answers):
            assert answer.truth_logprob is not None, "every prompt has a target"
            nlls[index] = -answer.truth_logprob * len(target)
    return nlls


def sentence_logps(
    model: Any, tokenizer: Any, canaries: Sequence[KeyLine], most: int, world: World, whole: bool = False
) -> Scores:
    """Log-probability in nats of each canary's sentence in its row, and of its secret alone, on every rank.

    Both are from the same pass over at most `most` tokens.
    """
    most = min(most, limits.context_length(model))
    split = [tokens_from(tokenizer, canary["context"], canary["sentence"], most, whole) for canary in canaries]
    sequences = [[*before, *after] for before, after in split]
    parts = world.together(lambda: scoring.score(model, sequences, world=world))
    values = scoring.join(sequences, parts)
    own = [value[-len(after) :] for value, (_, after) in zip(values, split, strict=True)]
    spans = [secret_span(tokenizer, canary, whole) for canary in canaries]
    return {
        "whole": [math.fsum(value) for value in own],
        "secret": [math.fsum(value[first:last]) for value, (first, last) in zip(own, spans, strict=True)],
    }


def secret_span(tokenizer: Any, canary: KeyLine, whole: bool = False) -> tuple[int, int]:
    """[from, to) of the secret's tokens among those of the canary's sentence in its row."""
    start = len(canary["context"])
    text = canary["context"] + canary["sentence"]
    offsets = tokenizer(text, return_offsets_mapping=True, add_special_tokens=not whole, verbose=False).offset_mapping
    sentence, _ = chat.token_span(offsets, start, len(text))
    secret = start + len(canary["before"])
    first, last = chat.token_span(offsets, secret, secret + len(canary["secret"]))
    return first - sentence, last - sentence


def exposures(model: Any, tokenizer: Any, task: Task, references: int, seed: int, world: World) -> Bits:
    """NLL and exposure of all canaries except the audit's, on every rank."""
    chosen = [index for index, canary in enumerate(task.canaries) if canary["kind"] != "audit"]
    space = task.space
    sampled = references < space.size - 1

    def expose(canary: KeyLine) -> dict[str, float]:
        others = space.others(canary["secret"], references, random.Random(f"{seed} {canary['id']}"))
        context = canary["context"] + canary["before"]
        nll, *rest = secret_nlls(model, tokenizer, context, [canary["secret"], *others], task.whole)
        fitted = metrics.extrapolated_exposure(nll, rest, space.size) if sampled else {}
        return {"nll": nll, "exposure": metrics.exposure(nll, rest)} | fitted

    def share() -> list[tuple[int, dict[str, float]]]:
        """This rank's share."""
        bits = []
        with progress_bar(len(chosen), "canaries", world) as bar:
            for index in world.shard(chosen):
                bits.append((index, expose(task.canaries[index])))
                bar.update(world.size)
        return bits

    return dict(sorted(item for part in world.together(share) for item in part))


def measure_model(
    config: MeasureConfig, task: Task, arm: ModelArm, dtype: Any, world: World
) -> tuple[Bits, Scores, str]:
    """(exposures, signals of each audit canary, the signals' name)."""
    audited = task.audited
    before: Scores | None = None
    most = models.context_of(arm.ref)
    base = checkpoints.load_base(arm.ref, dtype, world, config.device_map)
    if audited and task.ref_model:
        untrained = checkpoints.load_base(task.ref_model, dtype, world, config.device_map)
        its_tokenizer = models.load_tokenizer(task.ref_model, "--ref_model")
        with adapters.adapted(untrained, task.ref_model.adapter) as (model, _):
            before = sentence_logps(model, its_tokenizer, audited, most, world, task.whole)
        del untrained
    elif audited and arm.ref.adapter:
        before = sentence_logps(base, arm.tokenizer, audited, most, world, task.whole)
    with adapters.adapted(base, arm.ref.adapter) as (model, _):
        bits = exposures(model, arm.tokenizer, task, config.references, config.seed, world)
        after = sentence_logps(model, arm.tokenizer, audited, most, world, task.whole) if audited else {}
    if before is None:
        return bits, after, "log-probability"
    return (
        bits,
        {of: [logp - earlier for logp, earlier in zip(after[of], before[of], strict=True)] for of in SCORES},
        "log-probability over the model before training",
    )
