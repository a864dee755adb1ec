"""Table rows from results of canaries. A missing field is a KeyError, which the reader reports."""

from pathlib import Path

from reporting.labels import Models
from reporting.table import Record, Row, Study

AUXILIARY = "auxiliary"  # signal of canary/auxiliary.py: a model trained on the generated rows, the whole sentence


def canary_rows(line: Record, study: Study, models: Models, path: Path, number: int) -> list[Row]:
    """The rows of one line; `template`: the part of a canary; `attack`: the canary's kind or the audit's signal."""
    measure = line["measure"]
    shared: Record = {
        "arm": line["arm"],
        "group": study.shown(path),
        "n_requested": line["n_requested"],
        "n_dropped": line["n_dropped"],
        "repetitions": line.get("repetitions"),
        "attack": line.get("signal") or line.get("kind"),
    }
    n, checkpoint = line["n_scored"], checkpoint_of(line, study, models, path)
    if measure == "count":
        rows: list[Row] = []
        for how, metric in (("normalised", "generated rows with it"), ("exact", "generated rows with it, as written")):
            counts = line[how]
            low, high = counts["ci"]
            more = {"canaries": counts["canaries"], "fisher_p": counts["fisher_p"], "n_canaries": line["n_canaries"]}
            rows.append(
                Row(
                    "canary",
                    metric,
                    counts["rate"],
                    low,
                    high,
                    "Clopper–Pearson 95 %",
                    count=counts["rows"],
                    n=n,
                    template=line["part"],
                    settings=more,
                    **shared,
                )
            )
        return rows
    if measure == "exposure":
        bits = line["bits"]
        if bits is None:
            return [Row("canary", "exposure", None, n=n, undefined=line.get("undefined"), **shared)]
        more = {key: line.get(key) for key in ("references", "ceiling", "space_bits", "p_above_held_out")}
        rows = [
            Row(
                "canary",
                "exposure",
                bits["median"],
                bits["q25"],
                bits["q75"],
                "quartiles over canaries",
                n=n,
                settings=more,
                **shared,
            ),
            Row(
                "canary",
                "exposure, mean",
                bits["mean"],
                bits["q05"],
                bits["q95"],
                "5–95 % of canaries",
                n=n,
                settings=more,
                **shared,
            ),
        ]
        if line.get("extrapolated"):
            far, fit = line["extrapolated"]["bits"], line["extrapolated"]["ks_p"]
            rows.append(
                Row(
                    "canary",
                    "exposure, extrapolated",
                    far["median"],
                    far["q25"],
                    far["q75"],
                    "quartiles over canaries",
                    n=n,
                    settings={"ks_p": fit},
                    **shared,
                )
            )
        return rows
    if measure == "text_auc":
        low, high = line.get("auc_ci") or (None, None)
        return [
            Row(
                "canary",
                "AUC of text alone",
                line["auc"],
                low,
                high,
                line.get("auc_ci_method"),
                n=n,
                undefined=line.get("undefined"),
                **shared,
            )
        ]
    if not measure.startswith("audit"):
        raise ValueError(f"unknown measure {measure!r}")
    more = {key: line[key] for key in ("upper", "delta", "unit", "void", "guesses", "included", "above_upper")}
    more |= {key: line.get(key) for key in ("power", "placed", "placed_trained", "upper_unknown")}
    more["checkpoint"] = checkpoint
    above = [level for level, yes in line["above_upper"].items() if yes]
    if any(None in (line["lower"][level], line["upper"]) for level in above):
        raise ValueError("above_upper: the bounds that it compares are missing")
    more["lower_above_upper"] = above
    more["headline"] = line.get("headline")  # of several signals, the one to report
    kind = "" if measure == "audit" else ", text only"
    kind += ", auxiliary model" if line.get("signal", "").split(",")[0] == AUXILIARY else ""
    beside = line.get("f_dp") or {}
    blocks = {f"ε lower{kind}": (line, more)}
    for name, words in (("epsilon_delta", "f-DP"), ("gaussian", "f-DP if Gaussian")):
        if name in beside:  # the accountant's ε is compared with Steinke's bound alone
            own = {"delta": beside[name]["delta"], "guesses": beside[name]["guesses"], "power": beside[name]["power"]}
            blocks[f"ε lower{kind}, {words}"] = beside[name], more | own | {"above_upper": {}, "lower_above_upper": []}
    rows = [
        Row(
            "canary",
            name + ("" if level == "95" else f" at {level} %"),
            value,
            n=n,
            level=level,
            undefined=None if value is not None else why_no_bound(block, line, level),
            settings=settings,
            **shared,
        )
        for name, (block, settings) in blocks.items()
        for level, value in block["lower"].items()
    ]
    bound = line["heuristic"]["bound"]
    if bound:
        rows.append(Row("canary", f"ε lower{kind}, heuristic", bound["epsilon"], n=n, settings=bound, **shared))
    if line["upper"] is not None:
        rows.append(
            Row(
                "canary",
                "ε upper (PRV)",
                line["upper"],
                n=n,
                level=f"{line['delta']:g}",
                undefined=line["void"],
                settings=more,
                **shared,
            )
        )
    low, high = line.get("auc_ci") or (None, None)
    rows.append(
        Row(
            "canary",
            f"AUC of the audit{kind}",
            line["auc"],
            low,
            high,
            line.get("auc_ci_method"),
            n=n,
            settings=more | {"direction": line.get("direction")},
            undefined=None if line["auc"] is not None else line.get("undefined"),
            **shared,
        )
    )
    if point := line.get("tpr_at_fpr"):
        low, high = point["tpr_ci"]
        rows.append(
            Row(
                "canary",
                f"TPR of the audit{kind}",
                point["tpr"],
                low,
                high,
                "Clopper–Pearson 95 %, threshold fixed",
                n=point["members"],
                level=f"{point['level']:g}",
                settings=more | {"false_positives": point["false_positives"], "nonmembers": point["nonmembers"]},
                **shared,
            )
        )
    return rows


