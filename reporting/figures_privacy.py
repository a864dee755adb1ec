"""Figures of differential privacy and canaries: bounds on ε, exposure, canaries in text, ROC of an audit, ε against
utility. See figures_extraction.py.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.stats import Floats, roc
from reporting.figures_mia import LINE, Entry, legend_below, log_axes, thin
from reporting.style import Look, interval_text, names, short
from reporting.svg import AXIS, GRID, INK, MUTED, Figure, Key, Panel, errors, from_zero, label_ends, percent
from reporting.table import Model, Record, Row, Study, need

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_ARMS = 6  # with a panel of their own
BOUNDS = {  # metric: marker
    "ε upper (PRV)": "o",
    "ε upper (RDP)": "s",
    "ε lower": "^",
    "ε lower, f-DP": "D",
    "ε lower, f-DP if Gaussian": "P",
    "ε lower, text only": "v",
    "ε lower, text only, auxiliary model": "<",
}


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


def bounds_of(study: Study) -> list[Row]:
    """The lower bounds of the audits, the headline ones of several signals, and the upper bounds beside them."""
    return [
        row
        for row in study.select("canary")
        if row.metric in BOUNDS and row.value is not None and row.settings.get("headline") is not False
    ]


def epsilon_bounds(study: Study, look: Look, chosen: list[Model]) -> list[Figure]:
    """Upper bounds from the accountants and empirical lower bounds, one row per run (its last checkpoint)."""
    last = [row for row in study.select("privacy") if row.model and row.model.last]
    rows = [row for row in last if row.value is not None]
    bounds = bounds_of(study)
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
    endless = {place_of(row) for row in last if row.value is None}

    def draw(axes: "Axes") -> None:
        for index, place in enumerate(reversed(places)):
            _bounds_of_one(axes, index, [row for row in shown if place_of(row) == place], look)
        axes.set_yticks(range(len(places)), [short(label_of[name], 34) for name in reversed(places)])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.set(xlabel="ε", ylim=(-0.6, len(places) - 0.4))
        from_zero(axes, "x")
        for index, place in enumerate(reversed(places)):
            if place in endless:
                where = (axes.get_xlim()[1], index)
                axes.annotate("no upper bound", where, ha="right", va="center", fontsize=8, color=MUTED)
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)

    summary = "; ".join(f"{label_of[place_of(row)]}: {row.metric} {row.value:.3g}" for row in shown)
    keys: list[Key] = [
        (metric, INK, marker, None) for metric, marker in BOUNDS.items() if any(row.metric == metric for row in shown)
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
    without = dict.fromkeys(row.measured.label for row in last if row.value is None)
    caption += f" No noise, hence no upper bound: {', '.join(without)}." if without else ""
    panel = Panel("ε at the δ of each run", draw, (4.4, 1.1 + 0.4 * len(places)))
    return [Figure("epsilon", "Privacy budget: proven and observed", caption, summary, [panel], keys, 1, "privacy")]


def _bounds_of_one(axes: "Axes", height: float, rows: list[Row], look: Look) -> None:
    """All bounds of one run on a line, the numbers of the accountant and of the audit above them."""
    ends = [row.number for row in rows]
    axes.plot([min(ends), max(ends)], [height, height], color=GRID, linewidth=5, zorder=1, solid_capstyle="round")
    for row in rows:
        colour = look.colour(row.arm)
        inside = "none" if row.undefined else colour  # hollow: void
        axes.plot(row.number, height, BOUNDS[row.metric], color=colour, markerfacecolor=inside, markersize=7, zorder=3)
    above = {row.metric: row.number for row in rows if row.metric in ("ε upper (PRV)", "ε lower")}
    for metric, value in above.items():
        if metric == "ε lower" and any(other != value for other in above.values()):
            continue  # the two numbers might overlap; the summary has both
        style: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 8, "color": INK}
        axes.annotate(f"{value:.2f}", (value, height), (0, 6), **style)


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
        ends: list[tuple[float, str, str]] = []
        for number, (name, own) in enumerate(series.items()):
            colour, marker = look.of[own[0].arm or "base"]
            own = sorted(own, key=lambda row: row.repetitions or 0)
            x = [counts.index(row.repetitions or 0) + shift * (number - (len(series) - 1) / 2) for row in own]
            axes.plot(x, [row.number for row in own], color=colour, linewidth=1, alpha=0.5)
            for position, row in zip(x, own):
                axes.errorbar(position, row.number, yerr=errors(row), fmt=marker, color=colour, elinewidth=1.4)
            ends.append((own[-1].number, short(name, 24), colour))
        axes.axhline(1.0, color=MUTED, linestyle=":", linewidth=1.2)
        if ceiling:
            axes.axhline(ceiling, color=AXIS, linestyle="--", linewidth=1.2)
        axes.set_xticks(range(len(counts)), [placed(count) for count in counts])
        axes.set(
            xlabel="times inserted into the training data", ylabel="exposure (bits)", xlim=(-0.5, len(counts) - 0.5)
        )
        from_zero(axes, "y")
        axes.grid(axis="y")
        label_ends(axes, ends)

    keys: list[Key] = [("chance, median 1 bit", MUTED, None, ":")]
    if ceiling:
        keys.append(("ceiling", AXIS, None, "--"))
    summary = "; ".join(
        f"{label}: " + ", ".join(f"{row.repetitions or 0}× {row.value:.2f}" for row in own)
        for label, own in series.items()
    )
    caption = "Median over canaries, whiskers: quartiles. A secret never seen has median 1 and mean 1.44 bits, not 0."
    panel = Panel("Exposure", draw, (4.4, 3.0))
    return [Figure("exposure", "Canaries: exposure by repetition", caption, summary, [panel], keys, 1, "privacy")]


def placed(count: int) -> str:
    return f"{count}×" if count else "held out"


def single_canaries(study: Study) -> list[tuple[str, list[Record]]]:
    """[(results_canary.jsonl, lines of the results_canary_rows.jsonl next to it)], one line per canary and arm."""
    found = []
    for shown, path in study.canaries.items():
        with study.guard(study.shown(path)), open(path, encoding="utf-8") as file:
            lines = [json.loads(text) for text in file if text.strip()]
            for line in lines:
                need(line, "arm", "source", "kind", kind=str)
                need(line, "repetitions")
            found.append((shown, lines))
    return found


def exposure_histogram(study: Study, look: Look, chosen: list[Model]) -> list[Figure]:
    """How the exposures of single canaries are spread, by how often they were placed; one panel per arm."""
    panels: list[Panel] = []
    summary: list[str] = []
    files = single_canaries(study)
    for shown, lines in files:
        bits: dict[str, dict[int, list[float]]] = {}
        for line in lines:
            if line["source"] == "model" and line.get("exposure") is not None:
                with study.guard(study.shown(study.canaries[shown])):
                    need(line, "exposure")
                    bits.setdefault(line["arm"], {}).setdefault(line["repetitions"], []).append(line["exposure"])
        ceilings = [row.settings.get("ceiling") for row in study.select("canary", "exposure", group=shown)]
        ceiling = max((ceiling for ceiling in ceilings if ceiling), default=0)
        where = f" ({Path(shown).parent})" if len(files) > 1 else ""
        for arm, by_count in list(bits.items())[:MOST_ARMS]:
            panels.append(_histogram(f"{arm}{where}", by_count, look.colour(arm), ceiling))
            sizes = ", ".join(f"{placed(count)} {len(own)} canaries" for count, own in sorted(by_count.items()))
            summary.append(f"{arm}{where}: {sizes}")
    if not panels:
        return []
    caption = (
        "Each row: the share of its canaries in each bin of one bit; the bars of a row add up to 1. Dotted: 1 bit, the "
        "median of a secret never seen; dashed: the ceiling, i.e. no decoy is more likely."
    )
    columns = 2 if len(panels) in (2, 4) else 3
    figure = Figure(
        "exposure_histogram",
        "Canaries: exposure of each, by how often it was placed",
        caption,
        "; ".join(summary),
        panels,
        [("chance, median 1 bit", MUTED, None, ":"), ("ceiling", AXIS, None, "--")],
        columns,
        "privacy",
    )
    return [figure]


def _histogram(title: str, by_count: dict[int, list[float]], colour: str, ceiling: float) -> Panel:
    levels = sorted(by_count)
    top = math.ceil(max([ceiling, *(value for own in by_count.values() for value in own)]) + 1e-9)

    def draw(axes: "Axes") -> None:
        for height, level in enumerate(levels):
            own = [min(int(max(value, 0)), top - 1) for value in by_count[level]]
            shares = [own.count(bin_) / len(own) for bin_ in range(top)]
            axes.bar(
                [bin_ + 0.5 for bin_ in range(top)],
                [0.85 * share for share in shares],
                0.92,
                bottom=height,
                color=colour,
            )
            axes.axhline(height, color=AXIS, linewidth=0.8)
        axes.axvline(1.0, color=MUTED, linestyle=":", linewidth=1.2)
        if ceiling:
            axes.axvline(ceiling, color=AXIS, linestyle="--", linewidth=1.2)
        labels = [f"{placed(level)}\nn {len(by_count[level])}" for level in levels]
        axes.set_yticks([height + 0.3 for height in range(len(levels))], labels)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.set(xlabel="exposure (bits)", ylim=(0, len(levels)), xlim=(-0.1, top + 0.1))
        axes.spines["left"].set_visible(False)

    return Panel(title, draw, (3.4, 1.0 + 0.45 * len(levels)))


def canary_roc(study: Study, look: Look, chosen: list[Model]) -> list[Figure]:
    """ROC of the audit's canaries, placed once or left out by a coin: from the models, and from the text alone."""
    panels: list[Panel] = []
    summary: list[str] = []
    for shown, lines in single_canaries(study):
        with study.guard(study.shown(study.canaries[shown])):
            for metric, title in (
                ("AUC of the audit", "From the model"),
                ("AUC of the audit, text only", "From its text alone"),
            ):
                rows = [
                    row
                    for row in study.select("canary", metric, group=shown)
                    if row.value is not None and row.settings.get("headline") is not False
                ]
                curves = {row.arm or "": (row, curve) for row in rows if (curve := _curve(lines, row))}
                if curves:
                    where = f" ({Path(shown).parent})" if len(study.canaries) > 1 else ""
                    panels.append(Panel(title + where, _audit_roc(curves, look), (4.0, 3.4 + LINE * len(curves))))
                    summary += [f"{title}, {arm}: AUC {interval_text(row, False)}" for arm, (row, _) in curves.items()]
    if not panels:
        return []
    caption = (
        "Canaries that a coin placed once in the training data against those that it left out; both axes logarithmic. "
        "Below each: AUC (95 %). Base: the model before training, which saw none of them."
    )
    keys: list[Key] = [("chance", MUTED, None, ":"), ("1 % FPR", GRID, None, "-")]
    title = "Canaries placed once: ROC of the audit"
    return [Figure("canary_roc", title, caption, "; ".join(summary), panels, keys, 2, "privacy")]


