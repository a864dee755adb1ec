"""The configurations of data/amazon/prepare.py and make_reviews.py."""

from dataclasses import dataclass
from pathlib import Path

from data.amazon.phrases import DEPARTMENTS

SPLITS = ("train", "test", "validation")


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """The raw files, the sizes of the files that are made from them, and what DuckDB may use."""

    reviews: str
    meta: str
    output_dir: str = "./data/amazon"
    train: int = 100000
    test: int = 10000
    memory_limit: str = "1.2GB"
    threads: int = 0
    strict: bool = False
    overwrite: bool = False
    seed: int = 3407
    dry_run: bool = False

    @property
    def output_files(self) -> dict[str, Path]:
        """{split: path}."""
        return {split: Path(self.output_dir) / f"{split}.jsonl" for split in SPLITS}


@dataclass(frozen=True, kw_only=True)
class MakeReviewsConfig:
    """How many reviews and products are made up, and where they are written."""

    output_dir: str = "./data/amazon/fictional"
    category: str = "Fictional_Goods"
    reviews: int = 10000
    products: int = 600
    departments: tuple[str, ...] = tuple(DEPARTMENTS)
    users: int = 0
    gzip: bool = False
    overwrite: bool = False
    seed: int = 3407
    dry_run: bool = False
