"""Eight devices compute what one does, however the mesh splits the work."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmtrain import mesh as meshes
from lmtrain import schema
from lmtrain.models import attention, balance, head, moe, transformer
from lmtrain.plan.collectives import collectives

V, B, T = 64, 8, 32
DENSE = dict(pattern="WG", window=9, activation="swiglu", qkv_bias=True, kv_heads=4)
MOE = dict(experts=4, activation="swiglu", shared_experts=1, kv_heads=4, tied=False)


GPT2 = dict(positions="learned", max_positions=T, norm="layernorm", qk_norm=False, activation="gelu",
            qkv_bias=True, out_bias=True, mlp_bias=True)  # fmt: skip


def tiny(**fields):
    base = dict(layers=2, unroll=1, width=32, heads=8, mlp=64, zero_init=False)
    return transformer.resolve(schema.Model(**base | fields), V)


def batch(length=T):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, V, (B, length + 1)).astype(np.int32)
    segments = np.sort(rng.integers(1, 4, (B, length)).astype(np.int32), axis=1)
    segments[-1, -length // 4 :] = 0
    return {"tokens_BT": tokens[:, :-1], "targets_BT": tokens[:, 1:], "segments_BT": segments}


@functools.cache
def results(cfg, sizes, length=T):
    """(loss of every token, router losses, gradient) on a mesh of these sizes, or on one device."""
    mesh = meshes.make(schema.Mesh(**dict(sizes))) if sizes else None
    rng = np.random.default_rng(0)  # no compile
    params = jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(jnp.float32), transformer.shapes(cfg))
    rows = batch(length)
    if mesh is not None:
        meshes.check_shapes(transformer.shapes(cfg), transformer.axes(cfg), mesh)
        params = jax.device_put(params, meshes.shardings(transformer.axes(cfg), mesh))
        rows = meshes.put(rows, mesh)

    def loss(params, rows):
        losses = transformer.Forward(cfg, mesh).losses(params, rows)
        return (losses.nll_BT * jnp.cos(jnp.arange(length))).sum() + 10 * losses.aux, losses

    (_, losses), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, rows)
    return jax.tree.map(np.asarray, (losses, grad))


def assert_same(cfg, sizes, length=T):
    expected, got = results(cfg, (), length), results(cfg, tuple(sizes.items()), length)
    for e, g in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):  # 1e-6: the keys' bias moves nothing
        np.testing.assert_allclose(g, e, rtol=1e-4, atol=1e-4 * np.abs(e).max() + 1e-6)


@pytest.mark.parametrize(
    "sizes",
    [dict(data=8), dict(fsdp=8), dict(data=2, tensor=4), dict(context=8), dict(fsdp=2, tensor=2, context=2)],
    ids=str,
)
def test_dense(sizes):
    assert_same(tiny(**DENSE), sizes)


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(dict(data=8), marks=pytest.mark.slow),
        dict(data=2, expert=4),
        dict(fsdp=2, tensor=2, expert=2),
        dict(context=2, expert=4),
    ],
    ids=str,
)
def test_mixture_of_experts(sizes):
    assert_same(tiny(**MOE), sizes)


STAGES = [
    (dict(stage=4), {}),
    (dict(stage=2, data=2, fsdp=2), dict(microbatches=4)),
    (dict(stage=2), dict(rounds=2)),
    (dict(stage=4, tensor=2), dict(microbatches=8, rounds=2)),
    (dict(stage=2, fsdp=2, tensor=2), DENSE | dict(layers=9, microbatches=4, remat="dots")),
    (dict(stage=2, expert=4), MOE | dict(microbatches=2)),
    (dict(stage=2, expert=2, tensor=2), MOE | dict(rounds=2, layers=4)),
    (dict(stage=2, context=2, data=2), dict(remat="full", loss_chunk=24)),
    (dict(stage=2, fsdp=2, tensor=2), GPT2 | dict(layers=2)),
]
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("sizes", "fields"), [pytest.param(*case, marks=SLOW if i in (0, 2, 6) else ()) for i, case in enumerate(STAGES)],
    ids=str,
)  # fmt: skip
def test_stages(sizes, fields):
    assert_same(tiny(**dict(layers=8) | fields), sizes)


@SLOW
def test_adapters_and_layers_left_over_under_stages_differ_by_rounding_alone(monkeypatch):
    """An adapter's gradient is a small difference of large sums: in float32 its smallest entries part by more than 1e-4
    of themselves under any mesh. In float64 nothing is left of that."""
    monkeypatch.setattr(jnp, "float32", jnp.float64)
    cfg = tiny(layers=5, pattern="WG", window=9, lora=schema.Lora(2))
    with jax.enable_x64(True):
        expected, got = results(cfg, ()), results(cfg, (("stage", 2), ("fsdp", 2), ("tensor", 2)))
    for e, g in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        assert e.dtype == jnp.float64
        np.testing.assert_allclose(g, e, rtol=1e-8, atol=1e-12 * np.abs(e).max())


@pytest.mark.parametrize(
    "sizes", [dict(context=4, tensor=2), pytest.param(dict(fsdp=2, context=2, data=2), marks=pytest.mark.slow)], ids=str
)
def test_scanned_rematerialised_and_in_chunks(sizes):
    assert_same(tiny(layers=4, unroll=1, remat="full", loss_chunk=24), sizes)


@pytest.mark.parametrize(
    "sizes", [dict(data=2, tensor=2, context=2), pytest.param(dict(fsdp=8), marks=pytest.mark.slow)], ids=str
)
def test_splash(sizes):
    assert_same(tiny(layers=1, attention="splash", pattern="W", window=9), sizes, length=256)


@pytest.mark.parametrize("sizes", [dict(context=2, data=4), pytest.param(dict(context=4, fsdp=2), marks=SLOW)], ids=str)
def test_splash_with_queries_spread_evenly(sizes):
    length = 256 * sizes["context"]
    mesh = meshes.make(schema.Mesh(**sizes))
    for fields in (dict(pattern="W", window=200), {}):
        cfg = tiny(layers=1, attention="splash", **fields)
        assert attention.balances(cfg, length, jnp.float32, mesh)
        assert_same(cfg, sizes, length=length)


@pytest.mark.parametrize("ways", [2, 4, 8])
def test_every_device_of_the_context_axis_sees_as_much(ways):
    order = balance.order(16 * ways, ways)
    assert sorted(order) == list(range(16 * ways))
    assert len({part.sum() for part in order.reshape(ways, -1)}) == 1
    mesh = meshes.make(schema.Mesh(data=8 // ways, context=ways))
    x = np.random.default_rng(0).normal(size=(8, 16 * ways, 3))
    there = jax.jit(lambda x: balance.spread(x, mesh))(x)
    np.testing.assert_array_equal(there, x[:, order].astype(np.float32))
    np.testing.assert_array_equal(jax.jit(lambda x: balance.gathered(x, mesh))(there), x.astype(np.float32))


@pytest.mark.parametrize("sizes", [dict(expert=4, data=2), dict(stage=2, expert=2, data=2)], ids=str)
def test_the_exchange_of_a_tpu_or_gpu_is_traced_with_its_gradient(sizes, monkeypatch):
    """XLA has no ragged all-to-all on a CPU, so shapes alone are worked out, of what would be compiled."""
    monkeypatch.setattr(moe, "platform", lambda mesh: "tpu")
    cfg = tiny(**MOE, **(dict(microbatches=2) if "stage" in sizes else {}))
    mesh = meshes.make(schema.Mesh(**sizes))

    def loss(params, rows):
        return transformer.Forward(cfg, mesh).losses(params, rows).nll_BT.sum()

    text = jax.jit(jax.grad(loss)).trace(transformer.shapes(cfg), batch()).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("ragged_all_to_all") >= 4
    products = re.findall(r"#chlo.ragged_dot<(.*?)>", text)  # libtpu compiles none with a batch dimension
    assert len(products) >= 9 and not [dims for dims in products if "batching" in dims]


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_a_layer_keeps_in_stages_what_it_keeps_without(remat):
    """In each of the turns that stages take, 4 + 3 where 4 would do."""

    def kept(layers, rows, mesh):
        cfg = tiny(layers=layers, width=48, remat=remat)

        def back(params, tokens_BT):
            some = {"tokens_BT": tokens_BT, "targets_BT": tokens_BT, "segments_BT": tokens_BT}
            return jax.vjp(lambda params: transformer.Forward(cfg, mesh).losses(params, some).nll_BT, params)[1]

        tokens = jax.ShapeDtypeStruct((rows, T), jnp.int32)
        leaves = jax.tree.leaves(jax.eval_shape(back, transformer.shapes(cfg), tokens))
        assert not [x for x in leaves if x.dtype == bool and x.shape[-1:] == (cfg.width,)]  # masks of whole rows
        return sum(x.size * x.dtype.itemsize for x in leaves)

    def of_layers(mesh):  # and of their rows: neither weights nor logits
        return sum(sign * kept(layers, rows, mesh) for sign, layers, rows in
                   ((1, 16, 16), (-1, 16, 8), (-1, 8, 16), (1, 8, 8)))  # fmt: skip

    assert of_layers(meshes.make(schema.Mesh(stage=4, fsdp=2))) == 7 / 4 * of_layers(None)


def test_stages_on_gpus_are_lowered_without_cudnns_attention_which_is_refused_by_name(monkeypatch):
    """JAX lowers cuDNN's operations for one mesh a program; stages have two. None of this needs a GPU."""
    monkeypatch.setattr(attention, "platform", lambda mesh: "gpu")
    mesh = meshes.make(schema.Mesh(stage=2, fsdp=2, tensor=2))

    def lowered(name):
        cfg = tiny(layers=5, pattern="WG", window=9, width=64, attention=name, dtype="bfloat16")

        def loss(params, rows):
            return transformer.Forward(cfg, mesh).losses(params, rows).nll_BT.sum()

        return jax.jit(jax.grad(loss)).trace(transformer.shapes(cfg), batch()).lower(lowering_platforms=("cuda",))

    assert "cudnn" not in lowered("auto").as_text()
    with pytest.raises(schema.ConfigError, match="cudnn' takes mesh.stage=1, got 2; use 'auto'"):
        lowered("cudnn")


