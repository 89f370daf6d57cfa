"""The entry point by which vLLM finds Nibble ("vllm.general_plugins"); the plugin is nibble.vllm.

A package of its own, because vLLM only logs a plugin whose import fails, and then runs AWQ
checkpoints by its own means. This import cannot fail; what is wrong (no libnibble.so, a vLLM whose
interfaces have changed) is raised by `register`, and stops vLLM.
"""


def register() -> None:
    """Makes "nibble" a quantization method of this process. vLLM calls it in each of its processes,
    perhaps more than once."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from nibble.vllm.config import NAME, NibbleConfig

    register_quantization_config(NAME)(NibbleConfig)
