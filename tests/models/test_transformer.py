"""Properties of the whole decoder: who influences whom; and how it is computed does not change what it computes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmtrain import mesh as meshes
from lmtrain import optim
from lmtrain.models import transformer
from lmtrain.models.shapes import groups
from lmtrain.models.transformer import Forward, resolve
from lmtrain.schema import ConfigError, Mesh, Model, RopeScaling

V = 64
GEMMA = dict(norm="gemma", post_norm=True, activation="geglu", pattern="WG", window=5, rope_local_theta=100.0,
             attn_softcap=20.0, logit_softcap=10.0, embed_scale=True)  # fmt: skip
KINDS = {
    "default": {},
    "llama": dict(activation="swiglu", qk_norm=False, tied=False, rope_scaling=RopeScaling("llama3", 8.0, 16)),
    "gemma": GEMMA,
    "moe": dict(experts=4, activation="swiglu", shared_experts=1),
    "gpt2": dict(norm="layernorm", positions="learned", max_positions=64, activation="gelu", qk_norm=False,
                 qkv_bias=True, out_bias=True, mlp_bias=True),
    "olmo2": dict(pre_norm=False, post_norm=True, qk_norm_over="all", activation="swiglu", rotary=0.5),
    "biases": dict(qkv_bias=True, out_bias=True, mlp_bias=True, embed_norm=True, norm_scale=False, qk_norm_scale=False),
}  # fmt: skip


def tiny(vocab=V, **fields):
    base = dict(layers=2, width=32, heads=4, kv_heads=2, mlp=48, zero_init=False)
    return resolve(Model(**base | fields), vocab)


@functools.cache
def parameters(cfg):
    """Random parameters, scales and biases among them, so that zeros and ones hide nothing. From NumPy: no compile."""
    rng = np.random.default_rng(0)
    draw = lambda s: rng.normal(0.3 * (len(s.shape) < 3), 0.3, s.shape)  # noqa: E731
    return jax.tree.map(lambda s: jnp.asarray(draw(s), jnp.float32), transformer.shapes(cfg))


def rows(B, T, vocab=V, seed=0):
    tokens = np.random.default_rng(seed).integers(0, vocab, (B, T + 1)).astype(np.int32)
    return {"tokens_BT": tokens[:, :-1], "targets_BT": tokens[:, 1:]}


def assert_close(a, b, tol):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=tol * max(1.0, float(np.abs(y).max())))


def loss_and_grad(cfg, batch, mesh=None):
    def loss(params):
        losses = Forward(cfg, mesh).losses(params, batch)
        weight = jnp.sin(jnp.arange(losses.nll_BT.size, dtype=jnp.float32)).reshape(losses.nll_BT.shape)
        return (losses.nll_BT * weight).sum() + 0.1 * losses.lse_BT.sum() + losses.aux

    return jax.jit(jax.value_and_grad(loss))(parameters(cfg))


# ------------------------------------------------------------------------------------------------- who sees whom
@pytest.mark.parametrize("attention, kind", [("reference", "gemma"), ("xla", "gemma"), ("xla", "moe")])
def test_a_position_sees_neither_its_future_nor_another_document(kind, attention):
    """Every position has a token of its own and the output matrix is apart, so rows of the embedding's gradient are
    positions. Position 20 of documents 0-11, 12-27, 28-31 sees 12 to 20 and nothing else, to the last bit."""
    T = 32
    cfg = tiny(vocab=T, attention=attention, **KINDS[kind] | {"tied": False})
    batch = {"tokens_BT": jnp.arange(T)[None], "targets_BT": jnp.arange(T)[None] // 2}
    batch["segments_BT"] = jnp.repeat(jnp.array([[1, 2, 3]]), jnp.array([12, 16, 4]), axis=1, total_repeat_length=T)
    loss = lambda p: Forward(cfg).losses(p, batch).nll_BT[0, 20]  # noqa: E731
    grad = np.asarray(jax.jit(jax.grad(loss))(parameters(cfg))["embed"]["table"])
    touched = np.abs(grad).max(axis=1) > 0
    assert touched.tolist() == [12 <= t <= 20 for t in range(T)]


def test_the_router_s_losses_are_no_leak_between_rows():
    """The balance loss of one row has no gradient on another's tokens."""
    cfg = tiny(vocab=32, tied=False, **KINDS["moe"])
    batch = {"tokens_BT": jnp.arange(32).reshape(2, 16)}
    one = {"tokens_BT": batch["tokens_BT"][:1]}
    params = parameters(cfg)
    aux = jax.jit(lambda b: Forward(cfg).hidden(params, b)[1])
    other = {"tokens_BT": batch["tokens_BT"][1:]}
    assert float(aux(batch)) == pytest.approx(float(aux(one) + aux(other)), rel=1e-5)


