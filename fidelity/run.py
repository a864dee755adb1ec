"""Entry point of this room: does all checks, and imports the measuring code only once the samples are known."""

import os
from pathlib import Path
from typing import Any

from common import distributed, json_files, locks, results, reviews
from common.problems import Problems, check_writable
from fidelity.config import FidelityConfig
from fidelity.embedder import check_embedder, check_mauve
from fidelity.samples import Row, Samples, choose

RECORD = "run_fidelity.json"
RESULTS = "results_fidelity.json"
TABLE = "fidelity.md"
FEWEST = 40  # minimum rows per sample: two per jackknife group


def run(config: FidelityConfig) -> dict[str, Any]:
    """Compare, write all files, return the content of results_fidelity.json. UserError before a model is loaded."""
    folder = Path(config.output_dir)
    with locks.output_folder(folder, config.dry_run, "fidelity") as output:
        prepared = prepare(config, folder, Problems())
        if prepared is None:
            return dict(json_files.read_json(folder / RESULTS, "remove it"))
        chosen, train = prepared
        arms = ", ".join(chosen.arms)
        print(f"{chosen.size} rows per sample; {arms} against real; paired: {chosen.paired}", flush=True)
        if config.dry_run:
            print(f"would write {RESULTS}, {TABLE} and figures in {folder}")
            return {}
        from fidelity.measure import Stopwatch, draw, measure
        from fidelity.report import table

        world = distributed.start() if config.embeds else None
        with results.Run(folder / RECORD, config, config.input_files, world, output) as record:
            watch = Stopwatch()
            content, samples, vectors = measure(config, chosen, train, world.device if world else "cpu", watch)
            if "figures" not in config.without:
                draw(record.files, folder, samples, vectors)
                watch.lap("figures")
            with record.files.open(folder / TABLE) as file:
                file.write(table(content["comparisons"]))
            record.files.write_json(folder / RESULTS, content)
            record["stage_seconds"] = watch.seconds
        print(table(content["comparisons"]))
        print(f"results are in {folder / RESULTS}")
        return content


def prepare(config: FidelityConfig, folder: Path, problems: Problems) -> tuple[Samples, list[Row] | None] | None:
    """(samples, training rows with text or None); None if the results already exist. Problems raise one UserError."""
    if int(os.environ.get("WORLD_SIZE", "1") or 1) > 1:
        problems.add("WORLD_SIZE: runs as one process; start it without torchrun")
    check_writable(folder, problems)
    if config.pool_rows < FEWEST:
        problems.add(f"--pool_rows {config.pool_rows}: at least {FEWEST} are needed")
    read = reviews.Files(config.columns, problems)
    real = read.read(config.real)
    files = reviews.split_arms(config.synthetic, ("real", "against"), problems)
    arms = {arm: read.read(file, reviews.GENERATED) or [] for arm, file in files.items()}
    train = read.read(config.train) if config.train else None
    read.check()
    if real and train:
        train = check_train(config, real, train, problems)
    if config.embeds:
        problems.absorb(check_embedder, config, bool(problems.lines))
    if config.takes_mauve:
        problems.absorb(check_mauve)
    inputs = [] if problems.lines else config.input_files
    outputs = [folder / RESULTS, folder / TABLE]
    finished = problems.absorb(results.finished, folder / RECORD, outputs, config, inputs, config.overwrite)
    problems.check()
    if finished:
        return None
    assert real
    chosen = choose(real, arms, config.num_rows, config.seed)
    if chosen.size < FEWEST:
        reason = " (rows generated from the metadata of one half of --real)" if chosen.paired else ""
        problems.add(f"{chosen.smallest}: only {chosen.size} usable rows{reason}; at least {FEWEST} are needed")
    problems.check()
    return chosen, train


def check_train(config: FidelityConfig, real: list[Row], train: list[Row], problems: Problems) -> list[Row]:
    """The training rows with text; it is a problem if they are too few or overlap with --real."""
    shared = reviews.shared_rows(real, train)
    if shared:
        problems.add(f"--real {config.real}: {shared} of its rows are in --train {config.train}; pass held-out rows")
    train = reviews.with_text(train)
    if len(train) < FEWEST:
        problems.add(f"--train {config.train}: only {len(train)} rows with text; at least {FEWEST} are needed")
    return train
