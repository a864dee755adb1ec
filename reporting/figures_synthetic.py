"""Figures of System S: bounds on ε, canaries, fidelity, utility, feature importance. See figures_extraction.py."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from reporting.style import MOST_GROUPS, Look, interval_text, more_groups, name_of, names, short
from reporting.svg import (
    AXIS,
    BASE,
    COLOURS,
    GRID,
    INK,
    MARKERS,
    MUTED,
    SERIES,
    Figure,
    Key,
    Panel,
    Style,
    errors,
    percent,
)
from reporting.table import Model, Row, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def who(rows: list[Row]) -> Callable[[Row], str]:
    """A function that labels a row: its model's shortest name, or its arm (with its folder if files differ)."""
    several = len({row.file for row in rows if not row.model}) > 1
    named = names(list({row.model.key: row.model for row in rows if row.model}.values()))

    def label(row: Row) -> str:
        if row.model:
            return named[row.model.key]
        arm = row.arm or ""
        return f"{arm} ({Path(row.file).parent})" if several else arm

    return label


def epsilon_bounds(study: Study, look: Look, chosen: list[Model]) -> list[Figure]:
    """Upper bounds from the accountants and empirical lower bounds, one row per run (its last checkpoint)."""
    last = [row for row in study.select("privacy") if row.model and row.model.last]
    rows = [row for row in last if row.value is not None]
    marks = {"ε upper (PRV)": ("blue", "o"), "ε upper (RDP)": ("sky", "s"), "ε lower": ("vermillion", "^")}
    marks |= {"ε lower, f-DP": ("purple", "D"), "ε lower, f-DP if Gaussian": ("green", "P")}
    marks |= {"ε lower, text only": ("amber", "v"), "ε lower, text only, auxiliary model": ("amber", "D")}
    kinds = marks.keys() - {"ε upper (RDP)"}
    bounds = [
        row
        for row in study.select("canary")
        if row.metric in kinds and row.value is not None and row.settings.get("headline") is not False
    ]
    if not rows and not bounds:
        return []
    # of several files about a checkpoint, one gives it its name: that of its model, not of its text
    naming: dict[object, Row] = {}
    for row in sorted(bounds, key=lambda row: row.metric != "ε lower"):
        naming.setdefault(row.settings.get("checkpoint") or (row.file, row.arm), row)
    called = who([*rows, *naming.values()])

    def place_of(row: Row) -> str:
        """The run's checkpoint, for a row from its privacy.json, a merge of it or an audit of it."""
        return row.model.origin if row.model else row.settings.get("checkpoint") or called(row)

    own = sorted(rows, key=lambda row: row.measured.key == row.measured.origin)  # a merge gets its checkpoint's name
    label_of = {place_of(row): called(row) for row in (*own, *naming.values())}  # and a run that of its audit
    once: dict[tuple[object, ...], Row] = {}
    for row in (*rows, *bounds):
        once.setdefault((place_of(row), row.metric, row.value, row.undefined), row)
    shown = list(once.values())
    places = list(dict.fromkeys(map(place_of, shown)))

    def draw(axes: "Axes") -> None:
        for index, name in enumerate(reversed(places)):
            run_rows = [row for row in shown if place_of(row) == name]
            ends = [row.number for row in run_rows]
            axes.plot([min(ends), max(ends)], [index, index], color=GRID, linewidth=5, zorder=1, solid_capstyle="round")
            for row in run_rows:
                colour, marker = marks[row.metric]
                colour = COLOURS[colour][0]
                inside = "none" if row.undefined else colour  # hollow: void
                axes.plot(row.number, index, marker, color=colour, markerfacecolor=inside, markersize=7, zorder=3)
        axes.set_yticks(range(len(places)), [short(label_of[name], 34) for name in reversed(places)])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.set(xlabel="ε", ylim=(-0.6, len(places) - 0.4))
        axes.set_xlim(left=0)
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)

    summary = "; ".join(f"{label_of[place_of(row)]}: {row.metric} {row.value:.3g}" for row in shown)
    keys: list[Key] = [
        (metric, COLOURS[colour][0], marker, None)
        for metric, (colour, marker) in marks.items()
        if any(row.metric == metric for row in shown)
    ]
    caption = (
        "Upper: proven by the accountant. Lower: shown by an audit with canaries, at 95 %. A lower bound to the right "
        "of the upper one contradicts the proof. Hollow: void."
    )
    if any(row.metric.endswith("if Gaussian") for row in shown):
        caption += (
            " f-DP: the bound of Mahloujifar et al. beside Steinke's; if Gaussian: it holds for a training that is a "
            "Gaussian mechanism, which DP-SGD is only nearly, and contradicts no proof."
        )
    endless = dict.fromkeys(row.measured.label for row in last if row.value is None)
    caption += f" No noise, hence no upper bound: {', '.join(endless)}." if endless else ""
    panel = Panel("ε at the δ of each run", draw, (4.2, 1.1 + 0.36 * len(places)))
    return [Figure("epsilon", "Privacy budget: proven and observed", caption, summary, [panel], keys, 1, "privacy")]


