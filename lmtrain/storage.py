"""Writing where storage may refuse: what may pass is tried again, what does not is one message that names the path."""

from __future__ import annotations

import contextlib
import errno
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from lmtrain.types import StorageError

PAUSES = (0.5, 1.0, 2.0, 4.0)  # seconds before a line is written again
#: What may pass by itself, or be mended while a run waits: a full disk, a network file system that is away.
PASSING = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY}


APART = ".apart"  # marks one process's copy of a run's folder, which the other processes do not see

WANTED = ".wanted"  # in a folder of such a copy: this process waits for what another makes there


def shared(folder: pathlib.Path) -> bool:
    """Whether all processes of a run see what one of them writes there."""
    return not any((path / APART).exists() for path in (folder, *folder.parents))


def write_json(file: pathlib.Path, value: Any) -> None:
    """Writes through a temporary file, so that a kill leaves the old one or the new one."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1))
    temporary.replace(file)


def patiently(write: Callable[[], None], path: pathlib.Path) -> None:
    """Writes; after each of PAUSES again, while the storage refuses for a reason that may pass."""
    for pause in (*PAUSES, None):
        try:
            with writing(path):
                return write()
        except StorageError as error:
            if pause is None or getattr(error.__cause__, "errno", None) not in PASSING:
                raise
            time.sleep(pause)


def again(work: Callable[[], None]) -> None:
    """Does it; after each of PAUSES again, while it raises a StorageError."""
    for pause in (*PAUSES, None):
        try:
            return work()
        except StorageError:
            if pause is None:
                raise
            time.sleep(pause)


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """What the disk refuses inside becomes one message that names the path."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(
            f"{path}: could not be written: {reason}. Once that is mended, the same command goes on."
        ) from error
