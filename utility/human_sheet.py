#!/usr/bin/env python3
"""A blinded sheet for people to judge reviews by, and the count of what they wrote.

python utility/human_sheet.py make --synthetic no_dp=no_dp.jsonl dp=dp.jsonl --real test.jsonl --output_dir human
python utility/human_sheet.py score --sheets human/sheet-anna.csv human/sheet-ben.csv --key human/key.jsonl \\
    --output_dir human

make: --num_rows rows, as many of each arm (to within one), in random order → sheet.csv (the sheet's id, number,
product, rating, text, an empty column `label`), rubric.md, and key.jsonl (mode 0600), which alone says what is of which
arm: keep it from the raters. score: every row of every sheet needs exactly one label of the rubric, and the id of the
key's sheet (another choice, order or arm of the rows gives another id); counts an arm and label, Clopper–Pearson
intervals, agreement (Cohen's κ of each two sheets, Fleiss' κ of all) → human_evaluation.json.
"""

import argparse
import csv
import hashlib
import itertools
import random
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from common import cli, dataset, results, reviews
from common.stats import clopper_pearson

LABELS = {
    "good": "reads like a customer's review of the product, from start to end",
    "non-text": "characters that are no text: markup, code, symbols",
    "repetition": "words or sentences said over and over",
    "abrupt": "breaks off in the middle of a sentence",
    "gibberish": "words that make no sense together",
}
COLUMNS = ("sheet", "number", "product", "rating", "text", "label")
RUBRIC = (
    "# How to label\n\nGive each row exactly one label, the first of this list that applies from the bottom up "
    "(gibberish before\nabrupt, abrupt before repetition, and so on); `good` only where none of the others does.\n\n"
)


@dataclass(frozen=True, kw_only=True)
class SheetConfig:
    """The flags of utility/human_sheet.py."""

    action: str | None = None
    synthetic: tuple[str, ...] | None = None
    real: str | None = None
    num_rows: int = 500
    sheets: tuple[str, ...] | None = None
    key: str | None = None
    output_dir: str = "./human"
    overwrite: bool = False
    seed: int = 3407
    dry_run: bool = False


def make_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        "Make a blinded sheet of reviews for human raters, or score the sheets that come back.",
        "python utility/human_sheet.py make --synthetic no_dp=no_dp.jsonl dp=dp.jsonl --output_dir human",
        SheetConfig,
    )
    parser.add_argument("action", choices=("make", "score"), help="make a sheet, or score returned ones")
    parser.add_argument(
        "--synthetic", nargs="+", action="extend", metavar="ARM=FILE", help="make: generated rows (default: none)"
    )
    parser.add_argument("--real", metavar="FILE", help="make: review rows as one more arm, `real`")
    parser.add_argument("--num_rows", type=cli.positive_int, help="make: rows of the sheet")
    parser.add_argument("--sheets", nargs="+", metavar="FILE", help="score: filled sheets (default: none)")
    parser.add_argument("--key", metavar="FILE", help="score: the key.jsonl of make")
    parser.add_argument("--output_dir", help="where the files are written")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    cli.add_dry_run(parser)
    parser.add_argument("--seed", type=cli.seed, help="seed of the choice and the order of the rows")
    return parser


def arrange(arms: dict[str, list[dict]], num_rows: int, seed: int) -> list[tuple[str, int]]:
    """[(arm, index of its row)] in random order: num_rows in all, arms equal to within one (the first get more)."""
    rng, chosen = random.Random(seed), []
    for place, (arm, rows) in enumerate(arms.items()):
        share = num_rows // len(arms) + (place < num_rows % len(arms))
        if share > len(rows):
            raise cli.UserError(f"--num_rows {num_rows}: {arm} has {len(rows)} rows with text, {share} are needed")
        chosen += [(arm, index) for index in rng.sample(range(len(rows)), share)]
    rng.shuffle(chosen)
    return chosen


