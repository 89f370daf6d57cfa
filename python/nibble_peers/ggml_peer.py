"""ggml's CPU matrix products: every 4-bit type in every kind of buffer that takes it.

    python -m nibble_peers.ggml_peer DIRECTORY_OF_LIBGGML
"""

import concurrent.futures
import ctypes
import mmap
import sys
import time

from .ggml_library import F32, POOL_PARAMS_BYTES, USAGE_WEIGHTS, Library
from .worker import PROTOCOL, WAKE_SIZE, Refusal, serve, wake_threads

# enum ggml_type: numbers that files hold, so they do not change
TYPES = {"q4_0": 2, "q4_1": 3, "q4_K": 12, "iq4_nl": 20, "iq4_xs": 23, "mxfp4": 39}
CHUNK_ROWS = 64  # quantized by one call


def map_file(path):
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def address_of(mapped):
    return ctypes.addressof(ctypes.c_char.from_buffer(mapped))


class Weight:
    """One copy of the weight in one buffer type."""

    def __init__(self, ggml, buffer_type, type_id, n, k):
        self.ggml = ggml
        self.context = ggml.context(1)
        self.tensor = ggml.ggml_new_tensor_2d(self.context, type_id, k, n)
        self.buffer = ggml.ggml_backend_alloc_ctx_tensors_from_buft(self.context, buffer_type)
        if not self.buffer:
            raise Refusal("no memory for a weight")
        ggml.ggml_backend_buffer_set_usage(self.buffer, USAGE_WEIGHTS)

    def fill(self, quantized):
        size = self.ggml.ggml_nbytes(self.tensor)
        self.ggml.ggml_backend_tensor_set(self.tensor, quantized, 0, size)

    def free(self):
        self.ggml.ggml_backend_buffer_free(self.buffer)
        self.ggml.ggml_free(self.context)


