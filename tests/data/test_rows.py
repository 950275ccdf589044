import json
import sys
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain.data import rows, tokenizer
from lmtrain.data.chat import Template
from lmtrain.data.messages import Unusable
from lmtrain.schema import ConfigError, Data
from lmtrain.types import LmtrainError

U, A = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
A0, B, S = {**A, "weight": 0}, {"role": "assistant", "content": "b"}, {"role": "system", "content": "s"}
CALL = {"name": "f", "arguments": '{"x": 1}'}
OPENAI_CALL = {"id": "1", "type": "function", "function": CALL}


def write(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return str(path)


# -------------------------------------------------------------------------------------------------------------- sources


def test_the_same_rows_from_every_kind_of_file(tmp_path):
    items = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(5)]
    found = {"jsonl": write(tmp_path / "r.jsonl", items)}
    (tmp_path / "r.json").write_text(json.dumps(items))
    (tmp_path / "in.json").write_text(json.dumps({"version": 1, "rows": items}))
    for name in ("r.json", "in.json"):
        got = list(rows.rows(Data(source="json", path=str(tmp_path / name))))
        assert [row for _, row in got] == items and got[1][0] == f"{tmp_path / name}, item 2"
    for name in ("pyarrow.parquet", "array_record.python.array_record_module", "datasets"):
        pytest.importorskip(name)
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq
    from array_record.python.array_record_module import ArrayRecordWriter

    pq.write_table(pa.Table.from_pylist(items), tmp_path / "r.parquet")
    writer = ArrayRecordWriter(str(tmp_path / "r.arrayrecord"), "group_size:1")
    for item in items:
        writer.write(json.dumps(item).encode())
    writer.close()
    datasets.Dataset.from_list(items).save_to_disk(str(tmp_path / "hf"))
    found |= {"parquet": str(tmp_path / "r.parquet"), "arrayrecord": str(tmp_path / "r.arrayrecord")}
    for source, path in {**found, "hf": str(tmp_path / "hf")}.items():
        assert [row for _, row in rows.rows(Data(source=source, path=path))] == items, source
        assert len(list(rows.rows(Data(source=source, path=path, limit=2)))) == 2


