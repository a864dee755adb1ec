#!/usr/bin/env python3
"""Amazon Reviews 2023 → train.jsonl, test.jsonl and validation.jsonl, with no user in two of them.

python data/amazon/prepare.py --reviews Office_Products.jsonl.gz --meta meta_Office_Products.jsonl.gz \\
    --output_dir data/amazon/office
python data/amazon/prepare.py --reviews r.jsonl --meta m.jsonl --train 1000 --test 100 --memory_limit 600MB --strict

DuckDB does the work out of core: its tables lie in a hidden folder of --output_dir, which needs about the size of the
unpacked reviews and is removed at the end (a killed run's by the next one).

Rows: `System prompt`, `Rating` (1–5), `Review Title`, `Review`, `Product Title`, `Product Categories` (`categories`
joined by ' > ', else `main_category`, else ''), `row_id` (position among the non-blank lines of --reviews, from 0) and
`user_id`. Texts have `<br>` turned into line breaks and HTML references decoded.

Dropped, each counted: lines that are no review, reviews without a user, without a rating of 1 to 5, with an empty text
or without their product (joined on parent_asin), and duplicates: of rows that agree in every published field, whoever
wrote them, the first one stays. An empty title or an empty category drops nothing.

A number, list, object or bool is no text: a line with one as `text`, `title` or `parent_asin` counts as broken, and a
category of that kind as absent ('broken categories'). A `user_id` is read as `common.dataset.user_of` reads it: 5, 5.0,
"5" and " 5" are one user; what is neither text nor a whole number makes the line broken.

Split: users stand in the order of a seeded hash of their id; each goes, with all of their reviews, to train if it still
has room for them, else to test if that has, else to validation, until both have exactly --train and --test rows. Where
no user is left that fits, a file stays smaller, and the report says so. Train does not depend on --test. Rows within a
file stand in the order of a seeded hash of their content. So neither depends on --threads.

`user_id` is 16 hexadecimal digits of MD5 over the seed and the original id: it keeps the original out of the files and
groups the rows, but it is a pseudonym, no anonymity: whoever has the source finds the person again, by the text too.
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
# of a field that makes a line broken where it is neither null nor of its kind: the macro that reads it, and its kind
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
        "Amazon Reviews 2023: reviews and product metadata to train, test and validation files, split by user.",
        "python data/amazon/prepare.py --reviews Office_Products.jsonl.gz --meta meta_Office_Products.jsonl.gz",
        PrepareConfig,
    )
    parser.add_argument(
        "--reviews", required=True, metavar="FILE", help="<Category>.jsonl or .jsonl.gz (default: none, required)"
    )
    parser.add_argument(
        "--meta", required=True, metavar="FILE", help="meta_<Category>.jsonl or .jsonl.gz (default: none, required)"
    )
    parser.add_argument("--output_dir", help="where the three files are written")
    parser.add_argument("--train", type=cli.positive_int, help="rows of train.jsonl")
    parser.add_argument("--test", type=cli.positive_int, help="rows of test.jsonl; the rest validates")
    parser.add_argument("--memory_limit", help="what DuckDB may hold; beyond it works on disk")
    parser.add_argument("--threads", type=cli.non_negative_int, help="threads; 0: one a core")
    parser.add_argument("--strict", action="store_true", help="fail when a line of an input is broken")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    cli.add_dry_run(parser)
    parser.add_argument("--seed", type=cli.seed, help="seed of the split, the order and the user hashes")
    return parser


# ---------------------------------------------------------------- pure functions


@lru_cache(1 << 12)
def decoded(reference: str) -> str:
    """The character of one HTML reference; texts repeat the same few."""
    return html.unescape(reference)


def clean(text: str) -> str:
    """Text with <br> as line breaks, complete HTML references decoded (once), NULs and outer white space removed."""
    if "<" in text:
        text = LINE_BREAK.sub("\n", text)
    if "&" in text:
        text = REFERENCE.sub(lambda found: decoded(found[0]), text)
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "").strip(WHITESPACE)


def user_key(user_id: str) -> str | None:
    """Who a user_id, given as JSON, is (`dataset.user_of`): "" for a blank text, None for what names nobody."""
    try:
        value = json.loads(user_id)
    except ValueError:  # a whole number of thousands of digits
        return None
    return dataset.user_of({"user_id": value}) or ("" if isinstance(value, str) else None)


def take_users(users: Iterable[tuple[int, int]], sizes: list[int]) -> tuple[list[list[int]], list[int]]:
    """Fill sides of `sizes` rows with whole users.

    `users` yields (user, number of rows) in the order of the split. A user goes to the first side with room for all of
    their rows; one that fits nowhere is passed over. Returns (users of each side, rows that each side lacks).
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
    """Largest difference between the shares of a rating in `part` and in `whole` ({rating: rows}), in points."""
    if not part:
        return 0.0
    shares = (part.get(rating, 0) / sum(part.values()) - n / sum(whole.values()) for rating, n in whole.items())
    return round(100 * max(map(abs, shares)), 2)


