"""A folder at an address (gs://, s3://, whatever else fsspec knows), and where a copy of it lies on this machine."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from lmtrain import manifest, storage
from lmtrain.types import LmtrainError, StorageError

PERIOD = 30.0  # seconds between two looks for what has changed
COPIES = pathlib.Path("~/.cache/lmtrain/runs")


def is_remote(path: Any) -> bool:
    """Whether a path is an address: gs://..., s3://..."""
    return "://" in str(path)


class Bucket:
    """One folder at an address. `local` is the folder of its copy here; `kind` tells apart copies of one address."""

    def __init__(self, url: str, kind: str = "run") -> None:
        self.url = url
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
        """Fetches one file, which needs no upload then."""
        (self.local / name).parent.mkdir(parents=True, exist_ok=True)
        self.fs.get_file(f"{self.root}/{name}", str(self.local / name))
        self._there[name] = _stamp(self.local / name)

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
def pushed(push: Callable[[], None]) -> Iterator[None]:
    """Pushes every PERIOD seconds while inside, and at the end. What fails is said and tried again the next time; only
    the end raises it."""
    leave = threading.Event()

    def keep() -> None:
        while not leave.wait(PERIOD):
            try:
                push()
            except StorageError as error:
                print(f"{error} Again in {PERIOD:g} s.", flush=True)

    thread = threading.Thread(target=keep, name="mirror", daemon=True)
    thread.start()
    try:
        yield
    finally:
        leave.set()
        thread.join()
        storage.again(push)


def kept(name: str) -> bool:
    """Whether a file of a run is more than a lock or a half."""
    last = name.rsplit("/", 1)[-1]
    return last != "lock" and not last.startswith(".") and not last.endswith((".tmp", ".half"))


def _stamp(path: pathlib.Path) -> tuple[int, int]:
    """What changes when a file does."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
