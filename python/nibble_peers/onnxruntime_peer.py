"""ONNX Runtime's MatMulNBits: 4-bit weights with zero points, in int8 or fp32 arithmetic. It holds
an AWQ weight exactly. Needs the packages onnxruntime, onnx and numpy."""

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from .arrays import ArrayPeer, pack_nibbles
from .worker import WAKE_SIZE, serve

# name: the operator's accuracy_level (4: activations quantized to int8; 1: fp32)
TYPES = {"u4 x int8": 4, "u4 x fp32": 1}


def session_of(graph):
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False  # one pool for all copies of the weight
    model = helper.make_model(graph, ir_version=10, opset_imports=[
        helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)])
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def graph_of(node, n, k, constants):
    return helper.make_graph(
        [node], "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", n])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()])


class OnnxRuntimePeer(ArrayPeer):
    def start(self, threads):
        onnxruntime.set_global_thread_pool_sizes(threads, 1)
        node = helper.make_node("MatMul", ["x", "w"], ["y"])
        weight = np.zeros((WAKE_SIZE, WAKE_SIZE), np.float32)
        self.small = session_of(graph_of(node, WAKE_SIZE, WAKE_SIZE, {"w": weight}))
        self.small_x = np.zeros((WAKE_SIZE, WAKE_SIZE), np.float32)

    def about(self):
        return {"name": "ONNX Runtime MatMulNBits", "version": onnxruntime.__version__,
                "library": onnxruntime.__file__, "exact_awq": True}

    def types(self):
        sizes = (16, 32, 64, 128, 256)  # that the operator takes
        fits = self.weight.group_size in sizes
        return {name: self.weight.bits(32) for name in TYPES} if fits else {}

    def make(self, type):
        w = self.weight
        node = helper.make_node(
            "MatMulNBits", ["x", "codes", "scales", "zeros"], ["y"], domain="com.microsoft",
            K=w.k, N=w.n, bits=4, block_size=w.group_size, accuracy_level=TYPES[type])
        session = session_of(graph_of(node, w.n, w.k, {
            "codes": pack_nibbles(w.codes), "scales": w.scales, "zeros": pack_nibbles(w.zeros)}))
        return lambda x: session.run(None, {"x": x})[0]

    def wake(self):
        self.small.run(None, {"x": self.small_x})


if __name__ == "__main__":
    serve(OnnxRuntimePeer)
