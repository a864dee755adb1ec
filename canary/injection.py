"""The run of canary/inject.py: check everything, then write rows, manifest and key together."""

import os
import random
import sys
from pathlib import Path
from typing import Any

from canary.canaries import LEAST_TEMPERATURE, TOKEN_FAMILIES, Space
from canary.config import InjectConfig
from canary.families import source_of
from canary.hosts import Hosts, Row, read
from canary.key import SCHEMA, KeyLine
from canary.placement import place
from common import dataset, inserted, locks, manifests, models, provenance, results, tokenization
from common.problems import Problems, check_output_file
from common.publication import Publication

Counts = dict[str, Any]
NEWER = ("family", "generator", "temperature")  # flags that change nothing of templates


def run(config: InjectConfig) -> Counts:
    """Write rows, manifest and key; returns the counts, {} if there is nothing to do."""
    output, key_file = destinations(config)
    with locks.output_file(output, key_file, dry_run=config.dry_run) as target:
        rows, hosts, settings = check(config)
        if settings is None:
            manifests.say_finished(output, key_file)
            return {}
        written, key, space = place_all(config, rows, hosts)
        counts = count(config, rows, written, key, space)
        if not config.dry_run:
            with target.publication() as files:
                write(files, config, settings, written, key, counts, space, hosts)
    words = "rows would go into" if config.dry_run else "rows in"
    print(f"{len(written):>9,}  {words} {output}, {counts['rows_with_canary']:,} of them with a canary")
    print(f"{counts['placed']:>9,}  canaries inserted, {counts['held_out']:,} held out")
    if config.audit:
        print(f"{config.audit:>9,}  audit canaries, {counts['audit_included']:,} of them in the file")
    print(f"          key: {key_file}")
    return counts


def destinations(config: InjectConfig) -> tuple[Path, Path]:
    """(output, key file)."""
    source = Path(config.input)
    output = Path(config.output or source.with_name(f"{source.name.split('.')[0]}_canaries.jsonl"))
    return output, Path(config.key_file or inserted.key_beside(output))


def check(config: InjectConfig) -> tuple[list[Row], Hosts, dict[str, Any] | None]:
    """(rows, how they hold canaries, settings for the manifest: None if the files exist already). UserError with all
    problems."""
    problems = Problems()
    output, key = destinations(config)
    check_output_file(output, ".jsonl", problems)
    check_output_file(key, ".jsonl", problems, flag="--key_file")
    if len({os.path.realpath(file) for file in (config.input, output, key)}) < 3:
        problems.add("--input, --output and --key_file must be three files")
    if not (config.share or config.repetitions or config.audit):
        problems.add("nothing to insert: give --share, --repetitions or --audit")
    if config.family != "template" and config.secret != InjectConfig.secret:
        problems.add(f"--secret {config.secret}: only for --family template")
    if config.share and config.share > 1:
        problems.add(f"--share {config.share:g}: a share of the rows, at most 1")
    if len(set(config.repetitions)) < len(config.repetitions):
        problems.add("--repetitions: a count is given twice")
    rows, hosts = read(config, problems)
    if rows:
        check_rows(config, rows, hosts, problems)
    drawn_from = check_generator(config, problems)
    settings: dict[str, Any] | None = None
    if not problems.lines:
        skip = ("output", "key_file", *(NEWER if config.family == "template" else ()))
        if config.family in TOKEN_FAMILIES:
            drawn_from["tokenizer_sha256"] = tokenization.sha256(hosts.tokenizer)
        settings = manifests.settings_of(config, skip, input=results.sha256(config.input), **drawn_from)
    others = [("--key_file", key)]
    finished = problems.absorb(manifests.finished, [("--output", output)], settings, config.overwrite, others)
    problems.check()
    return rows, hosts, None if finished else settings


