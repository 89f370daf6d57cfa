"""The top of the page: what was found, in sentences and in one table."""

from .markup import join, table, tag
from .verdict import (checks_sentence, gemm_sentence, mode_table, model_sentences, plan_failed,
                      plan_sentence, share_of_bandwidth)


def failed_class(run):
    return "failed" if run.failed else None


def missing_kinds(runs):
    kinds = [("per-layer SNR", runs.verify), ("perplexity", runs.perplexity),
             ("speed of the whole model", runs.speed), ("kernel speed", runs.gemm),
             ("a plan", runs.plans)]
    return [name for name, found in kinds if not found]


def verdict_section(runs):
    items = [tag("li", f"A gate FAILED: {text}", class_="failed") for text in runs.failed_gates]
    items += [tag("li", checks_sentence(run), class_=failed_class(run)) for run in runs.verify]
    modes = model_sentences(runs)
    if modes:
        lines = [tag("li", tag("strong", mode), " ", text) for mode, text in modes[1]]
        items.append(tag("li", modes[0], tag("ul", *lines)))
    items += [tag("li", plan_sentence(plan), class_="failed" if plan_failed(plan) else None)
              for plan in runs.plans]
    items += [tag("li", text) for text in (gemm_sentence(runs.gemm), share_of_bandwidth(runs.gemm))
              if text]
    absent = missing_kinds(runs)
    if absent:
        items.append(tag("li", f"Not in these files: {', '.join(absent)}. The sections below say "
                               "which command measures it.", class_="quiet"))
    by_mode = mode_table(runs)
    body = [tag("ul", *items)]
    if by_mode:
        head, rows = by_mode
        body.append(table(head, rows, "Each mode in one line", numeric=range(1, len(head))))
    return tag("section", tag("h2", "Verdict"), join(body), id="verdict", aria_label="Verdict")
