"""Assigning canaries to rows, and the corresponding key lines."""

import random
from collections.abc import Sequence
from typing import Any

from canary.canaries import Canary
from canary.config import InjectConfig
from canary.families import Source, total
from canary.hosts import Hosts, Row
from canary.key import KeyLine
from common import dataset
from common.problems import UserError


def place(
    rows: list[Row], config: InjectConfig, holder: Hosts, source: Source, rng: random.Random
) -> tuple[list[Row], list[KeyLine]]:
    """(output rows, key lines)."""
    units = shuffled_units(rows, config.privacy_unit, rng)
    audited, free = units[: config.audit], [index for unit in units[config.audit :] for index in unit]
    rng.shuffle(free)
    coins = [rng.random() < 0.5 for _ in audited]
    left_out = {index for unit, included in zip(audited, coins) if not included for index in unit}
    kept = [index for index in range(len(rows)) if index not in left_out]
    new_index = {old: new for new, old in enumerate(kept)}
    repeated = [("ladder", repetitions) for repetitions in config.repetitions for _ in range(config.canaries)]
    if config.share:
        repeated.append(("share", max(1, round(config.share * len(kept)))))
    if sum(repetitions for _, repetitions in repeated) > len(free):
        raise UserError(f"--input: {len(free)} rows are left besides --audit's; the other canaries need more")
    unused = iter(source.make(total(config), [holder.part(row) for row in rows], rng))
    with_canary: dict[int, Row] = {}
    key: list[KeyLine] = []

    def insert(canary: Canary, index: int) -> str:
        """Insert into one row; returns the row's text before the canary."""
        with_canary[index], context = holder.insert(rows[index], canary["sentence"], config.within, rng)
        return context

    def add_to_key(
        canary: Canary, kind: str, repetitions: int, contexts: list[str], hosts: Sequence[int], user_id: Any
    ) -> None:
        """hosts: the input rows that it is inserted into (none if it is held out); contexts: one per host."""
        for context in contexts:
            source.check(context, canary)
        key.append(
            {
                "id": len(key),
                "kind": kind,
                "repetitions": repetitions,
                "included": bool(hosts),
                "context": contexts[0],
                "starts": [len(context) for context in contexts[: len(hosts)]],
                **canary,
                "rows": [new_index[index] for index in hosts],
                "user_id": user_id,
            }
        )

    for (first, *_), included in zip(audited, coins):
        canary = next(unused)
        hosts = [first] if included else []
        add_to_key(canary, "audit", len(hosts), [insert(canary, first)], hosts, rows[first].get("user_id"))
    used = 0
    for kind, repetitions in repeated:
        hosts = free[used : used + repetitions]
        used += repetitions
        canary = next(unused)
        contexts = [insert(canary, index) for index in hosts]
        add_to_key(canary, kind, repetitions, contexts, hosts, rows[hosts[0]].get("user_id"))
    for _ in repeated:
        canary, row = next(unused), rows[rng.choice(free)]
        _, context = holder.insert(row, canary["sentence"], config.within, rng)
        add_to_key(canary, "held_out", 0, [context], [], row.get("user_id"))
    return [with_canary.get(index, rows[index]) for index in kept], key


def shuffled_units(rows: list[Row], privacy_unit: str, rng: random.Random) -> list[list[int]]:
    """The row indices of each privacy unit, in random order of the units."""
    units: dict[str | int | None, list[int]] = {}
    for index, row in enumerate(rows):
        units.setdefault(dataset.user_of(row) if privacy_unit == "user" else index, []).append(index)
    shuffled = list(units.values())
    rng.shuffle(shuffled)
    return shuffled
