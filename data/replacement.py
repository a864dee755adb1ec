"""Replacing people and addresses in text: who is in it, their stand-ins, and one scan a text.

Text in, text out: no paths, no options. A *token* is a run of letters and digits, compared case-folded. What checks the
result is apart: data/leaks.py.

What is rewritten:
* addresses, everywhere and in any case, also `jane (at) x (dot) example` and `jane at x dot example` (no other
  disguises); the local part of a role address (info@, sales@) is kept, unless it is a row's gt-email or holds the
  name of somebody known;
* full names, everywhere and in any case: First Last, First M. Last, First Middle Last, `Last, First [M.]`, joined by
  blanks, one line break (behind quote marks too) or one of . _ - ; 'Last First' when both words are capitalised;
* user names without a domain: a local part of the file everywhere, unless it is short or an ordinary word or no name
  rule makes it (then only in rows that mention its owner); what a name rule makes of a name, in rows that mention it;
* parts of names alone. Not an ordinary word: any part in rows that mention the person (any case), first names
  everywhere when capitalised. An ordinary word (`Scan.ordinary`): only capitalised and in a name position (after a
  greeting or a title, alone on its line, first on it before a comma), and within a sentence in rows that mention the
  person. A first name of Faker's lists that is nobody's here: in a name position;
* `J. Moss`, when Moss is no ordinary word or the row mentions such a person.
A row mentions a person by a full name or an address. Last names alone elsewhere stay: most are towns and companies.
"""

import bisect
import itertools
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib import import_module
from typing import NamedTuple

from common.text import name_rule_guesses
from data.enron import mail

LOCALES = ("en_US", "en_GB", "en_IE", "en_NZ", "de_DE", "fr_FR", "nl_NL", "it_IT", "es_ES", "sv_SE", "da_DK", "fi_FI")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


CALENDAR = _words(
    "january february march april may june july august september october november december "
    "monday tuesday wednesday thursday friday saturday sunday"
)
ORDINARY = CALENDAR | _words(  # words that Faker's English word list lacks
    "amber banks baker bear berry black blue brook brown bush butler buck case chance chase cherry chip church cook "
    "cross crystal dale dawn day dean drew duke earl faith fields frank gas grace grant gray guy hunter iris ivy jack "
    "jasmine joy king lance lane major mark marsh mason miles norm olive page parks pat pope power prince ray rice "
    "rivers rob rocky rose royal ruby sandy sharp short skip small stone sue summers sunny swift violet waters wise "
    "woods gold silver star best bond bell ball hill lake forest field north south east west grand bridge london "
    "paris austin dallas houston virginia georgia carolina washington england holland"
)
COMMON = 10  # a user name that only a name rule makes and that is read more often is taken for a word
MAX_TOKENS = 12  # of a full name with its initials
MIN_USER = 4  # letters of a user name that is known without its owner
TRIES = 300  # draws from the pool before a name is invented
FAKER_WORD = re.compile(r"[A-Z][a-z]{2,}")

# ---------------------------------------------------------------- patterns

