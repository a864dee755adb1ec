"""One process, or many under torchrun: ranks, devices, sums, gathers, one progress bar. No-ops without torchrun."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

from common.problems import Problems, UserError
from common.process import leave_after_main

if TYPE_CHECKING:
    import torch
    from torch.distributed.distributed_c10d import Store
    from tqdm import tqdm

    from common.sharding import Group

T = TypeVar("T")

MEETING = timedelta(minutes=10)  # all processes must start within this time


@dataclass(frozen=True)
class World:
    """This process's place in the group. `device` is a torch device string; `backend` is None, 'gloo' or 'nccl'.

    model_group: the ranks that hold one model between them (--model_parallel); a rank that waits here for the others
    goes on giving them its share of the layers. opened: this World set the process group up, and closes it.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: str = "cpu"
    backend: str | None = None
    model_group: Group | None = None
    opened: bool = True

    @property
    def main(self) -> bool:
        """Whether this is rank 0, the only one that prints and writes."""
        return self.rank == 0

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """Every size-th item starting at `rank`: balanced if neighbouring items cost about the same."""
        return items[self.rank :: self.size]

    def settle(self) -> None:
        """Wait until no rank of the model group needs a layer."""
        if self.model_group:
            self.model_group.serve()

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """All-reduce SUM in place; returns the tensor."""
        if self.backend:
            import torch.distributed as dist

            self.settle()
            dist.all_reduce(tensor)
        return tensor

    def gather(self, item: T) -> list[T]:
        """The picklable `item` of every rank, in rank order, on every rank."""
        if not self.backend:
            return [item]
        import torch.distributed as dist

        self.settle()
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def together(self, work: Callable[[], T]) -> list[T]:
        """gather(work()), but if `work` raises on one rank, every rank raises instead of waiting forever.

        That rank raises its own exception, the others a RuntimeError with its message.
        """
        if not self.backend:
            return [work()]
        mine: Any = None
        failure: Exception | None = None
        try:
            mine = work()
        except Exception as error:
            failure = error
        words = f"rank {self.rank}: {type(failure).__name__}: {failure}" if failure else None
        parts: list[tuple[Any, str | None]] = self.gather((mine, words))
        if failure:
            raise failure
        if failures := [message for _, message in parts if message]:
            raise RuntimeError("; ".join(failures))
        return [item for item, _ in parts]

    def broadcast(self, item: T | None) -> T:
        """Rank 0's picklable `item` on every rank; the other ranks' argument is ignored."""
        box: list[Any] = [item]
        if self.backend:
            import torch.distributed as dist

            self.settle()
            dist.broadcast_object_list(box, src=0)
        return cast(T, box[0])

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.backend:
            import torch.distributed as dist

            self.settle()
            dist.barrier()

    def close(self) -> None:
        """Leave the process group, if this World set it up."""
        if self.backend and self.opened:
            import torch.distributed as dist

            self.settle()
            _groups.clear()
            dist.destroy_process_group()
            leave_after_main()

    def say(self, *words: object) -> None:
        """print on rank 0."""
        if self.main:
            print(*words, flush=True)


def check_environment(
    problems: Problems, device_map: str | None = None, model_parallel: int = 1, quantized: str | None = None
) -> None:
    """WORLD_SIZE > 1 needs RANK, MASTER_ADDR and MASTER_PORT (torchrun sets all of them), and no --device_map; it must
    be a multiple of --model_parallel, which is not possible with --quantization (`quantized`)."""
    if quantized and model_parallel > 1:
        problems.add(
            f"--quantization {quantized}: the layers of a quantised model cannot be spread; drop --model_parallel"
        )
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdigit() or int(size) < 1:
        problems.add(f"WORLD_SIZE={size}: must be a whole number of 1 or more")
    elif int(size) == 1 and model_parallel > 1:
        problems.add(
            f"--model_parallel {model_parallel}: there is only one process; start with torchrun --nproc_per_node="
            f"{model_parallel}, or a multiple of it"
        )
    elif int(size) % model_parallel:
        problems.add(f"--model_parallel {model_parallel}: does not divide the {size} processes; start a multiple of it")
    elif int(size) > 1:
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            problems.add(f"WORLD_SIZE={size} but {', '.join(missing)} not set: start with torchrun, or set them")
        if device_map:
            problems.add(
                f"--device_map {device_map}: each of the {size} processes would use all devices; drop one or the other"
            )


def node_size() -> int:
    """Number of processes that torchrun started on this machine; all of them if it does not say."""
    size = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE", "1")
    return int(size) if size.isdigit() and int(size) else 1


def _meet(rank: int, size: int) -> Store:
    """The rendezvous store of all processes; UserError if some never arrive."""
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    try:
        store: Store = next(rendezvous("env://", rank, size, timeout=MEETING))[0]
        store.set(f"here {rank}", "")
        store.wait([f"here {other}" for other in range(size)], MEETING)
    except (dist.DistError, RuntimeError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"WORLD_SIZE={size}: not all processes joined at {address} within {MEETING} ({reason}); start all of them"
        ) from None
    return store


_groups: dict[int, Group] = {}  # --model_parallel → this process's group, in the present process group


def _model_group(world: World, size: int) -> Group | None:
    """The `size` neighbouring ranks, this one among them, that hold one model."""
    if size == 1:
        return None
    if size not in _groups:
        import torch.distributed as dist

        from common.sharding import Group

        for first in range(0, world.size, size):  # every rank takes part in making every group
            ranks = list(range(first, first + size))
            data, control = dist.new_group(ranks), dist.new_group(ranks, backend="gloo")
            if world.rank in ranks:
                _groups[size] = Group(world.rank - first, size, world.device, data, control)
    return _groups[size]


def start(group_of_one: bool = False, model_parallel: int = 1) -> World:
    """Join the process group that torchrun set up, if any.

    group_of_one: create a group even for a single process (FSDP2 needs a device mesh).
    model_parallel: number of ranks that hold one model between them.
    """
    import torch

    rank = int(os.environ.get("RANK", 0))
    size = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    cuda = torch.cuda.is_available()
    device = f"cuda:{local_rank}" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(local_rank)
    if size == 1 and not group_of_one:
        return World(device=device)
    import torch.distributed as dist

    backend = "nccl" if cuda else "gloo"
    opened = not dist.is_initialized()
    if opened:
        store = _meet(rank, size) if "MASTER_PORT" in os.environ else dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(
            backend,
            rank=rank,
            world_size=size,
            store=store,
            timeout=timedelta(hours=6),
            device_id=torch.device(device) if cuda else None,
        )
    world = World(rank, size, local_rank, device, backend, opened=opened)
    return replace(world, model_group=_model_group(world, model_parallel))


def progress_bar(total: int | None, unit: str, world: World | None = None) -> tqdm[Any]:
    """A tqdm bar of `total` `unit`s (None: unknown) with .update(n), usable as a context manager; silent except on
    rank 0, and one log line every 30 seconds without a terminal."""
    from tqdm import tqdm

    silent = world is not None and not world.main
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total, unit=f" {unit}", disable=silent, mininterval=0.1 if terminal else 30, delay=0 if terminal else 30
    )
