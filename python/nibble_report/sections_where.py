"""What ran where: receipts of kernels, the machine, and how to run each file's command again."""

from collections import Counter

from .markup import join, table, tag
from .runs import mode_order
from .sections import command_of, missing, section
from .summary import short_name, unique
from .text import NONE, number, plural


def receipt_rows(runs):
    """(run, mode, kernel, activation scales, where)"""
    rows = []
    for run in runs.verify:
        counts = Counter((check.mode, check.kernel, check.activation)
                         for layer in run.layers for check in layer.modes.values())
        for key in sorted(counts, key=lambda k: (mode_order(k[0]), k[1:])):
            rows.append([f"verify ({run.source.file})", *key, plural(counts[key], "layer")])
    texts = {}
    for row in runs.perplexity:
        key = (row.source.file, row.mode, ", ".join(row.kernels))
        texts.setdefault(key, []).append(short_name(row.text) or "one text")
    rows += [[f"perplexity ({file})", mode, kernels, NONE, ", ".join(unique(names))]
             for (file, mode, kernels), names in texts.items() if kernels]
    tests = {}
    for row in runs.speed:
        key = (row.source.file, row.mode, ", ".join(row.kernels))
        tests.setdefault(key, []).append(row.test)
    rows += [[f"bench model ({file})", mode, kernels, NONE, ", ".join(unique(names))]
             for (file, mode, kernels), names in tests.items() if kernels]
    products = {}
    for row in runs.gemm:
        if not row.is_peer:
            products.setdefault((row.source.file, row.mode, row.name), set()).add(row.m)
    for key in sorted(products, key=lambda k: (k[0], mode_order(k[1]), k[2])):
        rows.append([f"bench gemm ({key[0]})", *key[1:], NONE,
                     "M = " + ", ".join(map(str, sorted(products[key])))])
    return rows


def receipts(runs):
    rows = receipt_rows(runs)
    if not rows:
        return None
    return table(["run", "mode", "kernel that ran", "activation scales", "where"], rows,
                 "Receipts: the kernels that were executed, as the runs recorded them")


def clock_text(source):
    if not source.cpu_mhz:
        return NONE
    text = f"{number(source.cpu_mhz, 4)} MHz"
    return text + (f" of {number(source.cpu_max_mhz, 4)}" if source.cpu_max_mhz else "")


def machine_key(source):
    return (source.device, source.driver, source.system)


def machines_of(sources):
    """Numbered from 1. JSON lines leave out the system: they join a machine that matches."""
    full = unique(machine_key(s) for s in sources if s.device and s.system)
    rest = unique(machine_key(s) for s in sources
                  if s.device and not s.system and not any(s.device == f[0] for f in full))
    return full + rest


def machine_number(source, machines):
    matches = [i for i, m in enumerate(machines, 1)
               if m == machine_key(source) or (not source.system and m[0] == source.device)]
    return matches[0] if matches else NONE


def machine_table(machines):
    rows = [[i, device, driver or "none", system or NONE]
            for i, (device, driver, system) in enumerate(machines, 1)]
    return table(["machine", "device, features in use, CPUs", "GPU driver", "system"], rows,
                 "Machines") if rows else None


def run_table(sources, machines):
    rows = [[source.file, command_of(source), machine_number(source, machines),
             source.threads or NONE, clock_text(source),
             " ".join(part for part in (source.version, source.commit) if part) or NONE]
            for source in sources]
    return table(["file", "command", "machine", "threads", "clock when asked",
                  "version, commit"], rows, "The files of this report", numeric={2, 3})


def feature_tables(doctor):
    def yes_or_no(there, reason):
        return "yes" if there else f"no: {reason}" if reason else "no"

    features = [[name, yes_or_no(present, reason)] for name, present, reason in doctor.features]
    kernels = [[name, mode or NONE, isa or NONE, yes_or_no(here, reason)]
               for name, mode, isa, here, reason in doctor.kernels]
    cpu = ", ".join(f"{name} {value}" if name != "CPU" else value for name, value in doctor.cpu)
    return join([
        tag("p", cpu) if cpu else "",
        table(["feature", "here"], features, "CPU features in use"),
        table(["kernel", "mode", "instructions", "runs here"], kernels,
              "Kernels in this build"),
    ])


def inspect_list(run):
    facts = tag("ul", *[tag("li", f"{name}: {value}") for name, value in run.facts])
    return join([tag("h3", short_name(run.directory) or run.source.file), facts])


def where_section(runs):
    body = []
    machines = machines_of(runs.sources)
    if len(machines) > 1:
        body.append(tag("p", "These runs are of more than one machine: compare speeds only within "
                             "a file.", class_="notes"))
    body += [inspect_list(run) for run in runs.inspect]
    body += [machine_table(machines), run_table(runs.sources, machines), receipts(runs)]
    body += [feature_tables(doctor) for doctor in runs.doctor]
    if not runs.doctor:
        body.append(missing("Details of the CPU and its kernels were not given.",
                            "nibble doctor --json > doctor.json"))
    return section("where", "What ran where", *[part for part in body if part is not None])
