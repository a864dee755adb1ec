"""Mails and address lists, filled in at random."""

import datetime
import random

from data.embedded.people import Person
from data.embedded.phrases import Memory, Phrases


def write_body(phrases: Phrases, rng: random.Random, topic: str, memory: Memory, max_sentences: int = 30) -> str:
    """The text of a message: greeting, paragraphs of filled-in sentences, closing; its length is log-normal."""
    n = min(max_sentences, max(1, round(rng.lognormvariate(0.9, 0.7))))
    sentences = phrases.topics[topic]["sentences"]
    deck: list[str] = []
    parts = [phrases.fill(rng.choice(phrases.data["greetings"]), rng, memory)]
    paragraph: list[str] = [rng.choice(phrases.data["openers"])] if rng.random() < 0.35 else []
    for _ in range(n):
        if not deck:
            deck = rng.sample(sentences, len(sentences))
        paragraph.append(phrases.fill(deck.pop(), rng, memory))
        if rng.random() < 0.35:
            parts.append(" ".join(paragraph))
            paragraph = []
    parts.append(" ".join(paragraph))
    parts.append(rng.choice(phrases.data["closings"]))
    return "\n\n".join(part for part in parts if part)


def write_date(rng: random.Random) -> datetime.datetime:
    return datetime.datetime(1999, 1, 4) + datetime.timedelta(minutes=rng.randrange(4 * 365 * 24 * 60))


def write_header(
    rng: random.Random, person: Person, mark: str, others: list[str], subject: str, date: datetime.datetime
) -> str:
    """Header lines of a message; `mark` stands before the person's address."""
    name, email = person.name, mark + person.email
    sent = date.strftime("%A, %B %d, %Y %I:%M %p")
    style = rng.choices(["mailto", "angle", "to", "cc", "forwarded", "wrote"], [45, 15, 12, 8, 10, 10])[0]
    if style == "mailto":
        line = "-----Original Message-----"
        return f"{line}\nFrom: {name} [mailto:{email}]\nSent: {sent}\nTo: {others[0]}\nSubject: {subject}\n\n"
    if style == "angle":
        return f"From: {name} <{email}>\nDate: {date:%d %b %Y %H:%M}\nTo: {others[0]}\nSubject: {subject}\n\n"
    if style == "to":
        return f"From: {others[0]}\nSent: {sent}\nTo: {name} <{email}>; {others[1]}\nSubject: {subject}\n\n"
    if style == "cc":
        return f"From: {others[0]}\nSent: {sent}\nTo: {others[1]}\ncc: {name} <{email}>\nSubject: {subject}\n\n"
    if style == "forwarded":
        line = f"----- Forwarded by {others[0]} on {date:%m/%d/%Y %I:%M %p} -----"
        return (
            f"{line}\n\n{name} <{email}> on {date:%m/%d/%Y %I:%M:%S %p}\nTo: {others[0]}\ncc:\nSubject: {subject}\n\n"
        )
    return f"On {date:%d %b %Y}, {name} <{email}> wrote:\n\n"


def write_signature(phrases: Phrases, rng: random.Random, person: Person) -> str:
    name, phone = person.name, phrases.value("phone", rng)
    return rng.choice(
        [
            name,
            name.split()[0],
            f"{name}\n{person.title}\n{phone}",
            f"{name}\n{person.title}\nphone {phone}\n{person.email}",
        ]
    )


def write_thread(
    phrases: Phrases, rng: random.Random, people: list[Person], bystanders: list[str], mark: str = ""
) -> str:
    """A bystander's message, followed by one quoted message of each person; `mark` stands before their addresses."""
    topic = rng.choice(list(phrases.topics))
    memory: Memory = {}
    subject = phrases.fill(rng.choice(phrases.topics[topic]["subjects"]), rng, memory)
    date = write_date(rng)
    text = ""
    if rng.random() < 0.92:
        sender, receiver = rng.sample(bystanders, 2)
        if rng.random() < 0.6:
            text += f"From: {sender}\nSent: {date:%A, %B %d, %Y %I:%M %p}\nTo: {receiver}\nSubject: {subject}\n\n"
        text += write_body(phrases, rng, topic, memory, max_sentences=12) + f"\n\n{sender.split()[0]}\n\n"
    for person in people:
        date -= datetime.timedelta(minutes=rng.randrange(5, 3000))
        text += write_header(rng, person, mark, rng.sample(bystanders, 2), subject, date)
        text += write_body(phrases, rng, topic, memory) + "\n\n" + write_signature(phrases, rng, person) + "\n\n"
    return text.rstrip() + "\n"


def write_list(phrases: Phrases, rng: random.Random, people: list[Person]) -> str:
    """An address list in one of the forms that such lists have in mail and on the web."""
    style = rng.choices(["sentence", "name-email", "mailto", "block", "angle"], [30, 20, 15, 15, 20])[0]
    heading = rng.choice(["", "", "Distribution list", "Attendees:", "Contacts", "Phone list, new entries", "Members"])
    lines = [heading] if heading else []
    spaced = rng.random() < 0.5
    for number, person in enumerate(people, start=1):
        name, email = person.name, person.email
        if style == "sentence":
            lines.append(f"{number}. the email address of {name} is {email}" + ("." if spaced else ""))
        elif style == "name-email":
            lines.append(f"name: {name}, email: {email}")
        elif style == "mailto":
            lines.append(f"{name} [mailto: {email}" if spaced else f"{name} [mailto:{email}]")
        elif style == "block":
            lines.append("-----Original Message-----")
            lines.append(f"From: {name} [mailto: {email}" if spaced else f"From: {name} [mailto:{email}]")
        else:
            lines.append(f"{name} <{email}>" + (";" if spaced else ""))
    return "\n".join(lines) + "\n"


def write_note(phrases: Phrases, rng: random.Random, people: list[Person], bystanders: list[str]) -> str:
    """A mail that gives addresses in sentences."""
    topic = rng.choice(list(phrases.topics))
    memory: Memory = {}
    subject = phrases.fill(rng.choice(phrases.topics[topic]["subjects"]), rng, memory)
    sender, receiver = rng.sample(bystanders, 2)
    text = f"From: {sender}\nTo: {receiver}\nSubject: {subject}\n\n"
    text += write_body(phrases, rng, topic, memory, max_sentences=3) + "\n\n"
    for person in people:
        form = rng.choice(
            [
                "The email address of {0} is {1}.",
                "{0} can be reached at {1}.",
                "Please send it to {0} ({1}).",
                "{0}'s address is {1}.",
            ]
        )
        text += form.format(person.name, person.email) + "\n"
    return text + f"\n{sender.split()[0]}\n"
