"""`bench gemm` of one shape: a roofline under the measured read bandwidth, and time over M for
kernels and peers.
"""

from statistics import median

from matplotlib.ticker import NullLocator

from .figure_style import INK, MUTED, NARROW, Drawing, both_widths, mode_style, plain_log
from .runs import mode_order
from .text import number

PEER_MARKERS = "x+1234"


def best_per_m(rows):
    best = {}
    for row in rows:
        if row.m not in best or row.us < best[row.m].us:
            best[row.m] = row
    return [best[m] for m in sorted(best)]


def kernel_series(mode, rows):
    """One line per mode where each M has one kernel (the preferred one); else one per kernel."""
    if len({row.m for row in rows}) == len(rows):
        names = list(dict.fromkeys(row.name for row in sorted(rows, key=lambda row: row.m)))
        return [(", then ".join(names), best_per_m(rows))]
    return [(name, best_per_m(row for row in rows if row.name == name))
            for name in sorted({row.name for row in rows})]


def series_of(rows):
    """[(label, rows by M)]: ours by mode, then of each kind of peer the best."""
    series = []
    for mode in sorted({row.mode for row in rows if not row.is_peer}, key=mode_order):
        series += kernel_series(mode, [r for r in rows if not r.is_peer and r.mode == mode])
    for mode in sorted({row.mode for row in rows if row.is_peer}):
        series.append((f"best {mode}", best_per_m(r for r in rows if r.is_peer and r.mode == mode)))
    return series


def styles_of(series):
    """Ours by mode; several kernels of a mode get filled and open markers; peers are grey."""
    styles, per_mode, peers = [], {}, 0
    for _, rows in series:
        mode = rows[0].mode
        if rows[0].is_peer:
            styles.append(dict(color=MUTED, marker=PEER_MARKERS[peers % len(PEER_MARKERS)],
                               linestyle="-" if peers == 0 else ":", linewidth=1.1, markersize=6))
            peers += 1
            continue
        count = per_mode[mode] = per_mode.get(mode, 0) + 1
        tone, marker, dashes = mode_style(mode, len(per_mode))
        styles.append(dict(color=tone, marker=marker, linestyle=dashes, markersize=6,
                           markerfacecolor=tone if count == 1 else "none"))
    return styles


def label_of(row):
    return f"{row.name}, {row.mode}" if row.is_peer else row.name


def title_of(row):
    return f"{label_of(row)}, M={row.m}: {number(row.us)} µs, {number(row.tops)} TOPS"


def draw_roofline(drawing, axes, series, styles):
    axes.set_xscale("log")
    axes.set_yscale("log")
    intensities, tops = [], []
    for (_, rows), style in zip(series, styles):
        points = [row for row in rows if row.ops_per_byte() and row.tops]
        if not points:
            continue
        intensities += [row.ops_per_byte() for row in points]
        tops += [row.tops for row in points]
        drawing.points(axes, [row.ops_per_byte() for row in points], [row.tops for row in points],
                       [title_of(row) for row in points], **style)
    bandwidths = [row.read_gb_per_s for _, rows in series for row in rows if row.read_gb_per_s]
    if bandwidths:
        roof = median(bandwidths)
        ends = [min(intensities) / 1.5, max(intensities) * 1.5]
        tops += [roof * end / 1000 for end in ends]
        axes.plot(ends, tops[-2:], color=INK, linewidth=1, zorder=2)
        axes.annotate(f"read bandwidth, {number(roof)} GB/s", (ends[1], tops[-1]),
                      xytext=(-4, 2), textcoords="offset points", ha="right", va="bottom",
                      fontsize=11)
        axes.set_ylim(min(tops) / 2, max(tops) * 4)
    plain_log(axes.xaxis, intensities)
    plain_log(axes.yaxis, tops)
    axes.set_xlabel("operations per byte read and written")
    axes.set_ylabel("TOPS")
    axes.set_title("Roofline", loc="left")


def draw_times(drawing, axes, series, styles):
    handles = []
    for (_, rows), style in zip(series, styles):
        handles.append(drawing.points(axes, [row.m for row in rows], [row.us for row in rows],
                                      [title_of(row) for row in rows], **style))
    ms = sorted({row.m for _, rows in series for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    plain_log(axes.yaxis, [row.us for _, rows in series for row in rows])
    axes.set_xticks(ms if len(ms) <= 8 else ms[:: -(-len(ms) // 8)])
    axes.xaxis.set_major_formatter(lambda value, _: number(value, 7))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("M, rows of activations")
    axes.set_ylabel("µs, median")
    axes.set_title("Time of one product", loc="left")
    return handles


def roofline_and_times(rows, prefix):
    """Rows of one shape."""
    series = series_of(rows)
    styles = styles_of(series)
    has_roof = any(row.ops_per_byte() and row.tops for row in rows)

    def draw(width):
        count = 2 if has_roof else 1
        columns = 1 if width == NARROW else count
        labels = [label for label, _ in series]
        legend_columns = 1 if width == NARROW else 3
        height = 20 * -(-len(labels) // legend_columns) + 310 * (count // columns)
        drawing = Drawing(width, height, count // columns, columns)
        if has_roof:
            draw_roofline(drawing, drawing.axes[0], series, styles)
        handles = draw_times(drawing, drawing.axes[-1], series, styles)
        drawing.legend(handles, labels, legend_columns)
        return drawing

    return both_widths(draw, prefix)
