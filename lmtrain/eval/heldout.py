"""Held-out loss and bits per byte on a fixed set of rows, and what general compressors make of the same bytes."""

from __future__ import annotations

import gzip
import lzma
import math
from collections.abc import Callable, Sequence
from typing import Any

from lmtrain.types import Batch, Params


def score(
    evaluate: Callable[[Params, Batch], Any], params: Params, batches: Sequence[Batch], total_bytes: int
) -> dict[str, float]:
    """Scores every row of the held-out set.

    Args:
      evaluate: (params, batch) -> {name: (sum, weight)}, as made by step.make_evaluate.
      batches: device batches; rows that only fill the last batch carry weight 0.
      total_bytes: UTF-8 bytes that the scored targets stand for.

    Returns:
      heldout_loss: nats a token. heldout_bits_per_byte: comparable across tokenizers.
    """
    nats = tokens = 0.0
    for batch in batches:
        sums = evaluate(params, batch)
        total, weight = sums.get("nll", sums["loss"])  # objectives that add other terms report nll apart
        nats, tokens = nats + float(total), tokens + float(weight)
    return {
        "heldout_loss": nats / tokens,
        "heldout_bits_per_byte": nats / math.log(2) / total_bytes,
    }


def compressors(text: bytes) -> dict[str, float]:
    """Bits per byte of `gzip -9` and `xz -9` on the same bytes: the mark for a model that has learned something."""
    return {
        "gzip -9": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz -9": 8 * len(lzma.compress(text, preset=9)) / len(text),
    }
