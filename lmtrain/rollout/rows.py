"""Finished conversations to rows of a batch: one a row, or packed with segments between which nothing is seen.

B rows, T positions. Position t reads token t and is asked for token t + 1; weights_BT marks the targets that the policy
sampled. A conversation's last position is asked for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lmtrain.rollout.episodes import Episode
from lmtrain.types import Batch

#: Where each conversation lies: (row, first position).
Places = list[tuple[int, int]]


def place(lengths: Sequence[int], row_length: int, pack: bool) -> tuple[Places, int]:
    """A place for each conversation, and the number of rows. Packed: first fit, in the order given."""
    if not pack:
        return [(i, 0) for i in range(len(lengths))], len(lengths)
    used: list[int] = []
    places: Places = []
    for n in lengths:
        row = next((i for i, u in enumerate(used) if u + n <= row_length), len(used))
        if row == len(used):
            used.append(0)
        places.append((row, used[row]))
        used[row] += n
    return places, len(used)


def batch(episodes: Sequence[Episode], places: Places, rows: int, row_length: int, pad: int) -> Batch:
    """tokens, targets, weights, segments, positions and the sampler's log-probabilities of conversations at their
    places; what is left of the rows is padding."""
    out: Batch = {
        "tokens_BT": np.full((rows, row_length), pad, np.int32),
        "targets_BT": np.full((rows, row_length), pad, np.int32),
        "weights_BT": np.zeros((rows, row_length), np.float32),
        "segments_BT": np.zeros((rows, row_length), np.int32),
        "positions_BT": np.zeros((rows, row_length), np.int32),
        "sampler_logps_BT": np.zeros((rows, row_length), np.float32),
    }
    segments = np.zeros(rows, np.int32)
    for e, (row, first) in zip(episodes, places, strict=True):
        n = len(e.tokens)
        here, asked = slice(first, first + n), slice(first, first + n - 1)
        segments[row] += 1
        out["tokens_BT"][row, here] = e.tokens
        out["targets_BT"][row, asked] = e.tokens[1:]
        out["weights_BT"][row, asked] = e.own[1:]
        out["segments_BT"][row, here] = segments[row]
        out["positions_BT"][row, here] = np.arange(n)
        out["sampler_logps_BT"][row, asked] = e.logps[1:]
    return out


def spread(values: Sequence[np.ndarray | float], episodes: Sequence[Episode], places: Places, like_BT: np.ndarray):
    """One number, or one for each of its positions but the last, for every conversation -> an array like `like_BT`."""
    out_BT = np.zeros(like_BT.shape, np.float32)
    for value, e, (row, first) in zip(values, episodes, places, strict=True):
        out_BT[row, first : first + len(e.tokens) - 1] = value
    return out_BT


def gather(array_BT: np.ndarray, episodes: Sequence[Episode], places: Places) -> list[np.ndarray]:
    """The other way: for every conversation, the numbers at its positions but the last."""
    return [array_BT[row, first : first + len(e.tokens) - 1] for e, (row, first) in zip(episodes, places, strict=True)]
