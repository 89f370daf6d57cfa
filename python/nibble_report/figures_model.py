"""Accuracy against speed of whole models: one point per mode, up and to the right is better on
every panel. Where one of the two is missing, the other alone as dots per mode.
"""

from .figure_style import NARROW, Drawing, both_widths, mode_style, plain_log, shorten
from .summary import test_title
from .text import number, plus_minus

MEASURES = [  # key, key of its error, axis label
    ("kld_mean", "kld_err", "mean KLD"),
    ("ppl_ratio", "ppl_ratio_err", "perplexity ratio"),
]
PERFECT = {"kld_mean": 0, "ppl_ratio": 1}  # of the reference against itself
LOG_FROM = 20  # ratio of largest to smallest


def measures_of(group):
    """Those that were measured; plain perplexity if there was no reference."""
    found = [m for m in MEASURES if any(row.get(m[0]) is not None for row in group.rows.values())]
    return found or [("ppl", "ppl_err", "perplexity")]


def spread_is_wide(values):
    return min(values) > 0 and max(values) / min(values) >= LOG_FROM


def set_scale(axes, which, values):
    """Logarithmic if the values ask for it; else with some room around them."""
    if spread_is_wide(values):
        getattr(axes, f"set_{which}scale")("log")
        plain_log(getattr(axes, f"{which}axis"), values)
        getattr(axes, f"set_{which}lim")(min(values) / 1.6, max(values) * 1.6)
        return
    room = 0.18 * (max(values) - min(values)) or 0.05 * abs(max(values)) or 1
    getattr(axes, f"set_{which}lim")(min(values) - room, max(values) + room)


def scatter_points(text, speed, reference, test, measure):
    """(mode, speed, its error, accuracy, its error); the reference itself if its speed is known."""
    points = []
    itself = reference.get("16bit", test) if reference else None
    if itself is not None and measure[0] in PERFECT:
        points.append(("16bit", itself.avg, itself.stddev, PERFECT[measure[0]], None))
    for mode in text.rows:
        fast, value = speed.get(mode, test), text.rows[mode].get(measure[0])
        if fast is not None and value is not None:
            points.append((mode, fast.avg, fast.stddev, value, text.rows[mode].get(measure[1])))
    return points


def draw_scatter(drawing, axes, points, test, measure):
    for i, (mode, speed, speed_error, value, error) in enumerate(points):
        tone, marker, _ = mode_style(mode, i)
        axes.errorbar([speed], [value], xerr=speed_error, yerr=error, fmt="none", ecolor=tone,
                      elinewidth=1.2, capsize=3)
        drawing.points(axes, [speed], [value],
                       [f"{mode}: {number(speed)} tokens/s, {measure[2]} {number(value, 4)}"],
                       color=tone, marker=marker, linestyle="none", markersize=8)
        axes.annotate(shorten(mode, 20), (speed, value), xytext=(8, 6), textcoords="offset points",
                      fontweight="bold")
    set_scale(axes, "x", [p[1] for p in points])
    set_scale(axes, "y", [p[3] for p in points])
    axes.margins(0.2)
    axes.invert_yaxis()  # better is up
    axes.set_xlabel(f"tokens/s ({test})")
    axes.set_ylabel(measure[2])
    axes.set_title(test_title(test), loc="left")


def accuracy_against_speed(text, speed, reference, prefix):
    """None if no mode has both."""
    panels = [(test, measure, scatter_points(text, speed, reference, test, measure))
              for measure in measures_of(text) for test in speed.tests()]
    panels = [panel for panel in panels if any(p[0] in text.rows for p in panel[2])][:8]
    if not panels:
        return None

    def draw(width):
        # a row for each measure where that leaves the panels wide enough
        tests = len({panel[0] for panel in panels})
        columns = 1 if width == NARROW else tests if tests <= 3 else 2
        rows = -(-len(panels) // columns)
        drawing = Drawing(width, 260 * rows, rows, columns)
        for axes, (test, measure, points) in zip(drawing.axes, panels):
            draw_scatter(drawing, axes, points, test, measure)
        for axes in drawing.axes[len(panels):]:
            axes.set_visible(False)
        return drawing

    return both_widths(draw, prefix)


def dots(panels, prefix):
    """panels: [(title, [(mode, value, error)])]: one row per mode, one panel per measure."""
    def draw(width):
        columns = 1 if width == NARROW else min(2, len(panels))
        rows = -(-len(panels) // columns)
        most = max(len(points) for _, points in panels)
        drawing = Drawing(width, (70 + 30 * most) * rows, rows, columns)
        for axes, (title, points) in zip(drawing.axes, panels):
            for y, (mode, value, error) in enumerate(points):
                tone, marker, _ = mode_style(mode, y)
                axes.errorbar([value], [y], xerr=error, fmt="none", ecolor=tone, elinewidth=1.2,
                              capsize=3)
                drawing.points(axes, [value], [y], [f"{mode}: {plus_minus(value, error, 4)}"],
                               color=tone, marker=marker, linestyle="none", markersize=8)
            set_scale(axes, "x", [value for _, value, _ in points])
            axes.set_yticks(range(len(points)), [shorten(mode, 20) for mode, _, _ in points])
            axes.set_ylim(len(points) - 0.5, -0.5)
            axes.set_title(title, loc="left")
        for axes in drawing.axes[len(panels):]:
            axes.set_visible(False)
        return drawing

    return both_widths(draw, prefix)


def speed_dots(group, prefix):
    panels = []
    for test in group.tests():
        points = [(mode, tests[test].avg, tests[test].stddev)
                  for mode, tests in group.rows.items() if test in tests]
        panels.append((f"{test}, tokens/s", points))
    return dots(panels[:8], prefix)


def accuracy_dots(group, prefix):
    panels = []
    for key, error, label in measures_of(group):
        points = [(mode, row.get(key), row.get(error)) for mode, row in group.rows.items()
                  if row.get(key) is not None]
        panels.append((label, points))
    panels = [panel for panel in panels if panel[1]]
    return dots(panels, prefix) if panels else None