PACKED = [("reference", "default"), ("xla", "gemma"), ("xla", "moe"), ("splash", "default")]
PACKED_SLOW = [("reference", "gemma"), ("reference", "moe"), ("xla", "default"), ("splash", "gemma"), ("splash", "moe")]


@pytest.mark.parametrize("attention, kind", [*PACKED, *(pytest.param(*c, marks=pytest.mark.slow) for c in PACKED_SLOW)])
def test_packed_documents_have_the_log_probabilities_they_have_alone(kind, attention):
    T, lengths = 128, [50, 7, 40]
    cfg = tiny(attention=attention, layers=2, **KINDS[kind])
    documents = [rows(1, n, seed=n) for n in lengths]
    batch = {k: np.zeros((1, T), np.int32) for k in ("tokens_BT", "targets_BT", "segments_BT", "positions_BT")}
    at = np.cumsum([0, *lengths])
    alone = {k: np.zeros((len(lengths), T), np.int32) for k in ("tokens_BT", "targets_BT")}
    for i, (d, n) in enumerate(zip(documents, lengths, strict=True)):
        for k in ("tokens_BT", "targets_BT"):
            batch[k][0, at[i] : at[i] + n] = d[k][0]
            alone[k][i, :n] = d[k][0]
        batch["segments_BT"][0, at[i] : at[i] + n] = i + 1
        batch["positions_BT"][0, at[i] : at[i] + n] = np.arange(n)
    params = parameters(cfg)
    logps = jax.jit(lambda b: Forward(cfg).logps(params, b))
    packed, single = logps(batch), logps(alone)
    for i, n in enumerate(lengths):
        np.testing.assert_allclose(packed[0, at[i] : at[i] + n], single[i, :n], atol=1e-5)
    assert np.isfinite(packed).all()  # padding, too
    if kind == "default":  # and the test can fail: without segments the second document is another
        leaky = logps({k: v for k, v in batch.items() if k != "segments_BT"})
        assert np.abs(leaky[0, at[1] : at[2]] - single[1, : lengths[1]]).max() > 1e-2


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.slow] * (k in ("llama", "default"))) for k in KINDS]
)
def test_a_scan_equals_the_loop(kind):
    cfg = tiny(unroll=1, **KINDS[kind] | ({"layers": 5} if kind == "gemma" else {}))  # two groups and a layer left over
    batch = rows(2, 24)
    assert_close(loss_and_grad(cfg, batch), loss_and_grad(dataclasses.replace(cfg, unroll=5), batch), 2e-5)


def test_layers_run_in_the_pattern_s_order():
    cfg = tiny(layers=5, pattern="WWG", window=1)
    assert groups(cfg) == (1, "WWG", "WW")
    assert groups(tiny(layers=7, pattern="WWG", window=3)) == (2, "WWG", "W")
    assert groups(tiny(layers=2, pattern="WWG", window=3)) == (1, "WW", "")
    assert groups(tiny(layers=4, pattern="GG")) == (4, "G", "")
    params = parameters(cfg)
    assert set(params["layers"]) == {"0", "1", "2"} and set(params["tail"]) == {"0", "1"}
    params = jax.tree.map(lambda x: x, params)  # the cached one stays as it is
    # With a window of 1 in every W layer, information moves between positions in the G layer alone.
    hidden = jax.jit(lambda p, t: Forward(cfg).hidden(p, {"tokens_BT": t})[0])
    a, b = jnp.array([[1, 2, 3]]), jnp.array([[9, 2, 3]])
    assert jnp.abs(hidden(params, a) - hidden(params, b))[0, 2].max() > 1e-3
    params["layers"]["2"]["attn"]["o"] = params["layers"]["2"]["attn"]["o"] * 0
    assert jnp.abs(hidden(params, a) - hidden(params, b))[0, 2].max() == 0


