"""The first table of the page: one row per model, and one per arm of a study of synthetic text."""

from __future__ import annotations

from collections.abc import Callable

from common import provenance
from common.schema import GREEDY_BELOW, HEADLINE_ATTACK, HEADLINE_TEMPERATURE
from reporting.answers import first_of_each
from reporting.blocks import Block, Cell, Column, Table, fold
from reporting.load import choose
from reporting.style import Look
from reporting.table import Row, Study

MOST_MODELS = 24  # in the first table; if there are more, it has only the compared ones, and the rest is folded below
FLOOR = ""  # key of the row without a model


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
        by_model = {FLOOR if row.role == "floor" else row.model.key: row for row in rows if row.model}
        if by_model.keys() - {FLOOR}:
            self.columns.append(Column(name, small=small))
            self.cells.append({key: estimate(row, form, count, exact) for key, row in by_model.items()})
            self.rows.append(by_model)

    def add_paired(self, study: Study, fixed: list[Row], small: str) -> None:
        """Add the exact answers gained and lost against the baseline, row by row, with McNemar's p by template."""
        sources = {row.source: row.measured.key for row in fixed if row.metric == "exact"}
        found: dict[str, list[Row]] = {}
        for row in study.select("extraction", role="baseline"):
            if row.source in sources and row.metric.startswith("exact"):
                found.setdefault(sources[row.source], []).append(row)
        if found:
            self.columns.append(Column("Gained, lost against base", small=small))
            self.cells.append({key: gained_and_lost(rows) for key, rows in found.items()})
            self.rows.append({key: rows[0] for key, rows in found.items()})

    def add_hardly_moved(self, study: Study) -> None:
        """Add ‖ΔW‖/‖W‖ of the models that training hardly changed, if one of them is in the table."""
        small = {key: model.change for key, model in study.models.items() if provenance.hardly_moved(model.change)}
        if any(key in rows for key in small for rows in self.rows):
            note = ("the model has hardly moved: its row is that of the base",)
            self.columns.append(Column("‖ΔW‖/‖W‖", small="if small"))
            self.cells.append({key: Cell.number(change, "{:.1g}", note) for key, change in small.items()})
            self.rows.append({})

    def line(self, name: str, key: str) -> list[Cell]:
        return [Cell(name), *(cells.get(key, Cell.empty()) for cells in self.cells), Cell(self.sources(key))]

    def sources(self, key: str) -> str:
        return "\n".join(dict.fromkeys(rows[key].source for rows in self.rows if key in rows))


def gained_and_lost(rows: list[Row]) -> Cell:
    """+gained −lost over all templates, and the p of each."""
    gained, lost = (sum(row.settings[name] for row in rows) for name in ("gained", "lost"))
    each = ", ".join(f"{row.template} {row.value:.2g}" for row in rows if row.value is not None)
    return Cell.number(gained - lost, text=f"+{gained} −{lost}", small=(f"McNemar p: {each}",) if each else ())


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

        floor = [row for row in study.select("extraction", role="floor", headline=True) if (row.group or "") == group]

        def with_floor(metric: str, fixed: list[Row] = fixed, floor: list[Row] = floor) -> list[Row]:
            own = [row for row in fixed if row.metric == metric]
            return own + [row for row in floor if row.metric == metric][:1] if own else []

        glance.add("Exact addresses", with_floor("exact"), small=group if len(groups) > 1 else "", count=True)
        glance.add_paired(study, fixed, group if len(groups) > 1 else "")
        if number == 0:
            greedy = [row for row in rows if (row.temperature or 0) <= GREEDY_BELOW and row.metric == "exact"]
            greedy.sort(key=lambda row: -(row.temperature or 0))
            glance.add("Exact, greedy", greedy, count=True)
            glance.add("Exact, no name rule", of("no_pattern"), count=True)
            glance.add("Loose match", with_floor("matches"), count=True)
    perplexity = study.select("perplexity", "mean", role="target")
    sizes = [row.group or "" for row in perplexity]
    main = max(set(sizes), key=lambda group: (sizes.count(group), group)) if sizes else None
    glance.add("Perplexity", [row for row in perplexity if row.group == main], "{:.2f}")
    headline = {"role": "target", "attack": HEADLINE_ATTACK}
    attack = f"attack {HEADLINE_ATTACK}"
    glance.add("Membership AUC", study.select("mia", "auc", **headline), "{:.3f}", small=attack)
    glance.add("TPR at 1 % FPR", study.select("mia", "tpr", **headline, level="0.01"), small=attack)
    changes = [row for row in study.select("paired") if row.model]
    for people in dict.fromkeys(row.template for row in changes):
        own = [row for row in changes if row.template == people]
        glance.add("Exact, change in points", own, "{:+.1f}", small=f"paired with the base: {people}")
    arms = {row.arm for row in study.select("canary", role="target")}  # have a table of their own
    budget = [row for row in study.select("privacy", "ε upper (PRV)") if study.same.get(row.measured.arm) not in arms]
    glance.add("ε", budget, "{:.2f}", small="upper bound, PRV", exact=True)
    glance.add_hardly_moved(study)
    return glance


