"""Next-token prediction. B rows, T positions; weights_BT marks the targets that count. Sums: the step divides once."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lmtrain.types import Batch, Params

__all__ = ["pretrain"]


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """Settings of `pretrain`."""

    z_loss: float = 0.0  # weight of log(Z)^2, which keeps logits from drifting (PaLM, arXiv 2204.02311, section 5)


def pretrain(
    forward: Any, params: Params, batch: Batch, cfg: Pretrain
) -> tuple[jax.Array, jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
    """Cross entropy of every target that counts, plus z-loss and a mixture of experts' router losses.

    Returns:
      loss_sum, weight_sum: float32 scalars, to be divided once per update.
      metrics: name -> (sum, weight); `nll` is the cross entropy alone, in nats a token.
    """
    out = forward.losses(params, batch)
    w_BT = batch["weights_BT"]
    nll, n = (out.nll_BT * w_BT).sum(), w_BT.sum()
    loss = nll + cfg.z_loss * (jnp.square(out.lse_BT) * w_BT).sum() + out.aux
    return loss, n, {"nll": (nll, n)}
