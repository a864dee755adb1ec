"""Fine-tune a causal language model with LoRA, DoRA or PiSSA adapters, or fully.

    python run_peft.py -m EleutherAI/pythia-1.4b -i data/enron.jsonl -e 4 -lr 2e-6
    torchrun --nproc_per_node=4 run_peft.py -m EleutherAI/pythia-1.4b -i data/enron.jsonl -dt ddp
    torchrun --nproc_per_node=4 run_peft.py -m EleutherAI/pythia-12b -dt fsdp -pt dora --gradient_checkpointing
    python run_peft.py -m facebook/opt-1.3b -dt mp -pt pissa --resume
    python run_peft.py -m EleutherAI/pythia-1.4b -pdbs 16 --dp --target_epsilon 8 --logical_batch_size 512

Writes <output_root>/<model>/<data tag>-<peft type>/<weight decay>_<learning rate>[-<run name>]/ with

    checkpoint-<step>/   one per epoch: a plain PEFT adapter for the ORIGINAL base (--peft_type full: a model), the
                         tokenizer, and in the newest one training_state.pt for --resume
    metrics.jsonl        {step, epoch, loss, lr, grad_norm, tokens, time} every --logging_steps: loss is the mean over
                         the label tokens since the last line, tokens counts all trained tokens so far (no padding);
                         with --eval_rows also {step, epoch, eval_loss, eval_tokens, time}, before training and every
                         epoch
    run.json             arguments, versions, input, status; relative_change (‖ΔW‖/‖W‖), `notes` (if the model has
                         hardly moved), clip_slack (--dp: divisor of the clipping norm, 1 in float32); `trained`: rows,
                         tokens kept, loss_tokens, rows_cut and tokens_cut (by --max_length), rows_without_loss,
                         tokens_masked (by --loss_on); with the key of canary/inject.py beside the file also `canaries`:
                         placed, trained (the whole secret in some row), cut, masked, left_out (rows not trained on),
                         and secret_tokens and secret_tokens_trained of the rows trained on
    trained_rows.jsonl   one line per training row: hash, tokens, characters that the loss was taken on (common/trained)

One training loop for all modes. A step is one global batch of per_device_batch_size × gradient_accumulation_steps ×
processes rows, determined by (seed, epoch) alone; its loss is the mean over all its label tokens, so neither the number
of processes nor the split into micro-batches changes the update. ddp: every process holds the model. fsdp: the frozen
base is sharded over the processes (FSDP2), the adapters are replicated. In both, the adapters' gradients are summed
over the processes once per step. mp: one process spreads the layers over its GPUs (on a CPU machine they all stay on
one device).

--dp (DP-SGD) changes the batches (Poisson sampling of privacy units, in micro-batches of at most
--per_device_batch_size rows), the loss (the mean over each record's own tokens), the clipping (per unit) and adds
noise; nothing else. run.json has a `privacy` block, and every checkpoint a privacy.json with the ε spent up to it. The
state for --resume is in private/, which is removed at the end: its random secret would undo the noise. metrics.jsonl's
loss, batch, clipped, dropped and signal_to_noise (of the sum of clipped gradients) depend on the data and are not
covered by ε; do not publish them with the model.
"""

import sys
from collections.abc import Sequence

