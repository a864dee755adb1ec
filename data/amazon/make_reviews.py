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
import contextlib
import gzip
import random
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from common import cli, dataset, results

RATINGS = {5: 0.63, 4: 0.14, 3: 0.08, 2: 0.05, 1: 0.10}
EMPTY = 0.003  # shares of reviews
DUPLICATE = 0.01
MISSING_PRODUCT = 0.005
HTML = 0.1
NO_CATEGORIES = 0.04  # shares of products; half of them have no main category either
NO_MAIN_CATEGORY = 0.5

# noun, categories below the main one, use, parts (each with a good and a bad thing to say about it)
KINDS = (
    ("kettle", "Kitchen|Small Appliances|Kettles", "tea before work", (
        ("handle", "stays cool", "gets far too hot"), ("lid", "closes with a firm click", "never closes properly"),
        ("spout", "pours without a drip", "drips all over the table"), ("switch", "is easy to reach", "broke off"))),
    ("frying pan", "Kitchen|Cookware|Pans", "eggs on Sunday", (
        ("coating", "lets nothing stick", "came off in flakes"), ("base", "heats evenly", "warped on the stove"),
        ("handle", "sits well in the hand", "came loose"), ("rim", "is smooth all round", "has sharp edges"))),
    ("desk lamp", "Home|Lighting|Desk Lamps", "reading at night", (
        ("light", "is warm and bright", "flickers all the time"), ("arm", "holds every position", "sinks slowly"),
        ("foot", "stands firmly", "tips over"), ("dimmer", "works smoothly", "stopped working"))),
    ("backpack", "Luggage|Backpacks", "the daily train ride", (
        ("zipper", "runs smoothly", "jams at every corner"), ("straps", "are soft and wide", "cut into the shoulder"),
        ("lining", "feels strong", "tore at the seam"), ("pocket", "fits a bottle", "is too small for anything"))),
    ("headphones", "Electronics|Audio|Headphones", "long calls", (
        ("sound", "is clear and full", "is thin and noisy"), ("ear pads", "are soft for hours", "hurt after a while"),
        ("battery", "lasts all week", "is empty by noon"), ("cable", "does not tangle", "broke at the plug"))),
    ("garden hose", "Garden|Watering|Hoses", "the tomato beds", (
        ("nozzle", "gives a fine spray", "leaks on my shoes"), ("hose", "never kinks", "kinks with every step"),
        ("connector", "fits at once", "does not fit our tap"), ("reel", "rolls up easily", "cracked in the sun"))),
    ("puzzle", "Toys|Puzzles", "rainy afternoons", (
        ("pieces", "fit together neatly", "bend and fall apart"), ("picture", "is beautiful", "is dark and blurred"),
        ("box", "is sturdy", "arrived crushed"), ("colours", "are bright", "look washed out"))),
    ("yoga mat", "Sports|Fitness|Yoga Mats", "morning exercise", (
        ("surface", "has a good grip", "is slippery"), ("foam", "is thick and soft", "is paper thin"),
        ("strap", "keeps it rolled", "tore in a week"), ("smell", "was gone in a day", "is awful even now"))),
    ("shampoo", "Beauty|Hair Care|Shampoo", "dry hair", (
        ("scent", "is fresh and light", "is much too strong"), ("foam", "rinses out quickly", "leaves a film"),
        ("bottle", "opens with one hand", "leaked in the parcel"), ("formula", "leaves hair soft", "itches badly"))),
    ("dog bed", "Pets|Dogs|Beds", "our old terrier", (
        ("cover", "washes well", "ripped in the first wash"), ("filling", "keeps its shape", "went flat"),
        ("bottom", "does not slide", "slides on the floor"), ("stitching", "is neat and strong", "came undone"))),
    ("notebook", "Office|Paper|Notebooks", "lecture notes", (
        ("paper", "takes ink without bleeding", "lets the ink through"), ("binding", "lies flat", "lost its pages"),
        ("cover", "feels solid", "bent in my bag"), ("ruling", "is fine and even", "is printed askew"))),
    ("door mat", "Home|Entryway|Door Mats", "muddy boots", (
        ("bristles", "clean well", "fall out by the handful"), ("back", "grips the floor", "slides on tiles"),
        ("edge", "stays flat", "curls up"), ("print", "still looks new", "faded in a month"))),
)  # fmt: skip
DEPARTMENTS = sorted({path.split("|")[0] for _, path, _, _ in KINDS})
TITLES = {
    5: ("Love this {noun}", "Excellent {noun}", "Perfect for {use}", "Best {noun} we ever had"),
    4: ("Very good {noun}", "Good {noun}, one small flaw", "Nearly perfect", "Happy with it"),
    3: ("It is okay", "An average {noun}", "Does the job, no more", "Mixed feelings"),
    2: ("Disappointed", "Not a good {noun}", "Expected more", "Poor quality for the price"),
    1: ("Do not buy this {noun}", "Terrible", "Waste of money", "Sent it back"),
}
OPENINGS = (
    "I bought this {noun} for {use}.", "My {person} gave me this {noun} for {use}.",
    "We have used the {brand} {noun} for {time} now.", "This {noun} replaced our old one {time} ago.",
    "I wanted a {colour} {noun} for {use}.", "After {time} with this {noun} I can judge it.",
)  # fmt: skip
CLOSINGS = {
    5: ("I would buy it again at once.", "Highly recommended!", "My {person} wants one too.", "Five stars."),
    4: ("Still a good buy.", "I would recommend it to my {person}.", "Only that keeps it from five stars."),
    3: ("For the price it is all right.", "I may look for another one.", "Neither good nor bad."),
    2: ("I would not buy it again.", "My {person} has a better one.", "I had hoped for more from {brand}."),
    1: ("It went straight into the bin.", "I want my money back.", "Stay away from {brand}."),
}
PERSONS = ("sister", "neighbour", "father", "daughter", "roommate", "colleague", "aunt", "best friend")
TIMES = ("two weeks", "a month", "three months", "half a year", "a whole year", "ten days")
COLOURS = ("green", "blue", "grey", "red", "black", "white", "yellow")
ADJECTIVES = ("Classic", "Compact", "Deluxe", "Everyday", "Large", "Light", "Premium", "Simple", "Travel")
SYLLABLES = ("bar", "del", "fen", "gor", "hal", "kin", "lum", "mor", "nel", "pra", "quil", "ros", "tam", "vel", "zor")
GOOD_PARTS = {5: (1, 1), 4: (1, 0), 3: (1, 0), 2: (0, 0), 1: (0, 0)}  # which of the two mentioned parts are good


