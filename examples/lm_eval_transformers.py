#!/usr/bin/env python3
"""lm-eval on a transformers model with Nibble's linears, a mode at a time. Its command line imports
nothing of ours, so the model is made here and handed over:

    python examples/lm_eval_transformers.py AWQ_DIR w4a16,w4a8 TEXT_FILE

TEXT_FILE stands for a data set, so that nothing is downloaded; give simple_evaluate the names of
lm-eval's own tasks instead.
"""

import json
import sys
import tempfile
from pathlib import Path

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

import nibble.transformers

TASK = """task: text_file
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{documents}"}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
"""

directory, modes, text_file = sys.argv[1:]
with tempfile.TemporaryDirectory() as folder:
    documents = Path(folder, "documents.jsonl")
    documents.write_text(json.dumps({"text": Path(text_file).read_text()[:3000]}) + "\n")
    Path(folder, "text_file.yaml").write_text(TASK.format(documents=documents))
    tasks = TaskManager(include_path=folder, include_defaults=False)
    for mode in modes.split(","):
        nibble.transformers.enable(mode)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        harness = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(directory),
                       batch_size=1, max_length=512)
        results = lm_eval.simple_evaluate(harness, tasks=["text_file"], task_manager=tasks)
        print(f"{mode}: {results['results']['text_file']['bits_per_byte,none']:.4f} bits per byte")