@pytest.mark.parametrize("remat, unroll", [("dots", 1), ("full", 2)])
def test_remat_changes_nothing(remat, unroll):
    cfg = tiny(layers=5, pattern="WG", window=5, unroll=unroll)  # WG WG, W left over
    batch = rows(2, 24)
    assert_close(loss_and_grad(dataclasses.replace(cfg, remat=remat), batch), loss_and_grad(cfg, batch), 1e-5)


@pytest.mark.parametrize("remat", ["dots", "full"])
@pytest.mark.parametrize("unroll", [1, 3])
def test_the_layers_left_over_are_rematerialised_too(remat, unroll):
    cfg = tiny(layers=5, pattern="WG", window=5, unroll=unroll, remat=remat)
    forward = functools.partial(Forward(cfg).hidden, batch=rows(2, 24))
    trace = jax.make_jaxpr(forward)(transformer.shapes(cfg))
    assert "dot_general" not in {e.primitive.name for e in trace.eqns}  # every product is inside a scan or a remat


def test_remat_trades_memory_in_the_order_none_dots_full():
    need = {}
    for remat in ("none", "dots", "full"):
        cfg = tiny(layers=8, unroll=0, remat=remat, attention="reference")
        f = jax.jit(jax.grad(lambda p, c=cfg: Forward(c).hidden(p, rows(4, 64))[0].sum()))
        need[remat] = f.lower(transformer.shapes(cfg)).compile().memory_analysis().temp_size_in_bytes
    assert need["full"] < 0.8 * need["dots"] < 0.8 * 0.8 * need["none"]


@pytest.mark.parametrize("chunk, tied", [(1, True), (14, False), (33, True)])
def test_cross_entropy_in_chunks_equals_the_whole_with_its_gradient(chunk, tied):
    cfg = tiny(layers=1, tied=tied, logit_softcap=5.0, loss_chunk=1 << 20)
    batch = rows(2, 23)
    assert_close(loss_and_grad(dataclasses.replace(cfg, loss_chunk=chunk), batch), loss_and_grad(cfg, batch), 1e-5)


@pytest.mark.parametrize("entropy", [False, True])
def test_no_more_logits_than_a_chunk_exist(entropy):
    """What the compiled gradient needs falls with the chunk: whole logits would be 2 * 512 * 4096 floats = 16 MiB."""
    cfg = tiny(vocab=4096, layers=1, loss_chunk=1 << 20)
    batch = rows(2, 512, 4096)

    def temporary(chunk):
        forward = Forward(dataclasses.replace(cfg, loss_chunk=chunk))

        def loss(params):
            out = forward.losses(params, batch, entropy=entropy)
            return out.nll_BT.sum() - (out.entropy_BT.sum() if entropy else 0)

        f = jax.jit(jax.grad(loss))
        return f.lower(transformer.shapes(cfg)).compile().memory_analysis().temp_size_in_bytes

    assert temporary(128) < temporary(1 << 20) - (12 << 20)


