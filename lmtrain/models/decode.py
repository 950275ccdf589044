"""Generation with a cache: the forward pass of transformer.py, a whole prompt at first and then a token at a time.

    B rows, U prompts, T positions of a prompt, S places of the cache, R places of its new part
    V vocabulary, K key heads, H size of a head

The cache holds the keys and values of every layer, [B, K, S, H], one array a layer. A position's place is its number,
so a place past a row's length is never seen, and is overwritten when the row gets there. Several steps in a row write
to a small part of their own (`new`, see attention.recall), which `keep` then adds to the cache.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from lmtrain import schema
from lmtrain.mesh import batch_shards, constrain, platform, replicated
from lmtrain.models import lora
from lmtrain.models.draw import draw
from lmtrain.models.shapes import groups
from lmtrain.models.transformer import Forward, unstack
from lmtrain.types import Array, Params

Cache = dict[str, Any]
AXES = ("batch", "act_kv_heads", "kv_length", "head_dim")
PRODUCTS = ("q", "k", "v", "o", "gate", "up", "down")  # a layer's matrices, which it reads in the dtype of activations


@flax.struct.dataclass
class Ready:
    """A model laid out for decoding by `prepare`: parameters and, static, their configuration and mesh."""

    params: Params
    cfg: schema.Model = flax.struct.field(pytree_node=False)
    mesh: jax.sharding.Mesh | None = flax.struct.field(pytree_node=False)

    def forward(self, rows: int) -> Forward:
        """Pins shardings only where the mesh divides the rows; else the compiler spreads them from the parameters'."""
        m = self.mesh
        return Forward(
            self.cfg, m if m is not None and m.shape["context"] == 1 and rows % batch_shards(m) == 0 else None
        )


# ------------------------------------------------------------------------------------------------------------- layout
def prepare(cfg: schema.Model, params: Params, mesh: jax.sharding.Mesh | None = None) -> Ready:
    """The same model with one array a layer, in the dtype of its products.

    A step reads every weight once, so slices out of stacks, or conversions, would double its traffic. What has this
    form already is handed over without a copy: the second time, and all but the layers in float32.

    On a CPU the embedding of a tied model also becomes an output matrix: a product with the table as it lies takes a
    third longer.
    """
    cfg, params = lora.merge(cfg, params)
    dtype = Forward(cfg, mesh).dtype
    # A prompt's length is a power of two, which a backend of the training's rows may refuse.
    attention = "reference" if cfg.attention == "reference" else "auto"
    cfg = dataclasses.replace(cfg, dtype=dtype.name, remat="none", attention=attention)
    ends = {name: params[name] for name in ("embed", "head") if name in params}
    if "head" not in ends and platform(mesh) == "cpu":
        ends["head"] = {"kernel": _transposed(params["embed"]["table"])}
    cfg = dataclasses.replace(cfg, tied="head" not in ends)
    layers: Params = {name: params[name] for name in ("layers", "tail") if name in params}
    if not isinstance(layers["layers"], tuple) or dtype != jnp.float32:
        layers = _laid_out(layers, dtype.name)
    return Ready({**params, **layers, **jax.tree.map(lambda w: w.astype(dtype), ends)}, cfg, mesh)


_transposed = jax.jit(jnp.transpose)


@functools.partial(jax.jit, static_argnums=1)
def _laid_out(layers: Params, dtype: str) -> Params:
    def cast(path, w):
        return w.astype(dtype) if path[-1].key in PRODUCTS else w

    return jax.tree_util.tree_map_with_path(cast, unstack(layers))


def empty(model: Ready, rows: int, places: int) -> Cache:
    """A cache (or the new part of one) for `rows` rows of up to `places` tokens, in the dtype of activations."""
    cfg = model.cfg
    count, body, tail = groups(cfg)

    def kv(*stack):
        shape = (*stack, rows, cfg.kv_heads, places, cfg.head_dim)
        return {"k": jnp.zeros(shape, cfg.dtype), "v": jnp.zeros(shape, cfg.dtype)}

    cache: Cache = {"layers": tuple({str(i): kv() for i in range(len(body))} for _ in range(count))}
    return cache | ({"tail": {str(i): kv(1) for i in range(len(tail))}} if tail else {})


