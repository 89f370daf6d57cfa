"""What is kept of each command's output. Text in here is cleaned, numbers are finite or None."""

from dataclasses import dataclass, field


@dataclass
class Source:
    """Where a run comes from: what captions say, and the table "What ran where"."""

    file: str
    kind: str  # "verify", "perplexity", ...
    command: str = None
    device: str = None
    driver: str = None
    system: str = None
    threads: int = None
    cpu_mhz: float = None
    cpu_max_mhz: float = None
    version: str = None
    commit: str = None


@dataclass
class ModeCheck:
    """One mode of one layer of `verify`."""

    mode: str
    kernel: str
    activation: str
    passed: bool
    failures: list
    snr_fp16: float = None  # None: equal, or not measured
    snr_w4a16: float = None
    snr_exact: float = None
    rel_err: float = None
    cosine: float = None
    us: float = None
    speedup: float = None
    baseline: str = None


@dataclass
class LayerCheck:
    name: str
    k: int
    n: int
    group_size: int
    notes: list
    failures: list
    modes: dict  # mode -> ModeCheck
    block: int = None  # 3 of model.layers.3.mlp.up_proj
    kind: str = "other"  # up_proj


@dataclass
class VerifyRun:
    source: Source
    passed: int
    failed: int
    failures: list  # of the model as a whole
    layers: list
    directory: str = None
    reference: str = None
    rows: int = None
    input: str = None

    def modes(self):
        names = {mode for layer in self.layers for mode in layer.modes}
        return sorted(names, key=mode_order)


@dataclass
class Perplexity:
    """One mode on one text."""

    source: Source
    mode: str
    model: str = None
    text: str = None
    pooled: bool = False  # over all texts of a run
    reference: str = None
    setting: str = None  # what else makes runs comparable: context, types of cache and head
    tokens: int = None
    kernels: list = field(default_factory=list)
    values: dict = field(default_factory=dict)  # ppl, ppl_err, kld_mean, ... or None

    def get(self, key):
        return self.values.get(key)


@dataclass
class Speed:
    """One line of `bench model`."""

    source: Source
    test: str  # "pp512", "tg128"
    mode: str
    avg: float  # tokens/s
    stddev: float = None
    model: str = None
    batch: int = None
    threads: int = None
    kernels: list = field(default_factory=list)
    peak_bytes: float = None
    setting: str = None
    byte_limit_share: float = None  # of what the memory could at best deliver


@dataclass
class Gemm:
    """One line of `bench gemm`: a kernel of ours, or a peer."""

    source: Source
    name: str
    is_peer: bool
    mode: str
    m: int
    n: int
    k: int
    group_size: int
    us: float
    us_min: float = None
    us_max: float = None
    tops: float = None
    gb_per_s: float = None
    roofline_share: float = None
    read_gb_per_s: float = None
    speedup: float = None
    checked: bool = None

    def ops_per_byte(self):
        if not self.gb_per_s or self.tops is None:
            return None
        return 1000 * self.tops / self.gb_per_s


@dataclass
class PlanCell:
    mode: str
    detail: str = ""  # activation scales: "token", "group-asym clip 0.95", ...
    snr_db: float = None
    times: tuple = (None, None)  # us: decoding a token, a prompt
    choices: dict = field(default_factory=dict)  # name -> times


@dataclass
class Gate:
    title: str
    is_most: bool  # else the limit is the least
    limit: float
    value: float
    error: float
    met: bool


@dataclass
class PlanRun:
    """A mode for every slot of every decoder layer."""

    source: Source
    slots: list  # column names
    layers: list  # of dicts slot -> PlanCell
    gates: list = field(default_factory=list)
    facts: list = field(default_factory=list)  # (name, text)
    met: bool = None
    model: str = None


@dataclass
class Doctor:
    source: Source
    cpu: list  # (name, text)
    features: list  # (name, present, reason)
    kernels: list  # (name, mode, isa, runs here, reason)
    picked: list  # (mode, m, kernel)


@dataclass
class Inspect:
    source: Source
    directory: str = None
    facts: list = field(default_factory=list)  # (name, text)


@dataclass
class Runs:
    """Everything that was given, in the order of the files."""

    sources: list = field(default_factory=list)
    verify: list = field(default_factory=list)
    perplexity: list = field(default_factory=list)
    speed: list = field(default_factory=list)
    gemm: list = field(default_factory=list)
    plans: list = field(default_factory=list)
    doctor: list = field(default_factory=list)
    inspect: list = field(default_factory=list)
    failed_gates: list = field(default_factory=list)  # sentences of perplexity


# Order in tables and figures: from most to fewest bits of activation.
MODE_ORDER = ["16bit", "fp16", "w4a16", "w4a8-fp8", "w4a8", "w4a4", "auto", "plan"]


def base_mode(mode):
    """"w4a8" of "w4a8 token", which is how runs with other activation scales are told apart."""
    return mode.split(" ", 1)[0]


def mode_order(mode):
    base = base_mode(mode)
    return (MODE_ORDER.index(base) if base in MODE_ORDER else len(MODE_ORDER), mode)
