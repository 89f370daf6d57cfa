"""vLLM with the plugin, whole models in one process: the tokens of the C++ runner in every mode,
what is claimed, what is refused.

    build/venv-vllm/bin/python tests/python/test_vllm_engine.py
"""

import collections
import gc
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import vllm_testing

vllm_testing.set_environment()

from vllm import LLM, SamplingParams  # noqa: E402
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402
from vllm.model_executor.layers.quantization import get_quantization_config  # noqa: E402
from vllm.plugins import load_general_plugins  # noqa: E402

import awq_models  # noqa: E402
from nibble.modes import make_spec  # noqa: E402
from nibble.vllm import device  # noqa: E402
from vllm_testing import REAL_MODEL, runner_tokens  # noqa: E402

TOKENS = 64
MARGIN = 1e-2  # a first divergence must be a tie closer than this, in logits


class Engine:
    """An LLM that is gone when its `with` ends, whoever still holds this object: what vLLM keeps
    per process is set up anew by the next one."""

    def __init__(self, model, mode=None, **options):
        if mode is not None:
            options["additional_config"] = {"nibble": {"mode": mode}}
        device.said.clear()
        options = {"dtype": "float32", "enforce_eager": True} | options
        self.llm = LLM(str(model), max_model_len=512, max_num_seqs=8, **options)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.llm = None
        gc.collect()
        cleanup_dist_env_and_memory()

    def generate(self, prompt, count=TOKENS):
        """(tokens, for each step {token: log probability} of the likeliest)."""
        parameters = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, logprobs=5)
        output = self.llm.generate([{"prompt_token_ids": prompt}], parameters, use_tqdm=False)
        found = output[0].outputs[0]
        steps = [{token: entry.logprob for token, entry in step.items()} for step in found.logprobs]
        return list(found.token_ids), steps

    def methods(self):
        """Classes of the quantization methods of all layers, with how many layers have each."""
        def count(model):
            names = [type(module.quant_method).__name__ for module in model.modules()
                     if hasattr(module, "quant_method")]
            return dict(collections.Counter(names))
        return self.llm.apply_model(count)[0]


