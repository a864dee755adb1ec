"""Draw samples of equal size from the rows of each arm and from two halves of the real rows."""

import random
from dataclasses import dataclass
from typing import Any

from common import reviews

Row = dict[str, Any]


@dataclass(frozen=True)
class Samples:
    """`size` rows each of 'against' (real), 'real' (the other half) and every arm, in random order."""

    rows: dict[str, list[Row]]
    size: int
    paired: bool  # every synthetic row was generated from the metadata of a real row
    smallest: str  # the sample that limits the size
    held_out: list[Row]  # the whole first half of the real rows, which begins with 'against'
    counts: dict[str, dict[str, Any]]  # for 'real' and each arm: rows requested, dropped, scored and left out

    @property
    def arms(self) -> list[str]:
        """'real' and the synthetic arms, which are compared with 'against'."""
        return [name for name in self.rows if name != "against"]


def choose(real: list[Row], arms: dict[str, list[Row]], num_rows: int, seed: int) -> Samples:
    """Draw samples of at most `num_rows` rows with text; the two real ones have no user in common."""
    usable = reviews.with_text(real)
    against, second = reviews.halve(usable, seed)
    real_keys = {reviews.source_key(row) for row in usable if row.get("row_id") is not None}
    second_keys = {reviews.source_key(row) for row in second}
    paired = all(reviews.source_key(row) in real_keys for rows in arms.values() for row in rows)
    pools = {"against": against, "real": second}
    for arm, rows in arms.items():
        pool = [row for row in reviews.with_text(rows) if not paired or reviews.source_key(row) in second_keys]
        random.Random(f"{seed} {arm}").shuffle(pool)
        pools[arm] = pool
    size = min(num_rows, *map(len, pools.values()))
    return Samples(
        rows={name: pool[:size] for name, pool in pools.items()},
        size=size,
        paired=paired,
        smallest=min(pools, key=lambda name: len(pools[name])),
        held_out=against,
        counts={"real": count(real, size, 2 * size), **{arm: count(rows, size, size) for arm, rows in arms.items()}},
    )


def count(rows: list[Row], size: int, used: int) -> dict[str, Any]:
    """Count the rows of a file by outcome; `used`: rows in any sample, `size`: rows in the scored one."""
    empty = len(rows) - len(reviews.with_text(rows))
    return {
        "n_requested": len(rows),
        "n_dropped": empty,
        "dropped": {"empty text": empty},
        "n_scored": size,
        "n_left_out": len(rows) - empty - used,
    }