LOCAL_RUN = re.compile(r"[\w.+%=&'#$!*~^-]+")
LOCAL = r"\w[\w.+%=&'#$!*~^-]*"
AT, DOT = r"(?:\s*[(\[]\s*at\s*[)\]]\s*|\s+at\s+)", r"(?:\s*[(\[]\s*dot\s*[)\]]\s*|\s+dot\s+)"
ADDRESS = re.compile(rf"(?<!\w){LOCAL}@[\w-]+(?:\.[\w-]+)+")
DISGUISED = re.compile(rf"(?<!\w)(\w[\w.+-]*)({AT})([\w-]+(?:{DOT}[\w-]+)+)", re.I)
DISGUISED_RUN = re.compile(r"[\w.+-]+")
DISGUISED_REST = re.compile(rf"(?:{AT})[\w-]+(?:{DOT}[\w-]+)+", re.I)
DOMAIN_REST = re.compile(r"@[\w-]+(?:\.[\w-]+)+")
DOTS = re.compile(DOT, re.I)
TOKEN = re.compile(r"[^\W_]+")
MAY_BEGIN = re.compile(r"(?<!\w)_|[^\W_]")  # an address or a token
SPACE = r"[^\S\n]*(?:\n[^\S\n]*(?:[>|][^\S\n]*)*)?"
BLANK = re.compile(rf"(\.?)({SPACE})")
COMMA = re.compile(rf"{SPACE},{SPACE}")
GREETING = re.compile(
    r"(?:\b(?:hi|hello|hey|dear|thanks|thank you|regards|cheers|best|sincerely|morning|afternoon|evening|mr|mrs|ms|dr"
    r"|(?:from|to|cc|attn) ?:)[ ,.!-]*)$",
    re.I,
)
HEADER = re.compile(r"^[>| \t]*(?:from|to|cc|bcc|sender|sent by)[ \t]*:[ \t]*(\S.*)$", re.I | re.M)
# No name has longer words or wider gaps; without a bound a line of capitals is read once for each of them.
CAPITAL_NAME = r"[^\W\d_a-z][\w.'’-]{0,63}(?:[^\S\n]{1,16}[\w.'’-]{1,64}){1,3}?"
WIDEST = 200  # characters between two words of one name
NAMED = re.compile(
    rf"(?i:forwarded by|created by)[^\S\n]+({CAPITAL_NAME})[^\S\n]*(?:/|<|\bon\b)"
    rf"|,[^\S\n]+({CAPITAL_NAME})[^\S\n]*(?:<|wrote:)|({CAPITAL_NAME})/\w+/\w+@"
)


class Found(NamedTuple):
    """A piece of a text. kind: 'odd' (a known address in no usual form), 'address', 'disguised' or 'token'."""

    kind: str
    start: int
    end: int
    text: str

    @property
    def address(self) -> str:
        """The address, case-folded, that the piece stands for."""
        if self.kind == "disguised":
            local, _, labels = DISGUISED.fullmatch(self.text).groups()
            return f"{local}@{'.'.join(DOTS.split(labels))}".casefold()
        return self.text.casefold()


class Scanner:
    """Reads texts for the reading and the replacing alike: pieces from left to right, in time linear in the text.

    addresses: known ones; those in no usual form are found too.
    """

    def __init__(self, addresses: Iterable[str]):
        odd = sorted({a for a in addresses if not ADDRESS.fullmatch(a)}, key=lambda a: (-len(a), a))
        self.odd = re.compile("|".join(map(re.escape, odd)), re.I) if odd else None

    def __call__(self, text: str) -> Iterator[Found]:
        place, odd = 0, self.odd.search(text) if self.odd else None
        local, disguised = _Rest(text, LOCAL_RUN, DOMAIN_REST), _Rest(text, DISGUISED_RUN, DISGUISED_REST)
        while True:
            begin = MAY_BEGIN.search(text, place)
            start = begin.start() if begin else len(text)
            if odd and odd.start() <= start:
                yield Found("odd", *odd.span(), odd[0])
                place = odd.end()
                odd = self.odd.search(text, place)
                continue
            if not begin:
                return
            kind, end = "token", 0
            if start == 0 or not _is_word(text[start - 1]):
                if end := local.end(start):
                    kind = "address"
                elif end := disguised.end(start):
                    kind = "disguised"
            if not end and begin[0] == "_":
                place = start + 1
                continue
            end = end or TOKEN.match(text, start).end()
            yield Found(kind, start, end, text[start:end])
            place = end
            if odd and odd.start() < place:
                odd = self.odd.search(text, place)


class _Rest:
    """Where an address that begins within a run of characters ends: what follows the run is read once for the run."""

    def __init__(self, text: str, run: re.Pattern, rest: re.Pattern):
        self.text, self.run, self.rest = text, run, rest
        self.run_end = self.address_end = 0

    def end(self, start: int) -> int:
        """The end of the address that begins at `start`; 0: none does."""
        if start >= self.run_end:
            self.run_end = self.run.match(self.text, start).end()
            rest = self.rest.match(self.text, self.run_end)
            self.address_end = rest.end() if rest else 0
        return self.address_end


