"""Generation with a cache equals the forward pass over the whole row."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmtrain import mesh as meshes
from lmtrain import schema
from lmtrain.models import decode, transformer
from lmtrain.models.transformer import Forward, resolve

V, S = 48, 40
KINDS = {
    "default": dict(),
    "gemma": dict(layers=3, norm="gemma", post_norm=True, pattern="WG", window=5, attn_softcap=5.0, logit_softcap=8.0),
    "moe": dict(experts=4, activation="swiglu", tied=False),
}


def tiny(**fields):
    base = dict(layers=2, width=32, heads=4, kv_heads=2, mlp=48, zero_init=False)
    return resolve(schema.Model(**base | fields), V)


@functools.cache
def fresh(cfg):
    rng = np.random.default_rng(0)  # no compile
    draw = lambda s: jnp.asarray(rng.normal(0.5 * (len(s.shape) < 3), 0.2, s.shape), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, transformer.shapes(cfg))


def full(cfg, params, tokens_BT):
    forward = Forward(cfg)
    return forward.logits(params, forward.hidden(params, {"tokens_BT": tokens_BT})[0])


CACHES = [("default", 1, False), ("default", 1, True), ("gemma", 0, None), ("gemma", 1, False), ("moe", 0, None)]


@pytest.mark.parametrize("kind, unroll, unstacked", CACHES)
def test_prefill_and_steps_equal_the_whole_row(kind, unroll, unstacked):
    cfg = tiny(**KINDS[kind], unroll=unroll)
    params = fresh(cfg)
    tokens = jax.random.randint(jax.random.key(1), (3, S), 0, V)
    lengths = jnp.array([4, 9, 1])
    expected = jax.jit(lambda p, t: full(cfg, p, t))(params, tokens)

    weights = transformer.unstack(params) if unstacked else params
    step = jax.jit(lambda w, t, c: decode.step(cfg, w, t, c), donate_argnums=2)
    prompt = jnp.where(jnp.arange(9) < lengths[:, None], tokens[:, :9], 0)  # what lies behind a prompt must not matter
    cache = decode.init_cache(cfg, 3, S, unstacked=unstacked)
    logits, cache = jax.jit(lambda w, c: decode.prefill(cfg, w, prompt, lengths, c))(weights, cache)
    rows = jnp.arange(3)
    for n in range(20):
        np.testing.assert_allclose(logits, expected[rows, lengths + n - 1], atol=3e-5)
        logits, cache = step(weights, tokens[rows, lengths + n], cache)
    assert (cache["length_B"] == lengths + 20).all()
    assert isinstance(cache["layers"], tuple) == (unstacked is True or unroll == 0)


def test_a_second_prefill_goes_on_behind_the_first():
    cfg = tiny()
    params = fresh(cfg)
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, V)
    read = jax.jit(lambda tokens, lengths, cache: decode.prefill(cfg, params, tokens, lengths, cache))
    _, cache = read(tokens[:, :6], jnp.array([3, 5]), decode.init_cache(cfg, 2, S))
    rest = jnp.stack([tokens[0, 3:10], tokens[1, 5:12]])
    logits, cache = read(rest, jnp.array([7, 2]), cache)
    expected = jax.jit(lambda t: full(cfg, params, t))(tokens)
    np.testing.assert_allclose(logits, jnp.stack([expected[0, 9], expected[1, 6]]), atol=3e-5)


@pytest.mark.parametrize(
    "sizes", [dict(tensor=2, expert=2), pytest.param(dict(context=2, fsdp=2), marks=pytest.mark.slow)]
)
def test_a_mesh_changes_nothing_even_where_it_does_not_divide_the_rows(sizes):
    cfg = tiny(**KINDS["moe"])
    mesh = meshes.make(schema.Mesh(**{**dict(data=-1), **sizes}))
    params = fresh(cfg)
    placed = jax.device_put(params, meshes.shardings(transformer.axes(cfg), mesh))
    tokens = jax.random.randint(jax.random.key(1), (4, 10), 0, V)
    for rows in (4, 3):

        def run(params, mesh, tokens=tokens[:rows]):
            cache = decode.init_cache(cfg, len(tokens), S, mesh=mesh)
            _, cache = decode.prefill(cfg, params, tokens, jnp.full(len(tokens), 10), cache, mesh=mesh)
            return decode.step(cfg, params, tokens[:, 0], cache, mesh=mesh)[0]

        expected = jax.jit(lambda p: run(p, None))(params)
        np.testing.assert_allclose(jax.jit(lambda p: run(p, mesh))(placed), expected, atol=3e-5)


def test_the_cache_is_of_the_activations_dtype():
    cfg = dataclasses.replace(tiny(), dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(decode.init_cache(cfg, 1, 8)["layers"])} == {jnp.dtype(jnp.bfloat16)}
