"""Read all result files below some directories into one tidy table: one Row per number, with its source line.

Reads files of this toolkit and of the released System P tool (lines with only matches, model, temperature, top_k).
Unreadable lines are kept as Damage, never skipped silently. No dataset text or model answer is read here.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.checkpoints import natural_key
from common.problems import is_utf8, one_line
from common.schema import KINDS
from reporting import parsers_attacks, parsers_canary, parsers_synthetic
from reporting.labels import CHECKPOINT, Models, find_paired, fixed_models, name_models, same_arms
from reporting.table import (
    COLUMNS,
    MODEL_COLUMNS,
    MODEL_TEXTS,
    ROW_TEXTS,
    Damage,
    Model,
    Record,
    Row,
    Study,
    check,
    check_audit,
    check_line,
    check_row,
    check_run,
    literal,
    make_literal,
    need,
)

LEFT_OUT = {"mia_cache", "private", "__pycache__"}  # folders without results
CURVES = ("loss", "eval_loss", "grad_norm")


def readable(path: Path, study: Study) -> bool:
    """Whether a result file is a regular file with a printable name; if not, adds it to study.damage."""
    reason = None if path.is_file() else "not a file"
    if not is_utf8(str(path)):
        reason = "its name, or that of a folder above it, is not UTF-8; rename it"
    if reason:
        study.damage.append(Damage(one_line(study.shown(path)), 1, reason))
    return not reason


def find(directories: list[Path], output: Path | None = None) -> dict[str, list[Path]]:
    """{kind: sorted paths} of the result files below `directories`, except below `output` and in hidden folders."""
    paths_of: dict[str, dict[Path, Path]] = {kind: {} for kind in KINDS}  # real path → path; linked files count once
    for directory in directories:
        for folder, folders, names in os.walk(directory):
            inside = Path(folder)
            folders[:] = sorted(
                name
                for name in folders
                if not name.startswith(".") and name not in LEFT_OUT and Path(os.path.realpath(inside / name)) != output
            )
            for name in names:
                for kind, pattern in KINDS.items():
                    if pattern.fullmatch(name):
                        path, true = inside / name, Path(os.path.realpath(inside / name))
                        paths_of[kind][true] = true if path == true else paths_of[kind].get(true, path)

    def order(path: Path) -> tuple[Any, ...]:  # results_purified.jsonl before results_purified1.jsonl, which is newer
        return natural_key(path.parent), len(path.name), path.name

    return {kind: sorted(paths.values(), key=order) for kind, paths in paths_of.items()}


def _constant(text: str) -> float | None:
    return None if text == "NaN" else float(text.replace("Infinity", "inf"))


def parse(path: Path, study: Study) -> list[tuple[int, Record]]:
    """[(line number from 1, object)] of a .json or .jsonl file; malformed lines are added to study.damage."""
    shown, raw = study.shown(path), path.read_bytes()
    if not raw.strip():
        study.damage.append(Damage(shown, 1, "empty: its measurement never finished"))
        return []
    whole = path.suffix == ".json"
    pieces = [raw] if whole else raw.split(b"\n")
    objects = []
    for number, piece in enumerate(pieces, 1):
        if not piece.strip():
            continue
        try:
            item = json.loads(piece, parse_constant=_constant)
        except (ValueError, RecursionError) as error:
            torn = number == len(pieces) and path.name == "metrics.jsonl"
            study.damage.append(Damage(shown, number, f"not JSON ({error})", torn))
            continue
        if isinstance(item, dict):
            objects.append((number, item))
        else:
            study.damage.append(Damage(shown, number, f"a JSON {type(item).__name__}, not an object"))
    return objects


def curve(path: Path, study: Study) -> list[Record]:
    """The lines of a metrics.jsonl; a non-number in place of a number is damage, an infinity becomes a gap."""
    lines = []
    for number, line in parse(path, study) if path.stat().st_size else ():
        with study.guard(study.shown(path), number):
            line = {name: None if value in ("inf", "-inf") else value for name, value in line.items()}
            need(line, "step")
            check(line, CURVES)
            lines.append(line)
    return lines


def scores_of(path: Path, study: Study) -> Path | None:
    """The scores_mia.jsonl next to a results_mia.jsonl; None, and damage, if it does not cover all of its texts."""
    file, shown = path.parent / "scores_mia.jsonl", study.shown(path)
    wanted = {line["n_requested"] for name, _, line in study.lines.get("mia", []) if name == shown}
    if not file.is_file() or not wanted:
        return None
    before = len(study.damage)
    scores = parse(file, study)
    if len(study.damage) == before and wanted != {len(scores)}:
        reason = f"has scores of {len(scores):,} texts, but the results are over {', '.join(sorted(map(str, wanted)))}"
        study.damage.append(Damage(study.shown(file), len(scores), reason))
    return file if len(study.damage) == before else None


def side_by_side(study: Study) -> dict[tuple[str, str, str], dict[str, Model]]:
    """{(area, group, base): {key: trained model}}: models whose numbers are shown together; each ε is on its own."""
    together: dict[tuple[str, str, str], dict[str, Model]] = {}
    for row in study.rows:
        if row.model and row.model.step is not None and row.role == "target":
            group = row.model.key if row.area == "privacy" else row.group
            together.setdefault((row.area, group, row.model.base), {})[row.model.key] = row.model
    return together


def choose(study: Study) -> tuple[list[Model], str, list[str]]:
    """(models compared in headlines, the rule in words, comparisons across different learning rates).

    The models are every base, and `fixed_models` of each set of models that share a group of numbers.
    """
    sets_shown = side_by_side(study)
    sets: list[dict[str, Model]] = []
    for own in sets_shown.values():
        joined = [models for models in sets if models.keys() & own.keys()]
        sets = [
            *(models for models in sets if models not in joined),
            {key: model for models in (*joined, own) for key, model in models.items()},
        ]
    chosen = [model for model in study.models.values() if model.step is None]
    rates: list[float] = []
    for models in sets:
        fixed, rate = fixed_models(list(models.values()))
        chosen += fixed
        rates += [] if rate is None else [rate]
    mixed = []
    for (_, group, _), models in sets_shown.items():
        at = {model.label: model.learning_rate for model in chosen if model.key in models}
        if len(set(at.values()) - {None}) > 1:
            mixed.append(
                f"{group}: "
                + ", ".join(
                    f"{label} at {'an unknown rate' if rate is None else f'{rate:g}'}" for label, rate in at.items()
                )
            )
    words = " or ".join(f"{rate:g}" for rate in sorted(set(rates)))
    at_rate = f" at learning rate {words} (that of most runs, the smallest in a tie)" if rates else ""
    return chosen, "the last checkpoint of each run" + at_rate, list(dict.fromkeys(mixed))


def read(directories: list[Path], output: Path | None = None) -> Study:
    """Read the Study below `directories`, which exist; skips everything below `output`."""
    directories = [
        Path(directory).resolve() for directory in directories
    ]  # read a run once, whatever path it is given by
    study = Study(Path(os.path.commonpath(directories)))
    paths_of = find(directories, Path(os.path.realpath(output)) if output else None)
    study.files = {kind: [path for path in paths if readable(path, study)] for kind, paths in paths_of.items()}
    for path in study.files["run"]:
        for number, content in parse(path, study):
            with study.guard(study.shown(path), number):
                check_run(content)
                study.runs[str(path)] = content
    for path in study.files["audit"]:
        for number, content in parse(path, study):
            with study.guard(study.shown(path), number):
                check_audit(content)
                study.audits.append((study.shown(path), content))
    inside = [path.parent for paths in study.files.values() for path in paths]
    models = Models(study, {folder for folder in inside if CHECKPOINT.fullmatch(folder.name)})
    converters = {
        "extraction": parsers_attacks.extraction_rows,
        "perplexity": parsers_attacks.perplexity_rows,
        "mia": parsers_attacks.mia_rows,
        "canary": parsers_canary.canary_rows,
        "fidelity": parsers_synthetic.fidelity_rows,
        "utility": parsers_synthetic.utility_rows,
        "sweep": parsers_synthetic.sweep_rows,
        "importance": parsers_synthetic.importance_rows,
        "human": parsers_synthetic.human_rows,
        "summary": parsers_synthetic.summary_rows,
        "privacy": parsers_attacks.privacy_rows,
    }
    # of a summary.json, only what a study of quickstart.py wrote is known
    study.files["summary"] = [
        path for path in study.files["summary"] if str(path.with_name("run_quickstart.json")) in study.runs
    ]
    for kind, convert in converters.items():
        for path in study.files[kind]:
            for number, line in parse(path, study):
                shown = study.shown(path)
                with study.guard(shown, number):
                    check_line(line)
                    rows = convert(line, study, models, path, number)
                    for row in rows:
                        check_row(row)
                        row.file, row.line = shown, number
                        row.arm = row.arm or (row.model.arm if row.model else None)
                        if row.model and line.get("relative_change") is not None:
                            known = [
                                change for change in (row.model.change, line["relative_change"]) if change is not None
                            ]
                            row.model.change = min(known)
                    study.rows += rows
                    study.lines.setdefault(kind, []).append((shown, number, line))
            scores = scores_of(path, study) if kind == "mia" else None
            if scores:
                study.scores[study.shown(path)] = scores
            single = path.with_name("results_canary_rows.jsonl")
            if kind == "canary" and os.access(single, os.R_OK):
                study.canaries[study.shown(path)] = single
    for path in study.files["perplexity_text"]:
        if not (path.parent / "perplexity.jsonl").exists():
            parsers_attacks.text_perplexity(path, study, models)
    for path in study.files["metrics"]:
        study.curves[str(path.parent)] = curve(path, study)
    for path in study.files["adapter"]:
        if CHECKPOINT.fullmatch(path.parent.name):
            models.of(None, path)
            study.lines.setdefault("adapter", []).extend(
                (study.shown(path), n, config) for n, config in parse(path, study)
            )
    for model in study.models.values():
        make_literal(model, MODEL_TEXTS)
    name_models(list(study.models.values()))
    find_paired(study)
    for row in study.rows:
        row.arm = row.model.arm if row.model else row.arm
        make_literal(row, ("metric", *ROW_TEXTS))
    study.same = same_arms(study, models)
    newest(study)
    return study


def newest(study: Study) -> None:
    """If a model was measured twice with the same settings, keep only the rows of the newest file; note the others."""
    last: dict[tuple[object, ...], str] = {}

    def key(row: Row) -> tuple[object, ...]:
        return row.area, row.metric, row.measured.key, row.group, row.template, row.temperature, row.attack, row.level

    rows = [row for row in study.rows if row.model and row.area in ("extraction", "perplexity", "mia")]
    order = {study.shown(path): index for kind in study.files.values() for index, path in enumerate(kind)}
    for row in rows:
        if row.role in ("target",):
            last[key(row)] = max(last.get(key(row), row.source), row.source, key=lambda source: position(source, order))
    older = {id(row) for row in rows if row.role == "target" and last[key(row)] != row.source}
    sources = {row.source for row in rows if id(row) in older}
    study.lines["superseded"] = [(source.rpartition(":")[0], int(source.rpartition(":")[2]), {}) for source in sources]
    study.rows = [row for row in study.rows if row.source not in sources]


def position(source: str, order: dict[str, int]) -> tuple[int, int]:
    """(position of its file in the order of reading, line)."""
    file, _, line = source.rpartition(":")
    return order.get(file, -1), int(line)


def table(study: Study) -> Iterator[list[object]]:
    """Header and rows of results.csv: one number per row, with the model's columns last."""
    yield [*COLUMNS, *MODEL_COLUMNS]
    for row in study.rows:
        values: Record = {name: getattr(row, name) for name in COLUMNS}
        values["model"] = row.model.label if row.model else None
        values["settings"] = json.dumps(row.settings, ensure_ascii=False, default=str) if row.settings else None
        cells = [values[name] for name in COLUMNS] + [getattr(row.model, name, None) for name in MODEL_COLUMNS]
        yield [literal(cell) if isinstance(cell, str) else cell for cell in cells]
