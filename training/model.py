"""The model and its trainable part: adapters, sharding, and the saved tensors."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from common import adapter_files, adapters, models, quantization
from common.distributed import World, node_size
from common.problems import UserError
from training.config import AdapterConfig, TrainConfig

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from peft.tuners.lora import Linear as LoraLinear
    from transformers import PreTrainedConfig, PreTrainedModel

    from training.plan import Plan

STATE_SPACE = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")  # as peft's own check lists them
NEVER = {"out_proj", "conv1d"}


def build(
    config: TrainConfig,
    plan: "Plan",
    world: World,
    dtype: "torch.dtype",
    seed: int,
    base: "PreTrainedModel | None" = None,
) -> "tuple[PreTrainedModel | PeftModel, dict[str, torch.Tensor]]":
    """(model in training mode, its initial adapter's tensors on the CPU; {} for full fine-tuning). base: a loaded one,
    of `dtype` and on the right devices; `detach` gives it back."""
    full, fsdp = config.peft_type == "full", config.distribution_type == "fsdp"
    model: PreTrainedModel | PeftModel = base if base is not None else load_base(config, plan, world, dtype)
    if config.distribution_type == "mp" and len({parameter.device for parameter in model.parameters()}) == 1:
        world.say(f"mp: one device here, all layers on {next(model.parameters()).device}")
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    initial: dict[str, torch.Tensor] = {}
    if not full:
        model, initial = add_adapter(config, plan, world, cast("PreTrainedModel", model), seed)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if fsdp:
        shard(model, set() if full else set(trainable), world, config.hsdp)
    return model.train(), initial


def load_base(config: TrainConfig, plan: "Plan", world: World, dtype: "torch.dtype") -> "PreTrainedModel":
    """The model to be trained, as `build` takes it."""
    import torch

    device_map = (config.device_map or "auto") if config.distribution_type == "mp" else None
    # Full fine-tuning keeps float32 weights: half precision would round most of an update away.
    loaded = torch.float32 if config.peft_type == "full" else dtype
    return models.load_base(plan.ref, loaded, "cpu" if config.distribution_type == "fsdp" else world.device, device_map)


def add_adapter(
    config: TrainConfig, plan: "Plan", world: World, base_model: "PreTrainedModel", seed: int
) -> "tuple[PeftModel, dict[str, torch.Tensor]]":
    """(PEFT model, initial adapter tensors), the same on every rank; for PiSSA the base becomes the residual."""
    import torch
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    chosen = chosen_layers(config, base_model)
    kept = plan.folder / "initial_adapter"
    saved = plan.start == "resume" and config.peft_type == "pissa" and kept.is_dir()
    dropout = config.lora_dropout
    if dropout is None or config.peft_type == "pissa":
        dropout = 0.0 if config.peft_type == "pissa" else 0.05
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # peft only uses alpha / r
        lora_dropout=dropout,
        bias="none",
        target_modules="all-linear" if config.target_modules == ("all-linear",) else list(config.target_modules),
        use_dora=config.peft_type == "dora",
        init_lora_weights="pissa" if config.peft_type == "pissa" and not saved else True,
        rank_pattern={name: min(sides) for name, sides in chosen.items() if min(sides) < config.lora_r},
        revision=config.revision,
    )
    torch.manual_seed(seed)
    with adapters.without_peft_warning():
        model = cast("PeftModel", get_peft_model(base_model, lora))
    base = Path(plan.ref.base).expanduser()
    lora = cast("LoraConfig", model.peft_config["default"])
    lora.base_model_name_or_path = str(base.resolve()) if base.is_dir() else plan.ref.base
    if saved:
        from safetensors.torch import load_file

        set_peft_model_state_dict(model, load_file(kept / "adapter_model.safetensors"))
        subtract_adapter(model)
    lora.init_lora_weights = True  # the published adapter is loaded as it is
    set_peft_model_state_dict(model, world.broadcast(adapter_state(model) if world.main else None))
    return model, adapter_state(model)


def detach(model: "PeftModel") -> None:
    """Take the adapter off its base, which is then as `load_base` gave it (not for PiSSA, which changes it)."""
    base = model.unload()
    if hasattr(base, "peft_config"):
        del base.peft_config
    base._hf_peft_config_loaded = False


def _is_named(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def chosen_layers(config: AdapterConfig, model: "PreTrainedModel") -> dict[str, tuple[int, int]]:
    """Name → weight shape of every linear layer selected by --target_modules."""
    return {
        name: sides
        for name, sides in linear_layers(model).items()
        if config.target_modules == ("all-linear",) or any(_is_named(name, target) for target in config.target_modules)
    }


def meta_model(architecture: "PreTrainedConfig") -> "PreTrainedModel":
    """The model on the meta device, without weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(architecture)
    return cast("PreTrainedModel", made)


def check_targets(targets: Sequence[str], config: "PreTrainedConfig") -> None:
    """UserError if a name in --target_modules is not a linear layer of the model, or is one that peft rejects."""
    model = meta_model(config)
    linear = linear_layers(model)
    never = {*adapter_files.READ_DIRECTLY, *(NEVER if config.model_type in STATE_SPACE else ())}
    kinds = " ".join(sorted({name.split(".")[-1] for name in linear} - never))
    if tuple(targets) == ("all-linear",):
        stacked = {
            name.split(".")[-1]
            for name, module in model.named_modules()
            if "expert" in name.split(".")[-1] and any(item.dim() == 3 for item in module.parameters(recurse=False))
        }
        if stacked:
            raise UserError(
                f"--target_modules all-linear: the {' and '.join(sorted(stacked))} of {config.model_type} are one "
                f"parameter for all experts, which is not supported; list the layers: --target_modules {kinds}"
            )
        targets = ()
    refused = {
        name.split(".")[-1] for name in linear if not targets or any(_is_named(name, pattern) for pattern in targets)
    }
    if refused & never:
        raise UserError(
            f"--target_modules: LoRA does not work on {' and '.join(sorted(refused & never))} of {config.model_type}; "
            f"choose others: --target_modules {kinds}"
        )
    unknown = [target for target in targets if not any(_is_named(name, target) for name in linear)]
    if unknown:
        raise UserError(f"--target_modules {' '.join(unknown)}: no such linear layer; choose from {kinds}")


def count_trainable(config: AdapterConfig, architecture: "PreTrainedConfig") -> int:
    """Number of adapter parameters (from the model's shapes alone, without its weights)."""
    chosen = chosen_layers(config, meta_model(architecture))
    ranks = {name: min(config.lora_r, *sides) for name, sides in chosen.items()}
    n = sum(ranks[name] * sum(sides) for name, sides in chosen.items())
    return n + (sum(n_out for n_out, _ in chosen.values()) if config.peft_type == "dora" else 0)


def linear_layers(model: "PreTrainedModel") -> dict[str, tuple[int, int]]:
    """Name → weight shape of every linear layer except the output head."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()

    def sides(module: "nn.Linear | Conv1D") -> tuple[int, int]:
        if isinstance(module, nn.Linear):  # the weight of a quantised layer has another shape
            return module.out_features, module.in_features
        return module.weight.shape[0], module.weight.shape[1]

    return {
        name: sides(module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }


def lora_layers(model: "PeftModel") -> "dict[str, LoraLinear]":
    """Name → PEFT layer, for every adapted layer."""
    from peft.tuners.lora import LoraLayer

    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    return cast("dict[str, LoraLinear]", layers)  # check_targets allows only linear layers


def subtract_adapter(model: "PeftModel") -> None:
    """W ← W − s·B A in every adapted layer (in float32): turns the original base into PiSSA's residual."""
    import torch
    from peft.utils.other import transpose

    with torch.no_grad():
        for layer in lora_layers(model).values():
            base, flipped = cast("torch.nn.Linear", layer.get_base_layer()), layer.fan_in_fan_out
            product = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            residual = transpose(base.weight.float(), flipped) - product
            base.weight.data = transpose(residual.to(base.weight.dtype), flipped)


def adapter_state(model: "PeftModel") -> "dict[str, torch.Tensor]":
    """The adapter's tensors on the CPU, under the names that PEFT saves them with."""
    from peft import get_peft_model_state_dict

    # Not model.state_dict(): under FSDP it re-shards the rank that calls it, and the ranks fall out of step.
    named = {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}
    state = get_peft_model_state_dict(model, state_dict=named, save_embedding_layers=False)
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}