def test_entropy_and_temperature_are_those_of_the_logits():
    cfg = tiny(logit_softcap=3.0)
    batch, forward, params = rows(2, 10), Forward(cfg), parameters(cfg)
    hidden, _ = jax.jit(forward.hidden)(params, batch)
    logits = np.asarray(forward.logits(params, hidden), np.float64) / 0.6  # behind the soft cap
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    got = jax.jit(lambda p: forward.losses(p, batch, 0.6, entropy=True, uniform=True))(params)
    np.testing.assert_allclose(got.entropy_BT, -(np.exp(logp) * logp).sum(-1), atol=1e-5)
    np.testing.assert_allclose(got.uniform_BT, -logp.mean(-1), atol=1e-5)
    expected = np.take_along_axis(logp, batch["targets_BT"][..., None], -1)[..., 0]
    np.testing.assert_allclose(got.nll_BT, -expected, atol=1e-5)
    np.testing.assert_allclose(jax.jit(lambda p: forward.logps(p, batch, 0.6))(params), expected, atol=1e-5)
    np.testing.assert_array_equal(got.hidden_BTD, hidden)
    assert got.entropy_BT.dtype == got.uniform_BT.dtype == jnp.float32
    plain = jax.jit(forward.losses)(params, batch)
    assert plain.entropy_BT is None and plain.uniform_BT is None


SPREAD = dict(layers=1, unroll=1, kv_heads=4, tied=False, scalar_head=True)


def everything(cfg, batch, mesh=None):
    """All that objectives ask for, of every position, and the gradient of a sum of it."""

    def loss(params, batch):
        forward = Forward(cfg, mesh)
        out = forward.losses(params, batch, 0.7, entropy=True, uniform=True)
        each = (out.nll_BT, out.entropy_BT, out.uniform_BT, forward.scalar(params, out.hidden_BTD))
        weight_T = jnp.sin(1.0 + jnp.arange(out.nll_BT.shape[1]))
        return sum(c * (x * weight_T).sum() for c, x in zip((1, 2, 3, 4), each, strict=True)), each

    params = parameters(cfg)
    if mesh is not None:
        params = jax.device_put(params, meshes.shardings(transformer.axes(cfg), mesh))
        batch = meshes.put(batch, mesh)
    return jax.jit(jax.grad(loss, has_aux=True))(params, batch)


def test_entropy_and_scalars_in_chunks_equal_the_whole_with_their_gradients():
    cfg = tiny(**SPREAD)
    assert_close(everything(dataclasses.replace(cfg, loss_chunk=14), rows(2, 23)), everything(cfg, rows(2, 23)), 1e-5)


@pytest.mark.parametrize("sizes", [dict(data=2, tensor=4), dict(fsdp=2, tensor=2, context=2)], ids=str)
def test_entropy_and_scalars_are_the_same_on_eight_devices(sizes):
    cfg = tiny(**SPREAD, loss_chunk=20)
    assert_close(everything(cfg, rows(4, 24), meshes.make(Mesh(**sizes))), everything(cfg, rows(4, 24)), 1e-5)


def test_a_split_vocabulary_stays_split_for_its_entropy():
    cfg, mesh = tiny(**SPREAD, vocab=8 * 31), meshes.make(Mesh(data=1, tensor=8))
    cfg = dataclasses.replace(cfg, heads=8, kv_heads=8, head_dim=4)
    params = jax.tree.map(
        lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where),
        transformer.shapes(cfg), meshes.shardings(transformer.axes(cfg), mesh),
    )  # fmt: skip
    batch = meshes.put(rows(2, 24, 8 * 31), mesh)
    f = jax.jit(lambda p, b: Forward(cfg, mesh).losses(p, b, 0.7, entropy=True, uniform=True))
    assert f",{8 * 31}]" not in f.lower(params, batch).compile().as_text()


def test_logits_are_mapped_a_chunk_at_a_time_beside_other_arrays():
    cfg = tiny(layers=1, loss_chunk=8)
    params, forward, batch = parameters(cfg), Forward(cfg), rows(2, 13)
    extra_BTF = np.random.default_rng(0).normal(size=(2, 13, 3)).astype(np.float32)
    seen = []

    def f(logits_BCV, extra_BCF):
        seen.append(logits_BCV.shape)
        return {"a": logits_BCV.max(-1), "b": extra_BCF.sum(-1)}

    hidden, _ = forward.hidden(params, batch)
    got = forward.map_logits(params, f, hidden, extra_BTF)
    np.testing.assert_allclose(got["a"], forward.logits(params, hidden).max(-1), atol=1e-5)
    np.testing.assert_allclose(got["b"], extra_BTF.sum(-1), atol=1e-6)
    assert set(seen) == {(2, 4, V)}


