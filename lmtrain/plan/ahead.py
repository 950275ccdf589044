"""The real update, compiled ahead of time for devices that are not there; the compiler's memory beside the estimate.

TPU: libtpu compiles for any slice, on any machine: `pip install -e ".[tpu]"`. CPU: as many pretended devices as
XLA_FLAGS=--xla_force_host_platform_device_count says. GPU: for GPUs that are there, and no more of them.
"""

from __future__ import annotations

import dataclasses
import os
import re
import time
from typing import Any

import jax
import jax.numpy as jnp

from lmtrain import feeds, log, partial, step
from lmtrain import mesh as meshes
from lmtrain.models import transformer
from lmtrain.plan.chips import GIB
from lmtrain.plan.collectives import Collective, collectives
from lmtrain.plan.job import Job
from lmtrain.types import LmtrainError

#: Batches of these kinds of source can be written down without reading data.
KINDS = ("documents", "chat")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compiler made of an update. peak: bytes of one device at the height, state included; where the program
    does not fit, what it needs. memory: what it may have. exchanged: its collectives."""

    fits: bool
    peak: float
    memory: float
    seconds: float
    exchanged: tuple[Collective, ...] = ()


def compile(job: Job) -> Compiled:
    """Compiles the update of a job.

    Raises:
      LmtrainError: there is no compiler for these devices here, or no way to write down this stage's batches.
    """
    kind = feeds.kind(job.stage)
    if kind not in KINDS:
        raise LmtrainError(f"--compile: the batches of stages.{job.name} are made of {kind}, and only those of "
                           f"{' and '.join(KINDS)} are known before they are read. Leave --compile out.")  # fmt: skip
    mesh = meshes.make(job.setting(), devices(job))
    log.say(f"compiling the update of {job.name} for {job.topology}: a minute or more")
    lowered = lower(job, mesh)
    begin = time.monotonic()
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needs = out_of_memory(str(error))
        if needs is None:
            raise
        return Compiled(False, *needs, time.monotonic() - begin)
    peak = height(program.memory_analysis(), job.topology.chip.platform)
    return Compiled(peak <= job.topology.chip.memory, peak, job.topology.chip.memory, time.monotonic() - begin,
                    tuple(collectives(program.as_text(), mesh)))  # fmt: skip


def height(m: Any, platform: str) -> float:
    """Bytes of a device at the height of a program. TPU's compiler says; that of CPUs leaves its one block out."""
    if platform == "tpu":
        return float(m.peak_memory_in_bytes)
    own = m.output_size_in_bytes - m.alias_size_in_bytes
    return float(m.argument_size_in_bytes + own + m.temp_size_in_bytes)


def lower(job: Job, mesh: jax.sharding.Mesh) -> Any:
    """The update of a job on a mesh, traced and lowered for the mesh's platform."""
    abstract, tx, schedule = job.state(mesh)
    loss = feeds.objective(job.stage)
    batch = batch_shapes(job, mesh)
    if frozen := frozen_shapes(job, mesh):
        loss, batch = partial.objective(loss), {**batch, partial.REST: frozen}
    forward = transformer.Forward(job.model, mesh)
    update: Any = step.make_update(loss, forward, tx, schedule, abstract, mesh, job.stage.loss, job.stage.accumulate)
    platform = {"gpu": "cuda"}.get(job.topology.chip.platform, job.topology.chip.platform)
    return update.trace(abstract, batch).lower(lowering_platforms=(platform,))


def batch_shapes(job: Job, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of documents or of chat, packed, as ShapeDtypeStructs (types.Batch)."""
    names = {"tokens_BT": jnp.int32, "targets_BT": jnp.int32, "weights_BT": jnp.float32, "segments_BT": jnp.int32,
             "positions_BT": jnp.int32}  # fmt: skip
    shape = (job.stage.batch_size, job.stage.data.row_length)
    where = meshes.sharding(("batch", "length"), mesh)
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=where) for name, dtype in names.items()}


def frozen_shapes(job: Job, mesh: jax.sharding.Mesh) -> Any:
    """The parameters that are not trained, as ShapeDtypeStructs; {} where all are."""
    axes = transformer.axes(job.model)
    chosen = partial.trained(job.stage, job.model, axes)
    shapes = jax.tree.map(lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
                          transformer.shapes(job.model), meshes.shardings(axes, mesh))  # fmt: skip
    return partial.split(shapes, chosen)[1]


def out_of_memory(message: str) -> tuple[float, float] | None:
    """(bytes needed, bytes there are) of libtpu's message that a program does not fit; None for any other."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    units = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
    size = r"([\d.]+)([KMGT])"
    said = rf"Used {size} of {size}", rf"HLO temporaries \({size}\) exceeds available HBM \({size}\)"
    used = next((found for pattern in said if (found := re.search(pattern, message))), None)
    return (float(used[1]) * units[used[2]], float(used[3]) * units[used[4]]) if used else None


# ------------------------------------------------------------------------------------------------------------- devices
def devices(job: Job) -> list[Any]:
    """The devices of a topology: described (TPU), or those of this machine.

    Raises:
      LmtrainError: with what to install or to set.
    """
    t = job.topology
    if t.chip.platform != "tpu":
        found = [d for d in jax.devices() if d.platform == t.chip.platform]
        if len(found) < t.devices:
            set_ = f"XLA_FLAGS=--xla_force_host_platform_device_count={t.devices}" if t.chip.platform == "cpu" else ""
            raise LmtrainError(f"--compile: {t} has {t.devices} devices, {len(found)} are here. "
                               + (f"Set {set_}." if set_ else "Leave --compile out."))  # fmt: skip
        return found[: t.devices]
    if t.chip.name == "v4":
        raise LmtrainError("--compile: libtpu describes each chip of v4 as two devices, where a slice shows one. "
                           "Leave --compile out; v5e, v5p and v6e compile.")  # fmt: skip
    # No TPU is asked for its surroundings, and other processes may load the library too.
    for name, value in {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_MIN_LOG_LEVEL": "3",
                        "TPU_STDERR_LOG_LEVEL": "3", "TPU_WORKER_HOSTNAMES": "localhost",
                        "TPU_ACCELERATOR_TYPE": "v5litepod-8"}.items():  # fmt: skip
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    options: dict[str, Any] = {} if t.slices == 1 else {"num_slices": t.slices}
    if t.shape == (1, 1):
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=t.name, **options).devices)
    except (RuntimeError, ValueError, ImportError, AttributeError) as error:
        raise LmtrainError(f"--compile: no compiler for TPUs here ({str(error).splitlines()[0][:200]}). "
                           'Install it: pip install -e ".[tpu]".') from None  # fmt: skip