def _curve(lines: list[Record], row: Row) -> tuple[Floats, Floats, int] | None:
    """(false positive rates, true positive rates, left-out canaries) of one arm; None if one side is empty."""
    source, signal = ("text", row.attack or "") if row.metric.endswith("text only") else ("model", "audit_signal")
    own = [line for line in lines if (line["arm"], line["source"], line["kind"]) == (row.arm, source, "audit")]
    scores: dict[bool, list[float]] = {True: [], False: []}
    for line in own:
        if line.get(signal) is not None:
            need(line, signal)
            scores[bool(line["included"])].append(line[signal])
    if not scores[True] or not scores[False]:
        return None
    return *thin(*roc(scores[True], scores[False])), len(scores[False])


def _audit_roc(curves: dict[str, tuple[Row, tuple[Floats, Floats, int]]], look: Look) -> Callable[["Axes"], None]:
    def draw(axes: "Axes") -> None:
        smallest = log_axes(axes, max(n for _, (_, _, n) in curves.values()))
        entries: list[Entry] = []
        for arm, (row, (false, true, _)) in curves.items():
            colour = look.colour(arm)
            axes.step(false.clip(smallest), true.clip(smallest), where="post", color=colour, linewidth=1.8)
            entries.append((f"{short(arm, 20)} {interval_text(row, False)}", colour, "-", 1.8))
        legend_below(axes, entries)

    return draw


