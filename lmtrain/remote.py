"""A run's folder in a bucket: worked on in a copy on this machine, which is kept the same as the bucket's.

`gs://`, `s3://` and whatever else fsspec knows. Down at the start; up in a thread every PERIOD seconds, and at the end.
A checkpoint goes up once it is whole, its manifest last, and older ones go only afterwards: the bucket always holds one
from which the run goes on. For one process; of several each has a part of it (scattered.py).
"""

from __future__ import annotations

import contextlib
import pathlib
import shutil
from collections.abc import Iterator

from lmtrain import manifest
from lmtrain.bucket import Bucket, kept, pushed


@contextlib.contextmanager
def mirrored(url: str) -> Iterator[pathlib.Path]:
    """The local copy of a run's folder, kept the same as the bucket's while inside.

    Raises:
      LmtrainError: the address is of no file system that is installed.
      StorageError: it cannot be read or written, at the start or at the end.
    """
    mirror = Mirror(url)
    with mirror.alone():
        mirror.probe()
        mirror.pull()
        with pushed(mirror.push):
            yield mirror.local


class Mirror(Bucket):
    """One folder at an address, and the whole of it here."""

    def pull(self) -> None:
        """Makes the copy here what is there, checkpoints that are not whole left out."""
        with self.asking("read"):
            self.fs.invalidate_cache()
            names = [name.removeprefix(f"{self.root}/") for name in self.fs.find(self.root)]
            here = [str(p.relative_to(self.local)) for p in self.local.rglob("*") if p.is_file()]
            ours, theirs = _newest(_whole(here)), _newest(_whole(names))
            if any(step > theirs.get(stage, -1) for stage, step in ours.items()):
                print(f"{self.url}: the copy in {self.local} is newer, and goes up.", flush=True)
                return
            shutil.rmtree(self.local, ignore_errors=True)
            self.local.mkdir(parents=True)
            for name in _whole(names):
                self.download(name)

    def push(self) -> None:
        """Makes what is there the same as the copy here."""
        self.upload(_whole)


def _whole(names: list[str]) -> list[str]:
    """Without the files of checkpoints that have no manifest, and without locks and halves."""
    finished = {name.rsplit("/", 1)[0] for name in names if name.endswith(f"/{manifest.MANIFEST}")}

    def wanted(name: str) -> bool:
        before, inside, after = name.partition("checkpoints/")
        if inside:
            return f"{before}{inside}{after.split('/')[0]}" in finished
        return kept(name)

    return [name for name in names if wanted(name)]


def _newest(names: list[str]) -> dict[str, int]:
    """{stage: the newest step of which there is a checkpoint}."""
    found: dict[str, int] = {}
    for name in names:
        stage, inside, after = name.partition("/checkpoints/")
        step = after.split("/")[0]
        if inside and step.isdecimal():
            found[stage] = max(found.get(stage, -1), int(step))
    return found
