"""Tokenizers, base models, adapters, and merging that can be undone bit for bit."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from common import records
from common.cli import AnyPath, Problems, UserError
from common.results import read_json, sha256

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
PRIVACY_FILE = "privacy.json"
HARDLY = 1e-4  # ‖ΔW‖/‖W‖ below which a model behaves like its base


@dataclass(frozen=True)
class ModelRef:
    """A model as named by the user: a full model (`adapter` None) or an adapter directory with its base."""

    name: str
    base: str
    adapter: str | None
    revision: str | None

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
) -> tuple[ModelRef | None, PreTrainedTokenizerBase | None]:
    """(ModelRef, tokenizer) of a model, None for what has problems. Call it after a script's other checks: if there are
    problems already, it only looks at files, because importing transformers takes seconds."""
    files_only = bool(problems.lines)
    ref = problems.absorb(find_model, name, revision, base_model, flag, is_opt, files_only)
    return ref, problems.absorb(load_tokenizer, ref, flag) if ref and not files_only else None


def find_model(
    name: str,
    revision: str | None = None,
    base_model: str | None = None,
    flag: str = "--model",
    is_opt: bool = False,
    files_only: bool = False,
) -> ModelRef:
    """Check a model's files without loading weights; UserError says what is missing and what to do.

    files_only: do not let transformers and peft check its configuration.
    """
    path = Path(name).expanduser()
    if path.is_dir() and (path / "adapter_config.json").is_file():
        ref = _find_adapter(path, revision, base_model, flag, is_opt, files_only)
    else:
        _check_files(name, flag)
        if not files_only:
            _check_config(name, revision, flag)
        ref = ModelRef(str(name), str(path) if path.is_dir() else name, None, revision)
    privacy(ref)  # fail early on a malformed privacy.json, not when the results are written
    return ref


def read_config(name: str, revision: str | None, flag: str) -> PreTrainedConfig:
    """The configuration of a model of any kind; UserError if it is missing or damaged."""
    from transformers import AutoConfig

    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(name, revision=revision)
    except Exception as error:  # the errors of a damaged config.json have no common class
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if Path(name).expanduser().is_dir():
            raise UserError(f"{flag} {name}: its config.json is damaged ({reason}); copy it again") from None
        raise UserError(
            f"{flag} {name}: not found locally or on the hub ({reason}); check the name and the network"
        ) from None
    return config


def check_weights(folder: Path, flag: str) -> None:
    """UserError unless a model directory has complete weights."""
    if not any((folder / file).is_file() for file in WEIGHT_FILES):
        raise UserError(f"{flag} {folder}: config.json but no weights ({WEIGHT_FILES[0]}, …); copy them there")
    for file in sorted(folder.glob("*.safetensors")):
        tensor_shapes(file, "copy it again")


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


def _check_config(name: str, revision: str | None, flag: str) -> PreTrainedConfig:
    """A full model's configuration; UserError if it cannot be loaded with it."""
    config = read_config(name, revision, flag)
    if isinstance(getattr(config, "dtype", None), int | float | list | dict):
        raise UserError(f"{flag} {name}: its config.json is damaged (dtype); copy it again")
    _check_generation(Path(name).expanduser())
    import torch
    from transformers import AutoModelForCausalLM

    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(f"{flag} {name}: {config.model_type} is not a causal language model")
    quantization = getattr(config, "quantization_config", None) or {}
    method = str(quantization.get("quant_method", "") if isinstance(quantization, dict) else "")
    package = "bitsandbytes" if "bitsandbytes" in method or "bnb" in method else None
    if package and importlib.util.find_spec(package) is None:
        raise UserError(f"{flag} {name}: is quantised with {package}, which is not installed; pip install {package}")
    for key, rate in config.get_text_config().to_dict().items():
        known = rate is None or (isinstance(rate, int | float) and 0 <= rate <= 1)
        if key.endswith(("dropout", "pdrop")) and not known:
            raise UserError(f"{flag} {name}: {key} in its config.json is {rate!r}, not between 0 and 1; fix it")
    try:
        with torch.device("meta"):  # layers without weights: at most a second for any size
            AutoModelForCausalLM.from_config(config)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{flag} {name}: its config.json is not a valid model ({type(error).__name__}: {reason}); copy it again"
        ) from None
    return config


