"""Rewards: weighted sums of plain functions, and a clear word for one that cannot be."""

import numpy as np
import pytest

from lmtrain.rollout import episodes, rewards
from lmtrain.types import LmtrainError
from tests.rollout import toys


def episode(reply, task=None, truncated=False):
    task = task or toys.Parity()
    e = episodes.start(task, task.rows("train")[0], toys.TEMPLATE, 0)
    e.messages.append({"role": "assistant", "content": reply})
    e.truncated = truncated
    return e


def polite(row, messages):
    return float("please" in messages[-1]["content"])


def nothing(row, messages):
    return float("nan")


def words(row, messages):
    return "many"


def broken(row, messages):
    return 1 / 0


def make(*specs):
    return rewards.make(specs, lambda run: None, toys.TOK.pad)


def test_parts_are_weighted_summed_and_kept():
    reward = make("score", "0.5*tests.rollout.test_rewards:polite")
    some = [episode("please"), episode("abc"), episode("ab please")]
    np.testing.assert_allclose(reward(some), [1.0, 0.0, 1.0 / 3])
    assert some[2].scores == {"score": 0.0, "tests.rollout.test_rewards:polite": 1.0, "reward": pytest.approx(1 / 3)}


def test_a_whole_conversation_is_scored_by_parts():
    e = episode("x", toys.Talk())
    assert make("score")([e])[0] == 0.25 and e.scores == {"a": 0.5, "b": 0.0, "reward": 0.25}


def test_a_cut_reply_scores_nothing():
    assert make("score")([episode("ab"), episode("ab", truncated=True)]).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    "spec, says",
    [
        ("tests.rollout.test_rewards:nothing", "gave nan, but takes a number from 0 to 1; row"),
        ("tests.rollout.test_rewards:words", "gave 'many'"),
        ("tests.rollout.test_rewards:broken", "raised ZeroDivisionError"),
        ("x*score", "'x' is not a number"),
        ("nan*score", "takes a number above 0"),
        ("lenght(low=1)", "Did you mean length"),
        ("tests.rollout.test_rewards:absent", "absent"),
    ],
)
def test_what_cannot_be_a_reward_is_named(spec, says):
    with pytest.raises(LmtrainError, match=says):
        make(spec)([episode("ab")])


def test_a_task_whose_score_is_out_of_range_is_named():
    task = type("Odd", (toys.Parity,), {"score": lambda self, row, reply: 2.0, "name": "odd"})()
    with pytest.raises(LmtrainError, match="task odd, score: gave 2.0, but takes a number from 0 to 1"):
        make("score")([episode("ab", task)])


def test_no_reward_at_all_is_refused():
    with pytest.raises(LmtrainError, match="rollout.rewards is empty"):
        make()
