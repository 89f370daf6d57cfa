"""The whole page. It loads nothing and runs nothing: no script, no link, one style sheet inside."""

import datetime
import os
from pathlib import Path

from .figure_style import prepare
from .markup import Markup, join, tag
from .sections_gemm import gemm_section
from .sections_model import model_section
from .sections_plan import plan_section
from .sections_snr import snr_section
from .sections_verdict import verdict_section
from .sections_where import where_section
from .summary import short_name, unique
from .text import plural

# Even if text from a file got through unescaped, a browser would run and load nothing.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

CONTENTS = [("verdict", "Verdict"), ("model", "Accuracy against speed"),
            ("layers", "Accuracy of every layer"), ("kernels", "Kernels"),
            ("plan", "Plan per layer"), ("where", "What ran where"), ("terms", "Terms")]

TERMS = [
    ("W4A16, W4A8, W4A4", "4-bit weights with activations of 16, 8 and 4 bits."),
    ("SNR", "Signal-to-noise ratio of a layer's output in dB: 20 dB is an error of 10 %, 40 dB of "
            "1 %, both root mean square. Of single layers on random input: it is no perplexity."),
    ("PPL ratio", "Perplexity over that of the reference on the same tokens; 1 is equal."),
    ("KLD", "Kullback-Leibler divergence from the reference's distribution of the next token, in "
            "nats; 0 is equal."),
    ("pp512, tg128", "Reading a prompt of 512 tokens; generating 128 tokens one by one."),
    ("Of the memory's limit", "Share of the speed at which weights, keys and values are read once "
                              "per token at the read bandwidth measured in the same run."),
    ("TOPS", "10¹² multiplications and additions a second."),
    ("M, N, K", "Rows of activations, output channels, input channels of a product."),
]


def page_title(runs):
    """Models that the runs name."""
    names = [run.directory for run in runs.verify] + [row.model for row in runs.perplexity]
    names += [row.model for row in runs.speed] + [plan.model for plan in runs.plans]
    names = unique(short_name(name) for name in names if name)
    return f"Nibble: {', '.join(names[:3])}" if names else "Nibble report"


def made_when():
    """UTC; SOURCE_DATE_EPOCH makes a page reproducible."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    utc = datetime.timezone.utc
    when = (datetime.datetime.fromtimestamp(int(epoch), utc) if epoch.isdigit()
            else datetime.datetime.now(utc))
    return when.strftime("%Y-%m-%d %H:%M UTC")


def terms_section():
    items = [join([tag("dt", name), tag("dd", text)]) for name, text in TERMS]
    return tag("section", tag("h2", "Terms"), tag("dl", *items), id="terms", aria_label="Terms")


def make_page(runs, title=None):
    prepare()
    title = title or page_title(runs)
    files = plural(len({source.file for source in runs.sources}), "file")
    links = [tag("li", tag("a", text, href=f"#{name}")) for name, text in CONTENTS]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name_="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Markup(Path(__file__).with_name("style.css").read_text("utf-8"))),
    )
    body = tag(
        "body",
        tag("header", tag("h1", title), tag("p", f"Made {made_when()} from {files} by nibble "
                                                 "report.", class_="quiet"),
            tag("nav", tag("ul", *links), aria_label="Contents")),
        tag("main", verdict_section(runs), model_section(runs), snr_section(runs),
            gemm_section(runs), plan_section(runs), where_section(runs), terms_section()),
    )
    return Markup("<!doctype html>\n") + tag("html", head, body, lang="en") + "\n"
