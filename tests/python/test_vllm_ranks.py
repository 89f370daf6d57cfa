"""vLLM with the plugin and tensor_parallel_size 2: the tokens of the C++ runner, also where the
ranks cut down_proj inside a quantization group (vLLM's own CPU path is wrong there).

    build/venv-vllm/bin/python tests/python/test_vllm_ranks.py
"""

import os
import sys
import tempfile
import unittest
from pathlib import Path

import vllm_testing

vllm_testing.set_environment(VLLM_CPU_OMP_THREADS_BIND="0|1")
if (os.cpu_count() or 1) < 2:
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"

from vllm import LLM, SamplingParams  # noqa: E402

import awq_models  # noqa: E402
from vllm_testing import REAL_MODEL, runner_tokens  # noqa: E402

TOKENS = 64


class Ranks(unittest.TestCase):
    def test_two_ranks(self):
        """A real model if there is one, made divisible by two, else a random one."""
        with tempfile.TemporaryDirectory() as directory:
            model = Path(directory) / "model"
            if (REAL_MODEL / "config.json").exists():
                awq_models.widen_for_two_ranks(REAL_MODEL, model)
            else:
                awq_models.make_tiny(model, intermediate=384)  # 1.5 groups of 128 on each rank
            prompt, expected = runner_tokens(model, "w4a16", TOKENS, "--kv", "f32")
            llm = LLM(str(model), dtype="float32", max_model_len=512, max_num_seqs=8,
                      enforce_eager=True, tensor_parallel_size=2,
                      additional_config={"nibble": {"mode": "w4a16"}})
            counts = llm.collective_rpc(count_nibble_layers)
            self.assertEqual(2, len(counts))
            self.assertTrue(all(count > 0 for count in counts), counts)
            parameters = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
            output = llm.generate([{"prompt_token_ids": prompt}], parameters, use_tqdm=False)[0]
            tokens = list(output.outputs[0].token_ids)
            print(f"two ranks, {'real' if 'SmolLM2' in str(REAL_MODEL) else 'random'} model: "
                  f"{output.outputs[0].text!r}", file=sys.stderr)
            self.assertEqual(expected, tokens)


def count_nibble_layers(worker):
    return sum(type(getattr(module, "quant_method", None)).__name__ == "NibbleLinearMethod"
               for module in worker.model_runner.model.modules())


if __name__ == "__main__":
    unittest.main(verbosity=2)
