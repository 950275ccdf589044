"""The mesh and its table: what is split where, and what is refused by name."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from lmtrain import mesh, schema
from lmtrain.schema import ConfigError


def make(devices=8, **axes):
    return mesh.make(schema.Mesh(**axes), jax.devices()[:devices])


# ---------------------------------------------------------------------------------------------------------------- make
@pytest.mark.parametrize(
    "axes, sizes",
    [
        ({}, (1, 8, 1, 1, 1, 1)),
        ({"fsdp": 2, "tensor": 2, "context": 2}, (1, 1, 2, 2, 2, 1)),
        ({"data": 2, "fsdp": -1}, (1, 2, 4, 1, 1, 1)),
        ({"expert": 4}, (1, 2, 1, 1, 1, 4)),
        ({"dcn_data": 2, "tensor": 2}, (1, 4, 1, 2, 1, 1)),
    ],
)
def test_sizes_and_auto_axes(axes, sizes):
    m = make(**axes)
    assert m.axis_names == mesh.AXES and m.devices.shape == sizes
    assert all(t == AxisType.Auto for t in m.axis_types)
    assert len({d.id for d in m.devices.flat}) == 8


@pytest.mark.parametrize(
    "axes, message",
    [
        ({"fsdp": 3}, r"fsdp=3 asks for a multiple of 3 devices, but 8 are here.*1, 2, 4, 8"),
        ({"data": 1, "fsdp": 4}, r"fsdp=4 asks for 4 devices, but 8 are here"),
        ({"data": 16}, r"data=16 asks for 16 devices, but 8 are here"),
        ({"data": -1, "fsdp": -1}, r"mesh.data and mesh.fsdp are -1"),
        ({"tensor": 0}, r"mesh.tensor is 0"),
        ({"tensor": -2}, r"mesh.tensor is -2"),
        ({"dcn_data": 3}, r"mesh.data is 8, which mesh.dcn_data=3 does not divide"),
    ],
)
def test_impossible_sizes_are_refused_with_both_numbers(axes, message):
    with pytest.raises(ConfigError, match=message):
        make(**axes)


def test_the_data_axis_spans_slices_and_no_other_axis_does():
    # Four devices in each of two slices, as TPUs of two slices present themselves.
    def device(i):
        return types.SimpleNamespace(id=i, process_index=i // 4, slice_index=i // 4, device_kind="cpu", platform="cpu")

    seen = {}

    def keep(array):
        seen["slices"] = np.vectorize(lambda d: d.slice_index)(array)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh, "_auto", keep)
        mesh.make(schema.Mesh(data=2, fsdp=2, tensor=2), [device(i) for i in range(8)])
        with pytest.raises(ConfigError, match="the devices form 2 slices"):
            mesh.make(schema.Mesh(data=4, fsdp=2, dcn_data=4), [device(i) for i in range(8)])
    assert (seen["slices"][:, 0] == 0).all() and (seen["slices"][:, 1] == 1).all()


# ---------------------------------------------------------------------------------------------------------------- spec
def test_spec_follows_the_table_and_leaves_out_axes_of_size_one():
    m = make(fsdp=2, tensor=2)
    assert mesh.spec(("layers", "embed", "heads", "head_dim"), m) == PartitionSpec(None, "fsdp", "tensor", None)
    assert mesh.spec(("batch", "length", None), m) == PartitionSpec(("data", "fsdp"), None, None)
    assert mesh.spec(("experts", "embed", "mlp"), m) == PartitionSpec(None, "fsdp", "tensor")
    assert mesh.spec((), m) == PartitionSpec()


def test_a_mesh_axis_splits_one_dimension_only():
    m = make(fsdp=2, expert=4)
    assert mesh.spec(("batch", "act_experts"), m) == PartitionSpec(("fsdp", "expert"), None)
    assert mesh.spec(("embed", "embed"), m) == PartitionSpec("fsdp", None)


def test_a_misspelt_axis_is_named():
    with pytest.raises(ValueError, match=r"'embd' is not a logical axis. Did you mean embed\?"):
        mesh.spec(("embd",), make())


@pytest.mark.parametrize("n", [1, 2, 7, 12, 36, 97])
def test_divisors_are_all_named_in_order(n):
    assert mesh.divisors(n) == ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)


def test_every_rule_names_axes_of_the_mesh():
    assert {axis for split in mesh.RULES.values() for axis in split} <= set(mesh.AXES)


def test_constrain_splits_and_does_not_change():
    m = make(fsdp=2, tensor=4)
    x = jnp.arange(32.0).reshape(4, 8)
    y = jax.jit(lambda x: mesh.constrain(x, ("batch", "act_mlp"), m))(x)
    assert y.sharding.spec == PartitionSpec("fsdp", "tensor") and (y == x).all()
    assert mesh.constrain(x, ("batch", None), None) is x
    with pytest.raises(ValueError, match="needs 2 logical axes"):
        mesh.constrain(x, ("batch",), m)


def test_shapes_that_do_not_divide_are_named():
    axes = {"block": {"q": ("layers", "embed", "heads")}}
    shapes = {"block": {"q": jax.ShapeDtypeStruct((3, 64, 6), "float32")}}
    mesh.check_shapes(shapes, axes, make(tensor=2))
    with pytest.raises(ConfigError, match=r"mesh.tensor is 4, .*'heads' = 6 of parameter block/q .*one of 1, 2\."):
        mesh.check_shapes(shapes, axes, make(tensor=4))


# --------------------------------------------------------------------------------------------------------------- batch
def test_put_splits_rows_and_positions():
    m = make(fsdp=2, context=2, expert=2)
    batch = {"tokens_BT": np.arange(64).reshape(8, 8), "reward_B": np.arange(8.0), "beta": np.float32(1)}
    out = mesh.put({k: v for k, v in batch.items() if k != "beta"}, m)
    assert out["tokens_BT"].sharding.spec == PartitionSpec(("fsdp", "expert"), "context")
    assert out["reward_B"].sharding.spec == PartitionSpec(("fsdp", "expert"))
    assert (np.asarray(out["tokens_BT"]) == batch["tokens_BT"]).all()
    assert out["tokens_BT"].addressable_shards[0].data.shape == (2, 4)
    with pytest.raises(ValueError, match="'beta'.* should end in _"):
        mesh.put(batch, m)


@pytest.mark.parametrize(
    "shape, message",
    [
        ((6, 8), r"batch_size: the rows of tokens_BT are 6, not a multiple of 4 \(mesh.data=2 \* mesh.fsdp=2\)"),
        ((8, 7), r"data.row_length: the positions of tokens_BT are 7, not a multiple of 2 \(mesh.context=2\)"),
    ],
)
def test_put_refuses_what_does_not_divide(shape, message):
    with pytest.raises(ConfigError, match=message):
        mesh.put({"tokens_BT": np.zeros(shape)}, make(fsdp=2, context=2))


class Pretend:
    """A mesh whose 8 devices belong to so many processes, in order."""

    def __init__(self, processes, **axes):
        self.shape = mesh.resolve(schema.Mesh(**axes), 8)
        devices = [types.SimpleNamespace(process_index=i * processes // 8) for i in range(8)]
        self.devices = np.array(devices).reshape(tuple(self.shape.values()))


@pytest.mark.parametrize(
    "processes, axes, expected",
    [
        (2, {"fsdp": 2}, [(0, 2), (1, 2)]),
        (4, {"data": 2, "tensor": 2, "context": 2}, [(0, 2), (0, 2), (1, 2), (1, 2)]),  # two hold the same rows
        (2, {"tensor": 8}, [(0, 1), (0, 1)]),  # one model over both: both feed every row
        (2, {"data": 2, "tensor": 2, "expert": 2}, [(0, 2), (1, 2)]),
    ],
)
def test_processes_feed_equal_shares_and_those_that_hold_the_same_rows_the_same(processes, axes, expected):
    m = Pretend(processes, **axes)
    assert [mesh.share(m, p) for p in range(processes)] == expected


def test_overlapping_shares_are_refused():
    m = Pretend(1, tensor=2, expert=2)
    for device, process in zip(m.devices.flat, (0, 0, 0, 1, 1, 1, 1, 1), strict=True):
        device.process_index = process
    with pytest.raises(ConfigError, match="unequal or overlapping"):
        mesh.share(m, 0)


def test_one_process_feeds_all():
    assert mesh.share(make(fsdp=4)) == (0, 1)
