"""ggml's public C API by ctypes: the few functions of ggml.h, ggml-backend.h and ggml-cpu.h that a
matrix product needs. Works with the shared libraries of any recent ggml."""

import ctypes
import pathlib
import sys
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p

from .worker import Refusal

F32 = 0
USAGE_WEIGHTS = 1  # enum ggml_backend_buffer_usage


class InitParams(ctypes.Structure):  # struct ggml_init_params
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


class TypeTraits(ctypes.Structure):  # struct ggml_type_traits, as far as to_float
    _fields_ = [
        ("type_name", c_char_p),
        ("blck_size", c_int64),
        ("blck_size_interleave", c_int64),
        ("type_size", c_size_t),
        ("is_quantized", c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)),
    ]


class Feature(ctypes.Structure):  # struct ggml_backend_feature
    _fields_ = [("name", c_char_p), ("value", c_char_p)]


LogCallback = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
LOG_WARN = 3  # enum ggml_log_level; below it a line for each copy of a weight


@LogCallback
def log(level, text, _):
    if level >= LOG_WARN:
        sys.stderr.write(text.decode(errors="replace"))


BASE = {  # libggml-base: name -> (result, arguments)
    "ggml_log_set": (None, [LogCallback, c_void_p]),
    "ggml_version": (c_char_p, []),
    "ggml_init": (c_void_p, [InitParams]),
    "ggml_free": (None, [c_void_p]),
    "ggml_tensor_overhead": (c_size_t, []),
    "ggml_graph_overhead": (c_size_t, []),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_new_graph": (c_void_p, [c_void_p]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_nbytes": (c_size_t, [c_void_p]),
    "ggml_row_size": (c_size_t, [c_int, c_int64]),
    "ggml_blck_size": (c_int64, [c_int]),
    "ggml_type_name": (c_char_p, [c_int]),
    "ggml_get_type_traits": (POINTER(TypeTraits), [c_int]),
    "ggml_quantize_requires_imatrix": (c_bool, [c_int]),
    "ggml_quantize_init": (None, [c_int]),
    "ggml_quantize_chunk": (
        c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, POINTER(c_float)]),
    "ggml_backend_reg_dev_get": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_backend_buffer_get_base": (c_void_p, [c_void_p]),
    "ggml_backend_buffer_set_usage": (None, [c_void_p, c_int]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_alloc_buffer": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_tensor_alloc": (c_int, [c_void_p, c_void_p, c_void_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_tensor_get": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_supports_op": (c_bool, [c_void_p, c_void_p]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
}
CPU = {  # libggml-cpu
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_cpu_reg": (c_void_p, []),
    "ggml_backend_cpu_buffer_type": (c_void_p, []),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
    "ggml_backend_cpu_set_threadpool": (None, [c_void_p, c_void_p]),
    "ggml_threadpool_new": (c_void_p, [c_void_p]),
}
POOL_PARAMS = "ggml_threadpool_params_init"
POOL_PARAMS_BYTES = 4096  # struct ggml_threadpool_params is smaller


def find(directory, name):
    """lib<name>.so, or one with a version; beside each other or in bin/, lib/, lib64/."""
    for place in (".", "bin", "lib", "lib64"):
        for path in sorted((pathlib.Path(directory) / place).glob(f"lib{name}.so*")):
            return path.resolve()
    raise Refusal(f"no lib{name}.so in {directory}, nor in its bin, lib or lib64")


class Library:
    """All functions of BASE and CPU as attributes, and the path they came from."""

    def __init__(self, directory):
        for name, functions in (("ggml-base", BASE), ("ggml-cpu", CPU)):
            path = find(directory, name)
            try:
                library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
                for function, (result, arguments) in functions.items():
                    bound = getattr(library, function)
                    bound.restype, bound.argtypes = result, arguments
                    setattr(self, function, bound)
                if name == "ggml-base":
                    self.path = str(path)
                    self.init_pool_params = getattr(library, POOL_PARAMS)
                    self.init_pool_params.restype = None
                    self.init_pool_params.argtypes = [c_void_p, c_int]
            except (OSError, AttributeError) as error:
                raise Refusal(f"{path}: {error}") from None
        self.ggml_log_set(log, None)

    def context(self, tensors, graph=False):
        size = (tensors + 1) * self.ggml_tensor_overhead()
        size += self.ggml_graph_overhead() if graph else 0
        return self.ggml_init(InitParams(size, None, True))

    def registered(self, name):
        """A function that the CPU backend offers by name, or None."""
        address = self.ggml_backend_reg_get_proc_address(self.ggml_backend_cpu_reg(), name)
        return address or None

    def features(self):
        """What its CPU code was built with: ["AVX2", "AVX512_VNNI", ...]."""
        address = self.registered(b"ggml_backend_get_features")
        if address is None:
            return []
        listed = ctypes.CFUNCTYPE(POINTER(Feature), c_void_p)(address)(self.ggml_backend_cpu_reg())
        names = []
        for feature in listed:
            if not feature.name:
                return names
            if feature.value != b"0":
                names.append(feature.name.decode())

    def buffer_types(self):
        """{name: where weights can be put}: plain CPU memory, and the repacking ones."""
        found = [self.ggml_backend_cpu_buffer_type()]
        address = self.registered(b"ggml_backend_dev_get_extra_bufts")
        if address is not None:
            device = self.ggml_backend_reg_dev_get(self.ggml_backend_cpu_reg(), 0)
            extra = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(device)
            index = 0
            while extra[index]:
                found.append(extra[index])
                index += 1
        return {self.ggml_backend_buft_name(kind).decode(): kind for kind in found}
