"""The tables of the page, as blocks; no HTML."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from common import provenance
from common.schema import GREEDY_BELOW, HEADLINE_TEMPERATURE, SHADOW_ATTACKS
from reporting.blocks import Block, Cell, Column, Paragraph, Table, fold
from reporting.glance import estimate, text
from reporting.table import Record, Row, Study

SYNONYMS = {
    "matches": "loose match",
    "exact": "exact address",
    "no_pattern": "exact, no name rule",
    "local_part": "local part",
    "domain": "domain",
}
EXTRA_MEASURES = {  # metric: (head of its column, form)
    "expected exact in 1 draws": ("Expected exact, one draw", "{:.2%}"),
    "truth log-probability (nats)": ("log p(truth), nats", "{:.2f}"),
}
AREAS = {  # section → areas of the rows that it shows
    "extraction": ("extraction",),
    "perplexity": ("perplexity",),
    "mia": ("mia",),
    "privacy": ("privacy", "canary", "paired"),
    "fidelity": ("fidelity",),
    "utility": ("utility", "importance", "human"),
    "sweep": ("sweep",),
}

Describe = Callable[[Row], str | Cell]


def audit_table(audit: Record, file: str) -> Table:
    """One row per question of an audit's verdict."""
    rows = []
    for question in audit["verdict"]["questions"].values():
        said = [question["why"] or "", question["measured"]]
        cells = [Cell(question["title"]), Cell(question["answer"]), Cell.number(question["p_adjusted"], "{:.2g}")]
        rows.append([*cells, Cell(". ".join(part for part in said if part))])
    columns = [text("Question"), text("Answer"), Column("p", small="adjusted")]
    columns.append(Column("Measured, with its control", "words"))
    return Table(columns, rows, f"{file}: one-sided tests fixed beforehand, adjusted together (Holm)")


def extraction_table(study: Study, headline: bool) -> list[Block]:
    """One row per result line and template: counts, intervals, comparison with the baseline, source."""
    rows = study.select("extraction", role="target", template=lambda name: name != "all")
    rows = [row for row in rows if (row.headline or (row.temperature or 0) <= GREEDY_BELOW) == headline]
    lines: dict[tuple[str, str | None], dict[str, Row]] = {}
    for row in rows:
        lines.setdefault((row.source, row.template), {})[row.metric] = row
    paired = {
        (row.source, row.template): row
        for row in study.select("extraction", role="baseline")
        if row.metric.startswith("exact")
    }
    measures = [name for name in SYNONYMS if any(name in by_metric for by_metric in lines.values())]
    extra = [name for name in EXTRA_MEASURES if any(name in by_metric for by_metric in lines.values())]
    table = []
    for key, by_metric in lines.items():
        first = next(iter(by_metric.values()))
        cells = [
            Cell(first.model.label if first.model else ""),
            Cell(first.group or ""),
            Cell.number(first.temperature, "{:g}"),
            Cell(first.template or ""),
        ]
        cells += [estimate(by_metric[name], count=True) if name in by_metric else Cell.empty() for name in measures]
        for name in extra:
            if name in by_metric:
                by_metric[name].shown = True
                cells.append(Cell.number(by_metric[name].value, EXTRA_MEASURES[name][1]))
            else:
                cells.append(Cell.empty())
        if paired:
            cells.append(_paired(paired.get(key)))
        table.append([*cells, Cell(first.source)])
    columns = [text("Model"), text("People"), Column("Temperature"), text("Template")]
    columns += [Column(SYNONYMS[name].capitalize()) for name in measures]
    columns += [Column(EXTRA_MEASURES[name][0]) for name in extra]
    columns += [Column("Exact against baseline (McNemar)")] if paired else []
    caption = f"Temperature {HEADLINE_TEMPERATURE} and greedy" if headline else "All other temperatures"
    return [Table([*columns, Column("Line", "source")], table, caption)] if table else []


def _paired(row: Row | None) -> Cell:
    """Answers gained and lost against the baseline, with McNemar's p."""
    if row is None:
        return Cell.empty()
    row.shown = True
    p = "–" if row.value is None else f"{row.value:.2g}"
    return Cell.number(row.value, small=(f"p {p}",), text=f"+{row.settings['gained']} −{row.settings['lost']}")


def plain_table(rows: list[Row], caption: str, heads: dict[Column, Describe], form: str = "{:.4g}") -> list[Block]:
    """One row per number: the columns `heads`, then value, interval, n and source."""
    table = []
    for row in rows:
        row.shown = True
        described = [describe(row) for describe in heads.values()]
        table.append(
            [
                *(cell if isinstance(cell, Cell) else Cell(cell) for cell in described),
                Cell(f"– {row.undefined or ''}", "") if row.value is None else Cell.number(row.value, form),
                Cell("" if row.low is None else f"{form.format(row.low)}–{form.format(row.high)}"),
                Cell(row.interval or ""),
                Cell(f"{row.n:,}" if row.n else "", "" if row.n is None else str(row.n)),
                Cell(row.source),
            ]
        )
    columns = [*heads, Column("Value"), text("Interval"), text("Kind"), Column("n"), Column("Line", "source")]
    return [Table(columns, table, caption)] if table else []


