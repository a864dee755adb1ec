"""Adapters that put virtual tokens before a text (prompt tuning, p-tuning, prefix tuning, cartridges).

What such an adapter adds is the same for every text: keys and values that stand before it. They are computed once, and
while `installed` lasts every forward pass of the base starts behind them. So the base itself gives the numbers of the
text's own positions, and whoever scores, caches or samples with it needs to know only that the context is shorter.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from common.problems import UserError

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

KINDS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CARTRIDGE")
IN_THE_CACHE = ("PREFIX_TUNING", "CARTRIDGE")  # these are keys and values already; the others are embeddings
ATTRIBUTE = "_virtual_tokens"  # of the base model, while they are installed
PROBE_TOKENS = 32
NOT_LIKE_PEFT = (AttributeError, TypeError, NotImplementedError, RuntimeError, ValueError, IndexError, KeyError)


class VirtualTokens:
    """The keys and values of an adapter's virtual tokens, and the hook that puts them before every text."""

    def __init__(self, model: PreTrainedModel, attached: PeftModel) -> None:
        self.model, self.attached = model, attached
        decoder: Any = model.get_decoder()  # OPT's head calls it directly, not the backbone around it
        self.trunk: torch.nn.Module = model.base_model if decoder in (None, model) else decoder
        self.count = int(attached.active_peft_config.num_virtual_tokens)
        self.making = False
        self.cache = self._make()

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The adapter's own."""
        return list(self.attached.prompt_encoder.parameters())

    def _make(self) -> Any:
        """A cache of one row, filled with the virtual tokens."""
        prompt: Any = self.attached.get_prompt(1)
        if str(self.attached.active_peft_config.peft_type.value) in IN_THE_CACHE:
            return prompt
        embeddings: Any = self.model.get_input_embeddings()
        self.making = True
        try:
            given = prompt.to(device=embeddings.weight.device, dtype=embeddings.weight.dtype)
            return self.trunk(inputs_embeds=given, use_cache=True).past_key_values
        finally:
            self.making = False

    def layers(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values [kv heads, virtual tokens, head size] by layer."""
        return [(layer.keys[0], layer.values[0]) for layer in self.cache.layers]

    def rows(self, count: int) -> Any:
        """A cache of `count` rows, which the caller may append to."""
        import torch

        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters):
            if count != 1:
                raise ValueError("gradients of virtual tokens: one text at a time")
            return self._make()
        own = copy.deepcopy(self.cache)
        own.batch_repeat_interleave(count)
        return own

    def before(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The hook: a pass that starts a text gets the filled cache; positions and masks follow it."""
        import torch

        if self.making or "shared" in kwargs:  # the sweep's engine keeps the virtual tokens itself
            return None
        given = args[0] if args else kwargs.get("input_ids")
        given = kwargs["inputs_embeds"] if given is None else given
        past = kwargs.get("past_key_values")
        changed = dict(kwargs)
        if past is None or past.get_seq_length() == 0:
            changed["past_key_values"] = self.rows(given.shape[0])
        if kwargs.get("position_ids") is not None:
            changed["position_ids"] = kwargs["position_ids"] + self.count
        mask = kwargs.get("attention_mask")
        if mask is not None:
            if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
                raise NotImplementedError("virtual tokens need a two-dimensional attention mask")
            changed["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], self.count), mask], 1)
        return args, changed

    def check(self, name: str) -> None:
        """UserError unless the base behind the virtual tokens gives the logits of peft's own model."""
        import torch

        vocabulary = self.model.config.get_text_config().vocab_size
        longest = int(getattr(self.model.config, "max_position_embeddings", 0) or 1 << 30) - self.count
        ids = torch.arange(1, 1 + min(PROBE_TOKENS, longest), device=self.model.device)[None] * 7 % vocabulary
        try:
            own_logits = self.model(input_ids=ids).logits[0].float()
        except torch.OutOfMemoryError:
            raise
        except NOT_LIKE_PEFT as why:
            raise UserError(f"{name}: {refusal(self.model)} ({' '.join(str(why).split())[:200]})") from None
        with self.silent():
            wanted = self.attached(input_ids=ids).logits[0, -ids.shape[1] :].float().to(own_logits.device)
        slack = 2e-3 if next(self.model.parameters()).dtype == torch.float32 else 0.1
        error = float((own_logits - wanted).abs().max() / wanted.std().clamp(min=1e-6))
        if not error < slack:
            raise UserError(f"{name}: {refusal(self.model)} (off by {error:.2g} standard deviations)")

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """The hook does nothing."""
        self.making = True
        try:
            yield
        finally:
            self.making = False


def refusal(model: PreTrainedModel) -> str:
    return f"its virtual tokens cannot be put before a text of {type(model).__name__} with peft's own numbers"


@contextlib.contextmanager
def installed(model: PreTrainedModel, attached: PeftModel, name: str) -> Iterator[None]:
    """Every pass of `model` starts behind the virtual tokens of `attached`; UserError if that is not peft's model."""
    import torch

    try:
        virtual = VirtualTokens(model, attached)
    except torch.OutOfMemoryError:
        raise
    except NOT_LIKE_PEFT as why:
        raise UserError(f"{name}: {refusal(model)} ({' '.join(str(why).split())[:200]})") from None
    hook = virtual.trunk.register_forward_pre_hook(virtual.before, with_kwargs=True)
    try:
        virtual.check(name)
        model.__dict__[ATTRIBUTE] = virtual
        yield
    finally:
        model.__dict__.pop(ATTRIBUTE, None)
        hook.remove()


def of(model: Any) -> VirtualTokens | None:
    """Those installed before a model's texts, if any."""
    installed_tokens: VirtualTokens | None = getattr(model, "__dict__", {}).get(ATTRIBUTE)
    return installed_tokens


def count(model: Any) -> int:
    """How many positions of a model's context virtual tokens take (of a namespace: its `virtual_tokens`)."""
    virtual = of(model)
    return virtual.count if virtual else int(getattr(model, "virtual_tokens", 0) or 0)
