"""Fine-tuning files of OpenAI's: each bad line is named with its reason, none is accepted, good ones are trained on."""

import gzip
import json
import re
import sys

import pytest

import lmtrain
from lmtrain import cli, config
from lmtrain.data import chat, conversations, openai_rows, rows, samples, strict, tokenizer
from lmtrain.data.messages import Unusable
from lmtrain.interop import openai_data
from lmtrain.rollout import episodes
from lmtrain.schema import Data
from lmtrain.tasks import graders
from tests.interop import lines
from tests.test_post_training import chat_stage, experiment, rl_stage

KINDS = tuple(lines.FORMATS)


@pytest.fixture
def write(tmp_path):
    """Writes a file of a format's forty lines, or of those given; gives its path. Beside it lies grader.json."""
    (tmp_path / "grader.json").write_text(json.dumps(lines.GRADER))

    def file(given, name="train.jsonl"):
        text = given if isinstance(given, bytes) else b"".join(
            (row if isinstance(row, bytes) else lines.text(row)) + b"\n" for row in given)  # fmt: skip
        (tmp_path / name).write_bytes(text)
        return str(tmp_path / name)

    file.grader = str(tmp_path / "grader.json")
    return file


def command(*argv):
    return cli.main([str(word) for word in argv])


def said_of(report):
    return {int(where.rpartition(":")[2]): error for where, error in report.bad.items()}


def numbers(report):
    return [int(where.rpartition(":")[2]) for where in report.good]


# ------------------------------------------------------------------------------------------------------ the forty lines
@pytest.mark.parametrize("kind", KINDS)
def test_each_bad_line_of_forty_is_named_and_none_accepted(write, kind, capsys, tmp_path):
    text, marks, faults = lines.forty(kind)
    file = write(text)
    argv = ["check", file, "--json", tmp_path / "report.json"]
    assert command(*argv, *(("--grader", write.grader) if kind == "reinforcement" else ())) == 2
    out, err = capsys.readouterr()
    shown = dict(re.findall(rf"^{re.escape(file)}:(\d+): (.*)$", out, re.M))
    assert {int(n) for n in shown} == set(faults), "each bad line, and no good one"
    for number, (reason, detail) in faults.items():
        assert shown[str(number)].startswith(f"{reason}: ") and detail in shown[str(number)], number
    assert len({(reason, shown[str(n)]) for n, (reason, _) in faults.items()}) == 28, "28 different reasons"
    assert f"{kind}" in out and "40 lines, 12 good, 28 bad" in out
    assert err.strip() == f"lmtrain: {file}: 28 of 40 lines are bad"
    report = json.loads((tmp_path / "report.json").read_text())
    assert [place["line"] for place in report["good"]] == sorted(marks) and report["kind"] == kind
    assert {b["line"]: b["reason"] for b in report["bad"]} == {n: reason for n, (reason, _) in faults.items()}
    assert sum(report["reasons"].values()) == 28 and report["bad"][0]["file"] == file


@pytest.mark.parametrize("kind", KINDS)
def test_the_good_lines_alone_are_a_good_file(write, kind, capsys):
    good = lines.FORMATS[kind][0]
    assert command("check", write(good), "--kind", kind) == 0
    out, err = capsys.readouterr()
    assert "12 lines, 12 good, 0 bad" in out and not err


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_kinds_of_slips_in_other_places_are_named_too(write, kind):
    more = lines.FORMATS[kind][2]
    found = said_of(
        openai_data.check(write([line for line, _, _ in more]), kind, write.grader if kind == "reinforcement" else "")
    )
    for number, (line, reason, detail) in enumerate(more, 1):
        assert number in found, f"accepted: {line!r:.200}"
        assert found[number].reason == reason and detail in found[number].detail, found[number]


# ---------------------------------------------------------------------------------------------------------- training
def marks_in(tokens, tok):
    return set(re.findall(r" <<\d+>>", tok.decode([int(t) for t in tokens])))


@pytest.fixture
def trained(monkeypatch):
    """Marks of what conversations gave the loop, and of what they held out, while a run goes on."""
    seen = {"trained": set(), "heldout": set()}
    build = conversations.build

    def spy(kind, data, tok, *rest, **more):
        source, heldout = build(kind, data, tok, *rest, **more)
        draw = source.next

        def next_batch(params=None):
            batch = draw(params)
            seen["trained"] |= marks_in(batch["tokens_BT"].ravel(), tok)
            return batch

        source.next = next_batch
        for batch in heldout.batches():
            seen["heldout"] |= marks_in(batch["tokens_BT"].ravel(), tok)
        return source, heldout

    monkeypatch.setattr(conversations, "build", spy)
    return seen


