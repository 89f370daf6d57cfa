"""Numbers over runs: what tables, figures and the verdict are made of. No HTML here."""

import re
from collections import Counter
from dataclasses import dataclass, field
from statistics import median

from .layer_names import kind_order
from .runs import mode_order

BASE_MODE = "w4a16"  # what speed-ups and SNR of quantized activations are relative to


def short_name(path):
    """The last part of a directory: models are told apart by it."""
    return path.rstrip("/").rsplit("/", 1)[-1] if path else None


def present(values):
    return [value for value in values if value is not None]


def middle(values):
    values = present(values)
    return median(values) if values else None


def least(values):
    return min(present(values), default=None)


# ---- verify -------------------------------------------------------------------------------------


@dataclass
class SnrRow:
    """One mode over layers of one type, or over all of them."""

    kind: str
    mode: str
    layers: int
    worst_layer: str
    worst_fp16: float
    median_fp16: float
    worst_w4a16: float
    median_w4a16: float
    speedup: float
    kernels: list
    activations: list
    failed: int


def snr_row(kind, mode, layers):
    pairs = [(layer, layer.modes[mode]) for layer in layers if mode in layer.modes]
    if not pairs:
        return None
    checks = [check for _, check in pairs]
    # None is a result equal to the reference, or one without it: never the worst
    named = [(check.snr_fp16, layer.name) for layer, check in pairs if check.snr_fp16 is not None]
    return SnrRow(
        kind=kind,
        mode=mode,
        layers=len(pairs),
        worst_layer=min(named)[1] if named else None,
        worst_fp16=least(c.snr_fp16 for c in checks),
        median_fp16=middle(c.snr_fp16 for c in checks),
        worst_w4a16=least(c.snr_w4a16 for c in checks),
        median_w4a16=middle(c.snr_w4a16 for c in checks),
        speedup=middle(c.speedup for c in checks),
        kernels=sorted({c.kernel for c in checks}),
        activations=sorted({c.activation for c in checks}),
        failed=sum(not c.passed for c in checks),
    )


def kinds_of(run):
    return sorted({layer.kind for layer in run.layers}, key=kind_order)


def snr_by_kind(run):
    rows = [snr_row(kind, mode, [layer for layer in run.layers if layer.kind == kind])
            for kind in kinds_of(run) for mode in run.modes()]
    return [row for row in rows if row is not None]


def snr_by_mode(run):
    return {mode: snr_row("all", mode, run.layers) for mode in run.modes()}


# ---- perplexity and speed of models -------------------------------------------------------------


@dataclass
class TextGroup:
    """Modes of one model on one text against one reference: comparable with each other."""

    model: str
    text: str
    reference: str
    setting: str
    rows: dict = field(default_factory=dict)  # mode -> Perplexity
    repeated: list = field(default_factory=list)  # modes measured more than once: the last counts

    def sources(self):
        return unique(row.source for row in self.rows.values())

    def title(self):
        return ", ".join(present([self.model, self.text, self.setting])) or "one text"

    def is_part_of(self, other):
        """Of a run's texts taken together, which say the same with smaller errors."""
        return (any(row.pooled for row in other.rows.values()) and other is not self and
                all(source in other.sources() for source in self.sources()))


@dataclass
class SpeedGroup:
    """Modes of one model on one machine with one number of threads."""

    model: str
    device: str
    threads: int
    setting: str
    rows: dict = field(default_factory=dict)  # mode -> {test: Speed}
    repeated: list = field(default_factory=list)

    def sources(self):
        return unique(row.source for tests in self.rows.values() for row in tests.values())

    def tests(self):
        return sorted({test for tests in self.rows.values() for test in tests}, key=test_order)

    def title(self):
        threads = f"{self.threads} threads" if self.threads else None
        return ", ".join(present([self.model, threads, self.setting])) or "one machine"

    def get(self, mode, test):
        return self.rows.get(mode, {}).get(test)

    def ratio(self, mode, test):
        """Tokens/s over those of W4A16 in the same group."""
        base, row = self.get(BASE_MODE, test), self.get(mode, test)
        return row.avg / base.avg if base and row and base.avg > 0 else None


