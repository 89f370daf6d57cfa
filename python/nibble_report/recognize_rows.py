"""Single results of perplexity, bench model and bench gemm: the objects of {"results": [...]} and
of JSON lines.
"""

from .fields import LARGEST
from .runs import Gemm, Perplexity, Speed
from .text import clean

PERPLEXITY_NUMBERS = ("ppl", "ppl_err", "reference_ppl", "reference_ppl_err", "ppl_ratio",
                      "ppl_ratio_err", "kld_mean", "kld_err", "kld_median", "kld_p90", "kld_p95",
                      "kld_p99", "kld_p999", "kld_max", "same_top", "same_top_err", "mean_dp",
                      "rms_dp")
TINY = 1e-30  # positive, for axes that are logarithmic


def kind_of(value):
    """Which command wrote this object; None if none did."""
    if not isinstance(value, dict) or "mode" not in value:
        return None
    if "ppl" in value:
        return "perplexity"
    if "test" in value and "avg_ts" in value:
        return "bench model"
    if "us_median" in value and "m" in value and ("kernel" in value or "peer" in value):
        return "bench gemm"
    return None


def first_text(fields, *keys):
    """Commands name the same thing differently; the first that is there and a string."""
    for key in keys:
        if isinstance(fields.value.get(key), str) and fields.value[key]:
            return fields.text(key)
    return None


def mode_with_scales(fields):
    """"w4a8", or "w4a8 token" where the activation scales are not the usual mix."""
    mode = fields.text("mode", required=True) or "unnamed"
    scales = fields.text("act")
    plain = scales in (None, "mix") or mode not in ("w4a8", "w4a4")
    return mode if plain else f"{mode} {scales}"


def setting_of(fields, keys):
    """"context 512, KV bf16, head 16": only runs that agree in it are compared."""
    found = [(name, fields.value.get(key)) for key, name in keys]
    return ", ".join(f"{name} {clean(value)}" for name, value in found
                     if isinstance(value, (str, int))) or None


def kernel_names(value):
    """"kernels" as one name or a list of names, each once."""
    names = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return list(dict.fromkeys(clean(name) for name in names if isinstance(name, str)))


def lowest(key):
    """KLD may be below 0 by rounding; an error may not, and a perplexity is positive."""
    if key.endswith("_err"):
        return 0
    return TINY if key in ("ppl", "reference_ppl", "ppl_ratio") else -LARGEST


def read_perplexity(fields, source, runs):
    values = {key: fields.number(key, least=lowest(key)) for key in PERPLEXITY_NUMBERS}
    runs.perplexity.append(Perplexity(
        source=source,
        mode=mode_with_scales(fields),
        model=first_text(fields, "directory", "model"),
        text=fields.text("text"),
        pooled=fields.flag("pooled", False),
        reference=fields.text("reference"),
        setting=setting_of(fields, [("context", "context"), ("kv", "KV"), ("head", "head")]),
        tokens=fields.count("tokens"),
        kernels=kernel_names(fields.value.get("kernels")),
        values=values,
    ))


def read_speed(fields, source, runs):
    runs.speed.append(Speed(
        source=source,
        test=fields.text("test", required=True) or "unnamed",
        mode=mode_with_scales(fields),
        avg=fields.number("avg_ts", required=True, least=0),
        stddev=fields.number("stddev_ts", least=0),
        model=first_text(fields, "directory", "model", "model_filename"),
        batch=fields.count("batch"),
        threads=fields.count("threads"),
        kernels=kernel_names(fields.value.get("kernels")),
        peak_bytes=fields.number("peak_mem_bytes"),
        setting=setting_of(fields, [("type_k", "KV"), ("head", "head")]),
        byte_limit_share=fields.number("byte_limit_share"),
    ))


def read_gemm(fields, source, runs):
    samples = fields.numbers("samples_us")
    peer = fields.text("peer")
    runs.gemm.append(Gemm(
        source=source,
        name=peer or fields.text("kernel", required=True) or "unnamed",
        is_peer=peer is not None,
        mode=fields.text("mode", required=True) or "unnamed",
        m=fields.count("m", required=True, least=1),
        n=fields.count("n", required=True, least=1),
        k=fields.count("k", required=True, least=1),
        group_size=fields.count("group_size"),
        us=fields.number("us_median", required=True, least=TINY),
        us_min=fields.number("us_min"),
        us_max=max(samples) if samples else None,
        tops=fields.number("tops", least=0),
        gb_per_s=fields.number("gb_per_s", least=0),
        roofline_share=fields.number("roofline_share"),
        read_gb_per_s=fields.number("read_gb_per_s", least=0),
        speedup=fields.number("speedup_vs_dequant_matmul"),
        checked=fields.flag("checked"),
    ))


READERS = {"perplexity": read_perplexity, "bench model": read_speed, "bench gemm": read_gemm}


def read_row(kind, fields, source, runs):
    READERS[kind](fields, source, runs)
