"""The recipes of experiments/ that run on files: each is read, refuses what is missing, and runs to its last table."""

import json
import pathlib
import random
import re
import sys

import pytest

import lmtrain
from lmtrain import cli, config

HERE = pathlib.Path(__file__).parent.parent / "experiments"


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A small file for each recipe, in the folder that commands start from."""
    rng = random.Random(0)
    monkeypatch.chdir(tmp_path)
    talk = [{"messages": [{"role": "user", "content": f"A table for {i}?"},
                          {"role": "assistant", "content": f"Yes, for {i}."}]} for i in range(120)]  # fmt: skip
    lines(tmp_path / "talks.jsonl", talk)
    names = "Rosalind Orlando Celia Touchstone Jaques Silvius".split()
    said = [f"{rng.choice(names)} said to {rng.choice(names)} that {rng.choice(names)} was late." for _ in range(2500)]
    (tmp_path / "book.txt").write_text("\n".join(said))
    rows = [{"instruction": f"Print {i}.", "input": "", "output": f"print({i})"} for i in range(120)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    tests = [{"task_id": i, "text": f"Write a function f that adds {i}.", "code": f"def f(x):\n    return x + {i}",
              "test_list": [f"assert f(1) == {1 + i}"]} for i in range(60)]  # fmt: skip
    lines(tmp_path / "tests.jsonl", tests)
    return tmp_path


CASES = {
    "customer_service": ("path=talks.jsonl,rows=4,rl=20", ["pretrain", "sft", "rl"]),
    "creative_writing": ("path=book.txt,rows=4", ["pretrain", "write"]),
    "code_generation": ("rows=2,samples=1", ["pretrain", "demonstrations", "rl"]),
    "code_generation, files": (
        "path=rows.json,tests=tests.jsonl,rows=2,samples=1", ["pretrain", "instructions", "demonstrations", "rl"],
    ),
}  # fmt: skip
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is for Linux")


def name(case):
    return f"{HERE / case.split(',')[0]}.py"


@pytest.mark.parametrize("file", sorted(HERE.glob("*.py")), ids=lambda f: f.stem)
def test_every_experiment_is_read_or_asks_for_its_file(file):
    try:
        c = config.load(str(file))
    except config.ConfigError as error:
        asks = f"name a .*{file.name}:" if file.stem != "transfer" else "quickstart/pretrain: no such folder"
        assert re.search(asks, str(error))
    else:
        assert config.build(c).stages


@pytest.mark.parametrize("case", CASES)
def test_the_stages_of_a_recipe(files, case):
    arg, stages = CASES[case]
    e = config.build(config.load(f"{name(case)}:{arg}"))
    trained = [n for n, s in e.stages.items() if isinstance(s, lmtrain.schema.Stage)]
    assert trained == stages
    begun = config.build(config.load(f"{name(case)}:{arg},init=runs/other"))
    first = next(s for s in begun.stages.values() if isinstance(s, lmtrain.schema.Stage))
    assert "tokenizer" not in begun.stages and "pretrain" not in begun.stages and first.init_from == "runs/other"


@pytest.mark.parametrize(
    ("arg", "words"),
    [
        ("customer_service.py", ["name a file of conversations"]),
        ("customer_service.py:path=nowhere.jsonl", ["nowhere.jsonl", "no such file"]),
        ("customer_service.py:path=talks.jsonl,metric=rouge", ["'rouge'", "Did you mean rouge_"]),
        ("creative_writing.py", ["name a text"]),
        ("creative_writing.py:path=nowhere.txt", ["nowhere.txt", "no such file"]),
        ("code_generation.py:path=nowhere.json", ["nowhere.json", "no such file"]),
        ("code_generation.py:tests=nowhere.jsonl,demonstrations=0", ["nowhere.jsonl", "no such file"]),
        ("code_generation.py:step=3", ["step"]),
    ],
)
def test_a_missing_file_is_named_before_anything_is_trained(files, capsys, arg, words):
    assert cli.main(["run", "--config", f"{HERE}/{arg}", "--workdir", "run"]) != 0
    said = capsys.readouterr()
    for word in words:
        assert word in said.err, said.err
    assert not (files / "run/pretrain").exists() and not (files / "run/tokenizer").exists()


def tiny(c, steps=2):
    """The same recipe, two steps of a small model a stage, a token a byte."""
    c.tensorboard = False
    for n, stage in c.stages.items():
        if n == "tokenizer":
            stage.kind, stage.data = "bytes", None
        elif "objective" in stage:
            stage.steps, stage.batch_size, stage.samples = steps, 8, 0
            stage.data.heldout_rows = 4
            if n == "pretrain":
                stage.model.layers, stage.model.width, stage.model.heads = 1, 32, 2
                stage.data.path, stage.data.limit = "docs", 120
            if stage.objective == "dapo":
                stage.rollout.max_tokens, stage.rollout.group, stage.rollout.slots = 8, 4, 8
        elif stage.tasks:
            stage.max_tokens = 8
    return c


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_recipe_runs_to_its_table(files, capsys, case):
    arg, stages = CASES[case]
    c = tiny(config.load(f"{name(case)}:{arg}"))
    lmtrain.run(c, files / "run")
    said = capsys.readouterr().out
    if "held-out task" in said:
        table = said[said.index("held-out task") :]
        assert [line.split() for line in table.splitlines() if "%" in line and "task" not in line]
        for stage in stages:
            assert f" {stage} " in table
    if ", files" in case or "code" not in case:
        table = said[said.index("with 95 % intervals") :]
        assert table.splitlines()[0].split()[4:] == stages and "bits per byte" in table
    assert "held-out task" in said or case == "creative_writing"
    # and from a run, which is scored first: what it was before
    again = tiny(config.load(f"{name(case)}:{arg},init=run/pretrain"))
    lmtrain.run(again, files / "again")
    rest = capsys.readouterr().out
    if "with 95 % intervals" in rest:
        table = rest[rest.index("with 95 % intervals") :].splitlines()
        assert table[0].split()[4:] == ["start", *stages[1:]]
    if "held-out task" in rest:
        assert " start " in rest[rest.index("held-out task") :]
        scores = json.loads((files / "again/summary.json").read_text())
        assert scores[stages[1]]["tasks"] and "start" in scores


@pytest.mark.slow
def test_what_an_experiment_starts_from_is_shown_in_what_can_be_said_of_it(files, capsys):
    def stage(**fields):
        data = config.data("text", path="lines.txt", document="line", row_length=32, heldout_rows=4)
        return config.stage(steps=1, batch_size=8, samples=0, eval_every=0, checkpoint_every=0, data=data, **fields)

    (files / "lines.txt").write_text(
        "\n".join(f"This is line {i}, and {i * 7 % 13} follows. So it goes on." for i in range(300))
    )
    first = config.experiment(tensorboard=False)
    first.stages.tokenizer = config.tokenizer("bytes")
    first.stages.pretrain = stage(model=config.model(layers=1, width=32, heads=4, mlp=48))
    lmtrain.run(first, files / "first")
    second = config.experiment(tensorboard=False)
    second.stages.more = stage(init_from="first")
    second.stages.scores = config.evaluation(suites=("overfitting", "fluency"), heldout="more", rows=4)
    lmtrain.run(second, files / "second")
    said = capsys.readouterr().out
    assert "start, overfitting: left out. suite overfitting reads the run's own record" in said
    table = said[said.index("with 95 % intervals") :].splitlines()
    assert table[0].split()[4:] == ["start", "more"]
    lmtrain.run(second, files / "second")  # a run that goes on scores nothing twice
    again = capsys.readouterr().out
    assert again[again.index("with 95 % intervals") :].splitlines()[: len(table)] == table
    assert "lmtrain eval:" in said and "lmtrain eval:" not in again
    second.stages.start = stage(init_from="first")
    second.stages.scores2 = config.evaluation(suites=("fluency",))
    with pytest.raises(lmtrain.LmtrainError, match=r"stages.start: call it otherwise"):
        lmtrain.run(second, files / "third")
