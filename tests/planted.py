"""Planted rows for the tests of the audit: those of data/planted, by seed."""

from functools import cache

from data.planted.people import as_text, make_people
from data.planted.people import chat_rows as rows_of


@cache
def people(n: int, seed: int) -> list[dict[str, str]]:
    return make_people(n, seed)


def chat_rows(n: int, seed: int) -> list[dict]:
    return rows_of(people(n, seed), seed)


def text_rows(n: int, seed: int) -> list[dict]:
    return [as_text(row) for row in chat_rows(n, seed)]