def openai(path, **fields):
    given = dict(path=path, row_length=768, pack=False, heldout_rows=0, heldout_fraction=0.05)
    return config.data("openai", **{**given, **fields})


def stage(objective, path, **fields):
    more = dict(objective=objective, steps=2, eval_every=0, checkpoint_every=0, samples=0)
    return chat_stage(data=openai(path, **fields), **more)


@pytest.mark.slow
def test_a_model_is_trained_on_the_good_lines_of_each_format(write, tmp_path, trained, monkeypatch, capsys):
    """SFT, then DPO and GRPO from it; each sees exactly the good lines."""
    # -------------------------------------------------------------------------------- supervised
    text, marks, _ = lines.forty("supervised")
    run = lmtrain.run(experiment(sft=stage("sft", write(text, "talks.jsonl"))), tmp_path / "sft")
    said = capsys.readouterr().out
    assert run.step == 2 and "11 conversations" in said and "1 held out, 28 skipped" in said
    assert trained["trained"] | trained["heldout"] == set(marks.values())
    assert len(trained["trained"]) == 11 and not trained["trained"] & trained["heldout"]
    # -------------------------------------------------------------------------------- preference
    trained["trained"], trained["heldout"] = set(), set()
    text, marks, _ = lines.forty("preference")
    pairs = stage("dpo", write(text, "pairs.jsonl"))
    pairs.init_from = str(run.folder)
    done = lmtrain.run(experiment(preference=pairs), tmp_path / "dpo")
    said = capsys.readouterr().out
    assert done.step == 2 and "11 pairs" in said and "28 skipped" in said
    assert trained["trained"] | trained["heldout"] == set(marks.values()) and len(trained["trained"]) == 11
    # -------------------------------------------------------------------------------- reinforcement
    text, marks, _ = lines.forty("reinforcement")
    prompts = write(text, "prompts.jsonl")
    asked, begin = [], episodes.start

    def start(task, row, template, seed, version=0):
        asked.append(row["messages"][-1]["content"])
        return begin(task, row, template, seed, version)

    monkeypatch.setattr(episodes, "start", start)
    generous = json.loads(json.dumps(lines.GRADER))  # an untrained model that ends at all says something else
    generous["graders"]["right"]["operation"] = "ne"
    (tmp_path / "generous.json").write_text(json.dumps(generous))
    spec = f"openai(path={prompts!r}, grader={str(tmp_path / 'generous.json')!r}, max_tokens=64)"
    rollout = {"group": 2, "temperature": 2.0, "max_tokens": 0}
    data = config.data(row_length=768, pack=False, heldout_rows=0)
    rl = rl_stage("grpo", init_from=str(run.folder), eval_every=0, samples=0, rollout=rollout, data=data)
    rl.rollout.tasks = (spec,)
    done = lmtrain.run(experiment(rl=rl), tmp_path / "rl")
    said = capsys.readouterr().out
    assert done.step == 3 and "task openai: left out: " in said and f"{prompts}:1: blank line" in said
    assert {re.search(r" <<\d+>>", question)[0] for question in asked} == set(marks.values())
    rewards = [json.loads(line) for line in (tmp_path / "rl/rl/metrics.jsonl").read_text().splitlines()]
    assert max(m.get("reward", 0) for m in rewards) > 0, "the grader gives something"


@pytest.mark.parametrize("kind", ["supervised", "preference"])
def test_a_bad_line_ends_a_run_that_refuses_it(write, kind, tmp_path):
    text, _, faults = lines.forty(kind)
    file = write(text)
    c = experiment(sft=stage({"supervised": "sft", "preference": "reward"}[kind], file, malformed="refuse"))
    with pytest.raises(lmtrain.types.LmtrainError, match=f"{re.escape(file)}:1: {faults[1][0]}"):
        lmtrain.run(c, tmp_path / "run")


@pytest.mark.parametrize("kind", KINDS)
def test_what_check_calls_good_is_what_training_takes(write, kind):
    """Over all lines of the three formats at once: a line of another format is bad, not read as something else."""
    every = [row for good, bad, more in lines.FORMATS.values() for row in [*good, *(line for line, *_ in bad + more)]]
    file = write([row for row in every if not isinstance(row, bytes) or row.strip()])
    report = openai_data.check(file, kind, write.grader if kind == "reinforcement" else "")
    assert numbers(report)
    if kind == "reinforcement":
        task = lmtrain.tasks.get(f"openai(path={file!r}, grader={write.grader!r})")
        taken = {task.problem(row) for split in ("train", "heldout") for row in task.rows(split)}
        good = [value for where, value in strict.lines(Data(path=file)) if where in report.good]
        assert taken == {task.problem({"item": value}) for value in good} and len(taken) == 12
        return
    data = Data(source="openai", path=file)
    skipped = samples.Report()
    what = "chat" if kind == "supervised" else "pairs"
    found = [sample.where for sample in samples.samples(what, data, "data", "train", skipped)]
    assert found == list(report.good) and skipped.skipped == len(report.bad)


