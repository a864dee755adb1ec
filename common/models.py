"""Finding a model or an adapter, checking its files before anything is loaded, and loading it."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from common import adapter_files, limits, provenance, quantization, virtual_tokens
from common.cli import QuantizedConfig
from common.json_files import read_json
from common.problems import Problems, UserError

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    Model = PreTrainedModel | PeftModel  # plain, or with an adapter attached

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True)
class ModelRef:
    """A model as named by the user: a full model (`adapter` None) or an adapter directory with its base.

    quantization: what its base is loaded with (--quantization). virtual_tokens: how many an adapter puts before texts.
    """

    name: str
    base: str
    adapter: str | None
    revision: str | None
    quantization: str | None = None
    virtual_tokens: int = 0

    @property
    def unadapted(self) -> ModelRef:
        """Its base alone; texts are cut where the adapted model needs it."""
        return replace(self, name=self.base, adapter=None)

    @property
    def tokenizer_source(self) -> str:
        """Where its tokenizer is: the adapter's directory if it contains one, else the base."""
        if self.adapter and (Path(self.adapter) / "tokenizer_config.json").is_file():
            return self.adapter
        return self.base


def looks_local(name: str) -> bool:
    """True for a name that can only be a path: existing, absolute, dotted, or with more than one slash."""
    return os.path.exists(name) or name.startswith((".", "/", "~")) or name.count("/") > 1


def look_up(
    problems: Problems,
    name: str,
    revision: str | None = None,
    base_model: str | None = None,
    flag: str = "--model",
    is_opt: bool = False,
    quantized: str | None = None,
) -> tuple[ModelRef | None, PreTrainedTokenizerBase | None]:
    """(ModelRef, tokenizer) of a model, None for what has problems. Call it after a script's other checks: if there are
    problems already, it only looks at files, because importing transformers takes seconds."""
    files_only = bool(problems.lines)
    ref = problems.absorb(find_model, name, revision, base_model, flag, is_opt, files_only, quantized)
    return ref, problems.absorb(load_tokenizer, ref, flag) if ref and not files_only else None


def find_model(
    name: str,
    revision: str | None = None,
    base_model: str | None = None,
    flag: str = "--model",
    is_opt: bool = False,
    files_only: bool = False,
    quantized: str | None = None,
) -> ModelRef:
    """Check a model's files without loading weights; UserError says what is missing and what to do.

    files_only: do not let transformers and peft check its configuration. quantized: --quantization.
    """
    path = Path(name).expanduser()
    if path.is_dir() and (path / "adapter_config.json").is_file():
        ref = _find_adapter(path, revision, base_model, flag, is_opt, files_only, quantized)
    else:
        _check_files(name, flag)
        if not files_only:
            check_config(name, revision, flag, quantized)
        ref = ModelRef(str(name), str(path) if path.is_dir() else name, None, revision, quantized)
    provenance.privacy(ref)  # fail early on a malformed privacy.json, not when the results are written
    return ref


def is_adapter(name: str) -> bool:
    """Whether a name is an adapter's directory."""
    return (Path(name).expanduser() / "adapter_config.json").is_file()


def read_config(
    name: str, revision: str | None, flag: str, remedy: str = "check the name and the network"
) -> PreTrainedConfig:
    """The configuration of a model of any kind; UserError if it is missing (then with the remedy) or damaged."""
    from transformers import AutoConfig

    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(name, revision=revision)
    except Exception as error:  # the errors of a damaged config.json have no common class
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if Path(name).expanduser().is_dir():
            raise UserError(f"{flag} {name}: its config.json is damaged ({reason}); copy it again") from None
        raise UserError(f"{flag} {name}: not found locally or on the hub ({reason}); {remedy}") from None
    return config


def check_weights(folder: Path, flag: str) -> None:
    """UserError unless a model directory has complete weights."""
    if not any((folder / file).is_file() for file in WEIGHT_FILES):
        raise UserError(f"{flag} {folder}: config.json but no weights ({WEIGHT_FILES[0]}, …); copy them there")
    for file in sorted(folder.glob("*.safetensors")):
        adapter_files.tensor_shapes(file, "copy it again")


