"""Every objective on the real decoder through the real step: however a batch is cut up or spread, one update."""

import functools

import jax
import numpy as np
import pytest

from lmtrain import config, optim, schema, step, types
from lmtrain import mesh as meshes
from lmtrain.models import transformer
from lmtrain.objectives import common
from lmtrain.schema import ConfigError

V, B, T = 32, 8, 20
OBJECTIVES = ["pretrain", "sft", "gkd", "reward", "discriminator", "dpo", "dpo_norm", "ipo", "simpo", "orpo", "kto",
              "grpo", "dapo", "dr_grpo", "gspo", "rloo", "cispo", "ppo", "group_dro", "even"]  # fmt: skip
#: Beyond the defaults: what adds a term.
SETTINGS = {
    "sft": dict(label_smoothing=0.1, z_loss=0.01),
    "reward": dict(center=0.1),
    "grpo": dict(beta=0.1, is_cap=2.0),
    "ppo": dict(temperature=0.7),
    "group_dro": dict(cells=2, step_size=3.0),
    "even": dict(keep=0.5),
}
QUICK = {
    "gkd",
    "kto",
    "grpo",
    "ppo",
    "reward",
    "orpo",
    "group_dro",
}  # the others are like one of these; `make test-all` runs all
MODEL = transformer.resolve(
    schema.Model(layers=2, width=16, heads=4, mlp=32, zero_init=False, scalar_head=True, unroll=1, loss_chunk=16), V
)


def objective(name):
    return config.resolve(name, "lmtrain.objectives", "objective")


def settings(name):
    return config.loss_settings(name)(**SETTINGS.get(name, {}))


@functools.cache
def parameters(seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(np.float32), transformer.shapes(MODEL))


def batch():
    """Eight rows of one to four conversations and unequal numbers of loss tokens; the last row is empty."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, V, (B, T + 1)).astype(np.int32)
    segments, labels = np.zeros((B, T), np.int32), np.zeros((B, T), np.float32)
    for b in range(B - 1):
        cuts = np.sort(rng.choice(np.arange(3, T - 2), 2 * (b % 2) + 1, replace=False))
        for s, (i, j) in enumerate(zip([0, *cuts], [*cuts, T - b % 3], strict=True)):
            segments[b, i:j] = s + 1
            labels[b, i:j] = 0 if s % 2 else (-1) ** b
    last = np.append(segments[:, 1:] != segments[:, :-1], np.ones((B, 1), bool), axis=1)
    weights = ((segments > 0) & ~last & (rng.random((B, T)) < 0.7)).astype(np.float32)
    out = {"tokens_BT": tokens[:, :-1], "targets_BT": tokens[:, 1:], "weights_BT": weights, "segments_BT": segments,
           "labels_BT": labels, "margins_BT": np.where(segments > 0, 0.5, 0).astype(np.float32)}  # fmt: skip
    out["groups_BT"] = segments % 3
    out["balance_BT"] = np.array([1.0, 0.7, 1.6], np.float32)[out["groups_BT"]]
    for name in ("advantages", "returns", "old_values"):
        out[f"{name}_BT"] = rng.normal(size=(B, T)).astype(np.float32)
    for name, mean in (("old_logps", -3.5), ("ref_logps", -4.2), ("sampler_logps", -3.5)):
        out[f"{name}_BT"] = (mean + 0.3 * rng.normal(size=(B, T))).astype(np.float32)
    return out


@functools.cache
def updated(name, accumulate, **axes):
    """(metrics, parameters) after one step of plain gradient descent."""
    devices = jax.devices() if axes else jax.devices()[:1]
    mesh = meshes.make(schema.Mesh(**axes), devices)
    forward, axes_tree = transformer.Forward(MODEL, mesh), transformer.axes(MODEL)
    cfg = schema.Optim(name="sgd", clip=0.0, lr=0.1, schedule="constant", warmup=0)
    tx, schedule = optim.make(cfg, 10, axes_tree)
    start, abstract = step.make_init(lambda key: transformer.init(MODEL, key), tx, axes_tree, mesh)
    update = step.make_update(objective(name), forward, tx, schedule, abstract, mesh, settings(name), accumulate)
    rows = meshes.put(batch(), mesh)
    if name == "gkd":
        theirs = jax.device_put(parameters(seed=1), meshes.shardings(axes_tree, mesh))
        rows["teacher"] = types.Frozen(params=theirs, forward=forward)
    state, metrics = update(start(jax.random.key(0), parameters()), rows)
    return {k: float(v) for k, v in metrics.items()}, jax.tree.map(np.asarray, state.params)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in OBJECTIVES])
def test_microbatches_and_devices_change_nothing(name):
    """One batch on one device; 8 rows in 2 microbatches over 2 x 2 x 2 devices (rows, vocabulary, positions)."""
    assert_same_update(name, data=2, tensor=2, context=2)


def test_a_value_head_beside_the_logits_under_stages():
    assert_same_update("ppo", stage=2, fsdp=2, tensor=2)


def assert_same_update(name, **axes):
    whole, params = updated(name, 1)
    split, others = updated(name, 2, **axes)
    assert whole["loss"] != 0 and whole["grad_norm"] > 1e-4 and whole["weight"] > 3
    assert set(whole) == set(split)
    assert name != "kto" or whole["z"] > 0.1  # else no microbatch's own would show
    for key in whole:
        assert split[key] == pytest.approx(whole[key], rel=2e-4, abs=2e-5), key
    before = parameters()
    moved = max(np.abs(p - q).max() for p, q in zip(*map(jax.tree.leaves, (params, before)), strict=True))
    for p, q in zip(jax.tree.leaves(params), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(p, q, atol=2e-4 * moved)


def unpacked(b):
    """Each pair of conversations in a row of its own, from its beginning."""
    rows = [(r, k) for r in range(B) for k in range(0, T, 2) if np.isin(b["segments_BT"][r], (k + 1, k + 2)).any()]
    out = {name: np.zeros((len(rows), T), x.dtype) for name, x in b.items()}
    for i, (r, k) in enumerate(rows):
        here = np.flatnonzero(np.isin(b["segments_BT"][r], (k + 1, k + 2)))
        for name in b:
            out[name][i, : len(here)] = b[name][r, here]
        out["segments_BT"][i, : len(here)] -= k
    return out


def test_packed_rows_have_the_loss_of_unpacked_ones():
    """dr_grpo's constant takes the number of replies, the rest their own sums; positions are relative (RoPE)."""
    names = ["sft", "dpo", "kto", "reward", "grpo", "dr_grpo", "gspo", "group_dro", "even"]

    def losses(rows):
        forward = transformer.Forward(MODEL)

        def run(params):
            out = {}
            for name in names:
                f, b = objective(name), rows
                if hasattr(f, "first"):
                    b = b | step.means(f.first(forward, params, b, settings(name)))
                total, weight, _ = f(forward, params, b, settings(name))
                out[name] = total / weight
            return out

        return jax.jit(run)(parameters())

    b = batch()
    alone = unpacked(b)
    assert len(alone["tokens_BT"]) > B and alone["segments_BT"].max() == 2 < b["segments_BT"].max()
    got, expected = losses(b), losses(alone)
    for name in names:
        assert float(got[name]) == pytest.approx(float(expected[name]), rel=1e-5), name


