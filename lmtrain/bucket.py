"""A folder at an address (gs://, s3://, whatever else fsspec knows), and where a copy of it lies on this machine."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from lmtrain import manifest, storage
from lmtrain.types import LmtrainError, Stopped, StorageError

PERIOD = 30.0  # seconds between two looks for what has changed
SOON = 2.0  # the same, where somebody waits for it
COPIES = pathlib.Path("~/.cache/lmtrain/runs")


def is_remote(path: Any) -> bool:
    """Whether a path is an address: gs://..., s3://..."""
    return "://" in str(path)


class Bucket:
    """One folder at an address. `local` is the folder of its copy here; `kind` tells apart copies of one address."""

    def __init__(self, url: str, kind: str = "run") -> None:
        self.url, self.kind = url, kind.split("-")[0]
        name = url.rstrip("/").rsplit("/", 1)[-1]
        self.local = COPIES.expanduser() / f"{kind}-{name}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
        self._there: dict[str, tuple[int, int]] = {}  # what is up, by its size and time of change here

    @functools.cached_property
    def _opened(self) -> tuple[Any, str]:
        import fsspec

        try:
            folders = {"auto_mkdir": True} if self.url.startswith(("file:", "local:")) else {}
            fs, root = fsspec.core.url_to_fs(self.url, **folders)
        except (ImportError, ValueError) as error:
            raise LmtrainError(f"{self.url}: {error}. pip install -e '.[cloud]' adds gs:// and s3://.") from None
        return fs, root.rstrip("/")

    @property
    def fs(self) -> Any:
        """fsspec's file system. Raises LmtrainError where the address is of none that is installed."""
        return self._opened[0]

    @property
    def root(self) -> str:
        """The folder's path there."""
        return self._opened[1]

    def probe(self, mark: str = ".writes") -> None:
        """Writes and removes a file there. Raises StorageError where that cannot be."""
        with self.asking("written to"):
            self.fs.pipe_file(f"{self.root}/{mark}", b"1")
            self.fs.rm_file(f"{self.root}/{mark}")

    def upload(self, wanted: Callable[[list[str]], list[str]]) -> None:
        """Makes what is there the same as the files here that are wanted: manifests go up last, and come down first."""
        with self.asking("written to"):
            if not self.local.is_dir():
                return
            here = wanted([str(p.relative_to(self.local)) for p in self.local.rglob("*") if p.is_file()])
            for name in sorted(here, key=lambda n: (n.endswith(manifest.MANIFEST), n)):
                try:
                    now = _stamp(self.local / name)
                    if self._there.get(name) != now:
                        self.fs.put_file(str(self.local / name), f"{self.root}/{name}")
                        self._there[name] = now
                except FileNotFoundError:
                    if (self.local / name).exists():  # else an old checkpoint, deleted meanwhile
                        raise
            gone = [name for name in self._there if not (self.local / name).exists()]
            for name in sorted(gone, key=lambda n: (not n.endswith(manifest.MANIFEST), n)):
                with contextlib.suppress(FileNotFoundError):
                    self.fs.rm_file(f"{self.root}/{name}")
                del self._there[name]

    def download(self, name: str) -> None:
        """Fetches one file; it needs no upload then, and is removed there when it is removed here."""
        self._there[name] = _stamp(self.fetched(name))

    def fetched(self, name: str) -> pathlib.Path:
        """Fetches one file, in one rename, and returns its path here."""
        file = self.local / name
        file.parent.mkdir(parents=True, exist_ok=True)
        half = file.with_name(f".{file.name}.{os.getpid()}.half")
        self.fs.get_file(f"{self.root}/{name}", str(half))
        os.replace(half, file)
        return file

    def patiently(self, what: str, work: Callable[[], Any]) -> Any:
        """Does it, and again after a while where the bucket refuses."""
        done: list[Any] = []

        def once() -> None:
            with self.asking(what):
                done.append(work())

        storage.again(once)
        return done[0]

    @contextlib.contextmanager
    def asking(self, what: str) -> Iterator[None]:
        """Turns what a file system refuses inside into a StorageError that names the address."""
        try:
            yield
        except LmtrainError:
            raise
        except Exception as error:  # each file system has errors of its own
            raise StorageError(f"{self.url}: cannot be {what}: {str(error) or repr(error)}.") from error

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Holds a lock beside the copy: two runs on one machine would work in the same."""
        self.local.parent.mkdir(parents=True, exist_ok=True)
        with self.local.with_name(f"{self.local.name}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise LmtrainError(f"{self.url}: another process of this machine is running there.") from None
            yield


@contextlib.contextmanager
def now_and_then(work: Callable[[], None], soon: Callable[[], bool] = bool) -> Iterator[None]:
    """Inside, a thread does the work every PERIOD seconds, and every SOON while it is wanted soon. What fails is said,
    and tried again the next time."""
    leave = threading.Event()

    def keep() -> None:
        last = time.monotonic()
        while not leave.wait(min(SOON, PERIOD)):
            if time.monotonic() - last < PERIOD and not soon():
                continue
            try:
                work()
            except StorageError as error:
                print(f"{error} Again in {PERIOD:g} s.", flush=True)
            last = time.monotonic()

    thread = threading.Thread(target=keep, name="bucket", daemon=True)
    thread.start()
    try:
        yield
    finally:
        leave.set()
        thread.join()


@contextlib.contextmanager
def pushed(push: Callable[[], None], soon: Callable[[], bool] = bool) -> Iterator[None]:
    """Pushes now and then while inside, and at the end. Where what is inside fails, that is the error: the last push is
    tried once."""
    try:
        with now_and_then(push, soon):
            yield
    except Stopped:
        storage.again(push)
        raise
    except BaseException:
        try:
            push()
        except LmtrainError as error:
            print(error, flush=True)
        raise
    else:
        storage.again(push)


def kept(name: str) -> bool:
    """Whether a file of a run is more than a lock or a half."""
    last = name.rsplit("/", 1)[-1]
    return last != "lock" and not last.startswith(".") and not last.endswith((".tmp", ".half"))


def _stamp(path: pathlib.Path) -> tuple[int, int]:
    """What changes when a file does."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
