"""Norms, activations, and rotary positions against numbers worked out here, independently, in float64."""

import contextlib
import dataclasses
import io
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import print_saved_residuals

from lmtrain import schema
from lmtrain.models import layers, transformer
from lmtrain.schema import Model, RopeScaling

H, THETA, OLD = 64, 10000.0, 32


def wavelength(i):
    return 2 * math.pi * THETA ** (2 * i / H)


def llama3(i, factor=8.0, low=1.0, high=4.0):
    """As Meta's reference code states it, by wavelengths."""
    w = wavelength(i)
    if w < OLD / high:
        return 2 * math.pi / w
    if w > OLD / low:
        return 2 * math.pi / w / factor
    smooth = (OLD / w - low) / (high - low)
    return (1 - smooth) * 2 * math.pi / w / factor + smooth * 2 * math.pi / w


def yarn(i, factor=4.0, fast=32.0, slow=1.0):
    """The paper's gamma, over the dimensions that turn `fast` and `slow` times in the old length, rounded outwards."""
    at = lambda turns: H * math.log(OLD / (turns * 2 * math.pi)) / (2 * math.log(THETA))  # noqa: E731
    low, high = max(math.floor(at(fast)), 0), math.ceil(at(slow))
    gamma = min(max((i - low) / (high - low), 0.0), 1.0)  # 0: turns often, kept; 1: stretched
    plain = 2 * math.pi / wavelength(i)
    return plain * (1 - gamma) + plain / factor * gamma


@pytest.mark.parametrize(
    "scaling, expected, factor",
    [
        (RopeScaling(), lambda i: 2 * math.pi / wavelength(i), 1.0),
        (RopeScaling("linear", 4.0), lambda i: 2 * math.pi / wavelength(i) / 4, 1.0),
        (RopeScaling("llama3", 8.0, OLD), llama3, 1.0),
        (RopeScaling("yarn", 4.0, OLD), yarn, 0.1 * math.log(4) + 1),
        (RopeScaling("yarn", 4.0, OLD, attention_factor=1.25), yarn, 1.25),
    ],
)
def test_rope_frequencies(scaling, expected, factor):
    got, got_factor = layers.rope_frequencies(H, THETA, scaling)
    np.testing.assert_allclose(got, [expected(i) for i in range(H // 2)], rtol=1e-12)
    assert got_factor == pytest.approx(factor, rel=1e-12)


def test_rope_turns_each_pair_by_its_position_s_angle():
    x = np.random.default_rng(0).normal(size=(1, 5, 2, H))
    tables = layers.rope_tables(jnp.array([[0, 1, 7, 30, 200]]), H, THETA, RopeScaling())
    got = np.asarray(layers.rope(jnp.asarray(x, jnp.float32), tables), np.float64)
    for t, position in enumerate([0, 1, 7, 30, 200]):
        for i in range(H // 2):
            turned = (x[0, t, :, i] + 1j * x[0, t, :, i + H // 2]) * np.exp(1j * position * 2 * math.pi / wavelength(i))
            np.testing.assert_allclose(got[0, t, :, i] + 1j * got[0, t, :, i + H // 2], turned, atol=3e-5)


def test_rope_scores_depend_on_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, H))
    score = lambda a, b: (layers.rope(q, at(a)) * layers.rope(k, at(b))).sum()  # noqa: E731
    at = lambda t: layers.rope_tables(jnp.array([[t]]), H, THETA, RopeScaling())  # noqa: E731
    assert abs(score(3, 10) - score(53, 60)) < 1e-4
    assert abs(score(3, 10) - score(3, 20)) > 1e-2


def test_rmsnorm_and_gemma_s_scale_minus_one():
    x = np.random.default_rng(0).normal(size=(3, 8)) * 5
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    for kind, stored in (("rmsnorm", 1.5), ("gemma", 0.5)):
        norm = layers.Norm(Model(norm=kind), 8, True, nnx.Rngs(params=0))
        np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), expected, rtol=1e-5)  # fresh: a scale of 1
        norm.scale[...] = jnp.full(8, stored)
        np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), 1.5 * expected, rtol=1e-5)


def test_norm_computes_in_float32_and_returns_the_input_s_dtype():
    x = jnp.full((1, 4096), 300.0, jnp.bfloat16)  # the sum of squares would not fit float16, nor add up in bfloat16
    y = layers.Norm(Model(), 4096, False, nnx.Rngs(params=0))(x)
    assert y.dtype == jnp.bfloat16 and np.allclose(y, 1, atol=1e-2)


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "relu2", "gelu"])
def test_mlp_activations(activation):
    cfg = dataclasses.replace(Model(width=8, activation=activation, zero_init=False, mlp_bias=True))
    mlp = layers.MLP(cfg, 16, nnx.Rngs(params=0))
    for name in ("gate_bias", "up_bias", "down_bias"):
        if getattr(mlp, name) is not None:
            getattr(mlp, name)[...] = jnp.linspace(-1, 1, getattr(mlp, name).size)
    x = np.random.default_rng(0).normal(size=(1, 3, 8))
    get = lambda name: np.asarray(getattr(mlp, name)[...], np.float64)  # noqa: E731
    gelu = lambda h: 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))  # noqa: E731
    act = {
        "swiglu": lambda h: h / (1 + np.exp(-h)),
        "geglu": gelu,
        "relu2": lambda h: np.maximum(h, 0) ** 2,
        "gelu": gelu,
    }
    up = x @ get("up") + get("up_bias")
    gated = activation in ("swiglu", "geglu")
    hidden = act[activation](x @ get("gate") + get("gate_bias")) * up if gated else act[activation](up)
    expected = hidden @ get("down") + get("down_bias")
    np.testing.assert_allclose(mlp(jnp.asarray(x, jnp.float32), None), expected, atol=1e-5)


