"""Per-layer SNR: one part per run of verify."""

from .figures_snr import plotted_modes, snr_by_block, snr_by_name
from .markup import details, figure, join, table, tag
from .sections import missing, origin, section
from .summary import kinds_of, short_name, snr_by_kind, snr_by_mode
from .verdict import verified_name
from .text import NONE, fixed, number, plural, times

MEASURES = {
    "snr_fp16": "against FP16",
    "snr_w4a16": "against W4A16: what quantizing the activations alone costs",
}
MAX_LINES = 40
MAX_ROWS = 2000  # layers in the full table; 4 bits per weight of the largest models have fewer


def model_of(run):
    return short_name(run.directory) or "synthetic layers"


def reference_of(run):
    if run.reference:
        return f"FP16 is the original model {short_name(run.reference)}"
    return "FP16 is the dequantized 4-bit weights in fp16, so the loss of the 4 bits is not in it"


def setting(run):
    rows = f"{run.rows} rows of {run.input} random input" if run.rows and run.input else None
    return "; ".join(part for part in (reference_of(run), rows) if part)


def measures_of(run):
    """Without the original model, both say the same of quantized activations."""
    keys = ["snr_fp16", "snr_w4a16"] if run.reference else ["snr_fp16"]
    return [key for key in keys if plotted_modes(run, key)]


def snr_figures(run, prefix):
    parts = []
    for i, key in enumerate(measures_of(run)):
        title = f"SNR of every layer, {model_of(run)}, {MEASURES[key]}"
        by_block = snr_by_block(run, key, f"{prefix}b{i}")
        if by_block:
            caption = join([
                tag("strong", title), ". Higher is better; 6 dB is one bit. One panel per linear "
                "type; where a decoder layer has several of a type, the worst is drawn. "
                f"{setting(run)}. ", origin([run.source])])
            parts.append(figure(*by_block, caption, title))
        by_name = snr_by_name(run, key, f"{prefix}n{i}")
        if by_name:
            pictures, left_out = by_name
            more = f" The worst are shown; {left_out} more are in the table." if left_out else ""
            outside = (title if by_block is None else
                       f"{title}: those outside of the decoder layers")
            caption = join([tag("strong", outside),
                            f". Higher is better; 6 dB is one bit.{more} {setting(run)}. ",
                            origin([run.source])])
            parts.append(figure(*pictures, caption, outside))
    return parts


def mode_rows(run):
    """One line per mode: the worst layer by name, and what ran."""
    by_mode = snr_by_mode(run)
    timed = any(row.speedup for row in by_mode.values())
    rows = []
    for mode, row in by_mode.items():
        cells = [mode, row.layers, row.failed, fixed(row.worst_fp16), fixed(row.median_fp16),
                 fixed(row.worst_w4a16), fixed(row.median_w4a16), row.worst_layer or NONE,
                 ", ".join(row.activations), ", ".join(row.kernels)]
        rows.append(cells + ([times(row.speedup)] if timed else []))
    head = ["mode", "layers", "failed", "vs FP16 worst", "median", "vs W4A16 worst", "median",
            "worst layer vs FP16", "activation scales", "kernels that ran"]
    note = ("; median speed-up over dequantize + the best matmul, from a few rounds per layer: "
            "indicative")
    return table(head + (["speed-up"] if timed else []), rows,
                 "SNR in dB by mode" + (note if timed else ""), numeric={1, 2, 3, 4, 5, 6, 10})


def kind_table(run):
    """Linear types down, modes across: worst / median."""
    found = {(row.kind, row.mode): row for row in snr_by_kind(run)}
    measures = [("worst_fp16", "median_fp16", "vs FP16")]
    if run.reference:
        measures.append(("worst_w4a16", "median_w4a16", "vs W4A16"))
    columns = [(mode, measure) for measure in measures for mode in run.modes()
               if any(getattr(row, measure[0]) is not None
                      for (_, m), row in found.items() if m == mode)]
    rows = []
    for kind in kinds_of(run):
        cells = [kind, sum(layer.kind == kind for layer in run.layers)]
        for mode, (worst, median, _) in columns:
            row = found.get((kind, mode))
            cells.append(f"{fixed(getattr(row, worst))} / {fixed(getattr(row, median))}"
                         if row else NONE)
        rows.append(cells)
    head = ["linear", "layers"] + [f"{mode} {title}" for mode, (_, _, title) in columns]
    return table(head, rows, "SNR in dB by linear type: worst / median",
                 numeric=range(1, len(head)))


def layer_table(run):
    rows, classes = [], []
    for layer in run.layers[:MAX_ROWS]:
        for mode in run.modes():
            check = layer.modes.get(mode)
            if check is None:
                continue
            rows.append([layer.name, layer.k, layer.n, layer.group_size, mode, check.kernel,
                         check.activation, fixed(check.snr_fp16), fixed(check.snr_w4a16),
                         fixed(check.snr_exact), number(check.rel_err, 2),
                         "–" if check.cosine is None else f"{check.cosine:.6f}",
                         fixed(check.us), times(check.speedup),
                         "ok" if check.passed else "FAILED"])
            classes.append(None if check.passed else "failed")
    head = ["layer", "K", "N", "group", "mode", "kernel that ran", "activation", "vs FP16",
            "vs W4A16", "vs fp64", "rms err", "cosine", "µs", "speed-up", "check"]
    return table(head, rows, "Every layer and mode; SNR in dB",
                 numeric={1, 2, 3, *range(7, 14)}, row_classes=classes)


def list_of(title, lines, class_):
    if not lines:
        return None
    more = [f"and {len(lines) - MAX_LINES} more"] if len(lines) > MAX_LINES else []
    items = [tag("li", line) for line in lines[:MAX_LINES] + more]
    return tag("div", tag("p", title), tag("ul", *items), class_=class_)


def failures_of(run):
    lines = list(run.failures)
    for layer in run.layers:
        lines += [f"{layer.name}: {text}" for text in layer.failures]
        for check in layer.modes.values():
            lines += [f"{layer.name}, {check.mode}: {text}" for text in check.failures]
    return lines


def notes_of(run):
    return [f"{layer.name}: {note}" for layer in run.layers for note in layer.notes]


def one_run(run, number_):
    shown = len(run.layers[:MAX_ROWS])
    cut = f" (the first {shown})" if shown < len(run.layers) else ""
    return join(part for part in [
        tag("h3", f"{verified_name(run)}: {plural(run.passed, 'check')} passed, "
                  f"{run.failed} failed"),
        list_of("Failed:", failures_of(run), "failed"),
        list_of("Legal but worth knowing:", notes_of(run), "notes"),
        *snr_figures(run, f"s{number_}"),
        mode_rows(run),
        kind_table(run),
        details(f"All {plural(len(run.layers), 'layer')}{cut} in numbers", layer_table(run)),
    ] if part is not None)


def snr_section(runs):
    if not runs.verify:
        body = [missing("No run of verify was given.",
                        "nibble verify DIR --reference FP16_DIR --json > verify.json")]
    else:
        body = [one_run(run, i) for i, run in enumerate(runs.verify)]
    return section("layers", "Accuracy of every layer", *body)
