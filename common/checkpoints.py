"""Many checkpoints, one base in memory: the base is loaded once, and adapted and restored for each checkpoint."""

from __future__ import annotations

import gc
import re
import traceback
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from common import adapters, models, sharding
from common.distributed import World
from common.problems import AnyPath, Problems, UserError, is_utf8

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PathT = TypeVar("PathT", bound=AnyPath)
Job = TypeVar("Job", bound=tuple[Any, ...])


def find_checkpoints(folder: AnyPath) -> list[Path]:
    """Every checkpoint-* directory below `folder` (or itself), in natural order: checkpoint-9 before checkpoint-10.

    UserError for names that are not UTF-8, which a record cannot hold.
    """
    folder = Path(folder)
    checkpoints = [folder] if folder.name.startswith("checkpoint-") else folder.rglob("checkpoint-*")
    # an unfinished checkpoint stays in a hidden directory until it is complete
    checkpoints = [
        path
        for path in checkpoints
        if path.is_dir() and not any(x.startswith(".") for x in path.relative_to(folder).parts)
    ]
    if odd := [path for path in checkpoints if not is_utf8(str(path))]:
        raise UserError(*(f"{path}: not UTF-8; rename the folder" for path in odd))
    return sorted(checkpoints, key=natural_key)


def natural_key(path: AnyPath) -> list[Any]:
    """Sort key that compares the numbers in a path as numbers."""
    return [int(part) if index % 2 else part for index, part in enumerate(re.split(r"(\d+)", str(path)))]


def look_up_all(
    problems: Problems,
    paths: Iterable[PathT],
    revision: str | None,
    base_model: str | None,
    flag: str,
    quantized: str | None = None,
) -> tuple[list[tuple[PathT, models.ModelRef, PreTrainedTokenizerBase | None]], dict[str, str]]:
    """([(path, ModelRef, tokenizer)], {path: why it cannot be used}) of many models, from their files.

    Unusable models are a problem only if none is usable. If there are problems already, tokenizers are None and
    transformers is not imported: see `models.look_up`.
    """
    usable, unusable, reasons = [], {}, []
    files_only = bool(problems.lines)
    for path in paths:
        try:
            ref = models.find_model(str(path), revision, base_model, flag, files_only=files_only, quantized=quantized)
            usable.append((path, ref, None if files_only else models.load_tokenizer(ref, flag)))
        except UserError as error:
            unusable[str(path)] = "; ".join(error.problems)
            reasons += error.problems
    if not usable:
        problems.lines.extend(reasons)
    return usable, unusable


def load_base(ref: models.ModelRef, dtype: torch.dtype, world: World, device_map: str | None = None) -> PreTrainedModel:
    """`models.load_base` on this rank's device, or spread over its model group."""
    if world.model_group is None:
        return models.load_base(ref, dtype, world.device, device_map)
    config = models.read_config(ref.base, ref.revision, "--model")
    if ref.quantization or getattr(config, "quantization_config", None):
        raise UserError(f"{ref.base}: is quantised, so its layers cannot be spread; drop --model_parallel")
    model = models.load_base(ref, dtype, "cpu")
    sharding.spread(model, world.model_group)
    return model


class BaseLoader:
    """Holds the last requested base; it is freed before another one is loaded."""

    def __init__(self, world: World, dtype: torch.dtype, device_map: str | None = None) -> None:
        self.world, self.dtype, self.device_map = world, dtype, device_map
        self._loaded: dict[tuple[str, str | None], PreTrainedModel] = {}

    def base(self, ref: models.ModelRef) -> PreTrainedModel:
        """The unadapted base of `ref`, in eval mode."""
        wanted = ref.base, ref.quantization
        if wanted not in self._loaded:
            self.clear()
            self._loaded[wanted] = load_base(ref, self.dtype, self.world, self.device_map)
        return self._loaded[wanted]

    def adapted(
        self, ref: models.ModelRef, merge: bool | None = None
    ) -> AbstractContextManager[tuple[models.Model, float | None]]:
        """`adapters.adapted` with the adapter of `ref` applied to its base."""
        return adapters.adapted(self.base(ref), ref.adapter, merge)

    def clear(self) -> None:
        """Free the base."""
        self._loaded.clear()
        gc.collect()


def by_base(jobs: Iterable[Job]) -> list[Job]:
    """Jobs (ModelRef, …) grouped by base, bases and jobs in the given order."""
    jobs = list(jobs)
    bases = list(dict.fromkeys(job[0].base for job in jobs))
    return sorted(jobs, key=lambda job: bases.index(job[0].base))


def for_each(jobs: Iterable[Job], measure: Callable[..., object], loader: BaseLoader) -> dict[str, str]:
    """Call measure(number from 1, ModelRef, …) for every job (ModelRef, …); returns {model: why it failed}.

    After a failure the remaining jobs still run; the base, whose state is unknown, is reloaded.
    """
    failures = {}
    for number, (ref, *rest) in enumerate(by_base(jobs), 1):
        try:
            measure(number, ref, *rest)
        except UserError as error:
            failures[ref.name] = "; ".join(error.problems)
        except Exception as error:
            if loader.world.model_group:  # the other ranks may be anywhere: they end with this one
                raise
            traceback.print_exc()
            failures[ref.name] = f"{type(error).__name__}: {error}"
            loader.clear()
    return failures
