import json
import math
import time
from collections import Counter

import numpy as np
import pytest

from lmtrain.data import pack, pipeline, shards, tokenizer
from lmtrain.schema import ConfigError, Data
from lmtrain.types import LmtrainError

TOK = tokenizer.bytes_tokenizer()
T, B = 16, 8


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Data(source="jsonl", path=str(path), row_length=T, heldout_fraction=0.2, heldout_rows=0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    letters = np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvwxyz"), 10_000)
    data = write(folder / "rows.jsonl", [f"document {i} " + "".join(letters[i * 40 :][: i % 40]) for i in range(200)])
    return data, shards.prepare(data, TOK, folder, progress=False)


def processes(corpus, count, seed=0, batch_size=B):
    data, prepared = corpus
    table = pipeline.Documents(prepared, data, TOK)
    return [pipeline.Pipeline(table, batch_size, seed, 0, p, count) for p in range(count)]


def held(corpus, index=None, count=None, **fields):
    data, prepared = corpus
    data = Data(**{**vars(data), **fields})
    return pipeline.Heldout(pipeline.Documents(prepared, data, TOK, "heldout"), data.heldout_rows, B, TOK, index, count)


def next_global(pipes):
    """The global batch, from every process's share of it."""
    shares = [pipe.next() for pipe in pipes]
    return {name: np.concatenate([share[name] for share in shares]) for name in shares[0]}


def row_numbers(corpus, batches):
    """Which rows of the corpus batches hold, by their contents, which differ."""
    _, prepared = corpus
    stream = prepared.members[0].train
    windows = [pack.window(stream, r, T, TOK.end) for r in range(pack.count(len(stream), T))]
    every = pack.pack(windows, T, TOK.begin, TOK.end, TOK.pad)
    number = {tokens.tobytes(): r for r, tokens in enumerate(every["tokens_BT"])}
    assert len(number) == len(windows), "the corpus of this test has no two equal rows"
    return [number[tokens.tobytes()] for batch in batches for tokens in batch["tokens_BT"]]


def equal(a, b):
    return all((a[name] == b[name]).all() for name in a)


def test_saved_by_two_processes_restored_by_four_and_by_one_no_row_is_lost_or_repeated(corpus):
    rows = pack.count(len(corpus[1].members[0].train), T)
    need = math.ceil(2 * rows / B)  # two epochs
    (whole,) = processes(corpus, 1)
    expected = [whole.next() for _ in range(need)]
    for first, second in ((2, 4), (2, 1), (4, 2), (1, 8)):
        pipes = processes(corpus, first)
        batches = [next_global(pipes) for _ in range(7)]
        states = [json.loads(json.dumps(pipe.state())) for pipe in pipes]
        assert all(state == states[0] for state in states)
        for pipe in pipes:
            pipe.close()
        pipes = processes(corpus, second)
        for pipe in pipes:
            pipe.restore(states[0])
        batches += [next_global(pipes) for _ in range(need - 7)]
        assert all(map(equal, batches, expected))
        for pipe in pipes:
            pipe.close()
    seen = row_numbers(corpus, expected)
    assert Counter(seen[:rows]) == Counter(seen[rows : 2 * rows]) == Counter(range(rows))
    assert seen[:rows] != seen[rows : 2 * rows], "shuffled anew"
    assert seen[:rows] != sorted(seen[:rows])


def test_every_document_is_asked_for_exactly_once_in_an_epoch(corpus):
    _, prepared = corpus
    stream = prepared.members[0].train
    rows = pack.count(len(stream), T)
    (pipe,) = processes(corpus, 1, batch_size=1)
    batches = sorted((pipe.next() for _ in range(rows)), key=lambda b: row_numbers(corpus, [b]))
    targets = np.concatenate([batch["targets_BT"][batch["weights_BT"] == 1] for batch in batches])
    assert targets.tolist() == [*stream.read(1, len(stream)).tolist(), TOK.end]


def test_the_state_is_that_of_what_next_has_given_not_of_what_was_read_ahead(corpus):
    (pipe,) = processes(corpus, 1)
    assert pipe.state()["next_index"] == 0
    for n in range(1, 4):
        pipe.next()
        time.sleep(0.05)  # let the threads read ahead
        assert pipe.state()["next_index"] == n * B
    assert pipe.epochs == pytest.approx(3 * B / pack.count(len(corpus[1].members[0].train), T))


def test_skip_leaves_out_exactly_so_many_batches(corpus):
    (a,), (b,) = processes(corpus, 1), processes(corpus, 1)
    batches = [a.next() for _ in range(6)]
    b.next()
    b.skip(3)
    assert equal(b.next(), batches[4]) and equal(b.next(), batches[5])
    assert a.state() == b.state()


def test_restoring_goes_back_too_and_suits_another_batch_size(corpus):
    (pipe,) = processes(corpus, 1)
    state = pipe.state()
    first = [pipe.next() for _ in range(4)]
    pipe.restore(state)
    assert all(equal(pipe.next(), batch) for batch in first)
    pipe.restore(state)
    pipe.next()
    (wide,) = processes(corpus, 1, batch_size=3 * B)
    wide.restore(pipe.state())
    assert (wide.next()["tokens_BT"][:B] == first[1]["tokens_BT"]).all()


def test_seeds_give_other_orders_and_the_same_seed_the_same(corpus):
    pipes = [processes(corpus, 1, seed)[0] for seed in (0, 1, 0)]
    orders = [row_numbers(corpus, [pipe.next() for _ in range(5)]) for pipe in pipes]
    assert orders[0] == orders[2] != orders[1]
    (a,), (b,) = processes(corpus, 1, 0), processes(corpus, 1, 1)
    rows = pack.count(len(corpus[1].members[0].train), T)
    a.restore(a.state() | {"next_index": rows})
    assert row_numbers(corpus, [a.next()]) != row_numbers(corpus, [b.next()]), "epoch 1 of seed 0 is not seed 1"


def test_a_state_of_other_rows_is_refused(corpus, tmp_path):
    data, prepared = corpus
    (pipe,) = processes(corpus, 1)
    for other, message in (
        (processes(corpus, 1, seed=1)[0], "seed is 1, this run's 0"),
        (processes((Data(**{**vars(data), "row_length": 8}), prepared), 1)[0], "row_length is 8"),
    ):
        with pytest.raises(LmtrainError, match=message):
            pipe.restore(other.state())
    changed = write(tmp_path / "rows.jsonl", [f"another {i}" for i in range(200)])
    source, _ = pipeline.build(changed, TOK, B, 0, tmp_path, progress=False)
    with pytest.raises(LmtrainError, match="corpus is .*another --workdir"):
        pipe.restore(source.state())


def test_a_mixture_honours_its_weights_and_restarts_what_is_exhausted(tmp_path):
    small = write(tmp_path / "small.jsonl", [f"s{i:03d}" for i in range(120)])
    large = write(tmp_path / "large.jsonl", [f"L{i:04d} " + "x" * 40 for i in range(300)])
    parts = {
        name: Data(source="jsonl", path=part.path, weight=weight)
        for name, part, weight in (("small", small, 3.0), ("large", large, 1.0))
    }
    data = Data(mixture=parts, row_length=T, heldout_fraction=0.2)
    source, _ = pipeline.build(data, TOK, B, 0, tmp_path, progress=False)
    members = source.shards.members
    rows = [pack.count(len(member.train), T) for member in members]
    texts = [TOK.decode(row) for _ in range(100) for row in source.next()["tokens_BT"]]
    assert sum("s" in text for text in texts) == pytest.approx(600, abs=4)
    assert 600 > 2 * rows[0], "the small member came round more than twice"
    state = source.state()
    following = [source.next() for _ in range(3)]
    source.restore(json.loads(json.dumps(state)))
    assert all(equal(source.next(), batch) for batch in following)
    heavier = {**parts, "small": Data(source="jsonl", path=small.path, weight=5.0)}
    other, _ = pipeline.build(Data(**{**vars(data), "mixture": heavier}), TOK, B, 0, tmp_path, progress=False)
    assert other.shards.folder == source.shards.folder, "weights do not tokenise again"
    with pytest.raises(LmtrainError, match="weights is"):
        other.restore(state)


# -------------------------------------------------------------------------------------------------------- held out


def test_heldout_batches_ask_for_every_held_out_token_once_and_know_their_bytes(corpus):
    data, prepared = corpus
    stream = prepared.members[0].heldout
    heldout = held(corpus)
    batches = list(heldout.batches())
    assert all(batch["tokens_BT"].shape == (B, T) for batch in batches)
    targets = np.concatenate([batch["targets_BT"][batch["weights_BT"] == 1] for batch in batches])
    assert targets.tolist() == [*stream.read(1, len(stream)).tolist(), TOK.end]
    assert heldout.tokens == len(targets) == len(stream)
    assert heldout.bytes == len(heldout.bytes_text()) == prepared.total("heldout_bytes")
    assert heldout.bytes_text() == TOK.decode_bytes(stream.read(0, len(stream)))
    assert all(map(equal, batches, heldout.batches())), "always the same"


def test_heldout_rows_are_a_fixed_spread_whose_bytes_are_counted(corpus):
    data, prepared = corpus
    few = held(corpus, heldout_rows=5)
    (batch,) = few.batches()
    assert few.rows == 5 and batch["weights_BT"].any(axis=1).tolist() == [True] * 5 + [False] * 3
    assert few.tokens == batch["weights_BT"].sum()
    targets = batch["targets_BT"][batch["weights_BT"] == 1]
    assert few.bytes == TOK.byte_lengths[targets].sum() == len(few.bytes_text())
    assert few.bytes_text() == TOK.decode_bytes(targets)


def test_heldout_bytes_of_a_bpe_are_those_of_the_text(corpus, tmp_path):
    data, _ = corpus
    bpe = tokenizer.train((document.text for document in shards.documents(data)), 300)
    _, heldout = pipeline.build(data, bpe, B, 0, tmp_path, progress=False)
    _, by_bytes = pipeline.build(data, TOK, B, 0, tmp_path, progress=False)
    assert heldout.bytes == by_bytes.bytes and heldout.bytes_text() == by_bytes.bytes_text()
    assert heldout.tokens < by_bytes.tokens


def test_heldout_shares_of_processes_make_up_the_batches(corpus):
    whole = list(held(corpus).batches())
    shares = [list(held(corpus, p, 4).batches()) for p in range(4)]
    for i, batch in enumerate(whole):
        assert equal({n: np.concatenate([share[i][n] for share in shares]) for n in batch}, batch)


def test_too_little_text_names_the_setting(corpus, tmp_path):
    data, prepared = corpus
    with pytest.raises(LmtrainError, match=r"data\.heldout_fraction=0\.2 .* data\.row_length=99999"):
        held(corpus, row_length=99999)
    everything = Data(**{**vars(data), "heldout_fraction": 0.999999, "heldout": "hash"})
    with pytest.raises(LmtrainError, match="every document is held out.*lower data.heldout_fraction"):
        pipeline.build(everything, TOK, B, 0, tmp_path, progress=False)
    with pytest.raises(ConfigError, match="batch_size: got 6, takes a multiple of the 4 processes"):
        processes(corpus, 4, batch_size=6)


def test_a_corpus_of_less_than_a_row_still_trains(tmp_path):
    (tmp_path / "t.txt").write_text("0123456789" * 10)
    data = Data(source="text", path=str(tmp_path / "t.txt"), row_length=64, heldout_fraction=0.7, heldout_rows=0)
    source, heldout = pipeline.build(data, TOK, 2, 0, tmp_path / "data", progress=False)
    batch = source.next()
    assert batch["weights_BT"].sum() == 2 * 31 and heldout.bytes == 70
