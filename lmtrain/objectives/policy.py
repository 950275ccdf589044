"""Policy gradients: replies that the policy sampled, made likelier or less likely by their advantages.

B rows, T positions; weights_BT marks the policy's own tokens. Sums, never means: the step divides once.

A method is three choices about one loss (`policy`): what the ratio is of (a token, the mean or the sum of a reply's
tokens), what is done with it (clipped, or a weight), and what weighs the same (tokens, replies, or tokens over a
constant). A fourth, the advantage, is made before, in common.py: settings name theirs as ADVANTAGE.

The batch's old_logps_BT are the learner's own, at the sampling temperature, worked out before the first update of a
rollout, so the ratio starts at 1 exactly as far as the arithmetic repeats. A batch without them is that first update:
the ratio is 1, and only its gradient is left. sampler_logps_BT are the engine's: never quite the same, and `is_cap`
corrects for that. Both ways a reply must come from the full distribution: top-k or top-p
sample from another one than either has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lmtrain.objectives import common
from lmtrain.types import Batch, Params

__all__ = ["cispo", "dapo", "dr_grpo", "grpo", "gspo", "ppo", "rloo"]

#: Log-ratios beyond are cut there (and move nothing): e^20 is far past every clip, and e^89 is no float32.
LARGEST = 20.0

#: What each setting takes; None: no end.
LIMITS = {"temperature": (1e-6, None), "beta": (0, None), "is_cap": (0, None), "clip_low": (0, 1),
          "clip_high": (0, None), "max_length": (0, None), "cap": (1e-6, None), "value_clip": (0, None),
          "value_weight": (0, None), "negative": (0, None)}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Policy:
    """What all settings here have."""

    SOURCE: ClassVar[str] = "rollout"
    ADVANTAGE: ClassVar[str] = "group"
    ON_POLICY: ClassVar[bool] = True  # old_logps_BT may be left out of a rollout's only update

    temperature: float = 1.0  # what the replies were sampled at: log-probabilities are taken at the same
    negative: float = 1.0  # weight of what was worse than its baseline (arXiv 2506.01347); 0: learn from the good alone
    beta: float = 0.0  # weight of the divergence from the reference; 0: no reference
    kl: str = "k2"  # its estimate (common.kl): k1 | k2 | k3. As a loss, k1 does nothing and k3 is another divergence
    is_cap: float = 0.0  # importance weights min(p_learner / p_sampler, is_cap) (TIS; 2 is usual); 0: none

    def __post_init__(self):
        common.within(self, **{name: limits for name, limits in LIMITS.items() if hasattr(self, name)})
        common.one_of("loss.kl", self.kl, common.KL)

    @property
    def REFERENCE(self) -> bool:  # noqa: N802 (read like the other settings' constants)
        """Whether the batch needs ref_logps_BT."""
        return self.beta > 0


# -------------------------------------------------------------------------------------- what the ratio is of: x -> x_BT
def token(x_BT, w_BT, segments_BT):
    """Every token's own."""
    return x_BT


def reply_sum(x_BT, w_BT, segments_BT):
    """The sum over the reply: the log-ratio of the whole sequence."""
    return common.spread(common.per_segment(x_BT * w_BT, segments_BT), segments_BT)


def reply_mean(x_BT, w_BT, segments_BT):
    """The mean over the reply's tokens."""
    return reply_sum(x_BT, common.per_sequence(w_BT, segments_BT), segments_BT)


# ------------------------------------------------- what is done with it -> loss_BT, and where it is cut below and above
def clip(ratio_BT, advantages_BT, logps_BT, cfg):
    """PPO's pessimistic surrogate (Schulman et al., arXiv 1707.06347, eq. 7). A token is cut where it has no gradient:
    a good one that is already likelier by more than clip_high, a bad one less likely by more than clip_low. A bad one
    that got likelier is never cut."""
    inside_BT = jnp.clip(ratio_BT, 1 - cfg.clip_low, 1 + cfg.clip_high)
    loss_BT = -jnp.minimum(ratio_BT * advantages_BT, inside_BT * advantages_BT)
    low_BT = (ratio_BT < 1 - cfg.clip_low) & (advantages_BT < 0)
    return loss_BT, low_BT, (ratio_BT > 1 + cfg.clip_high) & (advantages_BT > 0)


def cap(ratio_BT, advantages_BT, logps_BT, cfg):
    """REINFORCE with the capped ratio as a weight: no token loses its gradient. On-policy it is REINFORCE itself."""
    weight_BT = jax.lax.stop_gradient(jnp.minimum(ratio_BT, cfg.cap))
    return -weight_BT * advantages_BT * logps_BT, jnp.zeros_like(ratio_BT, bool), ratio_BT > cfg.cap