def glance_table(study: Study, look: Look) -> list[Block]:
    """One row per model, each number at its fixed setting."""
    glance = glance_columns(study)
    if not glance.columns:
        return arms_table(study, look)
    compared, rule, _ = choose(study)
    keys = {key for column, rows in zip(glance.columns, glance.rows) for key in rows if column.name != "ε"}
    keys |= {model.key for model in compared if any(model.key in rows for rows in glance.rows)}
    measured = [model for model in look.sort(study.models.values()) if model.key in keys]
    rows = [glance.line(model.label, model.key) for model in measured]
    if any(FLOOR in line for line in glance.rows):
        rows.append(glance.line("no model: name rule", FLOOR))
    bold = {index for index, model in enumerate(measured) if model in compared and len(measured) > len(compared)}

    def caption(where: str) -> str:
        return (
            f"Each number at one setting fixed in advance: extraction at temperature {HEADLINE_TEMPERATURE} over all "
            f"templates (with greedy next to it), membership inference with {HEADLINE_ATTACK}. 95 % intervals. Figures "
            f"compare {rule}{where if bold else ''}."
        )

    columns = [text("Model"), *glance.columns, Column("Lines", "source")]
    if len(measured) <= MOST_MODELS:
        return [Table(columns, rows, caption(", in bold here"), frozenset(bold)), *arms_table(study, look)]
    few = [row for index, row in enumerate(rows) if index in bold]
    every = Table(columns, rows, "All measured checkpoints")
    return [
        Table(columns, few, caption(", the only ones here")),
        *fold(f"All {len(measured):,} models", [every], "all"),
        *arms_table(study, look),
    ]


def arms_table(study: Study, look: Look) -> list[Block]:
    """One row per arm of a study of canaries and synthetic text: what is private, then what the text is good for."""
    tables = [
        _arms(
            study,
            look,
            _add_privacy,
            "Arms with canaries. ε: proven by the accountant, and shown by canaries at 95 %. Exposure: median and "
            "quartiles; paired with the base: mean change over the same canaries.",
        ),
        _arms(
            study,
            look,
            _add_text,
            "Arms of synthetic text. Fidelity: against held-out real rows. Utility: on held-out real rows after "
            "training on each arm.",
        ),
    ]
    return [table for table in tables if table.rows]


Add = Callable[..., None]


def _arms(study: Study, look: Look, fill: Callable[[Study, Add], None], caption: str) -> Table:
    columns: list[Column] = []
    cells: list[dict[str, Cell]] = []
    sources: dict[str, list[str]] = {}

    def add(name: str, rows: list[Row], small: str = "", show: Callable[[Row], Cell] | None = None) -> None:
        by_arm = {study.same.get(row.arm, row.arm): row for row in reversed(first_of_each(rows)) if row.arm}
        if by_arm:
            columns.append(Column(name, small=small))
            cells.append({arm: (show or (lambda row: estimate(row, "{:.3g}")))(row) for arm, row in by_arm.items()})
            for arm, row in by_arm.items():
                sources.setdefault(arm, []).append(row.source)

    fill(study, add)
    order = {arm: place for place, arm in enumerate([*look.arms[1:], "base", "majority"])}
    rows = [
        [Cell(arm), *(own.get(arm, Cell.empty()) for own in cells), Cell("\n".join(dict.fromkeys(sources[arm])))]
        for arm in sorted(sources, key=lambda arm: order.get(arm, len(order)))
    ]
    return Table([text("Arm"), *columns, Column("Lines", "source")], rows, caption)


def _add_privacy(study: Study, add: Add) -> None:
    canary = [row for row in study.select("canary") if row.settings.get("headline") is not False]
    if not canary:
        return

    def bound(row: Row) -> Cell:
        return estimate(row, "{:.2f}", exact=True)

    last = [row for row in study.select("privacy", "ε upper (PRV)") if row.measured.last]
    upper = [row for row in last if row.measured.arm in study.same]
    proven = [*upper, *(row for row in canary if row.metric == "ε upper (PRV)")]
    add("ε ≤", proven, "PRV", lambda row: Cell.number(row.value, "{:.2f}", (row.undefined,) if row.undefined else ()))
    for metric, words in (("ε lower", "Steinke"), ("ε lower, f-DP", "f-DP"), ("ε lower, text only", "text only")):
        add("ε ≥", [row for row in canary if row.metric == metric], f"95 %, {words}", bound)
    exposures = [row for row in canary if row.metric == "exposure"]
    most = max((row.repetitions or 0 for row in exposures), default=0)
    for count in dict.fromkeys((most, 0)):
        own = [row for row in exposures if (row.repetitions or 0) == count]
        add("Exposure", own, f"bits, {count}×" if count else "bits, held out")
    paired = [row for row in study.select("paired") if not row.model and row.repetitions == most and most]
    add("Exposure − base", paired, f"bits, {most}×, paired", lambda row: estimate(row, "{:+.2f}"))
    whole = [row for row in canary if row.metric == "generated rows with it" and row.template == "whole"]
    whole = [row for row in whole if row.repetitions == most and row.attack != "audit"]
    add("Rows with a whole canary", whole, f"{most}×", lambda row: estimate(row, count=True))


def _add_text(study: Study, add: Add) -> None:
    for metric, words in (("MAUVE", "MAUVE"), ("Frechet distance", "Fréchet distance")):
        add(words, study.select("fidelity", metric, role="target"))
    scores = study.select("utility", "accuracy")
    single = {(row.group, row.arm): row for row in scores if row.role == "target"}
    means = [single.get((row.group, row.arm), row) if row.n == 1 else row for row in scores if row.role == "mean"]
    add("Accuracy", [*means, *(row for row in scores if row.role == "baseline")])
    pairs = [row for row in scores if row.role == "target" and row.settings.get("mcnemar_against_real")]
    add("Accuracy against real", pairs, "one seed, paired", _against_real)


def _against_real(row: Row) -> Cell:
    pair = row.settings["mcnemar_against_real"]
    return Cell.number(pair["p"], text=f"+{pair['gained']} −{pair['lost']}", small=(f"McNemar p {pair['p']:.2g}",))
