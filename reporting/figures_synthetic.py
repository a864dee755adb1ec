"""Figures of synthetic text: fidelity, utility, feature importance, ratings by people. See figures_extraction.py."""

from typing import TYPE_CHECKING

from reporting.style import MOST_GROUPS, Look, interval_text, more_groups, name_of
from reporting.svg import AXIS, BASE, INK, MUTED, Figure, Key, Panel, Style, errors, percent
from reporting.table import Model, Row, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes


SHOWN_FIDELITY = {  # measure: title of its panel
    "words a review": "Words per review",
    "Jensen-Shannon word frequencies (bits)": "JSD of word frequencies",
    "Frechet distance": "Fréchet distance",
    "MAUVE": "MAUVE",
    "distinct-2": "Distinct-2",
    "self-BLEU": "Self-BLEU",
    "copying gap (training - held-out)": "Copying gap (cosine)",
    "copies >= 50 characters": "Copies ≥ 50 characters",
    "cut at the token limit": "Cut at the token limit",
}


def name_lines(axes: "Axes", names: list[str], above: float) -> None:
    """Set up axes for dots on named lines, the first name lowest, with a little less than a line above the last."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names) - above)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines["left"].set_visible(False)
    axes.margins(x=0.14)
    axes.locator_params(axis="x", nbins=4)
    axes.grid(axis="x")


def dots(
    title: str,
    rows: list[Row],
    look: Look,
    reference: list[tuple[float, Style]] | None = None,
    form: str = "{:.3g}",
    shown: dict[str, str] | None = None,
) -> Panel:
    """A panel of one metric: one dot per arm with its interval and value; several dots of an arm are stacked."""
    arms = list(dict.fromkeys(row.arm or "" for row in rows))

    def draw(axes: "Axes") -> None:
        for index, arm in enumerate(reversed(arms)):
            colour, marker = look.of.get(arm, (BASE, "o"))
            own = [row for row in rows if row.arm == arm and row.value is not None]
            for layer, row in enumerate(own):
                height = index + 0.16 * (layer - (len(own) - 1) / 2)
                axes.errorbar(row.number, height, xerr=errors(row), fmt=marker, color=colour, elinewidth=1.4)
                if len(own) == 1:
                    axes.annotate(
                        form.format(row.value),
                        (row.number, index),
                        (0, 6),
                        textcoords="offset points",
                        ha="center",
                        fontsize=8,
                        color=INK,
                    )
        if "%" in form:
            percent(axes.xaxis)
        for value, style in reference or ():
            axes.axvline(value, color=MUTED, linestyle=style, linewidth=1.1, zorder=0)
        name_lines(axes, [(shown or {}).get(arm, arm) for arm in reversed(arms)], 0.25)

    return Panel(title, draw, (3.3, 0.9 + 0.36 * len(arms)))


def fidelity(study: Study, look: Look, chosen: list[Model]) -> list[Figure]:
    figures = []
    every = study.select("fidelity", role="target")
    sets = list(dict.fromkeys(row.group for row in every))
    for index, group in enumerate(sets[:MOST_GROUPS]):
        panels: list[Panel] = []
        summary: list[str] = []
        for measure in SHOWN_FIDELITY:
            rows = [row for row in every if (row.group, row.metric) == (group, measure) and row.value is not None]
            if not rows:
                continue
            against: list[tuple[float, Style]] = [(row.number, ":") for row in rows if row.arm == "real"]
            panels.append(dots(SHOWN_FIDELITY[measure], rows, look, against, shown={"real": "real (again)"}))
            summary.append(f"{measure}: " + ", ".join(f"{row.arm} {interval_text(row, False)}" for row in rows))
        n = next((row.n for row in every if row.group == group), None)
        caption = (
            f"{group}, {n:,} rows per sample. Dotted: a second real sample of the same size, i.e. how much two samples "
            "of real text differ. 95 % jackknife; MAUVE: range over seeds. The table has more metrics."
            + more_groups(sets, index)
        )
        if panels:
            figures.append(
                Figure(
                    name_of("fidelity", index),
                    "Fidelity of synthetic text",
                    caption,
                    "; ".join(summary),
                    panels,
                    [],
                    3,
                    "fidelity",
                )
            )
    return figures


def utility(study: Study, look: Look, chosen: list[Model]) -> list[Figure]:
    """Train on synthetic, test on real: each seed as a pale dot, the mean over seeds as a solid one."""
    figures = []
    every = study.select("utility")
    sets = list(dict.fromkeys(row.group for row in every))
    for index, group in enumerate(sets[:MOST_GROUPS]):
        rows = [row for row in every if row.group == group]
        panels = [
            _utility(title, [row for row in rows if row.metric == metric], look)
            for metric, title in (("accuracy", "Accuracy"), ("macro_f1", "Macro-F1"), ("mae", "Mean error (stars)"))
        ]
        summary = "; ".join(
            f"{row.arm} {row.metric} {interval_text(row, False)}" for row in rows if row.role != "target"
        )
        keys: list[Key] = [
            ("one seed", AXIS, "o", None),
            ("mean over seeds", INK, "o", None),
            ("majority class", MUTED, None, ":"),
            ("untuned base", BASE, None, "--"),
        ]
        caption = f"{group}. Rating held-out real reviews after training on each arm for equal rows and steps."
        caption += more_groups(sets, index)
        figures.append(
            Figure(
                name_of("utility", index),
                "Train on synthetic, test on real",
                caption,
                summary,
                panels,
                keys,
                3,
                "utility",
            )
        )
    return figures


def _utility(title: str, rows: list[Row], look: Look) -> Panel:
    arms = list(dict.fromkeys(row.arm or "" for row in rows if row.role == "mean"))
    lines = {row.arm: row.value for row in rows if row.role == "baseline"}

    def draw(axes: "Axes") -> None:
        for index, arm in enumerate(reversed(arms)):
            colour, marker = look.of.get(arm, (BASE, "o"))
            for row in rows:
                if row.arm == arm and row.role == "target":
                    axes.plot(row.number, index, "o", color=colour, alpha=0.35, markersize=5)
                elif row.arm == arm and row.role == "mean":
                    axes.plot(row.number, index, marker, color=colour, markersize=8)
                    axes.annotate(
                        f"{row.value:.3f}",
                        (row.value, index),
                        (0, 7),
                        textcoords="offset points",
                        ha="center",
                        fontsize=8,
                    )
        for arm, style in (("majority", ":"), ("base", "--")):
            if (value := lines.get(arm)) is not None:
                axes.axvline(value, color=MUTED if arm == "majority" else BASE, linestyle=style, linewidth=1.3)
        name_lines(axes, list(reversed(arms)), 0.2)

    return Panel(title, draw, (3.0, 0.9 + 0.38 * len(arms)))


def human(study: Study, look: Look, chosen: list[Model]) -> list[Figure]:
    """Share of each label on the blinded sheets, one dot per rater."""
    figures = []
    every = study.select("human", role="target")
    sets = list(dict.fromkeys(row.group for row in every))
    for index, group in enumerate(sets[:MOST_GROUPS]):
        rows = [row for row in every if row.group == group and row.value is not None]
        labels = list(dict.fromkeys(row.metric for row in rows))
        panels = [
            dots(label.capitalize(), [row for row in rows if row.metric == label], look, form="{:.0%}")
            for label in labels
        ]
        kappa = [row.value for row in study.select("human", "Fleiss κ", group=group) if row.value is not None]
        agree = f" Agreement between raters: Fleiss κ {kappa[0]:.2f}." if kappa else ""
        caption = f"{group}. Share of blinded rows with each label, one dot per rater; 95 % Clopper–Pearson.{agree}"
        caption += more_groups(sets, index)
        summary = "; ".join(f"{row.metric}: {row.arm}, {row.template} {interval_text(row)}" for row in rows)
        if panels:
            figures.append(
                Figure(name_of("human", index), "Human evaluation", caption, summary, panels, [], 3, "utility")
            )
    return figures


def importance(study: Study, look: Look, chosen: list[Model]) -> list[Figure]:
    figures = []
    every = study.select("importance")
    sets = list(dict.fromkeys(row.group for row in every))
    for index, group in enumerate(sets[:MOST_GROUPS]):
        panels: list[Panel] = []
        summary: list[str] = []
        for metric in ("spearman", "pearson", "jaccard@20"):
            rows = [row for row in every if (row.group, row.metric) == (group, metric) and row.value is not None]
            marks: list[tuple[float, Style]] = [(row.number, ":") for row in rows if row.arm in ("real", "null")]
            shown = {"real": "real (ceiling)", "null": "shuffled labels"}
            if rows:
                panels.append(dots(metric.capitalize(), rows, look, marks, "{:.2f}", shown))
                summary.append(f"{metric}: " + ", ".join(f"{row.arm} {row.value:.2f}" for row in rows))
        caption = f"{group}. Agreement of word importances with the model trained on real rows; range over draws."
        caption += more_groups(sets, index)
        if panels:
            figures.append(
                Figure(
                    name_of("importance", index),
                    "Feature importance consistency",
                    caption,
                    "; ".join(summary),
                    panels,
                    [],
                    3,
                    "utility",
                )
            )
    return figures
