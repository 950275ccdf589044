"""What every task promises, whatever it is about."""

import json
import os
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmtrain import tasks
from lmtrain.data import messages as messages_lib
from lmtrain.tasks import generated
from lmtrain.types import LmtrainError

SMALL = [
    "addition", "addition(digits=2)", "addition(reversed=True)", "addition(digits=5, seed=3)", "spelling",
    "spelling(syllables=2)", "sorting", "sorting(least=2, most=4)", "calculator", "calculator(terms=2, digits=2)",
    "chatroom", "chatroom(sloppy=0.5)", "chatroom(turns=1)", "chatroom(turns=6, seed=1)", "several",
    "consistency", "consistency(about='sorting')",
]  # fmt: skip
LISTED = ["pydocs", "pydocs(choices=0)", "pydocs(about='module', choices=2)", "gsm8k(path='FILE')", "canary",
          "canary(people='zogs/wumps', plant=0, others=False)"]  # fmt: skip
SPECS = SMALL + LISTED
PROGRAMS = ["functions", "functions(seed=1)"]  # made, but 60 ms a score: test_functions.py has those tests
MANY = ("chatroom", "several", "consistency", "canary")  # of which a problem has more than one right answer


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Makes each task once; FILE is a small GSM8K."""
    path = tmp_path_factory.mktemp("gsm8k") / "maths.jsonl"
    rows = [{"question": f"Tom has {i} and {j}?", "answer": f"It is <<{i}+{j}={i + j}>>{i + j}.\n#### {i + j}"}
            for i in range(30) for j in range(5)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = {}

    def get(spec):
        if spec not in made:
            made[spec] = tasks.get(spec.replace("FILE", str(path)))
        return made[spec]

    return get


def final(task, row):
    """The last reply of a demonstration."""
    return task.solution(row)[-1]["content"]


@pytest.mark.parametrize("spec", SPECS + PROGRAMS)
def test_no_held_out_problem_is_in_train(make, spec):
    task = make(spec)
    held = {task.problem(row) for row in task.rows("heldout")}
    train = task.rows("train")
    assert held and not held & {task.problem(train[i]) for i in range(0, len(train), max(1, len(train) // 3000))}


@pytest.mark.parametrize(
    "variants",
    [
        ["addition(digits=2)", "addition(digits=2, reversed=True, seed=7)"],
        ["spelling(syllables=3)", "spelling(syllables=4, seed=2)"],
        ["sorting(most=3)", "sorting(most=4, seed=2)"],
        ["calculator(terms=2, digits=1)", "calculator(terms=2, digits=2, seed=5)"],
        ["functions", "functions(steps=2, sloppy=0.5, seed=3)"],
        ["chatroom", "chatroom(turns=3, sloppy=1.0, seed=4)"],
        ["pydocs", "pydocs(choices=0)"],
    ],
    ids=lambda v: v[0].partition("(")[0],
)
def test_nor_under_other_settings_and_seeds(make, variants):
    """Train under one setting, evaluate under another: still no problem of one is in the other."""
    a, b = (make(spec) for spec in variants)
    for x, y in ((a, b), (b, a)):
        held = {x.problem(row) for row in x.rows("heldout")}
        rows = y.rows("train")
        assert not held & {y.problem(rows[i]) for i in range(min(3000, len(rows)))}


@pytest.mark.parametrize(
    ("spec", "row", "other"),
    [
        ("addition", {"a": 12, "b": 34}, {"a": 34, "b": 12}),
        ("spelling", {"word": "lora", "letter": "l"}, {"word": "lora", "letter": "a"}),
        ("sorting", {"words": ["b", "a", "c"]}, {"words": ["c", "b", "a"]}),
        ("chatroom", {"topic": "Lopa", "name": "A", "asks": []}, {"topic": "Lopa", "name": "B", "asks": ["x"]}),
        ("pydocs", {"kind": "module", "subject": "re", "choices": []}, {"kind": "module", "subject": "re"}),
        ("gsm8k(path='FILE')", {"question": "How many? "}, {"question": "How  many?"}),
    ],
)
def test_one_problem_in_other_words_is_one_problem(make, spec, row, other):
    assert make(spec).problem(row) == make(spec).problem(other)


SCORED = [
    # task, row, prompt, replies that score 1, replies that score 0
    ("addition", {"a": 123, "b": 456}, "123+456", ["579", " 579\n"], ["975", "0579", "579 or 580", "five"]),
    ("addition(reversed=True)", {"a": 123, "b": 458}, "123+458", ["185"], ["581"]),
    (
        "spelling",
        {"word": "lorera", "letter": "r"},
        "How many r in lorera?",
        ["l0o0r1e1r2a2 2", "2", "There are 2."],
        ["3", "2 or 3", "two"],
    ),
    (
        "sorting",
        {"words": ["tewi", "kafe", "bo"]},
        "Sort: tewi kafe bo",
        ["bo kafe tewi", "bo, kafe, tewi"],
        ["bo tewi kafe", "bo kafe", "so: bo kafe tewi"],
    ),
    (
        "calculator",
        {"expression": "2*(3-5)", "answer": "-4"},
        "What is 2*(3-5)?",
        ["-4", "It is -4.", "-4.0"],
        ["4", "2*(3-5)", "-4 or 4"],
    ),
    (
        "pydocs",
        {"question": "Which?", "choices": ["re", "os"], "module": "os"},
        "Which?\nA re\nB os",
        ["B", "os", "B os", "B."],
        ["A", "re", "B re", "A B", "b"],
    ),
]


@pytest.mark.parametrize(("spec", "row", "prompt", "right", "wrong"), SCORED, ids=[scored[0] for scored in SCORED])
def test_what_is_asked_and_what_counts(make, spec, row, prompt, right, wrong):
    task = make(spec)
    assert task.messages(row) == [{"role": "user", "content": prompt}]
    assert [task.score(row, reply) for reply in right] == [1.0] * len(right)
    assert [task.score(row, reply) for reply in wrong] == [0.0] * len(wrong)


def test_all_of_a_small_space_is_split_and_both_sides_are_filled():
    task = tasks.get("addition(digits=1)")
    problems = {f"{a}+{b}" for a in range(10) for b in range(a, 10)}
    held = {task.problem(row) for row in task.rows("heldout")}
    train = {task.problem(row) for row in task.rows("train")[:3000]}
    assert held | train == problems and not held & train and 2 <= len(held) <= 14


def test_about_an_eighth_is_held_out():
    share = sum(generated.held_out(str(i)) for i in range(20_000)) / 20_000
    assert 0.11 < share < 0.14


@pytest.mark.parametrize("spec", SPECS + PROGRAMS)
def test_held_out_problems_are_different_and_rows_are_json(make, spec):
    task = make(spec)
    held = task.rows("heldout")
    assert len({task.problem(row) for row in held}) == len(held)
    assert len(held) == 512 or spec in LISTED
    for row in [*held[:50], *task.rows("train")[:50]]:
        assert json.loads(json.dumps(row)) == row and isinstance(row, dict)


@pytest.mark.parametrize("spec", SPECS + PROGRAMS)
def test_a_row_is_the_same_in_whichever_order_it_is_read(make, spec):
    task = make(spec)
    for split in ("train", "heldout"):
        rows = task.rows(split)
        n = len(rows)
        assert rows[7 % n] == rows[7 % n] and rows[n - 1] == rows[-1] and list(rows[2:5]) == [rows[2], rows[3], rows[4]]
        with pytest.raises(IndexError):
            rows[n]
    assert task.rows("train")[0] != task.rows("train")[1]


@pytest.mark.parametrize("spec", SMALL + PROGRAMS)
def test_train_is_large(make, spec):
    assert len(make(spec).rows("train")) == 1 << 20


def test_rows_are_the_same_in_another_process(make):
    """Hash seeds, platforms and the order of calls must not show."""
    code = """
