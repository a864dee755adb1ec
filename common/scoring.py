"""Per-token statistics of token sequences from one forward pass, length-bucketed under a token budget.

The backbone runs on right-padded batches of similar length (with causal attention no real position sees padding, so no
mask is needed). Only hidden states of positions whose next token is scored reach the output head, one chunk at a time,
so fp32 logits of batch × length × vocabulary are never materialised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

from common.adapters import without_adapter
from common.distributed import World
from common.limits import check_rope, check_tokens, context_length, rope_limit

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from common.models import Model

    Statistics = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    Scores = npt.NDArray[np.float32]
    Piece = tuple[int, int, Scores]  # (index of the sequence, first token, [tokens scored, …])

LOGIT_VALUES = 1 << 23  # fp32 logits held at once (32 MiB: the fastest of 8 … 128 MiB on a CPU), …
SMALLEST_CHUNK = 128  # … but at least this many positions: with fewer, the head is bound by loading its weights
PROBE_TOKENS = 32
TOKEN_BUDGET = 4096


def log_probability(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log p(target) in nats: logits [P, V] fp32, targets [P] → [P]."""
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def windows(n: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, end, first) of each window over n tokens: its pass sees tokens begin … end−1 and scores first … end−1.

    Window k begins at k·stride and holds at most `context` tokens. Every token except the first is scored once, in the
    earliest window that contains it: tokens of the first window have their full left context, later ones at least
    context − stride tokens. With fewer than 2 tokens there is nothing to score. ValueError unless 0 < stride < context.
    """
    if not 0 < stride < context:
        raise ValueError(f"stride {stride} must be at least 1 and below the context of {context} tokens")
    spans, first, begin = [], 1, 0
    while first < n:
        end = min(begin + context, n)
        spans.append((begin, end, first))
        first, begin = end, begin + stride
    return spans


def plan_batches(lengths: Sequence[int], token_budget: int, limit: int | None = None) -> list[list[int]]:
    """Indices of items in batches of similar length, longest first: count × longest ≤ token_budget, or a single item.

    limit: items longer than this never share a batch with shorter ones (`limits.rope_limit`).

    Deterministic, so that every rank makes the same plan and takes its share of it.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        apart = batches and limit and lengths[batches[-1][0]] > limit >= lengths[index]
        if batches and not apart and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= token_budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def split_head(model: Model, probe: Sequence[int]) -> tuple[torch.nn.Module, torch.nn.Module | None, int]:
    """(backbone, output head, vocabulary size) of a causal LM with logits = head(backbone(tokens)[0]).

    Some architectures cap, scale or shift their logits after the head, or the hidden states before it. So both paths
    are compared on the probe's tokens: same kernels and shapes, hence half precision must agree bit for bit, and fp32
    within 1e-5 of the largest logit. If they disagree, returns (model, None, vocabulary size): use the model's own
    logits. `model` may be a PeftModel with its adapter attached (enabled or disabled).
    """
    import torch

    causal = without_adapter(model)
    backbone: torch.nn.Module = causal.base_model
    head: torch.nn.Module | None = causal.get_output_embeddings()
    ids = torch.tensor([list(probe)], device=causal.device)
    wanted = model(input_ids=ids, use_cache=False)[0]
    whole = model, None, wanted.shape[-1]
    if head is None or backbone is causal:
        return whole
    states = backbone(input_ids=ids, use_cache=False)[0]
    if states.shape[-1] != cast("torch.Tensor", head.weight).shape[-1]:
        return whole
    logits = head(states)
    if logits.shape != wanted.shape:
        return whole
    exact = states.dtype != torch.float32
    logits, wanted = logits.float(), wanted.float().to(logits.device)
    slack = 0.0 if exact else 1e-5 * float(wanted.abs().max())
    same = torch.allclose(logits, wanted, rtol=0, atol=slack, equal_nan=True)
    return (backbone, head, wanted.shape[-1]) if same else whole


