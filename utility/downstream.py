#!/usr/bin/env python3
"""Train on synthetic, test on real: the same base model learns to rate reviews from each arm's rows.

python utility/downstream.py --model meta-llama/Llama-3.1-8B --real train.jsonl --heldout validation.jsonl \\
    --synthetic no_dp=generated_sequences_no_dp.jsonl dp=generated_sequences_with_dp.jsonl --output_dir utility-out

Every arm (real, and each of --synthetic) trains on the same number of rows, with the settings of run_peft.py, and so
takes the same number of optimizer steps, which is checked. The rows are drawn, and a model is trained, once for each of
--num_seeds seeds. A model rates a held-out real review by the most probable of the five labels "1" … "5" after the
prompt: one forward pass, no sampling. The prompt contains only the review (its beginning, if it is long), not its title
or product.

Writes to --output_dir:
results_utility.jsonl: a line per arm and seed (accuracy, macro-F1, mean absolute error in stars, exact McNemar p
against the real arm of that seed; relative_change and notes of its training, such as "the model has hardly moved"), a
line per arm with mean and spread over seeds, one for the untuned base and one for the majority class of the real
training rows.
results_utility_rows.jsonl: truth and rating of every row, no text.
models/: the trained models. Another call with the same settings keeps them; one with other settings is refused.
"""

import sys
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

from common import cli
from training.checkpoint import checkpoints
from training.config import TrainConfig
from training.run import run as fine_tune
from utility.config import DownstreamConfig


@dataclass(frozen=True, kw_only=True)
class Config(DownstreamConfig):
    """The flags of utility/downstream.py: what is compared, and how each arm is trained."""

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
        "Fine-tune one base on real and on synthetic reviews, rate held-out real ones.",
        "python utility/downstream.py -m MODEL --real train.jsonl --heldout test.jsonl --synthetic dp=dp.jsonl",
        Config,
    )
    add = parser.add_argument
    add("-m", "--model", help="hub name or directory of a causal LM")
    add("--real", required=True, metavar="FILE", help="review rows to train on (default: none, required)")
    add("--heldout", required=True, metavar="FILE", help="review rows to rate (default: none, required)")
    add("--synthetic", nargs="+", action="extend", metavar="ARM=FILE", help="generated rows an arm (default: none)")
    add("--num_rows", type=cli.positive_int, help="training rows an arm; None: as many as all have")
    add("--num_heldout", type=cli.positive_int, help="held-out rows at most")
    add("--num_seeds", type=cli.positive_int, help="seeds: --seed, --seed + 1, …")
    add("--allow_overlap", action="store_true", help="allow arms made from the metadata of held-out rows")
    add("--output_dir", help="where models and results are written")
    with parser.section("training, as run_peft.py's"):
        add("-e", "--epochs", type=cli.positive_int, help="passes over the rows")
        add("-lr", "--learning_rate", type=cli.non_negative_float, help="peak learning rate")
        add("-pdbs", "--per_device_batch_size", type=cli.positive_int, help="rows held at once")
        add("-gas", "--gradient_accumulation_steps", type=cli.positive_int, help="batches of a step")
        add("-w", "--warmup_steps", type=cli.non_negative_int, help="steps until the full learning rate")
        add("-pt", "--peft_type", choices=("lora", "dora", "pissa"), help="kind of adapter")
        add("--lora_r", type=cli.positive_int, help="rank")
        add("--lora_alpha", type=cli.positive_float, help="the update is scaled by alpha / r")
        add("--max_length", type=cli.positive_int, help="tokens of a row; the rest is cut off")
    cli.add_model_flags(parser)
    return parser


def training_config(config: Config, file: Path, seed: int) -> TrainConfig:
    """run_peft.py's configuration for one arm and seed; only --input and --seed differ between them."""
    shared = {field.name for field in fields(TrainConfig)} - {"allow_overlap"}  # another overlap
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
    """The last checkpoint of the training of one arm and seed on a file of instruction rows."""
    return checkpoints(fine_tune(training_config(config, file, seed)))[-1]


def main(argv: list[str] | None = None) -> int:
    config = make_parser().parse_args(argv)
    from utility.tstr import run

    run(config, partial(train, config))
    return 0


if __name__ == "__main__":
    sys.exit(cli.entry(main))