import hashlib, json, sys
from lmtrain import tasks
for spec in json.loads(sys.argv[1]):
    task = tasks.get(spec)
    rows = list(task.rows("heldout")[:20]) + list(task.rows("train")[100:120])
    text = json.dumps([[row, task.messages(row), task.solution(row)] for row in rows], sort_keys=True)
    print(hashlib.sha256(text.encode()).hexdigest())
"""
    specs = [s for s in SPECS if "FILE" not in s and not s.startswith("pydocs(")]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(specs)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    found = [process.communicate()[0].split() for process in running]
    assert found[0] == found[1] and len(set(found[0])) == len(specs)


def test_another_seed_gives_other_rows(make):
    assert make("addition").rows("train")[0] != tasks.get("addition(seed=1)").rows("train")[0]
    assert make("chatroom").rows("heldout")[0] != tasks.get("chatroom(seed=1)").rows("heldout")[0]


@pytest.mark.parametrize("spec", SPECS)
def test_a_demonstration_scores_1_and_is_a_conversation(make, spec):
    task = make(spec)
    for split in ("train", "heldout"):
        for row in task.rows(split)[:60]:
            whole = [*task.messages(row), *task.solution(row)]
            messages_lib.check(whole, learn=True)
            assert whole[-1]["role"] == "assistant" and task.messages(row)[-1]["role"] != "assistant"
            if hasattr(task, "score_conversation"):
                parts = task.score_conversation(row, whole)
                assert "sloppy" in spec or set(parts.values()) == {1.0}
                assert "sloppy" in spec or task.score(row, task.solution(row)[0]["content"]) == 1
            else:
                assert task.score(row, final(task, row)) == 1
                assert not hasattr(task, "answer") or task.answer(row, final(task, row))


@pytest.mark.parametrize("name", ["addition", "spelling", "sorting"])
def test_a_sloppy_demonstrator_is_wrong_as_often_as_asked_and_right_otherwise(name):
    sloppy, right = tasks.get(f"{name}(sloppy=0.3)"), tasks.get(name)
    rows = sloppy.rows("train")[:1000]
    assert rows == right.rows("train")[:1000]
    scores = [sloppy.score(row, final(sloppy, row)) for row in rows]
    assert sum(scores) / len(rows) == pytest.approx(0.7, abs=0.04) and set(scores) == {0.0, 1.0}
    assert [final(sloppy, row) == final(right, row) for row in rows] == [score == 1 for score in scores]


@pytest.mark.parametrize(
    "spec", [s for s in SPECS if not s.startswith(("chatroom", "several", "consistency", "canary"))]
)
def test_another_rows_answer_scores_0(make, spec):
    task = make(spec)
    rows = task.rows("heldout")[:60]
    wrong = 0
    for row, other in zip(rows, rows[1:], strict=False):
        reply = final(task, other)
        if task.answer(row, reply) != task.answer(row, final(task, row)):
            wrong += 1
            assert task.score(row, reply) == 0
        assert task.score(row, "") == 0
    assert wrong > 1


@pytest.mark.parametrize("spec", ["addition", "addition(reversed=True)", "sorting", "calculator", "gsm8k(path='FILE')"])
def test_an_answer_that_is_nearly_right_scores_0(make, spec):
    task = make(spec)
    for row in task.rows("heldout")[:40]:
        right = final(task, row)
        digit = max(i for i, c in enumerate(right) if c.isalnum())
        nearly = right[:digit] + ("1" if right[digit] != "1" else "2") + right[digit + 1 :]
        assert task.score(row, right) == 1 and task.score(row, nearly) == 0


@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(reply=st.text(max_size=200) | st.text("0123456789.,-#$ \n+*/ABCDabc", max_size=60), i=st.integers(0, 500))
def test_any_reply_has_a_score_and_an_answer(make, spec, reply, i):
    task = make(spec)
    rows = task.rows("heldout")
    row = rows[i % len(rows)]
    score = task.score(row, reply)
    assert isinstance(score, float) and 0 <= score <= 1
    if hasattr(task, "answer"):
        assert isinstance(task.answer(row, reply), str)
        assert task.answer(row, f" {reply.strip()} ") == task.answer(row, reply.strip())


@pytest.mark.parametrize("spec", SMALL + PROGRAMS)
def test_a_demonstration_fits_into_a_row_of_a_small_model(make, spec):
    """A token a byte, two special ones a message, rows of 256; each reply keeps to max_tokens, its end included."""
    task = make(spec)
    for row in task.rows("train")[:200]:
        whole = [*task.messages(row), *task.solution(row)]
        text = [
            m["content"] + "".join(" " + c["name"] + " " + c["arguments"] for c in m.get("tool_calls", ()))
            for m in whole
        ]
        assert 1 + sum(len(t.encode()) + 2 for t in text) <= (256 if "turns=6" not in spec else 400)
        for message, t in zip(whole, text, strict=True):
            assert message["role"] != "assistant" or len(t.encode()) + 1 <= task.max_tokens


@pytest.mark.parametrize("spec", SPECS + PROGRAMS)
def test_an_unknown_split_is_refused(make, spec):
    with pytest.raises(LmtrainError, match="'test'.*'train' or 'heldout'"):
        make(spec).rows("test")


def test_a_space_without_a_training_problem_is_refused():
    class One(generated.Generated):
        name = "one"

        def draw(self, rng):
            return {"n": 0}

        def problem(self, row):
            return self.only

    one = One()
    one.only = next(str(i) for i in range(99) if generated.held_out(str(i)))
    assert len(one.rows("heldout")) == 1
    with pytest.raises(LmtrainError, match="task one: every problem.*held out"):
        one.rows("train")[0]
    two = One()
    two.only = next(str(i) for i in range(99) if not generated.held_out(str(i)))
    with pytest.raises(LmtrainError, match="task one: no problem.*held out"):
        two.rows("heldout")
