"""A differentially private histogram of review metadata, and draws from it. Pure functions.

Cells are the joint values of some metadata fields, an unbounded domain (product titles), so noisy counts below a
threshold are not released: otherwise the presence of a cell would reveal the only record in it (Korolova et al. 2009).
Every privacy unit adds to one cell, by one: the L1 sensitivity is 1 under add/remove of a unit. The noise is the
two-sided geometric distribution, P(Z = z) ∝ a^|z| with a = e^−ε (Ghosh, Roughgarden & Sundararajan 2009): exactly
(ε, 0) on the cells that both neighbours have, and δ bounds the
probability that a cell with a single unit reaches the threshold.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from common import dataset

Cell = tuple[Any, ...]  # a value of each field


def one_row_per_user(rows: list[dict[str, Any]], rng: np.random.Generator) -> list[dict[str, Any]]:
    """One random row per user, chosen regardless of content, so that each user adds one to a single cell."""
    users: dict[str | None, list[dict[str, Any]]] = {}
    for row in rows:
        users.setdefault(dataset.user_of(row), []).append(row)
    return [own[int(rng.integers(len(own)))] for own in users.values()]


def threshold(epsilon: float, delta: float) -> int:
    """The smallest integer t with P(1 + Z ≥ t) ≤ δ, where P(Z ≥ z) = a^z / (1 + a) for z ≥ 1."""
    a = math.exp(-epsilon)
    return 1 + max(1, math.ceil(-math.log(delta * (1 + a)) / epsilon))


def release(cells: Sequence[Cell], epsilon: float, delta: float, rng: np.random.Generator) -> dict[Cell, int]:
    """{cell: noisy count} of the cells whose noisy count reaches the threshold; `cells` has one entry per unit.

    Cells are sorted: the order of the input would reveal whose record came first.
    """
    counts = sorted(Counter(cells).items())
    lowest, p = threshold(epsilon, delta), -math.expm1(-epsilon)
    noise = rng.geometric(p, len(counts)) - rng.geometric(p, len(counts))
    noisy = {cell: int(count + z) for (cell, count), z in zip(counts, noise)}
    return {cell: count for cell, count in noisy.items() if count >= lowest}


def draw(released: dict[Cell, int], n: int, seed: int) -> list[Cell]:
    """n cells, independently, in proportion to their noisy counts (post-processing, which spends no ε)."""
    cells, counts = list(released), np.array(list(released.values()), dtype=float)
    picks = np.random.default_rng(seed).choice(len(cells), n, p=counts / counts.sum())
    return [cells[index] for index in picks]
