"""Replace people and addresses in texts by their stand-ins, with one scan per text.

Text in, text out: no paths, no options. data/people.py finds the people, data/scanner.py splits a text, data/leaks.py
checks the result.

What is rewritten:
* addresses, everywhere and in any case, including `jane (at) x (dot) example` and `jane at x dot example` (no other
  disguises); the local part of a role address (info@, sales@) is kept, unless the address is a row's gt-email or
  contains the name of a known person;
* full names, everywhere and in any case: First Last, First M. Last, First Middle Last, `Last, First [M.]`, separated by
  blanks, one line break (with quote marks) or one of . _ - ; 'Last First' if both words are capitalised;
* user names without a domain: local parts that occur in the file, everywhere, unless they are short, an ordinary word
  or derived by no name rule (then only in rows that mention the owner); user names that a name rule derives from a
  name, in rows that mention that person;
* parts of names on their own. If not an ordinary word: any part in rows that mention the person (in any case), and
  capitalised first names everywhere. If an ordinary word (`Scan.ordinary`): only if capitalised and in a name position
  (after a greeting or a title, alone on its line, or first on its line before a comma), or inside a sentence in rows
  that mention the person. First names from Faker's lists that belong to nobody in the file: in a name position;
* `J. Moss`, if Moss is not an ordinary word or the row mentions such a person.
A row mentions a person by a full name or an address. Other last names on their own are kept: most are towns and
companies.
"""

import bisect
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from data.enron.names import PARTICLES
from data.people import MIN_USER, People, Person, read_people
from data.scanner import DISGUISED, DOTS, TOKEN, Scanner, in_case_of, joined, tokens
from data.stand_ins import CALENDAR, ORDINARY

COMMON = 10  # a user name that only a name rule derives counts as a word if it occurs more often than this
MAX_TOKENS = 12  # of a full name with its initials

Token = tuple[int, int, str]  # start, end, text (of an edit: the new one)
Fixed = tuple[int, int, str, Person | None, str | None]  # an address or full name: start, end, new, person, address
Forms = dict[tuple[str, ...], tuple[Person, int]]  # tokens of a name → (person, number of tokens before the comma)

GREETING = re.compile(
    r"(?:\b(?:hi|hello|hey|dear|thanks|thank you|regards|cheers|best|sincerely|morning|afternoon|evening|mr|mrs|ms|dr"
    r"|(?:from|to|cc|attn) ?:)[ ,.!-]*)$",
    re.I,
)


class Mentioned:
    """Who is mentioned in one row and where; look-ups are cached per token.

    mentions: person → sorted positions. Each look-up iterates over the owners of a token or over the people of the row,
    whichever are fewer, so neither many people of one name in a file nor many people in a row are slow.
    """

    def __init__(self, scan: "Scan", mentions: dict[Person, list[int]]):
        self.scan, self.mentions = scan, mentions
        self._owners: dict[str, list[Person]] = {}
        self._first: dict[tuple[str, str], Person | None] = {}
        self._guessed: dict[str, str | None] = {}
        self._merged: dict[str, list[tuple[int, int, Person]]] = {}  # token → (position, order in the file, owner)
        self._of_owners: dict[tuple[Person, ...], list[tuple[int, int, Person]]] = {}

    def __contains__(self, person: Person | None) -> bool:
        return person in self.mentions

    def _among(self, owners: dict[Person, None]) -> list[Person]:
        """The `owners` that are mentioned, in file order."""
        if len(owners) <= len(self.mentions):
            return [person for person in owners if person in self.mentions]
        return sorted((person for person in self.mentions if person in owners), key=self.scan.order.__getitem__)

    def owners(self, token: str) -> list[Person]:
        """The mentioned people whose name contains the token."""
        if token not in self._owners:
            self._owners[token] = self._among(self.scan.parts.get(token, {}))
        return self._owners[token]

    def first(self, initial: str, last: str) -> Person | None:
        """The mentioned person with this initial and last name who comes first in the file."""
        key = initial, last
        if key not in self._first:
            self._first[key] = next(iter(self._among(self.scan.initials[key])), None)
        return self._first[key]

    def guessed(self, user: str) -> str | None:
        """The stand-in of a user name that a rule derives from a mentioned name; the last mentioned person wins."""
        if user not in self._guessed:
            owners = self.scan.guessers.get(user, {})
            if len(owners) <= len(self.mentions):
                rank = self._rank
                person = max((p for p in owners if p in rank), key=rank.__getitem__, default=None)
            else:
                person = next((p for p in reversed(self.mentions) if p in owners), None)
            self._guessed[user] = person.guesses[user] if person else None
        return self._guessed[user]

    @cached_property
    def _rank(self) -> dict[Person, int]:
        return {person: rank for rank, person in enumerate(self.mentions)}

    def nearest(self, token: str, position: int) -> Person:
        """The owner of `token` mentioned nearest to `position`; in a tie, the first in the file."""
        owners = self.owners(token)
        if len(owners) == 1:
            return owners[0]
        if token not in self._merged:
            key = tuple(owners)
            if key not in self._of_owners:
                positions = ((start, self.scan.order[p], p) for p in owners for start in self.mentions[p])
                self._of_owners[key] = sorted(positions)
            self._merged[token] = self._of_owners[key]
        merged = self._merged[token]
        after = bisect.bisect(merged, (position,))
        around = merged[max(0, after - 1) : after + 1]
        return min(around, key=lambda mention: (abs(position - mention[0]), mention[1]))[2]


