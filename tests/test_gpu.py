"""What only an NVIDIA GPU can show. `make test-gpu`, on a machine that has one; skipped elsewhere."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmtrain import mesh as meshes
from lmtrain import optim, schema, step
from lmtrain.engine import Engine, Sampling
from lmtrain.models import transformer
from lmtrain.models.attention import attend, choose
from lmtrain.objectives import pretrain

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="no NVIDIA GPU")
B, T = 2, 512
CASES = {
    "causal": {},
    "window": {"window": 100},
    "segments": {"segments": True},
    "both": {"segments": True, "window": 40, "scale": 0.2},
}


def inputs(heads=8, kv_heads=2, size=64, segments=False, **options):
    q, k, v = (
        jax.random.normal(jax.random.key(i), (B, T, n, size), jnp.bfloat16)
        for i, n in enumerate((heads, kv_heads, kv_heads))
    )
    marks = jnp.asarray(np.repeat([[1, 2, 3, 0], [1, 1, 2, 2]], T // 4, axis=1)) if segments else None
    return (q, k, v), {"segments_BT": marks, **options}


def apart(got, expected):
    """||got - expected|| / ||expected||, in float64."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert np.isfinite(got).all()
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("shape", [(8, 2, 64), (4, 4, 128), (6, 6, 64)])
@pytest.mark.parametrize("case", CASES)
def test_cudnn_is_the_reference_to_bfloat16_with_its_gradients(case, shape):
    args, options = inputs(*shape, **CASES[case])
    assert choose("auto", "gpu", length=T, head_dim=shape[2]) == "cudnn"
    real = jnp.ones((B, T)) if options["segments_BT"] is None else options["segments_BT"] > 0
    weight = jax.random.normal(jax.random.key(9), args[0].shape) * real[..., None, None]

    def total(args, backend):
        out = attend(*args, **options, backend=backend)
        return (out.astype(jnp.float32) * weight).sum(), out * real[..., None, None]

    run = jax.jit(jax.value_and_grad(total, has_aux=True), static_argnums=1)
    (_, expected), expected_grads = run(args, "reference")
    (_, got), grads = run(args, "cudnn")
    assert apart(got, expected) < 1e-2
    for g, e in zip(grads, expected_grads, strict=True):
        assert apart(g, e) < 1e-2


@pytest.mark.parametrize("window", [0, 40])
def test_under_cudnn_a_query_gets_exactly_no_gradient_from_what_it_may_not_see(window):
    (q, k, v), options = inputs(segments=True, window=window)
    options["segments_BT"] = jnp.repeat(jnp.array([[1, 2, 3, 4]]), T // 4, axis=1).repeat(B, axis=0)
    at = 3 * T // 4 - 20
    f = lambda k, v: attend(q, k, v, **options, backend="cudnn")[:, at].astype(jnp.float32).sum()  # noqa: E731
    for grad in jax.jit(jax.grad(f, (0, 1)))(k, v):
        touched = np.abs(np.asarray(grad, np.float32)).max(axis=(0, 2, 3)) > 0
        first = T // 2 if not window else at - window + 1
        assert not touched[:first].any() and not touched[at + 1 :].any()
        assert touched[first : at + 1].all()


def model(**fields):
    base = dict(layers=4, width=256, heads=4, kv_heads=2, mlp=512, zero_init=False, activation="swiglu", tied=False)
    cfg = transformer.resolve(schema.Model(**base | fields), 512)
    return cfg, jax.jit(lambda: transformer.init(cfg, jax.random.key(0)))()


@pytest.mark.parametrize("pattern", [dict(), dict(pattern="WG", window=64)])
def test_packed_documents_lose_what_they_lose_alone(pattern):
    """Two documents in one row, by cuDNN with segments, against each in a row of its own, without."""
    cfg, params = model(**pattern)
    forward = transformer.Forward(cfg)
    assert forward.dtype == jnp.bfloat16
    tokens = np.random.default_rng(0).integers(0, 512, (1, T)).astype(np.int32)
    half = T // 2
    packed = {
        "tokens_BT": tokens, "targets_BT": tokens, "segments_BT": np.repeat([[1, 2]], half, axis=1),
        "positions_BT": np.tile(np.arange(half), 2)[None],
    }  # fmt: skip
    alone = {"tokens_BT": tokens.reshape(2, half), "targets_BT": tokens.reshape(2, half)}
    run = jax.jit(lambda batch: forward.losses(params, batch).nll_BT)
    got, expected = np.asarray(run(packed)).reshape(2, half), np.asarray(run(alone))
    assert apart(got, expected) < 5e-3
    wrong = np.asarray(run({**packed, "segments_BT": np.ones((1, T), np.int32)})).reshape(2, half)
    assert apart(wrong[0], expected[0]) < 5e-3 and apart(wrong[1], expected[1]) > 2e-2  # what a leak would look like


def test_the_bfloat16_losses_on_cudnn_are_the_float32_losses_of_the_reference():
    cfg, params = model()
    exact = dataclasses.replace(cfg, attention="reference", dtype="float32")
    tokens = np.random.default_rng(1).integers(0, 512, (4, T)).astype(np.int32)
    batch = {"tokens_BT": tokens, "targets_BT": np.roll(tokens, -1, axis=1)}

    def run(cfg, precision):
        with jax.default_matmul_precision(precision):
            loss = jax.jit(jax.value_and_grad(lambda p: transformer.Forward(cfg).losses(p, batch).nll_BT.mean()))
            return loss(params)

    (loss, grads), (true, true_grads) = run(cfg, "default"), run(exact, "highest")
    assert abs(loss - true) < 5e-3
    flat = lambda tree: np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])  # noqa: E731
    assert apart(flat(grads), flat(true_grads)) < 3e-2


