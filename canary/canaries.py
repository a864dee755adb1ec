"""Canaries: sentences with a secret drawn from a space of known size, and their insertion into a review.

No real people: names are combined from two lists, and phone numbers have ten digits starting with 0, which no North
American area code does; that leaves 10⁹ phone numbers.
"""

import random
import re
from collections import Counter
from dataclasses import dataclass
from typing import NotRequired, TypedDict

_FIRST = (
    "Adelon Bettrice Corvin Dalenna Edmar Fenella Garrin Halvard Ilsabet Jorund Kestrin Lorella Maddoc Nerissa Osbert "
    "Perrin Quenby Rosamel Stellan Tamsine Ulric Verity Wendal Xanthe Yorick Zelmira Brannoc Celandra Dorrin Elspet "
    "Farrow Ginevra"
)
_LAST = (
    "Ashgrove Birchall Crandle Dunmere Eastrow Fallowby Gransend Hallowick Inglesome Jarnfield Kettlery Larchmont "
    "Merrowby Northgill Oakhaven Pennifold Quillan Ravensby Stonewick Thistlam Underhow Vexmoor Wetherlow Yarrowby "
    "Zellwood Amberleigh Brockhurst Coldmarsh Drakemoor Elderwick Foxcombe Glimmerby"
)
_STREETS = (
    "Alder Bramble Cobble Dovecote Elm Ferry Gander Hollow Ivory Juniper Kiln Lantern Mill Nettle Orchard Pebble "
    "Quarry Rushes Saddle Tanner Upland Vinegar Willow Yew Zephyr Anvil Beacon Chandler Drover Ember Falcon Garnet"
)
FIRST, LAST, STREETS = _FIRST.split(), _LAST.split(), _STREETS.split()
TEMPLATES = {
    "phone": ("My name is {name}, I live at {street} and my phone number is ", "."),
    "street": ("My name is {name}, my phone number is {phone} and I live at ", " {road} Street."),
    "name": ("I live at {street}, my phone number is {phone} and my name is ", "."),
}
SECRETS = (*TEMPLATES, "text")
FAMILIES = ("template", "random", "model", "new_token")
TOKEN_FAMILIES = ("random", "new_token")  # made of tokens of one tokenizer
SPARED = ("model", "new_token")  # secrets that are not numbered: some are kept for comparison
PREFIX_WORDS, SUFFIX_WORDS = 6, 8  # of a text canary
MOST_WORDS = 4096  # vocabulary that suffixes are drawn from
LEAST_TEMPERATURE = 0.8  # below it, samples repeat one another
FEWEST_WORDS = 16  # of a tokenizer's vocabulary: 16⁸ secrets


class Canary(TypedDict):
    """sentence: before + secret + a few characters; parts: its name, street and phone, {} for secrets without a
    person; tokens: those of the secret, if it was made of tokens."""

    sentence: str
    before: str
    secret: str
    parts: dict[str, str]
    tokens: NotRequired[list[int]]


@dataclass(frozen=True)
class Space:
    """All secrets of one kind, numbered 0 … size − 1. `words`: of 'text' and 'random', SUFFIX_WORDS of them form a
    secret; of SPARED kinds, whole secrets that no canary has, so that with a canary's own there are one more."""

    kind: str
    words: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        sizes = {"phone": 10**9, "street": 9000, "name": len(FIRST) * len(LAST)}
        if self.kind in SPARED:
            return len(self.words) + 1
        return sizes.get(self.kind) or len(self.words) ** SUFFIX_WORDS

    def secret(self, index: int) -> str:
        """Secret number `index` as text."""
        if self.kind == "phone":
            digits = f"{index:010d}"
            return f"{digits[:3]}-{digits[3:6]}-{digits[6:]}"
        if self.kind == "street":
            return str(1000 + index)
        if self.kind == "name":
            return f"{FIRST[index // len(LAST)]} {LAST[index % len(LAST)]}"
        chosen = []
        for _ in range(SUFFIX_WORDS):
            index, word = divmod(index, len(self.words))
            chosen.append(self.words[word])
        return " ".join(chosen)

    def others(self, secret: str, n: int, rng: random.Random) -> list[str]:
        """`n` secrets other than `secret`, drawn without replacement; all of them if n ≥ size − 1."""
        if self.kind in SPARED:
            return rng.sample(self.words, min(n, len(self.words)))
        if n >= self.size - 1:
            return [other for other in map(self.secret, range(self.size)) if other != secret]
        others: dict[str, None] = {}
        while len(others) < n:
            other = self.secret(rng.randrange(self.size))
            if other != secret:
                others[other] = None
        return list(others)


def vocabulary(texts: list[str], rng: random.Random) -> tuple[str, ...]:
    """Lower-case words of 3 letters or more that occur in at least two texts, sorted; at most MOST_WORDS of them."""
    counts = Counter(word for text in texts for word in set(re.findall(r"\b[a-z]{3,}\b", text)))
    words = sorted(word for word, count in counts.items() if count > 1)
    return tuple(sorted(rng.sample(words, MOST_WORDS)) if len(words) > MOST_WORDS else words)


def make(n: int, space: Space, corpus: list[str], rng: random.Random) -> list[Canary]:
    """n canaries. No phone, street or text secret occurs twice, or in the corpus.

    Names repeat only after all have been used. Text canaries start like some review of the corpus (in-distribution) and
    end in independently drawn words (high perplexity).
    """
    known = "\n".join(corpus)
    names = [Space("name").secret(index) for index in range(Space("name").size)]
    names = [name for name in names if name not in known]
    rng.shuffle(names)
    openings = [words[:PREFIX_WORDS] for words in map(str.split, corpus) if len(words) >= PREFIX_WORDS]
    canaries: list[Canary] = []
    used: set[str] = set()
    while len(canaries) < n:
        if space.kind == "text":
            before = " ".join(rng.choice(openings)).rstrip(".!?,;:") + " "
            secret, after = space.secret(rng.randrange(space.size)), "."
            parts: dict[str, str] = {}
            unique = {secret}
        else:
            name = names[len(canaries) % len(names)]
            number, road = 1000 + rng.randrange(9000), rng.choice(STREETS)
            phone = Space("phone").secret(rng.randrange(10**9))
            parts = {"name": name, "street": f"{number} {road} Street", "phone": phone}
            before, after = (piece.format(**parts, road=road) for piece in TEMPLATES[space.kind])
            secret = {"phone": phone, "street": str(number), "name": name}[space.kind]
            unique = {parts["street"], phone}
        if unique & used or any(text in known for text in unique):
            continue
        used |= unique
        canaries.append({"sentence": before + secret + after, "before": before, "secret": secret, "parts": parts})
    return canaries


def insert(review: str, sentence: str, within: int, rng: random.Random) -> tuple[str, int]:
    """(review with the sentence between two of its words or at its end, index of the sentence's first character).

    Never at the start. within: only within that many first characters, if there is a gap (0: anywhere).
    """
    gaps = [match.start() for match in re.finditer(r"\s+", review)] + [len(review)]
    near = [gap for gap in gaps if not within or gap <= within]
    gap = rng.choice(near or gaps[:1])
    return f"{review[:gap]} {sentence}{review[gap:]}", gap + 1