def _check_generation(folder: Path) -> None:
    """UserError if a model directory's generation_config.json cannot be loaded with the model."""
    file, remedy = folder / "generation_config.json", "copy it again, or remove it"
    if not file.is_file():
        return
    for key, value in read_json(file, remedy).items():
        tokens = [token for token in (value if isinstance(value, list) else [value]) if token is not None]
        if key.endswith("_token_id") and not all(type(token) is int and abs(token) < 1 << 63 for token in tokens):
            raise UserError(f"{file}: {key} is not a token id; {remedy}")


# peft features beyond low-rank matrices of whole layers, which are not supported.
OTHER_THAN_LAYERS = {
    "trainable_token_indices": "trains the embeddings of single tokens",
    "lora_bias": "has a bias in its low-rank matrices",
    "alora_invocation_tokens": "works only after its invocation tokens (aLoRA)",
    "layer_replication": "repeats layers of its base",
    "megatron_config": "needs Megatron's parallel layers",  # peft would import what megatron_core names
}
ENDLESS = re.compile(r"\([^()]*[+*}][^()]*\)[+*{]")  # a repeated group with a repetition in it


def _check_kind(path: Path, config: dict[str, Any]) -> None:
    """UserError for an unsupported kind of adapter, before anything is loaded."""
    from peft import PeftType

    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in PeftType.__members__:
        raise UserError(f"{path}: peft_type {kind!r} is unknown to the installed peft")
    prompts = ("PROMPT", "P_TUNING", "PREFIX", "CPT", "CARTRIDGE")
    if any(word in kind for word in prompts):
        raise UserError(f"{path}: {kind} prepends tokens and changes no weights; not supported")
    for key, words in OTHER_THAN_LAYERS.items():
        if config.get(key):
            raise UserError(f"{path}: {words} ({key}); not supported: merge it with peft and pass the merged model")
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


def _check_embeddings(path: Path, base: str, architecture: PreTrainedConfig) -> None:
    """UserError if the adapter has embeddings or an output head of a different size than the base."""
    vocabulary = architecture.get_text_config().vocab_size
    folder = Path(base).expanduser()
    known: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        known |= tensor_shapes(file, "copy it again")
    for tensor, shape in adapter_shapes(path).items():
        name = tensor.removeprefix("base_model.model.").replace(".modules_to_save", "").replace(".base_layer", "")
        if ".lora_" in name or len(shape) != 2 or not name.endswith(".weight"):
            continue
        wanted = known.get(name) or ((vocabulary, shape[1]) if re.search(r"(embed|wte|lm_head|head)", name) else shape)
        if wanted != shape:
            raise UserError(
                f"{path}: its {name} is {list(shape)} (resized embeddings), the base has {list(wanted)}; resize the "
                "base as in training, merge the adapter with peft, and pass the merged model"
            )


