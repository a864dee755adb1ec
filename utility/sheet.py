"""The blinded sheet and its key: choosing the rows, writing both, and reading completed sheets."""

import csv
import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import formats, json_files, publication, reviews
from common.problems import Problems, UserError
from common.publication import Publication
from utility.arms import Row

LABELS = {
    "good": "reads like a customer's review of the product from start to end",
    "non-text": "characters that are not text: markup, code, symbols",
    "repetition": "words or sentences repeated over and over",
    "abrupt": "breaks off in the middle of a sentence",
    "gibberish": "words that make no sense together",
}
COLUMNS = ("sheet", "number", "product", "rating", "text", "label")
RUBRIC = (
    "# How to label\n\nGive each row exactly one label: going through this list from the bottom up, the first that "
    "applies\n(gibberish before abrupt, abrupt before repetition, and so on); `good` only if no other does.\n\n"
)


def arrange(arms: dict[str, list[Row]], num_rows: int, seed: int) -> list[tuple[str, int]]:
    """[(arm, index of its row)] in random order: num_rows in total, split evenly (the first arms get one more)."""
    rng, chosen = random.Random(seed), []
    for position, (arm, rows) in enumerate(arms.items()):
        share = num_rows // len(arms) + (position < num_rows % len(arms))
        if share > len(rows):
            raise UserError(f"--num_rows {num_rows}: {arm} has {len(rows)} rows with text, {share} are needed")
        chosen += [(arm, index) for index in rng.sample(range(len(rows)), share)]
    rng.shuffle(chosen)
    return chosen


def sheet_id(key: list[Row], shown: list[list[Any]]) -> str:
    """The id of a sheet: a hash of its rows, their order and their arms.

    It begins with a letter that is not a hexadecimal digit, because a spreadsheet would read 123e4567 as a number.
    """
    content = json_files.dumps([[line["number"], line["arm"], *row] for line, row in zip(key, shown, strict=True)])
    return "s" + hashlib.sha256(content.encode()).hexdigest()[:16]


def write_sheet(files: Publication, folder: Path, arms: dict[str, list[Row]], chosen: list[tuple[str, int]]) -> None:
    """Write sheet.csv, rubric.md and key.jsonl for the chosen rows."""
    key: list[Row] = []
    shown: list[list[Any]] = []
    for number, (arm, index) in enumerate(chosen, 1):
        row = arms[arm][index]
        # the rating as a whole number: "5.0" in one arm and "5" in another would unblind them
        shown.append([row.get("Product Title") or "", reviews.rating(row), reviews.text_of(row)])
        key.append({"number": number, "arm": arm, "row_id": row.get("row_id")})
    sheet = sheet_id(key, shown)
    key = [{"sheet": sheet, **line} for line in key]
    with files.open(folder / "sheet.csv") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(publication.csv_rows([sheet, line["number"], *row, ""] for line, row in zip(key, shown)))
    files.write_jsonl(folder / "key.jsonl", key, permissions=0o600)
    with files.open(folder / "rubric.md") as file:
        file.write(RUBRIC + "".join(f"* `{label}`: {meaning}\n" for label, meaning in LABELS.items()))


def read_key(path: str) -> list[Row]:
    """The lines of key.jsonl: {'sheet', 'number', 'arm', …}. UserError if they are not what make writes."""
    key: list[Row] = formats.read_rows(path)
    for line in key:
        number = line.get("number")
        texts = isinstance(line.get("sheet"), str) and isinstance(line.get("arm"), str)
        if not texts or not isinstance(number, int) or isinstance(number, bool):
            raise UserError(
                f"{path}: not a key of this script (each line needs sheet and arm, both text, and number, a whole "
                "number); pass the key.jsonl written by make"
            )
    if len({line["sheet"] for line in key}) > 1:
        raise UserError(f"{path}: lines of more than one sheet; pass the key.jsonl of a single sheet")
    repeated = [number for number, n in Counter(line["number"] for line in key).items() if n > 1]
    if repeated:
        raise UserError(
            f"{path}: number {repeated[0]} occurs more than once ({len(repeated)} such numbers); pass the key.jsonl "
            "written by make"
        )
    return key


def read_sheet(path: str, key: list[Row]) -> dict[int, str]:
    """{number: label} of a completed sheet. UserError if it is not the key's sheet, if a number is missing, repeated or
    unknown, or if a label is missing or unknown."""
    problems = Problems()
    labels: dict[int, str] = {}
    seen: set[int] = set()
    numbers = {line["number"] for line in key}
    for line in read_lines(path, key[0]["sheet"]):
        number, label = line["number"] or "", (line["label"] or "").strip().casefold()
        if not number.isdecimal() or len(number) > 18 or int(number) not in numbers:
            problems.add(f"{path}: row number {number[:20]!r} is not in the key")
            continue
        if int(number) in seen:
            problems.add(f"{path}: row {number} occurs more than once")
        elif label not in LABELS:
            problems.add(f"{path}: row {number}: label {label!r}; use one of {', '.join(LABELS)}")
        else:
            labels[int(number)] = label
        seen.add(int(number))
    missing = len(numbers - seen)
    if missing:
        problems.add(f"{path}: {missing} of {len(numbers)} rows of the key are missing")
    problems.check()
    return labels


def read_lines(path: str, sheet: str) -> Sequence[dict[str, str | None]]:
    """The rows of a completed sheet; UserError if the file is not one, or has rows of a sheet other than `sheet`."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not lines or not {"sheet", "number", "label"} <= lines[0].keys():
        raise UserError(f"{path}: the columns sheet, number and label are needed; return the sheet as a .csv file")
    others = [line["sheet"] or "" for line in lines if (line["sheet"] or "").strip().casefold() != sheet.casefold()]
    if others:
        raise UserError(
            f"{path}: sheet {others[0]!r} in {len(others)} of {len(lines)} rows, but the key is of {sheet!r}; pass the "
            "key.jsonl of the same sheet"
        )
    return lines