def test_evaluation_has_the_loss_that_the_update_reports():
    mesh = meshes.make(schema.Mesh(), jax.devices()[:1])
    for name in ("kto", "orpo"):
        evaluate = step.make_evaluate(objective(name), transformer.Forward(MODEL, mesh), mesh, settings(name))
        means = step.means(evaluate(parameters(), meshes.put(batch(), mesh)))
        assert float(means["loss"]) == pytest.approx(updated(name, 1)[0]["loss"], rel=1e-5)


def test_step_0_has_a_ratio_of_one():
    """What the learner's own forward pass gave before the update is what it gives in it."""
    forward, cfg = transformer.Forward(MODEL), config.loss_settings("dapo")(temperature=0.7)
    b = batch()
    b["old_logps_BT"] = jax.jit(lambda p: forward.logps(p, b, 0.7))(parameters())
    _, _, metrics = jax.jit(lambda p: objective("dapo")(forward, p, b, cfg))(parameters())
    assert float(metrics["ratio_max"][0]) == pytest.approx(1, abs=2e-6)
    assert float(metrics["clipped"][0]) == 0


# ------------------------------------------------------------------------------------------------------------- by name
def test_every_objective_is_found_by_its_name_and_says_what_it_needs():
    for name in OBJECTIVES:
        kind = config.loss_settings(name)
        assert kind.__name__.lower() == name.replace("_", "") or name == "pretrain"
        assert kind.SOURCE in ("documents", "chat", "pairs", "labels", "rollout")
        assert kind.SOURCE != "rollout" or kind.ADVANTAGE in (*common.ADVANTAGES, "gae")
        made = config.stage(objective=name, loss=SETTINGS.get(name, {})).loss
        assert set(made.keys()) == {f for f in kind.__dataclass_fields__ if not f.isupper()}
    with pytest.raises(ConfigError, match="Did you mean dapo"):
        config.loss_settings("dappo")
    assert {n for n in OBJECTIVES if hasattr(objective(n), "first")} == {"kto", "group_dro"}
    assert {n for n in OBJECTIVES if getattr(settings(n), "SCALAR", False)} == {"reward", "discriminator", "ppo"}


def test_a_reward_needs_a_scalar_head():
    model = transformer.resolve(schema.Model(layers=1, width=16, heads=4), V)
    params = jax.tree.map(lambda s: np.zeros(s.shape, np.float32), transformer.shapes(model))
    for name in ("reward", "ppo"):
        with pytest.raises(ConfigError, match="model.scalar_head is False"):
            objective(name)(transformer.Forward(model), params, batch(), settings(name))
