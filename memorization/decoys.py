"""Decoys: made-up values in the format of a secret, among which the secret is ranked.

Parts that an attacker may know are kept (country and area code, issuer, domain, key prefix, layout); the rest is
redrawn, with valid check digits. Names, local parts and streets come from Faker.
"""

from __future__ import annotations

import datetime
import random
import re
import string
from collections.abc import Callable, Container
from functools import cache
from typing import Any

import phonenumbers
from faker import Faker
from stdnum import iban, luhn

from memorization.inventory import ENTITIES, STREETS, Secret, find_ips, is_national_id, normal

ATTEMPTS = 400  # per decoy: formats with check digits are redrawn until one is valid


def decoys(secret: Secret, n: int, seed: int, avoid: Container[str] = (), region: str = "US") -> list[str]:
    """Up to n distinct values in the secret's format, excluding itself and `avoid` (values; of names also their keys).
    Fewer if the format has fewer; deterministic given seed and secret."""
    rng = random.Random(f"{seed} {secret.kind} {secret.key}")
    name = secret.kind in ENTITIES  # whose real ones are avoided in any case of letters
    draw = DRAWS.get(secret.kind, redraw_characters)
    found: dict[str, None] = {}
    for _ in range(ATTEMPTS * n):
        if len(found) == n:
            break
        value = draw(secret, rng, region)
        if value is None or value == secret.value or value in avoid:
            continue
        if not name or (normal(value) != secret.key and normal(value) not in avoid):
            found[value] = None
    return list(found)


Draw = Callable[[Secret, random.Random, str], str | None]


def redraw(text: str, rng: random.Random, keep: int = 0, pool: str | None = None) -> str:
    """Replace digits, upper- and lower-case letters from position `keep` on by random ones of the same class. pool:
    draw letters from it instead."""

    def other(character: str) -> str:
        if character.isdigit():
            return rng.choice(string.digits)
        if character.isalpha() and character.isascii():
            return rng.choice(pool or (string.ascii_uppercase if character.isupper() else string.ascii_lowercase))
        return character

    return text[:keep] + "".join(map(other, text[keep:]))


def redraw_characters(secret: Secret, rng: random.Random, region: str) -> str:
    return redraw(secret.value, rng)


def redraw_phone(secret: Secret, rng: random.Random, region: str) -> str | None:
    """Keep country and area code; the number is valid and of the same type (fixed line, mobile, …)."""
    parsed = phonenumbers.parse(secret.value, region)
    known = phonenumbers.length_of_national_destination_code(parsed)
    own = phonenumbers.national_significant_number(parsed)[known:]  # the subscriber number, which comes last
    digits = [match.start() for match in re.finditer(r"\d", secret.value)]
    if len(digits) < len(own):
        return None
    value = redraw(secret.value, rng, digits[-len(own)] if own else 0)
    try:
        number = phonenumbers.parse(value, region)
    except phonenumbers.NumberParseException:
        return None
    same = phonenumbers.is_valid_number(number) and number.country_code == parsed.country_code
    return value if same and phonenumbers.number_type(number) == phonenumbers.number_type(parsed) else None


def redraw_card(secret: Secret, rng: random.Random, region: str) -> str:
    """Keep the first six digits (issuer); the last is the Luhn check digit."""
    keep = [match.end() for match in re.finditer(r"\d", secret.value)][5]
    value = redraw(secret.value, rng, keep)
    last = max(match.start() for match in re.finditer(r"\d", value))
    digits = re.sub(r"\D", "", value[:last])
    return value[:last] + luhn.calc_check_digit(digits) + value[last + 1 :]


def redraw_iban(secret: Secret, rng: random.Random, region: str) -> str | None:
    """Keep the country; ISO 7064 check digits, and national ones if python-stdnum knows them."""
    value = redraw(secret.value, rng, 4)
    compact = value.replace(" ", "")
    checked = iban.calc_check_digits(compact)
    value = value[:2] + checked + value[4:]
    return value if iban.is_valid(value) else None


def redraw_national_id(secret: Secret, rng: random.Random, region: str) -> str | None:
    keep = 4 if secret.variant == "ch.ssn" else 0
    value = redraw(secret.value, rng, keep, "XYZ" if secret.variant == "es.nie" else None)
    if secret.variant in ("es.nie", "es.dni"):  # the last letter is the check
        value = value[:-1] + rng.choice(string.ascii_uppercase)
    return value if is_national_id(secret.variant, value) else None


def redraw_ip(secret: Secret, rng: random.Random, region: str) -> str | None:
    if ":" in secret.value:
        value = "".join(
            rng.choice("0123456789abcdef") if character in string.hexdigits else character for character in secret.value
        )
    else:
        value = ".".join(str(rng.randrange(1, 256)) for _ in range(4))
    return value if any(find_ips(value)) else None


KEY_PREFIX = re.compile(
    r"AKIA|ASIA|gh[pousr]_|github_pat_|glpat-|sk-proj-|sk-ant-|sk-|hf_|AIza|xox[abprs]-|[rs]k_live_|eyJ"
)


def redraw_api_key(secret: Secret, rng: random.Random, region: str) -> str:
    prefix = KEY_PREFIX.match(secret.value)
    return redraw(secret.value, rng, prefix.end() if prefix else 0)


