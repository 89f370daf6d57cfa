"""The short verdict on top: sentences with numbers, from whatever was given. Nothing is judged that
was not measured, and a difference within its error is called that.
"""

from .runs import mode_order
from .summary import (BASE_MODE, best_speedups, pairs, plan_counts, plan_name, short_name, snr_by_mode, speed_groups,
                      test_words, text_groups)
from .text import NONE, fixed, joined, measured, number, percent, plural, plus_minus, times

SIGNIFICANT = 2  # standard errors


def verified_name(run):
    name = short_name(run.directory) or "synthetic layers"
    return f"{name} against {short_name(run.reference)}" if run.reference else name


def checks_sentence(run):
    layers = plural(len(run.layers), "layer")
    if run.failed:
        return (f"{verified_name(run)}: {run.failed} of {run.passed + run.failed} checks FAILED "
                f"over {layers}; they are listed below.")
    return f"{verified_name(run)}: all {run.passed} checks passed over {layers}."


def ppl_words(row):
    """What perplexity says of a mode, as the end of a sentence."""
    ratio, error = row.get("ppl_ratio"), row.get("ppl_ratio_err")
    kld = row.get("kld_mean")
    words = []
    if ratio is not None:
        percent_text = plus_minus(100 * (ratio - 1), 100 * error if error is not None else None, 2)
        if error is not None and abs(ratio - 1) <= SIGNIFICANT * error:
            words.append(f"changes perplexity by no more than its error ({percent_text} %)")
        else:
            verb = "costs" if ratio >= 1 else "lowers perplexity, by"
            what = "perplexity" if ratio >= 1 else ""
            words.append(f"{verb} {percent_text} % {what}".strip())
    if kld is not None:
        words.append(f"has a mean KLD of {measured(kld)}")
    if not words and row.get("ppl") is None:
        return "has no finite perplexity"
    if not words:
        words.append(f"has a perplexity of {plus_minus(row.get('ppl'), row.get('ppl_err'), 2)}")
    return " and ".join(words)


def speed_words(group, mode):
    words = []
    for test in group.tests():
        row, ratio = group.get(mode, test), group.ratio(mode, test)
        if row is None:
            continue
        against = f", {times(ratio)} {BASE_MODE}" if ratio is not None and mode != BASE_MODE else ""
        words.append(f"{number(row.avg)} tokens/s {test_words(test) or 'in a test'} "
                     f"({test}{against})")
    return ", ".join(words)


def lead(text, speed):
    """What the sentences about modes have in common."""
    parts = []
    if text:
        tokens = {row.tokens for row in text.rows.values() if row.tokens}
        count = f" ({number(tokens.pop())} tokens)" if len(tokens) == 1 else ""
        parts.append(f"accuracy on {text.text or 'the text'}{count}"
                     + (f" against {text.reference}" if text.reference else ""))
    if speed:
        parts.append("speed" + (f" with {speed.threads} threads" if speed.threads else ""))
    model = (text and text.model) or (speed and speed.model)
    return f"{model or 'The model'}, {joined(parts)}:"


def chosen_groups(runs):
    """The first text and speed that belong together: what the verdict speaks of."""
    texts, speeds = text_groups(runs.perplexity), speed_groups(runs.speed)
    both = pairs(texts, speeds)
    if both:
        return both[0]
    return (texts[0], None) if texts else (None, speeds[0] if speeds else None)


def model_sentences(runs):
    """(lead, [(mode, sentence)]); None if no model was measured."""
    text, speed = chosen_groups(runs)
    if text is None and speed is None:
        return None
    sentences = []
    modes = {*(text.rows if text else {}), *(speed.rows if speed else {})}
    for mode in sorted(modes, key=mode_order):
        parts = [ppl_words(text.rows[mode])] if text and mode in text.rows else []
        fast = speed_words(speed, mode) if speed else ""
        parts += [f"runs at {fast}"] if fast else []
        sentences.append((mode, "; ".join(parts) + "."))
    return lead(text, speed), sentences


def plan_failed(plan):
    return plan.met is False or any(not gate.met for gate in plan.gates)


def plan_sentence(plan):
    gates = ", ".join(f"{gate.title} {plus_minus(gate.value, gate.error, 4)}"
                      for gate in plan.gates)
    text = f"Plan of {plan_name(plan)}: {plan_counts(plan)}"
    if not gates:
        return text + "."
    return f"{text}; gates {'FAILED' if plan_failed(plan) else 'met'}: {gates}."


def gemm_sentence(rows):
    best = best_speedups(rows)
    if not best:
        return None
    shape = next(iter(best))[0]
    parts = [f"{times(row.speedup)} at M={m} ({row.name})" for (s, m), row in best.items()
             if s == shape]
    return (f"Kernels over dequantize + the best BLAS matmul here, N={shape[0]} K={shape[1]}: "
            + ", ".join(parts) + ".")


def mode_table(runs):
    """(head, rows) of one line per mode; only columns that have numbers."""
    columns = {}  # title -> {mode: text}

    def put(title, mode, text):
        columns.setdefault(title, {})[mode] = text

    real = [run for run in runs.verify if run.directory] or runs.verify
    with_reference = [run for run in real if run.reference] or real
    for mode, row in (snr_by_mode(with_reference[0]) if with_reference else {}).items():
        put("SNR vs FP16, dB: worst / median", mode,
            f"{fixed(row.worst_fp16)} / {fixed(row.median_fp16)}")
        if row.worst_w4a16 is not None:
            put("SNR vs W4A16, dB: worst / median", mode,
                f"{fixed(row.worst_w4a16)} / {fixed(row.median_w4a16)}")
    text, speed = chosen_groups(runs)
    for mode, row in (text.rows if text else {}).items():
        if row.get("ppl_ratio") is not None:
            put("PPL ratio", mode, plus_minus(row.get("ppl_ratio"), row.get("ppl_ratio_err"), 4))
        else:
            put("PPL", mode, plus_minus(row.get("ppl"), row.get("ppl_err"), 2))
        if row.get("kld_mean") is not None:
            put("mean KLD", mode, measured(row.get("kld_mean")))
    for test in (speed.tests() if speed else []):
        for mode in speed.rows:
            row = speed.get(mode, test)
            if row is not None:
                put(f"{test}, tokens/s", mode, measured(row.avg))
    if not columns:
        return None
    modes = sorted({mode for column in columns.values() for mode in column}, key=mode_order)
    rows = [[mode] + [column.get(mode, NONE) for column in columns.values()] for mode in modes]
    return ["mode", *columns], rows


def share_of_bandwidth(rows):
    ours = [row for row in rows if not row.is_peer and row.roofline_share is not None]
    if not ours:
        return None
    best = max(ours, key=lambda row: row.roofline_share)
    return (f"Closest to the measured read bandwidth: {best.name} at M={best.m}, "
            f"{percent(best.roofline_share)} of {number(best.read_gb_per_s)} GB/s.")
