"""python/nibble_report: what it reads, what it refuses, and what must never reach a page.

    python tests/python/test_report.py        pages need python/requirements-report.txt
"""

import contextlib
import html.parser
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "python"
sys.path.insert(0, str(PACKAGE))

from nibble_report import __main__ as program  # noqa: E402
from nibble_report.errors import BadFile  # noqa: E402
from nibble_report.layer_names import split_name  # noqa: E402
from nibble_report.markup import tag  # noqa: E402
from nibble_report.recognize import read_files  # noqa: E402
from nibble_report.summary import (pairs, plan_times, snr_by_mode, speed_groups,  # noqa: E402
                                   text_groups)
from nibble_report.text import clean, measured, number  # noqa: E402
from nibble_report.verdict import ppl_words  # noqa: E402

HAVE_PACKAGES = all(importlib.util.find_spec(name) for name in ("matplotlib", "numpy"))
needs_packages = unittest.skipUnless(HAVE_PACKAGES, "needs python/requirements-report.txt")

HEAD = {"schema_version": 1, "tool": "nibble", "version": "0.1.0", "commit": "abc",
        "command": "nibble COMMAND --json", "device": "Some CPU, AVX2, 2 CPUs", "driver": None,
        "system": "Linux", "threads": 2, "clocks": {"cpu_mhz": 2600.0, "cpu_max_mhz": None}}
HOSTILE = "<script>alert('x')</script>\"&$a_{1}$\x1b[31m\u202e\ud800 --> ]]> </style></title>"


def check(snr, against=None, kernel="w4a8_amx"):
    return {"kernel": kernel, "activation": "token", "snr_db_vs_fp16": snr,
            "snr_db_vs_w4a16": against, "snr_db_vs_exact": snr, "rel_err": 0.01, "max_err": 0.1,
            "cosine": 0.9999, "us_median": 80.0, "us_min": 70.0, "dequant_matmul": "onednn-bf16",
            "dequant_matmul_us_median": 400.0, "speedup": 5.0, "passed": True, "failures": []}


def layer(name, **modes):
    modes = modes or {"w4a16": check(75.0), "w4a8": check(42.0, 42.1), "w4a4": check(20.0, 20.1)}
    return {"name": name, "k": 64, "n": 64, "group_size": 32, "symmetric": False,
            "scale_dtype": "f16", "weight_snr_db": 0.0, "notes": [], "failures": [],
            "modes": modes}


def verify(layers=None, **more):
    layers = layers or [layer(f"model.layers.{i}.{kind}") for i in range(3)
                        for kind in ("self_attn.q_proj", "mlp.up_proj")]
    return {**HEAD, "directory": "models/M-AWQ", "reference": "models/M", "rows": 32,
            "input": "normal", "seed": 1, "passed": 3 * len(layers), "failed": 0, "failures": [],
            "layers": layers, **more}


def perplexity_row(mode, ratio=1.01, kld=0.01, **more):
    return {"mode": mode, "act": "mix", "reference": "models/M (16bit)", "text": "a/wiki.txt",
            "tokens": 4096, "ppl": 20.0 * ratio, "ppl_err": 0.2, "ppl_ratio": ratio,
            "ppl_ratio_err": 0.001, "kld_mean": kld, "kld_err": 0.0005, "kld_median": kld / 2,
            "kld_p99": kld * 9, "same_top": 90.0, "rms_dp": 3.0, **more}


def perplexity(rows=None, **more):
    rows = rows or [perplexity_row("w4a16", 1.01, 0.01), perplexity_row("w4a8", 1.02, 0.02)]
    top = {**rows[0], "text": None}  # as the tool does: the first mode stands at the top too
    return {**HEAD, **top, "directory": "models/M-AWQ", "context": 512, "kv": "bf16",
            "head": "16", "failed_gates": [], "results": rows, "pooled": [], **more}


def speed_row(mode, test, avg, **more):
    return {"test": test, "mode": mode, "act": "mix", "n_prompt": 512, "n_gen": 0, "batch": 1,
            "avg_ts": avg, "stddev_ts": 1.5, "samples_ns": [1, 2], "kernels": ["w4a8_amx"],
            "peak_mem_bytes": 300000000, "threads": 2, "device": HEAD["device"],
            "model_filename": "models/M-AWQ", "type_k": "bf16", "head": "bf16",
            "byte_limit_share": None, **more}


