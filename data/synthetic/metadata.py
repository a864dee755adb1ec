"""The metadata of the rows to write: that of --input, or draws from a histogram that is released once."""

import random
import secrets
from dataclasses import dataclass
from typing import Any

import numpy as np

from common import dataset, json_files, publication
from common.problems import UserError
from data.synthetic import histogram
from data.synthetic.config import SyntheticConfig
from data.synthetic.task import Row, Task

Released = dict[str, Any]  # the content of the histogram's file


@dataclass(frozen=True)
class Planned:
    """A row to write, without its text. fields: row_id, arm, condition and those of the prompt; key: of its
    sampling noise."""

    fields: Row
    sample: int
    key: tuple[int, int]


def release_histogram(config: SyntheticConfig, task: Task) -> Released:
    """The released histogram: read if released with the same settings, else created (noise from the OS's entropy)."""
    file = config.histogram_file
    settings = histogram_settings(config, task)
    released = json_files.read_json(file, "name another file") if file.is_file() else None
    if released and settings["training"] is None:
        raise UserError(
            f"--histogram {file}: cannot tell whether it was released from --training, as the model's "
            "trained_rows.jsonl is missing; name another file"
        )
    differ = [key for key, value in settings.items() if released and released.get(key) != value]
    if differ:
        raise UserError(f"--histogram {file}: was released with a different {', '.join(differ)}; name another file")
    if not released:
        released = settings | make_histogram(config, task, settings["delta"])
        publication.write_json(file, released)  # an empty release has spent its ε too: never draw it again
    if not released["cells"]:
        raise UserError(
            f"--metadata_epsilon {config.metadata_epsilon:g}: no cell of {' × '.join(config.metadata_fields)} reaches "
            f"the threshold of {released['threshold']}; raise ε or name fewer --metadata_fields, with another "
            f"--histogram (the ε of {file} is spent, and the two add up)"
        )
    return dict(released)


def histogram_settings(config: SyntheticConfig, task: Task) -> dict[str, Any]:
    """Settings that must match for a released histogram to be reused."""
    assert task.source, "--condition sampled needs --training"
    units = len(set(map(dataset.user_of, task.training))) if task.unit == "user" else len(task.training)
    return {
        "training": task.source["sha256"],
        "fields": list(config.metadata_fields),
        "epsilon": config.metadata_epsilon,
        "delta": config.metadata_delta or (task.privacy or {}).get("delta") or 1 / (10 * units),
        "unit": task.unit,
    }


def make_histogram(config: SyntheticConfig, task: Task, delta: float) -> dict[str, Any]:
    """A new release, which spends ε and δ."""
    epsilon = config.metadata_epsilon
    assert epsilon, "--condition sampled needs --metadata_epsilon"
    rng = np.random.default_rng(secrets.randbits(256))
    rows = histogram.one_row_per_user(task.training, rng) if task.unit == "user" else task.training
    cells = [tuple(row.get(field) or "" for field in config.metadata_fields) for row in rows]
    return {
        "mechanism": "two-sided geometric noise, L1 sensitivity 1 (one cell a unit), add/remove adjacency; noisy "
        "counts below the threshold are not released",
        "threshold": histogram.threshold(epsilon, delta),
        "cells": [[*cell, count] for cell, count in histogram.release(cells, epsilon, delta, rng).items()],
    }


def plan(config: SyntheticConfig, task: Task, released: Released | None) -> list[Planned]:
    """The rows to write, in order."""
    n = config.num or len(task.rows)
    chosen = draw(config, task, released, n) if released else take(task.rows, n, config.seed)
    names = [name for name in dataset.REVIEW_FIELDS if name != "Review"]
    if config.condition != "title":
        names.remove("Review Title")
    common = {"arm": config.arm, "condition": config.condition}
    return [
        Planned({"row_id": row.get("row_id"), **common, **{name: row.get(name) for name in names}}, key[1], key)
        for key, row in chosen
    ]


def draw(config: SyntheticConfig, task: Task, released: Released, n: int) -> list[tuple[tuple[int, int], Row]]:
    """n rows with metadata drawn from the histogram, each with its key: (number, 0)."""
    cells = {tuple(cell): count for *cell, count in released["cells"]}
    empty = dict.fromkeys(dataset.REVIEW_FIELDS[1:], "") | {"System prompt": task.rows[0].get("System prompt") or ""}
    drawn = histogram.draw(cells, n, config.seed)
    return [((i, 0), {**empty, **dict(zip(config.metadata_fields, cell))}) for i, cell in enumerate(drawn)]


def take(rows: list[Row], n: int, seed: int) -> list[tuple[tuple[int, int], Row]]:
    """n of the rows, each with its key: (its index, how often it was taken before).

    Fewer than there are: drawn by `seed`, in the order of the file. More: all of them, repeatedly.
    """
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    rounds, rest = n // len(rows), set(order[: n % len(rows)])
    return [
        ((i, sample), row) for sample in range(rounds + 1) for i, row in enumerate(rows) if sample < rounds or i in rest
    ]
