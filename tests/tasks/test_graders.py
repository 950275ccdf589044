"""OpenAI's graders: what each is worth by hand, what is refused by name, and programs in the sandbox."""

import json
import math
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain import sandbox
from lmtrain.tasks import graders, similarity
from lmtrain.tasks.formula import Formula
from lmtrain.types import LmtrainError

linux = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is for Linux")
LIMITS = sandbox.Limits(seconds=5.0, cpu_seconds=2)
SAID = "{{sample.output_text}}"


def make(given, **more):
    return graders.make({**given, **more}, "grader", LIMITS, whole=True)


def check(operation="eq", text=SAID, reference="{{item.answer}}"):
    return {"type": "string_check", "name": "check", "input": text, "reference": reference, "operation": operation}


def score(grader, text, item=None, calls=()):
    message = {"role": "assistant", "content": text, "tool_calls": [{"name": n, "arguments": a} for n, a in calls]}
    return grader.score(message, item or {"answer": "Oslo"}).value


# -------------------------------------------------------------------------------------------------------- string_check
@pytest.mark.parametrize(
    ("operation", "right", "wrong"),
    [
        ("eq", ["Oslo"], ["oslo", "Oslo ", "It is Oslo", ""]),
        ("ne", ["oslo", ""], ["Oslo"]),
        ("like", ["Oslo", "It is Oslo."], ["oslo", "Osl"]),
        ("ilike", ["oslo", "IT IS OSLO"], ["Osl", ""]),
    ],
)
def test_strings_are_compared_as_the_operation_says(operation, right, wrong):
    grader = make(check(operation))
    assert [score(grader, text) for text in right] == [1.0] * len(right)
    assert [score(grader, text) for text in wrong] == [0.0] * len(wrong)


# ----------------------------------------------------------------------------------------------------------- templates
def test_a_template_reads_fields_items_and_json():
    item = {"a": {"b": [{"c d": "x"}, 2.5]}, "flag": True, "n": 7}
    text = '{{item.a.b[0][\'c d\']}} {{ item.a.b[1] }} {{item.flag}} {{item.n}} {{item.a}} {"k": {"v": 1}}'
    grader = make(check(reference=text))
    assert score(grader, 'x 2.5 true 7 {"b": [{"c d": "x"}, 2.5]} {"k": {"v": 1}}', item) == 1.0


def test_a_reply_without_what_a_template_reads_is_worth_nothing():
    grader = make(check("ne", "{{sample.output_json.city}}", "Rome"))
    assert score(grader, '{"city": "Oslo"}') == 1.0
    assert [score(grader, text) for text in ("Oslo", '{"town": "Oslo"}', '"city"', '{"city": null}', "[]")] == [0.0] * 5


def test_calls_are_read_as_the_api_gives_them():
    name = make(check(text="{{sample.output_tools[0].function.name}}", reference="weather"))
    assert score(name, "", calls=[("weather", "{}")]) == 1.0 and score(name, "weather") == 0.0
    choice = make(check(text="{{sample.choices[0].message.tool_calls[0].function.arguments}}", reference="{}"))
    assert score(choice, "", calls=[("weather", "{}")]) == 1.0


# ------------------------------------------------------------------------------------------------------------- metrics
def test_fuzzy_match_by_hand():
    assert similarity.fuzzy_match("kitten", "sitting") == pytest.approx(2 * 4 / 13)  # i t t n
    assert similarity.fuzzy_match("abc", "abc") == 1.0 and similarity.fuzzy_match("abc", "xyz") == 0.0
    assert similarity.fuzzy_match("", "abc") == 0.0 and similarity.fuzzy_match("", "") == 1.0


