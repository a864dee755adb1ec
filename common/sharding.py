"""A model larger than one device: its decoder layers are spread over the ranks of a group (--model_parallel).

Each rank holds a share of every layer and works on its own rows. Before a layer runs, the ranks tell each other which
layer each of them needs, gather these from their shares, and drop them after use, as ZeRO-3 does (Rajbhandari et al.
2020, arXiv:1910.02054). A rank without work (fewer rows, an error, waiting for the others) goes on taking part until
the whole group is idle (`Group.serve`). So the ranks need not run the same passes, no pass is computed twice, and the
weights, hence the results, are bit for bit those of the whole model.

This is not FSDP2: that would need equally many passes on every rank, and its DTensors can be neither merged into nor
adapted by peft. Nor is it tensor parallelism, whose sums round differently and whose plans many families lack.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from common.problems import UserError

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

IDLE = -1
ALIGNED = 16  # bytes: every parameter starts at a multiple of this in the buffer of its layer


def _all_gather(whole: torch.Tensor, share: torch.Tensor, group: ProcessGroup) -> None:
    import torch.distributed as dist

    # torch 2.13 renamed it
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(whole, share, group=group)


class Group:
    """The ranks that hold one model between them. `data` carries weights, `control` (gloo) which layers are needed."""

    def __init__(self, rank: int, size: int, device: str, data: ProcessGroup, control: ProcessGroup) -> None:
        self.rank, self.size, self.device, self.data, self.control = rank, size, device, data, control
        self.layers: list[weakref.ref[Layer]] = []  # numbered alike on every rank
        self.buffers: list[torch.Tensor | None] = [None, None]  # taking turns: one is filled while the other is in use
        self.turn = 0
        self.held: tuple[int, torch.Tensor] | None = None  # the layer that a backward pass is in
        self.stream: torch.cuda.Stream | None = None
        self.free: list[torch.cuda.Event] = []  # per buffer: the work that used it is done
        if device.startswith("cuda"):
            import torch

            self.stream, self.free = torch.cuda.Stream(device), [torch.cuda.Event(), torch.cuda.Event()]

    def needed(self, number: int) -> list[int]:
        """The layers that the ranks need now, in order, without duplicates; `number`: this rank's, or IDLE."""
        import torch

        everyone = torch.empty(self.size, dtype=torch.long)
        _all_gather(everyone, torch.tensor([number]), self.control)
        return sorted(set(everyone.tolist()) - {IDLE})

    def gather(self, number: int, own_buffer: bool) -> torch.Tensor:
        """The bytes of layer `number`, in a buffer of its own or in one that is overwritten after the next gather."""
        import torch

        layer = self.layers[number]() if number < len(self.layers) else None
        if layer is None:  # the ranks are no longer at the same model: waiting would never end
            print(f"rank {self.rank} of its group does not have layer {number} any more", file=sys.stderr, flush=True)
            os._exit(1)
        if own_buffer:
            whole = torch.empty(layer.size, dtype=torch.uint8, device=self.device)
            _all_gather(whole, layer.share, self.data)
            return whole
        self.turn ^= 1
        buffer = self.buffers[self.turn]
        if buffer is None or len(buffer) < layer.size:
            self.synchronize()
            size = max(layer_left.size for ref in self.layers if (layer_left := ref()))
            buffer = self.buffers[self.turn] = torch.empty(size, dtype=torch.uint8, device=self.device)
            self.synchronize()
        whole = buffer[: layer.size]
        if self.stream is None:
            _all_gather(whole, layer.share, self.data)
            return whole
        self.stream.wait_event(self.free[self.turn])
        with torch.cuda.stream(self.stream):  # overlaps with the layer that is being computed
            _all_gather(whole, layer.share, self.data)
        torch.cuda.current_stream().wait_stream(self.stream)
        return whole

    def release(self) -> None:
        """The latest buffer is no longer read by work queued after this call."""
        if self.stream is not None:
            self.free[self.turn].record()

    def fetch(self, number: int, own_buffer: bool) -> torch.Tensor:
        """`gather`, after and before the layers that the other ranks need."""
        mine = None
        for other in self.needed(number):
            whole = self.gather(other, own_buffer or mine is not None)
            if other == number:
                mine = whole
            elif mine is None:
                self.release()
        assert mine is not None
        return mine

    def serve(self) -> None:
        """Take part in the other ranks' gathers until the whole group is idle."""
        while order := self.needed(IDLE):
            for number in order:
                self.gather(number, own_buffer=False)
                self.release()

    def synchronize(self) -> None:
        """Wait for the work queued on this rank's device."""
        if self.stream is not None:
            import torch

            torch.cuda.synchronize(self.device)


