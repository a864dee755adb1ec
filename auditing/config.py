"""The configuration of audit.py."""

from dataclasses import dataclass

from common.cli import EngineConfig, QuantizedConfig

PARTS = ("membership", "extraction", "verbatim", "untargeted", "canaries")


@dataclass(frozen=True, kw_only=True)
class AuditConfig(EngineConfig, QuantizedConfig):
    """num_rows: per side, sampled by the seed; None: 5,000, with `quick` 500."""

    model: str
    train: str
    heldout: str | None = None
    base_model: str | None = None
    ref_model: str | None = None
    chat_template: str | None = None
    columns: tuple[str, ...] = ()
    split: str | None = None  # of a data set on the hub
    data_config: str | None = None
    secrets: str | None = None
    pii: tuple[str, ...] = ()
    region: str = "US"
    ner: str | None = None
    canaries: str | None = None
    without: tuple[str, ...] = ()
    quick: bool = False
    num_rows: int | None = None
    decoys: int | None = None
    samples: int | None = None
    max_length: int = 1024
    token_budget: int = 4096
    fail_on: tuple[str, ...] = ()
    output_dir: str = "./audit"
    save_responses: bool = False


@dataclass(frozen=True)
class Budget:
    """How much is measured, by default and with --quick."""

    num_rows: int = 5000
    decoys: int = 200
    most_secrets: int = 500
    most_windows: int = 1000
    samples: int = 1000
    sample_tokens: int = 128


QUICK = Budget(num_rows=500, decoys=200, most_secrets=40, most_windows=150, samples=100, sample_tokens=64)


def budget_of(config: AuditConfig) -> Budget:
    chosen = QUICK if config.quick else Budget()
    return Budget(
        num_rows=config.num_rows or chosen.num_rows,
        decoys=config.decoys or chosen.decoys,
        most_secrets=chosen.most_secrets,
        most_windows=chosen.most_windows,
        samples=chosen.samples if config.samples is None else config.samples,
        sample_tokens=chosen.sample_tokens,
    )
