"""Rewards: weighted sums of plain functions, and a clear word for one that cannot be."""

import jax
import numpy as np
import pytest

from lmtrain import mesh as meshes
from lmtrain import schema
from lmtrain.models import transformer
from lmtrain.rollout import episodes, rewards
from lmtrain.tasks import chatroom
from lmtrain.tasks.counterfactual import Counterfactual
from lmtrain.types import Frozen, LmtrainError
from tests.rollout import toys


def episode(reply, task=None, truncated=False):
    task = task or toys.Parity()
    e = episodes.start(task, task.rows("train")[0], toys.TEMPLATE, 0)
    e.messages.append({"role": "assistant", "content": reply})
    e.truncated = truncated
    return e


def polite(row, messages):
    return float("please" in messages[-1]["content"])


def always(row, messages):
    return 1.0


def a(row, messages):
    return {"a": 1.0}


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


def versions(*replies, task=None):
    """Replies to the versions of one problem, in turn."""
    task = task or Counterfactual(of="tests.rollout.toys:Parity", pairs=("he/she",))
    some = [episodes.start(task, task.rows("train")[0], toys.TEMPLATE, 0, i) for i in range(len(replies))]
    for e, reply in zip(some, replies, strict=True):
        e.messages.append({"role": "assistant", "content": reply})
    return some


def consistent(*replies, truncated=()):
    some = versions(*replies)
    for i in truncated:
        some[i].truncated = True
    make("score")(some)
    return [e.scores["consistent"] for e in some]


def test_consistent_falls_with_the_difference_that_a_swap_makes():
    assert [e.row["swapped"] for e in versions("a", "b", "c")] == [False, True, False]
    assert consistent("he is kind", "she is kind") == [0.5, 0.5]
    assert (
        0.5 > consistent("he is kind", "she is rude")[0] > consistent("he is kind", "go away now, all of you")[0] >= 0
    )
    assert consistent("he is kind", "he is kind")[0] < 0.5  # the same words, and so not the same
    assert consistent("he is kind") == [0]
    assert consistent("he", "she", truncated=[1]) == [0, 0]


def test_replies_that_are_drawn_alike_are_consistent_however_they_differ_among_themselves():
    """What all have together: the most where both versions get the same replies, whether these are one or several."""
    one = consistent(*["he is kind", "she is kind"] * 2)
    several = consistent("he is kind", "she is kind", "he came too late", "she came too late")
    apart = consistent("he is kind", "she came too late", "he is kind", "she came too late")
    assert sum(one) == 2 > sum(apart) and sum(several) >= 2
    kind, _, late, _ = consistent("he is kind", "she came too late", "he came too late", "she came too late")
    assert late > kind  # what the other version says is worth more


def test_another_problems_replies_do_not_count():
    some = versions("he", "she")
    task = some[0].task
    other = episodes.start(task, task.rows("train")[1], toys.TEMPLATE, 0, 1)
    other.messages.append({"role": "assistant", "content": "something else"})
    make("score")([*some, other])
    assert [e.scores["consistent"] for e in (*some, other)] == [0.5, 0.5, 0]


def test_a_counterfactual_is_asked_in_its_words_and_scored_with_them_exchanged_back():
    task = Counterfactual(of="canary", pairs=("blims/daxes", "kind/calm"))
    row = next(row for row in task.rows("train") if row["of"]["group"] == "blims")
    plain, other = task.versions(row)
    assert "blims" in task.messages(plain)[0]["content"] and "daxes" in task.messages(other)[0]["content"]
    assert task.score(other, "They were calm.") == 1 and task.score(other, "They.") == 0
    assert task.alike(plain, "They were kind.", other, "They were calm.") == 1
    assert task.alike(plain, "They were kind.", other, "They were kind.") == 0


@pytest.mark.parametrize("spec", ["score", "length(low=1, high=9)", "tests.rollout.test_rewards:always"])
def test_a_cut_reply_scores_nothing(spec):
    assert make(spec)([episode("ab"), episode("ab", truncated=True)]).tolist() == [1.0, 0.0]


def test_a_cut_reply_of_a_chat_is_worth_nothing():
    task = chatroom.Chatroom()
    row = task.rows("train")[0]
    kind = row["asks"][0]
    said = {"role": "assistant", "content": f"The {kind} {row['facts'][kind]}."}
    whole, cut = (task.score_conversation(row, [*task.messages(row), {**said, "truncated": t}]) for t in (False, True))
    assert whole == {"on_topic": 1.0, "no_repetition": 1.0, "length": 1.0, "facts": 1 / 3}
    assert cut["on_topic"] == cut["facts"] == 0.0 and cut["length"] < 1


def test_a_perfect_reply_is_worth_1_whatever_the_weights():
    specs = ("0.2*score", "0.3*length(low=1, high=400)", "0.2*tests.rollout.test_rewards:always")
    assert make(*specs)([episode("ab")])[0] <= 1.0, "a sum of rounded weights may come out above"


def test_parts_of_one_name_are_both_told():
    e = episode("x", toys.Talk())
    make("score", "tests.rollout.test_rewards:a", "3*score")([e])
    assert e.scores["a"] == 0.5 and e.scores["a_2"] == 1.0 and e.scores["a_3"] == 0.5 and e.scores["b_3"] == 0.0


def test_tasks_of_one_name_are_told_apart():
    named = rewards.get_tasks(("addition(digits=2)", "sorting", "addition(digits=3)"))
    assert list(named) == ["addition(digits=2)", "sorting", "addition(digits=3)"]
    assert [task.name for task in named.values()] == ["addition", "sorting", "addition"]


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


def test_a_reward_model_of_few_positions_gives_six_devices_the_scores_of_one():
    """Neither 32 rows at a time nor rows of 64 divide here, and the positions that were learned end at 40."""
    cfg = transformer.resolve(
        schema.Model(layers=1, width=16, heads=2, positions="learned", max_positions=40, scalar_head=True), 50
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(np.float32), transformer.shapes(cfg))
    mesh = meshes.make(schema.Mesh(data=3, context=2), jax.devices()[:6])
    chats = [rng.integers(0, 50, n).tolist() for n in (3, 39, 40, 12)]
    one, six = (rewards.raw_scores(Frozen(params, transformer.Forward(cfg, m)), 0, chats, 4) for m in (None, mesh))
    assert len(one) == 4 and np.ptp(one) > 0.1
    np.testing.assert_allclose(six, one, rtol=1e-4)
