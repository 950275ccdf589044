"""A run's folder in a bucket when several processes work on it, each in a copy of its own; a folder (file://) and
fsspec's memory:// stand for the bucket, and an S3 server where moto and s3fs are installed."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import lmtrain
from lmtrain import bucket as bucket_lib
from lmtrain import checkpoint, log, manifest, scattered, storage
from lmtrain.hosts import local
from lmtrain.types import LmtrainError, StorageError, TrainState
from tests.several import (
    STEPS,
    at_step,
    cut,
    environment,
    finish,
    losses,
    members,
    same_losses,
    sha,
    start,
    tiny,
    whole,
)
from tests.test_hosts import CHAIN

__all__ = ["tiny", "whole"]  # fixtures


# ------------------------------------------------------------------------------------- one process, and no runtime
@pytest.fixture(params=["memory", "file"])
def copy(request, tmp_path, monkeypatch):
    """Process 0 of 1, at work on an empty bucket."""
    monkeypatch.setattr(bucket_lib, "COPIES", tmp_path / "copies")
    fsspec.filesystem("memory").store.clear()
    scattered.opened.cache_clear()
    copy = scattered.Copy("memory://b/run" if request.param == "memory" else f"file://{tmp_path}/b/run", 0, 1)
    with copy.at_work():
        yield copy
    fsspec.filesystem("memory").store.clear()


def there(copy):
    copy.fs.invalidate_cache()
    names = [name.removeprefix(f"{copy.root}/") for name in copy.fs.find(copy.root)]
    return sorted(name for name in names if name != scattered.OWNER)


def state(mesh, value):
    """A state whose arrays lie differently: split both ways, one way, not at all, and one number."""

    def put(shape, *spec):
        x = jnp.arange(np.prod(shape, dtype=int), dtype=jnp.float32).reshape(shape) + value
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    params = {"a": {"b": put((8, 4), "x", "y"), "c": put((6, 4), None, "x")}, "d": put((3,))}
    moments = {"mu": {"a": put((8, 4), "y")}}
    return TrainState(
        put(
            (),
        ),
        params,
        moments,
        jax.device_put(jax.random.key(int(value)), put(()).sharding),
    )


def mesh_of(*shape):
    return jax.make_mesh(shape, ("x", "y"), devices=jax.devices()[: int(np.prod(shape))])


def abstract(s):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), s)


def same(a, b):
    ours, theirs = ({**s.params, "opt": s.opt_state, "step": s.step, "key": jax.random.key_data(s.key)} for s in (a, b))
    return jax.tree.all(jax.tree.map(np.array_equal, ours, theirs))


def checkpoints(copy, **kwargs):
    return checkpoint.Checkpoints(copy.local / "pretrain/checkpoints", copy=copy, **kwargs)


def test_a_checkpoint_comes_back_on_another_mesh_from_the_bucket_alone(copy):
    saved = state(mesh_of(4, 2), 1.0)
    one = checkpoints(copy)
    one.save(5, saved, {"here": 1}, last=True)
    one.close()
    names = there(copy)
    assert [n for n in names if n.endswith("a.b/0.0")] and not [n for n in names if "part-" in n]
    shutil.rmtree(copy.local / "pretrain")
    copy._fetched.clear()
    copy.pull()
    assert there(copy) == names
    here = [p for p in copy.local.rglob("*") if p.is_file() and not p.name.startswith(".")]
    assert [p.name for p in here] == [manifest.MANIFEST]  # the arrays come when they are asked for
    wanted = state(mesh_of(2, 4), 0.0)
    restored, meta, step = checkpoints(copy).restore_newest(abstract(wanted))
    assert same(restored, saved) and meta == {"here": 1} and step == 5
    params = checkpoint.load_params(copy.local / "pretrain/checkpoints")
    assert jax.tree.all(jax.tree.map(np.array_equal, params, saved.params))


def test_what_is_pruned_here_is_pruned_there(copy):
    one = checkpoints(copy, keep_last=1, keep_best=0)
    for step in (5, 10):
        one.save(step, state(mesh_of(4, 2), float(step)), {}, last=True)
    one.close()
    assert {name.split("/")[2] for name in there(copy)} == {"10"}


def test_a_damaged_chunk_is_named_and_the_checkpoint_before_is_used(copy, capsys):
    one = checkpoints(copy)
    for step in (5, 10):
        one.save(step, state(mesh_of(4, 2), float(step)), {}, last=True)
    one.close()
    name = f"{copy.root}/pretrain/checkpoints/10/params/a.b/0.0"
    copy.fs.pipe_file(name, copy.fs.cat_file(name)[:-1] + b"?")
    shutil.rmtree(copy.local / "pretrain")
    copy._fetched.clear()
    copy.pull()
    restored, _, step = checkpoints(copy).restore_newest(abstract(state(mesh_of(4, 2), 0.0)))
    assert step == 5 and same(restored, state(mesh_of(4, 2), 5.0))
    assert "checkpoints/10/params/a.b/0.0: sha256 differs. Damaged; moved to damaged-10" in capsys.readouterr().out
    assert {name.split("/")[2] for name in there(copy)} == {"5", "damaged-10"}


def test_where_every_checkpoint_is_damaged_the_next_start_says_so_too(copy):
    copy.fs.pipe_file(f"{copy.root}/pretrain/checkpoints/damaged-5/{manifest.MANIFEST}", b"{}")
    copy.pull()
    with pytest.raises(LmtrainError, match="every checkpoint is damaged"):
        checkpoints(copy).restore_newest(abstract(state(mesh_of(4, 2), 0.0)))


def test_a_lost_chunk_is_named(copy):
    one = checkpoints(copy)
    one.save(5, state(mesh_of(4, 2), 1.0), {}, last=True)
    one.close()
    copy.fs.rm_file(f"{copy.root}/pretrain/checkpoints/5/params/d/0")
    shutil.rmtree(copy.local / "pretrain/checkpoints/5/params")
    problems = copy.fetch(copy.local / "pretrain/checkpoints/5", {"params/d": None})
    assert problems == ["checkpoints/5/params/d/0: missing"]


def test_a_file_that_is_not_what_the_manifest_says_is_fetched_again(copy):
    one = checkpoints(copy)
    one.save(5, state(mesh_of(4, 2), 1.0), {}, last=True)
    one.close()
    chunk = copy.local / "pretrain/checkpoints/5/params/d/0"
    chunk.write_bytes(b"old")
    assert copy.fetch(chunk.parents[2], {"params/d": None}) == []
    chunk.unlink()  # as in between; a push then is none of the bucket's business
    copy.push()
    assert copy.fetch(chunk.parents[2], {"params/d": None}) == []


def test_an_unfinished_save_is_swept_away_at_the_next_start(copy):
    for name in ("5/params/a/0", "5/manifest.json", "10/params/a/0"):
        copy.fs.pipe_file(f"{copy.root}/pretrain/checkpoints/{name}", b"1")
    copy._sweep()
    assert {name.split("/")[2] for name in there(copy)} == {"5"}


def test_every_chunk_is_needed_by_some_device_and_no_device_needs_all(tmp_path):
    (tmp_path / ".zarray").write_text(json.dumps({"shape": [8, 6], "chunks": [2, 3]}))

    class Sharding:
        def __init__(self, index):
            self.index = index

        def addressable_devices_indices_map(self, shape):
            return {0: self.index}

    def needs(*index):
        return scattered._chunks(tmp_path, type("X", (), {"sharding": Sharding(index)}))

    grid = {f"{i}.{j}" for i in range(4) for j in range(2)}
    assert scattered._chunks(tmp_path, None) == needs(slice(None), slice(None)) == grid
    assert needs(slice(2, 4), slice(0, 3)) == {"1.0"}
    assert needs(slice(1, 3), slice(2, 4)) == {"0.0", "0.1", "1.0", "1.1"}
    (tmp_path / ".zarray").write_text(json.dumps({"shape": [], "chunks": []}))
    assert scattered._chunks(tmp_path, None) == {"0"}


def test_files_that_are_small_go_up_and_down_and_away(copy):
    (copy.local / "pretrain").mkdir()
    (copy.local / "pretrain/metrics.jsonl").write_text("1")
    steps = copy.local / "pretrain/checkpoints"
    for name in (".lock", "half.tmp", steps / "5/params/x", steps / "deleting-5/manifest.json"):
        (copy.local / name).parent.mkdir(parents=True, exist_ok=True)
        (copy.local / name).touch()
    copy.push()
    assert there(copy) == ["pretrain/metrics.jsonl"]
    other = scattered.Copy(copy.url, 1, 2)
    other.local.mkdir()
    other.pull()
    assert (other.local / "pretrain/metrics.jsonl").read_text() == "1"
    (copy.local / "pretrain/metrics.jsonl").write_text("12")
    (copy.local / "more.json").touch()
    copy.push()
    other.pull()
    assert (other.local / "pretrain/metrics.jsonl").read_text() == "12" and (other.local / "more.json").exists()
    (copy.local / "more.json").unlink()
    copy.push()
    other.pull()
    assert there(copy) == ["pretrain/metrics.jsonl"] and not (other.local / "more.json").exists()


def test_tokenised_text_comes_down_when_it_is_whole_and_once(copy):
    for name in ("manifest.json", "00-00000.train.npy"):
        (copy.local / "data/abc").mkdir(parents=True, exist_ok=True)
        (copy.local / "data/abc" / name).write_text("1")
    assert copy._has_text()
    copy.push()
    assert not copy._has_text()
    other = scattered.Copy(copy.url, 1, 2)
    other.local.mkdir()
    other.pull()
    assert not (other.local / "data").exists() and not other._waits()
    (other.local / "data/abc").mkdir(parents=True)
    (other.local / "data/abc" / storage.WANTED).touch()
    assert other._waits()
    got, download = [], other.download
    other.download = lambda name: (got.append(name), download(name))
    other.pull_text()
    other.pull_text()
    assert got == ["data/abc/00-00000.train.npy", "data/abc/manifest.json"]


def test_a_start_that_was_thought_dead_does_not_write_another_checkpoint(copy):
    one = checkpoints(copy)
    copy.fs.pipe_file(f"{copy.root}/.owner", b"another")
    with pytest.raises(LmtrainError, match="started again elsewhere") as error:
        one.save(5, state(mesh_of(4, 2), 1.0), {}, last=True)
    assert error.value.status == 2
    assert not [name for name in there(copy) if name.endswith(manifest.MANIFEST)]


def test_a_manifest_that_is_not_what_was_written_costs_its_checkpoint_alone(copy):
    one = checkpoints(copy)
    for step in (5, 10):
        one.save(step, state(mesh_of(4, 2), float(step)), {}, last=True)
    one.close()
    copy.fs.pipe_file(f"{copy.root}/pretrain/checkpoints/10/{manifest.MANIFEST}", b"{}")
    before = there(copy)
    copy._fetched.clear()
    copy.pull()
    assert checkpoints(copy).restore_newest(abstract(state(mesh_of(4, 2), 0.0)))[2] == 5
    copy.push()
    copy._sweep()
    assert there(copy) == sorted(name.replace("checkpoints/10/", "checkpoints/damaged-10/") for name in before)


def test_of_a_finished_stage_all_files_are_looked_at_once(copy):
    one = checkpoints(copy)
    one.save(5, state(mesh_of(4, 2), 1.0), {}, last=True)
    one.close()
    folder = copy.local / "pretrain/checkpoints"
    shutil.rmtree(folder / "5/rest")
    assert checkpoint.sound(folder, 5)
    name = f"{copy.root}/pretrain/checkpoints/5/rest/step/0"
    copy.fs.pipe_file(name, copy.fs.cat_file(name) + b"?")
    shutil.rmtree(folder / "5/rest")
    assert not checkpoint.sound(folder, 5)
    files = set(manifest.read_manifest(folder, 5)["files"])
    shares = [set(sorted(files)[p::3]) for p in range(3)]
    looked = []
    for process in range(3):
        other = scattered.Copy(copy.url, process, 3)
        other._get = lambda path, files: looked.append(set(files)) or []
        other.check(folder / "5")
    assert looked == shares and set.union(*looked) == files


def test_what_fails_inside_is_the_error_and_the_last_push_is_tried_once(monkeypatch):
    tries = []

    def push():
        tries.append(1)
        raise StorageError("away")

    with pytest.raises(KeyError), bucket_lib.pushed(push):
        raise KeyError
    assert len(tries) == 1
    monkeypatch.setattr(storage, "PAUSES", (0.0, 0.0))
    with pytest.raises(StorageError), bucket_lib.pushed(push):
        tries.clear()
    assert len(tries) == 3


def test_what_is_read_of_a_run_is_found_by_any_of_its_addresses_and_is_as_it_is_now(copy):
    for name in ("tokenizer/config.json", "sft/config.json", "old.json"):
        copy.fs.pipe_file(f"{copy.root}/{name}", b"1")
    run = scattered.found(copy.url)
    assert run != copy.local and {p.name for p in run.iterdir()} == {storage.APART, "tokenizer", "sft", "old.json"}
    assert scattered.found(f"{copy.url}/sft/") == run / "sft" and scattered.found(str(run)) == run
    assert scattered.run_of(f"{copy.url}/tokenizer") == scattered.run_of(f"{copy.url}/") == copy.url
    copy.fs.rm_file(f"{copy.root}/old.json")
    scattered.opened.cache_clear()
    assert not (scattered.found(copy.url) / "old.json").exists()
    (run / "eval.json").write_text("{}")
    scattered.of(run).give(run / "eval.json")
    assert "eval.json" in there(copy)
    with pytest.raises(LmtrainError, match="no run is there"):
        scattered.found(f"{copy.url}/sft/checkpoints/5")


def test_a_folder_knows_whether_others_see_it(copy, tmp_path):
    assert storage.shared(tmp_path) and not storage.shared(copy.local / "pretrain/checkpoints")
    assert scattered.of(tmp_path) is None
    assert scattered.of(copy.local / "pretrain").local == copy.local


# ----------------------------------------------------------------------------------------------- several processes
@pytest.fixture
def home(tmp_path, monkeypatch):
    """Where the copies lie."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home/.cache/lmtrain/runs"


