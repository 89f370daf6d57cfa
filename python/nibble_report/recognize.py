"""JSON values to runs. A file is told by its shape, not by its name; whatever is no output of
nibble is an error that names the file and what was found.

Every document may be one object, a list, JSON lines, or {"results": [...]} under a common head.
"""

from . import recognize_plan, recognize_rows
from .errors import BadFile
from .fields import Fields
from .layer_names import split_name
from .read import read_json
from .runs import Doctor, Inspect, LayerCheck, ModeCheck, Runs, Source, VerifyRun
from .text import clean

HEAD_KEYS = ("command", "device", "driver", "system", "version", "commit")


def read_source(fields, kind):
    """The head of every --json output; the lines of jsonl have little of it."""
    texts = {key: fields.text(key) for key in HEAD_KEYS}
    clocks = fields.object("clocks") if fields.has("clocks") else None
    return Source(
        file=fields.file,
        kind=kind,
        threads=fields.count("threads"),
        cpu_mhz=clocks.number("cpu_mhz") if clocks else None,
        cpu_max_mhz=clocks.number("cpu_max_mhz") if clocks else None,
        **texts,
    )


# ---- verify -------------------------------------------------------------------------------------


def read_mode(name, fields):
    us, speedup = fields.number("us_median"), fields.number("speedup")
    return ModeCheck(
        mode=name,
        kernel=fields.text("kernel") or "unknown",
        activation=fields.text("activation") or "unknown",
        passed=fields.flag("passed", True),
        failures=fields.texts("failures"),
        snr_fp16=fields.number("snr_db_vs_fp16"),
        snr_w4a16=fields.number("snr_db_vs_w4a16"),
        snr_exact=fields.number("snr_db_vs_exact"),
        rel_err=fields.number("rel_err"),
        cosine=fields.number("cosine"),
        us=us or None,  # 0 with --no-timing
        speedup=speedup or None,
        baseline=fields.text("dequant_matmul"),
    )


def read_layer(fields):
    name = fields.text("name", required=True)
    modes = fields.object("modes")
    checks = {clean(mode): read_mode(clean(mode), modes.object(mode)) for mode in modes.value}
    block, kind = split_name(name)
    return LayerCheck(
        name=name,
        k=fields.count("k"),
        n=fields.count("n"),
        group_size=fields.count("group_size"),
        notes=fields.texts("notes"),
        failures=fields.texts("failures"),
        modes=checks,
        block=block,
        kind=kind,
    )


def read_verify(fields, runs):
    run = VerifyRun(
        source=read_source(fields, "verify"),
        passed=fields.count("passed", required=True),
        failed=fields.count("failed", required=True),
        failures=fields.texts("failures"),
        layers=[read_layer(layer) for layer in fields.objects("layers")],
        directory=fields.text("directory"),
        reference=fields.text("reference"),
        rows=fields.count("rows"),
        input=fields.text("input"),
    )
    if not run.layers:
        raise BadFile(f"{fields.file}: a run of verify without layers")
    runs.verify.append(run)
    runs.sources.append(run.source)


# ---- doctor and inspect -------------------------------------------------------------------------


def read_doctor(fields, runs):
    source = read_source(fields, "doctor")
    cpu = fields.object("cpu") if fields.has("cpu") else Fields({}, fields.file)
    facts = [("CPU", cpu.text("brand"))]
    for key, name in (("l1d_bytes", "L1d"), ("l2_bytes", "L2"), ("l3_bytes", "L3")):
        size = cpu.number(key)
        facts.append((name, f"{size / 1024:,.0f} KiB" if size else None))
    runs.doctor.append(Doctor(
        source=source,
        cpu=[(name, value) for name, value in facts if value],
        features=[(row.text("name", True), row.flag("present", False), row.text("reason"))
                  for row in fields.objects("features")],
        kernels=[(row.text("name", True), row.text("mode"), row.text("isa"),
                  row.flag("runs_here", False), row.text("reason"))
                 for row in fields.objects("kernels")],
        picked=[(row.text("mode", True), row.count("m", True), row.text("kernel"))
                for row in fields.objects("picked")],
    ))
    runs.sources.append(source)


