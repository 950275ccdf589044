"""What fluency and coherence measure, on a model that knows the language and on one that does not."""

import json
import math
import os
import pathlib
import random
import subprocess
import sys

import numpy as np
import pytest

from lmtrain import runs
from lmtrain.eval import coherence, fluency, likelihood, texts
from lmtrain.eval.estimates import Estimate
from lmtrain.eval.likelihood import begin
from lmtrain.eval.subject import Missing, Result, Settings
from lmtrain.evaluate import subject
from tests.eval import toys

ROOT = pathlib.Path(__file__).parents[2]


class Reader:
    """A stand-in for Likelihood: a token costs a nat, less where the one before it in the text is its neighbour's."""

    def __init__(self, follows):
        self.follows = follows

    def __call__(self, pairs, progress=None):
        return [likelihood.Scored(np.array(self.costs(list(a), list(b))), False) for a, b in pairs]

    def costs(self, context, continuation):
        ids = [*context, *continuation]
        return [-0.5 if ids[t] in self.follows.get(ids[t - 1], ()) else -1.0 for t in range(len(context), len(ids))]


def test_bits_per_byte_are_those_that_training_reports(planted):
    run = runs.load(planted[0])
    result = fluency.run(subject(run, Settings(rows=8)))
    got = result.scores["held-out rows of pretrain: bits per byte"]
    assert got.rows == 8 and got.value == pytest.approx(run.metrics[-1]["heldout_bits_per_byte"], rel=1e-4)


def test_a_text_of_the_users_own_costs_its_windows(tmp_path):
    """Every token once, in rows of as many as the model sees, each row behind its one token before."""
    text = toys.documents(1, 40)[0]
    s = toys.subject(texts={"mine": [text]}, rows=0, longest=32)
    got = fluency.run(s).scores["mine: bits per byte"]
    ids = [*begin(s.tokenizer), *s.tokenizer.encode(text)]
    nats = -sum(s.likelihood([([ids[k]], ids[k + 1 : k + 33])])[0].total for k in range(0, len(ids) - 1, 32))
    assert got.value == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)
    assert got.rows == math.ceil((len(ids) - 1) / 32)


def test_a_model_that_knows_which_word_follows_finds_shuffled_text_costlier(monkeypatch):
    docs = toys.documents(30, 12)
    s = toys.subject(texts={"mine": docs}, rows=40)
    follows = {}
    for d in docs:
        ids = s.tokenizer.encode(d)
        for a, b in zip(ids, ids[1:], strict=False):
            follows.setdefault(a, set()).add(b)
    s.__dict__["likelihood"] = Reader(follows)
    scores = fluency.run(s).scores
    assert scores["mine: passages words shuffled, costlier by"].low > 0
    real, mixed, words = (
        scores[f"mine: passages {k}"].value for k in ("as they are", "sentences shuffled", "words shuffled")
    )
    assert real < mixed < words


def test_a_model_without_a_preference_finds_none():
    s = toys.subject(texts={"mine": toys.documents(30, 12)}, rows=40)
    s.__dict__["likelihood"] = Reader({})
    scores = coherence.run(s).scores
    for what in coherence.OTHERS:
        assert scores[f"mine, against {what}: wins"].value == 0.5  # all tie
        assert scores[f"mine, against {what}: margin"].value == 0


def test_what_the_context_adds_is_told_from_what_is_likely_by_itself():
    """Each document repeats a word of its own. A reader for whom a foreign text is likelier by itself, but which
    expects the document's word again where it was read, loses by likelihood and wins by what the context adds."""
    rng = random.Random(0)
    docs = [" ".join(f"{x[:-1]} w{i}q." for x in toys.sentences(rng, 12)) for i in range(20)]
    s = toys.subject(texts={"mine": docs}, rows=0)
    tok = s.tokenizer

    class Partial(Reader):
        def costs(self, context, continuation):
            text = tok.decode(continuation)
            own = next(f"w{i}q" for i in range(20) if f"w{i}q" in text)
            base = -1.0 - 0.05 * int(own[1:-1])  # documents with a higher number are costlier, whatever the context
            return [base + (0.4 if own in tok.decode(context) else 0.0)] * len(continuation)

    s.__dict__["likelihood"] = Partial({})
    scores = coherence.run(s).scores
    assert scores["mine, against foreign: pointwise wins"].value == 1
    assert scores["mine, against foreign: pointwise margin"].value == pytest.approx(0.4)
    assert scores["mine, against foreign: wins"].value < 0.95
    assert scores["mine, against words shuffled: pointwise wins"].value == 0.5