def speeds():
    return [speed_row(mode, test, factor * base) for mode, factor in (("w4a16", 1), ("w4a8", 3))
            for test, base in (("pp512", 300.0), ("tg128", 60.0))]


def gemm_row(mode, m, us, **more):
    return {"kernel": f"{mode}_amx", "mode": mode, "device": HEAD["device"], "m": m, "n": 512,
            "k": 512, "group_size": 128, "us_median": us, "us_min": us, "samples_us": [us, us],
            "tops": 2e-6 * m * 512 * 512 / us, "gb_per_s": 5.0, "roofline_share": 0.5,
            "read_gb_per_s": 10.0, "speedup_vs_dequant_matmul": 2.0, "checked": True, **more}


def gemm():
    rows = [gemm_row(mode, m, 10.0 * m) for mode in ("w4a16", "w4a8") for m in (1, 8)]
    for m in (1, 8):
        row = gemm_row("dequant+matmul", m, 20.0 * m, peer="onednn", gb_per_s=None,
                       roofline_share=None)
        del row["kernel"]
        rows.append(row)
    return rows


def plan_slot(index, slot, chosen):
    choices = [{"name": name, "snr_db": snr, "us_decode": us, "us_prefill": 100 * us}
               for name, snr, us in (("w4a4 group-asym", 18.0, 3.0), ("w4a8 token", 35.0, 2.0),
                                     ("w4a16", None, 9.0))]
    return {"layer": index, "slot": slot, "k": 64, "n": 64, "chosen": chosen, "promoted": False,
            "kld_alone": 0.001, "choices": choices}


def plan_gates():
    return {"ppl_ratio": {"max": 1.1, "value": 1.05, "error": 0.01},
            "same_top": {"min": 88.0, "value": 87.0, "error": 0.3}}


def plan_run():
    """As `plan --json`: decoder layer 1 is not quantized, layer 2 has one slot."""
    return {**HEAD, "model": "models/M-AWQ", "mode": "w4a4", "started_as": "w4a4", "met": False,
            "gates": plan_gates(), "text": {"name": "calibration.txt", "tokens_scored": 2048},
            "calibration": None, "notes": ["a note"], "promoted": {"percent_of_work_at_a4": 60.0},
            "slots": [plan_slot(0, "qkv", "w4a4 group-asym"), plan_slot(0, "down", "w4a8 token"),
                      plan_slot(2, "o", "w4a16")]}


def plan_block():
    spec = {"mode": "w4a8", "granularity": "token"}
    wide = {"mode": "w4a4", "granularity": "group", "symmetric": False, "clip": 0.95,
            "wide_groups": {"of": 9, "groups": [0, 4]}}
    return {"schema_version": 1, "gates": {"kld_mean": {"max": 0.1, "value": 0.05, "error": 0.01}},
            "tool": {"name": "nibble"},
            "layers": [{"qkv": spec, "o": wide, "gate_up": spec, "down": {"mode": "w4a16"}}] * 2}


def model_config():
    return {"architectures": ["LlamaForCausalLM"],
            "quantization_config": {"quant_method": "awq", "nibble": plan_block()}}


