"""Optimizers and schedules: which parameters get what, and that each optimizer minimises."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmtrain import mesh, optim, schema
from lmtrain.schema import ConfigError

AXES = {
    "embedding": ("vocab", "embed"),
    "block": {
        "q": ("layers", "embed", "heads", "head_dim"),
        "o": ("layers", "heads", "head_dim", "embed"),
        "up": ("layers", "embed", "mlp"),
        "expert": ("layers", "experts", "mlp", "embed"),
        "router": ("layers", "embed", "experts"),
        "bias": ("layers", "heads", "head_dim"),
        "norm": ("layers", "norm"),
    },
}
SHAPES = {
    "embedding": (32, 16),
    "block": {
        "q": (3, 16, 4, 8),
        "o": (3, 4, 8, 16),
        "up": (3, 16, 64),
        "expert": (3, 2, 64, 16),
        "router": (3, 16, 2),
        "bias": (3, 4, 8),
        "norm": (3, 16),
    },
}
MATRICES = ("q", "o", "up", "expert")


def draw(seed, scale=1.0):
    leaves, tree = jax.tree.flatten(SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return tree.unflatten([scale * jax.random.normal(k, s) for k, s in zip(keys, leaves, strict=True)])


def cfg(**fields):
    return schema.Optim(**{"schedule": "constant", "warmup": 0, "clip": 0.0, **fields})


def pick(names):
    """(gradients, axes) of some of the block's parameters."""
    grads = draw(0)["block"]
    return {"block": {n: grads[n] for n in names}}, {"block": {n: AXES["block"][n] for n in names}}


def updates(c, grads, axes=AXES, params=None, steps=1):
    """The update of the last of some steps that all see the same gradients."""
    params = jax.tree.map(jnp.zeros_like, grads) if params is None else params
    return repeat(optim.make(c, 100, axes)[0], grads, params, steps)


def repeat(tx, grads, params, steps):
    def one(state, _):
        update, state = tx.update(grads, state, params)
        return state, update

    _, all_updates = jax.jit(lambda params: jax.lax.scan(one, tx.init(params), length=steps))(params)
    return jax.tree.map(lambda u: u[-1], all_updates)


# ------------------------------------------------------------------------------------------------------------ matrices
@pytest.mark.parametrize(
    "axes, dims",
    [
        (("embed", "mlp"), ((0,), (1,))),
        (("layers", "embed", "heads", "head_dim"), ((1,), (2, 3))),
        (("layers", "embed", "kv_heads", "head_dim"), ((1,), (2, 3))),
        (("layers", "heads", "head_dim", "embed"), ((1, 2), (3,))),
        (("layers", "experts", "embed", "mlp"), ((2,), (3,))),
        (("layers", None, "embed", "mlp"), ((2,), (3,))),
        (("vocab", "embed"), None),
        (("embed", "vocab"), None),
        (("layers", "embed", "experts"), None),
        (("layers", "heads", "head_dim"), None),
        (("layers", "mlp"), None),
        (("layers", "norm"), None),
        (("norm",), None),
        ((), None),
    ],
)
def test_input_and_output_of_a_matrix_are_read_from_its_axes(axes, dims):
    found = optim.matrix(axes)
    assert (found and tuple(found)) == dims


# ---------------------------------------------------------------------------------------------------------------- muon
def test_muon_makes_every_matrix_of_a_stack_orthogonal_for_itself():
    update = updates(cfg(muon_lr=0.5), *pick(MATRICES))["block"]
    flat = {"q": (16, 32), "o": (32, 16), "up": (16, 64), "expert": (64, 16)}
    for name, (fan_in, fan_out) in flat.items():
        matrices = np.asarray(update[name]).reshape(-1, fan_in, fan_out)
        singular = np.linalg.svd(matrices, compute_uv=False) / (0.5 * max(1, fan_out / fan_in) ** 0.5)
        assert singular.min() > 0.6 and singular.max() < 1.3, (name, singular)


def test_a_stacked_layer_is_updated_as_it_would_be_alone():
    stack = draw(0)["block"]["q"].at[1].multiply(1e-3)  # its own norm counts, not the stack's
    axes = AXES["block"]["q"]
    grads = {"stack": stack} | {str(layer): stack[layer] for layer in range(3)}
    found = updates(cfg(), grads, steps=2, axes={"stack": axes} | {str(layer): axes[1:] for layer in range(3)})
    for layer in range(3):
        np.testing.assert_allclose(found["stack"][layer], found[str(layer)], rtol=1e-4, atol=1e-6)


