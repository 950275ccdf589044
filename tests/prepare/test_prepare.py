"""What `lmtrain prepare` keeps and drops is what its manifest says, however often it is interrupted."""

import gzip
import json
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from lmtrain.data import pipeline, sources, tokenizer
from lmtrain.prepare import launch, run, stages, synthetic
from lmtrain.prepare.settings import Settings
from lmtrain.schema import Data
from lmtrain.types import LmtrainError
from tests.prepare import corpus

GOOD = [corpus.document(np.random.default_rng(seed)) for seed in range(6)]


def settings(where, **changes):
    """Few merges, small tasks, in this process."""
    given = {"input": (str(where / "in"),), "to": str(where / "out"), "vocab_size": 400, "task_mb": 1}
    return Settings(**given | changes)


def jsonl(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def manifest(folder):
    return json.loads((folder / "out/manifest.json").read_text())


def dropped(found):
    return {step["name"]: step.get("dropped", 0) for step in found["steps"]}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """(folder, truth) of a small corpus, prepared."""
    where = tmp_path_factory.mktemp("planted")
    truth = corpus.build(where / "in", 0.5)
    run.prepare(settings(where, pii=True, decontaminate=(str(where / "in-rows.jsonl"),)), progress=False)
    return where, truth


# ------------------------------------------------------------------------------------------------- what it finds
def test_every_plant_is_found_and_the_manifest_adds_up(planted):
    where, truth = planted
    found = manifest(where)
    lost = dropped(found)
    assert found["steps"][0]["documents"] == truth["documents"] and found["steps"][0]["bytes"] == truth["bytes"]
    assert lost["exact"] == truth["exact"] > 0 and lost["minhash"] == truth["near"] > 0
    assert lost["decontaminate"] == truth["contaminated"] > 0
    assert sum(lost[name] for name in ("language", "gopher-repetition", "gopher", "c4", "fineweb")) == (
        truth["foreign"] + truth["poor"]
    )
    assert found["pii"]["emails"] == truth["emails"] > 0 and found["pii"]["addresses"] == truth["addresses"] > 0
    assert found["documents"] + found["heldout_documents"] == truth["good"]
    example = next(step for step in found["steps"] if step["name"] == "exact")["reasons"]["the same text"]["examples"][
        0
    ]
    assert example["text"] and example["where"].startswith(str(where / "in"))


def test_no_address_and_no_row_is_left_in_what_is_trained_on(planted):
    where, _ = planted
    texts = [document.text.decode() for document in sources.read(Data("prepared", str(where / "out")))]
    rows = [json.loads(line)["question"] for line in (where / "in-rows.jsonl").read_text().splitlines()]
    assert len(texts) == len(set(texts)) == manifest(where)["documents"] + manifest(where)["heldout_documents"]
    assert not any(row in text for text in texts for row in rows)
    signs = [sign for text in texts for sign in text.split() if "@" in sign]
    assert signs and set(signs) <= {"email@example.com", "firstname.lastname@example.org"}


def test_pretraining_reads_the_shards_where_they_lie_and_names_the_manifest(planted, tmp_path):
    where, _ = planted
    data = Data("prepared", str(where / "out"), row_length=64)
    tok = tokenizer.load(where / "out/tokenizer")
    train, heldout = pipeline.build(data, tok, 2, 0, tmp_path / "data", progress=False)
    batch = train.next()
    assert batch["tokens_BT"].shape == (2, 64) and not list(tmp_path.rglob("*.npy"))
    assert str(where / "out/manifest.json") in train.summary()
    shards = train.shards
    texts = {document.text for document in sources.read(data)}
    ids = shards.members[0].train.read(0, len(shards.members[0].train))
    assert {tok.decode_bytes(part.tolist()) for part in np.split(ids, np.flatnonzero(ids == tok.end))[1:]} < texts


def test_another_tokenizer_or_a_mixture_has_the_same_documents(planted, tmp_path, capsys):
    where, _ = planted
    found = manifest(where)
    data = Data("prepared", str(where / "out"), row_length=64)
    train, _ = pipeline.build(data, tokenizer.bytes_tokenizer(), 2, 0, tmp_path / "bytes", progress=False)
    assert f"{where}/out/tokenizer" in capsys.readouterr().out
    assert [train.shards.total(name) for name in ("documents", "bytes", "heldout_bytes")] == [
        found["documents"], found["bytes"], found["heldout_bytes"],
    ]  # fmt: skip
    again = next(iter(sources.read(data))).text.decode()
    jsonl(tmp_path / "more.jsonl", [{"text": again}, *({"text": text} for text in GOOD)])
    more = Data("jsonl", str(tmp_path / "more.jsonl"))
    mixed = Data(row_length=64, heldout="hash", mixture={"more": more, "ready": data})
    train, _ = pipeline.build(mixed, tokenizer.load(where / "out/tokenizer"), 2, 0, tmp_path / "mix", progress=False)
    counts = {m["name"]: m["documents"] + m["heldout_documents"] for m in train.shards.manifest["members"]}
    assert counts == {"more": len(GOOD), "ready": found["documents"] + found["heldout_documents"]}


# --------------------------------------------------------------------------------------------------- interrupted
def test_stopped_between_stages_it_goes_on_to_the_same_manifest(planted, monkeypatch, tmp_path):
    where, _ = planted
    s = settings(where, to=str(tmp_path / "out"), pii=True, decontaminate=(str(where / "in-rows.jsonl"),))
    whole = launch.run
    calls = []

    def half(s, plan, progress):
        calls.append(len(plan))
        return whole(s, plan[: len(plan) // 2] if len(calls) == 1 else plan, progress) and len(calls) > 1

    monkeypatch.setattr(run.launch, "run", half)
    assert run.prepare(s, progress=False) is None
    assert run.prepare(s, progress=False) == tmp_path / "out/manifest.json"
    assert (tmp_path / "out/manifest.json").read_bytes() == (where / "out/manifest.json").read_bytes()
    assert not (tmp_path / "out/scratch").exists()
    for change in ({"vocab_size": 500}, {"quality": ("gopher",)}):
        with pytest.raises(LmtrainError, match=f"{next(iter(change))}: .* there, .* now.*another --to"):
            run.prepare(settings(where, **{"to": str(tmp_path / "out"), "pii": True} | change), progress=False)


@pytest.mark.slow
def test_killed_half_way_it_goes_on_to_the_same_manifest(tmp_path):
    truth = corpus.build(tmp_path / "in", 8)

    def start(to, workers):
        command = [sys.executable, "-m", "lmtrain.cli", "prepare", "--input", str(tmp_path / "in"), "--to", str(to)]
        rows = str(tmp_path / "in-rows.jsonl")
        command += ["--pii", "--decontaminate", rows, "--vocab-size", "1000", "--task-mb", "1", "--workers", workers]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL)

    assert start(tmp_path / "a", "1").wait() == 0
    kills = 0
    for stage in ("clean", "minhash", "tokenise"):
        process = start(tmp_path / "b", "2")
        while not list(tmp_path.glob(f"b/logs/{stage}/completions/*")) and process.poll() is None:
            time.sleep(0.05)
        kills += process.poll() is None
        process.kill()
        process.wait()
    assert kills >= 2 and start(tmp_path / "b", "2").wait() == 0
    assert (tmp_path / "a/manifest.json").read_bytes() == (tmp_path / "b/manifest.json").read_bytes()
    found = json.loads((tmp_path / "b/manifest.json").read_text())
    assert found["documents"] + found["heldout_documents"] == truth["good"]


@pytest.mark.slow
def test_tasks_of_a_killed_command_end_with_it(tmp_path):
    corpus.build(tmp_path / "in", 8)
    command = [sys.executable, "-m", "lmtrain.cli", "prepare", "--input", str(tmp_path / "in"), "--workers", "2"]
    process = subprocess.Popen([*command, "--to", str(tmp_path / "out"), "--task-mb", "1"], start_new_session=True)
    while not list(tmp_path.glob("out/logs/clean/logs/*")):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 30
    while _session(process.pid) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not _session(process.pid)


def _session(leader):
    """Processes of a session that are alive."""
    alive = []
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(session) == leader and state != "Z":
            alive.append(stat)
    return alive


# --------------------------------------------------------------------------------------------------- wrong input
def broken_gz(folder):
    folder.mkdir()
    packed = gzip.compress(b"".join(json.dumps({"text": text}).encode() + b"\n" for text in GOOD))
    (folder / "a.jsonl.gz").write_bytes(packed[: len(packed) // 2])


def broken_warc(folder):
    folder.mkdir()
    (folder / "a.warc.gz").write_bytes(gzip.compress(b"these are no records\n" * 20))


def cut_warc(folder):
    folder.mkdir()
    head = b"WARC/1.0\r\nWARC-Type: conversion\r\nWARC-Record-ID: <a>\r\nContent-Length: 5000\r\n\r\n"
    (folder / "a.wet").write_bytes(head + b"too little")


def no_column(folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    pq.write_table(pa.table({"txt": GOOD}), folder / "a.parquet")


def no_parquet(folder):
    folder.mkdir()
    (folder / "a.parquet").write_bytes(b"not at all")


INPUTS = {
    "jsonl without text": (lambda f: jsonl(f / "a.jsonl", [{"text": GOOD[0]}, {"txet": GOOD[1]}]),
                           r"a.jsonl:2: no field 'text' \(--field\). Did you mean txet\?"),
    "text of another kind": (lambda f: jsonl(f / "a.jsonl", [{"text": 3}]), "a.jsonl:1: field 'text' holds int"),
    "no json": (lambda f: (f.mkdir(), (f / "a.jsonl").write_text("{")), "a.jsonl:1: .*not a JSON line"),
    "broken gz": (broken_gz, r"a.jsonl.gz.*cannot be read: Compressed file ended"),
    "broken warc": (broken_warc, "a.warc.gz: not a WARC file, or damaged"),
    "cut warc": (cut_warc, r"a.wet, record 1: cannot be read: it ends 4,990 bytes early"),
    "no column": (no_column, r"a.parquet: no field 'text' \(--field\). Did you mean txt\?"),
    "no parquet": (no_parquet, "a.parquet: not a Parquet file"),
}  # fmt: skip


@pytest.mark.parametrize("name", INPUTS)
def test_a_file_that_cannot_be_read_is_named(name, tmp_path):
    write, message = INPUTS[name]
    write(tmp_path / "in")
    with pytest.raises(LmtrainError, match=message):
        run.prepare(settings(tmp_path), progress=False)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"input": ("nowhere/*.jsonl",)}, "--input: no such file, folder or glob: nowhere"),
        ({"quality": ("gofer",)}, r"--quality: got 'gofer', takes gopher, c4, fineweb or none. Did you mean gopher\?"),
        ({"dedup": ("minihash",)}, r"--dedup: .*Did you mean minhash\?"),
        ({"executor": "slrum"}, r"--executor: .*Did you mean slurm\?"),
        ({"language": "eng"}, r"--language eng: py3langid knows no such language. Did you mean en\?"),
        ({"decontaminate": ("gsm9k",)}, "--decontaminate gsm9k: no such file, and no task"),
        ({"decontaminate": ("rows.jsonl",)}, "--decontaminate: no such file"),
        ({"tokenizer": "nowhere"}, "--tokenizer nowhere: takes bpe, bytes, a tokenizer.json"),
        ({"workers": 0}, "--workers: got 0, takes 1 or more"),
        ({"vocab_size": 10}, r"--vocab-size: got 10, takes 264 \(the 256 bytes .*\) to 10,000,000"),
        ({"vocab_size": 10_000_001}, "--vocab-size: got 10000001, takes 264"),
        ({"temperature": -1.0}, "--temperature: got -1.0, takes 0"),
        ({"temperature": float("nan")}, "--temperature: got nan, takes 0"),
        ({"tokenizer": ""}, "--tokenizer: is empty"),
        ({"synthetic": "runs/a"}, "--synthetic RUN, --prompts FILE and --count N go together"),
        ({"executor": "slurm"}, "--executor slurm takes --option time="),
        ({"executor": "slurm", "options": ("partitoin=cpu",)}, r"--option partitoin=cpu: .*Did you mean partition\?"),
    ],
)
def test_a_setting_that_cannot_be_is_named(change, message, tmp_path):
    jsonl(tmp_path / "in/a.jsonl", [{"text": text} for text in GOOD])
    with pytest.raises(LmtrainError, match=message):
        run.prepare(settings(tmp_path, **change), progress=False)


def test_what_is_of_no_known_kind_or_not_its_own_is_left_alone(tmp_path):
    jsonl(tmp_path / "in/a.docx", [])
    with pytest.raises(LmtrainError, match=r"a.docx is of no kind that is read. The name ends in .jsonl"):
        run.prepare(settings(tmp_path), progress=False)
    jsonl(tmp_path / "in2/a.jsonl", [{"text": "x"}])
    jsonl(tmp_path / "out/mine.txt", [])
    with pytest.raises(LmtrainError, match=r"--to .*out: holds mine.txt, which are not of `lmtrain prepare`"):
        run.prepare(settings(tmp_path, input=(str(tmp_path / "in2"),)), progress=False)


def test_an_unfinished_folder_is_not_trained_on(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(LmtrainError, match="has not finished there"):
        list(sources.read(Data("prepared", str(tmp_path / "out"))))
    (tmp_path / "out/manifest.json").write_text("{}")
    with pytest.raises(LmtrainError, match="not the manifest of `lmtrain prepare`"):
        list(sources.read(Data("prepared", str(tmp_path / "out"))))


# ------------------------------------------------------------------------------------------------- smaller things
def test_rows_that_cannot_be_read_are_skipped_and_counted(tmp_path):
    broken_gz(tmp_path / "in")
    jsonl(tmp_path / "in/b.jsonl", [{"text": GOOD[0]}, {"no": 1}, {"text": " "}, *({"text": t} for t in GOOD[2:])])
    s = settings(tmp_path, malformed="skip", dedup=(), quality=(), language="all", tokenizer="bytes")
    run.prepare(s, progress=False)
    reasons = manifest(tmp_path)["steps"][0]["reasons"]
    assert {name: lost["documents"] for name, lost in reasons.items()} == {"malformed": 2, "empty": 1}
    assert [e["where"].rpartition("/")[2] for e in reasons["malformed"]["examples"]] == ["a.jsonl.gz", "b.jsonl:2"]


def test_addresses_are_read_where_they_are(tmp_path):
    import fsspec

    rows = "".join(json.dumps({"text": text}) + "\n" for text in GOOD)
    with fsspec.open("memory://bucket/a.jsonl.gz", "wb") as file:
        file.write(gzip.compress(rows.encode()))
    s = settings(tmp_path, input=("memory://bucket/*.gz",), tokenizer="bytes", dedup=())
    run.prepare(s, progress=False)
    assert manifest(tmp_path)["documents"] + manifest(tmp_path)["heldout_documents"] == len(GOOD)
    with pytest.raises(LmtrainError, match="--input: no file at memory://bucket/none"):
        run.prepare(settings(tmp_path, input=("memory://bucket/none*",)), progress=False)


def test_no_document_left_is_said_with_who_dropped_them(tmp_path):
    jsonl(tmp_path / "in/a.jsonl", [{"text": "Too short to be of any use to anybody."}])
    with pytest.raises(LmtrainError, match="no document is left of 1. Dropped by gopher-repetition 1 \\("):
        run.prepare(settings(tmp_path), progress=False)
    jsonl(tmp_path / "in2/a.jsonl", [{"text": GOOD[0]}, {"text": ""}])
    jsonl(tmp_path / "rows.jsonl", [{"q": GOOD[0]}])
    s = settings(
        tmp_path, input=(str(tmp_path / "in2"),), to=str(tmp_path / "2"), decontaminate=(str(tmp_path / "rows.jsonl"),)
    )
    with pytest.raises(
        LmtrainError, match=r"left of 1. Dropped by read 1 \(empty 1\); decontaminate 1 \(rows.jsonl 1\)\."
    ):
        run.prepare(s, progress=False)
    s = settings(tmp_path, input=(str(tmp_path / "in2"),), to=str(tmp_path / "3"), heldout_fraction=1 - 1e-9)
    with pytest.raises(LmtrainError, match="all 1 documents that are kept are held out"):
        run.prepare(s, progress=False)


def test_a_short_question_is_found_whole_and_a_very_short_one_is_not_looked_for(tmp_path):
    asked = "How many apples does the old farmer keep?"
    jsonl(tmp_path / "in/a.jsonl", [{"text": f"{GOOD[0]}\n{asked}"}, {"text": GOOD[1]}])
    jsonl(tmp_path / "rows.jsonl", [{"q": asked, "a": "12"}, {"q": "The time?", "a": "12"}])
    s = settings(tmp_path, decontaminate=(str(tmp_path / "rows.jsonl"),), tokenizer="bytes", dedup=())
    run.prepare(s, progress=False)
    assert manifest(tmp_path)["decontamination"] == {"rows": 1, "too_short": 1, "found": 1}
    assert dropped(manifest(tmp_path))["decontaminate"] == 1


def test_the_result_does_not_depend_on_how_files_are_shared_out(tmp_path):
    jsonl(tmp_path / "in/a.jsonl", [{"text": text} for text in GOOD])
    texts = []
    for name, parts in (("one", 1), ("three", 3)):
        s = settings(tmp_path, to=str(tmp_path / name), tokenizer="bytes", dedup=())
        units = [{"path": str(tmp_path / "in/a.jsonl"), "part": part, "parts": parts} for part in range(parts)]
        (tmp_path / name / "scratch").mkdir(parents=True)
        (tmp_path / name / "scratch/units.jsonl").write_text("".join(json.dumps(unit) + "\n" for unit in units))
        tokenizer.bytes_tokenizer().save(tmp_path / name / "tokenizer")
        launch.run(s, stages.plan(s, parts, {"heldout_fraction": 0.05}), progress=False)
        texts.append(sorted(document.text for document in sources.read(Data("prepared", str(tmp_path / name)))))
    assert texts[0] == texts[1] == sorted(text.encode() for text in GOOD)


def test_a_model_writes_documents_and_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    from lmtrain import runs
    from tests.eval import toys

    subject = toys.subject()
    model = runs.Run(tmp_path, "pretrain", {}, subject.model, subject.tokenizer, subject.params, 3)
    monkeypatch.setattr(synthetic.runs, "load", lambda folder: model)
    monkeypatch.setattr(synthetic, "BATCH", 2)
    (tmp_path / "prompts.txt").write_text("the cat\n\nthe dog sat\n")
    s = settings(tmp_path, synthetic="a run", prompts=str(tmp_path / "prompts.txt"), count=5, tokens=8)
    file = synthetic.write(s, tmp_path, progress=False)
    whole = file.read_bytes()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [row["prompt"] for row in rows] == ["the cat", "the dog sat"] * 2 + ["the cat"]
    assert all(row["text"].startswith(row["prompt"]) for row in rows) and len({row["text"] for row in rows}) > 2
    file.write_bytes(whole[: len(whole) - len(whole.splitlines()[-1]) // 2])  # killed while it wrote the last line
    assert synthetic.write(s, tmp_path, progress=False).read_bytes() == whole