# ---------------------------------------------------------------- files


def is_gzip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def damage(path: Path) -> str | None:
    """What is wrong with a .gz file, read to its end; None where nothing is. DuckDB checks no CRC."""
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
        return "a byte order mark before it; save the file without"
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
    """(settings for the manifests, whether all files stand already); UserError with every problem of the arguments and
    files, then with every damaged .gz."""
    from concurrent.futures import ThreadPoolExecutor

    problems = cli.Problems()
    inputs = {"--reviews": Path(config.reviews), "--meta": Path(config.meta)}
    for flag, path in inputs.items():
        if not path.is_file():
            what = "is a directory, not a file" if path.is_dir() else "no such file"
            problems.add(f"{flag} {path}: {what}; name a .jsonl or .jsonl.gz file")
            continue
        try:
            is_gzip(path)
        except OSError as error:
            problems.add(f"{flag} {path}: cannot be read ({error.strerror})")
    if os.path.realpath(inputs["--reviews"]) == os.path.realpath(inputs["--meta"]):
        problems.add(f"--meta {config.meta}: the same file as --reviews; name the meta_… file of the category")
    amount = MEMORY.fullmatch(config.memory_limit.strip())
    if not amount or float(amount[1]) == 0:
        problems.add(f"--memory_limit {config.memory_limit}: a number and a unit are expected, as 800MB or 1.2GB")
    outputs = destinations(config)
    for path in outputs.values():
        if any(os.path.realpath(path) == os.path.realpath(source) for source in inputs.values()):
            problems.add(f"--output_dir {config.output_dir}: {path} is also an input; name another place")
        elif path.is_dir():
            problems.add(f"--output_dir {config.output_dir}: {path} is a directory; remove it, or name another place")
    if "?" in str(Path(config.output_dir).absolute()):
        problems.add(f"--output_dir {config.output_dir}: DuckDB cannot work in a path with '?'; name another place")
    cli.check_writable(config.output_dir, problems)
    settings = None
    if not problems.lines:
        hashes = {flag.removeprefix("--"): results.sha256(path) for flag, path in inputs.items()}
        settings = dataset.settings_of(config, ("output_dir", "threads", "memory_limit"), **hashes)
    named = [("--output_dir", path) for path in outputs.values()]
    finished = problems.absorb(dataset.finished, named, settings, config.overwrite)
    problems.check()  # a mistyped flag is told before gigabytes are read
    if finished:
        return settings, True
    packed = {flag: path for flag, path in inputs.items() if is_gzip(path)}
    with ThreadPoolExecutor() as pool:  # zlib frees the lock of the interpreter
        for (flag, path), reason in zip(packed.items(), pool.map(damage, packed.values())):
            if reason:
                problems.add(f"{flag} {path}: damaged ({reason}); download it again")
    problems.check()
    return settings, False


# ---------------------------------------------------------------- the steps in DuckDB


