"""Generation: what the cache gives is what the full forward pass gives, whoever else is at work, in any order."""

import dataclasses
import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmtrain import engine, runs, schema
from lmtrain import mesh as meshes
from lmtrain.engine import Engine, Sampling
from lmtrain.models import decode, transformer
from lmtrain.models.draw import draw
from lmtrain.types import LmtrainError

V = 40
KINDS = {
    "dense": dict(kv_heads=2, tied=False),
    "windows": dict(
        pattern="WG", window=6, norm="gemma", post_norm=True, attn_softcap=5.0, logit_softcap=8.0, layers=3
    ),
    "learned": dict(positions="learned", max_positions=64, norm="layernorm", out_bias=True),
    "olmo2": dict(
        rope_scaling=schema.RopeScaling("yarn", 4.0, 9, truncate=False), rotary=0.5, qk_norm_over="all", pre_norm=False,
        post_norm=True,
    ),
    "mixture": dict(experts=4, activation="swiglu", scalar_head=True),
}  # fmt: skip


@functools.cache
def model(kind="dense"):
    cfg = transformer.resolve(schema.Model(**dict(layers=2, width=32, heads=4, zero_init=False) | KINDS[kind]), V)
    rng = np.random.default_rng(2)  # no compile

    def fresh(path, leaf):
        name = path[-1].key
        mean, std = (0.8, 0.2) if name == "scale" else (0.0, 1.0 if name == "table" else 0.25)
        return jnp.asarray(rng.normal(mean, std, leaf.shape), jnp.float32)

    return cfg, jax.tree_util.tree_map_with_path(fresh, transformer.shapes(cfg))


@functools.cache
def learner(cfg, width):
    forward = transformer.Forward(cfg)
    return jax.jit(lambda p, tokens: forward.logits(p, forward.hidden(p, {"tokens_BT": tokens})[0]))


def logits_after(kind, prompt, done):
    """The learner's logits at each token of a completion."""
    cfg, params = model(kind)
    row = np.zeros((1, 64), np.int32)
    whole = [*prompt, *done.tokens]
    row[0, : len(whole)] = whole
    return np.asarray(learner(cfg, 64)(params, row))[0, len(prompt) - 1 : len(whole) - 1]


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def requests(count=32):
    """Prompts of many lengths, drawn in many ways."""
    rng = random.Random(0)
    ways = [
        dict(temperature=0), dict(), dict(temperature=0.7, top_k=5), dict(top_p=0.8), dict(min_p=0.1, temperature=1.5),
        dict(top_k=12, top_p=0.9, min_p=0.02), dict(stop=(3, 17)), dict(stop=(5,), temperature=0),
    ]  # fmt: skip
    return [
        ([rng.randrange(V) for _ in range(rng.choice([1, 2, 3, 7, 16, 17, 20]))],
         Sampling(rng.choice([1, 2, 9, 20]), seed=rng.randrange(1 << 40), **rng.choice(ways)))
        for _ in range(count)
    ]  # fmt: skip


def assert_same(got, expected):
    assert [c.tokens for c in got] == [c.tokens for c in expected]
    assert [c.finish for c in got] == [c.finish for c in expected]
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a.logps, b.logps, atol=1e-4)


# ---------------------------------------------------------------------------------------------- against the learner
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_replies_take_the_full_forward_passs_likeliest_tokens(kind):
    cfg, params = model(kind)
    prompts = [[3, 1, 4, 1, 5], [9] * 17, [7]]
    replies = engine.generate(cfg, params, prompts, Sampling(30, 0.0))
    for prompt, done in zip(prompts, replies, strict=True):
        logits_TV = logits_after(kind, prompt, done)
        np.testing.assert_array_equal(done.tokens, np.argmax(logits_TV, -1))
        np.testing.assert_allclose(done.logps, log_softmax(logits_TV)[np.arange(30), done.tokens], atol=1e-4)
        assert done.finish == "length" and len(done.tokens) == 30
    assert len({token for done in replies for token in done.tokens}) > 2


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probabilities_are_the_learners_at_the_sampling_temperature_whatever_was_cut(temperature):
    cfg, params = model()
    how = Sampling(20, temperature, top_k=4, top_p=0.9, min_p=0.05, seed=3)
    (done,) = engine.generate(cfg, params, [[1, 2]], how)
    whole = np.array([[1, 2, *done.tokens]])
    batch = {"tokens_BT": whole[:, :-1], "targets_BT": whole[:, 1:]}
    expected = jax.jit(lambda p: transformer.Forward(cfg).logps(p, batch, temperature=temperature))(params)[0, 1:]
    np.testing.assert_allclose(done.logps, expected, atol=1e-4)


