"""DuckDB: the raw files become the tables `review` and `product`, and these the rows that are kept."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from common.problems import SHOWN_BROKEN, UserError, report_broken
from data.amazon.config import PrepareConfig
from data.amazon.fields import READ_BY, clean, user_key
from data.amazon.lines import broken_line, is_gzip

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

REASONS = ("broken", "without a user", "without a rating", "empty text")
SYSTEM_PROMPT = "Write a customer's review of the product below that fits its categories and the star rating."
REVIEW_COLUMNS = {"rating": "VARCHAR", "title": "JSON", "text": "JSON", "parent_asin": "JSON", "user_id": "JSON"}
PRODUCT_COLUMNS = {"parent_asin": "JSON", "title": "JSON", "main_category": "JSON", "categories": "JSON"}


def connect(folder: Path, config: PrepareConfig) -> "duckdb.DuckDBPyConnection":
    """Connect to a new database in `folder` and define the functions and variables that the statements use."""
    import duckdb
    import pyarrow as pa
    from duckdb.func import ARROW, SPECIAL

    options: dict[str, str | bool | int | float | list[str]] = {"memory_limit": config.memory_limit}
    options["temp_directory"] = str(folder / "spill")
    if config.threads:
        options["threads"] = config.threads
    connection = duckdb.connect(folder / "work.duckdb", config=options)
    connection.execute("SET autoinstall_known_extensions = false")
    connection.execute("SET enable_progress_bar = false")
    connection.execute("SET force_compression = 'uncompressed'")  # the tables are short-lived
    for name, value in {"seed": str(config.seed), "system_prompt": SYSTEM_PROMPT}.items():
        connection.execute(f"SET VARIABLE {name} = ?", [value])

    def of_columns(function: Callable[[str], str | None]) -> Callable[["pa.Array"], "pa.Array"]:
        return lambda column: pa.array([function(text) for text in column.to_pylist()], pa.string())

    functions: dict[str, Callable[[str], str | None]] = {"clean_in_python": clean, "user_in_python": user_key}
    for name, function in functions.items():
        connection.create_function(
            name,
            of_columns(function),
            ["VARCHAR"],
            "VARCHAR",
            type=ARROW,
            null_handling=SPECIAL,  # may return None, but never receives it
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


def load(
    connection: "duckdb.DuckDBPyConnection", flag: str, path: Path, columns: dict[str, str], table: str, select: str
) -> tuple[int, int]:
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
        raise UserError(f"{flag} {path}: cannot be read ({str(error).splitlines()[0]})") from None
    lines, broken = connection.execute(f"SELECT count(*), count(*) FILTER (broken) FROM {table}").fetchall()[0]
    if lines == broken:
        first = f" ({broken_line(path, [0])[0]})" if lines else ""
        raise UserError(f"{flag} {path}: no line is a row with {', '.join(columns)}{first}")
    return lines, broken


def show_broken(connection: "duckdb.DuckDBPyConnection", path: Path, table: str, broken: int, strict: bool) -> None:
    """Show the first broken lines of a file; with `strict`, fail."""
    if not broken:
        return
    query = f"SELECT rowid FROM {table} WHERE broken ORDER BY rowid LIMIT {SHOWN_BROKEN}"
    lines = broken_line(path, [position for (position,) in connection.execute(query).fetchall()])
    report_broken(f"lines in {path}", lines, broken, strict)


def load_inputs(connection: "duckdb.DuckDBPyConnection", config: PrepareConfig) -> dict[str, int]:
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
    show_broken(connection, reviews, "review", broken, config.strict)
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
    show_broken(connection, meta, "meta", broken_products, config.strict)
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


def keep_rows(connection: "duckdb.DuckDBPyConnection") -> dict[str, int]:
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
