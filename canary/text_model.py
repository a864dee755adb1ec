"""The run of canary/auxiliary.py: train on each arm's generated rows, score the canaries, write the result files."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from canary.config import AuxiliaryConfig
from canary.key import KeyLine, read_key
from canary.likelihoods import sentence_logps
from canary.lines import Line, is_constant, text_lines, text_signals
from canary.measurement import Outcome, canary_rows
from canary.report import report
from canary.task import Task, check_unit, read_texts
from common import (
    adapters,
    dataset,
    distributed,
    earlier,
    locks,
    models,
    provenance,
    publication,
    results,
    reviews,
    stats,
    trained,
)
from common.distributed import World
from common.problems import Problems, check_writable

RESULTS, ROWS, RECORD = "results_auxiliary.jsonl", "results_auxiliary_rows.jsonl", "run_auxiliary.json"
HEADLINE, SECRET = "auxiliary", "auxiliary, secret"
FPR = 0.01
NEUTRAL = ("output_dir", "dry_run")  # flags that do not affect results
FILES = ("canaries",)  # flags, beside --synthetic, compared by file content, not by name
Train = Callable[[Path], Path]  # file of rows → the last checkpoint of that training


@dataclass(frozen=True)
class Plan:
    """What to train on and what to score. rows: of each arm, those with text; blank: the number of others."""

    task: Task
    ref: models.ModelRef
    tokenizer: Any
    rows: dict[str, list[dict[str, str]]]
    blank: dict[str, int]


def run(config: AuxiliaryConfig, train: Train) -> Outcome:
    """Train, score, write. UserError before a model is loaded."""
    folder = Path(config.output_dir)
    with locks.output_folder(folder, config.dry_run, "auxiliary") as output:
        if not config.dry_run and (folder / "data").is_dir():
            locks.tidy([folder / "data"])
        plan = prepare(config, Problems())
        sizes = ", ".join(f"{arm} {len(rows)}" for arm, rows in plan.rows.items())
        print(f"{len(plan.task.audited)} audit canaries; rows to train on: {sizes}", flush=True)
        if config.dry_run:
            print(f"would write {RESULTS} in {folder}")
            return {"lines": [], "violations": []}
        world = distributed.start()
        with results.Run(folder / RECORD, config, plan.task.inputs, world, output, weights=plan.task.weights) as record:
            lines, rows = measure(config, plan, train, world)
            record.files.write_jsonl(folder / ROWS, rows, permissions=0o600)
            record.files.write_jsonl(folder / RESULTS, [{"schema": results.SCHEMA, **line} for line in lines])
            over = [line for line in lines if line.get("headline") and line["above_upper"]["99.9"]]
            if over:
                record["error"] = f"{len(over)} lower bounds of ε exceed the accountant's at 99.9 %"
    report(lines)
    print(f"{len(lines)} lines in {folder / RESULTS}")
    return {"lines": lines, "violations": over}


def prepare(config: AuxiliaryConfig, problems: Problems) -> Plan:
    """Read and check everything. UserError with all problems."""
    if int(os.environ.get("WORLD_SIZE", "1") or 1) > 1:
        problems.add("WORLD_SIZE: runs as one process; start it without torchrun")
    check_writable(config.output_dir, problems)
    header, canaries = problems.absorb(read_key, config.canaries) or (None, [])
    files = reviews.split_arms(config.synthetic, (), problems)
    read = {arm: problems.absorb(reviews.read_reviews, file, reviews.GENERATED) or [] for arm, file in files.items()}
    ref = tokenizer = None
    if models.is_adapter(config.model):
        problems.add(f"--model {config.model}: is an adapter; give a model that has not seen the private rows")
    else:
        ref, tokenizer = models.look_up(problems, config.model, config.revision)
    if header and problems.absorb(trained.trained_on, config.model, header.get("training") or ""):
        problems.add(
            f"--model {config.model}: was trained on the file that {config.canaries} belongs to; give a model that has "
            "not seen the private rows"
        )
    texts = {
        arm: read_texts(config, f"{arm}={file}", file, read[arm], None, header, problems) for arm, file in files.items()
    }
    if header and not any(canary["kind"] == "audit" for canary in canaries):
        problems.add(f"--canaries {config.canaries}: has no audit canaries; inject with --audit")
    elif header:
        check_unit(config, header, {arm: text.privacy for arm, text in texts.items()}, problems)
    rows = {arm: training_rows(items) for arm, items in read.items()}
    for arm, items in rows.items():
        if read[arm] and not items:
            problems.add(f"--synthetic {arm}={files[arm]}: no row has text")
    inputs = [config.canaries, *files.values()] if not problems.lines else []
    if inputs:
        earlier.check(config, RECORD, RESULTS, inputs, problems, FILES, NEUTRAL)
    problems.check()
    assert header and ref
    weights = {"--model": provenance.weights_sha256(ref)}
    task = Task(header, canaries, {}, texts, None, inputs, weights, finished=False)
    return Plan(task, ref, tokenizer, rows, {arm: len(read[arm]) - len(rows[arm]) for arm in rows})


def training_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """The generated reviews that are not blank, each after the prompt of its metadata, as a review is trained on."""
    return [
        {"prompt": dataset.review_prompt(row), "completion": f" {reviews.text_of(row)}"}
        for row in reviews.with_text(list(rows))
    ]


def measure(config: AuxiliaryConfig, plan: Plan, train: Train, world: World) -> tuple[list[Line], list[Line]]:
    """(result lines, lines per canary) of all arms."""
    folder = Path(config.output_dir)
    chosen = {key: value for key, value in vars(config).items() if key not in (*NEUTRAL, *FILES, earlier.ARMS)}
    trained_on: dict[str, Path] = {}
    for arm, items in plan.rows.items():
        file = folder / "data" / f"{arm}.jsonl"
        publication.write_jsonl(file, items, permissions=0o600)
        trained_on[arm] = train(file)
    task, most = plan.task, models.context_of(plan.ref)
    parts = {HEADLINE: task.canaries, SECRET: [secret_alone(canary) for canary in task.canaries]}
    base = models.load_base(plan.ref, models.resolve_dtype(config.dtype, world.device), world.device, config.device_map)

    def score(model: Any) -> dict[str, list[float]]:
        return {
            name: sentence_logps(model, plan.tokenizer, canaries, most, world, task.whole)["whole"]
            for name, canaries in parts.items()
        }

    before = score(base)
    lines: list[Line] = []
    rows: list[Line] = []
    for arm, adapter in trained_on.items():
        with adapters.adapted(base, str(adapter)) as (model, _):
            after = score(model)
        signals = {name: [now - then for now, then in zip(after[name], before[name], strict=True)] for name in parts}
        signals |= text_signals(task.canaries, task.texts[arm].texts)
        known = provenance.training_record(adapter) or {}
        kept = {key: known.get(key) for key in ("steps", "relative_change", "notes")}
        training = {"rows": len(plan.rows[arm]), "rows_dropped": plan.blank[arm], **kept}
        for line in text_lines(task, arm, signals):
            if line["measure"] == "audit_text":
                line |= {"headline": line["signal"] == HEADLINE, **operating_point(task, arm, signals[line["signal"]])}
            lines.append(line | {"training": training, "settings": chosen, "seed": config.seed})
        values = [dict(zip(signals, scores)) for scores in zip(*signals.values())]
        rows += canary_rows(arm, "text", task.canaries, values)
    return lines, rows


def secret_alone(canary: KeyLine) -> KeyLine:
    """The canary with its secret as its sentence, and what is before it as context."""
    return {**canary, "context": canary["context"] + canary["before"], "sentence": canary["secret"]}


def operating_point(task: Task, arm: str, values: Sequence[float]) -> Line:
    """{tpr_at_fpr}: of the audit canaries that `audit_line` keeps; null where the signal gives no AUC."""
    seen = task.texts[arm].seen
    scored = [
        (value, canary["included"])
        for value, canary in zip(values, task.canaries, strict=True)
        if canary["kind"] == "audit" and (seen is None or seen.fits(canary))
    ]
    members = [value for value, inside in scored if inside]
    others = [value for value, inside in scored if not inside]
    if not members or not others or is_constant([value for value, _ in scored]):
        return {"tpr_at_fpr": None}
    return {"tpr_at_fpr": tpr_at(members, others)}


def tpr_at(members: Sequence[float], others: Sequence[float], level: float = FPR) -> Line:
    """Share of the members above the highest threshold that at most ⌊level · n⌋ of the others exceed.

    tpr_ci: 95 % Clopper–Pearson with the threshold held fixed.
    """
    most = math.floor(level * len(others))
    threshold = sorted(others, reverse=True)[most]
    true, false = (sum(value > threshold for value in group) for group in (members, others))
    return {
        "level": level,
        "tpr": true / len(members),
        "tpr_ci": stats.clopper_pearson(true, len(members)),
        "false_positives": false,
        "members": len(members),
        "nonmembers": len(others),
    }
