"""Table rows from result files about models: extraction, perplexity, membership, ε. A missing field is a KeyError,
which the reader reports.
"""

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