def test_preference_lines_serve_labels_too(write):
    file = write(lines.PREFERENCE_GOOD)
    found = list(samples.samples("labels", Data(source="openai", path=file), "data", "train", samples.Report("refuse")))
    assert [sample.value for sample in found] == [1.0, -1.0] * 12


# ----------------------------------------------------------------------------------------------- what becomes of a line
def test_results_stand_in_the_order_of_their_calls():
    row = openai_rows.check("supervised", lines.SUPERVISED_GOOD[6])
    roles = [(m["role"], m["content"]) for m in row["messages"]]
    assert roles[2:] == [("tool", "wet"), ("tool", "9:15"), ("assistant", "Wet, 9:15.")]
    assert [c["name"] for c in row["messages"][1]["tool_calls"]] == ["weather", "local_time"]
    assert rows.conversation(row) == row["messages"], "as the rest of lmtrain reads it"


def test_the_older_form_of_tools_becomes_the_newer():
    row = openai_rows.check("supervised", lines.SUPERVISED_GOOD[7])
    assert row["tools"] == [lines.WEATHER]
    assert row["messages"][1]["tool_calls"] == [{"name": "weather", "arguments": "{}"}]
    assert row["messages"][2] == {"role": "tool", "content": "dry"}


def test_a_refusal_is_what_the_assistant_says():
    row = openai_rows.check("supervised", lines.SUPERVISED_GOOD[8])
    assert row["messages"][1] == {"role": "assistant", "content": "I will not."}


def test_the_tools_of_a_line_are_shown_to_the_model(write):
    template = chat.Template(tokenizer.bytes_tokenizer())
    row = openai_rows.check("supervised", lines.SUPERVISED_GOOD[5])
    assert '"name": "weather"' in tokenizer.bytes_tokenizer().decode(template.encode(row["messages"], row["tools"])[0])
    file = write([lines.ask(lines.user("A"), tools=[lines.WEATHER]), lines.ask(lines.user("B"), tools=[lines.WEATHER])])
    task = lmtrain.tasks.get(f"openai(path={file!r}, grader={write.grader!r})")
    ids = episodes.start(task, task.rows("train")[0], template, 0).tokens
    assert '"name": "weather"' in template.tokenizer.decode(ids)


def test_of_two_prompts_one_is_held_out(write):
    """Whichever two: chance would often leave a side of so small a file empty."""
    for i in range(20):
        pair = [lines.ask(lines.user(f"{i} {k}")) for k in "ab"]
        task = lmtrain.tasks.get(f"openai(path={write(pair)!r}, grader={write.grader!r})")
        assert len(task.rows("train")) == len(task.rows("heldout")) == 1


# ------------------------------------------------------------------------------------------------------- reading lines
def test_line_ends_compression_and_blank_lines_at_the_end_do_no_harm(write, tmp_path):
    good = [lines.text(row) for row in lines.SUPERVISED_GOOD[:3]]
    assert numbers(openai_data.check(write(b"\r\n".join(good)))) == [1, 2, 3]
    assert numbers(openai_data.check(write(b"\n".join(good) + b"\n\n \n\n"))) == [1, 2, 3]
    (tmp_path / "z.jsonl.gz").write_bytes(gzip.compress(b"\n".join(good)))
    assert numbers(openai_data.check(str(tmp_path / "z.jsonl.gz"))) == [1, 2, 3]
    found = openai_data.check(write(good[0] + b"\n\n\n" + good[1]))
    assert numbers(found) == [1, 4] and set(said_of(found)) == {2, 3}
    every = [where for where, _ in strict.lines(Data(path=write(b"\n".join([good[0], b"", *good]))))]
    assert [where.rpartition(":")[2] for where in every] == ["1", "2", "3", "4", "5"], "each once"


