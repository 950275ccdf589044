"""Every backend that runs here means the same as the reference, and sees nothing that it should not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmtrain import schema
from lmtrain.models import attention
from lmtrain.models.attention import attend, choose

B, T, N, K, H = 2, 256, 4, 2, 16
CASES = {
    "causal": {},
    "window": {"window": 100},
    "segments": {"segments": True},
    "all": {"segments": True, "window": 40, "softcap": 1.5, "scale": 0.4},
}


def inputs(segments=False, **options):
    q, k, v = (jax.random.normal(jax.random.key(i), (B, T, n, H)) for i, n in enumerate((N, K, K)))
    marks = jnp.asarray(np.repeat([[1, 2, 3, 0], [1, 1, 2, 2]], T // 4, axis=1)) if segments else None
    return (q, k, v), {"segments_BT": marks, **options}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["xla", "splash"])
def test_a_backend_equals_the_reference_with_its_gradients(backend, case):
    args, options = inputs(**CASES[case])
    weight = jax.random.normal(jax.random.key(9), (B, T, N, H))

    def total(args, backend):
        out = attend(*args, **options, backend=backend)
        return (out * weight).sum(), out

    run = jax.jit(jax.value_and_grad(total, has_aux=True), static_argnums=1)
    (_, expected), expected_grads = run(args, "reference")
    (_, got), grads = run(args, backend)
    np.testing.assert_allclose(got, expected, atol=2e-6)
    for g, e in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(g, e, atol=3e-5)


@pytest.mark.parametrize("backend", ["reference", "xla", "splash"])
@pytest.mark.parametrize("window", [0, 40])
def test_a_query_gets_exactly_no_gradient_from_what_it_may_not_see(backend, window):
    """Query 150 of documents 0-63, 64-127, 128-191, 192-255: later keys, other documents, beyond the window."""
    (q, k, v), options = inputs(segments=True, window=window)
    options["segments_BT"] = jnp.repeat(jnp.array([[1, 2, 3, 4]]), T // 4, axis=1).repeat(B, axis=0)
    f = lambda k, v: attend(q, k, v, **options, backend=backend)[:, 150].sum()  # noqa: E731
    for grad in jax.jit(jax.grad(f, (0, 1)))(k, v):
        touched = np.abs(np.asarray(grad)).max(axis=(0, 2, 3)) > 0
        first = 128 if not window else max(128, 150 - window + 1)
        assert not touched[:first].any() and not touched[151:].any()
        assert touched[first:151].all()


def test_the_reference_is_the_softmax_worked_out_in_float64():
    (q, k, v), _ = inputs()
    q, k, v = (np.asarray(x, np.float64)[0, :20] for x in (q, k, v))
    expected = np.zeros((20, N, H))
    for n in range(N):
        for t in range(20):
            seen = range(max(0, t - 4), t + 1)  # a window of 5
            score = np.array([3.0 * np.tanh(q[t, n] @ k[s, n // 2] * 0.3 / 3.0) for s in seen])
            weight = np.exp(score) / np.exp(score).sum()
            expected[t, n] = sum(w * v[s, n // 2] for w, s in zip(weight, seen, strict=True))
    args = [jnp.asarray(x, jnp.float32)[None] for x in (q, k, v)]
    got = attend(*args, window=5, softcap=3.0, scale=0.3, backend="reference")
    np.testing.assert_allclose(got[0], expected, atol=1e-6)


def test_a_reference_row_that_sees_nothing_gives_zero_and_a_finite_gradient():
    (q, k, v), _ = inputs()
    mask = jnp.ones((1, T, T), bool).at[0, 7].set(False)
    f = lambda v, k: attention.reference(q, k, v, mask, 0.0, 1.0)  # noqa: E731
    assert (f(v, k)[:, 7] == 0).all() and (f(v, k)[:, 8] != 0).any()
    for grad in jax.grad(lambda *a: f(*a).sum(), (0, 1))(v, k):
        assert jnp.isfinite(grad).all()


@pytest.mark.parametrize("window", [0, 2, 3, 9])
def test_a_position_recalls_what_it_would_see_in_its_row(window):
    (q, k, v), _ = inputs()
    how = dict(window=window, softcap=2.0, scale=0.4)
    whole = attend(q, k, v, backend="reference", **how)
    index, at = jnp.array([[100], [37]]), 2  # the new part begins two positions before them
    places = index - at + jnp.arange(4)
    cache = {"at": jnp.int32(at)}
    for name, x in (("k", k), ("v", v)):
        x_BKSH = x.transpose(0, 2, 1, 3)
        seen_BS = jnp.arange(T) < index - at
        cache[name] = jnp.where(seen_BS[:, None, :, None], x_BKSH, -1e3)  # places not written yet must not matter
        new_BKRH = jnp.take_along_axis(x_BKSH, places[:, None, :, None], axis=2)
        cache[f"new_{name}"] = jnp.where(jnp.arange(4)[:, None] < at, new_BKRH, 1e3)
    rows = jnp.arange(2)[:, None]
    got, kept = attention.recall(q[rows, index], k[rows, index], v[rows, index], cache, index, **how)
    np.testing.assert_allclose(got, whole[rows, index], atol=1e-5)
    np.testing.assert_array_equal(kept["k"][:, :, at], k[rows, index][:, 0])


def test_each_platform_gets_its_fastest_backend_that_can():
    assert choose("auto", "cpu") == "xla"
    assert choose("auto", "tpu", length=256) == "splash"
    assert choose("auto", "tpu", length=200) == "xla"
    assert choose("auto", "gpu") == "cudnn"
    assert choose("auto", "gpu", softcap=50.0) == "xla"
    assert choose("auto", "gpu", dtype=jnp.float32) == "xla"
    assert choose("reference", "tpu") == "reference"


def test_what_a_backend_cannot_do_it_refuses_by_name(monkeypatch):
    args, options = inputs()
    with pytest.raises(schema.ConfigError, match=r"'cudnn' takes an NVIDIA GPU, this is a cpu"):
        attend(*args, **options, backend="cudnn")
    with pytest.raises(schema.ConfigError, match=r"'splash' takes rows in multiples of 128.*got 100"):
        attend(*(x[:, :100] for x in args), backend="splash")
    with pytest.raises(schema.ConfigError, match=r"'flash'; it takes auto.*Did you mean splash\?"):
        attend(*args, backend="flash")
    monkeypatch.setattr(attention, "platform", lambda mesh: "gpu")
    half = [x.astype(jnp.bfloat16) for x in args]
    with pytest.raises(schema.ConfigError, match=r"'cudnn' takes no model.attn_softcap, got 5"):
        attend(*half, softcap=5.0, backend="cudnn")
    with pytest.raises(schema.ConfigError, match=r"'cudnn' takes model.dtype bfloat16"):
        attend(*args, backend="cudnn")
