"""Where a model comes from: its weights' hash, and the records that its training left beside it."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import records
from common.json_files import read_json
from common.problems import AnyPath, UserError
from common.results import sha256

if TYPE_CHECKING:
    from common.models import ModelRef

PRIVACY_FILE = "privacy.json"
HARDLY = 1e-4  # ‖ΔW‖/‖W‖ below which a model behaves like its base


def weights_sha256(ref: ModelRef) -> str | None:
    """SHA-256 of a model's weights: of an adapter's file, of a full model's only file, or over the files' hashes.

    None for a hub name.
    """
    folder = Path(ref.adapter or ref.base)
    if not folder.is_dir():
        return None
    pattern = "adapter_model.safetensors" if ref.adapter else "*.safetensors"
    hashes = [sha256(file) for file in sorted(folder.glob(pattern)) or sorted(folder.glob("*.bin"))]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def training_record(checkpoint: AnyPath) -> dict[str, Any] | None:
    """The run.json that run_peft.py writes beside a checkpoint; None without one, UserError if it is broken."""
    file = Path(checkpoint).absolute().parent / "run.json"
    if not file.is_file():
        return None
    record = read_json(file, "remove it if it is lost")
    records.check(record, records.RunRecord, file, "remove it if it is lost")
    return record


def privacy(ref: ModelRef) -> dict[str, Any] | None:
    """The privacy budget a model's training spent: the privacy.json that run_peft.py --dp writes beside it, or None.

    UserError if it is broken.
    """
    file = Path(ref.adapter or ref.base) / PRIVACY_FILE
    if not file.is_file():
        return None
    remedy = "restore it; the budget spent is also in the training's run.json"
    block = read_json(file, remedy)
    records.check(block, records.Spent, file, remedy)
    return block


def hardly_moved(change: object) -> str | None:
    """The warning about a model whose ‖ΔW‖/‖W‖ is tiny; None for others (and for None)."""
    if not isinstance(change, int | float) or change >= HARDLY:
        return None
    return f"the model has hardly moved: ‖ΔW‖/‖W‖ {change:.2g} is below {HARDLY:g}"


def say_if_hardly_moved(ref: ModelRef, change: float | None = None) -> None:
    """Print that warning next to a model's numbers. `change`: ‖ΔW‖/‖W‖; None: as recorded at the end of training."""
    if change is None and (ref.adapter or Path(ref.base).is_dir()):
        with contextlib.suppress(UserError):  # a broken run.json is reported by those who need it
            change = (training_record(ref.adapter or ref.base) or {}).get("relative_change")
    if note := hardly_moved(change):
        print(f"{ref.name}: {note}; its results are those of the base")
