"""Checkpoints on the hosts' own disks: to the bit, of this run alone, and the newest sound one of both is used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import lmtrain
from lmtrain import checkpoint, manifest, mesh, nearby, schema, train
from tests.test_checkpoint import build, same
from tests.test_run import experiment, same_metrics, sha, text

__all__ = ["text"]  # a fixture


def arrays():
    here = mesh.make(schema.Mesh(data=2, fsdp=4))
    put = lambda x, *spec: jax.device_put(x, NamedSharding(here, PartitionSpec(*spec)))  # noqa: E731
    return {
        "split": put(jnp.arange(64.0).reshape(8, 8), "fsdp", "data"),
        "rounded": put(jnp.arange(16, dtype=jnp.bfloat16) / 3, "fsdp"),
        "copied": put(jnp.arange(3), None),
        "scalar": put(jnp.float32(7.0)),
    }


def abstract(xs):
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in xs.items()}


def test_what_comes_back_is_what_was_saved_and_each_part_is_written_once(tmp_path):
    near, xs = nearby.Nearby(tmp_path, "a"), arrays()
    near.save(3, xs, {"n": 3})
    assert near.newest(abstract(xs)) == 3
    found, meta = near.restore(3, abstract(xs))
    assert meta == {"n": 3} and found.keys() == xs.keys()
    for name, x in xs.items():
        assert found[name].sharding == x.sharding and found[name].dtype == x.dtype
        assert np.asarray(found[name]).tobytes() == np.asarray(x).tobytes()
    files = manifest.read_manifest(near.folder, 3)["arrays"]
    assert {name: len(parts) for name, parts in files.items()} == {"split": 8, "rounded": 4, "copied": 1, "scalar": 1}
    near.close()


def test_another_runs_another_meshs_and_damaged_ones_are_not_used(tmp_path):
    near, xs = nearby.Nearby(tmp_path, "a"), arrays()
    for step in (1, 2, 3):
        near.save(step, xs, {})
    near.wait()
    assert manifest.steps(near.folder) == [2, 3]  # two are kept
    assert nearby.Nearby(tmp_path, "b").newest(abstract(xs)) == -1
    other = abstract(xs)
    other["split"] = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=xs["scalar"].sharding)
    assert near.newest(other) == -1
    file = near.folder / "3/0.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    assert near.newest(abstract(xs)) == 2
    near.close()


def test_after_going_back_new_saves_are_kept_and_not_the_ones_before(tmp_path):
    near, xs = nearby.Nearby(tmp_path, "a"), arrays()
    for step in (85, 90):
        near.save(step, xs, {})
    near.forget(above=50)
    for step in (55, 60, 65):
        near.save(step, xs, {})
    near.wait()
    assert manifest.steps(near.folder) == [60, 65]
    near.close()


def test_a_disk_that_refuses_costs_a_message(tmp_path, capsys):
    (tmp_path / "0-of-1").write_text("no folder")
    near, xs = nearby.Nearby(tmp_path, "a"), arrays()
    near.save(1, xs, {})
    near.close()
    assert "no checkpoint near this host" in capsys.readouterr().out


@pytest.mark.parametrize("near_at, used", [(3, 2), (1, 2), (5, 5)], ids=["damaged", "older", "newer"])
def test_the_newest_sound_one_of_both_is_restored(tmp_path, near_at, used):
    state, shapes, _ = build(8, fsdp=4)

    def open_both():
        return checkpoint.Checkpoints(tmp_path / "far", nearby=nearby.Nearby(tmp_path / "near", "a"))

    checkpoints = open_both()
    far = state.replace(step=jnp.int32(2))
    close = state.replace(step=jnp.int32(near_at))
    checkpoints.save_nearby(near_at, close, {"n": near_at})
    checkpoints.save(2, far, {"n": 2})
    checkpoints.close()
    if near_at == 3:
        (tmp_path / "near/0-of-1/3/1.npy").unlink()
    found, meta, at = open_both().restore_newest(shapes)
    assert at == used and meta == {"n": used}
    assert same(found, close if used == near_at else far)


@pytest.mark.parametrize(
    "error, at, near",
    [pytest.param(KeyboardInterrupt, 22, 20, id="killed"),
     pytest.param(RuntimeError, 7, 5, id="failed-before-the-first", marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_run_that_lost_more_than_its_own_disk_goes_on_from_there_to_the_bit(
    text, tmp_path, monkeypatch, capsys, error, at, near
):
    whole = lmtrain.run(experiment(text), tmp_path / "whole")
    e = experiment(text, checkpoint_every=8, local_every=5)
    e.local = str(tmp_path / "near")
    show = train.log.Progress.show

    def killed(self, step, metrics):
        if step == at:
            raise error
        show(self, step, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(train.log.Progress, "show", killed)
        with pytest.raises(error):
            lmtrain.run(e, tmp_path / "run")
    lmtrain.run(e, tmp_path / "run")
    said = capsys.readouterr().out
    assert f"the hosts' own disks have step {near}" in said and f"going on from step {near}" in said
    assert sha(tmp_path / "run") == sha(tmp_path / "whole")
    assert same_metrics(lmtrain.load(tmp_path / "run").metrics, whole.metrics)


def test_a_folder_without_an_interval_or_the_other_way_round_is_refused(text, tmp_path):
    e = experiment(text)
    e.local = str(tmp_path / "near")
    for wrong in (e, experiment(text, local_every=5)):
        with pytest.raises(schema.ConfigError, match="local_every .* go together"):
            lmtrain.run(wrong, tmp_path / "run")
