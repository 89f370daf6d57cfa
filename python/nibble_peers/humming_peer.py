"""humming-kernels on the GPU: ordinary AWQ checkpoints by its own conversion, exact (its group
scales as they are, not rounded to int16), f16 outputs.

    python -m nibble_peers.humming_peer compile NxK,... M,...    kernels into its cache beforehand

It compiles a kernel for every tile when it is first used. Needs the packages humming-kernels and
torch (with a GPU), and what they need.
"""

import concurrent.futures
import os
import sys

os.environ.setdefault("HUMMING_DISABLE_PARALLEL_BUILD", "1")  # nothing behind our back

import humming
import torch
from humming import ops
from humming.config import LayerConfig
from humming.kernel.humming import HummingKernel
from humming.schema.awq import AWQWeightSchema
from humming.transform import transform_humming_tensors

from .graphs import GraphPeer
from .humming_tiles import tiles_for
from .worker import Refusal, serve

# activations of a type, in its words and ours
TYPES = {"w4a8 int8": ("int8", "int8"), "w4a8 e4m3": ("float8e4m3", "e4m3"),
         "w4a16": ("float16", "16bit")}
COMPUTE = {"gemm_type": "dense"}
LOCKS = 8192


def layer_of(type, n, k, group_size):
    return LayerConfig(
        shape_n=n, shape_k=k, a_dtype=TYPES[type][0], b_dtype="uint4", c_dtype="float16",
        bs_dtype="float16", weight_scale_group_size=group_size, has_zero_point=True,
        use_int_weight_scale=False)


def build(layer, tile):
    """humming's handle for a kernel; None where it refuses the tile."""
    values = {name: value for name, value in tile.items() if name != "use_f16_accum"}
    try:
        with torch.cuda.device(0):
            return HummingKernel.prepare_kernels(layer.to_str(), COMPUTE, values, device=0)
    except (AssertionError, ValueError, RuntimeError) as error:
        print(f"humming refuses {tile}: {error}", file=sys.stderr)
        return None


class HummingPeer(GraphPeer):
    def about(self):
        return {"name": "humming-kernels", "version": humming.__version__,
                "library": humming.__file__, "features": [f"torch {torch.__version__}"]}

    def types(self):
        return {name: kind for name, (_, kind) in TYPES.items()}

    def prepare(self, n, k, group_size, checkpoint):
        if group_size != 128:
            raise Refusal(f"group size {group_size}: this worker knows tiles for 128")
        self.layers = {type: layer_of(type, n, k, group_size) for type in TYPES}
        self.locks = torch.zeros(LOCKS, dtype=torch.int32, device="cuda")
        return super().prepare(n, k, group_size, checkpoint)

    def make(self, type):
        w = self.weight
        schema = AWQWeightSchema(bits=4, group_size=w.group_size, zero_point=True)
        tensors = {"qweight": w.qweight, "qzeros": w.qzeros, "scales": w.scales}
        _, tensors = schema.convert_humming(
            tensors=tensors, shape_n_stacks=[w.n], shape_k_stacks=[w.k],
            param_dtype=torch.float16, convert_symmetric_integer=False)
        return transform_humming_tensors(self.layers[type], tensors)

    def candidates(self, type, m):
        tiles = tiles_for(self.layers[type], m)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            handles = list(pool.map(lambda tile: build(self.layers[type], tile), tiles.values()))
        launches = {name: self.launch_of(handle)
                    for name, handle in zip(tiles, handles) if handle is not None}
        if not launches:
            raise Refusal(f"humming has no kernel for {type} at M={m}")
        return launches

    def launch_of(self, handle):
        def launch(weight, activations, y):
            ops.launch_kernel(configs=handle, inputs=activations.codes, outputs=y,
                              input_scale=activations.scales, locks=self.locks, **weight)
        return launch


def compile_all(shapes, rows):
    """Every kernel that candidates() will ask for, as many at once as there are CPUs."""
    jobs = {}
    for n, k in shapes:
        for type in TYPES:
            layer = layer_of(type, n, k, 128)
            for m in rows:
                for tile in tiles_for(layer, m).values():
                    jobs[layer.to_str(), str(sorted(tile.items()))] = layer, tile
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        made = list(pool.map(lambda job: build(*job), jobs.values()))
    print(f"{sum(handle is not None for handle in made)} of {len(made)} kernels", file=sys.stderr)


def main(words):
    if not words:
        return serve(HummingPeer)
    if len(words) != 3 or words[0] != "compile":
        sys.exit(__doc__)
    try:
        shapes = [tuple(map(int, shape.split("x"))) for shape in words[1].split(",")]
        rows = [int(m) for m in words[2].split(",")]
    except ValueError:
        sys.exit(__doc__)
    if any(len(shape) != 2 for shape in shapes):
        sys.exit(__doc__)
    return compile_all(shapes, rows)


if __name__ == "__main__":
    main(sys.argv[1:])
