"""Rows from .csv, .tsv and .json: the same as from .jsonl, or one line about what is wrong."""

import csv
import gzip
import json

import pytest
from conftest import make_rows, write_rows

from common import dataset, formats
from common.problems import UserError

ROWS = [row | {"note": note} for row, note in zip(make_rows(4), ('says "hi"', "two\nlines", "a,b\tc", ""))]


def write_table(path, rows, delimiter=","):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_every_format_gives_the_same_rows(tmp_path):
    files = [
        write_rows(tmp_path / "rows.jsonl", ROWS),
        write_table(tmp_path / "rows.csv", ROWS),
        write_table(tmp_path / "rows.tsv", ROWS, "\t"),
    ]
    texts = {
        "list.json": json.dumps(ROWS),
        "pretty.json": json.dumps(ROWS, indent=2),
        "data.json": json.dumps({"data": ROWS, "version": 1}),
        "lines.json": files[0].read_text(),
        "marked.csv": "\ufeff" + files[1].read_text(),
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        files.append(tmp_path / name)
    for name in ("rows.csv", "list.json"):
        packed = tmp_path / f"{name}.gz"
        packed.write_bytes(gzip.compress((tmp_path / name).read_bytes()))
        files.append(packed)
    for file in files:
        assert formats.read_rows(file) == ROWS, file
        assert dataset.validate(file, formats.read_rows(file)) == "enron"


def test_chat_rows_in_a_list(tmp_path):
    rows = [{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}] * 3
    (tmp_path / "share.json").write_text(json.dumps(rows))
    assert dataset.validate("x", formats.read_rows(tmp_path / "share.json")) == "chat"


BROKEN = [
    ("rows.csv", "a,a\n1,2\n", r"rows\.csv:1: the header has a duplicate or unnamed column"),
    ("rows.csv", "a,b\n1,2\n3\n", r"rows\.csv:3: 1 fields, the header has 2"),
    ("rows.csv", 'a,b\n1,"2\n', r"rows\.csv:2: not a table"),
    ("rows.csv", "a,b\n1,\0\n", "contains a NUL character"),
    ("rows.tsv", "", "the file has no rows"),
    ("rows.json", '[{"text": "a"}, 7]', "item 1 is a int, not an object"),
    ("rows.json", '[{"text": "a"}', r"not a JSON list"),
    ("rows.json", '{"text": NaN}', r"rows\.json:1: not JSON \(NaN"),
    ("rows.json", "[]", "the file has no rows"),
]


@pytest.mark.parametrize(("name", "text", "reason"), BROKEN)
def test_what_is_no_table(name, text, reason, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=reason):
        formats.read_rows(tmp_path / name)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "rows.csv").write_bytes(b"a\n\xff\n")
    with pytest.raises(UserError, match="not UTF-8"):
        formats.read_rows(tmp_path / "rows.csv")
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress(b"text\n" + b"x" * 100)[:-9])
    with pytest.raises(UserError, match="cannot be read"):
        formats.read_rows(tmp_path / "rows.csv.gz")
