"""Models whose weights are loaded in fewer bits: by --quantization (bitsandbytes), or as their config.json says."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from typing import TYPE_CHECKING, Any

from common.problems import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from common.models import Model

NOT_INSTALLED = "bitsandbytes is not installed; pip install bitsandbytes (the extra `quantization`)"


def check(kind: str | None, config: PreTrainedConfig, name: str) -> None:
    """UserError if a model's weights cannot be loaded in so few bits: `kind` is --quantization, None as they are.

    name: the flag and the model, which starts the line.
    """
    stored = method(config)
    if kind and stored:
        raise UserError(f"{name}: is quantised already ({stored}); drop --quantization {kind}")
    if kind and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"--quantization {kind}: {NOT_INSTALLED}")
    if not stored:
        return
    if "bitsandbytes" in stored and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{name}: is quantised with bitsandbytes; {NOT_INSTALLED}")
    from transformers.quantizers.auto import AutoHfQuantizer

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantizer = AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True)
            quantizer.validate_environment(device_map=None, weights_only=True)
    except Exception as error:  # each method has its own requirements and its own errors
        reason = " ".join(str(error).split())[:250]
        raise UserError(f"{name}: is quantised ({stored}) and cannot be loaded here: {reason}") from None


def method(config: Any) -> str:
    """How a model's weights are quantised, in a few words; "" if they are not."""
    stored = getattr(config, "quantization_config", None)
    if not stored:
        return ""
    given: dict[str, Any] = stored if isinstance(stored, dict) else stored.to_dict()
    kind = given.get("quant_method", "unknown")
    name = str(getattr(kind, "value", kind))
    if given.get("load_in_4bit"):
        return f"{name} {given.get('bnb_4bit_quant_type') or '4 bit'}"
    return f"{name} int8" if given.get("load_in_8bit") else name


def arguments(kind: str, dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` is given for --quantization. nf4 is that of QLoRA, with quantised constants."""
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    four = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": four}


def is_quantised(model: Model) -> bool:
    """Whether some of a loaded model's weights are stored in fewer bits."""
    return bool(method(model.config)) or getattr(model, "hf_quantizer", None) is not None


def weight_of(layer: torch.nn.Module) -> torch.Tensor:
    """The weight of a layer of bitsandbytes, as a matrix of floats."""
    from peft.utils.integrations import dequantize_module_weight

    state: Any = getattr(layer.weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):  # rearranged by a forward pass on a CPU
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse, dequantize_4bit

        data: Any = layer.weight.data
        plain, own = _convert_weight_packed_for_cpu_inverse(data.clone(), copy.deepcopy(state))
        weight: torch.Tensor = dequantize_4bit(plain, own)
        return weight
    return dequantize_module_weight(layer)


def dequantised(model: PreTrainedModel) -> tuple[PreTrainedModel, str]:
    """(`model` with its weights in float32, what was dequantised in words). UserError if its method cannot do that."""
    import torch

    how = method(model.config)
    packed = sum(1 for item in model.parameters() if type(item).__name__ in ("Params4bit", "Int8Params"))
    try:
        plain: PreTrainedModel = model.dequantize()
    except Exception as error:  # each method has its own errors
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{model.config.name_or_path}: its {how} weights cannot be dequantised ({reason})") from None
    return plain.to(torch.float32), f"{packed or 'all'} quantised matrices ({how})"  # type: ignore[arg-type]
