"""Several processes that train as one: who they are, whether they agree, and what happens when one is lost.

    place.py     where this process stands, by the environment of Slurm, a JobSet, a TPU pod or LMTRAIN_COORDINATOR
    roll.py      the connection that all keep to process 0: refusals at the start, lost hosts later
    agree.py     what has to be the same on all of them
    watchdog.py  ends a run that takes no more steps
    local.py     several processes on one machine, started again when they fail (launch/local.sh)

Exit statuses: 0 done; 2 a mistake of the user's; 74 storage; 75 stopped and saved; 76 a host is gone; 77 hung. After 74
to 77 the same command goes on from the newest checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from lmtrain import log, mesh, scattered, schema, storage
from lmtrain.hosts import agree, watchdog
from lmtrain.hosts.place import Place, find
from lmtrain.hosts.roll import GONE, GRACE, SILENCE, Roll, end_process
from lmtrain.types import LmtrainError, Stopped

HEARTBEAT = 30  # seconds of JAX's own service: longer than the roll's SILENCE, which names the host


@dataclasses.dataclass
class Crew:
    """The processes of a run, as the loop sees them. `Crew()` is one process by itself."""

    place: Place = Place()
    roll: Roll | None = None
    watchdog: float = 0.0  # this and what follows: schema.Experiment's
    watchdog_least: float = 600.0
    local: str = ""
    profile: str = ""
    copy: scattered.Copy | None = None  # where the run's folder is in a bucket
    signal: str = ""  # that this process got: it stands until the run has stopped, from one stage to the next
    _asked: int = 0
    _told: bool = False

    def preempted(self) -> bool:
        """True at the step, the same in all processes, that comes after one of them got SIGTERM: one after the furthest
        step that any was at. Every process asks once a step."""
        self._asked += 1  # not the number of the step, which falls when a stage begins or a loss is rolled back
        # JAX says so once. The loop may not be able to stop just then: it rolls back, or a stage ends.
        self._told = self._told or multihost_utils.reached_preemption_sync_point(self._asked)
        return self._told

    def meet(self, name: str) -> None:
        """Waits until every process is here. What process 0 has written in the run's folder, all see afterwards."""
        if self.copy is None:
            mesh.barrier(name)
            return
        with self.copy.pushed_once() if self.copy.process == 0 else contextlib.nullcontext():
            mesh.barrier(f"{name}: written")
            if self.copy.process:
                storage.again(self.copy.pull)
            mesh.barrier(f"{name}: read")

    @contextlib.contextmanager
    def watching(self, meter: log.Meter) -> Iterator[None]:
        """Inside, steps are expected: without any for too long, the process ends with the stacks of its threads."""
        if self.roll is not None:
            self.roll.report(meter.status)
        with watchdog.Watchdog(meter, self.watchdog, self.watchdog_least, self._hung):
            yield

    def _hung(self, text: str, code: int) -> None:
        if self.roll is not None:
            self.roll.fail(text, code, patience=1.5 * GRACE)  # one of them is perhaps the one that hangs
        end_process(text, code)

    def slow_host(self) -> dict[str, Any]:
        """For metrics.jsonl, in process 0: a host whose own seconds of a step are far above the others', and these."""
        slow = self.roll.slow() if self.roll is not None else None
        return {} if slow is None else {"slow_host": slow.name, "slow_host_seconds": slow.seconds}


@contextlib.contextmanager
def joined(e: schema.Experiment, folder: pathlib.Path, copy: scattered.Copy | None = None) -> Iterator[Crew]:
    """Finds the other processes, compares notes with them, and starts JAX's runtime over all.

    Args:
      copy: what the folder is, where each process has its own.

    Raises:
      LmtrainError: in every process, where one has another configuration, version or clock, cannot write to the folder
        or does not come; names the host.
    """
    place = find()
    if place.processes == 1:
        if not jax.distributed.is_initialized():  # else whoever did so has said where we are
            print(place.says, flush=True)
        yield Crew(place, None, e.watchdog, e.watchdog_least, e.local, e.profile)
        return
    roll = Roll(place, socket.gethostname())
    try:
        agree.compare(roll, e, folder, copy)
        roll.start()
        if not jax.distributed.is_initialized():
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
            jax.distributed.initialize(
                place.coordinator, place.processes, place.process, local_device_ids=place.devices,
                cluster_detection_method="deactivate", heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=30,
            )  # fmt: skip
        log.say(place.says)
        yield Crew(place, roll, e.watchdog, e.watchdog_least, e.local, e.profile, copy)
    except Stopped:
        roll.close()
        raise
    except BaseException as error:
        if not isinstance(error, LmtrainError) or error.status != LmtrainError.status:
            # Perhaps because another process is gone. Then the roll hears of it, names it and ends this process.
            time.sleep(SILENCE + 2 if isinstance(error, jax.errors.JaxRuntimeError) else 2)
        status = error.status if isinstance(error, LmtrainError) else GONE
        roll.fail(str(error) or repr(error), status)
        raise
    else:
        roll.close()


def leave(status: int) -> int:
    """The exit status of the command. Ends a process of several at once where it failed: a normal exit would wait at
    JAX's barrier for processes that may be gone."""
    if jax.distributed.is_initialized():
        if status not in (0, Stopped.status):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        jax.distributed.shutdown()
    return status
