"""The assistant's next turn in conversations of a file."""

import json
import pathlib

import pytest

from lmtrain import tasks
from lmtrain.data import samples
from lmtrain.schema import Data
from lmtrain.types import LmtrainError

REAL = pathlib.Path(__file__).parents[3] / "shared" / "data" / "customer_service_sgd.jsonl"


def say(role, content, **more):
    return {"role": role, "content": content, **more}


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def talks(tmp_path):
    """200 dialogues, of two replies each."""
    return write(
        tmp_path / "talks.jsonl",
        [{"messages": [say("user", f"A table for {i}?"), say("assistant", f"When, all {i} of you?"),
                       say("user", "At seven."), say("assistant", f"A table for {i} at seven. See you!")]}
         for i in range(200)],
    )  # fmt: skip


def test_held_out_are_the_conversations_that_sft_holds_out(talks):
    task = tasks.get(f"replies(path={talks!r}, heldout_fraction=0.2)")
    sides = samples.collect("chat", Data("jsonl", path=talks, heldout_fraction=0.2), samples.Report(), False)[""]
    for side in ("train", "heldout"):
        opened = {sample.talks[0][0]["content"] for sample in sides[side]}
        assert {row["messages"][0]["content"] for row in task.rows(side)} == opened and opened
    assert len(task.rows("heldout")) < len(tasks.get(f"replies(path={talks!r}, heldout_fraction=0.5)").rows("heldout"))


def test_the_prompt_ends_before_the_reply_and_the_reply_is_the_reference(talks):
    last = tasks.get(f"replies(path={talks!r}, turn='last')")
    for row in last.rows("train")[:9]:
        assert [m["role"] for m in last.messages(row)] == ["user", "assistant", "user"]
        assert row["reply"].endswith("See you!") and last.score(row, row["reply"]) == 1
        assert last.solution(row) == [say("assistant", row["reply"])]
    some = tasks.get(f"replies(path={talks!r})").rows("train")
    assert {len(row["messages"]) for row in some} == {1, 3}, "any of its turns"


def test_the_metric_is_the_one_asked_for(talks):
    row = {"messages": [say("user", "?")], "reply": "at seven in Oslo"}
    assert tasks.get(f"replies(path={talks!r})").score(row, "in Oslo at seven") == pytest.approx(0.5)
    assert tasks.get(f"replies(path={talks!r}, metric='rouge_1')").score(row, "in Oslo at seven") == 1


def test_turns_that_are_no_reply_are_passed_over(tmp_path):
    call = {"type": "function", "id": "1", "function": {"name": "book", "arguments": "{}"}}
    talk = [say("assistant", "Hello!"), say("user", "Book."), say("assistant", "", tool_calls=[call]),
            say("tool", "done", tool_call_id="1"), say("assistant", "Booked.", weight=1), say("user", "Bye"),
            say("assistant", "Bye now", weight=0)]  # fmt: skip
    other = [say("user", "Hi"), say("assistant", "Hi.")]
    task = tasks.get(
        f"replies(path={write(tmp_path / 'a.jsonl', [{'messages': talk}, {'messages': other}])!r}, turn='last')"
    )
    assert {row["reply"] for side in ("train", "heldout") for row in task.rows(side)} == {"Booked.", "Hi."}


@pytest.mark.parametrize(
    ("settings", "lines", "words"),
    [
        ("", None, ["replies", "no such file"]),
        ("", ["{}"], ["no reply", "no conversation in it"]),
        ("", [{"messages": [say("assistant", "Hello!")]}], ["no reply to anything"]),
        (", metric='rouge_x'", [], ["'rouge_x'", "Did you mean rouge_"]),
        (", turn='lats'", [], ["Did you mean last"]),
        (", heldout_fraction=1.5", [], ["1.5", "between 0 and 1"]),
    ],
)
def test_what_cannot_be_is_refused_before_training(tmp_path, settings, lines, words):
    path = str(tmp_path / "nowhere.jsonl") if lines is None else write(tmp_path / "a.jsonl", lines)
    with pytest.raises(LmtrainError) as error:
        tasks.get(f"replies(path={path!r}{settings})")
    for word in words:
        assert word in str(error.value)
    with pytest.raises(LmtrainError, match="path is not set"):
        tasks.get("replies").rows("train")


@pytest.mark.skipif(not REAL.exists(), reason="no dialogues at hand")
def test_real_dialogues_have_a_reply_each():
    task = tasks.get(f"replies(path={str(REAL)!r}, heldout_fraction=0.15)")
    rows = [*task.rows("train"), *task.rows("heldout")]
    assert len(rows) > 1190 and all(task.score(row, row["reply"]) == 1 for row in rows)
