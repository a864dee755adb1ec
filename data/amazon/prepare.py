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

import argparse
import contextlib
import html
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from common import cli, dataset, results

SPLITS = ("train", "test", "validation")
REASONS = ("broken", "without a user", "without a rating", "empty text")
SYSTEM_PROMPT = "Write a customer's review of the product below that fits its categories and the star rating."
WHITESPACE = " \t\n\r\v\f\u00a0\u2003\u2028\u2029\u200b\u3000\ufeff"
LINE_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)
REFERENCE = re.compile(r"&(?:#\d+|#[xX][0-9a-fA-F]+|[A-Za-z][A-Za-z0-9]*);")
MEMORY = re.compile(r"(\d+\.?\d*)\s*([KMGT]i?B)", re.IGNORECASE)
REVIEW_COLUMNS = {"rating": "VARCHAR", "title": "JSON", "text": "JSON", "parent_asin": "JSON", "user_id": "JSON"}
PRODUCT_COLUMNS = {"parent_asin": "JSON", "title": "JSON", "main_category": "JSON", "categories": "JSON"}
# {field: (macro that reads it, its kind)}; a line is broken if such a field is neither null nor of its kind
READ_BY = {
    "title": ("text_of", "text"),
    "text": ("text_of", "text"),
    "parent_asin": ("text_of", "text"),
    "user_id": ("user_of", "text or a whole number"),
}


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """The flags of data/amazon/prepare.py."""

    reviews: str
    meta: str
    output_dir: str = "./data/amazon"
    train: int = 100000
    test: int = 10000
    memory_limit: str = "1.2GB"
    threads: int = 0
    strict: bool = False
    overwrite: bool = False
    seed: int = 3407
    dry_run: bool = False


def make_parser() -> argparse.ArgumentParser:
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


@lru_cache(1 << 12)
def decoded(reference: str) -> str:
    """The character of an HTML reference (cached, because few occur)."""
    return html.unescape(reference)


def clean(text: str) -> str:
    """Turn <br> into line breaks, decode complete HTML references (once), remove NULs and outer white space."""
    if "<" in text:
        text = LINE_BREAK.sub("\n", text)
    if "&" in text:
        text = REFERENCE.sub(lambda match: decoded(match[0]), text)
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "").strip(WHITESPACE)


def user_key(user_id: str) -> str | None:
    """The user of a JSON-encoded user_id (see `dataset.user_of`): "" for blank text, None if it is invalid."""
    try:
        value = json.loads(user_id)
    except ValueError:  # an integer of thousands of digits
        return None
    return dataset.user_of({"user_id": value}) or ("" if isinstance(value, str) else None)


def take_users(users: Iterable[tuple[int, int]], sizes: list[int]) -> tuple[list[list[int]], list[int]]:
    """Fill sides of `sizes` rows with whole users.

    `users` yields (user, number of rows) in split order. A user goes to the first side with room for all of their rows;
    users that fit nowhere are skipped. Returns (users of each side, rows missing in each side).
    """
    sides, room = [[] for _ in sizes], list(sizes)
    for user, rows in users:
        side = next((side for side, free in enumerate(room) if rows <= free), None)
        if side is not None:
            sides[side].append(user)
            room[side] -= rows
        if not any(room):
            break
    return sides, room


def largest_deviation(part: dict[int, int], whole: dict[int, int]) -> float:
    """Largest difference between a rating's share in `part` and in `whole` ({rating: rows}), in percentage points."""
    if not part:
        return 0.0
    shares = (part.get(rating, 0) / sum(part.values()) - n / sum(whole.values()) for rating, n in whole.items())
    return round(100 * max(map(abs, shares)), 2)


def is_gzip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def damage(path: Path) -> str | None:
    """What is wrong with a .gz file, after reading all of it, or None. Needed because DuckDB does not check the CRC."""
    import gzip
    import zlib

    try:
        with gzip.open(path, "rb") as file:
            while file.read(1 << 20):
                pass
    except (OSError, EOFError, zlib.error) as error:
        return str(error)
    return None


