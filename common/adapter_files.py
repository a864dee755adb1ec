"""What an adapter's directory holds, and whether it is supported and fits its base; no weights are loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from common import limits, virtual_tokens
from common.problems import AnyPath, UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def tensor_shapes(file: AnyPath, remedy: str) -> dict[str, tuple[int, ...]]:
    """Tensor name → shape from the header of a safetensors file; UserError if the file is truncated or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "numpy") as weights:
            return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: cannot be read ({error}); {remedy}") from None


def adapter_shapes(path: AnyPath) -> dict[str, tuple[int, ...]]:
    """Tensor name → shape of the weights in an adapter directory; UserError if they are truncated or damaged."""
    return tensor_shapes(Path(path) / "adapter_model.safetensors", "the checkpoint is damaged")


# What peft attaches, but not so that a forward pass of the base gives its numbers.
NOT_SUPPORTED = {
    "MULTITASK_PROMPT_TUNING": "needs the number of a task with every text",
    "POLY": "needs the number of a task with every text",
    "CPT": "continues a context of its own",
    "XLORA": "mixes several adapters anew for every text",
    "ADAPTION_PROMPT": "computes the attention of its layers itself",
    "SHADOW": "runs a second model beside its base",
}


NOT_SUPPORTED_KEYS = {
    "alora_invocation_tokens": "works only after its invocation tokens (aLoRA)",
    "layer_replication": "repeats layers of its base",
    "megatron_config": "needs Megatron's parallel layers",  # peft would import what megatron_core names
}
NOT_GENERATING = ("SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS")
ENDLESS = re.compile(r"\([^()]*[+*}][^()]*\)[+*{]")  # a repeated group with a repetition in it


def check_kind(path: Path, config: dict[str, Any]) -> None:
    """UserError for an unsupported kind of adapter, before anything is loaded."""
    from peft import PeftType

    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in PeftType.__members__:
        raise UserError(f"{path}: peft_type {kind!r} is unknown to the installed peft")
    if kind in NOT_SUPPORTED:
        raise UserError(f"{path}: {kind} {NOT_SUPPORTED[kind]}; not supported")
    for key, words in NOT_SUPPORTED_KEYS.items():
        if config.get(key):
            raise UserError(f"{path}: {words} ({key}); not supported: merge it with peft and pass the merged model")
    task = config.get("task_type")
    if task in NOT_GENERATING or (kind in virtual_tokens.KINDS and task != "CAUSAL_LM"):
        words = "peft would leave its virtual tokens out" if task is None else "it is no adapter of a language model"
        raise UserError(f"{path}: task_type {task!r} in its adapter_config.json: {words}; restore what peft wrote")
    if kind in virtual_tokens.KINDS:
        n = config.get("num_virtual_tokens")
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise UserError(f"{path}: num_virtual_tokens in its adapter_config.json is {n!r}, not a count; fix it")
    for key in ("r", "lora_alpha"):
        if kind == "LORA" and (isinstance(config.get(key), bool) or not isinstance(config.get(key), int | float)):
            raise UserError(f"{path}: {key} in its adapter_config.json is {config.get(key)!r}, not a number; fix it")
    if wrong := _other_types(kind, config):
        raise UserError(
            f"{path}: {', '.join(wrong)} in its adapter_config.json has the wrong type; restore what peft wrote"
        )
    patterns = [config.get(key) for key in ("target_modules", "exclude_modules")]
    for key in ("rank_pattern", "alpha_pattern"):
        patterns += list(config.get(key) or ()) if isinstance(config.get(key), dict) else []
    for pattern in patterns:
        if isinstance(pattern, str) and ENDLESS.search(pattern):
            raise UserError(
                f"{path}: {pattern!r} in its adapter_config.json may never finish matching as a regular expression"
            )


NAMES_OF_MODULES = ("target_modules", "exclude_modules", "modules_to_save")