@dataclass(frozen=True, kw_only=True)
class MakeReviewsConfig:
    """The flags of data/amazon/make_reviews.py."""

    output_dir: str = "./data/amazon/fictional"
    category: str = "Fictional_Goods"
    reviews: int = 10000
    products: int = 600
    departments: tuple[str, ...] = tuple(DEPARTMENTS)
    users: int = 0
    gzip: bool = False
    overwrite: bool = False
    seed: int = 3407
    dry_run: bool = False


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


def code(rng: random.Random, length: int) -> str:
    return "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", k=length))


def make_product(rng: random.Random, number: int, main: str, kind: tuple) -> dict:
    noun, path, _, parts = kind
    brand = "".join(rng.choices(SYLLABLES, k=2)).title()
    quote = "&#34;" if rng.random() < HTML else " inch" if rng.random() < 0.3 else ""
    size = f", {rng.randint(5, 40)}{quote}" if quote else ""
    known = rng.random() >= NO_CATEGORIES
    return {
        "main_category": main if known or rng.random() >= NO_MAIN_CATEGORY else None,
        "title": f"{brand} {rng.choice(ADJECTIVES)} {noun.title()}{size}, {rng.choice(COLOURS).title()}",
        "average_rating": round(rng.uniform(3.4, 4.9), 1),
        "rating_number": rng.randint(1, 5000),
        "features": [f"{part.capitalize()} that {good}" for part, good, _ in parts[:2]],
        "description": [],
        "price": round(rng.uniform(5, 90), 2) if rng.random() < 0.7 else None,
        "images": [],
        "store": brand,
        "categories": [main.replace("_", " "), *path.split("|")] if known else [],
        "details": {"Brand": brand},
        "parent_asin": f"B{number:09d}",
    }


def make_text(rng: random.Random, rating: int, kind: tuple, brand: str) -> tuple[str, str]:
    """(title, text) of a review in the tone of `rating` about a product of this kind (see KINDS)."""
    noun, _, use, parts = kind
    words = {"noun": noun, "use": use, "brand": brand}
    words |= {"person": rng.choice(PERSONS), "time": rng.choice(TIMES), "colour": rng.choice(COLOURS)}
    sentences = [rng.choice(OPENINGS)] if rng.random() < 0.8 else []
    count = rng.choice((1, 2, 2, 2))
    for part, good in zip(rng.sample(parts, count), GOOD_PARTS[rating]):
        link = "but the" if sentences and rating in (3, 4) and not good else "the"
        sentences.append(f"{link} {part[0]} {part[1] if good else part[2]}.".capitalize())
    sentences.append(rng.choice(CLOSINGS[rating]))
    separator = " "
    if rng.random() < HTML:
        sentences.append("The shop calls it &#34;{colour} &amp; sturdy&#34;.")
        separator = rng.choice(("<br />", "<br /><br />", " "))
    return rng.choice(TITLES[rating]).format(**words), separator.join(sentences).format(**words)


