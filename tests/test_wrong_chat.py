"""Bad rows and settings of chat, preferences and reinforcement learning: each ends in one message that names the thing
and the fix, without a traceback, and leaves nothing behind."""

import json

import pytest

from lmtrain import cli, config
from lmtrain.rollout import rewards  # noqa: F401  (imports once, not in the first test's time)
from lmtrain.types import LmtrainError
from tests.test_post_training import MODEL, chat_stage, experiment, rl_stage

GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}


def messages(*turns, **more):
    return {"messages": [{"role": role, "content": text, **more} for role, text in turns]}


#: a row that cannot be used, and what is said of it
ROWS = [
    (messages(("user", "Hi")), "no assistant turn"),
    (messages(("user", "Hi"), ("robot", "Hello.")), "unknown role.*robot"),
    (messages(("user", "Hi"), ("assistent", "Hello.")), "Did you mean assistant"),
    (messages(("user", "Hi"), ("assistant", "  ")), "empty content"),
    (messages(("user", 3), ("assistant", "Hello.")), "content is no text"),
    (messages(("user", "Hi"), ("assistant", "Hello."), weight=2), "unusable weight"),
    (messages(("user", "Hi"), ("assistant", "A"), ("assistant", "B")), "two assistant turns in a row"),
    (messages(("user", "Hi"), ("tool", "7"), ("assistant", "B")), "tool result without a tool call"),
    (messages(("user", "Hi"), ("system", "Be brief."), ("assistant", "B")), "system message that is not the first"),
    ({"messages": []}, "no messages"),
    ({"messages": "Hi"}, "messages"),
    ({"text": "Hi"}, "fields"),
    ([1, 2], "object"),
]


def run(c, folder):
    import lmtrain

    with pytest.raises(LmtrainError) as error:
        lmtrain.run(c, folder)
    assert "Traceback" not in str(error.value)
    assert not list(folder.glob("*/checkpoints/*"))
    return str(error.value)


def chat_on(file, **data):
    fields = dict(path=str(file), row_length=64, heldout_fraction=0.3) | data
    return experiment(sft=chat_stage(data=config.data("jsonl", **fields)))


@pytest.mark.parametrize("row, says", ROWS, ids=[says for _, says in ROWS])
def test_a_bad_row_is_named_by_file_and_line(tmp_path, row, says):
    import re

    file = tmp_path / "chat.jsonl"
    many = [{"messages": [{"role": "user", "content": f"Hi {i}"}, GOOD["messages"][1]]} for i in range(40)]
    file.write_text("\n".join(json.dumps(r) for r in [*many[:20], row, *many[20:]]))
    said = run(chat_on(file, malformed="refuse"), tmp_path / "run")
    assert re.search(says, said) and f"{file}:21" in said


def test_a_bad_row_is_skipped_named_and_counted(tmp_path, capsys):
    import lmtrain

    file = tmp_path / "chat.jsonl"
    many = [{"messages": [{"role": "user", "content": f"Hi {i}"}, GOOD["messages"][1]]} for i in range(40)]
    unweighed = messages(("user", "Well"), ("assistant", "Hello."), weight=0)
    file.write_text("\n".join(json.dumps(r) for r in [ROWS[0][0], *many, ROWS[1][0], unweighed]))
    lmtrain.run(chat_on(file), tmp_path / "run")
    said = capsys.readouterr().out
    assert "nothing to learn" in said and f"{file}:43" in said
    assert "3 skipped" in said and f"{file}:1" in said and "no assistant turn" in said and "unknown role" in said


def broken(row, messages):
    raise ZeroDivisionError("no")


def nan(row, messages):
    return float("nan")


def change(c, **fields):
    for path, value in fields.items():
        at = c
        *parents, last = path.split("__")
        for p in parents:
            at = at[p]
        at[last] = value
    return c


def rl(**fields):
    return change(
        experiment(sft=chat_stage(steps=1), rl=rl_stage()), **{f"stages__rl__{k}": v for k, v in fields.items()}
    )