def broken_line(path: Path, wanted: list[int]) -> list[str]:
    """'broken line PATH:NUMBER: reason' for positions among the non-blank lines of a file."""
    import gzip

    lines = []
    with (gzip.open if is_gzip(path) else open)(path, "rb") as file:
        filled = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        for position, (number, line) in enumerate(itertools.islice(filled, max(wanted) + 1)):
            if position in wanted:
                lines.append(f"broken line {path}:{number}: {reason_of(line)}")
    return lines


def reason_of(line: bytes) -> str:
    """Why a line is broken, without its text."""
    try:
        row = json.loads(line)
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
        return f"not JSON ({str(error).split(':')[0]})"
    if line.startswith(b"\xef\xbb\xbf"):
        return "starts with a byte order mark; save the file without one"
    for field, (_, kind) in READ_BY.items():
        value = row.get(field) if isinstance(row, dict) else None
        known = user_key(json.dumps(value)) is not None if field == "user_id" else isinstance(value, str)
        if value is not None and not known:
            return f"field '{field}' must be {kind}, not {type(value).__name__}"
    return "not one JSON object with the fields of this format"


def destinations(config: PrepareConfig) -> dict[str, Path]:
    """{split: output path}."""
    return {split: Path(config.output_dir) / f"{split}.jsonl" for split in SPLITS}


def check(config: PrepareConfig) -> tuple[dict, bool]:
    """(settings for the manifests, whether all outputs already exist); one UserError with every problem of the
    arguments and files, or else one with every damaged .gz."""
    from concurrent.futures import ThreadPoolExecutor

    problems = cli.Problems()
    inputs = {"--reviews": Path(config.reviews), "--meta": Path(config.meta)}
    for flag, path in inputs.items():
        if not path.is_file():
            what = "is a directory, not a file" if path.is_dir() else "no such file"
            problems.add(f"{flag} {path}: {what}; pass a .jsonl or .jsonl.gz file")
            continue
        try:
            is_gzip(path)
        except OSError as error:
            problems.add(f"{flag} {path}: cannot be read ({error.strerror})")
    if os.path.realpath(inputs["--reviews"]) == os.path.realpath(inputs["--meta"]):
        problems.add(f"--meta {config.meta}: the same file as --reviews; pass the meta_… file of the category")
    amount = MEMORY.fullmatch(config.memory_limit.strip())
    if not amount or float(amount[1]) == 0:
        problems.add(f"--memory_limit {config.memory_limit}: expected a number and a unit, e.g. 800MB or 1.2GB")
    outputs = destinations(config)
    for path in outputs.values():
        if any(os.path.realpath(path) == os.path.realpath(source) for source in inputs.values()):
            problems.add(f"--output_dir {config.output_dir}: {path} is also an input; choose another directory")
        elif path.is_dir():
            problems.add(f"--output_dir {config.output_dir}: {path} is a directory; remove it or choose another place")
    if "?" in str(Path(config.output_dir).absolute()):
        problems.add(f"--output_dir {config.output_dir}: DuckDB cannot use a path with '?'; choose another directory")
    cli.check_writable(config.output_dir, problems)
    settings = None
    if not problems.lines:
        hashes = {flag.removeprefix("--"): results.sha256(path) for flag, path in inputs.items()}
        settings = dataset.settings_of(config, ("output_dir", "threads", "memory_limit"), **hashes)
    named = [("--output_dir", path) for path in outputs.values()]
    finished = problems.absorb(dataset.finished, named, settings, config.overwrite)
    problems.check()  # report mistyped flags before reading gigabytes
    if finished:
        return settings, True
    packed = {flag: path for flag, path in inputs.items() if is_gzip(path)}
    with ThreadPoolExecutor() as pool:  # zlib releases the GIL
        for (flag, path), reason in zip(packed.items(), pool.map(damage, packed.values())):
            if reason:
                problems.add(f"{flag} {path}: damaged ({reason}); download it again")
    problems.check()
    return settings, False


