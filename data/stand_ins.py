"""What stand-ins are made from: names of Faker's that nobody has and that are no ordinary words, invented domains."""

import random
import re
from collections.abc import Iterable
from functools import cache
from importlib import import_module

from data.scanner import same_shape

LOCALES = ("en_US", "en_GB", "en_IE", "en_NZ", "de_DE", "fr_FR", "nl_NL", "it_IT", "es_ES", "sv_SE", "da_DK", "fi_FI")
TRIES = 300  # draws from the pool before a name is made up
MAX_DOMAIN = 253  # characters (RFC 1035, 2.3.4)
SHARED_LABELS = 8  # labels that an overlong "domain" may share with others
FAKER_WORD = re.compile(r"[A-Z][a-z]{2,}")


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


def letter_table(rng: random.Random) -> dict[str, str]:
    """A random permutation of the letters without fixed points."""
    letters = list("abcdefghijklmnopqrstuvwxyz")
    others = letters[:]
    while any(a == b for a, b in zip(letters, others)):
        rng.shuffle(others)
    return dict(zip(letters, others))


@cache
def faker_names(kind: str, locales: tuple[str, ...]) -> list[str]:
    """First or last names from Faker's locales: one word of ASCII letters, sorted within each locale."""
    names: dict[str, None] = {}
    for locale in locales:
        provider = import_module(f"faker.providers.person.{locale}").Provider
        listed = {name for key in ("s", "s_male", "s_female") for name in getattr(provider, f"{kind}_name{key}", ())}
        names.update(dict.fromkeys(name for name in sorted(listed) if FAKER_WORD.fullmatch(name)))
    return list(names)


def name_pool(kind: str, old: set[str], wanted: int) -> list[str]:
    """Names that are neither in `old` nor ordinary words: American ones, then other locales up to `wanted`."""
    for n in range(1, len(LOCALES) + 1):
        names = ((name, name.casefold()) for name in faker_names(kind, LOCALES[:n]))
        pool = [name for name, word in names if word not in old and word not in ORDINARY]
        if len(pool) >= max(wanted, 100):
            break
    return pool


def new_domains(domains: Iterable[str], rng: random.Random) -> dict[str, str]:
    """{domain: invented domain with as many labels below .example}; domains with a common suffix keep one."""
    head_labels = {domain: _head_labels(domain) for domain in domains}
    suffixes = {
        ".".join(labels[i:])
        for domain, n in head_labels.items()
        for labels in [domain.split(".")[n:]]
        for i in range(len(labels))
    }
    parents = {suffix.partition(".")[2] for suffix in suffixes}
    taken = {label for domain in head_labels for label in domain.split(".")} | {"example"}

    collisions = 0  # labels grow with the number of collisions

    def invent(label: str) -> str:
        nonlocal collisions
        invented = same_shape(label, rng)
        while invented in taken:
            extra = "o" * rng.randint(0, 3 + collisions // TRIES)
            collisions += 1
            invented = same_shape(label + extra, rng) + rng.choice(["", "", "n", "r"])
        taken.add(invented)
        return invented

    new: dict[str, str] = {}
    for suffix in sorted(suffixes, key=lambda s: (s.count("."), s)):
        label, _, parent = suffix.partition(".")
        if not parent and suffix in parents:
            new[suffix] = "example"
        else:
            new[suffix] = f"{invent(label)}.{new[parent]}" if parent else invent(label)
    heads: dict[str, str] = {}
    for domain, n in sorted(head_labels.items()):
        if n:
            *labels, rest = domain.split(".", n)
            for label in labels:
                heads[label] = heads.get(label) or invent(label)
            new[domain] = ".".join([*(heads[label] for label in labels), new[rest]])
    return new


def _head_labels(domain: str) -> int:
    """How many leading labels are replaced one by one: none for a domain of valid length."""
    return max(0, domain.count(".") + 1 - SHARED_LABELS) if len(domain) > MAX_DOMAIN else 0
