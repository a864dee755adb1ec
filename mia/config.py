"""The configuration of mia/mia.py."""

from dataclasses import dataclass

from common.cli import MeasuringConfig, QuantizedConfig


@dataclass(frozen=True, kw_only=True)
class MiaConfig(MeasuringConfig, QuantizedConfig):
    """Either model or dir is set."""

    model: str | None = None
    dir: str | None = None  # attack every checkpoint-* below it
    base_model: str | None = None
    members: str = "./data/enron.jsonl"
    nonmembers: str | None = None  # None: the held-out head of `members`, whose other rows are then the members
    chat_template: str | None = None  # None: the tokenizer's own
    columns: tuple[str, ...] = ()  # NEW=OLD
    split: str | None = None  # of a data set on the hub
    data_config: str | None = None
    text_field: str | None = None  # None: as trained, e.g. prompt + continuation
    attacks: tuple[str, ...] | None = None  # None: CORE, plus those enabled by the optional files
    ref_model: str | None = None  # None: an adapter's base
    prefix_file: str | None = None
    neighbor_model: str | None = None
    freq_corpus: str | None = None
    shadows: str | None = None  # a directory of mia/shadow.py
    max_length: int = 512
    max_samples: int | None = None
    token_budget: int = 4096
    bootstrap: int = 1000
    combine: bool = False
    output_dir: str | None = None
