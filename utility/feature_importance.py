#!/usr/bin/env python3
"""Do models trained on synthetic reviews rate by the same words as one trained on real reviews?

python utility/feature_importance.py --real train.jsonl --heldout test.jsonl \\
    --synthetic no_dp=generated_sequences_no_dp.jsonl dp=generated_sequences_with_dp.jsonl --output_dir utility-out

A TF-IDF logistic regression learns the rating from each arm's rows, equally many of each. Its words are those in at
least --min_rows held-out rows: others have no importance there. The importance of a word is the expected rise of the
log-loss on the same held-out real rows when its column is shuffled: the expectation over all shuffles, without noise.
Each arm is compared with the model of one half of the real rows. `real` is the other half (the ceiling; no user is in
both halves), `null` the first half with its ratings shuffled. Spearman and Pearson over all words, Jaccard of the most
important ones. Repeated over --num_seeds draws of rows. `sd` is the spread over these draws: an arm with no more rows
than are used is the same in each, so its `sd` shows the draw of the real half alone.

Writes feature_importance.json and run_feature_importance.json to --output_dir.
"""

import sys

from common import cli
from utility.config import ImportanceConfig


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Consistency of word importance between models trained on synthetic and on real reviews.",
        "python utility/feature_importance.py --real train.jsonl --heldout test.jsonl --synthetic dp=dp.jsonl",
        ImportanceConfig,
    )
    add = parser.add_argument
    add("--real", required=True, metavar="FILE", help="review rows to train on (default: none, required)")
    add("--heldout", required=True, metavar="FILE", help="review rows to measure on (default: none, required)")
    add("--synthetic", nargs="+", action="extend", metavar="ARM=FILE", help="generated rows an arm (default: none)")
    add("--num_rows", type=cli.positive_int, help="rows an arm; None: as many as all have")
    add("--num_heldout", type=cli.positive_int, help="held-out rows at most")
    add("--min_rows", type=cli.positive_int, help="held-out rows that a word must stand in")
    add("--num_seeds", type=cli.positive_int, help="draws of rows: --seed, --seed + 1, …")
    add("--output_dir", help="where the results are written")
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
    sys.exit(cli.entry(main))
