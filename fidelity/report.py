"""The table and the two figures."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fidelity.metrics import Estimate

MAP_ROWS = 1000  # points per sample in the embedding map
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b")
LABELS = {"against": "real (reference)", "real": "real (second sample)"}


def cell(estimate: Estimate) -> str:
    """A value with its interval, to four digits; a dash if it is undefined."""
    if estimate["value"] is None:
        return "–"
    if estimate["low"] is None:
        return f"{estimate['value']:.4g}"
    return f"{estimate['value']:.4g} [{estimate['low']:.4g}, {estimate['high']:.4g}]"


def excludes_zero(estimate: Estimate | None) -> bool:
    """Whether there is an interval and it excludes 0."""
    if estimate is None or estimate["low"] is None or estimate["high"] is None:
        return False
    return estimate["low"] > 0 or estimate["high"] < 0


def table(comparisons: dict[str, dict[str, Any]]) -> str:
    """Markdown: one row per metric, one column per arm; * if the interval of the excess over `real` excludes 0."""
    names = dict.fromkeys(name for comparison in comparisons.values() for name in comparison["measures"])
    lines = ["| measure | " + " | ".join(comparisons) + " |", "|---" * (len(comparisons) + 1) + "|"]
    for name in names:
        cells = []
        for comparison in comparisons.values():
            estimate = comparison["measures"].get(name)
            mark = " *" if excludes_zero(comparison.get("excess", {}).get(name)) else ""
            cells.append("–" if estimate is None else cell(estimate) + mark)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def colour_of(name: str, number: int) -> str:
    """Black for the second real sample, else the colour of arm `number` (from 0)."""
    return "black" if name == "real" else COLOURS[number % len(COLOURS)]


def draw_lengths(words: Mapping[str, np.ndarray]) -> Figure:
    """Plot the CDF of review lengths, one line per sample; words: {sample: words per review [n]}."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for number, (name, counts) in enumerate(words.items(), -2):  # 'against' and 'real' come first
        style: dict[str, Any] = {"color": colour_of(name, number), "linewidth": 1.4}
        if name == "against":
            style = {"color": "black", "linewidth": 3, "alpha": 0.35}
        share = np.arange(1, len(counts) + 1) / len(counts)
        axes.step(np.sort(counts), share, where="post", label=LABELS.get(name, name), **style)
    longest = max(float(np.quantile(counts, 0.99)) for counts in words.values())
    axes.set(xlim=(0, longest * 1.1 + 1), ylim=(0, 1.01), xlabel="words per review", ylabel="share of reviews")
    axes.set_title(f"Length of reviews, {len(words['against']):,} per sample", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    return figure


def draw_map(vectors: Mapping[str, np.ndarray]) -> Figure:
    """Plot the samples on the first two principal components of the real rows, one panel each, real rows in grey.

    vectors: {sample: [n, d]}.
    """
    real = vectors["against"]
    centre = real.mean(0)
    _, scale, components = np.linalg.svd(real - centre, full_matrices=False)
    directions = components[:2] * np.sign(components[:2].sum(1))[:, None]  # the sign of a component is arbitrary
    shares = scale[:2] ** 2 / np.sum(scale**2)
    points = {name: (each[:MAP_ROWS] - centre) @ directions.T for name, each in vectors.items()}
    panels = [name for name in vectors if name != "against"]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.6 * columns + 0.6, 3.5 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for number, name in enumerate(panels, -1):  # 'real' comes first
        axes, colour = grid.flat[number + 1], colour_of(name, number)
        axes.scatter(*points["against"].T, s=5, color="0.75", linewidths=0)
        axes.scatter(*points[name].T, s=5, color=colour, alpha=0.5, linewidths=0)
        axes.set_title(LABELS.get(name, name), fontsize=11, color=colour)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    figure.supxlabel(f"component 1 of the real rows' embeddings ({shares[0]:.0%} of the variance)", fontsize=9)
    figure.supylabel(f"component 2 ({shares[1]:.0%})", fontsize=9)
    figure.suptitle(f"Grey: the real reference sample; up to {MAP_ROWS:,} points per sample", fontsize=10)
    return figure
