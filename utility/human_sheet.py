#!/usr/bin/env python3
"""A blinded sheet for people to judge reviews by, and the count of what they wrote.

python utility/human_sheet.py make --synthetic no_dp=no_dp.jsonl dp=dp.jsonl --real test.jsonl --output_dir human
python utility/human_sheet.py score --sheets human/sheet-anna.csv human/sheet-ben.csv --key human/key.jsonl \\
    --output_dir human

make: --num_rows rows, as many of each arm (to within one), in random order → sheet.csv (number, product, rating, text,
and an empty column `label`), rubric.md, and key.jsonl (mode 0600), which alone says what is of which arm: keep it from
the raters. score: every row of every sheet needs exactly one label of the rubric; counts an arm and label,
Clopper–Pearson intervals, agreement (Cohen's κ of each two sheets, Fleiss' κ of all) → human_evaluation.json.
"""

import argparse
import csv
import itertools
import random
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli, records, results, reviews
from common.intervals import clopper_pearson

LABELS = {
    "good": "reads like a customer's review of the product, from start to end",
    "non-text": "characters that are no text: markup, code, symbols",
    "repetition": "words or sentences said over and over",
    "abrupt": "breaks off in the middle of a sentence",
    "gibberish": "words that make no sense together",
}
COLUMNS = ("number", "product", "rating", "text", "label")
RUBRIC = (
    "# How to label\n\nGive each row exactly one label, the first of this list that applies from the bottom up "
    "(gibberish before\nabrupt, abrupt before repetition, and so on); `good` only where none of the others does.\n\n"
)


def make_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        "Make a blinded sheet of reviews for human raters, or score the sheets that come back.",
        "python utility/human_sheet.py make --synthetic no_dp=no_dp.jsonl dp=dp.jsonl --output_dir human",
    )
    parser.add_argument("action", choices=("make", "score"), help="make a sheet, or score returned ones")
    parser.add_argument(
        "--synthetic", nargs="+", action="extend", metavar="ARM=FILE", help="make: generated rows (default: none)"
    )
    parser.add_argument("--real", metavar="FILE", default=None, help="make: review rows as one more arm, `real`")
    parser.add_argument("--num_rows", type=cli.positive_int, default=500, help="make: rows of the sheet")
    parser.add_argument("--sheets", nargs="+", metavar="FILE", help="score: filled sheets (default: none)")
    parser.add_argument("--key", metavar="FILE", default=None, help="score: the key.jsonl of make")
    parser.add_argument("--output_dir", default="./human", help="where the files are written")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    parser.add_argument("--seed", type=int, default=3407, help="seed of the choice and the order of the rows")
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


def make(args) -> Path:
    """Write sheet.csv, rubric.md and key.jsonl; return the sheet's path."""
    problems, arms = cli.Problems(), {}
    files = reviews.split_arms(args.synthetic or [], ("real",), problems)
    sources = [(arm, file, reviews.GENERATED) for arm, file in files.items()]
    if args.real:
        sources.append(("real", args.real, reviews.REAL))
    if not args.synthetic and not args.real:
        problems.add("--synthetic: give ARM=FILE of at least one arm (or --real)")
    for arm, file, field in sources:
        rows = problems.absorb(reviews.read_reviews, file, field)
        arms[arm] = reviews.with_text(rows or [])
    folder = Path(args.output_dir)
    cli.check_writable(folder, problems)
    for name in ("sheet.csv", "key.jsonl"):
        if (folder / name).exists() and not args.overwrite:
            problems.add(f"--output_dir: {folder / name} exists; give --overwrite to replace it, or another place")
    problems.check()
    chosen = arrange(arms, args.num_rows, args.seed)
    with results.Run(folder / "run_human_sheet_make.json", args, [file for _, file, _ in sources]):
        write_sheet(folder, arms, chosen)
    return folder / "sheet.csv"


