"""Tasks read from files: GSM8K, and programs scored in the sandbox."""

import gzip
import json
import pathlib
import sys

import pytest

from lmtrain import tasks
from lmtrain.tasks import code, numbers
from lmtrain.types import LmtrainError

REAL = pathlib.Path(__file__).parents[3] / "shared" / "data" / "gsm8k_train.jsonl"


def write(path, rows):
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    (gzip.open if path.suffix == ".gz" else open)(path, "wt").write(text)
    return str(path)


def sums(count):
    return [
        {"question": f"What is {i} and {i + 1}?", "answer": f"<<{i}+{i + 1}={2 * i + 1}>>\n#### {2 * i + 1}"}
        for i in range(count)
    ]


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("72", "72"), ("72.", "72"), ("$1,234.50 dollars", "1234.5"), ("-3 apples", "-3"), ("18.00", "18"),
        ("007", "7"),
        ("1,234,567", "1234567"), (".5", "0.5"), ("50%", "50"), ("−4", "-4"), ("10-3", "3"), ("a-3", "3"),
        ("x = -3", "-3"),
        ("1, 2, 3", "3"), ("1,2345", "2345"), ("-0", "0"), ("0.0", "0"), ("1.2.3", "0.3"), ("", ""),
        ("none", ""), ("٣", ""),
        ("9" * 61, ""),
    ],
)  # fmt: skip
def test_a_number_is_read_as_people_write_it(text, value):
    assert numbers.last(text) == value


# ---------------------------------------------------------------- GSM8K


def test_gsm8k_wants_the_number_behind_the_last_mark(tmp_path):
    task = tasks.get(f"gsm8k(path={write(tmp_path / 'a.jsonl', sums(60))!r}, format_score=0.1)")
    row = {"question": "?", "answer": "", "number": "1234"}
    right = ["#### 1234", "So\n#### 1,234", "#### $1,234.00", "#### 1234 apples", "#### 5\nno:\n#### 1234", "####1234"]
    assert [task.score(row, r) for r in right] == [1] * 6
    wrong = [
        "1234",
        "The answer is 1234",
        "#### 1234\n#### 5 apples",
        "#### 12345",
        "#### -1234",
        "#### 1 2 3 4",
        "1234 ####",
        "####\n1234",
    ]
    assert all(task.score(row, r) < 1 for r in wrong)
    formed = ["#### 5", "so\n#### 1,235", "#### -7.5\n"]
    assert [task.score(row, r) for r in formed] == [0.1] * 3
    assert [task.score(row, r) for r in ("#### five", "#### 5 apples", "#### 5\nand so on", "5")] == [0] * 4


def test_gsm8k_is_split_by_its_questions_or_by_a_second_file(tmp_path):
    both = sums(80)
    one = tasks.get(f"gsm8k(path={write(tmp_path / 'a.jsonl.gz', [*both, both[0]])!r})")
    train, held = ({row["question"] for row in one.rows(s)} for s in ("train", "heldout"))
    assert not train & held and len(train | held) == 80 and len(one.rows("train")) == len(train)
    first, second = write(tmp_path / "a.jsonl", both[:60]), write(tmp_path / "b.jsonl", both[50:])
    two = tasks.get(f"gsm8k(path={first!r}, heldout_path={second!r})")
    train, held = ({row["question"] for row in two.rows(s)} for s in ("train", "heldout"))
    assert held == {row["question"] for row in both[50:]} and train == {row["question"] for row in both[:50]}, (
        "held out wins"
    )
    assert "<<" not in two.solution(two.rows("train")[0])[0]["content"]
    asked = tasks.get(f"gsm8k(path={write(tmp_path / 'c.jsonl', both)!r}, instruction='End with #### NUMBER.')")
    assert asked.messages(asked.rows("train")[0])[0]["content"].endswith("?\nEnd with #### NUMBER.")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["{"], ["a.jsonl:1", "JSON"]),
        (["[1]"], ["a.jsonl:1", "list"]),
        ([{"question": "?"}], ["a.jsonl:1", "no field 'answer'"]),
        ([{"question": "?", "answr": "#### 1"}], ["'answer'", "Did you mean answr"]),
        ([{"question": 3, "answer": "#### 1"}], ["question is int"]),
        ([{"question": "?", "answer": "five"}], ["####"]),
        ([], ["no row"]),
    ],
)
def test_gsm8k_names_a_line_that_it_cannot_use(tmp_path, lines, words):
    task = tasks.get(f"gsm8k(path={write(tmp_path / 'a.jsonl', lines)!r})")
    with pytest.raises(LmtrainError) as error:
        task.rows("train")
    for word in words:
        assert word in str(error.value)


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(LmtrainError, match="task gsm8k.*path is not set"):
        tasks.get("gsm8k").rows("train")
    with pytest.raises(LmtrainError, match="no such file.*nowhere"):
        tasks.get("gsm8k(path='nowhere.jsonl')").rows("train")