def who(row: Row) -> str:
    return row.model.label if row.model else row.arm or ""


def extraction(study: Study) -> list[Block]:
    floor = {row.group: row for row in study.select("extraction", "exact", role="floor")}
    heads: dict[Column, Describe] = {
        text("People"): lambda row: row.group or "",
        text("Rule"): lambda row: row.attack or "",
    }
    for row in study.select("extraction", "exact", role="floor"):
        row.shown = row.value == floor[row.group].value  # the same for all models and temperatures
    rule = plain_table(list(floor.values()), "Name-rule floor: exact addresses without a model", heads, "{:.1%}")
    return [
        *fold("Every line at the fixed settings", extraction_table(study, True)),
        *fold("Other temperatures", extraction_table(study, False), "more"),
        *fold("Floor", rule),
    ]


def perplexity(study: Study) -> list[Block]:
    heads: dict[Column, Describe] = {
        text("Model"): who,
        text("Measure"): lambda row: row.metric.replace("_", " "),
        text("Texts"): lambda row: row.group or "",
    }
    return fold("All figures", plain_table(study.select("perplexity"), "Perplexity and bits per byte", heads))


def attack_of(row: Row) -> str:
    """The attack, and the number of shadows behind it."""
    shadows = row.settings.get("n_shadows") if row.attack in SHADOW_ATTACKS else None
    return f"{row.attack} ({shadows} shadows)" if shadows else row.attack or ""


def mia(study: Study) -> list[Block]:
    heads: dict[Column, Describe] = {
        text("Model"): who,
        text("Attack"): attack_of,
        text("Of"): lambda row: row.role,
        text("Texts"): lambda row: row.group or "",
    }
    caption = "ROC-AUC of every attack, with blind baselines and the base"
    rows = study.select("mia", "auc")
    of = {role: place for place, role in enumerate(("target", "base", "blind"))}
    first = {row.file: place for place, row in reversed(list(enumerate(rows)))}
    rows = sorted(rows, key=lambda row: (first[row.file], of.get(row.role, len(of))))  # attacks before blind baselines
    auc = plain_table(rows, caption, heads, "{:.3f}")
    heads = {
        **heads,
        Column("Level"): lambda row: Cell.number(float(row.level or "nan"), "{:.1%}"),
        Column("False positives"): lambda row: Cell.number(row.count, "{:,}"),
    }
    tpr = plain_table(study.select("mia", "tpr"), "True positive rate at a fixed false positive rate", heads, "{:.2%}")
    return [*fold("AUC", auc), *fold("TPR at low FPR", tpr), *dataset_inference(study)]


def dataset_inference(study: Study) -> list[Block]:
    """Dataset inference (Maini et al. 2024), from run_mia.json."""
    rows = []
    for path, run in study.runs.items():
        for whose, test in (run.get("dataset_inference") or {}).items():
            if test:
                rows.append(
                    [
                        Cell(str(run.get("args", {}).get("model") or Path(path).parent.name)),
                        Cell(whose),
                        Cell.number(test["p"], "{:.2g}"),
                        Cell.number(test["t"], "{:.2f}"),
                        Cell.number(test["n_members"], "{:,}"),
                        Cell(study.shown(path)),
                    ]
                )
    columns = [text("Model"), text("Scores of"), Column("p"), Column("t"), Column("Members"), Column("File", "source")]
    table: list[Block] = [Table(columns, rows, "Set-level test; blind: without the model")]
    return fold("Dataset inference", table) if rows else []


def privacy(study: Study) -> list[Block]:
    def setting(name: str, form: str = "{}", missing: str = "") -> Describe:
        return lambda row: missing if row.settings.get(name) is None else form.format(row.settings[name])

    heads: dict[Column, Describe] = {
        text("Model"): who,
        text("Bound"): lambda row: row.metric,
        Column("δ"): lambda row: row.level or "",
        text("Unit"): setting("unit"),
        Column("σ"): setting("noise_multiplier"),
        Column("Sampling rate"): setting("sample_rate", "{:.4g}", "–"),
        Column("Steps"): setting("steps"),
    }
    upper = plain_table(study.select("privacy"), "ε from the accountants, add/remove adjacency", heads)
    heads = {
        text("Arm"): who,
        text("Measure"): lambda row: row.metric,
        text("Part"): lambda row: row.template or "",
        text("Canaries"): lambda row: row.attack or "",
        Column("Inserted"): lambda row: Cell.number(row.repetitions, "{}×"),
        Column("Rows"): lambda row: Cell.number(row.count, "{:,}"),
    }
    return [*fold("ε", upper), *fold("Canaries", plain_table(study.select("canary"), "Canaries", heads))]


