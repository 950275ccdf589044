"""Checkpoints: what comes back is what was saved, to the bit; what was damaged or half written is never used."""

import json
import os
import pathlib
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmtrain import checkpoint, manifest, mesh, optim, schema, step
from lmtrain.types import LmtrainError, StorageError

AXES = {"block": {"w": ("layers", "embed", "mlp")}, "norm": ("norm",)}


def init(key, layers=2):
    return {"block": {"w": jax.random.normal(key, (layers, 64, 32))}, "norm": jnp.ones(64)}


def loss(forward, params, batch, cfg):
    x_BT = batch["x_BT"]
    y = jnp.einsum("bt,ltf->bf", x_BT * params["norm"], params["block"]["w"])
    return (y**2).sum(), jnp.float32(x_BT.shape[0]), {}


def build(devices=8, layers=2, name="adamw", **axes):
    """(state, abstract, update) on a mesh of so many devices."""
    here = mesh.make(schema.Mesh(**axes), jax.devices()[:devices])
    tx, schedule = optim.make(schema.Optim(name=name), 100, AXES)
    start, abstract = step.make_init(lambda key: init(key, layers), tx, AXES, here)
    update = step.make_update(loss, None, tx, schedule, abstract, here)
    batch = mesh.put({"x_BT": np.ones((8, 64), np.float32)}, here)
    return start(jax.random.key(7)), abstract, lambda state: update(state, batch)[0]


def numbers(state):
    """The state as plain arrays that nothing can donate away."""
    return [np.array(x) for x in jax.tree.leaves(state.replace(key=jax.random.key_data(state.key)))]


def same(a, b):
    return all(x.tobytes() == y.tobytes() for x, y in zip(numbers(a), numbers(b), strict=True))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run" / "checkpoints"


def saved(folder, *steps, **settings):
    """Fills a folder with a checkpoint for each step, its number in `norm`; returns the abstract state to restore."""
    state, abstract, _ = build(1)
    checkpoints = checkpoint.Checkpoints(folder, **{"keep_last": 9, **settings})
    for n in steps:
        state = state.replace(step=jnp.int32(n), params=state.params | {"norm": jnp.full(64, float(n))})
        checkpoints.save(n, state, {"n": n})
    checkpoints.close()
    return abstract


def restore(folder, abstract):
    checkpoints = checkpoint.Checkpoints(folder)
    try:
        return checkpoints.restore_newest(abstract)
    finally:
        checkpoints.close()


# --------------------------------------------------------------------------------------------------------------- whole
def test_nothing_saved_restores_as_none(folder):
    assert restore(folder, build(1)[1]) is None


def test_the_state_comes_back_to_the_bit_though_training_went_on_while_it_was_written(folder):
    state, abstract, update = build(8, fsdp=2, tensor=2)
    checkpoints = checkpoint.Checkpoints(folder, keep_last=9)
    kept = {}
    for n in range(1, 4):
        state = update(state)
        kept[n] = numbers(state)
        checkpoints.save(n, state, {"rows": n * 8, "nested": {"list": [1, 2.5, None]}})
        for _ in range(5):  # donates the very buffers that are being saved
            state = update(state)
    checkpoints.wait()
    for n in (3, 2, 1):
        found, meta, at = checkpoints.restore_newest(abstract)
        assert at == n and meta == {"rows": n * 8, "nested": {"list": [1, 2.5, None]}}
        assert all(a.tobytes() == b.tobytes() for a, b in zip(numbers(found), kept[n], strict=True))
        assert jax.tree.structure(found) == jax.tree.structure(abstract)
        shutil.rmtree(folder / str(n))
    checkpoints.close()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_going_on_from_a_checkpoint_is_never_having_stopped(folder, name):
    state, abstract, update = build(8, name=name, fsdp=2)
    state = update(update(state))
    checkpoints = checkpoint.Checkpoints(folder)
    checkpoints.save(2, state, {})
    checkpoints.wait()
    state = update(update(state))
    again, _, _ = checkpoints.restore_newest(abstract)
    checkpoints.close()
    assert same(update(update(again)), state)


