"""Log-likelihoods are those of the forward pass over the text alone, whatever else is in the batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain import mesh as meshes
from lmtrain import schema
from lmtrain.data import pack, store, tokenizer
from lmtrain.eval import likelihood
from lmtrain.eval.likelihood import Likelihood, encode_pair
from lmtrain.models import transformer
from lmtrain.models.transformer import Forward
from lmtrain.types import LmtrainError
from tests.eval import toys

CFG = toys.model()
PAD = toys.bpe().pad


def scorer(longest=64, sizes=None):
    mesh = meshes.make(schema.Mesh(**sizes)) if sizes else None
    params = toys.params(CFG)
    if mesh:
        params = jax.device_put(params, meshes.shardings(transformer.axes(CFG), mesh))
    return Likelihood(CFG, params, PAD, longest, mesh)


SIZES = [dict(data=1, fsdp=8), dict(data=8), dict(data=2, fsdp=4), dict(data=4, context=2)]


@functools.cache
def logp_of_rows():
    """One program for all: 64 positions, of which later ones cannot be seen."""
    forward = Forward(CFG)
    run = lambda p, ids: jax.nn.log_softmax(forward.logits(p, forward.hidden(p, {"tokens_BT": ids})[0])[0])  # noqa: E731
    return jax.jit(run)


def by_hand(context, continuation):
    """The same from the logits of one row that is nothing else."""
    ids = [*context, *continuation]
    logp = np.asarray(logp_of_rows()(toys.params(CFG), jnp.array([[*ids, *[8] * 64][:64]])))
    at = range(len(context) - 1, len(ids) - 1)
    return [float(logp[t, ids[t + 1]]) for t in at], all(int(logp[t].argmax()) == ids[t + 1] for t in at)


def pairs(seed, count, most=24):
    rng = np.random.default_rng(seed)
    V = CFG.vocab_size
    draw = lambda: rng.integers(8, V, rng.integers(1, most)).tolist()  # noqa: E731
    return [(draw(), draw()) for _ in range(count)]


def test_a_continuation_costs_what_the_forward_pass_says():
    asked = pairs(0, 12)
    for (context, continuation), got in zip(asked, scorer()(asked), strict=True):
        logps, greedy = by_hand(context, continuation)
        np.testing.assert_allclose(got.logps, logps, atol=2e-4)
        assert got.greedy == greedy and got.total == pytest.approx(sum(logps), abs=1e-3)


def test_the_likeliest_continuation_is_greedy_and_no_other():
    context = [9, 30, 12]
    best = max(range(CFG.vocab_size), key=lambda i: by_hand(context, [i])[0])
    first, second = scorer()([(context, [best]), (context, [best + 1])])
    assert first.greedy and not second.greedy


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 5), st.lists(st.integers(0, 11), min_size=1, max_size=12, unique=True))
def test_what_one_gets_does_not_depend_on_the_batch(seed, kept):
    asked = pairs(seed, 12)
    whole = scorer()(asked)
    for k, got in zip(kept, scorer()([asked[k] for k in kept]), strict=True):
        np.testing.assert_allclose(got.logps, whole[k].logps, atol=1e-5)


@pytest.mark.parametrize("sizes", SIZES)
def test_a_mesh_changes_no_score(sizes):
    asked = pairs(3, 11, most=30)
    for one, many in zip(scorer()(asked), scorer(sizes=sizes)(asked), strict=True):
        np.testing.assert_allclose(many.logps, one.logps, atol=1e-4)
        assert many.greedy == one.greedy


def test_a_context_that_is_too_long_loses_its_beginning():
    (context, continuation), score = (list(range(8, 60)), [70, 71, 72]), scorer(longest=16)
    logps, _ = by_hand([*context, *continuation][-17:-3], continuation)
    np.testing.assert_allclose(score([(context, continuation)])[0].logps, logps, atol=2e-4)
    assert score.cut == 1


@pytest.mark.parametrize("length", [16, 17, 24, 31, 32, 33])
def test_a_continuation_that_is_too_long_is_scored_in_pieces_each_token_once(length):
    rng = np.random.default_rng(length)
    ids = rng.integers(8, CFG.vocab_size, length).tolist()
    got = scorer(longest=16)([([9, 10], ids)])[0].logps
    assert len(got) == length
    if length > 16:  # token t of a later piece of eight is seen with what the row holds before it
        whole = [9, 10, *ids]
        for t in range(length):
            stop = 2 + (t // 8 + 1) * 8
            begin = max(0, stop - 17)
            np.testing.assert_allclose(got[t], by_hand(whole[begin : t + 2], [whole[t + 2]])[0][0], atol=2e-4)


@pytest.mark.parametrize("sizes", [None, SIZES[0]])
def test_rows_of_a_table_cost_what_training_counts(sizes, tmp_path):
    """The same rows by Forward.losses, weighted and summed."""
    from lmtrain.data.pipeline import Documents
    from lmtrain.schema import Data

    ids = [np.array([toys.bpe().end, *toys.bpe().encode(d)], np.uint16) for d in toys.documents(6, 3)]
    file = tmp_path / "a.npy"
    store.write(file, np.concatenate(ids))
    stream = store.Stream([file], [sum(map(len, ids))], np.dtype(np.uint16))
    member = store.Member("", 1.0, stream, stream)
    table = Documents(store.Shards(tmp_path, [member], {"identity": "x"}), Data(row_length=32), toys.bpe())
    picks = [(0, row) for row in range(table.rows[0])]
    nats, tokens = scorer(sizes=sizes).table(table, picks)
    batch = table.batch(picks)
    losses = Forward(CFG).losses(toys.params(CFG), batch).nll_BT
    np.testing.assert_allclose(nats, (losses * batch["weights_BT"]).sum(1), rtol=1e-4)
    assert tokens.tolist() == batch["weights_BT"].sum(1).tolist() and tokens.sum() == pack.count(len(stream), 1)


# ------------------------------------------------------------------------------------------------------------- borders
def test_a_blank_before_the_border_goes_to_the_continuation():
    tok = toys.bpe()
    context, rest = encode_pair(tok, "the cat ", "sat")
    assert (context, rest) == encode_pair(tok, "the cat", " sat")
    assert context == [tok.end, *tok.encode("the cat")] and tok.decode(rest) == " sat"


def test_a_continuation_has_tokens_even_where_it_melts_into_the_context():
    tok = toys.bpe()
    merged = next(i for i in range(264, tok.vocab_size) if len(tok.decode([i])) == 2 and tok.decode([i]).isalpha())
    first, second = tok.decode([merged])
    assert tok.encode(first + second) == [merged]  # one token, so nothing would be left behind the context's one
    context, rest = encode_pair(tok, first, second)
    assert context == [tok.end, *tok.encode(first)] and tok.decode(rest) == second


@settings(max_examples=100, deadline=None)
@given(st.text("abc .\n\té", max_size=12), st.text("abc .\n\té", min_size=1, max_size=12))
def test_no_byte_is_lost_at_the_border_with_a_token_a_byte(context, continuation):
    tok = tokenizer.bytes_tokenizer()
    first, rest = encode_pair(tok, context, continuation)
    assert first[0] == tok.end and rest and tok.decode([*first, *rest]) == context + continuation


def test_a_row_length_of_one_is_refused():
    with pytest.raises(LmtrainError, match="--row-length is 1"):
        likelihood.Likelihood(CFG, toys.params(CFG), PAD, 1)
