"""lm-eval through vLLM and through transformers, by the commands of docs/vllm.md, on a task of one
file of text. Both hosts must find the same perplexity, and w4a8 nearly that of w4a16.

    build/venv-vllm/bin/python tests/python/test_vllm_lm_eval.py
"""

import json
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import vllm_testing

vllm_testing.set_environment()

import awq_models  # noqa: E402
from vllm_testing import ENVIRONMENT, REAL_MODEL, ROOT  # noqa: E402

DOCUMENTS, BYTES = 16, 700
TASK = """task: prose
dataset_path: json
dataset_kwargs: {data_files: {test: DIRECTORY/documents.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}, {metric: byte_perplexity}]
metadata: {version: 1}
"""


def write_task(directory):
    text = (ROOT / "data/calibration.txt").read_text(encoding="utf-8")
    with open(directory / "documents.jsonl", "w", encoding="utf-8") as file:
        for i in range(DOCUMENTS):
            file.write(json.dumps({"text": text[i * BYTES:(i + 1) * BYTES]}) + "\n")
    (directory / "prose.yaml").write_text(TASK.replace("DIRECTORY", str(directory)))


class LmEval(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory = Path(directory.name)
        write_task(self.directory)
        self.model = REAL_MODEL
        if not (REAL_MODEL / "config.json").exists():
            self.model = awq_models.make_tiny(self.directory / "model")

    def vllm_by_command(self, mode):
        options = {"pretrained": str(self.model), "dtype": "float32", "max_model_len": 512,
                   "enforce_eager": True, "max_num_seqs": 8,
                   "additional_config": {"nibble": {"mode": mode}}}
        out = self.directory / "out.json"
        command = [sys.executable, "-m", "lm_eval", "run", "--model", "vllm", "--model_args",
                   json.dumps(options), "--tasks", "prose", "--include_path", self.directory,
                   "--output_path", out, "--batch_size", "auto"]
        done = subprocess.run([str(word) for word in command], env=os.environ | ENVIRONMENT,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              check=False, timeout=300)
        self.assertEqual(0, done.returncode, done.stdout[-4000:])
        self.assertRegex(done.stdout, rf"libnibble\.so\) runs 4-bit linears in {mode}")
        found = next(self.directory.glob("out*.json"))
        return json.loads(found.read_text())["results"]["prose"]["bits_per_byte,none"]

    def evaluate(self, model):
        import lm_eval
        from lm_eval.tasks import TaskManager
        tasks = TaskManager(include_path=str(self.directory), include_defaults=False)
        found = lm_eval.simple_evaluate(model=model, tasks=["prose"], task_manager=tasks,
                                        bootstrap_iters=0)
        return found["results"]["prose"]["bits_per_byte,none"]

    def test_same_perplexity(self):
        import torch
        from lm_eval.models.huggingface import HFLM
        from lm_eval.models.vllm_causallms import VLLM
        from transformers import AutoModelForCausalLM, AutoTokenizer

        import nibble.transformers

        found = {"vLLM w4a8": self.vllm_by_command("w4a8")}
        found["vLLM w4a16"] = self.evaluate(VLLM(
            str(self.model), dtype="float32", max_model_len=512, enforce_eager=True,
            max_num_seqs=8, additional_config={"nibble": {"mode": "w4a16"}}))
        nibble.transformers.enable(mode="w4a16")
        model = AutoModelForCausalLM.from_pretrained(str(self.model), dtype=torch.float32)
        found["transformers w4a16"] = self.evaluate(HFLM(
            pretrained=model, tokenizer=AutoTokenizer.from_pretrained(str(self.model)),
            max_length=511, batch_size=1))
        print(f"perplexity, bits per byte: {found}", file=sys.stderr)
        self.assertAlmostEqual(found["vLLM w4a16"], found["transformers w4a16"], delta=2e-4)
        self.assertAlmostEqual(found["vLLM w4a8"], found["vLLM w4a16"],
                               delta=0.01 * found["vLLM w4a16"])


if __name__ == "__main__":
    unittest.main(verbosity=2)