@pytest.mark.parametrize("leading", [(), (2,)])
def test_a_16_bit_product_widened_rounds_its_gradient_once_and_nothing_else(leading):
    """Forward in float32; both gradients are products of 16-bit matrices, right to a rounding of each operand."""
    rng = np.random.default_rng(0)
    x, w, g = (rng.normal(size=s).astype(np.float32) for s in ((*leading, 6, 32), (32, 48), (*leading, 6, 48)))
    x, w = jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16)
    out, pull = jax.vjp(layers.widened, x, w)
    x64, w64 = np.asarray(x, np.float64), np.asarray(w, np.float64)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, x64 @ w64, rtol=1e-5, atol=1e-4)
    dx, dw = pull(jnp.asarray(g))
    g64 = np.asarray(jnp.asarray(g, jnp.bfloat16), np.float64)
    rows = tuple(range(x.ndim - 1))
    for got, true in ((dx, g64 @ w64.T), (dw, np.tensordot(x64, g64, (rows, rows)))):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(got, np.float64), true, rtol=2**-7, atol=2**-7)
    products = [e for e in jax.make_jaxpr(pull)(jnp.asarray(g)).eqns if e.primitive.name == "dot_general"]
    assert len(products) == 2 and all(v.aval.dtype == jnp.bfloat16 for e in products for v in e.invars)


def test_dots_keep_what_a_fused_attention_gives():
    """Splash, interpreted: among what is kept for the backward pass is its result, once a layer."""
    cfg = transformer.resolve(
        schema.Model(layers=2, width=64, heads=2, mlp=64, unroll=2, remat="dots", attention="splash"), 64
    )
    batch = {"tokens_BT": np.zeros((2, 128), np.int32), "targets_BT": np.zeros((2, 128), np.int32)}
    params = transformer.init(cfg, jax.random.key(0))
    loss = lambda p: transformer.Forward(cfg).losses(p, batch).nll_BT.sum()  # noqa: E731
    with contextlib.redirect_stdout(said := io.StringIO()):
        print_saved_residuals(loss, params)
    kept = [line for line in said.getvalue().splitlines() if "splash" in line and "f32[2,2,128" in line]
    assert len(kept) == 2 * 2, said.getvalue()  # the result and its logsumexp
