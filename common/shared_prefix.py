"""An engine of the sweep sampler: the tokens common to all prompts are encoded once and attended to as one block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from common import virtual_tokens
from common.limits import embedding_weight
from common.problems import UserError
from common.target_scores import Forms, form_sizes

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    Layer = tuple[torch.Tensor, torch.Tensor]  # keys and values
    Logits = tuple[torch.Tensor, list[list[torch.Tensor]]]  # see `SharedPrefix.begin`


class SharedPrefixCache:
    """Keys and values of a shared prefix (one block for all rows) and of each row's own tokens.

    prefix[layer]: pair of [kv heads, P, head size]; own[layer]: pair of [capacity, kv heads, room, head size].
    """

    is_compileable = False

    def __init__(self, capacity: int, room: int, prefix: list[Layer] | None = None) -> None:
        self.capacity, self.room, self.prefix = capacity, room, prefix
        self.own: list[Layer] = []
        self.rows, self.length = capacity, 0

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: object, **__: object) -> Layer:
        """Append key and value [n, kv heads, t, size] to the rows' own tokens; returns all length + t positions."""
        n, heads, t, size = key.shape
        while len(self.own) <= layer_idx:
            shape = (self.capacity, heads, self.room, size)
            self.own.append((key.new_empty(shape), key.new_empty(shape)))
        keys, values = self.own[layer_idx]
        end = self.length + t
        keys[:n, :, self.length : end] = key
        values[:n, :, self.length : end] = value
        return keys[:n, :, :end], values[:n, :, :end]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of each row's own tokens."""
        return self.length

    def move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy the own tokens of rows `source` to rows `target` (disjoint sets)."""
        for pair in self.own:
            for buffer in pair:
                buffer[target, :, : self.length] = buffer[source, :, : self.length]

    def as_prefix(self) -> list[Layer]:
        """The tokens of row 0, as the prefix of another cache."""
        return [(keys[0, :, : self.length], values[0, :, : self.length]) for keys, values in self.own]

    def bytes_per_position(self) -> int:
        """Of one row's keys and values."""
        return sum(buffer[0, :, 0].numel() * buffer.element_size() for pair in self.own for buffer in pair)


def shared_prefix_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    shared: SharedPrefixCache,
    **extra: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over [shared prefix | own tokens] with one softmax; the prefix takes one matrix product for all rows.

    query [n, heads, t, size]; key, value [n, kv heads, L, size]; attention_mask bool [n, 1, t, L] for the own tokens.
    Returns [n, t, heads, size] and no weights. NotImplementedError for sinks.
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
    prefix = shared.prefix[cast(int, module.layer_idx)] if shared.prefix else None
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
def shared_attention(model: PreTrainedModel) -> Iterator[None]:
    """Switch the model to shared-prefix attention; restore it afterwards."""
    from transformers import AttentionInterface

    AttentionInterface.register("shared_prefix", shared_prefix_attention)
    before = model.config._attn_implementation
    model.set_attn_implementation("shared_prefix")
    if model.config._attn_implementation != "shared_prefix":
        raise UserError(f"{type(model).__name__}: its attention cannot be replaced; not supported by the sweep sampler")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _forward(
    model: PreTrainedModel,
    cache: SharedPrefixCache,
    ids: torch.Tensor,
    positions: torch.Tensor,
    mask: torch.Tensor,
    keep: int,
) -> torch.Tensor:
    """Logits [rows, keep, V] (float32) at the last `keep` positions; the cache grows by ids.shape[1]."""
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
    logits: torch.Tensor = out.logits.float()
    return logits


def common_prefix(prompts: list[list[int]]) -> int:
    """Number of leading tokens shared by all prompts, leaving each at least one token of its own."""
    first, last = min(prompts), max(prompts)
    limit = min(len(prompt) for prompt in prompts) - 1
    shared = 0
    while shared < limit and first[shared] == last[shared]:
        shared += 1
    return shared


def _encode_prefix(model: PreTrainedModel, tokens: list[int], device: torch.device) -> list[Layer] | None:
    """Keys and values of an adapter's virtual tokens and the shared prefix, by layer; None if there are neither."""
    import torch

    virtual = virtual_tokens.of(model)
    first = virtual.layers() if virtual else None
    if not tokens:
        return first
    cache = SharedPrefixCache(1, len(tokens), first)
    t = len(tokens)
    mask = torch.ones(t, t, dtype=torch.bool, device=device).tril()[None, None]
    ids = torch.tensor([tokens], device=device)
    begin = virtual_tokens.count(model)
    _forward(model, cache, ids, torch.arange(begin, begin + t, device=device)[None], mask, 1)
    if first is None:
        return cache.as_prefix()
    return [(torch.cat([a, c], 1), torch.cat([b, d], 1)) for (a, b), (c, d) in zip(first, cache.as_prefix())]