def test_a_folder_is_checked_file_by_file(write, tmp_path, capsys):
    (tmp_path / "both").mkdir()
    for name in ("a", "b"):
        (tmp_path / "both" / f"{name}.jsonl").write_bytes(lines.text(lines.SUPERVISED_GOOD[0]) + b"\n{\n")
    assert command("check", tmp_path / "both") == 2
    out = capsys.readouterr().out
    assert "a.jsonl:2: not JSON" in out and "b.jsonl:2: not JSON" in out and "4 lines, 2 good, 2 bad" in out


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_is_told_by_most_lines(write, kind):
    good = lines.FORMATS[kind][0]
    other = next(rows for name, (rows, *_) in lines.FORMATS.items() if name != kind)
    report = openai_data.check(write([*other[:2], *good]))
    assert report.kind == kind and report.guessed and set(said_of(report)) == {1, 2}


# --------------------------------------------------------------------------------------------------------- wrong input
@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["FILE", "--kind", "supervized"], "kind is 'supervized'.*Did you mean supervised"),
        (["nowhere.jsonl"], "no such file.*nowhere.jsonl"),
        (["FILE", "--kind", "preference", "--grader", "GRADER"], "leave --grader out"),
        (["FILE", "--grader", "nowhere.json"], "no such file.*nowhere.json"),
        (["FILE", "--grader", "FILE"], "train.jsonl: .*type"),
        (["FILE", "--json", "no/such/folder/r.json"], "--json.*cannot be written"),
        (["EMPTY"], "no line in it"),
        (["EMPTY", "--kind", "supervised"], "no line in it"),
        (["STRANGE"], "say it: --kind supervised|preference|reinforcement"),
    ],
)
def test_a_wrong_command_ends_in_one_message(write, argv, says, capsys):
    named = {
        "FILE": write(lines.SUPERVISED_GOOD[:1]), "EMPTY": write(b"\n", "e.jsonl"), "GRADER": write.grader,
        "STRANGE": write([{"text": "Hi"}, b"{"], "s.jsonl"),
    }  # fmt: skip
    assert command("check", *(named.get(word, word) for word in argv)) == 2
    err = capsys.readouterr().err
    assert re.search(says, err) and err.startswith("lmtrain: ") and len(err.strip().splitlines()) == 1


def test_the_help_of_the_command_says_what_a_line_has(capsys):
    with pytest.raises(SystemExit) as end:
        command("check", "--help")
    out = capsys.readouterr().out
    assert end.value.code == 0 and all(
        word in out for word in (*KINDS, "--grader", "--json", "Exit status", "data.source")
    )


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("openai(path='FILE')", "grader is not set"),
        ("openai(path='nowhere.jsonl', grader='GRADER')", "no such file.*nowhere.jsonl"),
        ("openai(path='FILE', grader='nowhere.json')", "no such file.*nowhere.json"),
        ("openai(path='FILE', grader='GRADER', malformed='skp')", "Did you mean skip"),
        ("openai(path='FILE', grader='GRADER', greder='x')", "Did you mean grader"),
        ("openai(path='TALKS', grader='GRADER')", "no line that can be used.*the last message is not a user's"),
        ("openai(path='BAD', grader='GRADER', malformed='refuse')", "p.jsonl:1: blank line"),
        ("openai(path='FILE', heldout_path='TALKS', grader='GRADER')", "no line that can be used"),
        ("openai(path='FILE', grader='GRADER', seconds=0.0)", "seconds is 0.0"),
    ],
)
def test_a_task_that_cannot_be_is_refused_before_training(write, spec, says):
    names = {
        "FILE": write(lines.REINFORCEMENT_GOOD), "GRADER": write.grader,
        "TALKS": write(lines.SUPERVISED_GOOD, "t.jsonl"), "BAD": write(lines.forty("reinforcement")[0], "p.jsonl"),
    }  # fmt: skip
    for name, path in names.items():
        spec = spec.replace(f"'{name}'", repr(path))
    with pytest.raises(lmtrain.types.LmtrainError, match="(?s)" + says):
        lmtrain.tasks.get(spec)


def test_a_task_without_a_file_says_so():
    with pytest.raises(lmtrain.types.LmtrainError, match="task openai: path is not set"):
        lmtrain.tasks.get("openai").rows("train")


def test_columns_of_an_openai_source_are_refused(write, tmp_path):
    c = experiment(sft=stage("sft", write(lines.SUPERVISED_GOOD), columns={"messages": "talk"}))
    with pytest.raises(lmtrain.types.LmtrainError, match="data.columns.*source jsonl renames"):
        lmtrain.run(c, tmp_path / "run")


def test_a_file_without_a_good_line_is_refused_before_training(write, tmp_path):
    c = experiment(sft=stage("sft", write(lines.PREFERENCE_GOOD)))
    with pytest.raises(lmtrain.types.LmtrainError, match="no conversations to train on.*12 x another format"):
        lmtrain.run(c, tmp_path / "run")
    assert not (tmp_path / "run/tokenizer").exists()


