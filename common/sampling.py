"""The sweep sampler: many prompts × many temperatures, with answers independent of batching.

Each prompt is encoded once by an engine (see `engines`); all temperatures decode together from there, and branches
(prompt × temperature) share one batch row as long as their tokens coincide. Sampling is top-k, then Gumbel-max with
noise hashed from (seed, row, template, step, token id): it does not depend on the batch, the rank or the other
prompts, and it is common to all temperatures, so curves over temperature are paired (Gumbel 1954; Maddison, Tarlow
and Minka 2014, arXiv:1411.0030).
"""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from common import models, sharding
from common.adapters import without_adapter
from common.engines import Engine, choose_engine
from common.limits import check_tokens
from common.target_scores import Forms, form_sizes, score_targets, top_k_with_ties

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

MAX_ROWS = 64  # rows per chunk if memory allows: more gains nothing on CPU and little on a GPU
MASK64 = (1 << 64) - 1


@dataclass
class Answers:
    """The answers to one prompt. tokens[t]: sampled ids at temperature t, including the stop token if there was one.

    truth_logprob: natural log of the summed probability of the target's forms, unfiltered, at temperature 1, divided by
    the number of tokens of the likeliest form (None without target).
    truth_logp[t]: log probability that a sample at temperature t (top-k filtered) starts with a form of the target;
    -inf if every form has a token outside the top k or is longer than max_tokens.
    """

    tokens: list[list[int]]
    truth_logprob: float | None
    truth_logp: list[float] | None


@dataclass(frozen=True)
class Drawing:
    """How `sweep` draws an answer to a prompt. See there."""

    temperatures: Sequence[float]
    top_k: int
    max_tokens: int
    seed: int
    stop: torch.Tensor


class Sampler(ABC):
    """Another engine that draws answers, in place of a model and the sweep sampler. config: its model's."""

    config: PreTrainedConfig

    @abstractmethod
    def draw(
        self,
        prompts: list[list[int]],
        keys: list[tuple[int, int]],
        drawing: Drawing,
        progress: Callable[[int], object] | None = None,
    ) -> list[list[list[int]]]:
        """[prompt][temperature] sampled ids, as `sweep` has them."""


