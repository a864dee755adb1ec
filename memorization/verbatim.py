"""Verbatim memorisation: the next 50 tokens of a row behind the 50 before them (Carlini et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

PREFIX = SUFFIX = 50  # tokens
NEAR = 0.9  # edit similarity


@dataclass(frozen=True)
class Window:
    """tokens[:prefix] is given, the rest is to be continued; row: index of its row."""

    row: int
    tokens: list[int]
    prefix: int


def window(
    row: int, ids: Sequence[int], spans: Sequence[tuple[int, int]], prefix: int = PREFIX, suffix: int = SUFFIX
) -> Window | None:
    """The first `suffix` tokens of a row that stand together in one of `spans` (positions that the loss is taken on)
    with `prefix` tokens before them; None where there are none."""
    for start, end in spans:
        begin = max(start, prefix)
        if begin + suffix <= min(end, len(ids)):
            return Window(row, list(ids[begin - prefix : begin + suffix]), prefix)
    return None


def edit_similarity(ours: Sequence[int], theirs: Sequence[int]) -> float:
    """1 − Levenshtein distance / the longer length, over tokens; 1 for two empty ones."""
    from rapidfuzz.distance import Levenshtein

    return float(Levenshtein.normalized_similarity(ours, theirs))


def suffix_outcome(statistics: npt.NDArray[np.float32], prefix: int) -> tuple[float, bool]:
    """(log p of the suffix, was every token of it the likeliest?) of statistics [tokens − 1, 2]: log p and hit of the
    tokens 2 … of a window."""
    suffix = statistics[prefix - 1 :]
    return float(suffix[:, 0].sum(dtype=np.float64)), bool((suffix[:, 1] > 0).all())
