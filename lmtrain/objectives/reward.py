"""A reward model: the scalar head, read at the end of a conversation, learns which of two is preferred.

B rows, S conversations of a row, P pairs of a row. Sums over pairs: the step divides once.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lmtrain.objectives import common
from lmtrain.types import Batch, Params

__all__ = ["reward"]


@dataclasses.dataclass(frozen=True)
class Reward:
    """Settings of `reward`."""

    SOURCE: ClassVar[str] = "pairs"
    SCALAR: ClassVar[bool] = True  # the model gets a scalar head

    center: float = 0.0  # weight of (r_c + r_r)^2, which keeps rewards around 0 (Eisenstein et al., arXiv 2312.09244)

    def __post_init__(self):
        common.within(self, center=(0, None))


def scores(forward: Any, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The scalar head at the last token of every conversation.

    Returns:
      (scores float32 [B, S], which conversations count (some weight is above 0) [B, S], router losses)

    Raises:
      ConfigError: a model without scalar_head.
    """
    hidden_BTD, aux = forward.hidden(params, batch)
    segments_BT = common.segments(batch)
    counts_BS = common.per_segment(batch["weights_BT"], segments_BT) > 0
    return common.read_last(forward.scalar(params, hidden_BTD), segments_BT), counts_BS, aux


def reward(forward: Any, params: Params, batch: Batch, cfg: Reward) -> common.Return:
    """Bradley and Terry's -log sigmoid(r_c - r_r - margin), a mean over pairs (Ouyang et al., arXiv 2203.02155, eq. 1).

    Optional margins_BT (Llama 2, arXiv 2307.09288, eq. 2) say by how much the chosen reply should win.

    Metrics: accuracy (a tie counts half), margin (r_c - r_r), chosen and rejected (mean scores).
    """
    r_BS, counts_BS, aux = scores(forward, params, batch)
    chosen_BP, rejected_BP = common.pairs(r_BS)
    first_BP, second_BP = common.pairs(counts_BS)
    w_BP = (first_BP & second_BP).astype(r_BS.dtype)
    delta_BP = chosen_BP - rejected_BP
    if "margins_BT" in batch:
        delta_BP -= common.pairs(common.read_last(batch["margins_BT"], common.segments(batch)))[0]
    loss_BP = cfg.center * jnp.square(chosen_BP + rejected_BP) - jax.nn.log_sigmoid(delta_BP)
    return common.over_pairs(loss_BP, chosen_BP, rejected_BP, w_BP, aux / batch["weights_BT"].shape[1])