def slow_common(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


@settings(max_examples=200, deadline=None)
@given(st.text("abc", max_size=30), st.text("abcd", max_size=30))
def test_the_common_subsequence_in_bits_is_that_of_the_table(a, b):
    assert similarity.common(a, b) == slow_common(a, b)


def test_bleu_by_hand():
    # the the the the / the cat sat here: 1 of 4 words; no pair (half of 1 in 3), triple (a quarter of 1 in 2), ...
    wanted = (1 / 4 * (1 / 2) / 3 * (1 / 4) / 2 * (1 / 8) / 1) ** 0.25
    assert similarity.bleu("the the the the", "the cat sat here") == pytest.approx(wanted)
    # six words of seven: 6/6, 5/5, 4/4, 3/3, and one word too few
    assert similarity.bleu("a b c d e f", "a b c d e f g") == pytest.approx(math.exp(1 - 7 / 6))
    # 5 words, four of them right: 4/5, 3/4, 2/3, 1/2
    assert similarity.bleu("a b c d x", "a b c d e") == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    assert similarity.bleu("Oslo", "Oslo") == 1.0 and similarity.bleu("oslo", "Oslo") == 0.0
    assert similarity.bleu("Oslo.", "Oslo") == pytest.approx(
        (1 / 2 * 1 / 2) ** 0.5
    )  # a point is a word: 1/2, half of 1/1
    assert similarity.bleu("", "a") == 0.0 == similarity.bleu("a", "")


def test_gleu_by_hand():
    # n-grams of 3 and 4 words: 3+2+1 = 6 and 4+3+2+1 = 10; all 6 match
    assert similarity.gleu("a b c", "a b c d") == pytest.approx(6 / 10)
    assert similarity.gleu("a b c d", "a b c") == pytest.approx(6 / 10)
    # a x c against a b c: a and c of 6
    assert similarity.gleu("a x c", "a b c") == pytest.approx(2 / 6)
    assert similarity.gleu("", "") == 0.0 and similarity.gleu("a", "a") == 1.0


def test_meteor_by_hand():
    # all 3 of 3 words in one piece: F = 1, less 0.5 (1/3)^3
    assert similarity.meteor("the cat sat", "The cat sat.") == pytest.approx(1 - 0.5 / 27)
    # "sat the cat": two pieces of three words
    assert similarity.meteor("sat the cat", "the cat sat") == pytest.approx(1 - 0.5 * (2 / 3) ** 3)
    # P = 2/2, R = 2/4: F = 10 * 0.5 / (0.5 + 9); one piece
    assert similarity.meteor("a b", "a b c d") == pytest.approx(10 * 0.5 / 9.5 * (1 - 0.5 / 8))
    # "a" is taken where it follows "x", not where it comes first: P = 1, R = 3/4, in one piece
    assert similarity.meteor("x a b", "a x a b") == pytest.approx(10 * 0.75 / (0.75 + 9) * (1 - 0.5 / 27))
    assert similarity.meteor("a", "b") == 0.0 == similarity.meteor("", "")


def test_rouge_by_hand():
    said, wanted = "the cat sat on the mat", "the cat lay on the mat"
    rouge = similarity.metrics()
    assert rouge["rouge_1"](said, wanted) == pytest.approx(5 / 6)
    assert rouge["rouge_2"](said, wanted) == pytest.approx(3 / 5)
    assert rouge["rouge_3"](said, wanted) == pytest.approx(1 / 4)
    assert rouge["rouge_4"](said, wanted) == 0.0 == rouge["rouge_5"]("a b", "a b")
    assert rouge["rouge_5"]("a b c d e f", "a b c d e") == pytest.approx(2 * 1 / (2 + 1))
    assert rouge["rouge_l"](said, wanted) == pytest.approx(5 / 6)
    assert rouge["rouge_l"]("mat the on", "the cat on mat") == pytest.approx(2 * 2 / 7)
    assert rouge["rouge_1"]("The CAT!", "the cat") == 1.0


@settings(max_examples=60, deadline=None)
@given(st.text("ab ,é", max_size=40), st.text("ab ,é", max_size=40))
def test_every_metric_lies_between_0_and_1(text, reference):
    for name, metric in similarity.metrics().items():
        assert 0 <= metric(text, reference) <= 1 + 1e-12, name


@pytest.mark.parametrize("name", similarity.metrics())
def test_a_grader_takes_each_metric(name):
    grader = make(
        {
            "type": "text_similarity",
            "input": SAID,
            "reference": "{{item.answer}}",
            "evaluation_metric": name,
            "pass_threshold": 0.8,
        }
    )
    long = "one two three four five six seven"
    assert score(grader, long, {"answer": long}) > 0.99 and score(grader, "zzz", {"answer": long}) == 0.0


# ------------------------------------------------------------------------------------------------------------ formulas
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.5 * a + 0.5 * b", 0.5 * 0.25 + 0.5 * 4),
        ("(a + b) / 2", 2.125),
        ("a - b", -3.75),
        ("2 ^ 3 ^ 2", 512.0),
        ("-2 ^ 2", -4.0),
        ("2 * 3 ^ 2", 18.0),
        ("min(a, b, 1)", 0.25),
        ("max(a, b)", 4.0),
        ("min(a)", 0.25),
        ("abs(-b)", 4.0),
        ("floor(2.7) + ceil(2.1)", 5.0),
        ("exp(0) + sqrt(b) + log(exp(2))", 5.0),
        ("+a", 0.25),
        ("\n a\n + b ", 4.25),
        ("1e-3 * b", 0.004),
        ("b ^ -a", 4**-0.25),
        ("1", 1.0),
    ],
)
def test_a_formula_has_its_value(text, value):
    assert Formula(text, ["a", "b"])({"a": 0.25, "b": 4.0}) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not a formula"),
        ("a +", "not a formula"),
        ("(a", "not a formula"),
        ("a ** 2", "is written"),
        ("a // 2", "not read"),
        ("a % 2", "not read"),
        ("a > 0", "not read"),
        ("a if a else b", "not read"),
        ("__import__('os')", "no function '__import__'"),
        ("a.real", "not read"),
        ("'a'", "not read"),
        ("True", "not read"),
        ("1j", "not read"),
        ("[a]", "not read"),
        ("lambda: a", "not read"),
        ("(x := a)", "not read"),
        ("answr", "Did you mean answer"),
        ("sqr(a)", "Did you mean sqrt"),
        ("sqrt(a, b)", "takes one value"),
        ("min()", "one value or more"),
        ("min(a, key=b)", "one value or more"),
        ("min(*a)", "not read"),
        ("(lambda: 1)()", "not read"),
        ("(" * 500 + "a" + ")" * 500, "not a formula"),
        ("a" * 20_000, "characters"),
        ("1" * 400, "not a formula"),
        ("a\x00", "not a formula"),
        ("a; b", "not a formula"),
        ("a # b", "not a formula"),
    ],
)
def test_a_formula_takes_nothing_else(text, says):
    with pytest.raises(LmtrainError, match=says):
        Formula(text, ["a", "b", "answer"])