def score(
    model: Model,
    sequences: Sequence[Sequence[int]],
    *,
    token_budget: int = TOKEN_BUDGET,
    context: int | None = None,
    stride: int | None = None,
    world: World | None = None,
    statistics: Statistics = log_probability,
    progress: Callable[[int], object] | None = None,
) -> list[Piece]:
    """This rank's part of the scores: [(index of the sequence, first token, numpy array [tokens scored, …])].

    There are no collectives inside, so a failing rank can report it; `join(sequences, world.gather(part))` joins the
    parts into one array per sequence.

    sequences     token ids; the first token is context only (no BOS is added here). Sequences of fewer than 2 tokens
                  have nothing to score.
    token_budget  positions (padding included) per forward pass; a single longer sequence still runs alone.
    context       tokens per forward pass (default: the model's limit); longer sequences are cut into `windows` that
                  start every `stride` tokens (default: half the context).
    world         all ranks share the same batches, so that scores do not depend on the number of ranks.
    statistics    (logits [P, V] fp32, targets [P]) → [P] or [P, S] fp32, called once per chunk of P positions.
    progress      called after each forward pass with the number of tokens it scored.

    Architectures that alter their logits after the output head (`split_head`) are scored from the model's own logits,
    in small batches.
    """
    import torch

    if model.training:
        raise ValueError("score() needs a model in eval mode: dropout would change the scores")
    world = world or World()
    context = context or context_length(model)
    stride = stride or context // 2
    items = [(i, *window) for i, ids in enumerate(sequences) for window in windows(len(ids), context, stride)]
    if not items:
        return []
    check_tokens(model, [ids for ids in sequences if len(ids) > 1])
    part = []
    with torch.no_grad():
        trunk, head, vocabulary = split_head(model, sequences[items[0][0]][:PROBE_TOKENS])
        chunk = max(SMALLEST_CHUNK, LOGIT_VALUES // vocabulary)
        if head is None:
            world.say("scoring: the model alters its logits after the output head; using small batches (slower)")
            token_budget = min(token_budget, chunk)
        # the last token of a window is only a target and needs no position …
        limit = rope_limit(model.config)
        check_rope(model.config, max(end - begin for _, begin, end, _ in items))
        lengths = [
            end - begin - (limit is None) for _, begin, end, _ in items
        ]  # … except in longrope models, which count it
        batches = plan_batches(lengths, token_budget, limit)
        for batch in world.shard(batches):
            chosen = [items[item] for item in batch]
            cut = [(sequences[index][begin:end], first - begin) for index, begin, end, first in chosen]
            values = _score_batch(trunk, head, chunk, cut, statistics, model.device, drop_last=limit is None)
            part += [(index, first, value) for (index, _, _, first), value in zip(chosen, values)]
            if progress:
                progress(sum(map(len, values)))
    return part


def _score_batch(
    trunk: torch.nn.Module,
    head: torch.nn.Module | None,
    chunk: int,
    cut: list[tuple[Sequence[int], int]],
    statistics: Statistics,
    device: torch.device,
    drop_last: bool = True,
) -> list[Scores]:
    """Statistics [tokens − first, …] of each (tokens, first scored) in `cut`, from one forward pass."""
    import torch

    width = max(len(tokens) for tokens, _ in cut) - drop_last
    ids = torch.zeros(len(cut), width, dtype=torch.long)  # 0: any id works
    rows, columns, targets = [], [], []
    for row, (sequence, first) in enumerate(cut):
        tokens = torch.as_tensor(sequence)
        ids[row, : len(tokens) - drop_last] = tokens[: len(tokens) - drop_last]
        targets.append(tokens[first:])
        rows.append(torch.full((len(tokens) - first,), row))
        columns.append(torch.arange(first - 1, len(tokens) - 1))
    states = trunk(input_ids=ids.to(device), use_cache=False)[0]
    at_rows, at_columns, wanted = (torch.cat(parts).to(states.device) for parts in (rows, columns, targets))
    states = states[at_rows, at_columns]  # [tokens scored in the batch, hidden size or vocabulary]
    scored = []
    for start in range(0, len(wanted), chunk):
        logits = states[start : start + chunk] if head is None else head(states[start : start + chunk])
        scored.append(statistics(logits.float(), wanted[start : start + chunk].to(logits.device)))
    counts = [len(tokens) - first for tokens, first in cut]
    return [values.numpy() for values in torch.cat(scored).cpu().split(counts)]


def join(sequences: Sequence[Sequence[int]], parts: Sequence[list[Piece]]) -> list[Scores]:
    """Join the ranks' parts: one numpy array [tokens − 1, …] per sequence, for its tokens 1 … n−1 in order.

    ValueError if a part is missing.
    """
    import numpy as np

    pieces: list[list[Scores]] = [[] for _ in sequences]
    for index, _, values in sorted((piece for part in parts for piece in part), key=lambda piece: piece[:2]):
        pieces[index].append(values)
    joined = []
    for ids, of_sequence in zip(sequences, pieces):
        wanted = max(0, len(ids) - 1)
        values = np.concatenate(of_sequence) if of_sequence else np.empty(0, np.float32)
        if len(values) != wanted:
            raise ValueError(f"{len(values)} of {wanted} tokens were scored: a rank's part is missing")
        joined.append(values)
    return joined
