"""Checkpoints: a run's training state, the published adapter or model, and their files on disk."""

import contextlib
import copy
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from common import publication
from common.problems import Problems, UserError
from training.model import adapter_state, converted, save_adapter

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from training.trainer import Trainer


SHARDED_STATE = "training_state"  # directory: every rank's share of a sharded run's weights and optimizer


def weights(trainer: "Trainer") -> "dict[str, torch.Tensor]":
    """The trainable parameters on the CPU, by name; of a full model, all of its tensors."""
    named = trainer.model.state_dict() if trainer.full else dict(trainer.model.named_parameters())
    chosen = named if trainer.full else {name: item for name, item in named.items() if item.requires_grad}
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in chosen.items()}


def save(trainer: "Trainer", folder: Path) -> None:
    """Write a checkpoint with the training state, atomically; older training states are deleted."""
    scheduler, scaler = trainer.scheduler.state_dict(), trainer.scaler.state_dict()
    state = {"count": trainer.count, "scheduler": scheduler, "scaler": scaler}
    if trainer.sharded:
        save_sharded(trainer, folder, state)
    elif trainer.world.main:
        more = {"weights": weights(trainer), "optimizer": trainer.optimizer.state_dict()}
        trainer.write_checkpoint(folder, state | more)
    trainer.world.barrier()


def save_sharded(trainer: "Trainer", folder: Path, state: dict[str, Any]) -> None:
    """`save` without the whole model on any rank: the ranks write the layers dealt to them, and their shares of the
    training state."""
    import torch
    from torch.distributed.checkpoint.state_dict_saver import save as save_shares

    world = trainer.world
    with contextlib.ExitStack() as stack:
        new = stack.enter_context(publication.atomic_folder(folder)) if world.main else None
        place = Path(world.broadcast(str(new)))
        mine = own_layers(trainer)
        world.together(lambda: write_part(trainer, place / f"part-{world.rank}", mine))
        save_shares(sharded_state(trainer), checkpoint_id=place / SHARDED_STATE)
        if new:
            join_parts(new)
            trainer.plan.tokenizer.save_pretrained(new)
            torch.save(state | {"weights": {}, "optimizer": {}}, new / "training_state.pt")
        world.barrier()
    if world.main:
        for other in saved_states(trainer.plan.folder):
            if other != folder:
                remove_state(other)


def _model(trainer: "Trainer") -> "PreTrainedModel":
    return cast("PreTrainedModel", trainer.model)


def sharded_state(trainer: "Trainer") -> dict[str, Any]:
    """This rank's shares of the weights and of the optimizer's state."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

    return {
        "weights": get_model_state_dict(trainer.model),
        "optimizer": get_optimizer_state_dict(trainer.model, trainer.optimizer),
    }


def whole_tensors(trainer: "Trainer") -> "Iterator[tuple[str, torch.Tensor]]":
    """(name, tensor) of a sharded model's tensors, one after another, on every rank; tied ones once."""
    named = trainer.model.state_dict()
    for name in saved_names(trainer, named):
        tensor = named[name]
        yield name, (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def saved_names(trainer: "Trainer", named: "Mapping[str, torch.Tensor]") -> list[str]:
    """The tensors that save_pretrained writes: of tied ones, the first."""
    tied = _model(trainer).all_tied_weights_keys or {}
    left_out = _model(trainer)._keys_to_ignore_on_save or ()
    return [name for name in named if tied.get(name) not in named and name not in left_out]


def own_layers(trainer: "Trainer") -> "dict[str, torch.Tensor]":
    """The tensors of the layers dealt to this rank, on the CPU. A layer stays together: its tensors may be renamed or
    joined in the file."""
    turns: dict[str, int] = {}
    mine = {}
    for name, tensor in whole_tensors(trainer):
        layer = re.sub(r"(\.\d+\.).*", r"\1", name)
        if turns.setdefault(layer, len(turns)) % trainer.world.size == trainer.world.rank:
            mine[name] = tensor.to("cpu", copy=True)
    return mine


def write_part(trainer: "Trainer", folder: Path, tensors: "dict[str, torch.Tensor]") -> None:
    """Write some of the model's tensors as save_pretrained names them; rank 0 writes the configuration too."""
    from safetensors.torch import save_file
    from transformers.core_model_loading import revert_weight_conversion

    if trainer.world.main:
        _model(trainer).save_pretrained(folder, state_dict=tensors)
    elif tensors:  # save_pretrained writes on rank 0 only
        folder.mkdir()
        named = revert_weight_conversion(_model(trainer), tensors)
        whole = {name: tensor.contiguous() for name, tensor in named.items()}
        save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})


def join_parts(folder: Path) -> None:
    """Make one model directory of the part-* directories in `folder`."""
    from safetensors import safe_open

    parts = sorted(folder.glob("part-*"), key=lambda part: int(part.name.removeprefix("part-")))
    files = [file for part in parts for file in sorted(part.glob("*.safetensors"))]
    where, size = {}, 0
    for number, file in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors" if len(files) > 1 else "model.safetensors"
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                where[key] = name
        size += file.stat().st_size
        file.rename(folder / name)
    if len(files) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
        publication.write_json(folder / "model.safetensors.index.json", index)
    for file in parts[0].glob("*.json"):
        if not file.name.endswith(".index.json"):
            file.rename(folder / file.name)
    for part in parts:
        shutil.rmtree(part)


def remove_state(folder: Path) -> None:
    """Remove the training state of a checkpoint."""
    (folder / "training_state.pt").unlink()
    shutil.rmtree(folder / SHARDED_STATE, ignore_errors=True)