def read_tokenizer(source: str, revision: str | None, whose: str) -> PreTrainedTokenizerBase:
    """A working tokenizer; UserError, starting with `whose`, if its files do not give one."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
        tokenizer("a")
    except Exception as error:  # the errors of damaged files have no common class: tokenizers raises Exception itself
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{whose}: no usable tokenizer in {source} ({reason})") from None
    return tokenizer


def _check_files(name: str, flag: str, remedy: str = "give a model directory or a hub name") -> bool:
    """True, or UserError: what a full model's directory lacks. remedy: what to do if it does not exist."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{flag} {name}: has neither config.json nor adapter_config.json; not a model directory")
        check_weights(path, flag)
    elif looks_local(name):
        raise UserError(f"{flag} {name}: no such directory; {remedy}")
    return True


def check_config(
    name: str,
    revision: str | None,
    flag: str,
    quantized: str | None = None,
    remedy: str = "check the name and the network",
) -> PreTrainedModel:
    """A full model without weights, on the meta device; UserError if its configuration cannot be loaded."""
    config = read_config(name, revision, flag, remedy)
    if isinstance(getattr(config, "dtype", None), int | float | list | dict):
        raise UserError(f"{flag} {name}: its config.json is damaged (dtype); copy it again")
    _check_generation(Path(name).expanduser())
    import torch
    from transformers import AutoModelForCausalLM

    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(f"{flag} {name}: {config.model_type} is not a causal language model")
    quantization.check(quantized, config, f"{flag} {name}")
    for key, rate in config.get_text_config().to_dict().items():
        known = rate is None or (isinstance(rate, int | float) and 0 <= rate <= 1)
        if key.endswith(("dropout", "pdrop")) and not known:
            raise UserError(f"{flag} {name}: {key} in its config.json is {rate!r}, not between 0 and 1; fix it")
    try:
        with torch.device("meta"):  # layers without weights: at most a second for any size
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{flag} {name}: its config.json is not a valid model ({type(error).__name__}: {reason}); copy it again"
        ) from None
    return model


def _check_generation(folder: Path) -> None:
    """UserError if a model directory's generation_config.json cannot be loaded with the model."""
    file, remedy = folder / "generation_config.json", "copy it again, or remove it"
    if not file.is_file():
        return
    for key, value in read_json(file, remedy).items():
        tokens = [token for token in (value if isinstance(value, list) else [value]) if token is not None]
        if key.endswith("_token_id") and not all(type(token) is int and abs(token) < 1 << 63 for token in tokens):
            raise UserError(f"{file}: {key} is not a token id; {remedy}")


def _find_adapter(
    path: Path,
    revision: str | None,
    base_model: str | None,
    flag: str,
    is_opt: bool,
    files_only: bool,
    quantized: str | None,
) -> ModelRef:
    config = read_json(path / "adapter_config.json", "the checkpoint is damaged")
    problems = Problems()
    weights = path / "adapter_model.safetensors"
    if weights.is_file():
        problems.absorb(adapter_files.adapter_shapes, path)
    else:
        problems.add(f"{path}: adapter_config.json without adapter_model.safetensors; the checkpoint is incomplete")
    if "niter" in str(config.get("init_lora_weights")):
        problems.add(
            f"{path}: a raw {config['init_lora_weights']} adapter fits only its own residual base; save it converted"
        )
    if not files_only:
        problems.absorb(adapter_files.check_kind, path, config)
    base = base_model or config.get("base_model_name_or_path") or _guess_base(path, is_opt)
    if not isinstance(base, str | None):
        problems.add(f"{path}: base_model_name_or_path in its adapter_config.json is not text; fix it")
        problems.check()
    architecture = None
    if not base:
        problems.add(f"{path}: its adapter_config.json names no base model; pass --base_model")
    else:
        if not os.path.isabs(base) and looks_local(base) and not os.path.exists(base) and (path / base).exists():
            base = str(path / base)
        wanted = (base_model and "--base_model") or f"{flag} {path}: base model"
        if problems.absorb(_check_files, base, wanted, MOVED_BASE) and not files_only:
            remedy = f"check the name and the network, or {MOVED_BASE}"
            architecture = problems.absorb(check_config, base, revision, wanted, quantized, remedy)
        if base_model and not problems.lines and (record := provenance.training_record(path)):
            recorded, actual = (
                record.get("base_sha256"),
                provenance.weights_sha256(ModelRef(base, base, None, revision)),
            )
            if recorded and actual and recorded != actual:
                problems.add(
                    f"--base_model {base}: not the weights that {path} was trained on (if they were only re-saved, "
                    f"remove base_sha256 from {path.parent / 'run.json'})"
                )
        if architecture and not problems.lines:
            problems.absorb(adapter_files.check_architecture, path, config, architecture)
    problems.check()
    virtual = 0
    if config.get("peft_type") in virtual_tokens.KINDS and not files_only:
        virtual = int(config["num_virtual_tokens"])
    return ModelRef(str(path), str(base), str(path), revision, quantized, virtual)


