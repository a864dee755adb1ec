"""The people of the corpus: names are random pairs, addresses follow the rules of their companies."""

import itertools
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from faker import Faker

from data.embedded.phrases import Phrases

MAX_MENTIONS = 30
NAME_RULES: dict[str, Callable[[str, str, str], str]] = {
    "first.last": lambda first, middle, last: f"{first}.{last}",
    "first_last": lambda first, middle, last: f"{first}_{last}",
    "firstlast": lambda first, middle, last: f"{first}{last}",
    "last.first": lambda first, middle, last: f"{last}.{first}",
    "flast": lambda first, middle, last: f"{first[0]}{last}",
    "f.last": lambda first, middle, last: f"{first[0]}.{last}",
    "firstl": lambda first, middle, last: f"{first}{last[0]}",
    "lastf": lambda first, middle, last: f"{last}{first[0]}",
    "first": lambda first, middle, last: first,
    "last": lambda first, middle, last: last,
    "initials": lambda first, middle, last: f"{first[0]}{middle[:1]}{last[0]}",
}


@dataclass
class Person:
    """mentions: how often they occur in the pre-training text."""

    name: str
    email: str
    title: str = ""
    mentions: int = 0


def make_people(
    phrases: Phrases, n_corpus: int, n_outsiders: int, n_bystanders: int, seed: int
) -> tuple[list[Person], list[Person], list[str]]:
    """(people of the corpus, outsiders, names of bystanders); full names and addresses are all distinct."""
    fake = Faker("en_US")
    fake.seed_instance(seed)
    rng = random.Random(f"{seed}-people")
    first_names = sorted({fake.first_name() for _ in range(400)})
    last_names = sorted({fake.last_name() for _ in range(1200)})
    rng.shuffle(first_names)
    rng.shuffle(last_names)
    phrases.first_names, last_names = first_names[:140], last_names[:420]
    assert len(first_names) >= 200 and len(last_names) == 420
    total = n_corpus + n_outsiders + n_bystanders
    pairs = list(itertools.product(phrases.first_names, last_names))
    rng.shuffle(pairs)
    pairs, phrases.unused_names = pairs[:total], pairs[total:]
    middles = first_names[140:200]  # no one's Middle Last is another person's First Last

    company_weights = [1 / (rank + 2) ** 0.9 for rank in range(len(phrases.data["companies"]))]
    people: list[Person] = []
    taken: set[str] = set()
    for first, last in pairs:
        middle = rng.choice(middles) if rng.random() < 0.12 else ""
        shown_middle = middle if rng.random() < 0.3 else middle[:1] + "." * (rng.random() < 0.7)
        name = " ".join(part for part in (first, shown_middle if middle else "", last) if part)
        domain, company, rule, handle_share = rng.choices(phrases.data["companies"], company_weights)[0]
        email = f"{make_local(phrases, rng, first, middle, last, rule, handle_share)}@{domain}"
        while email in taken:
            email = f"{make_local(phrases, rng, first, middle, last, 'handle', 1.0)}@{domain}"
        taken.add(email)
        title = ", ".join(part for part in (rng.choice(phrases.data["roles"]), company) if part)
        people.append(Person(name, email, title))
    corpus, outsiders = people[:n_corpus], people[n_corpus : n_corpus + n_outsiders]
    weights = [1 / (n + 2) ** 0.9 for n in range(MAX_MENTIONS + 1)]  # Zipf-like: half of the people under 7
    for person in corpus:
        person.mentions = rng.choices(range(MAX_MENTIONS + 1), weights)[0]
    return corpus, outsiders, [person.name for person in people[n_corpus + n_outsiders :]]


def make_local(
    phrases: Phrases, rng: random.Random, first: str, middle: str, last: str, rule: str, handle_share: float
) -> str:
    """A local part by the company's rule, or (with probability handle_share) one unrelated to the name."""
    first, middle, last = (re.sub("[^a-z]", "", part.lower()) for part in (first, middle, last))
    if rng.random() >= handle_share:
        rule = rng.choice(["first.last", "firstlast", "flast"]) if rule == "handle" else rule
        if rule == "initials" and not middle:
            rule = "flast"
        return NAME_RULES[rule](first, middle, last) + (str(rng.randint(1, 99)) if rng.random() < 0.04 else "")
    return make_handle(phrases, rng, first, last)


def make_handle(phrases: Phrases, rng: random.Random, first: str, last: str) -> str:
    """A local part unrelated to the name."""
    handles: list[str] = phrases.data["handles"]
    while True:
        word = rng.choice(handles)
        other = rng.choice(handles)
        syllables = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3))
        cut = rng.randint(2, len(word) - 1)
        local = rng.choices(
            [
                word + other,
                f"{word}_{other}",
                word[:cut] + str(rng.randint(2, 99)) + word[cut:],
                syllables,
                f"{syllables}.{word}",
            ],
            [35, 20, 25, 10, 10],
        )[0]
        letters = re.sub("[^a-z]", "", local)
        if not any(part[:3] in letters for part in (first, last)):
            return local