def _is_word(sign: str) -> bool:
    return sign.isalnum() or sign == "_"


def joined(between: str, after_initial: bool) -> str | None:
    """How two tokens with `between` between them stand together: 'glue', 'space', 'comma' or None (they do not)."""
    return _joined(between, after_initial) if len(between) <= WIDEST else None


@lru_cache(1 << 14)
def _joined(between: str, after_initial: bool) -> str | None:
    if between and not between.strip("._-+'’"):
        return "glue"
    blank = BLANK.fullmatch(between)
    if blank and blank[2] and (after_initial or not blank[1]):
        return "space"
    return "comma" if COMMA.fullmatch(between) else None


def tokens(text: str) -> tuple[str, ...]:
    return tuple(token.casefold() for token in TOKEN.findall(text))


def in_case_of(old: str, new: str) -> str:
    """`new` in the case of `old`: all upper (of two letters or more), all lower, or as it is."""
    if old.isupper() and len(old) > 1:
        return new.upper()
    return new.lower() if old.islower() else new[0].upper() + new[1:]


def same_shape(text: str, rng: random.Random) -> str:
    """Random text with vowels, consonants and digits where `text` has them; anything else is kept. Lower case."""

    def other(c: str) -> str:
        kind = "aeiou" if c in "aeiou" else "0123456789" if c.isdigit() else "bcdfghklmnprstvz"
        return rng.choice(kind) if c.isalnum() else c

    return "".join(map(other, text.lower()))


# ---------------------------------------------------------------- people


@dataclass(eq=False)
class Person:
    """Everybody called `first` … `last` (tokens). `new` holds the stand-in of each token."""

    first: tuple[str, ...]
    last: tuple[str, ...]
    middles: set[str] = field(default_factory=set)
    spellings: dict[str, None] = field(default_factory=dict)  # names as written, in the order found
    addresses: dict[str, tuple[str, str] | None] = field(default_factory=dict)  # address → (spelling, rule) or None
    new: dict[str, str] = field(default_factory=dict)
    guesses: dict[str, str] = field(default_factory=dict)  # user name → new user name

    def rename(self, text: str) -> str:
        """`text`, in which every token of this name is replaced in its case (not the O of O'Neil)."""

        def word(match: re.Match) -> str:
            key = match[0].casefold()
            if len(key) == 1 and text[match.end() : match.end() + 1] in ("'", "’"):
                return match[0]
            return in_case_of(match[0], self.new.get(key, match[0]))

        return TOKEN.sub(word, text)


def spelled(name: str) -> str:
    """A name as First Middle Last: 'Last, First' turned; titles, suffixes and what follows a slash left out."""
    parts = [part.split() for part in re.sub(r"/.*|[^\w\s.'’+,-]", " ", name).split(",")]
    parts = [part for part in parts if part and part[0].casefold().strip(".") not in mail.SUFFIXES]
    words = parts[1] + parts[0] if len(parts) == 2 else [word for part in parts for word in part]
    words = [word for word in words if any(c.isalpha() for c in word)]
    while len(words) > 1 and words[0].casefold().strip(".") in mail.TITLES:
        words = words[1:]
    while len(words) > 1 and words[-1].casefold().strip(".") in mail.SUFFIXES:
        words = words[:-1]
    return " ".join(words)


def parse_name(name: str) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]] | None:
    """(first, middle, last) tokens of a name, None without letters; particles before the last word belong to it.

    A name of one word has an empty last.
    """
    words = [found for found in map(tokens, spelled(name).split()) if found]
    if not words:
        return None
    first, *rest = words
    last = rest.pop() if rest else ()
    while rest and rest[-1][-1] in mail.PARTICLES:
        last = rest.pop() + last
    return first, tuple(token for word in rest for token in word), last