SETTINGS = [
    (lambda: experiment(rl=rl_stage()), "stages.rl.*there is none: put a training stage before it"),
    (lambda: rl(rollout__tasks=()), "rollout.tasks is empty"),
    (lambda: rl(rollout__tasks=("adition",)), "Did you mean addition"),
    (lambda: rl(rollout__tasks=("addition(digit=2)",)), "Did you mean digits"),
    (lambda: rl(rollout__tasks=("addition(digits=0)",)), "digits is 0"),
    (lambda: rl(rollout__group=3), "rollout.group is 3, which does not divide"),
    (lambda: rl(rollout__temperature=0.0), "rollout.temperature is 0.0"),
    (lambda: rl(rollout__rewards=()), "rollout.rewards is empty"),
    (lambda: rl(rollout__rewards=("scores",)), "scores"),
    (lambda: rl(rollout__rewards=("-1*score",)), "number above 0"),
    (lambda: rl(rollout__rewards=("model(runs/none)",)), "runs/none"),
    (lambda: rl(rollout__rewards=("tests.test_wrong_chat:nan",)), "gave nan.*row"),
    (lambda: rl(rollout__rewards=("tests.test_wrong_chat:broken",)), "raised ZeroDivisionError.*row"),
    (lambda: rl(rollout__truncated="drop"), "truncated"),
    (lambda: rl(rollout__control="shufle"), "Did you mean shuffle"),
    (lambda: rl(rollout__advantage="gea"), "Did you mean gae"),
    (lambda: rl(rollout__tasks=("addition", "addition ")), "stands twice"),
    (lambda: rl(rollout__reference="none", rollout__kl_reward=0.1), "reference is 'none'"),
    (lambda: rl(rollout__reference="none", loss=dict(beta=0.1)), "reference is 'none'"),
    (lambda: rl(rollout__advantage="none"), "advantage is 'none'"),
    (lambda: rl(objective="ppo", rollout__advantage="group"), "advantage is 'group', but ppo"),
    (lambda: rl(objective="ppo", rollout__group=1, rollout__dynamic=2), "dynamic is 2"),
    (lambda: rl(rollout__overlong=12, rollout__max_tokens=12), "overlong is 12, but a reply has at most 12"),
    (lambda: rl(rollout__demonstrations=0.5), "demonstrations is 0.5"),
    (lambda: rl(loss__temperature=0.5), "Set rollout.temperature alone"),
    (lambda: rl(data__row_length=7), "leave no room for a reply"),
    (lambda: rl(rollout__user="runs/none"), "runs/none"),
    (lambda: rl(source="chats"), "Did you mean chat"),
    (lambda: rl(init_from="stf"), "stf"),
    (lambda: experiment(dpo=chat_stage(objective="dpo")), "there is none: put a training stage before it"),
    (lambda: experiment(sft=chat_stage(data=config.data("jsonl", path="nowhere.jsonl"))), "nowhere.jsonl"),
    (lambda: experiment(sft=chat_stage(data=config.data("text", path="README.md"))), "holds text, no conversations"),
    (lambda: experiment(sft=chat_stage(data=config.data("task", path="adition"))), "Did you mean addition"),
    (lambda: experiment(sft=chat_stage(data=config.data("task", path="addition", truncate="up"))), "data.truncate"),
    (lambda: experiment(sft=chat_stage(data=config.data("task", path="addition", template="x.jinja"))), "x.jinja"),
    (lambda: experiment(sft=chat_stage(), e=config.evaluation("adition")), "Did you mean addition"),
    (lambda: experiment(sft=chat_stage(), e=config.evaluation("addition", samples=0)), "samples is 0"),
    (lambda: experiment(sft=chat_stage(), e=config.evaluation("addition", stages=("rl",))), "names 'rl'"),
    (
        lambda: experiment(sft=chat_stage(), e=config.evaluation(suites=("fluency",), heldout="rl")),
        "heldout names 'rl'",
    ),
    (lambda: experiment(sft=chat_stage(), e=config.evaluation("addition", heldout="sft")), "heldout goes with suites"),
    (lambda: experiment(sft=chat_stage(), gkd=rl_stage("gkd", source="rollout", teacher="runs/none")), "runs/none"),
    (lambda: experiment(sft=chat_stage(), gkd=rl_stage("gkd", source="rollout")), "teacher"),
]


@pytest.mark.parametrize("make, says", SETTINGS, ids=[str(i) for i in range(len(SETTINGS))])
def test_a_setting_that_cannot_be_is_named(tmp_path, make, says):
    import re

    import lmtrain

    with pytest.raises(LmtrainError) as error:
        lmtrain.run(make(), tmp_path / "run")
    assert re.search(says, str(error.value), re.S), str(error.value)


def test_the_command_prints_one_message(tmp_path, capsys):
    (tmp_path / "e.py").write_text(
        "from lmtrain import config\n"
        "def get_config(arg=''):\n"
        "    c = config.experiment(tensorboard=False)\n"
        "    c.stages.tokenizer = config.tokenizer('bytes')\n"
        "    data = config.data('task', path='adition')\n"
        f"    c.stages.sft = config.stage(objective='sft', model=config.model(**{MODEL}), data=data)\n"
        "    return c\n"
    )
    status = cli.main(["run", "--config", str(tmp_path / "e.py"), "--workdir", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert status == 2 and said.count("\n") == 1 and "Did you mean addition" in said
    assert not (tmp_path / "run").exists()
