#!/usr/bin/env python3
"""Split Amazon Reviews 2023 into train.jsonl, test.jsonl and validation.jsonl, with no user in more than one of them.

python data/amazon/prepare.py --reviews Office_Products.jsonl.gz --meta meta_Office_Products.jsonl.gz \\
    --output_dir data/amazon/office
python data/amazon/prepare.py --reviews r.jsonl --meta m.jsonl --train 1000 --test 100 --memory_limit 600MB --strict

DuckDB works out of core: its tables are in a hidden folder in --output_dir, which needs about the size of the
uncompressed reviews and is removed at the end (after a killed run, by the next one).

Rows: `System prompt`, `Rating` (1–5), `Review Title`, `Review`, `Product Title`, `Product Categories` (`categories`
joined by ' > ', else `main_category`, else ''), `row_id` (position among the non-blank lines of --reviews, from 0) and
`user_id`. In texts, `<br>` becomes a line break and HTML references are decoded.

Dropped and counted: lines that are not reviews; reviews without a user, without a rating of 1 to 5, with an empty text
or without their product (joined on parent_asin); and duplicates: of rows that agree in every published field, whoever
wrote them, the first is kept. An empty title or category is no reason to drop a row.

A number, list, object or bool is not text: a line with one as `text`, `title` or `parent_asin` counts as broken, and
such a category as absent ('broken categories'). A `user_id` is read as in `common.dataset.user_of`: 5, 5.0, "5" and
" 5" are the same user; anything but text or an integer makes the line broken.

Split: users are sorted by a seeded hash of their id; each goes, with all of their reviews, to train if they still fit,
else to test if they fit, else to validation, until train and test have exactly --train and --test rows. If no remaining
user fits, a file stays smaller, and the report says so. Train does not depend on --test. Rows within a file are sorted
by a seeded hash of their content. Neither depends on --threads.

`user_id` is 16 hexadecimal digits of MD5 over the seed and the original id: it keeps the original out of the files and
groups the rows, but it is only a pseudonym: whoever has the source can re-identify the person, from the text too.
"""

import sys

from common import cli
from common.process import entry
from data.amazon.config import PrepareConfig


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Build train, test and validation files, split by user, from Amazon Reviews 2023 and its product metadata.",
        "python data/amazon/prepare.py --reviews Office_Products.jsonl.gz --meta meta_Office_Products.jsonl.gz",
        PrepareConfig,
    )
    parser.add_argument(
        "--reviews", required=True, metavar="FILE", help="<Category>.jsonl or .jsonl.gz (default: none, required)"
    )
    parser.add_argument(
        "--meta", required=True, metavar="FILE", help="meta_<Category>.jsonl or .jsonl.gz (default: none, required)"
    )
    parser.add_argument("--output_dir", help="directory for the three files")
    parser.add_argument("--train", type=cli.positive_int, help="rows of train.jsonl")
    parser.add_argument("--test", type=cli.positive_int, help="rows of test.jsonl; the rest goes to validation.jsonl")
    parser.add_argument("--memory_limit", help="memory limit of DuckDB, which spills to disk beyond it")
    parser.add_argument("--threads", type=cli.non_negative_int, help="threads; 0: one per core")
    parser.add_argument("--strict", action="store_true", help="fail if an input line is malformed")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    cli.add_dry_run(parser)
    parser.add_argument("--seed", type=cli.seed, help="seed for the split, the order and the user hashes")
    return parser


def main(argv: list[str] | None = None) -> int:
    config = make_parser().parse_args(argv)
    from data.amazon.run import run

    run(config)
    return 0


if __name__ == "__main__":
    sys.exit(entry(main))
