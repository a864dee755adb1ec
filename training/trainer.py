"""A training run: model, optimizer, counters, and the optimizer step."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

import torch
import torch.nn.functional as F

from common import publication
from common.distributed import World
from training import checkpoint, tokenised, verify
from training.batches import Row, collate, epoch_batches, micro_batches
from training.config import TrainConfig
from training.model import base_of, build
from training.optim import METRIC_SCHEDULERS, make_scheduler, optimizer_class, parameter_groups
from training.plan import Plan

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel


class Counts(TypedDict):
    """Progress counters, saved with the state. window: since the last line of metrics.jsonl."""

    step: int  # steps done
    updates: int  # steps that could change a weight
    tokens: int  # trained so far, without padding
    window_loss: float  # summed over window_weight labels (--dp: records)
    window_weight: int
    eval_losses: list[float]


class Trainer:
    """The state of one run: what a checkpoint saves and --resume restores."""

    def __init__(
        self,
        config: TrainConfig,
        plan: Plan,
        world: World,
        dtype: torch.dtype,
        base: "PreTrainedModel | None" = None,
    ) -> None:
        self.config, self.plan, self.world, self.dtype = config, plan, world, dtype
        self.seed = self.initial_seed()
        self.full = config.peft_type == "full"
        self.sharded = self.full and config.distribution_type == "fsdp"
        self.model, self.initial = build(config, plan, world, dtype, self.seed, base)
        self.trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        kind, keywords = optimizer_class(config)
        self.initial_sums = verify.fingerprint(self) if self.full else []
        self.optimizer = kind(parameter_groups(self.model, config.weight_decay), **keywords)
        self.scheduler = make_scheduler(config, self.optimizer, self.total)
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=dtype == torch.float16)
        base = base_of(self.model)
        self.additive = base.config._attn_implementation == "eager"
        self.spread = len({parameter.device for parameter in base.parameters()}) > 1
        self.lengths = plan.lengths
        self.stopping = False
        self.order: tuple[int | None, Sequence[list[int]]] = (None, [])  # an epoch and its steps
        if config.packing:
            verify.check_packing(self)
        self.count = Counts(step=0, updates=0, tokens=0, window_loss=0.0, window_weight=0, eval_losses=[])

    @property
    def peft_model(self) -> "PeftModel":
        """The model with its adapter, in a run that trains one."""
        return cast("PeftModel", self.model)

    @property
    def lora_config(self) -> "LoraConfig":
        """Its adapter's configuration."""
        return cast("LoraConfig", self.peft_model.peft_config["default"])

    def initial_seed(self) -> int:
        """Seed of the adapter's initial weights and of the order of the rows."""
        assert self.config.seed is not None
        return self.config.seed

    def dropout_seed(self, number: int) -> int:
        """Dropout depends only on seed, step and rank, so a resumed run has an unbroken one's dropout."""
        return (self.seed * 1_000_003 + number) * 1_009 + self.world.rank

    @property
    def clip_bound(self) -> float:
        """The norm to which step() clips the whole gradient."""
        return self.config.max_grad_norm

    def write_checkpoint(self, folder: Path, state: dict[str, Any]) -> None:
        """Publish a checkpoint with its training state; older training states are removed."""
        with publication.atomic_folder(folder) as new:
            checkpoint.publish(self, new, state["weights"])
            torch.save(state, new / "training_state.pt")
        for other in checkpoint.saved_states(self.plan.folder):
            if other != folder:
                checkpoint.remove_state(other)

    def after_restore(self, state: dict[str, Any]) -> None:
        """Hook for what a resumed run has to do after loading `state`."""

    @property
    def device_type(self) -> str:
        return self.world.device.split(":")[0]

    @property
    def total(self) -> int:
        return self.plan.steps_per_epoch * self.config.epochs

    def batch(
        self, rows: Sequence[Row], sequences: list[list[int]], packed: bool | None = None
    ) -> dict[str, torch.Tensor]:
        """`collate` for rows given by position, on this process's device."""
        made = collate(
            [[rows[index] for index in sequence] for sequence in sequences],
            self.plan.tokenizer.pad_token_id,
            packed=self.config.packing if packed is None else packed,
            additive=self.additive,
        )
        return {name: tensor.to(self.world.device, non_blocking=True) for name, tensor in made.items()}

    def autocast(self) -> torch.autocast:
        """Half-precision autocast for a forward pass; no-op in float32."""
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device_type, self.dtype, enabled=enabled)

    def nll(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """−log p of each of the K labels in a micro-batch, float32 (K,)."""
        targets = batch.pop("targets")
        keep = batch.pop("logits_to_keep")
        with self.autocast():
            if self.spread:  # the hidden states may be on a different GPU than the mask
                logits = self.model(**batch, use_cache=False).logits
                logits = logits[keep.to(logits.device)]
            else:
                logits = self.model(**batch, use_cache=False, logits_to_keep=keep).logits
        return F.cross_entropy(logits.float(), targets.to(logits.device), reduction="none")

    def step(self) -> dict[str, Any]:
        """One optimizer step (over all ranks). Returns what it adds to metrics.jsonl, and `stop`."""
        config, count = self.config, self.count
        number = count["step"] + 1
        torch.manual_seed(self.dropout_seed(number))
        measured = self.gradient(number)
        self.scaler.unscale_(self.optimizer)
        length = torch.nn.utils.clip_grad_norm_(self.trainable, self.clip_bound)
        norm = float(length.full_tensor() if hasattr(length, "full_tensor") else length)
        if not math.isfinite(norm) and not self.scaler.is_enabled():
            raise FloatingPointError(f"step {number}: the gradient's norm is {norm}; {self.last_good()}")
        rate, scale = self.optimizer.param_groups[0]["lr"], self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        skipped = self.scaler.get_scale() < scale
        self.optimizer.zero_grad(set_to_none=True)
        if not skipped and config.scheduler not in METRIC_SCHEDULERS:
            self.scheduler.step()
        count["step"] = number
        count["updates"] += int(not skipped and rate > 0)
        return {"lr": rate, "grad_norm": norm if math.isfinite(norm) else None} | measured

    def members(self, number: int) -> list[int]:
        """The sequences of step `number` (from 1)."""
        epoch, place = divmod(number - 1, self.plan.steps_per_epoch)
        if self.order[0] != epoch:
            batches = epoch_batches(len(self.plan.sequences), self.plan.global_batch, self.seed, epoch)
            self.order = (epoch, batches)
        return self.order[1][place]

    def gradient(self, number: int) -> dict[str, Any]:
        """Set .grad to the gradient of the mean loss over all label tokens of step `number`'s global batch."""
        plan, world, count = self.plan, self.world, self.count
        members = self.members(number)
        labels = sum(plan.labels[index] for member in members for index in plan.sequences[member])
        hands = micro_batches(members, self.lengths, self.config.per_device_batch_size, world.size)
        total = torch.zeros((), device=world.device)
        for group, weight in hands[world.rank]:
            nll = self.nll(self.batch(plan.train, [plan.sequences[member] for member in group])).sum()
            share = nll * (weight / max(1, labels))
            # FSDP averages the gradients it reduces; ours must be summed.
            torch.autograd.backward(self.scaler.scale(share * world.size if self.sharded else share))
            total += share.detach().to(total.device)
        gradients = [parameter.grad for parameter in self.trainable if parameter.grad is not None]
        loss, stop = self.reduce([] if self.sharded else gradients, [total, self.stopping])
        if not math.isfinite(loss):
            raise FloatingPointError(f"step {number}: the loss is {loss}; {self.last_good()}")
        count["tokens"] += sum(self.lengths[member] for member in members)
        count["window_loss"] += loss * labels
        count["window_weight"] += labels
        return {"stop": stop > 0}

    def reduce(self, shared: list[torch.Tensor], signals: list[torch.Tensor | float]) -> list[float]:
        """Sum `shared` (tensors, in place) and `signals` (numbers, returned) over the ranks in one collective."""
        stacked = torch.stack([torch.as_tensor(item, dtype=torch.float64).cpu() for item in signals])
        if not self.world.backend:
            return [float(item) for item in stacked.tolist()]
        # float32 is exact enough for these sums; a loss is rounded as on one rank
        parts = [*(item.flatten().float() for item in shared), stacked.float().to(self.world.device)]
        flat = self.world.sum_(torch.cat(parts))
        start = 0
        for item in shared:
            item.copy_(flat[start : start + item.numel()].view_as(item))
            start += item.numel()
        return [float(item) for item in flat[start:].tolist()]

    def last_good(self) -> str:
        saved = checkpoint.checkpoints(self.plan.folder)
        return f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint was saved yet"

    def evaluate(self) -> tuple[float, int]:
        """(mean loss, number) of the held-out rows' label tokens."""
        rows, world = self.plan.held, self.world
        lengths = tokenised.lengths(rows)
        hands = micro_batches(list(range(len(rows))), lengths, self.config.per_device_batch_size, world.size)
        sums = torch.zeros(2, dtype=torch.float64, device=world.device)
        self.model.eval()
        with torch.no_grad():
            for group, weight in hands[world.rank]:
                batch = self.batch(rows, [[index] for index in group])
                n_labels = len(batch["targets"])
                sums += weight * torch.tensor(
                    [float(self.nll(batch).sum()), n_labels], dtype=torch.float64, device=world.device
                )
        self.model.train()
        loss, labels = world.sum_(sums).tolist()
        return loss / max(1.0, labels), int(labels)