def unique(items):
    kept = []
    for item in items:
        if item not in kept:
            kept.append(item)
    return kept


def test_order(test):
    """Prompts (pp) before generation (tg), short before long."""
    parts = re.match(r"(pp|tg)(\d{1,9})(?:@b(\d{1,9}))?$", test)
    if parts is None:
        return (2, 0, 0, test)
    kind, length, batch = parts.groups()
    return ((0 if kind == "pp" else 1), int(batch or 1), int(length), test)


def test_title(test):
    return f"{test}, {test_words(test)}" if test_words(test) else test


def test_words(test):
    words = {"pp": "reading a prompt", "tg": "generating text"}.get(test[:2])
    batch = test.partition("@b")[2]
    return f"{words} for {batch} at once" if words and batch else words


def text_groups(rows):
    groups = {}
    for row in rows:
        key = (short_name(row.model), short_name(row.text), short_name(row.reference),
               row.setting)
        group = groups.setdefault(key, TextGroup(*key))
        if row.mode in group.rows:
            group.repeated.append(row.mode)
        group.rows[row.mode] = row
    return [ordered(group) for group in groups.values()]


def speed_groups(rows):
    groups = {}
    for row in rows:
        key = (short_name(row.model), row.source.device, row.threads, row.setting)
        group = groups.setdefault(key, SpeedGroup(*key))
        tests = group.rows.setdefault(row.mode, {})
        if row.test in tests:
            group.repeated.append(f"{row.mode} {row.test}")
        tests[row.test] = row
    return [ordered(group) for group in groups.values()]


def ordered(group):
    group.rows = dict(sorted(group.rows.items(), key=lambda item: mode_order(item[0])))
    return group


def pairs(texts, speeds):
    """Accuracy and speed of the same model; a run that does not name its model goes with any."""
    return [(text, speed) for text in texts for speed in speeds
            if text.model is None or speed.model is None or text.model == speed.model]


def reference_speed(text, speeds):
    """The group that holds the speed of the 16-bit model which `text` is measured against."""
    if not text.reference:
        return None
    name = text.reference.split(" (")[0]  # "MODEL (16bit)"
    return next((group for group in speeds if group.model == name and "16bit" in group.rows), None)


# ---- bench gemm ---------------------------------------------------------------------------------


def shape_of(row):
    return (row.n, row.k, row.group_size)


def shapes(rows):
    return unique(shape_of(row) for row in rows)


def best_speedups(rows):
    """{(shape, M): the row of ours with the largest speed-up over dequantize + matmul}"""
    best = {}
    for row in rows:
        key = (shape_of(row), row.m)
        if row.is_peer or row.speedup is None:
            continue
        if key not in best or row.speedup > best[key].speedup:
            best[key] = row
    return best


# ---- plans ---------------------------------------------------------------------------------------


def plan_name(plan):
    return short_name(plan.model) or plan.source.file


def cells_of(plan):
    return [cell for layer in plan.layers for cell in layer.values()]


def plan_counts(plan):
    """"79 in w4a8, 39 in w4a4\""""
    counts = Counter(cell.mode for cell in cells_of(plan))
    return ", ".join(f"{counts[mode]} in {mode}" for mode in sorted(counts, key=mode_order))


def plan_times(plan):
    """[(name, (us to decode a token, us of a prompt))]: of every choice that all slots have, and
    of the plan; empty if a time is missing."""
    cells = cells_of(plan)
    if not cells or not all(None not in cell.times for cell in cells):
        return []
    names = [name for name in cells[0].choices
             if all(name in cell.choices and None not in cell.choices[name] for cell in cells)]
    rows = [(name, [cell.choices[name] for cell in cells]) for name in names]
    rows.append(("this plan", [cell.times for cell in cells]))
    return [(name, (sum(t[0] for t in times), sum(t[1] for t in times))) for name, times in rows]
