"""Read and check the rows of each arm and the held-out rows, for all utility scripts."""

import random
from typing import Any, cast

from common import reviews
from common.problems import Problems
from utility.config import DownstreamConfig, ImportanceConfig

Row = dict[str, Any]
Config = DownstreamConfig | ImportanceConfig


def read_arms(
    config: Config, taken: tuple[str, ...], problems: Problems
) -> tuple[dict[str, list[Row]], list[Row], list[str]]:
    """({'real' and each arm: its rows}, held-out rows, all files); `taken`: reserved arm names.

    A file with a problem gives no rows.
    """
    files = reviews.split_arms(config.synthetic or [], taken, problems)
    read = reviews.Files(config.columns, problems)
    arms = {"real": read.read(config.real) or []}
    for arm, file in files.items():
        arms[arm] = read.read(file, reviews.GENERATED) or []
    heldout = read.read(config.heldout) or []
    read.check()
    return arms, heldout, [config.real, config.heldout, *files.values()]


def ratings(rows: list[Row]) -> list[int]:
    """[n] ratings, 1 … 5, of rows read by `read_arms`."""
    return [cast(int, reviews.rating(row)) for row in rows]


def check_seeds(config: Config, problems: Problems) -> None:
    """Add a problem if the last of --num_seeds seeds from --seed on is out of range."""
    if config.seed + config.num_seeds > 1 << 32:
        problems.add(f"--num_seeds {config.num_seeds}: from --seed {config.seed} on, the last is above 4294967295")


def draw_heldout(rows: list[Row], config: Config) -> list[Row]:
    """At most --num_heldout of the rows, in random order."""
    return random.Random(f"{config.seed} heldout").sample(rows, min(config.num_heldout, len(rows)))
