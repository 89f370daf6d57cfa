"""Which decoder layer and which linear a name like model.layers.3.mlp.up_proj means."""

import re

# ".layers.3." and what other families call it: transformer.h.3., model.blocks.3.
BLOCK = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks)\.(\d{1,5})\.")

KIND_ORDER = ["q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj",
              "gate_up_proj", "down_proj"]
OTHER = "other"


def split_name(name):
    """(3, "up_proj"); the type of mistral.o_proj.symmetric is o_proj, and its layer None."""
    found = BLOCK.search(name)
    parts = name.split(".")
    kind = next((part for part in reversed(parts) if part in KIND_ORDER), parts[-1] or OTHER)
    return (int(found.group(1)) if found else None), kind


def kind_order(kind):
    return (KIND_ORDER.index(kind), "") if kind in KIND_ORDER else (len(KIND_ORDER), kind)