def canary_counts(study: Study, look: Look, chosen: list[Model]) -> list[Figure]:
    """Generated rows that contain a part of a canary, by arm."""
    rows = [row for row in study.select("canary", "generated rows with it") if row.value is not None]
    if not rows:
        return []
    parts = list(dict.fromkeys(row.template or "" for row in rows))
    several, arm = len({(row.repetitions, row.attack) for row in rows}) > 1, who(rows)

    def name(row: Row) -> str:
        if not several:
            return arm(row)
        if row.attack == "audit":
            return f"{arm(row)}, audit, {'placed' if row.repetitions else 'left out'}"
        return f"{arm(row)}, {placed(row.repetitions or 0)}"

    rows.sort(key=lambda row: (arm(row), row.attack == "audit", row.repetitions or 0))
    arms = list(dict.fromkeys(map(name, rows)))

    def panel(part: str) -> Panel:
        def draw(axes: "Axes") -> None:
            for index, group in enumerate(reversed(arms)):
                for row in rows:
                    if row.template == part and name(row) == group:
                        colour, marker = look.of.get(row.arm or "", look.of["base"])
                        axes.errorbar(row.number, index, xerr=errors(row), fmt=marker, color=colour, elinewidth=1.4)
            axes.set_yticks(range(len(arms)), [short(arm, 30) for arm in reversed(arms)])
            axes.set(
                xlim=(0, max((row.high or row.number) for row in rows) * 1.05 or 0.01), ylim=(-0.6, len(arms) - 0.4)
            )
            from_zero(axes, "x")
            axes.tick_params(axis="y", length=0, labelcolor=INK)
            axes.spines["left"].set_visible(False)
            axes.grid(axis="x")
            percent(axes.xaxis)

        return Panel(part, draw, (4.0, 0.9 + 0.24 * len(arms)))

    summary = "; ".join(f"{name(row)} {row.template}: {row.count} of {row.n}" for row in rows)
    caption = "Share of generated rows that contain a part of a canary, after normalisation; 95 % Clopper–Pearson."
    panels = [panel(part) for part in parts]
    return [Figure("canary_counts", "Canaries found in generated text", caption, summary, panels, [], 2, "privacy")]


