"""What a training will need, before any of it is held: memory a device, images a second, days, goodput.

Pure arithmetic on the shape of the model, the recipe and the data sheets of devices; imports no torch. Every number
that is not counted but assumed is a field of `Assumptions`, and `mixer plan` prints them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from data_tools.errors import UserError
from pipeline.model.flops import ModelCost, peak_flops
from pipeline.model.variants import MixerSpec

GIB = 1 << 30
BUCKET = 4 * 5e8  # bytes: DeepSpeed allocates reduce_bucket_size elements, whatever the model's size
STRATEGIES = ("ddp", "fsdp", "hsdp", "zero1", "zero2", "zero3")


@dataclass(frozen=True)
class Device:
    """An accelerator as its data sheet has it. network: bytes/s of one node, links: bytes/s of one GPU in it."""

    name: str  # as `torch.cuda.get_device_name()` would say
    memory: float  # bytes
    links: float
    network: float
    a_node: int = 8


# Memory: what torch reports, a little less than the name says. Links (one direction of NVLink; else PCIe 4.0 x16) by
# NVIDIA's data sheets. Network as the vendor's reference system is built: DGX H100, H200, B200 8 x 400 Gbit/s a node,
# A100 8 x 200; 100 Gbit/s elsewhere.
DEVICES = {
    "b200": Device("NVIDIA B200", 178 * GIB, 900e9, 400e9),
    "h200": Device("NVIDIA H200", 139 * GIB, 450e9, 400e9),
    "h100": Device("NVIDIA H100 80GB HBM3", 79 * GIB, 450e9, 400e9),
    "a100": Device("NVIDIA A100-SXM4-80GB", 79 * GIB, 300e9, 200e9),
    "a100-40": Device("NVIDIA A100-SXM4-40GB", 39 * GIB, 300e9, 200e9),
    "l40s": Device("NVIDIA L40S", 44 * GIB, 32e9, 12.5e9),
    "a10": Device("NVIDIA A10", 22 * GIB, 32e9, 12.5e9),
    "l4": Device("NVIDIA L4", 22 * GIB, 32e9, 12.5e9),
    "rtx4090": Device("NVIDIA GeForce RTX 4090", 23 * GIB, 32e9, 12.5e9),
}


@dataclass(frozen=True)
class Assumptions:
    """What is not counted. Where a figure is somebody's measurement, it says whose."""

    mfu_eager: float = 0.30  # of the GEMMs' FLOPs at peak; a guess until measured on your GPU
    mfu_compiled: float = 0.45  # with train.compile=block
    link_use: float = 0.7  # share of the links' and the network's bandwidth that collectives reach
    overlap: float = 0.8  # share of the backward pass under which communication hides
    usable: float = 0.92  # of a device's memory; the rest goes to fragmentation
    context: float = 1.5e9  # bytes: CUDA context, cuBLAS workspaces, NCCL buffers
    # Llama 3 405B (arXiv 2407.21783, section 3.3.4): 419 unexpected interruptions in 54 days on 16,384 H100s
    gpu_hours_a_failure: float = 16384 * 54 * 24 / 419
    down_s: float = 600.0  # from a failure to the first new step: noticing, queueing, starting, loading
    save_stall_s: float = 0.2  # training stands still so long at a save (it is written in the background)