def connect(folder: Path, config: PrepareConfig):
    """Connect to a new database in `folder` and define the functions and variables that the statements use."""
    import duckdb
    import pyarrow as pa

    options = {"memory_limit": config.memory_limit, "temp_directory": str(folder / "spill")}
    options |= {"threads": config.threads} if config.threads else {}
    connection = duckdb.connect(folder / "work.duckdb", config=options)
    connection.execute("SET autoinstall_known_extensions = false")
    connection.execute("SET enable_progress_bar = false")
    connection.execute("SET force_compression = 'uncompressed'")  # the tables are short-lived
    for name, value in {"seed": str(config.seed), "system_prompt": SYSTEM_PROMPT}.items():
        connection.execute(f"SET VARIABLE {name} = ?", [value])

    def of_columns(function):
        return lambda column: pa.array([function(text) for text in column.to_pylist()], pa.string())

    for name, function in {"clean_in_python": clean, "user_in_python": user_key}.items():
        connection.create_function(
            name,
            of_columns(function),
            ["VARCHAR"],
            "VARCHAR",
            type="arrow",
            null_handling="special",  # may return None, but never receives it
        )
    # most texts need no Python: they have no reference, tag, carriage return or NUL, and visible ASCII at both ends
    connection.execute(
        r"""CREATE MACRO cleaned(field) AS CASE
                WHEN regexp_matches(field, '[&<\r\x00]|^[^!-~]|[^!-~]$') THEN clean_in_python(field)
                ELSE coalesce(field, '') END"""
    )
    connection.execute("CREATE MACRO one_line(field) AS replace(cleaned(field), chr(10), ' ')")
    # for JSON columns, in which null is NULL; faster than json_type
    connection.execute("CREATE MACRO is_text(field) AS starts_with(field::VARCHAR, chr(34))")
    connection.execute("CREATE MACRO text_of(field) AS CASE WHEN is_text(field) THEN field->>'$' END")
    connection.execute(
        r"""CREATE MACRO user_of(field) AS CASE
                WHEN regexp_full_match(field::VARCHAR, '"[!#-\[\]-~]+"') THEN (field::VARCHAR)[2:-2]
                WHEN field IS NOT NULL THEN user_in_python(field::VARCHAR) END"""
    )
    return connection


def load(connection, flag: str, path: Path, columns: dict[str, str], table: str, select: str) -> tuple[int, int]:
    """Create `table` by applying `select` to the lines of a file, in order; return (lines, broken lines).

    columns: {field: type}. A line is broken if it has none of them (DuckDB turns a line that is not a JSON object into
    a row of NULLs) or if a field is not of the kind that READ_BY requires. `select` must keep the column `broken` and
    must not need a join (as a long IN list does), which would lose the line order: rowid is the position among the
    non-blank lines.
    """
    import duckdb

    kinds = ", ".join(f"{column}: '{kind}'" for column, kind in columns.items())
    all_null = " AND ".join(f"{column} IS NULL" for column in columns)
    values = {column: f"{READ_BY[column][0]}({column})" for column in columns if column in READ_BY}
    of_another_kind = " OR ".join(f"({column} IS NOT NULL AND {value} IS NULL)" for column, value in values.items())
    replaced = ", ".join(f"{value} AS {column}" for column, value in values.items())
    compression = "gzip" if is_gzip(path) else "none"
    name = str(path.absolute()).replace("'", "''")
    # DuckDB treats * ? [ in a name as a glob pattern; brackets escape them
    name = re.sub(r"[*?\[]", lambda match: f"[{match[0]}]", name)
    try:
        connection.execute(
            f"""CREATE TABLE {table} AS
                SELECT {select} FROM (
                    SELECT * REPLACE ({replaced}), ({all_null}) OR {of_another_kind} AS broken
                    FROM read_json('{name}', format = 'newline_delimited', ignore_errors = true,
                                   compression = '{compression}', columns = {{{kinds}}}))"""
        )
    except (duckdb.IOException, duckdb.InvalidInputException) as error:
        raise cli.UserError(f"{flag} {path}: cannot be read ({str(error).splitlines()[0]})") from None
    lines, broken = connection.execute(f"SELECT count(*), count(*) FILTER (broken) FROM {table}").fetchall()[0]
    if lines == broken:
        first = f" ({broken_line(path, [0])[0]})" if lines else ""
        raise cli.UserError(f"{flag} {path}: no line is a row with {', '.join(columns)}{first}")
    return lines, broken


