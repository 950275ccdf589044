"""Memory of one device in one update, by part.

What is exact: the state, by the shardings that the run itself takes (`step.make_init`). What is traced: how much a
layer keeps for its backward pass, by JAX's own linearisation of that layer at the sizes of one device, under its
rematerialisation. What is a rule: what a layer, the logits and the optimizer need while they are at work, in arrays of
a known size whose number was fitted to TPU's compiler (docs/plan.md has both side by side).

    B rows, T positions, D width, V vocabulary, F hidden width, E experts, M assignments of a token to an expert
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lmtrain import mesh as meshes
from lmtrain import optim, schema
from lmtrain.models import head, transformer
from lmtrain.models import params as p
from lmtrain.models.attention import keeps_products
from lmtrain.models.layers import rope_tables
from lmtrain.models.shapes import groups
from lmtrain.plan.job import Job, spec_axes

#: Shares that TPU's compiler has at once, fitted to it (docs/plan.md): of what a group of layers would keep without
#: rematerialisation, and does not, when it is worked out again; of what one layer would keep, while it is worked on; of
#: the logits in float32, their gradient included; of the output matrix in 16 bits, its gradient included; of a group
#: of layers' matrices, gathered, their gradients included.
AGAIN, LAYER, LOGITS, MATRIX, GATHERED = 0.45, 0.3, 1.5, 2.0, 1.0

#: So far, as a share, estimate and compiler may lie apart.
ERROR = 0.15

#: A layer is traced with so many rows, by which what belongs to rows is told from parameters: few sizes are multiples.
ROWS = 13


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device by part. An update has three heights: the logits, when all that layers keep is there and no
    gradient yet; the layers' backward pass; and the optimizer's work. `total` is the highest."""

    parts: dict[str, float]
    accumulates: bool = False

    @property
    def heights(self) -> dict[str, float]:
        p = self.parts
        state = p["parameters"] + p["optimizer"] + p["frozen"] + p["cache"]
        working = p["gathered weights"] + p["a layer's work"] + p["a turn of the stages"]
        kept = p["weights in 16 bits"] + p["activations kept"]
        summed = (
            p["gradients"] / 2 if self.accumulates else p["gradients"]
        )  # over microbatches, a microbatch's own gone
        return {
            "logits": state + kept + p["logits"] + (summed if self.accumulates else 0),
            "layers": state + kept + p["gradients"] + working,
            "optimizer": state + summed + p["optimizer's work"],
        }

    @property
    def total(self) -> float:
        return max(self.heights.values())

    def says(self, available: float) -> str:
        """Whether it fits; within the estimate's own error of what there is, that it is at the limit."""
        if self.total > (1 + ERROR) * available:
            return "does not fit"
        return "fits" if self.total <= (1 - ERROR) * available else "at the limit"


def estimate(job: Job) -> Memory:
    """The memory of one update of a job."""
    params, optimizer = state_bytes(job)
    accumulates = job.stage.accumulate > 1
    layers = shard_sizes(job, layers_only=True)
    kept, work, turn = activations(job)
    here = groups(job.model)[0] / job.sizes["stage"]  # groups of layers on a device
    parts = {
        "parameters": params,
        "optimizer": optimizer,
        "frozen": frozen_bytes(job),
        "gradients": params * (2 if accumulates else 1),
        "weights in 16 bits": layers.local * job.bytes if job.bytes < 4 else 0.0,
        "gathered weights": GATHERED * layers.gathered * job.bytes / here if job.sizes["fsdp"] > 1 else 0.0,
        "activations kept": kept,
        "a layer's work": work,
        "a turn of the stages": turn,
        "logits": logits_bytes(job),
        "optimizer's work": optimizer_work(job),
        "cache": cache_bytes(job),
    }
    return Memory(parts, accumulates)


# --------------------------------------------------------------------------------------------------------------- state
def state_bytes(job: Job) -> tuple[float, float]:
    """(trained parameters, what the optimizer keeps for them) of one device."""
    params = optimizer = 0.0
    for path, _, leaf, split in job.parameters():
        if path in job.memories:
            n = leaf.size / math.prod(job.sizes[a] for a in split)
            params, optimizer = params + 4 * n, optimizer + job.memories[path] * n
    return params, optimizer


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Numbers in parameters: one device's part; that part with what fsdp splits put together again."""

    local: float
    gathered: float


def shard_sizes(job: Job, layers_only: bool = False) -> Sizes:
    """Of all parameters, trained or not, or of the layers alone."""
    local = gathered = 0.0
    for path, _, leaf, split in job.parameters():
        if not layers_only or path[0] in ("layers", "tail"):
            n = leaf.size / math.prod(job.sizes[a] for a in split)
            local += n
            gathered += n * (job.sizes["fsdp"] if "fsdp" in split else 1)
    return Sizes(local, gathered)


