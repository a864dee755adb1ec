"""Measure models one after another, loading each base once and updating both result files after each model."""

import hashlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import (
    dataset,
    distributed,
    formats,
    limits,
    locks,
    manifests,
    models,
    provenance,
    results,
    sources,
    tokenization,
)
from common.checkpoints import BaseLoader, by_base, find_checkpoints, for_each, look_up_all, natural_key
from common.distributed import progress_bar
from common.problems import AnyPath, Problems, check_writable, report_failures
from common.scoring import join, score
from perplexity.config import PerplexityConfig
from perplexity.metrics import describe

if TYPE_CHECKING:
    from common.scoring import Piece

SMALLEST_FILE = 3  # rows

Line = dict[str, Any]  # of perplexity.jsonl, or of the data file
Usable = tuple[str, models.ModelRef, Any]  # (name, model, tokenizer or None)

# Two lines that agree in these are the same measurement; model_sha256 identifies a retrained checkpoint.
SETTINGS = (
    "checkpoint",
    "model_sha256",
    "base_model",
    "revision",
    "dataset_sha256",
    "chat_template_sha256",
    "rows",
    "dtype",
    "seed",
)


def text_line(line: Line, form: str = "") -> str:
    """The line of perplexity.txt for a line of perplexity.jsonl. form: of the number; by default every digit."""
    mean = "null" if line["mean"] is None else format(line["mean"], form)
    return f"model path: {line['model']}; mean perplexity: {mean}"


def same(line: Line, other: Line, but: tuple[str, ...] = ()) -> bool:
    """Whether two lines of perplexity.jsonl agree in SETTINGS (except those in `but`)."""
    return all(line.get(key) == other.get(key) for key in SETTINGS if key not in but)


def choose_rows(config: PerplexityConfig, problems: Problems) -> tuple[list[int], Sequence[Line]]:
    """(indices of the rows to score, all rows); problems with the file are added to `problems`."""
    rows = problems.absorb(formats.open_rows, config.dataset, config.columns)
    if rows is None:
        return [], []
    if len(rows) < SMALLEST_FILE:
        problems.add(f"{config.dataset}: {len(rows)} rows; at least {SMALLEST_FILE} are needed")
        return [], []
    if config.num_rows and config.num_rows > len(rows):
        problems.add(f"--num_rows {config.num_rows}: {config.dataset} has only {len(rows)} rows")
    manifest = problems.absorb(manifests.read_manifest, config.dataset)
    if problems.absorb(dataset.validate, config.dataset, rows) is None:
        return [], []
    chosen = list(range(config.num_rows)) if config.num_rows else dataset.split(rows, manifest).head
    if not chosen:
        problems.add(f"{config.dataset}: no row belongs to the evaluation head; pass --num_rows")
    return [index for index in chosen if index < len(rows)], rows


def find_models(config: PerplexityConfig, problems: Problems) -> tuple[list[Usable], dict[str, str]]:
    """([(name, ModelRef, tokenizer)], {path: why it cannot be measured}), from files only.

    It is a problem if --model cannot be measured, or if none of the checkpoints can.
    """
    names: dict[AnyPath, str] = {}
    if config.model:
        names = {config.model: config.model}
    elif not Path(config.dir).is_dir():
        problems.add(f"--dir {config.dir}: no such directory; pass one with checkpoint-* below it, or --model")
        return [], {}
    else:
        names = {path: path.relative_to(config.dir).as_posix() for path in find_checkpoints(config.dir)}
        if not names:
            problems.add(f"--dir {config.dir}: no checkpoint-* directory below it; pass --model for a single model")
    flag = "--model" if config.model else "--dir"
    usable, unusable = look_up_all(problems, names, config.revision, config.base_model, flag, config.quantization)
    return [(names[path], ref, tokenizer) for path, ref, tokenizer in usable], unusable


