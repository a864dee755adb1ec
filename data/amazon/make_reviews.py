#!/usr/bin/env python3
"""Write fictional reviews and products in the Amazon Reviews 2023 format, for tests, quick trials and benchmarks.

python data/amazon/make_reviews.py --output_dir fictional                              # 10,000 reviews, 600 products
python data/amazon/make_reviews.py --output_dir big --reviews 5000000 --products 300000 --gzip

Files: `<Category>.jsonl` (rating, title, text, images, asin, parent_asin, user_id, timestamp, helpful_vote,
verified_purchase) and `meta_<Category>.jsonl` (main_category, title, average_rating, rating_number, features,
description, price, images, store, categories, details, parent_asin), .gz with --gzip.

Every product, brand and person is invented. A review mentions its product (the noun and two of its parts) in the tone
of its rating, so a model can learn both; --departments sets what the shop sells. As in the published data, 63 % of the
ratings are five stars, a few users write many of the reviews, and there are empty texts, exact duplicates, HTML
(`<br />`, `&#34;`, `&amp;`), products without categories and reviews whose product is missing. The manifest has the
count of each under `sampling`.
"""

import argparse
import sys

from common import cli
from common.process import entry
from data.amazon.config import MakeReviewsConfig
from data.amazon.phrases import DEPARTMENTS


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Write fictional reviews and products in the Amazon Reviews 2023 format.",
        "python data/amazon/make_reviews.py --output_dir fictional --reviews 10000 --products 600",
        MakeReviewsConfig,
    )
    parser.add_argument("--output_dir", help="directory for the two files")
    parser.add_argument("--category", type=category, help="main category, also used in the file names")
    parser.add_argument("--reviews", type=cli.positive_int, help="review lines")
    parser.add_argument("--products", type=cli.positive_int, help="product lines")
    parser.add_argument(
        "--departments",
        nargs="+",
        choices=DEPARTMENTS,
        help="departments that have products; listing one twice doubles its products",
    )
    parser.add_argument("--users", type=cli.non_negative_int, help="users; 0: one per two reviews")
    parser.add_argument("--gzip", action="store_true", help="write .jsonl.gz")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    cli.add_dry_run(parser)
    parser.add_argument("--seed", type=cli.seed, help="seed of everything random")
    return parser


def category(text: str) -> str:
    """argparse type: a valid file name."""
    if not text.replace("_", "").isalnum():
        raise argparse.ArgumentTypeError(f"letters, digits and underscores only, got {text!r}")
    return text


def main(argv: list[str] | None = None) -> int:
    config = make_parser().parse_args(argv)
    from data.amazon.shop import run

    run(config)
    return 0


if __name__ == "__main__":
    sys.exit(entry(main))
