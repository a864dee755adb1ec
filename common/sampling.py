"""The shared-prefix sweep sampler: many prompts × many temperatures, answers independent of how they are batched.

Tokens that all prompts of a group begin with are encoded once and attended to as one shared block; each prompt's own
tokens are encoded once; all temperatures decode together from there, and branches (prompt × temperature) whose tokens
still coincide are one row of the batch. Sampling is top-k, then Gumbel-max with noise that is a hash of
(seed, row, template, step, token id): the same whatever the batch, the rank or the other prompts are, and common to all
temperatures, so curves over temperature are paired (Gumbel 1954; Maddison, Tarlow & Minka 2014, arXiv:1411.0030).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.cli import UserError
from common.models import check_tokens

if TYPE_CHECKING:
    import torch

MAX_ROWS = 64  # rows of a chunk when memory does not bind: more gains nothing on CPU and little on a GPU
MASK64 = (1 << 64) - 1


@dataclass
class Answers:
    """What one prompt gave. tokens[t]: sampled ids at temperature t, ending with the stop token if one came.

    truth_logprob: mean natural-log probability per target token, unfiltered, at temperature 1 (None without target).
    truth_logp[t]: log probability that a sample at temperature t (top-k filtered) begins with the target; -inf when a
    token is outside the top k or the target is longer than max_tokens.
    """

    tokens: list[list[int]]
    truth_logprob: float | None
    truth_logp: list[float] | None


def _signed(value: int) -> int:
    value &= MASK64
    return value - (1 << 64) if value >= 1 << 63 else value


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Finaliser of splitmix64 (Steele, Lea & Flood 2014) on int64 tensors, arithmetic modulo 2^64."""
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