def test_parquet_fills_up_with_none_which_is_no_field(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    tool = {"role": "tool", "content": "t"}
    items = [{"messages": [U, {**A, "tool_calls": [OPENAI_CALL]}, tool, {**A, "weight": 0}]}]
    items += [{"prompt": "p", "completion": "c"}]
    pq.write_table(pa.Table.from_pylist([{"messages": None, "prompt": None, "completion": None, **i} for i in items]),
                   tmp_path / "r.parquet")  # fmt: skip
    (_, first), (_, second) = rows.rows(Data(source="parquet", path=str(tmp_path / "r.parquet")))
    assert first["prompt"] is None and first["messages"][0]["tool_calls"] is None
    assert rows.conversation(first) == [U, {**A, "tool_calls": [CALL]}, {"role": "tool", "content": "t"}, A0]
    assert rows.conversation(second) == [{"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}]


def test_a_function_of_your_own_yields_rows(tmp_path, monkeypatch):
    (tmp_path / "myrows.py").write_text(
        "def talks(data):\n    yield {'prompt': data.path, 'completion': 'c'}\n\ndef bad(data):\n    yield 'text'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert list(rows.rows(Data(source="myrows:talks", path="x"))) == [
        ("myrows:talks#1", {"prompt": "x", "completion": "c"})
    ]
    with pytest.raises(Unusable, match="myrows:bad#1: a row is no object: got str"):
        list(rows.rows(Data(source="myrows:bad")))


class Adding:
    name, max_tokens = "adding", 4

    def rows(self, split):
        return range(100, 105) if split == "heldout" else range(20_000)

    def messages(self, row):
        return [U, A, {"role": "user", "content": f"{row} + 1"}]

    def solution(self, row):
        return [{"role": "assistant", "content": str(row + 1)}]


def test_a_tasks_demonstrations_are_rows_of_which_the_prompt_is_not_learned(monkeypatch):
    import lmtrain

    fake = types.ModuleType("lmtrain.tasks")
    fake.get = lambda name: {"adding": Adding(), "mute": object()}[name]
    monkeypatch.setitem(sys.modules, "lmtrain.tasks", fake)
    monkeypatch.setattr(lmtrain, "tasks", fake, raising=False)
    data = Data(source="task", path="adding")
    train = list(rows.rows(data))
    assert len(train) == rows.TASK_ROWS and len(list(rows.rows(Data(source="task", path="adding", limit=7)))) == 7
    assert rows.conversation(train[3][1]) == [
        U, A0, {"role": "user", "content": "3 + 1"}, {"role": "assistant", "content": "4"},
    ]  # fmt: skip
    held = list(rows.rows(data, split="heldout"))
    assert [row["messages"][-1]["content"] for _, row in held] == ["101", "102", "103", "104", "105"]
    assert held[0][0] == "task adding (heldout), row 0"
    with pytest.raises(LmtrainError, match="task mute has no solutions to learn from"):
        list(rows.rows(Data(source="task", path="mute")))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "text", "path": "x"}, r"source: text holds text, no conversations; chat takes jsonl, json"),
        ({"source": "jsnl", "path": "x"}, r"got 'jsnl', takes .*task or .*Did you mean jsonl\?"),
        ({"source": "jsonl"}, "data.path: not set; source jsonl takes a file"),
        ({"source": "task"}, "data.path: not set; source task takes a task's name"),
        ({"source": "jsonl", "path": "/no/such"}, "no such file, folder or glob"),
    ],
)
def test_sources_without_rows_are_refused(fields, message):
    with pytest.raises(LmtrainError, match=message):
        list(rows.rows(Data(**fields)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"r\.json: not JSON: "),
        ('{"a": 1}\n{"a": 2}', "r.json: not JSON: Extra data"),
        ("3", "a JSON array of rows was expected, got int"),
        ('{"a": 1}', "this object has no list in it"),
        ('{"a": [], "b": []}', "this object has the lists a, b"),
        ("[3]", "item 1: a row is no object: got int"),
    ],
)
def test_json_that_holds_no_rows_is_refused(tmp_path, content, message):
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(LmtrainError, match=message):
        list(rows.rows(Data(source="json", path=str(tmp_path / "r.json"))))


def test_single_rows_that_cannot_be_read_go_to_who_asks(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"prompt": "p"}\nbroken\n\n[1]\n{"prompt": "q"}\n' + "[" * 100_000 + "\n")
    bad = []
    good = [where for where, _ in rows.rows(Data(source="jsonl", path=str(path)), bad=bad.append)]
    assert good == [f"{path}:1", f"{path}:5"]
    reasons = [error.reason for error in bad]
    assert reasons == [
        "not a JSON line",
        "a row is no object",
        "JSON nested too deeply to be read",
    ]
    with pytest.raises(LmtrainError, match=r"r\.jsonl:2: not a JSON line"):
        list(rows.rows(Data(source="jsonl", path=str(path))))


# -------------------------------------------------------------------------------------------------------------- formats