# ------------------------------------------------------------------------------------------ alone and among others
def test_a_prompt_alone_is_answered_as_among_31_others_in_any_order_on_few_slots():
    cfg, params = model()
    asked = requests()
    alone = [Engine(cfg, slots=1).run(params, [r])[0] for r in asked]
    assert {c.finish for c in alone} == {"stop", "length"}
    for slots, seed in ((64, 0), (5, 1), (3, 2)):
        order = random.Random(seed).sample(range(32), 32)
        together = Engine(cfg, slots=slots).run(params, [asked[i] for i in order])
        assert_same(together, [alone[i] for i in order])


def test_requests_that_come_while_others_are_at_work_are_answered_as_alone():
    cfg, params = model()
    asked = requests()
    expected = Engine(cfg).run(params, asked)
    busy, done = Engine(cfg, slots=4), {}
    coming = list(enumerate(asked))
    while coming or busy.busy:
        for i, (prompt, how) in coming[:3]:
            busy.submit(prompt, how, tag=[i])  # a tag need not be hashable
        del coming[:3]
        for tag, completion in busy.step(params, steps=3):
            done[tag[0]] = completion
    assert_same([done[i] for i in range(len(asked))], expected)


def test_a_reply_cut_short_and_taken_up_again_goes_on_as_if_it_had_not_been():
    cfg, params = model()
    how = Sampling(30, seed=8)
    (whole,) = Engine(cfg).run(params, [([4, 5], how)])
    (rest,) = Engine(cfg).run(params, [([4, 5, *whole.tokens[:11]], dataclasses.replace(how, max_tokens=19))])
    assert rest.tokens == whole.tokens[11:]


def test_seeds_and_numbers_draw_differently():
    cfg, params = model()
    draws = [engine.generate(cfg, params, [[1, 2]] * 2, Sampling(12, seed=s)) for s in (0, 0, 1)]
    assert draws[0][0].tokens == draws[1][0].tokens
    assert draws[0][0].tokens != draws[2][0].tokens
    assert draws[0][0].tokens != draws[0][1].tokens
    assert Sampling(seed=7).numbered(0).seed == 7 and len({Sampling(seed=7).numbered(i).seed for i in range(9)}) == 9


def test_parameters_may_change_between_steps():
    cfg, params = model()
    other = jax.tree.map(lambda w: w + 0.1 * jnp.sin(jnp.arange(w.size).reshape(w.shape)), params)
    busy = Engine(cfg)
    growing = busy.submit([1, 2, 3], Sampling(8, 0.0))
    busy.step(params, steps=3)
    first = list(growing.tokens)
    while busy.busy:
        busy.step(other, steps=3)
    kept = engine.generate(cfg, params, [[1, 2, 3]], Sampling(8, 0.0))[0].tokens
    assert growing.tokens[:3] == first == kept[:3] and growing.tokens != kept


# --------------------------------------------------------------------------------------------------- how replies end
def test_a_stop_token_ends_its_own_reply_and_is_kept_with_its_log_probability():
    cfg, params = model()
    prompts, how = [[1], [2], [3]], Sampling(30, seed=2)
    free = engine.generate(cfg, params, prompts, how)
    for at in (0, 4):
        stop = free[0].tokens[at]
        ended = engine.generate(cfg, params, prompts, dataclasses.replace(how, stop=(stop, 39)))
        for before, after in zip(free, ended, strict=True):
            cut = min((before.tokens.index(s) + 1 for s in (stop, 39) if s in before.tokens), default=30)
            assert after.tokens == before.tokens[:cut] and len(after.logps) == cut
            assert after.finish == ("stop" if after.tokens[-1] in (stop, 39) else "length")
            assert after.reply == (after.tokens[:-1] if after.finish == "stop" else after.tokens)
        assert ended[0].finish == "stop"


