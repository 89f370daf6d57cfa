#!/usr/bin/env python3
"""Text of an AWQ directory through transformers, in every mode:

    python examples/transformers_generate.py AWQ_DIR ["The capital of France is"]
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import nibble.transformers

directory = sys.argv[1]
prompt = sys.argv[2] if len(sys.argv) > 2 else "The capital of France is"
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(directory)
given = tokenizer(prompt, return_tensors="pt").to(device)

for mode in "w4a16", "w4a8", "w4a4":
    nibble.transformers.enable(mode)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, device_map=device
                                                 if device == "cuda" else None)
    tokens = model.generate(**given, max_new_tokens=24, do_sample=False,
                            pad_token_id=tokenizer.eos_token_id or 0)
    print(f"{mode}: {tokenizer.decode(tokens[0], skip_special_tokens=True)!r}")
