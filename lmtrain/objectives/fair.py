"""Objectives against bias: the worst group counts most; two replies that differ by a swap are equally likely.

B rows, T positions, K cells (data.groups times data.outcomes), S conversations of a row, P pairs of a row
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lmtrain.objectives import common, preference
from lmtrain.objectives.pretrain import Pretrain
from lmtrain.schema import ConfigError
from lmtrain.types import Batch, Params

__all__ = ["even", "group_dro"]


@dataclasses.dataclass(frozen=True)
class GroupDro(Pretrain):
    """Settings of `group_dro`, besides those of pretraining."""

    cells: int = 0  # 0: as many as data.groups times data.outcomes
    step_size: float = 1.0  # eta: how much more a worse cell weighs; 0: all cells weigh the same

    def __post_init__(self):
        super().__post_init__()
        common.within(self, cells=(0, None), step_size=(0, None))


def group_dro(forward: Any, params: Params, batch: Batch, cfg: GroupDro) -> common.Return:
    """Group-DRO (Sagawa et al. 2020, arXiv 1911.08731): the loss is sum_k q_k L_k over cells, and q leans to the worst.

    The paper keeps q as state, q_k <- q_k exp(eta L_k), normalised, from batch to batch. Here q_k is proportional to
    exp(eta L_k) of this batch alone: the maximum of sum_k q_k L_k - KL(q || uniform) / eta, in closed form. So there is
    no state that a resumed run could lose, and the L_k are those of the whole batch (`first`), so that microbatches and
    devices do not change them. The L_k of a cell of which the batch has nothing is taken to be the batch's mean. No
    gradient goes through q.

    Each L_k is estimated by balance_BT, whose cells' shares are those of the data: divided by the batch's own shares
    instead, a cell that many batches lack would weigh too little.
    Text in no cell (groups_BT 0) keeps its weight, and so do the cells together.

    Metrics: nll, worst (the largest L_k of a cell).
    """
    if "groups_BT" not in batch:
        raise ConfigError("group_dro: the batch has no groups_BT; set data.groups, and data.outcomes.")
    out = forward.losses(params, batch, uniform=cfg.label_smoothing > 0)
    w_BT, groups_BT = batch["weights_BT"], batch["groups_BT"]
    loss_K, share_K = (
        jnp.stack([jax.lax.stop_gradient(batch[f"dro_{name}_{k}"]) for k in range(cfg.cells)])
        for name in ("loss", "share")
    )
    mean = (loss_K * share_K).sum() / jnp.maximum(share_K.sum(), 1e-9)
    q_K = jax.nn.softmax(cfg.step_size * jnp.where(share_K > 0, loss_K, mean))
    scale_BT = jnp.concatenate([jnp.ones(1), cfg.cells * q_K])[groups_BT] * batch["balance_BT"]
    nll = (out.nll_BT * w_BT).sum()
    each_BT = out.nll_BT + cfg.z_loss * jnp.square(out.lse_BT)
    if cfg.label_smoothing:
        each_BT += cfg.label_smoothing * (out.uniform_BT - out.nll_BT)
    n = w_BT.sum()
    worst = jnp.where(share_K > 0, loss_K, -jnp.inf).max()
    return (each_BT * w_BT * scale_BT).sum() + out.aux, n, {"nll": (nll, n), "worst": (worst * n, n)}


def _group_losses(forward: Any, params: Params, batch: Batch, cfg: GroupDro) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Each cell's loss and its share of the weight, over all microbatches."""
    nll_BT, w_BT = forward.losses(params, batch).nll_BT, batch["weights_BT"]
    sums = {}
    for k in range(cfg.cells):
        mine_BT = w_BT * (batch["groups_BT"] == k + 1)
        sums[f"dro_loss_{k}"] = ((nll_BT * mine_BT).sum(), mine_BT.sum())
        sums[f"dro_share_{k}"] = (mine_BT.sum(), w_BT.sum())
    return sums


group_dro.first = _group_losses  # type: ignore[attr-defined]


@dataclasses.dataclass(frozen=True)
class Even:
    """Settings of `even`."""

    SOURCE: ClassVar[str] = "pairs"
    REFERENCE: ClassVar[bool] = True

    keep: float = 1.0  # how much the two are held at their mean under the reference

    def __post_init__(self):
        common.within(self, keep=(0, None))


def even(forward: Any, params: Params, batch: Batch, cfg: Even) -> common.Return:
    """A reply and its swap, each to its own prompt (data.augment makes the pairs), shall be equally likely.

    With c and r their log-probabilities, c0 and r0 the reference's, and m = log((exp c0 + exp r0) / 2): (c - r)^2
    + keep (c + r - 2m)^2. The first term is IPO's regression of a difference of log-probabilities (arXiv 2310.12036)
    with a target of 0, neither being preferred, on the policy's own difference, since the reference's is the bias. The
    second says how likely: the minimum is c = r = m, the mean of the two probabilities, which over all replies sum to 1
    as the reference's do. (Were it the mean of the log-probabilities, what is lost would go to other replies.)

    Metrics: gap (|c - r|), kept ((c + r) / 2 - m), and those of all pairs.
    """
    moved = preference.compare(forward, params, batch)
    segments_BT, w_BT = common.segments(batch), batch["weights_BT"]
    ref_BS = common.per_segment(common.own(batch, "ref_logps_BT") * w_BT, segments_BT)
    first_BP, second_BP = common.pairs(ref_BS)
    chosen_BP, rejected_BP = moved.chosen_BP + first_BP, moved.rejected_BP + second_BP
    kept_BP = chosen_BP + rejected_BP - 2 * (jnp.logaddexp(first_BP, second_BP) - jnp.log(2.0))
    loss_BP = jnp.square(chosen_BP - rejected_BP) + cfg.keep * jnp.square(kept_BP)
    total, n, metrics = common.over_pairs(loss_BP, chosen_BP, rejected_BP, moved.w_BP, moved.aux)
    metrics["gap"] = ((jnp.abs(chosen_BP - rejected_BP) * moved.w_BP).sum(), n)
    metrics["kept"] = ((kept_BP / 2 * moved.w_BP).sum(), n)
    return total, n, metrics