def exposure(study: Study, look: Look, chosen: list[Model]) -> list[Figure]:
    """Exposure by number of repetitions: median and quartiles, with the held-out canaries for comparison."""
    rows = [row for row in study.select("canary", "exposure") if row.value is not None]
    series: dict[str, list[Row]] = {}
    label = who(rows)
    for row in rows:
        series.setdefault(label(row), []).append(row)
    if not series:
        return []
    counts = sorted({row.repetitions or 0 for row in rows})
    ceiling = max((row.settings.get("ceiling") or 0) for row in rows)

    def draw(axes: "Axes") -> None:
        shift = 0.12
        for number, own in enumerate(series.values()):
            colour, marker = COLOURS[SERIES[number % len(SERIES)]][0], MARKERS[number % len(MARKERS)]
            own = sorted(own, key=lambda row: row.repetitions or 0)
            x = [counts.index(row.repetitions or 0) + shift * (number - (len(series) - 1) / 2) for row in own]
            axes.plot(x, [row.number for row in own], color=colour, linewidth=1, alpha=0.5)
            for position, row in zip(x, own):
                axes.errorbar(position, row.number, yerr=errors(row), fmt=marker, color=colour, elinewidth=1.4)
        axes.axhline(1.0, color=MUTED, linestyle=":", linewidth=1.2)
        if ceiling:
            axes.axhline(ceiling, color=AXIS, linestyle="--", linewidth=1.2)
        axes.set_xticks(range(len(counts)), ["held out" if count == 0 else f"{count}×" for count in counts])
        axes.set(
            xlabel="times inserted into the training data", ylabel="exposure (bits)", xlim=(-0.5, len(counts) - 0.5)
        )
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")

    keys: list[Key] = [
        (label, COLOURS[SERIES[i % len(SERIES)]][0], MARKERS[i % len(MARKERS)], None) for i, label in enumerate(series)
    ]
    keys.append(("chance, median 1 bit", MUTED, None, ":"))
    if ceiling:
        keys.append(("ceiling", AXIS, None, "--"))
    summary = "; ".join(
        f"{label}: " + ", ".join(f"{row.repetitions or 0}× {row.value:.2f}" for row in own)
        for label, own in series.items()
    )
    caption = "Median over canaries, whiskers: quartiles. A secret never seen has median 1 and mean 1.44 bits, not 0."
    panel = Panel("Exposure", draw, (4.2, 3.0))
    return [Figure("exposure", "Canaries: exposure by repetition", caption, summary, [panel], keys, 1, "privacy")]


def canary_counts(study: Study, look: Look, chosen: list[Model]) -> list[Figure]:
    """Generated rows that contain a part of a canary, by arm."""
    rows = [row for row in study.select("canary", "generated rows with it") if row.value is not None]
    if not rows:
        return []
    parts = list(dict.fromkeys(row.template or "" for row in rows))
    several, arm = len({row.repetitions for row in rows}) > 1, who(rows)

    def name(row: Row) -> str:
        return f"{arm(row)}, {f'{row.repetitions}×' if row.repetitions else 'held out'}" if several else arm(row)

    arms = list(dict.fromkeys(name(row) for row in sorted(rows, key=lambda r: (arm(r), r.repetitions or 0))))
    high = max((row.high or row.number) for row in rows) * 1.08 or 0.01

    def panel(part: str) -> Panel:
        def draw(axes: "Axes") -> None:
            for index, group in enumerate(reversed(arms)):
                for row in rows:
                    if row.template == part and name(row) == group:
                        colour, marker = look.of.get(row.arm or "", (BASE, "o"))
                        axes.errorbar(row.number, index, xerr=errors(row), fmt=marker, color=colour, elinewidth=1.4)
            axes.set_yticks(range(len(arms)), [short(arm) for arm in reversed(arms)])
            axes.set(xlim=(-0.01 * high, high), ylim=(-0.6, len(arms) - 0.4))
            axes.tick_params(axis="y", length=0, labelcolor=INK)
            axes.spines["left"].set_visible(False)
            axes.grid(axis="x")
            percent(axes.xaxis)

        return Panel(part, draw, (4.0, 0.9 + 0.3 * len(arms)))

    summary = "; ".join(f"{name(row)} {row.template}: {row.count} of {row.n}" for row in rows)
    caption = "Share of generated rows that contain a part of a canary, after normalisation; 95 % Clopper–Pearson."
    return [
        Figure(
            "canary_counts",
            "Canaries found in generated text",
            caption,
            summary,
            [panel(p) for p in parts],
            [],
            2,
            "privacy",
        )
    ]


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
