"""Preference optimisation: of two replies to a prompt, one is better (or of one, whether it is good). No sampling.

B rows, T positions, S conversations of a row, P pairs of a row (chosen and rejected: segments 2k - 1 and 2k)

Each loss is a function of two numbers of a pair: c and r, the log-probabilities of the chosen and the rejected reply,
less the reference's where there is one, summed over the reply's tokens or averaged. Every pair weighs the same.
The reference is batch["ref_logps_BT"], worked out once before training.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lmtrain.objectives import common
from lmtrain.types import Batch, Params

__all__ = ["dpo", "dpo_norm", "ipo", "kto", "orpo", "simpo"]


@dataclasses.dataclass(frozen=True)
class Preference:
    """What all settings here have. A beta of what the losses hold against moving away: large holds more."""

    SOURCE: ClassVar[str] = "pairs"
    REFERENCE: ClassVar[bool] = True

    beta: float = 0.1

    def __post_init__(self):
        common.within(self, beta=(1e-6, None))


# ------------------------------------------------------------------------------------------------------------ general
def log_ratios(forward, params, batch, *, reference: bool, average: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Each conversation's log-probability of what counts in it, less the reference's, summed or averaged over tokens.

    Returns:
      (log ratios [B, S], numbers of tokens that count [B, S], router losses divided by T)
    """
    out = forward.losses(params, batch)
    segments_BT, w_BT = common.segments(batch), batch["weights_BT"]
    logps_BT = -out.nll_BT - (common.own(batch, "ref_logps_BT") if reference else 0)
    n_BS = common.per_segment(w_BT, segments_BT)
    x_BS = common.per_segment(logps_BT * w_BT, segments_BT)
    return x_BS / jnp.where(n_BS > 0, n_BS, 1) if average else x_BS, n_BS, out.aux / w_BT.shape[1]


class Pairs(NamedTuple):
    """Pairs of replies: c and r, whether the pair counts (both replies have tokens that do), tokens of the chosen one,
    router losses divided by T."""

    chosen_BP: jax.Array
    rejected_BP: jax.Array
    w_BP: jax.Array
    tokens_BP: jax.Array
    aux: jax.Array


def compare(forward, params, batch, *, reference: bool = True, average: bool = False) -> Pairs:
    """The two numbers that a loss takes of every pair; see `log_ratios`."""
    x_BS, n_BS, aux = log_ratios(forward, params, batch, reference=reference, average=average)
    first_BP, second_BP = common.pairs(n_BS)
    w_BP = ((first_BP > 0) & (second_BP > 0)).astype(x_BS.dtype)
    return Pairs(*common.pairs(x_BS), w_BP, first_BP, aux)


def mean(loss_BP: jax.Array, p: Pairs) -> common.Return:
    """A loss over pairs as the step takes it.

    Metrics: accuracy (c > r; a tie counts half), margin (c - r), chosen (c), rejected (r). Watch `chosen`: these losses
    are content where both fall, as long as the rejected falls faster.
    """
    return common.over_pairs(loss_BP, p.chosen_BP, p.rejected_BP, p.w_BP, p.aux)


# ---------------------------------------------------------------------------------------------------------------- DPO
@dataclasses.dataclass(frozen=True)
class Dpo(Preference):
    """Settings of `dpo`."""

    label_smoothing: float = 0.0  # the share of pairs whose labels are taken to be wrong (conservative DPO)

    def __post_init__(self):
        super().__post_init__()
        common.within(self, label_smoothing=(0, 0.5))


@dataclasses.dataclass(frozen=True)
class DpoNorm(Dpo):
    """Settings of `dpo_norm`. Averages are smaller than sums by a reply's length, so beta is larger."""

    beta: float = 5.0


def dpo(forward: Any, params: Params, batch: Batch, cfg: Dpo, average: bool = False) -> common.Return:
    """DPO (Rafailov et al., arXiv 2305.18290, eq. 7): -log sigmoid(beta (c - r)); ln 2 where policy = reference."""
    p = compare(forward, params, batch, average=average)
    x_BP, e = cfg.beta * (p.chosen_BP - p.rejected_BP), cfg.label_smoothing
    return mean(-(1 - e) * jax.nn.log_sigmoid(x_BP) - e * jax.nn.log_sigmoid(-x_BP), p)


def dpo_norm(forward: Any, params: Params, batch: Batch, cfg: DpoNorm) -> common.Return:
    """DPO on per-token averages (Tulu 3, arXiv 2411.15124): longer replies are not favoured for being long."""
    return dpo(forward, params, batch, cfg, average=True)


# --------------------------------------------------------------------------------------------------- IPO, SimPO, ORPO
@dataclasses.dataclass(frozen=True)
class Ipo(Preference):
    """Settings of `ipo`. The log-ratios' difference is drawn to 1 / (2 beta)."""

    average: bool = False  # over a reply's tokens, as TRL does (its authors advise it); the paper sums


def ipo(forward: Any, params: Params, batch: Batch, cfg: Ipo) -> common.Return:
    """IPO (Azar et al., arXiv 2310.12036, eq. 17): (c - r - 1 / (2 beta))^2, which a certain preference does not drive
    to infinity."""
    p = compare(forward, params, batch, average=cfg.average)
    return mean(jnp.square(p.chosen_BP - p.rejected_BP - 1 / (2 * cfg.beta)), p)


