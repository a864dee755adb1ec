"""One forward pass → statistics of every token of given token sequences, length-bucketed under a token budget.

The backbone runs on right-padded batches of similar length (causal attention: a padding position is never seen by a
real one, so no mask is needed). Only the hidden states of positions whose next token is scored reach the output head,
a chunk of positions at a time, so fp32 logits never exist for batch × length × vocabulary.
"""

from collections.abc import Callable, Sequence

from common.distributed import World
from common.models import context_length

LOGIT_VALUES = 1 << 24  # fp32 logits that exist at once (64 MiB), unless one position alone has more
PROBE_TOKENS = 32
TOKEN_BUDGET = 4096


def log_probability(logits, targets):
    """log p(target) in nats: logits [P, V] fp32, targets [P] → [P]."""
    return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)


def windows(n: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, end, first) of the windows over n tokens: one forward pass sees tokens begin … end−1 and scores first … end−1.

    Window k begins at k·stride and holds at most `context` tokens. Every token but the first is scored once, in the
    earliest window that holds it: tokens of the first window have all their left context, later ones at least
    context − stride tokens. Under 2 tokens there is nothing to score.
    """
    if not 0 < stride < context:
        raise ValueError(f"stride {stride} must be at least 1 and below the context of {context} tokens")
    made, first, begin = [], 1, 0
    while first < n:
        end = min(begin + context, n)
        made.append((begin, end, first))
        first, begin = end, begin + stride
    return made


def plan_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Indices of items in batches of similar length, longest first: count × longest ≤ token_budget, or a single item.

    Depends on nothing but its arguments, so that every rank makes the same plan and takes its share of it.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= token_budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def split_head(model, probe: Sequence[int]):
    """(backbone, output head, vocabulary size) of a causal LM with logits = head(backbone(tokens)[0]).

    Some architectures cap, scale or shift their logits after the head, or the hidden states before it. So both routes
    run on the probe's tokens: same kernels, same shapes, hence half precision must agree bit for bit and fp32 to 1e-5
    of the largest logit. Where they do not, (model, None, vocabulary size) comes back: `model` itself gives logits.
    `model` may be a PeftModel with its adapter attached (switched on or off).
    """
    import torch

    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    backbone, head = causal.base_model, causal.get_output_embeddings()
    ids = torch.tensor([list(probe)], device=causal.device)
    wanted = model(input_ids=ids, use_cache=False)[0]
    whole = model, None, wanted.shape[-1]
    if head is None or backbone is causal:
        return whole
    states = backbone(input_ids=ids, use_cache=False)[0]
    if states.shape[-1] != head.weight.shape[-1]:
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
    model,
    sequences: Sequence[Sequence[int]],
    *,
    token_budget: int = TOKEN_BUDGET,
    context: int | None = None,
    stride: int | None = None,
    world: World | None = None,
    statistics: Callable = log_probability,
    progress: Callable[[int], object] | None = None,
) -> list[tuple]:
    """This rank's part of the scores: [(index of the sequence, first token, numpy array [tokens scored, …])].

    No collective happens inside, so a rank that fails can say so; `join(sequences, world.gather(part))` makes one
    array a sequence of all parts.

    sequences     token ids; the first one is context only (put a start token there, or not: nothing is added here).
                  Sequences under 2 tokens have nothing to score.
    token_budget  positions (padding included) of a forward pass, unless one sequence alone has more.
    context       tokens a forward pass may hold (default: the model's); longer sequences are cut into `windows` that
                  begin every `stride` tokens (default: half the context).
    world         ranks take turns over the same batches, so that a score does not depend on their number.
    statistics    (logits [P, V] fp32, targets [P]) → [P] or [P, S] fp32, called once a chunk of P positions.
    progress      called after each forward pass with the number of tokens it scored.

    Architectures that alter their logits after the output head (`split_head`) are scored from their own logits, in
    small batches.
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
    part = []
    with torch.no_grad():
        trunk, head, vocabulary = split_head(model, sequences[items[0][0]][:PROBE_TOKENS])
        chunk = max(1, LOGIT_VALUES // vocabulary)
        if head is None:
            world.say("scoring: logits are altered after the output head; whole logits in small batches, slower")
            token_budget = min(token_budget, chunk)
        # the last token of a window is a target only: it needs no position
        batches = plan_batches([end - begin - 1 for _, begin, end, _ in items], token_budget)
        for batch in world.shard(batches):
            chosen = [items[item] for item in batch]
            values = _score_batch(
                model, trunk, head, chunk, [sequences[item[0]] for item in chosen], chosen, statistics
            )
            part += [(index, first, value) for (index, _, _, first), value in zip(chosen, values)]
            if progress:
                progress(sum(map(len, values)))
    return part


def _score_batch(model, trunk, head, chunk: int, sequences, items, statistics) -> list:
    """Statistics [scored tokens, …] of each window in `items` [(index, begin, end, first)], from one forward pass."""
    import torch

    width = max(end - begin - 1 for _, begin, end, _ in items)
    ids = torch.zeros(len(items), width, dtype=torch.long)  # any id will do as padding
    rows, columns, targets = [], [], []
    for row, (sequence, (_, begin, end, first)) in enumerate(zip(sequences, items)):
        window = torch.as_tensor(sequence[begin:end])
        ids[row, : end - begin - 1] = window[:-1]
        targets.append(window[first - begin :])
        rows.append(torch.full((end - first,), row))
        columns.append(torch.arange(first - begin - 1, end - begin - 1))
    states = trunk(input_ids=ids.to(model.device), use_cache=False)[0]
    rows, columns, targets = (torch.cat(parts).to(states.device) for parts in (rows, columns, targets))
    states = states[rows, columns]  # [tokens scored in the batch, hidden size or vocabulary]
    scored = []
    for start in range(0, len(targets), chunk):
        logits = states[start : start + chunk] if head is None else head(states[start : start + chunk])
        scored.append(statistics(logits.float(), targets[start : start + chunk].to(logits.device)))
    values = torch.cat(scored).cpu().numpy()
    counts = [end - first for _, _, end, first in items]
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    return [values[stop - count : stop] for count, stop in zip(counts, ends)]


def join(sequences: Sequence[Sequence[int]], parts: Sequence[list[tuple]]) -> list:
    """One numpy array [tokens − 1, …] a sequence, tokens 1 … n−1 in order, of what the ranks' `score` calls returned."""
    import numpy as np

    pieces: list[list] = [[] for _ in sequences]
    for index, first, values in sorted((piece for part in parts for piece in part), key=lambda piece: piece[:2]):
        pieces[index].append((first, values))
    joined = []
    for ids, found in zip(sequences, pieces):
        wanted = max(0, len(ids) - 1)
        values = np.concatenate([values for _, values in found]) if found else np.empty(0, np.float32)
        if len(values) != wanted:
            raise ValueError(f"{len(values)} of {wanted} tokens were scored: a rank's part is missing")
        joined.append(values)
    return joined
