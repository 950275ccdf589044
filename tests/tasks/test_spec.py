"""How tasks and rewards are named, and what is said about a name or a setting that cannot be."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain import tasks
from lmtrain.tasks import rewards, spec
from lmtrain.types import LmtrainError


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a, b", ["a", "b"]),
        ("a(x=1, y=(2, 3)), b", ["a(x=1, y=(2, 3))", "b"]),
        ("a(p='x, (y'), b(q=\"it's, so\")", ["a(p='x, (y')", 'b(q="it\'s, so")']),
        (" , a,", ["a"]),
        ("", []),
    ],
)
def test_several_are_cut_at_commas_outside_brackets_and_quotes(text, names):
    assert spec.several(text) == names


def test_names_lists_the_files():
    assert tasks.names() == [
        "addition",
        "calculator",
        "canary",
        "chatroom",
        "code",
        "consistency",
        "counterfactual",
        "functions",
        "gsm8k",
        "multiple_choice",
        "openai",
        "pydocs",
        "questions",
        "replies",
        "several",
        "sorting",
        "spelling",
    ]
    assert rewards.names() == ["ended", "facts", "length", "matches", "no_repetition", "on_topic"]
    for name in tasks.names():
        assert name in ("code", "gsm8k", "multiple_choice", "questions") or tasks.get(name).name == name


def test_settings_reach_the_task():
    task = tasks.get(" addition( digits = 2,reversed=True ) ")
    assert (task.digits, task.reversed) == (2, True)
    assert tasks.get("addition()").digits == 3
    assert tasks.get("chatroom(sloppy=1)").sloppy == 1.0, "a whole number will do for a float"


BAD = [
    ("adition", ["'adition'", "Did you mean addition?", "known: addition, "]),
    ("addition(digit=2)", ["'digit'", "Did you mean digits?", "digits=3", "reversed=False"]),
    ("addition(digits='2')", ["digits is '2'", "a whole number", "default 3"]),
    ("addition(digits=True)", ["digits is True", "a whole number"]),
    ("addition(digits=2.5)", ["digits is 2.5", "a whole number"]),
    ("addition(reversed=1)", ["reversed is 1", "True or False"]),
    ("addition(digits=0)", ["addition(digits=0)", "digits is 0", "1 to 12"]),
    ("addition(2)", ["settings have names"]),
    ("addition(digits=2", ["was never closed"]),
    ("addition(digits=2))", ["unmatched"]),
    ("addition(digits=x)", ["digits=x is no number", "digits='x'"]),
    ("addition(digits=[x])", ["digits=[x] is no number"]),
    ("addition(digits=__import__('os').getpid())", ["is no number"]),
    ("addition(**{})", ["**"]),
    ("addition(digits=2)(3)", ["settings have names"]),
    ("", ["''", "known: "]),
    ("sorting(least=5, most=4)", ["most is 4", "5"]),
    ("chatroom(sloppy=2)", ["sloppy is 2", "0 to 1"]),
    ("chatroom(turns=0)", ["turns is 0"]),
    ("pydocs(about='modules')", ["'modules'", "Did you mean module?"]),
    ("pydocs(choices=1)", ["choices is 1"]),
    ("gsm8k(format_score=2)", ["format_score is 2"]),
    ("code(memory_mb=1)", ["memory_mb is 1"]),
    ("code(cpu_seconds=0)", ["cpu_seconds is 0"]),
    ("no.such.module:Task", ["no.such.module:Task", "cannot import", "No module named"]),
    ("lmtrain.tasks.addition:Adition", ["no 'Adition'", "Did you mean Addition?"]),
    ("lmtrain.tasks.addition:", ["has no ''"]),
    ("lmtrain.tasks.generated:TRAIN", ["int", "takes a class"]),
    ("lmtrain.tasks.words:word", ["cannot be made", "TypeError"]),
    ("lmtrain.types:LmtrainError", ["has no name, max_tokens, rows, messages, score"]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "words"), BAD, ids=[b[0] or "empty" for b in BAD])
def test_a_task_that_cannot_be_is_refused_in_one_message(text, words):
    with pytest.raises(LmtrainError) as error:
        tasks.get(text)
    for word in words:
        assert word in str(error.value), str(error.value)
    assert "\n" not in str(error.value)


def test_something_else_than_text_is_refused():
    with pytest.raises(LmtrainError, match="task is None, but takes text"):
        tasks.get(None)


def test_your_own_task_is_a_dotted_path(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "class Echo:\n    name, max_tokens = 'echo', 4\n    def __init__(self, n): self.n = n\n"
        "    def rows(self, split): return [{'n': self.n}]\n    def messages(self, row): return []\n"
        "    def score(self, row, reply): return 1.0\n"
        "def broken(row, messages, *, bias=0.0): return 2.0 + bias\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert tasks.get("mine:Echo(n=3)").rows("train") == [{"n": 3}]
    with pytest.raises(LmtrainError, match="mine:Echo.*missing 1 required"):
        tasks.get("mine:Echo")
    with pytest.raises(LmtrainError, match="reward mine:broken.bias=1.: gave 3.0"):
        rewards.get("mine:broken(bias=1)")({}, [])


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40) | st.text("addition(digits=2,'\"[]{}:*)", max_size=40))
def test_any_text_is_read_or_refused(text):
    try:
        name, given_settings = spec.parse(text, "task")
    except LmtrainError:
        return
    assert "(" not in name and isinstance(given_settings, dict)


@given(
    st.dictionaries(
        st.from_regex(r"[a-z]{1,6}", fullmatch=True), st.integers() | st.booleans() | st.text(max_size=9), max_size=4
    )
)
def test_what_is_written_is_what_is_read(given_settings):
    import keyword

    given_settings = {k: v for k, v in given_settings.items() if not keyword.iskeyword(k)}
    text = f"task({', '.join(f'{k}={v!r}' for k, v in given_settings.items())})"
    assert spec.parse(text, "task") == ("task", given_settings)