def find_names(text: str) -> Iterator[tuple[str, str | None]]:
    """(name, its address or None) of everybody named beside an address, in a quoted header or in a forwarding line."""
    for opening, address, _ in mail.body_addresses(text, 0):
        name, _ = mail.left_name(text, opening)
        if name:
            yield name, address.casefold()
    fields = [match[1] for match in HEADER.finditer(text)]
    fields += [match[match.lastindex] for match in NAMED.finditer(text)]
    for value in fields:
        items = value.split(";")
        if len(items) == 1 and "," in value and (all(" " in part.strip() for part in value.split(","))):
            items = value.split(",")
        for item in items:
            name, _ = mail.person(re.split(r"[<\[(]", item)[0])
            if name and name[0].isupper() and name.split()[-1][0].isupper():
                yield name, None


def holds_one(words: tuple[str, ...], known: set[tuple[str, ...]]) -> bool:
    """Whether a run of the words is one of `known`."""
    ends = range(1, len(words) + 1)
    return any(words[start:end] in known for end in ends for start in range(end))


def rule_of(name: str, local: str) -> str | None:
    """The name rule (`name_rule_guesses`) that makes `local` of `name`, digits left out; None when none does."""
    wanted = re.sub(r"\d", "", local)
    return next((rule for rule, guess in name_rule_guesses(name).items() if guess == wanted), None)


def by_rule(name: str, rule: str, local: str) -> str:
    """What `rule` makes of `name`, with the digits that `local` begins and ends with (inner ones go to the end)."""
    leading = re.match(r"\d*", local)[0]
    return leading + name_rule_guesses(name)[rule] + "".join(re.findall(r"\d", local[len(leading) :]))


