"""Find the people in a file by its names, addresses and header lines, and assign a stand-in to each of them."""

import itertools
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from common.text import name_rule_guesses
from data.enron.names import PARTICLES, ROLE_ADDRESS, SUFFIXES, TITLES, address_problem
from data.enron.names import person as as_person
from data.enron.occurrences import body_addresses, left_name
from data.scanner import TOKEN, Scanner, in_case_of, same_shape, strings, tokens
from data.stand_ins import LOCALES, ORDINARY, TRIES, faker_names, letter_table, name_pool, new_domains

MIN_USER = 4  # minimum length of a user name that is recognised without its owner

HEADER = re.compile(r"^[>| \t]*(?:from|to|cc|bcc|sender|sent by)[ \t]*:[ \t]*(\S.*)$", re.I | re.M)
# No name has longer words or wider gaps; without bounds, a long line of capitals would take quadratic time.
CAPITAL_NAME = r"[^\W\d_a-z][\w.'’-]{0,63}(?:[^\S\n]{1,16}[\w.'’-]{1,64}){1,3}?"
NAMED = re.compile(
    rf"(?i:forwarded by|created by)[^\S\n]+({CAPITAL_NAME})[^\S\n]*(?:/|<|\bon\b)"
    rf"|,[^\S\n]+({CAPITAL_NAME})[^\S\n]*(?:<|wrote:)|({CAPITAL_NAME})/\w+/\w+@"
)


@dataclass(eq=False)
class Person:
    """Everybody called `first` … `last` (tokens). `new` maps each token to its stand-in."""

    first: tuple[str, ...]
    last: tuple[str, ...]
    middles: set[str] = field(default_factory=set)
    spellings: dict[str, None] = field(default_factory=dict)  # names as written, in the order found
    addresses: dict[str, tuple[str, str] | None] = field(default_factory=dict)  # address → (spelling, rule) or None
    new: dict[str, str] = field(default_factory=dict)
    guesses: dict[str, str] = field(default_factory=dict)  # user name that a name rule derives → its stand-in

    def rename(self, text: str) -> str:
        """`text` with every token of this name replaced, keeping its case (but not the O of O'Neil)."""

        def word(match: re.Match[str]) -> str:
            token: str = match[0]
            key = token.casefold()
            if len(key) == 1 and text[match.end() : match.end() + 1] in ("'", "’"):
                return token
            return in_case_of(token, self.new.get(key, token))

        return TOKEN.sub(word, text)


def spelled(name: str) -> str:
    """A name as First Middle Last: 'Last, First' reordered; without titles, suffixes and anything after a slash."""
    parts = [part.split() for part in re.sub(r"/.*|[^\w\s.'’+,-]", " ", name).split(",")]
    parts = [part for part in parts if part and part[0].casefold().strip(".") not in SUFFIXES]
    words = parts[1] + parts[0] if len(parts) == 2 else [word for part in parts for word in part]
    words = [word for word in words if any(c.isalpha() for c in word)]
    while len(words) > 1 and words[0].casefold().strip(".") in TITLES:
        words = words[1:]
    while len(words) > 1 and words[-1].casefold().strip(".") in SUFFIXES:
        words = words[:-1]
    return " ".join(words)


def parse_name(name: str) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]] | None:
    """(first, middle, last) tokens of a name, or None if it has no letters; particles are part of the last name.

    A one-word name has an empty last name.
    """
    words = [word for word in map(tokens, spelled(name).split()) if word]
    if not words:
        return None
    first, *rest = words
    last = rest.pop() if rest else ()
    while rest and rest[-1][-1] in PARTICLES:
        last = rest.pop() + last
    return first, tuple(token for word in rest for token in word), last


def find_names(text: str) -> Iterator[tuple[str, str | None]]:
    """(name, address or None) of everybody named next to an address, in a quoted header or in a forwarding line."""
    for opening, address, _ in body_addresses(text, 0):
        name, _ = left_name(text, opening)
        if name:
            yield name, address.casefold()
    fields = [match[1] for match in HEADER.finditer(text)]
    fields += [match[match.lastindex or 0] for match in NAMED.finditer(text)]
    for value in fields:
        items = value.split(";")
        if len(items) == 1 and "," in value and (all(" " in part.strip() for part in value.split(","))):
            items = value.split(",")
        for item in items:
            name, _ = as_person(re.split(r"[<\[(]", item)[0])
            if name and name[0].isupper() and name.split()[-1][0].isupper():
                yield name, None


