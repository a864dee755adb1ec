"""Figures of the extraction attack, of perplexity, and of privacy against utility.

Every function takes a Study, the Look and the compared models, and returns the figures that its numbers allow. No file
is read here.
"""

import math
from typing import TYPE_CHECKING

from common.schema import HEADLINE_TEMPERATURE
from reporting.figures_mia import MOST_COLUMNS
from reporting.style import (
    MOST_GROUPS,
    MOST_LINES,
    Look,
    axis_of,
    dodge,
    groups,
    interval_text,
    left_out,
    more_groups,
    name_of,
    names,
    short,
    styles_of,
    sweeps,
)
from reporting.svg import (
    AXIS,
    BASE,
    INK,
    MUTED,
    Draw,
    Figure,
    Key,
    Panel,
    Style,
    errors,
    from_zero,
    label_ends,
    label_points,
    percent,
)
from reporting.svg import line as plot_line
from reporting.table import Model, Row, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes

By = dict[tuple[str, str, str | None], Row]  # (model key, metric, template) → row


def temperature_of(row: Row) -> float:
    assert row.temperature is not None
    return row.temperature


def extraction_bars(study: Study, look: Look, chosen: list[Model]) -> list[Figure]:
    """Loose matches and exact addresses by model, one panel per template, with the best name rule's floor."""
    figures = []
    every = study.select("extraction", headline=True, role="target")
    sets = groups(every)
    for index, group in enumerate(sets[:MOST_GROUPS]):
        rows = [row for row in every if row.group == group]
        models = look.sort(model for model in chosen if any(row.model is model for row in rows))
        templates = [name for name in dict.fromkeys(row.template for row in rows) if name != "all"]
        if not models:
            continue
        at: By = {(row.measured.key, row.metric, row.template): row for row in rows}
        floors = {row.metric: row for row in study.select("extraction", role="floor", group=group)}
        high = max(
            (row.high or row.value or 0) for row in rows if row.model in models and row.metric in ("exact", "matches")
        )
        panels = [
            Panel(
                f"Template {name}",
                _bars(name, models, at, floors, look, max(high * 1.05, 0.01)),
                (4.0, 0.9 + 0.42 * len(models)),
            )
            for name in templates
        ]
        summary = [
            f"{model.label}: "
            + ", ".join(
                f"{name} {interval_text(at[model.key, 'exact', name])}"
                for name in templates
                if (model.key, "exact", name) in at
            )
            for model in models
        ]
        keys: list[Key] = [
            ("exact address", INK, "block", None),
            ("loose match (partial ratio ≥ 80)", AXIS, "block", None),
        ]
        if floors:
            keys.append((f"floor: {next(iter(floors.values())).attack}, no model", INK, None, ":"))
        figures.append(
            Figure(
                name_of("extraction_bars", index),
                f"Addresses extracted at temperature {HEADLINE_TEMPERATURE}",
                f"{group}. Solid: exact address; pale: the released tool's loose rule; whiskers: 95 % Clopper–Pearson. "
                "Dotted: exact addresses that the best name rule guesses without a model." + more_groups(sets, index),
                "Share of exact addresses by template. " + "; ".join(summary),
                panels,
                keys,
                2,
                "extraction",
            )
        )
    return figures


def _bars(template: str | None, models: list[Model], at: By, floors: dict[str, Row], look: Look, high: float) -> Draw:
    named = names(models)

    def draw(axes: "Axes") -> None:
        for index, model in enumerate(reversed(models)):
            colour = look.of[model.arm][0]
            loose, exact = (at.get((model.key, metric, template)) for metric in ("matches", "exact"))
            beside = 0.19 if exact is not None and loose is not None else 0.0
            for row, height, alpha in ((exact, index + beside, 1.0), (loose, index - beside, 0.3)):
                if row is None or row.value is None:
                    continue
                axes.barh(height, row.value, 0.35 if beside else 0.6, color=colour, alpha=alpha, linewidth=0)
                axes.errorbar(
                    row.value, height, xerr=errors(row), color=INK if row is exact else MUTED, elinewidth=1, fmt="none"
                )
        if floors.get("exact"):
            axes.axvline(floors["exact"].number, color=INK, linestyle=":", linewidth=1.3)
        axes.set(xlim=(0, high), ylim=(-0.6, len(models) - 0.4))
        axes.set_yticks(range(len(models)), [short(named[model.key]) for model in reversed(models)])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        percent(axes.xaxis)

    return draw


