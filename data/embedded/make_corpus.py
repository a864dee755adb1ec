#!/usr/bin/env python3
"""Write the embedded mail corpus: rows about fictional people, and the text that mini-pythia is pre-trained on.

python data/embedded/make_corpus.py                                # enron.jsonl + outsiders.jsonl, as committed
python data/embedded/make_corpus.py --output_dir X                 # the same two files elsewhere
python data/embedded/make_corpus.py --pretraining_output text.txt  # also the text that make_model.py trains on

Everything is invented: names are random pairs of Faker's first and last names, domains are under the reserved .example
and .test, messages are filled-in templates (phrases.json). Three sets of text have no message in common:

* enron.jsonl: one row per person, in random order, so that the evaluated head and the training rows have the same
  distribution;
* the pre-training text: other mails, address lists and pages in which the same people occur between 0 and 30 times
  (the row's field `mentions`), half of them under five;
* outsiders.jsonl: rows of the same form about people who occur nowhere else (the control group).
"""

import sys

from common import cli
from common.process import entry
from data.embedded.config import CorpusConfig


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Write the embedded mail corpus about fictional people.",
        "python data/embedded/make_corpus.py --output_dir corpus",
        CorpusConfig,
    )
    add = parser.add_argument
    add("--output_dir", help="where the two files go; None: next to this script")
    add("--pretraining_output", help="also write the pre-training text, {mails, web}, to this json file")
    add("--people", type=cli.positive_int, help="rows of enron.jsonl")
    add("--outsiders", type=cli.positive_int, help="rows of outsiders.jsonl")
    add("--web_pages", type=cli.positive_int, help="pages of the pre-training text without corpus people")
    add("--seed", type=int, help="seed of all text")
    cli.add_dry_run(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    config = make_parser().parse_args(argv)
    from data.embedded.corpus import run

    run(config)
    return 0


if __name__ == "__main__":
    sys.exit(entry(main))
