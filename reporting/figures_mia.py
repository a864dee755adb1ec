"""Figures of membership inference: ROC curves and heat maps."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.lines import Line2D

from common.schema import HEADLINE_ATTACK, SHADOW_ATTACKS
from common.stats import Floats, roc
from reporting.style import (
    MOST_GROUPS,
    Look,
    groups,
    interval_text,
    left_out,
    more_groups,
    name_of,
    names,
    short,
)
from reporting.svg import COLOURS, GRID, INK, MUTED, STYLES, Draw, Figure, Key, Panel, Style
from reporting.table import Model, Row, Study, check

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curves = dict[str, tuple[Floats, Floats]]  # score → (false positive rates, true positive rates)
By = dict[tuple[str, str | None, str], Row]  # (model key, attack, metric) → row
Entry = tuple[str, str, Style, float]  # of a legend in a panel: label, colour, line style, line width

MOST_ROCS = 6
LINE = 0.19  # inches of a line of a legend
MOST_COLUMNS = 24  # checkpoints in a heat map


ATTACKS = (
    "ref",
    "loss",
    "zlib",
    "lowercase",
    "min_k_20",
    "min_k_pp_20",
    "surp",
    "recall",
    "con_recall",
    "dc_pdd",
    "neighborhood",
    "neighborhood_self",
    "grad_norm",
    "ez",
    "wbc",
    "combine",
    *SHADOW_ATTACKS,
)


def roc_curves(study: Study, look: Look, chosen: list[Model]) -> list[Figure]:
    """ROC on logarithmic axes: the headline attack, others in grey, blind baselines dashed, chance dotted."""
    files: dict[str, Row] = {}
    panels: list[Panel] = []
    summary: list[str] = []
    for row in study.select("mia", "auc", role="target", attack=HEADLINE_ATTACK):
        if row.file in study.scores and row.model in chosen:
            files[row.measured.key] = row
    if not files:  # without the headline attack
        for row in study.select("mia", "auc", role="target", attack="loss"):
            if row.file in study.scores and row.model in chosen:
                files[row.measured.key] = row
    flags = {file: set(line.get("flags", [])) for file, _, line in study.lines.get("mia", [])}
    drawn = look.sort(row.measured for row in files.values())[:MOST_ROCS]
    measured = {row.measured.key: row.measured for row in study.select("mia", "auc", role="target")}
    named = names(drawn)
    for model in drawn:
        row = files[model.key]
        curves: Curves | None = None
        n = 0
        with study.guard(study.shown(study.scores[row.file])):
            curves, n = curves_of(study.scores[row.file])
        if curves is None:
            continue
        bad = sorted(flag for flag in flags[row.file] if flag.startswith(("blind", "near")))
        areas = {
            line.attack or "": line
            for line in study.select("mia", "auc")
            if line.file == row.file and line.role in ("target", "blind") and line.model is model
        }
        draw = _roc(curves, areas, n, look.colour(model.arm), bad)
        panels.append(Panel(short(named[model.key], 40), draw, (3.6, 3.1 + LINE * len(curves))))
        summary.append(f"{model.label}: AUC of {row.attack} {interval_text(row, False)}")
        summary += [f"flagged: {', '.join(bad)}"] if bad else []
    if not panels:
        return []
    keys: list[Key] = [
        (f"{HEADLINE_ATTACK} (headline), in its arm's colour", INK, None, "-"),
        ("other attacks", MUTED, None, "-"),
        ("blind baselines", INK, None, "--"),
        ("chance", MUTED, None, ":"),
        ("1 % FPR", GRID, None, "-"),
    ]
    caption = (
        "True against false positive rate, both logarithmic; under each: the AUC with its interval (95 %; blind "
        "baselines 99 %). Blind baselines never see the model: if they leave the diagonal, an attack may do so for the "
        "same reason." + left_out((model for model in measured.values() if model in chosen), drawn)
    )
    return [Figure("mia_roc", "Membership inference: ROC", caption, "; ".join(summary), panels, keys, 3, "mia")]


def curves_of(path: Path) -> tuple[Curves, int]:
    """({score: (false positive rates, true positive rates)}, number of non-members) of a scores_mia.jsonl."""
    with open(path, encoding="utf-8") as file:
        lines = [json.loads(text) for text in file if text.strip()]
    curves: Curves = {}
    scored = [name for name in (*ATTACKS, "blind_length", "blind_zlib", "blind_bow", "blind_tfidf") if name in lines[0]]
    labels = [line["label"] for line in lines]
    if set(labels) - {0, 1}:
        raise ValueError("label: neither 0 nor 1")
    for name in scored:
        values = [line[name] for line in lines]
        for value in values:
            check({name: value}, (name,))
        members, others = (
            [value for value, its in zip(values, labels) if its == label and value is not None] for label in (1, 0)
        )
        if members and others:
            curves[name] = thin(*roc(members, others))
    return curves, labels.count(0)


def thin(x: Floats, y: Floats, most: int = 300) -> tuple[Floats, Floats]:
    """About `most` points of a step curve at most, evenly spaced in log x; keeps the first and last."""
    if len(x) <= most:
        return x, y
    at = np.unique(np.searchsorted(x, np.geomspace(max(x[x > 0].min(), 1e-6), 1, most)))
    at = np.unique(np.concatenate([[0], at.clip(0, len(x) - 1), [len(x) - 1]]))
    return x[at], y[at]


def log_axes(axes: "Axes", n: int) -> float:
    """Set up a ROC on logarithmic axes, with chance and 1 % FPR; return the rate that stands for 0 on them."""
    smallest = 1 / (2 * max(1, n))
    axes.axvline(0.01, color=GRID, linewidth=1.5, zorder=0)
    axes.plot([smallest, 1], [smallest, 1], ":", color=MUTED, linewidth=1.3)
    axes.set(xscale="log", yscale="log", xlim=(smallest, 1.02), ylim=(smallest, 1.1))
    axes.set(xlabel="false positive rate", ylabel="true positive rate")
    axes.minorticks_off()
    return smallest


def legend_below(axes: "Axes", entries: list[Entry]) -> None:
    """A legend below the axes: (label, colour, line style, line width) of each curve."""
    handles = [Line2D([], [], color=colour, linestyle=style, linewidth=width) for _, colour, style, width in entries]
    legend = axes.legend(
        handles,
        ["-"] * len(handles),
        loc="upper center",
        bbox_to_anchor=(0.5, -0.2),
        fontsize=8.5,
        handlelength=2.2,
    )
    for text, entry in zip(legend.get_texts(), entries):  # set afterwards: labels with a leading _ are dropped
        text.set_text(entry[0])


def _roc(curves: Curves, areas: dict[str, Row], n: int, colour: str, bad: list[str]) -> Draw:
    def draw(axes: "Axes") -> None:
        smallest = log_axes(axes, n)
        entries: list[Entry] = []
        seen = 0
        for name, (false, true) in curves.items():  # attacks before blind baselines
            style: dict[str, Any] = {"color": MUTED, "linewidth": 1.0, "linestyle": STYLES[seen % 4], "zorder": 2}
            if name.startswith("blind"):
                style = {"color": INK, "linewidth": 0.8, "linestyle": "--", "alpha": 0.55, "zorder": 3}
            elif name == HEADLINE_ATTACK:
                style = {"color": colour, "linewidth": 2.4, "zorder": 4}
            else:
                seen += 1
            axes.step(false.clip(smallest), true.clip(smallest), where="post", **style)
            area = f" {interval_text(areas[name], False)}" if name in areas else ""
            label = name.replace("blind_", "blind: ", 1)
            entries.append((label + area, style["color"], style.get("linestyle", "-"), style["linewidth"]))
        legend_below(axes, entries)
        if bad:
            axes.text(
                0.03,
                0.97,
                "flagged: " + ", ".join(bad),
                transform=axes.transAxes,
                va="top",
                fontsize=8,
                color=COLOURS["vermillion"][0],
                fontweight="bold",
            )

    return draw


def heat_maps(study: Study, look: Look, chosen: list[Model]) -> list[Figure]:
    """Heat maps of AUC and of TPR at 1 % FPR, attack × checkpoint."""
    figures = []
    every = study.select("mia", role="target", attack=lambda name: name in ATTACKS)
    sets = groups(every)
    for index, group in enumerate(sets[:MOST_GROUPS]):
        rows = [row for row in every if row.group == group]
        models = look.sort({row.measured.key: row.measured for row in rows}.values())
        every_model = models
        if len(models) > MOST_COLUMNS:
            models = [model for model in models if model in chosen][:MOST_COLUMNS]
        attacks = [name for name in ATTACKS if any(row.attack == name for row in rows)]
        at: By = {(row.measured.key, row.attack, row.metric): row for row in rows if row.level in (None, "0.01")}
        size = (max(3.45, 1.3 + 0.62 * len(models)), 1.75 + 0.27 * len(attacks))
        panels = [
            Panel("AUC", _heat(models, attacks, at, "auc"), size),
            Panel("TPR at 1 % FPR", _heat(models, attacks, at, "tpr"), size),
        ]
        best = [row for row in rows if row.metric == "auc" and row.attack == HEADLINE_ATTACK and row.model in models]
        summary = "; ".join(f"{row.measured.label} {HEADLINE_ATTACK} AUC {interval_text(row, False)}" for row in best)
        caption = f"{group}. AUC 0.5 and a true positive rate of 1 % are chance."
        caption += left_out(every_model, models) + more_groups(sets, index)
        figures.append(
            Figure(name_of("mia_heatmap", index), "Attack × checkpoint", caption, summary, panels, [], 2, "mia")
        )
    return figures


def _heat(models: list[Model], attacks: list[str], at: By, metric: str) -> Draw:
    def draw(axes: "Axes") -> None:
        def value(model: Model, attack: str) -> float:
            row = at.get((model.key, attack, metric))
            return math.nan if row is None or row.value is None else row.value

        values = np.array([[value(model, attack) for model in models] for attack in attacks])
        chance, least, most = (0.5, 0.3, 0.7) if metric == "auc" else (0.01, 0.0, 0.05)
        norm = TwoSlopeNorm(chance, least, max(most, np.nanmax(values, initial=chance)))
        scale = [(0, "#5b86bd"), (0.5, "#f3f3f1"), (0.75, "#f0a468"), (1, "#b23c00")]  # chance is neutral
        colours = LinearSegmentedColormap.from_list("", scale)
        axes.pcolormesh(np.ma.masked_invalid(values), cmap=colours, norm=norm, edgecolors="face", linewidth=0.5)
        for i, j in np.ndindex(values.shape):
            if math.isnan(values[i, j]):
                axes.text(j + 0.5, i + 0.5, "–", ha="center", va="center", color=MUTED, fontsize=8.5)
                continue
            r, g, b, _ = colours(norm(values[i, j]))
            text = f"{values[i, j]:.3f}" if metric == "auc" else f"{values[i, j]:.1%}"
            tint = "#101214" if 0.299 * r + 0.587 * g + 0.114 * b > 0.5 else "#ffffff"
            axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", color=tint, fontsize=8.5)
        axes.set_yticks(np.arange(len(attacks)) + 0.5, attacks)
        labels = [short(name, 22) for name in names(models).values()]
        axes.set_xticks(np.arange(len(models)) + 0.5, labels, rotation=30, ha="right", rotation_mode="anchor")
        axes.invert_yaxis()
        axes.tick_params(length=0, labelcolor=INK)
        for spine in axes.spines.values():
            spine.set_visible(False)

    return draw
