"""The plan: which mode each slot of each decoder layer runs in. The picture is a table."""

from .figure_style import MODE_STYLES
from .markup import join, table, tag
from .runs import base_mode
from .sections import missing, origin, section
from .summary import plan_counts, plan_name, plan_times
from .text import fixed, number, plural, plus_minus

MAKE_PLAN = "nibble plan DIR -f TEXT --mode w4a4 --dry-run --json > plan.json"
SLOT_TITLES = {"qkv": "q, k, v", "o": "o", "gate_up": "gate, up", "down": "down"}


def mode_class(mode):
    base = base_mode(mode)
    return f"mode {MODE_STYLES[base][0]}" if base in MODE_STYLES else "mode"


def cell_markup(cell):
    if cell is None:
        return "not 4-bit"
    words = " ".join(part for part in [
        cell.detail, None if cell.snr_db is None else f"{fixed(cell.snr_db)} dB"] if part)
    return join([tag("span", cell.mode, class_=mode_class(cell.mode)), " ",
                 tag("span", words, class_="quiet")])


def row_key(layer, slots):
    return [layer.get(slot) and (layer[slot].mode, layer[slot].detail, layer[slot].snr_db)
            for slot in slots]


def layer_rows(plan):
    """Neighbours that are alike share a row."""
    rows, first = [], 0
    while first < len(plan.layers):
        last = first
        key = row_key(plan.layers[first], plan.slots)
        while last + 1 < len(plan.layers) and row_key(plan.layers[last + 1], plan.slots) == key:
            last += 1
        label = str(first) if first == last else f"{first}–{last}"
        rows.append([label] + [cell_markup(plan.layers[first].get(slot)) for slot in plan.slots])
        first = last + 1
    return rows


def gate_table(plan):
    if not plan.gates:
        return None
    rows = [[gate.title, f"{'at most' if gate.is_most else 'at least'} {number(gate.limit, 4)}",
             plus_minus(gate.value, gate.error, 4), "met" if gate.met else "FAILED"]
            for gate in plan.gates]
    return table(["gate", "limit", "found", ""], rows, "Gates", numeric={2},
                 row_classes=[None if gate.met else "failed" for gate in plan.gates])


def times_table(plan):
    times = plan_times(plan)
    if not times:
        return None
    rows = [[name, number(decode), fixed(prefill / 1e3)] for name, (decode, prefill) in times]
    return table(["all slots as", "decoding, µs a token", "a prompt of 512 tokens, ms"], rows,
                 "Time of all 4-bit products, as measured by plan", numeric={1, 2})


def one_plan(plan):
    total = sum(len(layer) for layer in plan.layers)
    caption = join([
        tag("strong", f"Plan of {plan_name(plan)}"), f": of {plural(total, 'slot')}, "
        f"{plan_counts(plan)}. Each cell: mode, activation scales"
        f"{', SNR of the output' if plan.source.command else ''}. ", origin([plan.source])])
    head = ["layer"] + [SLOT_TITLES.get(slot, slot) for slot in plan.slots]
    facts = [tag("li", f"{key}: {value}") for key, value in plan.facts]
    parts = [gate_table(plan), times_table(plan), tag("ul", *facts) if facts else None,
             table(head, layer_rows(plan), caption, numeric={0})]
    return join(part for part in parts if part is not None)


def plan_section(runs):
    if not runs.plans:
        body = [missing("No plan was given (what plan --json prints, or the config.json of a model "
                        "with a plan in it).", MAKE_PLAN)]
    else:
        body = [one_plan(plan) for plan in runs.plans]
    return section("plan", "Plan per layer", *body)