@dataclass(frozen=True)
class Setting:
    """The parts of a recipe and of a cluster that matter here."""

    spec: MixerSpec
    image_size: tuple[int, int]
    num_classes: int
    cost: ModelCost
    strategy: str
    global_batch_size: int
    micro_batch_size: int
    nodes: int
    gpus_per_node: int
    precision: str = "bf16"
    compile: str = "none"
    activation_checkpointing: str = "none"
    reshard_after_forward: bool = True
    shard_size: int | None = None
    ema: bool = False
    moments: int = 2  # copies: adamw 2, sgd 1
    cuda: bool = True  # False: on the CPU, where autocast leaves LayerNorm in bf16 (tests measure it there)

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def micro_steps(self) -> int:
        return math.ceil(math.ceil(self.global_batch_size / self.ranks) / self.micro_batch_size)

    @property
    def tokens(self) -> int:
        p = self.spec.patch_size
        return (self.image_size[0] // p) * (self.image_size[1] // p)

    @property
    def _copy(self) -> int:
        """Ranks that share one copy of the state."""
        return (self.shard_size or self.gpus_per_node) if self.strategy == "hsdp" else self.ranks


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak of a step."""

    weights: float
    gradients: float
    moments: float
    ema: float
    buffers: float  # communication, gathered weights, casts
    activations: float
    work: float  # what the backward pass holds besides

    @property
    def total(self) -> float:
        parts = (self.weights, self.gradients, self.moments, self.ema, self.buffers, self.activations, self.work)
        return sum(parts)


def memory(s: Setting) -> Memory:
    """Of the fullest rank, without the device's context. docs/plan.md says where each part comes from."""
    n, r = s.cost.parameters, s._copy
    block = _block_parameters(s)
    shared = n / r
    whole = s.strategy in ("ddp", "zero1", "zero2")
    weights = 4 * (n if whole else shared)
    gradients = 4 * (n if s.strategy in ("ddp", "zero1") else shared)
    moments = 4 * s.moments * (n if s.strategy == "ddp" else shared)
    half = 2 if s.precision == "bf16" else 4
    buffers = 0.0
    if s.strategy == "ddp":
        buffers += 4 * n if s.ranks > 1 else 0  # the reducer's buckets
    elif s.strategy in ("fsdp", "hsdp"):
        gathered = 2 * block + (n - block * s.spec.num_blocks) if s.reshard_after_forward else n
        buffers += half * gathered + 4 * 2 * block  # and the gradients of two blocks before they are scattered
    elif s.strategy in ("zero1", "zero2"):
        weights += 4 * shared  # the optimizer's own copy of its part
        buffers += BUCKET * (2 if s.cuda else 1)  # two of them where communication overlaps
    else:
        buffers += 4 * min(n, 1e9) + BUCKET  # stage3_max_live_parameters
    if s.precision == "bf16" and s.strategy not in ("fsdp", "hsdp"):
        buffers += _cast_weights(s)
    return Memory(
        weights,
        gradients,
        moments,
        4 * shared * (r if s.strategy == "ddp" else 1) if s.ema else 0.0,
        buffers,
        s.micro_batch_size * activation_bytes(s),
        s.micro_batch_size * work_bytes(s),
    )


def activation_bytes(s: Setting) -> float:
    """What the forward pass of one image leaves for the backward pass.

    A block keeps the inputs and outputs of its two LayerNorms (S x C each), of its first and second linear maps around
    each GELU (C x D_S and S x D_C, twice), and two statistics a token. Autocast on CUDA runs LayerNorm in fp32, so its
    input is kept in 4 bytes. compile=block fuses norms and GELUs and computes them again: only GEMMs' inputs are kept.
    """
    t, c = s.tokens, s.spec.hidden_dim
    a, tok, ch = t * c, c * s.spec.tokens_mlp_dim, t * s.spec.channels_mlp_dim
    half = 2 if s.precision == "bf16" else 4
    norm_in = 4 if s.precision == "fp32" or s.cuda else 2
    statistics = 8 * t
    if s.compile == "none":
        block = 2 * (norm_in + half) * a + 2 * half * (tok + ch) + 2 * statistics
    else:
        block = 4 * half * a + half * (tok + ch) + 2 * statistics
    kept = {
        "none": block,
        "block": half * a,
        "selective": half * a + half * (2 * a + tok + ch),  # what GEMMs gave
    }[s.activation_checkpointing]
    patches = half * t * s.spec.in_chans * s.spec.patch_size**2
    head = norm_in * a + statistics + half * c + 4 * s.num_classes
    return s.spec.num_blocks * kept + patches + head


def work_bytes(s: Setting) -> float:
    """What one image's backward pass holds at a time besides: gradients around the wider GELU, a recomputed block."""
    t, c = s.tokens, s.spec.hidden_dim
    half = 2 if s.precision == "bf16" else 4
    wider = max(c * s.spec.tokens_mlp_dim, t * s.spec.channels_mlp_dim)
    pixels = 4 * s.spec.in_chans * s.image_size[0] * s.image_size[1]
    work = half * (2 * wider + 2 * t * c) + pixels
    if s.activation_checkpointing != "none":
        one = Setting(**{**s.__dict__, "activation_checkpointing": "none"})
        work += (activation_bytes(one) - activation_bytes(s)) / s.spec.num_blocks
    return work


def _block_parameters(s: Setting) -> int:
    t, c, d_s, d_c = s.tokens, s.spec.hidden_dim, s.spec.tokens_mlp_dim, s.spec.channels_mlp_dim
    return 2 * t * d_s + d_s + t + 2 * c * d_c + d_c + c + 4 * c


def _cast_weights(s: Setting) -> float:
    """Autocast's bf16 copies of GEMM weights, which the backward pass needs: no cache, so one a use."""
    t, c, d_s, d_c = s.tokens, s.spec.hidden_dim, s.spec.tokens_mlp_dim, s.spec.channels_mlp_dim
    blocks = 1 if s.activation_checkpointing == "block" else s.spec.num_blocks
    return 2 * (blocks * (2 * t * d_s + 2 * c * d_c) + c * s.num_classes)


@dataclass(frozen=True)
class Speed:
    """Seconds of one optimizer step, and what follows from them."""

    compute_s: float
    communication_s: float  # if nothing else went on
    step_s: float
    img_per_s: float
    mfu: float


def speed(s: Setting, device: Device, assumed: Assumptions) -> Speed:
    """Compute at an assumed MFU; communication by bytes over bandwidth, hidden under part of the backward pass.

    Raises:
        UserError: the data sheet has no peak for this precision.
    """
    peak = peak_flops(device.name, "bf16" if s.precision == "bf16" else "fp32")
    if peak is None:
        raise UserError(f"{device.name} has no {s.precision} figure in its data sheet: choose another precision or GPU")
    at = assumed.mfu_eager if s.compile == "none" else assumed.mfu_compiled
    recomputed = 2 * s.cost.forward_macs if s.activation_checkpointing == "block" else 0
    images = s.micro_batch_size * s.micro_steps  # of the fullest rank
    compute = images * (s.cost.training_flops + recomputed) / (peak * at)
    communication = _traffic(s, device, assumed)
    hidden = compute * 2 / 3 * assumed.overlap
    step = compute + max(0.0, communication - hidden)
    rate = s.global_batch_size / step
    return Speed(compute, communication, step, rate, rate * s.cost.training_flops / (s.ranks * peak))


def _traffic(s: Setting, device: Device, assumed: Assumptions) -> float:
    """Seconds that one step's collectives take. A ring moves (R-1)/R of the bytes a rank, an all-reduce twice that.

    NCCL's rings enter and leave a node once, over all its network cards together: the whole node's network counts.
    """
    if s.ranks == 1:
        return 0.0
    n = s.cost.parameters
    band = assumed.link_use * (device.links if s.nodes == 1 else min(device.links, device.network))
    ring = (s.ranks - 1) / s.ranks
    gathered = (2 if s.precision == "bf16" and s.strategy != "zero3" else 4) * n * ring * s.micro_steps
    gathered *= 2 if s.reshard_after_forward or s.strategy == "zero3" else 1
    if s.strategy in ("ddp", "zero1"):
        return 2 * 4 * n * ring / band
    if s.strategy == "zero2":
        return (4 * n * ring * s.micro_steps + 4 * n * ring) / band
    if s.strategy == "hsdp":  # gathers and scatters stay in the node, the rest is an all-reduce of a share
        card = device.network / s.gpus_per_node if s.nodes > 1 else device.links  # all GPUs of a node do it at once
        share = 2 * 4 * n / s._copy / (card * assumed.link_use) if s.ranks > s._copy else 0.0
        return (gathered + 4 * n * ring) / (device.links * assumed.link_use) + share
    scattered = 4 * n * ring * (s.micro_steps if s.strategy == "zero3" else 1)
    return (gathered + scattered) / band


def largest_micro_batch(s: Setting, device: Device, assumed: Assumptions) -> int:
    """The largest that fits, at most a rank's share of the batch; 0 where not even one image does."""
    free = device.memory * assumed.usable - assumed.context
    one = Setting(**{**s.__dict__, "micro_batch_size": 1})
    image = activation_bytes(one) + work_bytes(one)
    room = math.floor((free - (memory(one).total - image)) / image)
    return max(0, min(room, math.ceil(s.global_batch_size / s.ranks)))


@dataclass(frozen=True)
class Outlook:
    """What a whole run costs. goodput: the share of the wall time that becomes steps."""

    steps: int
    compute_h: float  # if nothing ever failed
    failures: float  # to expect
    goodput: float
    wall_h: float
    gpu_hours: float
    exaflop: float


def outlook(s: Setting, speed: Speed, steps: int, save_every_s: float, assumed: Assumptions) -> Outlook:
    """Failures come at a constant rate a GPU; each costs half a save interval and the time until it goes on."""
    hours = steps * speed.step_s / 3600
    rate = s.ranks / assumed.gpu_hours_a_failure / 3600  # a second
    lost = rate * (save_every_s / 2 + assumed.down_s) + assumed.save_stall_s / save_every_s
    goodput = 1 / (1 + lost)
    wall = hours / goodput
    flop = s.cost.training_flops * s.global_batch_size * steps
    return Outlook(steps, hours, wall * 3600 * rate, goodput, wall, wall * s.ranks, flop / 1e18)


def best_save_interval(s: Setting, assumed: Assumptions) -> float:
    """Seconds between saves that lose least: Young's sqrt(2 * stall * time between failures) (CACM 1974)."""
    between = assumed.gpu_hours_a_failure * 3600 / s.ranks
    return math.sqrt(2 * assumed.save_stall_s * between)