# -------------------- what weighs the same -> weights_BT, their sum (or what stands in for it), weight of router losses
def by_token(w_BT, segments_BT, cfg):
    """Every token of the update."""
    return w_BT, w_BT.sum(), 1.0


def by_reply(w_BT, segments_BT, cfg):
    """Every reply: a mean over its tokens, then one over replies. A token of a long reply weighs less. Router losses
    are sums over tokens, so they are divided by T: a full row weighs like a reply."""
    return common.per_sequence(w_BT, segments_BT), common.count(w_BT, segments_BT), 1 / w_BT.shape[1]


def by_constant(w_BT, segments_BT, cfg):
    """Every token, but over (replies * the longest possible) in place of the tokens that there happen to be."""
    return w_BT, common.count(w_BT, segments_BT) * (cfg.max_length or w_BT.shape[1]), 1.0


# ------------------------------------------------------------------------------------------------------------ the loss
def read(forward: Any, params: Params, batch: Batch, cfg: Policy) -> Any:
    """The forward pass: log-probabilities and entropy at the sampling temperature."""
    return forward.losses(params, batch, cfg.temperature, entropy=True)


def policy(
    out: Any, batch: Batch, cfg: Any, *,
    ratio_of: Callable[..., jax.Array] = token, using: Callable[..., Any] = clip, weigh: Callable[..., Any] = by_token,
) -> common.Return:  # fmt: skip
    """The loss that the methods below are cases of.

    The divergence from the reference is estimated on the tokens as they were sampled: it is exact for the first update
    of a rollout, and a little behind in further ones.

    Args:
      out: of `read`.
      batch: with advantages_BT; old_logps_BT, but in the only update of a rollout; optionally sampler_logps_BT (needed
        where cfg.is_cap) and ref_logps_BT (needed where cfg.beta).

    Metrics, means over the policy's tokens: entropy; ratio and its largest (ratio_max); clipped, and its parts
    clipped_low and clipped_high; k1 and k3 where there is a reference; sampler_gap, |log p of sampler - of learner|.
    """
    w_BT, segments_BT = batch["weights_BT"], common.segments(batch)
    own_BT = w_BT > 0
    logps_BT = jnp.where(own_BT, -out.nll_BT, 0)

    def ratio(logps_BT, other_BT):
        return jnp.exp(jnp.clip(ratio_of(logps_BT - other_BT, w_BT, segments_BT), -LARGEST, LARGEST))

    old_BT = common.own(batch, "old_logps_BT") if "old_logps_BT" in batch else jax.lax.stop_gradient(logps_BT)
    ratio_BT = ratio(logps_BT, old_BT)
    advantages_BT = common.own(batch, "advantages_BT")
    advantages_BT *= jnp.where(advantages_BT < 0, cfg.negative, 1.0)
    loss_BT, low_BT, high_BT = using(ratio_BT, advantages_BT, logps_BT, cfg)
    if cfg.is_cap:
        # Truncated importance sampling (Yao et al. 2025): the gap between two programs, not between two policies.
        loss_BT *= jax.lax.stop_gradient(jnp.minimum(ratio(old_BT, common.own(batch, "sampler_logps_BT")), cfg.is_cap))
    if cfg.beta:
        loss_BT += cfg.beta * common.kl(logps_BT, common.own(batch, "ref_logps_BT"), cfg.kl)

    n = w_BT.sum()
    watched = {"entropy": out.entropy_BT, "ratio": ratio_BT, "clipped": low_BT | high_BT,
               "clipped_low": low_BT, "clipped_high": high_BT}  # fmt: skip
    if "ref_logps_BT" in batch:
        watched |= {k: common.kl(logps_BT, common.own(batch, "ref_logps_BT"), k) for k in ("k1", "k3")}
    if "sampler_logps_BT" in batch:
        watched["sampler_gap"] = jnp.abs(common.own(batch, "sampler_logps_BT") - old_BT)
    metrics = {name: ((x_BT * w_BT).sum(), n) for name, x_BT in watched.items()}
    metrics["ratio_max"] = jnp.where(own_BT, ratio_BT, 0).max(), n
    weights_BT, total, router = weigh(w_BT, segments_BT, cfg)
    return (loss_BT * weights_BT).sum() + router * out.aux, total, metrics


# ------------------------------------------------------------------------------------------------------------ methods
@dataclasses.dataclass(frozen=True)
class Grpo(Policy):
    """Settings of `grpo`."""

    clip_low: float = 0.2  # a ratio below 1 - clip_low is cut
    clip_high: float = 0.2  # a ratio above 1 + clip_high is cut


