"""Where this process stands among those of a run, read off the environment that its launcher left it."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import urllib.request
from collections.abc import Callable, Mapping

from lmtrain.types import LmtrainError

PORT = 8476  # JAX's coordinator listens here; the roll (roll.py) on the port after it
EXPLICIT = ("LMTRAIN_COORDINATOR", "LMTRAIN_PROCESSES", "LMTRAIN_PROCESS")

Fetch = Callable[[str], str | None]


@dataclasses.dataclass(frozen=True)
class Place:
    """One process of a run.

    Attributes:
      kind: alone | coordinator | slurm | jobset | tpu.
      coordinator: "HOST:PORT" of process 0; "" where there is one process.
      devices: which of the host's devices are this process's; None: all.
    """

    kind: str = "alone"
    coordinator: str = ""
    processes: int = 1
    process: int = 0
    devices: tuple[int, ...] | None = None

    @property
    def says(self) -> str:
        """One line for the log."""
        where = {
            "alone": "on its own",
            "coordinator": "by LMTRAIN_COORDINATOR",
            "slurm": "under Slurm",
            "jobset": "in a Kubernetes JobSet",
            "tpu": "on TPU",
        }[self.kind]
        if self.processes == 1:
            return f"hosts: one process, {where}"
        return f"hosts: {self.processes} processes, {where}, coordinator {self.coordinator}"

    @property
    def address(self) -> tuple[str, int]:
        """(host, port) of the coordinator."""
        host, _, port = self.coordinator.rpartition(":")
        return host, int(port)


def find(environment: Mapping[str, str] | None = None, fetch: Fetch | None = None) -> Place:
    """The place of this process. What is said explicitly comes first, then a TPU pod, a JobSet, Slurm.

    Args:
      environment: os.environ by default.
      fetch: reads one attribute of a TPU VM from its metadata server; None where there is none.

    Raises:
      LmtrainError: the environment contradicts itself.
    """
    env = os.environ if environment is None else environment
    place = _explicit(env) or _tpu(env, fetch or metadata) or _jobset(env) or _slurm(env) or Place()
    if not 0 <= place.process < place.processes:
        raise LmtrainError(
            f"hosts: this is process {place.process} of {place.processes} ({place.kind}); processes count from 0."
        )
    return place


def _explicit(env: Mapping[str, str]) -> Place | None:
    missing = [name for name in EXPLICIT if not env.get(name)]
    if len(missing) == len(EXPLICIT):
        return None
    if missing:
        raise LmtrainError(f"hosts: {', '.join(EXPLICIT)} go together; {' and '.join(missing)} not set.")
    address = env["LMTRAIN_COORDINATOR"]
    if not address.rpartition(":")[0] or not address.rpartition(":")[2].isdigit():
        raise LmtrainError(f"hosts: LMTRAIN_COORDINATOR is {address!r}, but takes HOST:PORT of process 0.")
    return Place("coordinator", address, _int(env, "LMTRAIN_PROCESSES"), _int(env, "LMTRAIN_PROCESS"))


def _slurm(env: Mapping[str, str]) -> Place | None:
    """Inside a job step (srun). A batch script, or a shell of salloc, is alone: it has no SLURM_STEP_NODELIST."""
    if not {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"} <= env.keys():
        return None
    # Two jobs on one node have other ports, below those that the kernel gives out by itself.
    port = 20000 + 2 * (_int(env, "SLURM_JOB_ID") % 6000)
    # Several tasks on one node that all see the same GPUs take one each.
    here = env.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0]
    seen = [d for d in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]
    devices = (_int(env, "SLURM_LOCALID"),) if here != "1" and len(seen) > 1 else None
    return Place(
        "slurm", f"{first_host(env['SLURM_STEP_NODELIST'])}:{port}", _int(env, "SLURM_STEP_NUM_TASKS"),
        _int(env, "SLURM_PROCID"), devices,
    )  # fmt: skip


def first_host(nodes: str) -> str:
    """The first of Slurm's list of nodes: "n[007-010,12],m" -> "n007"."""
    name, bracket, inside = nodes.partition("[")
    if not bracket or "," in name:
        return name.split(",")[0]
    number, _, rest = inside.partition("]")
    suffix = rest.split(",")[0].split("[")[0]
    return name + number.split(",")[0].split("-")[0] + suffix


def _jobset(env: Mapping[str, str]) -> Place | None:
    """By the names that XPK gives to a workload's pods; launch/jobset.yaml takes the same."""
    if "JOBSET_NAME" not in env or "NNODES" not in env:
        return None
    name, job = env["JOBSET_NAME"], env.get("REPLICATED_JOB_NAME", "workers")
    process = "NODE_RANK" if "NODE_RANK" in env else "JOB_COMPLETION_INDEX"
    return Place("jobset", f"{name}-{job}-0-0.{name}:{PORT}", _int(env, "NNODES"), _int(env, process))


def _tpu(env: Mapping[str, str], fetch: Fetch) -> Place | None:
    """A slice of several hosts, or several slices: on GKE by its environment, on a TPU VM by the metadata server."""
    if "TPU_WORKER_HOSTNAMES" in env:
        workers, worker, megascale = env["TPU_WORKER_HOSTNAMES"], env.get("TPU_WORKER_ID", "0"), env
    elif not env.get("TPU_SKIP_MDS_QUERY") and (found := fetch("worker-network-endpoints")):
        # Either host names, or NAME:ID:ADDRESS of each.
        workers = ",".join(w.split(":")[-1] for w in found.split(","))
        worker = fetch("agent-worker-number") or "0"
        lines = (line.partition(":") for line in (fetch("tpu-env") or "").splitlines())
        megascale = {key.strip(): value.strip().strip("'") for key, _, value in lines}
    else:
        return None
    hosts = [w.strip() for w in workers.split(",") if w.strip()]
    slices, this = int(megascale.get("MEGASCALE_NUM_SLICES") or 1), int(megascale.get("MEGASCALE_SLICE_ID") or 0)
    if len(hosts) * slices == 1:
        return Place("tpu")
    first = (megascale.get("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]).split(":")[0]
    return Place("tpu", f"{first}:{PORT}", len(hosts) * slices, this * len(hosts) + int(worker))


def metadata(key: str) -> str | None:
    """An attribute of this TPU VM; None on a machine without TPU chips, which is not asked, or without the server."""
    if not (list(pathlib.Path("/dev").glob("accel[0-9]*")) or list(pathlib.Path("/dev/vfio").glob("[0-9]*"))):
        return None
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{key}"
    try:
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read().decode()
    except OSError:
        return None


def _int(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except (KeyError, ValueError):
        raise LmtrainError(f"hosts: {name} is {env.get(name)!r}, but takes a number.") from None
