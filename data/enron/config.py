"""The configuration of data/enron/prepare.py."""

from dataclasses import dataclass
from pathlib import Path

PROMPT_TOKENS = 200
PROMPT_CHARACTERS = 800  # without a tokenizer


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """The mail that is read, and the file of rows that is written."""

    input: tuple[str, ...]
    output: str = "./data/enron.jsonl"
    tokenizer: str = "gpt2"
    workers: int = 0
    strict: bool = False
    overwrite: bool = False
    seed: int = 3407
    dry_run: bool = False

    @property
    def output_file(self) -> Path:
        """--output as a path."""
        return Path(self.output)
