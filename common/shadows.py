"""Shadow models on disk: written by mia/shadow.py, read by mia/mia.py --shadows.

    <folder>/pool.jsonl         a header {"schema", "seed", "settings"}, then one line per row of the pool, of which
                                each shadow saw half: {"set", "row" (index in its file), "sha256" (of its text)}
    <folder>/shadow-<k>/        a run of training/: run.json, trained_rows.jsonl (its `row` counts the pool's rows), one
                                checkpoint-<step>/ per epoch
    <folder>/run_shadow.json    the record of mia/shadow.py

No file holds a text. Two runs are alike if their `settings_of` are equal.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import adapter_files, json_files, records, strict_json, trained
from common.checkpoints import find_checkpoints
from common.problems import AnyPath, UserError

POOL, RECORD, SCHEMA = "pool.jsonl", "run_shadow.json", 1
SETS = ("members", "nonmembers")
REMEDY = "remove the directory and run mia/shadow.py again"
# Arguments of a training that two alike may differ in: rows, seed, names, how its global batch is computed.
FREE_ARGUMENTS = (
    "model", "input", "seed", "train_rows", "eval_rows", "allow_overlap", "columns", "split", "data_config",
    "chat_template", "per_device_batch_size", "gradient_accumulation_steps", "distribution_type", "hsdp", "device_map",
    "gradient_checkpointing", "revision", "output_root", "run_name", "logging_steps", "report_to", "resume", "dry_run",
    "suggest_max_grad_norm", "dtype", "max_length",
)  # fmt: skip
# Other fields of its run.json that must be the same: dtype and max_length as they were resolved.
FIELDS = ("global_batch", "max_length", "dtype", "base_sha256")


def settings_of(record: dict[str, Any]) -> dict[str, Any]:
    """The settings in a run.json that make two trainings alike, whatever their rows and seeds."""
    args = {key: value for key, value in record["args"].items() if key not in FREE_ARGUMENTS}
    args |= {key: record.get(key) for key in FIELDS}
    if not record.get("base_sha256"):  # a hub name
        args |= {key: record["args"].get(key) for key in ("model", "revision")}
    plain: dict[str, Any] = strict_json.plain(args)
    return plain


def epoch_of(checkpoint: AnyPath, record: dict[str, Any]) -> int | None:
    """The number of epochs after which checkpoint-<step> was saved; None if its run.json does not say."""
    step = re.fullmatch(r"checkpoint-(\d+)", Path(checkpoint).name)
    sequences, batch = (record.get("rows") or {}).get("sequences"), record.get("global_batch")
    if not step or not isinstance(sequences, int) or not isinstance(batch, int) or min(sequences, batch) < 1:
        return None
    epoch, rest = divmod(int(step[1]), math.ceil(sequences / batch))
    return None if rest or not epoch else epoch


@dataclass(frozen=True)
class Shadow:
    """One trained shadow. checkpoints: one per epoch; seen: hashes of the texts that the loss was taken on."""

    folder: Path
    checkpoints: tuple[Path, ...]
    seen: frozenset[str]


@dataclass(frozen=True)
class Shadows:
    """The shadows in a folder, and the pool of rows that each was trained on half of."""

    folder: Path
    settings: dict[str, Any]
    pool: frozenset[str]  # hashes of its texts
    trained: tuple[Shadow, ...]
    unfinished: int

    @property
    def inputs(self) -> list[Path]:
        """The files that say which rows each shadow saw."""
        return [self.folder / POOL, *(shadow.folder / trained.FILE for shadow in self.trained)]


def pool_lines(settings: dict[str, Any], seed: int, rows: Sequence[tuple[str, int, str]]) -> list[dict[str, Any]]:
    """The lines of pool.jsonl; rows: (set, index in its file, text)."""
    header = {"schema": SCHEMA, "seed": seed, "settings": settings}
    return [header, *({"set": name, "row": row, "sha256": trained.text_sha256(text)} for name, row, text in rows)]


def read_pool(folder: AnyPath) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(header, lines of the rows) of a folder's pool.jsonl. UserError if it is damaged."""
    file = Path(folder) / POOL
    try:
        header, *lines = json_files.read_jsonl(file)
    except ValueError as error:
        raise UserError(f"{file}: damaged ({error}); {REMEDY}") from None
    known = records.check(header, records.PoolHeader, file, REMEDY)
    if known.schema != SCHEMA:
        raise UserError(f"{file}: its schema is {known.schema}, not {SCHEMA}; {REMEDY}")
    for number, line in enumerate(lines):
        records.check(line, records.PoolLine, f"{file}: row {number}", REMEDY)
    return header, lines


def read(folder: AnyPath) -> Shadows:
    """The finished shadows in a folder. UserError if there are none, or if files do not belong together."""
    folder = Path(folder)
    if not (folder / POOL).is_file():
        raise UserError(f"--shadows {folder}: no {POOL} in it; give the --output_dir of mia/shadow.py")
    header, lines = read_pool(folder)
    finished, unfinished = [], 0
    for place in sorted(folder.glob("shadow-*"), key=lambda path: (len(path.name), path.name)):
        file = place / "run.json"
        record = json_files.read_json(file, REMEDY) if file.is_file() else {}
        if record.get("status") != "ok":
            unfinished += 1
            continue
        rows = trained.read_folder(place)
        if rows is None:
            raise UserError(f"{place}: its {trained.FILE} is missing; {REMEDY}")
        for row in rows.rows:
            if row.row >= len(lines) or lines[row.row]["sha256"] != row.sha256:
                raise UserError(f"{place / trained.FILE}: row {row.row} is not that of {POOL}; {REMEDY}")
        seen = frozenset(row.sha256 for row in rows.rows if row.loss_tokens)
        checkpoints = tuple(find_checkpoints(place))
        for checkpoint in checkpoints:
            adapter_files.adapter_shapes(checkpoint)  # UserError if it is damaged
        finished.append(Shadow(place, checkpoints, seen))
    if not finished:
        raise UserError(f"--shadows {folder}: none of its shadows is finished; run mia/shadow.py again")
    return Shadows(folder, header["settings"], frozenset(line["sha256"] for line in lines), tuple(finished), unfinished)
