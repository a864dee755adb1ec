"""The rows of each arm and the held-out ones, read and checked alike for every measure of utility."""

import random
from typing import Any, cast

from common import cli, reviews
from utility.config import DownstreamConfig, ImportanceConfig

Row = dict[str, Any]
Config = DownstreamConfig | ImportanceConfig


def read_arms(
    config: Config, taken: tuple[str, ...], problems: cli.Problems
) -> tuple[dict[str, list[Row]], list[Row], list[str]]:
    """({'real' and each arm: its rows}, held-out rows, all files); `taken`: names that no arm may have.

    A file with a problem has no rows.
    """
    files = reviews.split_arms(config.synthetic or [], taken, problems)
    arms = {"real": problems.absorb(reviews.read_reviews, config.real) or []}
    for arm, file in files.items():
        arms[arm] = problems.absorb(reviews.read_reviews, file, reviews.GENERATED) or []
    heldout = problems.absorb(reviews.read_reviews, config.heldout) or []
    return arms, heldout, [config.real, config.heldout, *files.values()]


def ratings(rows: list[Row]) -> list[int]:
    """[n] the ratings, 1 … 5, of rows that `read_arms` has read."""
    return [cast(int, reviews.rating(row)) for row in rows]


def check_seeds(config: Config, problems: cli.Problems) -> None:
    """A problem where --seed and the --num_seeds after it leave the range of seeds."""
    if config.seed + config.num_seeds > 1 << 32:
        problems.add(f"--num_seeds {config.num_seeds}: the last of --seed {config.seed}, … is above 4294967295")


def draw_heldout(rows: list[Row], config: Config) -> list[Row]:
    """At most --num_heldout of the rows, in random order."""
    return random.Random(f"{config.seed} heldout").sample(rows, min(config.num_heldout, len(rows)))