class People:
    """Everybody of a file. `add` names and addresses, gt pairs first; then `settle` gives stand-ins to all."""

    def __init__(self, pairs: Iterable[tuple[str, str]]):
        self.of_name: dict[tuple, Person] = {}
        self.of_address: dict[str, Person | None] = {}
        self.truths = {address.strip().casefold() for _, address in pairs}
        self.new_address: dict[str, str] = {}
        self.faker_first: frozenset[str] = frozenset(map(str.casefold, _faker("first", LOCALES[:1])))
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
        """Give addresses that stand beside no name an owner: who alone has a name that makes them, else First.Last."""
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
        """Distinct people get distinct names, distinct addresses distinct addresses; no word of an old name is used."""
        rng = random.Random(seed)
        letters = list("abcdefghijklmnopqrstuvwxyz")
        others = letters[:]
        while any(a == b for a, b in zip(letters, others)):
            rng.shuffle(others)
        self.letter = dict(zip(letters, others))
        people = [self.of_name[key] for key in sorted(self.of_name)]
        old = {token for person in people for token in (*person.first, *person.middles, *person.last)}
        self.firsts = _pool("first", old, len({person.first for person in people}))
        self.lasts = _pool("last", old, len({person.last for person in people}))
        self.domains = new_domains({address.rpartition("@")[2] for address in self.of_address}, rng)
        for address, person in sorted(self.of_address.items()):
            if person is not None:
                local = address.rpartition("@")[0]
                rules = ((spelling, rule_of(spelling, local)) for spelling in person.spellings)
                person.addresses[address] = next((found for found in rules if found[1]), None)
        names, taken = set(), set()
        for person in people:
            self._name_one(person, names, taken, rng)
        locals_ = {address.rpartition("@")[0] for address in self.of_address}
        known = {order for p in people if p.last for order in (p.first + p.last, p.last + p.first)}
        known |= {tokens(guess) for person in people for guess in person.guesses}
        for address in sorted(set(self.of_address) - set(self.new_address)):
            local, _, domain = address.rpartition("@")
            role = address not in self.truths and mail.address_problem(address) == mail.ROLE_ADDRESS
            role = role and not holds_one(tokens(local), known)
            new = local if role else same_shape(local, rng)
            while f"{new}@{self.domains[domain]}" in taken or (new in locals_ and not role):
                new, role = same_shape(local + "ob" * rng.randint(0, 2), rng), False
            self.new_address[address] = f"{new}@{self.domains[domain]}"
            taken.add(self.new_address[address])
        self.standins = random.Random(f"{seed}-alone").sample(self.firsts, len(self.firsts))

    def _name_one(self, person: Person, names: set[tuple], taken: set[str], rng: random.Random) -> None:
        """Draw a name that is not in `names` and makes no address in `taken`; add what it makes to both."""
        for attempt in itertools.count():
            self._draw(person, rng, invent=attempt > TRIES)
            name = tuple(person.new[token] for token in (*person.first, *person.last))
            made = {}
            for address, found in person.addresses.items():
                if found:
                    local, _, domain = address.rpartition("@")
                    made[address] = f"{by_rule(person.rename(found[0]), found[1], local)}@{self.domains[domain]}"
            if name not in names and (taken.isdisjoint(made.values()) or attempt > 2 * TRIES):
                break
        names.add(name)
        for address, new in made.items():  # of two that a person's name makes alike, the second is random
            if new not in taken:
                self.new_address[address] = new
                taken.add(new)
        for spelling in person.spellings:
            new = name_rule_guesses(person.rename(spelling))
            for rule, guess in name_rule_guesses(spelling).items():
                if len(guess) >= MIN_USER and guess not in person.first + person.last and rule in new:
                    person.guesses.setdefault(guess, new[rule])

    def _draw(self, person: Person, rng: random.Random, invent: bool) -> None:
        """A stand-in for every token: from the pools, or made up; letters by the table, particles as they are."""

        def draw(token: str, pool: list[str]) -> str:
            return same_shape(token + "a", rng).capitalize() if invent else rng.choice(pool)

        person.new = {letter: new.upper() for letter, new in self.letter.items()}
        particles = {token for token in person.last[:-1] if token in mail.PARTICLES}
        for token in person.last:
            if token not in self.letter:
                person.new[token] = token if token in particles else draw(token, self.lasts)
        for token in sorted(person.middles):  # 'Anna M. Roe' and 'Anna Maria Roe' agree
            if token not in self.letter:
                initial = self.letter.get(token[0], "e").upper()
                used = set(person.new.values())
                fitting = [name for name in self.firsts if name[0] == initial and name not in used]
                person.new[token] = rng.choice(fitting) if fitting else initial + draw(token, self.firsts)[1:]
        for token in person.first:
            if token not in self.letter:
                person.new[token] = draw(token, self.firsts)

    def stand_in(self, token: str) -> str:
        """The first name put for `token` where it is nobody's of the row; always the same, whatever the order."""
        return self.standins[random.Random(token).randrange(len(self.standins))]


@cache
def _faker(kind: str, locales: tuple[str, ...]) -> list[str]:
    """First or last names of Faker's locales: one word of ASCII letters, sorted within a locale."""
    names = {}
    for locale in locales:
        provider = import_module(f"faker.providers.person.{locale}").Provider
        found = {n for key in ("s", "s_male", "s_female") for n in getattr(provider, f"{kind}_name{key}", ())}
        names.update(dict.fromkeys(name for name in sorted(found) if FAKER_WORD.fullmatch(name)))
    return list(names)


def _pool(kind: str, old: set[str], wanted: int) -> list[str]:
    """Names none of which is in `old` or an ordinary word: American ones, and others until there are `wanted`."""
    for n in range(1, len(LOCALES) + 1):
        pool = [name for name in _faker(kind, LOCALES[:n]) if name.casefold() not in old | ORDINARY]
        if len(pool) >= max(wanted, 100):
            break
    return pool