@dataclasses.dataclass(frozen=True)
class SimPo(Preference):
    """Settings of `simpo`."""

    REFERENCE: ClassVar[bool] = False

    beta: float = 2.0
    gamma: float = 1.0  # by how much beta (c - r) should be above 0


def simpo(forward: Any, params: Params, batch: Batch, cfg: SimPo) -> common.Return:
    """SimPO (Meng et al., arXiv 2405.14734, eq. 6): -log sigmoid(beta (c - r) - gamma) of per-token averages, without a
    reference."""
    p = compare(forward, params, batch, reference=False, average=True)
    return mean(-jax.nn.log_sigmoid(cfg.beta * (p.chosen_BP - p.rejected_BP) - cfg.gamma), p)


@dataclasses.dataclass(frozen=True)
class Orpo(Preference):
    """Settings of `orpo`. beta is the weight of the odds ratio (the paper's lambda)."""

    REFERENCE: ClassVar[bool] = False


def orpo(forward: Any, params: Params, batch: Batch, cfg: Orpo) -> common.Return:
    """ORPO (Hong et al., arXiv 2403.07691, eq. 6-7): -c - beta log sigmoid(log-odds(c) - log-odds(r)) of per-token
    averages: fine-tuning on the chosen reply and preference in one, without a reference.

    Metrics: those of all pairs, and nll: nats a token of the chosen replies.
    """

    def log_odds(x):
        # log(p / (1 - p)) of p = e^x. From below 1, so that a certain (or an empty) reply has no infinite gradient.
        x = jnp.minimum(x, -1e-6)
        return x - jnp.log(-jnp.expm1(x))

    p = compare(forward, params, batch, reference=False, average=True)
    odds_BP = log_odds(p.chosen_BP) - log_odds(p.rejected_BP)
    total, n, metrics = mean(-p.chosen_BP - cfg.beta * jax.nn.log_sigmoid(odds_BP), p)
    tokens_BP = p.tokens_BP * p.w_BP
    return total, n, metrics | {"nll": (-(p.chosen_BP * tokens_BP).sum(), tokens_BP.sum())}


# ---------------------------------------------------------------------------------------------------------------- KTO
@dataclasses.dataclass(frozen=True)
class Kto(Preference):
    """Settings of `kto`. The weights should make up for unequal numbers: those of a kind times its weight, within 1 to
    4/3 of the other's (the paper's advice)."""

    SOURCE: ClassVar[str] = "labels"

    desirable: float = 1.0  # weight of good replies
    undesirable: float = 1.0  # weight of bad ones

    def __post_init__(self):
        super().__post_init__()
        common.within(self, desirable=(0, None), undesirable=(0, None))


def kto(forward: Any, params: Params, batch: Batch, cfg: Kto) -> common.Return:
    """KTO (Ethayarajh et al., arXiv 2402.01306, eq. 8), the mean over replies of
    desirable * (1 - sigmoid(beta (h - z))) or undesirable * (1 - sigmoid(beta (z - h))).

    h is the log-ratio of the reply (segment 2k - 1, of which labels_BT says +1 or -1), z that of mismatched prompts and
    replies (segments 2k), averaged over the whole batch: `kto.first` puts it into batch["kto_z"]. No gradient goes
    through z.

    Metrics: chosen and rejected (mean h of either kind), z.
    """
    x_BS, n_BS, aux = log_ratios(forward, params, batch, reference=True, average=False)
    h_BP, _ = common.pairs(x_BS)
    label_BP, _ = common.pairs(common.read_last(batch["labels_BT"], common.segments(batch)))
    counts_BP, _ = common.pairs(n_BS > 0)
    z = jnp.maximum(jax.lax.stop_gradient(batch["kto_z"]), 0)
    good_BP, bad_BP = (counts_BP & (label_BP > 0)) * 1.0, (counts_BP & (label_BP < 0)) * 1.0
    loss_BP = cfg.desirable * good_BP * jax.nn.sigmoid(
        cfg.beta * (z - h_BP)
    ) + cfg.undesirable * bad_BP * jax.nn.sigmoid(cfg.beta * (h_BP - z))
    n = (good_BP + bad_BP).sum()
    metrics = {
        "chosen": ((h_BP * good_BP).sum(), good_BP.sum()),
        "rejected": ((h_BP * bad_BP).sum(), bad_BP.sum()),
        "z": (z * n, n),
    }
    return loss_BP.sum() + aux, n, metrics


def _kto_first(forward: Any, params: Params, batch: Batch, cfg: Kto) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The mean log-ratio of the mismatched conversations, before max(0, .), as (sum, number)."""
    x_BS, n_BS, _ = log_ratios(forward, params, batch, reference=True, average=False)
    _, mismatched_BP = common.pairs(x_BS)
    _, counts_BP = common.pairs(n_BS > 0)
    return {"kto_z": ((mismatched_BP * counts_BP).sum(), counts_BP.sum())}


kto.first = _kto_first  # type: ignore[attr-defined]
