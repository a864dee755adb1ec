#!/usr/bin/env python3
"""Train the embedded models: a byte-level BPE and two GPT-NeoX language models, from scratch, on one CPU.

python data/embedded/make_model.py --size mini --bf16             # mini-pythia: what quickstart.py attacks
python data/embedded/make_model.py --size xl --bf16               # mini-pythia-xl: its larger sibling, the generator
python data/embedded/make_model.py --output_dir X --max_steps 99  # a short trial elsewhere

The text is make_corpus.py's: several passes over the mails, then web pages alone, as a web model saw its mail long
before its training ended. Both models have the same tokenizer. Weights are trained in fp32 and rounded to fp16 once,
when they are saved, so that loading them as fp32 is exact; config.json says float32, which is what `from_pretrained`
then loads by default. maker.json next to the weights records settings and losses.
"""

import sys

from common import cli
from common.process import entry
from data.embedded.config import SIZES, MakeModelConfig


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Train mini-pythia or mini-pythia-xl from scratch on the embedded corpus.",
        "python data/embedded/make_model.py --size mini --bf16",
        MakeModelConfig,
    )
    add = parser.add_argument
    add("--size", choices=sorted(SIZES), help="which of the two models")
    add("--output_dir", help="where to save; None: next to this script")
    add("--vocab_size", type=cli.positive_int, help="tokens of the BPE")
    add("--epochs", type=cli.positive_int, help="passes over the mails")
    add("--mixed_pages", type=cli.positive_int, help="new web pages mixed into each pass")
    add("--last_pages", type=cli.positive_int, help="new web pages after the last pass")
    add("--last_mails", type=cli.positive_int, help="mails among those last pages")
    add("--window", type=cli.positive_int, help="tokens per training sequence")
    add("--batch_size", type=cli.positive_int, help="sequences per step")
    add("--learning_rate", type=cli.positive_float, help="peak of the schedule")
    add("--last_factor", type=cli.positive_float, help="share of the peak in the last stage")
    add("--bf16", action="store_true", help="multiply matrices in bf16 (faster where the CPU has it)")
    add("--weight_decay", type=cli.positive_float, help="on matrices only")
    add("--max_steps", type=cli.positive_int, help="stop after so many steps; None: the whole schedule")
    add("--corpus_seed", type=int, help="seed given to make_corpus.py")
    add("--seed", type=int, help="seed of weights and order")
    cli.add_dry_run(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    config = make_parser().parse_args(argv)
    from data.embedded.model import run

    run(config)
    return 0


if __name__ == "__main__":
    sys.exit(entry(main))
