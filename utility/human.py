"""The two actions of the human evaluation: make a sheet, and score the returned sheets."""

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import locks, results, reviews
from common.problems import Problems, check_writable
from common.stats import clopper_pearson
from utility.arms import Row
from utility.config import SheetConfig
from utility.metrics import cohen_kappa, fleiss_kappa
from utility.sheet import LABELS, arrange, read_key, read_sheet, write_sheet


def run(config: SheetConfig) -> None:
    """Make or score, depending on `config.action`."""
    with locks.output_folder(config.output_dir, config.dry_run, "human_sheet") as output:
        (make if config.action == "make" else score)(config, Path(config.output_dir), output)


def make(config: SheetConfig, folder: Path, output: locks.Output) -> None:
    """Write sheet.csv, rubric.md and key.jsonl."""
    problems = Problems()
    files = reviews.split_arms(config.synthetic or [], ("real",), problems)
    sources = [(arm, file, reviews.GENERATED) for arm, file in files.items()]
    if config.real:
        sources.append(("real", config.real, reviews.REAL))
    if not config.synthetic and not config.real:
        problems.add("--synthetic: pass ARM=FILE for at least one arm (or --real)")
    read = reviews.Files(config.columns, problems)
    arms = {arm: reviews.with_text(read.read(file, field) or []) for arm, file, field in sources}
    read.check()
    check_writable(folder, problems)
    inputs = [] if problems.lines else [file for _, file, _ in sources]
    record, outputs = folder / "run_human_sheet_make.json", [folder / name for name in ("sheet.csv", "key.jsonl")]
    finished = problems.absorb(results.finished, record, outputs, config, inputs, config.overwrite)
    problems.check()
    if finished:
        return
    chosen = arrange(arms, config.num_rows, config.seed)
    if config.dry_run:
        counts = Counter(arm for arm, _ in chosen)
        shares = ", ".join(f"{counts[arm]} of {arm}" for arm in arms)
        print(f"would write sheet.csv of {len(chosen)} rows ({shares}), rubric.md and key.jsonl in {folder}")
        return
    with results.Run(record, config, inputs, output=output) as run:
        write_sheet(run.files, folder, arms, chosen)
    print(f"{len(chosen)} rows in {folder / 'sheet.csv'}; the key is {folder / 'key.jsonl'}")


def score(config: SheetConfig, folder: Path, output: locks.Output) -> None:
    """Write human_evaluation.json: counts per arm and label for each sheet, and agreement."""
    problems = Problems()
    if not config.sheets or not config.key:
        problems.add("score: --sheets and --key are needed")
    check_writable(folder, problems)
    key = problems.absorb(read_key, config.key) if config.key else None
    check_files(config.sheets or (), problems)
    problems.check()
    assert config.sheets and config.key and key
    sheets = [sheet for path in config.sheets if (sheet := problems.absorb(read_sheet, path, key)) is not None]
    target, record = folder / "human_evaluation.json", folder / "run_human_sheet_score.json"
    inputs = [config.key, *config.sheets]
    finished = problems.absorb(results.finished, record, [target], config, inputs, config.overwrite)
    problems.check()
    if finished:
        return
    if config.dry_run:
        print(f"would score {len(sheets)} sheets of {len(key)} rows and write {target}")
        return
    names = [Path(path).name for path in config.sheets]
    with results.Run(record, config, inputs, output=output) as run:
        content = evaluate(names, sheets, key)
        run.files.write_json(target, content)
    for arm, entry in content["arms"].items():
        for name, counts in zip(names, entry["sheets"]):
            words = ", ".join(f"{label} {counts[label]['count']}" for label in LABELS)
            print(f"{arm} ({name}): {words}; {entry['n_scored']} rows")
    print(f"agreement: {content['agreement']}")
    print(f"results are in {target}")


def check_files(sheets: Sequence[str], problems: Problems) -> None:
    """Add a problem for each sheet that does not exist or is given twice."""
    first: dict[str, str] = {}
    for path in sheets:
        if not Path(path).is_file():
            problems.add(f"--sheets {path}: no such file")
        elif (content := results.sha256(path)) in first:
            problems.add(f"--sheets {path}: identical to {first[content]}; pass each rater's sheet once")
        else:
            first[content] = path


def evaluate(names: Sequence[str], sheets: Sequence[dict[int, str]], key: list[Row]) -> dict[str, Any]:
    """The content of human_evaluation.json; names: file names of the sheets; sheets: {number: label} of each."""
    arms = {}
    for arm in sorted({line["arm"] for line in key}):
        own = [line["number"] for line in key if line["arm"] == arm]
        counts = [Counter(sheet[number] for number in own) for sheet in sheets]
        arms[arm] = {
            "n_requested": len(own),
            "n_scored": len(own),
            "n_dropped": 0,
            "sheets": [
                {label: {"count": each[label], "ci95": clopper_pearson(each[label], len(own))} for label in LABELS}
                for each in counts
            ],
        }
    labels = [[sheet[line["number"]] for line in key] for sheet in sheets]
    return {
        "schema": 1,
        "labels": list(LABELS),
        "arms": arms,
        "agreement": agreement(names, labels) if len(sheets) > 1 else None,
    }


def agreement(names: Sequence[str], labels: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Fleiss' κ over all sheets; Cohen's κ and the number of equal labels for each pair; labels: [sheets][n]."""
    table = [[row.count(label) for label in LABELS] for row in zip(*labels)]
    return {
        "fleiss_kappa": fleiss_kappa(table),
        "cohen_kappa": [
            {
                "sheets": [names[i], names[j]],
                "kappa": cohen_kappa(labels[i], labels[j]),
                "equal": sum(map(str.__eq__, labels[i], labels[j])),
            }
            for i, j in itertools.combinations(range(len(labels)), 2)
        ],
    }
