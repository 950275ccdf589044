"""Rewards that need no task, and what is said of one that breaks."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmtrain.tasks import rewards
from lmtrain.types import LmtrainError

ROW = {"topic": "rivers of Lopa", "facts": ["the Vemi", "Suka"]}


def talk(*replies, **fields):
    found = []
    for reply in replies:
        found += [
            {"role": "user", "content": "the Vemi Suka rivers?"},
            {"role": "assistant", "content": reply, **fields},
        ]
    return found


def test_length_is_1_within_the_band_and_falls_outside():
    reward = rewards.get("length(low=4, high=8)")
    values = [reward(ROW, talk("x" * n)) for n in range(20)]
    assert values[4:9] == [1.0] * 5 and values[0] == 0 and values[2] == 0.5 and values[12] == 0.5
    assert values[16:] == [0] * 4
    assert values[:5] == sorted(values[:5]) and values[8:] == sorted(values[8:], reverse=True)
    assert reward(ROW, talk("xxxx", "")) == 0.5, "the mean of the replies"


def test_no_repetition_counts_runs_of_words_within_and_across_replies():
    reward = rewards.get("no_repetition(n=2)")
    assert reward(ROW, talk("a b c d")) == 1
    assert reward(ROW, talk("a b a b a b")) == pytest.approx(2 / 5)
    assert reward(ROW, talk("a b c", "A, b c!")) == 0.5
    assert reward(ROW, talk("a")) == 1


def test_on_topic_and_facts_read_the_reply_not_the_question():
    assert rewards.get("on_topic")(ROW, talk("Lopa has many.", "I like soup.")) == 0.5
    assert rewards.get("on_topic(least=2)")(ROW, talk("Lopa has many.", "Rivers of gold.")) == 0.5
    assert rewards.get("facts")(ROW, talk("It is THE VEMI.")) == 0.5
    assert rewards.get("facts")(ROW, talk("the Vemis", "Suka, the great Vemi")) == 0.5
    assert rewards.get("facts")({"facts": {"river": "Vemi"}}, talk("Vemi")) == 1


def test_ended_reads_the_last_replys_own_word():
    assert rewards.get("ended")(ROW, talk("a", truncated=False)) == 1
    assert rewards.get("ended")(ROW, talk("a", truncated=True)) == 0
    with pytest.raises(LmtrainError, match="reward ended: raised ValueError.*truncated"):
        rewards.get("ended")(ROW, talk("a"))


def test_matches_takes_the_whole_last_reply():
    reward = rewards.get(r"matches(pattern='#### \\d+')")
    assert reward(ROW, talk("no", "#### 12")) == 1 and reward(ROW, talk("#### 12", "no")) == 0
    assert reward(ROW, talk("#### 12 apples")) == 0


def test_names_and_settings_that_cannot_be():
    for spec, words in (
        ("lenght", "Did you mean length"), ("length(lo=3)", "Did you mean low"), ("length(low='3')", "a whole number"),
        ("length(row=3)", "'row' is no setting"), ("nowhere:f", "cannot import"), ("math:pi", "takes a function"),
        ("lmtrain.tasks.rewards:lenght", "Did you mean length"),
    ):  # fmt: skip
        with pytest.raises(LmtrainError, match=words):
            rewards.get(spec)


@pytest.mark.parametrize(
    ("function", "word"),
    [
        (lambda row, messages: 1 / 0, "raised ZeroDivisionError: division by zero"),
        (lambda row, messages: row["nothing"], "raised KeyError: 'nothing'"),
        (lambda row, messages: float("nan"), "gave nan"),
        (lambda row, messages: math.inf, "gave inf"),
        (lambda row, messages: 1.01, "gave 1.01"),
        (lambda row, messages: -0.1, "gave -0.1"),
        (lambda row, messages: "1", "gave '1'"),
        (lambda row, messages: None, "gave None"),
        (lambda row, messages: [1.0], r"gave \[1.0\]"),
        (lambda row, messages: {}, "no parts"),
        (lambda row, messages: {"a": 1.0, "b": float("nan")}, ", b: gave nan"),
    ],
)
def test_a_reward_that_breaks_is_named_with_its_row(function, word, monkeypatch, tmp_path):
    import sys
    import types

    module = types.ModuleType("mine")
    module.f = function
    monkeypatch.setitem(sys.modules, "mine", module)
    with pytest.raises(LmtrainError, match=f"reward mine:f.*{word}.*row .*'topic': 'rivers of Lopa'"):
        rewards.get("mine:f")(ROW, talk("a"))


def test_numbers_of_numpy_and_truth_are_numbers(monkeypatch):
    import sys
    import types

    module = types.ModuleType("mine")
    module.f = lambda row, messages, *, x=0: {"a": np.float32(0.5), "b": True, "c": 1}
    monkeypatch.setitem(sys.modules, "mine", module)
    got = rewards.get("mine:f(x=2)")(ROW, talk("a"))
    assert got == {"a": 0.5, "b": 1.0, "c": 1.0} and {type(v) for v in got.values()} == {float}


@given(st.lists(st.text(max_size=80), max_size=4))
def test_any_conversation_has_a_reward(replies):
    for name in rewards.names():
        value = rewards.get(name)(ROW, talk(*(replies or [""]), truncated=False))
        assert 0 <= value <= 1


def test_a_conversation_without_a_reply_is_worth_nothing_but_its_silence():
    assert rewards.get("length")(ROW, talk()) == 0 and rewards.get("facts")(ROW, talk()) == 0
