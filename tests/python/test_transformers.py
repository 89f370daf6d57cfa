"""nibble.transformers: AWQ directories through from_pretrained, layer by layer and as text. Needs
torch, transformers and a library; a real model and the tool where there are some:

    NIBBLE_LIBRARY=build/libnibble.so NIBBLE_TOOL=build/nibble NIBBLE_MODEL=AWQ_DIR \\
        python tests/python/test_transformers.py
"""

import json
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).resolve().parent))
if "NIBBLE_LIBRARY" in os.environ:  # the package of this tree; else the one that is installed
    sys.path.insert(0, str(ROOT / "python"))

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING  # noqa: E402

import c_abi  # noqa: E402
import nibble  # noqa: E402
import nibble.transformers  # noqa: E402
from awq_models import make_tiny  # noqa: E402
from nibble.torch import AwqLinear  # noqa: E402
from test_torch import needs_gpu  # noqa: E402

TOOL, MODEL = os.environ.get("NIBBLE_TOOL"), os.environ.get("NIBBLE_MODEL")
PROMPTS = ["The capital of France is", "Water boils at", "def fibonacci(n):", "Once upon a time"]
TOKENS = 64
PLAN = {"schema_version": 1, "layers": [
    {"qkv": {"mode": "w4a8", "granularity": "token"},
     "o": {"mode": "w4a4", "granularity": "group", "symmetric": False, "clip": 0.95,
           "wide_groups": {"of": 2, "groups": [1]}},
     "gate_up": {"mode": "w4a8", "granularity": "static-tensor", "static_scales": [0.03125]},
     "down": {"mode": "w4a16"}},
    {"qkv": {"mode": "w4a16"}, "o": {"mode": "w4a16"},
     "gate_up": {"mode": "w4a4", "granularity": "token", "symmetric": False},
     "down": {"mode": "w4a8", "granularity": "group"}}]}


def load(directory, dtype=torch.float32, **options):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **options).eval()


def linears(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, AwqLinear)}


