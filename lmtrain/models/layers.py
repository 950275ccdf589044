"""The parts of a decoder layer that are not attention: norms, rotary positions, the MLP.

B rows, T positions, D width, N heads, H size of a head (h its half), F hidden width of the MLP
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lmtrain import schema
from lmtrain.mesh import constrain
from lmtrain.models import lora
from lmtrain.models.params import normal, ones, param, zeros

GATED = {"swiglu": jax.nn.silu, "geglu": lambda x: jax.nn.gelu(x, approximate=True)}
BY_LENGTH = ("dynamic", "longrope")  # kinds of RoPE scaling by which the length of a row changes all its positions
PLAIN = {"relu2": lambda x: jnp.square(jax.nn.relu(x)), "gelu": lambda x: jax.nn.gelu(x, approximate=True)}


# --------------------------------------------------------------------------------------------------------------- norm
class Norm(nnx.Module):
    """RMSNorm over the last dimension, in float32 (Zhang and Sennrich 2019). Gemma stores its scale as scale - 1.

    cfg.norm "layernorm" takes the mean off first and adds a bias (Ba et al. 2016).
    """

    def __init__(self, cfg: schema.Model, size: int, scale: bool, rngs: nnx.Rngs):
        self.offset, self.eps, self.centred = float(cfg.norm == "gemma"), cfg.norm_eps, cfg.norm == "layernorm"
        self.scale = param(rngs, (size,), ("norm",), zeros if self.offset else ones) if scale else None
        self.bias = param(rngs, (size,), ("norm",), zeros) if scale and self.centred else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        if self.centred:
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        if self.scale is not None:
            y = y * (self.scale[...] + self.offset)
        if self.bias is not None:
            y = y + self.bias[...]
        return y.astype(x.dtype)


# --------------------------------------------------------------------------------------------------- rotary positions
def rope_frequencies(size: int, theta: float, scaling: schema.RopeScaling) -> tuple[np.ndarray, float]:
    """Radians per position of each pair of dimensions, and the factor on their cosines and sines.

    Plain RoPE is theta ** (-2i / size) (Su et al. 2021). Scalings, all after Hugging Face's definitions:
    linear divides every frequency by the factor (Chen et al. 2023); llama3 divides only wavelengths longer than
    original_length / low_freq, leaves those shorter than original_length / high_freq, and blends between; yarn (Peng et
    al. 2023) blends by how often a dimension turns within original_length, and sharpens attention by its factor;
    longrope (Ding et al. 2024) divides each frequency by a number of its own; dynamic leaves rows of up to
    original_length alone. For longer rows, the last two have others: `long_frequencies`.

    Args:
      size: how many dimensions turn.

    Returns:
      (frequencies of shape [size // 2] in float64, attention factor)
    """
    freq = theta ** (-np.arange(0, size, 2, dtype=np.float64) / size)
    s = scaling
    if s.kind in ("none", "dynamic"):
        return freq, 1.0
    if s.kind == "linear":
        return freq / s.factor, 1.0
    if s.kind == "longrope":
        stretched = math.sqrt(1 + math.log(s.factor) / math.log(s.original_length)) if s.factor > 1 else 1.0
        return freq / np.asarray(s.short), s.attention_factor or stretched
    turns = s.original_length * freq / (2 * math.pi)  # within the length the model was trained on
    if s.kind == "llama3":
        keep = np.clip((turns - s.low_freq) / (s.high_freq - s.low_freq), 0, 1)
        return freq * keep + freq / s.factor * (1 - keep), 1.0

    def dimension(rotations: float) -> float:  # the pair that turns so often, as a real number
        return size * math.log(s.original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(s.beta_fast), dimension(s.beta_slow)
    low, high = (math.floor(low), math.ceil(high)) if s.truncate else (low, high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = np.clip((np.arange(size // 2) - low) / max(high - low, 0.001), 0, 1)
    factor = s.attention_factor or (0.1 * math.log(s.factor) + 1 if s.factor > 1 else 1.0)
    return freq * (1 - ramp) + freq / s.factor * ramp, factor


def long_frequencies(size: int, theta: float, scaling: schema.RopeScaling, length_B1: jax.Array) -> jax.Array:
    """Frequencies [B, 1, size // 2] in rows of length_B1 positions: dynamic turns slower the longer a row is (NTK-aware
    scaling by its length), longrope has one set of divisors for all rows past original_length."""
    i = jnp.arange(0, size, 2, dtype=jnp.float32) / size
    length_B11 = length_B1[..., None].astype(jnp.float32)
    s = scaling
    if s.kind == "longrope":
        divisors = jnp.where(length_B11 > s.original_length, jnp.asarray(s.long), jnp.asarray(s.short))
        return 1.0 / (divisors * theta**i)
    stretch_B11 = s.factor * jnp.maximum(length_B11 / s.original_length, 1.0) - (s.factor - 1)
    return (theta * stretch_B11 ** (size / (size - 2))) ** -i


def rope_tables(
    positions_BT: jax.Array, size: int, theta: float, scaling: schema.RopeScaling, length_B1: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """(cosines, sines) of the rotations, each float32 [B, T, 1, size // 2]; B may be 1 for all rows alike.

    Args:
      size: how many dimensions turn.
      length_B1: of each row (for dynamic and longrope); None: up to its last position.
    """
    freq_h, factor = rope_frequencies(size, theta, scaling)
    freq = jnp.asarray(freq_h, jnp.float32)
    if scaling.kind in BY_LENGTH:
        length_B1 = positions_BT.max(axis=-1, keepdims=True) + 1 if length_B1 is None else length_B1
        freq = long_frequencies(size, theta, scaling, length_B1)[:, :, None]
    angle_BT1h = positions_BT.astype(jnp.float32)[:, :, None, None] * freq
    return jnp.cos(angle_BT1h) * factor, jnp.sin(angle_BT1h) * factor


def rope(x_BTNH: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (i, i + R/2) of every head by its position's angles (the layout of Llama's HF weights).

    R, the dimensions that turn, are the first ones: twice as many as the tables have; the others stay.
    """
    cos, sin = (t.astype(x_BTNH.dtype) for t in tables)
    half = cos.shape[-1]
    a, b = x_BTNH[..., :half], x_BTNH[..., half : 2 * half]
    rest = [x_BTNH[..., 2 * half :]] if 2 * half < x_BTNH.shape[-1] else []
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, *rest], axis=-1)


# ---------------------------------------------------------------------------------------------------------------- MLP
def activate(cfg: schema.Model, gate: jax.Array | None, up: jax.Array) -> jax.Array:
    """The hidden layer of an MLP: act(gate) * up where the activation is gated, else act(up)."""
    return PLAIN[cfg.activation](up) if gate is None else GATED[cfg.activation](gate) * up


class MLP(nnx.Module):
    """up, (gate,) activation, down (Shazeer 2020)."""

    def __init__(self, cfg: schema.Model, hidden: int, rngs: nnx.Rngs, name: str = "mlp"):
        D, F = cfg.width, hidden
        self.cfg = cfg
        self.gate = param(rngs, (D, F), ("embed", "mlp"), normal(D**-0.5)) if cfg.activation in GATED else None
        self.up = param(rngs, (D, F), ("embed", "mlp"), normal(D**-0.5))
        self.down = param(rngs, (F, D), ("mlp", "embed"), zeros if cfg.zero_init else normal(F**-0.5))
        bias = cfg.mlp_bias
        self.gate_bias = param(rngs, (F,), ("mlp",), zeros) if bias and self.gate is not None else None
        self.up_bias = param(rngs, (F,), ("mlp",), zeros) if bias else None
        self.down_bias = param(rngs, (D,), ("norm",), zeros) if bias else None
        embed, wide = {"embed": D}, {"mlp": F}
        self.gate_lora = None if self.gate is None else lora.adapter(cfg, f"{name}/gate", rngs, embed, wide)
        self.up_lora = lora.adapter(cfg, f"{name}/up", rngs, embed, wide)
        self.down_lora = lora.adapter(cfg, f"{name}/down", rngs, wide, embed)

    def __call__(self, x_BTD: jax.Array, mesh: jax.sharding.Mesh | None) -> jax.Array:
        def linear(x, weight, bias, own):
            return project(self.cfg.lora, x, weight[...].astype(x.dtype), bias, own, mesh)

        gate_BTF = None if self.gate is None else linear(x_BTD, self.gate, self.gate_bias, self.gate_lora)
        hidden_BTF = activate(self.cfg, gate_BTF, linear(x_BTD, self.up, self.up_bias, self.up_lora))
        hidden_BTF = constrain(hidden_BTF, ("batch", "length", "act_mlp"), mesh)
        return linear(hidden_BTF, self.down, self.down_bias, self.down_lora)


def project(
    cfg: schema.Lora, x: jax.Array, w_DF: jax.Array, bias: nnx.Param | None, own: lora.Adapter | None,
    mesh: jax.sharding.Mesh | None,
) -> jax.Array:  # fmt: skip
    """x @ w, what its adapter adds, and bias, computed in x's dtype."""
    y = product(x, w_DF, mesh)
    y = y if own is None else lora.apply(cfg, y, x, w_DF, own)
    return y if bias is None else y + bias[...].astype(x.dtype)


def product(x_BTD: jax.Array, w_DF: jax.Array, mesh: jax.sharding.Mesh | None, widen: bool = False) -> jax.Array:
    """x @ w, [B, T, D] and [D, F] -> [B, T, F] (at least float32 where `widen`), as a product of two matrices.

    On a CPU, XLA takes nearly twice as long for the gradient of the three-dimensional product, which it transposes
    inside an elementwise loop. Positions that are split stay as they are: flattening would gather them.
    """
    multiply = widened if widen and x_BTD.dtype.itemsize == 2 else jnp.matmul
    if mesh is not None and mesh.shape["context"] * mesh.shape["tensor"] > 1:
        return multiply(x_BTD, w_DF)
    y = multiply(x_BTD.reshape(-1, x_BTD.shape[-1]), w_DF)
    return y.reshape(*x_BTD.shape[:-1], w_DF.shape[-1])


@jax.custom_vjp
def widened(x: jax.Array, w: jax.Array) -> jax.Array:
    """x @ w in float32 of 16-bit operands, whose gradient is rounded to their dtype before it is multiplied.

    By JAX's own rule those two products would be of float32 matrices: on a GPU (TF32) at half the speed, or less.
    """
    return jnp.matmul(x, w, preferred_element_type=jnp.float32)


def _widened_backward(operands, gradient):
    x, w = operands
    gradient = gradient.astype(x.dtype)
    rows = tuple(range(x.ndim - 1))
    return jnp.matmul(gradient, w.T), jnp.tensordot(x, gradient, (rows, rows))


widened.defvjp(lambda x, w: (widened(x, w), (x, w)), _widened_backward)
