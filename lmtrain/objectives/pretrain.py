"""Next-token prediction. B rows, T positions; weights_BT marks the targets that count. Sums: the step divides once."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp

from lmtrain.objectives import common
from lmtrain.types import Batch, Params

__all__ = ["pretrain"]


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """Settings of `pretrain`."""

    SOURCE: ClassVar[str] = "documents"

    z_loss: float = 0.0  # weight of log(Z)^2, which keeps logits from drifting (PaLM, arXiv 2204.02311, section 5)
    label_smoothing: float = 0.0  # the share of the target that is spread evenly over the vocabulary (1512.00567, 7)

    def __post_init__(self):
        common.within(self, z_loss=(0, None), label_smoothing=(0, 1))


def pretrain(forward: Any, params: Params, batch: Batch, cfg: Pretrain) -> common.Return:
    """Cross entropy of every target that counts, plus z-loss and a mixture of experts' router losses.

    The router losses are sums over all tokens that are read, divided by those that count: where few of a row count
    (chat), they weigh more, by that ratio.

    Returns:
      loss_sum, weight_sum: float32 scalars, to be divided once per update.
      metrics: name -> (sum, weight); `nll` is the cross entropy alone, in nats a token.
    """
    out = forward.losses(params, batch, uniform=cfg.label_smoothing > 0)
    w_BT = batch["weights_BT"]
    nll, n = (out.nll_BT * w_BT).sum(), w_BT.sum()
    loss = nll + cfg.z_loss * (jnp.square(out.lse_BT) * w_BT).sum() + out.aux
    if cfg.label_smoothing:
        loss += cfg.label_smoothing * ((out.uniform_BT - out.nll_BT) * w_BT).sum()
    return loss, n, {"nll": (nll, n)}
