"""The update: the same however the batch is cut up or spread; sums divided once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lmtrain import mesh, optim, schema, step, types
from lmtrain.schema import ConfigError

AXES = {"in": ("embed", "mlp"), "out": ("mlp", "embed"), "norm": ("norm",)}


def init(key):
    a, b = jax.random.split(key)
    return {"in": jax.random.normal(a, (8, 16)) / 3, "out": jax.random.normal(b, (16, 8)) / 4, "norm": jnp.ones(8)}


def loss(forward, params, batch, cfg):
    """Squared error of a small network on x_BT (T = 8); rows weigh what weights_B says."""
    hidden = jnp.tanh((batch["x_BT"] * params["norm"]) @ params["in"])
    error_B = ((hidden @ params["out"] - batch["y_BT"]) ** 2).sum(-1)
    w_B = batch["weights_B"]
    large = ((error_B > 8) * w_B).sum(), w_B.sum()
    return (error_B * w_B).sum(), w_B.sum(), {"large": large, "absent": (jnp.float32(0), jnp.float32(0))}


def batch(rows=16, seed=0):
    """Rows of very unequal weight, so that a mean of microbatch means would be a different number."""
    rng = np.random.default_rng(seed)
    weights = np.where(np.arange(rows) % 4 == 0, 5.0, (rng.random(rows) < 0.5)).astype(np.float32)
    x, y = rng.normal(size=(2, rows, 8)).astype(np.float32)
    return {"x_BT": x, "y_BT": y, "weights_B": weights}


def build(devices=8, accumulate=1, name="adamw", loss=loss, clip=1.0, **axes):
    m = mesh.make(schema.Mesh(**axes), jax.devices()[:devices])
    cfg = schema.Optim(name=name, clip=clip, lr=0.01, schedule="constant", warmup=0)
    tx, schedule = optim.make(cfg, 100, AXES)
    start, abstract = step.make_init(init, tx, AXES, m)
    return m, start, abstract, step.make_update(loss, None, tx, schedule, abstract, m, None, accumulate)


def run(steps=3, **kwargs):
    m, start, _, update = build(**kwargs)
    state, seen = start(jax.random.key(0)), []
    for i in range(steps):
        state, metrics = update(state, mesh.put(batch(seed=i), m))
        seen.append({k: float(v) for k, v in metrics.items()})
    return state, seen


def close(a, b, rtol=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6), a, b)


@pytest.fixture(scope="module")
def reference():
    return run(devices=1)


# ----------------------------------------------------------------------------------------------------------- exactness
@pytest.mark.parametrize(
    "kwargs",
    [
        {"devices": 1, "accumulate": 4},
        {"devices": 1, "accumulate": 16},
        {"devices": 8},
        {"devices": 8, "accumulate": 2},
        {"devices": 8, "accumulate": 4, "fsdp": 2, "tensor": 2},
        {"devices": 8, "accumulate": 2, "fsdp": 2, "context": 2, "expert": 2},
    ],
    ids=str,
)
def test_microbatches_and_devices_change_nothing(reference, kwargs):
    state, seen = run(**kwargs)
    close(state.params, reference[0].params)
    for ours, theirs in zip(seen, reference[1], strict=True):
        for name in theirs:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-7), name


def test_the_update_is_the_gradient_of_the_weighted_mean(reference):
    b, params = batch(), init(jax.random.split(jax.random.key(0))[1])

    def mean(params):
        total, weight, _ = loss(None, params, b, None)
        return total / weight

    value, grads = jax.value_and_grad(mean)(params)
    first = reference[1][0]
    norm = np.sqrt(sum((np.asarray(g) ** 2).sum() for g in jax.tree.leaves(grads)))
    assert first["loss"] == pytest.approx(float(value), rel=1e-5)
    assert first["grad_norm"] == pytest.approx(norm, rel=1e-5) and norm > 1  # above the clip: reported before it
    assert first["weight"] == b["weights_B"].sum()
    assert first["lr"] == pytest.approx(0.01)


def test_microbatch_k_takes_every_accumulate_th_row_from_k():
    m = mesh.make(schema.Mesh())
    x = np.arange(16, dtype=np.float32)
    got = step.microbatches({"rows_B": jnp.asarray(x), "table_V": jnp.ones(3)}, 2, m)
    assert (got["rows_B"] == np.stack([x[0::2], x[1::2]])).all() and got["table_V"].shape == (3,)


def test_rows_stay_where_they_are_when_a_batch_is_cut_up():
    m = mesh.make(schema.Mesh())
    put = mesh.put({"rows_BT": np.zeros((16, 4), np.float32)}, m)
    text = jax.jit(lambda b: step.microbatches(b, 2, m)).lower(put).compile().as_text()
    assert not any(op in text for op in ("all-to-all", "all-gather", "collective-permute"))


def test_gradients_accumulate_in_float32():
    def tiny(forward, params, batch, cfg):
        # One large term and many small ones: a bfloat16 sum would lose the small ones.
        return (params["norm"].astype(jnp.bfloat16)[0] * batch["x_B"]).astype(jnp.float32).sum(), jnp.float32(1), {}

    m, start, _, update = build(devices=1, accumulate=8, loss=tiny, clip=0.0)
    x = np.array([256] + [0.5] * 7, np.float32)
    _, metrics = update(start(jax.random.key(0)), mesh.put({"x_B": x}, m))
    assert float(metrics["grad_norm"]) == pytest.approx(259.5 / 8, rel=1e-6)


# ------------------------------------------------------------------------ largest of a batch, two passes, frozen models
SPLITS = [{"devices": 1}, {"devices": 1, "accumulate": 4}, {"devices": 8, "accumulate": 2, "fsdp": 2, "tensor": 2}]


def with_largest(forward, params, batch, cfg):
    """`loss`, and the largest negative number of the rows that count: neither a sum nor a 0 to start from would do."""
    total, weight, metrics = loss(forward, params, batch, cfg)
    counts_B = batch["weights_B"] > 0
    x_B = jnp.where(counts_B, -1 - jnp.abs(batch["y_BT"]).sum(-1), -jnp.inf)
    return total, weight, metrics | {"y_max": (x_B.max(), counts_B.sum())}


@pytest.mark.parametrize("kwargs", SPLITS, ids=str)
def test_a_metric_that_ends_in_max_is_the_largest_of_the_whole_batch(kwargs):
    m, start, _, update = build(loss=with_largest, **kwargs)
    b = batch()
    b["weights_B"][1::4] = 0  # microbatch 1 of 4 weighs nothing
    _, metrics = update(start(jax.random.key(0)), mesh.put(b, m))
    expected = -1 - np.abs(b["y_BT"]).sum(-1)
    assert float(metrics["y_max"]) == pytest.approx(expected[b["weights_B"] > 0].max())


def test_sums_are_added_and_the_largest_kept():
    a = {"x": (1.0, 2.0), "r_max": (-3.0, 2.0)}
    b = {"x": (5.0, 1.0), "r_max": (-9.0, 1.0)}
    nothing = {"x": (0.0, 0.0), "r_max": (7.0, 0.0)}
    total = step.add(step.add(nothing, a), step.add(b, nothing))
    means = step.means(total)
    assert {k: float(v) for k, v in means.items()} == {"x": 2.0, "r_max": -3.0}
    assert {k: float(v) for k, v in step.means(step.add(nothing, nothing)).items()} == {"x": 0.0, "r_max": 0.0}


def centred(forward, params, batch, cfg):
    """Squared distance of a linear score from its mean over the whole batch, which takes no gradient."""
    score_B = batch["x_BT"] @ params["norm"]
    w_B = batch["weights_B"]
    return (
        ((score_B - batch["centre"]) ** 2 * w_B).sum(),
        w_B.sum(),
        {"centre": (batch["centre"] * w_B.sum(), w_B.sum())},
    )


def _mean_score(forward, params, batch, cfg):
    w_B = batch["weights_B"]
    return {"centre": ((batch["x_BT"] @ params["norm"] * w_B).sum(), w_B.sum())}


centred.first = _mean_score


@pytest.mark.parametrize("kwargs", SPLITS, ids=str)
def test_what_comes_first_is_of_the_whole_batch(kwargs):
    m, start, _, update = build(loss=centred, **kwargs)
    state, b = start(jax.random.key(0)), batch()
    w, x, norm = (np.asarray(v, np.float64) for v in (b["weights_B"], b["x_BT"], state.params["norm"]))
    centre = (x @ norm * w).sum() / w.sum()
    grad = 2 * ((x @ norm - centre) * w) @ x / w.sum()
    _, metrics = update(state, mesh.put(b, m))
    assert float(metrics["centre"]) == pytest.approx(centre, rel=1e-5)
    assert float(metrics["loss"]) == pytest.approx(((x @ norm - centre) ** 2 * w).sum() / w.sum(), rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(np.linalg.norm(grad), rel=1e-5)


def test_evaluation_does_what_comes_first_too():
    m, start, _, _ = build(loss=centred)
    params, b = start(jax.random.key(0)).params, batch()
    total, weight = step.make_evaluate(centred, None, m)(params, mesh.put(b, m))["loss"]
    score, w = b["x_BT"] @ np.asarray(params["norm"]), b["weights_B"]
    assert float(total / weight) == pytest.approx(
        np.average((score - np.average(score, weights=w)) ** 2, weights=w), rel=1e-5
    )


class Scale:
    """Stands for a frozen model's forward: hashable, and no array."""

    def __call__(self, params, x_BT):
        return x_BT * params["by"]