def report_broken(connection, path: Path, table: str, broken: int, strict: bool) -> None:
    """Show the first broken lines of a file; with `strict`, fail."""
    if not broken:
        return
    query = f"SELECT rowid FROM {table} WHERE broken ORDER BY rowid LIMIT {cli.SHOWN_BROKEN}"
    lines = broken_line(path, [position for (position,) in connection.execute(query).fetchall()])
    cli.report_broken(f"lines in {path}", lines, broken, strict)


def load_inputs(connection, config: PrepareConfig) -> dict[str, int]:
    """Create the tables `review` (cleaned, with the reason if a row is dropped) and `product` (one row per
    parent_asin); return the counts."""
    reviews, meta = Path(config.reviews), Path(config.meta)
    lines, broken = load(
        connection,
        "--reviews",
        reviews,
        REVIEW_COLUMNS,
        "review",
        """broken,
           try_cast(rating AS DOUBLE) AS stars, one_line(title) AS headline, cleaned(text) AS body, parent_asin,
           ('0x' || left(md5(getvariable('seed') || ':' || user_id), 16))::UBIGINT AS "user",
           CASE WHEN broken THEN 'broken'
                WHEN coalesce(user_id, '') = '' THEN 'without a user'
                WHEN stars IS NULL OR stars NOT BETWEEN 1 AND 5 OR stars <> floor(stars) THEN 'without a rating'
                WHEN body = '' THEN 'empty text' END AS reason""",
    )
    report_broken(connection, reviews, "review", broken, config.strict)
    products, broken_products = load(
        connection,
        "--meta",
        meta,
        PRODUCT_COLUMNS,
        "meta",
        """broken, parent_asin, one_line(title) AS title, one_line(text_of(main_category)) AS main_category,
           CASE WHEN json_type(categories) = 'ARRAY' THEN categories->'$[*]' ELSE [] END AS members,
           [name FOR name IN [one_line(text_of(member)) FOR member IN members] IF name <> ''] AS categories,
           ifnull(NOT is_text(main_category), false)::INTEGER
           + ifnull(json_type(categories) <> 'ARRAY', false)::INTEGER
           + len([member FOR member IN members IF json_type(member) NOT IN ('VARCHAR', 'NULL')]) AS absent""",
    )
    report_broken(connection, meta, "meta", broken_products, config.strict)
    # of several lines about a product, use the first
    connection.execute(
        """CREATE TABLE product AS
           SELECT parent_asin, arg_min(title, rowid) AS title,
                  arg_min(CASE WHEN len(categories) > 0 THEN array_to_string(categories, ' > ')
                               ELSE main_category END, rowid) AS categories
           FROM meta WHERE NOT broken AND trim(coalesce(parent_asin, '')) <> '' GROUP BY parent_asin"""
    )
    absent = connection.execute("SELECT coalesce(sum(absent), 0)::BIGINT FROM meta WHERE NOT broken").fetchall()[0][0]
    connection.execute("DROP TABLE meta")
    dropped = dict(connection.execute("SELECT reason, count(*) FROM review WHERE reason <> '' GROUP BY ALL").fetchall())
    return {
        "review lines": lines,
        **{reason: dropped.get(reason, 0) for reason in REASONS},
        "product lines": products,
        "broken product lines": broken_products,
        **({"broken categories": absent} if absent else {}),
        "products": connection.execute("SELECT count(*) FROM product").fetchall()[0][0],
    }


def keep_rows(connection) -> dict[str, int]:
    """Create the table `kept` (key, row, user, rating): the distinct joined rows; `key` is an MD5 over seed and row."""
    connection.execute(
        """CREATE TABLE kept AS
           SELECT key, min(row) AS row, arg_min("user", row) AS "user", any_value(stars) AS rating, count(*) AS n
           FROM (SELECT review.rowid AS row, "user", stars::UTINYINT AS stars,
                        md5_number(concat_ws(chr(31), getvariable('seed'), stars::UTINYINT, headline, body,
                                             product.title, product.categories)) AS key
                 FROM review JOIN product USING (parent_asin) WHERE reason IS NULL)
           GROUP BY key"""
    )
    rows, joined = connection.execute("SELECT count(*), coalesce(sum(n), 0)::BIGINT FROM kept").fetchall()[0]
    usable = connection.execute("SELECT count(*) FROM review WHERE reason IS NULL").fetchall()[0][0]
    return {"without their product": usable - joined, "duplicates": joined - rows, "rows": rows}