def connect(folder: Path, config: PrepareConfig):
    """A connection to a new database in `folder`, with the functions and variables that the statements use."""
    import duckdb
    import pyarrow as pa

    options = {"memory_limit": config.memory_limit, "temp_directory": str(folder / "spill")}
    options |= {"threads": config.threads} if config.threads else {}
    connection = duckdb.connect(folder / "work.duckdb", config=options)
    connection.execute("SET autoinstall_known_extensions = false")
    connection.execute("SET enable_progress_bar = false")
    connection.execute("SET force_compression = 'uncompressed'")  # of tables that live for a minute
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
            null_handling="special",  # None may come out; none goes in
        )
    # most texts need no Python: no reference, tag, carriage return or NUL, visible ASCII at both ends
    connection.execute(
        r"""CREATE MACRO cleaned(field) AS CASE
                WHEN regexp_matches(field, '[&<\r\x00]|^[^!-~]|[^!-~]$') THEN clean_in_python(field)
                ELSE coalesce(field, '') END"""
    )
    connection.execute("CREATE MACRO one_line(field) AS replace(cleaned(field), chr(10), ' ')")
    # of a column of JSON, where null is NULL; faster than json_type
    connection.execute("CREATE MACRO is_text(field) AS starts_with(field::VARCHAR, chr(34))")
    connection.execute("CREATE MACRO text_of(field) AS CASE WHEN is_text(field) THEN field->>'$' END")
    connection.execute(
        r"""CREATE MACRO user_of(field) AS CASE
                WHEN regexp_full_match(field::VARCHAR, '"[!#-\[\]-~]+"') THEN (field::VARCHAR)[2:-2]
                WHEN field IS NOT NULL THEN user_in_python(field::VARCHAR) END"""
    )
    return connection


def load(connection, flag: str, path: Path, columns: dict[str, str], table: str, select: str) -> tuple[int, int]:
    """Create `table` from the lines of a file, in their order, `select` applied. Returns (lines, broken lines).

    columns: {field: type}. A line without any of them is broken (DuckDB gives one that is no JSON object a row of
    NULLs), and so is one with a field of another kind than READ_BY says. `select` keeps the column `broken`, and must
    not need a join (a long IN list does): that would lose the order of the lines, and so rowid as the position among
    the non-blank ones.
    """
    import duckdb

    kinds = ", ".join(f"{column}: '{kind}'" for column, kind in columns.items())
    nothing = " AND ".join(f"{column} IS NULL" for column in columns)
    values = {column: f"{READ_BY[column][0]}({column})" for column in columns if column in READ_BY}
    of_another_kind = " OR ".join(f"({column} IS NOT NULL AND {value} IS NULL)" for column, value in values.items())
    replaced = ", ".join(f"{value} AS {column}" for column, value in values.items())
    compression = "gzip" if is_gzip(path) else "none"
    name = str(path.absolute()).replace("'", "''")
    # DuckDB reads * ? [ in a name as a pattern; each in brackets stands for itself
    name = re.sub(r"[*?\[]", lambda found: f"[{found[0]}]", name)
    try:
        connection.execute(
            f"""CREATE TABLE {table} AS
                SELECT {select} FROM (
                    SELECT * REPLACE ({replaced}), ({nothing}) OR {of_another_kind} AS broken
                    FROM read_json('{name}', format = 'newline_delimited', ignore_errors = true,
                                   compression = '{compression}', columns = {{{kinds}}}))"""
        )
    except (duckdb.IOException, duckdb.InvalidInputException) as error:
        raise cli.UserError(f"{flag} {path}: cannot be read ({str(error).splitlines()[0]})") from None
    lines, broken = connection.execute(f"SELECT count(*), count(*) FILTER (broken) FROM {table}").fetchall()[0]
    if lines == broken:
        first = f" ({broken_line(path, [0])[0]})" if lines else ""
        raise cli.UserError(f"{flag} {path}: no line of it is a row with {', '.join(columns)}{first}")
    return lines, broken


def report_broken(connection, path: Path, table: str, broken: int, strict: bool) -> None:
    """Show the first broken lines of a file; with `strict` that is the end."""
    if not broken:
        return
    query = f"SELECT rowid FROM {table} WHERE broken ORDER BY rowid LIMIT {cli.SHOWN_BROKEN}"
    lines = broken_line(path, [position for (position,) in connection.execute(query).fetchall()])
    cli.report_broken(f"lines in {path}", lines, broken, strict)


