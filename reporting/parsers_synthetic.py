"""Table rows from result files about synthetic text: fidelity, utility, importance, sheets; and from sweeps.
A missing field is a KeyError, which the reader reports.
"""

import re
from pathlib import Path

from reporting.labels import Models
from reporting.table import Record, Row, Study, need


def fidelity_rows(content: Record, study: Study, models: Models, path: Path, number: int) -> list[Row]:
    """Each metric of each arm, and its excess over the second real sample (role baseline)."""
    settings = content.get("settings", {})
    rows: list[Row] = []
    for arm, comparison in content["comparisons"].items():
        need(comparison, "rows")
        shared: Record = {
            "arm": arm,
            "n": comparison["rows"],
            "n_requested": comparison.get("n_requested"),
            "settings": settings,
        }
        shared |= {"n_dropped": comparison.get("n_dropped"), "seed": settings.get("seed"), "group": study.shown(path)}
        for role, measures in (("target", comparison["measures"]), ("baseline", comparison.get("excess", {}))):
            for name, entry in measures.items():
                metric = name if role == "target" else f"excess over real: {name}"
                metric = re.sub(r"MAUVE \(.*\)", "MAUVE", metric)
                why = "range over k-means seeds" if "MAUVE" in name else "jackknife over 20 groups 95 %"
                low, high = entry.get("low"), entry.get("high")
                undefined = "not defined on these samples" if entry["value"] is None else None
                rows.append(
                    Row(
                        "fidelity",
                        metric,
                        entry["value"],
                        low,
                        high,
                        why if low is not None else None,
                        role=role,
                        undefined=undefined,
                        **shared,
                    )
                )
        if comparison.get("longest_copy") is not None:
            rows.append(Row("fidelity", "longest copy (characters)", comparison["longest_copy"], **shared))
    return rows


def utility_rows(line: Record, study: Study, models: Models, path: Path, number: int) -> list[Row]:
    """Scores of one arm and seed, or their mean over seeds."""
    rows: list[Row] = []
    shared: Record = {"arm": line["arm"], "seed": line["seed"], "group": study.shown(path)}
    for metric in ("accuracy", "macro_f1", "mae"):
        score = line[metric]
        need(score if isinstance(score, dict) else {"mean": score}, "mean")
        if isinstance(score, dict):
            why = f"range over {len(line['seeds'])} seeds"
            settings = {"seeds": line["seeds"], "sd": score["sd"]}
            rows.append(
                Row(
                    "utility",
                    metric,
                    score["mean"],
                    score["low"],
                    score["high"],
                    why,
                    n=len(line["seeds"]),
                    role="mean",
                    settings=settings,
                    **shared,
                )
            )
        else:
            low, high = line["accuracy_ci95"] if metric == "accuracy" else (None, None)
            role = "target" if line["seed"] is not None else "baseline"
            keys = ("train_rows", "steps", "n_cut", "mcnemar_against_real", "relative_change")
            rows.append(
                Row(
                    "utility",
                    metric,
                    score,
                    low,
                    high,
                    "Clopper–Pearson 95 %" if low is not None else None,
                    n=line["n_scored"],
                    n_requested=line["n_requested"],
                    n_dropped=line["n_dropped"],
                    role=role,
                    settings={key: line[key] for key in keys if key in line},
                    **shared,
                )
            )
    return rows


SWEPT = {  # field of a line: measure
    "exact": "exact addresses",
    "matches": "loose matches",
    "perplexity": "perplexity",
    "auc": "membership AUC",
    "tpr_at_1": "TPR at 1 % FPR",
}


def sweep_rows(line: Record, study: Study, models: Models, path: Path, number: int) -> list[Row]:
    """Means over seeds of one setting; the cells themselves are read from their own files."""
    if line["seed"] is not None:
        return []
    rows = []
    for field, metric in SWEPT.items():
        found = line[field]
        if found["n"]:
            need(found, "mean")
            why = f"Student 95 % over {found['n']} seeds" if found["low"] is not None else None
            shared = {
                "arm": line["arm"],
                "role": "mean",
                "group": study.shown(path),
                "settings": {"seeds": line["seeds"]},
            }
            rows.append(Row("sweep", metric, found["mean"], found["low"], found["high"], why, n=found["n"], **shared))
    return rows


