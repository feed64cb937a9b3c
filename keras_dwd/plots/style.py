"""What all figures share: sizes, colours, and axes without ornaments."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

try:
    import matplotlib as mpl
    from cycler import cycler
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:  # pragma: no cover
    raise ModuleNotFoundError(
        'Figures need matplotlib: pip install "keras_dwd[plots]"', name=error.name
    ) from None

# Okabe & Ito's colours, which people with colour blindness tell apart, without black and yellow:
# all can be seen on white and on black.
COLORS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f")
INK, FAINT = "#3d3d3d", "#b9b9b9"
"""The colours of text and of lines in the background; pages put theirs in place of these."""

WIDTH = 5.0
"""The width of a figure in inches, at which its text is readable on a phone."""


@contextmanager
def style() -> Iterator[None]:
    """Within this, figures have the style of the package, whatever the user has set."""
    settings: Any = {
        "axes.edgecolor": FAINT,
        "axes.labelcolor": INK,
        "axes.prop_cycle": cycler(color=COLORS),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlecolor": INK,
        "axes.titlesize": 9,
        "font.family": "sans-serif",
        "font.size": 9,
        "grid.color": FAINT,
        "grid.linewidth": 0.4,
        "legend.frameon": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "keras_dwd",  # the same figure is the same file
        "text.color": INK,
        "text.parse_math": False,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    others: Any = {**mpl.rcParamsDefault, "backend": mpl.rcParams["backend"]}
    with mpl.rc_context(others | settings):
        yield


def figure(height: float, rows: int = 1, columns: int = 1, **settings: Any) -> tuple[Figure, Any]:
    """A figure of the common width with a grid of axes, always as an array of two dimensions."""
    fig = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="none")
    axes = fig.subplots(rows, columns, squeeze=False, **settings)
    for axis in axes.flat:
        axis.set_facecolor("none")
    return fig, axes


def heat(axis: Any, values: Any, highest: float | None = None, text: Any = None) -> None:
    """Draw a matrix as a heat map, with the number in each cell where there are few."""
    rows, columns = values.shape
    mesh = axis.pcolormesh(values, cmap="viridis", vmin=0, vmax=highest, edgecolors="none")
    axis.invert_yaxis()
    axis.set_xticks([i + 0.5 for i in range(columns)], [])
    axis.set_yticks([i + 0.5 for i in range(rows)], [])
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)
    if columns > 12 or rows > 24:
        axis.figure.colorbar(mesh, ax=axis)
        return
    top = highest or float(values[values == values].max(initial=0)) or 1.0
    size = 8 if columns <= 7 else 6
    for i in range(rows):
        for j in range(columns):
            if values[i, j] == values[i, j]:  # no NaN
                color = "black" if values[i, j] > 0.55 * top else "white"
                shown = f"{values[i, j]:.2g}" if text is None else text(values[i, j])
                axis.text(
                    j + 0.5, i + 0.5, shown, ha="center", va="center", color=color, fontsize=size
                )


def numbered(axis: Any, columns: int, rows: int) -> None:
    """Number the columns and rows of a heat map from 1, leaving some out where there are many."""
    every_column, every_row = -(-columns // 12), -(-rows // 24)
    axis.set_xticklabels([str(i + 1) if i % every_column == 0 else "" for i in range(columns)])
    axis.set_yticklabels([str(i + 1) if i % every_row == 0 else "" for i in range(rows)])


def shortened(name: str, length: int = 28) -> str:
    """A name that fits beside a figure."""
    return name if len(name) <= length else name[: length - 1] + "…"