def test_beside_muon_everything_else_gets_plain_adamw():
    (grads, axes), c = pick(("up", "router", "bias", "norm")), cfg(lr=0.01)
    grads, axes = grads | {"embedding": draw(0)["embedding"]}, axes | {"embedding": AXES["embedding"]}
    found = updates(c, grads, steps=3, axes=axes)
    adam = optax.adamw(0.01, c.b1, c.b2, c.eps, weight_decay=0.0)
    expected = repeat(adam, grads, jax.tree.map(jnp.zeros_like, grads), 3)
    for name in ("router", "bias", "norm"):
        np.testing.assert_allclose(found["block"][name], expected["block"][name], rtol=1e-5)
    np.testing.assert_allclose(found["embedding"], expected["embedding"], rtol=1e-5)


@pytest.fixture(scope="module")
def on_one_device():
    return updates(cfg(), draw(3), steps=2)


@pytest.mark.parametrize("axes", [{"fsdp": 2, "tensor": 2}, {"fsdp": 2, "expert": 2, "tensor": 2}])
def test_muon_over_a_mesh_is_muon_on_one_device(axes, on_one_device):
    m = mesh.make(schema.Mesh(**axes))
    split = jax.device_put(draw(3), mesh.shardings(AXES, m))
    assert not split["block"]["q"].sharding.is_fully_replicated
    found = repeat(optim.make(cfg(), 100, AXES, m)[0], split, jax.tree.map(jnp.zeros_like, split), 2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, on_one_device)


def test_muon_exchanges_parts_of_matrices_for_whole_ones():
    """Left to the compiler, products of split matrices are summed over the devices at every step of Newton-Schulz, and
    kept whole on each, for the whole stack."""
    m = mesh.make(schema.Mesh(fsdp=4, tensor=2))
    shapes, axes = {"up": jax.ShapeDtypeStruct((3, 16, 64), jnp.float32)}, {"up": AXES["block"]["up"]}
    tx, _ = optim.make(cfg(), 100, axes, m)
    split = jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes,
                         mesh.shardings(axes, m))  # fmt: skip
    text = jax.jit(lambda g: tx.update(g, tx.init(g), g)[0]).lower(split).compile().as_text()
    assert "all-to-all" in text and "all-reduce" not in text and "all-gather" not in text


def test_momentum_and_further_arguments_reach_muon():
    a, b = ({"up": draw(seed)["block"]["up"]} for seed in (0, 1))

    @jax.jit
    def after_a_turn(a, b):
        def second(**fields):
            tx, _ = optim.make(cfg(**fields), 100, {"up": AXES["block"]["up"]})
            return tx.update(b, tx.update(a, tx.init(a), a)[1], a)[0]["up"]

        return second(), second(momentum=0.5), second(args={"consistent_rms": 0.2})

    base, less, rms = after_a_turn(a, b)
    np.testing.assert_allclose(rms, base * 0.2 * 64**0.5 / 4**0.5, rtol=1e-3, atol=1e-6)
    assert not np.allclose(less, base, atol=1e-3)


# --------------------------------------------------------------------------------------------------------------- decay
@pytest.mark.parametrize("name, rate", [("muon", 0.02), ("adamw", 0.003), ("lion", 0.003)])
def test_weight_decay_shrinks_matrices_only(name, rate):
    params = draw(1)
    found = updates(cfg(name=name, weight_decay=0.1), jax.tree.map(jnp.zeros_like, params), params=params)
    for leaf in MATRICES:
        np.testing.assert_allclose(found["block"][leaf], -0.1 * rate * params["block"][leaf], rtol=1e-4, atol=1e-8)
    for leaf in ("router", "bias", "norm"):
        assert (found["block"][leaf] == 0).all(), leaf
    assert (found["embedding"] == 0).all()


def test_an_optimizer_that_cannot_leave_parameters_out_of_the_decay_says_so():
    with pytest.raises(ConfigError, match="novograd decays only of all parameters alike: set optim.args.weight_decay"):
        optim.make(cfg(name="novograd", weight_decay=0.1), 10, AXES)
    optim.make(cfg(name="novograd", args={"weight_decay": 0.1}), 10, AXES)
    with pytest.raises(ConfigError, match="sgd decays not: set it to 0"):
        optim.make(cfg(name="sgd", weight_decay=0.1), 10, AXES)


