"""How every figure looks: colours by mode that colour-blind readers tell apart (Okabe and Ito),
and never colour alone: each mode has a marker and a dash pattern too.
"""

import logging
import warnings

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from .runs import base_mode
from .svg import colour, inline_svg
from .text import number

WIDE, NARROW = 960, 340  # px; text is then as large as the page's
POINT = 1 / 72  # inch; one SVG unit

INK, MUTED, GRID = colour("ink"), colour("muted"), colour("grid")

# mode -> CSS variable, marker, dashes
MODE_STYLES = {
    "16bit": ("fp16", "D", (0, (1, 1))),
    "fp16": ("fp16", "D", (0, (1, 1))),
    "w4a16": ("w4a16", "o", "-"),
    "w4a8-fp8": ("w4a8-fp8", "D", (0, (4, 1, 1, 1))),
    "w4a8": ("w4a8", "s", (0, (5, 1.5))),
    "w4a4": ("w4a4", "^", (0, (1.5, 1.5))),
    "auto": ("auto", "P", "-."),
    "plan": ("auto", "P", "-."),
}
OTHER_MARKERS = "vX<>ph*d"


def mode_style(mode, index=0):
    """(colour, marker, dashes); `index` tells modes apart that are not in the table."""
    name, marker, dashes = MODE_STYLES.get(
        base_mode(mode), ("muted", OTHER_MARKERS[index % len(OTHER_MARKERS)], (0, (3, 1, 1, 1))))
    return colour(name), marker, dashes


def prepare():
    """Settings for all figures; the user's own matplotlibrc must not change a page."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser has its own fonts
    warnings.filterwarnings("ignore", message=".*constrained.layout")
    matplotlib.rcdefaults()
    matplotlib.rcParams.update({
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "nibble",
        "text.parse_math": False,  # names may hold dollar signs
        "font.sans-serif": ["DejaVu Sans"],  # measured with; style.css says what is shown
        "font.size": 12,
        "axes.titlesize": 12,
        "axes.labelsize": 12,
        "xtick.labelsize": 11,
        "ytick.labelsize": 11,
        "legend.fontsize": 12,
        "legend.frameon": False,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.titlecolor": INK,
        "axes.edgecolor": MUTED,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "lines.linewidth": 1.6,
        "lines.markersize": 5,
        "axes.unicode_minus": True,
    })


def shorten(name, longest=40):
    """The end of a name tells layers apart."""
    return name if len(name) <= longest else "…" + name[-(longest - 1):]


class Drawing:
    """One matplotlib figure and the titles of its points."""

    def __init__(self, width, height, rows=1, columns=1, **options):
        self.width = width
        self.figure = Figure(figsize=(width * POINT, height * POINT), layout="constrained")
        self.figure.get_layout_engine().set(w_pad=6 * POINT, h_pad=8 * POINT)
        self.axes = self.figure.subplots(rows, columns, squeeze=False, **options).flatten()
        self.titles = {}

    def points(self, axes, x, y, titles, **style):
        """Plots and names each point. x and y hold numbers only."""
        gid = f"points-{len(self.titles)}"
        self.titles[gid] = list(titles)
        style.setdefault("zorder", 3)
        return axes.plot(x, y, gid=gid, **style)[0]

    def legend(self, handles, labels, columns):
        labels = [shorten(label) for label in labels]
        self.figure.legend(handles, labels, loc="outside upper left", ncols=columns,
                           handlelength=2.6, columnspacing=1.6, borderaxespad=0)

    def svg(self, prefix):
        return inline_svg(self.figure, prefix, self.titles)


def both_widths(draw, prefix):
    """draw(width) -> Drawing; for wide pages and for phones."""
    return draw(WIDE).svg(f"{prefix}w-"), draw(NARROW).svg(f"{prefix}n-")


def plain_log(axis, values):
    """A logarithmic axis with numbers as people write them, and enough of them."""
    if max(values) / min(values) < 300:
        axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