class SharedPrefixCache:
    """Keys and values of one shared prefix (a block for all rows) and of each row's own tokens.

    prefix[layer]: pair of [kv heads, P, head size]; own[layer]: pair of [capacity, kv heads, room, head size].
    """

    is_compileable = False

    def __init__(self, capacity: int, room: int, prefix: list | None = None):
        self.capacity, self.room, self.prefix = capacity, room, prefix
        self.own: list = []
        self.rows, self.length = capacity, 0

    def update(self, key, value, layer_idx, *_, **__):
        n, heads, t, size = key.shape
        while len(self.own) <= layer_idx:
            self.own.append(tuple(key.new_empty((self.capacity, heads, self.room, size)) for _ in range(2)))
        keys, values = self.own[layer_idx]
        end = self.length + t
        keys[:n, :, self.length : end] = key
        values[:n, :, self.length : end] = value
        return keys[:n, :, :end], values[:n, :, :end]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy the own tokens of rows `source` to rows `target` (disjoint sets)."""
        for pair in self.own:
            for buffer in pair:
                buffer[target, :, : self.length] = buffer[source, :, : self.length]

    def as_prefix(self) -> list:
        """The tokens of row 0, as the prefix of another cache."""
        return [tuple(buffer[0, :, : self.length] for buffer in pair) for pair in self.own]

    def bytes_per_position(self) -> int:
        return sum(buffer[0, :, 0].numel() * buffer.element_size() for pair in self.own for buffer in pair)


def shared_prefix_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, shared=None, **extra):
    """Attention over [shared prefix | own tokens] with one softmax; the prefix is one matrix product for all rows.

    query [n, heads, t, size]; key, value [n, kv heads, L, size]; attention_mask bool [n, 1, t, L] for the own tokens.
    """
    import torch

    if extra.get("s_aux") is not None:
        raise NotImplementedError("attention sinks are not supported by the sweep sampler")
    n, heads, t, size = query.shape
    groups = key.shape[1]
    per_group = heads // groups
    scale = size**-0.5 if scaling is None else scaling
    q = (query * scale).reshape(n, groups, per_group * t, size)
    own = (q @ key.transpose(-1, -2)).float()
    mask = attention_mask.expand(n, per_group, t, -1).reshape(n, 1, per_group * t, -1)
    prefix = shared.prefix[module.layer_idx] if shared.prefix else None
    if prefix is not None:
        flat = q.transpose(0, 1).reshape(groups, n * per_group * t, size)
        before = (flat @ prefix[0].transpose(-1, -2)).float().view(groups, n, per_group * t, -1).transpose(0, 1)
        scores = torch.cat([before, own], -1)
    else:
        scores = own
    if extra.get("softcap"):
        scores = extra["softcap"] * torch.tanh(scores / extra["softcap"])
    scores[..., scores.shape[-1] - own.shape[-1] :].masked_fill_(~mask, float("-inf"))
    weights = scores.softmax(-1).to(query.dtype)
    if prefix is not None:
        length = prefix[0].shape[-2]
        flat = weights[..., :length].transpose(0, 1).reshape(groups, n * per_group * t, length)
        out = (flat @ prefix[1]).view(groups, n, per_group * t, size).transpose(0, 1)
        out = out + weights[..., length:] @ value
    else:
        out = weights @ value
    return out.reshape(n, heads, t, size).transpose(1, 2), None


@contextlib.contextmanager
def _shared_attention(model):
    """The model with the shared-prefix attention switched on, and as it was afterwards."""
    from transformers import AttentionInterface

    AttentionInterface.register("shared_prefix", shared_prefix_attention)
    before = model.config._attn_implementation
    model.set_attn_implementation("shared_prefix")
    if model.config._attn_implementation != "shared_prefix":
        raise UserError(
            f"{type(model).__name__}: its attention cannot be replaced; the sweep sampler does not run on it"
        )
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _forward(model, cache, ids, positions, mask, keep: int):
    """Logits (float32) of the last `keep` positions; the cache grows by ids.shape[1]."""
    out = model(
        input_ids=ids,
        position_ids=positions,
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=keep,
        shared=cache,
    )
    cache.length += ids.shape[1]
    return out.logits.float()


def common_prefix(prompts: list[list[int]]) -> int:
    """Number of leading tokens that all prompts share, leaving each prompt at least one token of its own."""
    first, last = min(prompts), max(prompts)
    limit = min(len(prompt) for prompt in prompts) - 1
    shared = 0
    while shared < limit and first[shared] == last[shared]:
        shared += 1
    return shared


def _encode_prefix(model, tokens: list[int], device) -> list | None:
    import torch

    if not tokens:
        return None
    cache = SharedPrefixCache(1, len(tokens))
    t = len(tokens)
    mask = torch.ones(t, t, dtype=torch.bool, device=device).tril()[None, None]
    ids = torch.tensor([tokens], device=device)
    _forward(model, cache, ids, torch.arange(t, device=device)[None], mask, 1)
    return cache.as_prefix()


def _check_probe(model, tokens: list[int], device, vocabulary: int) -> None:
    """The shared-prefix path must give the model's own logits; refuses an architecture on which it does not."""
    import torch

    tokens = tokens[:48]
    if len(tokens) < 4:
        return
    ids = torch.tensor([tokens], device=device)
    plain = model(input_ids=ids, use_cache=False).logits[0, -1].float()
    with _shared_attention(model):
        half = len(tokens) // 2
        cache = SharedPrefixCache(1, len(tokens), _encode_prefix(model, tokens[:half], device))
        own = len(tokens) - half
        mask = torch.ones(own, own, dtype=torch.bool, device=device).tril()[None, None]
        positions = torch.arange(half, len(tokens), device=device)[None]
        ours = _forward(model, cache, ids[:, half:], positions, mask, 1)[0, -1]
    tolerance = 2e-3 if next(model.parameters()).dtype == torch.float32 else 0.1
    error = (ours - plain).abs().max().item() / max(plain.std().item(), 1e-6)
    if not error < tolerance:
        raise UserError(
            f"{type(model).__name__}: the sweep sampler does not reproduce its logits (off by {error:.2g} standard "
            "deviations); this architecture is not supported"
        )


def memory_budget(device: str) -> int:
    """Bytes that a chunk may use: half of a GPU's free memory, on CPU a tenth of the machine's, at most 2 GiB."""
    import torch

    if str(device).startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0] // 2
    import os

    return min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 10, 2 << 30)


