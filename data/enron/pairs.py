"""Pairs of a name and an address: the best occurrence of each in many mails, and the order of people in the file."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from data.enron.mail import BrokenMail
from data.enron.occurrences import Occurrence, cut, occurrences

MAX_SURNAMES = 2  # an address used with more different last names is a list or a role

# (sort key among a pair's occurrences, name, address, prompt, continuation)
Best = tuple[bytes, str, str, str, str]


def pair_key(name: str, address: str) -> bytes:
    """A 16-byte key that ignores the case of a pair."""
    return hashlib.blake2b(f"{name.casefold()}\0{address.lower()}".encode(), digest_size=16).digest()


def choice(seed: int, occurrence: Occurrence, prompt: str, continuation: str) -> bytes:
    """Sort key for a pair's occurrences; the smallest one is kept.

    The rank, then a seeded hash of the text: a random choice that does not depend on the order of files, batches or
    workers.
    """
    material = f"{seed}\0{prompt}\0{continuation}".encode()
    return bytes([occurrence.rank]) + hashlib.blake2b(material, digest_size=15).digest()


def best_pairs(
    mails: Iterable[tuple[str, bytes | OSError]], seed: int
) -> tuple[dict[bytes, Best], dict[str, int], list[tuple[str, str]]]:
    """The best occurrence of every pair in many mails.

    mails: (label, bytes or an OSError) of each mail. Returns ({pair key: its best occurrence}, counts, [(label,
    reason)] of broken mails). Counts: 'messages', 'broken', 'named' (occurrences kept), 'without' (mails without any)
    and 'dropped: REASON'.
    """
    best: dict[bytes, Best] = {}
    counts = {"messages": 0, "broken": 0, "named": 0, "without": 0}
    broken: list[tuple[str, str]] = []
    for label, raw in mails:
        counts["messages"] += 1
        try:
            if isinstance(raw, OSError):
                raise BrokenMail(raw.strerror or type(raw).__name__)
            text, people, dropped = occurrences(raw)
        except BrokenMail as error:
            counts["broken"] += 1
            broken.append((label, str(error)))
            continue
        for reason, number in dropped.items():
            counts[f"dropped: {reason}"] = counts.get(f"dropped: {reason}", 0) + number
        counts["named"] += len(people)
        counts["without"] += not people
        for occurrence in people:
            key = pair_key(occurrence.name, occurrence.address)
            held = best.get(key)
            if held is not None and held[0][0] < occurrence.rank:
                continue
            prompt, continuation = cut(text, occurrence.position)
            rank = choice(seed, occurrence, prompt, continuation)
            if held is None or rank < held[0]:
                best[key] = (rank, occurrence.name, occurrence.address, prompt, continuation)
    return best, counts, broken


class Pairs:
    """The best occurrence of every pair so far. Texts are kept in an unnamed temporary file, so memory grows by a few
    hundred bytes per distinct pair, not with the amount of mail."""

    def __init__(self, folder: Path) -> None:
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by __exit__)
        self.held: dict[bytes, tuple[bytes, int]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def add(self, best: dict[bytes, Best]) -> None:
        self.file.seek(0, os.SEEK_END)
        for key, (rank, *fields) in best.items():
            if key not in self.held or rank < self.held[key][0]:
                self.held[key] = (rank, self.file.tell())
                self.file.write(json.dumps(fields).encode() + b"\n")

    def read(self, key: bytes) -> tuple[str, str, str, str]:
        """(name, address, prompt, continuation)."""
        self.file.seek(self.held[key][1])
        name, address, prompt, continuation = json.loads(self.file.readline())
        return name, address, prompt, continuation


def shared_addresses(pairs: Iterable[tuple[str, str]]) -> set[str]:
    """Addresses (lower case) that occur with more than MAX_SURNAMES different last names."""
    surnames: dict[str, set[str]] = {}
    for name, address in pairs:
        surnames.setdefault(address.lower(), set()).add(name.casefold().split()[-1])
    return {address for address, names in surnames.items() if len(names) > MAX_SURNAMES}


def group_people(pairs: dict[bytes, tuple[str, str]]) -> list[list[bytes]]:
    """Group the keys of pairs that share an address or a name, directly or through others (connected components)."""
    parent = {key: key for key in pairs}

    def root(key: bytes) -> bytes:
        while parent[key] != key:
            parent[key] = key = parent[parent[key]]
        return key

    first: dict[str, bytes] = {}
    for key, (name, address) in pairs.items():
        for label in (name.casefold(), address.lower()):  # cannot collide: only addresses contain an @
            parent[root(key)] = root(first.setdefault(label, key))
    groups: dict[bytes, list[bytes]] = {}
    for key in pairs:
        groups.setdefault(root(key), []).append(key)
    return list(groups.values())


def shuffled(groups: list[list[bytes]], seed: int, head: int) -> list[bytes]:
    """All keys in an order that depends only on the keys and the seed, keeping groups together.

    A group that would straddle position `head` is moved after it, as long as other groups can fill the gap.
    """

    def hashed(key: bytes) -> bytes:
        return hashlib.blake2b(key, digest_size=16, key=str(seed).encode()).digest()

    ordered = sorted((sorted(group, key=hashed) for group in groups), key=lambda group: hashed(min(group)))
    first: list[bytes] = []
    rest: list[bytes] = []
    for group in ordered:
        (first if len(first) + len(group) <= head else rest).extend(group)
    return first + rest