def extraction_curves(study: Study, look: Look, chosen: list[Model]) -> list[Figure]:
    """Success rates against temperature, learning rate and epoch, one panel per template."""
    figures = []
    every = study.select("extraction", role="target")
    for index, group in enumerate(groups(every)[:MOST_GROUPS]):
        rows = [row for row in every if row.group == group]
        if len({row.temperature for row in rows}) >= 3:
            figures += _over_temperature(name_of("extraction_temperature", index), group, rows, look, chosen)
        fixed = [row for row in rows if row.headline]
        for axis, words in (("learning_rate", "learning rate"), ("epoch", "epoch")):
            series = sweeps(fixed, axis, chosen)
            if series:
                name = name_of(f"extraction_{axis}", index)
                figures.append(_over_sweep(name, group, words, axis, series, fixed, look))
    return figures


def _over_temperature(name: str, group: str, rows: list[Row], look: Look, chosen: list[Model]) -> list[Figure]:
    compared = look.sort(model for model in chosen if any(row.model is model for row in rows))
    models = compared[:MOST_LINES]
    templates = [name for name in dict.fromkeys(row.template for row in rows) if name != "all"]
    at: dict[tuple[str, str, str | None], list[Row]] = {}
    for row in sorted(rows, key=temperature_of):
        at.setdefault((row.measured.key, row.metric, row.template), []).append(row)

    def panel(metric: str, template: str | None) -> Panel:
        def draw(axes: "Axes") -> None:
            ends: list[tuple[float, str, str]] = []
            for model in models:
                line = at.get((model.key, metric, template), [])
                colour, marker = look.of[model.arm]
                if line:
                    plot_line(axes, [temperature_of(row) for row in line], line, colour, marker, markersize=4)
                    ends.append(end_of(line, called[model.key], colour))
            axes.axvline(HEADLINE_TEMPERATURE, color=AXIS, linestyle=":", linewidth=1)
            axes.set_xlabel("temperature")
            _rates(axes, ends)

        words = "exact" if metric == "exact" else "loose match"
        return Panel(f"{template}: {words}", draw, (4.2, 2.3))

    metrics = [metric for metric in ("exact", "matches") if any(key[1] == metric for key in at)]
    called = names(models)
    caption = (
        f"{group}. One answer per person and template; band: 95 %. Dotted line: the headline temperature, "
        f"{HEADLINE_TEMPERATURE}.{left_out(compared, models)}"
    )
    summary = "; ".join(
        f"{model.label}: {metric} {template} from {line[0].value:.1%} at {line[0].temperature:g} to "
        f"{line[-1].value:.1%} at {line[-1].temperature:g}"
        for model in models
        for metric in metrics
        for template in templates
        if (line := at.get((model.key, metric, template))) and None not in (line[0].value, line[-1].value)
    )
    panels = [panel(metric, template) for metric in metrics for template in templates]
    return (
        [Figure(name, "Success rate against temperature, by template", caption, summary, panels, [], 2, "extraction")]
        if models
        else []
    )


def _over_sweep(
    name: str,
    group: str,
    words: str,
    axis: str,
    series: dict[str, list[Model]],
    rows: list[Row],
    look: Look,
) -> Figure:
    rows_of: By = {(row.measured.key, row.metric, row.template): row for row in rows}
    bases = [row for row in rows if row.measured.is_base]
    fixed = [model for models in series.values() for model in models]
    templates = [template for template in dict.fromkeys(key[2] for key in rows_of) if template != "all"]
    styles = styles_of(series, look)
    x_of = dodge(series, axis)
    metrics = [metric for metric in ("exact", "matches") if any(key[1] == metric for key in rows_of)]

    def panel(metric: str, template: str | None) -> Panel:
        def draw(axes: "Axes") -> None:
            ends: list[tuple[float, str, str]] = []
            for label, models in series.items():
                points = [
                    (x_of[label](getattr(model, axis)), row)
                    for model in models
                    if (row := rows_of.get((model.key, metric, template)))
                ]
                if points:
                    colour, marker, style = styles[label]
                    plot_line(
                        axes,
                        [x for x, _ in points],
                        [row for _, row in points],
                        colour,
                        marker,
                        style,
                        markersize=4,
                        band=len(series) <= 4,
                    )
                    ends.append(end_of([row for _, row in points], label, colour))
            for row in bases:
                if (row.metric, row.template) == (metric, template) and row.value is not None:
                    axes.axhline(row.value, color=BASE, linestyle="--", linewidth=1.3)
            axis_of(axes, axis, [getattr(model, axis) for model in fixed])
            axes.set_xlabel(words)
            _rates(axes, ends)

        return Panel(f"{template}: {'exact' if metric == 'exact' else 'loose match'}", draw, (4.2, 2.3))

    keys: list[Key] = [("base", BASE, None, "--")] if bases else []
    rates = {model.learning_rate for model in fixed if model.learning_rate is not None}
    at = f", learning rate {rates.pop():g}" if axis == "epoch" and len(rates) == 1 else ""
    caption = (
        f"{group}, temperature {HEADLINE_TEMPERATURE}{at}. Each point is a checkpoint; none was selected by its result."
    )
    caption += left_out((row.measured for row in rows if axis == "epoch" or row.measured.last), fixed)
    summary = "; ".join(
        f"{label}: "
        + ", ".join(
            f"{getattr(m, axis):g} {interval_text(row)}"
            for m in models
            if (row := rows_of.get((m.key, metrics[0], "all")))
        )
        for label, models in series.items()
    )
    panels = [panel(metric, template) for metric in metrics for template in templates]
    title = f"Success rate against {words}, by template"
    return Figure(name, title, caption, f"All templates, {metrics[0]}. {summary}", panels, keys, 2, "extraction")


