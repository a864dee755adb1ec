"""Render panels in one style, as inline SVG that follows the page's theme and as PNG and PDF.

A panel is drawn once, in the light colours. In the SVG these become CSS variables, so that the dark theme of the page
applies to figures too; text stays text, in the page's font.
"""

import io
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import matplotlib
import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogFormatterSciNotation, MaxNLocator

from reporting.table import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.typing import RcKeyType

Draw = Callable[["Axes"], None]
Style = Literal["-", "--", "-.", ":"]  # of a line
Key = tuple[str, str, str | None, Style | None]  # of a legend: label, colour, marker, line style

# name: (light, dark). Series colours after Okabe and Ito (2008), colour-blind safe; each also has a marker.
COLOURS = {
    "ink": ("#1b1f24", "#e7eaee"),
    "muted": ("#5b6470", "#a2abb7"),
    "grid": ("#e2e6ea", "#333a43"),
    "axis": ("#b9c0c8", "#56606c"),
    "base": ("#7a838e", "#98a2ae"),
    "blue": ("#0068a8", "#5fb0ec"),
    "vermillion": ("#cf5400", "#ff9152"),
    "green": ("#008a63", "#3fcf9f"),
    "purple": ("#a64d84", "#e79ac8"),
    "amber": ("#b27d00", "#f0bd4c"),
    "sky": ("#2b95cf", "#8fd3ff"),
}
VARIABLES = {light: f"var(--{name})" for name, (light, _) in COLOURS.items()}
SVG = "http://www.w3.org/2000/svg"
ElementTree.register_namespace("", SVG)
ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
SERIES = ("blue", "vermillion", "green", "purple", "amber", "sky")
MARKERS = ("o", "s", "D", "^", "v", "P")
STYLES: tuple[Style, ...] = ("-", "--", "-.", ":")
INK, MUTED, GRID, AXIS, BASE = (COLOURS[name][0] for name in ("ink", "muted", "grid", "axis", "base"))
SETTINGS: dict["RcKeyType", Any] = {
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 7,
    "axes.labelsize": 9,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": AXIS,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": AXIS,
    "ytick.color": AXIS,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    "text.parse_math": False,  # a $ in a name is a $
}


@dataclass
class Panel:
    """One set of axes, styled and passed to `draw`. `size` in inches, also on the page (96 pixels per inch)."""

    title: str
    draw: Draw
    size: tuple[float, float] = (3.45, 2.6)


@dataclass
class Figure:
    """Panels under one title. `keys`: the legend; `summary`: alt text."""

    name: str
    title: str
    caption: str
    summary: str
    panels: list[Panel]
    keys: list[Key] = field(default_factory=list)
    columns: int = 2
    section: str = ""


def fill(axes: "Axes", panel: Panel) -> None:
    """Draw the panel; log axes get plain numbers, because matplotlib's use mathtext, which SETTINGS disables."""

    class Plain(LogFormatterSciNotation):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    panel.draw(axes)
    axes.set_title(panel.title)
    for axis in (axes.xaxis, axes.yaxis):
        for get, put in (
            (axis.get_major_formatter, axis.set_major_formatter),
            (axis.get_minor_formatter, axis.set_minor_formatter),
        ):
            if isinstance(get(), LogFormatterSciNotation):
                put(Plain())


def svg(panel: Panel, name: str, label: str) -> str:
    """The panel as an <svg> element for a page that defines --font and a variable for each of COLOURS."""
    with matplotlib.rc_context({**SETTINGS, "svg.hashsalt": name}):
        canvas = Canvas(figsize=panel.size, layout="constrained")
        fill(canvas.subplots(), panel)
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for metadata in root.findall(f"{{{SVG}}}metadata"):
        root.remove(metadata)
    for group in root.iter(f"{{{SVG}}}g"):
        group.attrib.pop("id", None)
    ids = {element.attrib["id"]: f"{name}-{number}" for number, element in enumerate(root.findall(".//*[@id]"))}
    for element in root.iter():
        if not (element.text or "").strip():
            element.text = None
        element.tail = None
        for key, value in element.attrib.items():
            element.set(key, _attribute(key, value, ids))
    width, height = (round(96 * inches) for inches in panel.size)
    root.attrib = {
        "viewBox": f"0 0 {72 * panel.size[0]:g} {72 * panel.size[1]:g}",
        "width": str(width),
        "height": str(height),
        "role": "img",
        "aria-label": label,
    }
    return ElementTree.tostring(root, encoding="unicode")


