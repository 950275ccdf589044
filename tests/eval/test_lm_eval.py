"""The bridge to lm-evaluation-harness: the same scores as `lmtrain eval`, to the row. `make test-peers` has it."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

lm_eval = pytest.importorskip("lm_eval")

from lm_eval import utils  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.model import TemplateLM  # noqa: E402

from lmtrain import cli, runs  # noqa: E402
from lmtrain.data import tokenizer  # noqa: E402
from lmtrain.eval import accuracy, harness  # noqa: E402
from lmtrain.eval.likelihood import begin, encode_pair  # noqa: E402
from lmtrain.evaluate import subject  # noqa: E402
from lmtrain.tasks import questions  # noqa: E402
from lmtrain.types import LmtrainError  # noqa: E402
from tests.eval import toys  # noqa: E402

EXAM = """
task: exam
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/exam.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_bytes}]
"""
QUIZ = """
task: quiz
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/quiz.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: answer
generation_kwargs: {until: ["STOP"], max_gen_toks: 12}
metric_list:
  - {metric: exact_match, ignore_case: true, ignore_punctuation: true, regexes_to_ignore: ["^\\\\s+|\\\\s+$"]}
"""
PAGES = """
task: pages
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/pages.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
PROMPT = "prompt='Question: {question}\\nAnswer:'"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder of task files and their rows, with choices of several lengths and scripts."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [
        {"question": q, "choices": [f"mat {i}", "a big red boat né", "汉字汉字", "dog"][: 2 + i % 3], "answer": i % 2}
        for i, q in enumerate(toys.documents(24, 1))
    ]
    lines(tmp_path / "exam.jsonl", rows)
    lines(tmp_path / "pages.jsonl", [{"page": d} for d in toys.documents(3, 20)])
    for name, text in (("exam", EXAM), ("quiz", QUIZ), ("pages", PAGES)):
        (tmp_path / f"{name}.yaml").write_text(text.replace("FOLDER", str(tmp_path)))
    quiz(tmp_path, ["nothing"] * len(rows))
    return tmp_path


