"""The run of data/amazon/prepare.py: fill the database, split the users, write the three files and their manifests."""

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import locks, manifests, publication, results
from common.problems import UserError
from data.amazon.config import SPLITS, PrepareConfig
from data.amazon.database import REASONS, connect, keep_rows, load_inputs
from data.amazon.split import assign, stratification, write_split
from data.amazon.task import Task, check

if TYPE_CHECKING:
    import duckdb


def run(config: PrepareConfig) -> dict[str, Any]:
    """Build the three files; return the counts, which are also printed and written to run_prepare.json; {} if they are
    there already."""
    started = time.monotonic()
    outputs = config.output_files.values()
    with locks.output_file(*outputs, dry_run=config.dry_run) as target:
        task = check(config)
        if task.finished:
            manifests.say_finished(*outputs)
            return {}
        if config.dry_run:
            print(f"would read {config.reviews} and {config.meta} and write {', '.join(map(str, outputs))}")
            return {}
        return build(config, task, target, started)


def build(config: PrepareConfig, task: Task, target: locks.Output, started: float) -> dict[str, Any]:
    """Fill the database and write the files; the counts and the numbers of each split."""
    import duckdb

    folder, outputs = Path(config.output_dir), config.output_files
    inputs = [Path(config.reviews), Path(config.meta)]
    record = results.Run(folder / "run_prepare.json", config, inputs=inputs, output=target)
    record["packages"]["duckdb"] = duckdb.__version__
    with (
        enough_memory(config),
        publication.temporary_folder(folder, "prepare") as work,
        connect(Path(work), config) as connection,
    ):
        counts, lacking, splits = plan(connection, config)
        with record:  # opened only now, so that rejected inputs do not replace the record of existing outputs
            for split, path in outputs.items():
                with record.files.open(path, "wb", 0o600) as file:
                    assert write_split(connection, split, file) == splits[split]["rows"], split
            source = [(inputs[0], counts["review lines"]), (inputs[1], counts["product lines"])]
            sampling = {"seed": config.seed, "split": "whole users in the order of a seeded hash"}
            for split, path in outputs.items():
                manifests.write_manifest(
                    record.files,
                    path,
                    tag=f"amazon-{split}",
                    script="data/amazon/prepare.py",
                    argv=sys.argv,
                    rows=splits[split]["rows"],
                    source=source,
                    sampling={**sampling, "users": splits[split]["users"]},
                    settings=task.settings,
                )
            speed = round(counts["review lines"] / (time.monotonic() - started), 1)
            result: dict[str, Any] = {**counts, "lacking": dict(zip(SPLITS, lacking)), "reviews_per_s": speed}
            result["peak_bytes"] = results.peak_memory()["cpu_bytes"]
            record["counts"] = result
            record["stratification"] = splits
    report(result, splits, config)
    return {**result, "splits": splits}


@contextlib.contextmanager
def enough_memory(config: PrepareConfig) -> Iterator[None]:
    """Raise a UserError if DuckDB needs more than --memory_limit within the block."""
    import duckdb

    try:
        yield
    except duckdb.OutOfMemoryException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--memory_limit {config.memory_limit}: not enough ({reason}); increase it") from None


def plan(
    connection: "duckdb.DuckDBPyConnection", config: PrepareConfig
) -> tuple[dict[str, int], list[int], dict[str, dict[str, Any]]]:
    """(counts, rows missing in train and test, `stratification`); UserError if the inputs cannot fill the files."""
    counts = load_inputs(connection, config)
    counts |= keep_rows(connection)
    if counts["rows"] < config.train + config.test:
        raise UserError(
            f"--train {config.train} --test {config.test}: only {counts['rows']} of {counts['review lines']} "
            f"reviews are left after cleaning; request fewer"
        )
    lacking = assign(connection, [config.train, config.test])
    splits = stratification(connection)
    if not splits["train"]["rows"]:
        raise UserError(
            f"--train {config.train}: each of the {splits['all']['users']} remaining users has more reviews than "
            "that, and users are not split; increase it, or pass a file with more users"
        )
    return counts, lacking, splits


def report(result: dict[str, Any], splits: dict[str, dict[str, Any]], config: PrepareConfig) -> None:
    """Print the counts and the numbers of each split."""

    def line(key: str, words: str) -> None:
        print(f"{result[key]:>12,}  {words}")

    line("review lines", f"reviews in {config.reviews}")
    for reason in (*REASONS, "without their product", "duplicates"):
        line(reason, f"dropped: {reason}")
    line("rows", "rows")
    line("products", f"products in {result['product lines']:,} lines ({result['broken product lines']:,} broken)")
    if "broken categories" in result:
        line("broken categories", "categories left out: not text")
    ratings = sorted(splits["all"]["ratings"])
    print(
        f"{'':>12} {'rows':>11} {'users':>11}" + "".join(f" {f'{rating} star':>7}" for rating in ratings) + "  off by"
    )
    for split, numbers in splits.items():
        shares = "".join(f" {numbers['ratings'].get(r, 0) / max(1, numbers['rows']):>7.2%}" for r in ratings)
        deviation = f"{numbers['largest_deviation_points']:>5.2f} points" if split != "all" else ""
        print(f"{split:>12} {numbers['rows']:>11,} {numbers['users']:>11,}{shares}  {deviation}")
    for split, missing in result["lacking"].items():
        if missing:
            print(f"{split} is {missing:,} rows short: no remaining user has so few rows, and users are not split")
    print(f"{result['reviews_per_s']:,.0f} reviews/s, peak memory {result['peak_bytes'] / 1e6:,.0f} MB")
    print(f"rows are in {config.output_dir}")
