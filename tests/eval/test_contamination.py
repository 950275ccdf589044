"""Planted rows are found, all and no others; and the search is exact, against one that looks at everything."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain import runs
from lmtrain.eval import contamination
from lmtrain.eval.contamination import Index, Row
from lmtrain.eval.subject import Missing, Settings
from lmtrain.evaluate import subject


def rows(*texts, of="t"):
    return [Row(of, i, "", (text,)) for i, text in enumerate(texts)]


def test_rows_planted_at_0_1_and_5_percent_are_found(planted):
    folder, exams = planted
    s = subject(runs.load(folder), Settings(tasks=tuple(f"multiple_choice(path={p!r})" for p, _ in exams.values())))
    result = contamination.run(s)
    for (path, numbers), share in zip(exams.values(), (0.0, 0.01, 0.05), strict=True):
        name = f"multiple_choice(path={path!r})"
        found = result.details[name]
        assert [x["row"] for x in found["which"]] == numbers and found["found"] == len(numbers)
        assert found["rows"] == 200 and result.scores[f"{name}: rows found"].value == pytest.approx(share)
        if numbers:
            score = result.scores[f"{name}: rows found"]
            assert score.low <= share <= score.high and any(f"{len(numbers)} of 200 rows" in n for n in result.notes)


def test_held_out_text_is_not_training_text(planted):
    """Documents of toy sentences hold no planted rows on their held-out side: nothing is found of fresh rows there."""
    s = subject(runs.load(planted[0]), Settings())
    held = contamination.run(s).details["held-out documents"]
    assert held["rows"] == len(s.record.heldout_texts()) and held["found"] < held["rows"]


def brute(row, texts, n):
    """Found or not, by looking at every place of every text."""
    words = lambda t: re.findall(r"\w+", t.casefold())  # noqa: E731
    asked = words(row)
    if len(asked) >= n:
        grams = {tuple(asked[k : k + n]) for k in range(len(asked) - n + 1)}
        return any(tuple(words(t)[k : k + n]) in grams for t in texts for k in range(len(words(t))))
    pieces = lambda t: re.findall(r"\w+|[^\w\s]", t.casefold())  # noqa: E731
    want = pieces(re.sub(r"^\W+|\W+$", "", row))
    return bool(want) and any(pieces(t)[k : k + len(want)] == want for t in texts for k in range(len(pieces(t))))


TEXT = st.lists(st.sampled_from(["a", "B", "b", "cat", "Dog", ",", "?", "+", "1", "\n", "été"]), max_size=14).map(
    " ".join
)


@settings(max_examples=300, deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=5), st.lists(TEXT, min_size=1, max_size=5), st.integers(1, 4))
def test_the_search_is_exact(asked, texts, n):
    found = Index([Row(f"t{i}", i, "", (a,)) for i, a in enumerate(asked)], n).search(texts)
    assert set(found) == {i for i, a in enumerate(asked) if brute(a, texts, n)}


def test_it_is_exact_over_many_blocks(monkeypatch):
    monkeypatch.setattr(contamination, "_BLOCK", 40)
    text = "one two three four five six seven eight nine ten"
    found = Index(rows(text, "ten one", "seven eight"), 5).search([text] * 20)
    assert found == {0: "5 words", 2: "whole"}  # "ten one" would run across two texts


def test_case_blanks_and_outer_signs_do_not_matter_inner_signs_of_a_short_row_do():
    index = Index(rows('"What is 12 + 34?"', "the cat, sat"), 13)
    assert index.search(["so: what  is\n12+34 (sum)"]) == {0: "whole"}
    assert index.search(["what is 12 - 34", "what is 12 34", "the cat sat", "what is 112 + 34"]) == {}
    assert index.short == {0, 1}


def test_a_long_row_is_found_by_any_part_of_it_without_its_signs():
    row = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi"
    part = "Beta: gamma - DELTA epsilon; zeta, eta theta. Iota kappa lambda mu nu xi!"
    index = Index(rows(row), 13)
    assert index.search([part]) == {0: "13 words"}
    assert index.search([part.replace("nu xi", "nu and xi"), " ".join(row.split()[:12])]) == {}
    assert not index.short


def test_a_solution_counts_by_its_long_parts_alone():
    long = " ".join(f"word{i}" for i in range(20))
    index = Index([Row("t", 0, "", ("what is it",), ("forty two", long))], 13)
    assert index.search(["forty two"]) == {} and index.search([long]) == {0: "13 words"}


def test_what_most_rows_share_is_their_wording():
    """An instruction that all rows begin with stands in the training text of its own format: that is no leak."""
    order = "read the following text with care and then say in one word what it is about now"
    asked = rows(*[f"{order}: {' '.join(f'w{i}x{k}' for k in range(14))}" for i in range(10)])
    index = Index(asked, 13)
    assert index.search([order]) == {}
    assert index.search([f"{order} {' '.join(f'w3x{k}' for k in range(14))}"]) == {3: "13 words"}


def test_scripts_without_blanks_are_searched_by_sign():
    index = Index(rows("我喜欢吃苹果"), 13)
    assert index.search(["他说我喜欢吃苹果了"]) == {0: "whole"} and index.search(["我喜欢吃梨"]) == {}


def test_rows_without_words_are_told():
    assert Index(rows("+ - ?", "cat"), 13).empty == {0}


def test_a_model_from_elsewhere_has_no_record(planted):
    s = subject(runs.load(planted[0]), Settings(tasks=("addition",)))
    s.record = None
    with pytest.raises(Missing, match="suite contamination reads the run's own record"):
        contamination.run(s)
