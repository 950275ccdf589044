"""Both ends of the decoder: the embedding before its layers; after them the logits, and one number for each position.

    B rows, T positions, C positions of a chunk, D width, V vocabulary

Logits are the largest array of a training step, so what is made of them is made in chunks of positions (`in_chunks`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lmtrain import schema
from lmtrain.mesh import batch_shards, constrain, platform, residual, spec
from lmtrain.models import lora
from lmtrain.models import params as p
from lmtrain.models.layers import Norm, product
from lmtrain.models.shapes import embedding_std

#: Logits that exist at once. A CPU's stay in its caches; the whole gradient of the output matrix is read and written
#: once a chunk, so a GPU has few large ones (half a GiB less cost 3 % of a step of the 1b model on an H100).
CHUNK_BYTES = {"cpu": 64 << 20, "gpu": 1 << 30, "tpu": 512 << 20}


# ------------------------------------------------------------------------------------------------------------ modules
class Embed(nnx.Module):
    """The table of token embeddings."""

    def __init__(self, cfg: schema.Model, rngs: nnx.Rngs):
        shape = (cfg.vocab_size, cfg.width)
        self.table = p.param(rngs, shape, ("vocab", "embed"), p.normal(embedding_std(cfg)))


class Positions(nnx.Module):
    """The table of learned positions."""

    def __init__(self, cfg: schema.Model, rngs: nnx.Rngs):
        self.table = p.param(rngs, (cfg.max_positions, cfg.width), (None, "embed"), p.normal(0.02))


class Head(nnx.Module):
    """The output matrix of an untied model."""

    def __init__(self, cfg: schema.Model, rngs: nnx.Rngs):
        init = p.zeros if cfg.zero_init else p.normal(cfg.width**-0.5)
        self.kernel = p.param(rngs, (cfg.width, cfg.vocab_size), ("embed", "vocab"), init)
        ends = {"embed": cfg.width}, {"vocab": cfg.vocab_size}
        self.kernel_lora = lora.adapter(cfg, "head/kernel", rngs, *ends)


class Scalar(nnx.Module):
    """One number for each position: rewards, values. Starts at 0 everywhere. A vector and a bias, so that no optimizer
    takes it for a matrix; whole on every device, being so small."""

    def __init__(self, cfg: schema.Model, rngs: nnx.Rngs):
        self.kernel = p.param(rngs, (cfg.width,), ("norm",), p.zeros)
        self.bias = p.param(rngs, (1,), ("norm",), p.zeros)


class Ends(nnx.Module):
    """All that is not a layer: embedding, learned positions, norms of both ends, the output matrix, the scalar head."""

    def __init__(self, cfg: schema.Model, rngs: nnx.Rngs):
        norm = functools.partial(Norm, cfg, cfg.width, cfg.norm_scale, rngs)
        self.cfg = cfg
        self.embed = Embed(cfg, rngs)
        self.positions = Positions(cfg, rngs) if cfg.positions == "learned" else None
        self.embed_norm = norm() if cfg.embed_norm else None
        self.norm = norm()
        self.head = None if cfg.tied else Head(cfg, rngs)
        self.scalar = Scalar(cfg, rngs) if cfg.scalar_head else None  # last: a model draws the same with and without

    def encode(self, tokens_BT, positions_BT, dtype, mesh):
        x_BTD = lookup(self.embed.table[...], tokens_BT, dtype, mesh)
        if self.cfg.embed_scale:
            x_BTD = x_BTD * jnp.asarray(math.sqrt(self.cfg.width), dtype)
        if self.positions is not None:
            x_BTD = x_BTD + self.positions.table[...][positions_BT].astype(dtype)
        x_BTD = x_BTD if self.embed_norm is None else self.embed_norm(x_BTD)
        return residual(x_BTD, mesh)

    def output(self) -> jax.Array:
        """The output matrix [D, V], float32."""
        return self.embed.table[...].T if self.head is None else self.head.kernel[...]

    def logits(self, hidden_BTD, mesh, whole_DV=None):
        """Logits [B, T, V] in float32. whole_DV: of `gathered`, where many calls are to share one."""
        w_DV = self.output()
        w_DV = w_DV.astype(hidden_BTD.dtype) if whole_DV is None else instead(whole_DV, w_DV)
        y = product(hidden_BTD, w_DV, mesh, widen=True)
        if self.head is not None and self.head.kernel_lora is not None:
            y = lora.apply(self.cfg.lora, y, hidden_BTD, w_DV, self.head.kernel_lora)
        if cap := self.cfg.logit_softcap:
            y = cap * jnp.tanh(y / cap)
        return constrain(y, ("batch", "length", "act_vocab"), mesh)

    def score(self, hidden_BTD):
        if self.scalar is None:
            raise schema.ConfigError(
                "model.scalar_head is False, but this objective reads a number off every position (a reward, a value); "
                "set --config.stages.NAME.model.scalar_head=True."
            )
        # A sum of products, not a matrix product: those round float32 on accelerators.
        return (hidden_BTD.astype(jnp.float32) * self.scalar.kernel[...]).sum(axis=-1) + self.scalar.bias[...]


# ------------------------------------------------------------------------------------------------ tables over a mesh
def lookup(table_VD: jax.Array, tokens_BT: jax.Array, dtype: jnp.dtype, mesh: jax.sharding.Mesh | None) -> jax.Array:
    """The tokens' rows of the table, [B, T, D] in dtype.

    Over fsdp every device has some columns of the table: it looks those up for the tokens of all, and the devices
    exchange columns for rows. So neither the table nor its gradient, each V * D float32, is ever whole on a device.
    """
    if mesh is None or mesh.shape["fsdp"] * mesh.shape["tensor"] == 1:
        return table_VD[tokens_BT].astype(dtype)
    if tokens_BT.shape[0] % batch_shards(mesh) or tokens_BT.shape[1] % mesh.shape["context"]:
        return constrain(table_VD, ("vocab", None), mesh)[tokens_BT].astype(dtype)

    def local(table_VD, tokens_BT):
        if mesh.shape["fsdp"] > 1:
            tokens_BT = jax.lax.all_gather(tokens_BT, "fsdp", axis=0, tiled=True)
        if mesh.shape["tensor"] > 1:  # the rows of the table are split, too
            tokens_BT = tokens_BT - jax.lax.axis_index("tensor") * table_VD.shape[0]
            here_BT1 = ((tokens_BT >= 0) & (tokens_BT < table_VD.shape[0]))[..., None]
            x_BTD = jnp.where(here_BT1, table_VD[jnp.clip(tokens_BT, 0, table_VD.shape[0] - 1)], 0).astype(dtype)
        else:
            x_BTD = table_VD[tokens_BT].astype(dtype)
        if mesh.shape["fsdp"] > 1:
            x_BTD = jax.lax.all_to_all(x_BTD, "fsdp", split_axis=0, concat_axis=2, tiled=True)
        if mesh.shape["tensor"] == 1:
            return x_BTD
        if spread:
            return jax.lax.psum_scatter(x_BTD, "tensor", scatter_dimension=1, tiled=True)
        return jax.lax.psum(x_BTD, "tensor")

    spread = tokens_BT.shape[1] % (mesh.shape["context"] * mesh.shape["tensor"]) == 0  # see mesh.residual
    specs = spec(("vocab", "embed"), mesh), spec(("batch", "length"), mesh)
    out = spec(("batch", "residual" if spread else "length", None), mesh)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)(table_VD, tokens_BT)


def gathered(w_DV: jax.Array, dtype: jnp.dtype, mesh: jax.sharding.Mesh | None) -> jax.Array:
    """The output matrix in dtype, whole but for the tensor axis: for a loop, which would gather it in every turn."""
    # The barrier keeps the cast before the gather: TPU's compiler would fuse it after, and gather float32.
    w_DV = jax.lax.optimization_barrier(jax.lax.stop_gradient(w_DV).astype(dtype))
    return constrain(w_DV, (None, "vocab"), mesh)


@jax.custom_vjp
def instead(value: jax.Array, of: jax.Array) -> jax.Array:
    """value, whose gradient goes to what it stands for, in its dtype and as it is split."""
    return value


instead.defvjp(lambda value, of: (value, of[:0]), lambda of, gradient: (None, gradient.astype(of.dtype)))


# ------------------------------------------------------------------------------------------------------------- losses
class TokenLosses(NamedTuple):
    """What `Forward.losses` returns; float32, all of them of logits divided by the temperature.

    nll_BT: -log p(target). lse_BT: logsumexp of the logits. aux: router losses, summed over real tokens.
    hidden_BTD: the final hidden states, in the dtype of activations.
    entropy_BT: of the next token's distribution, in nats. uniform_BT: cross entropy with the uniform distribution, the
      mean of -log p over the vocabulary. Each None unless it was asked for.
    """

    nll_BT: jax.Array
    lse_BT: jax.Array
    aux: jax.Array
    hidden_BTD: jax.Array
    entropy_BT: jax.Array | None = None
    uniform_BT: jax.Array | None = None


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array, mesh: jax.sharding.Mesh | None = None) -> Any:
    """(-log p(target), logsumexp of the logits), each [B, T]."""
    lse_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    if mesh is not None and mesh.shape["tensor"] > 1:
        # A gather along the split vocabulary would first collect it; a masked sum stays where the logits are.
        at_BTV = jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, 2) == targets_BT[..., None]
        return lse_BT - jnp.where(at_BTV, logits_BTV, 0).sum(axis=-1), lse_BT
    return lse_BT - jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0], lse_BT


def entropy(logits_BTV: jax.Array, lse_BT: jax.Array) -> jax.Array:
    """Entropy of softmax(logits), [B, T], in nats. Sums over the vocabulary alone, so a split one stays split."""
    return lse_BT - (jnp.exp(logits_BTV - lse_BT[..., None]) * logits_BTV).sum(axis=-1)


def in_chunks(f: Callable[..., Any], chunk: int, mesh: jax.sharding.Mesh | None, hidden_BTD: jax.Array, *arrays: Any):
    """f(hidden, *arrays) a chunk of positions at a time, forward and backward; as if for all of them at once.

    Args:
      f: of arrays [B, C, ...], the positions independent; returns a tree of arrays [B, C].
      chunk: positions of a row (of one context shard) at a time.
      arrays: [B, T, ...] like hidden_BTD.

    Returns:
      f's tree, of arrays [B, T].
    """
    B, T, _ = hidden_BTD.shape
    shards = 1 if mesh is None else mesh.shape["context"]
    local = T // shards
    if chunk >= local:
        return f(hidden_BTD, *arrays)

    # Chunks are cut within each context shard, [B, T] -> [n, B, shards * chunk], so that none of it moves.
    n = -(-local // chunk)

    def cut(x):
        x = x.reshape(B, shards, local, *x.shape[2:])
        x = jnp.pad(x, ((0, 0), (0, 0), (0, n * chunk - local)) + ((0, 0),) * (x.ndim - 3))
        x = jnp.moveaxis(x.reshape(B, shards, n, chunk, *x.shape[3:]), 2, 0)
        x = x.reshape(n, B, shards * chunk, *x.shape[4:])
        return constrain(x, (None, "batch", "length") + (None,) * (x.ndim - 3), mesh)

    def join(x):
        x = jnp.moveaxis(x.reshape(n, B, shards, chunk), 0, 2).reshape(B, shards, n * chunk)
        return constrain(x[:, :, :local].reshape(B, T), ("batch", "length"), mesh)

    body = jax.checkpoint(lambda carry, xs: (carry, f(*xs)), prevent_cse=False)
    _, out = jax.lax.scan(body, (), tuple(cut(x) for x in (hidden_BTD, *arrays)))
    return jax.tree.map(join, out)


def chunk_size(cfg: schema.Model, mesh: jax.sharding.Mesh | None, rows: int, length: int) -> int:
    """Positions of a row (of one context shard) whose logits exist at once, equal chunks as far as they go."""
    rows_here, vocab_here = rows, cfg.vocab_size
    if mesh is not None:
        rows_here, vocab_here = -(-rows // batch_shards(mesh)), vocab_here // mesh.shape["tensor"]
        length = length // mesh.shape["context"]
    positions = cfg.loss_chunk or CHUNK_BYTES[platform(mesh)] // (4 * vocab_here)
    chunk = max(1, positions // rows_here)
    return -(-length // -(-length // chunk))  # the same number of chunks, as even as they can be