def new_domains(domains: Iterable[str], rng: random.Random) -> dict[str, str]:
    """Domain → invented domain of as many labels below .example; parts of one domain stay parts of one domain."""
    suffixes = {".".join(labels[i:]) for d in domains for labels in [d.split(".")] for i in range(len(labels))}
    taken = {label for suffix in suffixes for label in suffix.split(".")} | {"example"}
    new = {}
    for suffix in sorted(suffixes, key=lambda s: (s.count("."), s)):
        label, _, parent = suffix.partition(".")
        if not parent and any(other.endswith("." + suffix) for other in suffixes):
            new[suffix] = "example"
            continue
        made = same_shape(label, rng)
        while made in taken:
            made = same_shape(label + "o" * rng.randint(0, 3), rng) + rng.choice(["", "", "n", "r"])
        taken.add(made)
        new[suffix] = f"{made}.{new[parent]}" if parent else made
    return new


# ---------------------------------------------------------------- one text, one row


class Scan:
    """Replaces everything in the texts of one row at a time.

    words, lower: how often a token is read in the file, and how often of these in lower case.
    `ordinary`: tokens in Faker's English word list, in ORDINARY, or in lower case more often than not.
    """

    def __init__(self, people: People, scanner: Scanner, words: Counter, lower: Counter):
        from faker.providers.lorem.en_US import Provider

        self.people, self.scanner, self.words = people, scanner, words
        self.ordinary = ORDINARY | {word.casefold() for word in Provider.word_list}
        self.ordinary |= {word for word, n in lower.items() if n >= 3 and 2 * n > words[word]}
        self.forward, self.backward, self.longest = {}, {}, Counter()
        self.parts, self.initials, self.users = defaultdict(list), defaultdict(list), {}
        for person in people.of_name.values():
            if person.last:
                short = (
                    tuple(itertools.dropwhile(lambda token: token in mail.PARTICLES, person.last[:-1]))
                    + person.last[-1:]
                )
                for last in (person.last, short):
                    self._form(self.forward, person.first + last, (person, 0))
                    self._form(self.backward, last + person.first, (person, len(last)))
                for spelling in person.spellings:
                    self._form(self.forward, tokens(spelling), (person, 0))
            for token in {*person.first, *person.middles, *person.last}:
                if len(token) > 1 and person.new.get(token, token) != token:
                    self.parts[token].append(person)
            if person.last:
                self.initials[person.first[0][0], person.last[-1]].append(person)
        self.firsts = {person.first[0] for person in people.of_name.values() if len(person.first[0]) > 1}
        for address in sorted(people.new_address, reverse=True):
            person, local = people.of_address[address], address.rpartition("@")[0]
            new = people.new_address[address].rpartition("@")[0]
            if new != local and not (person and local in (*person.first, *person.last)):
                by_name = person is not None and person.addresses[address] is not None
                sure = len(local) >= MIN_USER and local not in self.ordinary
                sure = sure and (by_name or re.search(r"[a-z][\d._-]+[a-z]", local) is not None)
                self.users[local] = (new, person, address, sure)

    def _form(self, table: dict, key: tuple[str, ...], entry: tuple[Person, int]) -> None:
        """Enter tokens, and those without initials, for (person, number of tokens before the comma)."""
        for form in {key, key[:1] + tuple(token for token in key[1:] if len(token) > 1)}:
            if len(form) > 1:
                table.setdefault(form, entry)
                self.longest[form[0]] = max(self.longest[form[0]], len(form))

    def replace(self, texts: list[str]) -> list[str]:
        """The texts of one row with everything replaced; who is mentioned in one of them is known in all."""
        found = [self._find(text) for text in texts]
        offset, mentions, addresses = 0, defaultdict(list), set()
        for text, (fixed, _) in zip(texts, found):
            for start, _, _, person, address in fixed:
                if person is not None:
                    mentions[person].append(offset + start)
                addresses.add(address)
            offset += len(text) + 1
        for places in mentions.values():
            places.sort()
        guesses = {guess: new for person in mentions for guess, new in person.guesses.items()}
        offset, results = 0, []
        for text, (fixed, loose) in zip(texts, found):
            edits = [(start, end, new) for start, end, new, _, _ in fixed]
            edits += self._alone(text, loose, offset, mentions, addresses, guesses)
            pieces, place = [], 0
            for start, end, new in sorted(edits):
                pieces += [text[place:start], new]
                place = end
            results.append("".join([*pieces, text[place:]]))
            offset += len(text) + 1
        return results

    def _find(self, text: str) -> tuple[list[tuple], list[tuple[int, int, str]]]:
        """([(start, end, new, person, address or None)] of addresses and full names, the other tokens)."""
        fixed, found, loose = [], [], []
        for piece in self.scanner(text):
            kind, start, end, written = piece
            if kind == "token":
                found.append((start, end, written.casefold()))
                continue
            address = piece.address
            local, _, domain = self.people.new_address[address].rpartition("@")
            if kind == "disguised":
                _, at, labels = DISGUISED.fullmatch(written).groups()
                dots = [*DOTS.findall(labels), ""]
                new = local + at + "".join(label + dot for label, dot in zip(domain.split("."), dots))
            else:
                old_local, _, old_domain = written.rpartition("@")
                new = f"{address_case(old_local, local)}@{address_case(old_domain, domain)}"
            fixed.append((start, end, new, self.people.of_address[address], address))
        i = 0
        while i < len(found):
            person, n = self._full_name(text, found, i) if found[i][2] in self.longest else (None, 1)
            if person is None:
                loose.append(found[i])
            else:
                start, end = found[i][0], found[i + n - 1][1]
                fixed.append((start, end, person.rename(text[start:end]), person, None))
            i += n
        return fixed, loose

    def _full_name(self, text: str, found: list, i: int) -> tuple[Person | None, int]:
        """(person, number of tokens) of the longest full name that begins at token i, else (None, 1)."""
        words, kinds, best = [found[i][2]], [], (None, 1)
        for j in range(i + 1, min(i + MAX_TOKENS, len(found))):
            kind = joined(text[found[j - 1][1] : found[j][0]], len(words[-1]) == 1)
            words.append(found[j][2])
            kinds.append(kind)
            long = sum(len(word) > 1 for word in words[1:]) + 1
            if kind is None or kinds.count("comma") > 1 or long > self.longest[words[0]]:
                break
            # initials that the known name lacks: within 'First M. Last', behind 'Last, First M.'
            inner = tuple(w for n, w in enumerate(words) if n in (0, len(words) - 1) or len(w) > 1)
            bare = tuple(w for n, w in enumerate(words) if n == 0 or len(w) > 1)
            person = None
            if "comma" not in kinds:
                person, _ = self.forward.get(tuple(words)) or self.forward.get(inner) or (None, 0)
            if person is None:
                person, n_last = self.backward.get(tuple(words)) or self.backward.get(bare) or (None, 0)
                if person and "comma" in kinds:
                    person = person if kinds.index("comma") + 1 == n_last else None
                elif person and "space" in kinds:
                    capitals = all(text[found[k][0]].isupper() for k in (i, j))
                    person = person if capitals and not self.ordinary.issuperset(words) else None
            if person:
                best = person, j - i + 1
        return best

    def _alone(self, text, loose, offset, mentions, addresses, guesses) -> Iterator[tuple[int, int, str]]:
        """Edits of user names, initials with last names and parts of names among the loose tokens."""
        skip = 0
        for i, (start, end, token) in enumerate(loose):
            if start < skip:
                continue
            user = self._user(text, loose, i, mentions, addresses, guesses)
            if user:
                skip = user[1]
                yield user
                continue
            if len(token) == 1 and i + 1 < len(loose):
                last_start, last_end, last = loose[i + 1]
                owners = self.initials.get((token, last))
                if owners and joined(text[end:last_start], True) == "space" and text[start].isupper():
                    here = [person for person in owners if person in mentions]
                    if text[last_start].isupper() and (here or last not in self.ordinary):
                        skip = last_end
                        yield start, last_end, (here or owners)[0].rename(text[start:last_end])
                        continue
            new = self._part(text, start, end, token, offset, mentions)
            if new:
                yield start, end, in_case_of(text[start:end], new)

    def _user(self, text, loose, i, mentions, addresses, guesses) -> tuple[int, int, str] | None:
        start, end = loose[i][:2]
        ends = [end]
        for next_start, next_end, _ in loose[i + 1 : i + 6]:
            if next_start - ends[-1] != 1 or text[ends[-1]] not in "._-+":
                break
            ends.append(next_end)
        for end in reversed(ends):
            run = text[start:end].casefold()
            plain = run.rstrip("0123456789")
            if run in self.users:
                new, person, address, sure = self.users[run]
                same_case = len(run) >= MIN_USER or text[start:end] in (run, run.upper())
                if sure or ((person in mentions or address in addresses) and same_case and run not in self.ordinary):
                    return start, end, address_case(text[start:end], new)
            for name, digits in ((run, ""), (plain, run[len(plain) :])):
                if name in guesses and name not in self.ordinary and self.words[name] <= COMMON:
                    return start, end, address_case(text[start:end], guesses[name] + digits)
        return None

    def _part(self, text, start, end, token, offset, mentions) -> str | None:
        """What replaces a token that stands alone, or None (rules: top of this file)."""
        owners = [person for person in self.parts.get(token, ()) if person in mentions]
        first = token in self.firsts
        if not (owners or first or token in self.people.faker_first):
            return None
        capital = text[start].isupper()
        if token in self.ordinary:
            sentence = owners and token not in CALENDAR and re.search(r"[a-z,] $", text[max(0, start - 2) : start])
            wanted = capital and (sentence or in_name_position(text, start, end))
        else:
            wanted = owners or (capital and (first or in_name_position(text, start, end)))
        if not wanted:
            return None
        if owners:
            place = offset + start
            owner = min(owners, key=lambda person: distance(place, mentions[person]))
            return owner.new[token]
        return self.people.stand_in(token)


