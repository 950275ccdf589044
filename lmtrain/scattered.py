"""A run's folder in a bucket when several processes work on it: each has a copy of its own, and none has all of it.

What is small (settings, tokenizer, metrics, manifests) process 0 writes. It goes up now and then, and wherever the
processes meet, and the others fetch it there. Tokenised text comes down wherever it is waited for.

The arrays of a checkpoint stay apart: each process uploads the chunks that it holds, process 0 the manifest once all
have, and each fetches the chunks that its devices need, compared with the manifest's sha256. In the bucket it is a
checkpoint like any other, for any number of processes.

    BUCKET/.owner   who started last: an earlier start that is still alive ends at its next checkpoint
    COPY/.apart     what tells that other processes do not see this folder (storage.shared), and of which bucket it is
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import itertools
import json
import os
import pathlib
import re
import secrets
import shutil
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from lmtrain import manifest, mesh, storage
from lmtrain.bucket import Bucket, is_remote, kept, now_and_then, pushed
from lmtrain.types import LmtrainError, Stopped, StorageError

CHUNK = re.compile(r"\d+(\.\d+)*")  # of an array, in zarr's folder of it
OWN = re.compile(CHUNK.pattern + r"|process_\d+")  # what no two processes write
PART = re.compile(r"part-\d+\.json")  # what a process says that it has uploaded
STEP = re.compile(r"\d+|damaged-.+")  # a checkpoint's folder
THREADS = 8  # uploads and downloads at once
UPLOAD = 3600  # seconds that processes wait for one another's part of a checkpoint
OWNER = ".owner"
TEXT = "data/"  # of a run's folder: what is tokenised


class Copy(Bucket):
    """One process's copy; of kind "read", what all processes of a machine read of a run that is not theirs."""

    def __init__(self, url: str, process: int, processes: int, kind: str = "run") -> None:
        super().__init__(url, f"run-{process}-of-{processes}" if kind == "run" else kind)
        self.process, self.processes = process, processes
        self._lock = threading.Lock()
        self._fetched: dict[str, str] = {}  # small files, by what the bucket said of them then
        self._token = secrets.token_hex(8).encode()

    def refusal(self) -> str:
        """Why this process cannot write there, or ""."""
        try:
            self.probe(f".writes-{self.process}")
        except LmtrainError as error:
            return str(error)
        return ""

    # -------------------------------------------------------------------------------------------------- small files
    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Inside, the copy is there; what process 0 writes goes up now and then, and at the end."""
        with self.alone():
            shutil.rmtree(self.local, ignore_errors=True)
            self.mark()
            if self.process == 0:
                self.patiently("written to", lambda: self.fs.pipe_file(f"{self.root}/{OWNER}", self._token))
                storage.again(self._sweep)
            storage.again(self.pull)
            storage.again(self.pull_text)
            try:
                with now_and_then(self.pull_text, self._waits) if self.process else pushed(self.push, self._has_text):
                    yield
            except Stopped:
                mesh.meet("the run has stopped", UPLOAD)  # with the last push: JAX ends who waits for longer than 30 s
                raise
            mesh.meet("the run is done", UPLOAD)

    def mark(self) -> None:
        """Makes the folder, with what tells that it is a copy."""
        self.local.mkdir(parents=True, exist_ok=True)
        mark = {"url": self.url, "process": self.process, "processes": self.processes, "kind": self.kind}
        half = self.local / f"{storage.APART}.{os.getpid()}"
        half.write_text(json.dumps(mark))
        os.replace(half, self.local / storage.APART)

    def pull(self) -> None:
        """Fetches what changed there, and removes what is gone: all but tokenised text and checkpoints' arrays."""
        with self.asking("read"):
            self.fs.invalidate_cache()
            found = self.fs.find(self.root, detail=True)
            there = {name.removeprefix(f"{self.root}/"): repr(info) for name, info in found.items()}
            there = {name: there[name] for name in _small(list(there)) if not name.startswith(TEXT)}
            for name in [name for name in there if self._fetched.get(name) != there[name]]:
                self.download(name)
            here = _small([str(p.relative_to(self.local)) for p in self.local.rglob("*") if p.is_file()])
            for name in {name for name in here if not name.startswith(TEXT)} - there.keys():
                (self.local / name).unlink(missing_ok=True)
            self._fetched = there

    def pull_text(self) -> None:
        """Fetches the tokenised text that is there and not here: shards first, so that their manifest finds them."""
        with self.asking("read"):
            self.fs.invalidate_cache()
            names = _small([name.removeprefix(f"{self.root}/") for name in self.fs.find(f"{self.root}/{TEXT}")])
            for name in sorted(names, key=lambda n: (n.endswith(manifest.MANIFEST), n)):
                if not (self.local / name).exists():
                    self.download(name)

    def give(self, *files: pathlib.Path) -> None:
        """Uploads files of this copy."""
        for name in map(self._name, files):
            self.patiently(
                "written to", functools.partial(self.fs.put_file, str(self.local / name), f"{self.root}/{name}")
            )

    def _waits(self) -> bool:
        """Whether this process waits for text that process 0 tokenises."""
        return any(self.local.glob(f"{TEXT}*/{storage.WANTED}"))

    def _has_text(self) -> bool:
        """Whether process 0 has tokenised text that the others wait for."""
        found = self.local.glob(f"{TEXT}*/{manifest.MANIFEST}")
        return any(str(path.relative_to(self.local)) not in self._there for path in found)

    def push(self) -> None:
        """In process 0: makes what is there the same as what is here, but for the arrays of checkpoints."""
        with self._lock:
            self.upload(_small)

    @contextlib.contextmanager
    def pushed_once(self) -> Iterator[None]:
        """In process 0: pushes; inside, no file there changes, so that the others read whole ones."""
        with self._lock:
            storage.again(lambda: self.upload(_small))
            yield

    def _sweep(self) -> None:
        """Removes what saves that were killed have left there."""
        with self.asking("written to"):
            self.fs.invalidate_cache()
            names = [name.removeprefix(f"{self.root}/") for name in self.fs.find(self.root)]
            steps = {m.group() for name in names if (m := re.match(r".*/?checkpoints/[^/]+(?=/)", name))}
            finished = {name.rsplit("/", 1)[0] for name in names if name.endswith(f"/{manifest.MANIFEST}")}
            for step in (unfinished := steps - finished):
                self.fs.rm(f"{self.root}/{step}", recursive=True)
            for name in names:
                if PART.fullmatch(name.rsplit("/", 1)[-1]) and name.rsplit("/", 1)[0] not in unfinished:
                    self.fs.rm_file(f"{self.root}/{name}")

    # -------------------------------------------------------------------------------------------------- checkpoints
    def save(self, path: pathlib.Path, body: dict[str, Any]) -> None:
        """Uploads this process's part of a checkpoint, and once all have, the manifest. In every process, in any
        thread; returns when the checkpoint stands. `body`: of the manifest."""
        name = self._name(path)
        sums = manifest.sums(path)
        mine = {f: s for f, s in sums.items() if self.process == 0 or OWN.fullmatch(f.rsplit("/", 1)[-1])}

        def put(file: str) -> None:
            source, target = str(path / file), f"{self.root}/{name}/{file}"
            self.patiently("written to", lambda: self.fs.put_file(source, target))

        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(put, mine))
        parts = [f"{self.root}/{name}/part-{process}.json" for process in range(self.processes)]
        said = json.dumps(mine).encode()
        self.patiently("written to", lambda: self.fs.pipe_file(parts[self.process], said))
        mesh.meet(f"{name}: arrays", UPLOAD)
        if self.process == 0:
            texts = [self.patiently("read", functools.partial(self.fs.cat_file, part)) for part in parts]
            self._still_ours()
            manifest.write_manifest(path, body, {f: s for text in texts for f, s in json.loads(text).items()})
            storage.again(self.push)
            with self._tidying():
                for part in parts:
                    self.fs.rm_file(part)
        mesh.meet(f"{name}: manifest", UPLOAD)
        if self.process:
            for file in sums.keys() - mine.keys():  # process 0's are the checkpoint's
                (path / file).unlink()
            self.patiently("read", lambda: self.download(f"{name}/{manifest.MANIFEST}"))

    def _still_ours(self) -> None:
        """Raises LmtrainError where the run was started anew, elsewhere, while this start of it was thought dead."""
        if self.patiently("read", lambda: self.fs.cat_file(f"{self.root}/{OWNER}")) != self._token:
            raise LmtrainError(f"{self.url}: the run was started again elsewhere, and goes on there.")

    @contextlib.contextmanager
    def _tidying(self) -> Iterator[None]:
        """What fails inside is said, and costs room in the bucket alone."""
        try:
            with self.asking("written to"):
                yield
        except StorageError as error:
            print(error, flush=True)

    def fetch(self, path: pathlib.Path, needed: Mapping[str, Any]) -> list[str]:
        """Fetches what this process needs of a checkpoint. Returns what is wrong with it.

        Args:
          needed: {folder of an array: of its shape, with the sharding by which it is read; without one, all of it}.
        """
        try:
            files: manifest.Sums = manifest.read_manifest(path.parent, int(path.name))["files"]
        except LmtrainError as error:
            return [str(error)]
        chunked = {f.rsplit("/", 1)[0] for f in files if f.endswith("/.zarray")}
        rest = {f for f in files if f.rsplit("/", 1)[0] not in chunked or not CHUNK.fullmatch(f.rsplit("/", 1)[-1])}
        if problems := self._get(path, {f: files[f] for f in rest}):
            return problems
        names = {f"{array}/{c}" for array, x in needed.items() if array in chunked for c in _chunks(path / array, x)}
        if lost := sorted(names - files.keys()):
            return [f"{self._name(path)}/{lost[0]}: not in the manifest"]
        return self._get(path, {f: files[f] for f in names})

    def check(self, path: pathlib.Path) -> list[str]:
        """What is wrong with this process's share of the files of a checkpoint, which it fetches."""
        try:
            files: manifest.Sums = manifest.read_manifest(path.parent, int(path.name))["files"]
        except LmtrainError as error:
            return [str(error)]
        return self._get(path, {f: files[f] for f in sorted(files)[self.process :: self.processes]})

    def _get(self, path: pathlib.Path, files: manifest.Sums) -> list[str]:
        """Fetches those that are not here; returns what is wrong with any."""

        def get(file: str) -> None:
            with contextlib.suppress(FileNotFoundError):  # `compare` names it
                self.fetched(f"{self._name(path)}/{file}")

        old = [path / file for file in files if (path / file).exists()]
        for _ in range(2):
            with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
                missing = [functools.partial(get, file) for file in files if not (path / file).exists()]
                list(pool.map(functools.partial(self.patiently, "read"), missing))
            if not (problems := manifest.compare(path, files)) or not old:
                break
            while old:  # perhaps of another run that had this address, or this disk damaged them
                old.pop().unlink(missing_ok=True)
        return problems

    def remove(self, path: pathlib.Path) -> None:
        """In process 0: removes a checkpoint there, its manifest first."""
        with self._tidying(), contextlib.suppress(FileNotFoundError):
            self.push()
            self.fs.invalidate_cache()
            self.fs.rm(f"{self.root}/{self._name(path)}", recursive=True)

    def rename(self, path: pathlib.Path, to: pathlib.Path) -> None:
        """Gives a checkpoint another name, here and, in process 0, there."""
        with self._lock:  # no push sees it half done
            if path.exists():
                os.replace(path, to)
            if self.process == 0:
                with self.asking("written to"):
                    self.fs.invalidate_cache()
                    old, new = (f"{self.root}/{self._name(p)}/" for p in (path, to))
                    names = [name.removeprefix(old) for name in self.fs.find(old)]
                    for name in sorted(names, key=lambda n: n != manifest.MANIFEST):  # without it, no checkpoint
                        self.fs.mv(old + name, new + name)

    def _name(self, path: pathlib.Path) -> str:
        return path.relative_to(self.local).as_posix()


