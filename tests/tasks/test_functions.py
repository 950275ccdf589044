"""Functions to be written: what is asked, and that only a program which does it counts."""

import sys

import pytest

from lmtrain import sandbox, tasks
from lmtrain.tasks import functions
from lmtrain.types import LmtrainError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is for Linux")
ROW = {"steps": [["keep the even ones", 0], ["add {k} to each", 3]], "end": "return their sum"}


def test_what_is_asked_and_what_counts():
    task = tasks.get("functions")
    assert task.messages(ROW)[0]["content"] == ("Write solve(xs): keep the even ones, add 3 to each, return their sum.")
    right = "def solve(xs):\n    return sum(x + 3 for x in xs if not x % 2)"
    wrong = right.replace("3", "4"), right.replace("sum(", "list("), "def f(xs): return 0", "solve = 3", "I can't", ""
    assert task.score(ROW, right) == 1 and task.score(ROW, f"Sure:\n```python\n{right}\n```") == 1
    assert [task.score(ROW, reply) for reply in wrong] == [0] * len(wrong)


@pytest.mark.parametrize("step", functions.STEPS)
def test_each_step_is_what_it_says_and_no_other(step):
    """Its program passes, that of any other step does not: the lists tell them apart."""
    task = tasks.get("functions")
    row = {"steps": [[step, 3 if "{k}" in step else 0]], "end": "return them"}
    replies = {s: functions.written({**row, "steps": [[s, 3 if "{k}" in s else 0]]}) for s in functions.STEPS}
    assert [s for s, reply in replies.items() if task.score(row, reply)] == [step]


def test_a_sloppy_demonstration_is_wrong_and_any_other_right():
    task = tasks.get("functions(sloppy=0.5)")
    rows = task.rows("train")[:24]
    scores = [task.score(row, task.solution(row)[0]["content"]) for row in rows]
    assert scores == [float(task.slip(row) is None) for row in rows] and 0 < sum(scores) < 24


def test_what_is_no_python_is_not_run_and_what_was_run_is_not_run_again(monkeypatch):
    task, ran = tasks.get("functions"), []
    monkeypatch.setattr(sandbox, "check", lambda *a, **k: ran.append(a) or sandbox.Result(True, "", "", 0.0))
    assert task.score(ROW, "def solve(xs)\n    return 0") == 0 and not ran
    assert [task.score(ROW, "def solve(xs): return 0") for _ in range(3)] == [1] * 3 and len(ran) == 1
    assert task.score({**ROW, "end": "return them"}, "def solve(xs): return 0") == 1 and len(ran) == 2


def test_it_is_refused_before_training_where_programs_cannot_be_locked_in(monkeypatch):
    def no(*args, **kwargs):
        raise LmtrainError("no Landlock")

    monkeypatch.setattr(sandbox, "run", no)
    with pytest.raises(LmtrainError, match="functions.*no Landlock"):
        tasks.get("functions")