def holds_one(words: tuple[str, ...], known: set[tuple[str, ...]], lengths: set[int]) -> bool:
    """Whether a run of consecutive words is in `known`, whose entries have these lengths."""
    return any(words[start : start + n] in known for n in lengths for start in range(len(words) - n + 1))


def rules_of(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """{local part: (name, name rule) that derives it}; of several names, the first."""
    makers: dict[str, tuple[str, str]] = {}
    for name in names:
        for rule, guess in name_rule_guesses(name).items():
            makers.setdefault(guess, (name, rule))
    return makers


def by_rule(name: str, rule: str, local: str) -> str:
    """The local part that `rule` derives from `name`, with the digits of `local`: leading ones first, the rest last."""
    leading = re.match(r"\d*", local)
    assert leading  # it also matches no digit
    return leading[0] + name_rule_guesses(name)[rule] + "".join(re.findall(r"\d", local[leading.end() :]))


class People:
    """Everybody in a file. `add` names and addresses, gt pairs first; then `settle` assigns the stand-ins."""

    def __init__(self, pairs: Iterable[tuple[str, str]]):
        self.of_name: dict[tuple[tuple[str, ...], tuple[str, ...]], Person] = {}
        self.of_address: dict[str, Person | None] = {}
        self.truths = {address.strip().casefold() for _, address in pairs}
        self.new_address: dict[str, str] = {}
        self.faker_first: frozenset[str] = frozenset(map(str.casefold, faker_names("first", LOCALES[:1])))
        for name, address in pairs:
            self.add(name, address.strip().casefold())

    def add(self, name: str, address: str | None) -> Person | None:
        parsed = parse_name(name)
        if parsed is None:
            return None
        first, middle, last = parsed
        person = self.of_name.setdefault((first, last), Person(first, last))
        person.middles.update(middle)
        person.spellings.setdefault(spelled(name))
        if address is not None and self.of_address.get(address) is None:
            self.of_address[address] = person
        return person

    def adopt(self, addresses: Iterable[str]) -> None:
        """Assign owners to addresses without a name next to them: the only person from whose name a rule derives the
        address; else, for first.last addresses, a new person of that name."""
        makers = defaultdict(set)
        for person in self.of_name.values():
            for spelling in person.spellings:
                for guess in name_rule_guesses(spelling).values():
                    makers[guess].add(person)
        for address in sorted(set(addresses)):
            if self.of_address.setdefault(address, None) is not None:
                continue
            local = re.sub(r"\d", "", address.rpartition("@")[0])
            parts = re.split(r"[._]", local)
            if len(makers[local]) == 1 and len(local) >= MIN_USER and local not in ORDINARY:
                self.of_address[address] = next(iter(makers[local]))
            elif len(parts) == 2 and parts[0] in self.faker_first and parts[1].isalpha() and len(parts[1]) > 2:
                self.add(" ".join(parts).title(), address)

    def settle(self, seed: int) -> None:
        """Assign stand-ins: distinct names to distinct people, distinct addresses to distinct addresses, without any
        word of an old name."""
        rng = random.Random(seed)
        self.letter = letter_table(rng)
        people = [self.of_name[key] for key in sorted(self.of_name)]
        old = {token for person in people for token in (*person.first, *person.middles, *person.last)}
        self.firsts = name_pool("first", old, len({person.first for person in people}))
        self.lasts = name_pool("last", old, len({person.last for person in people}))
        self.firsts_by_initial = defaultdict(list)
        for name in self.firsts:
            self.firsts_by_initial[name[0]].append(name)
        self.domains = new_domains({address.rpartition("@")[2] for address in self.of_address}, rng)
        owned = defaultdict(list)
        for address, person in sorted(self.of_address.items()):
            if person is not None:
                owned[person].append(address)
        names: set[tuple[str, ...]] = set()
        taken: set[str] = set()
        for person in people:
            makers = rules_of(person.spellings) if person in owned else {}
            for address in owned[person]:
                person.addresses[address] = makers.get(re.sub(r"\d", "", address.rpartition("@")[0]))
            self._name_one(person, names, taken, rng)
        self._make_addresses(people, taken, rng)
        self.standins = random.Random(f"{seed}-alone").sample(self.firsts, len(self.firsts))

    def _make_addresses(self, people: list[Person], taken: set[str], rng: random.Random) -> None:
        """Replace the addresses that no name rule derives: roles keep their local part, others get a random one."""
        locals_ = {address.rpartition("@")[0] for address in self.of_address}
        known = {order for p in people if p.last for order in (p.first + p.last, p.last + p.first)}
        known |= {tokens(guess) for person in people for guess in person.guesses}
        lengths = {len(run) for run in known}
        collisions = 0  # local parts grow with the number of collisions
        for address in sorted(set(self.of_address) - set(self.new_address)):
            local, _, domain = address.rpartition("@")
            role = address not in self.truths and address_problem(address) == ROLE_ADDRESS
            role = role and not holds_one(tokens(local), known, lengths)
            new = local if role else same_shape(local, rng)
            while f"{new}@{self.domains[domain]}" in taken or (new in locals_ and not role):
                new, role = same_shape(local + "ob" * rng.randint(0, 2 + collisions // TRIES), rng), False
                collisions += 1
            self.new_address[address] = f"{new}@{self.domains[domain]}"
            taken.add(self.new_address[address])

    def _name_one(self, person: Person, names: set[tuple[str, ...]], taken: set[str], rng: random.Random) -> None:
        """Draw a name that is not in `names` and derives no address in `taken`; add it and its addresses to them."""
        for attempt in itertools.count():
            self._draw(person, rng, invent=attempt > TRIES)
            name = tuple(person.new[token] for token in (*person.first, *person.last))
            derived = {}
            for address, maker in person.addresses.items():
                if maker:
                    spelling, rule = maker
                    local, _, domain = address.rpartition("@")
                    derived[address] = f"{by_rule(person.rename(spelling), rule, local)}@{self.domains[domain]}"
            if name not in names and (taken.isdisjoint(derived.values()) or attempt > 2 * TRIES):
                break
        names.add(name)
        for address, new in derived.items():  # if two derived addresses are equal, the second becomes random
            if new not in taken:
                self.new_address[address] = new
                taken.add(new)
        for spelling in person.spellings:
            new_guesses = name_rule_guesses(person.rename(spelling))
            for rule, guess in name_rule_guesses(spelling).items():
                if len(guess) >= MIN_USER and guess not in person.first + person.last and rule in new_guesses:
                    person.guesses.setdefault(guess, new_guesses[rule])

    def _draw(self, person: Person, rng: random.Random, invent: bool) -> None:
        """Draw a stand-in for every token, from the pools or made up; letters follow the table, particles are kept."""

        def draw(token: str, pool: list[str]) -> str:
            return same_shape(token + "a", rng).capitalize() if invent else rng.choice(pool)

        person.new = {letter: new.upper() for letter, new in self.letter.items()}
        particles = {token for token in person.last[:-1] if token in PARTICLES}
        for token in person.last:
            if token not in self.letter:
                person.new[token] = token if token in particles else draw(token, self.lasts)
        used = Counter(person.new.values())
        for token in sorted(person.middles):  # keep 'Anna M. Roe' and 'Anna Maria Roe' consistent
            if token not in self.letter:
                initial = self.letter.get(token[0], "e").upper()
                fitting = [name for name in self.firsts_by_initial[initial] if not used[name]]
                new = rng.choice(fitting) if fitting else initial + draw(token, self.firsts)[1:]
                if token in person.new:  # also a last name
                    used[person.new[token]] -= 1
                person.new[token] = new
                used[new] += 1
        for token in person.first:
            if token not in self.letter:
                person.new[token] = draw(token, self.firsts)

    def stand_in(self, token: str) -> str:
        """The stand-in for a first name that belongs to nobody mentioned in the row; the same in any order."""
        return self.standins[random.Random(token).randrange(len(self.standins))]


def read_people(rows: list[dict[str, Any]]) -> tuple[People, Scanner, Counter[str], Counter[str]]:
    """(people of a file, scanner that knows their addresses, count of each token, count of each in lower case)."""
    people = People([(row["gt-name"], row["gt-email"]) for row in rows])
    scanner = Scanner(people.truths)
    words: Counter[str] = Counter()
    lower: Counter[str] = Counter()
    addresses = set(people.truths)
    for row in rows:
        for text in strings(row):
            for name, address in find_names(text):
                people.add(name, address)
            for piece in scanner(text):
                if piece.kind != "token":
                    addresses.add(piece.address)
                    continue
                words[piece.text.casefold()] += 1
                lower[piece.text.casefold()] += piece.text.islower()
    people.adopt(addresses)
    return people, scanner, words, lower