def end_of(rows: list[Row], label: str, colour: str) -> tuple[float, str, str]:
    """The label of a line, at the height of its last point."""
    known = [row.value for row in rows if row.value is not None]
    return known[-1] if known else 0.0, short(label, 20), colour


def _rates(axes: "Axes", ends: list[tuple[float, str, str]]) -> None:
    """An axis of rates from 0, with the name of each line where it ends."""
    from_zero(axes, "y")
    axes.grid(axis="y")
    percent(axes.yaxis)
    label_ends(axes, ends)


def perplexity_curves(study: Study, look: Look, chosen: list[Model]) -> list[Figure]:
    """One figure per set of texts: by epoch and learning rate, or by model if these do not vary."""
    every = study.select("perplexity", "mean", role="target")
    figures, sets = [], groups(every)
    for index, group in enumerate(sets[:MOST_GROUPS]):
        panels: list[Panel] = []
        keys: dict[str, Key] = {}
        summary: list[str] = []
        drawn: list[Model] = []
        rows = {row.measured.key: row for row in every if row.group == group}
        bases = [row for row in rows.values() if row.measured.is_base and row.value is not None]
        for axis, words in (("epoch", "epoch"), ("learning_rate", "learning rate")):
            series = sweeps(list(rows.values()), axis, chosen)
            if not series:
                continue
            styles = styles_of(series, look)
            panels.append(Panel(f"By {words}", _perplexity(axis, words, series, rows, styles, bases), (4.4, 2.8)))
            drawn += [model for models in series.values() for model in models]
            summary += [
                f"{label} by {words}: "
                + ", ".join(
                    f"{getattr(m, axis):g} {rows[m.key].value:.3g}" for m in models if rows[m.key].value is not None
                )
                for label, models in series.items()
            ]
        if panels and bases:
            keys["base"] = ("base", BASE, None, "--")
            summary.append(f"base {bases[0].value:.3g}")
        if not panels:
            drawn = look.sort(row.measured for row in rows.values() if row.value is not None)[:MOST_COLUMNS]
            panels = (
                [Panel("By model", _dots([rows[model.key] for model in drawn], look), (4.0, 0.9 + 0.36 * len(drawn)))]
                if drawn
                else []
            )
            summary = [f"{model.label} {interval_text(rows[model.key], False)}" for model in drawn]
        if panels:
            caption = f"{group}: mean over documents, interval: 95 % bootstrap over documents. Lower is better."
            caption += left_out((row.measured for row in rows.values()), drawn) + more_groups(sets, index)
            figures.append(
                Figure(
                    name_of("perplexity", index),
                    "Perplexity of held-out text",
                    caption,
                    "; ".join(summary),
                    panels,
                    list(keys.values()),
                    2,
                    "perplexity",
                )
            )
    return figures


def _dots(rows: list[Row], look: Look) -> Draw:
    named = names([row.measured for row in rows])

    def draw(axes: "Axes") -> None:
        for index, row in enumerate(reversed(rows)):
            colour, marker = look.of[row.measured.arm]
            axes.errorbar(row.number, index, xerr=errors(row), fmt=marker, color=colour, elinewidth=1.4)
        axes.set_yticks(range(len(rows)), [short(named[row.measured.key]) for row in reversed(rows)])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.set(xlabel="perplexity", ylim=(-0.6, len(rows) - 0.4))
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")

    return draw