@pytest.mark.parametrize("text", ["1 / a", "log(a)", "sqrt(a - 1)", "(a - 1) ^ 0.5", "9 ^ 9 ^ 9 ^ 9", "exp(1000)"])
def test_a_formula_without_a_value_says_so(text):
    with pytest.raises(LmtrainError):
        Formula(text, ["a"])({"a": 0.0})


def test_a_multi_grader_is_its_formula_cut_to_0_to_1():
    near = {
        "type": "text_similarity",
        "input": SAID,
        "reference": "{{item.answer}}",
        "evaluation_metric": "fuzzy_match",
    }
    both = {
        "type": "multi",
        "graders": {"right": check(), "near": near},
        "calculate_output": "0.5 * right + 0.5 * near",
    }
    assert score(make(both), "Oslo") == 1.0 and score(make(both), "Os") == pytest.approx(0.5 * 2 * 2 / 6)
    assert score(make(both, calculate_output="right * 3"), "Oslo") == 1.0
    assert score(make(both, calculate_output="near - 2"), "Oslo") == 0.0
    none = make(both, calculate_output="1 / right").score({"role": "assistant", "content": "x"}, {"answer": "y"})
    assert none.value == 0.0 and "division by zero" in none.fault


# -------------------------------------------------------------------------------------------------------------- python
def python(source, **more):
    return make({"type": "python", "source": source, "image_tag": "2025-05-08", **more})


@linux
def test_a_program_grades_the_sample_and_the_item():
    source = (
        "import json\n\ndef grade(sample, item):\n    print('noise')\n    said = sample['output_text']\n"
        "    assert sample['choices'][0]['message']['content'] == said and sample['output_tools'] == []\n"
        "    return 0.25 if said == item['answer'] else json.loads(said)['n']\n"
    )
    grader = python(source)
    assert score(grader, "Oslo") == 0.25 and score(grader, '{"n": 0.75}') == 0.75 and score(grader, '{"n": 7}') == 1.0
    found = grader.score({"role": "assistant", "content": "é\ud83d"}, {"answer": "Oslo"})
    assert found.value == 0.0 and "JSONDecodeError" in found.fault


