"""Attaching adapters, and merging that can be undone bit for bit."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import adapter_files, models, quantization, sharding, virtual_tokens
from common.json_files import read_json
from common.problems import AnyPath, UserError

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    from common.models import Model, ModelRef

KEPT_ATTACHED = ("lora_bias", "trainable_token_indices", "target_parameters")  # of a LoraConfig
MERGED_SLACK = 0.02  # standard deviations of the logits; float32 is off by less than 1e-4, experts chosen anew by more
ADDED = "_added_by_the_adapter"
REASONS = (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError, ImportError, AssertionError)


@contextlib.contextmanager
def adapted(
    model: PreTrainedModel, adapter: AnyPath | None, merge: bool | None = None
) -> Iterator[tuple[Model, float | None]]:
    """Yields (model with the adapter applied, ‖ΔW‖/‖W‖ or None). Afterwards `model` is bit for bit as before.

    merge: fold the adapter into the weights. None: only a plain low-rank adapter, if the weights are float32 (half
    precision would round away most of a small update) and no adapted weight is tied to another module's (a merge would
    change that one too); True: UserError where that would not give the attached model's numbers. ‖·‖ is the Frobenius
    norm over all adapted matrices; None if not merged.
    """
    import torch

    if adapter is None:
        yield model, None
        return
    config = read_json(Path(adapter) / "adapter_config.json", "the checkpoint is damaged")
    modules = dict(model.named_modules())
    shared = tied(
        model,
        {
            adapter_files.module_of(tensor, modules)
            for tensor in adapter_files.adapter_shapes(adapter)
            if ".lora_" in tensor
        },
    )
    virtual = config.get("peft_type") in virtual_tokens.KINDS
    if merge and shared:
        raise UserError(tied_words(adapter, shared))
    if merge and virtual:
        raise UserError(cannot_merge(adapter, config))
    if merge is None:
        plain = config.get("peft_type") == "LORA" and not any(config.get(key) for key in KEPT_ATTACHED)
        full = next(model.parameters()).dtype == torch.float32 and not quantization.is_quantised(model)
        merge = plain and full and not shared
    kept, layers = _Kept(model, adapter), sharding.layers_of(model)
    shares = [layer.share.to("cpu", copy=True) for layer in layers] if merge else []
    with torch.no_grad():
        try:
            kept.resize(adapter)
            peft_model = attach(model, adapter)
            if virtual:
                with virtual_tokens.installed(model, peft_model, str(adapter)):
                    yield model, None
            elif merge:
                probe = torch.arange(2, 34, device=model.device)[None] % kept.vocabulary
                wanted = peft_model(input_ids=probe, use_cache=False).logits
                moved: dict[tuple[str, str], Squares] = {}
                try:
                    with warnings.catch_warnings():
                        warnings.filterwarnings("ignore", "All adapters are already merged", UserWarning)
                        for layer in layers:
                            moved |= _merge_layer(layer, peft_model, kept)
                        peft_model.merge_and_unload(safe_merge=True)
                except (*REASONS, NotImplementedError) as error:
                    raise UserError(f"{adapter}: peft cannot merge it ({_why(error)}); measure it attached") from None
                _check_merged(model(input_ids=probe, use_cache=False).logits, wanted, adapter)
                yield model, relative_change(model, kept.weights, moved)
            else:
                peft_model.__dict__[ADDED] = kept.added(peft_model)
                yield peft_model, None
        finally:
            kept.restore()
            for layer, share in zip(layers, shares):
                layer.put(share)


def attach(model: PreTrainedModel, adapter: AnyPath) -> PeftModel:
    """`model` with the adapter attached (not merged), in eval mode; UserError if it does not fit."""
    from peft import PeftModel, get_peft_model_state_dict

    kind = read_json(Path(adapter) / "adapter_config.json", "the checkpoint is damaged").get("peft_type")
    shapes = adapter_files.adapter_shapes(adapter)
    if kind not in virtual_tokens.KINDS:
        adapter_files.check_fit(model, adapter)
    modules = dict(model.named_modules())
    try:
        with without_peft_warning():
            attached: PeftModel = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=True).eval()
    except REASONS as error:
        raise UserError(f"{adapter}: peft cannot attach it to this base model ({_why(error)})") from None
    if kind == "LORA":
        named = {adapter_files.module_of(name, modules) for name in shapes if ".lora_A" in name}
        created = {
            adapter_files.module_of(name, modules) for name, _ in attached.named_parameters() if ".lora_A" in name
        }
    else:
        state = set(get_peft_model_state_dict(attached, save_embedding_layers=False))
        named, created = set(shapes), state
        base = attached.get_base_model()
        own = {adapter_files.WRAPPERS.sub("", name) for name, _ in base.named_parameters(remove_duplicate=False)}
        others = [
            name
            for name in named - state
            if not {adapter_files.plain_name(name), name.removeprefix("base_model.")} & own
        ]
        if unused := sorted(others):
            raise UserError(f"{adapter}: does not fit this base model: it has no module for {unused[0]}")
    if created - named:  # e.g. trained on a shallower model: these matrices would keep their random initialisation
        raise UserError(f"{adapter}: does not fit this base model: it has nothing for {min(created - named)}")
    return attached


def _why(error: Exception) -> str:
    """An error of peft's in one line; a lack of memory is raised again."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        raise error
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextlib.contextmanager
def without_peft_warning() -> Iterator[None]:
    """Silence a warning: peft 0.21 reads an attribute deprecated in transformers 5 whenever it attaches an adapter."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def without_adapter(model: Model) -> PreTrainedModel:
    """The model under an attached adapter, or `model` itself."""
    wrapped: Any = model
    base: PreTrainedModel = wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped
    return base


def adapter_parameters(model: Model) -> list[torch.nn.Parameter]:
    """Those of the adapter that `adapted` has attached to a model."""
    if virtual := virtual_tokens.of(model):
        return virtual.parameters
    added: list[torch.nn.Parameter] = model.__dict__.get(ADDED, [])
    return added


class _Kept:
    """What attaching, merging or resizing may change in a base, to undo it bit for bit."""

    def __init__(self, model: PreTrainedModel, adapter: AnyPath) -> None:
        self.model, self.modules = model, dict(model.named_modules())
        spread = {id(item) for layer in sharding.layers_of(model) for item in layer.parameters}
        names = {adapter_files.module_of(tensor, self.modules) for tensor in adapter_files.adapter_shapes(adapter)} - {
            ""
        }
        self.names = sorted(names & set(self.modules))
        self.weights = {
            name: {
                key: item.detach().to("cpu", copy=True)
                for key, item in self.modules[name].named_parameters(recurse=False)
                if item.is_floating_point() and id(item) not in spread  # packed weights are not changed
            }
            for name in self.names
        }
        self.ends = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
        self.data = [(item, item.data) for end in self.ends for item in end.parameters(recurse=False)]
        sizes = ("num_embeddings", "out_features", "padding_idx")
        self.sizes = [(end, key, getattr(end, key)) for end in self.ends for key in sizes if hasattr(end, key)]
        self.vocabulary = model.config.get_text_config().vocab_size
        self.trainable = [(item, item.requires_grad) for item in model.parameters()]

    def resize(self, adapter: AnyPath) -> None:
        """Give the base the adapter's number of embeddings."""
        if rows := adapter_files.new_vocabulary(adapter, self.model):
            self.model.resize_token_embeddings(rows, mean_resizing=False)

    def added(self, model: torch.nn.Module) -> list[torch.nn.Parameter]:
        """The parameters of `model` that are not the base's."""
        own = {id(item) for item, _ in self.trainable}
        return [item for item in model.parameters() if id(item) not in own and item.is_floating_point()]

    def restore(self) -> None:
        for name, module in self.modules.items():
            parent, _, child = name.rpartition(".")
            if name and self.modules[parent]._modules.get(child) is not module:
                self.modules[parent]._modules[child] = module
        for item, data in self.data:
            item.data = data
        for end, key, size in self.sizes:
            setattr(end, key, size)
        self.model.config.get_text_config().vocab_size = self.vocabulary
        for name in self.names:
            for key, item in self.modules[name].named_parameters(recurse=False):
                if key in self.weights[name]:
                    item.copy_(self.weights[name][key])
        for item, flag in self.trainable:
            item.requires_grad_(flag)
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        self.model._hf_peft_config_loaded = False


