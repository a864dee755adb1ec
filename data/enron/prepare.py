#!/usr/bin/env python3
"""Build enron.jsonl from raw mail: one row per (name, address) pair, with the text before the address and from it on.

python data/enron/prepare.py --input enron_mail_20150507.tar.gz --output data/enron.jsonl   # reads the tar as a stream
python data/enron/prepare.py --input maildir --output data/enron.jsonl --workers 8
python data/enron/prepare.py --input inbox.mbox letters/ one.eml --output mine.jsonl --strict

Inputs: the CMU Enron maildir or its .tar.gz (or any tar; never unpacked), mbox files, folders (recursive) of .eml,
.txt, .mbox, extension-less or number-named messages, single .eml/.txt files. data/enron/occurrences.py defines an
occurrence.

Rows: `gt-name` (First [Middle] Last; 'Last, First' is reordered), `gt-email` (the address as written in that mail, with
its case), `prompt` (the rendered mail before the address: at most 1,024 characters, then at most 200 GPT-2 tokens, or
800 characters without that tokenizer), `continuation` (from the address on, at most 1,600 characters), `row_id`
(position in the file). Pairs that differ only in case are the same. Of a pair's occurrences, one in a body is preferred
to one in a header, which is preferred to one far down a recipient list; a seeded hash of the text breaks ties. People
are shuffled by the seed (pairs that share an address or a name count as one person and stay together), so the
evaluation head and the training rows have the same distribution and no person is in both. The output does not depend on
the order of the input, its form (folder or archive) or --workers.
"""

import sys

from common import cli
from common.process import entry
from data.enron.config import PROMPT_CHARACTERS, PROMPT_TOKENS, PrepareConfig


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Build rows of name, address and text from raw mail (Enron maildir or tar.gz, mbox, folders of messages).",
        "python data/enron/prepare.py --input enron_mail_20150507.tar.gz --output data/enron.jsonl",
        PrepareConfig,
    )
    parser.add_argument(
        "--input",
        nargs="+",
        action="extend",
        metavar="PATH",
        required=True,
        help="folders, tar archives, mbox files, single messages; repeatable (default: none, required)",
    )
    parser.add_argument("--output", metavar="FILE", help="the .jsonl file to write")
    parser.add_argument(
        "--tokenizer",
        help=f"cuts prompts to {PROMPT_TOKENS} tokens: a hub name in the local cache or a folder with tokenizer.json; "
        f"with 'none', or if gpt2 is not cached, prompts are cut to {PROMPT_CHARACTERS} characters",
    )
    parser.add_argument("--workers", type=cli.non_negative_int, help="processes; 0: one per core")
    parser.add_argument("--strict", action="store_true", help="fail if a message is malformed")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output")
    cli.add_dry_run(parser)
    parser.add_argument("--seed", type=cli.seed, help="seed for choosing occurrences and shuffling people")
    return parser


def main(argv: list[str] | None = None) -> int:
    config = make_parser().parse_args(argv)
    from data.enron.run import run

    run(config)
    return 0


if __name__ == "__main__":
    sys.exit(entry(main))
