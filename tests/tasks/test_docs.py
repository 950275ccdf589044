"""What docs/tasks.md shows works."""

import pathlib
import re
import sys

import pytest

from lmtrain import tasks
from lmtrain.tasks import rewards

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tasks.md").read_text()
BLOCKS = re.findall(r"```python\n(# riddles\.py.*?)```", PAGE, re.S)


@pytest.fixture
def riddles(tmp_path, monkeypatch):
    (tmp_path / "riddles.py").write_text("\n".join(BLOCKS[:2]))
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("riddles", None)


def test_the_task_and_the_reward_on_the_page_work(riddles):
    task = tasks.get("riddles:Backwards")
    train, held = task.rows("train"), task.rows("heldout")
    assert len(train) == 6 and len(held) == 2 and not {r["word"] for r in train} & {r["word"] for r in held}
    for row in train:
        assert task.score(row, task.solution(row)[0]["content"]) == 1 and task.score(row, row["word"]) == 0
    polite = rewards.get("riddles:polite(word='thanks')")
    assert polite({}, [{"role": "assistant", "content": "Thanks!"}]) == 1
    assert polite({}, [{"role": "assistant", "content": "please"}]) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is for Linux")
def test_the_programs_on_the_page_end_as_it_says():
    names = {}
    exec(BLOCKS[2], names)
    assert names["right"].ok
    assert "program ended" in names["wrong"].error and "time limit" in names["loops"].error


def test_the_table_names_every_task_and_settings_that_there_are():
    import inspect

    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| `([^`]*)` \|$", PAGE, re.M))
    assert sorted(rows) == tasks.names()
    for name, settings in rows.items():
        module = __import__(f"lmtrain.tasks.{name}", fromlist=["x"])
        kind = next(k for k in vars(module).values() if getattr(k, "name", None) == name)
        parameters = inspect.signature(kind).parameters
        for setting in re.split(r", (?=\w+=|\w+$|\w+,)", settings):
            key, _, default = setting.partition("=")
            assert key in parameters and (not default or repr(parameters[key].default) == default)


def test_the_rewards_on_the_page_are_those_that_there_are():
    text = PAGE[PAGE.index("## Write a reward") : PAGE.index("# riddles.py\ndef polite")]
    named = re.findall(r"`(\w+)(\([^`]*\))?`", text)
    assert {name for name, _ in named} - {"row"} == set(rewards.names())
    for name, settings in named:
        if settings and "..." not in settings:
            rewards.get(name + settings)
