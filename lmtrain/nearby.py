"""Checkpoints on each host's own disk, more often than those of the run's folder, which every host has to write to.

    FOLDER/P-of-N/STEP/N.npy          this process's shards, one file for each different part of an array
    FOLDER/P-of-N/STEP/manifest.json  as of any checkpoint (manifest.py), with which part each file is

They are good for the same processes on the same mesh, as after a crash. A host that was replaced has none, and then
nobody uses theirs: a step counts only where every process has its part of it, sound and of the same run.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from lmtrain import manifest

KEEP = 2
OFFERED = 8  # steps that a process says it has

Arrays = dict[str, jax.Array]


class Nearby:
    """One process's part of the checkpoints near it.

    Args:
      folder: on a disk of this host.
      run: what tells this run from another that had the same folder.
    """

    def __init__(self, folder: pathlib.Path, run: str) -> None:
        self.folder = folder / f"{jax.process_index()}-of-{jax.process_count()}"
        self.run = run
        self._worker = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="nearby")
        self._saving: concurrent.futures.Future[None] | None = None

    def save(self, step: int, arrays: Arrays, meta: dict[str, Any]) -> None:
        """Copies this process's shards off the devices and returns; writes in the background. A failure is said, and
        costs nothing but the checkpoint."""
        self.wait()
        parts = {name: [(index, np.asarray(shard.data)) for index, shard in _distinct(x)] for name, x in arrays.items()}
        self._saving = self._worker.submit(self._write, step, parts, meta)

    def _write(self, step: int, parts: dict[str, list[tuple[Any, np.ndarray]]], meta: dict[str, Any]) -> None:
        path = self.folder / str(step)
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        files: dict[str, list[tuple[str, Any]]] = {}
        for name, shards in parts.items():
            for index, data in shards:
                file = f"{sum(map(len, files.values()))}.npy"
                # As bytes: NumPy cannot read back what it does not know (bfloat16).
                np.save(path / file, np.ascontiguousarray(data).reshape(-1).view(np.uint8))
                files.setdefault(name, []).append((file, index))
        manifest.write_manifest(path, {"step": step, "run": self.run, "arrays": files, "meta": meta})
        for old in manifest.steps(self.folder)[:-KEEP]:
            shutil.rmtree(self.folder / str(old))

    def wait(self) -> None:
        """Returns when nothing is being written any more."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        try:
            saving.result()
        except Exception as error:
            print(f"{self.folder}: no checkpoint near this host: {error}. The run goes on without.", flush=True)

    def close(self) -> None:
        """Waits, then lets the thread go."""
        self.wait()
        self._worker.shutdown()

    def newest(self, abstract: dict[str, Any]) -> int:
        """The newest step of which every process has its part of these arrays; -1 where there is none."""
        self.wait()
        mine = [step for step in reversed(manifest.steps(self.folder)) if self._good(step, abstract)][:OFFERED]
        if jax.process_count() == 1:
            return max(mine, default=-1)
        offered = np.array(mine + [-1] * (OFFERED - len(mine)), np.int32)
        everyones = multihost_utils.process_allgather(offered)
        return max(set.intersection(*(set(row.tolist()) for row in everyones)), default=-1)

    def _good(self, step: int, abstract: dict[str, Any]) -> bool:
        if manifest.verify(self.folder, step):
            return False
        found = manifest.read_manifest(self.folder, step)
        wanted = {name: sorted(map(str, _wanted(x))) for name, x in abstract.items()}
        there = {name: sorted(str(index) for _, index in files) for name, files in found["arrays"].items()}
        return found["run"] == self.run and wanted == there

    def restore(self, step: int, abstract: dict[str, Any]) -> tuple[Arrays, dict[str, Any]]:
        """(arrays, meta) of a step that `newest` gave."""
        found = manifest.read_manifest(self.folder, step)
        arrays: Arrays = {}
        for name, x in abstract.items():
            files = {str(index): file for file, index in found["arrays"][name]}

            def part(index: Any, x: Any = x, files: dict[str, str] = files) -> np.ndarray:
                key = _plain(index, x.shape)
                shape = [stop - start for start, stop in key]
                return np.load(self.folder / str(step) / files[str(key)]).view(x.dtype).reshape(shape)

            arrays[name] = jax.make_array_from_callback(x.shape, x.sharding, part)
        return arrays, found["meta"]


def place(folder: pathlib.Path) -> str:
    """Where a stage's checkpoints lie in the folder for those of all runs: a name that no other run has."""
    return f"{folder.parent.name}-{hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:12]}-{folder.name}"


def _plain(index: tuple[slice, ...], shape: tuple[int, ...]) -> list[list[int]]:
    """[[start, stop], ...] of a part of an array."""
    return [list(s.indices(n)[:2]) for s, n in zip(index, shape, strict=True)]


def _distinct(x: jax.Array) -> list[tuple[list[list[int]], Any]]:
    """This process's shards, each part of the array once."""
    found = {str(_plain(s.index, x.shape)): (_plain(s.index, x.shape), s) for s in x.addressable_shards}
    return list(found.values())


def _wanted(x: Any) -> list[list[list[int]]]:
    """The parts of an array that this process's devices hold."""
    found = {}
    for index in x.sharding.addressable_devices_indices_map(x.shape).values():
        found[str(_plain(index, x.shape))] = _plain(index, x.shape)
    return list(found.values())