def test_restores_onto_another_mesh(folder):
    state, _, _ = build(8, fsdp=4, tensor=2)
    checkpoints = checkpoint.Checkpoints(folder)
    checkpoints.save(1, state, {})
    checkpoints.close()
    for devices, axes in [(1, {}), (8, {"data": 2, "tensor": 4}), (2, {"fsdp": 2})]:
        _, abstract, update = build(devices, **axes)
        found, _, _ = restore(folder, abstract)
        assert same(found, state)
        assert found.params["block"]["w"].sharding == abstract.params["block"]["w"].sharding
        update(found)


def test_saving_the_step_just_restored_or_saved_does_nothing(folder):
    state, abstract, _ = build(1)
    checkpoints = checkpoint.Checkpoints(folder)
    checkpoints.save(5, state, {"first": True})
    checkpoints.save(5, state, {"first": False})
    checkpoints.close()
    assert checkpoint.read_meta(folder, 5) == {"first": True}


# ---------------------------------------------------------------------------------------------------------------- keep
def test_keeps_the_last_and_the_best(folder):
    state, _, _ = build(1)
    checkpoints = checkpoint.Checkpoints(folder, keep_last=2, keep_best=1)
    for n, score in [(1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, float("nan")), (6, 4.0)]:
        checkpoints.save(n, state, {}, {} if score is None else {"heldout_loss": score})
    checkpoints.close()
    assert checkpoint.steps(folder) == [2, 5, 6]
    assert sorted(p.name for p in folder.iterdir()) == ["2", "5", "6"]


def test_nothing_older_is_deleted_before_the_new_manifest_stands(folder, monkeypatch):
    saved(folder, 1, keep_last=1)
    there = []
    real = checkpoint.write_manifest
    monkeypatch.setattr(checkpoint, "write_manifest", lambda *a: (there.append(checkpoint.steps(folder)), real(*a)))
    saved(folder, 2, keep_last=1)
    assert there == [[1]] and checkpoint.steps(folder) == [2]


# -------------------------------------------------------------------------------------------------------------- damage
def test_one_byte_changed_in_any_file_is_found_and_named(folder):
    saved(folder, 200)
    files = [p for p in (folder / "200").rglob("*") if p.is_file() and p.stat().st_size]
    assert len(files) > 8
    for file in files:
        sound = file.read_bytes()
        at = random.Random(file.name).randrange(len(sound))
        file.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
        (problem,) = checkpoint.verify(folder, 200)
        assert problem.startswith(f"checkpoints/{file.relative_to(folder)}: ") and "sha256 differs" in problem
        file.write_bytes(sound)
    assert checkpoint.verify(folder, 200) == []