# ------------------------------------------------------------------------------------------------------------ the task
def asked(row):
    return repr([m["content"] for m in row["messages"]])


def test_a_prompt_with_several_answers_is_on_one_side(write):
    many = [lines.ask(lines.user(f"Q{i}"), answer=f"{k}") for i in range(40) for k in range(3)]
    task = lmtrain.tasks.get(f"openai(path={write(many)!r}, grader={write.grader!r})")
    train, held = task.rows("train"), task.rows("heldout")
    assert len(train) + len(held) == 120 and len(held) % 3 == 0
    assert not {asked(row) for row in train} & {asked(row) for row in held}
    first, second = write(many[:60], "a.jsonl"), write([{**row, "answer": "new"} for row in many[30:45]], "b.jsonl")
    task = lmtrain.tasks.get(f"openai(path={first!r}, heldout_path={second!r}, grader={write.grader!r})")
    assert {asked(row) for row in task.rows("heldout")} == {f"['Q{i}']" for i in range(10, 15)}
    assert len(task.rows("heldout")) == 5, "the second file's alone, lines that repeat counted once"
    assert {asked(row) for row in task.rows("train")} == {f"['Q{i}']" for i in (*range(10), *range(15, 20))}


def test_the_task_keeps_every_turn_and_splits_by_the_prompt(write):
    many = [lines.marked(row, f" <<{i}.{k}>>") for i in range(12) for k, row in enumerate(lines.REINFORCEMENT_GOOD)]
    task = lmtrain.tasks.get(f"openai(path={write(many)!r}, grader={write.grader!r})")
    train, held = task.rows("train"), task.rows("heldout")
    assert len(train) + len(held) == 144 and 5 < len(held) < 40
    assert not {asked(row) for row in train} & {asked(row) for row in held}
    row = next(row for row in train if ".3>>" in row["messages"][-1]["content"])
    assert [m["role"] for m in task.messages(row)] == ["user", "assistant", "user"]
    assert json.loads(json.dumps(row)) == row
    again = lmtrain.tasks.get(f"openai(path={write(many[::-1], 'b.jsonl')!r}, grader={write.grader!r})")
    assert [task.problem(r) for r in again.rows("heldout")] == [task.problem(r) for r in held]


def test_the_task_scores_a_reply_and_its_calls(write, tmp_path):
    called = {"type": "string_check", "input": "{{sample.output_tools[0].function.name}}", "operation": "eq",
              "reference": "weather"}  # fmt: skip
    (tmp_path / "calls.json").write_text(json.dumps(called))
    file = write(lines.REINFORCEMENT_GOOD)
    task = lmtrain.tasks.get(f"openai(path={file!r}, grader={str(tmp_path / 'calls.json')!r})")
    row = openai_rows.check("reinforcement", lines.REINFORCEMENT_GOOD[6])
    reply = {"role": "assistant", "content": "", "tool_calls": [{"name": "weather", "arguments": "{}"}]}
    assert task.score_conversation(row, [*row["messages"], reply]) == {"score": 1.0}
    assert task.score_conversation(row, [*row["messages"], {**reply, "truncated": True}]) == {"score": 0.0}
    assert task.score(row, "weather") == 0.0, "said, not called"
    task = lmtrain.tasks.get(f"openai(path={file!r}, grader={write.grader!r})")
    assert task.score(row, "a") == 0.5 and task.score(row, "ea") == pytest.approx(0.5 + 0.5 * 2 / 3)


@pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is for Linux")
def test_a_grader_that_breaks_is_said_once(write, tmp_path, capsys):
    broken = {"type": "python", "source": "def grade(s, i):\n    return s['no']"}
    (tmp_path / "broken.json").write_text(json.dumps(broken))
    file = write(lines.REINFORCEMENT_GOOD)
    task = lmtrain.tasks.get(f"openai(path={file!r}, grader={str(tmp_path / 'broken.json')!r})")
    row = task.rows("train")[0]
    assert [task.score(row, "a"), task.score(row, "b")] == [0.0, 0.0]
    said = capsys.readouterr().out
    assert said.count("KeyError: 'no'") == 1 and "counts as 0" in said


def test_a_line_is_judged_by_the_fields_that_its_grader_reads():
    grader = graders.make(lines.GRADER, "grader", None)
    grader.check(lines.ask())
    with pytest.raises(Unusable, match="item has no answer: it has messages, more, ansver. Did you mean ansver"):
        grader.check({**lines.without("answer"), "ansver": "a"})
