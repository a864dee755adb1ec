"""All figures that a Study's numbers allow, and the training curves."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from reporting import figures_extraction, figures_privacy, figures_synthetic
from reporting.figures_mia import heat_maps, roc_curves
from reporting.figures_overview import overview
from reporting.load import choose
from reporting.style import Look, short
from reporting.svg import STYLES, Figure, Key, Panel, label_ends
from reporting.table import Model, Study, literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def training(study: Study, look: Look, chosen: list[Model]) -> list[Figure]:
    """Training loss, held-out loss and gradient norm, one line per run."""
    arm_of = {model.run: model for model in study.models.values() if model.step is not None}
    runs = {run: lines for run, lines in study.curves.items() if lines}
    if not runs:
        return []
    labels: dict[str, str] = {}
    for run in runs:
        model = arm_of.get(run)
        labels[run] = model.label.rpartition(" · epoch")[0] or model.label if model else literal(Path(run).name)
    few = len(runs) <= 6

    def panel(metric: str, title: str) -> Panel | None:
        points_of = {
            run: [
                (line["step"], line[metric])
                for line in lines
                if line.get(metric) is not None and line.get("step") is not None
            ]
            for run, lines in runs.items()
        }
        points_of = {run: every_nth(points) for run, points in points_of.items() if points}

        def draw(axes: "Axes") -> None:
            ends: list[tuple[float, str, str]] = []
            seen: dict[str, int] = {}
            for run, points in points_of.items():
                model = arm_of.get(run)
                colour = look.colour(model.arm if model else None)
                style = STYLES[seen.get(colour, 0) % len(STYLES)] if few else "-"
                seen[colour] = seen.get(colour, 0) + 1
                axes.plot(
                    [step for step, _ in points],
                    [value for _, value in points],
                    color=colour,
                    linestyle=style,
                    linewidth=1.7 if few else 0.8,
                    alpha=1 if few else 0.55,
                    marker="o" if len(points) < 4 else "",
                    markersize=3,
                )
                ends.append((points[-1][1], short(labels[run], 24), colour))
            axes.set(xlabel="optimiser step")
            axes.grid(axis="y")
            values = [value for points in points_of.values() for _, value in points]
            if min(values) > 0 and max(values) / min(values) > 30:
                axes.set_yscale("log")
            if few:
                label_ends(axes, ends)

        return Panel(title, draw, (4.2, 2.8)) if points_of else None

    titles = {"loss": "Training loss", "eval_loss": "Held-out loss", "grad_norm": "Gradient norm"}
    panels = [drawn for metric, title in titles.items() if (drawn := panel(metric, title))]
    summary = "; ".join(
        f"{labels[run]}: loss {lines[0]['loss']:.3g} at step {lines[0]['step']}, {lines[-1]['loss']:.3g} at step "
        f"{lines[-1]['step']}"
        for run, lines in list(runs.items())[:12]
        if None not in (lines[0].get("loss"), lines[-1].get("loss"))
    )
    arms = dict.fromkeys(arm_of[run].arm for run in runs if run in arm_of)
    keys: list[Key] = [] if few else [(arm, look.of[arm][0], None, "-") for arm in arms]
    caption = f"{len(runs)} runs, as logged in metrics.jsonl."
    return [Figure("training", "Training curves", caption, summary, panels, keys, 2, "training")]


def every_nth(points: list[tuple[int, float]], most: int = 250) -> list[tuple[int, float]]:
    """About `most` of the points at most, evenly spaced; keeps the last one."""
    step = math.ceil(len(points) / most)
    return points if step == 1 else [*points[:-1:step], points[-1]]


BUILDERS = (
    overview,
    figures_extraction.extraction_bars,
    figures_extraction.extraction_curves,
    figures_extraction.plane,
    figures_extraction.perplexity_curves,
    roc_curves,
    heat_maps,
    figures_privacy.epsilon_bounds,
    figures_privacy.epsilon_utility,
    figures_privacy.exposure_histogram,
    figures_privacy.exposure,
    figures_privacy.canary_roc,
    figures_privacy.canary_counts,
    figures_synthetic.fidelity,
    figures_synthetic.utility,
    figures_synthetic.importance,
    figures_synthetic.human,
    training,
)


def build(study: Study) -> list[Figure]:
    """Every figure that the numbers allow."""
    look = Look(study)
    chosen = choose(study)[0]
    return [figure for builder in BUILDERS for figure in builder(study, look, chosen)]
