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
      heldout_loss: nats a token where the objective reports `nll` (others add terms to it), else the objective's loss.
      heldout_bits_per_byte, with `nll`: comparable across tokenizers. heldout_NAME: every other metric's mean.
    """
    totals: dict[str, list[float]] = {}
    for batch in batches:
        for name, (total, weight) in evaluate(params, batch).items():
            sums = totals.setdefault(name, [0.0, 0.0])
            sums[0], sums[1] = sums[0] + float(total), sums[1] + float(weight)
    nats, tokens = totals.get("nll", totals["loss"])
    out = {"heldout_loss": nats / tokens if tokens else math.nan}
    if "nll" in totals and total_bytes:
        out["heldout_bits_per_byte"] = nats / math.log(2) / total_bytes
    for name, (total, weight) in totals.items():
        if name not in ("loss", "nll") and not name.endswith("_max"):
            out[f"heldout_{name}"] = total / weight if weight else math.nan
    return out


def compressors(text: bytes) -> dict[str, float]:
    """Bits per byte of `gzip -9` and `xz -9` on the same bytes: the mark for a model that has learned something."""
    return {
        "gzip -9": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz -9": 8 * len(lzma.compress(text, preset=9)) / len(text),
    }
