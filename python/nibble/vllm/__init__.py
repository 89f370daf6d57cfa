"""Nibble inside vLLM: runs ordinary AWQ checkpoints with Nibble's kernels. Nothing to import or to
call: vLLM finds it through the package nibble_vllm. docs/vllm.md says how to choose modes and what
is refused.
"""
