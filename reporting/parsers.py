"""Convert a line of each kind of result file to table rows. A missing field is a KeyError, which the reader reports."""

import re
from pathlib import Path
from typing import Any

from common.schema import HEADLINE_ATTACK, HEADLINE_TEMPERATURE, MEASURES
from common.stats import clopper_pearson
from reporting.labels import Models, as_float
from reporting.table import Damage, Record, Row, Study, literal, need


def group_of(study: Study, area: str, label: str, settings: Record) -> str:
    """A label for these settings: `label`, numbered if other settings already have it."""
    groups, label = study.groups.setdefault(area, {}), literal(label)
    names = [name for name in groups if name == label or name.startswith(f"{label} #")]
    for name in names:
        if groups[name] == settings:
            return name
    name = f"{label} #{len(names) + 1}" if names else label
    groups[name] = settings
    return name


def span(rows: object) -> str:
    return f", rows {rows[0]}–{rows[1] - 1}" if isinstance(rows, list) and len(rows) >= 2 else ""


def extraction_rows(line: Record, study: Study, models: Models, path: Path, number: int) -> list[Row]:
    """Rates by template and measure at one temperature, with floor, baseline and probabilities."""
    need(line, "temperature")
    matches = line["matches"]
    labels = [label for label in matches if label != "total"]
    total, temperature = matches["total"], line["temperature"]
    keys = (
        "dataset",
        "dataset_sha256",
        "rows",
        "attack",
        "templates",
        "trailing_space",
        "stop",
        "demonstrations_sha256",
        "top_k",
        "max_tokens",
        "seed",
    )
    settings = {key: line[key] for key in keys if key in line}
    same = {key: value for key, value in settings.items() if key != "dataset"} | {"asked": total}
    dataset = Path(line["dataset"]).name if line.get("dataset") else f"unknown data, {total} rows"
    label = dataset + span(line.get("rows")) + (", by prefix" if line.get("attack") == "prefix" else "")
    group = group_of(study, "extraction", label, same)
    scored = line.get("n_scored_by_template") or dict.fromkeys(labels, total)
    shared: Record = {
        "model": models.of(line.get("model"), path, line.get("base_model")),
        "group": group,
        "n_requested": line.get("n_requested", total * len(labels)),
        "n_dropped": line.get("n_dropped", 0),
        "headline": temperature == HEADLINE_TEMPERATURE,
        "temperature": temperature,
        "settings": settings | {"dtype": line.get("dtype"), "model_sha256": line.get("model_sha256")},
    }
    rows: list[Row] = []

    def add(metric: str, value: float | None, **more: Any) -> None:
        rows.append(Row("extraction", metric, value, **{**shared, **more}))

    for measure in MEASURES:
        counts = line.get(measure)
        if counts is None:
            continue
        for name in labels:
            count, n = counts[name], scored[name]
            stored = line.get("ci95", {}).get(measure, {}).get(name)
            why = "Clopper–Pearson 95 %" + ("" if stored else ", computed here")
            ends = stored or (clopper_pearson(count, n) if n and count is not None else None) or (None, None)
            rate = count / n if n and count is not None else None
            undefined = None if rate is not None else "no row could be asked"
            add(
                measure,
                rate,
                count=count,
                n=n,
                low=ends[0],
                high=ends[1],
                interval=why,
                template=name,
                undefined=undefined,
            )
        known = [counts[name] for name in labels if counts[name] is not None]
        n = sum(scored[name] for name in labels)
        ends = line.get("ci95", {}).get(measure, {}).get("total")
        add(
            measure,
            sum(known) / n if n else None,
            count=sum(known),
            n=n,
            template="all",
            low=ends[0] if ends else None,
            high=ends[1] if ends else None,
            interval="over rows 95 %" if ends else None,
            undefined=None if n else "no row could be asked",
        )
        floor = line.get("floor") or {}
        if floor.get("rule") and floor.get(measure) is not None:
            rule = f"{floor['rule']}@{floor['domain_guess']}"
            low, high = clopper_pearson(floor[measure], total) or (None, None)
            add(
                measure,
                floor[measure] / total,
                count=floor[measure],
                n=total,
                role="floor",
                attack=rule,
                low=low,
                high=high,
                interval="Clopper–Pearson 95 %, computed here",
            )
        for name, pair in (line.get("baseline", {}).get(measure) or {}).items():
            more = {"gained": pair["gained"], "lost": pair["lost"], "baseline": line["baseline"]["path"]}
            add(
                f"{measure} against baseline, McNemar p",
                pair["p"],
                template=name,
                role="baseline",
                settings=more,
                n=scored[name],
                count=pair["gained"] - pair["lost"],
            )
    for name, value in (line.get("truth_logprob") or {}).items():
        add("truth log-probability (nats)", value, template=name, n=scored[name])
    for name, by_size in (line.get("probabilistic") or {}).items():
        for size, hits in by_size.items():
            rate = hits["expected"] / scored[name] if scored[name] and hits["expected"] is not None else None
            add(f"expected exact in {size} draws", rate, template=name, n=scored[name], count=hits["rows"])
    return rows