def assign(connection, sizes: list[int]) -> list[int]:
    """Create the table `side` ("user", split) of train and test users; return the rows missing in each of the two."""
    cursor = connection.cursor()
    cursor.execute('SELECT "user", count(*) FROM kept GROUP BY "user" ORDER BY "user"')
    users = itertools.chain.from_iterable(iter(lambda: cursor.fetchmany(10000), []))
    sides, lacking = take_users(users, sizes)
    cursor.close()
    connection.execute('CREATE TABLE side ("user" UBIGINT, split VARCHAR)')
    for split, side in zip(SPLITS, sides):
        connection.execute("INSERT INTO side SELECT unnest(?::UBIGINT[]), ?", [side, split])
    return lacking


def stratification(connection) -> dict[str, dict]:
    """{split: {'rows', 'users', 'ratings': {rating: rows}, 'largest_deviation_points': versus all rows}}."""
    counted = connection.execute(
        """SELECT coalesce(split, 'validation') AS split, rating, count(*)
           FROM kept LEFT JOIN side USING ("user") GROUP BY ALL ORDER BY ALL"""
    ).fetchall()
    users = dict(connection.execute("SELECT split, count(*) FROM side GROUP BY split").fetchall())
    everyone = connection.execute('SELECT count(DISTINCT "user") FROM kept').fetchall()[0][0]
    users |= {"validation": everyone - sum(users.values()), "all": everyone}
    ratings = {split: {} for split in (*SPLITS, "all")}
    for split, rating, n in counted:
        ratings[split][rating] = n
        ratings["all"][rating] = ratings["all"].get(rating, 0) + n
    return {
        split: {
            "rows": sum(n_by_rating.values()),
            "users": users.get(split, 0),
            "ratings": dict(sorted(n_by_rating.items())),
            "largest_deviation_points": largest_deviation(n_by_rating, ratings["all"]),
        }
        for split, n_by_rating in ratings.items()
    }


def write_split(connection, split: str, file) -> int:
    """Write the JSON lines of a split to an open binary file, sorted by key; return how many."""
    lines = connection.sql(
        """SELECT to_json({'System prompt': getvariable('system_prompt'), 'Rating': kept.rating,
                           'Review Title': headline, 'Review': body, 'Product Title': product.title,
                           'Product Categories': product.categories, 'row_id': row,
                           'user_id': printf('%016x', kept."user")})::VARCHAR || chr(10) AS line
           FROM kept JOIN review ON review.rowid = kept.row JOIN product USING (parent_asin)
                LEFT JOIN side ON side."user" = kept."user"
           WHERE coalesce(side.split, 'validation') = ? ORDER BY key""",
        params=[split],
    )
    rows = 0
    for batch in lines.to_arrow_reader(10000):
        file.write("".join(batch.column(0).to_pylist()).encode())
        rows += batch.num_rows
    return rows


def run(config: PrepareConfig) -> dict:
    """Build the three files; return the counts, which are also printed and written to run_prepare.json; {} if they are
    there already."""
    started = time.monotonic()
    folder, outputs = Path(config.output_dir), destinations(config)
    with results.output_file(*outputs.values(), dry_run=config.dry_run) as locked:
        settings, finished = check(config)
        if finished:
            dataset.say_finished(*outputs.values())
            return {}
        if config.dry_run:
            print(f"would read {config.reviews} and {config.meta} and write {', '.join(map(str, outputs.values()))}")
            return {}
        return build(config, started, folder, outputs, settings, locked)


@contextlib.contextmanager
def enough_memory(config: PrepareConfig):
    """Raise a UserError if DuckDB needs more than --memory_limit within the block."""
    import duckdb

    try:
        yield
    except duckdb.OutOfMemoryException as error:
        reason = str(error).splitlines()[0]
        raise cli.UserError(f"--memory_limit {config.memory_limit}: not enough ({reason}); increase it") from None