def test_others_are_what_they_are_called():
    docs = toys.documents(3, 50)
    found, _ = texts.passages(docs, toys.bpe(), 96)
    rng = random.Random(0)
    for i, passage in enumerate(found):
        words, mixed, foreign = coherence.disturbed(found, i, rng)
        true = passage.continuation
        assert sorted(words.split()) == sorted(true.split()) and words != true
        assert mixed != true and len(mixed) == len(true)
        assert foreign not in docs[passage.document] and any(foreign in d for d in docs)
        assert abs(len(foreign) - len(true)) < 0.25 * len(true)


def test_a_text_of_one_document_is_compared_with_its_other_parts():
    s = toys.subject(texts={"mine": toys.documents(1, 60)}, rows=0, longest=96)
    result = coherence.run(s)
    assert any("another part of the only document" in note for note in result.notes)
    assert result.scores["mine, against foreign: wins"].rows > 5


def test_a_text_without_sentences_is_named():
    with pytest.raises(Missing, match="mine has no passage of three sentences"):
        coherence.run(toys.subject(texts={"mine": ["one two three"]}))
    with pytest.raises(Missing, match="give --text FILE"):
        coherence.run(toys.subject())


def test_two_texts_are_measured_side_by_side():
    result = Result()
    fluency.measure("plain", ["the cat sat on the mat"], 0, result)
    fluency.measure("parrot", ["the cat the cat the cat"], 0, result)
    value = lambda name: result.scores[name].value  # noqa: E731
    assert value("parrot: repetition-2") == pytest.approx(0.6) and value("plain: repetition-2") == 0
    assert value("parrot: distinct-1") == pytest.approx(2 / 6) and value("plain: words") == 6
    assert all(isinstance(score, Estimate) for score in result.scores.values())


def test_a_chat_model_is_asked_twice(monkeypatch):
    """A model that says whatever it says by likelihood alone gives one answer; facts it was told it does not know."""
    s = toys.subject(chat_format=True, rows=12, longest=256)
    result = coherence.run(s)
    again = result.scores["consistency: the same question twice, the same answer"]
    recall = result.scores["consistency: a fact told first is known later"]
    assert again.rows + recall.rows == 12 and recall.value == 0
    kinds = {name for x in result.details["consistency"] for name in x["scores"]}
    assert {"again", "recall"} <= kinds and len(result.details["consistency"][0]["messages"]) >= 2


@pytest.mark.slow
def test_a_trained_model_orders_real_text_and_its_disturbed_copies(tmp_path):
    """Two minutes of pretraining on Python's documentation, by the command and at a user's speed (tests/conftest.py
    slows programs down); then margins on what it holds out, away from 0."""
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    lmtrain = [sys.executable, "-m", "lmtrain.cli"]
    flags = [f"--config.stages.pretrain.{f}" for f in ("data.path=docs", "data.row_length=128", "batch_size=8")]
    made = ["run", "--config", str(ROOT / "experiments/pretrain.py:1m,steps=600"), "--workdir", "run", *flags]
    for argv in (made, ["eval", "run", "--suite", "fluency,coherence", "--json", "out.json"]):
        subprocess.run([*lmtrain, *argv], cwd=tmp_path, env={**env, "PYTHONPATH": str(ROOT)}, check=True)
    found = json.loads((tmp_path / "out.json").read_text())["pretrain"]
    fluent, coherent = found["fluency"]["scores"], found["coherence"]["scores"]

    def low(scores, name):
        return scores[f"held-out text{name}"]["ci95"][0]

    bits = [
        fluent[f"held-out text: passages {k}"]["value"] for k in ("as they are", "sentences shuffled", "words shuffled")
    ]
    assert bits == sorted(bits)
    for what in ("sentences shuffled", "words shuffled"):
        assert low(fluent, f": passages {what}, costlier by") > 0
        assert low(coherent, f", against {what}: margin") > 0 and low(coherent, f", against {what}: wins") > 0.5
    assert low(coherent, ", against foreign: pointwise wins") > 0.5
    assert low(coherent, ", against foreign: pointwise margin") > 0
