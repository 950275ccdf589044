"""The decoder: configuration -> parameters -> hidden states -> losses, as pure functions.

    B rows, T positions, D width, V vocabulary, G layer groups, P layers in a group (the pattern's length)

Layers repeat in the order of cfg.pattern. All layers at one place of the pattern have their parameters stacked:
params["layers"]["0"] holds the first of every group, with leading dimension G. Where the pattern does not divide the
number of layers, params["tail"]["0"]... hold those left over (leading dimension 1). A scan runs over the groups.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lmtrain import schema
from lmtrain.mesh import is_axes, platform, residual
from lmtrain.models import balance, head, pipeline
from lmtrain.models import params as p
from lmtrain.models.attention import Attention, balances, keeps_products
from lmtrain.models.head import Ends, TokenLosses
from lmtrain.models.layers import BY_LENGTH, MLP, Norm, rope_tables
from lmtrain.models.moe import MoE
from lmtrain.models.quantise import dequantised
from lmtrain.models.shapes import groups, resolve
from lmtrain.types import Batch, Params

__all__ = ["Forward", "TokenLosses", "axes", "count", "flops_per_token", "init", "resolve", "shapes", "unstack"]

#: platform -> layer groups that are traced one after the other: a scan copies what it keeps for the backward pass
UNROLLED = {"cpu": 12, "gpu": 32}


# ------------------------------------------------------------------------------------------------------------ modules
class Block(nnx.Module):
    """One layer: attention and MLP, each added to the residual stream, normed before it, after it, or both."""

    def __init__(self, cfg: schema.Model, kind: str, rngs: nnx.Rngs):
        norm = functools.partial(Norm, cfg, cfg.width, cfg.norm_scale, rngs)
        self.attn = Attention(cfg, cfg.window if kind == "W" else 0, rngs)
        self.mlp = MoE(cfg, rngs) if cfg.experts else MLP(cfg, cfg.mlp, rngs)
        self.attn_norm = norm() if cfg.pre_norm else None
        self.mlp_norm = norm() if cfg.pre_norm else None
        self.attn_post_norm = norm() if cfg.post_norm else None
        self.mlp_post_norm = norm() if cfg.post_norm else None

    def __call__(self, x_BTD, tables, segments_BT, real_BT, mesh, cache=None, index_BT=None):
        """Returns (x, router losses or 0.0, cache or None); see Attention for the cache."""
        h_BTD = x_BTD if self.attn_norm is None else self.attn_norm(x_BTD)
        y_BTD, cache = self.attn(h_BTD, tables, segments_BT, mesh, cache, index_BT)
        y_BTD = residual(y_BTD, mesh)
        x_BTD = x_BTD + (y_BTD if self.attn_post_norm is None else self.attn_post_norm(y_BTD))
        h_BTD = x_BTD if self.mlp_norm is None else self.mlp_norm(x_BTD)
        y_BTD, aux = self.mlp(h_BTD, real_BT, mesh) if isinstance(self.mlp, MoE) else (self.mlp(h_BTD, mesh), 0.0)
        y_BTD = residual(y_BTD, mesh)
        x_BTD = x_BTD + (y_BTD if self.mlp_post_norm is None else self.mlp_post_norm(y_BTD))
        return residual(x_BTD, mesh), aux, cache


@functools.cache
def _graph(cfg: schema.Model, part: str) -> nnx.GraphDef:
    return p.graph(lambda: _module(cfg, part, nnx.Rngs(params=0)))


def _module(cfg: schema.Model, part: str, rngs: nnx.Rngs) -> nnx.Module:
    """part "ends", or a kind of layer: "G" or "W"."""
    return Ends(cfg, rngs) if part == "ends" else Block(cfg, part, rngs)


# --------------------------------------------------------------------------------------------------------- parameters
def init(cfg: schema.Model, key: jax.Array) -> Params:
    """Fresh parameters: a nested dict of float32 arrays, layers born stacked. Pure, so it can be jitted and sharded.

    Args:
      cfg: resolved (see `resolve`).
      key: a typed jax.random key.
    """

    def build(part):
        return lambda key: p.pure(_module(cfg, part, nnx.Rngs(params=key)))

    count, body, tail = groups(cfg)
    keys = jax.random.split(key, 1 + len(body) + len(tail))
    tree = build("ends")(keys[0])
    tree["layers"] = {str(i): p.stacked(build(kind), keys[1 + i], count) for i, kind in enumerate(body)}
    if tail:
        last = keys[1 + len(body) :]
        tree["tail"] = {str(i): p.stacked(build(kind), last[i], 1) for i, kind in enumerate(tail)}
    return tree


def axes(cfg: schema.Model) -> Params:
    """The logical axes of every parameter: a tree like `init`'s, with a tuple of names (or None) for each array."""

    def of(part):
        return p.axes_of(lambda: _module(cfg, part, nnx.Rngs(params=0)))

    def stack(kinds, name):
        return {str(i): jax.tree.map(lambda a: (name, *a), of(k), is_leaf=is_axes) for i, k in enumerate(kinds)}

    _, body, tail = groups(cfg)
    tree = of("ends")
    tree["layers"] = stack(body, "layers")
    if tail:
        tree["tail"] = stack(tail, "tail")
    return tree


