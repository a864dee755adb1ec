"""Review rows and generated rows for the evaluators of synthetic data: texts, ratings, arms, halves."""

import random
import re
from collections.abc import Sequence
from typing import Any

from common.dataset import user_of, validate
from common.formats import read_rows, rename
from common.problems import AnyPath, Problems, UserError

ARM = re.compile(r"[A-Za-z][\w-]*")
REAL, GENERATED = "Review", "generated_text"  # text fields


def rating(row: dict[str, Any]) -> int | None:
    """The rating of a row as an integer in 1 … 5, or None."""
    try:
        value = float(row["Rating"])
    except (TypeError, ValueError, OverflowError):
        return None
    return int(value) if value in (1, 2, 3, 4, 5) else None


def text_of(row: dict[str, Any]) -> str:
    """The review of a row, generated or real, stripped: both are treated alike."""
    text: str = row[GENERATED if GENERATED in row else REAL]
    return text.strip()


def with_text(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows whose review is not blank."""
    return [row for row in rows if text_of(row)]


def read_reviews(path: AnyPath, field: str = REAL, columns: Sequence[str] = ()) -> list[dict[str, Any]]:
    """All rows of a file, without generated text if real text is asked for. UserError if a row lacks the text field
    `field` (blank text is allowed) or a rating of 1 to 5, or if the file does not match its manifest.
    """
    return check_reviews(path, read_rows(path, None, columns), field)


def check_reviews(path: AnyPath, rows: list[dict[str, Any]], field: str = REAL) -> list[dict[str, Any]]:
    """`read_reviews`, given the rows of the file."""
    validate(path, rows, (field, "Rating"))
    if field == REAL:
        rows = [{key: value for key, value in row.items() if key != GENERATED} for row in rows]
    wrong = [index for index, row in enumerate(rows) if rating(row) is None]
    if wrong:
        raise UserError(f"{path}: row {wrong[0]}: Rating must be 1 to 5 ({len(wrong)} such rows)")
    for index, row in enumerate(rows):
        odd = [key for key in ("row_id", "user_id", "Product Title") if isinstance(row.get(key), (list, dict, bool))]
        if odd:
            raise UserError(f"{path}: row {index}: {odd[0]} must be text or a number")
    return rows


class Files:
    """The files of one script, with --columns: a field is renamed in each file that has it."""

    def __init__(self, columns: Sequence[str], problems: Problems) -> None:
        self.columns, self.problems = columns, problems
        self.used: set[str] = set()

    def read(self, path: AnyPath, field: str = REAL) -> list[dict[str, Any]] | None:
        """`read_reviews`; None, and a problem, where it raises UserError."""
        return self.problems.absorb(self._read, path, field)

    def _read(self, path: AnyPath, field: str) -> list[dict[str, Any]]:
        rows = read_rows(path)
        own = [text for text in self.columns if any(text.partition("=")[2] in row for row in rows)]
        self.used.update(own)
        return check_reviews(path, list(rename(path, rows, own)) if own else rows, field)

    def check(self) -> None:
        """A problem for each of --columns that no file has."""
        for text in self.columns:
            if text not in self.used and not self.problems.lines:
                self.problems.add(f"--columns {text}: give NEW=OLD, where some file has the field OLD")


def split_arms(words: Sequence[str], taken: Sequence[str], problems: Problems) -> dict[str, str]:
    """{arm: file} from the ARM=FILE arguments of --synthetic; `taken` names are rejected."""
    arms: dict[str, str] = {}
    for word in words:
        name, _, file = word.partition("=")
        if not file or not ARM.fullmatch(name):
            problems.add(
                f"--synthetic {word}: give ARM=FILE, where ARM is a letter followed by letters, digits, _ or -"
            )
        elif name in taken or name in arms:
            problems.add(f"--synthetic {word}: the name {name} is taken; choose another")
        else:
            arms[name] = file
    return arms


def source_key(row: dict[str, Any]) -> tuple[Any, int | None, Any]:
    """What a generated row shares with the real row whose metadata it was generated from."""
    return row.get("row_id"), rating(row), row.get("Product Title")


def shared_rows(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> int:
    """How many of `rows` are among the `others`: same row_id and text, or, in case the text was edited, same row_id,
    user, product and rating (a row_id alone identifies a row only within one source file)."""
    texts = {(row.get("row_id"), text_of(row)) for row in others}
    origins = {_origin(row) for row in others} - {None}
    return sum((row.get("row_id"), text_of(row)) in texts or _origin(row) in origins for row in rows)


def _origin(row: dict[str, Any]) -> tuple[Any, ...] | None:
    """What a row keeps when a canary is inserted into its text; None without row_id or user_id."""
    user = user_of(row)
    return None if row.get("row_id") is None or user is None else (user, *source_key(row))


def halve(rows: list[dict[str, Any]], seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Two halves of `rows`, each in random order, with no user in both (a row without user_id counts as its own)."""
    users: dict[object, list[dict[str, Any]]] = {}
    for index, row in enumerate(rows):
        users.setdefault(user_of(row) or index, []).append(row)
    rng = random.Random(seed)
    order = list(users.values())
    rng.shuffle(order)
    halves: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for own in sorted(order, key=len, reverse=True):  # largest first, so that the halves come out equal
        min(halves, key=len).extend(own)
    for half in halves:
        rng.shuffle(half)
    return halves
