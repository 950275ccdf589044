import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmtrain.data import pack

END, PAD = 0, 1
BEGIN = 100  # of a vocabulary that begins a document by another token than the one that ends it


class Stream:
    """Documents as `store.Stream` gives them, from memory."""

    def __init__(self, documents, begin):
        self.tokens = np.array([t for document in documents for t in (begin, *document)], np.uint16)

    def __len__(self):
        return len(self.tokens)

    def read(self, start, stop):
        return self.tokens[start:stop]


def rows(documents, T, begin=END):
    stream = Stream(documents, begin)
    windows = [pack.window(stream, r, T, begin) for r in range(pack.count(len(stream), T))]
    return pack.pack(windows, T, begin, END, PAD)


corpora = st.lists(st.lists(st.integers(2, 99), min_size=1, max_size=20), min_size=1, max_size=12)


@given(corpora, st.sampled_from([1, 2, 3, 8, 16, 64]))
def test_every_token_of_every_document_is_asked_for_exactly_once(documents, T):
    batch = rows(documents, T)
    real_BT = batch["weights_BT"] == 1
    assert batch["tokens_BT"][real_BT].tolist() == [t for d in documents for t in (END, *d)]
    assert batch["targets_BT"][real_BT].tolist() == [t for d in documents for t in (*d, END)]


@given(corpora, st.sampled_from([4, 8, 16, 64]))
def test_no_target_crosses_a_border_and_positions_restart(documents, T):
    batch = rows(documents, T)
    for tokens, targets, weights, segments, positions in zip(
        *(batch[f"{name}_BT"] for name in ("tokens", "targets", "weights", "segments", "positions")), strict=True
    ):
        segment = position = 0
        for t in range(T):
            if not weights[t]:
                assert (tokens[t:] == PAD).all() and not segments[t:].any() and not weights[t:].any()
                assert not positions[t:].any()
                break
            if t == 0 or tokens[t] == END:
                segment, position = segment + 1, 0
            assert (segments[t], positions[t]) == (segment, position)
            position += 1
            if t + 1 < T and weights[t + 1]:
                # a target is the next token of the same document, or the end; never the first one of another
                assert targets[t] == (END if segments[t + 1] != segments[t] else tokens[t + 1])


@given(corpora, st.sampled_from([1, 4, 16, 64]))
def test_a_token_of_its_own_begins_a_document_and_is_never_asked_for(documents, T):
    same, own = rows(documents, T), rows(documents, T, BEGIN)
    for name in ("targets_BT", "segments_BT", "positions_BT", "weights_BT"):
        np.testing.assert_array_equal(own[name], same[name])
    np.testing.assert_array_equal(own["tokens_BT"], np.where(same["tokens_BT"] == END, BEGIN, same["tokens_BT"]))


def test_an_example_by_hand():
    batch = rows([[5, 6, 7], [8], [9, 10]], 4)
    assert batch["tokens_BT"].tolist() == [[0, 5, 6, 7], [0, 8, 0, 9], [10, 1, 1, 1]]
    assert batch["targets_BT"].tolist() == [[5, 6, 7, 0], [8, 0, 9, 10], [0, 1, 1, 1]]
    assert batch["segments_BT"].tolist() == [[1, 1, 1, 1], [1, 1, 2, 2], [1, 0, 0, 0]]
    assert batch["positions_BT"].tolist() == [[0, 1, 2, 3], [0, 1, 0, 1], [0, 0, 0, 0]]
    assert batch["weights_BT"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert {name: value.dtype for name, value in batch.items()} == {
        "tokens_BT": np.int32, "targets_BT": np.int32, "weights_BT": np.float32, "segments_BT": np.int32,
        "positions_BT": np.int32,
    }  # fmt: skip


@pytest.mark.parametrize("T", [64, 8192])
def test_an_empty_window_is_a_row_of_padding(T):
    batch = pack.pack([np.empty(0, np.int32), np.array([END, 5], np.uint16)], T, END, END, PAD)
    assert not batch["segments_BT"][0].any() and not batch["weights_BT"][0].any()
    assert batch["weights_BT"][1].sum() == 1 and batch["tokens_BT"].shape == (2, T)


@given(st.lists(st.integers(1, 40), max_size=60))
def test_best_fit_places_every_item_once_and_opens_a_row_only_where_none_has_room(lengths):
    rows = pack.best_fit(np.array(lengths, np.int64), 40)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    filled = [sum(lengths[item] for item in row) for row in rows]
    assert all(0 < total <= 40 for total in filled)
    for i, row in enumerate(rows[1:], 1):  # what opened row i fitted into none before it
        first = lengths[row[0]]
        longer = [sum(lengths[item] for item in r if (-lengths[item], item) < (-first, row[0])) for r in rows[:i]]
        assert all(total + first > 40 for total in longer)


def test_best_fit_leaves_the_least_room():
    assert pack.best_fit(np.array([6, 7, 3, 4, 10]), 10) == [[4], [1, 2], [0, 3]]
    assert pack.best_fit(np.array([5, 7, 3]), 10) == [[1, 2], [0]], "3 fits both, and fills the second"
    assert pack.best_fit(np.array([], np.int64), 10) == []