class Files(unittest.TestCase):
    """A temporary directory per test."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def file(self, name, content):
        path = self.folder / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
        return str(path)

    def lines(self, name, rows):
        return self.file(name, "".join(json.dumps(row) + "\n" for row in rows))

    def read(self, *contents):
        return read_files([self.file(f"run{i}.json", c) for i, c in enumerate(contents)])

    def refused(self, content, *words):
        path = self.file("given.json", content)
        with self.assertRaises(BadFile) as caught:
            read_files([path])
        for word in ("given.json", *words):
            self.assertIn(word, str(caught.exception))


class ReadTest(Files):
    def test_not_json(self):
        self.refused("", "is empty")
        self.refused("  \n\n", "is empty")
        self.refused("hello", "not JSON")
        self.refused(b"\x89PNG\r\n\x1a\n\xff", "not UTF-8")
        self.refused('{"a": NaN}', "NaN")
        self.refused('{"a": 1e999}', "out of range")
        self.refused("[" * 100000, "nested too deeply")
        self.refused('{"a": 1', "not JSON")
        self.refused('{"a": ' + "9" * 5000 + "}", "not JSON")

    def test_missing_file(self):
        with self.assertRaisesRegex(BadFile, "nowhere.json: cannot be read: No such file"):
            read_files([str(self.folder / "nowhere.json")])
        with self.assertRaisesRegex(BadFile, "cannot be read"):
            read_files([str(self.folder)])

    def test_bad_line_is_named(self):
        rows = "".join(json.dumps(row) + "\n" for row in gemm())
        self.refused(rows + '{"cut": ', "line 7")

    def test_unrelated_files(self):
        self.refused({}, "no run of nibble")
        self.refused({"name": "x", "version": 3}, "no run of nibble", "name, version")
        self.refused([], "no results")
        self.refused([1, 2], "expected an object")
        self.refused(3, "expected an object")
        self.refused({**HEAD, "results": []}, "no results")
        self.refused({**HEAD, "results": [{"a": 1}]}, "found the keys a")
        self.refused({**verify(), "tool": "other"}, "written by other")
        self.refused({"quantization_config": {"quant_method": "awq"}}, "without a plan")

    def test_schema_version(self):
        for wrong in (2, 0, "1", True, None, [1]):
            for document in (verify(), perplexity()):
                self.refused({**document, "schema_version": wrong}, "schema_version")
        self.refused([{**speed_row("w4a8", "pp512", 1.0), "schema_version": 2}], "schema_version")
        config = model_config()
        config["quantization_config"]["nibble"]["schema_version"] = 7
        self.refused(config, "quantization_config.nibble.schema_version", "7")

    def test_wrong_types_say_where(self):
        broken = verify([layer("a.layers.0.q_proj", w4a8={**check(1.0), "us_median": "fast"})])
        self.refused(broken, "layers[0].modes.w4a8.us_median", "a number", "a string")
        self.refused(verify([{**layer("x"), "name": 3}]), "layers[0].name")
        self.refused({**verify(), "passed": True}, "passed", "an integer")
        self.refused({**verify(), "layers": [1]}, "layers[0]", "an object")
        self.refused({**verify(), "layers": []}, "without layers")
        self.refused({**verify(), "clocks": []}, "clocks")
        self.refused([{**gemm_row("w4a8", 1, 1.0), "us_median": 0.0}], "us_median")
        self.refused([gemm_row("w4a8", 1, 1.0, samples_us=[1, "2"])], "samples_us.1")
        self.refused([gemm_row("w4a8", 1, 1e300)], "out of range")
        self.refused([speed_row("w4a8", "pp512", None)], "avg_ts")


class RecognizeTest(Files):
    def test_every_form_of_rows(self):
        rows = speeds()
        self.assertEqual(len(self.read(rows[0]).speed), 1)
        self.assertEqual(len(self.read(rows).speed), 4)
        self.assertEqual(len(self.read({**HEAD, "results": rows}).speed), 4)
        self.assertEqual(len(read_files([self.lines("x.jsonl", rows)]).speed), 4)
        self.assertEqual(len(read_files([self.lines("y.jsonl", rows[:1])]).speed), 1)
        self.assertEqual(len(self.read([verify(), perplexity()]).verify), 1)

    def test_the_head_holds_for_its_rows(self):
        runs = self.read({**HEAD, "results": gemm()}, perplexity())
        self.assertEqual(runs.gemm[0].source.command, HEAD["command"])
        self.assertEqual([source.kind for source in runs.sources], ["bench gemm", "perplexity"])
        row = runs.perplexity[0]
        self.assertEqual((row.model, row.text, row.setting),
                         ("models/M-AWQ", "a/wiki.txt", "context 512, KV bf16, head 16"))

    def test_figures_of_the_first_mode_at_the_top_are_no_default(self):
        second = perplexity_row("w4a8")
        del second["kld_mean"]
        runs = self.read(perplexity([perplexity_row("w4a16"), second]))
        self.assertIsNone(runs.perplexity[1].get("kld_mean"))

    def test_pooled_texts(self):
        rows = [perplexity_row("w4a8", text=name) for name in ("a.txt", "b.txt")]
        runs = self.read(perplexity(rows, pooled=[{**rows[0], "text": None}]))
        self.assertEqual([g.text for g in text_groups(runs.perplexity)],
                         ["all 2 texts", "a.txt", "b.txt"])
        together, first, _ = text_groups(runs.perplexity)
        self.assertTrue(first.is_part_of(together))
        self.assertFalse(together.is_part_of(first) or together.is_part_of(together))

    def test_activation_scales_tell_modes_apart(self):
        runs = self.read([speed_row("w4a8", "pp512", 1.0),
                          speed_row("w4a8", "pp512", 2.0, act="token"),
                          speed_row("w4a16", "pp512", 3.0, act="token")])
        self.assertEqual([row.mode for row in runs.speed], ["w4a8", "w4a8 token", "w4a16"])

    def test_accuracy_meets_speed_of_the_same_model_only(self):
        runs = self.read(perplexity(), speeds(),
                         [speed_row("w4a8", "pp512", 9.0, model_filename="models/Other/")])
        joined = pairs(text_groups(runs.perplexity), speed_groups(runs.speed))
        self.assertEqual([(t.model, s.model) for t, s in joined], [("M-AWQ", "M-AWQ")])
        self.assertEqual(joined[0][1].ratio("w4a8", "pp512"), 3)

    def test_plans(self):
        inside = {"text_config": model_config()}
        for document in (model_config(), inside):
            plan = self.read(document).plans[0]
            self.assertEqual(plan.slots, ["qkv", "o", "gate_up", "down"])
            self.assertEqual(plan.layers[1]["o"].detail,
                             "group-asym clip 0.95 (2 of 9 groups int8)")
            self.assertEqual([(g.title, g.met) for g in plan.gates], [("mean KLD", True)])

    def test_runs_of_plan(self):
        plan = self.read(plan_run()).plans[0]
        self.assertEqual([sorted(row) for row in plan.layers], [["down", "qkv"], [], ["o"]])
        self.assertEqual(plan.layers[0]["down"].snr_db, 35.0)
        self.assertEqual([gate.met for gate in plan.gates], [True, False])
        self.assertEqual(plan_times(plan), [
            ("w4a4 group-asym", (9.0, 900.0)), ("w4a8 token", (6.0, 600.0)),
            ("w4a16", (27.0, 2700.0)), ("this plan", (14.0, 1400.0))])
        self.refused({**plan_run(), "slots": [plan_slot(10**9, "o", "w4a8")]}, "no layer")
        self.refused({**plan_run(), "schema_version": 2}, "schema_version")

    def test_layer_names(self):
        self.assertEqual(split_name("model.layers.3.mlp.up_proj"), (3, "up_proj"))
        self.assertEqual(split_name("transformer.h.12.attn.c_attn"), (12, "c_attn"))
        self.assertEqual(split_name("model.layers.3.mlp.experts.7.up_proj"), (3, "up_proj"))
        self.assertEqual(split_name("lm_head"), (None, "lm_head"))
        self.assertEqual(split_name("mistral.o_proj.symmetric"), (None, "o_proj"))
        self.assertEqual(split_name("."), (None, "other"))


class NumbersTest(Files):
    def test_worst_and_median(self):
        runs = self.read(verify([layer(f"a.layers.{i}.q_proj", w4a8=check(snr, 40.0 + i))
                                 for i, snr in enumerate((30.0, None, 10.0, 20.0))]))
        row = snr_by_mode(runs.verify[0])["w4a8"]
        self.assertEqual((row.worst_fp16, row.median_fp16, row.worst_layer),
                         (10.0, 20.0, "a.layers.2.q_proj"))
        self.assertEqual((row.worst_w4a16, row.median_w4a16), (40.0, 41.5))

    def test_a_difference_within_its_error_is_called_that(self):
        def words(**values):
            row = self.read([perplexity_row("w4a8", **values)]).perplexity[0]
            return ppl_words(row)

        self.assertIn("costs 2.00", words(ratio=1.02))
        self.assertIn("lowers perplexity, by -2.00", words(ratio=0.98))
        self.assertIn("no more than its error", words(ratio=1.001))
        self.assertIn("no finite perplexity", words(ppl=None, ppl_ratio=None, kld_mean=None))

    def test_numbers_as_text(self):
        self.assertEqual([number(v) for v in (None, 0, 1234567.0, 61.0, 0.0921, 0.000012)],
                         ["–", "0", "1\u202f234\u202f567", "61", "0.0921", "1.20e-05"])

        self.assertEqual([measured(v) for v in (None, 0, 1.4, 4.0, 0.24, 999.6, 99.96, 1e-6)],
                         ["–", "0", "1.40", "4.00", "0.240", "1\u202f000", "100", "1.00e-06"])

    def test_escapes_and_cleaning(self):
        self.assertEqual(tag("p", "a<b>&\"'", title='"><x'),
                         '<p title="&quot;&gt;&lt;x">a&lt;b&gt;&amp;&quot;&#x27;</p>')
        self.assertEqual(clean("a\x00\u202e\ud800ü"), "a\\u0000\\u202e\\ud800ü")
        self.assertEqual(len(clean("x" * 10000)), 400)


class PageParser(html.parser.HTMLParser):
    """Collects tags, ids and text, and that every tag is closed in order."""

    def __init__(self):
        super().__init__()
        self.tags, self.ids, self.links, self.text, self.open = set(), [], [], "", []
        self.policy = ""

    def handle_starttag(self, name, attributes):
        self.handle_startendtag(name, attributes)
        if name not in ("meta", "br"):
            self.open.append(name)

    def handle_startendtag(self, name, attributes):
        self.tags.add(name)
        for key, value in attributes:
            if key == "id":
                self.ids.append(value)
            if key in ("href", "src", "xlink:href", "action"):
                self.links.append(value)
            if key == "content" and "default-src" in value:
                self.policy = value
            if key.startswith("on"):
                raise AssertionError(f"an event handler: {key}")

    def handle_endtag(self, name):
        if not self.open or self.open.pop() != name:
            raise AssertionError(f"</{name}> closes nothing")

    def handle_data(self, data):
        self.text += data


@needs_packages
class PageTest(Files):
    def page(self, *contents):
        from nibble_report.page import make_page
        text = make_page(self.read(*contents))
        text.encode("utf-8")  # no lone surrogate
        parser = PageParser()
        parser.feed(text)
        self.assertEqual(parser.open, [])
        self.assertEqual(len(parser.ids), len(set(parser.ids)), "ids must be unique")
        for link in parser.links:
            self.assertTrue(link.startswith("#"), link)
            self.assertIn(link[1:], parser.ids)
        for name in ("script", "link", "img", "iframe", "object", "foreignObject"):
            self.assertNotIn(name, parser.tags)
        # nothing to fetch: namespaces are the only addresses
        self.assertEqual(re.sub(r'xmlns(:xlink)?="http://www.w3.org/[^"]*"', "", text)
                         .count("http:"), 0)
        self.lacks(text, "https:")
        self.assertIsNone(re.search(r"url\((?!#)", text))
        self.assertIn("default-src 'none'", parser.policy)
        return text, parser

    def has(self, text, *words):  # assertIn would print the page
        for word in words:
            self.assertTrue(word in text, f"not in the page: {word!r}")

    def lacks(self, text, *words):
        for word in words:
            self.assertFalse(word in text, f"in the page: {word!r}")

    def test_everything(self):
        text, parser = self.page(verify(), perplexity(), speeds(), gemm(), model_config())
        for expected in ("all 18 checks passed over 6 layers", "costs 2.00", "3.00× w4a16",
                         "w4a8_amx", "nibble COMMAND --json", "Some CPU, AVX2, 2 CPUs",
                         "2 of 9 groups int8", "model.layers.2.mlp.up_proj, w4a8: 42.0 dB"):
            self.has(parser.text, expected)
        self.assertGreaterEqual(parser.text.count("Command: "), 4)
        self.lacks(text, "#0101")  # stand-ins of colours

    def test_missing_inputs_name_their_command(self):
        _, parser = self.page({**HEAD, "features": [], "kernels": [], "picked": []})
        for command in ("nibble verify DIR", "nibble perplexity DIR", "nibble bench model DIR",
                        "nibble bench gemm", "nibble plan DIR"):
            self.has(parser.text, command)
        self.assertNotIn("svg", parser.tags)

    def test_one_of_accuracy_and_speed(self):
        for given, absent in ((perplexity(), "bench model"), (speeds(), "perplexity")):
            _, parser = self.page(given)
            self.assertIn("svg", parser.tags)
            self.has(parser.text, f"No run of {absent} was given")

    def test_hostile_text_stays_text(self):
        bad_layer = layer(HOSTILE, **{HOSTILE: check(20.0, 20.0, HOSTILE), "w4a8": check(40.0)})
        bad_layer.update(notes=[HOSTILE], failures=[HOSTILE])
        inside = layer(f"model.layers.0.{HOSTILE}", **{HOSTILE: check(9.0)})
        head = {**HEAD, "command": HOSTILE, "device": HOSTILE, "commit": HOSTILE}
        config = model_config()
        config["quantization_config"]["nibble"]["layers"] = [
            {HOSTILE: {"mode": HOSTILE, "granularity": HOSTILE}, "qkv": {"mode": HOSTILE}}]
        plan = {**plan_run(), "model": HOSTILE, "mode": HOSTILE, "notes": [HOSTILE],
                "slots": [plan_slot(0, HOSTILE, HOSTILE)]}
        text, parser = self.page(
            {**verify([bad_layer, inside], failed=1, failures=[HOSTILE], directory=HOSTILE,
                      reference=HOSTILE), **head},
            {**perplexity([perplexity_row(HOSTILE, text=HOSTILE, reference=HOSTILE)],
                          failed_gates=[HOSTILE], directory=HOSTILE), **head},
            [speed_row(HOSTILE, HOSTILE, 3.0, kernels=[HOSTILE], model_filename=HOSTILE)],
            [gemm_row(HOSTILE, 1, 3.0, kernel=HOSTILE)],
            [gemm_row(HOSTILE, 1, 3.0, peer=HOSTILE)], plan, config,
            {**HEAD, "features": [{"name": HOSTILE, "present": False, "reason": HOSTILE}],
             "kernels": [{"name": HOSTILE, "mode": HOSTILE}],
             "picked": [{"mode": HOSTILE, "m": 1, "kernel": HOSTILE}]},
            {**HEAD, "bits_per_weight": 4.3, "bytes": 1, "layers": [], "architecture": HOSTILE})
        self.has(parser.text, "alert('x')", "$a_{1}$")
        self.lacks(text, "<script", "\x1b", "\u202e", "]]>")

    def test_failures_are_on_top(self):
        bad = layer("model.layers.0.mlp.up_proj",
                    w4a8={**check(3.0), "passed": False, "failures": ["sums differ"]})
        _, parser = self.page(verify([bad], failed=1), perplexity(failed_gates=["KLD above 0.1"]),
                              plan_run())
        self.has(parser.text, "1 of 4 checks FAILED over 1 layer", "A gate FAILED: KLD above 0.1",
                 "gates FAILED: PPL ratio 1.0500",
                 "model.layers.0.mlp.up_proj, w4a8: sums differ")

    def test_a_large_model_stays_small(self):
        kinds = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                 "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
        layers = [layer(f"model.layers.{i}.{kind}") for i in range(80) for kind in kinds]
        text, _ = self.page(verify(layers))
        self.assertLess(len(text.encode("utf-8")), 2_500_000)

    def test_the_same_input_gives_the_same_page(self):
        os.environ["SOURCE_DATE_EPOCH"] = "0"
        self.addCleanup(os.environ.pop, "SOURCE_DATE_EPOCH")
        given = [verify(), perplexity(), speeds()]
        self.assertTrue(self.page(*given)[0] == self.page(*given)[0])


class ProgramTest(Files):
    def run_program(self, *arguments):
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors):
            try:
                code = program.main([str(a) for a in arguments])
            except SystemExit as stop:  # of argparse
                code = stop.code
        return code, errors.getvalue()

    def test_exit_codes(self):
        good = self.file("good.json", verify())
        self.assertEqual(self.run_program()[0], 2)
        self.assertEqual(self.run_program(good, "-o", good)[0], 2)
        code, message = self.run_program(good, self.file("bad.json", "{"), "-o",
                                         self.folder / "r.html")
        self.assertEqual(code, 4)
        self.assertIn("bad.json", message)
        self.assertFalse((self.folder / "r.html").exists())

    @needs_packages
    def test_writes_the_page_whole(self):
        good, page = self.file("good.json", verify()), self.folder / "r.html"
        page.write_text("old")
        self.assertEqual(self.run_program(good, "-o", page, "--title", "A & <b>")[0], 0)
        self.assertIn("<title>A &amp; &lt;b&gt;</title>", page.read_text("utf-8"))
        self.assertEqual(sorted(p.name for p in self.folder.iterdir()), ["good.json", "r.html"])
        code, message = self.run_program(good, "-o", self.folder / "no" / "r.html")
        self.assertEqual(code, 4)
        self.assertIn("cannot be written", message)

    def test_missing_package_says_what_to_install(self):
        self.file("matplotlib.py", "raise ImportError('gone', name='matplotlib')")
        result = subprocess.run(
            [sys.executable, "-m", "nibble_report", self.file("good.json", verify()), "-o",
             str(self.folder / "r.html")],
            env={**os.environ, "PYTHONPATH": f"{self.folder}{os.pathsep}{PACKAGE}"},
            capture_output=True, text=True, cwd="/", check=False)
        self.assertEqual(result.returncode, 3, result.stderr)
        self.assertIn("requirements-report.txt", result.stderr)
        self.assertNotIn("Traceback", result.stderr)


if __name__ == "__main__":
    unittest.main()