def grpo(forward: Any, params: Params, batch: Batch, cfg: Grpo) -> common.Return:
    """GRPO (arXiv 2402.03300, eq. 3), which had beta .04 with k3."""
    return policy(read(forward, params, batch, cfg), batch, cfg, weigh=by_reply)


@dataclasses.dataclass(frozen=True)
class Dapo(Grpo):
    """Settings of `dapo`. Its dynamic sampling and soft punishment of length are the rollout's (schema.Rollout)."""

    clip_high: float = 0.28


def dapo(forward: Any, params: Params, batch: Batch, cfg: Dapo) -> common.Return:
    """DAPO (arXiv 2503.14476): clip higher than lower, every token of the update weighs the same."""
    return policy(read(forward, params, batch, cfg), batch, cfg)


@dataclasses.dataclass(frozen=True)
class DrGrpo(Grpo):
    """Settings of `dr_grpo`."""

    ADVANTAGE: ClassVar[str] = "group_mean"

    # Tokens that a reply may have. 0: the length of a row, which is constant where rows are packed (data.pack).
    max_length: int = 0


def dr_grpo(forward: Any, params: Params, batch: Batch, cfg: DrGrpo) -> common.Return:
    """Dr. GRPO (arXiv 2503.20783): over a constant, so that wrong replies are not favoured for being long, and with
    advantages that are not divided by the std. The number of replies, not of rows: several may be packed in one."""
    return policy(read(forward, params, batch, cfg), batch, cfg, weigh=by_constant)


@dataclasses.dataclass(frozen=True)
class Gspo(Grpo):
    """Settings of `gspo`. Means of log-ratios hardly move, so the clip is a thousand times narrower."""

    clip_low: float = 3e-4
    clip_high: float = 4e-4


def gspo(forward: Any, params: Params, batch: Batch, cfg: Gspo) -> common.Return:
    """GSPO (arXiv 2507.18071, eq. 5-7): one ratio for a reply, the geometric mean of its tokens'. A reply is clipped
    whole."""
    return policy(read(forward, params, batch, cfg), batch, cfg, ratio_of=reply_mean, weigh=by_reply)


@dataclasses.dataclass(frozen=True)
class Rloo(Grpo):
    """Settings of `rloo`."""

    ADVANTAGE: ClassVar[str] = "leave_one_out"


def rloo(forward: Any, params: Params, batch: Batch, cfg: Rloo) -> common.Return:
    """RLOO (arXiv 2402.14740): a reply is one action with one ratio, and the others are its baseline."""
    return policy(read(forward, params, batch, cfg), batch, cfg, ratio_of=reply_sum, weigh=by_reply)


@dataclasses.dataclass(frozen=True)
class Cispo(Policy):
    """Settings of `cispo`."""

    cap: float = 5.0  # the largest ratio that a token is weighed with


def cispo(forward: Any, params: Params, batch: Batch, cfg: Cispo) -> common.Return:
    """CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4-5): the weight is clipped, not the gradient, so that rare tokens that
    turn a chain of thought keep theirs."""
    return policy(read(forward, params, batch, cfg), batch, cfg, using=cap)


@dataclasses.dataclass(frozen=True)
class Ppo(Grpo):
    """Settings of `ppo`. gamma and lambda are the rollout's, which makes advantages (whitened) and returns."""

    ADVANTAGE: ClassVar[str] = "gae"
    SCALAR: ClassVar[bool] = True  # the model gets a scalar head

    value_clip: float = 0.2  # how far from its old value the new one is followed
    value_weight: float = 0.5  # of the squared error of the value


def ppo(forward: Any, params: Params, batch: Batch, cfg: Ppo) -> common.Return:
    """PPO (arXiv 1707.06347, eq. 9) with a value head (model.scalar_head) on the policy's own trunk, its loss clipped
    around old_values_BT as in the authors' code (arXiv 2005.12729). returns_BT are what it should say.

    Further metrics: value_loss (before its weight), value_clipped, value (its mean).
    """
    out = read(forward, params, batch, cfg)
    loss, n, metrics = policy(out, batch, cfg)
    value_BT, old_BT = forward.scalar(params, out.hidden_BTD), common.own(batch, "old_values_BT")
    near_BT = old_BT + jnp.clip(value_BT - old_BT, -cfg.value_clip, cfg.value_clip)
    free_BT, near_BT = (jnp.square(v_BT - common.own(batch, "returns_BT")) for v_BT in (value_BT, near_BT))
    watched = {"value_loss": jnp.maximum(free_BT, near_BT), "value_clipped": near_BT > free_BT, "value": value_BT}
    more = {name: ((x_BT * batch["weights_BT"]).sum(), n) for name, x_BT in watched.items()}
    return loss + cfg.value_weight * more["value_loss"][0], n, metrics | more
