#!/usr/bin/env python3
"""Fine-tune and measure a grid of settings: models × data × adapter types × learning rates × seeds.

python studies/sweep.py --sweep sweep.yaml --output sweep                                  # one cell after another
python studies/sweep.py --sweep sweep.yaml --output sweep --executor slurm --jobs 16 --slurm slurm_partition=gpu \\
    gpus_per_node=1 timeout_min=600

    models: [EleutherAI/pythia-1.4b]
    data: [data/enron.jsonl]
    peft_types: [lora, dora]
    learning_rates: [2.0e-6, 2.0e-4]
    seeds: [1, 2, 3]
    run_peft: {epochs: 2}             # flags of each script; `evaluate: false` leaves a step out
    mia: {attacks: [core]}
    launch: torchrun --nproc_per_node=8 --standalone         # before each script, if one process is not enough

Each cell is run_peft.py, then evaluate_purified.py, perplexity.py and mia.py on its last checkpoint. Finished cells are
kept, unfinished ones go on where they were, so rerun it after any interruption. --executor local or slurm uses submitit
(pip install submitit). In --output: a folder per cell, and results_sweep.jsonl with one line per finished cell and one
per setting: the mean over its seeds with a 95 % Student interval, which plot_results.py shows.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import cli, locks, publication, results
from common.problems import Problems, UserError, check_writable, one_line
from common.process import entry
from studies import grid

RESULTS = "results_sweep.jsonl"


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """cell: run this one alone (how the jobs of an executor start)."""

    sweep: str = ""
    output: str = "./sweep"
    executor: str = "here"
    jobs: int = 1
    slurm: tuple[str, ...] = ()
    cell: str | None = None
    seed: int = 3407
    dry_run: bool = False


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Fine-tune and measure a grid of settings.",
        "python studies/sweep.py --sweep sweep.yaml --output sweep --executor local --jobs 2",
        SweepConfig,
    )
    add = parser.add_argument
    add("--sweep", metavar="FILE", help="YAML or JSON: the grid, and flags of each step (default: none)")
    add("--output", "--output_dir", help="directory of all cells")
    add("--executor", choices=("here", "local", "slurm"), help="here: one after another; local, slurm: by submitit")
    add("--jobs", type=cli.positive_int, help="cells that may run at once (local, slurm)")
    add("--slurm", nargs="+", metavar="KEY=VALUE", help="parameters of submitit's executor")
    add("--cell", metavar="NAME", help="run this cell only, in this process")
    cli.add_dry_run(parser)
    add("--seed", type=cli.seed, help="recorded; the seeds of the runs are in the sweep")
    return parser


def run(config: SweepConfig) -> int:
    """Run what is left of the sweep; 0, or 1 if a cell failed."""
    problems = Problems()
    check_writable(config.output, problems, "--output")
    if not config.sweep:
        problems.add("--sweep: required")
    sweep = problems.absorb(grid.read, config.sweep) if config.sweep else None
    executor = problems.absorb(make_executor, config) if config.executor != "here" and not config.cell else None
    if sweep and config.cell and config.cell not in [cell.name for cell in sweep.cells]:
        problems.add(f"--cell {config.cell}: not in the sweep")
    problems.check()
    assert sweep is not None
    folder = Path(config.output).absolute()
    if config.cell:
        grid.run_cell(next(cell for cell in sweep.cells if cell.name == config.cell), sweep, folder)
        return 0
    with locks.output_folder(folder, config.dry_run, "sweep") as place:
        done = {cell: line for cell in sweep.cells if (line := grid.finished(cell, sweep, folder))}
        todo = [cell for cell in sweep.cells if cell not in done]
        print(f"{len(sweep.cells)} cells: {len(done)} finished, {len(todo)} to run")
        if config.dry_run:
            print("\n".join(cell.name for cell in todo))
            return 0
        failures: dict[str, str] = {}
        with results.Run(folder / "run_sweep.json", config, [config.sweep], output=place) as record:
            for cell, why in run_all(config, todo, sweep, folder, executor):
                if why:
                    failures[cell.name] = why
                    print(one_line(f"failed: {cell.name}: {why}"), file=sys.stderr, flush=True)
                    continue
                line = grid.finished(cell, sweep, folder)
                assert line is not None
                done[cell] = line
                print(f"[{len(done)}/{len(sweep.cells)}] {grid.said(line)}", flush=True)
                write(folder, [done[one] for one in sweep.cells if one in done])
            write(folder, [done[one] for one in sweep.cells if one in done])
            record["cells"] = {"all": len(sweep.cells), "finished": len(done), "failed": failures}
            if failures:
                record["error"] = f"{len(failures)} of {len(sweep.cells)} cells failed"
    print(f"results are in {folder / RESULTS}")
    return 1 if failures else 0


def write(folder: Path, lines: list[dict[str, Any]]) -> None:
    """results_sweep.jsonl: a line per finished cell, then the means over seeds."""
    made = [{"schema": results.SCHEMA, **line} for line in [*lines, *grid.means(lines)]]
    publication.write_jsonl(folder / RESULTS, made)


def make_executor(config: SweepConfig) -> Any:
    """submitit's executor; UserError if it is missing, or a parameter is unknown to it."""
    try:
        import submitit
    except ImportError:
        raise UserError(f"--executor {config.executor}: needs submitit; pip install submitit") from None
    parameters: dict[str, str | int] = {}
    for word in config.slurm:
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"--slurm {word}: expected KEY=VALUE")
        parameters[key] = int(value) if value.isdecimal() else value
    executor = submitit.AutoExecutor(folder=Path(config.output).absolute() / "jobs", cluster=config.executor)
    try:
        executor.update_parameters(**{"timeout_min": 60 * 24, **parameters})
    except (NameError, TypeError, ValueError, AssertionError) as error:
        raise UserError(f"--slurm: {' '.join(str(error).split())[:200]}") from None
    return executor


def run_all(
    config: SweepConfig, todo: Sequence[grid.Cell], sweep: grid.Sweep, folder: Path, executor: Any
) -> Iterator[tuple[grid.Cell, str | None]]:
    """Yield (cell, why it failed or None) of each cell as it ends."""
    if executor is None:
        for cell in todo:
            try:
                grid.run_cell(cell, sweep, folder)
                yield cell, None
            except (RuntimeError, OSError, LookupError) as error:
                yield cell, str(error)
        return
    import submitit

    waiting, running = list(todo), dict[grid.Cell, Any]()
    while waiting or running:
        while waiting and len(running) < config.jobs:
            cell = waiting.pop(0)
            words = [sys.executable, str(Path(__file__).resolve()), "--sweep", str(Path(config.sweep).absolute())]
            words += ["--output", str(folder), "--cell", cell.name]
            running[cell] = executor.submit(submitit.helpers.CommandFunction(words, verbose=False))
        time.sleep(0.5)
        for cell, job in list(running.items()):
            if job.done():
                del running[cell]
                ended = job.exception()
                known = grid.finished(cell, sweep, folder)
                yield cell, None if known else f"see {job.paths.stderr}" if ended else "ended without a result"


def main(argv: Sequence[str] | None = None) -> int:
    return run(make_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(entry(main))
