"""A mixture of experts drops no token, and its losses add up over rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lmtrain.models import moe, transformer
from lmtrain.schema import Model

B, T, D = 3, 10, 16


def config(**fields):
    base = dict(width=D, heads=2, layers=1, experts=5, experts_per_token=2, expert_mlp=24, zero_init=False)
    return transformer.resolve(Model(**base | fields), 32)


def layer(cfg):
    return moe.MoE(cfg, nnx.Rngs(params=1))


def dense_loop(cfg, m, x_BTD):
    """Every expert for every token, times the weight that a token gives it, which is 0 for all but its k."""
    logits = x_BTD @ m.router[...]
    prob = jax.nn.softmax(logits, -1)
    chosen = jax.nn.one_hot(jnp.argsort(-logits, -1)[..., : cfg.experts_per_token], cfg.experts).sum(-2)
    weight = prob * chosen
    if cfg.router_norm:
        weight = weight / weight.sum(-1, keepdims=True)
    y = 0
    for e in range(cfg.experts):
        hidden = x_BTD @ m.up[e]
        hidden = jnp.square(jax.nn.relu(hidden)) if m.gate is None else jax.nn.silu(x_BTD @ m.gate[e]) * hidden
        y += weight[..., e : e + 1] * (hidden @ m.down[e])
    return y if m.shared is None else y + m.shared(x_BTD, None)


@pytest.mark.parametrize(
    "fields",
    [
        {"activation": "swiglu"},
        {"activation": "relu2", "experts_per_token": 3, "router_norm": False},
        {"activation": "swiglu", "shared_experts": 2},
        {"experts_per_token": 1, "router_norm": False},
    ],
)
def test_dropless_equals_a_dense_loop_over_experts_with_its_gradients(fields):
    cfg = config(**fields)
    graph, state = nnx.split(layer(cfg))
    # A direction that all tokens share sends most of them to one expert: a capacity would drop some.
    x = jax.random.normal(jax.random.key(0), (B, T, D)) + 2.0
    real = jnp.ones((B, T), bool)

    def total(f):
        return lambda state, x: jnp.sin(f(nnx.merge(graph, state), x)).sum()

    got = jax.jit(jax.value_and_grad(total(lambda m, x: m(x, real, None)[0]), (0, 1)))(state, x)
    expected = jax.jit(jax.value_and_grad(total(lambda m, x: dense_loop(cfg, m, x)), (0, 1)))(state, x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5 * max(1, np.abs(b).max()))


def aux(cfg, x, real):
    """The losses alone, compiled once a shape."""
    return float(_aux(cfg, x, real))


@functools.partial(jax.jit, static_argnums=0)
def _aux(cfg, x, real):
    logits = x @ jnp.sin(jnp.arange(D * cfg.experts, dtype=jnp.float32)).reshape(D, -1)
    return moe.router_losses(cfg, logits, moe.route(cfg, logits)[1], real)


def test_router_losses_add_up_over_rows_and_ignore_padding():
    cfg = config()
    x = jax.random.normal(jax.random.key(0), (B, T, D))
    real = jnp.ones((B, T), bool).at[1, 6:].set(False)
    rows = sum(aux(cfg, x[i : i + 1], real[i : i + 1]) for i in range(B))
    assert aux(cfg, x, real) == pytest.approx(rows, rel=1e-5)
    assert aux(cfg, x.at[1, 6:].set(7.0), real) == pytest.approx(aux(cfg, x, real), rel=1e-6)
    assert aux(cfg, x, real) != pytest.approx(aux(cfg, x, jnp.ones((B, T), bool)), rel=1e-3)


def test_balance_loss_is_one_a_token_where_balanced_and_greater_where_not():
    cfg = config(experts=4, experts_per_token=1, router_balance=0.5, router_z=0.0)
    logits = jnp.tile(jnp.eye(4) * 1e-4, (1, 2, 1))  # 8 tokens, two for each expert, nearly even probabilities
    chosen = jnp.argmax(logits, -1)[..., None]
    real = jnp.ones((1, 8), bool)
    assert float(moe.router_losses(cfg, logits, chosen, real)) == pytest.approx(0.5 * 8, rel=1e-3)
    one = jnp.zeros_like(logits).at[..., 2].set(20.0)
    got = moe.router_losses(cfg, one, jnp.full((1, 8, 1), 2), real)
    assert float(got) == pytest.approx(0.5 * 8 * 4, rel=1e-3)


def test_z_loss_is_the_squared_logsumexp():
    cfg = config(router_balance=0.0, router_z=0.25)
    logits = jax.random.normal(jax.random.key(0), (B, T, 5)) * 3
    _, chosen = moe.route(cfg, logits)
    expected = 0.25 * (np.log(np.exp(np.asarray(logits, np.float64)).sum(-1)) ** 2).sum()
    got = moe.router_losses(cfg, logits, chosen, jnp.ones((B, T), bool))
    assert float(got) == pytest.approx(expected, rel=1e-5)