class Layer:
    """One decoder layer. Its parameters have their values only while it runs, or in `whole`; otherwise they are NaN
    without memory, of the same shape, type and device, so that reading them elsewhere shows."""

    def __init__(self, group: Group, module: torch.nn.Module, parameters: list[torch.nn.Parameter]) -> None:
        import torch

        self.group, self.parameters = group, parameters
        self.number = len(group.layers)
        group.layers.append(weakref.ref(self))
        self.places: list[tuple[int, int]] = []
        end = 0
        for parameter in parameters:
            self.places.append((end, end + parameter.numel() * parameter.element_size()))
            end = -(-self.places[-1][1] // ALIGNED) * ALIGNED
        part = -(-end // (group.size * ALIGNED)) * ALIGNED
        self.size, self.mine = part * group.size, slice(part * group.rank, part * (group.rank + 1))
        self.share = torch.empty(part, dtype=torch.uint8, device=group.device)
        self.stubs = [
            torch.full((), float("nan"), dtype=parameter.dtype, device=group.device).expand(parameter.shape)
            for parameter in parameters
        ]
        self.keep()
        self.drop()
        of, run = weakref.ref(module), type(module).forward  # no cycle: the model is freed without the collector

        @functools.wraps(run)
        def forward(*args: Any, **options: Any) -> Any:
            whole = self.take(own_buffer=torch.is_grad_enabled())
            try:
                with self._without_weights(whole) if torch.is_grad_enabled() else contextlib.nullcontext():
                    return run(of(), *args, **options)
            finally:
                self.drop()
                group.release()

        module.forward = forward

    def _without_weights(self, whole: torch.Tensor) -> contextlib.AbstractContextManager[None]:
        """Autograd keeps the place of the layer's weights instead of their values, and gathers them again in the
        backward pass."""
        import torch

        start = whole.untyped_storage().data_ptr()

        def pack(item: torch.Tensor) -> Any:
            if item.untyped_storage().data_ptr() != start:
                return item
            return item.dtype, item.storage_offset(), item.shape, item.stride()

        def unpack(kept: Any) -> torch.Tensor:
            if isinstance(kept, torch.Tensor):
                return kept
            if self.group.held is None or self.group.held[0] != self.number:
                self.group.held = None
                self.group.held = self.number, self.group.fetch(self.number, own_buffer=True)
            dtype, *place = kept
            empty = torch.empty(0, dtype=dtype, device=self.group.device)
            return empty.set_(self.group.held[1].untyped_storage(), *place)

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def take(self, own_buffer: bool = False) -> torch.Tensor:
        """Give the parameters their values, which are parts of the result; a collective of the group."""
        import torch

        self.group.held = None
        with torch.inference_mode(False), torch.no_grad():
            whole = self.group.fetch(self.number, own_buffer)
            for parameter, (begin, end) in zip(self.parameters, self.places):
                parameter.data = whole[begin:end].view(parameter.dtype).view(parameter.shape)
        return whole

    def drop(self) -> None:
        """Take the values away again."""
        for parameter, stub in zip(self.parameters, self.stubs):
            parameter.data = stub

    def keep(self) -> None:
        """Make the parameters' present values those of the layer: this rank keeps its share of them."""
        import torch

        whole = torch.empty(self.size, dtype=torch.uint8, device=self.parameters[0].device)
        for parameter, (begin, end) in zip(self.parameters, self.places):
            whole[begin:end] = parameter.data.contiguous().view(-1).view(torch.uint8)
        self.put(whole[self.mine])

    def put(self, share: torch.Tensor) -> None:
        """Replace this rank's share."""
        self.share.copy_(share)
        self.group.synchronize()

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """The parameters have their values inside; a collective of the group."""
        self.take(own_buffer=True)
        try:
            yield
        finally:
            self.drop()


def layers_of(model: Any) -> list[Layer]:
    """The spread layers of a model; [] for a model that is whole."""
    layers: list[Layer] = getattr(model, "spread_layers", [])
    return layers


def ranks_of(model: Any) -> int:
    """Number of ranks that a model is spread over."""
    layers = layers_of(model)
    return layers[0].group.size if layers else 1


def spread(model: Any, group: Group) -> None:
    """Spread a model, loaded on the CPU on every rank, over the group. UserError if it has no layers to spread."""
    import torch

    blocks = _blocks(model)
    owners = Counter(id(item) for block in blocks for item in {id(p): p for p in block.parameters()}.values())
    outside = {id(item) for item in _outside(model, blocks)}
    layers = []
    inside = {id(item): item.numel() for block in blocks for item in block.parameters()}
    for block in blocks:
        own = {id(item): item for item in block.parameters() if owners[id(item)] == 1 and id(item) not in outside}
        own = {key: item for key, item in own.items() if item.is_floating_point() and item.numel()}
        if own:
            layers.append(Layer(group, block, list(own.values())))
    ids = {id(item) for layer in layers for item in layer.parameters}
    if not layers or 2 * sum(inside[key] for key in ids) < sum(inside.values()):
        raise UserError(f"{type(model).__name__}: has no decoder layers that can be spread; drop --model_parallel")
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in ids:
                parameter.data = parameter.data.to(group.device)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(group.device)
    model.spread_layers = layers
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[0, 1]], device=group.device), use_cache=False).logits
    if logits.isnan().any():
        raise UserError(
            f"{type(model).__name__}: reads weights of a layer outside of it, so it cannot be spread; drop "
            "--model_parallel"
        )


def _blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules in the outermost lists of modules: the decoder layers, by whatever name."""
    from torch.nn import ModuleList

    blocks: dict[int, torch.nn.Module] = {}

    def visit(module: torch.nn.Module) -> None:
        for child in module.children():
            if isinstance(child, ModuleList):
                blocks.update({id(block): block for block in child})
            else:
                visit(child)

    visit(model)
    return list(blocks.values())


def _outside(model: torch.nn.Module, blocks: list[torch.nn.Module]) -> Iterator[torch.nn.Parameter]:
    """The parameters of the modules that are not in one of the blocks."""
    inside = {id(module) for block in blocks for module in block.modules()}
    for module in model.modules():
        if id(module) not in inside:
            yield from module.parameters(recurse=False)
