"""The words that every room shares: Batch, TrainState, and the legend of shape letters.

Arrays are named by their shape, one capital letter a dimension, last in the name (`tokens_BT`, `q_BTNH`):

    B  rows of a batch                 N  query heads
    T  positions of a row (queries)    K  key/value heads, G = N // K queries for each
    S  positions of the keys           H  size of a head
    D  width of the model              F  width of the MLP's hidden layer
    V  vocabulary                      E  experts
    L  layers of a stack               A  microbatches that one update accumulates
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import flax.struct
import jax
import numpy as np

Array = jax.Array | np.ndarray

#: Names of a batch's arrays, each with its shape. Pretraining and SFT use
#:   tokens_BT    int32    what the model reads
#:   targets_BT   int32    the token that follows, within the same document
#:   weights_BT   float32  1 where the target counts in the loss, else 0
#:   segments_BT  int32    1, 2, ... for the documents of a row, 0 for padding (absent: a row is one document)
#:   positions_BT int32    position within the document (absent: 0, 1, 2, ...)
#:   groups_BT    int32    with data.groups: the cell (group and outcome) of the document, 0 for none
#:   balance_BT   float32  with data.groups: what a token would weigh were all cells as frequent (group 0: 1)
#: Objectives add their own. Arrays stay NumPy on the host until `mesh.put`.
Batch = dict[str, Any]

#: A nested dict of arrays.
Params = dict[str, Any]


@flax.struct.dataclass
class TrainState:
    """All that one update reads and replaces. A pytree; donated to the jitted step.

    Attributes:
      step: int32 scalar, updates done so far.
      params: nested dict of float32 master weights.
      opt_state: the optax state.
      key: a typed jax.random key, saved and restored with the rest, for objectives that draw. No update changes it:
        who draws folds `step` into it. Pretraining draws nothing.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    key: jax.Array


@flax.struct.dataclass
class Frozen:
    """A model that an objective reads and never trains (a teacher), passed in the batch: `batch["teacher"]`.

    Attributes:
      params: its parameters.
      forward: its transformer.Forward.
    """

    params: Params
    forward: Any = flax.struct.field(pytree_node=False)


class LmtrainError(Exception):
    """An error of the user's making: the command prints its message alone, without a traceback, and exits with 2.

    The message says what, where, what was expected, and the nearest valid name.

    Attributes:
      status: the exit status of the command.
    """

    status = 2


class Stopped(LmtrainError):
    """SIGTERM or Ctrl-C: the run is saved; the same command goes on."""

    status = 75  # EX_TEMPFAIL


class HostGone(LmtrainError):
    """Another process is gone, or did not come. All begin again from the newest checkpoint."""

    status = 76


class StorageError(LmtrainError):
    """A disk, a file system or a bucket refuses; once it is mended, the same command goes on."""

    status = 74  # EX_IOERR


def nearest(got: str, names: Iterable[str]) -> str:
    """The end of an error message: " Did you mean NAME?", or "" where no name is near."""
    near = difflib.get_close_matches(got, sorted(names), 1)
    return f" Did you mean {near[0]}?" if near else ""
