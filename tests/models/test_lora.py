"""Adapters: nothing at first, a low-rank change later, and the same model once they are merged."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmtrain import engine, schema
from lmtrain import mesh as meshes
from lmtrain.engine import Sampling
from lmtrain.models import lora, transformer
from lmtrain.schema import ConfigError, Lora

V = 40
KINDS = {
    "dense": dict(activation="swiglu", tied=False, lora=Lora(4, matrices=("attn/*", "mlp/*", "head/kernel"))),
    "some": dict(qkv_bias=True, lora=Lora(3, alpha=5.0, matrices=("attn/[qv]",))),
    "rslora": dict(activation="swiglu", lora=Lora(4, rslora=True)),
    "dora": dict(activation="swiglu", tied=False, lora=Lora(4, dora=True, matrices=("*",))),
    "mixture": dict(experts=4, shared_experts=1, activation="swiglu", lora=Lora(2, dora=True)),
    "windows": dict(pattern="WG", window=5, layers=3, lora=Lora(2)),
}


def model(kind, **fields):
    base = dict(layers=2, width=32, heads=4, kv_heads=2, mlp=48, zero_init=False)
    return transformer.resolve(schema.Model(**base | KINDS[kind] | fields), V)


def parameters(cfg):
    rng = np.random.default_rng(0)
    draw = lambda s: rng.normal(0.3 * (len(s.shape) < 3), 0.3, s.shape)  # noqa: E731
    return jax.tree.map(lambda s: jnp.asarray(draw(s), jnp.float32), transformer.shapes(cfg))


def logits(cfg, params, mesh=None):
    tokens_BT = np.random.default_rng(1).integers(0, V, (2, 24))
    forward = transformer.Forward(cfg, mesh)
    return np.asarray(jax.jit(lambda p: forward.logits(p, forward.hidden(p, {"tokens_BT": tokens_BT})[0]))(params))


def names(tree):
    return {
        jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_adapters_change_nothing_and_merged_ones_are_the_model(kind):
    cfg = model(kind)
    fresh = transformer.init(cfg, jax.random.key(0))
    plain_cfg, plain = lora.merge(cfg, fresh)
    without = {n: x for n, x in names(fresh).items() if lora.SUFFIX not in n}
    assert names(plain).keys() == without.keys() and not plain_cfg.lora.rank
    for name, x in names(plain).items():
        np.testing.assert_allclose(x, without[name], rtol=1e-6, atol=1e-7)
    params = parameters(cfg)
    np.testing.assert_allclose(logits(*lora.merge(cfg, params)), logits(cfg, params), atol=2e-4)
    assert np.abs(logits(*lora.merge(cfg, fresh)) - logits(cfg, fresh)).max() < 2e-5
    moved = np.abs(logits(cfg, params) - logits(plain_cfg, {k: v for k, v in _without(params).items()})).max()
    assert moved > 0.1  # the adapters do something


def _without(tree):
    if not isinstance(tree, dict):
        return tree
    return {k: _without(v) for k, v in tree.items() if not k.endswith(lora.SUFFIX)}


def test_a_matrix_of_two_inputs_and_two_outputs_by_hand():
    """W + alpha / r A B of layer 0's output projection, in float64."""
    cfg = model("dense")
    params = parameters(cfg)
    attn = params["layers"]["0"]["attn"]
    w, a, b = (np.asarray(x[0], np.float64) for x in (attn["o"], attn["o_lora"]["a"], attn["o_lora"]["b"]))
    expected = w + 16.0 / 4 * np.einsum("NHr,rD->NHD", a, b)
    np.testing.assert_allclose(
        lora.merge(cfg, params)[1]["layers"]["0"]["attn"]["o"][0], expected, rtol=1e-5, atol=1e-6
    )


def test_dora_keeps_the_lengths_of_columns_where_its_gain_is_one():
    cfg = model("dora")
    params = parameters(cfg)
    up = params["layers"]["0"]["mlp"]
    up["up_lora"]["gain"] = jnp.ones_like(up["up_lora"]["gain"])
    merged = lora.merge(cfg, params)[1]["layers"]["0"]["mlp"]["up"]
    np.testing.assert_allclose(np.linalg.norm(merged, axis=1), np.linalg.norm(up["up"], axis=1), rtol=1e-5)
    assert np.abs(merged - up["up"]).max() > 0.1


