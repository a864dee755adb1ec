"""Which sequences a model can take: context length, attention windows, rotary embeddings, vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from common import virtual_tokens
from common.problems import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from common.models import Model


def context_length(model: Model | SimpleNamespace) -> int:
    """Number of positions for a text in a model (or a namespace with its `config`); 2³⁰ if unlimited.

    An adapter's virtual tokens take the first of them (a namespace has their number as `virtual_tokens`).
    """
    config = model.config
    n = getattr(config, "max_position_embeddings", 0) or getattr(config, "n_positions", 0) or 1 << 30
    return int(n) - virtual_tokens.count(model)


def check_tokens(model: Model, sequences: Iterable[Sequence[int]]) -> None:
    """UserError if a token of the (non-empty) sequences is outside the model's vocabulary."""
    n, largest = embedding_weight(model).shape[0], max(map(max, sequences), default=0)
    if largest >= n:
        name = model.config.name_or_path or "the model"
        raise UserError(f"{name}: its tokenizer gives token {largest}, but the model has only {n} embeddings")


def embedding_weight(model: Model) -> torch.Tensor:
    """The weight [V, hidden size] of a model's input embeddings."""
    return cast("torch.Tensor", model.get_input_embeddings().weight)


def beyond_plain_attention(config: PreTrainedConfig, longest: int) -> str | None:
    """Why plain causal attention is not enough for a sequence of `longest` tokens; None if it is."""
    check_rope(config, longest)
    window, limit = attention_window(config), rope_limit(config)
    if window is not None and longest > window:
        return f"a window of {window} tokens"
    if limit is not None and longest > limit:
        return f"a different rotary embedding beyond {limit} tokens"
    return None


def attention_window(config: PreTrainedConfig) -> int | None:
    """Attention span of the narrowest layer (sliding window, local attention, chunk); None if unlimited."""
    config = config.get_text_config()
    if getattr(config, "use_sliding_window", True) is False:
        return None
    names = ["sliding_window", "attention_window_size", "attention_chunk_size"]
    names += ["window_size"] if config.model_type == "gpt_neo" else []
    sizes = [getattr(config, name, None) for name in names]
    return min((size for size in sizes if isinstance(size, int)), default=None)


def rope_limit(config: PreTrainedConfig) -> int | None:
    """Tokens beyond which a longrope model changes the rotary embedding of the whole sequence (Ding et al. 2024,
    arXiv:2402.13753); None for other models. Sequences on either side of it cannot share a padded batch."""
    config = config.get_text_config()
    for rope in rope_blocks(config):
        if rope["rope_type"] == "longrope":
            key = "original_max_position_embeddings"
            limit: int = rope.get(key) or getattr(config, key, None) or config.max_position_embeddings
            return limit
    return None


def check_rope(config: PreTrainedConfig, longest: int) -> None:
    """UserError if a sequence is so long that the model's rotary frequencies depend on earlier inputs (rope_type
    "dynamic": they are rescaled for the longest sequence so far, and stay so)."""
    config = config.get_text_config()
    for rope in rope_blocks(config):
        limit = rope.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", None)
        limit = longest if limit is None else limit
        if rope["rope_type"] == "dynamic" and longest > limit:
            raise UserError(
                f"{config.name_or_path or config.model_type}: with its dynamic rotary embedding, the output for a text "
                f"of {longest} tokens depends on earlier texts; use at most {limit} tokens"
            )


def rope_blocks(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The rotary parameters of a configuration: one dict, or one per layer type."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return [block for block in ([rope] if "rope_type" in rope else rope.values()) if isinstance(block, dict)]
