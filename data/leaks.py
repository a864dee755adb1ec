"""The leak check: do replaced rows still contain an old full name, an old address or a matching pair of them?

It shares only the name parsing (`parse_name`, `spelled`) with the replacement, not the replacement logic itself.
"""

import bisect
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from data.people import People, parse_name, spelled
from data.scanner import MAX_ADDRESS, TOKEN

SHOWN = 20  # row numbers in a message


def shown(numbers: list[int]) -> str:
    """The first row numbers, for a message."""
    return ", ".join(map(str, numbers[:SHOWN])) + (", …" if len(numbers) > SHOWN else "")


def texts_in(value: Any) -> Iterator[str]:
    """Every string in a row: values, including those in nested lists and dicts, and the keys of dicts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from texts_in(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from texts_in(item)


def leaks(rows: Iterable[dict[str, Any]], people: People) -> dict[str, list[int]]:
    """Numbers of the rows that still contain an old full name, an old address, or a name together with its address.

    people: those of the original file.
    """
    forms = {person: set().union(*map(LeakCheck.forms, person.spellings)) for person in people.of_name.values()}
    check = LeakCheck(set().union(*forms.values()), people.of_address)
    leaked: dict[str, list[int]] = {"full names": [], "addresses": [], "pairs": []}
    for index, row in enumerate(rows):
        texts = list(texts_in(row))
        old_names = set().union(*map(check.names_in, texts))
        old_addresses = set().union(*map(check.addresses_in, texts))
        owners = {owner for address in old_addresses if (owner := people.of_address.get(address))}
        pair = any(not old_names.isdisjoint(forms[owner]) for owner in owners)
        for kind, leak in zip(leaked, (old_names, old_addresses, pair)):
            if leak:
                leaked[kind].append(index)
    return leaked


class LeakCheck:
    """Finds old names and addresses in texts, independently of how they were replaced.

    name_forms: the strings that count as names (see `forms`). Case is ignored. An address is found inside a longer
    string too. The words of a name may be separated by a line break or by an initial.
    """

    def __init__(self, name_forms: Iterable[str], addresses: Iterable[str]):
        self.names: defaultdict[str, set[str]] = defaultdict(set)
        self.locals: defaultdict[str, set[str]] = defaultdict(set)
        for form in name_forms:
            opening = TOKEN.search(form)
            assert opening  # a form has a word
            self.names[opening[0]].add(form[opening.start() :])
        self.name_lengths = {first: sorted(set(map(len, known))) for first, known in self.names.items()}
        for address in addresses:
            local, _, domain = address.strip().casefold().rpartition("@")
            self.locals[domain].add(local)
        self.domain_lengths = sorted({len(domain) for domain in self.locals})
        self.local_lengths = {domain: sorted(set(map(len, known))) for domain, known in self.locals.items()}

    @staticmethod
    def forms(name: str) -> set[str]:
        """The strings that count as `name`: as written, First Last, First M. Last, `Last, First`, First.Last (or _, -).

        A one-word name has none.
        """
        full = " ".join(name.casefold().split())
        parsed = parse_name(full)
        if parsed is None or not parsed[2] or (full.isascii() and max(map(len, parsed[0] + parsed[2])) < 2):
            return set()  # a single word, or only initials
        words = spelled(full).split()
        first, last = words[0], words[-1]
        forms = {full, " ".join(words), f"{first} {last}", f"{last}, {first}", f"{last}, {' '.join(words[:-1])}"}
        return forms | {f"{first.strip('.')}{mark}{last}" for mark in "._-"}

    def addresses_in(self, text: str) -> set[str]:
        """Old addresses anywhere in `text`, including inside longer ones."""
        text, addresses = text.casefold(), set()
        previous, at = -1, text.find("@")
        while at >= 0:
            following = text.find("@", at + 1)
            after = (following if following >= 0 else len(text)) - at - 1  # characters; a domain contains no @
            before = min(at, max(at - previous, MAX_ADDRESS))  # no local part is longer than MAX_ADDRESS
            for length in self.domain_lengths[: bisect.bisect(self.domain_lengths, after)]:
                domain = text[at + 1 : at + 1 + length]
                sizes = self.local_lengths.get(domain, ())
                for size in sizes[: bisect.bisect(sizes, before)]:
                    if text[at - size : at] in self.locals[domain]:
                        addresses.add(text[at - size : at + 1 + length])
            previous, at = at, following
        return addresses

    def names_in(self, text: str) -> set[str]:
        """Forms of old names that occur in `text` as separate words."""
        names = set()
        for block in re.split(r"\n[^\S\n]*(?:[>|][^\S\n]*)*(?=\n)", text.casefold()):
            line = re.sub(r"[^\S\n]*\n[\s>|]*|\s+", " ", block).replace(" ,", ",").replace(",", ", ")
            line = re.sub(r" {2,}", " ", line)
            for version in (line, re.sub(r"(?<=[^\W_] )[^\W_]\.? (?=[^\W_])", "", line)):
                for match in TOKEN.finditer(version):
                    for length in self.name_lengths.get(match[0], ()):
                        after = match.start() + length
                        form = version[match.start() : after]
                        if form in self.names[match[0]] and not version[after : after + 1].isalnum():
                            names.add(form)
        return names