P = {"role": "user", "content": "p"}
C = {"role": "assistant", "content": "c"}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": [S, U, A]}, [S, U, A]),
        ({"messages": [{**S, "role": "developer"}, U, {**A, "name": "x", "weight": 0}, U, A]}, [S, U, A0, U, A]),
        ({"messages": [{**S, "content": " "}, U, A]}, [U, A]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "u"}]}, A]}, [U, A]),
        ({"messages": [U, A], "system": "s"}, [S, U, A]),
        ({"messages": [S, U, A], "system": "other"}, [S, U, A]),
        (
            {"messages": [U, {"role": "assistant", "content": None, "tool_calls": [OPENAI_CALL]},
                          {"role": "tool", "tool_call_id": "1", "content": "t"}, A]},
            [U, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "t"}, A],
        ),
        (
            {"messages": [U, {"role": "assistant", "function_call": {"name": "f", "arguments": {"x": 1}}},
                          {"role": "function", "content": "t"}, A]},
            [U, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "t"}, A],
        ),
        ({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "u"},
                            {"from": "gpt", "value": "a"}]}, [S, U, A]),
        (
            {"conversations": [{"from": "human", "value": "u"}, {"from": "function_call", "value": json.dumps(CALL)},
                               {"from": "observation", "value": "t"}, {"from": "gpt", "value": "a"}], "system": "s"},
            [S, U, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "t"}, A],
        ),
        ({"conversations": [U, A]}, [U, A]),
        ({"instruction": "p", "input": "", "output": "c"}, [P, C]),
        ({"instruction": "p", "input": "q", "output": "c"}, [{"role": "user", "content": "p\n\nq"}, C]),
        ({"instruction": "p", "instances": [{"input": "", "output": "c"}]}, [P, C]),
        ({"instruction": "p", "output": "c", "system": "s"}, [S, P, C]),
        ({"prompt": "p", "completion": "c"}, [P, C]),
        ({"prompt": "p", "response": "c", "other": 3}, [P, C]),
        ({"prompt": [S, U, A, P], "completion": [C]}, [S, U, A0, P, C]),
        ({"prompt": "p", "completion": C}, [P, C]),
        ({"question": "p", "answer": "c"}, [P, C]),
        ({"prompt": "x", "messages": [U, A]}, [U, A]),
    ],
)  # fmt: skip
def test_conversations_in_every_format(row, messages):
    assert rows.conversation(row) == messages


@pytest.mark.parametrize(
    ("row", "columns", "messages"),
    [
        ({"problem": "p", "answer": "c"}, {"prompt": "problem"}, [P, C]),
        ({"q": "p", "text": "c"}, {"question": "q", "answer": "text"}, [P, C]),
        ({"question": "p", "prompt": "x", "answer": "c"}, {"prompt": "question"}, [P, C]),
        ({"chat": [U, A]}, {"messages": "chat"}, [U, A]),
        ({"messages": [U, A], "p": "p", "completion": "c"}, {"prompt": "p"}, [P, C]),
    ],
)
def test_columns_rename(row, columns, messages):
    assert rows.conversation(row, columns) == messages


def test_columns_that_are_not_there_are_named():
    with pytest.raises(Unusable, match=r"f:1: no such field: 'problm', .* takes for prompt\. Did you mean problem\?"):
        rows.conversation({"problem": "p", "answer": "c"}, {"prompt": "problm"}, "f:1")
    with pytest.raises(ConfigError, match=r"data\.columns: 'promt' is none of .*Did you mean prompt\?"):
        rows.check_columns({"promt": "x"})


def test_seed_tasks_with_several_instances_are_several_conversations():
    row = {"instruction": "p", "instances": [{"input": "", "output": "c"}, {"input": "q", "output": "d"}, "e"]}
    said = [[m["content"] for m in rows.conversation(part)] for part in rows.unfold(row)]
    assert said == [["p", "c"], ["p\n\nq", "d"], ["p", "e"]]
    with pytest.raises(Unusable, match="several conversations in a row"):
        rows.conversation(row)


def test_tools_of_a_row():
    tools = [{"type": "function", "function": {"name": "f"}}]
    for row in ({"tools": tools}, {"tools": json.dumps(tools)}, {"input": {"messages": [U], "tools": tools}}):
        assert rows.tools(row) == tools
    assert rows.tools({"messages": [U]}) == rows.tools({"tools": ""}) == rows.tools({"tools": None}) == []
    for wrong in ("{broken", 3, ["f"]):
        with pytest.raises(Unusable, match="f:1: unusable tools"):
            rows.tools({"tools": wrong}, where="f:1")


