"""OpenVINO's compressed MatMul on the CPU: u4 weights with zero points and fp16 scales per group,
in the precisions that its CPU plugin offers. It holds an AWQ weight with fp16 scales exactly.
Needs the packages openvino and numpy."""

import numpy as np
import openvino
from openvino import opset13 as ops

from .arrays import ArrayPeer, pack_nibbles
from .worker import WAKE_SIZE, serve

# name: properties of the CPU plugin. With a dynamic quantization group, activations are int8.
TYPES = {
    "u4 x int8 g32": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 32, "INFERENCE_PRECISION_HINT": "f32"},
    "u4 x int8 g128": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 128, "INFERENCE_PRECISION_HINT": "f32"},
    "u4 x bf16": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, "INFERENCE_PRECISION_HINT": "bf16"},
    "u4 x fp32": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, "INFERENCE_PRECISION_HINT": "f32"},
}


def constant_u4(values):
    tensor = openvino.Tensor(openvino.Type.u4, values.shape)  # owns its memory
    tensor.data.reshape(-1)[:] = pack_nibbles(values.reshape(-1))
    return ops.constant(tensor)


class OpenVinoPeer(ArrayPeer):
    def start(self, threads):
        self.core = openvino.Core()
        self.properties = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1,
                           "PERFORMANCE_HINT": "LATENCY"}
        x = ops.parameter([-1, WAKE_SIZE], np.float32)
        w = ops.constant(np.zeros((WAKE_SIZE, WAKE_SIZE), np.float32))
        model = openvino.Model([ops.matmul(x, w, False, True)], [x])
        self.small = self.core.compile_model(model, "CPU", self.properties).create_infer_request()
        self.small_x = np.zeros((WAKE_SIZE, WAKE_SIZE), np.float32)

    def about(self):
        return {"name": "OpenVINO", "version": openvino.__version__,
                "library": openvino.__file__, "exact_awq": True,
                "features": self.core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")}

    def types(self):
        return {name: self.weight.bits(16) for name in TYPES}

    def make(self, type):
        w = self.weight
        codes = ops.convert(constant_u4(w.codes), np.float16)
        zeros = ops.convert(constant_u4(w.zeros[..., None]), np.float16)
        scales = ops.constant(w.scales[..., None].astype(np.float16))
        product = ops.multiply(ops.subtract(codes, zeros), scales)
        flat = ops.reshape(product, ops.constant(np.array([w.n, w.k])), False)
        x = ops.parameter([-1, w.k], np.float32)
        y = ops.matmul(x, ops.convert(flat, np.float32), False, True)
        model = openvino.Model([y], [x])
        compiled = self.core.compile_model(model, "CPU", {**self.properties, **TYPES[type]})
        request = compiled.create_infer_request()

        def multiply(values):
            return request.infer([values], share_inputs=True, share_outputs=True)[0]

        return multiply

    def wake(self):
        self.small.infer([self.small_x], share_inputs=True, share_outputs=True)


if __name__ == "__main__":
    serve(OpenVinoPeer)
