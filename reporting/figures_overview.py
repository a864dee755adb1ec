"""The picture below the answers: what each question measured, one panel each, by arm."""

from typing import TYPE_CHECKING, Any

from reporting.answers import Answer, answers
from reporting.figures_privacy import bounds_of
from reporting.figures_synthetic import name_lines
from reporting.style import Look, interval_text, names, short
from reporting.svg import INK, MUTED, Figure, Panel, errors, from_zero, percent
from reporting.table import Model, Row, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_LINES = 8
TITLES = {  # metric: (title, whether it is a share, its value by chance)
    "exact": ("Exact addresses", True, None),
    "matches": ("Loose matches", True, None),
    "exposure": ("Exposure (bits)", False, 1.0),
    "auc": ("Membership AUC", False, 0.5),
    "AUC of the audit": ("Audit AUC", False, 0.5),
    "accuracy": ("Accuracy on real rows", False, None),
    "mean": ("Perplexity", False, None),
}


def overview(study: Study, look: Look, chosen: list[Model]) -> list[Figure]:
    """One panel per question that was measured, with the base and the controls that have a number of their own."""
    drawn: list[tuple[str, list[Row], list[float]]] = []
    for answer in answers(study, look):
        found = _of_question(study, look, answer)
        drawn += [found] if found else []
    if len(drawn) < 2:
        return []
    width = 2.85 if len(drawn) == 4 else 3.6 if len(drawn) == 3 else 4.4
    lines = max(len(rows) for _, rows, _ in drawn)
    panels = [_panel(*one, look, (width, 0.75 + 0.34 * lines)) for one in drawn]
    summary = "; ".join(
        f"{title}: " + ", ".join(f"{row.arm} {interval_text(row, False)}" for row in rows) for title, rows, _ in drawn
    )
    caption = (
        "One panel per question, one line per arm, with the intervals of the sentences above. Dotted: the control "
        "without a model (name rule, chance, majority class)."
    )
    return [Figure("overview", "In one picture", caption, summary, panels, [], 4, "answers")]


def _of_question(study: Study, look: Look, answer: Answer) -> tuple[str, list[Row], list[float]] | None:
    """(title, rows, dotted lines) of a question's panel."""
    if answer.anchor == "privacy":
        rows = [row for row in bounds_of(study) if row.metric in ("ε upper (PRV)", "ε lower")]
        known = {row.arm for row in rows if row.metric == "ε upper (PRV)"}
        own = study.select("privacy", "ε upper (PRV)", value=lambda value: value is not None)
        rows += [row for row in own if row.measured.last and study.same.get(row.measured.arm) not in known]
        return ("ε: proven (●), shown (▲)", rows, []) if rows else None
    if not answer.sentences:
        return None
    first = answer.sentences[0]
    shown = first.rows[0]
    title, _, chance = TITLES[shown.metric]
    rows = [row for row in first.rows if row.value is not None]
    lines = [] if chance is None else [chance]
    if shown.model:
        same = {
            "role": "target",
            "template": shown.template,
            "headline": shown.headline,
            "temperature": shown.temperature,
        }
        base = study.select(shown.area, shown.metric, group=shown.group, attack=shown.attack, **same)
        rows += [row for row in base if row.measured.is_base and row.value is not None and row not in rows]
        lines += [row.number for row in study.select(shown.area, shown.metric, role="floor", group=shown.group)][:1]
    elif shown.area == "canary":
        base = study.select("canary", shown.metric, arm="base", repetitions=shown.repetitions)
        rows += [row for row in base if row.value is not None][:1]
        title = f"Exposure, placed {shown.repetitions}× (bits)" if shown.metric == "exposure" else title
    else:
        rows += [row for row in study.select("utility", shown.metric, arm="real", role=shown.role)][:1]
        rows += [row for row in study.select("utility", shown.metric, arm="base")][:1]
        lines += [row.number for row in study.select("utility", shown.metric, arm="majority")][:1]
    return (title, rows, lines) if rows else None


def _panel(title: str, rows: list[Row], lines: list[float], look: Look, size: tuple[float, float]) -> Panel:
    called = names(list({row.model.key: row.model for row in rows if row.model}.values()))
    order = {arm: place for place, arm in enumerate([*look.arms[1:], "base"])}
    label = {id(row): called[row.model.key] if row.model else row.arm or "" for row in rows}
    rows = sorted(rows, key=lambda row: order.get(row.arm or "", len(order)))
    arms = list(dict.fromkeys(label[id(row)] for row in rows))[:MOST_LINES]
    bounds = any(row.metric.startswith("ε") for row in rows)
    share = TITLES.get(rows[0].metric, ("", False, None))[1]

    def draw(axes: "Axes") -> None:
        for index, arm in enumerate(reversed(arms)):
            for row in (row for row in rows if label[id(row)] == arm):
                colour, marker = look.of.get(row.arm or "base", look.of["base"])
                marker = ("^" if "lower" in row.metric else "o") if bounds else marker
                axes.errorbar(row.number, index, xerr=errors(row), fmt=marker, color=colour, elinewidth=1.5)
                above: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 8, "color": INK}
                text = f"{row.number:.1%}" if share else f"{row.number:.3g}"
                if not (bounds and "lower" in row.metric):
                    axes.annotate(text, (row.number, index), (0, 5), **above)
        for value in lines:
            axes.axvline(value, color=MUTED, linestyle=":", linewidth=1.2, zorder=0)
        if share:
            percent(axes.xaxis)
        name_lines(axes, [short(arm, 18) for arm in reversed(arms)], 0.25)
        if bounds or share:
            axes.set_xlim(0, axes.get_xlim()[1])
            from_zero(axes, "x")

    return Panel(title, draw, size)
