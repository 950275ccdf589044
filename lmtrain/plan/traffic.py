"""What one update multiplies, reads and sends, and how long that takes at best: the roofline.

Bytes are those that one device receives, on a ring (see collectives.py, whose measure this is):

    fsdp      a layer's matrices gathered in 16 bits, forward and backward, their gradients scattered; tokens exchanged
              for rows of the embedding; the output matrix gathered once, its gradient scattered for each chunk of
              logits. Every microbatch anew.
    tensor    positions gathered before a product and its sums scattered to them: two of each a layer forward, backward
              a sum for each matrix that reads the stream, and what is worked out again
    context   keys and values gathered, their gradients scattered
    expert    each assignment's row to its expert and back; backward likewise
    stage     microbatches rolled on from stage to stage; then fsdp gathers weights in every turn
    any axis that splits rows and not a parameter: that parameter's gradient summed, within a slice before dcn, between

Williams et al. 2009 (roofline); https://jax-ml.github.io/scaling-book/training.
"""

from __future__ import annotations

import dataclasses
import math

from lmtrain.models import layers
from lmtrain.plan import memory
from lmtrain.plan.chips import bandwidths
from lmtrain.plan.job import Job, flops_per_token


@dataclasses.dataclass(frozen=True)
class Exchange:
    """What a device receives in one update. axis: of the mesh, or dcn. kind: of collective. what: it is for."""

    axis: str
    kind: str
    what: str
    bytes: float