def test_a_stop_text_ends_the_reply_at_the_token_that_completes_it():
    cfg, params = model()
    spell = lambda ids: "".join(chr(97 + i % 26) for i in ids)  # noqa: E731
    (free,) = engine.generate(cfg, params, [[1]], Sampling(30, seed=2))
    text = spell(free.tokens)
    for start in (0, 9):
        how = Sampling(30, seed=2, stop_texts=("never", text[start : start + 3]))
        (done,) = engine.generate(cfg, params, [[1]], how, decode=spell)
        assert done.tokens == done.reply == free.tokens[: text.index(text[start : start + 3]) + 3]
        assert (
            done.finish == "stop" and done.stop_text == text[start : start + 3] and len(done.logps) == len(done.tokens)
        )
    with pytest.raises(LmtrainError, match="decode=tokenizer.decode"):
        engine.generate(cfg, params, [[1]], how)


def test_a_stream_gives_the_reply_as_it_comes():
    cfg, params = model()
    (done,) = engine.generate(cfg, params, [[1, 2]], Sampling(30, seed=5))
    how = Sampling(30, seed=5, stop=(done.tokens[20],))
    cut = done.tokens.index(done.tokens[20])
    pieces = engine.stream(cfg, params, [1, 2], how)
    assert [next(pieces) for _ in range(2)] + list(pieces) == done.tokens[:cut]


# ------------------------------------------------------------------------------------------------------ draws, cuts
def kept_by_numpy(logits_V, temperature, top_k, top_p, min_p):
    """Which tokens may be drawn: top-k, then top-p, then min-p, by sorting."""
    x = logits_V.astype(np.float64) / (temperature or 1)
    keep = np.ones(len(x), bool)
    if top_k:
        keep &= x >= np.sort(x)[::-1][min(top_k, len(x)) - 1]
    p = np.where(keep, np.exp(x - x.max()), 0)
    order = np.argsort(-p)
    before = np.cumsum(p[order] / p.sum()) - p[order] / p.sum()
    keep &= p >= p[order[before < top_p]].min()  # what ties with the last one stays too
    return keep & (p >= min_p * p.max())


def test_top_k_top_p_and_min_p_keep_what_a_sort_keeps_each_row_its_own():
    rng = np.random.default_rng(0)
    ways = [(t, k, p, m) for t in (0.5, 1.0, 2.0) for k in (0, 1, 3, 500) for p in (1.0, 0.9, 0.3, 1e-6)
            for m in (0.0, 0.05, 0.5, 1.0)]  # fmt: skip
    logits_BV = rng.normal(0, 3, (len(ways), 60)).astype(np.float32)
    logits_BV[:, 7] = logits_BV[:, 9]  # a tie
    t, k, p, m = (np.array(x) for x in zip(*ways, strict=True))
    how = {"temperature_B": np.float32(t), "top_k_B": np.int32(k), "top_p_B": np.float32(p), "min_p_B": np.float32(m)}
    live_B, expected_BV = (
        np.ones(len(ways), bool),
        np.stack([kept_by_numpy(x, *w) for x, w in zip(logits_BV, ways, strict=True)]),
    )
    seen_BV = np.zeros_like(expected_BV)
    run = jax.jit(draw)
    for seed in range(300):
        key_B2 = np.stack([np.full(len(ways), seed), np.arange(len(ways))], 1).astype(np.uint32)
        tokens_B, logps_B = run(logits_BV, how | {"key_B2": key_B2}, np.full(len(ways), 5), live_B)
        seen_BV[np.arange(len(ways)), tokens_B] = True
    assert not (seen_BV & ~expected_BV).any()
    few_B = expected_BV.sum(-1) <= 3
    likely_BV = np.exp(log_softmax(np.where(expected_BV, logits_BV / t[:, None], -np.inf))) > 0.05
    assert few_B.sum() > 50 and (seen_BV | ~likely_BV).all()
    full_BV = log_softmax(logits_BV / t[:, None])
    np.testing.assert_allclose(logps_B, full_BV[np.arange(len(ways)), tokens_B], atol=1e-5)