def _attribute(key: str, value: str, ids: dict[str, str]) -> str:
    """Adapt an attribute value to the page: unique ids, two decimals, the page's font and colours."""
    if key == "id":
        return ids[value]
    value = re.sub(r"#([\w-]+)", lambda target: "#" + ids.get(target[1], target[1]), value)
    value = re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), value)
    if key != "style":
        return value
    return "; ".join(_themed(*part.split(":", 1)) for part in value.split(";") if part.strip())


def _themed(key: str, value: str) -> str:
    key, value = key.strip(), value.strip()
    if key == "font":
        size = re.search(r"[\d.]+px", value)
        weight = "bold " if "bold" in value or "700" in value else ""
        value = f"{weight}{size[0] if size else '10px'} var(--font)"
    elif key == "font-family":
        value = "inherit"
    return f"{key}: {VARIABLES.get(value.lower(), value)}"


def whole(figure: Figure) -> Canvas:
    """All panels on one matplotlib Figure with title and legend, for PNG and PDF."""
    columns = min(figure.columns, len(figure.panels))
    rows = math.ceil(len(figure.panels) / columns)
    width = columns * max(panel.size[0] for panel in figure.panels)
    heights = [
        max(panel.size[1] for panel in figure.panels[row * columns : (row + 1) * columns]) for row in range(rows)
    ]
    with matplotlib.rc_context(SETTINGS):
        legend_rows = math.ceil(len(figure.keys) / max(1, int(width / 1.8)))
        head = 0.42 + 0.22 * legend_rows
        canvas = Canvas(figsize=(width, sum(heights) + head), layout="constrained", facecolor="white")
        grid = canvas.subplots(rows, columns, squeeze=False, height_ratios=heights)
        for axes, panel in zip(grid.flat, figure.panels):
            fill(axes, panel)
        for axes in grid.flat[len(figure.panels) :]:
            axes.set_visible(False)
        canvas.suptitle(figure.title, x=0.01, ha="left", fontsize=11.5, fontweight="bold")
        if figure.keys:
            handles = [
                Patch(color=colour)
                if marker == "block"
                else Line2D([], [], color=colour, marker=marker or "", linestyle=style or "")
                for _, colour, marker, style in figure.keys
            ]
            columns = max(1, min(len(handles), int(width / 1.8)))
            legend = canvas.legend(handles, ["-"] * len(handles), loc="outside lower left", ncols=columns, fontsize=8.5)
            for text, key in zip(
                legend.get_texts(), figure.keys
            ):  # set afterwards: labels with a leading _ are dropped
                text.set_text(key[0])
    return canvas


def save(figure: Figure, folder: Path) -> None:
    """Write <name>.png (150 dpi) and <name>.pdf to `folder`; the same numbers give the same bytes."""
    with matplotlib.rc_context(SETTINGS):
        canvas = whole(figure)
        canvas.savefig(folder / f"{figure.name}.png", dpi=150, metadata={"Software": None})
        canvas.savefig(folder / f"{figure.name}.pdf", metadata={"CreationDate": None})


def key_svg(colour: str, marker: str | None, style: Style | None) -> str:
    """The symbol of a legend entry, 22 × 12 pixels."""
    paint = VARIABLES.get(colour, colour)
    dashes = {"--": ' stroke-dasharray="5 3"', ":": ' stroke-dasharray="1.5 2.5"', "-.": ' stroke-dasharray="6 2 1 2"'}
    shapes = {
        "o": '<circle cx="11" cy="6" r="3.4"/>',
        "s": '<rect x="8" y="3" width="6" height="6"/>',
        "D": '<path d="M11 2l4 4-4 4-4-4z"/>',
        "^": '<path d="M11 2l4 7.5h-8z"/>',
        "v": '<path d="M11 10l4-7.5h-8z"/>',
        "<": '<path d="M7 6l8-4v8z"/>',
        "P": '<path d="M9.5 2h3v2.5H15v3h-2.5V10h-3V7.500H7v-3h2.5z"/>',
        "|": '<path d="M10 1h2v10h-2z"/>',
        "block": '<rect x="3" y="2" width="16" height="8" rx="1"/>',
    }
    line = f'<path d="M1 6h20" stroke="{paint}" stroke-width="2"{dashes.get(style, "")}/>' if style else ""
    return f'<svg width="22" height="12" aria-hidden="true" fill="{paint}">{line}{shapes.get(marker or "", "")}</svg>'