def taught(forward, params, batch, cfg):
    teacher = batch["teacher"]
    error_B = ((batch["x_BT"] * params["norm"] - teacher.forward(teacher.params, batch["x_BT"])) ** 2).sum(-1)
    return error_B.sum(), jnp.float32(len(error_B)), {}


@pytest.mark.parametrize("kwargs", SPLITS, ids=str)
def test_a_frozen_model_is_passed_on_whole(kwargs):
    m, start, _, update = build(loss=taught, **kwargs)
    b = {"x_BT": batch()["x_BT"]}
    state = start(jax.random.key(0))
    norm = np.asarray(state.params["norm"])
    teacher = types.Frozen(params={"by": jnp.arange(8.0)}, forward=Scale())
    batch_and_teacher = {**mesh.put(b, m), "teacher": teacher}
    expected = ((b["x_BT"] * (norm - np.arange(8))) ** 2).sum(-1).mean()
    total, weight = step.make_evaluate(taught, None, m)(state.params, batch_and_teacher)["loss"]
    assert float(total / weight) == pytest.approx(expected, rel=1e-5)
    _, metrics = update(state, batch_and_teacher)
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)
    assert step.microbatches(batch_and_teacher, 1, m)["teacher"] is teacher


# -------------------------------------------------------------------------------------------------------------- state
def test_state_is_born_split_and_the_same_on_any_mesh():
    alone = build(devices=1)[1](jax.random.key(3))
    _, start, abstract, _ = build(fsdp=2, tensor=2, name="muon")
    split = start(jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, alone.params, split.params)
    assert split.params["in"].sharding.spec == PartitionSpec("fsdp", "tensor")
    for x, a in zip(jax.tree.leaves(split), jax.tree.leaves(abstract), strict=True):
        assert (x.sharding, x.shape, x.dtype) == (a.sharding, a.shape, a.dtype)
    moments = [x for x in jax.tree.leaves(split.opt_state) if x.shape == (8, 16)]
    assert moments and all(x.sharding.spec == PartitionSpec("fsdp", "tensor") for x in moments)


