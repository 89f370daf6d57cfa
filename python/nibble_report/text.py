"""Text from files, made safe to show: names of layers may hold anything. Also numbers as text."""

import unicodedata

MAX_LENGTH = 400
NONE = "\N{EN DASH}"
THIN = "\N{NARROW NO-BREAK SPACE}"


def is_visible(char):
    # control, format (bidirectional overrides!), surrogate, private, no character, separators
    return unicodedata.category(char) not in {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def clean(value):
    """Control, invisible and direction-changing characters as \\u escapes; very long text cut."""
    text = str(value)
    if len(text) > MAX_LENGTH:
        text = text[: MAX_LENGTH - 1] + "…"
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if is_visible(c) else f"\\u{ord(c):04x}" for c in text)


def number(value, digits=3):
    """Significant digits without an exponent where a person would write none."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 10 ** (digits - 1):
        return f"{value:,.0f}".replace(",", THIN)
    if size < 1e-4:
        return f"{value:.{digits - 1}e}"
    text = f"{value:.{digits}g}"
    return text if "e" not in text else f"{value:.{digits + 3}f}"


def measured(value, digits=3):
    """number() with the zeros that were measured: 1.40, for columns."""
    text = number(value, digits)
    if value is None or not 1e-4 <= abs(value) < 10 ** (digits - 1):
        return text
    return f"{value:#.{digits}g}".rstrip(".")


def fixed(value, digits=1):
    return NONE if value is None else f"{value:.{digits}f}"


def times(value):
    return NONE if value is None else f"{measured(value)}\N{MULTIPLICATION SIGN}"


def percent(value, digits=0):
    """Of a share: 0.94 is 94 %."""
    return NONE if value is None else f"{100 * value:.{digits}f}{THIN}%"


def plus_minus(value, error, digits):
    if value is None:
        return NONE
    text = f"{value:.{digits}f}"
    return text if error is None else f"{text}{THIN}±{THIN}{error:.{digits}f}"


def plural(count, noun):
    return f"{count} {noun}{'' if count == 1 else 's'}"


def megabytes(value):
    return NONE if value is None else f"{value / 1e6:,.0f} MB".replace(",", THIN)


def joined(words):
    """"a", "a and b", "a, b and c"."""
    words = list(words)
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
