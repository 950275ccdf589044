import gzip
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tokenizers

from lmtrain.data import groups, shards, store, tokenizer
from lmtrain.record import _pieces
from lmtrain.schema import Data
from lmtrain.types import LmtrainError

TOK = tokenizer.bytes_tokenizer()


@pytest.fixture
def corpus(tmp_path):
    """300 documents as JSON Lines, every tenth of them twice."""
    rows = [f"document {i}: " + "word " * (i % 17) for i in range(300)]
    rows += rows[::10]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return Data(source="jsonl", path=str(path), heldout_fraction=0.2)


def split_documents(stream):
    """The texts of a stream's documents."""
    tokens = stream.read(0, len(stream)).tolist()
    starts = [i for i, t in enumerate(tokens) if t == TOK.end] + [len(tokens)]
    return [TOK.decode(tokens[a:b]) for a, b in zip(starts, starts[1:], strict=False)]


def contents(folder):
    """Every file that a finished preparation leaves, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}


def test_every_distinct_document_is_kept_whole_on_one_side(corpus, tmp_path):
    made = shards.prepare(corpus, TOK, tmp_path / "data", progress=False, shard_tokens=500)
    (member,) = made.members
    train, heldout = split_documents(member.train), split_documents(member.heldout)
    rows = [json.loads(line)["text"] for line in open(corpus.path)]
    assert sorted(train + heldout) == sorted(set(rows)) and len(train) + len(heldout) == 300
    assert 30 < len(heldout) < 90
    assert made.total("duplicates") == 30
    assert made.total("documents") == len(train) and made.total("heldout_documents") == len(heldout)
    assert made.total("bytes") == sum(map(len, train)) and made.total("tokens") == len(member.train)
    assert "30 duplicates dropped" in made.summary()
    assert len(made.manifest["members"][0]["shards"]) > 5


def test_a_stream_begins_each_document_as_the_vocabulary_does(corpus, tmp_path):
    own = TOK.with_specials(["<s>"])
    made = [("<s>", TOK.vocab_size)]
    own.backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=made)
    (member,) = shards.prepare(corpus, own, tmp_path / "own", progress=False).members
    (usual,) = shards.prepare(corpus, TOK, tmp_path / "usual", progress=False).members
    got, want = (m.train.read(0, len(m.train)) for m in (member, usual))
    np.testing.assert_array_equal(got, np.where(want == TOK.end, TOK.vocab_size, want))
    labels = groups.Labels.of(member.train, own, groups.Cells(Data(groups=("1", "2"))))
    assert len(labels.starts) - 1 == (got == TOK.vocab_size).sum(), "documents are told apart by it"
    assert "".join(_pieces(member.train, own)) == "".join(split_documents(usual.train))


def test_a_stream_reads_across_its_shards(corpus, tmp_path):
    (few,) = shards.prepare(corpus, TOK, tmp_path / "few", progress=False).members
    (many,) = shards.prepare(corpus, TOK, tmp_path / "many", progress=False, shard_tokens=200).members
    assert len(few.train) == len(many.train)
    for start in range(0, len(few.train), 333):
        assert (few.train.read(start, start + 500) == many.train.read(start, start + 500)).all()
    assert len(few.train.read(len(few.train) - 3, len(few.train) + 9)) == 3


@pytest.mark.parametrize("heldout", ["hash", "tail"])
def test_interrupted_between_any_two_writes_it_goes_on_to_the_same_bytes(corpus, tmp_path, monkeypatch, heldout):
    corpus = Data(**{**vars(corpus), "heldout": heldout})
    kwargs = {"progress": False, "shard_tokens": 3000}
    whole = shards.prepare(corpus, TOK, tmp_path / "whole", **kwargs)
    writes = len(contents(whole.folder))
    assert writes > 12
    replace, count = os.replace, 0

    def fails(source, target):
        nonlocal count
        count -= 1
        if not count:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(store.os, "replace", fails)
    for count in range(1, writes + 1):
        stop = count
        with pytest.raises(KeyboardInterrupt):
            shards.prepare(corpus, TOK, tmp_path / f"cut{stop}", **kwargs)
        count = -1
        again = shards.prepare(corpus, TOK, tmp_path / f"cut{stop}", **kwargs)
        assert contents(again.folder) == contents(whole.folder)


def test_going_on_does_not_tokenise_again(corpus, tmp_path, monkeypatch):
    kwargs = {"progress": False, "shard_tokens": 2000}
    encode, texts = tokenizer.Tokenizer.encode_batch, []
    stop = True

    def counted(self, batch, done=None):
        if stop and len(texts) > 150:
            raise KeyboardInterrupt
        texts.extend(batch)
        return encode(self, batch, done)

    monkeypatch.setattr(tokenizer.Tokenizer, "encode_batch", counted)
    with pytest.raises(KeyboardInterrupt):
        shards.prepare(corpus, TOK, tmp_path, **kwargs)
    stop = False
    shards.prepare(corpus, TOK, tmp_path, **kwargs)
    assert len(texts) == 300
    shards.prepare(corpus, TOK, tmp_path, **kwargs)
    assert len(texts) == 300


SLOW = """
import os, sys, time
from lmtrain.data import shards, tokenizer
from lmtrain.schema import Data
def documents(data):
    for i in range(200):
        time.sleep(float(os.environ["DELAY"]))
        yield f"document {i}: " + "word " * (i % 17)
