"""Two sets of texts that differ only in whether the embedded models were pre-trained on them."""

import random
import sys
from pathlib import Path
from typing import Any

from common import locks, manifests
from common.problems import Problems, UserError, check_writable
from data.embedded.config import CorpusConfig, MembershipConfig
from data.embedded.corpus import BYSTANDERS, make_corpus
from data.embedded.people import make_people
from data.embedded.phrases import Phrases
from data.embedded.pretraining import make_mails

MEMBERS, NONMEMBERS = "members.jsonl", "nonmembers.jsonl"
Row = dict[str, Any]


def run(config: MembershipConfig) -> None:
    """Write both files and their manifests."""
    folder = Path(config.output)
    paths = {MEMBERS: folder / MEMBERS, NONMEMBERS: folder / NONMEMBERS}
    with locks.output_folder(folder, config.dry_run) as target:
        problems = Problems()
        check_writable(folder, problems, "--output")
        settings = manifests.settings_of(config)
        files = [("--output", path) for path in paths.values()]
        finished = problems.absorb(manifests.finished, files, settings, config.overwrite)
        if config.seed == config.corpus_seed:
            problems.add(f"--seed {config.seed}: gives the non-members, and must differ from --corpus_seed")
        problems.check()
        if finished:
            manifests.say_finished(*paths.values())
            return
        if config.dry_run:
            print(f"would write {config.num_rows} members and {config.num_rows} non-members in {folder}")
            return
        sets = dict(zip(paths, make_sets(config)))
        with target.publication() as out:
            for name, rows in sets.items():
                tag, script = f"pretraining-{name.removesuffix('.jsonl')}", "data/embedded/make_membership.py"
                out.write_jsonl(paths[name], rows)
                manifests.write_manifest(
                    out, paths[name], tag=tag, script=script, argv=sys.argv, rows=len(rows), settings=settings
                )
    for name, rows in sets.items():
        print(f"{paths[name]}: {len(rows)} texts")


def make_sets(config: MembershipConfig) -> tuple[list[Row], list[Row]]:
    """(members, non-members): mails of the pre-training text, and mails that the same generator writes about the same
    people, as often, from another seed. People and phrases are common to both, so that a text alone tells nothing."""
    defaults = CorpusConfig()
    members = make_corpus(config.corpus_seed, defaults.people, defaults.outsiders, n_web=0).mails
    phrases = Phrases()
    people, _, bystanders = make_people(
        phrases, defaults.people, defaults.outsiders, BYSTANDERS, seed=config.corpus_seed
    )
    others = make_mails(phrases, people, bystanders, random.Random(f"{config.seed}-mails"))
    known = set(members)
    others = [text for text in others if text not in known]
    fewest = min(len(members), len(others))
    if fewest < config.num_rows:
        raise UserError(f"--num_rows {config.num_rows}: there are {fewest} texts")
    rng = random.Random(f"{config.seed}-membership")
    chosen = (rng.sample(texts, config.num_rows) for texts in (members, others))
    first, second = ([{"text": text, "row_id": row_id} for row_id, text in enumerate(texts)] for texts in chosen)
    return first, second
