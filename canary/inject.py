#!/usr/bin/env python3
"""Insert canaries into the rows of a training file, and write the key that measure.py reads.

python canary/inject.py --input data/amazon/train.jsonl --repetitions 1 2 4 8 16          # ladder, 10 canaries each
python canary/inject.py --input data/amazon/train.jsonl --share 0.01      # System S: one canary, in 1 % of rows
python canary/inject.py --input data/amazon/train.jsonl --audit 1000 --privacy_unit user # for the one-run ε bound

A canary is a sentence with a secret, by --family:
template     about an invented person; the secret is drawn from a space of known size (--secret)
random       words drawn one by one from those that are single tokens of --tokenizer: 6, then a secret of 8
model        what --generator writes at --temperature after a row's prompt: 6 words, and the rest is the secret
new_token    the first words of some row, then a token of --tokenizer that occurs in no row, another for each canary

It is inserted at a random position in the part of a row that the loss is taken on (a review, a completion, an output,
the last answer of a chat), never at its start. Every canary of --repetitions and --share has a held-out counterpart
that is not inserted anywhere. The three modes can be combined: a row holds at most one canary.

--audit M: M canaries, each inserted once with probability ½ into a row of its own (with --privacy_unit user, the first
row of a user of its own). If a canary is not inserted, its row (with user, all rows of its user) is removed as well:
the two possible files differ by one added or removed unit, which is the accountant's notion of ε. About M/2 units are
removed.

Writes --output (rows), its manifest, and --key_file (mode 0600: each canary's location, secret and context).
"""

import sys

from canary.canaries import FAMILIES, LEAST_TEMPERATURE, SECRETS
from canary.config import InjectConfig
from common import cli
from common.process import entry


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Insert canaries into a training file.",
        "python canary/inject.py --input data/amazon/train.jsonl --repetitions 1 2 4 8 16",
        InjectConfig,
    )
    add = parser.add_argument
    add("-i", "--input", "--data", help="rows to train on, of any shape")
    add("--output", help="the .jsonl file to train on (default: <input>_canaries.jsonl)")
    add("--key_file", help="the .jsonl key (default: <output>_key.jsonl)")
    add("--share", type=cli.positive_float, help="one canary in this share of the rows: 0.01, 0.1, 1")
    add("--repetitions", nargs="+", type=cli.positive_int, help="ladder: number of rows per canary")
    add("--canaries", type=cli.positive_int, help="canaries per count in --repetitions")
    add("--audit", type=cli.positive_int, help="canaries inserted once with probability 1/2")
    add("--privacy_unit", choices=("record", "user"), help="unit that --audit adds or removes")
    add("--family", choices=FAMILIES, help="where canaries come from (see above)")
    add("--generator", metavar="MODEL", help="for model: what canaries are sampled from; not the model to be trained")
    add("--temperature", type=cli.positive_float, help=f"for model: of sampling, at least {LEAST_TEMPERATURE}")
    add("--secret", choices=SECRETS, help="the secret part of a template; text: random words, no personal data")
    add(
        "--within",
        type=cli.non_negative_int,
        help="insert within the first N characters of a review, answer, …; 0: anywhere",
    )
    add("--condition", choices=("metadata", "title"), help="title: prompts include the review's title")
    cli.add_columns(parser)
    add(
        "--model",
        "--tokenizer",
        help="for chat rows, random and new_token: the model that will be trained, for its tokenizer",
    )
    add("--chat_template", metavar="FILE", help="for chat rows: a Jinja file, or chatml (default: the tokenizer's own)")
    add("--overwrite", action="store_true", help="replace existing files")
    cli.add_dry_run(parser)
    add("--seed", type=cli.seed, help="random seed, also of the coin flips")
    return parser


def main(argv: list[str] | None = None) -> int:
    config = make_parser().parse_args(argv)
    from canary.injection import run

    run(config)
    return 0


if __name__ == "__main__":
    sys.exit(entry(main))
