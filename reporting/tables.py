"""The tables of the page, as blocks; no HTML."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from common import provenance
from common.schema import GREEDY_BELOW, HEADLINE_ATTACK, HEADLINE_TEMPERATURE, SHADOW_ATTACKS
from reporting.blocks import Block, Cell, Column, Paragraph, Table, fold
from reporting.load import choose
from reporting.style import Look
from reporting.table import Record, Row, Study

MOST_MODELS = 24  # in the first table; if there are more, it has only the compared ones, and the rest is folded below
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
    "privacy": ("privacy", "canary"),
    "fidelity": ("fidelity",),
    "utility": ("utility", "importance", "human"),
    "sweep": ("sweep",),
}

Describe = Callable[[Row], str | Cell]


def text(name: str) -> Column:
    return Column(name, "text")


def estimate(row: Row, form: str = "{:.1%}", count: bool = False, exact: bool = False) -> Cell:
    """A value with its interval and n in small print. count: hits instead of n; exact: the value has no interval."""
    row.shown = True
    if row.value is None:
        return Cell("–", "", (row.undefined or "undefined",))
    ends = f"{form.format(row.low)}–{form.format(row.high)}" if row.low is not None else "" if exact else "no interval"
    hits = f"{row.count:,} of {row.n:,}" if count and row.count is not None else f"n {row.n:,}" if row.n else ""
    return Cell.number(row.value, form, tuple(part for part in (ends, hits) if part))


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


class Glance:
    """Columns of numbers by model, each at its fixed setting."""

    def __init__(self) -> None:
        self.columns: list[Column] = []
        self.cells: list[dict[str, Cell]] = []  # for each column, by model key
        self.rows: list[dict[str, Row]] = []

    def add(
        self,
        name: str,
        rows: list[Row],
        form: str = "{:.1%}",
        small: str = "",
        count: bool = False,
        exact: bool = False,
    ) -> None:
        by_model = {row.model.key: row for row in rows if row.model}
        if by_model:
            self.columns.append(Column(name, small=small))
            self.cells.append({key: estimate(row, form, count, exact) for key, row in by_model.items()})
            self.rows.append(by_model)

    def add_hardly_moved(self, study: Study) -> None:
        """Add ‖ΔW‖/‖W‖ of the models that training hardly changed, if one of them is in the table."""
        small = {key: model.change for key, model in study.models.items() if provenance.hardly_moved(model.change)}
        if any(key in rows for key in small for rows in self.rows):
            note = ("the model has hardly moved: its row is that of the base",)
            self.columns.append(Column("‖ΔW‖/‖W‖", small="if small"))
            self.cells.append({key: Cell.number(change, "{:.1g}", note) for key, change in small.items()})
            self.rows.append({})

    def sources(self, key: str) -> str:
        return "\n".join(dict.fromkeys(rows[key].source for rows in self.rows if key in rows))


def glance_columns(study: Study) -> Glance:
    glance = Glance()
    every = study.select("extraction", role="target", template="all")
    models_of: dict[str, set[str]] = {}
    for row in every:
        models_of.setdefault(row.group or "", set()).add(row.model.key if row.model else "")
    groups = sorted(models_of, key=lambda group: -len(models_of[group]))
    for number, group in enumerate(groups[:3]):
        rows = [row for row in every if (row.group or "") == group]
        fixed = [row for row in rows if row.headline]

        def of(metric: str, fixed: list[Row] = fixed) -> list[Row]:
            return [row for row in fixed if row.metric == metric]

        glance.add("Exact addresses", of("exact"), small=group if len(groups) > 1 else "", count=True)
        if number == 0:
            greedy = [row for row in rows if (row.temperature or 0) <= GREEDY_BELOW and row.metric == "exact"]
            greedy.sort(key=lambda row: -(row.temperature or 0))
            glance.add("Exact, greedy", greedy, count=True)
            glance.add("Exact, no name rule", of("no_pattern"), count=True)
            glance.add("Loose match", of("matches"), count=True)
    perplexity = study.select("perplexity", "mean", role="target")
    sizes = [row.group or "" for row in perplexity]
    main = max(set(sizes), key=lambda group: (sizes.count(group), group)) if sizes else None
    glance.add("Perplexity", [row for row in perplexity if row.group == main], "{:.2f}")
    headline = {"role": "target", "attack": HEADLINE_ATTACK}
    attack = f"attack {HEADLINE_ATTACK}"
    glance.add("Membership AUC", study.select("mia", "auc", **headline), "{:.3f}", small=attack)
    glance.add("TPR at 1 % FPR", study.select("mia", "tpr", **headline, level="0.01"), small=attack)
    glance.add("ε", study.select("privacy", "ε upper (PRV)"), "{:.2f}", small="upper bound, PRV", exact=True)
    glance.add_hardly_moved(study)
    return glance


def glance_table(study: Study, look: Look) -> list[Block]:
    """One row per model, each number at its fixed setting."""
    glance = glance_columns(study)
    if not glance.columns:
        return []
    compared, rule, _ = choose(study)
    keys = {key for column, rows in zip(glance.columns, glance.rows) for key in rows if column.name != "ε"}
    keys |= {model.key for model in compared if any(model.key in rows for rows in glance.rows)}
    measured = [model for model in look.sort(study.models.values()) if model.key in keys]
    rows = []
    for model in measured:
        numbers = [cells.get(model.key, Cell.empty()) for cells in glance.cells]
        rows.append([Cell(model.label), *numbers, Cell(glance.sources(model.key))])
    bold = {index for index, model in enumerate(measured) if model in compared and len(measured) > len(compared)}

    def caption(where: str) -> str:
        return (
            f"Each number at one setting fixed in advance: extraction at temperature {HEADLINE_TEMPERATURE} over all "
            f"templates (with greedy next to it), membership inference with {HEADLINE_ATTACK}. 95 % intervals. Figures "
            f"compare {rule}{where if bold else ''}."
        )

    columns = [text("Model"), *glance.columns, Column("Lines", "source")]
    if len(measured) <= MOST_MODELS:
        return [Table(columns, rows, caption(", in bold here"), frozenset(bold))]
    few = [row for index, row in enumerate(rows) if index in bold]
    every = Table(columns, rows, "All measured checkpoints")
    return [
        Table(columns, few, caption(", the only ones here")),
        *fold(f"All {len(measured):,} models", [every], "all"),
    ]


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
    auc = plain_table(study.select("mia", "auc"), caption, heads, "{:.3f}")
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