def test_given_parameters_are_taken_and_the_key_is_as_without():
    m, start, _, _ = build(fsdp=2)
    given = jax.tree.map(lambda p: np.asarray(p) + 1, init(jax.random.key(9)))
    state = start(jax.random.key(3), given)
    jax.tree.map(np.testing.assert_array_equal, state.params, given)
    fresh = start(jax.random.key(3))
    assert (jax.random.key_data(state.key) == jax.random.key_data(fresh.key)).all() and int(state.step) == 0


def test_a_parameter_that_the_mesh_does_not_divide_is_named():
    tx, _ = optim.make(schema.Optim(), 10, AXES)
    odd = {"in": jnp.ones((8, 15)), "out": jnp.ones((15, 8)), "norm": jnp.ones(8)}
    with pytest.raises(ConfigError, match=r"mesh.tensor is 2.*'mlp' = 15 of parameter in"):
        step.make_init(lambda key: odd, tx, AXES, mesh.make(schema.Mesh(tensor=2)))


def test_the_state_is_donated_the_step_counted_and_the_program_traced_once():
    traced = []

    def counted(*args):
        traced.append(1)
        return loss(*args)

    m, start, abstract, update = build(fsdp=2, tensor=2, accumulate=2, loss=counted)
    state = start(jax.random.key(0))
    before = state.params["in"]
    state, _ = update(state, mesh.put(batch(), m))
    once = len(traced)
    for i in range(2):
        state, _ = update(state, mesh.put(batch(seed=i), m))
    assert before.is_deleted() and int(state.step) == 3 and len(traced) == once
    assert state.params["in"].sharding == abstract.params["in"].sharding