def exchanges(job: Job) -> list[Exchange]:
    """All of an update's traffic, norms and scalars aside."""
    n, a, m = job.sizes, job.stage.accumulate, job.model
    share = {axis: (size - 1) / size for axis, size in n.items()}
    again = m.remat != "none"
    out: list[Exchange] = []

    def add(axis: str, kind: str, what: str, size: float) -> None:
        if n.get(axis, 1) > 1 and size:
            out.append(Exchange(axis, kind, what, size))

    turns = job.turns / m.rounds if n["stage"] > 1 else 1  # in which a stage has its layers' weights gathered
    # ------------------------------------------------------------------------------ parameters and their gradients
    networks = {"expert": n["expert"], "context": n["context"], "fsdp": n["fsdp"],
                "stage": n["stage"], "data": n["data"] // job.topology.slices, "dcn": job.topology.slices}  # fmt: skip
    for path, names, leaf, split in job.parameters():
        local = leaf.size / math.prod(n[axis] for axis in split)
        width = job.bytes if len([x for x in names if x != "layers"]) > 1 else 4
        if "fsdp" in split:
            whole = local * n["fsdp"] * width * a * share["fsdp"]
            layer = path[0] in ("layers", "tail")
            if layer or path[0] == "head" or (path[0] == "embed" and m.tied):
                scanned = path[0] == "layers"
                add("fsdp", "all-gather", "weights", whole * (2 * turns if scanned else 2 if layer else 1))
                if path in job.memories:
                    times = turns if scanned else 1 if layer else _chunks(job)
                    add("fsdp", "reduce-scatter", "gradients", whole * times)
        # What no axis splits is summed along all those that split rows: inner ones first, which leaves a part to outer.
        # Outside of the layers float32 is summed; of a table that is the output matrix too, each use's gradient alone.
        within = path[0] in ("layers", "tail")
        uses = 2 if path[0] == "embed" and m.tied else 1
        size = 2 * local * (width if within else 4 * uses) * a
        for axis, ways in networks.items():
            if axis not in split and path in job.memories and ways > 1:
                out.append(Exchange(axis, "all-reduce", "gradients", size * (ways - 1) / ways))
                size /= ways
    # ----------------------------------------------------------------------------------------------- activations
    x = job.rows * job.length * m.width * job.bytes * a
    add("fsdp", "all-to-all", "embedding", 2 * x * share["fsdp"])
    add("tensor", "all-gather", "ends", 4 * x * share["tensor"])
    add("tensor", "reduce-scatter", "ends", 2 * x * share["tensor"])
    busy = x * m.layers * job.idle  # stages compute in idle turns, too
    # Forward the two products that end attention and MLP; backward the gradient of what each other product reads.
    reads = 3 + (2 if m.activation in layers.GATED else 1)
    add("tensor", "all-gather", "activations", busy * share["tensor"] * (4 + 2 * again))
    add("tensor", "reduce-scatter", "activations", busy * share["tensor"] * (2 + reads + again))
    kv = busy * n["context"] * 2 * max(1, m.kv_heads / n["tensor"]) * m.head_dim / m.width
    add("context", "all-gather", "keys and values", kv * share["context"] * (1 + again))
    add("context", "reduce-scatter", "keys and values", kv * share["context"])
    if m.experts:  # each assignment's row there and back
        cpu = job.topology.chip.platform == "cpu"  # pads what each device sends to all that it has
        ways, kind = (n["expert"], "all-to-all") if cpu else (1, "ragged-all-to-all")
        add("expert", kind, "tokens", busy * m.experts_per_token * ways * share["expert"] * (4 + 2 * again))
    # Three rolls of a microbatch a turn, as many backward, and as many for the places of the belt.
    moved = x * job.turns / (job.passes / m.rounds) * n["stage"] / n["tensor"]
    add("stage", "collective-permute", "microbatches", 9 * moved)
    if job.stage.optim.name == "muon":
        for axis, size in memory.exchanged_matrices(job).items():
            add(axis, "all-to-all", "Muon's matrices", size)
    return out


def _chunks(job: Job) -> int:
    """Turns of the loop over logits: the output matrix's gradient is summed in each."""
    return -(-job.length // memory.chunk_positions(job))


# ------------------------------------------------------------------------------------------------------------ roofline
@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one update if each resource worked alone, at its peak. overlapped: all at once; serial: one after the
    other. mfu: the share of peak FLOP/s that the model's own FLOPs are (Chowdhery et al. 2022), overlapped."""

    compute: float
    memory: float
    axes: dict[str, float]
    model_flops: float
    peak: float

    @property
    def overlapped(self) -> float:
        return max(self.compute, self.memory, *self.axes.values(), 1e-12)

    @property
    def serial(self) -> float:
        return max(self.compute, self.memory) + sum(self.axes.values())

    @property
    def bound(self) -> str:
        times = {"compute": self.compute, "memory": self.memory} | self.axes
        return max(times, key=lambda name: times[name])

    @property
    def mfu(self) -> float:
        return self.model_flops / (self.peak * self.overlapped)

    @property
    def mfu_serial(self) -> float:
        return self.model_flops / (self.peak * self.serial)


def roofline(job: Job) -> Roofline:
    """The roofline of one update on one device."""
    model = flops_per_token(job.model, job.stage.data.row_length) * job.tokens
    hardware = model * (1 if job.model.remat == "none" else 7 / 6 if job.model.remat == "dots" else 4 / 3)
    devices, chip = job.topology.devices, job.topology.chip
    own = hardware / devices * job.idle + optimizer_flops(job)
    rates = bandwidths(job.topology, job.sizes)
    axes: dict[str, float] = {}
    for e in exchanges(job):
        axes[e.axis] = axes.get(e.axis, 0.0) + e.bytes / rates[e.axis]
    return Roofline(own / chip.flops, memory_bytes(job) / chip.hbm, axes, model / devices, chip.flops)


def optimizer_flops(job: Job) -> float:
    """Newton-Schulz on one device: 5 steps, each 4 m m n + 2 m m m for a matrix of m <= n (Jordan 2024)."""
    if job.stage.optim.name != "muon":
        return 0.0
    total = 0.0
    for numbers, (m, n) in zip(memory.whole_matrices(job), memory.matrix_sizes(job), strict=True):
        total += 5 * numbers / (m * n) * (4 * m * m * n + 2 * m**3)
    return total


def memory_bytes(job: Job) -> float:
    """Bytes that a device's memory gives and takes: weights three times a microbatch, the layers' arrays written and
    read forward and backward, logits four times, the state and gradients once each way."""
    a = job.stage.accumulate
    sizes = memory.shard_sizes(job)
    passes = 2 if job.model.remat == "none" else 3
    work = job.model.layers * memory.residuals(job, "none", job.model.pattern[0])
    logits = 4 * 4 * job.rows * job.length * job.model.vocab_size / job.sizes["tensor"]
    params, optimizer = memory.state_bytes(job)
    kept = 2 * (params + optimizer) + 2 * params
    return a * (3 * sizes.gathered * job.bytes + passes * 2 * work + logits) + kept
