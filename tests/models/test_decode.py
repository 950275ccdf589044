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

V, S, NEW = 48, 40, 4
KINDS = {
    "default": dict(),
    "gemma": dict(layers=3, norm="gemma", post_norm=True, pattern="WG", window=5, attn_softcap=5.0, logit_softcap=8.0,
                  embed_scale=True, rope_local_theta=100.0),
    "moe": dict(experts=4, activation="swiglu", tied=False, scalar_head=True),
    "biases": dict(kv_heads=4, qkv_bias=True, out_bias=True, mlp_bias=True, qk_norm=False, activation="gelu"),
}  # fmt: skip


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
    return jax.jit(lambda p: forward.logits(p, forward.hidden(p, {"tokens_BT": tokens_BT})[0]))(params)


@jax.jit
def start(model, prompt_BT):
    kept = decode.read(model, prompt_BT, jnp.full(len(prompt_BT), prompt_BT.shape[1]))
    return decode.place(decode.empty(model, len(prompt_BT), S), kept, jnp.arange(len(prompt_BT)), model.mesh)


step = jax.jit(decode.step)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_and_then_steps_equal_the_whole_row(kind):
    cfg = tiny(**KINDS[kind])
    params = fresh(cfg)
    tokens = jax.random.randint(jax.random.key(1), (3, S), 0, V)
    lengths = jnp.array([4, 9, 1])
    rows = jnp.arange(3)
    expected = full(cfg, params, tokens)

    model = decode.prepare(cfg, params)
    prompt = jnp.where(jnp.arange(9) < lengths[:, None], tokens[:, :9], 0)  # what lies behind a prompt must not matter
    cache = start(model, prompt)
    for n in range(2 * NEW + 3):
        if n % NEW == 0:
            cache = decode.keep(cache, new, lengths + n - NEW) if n else cache  # noqa: F821
            new = decode.empty(model, 3, NEW)
        logits, new = step(model, tokens[rows, lengths + n], lengths + n, cache, new, jnp.int32(n % NEW))
        np.testing.assert_allclose(logits, expected[rows, lengths + n], atol=3e-5)


def test_rows_can_be_taken_placed_and_given_more_room():
    cfg = tiny(**KINDS["gemma"])
    params = fresh(cfg)
    model = decode.prepare(cfg, params)
    tokens = jax.random.randint(jax.random.key(1), (3, 12), 0, V)
    expected = full(cfg, params, tokens)[:, 8]
    cache = start(model, tokens[:, :8])
    cache = decode.resize(cache, np.array([2, 0]), 10)
    kept = jax.jit(decode.read)(model, tokens[1:2], jnp.full(1, tokens.shape[1]))  # more than there are places, below
    cache = decode.place(cache, kept, np.array([-1, 0]))  # row 0 stays the third prompt, row 1 becomes the second
    new = decode.empty(model, 2, 1)
    logits, _ = step(model, tokens[np.array([2, 1]), 8], jnp.array([8, 8]), cache, new, jnp.int32(0))
    np.testing.assert_allclose(logits, expected[np.array([2, 1])], atol=3e-5)
    assert jax.tree.leaves(cache["layers"])[0].shape == (2, 2, 10, 8)
    wider = decode.resize(cache, np.array([1]), 20)
    again, _ = step(model, tokens[1:2, 8], jnp.array([8]), wider, decode.empty(model, 1, 1), jnp.int32(0))
    np.testing.assert_allclose(again, expected[1:2], atol=3e-5)


def test_parameters_laid_out_once_are_not_copied_again():
    cfg = tiny(**KINDS["gemma"], tied=False)
    params = fresh(cfg)
    once = decode.prepare(cfg, params)
    twice = decode.prepare(cfg, once.params)
    same = lambda a, b: a.unsafe_buffer_pointer() == b.unsafe_buffer_pointer()  # noqa: E731
    assert jax.tree.all(jax.tree.map(same, once.params, twice.params))
    assert same(params["embed"]["table"], once.params["embed"]["table"])
    assert same(params["head"]["kernel"], once.params["head"]["kernel"])


def test_weights_are_kept_in_the_dtype_of_their_products():
    cfg = dataclasses.replace(tiny(**KINDS["moe"]), dtype="bfloat16")
    params = fresh(dataclasses.replace(cfg, dtype="auto"))
    tokens = jax.random.randint(jax.random.key(1), (2, 8), 0, V)
    model = decode.prepare(cfg, params)
    cache = start(model, tokens[:, :7])
    logits, _ = step(model, tokens[:, 7], jnp.array([7, 7]), cache, decode.empty(model, 2, 1), jnp.int32(0))
    np.testing.assert_allclose(logits, full(cfg, params, tokens)[:, -1], atol=0.02)  # bfloat16 rounds elsewhere
    assert {x.dtype for x in jax.tree.leaves(cache)} == {jnp.dtype(jnp.bfloat16)}
    layer = model.params["layers"][0]["0"]
    assert layer["attn"]["q"].dtype == layer["mlp"]["up"].dtype == model.params["embed"]["table"].dtype == jnp.bfloat16
    assert layer["mlp"]["router"].dtype == layer["attn_norm"]["scale"].dtype == jnp.float32


@pytest.mark.parametrize("sizes", [dict(tensor=2, expert=2), dict(fsdp=8), dict(context=2, fsdp=2), dict(stage=2)])
def test_a_mesh_changes_nothing(sizes):
    cfg = tiny(**KINDS["moe"])
    mesh = meshes.make(schema.Mesh(**{**dict(data=-1), **sizes}))
    params = fresh(cfg)
    placed = jax.device_put(params, meshes.shardings(transformer.axes(cfg), mesh))
    tokens = jax.random.randint(jax.random.key(1), (8, 12), 0, V)
    expected = full(cfg, params, tokens)
    model = decode.prepare(cfg, placed, mesh)
    lengths = jnp.full(8, 9)
    cache = start(model, tokens[:, :9])
    new = decode.empty(model, 8, 1)
    _, new = step(model, tokens[:, 9], lengths, cache, new, jnp.int32(0))
    cache = jax.jit(lambda c, n: decode.keep(c, n, lengths, mesh))(cache, new)
    logits, _ = step(model, tokens[:, 10], lengths + 1, cache, new, jnp.int32(0))
    np.testing.assert_allclose(logits, expected[:, 10], atol=3e-5)


def test_prompts_that_the_mesh_does_not_divide_are_read_too():
    cfg = tiny(**KINDS["moe"])
    params = fresh(cfg)
    mesh = meshes.make(schema.Mesh(fsdp=4, data=-1))
    placed = jax.device_put(params, meshes.shardings(transformer.axes(cfg), mesh))
    tokens = jax.random.randint(jax.random.key(1), (3, 10), 0, V)
    length = jnp.full(len(tokens), tokens.shape[1])
    kept = jax.jit(decode.read)(decode.prepare(cfg, placed, mesh), tokens, length)
    expected = jax.jit(decode.read)(decode.prepare(cfg, params), tokens, length)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=3e-5), kept, expected)