def test_generation_has_the_learners_log_probabilities():
    """Greedy replies of prompts of several lengths, continuous batching, in bfloat16: each token's log-probability is
    the learner's to rounding, and no other token would have been likelier by more than that."""
    cfg, params = model()
    forward = transformer.Forward(cfg)
    rng = np.random.default_rng(2)
    prompts = [rng.integers(1, 512, n).tolist() for n in (3, 40, 17, 9)]
    player = Engine(cfg, slots=2)
    done = player.run(player.prepare(params), [(p, Sampling(48, 0.0).numbered(i)) for i, p in enumerate(prompts)])
    learner = jax.jit(lambda tokens: jax.nn.log_softmax(
        forward.logits(params, forward.hidden(params, {"tokens_BT": tokens})[0])))  # fmt: skip
    for prompt, reply in zip(prompts, done, strict=True):
        row = np.zeros((1, 128), np.int32)
        whole = [*prompt, *reply.tokens]
        row[0, : len(whole)] = whole
        logps_TV = np.asarray(learner(row))[0, len(prompt) - 1 : len(whole) - 1]
        at = np.asarray(reply.tokens)
        taken_T = logps_TV[np.arange(len(at)), at]
        assert (logps_TV.max(axis=-1) - taken_T).max() < 0.1
        assert np.abs(np.asarray(reply.logps) - taken_T).max() < 0.1


def test_microbatches_and_rematerialisation_change_nothing_but_rounding():
    cfg, _ = model()
    mesh = meshes.make(schema.Mesh())
    tokens = np.random.default_rng(3).integers(0, 512, (8, T + 1)).astype(np.int32)
    batch = meshes.put({"tokens_BT": tokens[:, :-1], "targets_BT": tokens[:, 1:],
                        "weights_BT": np.ones((8, T), np.float32)}, mesh)  # fmt: skip
    losses = []
    for accumulate, remat in ((1, "none"), (4, "none"), (2, "dots"), (2, "full")):
        c = dataclasses.replace(cfg, remat=remat)
        forward, axes = transformer.Forward(c, mesh), transformer.axes(c)
        tx, schedule = optim.make(schema.Optim(name="adamw", lr=1e-3), 10, axes)
        start, abstract = step.make_init(lambda key, c=c: transformer.init(c, key), tx, axes, mesh)
        update = step.make_update(pretrain.pretrain, forward, tx, schedule, abstract, mesh, pretrain.Pretrain(),
                                  accumulate)  # fmt: skip
        state, mine = start(jax.random.key(0)), []
        for _ in range(6):
            state, metrics = update(state, batch)
            mine.append(float(metrics["loss"]))
        losses.append(mine)
    assert losses[0][-1] < losses[0][0] - 0.5  # the same rows again and again are learned
    np.testing.assert_allclose(losses[1:], [losses[0]] * 3, rtol=3e-3)