def make(config: SheetConfig, place: results.Output) -> Path:
    """Write sheet.csv, rubric.md and key.jsonl; return the sheet's path."""
    problems, arms = cli.Problems(), {}
    files = reviews.split_arms(config.synthetic or [], ("real",), problems)
    sources = [(arm, file, reviews.GENERATED) for arm, file in files.items()]
    if config.real:
        sources.append(("real", config.real, reviews.REAL))
    if not config.synthetic and not config.real:
        problems.add("--synthetic: give ARM=FILE of at least one arm (or --real)")
    for arm, file, field in sources:
        rows = problems.absorb(reviews.read_reviews, file, field)
        arms[arm] = reviews.with_text(rows or [])
    folder = Path(config.output_dir)
    cli.check_writable(folder, problems)
    inputs = [] if problems.lines else [file for _, file, _ in sources]
    record, outputs = folder / "run_human_sheet_make.json", [folder / name for name in ("sheet.csv", "key.jsonl")]
    finished = problems.absorb(results.finished, record, outputs, config, inputs, config.overwrite)
    problems.check()
    if finished:
        return folder / "sheet.csv"
    chosen = arrange(arms, config.num_rows, config.seed)
    if config.dry_run:
        counts = Counter(arm for arm, _ in chosen)
        shares = ", ".join(f"{counts[arm]} of {arm}" for arm in arms)
        print(f"would write sheet.csv of {len(chosen)} rows ({shares}), rubric.md and key.jsonl in {folder}")
        return folder / "sheet.csv"
    with results.Run(record, config, inputs, output=place) as run:
        write_sheet(run.files, folder, arms, chosen)
    print(f"{len(chosen)} rows in {folder / 'sheet.csv'}; the key is {folder / 'key.jsonl'}")
    return folder / "sheet.csv"


def sheet_id(key: list[dict], shown: list[list]) -> str:
    """What tells one sheet from another: a hash of the rows that are shown, of their order and of their arms.

    It begins with a letter that is no hexadecimal digit: a spreadsheet would read 123e4567 as a number.
    """
    content = results.dumps([[line["number"], line["arm"], *row] for line, row in zip(key, shown, strict=True)])
    return "s" + hashlib.sha256(content.encode()).hexdigest()[:16]


def write_sheet(
    files: results.Publication, folder: Path, arms: dict[str, list[dict]], chosen: list[tuple[str, int]]
) -> None:
    key, shown = [], []
    for number, (arm, index) in enumerate(chosen, 1):
        row = arms[arm][index]
        # the rating as a whole number: "5.0" in one arm and "5" in another would tell them apart
        shown.append([row.get("Product Title") or "", reviews.rating(row), reviews.text_of(row)])
        key.append({"number": number, "arm": arm, "row_id": row.get("row_id")})
    sheet = sheet_id(key, shown)
    key = [{"sheet": sheet, **line} for line in key]
    with files.open(folder / "sheet.csv") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(results.csv_rows([sheet, line["number"], *row, ""] for line, row in zip(key, shown)))
    files.write_jsonl(folder / "key.jsonl", key, permissions=0o600)
    with files.open(folder / "rubric.md") as file:
        file.write(RUBRIC + "".join(f"* `{label}`: {meaning}\n" for label, meaning in LABELS.items()))


def read_key(path) -> list[dict]:
    """The lines of key.jsonl: {'sheet', 'number', 'arm', …}. UserError when they are not what make writes."""
    key = dataset.read_rows(path)
    for line in key:
        number = line.get("number")
        right = isinstance(line.get("sheet"), str) and isinstance(line.get("arm"), str)
        if not right or not isinstance(number, int) or isinstance(number, bool):
            raise cli.UserError(
                f"{path}: not a key of this script (sheet and arm, texts, and number, a whole number, in every line); "
                "give the key.jsonl of make"
            )
    if len({line["sheet"] for line in key}) > 1:
        raise cli.UserError(f"{path}: lines of more than one sheet; give the key.jsonl of one make")
    doubled = [number for number, n in Counter(line["number"] for line in key).items() if n > 1]
    if doubled:
        raise cli.UserError(
            f"{path}: number {doubled[0]} stands there twice ({len(doubled)} such numbers); give the key.jsonl of make"
        )
    return key


def read_sheet(path, key: list[dict]) -> dict[int, str]:
    """{number: label} of a filled sheet. UserError when it is another sheet than the key's, a number is missing,
    double or unknown, or a label is."""
    problems, found, seen = cli.Problems(), {}, set()
    numbers, sheet = {line["number"] for line in key}, key[0]["sheet"]
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise cli.UserError(f"{path}: cannot be read ({error})") from None
    if not lines or not {"sheet", "number", "label"} <= lines[0].keys():
        raise cli.UserError(f"{path}: the columns sheet, number and label are needed; return the sheet as a .csv file")
    others = [line["sheet"] or "" for line in lines if (line["sheet"] or "").strip().casefold() != sheet.casefold()]
    if others:
        raise cli.UserError(
            f"{path}: sheet {others[0]!r} in {len(others)} of {len(lines)} rows, the key is that of {sheet!r}; give "
            "the key.jsonl of the same make"
        )
    for line in lines:
        number, label = line["number"] or "", (line["label"] or "").strip().casefold()
        if not number.isdecimal() or len(number) > 18 or int(number) not in numbers:
            problems.add(f"{path}: row number {number[:20]!r} is not in the key")
            continue
        if int(number) in seen:
            problems.add(f"{path}: row {number} stands there twice")
        elif label not in LABELS:
            problems.add(f"{path}: row {number}: label {label!r}; give one of {', '.join(LABELS)}")
        else:
            found[int(number)] = label
        seen.add(int(number))
    missing = len(numbers - seen)
    if missing:
        problems.add(f"{path}: {missing} of {len(numbers)} rows of the key are missing")
    problems.check()
    return found


