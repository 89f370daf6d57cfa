"""Checked access to JSON objects of unknown origin: the right type, or an error that says where."""

from .errors import BadFile
from .text import clean

SCHEMA_VERSION = 1
LARGEST = 1e30  # nothing that nibble measures is near; keeps figures and sums finite


def type_name(value):
    names = {bool: "true or false", int: "a number", float: "a number", str: "a string",
             list: "an array", dict: "an object", type(None): "null"}
    return names[type(value)]


class Fields:
    """A JSON object and where it is: `file: layers[3].modes.w4a8`."""

    def __init__(self, value, file, where=""):
        self.file, self.where = file, where
        if not isinstance(value, dict):
            self.refuse("", "an object", value)
        self.value = value

    def place(self, key):
        key = clean(key)
        return f"{self.where}.{key}" if self.where and key else self.where + key

    def refuse(self, key, expected, found):
        place = self.place(key) or "the document"
        raise BadFile(f"{self.file}: {place}: expected {expected}, found {type_name(found)}")

    def has(self, key):
        return self.value.get(key) is not None

    def text(self, key, required=False):
        found = self.value.get(key)
        if found is None and not required:
            return None
        if not isinstance(found, str):
            self.refuse(key, "a string", found)
        return clean(found) if found else None

    def number(self, key, required=False, least=-LARGEST):
        found = self.value.get(key)
        if found is None and not required:
            return None
        if isinstance(found, bool) or not isinstance(found, (int, float)):
            self.refuse(key, "a number", found)
        if not least <= found <= LARGEST:
            raise BadFile(f"{self.file}: {self.place(key)}: the number is out of range")
        return float(found)

    def count(self, key, required=False, least=-1):
        found = self.value.get(key)
        if found is None and not required:
            return None
        if isinstance(found, bool) or not isinstance(found, int):
            self.refuse(key, "an integer", found)
        if not least <= found < 1 << 60:
            raise BadFile(f"{self.file}: {self.place(key)}: the integer is out of range")
        return found

    def flag(self, key, default=None):
        found = self.value.get(key)
        if found is None:
            return default
        if not isinstance(found, bool):
            self.refuse(key, "true or false", found)
        return found

    def array(self, key):
        found = self.value.get(key)
        if found is None:
            return []
        if not isinstance(found, list):
            self.refuse(key, "an array", found)
        return found

    def texts(self, key):
        found = self.array(key)
        for i, item in enumerate(found):
            if not isinstance(item, str):
                self.refuse(f"{key}[{i}]", "a string", item)
        return [clean(item) for item in found]

    def numbers(self, key):
        found = self.array(key)
        rows = Fields({str(i): item for i, item in enumerate(found)}, self.file, self.place(key))
        return [rows.number(str(i), required=True) for i in range(len(found))]

    def object(self, key):
        return Fields(self.value.get(key), self.file, self.place(key))

    def objects(self, key):
        return [Fields(item, self.file, f"{self.place(key)}[{i}]")
                for i, item in enumerate(self.array(key))]

    def check_schema(self, required):
        found = self.value.get("schema_version")
        if found is None and not required:
            return
        if isinstance(found, bool) or found != SCHEMA_VERSION:
            shown = "none" if found is None else clean(found)
            raise BadFile(f"{self.file}: {self.place('schema_version')} is {shown}; this report "
                          f"reads {SCHEMA_VERSION}")
