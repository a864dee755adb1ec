"""Secrets in texts by type: e-mail addresses, phone and card numbers, IBANs, national ids, IPs, keys, addresses, dates.

Types with a check digit count only if it is correct, phone numbers only if valid according to libphonenumber, IP
addresses only if global. If two types match overlapping characters, the one that comes first in KINDS wins.
"""

from __future__ import annotations

import bisect
import importlib
import ipaddress
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import phonenumbers
from stdnum import iban, luhn

from common.text import emails

Span = tuple[int, int, str]  # start, end, key


@dataclass(frozen=True)
class Secret:
    """texts[row][start:end] is `value`. key: normalised value; variant: the format (national ids only)."""

    kind: str
    value: str
    row: int
    start: int
    end: int
    key: str
    variant: str = ""


def normal(text: str) -> str:
    """Case folded, white space as single spaces."""
    return " ".join(text.casefold().split())


def find_emails(text: str) -> Iterator[Span]:
    position = 0
    for address in emails(text):
        address = address.lstrip("'.")
        start = text.index(address, position)
        position = start + len(address)
        domain = address.rpartition("@")[2]
        if "." in domain and domain.rpartition(".")[2].isalpha():
            yield start, position, address.casefold()


CREDENTIALS = re.compile(r"\b[A-Za-z][A-Za-z0-9+.-]{1,20}://[^\s/:@]{1,100}:([^\s/@]{4,100})@[A-Za-z0-9]")


def find_credentials(text: str) -> Iterator[Span]:
    """Passwords in URLs with user and password."""
    for match in CREDENTIALS.finditer(text):
        yield *match.span(1), match[1]


API_KEY = re.compile(
    r"(?<![A-Za-z0-9])(?:AKIA[0-9A-Z]{16}|ASIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{22,100}"
    r"|glpat-[A-Za-z0-9_-]{20}|sk-(?:proj-|ant-)?[A-Za-z0-9_-]{20,200}|hf_[A-Za-z0-9]{30,40}|AIza[0-9A-Za-z_-]{35}"
    r"|xox[abprs]-[A-Za-z0-9-]{10,100}|[rs]k_live_[A-Za-z0-9]{20,100}"
    r"|eyJ[A-Za-z0-9_-]{10,400}\.eyJ[A-Za-z0-9_-]{10,400}\.[A-Za-z0-9_-]{10,400})(?![A-Za-z0-9])"
)


def find_api_keys(text: str) -> Iterator[Span]:
    """Keys of AWS, GitHub, GitLab, OpenAI, Anthropic, Hugging Face, Google, Slack and Stripe, and JWTs, by prefix."""
    for match in API_KEY.finditer(text):
        yield *match.span(), match[0]


IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}")


def find_ibans(text: str) -> Iterator[Span]:
    for match in IBAN.finditer(text):
        candidate = match[0]
        while len(candidate) >= 15:  # words may follow: find the longest valid prefix
            end = match.start() + len(candidate)
            if not text[end : end + 1].isalnum() and iban.is_valid(candidate):
                yield match.start(), end, candidate.replace(" ", "")
                break
            candidate = candidate[:-1].rstrip()


CARD = re.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-]|\.\d)")
ISSUERS = re.compile(
    r"3[47]\d{13}|4\d{12}(?:\d{3}){0,2}|5[1-5]\d{14}|2[2-7]\d{14}|6(?:011|5\d\d|4[4-9]\d)\d{12}|35\d{14}"
)


def find_cards(text: str) -> Iterator[Span]:
    """Numbers of the major issuers with a valid Luhn check digit (ISO/IEC 7812)."""
    for match in CARD.finditer(text):
        digits = re.sub(r"\D", "", match[0])
        if ISSUERS.fullmatch(digits) and luhn.is_valid(digits):
            yield *match.span(), digits


NATIONAL = {  # variant (module of python-stdnum): how it is written
    "us.ssn": r"\d{3}-\d{2}-\d{4}",
    "fr.nir": r"[12] ?\d{2} ?\d{2} ?\d[\dAB] ?\d{3} ?\d{3} ?\d{2}",
    "it.codicefiscale": r"[A-Z]{6}\d\d[A-Z]\d\d[A-Z]\d{3}[A-Z]",
    "es.dni": r"\d{8}-?[A-Z]",
    "es.nie": r"[XYZ]-?\d{7}-?[A-Z]",
    "br.cpf": r"\d{3}\.\d{3}\.\d{3}-\d\d",
    "fi.hetu": r"\d{6}[-+A]\d{3}[0-9A-Z]",
    "se.personnummer": r"(?:\d\d)?\d{6}[-+]\d{4}",
    "ch.ssn": r"756\.\d{4}\.\d{4}\.\d\d",
    "pl.pesel": r"\d{11}",
}
NATIONAL_PATTERNS = {name: re.compile(rf"(?<![\w-])(?:{form})(?![\w-])") for name, form in NATIONAL.items()}


def is_national_id(variant: str, value: str) -> bool:
    """Whether python-stdnum accepts `value` as a number of this kind: format, check digit, embedded dates."""
    return bool(importlib.import_module(f"stdnum.{variant}").is_valid(value))


def find_national_ids(text: str) -> Iterator[tuple[int, int, str, str]]:
    """(start, end, key, variant)."""
    for variant, pattern in NATIONAL_PATTERNS.items():
        for match in pattern.finditer(text):
            if is_national_id(variant, match[0]):
                yield *match.span(), re.sub(r"[^A-Z0-9]", "", match[0]), variant


