"""The privacy budget of a DP run, determined before a model is loaded."""

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import dataset, strict_json
from common.problems import Problems, UserError
from common.rows import Lazy, Row
from training.config import TrainConfig

DP_FLAGS = ("target_epsilon", "noise_multiplier", "target_delta", "logical_batch_size")  # None unless given
NEITHER_OR_BOTH = "--dp: give exactly one of --target_epsilon and --noise_multiplier"
ENOUGH_UNITS = 256  # below this expected batch the noise drowns the signal at any useful ε
MOST_LINES = 10  # lines with ε after an epoch in the plan
# Everything in a run directory, besides the noisy weights, that depends on the data. run.json's input hash is salted.
OUTSIDE = (
    "run.json: num_units, num_records, rows_left_out, sample_rate and delta where they follow from num_units, steps, "
    "checkpoint numbers, rows, tokens, trained, eval_losses, seconds, start, end, tokens_per_second, peak_memory; "
    "metrics.jsonl: epoch, loss, batch, clipped, dropped, signal_to_noise, tokens, eval_loss, eval_tokens, time; "
    "trained_rows.jsonl: all of it, to be kept with the data"
)


def check_flags(config: TrainConfig, metric_schedulers: tuple[str, ...], problems: Problems) -> bool:
    """Add every problem with the DP flags that shows in the arguments alone; True if there is none."""
    before = len(problems.lines)
    if not config.dp:
        given = [f"--{name}" for name in DP_FLAGS if getattr(config, name) is not None]
        given += ["--secure_rng"] * config.secure_rng + ["--privacy_unit user"] * (config.privacy_unit == "user")
        if given:
            problems.add(f"{', '.join(given)}: only with --dp")
        return not given
    if (config.target_epsilon is None) == (config.noise_multiplier is None):
        problems.add(NEITHER_OR_BOTH)
    for name in ("target_epsilon", "noise_multiplier"):
        if getattr(config, name) == math.inf:
            problems.add(f"--{name} inf: must be finite; for no noise use --noise_multiplier 0")
    if config.max_grad_norm == math.inf and config.noise_multiplier != 0:
        problems.add("--max_grad_norm inf: noise needs a finite bound; inf works only with --noise_multiplier 0")
    if config.peft_type == "full":
        problems.add("--peft_type full: has no per-example rule under --dp; train an adapter")
    if config.packing:
        problems.add("--packing: mixes records in one sequence; not supported with --dp")
    if config.scheduler in metric_schedulers:
        problems.add(f"--scheduler {config.scheduler}: depends on a loss that is not private; not supported with --dp")
    if config.dtype == "float16":
        problems.add("--dtype float16: needs loss scaling, which --dp does not have; use bfloat16 or float32")
    return len(problems.lines) == before


@dataclass(frozen=True)
class Privacy:
    """Units (rows of each, as positions among the training rows), noise and sampling of one DP run."""

    units: Sequence[list[int]]
    unit: str
    rows_left_out: int
    noise_multiplier: float
    max_grad_norm: float
    delta: float
    logical_batch: int
    accountant: str
    secure_rng: bool
    seeded: bool

    @property
    def sample_rate(self) -> float:
        return self.logical_batch / len(self.units)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.units) / self.logical_batch)

    def epsilon(self, steps: int, accountant: str) -> float:
        from training import dp

        return dp.epsilon(self.noise_multiplier, self.sample_rate, steps, self.delta, accountant)

    def differences(self, block: dict[str, Any]) -> list[str]:
        """Differences from an unfinished run's `privacy` block, which its steps were accounted with."""
        now = self.block(0)
        kept = [key for key in now if key not in ("private", "epsilon", "epsilon_rdp", "steps", "outside_epsilon")]
        now = strict_json.plain(now)
        return [f"{key} {block.get(key)} there, {now[key]} here" for key in kept if block.get(key) != now[key]]

    def block(self, steps: int) -> dict[str, Any]:
        """The `privacy` block after `steps` steps. epsilon is None without noise."""
        spent = {name: self.epsilon(steps, name) for name in ("prv", "rdp")}
        finite = {name: value if math.isfinite(value) else None for name, value in spent.items()}
        return {
            "private": math.isfinite(spent["prv"]) and not self.seeded,
            "epsilon": finite["prv"],
            "epsilon_rdp": finite["rdp"],
            "void": "--seed was given: whoever knows it can subtract the noise" if self.seeded else None,
            "delta": self.delta,
            "noise_multiplier": self.noise_multiplier,
            "max_grad_norm": self.max_grad_norm,
            "sample_rate": self.sample_rate,
            "steps": steps,
            "num_records": sum(map(len, self.units)),
            "num_units": len(self.units),
            "logical_batch_size": self.logical_batch,
            "adjacency": "add/remove",
            "unit": self.unit,
            "rows_left_out": self.rows_left_out,
            "sampler": "poisson",
            "accountant": self.accountant,
            "secure_rng": self.secure_rng,
            "outside_epsilon": OUTSIDE,
        }