def test_draws_follow_the_distribution():
    probabilities = np.array([0.5, 0.25, 0.15, 0.1])
    logits = jnp.log(jnp.asarray(np.tile(probabilities[[2, 0, 3, 1]], (4000, 1)), jnp.float32))
    keys = np.stack([np.zeros(4000), np.arange(4000)], 1).astype(np.uint32)
    run, start = jax.jit(draw), np.zeros(4000, np.int32)

    def share(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, keys=keys, positions=start):
        how = {"temperature_B": temperature, "top_k_B": top_k, "top_p_B": top_p, "min_p_B": min_p}
        how = {name: jnp.full(4000, value) for name, value in how.items()} | {"key_B2": keys}
        tokens, _ = run(logits, how, positions, np.ones(4000, bool))
        return np.bincount(np.asarray(tokens), minlength=4)[[1, 3, 0, 2]] / 4000

    np.testing.assert_allclose(share(), probabilities, atol=0.03)
    one_request = dict(keys=np.zeros((4000, 2), np.uint32), positions=np.arange(4000, dtype=np.int32))
    np.testing.assert_allclose(share(**one_request), probabilities, atol=0.03)
    np.testing.assert_allclose(share(top_k=2), [2 / 3, 1 / 3, 0, 0], atol=0.03)
    np.testing.assert_allclose(share(top_p=0.7), [2 / 3, 1 / 3, 0, 0], atol=0.03)
    np.testing.assert_allclose(share(min_p=0.25), np.array([0.5, 0.25, 0.15, 0]) / 0.9, atol=0.03)
    np.testing.assert_allclose(share(temperature=0.5), probabilities**2 / (probabilities**2).sum(), atol=0.03)
    np.testing.assert_allclose(share(temperature=0), [1, 0, 0, 0])


# ------------------------------------------------------------------------------------------------- memory, programs
def test_the_cache_is_updated_in_place_and_let_go_at_the_end():
    cfg, params = model()
    busy = Engine(cfg)
    busy.submit([1] * 20, Sampling(12))
    busy.step(params, steps=2)
    places = lambda: [x.unsafe_buffer_pointer() for x in jax.tree.leaves(busy._cache)]  # noqa: E731
    before = places()
    busy.step(params, steps=2)
    assert places() == before
    while busy.busy:
        busy.step(params)
    assert busy._cache is None and busy._ready is None and busy.step(params) == []


@pytest.mark.parametrize("long, rows, places", [(2, [16, 2], [64, 64]), (16, [16, 16], [64, 32])])
def test_the_cache_is_as_long_and_as_wide_as_the_requests_at_work_need(long, rows, places):
    cfg, params = model()
    busy, seen = Engine(cfg, slots=16), []
    for i in range(16):
        busy.submit([1 + i] * (50 if i == 15 else 1), Sampling(3 if i >= long or i == 15 else 50))
    while busy.busy:
        busy.step(params)
        if busy._cache is not None:
            seen.append(jax.tree.leaves(busy._cache)[0].shape[:3:2])
    assert [list(x) for x in zip(*seen[:2], strict=True)] == [rows, places]
    assert seen[-1] == (rows[1], 64)


def test_ways_to_draw_and_lengths_share_a_few_programs():
    cfg, params = model()
    Engine(cfg, slots=8).run(params, requests())
    before = engine._steps._cache_size(), engine._read._cache_size()
    asked = [(p[::-1], dataclasses.replace(h, top_p=0.5, temperature=h.temperature + 0.1)) for p, h in requests()]
    Engine(cfg, slots=8).run(params, asked[::-1])
    after = engine._steps._cache_size(), engine._read._cache_size()
    assert after[0] - before[0] <= 2 and after[1] - before[1] <= 2


