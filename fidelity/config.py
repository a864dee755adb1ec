"""The configuration of fidelity/fidelity.py."""

from dataclasses import dataclass

from common.cli import ModelConfig

FAMILIES = ("embedding", "mauve", "figures")  # choices of --without


@dataclass(frozen=True, kw_only=True)
class FidelityConfig(ModelConfig):
    """The flags of fidelity/fidelity.py."""

    real: str  # reviews that no generator was trained on
    synthetic: tuple[str, ...]  # ARM=FILE
    train: str | None = None  # reviews that the generators were trained on; None: no search for copies
    columns: tuple[str, ...] = ()  # NEW=OLD
    output_dir: str = "./fidelity-out"
    num_rows: int = 10000
    pool_rows: int = 10000
    embedder: str | None = None  # None: the packaged all-MiniLM-L6-v2
    max_tokens: int = 256
    without: tuple[str, ...] = ()
    overwrite: bool = False

    @property
    def embeds(self) -> bool:
        """Whether the reviews are embedded."""
        return "embedding" not in self.without

    @property
    def takes_mauve(self) -> bool:
        """Whether MAUVE, which needs the embeddings, is computed."""
        return self.embeds and "mauve" not in self.without

    @property
    def input_files(self) -> list[str]:
        """--real, --train if given, and the file of each arm."""
        train = [self.train] if self.train else []
        return [self.real, *train, *(word.partition("=")[2] for word in self.synthetic)]
