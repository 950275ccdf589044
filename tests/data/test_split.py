import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmtrain.data import split
from lmtrain.data.sources import Document
from lmtrain.schema import ConfigError, Data

DOCUMENTS = [Document(f"document {i}", str(i)) for i in range(400)]
fractions = st.floats(0.001, 0.999)


def heldout(data, documents):
    """The texts held out of a list of documents."""
    rule = split.plan(data, documents, set())
    return {text for document in documents for text, held in rule(document, 0) if held}


@given(fractions, fractions)
def test_a_smaller_fraction_holds_out_a_subset(f1, f2):
    small, large = (heldout(Data(heldout_fraction=f), DOCUMENTS) for f in sorted((f1, f2)))
    assert small <= large


def test_the_share_held_out_is_the_fraction():
    assert len(heldout(Data(heldout_fraction=0.25), DOCUMENTS)) == pytest.approx(100, abs=25)


@given(st.permutations(DOCUMENTS[:150]), st.integers(100, 150))
def test_membership_depends_on_the_text_alone(documents, limit):
    data = Data(heldout_fraction=0.3)
    assert heldout(data, documents[:limit]) == heldout(data, DOCUMENTS) & {d.text.encode() for d in documents[:limit]}


def test_a_key_decides_in_place_of_the_text():
    rule = split.Split("hash", 0.5)
    sides = {
        key: {rule(Document(f"text {i}", "", key=key), 0)[0][1] for i in range(20)} for key in ("a", "b", "c", "d", "e")
    }
    assert all(len(side) == 1 for side in sides.values()) and len(set.union(*sides.values())) == 2


def test_auto_is_a_tail_below_100_distinct_documents():
    assert split.plan(Data(), DOCUMENTS[:100], set()).kind == "hash"
    assert split.plan(Data(), DOCUMENTS[:99], set()).kind == "tail"
    assert split.plan(Data(), DOCUMENTS[:99] * 2, set()).kind == "tail"
    assert split.plan(Data(heldout="hash"), DOCUMENTS[:1], set()).kind == "hash"
    assert split.plan(Data(heldout="tail"), DOCUMENTS, set()).kind == "tail"


@given(st.lists(st.binary(min_size=1, max_size=20), min_size=1, max_size=30, unique=True), fractions)
def test_a_tail_is_the_end_of_the_corpus_cut_to_the_byte(texts, fraction):
    whole = b"".join(texts)
    rule = split.plan(Data(heldout="tail", heldout_fraction=fraction), [Document(t, "") for t in texts], set())
    sides = {False: b"", True: b""}
    offset = 0
    for text in texts:
        for part, held in rule(Document(text, ""), offset):
            sides[held] += part
        offset += len(text)
    cut = int(len(whole) * (1 - fraction))
    assert sides == {False: whole[:cut], True: whole[cut:]}


A = Data(source="text", path="a")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Data(heldout_fraction=0.0), r"data\.heldout_fraction: got 0\.0"),
        (Data(heldout_fraction=1.0), r"data\.heldout_fraction: got 1\.0"),
        (Data(heldout="hsh"), r"data\.heldout: got 'hsh'.* Did you mean hash\?"),
        (Data(row_length=0), r"data\.row_length: got 0"),
        (Data(limit=-1), r"data\.limit: got -1"),
        (Data(workers=-1), r"data\.workers: got -1, takes a whole number from 0 up"),
        (Data(heldout_rows=-1), r"data\.heldout_rows: got -1, takes a whole number from 0 up"),
        (Data(weight=0.0), r"data\.weight: got 0\.0, takes a number above 0"),
        (Data(weight=-1.0), r"data\.weight: got -1\.0"),
        (Data(weight=float("nan")), r"data\.weight: got nan"),
        (Data(mixture={"a": Data(weight=float("inf"))}), r"data\.mixture\.a\.weight: got inf"),
        (Data(mixture={"a": Data(limit=-2)}), r"data\.mixture\.a\.limit: got -2"),
        (Data(path="docs", mixture={"a": A}), r"data\.path: .*data\.mixture\.NAME\.path"),
        (Data(mixture={"a": Data(weight=0.0)}), r"data\.mixture\.a\.weight: got 0\.0"),
        (Data(mixture={"a": Data(heldout_fraction=0.1)}), r"data\.mixture\.a\.heldout_fraction: one value"),
        (Data(mixture={"a": Data(mixture={"b": A})}), r"data\.mixture\.a\.mixture: "),
    ],
)
def test_settings_that_contradict_are_refused(data, message):
    with pytest.raises(ConfigError, match=message):
        split.members(data)


def test_members_of_a_mixture_keep_their_order():
    assert list(split.members(Data(mixture={"b": A, "a": A}))) == ["b", "a"]
    assert list(split.members(A)) == [""]
