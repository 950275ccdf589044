"""A mixture of experts without dropped tokens: every token reaches its top-k experts, however uneven the load.

    B rows, T positions, D width, E experts, k experts of a token, F hidden width of one expert
    M = B * T * k assignments of a token to an expert

Assignments are sorted by expert, and `jax.lax.ragged_dot` multiplies each run of rows with its expert's matrix (as in
MegaBlocks, Gale et al. 2022). Under a mesh the experts are split over the expert axis: its devices gather each other's
tokens, run the experts they own, and scatter the sums back.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from lmtrain import schema
from lmtrain.mesh import batch_shards, spec
from lmtrain.models import lora
from lmtrain.models.layers import GATED, MLP, activate
from lmtrain.models.params import normal, param, zeros


class MoE(nnx.Module):
    """Router, routed experts, and shared experts (one MLP of shared_experts times the width) for every token."""

    def __init__(self, cfg: schema.Model, rngs: nnx.Rngs):
        E, D, F = cfg.experts, cfg.width, cfg.expert_mlp
        self.cfg = cfg
        self.router = param(rngs, (D, E), ("embed", None), normal(D**-0.5))
        axes = ("experts", "embed", "mlp")
        self.gate = param(rngs, (E, D, F), axes, normal(D**-0.5)) if cfg.activation in GATED else None
        self.up = param(rngs, (E, D, F), axes, normal(D**-0.5))
        down = zeros if cfg.zero_init else normal(F**-0.5)
        self.down = param(rngs, (E, F, D), ("experts", "mlp", "embed"), down)
        self.shared = MLP(cfg, cfg.shared_experts * F, rngs, "mlp/shared") if cfg.shared_experts else None
        each, embed, wide = {"experts": E}, {"embed": D}, {"mlp": F}
        self.gate_lora = None if self.gate is None else lora.adapter(cfg, "mlp/gate", rngs, embed, wide, each)
        self.up_lora = lora.adapter(cfg, "mlp/up", rngs, embed, wide, each)
        self.down_lora = lora.adapter(cfg, "mlp/down", rngs, wide, embed, each)

    def __call__(self, x_BTD: jax.Array, real_BT: jax.Array, mesh: jax.sharding.Mesh | None):
        """Returns (output [B, T, D], router losses summed over real tokens, float32)."""
        logits_BTE = jnp.einsum("BTD,DE->BTE", x_BTD.astype(jnp.float32), self.router[...], precision="highest")
        weight_BTk, expert_BTk = route(self.cfg, logits_BTE)
        aux = router_losses(self.cfg, logits_BTE, expert_BTk, real_BT)
        pairs = ((self.gate, self.gate_lora), (self.up, self.up_lora), (self.down, self.down_lora))
        w = tuple(None if p is None else self._matrix(p, own).astype(x_BTD.dtype) for p, own in pairs)
        y_BTD = experts(self.cfg, x_BTD, weight_BTk, expert_BTk, w, mesh)
        return (y_BTD if self.shared is None else y_BTD + self.shared(x_BTD, mesh)), aux

    def _matrix(self, weight, own):
        if own is None:
            return weight[...]
        gain = None if own.gain is None else own.gain[...]
        return lora.merged(self.cfg.lora, weight[...], own.a[...], own.b[...], gain, 1)


def route(cfg: schema.Model, logits_BTE: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each token's k experts and their weights: the softmax over all experts, made to sum to 1 over the chosen ones
    where cfg.router_norm (Mixtral's softmax over the chosen logits is the same).

    Returns:
      (weights float32 [B, T, k], experts int32 [B, T, k])
    """
    weight_BTk, expert_BTk = jax.lax.top_k(jax.nn.softmax(logits_BTE, axis=-1), cfg.experts_per_token)
    if cfg.router_norm:
        weight_BTk = weight_BTk / weight_BTk.sum(axis=-1, keepdims=True)
    return weight_BTk, expert_BTk