def arrays(folder):
    found = folder.glob("pretrain/checkpoints/*/params/*/*")
    return {str(p.relative_to(folder)) for p in found if scattered.CHUNK.fullmatch(p.name)}


@pytest.mark.slow
def test_processes_with_a_copy_each_learn_what_one_does_and_go_on_in_any_number(tiny, whole, home, tmp_path):
    there, url = tmp_path / "bucket/run", f"file://{tmp_path}/bucket/run"
    finish(start(tiny, url, 2, 4, "--config.mesh.fsdp=8", "--config.mesh.data=1"))
    assert same_losses(losses(there), losses(whole("1x8")))
    copies = [arrays(next(home.glob(f"run-{process}-of-2-run-*[!k]"))) for process in (0, 1)]
    assert copies[0] | copies[1] == arrays(there) and not copies[0] & copies[1] and copies[0] and copies[1]
    for step, (processes, devices), mesh in ((10, (4, 2), ("fsdp=4", "tensor=2")), (20, (1, 8), ("fsdp=2",))):
        shutil.move(there, tmp_path / "before")
        cut(tmp_path / "before", there, step)
        shutil.rmtree(tmp_path / "before")
        flags = [f"--config.mesh.{m}" for m in ("data=-1", *mesh)]
        said = finish(start(tiny, url, processes, devices, *flags))
        assert f"going on from step {step}" in said
        assert same_losses(losses(there), losses(whole("1x8")))
    cut(whole("4x2"), tmp_path / "bucket/other", 15)  # of a folder that all see
    said = finish(start(tiny, f"file://{tmp_path}/bucket/other", 2, 4))
    assert "going on from step 15" in said
    assert same_losses(losses(tmp_path / "bucket/other"), losses(whole("1x8")))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1], ids=["coordinator", "worker"])
