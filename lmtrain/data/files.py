"""Files from where they lie: what a path stands for, lines with their numbers, and one message for what is damaged."""

from __future__ import annotations

import glob
import gzip
import hashlib
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmtrain.types import LmtrainError, nearest

FETCHED = Path("~/.cache/lmtrain/data")

# What reading a file, packed or not, raises where its bytes are damaged.
_DAMAGED = (OSError, EOFError, zlib.error)


def find(pattern: str, field: str = "data") -> list[Path]:
    """Files that the path of a `field` of the settings stands for (see `matching`)."""
    return matching(pattern, f"{field}.path")


def matching(pattern: str, what: str) -> list[Path]:
    """Files that a path stands for: itself, all in a folder (recursively, hidden ones left out), or a glob's; sorted.

    Raises:
      LmtrainError: none, with the nearest name that there is; or the system takes no such name. Begins with `what`.
    """
    if "://" in pattern:
        return _fetched(pattern, what)
    try:
        return _matching(pattern, what)
    except (OSError, RuntimeError, ValueError) as error:  # no permission, too long, ~nobody, a zero byte
        reason = getattr(error, "strerror", None) or error
        raise LmtrainError(f"{what}: cannot look for {short(pattern)!r}: {reason}") from None


def _fetched(url: str, what: str) -> list[Path]:
    """The same of an address (gs://, s3://, whatever fsspec knows): copies on this machine, fetched once a version."""
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(url)
        names = [path] if fs.isfile(path) else sorted(fs.find(path) or (fs.glob(path) if glob.has_magic(path) else []))
        found = []
        for name in names:
            version = hashlib.sha256(f"{url.split('://')[0]} {name} {fs.ukey(name)}".encode())
            copy = FETCHED.expanduser() / version.hexdigest()[:16] / Path(name).name
            if not copy.exists():
                copy.parent.mkdir(parents=True, exist_ok=True)
                half = copy.with_name(f".{copy.name}.half")
                fs.get_file(name, str(half))
                # A file's time is part of a corpus's identity: a copy fetched anew is the same file.
                os.utime(half, (0, int(version.hexdigest()[:7], 16)))
                os.replace(half, copy)
            found.append(copy)
    except ImportError as error:
        raise LmtrainError(f"{what}: {url}: {error}. pip install -e '.[cloud]' adds gs:// and s3://") from None
    except Exception as error:  # each file system has errors of its own
        raise LmtrainError(f"{what}: {url} cannot be read: {short(str(error) or repr(error))}") from None
    if not found:
        raise LmtrainError(f"{what}: no such file, folder or glob: {url}")
    return found


def _matching(pattern: str, what: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        files = (p for p in path.rglob("*") if p.is_file())
        found = [p for p in files if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    else:
        found = [Path(p) for p in glob.glob(str(path), recursive=True) if os.path.isfile(p)]
    if found:
        return sorted(found)
    if path.is_dir():
        raise LmtrainError(f"{what}: no file in folder {path}")
    parent = path.parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    hint = nearest(str(path), [str(p) for p in parent.iterdir()])
    raise LmtrainError(f"{what}: no such file, folder or glob: {short(pattern)}.{hint}")


def opened(path: Path) -> Any:
    """The file, open to read bytes; .gz is unpacked. LmtrainError where the system refuses."""
    try:
        return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")
    except OSError as error:
        raise LmtrainError(f"{path}: cannot be read: {error.strerror or error}") from None


def content(path: Path) -> bytes:
    """All of a file, unpacked. LmtrainError where it is damaged."""
    with opened(path) as file:
        try:
            return file.read()
        except _DAMAGED as error:
            raise unreadable(str(path), error) from None


def numbered(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1 up, line) of a file, unpacked. LmtrainError where it is damaged."""
    number = 0
    with opened(path) as file:
        try:
            for number, line in enumerate(file, 1):
                yield number, line
        except _DAMAGED as error:
            raise unreadable(f"{path}:{number + 1}", error) from None


def unreadable(where: str, error: Exception) -> LmtrainError:
    """The one message for bytes that are not as they were written."""
    return LmtrainError(f"{where}: cannot be read: {short(str(error), 500)}. Replace the file, or leave it out")


def short(text: str, most: int = 200) -> str:
    """A text on one line that leaves room for the rest of the message."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]}..."