class Models(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.directory = tempfile.TemporaryDirectory()
        cls.root = Path(cls.directory.name)

    @classmethod
    def tearDownClass(cls):
        cls.directory.cleanup()

    def same_tokens(self, llm, model, mode, *options):
        prompt, expected = runner_tokens(model, mode, TOKENS, *options)
        tokens, steps = llm.generate(prompt)
        equal = next((i for i in range(TOKENS) if tokens[i] != expected[i]), TOKENS)
        text = f"{Path(model).name} {mode}: {equal} of {TOKENS} tokens equal the C++ runner's"
        if equal < TOKENS:
            step = steps[equal]
            margin = step[tokens[equal]] - step.get(expected[equal], float("-inf"))
            text += f"; the next is a tie within {margin:.2g}"
            self.assertLess(margin, MARGIN, text)
        print(text, file=sys.stderr)
        return tokens

    def all_nibble(self, llm, spec):
        """Every linear is Nibble's, and the log says in which mode and by which library."""
        counts = llm.methods()
        self.assertGreater(counts.get("NibbleLinearMethod", 0), 0, counts)
        self.assertEqual(set(counts) - {"NibbleLinearMethod", "UnquantizedEmbeddingMethod"}, set())
        said = " ".join(device.said)
        self.assertIn("libnibble", said)
        self.assertIn(spec, said)

    def test_modes(self):
        model = awq_models.make_tiny(self.root / "llama")
        for mode in ("w4a16", "w4a8", "w4a4"):
            with self.subTest(mode=mode), Engine(model, mode) as llm:
                self.all_nibble(llm, mode)
                self.same_tokens(llm, model, mode, "--kv", "f32")

    def test_biases_skipped_modules_bf16_scales(self):
        model = awq_models.make_tiny(self.root / "qwen2", family="qwen2", skipped=["o_proj"],
                                     scale_dtype=awq_models.torch.bfloat16)
        with Engine(model, "w4a16") as llm:
            self.assertEqual(2, llm.methods()["UnquantizedLinearMethod"])
            self.same_tokens(llm, model, "w4a16", "--kv", "f32")

    def test_tied_symmetric_whole_column(self):
        model = awq_models.make_tiny(self.root / "tied", tied=True, zero_point=False, group_size=-1)
        with Engine(model, "w4a16") as llm:
            self.all_nibble(llm, "w4a16")
            self.same_tokens(llm, model, "w4a16", "--kv", "f32")

    def test_plan_of_config(self):
        specs = {"qkv": {"mode": "w4a8", "granularity": "token"}, "o": {"mode": "w4a16"},
                 "gate_up": {"mode": "w4a8", "granularity": "group", "clip": 0.9},
                 "down": {"mode": "w4a4", "granularity": "group", "symmetric": False,
                          "wide_groups": {"of": 4, "groups": [0, 2]}}}
        plan = {"schema_version": 1, "layers": [specs, specs | {"o": specs["qkv"]}]}
        model = awq_models.make_tiny(self.root / "plan", plan=plan)
        with Engine(model) as llm:
            self.all_nibble(llm, "w4a4 group-asym (2 of 4 groups int8)")
            tokens = self.same_tokens(llm, model, "auto", "--kv", "f32")
        with Engine(model, "w4a16") as llm:
            self.assertNotEqual(tokens, self.same_tokens(llm, model, "w4a16", "--kv", "f32"))

    def test_compiled(self):
        model = awq_models.make_tiny(self.root / "compiled")
        with Engine(model, "w4a8", enforce_eager=False) as llm:
            self.all_nibble(llm, "w4a8")
            self.same_tokens(llm, model, "w4a8", "--kv", "f32")

    def test_16_bit_models(self):
        model = awq_models.make_tiny(self.root / "bits")
        for dtype in ("bfloat16", "float16"):
            with Engine(model, dtype=dtype) as llm:
                self.all_nibble(llm, "w4a8")  # the mode without any option
                prompt, expected = runner_tokens(model, "w4a8", 4)
                self.assertEqual(expected, llm.generate(prompt, 4)[0])

    def test_awq_gives_vllm_its_own_path_back(self):
        model = awq_models.make_tiny(self.root / "own")
        with Engine(model, quantization="awq", dtype="bfloat16") as llm:
            self.assertIn("AutoAWQMarlinLinearMethod", llm.methods())
            self.assertEqual(set(), device.said)

    @unittest.skipUnless((REAL_MODEL / "config.json").exists(), f"no {REAL_MODEL}")
    def test_real_model(self):
        """In w4a16. In w4a8 hosts differ as docs/vllm.md says: test_vllm_lm_eval.py."""
        with Engine(REAL_MODEL, "w4a16") as llm:
            self.all_nibble(llm, "w4a16")
            self.same_tokens(llm, REAL_MODEL, "w4a16", "--kv", "f32")


class Claims(unittest.TestCase):
    """What needs no model."""

    @classmethod
    def setUpClass(cls):
        load_general_plugins()

    def config(self, **changes):
        return {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm",
                "zero_point": True} | changes

    def claim(self, user, **changes):
        method = get_quantization_config("nibble")
        return method.override_quantization_method(self.config(**changes), user, hf_config=None)

    def test_claims(self):
        self.assertEqual("nibble", self.claim(None))
        self.assertEqual("nibble", self.claim("nibble"))
        for user in ("awq", "auto_awq", "awq_marlin"):
            self.assertIsNone(self.claim(user))
        self.assertIsNone(self.claim(None, quant_method="gptq"))
        self.assertIsNone(self.claim(None, bits=8))

    def test_refuses(self):
        method = get_quantization_config("nibble")
        for changes, text in (({"version": "gemv"}, 'expected "gemm", found "gemv"'),
                              ({"group_size": 0}, "found 0"), ({"bits": 3}, "found 3")):
            with self.assertRaisesRegex(ValueError, text):
                method.from_config(self.config(**changes))

    def test_refuses_options(self):
        from nibble.vllm.config import read_options
        self.assertEqual({}, read_options({}))
        self.assertEqual({}, read_options({"other": 1}))
        self.assertEqual({"mode": "w4a4"}, read_options({"nibble": {"mode": "w4a4"}}))
        for options, text in (({"nibble": "w4a8"}, "expected an object"),
                              ({"nibble": {"moed": "w4a8"}}, 'unknown key "moed"')):
            with self.assertRaisesRegex(ValueError, text):
                read_options(options)

    def test_refuses_a_mode_of_gpus(self):
        from unittest import mock

        from vllm.config import VllmConfig, set_current_vllm_config
        made = get_quantization_config("nibble").from_config(self.config())
        config = mock.Mock(spec=VllmConfig, compilation_config=mock.MagicMock(),
                           additional_config={"nibble": {"mode": "w4a8-fp8"}})
        with set_current_vllm_config(config), \
                self.assertRaisesRegex(ValueError, "w4a8-fp8 runs on CUDA devices"):
            made.spec_of("model.layers.0.mlp.up_proj")

    def test_without_its_library_vllm_does_not_start(self):
        """It would run the checkpoint by its own means if the plugin were only not there."""
        program = "from vllm.plugins import load_general_plugins; load_general_plugins()"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                              env=os.environ | {"NIBBLE_LIBRARY": "/nowhere/libnibble.so"},
                              check=False, timeout=300)
        self.assertNotEqual(0, done.returncode)
        self.assertIn("LibraryNotFound: /nowhere/libnibble.so", done.stderr)

    def test_nan_stays_in_its_row(self):
        from nibble.torch import pack_awq
        from nibble.vllm.ops import linear_or_nan
        torch = awq_models.torch
        parts = awq_models.random_linear(128, 32, 64, torch.Generator().manual_seed(1))
        packed = pack_awq(*parts.values(), 64)
        x = torch.randn(3, 128)
        for spec in (make_spec("w4a8"), make_spec("w4a8", "tensor"), make_spec("w4a16")):
            how = (32, 64, int(spec.mode), int(spec.granularity))
            expected = linear_or_nan(x, packed, *how)
            bad = x.clone()
            bad[1, 5] = float("inf")
            y = linear_or_nan(bad, packed, *how)
            self.assertFalse(y[1].isfinite().any())
            if str(spec) == "w4a8 tensor":  # one scale for all rows
                self.assertFalse(y.isfinite().any())
            else:
                self.assertTrue(torch.equal(y[::2], expected[::2]))

    def test_refuses_experts(self):
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        config = get_quantization_config("nibble").from_config(self.config())
        with self.assertRaisesRegex(ValueError, "model.layers.0.mlp.experts: mixtures of experts"):
            config.get_quant_method(RoutedExperts.__new__(RoutedExperts),
                                    "model.layers.0.mlp.experts")


if __name__ == "__main__":
    unittest.main(verbosity=2)
