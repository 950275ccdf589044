"""Low-rank adapters: what a matrix learns beside itself, W + s A B, while it stays as it was (Hu et al. 2021).

    D inputs, F outputs (heads end to end), r rank of an adapter, E experts

An adapter is parameters like others, named after its matrix: `attn/q` has `attn/q_lora/a` [D, r], `b` [r, N, H] and,
for DoRA, `gain` [N, H]. A is random and B zero, so a model begins as what it adapts. s is alpha / r, or for rsLoRA
alpha / sqrt(r) (Kalajdzievski 2023). DoRA (Liu et al. 2024) learns each column's length apart from its direction:
gain |W| (W + s A B) / |W + s A B|, lengths over the inputs, the last one taken as a constant (their section 4.3).
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lmtrain import schema
from lmtrain.models.params import normal, ones, param, zeros
from lmtrain.models.quantise import dequantised
from lmtrain.types import Params

SUFFIX = "_lora"
#: The matrices that can have an adapter: a layer's, and the output of an untied model.
MATRICES = ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down", "mlp/shared/gate",
            "mlp/shared/up", "mlp/shared/down", "head/kernel")  # fmt: skip


class Adapter(nnx.Module):
    """A and B of one matrix (or of each of a stack of them), and DoRA's gain."""

    def __init__(self, cfg: schema.Lora, rngs: nnx.Rngs, stack: Any, ins: Any, outs: Any):
        """stack, ins, outs: {logical axis: size} of the matrix's dimensions, in its order."""
        shape, axes = (lambda d: tuple(d.values())), (lambda d: tuple(d))
        self.a = param(
            rngs, (*shape(stack), *shape(ins), cfg.rank), (*axes(stack), *axes(ins), None),
            normal(math.prod(shape(ins)) ** -0.5))  # fmt: skip
        self.b = param(rngs, (*shape(stack), cfg.rank, *shape(outs)), (*axes(stack), None, *axes(outs)), zeros)
        self.gain = param(rngs, (*shape(stack), *shape(outs)), (*axes(stack), *axes(outs)), ones) if cfg.dora else None


def wants(cfg: schema.Lora, name: str) -> bool:
    """Whether the matrix of this name has an adapter."""
    return bool(cfg.rank) and any(fnmatch.fnmatchcase(name, pattern) for pattern in cfg.matrices)


def adapter(cfg: schema.Model, name: str, rngs: nnx.Rngs, ins: Any, outs: Any, stack: Any = None) -> Adapter | None:
    """The adapter of a matrix, or None where the configuration gives it none."""
    return Adapter(cfg.lora, rngs, stack or {}, ins, outs) if wants(cfg.lora, name) else None


def strength(cfg: schema.Lora) -> float:
    """s, by which A B is multiplied."""
    return cfg.alpha / (cfg.rank**0.5 if cfg.rslora else cfg.rank)


def apply(cfg: schema.Lora, y: jax.Array, x: jax.Array, w_DF: jax.Array, own: Adapter) -> jax.Array:
    """x (W + s A B), given y = x W: two thin products, so that W's own gradient is never worked out.

    Args:
      y, x: [..., F] and [..., D].
      w_DF: W in x's dtype.
    """
    a_Dr = own.a[...].reshape(-1, cfg.rank).astype(x.dtype)
    b_rF = own.b[...].reshape(cfg.rank, -1).astype(x.dtype)
    y = y + strength(cfg) * ((x @ a_Dr) @ b_rF).astype(y.dtype)
    if own.gain is None:
        return y
    w_DF = w_DF.astype(jnp.float32)
    moved_DF = w_DF + strength(cfg) * (a_Dr.astype(jnp.float32) @ b_rF.astype(jnp.float32))
    ratio_F = jax.lax.stop_gradient(jnp.linalg.norm(w_DF, axis=0) / jnp.linalg.norm(moved_DF, axis=0))
    return y * (own.gain[...].reshape(-1) * ratio_F).astype(y.dtype)


def merged(cfg: schema.Lora, w: jax.Array, a: jax.Array, b: jax.Array, gain: jax.Array | None, ins: int) -> jax.Array:
    """The matrix that W and its adapter are together, in W's shape and dtype. Leading dimensions that a has beyond
    [*ins, r] are a stack (layers, experts).

    Args:
      ins: how many dimensions of w are inputs.
    """
    rank = a.shape[-1]
    lead = a.ndim - 1 - ins
    stack = w.shape[:lead]
    flat = w.reshape(*stack, -1, math.prod(w.shape[lead + ins :])).astype(jnp.float32)
    delta = jnp.matmul(a.reshape(*stack, -1, rank), b.reshape(*stack, rank, -1), precision="highest")
    moved = flat + strength(cfg) * delta
    if gain is not None:
        lengths = jnp.linalg.norm(flat, axis=-2, keepdims=True) / jnp.linalg.norm(moved, axis=-2, keepdims=True)
        moved = moved * jax.lax.stop_gradient(lengths) * gain.reshape(*stack, 1, -1)
    return moved.reshape(w.shape).astype(w.dtype)


def merge(cfg: schema.Model, params: Params) -> tuple[schema.Model, Params]:
    """The same model without adapters, each added to its matrix, in floating point."""
    params = dequantised(params)
    if not cfg.lora.rank:
        return cfg, params

    def walk(tree: Any) -> Any:
        if not isinstance(tree, dict):
            return type(tree)(walk(t) for t in tree) if isinstance(tree, tuple) else tree
        out = {}
        for name, value in tree.items():
            if name.endswith(SUFFIX):
                continue
            own = tree.get(name + SUFFIX)
            if own is None:
                out[name] = walk(value)
            else:
                ins = 2 if name == "o" else 1
                out[name] = merged(cfg.lora, jnp.asarray(value), own["a"], own["b"], own.get("gain"), ins)
        return out

    return dataclasses.replace(cfg, lora=schema.Lora()), walk(params)
