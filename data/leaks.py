"""The check of replaced rows: does an old full name, an old address or a pair of them still stand in them?

It shares with the replacement only how a name is read (`parse_name`, `spelled`), nothing of how one is replaced.
"""

import bisect
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

from data.people import parse_name, spelled
from data.scanner import MAX_ADDRESS, TOKEN

SHOWN = 20  # row numbers in a message


def shown(numbers: list[int]) -> str:
    """The first row numbers as words of a message."""
    return ", ".join(map(str, numbers[:SHOWN])) + (", …" if len(numbers) > SHOWN else "")


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

    people: the `people.People` of the file before its replacement.
    """
    forms = {person: set().union(*map(LeakCheck.forms, person.spellings)) for person in people.of_name.values()}
    check = LeakCheck(set().union(*forms.values()), people.of_address)
    found = {"full names": [], "addresses": [], "pairs": []}
    for index, row in enumerate(rows):
        texts = list(texts_in(row))
        old_names = set().union(*map(check.names_in, texts))
        old_addresses = set().union(*map(check.addresses_in, texts))
        owners = {people.of_address.get(address) for address in old_addresses} - {None}
        pair = any(not old_names.isdisjoint(forms[owner]) for owner in owners)
        for kind, leak in zip(found, (old_names, old_addresses, pair)):
            if leak:
                found[kind].append(index)
    return found


class LeakCheck:
    """Finds old names and addresses in texts; knows nothing of how they were replaced.

    name_forms: what counts as a name (`forms`); addresses. Case is ignored, and so is what surrounds an address; a
    name's words may be wrapped over a line break, with an initial between them.
    """

    def __init__(self, name_forms: Iterable[str], addresses: Iterable[str]):
        self.names, self.locals = defaultdict(set), defaultdict(set)
        for form in name_forms:
            opening = TOKEN.search(form)
            self.names[opening[0]].add(form[opening.start() :])
        self.name_lengths = {first: sorted(set(map(len, known))) for first, known in self.names.items()}
        for address in addresses:
            local, _, domain = address.strip().casefold().rpartition("@")
            self.locals[domain].add(local)
        self.domain_lengths = sorted({len(domain) for domain in self.locals})
        self.local_lengths = {domain: sorted(set(map(len, known))) for domain, known in self.locals.items()}

    @staticmethod
    def forms(name: str) -> set[str]:
        """What counts as `name`: as written, First Last, First M. Last, `Last, First`, First.Last (also _ and -).

        Nothing counts as a name of one word.
        """
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
        previous, at = -1, text.find("@")
        while at >= 0:
            following = text.find("@", at + 1)
            after = (following if following >= 0 else len(text)) - at - 1  # characters: no domain has an @
            before = min(at, max(at - previous, MAX_ADDRESS))  # nor has a longer local part than that of a gt-email
            for length in self.domain_lengths[: bisect.bisect(self.domain_lengths, after)]:
                domain = text[at + 1 : at + 1 + length]
                sizes = self.local_lengths.get(domain, ())
                for size in sizes[: bisect.bisect(sizes, before)]:
                    if text[at - size : at] in self.locals[domain]:
                        found.add(text[at - size : at + 1 + length])
            previous, at = at, following
        return found

    def names_in(self, text: str) -> set[str]:
        """Forms of old names that stand in `text` as words of their own."""
        found = set()
        for block in re.split(r"\n[^\S\n]*(?:[>|][^\S\n]*)*(?=\n)", text.casefold()):
            line = re.sub(r"[^\S\n]*\n[\s>|]*|\s+", " ", block).replace(" ,", ",").replace(",", ", ")
            line = re.sub(r" {2,}", " ", line)
            for version in (line, re.sub(r"(?<=[^\W_] )[^\W_]\.? (?=[^\W_])", "", line)):
                for match in TOKEN.finditer(version):
                    for length in self.name_lengths.get(match[0], ()):
                        after = match.start() + length
                        form = version[match.start() : after]
                        if form in self.names[match[0]] and not version[after : after + 1].isalnum():
                            found.add(form)
        return found