def damage_flip(step):
    file = max((p for p in (step / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    return file, "sha256 differs"


def damage_cut(step):
    file = max((p for p in (step / "rest").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    os.truncate(file, file.stat().st_size - 1)
    return file, "bytes, not"


def damage_missing(step):
    file = max((p for p in (step / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    file.unlink()
    return file, "missing"


def damage_manifest(step):
    file = step / "manifest.json"
    file.write_text(file.read_text()[:-20])
    return file, "not what was written"


@pytest.mark.parametrize("damage", [damage_flip, damage_cut, damage_missing, damage_manifest])
def test_a_damaged_checkpoint_is_named_moved_aside_and_the_one_before_used(folder, capsys, damage):
    abstract = saved(folder, 100, 200)
    file, what = damage(folder / "200")
    with pytest.raises(LmtrainError, match=f"{file.name}: .*{what}"):
        checkpoint.load_params(folder, 200)
    state, meta, at = restore(folder, abstract)
    assert at == 100 and meta == {"n": 100} and float(state.params["norm"][0]) == 100
    said = capsys.readouterr().out
    assert f"checkpoints/{file.relative_to(folder)}: " in said and what in said
    assert sorted(p.name for p in folder.iterdir()) == ["100", "damaged-200"]


def test_where_all_are_damaged_the_run_does_not_begin_anew_by_itself(folder):
    abstract = saved(folder, 100)
    damage_flip(folder / "100")
    for _ in range(2):
        with pytest.raises(LmtrainError, match="every checkpoint is damaged"):
            restore(folder, abstract)


def test_other_arrays_than_the_model_has_are_refused_by_name(folder):
    saved(folder, 3)
    with pytest.raises(LmtrainError, match=r"params/block/w is float32 \(2, 64, 32\) there, float32 \(5, 64, 32\)"):
        restore(folder, build(1, layers=5)[1])
    with pytest.raises(LmtrainError, match="opt/.*set optim as in"):
        restore(folder, build(1, name="lion")[1])
    assert checkpoint.steps(folder) == [3]


# ---------------------------------------------------------------------------------------------------------------- kill
@pytest.mark.parametrize("where", ["orbax", "manifest", "rename", "delete"])
def test_a_process_that_dies_at_any_point_of_a_save_leaves_a_checkpoint(folder, monkeypatch, where):
    abstract = saved(folder, 100)
    with monkeypatch.context() as patch:

        def die(*_, **__):
            raise KeyboardInterrupt("killed")

        if where == "orbax":
            (folder / "200" / "params" / "d").mkdir(parents=True)  # what a save in place leaves
            (folder / "200.orbax-checkpoint-tmp-1").mkdir()  # and one that renames at its end
        else:
            target = {"manifest": (manifest, "_sha256"), "rename": (os, "replace"), "delete": (shutil, "rmtree")}
            patch.setattr(*target[where], die)
            with pytest.raises(BaseException, match="killed"):
                saved(folder, 200, keep_last=1)
    found, meta, at = restore(folder, abstract)
    assert at == (200 if where == "delete" else 100) and meta == {"n": at}
    assert [p.name for p in folder.iterdir()] == [str(at)]


def test_a_save_without_its_manifest_is_removed_and_said_so(folder, capsys):
    abstract = saved(folder, 100, 200)
    (folder / "200" / "manifest.json").unlink()  # killed after Orbax, before the manifest
    (folder / "300.orbax-checkpoint-tmp-1").mkdir()
    (folder / "deleting-50").mkdir()  # was to go anyway
    assert restore(folder, abstract)[2] == 100 and [p.name for p in folder.iterdir()] == ["100"]
    out = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1] for line in out] == [f"an unfinished save of step {n} was removed." for n in (200, 300)]
    restore(folder, abstract)
    assert capsys.readouterr().out == ""


CHILD = """
    import sys, jax, jax.numpy as jnp
    sys.path.insert(0, {tests!r})
    import test_checkpoint as t
    from lmtrain import checkpoint
    state, abstract, _ = t.build(1)
    checkpoints = checkpoint.Checkpoints({folder!r}, keep_last=1, keep_best=0)
    found = checkpoints.restore_newest(abstract)
    n = found[2] if found else 0
    while True:
        n += 1
        state = state.replace(step=jnp.int32(n), params=state.params | {{"norm": jnp.full(64, float(n))}})
        checkpoints.save(n, state, {{"n": n}})
        print(n, flush=True)
"""


def assert_kills_at_random_lose_nothing(folder, times):
    child = textwrap.dedent(CHILD).format(tests=str(pathlib.Path(__file__).parent), folder=str(folder))
    before, abstract, rng = 0, build(1)[1], random.Random(0)
    for _ in range(times):
        process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, text=True)
        for _ in range(3):
            begun = int(process.stdout.readline())
        time.sleep(rng.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        process.wait()
        state, meta, at = restore(folder, abstract)
        assert at >= max(before, begun - 1) and meta == {"n": at}
        assert int(state.step) == at and (np.asarray(state.params["norm"]) == at).all()
        before = at


def test_killed_while_it_saves_without_pause(folder):
    assert_kills_at_random_lose_nothing(folder, 2)


@pytest.mark.slow
def test_killed_while_it_saves_without_pause_many_times(folder):
    assert_kills_at_random_lose_nothing(folder, 15)


# ------------------------------------------------------------------------------------------------------ many processes
HOST = """
    import sys
    index, count, port, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    import jax
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8 // count)
    if count > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", count, index)
    import numpy as np
    sys.path.insert(0, TESTS)
    import test_step as t
    from lmtrain import checkpoint, mesh
    m, start, abstract, update = t.build(accumulate=2, fsdp=2, tensor=2)
    checkpoints = checkpoint.Checkpoints(folder, keep_last=1, keep_best=0)
    found = checkpoints.restore_newest(abstract)
    state, at = (found[0], found[2]) if found else (start(jax.random.key(0)), 0)
    part, parts = mesh.share(m)
    for n in range(at, at + 2):
        whole = t.batch(seed=n)
        rows = len(whole["weights_B"]) // parts
        mine = {k: v[part * rows : (part + 1) * rows] for k, v in whole.items()}
        state, metrics = update(state, mesh.put(mine, m))
        checkpoints.save(n + 1, state, {"n": n + 1})
    checkpoints.close()
    print(part, parts, checkpoint.params_sha256(state.params), flush=True)
    mesh.barrier("end")
"""


def hosts(folder, count):
    """Two steps by so many processes, 8 devices in all; what each of them prints at its end."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    code = textwrap.dedent(HOST).replace("TESTS", repr(str(pathlib.Path(__file__).parent)))
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(i), str(count), str(port), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for i in range(count)
    ]
    done = [p.communicate(timeout=240) for p in running]
    assert all(p.returncode == 0 for p in running), "\n".join(error for _, error in done)
    return [out.splitlines()[-1].split() for out, _ in done]


@pytest.mark.slow
def test_processes_train_save_and_restore_as_one_would(folder, tmp_path):
    alone = [hosts(tmp_path / "alone", 1), hosts(tmp_path / "alone", 1)][-1][0][2]
    for count in (2, 4):  # saved by 2, restored by 4
        ends = hosts(folder, count)
        assert [e[:2] for e in ends] == [[str(i), str(count)] for i in range(count)]
    assert len({e[2] for e in ends}) == 1 and checkpoint.steps(folder) == [4]
    ours, theirs = checkpoint.load_params(folder), checkpoint.load_params(tmp_path / "alone")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), ours, theirs)
    assert checkpoint.params_sha256(ours) == ends[0][2] and checkpoint.params_sha256(theirs) == alone


# -------------------------------------------------------------------------------------------------------------- errors
def test_a_disk_that_refuses_the_data_is_one_message_and_the_old_checkpoint_stays(folder):
    abstract = saved(folder, 100)
    state, _, _ = build(1)
    checkpoints = checkpoint.Checkpoints(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # no file beyond 4 KiB
        with pytest.raises(LmtrainError) as caught:
            checkpoints.save(200, state, {})
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = str(caught.value)
    assert "checkpoints/200: the checkpoint could not be saved" in message and "that of step 100 is kept" in message
    assert "\n" not in message and "too large" in message.lower()
    assert [p.name for p in folder.iterdir()] == ["100"]
    checkpoints.save(300, state, {})  # there is room again
    checkpoints.close()
    assert restore(folder, abstract)[2] == 300


def test_an_error_in_the_background_surfaces_at_the_next_save(folder, monkeypatch):
    state, _, _ = build(1)
    checkpoints = checkpoint.Checkpoints(folder)
    with monkeypatch.context() as patch:

        def full(*_):
            raise OSError(28, "No space left on device")

        patch.setattr(checkpoint, "write_manifest", full)
        checkpoints.save(1, state, {})
        with pytest.raises(LmtrainError, match="no space left on the disk .*; there is none from before"):
            checkpoints.save(2, state, {})
    assert list(folder.iterdir()) == []
    checkpoints.close()


def flaky(monkeypatch, times):
    """The disk is full for so many manifests."""
    write, left = checkpoint.write_manifest, [times]

    def write_or_not(*args):
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(28, "No space left on device")
        write(*args)

    monkeypatch.setattr(checkpoint, "write_manifest", write_or_not)


def test_a_save_that_failed_is_done_again_while_training_goes_on(folder, monkeypatch, capsys):
    abstract = saved(folder, 100)
    flaky(monkeypatch, 1)
    state, _, _ = build(1)
    checkpoints = checkpoint.Checkpoints(folder, pauses=(0.3,))
    checkpoints.save(200, state, {"n": 200})
    while not checkpoints.again():
        assert checkpoint.steps(folder) == [100]  # the last good one stays
        time.sleep(0.01)
    said = capsys.readouterr().out
    assert (
        "no space left on the disk" in said and "that of step 100 is kept" in said and "Again in 0.3 s (1 of 1)" in said
    )
    checkpoints.save(203, state, {"n": 203})
    checkpoints.close()
    assert not checkpoints.again()
    assert restore(folder, abstract)[2] == 203


def test_the_last_save_is_tried_until_it_stands(folder, monkeypatch):
    flaky(monkeypatch, 3)
    checkpoints = checkpoint.Checkpoints(folder, pauses=(0.01,) * 3)
    checkpoints.save(1, build(1)[0], {}, last=True)
    assert checkpoint.steps(folder) == [1]
    checkpoints.close()


def test_a_disk_that_stays_full_ends_in_one_message_and_keeps_what_there_is(folder, monkeypatch):
    saved(folder, 100)
    flaky(monkeypatch, 99)
    checkpoints = checkpoint.Checkpoints(folder, pauses=(0.01,) * 3)
    with pytest.raises(StorageError, match="checkpoints/200: .*that of step 100 is kept"):
        checkpoints.save(200, build(1)[0], {}, last=True)
    assert checkpoint.steps(folder) == [100]


def test_meta_that_json_cannot_hold_is_refused_at_once(folder):
    checkpoints = checkpoint.Checkpoints(folder)
    with pytest.raises(TypeError):
        checkpoints.save(1, build(1)[0], {"rng": object()})
    checkpoints.close()
    assert checkpoint.steps(folder) == []


# ------------------------------------------------------------------------------------------------------------- reading
def test_parameters_are_read_without_a_model(folder):
    state, abstract, _ = build(8, fsdp=4)
    checkpoints = checkpoint.Checkpoints(folder)
    checkpoints.save(4, state, {})
    checkpoints.close()
    params = checkpoint.load_params(folder)
    assert isinstance(params["block"]["w"], np.ndarray) and set(params) == {"block", "norm"}
    assert checkpoint.params_sha256(params) == checkpoint.params_sha256(state.params)
    shardings = jax.tree.map(lambda s: s.sharding, abstract.params)
    split = checkpoint.load_params(folder, 4, shardings)
    assert split["block"]["w"].sharding == shardings["block"]["w"]
    assert checkpoint.params_sha256(split) == checkpoint.params_sha256(params)
    with pytest.raises(LmtrainError, match="only: norm"):
        checkpoint.load_params(folder, 4, {"block": shardings["block"]})


def test_reading_passes_over_a_damaged_checkpoint_and_leaves_it_where_it_is(folder, capsys):
    saved(folder, 1, 2, 3)
    assert checkpoint.newest_sound(folder) == 3 and capsys.readouterr().out == ""
    names = [damage_flip(folder / "3")[0].name, damage_cut(folder / "2")[0].name]
    assert checkpoint.newest_sound(folder) == 1
    out = capsys.readouterr().out
    assert all(name in out for name in names) and "the checkpoint of step 1 is used" in out
    assert (checkpoint.load_params(folder)["norm"] == 1).all()
    with pytest.raises(LmtrainError, match=names[0]):
        checkpoint.load_params(folder, 3)
    damage_manifest(folder / "1")
    with pytest.raises(LmtrainError, match="every checkpoint is damaged") as caught:
        checkpoint.load_params(folder)
    assert all(name in str(caught.value) for name in [*names, "checkpoints/1/manifest.json"])
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2", "3"]


def test_sha256_tells_apart_a_bit_a_name_a_dtype_and_a_shape():
    base = {"a": {"w": np.zeros((2, 3), np.float32)}}
    bit = {"a": {"w": np.zeros((2, 3), np.float32)}}
    bit["a"]["w"].view(np.int32)[1, 1] = 1
    others = [bit, {"b": base["a"]}]
    for x in np.zeros((2, 3), np.int32), np.zeros((3, 2), np.float32), jnp.zeros((2, 3), jnp.bfloat16):
        others.append({"a": {"w": x}})
    assert len({checkpoint.params_sha256(p) for p in [base, *others]}) == 6


def test_hashing_reads_in_pieces(tmp_path):
    file = tmp_path / "large"
    with file.open("wb") as f:
        f.truncate(64 << 20)
    tracemalloc.start()
    size, _ = manifest._sha256(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size == 64 << 20 and peak < 2 << 20


def test_a_folder_without_checkpoints_is_an_error_that_says_so(tmp_path):
    assert checkpoint.steps(tmp_path) == []
    with pytest.raises(LmtrainError, match="no finished checkpoint"):
        checkpoint.load_params(tmp_path)


def test_manifest_is_plain_json(folder):
    saved(folder, 1)
    written = json.loads((folder / "1" / "manifest.json").read_text())
    assert written["arrays"]["params/norm"] == ["float32", [64]] and written["meta"] == {"n": 1}
