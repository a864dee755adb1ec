"""Differentially private training: Poisson sampling, per-example gradients, clipping, noise, and the ε they spend.

One step (DP-SGD, Abadi et al. 2016): every privacy unit is sampled with probability q, its gradient g is clipped to
g·min(1, C/‖g‖) over all trainable parameters together, the clipped gradients are summed, N(0, (σC)²) is added once, and
the sum is divided by the expected number of units, never the actual one. Adjacency: add or remove one unit.

Import this module inside functions: it needs torch.
"""

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from opacus.accountants import PRVAccountant, RDPAccountant
from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent
from peft.tuners.lora import Linear
from peft.tuners.lora.dora import DoraLinearLayer
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import transpose
from scipy.optimize import brentq
from scipy.special import ndtri

if TYPE_CHECKING:
    from transformers.pytorch_utils import Conv1D

PRV_ERROR = 0.01  # the PRV accountant's ε is an upper bound, at most about this much above the true value
LARGEST_PRV = 500  # if RDP's ε is above this, exp() of a privacy loss overflows in the PRV accountant
SLOW_STEPS = 5000  # from here on, exact PRV accounting takes seconds
SLACK = 1e-6  # keeps a clipped norm below C despite float32 rounding


# The accountant


@cache
def _rdp(noise_multiplier: float, sample_rate: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(orders, Rényi divergence of one step at each)."""
    orders = [1.01, 1.03, 1.06, *RDPAccountant.DEFAULT_ALPHAS, *range(72, 1025, 8)]  # wide: ε from 0.1 to 1,000
    return tuple(orders), tuple(
        compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=orders).tolist()
    )


@cache
def epsilon(
    noise_multiplier: float,
    sample_rate: float,
    steps: int,
    delta: float,
    accountant: str = "prv",
    error: float = PRV_ERROR,
) -> float:
    """Upper bound on ε at `delta` for `steps` Poisson-subsampled Gaussian mechanisms; inf without noise.

    accountant 'prv': Gopi, Lee and Wutschitz 2021, to within `error` (1/50 of a small ε, 1/2000 of a large one); 'rdp':
    Mironov, Talwar and Zhang 2019, instant. Both from Opacus. noise_multiplier σ: noise std / clipping norm. Where PRV
    runs into floating-point limits (ε in the hundreds, where it would be too low, or a tiny δ), RDP's ε is used.
    """
    if steps == 0:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    orders, divergences = _rdp(noise_multiplier, sample_rate)
    rdp = max(0.0, float(get_privacy_spent(orders=orders, rdp=steps * np.array(divergences), delta=delta)[0]))
    if accountant == "rdp" or rdp > LARGEST_PRV:
        return rdp
    prv = PRVAccountant()
    prv.history = [(noise_multiplier, sample_rate, steps)]
    with np.errstate(divide="ignore", invalid="ignore"):  # log in a region that np.where discards (q = 1)
        try:
            prv_epsilon = float(
                prv.get_epsilon(delta=delta, eps_error=max(min(error, max(rdp, 0.01) / 50), rdp / 2000))
            )
        except (ValueError, RuntimeError):
            return rdp
    return max(0.0, prv_epsilon) if math.isfinite(prv_epsilon) else rdp


def noise_multiplier(target: float, sample_rate: float, steps: int, delta: float, accountant: str = "prv") -> float:
    """The smallest σ (four digits, rounded up) whose ε is at most `target`, verified with the accountant itself.

    The search starts at the RDP accountant's σ; if exact PRV is slow, a coarse PRV search comes first.
    """

    def spent(sigma: float, kind: str = accountant, error: float = PRV_ERROR) -> float:
        return epsilon(sigma, sample_rate, steps, delta, kind, error)

    def root(
        low: float, high: float, tolerance: float, kind: str = accountant, error: float = PRV_ERROR, bias: float = 0.0
    ) -> float:
        """σ with spent(σ) − bias = target, bracketed by low and high; nearly linear on a log-log scale."""
        while spent(low, kind, error) - bias < target:
            low /= 2
        while spent(high, kind, error) - bias > target:
            high *= 2
            if high > 1e6:
                raise ValueError(f"no noise reaches ε = {target}")
        miss = lambda x: math.log(max(spent(math.exp(x), kind, error) - bias, 1e-12) / target)  # noqa: E731
        return math.exp(brentq(miss, math.log(low), math.log(high), xtol=tolerance))

    high = root(0.1, 1.0, 1e-4, "rdp")
    if accountant == "prv":
        low = 0.7 * high
        if steps > SLOW_STEPS and target > 1:
            coarse = 10 * PRV_ERROR
            middle = root(low, high, 1e-3, "prv", coarse, bias=coarse - PRV_ERROR)
            low, high = 0.99 * middle, 1.01 * middle
        high = root(low, high, 2e-4)
    digits = 3 - math.floor(math.log10(high))
    sigma: float = math.ceil(high * 10**digits) / 10**digits
    while spent(sigma) > target:
        sigma = round(sigma + 10**-digits, digits)
    return sigma


# Randomness: everything hangs on one secret, a purpose and the step, so a resumed run repeats its own draws


def stream(secret: bytes, purpose: str, step: int, n_bytes: int) -> bytes:
    """`n_bytes` of SHAKE-256 keyed by (secret, purpose, step): a cryptographic stream, the same on every rank."""
    return hashlib.shake_256(len(secret).to_bytes(4, "big") + secret + f"{purpose} {step}".encode()).digest(n_bytes)


def uniforms(secret: bytes, purpose: str, step: int, n: int) -> np.ndarray:
    """(n,) float64 uniform in [0, 1), 53 random bits each."""
    words = np.frombuffer(stream(secret, purpose, step, 8 * n), dtype="<u8")
    return (words >> np.uint64(11)) * 2.0**-53


def poisson_draw(secret: bytes, step: int, n: int, sample_rate: float) -> list[int]:
    """The units of 0 … n-1 sampled in step `step`, each independently with probability `sample_rate`; may be empty."""
    return np.flatnonzero(uniforms(secret, "draw", step, n) < sample_rate).tolist()


def gaussian(secret: bytes, step: int, shapes: Sequence[tuple[int, ...]], secure: bool) -> list[np.ndarray]:
    """Standard normal float32 arrays of the given shapes for one step.

    secure: from the cryptographic stream by inverse transform, summing and halving four draws, so that no single float
    reveals another (Holohan and Braghin 2021). Otherwise Philox with a 128-bit key from the stream.
    """
    sizes = [math.prod(shape) for shape in shapes]
    if secure:
        drawn = ndtri((uniforms(secret, "noise", step, 4 * sum(sizes)) + 2.0**-54).clip(max=1 - 2.0**-53))
        flat = (drawn.reshape(4, -1).sum(0) / 2).astype(np.float32)
    else:
        key = int.from_bytes(stream(secret, "noise", step, 16), "little")
        flat = np.random.Generator(np.random.Philox(key=key)).standard_normal(sum(sizes), dtype=np.float32)
    ends = np.cumsum(sizes)
    return [flat[end - size : end].reshape(shape) for size, end, shape in zip(sizes, ends, shapes)]


# Per-example gradients


class _Linear(torch.autograd.Function):
    """y = x Wᵀ (y in the autocast dtype); backward passes each unit's ∂W to the collector instead of autograd."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, collector: "PerExample", name: str) -> torch.Tensor:
        y = F.linear(x, weight)
        ctx.save_for_backward(x.to(y.dtype), weight)
        ctx.collector, ctx.name, ctx.dtype = collector, name, x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        if ctx.collector.owners is not None:
            rows = len(ctx.collector.owners)
            left = grad.reshape(rows, -1, grad.shape[-1]).transpose(1, 2)
            ctx.collector.add(ctx.name, torch.bmm(left, x.reshape(rows, -1, x.shape[-1])))
        back = (grad @ weight.to(grad.dtype)).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        return back, None, None, None


class _Scale(torch.autograd.Function):
    """y = v · m along the last dimension; backward passes each unit's ∂m to the collector."""

    @staticmethod
    def forward(ctx: Any, v: torch.Tensor, magnitude: torch.Tensor, collector: "PerExample", name: str) -> torch.Tensor:
        ctx.save_for_backward(v, magnitude)
        ctx.collector, ctx.name = collector, name
        return v * magnitude

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (grad,) = grads
        v, magnitude = ctx.saved_tensors
        if ctx.collector.owners is not None:
            rows = len(ctx.collector.owners)
            ctx.collector.add(ctx.name, (grad * v).reshape(rows, -1, v.shape[-1]).sum(1))
        return grad * magnitude, None, None, None


# torch declares apply() without types
_linear: Callable[..., torch.Tensor] = _Linear.apply
_scale: Callable[..., torch.Tensor] = _Scale.apply


class PerExample:
    """Collects the gradient of every privacy unit for the LoRA matrices and DoRA magnitudes of a PEFT model.

    The forward of every layer with a trainable parameter is replaced (with the same values), so any attention, dropout
    and non-reentrant checkpointing works. Activations may be (rows, tokens, width) or flattened to (rows · tokens,
    width): the rows of a pass are known. ValueError names a trainable parameter without a per-example rule.

        examples = PerExample(model)
        examples.begin(units=3)
        for rows, owners in passes:            # a unit's rows may be in several passes
            with examples.of(owners):          # owners[i]: the unit of row i
                loss_summed_over_rows.backward()
        norms = examples.clip_into(total, max_norm)
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.named = {name: item for name, item in model.named_parameters() if item.requires_grad}
        self.units = 0
        self.owners: list[int] | None = None  # of the rows of the current pass
        self.gradients: dict[str, torch.Tensor] = {}  # name → (units, *shape), float32
        self.replaced: list[tuple[torch.nn.Module, Callable[..., torch.Tensor]]] = []
        ruled = self._replace(model)
        strange = [name for name in self.named if name not in ruled]
        if strange:
            raise ValueError(f"{strange[0]}: no per-example rule (LoRA on linear layers and DoRA magnitudes have one)")

    def _replace(self, model: torch.nn.Module) -> set[str]:
        ruled = set()
        for path, layer in model.named_modules():
            if not isinstance(layer, Linear):
                continue
            for kind in ("lora_A", "lora_B"):
                for adapter, module in getattr(layer, kind).items():
                    name = f"{path}.{kind}.{adapter}.weight"
                    if name in self.named and type(module) is torch.nn.Linear and module.bias is None:
                        self.replaced.append((module, self._linear(module, name)))
                        ruled.add(name)
            for adapter, module in layer.lora_magnitude_vector.items():
                name = f"{path}.lora_magnitude_vector.{adapter}.weight"
                if name in self.named and type(module) is DoraLinearLayer:
                    self.replaced.append((module, self._dora(module, name)))
                    ruled.add(name)
        for module, forward in self.replaced:
            module.forward = forward
        return ruled

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Restore the original layers: gradients go to .grad."""
        for module, _ in self.replaced:
            del module.forward
        try:
            yield
        finally:
            for module, forward in self.replaced:
                module.forward = forward

    def _linear(self, module: torch.nn.Linear, name: str) -> Callable[..., torch.Tensor]:
        def forward(x: torch.Tensor) -> torch.Tensor:
            return _linear(x, module.weight, self, name)

        return forward

    def _dora(self, module: DoraLinearLayer, name: str) -> Callable[..., torch.Tensor]:
        """peft's DoRA layer, with the magnitude applied in one place: y = m (Wx + s B A x) / ‖W + s B A‖ − Wx."""

        def forward(
            x: torch.Tensor,
            *,
            lora_A: torch.nn.Linear,
            lora_B: torch.nn.Linear,
            scaling: float,
            base_layer: "torch.nn.Linear | Conv1D",
            base_result: torch.Tensor | None = None,
            adapter_name: str = "default",
        ) -> torch.Tensor:
            weight = dequantize_module_weight(base_layer).to(x.dtype)
            with torch.no_grad():
                delta = lora_B.weight @ lora_A.weight
                norm = module.get_weight_norm(weight, delta.to(x.dtype), scaling).float()
            if base_result is None:
                base_result = F.linear(x, transpose(weight, module.fan_in_fan_out))
            elif base_layer.bias is not None:
                base_result = base_result - base_layer.bias
            base_result = base_result.float()
            direction = (base_result + scaling * lora_B(lora_A(x)).float()) / norm
            return _scale(direction, module.weight, self, name) - base_result

        return forward

    def begin(self, units: int) -> None:
        """Discard collected gradients; the next passes belong to units 0 … units-1."""
        self.units, self.gradients = units, {}

    @contextlib.contextmanager
    def of(self, owners: list[int] | None) -> Iterator[None]:
        """One forward and backward pass whose row i belongs to unit owners[i]; None: collect nothing."""
        self.owners = owners
        try:
            yield
        finally:
            self.owners = None

    def add(self, name: str, rows: torch.Tensor) -> None:
        """Add the gradients (rows, *shape) of one layer and pass to those of their units."""
        rows = rows.float()
        if self.owners == list(range(self.units)):
            self.gradients[name] = self.gradients[name] + rows if name in self.gradients else rows
            return
        if name not in self.gradients:
            self.gradients[name] = rows.new_zeros(self.units, *rows.shape[1:])
        self.gradients[name].index_add_(0, torch.tensor(self.owners, device=rows.device), rows)

    def clip_into(self, total: dict[str, torch.Tensor], max_norm: float) -> torch.Tensor:
        """total[name] += Σ over units of g·min(1, max_norm/‖g‖); (units,) float64 norms, on the CPU.

        A unit whose norm is not finite counts as zero.
        """
        if not self.gradients:
            return torch.zeros(self.units, dtype=torch.float64)
        norms = [row_norms(gradient).cpu() for gradient in self.gradients.values()]
        norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms), dim=0)
        factor = (max_norm / (norm * (1 + SLACK))).clamp(max=1.0)
        finite = norm.isfinite()
        factor[~finite] = 0.0
        for name, gradient in self.gradients.items():
            if not finite.all():
                gradient[(~finite).to(gradient.device)] = 0.0
            total[name].add_((factor.to(gradient.device, torch.float32) @ gradient.flatten(1)).view_as(total[name]))
        self.gradients = {}
        return norm


def row_norms(gradient: torch.Tensor) -> torch.Tensor:
    """(rows,) float64 norms of (rows, …) float32; a float32 sum over a million squares would underestimate them."""
    if gradient.dim() > 2:
        gradient = torch.linalg.vector_norm(gradient, dim=-1)
    norms: torch.Tensor = torch.linalg.vector_norm(gradient.double().flatten(1), dim=1)
    return norms


# What is written down


def signal_to_noise(logical_batch: float, noise_multiplier: float, n_parameters: int) -> float:
    """Upper bound on ‖Σ clipped gradients‖ / E‖noise‖ in an average step: L·C over σ·C·√P."""
    return math.inf if noise_multiplier == 0 else logical_batch / (noise_multiplier * math.sqrt(n_parameters))
