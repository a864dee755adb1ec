"""What to generate: rows, training rows, model and settings, all determined before the model is loaded."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import dataset, distributed, manifests, models, provenance, results, reviews, trained, vllm_engine
from common.problems import Problems, check_output_file
from data import generation
from data.synthetic.config import SyntheticConfig

RESUMED = ("arm", "num", "condition", "temperature", "top_k", "max_new_tokens", "seed", "batch_size")

Row = dict[str, Any]
Settings = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """privacy: what training the model spent; unit: its privacy unit; source: the manifest's entry for --training;
    settings: what a resumed run must have in common with the killed one; file_settings: these and what else decides the
    content of the finished file, None if it cannot be told whether a file was written with them."""

    rows: list[Row]
    training: list[Row]
    ref: models.ModelRef
    tokenizer: Any
    privacy: dict[str, Any] | None
    unit: str
    source: dict[str, Any] | None
    settings: Settings
    file_settings: Settings | None
    finished: bool


def prepare(config: SyntheticConfig) -> Task:
    """Read and check every argument and file. UserError with all problems."""
    problems = Problems()
    distributed.check_environment(problems, config.device_map, config.model_parallel)
    check_flags(config, problems)
    rows: list[Row] = problems.absorb(reviews.read_reviews, config.input) or []
    training: list[Row] = (problems.absorb(reviews.read_reviews, config.training) or []) if config.training else []
    check_rows(config, rows, training, problems)
    ref, tokenizer = models.look_up(problems, config.model, config.revision, config.base_model)
    vllm_engine.check(config, problems, ref, (config.temperature,))
    privacy = provenance.privacy(ref) if ref else None
    unit = (privacy or {}).get("unit", "record")
    if config.samples_metadata and unit == "user" and any(dataset.user_of(row) is None for row in training):
        problems.add(f"{config.training}: rows without user_id; the model's privacy unit is the user")
    source: dict[str, Any] | None = None
    if ref and training:
        source = problems.absorb(training_source, str(config.training), len(training), ref)
    settings: Settings = {}
    file_settings: Settings | None = None
    if ref and not problems.lines:
        settings = settings_of(config, ref)
        if source is None or source["sha256"]:
            file_settings = settings | settings_of_file(config, source)
    finished = problems.absorb(manifests.finished, [("--output", config.output_file)], file_settings, config.overwrite)
    problems.check()
    assert ref
    return Task(rows, training, ref, tokenizer, privacy, unit, source, settings, file_settings, bool(finished))


def check_flags(config: SyntheticConfig, problems: Problems) -> None:
    """Add problems for invalid or incompatible flags."""
    if not reviews.ARM.fullmatch(config.arm):
        problems.add(f"--arm {config.arm}: letters, digits, _ and - only, a letter first")
    inputs = (config.input, config.training, config.histogram)
    check_output_file(config.output_file, ".jsonl", problems, inputs)
    if config.samples_metadata != (config.metadata_epsilon is not None):
        problems.add("--metadata_epsilon: is for --condition sampled, which needs it")
    if config.samples_metadata and not config.training:
        problems.add("--condition sampled: give the rows that the histogram counts as --training")
    if "Rating" not in config.metadata_fields:
        problems.add("--metadata_fields: Rating must be among them, every review has one")
    if config.metadata_delta is not None and config.metadata_delta >= 1:
        problems.add(f"--metadata_delta {config.metadata_delta:g}: must be below 1")
    if config.metadata_epsilon == math.inf:
        problems.add("--metadata_epsilon inf: must be finite")


def check_rows(config: SyntheticConfig, rows: list[Row], training: list[Row], problems: Problems) -> None:
    """Add problems for rows whose metadata cannot, or must not, be used in prompts."""
    if config.condition == "title" and rows and any(not row.get("Review Title") for row in rows):
        count = sum(not row.get("Review Title") for row in rows)
        problems.add(f"{config.input}: {count} rows have no Review Title, which --condition title puts into the prompt")
    if config.samples_metadata and len({row.get("System prompt") for row in rows}) > 1:
        problems.add(f"{config.input}: the System prompt differs between rows; --condition sampled needs one for all")
    if not config.samples_metadata and (shared := reviews.shared_rows(rows, training)):
        problems.add(
            f"{config.input}: {shared} of its rows are training rows, whose metadata would appear unprotected in the "
            "output; name other rows, or draw metadata with --condition sampled"
        )


def training_source(path: str, rows: int, ref: models.ModelRef) -> dict[str, Any]:
    """The manifest's entry for --training. A plain hash would confirm a guessed copy of a private model's training file
    to whoever reads the manifest: there it is salted as in run.json (the salt is in the run's trained_rows.jsonl), or
    None if that file is missing."""
    digest = results.sha256(path)
    if not provenance.privacy(ref):
        return {"path": path, "sha256": digest, "rows": rows}
    checkpoint = ref.adapter or ref.base
    trained_rows = trained.read(checkpoint) if Path(checkpoint).is_dir() else None
    salt = trained_rows.salt if trained_rows else ""
    return {"path": path, "sha256": trained.salted(digest, salt) if salt else None, "rows": rows, "salted": True}


def settings_of(config: SyntheticConfig, ref: models.ModelRef) -> Settings:
    """Settings that must match for a killed run to be resumed."""
    settings = generation.settings_of(config, ref, RESUMED, input=results.sha256(config.input))
    if config.samples_metadata:
        settings |= {"metadata_epsilon": config.metadata_epsilon, "metadata_fields": list(config.metadata_fields)}
    return settings


def settings_of_file(config: SyntheticConfig, source: dict[str, Any] | None) -> Settings:
    """What else decides the content of the finished file and its manifest."""
    drawn = config.samples_metadata and config.histogram_file.is_file()
    return {
        "filter": config.filter,
        "metadata_delta": config.metadata_delta,
        "training": source and source["sha256"],
        "histogram": results.sha256(config.histogram_file) if drawn else None,
    }