def make_review(rng: random.Random, products: list[dict], kinds: list[tuple], users: list[str], counts) -> dict:
    rating = rng.choices(list(RATINGS), weights=list(RATINGS.values()))[0]
    number = int(
        len(products) * rng.random() ** 2
    )  # skewed: a few products have many of the reviews (and so do a few users)
    title, text = make_text(rng, rating, kinds[number % len(kinds)], products[number]["store"])
    asin = products[number]["parent_asin"]
    if rng.random() < EMPTY:
        text, counts["empty"] = rng.choice(("", "  ", "<br />")), counts["empty"] + 1
    elif rng.random() < MISSING_PRODUCT:
        asin, counts["missing product"] = f"X{number:09d}", counts["missing product"] + 1
    return {
        "rating": float(rating),
        "title": title,
        "text": text,
        "images": [],
        "asin": asin,
        "parent_asin": asin,
        "user_id": users[int(len(users) * rng.random() ** 3)],
        "timestamp": rng.randint(1_400_000_000_000, 1_690_000_000_000),
        "helpful_vote": int(rng.expovariate(1.5)),
        "verified_purchase": rng.random() < 0.9,
    }


def pack(file) -> gzip.GzipFile:
    """A gzip writer on an open file, without name and time, so that equal content gives equal bytes."""
    return gzip.GzipFile(filename="", mode="wb", fileobj=file, compresslevel=6, mtime=0)


def run(config: MakeReviewsConfig) -> dict:
    """Write both files; return {'reviews': path, 'meta': path, 'counts': the planted irregularities}."""
    ending = ".jsonl.gz" if config.gzip else ".jsonl"
    reviews, meta = (Path(config.output_dir) / f"{prefix}{config.category}{ending}" for prefix in ("", "meta_"))
    with results.output_file(reviews, meta, dry_run=config.dry_run) as locked:
        problems = cli.Problems()
        settings = dataset.settings_of(config, ("output_dir",))
        named = [("--output_dir", path) for path in (reviews, meta)]
        finished = problems.absorb(dataset.finished, named, settings, config.overwrite)
        cli.check_writable(config.output_dir, problems)
        problems.check()
        counts = None
        if finished:
            dataset.say_finished(reviews, meta)
        elif config.dry_run:
            print(f"would write {config.reviews:,} lines to {reviews}, {config.products:,} to {meta}")
        else:
            with locked.publication() as files:
                counts = write(files, config, reviews, meta, settings)
            print(f"{config.products:>12,}  lines in {meta}\n{config.reviews:>12,}  lines in {reviews}")
    return {"reviews": reviews, "meta": meta, "counts": counts}


def write(files: results.Publication, config: MakeReviewsConfig, reviews: Path, meta: Path, settings: dict) -> dict:
    """Write both files and their manifests; return the counts of planted irregularities."""
    rng = random.Random(config.seed)
    kinds = [kind for kind in KINDS for _ in range(config.departments.count(kind[1].split("|")[0]))]
    products = [
        make_product(rng, number, config.category, kinds[number % len(kinds)]) for number in range(config.products)
    ]
    users = [f"A{code(rng, 27)}" for _ in range(config.users or max(1, config.reviews // 2))]
    counts, last = Counter(), None
    for path, rows in ((meta, config.products), (reviews, config.reviews)):
        with files.open(path, "wb") as file:
            with pack(file) if config.gzip else contextlib.nullcontext(file) as out:
                for number in range(rows):
                    if path == meta:
                        line = results.dumps(products[number])
                    elif last and rng.random() < DUPLICATE:
                        line, counts["duplicates"] = last, counts["duplicates"] + 1
                    else:
                        spoiled = counts["empty"] + counts["missing product"]
                        line = results.dumps(make_review(rng, products, kinds, users, counts))
                        last = line if counts["empty"] + counts["missing product"] == spoiled else None
                    out.write(line.encode() + b"\n")
        dataset.write_manifest(
            files,
            path,
            tag="fictional-reviews" if path == reviews else "fictional-products",
            script="data/amazon/make_reviews.py",
            argv=sys.argv,
            rows=rows,
            generator="templates",
            sampling={"seed": config.seed, "put in": dict(counts) if path == reviews else None},
            settings=settings,
        )
    return dict(counts)


def main(argv: list[str] | None = None) -> int:
    run(make_parser().parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(cli.entry(main))
