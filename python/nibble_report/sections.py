"""What all sections share: where figures come from, and what to run for what is not there."""

from .markup import code, join, tag
from .summary import unique
from .text import number


def command_of(source):
    if source.command:
        return code(source.command)
    if source.kind == "plan":
        return "a plan in a model's config.json"
    return "not recorded: JSON lines carry no command, --output json does"


def run_line(source):
    """One run: its command, file, and what may differ between runs on one machine."""
    parts = [source.file]
    if source.threads:
        parts.append(f"{source.threads} threads")
    if source.cpu_mhz:
        parts.append(f"{number(source.cpu_mhz, 4)} MHz when asked")
    if source.commit:
        parts.append(f"commit {source.commit}")
    label = "Source" if source.kind == "plan" and not source.command else "Command"
    return join([f"{label}: ", command_of(source), f" ({', '.join(parts)})"])


def machine(source):
    if source.device is None:
        return "not recorded"
    return source.device + (f", driver {source.driver}" if source.driver else "")


def origin(sources):
    """For captions: which command, on which machine."""
    sources = unique(sources)
    machines = unique(machine(source) for source in sources)
    lines = []
    for source in sources:
        where = f"; machine: {machine(source)}" if len(machines) > 1 else ""
        lines.append(tag("span", run_line(source), where, class_="line"))
    if len(machines) == 1 and any(source.device for source in sources):
        lines.append(tag("span", f"Machine: {machines[0]}", class_="line"))
    return tag("span", *lines, class_="origin")


def missing(what, *commands):
    """Instead of an empty chart."""
    return tag("div", tag("p", f"{what} To add this, run and pass the file to this report:"),
               tag("pre", "\n".join(commands)), class_="missing", role="note")


def section(name, title, *children):
    return tag("section", tag("h2", title), *children, id=name, aria_label=title)
