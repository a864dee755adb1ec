"""The configurations of measure_purified.py and evaluate_purified.py."""

from dataclasses import dataclass

from common.cli import EngineConfig, QuantizedConfig
from common.schema import TEMPERATURES


@dataclass(frozen=True, kw_only=True)
class AttackConfig(EngineConfig, QuantizedConfig):
    """Settings of the attack, whatever the model."""

    dataset: str = "./data/enron.jsonl"
    top_k: int = 100
    max_tokens: int = 15
    num_rows: int | None = None  # the first rows; None: NUM_ROWS, at most a third of the file
    temperatures: tuple[float, ...] = TEMPERATURES
    attack: str = "templates"
    templates: str = "released"
    trailing_space: bool = False
    chat: bool = False
    chat_template: str | None = None
    stop: str | None = None  # None: released with templates released, else newline
    demonstrations: str | None = None
    batch_size: int = 0
    save_responses: bool = False
    baseline: str | None = None


@dataclass(frozen=True, kw_only=True)
class MeasureConfig(AttackConfig):
    """One model."""

    model: str | None = None
    output_dir: str | None = None
    base_model: str | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(AttackConfig):
    """Every checkpoint-* below a directory."""

    model: str = "./pythia-1.4b"
    temp: str = "./tempMerged"
    is_opt: bool = False
    base_model: str | None = None
    save_merged: bool = False
    mia: bool = False
