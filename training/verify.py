"""Runtime checks: saved weights match the model in memory, and the assumptions of --dp and --packing hold for it."""

import contextlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file

from common import models
from common.problems import UserError
from common.quantization import is_quantised
from training.batches import whole_row
from training.checkpoint import weights, whole_tensors
from training.model import adapter_state, effective_weight, lora_layers

if TYPE_CHECKING:
    from peft import LoraModel

    from training.dp_trainer import DPTrainer
    from training.trainer import Trainer

PROBE_ROWS, PROBE_TOKENS = 4, 128


def check_examples(trainer: "DPTrainer") -> None:
    """RuntimeError unless per-example gradients of random tokens match plain autograd on one row at a time.

    Reads no data. B matrices that start at zero are perturbed temporarily, or A's gradients would all be zero.
    """
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(len(trainer.plan.tokenizer), (n,), generator=generator).tolist() for n in (7, 12, 9)]
    rows, examples = [whole_row(row_ids) for row_ids in ids], trainer.examples
    kept = {name: item.detach().clone() for name, item in examples.named.items() if ".lora_B." in name}
    trainer.model.eval()
    with torch.no_grad():
        for name in kept:
            item = examples.named[name]
            item.add_(0.02 * torch.randn(item.shape, generator=generator).to(item.device))
    examples.begin(len(rows))
    with examples.of(list(range(len(rows)))):
        torch.autograd.backward(trainer.record_losses(rows).sum())
    gradients, exact = examples.gradients, trainer.dtype == torch.float32
    for place, row in enumerate(rows):
        with examples.off():
            torch.autograd.backward(trainer.record_losses([row]).sum())
        missed = size = 0.0
        for name, item in examples.named.items():
            alone = torch.zeros_like(item) if item.grad is None else item.grad
            here = gradients[name][place] if name in gradients else torch.zeros_like(item)
            if exact and not (here - alone).abs().max() <= 1e-3 * max(float(alone.abs().max()), 1e-8):
                raise RuntimeError(f"--dp: {name}: its per-example gradient is wrong on this model; not supported")
            missed += float((here - alone).double().square().sum())
            size += float(alone.double().square().sum())
            item.grad = None
        # in half precision a small matrix may be off by half of its gradient: compare only the total
        if not missed**0.5 <= 0.1 * max(size**0.5, 1e-8):
            raise RuntimeError("--dp: its per-example gradient is wrong on this model; not supported")
    with torch.no_grad():
        for name, before in kept.items():
            examples.named[name].copy_(before)
    examples.begin(0)
    trainer.model.train()