def _find_adapter(
    path: Path, revision: str | None, base_model: str | None, flag: str, is_opt: bool, files_only: bool
) -> ModelRef:
    config = read_json(path / "adapter_config.json", "the checkpoint is damaged")
    problems = Problems()
    weights = path / "adapter_model.safetensors"
    if weights.is_file():
        problems.absorb(adapter_shapes, path)
    else:
        problems.add(f"{path}: adapter_config.json without adapter_model.safetensors; the checkpoint is incomplete")
    if "niter" in str(config.get("init_lora_weights")):
        problems.add(
            f"{path}: a raw {config['init_lora_weights']} adapter fits only its own residual base; save it converted"
        )
    if not files_only:
        problems.absorb(_check_kind, path, config)
    base = base_model or config.get("base_model_name_or_path") or _guess_base(path, is_opt)
    if not isinstance(base, str | None):
        problems.add(f"{path}: base_model_name_or_path in its adapter_config.json is not text; fix it")
        problems.check()
    if not base:
        problems.add(f"{path}: its adapter_config.json names no base model; pass --base_model")
    else:
        if not os.path.isabs(base) and looks_local(base) and not os.path.exists(base) and (path / base).exists():
            base = str(path / base)
        wanted = (base_model and "--base_model") or f"{flag} {path}: base model"
        if problems.absorb(_check_files, base, wanted, MOVED_BASE) and not files_only:
            architecture = problems.absorb(_check_config, base, revision, wanted)
            if architecture and not problems.lines:
                problems.absorb(_check_embeddings, path, base, architecture)
        if base_model and not problems.lines and (record := training_record(path)):
            recorded, actual = record.get("base_sha256"), weights_sha256(ModelRef(base, base, None, revision))
            if recorded and actual and recorded != actual:
                problems.add(
                    f"--base_model {base}: not the weights that {path} was trained on (if they were only re-saved, "
                    f"remove base_sha256 from {path.parent / 'run.json'})"
                )
    problems.check()
    return ModelRef(str(path), str(base), str(path), revision)


MOVED_BASE = "pass --base_model, or fix base_model_name_or_path in its adapter_config.json"


def _guess_base(path: Path, is_opt: bool) -> str | None:
    """The hub name found in the path: pythia-* at EleutherAI, or opt-* at facebook with --is_opt."""
    prefix, owner = ("opt-", "facebook") if is_opt else ("pythia-", "EleutherAI")
    for part in reversed(path.absolute().parts):
        if part.startswith(prefix):
            return f"{owner}/{part}"
    return None


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


def weights_sha256(ref: ModelRef) -> str | None:
    """SHA-256 of a model's weights: of an adapter's file, of a full model's only file, or over the files' hashes.

    None for a hub name.
    """
    folder = Path(ref.adapter or ref.base)
    if not folder.is_dir():
        return None
    pattern = "adapter_model.safetensors" if ref.adapter else "*.safetensors"
    hashes = [sha256(file) for file in sorted(folder.glob(pattern)) or sorted(folder.glob("*.bin"))]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def privacy(ref: ModelRef) -> dict[str, Any] | None:
    """The privacy budget a model's training spent: the privacy.json that run_peft.py --dp writes beside it, or None.

    UserError if it is broken.
    """
    file = Path(ref.adapter or ref.base) / PRIVACY_FILE
    if not file.is_file():
        return None
    remedy = "restore it; the budget spent is also in the training's run.json"
    block = read_json(file, remedy)
    records.check(block, records.Spent, file, remedy)
    return block


def training_record(checkpoint: AnyPath) -> dict[str, Any] | None:
    """The run.json that run_peft.py writes beside a checkpoint; None without one, UserError if it is broken."""
    file = Path(checkpoint).absolute().parent / "run.json"
    if not file.is_file():
        return None
    record = read_json(file, "remove it if it is lost")
    records.check(record, records.RunRecord, file, "remove it if it is lost")
    return record


def hardly_moved(change: object) -> str | None:
    """The warning about a model whose ‖ΔW‖/‖W‖ is tiny; None for others (and for None)."""
    if not isinstance(change, int | float) or change >= HARDLY:
        return None
    return f"the model has hardly moved: ‖ΔW‖/‖W‖ {change:.2g} is below {HARDLY:g}"


def say_if_hardly_moved(ref: ModelRef, change: float | None = None) -> None:
    """Print that warning next to a model's numbers. `change`: ‖ΔW‖/‖W‖; None: as recorded at the end of training."""
    if change is None and (ref.adapter or Path(ref.base).is_dir()):
        with contextlib.suppress(UserError):  # a broken run.json is reported by those who need it
            change = (training_record(ref.adapter or ref.base) or {}).get("relative_change")
    if note := hardly_moved(change):
        print(f"{ref.name}: {note}; its results are those of the base")


def without_end(tokenizer: PreTrainedTokenizerBase, ids: list[int], least: int = 1) -> list[int]:
    """`ids` without the EOS that some tokenizers append to a text; keeps at least the first `least` of them."""
    end = len(ids)
    while end > least and ids[end - 1] == tokenizer.eos_token_id:
        end -= 1
    return ids[:end]


