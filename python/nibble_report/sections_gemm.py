"""Kernels: bench gemm, a figure and a table per shape."""

from .figures_gemm import roofline_and_times, series_of
from .markup import details, figure, join, table, tag
from .runs import mode_order
from .sections import missing, origin, section
from .summary import shape_of, shapes, unique
from .text import measured, percent, times

MAX_FIGURES = 6
MAKE_GEMM = "nibble bench gemm -m 1,8,64,512 -n 4096 -k 4096 --output json > bench_gemm.json"


def shape_text(shape):
    n, k, group = shape
    return f"N={n} K={k}" + (f" g={group}" if group is not None else "")


def gemm_figure(rows, prefix):
    title = f"Kernels at {shape_text(shape_of(rows[0]))}"
    checked = all(row.checked for row in rows)
    caption = join([
        tag("strong", title), ". Left: on the line, a kernel does nothing but read at the "
        "bandwidth measured in the same run; peers do not read the packed weights and are not "
        "drawn. Right: median of interleaved rounds with cold weights, lower is better; of each "
        "kind of peer the best at each M. “matmul only” keeps the weights dequantized, in four "
        "times the memory or more."
        f"{' Every result was checked before it was timed.' if checked else ''} ", origin(row.source for row in rows)])
    return figure(*roofline_and_times(rows, prefix), caption, title)


def gemm_table(rows, title):
    def order(row):
        return (row.m, row.is_peer, mode_order(row.mode), row.name)

    cells = [[row.name, row.mode, row.m, measured(row.us),
              measured(row.us_min), measured(row.us_max), measured(row.tops), measured(row.gb_per_s),
              percent(row.roofline_share), times(row.speedup)] for row in sorted(rows, key=order)]
    return table(["kernel", "mode", "M", "µs", "min", "max", "TOPS", "GB/s", "of read bandwidth",
                  "over dequantize + best matmul"], cells, title, numeric=range(2, 10))


def tables(rows, shape):
    """Ours and the best peers in view, everything on request."""
    title = shape_text(shape)
    best = [row for _, series in series_of(rows) for row in series]
    ours = [row for row in rows if not row.is_peer]
    shown = ours + [row for row in best if row.is_peer]
    parts = [gemm_table(shown, f"{title}: kernels and the best peers")]
    if len(shown) < len(rows):
        parts.append(details(f"All {len(rows)} measurements", gemm_table(rows, title)))
    return parts


def gemm_section(runs):
    if not runs.gemm:
        return section("kernels", "Kernels",
                       missing("No run of bench gemm was given.", MAKE_GEMM))
    body = []
    for device in unique(row.source.device for row in runs.gemm):
        here = [row for row in runs.gemm if row.source.device == device]
        for i, shape in enumerate(shapes(here)):
            rows = [row for row in here if shape_of(row) == shape]
            title = shape_text(shape)
            if i < MAX_FIGURES:
                body.append(gemm_figure(rows, f"g{len(body)}"))
                body += tables(rows, shape)
            else:
                body.append(details(title, gemm_table(rows, title)))
    return section("kernels", "Kernels", *body)
