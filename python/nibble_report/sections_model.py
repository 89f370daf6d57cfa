"""Accuracy against speed of whole models: perplexity and bench model, joined by mode."""

from .figures_model import accuracy_against_speed, accuracy_dots, measures_of, speed_dots
from .markup import figure, join, table, tag
from .sections import missing, origin, section
from .summary import pairs, reference_speed, speed_groups, text_groups
from .text import NONE, THIN, fixed, measured, megabytes, number, percent, plus_minus, times

MAX_FIGURES = 6
MAKE_PERPLEXITY = "nibble perplexity DIR -f TEXT --mode w4a16,w4a8,w4a4 --reference FP16_DIR --json > perplexity.json"
MAKE_SPEED = "nibble bench model DIR --mode w4a16,w4a8,w4a4 --output json > bench_model.json"


def against(group):
    return f", against {group.reference}" if group.reference else ""


def repeated(group):
    if not group.repeated:
        return None
    return tag("p", f"Measured more than once, the last file counts: {', '.join(group.repeated)}.",
               class_="quiet")


def joined_figure(text, speed, reference, prefix):
    pictures = accuracy_against_speed(text, speed, reference, prefix)
    if pictures is None:
        return tag("p", f"No mode has both a perplexity ({text.title()}) and a speed "
                        f"({speed.title()}).", class_="quiet")
    title = f"Accuracy against speed, {text.title()}{against(text)}"
    bars = "Bars: one standard error of accuracy, one standard deviation of speed. "
    caption = join([tag("strong", title), ". Up is closer to the reference, right is faster. ",
                    bars, origin(text.sources() + speed.sources() +
                          (reference.sources() if reference else []))])
    return figure(*pictures, caption, title)


def accuracy_figure(group, prefix):
    what = " and ".join(label for _, _, label in measures_of(group))
    title = f"{what[0].upper()}{what[1:]} of each mode, {group.title()}{against(group)}"
    caption = join([tag("strong", title), ". Left is better. Bars: one standard error. ",
                    origin(group.sources())])
    pictures = accuracy_dots(group, prefix)
    return figure(*pictures, caption, title) if pictures else None


def speed_figure(group, prefix):
    title = f"Speed of each mode, {group.title()}"
    caption = join([tag("strong", title), ". Right is better. Bars: one standard deviation. ",
                    origin(group.sources())])
    return figure(*speed_dots(group, prefix), caption, title)


def accuracy_table(group):
    def shown(row, key, error, digits):
        return plus_minus(row.get(key), row.get(error), digits)

    columns = [
        ("tokens", lambda r: NONE if r.tokens is None else number(r.tokens)),
        ("PPL", lambda r: shown(r, "ppl", "ppl_err", 3)),
        ("PPL ratio", lambda r: shown(r, "ppl_ratio", "ppl_ratio_err", 4)),
        ("mean KLD", lambda r: measured(r.get("kld_mean"))
         + (f"{THIN}±{THIN}{measured(r.get('kld_err'), 2)}" if r.get("kld_err") is not None else "")),
        ("median KLD", lambda r: measured(r.get("kld_median"))),
        ("99 % KLD", lambda r: measured(r.get("kld_p99"))),
        ("same top token, %", lambda r: shown(r, "same_top", "same_top_err", 2)),
        ("RMS Δp, %", lambda r: fixed(r.get("rms_dp"), 2)),
    ]
    rows = [[mode] + [show(row) for _, show in columns] for mode, row in group.rows.items()]
    used = [i for i in range(len(columns)) if any(row[i + 1] != NONE for row in rows)]
    return table(["mode"] + [columns[i][0] for i in used],
                 [[row[0]] + [row[i + 1] for i in used] for row in rows],
                 f"Accuracy, {group.title()}{against(group)}", numeric=range(1, len(used) + 1))


def speed_table(group):
    rows, limits = [], any(row.byte_limit_share for tests in group.rows.values()
                           for row in tests.values())
    for mode, tests in group.rows.items():
        for test in group.tests():
            row = tests.get(test)
            if row is not None:
                cells = [mode, test, plus_minus(row.avg, row.stddev, 1),
                         times(group.ratio(mode, test)), megabytes(row.peak_bytes)]
                cells += [percent(row.byte_limit_share)] if limits else []
                rows.append(cells + [", ".join(row.kernels) or NONE])
    head = ["mode", "test", "tokens/s", "over w4a16", "peak memory"]
    head += ["of the memory's limit"] if limits else []
    return table(head + ["kernels that ran"], rows, f"Speed, {group.title()}",
                 numeric=range(2, len(head)))


def model_section(runs):
    texts, speeds = text_groups(runs.perplexity), speed_groups(runs.speed)
    # texts of a run that has them pooled as well are in the tables alone
    drawn = [text for text in texts if not any(text.is_part_of(other) for other in texts)]
    joined = pairs(drawn, speeds)
    body = []
    for i, (text, speed) in enumerate(joined[:MAX_FIGURES]):
        body.append(joined_figure(text, speed, reference_speed(text, speeds), f"m{i}"))
    if len(joined) > MAX_FIGURES:
        body.append(tag("p", f"{len(joined) - MAX_FIGURES} more pairs of text and machine are in "
                             "the tables alone.", class_="quiet"))
    for i, text in enumerate(drawn[:MAX_FIGURES]):
        if not any(pair[0] is text for pair in joined) and len(text.rows) > 1:
            body.append(accuracy_figure(text, f"p{i}"))
    for i, speed in enumerate(speeds[:MAX_FIGURES]):
        # one dot alone is no figure: the table has it
        if not any(pair[1] is speed for pair in joined) and len(speed.rows) > 1:
            body.append(speed_figure(speed, f"t{i}"))
    for group in texts:
        body += [accuracy_table(group), repeated(group)]
    for group in speeds:
        body += [speed_table(group), repeated(group)]
    if not texts:
        body.append(missing("No run of perplexity was given.", MAKE_PERPLEXITY))
    if not speeds:
        body.append(missing("No run of bench model was given.", MAKE_SPEED))
    return section("model", "Accuracy against speed", *[part for part in body if part is not None])