def found(name: str) -> pathlib.Path:
    """Where a run, a stage of one, or its tokenizer is read: the folder itself, or for an address a copy, to which the
    arrays of a checkpoint come once they are asked for.

    Raises:
      LmtrainError: there is no run at the address, or it cannot be read.
    """
    if not is_remote(name):
        return pathlib.Path(name)
    run = run_of(name)
    return opened(run) / name.rstrip("/").removeprefix(run).lstrip("/")


def run_of(url: str) -> str:
    """The address of the run that a stage or its tokenizer, or the run itself, lies at."""
    url = url.rstrip("/")
    for run in (url, url.rsplit("/", 1)[0]):
        copy = Copy(run, 0, 1, kind="read")
        with copy.asking("read"):
            if copy.fs.exists(f"{copy.root}/tokenizer/config.json"):
                return run
    raise LmtrainError(f"{url}: no run is there, nor a stage of one.")


@functools.cache  # a process sees the same run all the time, even one that goes on
def opened(url: str) -> pathlib.Path:
    """The copy of a run that lies at an address, as it is now, but for tokenised text and checkpoints' arrays."""
    copy = Copy(url, 0, 1, kind="read")
    copy.mark()
    storage.again(copy.pull)
    return copy.local


def of(folder: pathlib.Path) -> Copy | None:
    """The copy that a folder lies in, to fetch arrays into; None where all processes see the folder."""
    for path in (folder, *folder.parents):
        if (path / storage.APART).exists():
            mark = json.loads((path / storage.APART).read_text())
            return Copy(mark["url"], mark["process"], mark["processes"], mark["kind"])
    return None


def _small(names: list[str]) -> list[str]:
    """Without the arrays of checkpoints, and without locks and halves."""

    def small(name: str) -> bool:
        _, inside, after = name.rpartition("checkpoints/")
        step, _, file = after.partition("/")
        return kept(name) and (not inside or bool(file == manifest.MANIFEST and STEP.fullmatch(step)))

    return [name for name in names if small(name)]


def _chunks(array: pathlib.Path, x: Any) -> set[str]:
    """The files of an array's chunks that this process's devices need."""
    zarray = json.loads((array / ".zarray").read_text())
    shape, sizes = tuple(zarray["shape"]), zarray["chunks"]
    sharding = getattr(x, "sharding", None)
    whole = (slice(None),) * len(shape)
    indices = sharding.addressable_devices_indices_map(shape).values() if sharding is not None else [whole]
    names = set()
    for index in indices:
        spans = [s.indices(n) for s, n in zip(index, shape, strict=True)]
        grid = [range(start // size, -(-stop // size)) for (start, stop, _), size in zip(spans, sizes, strict=True)]
        names |= {".".join(map(str, at)) or "0" for at in itertools.product(*grid)}
    return names
