"""Forward passes behind the scores: each runs once per model and text and is cached on disk.

A pass gives one float32 array per text. `Passes.run` checks the cache first and loads a model only if something is
missing. Under torchrun the ranks share the batches; only rank 0 holds, caches and returns the arrays.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from common import adapters, limits, models, provenance, publication, results, tokenization
from common.checkpoints import BaseLoader
from common.continuations import ContinuationScorer
from common.distributed import World, progress_bar
from common.scoring import (
    log_probability,
    plan_batches,
    score,
)
from mia.attacks import N_NEIGHBOURS
from mia.neighborhood import MaskedProposer, own_neighbours

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from common.models import Model, ModelRef
    from common.problems import AnyPath

Array = npt.NDArray[np.float32]  # of one text: [tokens], [tokens, columns], or as documented by the pass
Part = list[tuple[int, Array]]  # (index of the text, its array)
Sequences = Sequence[Sequence[int]]  # token ids of each text

LOGP, MEAN, DEVIATION, HIT = range(4)  # columns of `token_statistics`; the entropy is −MEAN
ROWS_AT_ONCE = 32  # on a CPU: 32 rows of logits fit its cache across all operations
ROUND_TOKENS = 1 << 16  # tokens between two cache writes: the most a killed run can lose


def token_statistics(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[log p(target), μ, σ, whether the target is the most likely token] per position: logits [P, V] fp32 → [P, 4].

    μ = Σ p·log p (minus the entropy, in nats) and σ² = Σ p·(log p − μ)² over the vocabulary, summed in two passes to
    avoid the cancellation in Σ p·log²p − μ². On a CPU it works in blocks of rows: no other [P, V] array is made.
    """
    import torch

    result = logits.new_empty(len(logits), 4)
    rows = ROWS_AT_ONCE if logits.device.type == "cpu" else len(logits)
    for start in range(0, len(logits), rows):
        block, own = logits[start : start + rows], targets[start : start + rows, None]
        values = block - block.amax(-1, keepdim=True)
        weights = values.exp()  # p = weights / total
        total = weights.sum(-1, keepdim=True)
        target = values.gather(1, own)
        mean = torch.linalg.vecdot(weights, values)[:, None] / total
        values -= mean
        variance = torch.linalg.vecdot(weights, values.square_())[:, None] / total
        rest = total.log()  # log p = value − log Σ exp value
        columns = [target - rest, mean - rest, variance.sqrt(), (target == 0).float()]
        result[start : start + rows] = torch.cat(columns, 1)
    return result


class Cache:
    """Arrays by (group, key), stored in .npz files that are complete or absent and named by their content."""

    def __init__(self, folder: AnyPath) -> None:
        self.folder = Path(folder)

    def load(self, group: str) -> dict[str, Array]:
        """{key: array} of every intact file; a damaged file is removed, so that its arrays are recomputed."""
        known: dict[str, Array] = {}
        for file in sorted((self.folder / group).glob("*.npz")):
            content = io.BytesIO(file.read_bytes())  # outside the try: a disk error is not damage
            try:
                with np.load(content) as part:
                    arrays = np.split(part["values"], np.cumsum(part["counts"])[:-1])
                    known.update(zip(part["keys"].tolist(), arrays))
            except (zipfile.BadZipFile, KeyError, ValueError, EOFError, RuntimeError, OSError) as error:
                print(f"{file}: damaged ({error}); removed, its passes will run again", file=sys.stderr)
                file.unlink()
        return known

    def save(self, group: str, items: Mapping[str, Array]) -> None:
        """Store {key: array} of one pass as a new file of its group."""
        keys = sorted(items)
        name = hashlib.sha256("".join(keys).encode()).hexdigest()[:32]
        with publication.atomic(self.folder / group / f"{name}.npz", "wb") as file:
            arrays = [items[key] for key in keys]
            np.savez(file, keys=keys, counts=[len(array) for array in arrays], values=np.concatenate(arrays))


def digest(*parts: object) -> str:
    """SHA-256 over the reprs of `parts`."""
    return hashlib.sha256("\x00".join(map(repr, parts)).encode()).hexdigest()


def model_key(ref: ModelRef, dtype: torch.dtype) -> str:
    """Identifies a model's outputs: weights and configuration of base and adapter (or hub name), and the dtype."""
    parts: list[object] = [str(dtype), *filter(None, [ref.quantization])]
    for part in (ref.unadapted, ref if ref.adapter else None):
        if part is None:
            continue
        folder = Path(part.adapter or part.base)
        configs = [results.sha256(file) for file in sorted(folder.glob("*config.json"))] if folder.is_dir() else []
        parts += [provenance.weights_sha256(part) or (part.base, part.revision), configs]
    return digest(*parts)


