"""python -m nibble_report RUN.json... -o report.html; `nibble report` starts this."""

import argparse
import os
import sys
import tempfile

from .errors import EXIT_BAD_FILE, EXIT_INTERRUPTED, EXIT_OK, EXIT_UNSUPPORTED, EXIT_USAGE, BadFile
from .recognize import read_files


def fail(message, code):
    try:
        print(f"nibble: error: {message}", file=sys.stderr)
    except OSError:
        pass  # stderr is closed; the exit code still tells
    return code


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(
        prog="nibble report",
        description="One self-contained HTML page from the JSON of verify, perplexity, bench, "
                    "plan, doctor and inspect, and the config.json of planned models.")
    parser.add_argument("runs", nargs="+", metavar="RUN.json")
    parser.add_argument("-o", "--output", default="report.html", metavar="FILE")
    parser.add_argument("--title", help="title of the page instead of the models' names")
    return parser.parse_args(arguments)


def same_file(one, other):
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def write_whole(path, text):
    """The file is replaced at once or not at all; what is no regular file is written to."""
    data = text.encode("utf-8")
    if os.path.exists(path) and not os.path.isfile(path):
        with open(path, "wb") as file:
            file.write(data)
        return
    folder = os.path.dirname(os.path.abspath(path))
    handle, partial = tempfile.mkstemp(prefix=".report-", suffix=".partial", dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            mask = os.umask(0)
            os.umask(mask)
            os.fchmod(file.fileno(), 0o666 & ~mask)  # as open() would have made it
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def explain_missing_package(error):
    here = os.path.dirname(os.path.abspath(__file__))
    requirements = os.path.normpath(os.path.join(here, "..", "requirements-report.txt"))
    text = (f"the report needs the Python package {error.name}, which {sys.executable} does not "
            f"have. Install it:\n")
    if sys.prefix != sys.base_prefix:  # a virtual environment already
        return text + f"  {sys.executable} -m pip install -r {requirements}"
    return text + (f"  python3 -m venv ~/.nibble-venv\n"
                   f"  ~/.nibble-venv/bin/pip install -r {requirements}\n"
                   f"  export NIBBLE_PYTHON=~/.nibble-venv/bin/python")


def run(arguments):
    options = parse_arguments(arguments)
    if any(same_file(path, options.output) for path in options.runs):
        return fail(f"{options.output} is one of the inputs", EXIT_USAGE)
    runs = read_files(options.runs)  # before the packages are needed: bad files are told first
    try:
        import matplotlib  # noqa: F401
        import numpy  # noqa: F401
    except ImportError as error:
        return fail(explain_missing_package(error), EXIT_UNSUPPORTED)
    from .page import make_page

    page = make_page(runs, options.title)
    try:
        write_whole(options.output, page)
    except OSError as error:
        return fail(f"{options.output}: cannot be written: {error.strerror}", EXIT_BAD_FILE)
    print(f"{options.output}: {len(page.encode('utf-8')) / 1e6:.1f} MB", file=sys.stderr)
    return EXIT_OK


def main(arguments=None):
    try:
        return run(arguments)
    except BadFile as error:
        return fail(error, EXIT_BAD_FILE)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
