"""Every result file below some directories → one tidy table (a Row a number) with the line each number came from.

Files of the toolkit and of the released System P tool (lines with matches, model, temperature, top_k only) are read.
What cannot be read is kept as Damage, never skipped in silence. No text of a data set or an answer is read here.
"""

import json
import os
from pathlib import Path

from common.cli import is_utf8, one_line
from common.schema import KINDS
from reporting.labels import CHECKPOINT, Models, fixed_models, name_models
from reporting.table import (
    COLUMNS,
    MODEL_COLUMNS,
    MODEL_TEXTS,
    ROW_TEXTS,
    Damage,
    Model,
    Row,
    Study,
    check,
    check_line,
    check_row,
    check_run,
    literal,
    make_literal,
    need,
)

LEFT_OUT = {"mia_cache", "private", "__pycache__"}  # folders that hold no results
CURVES = ("loss", "eval_loss", "grad_norm")


# ---------------------------------------------------------------- files


def readable(path: Path, study: Study) -> bool:
    """Whether a result file is a file, with a name that can be shown; what is not goes to study.damage."""
    reason = None if path.is_file() else "not a file"
    if not is_utf8(str(path)):
        reason = "its name, or a folder's above it, is not UTF-8; rename it"
    if reason:
        study.damage.append(Damage(one_line(study.shown(path)), 1, reason))
    return not reason


def find(directories: list[Path], output: Path | None = None) -> dict[str, list[Path]]:
    """{kind: sorted paths} of the result files below `directories`; nothing below `output`, nothing hidden."""
    from common.checkpoints import natural_key

    found: dict[str, dict[Path, Path]] = {kind: {} for kind in KINDS}  # true path → path; a linked file is read once
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
                        found[kind][true] = true if path == true else found[kind].get(true, path)

    def order(path: Path) -> tuple:  # results_purified.jsonl before results_purified1.jsonl, the newer one
        return natural_key(path.parent), len(path.name), path.name

    return {kind: sorted(paths.values(), key=order) for kind, paths in found.items()}


def _constant(text: str):
    return None if text == "NaN" else float(text.replace("Infinity", "inf"))


def parse(path: Path, study: Study) -> list[tuple[int, dict]]:
    """[(line number from 1, object)] of a .json or .jsonl file; what is broken goes to study.damage."""
    shown, raw = study.shown(path), path.read_bytes()
    if not raw.strip():
        study.damage.append(Damage(shown, 1, "empty: the measurement it was made for never finished"))
        return []
    whole = path.suffix == ".json"
    pieces = [raw] if whole else raw.split(b"\n")
    found = []
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
            found.append((number, item))
        else:
            study.damage.append(Damage(shown, number, f"a JSON {type(item).__name__}, not an object"))
    return found


def curve(path: Path, study: Study) -> list[dict]:
    """The lines of a metrics.jsonl; one with another thing where a number belongs is damage, an infinity is a gap."""
    lines = []
    for number, line in parse(path, study) if path.stat().st_size else ():
        with study.guard(study.shown(path), number):
            line = {name: None if value in ("inf", "-inf") else value for name, value in line.items()}
            need(line, "step")
            check(line, CURVES)
            lines.append(line)
    return lines


def scores_of(path: Path, study: Study) -> Path | None:
    """The scores beside a results_mia.jsonl; None, and damage, when they are not all of the texts of its lines."""
    file, shown = path.parent / "scores_mia.jsonl", study.shown(path)
    wanted = {line["n_requested"] for name, _, line in study.lines.get("mia", []) if name == shown}
    if not file.is_file() or not wanted:
        return None
    before = len(study.damage)
    found = parse(file, study)
    if len(study.damage) == before and wanted != {len(found)}:
        reason = f"scores of {len(found):,} texts beside results over {', '.join(sorted(map(str, wanted)))}"
        study.damage.append(Damage(study.shown(file), len(found), reason))
    return file if len(study.damage) == before else None


# ---------------------------------------------------------------- models


def side_by_side(study: Study) -> dict[tuple, dict[str, Model]]:
    """{(area, group, base): {key: trained model}}: whose numbers stand beside each other; each ε alone."""
    found: dict[tuple, dict[str, Model]] = {}
    for row in study.rows:
        if row.model and row.model.step is not None and row.role == "target":
            group = row.model.key if row.area == "privacy" else row.group
            found.setdefault((row.area, group, row.model.base), {})[row.model.key] = row.model
    return found


def choose(study: Study) -> tuple[list[Model], str, list[str]]:
    """(models compared in headlines, the rule in words, what is compared at different learning rates all the same).

    Every base, and `fixed_models` of each set of models that some group of numbers joins.
    """
    beside = side_by_side(study)
    sets: list[dict[str, Model]] = []
    for own in beside.values():
        joined = [one for one in sets if one.keys() & own.keys()]
        sets = [
            *(one for one in sets if one not in joined),
            {key: model for one in (*joined, own) for key, model in one.items()},
        ]
    chosen, rates = [model for model in study.models.values() if model.step is None], []
    for models in sets:
        fixed, rate = fixed_models(list(models.values()))
        chosen, rates = chosen + fixed, rates + [rate] * (rate is not None)
    mixed = []
    for (_, group, _), models in beside.items():
        at = {model.label: model.learning_rate for model in chosen if model.key in models}
        if len(set(at.values()) - {None}) > 1:
            mixed.append(
                f"{group}: "
                + ", ".join(
                    f"{label} at {'an unknown rate' if rate is None else f'{rate:g}'}" for label, rate in at.items()
                )
            )
    words = " or ".join(f"{rate:g}" for rate in sorted(set(rates)))
    said = f" at learning rate {words} (that of most runs, the smallest of equals)" if rates else ""
    return chosen, "the last checkpoint of each run" + said, list(dict.fromkeys(mixed))