# ------------------------------------------------------------------------------------------------- scalar head
def test_a_scalar_head_starts_at_zero_and_changes_nothing_else():
    cfg, plain = tiny(layers=1, tied=False, scalar_head=True), tiny(layers=1, tied=False)
    draw = lambda c: jax.jit(functools.partial(transformer.init, c))(jax.random.key(0))  # noqa: E731
    params, without = draw(cfg), draw(plain)
    scalar = params.pop("scalar")
    assert jax.tree.map(jnp.shape, scalar) == {"kernel": (32,), "bias": (1,)}
    jax.tree.map(np.testing.assert_array_equal, params, without)
    params["scalar"] = scalar
    hidden = jax.random.normal(jax.random.key(1), (2, 5, 32), jnp.bfloat16)
    zero = Forward(cfg).scalar(params, hidden)
    assert (zero == 0).all() and zero.dtype == jnp.float32 and zero.shape == (2, 5)
    params["scalar"] = {"kernel": jnp.arange(32.0), "bias": jnp.array([2.0])}
    expected = np.asarray(hidden, np.float64) @ np.arange(32) + 2
    np.testing.assert_allclose(Forward(cfg).scalar(params, hidden), expected, rtol=1e-5)
    assert transformer.count(cfg)["total"] == transformer.count(plain)["total"] + 33
    assert transformer.flops_per_token(cfg, 10) == transformer.flops_per_token(plain, 10)


def test_a_scalar_head_is_no_matrix_to_any_optimizer():
    axes = transformer.axes(tiny(scalar_head=True))
    assert not any(jax.tree.leaves(optim.matrices(axes)["scalar"]))
    assert jax.tree.leaves(optim.matrices(axes)["layers"]["0"]["attn"]["q"]) == [True]  # which others are


def test_a_score_without_a_scalar_head_is_refused():
    cfg = tiny(layers=1)
    with pytest.raises(ConfigError, match="model.scalar_head is False.*model.scalar_head=True"):
        Forward(cfg).scalar(parameters(cfg), jnp.zeros((1, 2, 32)))


def test_losses_are_those_of_the_logits():
    cfg = tiny(logit_softcap=3.0)
    batch, forward, params = rows(2, 10), Forward(cfg), parameters(cfg)
    hidden, aux = jax.jit(forward.hidden)(params, batch)
    logits = np.asarray(forward.logits(params, hidden), np.float64)
    assert np.abs(logits).max() < 3 and aux == 0
    lse = np.log(np.exp(logits).sum(-1))
    got = jax.jit(forward.losses)(params, batch)
    np.testing.assert_allclose(got.lse_BT, lse, atol=1e-5)
    expected = lse - np.take_along_axis(logits, batch["targets_BT"][..., None], -1)[..., 0]
    np.testing.assert_allclose(got.nll_BT, expected, atol=1e-5)
    np.testing.assert_allclose(jax.jit(forward.logps)(params, batch), -expected, atol=1e-5)


def test_bfloat16_computes_in_bfloat16_and_reports_in_float32():
    cfg = tiny(dtype="bfloat16")
    batch = rows(2, 24)
    got = jax.jit(Forward(cfg).losses)(parameters(cfg), batch)
    assert jax.eval_shape(Forward(cfg).hidden, parameters(cfg), batch)[0].dtype == jnp.bfloat16
    assert got.nll_BT.dtype == got.lse_BT.dtype == got.aux.dtype == jnp.float32
    exact = jax.jit(Forward(dataclasses.replace(cfg, dtype="float32")).losses)(parameters(cfg), batch)
    assert 1e-6 < np.abs(got.nll_BT - exact.nll_BT).mean() < 0.05


