"""Several problems in one conversation: each its own task's, asked in turn, scored one by one."""

import pytest

from lmtrain import tasks
from lmtrain.data import messages as messages_lib
from lmtrain.types import LmtrainError

SPEC = "several(tasks=('addition(reversed=True)', 'spelling', 'sorting'), weights=(4, 1, 2), turns=3)"


@pytest.fixture(scope="module")
def task():
    return tasks.get(SPEC)


def played(task, row, replies):
    """The conversation that a policy with these replies has with the task."""
    talk = task.messages(row)
    for reply in replies:
        talk = [*talk, {"role": "assistant", "content": reply}]
        talk = [*talk, *(task.respond(row, talk) or ())]
    return talk


def test_a_demonstration_is_what_a_right_policy_would_have_said(task):
    lengths = set()
    for row in task.rows("train")[:200]:
        talk = [*task.messages(row), *task.solution(row)]
        messages_lib.check(talk, learn=True)
        replies = [m["content"] for m in talk if m["role"] == "assistant"]
        assert played(task, row, replies) == talk and task.respond(row, talk) is None
        assert task.score_conversation(row, talk) == {"score": 1.0} and task.score(row, replies[0]) == 1
        lengths.add(len(replies))
    assert lengths == {1, 2, 3}


def test_each_answer_counts_alike_and_what_was_not_asked_is_wrong(task):
    row = next(row for row in task.rows("heldout") if len(row["problems"]) == 3)
    right = [m["content"] for m in task.solution(row) if m["role"] == "assistant"]
    assert task.score_conversation(row, played(task, row, [right[0], "?", right[2]])) == {"score": 2 / 3}
    assert task.score_conversation(row, played(task, row, right[:1])) == {"score": 1 / 3}
    cut = played(task, row, right)
    cut[-1] = {**cut[-1], "truncated": True}
    assert task.score_conversation(row, cut) == {"score": 2 / 3}
    assert task.score_conversation(row, played(task, row, right[::-1]))["score"] < 1


def test_problems_are_drawn_by_weight_and_from_their_own_split(task):
    found = [one["task"] for row in task.rows("train")[:2000] for one in row["problems"]]
    assert [found.count(k) / len(found) for k in range(3)] == pytest.approx([4 / 7, 1 / 7, 2 / 7], abs=0.03)
    held = [set(map(t.problem, t.rows("heldout"))) for t in task.tasks]
    for split, inside in (("train", False), ("heldout", True)):
        for row in task.rows(split)[:300]:
            assert all((task.tasks[p["task"]].problem(p["row"]) in held[p["task"]]) is inside for p in row["problems"])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("tasks=('adition',)", "Did you mean addition"),
        ("tasks='addition'", "takes a list in brackets"),
        ("tasks=()", "one task or more"),
        ("tasks=('addition',), weights=(1, 2)", "a weight for each"),
        ("tasks=('addition',), weights=(0,)", "numbers above 0"),
        ("tasks=('calculator',)", "answered in one reply"),
        ("turns=0", "turns is 0"),
    ],
)
def test_what_cannot_be_is_named(settings, says):
    with pytest.raises(LmtrainError, match=says):
        tasks.get(f"several({settings})")
