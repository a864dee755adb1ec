"""Checkpoints: a run's training state, the published adapter or model, and their files on disk."""

import copy
import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from common import results
from common.cli import Problems, UserError
from training.model import adapter_state, converted, save_adapter

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from training.trainer import Trainer


def weights(trainer: "Trainer") -> "dict[str, torch.Tensor]":
    """The unsharded trainable parameters on the CPU, by name (if sharded: empty on ranks other than 0)."""
    if trainer.sharded:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return cast("dict[str, torch.Tensor]", get_model_state_dict(trainer.model, options=options))
    named = trainer.model.state_dict() if trainer.full else dict(trainer.model.named_parameters())
    chosen = named if trainer.full else {name: item for name, item in named.items() if item.requires_grad}
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in chosen.items()}


def optimizer_state(trainer: "Trainer") -> dict[str, Any]:
    """The optimizer's unsharded state_dict (if sharded: empty on ranks other than 0)."""
    if trainer.sharded:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_optimizer_state_dict(trainer.model, trainer.optimizer, options=options)
    return trainer.optimizer.state_dict()


def save(trainer: "Trainer", folder: Path) -> None:
    """Write a checkpoint with the training state, atomically; older training states are deleted."""
    state = {"count": trainer.count, "weights": weights(trainer), "optimizer": optimizer_state(trainer)}
    if trainer.world.main:
        scheduler, scaler = trainer.scheduler.state_dict(), trainer.scaler.state_dict()
        trainer.write_checkpoint(folder, state | {"scheduler": scheduler, "scaler": scaler})
    trainer.world.barrier()


def publish(trainer: "Trainer", folder: Path, weights: "dict[str, torch.Tensor]") -> None:
    """Write what users load: a PEFT adapter for the original base, or a full model, with the tokenizer."""
    trainer.plan.tokenizer.save_pretrained(folder)
    if trainer.full:
        cast("PreTrainedModel", trainer.model).save_pretrained(folder, state_dict=weights)
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
        load_state(trainer, state)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise UserError(
            f"{folder / 'training_state.pt'}: belongs to another run ({reason}); start over without --resume"
        ) from None
    trainer.count = state["count"]
    trainer.after_restore(state)


def load_state(trainer: "Trainer", state: dict[str, Any]) -> None:
    """Load a training state into the trainer. ValueError, or a torch error, if it is from another run."""
    if trainer.sharded:
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            set_model_state_dict,
            set_optimizer_state_dict,
        )

        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(trainer.model, state["weights"], options=options)
        set_optimizer_state_dict(trainer.model, trainer.optimizer, state["optimizer"], options=options)
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
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def saved_states(folder: Path) -> list[Path]:
    """Directories of a run that contain a training state, newest last."""
    found = [*checkpoints(folder), folder / "interrupted", folder / "private"]
    return [path for path in found if (path / "training_state.pt").is_file()]


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
    results.write_jsonl(file, [line for line in metrics_lines(file, whole + newline) if line["step"] <= step])


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
