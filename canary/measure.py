#!/usr/bin/env python3
"""Leakage of the canaries that inject.py inserted: in generated rows, in the model, and compared with its ε.

python canary/measure.py --canaries train_canaries_key.jsonl --output_dir canary-out \\
    --models no_dp=run/checkpoint-276 with_dp=run-dp/checkpoint-276 \\
    --synthetic no_dp=generated_sequences_no_dp.jsonl with_dp=generated_sequences_with_dp.jsonl
python canary/measure.py --canaries key.jsonl --synthetic dp=generated_sequences_with_dp.jsonl     # the text alone
torchrun --nproc_per_node=4 canary/measure.py --canaries key.jsonl --models dp=run-dp/checkpoint-276

Every line of results_canary.jsonl has a `measure`:
count        generated rows that contain a name, street, phone or whole canary, verbatim and normalised, by number of
             repetitions, with 95 % Clopper–Pearson intervals and Fisher's p against the other arms.
exposure     in bits: the total NLL of the secret's tokens in the canary's own context, ranked against other secrets in
             the same context; by number of repetitions, including held-out canaries. Chance: mean 1.44, median 1 bit.
audit        lower bound on ε from one run (Steinke et al. 2023) on the audit canaries. Signal: how much training raised
             the log-probability of the canary's sentence in its row; of its secret alone for the family new_token. What
             the other of the two gives is in `other_score`, and decides nothing. Reported with the accountant's ε
             (privacy.json) and the bound if every guess were correct (`power`). Beside it, in `f_dp`, the bounds of
             Mahloujifar et al. (2024): `epsilon_delta` holds for any training, `gaussian` if it is a Gaussian
             mechanism.
audit_text   the same bound without the model: the signal is a 2-gram model of the generated rows, or similarity to
             them. `headline` marks the signal to report, fixed in advance so that nobody picks the larger of the two.
text_auc     how well that signal separates inserted from held-out canaries, by number of repetitions.
A signal that is the same for all audit canaries gives no bound: null, and `undefined` says why. The same holds for
canaries that were never trained on (run_peft.py's trained_rows.jsonl records which rows were used and what was
truncated or masked), and for so few canaries that the bound would be 0 were every guess right (`lower_undefined`, by
level). Canaries that --max_length would truncate are excluded from the audit whether inserted or not, so the coin flips
of the others stay fair. A lower bound above the accountant's ε is flagged at 95 %; at 99.9 % the exit status is 1: that
ε is wrong. Steinke's bound decides this, not those beside it.

results_canary_rows.jsonl has one line per canary and arm (no text), run_canary.json describes the run.
"""

import sys

from canary.config import MeasureConfig
from common import cli
from common.process import entry


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Leakage and exposure of canaries, and lower bounds on ε.",
        "python canary/measure.py --canaries key.jsonl --models dp=run/checkpoint-276 --synthetic dp=dp.jsonl",
        MeasureConfig,
    )
    add = parser.add_argument
    add("--canaries", required=True, metavar="KEY", help="key file of canary/inject.py (default: none, required)")
    add("--models", nargs="+", action="extend", metavar="ARM=MODEL", help="adapter or model of each arm")
    add("--synthetic", nargs="+", action="extend", metavar="ARM=FILE", help="generated rows of each arm")
    add("--ref_model", help="the model before training (default: the base of an adapter)")
    add("--references", type=cli.positive_int, help="number of other secrets to rank against (at most all of them)")
    add("--output_dir", help="directory for the results")
    add("--overwrite", action="store_true", help="replace existing results")
    cli.add_base_model(parser, "every adapter")
    cli.add_model_flags(parser)
    cli.add_parallel_flag(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    config = make_parser().parse_args(argv)
    from canary.measurement import run

    return 1 if run(config)["violations"] else 0


if __name__ == "__main__":
    sys.exit(entry(main))
