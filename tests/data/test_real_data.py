"""The same on real files, where the folder with them lies beside the repository."""

from pathlib import Path

import pytest

from lmtrain.data import pipeline, shards, tokenizer
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
