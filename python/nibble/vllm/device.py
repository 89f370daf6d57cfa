"""What Nibble can run in this process: the library, the device, the kernels."""

from __future__ import annotations

from vllm.logger import init_logger
from vllm.platforms import current_platform

logger = init_logger("vllm.nibble")  # vLLM shows loggers below "vllm." only


def check_device():
    import nibble.torch

def log_first_use(text):
    logger.info_once(text)