def why_no_bound(block: Record, line: Record, level: str) -> str:
    """Why a lower bound is null."""
    reason = (block.get("lower_undefined") or {}).get(level)
    return reason or line.get("undefined") or "fewer than five canaries"


def checkpoint_of(line: Record, study: Study, models: Models, path: Path) -> str | None:
    """The key of the model that an arm's line is about, from the run_canary.json next to it.

    canary/auxiliary.py reads no model of the private rows: its line belongs to the model that any canary/measure.py
    measured for the same arm, text and key, so that the bounds from a model and from its text stand together.
    """
    arm, beside = line["arm"], path.parent / "run_canary.json"
    files = [(str(beside), study.runs.get(str(beside), {}))]
    if path.name == "results_auxiliary.jsonl":
        own = hashes_of(study.runs.get(str(path.parent / "run_auxiliary.json"), {}), arm)
        measured = [(file, run) for file, run in study.runs.items() if Path(file).name == beside.name]
        files = [(file, run) for file, run in measured if own and hashes_of(run, arm) == own]
    for file, run in files:
        named = dict(word.split("=", 1) for word in run.get("args", {}).get("models") or [])
        if arm in named:
            return str(models.resolve(named[arm], Path(file)))
    return None


def hashes_of(run: Record, arm: str) -> tuple[str, str] | None:
    """SHA-256 of the key and of an arm's generated rows; None if the run had none."""
    arms = [word.partition("=")[0] for word in run.get("args", {}).get("synthetic") or []]
    hashes = [entry["sha256"] for entry in run.get("inputs", [])]  # the key first
    return (hashes[0], hashes[1 + arms.index(arm)]) if arm in arms and len(hashes) == 1 + len(arms) else None