MOVED_BASE = "pass --base_model, or fix base_model_name_or_path in its adapter_config.json"


def _guess_base(path: Path, is_opt: bool) -> str | None:
    """The hub name found in the path: pythia-* at EleutherAI, or opt-* at facebook with --is_opt."""
    prefix, owner = ("opt-", "facebook") if is_opt else ("pythia-", "EleutherAI")
    for part in reversed(path.absolute().parts):
        if part.startswith(prefix):
            return f"{owner}/{part}"
    return None


def load_tokenizer(ref: ModelRef, flag: str = "--model") -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with EOS as pad token if it has none (padding is always masked).

    UserError if it has no EOS or no fast version, or produces no tokens.
    """
    tokenizer = read_tokenizer(ref.tokenizer_source, ref.revision, f"{flag} {ref.name}")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{flag} {ref.name}: its tokenizer has no EOS token; set eos_token in tokenizer_config.json")
    if not tokenizer.is_fast:
        raise UserError(f"{flag} {ref.name}: its tokenizer has no fast version; add a tokenizer.json")
    if not tokenizer("a").input_ids:  # if the files are missing, transformers makes an empty tokenizer
        raise UserError(f"{flag} {ref.name}: its tokenizer produces no tokens; copy tokenizer.json there")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def resolve_dtype(name: str, device: str) -> torch.dtype:
    """torch dtype of --dtype; auto: float32 on CPU, bfloat16 on a GPU that supports it, else float16."""
    import torch

    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if not str(device).startswith("cuda"):
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def dtype_name(dtype: torch.dtype, model: ModelRef | QuantizedConfig) -> str:
    """What a result line says about the precision: the dtype, and --quantization where there was one."""
    name = str(dtype).removeprefix("torch.")
    return f"{name}, base in {model.quantization}" if model.quantization else name


def load_base(
    ref: ModelRef,
    dtype: torch.dtype,
    device: str,
    device_map: str | None = None,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """The full (base) model of `ref` in eval mode on `device`, or spread by `device_map`."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bar()
    extra: dict[str, Any] = {"attn_implementation": attn_implementation} if attn_implementation else {}
    if ref.quantization:
        extra |= quantization.arguments(ref.quantization, dtype)
    config = read_config(ref.base, ref.revision, "--model")
    packed = bool(ref.quantization or quantization.method(config))
    place: Any = {"": device} if packed and not device_map else device_map  # packed weights are not moved afterwards
    loaded = AutoModelForCausalLM.from_pretrained(
        ref.base, revision=ref.revision, dtype=dtype, device_map=place, **extra
    )
    model: PreTrainedModel = (loaded if place else loaded.to(device)).eval()  # type: ignore[arg-type]
    return model


def context_of(ref: ModelRef, flag: str = "--model") -> int:
    """`context_length` of a model, from its configuration alone."""
    config = read_config(ref.base, ref.revision, flag)
    return limits.context_length(SimpleNamespace(config=config, virtual_tokens=ref.virtual_tokens))


def vocabulary_of(ref: ModelRef, flag: str = "--model") -> int:
    """The embeddings of a model's base, from its configuration alone."""
    return int(read_config(ref.base, ref.revision, flag).get_text_config().vocab_size)
