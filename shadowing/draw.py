"""Which rows each shadow is trained on."""

import hashlib
from collections.abc import Sequence

import numpy as np


def halves(texts: Sequence[str], shadows: int, seed: int) -> list[list[int]]:
    """Indices of the texts of each shadow: a random half of the distinct texts, and every copy of these.

    Shadows 2j and 2j + 1 have complementary halves (of the sizes ⌊n/2⌋ and ⌈n/2⌉), so in an even number of shadows each
    text is in exactly half. A pair depends on the seed and j alone: more shadows leave the first ones as they are.
    """
    distinct = list(dict.fromkeys(texts))
    found = []
    for number in range(shadows):
        pair, second = divmod(number, 2)
        order = np.random.default_rng([seed, pair]).permutation(len(distinct))
        half = len(distinct) // 2
        chosen = {distinct[place] for place in (order[half:] if second else order[:half])}
        found.append([index for index, text in enumerate(texts) if text in chosen])
    return found


def training_seed(seed: int, number: int) -> int:
    """The seed of a shadow's training, 0 … 2³² − 1; it differs from shadow to shadow, and from the target's."""
    return int.from_bytes(hashlib.sha256(f"{seed} shadow {number}".encode()).digest()[:4], "big")