def _perplexity(
    axis: str,
    words: str,
    series: dict[str, list[Model]],
    rows: dict[str, Row],
    styles: dict[str, tuple[str, str, Style]],
    bases: list[Row],
) -> Draw:
    x_of = dodge(series, axis)

    def draw(axes: "Axes") -> None:
        ends: list[tuple[float, str, str]] = []
        for label, models in series.items():
            colour, marker, style = styles[label]
            points = [(x_of[label](getattr(model, axis)), rows[model.key]) for model in models]
            plot_line(
                axes, [x for x, _ in points], [row for _, row in points], colour, marker, style, band=len(series) <= 6
            )
            ends.append(end_of([row for _, row in points], label, colour))
        for row in bases:
            axes.axhline(row.number, color=BASE, linestyle="--", linewidth=1.3)
        axis_of(axes, axis, [getattr(model, axis) for models in series.values() for model in models])
        axes.set(xlabel=words, ylabel="perplexity")
        axes.grid(axis="y")
        label_ends(axes, ends)

    return draw


def front(points: list[tuple[float, float]]) -> list[int]:
    """Indices of the Pareto-optimal points (lower is better in both coordinates), by increasing x."""
    kept: list[int] = []
    lowest = math.inf
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        if points[index][1] < lowest:
            kept.append(index)
            lowest = points[index][1]
    return kept


def plane(study: Study, look: Look, chosen: list[Model]) -> list[Figure]:
    """Perplexity against exact extraction, one point per checkpoint, with the Pareto front."""
    means = study.select("perplexity", "mean", role="target", value=lambda value: value is not None)
    if not means:
        return []
    main = groups(means)[0]
    utility = {row.measured.key: row for row in means if row.group == main}
    every = study.select(
        "extraction", "exact", role="target", headline=True, template="all", value=lambda value: value is not None
    )
    panels: list[Panel] = []
    summary: list[str] = []
    arms: set[str] = set()
    drawn: list[Model] = []
    for group in groups(every)[:MOST_GROUPS]:
        pairs = [
            (utility[row.measured.key], row) for row in every if row.group == group and row.measured.key in utility
        ]
        if len(pairs) < 3:
            continue
        kept = front([(x.number, y.number) for x, y in pairs])
        panels.append(Panel(f"{group}", _plane(pairs, kept, look), (4.4, 3.1)))
        arms |= {row.measured.arm for _, row in pairs}
        drawn += [row.measured for _, row in pairs]
        labels = ", ".join(pairs[index][1].measured.label for index in kept)
        summary.append(f"{group}: {len(pairs)} models; on the Pareto front: {labels}")
    if not panels:
        return []
    few = len(drawn) <= MOST_LINES  # each point is then named beside it
    keys: list[Key] = [] if few else [(arm, *look.of[arm], None) for arm in look.arms if arm in arms]
    keys.append(("Pareto front", INK, None, "-"))
    caption = (
        f"Each point is a checkpoint: perplexity on {main} and exact addresses at temperature {HEADLINE_TEMPERATURE}, "
        "all templates, 95 % intervals. Lower left is better. The front joins point estimates: it does not rank points "
        "whose intervals overlap." + left_out((row.measured for row in (*means, *every)), drawn)
    )
    return [
        Figure("privacy_utility", "Privacy against utility", caption, "; ".join(summary), panels, keys, 2, "extraction")
    ]


def _plane(pairs: list[tuple[Row, Row]], kept: list[int], look: Look) -> Draw:
    called = names([y.measured for _, y in pairs])

    def draw(axes: "Axes") -> None:
        many = len(pairs) > 30
        for x, y in pairs:
            colour, marker = look.of[y.measured.arm]
            if not many:
                axes.errorbar(
                    x.number,
                    y.number,
                    xerr=errors(x),
                    yerr=errors(y),
                    color=colour,
                    elinewidth=0.8,
                    alpha=0.4,
                    zorder=2,
                )
            axes.plot(x.number, y.number, marker, color=colour, markersize=4 if many else 6, zorder=3)
        axes.step(
            [pairs[index][0].number for index in kept],
            [pairs[index][1].number for index in kept],
            where="post",
            color=INK,
            linewidth=1,
            zorder=1,
        )
        values = [x.number for x, _ in pairs]
        if max(values) / min(values) > 8:
            axes.set_xscale("log")
        if axes.get_ylim()[0] < 0.05:
            axes.set_ylim(bottom=0)
            from_zero(axes, "y")
        axes.set(xlabel="perplexity", ylabel="exact addresses")
        axes.grid()
        percent(axes.yaxis)
        if len(pairs) <= MOST_LINES:
            points = [(x.number, y.number, short(called[y.measured.key], 20), look.colour(y.arm)) for x, y in pairs]
            label_points(axes, points)

    return draw
