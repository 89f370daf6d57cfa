"""What can be wrong with what the user gave, and the exit codes of `nibble`."""

EXIT_OK = 0
EXIT_USAGE = 2
EXIT_UNSUPPORTED = 3  # Python or a package is missing
EXIT_BAD_FILE = 4
EXIT_INTERRUPTED = 130


class BadFile(Exception):
    """A file that cannot be used; the message begins with its name."""
