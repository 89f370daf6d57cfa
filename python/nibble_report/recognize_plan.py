"""The plan of a model: what `plan --json` prints, or quantization_config.nibble of a config.json."""

from .errors import BadFile
from .fields import Fields
from .runs import Gate, PlanCell, PlanRun
from .text import NONE, clean, fixed, number

SLOT_ORDER = ["qkv", "o", "gate_up", "down"]
MAX_LAYERS = 4096
GATES = {"ppl_ratio": "PPL ratio", "kld_mean": "mean KLD", "same_top": "same top token, %"}


def config_block(value):
    """quantization_config, of the document or of its text part (as the tool looks for it)."""
    for owner in (value, value.get("text_config"), value.get("llm_config")):
        if isinstance(owner, dict) and isinstance(owner.get("quantization_config"), dict):
            return owner["quantization_config"]
    return None


def has_keys(items, *keys):
    return isinstance(items, list) and bool(items) and all(
        isinstance(item, dict) and all(key in item for key in keys) for item in items)


def holds_plan(value):
    return config_block(value) is not None or has_keys(value.get("slots"), "layer", "slot",
                                                       "chosen")


# ---- what both forms say about the plan as a whole ----------------------------------------------


def read_gates(fields):
    gates = []
    given = fields.object("gates") if fields.has("gates") else None
    for key, title in GATES.items():
        if given is None or not given.has(key):
            continue
        gate = given.object(key)
        most, least = gate.number("max"), gate.number("min")
        value = gate.number("value")
        limit = most if most is not None else least
        if limit is None:
            continue
        met = value is not None and (value <= limit if most is not None else value >= limit)
        gates.append(Gate(title, most is not None, limit, value, gate.number("error"), met))
    return gates


def read_facts(fields):
    """(name, text) of what the plan was made from."""
    def inside(key, inner, read="number"):
        found = fields.object(key) if isinstance(fields.value.get(key), dict) else None
        return getattr(found, read)(inner) if found else None

    def count(key, inner):
        value = inside(key, inner)
        return None if value is None else number(value)

    shares = [(bits, inside("promoted", f"percent_of_work_at_a{bits}")) for bits in (4, 8, 16)]
    work = ", ".join(f"{fixed(share)} % with {bits}-bit activations"
                     for bits, share in shares if share is not None)
    seconds = fields.number("seconds")
    facts = [
        ("asked for", fields.text("mode")),
        ("started as", fields.text("started_as")),
        ("compared with", fields.text("reference")),
        ("multiply-adds", work or None),
        ("text", inside("text", "name", "text")),
        ("tokens scored", count("text", "tokens_scored")),
        ("calibration tokens", count("calibration", "tokens")),
        ("seconds", None if seconds is None else number(seconds)),
    ]
    return [fact for fact in facts if fact[1] is not None] + [
        ("note", note) for note in fields.texts("notes")]


# ---- quantization_config.nibble -----------------------------------------------------------------


def cell_of(fields):
    """In the words of `plan`: "group-asym clip 0.95 (2 of 9 groups int8)"."""
    text = fields.text("granularity") or ""
    if fields.flag("symmetric") is False:
        text += "-asym"
    clip = fields.number("clip")
    if clip is not None and clip != 1:
        text += f" clip {fixed(clip, 2)}"
    if fields.has("wide_groups"):
        wide = fields.object("wide_groups")
        text += f" ({len(wide.array('groups'))} of {wide.count('of') or NONE} groups int8)"
    return PlanCell(fields.text("mode", required=True) or "unnamed", text)


def read_config(fields, source):
    outer = Fields(config_block(fields.value), fields.file, "quantization_config")
    if "nibble" not in outer.value:
        raise BadFile(f"{fields.file}: a model's config.json without a plan "
                      f"(quantization_config.nibble); `nibble plan DIR -f TEXT` writes one")
    block = outer.object("nibble")
    block.check_schema(required=True)
    if not has_keys(block.value.get("layers")):
        block.refuse("layers", "an array of objects with a mode per slot",
                     block.value.get("layers"))
    layers = [{clean(slot): cell_of(layer.object(slot)) for slot in layer.value}
              for layer in block.objects("layers")]
    return PlanRun(source, slots_of(layers), layers, read_gates(block), read_facts(block))


# ---- plan --json --------------------------------------------------------------------------------


def chosen_cell(slot):
    """"chosen" names one of "choices", which were measured."""
    chosen = slot.text("chosen", required=True) or "unnamed"
    mode, _, detail = chosen.partition(" ")
    cell = PlanCell(mode, detail)
    for choice in slot.objects("choices"):
        name, times = choice.text("name"), (choice.number("us_decode"),
                                            choice.number("us_prefill"))
        cell.choices[name] = times
        if name == chosen:
            cell.snr_db, cell.times = choice.number("snr_db"), times
    return cell


def read_run(fields, source):
    fields.check_schema(required=True)
    layers = []
    for slot in fields.objects("slots"):
        index = slot.count("layer", required=True)
        if not 0 <= index < MAX_LAYERS:
            raise BadFile(f"{fields.file}: {slot.place('layer')}: {index} is no layer")
        layers += [{} for _ in range(index + 1 - len(layers))]
        layers[index][slot.text("slot", required=True) or "unnamed"] = chosen_cell(slot)
    return PlanRun(source, slots_of(layers), layers, read_gates(fields), read_facts(fields),
                   met=fields.flag("met"), model=fields.text("model"))


def slots_of(layers):
    slots = list(dict.fromkeys(slot for layer in layers for slot in layer))
    return sorted(slots, key=lambda s: (SLOT_ORDER.index(s) if s in SLOT_ORDER
                                        else len(SLOT_ORDER), s))


def read_plan(fields, source):
    if config_block(fields.value) is not None:
        return read_config(fields, source)
    return read_run(fields, source)
