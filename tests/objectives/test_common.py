"""Sums over conversations, divergences, advantages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmtrain.objectives import common
from lmtrain.schema import ConfigError

SEGMENTS = np.array(
    [[1, 1, 1, 2, 2, 3, 0], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0], [2, 2, 2, 3, 4, 4, 4]], np.int32
)


# ------------------------------------------------------------------------------------------------- conversations, pairs
def test_sums_go_over_one_conversation_and_back_to_its_tokens():
    x_BT = np.random.default_rng(0).normal(size=SEGMENTS.shape).astype(np.float32)
    x_BS = common.per_segment(x_BT, SEGMENTS)
    assert x_BS.shape == (4, 8)  # even, so that pairs come out
    for b in range(4):
        for s in range(8):
            assert float(x_BS[b, s]) == pytest.approx(x_BT[b][SEGMENTS[b] == s + 1].sum(), abs=1e-6)
    back = np.asarray(common.spread(x_BS, SEGMENTS))
    for b, t in np.ndindex(SEGMENTS.shape):
        s = SEGMENTS[b, t]
        assert back[b, t] == (x_BS[b, s - 1] if s else 0)
    first, second = common.pairs(x_BS)
    assert (np.asarray(first) == x_BS[:, [0, 2, 4, 6]]).all() and (np.asarray(second) == x_BS[:, [1, 3, 5, 7]]).all()


def test_the_last_token_is_the_one_before_another_conversation_or_padding():
    assert np.argwhere(common.last_token(SEGMENTS)).tolist() == [
        [0, 2], [0, 4], [0, 5], [1, 6], [3, 2], [3, 3], [3, 6]]  # fmt: skip
    x_BT = np.arange(28.0).reshape(4, 7)
    assert common.read_last(x_BT, SEGMENTS)[0].tolist() == [2, 4, 5, 0, 0, 0, 0, 0]


def test_a_conversation_s_weights_are_shared_out_to_one():
    w_BT = np.array([[0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0], [0] * 7, [1, 1, 1, 0, 0.5, 0.5, 0]], np.float32)
    share = np.asarray(common.per_sequence(w_BT, SEGMENTS))
    assert share.tolist() == [
        [0, 0.5, 0.5, 1, 0, 0, 0],
        [0] * 7,
        [0] * 7,
        pytest.approx([1 / 3] * 3 + [0, 0.5, 0.5, 0]),
    ]


def test_a_batch_without_segments_has_one_conversation_a_row():
    assert (np.asarray(common.segments({"tokens_BT": np.zeros((2, 3), np.int32)})) == 1).all()


# ---------------------------------------------------------------------------------------------------------- divergence
@pytest.mark.parametrize("kind", common.KL)
def test_the_gradient_that_an_estimate_has_as_a_loss(kind):
    """In expectation over the policy's own tokens, enumerated. k1's vanishes: as a loss it holds nothing back."""
    rng = np.random.default_rng(0)
    ref = jax.nn.log_softmax(rng.normal(size=6))
    logits = jnp.asarray(rng.normal(size=6))
    p = jax.nn.softmax(logits)  # the sampling takes no gradient

    got = jax.grad(lambda z: (p * common.kl(jax.nn.log_softmax(z), ref, kind)).sum())(logits)
    reverse = jax.grad(lambda z: (jax.nn.softmax(z) * (jax.nn.log_softmax(z) - ref)).sum())(logits)
    forward = jax.grad(lambda z: (jnp.exp(ref) * (ref - jax.nn.log_softmax(z))).sum())(logits)
    expected = {"k1": 0 * reverse, "k2": reverse, "k3": forward}[kind]
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert np.abs(reverse - forward).max() > 0.05


def test_the_estimates_of_a_divergence():
    lp, ref = np.array([-1.0, -2.0, -0.1]), np.array([-1.5, -1.0, -0.1])
    assert common.kl(lp, ref, "k1").tolist() == pytest.approx([0.5, -1, 0])
    assert common.kl(lp, ref, "k2").tolist() == pytest.approx([0.125, 0.5, 0])
    assert common.kl(lp, ref, "k3").tolist() == pytest.approx([np.exp(-0.5) - 1 + 0.5, np.e - 2, 0], rel=1e-6)


# ---------------------------------------------------------------------------------------------------------- advantages
def test_advantages_of_a_group():
    r = np.array([[1, 0, 0, 1], [0.3, 0.3, 0.3, 0.3], [5, 1, 2, 0.0]])
    for row in range(3):
        mean = r[row].sum() / 4
        std = np.sqrt(((r[row] - mean) ** 2).sum() / 3)
        others = [(r[row].sum() - x) / 3 for x in r[row]]
        for kind, expected in {
            "group": (r[row] - mean) / (std + 1e-4), "group_mean": r[row] - mean, "leave_one_out": r[row] - others,
        }.items():  # fmt: skip
            np.testing.assert_allclose(common.group_advantages(r, kind)[row], expected, atol=1e-12)
    for kind in common.ADVANTAGES:
        a = common.group_advantages(r, kind)
        np.testing.assert_allclose(a.sum(axis=1), 0, atol=1e-12)
        assert (a[1] == 0).all() and a.dtype == np.float64
        assert (common.group_advantages(r[:, :1], kind) == 0).all()  # a group of one
    with pytest.raises(ConfigError, match="advantage is 'groop'.*Did you mean group"):
        common.group_advantages(r, "groop")


def test_rewards_that_differ_in_a_digit_keep_their_sign():
    """In float32 the mean would eat the difference."""
    r = 1000 + np.array([[0, 1e-6]])
    np.testing.assert_allclose(common.group_advantages(r, "group_mean"), [[-5e-7, 5e-7]], rtol=1e-3)


def test_generalised_advantages_are_the_discounted_sum_of_surprises():
    rng = np.random.default_rng(1)
    values, extra, gamma, lam = rng.normal(size=9), rng.normal(size=9), 0.9, 0.8
    rewards = extra + np.append(np.zeros(8), 2.0)
    surprise = rewards + gamma * np.append(values[1:], 0) - values
    expected = [sum((gamma * lam) ** (k - t) * surprise[k] for k in range(t, 9)) for t in range(9)]
    advantages, returns = common.gae(2.0, values, gamma, lam, extra)
    np.testing.assert_allclose(advantages, expected, rtol=1e-12)
    np.testing.assert_allclose(returns, advantages + values)
    _, to_go = common.gae(2.0, values, 1.0, 1.0)
    np.testing.assert_allclose(to_go, 2.0)  # lambda 1: what was really got
    assert common.gae(1.0, np.zeros(0))[0].shape == (0,)


def test_whitening_is_over_all_that_counts_and_nothing_else():
    values = [np.array([1.0, 2, 3]), np.array([1e9, 4])]
    weights = [np.array([1, 1, 1]), np.array([0, 1])]
    a, b = common.whiten(values, weights)
    own = np.array([*a, b[1]])
    assert own.mean() == pytest.approx(0, abs=1e-9) and own.std() == pytest.approx(1) and b[0] == 0
    assert np.diff(own) == pytest.approx(np.full(3, own[1] - own[0]))
