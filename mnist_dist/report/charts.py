"""Curves as SVG that takes its colours from the page, so that they can be read in a light and in a dark theme; images.

matplotlib draws with stand-ins for the page's colours, which are then replaced by the page's CSS variables. No text of
a run's files comes into a chart: matplotlib would read formulas in it.
"""

import io
import logging
import math
import re
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup, escape
from torch import Tensor

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # a home that cannot be written is no matter for a warning
# ruff: noqa: E402
import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

NUM_COLOURS = 8
DASHES = ("-", "--", ":")  # further series have the colours again, in another dash
MAX_POINTS = 1000  # of a curve; of more, neighbours are averaged
_LARGEST = 3.5e38  # value, which a float32 does not exceed; from about 1e300 on matplotlib fails
TEXT, MUTED, GRID = "#010101", "#010102", "#010103"  # stand-ins
_SERIES = [f"#0102{number:02d}" for number in range(1, NUM_COLOURS + 1)]
_VARIABLES = {TEXT: "--text", MUTED: "--muted", GRID: "--grid"}
_VARIABLES |= {stand_in: f"--series-{number}" for number, stand_in in enumerate(_SERIES, 1)}
_WIDTH, _HEIGHT, _FONT = 360, 220, 12  # of a chart, in the SVG's own units, which are about pixels on a telephone
_SETTINGS: Any = {  # matplotlib lists the keys in the type that it wants
    "svg.fonttype": "none",  # text stays text
    "font.size": _FONT,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": TEXT,
    "ytick.labelcolor": TEXT,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}


@dataclass(frozen=True)
class Series:
    """A curve: y by step."""

    steps: Sequence[float]
    values: Sequence[float]  # those that are no finite float32 are left out
    number: int  # its colour and dash, from 0
    spread: Sequence[tuple[float, float]] = ()  # the interval of each value
    is_marked: bool = False  # with a dot at each point, for few points


@dataclass(frozen=True)
class Mark:
    """A line across a chart where a start began."""

    step: int
    text: str


def draw(
    title: str,
    series: Sequence[Series],
    marks: Sequence[Mark] = (),
    *,
    is_loss: bool = False,
    is_from_zero: bool = False,
) -> Markup | None:
    """A chart as an SVG element, or None where there is no point to draw.

    `title` names it for those who do not see it. A loss is drawn on a logarithmic axis where it spans a factor of ten.
    """
    series = [curve for curve in map(_prepare, series) if curve.steps]
    if not series:
        return None
    values = [value for curve in series for value in curve.values]
    with mpl.rc_context():
        mpl.rcdefaults()  # whatever a matplotlibrc says
        mpl.rcParams.update(_SETTINGS | {"svg.hashsalt": title})  # so that no two charts of a page share an id
        figure = Figure(figsize=(_WIDTH / 72, _HEIGHT / 72), facecolor="none")
        top = 22 if marks else 8  # for their texts
        box = (52 / _WIDTH, 42 / _HEIGHT, 1 - 66 / _WIDTH, 1 - (42 + top) / _HEIGHT)
        axes = figure.add_axes(box, facecolor="none")
        last = max(1, *(curve.steps[-1] for curve in series), *(mark.step for mark in marks))
        for place, curve in enumerate(series):
            # Intervals at the same step stand beside each other.
            _plot(axes, curve, shift=place * 0.008 * last if curve.spread else 0)
        axes.set_xlim(0, last * 1.03)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(_label))
        if is_loss and min(values) > 0 and max(values) > 10 * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 2000 * min(values) else (1,)))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))
            if is_from_zero:
                axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(_label))
        _draw_marks(axes, marks)
        svg = io.StringIO()
        figure.savefig(svg, format="svg", metadata={"Date": None})
    return _adopt(svg.getvalue(), f"{title}. {_in_words(series)}")


def png(image: Tensor) -> str:
    """A grey image uint8 [h, w] as the address of a picture that holds all of it."""
    file = io.BytesIO()
    imsave(file, image.numpy(), cmap="gray", vmin=0, vmax=255, format="png")
    return f"data:image/png;base64,{b64encode(file.getvalue()).decode()}"


def group_size(num_points: int) -> int:
    """How many neighbouring points of a curve are averaged into one."""
    return max(1, math.ceil(num_points / MAX_POINTS))


def _prepare(curve: Series) -> Series:
    """A curve without what is not finite, and with few enough points."""
    if not curve.spread:
        points = [(x, y) for x, y in zip(curve.steps, curve.values, strict=True) if abs(y) <= _LARGEST]
        size = group_size(len(points))
        groups = [points[i : i + size] for i in range(0, len(points), size)]
        means = [[sum(numbers) / len(group) for numbers in zip(*group, strict=True)] for group in groups]
        return replace(curve, steps=[x for x, _ in means], values=[y for _, y in means])
    return curve


def _plot(axes: Axes, curve: Series, shift: float) -> None:
    colour, dash = _SERIES[curve.number % NUM_COLOURS], DASHES[curve.number // NUM_COLOURS % len(DASHES)]
    marker = "o" if curve.is_marked or len(curve.steps) == 1 else None
    steps = [step + shift for step in curve.steps]
    axes.plot(steps, curve.values, color=colour, linestyle=dash, marker=marker)
    if curve.spread:
        low, high = zip(*curve.spread, strict=True)
        axes.vlines(steps, low, high, color=colour, linewidth=1)


def _draw_marks(axes: Axes, marks: Sequence[Mark]) -> None:
    """A line for each, and the text above it where the one before leaves room."""
    width = axes.get_xlim()[1]
    free = 0.0
    for mark in marks:
        axes.axvline(mark.step, color=MUTED, linestyle=(0, (3, 3)), linewidth=1)
        room = len(mark.text) * 0.6 * _FONT / (_WIDTH - 66) * width
        x = min(mark.step, width - room)
        if mark.text and x >= free:
            axes.annotate(mark.text, (x, 1.02), xycoords=axes.get_xaxis_transform(), va="bottom")
            free = x + room


def _label(value: float, _: object) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.4g}"


def _in_words(series: Sequence[Series]) -> str:
    """What the curves do, for those who do not see them."""
    return "; ".join(
        f"from {curve.values[0]:.4g} at step {curve.steps[0]:,.0f} to {curve.values[-1]:.4g} at step "
        f"{curve.steps[-1]:,.0f}"
        for curve in series
    )


def _adopt(svg: str, description: str) -> Markup:
    """matplotlib's file as an element of the page: the page's colours, and no head, size, style or needless names."""
    view, inner = re.findall(r'<svg[^>]* (viewBox="[^"]*")[^>]*>(.*</svg>)', svg, re.DOTALL)[0]
    inner = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", inner, flags=re.DOTALL)
    inner = re.sub(r'<g id="[^"]*"', "<g", inner)
    inner = re.sub("|".join(_VARIABLES), lambda match: f"var({_VARIABLES[match[0]]})", inner)
    return Markup(f'<svg {view} role="img" aria-label="{escape(description)}">{inner}')