@pytest.mark.parametrize("kind, sizes", [("dense", dict(fsdp=2, tensor=2, context=2)), ("dora", dict(tensor=4, data=2)),
                                         ("mixture", dict(expert=2, fsdp=4))])  # fmt: skip
def test_adapters_split_over_devices_are_those_of_one(kind, sizes):
    cfg = model(kind, kv_heads=4)
    params = parameters(cfg)
    mesh = meshes.make(schema.Mesh(**{"data": 1} | sizes))
    placed = jax.device_put(params, meshes.shardings(transformer.axes(cfg), mesh))
    tokens_BT = np.random.default_rng(1).integers(0, V, (8, 24))

    def run(params, mesh):
        forward = transformer.Forward(cfg, mesh)
        return jax.jit(lambda p: forward.logits(p, forward.hidden(p, {"tokens_BT": tokens_BT})[0]))(params)

    np.testing.assert_allclose(run(placed, mesh), run(params, None), atol=1e-4)


@pytest.mark.parametrize("kind", ["dense", "dora", "mixture"])
def test_generation_is_by_the_adapted_model(kind):
    cfg = model(kind)
    params = parameters(cfg)
    adapted = engine.generate(cfg, params, [[3, 1, 4]], Sampling(12, 0.0))[0]
    merged_cfg, merged = lora.merge(cfg, params)
    assert adapted.tokens == engine.generate(merged_cfg, merged, [[3, 1, 4]], Sampling(12, 0.0))[0].tokens
    plain = engine.generate(merged_cfg, _without(params), [[3, 1, 4]], Sampling(12, 0.0))[0]
    assert adapted.tokens != plain.tokens


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(lora=Lora(4, matrices=("atn/q",))), "'atn/q', which is the name of no matrix.*Did you mean attn/q?"),
        (dict(lora=Lora(4, matrices=("mlp/gate",))), "'mlp/gate', which is the name of no matrix"),
        (dict(lora=Lora(4, matrices=("head/kernel",))), "'head/kernel', which is the name of no matrix"),
        (dict(lora=Lora(4, matrices=())), "model.lora.matrices is empty"),
        (dict(lora=Lora(-1)), "model.lora.rank is -1"),
        (dict(lora=Lora(4, alpha=0.0)), "alpha 0.0"),
    ],
)
def test_adapters_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        transformer.resolve(schema.Model(**fields), V)


def test_the_gradient_of_a_frozen_matrix_is_never_worked_out():
    """The backward pass for adapters alone makes no matrix of W's size, so it counts fewer operations."""
    cfg = model("dense", width=128, mlp=512, heads=4, layers=1)
    params = parameters(cfg)
    tokens_BT = np.zeros((2, 64), np.int32)
    forward = transformer.Forward(cfg)

    def cost(trained):
        def loss(some):
            return forward.losses(_laid(params, some), {"tokens_BT": tokens_BT, "targets_BT": tokens_BT}).nll_BT.sum()

        return jax.jit(jax.grad(loss)).lower(trained).compile().cost_analysis()["flops"]

    adapters = {n: x for n, x in names(params).items() if lora.SUFFIX in n}
    everything = names(params)
    assert cost(adapters) < 0.8 * cost(everything)


def _laid(params, some):
    flat, structure = jax.tree_util.tree_flatten_with_path(params)
    return jax.tree.unflatten(
        structure, [some.get(jax.tree_util.keystr(p, simple=True, separator="/"), x) for p, x in flat]
    )


def test_a_stored_model_with_adapters_is_read_back():
    from lmtrain import origins

    cfg = model("dora")
    assert origins.stored_model({"model": dataclasses.asdict(cfg)}) == cfg


def test_doras_lengths_are_constants_in_experts_as_in_other_matrices():
    """The gradient of a merged matrix and of the two thin products is the same."""
    cfg = Lora(4, dora=True)
    rng = np.random.default_rng(0)
    x, w, a, b, gain = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((5, 16), (16, 12), (16, 4), (4, 12), 12))

    class Own:
        pass

    def thin(a, b, gain):
        own = Own()
        own.a, own.b, own.gain = a, b, gain
        return jnp.sin(lora.apply(cfg, x @ w, x, w, own)).sum()

    whole = lambda a, b, gain: jnp.sin(x @ lora.merged(cfg, w, a, b, gain, 1)).sum()  # noqa: E731
    for got, expected in zip(
        jax.grad(whole, (0, 1, 2))(a, b, gain), jax.grad(thin, (0, 1, 2))(a, b, gain), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-4)