def router_losses(cfg: schema.Model, logits_BTE: jax.Array, expert_BTk: jax.Array, real_BT: jax.Array) -> jax.Array:
    """Balance and z losses times their coefficients, summed over real tokens.

    The balance loss is that of every row (sequence-wise, DeepSeek-V3 eq. 17-20; Switch Transformer's for one row):
    sum over experts of (share of the row's assignments * E) * (mean router probability), 1 where balanced, times the
    row's tokens. Rows are independent, so sums over microbatches are exact. z is the mean squared logsumexp
    of the router's logits (ST-MoE eq. 5).
    """
    real_BT1 = real_BT.astype(jnp.float32)[:, :, None]
    tokens_B1 = jnp.maximum(real_BT1.sum(axis=1), 1)
    chosen_BTE = jax.nn.one_hot(expert_BTk, cfg.experts, dtype=jnp.float32).sum(axis=2)
    share_BE = (chosen_BTE * real_BT1).sum(axis=1) / (tokens_B1 * cfg.experts_per_token)
    prob_BE = (jax.nn.softmax(logits_BTE, axis=-1) * real_BT1).sum(axis=1)  # times the row's tokens
    balance = cfg.experts * (share_BE * prob_BE).sum()
    z = (jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1)) * real_BT1[:, :, 0]).sum()
    return cfg.router_balance * balance + cfg.router_z * z


def experts(cfg, x_BTD, weight_BTk, expert_BTk, w, mesh) -> jax.Array:
    """The routed experts' weighted sum for every token; w is (gate or None, up, down), each stacked over experts."""
    B, T, _ = x_BTD.shape
    if mesh is None or mesh.size == 1 or B % batch_shards(mesh) or T % mesh.shape["context"]:
        return _experts(cfg, x_BTD, weight_BTk, expert_BTk, w, first=0)

    ways = mesh.shape["expert"]

    def local(x_BTD, weight_BTk, expert_BTk, *w):
        if ways > 1:
            gather = lambda a: jax.lax.all_gather(a, "expert", axis=0, tiled=True)  # noqa: E731
            x_BTD, weight_BTk, expert_BTk = gather(x_BTD), gather(weight_BTk), gather(expert_BTk)
        first = jax.lax.axis_index("expert") * (cfg.experts // ways)
        y_BTD = _experts(cfg, x_BTD, weight_BTk, expert_BTk, w if len(w) == 3 else (None, *w), first)
        if mesh.shape["tensor"] > 1:  # each device holds a part of the hidden width
            y_BTD = jax.lax.psum(y_BTD, "tensor")
        return jax.lax.psum_scatter(y_BTD, "expert", scatter_dimension=0, tiled=True) if ways > 1 else y_BTD

    w = tuple(p for p in w if p is not None)
    tokens = spec(("batch", "length", None), mesh)
    into, out = spec(("experts", None, "mlp"), mesh), spec(("experts", "mlp", None), mesh)
    in_specs = (tokens, tokens, tokens) + (into,) * (len(w) - 1) + (out,)
    run = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=tokens, check_vma=False)
    return run(x_BTD, weight_BTk, expert_BTk, *w)


def _experts(cfg, x_BTD, weight_BTk, expert_BTk, w, first) -> jax.Array:
    """What the experts held here, numbered from `first`, add to each token. All M rows are kept, own ones in front."""
    gate, up, down = w
    B, T, D = x_BTD.shape
    k, here = cfg.experts_per_token, up.shape[0]
    expert_M = expert_BTk.reshape(-1) - first
    own_M = (expert_M >= 0) & (expert_M < here)
    expert_M = jnp.where(own_M, expert_M, here)  # the others' sort to the end
    order_M = jnp.argsort(expert_M, stable=True)
    own_M1 = own_M[order_M][:, None]
    sizes_E = jnp.bincount(expert_M, length=here).astype(jnp.int32)
    rows_MD = jnp.where(own_M1, x_BTD.reshape(-1, D)[order_M // k], 0)
    gate_MF = None if gate is None else jax.lax.ragged_dot(rows_MD, gate, sizes_E)
    hidden_MF = activate(cfg, gate_MF, jax.lax.ragged_dot(rows_MD, up, sizes_E))
    # What ragged_dot leaves in rows past the last group is not defined: they are masked on the way in and out.
    hidden_MF = jnp.where(own_M1, hidden_MF, 0)
    out_MD = jnp.where(own_M1, jax.lax.ragged_dot(hidden_MF, down, sizes_E), 0)
    out_MD = out_MD * weight_BTk.reshape(-1)[order_M][:, None].astype(out_MD.dtype)
    # Back to the tokens' order by the inverse permutation (a gather, where adding would be a scatter).
    back_M = jnp.zeros_like(order_M).at[order_M].set(jnp.arange(B * T * k))
    return out_MD[back_M].reshape(B, T, k, D).sum(axis=2)
