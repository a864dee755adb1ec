"""The configuration of a training run, filled by the flags of run_peft.py."""

from dataclasses import dataclass

from common.cli import QuantizedConfig

SEED = 3407  # without --dp, which uses the operating system's entropy


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The adapter: rank r (capped at a layer's smaller dimension), scale alpha / r."""

    peft_type: str = "lora"
    lora_r: int = 64
    lora_alpha: float = 16
    lora_dropout: float | None = None  # None: 0.05, and 0 for PiSSA
    target_modules: tuple[str, ...] = ("all-linear",)


@dataclass(frozen=True, kw_only=True)
class DPConfig:
    """DP-SGD. With `dp`, exactly one of target_epsilon and noise_multiplier is set."""

    dp: bool = False
    target_epsilon: float | None = None
    noise_multiplier: float | None = None
    target_delta: float | None = None
    logical_batch_size: int | None = None
    accountant: str = "prv"
    privacy_unit: str = "record"
    max_rows_per_user: int = 16
    secure_rng: bool = False
    suggest_max_grad_norm: str | None = None


@dataclass(frozen=True, kw_only=True)
class TrainConfig(AdapterConfig, DPConfig, QuantizedConfig):
    """Every flag of run_peft.py, as recorded in run.json."""

    model: str = "EleutherAI/pythia-1.4b"
    input: str = "./data/enron.jsonl"
    per_device_batch_size: int = 1
    gradient_accumulation_steps: int = 8
    warmup_steps: int = 0
    epochs: int = 4
    learning_rate: float = 2e-6
    logging_steps: int = 1
    optimizer: str = "adamw_torch"
    weight_decay: float = 0
    scheduler: str = "linear"
    scheduler_kwargs: str = "{}"
    distribution_type: str = "ddp"
    hsdp: bool = False
    output_root: str = "./"
    run_name: str | None = None
    train_rows: int | None = None
    eval_rows: int = 0
    allow_overlap: bool = False
    max_length: int = 2048
    loss_on: str = "all"
    chat_template: str | None = None  # None: the tokenizer's own
    columns: tuple[str, ...] = ()  # NEW=OLD
    split: str | None = None  # of a data set on the hub
    data_config: str | None = None
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    packing: bool = False
    resume: bool = False
    report_to: str = "none"
    seed: int | None = None  # type: ignore[assignment]  # in other scripts the seed is never None
