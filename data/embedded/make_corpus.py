#!/usr/bin/env python3
"""Writes the embedded mail corpus: rows about fictional people, and the pre-training text of mini-pythia.

python data/embedded/make_corpus.py                                # enron.jsonl + outsiders.jsonl, as committed
python data/embedded/make_corpus.py --output_dir X                 # the same two files elsewhere
python data/embedded/make_corpus.py --pretraining_output text.txt  # also the text that make_model.py trains on

Everything is invented: names are random pairs of Faker's first and last names, domains lie below the reserved .example
and .test, messages are filled-in templates (phrases.json). Three sets of text share no message:

* enron.jsonl: one row a person (1-contract "Enron rows"), rows in random order, so that the evaluated head and the
  training rows have one distribution;
* the pre-training text: OTHER mails, address lists and pages in which the same people occur between 0 and 30 times
  (the row's field `mentions`), half of them under five;
* outsiders.jsonl: rows of the same form about people who occur nowhere else (the control group).
"""

import datetime
import itertools
import json
import random
import re
import sys
from pathlib import Path

from common import dataset, results
from common.cli import Parser, entry, positive_int
from common.dataset import HEAD_ROWS

HERE = Path(__file__).resolve().parent
NAME_RULES = {
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
MAX_PROMPT_CHARACTERS = 800
MAX_CONTINUATION_CHARACTERS = 1600
MAX_MENTIONS = 30
ADDRESS_MARK = "\x00"  # put before the address of a row's person while its mail is written


class Phrases:
    """The material of phrases.json; `fill` replaces {slot} by a random value, often one used before in this mail."""

    def __init__(self, path: Path = HERE / "phrases.json"):
        self.data = json.loads(path.read_text(encoding="utf-8"))
        self.topics = self.data["topics"]
        self.first_names: list[str] = []  # both are set by make_people
        self.unused_names: list[tuple[str, str]] = []

    def value(self, slot: str, rng: random.Random) -> str:
        if slot == "num":
            return str(
                rng.choice([rng.randint(2, 99), rng.randint(100, 999), 50 * rng.randint(2, 60), rng.randint(1, 9)])
            )
        if slot == "nnn":
            return f"{rng.randint(0, 999):03d}"
        if slot == "dd":
            return str(rng.randint(2, 28))
        if slot == "pct":
            return f"{rng.randint(0, 12)}.{rng.randint(0, 99):02d}"
        if slot == "price":
            return f"${rng.randint(2, 48)}.{rng.randint(0, 99):02d}"
        if slot == "deal":
            return f"{rng.randint(1, 9)}{rng.randint(0, 99999):05d}"
        if slot == "time":
            return f"{rng.randint(1, 12)}:{rng.choice(['00', '15', '30', '45'])} {rng.choice(['am', 'pm'])}"
        if slot == "year":
            return str(rng.randint(1840, 2002))
        if slot == "phone":
            return f"{rng.randint(2, 9)}{rng.randint(0, 99):02d}-555-01{rng.randint(0, 99):02d}"
        if slot == "first":
            return rng.choice(self.first_names)
        return rng.choice(self.data["slots"].get(slot) or self.data["web_slots"][slot])

    def fill(self, sentence: str, rng: random.Random, memory: dict[str, list[str]]) -> str:
        def replacement(match: re.Match) -> str:
            seen = memory.setdefault(match[1], [])
            fresh = [v for v in seen if v not in used]
            value = rng.choice(fresh) if fresh and rng.random() < 0.5 else self.value(match[1], rng)
            used.append(value)
            seen.append(value)
            return value

        used: list[str] = []
        text = re.sub(r"\{(\w+)\}", replacement, sentence)
        return text[0].upper() + text[1:] if text else text


def make_people(phrases: Phrases, n_corpus: int, n_outsiders: int, n_bystanders: int, seed: int):
    """(corpus, outsiders, bystanders): people with name, email, title; full names and addresses all distinct."""
    from faker import Faker

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
    middles = first_names[140:200]  # nobody is called First Last by another person's Middle Last

    company_weights = [1 / (rank + 2) ** 0.9 for rank in range(len(phrases.data["companies"]))]
    people, taken = [], set()
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
        people.append({"name": name, "email": email, "title": title, "mentions": 0})
    corpus, outsiders = people[:n_corpus], people[n_corpus : n_corpus + n_outsiders]
    weights = [1 / (n + 2) ** 0.9 for n in range(MAX_MENTIONS + 1)]  # Zipf-like: half of the people under 7
    for person in corpus:
        person["mentions"] = rng.choices(range(MAX_MENTIONS + 1), weights)[0]
    return corpus, outsiders, [person["name"] for person in people[n_corpus + n_outsiders :]]


def make_local(phrases, rng, first, middle, last, rule, handle_share) -> str:
    """A local part by the house rule, or (with probability handle_share) one that shares nothing with the name."""
    first, middle, last = (re.sub("[^a-z]", "", part.lower()) for part in (first, middle, last))
    if rng.random() >= handle_share:
        rule = rng.choice(["first.last", "firstlast", "flast"]) if rule == "handle" else rule
        if rule == "initials" and not middle:
            rule = "flast"
        return NAME_RULES[rule](first, middle, last) + (str(rng.randint(1, 99)) if rng.random() < 0.04 else "")
    while True:
        word = rng.choice(phrases.data["handles"])
        other = rng.choice(phrases.data["handles"])
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


# ---------------------------------------------------------------------------------------------------- mail text


def write_body(phrases: Phrases, rng: random.Random, topic: str, memory: dict, max_sentences: int = 30) -> str:
    """A message text: greeting, paragraphs of filled-in sentences, closing; log-normal length."""
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


def write_block(rng, person: dict, mark: str, others: list[str], subject: str, date: datetime.datetime) -> str:
    """Header lines of one message; `mark` is put before the person's address."""
    name, email = person["name"], mark + person["email"]
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


def write_signature(phrases: Phrases, rng: random.Random, person: dict) -> str:
    phone = phrases.value("phone", rng)
    return rng.choice(
        [
            f"{person['name']}",
            f"{person['name'].split()[0]}",
            f"{person['name']}\n{person['title']}\n{phone}",
            f"{person['name']}\n{person['title']}\nphone {phone}\n{person['email']}",
        ]
    )


def write_thread(
    phrases: Phrases, rng: random.Random, people: list[dict], bystanders: list[str], mark: str = ""
) -> str:
    """A message of a bystander followed by one quoted message per person of `people`."""
    topic = rng.choice(list(phrases.topics))
    memory: dict[str, list[str]] = {}
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
        text += write_block(rng, person, mark, rng.sample(bystanders, 2), subject, date)
        text += write_body(phrases, rng, topic, memory) + "\n\n" + write_signature(phrases, rng, person) + "\n\n"
    return text.rstrip() + "\n"


def make_rows(phrases: Phrases, people: list[dict], bystanders: list[str], rng: random.Random) -> list[dict]:
    rows = []
    for row_id, person in enumerate(people):
        text = write_thread(phrases, rng, [person], bystanders, mark=ADDRESS_MARK)
        before, after = text.split(ADDRESS_MARK)
        rows.append(
            {
                "gt-name": person["name"],
                "gt-email": person["email"],
                "prompt": before[-MAX_PROMPT_CHARACTERS:],
                "continuation": after[:MAX_CONTINUATION_CHARACTERS],
                "row_id": row_id,
                "mentions": person["mentions"],
            }
        )
    return rows


# ---------------------------------------------------------------------------------------------------- pre-training


def write_list(phrases: Phrases, rng: random.Random, people: list[dict]) -> str:
    """An address list in one of the forms such lists have in mail and on the web."""
    style = rng.choices(["sentence", "name-email", "mailto", "block", "angle"], [30, 20, 15, 15, 20])[0]
    heading = rng.choice(["", "", "Distribution list", "Attendees:", "Contacts", "Phone list, new entries", "Members"])
    lines = [heading] if heading else []
    spaced = rng.random() < 0.5
    for number, person in enumerate(people, start=1):
        name, email = person["name"], person["email"]
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


def write_note(phrases: Phrases, rng: random.Random, people: list[dict], bystanders: list[str]) -> str:
    """A mail that tells addresses in sentences."""
    topic = rng.choice(list(phrases.topics))
    memory: dict[str, list[str]] = {}
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
        text += form.format(person["name"], person["email"]) + "\n"
    return text + f"\n{sender.split()[0]}\n"


def write_web_page(phrases: Phrases, rng: random.Random) -> str:
    """A page that has nothing to do with the mails: prose, or the address list of a club.

    The club's members are in no file (pairs of names that make_people did not give out), their addresses are by rule
    and at domains of no file. Nobody can be memorised from such lists: they teach to build an address from a name.
    """
    if rng.random() < 0.5:
        memory: dict[str, list[str]] = {}
        page = rng.sample(phrases.data["web"], rng.randint(2, 5))
        return "\n".join(phrases.fill(paragraph, rng, memory) for paragraph in page) + "\n"
    people = []
    for first, last in rng.sample(phrases.unused_names, rng.randint(4, 9)):
        rule = rng.choice(["first.last", "first.last", "flast", "first_last", "last.first", "firstlast"])
        local = NAME_RULES[rule](first.lower(), "", re.sub("[^a-z]", "", last.lower()))
        people.append({"name": f"{first} {last}", "email": f"{local}@{rng.choice(phrases.data['web_domains'])}"})
    return write_list(phrases, rng, people)


def make_mails(phrases: Phrases, people: list[dict], bystanders: list[str], rng: random.Random) -> list[str]:
    """Documents in which each person's name and address stand together in exactly person["mentions"] documents."""
    pool = [person for person in people for _ in range(person["mentions"])]
    rng.shuffle(pool)
    documents = []
    while pool:
        form = rng.choices(["thread", "note", "list"], [45, 12, 43])[0]
        size = {"thread": rng.choice([1, 1, 2, 2, 3]), "note": rng.randint(1, 3), "list": rng.randint(4, 10)}[form]
        chosen = pool[-size:]
        if len({person["email"] for person in chosen}) < len(chosen):  # nobody twice in one document
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


def make_corpus(seed: int, n_people: int, n_outsiders: int, n_web: int):
    """(enron rows, outsider rows, pre-training mails, pre-training web pages) of one seed.

    The same on every machine with the same Faker. Outsiders occur in no mail and no page.
    """
    phrases = Phrases()
    corpus, outsiders, bystanders = make_people(phrases, n_people, n_outsiders, 300, seed)
    rows = make_rows(phrases, corpus, bystanders, random.Random(f"{seed}-rows"))
    outsider_rows = make_rows(phrases, outsiders, bystanders, random.Random(f"{seed}-outsiders"))
    mails = make_mails(phrases, corpus, bystanders, random.Random(f"{seed}-mails"))
    web_rng = random.Random(f"{seed}-web")
    return rows, outsider_rows, mails, [write_web_page(phrases, web_rng) for _ in range(n_web)]


def make_parser() -> Parser:
    parser = Parser(
        "Writes the embedded mail corpus about fictional people.",
        "python data/embedded/make_corpus.py --output_dir corpus",
    )
    parser.add_argument("--output_dir", default=None, help="where the two files go; None: beside this script")
    parser.add_argument(
        "--pretraining_output", default=None, help="also write the pre-training text, {mails, web}, to this json file"
    )
    parser.add_argument("--people", type=positive_int, default=1500, help="rows of enron.jsonl")
    parser.add_argument("--outsiders", type=positive_int, default=300, help="rows of outsiders.jsonl")
    parser.add_argument(
        "--web_pages", type=positive_int, default=6900, help="pages of the pre-training text without corpus people"
    )
    parser.add_argument("--seed", type=int, default=3407, help="seed of all text")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    rows, outsiders, mails, web = make_corpus(args.seed, args.people, args.outsiders, args.web_pages)
    argv = ["--people", str(args.people), "--outsiders", str(args.outsiders), "--seed", str(args.seed)]
    # Every outsider is evaluated, none is for training: their split starts behind the last row.
    files = [
        ("enron.jsonl", "original", rows, min(HEAD_ROWS, len(rows) // 3)),
        ("outsiders.jsonl", "outsiders", outsiders, len(outsiders)),
    ]
    paths = [Path(args.output_dir or HERE, name) for name, *_ in files]
    paths += [Path(args.pretraining_output)] if args.pretraining_output else []
    with results.output_file(*paths) as place, place.publication() as out:
        for path, (_, tag, lines, split_start) in zip(paths, files):
            out.write_jsonl(path, lines)
            facts = {"tag": tag, "script": "data/embedded/make_corpus.py", "split_start": split_start}
            dataset.write_manifest(out, path, rows=len(lines), argv=argv, **facts)
        if args.pretraining_output:
            out.write_json(paths[-1], {"mails": mails, "web": web})
    for path, (*_, lines, _) in zip(paths, files):
        print(f"{path}: {len(lines)} rows")
    if args.pretraining_output:
        print(f"{args.pretraining_output}: {len(mails)} mails, {len(web)} web pages")
    return 0


if __name__ == "__main__":
    sys.exit(entry(main))