def fidelity(study: Study) -> list[Block]:
    heads: dict[Column, Describe] = {
        text("Measure"): lambda row: row.metric,
        text("Arm"): who,
        text("File"): lambda row: row.group or "",
    }
    table = plain_table(study.select("fidelity"), "Fidelity, and its excess over real", heads)
    return fold("Every measure", table)


def utility(study: Study) -> list[Block]:
    def against_real(row: Row) -> str:
        pair = row.settings.get("mcnemar_against_real")
        return f"+{pair['gained']} −{pair['lost']}, p {pair['p']:.2g}" if pair else ""

    def change(row: Row) -> str:
        change = row.settings.get("relative_change")
        note = ": hardly moved, equals the base" if provenance.hardly_moved(change) else ""
        return "" if change is None else f"{change:.1g}{note}"

    measure: dict[Column, Describe] = {text("Measure"): lambda row: row.metric, text("Arm"): who}
    heads: dict[Column, Describe] = {
        **measure,
        Column("Seed"): lambda row: "–" if row.seed is None else str(row.seed),
        text("Against real"): against_real,
        text("‖ΔW‖/‖W‖"): change,
    }
    scores = plain_table(study.select("utility"), "Train on synthetic, test on real", heads)
    importance = plain_table(study.select("importance"), "Feature importance consistency", measure)
    heads = {
        text("Label"): lambda row: row.metric,
        text("Arm"): who,
        text("Rater"): lambda row: row.template or "all",
    }
    human = plain_table(study.select("human"), "Human evaluation of blinded rows", heads)
    return [
        *fold("Every score", scores),
        *fold("Feature importance", importance),
        *fold("Human evaluation", human),
    ]


def sweep(study: Study) -> list[Block]:
    heads: dict[Column, Describe] = {text("Setting"): who, text("Measure"): lambda row: row.metric}
    return plain_table(study.select("sweep"), "Means over seeds; n is the number of seeds", heads)


def training(study: Study) -> list[Block]:
    rows = []
    for path, run in study.runs.items():
        if Path(path).name != "run.json":
            continue
        peak = run.get("peak_memory") or {}
        memory = peak.get("gpu_bytes") or peak.get("cpu_bytes")
        gib = "–" if not memory else f"{memory / 2**30:.1f}"
        rows.append(
            [
                Cell(study.shown(Path(path).parent)),
                Cell(str(run.get("status"))),
                Cell.number(run.get("steps"), "{:,}"),
                Cell.number(run.get("tokens_per_second"), "{:,.0f}"),
                Cell.number(run.get("seconds"), "{:,.0f}"),
                Cell.number(memory, text=gib),
                Cell.number(run.get("relative_change"), "{:.2g}"),
                Cell(str(run.get("seed"))),
                Cell(study.shown(path)),
            ]
        )
    columns = [text("Run"), text("Status"), Column("Steps"), Column("Tokens/s"), Column("Seconds"), Column("Peak GiB")]
    columns += [Column("‖ΔW‖/‖W‖"), Column("Seed"), Column("File", "source")]
    table: list[Block] = [Table(columns, rows, "Training runs")]
    return fold("Runs", table) if rows else []


SECTIONS: dict[str, tuple[str, Callable[[Study], list[Block]]]] = {  # anchor: (title, its tables)
    "extraction": ("Extraction of addresses", extraction),
    "perplexity": ("Perplexity", perplexity),
    "mia": ("Membership inference", mia),
    "privacy": ("Differential privacy and canaries", privacy),
    "fidelity": ("Fidelity of synthetic text", fidelity),
    "utility": ("Utility of synthetic text", utility),
    "sweep": ("Sweep of settings", sweep),
    "training": ("Training", training),
}


def only_in_csv(study: Study, section: str) -> list[Block]:
    """The numbers of a section that no table here has, counted by measure and role."""
    counts: dict[str, int] = {}
    for row in (row for area in AREAS.get(section, ()) for row in study.select(area) if not row.shown):
        of = "" if row.role in ("target", "mean") else f" of the {row.role}"
        name = f"{row.metric}{of}{', all templates together' if row.template == 'all' else ''}"
        counts[name] = counts.get(name, 0) + 1
    listed = "; ".join(f"{name} ({count:,})" for name, count in counts.items())
    return [Paragraph(f"Only in results.csv: {listed}.")] if counts else []
