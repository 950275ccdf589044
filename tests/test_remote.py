"""A run whose folder is in a bucket, and data in one; fsspec's memory:// stands for it."""

import shutil
import threading

import fsspec
import pytest

import lmtrain
from lmtrain import bucket as bucket_lib
from lmtrain import checkpoint, remote, scattered, storage
from lmtrain.data import files
from lmtrain.types import LmtrainError, StorageError
from tests.test_run import experiment, same_metrics, text

__all__ = ["text"]  # a fixture


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """Its file system, empty; the copies here lie in tmp_path/copies."""
    monkeypatch.setattr(bucket_lib, "COPIES", tmp_path / "copies")
    monkeypatch.setattr(files, "FETCHED", tmp_path / "fetched")
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    scattered.opened.cache_clear()
    yield fs
    fs.store.clear()


def test_a_run_in_a_bucket_goes_on_on_another_machine_to_the_bit(text, bucket, tmp_path, monkeypatch):
    whole = lmtrain.run(experiment(text), tmp_path / "whole")
    monkeypatch.setattr(bucket_lib, "PERIOD", 0.05)
    show = lmtrain.experiment.train.log.Progress.show

    def stopped(self, step, metrics):
        if step == 15:
            raise LmtrainError("the machine is taken away")
        show(self, step, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(lmtrain.experiment.train.log.Progress, "show", stopped)
        with pytest.raises(LmtrainError, match="taken away"):
            lmtrain.run(experiment(text), "memory://b/run")
    monkeypatch.setattr(bucket_lib, "COPIES", tmp_path / "other copies")  # another machine
    run = lmtrain.run(experiment(text), "memory://b/run")
    assert same_metrics(run.metrics, whole.metrics)
    assert checkpoint.params_sha256(run.params) == checkpoint.params_sha256(whole.params)
    there = {name.removeprefix("/b/run/").split("/")[0] for name in bucket.find("/b/run")}
    assert there - {"report.html"} == {"tokenizer", "data", "pretrain", "summary.json"}
    steps = {name.split("checkpoints/")[1].split("/")[0] for name in bucket.find("/b/run/pretrain/checkpoints")}
    assert steps == {str(s) for s in checkpoint.steps(run.folder / "pretrain/checkpoints")}
    monkeypatch.setattr(bucket_lib, "COPIES", tmp_path / "yet others")
    opened = lmtrain.load("memory://b/run")
    assert opened.step == run.step and opened.generate("the", tokens=3, temperature=0)


def test_the_manifest_goes_up_last_and_half_a_checkpoint_not_at_all(bucket):
    mirror = remote.Mirror("memory://b/run")
    mirror.pull()
    here = mirror.local / "pretrain/checkpoints"
    for name in ("5/data", "5/manifest.json", "10/data", "12.orbax-checkpoint-tmp/data"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(name)
    (mirror.local / ".lock").touch()
    order = []
    put = bucket.put_file
    fs = type("Fs", (), {"put_file": lambda _, a, b: (order.append(b), put(a, b)), "rm_file": bucket.rm_file})()
    mirror._opened = fs, mirror.root
    mirror.push()
    assert order == ["/b/run/pretrain/checkpoints/5/data", "/b/run/pretrain/checkpoints/5/manifest.json"]
    (here / "10/manifest.json").write_text("whole")
    shutil.rmtree(here / "5")
    mirror.push()
    assert sorted(bucket.find("/b/run")) == [f"/b/run/pretrain/checkpoints/10/{n}" for n in ("data", "manifest.json")]


def test_an_unwritable_bucket_is_refused_before_anything_is_done(text, bucket, monkeypatch):
    def no(*_, **__):
        raise PermissionError("403: no permission")

    monkeypatch.setattr(type(bucket), "pipe_file", no)
    with pytest.raises(StorageError, match="memory://b/run: cannot be written to: 403: no permission"):
        lmtrain.run(experiment(text), "memory://b/run")


def test_a_failed_upload_is_tried_again(bucket, monkeypatch):
    monkeypatch.setattr(storage, "PAUSES", (0.0, 0.0))
    tries = []

    def flaky():
        tries.append(1)
        if len(tries) < 3:
            raise StorageError("503")

    storage.again(flaky)
    assert len(tries) == 3
    with pytest.raises(StorageError):
        tries.clear()
        storage.again(lambda: flaky() or tries.clear() or flaky())


def test_uploads_go_on_while_the_run_does(bucket, monkeypatch):
    monkeypatch.setattr(bucket_lib, "PERIOD", 0.02)
    with remote.mirrored("memory://b/run") as folder:
        (folder / "metrics.jsonl").write_text("1")
        seen = threading.Event()
        for _ in range(200):
            if bucket.exists("/b/run/metrics.jsonl"):
                seen.set()
                break
            seen.wait(0.02)
        assert seen.is_set()


def test_data_in_a_bucket_is_fetched_once_and_again_when_it_changes(bucket):
    bucket.pipe({"/b/a.jsonl": b'{"text": "one"}\n', "/b/sub/c.jsonl": b"", "/b/d.txt": b""})
    (one,) = files.find("memory://b/a.jsonl")
    assert one.name == "a.jsonl" and one.read_bytes() == b'{"text": "one"}\n'
    stamp = one.stat().st_mtime
    one.unlink()
    (again,) = files.find("memory://b/a.jsonl")
    assert again == one and again.stat().st_mtime == stamp  # fetched anew, and the same file
    bucket.pipe_file("/b/a.jsonl", b'{"text": "other"}\n')
    assert files.find("memory://b/a.jsonl")[0].read_bytes() == b'{"text": "other"}\n'
    assert [p.name for p in files.find("memory://b")] == ["a.jsonl", "d.txt", "c.jsonl"]
    assert [p.name for p in files.find("memory://b/*.jsonl")] == ["a.jsonl"]
    with pytest.raises(LmtrainError, match="data.path: no such file, folder or glob: memory://b/none.jsonl"):
        files.find("memory://b/none.jsonl")
    with pytest.raises(LmtrainError, match="data.path: nowhere://x"):
        files.find("nowhere://x")


def mirror_with(step, text="x"):
    """A copy with one whole checkpoint, pushed."""
    mirror = remote.Mirror("memory://b/run")
    here = mirror.local / f"pretrain/checkpoints/{step}"
    here.mkdir(parents=True, exist_ok=True)
    for name in ("data", "manifest.json"):
        (here / name).write_text(text)
    return mirror


def test_what_is_opened_to_be_read_is_not_the_copy_of_a_run_in_progress(bucket):
    mirror = mirror_with(5)
    mirror.push()
    mirror_with(10)  # whole, and not up yet
    assert scattered.opened("memory://b/run") != mirror.local
    assert (mirror.local / "pretrain/checkpoints/10/data").exists()


def test_a_copy_that_is_newer_than_the_bucket_stays_and_goes_up(bucket, capsys):
    mirror_with(5).push()
    mirror = mirror_with(10)  # the bucket was away, and the run ended
    mirror.pull()
    assert "is newer, and goes up" in capsys.readouterr().out
    mirror.push()
    assert bucket.exists("/b/run/pretrain/checkpoints/10/manifest.json")


def test_a_copy_that_is_gone_empties_no_bucket(bucket):
    mirror = mirror_with(5)
    mirror.push()
    shutil.rmtree(mirror.local)
    mirror.push()
    assert bucket.exists("/b/run/pretrain/checkpoints/5/manifest.json")


def test_two_runs_on_one_machine_do_not_share_a_copy(bucket):
    with remote.mirrored("memory://b/run"), pytest.raises(LmtrainError, match="another process .* is running there"):
        with remote.mirrored("memory://b/run"):
            pass
