"""The simulated chat room: the user reacts, the conversation ends, and each part of the score sees its own fault."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain import tasks
from lmtrain.tasks import rewards

TASK = tasks.get("chatroom")
ROW = TASK.rows("train")[3]


def play(task, row, reply):
    """A conversation in which `reply(turn, messages)` is what the assistant says."""
    talk = list(task.messages(row))
    for turn in range(50):
        talk.append({"role": "assistant", "content": reply(turn, talk)})
        answer = task.respond(row, talk)
        if answer is None:
            return talk
        assert [m["role"] for m in answer] == ["user"] and answer[0]["content"]
        talk += answer
    raise AssertionError("it does not end")


def good(row):
    return [m["content"] for m in TASK.solution(row) if m["role"] == "assistant"]


def parts(reply, row=ROW, task=TASK):
    return task.score_conversation(row, play(task, row, reply))


def users(talk):
    return [m["content"] for m in talk if m["role"] == "user"]


def test_the_user_asks_for_each_fact_and_says_goodbye():
    talk = play(TASK, ROW, lambda turn, _: good(ROW)[turn])
    said = users(talk)
    assert len(said) == 4 and "bye" in said[-1].lower()
    assert [kind in line for kind, line in zip(ROW["asks"], said, strict=False)] == [True] * 3
    assert talk[len(TASK.messages(ROW)) :] == TASK.solution(ROW)


def test_facts_are_told_and_asked_for():
    for row in TASK.rows("heldout")[:100]:
        system, opening = TASK.messages(row)
        assert system["role"] == "system" and opening["role"] == "user"
        for kind, value in row["facts"].items():
            assert f"{kind} {value}" in system["content"]
        assert row["asks"][0] in opening["content"] and row["name"] in opening["content"]
        assert sorted(row["asks"]) == sorted(row["facts"]) and len(set(row["facts"].values())) == 3
        assert row["persona"].startswith(f"You are {row['name']}")


def test_the_user_complains_of_what_is_wrong_and_asks_again():
    kind = ROW["asks"][0]
    other = ROW["facts"][ROW["asks"][1]]

    def after(*replies):
        return users(play(TASK, ROW, lambda turn, _: replies[min(turn, len(replies) - 1)]))[1]

    assert after("I like soup.") == users(play(TASK, ROW, lambda *_: "I like soup."))[1]
    assert "Stay with" in after("I like soup.") and kind in after("I like soup.")
    assert after(f"It is {other}.").startswith("No.") and kind in after(f"It is {other}.")
    assert after(f"It is {other}.", f"It is {other}.").startswith("No.")
    repeated = users(play(tasks.get("chatroom(turns=6)"), ROW, lambda *_: "I like soup."))
    assert "Stay with" in repeated[1] and "You said that" in repeated[2]


def test_each_fault_lowers_its_own_part():
    best = {"on_topic": 1.0, "no_repetition": 1.0, "length": 1.0, "facts": 1.0}
    assert parts(lambda turn, _: good(ROW)[turn]) == best
    silent = parts(lambda *_: "")
    assert silent == {"on_topic": 0, "no_repetition": 0, "length": 0, "facts": 0}
    same = parts(lambda turn, _: good(ROW)[0])
    assert same["no_repetition"] == 0.25 and same["length"] == 1 and same["facts"] == pytest.approx(1 / 3)
    away = parts(lambda turn, _: f"I like soup number {turn}, my friend.")
    assert away["on_topic"] == 0 and away["facts"] == 0 and away["no_repetition"] == 1 and away["length"] == 1
    chatty = parts(lambda turn, _: f"{good(ROW)[turn]} " + " ".join(f"word{i}" for i in range(9)))
    assert chatty["length"] < 0.7 and chatty["facts"] == 1 and chatty["on_topic"] == 1 and chatty["no_repetition"] == 1
    babble = parts(lambda turn, _: f"{good(ROW)[turn]} very very very very")
    assert babble["no_repetition"] < 0.8 and babble["facts"] == 1


def test_telling_all_facts_at_once_does_not_pay():
    dump = " ".join(f"{kind} {value}" for kind, value in ROW["facts"].items())
    for reply in (lambda *_: dump, lambda turn, _: dump + f" {turn}"):
        assert parts(reply)["facts"] == 0 and sum(parts(reply).values()) < 3
    assert TASK.score(ROW, dump) == 0


def test_a_fact_counts_where_it_was_asked_for():
    """Told in answer to another question, it is no answer."""

    def beside(turn, talk):
        return next(
            f"It is {value}, {turn}." for kind, value in ROW["facts"].items() if kind not in talk[-1]["content"]
        )

    found = parts(beside)
    assert found["facts"] == 0 and found["on_topic"] == 0.75 and found["no_repetition"] == 1


def test_a_value_inside_another_word_is_not_given():
    value = ROW["facts"][ROW["asks"][0]]
    assert TASK.score(ROW, f"It is {value}.") == 1 and TASK.score(ROW, f"It is {value}x.") == 0
    assert TASK.score(ROW, f"It is {value}. " + "So much more. " * 5) == 0


@pytest.mark.parametrize("turns", [1, 2, 3, 4, 7])
def test_it_takes_as_many_turns_as_it_may_and_no_more(turns):
    task = tasks.get(f"chatroom(turns={turns})")
    row = task.rows("train")[0]
    stubborn = play(task, row, lambda turn, _: f"word {turn}")
    assert sum(m["role"] == "assistant" for m in stubborn) == turns
    demonstration = [m for m in task.solution(row) if m["role"] == "assistant"]
    assert len(demonstration) == min(turns, 4)
    assert set(task.score_conversation(row, [*task.messages(row), *task.solution(row)]).values()) == {1.0}


def test_sloppy_demonstrations_are_worse_and_as_many_as_asked_for():
    rows = TASK.rows("train")[:400]
    share = {}
    for sloppy in (0.0, 0.5, 1.0):
        task = tasks.get(f"chatroom(sloppy={sloppy})")
        values = [min(task.score_conversation(r, [*task.messages(r), *task.solution(r)]).values()) for r in rows]
        share[sloppy] = sum(v < 1 for v in values) / len(rows)
    assert share[0.0] == 0 and 0.4 < share[0.5] < 0.6 and share[1.0] > 0.95


@pytest.mark.parametrize("turns", [1, 2, 4, 8])
def test_of_a_preference_the_chosen_is_the_better_one(turns):
    task = tasks.get(f"chatroom(turns={turns}, sloppy=0.5)")
    for row in task.rows("train")[:200]:
        pair = task.preference(row)
        chosen, rejected = (
            task.score_conversation(row, [*task.messages(row), *pair[k]]) for k in ("chosen", "rejected")
        )
        assert set(chosen.values()) == {1.0} and min(rejected.values()) < 1


def test_a_place_that_is_held_out_is_in_no_training_conversation():
    held = {row["topic"] for row in TASK.rows("heldout")}
    assert len(held) == 512
    assert not held & {row["topic"] for row in TASK.rows("train")[:5000]}


def test_a_model_may_play_the_user():
    """What was asked is read from what the user said, in whichever order."""
    kinds = ROW["asks"][::-1]
    talk = [TASK.messages(ROW)[0]]
    for kind in kinds:
        talk += [{"role": "user", "content": f"so, the {kind}?"}, {"role": "assistant", "content": ROW["facts"][kind]}]
    assert TASK.score_conversation(ROW, talk)["facts"] == 1


def test_turns_that_only_call_tools_are_turns():
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "x", "arguments": ""}]}
    assert TASK.score_conversation(ROW, [*TASK.messages(ROW), call])["length"] == 0
    assert TASK.respond(ROW, [*TASK.messages(ROW), call])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(max_size=60) | st.sampled_from(good(ROW)), min_size=4, max_size=4), st.integers(0, 400))
def test_whatever_is_said_it_ends_and_has_a_score(replies, i):
    row = TASK.rows("heldout")[i]
    found = parts(lambda turn, _: replies[turn], row)
    assert set(found) == {"on_topic", "no_repetition", "length", "facts"}
    assert all(isinstance(v, float) and 0 <= v <= 1 for v in found.values())


def test_general_rewards_read_its_rows():
    talk = [*TASK.messages(ROW), *TASK.solution(ROW)]
    assert rewards.get("facts")(ROW, talk) == 1
    assert rewards.get("length(low=5, high=40)")(ROW, talk) == 1
