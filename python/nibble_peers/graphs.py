"""A worker for a library that torch can launch on a GPU: all but the library itself.

Weights are cold because every launch of a CUDA graph takes the next of many copies; a time is that
of a graph by events, over its launches.
"""

import statistics

import numpy as np
import torch

from .worker import PROTOCOL, Refusal

COLD_BYTES = 300_000_000  # far more than an L2 holds
GRAPH_US = 3000  # of one graph: long against its own start
LOOK_US, LOOKS = 700, 5  # the same where candidates are told apart, and how often
MOST_LAUNCHES = 2000
FP8_MOST = 448.0


class Checkpoint:
    """The tensors of an AWQ checkpoint, as they are: qweight (k, n / 8), qzeros (groups, n / 8) of
    int32, scales (groups, n) of float16; on the GPU."""

    def __init__(self, n, k, group_size, files):
        self.n, self.k, self.group_size, self.groups = n, k, group_size, k // group_size

        def read(name, dtype, shape):
            return torch.from_numpy(np.fromfile(files[name], dtype).reshape(shape)).cuda()

        self.qweight = read("qweight", np.int32, (k, n // 8))
        self.qzeros = read("qzeros", np.int32, (self.groups, n // 8))
        self.scales = read("scales", np.float16, (self.groups, n))

    @property
    def bytes(self):
        return sum(t.numel() * t.element_size() for t in (self.qweight, self.qzeros, self.scales))

    @property
    def bits(self):
        return 8 * self.bytes / (self.n * self.k)


class Activations:
    """x (m, k) as a kernel takes it: `codes`, and `scales` (m, 1) of float32, or None."""

    def __init__(self, x, kind):
        self.codes, self.scales = x, None
        if kind == "16bit":
            return
        most = 127.0 if kind == "int8" else FP8_MOST
        largest = x.float().abs().amax(dim=1, keepdim=True)
        self.scales = torch.where(largest > 0, largest / most, torch.ones_like(largest))
        values = x.float() / self.scales
        self.codes = (values.round().to(torch.int8) if kind == "int8"
                      else values.to(torch.float8_e4m3fn))


class Graph:
    """Launches in turn over all copies, for about `microseconds`."""

    def __init__(self, launch, copies, microseconds):
        self.keeps = launch, copies  # what the graph reads and writes
        launch(copies[0])
        torch.cuda.synchronize()
        once = self.capture(launch, copies, 1)
        once.replay()
        us = max(0.5, self.time(once, len(copies)))
        turns = int(max(1, min(microseconds / us, MOST_LAUNCHES) // len(copies)))
        self.launches = turns * len(copies)
        self.graph = once if turns == 1 else self.capture(launch, copies, turns)

    @staticmethod
    def capture(launch, copies, turns):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(turns):
                for copy in copies:
                    launch(copy)
        return graph

    @staticmethod
    def time(graph, launches):
        """Microseconds of one launch."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1000 / launches

    def run(self):
        return self.time(self.graph, self.launches)


class GraphPeer:
    """What a subclass adds: about(); types() -> {name: kind of activations: "16bit", "int8" or
    "e4m3"}; make(type) -> one copy of the weight; candidates(type, m) -> {name: launch(copy,
    activations, y)}, of which the fastest is taken: some libraries' own choice is far from it."""

    output = torch.float16

    def hello(self, threads):
        del threads
        if not torch.cuda.is_available():
            raise Refusal("torch finds no GPU")
        properties = torch.cuda.get_device_properties(0)
        return {"protocol": PROTOCOL, "device": "cuda", "gpu": properties.name, "exact_awq": True,
                **self.about()}

    def prepare(self, n, k, group_size, checkpoint):
        self.copies, self.inputs, self.products, self.chosen = {}, {}, {}, {}
        torch.cuda.empty_cache()
        self.weight = Checkpoint(n, k, group_size, checkpoint)
        return {"types": [{"type": name, "bits_per_weight": self.weight.bits, "activations": kind}
                          for name, kind in self.types().items()]}

    def hold(self, type, bytes):
        copies = self.copies.setdefault(type, [])
        while len(copies) < max(2, -(-bytes // self.weight.bytes)):
            copies.append(self.make(type))
        return {"copies": len(copies)}

    def input(self, m, path):
        if m not in self.inputs:
            x = np.fromfile(path, np.float32).reshape(m, self.weight.k)
            self.inputs = {m: torch.from_numpy(x).cuda().to(self.output)}  # the others are past
            self.products = {}
        return self.inputs[m]

    @staticmethod
    def fastest(launches, copies):
        """In turn, because a GPU that works at its power cap slows them down by different amounts,
        and all but the first round, when it does not yet."""
        graphs = {name: Graph(launch, copies, LOOK_US) for name, launch in launches.items()}
        rounds = [{name: graph.run() for name, graph in graphs.items()} for _ in range(LOOKS + 1)]
        looks = {name: statistics.median(round[name] for round in rounds[1:]) for name in graphs}
        return min(looks, key=looks.get), looks

    def product(self, type, m, path):
        """(graph, y) of the fastest candidate, found when a type and an M are first met."""
        x = self.input(m, path)
        if type not in self.products:
            self.hold(type, COLD_BYTES)
            activations = Activations(x, self.types()[type])
            y = torch.zeros((m, self.weight.n), dtype=self.output, device="cuda")

            def bind(launch):
                return lambda copy: launch(copy, activations, y)

            launches = {name: bind(launch) for name, launch in self.candidates(type, m).items()}
            name, looks = self.fastest(launches, self.copies[type])
            self.chosen[type, m] = {"candidate": name, "looks": looks}
            self.products[type] = Graph(launches[name], self.copies[type], GRAPH_US), y
        return self.products[type]

    def check(self, type, m, x, y, rows, columns):
        graph, result = self.product(type, m, x)
        result.zero_()
        graph.run()
        values = result[torch.tensor(rows).cuda()][:, torch.tensor(columns).cuda()]
        values.float().cpu().numpy().tofile(y)
        return self.chosen[type, m]

    def run(self, type, m, x, repetitions):
        graph, _ = self.product(type, m, x)
        graph.run()  # untimed: clocks, caches of instructions and translations after the others
        return {"us": [graph.run() for _ in range(repetitions)]}