def test_equal_prompts_are_read_once(monkeypatch):
    cfg, params = model()
    seen = []
    read = engine._read
    monkeypatch.setattr(engine, "_read", lambda m, tokens, n: seen.append(tokens.shape) or read(m, tokens, n))
    group = engine.generate(cfg, params, [[1, 2, 3]] * 8 + [[5] * 20], Sampling(5))
    assert seen == [(1, 16), (1, 32)]
    assert group[3].tokens == engine.generate(cfg, params, [[1, 2, 3]], [Sampling(5).numbered(3)])[0].tokens


def test_parameters_may_come_laid_out_for_decoding():
    cfg, params = model("windows")
    laid_out = decode.prepare(cfg, params)
    expected = engine.generate(cfg, params, [[1, 2]], Sampling(6))
    assert_same(engine.generate(cfg, laid_out, [[1, 2]], Sampling(6)), expected)
    assert_same(engine.generate(cfg, transformer.unstack(params), [[1, 2]], Sampling(6)), expected)


# ------------------------------------------------------------------------------------------------------------ meshes
@pytest.mark.parametrize(
    "kind, sizes",
    [("dense", dict(fsdp=4, tensor=2)),
     pytest.param("dense", dict(stage=2, fsdp=2), marks=pytest.mark.slow),
     pytest.param("mixture", dict(stage=2, expert=2, data=2), marks=pytest.mark.slow),
     pytest.param("windows", dict(data=8), marks=pytest.mark.slow),
     pytest.param("mixture", dict(expert=2, tensor=2, fsdp=2), marks=pytest.mark.slow),
     pytest.param("dense", dict(context=2, data=4), marks=pytest.mark.slow)],
)  # fmt: skip
def test_eight_devices_give_the_tokens_of_one_though_they_do_not_divide_the_requests(kind, sizes):
    cfg, params = model(kind)
    mesh = meshes.make(schema.Mesh(**{**dict(data=-1), **sizes}))
    placed = jax.device_put(params, meshes.shardings(transformer.axes(cfg), mesh))
    asked = requests(11)
    assert Engine(cfg, mesh)._padded(1) % meshes.batch_shards(mesh) == 0
    assert_same(Engine(cfg, mesh, slots=3).run(placed, asked), Engine(cfg, slots=3).run(params, asked))


# ------------------------------------------------------------------------------------------------------- wrong input
@pytest.mark.parametrize(
    "bad",
    [dict(max_tokens=0), dict(temperature=-1), dict(temperature=float("nan")), dict(top_p=0.0), dict(top_p=2.0),
     dict(top_k=-1), dict(min_p=1.5), dict(seed=-1), dict(stop_texts="end"), dict(stop_texts=("",))],
)  # fmt: skip
def test_impossible_sampling_is_refused(bad):
    with pytest.raises(LmtrainError, match=next(iter(bad))):
        Sampling(**bad)


def test_no_prompts_give_no_completions_and_a_prompt_that_cannot_be_read_is_refused():
    cfg, params = model()
    assert engine.generate(cfg, params, [], Sampling()) == [] == Engine(cfg).run(params, [])
    with pytest.raises(LmtrainError, match="without tokens"):
        engine.generate(cfg, params, [[1], []], Sampling())
    with pytest.raises(LmtrainError, match="token 40, but the model's vocabulary is 0 to 39"):
        engine.generate(cfg, params, [[1, 40]], Sampling())
    with pytest.raises(LmtrainError, match="slots is 0"):
        Engine(cfg, slots=0)


def test_text_that_may_begin_a_stop_text_waits_for_the_rest():
    assert (
        runs.before_stop("abc", ["x"])
        == runs.before_stop("abcEN", ["END"])
        == runs.before_stop("abcENDx", ["END"])
        == 3
    )
    assert runs.before_stop("abE", ["END", "bE!"]) == 1 and runs.before_stop("", ["a"]) == 0


def test_where_learned_positions_end_a_request_is_refused_and_what_just_fits_is_answered():
    cfg, params = model("learned")
    assert len(engine.generate(cfg, params, [[3] * 40], Sampling(25, 0.0))[0].tokens) == 25
    with pytest.raises(LmtrainError, match="a prompt of 40 tokens and 26 more, but the model's positions end at 64"):
        engine.generate(cfg, params, [[3] * 40], Sampling(26, 0.0))