def converted(state: "dict[str, torch.Tensor]", initial: "dict[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    """A PiSSA adapter converted to an equivalent LoRA of twice the rank on the original base.

    PiSSA trains B A on the residual W − s B₀A₀ (Meng et al. 2024), so ΔW = s (B A − B₀ A₀) = s [B, −B₀] [A; A₀]. Rank
    and alpha both double, which keeps the scale s. Tensors: name → lora_A (r, in) or lora_B (out, r), float32.
    """
    import torch

    wide = {}
    for name, tensor in state.items():
        if ".lora_A." in name:
            wide[name] = torch.cat([tensor, initial[name]], dim=0)
        else:
            wide[name] = torch.cat([tensor, -initial[name]], dim=1)
    return wide


def base_of(model: "PreTrainedModel | PeftModel") -> "PreTrainedModel":
    """The model under an adapter, or `model` itself."""
    from peft import PeftModel

    return cast("PreTrainedModel", model.get_base_model() if isinstance(model, PeftModel) else model)


def shard(
    model: "PreTrainedModel | PeftModel", replicated: "set[torch.nn.Parameter]", world: World, hsdp: bool = False
) -> None:
    """FSDP2 over all processes, or (hsdp) over those of each node: each decoder layer, then the rest; `replicated`
    parameters stay whole everywhere."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    for parameter in replicated:
        parameter.data = parameter.data.to(world.device)
    sizes = {"replicate": world.size // node_size(), "shard": node_size()} if hsdp else {"shard": world.size}
    mesh = init_device_mesh(world.device.split(":")[0], tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    base = base_of(model)
    kinds = set(base._no_split_modules or ())
    layers = [module for module in base.modules() if type(module).__name__ in kinds]
    if not layers:
        raise RuntimeError(
            f"{type(base).__name__} does not name its decoder layers (_no_split_modules); fsdp cannot shard it"
        )
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=replicated)
    fully_shard(model, mesh=mesh, ignored_params=replicated)
    whole = {id(parameter) for parameter in replicated}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) == (id(parameter) in whole):
            raise RuntimeError(f"fsdp: {name} is {'' if isinstance(parameter, DTensor) else 'not '}sharded")


def effective_weight(layer: "LoraLinear", name: str, state: "dict[str, torch.Tensor]") -> "torch.Tensor":
    """The weight (float64) of an adapted layer with its tensors in `state`: W + s·B A, for DoRA with magnitudes."""
    import torch
    from peft.utils.other import transpose

    with torch.no_grad():
        base = cast("torch.nn.Linear", layer.get_base_layer())
        weight = base.weight.detach()
        if not weight.is_floating_point():
            weight = quantization.weight_of(base)
        if hasattr(weight, "full_tensor"):  # fsdp: unsharded, on this rank only
            weight = weight.full_tensor()
        weight = weight.double()
        a, b, m = (
            state[key].to(weight) if (key := f"{name}.{kind}") in state else None
            for kind in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
        )
        weight = cast("torch.Tensor", transpose(weight, layer.fan_in_fan_out) + layer.scaling["default"] * b @ a)
        return weight if m is None else weight * (m.view(-1) / weight.norm(dim=1))[:, None]


def save_adapter(folder: Path, state: "dict[str, torch.Tensor]", config: "LoraConfig") -> None:
    """A PEFT adapter directory: adapter_model.safetensors and adapter_config.json."""
    from safetensors.torch import save_file

    config = copy.deepcopy(config)
    config.inference_mode = True
    if isinstance(config.target_modules, set):  # sets have no fixed order
        config.target_modules = sorted(config.target_modules)
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(folder))
