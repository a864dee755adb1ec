"""log p of many continuations of one context: the context is encoded once and its keys and values are shared.

Before first use, and whenever the context length has doubled, the shared path must reproduce plain forward passes.
Where it does not (state-space models, caches that cannot be repeated), plain passes are used instead.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from common.scoring import LOGIT_VALUES, PROBE_TOKENS, SMALLEST_CHUNK, TOKEN_BUDGET, join, score, split_head

if TYPE_CHECKING:
    import torch

Floats = npt.NDArray[np.float32]
HELD = 8  # positions whose keys and values may be cached, per token of the token budget
TOLERANCE = 1e-3  # nats per token in single precision; a hundred times that in half precision


class ContinuationScorer:
    """Scores continuations with one model in eval mode; the keys and values of the last context are kept.

    token_budget: positions (padding included) per forward pass; a single longer continuation still runs alone.
    held: positions of context and continuations whose keys and values may exist at once, per token of the budget.
    """

    def __init__(self, model: Any, token_budget: int = TOKEN_BUDGET, held: int = HELD):
        self.model, self.token_budget, self.held = model, token_budget, held
        self.shares = True  # whether the shared path reproduces the model's own numbers
        self.checked = 1  # tokens of the longest context it was checked on; one token needs no cache
        self.parts: tuple[Any, Any, int] | None = None
        self.encoded: tuple[list[int], Any] | None = None  # the last context and its cache

    def __call__(self, context: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[Floats]:
        """[tokens] log p (nats) of each continuation's tokens after `context`, which has at least one token."""
        if not context:
            raise ValueError("a context needs at least one token")
        if not all(continuations):
            raise ValueError("a continuation needs at least one token")
        twice = len(context) >= 2 * self.checked  # sliding windows and position scaling start at some length
        if self.shares and twice:
            self.shares, self.checked = self._agrees(context, continuations), len(context)
        return (self._shared if self.shares else self._plain)(context, continuations)

    def _plain(self, context: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[Floats]:
        sequences = [[*context, *tokens] for tokens in continuations]
        longest = max(map(len, sequences))
        parts = score(self.model, sequences, token_budget=self.token_budget, context=longest)
        return [values[len(context) - 1 :] for values in join(sequences, [parts])]

    def _agrees(self, context: Sequence[int], continuations: Sequence[Sequence[int]]) -> bool:
        import torch

        few = [list(continuations[0]), max(map(list, continuations), key=len)]
        try:
            shared = self._shared(context, few)
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, TypeError, NotImplementedError, RuntimeError, ValueError, IndexError):
            return False
        slack = TOLERANCE if self.model.dtype == torch.float32 else 100 * TOLERANCE
        return all(
            np.allclose(shared_values, other, rtol=0, atol=slack)
            for shared_values, other in zip(shared, self._plain(context, few), strict=True)
        )

    def _shared(self, context: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[Floats]:
        import torch

        with torch.no_grad():
            if self.parts is None:
                self.parts = split_head(self.model, list(context[:PROBE_TOKENS]))
            trunk, head, vocabulary = self.parts
            cache = self._encode(trunk, list(context))
            order = sorted(range(len(continuations)), key=lambda index: (-len(continuations[index]), index))
            chunk = max(SMALLEST_CHUNK, LOGIT_VALUES // vocabulary)
            scores: list[Floats] = [np.empty(0, np.float32)] * len(continuations)
            while order:
                longest = len(continuations[order[0]])
                held = self.held * self.token_budget // (len(context) + longest)
                rows = max(1, min(self.token_budget // longest, held))
                batch, order = order[:rows], order[rows:]
                chosen = [continuations[index] for index in batch]
                for index, values in zip(batch, self._batch(trunk, head, chunk, cache, context[-1], chosen)):
                    scores[index] = values
        return scores

    def _encode(self, trunk: Any, context: list[int]) -> Any:
        """Keys and values of all tokens but the last, which starts every continuation's own pass; None without one."""
        import torch

        if self.encoded is None or self.encoded[0] != context:
            self.encoded = None  # the earlier one goes before the next is made
            cache = None
            if len(context) > 1:
                ids = torch.tensor([context[:-1]], device=self.model.device)
                cache = trunk(input_ids=ids, use_cache=True).past_key_values
            self.encoded = context, cache
        return self.encoded[1]

    def _batch(
        self, trunk: Any, head: Any, chunk: int, cache: Any, opening: int, continuations: list[Sequence[int]]
    ) -> list[Floats]:
        import torch

        ids = torch.zeros(len(continuations), len(continuations[0]), dtype=torch.long)
        rows: list[int] = []
        columns: list[int] = []
        targets: list[int] = []
        for row, tokens in enumerate(continuations):
            ids[row, : len(tokens)] = torch.tensor([opening, *tokens[:-1]])
            rows += [row] * len(tokens)
            columns += range(len(tokens))
            targets += list(tokens)
        own = copy.deepcopy(cache)
        if own is not None:
            own.batch_repeat_interleave(len(continuations))
        states = trunk(input_ids=ids.to(self.model.device), past_key_values=own, use_cache=True)[0][rows, columns]
        wanted = torch.tensor(targets, device=states.device)
        values: list[torch.Tensor] = []
        for start in range(0, len(wanted), chunk):
            logits = states[start : start + chunk] if head is None else head(states[start : start + chunk])
            logits = logits.float()
            aims = wanted[start : start + chunk].to(logits.device)
            values.append(logits.log_softmax(-1).gather(1, aims[:, None])[:, 0].cpu())
        counts = [len(tokens) for tokens in continuations]
        return [part.numpy() for part in torch.cat(values).split(counts)]