def shapes(cfg: schema.Model) -> Params:
    """The shapes of `init`'s parameters, as ShapeDtypeStructs; allocates nothing."""
    return jax.eval_shape(lambda: init(cfg, jax.random.key(0)))


def count(cfg: schema.Model) -> dict[str, int]:
    """Numbers of parameters: total, active (those that one token uses), embedding (the table alone)."""
    tree = shapes(cfg)
    total = p.size(tree)
    idle = 0
    if cfg.experts:
        matrices = 3 if "gate" in tree["layers"]["0"]["mlp"] else 2
        idle = cfg.layers * (cfg.experts - cfg.experts_per_token) * matrices * cfg.width * cfg.expert_mlp
    return {"total": total, "active": total - idle, "embedding": p.size(tree["embed"])}


def flops_per_token(cfg: schema.Model, row_length: int) -> float:
    """FLOPs that training takes for one token: 6 for every active weight of a matrix product, the output matrix once
    and the embedding's look-up not at all, and 12 N H T for the scores of every layer (Chowdhery et al. 2022, appendix
    B; the causal half not taken off, by everybody's convention), T at most the window in windowed layers.
    """
    dims = jax.tree.map(
        lambda a: len([name for name in a if name not in ("layers", "tail")]), axes(cfg), is_leaf=is_axes
    )
    vectors = sum(leaf.size for leaf, d in zip(*map(jax.tree.leaves, (shapes(cfg), dims)), strict=True) if d == 1)
    n = count(cfg)
    looked_up = (0 if cfg.tied else n["embedding"]) + cfg.max_positions * cfg.width
    matrices = n["active"] - vectors - looked_up
    kinds = (cfg.pattern * cfg.layers)[: cfg.layers]
    seen = sum(min(cfg.window, row_length) if kind == "W" else row_length for kind in kinds)
    return float(6 * matrices + 12 * cfg.heads * cfg.head_dim * seen)


def unstack(params: Params) -> Params:
    """The same parameters with params["layers"] a tuple of one dict a group, unstacked.

    Decoding at batch 1 reads every weight once a token: slices out of stacks would double that traffic. Forward and
    decode take either form.
    """
    if isinstance(params["layers"], tuple):
        return params
    return {**params, "layers": tuple(_slices(params["layers"]))}


def _slices(stack: Any) -> list[Any]:
    """A stacked tree as a list of trees. By lax.split: its gradient is one concatenation, not a sum of padded parts."""
    leaves, structure = jax.tree.flatten(stack)
    parts = [[x.squeeze(0) for x in jax.lax.split(leaf, [1] * leaf.shape[0], axis=0)] for leaf in leaves]
    return [jax.tree.unflatten(structure, group) for group in zip(*parts, strict=True)]