@pytest.mark.parametrize(
    ("row", "pair"),
    [
        ({"prompt": "u", "chosen": "a", "rejected": "b"}, ([U], [A], [B], None)),
        ({"prompt": "u", "chosen": "a", "rejected": "b", "margin": 2}, ([U], [A], [B], 2.0)),
        ({"question": "u", "chosen": [A], "rejected": B, "system": "s"}, ([S, U], [A], [B], None)),
        ({"prompt": [S, U, A, U], "chosen": [A], "rejected": [B]}, ([S, U, A0, U], [A], [B], None)),
        ({"prompt": "u", "chosen": [U, A], "rejected": [U, B]}, ([U], [A], [B], None)),
        ({"prompt": [S, U], "chosen": [U, A], "rejected": [S, U, B]}, ([S, U], [A], [B], None)),
        ({"chosen": [U, A, P, A], "rejected": [U, A, P, B]}, ([U, A0, P], [A], [B], None)),
        ({"chosen": [U, A, U, C], "rejected": [U, B]}, ([U], [A, U, C], [B], None)),
        ({"input": {"messages": [U]}, "preferred_output": [A], "non_preferred_output": [B]}, ([U], [A], [B], None)),
        ({"instruction": "u", "input": "v", "chosen": "a", "rejected": "b"},
         ([{"role": "user", "content": "u\n\nv"}], [A], [B], None)),
    ],
)  # fmt: skip
def test_pairs_in_every_format(row, pair):
    assert tuple(rows.pair(row)) == pair


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "u", "completion": "a", "label": True}, [([U], [A], True)]),
        ({"prompt": "u", "completion": "a", "label": 0}, [([U], [A], False)]),
        ({"prompt": "u", "completion": "a", "label": -1.0}, [([U], [A], False)]),
        ({"messages": [S, U, A, U, B], "label": 1}, [([S, U, A0, U], [B], True)]),
        ({"prompt": "u", "chosen": "a", "rejected": "b"}, [([U], [A], True), ([U], [B], False)]),
    ],
)
def test_labelled_replies_in_every_format(row, expected):
    assert [tuple(item) for item in rows.labelled(row)] == expected