def importance_rows(content: Record, study: Study, models: Models, path: Path, number: int) -> list[Row]:
    rows: list[Row] = []
    for arm, agreement in content["arms"].items():
        for metric, value in agreement["mean"].items():
            values = [draw[metric] for draw in agreement["seeds"] if draw.get(metric) is not None]
            rows.append(
                Row(
                    "importance",
                    metric,
                    value,
                    min(values, default=None),
                    max(values, default=None),
                    f"range over {len(values)} draws",
                    n=content["rows"],
                    n_requested=agreement.get("n_requested"),
                    n_dropped=agreement.get("n_dropped"),
                    arm=arm,
                    group=study.shown(path),
                    undefined=None if value is not None else "no draw defines it",
                    settings={"heldout_rows": content.get("heldout_rows"), "words": content.get("words")},
                )
            )
    return rows


def human_rows(content: Record, study: Study, models: Models, path: Path, number: int) -> list[Row]:
    """Share of each label by arm and rater, and the agreement between raters."""
    rows: list[Row] = []
    for arm, ratings in content["arms"].items():
        for rater, sheet in enumerate(ratings["sheets"], 1):
            for label in content["labels"]:
                count, n = sheet[label]["count"], ratings["n_scored"]
                low, high = sheet[label]["ci95"] or (None, None)
                rows.append(
                    Row(
                        "human",
                        label,
                        count / n if n else None,
                        low,
                        high,
                        "Clopper–Pearson 95 %",
                        count,
                        n,
                        ratings["n_requested"],
                        ratings["n_dropped"],
                        None if n else "no row",
                        arm=arm,
                        template=f"sheet {rater}",
                        group=study.shown(path),
                    )
                )
    if content["agreement"]:
        value = content["agreement"]["fleiss_kappa"]
        undefined = "every label is the same" if value is None else None
        n = sum(ratings["n_scored"] for ratings in content["arms"].values())
        shared: Record = {"n": n, "role": "baseline", "group": study.shown(path)}
        rows.append(Row("human", "Fleiss κ", value, undefined=undefined, **shared))
        for pair in content["agreement"].get("cohen_kappa") or ():
            undefined = "both gave the same label to every row" if pair["kappa"] is None else None
            rows.append(
                Row(
                    "human",
                    "Cohen κ",
                    pair["kappa"],
                    count=pair["equal"],
                    undefined=undefined,
                    template=" and ".join(pair["sheets"]),
                    **shared,
                )
            )
    return rows


def summary_rows(content: Record, study: Study, models: Models, path: Path, number: int) -> list[Row]:
    """Paired differences from the base in the summary.json of a study; everything else there is read elsewhere."""
    found = content.get("against_base") or {}
    rows: list[Row] = []
    if isinstance(found, list):  # study reviews: exposure of the same canaries, in bits
        for line in found:
            need(line, "mean", "low", "high")
            rows.append(
                Row(
                    "paired",
                    "exposure, change from the base (bits)",
                    line["mean"],
                    line["low"],
                    line["high"],
                    "Student 95 % over canaries",
                    n=line["n_canaries"],
                    arm=line["arm"],
                    attack=line["kind"],
                    repetitions=line["repetitions"],
                    group=study.shown(path),
                )
            )
        return rows
    for arm, parts in found.items():  # study privacy: exact addresses of the same people, in percentage points
        for people, change in parts.items():
            need(change, "points", "low", "high")
            rows.append(
                Row(
                    "paired",
                    "exact addresses, change from the base (points)",
                    change["points"],
                    change["low"],
                    change["high"],
                    "normal 95 % over people",
                    n=change["n"],
                    arm=arm,
                    template=people,
                    group=study.shown(path),
                )
            )
    return rows
