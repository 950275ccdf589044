"""Attention, one function a backend, all of one meaning: causal, within a document, within a window.

    B rows, T query positions, S key positions, N query heads, K key heads (G = N // K queries each), H size of a head

| backend   | where                | segments | window | soft cap                         |
| reference | anywhere             | yes      | yes    | yes                              |
| xla       | anywhere             | yes      | yes    | yes                              |
| splash    | TPU (CPU: interpreted) | yes    | yes    | yes                              |
| cudnn     | NVIDIA GPU, 16 bits  | yes      | yes    | refused                          |

Query t sees key s where s <= t, both carry the same segment number, and t - s < window (0: no window). A backend that
cannot honour a request raises ConfigError and names itself; none ignores it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lmtrain import schema
from lmtrain.mesh import constrain, platform, spec
from lmtrain.models import balance, lora
from lmtrain.models.layers import Norm, project, rope
from lmtrain.models.params import normal, param, zeros
from lmtrain.models.pipeline import WITHIN
from lmtrain.types import nearest

BACKENDS = ("reference", "xla", "cudnn", "splash")
KEPT = "attention"  # the name that rematerialisation knows splash's results by
HIDDEN = -1e30  # the score of a key that a query may not see: exp(HIDDEN - any score) is exactly 0


# ------------------------------------------------------------------------------------------------------ choose, attend
def choose(backend: str, platform: str, *, length: int = 128, head_dim: int = 64, softcap: float = 0.0,
           dtype=jnp.bfloat16, mesh: jax.sharding.Mesh | None = None) -> str:  # fmt: skip
    """The backend to use: the one asked for, or for "auto" the fastest of the platform that can do what is asked.

    Raises:
      ConfigError: for a name that is none of BACKENDS.
    """
    if backend == "auto":
        if platform == "tpu" and not splash_refuses(length, mesh):
            return "splash"
        if platform == "gpu" and not cudnn_refuses(platform, softcap, dtype, head_dim, mesh):
            return "cudnn"
        return "xla"
    if backend not in BACKENDS:
        hint = nearest(backend, (*BACKENDS, "auto"))
        raise schema.ConfigError(f"model.attention is {backend!r}; it takes auto, {', '.join(BACKENDS)}.{hint}")
    return backend


def attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *, segments_BT: jax.Array | None = None,
           window: int = 0, softcap: float = 0.0, scale: float = 0.0, backend: str = "auto",
           mesh: jax.sharding.Mesh | None = None, balanced: bool = False) -> jax.Array:  # fmt: skip
    """Attention output [B, T, N, H] in q's dtype.

    Args:
      segments_BT: int32 document of every position; None: a row is one document.
      window: keys a query sees, its own included; 0: all.
      softcap: scores become softcap * tanh(score / softcap); 0: left alone.
      scale: of the scores; 0: H ** -0.5.
      backend: a name of BACKENDS, or auto.
      balanced: positions lie in balance.order (`balances` says whether they may).

    Raises:
      ConfigError: where the backend cannot do what is asked.
    """
    B, T, N, H = q_BTNH.shape
    where = platform(mesh)
    backend = choose(backend, where, length=T, head_dim=H, softcap=softcap, dtype=q_BTNH.dtype, mesh=mesh)
    scale = scale or H**-0.5
    if backend == "reference":
        mask_BTS = visible(T, segments_BT, window)
        return reference(q_BTNH, k_BSKH, v_BSKH, mask_BTS, softcap, scale)
    if backend == "xla":
        return xla(q_BTNH, k_BSKH, v_BSKH, segments_BT, window, softcap, scale, mesh)
    if backend == "splash":
        return splash(q_BTNH, k_BSKH, v_BSKH, segments_BT, window, softcap, scale, mesh, balanced)
    return cudnn(q_BTNH, k_BSKH, v_BSKH, segments_BT, window, softcap, scale, mesh)


def balances(cfg: schema.Model, length: int, dtype, mesh: jax.sharding.Mesh | None) -> bool:
    """Whether rows of this length are spread over the context axis in balance.order: where a backend skips what the
    causal mask hides (splash), and two runs a device are whole blocks of it."""
    if mesh is None or mesh.shape["context"] == 1 or length % (256 * mesh.shape["context"]):
        return False
    how: Any = dict(length=length, head_dim=cfg.head_dim, softcap=cfg.attn_softcap, dtype=dtype, mesh=mesh)
    return choose(cfg.attention, platform(mesh), **how) == "splash"


def visible(T: int, segments_BT: jax.Array | None, window: int) -> jax.Array:
    """The mask [B or 1, T, S]: True where a query sees a key."""
    s_S = jnp.arange(T)
    t_BT1 = s_S[None, :, None]
    mask_BTS = s_S <= t_BT1
    if window:
        mask_BTS &= s_S > t_BT1 - window
    if segments_BT is not None:
        mask_BTS &= segments_BT[:, :, None] == segments_BT[:, None, :]
    return mask_BTS


# ----------------------------------------------------------------------------------------------------------- backends
def reference(q_BTNH, k_BSKH, v_BSKH, mask_BTS, softcap: float, scale: float) -> jax.Array:
    """Softmax attention in float32, the truth for every kernel. Rows of the mask without a True give 0."""
    G = q_BTNH.shape[2] // k_BSKH.shape[2]
    k_BSNH, v_BSNH = (jnp.repeat(x.astype(jnp.float32), G, axis=2) for x in (k_BSKH, v_BSKH))
    score_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH.astype(jnp.float32), k_BSNH, precision="highest") * scale
    if softcap:
        score_BNTS = softcap * jnp.tanh(score_BNTS / softcap)
    mask_B1TS = mask_BTS[:, None]
    score_BNTS = jnp.where(mask_B1TS, score_BNTS, -jnp.inf)
    top_BNT1 = jnp.max(score_BNTS, axis=-1, keepdims=True, initial=HIDDEN)
    weight_BNTS = jnp.exp(score_BNTS - jax.lax.stop_gradient(top_BNT1))
    total_BNT1 = weight_BNTS.sum(axis=-1, keepdims=True)
    weight_BNTS = weight_BNTS / jnp.where(total_BNT1 == 0, 1, total_BNT1)
    return jnp.einsum("BNTS,BSNH->BTNH", weight_BNTS, v_BSNH, precision="highest").astype(q_BTNH.dtype)


def xla(q_BTNH, k_BSKH, v_BSKH, segments_BT, window: int, softcap: float, scale: float, mesh) -> jax.Array:
    """Attention in plain XLA, in blocks of queries: a block looks only at keys that some query of it may see.

    So a causal row costs about half of its square, and a window only its band. Scores and softmax in float32.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    # One layout for both products, with the G queries of a key head side by side: batched matrix products.
    q_BKGTH = (q_BTNH * scale).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    mask_BTS = visible(T, segments_BT, window)

    def block(q_BKGtH, k_BKsH, v_BKsH, mask_Bts):
        score = jnp.einsum("BKGtH,BKsH->BKGts", q_BKGtH, k_BKsH, preferred_element_type=jnp.float32)
        if softcap:
            score = softcap * jnp.tanh(score / softcap)
        weight = jax.nn.softmax(jnp.where(mask_Bts[:, None, None], score, HIDDEN), axis=-1).astype(v_BKsH.dtype)
        return jnp.einsum("BKGts,BKsH->BKGtH", weight, v_BKsH)

    size = _query_block(T, mesh is not None and mesh.shape["context"] > 1)
    if T // size > 16:
        block = jax.checkpoint(block)  # long rows: never keep all T x S weights for the backward pass
    out = []
    for start in range(0, T, size):
        end = min(start + size, T)
        first = max(0, start - window + 1) if window and size < T else 0
        keys = slice(first, end)
        out.append(block(q_BKGTH[:, :, :, start:end], k_BKSH[:, :, keys], v_BKSH[:, :, keys],
                         mask_BTS[:, start:end, keys]))  # fmt: skip
    out_BKGTH = out[0] if len(out) == 1 else jnp.concatenate(out, axis=3)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _query_block(T: int, whole: bool) -> int:
    """Queries of one block of `xla`: the row where slicing it is no gain, else 128, or a 32nd of a very long row."""
    return T if whole or T <= 128 else max(128, -(-T // 32))


def keeps(primitive, *_, **params) -> bool:
    """A policy of jax.checkpoint: keep what a fused kernel gives, which would have to run again as a whole."""
    fused = primitive.name.startswith("dot_product_attention_fwd")  # cuDNN's
    return fused or (primitive.name == "name" and params["name"] == KEPT)


def keeps_products(staged: bool) -> Callable[..., bool]:
    """A policy of jax.checkpoint: keep products with weights too. Those have no batch dimension; where layers are in
    stages, whose vmap gives every product one more, they have that."""

    def policy(primitive, *_, **params) -> bool:
        product = primitive.name == "dot_general" and len(params["dimension_numbers"][1][0]) <= staged
        return product or keeps(primitive, **params)

    return policy


def splash_refuses(length: int, mesh: jax.sharding.Mesh | None) -> str:
    """Why splash cannot run rows of this length; "" where it can."""
    ways = 1 if mesh is None else mesh.shape["context"]
    if length % (128 * ways):
        return f"rows in multiples of {128 * ways} (128 for each mesh.context), got {length}"
    return ""


def splash(q_BTNH, k_BSKH, v_BSKH, segments_BT, window: int, softcap: float, scale: float, mesh,
           balanced: bool = False) -> jax.Array:  # fmt: skip
    """TPU's Splash attention (jax.experimental.pallas), local to each device: only blocks the mask leaves are visited.

    The context axis splits the queries, evenly by what they see (balance.py); keys and values are gathered. Off a TPU
    the kernel is interpreted: slow, and meant for tests.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    B, T, N, H = q_BTNH.shape
    if why := splash_refuses(T, mesh):
        raise schema.ConfigError(f"model.attention='splash' takes {why}; use 'xla', or another data.row_length.")
    ways = 1 if mesh is None else mesh.shape["context"]
    heads = N if mesh is None else N // mesh.shape["tensor"]
    mask = kernels.LocalMask((T, T), (window - 1, 0), 0) if window else kernels.CausalMask((T, T))
    size = next(s for s in (512, 256, 128) if (T // ways // (2 if balanced else 1)) % s == 0)
    back_S = None
    if balanced:  # the queries lie in another order; the keys, once gathered, are put into that of the text
        mask.q_sequence = balance.order(T, ways)
        back_S = np.argsort(mask.q_sequence)
    blocks = kernels.BlockSizes(
        block_q=size, block_kv=size, block_kv_compute=size, block_q_dkv=size, block_kv_dkv=size,
        block_kv_dkv_compute=size, block_q_dq=size, block_kv_dq=size)  # fmt: skip
    kernel = kernels.make_splash_mha(
        kernels.MultiHeadMask([mask] * heads), block_sizes=blocks, head_shards=1, q_seq_shards=ways,
        attn_logits_soft_cap=softcap or None, residual_checkpoint_name=KEPT,
        interpret=platform(mesh) != "tpu")  # fmt: skip
    if segments_BT is None:
        segments_BT = jnp.ones((B, T), jnp.int32)

    def local(kernel, q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS):
        if back_S is not None:
            k_BSKH, v_BSKH, segments_BS = (x[:, back_S] for x in (k_BSKH, v_BSKH, segments_BS))
        q_BNTH, k_BKSH, v_BKSH = (x.transpose(0, 2, 1, 3) for x in (q_BTNH * scale, k_BSKH, v_BSKH))
        out_BNTH = jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH, kernels.SegmentIds(segments_BT, segments_BS))
        return out_BNTH.transpose(0, 2, 1, 3).astype(q_BTNH.dtype)

    args = (q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BT)
    if mesh is None or mesh.size == 1:
        return local(kernel, *args)
    q_spec = spec(("batch", "length", "act_heads", "head_dim"), mesh)
    kv_spec = spec(("batch", "kv_length", "act_kv_heads", "head_dim"), mesh)
    kernel_spec = kernel.manual_sharding_spec(jax.sharding.NamedSharding(mesh, spec((None, "length"), mesh)))
    segment_specs = (spec(("batch", "length"), mesh), spec(("batch", "kv_length"), mesh))
    in_specs = (kernel_spec, q_spec, kv_spec, kv_spec, *segment_specs)
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=q_spec, check_vma=False)(kernel, *args)


def cudnn_refuses(platform: str, softcap: float, dtype, head_dim: int, mesh: jax.sharding.Mesh | None) -> str:
    """Why cuDNN's fused attention cannot do this; "" where it can."""
    if platform != "gpu":
        return f"an NVIDIA GPU, this is a {platform}"
    if softcap:
        return f"no model.attn_softcap, got {softcap}"
    if jnp.dtype(dtype).itemsize != 2:
        return f"model.dtype bfloat16 or float16, got {jnp.dtype(dtype).name}"
    if head_dim % 8 or head_dim > 128:
        return f"model.head_dim in multiples of 8 up to 128, got {head_dim}"
    if mesh is not None and mesh.shape["context"] > 1:
        return f"mesh.context=1, got {mesh.shape['context']}"
    # JAX compiles cuDNN's operations only where a program has one mesh, and a stage's layers see another (pipeline.py).
    if mesh is not None and (stages := mesh.shape.get("stage", mesh.shape.get(WITHIN, 1))) > 1:
        return f"mesh.stage=1, got {stages}"
    return ""


def cudnn(q_BTNH, k_BSKH, v_BSKH, segments_BT, window: int, softcap: float, scale: float, mesh) -> jax.Array:
    """cuDNN's fused attention, local to each device. Segments go in as an explicit mask beside the causal one."""
    if why := cudnn_refuses(platform(mesh), softcap, q_BTNH.dtype, q_BTNH.shape[3], mesh):
        raise schema.ConfigError(f"model.attention='cudnn' takes {why}; use 'auto' or 'xla'.")

    def local(q_BTNH, k_BSKH, v_BSKH, *segments):
        mask_B1TS = (segments[0][:, None, :, None] == segments[0][:, None, None, :]) if segments else None
        return jax.nn.dot_product_attention(
            q_BTNH, k_BSKH, v_BSKH, mask=mask_B1TS, is_causal=True, scale=scale, implementation="cudnn",
            local_window_size=(window - 1, 0) if window else None)  # fmt: skip

    args = (q_BTNH, k_BSKH, v_BSKH) + (() if segments_BT is None else (segments_BT,))
    if mesh is None or mesh.size == 1:
        return local(*args)
    heads = spec(("batch", None, "act_heads", None), mesh)
    kv_heads = spec(("batch", None, "act_kv_heads", None), mesh)
    in_specs = (heads, kv_heads, kv_heads) + (() if segments_BT is None else (spec(("batch", None), mesh),))
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=heads, check_vma=False)(*args)


# ----------------------------------------------------------------------------------------------------------- decoding
def recall(q_B1NH, k_B1KH, v_B1KH, cache, index_B1, *, window: int, softcap: float, scale: float):
    """Attention of one new position a row over all that the row holds. Returns (output [B, 1, N, H], the new part).

    Keys and values lie in two parts. The old one, [B, K, S, H], is read only. The new one, [B, K, R, H], holds the
    positions that steps since have added, at the same place for every row: a slice is written, where places of their
    own would take a loop over the rows (a scatter), and the old part would be carried through every step.

    Args:
      cache: {"k", "v": the old part, whose place s is position s; "new_k", "new_v": the new part; "at": int32, the
        place of this call in it, so that its place r is position index - at + r}.
      index_B1: the position of each query.
    """
    B, _, N, H = q_B1NH.shape
    K, at = k_B1KH.shape[2], cache["at"]

    def add(new_BKRH, x_B1KH):
        return jax.lax.dynamic_update_slice_in_dim(new_BKRH, x_B1KH.transpose(0, 2, 1, 3).astype(new_BKRH.dtype), at, 2)

    new_k_BKRH, new_v_BKRH = add(cache["new_k"], k_B1KH), add(cache["new_v"], v_B1KH)
    q_BKGH = (q_B1NH * (scale or H**-0.5)).reshape(B, K, N // K, H)
    S, R = cache["k"].shape[2], new_k_BKRH.shape[2]
    s_S, r_R = jnp.arange(S), jnp.arange(R)
    old_BS, new_BR = s_S < index_B1 - at, jnp.broadcast_to(r_R <= at, (B, R))
    if window:
        old_BS, new_BR = old_BS & (s_S > index_B1 - window), new_BR & (r_R > at - window)
    seen_BA = jnp.concatenate([old_BS, new_BR], axis=1)  # A: all places, S + R

    def score(k_BKSH):
        return jnp.einsum("BKGH,BKSH->BKGS", q_BKGH, k_BKSH, preferred_element_type=jnp.float32)

    def gather(weight_BKGS, v_BKSH):
        weight_BKGS = weight_BKGS.astype(v_BKSH.dtype)
        return jnp.einsum("BKGS,BKSH->BKGH", weight_BKGS, v_BKSH, preferred_element_type=jnp.float32)

    score_BKGA = jnp.concatenate([score(cache["k"]), score(new_k_BKRH)], axis=-1)
    if softcap:
        score_BKGA = softcap * jnp.tanh(score_BKGA / softcap)
    score_BKGA = jnp.where(seen_BA[:, None, None], score_BKGA, HIDDEN)
    weight_BKGA = jnp.exp(score_BKGA - score_BKGA.max(axis=-1, keepdims=True))
    out_BKGH = gather(weight_BKGA[..., :S], cache["v"]) + gather(weight_BKGA[..., S:], new_v_BKRH)
    out_BKGH = out_BKGH / weight_BKGA.sum(axis=-1, keepdims=True)
    return out_BKGH.reshape(B, 1, N, H).astype(q_B1NH.dtype), {"k": new_k_BKRH, "v": new_v_BKRH}


# ---------------------------------------------------------------------------------------------------------- the layer
class Attention(nnx.Module):
    """Projections, QK-norm, rotary positions, attention, output projection. `window` 0: a global layer."""

    def __init__(self, cfg: schema.Model, window: int, rngs: nnx.Rngs):
        D, N, K, H = cfg.width, cfg.heads, cfg.kv_heads, cfg.head_dim
        self.cfg, self.window = cfg, window
        self.q = param(rngs, (D, N, H), ("embed", "heads", "head_dim"), normal(D**-0.5))
        self.k = param(rngs, (D, K, H), ("embed", "kv_heads", "head_dim"), normal(D**-0.5))
        self.v = param(rngs, (D, K, H), ("embed", "kv_heads", "head_dim"), normal(D**-0.5))
        out = zeros if cfg.zero_init else normal((N * H) ** -0.5)
        self.o = param(rngs, (N, H, D), ("heads", "head_dim", "embed"), out)
        # Biases are flat, so that whoever tells matrices from vectors by their dimensions is right.
        self.q_bias = param(rngs, (N * H,), ("heads",), zeros) if cfg.qkv_bias else None
        self.k_bias = param(rngs, (K * H,), ("kv_heads",), zeros) if cfg.qkv_bias else None
        self.v_bias = param(rngs, (K * H,), ("kv_heads",), zeros) if cfg.qkv_bias else None
        self.o_bias = param(rngs, (D,), ("norm",), zeros) if cfg.out_bias else None
        embed, heads, kv = {"embed": D}, {"heads": N, "head_dim": H}, {"kv_heads": K, "head_dim": H}
        self.q_lora = lora.adapter(cfg, "attn/q", rngs, embed, heads)
        self.k_lora = lora.adapter(cfg, "attn/k", rngs, embed, kv)
        self.v_lora = lora.adapter(cfg, "attn/v", rngs, embed, kv)
        self.o_lora = lora.adapter(cfg, "attn/o", rngs, heads, embed)
        every = cfg.qk_norm_over == "all"
        self.q_norm = Norm(cfg, N * H if every else H, cfg.qk_norm_scale, rngs) if cfg.qk_norm else None
        self.k_norm = Norm(cfg, K * H if every else H, cfg.qk_norm_scale, rngs) if cfg.qk_norm else None

    def __call__(self, x_BTD, tables, segments_BT, mesh, cache=None, index_BT=None):
        """Returns (output [B, T, D], what a cache shall keep of this call, or None).

        Args:
          tables: cosines and sines for this kind of layer; None: nothing turns.
          cache: None: nothing is kept. {}: the rows are whole prompts, whose keys and values are kept, {"k", "v"} of
            [B, K, T, H]. Else T is 1, and the call looks back on it: see `recall`.
          index_BT: the position of each query; read by `recall` alone.
        """
        cfg = self.cfg
        q = self._heads(x_BTD, self.q, self.q_bias, self.q_lora, mesh)
        k = self._heads(x_BTD, self.k, self.k_bias, self.k_lora, mesh)
        v_BTKH = self._heads(x_BTD, self.v, self.v_bias, self.v_lora, mesh)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = _normed(self.q_norm, q, cfg.qk_norm_over), _normed(self.k_norm, k, cfg.qk_norm_over)
        if tables is not None:
            q, k = rope(q, tables), rope(k, tables)
        q_BTNH = constrain(q, ("batch", "length", "act_heads", "head_dim"), mesh)
        kv_axes = ("batch", "kv_length", "act_kv_heads", "head_dim")
        k_BTKH, v_BTKH = constrain(k, kv_axes, mesh), constrain(v_BTKH, kv_axes, mesh)
        how: Any = dict(window=self.window, softcap=cfg.attn_softcap, scale=cfg.attn_scale)
        if cache:
            out_BTNH, kept = recall(q_BTNH, k_BTKH, v_BTKH, cache, index_BT, **how)
        else:
            how |= dict(balanced=cache is None and balances(cfg, x_BTD.shape[1], x_BTD.dtype, mesh))
            out_BTNH = attend(q_BTNH, k_BTKH, v_BTKH, segments_BT=segments_BT, backend=cfg.attention, mesh=mesh, **how)
            kept = None if cache is None else {"k": k_BTKH.transpose(0, 2, 1, 3), "v": v_BTKH.transpose(0, 2, 1, 3)}
        out_BTNH = constrain(out_BTNH, ("batch", "length", "act_heads", "head_dim"), mesh)
        o_ED = self.o[...].astype(x_BTD.dtype).reshape(-1, cfg.width)  # E: all heads, end to end
        y_BTD = project(cfg.lora, out_BTNH.reshape(*x_BTD.shape[:2], -1), o_ED, self.o_bias, self.o_lora, mesh)
        return y_BTD, kept

    def _heads(self, x_BTD, weight, bias, own, mesh) -> jax.Array:
        """x @ weight as [B, T, heads, H]; weight is [D, heads, H], bias [heads * H] or None."""
        w_DNH = weight[...].astype(x_BTD.dtype)
        y = project(self.cfg.lora, x_BTD, w_DNH.reshape(w_DNH.shape[0], -1), bias, own, mesh)
        return y.reshape(*y.shape[:2], *w_DNH.shape[1:])


def _normed(norm: Norm, x_BTNH: jax.Array, over: str) -> jax.Array:
    """Each head's vector normed, or (over "all") all heads' end to end as one."""
    return norm(x_BTNH) if over == "head" else norm(x_BTNH.reshape(*x_BTNH.shape[:2], -1)).reshape(x_BTNH.shape)
