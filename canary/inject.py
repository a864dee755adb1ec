#!/usr/bin/env python3
"""Places canaries in the reviews of a training file, and writes the key that measure.py reads.

python canary/inject.py --input data/amazon/train.jsonl --repetitions 1 2 4 8 16          # ladder, 10 canaries each
python canary/inject.py --input data/amazon/train.jsonl --share 0.01      # System S: one canary, in 1 % of rows
python canary/inject.py --input data/amazon/train.jsonl --audit 1000 --privacy_unit user # for the one-run ε bound

A canary is a sentence with a secret out of a space of known size (--secret), at a random place of a review's text,
never at its start. Beside those placed stand as many held-out canaries that are placed nowhere. The three modes go
together in one file: their canaries never share a row.

--audit M: M canaries, each in a row of its own (its user's first, and no user twice, under --privacy_unit user). A fair
coin decides whether the row with its canary is in the file, or not at all (the user with all rows, under user): the
two files differ by one added or removed unit, as the accountant's ε means it. So about M/2 units are left out.

Writes --output (rows), its manifest, and --key_file (mode 0600: where each canary stands, its secret and its context).
"""

import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path

from canary import canaries
from common import cli, dataset, results, reviews

KEY_SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class InjectConfig:
    """The flags of canary/inject.py."""

    input: str = "./data/amazon/train.jsonl"
    output: str | None = None
    key_file: str | None = None
    share: float | None = None
    repetitions: tuple[int, ...] = ()
    canaries: int = 10
    audit: int = 0
    privacy_unit: str = "record"
    secret: str = "phone"
    within: int = 400
    condition: str = "metadata"
    overwrite: bool = False
    seed: int = 3407
    dry_run: bool = False


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Place canaries in a training file of reviews.",
        "python canary/inject.py --input data/amazon/train.jsonl --repetitions 1 2 4 8 16",
        InjectConfig,
    )
    add = parser.add_argument
    add("-i", "--input", "--data", help="review rows to train on")
    add("--output", help="the .jsonl file to train on (default: <input>_canaries.jsonl)")
    add("--key_file", help="the .jsonl key (default: <output>_key.jsonl)")
    add("--share", type=cli.positive_float, help="one canary in this share of the rows: 0.01, 0.1, 1")
    add("--repetitions", nargs="+", type=cli.positive_int, help="ladder: rows that hold a canary")
    add("--canaries", type=cli.positive_int, help="canaries of each count in --repetitions")
    add("--audit", type=cli.positive_int, help="canaries placed once or not at all, by a fair coin")
    add("--privacy_unit", choices=("record", "user"), help="what --audit adds or leaves out")
    add("--secret", choices=canaries.SECRETS, help="what varies; text: words alone, no person")
    add("--within", type=cli.non_negative_int, help="first characters of the review; 0: anywhere")
    add("--condition", choices=("metadata", "title"), help="title: prompts have the review's title")
    add("--overwrite", action="store_true", help="replace existing files")
    cli.add_dry_run(parser)
    add("--seed", type=cli.seed, help="seed of everything random, the coins too")
    return parser