def resize(cache: Cache, take_B: Array | None, places: int, mesh: jax.sharding.Mesh | None = None) -> Cache:
    """The cache of rows take_B, in this order (None: as they are), with so many places."""

    def one(x_BKSH):
        x_BKSH = x_BKSH[:, :, :places] if take_B is None else x_BKSH[take_B, :, :places]
        if x_BKSH.shape[2] < places:  # not jnp.pad: with the gather fused into it, it is slow on a CPU
            B, K, _, H = x_BKSH.shape
            x_BKSH = jax.lax.dynamic_update_slice(jnp.zeros((B, K, places, H), x_BKSH.dtype), x_BKSH, (0, 0, 0, 0))
        return constrain(x_BKSH, AXES, mesh)

    return _map(one, cache)


# ------------------------------------------------------------------------------------------------------------ prompts
def read(model: Ready, tokens_UT: Array, length_U: Array) -> Cache:
    """Reads prompts as training reads rows, and returns their keys and values: a cache of U rows and T places.

    Args:
      tokens_UT: prompts, each filled up at its end with anything. The last token of a prompt need not be read: the
        first step reads it, as it reads every token whose successor is wanted.
      length_U: of the prompts.
    """
    count, body, tail = groups(model.cfg)
    cache: Cache = {"layers": tuple({str(i): {} for i in range(len(body))} for _ in range(count))}
    if tail:
        cache["tail"] = {str(i): {} for i in range(len(tail))}
    positions_1T = jnp.arange(tokens_UT.shape[1])[None]
    forward = model.forward(len(tokens_UT))
    kept: Cache = forward.run(model.params, tokens_UT, positions_1T, cache=cache, length_B1=length_U[:, None])[2]
    return kept


def place(cache: Cache, kept: Cache, source_B: Array, mesh: jax.sharding.Mesh | None = None) -> Cache:
    """The cache with prompt source_B of `read` at the beginning of each row; -1 leaves the row as it is."""
    new_B111 = (source_B >= 0)[:, None, None, None]

    def one(x_BKSH, x_UKTH):
        T = min(x_BKSH.shape[2], x_UKTH.shape[2])  # what a prompt was filled up with may lie past the last place
        start_BKTH = jnp.where(new_B111, x_UKTH[source_B, :, :T], x_BKSH[:, :, :T])
        return constrain(jax.lax.dynamic_update_slice(x_BKSH, start_BKTH, (0, 0, 0, 0)), AXES, mesh)

    return _map(one, cache, kept)


# -------------------------------------------------------------------------------------------------------------- steps
def step(model: Ready, tokens_B: Array, position_B: Array, cache: Cache, new: Cache, at: Array):
    """One more token for every row.

    Args:
      position_B: of the tokens.
      cache: what came before; read only.
      new: its new part, in which steps 0 to at - 1 have written.
      at: which step since `new` began: the place in it that this one writes.

    Returns:
      (float32 logits [B, V] after the tokens, the new part with this step)
    """

    def both(old, new, at):
        return {i: {**kv, "new_k": new[i]["k"], "new_v": new[i]["v"], "at": at} for i, kv in old.items()}

    joined = {"layers": tuple(both(a, b, at) for a, b in zip(cache["layers"], new["layers"], strict=True))}
    if "tail" in cache:
        joined["tail"] = both(cache["tail"], new["tail"], at[None])
    forward = model.forward(len(tokens_B))
    hidden_B1D, _, new = forward.run(model.params, tokens_B[:, None], position_B[:, None], cache=joined)
    return forward.logits(model.params, hidden_B1D)[:, 0], new