def sweep(
    model,
    prompts: list[list[int]],
    keys: list[tuple[int, int]],
    temperatures: list[float],
    *,
    top_k: int,
    max_tokens: int,
    seed: int,
    stop: torch.Tensor,
    targets: list[list[int]] | None = None,
    batch_size: int = 0,
    progress=None,
) -> list[Answers]:
    """Sample every prompt at every temperature; score every prompt's target on the way.

    prompts: token ids, each ≥ 1 long; keys: (row, template) of each, the noise's identity; temperatures ≥ 0 (0 is
    greedy); stop: bool [vocabulary], tokens that end an answer; targets: token ids whose probability is wanted (an
    empty one is not scored); batch_size: prompts a chunk, 0 = by memory. progress(n): called with finished prompts.
    Returns Answers in the order of `prompts`.
    """
    import torch

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    device = base.get_input_embeddings().weight.device
    if not prompts:
        return []
    check_tokens(base, prompts)
    answers: list[Answers | None] = [None] * len(prompts)
    with torch.inference_mode():
        _check_probe(base, prompts[0], device, len(stop))
        with _shared_attention(base):
            shared = common_prefix(prompts)
            prefix = _encode_prefix(base, prompts[0][:shared], device)
            own = [prompt[shared:] for prompt in prompts]
            order = sorted(range(len(prompts)), key=lambda i: (len(own[i]), i))
            size = batch_size
            start = 0
            while start < len(order):
                if not size:
                    size = _rows_by_memory(base, prefix, own, targets, len(temperatures), max_tokens, device)
                chunk = order[start : start + size]
                found = _decode_chunk(
                    base,
                    prefix,
                    shared,
                    [own[i] for i in chunk],
                    [keys[i] for i in chunk],
                    [targets[i] for i in chunk] if targets else None,
                    temperatures,
                    top_k,
                    max_tokens,
                    seed,
                    stop.to(device),
                    device,
                )
                for i, answer in zip(chunk, found):
                    answers[i] = answer
                start += len(chunk)
                if progress:
                    progress(len(chunk))
    return answers