def load_inputs(connection, config: PrepareConfig) -> dict[str, int]:
    """Tables `review` (cleaned, with a reason where a row is dropped) and `product` (one row a parent_asin); counts."""
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
    # of several lines about a product the first counts
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
    """Table `kept` (key, row, user, rating): the join without its duplicates. `key` is an MD5 over seed and row."""
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
    """Table `side` ("user", split): the users of train and test. Returns the rows that each of the two lacks."""
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
    """{split: {'rows', 'users', 'ratings': {rating: rows}, 'largest_deviation_points': from all rows}}."""
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
            "rows": sum(found.values()),
            "users": users.get(split, 0),
            "ratings": dict(sorted(found.items())),
            "largest_deviation_points": largest_deviation(found, ratings["all"]),
        }
        for split, found in ratings.items()
    }


def write_split(connection, split: str, file) -> int:
    """Write the JSON lines of a split to an open binary file, in the order of their keys. Returns how many."""
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


# ---------------------------------------------------------------- the run


def run(config: PrepareConfig) -> dict:
    """Build the three files. Returns the counts that are also printed and kept in run_prepare.json; {} with nothing to
    do."""
    started = time.monotonic()
    folder, outputs = Path(config.output_dir), destinations(config)
    with results.output_file(*outputs.values(), dry_run=config.dry_run) as place:
        settings, finished = check(config)
        if finished:
            dataset.say_finished(*outputs.values())
            return {}
        if config.dry_run:
            print(f"would read {config.reviews} and {config.meta} and write {', '.join(map(str, outputs.values()))}")
            return {}
        return build(config, started, folder, outputs, settings, place)


@contextlib.contextmanager
def enough_memory(config: PrepareConfig):
    """Within the block it is a UserError when DuckDB needs more than --memory_limit."""
    import duckdb

    try:
        yield
    except duckdb.OutOfMemoryException as error:
        reason = str(error).splitlines()[0]
        raise cli.UserError(f"--memory_limit {config.memory_limit}: not enough ({reason}); give more") from None


def plan(connection, config: PrepareConfig) -> tuple[dict[str, int], list[int], dict[str, dict]]:
    """(counts, rows that train and test lack, `stratification`); UserError where the inputs cannot fill the files."""
    counts = load_inputs(connection, config)
    counts |= keep_rows(connection)
    if counts["rows"] < config.train + config.test:
        raise cli.UserError(
            f"--train {config.train} --test {config.test}: only {counts['rows']} of {counts['review lines']} "
            f"reviews are left after cleaning; ask for fewer"
        )
    lacking = assign(connection, [config.train, config.test])
    splits = stratification(connection)
    if not splits["train"]["rows"]:
        raise cli.UserError(
            f"--train {config.train}: each of the {splits['all']['users']} users left has more reviews than "
            "that, and none is divided; ask for more, or name a file with more users"
        )
    return counts, lacking, splits


def build(config: PrepareConfig, started: float, folder: Path, outputs: dict[str, Path], settings: dict, place) -> dict:
    import duckdb

    inputs = [Path(config.reviews), Path(config.meta)]
    record = results.Run(folder / "run_prepare.json", config, inputs=inputs, output=place)
    record["packages"]["duckdb"] = duckdb.__version__
    with (
        enough_memory(config),
        results.temporary_folder(folder, "prepare") as work,
        connect(Path(work), config) as connection,
    ):
        counts, lacking, splits = plan(connection, config)
        with record:  # from here on something is written: a record of refused inputs would replace that of the files
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
        line("broken categories", "categories left out: no text")
    ratings = sorted(splits["all"]["ratings"])
    print(
        f"{'':>12} {'rows':>11} {'users':>11}" + "".join(f" {f'{rating} star':>7}" for rating in ratings) + "  off by"
    )
    for split, found in splits.items():
        shares = "".join(f" {found['ratings'].get(r, 0) / max(1, found['rows']):>7.2%}" for r in ratings)
        deviation = f"{found['largest_deviation_points']:>5.2f} points" if split != "all" else ""
        print(f"{split:>12} {found['rows']:>11,} {found['users']:>11,}{shares}  {deviation}")
    for split, lack in result["lacking"].items():
        if lack:
            print(f"{split} lacks {lack:,} of the rows asked for: no user is left with so few, and none is divided")
    print(f"{result['reviews_per_s']:,.0f} reviews/s, peak memory {result['peak_bytes'] / 1e6:,.0f} MB")


def main(argv: list[str] | None = None) -> int:
    run(make_parser().parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(cli.entry(main))