def place(rows: list[dict], plan, space: canaries.Space, rng: random.Random) -> tuple[list[dict], list[dict]]:
    """(rows of the output, canaries of the key). `plan`: share, repetitions, canaries, audit, privacy_unit, within.

    A canary's `context` is the text before its sentence where it stands first, or would stand; `rows` are the indices
    in the output of the rows that hold it.
    """
    users: dict = {}
    for index, row in enumerate(rows):
        users.setdefault(dataset.user_of(row) if plan.privacy_unit == "user" else index, []).append(index)
    units = list(users.values())
    rng.shuffle(units)
    audited, free = units[: plan.audit], [index for unit in units[plan.audit :] for index in unit]
    rng.shuffle(free)
    included = [rng.random() < 0.5 for _ in audited]
    gone = {index for unit, kept in zip(audited, included) if not kept for index in unit}
    copies = [("ladder", r) for r in plan.repetitions for _ in range(plan.canaries)]
    if plan.share:
        copies.append(("share", max(1, round(plan.share * (len(rows) - len(gone))))))
    if sum(repetitions for _, repetitions in copies) > len(free):
        raise cli.UserError(f"--input: {len(free)} rows are left beside --audit's; the other canaries need more")
    n = 2 * len(copies) + plan.audit
    texts = [row["Review"] for row in rows]
    made = canaries.make(n, space, texts, rng)
    changed, key = {}, []

    def put(canary: dict, index: int, write: bool) -> str:
        """The row's text before the canary."""
        review, start = canaries.insert(rows[index]["Review"].strip(), canary["sentence"], plan.within, rng)
        row = rows[index] | {"Review": review}
        text, boundary = dataset.row_text(row)
        start += boundary + 1  # the space before the review
        if not text.startswith(canary["sentence"], start):
            raise AssertionError(f"row {index}: the canary is not where it was put")
        if write:
            changed[index] = row
        return text[:start]

    def note(canary, kind, repetitions, present, contexts, hosts, unit) -> None:
        facts = {"kind": kind, "repetitions": repetitions, "included": present, "context": contexts[0]}
        facts["starts"] = [len(context) for context in contexts[: len(hosts)]]  # of the canary in each host's text
        key.append({"id": len(key), **facts, **canary, "rows": hosts, "user_id": rows[unit].get("user_id")})

    taken = iter(made)
    for unit, kept in zip(audited, included):
        canary = next(taken)
        note(canary, "audit", int(kept), kept, [put(canary, unit[0], True)], [unit[0]] if kept else [], unit[0])
    used = 0
    for kind, repetitions in copies:
        hosts = free[used : used + repetitions]
        used += repetitions
        canary = next(taken)
        contexts = [put(canary, index, True) for index in hosts]
        note(canary, kind, repetitions, True, contexts, hosts, hosts[0])
    for _ in copies:
        canary, index = next(taken), rng.choice(free)
        note(canary, "held_out", 0, False, [put(canary, index, False)], [], index)
    kept_rows = [index for index in range(len(rows)) if index not in gone]
    new_index = {old: new for new, old in enumerate(kept_rows)}
    for one in key:
        one["rows"] = [new_index[index] for index in one["rows"]]
    return [changed.get(index, rows[index]) for index in kept_rows], key


def destinations(config: InjectConfig) -> tuple[Path, Path]:
    """(output, key file)."""
    source = Path(config.input)
    output = Path(config.output or source.with_name(f"{source.name.split('.')[0]}_canaries.jsonl"))
    return output, Path(config.key_file or output.with_name(f"{output.stem}_key.jsonl"))


def check(config: InjectConfig) -> tuple[list[dict], dict | None, bool]:
    """(rows, settings for the manifest, whether the files stand already); UserError with all problems."""
    problems = cli.Problems()
    output, key = destinations(config)
    cli.check_output_file(output, ".jsonl", problems)
    cli.check_output_file(key, ".jsonl", problems, flag="--key_file")
    if len(set(map(os.path.realpath, (config.input, output, key)))) < 3:
        problems.add("--input, --output and --key_file must be three files")
    if not (config.share or config.repetitions or config.audit):
        problems.add("nothing to place: give --share, --repetitions or --audit")
    if (config.share or 0) > 1:
        problems.add(f"--share {config.share:g}: a share of the rows, at most 1")
    if len(set(config.repetitions)) < len(config.repetitions):
        problems.add("--repetitions: a count is given twice")
    rows = problems.absorb(reviews.read_reviews, config.input) or []
    if rows:
        needed = config.canaries * sum(config.repetitions)
        bare = [index for index, row in enumerate(rows) if dataset.user_of(row) is None]
        by_user = config.privacy_unit == "user"
        if by_user and bare:
            problems.add(
                f"--privacy_unit user: {config.input}: row {bare[0]} (and {len(bare) - 1} more) has no user_id"
            )
        units = len(set(map(dataset.user_of, rows))) if by_user else len(rows)
        if config.audit > units:
            problems.add(f"--audit {config.audit}: {config.input} has only {units} {config.privacy_unit}s")
        elif config.audit + needed > len(rows):
            problems.add(f"{config.input}: {len(rows)} rows; the canaries asked for need {config.audit + needed}")
        if config.condition == "title" and any(not row.get("Review Title") for row in rows):
            problems.add(f"--condition title: {config.input} has rows without a Review Title")
        if any(not row["Review"].strip() for row in rows):
            problems.add(f"{config.input}: has rows whose Review is empty; remove them")
    settings = None
    if not problems.lines:
        settings = dataset.settings_of(config, ("output", "key_file"), input=results.sha256(config.input))
    others = [("--key_file", key)]
    finished = problems.absorb(dataset.finished, [("--output", output)], settings, config.overwrite, others)
    problems.check()
    return rows, settings, finished