@pytest.mark.skipif(not REAL.exists(), reason="no GSM8K at hand")
def test_gsm8k_scores_its_own_answers():
    task = tasks.get(f"gsm8k(path={str(REAL)!r})")
    rows = [*task.rows("train"), *task.rows("heldout")]
    assert len(rows) == 7473 and all(task.score(row, task.solution(row)[0]["content"]) == 1 for row in rows)
    assert 0.1 < len(task.rows("heldout")) / 7473 < 0.15


# ---------------------------------------------------------------- programs

DOUBLE = '''from typing import List


def double(xs: List[int]) -> List[int]:
    """Twice each.
    >>> double([1])
    [2]
    """
'''
ROOT = '''import math


def poly(xs, x):
    return sum(c * math.pow(x, i) for i, c in enumerate(xs))


def root(xs):
    """A zero of poly, of degree 1."""
'''
HUMAN_EVAL = [
    {
        "task_id": "Test/0",
        "entry_point": "double",
        "prompt": DOUBLE,
        "canonical_solution": "    return [2 * x for x in xs]\n",
        "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate([1, 2]) == [2, 4]\n",
    },
    {
        "task_id": "Test/1",
        "entry_point": "root",
        "prompt": ROOT,
        "canonical_solution": "    return -xs[0] / xs[1]\n",
        "test": "def check(candidate):\n    for xs in ([1, 2], [-6, 3]):\n        assert poly(xs, candidate(xs)) == 0",
    },
]
MBPP = {
    "task_id": 11,
    "text": "Write a function to remove the first and last occurrence of a character.",
    "code": "def remove_Occ(s, c):\n    s = s.replace(c, '', 1)\n    i = s.rfind(c)\n    return s[:i] + s[i + 1 :]",
    "test_setup_code": "",
    "test_list": [
        'assert remove_Occ("hello","l") == "heo"',
        'assert remove_Occ("abcda","a") == "bcd"',
        "assert set([1]) == {1}",
    ],
}

pytest_linux = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is for Linux")


@pytest.fixture
def programs(tmp_path):
    path = write(tmp_path / "code.jsonl", [*HUMAN_EVAL, MBPP])
    task = tasks.get(f"code(path={path!r}, heldout_path={path!r}, seconds=4.0, cpu_seconds=2)")
    return task, {row["id"]: row for row in task.rows("heldout")}


@pytest_linux
def test_code_scores_its_own_solutions(programs):
    task, rows = programs
    assert set(rows) == {"Test/0", "Test/1", "11"}
    for row in rows.values():
        assert task.score(row, task.solution(row)[0]["content"]) == 1.0
        assert json.loads(json.dumps(row)) == row
    assert 'remove_Occ("hello","l") == "heo"' in task.messages(rows["11"])[0]["content"]
    assert "abcda" not in task.messages(rows["11"])[0]["content"], "one test is shown"
    assert rows["11"]["entry_point"] == "remove_Occ"