def perplexity_rows(line: Record, study: Study, models: Models, path: Path, number: int) -> list[Row]:
    keys = ("dataset", "dataset_sha256", "rows", "context", "stride")
    settings: Record = {key: line[key] for key in keys if key in line}
    label = (Path(line["dataset"]).name if line.get("dataset") else "unknown data") + span(line.get("rows"))
    same = {key: value for key, value in settings.items() if key != "dataset"}
    shared: Record = {
        "model": models.of(line.get("model"), path, line.get("base_model")),
        "group": group_of(study, "perplexity", label, same),
        "n": line.get("n_scored"),
        "n_requested": line.get("n_requested"),
        "n_dropped": line.get("n_dropped", 0),
        "seed": line.get("seed"),
        "settings": settings | {"dtype": line.get("dtype"), "model_sha256": line.get("model_sha256")},
    }
    rows: list[Row] = []
    for metric in ("mean", "token_weighted", "median", "bits_per_byte"):
        if metric in line:
            low, high = line.get(f"{metric}_ci") or (None, None)
            why = "bootstrap over documents 95 %" if low is not None else None
            undefined = (line.get("undefined") or {}).get(metric) if line[metric] is None else None
            rows.append(Row("perplexity", metric, line[metric], low, high, why, undefined=undefined, **shared))
    return rows


def mia_rows(line: Record, study: Study, models: Models, path: Path, number: int) -> list[Row]:
    """AUC and TPR of one attack, of the same attack on the base and, once per file, of the blind baselines."""
    names = {key: line.get(key) for key in ("members", "nonmembers", "max_length", "bootstrap", "seed")}
    settings = names | {
        key: line[key] for key in ("parameters", "reference", "dtype", "model_sha256", "n_shadows") if key in line
    }
    same = {key: names[key] for key in ("members", "nonmembers", "max_length", "seed")}
    same["texts"] = line["n_requested"]
    sets = [Path(file).name for file in (names["members"], names["nonmembers"]) if file]
    shared: Record = {
        "model": models.of(line.get("model"), path, line.get("base_model")),
        "group": group_of(study, "mia", " against ".join(sets) or "unknown sets", same),
        "n": line["n_scored"],
        "n_requested": line["n_requested"],
        "n_dropped": line["n_dropped"],
        "settings": settings,
        "seed": line.get("seed"),
    }
    rows: list[Row] = []

    def add(scores: Record, role: str, attack: str, confidence: str, headline: bool = False) -> None:
        low, high = scores.get("auc_ci") or scores.get("auc_ci99") or (None, None)
        why = confidence if low is not None else None
        more = {**shared, "role": role, "attack": attack}
        rows.append(Row("mia", "auc", scores["auc"], low, high, why, undefined=scores.get("undefined"), **more))
        points, rates = scores.get("points") or {}, scores.get("tpr_at_fpr") or {}
        for level, rate in rates.items():
            point = points.get(level) or {}
            low, high = (scores.get("tpr_at_fpr_ci") or {}).get(level) or (None, None)
            rows.append(
                Row(
                    "mia",
                    "tpr",
                    rate,
                    low,
                    high,
                    "95 %" if low is not None else None,
                    level=level,
                    count=point.get("false_positives"),
                    undefined=point.get("undefined") or scores.get("undefined"),
                    headline=headline and level == "0.01",
                    **more,
                )
            )

    add(line, "target", line["attack"], "95 %", line["attack"] == HEADLINE_ATTACK)
    add(line["base"], "base", line["attack"], "95 %")
    if number == 1:
        for name, scores in line["blind"].items():
            add(scores, "blind", name, "99 %")
    return rows


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


def privacy_rows(content: Record, study: Study, models: Models, path: Path, number: int) -> list[Row]:
    """ε of one checkpoint from both accountants; undefined without noise."""
    rows: list[Row] = []
    reason = content.get("void") or ("no noise: ε is infinite" if content.get("epsilon") is None else None)
    for metric, key in (("ε upper (PRV)", "epsilon"), ("ε upper (RDP)", "epsilon_rdp")):
        if key in content:
            rows.append(
                Row(
                    "privacy",
                    metric,
                    content[key],
                    n=content.get("num_units"),
                    undefined=reason,
                    model=models.of(None, path),
                    level=f"{content['delta']:g}",
                    settings=content,
                )
            )
    return rows


def text_perplexity(path: Path, study: Study, models: Models) -> None:
    """Read a perplexity.txt of the released tool that has no perplexity.jsonl next to it."""
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        match = re.fullmatch(r"model path: (.+); mean perplexity: (\S+)", text.strip())
        if match:
            value = None if match[2] in ("null", "nan") else as_float(match[2])
            line = {"model": match[1], "mean": value}
            for row in perplexity_rows(line, study, models, path, number):
                row.file, row.line = study.shown(path), number
                study.rows.append(row)
        elif text.strip():
            study.damage.append(Damage(study.shown(path), number, "not 'model path: …; mean perplexity: …'"))


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
    return rows


def why_no_bound(block: Record, line: Record, level: str) -> str:
    """Why a lower bound is null."""
    reason = (block.get("lower_undefined") or {}).get(level)
    return reason or line.get("undefined") or "fewer than five canaries"


def checkpoint_of(line: Record, study: Study, models: Models, path: Path) -> str | None:
    """The key of the model that an arm's line is about, from the run_canary.json next to it."""
    args = study.runs.get(str(path.parent / "run_canary.json"), {}).get("args", {})
    named = dict(word.split("=", 1) for word in args.get("models") or [])
    return str(models.resolve(named[line["arm"]], path)) if line["arm"] in named else None
