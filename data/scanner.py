"""Scan a text once, from left to right, for addresses, disguised addresses and tokens, in linear time.

A *token* is a run of letters and digits, compared case-folded.
"""

import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

MAX_ADDRESS = 320  # characters: local part 64, @, domain 255 (RFC 5321, 4.5.3.1)
MAX_NAME = 200  # characters of a full name

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
MAY_BEGIN = re.compile(r"(?<!\w)_|[^\W_]")  # where an address or a token may begin
SPACE = r"[^\S\n]*(?:\n[^\S\n]*(?:[>|][^\S\n]*)*)?"
BLANK = re.compile(rf"(\.?)({SPACE})")
COMMA = re.compile(rf"{SPACE},{SPACE}")
WIDEST = 200  # maximum characters between two words of one name


class Found(NamedTuple):
    """A piece of a text. kind: 'odd' (a known address of unusual form), 'address', 'disguised' or 'token'."""

    kind: str
    start: int
    end: int
    text: str

    @property
    def address(self) -> str:
        """The address, case-folded, that the piece denotes."""
        if self.kind == "disguised":
            match = DISGUISED.fullmatch(self.text)
            assert match
            return f"{match[1]}@{'.'.join(DOTS.split(match[3]))}".casefold()
        return self.text.casefold()


class Scanner:
    """Splits texts into pieces from left to right, in time linear in the text.

    addresses: known ones, which are found even if `ADDRESS` does not match them.
    """

    def __init__(self, addresses: Iterable[str]):
        self.odd = KnownAddresses(address for address in addresses if not ADDRESS.fullmatch(address))

    def __call__(self, text: str) -> Iterator[Found]:
        spans = self.odd.spans(text)
        position, odd = 0, next(spans, None)
        local, disguised = _Rest(text, LOCAL_RUN, DOMAIN_REST), _Rest(text, DISGUISED_RUN, DISGUISED_REST)
        while True:
            begin = MAY_BEGIN.search(text, position)
            start = begin.start() if begin else len(text)
            if odd and odd[0] <= start:
                yield Found("odd", *odd, text[slice(*odd)])
                position = odd[1]
                odd = next((span for span in spans if span[0] >= position), None)
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
                position = start + 1
                continue
            end = end or end_of(TOKEN, text, start)
            yield Found(kind, start, end, text[start:end])
            position = end
            if odd and odd[0] < position:
                odd = next((span for span in spans if span[0] >= position), None)


class KnownAddresses:
    """Finds known addresses, however many, by what is on either side of each @ in a text.

    addresses: case-folded, at most `MAX_ADDRESS` characters, which bounds the look-ups at each @.
    """

    def __init__(self, addresses: Iterable[str]):
        self.locals: defaultdict[str, set[str]] = defaultdict(set)
        for address in addresses:
            local, _, domain = address.rpartition("@")
            self.locals[domain].add(local)
        self.domain_lengths = sorted({len(domain) for domain in self.locals})
        self.local_lengths = {domain: sorted({len(local) for local in known}) for domain, known in self.locals.items()}

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        """(start, end) of every known address in `text`, ignoring case, including nested ones; sorted by start, then
        longest first."""
        spans = []
        if self.locals and "@" in text:
            folded = text.casefold()
            if len(folded) != len(text):  # characters that fold to several (like 'ß') are kept as they are
                folded = "".join(fold if len(fold := sign.casefold()) == 1 else sign for sign in text)
            at = folded.find("@")
            while at >= 0:
                for length in self.domain_lengths:
                    domain = folded[at + 1 : at + 1 + length]
                    for size in self.local_lengths.get(domain, ()):
                        if size <= at and folded[at - size : at] in self.locals[domain]:
                            spans.append((at - size, at + 1 + length))
                at = folded.find("@", at + 1)
        return iter(sorted(spans, key=lambda span: (span[0], -span[1])))


class _Rest:
    """Finds where an address that begins inside a run of characters ends; what follows the run is matched only once."""

    def __init__(self, text: str, run: re.Pattern[str], rest: re.Pattern[str]):
        self.text, self.run, self.rest = text, run, rest
        self.run_end = self.address_end = 0

    def end(self, start: int) -> int:
        """The end of the address that begins at `start`, or 0 if none does."""
        if start >= self.run_end:
            self.run_end = end_of(self.run, self.text, start)
            rest = self.rest.match(self.text, self.run_end)
            self.address_end = rest.end() if rest else 0
        return self.address_end


def end_of(pattern: re.Pattern[str], text: str, start: int) -> int:
    """The end of the match at `start`, where there is one."""
    match = pattern.match(text, start)
    assert match
    return match.end()


def _is_word(sign: str) -> bool:
    return sign.isalnum() or sign == "_"


def joined(between: str, after_initial: bool) -> str | None:
    """How two tokens separated by `between` are connected: 'glue', 'space', 'comma' or None (not at all)."""
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
    """`new` in the case of `old`: all upper (if `old` has two letters or more), all lower, or capitalised."""
    if old.isupper() and len(old) > 1:
        return new.upper()
    return new.lower() if old.islower() else new[0].upper() + new[1:]


def same_shape(text: str, rng: random.Random) -> str:
    """Random lower-case text with vowels, consonants and digits where `text` has them; the rest is kept."""

    def other(c: str) -> str:
        kind = "aeiou" if c in "aeiou" else "0123456789" if c.isdigit() else "bcdfghklmnprstvz"
        return rng.choice(kind) if c.isalnum() else c

    return "".join(map(other, text.lower()))


def map_strings(value: Any, function: Callable[[str], str]) -> Any:
    """`value` with `function` applied to every string in it, including nested lists and dicts (keys are kept)."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, list):
        return [map_strings(item, function) for item in value]
    if isinstance(value, dict):
        return {key: map_strings(item, function) for key, item in value.items()}
    return value


def strings(row: dict[str, Any]) -> list[str]:
    """Every string of a row, in the order in which `map_strings` visits them."""
    texts: list[str] = []

    def collect(text: str) -> str:
        texts.append(text)
        return text

    map_strings(row, collect)
    return texts