def extra_start(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> int:
    """Leading tokens to drop: 1 if the tokenizer added BOS to a text that already starts with it, else 0."""
    start = tokenizer.bos_token_id
    if start is None or list(ids[:2]) != [start, start]:
        return 0
    own = tokenizer("a").input_ids
    return int(own[:1] == [start] and own[:2] != [start, start])


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str], whole: bool = False) -> list[list[int]]:
    """Token ids of each text as the tokenizer gives them, but with one BOS where it would give two.

    whole: the texts already contain all special tokens (a chat template wrote them).
    """
    encoded = tokenizer(texts, add_special_tokens=not whole, verbose=False).input_ids if texts else []
    return [ids[extra_start(tokenizer, ids) :] for ids in encoded]


def special_tokens_in(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> dict[str, int]:
    """{special token: number of texts that contain it literally}, not counting one BOS at the start of a text.

    The tokenizer turns such characters into the token itself: a typed '<|endoftext|>' ends the text for the model.
    """
    special = set(tokenizer.all_special_tokens)
    special |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    start = tokenizer.bos_token
    found: dict[str, int] = {}
    pattern = re.compile("|".join(map(re.escape, sorted(filter(None, special), key=len, reverse=True))) or r"(?!)")
    for text in texts:
        for token in set(pattern.findall(text.removeprefix(start) if start else text)):
            found[token] = found.get(token, 0) + 1
    return dict(sorted(found.items()))


def bos_note(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> str | None:
    """One line if texts start with the BOS that the tokenizer adds itself; it is then used once (`extra_start`)."""
    start = tokenizer.bos_token
    if not start or tokenizer("a").input_ids[:1] != [tokenizer.bos_token_id]:
        return None
    n = sum(text.startswith(start) for text in texts)
    return f"{n} texts start with {start}, which the tokenizer adds too: it is used once" if n else None


def special_tokens_note(found: dict[str, int]) -> str:
    """One line summarising `special_tokens_in`."""
    counts = ", ".join(f"{token} in {n}" for token, n in found.items())
    return f"special tokens typed in the texts are encoded as special tokens: {counts}"


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
    extra = {"attn_implementation": attn_implementation} if attn_implementation else {}
    loaded = AutoModelForCausalLM.from_pretrained(
        ref.base, revision=ref.revision, dtype=dtype, device_map=device_map, **extra
    )
    model: PreTrainedModel = (loaded if device_map else loaded.to(device)).eval()  # type: ignore[arg-type]
    return model


def module_of(tensor: str) -> str:
    """Base module that an adapter tensor belongs to: 'base_model.model.a.b.lora_A.weight' → 'a.b'."""
    name = tensor.removeprefix("base_model.model.")
    name = name.split(".lora_")[0] if ".lora_" in name else name.rsplit(".", 1)[0]
    while name.endswith(".base_layer"):  # peft stacks several wrappers around one module of experts
        name = name.removesuffix(".base_layer")
    return name


READ_DIRECTLY = (
    "dt_proj",
)  # state-space models read this layer's weight directly: an attached adapter has no effect, a merged one does


def check_fit(model: torch.nn.Module, adapter: AnyPath) -> None:
    """UserError naming the first adapter tensor that has no module, or a different shape, in `model`."""
    modules = dict(model.named_modules())
    for tensor, shape in adapter_shapes(adapter).items():
        module = modules.get(module_of(tensor))
        if ".lora_" in tensor and (name := module_of(tensor).rsplit(".", 1)[-1]) in READ_DIRECTLY:
            raise UserError(
                f"{adapter}: the model reads the weight of {name} directly, bypassing the adapter; not supported"
            )
        if module is not None and any(item.dim() == 3 for item in module.parameters(recurse=False)):
            continue  # experts in one parameter: peft checks the shapes on loading
        weight = getattr(module, "weight", None)
        if weight is None:
            raise UserError(f"{adapter}: does not fit this base model: it has no module for {tensor}")
        # Conv1D (GPT-2) stores its weight transposed
        n_in, n_out = weight.shape[-1], weight.shape[0]
        if type(module).__name__ == "Conv1D":
            n_in, n_out = n_out, n_in
        wanted: tuple[int, ...]
        if ".lora_A" in tensor:
            wanted = (shape[0], n_in)
        elif ".lora_B" in tensor:
            wanted = (n_out, shape[1])
        elif "lora_magnitude" in tensor:
            wanted = (n_out,)
        else:
            continue
        if shape != wanted:
            raise UserError(
                f"{adapter}: does not fit this base model: {tensor} is {list(shape)}, the base needs {list(wanted)}"
            )


def attach(model: PreTrainedModel, adapter: AnyPath) -> PeftModel:
    """`model` with the adapter attached (not merged), in eval mode; UserError if it does not fit."""
    from peft import PeftModel

    check_fit(model, adapter)
    try:
        with without_peft_warning():
            attached: PeftModel = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=True).eval()
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError, ImportError) as error:
        import torch

        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{adapter}: peft cannot attach it to this base model ({reason})") from None
    named = {module_of(name) for name in adapter_shapes(adapter) if ".lora_A" in name}
    created = {module_of(name) for name, _ in attached.named_parameters() if ".lora_A" in name}
    if created - named:  # e.g. trained on a shallower model: these matrices would keep their random initialisation
        raise UserError(f"{adapter}: does not fit this base model: it has nothing for {min(created - named)}")
    return attached


