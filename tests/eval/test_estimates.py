"""Intervals hold what they promise; words, sentences, passages and n-grams are what they are called."""

import collections
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain.eval import estimates, texts
from lmtrain.types import LmtrainError
from tests.eval import toys


def covered(make, truth, times=200):
    """How often the interval of a fresh sample holds the truth."""
    rng = np.random.default_rng(0)
    found = [make(rng, k) for k in range(times)]
    return np.mean([e.low <= truth <= e.high for e in found])


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    def share(rng, k):
        return estimates.share(rng.random(100) < 0.3, k)

    def ratio(rng, k):
        n = rng.integers(1, 30, 60)
        return estimates.ratio(n * rng.normal(2.0, 0.5, 60), n, k)

    def difference(rng, k):
        a, b = rng.integers(1, 30, 60), rng.integers(1, 30, 80)
        return estimates.difference((a * rng.normal(2, 0.5, 60), a), (b * rng.normal(2.5, 0.5, 80), b), k)

    for make, truth in ((share, 0.3), (ratio, 2.0), (difference, 0.5)):
        assert 0.88 <= covered(make, truth) <= 0.99


def test_a_ratio_weighs_rows_as_they_are_long():
    e = estimates.ratio([10.0, 1.0], [10.0, 2.0], 0, "nats")
    assert e.value == pytest.approx(11 / 12) and e.rows == 2 and e.low <= e.value <= e.high


def test_two_samples_are_drawn_apart_even_where_they_are_alike():
    values, ones = np.random.default_rng(0).normal(size=50), np.ones(50)
    e = estimates.difference((values, ones), (values, ones), 0)
    assert e.value == 0 and e.low < -0.1 and e.high > 0.1 and e.rows == 100


def test_rows_that_all_say_the_same_are_not_certain():
    assert estimates.share([1.0] * 20, 0).low < 0.9 and estimates.share([0.0] * 20, 0).high > 0.1


def test_the_same_seed_gives_the_same_interval_and_another_another():
    values = np.random.default_rng(0).normal(size=50)
    assert estimates.mean(values, 3) == estimates.mean(values, 3) != estimates.mean(values, 4)


def test_the_interval_of_a_whole_sample_holds_its_value():
    """Resampled texts repeat, which lowers distinct-n: a plain percentile interval would lie below the value."""
    found = [texts.words(d) for d in toys.documents(40, 3)]
    e = estimates.of_whole(texts.Distinct(found, 2), 40, 0)
    plain = [texts.Distinct(found, 2)(np.random.default_rng(k).integers(40, size=40)) for k in range(50)]
    assert max(plain) < e.value and e.low < e.value < e.high


def test_no_rows_are_refused():
    with pytest.raises(LmtrainError, match="at least one row"):
        estimates.mean([], 0)


# ------------------------------------------------------------------------------------------------------------ texts
@settings(max_examples=200)
@given(st.text("Ab .!?\n\"')é", max_size=80))
def test_sentences_joined_are_the_text(text):
    assert "".join(texts.sentences(text)) == text


def test_sentences_end_with_signs_and_lines():
    text = 'He ran far away. "Why did he?" She asked him. It cost 3.14 in all\nA new line follows here'
    assert [s.strip() for s in texts.sentences(text)] == [
        "He ran far away.", '"Why did he?"', "She asked him.", "It cost 3.14 in all", "A new line follows here",
    ]  # fmt: skip


@settings(max_examples=100)
@given(st.integers(0, 1000), st.integers(2, 8))
def test_disturbed_texts_have_the_same_words_in_another_order(seed, count):
    rng = random.Random(seed)
    pieces = texts.sentences(" ".join(toys.sentences(rng, count)))
    whole = "".join(pieces)
    mixed = texts.shuffle_sentences(pieces, rng)
    assert not mixed or mixed != whole and sorted(mixed.split(". ")) != [] and len(mixed) == len(whole)
    assert not mixed or collections.Counter(texts.words(mixed)) == collections.Counter(texts.words(whole))
    words = texts.shuffle_words(whole, rng)
    assert words != whole and sorted(words.split()) == sorted(whole.split()) and len(words) == len(whole)
    assert mixed == "" or {s.strip() for s in texts.sentences(mixed)} == {s.strip() for s in pieces}


def test_what_cannot_be_disturbed_is_not():
    rng = random.Random(0)
    assert texts.shuffle_words("so so  so", rng) == "" and texts.shuffle_sentences(["A b c. ", "A b c. "], rng) == ""


@pytest.mark.parametrize("longest", [40, 64, 128])
def test_passages_fit_and_lie_in_the_documents_in_order(longest):
    docs = toys.documents(6, 30)
    found, cut = texts.passages(docs, toys.bpe(), longest)
    assert not cut and len(found) > 6 and [p.number for p in found] == list(range(len(found)))
    for p in found:
        whole = p.context + p.continuation
        assert (
            whole in docs[p.document]
            and len(p.sentences) >= 2
            and p.first + len(p.sentences) == len(p.pieces)
            and p.context.strip()
        )
        assert len(toys.bpe().encode(whole)) < longest
    share = np.mean([len(p.context) / len(p.context + p.continuation) for p in found])
    assert 0.25 < share < 0.65


def test_sentences_that_do_not_fit_are_cut_between_words():
    docs = toys.documents(6, 30)
    found, cut = texts.passages(docs, toys.bpe(), 16)
    assert cut and len(found) > 30
    for p in found:
        assert p.context + p.continuation in docs[p.document] and len(p.pieces) >= 3
        assert all(piece.rstrip()[-1:] in (".", "") or piece[-1:].isspace() for piece in p.pieces)


def test_repetition_and_distinct_by_hand():
    a, b = "a b a b a".split(), "a c".split()
    assert texts.repetition(a, 1) == pytest.approx(3 / 5) and texts.repetition(a, 2) == pytest.approx(2 / 4)
    assert texts.repetition(b, 2) == 0 == texts.repetition(b, 3)
    both = np.array([0, 1])
    assert texts.Distinct([a, b], 1)(both) == pytest.approx(3 / 7)
    assert texts.Distinct([a, b], 2)(both) == pytest.approx(3 / 7)  # ab ba ac
    assert texts.Distinct([a, b], 1)(np.array([1, 1])) == pytest.approx(2 / 4)
    assert texts.Distinct([a, b], 4)(np.array([1])) == 0 and texts.Distinct([[]], 1)(np.array([0])) == 0
