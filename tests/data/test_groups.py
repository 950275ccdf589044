"""Swaps, groups and weights: counterfactuals stay on their side, reweighed text is independent of its groups."""

import json

import numpy as np
import pytest

from lmtrain.data import conversations, groups, pipeline, samples, sources, swaps
from lmtrain.data import tokenizer as tokenizer_lib
from lmtrain.schema import ConfigError, Data

TOK = tokenizer_lib.bytes_tokenizer()


def test_a_swap_exchanges_whole_words_both_ways_in_their_case():
    swap = swaps.Swaps(("he/she", "king/queen"))
    assert swap("He met the Queen; she thinks. HE THE") == "She met the King; he thinks. SHE THE"
    assert swap(swap("The king said he knew she was there")) == "The king said he knew she was there"
    assert swaps.Swaps(("gender",))("His father") == "Her mother" and swap.words("She and king") == ["she", "king"]
    for wrong in ("he", "he/he", "a/b/c", "/x"):
        with pytest.raises(ConfigError, match=r"data\.augment"):
            swaps.Swaps((wrong,))


def test_every_document_is_followed_by_its_counterfactual_on_the_same_side(tmp_path):
    (tmp_path / "t.txt").write_text("".join(f"number {i}: he came\n" for i in range(400)))
    data = Data(source="text", path=str(tmp_path / "t.txt"), document="line", augment=("he/she",), row_length=32)
    texts = [d.text for d in sources.read(data)]
    assert texts[:2] == [b"number 0: he came", b"number 0: she came"] and len(texts) == 800
    source, heldout = pipeline.build(data, TOK, 2, 0, tmp_path / "data", progress=False)
    stored = []
    for table in (source.table, heldout.table):
        ids = table.streams[0].read(0, 1 << 30)
        stored.append(set(TOK.decode(ids.tolist()).replace("number", "\nnumber").split("\n")))
    he = [{t for t in side if "he came" in t and "she" not in t} for side in stored]
    she = [{t.replace("she", "he") for t in side if "she" in t} for side in stored]
    assert he[0] == she[0] and he[1] == she[1] and he[0] and he[1] and not he[0] & he[1]


def rows(tmp_path, texts):
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in texts))
    return Data(source="jsonl", path=str(file), augment=("he/she",), row_length=64)


def test_conversations_and_pairs_take_it_too(tmp_path):
    data = rows(tmp_path, [(f"Who is {i}?", "he is" if i % 2 else "it is") for i in range(200)])
    sides = samples.collect("chat", data, samples.Report(), False)[""]
    said = [sample.talks[0][-1]["content"] for side in sides.values() for sample in side]
    assert len(said) == 300 and said.count("she is") == 100
    keys = [{s.key for s in side} for side in sides.values()]
    assert not keys[0] & keys[1]
    pairs = samples.collect("pairs", data, samples.Report(), False)[""]
    made = [tuple(talk[-1]["content"] for talk in s.talks) for side in pairs.values() for s in side]
    assert set(made) == {("he is", "she is")} and len(made) == 100
    with pytest.raises(ConfigError, match="for documents"):
        conversations.check_settings("chat", Data(source="jsonl", path="x", groups=("he",)))


def build(tmp_path, **more):
    """Forty documents about a, thirty of them good; forty about b, ten of them good; others in no cell."""
    texts = [f"{i} a good" for i in range(30)] + [f"{i} a bad" for i in range(30, 40)]
    texts += [f"{i} b good" for i in range(40, 50)] + [f"{i} b bad" for i in range(50, 80)]
    (tmp_path / "t.txt").write_text("\n".join([*texts, *(f"{i} c good" for i in range(80, 300))]))
    data = Data(
        source="text", path=str(tmp_path / "t.txt"), document="line", groups=("a", "b"), outcomes=("good", "bad"),
        row_length=16, **more,
    )  # fmt: skip
    source, heldout = pipeline.build(data, TOK, 4, 0, tmp_path / "data", progress=False)
    return source.table, heldout.table


def everything(table):
    return table.batch([(0, row) for row in range(table.rows[0])])


