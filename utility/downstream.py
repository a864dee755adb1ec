#!/usr/bin/env python3
"""Train on synthetic, test on real: fine-tune the same base on each arm's rows and score it on rating real reviews.

python utility/downstream.py --model meta-llama/Llama-3.1-8B --real train.jsonl --heldout validation.jsonl \\
    --synthetic no_dp=generated_sequences_no_dp.jsonl dp=generated_sequences_with_dp.jsonl --output_dir utility-out

Every arm (real, and each of --synthetic) trains on the same number of rows, with run_peft.py's settings, and hence for
the same number of optimizer steps (which is checked). For each of --num_seeds seeds, rows are drawn and a model is
trained. A model rates a held-out real review by the most probable of the five labels "1" … "5" after the prompt: one
forward pass, no sampling. The prompt has only the review (truncated if it is long), not its title or product.

Writes to --output_dir:
results_utility.jsonl: one line per arm and seed (accuracy, macro-F1, mean absolute error in stars, exact McNemar p
against the real arm of that seed; relative_change and notes from training, such as "the model has hardly moved"), one
line per arm with mean and spread over seeds, one for the untuned base and one for the majority class of the real
training rows.
results_utility_rows.jsonl: true and predicted rating of every row, no text.
models/: the trained models. Reruns with the same settings keep them; output directories created with different settings
are rejected.
"""

import sys
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

from common import cli
from common.process import entry
from training.checkpoint import checkpoints
from training.config import TrainConfig
from training.run import run as fine_tune
from utility.config import DownstreamConfig


@dataclass(frozen=True, kw_only=True)
class Config(DownstreamConfig):
    """The flags of utility/downstream.py: what to compare, and how to train each arm."""

    model: str = TrainConfig.model
    epochs: int = TrainConfig.epochs
    learning_rate: float = TrainConfig.learning_rate
    per_device_batch_size: int = TrainConfig.per_device_batch_size
    gradient_accumulation_steps: int = TrainConfig.gradient_accumulation_steps
    warmup_steps: int = TrainConfig.warmup_steps
    peft_type: str = TrainConfig.peft_type
    lora_r: int = TrainConfig.lora_r
    lora_alpha: float = TrainConfig.lora_alpha
    max_length: int = TrainConfig.max_length


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Fine-tune one base on real and on synthetic reviews, and score it on rating held-out real ones.",
        "python utility/downstream.py -m MODEL --real train.jsonl --heldout test.jsonl --synthetic dp=dp.jsonl",
        Config,
    )
    add = parser.add_argument
    add("-m", "--model", help="hub name or directory of a causal LM")
    add("--real", required=True, metavar="FILE", help="review rows to train on (default: none, required)")
    add("--heldout", required=True, metavar="FILE", help="review rows to rate (default: none, required)")
    add(
        "--synthetic", nargs="+", action="extend", metavar="ARM=FILE", help="generated rows of each arm (default: none)"
    )
    cli.add_columns(parser)
    add("--num_rows", type=cli.positive_int, help="training rows per arm; None: as many as every arm has")
    add("--num_heldout", type=cli.positive_int, help="maximum held-out rows")
    add("--num_seeds", type=cli.positive_int, help="seeds: --seed, --seed + 1, …")
    add("--allow_overlap", action="store_true", help="allow arms generated from the metadata of held-out rows")
    add("--output_dir", help="directory for models and results")
    with parser.section("training, as in run_peft.py"):
        add("-e", "--epochs", type=cli.positive_int, help="passes over the rows")
        add("-lr", "--learning_rate", type=cli.non_negative_float, help="peak learning rate")
        add("-pdbs", "--per_device_batch_size", type=cli.positive_int, help="rows per forward pass")
        add("-gas", "--gradient_accumulation_steps", type=cli.positive_int, help="batches per optimizer step")
        add("-w", "--warmup_steps", type=cli.non_negative_int, help="steps until the peak learning rate")
        add("-pt", "--peft_type", choices=("lora", "dora", "pissa"), help="kind of adapter")
        add("--lora_r", type=cli.positive_int, help="rank")
        add("--lora_alpha", type=cli.positive_float, help="the update is scaled by alpha / r")
        add("--max_length", type=cli.positive_int, help="maximum tokens per row; longer ones are truncated")
    cli.add_model_flags(parser)
    return parser


def training_config(config: Config, file: Path, seed: int) -> TrainConfig:
    """run_peft.py's configuration for one arm and seed; only --input and --seed differ between them."""
    shared = {field.name for field in fields(TrainConfig)} - {"allow_overlap", "columns"}  # mean something else there
    return replace(
        TrainConfig(**{key: value for key, value in vars(config).items() if key in shared}),
        input=str(file),
        output_root=str(Path(config.output_dir) / "models"),
        seed=seed,
        loss_on="completion",
        logging_steps=10,
        resume=True,
    )


def train(config: Config, file: Path, seed: int) -> Path:
    """Train on a file of instruction rows, for one arm and seed; return the last checkpoint."""
    return checkpoints(fine_tune(training_config(config, file, seed)))[-1]


def run(config: Config) -> None:
    """Train and rate every arm."""
    from utility.tstr import run as compare

    compare(config, partial(train, config))


def main(argv: list[str] | None = None) -> int:
    run(make_parser().parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(entry(main))
