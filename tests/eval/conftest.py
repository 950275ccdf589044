"""Small runs that the tests of suites share. They are trained by `lmtrain.run`, a few seconds in all."""

import json
import random

import pytest

import lmtrain
from lmtrain import config
from lmtrain.data.split import held_out
from tests.eval import toys

SHARE = 0.05  # of documents that are held out
STEPS = 150


def trainable(text):
    """Whether a document will be on the training side."""
    return not held_out(text.encode(), SHARE)


def question(i, words):
    """One of so many words, unlike any other."""
    rng = random.Random(f"question {i}")
    return " ".join([*(f"{rng.choice(toys.WORDS)}{rng.randrange(10_000)}" for _ in range(words - 1)), f"end{i}?"])


@pytest.fixture(scope="session")
def planted(tmp_path_factory):
    """A run whose training text holds 0, 2 and 10 of the 200 rows of three exams, each in its own disguise.

    Returns (folder of the run, {"none" | "one" | "five": (file of the exam, numbers of the rows planted)}).
    """
    folder = tmp_path_factory.mktemp("planted")
    rng = random.Random(0)
    docs = [" ".join(toys.sentences(rng, 12)) for _ in range(300)]
    exams = {}
    for name, count in (("none", 0), ("one", 2), ("five", 10)):
        rows = [
            {"question": question(f"{name} {i}", 16 if i % 2 else 9), "choices": ["mat", "box"], "answer": i % 2}
            for i in range(200)
        ]
        numbers = sorted(rng.sample(range(200), count))
        for k, i in enumerate(numbers):
            text = rows[i]["question"]
            at = rng.randrange(0, 300)
            shown = (text, text.upper(), text.replace(" ", "\n  "), f'{{"question": {json.dumps(text)}}}')[k % 4]
            while True:  # where it stays on the training side
                whole = (f"{docs[at]} {shown}", f"{shown} {docs[at]}", f"{docs[at]}\n{shown}\n{docs[at - 1]}")[k % 3]
                if trainable(whole):
                    break
                at = (at + 1) % 300
            docs[at] = whole
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        exams[name] = (str(path), numbers)
    source = folder / "docs.jsonl"
    source.write_text("".join(json.dumps({"text": d}) + "\n" for d in docs))
    lmtrain.run(experiment(source, steps=4, heldout_rows=8), folder / "run")
    source.unlink()  # the run's own record must do
    return folder / "run", exams


def experiment(source, kind="jsonl", heldout_rows=0, fraction=SHARE, **stage):
    """One layer, 32 wide, bytes."""
    c = config.experiment(seed=1, tensorboard=False)
    c.stages.tokenizer = config.tokenizer("bytes")
    given = dict(steps=10, batch_size=8, log_every=5, eval_every=0, checkpoint_every=0, samples=0)
    c.stages.pretrain = config.stage(
        model=config.model(layers=1, width=32, heads=2),
        data=config.data(kind, path=str(source), row_length=128, heldout_fraction=fraction, heldout_rows=heldout_rows),
        **{**given, **stage},
    )
    return c


@pytest.fixture(scope="session")
def overfit(tmp_path_factory):
    """A run that learns a page of nonsense by heart, and one with the same steps on a book of it."""
    folder = tmp_path_factory.mktemp("overfit")
    runs = {}
    for name, size in (("page", 16), ("book", 3000)):
        rng = random.Random(1)
        file = folder / f"{name}.txt"
        file.write_text("\n".join(toys.sentences(rng, size)))
        c = experiment(file, "text", fraction=0.3, steps=STEPS, eval_every=STEPS // 6, log_every=10)
        c.stages.pretrain.data.row_length = 32
        c.stages.pretrain.model.width = 64
        runs[name] = lmtrain.run(c, folder / f"run-{name}").folder
    return runs