class Product:
    """y = W x of one M, with one graph a copy of W; x and y lie in one plain buffer."""

    def __init__(self, ggml, backend, weights, n, k, m):
        self.ggml, self.n, self.m, self.next = ggml, n, m, 0
        x_bytes = -(-4 * m * k // 4096) * 4096
        self.buffer = ggml.ggml_backend_alloc_buffer(backend, x_bytes + 4 * m * n + 4096)
        base = -(-ggml.ggml_backend_buffer_get_base(self.buffer) // 64) * 64
        self.contexts, self.outputs, self.graphs = [], [], []
        for weight in weights:
            context = ggml.context(2, graph=True)
            x = ggml.ggml_new_tensor_2d(context, F32, k, m)
            y = ggml.ggml_mul_mat(context, weight, x)
            graph = ggml.ggml_new_graph(context)
            ggml.ggml_build_forward_expand(graph, y)
            ggml.ggml_backend_tensor_alloc(self.buffer, x, base)
            ggml.ggml_backend_tensor_alloc(self.buffer, y, base + x_bytes)
            self.contexts.append(context)
            self.outputs.append(y)
            self.graphs.append(graph)
        self.x = x

    def set_x(self, mapped):
        self.ggml.ggml_backend_tensor_set(self.x, address_of(mapped), 0, len(mapped))

    def next_graph(self):
        self.next = (self.next + 1) % len(self.graphs)
        return self.graphs[self.next]

    def result(self):
        y = ctypes.create_string_buffer(4 * self.m * self.n)
        output = self.outputs[self.next]
        self.ggml.ggml_backend_tensor_get(output, ctypes.addressof(y), 0, len(y))
        return y.raw

    def free(self):
        for context in self.contexts:
            self.ggml.ggml_free(context)
        self.ggml.ggml_backend_buffer_free(self.buffer)


class GgmlPeer:
    def __init__(self, directory):
        self.ggml = Library(directory)
        self.buffer_types = self.ggml.buffer_types()
        self.copies, self.products, self.quantized = {}, {}, {}

    def hello(self, threads):
        ggml, self.threads = self.ggml, threads
        self.backend = ggml.ggml_backend_cpu_init()
        ggml.ggml_backend_cpu_set_n_threads(self.backend, threads)
        # A build without OpenMP would else start its threads anew for every product.
        params = ctypes.create_string_buffer(POOL_PARAMS_BYTES)
        ggml.init_pool_params(params, threads)
        pool = ggml.ggml_threadpool_new(params)
        ggml.ggml_backend_cpu_set_threadpool(self.backend, pool)
        self.wake = self.small_product()
        return {"protocol": PROTOCOL, "name": "ggml", "device": "cpu",
                "version": ggml.ggml_version().decode(), "library": ggml.path,
                "features": ggml.features(), "exact_awq": False}

    def small_product(self):
        """For wake_threads: as one node of a model finds the threads awake from the one before."""
        plain = self.buffer_types["CPU"]
        weight = Weight(self.ggml, plain, F32, WAKE_SIZE, WAKE_SIZE)
        weight.fill(bytes(4 * WAKE_SIZE * WAKE_SIZE))
        product = Product(self.ggml, self.backend, [weight.tensor], WAKE_SIZE, WAKE_SIZE, WAKE_SIZE)
        zeros = mmap.mmap(-1, 4 * WAKE_SIZE * WAKE_SIZE)
        product.set_x(zeros)
        return product

    def compute(self, graph):
        status = self.ggml.ggml_backend_graph_compute(self.backend, graph)
        if status != 0:
            raise Refusal(f"ggml_backend_graph_compute returned {status}")

    def prepare(self, n, k, group_size, weights):
        """Takes the next shape; answers which types hold it, and where."""
        del group_size  # these types have blocks of their own
        self.forget()
        self.n, self.k = n, k
        self.values = map_file(weights["values"])
        offered = []
        for name, type_id in TYPES.items():
            for where, buffer_type in self.buffer_types.items():
                if self.takes(type_id, name, buffer_type):
                    bits = self.ggml.ggml_row_size(type_id, k) * 8 / k
                    offered.append({"type": f"{name}/{where}", "bits_per_weight": bits})
        return {"types": offered}

    def forget(self):
        for product in self.products.values():
            product.free()
        for copies in self.copies.values():
            for weight in copies:
                weight.free()
        self.copies, self.products, self.quantized = {}, {}, {}

    def takes(self, type_id, name, buffer_type):
        ggml = self.ggml
        if ggml.ggml_type_name(type_id).decode().lower() != name.lower():
            return False  # a ggml from before this type
        if self.k % ggml.ggml_blck_size(type_id) != 0:
            return False
        if ggml.ggml_quantize_requires_imatrix(type_id):
            return False
        weight = Weight(ggml, buffer_type, type_id, self.n, self.k)
        context = ggml.context(2)
        x = ggml.ggml_new_tensor_2d(context, F32, self.k, 1)
        taken = ggml.ggml_backend_supports_op(
            self.backend, ggml.ggml_mul_mat(context, weight.tensor, x))
        ggml.ggml_free(context)
        weight.free()
        return taken

    def quantize(self, name):
        """The weight in ggml's own layout of type `name`, made once a shape."""
        if name not in self.quantized:
            ggml, type_id = self.ggml, TYPES[name]
            size = self.n * ggml.ggml_row_size(type_id, self.k)
            out = mmap.mmap(-1, size)
            source, target = address_of(self.values), address_of(out)
            ggml.ggml_quantize_init(type_id)

            def rows_from(row):
                rows = min(CHUNK_ROWS, self.n - row)
                ggml.ggml_quantize_chunk(type_id, source, target, row * self.k, rows, self.k, None)

            with concurrent.futures.ThreadPoolExecutor(self.threads) as pool:
                list(pool.map(rows_from, range(0, self.n, CHUNK_ROWS)))
            self.quantized[name] = out
        return self.quantized[name]

    def weights_of(self, type):
        if type not in self.copies:
            self.hold(type, 0)
        return [weight.tensor for weight in self.copies[type]]

    def hold(self, type, bytes):
        """Makes copies of the weight until they take `bytes`, so that no cache holds them all."""
        name, where = type.split("/")
        quantized = self.quantize(name)
        copies = self.copies.setdefault(type, [])
        count = max(2, -(-bytes // len(quantized)))
        for _ in range(len(copies), count):
            weight = Weight(self.ggml, self.buffer_types[where], TYPES[name], self.n, self.k)
            weight.fill(address_of(quantized))
            copies.append(weight)
        for key in [key for key in self.products if key[0] == type]:
            self.products.pop(key).free()  # its graphs know the copies of before
        return {"copies": len(copies)}

    def dequantize(self, type, path):
        """Writes the weight as this type holds it, as floats (n, k): what its products are of."""
        name = type.split("/")[0]
        quantized = self.quantize(name)
        to_float = self.ggml.ggml_get_type_traits(TYPES[name]).contents.to_float
        row_bytes = self.ggml.ggml_row_size(TYPES[name], self.k)
        with open(path, "w+b") as file:
            file.truncate(4 * self.n * self.k)
            with mmap.mmap(file.fileno(), 0) as out:
                source, target = address_of(quantized), address_of(out)
                for row in range(self.n):
                    to_float(source + row * row_bytes, target + 4 * row * self.k, self.k)
        return {}

    def product(self, type, m, x):
        if (type, m) not in self.products:
            made = Product(self.ggml, self.backend, self.weights_of(type), self.n, self.k, m)
            made.set_x(map_file(x))
            self.products[type, m] = made
        return self.products[type, m]

    def check(self, type, m, x, y):
        product = self.product(type, m, x)
        self.compute(product.next_graph())
        with open(y, "wb") as file:
            file.write(product.result())
        return {}

    def run(self, type, m, x, repetitions):
        product = self.product(type, m, x)
        microseconds = []
        for _ in range(repetitions):
            wake_threads(lambda: self.compute(self.wake.next_graph()))
            graph = product.next_graph()
            start = time.perf_counter_ns()
            self.compute(graph)
            microseconds.append((time.perf_counter_ns() - start) / 1000)
        return {"us": microseconds}


if __name__ == "__main__":
    serve(lambda: GgmlPeer(sys.argv[1]))