# ------------------------------------------------------------------------------------------------------------ forward
@dataclasses.dataclass(frozen=True)
class Forward:
    """The forward pass of one configuration on one mesh: what objectives receive. Hashable, all methods pure.

    Attributes:
      cfg: resolved (see `resolve`).
      mesh: where the arrays lie; None: one device.
    """

    cfg: schema.Model
    mesh: jax.sharding.Mesh | None = None

    def __post_init__(self):
        if not (self.cfg.vocab_size and self.cfg.head_dim):
            raise schema.ConfigError("model is not resolved: pass it through lmtrain.models.transformer.resolve first.")

    @property
    def dtype(self) -> jnp.dtype:
        """Of activations and products."""
        if self.cfg.dtype == "auto":
            return jnp.dtype(jnp.float32 if platform(self.mesh) == "cpu" else jnp.bfloat16)
        return jnp.dtype(self.cfg.dtype)

    def hidden(self, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Final hidden states [B, T, D] after the last norm, and router losses (float32, summed over real tokens)."""
        tokens_BT = batch["tokens_BT"]
        segments_BT = batch.get("segments_BT")
        positions_BT = batch.get("positions_BT", jnp.arange(tokens_BT.shape[1])[None])
        if self.cfg.positions == "learned" and tokens_BT.shape[1] > self.cfg.max_positions:
            raise schema.ConfigError(
                f"a row has {tokens_BT.shape[1]} positions, but model.max_positions is {self.cfg.max_positions}: the "
                "positions that were learned end there."
            )
        length_B1 = None
        if segments_BT is not None and self.cfg.rope_scaling.kind in BY_LENGTH:
            length_B1 = jnp.where(segments_BT > 0, positions_BT, 0).max(axis=-1, keepdims=True) + 1
        x_BTD, aux, _ = self.run(params, tokens_BT, positions_BT, segments_BT, length_B1=length_B1)
        return x_BTD, aux

    def logits(self, params: Params, hidden_BTD: jax.Array) -> jax.Array:
        """Logits [B, T, V] in float32, soft cap applied."""
        return self._ends(params).logits(hidden_BTD, self.mesh)

    def scalar(self, params: Params, hidden_BTD: jax.Array) -> jax.Array:
        """The scalar head's number for every position, float32 [B, T]; ConfigError without cfg.scalar_head."""
        return self._ends(params).score(hidden_BTD)

    def losses(
        self, params: Params, batch: Batch, temperature: float = 1.0, entropy: bool = False, uniform: bool = False
    ) -> TokenLosses:
        """Cross entropy of every position, weights not applied. Logits exist for cfg.loss_chunk positions at a time.

        Args:
          temperature: logits (soft cap applied) are divided by it.
          entropy, uniform: whether these are worked out too, in the same chunks.
        """
        hidden_BTD, aux = self.hidden(params, batch)

        def part(logits_BCV, targets_BC):
            logits_BCV = logits_BCV if temperature == 1 else logits_BCV / temperature
            nll_BC, lse_BC = self.cross_entropy(logits_BCV, targets_BC)
            entropy_BC = head.entropy(logits_BCV, lse_BC) if entropy else None
            return nll_BC, lse_BC, entropy_BC, lse_BC - logits_BCV.mean(axis=-1) if uniform else None

        nll_BT, lse_BT, entropy_BT, uniform_BT = self.map_logits(params, part, hidden_BTD, batch["targets_BT"])
        return TokenLosses(nll_BT, lse_BT, aux, hidden_BTD, entropy_BT, uniform_BT)

    def logps(self, params: Params, batch: Batch, temperature: float = 1.0) -> jax.Array:
        """log p(target) of every position, float32 [B, T], logits divided by the temperature."""
        return -self.losses(params, batch, temperature).nll_BT

    def map_logits(self, params: Params, f: Callable[..., Any], hidden_BTD: jax.Array, *arrays: jax.Array) -> Any:
        """f(logits [B, C, V], *arrays [B, C, ...]) -> a tree of [B, C], C = cfg.loss_chunk positions at a time.

        Returns f's tree of arrays [B, T]. Positions must not depend on one another.
        """
        ends = self._ends(params)
        chunk = head.chunk_size(self.cfg, self.mesh, *hidden_BTD.shape[:2])
        whole_DV = head.gathered(ends.output(), hidden_BTD.dtype, self.mesh)
        return head.in_chunks(
            lambda h, *a: f(ends.logits(h, self.mesh, whole_DV), *a), chunk, self.mesh, hidden_BTD, *arrays
        )

    def cross_entropy(self, logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(-log p(target), logsumexp of the logits), each [B, T]; the vocabulary may be split."""
        return head.cross_entropy(logits_BTV, targets_BT, self.mesh)

    # ---------------------------------------------------------------------------------- shared with decode.py
    def run(self, params: Params, tokens_BT, positions_BT, segments_BT=None, cache=None, length_B1=None):
        """Embedding, layers, last norm. Returns (hidden [B, T, D], router losses, cache or None).

        Args:
          cache: {"layers": a tuple of groups, "tail": ...} of what each layer's attention shall look back on (see
            Attention); its layers are traced one after the other. The returned one holds what they shall keep.
          length_B1: of the rows, where it is not that of their last position (see rope_tables).
        """
        ends, natural = self._ends(params), lambda x_BTD: x_BTD
        if cache is None and balances(self.cfg, tokens_BT.shape[1], self.dtype, self.mesh):
            assert self.mesh is not None
            positions_BT = jnp.broadcast_to(positions_BT, tokens_BT.shape)
            tokens_BT, positions_BT = balance.spread(tokens_BT, self.mesh), balance.spread(positions_BT, self.mesh)
            segments_BT = None if segments_BT is None else balance.spread(segments_BT, self.mesh)
            natural = functools.partial(balance.gathered, mesh=self.mesh)
        x_BTD = ends.encode(tokens_BT, positions_BT, self.dtype, self.mesh)
        real_BT = jnp.ones(tokens_BT.shape, bool) if segments_BT is None else segments_BT > 0
        index_BT = None if cache is None else positions_BT
        cfg = self.cfg
        scaled = local = None
        if cfg.positions == "rope":
            scaled = local = rope_tables(positions_BT, cfg.rotary_dim, cfg.rope_theta, cfg.rope_scaling, length_B1)
            if cfg.rope_local_theta and "W" in cfg.pattern:
                local = rope_tables(positions_BT, cfg.rotary_dim, cfg.rope_local_theta, schema.RopeScaling())
        if cache is not None:  # worked out once for all layers, not again wherever they are used
            scaled, local = jax.lax.optimization_barrier((scaled, local))
        count, body, tail = groups(cfg)
        rows = (scaled, local, segments_BT, real_BT)
        kept = isinstance(params["layers"], tuple) or cache is not None
        stages = 0 if kept else pipeline.microbatches(cfg, self.mesh, len(tokens_BT))
        if stages:
            assert self.mesh is not None
            pipeline.check(cfg, count, self.mesh)
            within = dataclasses.replace(self, mesh=pipeline.inside(self.mesh))
            part = functools.partial(within._layers, body)
            x_BTD, aux = pipeline.run(part, params["layers"], x_BTD, rows, self.mesh, stages, cfg.rounds)
            x_BTD, new = residual(x_BTD, self.mesh), {}
        elif kept or self.loops(count):
            run = self._group(body, prevent_cse=True)
            aux, out = jnp.zeros((), jnp.float32), []
            for i, weights in enumerate(unstack(params)["layers"]):
                here = None if cache is None else cache["layers"][i]
                x_BTD, a, kv = run(x_BTD, weights, rows, here, index_BT)
                aux += a
                out.append(kv)
            new = {"layers": tuple(out)}
        else:
            (x_BTD, aux), new = self._layers(body, params["layers"], x_BTD, rows), {}
        if tail:
            weights = jax.tree.map(lambda w: w[0], params["tail"])
            kv = None if cache is None else jax.tree.map(lambda c: c[0], cache["tail"])
            x_BTD, a, kv = self._group(tail, prevent_cse=True)(x_BTD, weights, rows, kv, index_BT)
            aux += a
            new["tail"] = jax.tree.map(lambda c: c[None], kv)
        return natural(ends.norm(x_BTD)), aux, None if cache is None else new

    def _layers(self, kinds: str, stack: Params, x_BTD, rows) -> tuple[jax.Array, jax.Array]:
        """Some groups of layers, their parameters stacked, by a scan: (x [B, T, D], router losses)."""
        run = self._group(kinds, prevent_cse=False)

        def step(carry, weights):
            x_BTD, a, _ = run(carry[0], weights, rows)
            return (x_BTD, carry[1] + a), None

        count = len(jax.tree.leaves(stack)[0])
        start = (x_BTD, jnp.zeros((), jnp.float32))
        return jax.lax.scan(step, start, stack, unroll=self._unroll(count))[0]

    def _group(self, kinds: str, prevent_cse: bool) -> Callable[..., Any]:
        """(x, weights, rows, cache=None, index=None) -> (x, router losses, cache or None) of one group of layers,
        rematerialised as the configuration says. rows: (tables, those of windowed layers, segments, which are real)."""
        cfg = self.cfg

        def run(x_BTD, weights, rows, cache=None, index_BT=None):
            scaled, local, segments_BT, real_BT = rows
            aux, out, weights = jnp.zeros((), jnp.float32), {}, dequantised(weights)
            for i, kind in enumerate(kinds):
                block = p.merge(_graph(cfg, kind), weights[str(i)])
                kept = None if cache is None else cache[str(i)]
                tables = local if kind == "W" else scaled
                x_BTD, a, out[str(i)] = block(x_BTD, tables, segments_BT, real_BT, self.mesh, kept, index_BT)
                aux += a
            return x_BTD, aux, None if cache is None else out

        if cfg.remat == "none":
            return run
        staged = self.mesh is not None and pipeline.WITHIN in self.mesh.axis_names
        policy = keeps_products(staged) if cfg.remat == "dots" else jax.checkpoint_policies.nothing_saveable
        return jax.checkpoint(run, policy=policy, prevent_cse=prevent_cse)

    def _ends(self, params: Params) -> Ends:
        ends = {k: v for k, v in params.items() if k not in ("layers", "tail")}
        return p.merge(_graph(self.cfg, "ends"), dequantised(ends))

    def loops(self, count: int) -> bool:
        """Whether so many layer groups are traced one after the other, not scanned."""
        return self._unroll(count) >= count

    def _unroll(self, count: int) -> int:
        if self.cfg.unroll:
            return min(self.cfg.unroll, count)
        if self.cfg.remat != "none" and platform(self.mesh) == "cpu":
            # Without a loop CPU's compiler sees that it has worked the same out before, and keeps that; so it does for
            # a single group, and for layers left over.
            return 1
        return count if count <= UNROLLED.get(platform(self.mesh), 0) else 1
