"""What Nibble can run in this process: the library, the device, the kernels, the CPUs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from vllm.logger import init_logger
from vllm.platforms import current_platform

import nibble
from nibble._calls import plan
from nibble._library import lib, library_path
from nibble.modes import Spec
from nibble.torch.packing import FLOATS

logger = init_logger("vllm.nibble")  # vLLM shows only loggers below "vllm."

DECODE_ROWS, PREFILL_ROWS = 1, 512

said: set[str] = set()  # what this process has logged


def check_device() -> None:
    """Refuses the device that vLLM runs on if Nibble has no operators for it."""
    if not current_platform.is_cpu():
        raise ValueError(f"nibble: this plugin runs on CPUs, found {current_platform.device_type}; "
                         "--quantization awq runs the checkpoint by vLLM's own means")


def log_kernels(spec: Spec, n: int, k: int, group_size: int, dtype: torch.dtype) -> None:
    """Says, once per process and kernel, what runs linears of this spec. An error if nothing can:
    so a model that loads is one that runs."""
    names = []
    for rows in (DECODE_ROWS, PREFILL_ROWS):
        key = (rows, n, k, group_size, int(spec.product_mode), FLOATS[dtype], FLOATS[dtype],
               int(spec.granularity), not spec.symmetric, torch.get_num_threads())
        names.append(lib.nibble_plan_kernel(plan(key)[2]).decode())
    kernels = " and ".join(dict.fromkeys(names))
    line = (f"nibble {nibble.__version__} ({library_path()}) runs 4-bit linears in {spec} with "
            f"{kernels} on {torch.get_num_threads()} threads")
    if line not in said:
        said.add(line)
        logger.info(line)


@contextlib.contextmanager
def all_cpus() -> Iterator[None]:
    """Lets this thread run on all CPUs of the process. The threads of the library are started by
    the first call that needs them and inherit its mask; vLLM's binding of OpenMP threads leaves the
    main thread one CPU, on which they would all be."""
    own = os.sched_getaffinity(0)
    torch.zeros(1 << 18).add_(1)  # starts the OpenMP threads, which are bound to the others
    every = set(own)
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended
            every |= os.sched_getaffinity(int(task.name))
    os.sched_setaffinity(0, every)
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)