@pytest.mark.parametrize("saving", [False, True], ids=["step", "save"])
def test_a_killed_process_costs_nothing_but_time(tiny, whole, home, tmp_path, victim, saving):
    there, url = tmp_path / "bucket/run", f"file://{tmp_path}/bucket/run"
    launcher = start(tiny, url, 2, 2)
    end = time.time() + 200
    while not list(home.glob("run-0-of-2-run-*/pretrain")) and time.time() < end:
        time.sleep(0.05)
    at_step(launcher, next(home.glob("run-0-of-2-run-*[!k]")), random.Random(victim).randrange(7, 25), saving)
    os.kill(members(launcher)[victim], signal.SIGKILL)
    assert f"process {victim} (host " in finish(launcher, status=76)
    shutil.rmtree(home)  # other machines
    finish(start(tiny, url, 2, 2))
    assert sha(there) == sha(whole("2x2")) and losses(there) == losses(whole("2x2"))
    assert not list(there.rglob("part-*.json"))


@pytest.mark.slow
def test_told_to_stop_all_is_in_the_bucket(tiny, whole, home, tmp_path):
    there, url = tmp_path / "bucket/run", f"file://{tmp_path}/bucket/run"
    launcher = start(tiny, url, 2, 2)
    end = time.time() + 200
    while not list(home.glob("run-0-of-2-run-*/pretrain")) and time.time() < end:
        time.sleep(0.05)
    at_step(launcher, next(home.glob("run-0-of-2-run-*[!k]")), 7)
    os.kill(members(launcher)[1], signal.SIGTERM)
    finish(launcher, status=75)
    stopped = checkpoint.steps(there / "pretrain/checkpoints")[-1]
    assert stopped >= 8 and len(losses(there)) == stopped + 1
    said = finish(start(tiny, url, 2, 2))
    assert f"going on from step {stopped}" in said and sha(there) == sha(whole("2x2"))


