"""The run of data/amazon/make_reviews.py: products and reviews of a fictional shop, in the format of the real ones."""

import contextlib
import gzip
import random
import sys
from collections import Counter
from pathlib import Path
from typing import IO, Any

from common import json_files, locks, manifests
from common.problems import Problems, check_writable
from common.publication import Publication
from data.amazon.config import MakeReviewsConfig
from data.amazon.phrases import (
    ADJECTIVES,
    CLOSINGS,
    COLOURS,
    KINDS,
    OPENINGS,
    PERSONS,
    SYLLABLES,
    TIMES,
    TITLES,
    Kind,
)

RATINGS = {5: 0.63, 4: 0.14, 3: 0.08, 2: 0.05, 1: 0.10}
GOOD_PARTS = {5: (1, 1), 4: (1, 0), 3: (1, 0), 2: (0, 0), 1: (0, 0)}  # which of the two mentioned parts are good
EMPTY = 0.003  # shares of reviews
DUPLICATE = 0.01
MISSING_PRODUCT = 0.005
HTML = 0.1
NO_CATEGORIES = 0.04  # shares of products; half of them have no main category either
NO_MAIN_CATEGORY = 0.5

Row = dict[str, Any]


def run(config: MakeReviewsConfig) -> dict[str, Any]:
    """Write both files; return {'reviews': path, 'meta': path, 'counts': the planted irregularities}."""
    ending = ".jsonl.gz" if config.gzip else ".jsonl"
    reviews, meta = (Path(config.output_dir) / f"{prefix}{config.category}{ending}" for prefix in ("", "meta_"))
    with locks.output_file(reviews, meta, dry_run=config.dry_run) as target:
        problems = Problems()
        settings = manifests.settings_of(config, ("output_dir",))
        named = [("--output_dir", path) for path in (reviews, meta)]
        finished = problems.absorb(manifests.finished, named, settings, config.overwrite)
        check_writable(config.output_dir, problems)
        problems.check()
        counts: dict[str, int] | None = None
        if finished:
            manifests.say_finished(reviews, meta)
        elif config.dry_run:
            print(f"would write {config.reviews:,} lines to {reviews}, {config.products:,} to {meta}")
        else:
            with target.publication() as files:
                counts = write(files, config, reviews, meta, settings)
            print(f"{config.products:>12,}  lines in {meta}\n{config.reviews:>12,}  lines in {reviews}")
    return {"reviews": reviews, "meta": meta, "counts": counts}


def write(
    files: Publication, config: MakeReviewsConfig, reviews: Path, meta: Path, settings: dict[str, Any]
) -> dict[str, int]:
    """Write both files and their manifests; return the counts of planted irregularities."""
    rng = random.Random(config.seed)
    kinds = [kind for kind in KINDS for _ in range(config.departments.count(kind[1].split("|")[0]))]
    products = [
        make_product(rng, number, config.category, kinds[number % len(kinds)]) for number in range(config.products)
    ]
    users = [f"A{code(rng, 27)}" for _ in range(config.users or max(1, config.reviews // 2))]
    counts: Counter[str] = Counter()
    last: str | None = None
    for path, rows in ((meta, config.products), (reviews, config.reviews)):
        with files.open(path, "wb") as file:
            with pack(file) if config.gzip else contextlib.nullcontext(file) as out:
                for number in range(rows):
                    if path == meta:
                        line = json_files.dumps(products[number])
                    elif last and rng.random() < DUPLICATE:
                        line, counts["duplicates"] = last, counts["duplicates"] + 1
                    else:
                        spoiled = counts["empty"] + counts["missing product"]
                        line = json_files.dumps(make_review(rng, products, kinds, users, counts))
                        last = line if counts["empty"] + counts["missing product"] == spoiled else None
                    out.write(line.encode() + b"\n")
        manifests.write_manifest(
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


def code(rng: random.Random, length: int) -> str:
    """Random letters and digits."""
    return "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", k=length))


def make_product(rng: random.Random, number: int, main: str, kind: Kind) -> Row:
    """A line of the products' file; `number` makes its parent_asin."""
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


def make_text(rng: random.Random, rating: int, kind: Kind, brand: str) -> tuple[str, str]:
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


def make_review(
    rng: random.Random, products: list[Row], kinds: list[Kind], users: list[str], counts: Counter[str]
) -> Row:
    """A line of the reviews' file; adds what is wrong with it to `counts`."""
    rating = rng.choices(list(RATINGS), weights=list(RATINGS.values()))[0]
    number = int(len(products) * rng.random() ** 2)  # skewed: a few products (and users) have many of the reviews
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


def pack(file: IO[bytes]) -> gzip.GzipFile:
    """A gzip writer on an open file, without name and time, so that equal content gives equal bytes."""
    return gzip.GzipFile(filename="", mode="wb", fileobj=file, compresslevel=6, mtime=0)