# -------------------------------------------------------------------------------------------------------------- weight
def test_a_batch_that_weighs_nothing_changes_nothing():
    m, start, _, update = build(accumulate=2)
    state = start(jax.random.key(0))
    state, _ = update(state, mesh.put(batch(), m))
    before = jax.tree.map(np.array, (state.params, state.opt_state))
    nothing = batch() | {"weights_B": np.zeros(16, np.float32)}
    state, metrics = update(state, mesh.put(nothing, m))
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), before)
    assert int(state.step) == 2 and float(metrics["weight"]) == 0 and float(metrics["loss"]) == 0
    assert all(np.isfinite(float(v)) for v in metrics.values())


def test_a_loss_that_is_not_finite_is_reported():
    m, start, _, update = build()
    broken = batch()
    broken["x_BT"][0, 0] = np.nan
    _, metrics = update(start(jax.random.key(0)), mesh.put(broken, m))
    assert np.isnan(float(metrics["loss"])) and np.isnan(float(metrics["grad_norm"]))


def test_rows_that_do_not_divide_are_refused_with_the_numbers():
    m, start, _, update = build(devices=8, accumulate=4)
    with pytest.raises(ConfigError, match="batch_size is 16, not a multiple of 32: accumulate=4 times the 8 parts"):
        update(start(jax.random.key(0)), mesh.put(batch(), m))


# ----------------------------------------------------------------------------------------------------------- evaluation
def test_evaluation_returns_sums_that_add_up_to_the_whole():
    m = mesh.make(schema.Mesh(fsdp=2))
    evaluate = step.make_evaluate(loss, None, m)
    params, b = init(jax.random.key(0)), batch()
    whole = evaluate(params, mesh.put(b, m))
    parts = [evaluate(params, mesh.put({k: v[i : i + 8] for k, v in b.items()}, m)) for i in (0, 8)]
    assert set(whole) == {"loss", "large", "absent"} and all(x.dtype == jnp.float32 for x in jax.tree.leaves(whole))
    for name, (total, weight) in whole.items():
        assert float(total) == pytest.approx(sum(float(p[name][0]) for p in parts), rel=1e-5)
        assert float(weight) == sum(float(p[name][1]) for p in parts)
