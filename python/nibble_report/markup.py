"""HTML that escapes by default: whatever is not Markup is text. No other file writes a "<"."""

import html

VOID = {"meta", "br"}


class Markup(str):
    """Text that is HTML already."""


def escape(value):
    return value if isinstance(value, Markup) else Markup(html.escape(str(value), quote=True))


def join(parts):
    return Markup("".join(escape(part) for part in parts))


def tag(name, *children, **attributes):
    """tag("p", "a < b", class_="note"); children that are None are left out."""
    head = name
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        head += f" {key}" if value is True else f' {key}="{escape(value)}"'
    if name in VOID:
        return Markup(f"<{head}>")
    inside = join(child for child in children if child is not None)
    return Markup(f"<{head}>{inside}</{name}>")


def code(text):
    return tag("code", text)


def table(head, rows, caption=None, numeric=(), row_classes=()):
    """Columns named in `numeric` (by index) are right-aligned; the first cell heads its row. Wide
    tables scroll sideways, by keyboard too, under a caption that stays."""
    numeric = set(numeric)

    def side(index):
        return "num" if index in numeric else None

    heads = [tag("th", text, scope="col", class_=side(i)) for i, text in enumerate(head)]
    body = []
    for number, row in enumerate(rows):
        cells = [tag("th", row[0], scope="row", class_=side(0))]
        cells += [tag("td", cell, class_=side(i)) for i, cell in enumerate(row[1:], 1)]
        extra = row_classes[number] if number < len(row_classes) else None
        body.append(tag("tr", *cells, class_=extra))
    label = "table" if caption is None or isinstance(caption, Markup) else caption
    inner = tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *body), aria_label=label)
    return tag(
        "div",
        tag("p", caption, class_="caption") if caption else None,
        tag("div", inner, class_="scroll", tabindex="0", role="region", aria_label=label),
        class_="table",
    )


def figure(wide, narrow, caption, label):
    """One figure drawn twice: for screens and paper, and for phones."""
    return tag(
        "figure",
        tag("div", wide, class_="wide", role="img", aria_label=label),
        tag("div", narrow, class_="narrow", role="img", aria_label=label),
        tag("figcaption", caption),
    )


def details(summary, *children):
    return tag("details", tag("summary", summary), *children)