@contextlib.contextmanager
def without_peft_warning() -> Iterator[None]:
    """Silence a warning: peft 0.21 reads an attribute deprecated in transformers 5 whenever it attaches an adapter."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


@contextlib.contextmanager
def adapted(
    model: PreTrainedModel, adapter: AnyPath | None, merge: bool | None = None
) -> Iterator[tuple[Model, float | None]]:
    """Yields (model with the adapter applied, ‖ΔW‖/‖W‖ or None). Afterwards `model` is bit for bit as before.

    merge: fold the adapter into the weights. None: only if they are float32 (half precision would round away most of
    a small update) and no adapted weight is tied to another module's (a merge would change that one too); True:
    UserError for tied weights. ‖·‖ is the Frobenius norm over all adapted matrices; None if not merged.
    """
    import torch

    if adapter is None:
        yield model, None
        return
    names = sorted({module_of(tensor) for tensor in adapter_shapes(adapter)})
    shared = tied(model, {module_of(tensor) for tensor in adapter_shapes(adapter) if ".lora_" in tensor})
    if merge and shared:
        raise UserError(
            f"{adapter}: adapts {', '.join(shared)}, whose weight is tied to another module's: merging would change "
            "both; measure it attached, or untie the base before training"
        )
    if merge is None:
        merge = next(model.parameters()).dtype == torch.float32 and not shared
    with torch.no_grad():
        check_fit(model, adapter)
        originals = {name: model.get_submodule(name) for name in names}
        saved = {
            name: {key: item.detach().to("cpu", copy=True) for key, item in module.named_parameters(recurse=False)}
            for name, module in originals.items()
        }
        try:
            peft_model = attach(model, adapter)
            if merge:
                peft_model.merge_and_unload(safe_merge=True)
                yield model, relative_change(model, saved)
            else:
                yield peft_model, None
                peft_model.unload()
        finally:
            for name, module in originals.items():
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, module)
                for key, item in module.named_parameters(recurse=False):
                    item.copy_(saved[name][key])
            if hasattr(model, "peft_config"):
                del model.peft_config
            model._hf_peft_config_loaded = False


def tied(model: torch.nn.Module, names: Iterable[str]) -> list[str]:
    """Those of the modules whose weight is shared with another module (e.g. output head and embeddings)."""
    owners: dict[int, set[str]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(weight.data_ptr(), set()).add(name)
    return sorted(name for sharing in owners.values() if len(sharing) > 1 for name in sharing & set(names))


def relative_change(model: torch.nn.Module, before: dict[str, dict[str, torch.Tensor]]) -> float:
    """‖W' − W‖ / ‖W‖ over the matrices in `before` (module name → its parameters before the merge)."""
    change = total = 0.0
    for name, parameters in before.items():
        for key, weight in parameters.items():
            if weight.dim() < 2:
                continue
            weight, now = weight.double(), getattr(model.get_submodule(name), key).detach().to("cpu").double()
            change += (now - weight).square().sum().item()
            total += weight.square().sum().item()
    return float((change / total) ** 0.5)