def check_packing(trainer: "Trainer") -> None:
    """UserError unless two rows of random tokens packed into one sequence have the same losses as separately: models
    with their own notion of visibility (windows, ALiBi, a state) do not keep them apart."""
    generator, length = torch.Generator().manual_seed(0), trainer.plan.max_length
    sizes = (max(2, 2 * length // 3), max(2, length - 2 * length // 3))
    ids = [torch.randint(len(trainer.plan.tokenizer), (n,), generator=generator).tolist() for n in sizes]
    rows, tolerance = [whole_row(row_ids) for row_ids in ids], 1e-3 if trainer.dtype == torch.float32 else 0.1
    refused = UserError("--packing: this model does not keep the rows of a sequence apart; drop the flag")
    trainer.model.eval()
    with torch.no_grad():
        alone = torch.cat([trainer.nll(trainer.batch([row], [[0]], packed=False)) for row in rows])
        try:
            together = trainer.nll(trainer.batch(rows, [[0, 1]]))
        except (TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise refused from None
    trainer.model.train()
    if not (together - alone).abs().mean() <= tolerance * alone.abs().mean():
        raise refused


def probe(trainer: "Trainer") -> torch.Tensor:
    """Logits (float32, on the CPU) of a few training rows, without dropout."""
    rows = [whole_row(row.ids[:PROBE_TOKENS]) for row in trainer.plan.train[:PROBE_ROWS]]
    batch = trainer.batch(rows, [[index] for index in range(len(rows))])
    trainer.model.eval()
    with torch.no_grad(), trainer.autocast():
        logits: torch.Tensor = trainer.model(input_ids=batch["input_ids"], use_cache=False).logits.float().cpu()
    trainer.model.train()
    return logits


def check_saved(trainer: "Trainer", folder: Path) -> None:
    """RuntimeError unless the weights saved in `folder` changed and reproduce the logits of the model in memory.

    LoRA and DoRA: the live adapter is zeroed and reloaded from the file. PiSSA: the file, made for the original base,
    is attached next to the initial adapter on the residual base. Full models: tensors are compared.
    """
    if trainer.full:
        check_saved_model(trainer, folder)
        return
    trained, before = adapter_state(trainer.peft_model), probe(trainer)
    moved = any(not torch.equal(trained[name], trainer.initial[name]) for name in trained)
    if trainer.count["updates"] and not moved:
        raise RuntimeError(f"{folder}: the adapter is unchanged after {trainer.count['updates']} steps")
    if trainer.config.peft_type == "pissa":
        after = probe_converted(trainer, folder)
    else:
        zeros = {name: torch.zeros_like(tensor) for name, tensor in trained.items()}
        set_peft_model_state_dict(trainer.peft_model, zeros)
        set_peft_model_state_dict(trainer.peft_model, load_file(folder / "adapter_model.safetensors"))
        after = probe(trainer)
    worst, scale = (after - before).abs().max().item(), before.abs().max().item()
    bound = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}[trainer.dtype]
    if is_quantised(trainer.model):  # whose layers compute in half precision outside training
        bound = 5e-2
    if not worst <= bound * max(scale, 1.0):
        raise RuntimeError(f"{folder}: reloaded, its logits differ from the model in memory by {worst:.2g}")


def probe_converted(trainer: "Trainer", folder: Path) -> torch.Tensor:
    """Logits of residual base + initial adapter + the saved, converted adapter."""
    model = trainer.peft_model
    model.load_adapter(folder, adapter_name="reloaded")
    model.load_adapter(trainer.plan.folder / "initial_adapter", adapter_name="initial")
    lora = cast("LoraModel", model.base_model)
    lora.set_adapter(["initial", "reloaded"])
    after = probe(trainer)
    lora.set_adapter("default")
    model.delete_adapter("reloaded")
    model.delete_adapter("initial")
    return after


def check_saved_model(trainer: "Trainer", folder: Path) -> None:
    """RuntimeError unless the full model saved in `folder` changed and has the tensors of the one in memory."""
    if trainer.count["updates"] and fingerprint(trainer) == trainer.initial_sums:
        raise RuntimeError(f"{folder}: the model is unchanged after {trainer.count['updates']} steps")
    with contextlib.ExitStack() as stack:
        saved: dict[str, Any] = {}
        for file in folder.glob("*.safetensors") if trainer.world.main else ():
            opened = stack.enter_context(safe_open(file, "pt"))
            saved |= dict.fromkeys(opened.keys(), opened)
        compared = n_live = 0
        for name, tensor in whole_tensors(trainer) if trainer.sharded else weights(trainer).items():
            n_live += tensor.numel()
            if name in saved:
                compared += 1
                if not torch.equal(saved[name].get_tensor(name), tensor.cpu()):
                    raise RuntimeError(f"{folder}: {name} differs from the model in memory")
        n_saved = sum(math.prod(opened.get_slice(name).get_shape()) for name, opened in saved.items())
    if trainer.world.main and trainer.sharded and n_saved != n_live:
        raise RuntimeError(f"{folder}: has {n_saved} of the model's {n_live} numbers")
    if trainer.world.main and not compared:
        raise RuntimeError(f"{folder}: contains none of the model's weights")


def fingerprint(trainer: "Trainer") -> list[float]:
    """Sum of squares of every trainable parameter (over all ranks if sharded)."""
    sums = [parameter.detach().double().square().sum() for parameter in trainer.trainable]
    return [float(item.full_tensor() if hasattr(item, "full_tensor") else item) for item in sums]


def relative_change(trainer: "Trainer") -> float | None:
    """‖ΔW‖ / ‖W‖ (Frobenius, over all trained matrices), W as in the base. None if the base cannot be read again."""
    if trainer.full:
        return model_change(trainer)
    trained = adapter_state(trainer.peft_model)
    change = total = 0.0
    for name, layer in lora_layers(trainer.peft_model).items():
        before, after = (effective_weight(layer, name, state) for state in (trainer.initial, trained))
        change += float((after - before).square().sum())
        total += float(before.square().sum())
    return float((change / total) ** 0.5)


def model_change(trainer: "Trainer") -> float | None:
    """`relative_change` of a fully trained model, against its base as rank 0 reads it again: a copy kept from the start
    would hold that memory during training."""
    base: dict[str, torch.Tensor] = {}
    if trainer.world.main:
        with contextlib.suppress(UserError, OSError):  # removed since: the run itself is complete
            loaded = models.load_base(trainer.plan.ref, torch.float32, "cpu")
            base = {name: parameter.detach() for name, parameter in loaded.named_parameters()}
    if not trainer.world.broadcast(bool(base)):
        return None
    change = total = 0.0
    for name, parameter in trainer.model.named_parameters():
        if parameter.dim() < 2:
            continue
        tensor = parameter.detach()
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # on every rank
        if trainer.world.main:
            before = base.pop(name).double()
            change += float((whole.cpu().double() - before).square().sum())
            total += float(before.square().sum())
    return trainer.world.broadcast(float((change / total) ** 0.5) if total else None)