def test_clipping_is_by_the_norm_of_all_gradients_together():
    grads = draw(0, scale=10.0)
    c = cfg(name="sgd", lr=1.0, clip=2.0)
    assert float(optax.global_norm(updates(c, grads))) == pytest.approx(2.0, rel=1e-5)
    assert float(optax.global_norm(updates(dataclasses.replace(c, clip=0.0), grads))) > 100


# ---------------------------------------------------------------------------------------------------------- every name
@pytest.mark.parametrize(
    "name, lr",
    [
        ("muon", 0.003),
        ("adamw", 0.01),
        ("lion", 0.003),
        ("adafactor", 0.05),
        ("lamb", 0.02),
        ("adan", 0.01),
        ("sgd", 0.1),
        ("schedule_free_adamw", 0.02),
        ("prodigy", 1.0),
        ("adopt", 0.01),
        ("ademamix", 0.01),
    ],
)
def test_minimises_a_quadratic(name, lr):
    axes = {"w": ("layers", "embed", "mlp"), "norm": ("norm",)}
    target = {"w": jax.random.normal(jax.random.key(0), (2, 8, 8)), "norm": jnp.arange(8.0) / 8}
    tx, _ = optim.make(cfg(name=name, lr=lr, muon_lr=0.05), 300, axes)

    def loss(params):
        return sum(jax.tree.leaves(jax.tree.map(lambda p, t: ((p - t) ** 2).mean(), params, target)))

    def one(carry, _):
        params, state = carry
        update, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, update), state), None

    start = jax.tree.map(lambda t: t + 0.3, target)
    (params, _), _ = jax.jit(lambda p: jax.lax.scan(one, (p, tx.init(p)), length=300))(start)
    assert float(loss(params)) < 0.25 * float(loss(start)), name


def test_what_only_adamw_has_by_default_reaches_others_when_set():
    grads, axes = pick(["up"])
    params = {"block": {"up": draw(1)["block"]["up"]}}

    def direction(**fields):
        return updates(cfg(name="lamb", lr=1.0, **fields), grads, axes, params, steps=2)["block"]["up"]

    expected = repeat(optax.lamb(1.0), grads, params, 2)
    np.testing.assert_allclose(direction(), expected["block"]["up"], rtol=1e-4, atol=1e-6)
    assert not np.allclose(direction(eps=10.0), direction(), rtol=1e-3)
    with pytest.raises(ConfigError, match="optim.b2 is 0.5, but sgd takes none"):
        optim.make(cfg(name="sgd", b2=0.5), 10, AXES)


# -------------------------------------------------------------------------------------------------------------- wrong
@pytest.mark.parametrize(
    "fields, message",
    [
        ({"name": "adanw"}, r"optim.name: there is no 'adanw'.* Did you mean '?ada"),
        ({"name": "clip"}, r"optim.name: there is no 'clip'"),
        ({"name": "foo"}, r"optim.name: there is no 'foo'. \(valid: muon, adamw, .*, and \d+ others of optax\)$"),
        ({"lr": float("inf")}, r"optim.lr is inf"),
        ({"clip": float("nan")}, r"optim.clip is nan"),
        ({"decay": float("inf")}, r"optim.decay is inf"),
        ({"args": {"ns_steps": float("inf")}}, r"optim.args.ns_steps is inf"),
        ({"name": "sophia"}, r"'sophia', which does not work so: obj_fn"),
        ({"name": "lbfgs"}, r"'lbfgs', which does not work so"),
        ({"name": "dpsgd"}, r"'dpsgd', which does not work so: .*noise_multiplier"),
        ({"schedule": "cosin"}, r"optim.schedule: there is no 'cosin'.* Did you mean '?cosine"),
        ({"args": {"nesterof": True}}, r"optim.args \(muon\): there is no 'nesterof'.* Did you mean '?nesterov"),
        ({"args": {"adam_b1": 0.5}}, r"optim.args \(muon\): there is no 'adam_b1'"),
        ({"name": "adamw", "args": {"learning_rate": 1.0}}, r"optim.args \(adamw\): there is no 'learning_rate'"),
        ({"b1": 1.5}, r"optim.b1 is 1.5; it takes a number of between 0 and 1"),
        ({"lr": -1.0}, r"optim.lr is -1.0"),
        ({"warmup": -1}, r"optim.warmup is -1"),
    ],
)
def test_wrong_settings_are_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        optim.make(schema.Optim(**fields), 10, AXES)


# ----------------------------------------------------------------------------------------------------------- schedules
def curve(steps=100, **fields):
    return np.asarray([optim.shape(schema.Optim(**fields), steps)(t) for t in range(steps)])


