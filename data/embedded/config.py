"""The configurations of data/embedded/make_corpus.py and make_model.py."""

from dataclasses import dataclass
from typing import TypedDict


class Size(TypedDict):
    """The name of an embedded model and the shape of its network."""

    name: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int


SIZES: dict[str, Size] = {
    "mini": {"name": "mini-pythia", "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4},
    "xl": {"name": "mini-pythia-xl", "hidden_size": 192, "num_hidden_layers": 5, "num_attention_heads": 4},
}
CONTEXT = 1024  # tokens


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Where to write the corpus, and its size."""

    output_dir: str | None = None  # None: this folder
    pretraining_output: str | None = None
    people: int = 1500
    outsiders: int = 300
    web_pages: int = 6900
    seed: int = 3407
    dry_run: bool = False


@dataclass(frozen=True, kw_only=True)
class MakeModelConfig:
    """Which of the two models is trained, on how much text, and how."""

    size: str = "mini"
    output_dir: str | None = None  # None: this folder
    vocab_size: int = 3072
    epochs: int = 3
    mixed_pages: int = 800
    last_pages: int = 1500
    last_mails: int = 40
    window: int = 512
    batch_size: int = 4
    learning_rate: float = 2.5e-3
    last_factor: float = 0.1  # of the peak, in the last stage
    bf16: bool = False
    weight_decay: float = 0.05
    max_steps: int | None = None  # None: the whole schedule
    corpus_seed: int = 3407
    seed: int = 3407
    dry_run: bool = False


@dataclass(frozen=True, kw_only=True)
class InstructionsConfig:
    """The folder for seed_tasks.json and form.jsonl, and their sizes."""

    output: str = "./instructions"
    seed_tasks: int = 60
    form_rows: int = 600
    seed: int = 3407
    overwrite: bool = False
    dry_run: bool = False


@dataclass(frozen=True, kw_only=True)
class MembershipConfig:
    """The folder for members.jsonl and nonmembers.jsonl, the number of texts in each, and the seed of the latter."""

    output: str = "./pretraining"
    num_rows: int = 1000
    corpus_seed: int = 3407
    seed: int = 1
    overwrite: bool = False
    dry_run: bool = False
