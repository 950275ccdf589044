"""`lmtrain eval`: the table, eval.json, the report; what it refuses, each in one message."""

import json
import random
import re
import shutil

import jax
import pytest

import lmtrain
from lmtrain import cli, config, runs
from lmtrain.eval import likelihood, suites
from lmtrain.eval.subject import Result, Settings
from lmtrain.evaluate import evaluate, spread
from lmtrain.types import LmtrainError
from tests.eval import toys


@pytest.fixture
def here(planted, tmp_path, monkeypatch):
    """A copy of the run, in the folder that commands start from."""
    shutil.copytree(planted[0], tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_all_suites_give_a_table_a_file_and_a_page(here, planted, capsys):
    path, numbers = planted[1]["one"]
    argv = ["eval", "run", "--rows", "200", "--tasks", f"multiple_choice(path={path!r}), addition(digits=1)"]
    assert cli.main([*argv, "--row-length", "192"]) == 0
    said = capsys.readouterr().out
    kept = json.loads((here / "run/eval.json").read_text())["pretrain"]
    assert list(kept) == [name for name, suite in suites.SUITES.items() if suite.in_all]
    for suite in kept.values():
        assert suite["scores"] and suite["resamples"] == 2000 and suite["settings"]["seed"] == 0
        for name, score in suite["scores"].items():
            assert score["ci95"][0] <= score["value"] <= score["ci95"][1] and score["rows"] > 0
            assert re.search(rf"^  {re.escape(name)} .*\d", said, re.M), name
    assert len(kept["accuracy"]["details"]["multiple_choice"]) == 200
    assert kept["contamination"]["details"]["multiple_choice"]["found"] == len(numbers)
    assert "  no alarm" in said and "2,000 resamples" in said and "run/eval.json" in said
    page = (here / "run/report.html").read_text()
    assert "multiple_choice: acc_norm" in page and "200 rows" in page


def test_a_later_evaluation_adds_to_the_file_and_json_goes_elsewhere(here):
    (here / "text.txt").write_text(" ".join(toys.documents(4)))
    evaluate("run", "overfitting", Settings(rows=4))
    evaluate("run/pretrain", "fluency", Settings(rows=4, text=("text.txt",)))
    assert list(json.loads((here / "run/eval.json").read_text())["pretrain"]) == ["overfitting", "fluency"]
    before = (here / "run/eval.json").read_text()
    evaluate("run", "fluency", Settings(rows=2, text=("text.txt",)), json="mine.json")
    assert (here / "run/eval.json").read_text() == before
    assert json.loads((here / "mine.json").read_text())["pretrain"]["fluency"]["settings"]["rows"] == 2


def test_the_same_seed_gives_the_same_numbers(here):
    first, again = (evaluate("run", "fluency,coherence", Settings(rows=8, row_length=192)) for _ in range(2))
    other = evaluate("run", "coherence", Settings(rows=8, row_length=192, seed=1))
    assert {k: v.json() for k, v in first.items()} == {k: v.json() for k, v in again.items()}
    assert other["coherence"].json() != first["coherence"].json()


def test_a_stage_is_measured_on_what_another_one_holds_out(here):
    """Of a stage named by --heldout, its rows and text alone, whichever stage is scored."""
    texts = [{"text": " ".join(toys.sentences(random.Random(i), 12)).replace("the", "a")} for i in range(120)]
    (here / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    c = config.experiment(tensorboard=False)
    c.stages.tokenizer, _ = config.of("run")
    c.stages.later = config.stage(
        init_from="run", steps=1, batch_size=8, samples=0, data=config.data("jsonl", path="more.jsonl", row_length=64)
    )
    lmtrain.run(c, here / "next")
    shutil.copytree(here / "run/pretrain", here / "next/pretrain")
    shutil.copytree(here / "run/data", here / "next/data", dirs_exist_ok=True)
    before, own = (
        evaluate("next/pretrain", "fluency", Settings(rows=4, heldout=stage, row_length=64))["fluency"]
        for stage in ("later", "")
    )
    after = evaluate("next/later", "fluency", Settings(rows=4, heldout="later", row_length=64))["fluency"]
    rows = "held-out rows of later: bits per byte"
    assert list(before.scores) == list(after.scores) and rows in before.scores and rows not in own.scores
    assert "held-out rows of pretrain: bits per byte" in own.scores
    assert "held-out rows of pretrain: bits per byte" not in after.scores
    words = "held-out text, the text itself: words"
    assert before.scores[words] == after.scores[words] != own.scores[words]
    assert before.scores[rows].value != after.scores[rows].value


def test_a_model_is_spread_over_all_devices_and_scores_as_on_one(here, monkeypatch):
    settings = Settings(rows=8, row_length=192, temperature=0.0)
    seen = []
    kept = likelihood.Likelihood._run
    monkeypatch.setattr(likelihood.Likelihood, "_run", lambda s, batch: seen.append(s) or kept(s, batch))
    many = evaluate("run", "fluency,coherence", settings)
    assert all(s.forward.mesh.shape["fsdp"] == jax.device_count() == 8 for s in seen)
    whole = [x for x in jax.tree.leaves(seen[0].params) if x.ndim > 2 and x.sharding.is_fully_replicated]
    assert not whole, "every matrix is split"
    one = evaluate(runs.load("run"), "fluency,coherence", settings)
    assert seen[-1].forward.mesh is None
    for suite, result in one.items():
        for name, score in result.scores.items():
            assert many[suite].scores[name].value == pytest.approx(score.value, abs=2e-4), name


def test_a_model_that_the_devices_do_not_divide_is_on_each_of_them():
    assert spread(toys.model()).shape["fsdp"] == 8
    assert dict(spread(toys.model(width=36, heads=2)).shape)["data"] == 8


def test_another_suite_is_a_function_in_the_table(here, monkeypatch, capsys):
    monkeypatch.setitem(suites.SUITES, "mine", suites.Suite(lambda s: Result(alarms=["what a model"]), "mine"))
    assert cli.main(["eval", "run", "--suite", "mine"]) == 0
    assert "ALARM: what a model" in capsys.readouterr().out


@pytest.mark.parametrize("more", [["--suite", "overfitting"], ["--text", "text.txt"]])
def test_a_flag_that_would_do_nothing_is_refused(here, more, capsys):
    (here / "text.txt").write_text("some text")
    assert cli.main(["eval", "run", "--heldout", "pretrain", *more]) == 2
    assert "--heldout pretrain says whose held-out text" in capsys.readouterr().err


def test_help_names_every_suite_and_flag(capsys):
    with pytest.raises(SystemExit):
        cli.main(["eval", "--help"])
    said = capsys.readouterr().out
    for line in suites.described():
        assert line.split()[0] in said
    assert all(flag in said for flag in ("--suite", "--tasks", "--text", "--rows", "--seed", "--json", "--format"))
    for name, suite in suites.SUITES.items():
        assert re.search(rf"^  {name} +{re.escape(suite.says)}", said, re.M), name


def assert_refused(capsys, argv, *words):
    """Runs the command; it must exit with 2 and one message that has every word."""
    try:
        code = cli.main(["eval", *argv])
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr().err
    assert code == 2 and "Traceback" not in said, said
    for word in words:
        assert word in said, said


WRONG = [
    (["run", "--suite", "acuracy"], ["'acuracy'", "Did you mean accuracy?"]),
    (["run", "--suite", ","], ["--suite is empty"]),
    (["nowhere"], ["nowhere", "no such folder"]),
    (["run", "--suite", "accuracy"], ["needs tasks", "--tasks NAME"]),
    (["run", "--suite", "accuracy", "--tasks", "additoin"], ["'additoin'", "Did you mean addition?"]),
    (["run", "--suite", "accuracy", "--tasks", "multiple_choice(path='no.jsonl')"], ["no.jsonl"]),
    (["run", "--suite", "accuracy", "--tasks", "multiple_choice(path='bad.jsonl')"], ["bad.jsonl:2", "answer"]),
    (["run", "--suite", "accuracy", "--tasks", "questions(path='empty.jsonl')"], ["empty.jsonl", "no row"]),
    (["run", "--suite", "fluency", "--text", "no.txt"], ["--text", "no.txt"]),
    (["run", "--suite", "fluency", "--text", "empty.txt"], ["--text empty.txt", "empty"]),
    (["run", "--suite", "fluency", "--heldout", "pretrane"], ["'pretrane'", "run", "Did you mean pretrain?"]),
    (["run", "--rows", "-1"], ["--rows is -1"]),
    (["run", "--ngram", "0"], ["--ngram is 0"]),
    (["run", "--rows", "many"], ["--rows", "many"]),
    (["run", "--row-length", "1", "--suite", "fluency"], ["--row-length is 1"]),
    (["run", "--format", "chatt"], ["'chatt'", "Did you mean chat?"]),
    (["run", "--json", "no/where.json"], ["--json no/where.json", "no folder"]),
    (["run", "--rwos", "3"], ["--rwos"]),
]


@pytest.mark.parametrize(("argv", "words"), WRONG, ids=[" ".join(argv)[:60] for argv, _ in WRONG])
def test_what_cannot_be_is_refused_in_one_message(here, capsys, argv, words):
    (here / "bad.jsonl").write_text('{"question": "?", "choices": ["a", "b"], "answer": 0}\n{"question": "?", '
                                    '"choices": ["a", "b"]}\n')  # fmt: skip
    (here / "empty.jsonl").write_text("")
    (here / "empty.txt").write_text(" \n")
    assert_refused(capsys, argv, *words)
    assert not (here / "run/eval.json").exists()


def test_tokenised_text_that_is_gone_is_named(here, capsys):
    shutil.rmtree(here / "run/data")
    assert_refused(capsys, ["run", "--suite", "contamination", "--tasks", "addition"], "run/pretrain", "tokenised text")


def test_a_model_from_elsewhere_is_told_which_suites_need_a_record(here, capsys):
    """`all` leaves them out and says why; asked for by name, they are refused."""
    run = runs.load("run")
    elsewhere = runs.Run(here, "model", {}, run.model, run.tokenizer, run.params, 0)
    (here / "text.txt").write_text(" ".join(toys.documents(8)))
    found = evaluate(elsewhere, "all", Settings(rows=4, text=("text.txt",), row_length=128))
    said = capsys.readouterr().out
    assert set(found) == {"fluency", "coherence"} and not (here / "eval.json").exists()
    for suite in ("accuracy", "overfitting", "contamination"):
        assert f"{suite}: left out." in said
    for suite in ("overfitting", "coherence,overfitting", "all,overfitting"):
        with pytest.raises(LmtrainError, match="own record"):
            evaluate(elsewhere, suite, Settings(rows=4, text=("text.txt",), row_length=128))


def test_a_reward_model_is_refused(here, capsys):
    (here / "pairs.jsonl").write_text(
        "".join(json.dumps({"prompt": f"say {i}", "chosen": f"yes {i}", "rejected": "no"}) + "\n" for i in range(200))
    )
    c = config.experiment(tensorboard=False)
    c.stages.tokenizer = config.tokenizer("file", path="run/tokenizer")
    data = config.data("jsonl", path="pairs.jsonl", row_length=64)
    c.stages.reward = config.stage(objective="reward", init_from="run", steps=1, batch_size=8, samples=0, data=data)
    lmtrain.run(c, here / "judge")
    assert_refused(capsys, ["judge", "--suite", "fluency"], "judge/reward", "scalar head")


@pytest.mark.slow
def test_conversations_have_a_record_too(here):
    """A stage on conversations after one on documents: rows of both, turns of both, and what it starts from."""
    talks = [{"prompt": f"what follows {i}", "completion": f"it is {i + 1} and then some more"} for i in range(300)]
    talks += [{"prompt": "planted: the answer to everything is", "completion": "forty two"}]
    (here / "talks.jsonl").write_text("".join(json.dumps(t) + "\n" for t in talks))
    c = config.experiment(tensorboard=False)
    c.stages.tokenizer = config.tokenizer("file", path="run/tokenizer")
    data = config.data("jsonl", path="talks.jsonl", row_length=64)
    c.stages.sft = config.stage(objective="sft", init_from="run", steps=2, batch_size=8, samples=0, data=data)
    run = lmtrain.run(c, here / "chat")
    asked = ("The answer to everything is", "what follows 9999")
    (here / "exam.jsonl").write_text("".join(json.dumps({"question": q, "answer": "no"}) + "\n" for q in asked))
    settings = Settings(tasks=("questions(path='exam.jsonl', max_tokens=8)",), rows=16)
    found = evaluate("chat", "contamination,overfitting,fluency,accuracy", settings)
    which = found["contamination"].details["questions"]["which"]
    assert [x["row"] for x in which] == [0] and which[0]["in"] == {"sft": "whole"}
    assert any("run/pretrain" in note and "sft" in note for note in found["contamination"].notes)
    assert found["overfitting"].scores["gap"].rows > 16
    scored = [row["heldout_loss"] for row in run.metrics if "heldout_loss" in row]
    whole = evaluate("chat", "fluency", Settings(rows=0, row_length=64))["fluency"].scores
    assert whole["held-out rows of sft: nats a token"].value == pytest.approx(scored[-1], rel=1e-4)
    assert "held-out rows of pretrain: bits per byte" in whole
    (here / "talks.jsonl").write_text(json.dumps(talks[0]) + "\n" + json.dumps(talks[1]) + "\n")
    with pytest.raises(LmtrainError, match="chat/sft"):
        evaluate("chat", "overfitting", Settings(rows=4))