def frozen_bytes(job: Job) -> float:
    """What is not trained, and frozen models beside it: a teacher, or the reference of RL and of preferences."""
    few = {"int8": 1.0, "nf4": 0.5}.get(job.stage.quantize, 4.0)
    total = sum(few * leaf.size / math.prod(job.sizes[a] for a in split) for path, _, leaf, split in job.parameters()
                if path not in job.memories)  # fmt: skip
    kept = bool(job.stage.teacher) + bool(getattr(job.stage.loss, "REFERENCE", False))
    return total + 4.0 * kept * shard_sizes(job).local


# --------------------------------------------------------------------------------------------------------- activations
def activations(job: Job) -> tuple[float, float, float]:
    """(bytes kept for the backward pass by all layers, bytes of a layer group that is worked on, bytes of one turn of
    the stages)."""
    count, body, tail = groups(job.model)
    all_, own = (residuals(job, remat, body) for remat in ("none", job.model.remat))
    # With stages, a device has as many rows of fewer layers, those of idle turns besides, one microbatch at a time.
    kept, stages = count * own * job.idle, job.sizes["stage"]
    at_once = stages / (job.model.microbatches or stages) if stages > 1 else 1.0
    # What is not kept is worked out again for one group at a time.
    one = max(residuals(job, "none", kind) for kind in set(body))
    work = (AGAIN * (all_ - own) + LAYER * one) * at_once
    # Stages take turns, each with its share of what is kept and gradients of its own beside the sums.
    gradients = sum(4 * leaf.size / math.prod(job.sizes[a] for a in split) for path, _, leaf, split in job.parameters()
                    if path in job.memories and path[0] == "layers")  # fmt: skip
    turn = kept / job.turns + gradients if stages > 1 else 0.0
    return kept + (residuals(job, job.model.remat, tail) if tail else 0.0), work, turn


