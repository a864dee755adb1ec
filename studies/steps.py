"""What the studies of quickstart.py share: steps, each one call of a room, and the table of extraction results."""

import contextlib
import io
import math
import shlex
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from auditing.config import AuditConfig
from common import cli, dataset, formats, json_files, models, provenance, publication, results, stats
from common.problems import AnyPath, Problems, UserError
from common.schema import HEADLINE_TEMPERATURE, outcomes_path
from extraction.config import AttackConfig, MeasureConfig
from mia.config import MiaConfig
from perplexity.config import PerplexityConfig
from studies.config import StudyConfig
from training.config import TrainConfig
from training.run import run as fine_tune

TEMPERATURE = HEADLINE_TEMPERATURE
Config = TypeVar("Config")
Outcome = TypeVar("Outcome")
Record = dict[str, Any]  # a line of a result file, or a row of a study's table


class Study(Protocol):
    """A module of studies/. EPOCHS, RATE, RANK: its defaults."""

    EPOCHS: int
    RATE: float
    RANK: int

    def check(self, config: StudyConfig) -> None: ...

    def inputs(self, config: StudyConfig) -> list[str]: ...

    def run(self, config: StudyConfig, out: Path, record: results.Run) -> str: ...


def check_rows(config: StudyConfig, problems: Problems) -> None:
    """Check --dataset and --model, for the two studies on mail."""
    rows = problems.absorb(formats.read_rows, config.dataset)
    if rows:
        problems.absorb(dataset.validate, config.dataset, rows, ("gt-name", "gt-email", "prompt", "continuation"))
    models.look_up(problems, config.model, config.revision)


def device_of(config: StudyConfig) -> dict[str, Any]:
    """Where and in which precision every step computes."""
    return {"dtype": config.dtype, "device_map": config.device_map}


def call(script: str, run: Callable[[Config], Outcome], config: Config) -> Outcome:
    """Print the command line that would do this step, and do it. A user error or a failed step ends the study.

    run: what the script calls with its configuration; an integer that it returns is an exit status.
    """
    print(f"\n$ python {script} {shlex.join(cli.words_of(config))}", flush=True)
    outcome = run(config)
    if isinstance(outcome, int) and outcome:
        raise RuntimeError(f"{Path(script).name} ended with status {outcome}")
    return outcome


def train(config: TrainConfig) -> Path:
    """Fine-tune and return the run directory. A finished run is kept."""
    return call("run_peft.py", fine_tune, config)


def with_dp(config: TrainConfig, epsilon: float | None, logical_batch_size: int) -> TrainConfig:
    """The same training under DP-SGD with this ε; None: with its batches, but neither noise nor clipping."""
    private = replace(config, dp=True, logical_batch_size=logical_batch_size)
    if epsilon is None:
        return replace(private, noise_multiplier=0.0, max_grad_norm=math.inf)
    return replace(private, target_epsilon=epsilon)


