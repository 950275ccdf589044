"""Goodput: the share of wall time that went into steps which counted, over all starts of a stage.

FOLDER/wall.json  {"begun": time of the first start, "out": seconds between an orderly stop and the next start that
                  do not count, "stopped": time of the last orderly stop, or null}

The numerator is kept in the checkpoints: seconds of steps done twice are forgotten with the steps. What is lost: start
and compilation, evaluations, saves, steps after the checkpoint that a restart goes back to, and the time between a
crash and the next start.
"""

from __future__ import annotations

import json
import pathlib
import time
from typing import Any

import jax

from lmtrain import storage


class Goodput:
    """The clock of one stage; process 0 keeps the file.

    Args:
      folder: the stage's.
      begun: when this process started on it, seconds since the epoch; now by default.
    """

    def __init__(self, folder: pathlib.Path, begun: float | None = None) -> None:
        self._file = folder / "wall.json"
        begun = time.time() if begun is None else begun
        found: dict[str, Any] = {"begun": begun, "out": 0.0, "stopped": None}
        if self._file.exists():
            found |= json.loads(self._file.read_text())
        if found["stopped"] is not None:
            found["out"] += max(0.0, begun - found["stopped"])
        self._wall = found | {"stopped": None}
        self._write()

    @property
    def begun(self) -> float:
        """When the stage was first started, seconds since the epoch: in process 0, the same at every start."""
        return float(self._wall["begun"])

    def share(self, seconds: float) -> float:
        """Of the wall time so far, the share of the `seconds` that went into steps which counted; at most 1."""
        lived = time.time() - self._wall["begun"] - self._wall["out"]
        return min(1.0, seconds / lived) if lived > 0 else 0.0

    def stop(self) -> None:
        """An orderly stop: the time until the next start does not count."""
        self._wall["stopped"] = time.time()
        self._write()

    def _write(self) -> None:
        if jax.process_index() == 0:
            storage.write_json(self._file, self._wall)
