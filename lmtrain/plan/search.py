"""Which meshes, microbatches and rematerialisations a job could take, by the roofline; and the one for mesh=auto."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping

from lmtrain import mesh as meshes
from lmtrain import schema
from lmtrain.plan import traffic
from lmtrain.plan.chips import Topology, of_devices
from lmtrain.plan.job import Job, make
from lmtrain.plan.memory import Memory, estimate
from lmtrain.types import LmtrainError


@dataclasses.dataclass(frozen=True)
class Choice:
    """One way to run a job, and what it takes."""

    job: Job
    memory: Memory
    roofline: traffic.Roofline

    @property
    def seconds(self) -> float:
        """Of an update: the mean of all at once and one after the other, since programs are between the two."""
        return (self.roofline.overlapped + self.roofline.serial) / 2

    @property
    def fits(self) -> bool:
        """Surely: what is at the limit comes after all that does."""
        return self.memory.says(self.job.topology.chip.memory) == "fits"


def ranked(job: Job, same_batches: bool = False) -> list[Choice]:
    """All choices for a job that divide evenly, those that fit first, the fastest first among them.

    Args:
      same_batches: only the mesh changes, not microbatches nor rematerialisation.
    """
    found = []
    for sizes in candidates(job):
        for accumulate, remat in settings(job, sizes, same_batches):
            stage = dataclasses.replace(job.stage, accumulate=accumulate)
            model = dataclasses.replace(job.model, remat=remat)
            option = dataclasses.replace(job, stage=stage, model=model, sizes=sizes)
            found.append(Choice(option, estimate(option), traffic.roofline(option)))
    return sorted(found, key=lambda c: (not c.fits, c.memory.total if not c.fits else 0, c.seconds))


def candidates(job: Job) -> Iterator[dict[str, int]]:
    """Sizes of the mesh's axes: powers of two of fsdp, tensor (within 16) and expert, the rest to data; context only
    where rows are fewer than devices. Stages are for whoever asks for them."""
    n, m = job.topology.devices, job.model
    powers = [2**i for i in range(n.bit_length())]
    tensors = [t for t in powers if t <= 16]
    experts = [x for x in powers if x <= max(1, m.experts)] if m.experts else [1]
    contexts = [c for c in powers if c <= 16]
    for fsdp, tensor, expert, context in itertools.product(powers, tensors, experts, contexts):
        data, rest = divmod(n, fsdp * tensor * expert * context)
        if rest or not data or data % job.topology.slices:
            continue
        if context > 1 and job.stage.batch_size >= n // tensor:
            continue
        sizes = dict.fromkeys(meshes.AXES, 1) | {
            "data": data, "fsdp": fsdp, "tensor": tensor, "context": context, "expert": expert}  # fmt: skip
        option = dataclasses.replace(job, sizes=sizes, stage=dataclasses.replace(job.stage, accumulate=1))
        try:
            option.check()
        except schema.ConfigError:
            continue
        yield sizes


def settings(job: Job, sizes: dict[str, int], same: bool) -> Iterator[tuple[int, str]]:
    """(accumulate, remat) for a mesh."""
    rows = job.stage.batch_size // (sizes["data"] * sizes["fsdp"] * sizes["expert"])
    if same:
        if rows % job.stage.accumulate == 0:
            yield job.stage.accumulate, job.model.remat
        return
    for accumulate in (a for a in (1, 2, 4, 8, 16, 32, 64) if rows % a == 0):
        for remat in ("none", "dots", "full"):
            yield accumulate, remat


def auto(e: schema.Experiment, devices: list) -> schema.Mesh:
    """The mesh of `--config.mesh=auto`: of those that every training stage's batch divides over, the one with the least
    roofline time for the stage that computes most, as it is configured; the least memory where none fits.

    Raises:
      LmtrainError: no mesh divides every stage.
    """
    topology = of_devices(devices)
    if topology is None or len(devices) == 1:
        return schema.Mesh()
    jobs = [make_any(e, name, topology) for name, s in e.stages.items() if isinstance(s, schema.Stage)]
    heaviest = max(jobs, key=lambda job: job.tokens * job.stage.steps)
    for choice in ranked(heaviest, same_batches=True):
        if all(divides(job, choice.job.sizes) for job in jobs):
            return choice.job.setting()
    raise LmtrainError(
        f"mesh.auto: no mesh of {len(devices)} devices divides batch_size={heaviest.stage.batch_size} (accumulate="
        f"{heaviest.stage.accumulate}) of stages.{heaviest.name} and the other stages' evenly; a multiple of the "
        "devices does."
    )


def make_any(e: schema.Experiment, name: str, topology: Topology) -> Job:
    """A stage's job before its mesh is known."""
    made = make(e, name, dataclasses.replace(topology, shape=(1,), slices=1), dict.fromkeys(meshes.AXES, 1))
    return dataclasses.replace(made, topology=topology)


def divides(job: Job, sizes: Mapping[str, int]) -> bool:
    """Whether a stage's batch, rows and parameters split evenly over a mesh."""
    try:
        dataclasses.replace(job, sizes=sizes).check()
    except schema.ConfigError:
        return False
    return True