def lines(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def quiz(place, answers):
    asked = [json.loads(line)["question"] for line in (place / "exam.jsonl").read_text().splitlines()]
    lines(place / "quiz.jsonl", [{"question": q, "answer": a} for q, a in zip(asked, answers, strict=True)])


def both(place, chat, bridge, own):
    theirs = harness.run(toys.subject(chat, tasks=(bridge,), include_path=str(place), rows=0)).details[bridge]
    mine = accuracy.run(toys.subject(chat, tasks=(own,), rows=0))
    return sorted(theirs, key=lambda row: row["doc_id"]), next(iter(mine.details.values()))


@pytest.mark.parametrize("chat", [False, True])
def test_multiple_choice_has_the_same_scores_to_the_row(place, chat):
    theirs, mine = both(place, chat, "exam", f"multiple_choice(path={str(place / 'exam.jsonl')!r}, {PROMPT})")
    assert len(theirs) == len(mine) == 24
    for a, b in zip(theirs, mine, strict=True):
        assert [resp[0] for resp in a["resps"]] == pytest.approx(b["logps"], abs=1e-4)
        assert all(a[rule] == b[rule] for rule in ("acc", "acc_norm", "acc_bytes"))
    assert len({tuple(row[rule] for rule in ("acc", "acc_norm", "acc_bytes")) for row in mine}) > 2  # the rules differ


@pytest.mark.parametrize("chat", [False, True])
def test_replies_have_the_same_scores_to_the_row(place, chat):
    """Free to their twelfth token; then up to a letter of the first; then to answers of which some are right."""
    own = f"questions(path={str(place / 'quiz.jsonl')!r}, {PROMPT}, stop=('STOP',), max_tokens=12)"

    def replies(stop):
        (place / "quiz.yaml").write_text(QUIZ.replace("FOLDER", str(place)).replace("STOP", stop))
        theirs, mine = both(place, chat, "quiz", own.replace("STOP", stop))
        assert [a["resps"][0] for a in theirs] == [b["reply"] for b in mine]
        return theirs, [b["reply"] for b in mine], [b["score"] for b in mine]

    theirs, free, _ = replies("never said")
    letter = max("abcdefghijklmnopqrstuvwxyz", key=lambda c: sum(text.find(c) > 3 for text in free))
    theirs, said, scores = replies(letter)
    assert said == [text.split(letter)[0] for text in free] != free
    assert not any(a["exact_match"] for a in theirs) and not any(scores)
    quiz(place, [r.upper() if i < 20 and questions.normalised(r) else "nothing" for i, r in enumerate(said)])
    theirs, _, scores = replies(letter)
    assert [a["exact_match"] for a in theirs] == scores and 0 < sum(scores) < len(scores)


@settings(max_examples=200, deadline=None)
@given(st.text("cat .\n\té", max_size=14), st.text("cat .\n\té", min_size=1, max_size=14), st.booleans())
def test_borders_are_its_own(context, continuation, merges):
    """TemplateLM's pairs, wherever it has any token to score."""
    tok = toys.bpe() if merges else tokenizer.bytes_tokenizer()

    class Theirs(TemplateLM):
        backend = "causal"
        eot_token_id = prefix_token_id = tok.end
        loglikelihood_rolling = generate_until = None

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            return [] if add_special_tokens is False else [tok.end, *tok.encode(string)]

        def _loglikelihood_tokens(self, requests, **kwargs):
            raise NotImplementedError

    if context:
        first, rest = Theirs()._encode_pair(context, continuation)
        if rest:
            assert encode_pair(tok, context, continuation) == (first, rest)


def test_whole_texts_cost_their_windows(place):
    s = toys.subject(tasks=("pages",), include_path=str(place), longest=64)
    pages = [json.loads(line)["page"] for line in (place / "pages.jsonl").read_text().splitlines()]
    asked = [Instance("loglikelihood_rolling", {}, (p,), 0) for p in pages]
    got = harness.LM(s).loglikelihood_rolling(asked)
    for page, total in zip(pages, got, strict=True):
        ids = s.tokenizer.encode(page)
        assert len(ids) > 64
        windows = utils.get_rolling_token_windows(ids, begin(s.tokenizer)[0], 64, 1)
        assert total == pytest.approx(
            sum(s.likelihood([utils.make_disjoint_window(w)])[0].total for w in windows), abs=1e-3
        )
    assert any("bits_per_byte is" in note and "no interval" in note for note in harness.run(s).notes)


def test_a_chat_context_comes_back_as_the_templates_ids():
    s = toys.subject(True)
    lm = harness.LM(s)
    talk = [{"role": "system", "content": "Be <|end|> brief."}, {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "é\n"}, {"role": "user", "content": " <|user|> "}]  # fmt: skip
    assert lm._ids(lm.apply_chat_template(talk)) == s.template().prompt(talk)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [({"num_beams": 4}, "num_beams"), ({"max_gen_toks": 200}, "200 tokens.*leave no room")],
)
def test_what_would_be_ignored_is_refused(kwargs, says):
    with pytest.raises(LmtrainError, match=says):
        harness.LM(toys.subject()).generate_until([Instance("generate_until", {}, ("a", kwargs), 0)])


def test_sampling_is_as_a_task_asks():
    lm = harness.LM(toys.subject())
    greedy = lm._sampling({"until": "\n", "do_sample": False, "temperature": 0.7})
    assert greedy.temperature == 0 and greedy.stop_texts == ("\n",) and greedy.max_tokens == harness.MAX_TOKENS
    drawn = lm._sampling({"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 5})
    assert (drawn.temperature, drawn.top_p, drawn.max_tokens) == (0.7, 0.9, 5)
    assert lm._sampling({"temperature": 0.7}).temperature == 0.7 and lm._sampling({}).temperature == 0


def test_by_the_command_on_a_run(place, planted, capsys):
    """Both commands on one run; and what is not there is refused by name."""
    folder, out = str(planted[0]), place / "out.json"
    argv = ["eval", folder, "--suite", "harness", "--include_path", str(place), "--json", str(out), "--rows", "10"]
    assert cli.main([*argv, "--tasks", "exam"]) == 0
    assert "exam: acc_norm" in capsys.readouterr().out
    assert json.loads(out.read_text())["pretrain"]["harness"]["scores"]["exam: acc"]["rows"] == 10
    for extra, word in ((["--tasks", "exma"], "Did you mean exam?"), ([], "--tasks NAME")):
        assert cli.main([*argv, *extra]) == 2
        assert word in capsys.readouterr().err
    (place / "exam.jsonl").unlink()
    assert cli.main([*argv, "--tasks", "exam"]) == 2 and "cannot be loaded" in capsys.readouterr().err
    s = subject(runs.load(folder), toys.Settings())
    assert "-" in harness.LM(s).tokenizer_name
