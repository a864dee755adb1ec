"""The configuration of data/embedded/make_corpus.py."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Where to write the corpus, and its size."""

    output_dir: str | None = None  # None: this folder
    pretraining_output: str | None = None
    people: int = 1500
    outsiders: int = 300
    web_pages: int = 6900
    seed: int = 3407