# ---------------------------------------------------------------- all of it


def read(directories: list[Path], output: Path | None = None) -> Study:
    """The Study below `directories` (existing); nothing below `output` is read."""
    from reporting import parsers

    directories = [Path(directory).resolve() for directory in directories]  # however it is called, a run is read once
    study = Study(Path(os.path.commonpath(directories)))
    found = find(directories, Path(os.path.realpath(output)) if output else None)
    study.files = {kind: [path for path in paths if readable(path, study)] for kind, paths in found.items()}
    for path in study.files["run"]:
        for number, content in parse(path, study):
            with study.guard(study.shown(path), number):
                check_run(content)
                study.runs[str(path)] = content
    inside = [path.parent for paths in study.files.values() for path in paths]
    models = Models(study, {folder for folder in inside if CHECKPOINT.fullmatch(folder.name)})
    converters = {
        "extraction": parsers.extraction_rows,
        "perplexity": parsers.perplexity_rows,
        "mia": parsers.mia_rows,
        "canary": parsers.canary_rows,
        "fidelity": parsers.fidelity_rows,
        "utility": parsers.utility_rows,
        "importance": parsers.importance_rows,
        "human": parsers.human_rows,
        "privacy": parsers.privacy_rows,
    }
    for kind, convert in converters.items():
        for path in study.files[kind]:
            for number, line in parse(path, study):
                shown = study.shown(path)
                with study.guard(shown, number):
                    check_line(line)
                    made = convert(line, study, models, path, number)
                    for row in made:
                        check_row(row)
                        row.file, row.line = shown, number
                        row.arm = row.arm or (row.model.arm if row.model else None)
                        if row.model and line.get("relative_change") is not None:
                            known = [one for one in (row.model.change, line["relative_change"]) if one is not None]
                            row.model.change = min(known)
                    study.rows += made
                    study.lines.setdefault(kind, []).append((shown, number, line))
            scores = scores_of(path, study) if kind == "mia" else None
            if scores:
                study.scores[study.shown(path)] = scores
    for path in study.files["perplexity_text"]:
        if not (path.parent / "perplexity.jsonl").exists():
            parsers.text_perplexity(path, study, models)
    for path in study.files["metrics"]:
        study.curves[str(path.parent)] = curve(path, study)
    for path in study.files["adapter"]:
        if CHECKPOINT.fullmatch(path.parent.name):
            models.of(None, path)
            study.lines.setdefault("adapter", []).extend((study.shown(path), n, one) for n, one in parse(path, study))
    for model in study.models.values():
        make_literal(model, MODEL_TEXTS)
    name_models(list(study.models.values()))
    for row in study.rows:
        row.arm = row.model.arm if row.model else row.arm
        make_literal(row, ("metric", *ROW_TEXTS))
    newest(study)
    return study


def newest(study: Study) -> None:
    """Where a model was measured twice with the same settings, keep the rows of the newest file; note the others."""
    last: dict[tuple, str] = {}

    def key(row: Row) -> tuple:
        return row.area, row.metric, row.model.key, row.group, row.template, row.temperature, row.attack, row.level

    rows = [row for row in study.rows if row.model and row.area in ("extraction", "perplexity", "mia")]
    order = {study.shown(path): place for kind in study.files.values() for place, path in enumerate(kind)}
    for row in rows:
        if row.role in ("target",):
            last[key(row)] = max(last.get(key(row), row.source), row.source, key=lambda s: _place(s, order))
    older = {id(row) for row in rows if row.role == "target" and last[key(row)] != row.source}
    sources = {row.source for row in rows if id(row) in older}
    study.lines["superseded"] = [(source.rpartition(":")[0], int(source.rpartition(":")[2]), {}) for source in sources]
    study.rows = [row for row in study.rows if row.source not in sources]


def _place(source: str, order: dict[str, int]) -> tuple:
    file, _, line = source.rpartition(":")
    return order.get(file, -1), int(line)


def table(study: Study):
    """Header and rows of results.csv: a number a row, the model's columns after those of the number."""
    yield [*COLUMNS, *MODEL_COLUMNS]
    for row in study.rows:
        values = {name: getattr(row, name) for name in COLUMNS}
        values["model"] = row.model.label if row.model else None
        values["settings"] = json.dumps(row.settings, ensure_ascii=False, default=str) if row.settings else None
        cells = [values[name] for name in COLUMNS] + [getattr(row.model, name, None) for name in MODEL_COLUMNS]
        yield [literal(cell) if isinstance(cell, str) else cell for cell in cells]