def score(config: SheetConfig, place: results.Output) -> dict:
    """Counts an arm and label over all sheets, and agreement; writes human_evaluation.json and returns it."""
    problems = cli.Problems()
    if not config.sheets or not config.key:
        problems.add("score: --sheets and --key are needed")
    target = Path(config.output_dir) / "human_evaluation.json"
    cli.check_writable(config.output_dir, problems)
    key = problems.absorb(read_key, config.key) if config.key else None
    first: dict[str, str] = {}
    for path in config.sheets or []:
        if not Path(path).is_file():
            problems.add(f"--sheets {path}: no such file")
        elif (content := results.sha256(path)) in first:
            problems.add(f"--sheets {path}: to the byte the same as {first[content]}; give each rater's sheet once")
        else:
            first[content] = path
    problems.check()
    sheets = [problems.absorb(read_sheet, path, key) for path in config.sheets]
    record, inputs = target.with_name("run_human_sheet_score.json"), [config.key, *config.sheets]
    finished = problems.absorb(results.finished, record, [target], config, inputs, config.overwrite)
    problems.check()
    if finished:
        return results.read_json(target, "remove it")
    if config.dry_run:
        print(f"would score {len(sheets)} sheets of {len(key)} rows and write {target}")
        return {}
    with results.Run(record, config, inputs, output=place) as run:
        content = evaluate(config.sheets, sheets, key)
        run.files.write_json(target, content)
    for arm, one in content["arms"].items():
        for path, counts in zip(config.sheets, one["sheets"]):
            words = ", ".join(f"{label} {counts[label]['count']}" for label in LABELS)
            print(f"{arm} ({Path(path).name}): {words}; {one['n_scored']} rows")
    print(f"agreement: {content['agreement']}")
    return content


def evaluate(names: list[str], sheets: list[dict[int, str]], key: list[dict]) -> dict:
    """The content of human_evaluation.json from the labels {number: label} of each sheet."""
    from utility.metrics import cohen_kappa, fleiss_kappa

    numbers = [line["number"] for line in key]
    arms = {}
    for arm in sorted({line["arm"] for line in key}):
        own = [line["number"] for line in key if line["arm"] == arm]
        each = [Counter(sheet[number] for number in own) for sheet in sheets]
        arms[arm] = {
            "n_requested": len(own),
            "n_scored": len(own),
            "n_dropped": 0,
            "sheets": [
                {label: {"count": counts[label], "ci95": clopper_pearson(counts[label], len(own))} for label in LABELS}
                for counts in each
            ],
        }
    content = {"schema": 1, "labels": list(LABELS), "arms": arms, "agreement": None}
    if len(sheets) > 1:
        table = [[sum(sheet[number] == label for sheet in sheets) for label in LABELS] for number in numbers]
        content["agreement"] = {
            "fleiss_kappa": fleiss_kappa(table),
            "cohen_kappa": [
                {
                    "sheets": [Path(names[i]).name, Path(names[j]).name],
                    "kappa": cohen_kappa(*([sheets[k][number] for number in numbers] for k in (i, j))),
                    "equal": sum(sheets[i][number] == sheets[j][number] for number in numbers),
                }
                for i, j in itertools.combinations(range(len(sheets)), 2)
            ],
        }
    return content


def run(config: SheetConfig):
    """make: the path of the sheet; score: the content of human_evaluation.json."""
    with results.output_folder(config.output_dir, config.dry_run, "human_sheet") as place:
        return make(config, place) if config.action == "make" else score(config, place)


def main(argv=None) -> int:
    config = make_parser().parse_args(argv)
    run(config)
    return 0


if __name__ == "__main__":
    sys.exit(cli.entry(main))