def epsilon_utility(study: Study, look: Look, chosen: list[Model]) -> list[Figure]:
    """ε, from the lower bounds to the upper one, against what the text or the model is good for."""
    panels = []
    summary: list[str] = []
    canary = bounds_of(study)
    by_arm = [(row, row.arm or "") for row in study.select("utility", "accuracy", role="mean") if row.value is not None]
    named = [(row, name) for row, name in by_arm if name in {bound.arm for bound in canary}]
    if named:
        own = {name: [bound for bound in canary if bound.arm == name] for _, name in named}
        panels.append(_against("Accuracy on real reviews", named, own, look))
    upper = [row for row in study.select("privacy", "ε upper (PRV)") if row.model in chosen]
    budget = {row.measured.key: row for row in upper}
    means = [row for row in study.select("perplexity", "mean", role="target") if row.value is not None]
    group = next((row.group for row in means if row.measured.key in budget), None)
    models = {row.measured.key: row for row in means if row.group == group and row.measured.key in budget}
    if models:
        called = names([row.measured for row in models.values()])
        own = {
            name: [
                row for row in study.select("privacy") if row.model and row.model.key == key and row.value is not None
            ]
            for key, name in called.items()
        }
        panels.append(
            _against("Perplexity (lower is better)", [(models[k], name) for k, name in called.items()], own, look)
        )
        named = [*named, *((models[key], name) for key, name in called.items())]
    for row, name in named:
        summary.append(f"{name}: {row.metric} {interval_text(row, False)}")
    if not panels:
        return []
    caption = (
        "Each arm on one height: its utility, whiskers as in its own figure. Along it, its ε: upper by accountants, "
        "lower by the audits at 95 %. At ∞: trained without noise, so nothing is proven."
    )
    used = {row.metric for row in canary} | ({row.metric for row in study.select("privacy")} if models else set())
    keys: list[Key] = [(metric, INK, marker, None) for metric, marker in BOUNDS.items() if metric in used]
    return [Figure("epsilon_utility", "ε against utility", caption, "; ".join(summary), panels, keys, 2, "privacy")]


def _against(title: str, points: list[tuple[Row, str]], bounds: dict[str, list[Row]], look: Look) -> Panel:
    def draw(axes: "Axes") -> None:
        finite = [row.number for own in bounds.values() for row in own]
        endless = 1.25 * max(finite, default=1) or 1.0
        ends: list[tuple[float, str, str]] = []
        for row, name in points:
            colour = look.colour(row.arm)
            own = bounds[name]
            right = max((bound.number for bound in own if bound.metric.startswith("ε upper")), default=endless)
            left = min((bound.number for bound in own), default=right)
            axes.plot([left, right], [row.number, row.number], color=colour, linewidth=1, alpha=0.5)
            axes.errorbar(right, row.number, yerr=errors(row), color=colour, elinewidth=1.4, fmt="none")
            for bound in own:
                axes.plot(bound.number, row.number, BOUNDS[bound.metric], color=colour, markersize=6, zorder=3)
            if right == endless:
                axes.plot(right, row.number, ">", color=colour, markersize=6, markerfacecolor="none", zorder=3)
            ends.append((row.number, short(name, 24), colour))
        ticks = [tick for tick in axes.get_xticks() if 0 <= tick <= 1.02 * max(finite, default=0)]
        axes.set_xticks([*ticks, endless], [*(f"{tick:g}" for tick in ticks), "∞"])
        axes.set(xlabel="ε", xlim=(-0.04 * endless, 1.04 * endless))
        axes.margins(y=0.15)
        axes.grid(axis="y")
        label_ends(axes, ends)

    return Panel(title, draw, (4.4, 3.0))