def start_apart(tiny, url, homes, *flags):
    """As `several.start`, 2 devices each, but that each process has another home, as on a host of its own."""
    argv = [sys.executable, "-m", "lmtrain", "run", "--config", str(tiny), "--workdir", url, *flags]
    places = local.environments(len(homes), 2, environment(tiny), local.free_ports())
    return [
        subprocess.Popen(
            argv, env=env | {"HOME": str(home)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for env, home in zip(places, homes, strict=True)
    ]


SFT = 'c.stages.sft = stage(objective="sft", data=chat, model='
PRETRAINED = """docs = config.data("text", path={text!r}, document="line", row_length=48)
    c.stages.pretrain = stage(data=docs, model=MODEL)
    c.stages.sft = stage(objective="sft", data=chat)"""
LORA = """c.stages.lora = stage(objective="sft", data=chat, init_from="pretrain", model=config.model(lora=Lora(rank=2)))
    c.stages.scores"""


def chain(tiny):
    """Pretraining, SFT, DPO, RL, LoRA on the first stage, and an evaluation."""
    before, rest = CHAIN.split(SFT)
    model, after = rest.split("\n", 1)
    first = PRETRAINED.format(text=str(tiny.parent / "text.txt")).replace("MODEL", model[:-1])
    after = after.replace("c.stages.scores", LORA)
    file = tiny.parent / "chain-bucket.py"
    file.write_text("from lmtrain.schema import Lora\n" + before + first + "\n" + after)
    return file


@pytest.mark.slow
def test_the_whole_chain_over_hosts_that_share_nothing_is_that_of_one_process(tiny, tmp_path):
    """And again, on other machines, it is found to be done."""
    file = chain(tiny)
    flags = ["--config.mesh.data=1", "--config.mesh.fsdp=4"]
    finish(start(file, tmp_path / "one", 1, 4, *flags))
    url, there = f"file://{tmp_path}/two", tmp_path / "two"
    for machines in ("ab", "cd"):
        both = start_apart(file, url, [tmp_path / m for m in machines], *flags)
        said = [finish(process, seconds=500) for process in both]
        for stage in ("pretrain", "sft", "dpo", "rl", "lora"):
            one, two = ([m["loss"] for m in log.read_metrics(run / stage)] for run in (tmp_path / "one", there))
            assert len(one) == 5 and one == pytest.approx(two, rel=1e-4, abs=1e-5), stage
            assert (f"{stage}: finished" in said[0]) == (machines == "cd")
        one, two = (json.loads((run / "summary.json").read_text())["rl"]["tasks"] for run in (tmp_path / "one", there))
        assert one == two and one
    assert json.loads((there / "lora/config.json").read_text())["rest"]["from"] == "pretrain"
    for machine in "abcd":  # each has one copy, in its own home
        (copy,) = (tmp_path / machine / ".cache/lmtrain/runs").glob("run-*[!k]")
        assert copy.name.startswith(f"run-{'abcd'.index(machine) % 2}-of-2-two-")


@pytest.mark.slow
def test_a_run_at_an_address_is_started_from_on_hosts_that_share_nothing(tiny, home, tmp_path):
    url = f"file://{tmp_path}/first"
    finish(start(tiny, url, 1, 2))
    flags = ["--config.stages.pretrain.steps=6", "--config.stages.pretrain.model.lora.rank=2",
             "--config.stages.tokenizer.kind=file"]  # fmt: skip

    def of(where):
        return [
            *flags,
            f"--config.stages.tokenizer.path={where}/tokenizer",
            f"--config.stages.pretrain.init_from={where}",
        ]

    finish(start(tiny, tmp_path / "one", 1, 4, *of(tmp_path / "first")))
    for machines in ("ab", "cd"):
        both = start_apart(tiny, f"file://{tmp_path}/two", [tmp_path / m for m in machines], *of(url))
        said = [finish(process) for process in both]
        assert same_losses(losses(tmp_path / "two"), losses(tmp_path / "one")) and len(losses(tmp_path / "one")) == 7
    assert "pretrain: finished" in said[0]
    stored = json.loads((tmp_path / "two/pretrain/config.json").read_text())
    assert stored["rest"]["from"] == url
    run = lmtrain.load(f"file://{tmp_path}/two/pretrain")
    theirs = lmtrain.load(tmp_path / "one")
    assert run.generate("the", tokens=8, temperature=0) == theirs.generate("the", tokens=8, temperature=0)


@pytest.fixture
def s3(tmp_path, monkeypatch):
    """The address of a bucket of a server on this machine."""
    pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for name, value in {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "DEFAULT_REGION": "us-east-1",
                        "ENDPOINT_URL": f"http://127.0.0.1:{port}"}.items():  # fmt: skip
        monkeypatch.setenv(f"AWS_{name}", value)
    argv = [sys.executable, "-m", "moto.server", "-p", str(port)]
    with (tmp_path / "moto.log").open("w") as out, subprocess.Popen(argv, stdout=out, stderr=out) as server:
        end = time.time() + 60
        while time.time() < end:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.1)
        fs = s3fs.S3FileSystem(skip_instance_cache=True)
        fs.mkdir("bucket")
        yield fs
        server.terminate()


@pytest.mark.slow
def test_the_same_in_s3(tiny, whole, home, s3, tmp_path):
    finish(start(tiny, "s3://bucket/run", 2, 2, "--config.mesh.fsdp=4", "--config.mesh.data=1"))
    for step in (20, 25, 30):
        s3.rm(f"bucket/run/pretrain/checkpoints/{step}", recursive=True)
    s3.rm("bucket/run/summary.json")
    flags = ["--config.mesh.data=2", "--config.mesh.fsdp=2"]
    assert "going on from step 15" in finish(start(tiny, "s3://bucket/run", 4, 1, *flags))
    s3.invalidate_cache()
    s3.get("bucket/run", str(tmp_path / "got"), recursive=True)
    assert same_losses(losses(tmp_path / "got"), losses(whole("1x8")))
    assert not checkpoint.verify(tmp_path / "got/pretrain/checkpoints", STEPS)
    said = finish(start(tiny, "s3://none/run", 2, 1), status=2)
    assert all(f"[{p}] lmtrain: hosts: process " in said for p in (0, 1)) and "s3://none/run: cannot be" in said


@pytest.mark.slow
def test_a_bucket_that_cannot_be_written_is_refused_on_every_host(tiny, home, tmp_path):
    (tmp_path / "file").touch()
    said = finish(start(tiny, f"file://{tmp_path}/file/run", 2, 2), status=2)
    for process in (0, 1):
        assert f"[{process}] lmtrain: hosts: process " in said
    assert f"cannot write to --workdir: file://{tmp_path}/file/run: cannot be written to" in said
    said = finish(start(tiny, "nowhere://b/run", 2, 2), status=2)
    assert "cannot write to --workdir: nowhere://b/run: Protocol not known: nowhere" in said


@pytest.mark.slow
def test_another_address_on_one_host_is_refused_on_all(tiny, tmp_path):
    places = local.environments(2, 2, environment(tiny) | {"HOME": str(tmp_path)}, local.free_ports())
    argv = [sys.executable, "-m", "lmtrain", "run", "--config", str(tiny), "--workdir"]
    both = [
        subprocess.Popen([*argv, f"file://{tmp_path}/{name}"], env=env, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, text=True)
        for env, name in zip(places, ("a", "b"), strict=True)
    ]  # fmt: skip
    for process in both:
        assert f"--workdir is 'file://{tmp_path}/b', but 'file://{tmp_path}/a'" in finish(process, status=2)
    assert not (tmp_path / "a").exists() or not list((tmp_path / "a").rglob("*"))


@pytest.mark.slow
def test_a_first_start_with_wrong_input_leaves_nothing_there(tiny, home, tmp_path):
    url = f"file://{tmp_path}/bucket/run"
    said = finish(start(tiny, url, 2, 2, "--config.stages.pretrain.data.path=nowhere.txt"), status=2)
    assert "no such file, folder or glob: nowhere.txt" in said
    assert {p.name for p in (tmp_path / "bucket/run").rglob("*") if p.is_file()} <= {scattered.OWNER}
    finish(start(tiny, url, 2, 2, "--config.stages.pretrain.steps=2"))
