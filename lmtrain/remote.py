"""A run's folder in a bucket: worked on in a copy on this machine, which is kept the same as the bucket's.

`gs://`, `s3://` and whatever else fsspec knows. Down at the start; up in a thread every PERIOD seconds, and at the end.
A checkpoint goes up once it is whole, its manifest last, and older ones go only afterwards: the bucket always holds one
from which the run goes on. For one process; several need a folder that all of them see (a mounted bucket).
"""

from __future__ import annotations

import contextlib
import hashlib
import pathlib
import shutil
import threading
from collections.abc import Iterator
from typing import Any

from lmtrain import hosts, manifest, storage
from lmtrain.types import LmtrainError, StorageError

PERIOD = 30.0  # seconds between two looks for what has changed
COPIES = pathlib.Path("~/.cache/lmtrain/runs")


def is_remote(path: Any) -> bool:
    """Whether a path is an address: gs://..., s3://..."""
    return "://" in str(path)


@contextlib.contextmanager
def mirrored(url: str) -> Iterator[pathlib.Path]:
    """The local copy of a run's folder, kept the same as the bucket's while inside.

    Raises:
      LmtrainError: the address is of no file system that is installed.
      StorageError: it cannot be read or written, at the start or at the end.
    """
    if hosts.find().processes > 1:
        raise LmtrainError(
            f"--workdir {url}: several processes need a folder that all of them see; mount the bucket on every host."
        )
    mirror = Mirror(url)
    mirror.probe()
    mirror.pull()
    leave = threading.Event()
    thread = threading.Thread(target=mirror.keep, args=(leave,), name="mirror", daemon=True)
    thread.start()
    try:
        yield mirror.local
    finally:
        leave.set()
        thread.join()
        storage.again(mirror.push)


def copied(url: str) -> pathlib.Path:
    """A copy on this machine of what is at an address now, to be read."""
    mirror = Mirror(url)
    mirror.pull()
    return mirror.local


class Mirror:
    """One folder at an address, and its copy here."""

    def __init__(self, url: str) -> None:
        import fsspec

        try:
            self.fs, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise LmtrainError(f"{url}: {error}. pip install -e '.[cloud]' adds gs:// and s3://.") from None
        self.url, self.root = url, root.rstrip("/")
        name = self.root.rsplit("/", 1)[-1]
        self.local = COPIES.expanduser() / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
        self._there: dict[str, tuple[int, int]] = {}  # what is up, by its size and time of change here

    def probe(self) -> None:
        """Writes and removes a file there."""
        with self._asking("written to"):
            self.fs.pipe_file(f"{self.root}/.writes", b"1")
            self.fs.rm_file(f"{self.root}/.writes")

    def pull(self) -> None:
        """Makes the copy here what is there, checkpoints that are not whole left out."""
        with self._asking("read"):
            self.fs.invalidate_cache()
            names = [name.removeprefix(f"{self.root}/") for name in self.fs.find(self.root)]
            shutil.rmtree(self.local, ignore_errors=True)
            self.local.mkdir(parents=True)
            for name in _whole(names):
                (self.local / name).parent.mkdir(parents=True, exist_ok=True)
                self.fs.get_file(f"{self.root}/{name}", str(self.local / name))
                self._there[name] = _stamp(self.local / name)

    def push(self) -> None:
        """Makes what is there the same as the copy here."""
        with self._asking("written to"):
            here = [str(p.relative_to(self.local)) for p in self.local.rglob("*") if p.is_file()]
            for name in sorted(_whole(here), key=lambda n: (n.endswith(manifest.MANIFEST), n)):
                with contextlib.suppress(FileNotFoundError):  # an old checkpoint, deleted meanwhile
                    stamp = _stamp(self.local / name)
                    if self._there.get(name) != stamp:
                        self.fs.put_file(str(self.local / name), f"{self.root}/{name}")
                        self._there[name] = stamp
            gone = [name for name in self._there if not (self.local / name).exists()]
            for name in sorted(gone, key=lambda n: (not n.endswith(manifest.MANIFEST), n)):
                self.fs.rm_file(f"{self.root}/{name}")
                del self._there[name]

    def keep(self, leave: threading.Event) -> None:
        """Pushes until it is time to leave; what fails is said, and tried again the next time."""
        while not leave.wait(PERIOD):
            try:
                self.push()
            except StorageError as error:
                print(f"{error} Again in {PERIOD:g} s.", flush=True)

    @contextlib.contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        try:
            yield
        except LmtrainError:
            raise
        except Exception as error:  # each file system has errors of its own
            raise StorageError(f"{self.url}: cannot be {what}: {str(error) or repr(error)}.") from error


def _whole(names: list[str]) -> list[str]:
    """Without the files of checkpoints that have no manifest, and without locks and halves."""
    finished = {name.rsplit("/", 1)[0] for name in names if name.endswith(f"/{manifest.MANIFEST}")}

    def wanted(name: str) -> bool:
        before, inside, after = name.partition("checkpoints/")
        if inside:
            return f"{before}{inside}{after.split('/')[0]}" in finished
        last = name.rsplit("/", 1)[-1]
        return last != "lock" and not last.startswith(".") and not last.endswith((".tmp", ".half"))

    return [name for name in names if wanted(name)]


def _stamp(path: pathlib.Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