class Tiny(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.addCleanup(nibble.transformers.disable)
        self.made = 0

    def make(self, **options):
        self.made += 1
        return make_tiny(Path(self.folder.name) / str(self.made), **options)

    def check_layers(self, directory, model, device="cpu"):
        """Every linear's output for the input that it met, against the C ABI on the file."""
        tensors = load_file(directory / "model.safetensors")
        met = {}
        for name, module in linears(model).items():
            module.register_forward_hook(
                lambda module, given, y, name=name: met.update({name: (given[0], y)}))
        with torch.no_grad():
            model(torch.arange(2, 40, device=device)[None])
        self.assertEqual(len(met), len([name for name in tensors if name.endswith(".qweight")]))
        for name, (x, y) in met.items():
            parts = {part: tensors.get(f"{name}.{part}")
                     for part in ("qweight", "qzeros", "scales", "bias")}
            module = linears(model)[name]
            expected = c_abi.product(x.reshape(-1, x.shape[-1]).cpu(), parts["qweight"],
                                     parts["qzeros"], parts["scales"], module.group_size,
                                     parts["bias"], module.spec)
            y = y.reshape(expected.shape).cpu()
            if device == "cpu":
                self.assertTrue(torch.equal(y, expected), name)
            else:
                gap = (y.double() - expected.double()).norm() / expected.double().norm()
                self.assertLess(gap.item(), 5e-3, name)

    def test_every_layer_equals_the_c_abi_bit_for_bit(self):
        for options in ({}, {"family": "qwen2"}, {"tied": True, "skipped": ("o_proj",)},
                        {"zero_point": False}, {"group_size": -1},
                        {"scale_dtype": torch.bfloat16}):
            directory = self.make(**options)
            for mode in "w4a16", "w4a8", "w4a4":
                for dtype in torch.float32, torch.bfloat16, torch.float16:
                    with self.subTest(mode=mode, dtype=dtype, **options):
                        nibble.transformers.enable(mode)
                        self.check_layers(directory, load(directory, dtype))

    def test_scales_keep_their_type_under_another(self):
        directory = self.make()
        nibble.transformers.enable("w4a16")
        layer = linears(load(directory, torch.bfloat16))["model.layers.0.mlp.up_proj"]
        exact = linears(load(directory, torch.float32))["model.layers.0.mlp.up_proj"]
        self.assertTrue(torch.equal(layer.packed, exact.packed))

    def test_the_plan_in_config_json_is_honoured(self):
        directory = self.make(plan=PLAN)
        for mode in None, "auto":
            nibble.transformers.enable(mode)
            model = load(directory)
            specs = {name: str(module.spec) for name, module in linears(model).items()}
            self.assertEqual(specs["model.layers.0.self_attn.o_proj"],
                             "w4a4 group-asym clip 0.95 (1 of 2 groups int8)")
            self.assertEqual(specs["model.layers.0.mlp.gate_proj"], "w4a8 static-tensor")
            self.assertEqual(specs["model.layers.1.mlp.down_proj"], "w4a8 group")
            self.check_layers(directory, model)
        nibble.transformers.enable("w4a8")  # a mode that is asked for comes before the plan
        specs = {str(module.spec) for module in linears(load(directory)).values()}
        self.assertEqual(specs, {"w4a8 token", "w4a8 group"})

    def test_text_is_generated_alone_and_in_a_batch(self):
        directory = self.make()
        nibble.transformers.enable("w4a8", "token")
        model = load(directory)
        tokens = torch.randint(1, 250, (3, 9), generator=torch.Generator().manual_seed(1))
        batch = model.generate(tokens, max_new_tokens=12, do_sample=False, min_new_tokens=12,
                               pad_token_id=0)
        self.assertEqual(batch.shape, (3, 21))
        alone = model.generate(tokens[:1], max_new_tokens=12, do_sample=False, min_new_tokens=12,
                               pad_token_id=0)
        self.assertEqual(alone.shape, (1, 21))

    def test_a_compiled_model_is_the_same(self):
        torch._dynamo.reset()
        directory = self.make()
        nibble.transformers.enable("w4a16")
        model = load(directory)
        tokens = torch.arange(2, 40)[None]
        with torch.no_grad():
            expected = model(tokens).logits
            compiled = torch.compile(model)
            torch.testing.assert_close(compiled(tokens).logits, expected, rtol=1e-4, atol=1e-4)

    def test_options(self):
        stock = AUTO_QUANTIZER_MAPPING["awq"]
        for mode, granularity, pattern in (("w4a5", None, "mode"), ("w4a8", "row", "granularity"),
                                           ("w4a8", "static-tensor", "granularity")):
            with self.assertRaisesRegex(nibble.InvalidArgument, pattern):
                nibble.transformers.enable(mode, granularity)
        self.assertIs(AUTO_QUANTIZER_MAPPING["awq"], stock)
        nibble.transformers.enable("auto")
        nibble.transformers.enable("auto")
        with self.assertRaisesRegex(nibble.InvalidArgument, "no plan"):
            load(self.make())
        nibble.transformers.disable()
        nibble.transformers.disable()
        self.assertIs(AUTO_QUANTIZER_MAPPING["awq"], stock)

    def test_wrong_checkpoints_name_the_tensor(self):
        nibble.transformers.enable("w4a8")
        name = "model.layers.1.mlp.up_proj"
        spoil = {
            f"{name}: scales: missing": lambda t: t.pop(f"{name}.scales"),
            f"{name}: qzeros: expected I32": lambda t: t.update(
                {f"{name}.qzeros": t[f"{name}.qzeros"][:1]}),
            f"{name}: scales: expected F16": lambda t: t.update(
                {f"{name}.scales": t[f"{name}.scales"].float()}),
            f"{name}: qweight: expected I32": lambda t: t.update(
                {f"{name}.qweight": t[f"{name}.qweight"][:, :8].contiguous()}),
            "experts.*mixtures of experts": lambda t: t.update(
                {"model.layers.1.mlp.experts.0.up_proj.qweight": t[f"{name}.qweight"].clone()}),
            "no tensor named": lambda t: [t.pop(key) for key in list(t)
                                          if key.endswith("qweight")],
        }
        for pattern, change in spoil.items():
            directory = self.make()
            tensors = load_file(directory / "model.safetensors")
            change(tensors)
            save_file(tensors, directory / "model.safetensors", {"format": "pt"})
            with self.subTest(pattern), self.assertRaisesRegex(nibble.NibbleError, pattern):
                load(directory)

    def test_other_layouts_are_refused(self):
        nibble.transformers.enable("w4a8")
        directory = self.make()
        config = json.loads((directory / "config.json").read_text())
        config["quantization_config"]["version"] = "gemv"
        (directory / "config.json").write_text(json.dumps(config))
        with self.assertRaisesRegex(nibble.Unsupported, "version gemm.*gemv"):
            load(directory)

    def test_it_is_not_saved(self):
        nibble.transformers.enable("w4a8")
        model = load(self.make())
        with self.assertRaisesRegex(ValueError, "not serializable"):
            model.save_pretrained(Path(self.folder.name) / "saved")

    @needs_gpu
    def test_on_a_gpu(self):
        for options in {}, {"family": "qwen2"}:
            directory = self.make(**options)
            for mode in "w4a16", "w4a8", "w4a4":
                with self.subTest(mode=mode, **options):
                    nibble.transformers.enable(mode)
                    model = load(directory, torch.bfloat16, device_map="cuda")
                    self.check_layers(directory, model, "cuda")


def tool_tokens(mode, act):
    """The C++ runner's greedy tokens: [(prompt, continuation)]."""
    run = subprocess.run(
        [TOOL, "generate", MODEL, *[word for text in PROMPTS for word in ("-p", text)],
         "-n", str(TOKENS), "--mode", mode, "--act", act, "--kv", "f32", "--ignore-eos", "--json"],
        capture_output=True, text=True, check=True)
    return [(each["prompt_tokens"], each["tokens"]) for each in json.loads(run.stdout)["results"]]


@unittest.skipUnless(TOOL and MODEL, "needs NIBBLE_TOOL and NIBBLE_MODEL")
class RealModel(unittest.TestCase):
    """SmolLM2 through transformers and through the C++ runner."""

    def setUp(self):
        self.addCleanup(nibble.transformers.disable)

    def logits(self, model, prompt, tokens):
        """Of each of `tokens`, given what comes before it."""
        with torch.no_grad():
            every = model(torch.tensor([prompt + tokens])).logits[0].float()
        return every[len(prompt) - 1:-1]

    def test_w4a16_is_the_same_text(self):
        nibble.transformers.enable("w4a16")
        model = load(MODEL)
        model.generation_config.eos_token_id = None  # as --ignore-eos
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        for text, (prompt, expected) in zip(PROMPTS, tool_tokens("w4a16", "mix")):
            given = tokenizer(text, return_tensors="pt")
            self.assertEqual(given.input_ids[0].tolist(), prompt)
            found = model.generate(**given, max_new_tokens=TOKENS, do_sample=False,
                                   pad_token_id=0)[0, len(prompt):].tolist()
            if found == expected:
                continue
            first = next(i for i in range(TOKENS) if found[i] != expected[i])
            scores = self.logits(model, prompt, expected)[first]
            margin = (scores[found[first]] - scores[expected[first]]).item()
            print(f"{text!r}: token {first} differs by a logit margin of {margin:.2g}")
            self.assertLess(abs(margin), 1e-2)

    def test_w4a8_differs_no_more_than_by_rounding(self):
        """Rounding an activation to another code changes later ones, so that the last bit of an
        embedding changes logits as much as int8 does. What the C++ runner chooses may differ from
        transformers no more than transformers differs from itself after such a change."""
        nibble.transformers.enable("w4a8", "group")
        model = load(MODEL)
        cases = tool_tokens("w4a8", "group")
        plain = [self.logits(model, *case) for case in cases]
        runner = sum((scores.argmax(-1) != torch.tensor(tokens)).sum().item()
                     for scores, (_, tokens) in zip(plain, cases))
        itself, seeds = 0, 2
        noise = torch.Generator()
        hook = model.get_input_embeddings().register_forward_hook(
            lambda module, given, y: y * (1 + 6e-8 * torch.randn(y.shape, generator=noise)))
        for seed in range(seeds):
            noise.manual_seed(seed)
            for scores, case in zip(plain, cases):
                itself += (scores.argmax(-1) != self.logits(model, *case).argmax(-1)).sum().item()
        hook.remove()
        total = len(cases) * TOKENS
        print(f"w4a8: of {total} tokens the runner chooses {runner} others than transformers; "
              f"transformers itself, an ulp away, {itself / seeds:.1f}")
        self.assertLessEqual(runner, 2 * itself / seeds + 0.02 * total)


if __name__ == "__main__":
    unittest.main(verbosity=2)
