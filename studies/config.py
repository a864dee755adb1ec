"""The configuration of quickstart.py, which every study reads."""

from dataclasses import dataclass
from pathlib import Path

from common.cli import ModelConfig

EMBEDDED = Path(__file__).resolve().parents[1] / "data" / "embedded"


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig(ModelConfig):
    """The flags of quickstart.py."""

    study: str = "mail"
    model: str = str(EMBEDDED / "mini-pythia")
    dataset: str = str(EMBEDDED / "enron.jsonl")
    outsiders: str | None = None
    generator: str | None = None
    unseen_generator: str | None = None
    seed_tasks: str | None = None
    self_instruct_rows: int | None = None
    pretraining_membership: bool = False
    pretraining_members: str | None = None
    pretraining_nonmembers: str | None = None
    seeds: int = 1
    generated_tokens: int = 120
    arms: tuple[str, ...] | None = None
    output: str = "./quickstart-out"
    learning_rate: float | None = None
    epochs: int | None = None
    per_device_batch_size: int = 8
    gradient_accumulation_steps: int = 4
    lora_r: int | None = None
    max_tokens: int = 24
    full: bool = False


@dataclass(frozen=True, kw_only=True)
class StudyConfig(QuickstartConfig):
    """The flags, with the defaults that depend on the study and the model filled in."""

    arms: tuple[str, ...]
    learning_rate: float
    epochs: int
    lora_r: int
    self_instruct_rows: int
