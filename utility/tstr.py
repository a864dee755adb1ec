"""Train on synthetic, test on real (TSTR): fine-tune a base on each arm's rows, then rate held-out real reviews."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

from common import (
    dataset,
    distributed,
    earlier,
    limits,
    locks,
    models,
    provenance,
    publication,
    results,
    reviews,
)
from common.problems import Problems, check_writable
from common.stats import clopper_pearson
from utility.arms import Row, check_seeds, draw_heldout, ratings, read_arms
from utility.config import DownstreamConfig
from utility.metrics import SCORES, majority, paired, rating_scores, seed_summary
from utility.rating import instruction_rows, rate, review_room

RECORD = "run_downstream.json"
LINES = "results_utility.jsonl"
ROWS = "results_utility_rows.jsonl"
NEUTRAL = ("output_dir", "dry_run", "allow_overlap")  # flags that do not affect results
FILES = ("real", "heldout")  # flags, beside --synthetic, compared by file content, not by name
Train = Callable[[Path, int], Path]  # (file of instruction rows, seed) → the last checkpoint of that training
Line = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """The models to train and the rows to rate."""

    ref: models.ModelRef
    tokenizer: Any
    max_length: int  # tokens of a row, within the model's context
    arms: dict[str, list[Row]]  # rows with text; 'real' first
    size: int  # training rows per arm
    heldout: list[Row]
    blank: dict[str, int]  # dropped rows without text, of each arm and of 'heldout'
    inputs: list[str]


def run(config: DownstreamConfig, train: Train) -> list[Line]:
    """Train, rate, write; return the lines of results_utility.jsonl. Raises UserError before a model is loaded."""
    folder = Path(config.output_dir)
    with locks.output_folder(folder, config.dry_run, "downstream") as output:
        if not config.dry_run and data_folder(config).is_dir():
            locks.tidy([data_folder(config)])
        plan = prepare(config, Problems())
        sizes = f"{plan.size} rows per arm ({', '.join(plan.arms)}), {len(plan.heldout)} held-out rows"
        print(f"{sizes}, {config.num_seeds} seeds", flush=True)
        if config.dry_run:
            print(f"would write {LINES} in {folder}")
            return []
        world = distributed.start()
        with results.Run(folder / RECORD, config, plan.inputs, world, output) as record:
            record["dropped_blank"] = plan.blank
            lines, rows, record["steps"] = measure(config, plan, train, world.device)
            record.files.write_jsonl(folder / ROWS, rows)
            record.files.write_jsonl(folder / LINES, lines)
    say(lines)
    print(f"results are in {folder / LINES}")
    return lines


def data_folder(config: DownstreamConfig) -> Path:
    """The folder for the instruction rows of each arm and seed."""
    return Path(config.output_dir) / "data"


def say(lines: list[Line]) -> None:
    """Print the scores over all seeds, and the notes on single models."""
    for line in lines:
        if line["seed"] is None:
            mean = {name: line[name]["mean"] if isinstance(line[name], dict) else line[name] for name in SCORES}
            print(f"{line['arm']:>12}  " + "  ".join(f"{name} {value:.4f}" for name, value in mean.items()))
    for line in lines:
        for note in line.get("notes", ()):
            print(f"{line['arm']}, seed {line['seed']}: {note}; its scores are those of the base")


def prepare(config: DownstreamConfig, problems: Problems) -> Plan:
    """The plan of a run. Problems raise one UserError."""
    if int(os.environ.get("WORLD_SIZE", "1") or 1) > 1:
        problems.add("WORLD_SIZE: runs as one process; start it without torchrun")
    check_writable(config.output_dir, problems)
    check_seeds(config, problems)
    arms, heldout, inputs = read_arms(config, ("real", "base", "majority"), problems)
    ref = tokenizer = None
    if not models.is_adapter(config.model):
        ref, tokenizer = models.look_up(problems, config.model, config.revision)
    else:
        problems.add(f"--model {config.model}: is an adapter; merge it into its base first (merge_peft.py)")
    max_length = check_length(config, ref, tokenizer, problems) if ref and tokenizer else config.max_length
    problems.check()
    earlier.check(config, RECORD, LINES, inputs, problems, FILES, NEUTRAL)
    check_overlap(arms, heldout, config.allow_overlap, problems)
    blank = {arm: len(rows) - len(reviews.with_text(rows)) for arm, rows in [*arms.items(), ("heldout", heldout)]}
    arms = {arm: reviews.with_text(rows) for arm, rows in arms.items()}
    heldout = reviews.with_text(heldout)
    size = config.num_rows or min(map(len, arms.values()))
    for arm, rows in arms.items():
        if len(rows) < max(size, 1):
            problems.add(f"--num_rows {size}: {arm} has only {len(rows)} rows with text")
    if not heldout:
        problems.add(f"--heldout {config.heldout}: no row has text")
    problems.check()
    assert ref
    return Plan(ref, tokenizer, max_length, arms, size, draw_heldout(heldout, config), blank, inputs)


def check_length(config: DownstreamConfig, ref: models.ModelRef, tokenizer: Any, problems: Problems) -> int:
    """--max_length, limited to the model's context; it is a problem if that leaves no token for the review."""
    architecture = models.read_config(ref.base, ref.revision, "--model")
    max_length = min(config.max_length, limits.context_length(SimpleNamespace(config=architecture)))
    lacking = 1 - review_room(tokenizer, max_length)
    if lacking > 0:
        problems.add(
            f"--max_length {config.max_length}: no token is left for the review; at least {max_length + lacking} are "
            "needed, also in the model's context"
        )
    return max_length