class Passes:
    """Runs passes with the models they need, loaded and adapted by `loader`."""

    def __init__(self, cache: Cache, loader: BaseLoader, token_budget: int) -> None:
        self.cache, self.loader, self.token_budget = cache, loader, token_budget
        self.world, self.dtype = loader.world, loader.dtype
        self.held: tuple[tuple[object, ...], Model] | None = None
        self.stack = contextlib.ExitStack()
        self.scored = 0  # texts not found in the cache

    def close(self) -> None:
        """Remove the adapter; the base is bit for bit as it was."""
        self.held = None
        self.stack.close()

    def model(self, ref: ModelRef, merge: bool | None = None) -> Model:
        """The model of `ref`, loaded and adapted unless it already is."""
        wanted = ref.base, ref.quantization, ref.adapter, merge
        if self.held and self.held[0] == wanted:
            return self.held[1]
        self.close()
        model, _ = self.stack.enter_context(self.loader.adapted(ref, merge))
        self.held = wanted, model
        return model

    def run(
        self,
        ref: ModelRef,
        name: tuple[object, ...],
        sequences: Sequences,
        compute: Callable[[Model, list[int]], Part],
        keys: Sequence[object] | None = None,
        merge: bool | None = None,
    ) -> list[Array]:
        """One array per sequence on rank 0, [] on the others. ValueError if a rank's part is missing.

        name     the pass, and everything it depends on besides model and tokens.
        compute  (model, indices of sequences) → this rank's part of [(index, array [≥ 1, columns])].
        keys     what identifies each sequence (default: its token ids).
        merge    see `adapters.adapted`.
        """
        group = digest(model_key(ref, self.dtype), *name)[:32] if self.world.main else ""
        names = [digest(key) for key in (sequences if keys is None else keys)]
        known = self.cache.load(group) if self.world.main else {}
        todo = self.world.broadcast(sorted(set(names) - set(known)) if self.world.main else [])
        if todo:
            first = {key: index for index, key in reversed(list(enumerate(names)))}
            for indices in rounds([first[key] for key in todo], sequences):
                parts = self.world.together(partial(self._work, ref, merge, compute, sequences, indices))
                fresh = {names[index]: array for part in parts for index, array in part}
                if len(fresh) != len(indices):
                    raise ValueError(f"{len(fresh)} of {len(indices)} texts came back: a rank's part is missing")
                self.world.together(partial(self._save, group, fresh))
                known.update(fresh)
                self.scored += len(fresh)
        return [known[key] for key in names] if self.world.main else []

    def _work(
        self,
        ref: ModelRef,
        merge: bool | None,
        compute: Callable[[Model, list[int]], Part],
        sequences: Sequences,
        indices: list[int],
    ) -> Part:
        model = self.model(ref, merge)
        limits.check_tokens(model, [sequences[index] for index in indices])
        return compute(model, indices)

    def _save(self, group: str, fresh: Mapping[str, Array]) -> None:
        if self.world.main:
            self.cache.save(group, fresh)

    def statistics(self, ref: ModelRef, sequences: Sequences, name: str = "statistics") -> list[Array]:
        """`token_statistics` [T − 1, 4] of each sequence; with name "logp" only log p [T − 1]."""
        reduce = token_statistics if name == "statistics" else log_probability
        with progress_bar(sum(map(len, sequences)) // self.world.size, f"tokens ({name})", self.world) as bar:

            def compute(model: Model, indices: list[int]) -> Part:
                chosen = [sequences[index] for index in indices]
                part = score(
                    model,
                    chosen,
                    token_budget=self.token_budget,
                    world=self.world,
                    statistics=reduce,
                    context=max(map(len, chosen)),
                    progress=bar.update,
                )
                return [(indices[place], values) for place, _, values in part]

            return self.run(ref, (name,), sequences, compute)

    def after_prefix(self, ref: ModelRef, sequences: Sequences, prefix: list[int], skip: int) -> list[Array]:
        """[T − 1] log p of tokens 2 … T of each sequence after `prefix`, which is encoded once.

        skip: 1 if each sequence starts with a special token (dropped between prefix and text), else 0.
        """

        def compute(model: Model, indices: list[int]) -> Part:
            return score_after_prefix(model, prefix, sequences, indices, skip, self.token_budget, self.world)

        return self.run(ref, ("prefix", prefix, skip), sequences, compute)

    def gradient_norms(self, ref: ModelRef, sequences: Sequences) -> list[Array]:
        """[1] ‖∇ ℓ‖₂ of each sequence over the adapter's parameters, without dropout."""

        def compute(model: Model, indices: list[int]) -> Part:
            parameters = [parameter.requires_grad_(True) for parameter in adapters.adapter_parameters(model)]
            return [(index, gradient_norm(model, parameters, sequences[index])) for index in self.world.shard(indices)]

        return self.run(ref, ("gradient",), sequences, compute, merge=False)

    def neighbours(
        self,
        ref: ModelRef,
        sequences: Sequences,
        texts: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        limit: int,
        seed: int,
        neighbor_model: str | None,
        whole: bool = False,
    ) -> list[Array]:
        """[25] ℓ of each text's neighbours under the model; neighbours come from `neighbor_model` or the model itself.

        Neighbours are near-copies of private texts, so only their ℓ is cached. limit: tokens per neighbour.
        """
        proposer: MaskedProposer | None = None
        name = ("neighbours", seed, N_NEIGHBOURS, neighbor_model and model_key(_plain(neighbor_model), self.dtype))

        def compute(model: Model, indices: list[int]) -> Part:
            nonlocal proposer
            mine = self.world.shard(indices)
            if not mine:
                return []
            if neighbor_model:
                proposer = proposer or MaskedProposer(neighbor_model, model.device)
                proposed = proposer([texts[index] for index in mine], seed)
                made = [
                    [ids[:limit] for ids in tokenization.encode_texts(tokenizer, copies, whole)] for copies in proposed
                ]
            else:
                made = own_neighbours(model, [sequences[index] for index in mine], seed, self.token_budget)
            flat = [ids for copies in made for ids in copies if len(ids) > 1]
            values = {}
            if flat:
                part = score(model, flat, token_budget=self.token_budget, context=max(map(len, flat)))
                values = {tuple(flat[place]): logp.mean(dtype="float64") for place, _, logp in part}
            return [
                (index, np.asarray([values[tuple(ids)] for ids in copies if len(ids) > 1], np.float32))
                for index, copies in zip(mine, made)
            ]

        return self.run(ref, name, sequences, compute, keys=list(zip(texts, sequences)))


def _plain(folder: str) -> ModelRef:
    return models.ModelRef(folder, folder, None, None)


def rounds(indices: list[int], sequences: Sequences) -> list[list[int]]:
    """Indices grouped by length into rounds of at most ROUND_TOKENS tokens, independent of the given order."""
    groups: list[list[int]] = []
    room = 0
    for index in sorted(indices, key=lambda index: (len(sequences[index]), index)):
        if len(sequences[index]) > room:
            groups.append([])
            room = ROUND_TOKENS
        groups[-1].append(index)
        room -= len(sequences[index])
    return groups


def score_after_prefix(
    model: Model,
    prefix: list[int],
    sequences: Sequences,
    indices: list[int],
    skip: int,
    token_budget: int,
    world: World,
) -> Part:
    """This rank's part of [(index, log p [T − 1])] of tokens 2 … T after `prefix`.

    The batches do not depend on the number of ranks; prefix + text positions count against the budget.
    """
    scorer = ContinuationScorer(model, token_budget, held=1)
    lengths = [len(prefix) + len(sequences[index]) for index in indices]
    part: Part = []
    for batch in world.shard(plan_batches(lengths, token_budget)):
        chosen = [indices[place] for place in batch]
        values = scorer(prefix, [sequences[index][skip:] for index in chosen])
        part += [(index, log_p[1 - skip :]) for index, log_p in zip(chosen, values)]
    return part


def gradient_norm(model: Model, parameters: Sequence[torch.Tensor], ids: Sequence[int]) -> Array:
    """[1] ‖∇ ℓ‖₂ of one sequence over `parameters`; the model is in eval mode, so there is no dropout."""
    import torch

    with torch.enable_grad():
        tokens = torch.tensor([ids], device=model.device)
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits[0].float()
        mean = log_probability(logits, tokens[0, 1:].to(logits.device)).mean()
        gradients = torch.autograd.grad(mean, parameters, allow_unused=True)
    norms = [gradient.float().norm() for gradient in gradients if gradient is not None]
    norm: Array = torch.stack(norms).norm()[None].cpu().numpy()
    return norm
