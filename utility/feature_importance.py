#!/usr/bin/env python3
"""Do models trained on synthetic reviews rely on the same words as a model trained on real reviews?

python utility/feature_importance.py --real train.jsonl --heldout test.jsonl \\
    --synthetic no_dp=generated_sequences_no_dp.jsonl dp=generated_sequences_with_dp.jsonl --output_dir utility-out

A TF-IDF logistic regression learns the rating from each arm's rows, the same number for every arm. Its vocabulary is
the words in at least --min_rows held-out rows; others cannot have any importance there. The importance of a word is the
expected increase in log-loss on the same held-out real rows when its column is shuffled; the expectation is over all
shuffles and hence noise-free. Each arm is compared with the model trained on one half of the real rows. `real` is the
other half (the ceiling; no user is in both halves), `null` the first half with shuffled ratings. Agreement is Spearman
and Pearson over all words and Jaccard of the most important ones, repeated over --num_seeds draws of rows. `sd` is the
spread over these draws: an arm with no more rows than are used is the same in every draw, so its `sd` only reflects the
draw of the real half.

Writes feature_importance.json and run_feature_importance.json to --output_dir.
"""

import sys

from common import cli
from common.process import entry
from utility.config import ImportanceConfig


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Compare word importances between models trained on synthetic and on real reviews.",
        "python utility/feature_importance.py --real train.jsonl --heldout test.jsonl --synthetic dp=dp.jsonl",
        ImportanceConfig,
    )
    add = parser.add_argument
    add("--real", required=True, metavar="FILE", help="review rows to train on (default: none, required)")
    add("--heldout", required=True, metavar="FILE", help="review rows to measure on (default: none, required)")
    add("--synthetic", nargs="+", action="extend", metavar="ARM=FILE", help="generated rows an arm (default: none)")
    cli.add_columns(parser)
    add("--num_rows", type=cli.positive_int, help="rows per arm; None: as many as every arm has")
    add("--num_heldout", type=cli.positive_int, help="maximum held-out rows")
    add("--min_rows", type=cli.positive_int, help="minimum held-out rows that contain a word")
    add("--num_seeds", type=cli.positive_int, help="draws of rows: --seed, --seed + 1, …")
    add("--output_dir", help="directory for the results")
    add("--overwrite", action="store_true", help="replace an existing feature_importance.json")
    cli.add_dry_run(parser)
    add("--seed", type=cli.seed, help="seed of everything random")
    return parser


def main(argv: list[str] | None = None) -> int:
    config = make_parser().parse_args(argv)
    from utility.importance import run

    run(config)
    return 0


if __name__ == "__main__":
    sys.exit(entry(main))