# ------------------------------------------------------------------------------------------------- parameters
@pytest.mark.parametrize("kind", KINDS)
def test_shapes_axes_and_count_describe_the_parameters(kind):
    cfg = tiny(layers=5, **KINDS[kind])
    params, shapes, axes = parameters(cfg), transformer.shapes(cfg), transformer.axes(cfg)
    is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda s: s.shape, shapes)
    assert jax.tree.map(jnp.ndim, params) == jax.tree.map(len, axes, is_leaf=is_axes)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
    assert type(params) is dict and type(params["layers"]["0"]["attn"]) is dict
    counted = transformer.count(cfg)
    assert counted["total"] == sum(x.size for x in jax.tree.leaves(params))
    assert counted["embedding"] == cfg.vocab_size * cfg.width
    # Two experts of four rest at every token: three matrices of 32 x 48 each, in five layers.
    assert counted["total"] - counted["active"] == (5 * 2 * 3 * 32 * 48 if cfg.experts else 0)


def test_init_depends_on_the_key_alone_and_every_layer_draws_its_own():
    cfg = tiny()
    draw = jax.jit(functools.partial(transformer.init, cfg))
    a, b, c = (draw(jax.random.key(s)) for s in (0, 0, 1))
    same = lambda x, y: all(jax.tree.leaves(jax.tree.map(lambda p, q: (p == q).all(), x, y)))  # noqa: E731
    assert same(a, b) and not same(a, c)
    q = a["layers"]["0"]["attn"]["q"]
    assert jnp.abs(q[0] - q[1]).max() > 0.1
    assert float(q.std()) == pytest.approx(32**-0.5, rel=0.05)


def test_zero_init_starts_at_the_uniform_distribution():
    cfg = tiny(zero_init=True, tied=False)
    params = jax.jit(functools.partial(transformer.init, cfg))(jax.random.key(0))
    for name, leaf in (("attn", "o"), ("mlp", "down")):
        assert (params["layers"]["0"][name][leaf] == 0).all()
    nll = jax.jit(Forward(cfg).losses)(params, rows(2, 8)).nll_BT
    np.testing.assert_allclose(nll, np.log(V), rtol=1e-6)
    assert float(params["embed"]["table"].std()) == pytest.approx(1.0, rel=0.05)
    for fields, std in ((dict(tied=True), 0.02), (dict(init_scale=0.5), 0.5)):
        other = dataclasses.replace(cfg, **fields)
        table = jax.jit(lambda k, c=other: transformer.init(c, k)["embed"]["table"])(jax.random.key(0))
        assert float(table.std()) == pytest.approx(std, rel=0.05)


def test_flops_count_the_matrices_and_the_scores_that_a_window_leaves():
    cfg = tiny(layers=4, tied=False, pattern="WG", window=10, qkv_bias=True)
    per_layer = 32 * (4 + 2 + 2 + 4) * 8 + 2 * 32 * 48
    assert transformer.flops_per_token(cfg, 100) == 6 * (4 * per_layer + 32 * V) + 12 * 4 * 8 * (2 * 10 + 2 * 100)
    tied = dataclasses.replace(cfg, tied=True)
    assert transformer.flops_per_token(tied, 100) == transformer.flops_per_token(cfg, 100)


