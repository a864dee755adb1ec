"""The configuration of data/continuation/generate.py."""

from dataclasses import dataclass
from pathlib import Path

from common.cli import EngineConfig


@dataclass(frozen=True, kw_only=True)
class ContinuationConfig(EngineConfig):
    """The generator, the rows whose prompts it continues, and how."""

    model: str = "EleutherAI/pythia-12b"
    base_model: str | None = None
    data_set: str = "./data/enron.jsonl"
    top_k: int = 100
    max_tokens: int = 1000
    temperature: float = 0.75
    output: str | None = None
    batch_size: int = 0
    strict: bool = False
    overwrite: bool = False

    @property
    def output_file(self) -> Path:
        """--output, or data/<generator>-continuations/data.arrow."""
        return Path(self.output or f"data/{Path(self.model).name}-continuations/data.arrow")
