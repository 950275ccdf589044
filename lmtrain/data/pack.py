"""Documents to rows. A corpus is one stream, `begin` before each document; row r is tokens r*T .. r*T + T of it.

So a document of n tokens is read as [begin, t1 .. tn] and asked for [t1 .. tn, end]: nothing is lost, nothing is
repeated, and no target crosses a border. (lmtrain's own vocabulary has <|endoftext|> for both.) Every row can be made
on its own, from its number alone: that is what lets the iterator's state be one number (packing by best fit would carry
its bins along).
"""

from __future__ import annotations

import numpy as np

from lmtrain.data.store import Stream
from lmtrain.types import Batch


def count(tokens: int, row_length: int) -> int:
    """Rows of T that a stream of so many tokens fills; the last one may be padded."""
    return -(-tokens // row_length)


def window(stream: Stream, row: int, row_length: int, begin: int) -> np.ndarray:
    """The up to T+1 tokens that one row reads and is asked for; fewer in a last row that is not full."""
    start = row * row_length
    tokens = stream.read(start, start + row_length + 1)
    # Behind the last document one more would begin: its last token's target.
    return np.append(tokens, tokens.dtype.type(begin)) if start + row_length >= len(stream) else tokens


def pack(windows: list[np.ndarray], row_length: int, begin: int, end: int, pad: int) -> Batch:
    """Rows from their windows, int [up to T+1] each; an empty one gives a row of padding.

    Returns:
      tokens_BT, targets_BT, segments_BT, positions_BT int32, weights_BT float32. Segments count 1, 2, ... within a row,
      and positions restart at 0 with each; padding has segment, position and weight 0.
    """
    B, T = len(windows), row_length
    ids_BS = np.full((B, T + 1), pad, np.int32)
    length_B1 = np.zeros((B, 1), np.int32)
    for b, tokens in enumerate(windows):
        ids_BS[b, : len(tokens)] = tokens
        length_B1[b] = max(len(tokens) - 1, 0)
    tokens_BT = ids_BS[:, :-1].copy()
    targets_BT = ids_BS[:, 1:].copy()
    at_T = np.arange(T, dtype=np.int32)
    real_BT = at_T < length_B1
    if not real_BT.all():
        tokens_BT[~real_BT] = pad
    targets_BT[targets_BT == begin] = end  # where the next document begins, this one ends
    begins_BT = tokens_BT == begin
    begins_BT[:, 0] = True  # a document cut by the row's start begins anew here: what came before cannot be seen
    segments_BT = np.cumsum(begins_BT, axis=1, dtype=np.int32)
    positions_BT = at_T - np.maximum.accumulate(np.where(begins_BT, at_T, 0), axis=1)
    if not real_BT.all():
        segments_BT[~real_BT] = 0
        positions_BT[~real_BT] = 0
    return {
        "tokens_BT": tokens_BT,
        "targets_BT": targets_BT,
        "weights_BT": real_BT.astype(np.float32),
        "segments_BT": segments_BT,
        "positions_BT": positions_BT,
    }


def best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Which items of these lengths share a row of `capacity`: the longest first, each where it leaves the least room.

    The rows are a function of the lengths alone, so whoever has the items has the rows, and their numbers.

    Args:
      lengths: int[n], each at most `capacity`.

    Returns:
      The items of every row, by number.
    """
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # by the room they have left
    rooms = 0  # bit r is set where a row has room r left: the next larger one is found without a search
    for item in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = int(lengths[item])
        fits = rooms >> length
        if fits:
            room = length + (fits & -fits).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(item)
        if left := room - length:
            open_rows[left].append(row)
            rooms |= 1 << left
    return rows
