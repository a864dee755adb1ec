"""The engines of the sweep sampler, and which of them a model can use.

`SharedPrefix` for plain attention. `OwnCache` for models with other kinds (sliding windows, sinks, latent attention,
state spaces, …): prompts of equal length with transformers' own cache. Before the first answer, an engine must
reproduce the logits of `generate` on the longest and the shortest prompt.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from common import limits, virtual_tokens
from common.limits import embedding_weight
from common.problems import UserError
from common.shared_prefix import SharedPrefix, shared_attention
from common.target_scores import Forms

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from common.shared_prefix import Logits


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


def choose_engine(
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
                switched.enter_context(shared_attention(model))
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
