"""Generation with a cache: the forward pass of transformer.py over new tokens only.

    B rows, T new positions, S places in the cache, V vocabulary, K key heads, H size of a head

The cache is {"layers": ..., "tail": ..., "length_B": int32}: keys and values [B, S, K, H] of every layer, one array a
layer where the forward pass loops over layer groups, stacked like the parameters where it scans. A token's place is its
position, so a place past a row's length is never seen, and is overwritten when the row gets there.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lmtrain import schema
from lmtrain.mesh import batch_shards
from lmtrain.models.shapes import groups
from lmtrain.models.transformer import Forward, unstack
from lmtrain.types import Params

Cache = dict[str, Any]


def init_cache(cfg: schema.Model, batch: int, length: int, *, mesh=None, unstacked: bool | None = None) -> Cache:
    """An empty cache for `batch` rows of up to `length` tokens, prompt included, in the dtype of activations.

    Args:
      unstacked: one array a layer; needed with transformer.unstack(params), the fast way at small batches, where every
        step would otherwise copy weights out of their stacks. None: as the forward pass of cfg loops or scans.
    """
    forward = Forward(cfg, mesh)
    dtype = forward.dtype
    count, body, tail = groups(cfg)

    def kv(layers):
        shape = (layers, batch, length, cfg.kv_heads, cfg.head_dim)
        return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}

    cache: Cache = {"layers": {str(i): kv(count) for i in range(len(body))}}
    if tail:
        cache["tail"] = {str(i): kv(1) for i in range(len(tail))}
    cache["length_B"] = jnp.zeros(batch, jnp.int32)
    return unstack(cache) if (forward.loops(count) if unstacked is None else unstacked) else cache


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
    return _forward(cfg, last_B1D.shape[0], mesh).logits(params, last_B1D)[:, 0], cache


def step(cfg: schema.Model, params: Params, tokens_B: jax.Array, cache: Cache, mesh=None) -> tuple[jax.Array, Cache]:
    """One more token for every row. Returns (float32 logits [B, V] after it, the cache)."""
    hidden_B1D, cache = _extend(cfg, params, tokens_B[:, None], jnp.ones_like(cache["length_B"]), cache, mesh)
    return _forward(cfg, tokens_B.shape[0], mesh).logits(params, hidden_B1D)[:, 0], cache


def _extend(cfg, params, tokens_BT, lengths_B, cache, mesh):
    length_B = cache["length_B"]
    positions_BT = length_B[:, None] + jnp.arange(tokens_BT.shape[1])
    forward = _forward(cfg, tokens_BT.shape[0], mesh)
    hidden_BTD, _, kept = forward.run(params, tokens_BT, positions_BT, cache=cache)
    return hidden_BTD, {**kept, "length_B": length_B + lengths_B}


def _forward(cfg, rows, mesh):
    """Pins shardings only where the mesh divides the rows; else the compiler spreads them from the parameters'."""
    fits = mesh is not None and mesh.shape["context"] == 1 and rows % batch_shards(mesh) == 0
    forward = Forward(cfg, mesh)
    return forward if fits else Forward(dataclasses.replace(cfg, dtype=forward.dtype.name))