def check_generator(config: InjectConfig, problems: Problems) -> dict[str, str | None]:
    """Hashes of --generator's weights and tokenizer, where the family needs one; {} otherwise."""
    if config.family != "model":
        for flag in ("generator", "temperature"):
            if (value := getattr(config, flag)) != getattr(InjectConfig, flag):
                problems.add(f"--{flag} {value}: only for --family model")
        return {}
    if config.temperature < LEAST_TEMPERATURE:
        problems.add(f"--temperature {config.temperature:g}: must be at least {LEAST_TEMPERATURE}")
    if config.generator is None:
        problems.add("--family model: needs --generator, the model that canaries are sampled from")
        return {}
    ref, tokenizer = models.look_up(problems, config.generator, flag="--generator")
    if ref is None or tokenizer is None:
        return {}
    return {"generator_weights": provenance.weights_sha256(ref), "tokenizer_sha256": tokenization.sha256(tokenizer)}


def check_rows(config: InjectConfig, rows: list[Row], hosts: Hosts, problems: Problems) -> None:
    """Add problems if the rows cannot hold the requested canaries."""
    needed = config.canaries * sum(config.repetitions)
    users = [dataset.user_of(row) for row in rows]
    units = len(rows)
    if config.privacy_unit == "user":
        units = len(set(users))
        if None in users:
            others = users.count(None) - 1
            problems.add(
                f"--privacy_unit user: {config.input}: row {users.index(None)} (and {others} more) has no user_id"
            )
    if config.audit > units:
        problems.add(f"--audit {config.audit}: {config.input} has only {units} {config.privacy_unit}s")
    elif config.audit + needed > len(rows):
        problems.add(f"{config.input}: {len(rows)} rows; the requested canaries need {config.audit + needed}")
    if config.condition == "title" and hosts.shape == "review" and any(not row.get("Review Title") for row in rows):
        problems.add(f"--condition title: {config.input} has rows without a Review Title")
    if any(not hosts.part(row).strip() for row in rows):
        problems.add(f"{config.input}: has rows whose {hosts.part_name} is empty; remove them")


def place_all(config: InjectConfig, rows: list[Row], hosts: Hosts) -> tuple[list[Row], list[KeyLine], Space]:
    """(output rows, key lines, the space of their secrets)."""
    rng = random.Random(config.seed)
    if config.condition == "title":
        rows = [row | {"condition": "title"} for row in rows]
    texts = [hosts.part(row) for row in rows]
    source = source_of(config, rows, hosts, texts, rng)
    return *place(rows, config, hosts, source, rng), source.space


def count(config: InjectConfig, rows: list[Row], written: list[Row], key: list[KeyLine], space: Space) -> Counts:
    """The manifest's `canaries`."""
    return {
        "secret": space.kind,
        "space": space.size,
        "placed": sum(line["kind"] in ("ladder", "share") for line in key),
        "held_out": sum(line["kind"] == "held_out" for line in key),
        "audit": config.audit,
        "audit_included": sum(line["kind"] == "audit" and line["included"] for line in key),
        "privacy_unit": config.privacy_unit,
        "rows_left_out": len(rows) - len(written),
        "rows_with_canary": len({index for line in key for index in line["rows"]}),
    }


def write(
    files: Publication,
    config: InjectConfig,
    settings: dict[str, Any],
    written: list[Row],
    key: list[KeyLine],
    counts: Counts,
    space: Space,
    hosts: Hosts,
) -> None:
    """Rows, key and manifest."""
    output, key_file = destinations(config)
    files.write_jsonl(output, written, permissions=0o600)
    header: dict[str, Any] = {
        "schema": SCHEMA,
        "secret": space.kind,
        "words": space.words,
        "privacy_unit": config.privacy_unit,
        "training": results.sha256(files.hidden(output)),
        "seed": config.seed,
        "canaries": len(key),
    }
    header |= {"whole": True} if hosts.renderer else {}
    if config.family != "template":
        header["family"] = config.family
    if config.family in TOKEN_FAMILIES:
        header["tokenizer"] = config.model
    if config.family == "model":
        header |= {name: settings[name] for name in ("generator", "generator_weights", "temperature")}
    files.write_jsonl(key_file, [header, *key], permissions=0o600)
    manifests.write_manifest(
        files,
        output,
        tag=f"{manifests.data_tag(config.input, manifests.read_manifest(config.input))}-canaries",
        script="canary/inject.py",
        argv=sys.argv,
        rows=len(written),
        source=[(config.input, counts["rows_left_out"] + len(written))],
        sampling={"seed": config.seed, "within": config.within, "condition": config.condition},
        settings=settings,
        more={"canaries": counts},
    )