# ------------------------------------------------------------------------------------------------- configuration
def test_resolve_fills_in_what_is_left_open():
    cfg = resolve(Model(width=384, heads=6, activation="swiglu"), 4096)
    assert (cfg.kv_heads, cfg.head_dim, cfg.mlp, cfg.expert_mlp, cfg.vocab_size) == (6, 64, 1024, 1024, 4096)
    assert resolve(cfg, 4096) == cfg
    assert resolve(Model(width=384, heads=6), 4096).mlp == 4 * 384


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(heads=3), r"model.heads is 3, which does not divide model.width=128; it takes one of 1, 2, 4"),
        (dict(kv_heads=3), r"model.kv_heads is 3, which does not divide model.heads=4; it takes one of 1, 2, 4"),
        (dict(head_dim=15), r"model.head_dim is 15;.*even"),
        (dict(width=20, heads=4), r"model.head_dim is 5 \(model.width / model.heads\)"),
        (dict(layers=0), r"model.layers is 0; it takes at least 1"),
        (dict(window=-1), r"model.window is -1; it takes at least 0"),
        (dict(pattern="WG"), r"model.pattern is 'WG', but model.window is 0"),
        (dict(pattern="GL"), r"model.pattern is 'GL'; it takes a word of G \(global\) and W"),
        (dict(window=8), r"model.window is 8, but model.pattern='G' has no windowed layer"),
        (dict(activation="swigelu"), r"model.activation is 'swigelu'.*Did you mean swiglu\?"),
        (dict(rotary=0.1), r"model.rotary is 0.1, which turns 3 of a head's 32 dimensions"),
        (dict(positions="learned"), r"model.positions is 'learned' and model.max_positions 0"),
        (dict(pre_norm=False), r"model.pre_norm and model.post_norm are both False"),
        (dict(rope_scaling=RopeScaling("longrope", 2.0, 16, short=(1.0,))), "1 short and 0 long divisors; longrope"),
        (dict(norm="batchnorm"), r"model.norm is 'batchnorm'; it takes rmsnorm, gemma, layernorm"),
        (dict(attention="splsh"), r"model.attention is 'splsh'.*Did you mean splash\?"),
        (dict(remat="all"), r"model.remat is 'all'; it takes none, dots, full"),
        (dict(dtype="fp32"), r"model.dtype is 'fp32'"),
        (dict(rope_scaling=RopeScaling("lama3")), r"model.rope_scaling.kind is 'lama3'.*Did you mean llama3\?"),
        (dict(rope_scaling=RopeScaling("yarn", 0.5)), r"model.rope_scaling: factor is 0.5"),
        (dict(rope_theta=0.0), r"model.rope_theta is 0.0"),
        (dict(experts=4, experts_per_token=5), r"model.experts_per_token is 5; it takes 1 to model.experts=4"),
        (dict(shared_experts=1), r"model.shared_experts is 1, but model.experts is 0"),
        (dict(experts=4, mlp_bias=True), r"model.mlp_bias is True, but experts"),
        (dict(norm_eps=0.0), r"model.norm_eps is 0.0"),
        (dict(norm_eps=float("nan")), r"model.norm_eps is nan; it takes a finite"),
        (dict(rope_theta=float("inf")), r"model.rope_theta is inf"),
        (dict(init_scale=float("inf")), r"model.init_scale is inf"),
        (dict(init_scale=-1.0), r"model.init_scale is -1.0; it takes at least 0"),
        (dict(rope_scaling=RopeScaling("linear", float("nan"))), r"model.rope_scaling.factor is nan"),
        (dict(rope_scaling=RopeScaling("yarn", 2.0, attention_factor=-1.0)), r"rope_scaling.attention_factor is -1.0"),
        (dict(rope_scaling=RopeScaling("yarn", 2.0, beta_slow=0.0)), r"model.rope_scaling.beta_slow is 0.0"),
        (dict(rope_scaling=RopeScaling("llama3", 2.0, low_freq=0.0)), r"model.rope_scaling.low_freq is 0.0"),
        (dict(vocab_size=10**30), r"model.vocab_size is 10+; it takes at most 2147483647"),
        (dict(vocab_size=2**30, width=2**11), r"model.vocab_size=1073741824 \* model.width=2048 is 2.2e\+12 numbers"),
        (dict(mlp=2**31 - 1, layers=8), r"model.layers=8 \* model.width=128 \* model.mlp=2147483647 is"),
        (dict(experts=2**24, width=2**10), r"model.experts=16777216 .* numbers in one array"),
        (dict(vocab_size=100), r"model.vocab_size is 100, but the tokenizer has 264 tokens"),
    ],
)
def test_a_model_that_cannot_be_is_refused_in_one_message(fields, message):
    with pytest.raises(ConfigError, match=message) as error:
        resolve(Model(**fields), 264)
    assert "\n" not in str(error.value)


def test_a_model_needs_a_vocabulary_and_forward_a_resolved_one():
    with pytest.raises(ConfigError, match="model.vocab_size is 0"):
        resolve(Model())
    with pytest.raises(ConfigError, match="not resolved"):
        Forward(Model())