@linux
@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("return 'high'", "returned str"),
        ("return None", "returned NoneType"),
        ("return float('nan')", "returned nan"),
        ("return 1 / 0", "ZeroDivisionError"),
        ("while True: pass", "limit"),
        ("return 10 ** 400", "OverflowError"),
        ("import os; os._exit(0)", "ended before"),
        ("raise SystemExit", "ended before"),
        ("return [1] * 10 ** 10", "MemoryError"),
        ("import socket; socket.create_connection(('127.0.0.1', 9)); return 1", "Permission"),
        ("open('/etc/hostname').read(); return 1", "Permission"),
        ("raise ValueError('no')", "ValueError: no"),
    ],
)
def test_a_program_without_a_grade_gives_0_and_says_why(body, fault):
    found = python(f"def grade(sample, item):\n    {body}").score(
        {"role": "assistant", "content": "x"}, {"answer": "y"}
    )
    assert found.value == 0.0 and fault in found.fault


@linux
def test_true_is_one():
    assert score(python("def grade(sample, item):\n    return sample['output_text'] == item['answer']"), "Oslo") == 1.0


@linux
@pytest.mark.parametrize(
    ("source", "needs"),
    [
        ("def grade(s, i):\n    return len(i['answer'])", ["answer"]),
        ("def grade(s, /, row):\n    return row['a'] + row['b']['c']", ["a", "b"]),
        ("def grade(s, i):\n    return i.get('answer', 0)", []),
        ("def grade(s, i):\n    return i['answer'] if 'answer' in i else 0", []),
        ("def grade(s, i):\n    try:\n        return i['answer']\n    except KeyError:\n        return 0", []),
        ("def grade(s, i):\n    i['mine'] = 1\n    return 0.5", []),
        ("def other(s, i):\n    return 1\ngrade = other", []),
    ],
)
def test_the_fields_that_a_program_takes_are_asked_of_each_line(source, needs):
    assert [path.steps[0] for path in python(source).paths()] == needs


@linux
@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("def grade(sample, item)\n    return 1", "source, line 1: expected ':'"),
        ("def grad(sample, item):\n    return 1", "defines no function grade.*Did you mean grad"),
        ("def grade(sample):\n    return 1", "line 1: grade takes two arguments"),
        ("def grade(sample, item, x):\n    return 1", "two arguments"),
        ("def grade(sample, item, *, x):\n    return 1", "two arguments"),
        ("async def grade(sample, item):\n    return 1", "defines no function grade"),
        (
            "import numpy as np\nfrom rapidfuzz import fuzz\ndef grade(sample, item):\n    return 1",
            "imports numpy, rapidfuzz",
        ),
        ("def grade(sample, item):\n    import numpy\n    return 1", "imports numpy"),
        ("x = 1\n" * 50_000, "takes fewer than 256,000 bytes"),
        ("\x00", "null"),
        ("", "defines no function grade"),
    ],
)
def test_a_program_that_cannot_grade_is_refused(source, says):
    with pytest.raises(LmtrainError, match=says):
        python(source)


@linux
def test_a_program_may_try_to_import_what_there_is_not():
    source = (
        "try:\n    import numpy\nexcept ImportError:\n    numpy = 1\ndef grade(s, i):\n    return float(numpy == 1)"
    )
    assert score(python(source), "x") == 1.0


