"""The run of data/embedded/make_corpus.py: the rows of people and outsiders, and the pre-training text."""

import random
from pathlib import Path
from typing import Any, NamedTuple

from common import dataset, locks, manifests
from common.problems import Problems, check_writable
from data.embedded.config import CorpusConfig
from data.embedded.mail import write_thread
from data.embedded.people import Person, make_people
from data.embedded.phrases import Phrases
from data.embedded.pretraining import make_mails, write_web_page

HERE = Path(__file__).resolve().parent
BYSTANDERS = 300
MAX_PROMPT_CHARACTERS = 800
MAX_CONTINUATION_CHARACTERS = 1600
ADDRESS_MARK = "\x00"  # marks the address of a row's person while its mail is written

Row = dict[str, Any]


class Corpus(NamedTuple):
    """Rows of enron.jsonl and outsiders.jsonl; mails and web pages to pre-train on."""

    rows: list[Row]
    outsiders: list[Row]
    mails: list[str]
    web: list[str]


def run(config: CorpusConfig) -> None:
    """Write the two files and their manifests, and the pre-training text if requested."""
    if config.dry_run:
        folder, more = Path(config.output_dir or HERE), config.pretraining_output
        problems = Problems()
        check_writable(folder, problems)
        if more:
            check_writable(Path(more).parent, problems, "--pretraining_output")
        problems.check()
        words = f"{config.people} rows of enron.jsonl and {config.outsiders} of outsiders.jsonl in {folder}"
        print(f"would write {words}{f', and {more}' if more else ''}")
        return
    corpus = make_corpus(config.seed, config.people, config.outsiders, config.web_pages)
    argv = ["--people", str(config.people), "--outsiders", str(config.outsiders), "--seed", str(config.seed)]
    # All outsiders are evaluated, none is for training: their split starts after the last row.
    files = [
        ("enron.jsonl", "original", corpus.rows, min(dataset.HEAD_ROWS, len(corpus.rows) // 3)),
        ("outsiders.jsonl", "outsiders", corpus.outsiders, len(corpus.outsiders)),
    ]
    paths = [Path(config.output_dir or HERE, name) for name, *_ in files]
    paths += [Path(config.pretraining_output)] if config.pretraining_output else []
    with locks.output_file(*paths) as target, target.publication() as out:
        for path, (_, tag, rows, split_start) in zip(paths, files):
            out.write_jsonl(path, rows)
            manifests.write_manifest(
                out,
                path,
                tag=tag,
                script="data/embedded/make_corpus.py",
                argv=argv,
                rows=len(rows),
                split_start=split_start,
            )
        if config.pretraining_output:
            out.write_json(paths[-1], {"mails": corpus.mails, "web": corpus.web})
    for path, (*_, rows, _) in zip(paths, files):
        print(f"{path}: {len(rows)} rows")
    if config.pretraining_output:
        print(f"{config.pretraining_output}: {len(corpus.mails)} mails, {len(corpus.web)} web pages")


def make_corpus(seed: int, n_people: int, n_outsiders: int, n_web: int) -> Corpus:
    """The corpus of one seed: the same on every machine with the same Faker. Outsiders occur in no mail and no page."""
    phrases = Phrases()
    people, outsiders, bystanders = make_people(phrases, n_people, n_outsiders, BYSTANDERS, seed)
    rows = make_rows(phrases, people, bystanders, random.Random(f"{seed}-rows"))
    outsider_rows = make_rows(phrases, outsiders, bystanders, random.Random(f"{seed}-outsiders"))
    mails = make_mails(phrases, people, bystanders, random.Random(f"{seed}-mails"))
    web_rng = random.Random(f"{seed}-web")
    return Corpus(rows, outsider_rows, mails, [write_web_page(phrases, web_rng) for _ in range(n_web)])


def make_rows(phrases: Phrases, people: list[Person], bystanders: list[str], rng: random.Random) -> list[Row]:
    """One row per person: a thread, split at their address."""
    rows: list[Row] = []
    for row_id, person in enumerate(people):
        text = write_thread(phrases, rng, [person], bystanders, mark=ADDRESS_MARK)
        before, after = text.split(ADDRESS_MARK)
        rows.append(
            {
                "gt-name": person.name,
                "gt-email": person.email,
                "prompt": before[-MAX_PROMPT_CHARACTERS:],
                "continuation": after[:MAX_CONTINUATION_CHARACTERS],
                "row_id": row_id,
                "mentions": person.mentions,
            }
        )
    return rows