def tokenize(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of each text after a start token (BOS, else EOS), which is not doubled if the text begins with it."""
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
    return [ids if ids[:1] == [start] else [start, *ids] for ids in encoded]


def measure(
    loader: BaseLoader, ref: models.ModelRef, ids: list[list[int]], token_budget: int
) -> tuple[list["Piece"], int, float | None]:
    """(this rank's part of the log-probabilities, context length, ‖ΔW‖/‖W‖ of a merged adapter)."""
    world = loader.world
    with loader.adapted(ref) as (model, change):
        with progress_bar(sum(len(tokens) - 1 for tokens in ids) // world.size, "tokens", world) as bar:
            part = score(model, ids, token_budget=token_budget, world=world, progress=bar.update)
        return part, limits.context_length(model), change


def write(output: locks.Output, folder: Path, lines: list[Line], current: list[Line]) -> None:
    """Rewrite both result files: perplexity.jsonl with every line, perplexity.txt with the last one of each model path,
    preferring those in `current` over older ones with other settings."""
    latest = {line["model"]: line for line in [*lines, *current]}
    with output.publication() as files, files.open(folder / "perplexity.txt") as file:
        files.write_jsonl(folder / "perplexity.jsonl", lines)
        file.writelines(text_line(latest[path]) + "\n" for path in sorted(latest, key=natural_key))


@dataclass(frozen=True)
class Target:
    """A model to measure and the texts of the rows, possibly rendered with its tokenizer's chat template.

    template_sha256: hash of that template, None for rows without messages.
    """

    name: str
    ref: models.ModelRef
    tokenizer: Any
    texts: list[str]
    template_sha256: str | None


@dataclass(frozen=True)
class Prepared:
    """earlier: result lines; chosen: indices of the rows; written: the original text of each of them; failures: {path:
    why it cannot be measured}."""

    earlier: list[Line]
    chosen: list[int]
    written: list[str]
    targets: list[Target]
    failures: dict[str, str]


def make_targets(
    config: PerplexityConfig, usable: list[Usable], chosen: list[int], rows: Sequence[Line], problems: Problems
) -> list[Target]:
    """Pair the models with their texts; models with the same template share them."""
    targets: list[Target] = []
    known: dict[tuple[str, ...], list[str]] = {}
    for name, ref, tokenizer in usable:
        given = (rows, tokenizer, config.chat_template, ref.name)
        before = len(problems.lines)
        renderer = problems.absorb(dataset.read_renderer, *given)
        if len(problems.lines) > before:
            continue
        key = (renderer.template, str(tokenizer.special_tokens_map)) if renderer else ()
        if key not in known:
            rendered = problems.absorb(dataset.render, config.dataset, rows, chosen, renderer) or []
            known[key] = [row.text for row in rendered]
        digest = hashlib.sha256(renderer.template.encode()).hexdigest() if renderer else None
        targets.append(Target(name, ref, tokenizer, known[key], digest))
    return targets


def prepare(config: PerplexityConfig, folder: Path, problems: Problems) -> Prepared:
    """Read and check everything that is known before a model is loaded."""
    distributed.check_environment(problems, config.device_map, config.model_parallel, config.quantization)
    check_writable(folder, problems, "--output_dir" if config.output_dir or config.model else "--dir")
    earlier: list[Line] = []
    file = folder / "perplexity.jsonl"
    if file.is_file() and file.stat().st_size:
        earlier = problems.absorb(formats.read_rows, file) or []
        if any("model" not in line or "mean" not in line for line in earlier):
            problems.add(f"{file}: not written by this script; move it away or choose another --output_dir")
    chosen, rows = choose_rows(config, problems)
    known, unusable = find_models(config, problems)
    usable = [model for model in known if model[2] is not None] if rows else []  # a missing tokenizer is a problem
    targets = make_targets(config, usable, chosen, rows, problems)
    return Prepared(earlier, chosen, [dataset.written(rows[index]) for index in chosen], targets, unusable)


def run(config: PerplexityConfig) -> int:
    """Measure the models; return 0, or 1 if a checkpoint failed. Raises UserError before any model is loaded."""
    problems, folder = Problems(), config.folder
    sources.load([config.dataset], config.split, config.data_config)
    config = replace(config, dataset=str(dataset.default_dataset(config.dataset)))
    unknown = not (config.model or config.output_dir or folder.is_dir())  # reported by `prepare`, not created here
    with locks.output_folder(folder, config.dry_run or unknown, "perplexity") as output:
        prepared = prepare(config, folder, problems)
        problems.check()
        return run_locked(config, folder, output, prepared)


def run_locked(config: PerplexityConfig, folder: Path, output: locks.Output, prepared: Prepared) -> int:
    earlier, chosen, targets, failures = prepared.earlier, prepared.chosen, prepared.targets, prepared.failures
    world = distributed.start(model_parallel=config.model_parallel)
    dtype = models.resolve_dtype(config.dtype, world.device)
    settings = {
        "revision": config.revision,
        "dataset": str(config.dataset),
        "dataset_sha256": results.sha256(config.dataset),
        "rows": [chosen[0], chosen[-1] + 1, len(chosen)],
        "dtype": models.dtype_name(dtype, config),
        "seed": config.seed,
    }
    todo: list[tuple[models.ModelRef, Target, Line]] = []  # with the result line so far
    current: list[Line] = []  # lines of earlier runs that are still valid
    for target in targets:
        name, ref = target.name, target.ref
        weights = provenance.weights_sha256(ref)
        line = {"model": ref.name, "checkpoint": name, "base_model": ref.base, "model_sha256": weights, **settings}
        if target.template_sha256:
            line["chat_template_sha256"] = target.template_sha256
        done = [old for old in earlier if same(old, line)]
        for old in earlier:
            if (old.get("checkpoint"), old.get("model_sha256")) == (name, weights):
                old["model"] = ref.name  # the tree may have moved, or be given by another path
        current += done
        if not done:
            todo.append((ref, target, line))
    loader = BaseLoader(world, dtype, config.device_map)
    counts = f"{len(current)} measured before, {len(todo)} to measure, {len(failures)} unusable"
    world.say(f"{len(prepared.written)} documents; {counts}")
    if config.dry_run:
        for ref, *_ in by_base(todo):
            world.say(f"would measure {ref.name}" + (f" on {ref.base}" if ref.adapter else ""))
        world.say(f"would write perplexity.txt and perplexity.jsonl in {folder}")
        world.close()
        return report_failures(failures, world.main)

    special = tokenization.special_tokens_in(targets[0].tokenizer, prepared.written)
    if special and world.main:
        print(tokenization.special_tokens_note(special), file=sys.stderr)
    first = targets[0]
    if world.main and first.template_sha256 is None and (note := tokenization.bos_note(first.tokenizer, first.texts)):
        print(note, file=sys.stderr)
    lines, total = list(earlier), len(targets) + len(failures)
    run_file = folder / "run_perplexity.json"
    with results.Run(run_file, config, [config.dataset], world) as record:
        record["special_tokens"] = special
        scored, started = 0, time.monotonic()

        def measure_one(number: int, ref: models.ModelRef, target: Target, line: Line) -> None:
            nonlocal lines, scored
            ids = tokenize(target.tokenizer, target.texts)
            mine = partial(measure, loader, ref, ids, config.token_budget)
            parts, contexts, changes = zip(*world.together(mine))
            line |= describe(target.texts, ids, join(ids, parts), contexts[0], config.seed)
            line |= {"relative_change": changes[0], "privacy": provenance.privacy(ref)}
            lines = [old for old in lines if old["model"] != ref.name or not same(old, line, but=("model_sha256",))]
            lines.append(line)
            current.append(line)
            if world.main:
                write(output, folder, lines, current)
            scored += line["n_tokens"]
            world.say(f"[{number}/{len(todo)}] {text_line(line, '.6g')}".rstrip())
            if world.main:
                provenance.say_if_hardly_moved(ref, line["relative_change"])

        failures |= for_each(todo, measure_one, loader)
        if world.main and lines:
            write(output, folder, lines, current)
        record["n_tokens"] = sum(line["n_tokens"] for line in current)
        record["tokens_per_second"] = round(scored / (time.monotonic() - started), 1)
        record["failed"] = failures
        if failures:
            record["error"] = f"{len(failures)} of {total} models failed"
    if current:
        world.say(f"results are in {folder / 'perplexity.jsonl'}")
    world.close()
    return report_failures(failures, world.main)