BODY = "    return [x + x for x in xs]"
FUNCTION = f"def double(xs):\n{BODY}"
REPLIES = {
    "the rest of the body": (BODY, 1),
    "the rest, as a template strips it": (BODY.strip(), 1),
    "several lines": ("    ys = []\n    for x in xs:\n        ys.append(x * 2)\n    return ys\n", 1),
    "the function": (FUNCTION, 1),
    "with the prompt's import": (f"def double(xs: List[int]) -> List[int]:\n{BODY}", 1),
    "fenced": (f"Sure!\n```python\n{FUNCTION}\n```\nIt doubles.", 1),
    "fenced, and cut": (f"```\nprint(double)\n```\nor\n```py\n{FUNCTION}", 1),
    "the last of two": (f"```python\ndef double(xs):\n    return xs\n```\nBetter:\n```python\n{FUNCTION}\n```", 1),
    "a lambda": ("double = lambda xs: [x + x for x in xs]", 1),
    "wrong": ("def double(xs):\n    return xs", 0),
    "words": ("I do not know.", 0),
    "nothing": ("", 0),
    "nothing, fenced": ("```python\n```", 0),
    "another function": ("def other(xs):\n    return xs", 0),
    "endless": ("def double(xs):\n    while True: pass", 0),
    "exit": ("import os\ndef double(xs):\n    os._exit(0)", 0),
    "equal to all": ("class E(list):\n    def __eq__(self, o): return True\ndef double(xs):\n    return E()", 0),
    "check of its own": ("def check(candidate): pass\ndef double(xs): pass", 0),
}


@pytest_linux
@pytest.mark.parametrize("name", REPLIES)
def test_code_takes_a_reply_in_every_usual_form(programs, name):
    task, rows = programs
    reply, score = REPLIES[name]
    assert task.score(rows["Test/0"], reply) == score, task.check(rows["Test/0"], reply)


@pytest_linux
def test_a_program_cannot_replace_the_helper_that_tests_use(programs):
    task, rows = programs
    assert task.score(rows["Test/1"], "def poly(xs, x):\n    return 0\n\ndef root(xs):\n    return 7") == 0
    assert "AssertionError" in task.check(rows["Test/1"], "    return 7").error


@pytest_linux
@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "x"}, ["code.jsonl:1", "HumanEval", "MBPP", "prompt"]),
        ({"prompt": "x", "entry_point": "f"}, ["no field 'test'"]),
        ({"text": "x", "test_list": "assert f(1)"}, ["test_list", "list of assert"]),
        ({"text": "x", "test_list": ["assert 1 == 1"]}, ["calls a function"]),
        ({"test_list": ["assert f(1) == 1"]}, ["no field 'prompt'"]),
    ],
)
def test_code_names_a_row_that_it_cannot_use(tmp_path, row, words):
    task = tasks.get(f"code(path={write(tmp_path / 'code.jsonl', [row])!r})")
    with pytest.raises(LmtrainError) as error:
        task.rows("train")
    for word in words:
        assert word in str(error.value)


@pytest_linux
def test_code_is_refused_before_training_where_programs_cannot_be_locked_in(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(LmtrainError, match="code.*cannot lock a program in"):
        tasks.get("code(path='x')")


@pytest_linux
def test_code_without_a_solution_shows_none(tmp_path):
    row = {k: v for k, v in HUMAN_EVAL[0].items() if k != "canonical_solution"}
    path = write(tmp_path / "code.jsonl", [row])
    task = tasks.get(f"code(path={path!r}, heldout_path={path!r})")
    with pytest.raises(LmtrainError, match="Test/0 has no solution"):
        task.solution(task.rows("heldout")[0])


def test_extract_prefers_the_block_with_the_function():
    assert code.extract("a\n```py\nx = 1\n```\n```\ndef f():\n  pass\n```\n```\ny\n```", "f") == "def f():\n  pass\n"
    assert code.extract("a\n```py\nx = 1\n```\n", "f") == "x = 1\n"
    assert code.extract("    return 1", "f") == "    return 1"
