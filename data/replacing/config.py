"""The configuration of data/replace_pii.py."""

from dataclasses import dataclass

DEFAULT_NAME = "replaced_data.arrow"


@dataclass(frozen=True, kw_only=True)
class ReplaceConfig:
    """The rows in which people are replaced, and the files that are written."""

    input: str = "./data/enron.jsonl"
    output: str | None = None
    save_map: str | None = None
    strict: bool = False
    overwrite: bool = False
    seed: int = 3407
    dry_run: bool = False