Squares = tuple[float, float]  # ‖W' − W‖² and ‖W‖²


def _merge_layer(layer: sharding.Layer, peft_model: PeftModel, kept: _Kept) -> dict[tuple[str, str], Squares]:
    """Merge the adapter into one spread layer; {(module, parameter): how far it moved}."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    inside = {id(item) for item in layer.parameters}
    adapted_here = [
        module
        for module in peft_model.modules()
        if isinstance(module, BaseTunerLayer)
        and any(id(item) in inside for item in module.get_base_layer().parameters())
    ]
    if not adapted_here:
        return {}
    own = {
        (name, key): item
        for name in kept.names
        for key, item in kept.modules[name].named_parameters(recurse=False)
        if id(item) in inside
    }
    with layer.whole():
        before = {place: item.detach().to("cpu", copy=True) for place, item in own.items()}
        for module in adapted_here:
            module.merge(safe_merge=True)
        layer.keep()
        return {place: _squares(before[place], item.detach()) for place, item in own.items() if item.dim() > 1}


def _check_merged(found: torch.Tensor, wanted: torch.Tensor, adapter: AnyPath) -> None:
    """UserError unless a merged model gives the attached one's logits."""
    error = float((found.float() - wanted.float()).abs().max() / wanted.float().std().clamp(min=1e-6))
    if not error < MERGED_SLACK:
        raise UserError(
            f"{adapter}: merged, it is not what it is attached (logits off by {error:.2g} standard deviations); "
            "measure it attached"
        )


