"""The check of replaced rows: does an old full name, an old address or a pair of them still stand in them?

It shares with data/replacement.py only how a name is read (`parse_name`, `spelled`), nothing of how one is replaced.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

from data.replacement import TOKEN, parse_name, spelled


def texts_in(value) -> Iterator[str]:
    """Every string in a row: its values, what lists and dicts hold, and the keys of dicts within it."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from texts_in(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from texts_in(item)


def leaks(rows: Iterable[dict], people) -> dict[str, list[int]]:
    """Numbers of the rows that still hold an old full name, an old address, or one of each that were a pair.

    people: the `replacement.People` of the file before its replacement.
    """
    names = [name for person in people.of_name.values() for name in person.spellings]
    check = LeakCheck(names, people.of_address)
    found = {"full names": [], "addresses": [], "pairs": []}
    for index, row in enumerate(rows):
        texts = list(texts_in(row))
        old_names = set().union(*map(check.names_in, texts))
        old_addresses = set().union(*map(check.addresses_in, texts))
        owners = {people.of_address.get(address) for address in old_addresses} - {None}
        pair = old_names and any(
            not old_names.isdisjoint(check.forms(name)) for owner in owners for name in owner.spellings
        )
        for kind, leak in zip(found, (old_names, old_addresses, pair)):
            if leak:
                found[kind].append(index)
    return found


class LeakCheck:
    """Finds old names and addresses in texts; knows nothing of how they were replaced.

    names: as written, two words or more (one word alone is no evidence); addresses. Case is ignored, and so is what
    surrounds an address; a name's words may be wrapped over a line break, with an initial between them.
    """

    def __init__(self, names: Iterable[str], addresses: Iterable[str]):
        self.names, self.locals = defaultdict(set), defaultdict(set)
        for name in names:
            for form in self.forms(name):
                opening = TOKEN.search(form)
                self.names[opening[0]].add(form[opening.start() :])
        for address in addresses:
            local, _, domain = address.strip().casefold().rpartition("@")
            self.locals[domain].add(local)
        self.domain_lengths = sorted({len(domain) for domain in self.locals})
        self.local_lengths = {domain: sorted(set(map(len, known))) for domain, known in self.locals.items()}

    @staticmethod
    def forms(name: str) -> set[str]:
        """What counts as `name`: as written, First Last, First M. Last, `Last, First`, First.Last (also _ and -)."""
        full = " ".join(name.casefold().split())
        parsed = parse_name(full)
        if parsed is None or not parsed[2] or (full.isascii() and max(map(len, parsed[0] + parsed[2])) < 2):
            return set()  # one word, or initials alone
        words = spelled(full).split()
        first, last = words[0], words[-1]
        forms = {full, " ".join(words), f"{first} {last}", f"{last}, {first}", f"{last}, {' '.join(words[:-1])}"}
        return forms | {f"{first.strip('.')}{mark}{last}" for mark in "._-"}

    def addresses_in(self, text: str) -> set[str]:
        """Old addresses anywhere in `text`, inside longer ones too."""
        text, found = text.casefold(), set()
        at = text.find("@")
        while at >= 0:
            for length in self.domain_lengths:
                domain = text[at + 1 : at + 1 + length]
                for size in self.local_lengths.get(domain, ()):
                    if text[max(0, at - size) : at] in self.locals[domain]:
                        found.add(text[at - size : at + 1 + length])
            at = text.find("@", at + 1)
        return found

    def names_in(self, text: str) -> set[str]:
        """Forms of old names that stand in `text` as words of their own."""
        found = set()
        for block in re.split(r"\n[^\S\n]*(?:[>|][^\S\n]*)*(?=\n)", text.casefold()):
            line = re.sub(r"[^\S\n]*\n[\s>|]*|\s+", " ", block).replace(" ,", ",").replace(",", ", ")
            line = re.sub(r" {2,}", " ", line)
            for version in (line, re.sub(r"(?<=[^\W_] )[^\W_]\.? (?=[^\W_])", "", line)):
                for match in TOKEN.finditer(version):
                    for form in self.names.get(match[0], ()):
                        after = match.start() + len(form)
                        if version.startswith(form, match.start()) and not version[after : after + 1].isalnum():
                            found.add(form)
        return found
