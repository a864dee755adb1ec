#!/usr/bin/env python3
"""What generated rows reveal of the canaries, by a model trained on them: the attack of somebody who has only the text.

python canary/auxiliary.py -m EleutherAI/pythia-1.4b --canaries train_canaries_key.jsonl --output_dir auxiliary-out \\
    --synthetic no_dp=generated_sequences_no_dp.jsonl with_dp=generated_sequences_with_dp.jsonl

For each arm a fresh adapter is trained on its generated rows, with run_peft.py's settings; the model of the private
rows is not needed. A canary's score is how much this training raised the log-probability of its sentence in its row.
--model is a model that has not seen the private rows; the base of the generator is a good choice.

Every line of results_auxiliary.jsonl has a `measure`, as in canary/measure.py:
audit_text   lower bounds on ε from one run on the audit canaries, AUC, and the TPR where at most 1 % of the canaries
             that were not placed score as high. `signal`: auxiliary (the whole sentence; `headline`, fixed in advance),
             auxiliary, secret (the secret alone), and beside them 2-gram and similarity, which need no model.
text_auc     how well that signal separates inserted from held-out canaries, by number of repetitions.
What gives no bound is null, and `undefined` says why; the exit status is 1 if a headline bound exceeds the accountant's
ε at 99.9 %, as in canary/measure.py.

results_auxiliary_rows.jsonl has one line per canary and arm (no text), run_auxiliary.json describes the run, models/
holds the adapters and data/ what they were trained on. The same command resumes what was interrupted; an output
directory of a run with other settings is rejected.
"""

import sys
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

from canary.config import AuxiliaryConfig
from common import cli, process
from training.checkpoint import checkpoints
from training.config import TrainConfig
from training.run import run as fine_tune


@dataclass(frozen=True, kw_only=True)
class Config(AuxiliaryConfig):
    """The flags of canary/auxiliary.py: what to measure, and how to train on each arm's rows."""

    model: str = TrainConfig.model
    epochs: int = TrainConfig.epochs
    learning_rate: float = 2e-4  # of an adapter that is to remember a few hundred rows
    per_device_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    peft_type: str = TrainConfig.peft_type
    lora_r: int = TrainConfig.lora_r
    lora_alpha: float = TrainConfig.lora_alpha
    max_length: int = TrainConfig.max_length


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Lower bounds on ε from generated rows alone, by a model trained on them.",
        "python canary/auxiliary.py -m MODEL --canaries key.jsonl --synthetic dp=dp.jsonl --output_dir auxiliary-out",
        Config,
    )
    add = parser.add_argument
    add("-m", "--model", help="hub name or directory of a causal LM that has not seen the private rows")
    add("--canaries", required=True, metavar="KEY", help="key file of canary/inject.py (default: none, required)")
    add(
        "--synthetic",
        required=True,
        nargs="+",
        action="extend",
        metavar="ARM=FILE",
        help="generated rows of each arm (default: none, required)",
    )
    add("--output_dir", help="directory for models and results")
    with parser.section("training, as in run_peft.py"):
        add("-e", "--epochs", type=cli.positive_int, help="passes over the rows")
        add("-lr", "--learning_rate", type=cli.non_negative_float, help="peak learning rate")
        add("-pdbs", "--per_device_batch_size", type=cli.positive_int, help="rows per forward pass")
        add("-gas", "--gradient_accumulation_steps", type=cli.positive_int, help="batches per optimizer step")
        add("-pt", "--peft_type", choices=("lora", "dora", "pissa"), help="kind of adapter")
        add("--lora_r", type=cli.positive_int, help="rank")
        add("--lora_alpha", type=cli.positive_float, help="the update is scaled by alpha / r")
        add("--max_length", type=cli.positive_int, help="maximum tokens per row; longer ones are truncated")
    cli.add_model_flags(parser)
    return parser


def training_config(config: Config, file: Path) -> TrainConfig:
    """run_peft.py's configuration for one arm; only --input differs between them."""
    shared = {field.name for field in fields(TrainConfig)}
    return replace(
        TrainConfig(**{key: value for key, value in vars(config).items() if key in shared}),
        input=str(file),
        output_root=str(Path(config.output_dir) / "models"),
        loss_on="completion",
        logging_steps=10,
        resume=True,
    )


def train(config: Config, file: Path) -> Path:
    """Train on a file of rows; return the last checkpoint."""
    return checkpoints(fine_tune(training_config(config, file)))[-1]


def run(config: Config) -> int:
    """Train and score every arm; returns the exit status."""
    from canary.text_model import run as measure

    return 1 if measure(config, partial(train, config))["violations"] else 0


def main(argv: list[str] | None = None) -> int:
    return run(make_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(process.entry(main))