BAD_PAIRS = [
    ({"prompt": "u", "rejected": "b"}, "no chosen reply", "the fields prompt, rejected"),
    ({"prompt": "u", "chosen": "a"}, "no rejected reply", "the fields prompt, chosen"),
    ({"prompt": "u", "chosen": "a", "rejected": None}, "no rejected reply", "the fields prompt, chosen"),
    ({"prompt": "u", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same", "teaches nothing"),
    ({"prompt": " ", "chosen": "a", "rejected": "b"}, "empty prompt", "prompt says nothing"),
    ({"prompt": [], "chosen": "a", "rejected": "b"}, "empty prompt", r"prompt is \[\]"),
    ({"prompt": [S], "chosen": "a", "rejected": "b"}, "no prompt", "that chosen could answer"),
    ({"prompt": 3, "chosen": "a", "rejected": "b"}, "no messages", "prompt is int"),
    ({"prompt": "u", "chosen": "a", "rejected": " "}, "empty reply", "rejected says nothing"),
    ({"prompt": "u", "chosen": 3, "rejected": "b"}, "no messages", "chosen is int"),
    ({"prompt": "u", "chosen": [P, A], "rejected": [U, B]}, "a reply that is not the assistant's", "chosen begins"),
    ({"prompt": "u", "chosen": [U], "rejected": [U, B]}, "no assistant turn", "chosen: the roles are user"),
    ({"chosen": "a", "rejected": "b"}, "no prompt", "nobody has said anything"),
    ({"prompt": "u", "chosen": "a", "rejected": "b", "margin": "1"}, "unusable margin", "'1', takes a number"),
    ({"prompt": "u", "chosen": "a", "rejected": "b", "margin": True}, "unusable margin", "True, takes a number"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "reason", "detail"), BAD_PAIRS)
def test_pairs_that_cannot_be_used_say_why(row, reason, detail):
    for reads in (rows.pair, rows.labelled):
        if reads is rows.labelled and ("chosen" not in row):
            continue
        with pytest.raises(Unusable, match=detail) as error:
            reads(row, where="f:1")
        assert str(error.value).startswith(f"f:1: {reason}: ")


BAD_LABELS = [
    ({"prompt": "u", "completion": "a"}, "no label", "the fields prompt, completion"),
    ({"prompt": "u", "completion": "a", "label": "yes"}, "unusable label", "'yes', takes true or false"),
    ({"prompt": "u", "completion": "a", "label": 0.5}, "unusable label", "0.5, takes true or false"),
    ({"messages": [U, A, U], "label": 1}, "a reply that is not the assistant's", "completion begins with user"),
    ({"messages": [A], "label": 1}, "no prompt", "that completion could answer"),
]


@pytest.mark.parametrize(("row", "reason", "detail"), BAD_LABELS)
def test_labelled_replies_that_cannot_be_used_say_why(row, reason, detail):
    with pytest.raises(Unusable, match=detail) as error:
        rows.labelled(row, where="f:1")
    assert str(error.value).startswith(f"f:1: {reason}: ")


BAD_TALKS = [
    ({}, "no conversation in it", "it has the fields none"),
    ({"prompt": "u", "text": "a"}, "no conversation in it", r"\(data.columns renames fields\)"),
    ({"messages": "hi"}, "no messages", "messages is str"),
    ({"messages": []}, "no messages", "an empty list"),
    ({"messages": [U]}, "no assistant turn", "the roles are user"),
    ({"messages": [U, "a"]}, "a message is no object", r"messages\[1\] is str"),
    ({"messages": [U, {**A, "role": "bot"}]}, "unknown role", r"messages\[1\].role is 'bot'"),
    ({"messages": [{"role": "user"}, A]}, "empty content", r"messages\[0\] \(user\)"),
    ({"messages": [{**U, "content": 3}, A]}, "content is no text", "int"),
    ({"messages": [{**U, "content": [{"type": "image_url"}]}, A]}, "content is no text", r"content\[0\] is image_url"),
    ({"messages": [U, {**A, "tool_calls": [{"id": 1}]}]}, "unusable tool call", r"tool_calls\[0\] takes an object"),
    ({"messages": [U, {**A, "tool_calls": 3}]}, "unusable tool call", "is int, takes a list"),
    ({"messages": [U, {**A, "weight": 0.5}]}, "unusable weight", "0.5, takes 0 or 1"),
    ({"conversations": [{"from": "human", "value": "u"}, {"from": "alien", "value": "a"}]}, "unknown role", "'alien'"),
    ({"conversations": [{"from": "human", "value": "u"}, {"from": "function_call", "value": "x"}]},
     "unusable tool call", r"conversations\[1\]"),
    ({"instruction": "p", "input": "", "output": ""}, "empty reply", "output says nothing"),
    ({"question": "", "answer": "c"}, "empty prompt", "question says nothing"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "reason", "detail"), BAD_TALKS)
def test_conversations_that_cannot_be_used_say_why(row, reason, detail):
    with pytest.raises(Unusable, match=detail) as error:
        rows.conversation(row, where="f:1")
    assert str(error.value).startswith(f"f:1: {reason}: ")


# -------------------------------------------------------------------------------------------------- anything at all

_KEYS = st.sampled_from([*rows.COLUMNS, "instances", "preferred_output", "non_preferred_output", "role", "content",
                         "from", "value", "tool_calls", "function", "name", "arguments", "weight", "function_call",
                         "type", "text"])  # fmt: skip
_WORDS = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "function_call", "hi", "", " ", "{}",
                          '{"name": "f"}', "\ud800", "<|end|>"])  # fmt: skip
_ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.floats() | _WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_KEYS, inner, max_size=4),
    max_leaves=16,
)
_TALK = st.lists(st.fixed_dictionaries({"role": _WORDS, "content": _WORDS | _ANY}, optional={
    "tool_calls": _ANY, "weight": _ANY}), max_size=4)  # fmt: skip
_TEMPLATE = Template(tokenizer.bytes_tokenizer())


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(_KEYS, _ANY | _TALK, max_size=6))
def test_whatever_a_row_holds_it_is_used_or_refused_in_one_message(row):
    def encodes(*talks):
        for talk in talks:
            _TEMPLATE.encode(talk, tools)

    for reads in (
        lambda: encodes(*(rows.conversation(part) for part in rows.unfold(row))),
        lambda: encodes(*((p := rows.pair(row)).prompt + p.chosen, p.prompt + p.rejected)),
        lambda: encodes(*(prompt + reply for prompt, reply, _ in rows.labelled(row))),
    ):
        try:
            tools = rows.tools(row)
            reads()
        except Unusable as error:
            assert error.reason and len(error.reason) < 60
