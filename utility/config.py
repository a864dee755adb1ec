"""The configurations of the scripts of this room."""

from dataclasses import dataclass

from common.cli import ModelConfig


@dataclass(frozen=True, kw_only=True)
class DownstreamConfig(ModelConfig):
    """What utility/downstream.py compares; the script adds the training flags."""

    real: str
    heldout: str
    model: str
    synthetic: tuple[str, ...] | None = None  # ARM=FILE
    columns: tuple[str, ...] = ()  # NEW=OLD
    num_rows: int | None = None  # None: as many as every arm has
    num_heldout: int = 2000
    num_seeds: int = 3
    allow_overlap: bool = False
    output_dir: str = "./utility-out"
    max_length: int


@dataclass(frozen=True, kw_only=True)
class ImportanceConfig:
    """The flags of utility/feature_importance.py."""

    real: str
    heldout: str
    synthetic: tuple[str, ...] | None = None  # ARM=FILE
    columns: tuple[str, ...] = ()  # NEW=OLD
    num_rows: int | None = None  # None: as many as every arm, and half of `real`, have
    num_heldout: int = 2000
    min_rows: int = 5
    num_seeds: int = 5
    output_dir: str = "./utility-out"
    overwrite: bool = False
    seed: int = 3407
    dry_run: bool = False


@dataclass(frozen=True, kw_only=True)
class SheetConfig:
    """The flags of utility/human_sheet.py; `action` is make or score."""

    action: str | None = None
    synthetic: tuple[str, ...] | None = None  # ARM=FILE
    columns: tuple[str, ...] = ()  # NEW=OLD
    real: str | None = None
    num_rows: int = 500
    sheets: tuple[str, ...] | None = None
    key: str | None = None
    output_dir: str = "./human"
    overwrite: bool = False
    seed: int = 3407
    dry_run: bool = False