def make_privacy(config: TrainConfig, path: Path, rows: Sequence[Row], train: Sequence[int]) -> Privacy:
    """The plan of a DP run over rows[train]; chooses σ for --target_epsilon. UserError if that is impossible."""
    units: Sequence[list[int]] = Lazy(lambda place: [place], len(train))
    left_out = 0
    if config.privacy_unit == "user":
        names = [dataset.user_of(rows[index]) for index in train]
        bare = [index for index, name in zip(train, names) if name is None]
        if bare:
            raise UserError(f"--privacy_unit user: {path}: row {bare[0]} (and {len(bare) - 1} more) has no user_id")
        users: dict[str | None, list[int]] = {}
        for place, name in enumerate(names):
            users.setdefault(name, []).append(place)
        units = [places[: config.max_rows_per_user] for places in users.values()]
        left_out = len(train) - sum(map(len, units))
    n = len(units)
    logical = min(ENOUGH_UNITS, n) if config.logical_batch_size is None else config.logical_batch_size
    delta = 1 / (10 * n) if config.target_delta is None else config.target_delta
    problems = Problems()
    if logical > n:
        problems.add(f"--logical_batch_size {logical}: {path} has only {n} privacy units ({config.privacy_unit}s)")
    if delta >= 1 / n:
        problems.add(f"--target_delta {delta:g}: must be below 1/{n}, one over the number of {config.privacy_unit}s")
    problems.check()
    return Privacy(
        units=units,
        unit=config.privacy_unit,
        rows_left_out=left_out,
        noise_multiplier=chosen_noise(config, logical, n, delta),
        max_grad_norm=config.max_grad_norm,
        delta=delta,
        logical_batch=logical,
        accountant=config.accountant,
        secure_rng=config.secure_rng,
        seeded=config.seed is not None,
    )


def chosen_noise(config: TrainConfig, logical_batch: int, n_units: int, delta: float) -> float:
    """σ: --noise_multiplier, or what --target_epsilon needs over all epochs. UserError if no σ achieves it."""
    if config.noise_multiplier is not None:
        return config.noise_multiplier
    if config.target_epsilon is None:
        raise UserError(NEITHER_OR_BOTH)
    from training import dp

    steps = math.ceil(n_units / logical_batch) * config.epochs
    target = f"{config.target_epsilon:g}"
    if steps > dp.SLOW_STEPS and config.accountant == "prv" and int(os.environ.get("RANK", 0)) == 0:
        print(f"searching for the noise that gives ε {target} in {steps} steps (up to a minute)", file=sys.stderr)
    try:
        return dp.noise_multiplier(config.target_epsilon, logical_batch / n_units, steps, delta, config.accountant)
    except ValueError as error:
        raise UserError(f"--target_epsilon {target}: {error} in {steps} steps at δ {delta:g}") from None


def describe(privacy: Privacy, epochs: int, n_parameters: int) -> list[str]:
    """The plan as text: σ, q, steps, ε after each epoch, expected signal-to-noise ratio, hints."""
    from training import dp

    n, steps = len(privacy.units), privacy.steps_per_epoch
    lines = [
        f"privacy      unit {privacy.unit}, {n} of them; δ {privacy.delta:.3g}, add/remove adjacency",
        f"noise        σ {privacy.noise_multiplier:g} × clipping norm {privacy.max_grad_norm:g}, "
        f"{'cryptographic stream' if privacy.secure_rng else 'Philox'}",
        f"sampling     Poisson, q = {privacy.logical_batch}/{n} = {privacy.sample_rate:.4g}, {steps} steps per epoch",
    ]
    if privacy.rows_left_out:
        lines.append(f"             {privacy.rows_left_out} rows above --max_rows_per_user left out")
    if privacy.noise_multiplier == 0:
        return [*lines, "ε            infinite: no noise, not private"]
    for epoch in sorted({math.ceil(epochs * part / MOST_LINES) for part in range(1, MOST_LINES + 1)}):
        prv, rdp = (privacy.epsilon(steps * epoch, name) for name in ("prv", "rdp"))
        lines.append(f"ε            after epoch {epoch}: {prv:.3f} (PRV), {rdp:.3f} (RDP)")
    ratio = dp.signal_to_noise(privacy.logical_batch, privacy.noise_multiplier, n_parameters)
    lines.append(
        f"signal/noise at most {ratio:.3g}: {privacy.logical_batch} units of norm ≤ C against noise of norm σC√P on "
        f"P = {n_parameters} parameters"
    )
    if privacy.logical_batch < ENOUGH_UNITS:
        lines.append(
            f"             hint: --logical_batch_size {privacy.logical_batch} is small; noise is added per step, so "
            f"{ENOUGH_UNITS} or more gives a better signal at the same ε"
        )
    if ratio < 0.1:
        lines.append("             hint: a smaller --lora_r or a larger --logical_batch_size raises it")
    if privacy.seeded:
        lines.append("             --seed is given: for tests only; whoever knows it can subtract the noise: ε is void")
    return lines


def summary(block: dict[str, Any]) -> str:
    """The `privacy` block in one line."""
    if block["epsilon"] is None:
        return f"not private: no noise ({block['steps']} steps)"
    words = (
        f"ε {block['epsilon']:.3f} (PRV; RDP {block['epsilon_rdp']:.3f}) at δ {block['delta']:.3g} after "
        f"{block['steps']} steps, {block['adjacency']} of one {block['unit']}, {block['sampler']} sampling"
    )
    return f"{words}; VOID: {block['void']}" if block["void"] else words
