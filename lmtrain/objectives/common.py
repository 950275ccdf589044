"""What several objectives, and those who feed them, work out alike: sums over conversations and pairs, advantages.

    B rows, T positions, S conversations of a row (S = T rounded up to even: no row can hold more), P = S // 2 pairs of
    a row, n tokens of one reply, G replies to one prompt

Several conversations lie in one row: segments_BT is 1, 2, ... for them and 0 for padding (types.py). Nothing here mixes
rows, so however a batch is cut up, its parts' sums add up to the whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmtrain.schema import ConfigError
from lmtrain.types import Array, Batch, nearest

#: What an objective returns: loss_sum, weight_sum, {metric: (sum, weight)}.
Return = tuple[jax.Array, jax.Array, dict[str, tuple[jax.Array, jax.Array]]]


# ------------------------------------------------------------------------------------------------- conversations, pairs
def segments(batch: Batch) -> jax.Array:
    """segments_BT; where a batch has none, a row is one conversation."""
    return jnp.asarray(batch["segments_BT"]) if "segments_BT" in batch else jnp.ones_like(batch["tokens_BT"])


def own(batch: Batch, name: str) -> jax.Array:
    """batch[name] where the weight is above 0, and 0 elsewhere: what does not count has no say there, not even a nan,
    nor in the gradient."""
    return jnp.where(batch["weights_BT"] > 0, batch[name], 0)


def per_segment(x_BT: Array, segments_BT: Array) -> jax.Array:
    """Sums over each conversation: [B, S], column s for segment s + 1. Padding is in no sum."""
    T = x_BT.shape[1]

    def row(x_T, segments_T):
        return jnp.zeros(1 + T + T % 2, x_T.dtype).at[segments_T].add(x_T)[1:]

    return jax.vmap(row)(jnp.asarray(x_BT), segments_BT)


def spread(x_BS: jax.Array, segments_BT: Array) -> jax.Array:
    """Each conversation's number at every position of it: [B, T], 0 on padding."""
    return jnp.take_along_axis(jnp.pad(x_BS, ((0, 0), (1, 0))), segments_BT, axis=1)


