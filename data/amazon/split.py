"""The split by user: who goes to train, test and validation, and the lines of each file."""

import itertools
from collections.abc import Iterable
from typing import IO, TYPE_CHECKING, Any

from data.amazon.config import SPLITS

if TYPE_CHECKING:
    import duckdb


def take_users(users: Iterable[tuple[int, int]], sizes: list[int]) -> tuple[list[list[int]], list[int]]:
    """Fill sides of `sizes` rows with whole users.

    `users` yields (user, number of rows) in split order. A user goes to the first side with room for all of their rows;
    users that fit nowhere are skipped. Returns (users of each side, rows missing in each side).
    """
    sides: list[list[int]] = [[] for _ in sizes]
    room = list(sizes)
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


def assign(connection: "duckdb.DuckDBPyConnection", sizes: list[int]) -> list[int]:
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


def stratification(connection: "duckdb.DuckDBPyConnection") -> dict[str, dict[str, Any]]:
    """{split: {'rows', 'users', 'ratings': {rating: rows}, 'largest_deviation_points': versus all rows}}."""
    counted = connection.execute(
        """SELECT coalesce(split, 'validation') AS split, rating, count(*)
           FROM kept LEFT JOIN side USING ("user") GROUP BY ALL ORDER BY ALL"""
    ).fetchall()
    users = dict(connection.execute("SELECT split, count(*) FROM side GROUP BY split").fetchall())
    everyone = connection.execute('SELECT count(DISTINCT "user") FROM kept').fetchall()[0][0]
    users |= {"validation": everyone - sum(users.values()), "all": everyone}
    ratings: dict[str, dict[int, int]] = {split: {} for split in (*SPLITS, "all")}
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


def write_split(connection: "duckdb.DuckDBPyConnection", split: str, file: IO[bytes]) -> int:
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
