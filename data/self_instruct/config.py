"""The configuration of data/self_instruct/generate.py."""

from dataclasses import dataclass
from pathlib import Path

from common.cli import EngineConfig

FORMATS = ("instances", "alpaca", "text")


@dataclass(frozen=True, kw_only=True)
class SelfInstructConfig(EngineConfig):
    """The generator, the number of instances to generate, and how they are sampled."""

    model: str = "EleutherAI/pythia-12b"
    base_model: str | None = None
    seed_tasks: str = "./data/seedTasks.json"
    output: str | None = None
    format: str = "instances"
    num_rows: int = 2220
    top_k: int = 100
    max_tokens: int = 400
    temperature: float = 0.75  # of new instructions
    instance_temperature: float = 0.0
    round_size: int = 32
    batch_size: int = 16
    strict: bool = False
    overwrite: bool = False

    @property
    def output_file(self) -> Path:
        """--output, or data/self-instruct-<generator>.jsonl."""
        return Path(self.output or f"data/self-instruct-{Path(self.model).name}.jsonl")
