"""Generation: what the cache gives is what the full forward pass gives, whoever else is in the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmtrain import engine, schema
from lmtrain.models import transformer
from lmtrain.types import LmtrainError

CFG = transformer.resolve(schema.Model(layers=2, width=32, heads=4, kv_heads=2, zero_init=False, tied=False), 40)


@pytest.fixture(scope="module")
def params():
    return transformer.init(CFG, jax.random.key(1))


def test_greedy_decoding_takes_the_full_forward_passs_likeliest_token(params):
    prompt = [3, 1, 4, 1, 5]
    (done,) = engine.generate(CFG, params, [prompt], engine.Sampling(max_tokens=12, temperature=0))
    forward = transformer.Forward(CFG)
    tokens = jnp.asarray([[*prompt, *done.tokens]])
    logits_TV = jax.jit(lambda p: forward.logits(p, forward.hidden(p, {"tokens_BT": tokens})[0]))(params)[0, 4:-1]
    np.testing.assert_array_equal(done.tokens, np.argmax(logits_TV, -1))
    full = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits_TV)), np.array(done.tokens)[:, None], -1)[:, 0]
    np.testing.assert_allclose(done.logps, full, atol=1e-4)
    assert done.finish == "length" and len(set(done.tokens)) > 1


def test_a_prompt_alone_is_answered_as_among_others(params):
    prompts = [[1, 2, 3], [7] * 20, [5], [9, 8, 7, 6, 5, 4, 3]]
    how = engine.Sampling(max_tokens=9, seed=4)
    together = engine.generate(CFG, params, prompts, how)
    alone = engine.generate(CFG, params, prompts[:1], how)[0]
    assert alone.tokens == together[0].tokens
    np.testing.assert_allclose(alone.logps, together[0].logps, atol=1e-4)


def test_seeds_and_rows_draw_differently(params):
    draws = [engine.generate(CFG, params, [[1, 2]] * 2, engine.Sampling(max_tokens=12, seed=s)) for s in (0, 0, 1)]
    assert draws[0][0].tokens == draws[1][0].tokens
    assert draws[0][0].tokens != draws[2][0].tokens
    assert draws[0][0].tokens != draws[0][1].tokens


def test_a_stop_token_ends_its_row_only(params):
    how = engine.Sampling(max_tokens=30, seed=2)
    free = engine.generate(CFG, params, [[1], [2], [3]], how)
    stop = free[0].tokens[4]
    ended = engine.generate(CFG, params, [[1], [2], [3]], engine.Sampling(max_tokens=30, seed=2, stop=(stop,)))
    for before, after in zip(free, ended, strict=True):
        cut = before.tokens.index(stop) if stop in before.tokens else len(before.tokens)
        assert after.tokens == before.tokens[:cut]
    assert ended[0].finish == "stop"


def test_top_k_and_top_p_cut_the_tail_and_nothing_else():
    probabilities = np.array([0.5, 0.25, 0.15, 0.1])
    logits = jnp.log(jnp.asarray(np.tile(probabilities[[2, 0, 3, 1]], (4000, 1)), jnp.float32))
    keys = jax.random.split(jax.random.key(0), 4000)

    def share(temperature=1.0, top_k=0, top_p=1.0):
        tokens, _ = engine.sample(logits, keys, 0, temperature, top_k, top_p)
        return np.bincount(np.asarray(tokens), minlength=4)[[1, 3, 0, 2]] / 4000

    np.testing.assert_allclose(share(), probabilities, atol=0.03)
    np.testing.assert_allclose(share(top_k=2), [2 / 3, 1 / 3, 0, 0], atol=0.03)
    np.testing.assert_allclose(share(top_p=0.7), [2 / 3, 1 / 3, 0, 0], atol=0.03)
    np.testing.assert_allclose(share(top_p=0.76), np.array([0.5, 0.25, 0.15, 0]) / 0.9, atol=0.03)
    np.testing.assert_allclose(share(temperature=0.5), probabilities**2 / (probabilities**2).sum(), atol=0.03)
    np.testing.assert_allclose(share(temperature=0), [1, 0, 0, 0])


def test_log_probabilities_are_the_models_own_whatever_the_sampling():
    logits = jnp.asarray([[0.0, 1.0, 2.0]])
    token, logp = engine.sample(logits, jax.random.split(jax.random.key(0), 1), 0, 0.3, 1, 0.5)
    assert int(token[0]) == 2 and float(logp[0]) == pytest.approx(float(jax.nn.log_softmax(logits)[0, 2]))


@pytest.mark.parametrize(
    "bad", [dict(max_tokens=0), dict(temperature=-1), dict(top_p=0.0), dict(top_p=2.0), dict(top_k=-1)]
)
def test_impossible_sampling_is_refused(bad):
    with pytest.raises(LmtrainError, match=next(iter(bad))):
        engine.Sampling(**bad)


def test_an_empty_prompt_is_refused(params):
    with pytest.raises(LmtrainError, match="without tokens"):
        engine.generate(CFG, params, [[1], []], engine.Sampling())
