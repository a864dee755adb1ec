"""The pre-training text: mails that mention each person a given number of times, and web pages."""

import random
import re

from data.embedded.mail import write_list, write_note, write_thread
from data.embedded.people import NAME_RULES, Person
from data.embedded.phrases import Memory, Phrases


def write_web_page(phrases: Phrases, rng: random.Random) -> str:
    """A page unrelated to the mails: prose, or the address list of a club.

    The club's members are in no file (pairs of names that make_people did not use); their addresses follow a rule, at
    domains that are in no file. From such lists no one can be memorised; they teach how addresses derive from names.
    """
    if rng.random() < 0.5:
        memory: Memory = {}
        page = rng.sample(phrases.data["web"], rng.randint(2, 5))
        return "\n".join(phrases.fill(paragraph, rng, memory) for paragraph in page) + "\n"
    people: list[Person] = []
    for first, last in rng.sample(phrases.unused_names, rng.randint(4, 9)):
        rule = rng.choice(["first.last", "first.last", "flast", "first_last", "last.first", "firstlast"])
        local = NAME_RULES[rule](first.lower(), "", re.sub("[^a-z]", "", last.lower()))
        people.append(Person(f"{first} {last}", f"{local}@{rng.choice(phrases.data['web_domains'])}"))
    return write_list(phrases, rng, people)


def make_mails(phrases: Phrases, people: list[Person], bystanders: list[str], rng: random.Random) -> list[str]:
    """Documents in which each person's name and address occur together `mentions` times, once per document."""
    pool = [person for person in people for _ in range(person.mentions)]
    rng.shuffle(pool)
    documents = []
    while pool:
        form = rng.choices(["thread", "note", "list"], [45, 12, 43])[0]
        size = {"thread": rng.choice([1, 1, 2, 2, 3]), "note": rng.randint(1, 3), "list": rng.randint(4, 10)}[form]
        chosen = pool[-size:]
        if len({person.email for person in chosen}) < len(chosen):  # nobody twice in one document
            chosen = chosen[-1:]
        del pool[-len(chosen) :]
        if form == "thread":
            documents.append(write_thread(phrases, rng, chosen, bystanders))
        elif form == "note":
            documents.append(write_note(phrases, rng, chosen, bystanders))
        else:
            documents.append(write_list(phrases, rng, chosen))
    rng.shuffle(documents)
    return documents