def input_hashes(words: Iterable[object]) -> dict[str, str | None]:
    """{word: SHA-256} of the files and local model weights among the words of a command line (path or name=path)."""
    hashes: dict[str, str | None] = {}
    for word in map(str, words):
        for path in (Path(word), Path(word.partition("=")[2] or word)):
            if path.is_file():
                hashes[word] = results.sha256(path)
            elif (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
                hashes[word] = provenance.weights_sha256(models.find_model(str(path)))
    return hashes


def build(script: str, run: Callable[[Any], object], config: Any) -> Path:
    """Build the data file config.output, unless the builder has finished it with the same inputs and settings."""
    output = Path(config.output)
    if output.exists():
        if would_keep(run, config):
            print(f"\n{output}: built before, kept")
            return output
        print(f"\n{output}: stale (it, its source files or weights changed); built again")
    call(script, run, replace(config, overwrite=output.exists()))
    return output


def would_keep(run: Callable[[Any], object], config: Any) -> bool:
    """Whether the builder considers its existing output finished: without --overwrite it rejects any other."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            run(replace(config, dry_run=True))
    except UserError:
        return False
    return True


def result_files(folder: Path) -> list[Path]:
    """The result files of `folder`, the newest measurement first."""
    files = [path for path in folder.glob("results_purified*.jsonl") if not path.stem.endswith("_rows")]
    return sorted(files, key=lambda path: (len(path.name), path.name), reverse=True)


def is_current(file: Path | None, model: AnyPath, data: AnyPath | None = None) -> bool:
    """Whether a result file exists and all its lines match the model's current weights (and the current data).

    A stale file is removed, so that its numbers cannot mix with new ones.
    """
    if file is None or not file.is_file():
        return False
    wanted: Record = {"model_sha256": provenance.weights_sha256(models.find_model(str(model)))}
    if data is not None:
        wanted["dataset_sha256"] = results.sha256(data)
    try:
        lines = formats.read_rows(file)
    except UserError:
        lines = []
    if lines and all(line.get(key) == value for line in lines for key, value in wanted.items()):
        return True
    print(f"\n{file}: damaged or stale (weights or dataset changed); measured again")
    file.unlink()
    return False


def measured(folder: Path) -> tuple[Record, list[Record]]:
    """(result line, outcome lines) of the newest measurement at TEMPERATURE in `folder`."""
    for file in result_files(folder):
        for line in reversed(json_files.read_jsonl(file)):
            if line["temperature"] == TEMPERATURE:
                outcomes = json_files.read_jsonl(outcomes_path(file))
                return line, [outcome for outcome in outcomes if outcome["temperature"] == TEMPERATURE]
    raise UserError(f"{folder}: has no measurement at temperature {TEMPERATURE}; choose another --output")


def attack(model: AnyPath, folder: Path, asked: AttackConfig) -> None:
    """The extraction attack, unless `folder` already has a finished result for these weights and rows."""
    if is_current(next(iter(result_files(folder)), None), model, asked.dataset):
        print(f"\n{folder}: measured before, kept")
        return
    from extraction.measure import run

    call("measure_purified.py", run, MeasureConfig(**vars(asked), model=str(model), output_dir=str(folder)))


def infer_membership(config: MiaConfig) -> list[Record]:
    """Membership inference on config.model; the lines of results_mia.jsonl, which are kept for the same weights."""
    assert config.output_dir and config.model
    file = Path(config.output_dir) / "results_mia.jsonl"
    if not is_current(file, config.model):
        from mia.measure import run

        call("mia/mia.py", run, config)
    return json_files.read_jsonl(file)


def share_passes(source: Path, target: Path) -> None:
    """Give a membership attack in `target` the passes that the one in `source` cached: what both need, such as those
    of a common base, is computed once."""
    from mia.measure import cache_folder

    if cache_folder(source).is_dir() and not cache_folder(target).exists():
        with publication.atomic_folder(cache_folder(target)) as copy:
            shutil.copytree(cache_folder(source), copy, dirs_exist_ok=True)


def audit(config: AuditConfig) -> Record:
    """audit.json of config.model on config.train, kept for the same weights and rows."""
    file = Path(config.output_dir) / "audit.json"
    if file.is_file():
        audited: Record = json_files.read_json(file, "remove it")
        weights = provenance.weights_sha256(models.find_model(config.model))
        measured_on = audited.get("data", {}).get("train", {}).get("sha256")
        if audited.get("model", {}).get("weights_sha256") == weights and measured_on == results.sha256(config.train):
            print(f"\n{file}: measured before, kept")
            return audited
        print(f"\n{file}: stale (weights or dataset changed); measured again")
    from auditing.run import run

    call("audit.py", run, config)
    return dict(json_files.read_json(file, "remove it"))


def measure_perplexity(config: PerplexityConfig) -> list[Record]:
    """The lines of perplexity.jsonl, in which models measured before are kept."""
    from perplexity.measure import run

    call("perplexity/perplexity.py", run, config)
    return json_files.read_jsonl(config.folder / "perplexity.jsonl")


def row_of(name: str, folder: Path, perplexity_mean: float | None) -> Record:
    """One row of the table from the newest measurement in `folder`."""
    line, outcomes = measured(folder)
    labels = [label for label in line["matches"] if label != "total"]
    return {
        "model": name,
        "matches": {label: line["matches"][label] for label in labels},
        "exact": {label: line["exact"][label] for label in labels},
        "no_pattern": sum(line["no_pattern"][label] or 0 for label in labels),
        "no_pattern_people": len({outcome["row"] for outcome in outcomes if outcome["no_pattern"]}),
        "expected": {label: line["probabilistic"][label]["1"]["expected"] for label in labels},
        "exact_rate_ci95": line["ci95"]["exact"]["total"],
        "perplexity": perplexity_mean,
        "rows": line["matches"]["total"],
        "mcnemar_exact": {label: line["baseline"]["exact"][label] for label in labels} if "baseline" in line else None,
    }


def share(row: Record) -> str:
    """Exact hits as a share of all prompts, with its interval."""
    low, high = row["exact_rate_ci95"]
    return f"{sum(row['exact'].values()) / (len(row['exact']) * row['rows']):.1%} ({low:.1%}–{high:.1%})"


def table(heads: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(map(str, heads)) + " |", "|" + "---|" * len(heads)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def joined(counts: Iterable[int]) -> str:
    return " / ".join(map(str, counts))


def paired(rows: list[Record]) -> list[str]:
    """One line per measurement: exact hits gained and lost against its baseline, by template, with McNemar's exact p
    and that p Holm-corrected over all of these tests."""
    tests = [(row, label, pair) for row in rows for label, pair in (row["mcnemar_exact"] or {}).items()]
    corrected = iter(stats.holm([pair["p"] for _, _, pair in tests]))
    entries: dict[str, list[str]] = {row["model"]: [] for row in rows}
    for row, label, pair in tests:
        p = f"p = {pair['p']:.2g}, corrected {next(corrected):.2g}"
        entries[row["model"]].append(f"{label}: +{pair['gained']} −{pair['lost']} ({p})")
    return [f"* {model}: {'; '.join(parts)}" for model, parts in entries.items()]