def _rows_by_memory(model, prefix, own, targets, n_temperatures, max_tokens, device) -> int:
    probe = SharedPrefixCache(1, 1)
    if prefix is None:
        import torch

        ids = torch.tensor([own[0][:1]], device=device)
        ones = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
        _forward(model, probe, ids, torch.zeros_like(ids), ones, 1)
        position = probe.bytes_per_position()
    else:
        position = sum(buffer[:, 0].numel() * buffer.element_size() for pair in prefix for buffer in pair)
    longest = max(map(len, own))
    target = max(map(len, targets)) if targets else 0
    cache = n_temperatures * position * (longest + max(target, max_tokens))
    vocabulary = model.config.get_text_config().vocab_size
    logits = 4 * vocabulary * 2 * max(target + 1, n_temperatures)
    return max(1, min(MAX_ROWS, memory_budget(str(device)) // (cache + logits)))


def _decode_chunk(
    model, prefix, shared, own, keys, targets, temperatures, top_k, max_tokens, seed, stop, device
) -> list[Answers]:
    import torch

    rows, n_temperatures = len(own), len(temperatures)
    width = max(map(len, own))
    truth = max(map(len, targets)) if targets else 0
    cache = SharedPrefixCache(rows * n_temperatures, width + max(truth, max_tokens), prefix)

    # one pass over [padding | own tokens | target], own tokens aligned on the right, the target after them
    ids = torch.zeros(rows, width + truth, dtype=torch.long)
    padding = torch.zeros(rows, dtype=torch.long)
    for i, tokens in enumerate(own):
        padding[i] = width - len(tokens)
        ids[i, padding[i] : width] = torch.tensor(tokens)
        if truth and targets[i]:
            ids[i, width : width + len(targets[i])] = torch.tensor(targets[i])
    ids, padding = ids.to(device), padding.to(device)
    column = torch.arange(width + truth, device=device)
    positions = (shared + column[None] - padding[:, None]).clamp(min=0)
    causal = column[None, :] <= column[:, None]
    visible = (column[None, None, :] >= padding[:, None, None]) | torch.eye(
        len(column), dtype=torch.bool, device=device
    )
    logits = _forward(model, cache, ids, positions, (causal[None] & visible)[:, None], truth + 1)
    cache.length = width  # the target was only scored: nothing of it is kept

    scored = _score_targets(logits, targets, temperatures, top_k, max_tokens)
    logits = logits[:, 0].clone()

    heat = torch.tensor([t if t > 0 else 1.0 for t in temperatures], dtype=torch.float64, device=device)
    noisy = torch.tensor([float(t > 0) for t in temperatures], dtype=torch.float64, device=device)
    row_key = torch.tensor([key[0] for key in keys], device=device)
    template_key = torch.tensor([key[1] for key in keys], device=device)
    k, vocabulary = min(top_k, logits.shape[-1]), logits.shape[-1]
    output = torch.full((rows, n_temperatures, max_tokens), -1, dtype=torch.long, device=device)

    # a branch is (row, temperature); a node is a batch row that one or more branches of one row share
    branch_row = torch.arange(rows, device=device).repeat_interleave(n_temperatures)
    branch_heat = torch.arange(n_temperatures, device=device).repeat(rows)
    branch_node = branch_row.clone()
    node_row = torch.arange(rows, device=device)
    for step in range(max_tokens):
        values, candidates = logits.topk(k, dim=-1)
        noise = gumbel(seed, row_key[node_row], template_key[node_row], step, candidates)
        scores = values.double()[branch_node] / heat[branch_heat, None] + noise[branch_node] * noisy[branch_heat, None]
        token = candidates[branch_node, scores.argmax(-1)]
        output[branch_row, branch_heat, step] = token
        alive = ~stop[token]
        if step == max_tokens - 1 or not bool(alive.any()):
            break
        branch_row, branch_heat = branch_row[alive], branch_heat[alive]
        children, child_of_branch = torch.unique(branch_node[alive] * vocabulary + token[alive], return_inverse=True)
        parent, token = children // vocabulary, children % vocabulary

        # the first child of a node stays in its place where it can, the others fill the free places: few copies
        n = len(children)
        first = torch.ones(n, dtype=torch.bool, device=device)
        first[1:] = parent[1:] != parent[:-1]
        stays = first & (parent < n)
        free = torch.ones(n, dtype=torch.bool, device=device)
        free[parent[stays]] = False
        place = torch.empty(n, dtype=torch.long, device=device)
        place[stays] = parent[stays]
        place[~stays] = free.nonzero().flatten()
        cache.move(parent[~stays], place[~stays])
        branch_node = place[child_of_branch]
        moved_row, ids = torch.empty_like(place), torch.empty_like(place)
        moved_row[place], ids[place] = node_row[parent], token
        node_row = moved_row

        seen = torch.arange(cache.length + 1, device=device)[None] >= padding[node_row, None]
        positions = (shared + cache.length - padding[node_row])[:, None]
        logits = _forward(model, cache, ids[:, None], positions, seen[:, None, None], 1)[:, 0]

    answers = []
    for i, row in enumerate(output.tolist()):
        tokens = [[token for token in branch if token >= 0] for branch in row]
        mean, logp = scored[i] if scored else (None, None)
        answers.append(Answers(tokens, mean, logp))
    return answers


def _score_targets(logits, targets, temperatures, top_k: int, max_tokens: int):
    """[(mean unfiltered log-prob a token, [log-prob of the whole target at each temperature])] of each row."""
    import torch

    if not targets:
        return None
    heat = torch.tensor([t if t > 0 else 1.0 for t in temperatures], dtype=torch.float64, device=logits.device)
    greedy = torch.tensor([t == 0 for t in temperatures], device=logits.device)
    scored = []
    for row, target in enumerate(targets):
        if not target:
            scored.append((None, None))
            continue
        mine = logits[row, : len(target)].double()
        index = torch.tensor(target, device=mine.device)[:, None]
        picked = mine.gather(-1, index)[:, 0]
        top = mine.topk(min(top_k, mine.shape[-1]), dim=-1).values
        logp = picked / heat[:, None] - (top / heat[:, None, None]).logsumexp(-1)
        logp[greedy] = 0.0
        possible = (picked >= torch.where(greedy[:, None], top[:, 0], top[:, -1])).all(-1)
        if len(target) > max_tokens:
            possible[:] = False
        logp = logp.sum(-1).masked_fill(~possible, float("-inf"))
        scored.append(((picked - mine.logsumexp(-1)).mean().item(), logp.tolist()))
    return scored


def stop_tokens(tokenizer, vocabulary: int) -> torch.Tensor:
    """bool [vocabulary]: EOS, every token whose text has a line break, and ids the tokenizer does not know."""
    import torch

    stop = torch.zeros(vocabulary, dtype=torch.bool)
    known = min(len(tokenizer), vocabulary)
    texts = tokenizer.batch_decode([[i] for i in range(known)], clean_up_tokenization_spaces=False)
    stop[:known] = torch.tensor(["\n" in text or "\r" in text for text in texts])
    stop[known:] = True
    stop[tokenizer.eos_token_id] = True
    return stop
