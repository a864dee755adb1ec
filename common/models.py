"""Tokenizers, base models, adapters, and merging that can be undone bit for bit."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from common import quantization, records, sharding, virtual_tokens
from common.cli import AnyPath, Problems, QuantizedConfig, UserError
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
            _check_config(name, revision, flag, quantized)
        ref = ModelRef(str(name), str(path) if path.is_dir() else name, None, revision, quantized)
    privacy(ref)  # fail early on a malformed privacy.json, not when the results are written
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


def _check_config(
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


def _check_kind(path: Path, config: dict[str, Any]) -> None:
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


WRAPPERS = re.compile(r"\.(modules_to_save|token_adapter|base_layer)(?=\.)")  # what peft puts around a base's module


def plain_name(tensor: str) -> str:
    """The name that an adapter's tensor has in the base, if it replaces one of the base's."""
    return WRAPPERS.sub("", tensor.removeprefix("base_model.model."))


def new_vocabulary(path: AnyPath, model: PreTrainedModel) -> int | None:
    """The rows of the embeddings that an adapter brings, if they are more or fewer than the base's. UserError if it
    does not bring all that a base of that size needs."""
    modules = dict(model.named_modules())
    ends = {"embeddings": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    names = {f"{name}.weight": end for name, module in modules.items() for end, one in ends.items() if module is one}
    rows: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor, shape in adapter_shapes(path).items():
        if ".lora_" not in tensor:
            shapes |= {plain_name(tensor): shape, tensor.removeprefix("base_model."): shape}
    for name, end in names.items():
        wanted = tuple(cast("torch.Tensor", cast("torch.nn.Module", ends[end]).weight).shape)
        found = shapes.get(name, wanted)
        if found[1:] != wanted[1:]:
            raise UserError(f"{path}: does not fit this base model: its {name} is {list(found)}, not {list(wanted)}")
        rows[name] = found[0]
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
    architecture = None
    if not base:
        problems.add(f"{path}: its adapter_config.json names no base model; pass --base_model")
    else:
        if not os.path.isabs(base) and looks_local(base) and not os.path.exists(base) and (path / base).exists():
            base = str(path / base)
        wanted = (base_model and "--base_model") or f"{flag} {path}: base model"
        if problems.absorb(_check_files, base, wanted, MOVED_BASE) and not files_only:
            remedy = f"check the name and the network, or {MOVED_BASE}"
            architecture = problems.absorb(_check_config, base, revision, wanted, quantized, remedy)
        if base_model and not problems.lines and (record := training_record(path)):
            recorded, actual = record.get("base_sha256"), weights_sha256(ModelRef(base, base, None, revision))
            if recorded and actual and recorded != actual:
                problems.add(
                    f"--base_model {base}: not the weights that {path} was trained on (if they were only re-saved, "
                    f"remove base_sha256 from {path.parent / 'run.json'})"
                )
        if architecture and not problems.lines:
            problems.absorb(_check_architecture, path, config, architecture)
    problems.check()
    virtual = 0
    if config.get("peft_type") in virtual_tokens.KINDS and not files_only:
        virtual = int(config["num_virtual_tokens"])
    return ModelRef(str(path), str(base), str(path), revision, quantized, virtual)


def _check_architecture(path: Path, config: dict[str, Any], model: PreTrainedModel) -> None:
    """UserError if the adapter does not fit its base, which has no weights yet."""
    rows = new_vocabulary(path, model)
    if config["peft_type"] not in virtual_tokens.KINDS:
        check_fit(model, path, rows)
        return
    kinds = {rope["rope_type"] for rope in _rope(model.config.get_text_config())} & {"dynamic", "longrope"}
    if kinds:
        raise UserError(f"{path}: virtual tokens before a text with a {kinds.pop()} rotary embedding; not supported")
    width = cast("torch.Tensor", model.get_input_embeddings().weight).shape[1]
    shape = adapter_shapes(path).get("prompt_embeddings", (0, width))
    if config["peft_type"] not in virtual_tokens.IN_THE_CACHE and shape[1] != width:
        raise UserError(f"{path}: does not fit this base model: its prompts have width {shape[1]}, the base {width}")
    n = context_length(model)
    if config["num_virtual_tokens"] >= n - 1:
        raise UserError(f"{path}: {config['num_virtual_tokens']} virtual tokens leave no room in a context of {n}")


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


REASONS = (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError, ImportError, AssertionError)


def _why(error: Exception) -> str:
    """An error of peft's in one line; a lack of memory is raised again."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        raise error
    return " ".join(str(error).split())[:300] or type(error).__name__


