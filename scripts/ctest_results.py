#!/usr/bin/env python3
"""Print one line per test of a ctest JUnit file: STATUS, SUITE, NAME, REASON, tab-separated."""

import re
import sys
import xml.etree.ElementTree as ET


def skip_reason(output, fallback):
    """What GTEST_SKIP() said, or the last line that speaks of skipping."""
    gtest = re.search(r": Skipped\n(.*?)(?:\n\s*\n|\n\[|\Z)", output, re.S)
    if gtest and gtest.group(1).strip():
        return gtest.group(1)
    lines = [line for line in output.splitlines() if "skip" in line.lower()]
    return lines[-1] if lines else fallback


def skipped_paths(output):
    """(what, why) of "SKIPPED KERNEL name: reason" lines: code that this CPU cannot execute, passed
    over inside tests that ran."""
    return re.findall(r"^SKIPPED (\w+ \S+): (.+)$", output, re.M)


def main():
    if len(sys.argv) != 3:
        sys.exit("usage: ctest_results.py JUNIT.xml SUITE")
    paths = {}
    for case in ET.parse(sys.argv[1]).getroot().iter("testcase"):
        status, reason = case.get("status"), ""
        output = case.findtext("system-out") or ""
        if status == "run":
            word = "passed"
        elif status == "fail":
            word = "failed"
        else:  # "notrun" or "disabled"
            note = case.find("skipped")
            message = (note.get("message") if note is not None else None) or status
            # ctest says "notrun" of a missing executable too; that is a failure
            word = "skipped" if message.startswith("SKIP_") or status == "disabled" else "failed"
            reason = skip_reason(output, message)
        paths.update(skipped_paths(output))
        print(word, sys.argv[2], case.get("name"), " ".join(reason.split()), sep="\t")
    for what, why in sorted(paths.items()):
        print("skipped", sys.argv[2], what, why, sep="\t")


if __name__ == "__main__":
    main()