def plan(connection, config: PrepareConfig) -> tuple[dict[str, int], list[int], dict[str, dict]]:
    """(counts, rows missing in train and test, `stratification`); UserError if the inputs cannot fill the files."""
    counts = load_inputs(connection, config)
    counts |= keep_rows(connection)
    if counts["rows"] < config.train + config.test:
        raise cli.UserError(
            f"--train {config.train} --test {config.test}: only {counts['rows']} of {counts['review lines']} "
            f"reviews are left after cleaning; request fewer"
        )
    lacking = assign(connection, [config.train, config.test])
    splits = stratification(connection)
    if not splits["train"]["rows"]:
        raise cli.UserError(
            f"--train {config.train}: each of the {splits['all']['users']} remaining users has more reviews than "
            "that, and users are not split; increase it, or pass a file with more users"
        )
    return counts, lacking, splits


def build(
    config: PrepareConfig, started: float, folder: Path, outputs: dict[str, Path], settings: dict, locked
) -> dict:
    import duckdb

    inputs = [Path(config.reviews), Path(config.meta)]
    record = results.Run(folder / "run_prepare.json", config, inputs=inputs, output=locked)
    record["packages"]["duckdb"] = duckdb.__version__
    with (
        enough_memory(config),
        results.temporary_folder(folder, "prepare") as work,
        connect(Path(work), config) as connection,
    ):
        counts, lacking, splits = plan(connection, config)
        with record:  # opened only now, so that rejected inputs do not replace the record of existing outputs
            for split, path in outputs.items():
                with record.files.open(path, "wb", 0o600) as file:
                    assert write_split(connection, split, file) == splits[split]["rows"], split
            source = [(inputs[0], counts["review lines"]), (inputs[1], counts["product lines"])]
            sampling = {"seed": config.seed, "split": "whole users in the order of a seeded hash"}
            for split, path in outputs.items():
                dataset.write_manifest(
                    record.files,
                    path,
                    tag=f"amazon-{split}",
                    script="data/amazon/prepare.py",
                    argv=sys.argv,
                    rows=splits[split]["rows"],
                    source=source,
                    sampling={**sampling, "users": splits[split]["users"]},
                    settings=settings,
                )
            speed = round(counts["review lines"] / (time.monotonic() - started), 1)
            result = {**counts, "lacking": dict(zip(SPLITS, lacking)), "reviews_per_s": speed}
            result["peak_bytes"] = results.peak_memory()["cpu_bytes"]
            record["counts"] = result
            record["stratification"] = splits
    report(result, splits, config)
    return {**result, "splits": splits}


def report(result: dict, splits: dict, config: PrepareConfig) -> None:
    def line(key: str, words: str) -> None:
        print(f"{result[key]:>12,}  {words}")

    line("review lines", f"reviews in {config.reviews}")
    for reason in (*REASONS, "without their product", "duplicates"):
        line(reason, f"dropped: {reason}")
    line("rows", "rows")
    line("products", f"products in {result['product lines']:,} lines ({result['broken product lines']:,} broken)")
    if "broken categories" in result:
        line("broken categories", "categories left out: not text")
    ratings = sorted(splits["all"]["ratings"])
    print(
        f"{'':>12} {'rows':>11} {'users':>11}" + "".join(f" {f'{rating} star':>7}" for rating in ratings) + "  off by"
    )
    for split, numbers in splits.items():
        shares = "".join(f" {numbers['ratings'].get(r, 0) / max(1, numbers['rows']):>7.2%}" for r in ratings)
        deviation = f"{numbers['largest_deviation_points']:>5.2f} points" if split != "all" else ""
        print(f"{split:>12} {numbers['rows']:>11,} {numbers['users']:>11,}{shares}  {deviation}")
    for split, missing in result["lacking"].items():
        if missing:
            print(f"{split} is {missing:,} rows short: no remaining user has so few rows, and users are not split")
    print(f"{result['reviews_per_s']:,.0f} reviews/s, peak memory {result['peak_bytes'] / 1e6:,.0f} MB")


def main(argv: list[str] | None = None) -> int:
    run(make_parser().parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(cli.entry(main))