class Scan:
    """Replaces people and addresses in the texts of one row at a time.

    words, lower: count of each token in the file, and of its lower-case occurrences.
    `ordinary`: tokens in Faker's English word list, in ORDINARY, or more often in lower case than not.
    """

    def __init__(self, people: People, scanner: Scanner, words: Counter[str], lower: Counter[str]):
        from faker.providers.lorem.en_US import Provider

        self.people, self.scanner, self.words = people, scanner, words
        self.ordinary = ORDINARY | {word.casefold() for word in Provider.word_list}
        self.ordinary |= {word for word, n in lower.items() if n >= 3 and 2 * n > words[word]}
        self.forward: Forms = {}
        self.backward: Forms = {}
        self.longest: Counter[str] = Counter()
        self.order = {person: number for number, person in enumerate(people.of_name.values())}
        # ordered sets of people (dict keys, in file order)
        self.parts: defaultdict[str, dict[Person, None]] = defaultdict(dict)
        self.initials: defaultdict[tuple[str, str], dict[Person, None]] = defaultdict(dict)
        self.guessers: defaultdict[str, dict[Person, None]] = defaultdict(dict)
        self.users: dict[str, tuple[str, Person | None, str, bool]] = {}
        for person in self.order:
            if person.last:
                without = itertools.dropwhile(lambda token: token in PARTICLES, person.last[:-1])
                short = tuple(without) + person.last[-1:]
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
            owner, local = people.of_address[address], address.rpartition("@")[0]
            new = people.new_address[address].rpartition("@")[0]
            if new != local and not (owner and local in (*owner.first, *owner.last)):
                by_name = owner is not None and owner.addresses[address] is not None
                sure = len(local) >= MIN_USER and local not in self.ordinary
                sure = sure and (by_name or re.search(r"[a-z][\d._-]+[a-z]", local) is not None)
                self.users[local] = (new, owner, address, sure)

    def _form(self, table: Forms, key: tuple[str, ...], entry: tuple[Person, int]) -> None:
        """Register the tokens, with and without initials, for (person, number of tokens before the comma)."""
        for form in {key, key[:1] + tuple(token for token in key[1:] if len(token) > 1)}:
            if len(form) > 1:
                table.setdefault(form, entry)
                self.longest[form[0]] = max(self.longest[form[0]], len(form))

    def replace(self, texts: list[str]) -> list[str]:
        """Replace everything in the texts of one row; a person mentioned in one of them counts as mentioned in all."""
        pieces_of = [self._find(text) for text in texts]
        offset = 0
        mentions: defaultdict[Person, list[int]] = defaultdict(list)
        addresses: set[str | None] = set()
        for text, (fixed, _) in zip(texts, pieces_of):
            for start, _, _, person, address in fixed:
                if person is not None:
                    mentions[person].append(offset + start)
                addresses.add(address)
            offset += len(text) + 1
        for positions in mentions.values():
            positions.sort()
        mentioned = Mentioned(self, mentions)
        offset, results = 0, []
        for text, (fixed, loose) in zip(texts, pieces_of):
            edits = [(start, end, new) for start, end, new, _, _ in fixed]
            edits += self._alone(text, loose, offset, mentioned, addresses)
            pieces, position = [], 0
            for start, end, new in sorted(edits):
                pieces += [text[position:start], new]
                position = end
            results.append("".join([*pieces, text[position:]]))
            offset += len(text) + 1
        return results

    def _find(self, text: str) -> tuple[list[Fixed], list[Token]]:
        """([(start, end, new, person, address or None)] of addresses and full names, the remaining tokens)."""
        fixed: list[Fixed] = []
        all_tokens: list[Token] = []
        loose: list[Token] = []
        for piece in self.scanner(text):
            kind, start, end, written = piece
            if kind == "token":
                all_tokens.append((start, end, written.casefold()))
                continue
            address = piece.address
            local, _, domain = self.people.new_address[address].rpartition("@")
            if kind == "disguised":
                match = DISGUISED.fullmatch(written)
                assert match
                dots = [*DOTS.findall(match[3]), ""]
                new = local + match[2] + "".join(label + dot for label, dot in zip(domain.split("."), dots))
            else:
                old_local, _, old_domain = written.rpartition("@")
                new = f"{address_case(old_local, local)}@{address_case(old_domain, domain)}"
            fixed.append((start, end, new, self.people.of_address[address], address))
        i = 0
        while i < len(all_tokens):
            person, n = self._full_name(text, all_tokens, i) if all_tokens[i][2] in self.longest else (None, 1)
            if person is None:
                loose.append(all_tokens[i])
            else:
                start, end = all_tokens[i][0], all_tokens[i + n - 1][1]
                fixed.append((start, end, person.rename(text[start:end]), person, None))
            i += n
        return fixed, loose

    def _full_name(self, text: str, all_tokens: list[Token], i: int) -> tuple[Person | None, int]:
        """(person, number of tokens) of the longest full name that begins at token i, else (None, 1)."""
        words = [all_tokens[i][2]]
        kinds: list[str | None] = []
        best: tuple[Person | None, int] = (None, 1)
        for j in range(i + 1, min(i + MAX_TOKENS, len(all_tokens))):
            kind = joined(text[all_tokens[j - 1][1] : all_tokens[j][0]], len(words[-1]) == 1)
            words.append(all_tokens[j][2])
            kinds.append(kind)
            long = sum(len(word) > 1 for word in words[1:]) + 1
            if kind is None or kinds.count("comma") > 1 or long > self.longest[words[0]]:
                break
            # without initials that the known name lacks: inside 'First M. Last', after 'Last, First M.'
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
                    capitals = all(text[all_tokens[k][0]].isupper() for k in (i, j))
                    person = person if capitals and not self.ordinary.issuperset(words) else None
            if person:
                best = person, j - i + 1
        return best

    def _alone(
        self, text: str, loose: list[Token], offset: int, mentioned: Mentioned, addresses: set[str | None]
    ) -> Iterator[Token]:
        """Edits for user names, initials with last names and parts of names among the remaining tokens."""
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

    def _user(
        self, text: str, loose: list[Token], i: int, mentioned: Mentioned, addresses: set[str | None]
    ) -> Token | None:
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
                known = name not in self.ordinary and self.words[name] <= COMMON
                guess = mentioned.guessed(name) if known else None
                if guess is not None:
                    return start, end, address_case(text[start:end], guess + digits)
        return None

    def _part(self, text: str, start: int, end: int, token: str, offset: int, mentioned: Mentioned) -> str | None:
        """The replacement of a single token, or None to keep it (rules: top of this file)."""
        owners = mentioned.owners(token)
        first = token in self.firsts
        if not (owners or first or token in self.people.faker_first):
            return None
        capital = text[start].isupper()
        if token in self.ordinary:
            sentence = owners and token not in CALENDAR and re.search(r"[a-z,] $", text[max(0, start - 2) : start])
            wanted = capital and bool(sentence or in_name_position(text, start, end))
        else:
            wanted = bool(owners) or (capital and (first or in_name_position(text, start, end)))
        if not wanted:
            return None
        if owners:
            return mentioned.nearest(token, offset + start).new[token]
        return self.people.stand_in(token)


def address_case(old: str, new: str) -> str:
    """`new` in upper case if `old` is, else with its words capitalised where those of `old` are."""
    if old.isupper() and sum(c.isalpha() for c in old) > 1:
        return new.upper()
    capitals = iter([word[0].isupper() for word in TOKEN.findall(old)])
    return TOKEN.sub(lambda word: word[0].capitalize() if next(capitals, False) else word[0], new)


def in_name_position(text: str, start: int, end: int) -> bool:
    """Whether the word follows a greeting or title, is alone on its line, or comes first on it before a comma."""
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


def meet(rows: list[dict[str, Any]], seed: int) -> tuple[People, Scan]:
    """Find the people of a file and assign their stand-ins; returns them and the scan that replaces them."""
    people, scanner, words, lower = read_people(rows)
    people.settle(seed)
    return people, Scan(people, scanner, words, lower)
