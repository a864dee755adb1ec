"""Shared by the figures: one colour per arm, short names, sweeps over one setting. Draws nothing itself."""

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from reporting.svg import BASE, COLOURS, MARKERS, SERIES, STYLES, Style
from reporting.table import Model, Row, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_GROUPS = 3  # sets of people or texts that get their own figures; tables have all
MOST_LINES = 8
MOST_NAMED = 6  # models that a caption lists


class Look:
    """Colour and marker of each arm, the same in every figure. The base is grey."""

    def __init__(self, study: Study):
        first = ("original", "generated", "replaced", "self-instruct", "real", "no_dp", "dp")
        grey = {"base", "majority", "null"}
        named = {row.arm for row in study.rows if row.arm and row.area != "paired"}
        named |= {model.arm for model in study.models.values()}
        arms = sorted({study.same.get(arm, arm) for arm in named} - grey, key=lambda arm: (_order(arm, first), arm))
        colours = [COLOURS[name][0] for name in SERIES]
        self.of: dict[str, tuple[str, str]] = dict.fromkeys(grey, (BASE, "o"))
        for i, arm in enumerate(arms):  # from the seventh arm on, colours repeat with other markers
            self.of[arm] = (colours[i % len(colours)], MARKERS[(i + i // len(colours)) % len(MARKERS)])
        self.of |= {arm: self.of[name] for arm, name in study.same.items()}
        self.arms = ["base"]
        for name in arms:
            self.arms += [name, *(arm for arm, other in study.same.items() if other == name != arm)]

    def colour(self, arm: str | None) -> str:
        return self.of.get(arm or "base", (BASE, "o"))[0]

    def sort(self, models: Iterable[Model]) -> list[Model]:
        order = {arm: index for index, arm in enumerate(self.arms)}
        return sorted(models, key=lambda m: (order.get(m.arm, 99), m.learning_rate or 0, m.step or 0))


def names(models: list[Model]) -> dict[str, str]:
    """{key: the shortest of arm, arm · epoch and label that distinguishes these models}."""
    forms: tuple[Callable[[Model], str], ...] = (
        lambda model: model.arm,
        lambda model: model.arm if model.epoch is None else f"{model.arm} · epoch {model.epoch:g}",
    )
    for form in forms:
        if len({form(model) for model in models}) == len(models):
            return {model.key: form(model) for model in models}
    return {model.key: model.label for model in models}


def _order(arm: str, first: tuple[str, ...]) -> int:
    return next((index for index, name in enumerate(first) if arm.startswith(name)), len(first))


def groups(rows: list[Row]) -> list[str]:
    """Groups sorted by number of models, most first."""
    models: dict[str, set[str]] = {}
    for row in rows:
        models.setdefault(row.group, set()).add(row.measured.key)
    return sorted(models, key=lambda group: -len(models[group]))


def name_of(base: str, index: int) -> str:
    return base if index == 0 else f"{base}_{index + 1}"


def interval_text(row: Row, rate: bool = True) -> str:
    if row.value is None:
        return "undefined"
    form = "{:.1%}" if rate else "{:.3g}"
    ends = "" if row.low is None else f" ({form.format(row.low)}–{form.format(row.high)})"
    return form.format(row.value) + ends


def short(label: str, most: int = 26) -> str:
    return label if len(label) <= most else label[: most // 2] + "…" + label[-(most // 2 - 1) :]


def sweeps(rows: list[Row], axis: str, chosen: list[Model]) -> dict[str, list[Model]]:
    """{label: models in order} of series that differ only in `axis`, followed by single models in `chosen`; for the
    learning rate, only last checkpoints. {} if no two models differ.

    If there are more than MOST_LINES series, only those with a model in `chosen`.
    """
    members: dict[tuple[Any, ...], dict[str, Model]] = {}
    for row in rows:
        model = row.measured
        if getattr(model, axis) is None or (axis == "learning_rate" and not model.last):
            continue
        rest = (model.arm, model.base, model.peft_type, model.run_name)
        members.setdefault(rest if axis == "learning_rate" else (*rest, model.learning_rate), {})[model.key] = model
    series = {rest: sorted(models.values(), key=lambda m: getattr(m, axis)) for rest, models in members.items()}
    several = {rest: models for rest, models in series.items() if len({getattr(m, axis) for m in models}) > 1}
    if not several:
        return {}
    alone = {rest: models for rest, models in series.items() if rest not in several and _any_of(models, chosen)}
    if len(several) > MOST_LINES:
        several = {rest: models for rest, models in several.items() if _any_of(models, chosen)}
    several |= alone
    shown = {}
    for rest, models in several.items():
        parts = [rest[0]]
        for index in range(1, len(rest)):
            if len({other[index] for other in several}) > 1 and rest[index]:
                parts.append(f"lr {rest[index]:g}" if index == 4 else str(rest[index]))
        shown[" · ".join(parts)] = models
    return shown


def dodge(series: dict[str, list[Model]], axis: str) -> dict[str, Callable[[float], float]]:
    """{label: function from a value of `axis` to its x position}: single points are shifted right one by one."""
    values = [getattr(model, axis) for models in series.values() for model in models]
    alone = [label for label, models in series.items() if len(models) == 1]

    def moved(label: str) -> Callable[[float], float]:
        part = min(0.025, 0.15 / len(alone)) * (1 + alone.index(label)) if label in alone else 0.0
        if axis == "learning_rate":
            return lambda value: value * (max(values) / min(values)) ** part
        return lambda value: value + part * (max(values) - min(values))

    return {label: moved(label) for label in series}


def _any_of(models: list[Model], chosen: list[Model]) -> bool:
    return any(model in chosen for model in models)


def left_out(models: Iterable[Model], drawn: Iterable[Model]) -> str:
    """Caption text that lists the trained models that a figure leaves out."""
    shown = {model.key for model in drawn}
    rest = list({model.key: model.label for model in models if not model.is_base and model.key not in shown}.values())
    more = f" and {len(rest) - MOST_NAMED:,} more" if len(rest) > MOST_NAMED else ""
    return f" Not drawn, but in the table: {', '.join(rest[:MOST_NAMED])}{more}." if rest else ""


def more_groups(sets: list[str], index: int) -> str:
    """Text for the last figure's caption that lists the sets of people or texts without a figure."""
    rest = sets[MOST_GROUPS:] if index == MOST_GROUPS - 1 else []
    return f" Without a figure, but in the table: {', '.join(rest)}." if rest else ""


def styles_of(series: dict[str, list[Model]], look: Look) -> dict[str, tuple[str, str, Style]]:
    """(colour, marker, line style) of each series: those of its arm; line styles distinguish series of one arm."""
    seen: dict[str, int] = {}
    styles: dict[str, tuple[str, str, Style]] = {}
    for label, models in series.items():
        arm = models[0].arm
        style = STYLES[seen.get(arm, 0) % len(STYLES)]
        seen[arm] = seen.get(arm, 0) + 1
        styles[label] = (*look.of[arm], style)
    return styles


def axis_of(axes: "Axes", axis: str, values: list[float]) -> None:
    """Ticks at the existing settings; logarithmic for learning rates."""
    ticks = sorted(set(values))
    if axis == "learning_rate":
        axes.set_xscale("log")
        axes.minorticks_off()
    position: Callable[[float], float] = math.log if axis == "learning_rate" else float
    kept = ticks[:1]
    for tick in ticks[1:]:  # labels at least a fifth of the axis apart
        if position(tick) - position(kept[-1]) >= (position(ticks[-1]) - position(ticks[0])) / 5:
            kept.append(tick)
    axes.set_xticks(kept, [f"{tick:g}" for tick in kept])
