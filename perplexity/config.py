"""The configuration of perplexity/perplexity.py."""

from dataclasses import dataclass
from pathlib import Path

from common.cli import MeasuringConfig, QuantizedConfig
from common.scoring import TOKEN_BUDGET

DEFAULT_DIR = "./pythia-1.4b"


@dataclass(frozen=True, kw_only=True)
class PerplexityConfig(MeasuringConfig, QuantizedConfig):
    """Measures `model` if given, else every checkpoint-* below `dir`."""

    dir: str = DEFAULT_DIR
    model: str | None = None
    base_model: str | None = None
    dataset: str = "./data/enron.jsonl"
    output_dir: str | None = None  # None: dir; ./ with a model
    num_rows: int | None = None  # first rows of the file; None: its evaluation head, at most 1,110 rows
    chat_template: str | None = None  # None: the tokenizer's own
    columns: tuple[str, ...] = ()  # NEW=OLD
    split: str | None = None  # of a data set on the hub
    data_config: str | None = None
    token_budget: int = TOKEN_BUDGET

    @property
    def folder(self) -> Path:
        """The folder of the result files."""
        return Path(self.output_dir or ("./" if self.model else self.dir))
