"""From logits to the next token, each row of a batch in its own way, without a sort and without recompiling.

    B rows, V vocabulary

How a row draws is a dict of arrays (`How`): temperature_B, top_p_B, min_p_B float32, top_k_B int32, key_B2 uint32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lmtrain.types import Array

How = dict[str, Array]


def draw(logits_BV: jax.Array, how: How, position_B: Array, live_B: Array) -> tuple[jax.Array, jax.Array]:
    """The next token of every row, int32 [B], and its log-probability, float32 [B].

    The log-probability is that of softmax(logits / temperature), before anything is cut off (temperature 0: of
    temperature 1). The draw depends on the row's key and position alone: Gumbel noise on the logits, so that rounding,
    which other rows may change, moves it only where two candidates tie.

    Args:
      how: temperature_B (0 takes the likeliest token), top_k_B (0: all), top_p_B (1: all), min_p_B (0: all), key_B2.
      position_B: the position of the token to be drawn.
      live_B: rows whose draw is wanted; the others' way to draw costs nothing, and their result means nothing.
    """
    t_B = how["temperature_B"]
    drawn_B = t_B > 0
    logits_BV = jnp.asarray(logits_BV, jnp.float32) / jnp.where(drawn_B, t_B, 1)[:, None]
    cuts_B = drawn_B & live_B & ((how["top_k_B"] > 0) | (how["top_p_B"] < 1) | (how["min_p_B"] > 0))
    kept_BV = jax.lax.cond(cuts_B.any(), lambda x: cut(x, how), lambda x: x, logits_BV)

    def noisy(x_BV):
        def noise(key_2, position):
            key = jax.random.fold_in(jax.random.wrap_key_data(key_2, impl="threefry2x32"), position)
            return jax.random.gumbel(key, x_BV.shape[1:], jnp.float32)

        return x_BV + jnp.where(drawn_B[:, None], jax.vmap(noise)(how["key_B2"], position_B), 0)

    tokens_B = jnp.argmax(jax.lax.cond((drawn_B & live_B).any(), noisy, lambda x: x, kept_BV), axis=-1)
    chosen_B = jnp.take_along_axis(logits_BV, tokens_B[:, None], axis=-1)[:, 0]
    return tokens_B.astype(jnp.int32), chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)


def cut(logits_BV: jax.Array, how: How) -> jax.Array:
    """The logits with -inf for the tokens that top-k, then top-p, then min-p leave out.

    top-k keeps the k largest (and what ties with the k-th); top-p the likeliest tokens that together have this
    probability, the one that reaches it included (Holtzman et al. 2019, arXiv 1904.09751); min-p those at least min_p
    times as likely as the likeliest (Nguyen et al. 2024, arXiv 2407.01082). The likeliest token always stays.

    Each cut is a threshold, found by bisection over the bits of a float32: 32 passes over the row, where sorting it
    takes more.
    """
    k_B = jnp.where(how["top_k_B"] > 0, how["top_k_B"], logits_BV.shape[-1])
    order_BV = _ordered(logits_BV)

    # The k-th largest is the last value that at least k tokens reach, and the first that fewer than k exceed.
    kth_B = _least(lambda t_B: (order_BV > t_B[:, None]).sum(-1) < k_B, logits_BV)
    logits_BV = jnp.where(order_BV >= kth_B[:, None], logits_BV, -jnp.inf)

    probability_BV = jax.nn.softmax(logits_BV, axis=-1)
    above = lambda t_B: jnp.where(order_BV > t_B[:, None], probability_BV, 0).sum(-1)  # noqa: E731
    p_B = how["top_p_B"]
    first_B = _least(lambda t_B: above(t_B) < p_B, logits_BV)
    logits_BV = jnp.where((order_BV >= first_B[:, None]) | (p_B >= 1)[:, None], logits_BV, -jnp.inf)

    least_B = logits_BV.max(-1) + jnp.log(how["min_p_B"])  # log 0 = -inf: all stay
    return jnp.where(logits_BV >= least_B[:, None], logits_BV, -jnp.inf)


def _ordered(x: jax.Array) -> jax.Array:
    """float32 as int32 of the same order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _least(holds, logits_BV) -> jax.Array:
    """For every row the least int32 t with holds(t_B); holds is false below some t and true from there on."""
    low_B = jnp.full(logits_BV.shape[0], -(1 << 31), jnp.int32)  # logits are finite: holds at the top of the range

    def halve(_, ends):
        low_B, high_B = ends
        middle_B = (low_B & high_B) + ((low_B ^ high_B) >> 1)  # their mean, rounded down, without overflow
        true_B = holds(middle_B)
        return jnp.where(true_B, low_B, middle_B + 1), jnp.where(true_B, middle_B, high_B)

    return jax.lax.fori_loop(0, 32, halve, (low_B, jnp.full_like(low_B, (1 << 31) - 1)))[1]