@functools.lru_cache(maxsize=512)
def _traced(model: schema.Model, remat: str, kinds: str, length: int, dtype: Any, attention: str, tensor: int) -> float:
    """Bytes that a group of layers keeps of one row for its backward pass, its parameters aside. What is as wide as the
    model passes from layer to layer, and its positions are split over the tensor axis (mesh.residual)."""
    # A fused kernel keeps q, k, v, its output and a sum of each row; splash can be traced anywhere.
    fused = attention in ("splash", "cudnn")
    length = -(-length // 128) * 128 if fused else length
    model = dataclasses.replace(model, attention="splash" if fused else attention, remat=remat)

    def made() -> list[transformer.Block]:
        return [transformer.Block(model, kind, nnx.Rngs(params=0)) for kind in kinds]

    shapes = jax.eval_shape(lambda: [p.pure(block) for block in made()])

    def run(weights, x_BTD, tables, segments_BT):
        for i, own in enumerate(weights):
            layer = p.merge(p.graph(lambda i=i: made()[i]), own)  # type: ignore[misc]
            x_BTD = layer(x_BTD, tables, segments_BT, segments_BT > 0, None)[0]
        return x_BTD

    if remat != "none":
        nothing = jax.checkpoint_policies.nothing_saveable
        run = jax.checkpoint(run, policy=keeps_products(False) if remat == "dots" else nothing)
    x = jax.ShapeDtypeStruct((ROWS, length, model.width), dtype)
    segments = jax.ShapeDtypeStruct((ROWS, length), jnp.int32)
    positions = jax.ShapeDtypeStruct((ROWS, length), jnp.int32)
    tables = None
    if model.positions == "rope":
        scaling = schema.RopeScaling()
        tables = jax.eval_shape(lambda t: rope_tables(t, model.rotary_dim, model.rope_theta, scaling), positions)
    back = jax.eval_shape(
        lambda w, x, *more: jax.vjp(lambda w, x: run(w, x, *more), w, x)[1], shapes, x, tables, segments
    )
    given = {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves((tables, segments))}
    kept = [leaf for leaf in jax.tree.leaves(back) if leaf.shape and leaf.shape[0] % ROWS == 0]  # parameters are not
    ways = [tensor if leaf.shape[-1] == model.width and length % tensor == 0 else 1 for leaf in kept]
    # TPU's kernel takes and gives arrays of heads, whose last dimension the chip pads to 128.
    pad = -(-model.head_dim // 128) * 128 / model.head_dim if attention == "splash" else 1.0
    pads = [pad if leaf.shape[-1] == model.head_dim else 1.0 for leaf in kept]
    return sum(leaf.size * leaf.dtype.itemsize * more / n for leaf, n, more in zip(kept, ways, pads, strict=True)
               if (leaf.shape, leaf.dtype) not in given) / ROWS  # fmt: skip


def residuals(job: Job, remat: str, kinds: str) -> float:
    """Bytes that a group of layers of these kinds keeps on one device."""
    t, e = job.sizes["tensor"], job.sizes["expert"]
    m = job.model
    split = {name: max(1, getattr(m, name) // t) for name in ("heads", "kv_heads", "mlp", "expert_mlp")}
    local = dataclasses.replace(m, **split, dtype="bfloat16" if job.bytes == 2 else "float32")
    args = (remat, kinds, job.length, local.dtype, job.attention, t)
    if not m.experts or (e == 1 and t == 1):
        return job.rows * _traced(local, *args)
    # Rows of the whole expert axis meet at a device; attention sees only its own.
    few = dataclasses.replace(local, experts=0, shared_experts=0, mlp=8)
    dense = job.rows * _traced(few, *args)
    return dense + (_experts_kept(local, job, len(kinds)) if remat == "none" else 0.0)  # ragged products are not "dots"


def _experts_kept(local: schema.Model, job: Job, layers: int) -> float:
    """What the experts of some layers keep: their rows, and the hidden layer of each row, several times."""
    m = job.rows * job.sizes["expert"] * job.length * local.experts_per_token
    gated = 4 if local.activation in ("swiglu", "geglu") else 2
    return float(layers * m * (2 * local.width + gated * local.expert_mlp) * job.bytes)


# --------------------------------------------------------------------------------------------------- logits, optimizer
def logits_bytes(job: Job) -> float:
    """Logits of a chunk and the output matrix, with what their gradients take."""
    vocabulary = job.model.vocab_size / job.sizes["tensor"]
    chunk = chunk_positions(job)
    matrix = job.model.width * vocabulary
    return LOGITS * 4 * job.rows * chunk * vocabulary + MATRIX * matrix * job.bytes


def chunk_positions(job: Job) -> int:
    """Positions of a row, on one device, whose logits exist at once."""
    limit = head.CHUNK_BYTES[job.topology.chip.platform]
    positions = job.model.loss_chunk or limit // (4 * (job.model.vocab_size // job.sizes["tensor"]))
    chunk = max(1, positions // job.rows)
    return -(-job.length // -(-job.length // chunk))


def optimizer_work(job: Job) -> float:
    """What an update takes beside the state and the gradients: the updates of one parameter after the other, and Muon's
    whole matrices."""
    most = max((4 * leaf.size / math.prod(job.sizes[a] for a in split)
                for path, _, leaf, split in job.parameters() if path in job.memories), default=0.0)  # fmt: skip
    if job.stage.optim.name != "muon":
        return most
    return most + max(whole_matrices(job), default=0.0) * 4 * 2


def whole_matrices(job: Job) -> list[float]:
    """Numbers in the stack of whole matrices that a device makes orthogonal, for each parameter that Muon takes."""
    return [math.ceil(stack) * m * n for (stack, m, n), _ in _matrices(job)]


def exchanged_matrices(job: Job) -> dict[str, float]:
    """Bytes that a device receives along each axis while matrices are made whole for Muon and split again, float32."""
    out: dict[str, float] = {}
    for (stack, m, n), axes in _matrices(job):
        for axis in axes:
            ways = job.sizes[axis]
            out[axis] = out.get(axis, 0.0) + 2 * 4 * math.ceil(stack) * m * n * (ways - 1) / ways
    return out


def matrix_sizes(job: Job) -> list[tuple[int, int]]:
    """(smaller, larger dimension) of the matrices of each parameter that Muon takes."""
    return [(min(m, n), max(m, n)) for (_, m, n), _ in _matrices(job)]


def _matrices(job: Job) -> list[tuple[tuple[float, int, int], list[str]]]:
    """((matrices to each device, input, output), axes that split the matrices) of each parameter that Muon takes."""
    found = []
    for path, names, leaf, split in job.parameters():
        dims = optim.matrix(names)
        if dims is None or path not in job.memories:
            continue
        first = next(i for i, name in enumerate(names) if name not in optim.STACKED)
        axes = spec_axes(meshes.spec((None,) * first + names[first:], job.mesh))
        m, n = (math.prod(leaf.shape[i] for i in d) for d in (dims.reduction_axis, dims.output_axis))
        stack = math.prod(leaf.shape[:first]) / math.prod(job.sizes[a] for a in split)
        found.append(((stack, m, n), axes))
    return found


def cache_bytes(job: Job) -> float:
    """Keys and values of the conversations that a rollout generates at once, and the weights laid out for them."""
    if not getattr(job.stage.loss, "SOURCE", "documents") == "rollout":
        return 0.0
    m, rows = job.model, -(-job.stage.rollout.slots // job.ways)
    heads = max(1, m.kv_heads // job.sizes["tensor"])
    kept = 2 * m.layers * rows * job.stage.data.row_length * heads * m.head_dim * job.bytes
    return kept + shard_sizes(job).local * job.bytes