def run(config: InjectConfig) -> dict:
    """Write rows, manifest and key; returns the counts, {} when there is nothing to do."""
    output, key_file = destinations(config)
    with results.output_file(output, key_file, dry_run=config.dry_run) as place:
        rows, settings, finished = check(config)
        if finished:
            dataset.say_finished(output, key_file)
            return {}
        made, key, space = place_all(config, rows)
        counts = count(config, rows, made, key, space)
        if not config.dry_run:
            with place.publication() as files:
                write(files, config, settings, made, key, counts, space)
    words = "rows would stand in" if config.dry_run else "rows in"
    print(f"{len(made):>9,}  {words} {output}, {counts['rows_with_canary']:,} of them with a canary")
    print(f"{counts['placed']:>9,}  canaries placed, {counts['held_out']:,} held out")
    if config.audit:
        print(f"{config.audit:>9,}  audit canaries, {counts['audit_included']:,} of them in the file")
    print(f"          key: {key_file}")
    return counts


def place_all(config: InjectConfig, rows: list[dict]) -> tuple[list[dict], list[dict], canaries.Space]:
    """(rows of the output, canaries of the key, the space of their secrets)."""
    rng = random.Random(config.seed)
    if config.condition == "title":
        rows = [row | {"condition": "title"} for row in rows]
    texts = [row["Review"] for row in rows]
    space = canaries.Space(config.secret, canaries.vocabulary(texts, rng) if config.secret == "text" else ())
    if config.secret == "text" and len(space.words) < 2:
        raise cli.UserError(f"{config.input}: too few words for --secret text")
    if (2 * config.canaries * len(config.repetitions) + 2 + config.audit) * 2 > space.size:
        raise cli.UserError(
            f"--secret {config.secret}: only {space.size} secrets; ask for fewer canaries, or for phone"
        )
    return *place(rows, config, space, rng), space


def count(config: InjectConfig, rows: list[dict], made: list[dict], key: list[dict], space: canaries.Space) -> dict:
    return {
        "secret": config.secret,
        "space": space.size,
        "placed": sum(one["kind"] in ("ladder", "share") for one in key),
        "held_out": sum(one["kind"] == "held_out" for one in key),
        "audit": config.audit,
        "audit_included": sum(one["kind"] == "audit" and one["included"] for one in key),
        "privacy_unit": config.privacy_unit,
        "rows_left_out": len(rows) - len(made),
        "rows_with_canary": len({index for one in key for index in one["rows"]}),
    }


def write(
    files: results.Publication, config: InjectConfig, settings: dict, made: list[dict], key: list[dict], counts, space
) -> None:
    output, key_file = destinations(config)
    files.write_jsonl(output, made, permissions=0o600)
    header = {
        "schema": KEY_SCHEMA,
        "secret": config.secret,
        "words": space.words,
        "privacy_unit": config.privacy_unit,
        "training": results.sha256(files.hidden(output)),
        "seed": config.seed,
        "canaries": len(key),
    }
    files.write_jsonl(key_file, [header, *key], permissions=0o600)
    dataset.write_manifest(
        files,
        output,
        tag=f"{dataset.data_tag(config.input, dataset.read_manifest(config.input))}-canaries",
        script="canary/inject.py",
        argv=sys.argv,
        rows=len(made),
        source=[(config.input, counts["rows_left_out"] + len(made))],
        sampling={"seed": config.seed, "within": config.within, "condition": config.condition},
        settings=settings,
        more={"canaries": counts},
    )


def main(argv: list[str] | None = None) -> int:
    run(make_parser().parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(cli.entry(main))
