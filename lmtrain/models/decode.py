"""Generation with a cache: the forward pass of transformer.py over new tokens only.

    B rows, T new positions, S places in the cache, V vocabulary, K key heads, H size of a head

The cache is {"layers": ..., "tail": ..., "length_B": int32}: keys and values [B, S, K, H] of every layer, stacked like
the parameters, or unstacked where `init_cache` is told so (pair it with transformer.unstack(params)). A token's place is
its position, so a place past a row's length is never seen, and is overwritten when the row gets there.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lmtrain import schema
from lmtrain.models.shapes import groups
from lmtrain.models.transformer import Forward, unstack
from lmtrain.types import Params

Cache = dict[str, Any]


def init_cache(cfg: schema.Model, batch: int, length: int, *, mesh=None, unstacked: bool = False) -> Cache:
    """An empty cache for `batch` rows of up to `length` tokens, prompt included, in the dtype of activations."""
    dtype = Forward(cfg, mesh).dtype
    count, body, tail = groups(cfg)

    def kv(layers):
        shape = (layers, batch, length, cfg.kv_heads, cfg.head_dim)
        return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}

    cache: Cache = {"layers": {str(i): kv(count) for i in range(len(body))}}
    if tail:
        cache["tail"] = {str(i): kv(1) for i in range(len(tail))}
    cache["length_B"] = jnp.zeros(batch, jnp.int32)
    return unstack(cache) if unstacked else cache


def prefill(cfg: schema.Model, params: Params, tokens_BT: jax.Array, lengths_B: jax.Array, cache: Cache,
            mesh=None) -> tuple[jax.Array, Cache]:  # fmt: skip
    """Reads prompts, behind what the cache holds already.

    Args:
      tokens_BT: prompts, each filled up at its end with anything.
      lengths_B: how many tokens of each row are the prompt; at least 1.
      cache: with room for length_B + T tokens a row. Writes past its end are dropped.

    Returns:
      (float32 logits [B, V] after each row's last token, the cache)
    """
    hidden_BTD, cache = _extend(cfg, params, tokens_BT, lengths_B, cache, mesh)
    last_B1D = jnp.take_along_axis(hidden_BTD, (lengths_B - 1)[:, None, None], axis=1)
    return Forward(cfg, mesh).logits(params, last_B1D)[:, 0], cache


def step(cfg: schema.Model, params: Params, tokens_B: jax.Array, cache: Cache, mesh=None) -> tuple[jax.Array, Cache]:
    """One more token for every row. Returns (float32 logits [B, V] after it, the cache)."""
    hidden_B1D, cache = _extend(cfg, params, tokens_B[:, None], jnp.ones_like(cache["length_B"]), cache, mesh)
    return Forward(cfg, mesh).logits(params, hidden_B1D)[:, 0], cache


def _extend(cfg, params, tokens_BT, lengths_B, cache, mesh):
    length_B = cache["length_B"]
    positions_BT = length_B[:, None] + jnp.arange(tokens_BT.shape[1])
    hidden_BTD, _, kept = Forward(cfg, mesh).run(params, tokens_BT, positions_BT, cache=cache)
    return hidden_BTD, {**kept, "length_B": length_B + lengths_B}