def address_case(old: str, new: str) -> str:
    """`new` in upper case, or with its words capitalised where those of `old` are."""
    if old.isupper() and sum(c.isalpha() for c in old) > 1:
        return new.upper()
    capitals = iter([word[0].isupper() for word in TOKEN.findall(old)])
    return TOKEN.sub(lambda word: word[0].capitalize() if next(capitals, False) else word[0], new)


def distance(place: int, places: list[int]) -> int:
    """From `place` to the nearest of the sorted `places`, of which there is one at least."""
    after = bisect.bisect(places, place)
    return min(abs(place - other) for other in places[max(0, after - 1) : after + 1])


def in_name_position(text: str, start: int, end: int) -> bool:
    """Whether the word stands after a greeting or title, alone on its line, or first on it before a comma."""
    begin = start
    while begin and text[begin - 1] in " \t>|*-":
        begin -= 1
    if not begin or text[begin - 1] == "\n":
        after = end
        while after < len(text) and text[after] in " \t\r,.:;!*-":
            after += 1
        if after == len(text) or text[after] == "\n" or text[end] in (",", ":"):
            return True
    return GREETING.search(text[max(0, start - 24) : start]) is not None


def map_strings(value, function: Callable[[str], str]):
    """`value` with `function` applied to every string in it (lists and dicts walked; keys kept)."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, list):
        return [map_strings(item, function) for item in value]
    if isinstance(value, dict):
        return {key: map_strings(item, function) for key, item in value.items()}
    return value


def strings(row: dict) -> list[str]:
    """Every string of a row, in the order in which `map_strings` meets them."""
    found: list[str] = []
    map_strings(row, lambda text: found.append(text) or text)
    return found


def meet(rows: list[dict], seed: int) -> tuple[People, Scan]:
    """The people of a file with their stand-ins, and the scan that replaces them."""
    people = People([(row["gt-name"], row["gt-email"]) for row in rows])
    scanner = Scanner(people.truths)
    words: Counter = Counter()
    lower: Counter = Counter()
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
    people.settle(seed)
    return people, Scan(people, scanner, words, lower)