def percent(axis: "Axis") -> None:
    """Show rates 0 … 1 as percent, with as many decimals as the ticks need."""
    axis.set_major_locator(MaxNLocator(5))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.6g}%"))


def from_zero(axes: "Axes", axis: Literal["x", "y"]) -> None:
    """Let the axis begin a little below 0, so that a marker at 0 is drawn whole; negative values keep their room."""
    low, high = axes.get_xlim() if axis == "x" else axes.get_ylim()
    low = min(low, -0.035 * high) if low < 0 else -0.035 * high
    if axis == "x":
        axes.set_xlim(low, high)
    else:
        axes.set_ylim(low, high)


def line(
    axes: "Axes",
    x: Sequence[float],
    rows: Sequence[Row],
    colour: str,
    marker: str = "o",
    style: Style = "-",
    band: bool = True,
    **more: Any,
) -> None:
    """Plot the values of `rows` over x with their intervals as a band; rows without a value leave a gap."""
    y = np.array([np.nan if row.value is None else row.value for row in rows])
    ends = [(row.low, row.high) if row.low is not None else (np.nan, np.nan) for row in rows]
    low, high = np.array(ends, dtype=float).T
    if band and np.isfinite(low).any():
        axes.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
    if len(rows) == 1 and rows[0].value is not None:  # a band over one point would have no width
        axes.errorbar(x, y, yerr=errors(rows[0]), color=colour, elinewidth=1.4, fmt="none")
    axes.plot(x, y, color=colour, marker=marker, linestyle=style, **more)


def errors(row: Row) -> list[list[float]]:
    """[[down], [up]] for errorbar; zeros without an interval."""
    if row.low is None or row.high is None:
        return [[0], [0]]
    return [[max(0.0, row.number - row.low)], [max(0.0, row.high - row.number)]]


def label_ends(axes: "Axes", ends: list[tuple[float, str, str]]) -> None:
    """Write each (y, text, colour) at the right edge of the axes, moved apart where they would overlap."""
    axes.figure.canvas.draw()  # sets the limits
    low, high = axes.get_ylim()
    log = axes.get_yscale() == "log"

    def height_of(y: float) -> float:
        """Share of the axes' height."""
        return math.log(y / low) / math.log(high / low) if log else (y - low) / (high - low)

    step = 11 / (axes.bbox.height / axes.figure.dpi * 72)
    placed: list[tuple[float, str, str]] = []
    last = -math.inf
    for y, text, colour in sorted(ends, key=lambda end: end[0]):
        last = max(height_of(y), last + step)
        placed.append((last, text, colour))
    over = max(0.0, placed[-1][0] - 1) if placed else 0
    for height, text, colour in placed:
        axes.annotate(
            text,
            (1, height - over),
            xycoords="axes fraction",
            xytext=(5, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            fontsize=8.5,
            annotation_clip=False,
        )


def label_points(axes: "Axes", points: list[tuple[float, float, str, str]]) -> None:
    """Write each (x, y, text, colour) beside its point: on the side of the axes' middle, below the last one if near."""
    axes.figure.canvas.draw()  # sets the limits
    to_share = axes.transData + axes.transAxes.inverted()
    placed: list[tuple[float, float]] = []
    for x, y, text, colour in sorted(points, key=lambda point: -point[1]):
        across, up = to_share.transform((x, y))
        near = [height for other, height in placed if abs(other - across) < 0.35]
        height = min([up, *(one - 0.085 for one in near)]) if any(abs(one - up) < 0.085 for one in near) else up
        placed.append((across, height))
        left = across > 0.6
        axes.annotate(
            text,
            (across, height),
            xycoords="axes fraction",
            xytext=(-7 if left else 7, 0),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
            color=colour,
            fontsize=8.5,
        )