def test_a_shape_that_the_mesh_does_not_divide_is_refused_by_name():
    cfg = tiny(kv_heads=2)
    with pytest.raises(schema.ConfigError, match="mesh.tensor is 4.*kv_heads"):
        assert_same(cfg, dict(tensor=4, data=2))


def compiled(cfg, **sizes):
    """The text of the compiled loss and its gradient on a mesh, and the mesh."""
    mesh = meshes.make(schema.Mesh(**sizes))
    shapes = jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where),
                          transformer.shapes(cfg), meshes.shardings(transformer.axes(cfg), mesh))  # fmt: skip
    rows = {n: jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=meshes.sharding(("batch", "length"), mesh))
            for n in ("tokens_BT", "targets_BT")}  # fmt: skip

    def gradient(params, rows):
        grad = jax.grad(lambda p: transformer.Forward(cfg, mesh).losses(p, rows).nll_BT.sum())(params)
        return jax.lax.with_sharding_constraint(grad, meshes.shardings(transformer.axes(cfg), mesh))

    return jax.jit(gradient).lower(shapes, rows).compile().as_text()


@pytest.mark.parametrize("sizes", [dict(fsdp=8), dict(fsdp=2, tensor=2, context=2)], ids=str)
def test_the_embedding_and_its_gradient_are_never_whole_under_fsdp(sizes):
    mesh = meshes.make(schema.Mesh(**{"data": 1, **sizes}))
    table = jax.ShapeDtypeStruct((V, 32), jnp.float32, sharding=meshes.sharding(("vocab", "embed"), mesh))
    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=meshes.sharding(("batch", "length"), mesh))

    def gradient(table, tokens):
        grad = jax.grad(lambda t: (head.lookup(t, tokens, jnp.float32, mesh) ** 2).sum())(table)
        return jax.lax.with_sharding_constraint(grad, meshes.sharding(("vocab", "embed"), mesh))

    text = jax.jit(gradient).lower(table, tokens).compile().as_text()
    assert "all-to-all" in text and f"f32[{V},32]" not in text and f"f32[{V // mesh.shape['tensor']},32]" not in text


@pytest.mark.parametrize("tied", [True, False])
def test_chunks_of_logits_share_one_gathered_output_matrix(tied):
    mesh = meshes.make(schema.Mesh(fsdp=8))

    def gathered(chunk):  # bytes, of all turns of the loop
        found = collectives(compiled(tiny(tied=tied, loss_chunk=chunk), fsdp=8), mesh)
        return sum(c.bytes for c in found if c.kind == "all-gather")

    assert gathered(4) == gathered(T) > 32 * V * 4 * 7 / 8
