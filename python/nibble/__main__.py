"""`python -m nibble ARGS`, and the command `nibble` of the wheel: the tool that the wheel ships."""

from __future__ import annotations

import os
import sys
from pathlib import Path

TOOL = Path(__file__).resolve().parent / "_native" / "bin" / "nibble"


def main() -> int:
    tool = Path(os.environ.get("NIBBLE_TOOL") or TOOL)
    if not tool.exists():
        print(f"nibble: error: {tool} does not exist; `pip install .` builds it, or set "
              "NIBBLE_TOOL to one that CMake built", file=sys.stderr)
        return 3
    os.environ.setdefault("NIBBLE_PYTHON", sys.executable)  # of `nibble report`
    os.execv(tool, [str(tool), *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
