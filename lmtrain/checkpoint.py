"""Checkpoints: the state of a run, its data iterator and its configuration, saved and restored as one.

    FOLDER/STEP/params/       Orbax: the parameters
    FOLDER/STEP/rest/         Orbax: step, random key, optimizer
    FOLDER/STEP/manifest.json sha256 of every file above; shapes; metrics; and `meta`, JSON that the loop wants back

Orbax writes in the background. The manifest is written last, in one rename, and makes the checkpoint: a step without
one is an unfinished save. Older checkpoints are deleted only once a newer manifest stands, so a process killed at any
instant leaves at least one. A file that no longer matches its sha256 is named, its checkpoint moved aside
(`damaged-STEP`) and the one before used; Orbax alone restores a flipped bit without a word. Orbax's CheckpointManager
is not used: it deletes by a policy of its own, which knows nothing of the manifest.

Every process calls every method; process 0 alone writes manifests, deletes and judges. FOLDER is on a file system that
all of them see, or each has a copy of it (scattered.py), keeps its own clean, and reads and writes its part.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import hashlib
import json
import math
import os
import pathlib
import shutil
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from lmtrain import log, scattered, stored
from lmtrain.manifest import MANIFEST, Folder, newest_sound, read_manifest, steps, verify, write_manifest
from lmtrain.nearby import Nearby
from lmtrain.types import LmtrainError, Params, StorageError, TrainState

__all__ = ["Checkpoints", "identity", "load_params", "newest_sound", "params_sha256", "read_manifest", "read_meta",
           "steps", "verify", "write_manifest"]  # fmt: skip


PAUSES = (2.0, 8.0, 30.0, 60.0)  # seconds before a save that failed is tried again


class Checkpoints:
    """The checkpoints of one run. Saves in the background, one at a time.

    Args:
      folder: made where it is missing.
      keep_last: how many of the newest stay (at least 1).
      keep_best: how many more stay, those with the lowest metric `best`; with the highest where it is "-NAME".
      pauses: seconds before a save that failed is to be tried again (see `again`); as many failures in a row are said
        and survived.
      nearby: further checkpoints, on each host's own disk; the newest sound one of both is restored.
      copy: what the folder lies in, where it is not one that all processes see.
    """

    def __init__(
        self,
        folder: Folder,
        keep_last: int = 2,
        keep_best: int = 1,
        best: str = "heldout_loss",
        pauses: Sequence[float] = (),
        nearby: Nearby | None = None,
        copy: scattered.Copy | None = None,
    ):
        self.folder = pathlib.Path(folder).absolute()
        self.keep_last, self.keep_best, self.best = max(1, keep_last), keep_best, best.removeprefix("-")
        self._sign = -1.0 if best.startswith("-") else 1.0
        self._copy, self._first = copy, jax.process_index() == 0
        self._keeps = self._first or copy is not None  # whether this process writes and deletes in the folder
        self._checkpointer = stored.checkpointer(asynchronous=True, apart=copy is not None)
        self._worker = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: tuple[int, concurrent.futures.Future[None]] | None = None
        self._newest: int | None = None
        self._nearby = nearby
        self._pauses, self._failures, self._again = pauses, 0, math.inf

    def save(
        self,
        step: int,
        state: TrainState,
        meta: dict[str, Any],
        metrics: dict[str, float] | None = None,
        last: bool = False,
    ) -> None:
        """Copies the state off the devices and returns; the rest happens in the background.

        Args:
          meta: JSON; comes back from restore_newest (the data iterator's state, the loop's, the configuration).
          metrics: of this step; `best` among them makes it a candidate for keep_best.
          last: no other follows, so it returns when the checkpoint stands; a failure is tried again here.

        Raises:
          StorageError: this save, or the one before, failed (disk full, no permission), more often than there are
            pauses. What was there is kept.
        """
        self._settle()
        while True:
            try:
                self._begin(step, state, meta, metrics)
                if last:
                    self.wait()
                return
            except StorageError as error:
                pause = self._put_off(error)
            if not last:
                return
            time.sleep(pause)

    def save_nearby(self, step: int, state: TrainState, meta: dict[str, Any]) -> None:
        """Copies the state off the devices and returns; each host writes its part to its own disk."""
        if self._nearby is not None:
            params, rest = stored.items(state)
            whole = {"meta": meta, "key_impl": str(jax.random.key_impl(state.key))}
            self._nearby.save(step, dict(stored.named(params, rest)), whole)

    def again(self) -> bool:
        """True when it is time to save in place of a save that failed."""
        if self._saving is not None and self._saving[1].done():
            self._settle()
        return time.monotonic() >= self._again

    def _settle(self) -> None:
        """Waits for the save before."""
        try:
            self.wait()
        except StorageError as error:
            self._put_off(error)

    def _put_off(self, error: StorageError) -> float:
        """Says what failed and returns how long to wait; raises it where it has failed too often."""
        self._failures += 1
        if self._failures > len(self._pauses):
            raise error
        pause = self._pauses[self._failures - 1]
        self._again = time.monotonic() + pause
        log.say(f"{error} Again in {pause:g} s ({self._failures} of {len(self._pauses)}).")
        return pause

    def _begin(self, step: int, state: TrainState, meta: dict[str, Any], metrics: dict[str, float] | None) -> None:
        if step == self._newest:
            return
        params, rest = stored.items(state)
        manifest = {"step": step, "metrics": metrics or {}, "meta": meta, "arrays": stored.describe(params, rest)}
        manifest["key_impl"] = str(jax.random.key_impl(state.key))
        manifest = json.loads(json.dumps(manifest))  # as it is now; what JSON cannot hold is found out here
        path = self.folder / str(step)
        try:
            if self._keeps:
                self.folder.mkdir(parents=True, exist_ok=True)
                _clean(self.folder)
            self._checkpointer.save(path, args=stored.args("StandardSave", params=params, rest=rest))
        except Exception as error:
            raise self._failed(step, error) from error
        self._saving = step, self._worker.submit(self._finish, path, manifest)

    def _finish(self, path: pathlib.Path, manifest: dict[str, Any]) -> None:
        """In the background: once Orbax is done, the manifest; once that stands, away with what is too old."""
        self._checkpointer.wait_until_finished()
        if self._copy is not None:
            self._copy.save(path, manifest)
        elif self._first:
            write_manifest(path, manifest)
        if self._keeps:
            self._prune()

    def wait(self) -> None:
        """Returns when nothing is being saved any more. Raises LmtrainError where the save failed."""
        if self._saving is None:
            return
        (step, future), self._saving = self._saving, None
        try:
            future.result()
        except Exception as error:
            if isinstance(error, LmtrainError) and not isinstance(error, StorageError):
                raise
            raise self._failed(step, error) from error
        self._newest, self._failures, self._again = step, 0, math.inf

    def close(self) -> None:
        """Waits, then lets the threads go. Raises LmtrainError where the last save failed."""
        try:
            self.wait()
        finally:
            self._worker.shutdown()
            self._checkpointer.close()
            if self._nearby is not None:
                self._nearby.close()

    def _failed(self, step: int, error: Exception) -> StorageError:
        """The one message of a failed save; what it left behind is removed."""
        free = shutil.disk_usage(self.folder.parent).free // 2**20 if self.folder.parent.exists() else 0
        for _ in range(20):
            if not self._keeps or not any(path.exists() for path in _clean(self.folder)):
                break
            time.sleep(0.1)  # Orbax's other threads may still be writing
        kept = steps(self.folder)
        text = str(error) or repr(error)
        full = f"no space left on the disk ({free} MiB free)"
        reason = full if "No space left" in text else text.splitlines()[0]
        stays = f"that of step {kept[-1]} is kept" if kept else "there is none from before"
        return StorageError(f"{self.folder / str(step)}: the checkpoint could not be saved: {reason}; {stays}.")

    def _prune(self) -> None:
        there = steps(self.folder)
        scores: dict[int, float] = {}
        for step in there:  # one without a score, or damaged (for restore_newest to name), is not among the best
            with contextlib.suppress(LmtrainError, KeyError, TypeError):
                scores[step] = self._sign * float(read_manifest(self.folder, step)["metrics"][self.best])
        scored = sorted((s for s in scores if math.isfinite(scores[s])), key=lambda s: scores[s])
        for step in set(there) - set(there[-self.keep_last :]) - set(scored[: self.keep_best]):
            # Renamed first: a process killed while it deletes leaves no half checkpoint under a step's name.
            doomed = self.folder / f"deleting-{step}"
            os.replace(self.folder / str(step), doomed)
            shutil.rmtree(doomed)
            if self._copy is not None and self._first:
                self._copy.remove(self.folder / str(step))

    def restore_newest(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any], int] | None:
        """(state, meta, step) of the newest sound checkpoint, or None where nothing was ever saved.

        Removes what killed saves left. A damaged checkpoint is named and moved aside, and the one before is used.

        Args:
          abstract: the state's tree of ShapeDtypeStructs with shardings (`step.make_init`), on this run's mesh, which
            need not be the one it was saved on.

        Raises:
          LmtrainError: every checkpoint is damaged, or the newest holds other arrays than `abstract`.
        """
        self.wait()
        self._newest, step = None, -1
        if self._keeps:
            for left in sorted({path.name.split(".")[0] for path in _clean(self.folder)}):
                if left.isdigit():  # perhaps whole, killed just before its manifest: nothing can tell
                    log.say(f"{self.folder}: an unfinished save of step {left} was removed.")
            step = self._newest_sound()
        if jax.process_count() > 1:
            step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
        if self._copy is not None:
            step = self._newest_fetched(self._copy, step, stored.folders(*stored.items(abstract)))
        if step == -2:
            raise LmtrainError(
                f"{self.folder}: every checkpoint is damaged, see {self.folder}/damaged-*. "
                "Remove them to begin again from step 0, or start another --workdir."
            )
        if self._nearby is not None:
            params, rest = stored.items(abstract)
            near = self._nearby.newest(dict(stored.named(params, rest)))
            self._nearby.forget(above=max(near, step))
            if near > step:
                arrays, whole = self._nearby.restore(near, dict(stored.named(params, rest)))
                log.say(f"{self.folder}: the hosts' own disks have step {near}, which is newer.")
                ours = [arrays[f"params/{name}"] for name, _ in stored.flat(params)]
                restored = jax.tree.unflatten(jax.tree.structure(params), ours)
                state = stored.state(abstract, restored, {name: arrays[name] for name in rest}, whole["key_impl"])
                return state, whole["meta"], near
        if step == -1:
            return None
        path, manifest = self.folder / str(step), read_manifest(self.folder, step)
        params, rest = stored.items(abstract)
        stored.check_same(path, manifest["arrays"], stored.describe(params, rest))
        restored = self._checkpointer.restore(path, args=stored.args("StandardRestore", params=params, rest=rest))
        self._newest = step
        state = stored.state(abstract, restored["params"], restored["rest"], manifest["key_impl"])
        return state, manifest["meta"], step

    def _newest_sound(self) -> int:
        """The newest step that passes `verify`, newer ones moved aside; -1: there is none, -2: all are damaged."""
        for step in reversed(steps(self.folder)):
            problems = verify(self.folder, step)
            if not problems:
                return step
            self._set_aside(step, problems)
        return -2 if list(self.folder.glob("damaged-*")) else -1

    def _newest_fetched(self, copy: scattered.Copy, step: int, arrays: dict[str, Any]) -> int:
        """The newest step from this one down, as `_newest_sound` has it, of which every process got what it needs."""
        while step >= 0:
            problems = copy.fetch(self.folder / str(step), arrays)
            damaged = everyones(problems)
            if not damaged.any():
                break
            others = [f"process {p} finds {n} of its files damaged" for p, n in enumerate(damaged) if n]
            self._set_aside(step, problems or others)
            step = self._newest_sound()
        return step

    def _set_aside(self, step: int, problems: list[str]) -> None:
        aside = self.folder / f"damaged-{step}"
        while aside.exists():
            aside = aside.with_name(f"{aside.name}-again")
        if self._copy is not None:
            self._copy.rename(self.folder / str(step), aside)
        else:
            os.replace(self.folder / str(step), aside)
        log.say(f"{'; '.join(problems)}. Damaged; moved to {aside.name}, the checkpoint before is used.")


# ------------------------------------------------------------------------------------------------------------ reading
def read_meta(folder: Folder, step: int | None = None) -> dict[str, Any]:
    """The `meta` saved with a step (None: the newest sound one)."""
    return read_manifest(folder, newest_sound(folder) if step is None else step)["meta"]


def sound(folder: Folder, step: int) -> bool:
    """Whether nothing is wrong with a checkpoint; every process asks, and gets the same answer. Of several with a copy
    each, each looks at a share of the files."""
    path = pathlib.Path(folder).absolute() / str(step)
    if (copy := scattered.of(path)) is None:
        return not verify(folder, step)
    return not everyones(copy.check(path)).any()


def everyones(problems: list[str]) -> np.ndarray:
    """How many problems each process has found: [processes] int32."""
    return np.atleast_1d(multihost_utils.process_allgather(np.int32(len(problems))))


def identity(folder: Folder) -> str:
    """A hash that stands for the newest sound checkpoint."""
    files = read_manifest(folder, newest_sound(folder))["files"]
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def load_params(folder: Folder, step: int | None = None, shardings: Any = None) -> Params:
    """The parameters of a step (None: the newest sound one), without a model: NumPy arrays, or jax arrays by their
    shardings.

    Args:
      shardings: the parameters' tree of shardings.

    Raises:
      LmtrainError: no checkpoint, a damaged one, or other parameters than the shardings are for.
    """
    if step is None:
        step = newest_sound(folder)
    elif problems := verify(folder, step):
        raise LmtrainError(f"{'; '.join(problems)}. The checkpoint is damaged.")
    path = pathlib.Path(folder).absolute() / str(step)
    copy = scattered.of(path)
    saved = read_manifest(folder, step)["arrays"]
    arrays = {name.removeprefix("params/"): a for name, a in saved.items() if name.startswith("params/")}
    where = dict(stored.flat(shardings)) if shardings is not None else {}
    if where and where.keys() != arrays.keys():
        differs = ", ".join(sorted(where.keys() ^ arrays.keys())[:4])
        raise LmtrainError(f"{path}: its parameters are not those of the model; in one of them only: {differs}.")
    wanted: Params = {}
    for name, (dtype, shape) in arrays.items():
        *parents, last = name.split("/")
        inner = functools.reduce(lambda tree, parent: tree.setdefault(parent, {}), parents, wanted)
        nothing = np.broadcast_to(np.zeros((), dtype), shape)  # takes no memory; tells Orbax to give back NumPy
        inner[last] = jax.ShapeDtypeStruct(shape, dtype, sharding=where[name]) if where else nothing
    if copy is not None and (problems := copy.fetch(path, stored.folders(wanted, {}))):
        raise LmtrainError(f"{'; '.join(problems)}. The checkpoint is damaged.")
    with stored.checkpointer(asynchronous=False, apart=copy is not None) as checkpointer:
        return checkpointer.restore(path, args=stored.args("StandardRestore", params=wanted))["params"]


def params_sha256(params: Params) -> str:
    """sha256 over the parameters: path, dtype, shape and bytes of each, in the order of the paths; same on any mesh."""
    digest = hashlib.sha256()
    for name, x in sorted(stored.flat(params)):
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            x = multihost_utils.process_allgather(x, tiled=True)
        x = np.ascontiguousarray(x)
        digest.update(f"{name} {x.dtype} {list(x.shape)}\n".encode())
        digest.update(x.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _clean(folder: pathlib.Path) -> list[pathlib.Path]:
    """Removes what killed processes left: saves without a manifest, half-deleted checkpoints. Returns their paths."""
    left = []
    for path in folder.glob("*"):
        unfinished = path.name.split(".")[0].isdigit() and path.is_dir() and not (path / MANIFEST).exists()
        if unfinished or path.name.startswith("deleting-"):
            shutil.rmtree(path, ignore_errors=True)
            left.append(path)
    return left
