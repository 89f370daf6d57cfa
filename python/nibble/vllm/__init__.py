"""Nibble inside vLLM: a general plugin that runs ordinary AWQ checkpoints with Nibble's kernels.

Nothing to import or to call: vLLM finds `register` through the entry point "vllm.general_plugins" and
calls it in each of its processes. docs/vllm.md says how to choose modes and what is refused.

vLLM only logs a plugin whose import fails, and then runs the checkpoint by its own means. So this
module imports nothing; what can fail does so in `register`, or when a checkpoint is claimed, where
errors reach the user.
"""


def register() -> None:
    """Makes "nibble" a quantization method of this process. May be called again."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from nibble.vllm.config import NAME, NibbleConfig

    register_quantization_config(NAME)(NibbleConfig)