def write_sheet(folder: Path, arms: dict[str, list[dict]], chosen: list[tuple[str, int]]) -> None:
    key = []
    with results.atomic(folder / "sheet.csv") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for number, (arm, index) in enumerate(chosen, 1):
            row = arms[arm][index]
            # the rating as a whole number: "5.0" in one arm and "5" in another would tell them apart
            writer.writerow([number, row.get("Product Title") or "", reviews.rating(row), reviews.text_of(row), ""])
            key.append({"number": number, "arm": arm, "row_id": row.get("row_id")})
    results.write_jsonl(folder / "key.jsonl", key, permissions=0o600)
    with results.atomic(folder / "rubric.md") as file:
        file.write(RUBRIC + "".join(f"* `{label}`: {meaning}\n" for label, meaning in LABELS.items()))
    print(f"{len(chosen)} rows in {folder / 'sheet.csv'}; the key is {folder / 'key.jsonl'}")


def read_sheet(path, numbers: list[int]) -> dict[int, str]:
    """{number: label} of a filled sheet. UserError when a number is missing, double or unknown, or a label is."""
    problems, found, seen = cli.Problems(), {}, set()
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise cli.UserError(f"{path}: cannot be read ({error})") from None
    if not lines or "label" not in lines[0] or "number" not in lines[0]:
        raise cli.UserError(f"{path}: the columns number and label are needed; return the sheet as a .csv file")
    for line in lines:
        number, label = line["number"] or "", (line["label"] or "").strip().casefold()
        if not number.isdigit() or int(number) not in set(numbers):
            problems.add(f"{path}: row number {number!r} is not in the key")
            continue
        if int(number) in seen:
            problems.add(f"{path}: row {number} stands there twice")
        elif label not in LABELS:
            problems.add(f"{path}: row {number}: label {label!r}; give one of {', '.join(LABELS)}")
        else:
            found[int(number)] = label
        seen.add(int(number))
    missing = len(set(numbers) - seen)
    if missing:
        problems.add(f"{path}: {missing} of {len(numbers)} rows of the key are missing")
    problems.check()
    return found


def score(args) -> dict:
    """Counts an arm and label over all sheets, and agreement; writes human_evaluation.json and returns it."""
    problems = cli.Problems()
    if not args.sheets or not args.key:
        problems.add("score: --sheets and --key are needed")
    problems.check()
    target = Path(args.output_dir) / "human_evaluation.json"
    cli.check_writable(args.output_dir, problems)
    if target.exists() and not args.overwrite:
        problems.add(f"--output_dir: {target} exists; give --overwrite to replace it, or another place")
    key = problems.absorb(records.read_rows, args.key)
    if key and not all({"number", "arm"} <= set(line) for line in key):
        problems.add(f"{args.key}: not a key of this script (number and arm in every line)")
    problems.check()
    numbers = [line["number"] for line in key]
    sheets = [problems.absorb(read_sheet, path, numbers) for path in args.sheets]
    problems.check()

    with results.Run(Path(args.output_dir) / "run_human_sheet_score.json", args, [args.key, *args.sheets]):
        content = evaluate(args.sheets, sheets, key)
        results.write_json(target, content)
    for arm, one in content["arms"].items():
        for path, counts in zip(args.sheets, one["sheets"]):
            words = ", ".join(f"{label} {counts[label]['count']}" for label in LABELS)
            print(f"{arm} ({Path(path).name}): {words}; {one['n_scored']} rows")
    print(f"agreement: {content['agreement']}")
    return content


def evaluate(names: list[str], sheets: list[dict[int, str]], key: list[dict]) -> dict:
    """The content of human_evaluation.json from the labels {number: label} of each sheet."""
    from utility.measures import cohen_kappa, fleiss_kappa

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


def run(args):
    """make: the path of the sheet; score: the content of human_evaluation.json."""
    return make(args) if args.action == "make" else score(args)


def main(argv=None) -> int:
    args = make_parser().parse_args(argv)
    run(args)
    return 0


if __name__ == "__main__":
    sys.exit(cli.entry(main))