def relative_change(
    model: torch.nn.Module,
    before: dict[str, dict[str, torch.Tensor]],
    moved: dict[tuple[str, str], Squares] | None = None,
) -> float | None:
    """‖W' − W‖ / ‖W‖ over the matrices in `before` (module name → its parameters before the merge) and those whose
    squares are known (`moved`); None for none."""
    squares = dict(moved or {})
    for name, parameters in before.items():
        for key, weight in parameters.items():
            if weight.dim() > 1:
                squares[name, key] = _squares(weight, getattr(model.get_submodule(name), key).detach())
    order = list(before)
    change = total = 0.0
    for _, (own_change, own_total) in sorted(squares.items(), key=lambda item: order.index(item[0][0])):
        change += own_change
        total += own_total
    return float((change / total) ** 0.5) if total else None


def _squares(weight: torch.Tensor, now: torch.Tensor) -> Squares:
    weight, now = weight.double(), now.to("cpu").double()
    rows = min(len(weight), len(now))  # resized embeddings: those of both
    return (now[:rows] - weight[:rows]).square().sum().item(), weight.square().sum().item()


def check_mergeable(ref: ModelRef) -> None:
    """UserError if what an adapter does cannot be folded into its base's weights; no weights are loaded."""
    config = read_json(Path(ref.adapter or ref.base) / "adapter_config.json", "the checkpoint is damaged")
    if ref.virtual_tokens:
        raise UserError(cannot_merge(ref.name, config))
    model = models.check_config(ref.base, ref.revision, "--model", ref.quantization)
    modules = dict(model.named_modules())
    changed = {
        adapter_files.module_of(tensor, modules)
        for tensor in adapter_files.adapter_shapes(ref.adapter or "")
        if ".lora_" in tensor
    }
    if shared := tied(model, changed):
        raise UserError(tied_words(ref.name, shared))
    bare = [name for name in sorted(changed) if getattr(modules[name], "bias", None) is None]
    if config.get("lora_bias") and bare:
        raise UserError(
            f"{ref.name}: has a bias for {bare[0]} (lora_bias), which has none in the base, so that it cannot be "
            "merged; measure it attached"
        )


def tied_words(adapter: AnyPath, shared: list[str]) -> str:
    return (
        f"{adapter}: adapts {', '.join(shared)}, whose weight is tied to another module's: merging would change "
        "both; measure it attached, or untie the base before training"
    )


def cannot_merge(adapter: AnyPath, config: Mapping[str, Any]) -> str:
    return (
        f"{adapter}: {config.get('peft_type')} puts virtual tokens before a text and changes no weights, so there is "
        "nothing to merge; measure it attached"
    )


def tied(model: torch.nn.Module, names: Iterable[str]) -> list[str]:
    """Those of the modules whose weight is shared with another module (e.g. output head and embeddings)."""
    owners: dict[int, set[str]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), set()).add(name)
    return sorted(name for sharing in owners.values() if len(sharing) > 1 for name in sharing & set(names))


def untie_if_different(model: Model) -> None:
    """Where only one of two tied matrices was trained (`modules_to_save`), the configuration must not tie them."""
    config = model.config.get_text_config()
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    if getattr(config, "tie_word_embeddings", False) and None not in ends and ends[0].weight is not ends[1].weight:
        for part in (config, model.config):
            part.tie_word_embeddings = False