def read_inspect(fields, runs):
    source = read_source(fields, "inspect")
    bits, size = fields.number("bits_per_weight"), fields.number("bytes")
    facts = [
        ("architecture", fields.text("architecture")),
        ("format", fields.text("format")),
        ("quantized layers", str(len(fields.array("layers")))),
        ("bits per weight", f"{bits:.3f}" if bits else None),
        ("size", f"{size / 1e6:,.1f} MB" if size else None),
    ]
    runs.inspect.append(Inspect(source, fields.text("directory"), [f for f in facts if f[1]]))
    runs.sources.append(source)


# ---- which is which -----------------------------------------------------------------------------


def is_list_of(value, key):
    return isinstance(value, list) and bool(value) and all(
        isinstance(item, dict) and key in item for item in value)


def read_document(fields, runs):
    """One JSON object. Rows inherit nothing from it here; read_file passes the head on."""
    value = fields.value
    if value.get("tool", "nibble") != "nibble":
        raise BadFile(f"{fields.file}: was written by {clean(value['tool'])}, not by nibble")
    if "passed" in value and "failed" in value and isinstance(value.get("layers"), list):
        fields.check_schema(required=True)
        read_verify(fields, runs)
    elif "features" in value and "kernels" in value and "picked" in value:
        fields.check_schema(required=True)
        read_doctor(fields, runs)
    elif "bits_per_weight" in value and "layers" in value:
        fields.check_schema(required=True)
        read_inspect(fields, runs)
    elif recognize_plan.holds_plan(value):
        source = read_source(fields, "plan")
        runs.plans.append(recognize_plan.read_plan(fields, source))
        runs.sources.append(source)
    elif isinstance(value.get("results"), list):
        fields.check_schema(required=True)
        runs.failed_gates += fields.texts("failed_gates")
        read_rows(pooled_rows(fields) + value["results"], fields, runs)
    elif recognize_rows.kind_of(value) is not None:
        read_rows([value], Fields({}, fields.file), runs)
    else:
        keys = ", ".join(clean(key) for key in list(value)[:8]) or "none"
        raise BadFile(f"{fields.file}: no run of nibble: expected the JSON of verify, perplexity, "
                      f"bench, plan, inspect or doctor, or a config.json with a plan; found the "
                      f"keys {keys}")


def read_rows(rows, head, runs):
    """Lines of bench and perplexity; what the common head says holds for each."""
    if not rows:
        raise BadFile(f"{head.file}: holds no results")
    sources = {}
    for i, row in enumerate(rows):
        where = f"[{i}]" if len(rows) > 1 else ""
        fields = Fields(row, head.file, where)
        fields.check_schema(required=False)
        kind = recognize_rows.kind_of(row)
        if kind is None:
            keys = ", ".join(clean(key) for key in list(row)[:8]) or "none"
            raise BadFile(f"{head.file}: {where or 'the document'}: no result of perplexity or "
                          f"bench; found the keys {keys}")
        merged = Fields({**common(head.value), **row}, head.file, where)
        source = read_source(merged, kind)
        # one entry of "What ran where" for all rows that say the same of themselves
        key = (kind, source.command, source.device, source.threads)
        if key not in sources:
            sources[key] = source
            runs.sources.append(source)
        recognize_rows.read_row(kind, merged, sources[key], runs)


def pooled_rows(fields):
    """What perplexity says of all its texts together; nothing new if there was one text."""
    texts = {row.get("text") for row in fields.value["results"]
             if isinstance(row, dict) and isinstance(row.get("text"), str)}
    rows = [row for row in fields.array("pooled") if isinstance(row, dict)]
    together = {"text": f"all {len(texts)} texts", "pooled": True}
    return [{**row, **together} for row in rows] if len(texts) > 1 else []


def common(head):
    """What holds for each row. Not the figures of the first mode, which stand at the top too."""
    shared = (*HEAD_KEYS, "threads", "clocks", "directory", "context", "kv", "head")
    return {key: head[key] for key in shared if key in head}


def read_file(path, runs):
    value = read_json(path)
    file = clean(path)
    if isinstance(value, dict):
        read_document(Fields(value, file), runs)
        return
    if not isinstance(value, list):
        raise BadFile(f"{file}: no run of nibble: expected an object or an array of objects")
    if not value:
        raise BadFile(f"{file}: holds no results")
    objects = [Fields(item, file, f"[{i}]") for i, item in enumerate(value)]
    if all(recognize_rows.kind_of(item.value) is not None for item in objects):
        read_rows(value, Fields({}, file), runs)
        return
    for item in objects:
        read_document(item, runs)


def read_files(paths):
    runs = Runs()
    for path in paths:
        read_file(path, runs)
    return runs