if __name__ == "__main__":
    data = Data(source="slow:documents", heldout="hash")
    made = shards.prepare(data, tokenizer.bytes_tokenizer(), sys.argv[1], shard_tokens=1000)
    print(made.folder)
"""


def test_killed_it_goes_on_to_the_same_bytes(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd()]), "DELAY": "0.02"}
    command = [sys.executable, str(tmp_path / "slow.py")]
    killed = subprocess.Popen([*command, str(tmp_path / "killed")], env=environment)
    while len(list((tmp_path / "killed").glob("*/*.json"))) < 3:
        assert killed.poll() is None
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not list((tmp_path / "killed").glob("*/manifest.json"))
    environment["DELAY"] = "0"
    runs = [
        subprocess.run([*command, str(tmp_path / name)], env=environment, stdout=subprocess.PIPE, check=True)
        for name in ("killed", "whole")
    ]
    killed_files, whole_files = (contents(type(tmp_path)(run.stdout.decode().strip())) for run in runs)
    assert killed_files == whole_files and len(whole_files) > 12


def test_other_settings_files_or_tokenizers_have_another_fingerprint(corpus, tmp_path):
    def fingerprint(tok=TOK, **changes):
        return shards.fingerprint(Data(**{**vars(corpus), **changes}), tok)

    base = fingerprint()
    assert fingerprint(row_length=64, weight=2.0, heldout_rows=3, workers=1, cache="x") == base
    changed = [
        fingerprint(heldout_fraction=0.3),
        fingerprint(heldout="hash"),
        fingerprint(limit=7),
        fingerprint(field="body"),
        fingerprint(tokenizer.train(["aa"], 265)),
        shards.fingerprint(Data(mixture={"a": Data(source="jsonl", path=corpus.path)}), TOK),
    ]
    with open(corpus.path, "a") as file:
        file.write('{"text": "one more"}\n')
    changed.append(fingerprint())
    stat = os.stat(corpus.path)
    os.utime(corpus.path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1000))
    changed.append(fingerprint())
    assert len({base, *changed}) == len(changed) + 1


def test_a_mixture_drops_duplicates_over_its_members_and_no_text_is_on_both_sides(corpus, tmp_path):
    other = tmp_path / "other.jsonl"
    rows = [json.loads(line)["text"] for line in open(corpus.path)][:200] + [f"new {i}" for i in range(150)]
    other.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    parts = {"a": Data(source="jsonl", path=corpus.path), "b": Data(source="jsonl", path=str(other))}
    made = shards.prepare(Data(mixture=parts, heldout_fraction=0.3), TOK, tmp_path / "data", progress=False)
    train = [text for member in made.members for text in split_documents(member.train)]
    heldout = [text for member in made.members for text in split_documents(member.heldout)]
    assert not set(train) & set(heldout) and len(set(train + heldout)) == len(train + heldout) == 450
    assert made.manifest["members"][1]["duplicates"] == 200
    # another stage that reads only one of them, with the same fraction, trains on nothing that is held out here
    stage = Data(source="jsonl", path=str(other), heldout_fraction=0.3, limit=180)
    (member,) = shards.prepare(stage, TOK, tmp_path / "data", progress=False).members
    assert not set(split_documents(member.train)) & set(heldout)


def test_a_single_file_is_cut_at_the_exact_byte(tmp_path):
    text = "t\u00e4xt ".encode() * 1000
    (tmp_path / "one.txt").write_bytes(text)
    data = Data(source="text", path=str(tmp_path / "one.txt"), heldout_fraction=0.1)
    (member,) = shards.prepare(data, TOK, tmp_path / "data", progress=False).members
    cut = int(len(text) * 0.9)
    assert TOK.decode_bytes(member.train.read(0, len(member.train))) == text[:cut]
    assert TOK.decode_bytes(member.heldout.read(0, len(member.heldout))) == text[cut:]


def test_a_tokenizer_learns_from_the_training_side_only(corpus, tmp_path):
    (member,) = shards.prepare(corpus, TOK, tmp_path / "data", progress=False).members
    assert [document.text.decode() for document in shards.documents(corpus)] == split_documents(member.train)
    (tmp_path / "one.txt").write_bytes(b"0123456789" * 10)
    tail = Data(source="text", path=str(tmp_path / "one.txt"), heldout_fraction=0.25)
    assert [document.text for document in shards.documents(tail)] == [(b"0123456789" * 10)[:75]]


def test_bytes_that_are_not_utf8_come_through(tmp_path):
    lines = [bytes([b]) * 3 for b in range(256) if b not in b"\r\n"]
    (tmp_path / "t.gz").write_bytes(gzip.compress(b"\n".join(lines)))
    data = Data(source="text", path=str(tmp_path / "t.gz"), document="line", heldout="hash", heldout_fraction=1e-9)
    bpe = tokenizer.train(["abc"], 270)
    (member,) = shards.prepare(data, bpe, tmp_path / "data", progress=False).members
    kept = bpe.decode_bytes(member.train.read(0, len(member.train)))
    assert kept == b"".join(line for line in lines if line.strip())


def test_large_vocabularies_take_four_bytes(corpus, tmp_path):
    wide = tokenizer.bytes_tokenizer()
    wide.vocab_size = 1 << 17
    (member,) = shards.prepare(corpus, wide, tmp_path / "data", progress=False).members
    assert member.train.read(0, 9).dtype == np.uint32
    (member,) = shards.prepare(corpus, TOK, tmp_path / "other", progress=False).members
    assert member.train.read(0, 9).dtype == np.uint16


def test_an_empty_corpus_is_named_and_leaves_no_manifest(tmp_path):
    (tmp_path / "empty.txt").write_bytes(b"")
    data = Data(source="text", path=str(tmp_path / "empty.txt"))
    with pytest.raises(LmtrainError, match=r"data: the corpus is empty: source='text', path='.*empty\.txt'"):
        shards.prepare(data, TOK, tmp_path / "data", progress=False)
    assert not list((tmp_path / "data").glob("*/manifest.json"))


def test_a_full_disk_is_one_message_and_the_shards_written_are_used_again(corpus, tmp_path, monkeypatch):
    fsync, left = os.fsync, 6

    def full(descriptor):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(store.os, "fsync", full)
    with pytest.raises(LmtrainError, match=r"No space left on device.*data\.cache"):
        shards.prepare(corpus, TOK, tmp_path / "data", progress=False, shard_tokens=2000)
    assert list((tmp_path / "data").glob("*/00-00000.json"))
    left = 1000
    shards.prepare(corpus, TOK, tmp_path / "data", progress=False, shard_tokens=2000)


@pytest.mark.parametrize("cache", ["/proc/x", "FILE/x", "~nosuchuser/x", "x" * 5000])
def test_a_cache_that_cannot_be_made_is_one_message(corpus, tmp_path, cache):
    (tmp_path / "file").write_text("")
    data = Data(**{**vars(corpus), "cache": cache.replace("FILE", str(tmp_path / "file"))})
    with pytest.raises(LmtrainError, match=r"cannot write tokenised shards to .*data\.cache|data\.cache: got"):
        shards.prepare(data, TOK, tmp_path / "data", progress=False)


@pytest.mark.parametrize("side", ["train", "heldout"])
@pytest.mark.parametrize("at", [-1, -300])
def test_one_changed_byte_is_found_and_named(corpus, tmp_path, side, at):
    folder = shards.prepare(corpus, TOK, tmp_path, progress=False, shard_tokens=2000).folder
    target = folder / f"00-00001.{side}.npy"
    content = bytearray(target.read_bytes())
    content[at] ^= 1
    target.write_bytes(content)
    with pytest.raises(LmtrainError, match=rf"damaged \(00-00001\.{side}\.npy has other .*Delete the folder"):
        shards.prepare(corpus, TOK, tmp_path, progress=False, shard_tokens=2000)


def test_contents_are_read_once_per_process_and_not_of_a_large_corpus(corpus, tmp_path, monkeypatch):
    sha256, hashed = store.hashlib.sha256, []
    made = shards.prepare(corpus, TOK, tmp_path, progress=False)

    def counted(content):
        hashed.append(content)
        return sha256(content)

    monkeypatch.setattr(store.hashlib, "sha256", counted)
    store.load(made.folder, corpus, TOK.vocab_size)
    assert not hashed, "read when it was prepared"
    os.utime(made.folder / "00-00000.train.npy")
    store.load(made.folder, corpus, TOK.vocab_size)
    assert len(hashed) == 1
    monkeypatch.setattr(store, "VERIFY_BYTES", 1000)
    os.utime(made.folder / "00-00000.train.npy")
    store.load(made.folder, corpus, TOK.vocab_size)
    assert len(hashed) == 1


def test_token_ids_outside_the_vocabulary_are_refused(corpus, tmp_path):
    made = shards.prepare(corpus, TOK, tmp_path, progress=False)
    with pytest.raises(LmtrainError, match=r"00-00000\.train\.npy holds token id \d+, the tokenizer has 100"):
        store.load(made.folder, corpus, 100)


def test_a_damaged_note_of_a_shard_is_named(corpus, tmp_path):
    made = shards.prepare(corpus, TOK, tmp_path, progress=False)
    (made.folder / "manifest.json").unlink()
    (made.folder / "00-00000.json").write_text("[]")
    with pytest.raises(LmtrainError, match="damaged .*Delete the folder"):
        shards.prepare(corpus, TOK, tmp_path, progress=False)


@pytest.mark.parametrize("damage", ["cut", "missing", "manifest"])
def test_a_damaged_corpus_is_named(corpus, tmp_path, damage):
    folder = shards.prepare(corpus, TOK, tmp_path, progress=False).folder
    target = folder / ("manifest.json" if damage == "manifest" else "00-00000.train.npy")
    if damage == "missing":
        target.unlink()
    else:
        target.write_bytes(target.read_bytes()[:-100])
    with pytest.raises(LmtrainError, match="damaged .*Delete the folder"):
        shards.prepare(corpus, TOK, tmp_path, progress=False)


def test_cache_names_another_folder(corpus, tmp_path):
    data = Data(**{**vars(corpus), "cache": str(tmp_path / "cache")})
    assert shards.prepare(data, TOK, tmp_path / "data", progress=False).folder.parent == tmp_path / "cache"
    assert not (tmp_path / "data").exists()
