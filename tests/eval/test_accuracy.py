"""Multiple choice and short answers: what is scored, which choice wins, what a file may hold."""

import json

import numpy as np
import pytest

from lmtrain import tasks
from lmtrain.eval import accuracy
from lmtrain.eval.likelihood import encode_pair
from lmtrain.eval.subject import Missing
from lmtrain.types import LmtrainError
from tests.eval import toys


def write(path, rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def exam(count, choices=3):
    return [
        {"question": f"the cat sat on {i}", "choices": [f"mat {i}", "a big boat é", "dog"][:choices], "answer": i % 2}
        for i in range(count)
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------------- multiple choice
def test_three_rules_choose_as_they_are_defined():
    """By hand: the second is likeliest, the third a character, the first a byte."""
    choices, logps = ["ab", "a", "éé"], [-4.0, -2.5, -4.4]
    assert accuracy.chosen(logps, choices) == {"acc": 1, "acc_norm": 0, "acc_bytes": 2}
    assert accuracy.chosen([-1.0, -1.0], ["a", "b"]) == {"acc": 0, "acc_norm": 0, "acc_bytes": 0}


@pytest.mark.parametrize("chat", [False, True])
def test_choices_are_scored_behind_their_prompt(tmp_path, chat):
    path = write(tmp_path / "exam.jsonl", exam(8))
    spec = f"multiple_choice(path={path!r})"
    s = toys.subject(chat, tasks=(spec,))
    result = accuracy.run(s)
    task, told = tasks.get(spec), result.details["multiple_choice"]
    assert len(told) == 8 and result.scores["multiple_choice: acc"].rows == 8
    for row, got in zip(task.rows("heldout"), told, strict=True):
        if chat:
            context = s.template().prompt([{"role": "user", "content": row["question"]}])
            pairs = [(context, s.tokenizer.encode(c)) for c in row["choices"]]
        else:
            context = f"Question: {row['question']}\nAnswer:"
            pairs = [encode_pair(s.tokenizer, context, f" {c}") for c in row["choices"]]
        expected = [x.total for x in s.likelihood(pairs)]
        np.testing.assert_allclose(got["logps"], expected, atol=1e-3)
        assert got["acc"] == float(np.argmax(expected) == row["right"])
    assert result.scores["multiple_choice: acc"].value == np.mean([got["acc"] for got in told])


def test_rows_keep_the_files_order_and_repetitions(tmp_path):
    rows = [*exam(5), exam(5)[2]]
    held = tasks.get(f"multiple_choice(path={write(tmp_path / 'a.jsonl', rows)!r})").rows("heldout")
    assert [r["question"] for r in held] == [r["question"] for r in rows]
    assert held[5]["where"].endswith("a.jsonl:6")


@pytest.mark.parametrize(
    ("answer", "right"), [(1, 1), ("B", 1), ("dog", 0), ("cat", 1), ("1", None), (2, None), (True, None), ("C", None),
                          (None, None), (-1, None)],
)  # fmt: skip
def test_an_answer_is_a_number_a_letter_or_a_text(tmp_path, answer, right):
    row = {"question": "?", "choices": ["dog", "cat"], "answer": answer}
    task = tasks.get(f"multiple_choice(path={write(tmp_path / 'a.jsonl', [row])!r})")
    if right is None:
        with pytest.raises(LmtrainError, match=r"a\.jsonl:1: answer is .* 2 choices"):
            task.rows("heldout")
    else:
        assert task.rows("heldout")[0]["right"] == right


def test_a_choice_that_is_a_letter_is_meant_before_its_place(tmp_path):
    row = {"question": "?", "choices": ["B", "A"], "answer": "A"}
    assert tasks.get(f"multiple_choice(path={write(tmp_path / 'a.jsonl', [row])!r})").rows("heldout")[0]["right"] == 1


def test_letters_are_shown_and_chosen(tmp_path):
    task = tasks.get(f"multiple_choice(path={write(tmp_path / 'a.jsonl', exam(1))!r}, letters=True)")
    row = task.rows("heldout")[0]
    assert task.choices(row) == ["A", "B", "C"] and task.messages(row)[0]["content"].endswith("\nC dog")
    assert task.score(row, "A.") == 1 and task.score(row, "B") == 0 and task.score(row, "mat 0") == 0


# ---------------------------------------------------------------------------------------------------------- questions
@pytest.mark.parametrize(
    ("reply", "score"), [("Paris", 1), (" the  city of PARIS! ", 1), ("paris.", 1), ("Paris, France", 0), ("", 0),
                         ("Par is", 0)],
)  # fmt: skip
def test_a_reply_is_compared_once_normalised(tmp_path, reply, score):
    row = {"question": "Capital?", "answer": ["Paris", "The city of Paris"]}
    task = tasks.get(f"questions(path={write(tmp_path / 'a.jsonl', [row])!r})")
    assert task.score(task.rows("heldout")[0], reply) == score


@pytest.mark.parametrize("chat", [False, True])
def test_replies_end_before_a_stop_text_and_are_scored(tmp_path, chat):
    """The toy says something; asked for the same up to its second word, it is right in every row."""
    path = write(tmp_path / "a.jsonl", [{"question": f"cat {i}", "answer": "x"} for i in range(6)])
    free = accuracy.run(toys.subject(chat, tasks=(f"questions(path={path!r}, max_tokens=12, stop=())",)))
    said = [row["reply"] for row in free.details["questions"]]
    assert free.scores["questions: score"].value == 0 and all(said)
    stop = said[0][len(said[0]) // 2]
    cut = accuracy.run(toys.subject(chat, tasks=(f"questions(path={path!r}, max_tokens=12, stop=({stop!r},))",)))
    assert [row["reply"] for row in cut.details["questions"]] == [text.split(stop)[0] for text in said]
    known = [{"question": f"cat {i}", "answer": text} for i, text in enumerate(said) if text.strip(" .,!?")]
    path = write(tmp_path / "b.jsonl", known)
    right = accuracy.run(toys.subject(chat, tasks=(f"questions(path={path!r}, max_tokens=12, stop=())",)))
    assert right.scores["questions: score"].value == 1 and right.scores["questions: score"].rows == len(known)


def test_a_task_that_only_chats_is_played(tmp_path):
    result = accuracy.run(toys.subject(tasks=("addition(digits=1)",), rows=4))
    assert result.scores["addition: score"].rows == 4 and "in a chat" in result.notes[0]


# -------------------------------------------------------------------------------------------------------- wrong input
WRONG = [
    ("multiple_choice", ["{"], r"a\.jsonl:1"),
    ("multiple_choice", [{"question": "?", "choices": ["a", "b"]}], r"a\.jsonl:1: no field 'answer'"),
    ("multiple_choice", [{"question": "?", "choices": ["a"], "answer": 0}], "two texts or more"),
    ("multiple_choice", [{"question": "?", "choices": ["a", ""], "answer": 0}], "two texts or more"),
    ("multiple_choice", [{"questoin": "?", "choices": ["a", "b"], "answer": 0}], "Did you mean questoin"),
    ("questions", [{"question": "?", "answer": "a"}, {"question": "?"}], r"a\.jsonl:2: no field 'answer'"),
    ("questions", [{"question": "?", "answer": []}], "a text with a letter or digit"),
    ("questions", [{"question": "?", "answer": "..."}], "a text with a letter or digit"),
    ("questions", [], "has no row|no row"),
]


@pytest.mark.parametrize(("name", "rows", "says"), WRONG)
def test_a_row_that_cannot_be_used_is_named(tmp_path, name, rows, says):
    with pytest.raises(LmtrainError, match=says):
        tasks.get(f"{name}(path={write(tmp_path / 'a.jsonl', rows)!r})").rows("heldout")


def test_settings_that_cannot_be_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", exam(2))
    for spec, says in (
        (f"multiple_choice(path={path!r}, prompt='Answer:')", "with {question} in it"),
        ("multiple_choice(path='nowhere.jsonl')", "nowhere.jsonl"),
        ("multiple_choice", "path is not set"),
    ):
        with pytest.raises(LmtrainError, match=says):
            tasks.get(spec).rows("heldout")
    with pytest.raises(LmtrainError, match="train_path is not set"):
        tasks.get(f"multiple_choice(path={path!r})").rows("train")
    with pytest.raises(Missing, match="--tasks NAME"):
        accuracy.run(toys.subject())
    short = write(tmp_path / "b.jsonl", [{"question": "a", "answer": "b"}])
    with pytest.raises(LmtrainError, match="leave no room"):
        accuracy.run(toys.subject(longest=16, tasks=(f"questions(path={short!r})",)))


def test_what_is_held_out_is_not_trained_on(tmp_path):
    a, b = write(tmp_path / "a.jsonl", exam(3)), write(tmp_path / "b.jsonl", exam(5))
    task = tasks.get(f"multiple_choice(path={a!r}, train_path={b!r})")
    assert [task.problem(r) for r in task.rows("train")] == ["the cat sat on 3", "the cat sat on 4"]
    row = task.rows("train")[0]
    assert task.score(row, task.solution(row)[0]["content"]) == 1