def find_phones(text: str, region: str) -> Iterator[Span]:
    """Numbers valid according to libphonenumber; those without a country code belong to `region` (ISO 3166)."""
    if sum(character.isdigit() for character in text) < 7:
        return
    leniency = phonenumbers.Leniency.VALID
    for match in phonenumbers.PhoneNumberMatcher(text, region, leniency, max_tries=1 << 16):
        yield match.start, match.end, phonenumbers.format_number(match.number, phonenumbers.PhoneNumberFormat.E164)


IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)")
IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){3,7}[0-9A-Fa-f]{1,4}(?![\w:])")


def find_ips(text: str) -> Iterator[Span]:
    """Global addresses; private, local and reserved ones identify nobody."""
    for pattern in (IPV4, IPV6):
        for match in pattern.finditer(text):
            try:
                address = ipaddress.ip_address(match[0])
            except ValueError:
                continue
            if address.is_global:
                yield *match.span(), str(address)


MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
SHORT_MONTHS = "|".join(sorted({month[:3] for month in MONTHS.split("|")} | {"Sept"}))
MONTH = rf"(?:{MONTHS}|{SHORT_MONTHS})\.?"
DATE = (
    rf"\d{{4}}-\d\d-\d\d|\d{{1,2}}[./-]\d{{1,2}}[./-]\d{{2,4}}|\d{{1,2}} {MONTH},? \d{{4}}|{MONTH} \d{{1,2}},? \d{{4}}"
)
BIRTH = re.compile(
    rf"\b(?:born|birth ?date|date of birth|birthday|d\.?o\.?b\b\.?)(?:\W{{1,3}}(?:is|was|on|in)\b)?\W{{1,3}}({DATE})\b",
    re.I,
)


def find_births(text: str) -> Iterator[Span]:
    """Dates after a word for birth."""
    for match in BIRTH.finditer(text):
        yield *match.span(1), normal(match[1])


STREETS = (
    "Street|St|Avenue|Ave|Road|Rd|Boulevard|Blvd|Lane|Ln|Drive|Dr|Court|Ct|Square|Sq|Place|Pl|Terrace|Crescent|Gardens|"
    "Parkway|Pkwy|Highway|Hwy|Circle|Way|Close|Mews|Grove"
)
STREET = re.compile(
    rf"(?<![\w.,-])\d{{1,5}}[A-Za-z]? (?:[A-Z][\w'’.-]{{0,30}} ){{1,4}}(?:{STREETS})\b"
    r"|\b[A-ZÄÖÜ][a-zäöüß-]{1,30}(?:straße|strasse|str\.|gasse|weg|platz|allee) \d{1,4} ?[a-z]?\b"
)


def find_streets(text: str) -> Iterator[Span]:
    """Street and number, in English and German style."""
    for match in STREET.finditer(text):
        yield *match.span(), normal(match[0])


KINDS = (  # in order of precedence
    "url_password", "email", "api_key", "iban", "card", "national_id", "ip", "phone", "birth_date", "street_address",
)  # fmt: skip


ENTITIES = ("person", "organisation", "location")  # names, which a model finds (entities.py); after all KINDS


def find(
    texts: Sequence[str],
    kinds: Sequence[str] = KINDS,
    patterns: dict[str, re.Pattern[str]] | None = None,
    region: str = "US",
    entities: Sequence[Sequence[tuple[int, int, str]]] | None = None,
) -> list[Secret]:
    """Every secret in the texts, ordered by text and position. patterns: {custom type: regular expression}; the first
    group is the secret, or the whole match if it has none. They take precedence over the built-in types. entities:
    (start, end, type) of the names in each text.
    """
    finders: dict[str, Callable[[str], Iterator[tuple[int, int, str] | tuple[int, int, str, str]]]] = {
        "url_password": find_credentials,
        "email": find_emails,
        "api_key": find_api_keys,
        "iban": find_ibans,
        "card": find_cards,
        "national_id": find_national_ids,
        "ip": find_ips,
        "phone": lambda text: find_phones(text, region),
        "birth_date": find_births,
        "street_address": find_streets,
    }
    own = {name: own_finder(pattern) for name, pattern in (patterns or {}).items()}
    chosen = own | {kind: finders[kind] for kind in KINDS if kind in kinds}
    found = []
    for row, text in enumerate(texts):
        claimed: list[tuple[int, int]] = []  # in order, disjoint
        secrets = []
        candidates = [(kind, *span) for kind, finder in chosen.items() for span in finder(text)]
        for start, end, kind in entities[row] if entities else ():
            candidates.append((kind, start, end, normal(text[start:end])))
        for kind, start, end, key, *variant in candidates:
            position = bisect.bisect_left(claimed, (end, 0))  # the claims that start before `end`
            if start < end and (position == 0 or claimed[position - 1][1] <= start):
                claimed.insert(position, (start, end))
                secrets.append(Secret(kind, text[start:end], row, start, end, key, *variant))
        found += sorted(secrets, key=lambda secret: secret.start)
    return found


def own_finder(pattern: re.Pattern[str]) -> Callable[[str], Iterator[Span]]:
    group = 1 if pattern.groups else 0

    def finder(text: str) -> Iterator[Span]:
        for match in pattern.finditer(text):
            if match[group]:
                yield *match.span(group), normal(match[group])

    return finder


def locate(texts: Sequence[str], given: Sequence[tuple[str, str, int | None]]) -> tuple[list[Secret], int]:
    """(secrets, number of values that occur in no text) for given (type, value, row or None for any row)."""
    secrets, absent = [], 0
    for kind, value, row in given:
        located = []
        for index in range(len(texts)) if row is None else [row]:
            start = texts[index].find(value)
            while start >= 0:
                located.append(Secret(kind, value, index, start, start + len(value), normal(value)))
                start = texts[index].find(value, start + len(value))
        absent += not located
        secrets += located
    return secrets, absent