def check_overlap(arms: dict[str, list[Row]], heldout: list[Row], allowed: bool, problems: Problems) -> None:
    """Add a problem if real training rows are held-out rows, or arms were generated from held-out rows' metadata."""
    keys = {reviews.source_key(row) for row in heldout if row.get("row_id") is not None}
    for arm, rows in arms.items():
        if arm == "real":
            if shared := reviews.shared_rows(rows, heldout):
                problems.add(f"--real: {shared} of its rows are held-out rows; pass other rows")
        elif not allowed and (shared := sum(reviews.source_key(row) in keys for row in rows)):
            problems.add(
                f"--synthetic {arm}: {shared} rows have the product and rating of held-out rows; hold out other rows, "
                "or pass --allow_overlap"
            )


def measure(config: DownstreamConfig, plan: Plan, train: Train, device: str) -> tuple[list[Line], list[Line], int]:
    """(result lines, one line per model and held-out row, optimizer steps of each training)."""
    trained = train_arms(config, plan, train)
    steps = {line["steps"] for line in trained.values()}
    if len(steps) != 1:
        raise RuntimeError(f"the arms took different numbers of optimizer steps: {trained}")
    heldout, n_cut = instruction_rows(plan.heldout, plan.tokenizer, plan.max_length)
    prompts = [dataset.instruction_prompt(row) for row in heldout]
    truth = ratings(plan.heldout)
    base = models.load_base(plan.ref, models.resolve_dtype(config.dtype, device), device, config.device_map)
    predicted: dict[tuple[str, int | None], list[int]] = {}
    lines = []
    for (arm, seed), line in trained.items():  # the real arm comes first for each seed
        predicted[arm, seed] = rate(base, line["checkpoint"], plan.tokenizer, prompts)
        against = None if arm == "real" else paired(truth, predicted["real", seed], predicted[arm, seed])
        more = {"n_cut": n_cut, "train_rows": plan.size, **line, "mcnemar_against_real": against}
        lines.append(result_line(arm, seed, truth, predicted[arm, seed]) | more)
    lines += [seed_summary(arm, [line for line in lines if line["arm"] == arm]) for arm in plan.arms]
    predicted["base", None] = rate(base, None, plan.tokenizer, prompts)
    predicted["majority", None] = [majority(ratings(plan.arms["real"]))] * len(truth)
    lines += [result_line(arm, None, truth, predicted[arm, None]) | {"n_cut": n_cut} for arm in ("base", "majority")]
    rows = [
        {"arm": arm, "seed": seed, "row_id": row.get("row_id"), "truth": right, "rating": rating}
        for (arm, seed), stars in predicted.items()
        for row, right, rating in zip(plan.heldout, truth, stars)
    ]
    return lines, rows, steps.pop()


def train_arms(config: DownstreamConfig, plan: Plan, train: Train) -> dict[tuple[str, int], Line]:
    """{(arm, seed): checkpoint, optimizer steps, truncated reviews, relative_change and notes of its training}."""
    trained = {}
    for seed in range(config.seed, config.seed + config.num_seeds):
        for arm, rows in plan.arms.items():
            chosen = Random(f"{seed} {arm}").sample(rows, plan.size)
            instructions, n_cut = instruction_rows(chosen, plan.tokenizer, plan.max_length)
            file = data_folder(config) / f"{arm}-seed{seed}.jsonl"
            publication.write_jsonl(file, instructions, permissions=0o600)
            checkpoint = train(file, seed)
            record = provenance.training_record(checkpoint) or {}
            trained[arm, seed] = {
                "checkpoint": str(checkpoint),
                "steps": int(checkpoint.name.rpartition("-")[2]),
                "train_cut": n_cut,
                "relative_change": record.get("relative_change"),
                "notes": record.get("notes") or [],
            }
    return trained


def result_line(arm: str, seed: int | None, truth: list[int], predicted: list[int]) -> Line:
    """Scores of one model, with the counts behind them."""
    hits = sum(map(int.__eq__, truth, predicted))
    scores = rating_scores(truth, predicted) | {"accuracy_ci95": clopper_pearson(hits, len(truth))}
    return {"arm": arm, "seed": seed, **scores, "n_requested": len(truth), "n_scored": len(truth), "n_dropped": 0}