def pairs(x_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(first, second) of every pair, [B, P] each: segments 2k - 1 and 2k, chosen and rejected."""
    return x_BS[:, 0::2], x_BS[:, 1::2]


def last_token(segments_BT: Array) -> jax.Array:
    """True at the last position of every conversation."""
    segments_BT = jnp.asarray(segments_BT)
    after_BT = jnp.pad(segments_BT[:, 1:], ((0, 0), (0, 1)))
    return (segments_BT > 0) & (segments_BT != after_BT)


def read_last(x_BT: Array, segments_BT: Array) -> jax.Array:
    """x at the last position of every conversation, [B, S]; 0 where there is none."""
    return per_segment(jnp.where(last_token(segments_BT), x_BT, 0), segments_BT)


def per_sequence(weights_BT: Array, segments_BT: Array) -> jax.Array:
    """weights / (their sum over the conversation): with these, a sum over positions is one over conversations of their
    own mean, and the weights sum to the number of conversations in which anything counts."""
    n_BT = spread(per_segment(weights_BT, segments_BT), segments_BT)
    return jnp.asarray(weights_BT) / jnp.where(n_BT > 0, n_BT, 1)


def count(weights_BT: Array, segments_BT: Array) -> jax.Array:
    """How many conversations have anything that counts: the sum of `per_sequence`."""
    return (per_segment(weights_BT, segments_BT) > 0).sum()


def over_pairs(
    loss_BP: jax.Array, chosen_BP: jax.Array, rejected_BP: jax.Array, w_BP: jax.Array, extra: jax.Array
) -> Return:
    """The sums of a loss on pairs, and the metrics that all of them report.

    extra is for router losses. Those are sums over tokens and this is one over pairs, so they come divided by T: a full
    row weighs like a pair. (Divided by the tokens of the microbatch, they would depend on how the batch is cut up.)
    """
    n = w_BP.sum()

    def total(x_BP):
        return (x_BP * w_BP).sum(), n

    delta_BP = chosen_BP - rejected_BP
    metrics = {
        "accuracy": total((1 + jnp.sign(delta_BP)) / 2),
        "margin": total(delta_BP),
        "chosen": total(chosen_BP),
        "rejected": total(rejected_BP),
    }
    return total(loss_BP)[0] + extra, n, metrics


# ---------------------------------------------------------------------------------------------------------- divergence
KL = ("k1", "k2", "k3")


def kl(logps: Any, ref_logps: Any, kind: str) -> Any:
    """Estimates of KL(policy || reference) from tokens that the policy drew (Schulman 2020), elementwise.

    With d = ref_logps - logps: k1 = -d is unbiased and noisy; k2 = d^2 / 2; k3 = e^d - 1 - d is unbiased and never
    negative. Read as a *loss* each is something else (arXiv 2510.01555, 2512.21852): the expected gradient of k1 is
    zero (it holds nothing back), that of k2 is the gradient of KL(policy || reference), that of k3 is the gradient of
    KL(reference || policy), with the variance of e^d. So k1 belongs in a reward, k2 in a loss, k1 and k3 in a log.
    """
    d = ref_logps - logps
    if kind == "k1":
        return -d
    return d * d / 2 if kind == "k2" else jnp.expm1(d) - d


# ------------------------------------------------------------------------------------- advantages: NumPy, on the host
ADVANTAGES = ("group", "group_mean", "leave_one_out")


def group_advantages(rewards_PG: Array, kind: str) -> np.ndarray:
    """How much better than its group each reply is, float64, shaped like the rewards [..., G].

    group: (r - mean) / (std + 1e-4), std with ddof = 1 (GRPO, arXiv 2402.03300). It makes much of prompts that are
      nearly always or nearly never answered well, where the std is small.
    group_mean: r - mean (Dr. GRPO, arXiv 2503.20783).
    leave_one_out: r - mean of the others, = G / (G - 1) times group_mean (RLOO, arXiv 2402.14740): a baseline that does
      not hold the reply's own reward, so the gradient stays unbiased.

    Each sums to 0 over a group. A group whose rewards are all equal gets zeros: it teaches nothing, as one of a single
    reply does.
    """
    r = np.asarray(rewards_PG, np.float64)
    one_of("advantage", kind, ADVANTAGES)
    G = r.shape[-1]
    a = np.where(np.ptp(r, axis=-1, keepdims=True) == 0, 0.0, r - r.mean(axis=-1, keepdims=True))
    if G == 1 or kind == "group_mean":
        return a
    return a * G / (G - 1) if kind == "leave_one_out" else a / (r.std(axis=-1, ddof=1, keepdims=True) + 1e-4)


def gae(
    reward: float, values_n: Array, gamma: float = 1.0, lam: float = 0.95, per_token_n: Array | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Generalised advantage estimation over the policy's tokens of one conversation (arXiv 1506.02438, eq. 16).

    Args:
      reward: of the whole conversation; it falls on the last token. What follows that is worth 0.
      values_n: of the state that each token was chosen in: the scalar head where weights_BT is 1.
      per_token_n: further rewards, such as -beta * k1.

    Returns:
      (advantages, returns), float64 [n]; returns = advantages + values, what the value head should have said.
    """
    values = np.asarray(values_n, np.float64)
    rewards = np.zeros_like(values) if per_token_n is None else np.array(per_token_n, np.float64)
    advantages, later, ahead = np.zeros_like(values), 0.0, 0.0
    if len(values):
        rewards[-1] += reward
    for t in reversed(range(len(values))):
        later = rewards[t] + gamma * ahead - values[t] + gamma * lam * later
        advantages[t], ahead = later, values[t]
    return advantages, advantages + values


def whiten(values: Sequence[Array], weights: Sequence[Array]) -> list[np.ndarray]:
    """The same arrays with mean 0 and variance 1 over all their positions of weight above 0, and 0 elsewhere.

    Of a whole rollout, not of a microbatch: means of parts would make the update depend on how the batch is cut up.
    """
    own = np.concatenate([np.asarray(x, np.float64)[np.asarray(w) > 0] for x, w in zip(values, weights, strict=True)])
    mean, std = (own.mean(), own.std()) if len(own) else (0.0, 1.0)
    return [np.where(np.asarray(w) > 0, (x - mean) / (std + 1e-8), 0.0) for x, w in zip(values, weights, strict=True)]


# ------------------------------------------------------------------------------------------------------------ settings
def within(settings: Any, **limits: tuple[float, float | None]) -> None:
    """Refuses settings outside [low, high] (high None: no end), and an inf or nan; meant for __post_init__."""
    for field, (low, high) in limits.items():
        value = getattr(settings, field)
        if not (math.isfinite(value) and low <= value <= (value if high is None else high)):
            takes = f"at least {low}" if high is None else f"{low} to {high}"
            raise ConfigError(f"loss.{field} is {value}; it takes {takes}.")


def one_of(field: str, value: str, names: Sequence[str]) -> None:
    """Refuses a name that is not known."""
    if value not in names:
        raise ConfigError(f"{field} is {value!r}; it takes {', '.join(names)}.{nearest(str(value), names)}")