def keep(cache: Cache, new: Cache, first_B: Array, mesh: jax.sharding.Mesh | None = None) -> Cache:
    """The cache with its new part written at places first_B, first_B + 1, ... of each row."""
    write = jax.vmap(lambda x_KSH, x_KRH, first: jax.lax.dynamic_update_slice(x_KSH, x_KRH, (0, first, 0)))
    return _map(lambda x_BKSH, x_BKRH: constrain(write(x_BKSH, x_BKRH, first_B), AXES, mesh), cache, new)


def steps(model: Ready, cache: Cache, columns: dict[str, Any], count: Array, sizes: tuple[int, int]):
    """Up to `count` tokens for every row that has some left; a row that has none, or has drawn a stop token, rests.

    Ends before that once a quarter of the rows at work have come to rest.

    Args:
      columns: of the rows: tokens_B int32, the last token, not in the cache yet; position_B int32, its position; left_B
        int32, how many more are wanted; stop_BC int32, tokens that end the row (-1: none); how (see draw.py).
      sizes: (n, R): the most that `count` may be; steps that write to the new part before it joins the cache.

    Returns:
      ((tokens_nB int32, with -1 where a row rested, logps_nB float32), the cache)
    """
    stop_BC, how = columns["stop_BC"], columns["how"]
    (most, R), B = sizes, len(stop_BC)
    rest = (columns["left_B"] > 0).sum() * 3 // 4  # 0 of 1

    def more(state):
        return (state["n"] < count) & ((state["left_B"] > 0).sum() > rest)

    def run(carry):  # up to R steps, which then join the cache
        state, cache = carry
        first, first_B = state["n"], state["position_B"]

        def one(carry):
            state, new = carry
            n, live_B = state["n"], state["left_B"] > 0
            logits_BV, new = step(model, state["tokens_B"], state["position_B"], cache, new, n - first)
            tokens_B, logps_B = draw(logits_BV, how, state["position_B"] + 1, live_B)
            ended_B = (tokens_B[:, None] == stop_BC).any(-1)
            return {
                "n": n + 1,
                "tokens_B": jnp.where(live_B, tokens_B, state["tokens_B"]),
                "position_B": state["position_B"] + live_B,
                "left_B": jnp.where(ended_B, 0, jnp.maximum(state["left_B"] - 1, 0)),
                "tokens_nB": state["tokens_nB"].at[n].set(jnp.where(live_B, tokens_B, -1)),
                "logps_nB": state["logps_nB"].at[n].set(logps_B),
            }, new

        on = lambda carry: more(carry[0]) & (carry[0]["n"] - first < R)  # noqa: E731
        state, new = jax.lax.while_loop(on, one, (state, empty(model, B, R)))
        return state, keep(cache, new, first_B, model.mesh)

    state = {
        "n": jnp.int32(0),
        "tokens_nB": jnp.full((most, B), -1, jnp.int32),
        "logps_nB": jnp.zeros((most, B), jnp.float32),
        **{name: columns[name] for name in ("tokens_B", "position_B", "left_B")},
    }
    state, cache = jax.lax.while_loop(lambda carry: more(carry[0]), run, (state, cache))
    drawn = state["tokens_nB"], state["logps_nB"]
    # Whole on every device, so that every process can read them.
    return drawn if model.mesh is None else jax.lax.with_sharding_constraint(drawn, replicated(model.mesh)), cache


def _map(f: Callable[..., jax.Array], *caches: Cache) -> Cache:
    """f on every array, [B, K, S, H]; those of the tail have a dimension of 1 before that, like its parameters."""
    out: Cache = {"layers": jax.tree.map(f, *(c["layers"] for c in caches))}
    if "tail" in caches[0]:
        out["tail"] = jax.tree.map(lambda *x: f(*(a[0] for a in x))[None], *(c["tail"] for c in caches))
    return out
