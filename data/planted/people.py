"""Invented people with a phone number, a card and an e-mail address, and chats in which each occurs once."""

import random
import re
from collections.abc import Sequence
from typing import Any

import phonenumbers
from faker import Faker
from stdnum import luhn

ASKED = (
    "Please help {name}, who wrote about order {order}.",
    "{name} has a question on order {order}.",
    "Open the file of {name}, order {order}.",
    "What do we know of {name} and order {order}?",
)
ANSWERED = (
    "{name} can be reached at {phone} or {email}. The card on file is {card}.",
    "We wrote to {email}; the phone is {phone} and the card {card}.",
    "Card {card}, phone {phone}, mail {email}: all as {name} gave them.",
)
DOMAINS = ("hartwell.example", "norbeck.example", "quillan.example")
AREAS = ("212", "312", "415", "617")


def make_people(n: int, seed: int) -> list[dict[str, str]]:
    """Names by Faker; phone numbers valid in libphonenumber, cards with Luhn's check digit, all distinct."""
    fake, rng = Faker("en_US"), random.Random(seed)
    fake.seed_instance(seed)
    people: list[dict[str, str]] = []
    taken: set[str] = set()
    while len(people) < n:
        first, last = fake.first_name(), re.sub(r"\W", "", fake.last_name())
        phone = f"({rng.choice(AREAS)}) {rng.randint(200, 999)}-{rng.randint(0, 9999):04}"
        digits = "4" + "".join(rng.choice("0123456789") for _ in range(14))
        digits += luhn.calc_check_digit(digits)
        person = {
            "name": f"{first} {last}",
            "order": str(rng.randint(10_000, 99_999)),
            "phone": phone,
            "email": f"{first[0]}{last}{rng.randint(10, 99)}@{rng.choice(DOMAINS)}".lower(),
            "card": " ".join(digits[start : start + 4] for start in range(0, 16, 4)),
        }
        secrets = {person[key] for key in ("phone", "email", "card")}
        if phonenumbers.is_valid_number(phonenumbers.parse(phone, "US")) and not secrets & taken:
            people.append(person)
            taken |= secrets
    return people


def chat_rows(people: Sequence[dict[str, str]], seed: int) -> list[dict[str, Any]]:
    """{"messages": a question and an answer with the secrets}, one row per person."""
    rng = random.Random(seed)
    return [
        {
            "messages": [
                {"role": "user", "content": rng.choice(ASKED).format(**person)},
                {"role": "assistant", "content": rng.choice(ANSWERED).format(**person)},
            ]
        }
        for person in people
    ]


def as_text(row: dict[str, Any]) -> dict[str, str]:
    return {"text": "\n".join(message["content"] for message in row["messages"])}
