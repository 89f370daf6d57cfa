"""matplotlib figures as inline SVG whose colours are the page's CSS variables, so that one drawing
serves light, dark and print.

Colours are drawn as stand-ins (#0101xx, which nothing else uses) and replaced here. Ids get a
prefix, since several figures share one document; points get a title, which browsers show on hover.
"""

import io
import re
import xml.etree.ElementTree as ElementTree

from .markup import Markup

SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"
ElementTree.register_namespace("", SVG)
ElementTree.register_namespace("xlink", XLINK)

STAND_INS = {}  # "#010100" -> "ink"


def colour(name):
    """The stand-in of CSS variable --name."""
    for stand_in, known in STAND_INS.items():
        if known == name:
            return stand_in
    stand_in = f"#0101{len(STAND_INS):02x}"
    STAND_INS[stand_in] = name
    return stand_in


def add_titles(root, titles):
    """titles: gid -> texts of its points, in the order they were plotted."""
    for group in root.iter(f"{{{SVG}}}g"):
        texts = titles.get(group.get("id"))
        if not texts:
            continue
        points = [use for use in group.iter(f"{{{SVG}}}use")]
        if len(points) != len(texts):  # one was left out: better no titles than wrong ones
            continue
        for use, text in zip(points, texts):
            ElementTree.SubElement(use, f"{{{SVG}}}title").text = text


def prefix_ids(root, prefix):
    for element in root.iter():
        for key in ("id", "clip-path", f"{{{XLINK}}}href", "href"):
            value = element.get(key)
            if value is None:
                continue
            if key == "id":
                element.set(key, prefix + value)
            else:
                element.set(key, re.sub(r"#(?=[\w-])", f"#{prefix}", value, count=1))


def drop(root, name):
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rsplit("}", 1)[-1] == name:
                parent.remove(child)


def inline_svg(figure, prefix, titles):
    """The figure as an <svg> to put into a page. `prefix` is unique in that page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True,
                   metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    root = ElementTree.fromstring(buffer.getvalue())
    drop(root, "metadata")
    drop(root, "style")  # "*{...}" would hold for the page; style.css has it
    add_titles(root, titles)
    prefix_ids(root, prefix)
    width = root.get("viewBox").split()[2]
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("style", f"max-width: {float(width):.0f}px")
    text = ElementTree.tostring(root, encoding="unicode")
    for stand_in, name in STAND_INS.items():
        text = text.replace(stand_in, f"var(--{name})")
    return Markup(re.sub(r"\n\s*", "\n", text))
