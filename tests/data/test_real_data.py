"""The same on real files, where the folder with them lies beside the repository."""

from pathlib import Path

import pytest

from lmtrain.data import chat, conversations, pipeline, rows, samples, shards, tokenizer
from lmtrain.schema import Data

FOLDER = Path(__file__).parents[3] / "shared/data"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="no ../shared/data")


def test_the_last_tenth_of_tinyshakespeare_is_held_out_to_the_byte(tmp_path):
    path = FOLDER / "tinyshakespeare.txt"
    data = Data(source="text", path=str(path), row_length=64, heldout_fraction=0.1, heldout_rows=0)
    source, heldout = pipeline.build(data, tokenizer.bytes_tokenizer(), 12, 0, tmp_path, progress=False)
    text = path.read_bytes()
    cut = int(len(text) * 0.9)
    assert heldout.bytes_text() == text[cut:] and heldout.tokens == len(text) - cut + 1
    assert source.shards.total("bytes") == cut
    assert source.next()["tokens_BT"].shape == (12, 64)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("gsm8k_train.jsonl", {"source": "jsonl", "field": "question"}),
        ("wikitext2_valid.txt", {"source": "text", "document": "paragraph"}),
        ("movie_reviews_quarter.txt", {"source": "text", "document": "line"}),
    ],
)
def test_real_text_comes_back_whole(tmp_path, name, fields):
    data = Data(path=str(FOLDER / name), heldout_rows=0, **fields)
    bpe = tokenizer.train((document.text for document in shards.documents(data)), 1000, limit=300_000)
    made = shards.prepare(data, bpe, tmp_path, progress=False)
    (member,) = made.members
    kept = [bpe.decode_bytes(stream.read(0, len(stream))) for stream in (member.train, member.heldout)]
    assert [len(text) for text in kept] == [made.total("bytes"), made.total("heldout_bytes")]
    train = b"".join(document.text if isinstance(document.text, bytes) else document.text.encode()
                     for document in shards.documents(data))  # fmt: skip
    assert kept[0] == train
    assert made.total("bytes") / made.total("tokens") > 2


@pytest.mark.parametrize(
    ("name", "kind", "fields", "usable", "left_out"),
    [
        ("customer_service_sgd.jsonl", "chat", {}, 1200, {}),
        ("code_alpaca_2k.json", "chat", {"source": "json"}, 2015, {"empty reply": 2}),
        ("alpaca_seed_tasks.jsonl", "chat", {}, 175, {}),
        ("gsm8k_train.jsonl", "chat", {}, 7473, {}),
        ("preferences_alpaca_eval.jsonl", "pairs", {}, 600, {}),
        ("preferences_alpaca_eval.jsonl", "labels", {}, 1200, {}),
    ],
)
def test_real_conversations_are_all_used_but_those_that_say_nothing(name, kind, fields, usable, left_out):
    data = Data(**{"source": "jsonl", "path": str(FOLDER / name), "row_length": 8192, **fields})
    tok = tokenizer.train(conversations.texts(kind, data), 600, limit=100_000)
    report = samples.Report()
    sides = samples.collect(kind, data, report, progress=False)[""]
    assert sum(map(len, sides.values())) == usable and report.reasons == left_out and not report.duplicates
    assert len(sides["heldout"]) / usable == pytest.approx(0.05, abs=0.015)
    template = chat.Template(tok)
    units = conversations.encode(kind, sides["heldout"], template, data, report)
    assert len(units) == len(sides["heldout"]) and report.reasons == left_out and not report.cut
    for sample, start in zip(sides["heldout"], units.starts[:: units.each], strict=False):
        ids, _ = template.encode([*rows.unlearned(sample.talks[0][: sample.prompt]), *sample.talks[0][sample.prompt :]])
        assert units.ids[start : start + len(ids)].tolist() == ids.tolist()
        said = "".join(message["content"] for message in sample.talks[0])
        assert tok.decode(ids) == said


def test_real_dialogues_fill_their_rows():
    data = Data(source="jsonl", path=str(FOLDER / "customer_service_sgd.jsonl"), row_length=4096)
    source, heldout = conversations.build("chat", data, tokenizer.bytes_tokenizer(), 8, 0, progress=False)
    assert source.summary().startswith("1,124 conversations (1.") and ", 76 held out" in source.summary()
    assert source.tokens / (source.rows * 4096) > 0.97 and heldout.bytes == len(heldout.bytes_text())
