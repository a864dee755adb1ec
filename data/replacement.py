"""Replacing people and addresses in text: who is in it, their stand-ins, and one scan a text.

Text in, text out: no paths, no options. Who the people are: data/people.py; how a text is split: data/scanner.py; what
checks the result: data/leaks.py.

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
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cached_property

from data.enron import mail
from data.people import CALENDAR, MIN_USER, ORDINARY, People, Person, read_people
from data.scanner import DISGUISED, DOTS, TOKEN, Scanner, in_case_of, joined, tokens

COMMON = 10  # a user name that only a name rule makes and that is read more often is taken for a word
MAX_TOKENS = 12  # of a full name with its initials
GREETING = re.compile(
    r"(?:\b(?:hi|hello|hey|dear|thanks|thank you|regards|cheers|best|sincerely|morning|afternoon|evening|mr|mrs|ms|dr"
    r"|(?:from|to|cc|attn) ?:)[ ,.!-]*)$",
    re.I,
)


class Mentioned:
    """Who is mentioned in one row and where; what a token may mean there is looked up once for each token.

    mentions: person → sorted places. Every look-up goes over the owners of a token or over the people of the row,
    whichever are fewer, so that neither a file with many people of one name nor a row with many people is slow.
    """

    def __init__(self, scan: "Scan", mentions: dict[Person, list[int]]):
        self.scan, self.mentions = scan, mentions
        self._owners: dict[str, list[Person]] = {}
        self._first: dict[tuple[str, str], Person | None] = {}
        self._guessed: dict[str, str | None] = {}
        self._merged: dict[str, list[tuple[int, int, Person]]] = {}  # token → (place, order in the file, owner)
        self._of_owners: dict[tuple[Person, ...], list[tuple[int, int, Person]]] = {}

    def __contains__(self, person: Person | None) -> bool:
        return person in self.mentions

    def _among(self, owners: dict[Person, None]) -> list[Person]:
        """Those of `owners` who are mentioned, in the order of the file."""
        if len(owners) <= len(self.mentions):
            return [person for person in owners if person in self.mentions]
        return sorted((person for person in self.mentions if person in owners), key=self.scan.order.__getitem__)

    def owners(self, token: str) -> list[Person]:
        """The mentioned people whose name has the token."""
        if token not in self._owners:
            self._owners[token] = self._among(self.scan.parts.get(token, {}))
        return self._owners[token]

    def first(self, initial: str, last: str) -> Person | None:
        """The first in the file of the mentioned people with this initial and last name."""
        key = initial, last
        if key not in self._first:
            self._first[key] = next(iter(self._among(self.scan.initials[key])), None)
        return self._first[key]

    def guessed(self, user: str) -> str | None:
        """The stand-in of a user name that a rule makes of a mentioned name; of several people, the last mentioned."""
        if user not in self._guessed:
            owners = self.scan.guessers.get(user, {})
            if len(owners) <= len(self.mentions):
                rank = self._rank
                person = max((p for p in owners if p in rank), key=rank.__getitem__, default=None)
            else:
                person = next((p for p in reversed(self.mentions) if p in owners), None)
            self._guessed[user] = person and person.guesses[user]
        return self._guessed[user]

    @cached_property
    def _rank(self) -> dict[Person, int]:
        return {person: rank for rank, person in enumerate(self.mentions)}

    def nearest(self, token: str, place: int) -> Person:
        """The owner of `token` who is mentioned nearest to `place`; of two as near, the first in the file."""
        owners = self.owners(token)
        if len(owners) == 1:
            return owners[0]
        if token not in self._merged:
            key = tuple(owners)
            if key not in self._of_owners:
                places = ((start, self.scan.order[p], p) for p in owners for start in self.mentions[p])
                self._of_owners[key] = sorted(places)
            self._merged[token] = self._of_owners[key]
        merged = self._merged[token]
        after = bisect.bisect(merged, (place,))
        around = merged[max(0, after - 1) : after + 1]
        return min(around, key=lambda mention: (abs(place - mention[0]), mention[1]))[2]


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
        self.order = {person: number for number, person in enumerate(people.of_name.values())}
        # sets of people in the order of the file, as keys
        self.parts: defaultdict[str, dict[Person, None]] = defaultdict(dict)
        self.initials: defaultdict[tuple[str, str], dict[Person, None]] = defaultdict(dict)
        self.guessers: defaultdict[str, dict[Person, None]] = defaultdict(dict)
        self.users = {}
        for person in self.order:
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
                    self.parts[token][person] = None
            if person.last:
                self.initials[person.first[0][0], person.last[-1]][person] = None
            for guess in person.guesses:
                self.guessers[guess][person] = None
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
        mentioned = Mentioned(self, mentions)
        offset, results = 0, []
        for text, (fixed, loose) in zip(texts, found):
            edits = [(start, end, new) for start, end, new, _, _ in fixed]
            edits += self._alone(text, loose, offset, mentioned, addresses)
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

    def _alone(self, text, loose, offset, mentioned, addresses) -> Iterator[tuple[int, int, str]]:
        """Edits of user names, initials with last names and parts of names among the loose tokens."""
        skip = 0
        for i, (start, end, token) in enumerate(loose):
            if start < skip:
                continue
            user = self._user(text, loose, i, mentioned, addresses)
            if user:
                skip = user[1]
                yield user
                continue
            if len(token) == 1 and i + 1 < len(loose):
                last_start, last_end, last = loose[i + 1]
                owners = self.initials.get((token, last))
                if owners and joined(text[end:last_start], True) == "space" and text[start].isupper():
                    here = mentioned.first(token, last)
                    if text[last_start].isupper() and (here or last not in self.ordinary):
                        skip = last_end
                        yield start, last_end, (here or next(iter(owners))).rename(text[start:last_end])
                        continue
            new = self._part(text, start, end, token, offset, mentioned)
            if new:
                yield start, end, in_case_of(text[start:end], new)

    def _user(self, text, loose, i, mentioned, addresses) -> tuple[int, int, str] | None:
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
                if sure or ((person in mentioned or address in addresses) and same_case and run not in self.ordinary):
                    return start, end, address_case(text[start:end], new)
            for name, digits in ((run, ""), (plain, run[len(plain) :])):
                new = mentioned.guessed(name) if name not in self.ordinary and self.words[name] <= COMMON else None
                if new is not None:
                    return start, end, address_case(text[start:end], new + digits)
        return None

    def _part(self, text, start, end, token, offset, mentioned) -> str | None:
        """What replaces a token that stands alone, or None (rules: top of this file)."""
        owners = mentioned.owners(token)
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
            return mentioned.nearest(token, offset + start).new[token]
        return self.people.stand_in(token)


def address_case(old: str, new: str) -> str:
    """`new` in upper case, or with its words capitalised where those of `old` are."""
    if old.isupper() and sum(c.isalpha() for c in old) > 1:
        return new.upper()
    capitals = iter([word[0].isupper() for word in TOKEN.findall(old)])
    return TOKEN.sub(lambda word: word[0].capitalize() if next(capitals, False) else word[0], new)


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


def meet(rows: list[dict], seed: int) -> tuple[People, Scan]:
    """The people of a file with their stand-ins, and the scan that replaces them."""
    people, scanner, words, lower = read_people(rows)
    people.settle(seed)
    return people, Scan(people, scanner, words, lower)
