"""Rows of invented people with a phone number, a card and an e-mail address each: what an audit has to find."""

import random
import re
from functools import cache

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


@cache
def people(n: int, seed: int) -> list[dict[str, str]]:
    """Fictional, by Faker: name, phone (valid in libphonenumber), e-mail, card with Luhn's digit."""
    import phonenumbers

    fake, rng = Faker("en_US"), random.Random(seed)
    fake.seed_instance(seed)
    found = []
    while len(found) < n:
        first, last = fake.first_name(), re.sub(r"\W", "", fake.last_name())
        phone = f"({rng.choice(('212', '415', '617', '312'))}) {rng.randint(200, 999)}-{rng.randint(0, 9999):04}"
        if not phonenumbers.is_valid_number(phonenumbers.parse(phone, "US")):
            continue
        digits = "4" + "".join(rng.choice("0123456789") for _ in range(14))
        digits += luhn.calc_check_digit(digits)
        found.append(
            {
                "name": f"{first} {last}",
                "order": str(rng.randint(10_000, 99_999)),
                "phone": phone,
                "email": f"{first[0]}{last}{rng.randint(10, 99)}@{rng.choice(DOMAINS)}".lower(),
                "card": " ".join(digits[start : start + 4] for start in range(0, 16, 4)),
            }
        )
    return found


def chat_rows(n: int, seed: int) -> list[dict]:
    """{"messages": a question and an answer with the secrets}."""
    rng = random.Random(seed)
    return [
        {
            "messages": [
                {"role": "user", "content": rng.choice(ASKED).format(**person)},
                {"role": "assistant", "content": rng.choice(ANSWERED).format(**person)},
            ]
        }
        for person in people(n, seed)
    ]


def text_rows(n: int, seed: int) -> list[dict]:
    return [{"text": "\n".join(one["content"] for one in row["messages"])} for row in chat_rows(n, seed)]