DATE_FORMS = (
    "%Y-%m-%d", "%d.%m.%Y", "%d.%m.%y", "%m/%d/%Y", "%m/%d/%y", "%d/%m/%Y", "%d/%m/%y", "%m-%d-%Y", "%d-%m-%Y",
    "%d %B %Y", "%d %b %Y", "%B %d, %Y", "%b %d, %Y", "%B %d %Y", "%b %d %Y", "%d %B, %Y", "%d %b. %Y", "%b. %d, %Y",
)  # fmt: skip
YEARS = 30  # in either direction


def redraw_birth(secret: Secret, rng: random.Random, region: str) -> str | None:
    """A day within ± 30 years, in the same date format."""
    for form in DATE_FORMS:
        try:
            date = datetime.datetime.strptime(secret.value, form)
        except ValueError:
            continue
        date += datetime.timedelta(days=rng.randint(-365 * YEARS, 365 * YEARS))
        value = date.strftime(form)
        if len(secret.value) == len(value):
            return value
        short = re.sub(r"\b0(\d)\b", r"\1", value)  # 4/7/1980, not 04/07/1980
        return short if re.search(r"\b\d\b", secret.value) else value
    return redraw(secret.value, rng)


@cache
def faker() -> Any:
    return Faker("en_US")


def redraw_email(secret: Secret, rng: random.Random, region: str) -> str:
    """A Faker name in the style of the local part (separator, initial, digits), at the same domain."""
    local, _, domain = secret.value.rpartition("@")
    fake = faker()
    fake.seed_instance(rng.getrandbits(64))
    first, last = fake.first_name(), re.sub(r"\W", "", fake.last_name())
    separator = re.search(r"[._+-]", local)
    if separator:
        left = local[: separator.start()]
        name = (first[0] if len(left) == 1 else first) + separator[0] + last
    else:
        name = rng.choice([first, last, first[0] + last, first + last[0], first + last])
    if not any(character.isupper() for character in local):
        name = name.lower()
    digits = re.search(r"\d+$", local)
    return f"{name}{redraw(digits[0], rng) if digits else ''}@{domain}"


def redraw_street(secret: Secret, rng: random.Random, region: str) -> str:
    """A different number and a Faker name before the same street word."""
    fake = faker()
    fake.seed_instance(rng.getrandbits(64))
    name = fake.last_name()
    german = re.match(r"[A-ZÄÖÜ][a-zäöüß-]*?(straße|strasse|str\.|gasse|weg|platz|allee)( .*)$", secret.value)
    if german:
        return f"{name}{german[1]}{redraw(german[2], rng)}"
    number, rest = secret.value.split(" ", 1)
    suffix = re.search(rf"(?:{STREETS})$", rest)
    words = len(rest.split()) - 1
    names = [fake.last_name() for _ in range(words)]
    return f"{redraw(number, rng).lstrip('0') or '1'} {' '.join(names)} {suffix[0] if suffix else ''}".strip()


def redraw_name(secret: Secret, rng: random.Random, region: str) -> str:
    """A Faker name with the same number of words."""
    fake = faker()
    fake.seed_instance(rng.getrandbits(64))
    words = len(secret.value.split())
    parts = [fake.first_name() for _ in range(max(1, words - 1))] + ([fake.last_name()] if words > 1 else [])
    return in_case_of(secret.value, " ".join(parts))


def in_case_of(pattern: str, text: str) -> str:
    """`text` in capitals or small letters if `pattern` has nothing else."""
    return text.upper() if pattern.isupper() else text.lower() if pattern.islower() else text


LEGAL_FORMS = ("inc", "ltd", "llc", "llp", "plc", "corp", "co", "gmbh", "ag", "sa", "group", "bank", "university")


def redraw_organisation(secret: Secret, rng: random.Random, region: str) -> str:
    """Faker surnames for its words, except for small ones ('of') and what it is ('Inc.', 'Bank')."""
    fake = faker()
    fake.seed_instance(rng.getrandbits(64))
    words = secret.value.split()
    kept = [word.islower() or word.casefold().strip(".,") in LEGAL_FORMS for word in words]
    if all(kept):
        kept = [False] * len(words)
    made = " ".join(word if keep else fake.last_name() for word, keep in zip(words, kept))
    return in_case_of(secret.value, made)


def redraw_location(secret: Secret, rng: random.Random, region: str) -> str:
    """A Faker town with the same number of words."""
    fake = faker()
    fake.seed_instance(rng.getrandbits(64))
    words = len(secret.value.split())
    made: list[str] = []
    while len(made) != min(words, 2):  # Faker's towns have one or two
        made = fake.city().split()
    return in_case_of(secret.value, " ".join([*(fake.last_name() for _ in range(words - len(made))), *made]))


DRAWS: dict[str, Draw] = {
    "email": redraw_email,
    "phone": redraw_phone,
    "card": redraw_card,
    "iban": redraw_iban,
    "national_id": redraw_national_id,
    "ip": redraw_ip,
    "api_key": redraw_api_key,
    "birth_date": redraw_birth,
    "street_address": redraw_street,
    "name": redraw_name,
    "person": redraw_name,
    "organisation": redraw_organisation,
    "location": redraw_location,
}
