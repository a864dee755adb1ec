#!/usr/bin/env python3
"""Does my fine-tune leak? One model or adapter, its training rows, held-out rows of the same source: one verdict.

python audit.py --model ADAPTER --train train.jsonl --heldout heldout.jsonl --output_dir audit
python audit.py --model ADAPTER --train train.jsonl --heldout heldout.jsonl --quick
python audit.py --model MERGED --ref_model BASE --train train.jsonl --heldout heldout.jsonl \\
    --secrets secrets.csv --canaries key.jsonl --fail_on "membership.auc.low>0.6" "extraction.email.excess.low>0"
torchrun --nproc_per_node=4 audit.py --model ADAPTER --train train.jsonl --heldout heldout.jsonl

Measured are: membership (mia/); every secret in the training rows, by type, against decoys in its format and the
secrets of the held-out rows; verbatim continuation; untargeted samples; canaries if a key is given. audit.json has all
numbers, audit.md the verdict, results_secrets.jsonl one line per secret (no text). Exit status: 0; 2 for bad input; 3
if a condition of --fail_on holds or its number could not be measured.
"""

import sys

from auditing.config import PARTS, QUICK, AuditConfig, Budget
from common import cli
from common.process import entry


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Audit a fine-tuned model for leaks of its training data.",
        "python audit.py --model ADAPTER --train train.jsonl --heldout heldout.jsonl --output_dir audit",
        AuditConfig,
    )
    add = parser.add_argument
    full, quick = Budget(), QUICK
    with parser.section("model"):
        add("--model", required=True, help="adapter or model directory, or hub name (default: none, required)")
        cli.add_base_model(parser, "the adapter")
        add("--ref_model", help="the model before training (default: an adapter's base)")
        cli.add_model_flags(parser)
        cli.add_parallel_flag(parser)
        cli.add_engine_flag(parser)
    with parser.section("data"):
        add("--train", "--data", required=True, metavar="FILE", help="training rows (default: none, required)")
        words = "rows from the same source, held out of training by a random split; without them much cannot be judged"
        add("--heldout", metavar="FILE", help=words)
        cli.add_row_flags(parser)
        rows = f"rows used per file, sampled with --seed (default: {full.num_rows:,}; with --quick {quick.num_rows})"
        add("--num_rows", type=cli.positive_int, help=rows)
    with parser.section("attacks"):
        add(
            "--secrets",
            metavar="FILE",
            help="your own list of secrets instead of the detected ones: type,value[,row]",
        )
        add(
            "--pii",
            nargs="+",
            action="extend",
            metavar="NAME=REGEX",
            help="a custom type of secret; its first group, or all of it",
        )
        add("--region", help="country of phone numbers without a country code (ISO 3166)")
        words = "also names of persons, organisations and places, found by a spaCy model: its package or folder"
        add(
            "--ner",
            nargs="?",
            const="en_core_web_sm",
            metavar="MODEL",
            help=f"{words} (default: off; without MODEL en_core_web_sm)",
        )
        add("--canaries", metavar="KEY", help="key file of canary/inject.py, if its canaries were trained on")
        add("--decoys", type=cli.positive_int, help=f"decoys that a secret is ranked among (default: {full.decoys})")
        samples = f"unprompted samples (default: {full.samples:,}; with --quick {quick.samples})"
        add("--samples", type=cli.positive_int, help=samples)
        add("--without", nargs="+", metavar="PART", help=f"parts to skip, of {' '.join(PARTS)}")
        add("--quick", action="store_true", help="fewer rows, secrets and samples; two membership attacks")
        add("--max_length", type=cli.positive_int, help="tokens per row, as in training; longer rows are truncated")
        add("--token_budget", type=cli.positive_int, help="tokens per forward pass; lower it if memory runs out")
    with parser.section("output"):
        add("--output_dir", help="directory for the results")
        add(
            "--fail_on",
            nargs="+",
            action="extend",
            metavar="COND",
            help="exit with status 3 if it holds, e.g. membership.auc.low>0.6; paths: docs/audit.md",
        )
        add(
            "--save_responses",
            action="store_true",
            help="also write secrets_private.jsonl, with the secrets (mode 0600)",
        )
    return parser


def main(argv: list[str] | None = None) -> int:
    config = make_parser().parse_args(argv)
    from auditing.run import run

    return run(config)


if __name__ == "__main__":
    sys.exit(entry(main))
