"""Verbatim memorisation: 50 tokens of a row, given the 50 before them (Carlini et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from rapidfuzz.distance import Levenshtein

PREFIX = SUFFIX = 50  # tokens
NEAR = 0.9  # edit similarity


@dataclass(frozen=True)
class Window:
    """tokens[:prefix] is given, the rest should be continued; row: index of its row."""

    row: int
    tokens: list[int]
    prefix: int


def window(
    row: int, ids: Sequence[int], spans: Sequence[tuple[int, int]], prefix: int = PREFIX, suffix: int = SUFFIX
) -> Window | None:
    """The first `suffix` consecutive tokens of a row within one of `spans` (positions that the loss is taken on) that
    have `prefix` tokens before them; None if there are none."""
    for start, end in spans:
        begin = max(start, prefix)
        if begin + suffix <= min(end, len(ids)):
            return Window(row, list(ids[begin - prefix : begin + suffix]), prefix)
    return None


def edit_similarity(tokens: Sequence[int], truth: Sequence[int]) -> float:
    """1 − Levenshtein distance / the longer length, over tokens; 1 if both are empty."""
    return float(Levenshtein.normalized_similarity(tokens, truth))


def suffix_outcome(statistics: npt.NDArray[np.float32], prefix: int) -> tuple[float, bool]:
    """(log p of the suffix, whether every token of it was the likeliest) from statistics [tokens − 1, 2]: log p and hit
    of a window's tokens from the second on."""
    suffix = statistics[prefix - 1 :]
    return float(suffix[:, 0].sum(dtype=np.float64)), bool((suffix[:, 1] > 0).all())