def _rope(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The rotary parameters of a configuration: one dict, or one per layer type."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return [block for block in ([rope] if "rope_type" in rope else rope.values()) if isinstance(block, dict)]


def rope_limit(config: PreTrainedConfig) -> int | None:
    """Tokens beyond which a longrope model changes the rotary embedding of the whole sequence (Ding et al. 2024,
    arXiv:2402.13753); None for other models. Sequences on either side of it cannot share a padded batch."""
    config = config.get_text_config()
    for rope in _rope(config):
        if rope["rope_type"] == "longrope":
            key = "original_max_position_embeddings"
            limit: int = rope.get(key) or getattr(config, key, None) or config.max_position_embeddings
            return limit
    return None


def check_rope(config: PreTrainedConfig, longest: int) -> None:
    """UserError if a sequence is so long that the model's rotary frequencies depend on earlier inputs (rope_type
    "dynamic": they are rescaled for the longest sequence so far, and stay so)."""
    config = config.get_text_config()
    for rope in _rope(config):
        limit = rope.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", None)
        limit = longest if limit is None else limit
        if rope["rope_type"] == "dynamic" and longest > limit:
            raise UserError(
                f"{config.name_or_path or config.model_type}: with its dynamic rotary embedding, the output for a text "
                f"of {longest} tokens depends on earlier texts; use at most {limit} tokens"
            )


def attention_window(config: PreTrainedConfig) -> int | None:
    """Attention span of the narrowest layer (sliding window, local attention, chunk); None if unlimited."""
    config = config.get_text_config()
    if getattr(config, "use_sliding_window", True) is False:
        return None
    names = ["sliding_window", "attention_window_size", "attention_chunk_size"]
    names += ["window_size"] if config.model_type == "gpt_neo" else []
    sizes = [getattr(config, name, None) for name in names]
    return min((size for size in sizes if isinstance(size, int)), default=None)


def beyond_plain_attention(config: PreTrainedConfig, longest: int) -> str | None:
    """Why plain causal attention is not enough for a sequence of `longest` tokens; None if it is."""
    check_rope(config, longest)
    window, limit = attention_window(config), rope_limit(config)
    if window is not None and longest > window:
        return f"a window of {window} tokens"
    if limit is not None and longest > limit:
        return f"a different rotary embedding beyond {limit} tokens"
    return None


def embedding_weight(model: Model) -> torch.Tensor:
    """The weight [V, hidden size] of a model's input embeddings."""
    return cast("torch.Tensor", model.get_input_embeddings().weight)


def without_adapter(model: Model) -> PreTrainedModel:
    """The model under an attached adapter, or `model` itself."""
    wrapped: Any = model
    base: PreTrainedModel = wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped
    return base


def check_tokens(model: Model, sequences: Iterable[Sequence[int]]) -> None:
    """UserError if a token of the (non-empty) sequences is outside the model's vocabulary."""
    n, largest = embedding_weight(model).shape[0], max(map(max, sequences), default=0)
    if largest >= n:
        name = model.config.name_or_path or "the model"
        raise UserError(f"{name}: its tokenizer gives token {largest}, but the model has only {n} embeddings")


def context_length(model: Model | SimpleNamespace) -> int:
    """Number of positions of a model (or of a namespace with its `config`); 2³⁰ if unlimited."""
    return int(
        getattr(model.config, "max_position_embeddings", 0) or getattr(model.config, "n_positions", 0) or 1 << 30
    )


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a prompt, without the EOS that some tokenizers append, which would end the text."""
    return without_end(tokenizer, encode_texts(tokenizer, [text])[0])