def _other_types(kind: str, config: dict[str, Any]) -> list[str]:
    """Keys of an adapter_config.json whose value has a different type than peft's default."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType

    try:
        defaults = vars(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]())
    except (KeyError, TypeError, ValueError):  # a kind without a configuration, or without defaults
        return []
    wrong = []
    for key, value in config.items():
        default = defaults.get(key)
        if key in NAMES_OF_MODULES:
            names = [value] if isinstance(value, str) else value or []
            right = isinstance(names, list) and all(isinstance(name, str) for name in names)
        elif value is None:
            right = key not in ("bias", "rank_pattern", "alpha_pattern")
        elif key == "init_lora_weights":
            right = isinstance(value, bool | str)
        elif type(default) in (str, dict):
            right = isinstance(value, type(default))
        elif type(default) in (int, float):
            right = isinstance(value, int | float)
        else:  # None by default: may be many things, peft itself rejects bad ones
            right = True
        if not right:
            wrong.append(key)
    return wrong


def check_architecture(path: Path, config: dict[str, Any], model: PreTrainedModel) -> None:
    """UserError if the adapter does not fit its base, which has no weights yet."""
    rows = new_vocabulary(path, model)
    if config["peft_type"] not in virtual_tokens.KINDS:
        check_fit(model, path, rows)
        return
    kinds = {rope["rope_type"] for rope in limits.rope_blocks(model.config.get_text_config())} & {"dynamic", "longrope"}
    if kinds:
        raise UserError(f"{path}: virtual tokens before a text with a {kinds.pop()} rotary embedding; not supported")
    width = cast("torch.Tensor", model.get_input_embeddings().weight).shape[1]
    shape = adapter_shapes(path).get("prompt_embeddings", (0, width))
    if config["peft_type"] not in virtual_tokens.IN_THE_CACHE and shape[1] != width:
        raise UserError(f"{path}: does not fit this base model: its prompts have width {shape[1]}, the base {width}")
    n = limits.context_length(model)
    if config["num_virtual_tokens"] >= n - 1:
        raise UserError(f"{path}: {config['num_virtual_tokens']} virtual tokens leave no room in a context of {n}")


def new_vocabulary(path: AnyPath, model: PreTrainedModel) -> int | None:
    """The rows of the embeddings that an adapter brings, if they are more or fewer than the base's. UserError if it
    does not bring all that a base of that size needs."""
    modules = dict(model.named_modules())
    ends = {"embeddings": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    names = {
        f"{name}.weight": end
        for name, module in modules.items()
        for end, end_module in ends.items()
        if module is end_module
    }
    rows: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor, shape in adapter_shapes(path).items():
        if ".lora_" not in tensor:
            shapes |= {plain_name(tensor): shape, tensor.removeprefix("base_model."): shape}
    for name, end in names.items():
        wanted = tuple(cast("torch.Tensor", cast("torch.nn.Module", ends[end]).weight).shape)
        shape_given = shapes.get(name, wanted)
        if shape_given[1:] != wanted[1:]:
            raise UserError(
                f"{path}: does not fit this base model: its {name} is {list(shape_given)}, not {list(wanted)}"
            )
        rows[name] = shape_given[0]
        size = wanted[0]
    if not rows or set(rows.values()) == {size}:
        return None
    tied = ends["head"] is not None and cast(Any, ends["head"]).weight is cast(Any, ends["embeddings"]).weight
    given = {name: count for name, count in rows.items() if count != size}
    if len(set(given.values())) > 1 or (len(given) < len(rows) and not tied):
        words = ", ".join(f"{name} has {count} rows" for name, count in sorted(rows.items()))
        raise UserError(
            f"{path}: resized embeddings, but not all of them are in it ({words}); save it with "
            "save_embedding_layers=True"
        )
    return next(iter(given.values()))


READ_DIRECTLY = (
    "dt_proj",
)  # state-space models read this layer's weight directly: an attached adapter has no effect, a merged one does


def check_fit(model: torch.nn.Module, adapter: AnyPath, rows: int | None = None) -> None:
    """UserError naming the first adapter tensor that has no module, or a different shape, in `model`.

    rows: of its embeddings and output head, if they will be resized.
    """
    modules = dict(model.named_modules())
    ends = (cast(Any, model).get_input_embeddings(), cast(Any, model).get_output_embeddings()) if rows else ()
    for tensor, shape in adapter_shapes(adapter).items():
        name = module_of(tensor, modules)
        module = modules.get(name)
        if ".lora_" in tensor and name.rsplit(".", 1)[-1] in READ_DIRECTLY:
            raise UserError(
                f"{adapter}: the model reads the weight of {name.rsplit('.', 1)[-1]} directly, bypassing the adapter; "
                "not supported"
            )
        if module is not None and any(item.dim() == 3 for item in module.parameters(recurse=False)):
            continue  # experts in one parameter: peft checks the shapes on loading
        weight = getattr(module, "weight", None)
        if ".lora_" not in tensor:  # another kind: peft checks the shapes
            if not name and tensor.startswith("base_model.model."):
                raise UserError(f"{adapter}: does not fit this base model: it has no module for {tensor}")
            continue
        if weight is None:
            raise UserError(f"{adapter}: does not fit this base model: it has no module for {tensor}")
        # Conv1D (GPT-2) stores its weight transposed; packed weights have no shape of their own
        n_in = getattr(module, "in_features", weight.shape[-1])
        n_out = getattr(module, "out_features", weight.shape[0])
        if type(module).__name__ == "Conv1D":
            n_in, n_out = weight.shape[0], weight.shape[1]
        if rows and module in ends:
            n_out = rows
        wanted: tuple[int, ...]
        if tensor.endswith("bias"):
            wanted = (n_out,)
        elif ".lora_A" in tensor:
            wanted = (shape[0], n_in)
        elif ".lora_B" in tensor:
            wanted = (n_out, shape[-1])
        elif "lora_magnitude" in tensor:
            wanted = (n_out,)
        else:
            continue
        if shape != wanted:
            raise UserError(
                f"{adapter}: does not fit this base model: {tensor} is {list(shape)}, the base needs {list(wanted)}"
            )


def module_of(tensor: str, modules: Mapping[str, object]) -> str:
    """Base module that an adapter tensor belongs to: 'base_model.model.a.b.lora_A.weight' → 'a.b'; '' for none."""
    name = tensor.removeprefix("base_model.model.")
    if ".lora_" in name:
        name = name.split(".lora_")[0]
        while name.endswith(".base_layer"):  # peft stacks several wrappers around one module of experts
            name = name.removesuffix(".base_layer")
        return name
    for name in (plain_name(tensor), tensor.removeprefix("base_model.")):  # an adapter of virtual tokens wraps less
        while name and name not in modules:
            name = name.rpartition(".")[0]
        if name:
            return name
    return ""


WRAPPERS = re.compile(r"\.(modules_to_save|token_adapter|base_layer)(?=\.)")  # what peft puts around a base's module


def plain_name(tensor: str) -> str:
    """The name that an adapter's tensor has in the base, if it replaces one of the base's."""
    return WRAPPERS.sub("", tensor.removeprefix("base_model.model."))