def _signed(value: int) -> int:
    value &= MASK64
    return value - (1 << 64) if value >= 1 << 63 else value


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The splitmix64 finaliser (Steele, Lea & Flood 2014) on int64 tensors, modulo 2^64."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def gumbel(seed: int, row: torch.Tensor, template: torch.Tensor, step: int, token: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise −ln(−ln u), float64, u in (0, 1) a hash of the five keys.

    row, template: int64 [n]; token: int64 [n, k]; returns [n, k].
    """
    golden = _signed(0x9E3779B97F4A7C15)
    state = _mix(row * golden + _signed(seed * 0xD1B54A32D192ED03 + 1))
    state = _mix(state + template * golden + 1)
    state = _mix(state + _signed((step + 1) * 0x9E3779B97F4A7C15))
    state = _mix(state[:, None] + (token + 1) * golden)
    uniform = (((state >> 11) & ((1 << 53) - 1)).double() + 0.5) * 2.0**-53
    return -(-uniform.log()).log()


def memory_budget(device: str) -> int:
    """Bytes that a chunk may use: half of a GPU's free memory; on CPU a tenth of the machine's, at most 2 GiB."""
    import torch

    if str(device).startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0]) // 2
    return min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 10, 2 << 30)


def sweep(
    model: models.Model | Sampler,
    prompts: list[list[int]],
    keys: list[tuple[int, int]],
    temperatures: Sequence[float],
    *,
    top_k: int,
    max_tokens: int,
    seed: int,
    stop: torch.Tensor,
    targets: Forms | None = None,
    batch_size: int = 0,
    progress: Callable[[int], object] | None = None,
    sampler: Sampler | None = None,
) -> list[Answers]:
    """Sample every prompt at every temperature, and score every prompt's target along the way.

    prompts: token ids, each ≥ 1 long; keys: (row, template) of each, which seed the noise; temperatures ≥ 0 (0 is
    greedy); stop: bool [vocabulary], tokens that end an answer; targets: for each prompt its forms, disjoint token
    sequences whose summed probability is computed (nothing is scored without forms); batch_size: prompts per chunk,
    0 = by memory; progress(n): called with the number of prompts just finished; sampler: draws the answers in place
    of `model`, which then only scores the targets. A `Sampler` as `model` scores none.
    Returns Answers in the order of `prompts`.
    """
    import torch

    if not prompts:
        return []
    drawn: list[list[list[int]]] | None = None
    if source := model if isinstance(model, Sampler) else sampler:
        drawn = source.draw(prompts, keys, Drawing(temperatures, top_k, max_tokens, seed, stop), progress)
    if isinstance(model, Sampler):
        return [Answers(tokens, None, None) for tokens in drawn or []]
    base = without_adapter(model)
    check_tokens(base, prompts)
    answers: list[Answers | None] = [None] * len(prompts)
    tail = max(max_tokens, *form_sizes(targets), 0)
    with torch.inference_mode(), contextlib.ExitStack() as stack:
        engine = choose_engine(base, prompts, max(map(len, prompts)) + tail, stack)
        drawing = Drawing(temperatures, top_k, max_tokens, seed, stop.to(engine.device))
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
        size = batch_size or _rows_by_memory(engine, prompts, targets, len(temperatures), max_tokens)
        while order:
            chunk = order[: engine.chunk([len(prompts[i]) for i in order], size)]
            answers_of_chunk = _decode_chunk(
                engine,
                [prompts[i] for i in chunk],
                [keys[i] for i in chunk],
                [targets[i] for i in chunk] if targets else None,
                drawing,
                drawn and [drawn[i] for i in chunk],
            )
            for i, answer in zip(chunk, answers_of_chunk):
                answers[i] = answer
            order = order[len(chunk) :]
            if progress and not drawn:
                progress(len(chunk))
    return cast(list[Answers], answers)


def _rows_by_memory(
    engine: Engine, prompts: list[list[int]], targets: Forms | None, n_temperatures: int, max_tokens: int
) -> int:
    """Prompts per chunk that fit into memory."""
    longest = max(map(len, prompts)) - getattr(engine, "shared", 0)
    target = sum(form_sizes(targets))
    cache = n_temperatures * engine.bytes_per_position() * (longest + max(target, max_tokens))
    vocabulary: int = engine.model.config.get_text_config().vocab_size
    logits = 4 * vocabulary * 2 * max(target + 1, n_temperatures)
    most = MAX_ROWS * sharding.ranks_of(engine.model)  # each step of a spread model moves all its weights
    return max(1, min(most, memory_budget(str(engine.device)) // (cache + logits)))


def _decode_chunk(
    engine: Engine,
    prompts: list[list[int]],
    keys: list[tuple[int, int]],
    targets: Forms | None,
    drawing: Drawing,
    drawn: list[list[list[int]]] | None,
) -> list[Answers]:
    """`sweep` over one batch of prompts. drawn: the answers, if they are there already."""
    import torch

    temperatures, max_tokens = drawing.temperatures, drawing.max_tokens
    device, rows, n_temperatures = engine.device, len(prompts), len(temperatures)
    logits, predicting = engine.begin(prompts, targets, n_temperatures, max_tokens)
    scored = score_targets(predicting, targets, temperatures, drawing.top_k, max_tokens)
    if drawn:
        return [Answers(tokens, *(scored[i] if scored else (None, None))) for i, tokens in enumerate(drawn)]
    logits = logits.clone()

    heat = torch.tensor([t if t > 0 else 1.0 for t in temperatures], dtype=torch.float64, device=device)
    noisy = torch.tensor([float(t > 0) for t in temperatures], dtype=torch.float64, device=device)
    row_key = torch.tensor([key[0] for key in keys], device=device)
    template_key = torch.tensor([key[1] for key in keys], device=device)
    vocabulary = logits.shape[-1]
    output = torch.full((rows, n_temperatures, max_tokens), -1, dtype=torch.long, device=device)

    # a branch is (row, temperature); a node is a batch row shared by one or more branches of one row
    branch_row = torch.arange(rows, device=device).repeat_interleave(n_temperatures)
    branch_heat = torch.arange(n_temperatures, device=device).repeat(rows)
    branch_node = branch_row.clone()
    node_row = torch.arange(rows, device=device)
    for step in range(max_tokens):
        token = logits.argmax(-1)[branch_node]  # at temperature 0; breaks ties like `generate`
        random = noisy[branch_heat] > 0
        sampled: torch.Tensor | slice = slice(None)  # branches, their nodes and each branch's place among these
        needed: torch.Tensor | slice = slice(None)
        place = branch_node
        if device.type == "cpu":  # leave out what is greedy; a GPU would have to be waited for to know what that is
            sampled = random.nonzero()[:, 0]
            needed, place = torch.unique(branch_node[sampled], return_inverse=True)
        if len(place):
            values, candidates = top_k_with_ties(logits[needed], drawing.top_k)
            owner = node_row[needed]
            noise = gumbel(drawing.seed, row_key[owner], template_key[owner], step, candidates)
            scores = values.double()[place] / heat[branch_heat[sampled], None] + noise[place]
            chosen = candidates[place].gather(-1, scores.argmax(-1, keepdim=True))[:, 0]
            token[sampled] = torch.where(random[sampled], chosen, token[sampled])
        output[branch_row, branch_heat, step] = token
        alive = ~drawing.stop[token]
        if step == max_tokens - 1 or not bool(alive.any()):
            break
        branch_row, branch_heat = branch_row[alive], branch_heat[alive]
        children, child_of_branch = torch.unique(branch_node[alive] * vocabulary + token[alive], return_inverse=True)
        parent, token = children // vocabulary, children % vocabulary

        logits, slots = engine.step(parent, token)
        branch_node = slots[child_of_branch]
        moved = torch.empty_like(slots)
        moved[slots] = node_row[parent]
        node_row = moved

    answers = []
    for i, row in enumerate(output.tolist()):
        tokens = [[token for token in branch if token >= 0] for branch in row]
        mean, logp = scored[i] if scored else (None, None)
        answers.append(Answers(tokens, mean, logp))
    return answers


def stop_tokens(tokenizer: PreTrainedTokenizerBase, vocabulary: int, newline: bool = True) -> torch.Tensor:
    """bool [vocabulary]: EOS, ids unknown to the tokenizer, and (`newline`) every token that contains a line break."""
    import torch

    stop = torch.zeros(vocabulary, dtype=torch.bool)
    known = min(len(tokenizer), vocabulary)
    texts = tokenizer.batch_decode([[i] for i in range(known)], clean_up_tokenization_spaces=False)
    stop[:known] = torch.tensor([newline and ("\n" in text or "\r" in text) for text in texts])
    stop[known:] = True
    stop[tokenizer.eos_token_id] = True
    return stop
