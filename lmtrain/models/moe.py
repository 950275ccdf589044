"""A mixture of experts without dropped tokens: every token reaches its top-k experts, however uneven the load.

    B rows, T positions, D width, E experts, k experts of a token, F hidden width of one expert
    M = B * T * k assignments of a token to an expert, W devices of the expert axis

Assignments are sorted by expert, and `jax.lax.ragged_dot` multiplies each run of rows with its expert's matrix (as in
MegaBlocks, Gale et al. 2022). Under a mesh the experts are split over the expert axis: each assignment's row travels to
the device that has its expert and back (an all-to-all of as many rows as there are, `exchange`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from lmtrain import schema
from lmtrain.mesh import batch_shards, platform, spec
from lmtrain.models import lora
from lmtrain.models.layers import GATED, MLP, activate
from lmtrain.models.params import normal, param, zeros
from lmtrain.models.pipeline import WITHIN


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
        return _experts(cfg, x_BTD, weight_BTk, expert_BTk, w, jax.lax.ragged_dot)

    dot = _one_by_one if WITHIN in mesh.axis_names else jax.lax.ragged_dot
    ways, tensor = mesh.shape["expert"], mesh.shape["tensor"]
    spread = tensor > 1 and T % (tensor * mesh.shape["context"]) == 0

    def local(x_BTD, weight_BTk, expert_BTk, *w):
        w = w if len(w) == 3 else (None, *w)
        if ways > 1:
            y_BTD = _travelling(cfg, x_BTD, weight_BTk, expert_BTk, w, dot, ways, ragged=platform(mesh) != "cpu")
        else:
            y_BTD = _experts(cfg, x_BTD, weight_BTk, expert_BTk, w, dot)
        if tensor == 1:
            return y_BTD
        # Each device holds a part of the hidden width.
        if spread:
            return jax.lax.psum_scatter(y_BTD, "tensor", scatter_dimension=1, tiled=True)
        return jax.lax.psum(y_BTD, "tensor")

    w = tuple(p for p in w if p is not None)
    tokens = spec(("batch", "length", None), mesh)
    into, out = spec(("experts", None, "mlp"), mesh), spec(("experts", "mlp", None), mesh)
    in_specs = (tokens, tokens, tokens) + (into,) * (len(w) - 1) + (out,)
    done = spec(("batch", "residual", None), mesh) if spread else tokens
    run = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=done, check_vma=False)
    return run(x_BTD, weight_BTk, expert_BTk, *w)


@jax.custom_batching.custom_vmap
def _one_by_one(rows_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """ragged_dot under the vmap over stages, of which a device has one: TPU's compiler knows none with a batch
    dimension. Only there, for without a vmap JAX has no gradient of this."""
    return jax.lax.ragged_dot(rows_MD, w_EDF, sizes_E)


@_one_by_one.def_vmap
def _lanes(count, batched, *args):  # type: ignore[no-untyped-def]
    lanes = [[a[i] if own else a for a, own in zip(args, batched, strict=True)] for i in range(count)]
    return jnp.stack([jax.lax.ragged_dot(*lane) for lane in lanes]), True


def _experts(cfg, x_BTD, weight_BTk, expert_BTk, w, dot) -> jax.Array:
    """The weighted sum of every token's experts, all of which are here."""
    B, T, D = x_BTD.shape
    k = cfg.experts_per_token
    out_MD = _each(cfg, x_BTD.reshape(-1, D), jnp.arange(B * T * k) // k, expert_BTk.reshape(-1), w, dot)
    return _weighted(out_MD, weight_BTk)


def _travelling(cfg, x_BTD, weight_BTk, expert_BTk, w, dot, ways: int, ragged: bool) -> jax.Array:
    """The same where each device of the expert axis has an equal part of the experts."""
    D, k, here = x_BTD.shape[-1], cfg.experts_per_token, cfg.experts // ways
    expert_M = expert_BTk.reshape(-1)
    M = len(expert_M)
    order_M = jnp.argsort(expert_M, stable=True)  # by expert, so by the device that has it
    rows_MD = x_BTD.reshape(-1, D)[order_M // k]
    counts_WE = jnp.bincount(expert_M, length=cfg.experts).astype(jnp.int32).reshape(ways, here)
    coming_WE = jax.lax.all_to_all(counts_WE, "expert", 0, 0, tiled=True)  # E of them for each of my experts
    sent_W, coming_W = counts_WE.sum(axis=1), coming_WE.sum(axis=1)
    rows_WMD = exchange(rows_MD, sent_W, coming_W, "expert", ragged)
    # The rows of a device come by expert: which one is at place m follows from how many. `here`: nothing lies there.
    expert_WM = (jnp.arange(M)[None, :, None] >= jnp.cumsum(coming_WE, axis=1)[:, None, :]).sum(axis=-1)
    out = _each(cfg, rows_WMD.reshape(-1, D), jnp.arange(ways * M), expert_WM.reshape(-1), w, dot)
    out_MD = exchange_back(out.reshape(ways, M, D), sent_W, coming_W, "expert", ragged)
    return _weighted(out_MD[_inverse(order_M)], weight_BTk)


def exchange(rows_MD: jax.Array, sent_W, coming_W, axis: str, ragged: bool) -> jax.Array:
    """All-to-all of unequal parts along a mesh axis of W devices, within shard_map.

    Args:
      rows_MD: those for device 0 first, then those for device 1, and so on.
      sent_W, coming_W: int32, how many go to each device and come from each.
      ragged: only these rows travel (TPU, GPU); else each part padded to M, as XLA has no ragged one on a CPU.

    Returns:
      [W, M, D]: from each device its rows, then zeros.
    """
    M, W = len(rows_MD), len(sent_W)
    first_W = jnp.cumsum(sent_W) - sent_W
    if ragged:
        out = jnp.zeros((W * M, *rows_MD.shape[1:]), rows_MD.dtype)
        # + 0 * sent: under the vmap over stages JAX's rule wants a batch of offsets, too.
        to_W = jax.lax.axis_index(axis) * M + 0 * sent_W
        out = jax.lax.ragged_all_to_all(rows_MD, out, first_W, sent_W, to_W, coming_W, axis_name=axis)
        return out.reshape(W, M, *rows_MD.shape[1:])
    place_M = jnp.arange(M)
    padded_WMD = rows_MD[jnp.minimum(first_W[:, None] + place_M, M - 1)]
    padded_WMD = jnp.where((place_M < sent_W[:, None])[..., None], padded_WMD, 0)
    return jax.lax.all_to_all(padded_WMD, axis, 0, 0, tiled=True)


def exchange_back(rows_WMD: jax.Array, sent_W, coming_W, axis: str, ragged: bool) -> jax.Array:
    """The way back of `exchange`, with its arguments: [W, M, D] -> rows [M, D] in the order that they were sent in."""
    W, M = rows_WMD.shape[:2]
    first_W = jnp.cumsum(sent_W) - sent_W
    if ragged:
        to_W = jax.lax.all_to_all(first_W, axis, 0, 0, tiled=True)  # where mine begin on each device
        from_W = jnp.arange(W, dtype=jnp.int32) * M + 0 * sent_W
        rows, out = rows_WMD.reshape(W * M, -1), jnp.zeros_like(rows_WMD[0])
        return jax.lax.ragged_all_to_all(rows, out, from_W, coming_W, to_W, sent_W, axis_name=axis)
    rows_WMD = jax.lax.all_to_all(rows_WMD, axis, 0, 0, tiled=True)
    device_M = (jnp.arange(M)[:, None] >= jnp.cumsum(sent_W)).sum(axis=-1)
    return rows_WMD[device_M, jnp.arange(M) - first_W[device_M]]


def _each(cfg, x_RD, pick_M, expert_M, w, dot) -> jax.Array:
    """x[pick] through its expert, row by row; 0 where `expert` is the number of those that are here."""
    gate, up, down = w
    here = up.shape[0]
    order_M = jnp.argsort(expert_M, stable=True)  # those of no expert here come last
    own_M1 = (expert_M < here)[order_M][:, None]
    sizes_E = jnp.bincount(expert_M, length=here).astype(jnp.int32)
    rows_MD = jnp.where(own_M1, x_RD[pick_M[order_M]], 0)
    gate_MF = None if gate is None else dot(rows_MD, gate, sizes_E)
    hidden_MF = activate(cfg, gate_MF, dot(rows_MD, up, sizes_E))
    # What ragged_dot leaves in rows past the last group is not defined: they are masked on the way in and out.
    hidden_MF = jnp.where(own_M1, hidden_MF, 0)
    out_MD = jnp.where(own_M1, dot(hidden_MF, down, sizes_E), 0)
    return out_MD[_inverse(order_M)]


def _inverse(order_M: jax.Array) -> jax.Array:
    """The inverse permutation: what was sorted comes back by a gather, where adding would be a scatter."""
    return jnp.zeros_like(order_M).at[order_M].set(jnp.arange(len(order_M)))


def _weighted(out_MD: jax.Array, weight_BTk: jax.Array) -> jax.Array:
    out_BTkD = out_MD.reshape(*weight_BTk.shape, -1)
    return (out_BTkD * weight_BTk[..., None].astype(out_MD.dtype)).sum(axis=2)
