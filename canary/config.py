"""The configurations of canary/inject.py, canary/measure.py and canary/auxiliary.py."""

from dataclasses import dataclass

from common.cli import MeasuringConfig, ModelConfig, QuantizedConfig


@dataclass(frozen=True, kw_only=True)
class InjectConfig:
    """At least one of share, repetitions and audit is set."""

    input: str = "./data/amazon/train.jsonl"
    output: str | None = None  # None: <input>_canaries.jsonl
    key_file: str | None = None  # None: <output>_key.jsonl
    share: float | None = None
    repetitions: tuple[int, ...] = ()
    canaries: int = 10  # per count in repetitions
    audit: int = 0
    privacy_unit: str = "record"
    family: str = "template"
    generator: str | None = None  # of family model: what it is sampled from
    temperature: float = 1.0
    secret: str = "phone"  # of a template
    within: int = 400  # 0: anywhere in the review
    condition: str = "metadata"
    columns: tuple[str, ...] = ()  # NEW=OLD
    model: str | None = None  # whose tokenizer renders chat rows, and has the tokens of some families
    chat_template: str | None = None  # None: the tokenizer's own
    overwrite: bool = False
    seed: int = 3407
    dry_run: bool = False


@dataclass(frozen=True, kw_only=True)
class MeasureConfig(MeasuringConfig, QuantizedConfig):
    """At least one of models and synthetic is set."""

    canaries: str  # the key file
    models: tuple[str, ...] | None = None  # ARM=MODEL
    synthetic: tuple[str, ...] | None = None  # ARM=FILE
    ref_model: str | None = None  # None: the base of an adapter
    base_model: str | None = None
    references: int = 1000
    output_dir: str = "./"
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class AuxiliaryConfig(ModelConfig):
    """What canary/auxiliary.py measures; the script adds the training flags."""

    model: str
    canaries: str  # the key file
    synthetic: tuple[str, ...]  # ARM=FILE
    output_dir: str = "./auxiliary-out"