def test_warmup_rises_from_the_first_step_to_one():
    for schedule in optim.SCHEDULES:
        rising = curve(warmup=10, decay=0.4, schedule=schedule)[:10]
        np.testing.assert_allclose(rising, np.arange(1, 11) / 10, rtol=1e-5)
    np.testing.assert_allclose(curve(warmup=0.1, schedule="constant"), curve(warmup=10, schedule="constant"))
    assert (curve(warmup=0, schedule="constant") == 1).all()


def test_wsd_is_flat_then_falls_in_a_line():
    c = curve(warmup=10, decay=0.4, schedule="wsd")
    assert (c[10:61] == 1).all()
    np.testing.assert_allclose(c[60:], 1 - np.arange(40) / 40, rtol=1e-5)
    np.testing.assert_allclose(curve(decay=40, warmup=10, schedule="wsd"), c)


def test_linear_and_cosine_fall_to_the_final_share():
    linear = curve(warmup=0, schedule="linear", final=0.1)
    np.testing.assert_allclose(linear, 1 - 0.9 * np.arange(100) / 100, rtol=1e-5)
    cosine = curve(warmup=0, schedule="cosine", final=0.1)
    np.testing.assert_allclose(cosine, 0.1 + 0.45 * (1 + np.cos(np.pi * np.arange(100) / 100)), rtol=1e-5)


@pytest.mark.parametrize("schedule", ["wsd", "linear", "cosine"])
def test_the_last_update_still_learns_though_the_final_rate_is_zero(schedule):
    falls = optim.shape(schema.Optim(schedule=schedule, final=0.0), 100)
    assert float(falls(99)) > 0 and float(falls(100)) == pytest.approx(0, abs=1e-7)


def test_past_the_end_the_rate_stays_at_its_last():
    for schedule in ("wsd", "linear", "cosine"):
        assert float(optim.shape(schema.Optim(schedule=schedule, final=0.1), 100)(250)) == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_run_of_few_steps_still_learns(steps):
    for schedule in optim.SCHEDULES:
        c = curve(steps, schedule=schedule)
        assert np.isfinite(c).all() and c[0] > 0


def test_the_schedule_is_what_the_optimizer_used():
    c = schema.Optim(name="sgd", lr=0.5, schedule="linear", warmup=0, clip=0.0)
    tx, schedule = optim.make(c, 10, {"norm": ("norm",)})
    params = {"norm": jnp.zeros(3)}
    state = tx.init(params)
    for t in range(4):
        update, state = tx.update({"norm": jnp.ones(3)}, state, params)
        np.testing.assert_allclose(update["norm"], -schedule(t), rtol=1e-6)


def test_each_layers_update_is_that_of_the_one_above_times_layer_decay():
    """Five layers of a pattern of two, one left over: five different factors, the embedding's below, the output's 1."""
    from lmtrain.models import transformer

    cfg = transformer.resolve(schema.Model(layers=5, pattern="WG", window=4, width=16, heads=2, tied=False), 32)
    params = jax.tree.map(lambda s: jnp.ones(s.shape), transformer.shapes(cfg))
    grads = jax.tree.map(lambda x: x * 0.3, params)
    got = {}
    for decay in (1.0, 0.5):
        how = schema.Optim(name="sgd", lr=1.0, layer_decay=decay, clip=0.0, warmup=0)
        tx, _ = optim.make(how, 10, transformer.axes(cfg))
        got[decay] = tx.update(grads, tx.init(params), params)[0]
    ratio = jax.tree.map(lambda a, b: np.asarray(a / b), got[0.5], got[1.0])
    for place, layers in (("0", (0, 2)), ("1", (1, 3))):
        for leaf in jax.tree.leaves(ratio["layers"][place]):
            for g, layer in enumerate(layers):
                np.testing.assert_allclose(leaf[g], 0.5 ** (4 - layer), rtol=1e-6)
    assert {float(x) for leaf in jax.tree.leaves(ratio["tail"]) for x in leaf.ravel()} == {1.0}
    np.testing.assert_allclose(ratio["embed"]["table"], 0.5**5, rtol=1e-6)
    np.testing.assert_allclose(ratio["head"]["kernel"], 1.0)
    with pytest.raises(schema.ConfigError, match="optim.layer_decay is 1.5"):
        optim.make(schema.Optim(layer_decay=1.5), 10, transformer.axes(cfg))