def test_a_program_is_refused_where_it_cannot_be_locked_in(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(LmtrainError, match="cannot lock a program in"):
        python("def grade(sample, item):\n    return 1")


# -------------------------------------------------------------------------------------------------------- wrong graders
MULTI = {"type": "multi", "graders": {"a": check()}, "calculate_output": "a"}


@pytest.mark.parametrize(
    ("grader", "says"),
    [
        ([], "grader is a list"),
        ("string_check", "grader is text"),
        ({}, "grader has no type"),
        ({"kind": "python", "typ": "x"}, "Did you mean typ"),
        ({"type": "string_chek"}, "takes string_check, text_similarity, python, multi. Did you mean string_check"),
        ({"type": 3}, "grader.type is 3"),
        ({"type": "score_model", "model": "gpt-4o"}, "'score_model': it asks a model of OpenAI's.*model\\(RUN\\)"),
        ({"type": "label_model"}, "'label_model': it asks a model"),
        ({"type": "endpoint"}, "grader.type is 'endpoint'"),
        ({"grader": check()}, "grader has no type"),
        ({**check(), "operator": "eq"}, "grader.operator is no field of string_check. Did you mean operation"),
        ({k: v for k, v in check().items() if k != "reference"}, "string_check\\) has no reference"),
        (check("equals"), "operation is 'equals', takes eq, ne, like, ilike"),
        (check("neq"), "Did you mean ne?"),
        (check(None), "operation is null, takes text"),
        (check(text=7), "input is a number, takes text"),
        ({**check(), "name": 1}, "name is a number"),
        (check(text="{{output_text}}"), "neither item nor sample"),
        (check(text="{{itm.a}} {{sample.output_text}}"), "Did you mean item"),
        (check(text="{{sample}}"), "names no field"),
        (check(text="{{sample[0]}}"), "names no field"),
        (check(text="{{}}"), "neither item nor sample"),
        (check(text="{{sample.output}}"), "sample has no 'output'.*Did you mean output_t"),
        (check(text="{{sample.output_audio}}"), "sample has no 'output_audio'"),
        (check(text="{{sample.output_text.city}}"), "output_text is text"),
        (check(text="{{sample.output_text | upper}}"), "is not read"),
        (check(text="{{sample.output_text"), "without }}"),
        (check(text="{{item.a}}"), "reads nothing of the reply"),
        (
            {"type": "text_similarity", "input": SAID, "reference": "x", "evaluation_metric": "cosine"},
            "needs OpenAI's embeddings",
        ),
        (
            {"type": "text_similarity", "input": SAID, "reference": "x", "evaluation_metric": "rouge"},
            "Did you mean rouge_",
        ),
        (
            {
                "type": "text_similarity",
                "input": SAID,
                "reference": "x",
                "evaluation_metric": "bleu",
                "pass_threshold": "1",
            },
            "pass_threshold is text, takes a number",
        ),
        ({"type": "python", "source": 3}, "source is a number"),
        ({**MULTI, "graders": {}}, "takes an object with a grader or more"),
        ({**MULTI, "graders": [check()]}, "graders is a list"),
        ({**MULTI, "graders": {"a b": check()}}, "'a b' cannot stand in a formula"),
        ({**MULTI, "graders": {"min": check()}}, "'min' cannot stand"),
        ({**MULTI, "graders": {"a": MULTI}}, "graders.a is a multi grader in another one"),
        ({**MULTI, "graders": {"a": {"type": "score_model"}}}, "graders.a.type is 'score_model'"),
        ({**MULTI, "graders": {"a": check("is")}}, "grader.graders.a.operation is 'is'"),
        ({**MULTI, "calculate_output": "a + b"}, "calculate_output: 'b' is none of the graders a"),
        ({**MULTI, "calculate_output": 1}, "calculate_output is a number"),
        ({**MULTI, "graders": {"a": check(text="{{item.a}}")}}, "reads nothing of the reply"),
    ],
)
def test_a_grader_that_is_none_is_refused_by_name(tmp_path, grader, says):
    file = tmp_path / "grader.json"
    file.write_text(json.dumps(grader))
    with pytest.raises(LmtrainError, match=says) as error:
        graders.load(str(file))
    assert str(error.value).startswith(str(file))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"{", "not JSON"),
        (b"", "not JSON"),
        (b"\xff{}", "not UTF-8"),
        (b'{"type": "python", "type": "multi"}', "a key twice"),
        (b'{"type": NaN}', "NaN"),
    ],
)
def test_a_grader_file_that_is_no_json_is_named(tmp_path, text, says):
    (tmp_path / "g.json").write_bytes(text)
    with pytest.raises(LmtrainError, match=f"g.json: .*{says}"):
        graders.load(str(tmp_path / "g.json"))