from common import cli
from common.process import entry
from training.config import SEED, TrainConfig


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Fine-tune a causal language model with LoRA, DoRA or PiSSA, or fully.",
        "torchrun --nproc_per_node=4 run_peft.py -m EleutherAI/pythia-1.4b -i data/enron.jsonl -pt lora -e 4 -lr 2e-6",
        TrainConfig,
    )
    add, section = parser.add_argument, parser.section
    with section("model"):
        add("-m", "--model", help="hub name or directory of a causal LM")
        seed = f"random seed (default: {SEED}; with --dp the operating system's entropy)"
        cli.add_model_flags(parser, seed)
    with section("data"):
        add("-i", "--input", "--data", help="training data: a file (.jsonl, .csv, .parquet, …), or a hub name")
        add(
            "--train_rows",
            "--num_rows",
            type=cli.positive_int,
            help="train on the last N rows; None: the published split",
        )
        add("--eval_rows", type=cli.non_negative_int, help="held-out rows to evaluate the loss on every epoch")
        add("--allow_overlap", action="store_true", help="allow training on rows that are evaluated elsewhere")
        add("--max_length", type=cli.positive_int, help="tokens per row; longer rows are truncated")
        add("--loss_on", choices=("all", "completion"), help="completion: only tokens after the row's prompt (and EOS)")
        cli.add_row_flags(parser)
        add("--packing", action="store_true", help="pack several rows into each sequence of max_length")
    with section("training"):
        add("-pdbs", "--per_device_batch_size", type=cli.positive_int, help="rows per micro-batch and process")
        add(
            "-gas",
            "--gradient_accumulation_steps",
            type=cli.positive_int,
            help="global batch = per_device_batch_size × this × processes",
        )
        add("-w", "--warmup_steps", type=cli.non_negative_int, help="steps until the full learning rate")
        add("-e", "--epochs", type=cli.positive_int, help="passes over the rows; one checkpoint each")
        add("-lr", "--learning_rate", type=cli.non_negative_float, help="peak learning rate")
        add("-opt", "--optimizer", help="optimizer, by its transformers name")
        add("-wd", "--weight_decay", type=cli.non_negative_float, help="applied to matrices, not vectors")
        add("-s", "--scheduler", help="learning-rate schedule, by its transformers name")
        add("--scheduler_kwargs", help='JSON object, for schedules that need more, e.g. {"min_lr": 1e-7}')
        add("--max_grad_norm", type=cli.positive_float, help="clip the gradient norm (--dp: per unit); inf: off")
        add(
            "-dt",
            "--distribution_type",
            choices=("ddp", "mp", "fsdp"),
            help="ddp: one model per process; fsdp: base sharded over processes; mp: layers over one process's GPUs",
        )
        add("--hsdp", action="store_true", help="fsdp on several nodes: shard inside a node, replicate across nodes")
        add("--gradient_checkpointing", action="store_true", help="recompute activations: less memory, more time")
    with section("adapter"):
        kinds = ("lora", "dora", "pissa", "full")
        add("-pt", "--peft_type", choices=kinds, help="full: train every parameter, no adapter")
        add("--lora_r", type=cli.positive_int, help="rank (capped at a layer's smaller dimension)")
        add("--lora_alpha", type=cli.positive_float, help="the update is scaled by alpha / r")
        add("--lora_dropout", type=cli.share, help="None: 0.05, and 0 for pissa")
        add(
            "--target_modules", nargs="+", help="module names, or all-linear: every linear layer except the output head"
        )
    with section("privacy"):
        add("--dp", action="store_true", help="DP-SGD: Poisson batches, per-unit clipping, noise")
        add("--target_epsilon", type=cli.positive_float, help="choose the noise for this ε after all epochs")
        add("--noise_multiplier", type=cli.non_negative_float, help="σ: noise std / --max_grad_norm")
        add("--target_delta", type=cli.positive_float, help="δ; None: 1 / (10 · privacy units)")
        add("--logical_batch_size", type=cli.positive_int, help="expected units per step; None: 256, or all")
        add("--accountant", choices=("prv", "rdp"), help="whose ε to target; both are recorded")
        add("--privacy_unit", choices=("record", "user"), help="user: all rows of one user_id")
        add("--max_rows_per_user", type=cli.positive_int, help="rows kept per user; the rest are dropped")
        add("--secure_rng", action="store_true", help="noise from a cryptographic stream")
        add(
            "--suggest_max_grad_norm",
            metavar="PUBLIC",
            help="with --dp: print per-record gradient norms on this (public) file and exit",
        )
    with section("output"):
        add("--output_root", "--output_dir", help="directory in which <model>/<data>-<type>/<decay>_<rate>/ is created")
        add("--run_name", help="appended to the run directory's name")
        add("-l", "--logging_steps", type=cli.positive_int, help="steps between lines of metrics.jsonl")
        add("--report_to", help="accelerate trackers, comma-separated: tensorboard,wandb,…")
        add("--resume", action="store_true", help="resume an unfinished run from its newest saved state")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    config = make_parser().parse_args(argv)
    from training.run import run

    run(config)
    return 0


if __name__ == "__main__":
    sys.exit(entry(main))
