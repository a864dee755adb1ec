"""DP-SGD: how sampling, gradients and state differ from plain training."""

import hashlib
import math
import secrets
from pathlib import Path
from typing import Any

import torch

from common import distributed, models, provenance, publication
from common.distributed import World
from common.problems import UserError
from training import checkpoint, dp, verify
from training.batches import Row, unit_batches
from training.config import TrainConfig
from training.plan import Plan
from training.trainer import Trainer

# A bf16 pass rounds a row's gradient by its neighbours: a removed record was seen to move the others of 32 by up to
# 0.055 of the clipping norm C, across its own gradient and growing with √units: 0.01·C·√units.
ROUNDING = 0.01


class DPTrainer(Trainer):
    """Poisson sampling of privacy units, per-unit clipping, noise; all randomness derives from one secret."""

    def __init__(self, config: TrainConfig, plan: Plan, world: World, dtype: torch.dtype, secret: bytes) -> None:
        if plan.privacy is None:
            raise ValueError("the plan of a DP run says what it is to spend")
        self.secret, self.privacy = secret, plan.privacy
        super().__init__(config, plan, world, dtype)
        try:
            self.examples = dp.PerExample(self.model)
        except ValueError as error:
            raise UserError(f"--dp: {error}") from None
        if sum(item.numel() for item in self.trainable) != plan.n_trainable:
            raise RuntimeError(f"--dp: the plan counted {plan.n_trainable} trainable parameters, the model has others")
        verify.check_examples(self)

    def initial_seed(self) -> int:
        return self.private_seed("initial weights", 0)

    def dropout_seed(self, number: int) -> int:
        return self.private_seed(f"dropout {self.world.rank}", number)

    @property
    def clip_bound(self) -> float:
        return math.inf  # each unit is clipped separately

    @property
    def clip_slack(self) -> float:
        """Divisor of the clipping norm, so that one unit's effect stays within the norm despite rounding."""
        return 1.0 if self.dtype == torch.float32 else math.sqrt(1 + ROUNDING**2 * self.privacy.logical_batch)

    def private_seed(self, purpose: str, number: int) -> int:
        """A separate seed for each purpose and step: the published weights reveal the initial ones, and clipping bounds
        a record's influence only as long as the dropout masks are secret."""
        return int.from_bytes(dp.stream(self.secret, purpose, number, 8)) >> 1

    def gradient(self, number: int) -> dict[str, Any]:
        """Set .grad to (Σ clipped gradients of the sampled units + noise) / expected units.

        Nothing here may depend on a single record other than through the clipped sum: a loss or gradient that is not
        finite counts as zero instead of stopping the run.
        """
        plan, world, count, rows = self.plan, self.world, self.count, self.plan.train
        spending = self.privacy
        drawn = dp.poisson_draw(self.secret, number, len(spending.units), spending.sample_rate)
        units = [[row for row in spending.units[unit] if plan.labels[row]] for unit in drawn]
        units = [unit for unit in units if unit]  # nothing to predict: a zero gradient
        hands, passes = unit_batches(units, self.lengths, self.config.per_device_batch_size, world.size)
        total = {name: torch.zeros_like(item, dtype=torch.float32) for name, item in self.examples.named.items()}
        each_loss: list[torch.Tensor] = []
        each_norm: list[torch.Tensor] = []
        for n_units, item in hands[world.rank]:
            self.examples.begin(n_units)
            for group, owners in item:
                record_losses = self.record_losses([rows[row] for row in group])
                with self.examples.of(owners):
                    torch.autograd.backward(record_losses.sum())
                each_loss.append(record_losses.detach().double().cpu())
            each_norm.append(self.examples.clip_into(total, spending.max_grad_norm / self.clip_slack))
        for _ in range(passes - len(each_loss)):  # all ranks make the same number of passes, or fsdp would hang
            shortest = min((row for unit in units for row in unit), key=lambda row: self.lengths[row])
            torch.autograd.backward(self.record_losses([rows[shortest]]).sum())
        losses, norms = torch.cat([torch.zeros(0), *each_loss]), torch.cat([torch.zeros(0), *each_norm])
        finite = losses.isfinite()
        signals: list[torch.Tensor | float] = [
            losses[finite].sum(),
            finite.sum(),
            (norms > spending.max_grad_norm).sum(),
            (~norms.isfinite()).sum(),
            self.stopping,
        ]
        sums = list(total.values())
        loss, weight, clipped, dropped, stop = self.reduce(sums, signals)
        deviation = spending.noise_multiplier * spending.max_grad_norm if spending.noise_multiplier else 0.0
        measured: dict[str, Any] = {
            "batch": len(drawn),
            "clipped": clipped / max(1, len(drawn)),
            "dropped": int(dropped),
        }
        if deviation:
            size = math.sqrt(sum(float(total_of.double().square().sum()) for total_of in sums))
            measured["signal_to_noise"] = size / (deviation * math.sqrt(plan.n_trainable))
            noise = dp.gaussian(self.secret, number, [total_of.shape for total_of in sums], spending.secure_rng)
            for total_of, add in zip(sums, noise):  # identical on every rank, because sums and stream are
                total_of.add_(torch.from_numpy(add).to(total_of.device), alpha=deviation)
        for name, total_of in total.items():
            self.examples.named[name].grad = total_of.div_(spending.logical_batch).to(self.examples.named[name].dtype)
        count["tokens"] += sum(self.lengths[row] for unit in units for row in unit)
        count["window_loss"] += loss
        count["window_weight"] += int(weight)
        return measured | {"epsilon_rdp": self.spent(number), "stop": stop > 0}

    def record_losses(self, rows: list[Row]) -> torch.Tensor:
        """Mean −log p over each row's own labels, float32 (rows,)."""
        nll = self.nll(self.batch(rows, [[place] for place in range(len(rows))]))
        owner = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([row.labels for row in rows]))
        means = torch.tensor([1 / row.labels for row in rows], device=nll.device)[owner.to(nll.device)]
        return torch.zeros(len(rows), device=nll.device).index_add_(0, owner.to(nll.device), nll * means)

    def spent(self, steps: int) -> float | None:
        epsilon = self.privacy.epsilon(steps, "rdp")
        return epsilon if math.isfinite(epsilon) else None

    def write_checkpoint(self, folder: Path, state: dict[str, Any]) -> None:
        """The state first: never publish what a resumed run could recompute differently with the same noise."""
        with publication.atomic(self.plan.private / "training_state.pt", "wb", 0o600) as file:
            torch.save(state, file)
        if folder.name != "interrupted":
            self.publish(folder, state["weights"])

    def after_restore(self, state: dict[str, Any]) -> None:
        step = self.count["step"]
        missing = self.plan.folder / f"checkpoint-{step}"
        if self.world.main and step % self.plan.steps_per_epoch == 0 and not missing.is_dir():
            self.publish(missing, state["weights"])

    def publish(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        """A checkpoint without its training state, and the ε spent up to it."""
        with publication.atomic_folder(folder) as new:
            checkpoint.publish(self, new, weights)
            publication.write_json(new / provenance.PRIVACY_FILE, self.privacy.block(self.count["step"]))

    def record_norms(self) -> torch.Tensor:
        """(rows,) norms of the training rows' per-record gradients at the current weights."""
        most, rows = self.config.per_device_batch_size, [row for row in self.plan.train if row.labels]
        norms = []
        for start in range(0, len(rows), most):
            part = rows[start : start + most]
            self.examples.begin(len(part))
            with self.examples.of(list(range(len(part)))):
                torch.autograd.backward(self.record_losses(part).sum())
            none = {name: torch.zeros_like(item) for name, item in self.examples.named.items()}
            norms.append(self.examples.clip_into(none, math.inf))
        return torch.cat(norms)


def find_secret(config: TrainConfig, plan: Plan) -> bytes:
    """The 32-byte secret from which a DP run derives its sampling, noise, dropout and initial weights; when resuming,
    the unfinished run's."""
    file = plan.private / "secret"
    if not file.is_file():
        plan.private.mkdir(parents=True, exist_ok=True)
        plan.private.chmod(0o700)
        given = config.seed is not None
        secret = hashlib.sha256(f"seed {config.seed}".encode()).digest() if given else secrets.token_bytes(32)
        with publication.atomic(file, permissions=0o600) as out:
            out.write(secret.hex())
    return bytes.fromhex(file.read_text())


def hash_salt(secret: bytes) -> str:
    """The salt of the hashes that a DP run records, hexadecimal. It outlives the secret without revealing it."""
    return dp.stream(secret, "salt of hashes", 0, 16).hex()


def suggest(config: TrainConfig, plan: Plan) -> None:
    """Print quantiles of per-record gradient norms on public rows."""
    world = distributed.start(group_of_one=config.distribution_type == "fsdp")
    try:
        training = DPTrainer(config, plan, world, models.resolve_dtype(config.dtype, world.device), bytes(32))
        norms = training.record_norms()
        shares = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
        quantiles = "  ".join(f"{share:.0%} {item:.3g}" for share, item in zip(shares, norms.quantile(shares)))
        world.say(f"per-record gradient norms of {len(norms)} public rows at the initial weights: {quantiles}")
        world.say(f"suggestion: --max_grad_norm {norms.median():.2g} (the median; about half the records are clipped)")
    finally:
        world.close()
