"""The sweep sampler: many prompts × many temperatures, with answers independent of batching.

`SharedPrefix`: the tokens common to all prompts are encoded once and attended to as one shared block. `OwnCache`: for
models with other kinds of attention (sliding windows, sinks, latent attention, state spaces, …), prompts of equal
length with transformers' own cache. Before the first answer, an engine must reproduce the logits of `generate` on the
longest and the shortest prompt. Each prompt is encoded once; all temperatures decode together from there, and branches
(prompt × temperature) share one batch row as long as their tokens coincide. Sampling is top-k, then Gumbel-max with
noise hashed from (seed, row, template, step, token id): it does not depend on the batch, the rank or the other
prompts, and it is common to all temperatures, so curves over temperature are paired (Gumbel 1954; Maddison, Tarlow
and Minka 2014, arXiv:1411.0030).
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from common import limits, models, sharding, virtual_tokens
from common.adapters import without_adapter
from common.limits import check_tokens, embedding_weight
from common.problems import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    Layer = tuple[torch.Tensor, torch.Tensor]  # keys and values
    Logits = tuple[torch.Tensor, list[list[torch.Tensor]]]  # see `SharedPrefix.begin`

MAX_ROWS = 64  # rows per chunk if memory allows: more gains nothing on CPU and little on a GPU
MASK64 = (1 << 64) - 1
Forms = list[list[list[int]]]  # for each prompt, the token sequences that spell its target


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


class Sampler(ABC):
    """Another engine that draws answers, in place of a model and the sweep sampler. config: its model's."""

    config: PreTrainedConfig

    @abstractmethod
    def draw(
        self,
        prompts: list[list[int]],
        keys: list[tuple[int, int]],
        temperatures: Sequence[float],
        *,
        top_k: int,
        max_tokens: int,
        seed: int,
        stop: torch.Tensor,
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
def _shared_attention(model: PreTrainedModel) -> Iterator[None]:
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
        rows, width, sizes = len(own), max(map(len, own)), _form_sizes(targets)
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


class OwnCache:
    """Prompts of equal length in one batch, without padding, using the model's own cache."""

    def __init__(self, model: PreTrainedModel, prompts: list[list[int]]) -> None:
        self.model, self.device = model, embedding_weight(model).device

    def bytes_per_position(self) -> int:
        """Of one row's keys and values, at most (grouped heads have fewer)."""
        config = self.model.config.get_text_config()
        return int(2 * config.num_hidden_layers * config.hidden_size * self.model.dtype.itemsize)

    def chunk(self, lengths: list[int], rows: int) -> int:
        """Like `SharedPrefix.chunk`, but only prompts as long as the first."""
        return min(rows, lengths.count(lengths[0]))

    def begin(self, prompts: list[list[int]], targets: Forms | None, branches: int, max_tokens: int) -> Logits:
        """See `SharedPrefix.begin`."""
        import torch

        self.cache: dict[str, Any] = {}
        last = self._next(torch.tensor(prompts, device=self.device))

        def predicting(prompt: list[int], form: list[int]) -> torch.Tensor:
            ids = torch.tensor([[*prompt, *form]], device=self.device)
            logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
            return logits[0, len(prompt) - 1 : -1].float()

        return last, [[predicting(*pair) for pair in zip([p] * len(f), f)] for p, f in zip(prompts, targets or [])]

    def _next(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [rows, V] after `ids`, which are appended to the cache. No padding, so no mask."""
        out = self.model(input_ids=ids, use_cache=True, **self.cache)
        names = [name for name in ("past_key_values", "cache_params") if getattr(out, name, None) is not None]
        self.cache = {name: out[name] for name in names}
        logits: torch.Tensor = out.logits
        return logits[:, -1].float()

    def step(self, parent: torch.Tensor, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `SharedPrefix.step`."""
        import torch

        for cache in self.cache.values():
            cache.reorder_cache(parent)
        return self._next(token[:, None]), torch.arange(len(parent), device=self.device)


Engine = SharedPrefix | OwnCache
PROBE_STEPS = 3
KEEPS_STATE = ("recurrent_gemma",)  # state in its modules instead of a cache: batches would read each other's


def _generated(model: PreTrainedModel, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    """(greedy tokens of `generate` on one prompt, the raw logits [steps, V] behind them)."""
    import torch
    from transformers import GenerationConfig

    ids = torch.tensor([prompt], device=embedding_weight(model).device)
    config = GenerationConfig(
        max_new_tokens=PROBE_STEPS,
        do_sample=False,
        pad_token_id=0,
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    generator: Any = model  # annotated without `generate`, which is a mixin's
    output = generator.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return output.sequences[0, len(prompt) :].tolist(), torch.stack([logits[0].float() for logits in output.logits])


def _error(engine: Engine, prompts: list[list[int]], wanted: list[tuple[list[int], torch.Tensor]]) -> float:
    """Largest deviation of an engine's logits from `generate`'s, in standard deviations of the latter."""
    import torch

    logits, _ = engine.begin(prompts, None, 1, PROBE_STEPS)
    node, worst = list(range(len(prompts))), 0.0
    for step in range(PROBE_STEPS):
        on = [row for row, (tokens, _) in enumerate(wanted) if step < len(tokens)]
        for row in on:
            reference = wanted[row][1][step].to(logits.device)
            gap = (logits[node[row]] - reference).abs().max().item() / max(reference.std().item(), 1e-6)
            worst = max(worst, gap) if gap == gap else float("inf")
        on = [row for row in on if step + 1 < len(wanted[row][0])]
        if not on:
            break
        order = sorted(on, key=lambda row: node[row])
        parent = torch.tensor([node[row] for row in order], device=logits.device)
        token = torch.tensor([wanted[row][0][step] for row in order], device=logits.device)
        logits, slots = engine.step(parent, token)
        for row, where in zip(order, slots.tolist()):
            node[row] = where
    return worst


def _choose_engine(
    model: PreTrainedModel, prompts: list[list[int]], longest: int, stack: contextlib.ExitStack
) -> Engine:
    """The engine that reproduces `generate`'s logits on the longest and the shortest prompt; UserError if none does.

    `longest`: tokens of the longest prompt plus answer. `stack` undoes the engine's changes to the model.
    """
    import torch

    if model.config.model_type in KEEPS_STATE:
        raise UserError(f"{type(model).__name__}: keeps its state in its modules; not supported by the sampler")
    tolerance = 2e-3 if next(model.parameters()).dtype == torch.float32 else 0.1
    extremes = [min(prompts, key=len), max(prompts, key=len)]
    extremes = [prompts[0]] if len(prompts) == 1 else extremes
    wanted = [_generated(model, prompt) for prompt in extremes]
    why = limits.beyond_plain_attention(model.config, longest + virtual_tokens.count(model))
    if why is None:
        try:
            with contextlib.ExitStack() as switched:
                switched.enter_context(_shared_attention(model))
                error = _error(SharedPrefix(model, extremes), extremes, wanted)
                if error < tolerance:
                    stack.push(switched.pop_all())
                    return SharedPrefix(model, prompts)
        except torch.OutOfMemoryError:
            raise
        except (UserError, NotImplementedError, AttributeError, RuntimeError, TypeError, ValueError):
            pass  # another kind of attention, with different shapes, names or cache
    engine = OwnCache(model, prompts)
    error = max(_error(engine, [prompt], [reference]) for prompt, reference in zip(extremes, wanted))
    if not error < tolerance:
        raise UserError(
            f"{type(model).__name__}: the sampler does not reproduce the logits of `generate` (off by {error:.2g} "
            "standard deviations); this architecture is not supported"
        )
    return engine


def memory_budget(device: str) -> int:
    """Bytes that a chunk may use: half of a GPU's free memory; on CPU a tenth of the machine's, at most 2 GiB."""
    import torch

    if str(device).startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0]) // 2
    import os

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
        drawn = source.draw(
            prompts, keys, temperatures, top_k=top_k, max_tokens=max_tokens, seed=seed, stop=stop, progress=progress
        )
    if isinstance(model, Sampler):
        return [Answers(tokens, None, None) for tokens in drawn or []]
    base = without_adapter(model)
    check_tokens(base, prompts)
    answers: list[Answers | None] = [None] * len(prompts)
    tail = max(max_tokens, *_form_sizes(targets), 0)
    with torch.inference_mode(), contextlib.ExitStack() as stack:
        engine = _choose_engine(base, prompts, max(map(len, prompts)) + tail, stack)
        stop = stop.to(engine.device)
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
        size = batch_size or _rows_by_memory(engine, prompts, targets, len(temperatures), max_tokens)
        while order:
            chunk = order[: engine.chunk([len(prompts[i]) for i in order], size)]
            answers_of_chunk = _decode_chunk(
                engine,
                [prompts[i] for i in chunk],
                [keys[i] for i in chunk],
                [targets[i] for i in chunk] if targets else None,
                temperatures,
                top_k,
                max_tokens,
                seed,
                stop,
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
    target = sum(_form_sizes(targets))
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
    temperatures: Sequence[float],
    top_k: int,
    max_tokens: int,
    seed: int,
    stop: torch.Tensor,
    drawn: list[list[list[int]]] | None,
) -> list[Answers]:
    """`sweep` over one batch of prompts. drawn: the answers, if they are there already."""
    import torch

    device, rows, n_temperatures = engine.device, len(prompts), len(temperatures)
    logits, predicting = engine.begin(prompts, targets, n_temperatures, max_tokens)
    scored = _score_targets(predicting, targets, temperatures, top_k, max_tokens)
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
            values, candidates = top_k_with_ties(logits[needed], top_k)
            owner = node_row[needed]
            noise = gumbel(seed, row_key[owner], template_key[owner], step, candidates)
            scores = values.double()[place] / heat[branch_heat[sampled], None] + noise[place]
            chosen = candidates[place].gather(-1, scores.argmax(-1, keepdim=True))[:, 0]
            token[sampled] = torch.where(random[sampled], chosen, token[sampled])
        output[branch_row, branch_heat, step] = token
        alive = ~stop[token]
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


def _form_sizes(targets: Forms | None) -> list[int]:
    """Lengths of the longest first form, the longest second form, … in tokens."""
    if not targets:
        return []
    most = max(map(len, targets))
    return [max(len(forms[k]) for forms in targets if len(forms) > k) for k in range(most)]


def top_k_with_ties(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, token ids), each [n, ≥ k]: every token whose logit is at least the k-th largest in its row.

    Tokens tied with the k-th are kept, as in `generate`; rows are padded with values of -inf.
    """
    k = width = min(k, logits.shape[-1])
    while True:
        width = min(width + 8, logits.shape[-1])
        values, tokens = logits.topk(width, dim=-1)
        least = values[:, k - 1 : k]
        if width == logits.shape[-1] or not bool((values[:, -1:] >= least).any()):
            return values.masked_fill(values < least, float("-inf")), tokens
        width *= 2


def _score_targets(
    predicting: list[list[torch.Tensor]],
    targets: Forms | None,
    temperatures: Sequence[float],
    top_k: int,
    max_tokens: int,
) -> list[tuple[float | None, list[float] | None]] | None:
    """For each row (log of the forms' summed unfiltered probability, divided by the tokens of the likeliest form; [log
    of their probability as sampled at each temperature]), or (None, None) without a form. predicting[row][form]: logits
    [tokens, V]. None without targets."""
    import torch

    if not targets:
        return None
    scored: list[tuple[float | None, list[float] | None]] = []
    for forms, logits_of in zip(targets, predicting):
        pairs = [(form, logits) for form, logits in zip(forms, logits_of) if form]
        if not pairs:
            scored.append((None, None))
            continue
        plain, heated = zip(*(_score_form(*pair, temperatures, top_k, max_tokens) for pair in pairs))
        longest = len(pairs[max(range(len(pairs)), key=lambda k: plain[k])][0])
        mean = torch.tensor(plain, dtype=torch.float64).logsumexp(0).item() / longest
        scored.append((mean, torch.stack(heated).logsumexp(0).tolist()))
    return scored


def _score_form(
    form: list[int], logits: torch.Tensor, temperatures: Sequence[float], top_k: int, max_tokens: int
) -> tuple[float, torch.Tensor]:
    """(unfiltered log probability, log probability as sampled, float64 [temperatures]) of a form's tokens."""
    import torch

    mine = logits.double()
    heat = torch.tensor([t if t > 0 else 1.0 for t in temperatures], dtype=torch.float64, device=mine.device)
    greedy = torch.tensor([t == 0 for t in temperatures], device=mine.device)
    index = torch.tensor(form, device=mine.device)
    picked = mine.gather(-1, index[:, None])[:, 0]
    top, _ = top_k_with_ties(mine, top_k)
    kept = picked >= top[:, min(top_k, mine.shape[-1]) - 1]
    logp = picked / heat[:, None] - (top / heat[:, None, None]).logsumexp(-1)
    logp[greedy] = 0.0
    possible = torch.where(greedy[:, None], mine.argmax(-1) == index, kept).all(-1)
    if len(form) > max_tokens:
        possible[:] = False
    sampled = logp.sum(-1).masked_fill(~possible, float("-inf"))
    return float((picked - mine.logsumexp(-1)).sum()), sampled.cpu()


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
