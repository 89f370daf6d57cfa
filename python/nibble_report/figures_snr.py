"""SNR of every layer and mode: small multiples, one panel per linear type, over the decoder layers;
and a dot plot for layers outside of any decoder layer.
"""

from math import ceil

from .figure_style import NARROW, Drawing, both_widths, mode_style, shorten
from .layer_names import kind_order
from .text import fixed

MAX_PANELS = 12  # types beyond go into the table alone
MAX_NAMES = 40


def value_of(check, measure):
    return getattr(check, measure)


def panel_series(layers, mode, measure):
    """[(block, worst value, layer)]: several layers of one type in a block (experts) are one."""
    worst = {}
    for layer in layers:
        check = layer.modes.get(mode)
        value = value_of(check, measure) if check else None
        if value is None:
            continue
        if layer.block not in worst or value < worst[layer.block][0]:
            worst[layer.block] = (value, layer)
    return [(block, *worst[block]) for block in sorted(worst)]


def panels_of(run):
    blocks = [layer for layer in run.layers if layer.block is not None]
    kinds = sorted({layer.kind for layer in blocks}, key=kind_order)[:MAX_PANELS]
    return [(kind, [layer for layer in blocks if layer.kind == kind]) for kind in kinds]


def plotted_modes(run, measure):
    return [mode for mode in run.modes()
            if any(mode in layer.modes and value_of(layer.modes[mode], measure) is not None
                   for layer in run.layers)]


def marker_of(mode, marker, more=0):
    """Rings for W4A16, since W4A8 often lies on it."""
    if mode == "w4a16":
        return dict(marker=marker, markersize=5.2 + more, markerfacecolor="none",
                    markeredgewidth=0.9, zorder=2)
    return dict(marker=marker, markersize=3 + more)


def snr_by_block(run, measure, prefix):
    """None if no layer belongs to a decoder layer."""
    panels, modes = panels_of(run), plotted_modes(run, measure)
    if not panels or not modes:
        return None

    def draw(width):
        columns = min(2 if width == NARROW else 4, len(panels))
        rows = ceil(len(panels) / columns)
        drawing = Drawing(width, 46 + 150 * rows, rows, columns, sharex=True, sharey=True)
        handles = {}
        for axes, (kind, layers) in zip(drawing.axes, panels):
            axes.set_title(shorten(kind, 24), loc="left")
            for i, mode in enumerate(modes):
                series = panel_series(layers, mode, measure)
                if not series:
                    continue
                tone, marker, dashes = mode_style(mode, i)
                handles[mode] = drawing.points(
                    axes, [s[0] for s in series], [s[1] for s in series],
                    [f"{s[2].name}, {mode}: {fixed(s[1])} dB" for s in series],
                    color=tone, linestyle=dashes, linewidth=1.1, **marker_of(mode, marker))
        for axes in drawing.axes[len(panels):]:
            axes.set_visible(False)
        drawing.axes[0].margins(y=0.12)
        for i, axes in enumerate(drawing.axes[:len(panels)]):
            if i % columns == 0:
                axes.set_ylabel("SNR, dB")
            if i + columns >= len(panels):
                axes.set_xlabel("decoder layer")
                axes.tick_params(labelbottom=True)  # also above a panel that is not there
        drawing.legend(list(handles.values()), list(handles), len(handles))
        return drawing

    return both_widths(draw, prefix)


def snr_by_name(run, measure, prefix):
    """Layers without a decoder layer, by name; (figure, how many were left out) or None."""
    modes = plotted_modes(run, measure)
    layers = [layer for layer in run.layers if layer.block is None]
    if not layers or not modes:
        return None

    def worst(layer):
        values = [value_of(check, measure) for check in layer.modes.values()]
        return min((value for value in values if value is not None), default=float("inf"))

    shown = layers if len(layers) <= MAX_NAMES else sorted(layers, key=worst)[:MAX_NAMES]

    def draw(width):
        drawing = Drawing(width, 70 + 24 * len(shown))
        axes, handles = drawing.axes[0], {}
        for i, mode in enumerate(modes):
            points = [(value_of(layer.modes[mode], measure), y, layer.name)
                      for y, layer in enumerate(shown) if mode in layer.modes]
            points = [point for point in points if point[0] is not None]
            if not points:
                continue
            tone, marker, _ = mode_style(mode, i)
            handles[mode] = drawing.points(
                axes, [p[0] for p in points], [p[1] for p in points],
                [f"{p[2]}, {mode}: {fixed(p[0])} dB" for p in points],
                color=tone, linestyle="none", **marker_of(mode, marker, 2))
        longest = 24 if width == NARROW else 48
        axes.set_yticks(range(len(shown)), [shorten(layer.name, longest) for layer in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_xlabel("SNR, dB")
        drawing.legend(list(handles.values()), list(handles), len(handles))
        return drawing

    return both_widths(draw, prefix), len(layers) - len(shown)