def publish(trainer: "Trainer", folder: Path, weights: "dict[str, torch.Tensor]") -> None:
    """Write what users load: a PEFT adapter for the original base, or a full model, with the tokenizer."""
    trainer.plan.tokenizer.save_pretrained(folder)
    if trainer.full:
        saved = {name: weights[name] for name in saved_names(trainer, weights)}
        _model(trainer).save_pretrained(folder, state_dict=saved)
        return
    lora, state = copy.deepcopy(trainer.lora_config), adapter_state(trainer.peft_model)
    if trainer.config.peft_type == "pissa":
        state = converted(state, trainer.initial)
        lora.r, lora.lora_alpha = 2 * lora.r, 2 * lora.lora_alpha
        lora.rank_pattern = {name: 2 * rank for name, rank in (lora.rank_pattern or {}).items()}
    save_adapter(folder, state, lora)


def restore(trainer: "Trainer", folder: Path) -> None:
    """Restore the training state in `folder`. UserError if it is damaged or from another run."""
    state = read_state(folder)
    try:
        load_state(trainer, state, folder)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise UserError(
            f"{folder / 'training_state.pt'}: belongs to another run ({reason}); start over without --resume"
        ) from None
    trainer.count = state["count"]
    trainer.after_restore(state)


def load_sharded(trainer: "Trainer", folder: Path) -> None:
    """Load the ranks' shares of a training state. ValueError if they are missing or from another run."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load as load_shares

    shares = sharded_state(trainer)
    try:
        load_shares(shares, checkpoint_id=folder)
    except (CheckpointException, OSError) as error:
        raise ValueError(" ".join(str(error).split())[:200]) from None
    set_model_state_dict(trainer.model, shares["weights"])
    set_optimizer_state_dict(trainer.model, trainer.optimizer, shares["optimizer"])


def load_state(trainer: "Trainer", state: dict[str, Any], folder: Path) -> None:
    """Load the training state of `folder` into the trainer. ValueError, or a torch error, if it is from another run."""
    if trainer.sharded:
        load_sharded(trainer, folder / SHARDED_STATE)
    else:
        named = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
        if not trainer.full and named != set(state["weights"]):
            raise ValueError("another adapter's tensors")
        trainer.model.load_state_dict(state["weights"], strict=trainer.full)
        trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.scheduler.load_state_dict(state["scheduler"])
    trainer.scaler.load_state_dict(state["scaler"])
    if set(state["count"]) != set(trainer.count) or not 0 <= state["count"]["step"] <= trainer.total:
        raise ValueError(f"counters {state['count']}, this run has {trainer.total} steps")


def checkpoints(folder: Path) -> list[Path]:
    """checkpoint-<step> directories of a run, by step."""
    folders = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def saved_states(folder: Path) -> list[Path]:
    """Directories of a run that contain a training state, newest last."""
    folders = [*checkpoints(folder), folder / "interrupted", folder / "private"]
    return [path for path in folders if (path / "training_state.pt").is_file()]


def read_state(folder: Path) -> dict[str, Any]:
    """The training state in `folder`; UserError if it is damaged or something else."""
    import torch

    file, kinds = folder / "training_state.pt", dict.fromkeys(("count", "weights", "optimizer", "scheduler"), dict)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the errors of a damaged pickle have no common class
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise UserError(f"{file}: damaged ({reason}); start over without --resume") from None
    usable = isinstance(state, dict) and all(isinstance(state.get(key), kind) for key, kind in kinds.items())
    if not usable or type(state["count"].get("step")) is not int:
        raise UserError(f"{file}: damaged (not a training state); start over without --resume")
    return cast("dict[str, Any]", state)


def clean(folder: Path, everything: bool) -> None:
    """Remove incomplete files of a killed run; with `everything`, the whole unfinished run."""
    for rest in [*folder.glob(".*.tmp"), *folder.glob(".*.old")]:
        shutil.rmtree(rest) if rest.is_dir() else rest.unlink()
    if everything:
        (folder / "run.json").unlink(missing_ok=True)  # first: without it, the remains are never resumed
        for old in [*checkpoints(folder), folder / "interrupted", folder / "private", folder / "initial_adapter"]:
            shutil.rmtree(old, ignore_errors=True)
        (folder / "metrics.jsonl").unlink(missing_ok=True)


def keep_metrics(file: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl after `step`, and an incomplete last line of a killed run."""
    if not file.is_file():
        return
    whole, newline, _ = file.read_text(encoding="utf-8", errors="replace").rpartition("\n")
    publication.write_jsonl(file, [line for line in metrics_lines(file, whole + newline) if line["step"] <= step])


def metrics_lines(file: Path, text: str) -> list[dict[str, Any]]:
    """The complete lines of a metrics.jsonl; UserError for a damaged one."""
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            lines.append(json.loads(line))
            if not isinstance(lines[-1], dict) or type(lines[-1].get("step")) is not int:
                raise ValueError("no object with a step")
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}:{number}: damaged ({error}); start over without --resume") from None
    return lines


def check_resumable(folder: Path) -> None:
    """UserError if files that --resume reads are damaged; called before a model is loaded or anything is written."""
    problems, file = Problems(), folder / "metrics.jsonl"
    if file.is_file():
        text = file.read_bytes().rpartition(b"\n")[0]  # a kill may have truncated the last line
        try:
            problems.absorb(metrics_lines, file, text.decode())
        except UnicodeDecodeError as error:
            problems.add(f"{file}: damaged ({error}); start over without --resume")
    for states in saved_states(folder)[-1:]:
        problems.absorb(read_state, states)
    secret = folder / "private" / "secret"
    if secret.is_file() and not re.fullmatch(rb"[0-9a-f]{64}", secret.read_bytes()):
        problems.add(f"{secret}: damaged; start over without --resume")
    problems.check()
