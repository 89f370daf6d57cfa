"""Files to JSON values: one value, or JSON lines. Strict, since nothing is known of the file yet.

Not here: what the values mean (recognize.py).
"""

import json
import math

from .errors import BadFile
from .text import clean

# The largest runs are a few MB; this only keeps a wrong path from filling the memory.
MAX_BYTES = 64 << 20


def read_bytes(path):
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise BadFile(f"{clean(path)}: cannot be read: {reason}") from None
    if len(data) > MAX_BYTES:
        raise BadFile(f"{clean(path)}: over {MAX_BYTES >> 20} MiB, so no output of nibble")
    return data


def finite_float(text):
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is out of range")
    return value


def refuse_constant(text):
    raise ValueError(f"{text} is not JSON")


def parse(text):
    return json.loads(text, parse_float=finite_float, parse_constant=refuse_constant)


def parse_lines(name, text):
    values = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            values.append(parse(line))
        except ValueError as error:
            raise BadFile(f"{name}: line {number} is not JSON: {error}") from None
    return values


def is_json(line):
    try:
        parse(line)
        return True
    except ValueError:
        return False


def read_json(path):
    """The value of a JSON file; of JSON lines, the list of their values."""
    name = clean(path)
    data = read_bytes(path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadFile(f"{name}: not JSON: byte {error.start} is not UTF-8") from None
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        raise BadFile(f"{name}: is empty")
    try:
        if len(lines) > 1 and is_json(lines[0]):
            return parse_lines(name, text)
        return parse(text)
    except RecursionError:
        raise BadFile(f"{name}: not JSON of nibble: nested too deeply") from None
    except ValueError as error:
        raise BadFile(f"{name}: not JSON: {error}") from None