def test_reweighing_makes_group_and_outcome_independent_and_keeps_how_frequent_either_is(tmp_path):
    plain, _ = build(tmp_path)
    weighed, heldout = build(tmp_path, reweigh=True)
    before, after = everything(plain), everything(weighed)
    first_BT = after["tokens_BT"] == TOK.end  # one position of every document

    def table(batch):
        cells, w = batch["groups_BT"][first_BT], batch["weights_BT"][first_BT]
        return np.bincount(cells, w, minlength=5)

    n, w = table(before), table(after)
    assert n[1] > 2 * n[2] and n[4] > 2 * n[3] and n[0] > 100
    w_GY, n_GY = w[1:].reshape(2, 2), n[1:].reshape(2, 2)
    np.testing.assert_allclose(w_GY / w_GY.sum(), np.outer(w_GY.sum(1), w_GY.sum(0)) / w_GY.sum() ** 2, rtol=1e-5)
    np.testing.assert_allclose(w_GY.sum(0), n_GY.sum(0), rtol=1e-5)
    np.testing.assert_allclose(w_GY.sum(1), n_GY.sum(1), rtol=1e-5)
    assert w[0] == n[0] and set(np.unique(everything(heldout)["weights_BT"])) <= {0.0, 1.0}


def test_every_token_has_the_cell_of_its_document(tmp_path):
    table, _ = build(tmp_path)
    batch = everything(table)
    ids, cells = batch["tokens_BT"].ravel(), batch["groups_BT"].ravel()
    real = batch["segments_BT"].ravel() > 0
    begins = np.flatnonzero((ids == TOK.end) & real)
    label = groups.Cells(Data(groups=("a", "b"), outcomes=("good", "bad")))
    for a, b in zip(begins, [*begins[1:], int(real.sum())], strict=True):
        assert set(cells[a:b]) == {label(TOK.decode(ids[a + 1 : b].tolist()))}


def test_cells_are_numbered_group_by_group():
    cells = groups.Cells(Data(groups=("he/him", "she"), outcomes=("rich", "poor", "ill")))
    texts = [f"{who} was {how}" for who in ("Him", "she") for how in ("rich", "poor", "ILL")]
    assert [cells(text) for text in texts] == [1, 2, 3, 4, 5, 6] and cells.count == 7
    assert cells("it was rich") == cells("she was there") == cells("the richer") == 0


def test_settings_that_contradict_each_other_are_refused():
    for wrong in (
        dict(outcomes=("x",)),
        dict(reweigh=True),
        dict(groups=("a", "b"), reweigh=True),
        dict(groups=("a/",)),
    ):
        with pytest.raises(ConfigError, match=r"data\.(groups|outcomes|reweigh)"):
            groups.Cells(Data(**wrong))


def test_a_cells_balance_is_what_makes_all_cells_of_the_data_as_frequent(tmp_path):
    table, _ = build(tmp_path)
    batch = everything(table)
    cells, w = batch["groups_BT"], batch["balance_BT"] * (batch["segments_BT"] > 0)
    share_K = np.bincount(cells.ravel(), w.ravel(), minlength=5)[1:]
    np.testing.assert_allclose(share_K, share_K.mean(), rtol=0.02)
    assert share_K.sum() == pytest.approx(((cells > 0) & (batch["segments_BT"] > 0)).sum(), rel=0.02)
    assert set(w[(cells == 0) & (batch["segments_BT"] > 0)]) == {1.0}
    rare = groups.Cells(Data(groups=("a", "b"))).balance(np.array([0.5, 0.5, 0.0]))
    assert rare.tolist() == [1, 1, 0]


def test_a_pair_to_be_made_even_is_exchanged_in_prompt_and_reply(tmp_path):
    data = rows(tmp_path, [(f"How is he, {i}?", "He is kind." if i % 2 else "Fine.") for i in range(200)])
    pairs = samples.collect("pairs", data, samples.Report(), False)[""]
    made = [s for side in pairs.values() for s in side]
    assert len(made) == 200 and all(s.prompt == 1 for s in made)
    for s in made:
        assert s.talks[0][0]["content"].replace("he,", "she,") == s.talks[1][0]["content"]
    assert {s.talks[1][-1]["content"] for s in made} == {"She is kind.", "Fine."}
