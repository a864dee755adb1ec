"""The configuration of the memorization measures."""

from dataclasses import dataclass

from memorization.inventory import KINDS
from memorization.verbatim import PREFIX, SUFFIX


@dataclass(frozen=True, kw_only=True)
class MemorizationConfig:
    """most_secrets: per type and side; samples: number of untargeted samples, of sample_tokens tokens each."""

    kinds: tuple[str, ...] = KINDS
    patterns: tuple[tuple[str, str], ...] = ()  # (custom type, regular expression)
    region: str = "US"
    decoys: int = 200
    most_secrets: int = 500
    most_windows: int = 1000
    prefix: int = PREFIX
    suffix: int = SUFFIX
    samples: int = 1000
    sample_tokens: int = 128
    max_length: int = 1024
    token_budget: int = 4096
    seed: int = 3407
