"""Agreement on word importance between models trained on different rows: rows, checks and files."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import json_files, locks, results, reviews
from common.problems import Problems, check_writable
from utility.arms import Row, check_seeds, draw_heldout, ratings, read_arms
from utility.config import ImportanceConfig

RECORD = "run_feature_importance.json"
FEWEST = 20  # minimum rows per arm


@dataclass(frozen=True)
class Plan:
    """Training rows of each seed and arm, vocabulary, and rows to measure on."""

    samples: dict[int, dict[str, list[Row]]]  # seed → arm → `size` rows
    size: int
    words: list[str]
    heldout: list[Row]
    inputs: list[str]


def run(config: ImportanceConfig) -> dict[str, Any]:
    """Measure, write feature_importance.json, and return its content."""
    target = Path(config.output_dir) / "feature_importance.json"
    with locks.output_folder(config.output_dir, config.dry_run, "feature_importance") as output:
        plan = prepare(config, target, Problems())
        if plan is None:
            return dict(json_files.read_json(target, "remove it"))
        if config.dry_run:
            print(f"would compare {config.num_seeds} draws of {plan.size} rows per arm and write {target}")
            return {}
        from utility.words import measure

        with results.Run(target.with_name(RECORD), config, plan.inputs, output=output) as record:
            content = measure(plan.samples, plan.words, plan.heldout)
            record.files.write_json(target, content)
    for arm, agreement in content["arms"].items():
        print(f"{arm:>12}  " + "  ".join(f"{name} {cell(value)}" for name, value in agreement["mean"].items()))
    print(f"results are in {target}")
    return content


def cell(value: float | None) -> str:
    """A value to three decimals; a dash for None."""
    return "–" if value is None else f"{value:.3f}"


def prepare(config: ImportanceConfig, target: Path, problems: Problems) -> Plan | None:
    """The plan of a run, or None if the results already exist. Problems raise one UserError."""
    check_writable(config.output_dir, problems)
    check_seeds(config, problems)
    arms, heldout, inputs = read_arms(config, ("real", "null", "reference"), problems)
    if shared := reviews.shared_rows(arms["real"], heldout):
        problems.add(f"--real {config.real}: {shared} of its rows are held-out rows; pass other rows")
    record, hashed = target.with_name(RECORD), [] if problems.lines else inputs
    finished = problems.absorb(results.finished, record, [target], config, hashed, config.overwrite)
    problems.check()
    if finished:
        return None
    arms = {arm: reviews.with_text(rows) for arm, rows in arms.items()}
    real = arms.pop("real")
    heldout = reviews.with_text(heldout)
    halves = {seed: reviews.halve(real, seed) for seed in range(config.seed, config.seed + config.num_seeds)}
    smallest = min(len(rows) for rows in (real, *arms.values(), *(half for pair in halves.values() for half in pair)))
    size = config.num_rows or smallest
    if size > smallest:
        problems.add(f"--num_rows {size}: there are only {smallest} rows (in an arm, or in half of --real)")
    if size < FEWEST:
        problems.add(f"{size} rows with text in an arm (or in half of --real); at least {FEWEST} are needed")
    measured = min(config.num_heldout, len(heldout))
    if measured < FEWEST:
        problems.add(f"{measured} held-out rows (with text, at most --num_heldout); at least {FEWEST} are needed")
    problems.check()
    heldout = draw_heldout(heldout, config)
    samples = {seed: draw(pair, arms, size, seed) for seed, pair in halves.items()}
    check_ratings(samples, problems)
    from utility.words import vocabulary  # imports scikit-learn: only once the files are checked

    words = problems.absorb(vocabulary, heldout, config.min_rows)
    problems.check()
    assert words
    return Plan(samples, size, words, heldout, inputs)


def draw(halves: tuple[list[Row], list[Row]], arms: dict[str, list[Row]], size: int, seed: int) -> dict[str, list[Row]]:
    """{'reference', 'real', each arm, 'null': `size` rows} of one seed."""
    rng = random.Random(seed)
    first, second = (half[:size] for half in halves)
    samples = {"reference": first, "real": second} | {arm: rng.sample(rows, size) for arm, rows in arms.items()}
    shuffled = [row["Rating"] for row in first]
    rng.shuffle(shuffled)
    samples["null"] = [row | {"Rating": rating} for row, rating in zip(first, shuffled)]
    return samples


def check_ratings(samples: dict[int, dict[str, list[Row]]], problems: Problems) -> None:
    """Add a problem for each arm that has a draw with only one rating, from which nothing can be learned."""
    for arm in next(iter(samples.values())):
        if arm == "null":  # it has the ratings of the reference
            continue
        constant = [seed for seed, draws in samples.items() if len(set(ratings(draws[arm]))) == 1]
        if constant:
            flag = "--real" if arm in ("reference", "real") else f"--synthetic {arm}"
            problems.add(
                f"{flag}: all {len(samples[constant[0]][arm])} rows drawn with seed {constant[0]} have the same rating "
                f"({arm}); rows of at least two ratings are needed"
            )