def attach(model: PreTrainedModel, adapter: AnyPath) -> PeftModel:
    """`model` with the adapter attached (not merged), in eval mode; UserError if it does not fit."""
    from peft import PeftModel, get_peft_model_state_dict

    kind = read_json(Path(adapter) / "adapter_config.json", "the checkpoint is damaged").get("peft_type")
    shapes = adapter_shapes(adapter)
    if kind not in virtual_tokens.KINDS:
        check_fit(model, adapter)
    modules = dict(model.named_modules())
    try:
        with without_peft_warning():
            attached: PeftModel = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=True).eval()
    except REASONS as error:
        raise UserError(f"{adapter}: peft cannot attach it to this base model ({_why(error)})") from None
    if kind == "LORA":
        named = {module_of(name, modules) for name in shapes if ".lora_A" in name}
        created = {module_of(name, modules) for name, _ in attached.named_parameters() if ".lora_A" in name}
    else:
        state = set(get_peft_model_state_dict(attached, save_embedding_layers=False))
        named, created = set(shapes), state
        base = attached.get_base_model()
        own = {WRAPPERS.sub("", name) for name, _ in base.named_parameters(remove_duplicate=False)}
        others = [name for name in named - state if not {plain_name(name), name.removeprefix("base_model.")} & own]
        if unused := sorted(others):
            raise UserError(f"{adapter}: does not fit this base model: it has no module for {unused[0]}")
    if created - named:  # e.g. trained on a shallower model: these matrices would keep their random initialisation
        raise UserError(f"{adapter}: does not fit this base model: it has nothing for {min(created - named)}")
    return attached


@contextlib.contextmanager
def without_peft_warning() -> Iterator[None]:
    """Silence a warning: peft 0.21 reads an attribute deprecated in transformers 5 whenever it attaches an adapter."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


class _Kept:
    """What attaching, merging or resizing may change in a base, to undo it bit for bit."""

    def __init__(self, model: PreTrainedModel, adapter: AnyPath) -> None:
        self.model, self.modules = model, dict(model.named_modules())
        spread = {id(item) for layer in sharding.layers_of(model) for item in layer.parameters}
        names = {module_of(tensor, self.modules) for tensor in adapter_shapes(adapter)} - {""}
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
        if rows := new_vocabulary(adapter, self.model):
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
    shared = tied(model, {module_of(tensor, modules) for tensor in adapter_shapes(adapter) if ".lora_" in tensor})
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


KEPT_ATTACHED = ("lora_bias", "trainable_token_indices", "target_parameters")  # of a LoraConfig


def check_mergeable(ref: ModelRef) -> None:
    """UserError if what an adapter does cannot be folded into its base's weights; no weights are loaded."""
    config = read_json(Path(ref.adapter or ref.base) / "adapter_config.json", "the checkpoint is damaged")
    if ref.virtual_tokens:
        raise UserError(cannot_merge(ref.name, config))
    model = _check_config(ref.base, ref.revision, "--model", ref.quantization)
    modules = dict(model.named_modules())
    changed = {module_of(tensor, modules) for tensor in adapter_shapes(ref.adapter or "") if ".lora_" in tensor}
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


def _check_merged(found: torch.Tensor, wanted: torch.Tensor, adapter: AnyPath) -> None:
    """UserError unless a merged model gives the attached one's logits."""
    error = float((found.float() - wanted.float()).abs().max() / wanted.float().std().clamp(min=1e-6))
    if not error < MERGED_SLACK:
        raise UserError(
            f"{adapter}: merged, it is not what it is attached (logits off by {error:.2g} standard deviations); "
            "measure it attached"
        )


def untie_if_different(model: Model) -> None:
    """Where only one of two tied matrices was trained (`modules_to_save`), the configuration must not tie them."""
    config = model.config.get_text_config()
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    if getattr(config, "tie_word_embeddings", False) and None not in ends and ends[0].weight is not ends[1].weight:
        for one in (config, model.config):
            one.tie_word_embeddings = False


MERGED_SLACK = 0.02  # standard deviations of the logits; float32 is off by less than 1e-4, experts chosen anew by more


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


def tied(model: torch.nn.Module, names: Iterable[str]) -> list[str]:
    """Those of the modules whose weight is shared with another module (e.g. output head and embeddings)."""
    owners: dict[int, set[str]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), set()).add(name)
    return sorted(name for sharing in owners.values() if len(sharing) > 1 for name in sharing & set(names))


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
    """Number of positions for a text in a model (or a namespace with its `config`); 2³⁰ if unlimited.

    An adapter's virtual tokens take the first of them (a namespace has their number as `virtual_tokens`).
    """
    config = model.config
    n = getattr(config, "max_position_embeddings", 0) or getattr(config, "n_positions", 0) or 1 << 30
    return int(n) - virtual_tokens.count(model)


def context_of(ref: ModelRef, flag: str = "--model") -> int:
    """`context_length` of a model, from its configuration alone."""
    config = read_config(ref.base, ref.revision, flag)
    return context_length(SimpleNamespace(config=config, virtual_tokens=ref.virtual_tokens))


def vocabulary_of(ref: ModelRef, flag: str = "--model") -> int:
    """The embeddings of a model's base, from its configuration alone."""
    return int(read_config(ref.base, ref.revision, flag).get_text_config().vocab_size)


ADDED = "_added_by_the_adapter"


def adapter_parameters(model: Model) -> list[torch.nn.Parameter]:
    """Those of the adapter that `adapted` has attached to a model."""
    if virtual := virtual_tokens.of(model):
        return virtual.parameters
    added: list[torch.nn.Parameter] = model.__dict__.get(ADDED, [])
    return added


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a prompt, without the EOS that some tokenizers append, which would end the text."""
    return without_end(tokenizer, encode_texts(tokenizer, [text])[0])