class SharedPrefix:
    """Prompts of any length in one batch: [shared prefix | padding | own tokens], using `shared_prefix_attention`."""

    def __init__(self, model: PreTrainedModel, prompts: list[list[int]]) -> None:
        self.model, self.device = model, embedding_weight(model).device
        self.shared = common_prefix(prompts)
        self.before = virtual_tokens.count(model) + self.shared  # positions before a row's own
        self.prefix = _encode_prefix(model, prompts[0][: self.shared], self.device)

    def bytes_per_position(self) -> int:
        """Of one row's keys and values."""
        import torch

        if self.prefix is not None:
            return sum(buffer[:, 0].numel() * buffer.element_size() for pair in self.prefix for buffer in pair)
        probe, ids = SharedPrefixCache(1, 1), torch.zeros(1, 1, dtype=torch.long, device=self.device)
        ones = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)
        _forward(self.model, probe, ids, torch.zeros_like(ids), ones, 1)
        return probe.bytes_per_position()

    def chunk(self, lengths: list[int], rows: int) -> int:
        """How many of the prompts with these lengths (ascending), at most `rows`, go into the next batch."""
        return min(rows, len(lengths))

    def begin(self, prompts: list[list[int]], targets: Forms | None, branches: int, max_tokens: int) -> Logits:
        """(logits [rows, V] after each prompt, [row][form] logits [tokens, V] that predict the form's tokens)."""
        import torch

        own = [prompt[self.shared :] for prompt in prompts]
        rows, width, sizes = len(own), max(map(len, own)), form_sizes(targets)
        ends = [width + sum(sizes[: k + 1]) for k in range(len(sizes))]
        total = ends[-1] if ends else width
        self.cache = SharedPrefixCache(rows * branches, max(total, width + max_tokens), self.prefix)
        # one pass over [padding | own tokens | form | form …], own tokens right-aligned; forms do not see each other
        ids, padding = torch.zeros(rows, total, dtype=torch.long), torch.zeros(rows, dtype=torch.long)
        block, offset = torch.zeros(total, dtype=torch.long), torch.arange(total)
        for k, (size, end) in enumerate(zip(sizes, ends), 1):
            block[end - size : end], offset[end - size : end] = k, width + torch.arange(size)
        for i, tokens in enumerate(own):
            padding[i] = width - len(tokens)
            ids[i, padding[i] : width] = torch.tensor(tokens)
            for form, size, end in zip(targets[i] if targets else (), sizes, ends):
                ids[i, end - size : end - size + len(form)] = torch.tensor(form, dtype=torch.long)
        ids, padding, block, offset = (item.to(self.device) for item in (ids, padding, block, offset))
        column = torch.arange(total, device=self.device)
        positions = (self.before + offset[None] - padding[:, None]).clamp(min=0)
        seen = (column[None, :] <= column[:, None]) & ((block == 0)[None, :] | (block[None, :] == block[:, None]))
        visible = (column[None, None, :] >= padding[:, None, None]) | torch.eye(
            total, dtype=torch.bool, device=self.device
        )
        mask = (seen[None] & visible)[:, None]
        logits = _forward(self.model, self.cache, ids, positions, mask, total - width + 1)
        self.cache.length = width  # the targets were only scored: drop them
        self.padding = padding  # per node of the batch
        scored = [
            [
                torch.cat([logits[i, :1], logits[i, end - size - width + 1 : end - width]])[: len(form)]
                for form, size, end in zip(forms, sizes, ends)
            ]
            for i, forms in enumerate(targets or [])
        ]
        return logits[:, 0], scored

    def step(self, parent: torch.Tensor, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append token[i] to a copy of node parent[i] (ascending): (logits [n, V], slot of child i among them [n])."""
        import torch

        # to save copies, the first child of a node keeps its slot if possible; the others fill the free slots
        n = len(parent)
        first = torch.ones(n, dtype=torch.bool, device=self.device)
        first[1:] = parent[1:] != parent[:-1]
        stays = first & (parent < n)
        free = torch.ones(n, dtype=torch.bool, device=self.device)
        free[parent[stays]] = False
        slot = torch.empty(n, dtype=torch.long, device=self.device)
        slot[stays] = parent[stays]
        slot[~stays] = free.nonzero().flatten()
        self.cache.move(parent[~stays], slot[~stays])
        ids, padding = torch.empty_like(slot), torch.empty_like(slot)
        ids[slot], padding[slot] = token, self.padding[parent]
        self.padding = padding
        seen = torch.arange(self.cache.length + 1, device=self.device)[None] >= padding[:, None]
        positions = (self.before + self.cache.length - padding)[:, None]
        return _forward(self.model, self.cache, ids[:, None], positions, seen[:, None, None], 1)[:, 0], slot
