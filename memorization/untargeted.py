"""Untargeted extraction: training data in unprompted samples (Carlini et al. 2021; Lukas et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from common.text import mixed, window_hashes
from memorization.inventory import normal

RUN = 50  # consecutive tokens of a row


class RunIndex:
    """Every run of `length` tokens in some rows, by hash: 8 bytes each."""

    def __init__(self, rows: Iterable[Sequence[int]], length: int = RUN):
        self.length = length
        hashes = [run_hashes(row, length) for row in rows]
        self.hashes = np.unique(np.concatenate(hashes)) if hashes else np.empty(0, np.uint64)

    def holds_run_of(self, tokens: Sequence[int]) -> bool:
        """Whether any `length` consecutive tokens occur in a row. A false hit has probability 2⁻⁶⁴ per pair."""
        hashes = run_hashes(tokens, self.length)
        if not len(hashes) or not len(self.hashes):
            return False
        places = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        return bool((self.hashes[places] == hashes).any())


def run_hashes(tokens: Sequence[int], length: int) -> npt.NDArray[np.uint64]:
    """Hashes mod 2⁶⁴ of all runs of `length` tokens, [max(0, n − length + 1)]."""
    return window_hashes(mixed(np.asarray(tokens, np.uint64)), length)


class ValueIndex:
    """Values to find in texts, ignoring white space and case."""

    def __init__(self, values: Iterable[str]):
        by_start: dict[str, list[str]] = {}
        for value in {normal(value) for value in values}:
            if len(value) >= SHORTEST:
                by_start.setdefault(value[:SHORTEST], []).append(value)
        self.by_start = by_start

    def find(self, text: str) -> set[str]:
        """The values that occur in a text, not adjacent to other letters or digits."""
        text = normal(text)
        values = set()
        for start in range(len(text) - SHORTEST + 1):
            for value in self.by_start.get(text[start : start + SHORTEST], ()):
                end = start + len(value)
                alone = not (start and text[start - 1].isalnum()) and not text[end : end + 1].isalnum()
                if alone and text.startswith(value, start):
                    values.add(value)
        return values


SHORTEST = 5  # characters of a value to look for: shorter ones occur in many texts by chance
