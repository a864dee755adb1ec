"""The configuration of data/synthetic/generate.py."""

from dataclasses import dataclass
from pathlib import Path

from common.cli import EngineConfig

CONDITIONS = ("metadata", "title", "sampled")
FIELDS = ("Rating", "Product Categories", "Product Title")  # of the histogram
FILTERS = ("empty", "length")


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig(EngineConfig):
    """The generator, the metadata its prompts are made from, and what it writes."""

    model: str
    base_model: str | None = None
    input: str = "./data/amazon/test.jsonl"
    arm: str = "with_dp"
    num: int | None = None  # None: one review per row of `input`
    condition: str = "metadata"
    training: str | None = None  # the rows that the generator was trained on
    metadata_epsilon: float | None = None
    metadata_delta: float | None = None
    metadata_fields: tuple[str, ...] = FIELDS
    histogram: str | None = None
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 50
    filter: tuple[str, ...] = ()
    batch_size: int = 0
    output: str | None = None
    overwrite: bool = False

    @property
    def samples_metadata(self) -> bool:
        """Whether the metadata is drawn from a histogram instead of taken from `input`."""
        return self.condition == "sampled"

    @property
    def output_file(self) -> Path:
        """--output, or generated_sequences_<arm>.jsonl."""
        return Path(self.output or f"generated_sequences_{self.arm}.jsonl")

    @property
    def histogram_file(self) -> Path:
        """--histogram, or metadata_histogram.json next to the output."""
        return Path(self.histogram) if self.histogram else self.output_file.with_name("metadata_histogram.json")
