"""What the compiled update sends between devices: which kinds of collectives, along which axes, and how many bytes."""

import collections
import dataclasses
import functools
import math

import numpy as np
import pytest

from lmtrain import schema
from lmtrain.mesh import AXES
from lmtrain.models import transformer
from lmtrain.objectives import pretrain
from lmtrain.plan import ahead, chips, traffic
from lmtrain.plan.collectives import collectives
from lmtrain.plan.job import Job, memories_of

MODEL = schema.Model(layers=8, width=64, heads=8, mlp=128, vocab_size=128, tied=False, remat="full", unroll=1)
CPU = dataclasses.replace(chips.chips()["cpu"], memory=1e9, hbm=1e10, link=1e10, network=1e10, peak=1e10)


def job(model=MODEL, rows=16, length=32, accumulate=1, **sizes):
    axes = dict.fromkeys(AXES, 1) | sizes
    model = transformer.resolve(model)
    stage = schema.Stage(batch_size=rows, accumulate=accumulate, model=model, loss=pretrain.Pretrain(),
                         data=schema.Data(row_length=length))  # fmt: skip
    return Job("pretrain", stage, model, chips.Topology(CPU, (8,)), axes, memories_of(stage, model))


@functools.cache
def compiled(**sizes):
    model = dataclasses.replace(MODEL, experts=4) if "expert" in sizes else MODEL
    made = job(model, **sizes)
    found, planned = {}, {}
    for c in ahead.compile(made).exchanged:
        found[c.kind, c.axes] = found.get((c.kind, c.axes), 0) + c.bytes
    for e in traffic.exchanges(made):
        planned[e.kind, (e.axis,)] = planned.get((e.kind, (e.axis,)), 0) + e.bytes
    return found, planned


def by_axis(sent, sizes):
    """Bytes by (kind, axis). What runs along several axes at once is split as the inner ones leave it to the outer.
    CPU's compiler scatters by a sum and a slice, twice the bytes: both as sums."""
    out = collections.Counter()
    for (kind, axes), size in sent.items():
        kind, size = ("all-reduce", 2 * size) if kind == "reduce-scatter" else (kind, size)
        size /= 1 - 1 / math.prod(sizes.get(axis, 1) for axis in axes)
        for axis in reversed(axes):
            out[kind, axis] += size * (1 - 1 / sizes[axis])
            size /= sizes[axis]
    return out


def differing(found, planned, sizes, rel):
    """{(kind, axis): (found, planned)} where a plan is further off than `rel`; 2 % of all that is sent are left out."""
    found, planned = by_axis(found, sizes), by_axis(planned, sizes)
    least = 0.02 * sum(planned.values())
    return {key: (found[key], planned[key]) for key in found | planned if max(found[key], planned[key]) > least
            and planned[key] != pytest.approx(found[key], rel=rel)}  # fmt: skip


def axes_of(sent):
    return {axis for _, axes in sent for axis in axes}


MESHES = [{"data": 8}, {"fsdp": 8}, {"context": 8}, {"data": 2, "expert": 4}, {"fsdp": 4, "context": 2},
          {"fsdp": 2, "expert": 4}, {"stage": 8}]  # fmt: skip


@pytest.mark.parametrize("sizes", [pytest.param(s, marks=() if s == {"fsdp": 4, "context": 2} else pytest.mark.slow)
                                   for s in MESHES], ids=str)  # fmt: skip
def test_the_compiled_update_sends_what_is_planned(sizes):
    found, planned = compiled(**sizes)
    assert axes_of(found) == axes_of(planned) == set(sizes)
    assert not differing(found, planned, sizes, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"tensor": 8}, {"data": 2, "fsdp": 2, "tensor": 2},
                                   {"stage": 2, "fsdp": 2, "tensor": 2}], ids=str)  # fmt: skip
def test_with_a_tensor_axis_the_kinds_along_it_differ_and_the_bytes_do_not(sizes):
    """Along tensor XLA turns some gathers of positions into all-to-alls: all bytes, a sum as the scatter it is, are
    within 35 % (planned are .88, .69 and .67 of the program). Along the others every kind is within 15 % (worst:
    .90, microbatches), but for weights gathered along fsdp: with a tensor axis CPU's compiler gathers them again for
    the rematerialised layer (planned .62 and .61)."""
    found, planned = compiled(**sizes)
    assert axes_of(found) == axes_of(planned) == set(sizes)
    off = differing(found, planned, sizes, rel=0.15)
    assert {key for key in off if key[1] != "tensor"} <= {("all-gather", "fsdp")}
    assert {key for key in differing(found, planned, sizes, rel=0.4) if key[1] != "tensor"} == set()

    found, planned = by_axis(found, sizes), by_axis(planned, sizes)
    along = [{kind: size / 2 if kind == "all-reduce" else size for (kind, axis), size in sent.items()
              if axis == "tensor"} for sent in (found, planned)]  # fmt: skip
    assert sum(along[1].values()) == pytest.approx(sum(along[0].values()), rel=0.35)
    most = {kind for kind, size in along[0].items() if size > 0.02 * sum(along[0].values())}
    assert most == {"all-gather", "all-reduce", "all-to-all"}


def test_bytes_along_a_wrong_axis_are_noticed():
    right = {("all-gather", ("fsdp",)): 6.0, ("all-reduce", ("data", "fsdp")): 7.0}
    assert not differing(right, {("all-gather", ("fsdp",)): 6.0, ("all-reduce", ("fsdp",)): 6.0,
                                 ("all-reduce", ("data",)): 1.0}, {"data": 2, "fsdp": 4}, 0.01)  # fmt: skip
    wrong = {("all-gather", ("data",)): 6.0, ("all-reduce", ("data", "fsdp")): 7.0}
    assert set(differing(right, wrong, {"data": 2, "fsdp": 4}, 0.1)) == {("all-gather", "fsdp"), ("all-gather", "data")}


def test_slices_only_exchange_what_a_slice_leaves_to_each_device():
    one, four = (dataclasses.replace(job(data=8, rows=16), topology=chips.Topology(CPU, (8 // n,), n)) for n in (1, 4))
    within, between = ({e.axis: 0.0 for e in traffic.exchanges(j)} for j in (one, four))
    for total, made in ((within, one), (between, four)):
        for e in traffic.exchanges(made):
            total[e.axis] += e.bytes
    assert set(within) == {"data"} and set(between) == {"data", "dcn"}
    assert sum(within.values()) == pytest.approx(sum(between.values()))  # 2 (n - 1) / n of the gradients, either way
    assert between["dcn"] == pytest.approx(2 * 3 / 4 / 2 * within["data"] / (2 * 7 / 8))


LOOP = """
%body.1 (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[], f32[8,4]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %x = f32[8,4] get-tuple-element(%p), index=1
  %sum = f32[8,4] all-reduce(%x), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
  ROOT %out = (s32[], f32[8,4]) tuple(%next, %sum)
}

%condition.1 (p: (s32[], f32[8,4])) -> pred[] {
  %p.1 = (s32[], f32[8,4]) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %ten = s32[] constant(10)
  ROOT %less = pred[] compare(%i.1, %ten), direction=LT
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %x.2 = f32[8,4] parameter(0)
  %begin = (s32[], f32[8,4]) tuple(%zero, %x.2)
  %loop = (s32[], f32[8,4]) while(%begin), condition=%condition.1, body=%body.1
  ROOT %g = f32[64,4] all-gather(%x.2), channel_id=2, replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
}
"""


@pytest.mark.parametrize("groups, axes", [
    ("{{0,2,4,6},{1,3,5,7}}", ("data",)),
    ("[4,2]<=[8]", ("fsdp",)),
    ("[2,4]<=[4,2]T(1,0)", ("data",)),
    ("mesh['a'=4,'b'=2] {'b'}", ("fsdp",)),
    ("mesh['a'=2,'b'=1,'c'=4], device_ids=([4,2]T(1,0)) {'c'}", ("data",)),
    ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a','b'}", ("data", "fsdp")),
])  # fmt: skip
def test_every_way_that_compilers_write_groups_names_their_axes(groups, axes):
    mesh = type("Mesh", (), {"devices": np.arange(8).reshape(4, 2), "axis_names": ("data", "fsdp")})
    line = f"  ROOT %g = f32[64] all-reduce(%x), replica_groups={groups}, use_global_device_ids=true, to_apply=%add"
    (found,) = collectives(f"ENTRY %main (x: f32[64]) -> f32[64] {{\n{line}\n}}\n", mesh)
    assert found.axes == axes


def test_a_loop_counts_as_often_as_it_runs_and_groups_name_their_axes():
    mesh = type("Mesh", (), {"devices": np.arange(8).reshape(4, 2), "axis_names": ("data", "fsdp")})
    reduced, gathered = collectives(LOOP, mesh)
    assert (reduced.kind, reduced.axes, reduced.times) == ("all-reduce", ("data",), 5)  # 10 by twos
    assert reduced.bytes == 5 * 2 * 3 / 4 * 8 * 4 * 4
    assert (gathered.kind, gathered.axes, gathered.bytes) == ("all-gather", ("fsdp",), 64 * 4 * 4 / 2)


def test_a_sum_between_slices_is_read_off_what_goes_to_the_host():
    mesh = type("Mesh", (), {"devices": np.arange(8).reshape(4, 2), "axis_names": ("data", "fsdp")})
    line = ("  %send.1 = (bf16[64,8,128]{2,1,0:T(8,128)(2,1)}, u32[], token[]) send(%x, %after), channel_id=4, "
            'is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2,3,4}x{0:255}",'
            '_xla_megascale_transfer_type="ALL_REDUCE"}')  # fmt: skip
    done = "  %send-done.1 = token[] send-done(%send.1), channel_id=4, is_host_transfer=true"
    (found,) = collectives(f"ENTRY %main (x: f32[64]) -> f32[64] {{\n{line}\n{done}\n}}\n", mesh)
    assert (found.kind, found.axes, found.dtypes) == ("all-reduce", ("dcn",), ("bf16",))
    assert found.bytes == 2 * 3 / 4 * 64 * 8 * 128 * 2


def test_a_table_used_at_both_ends_is_summed_twice_in_float32():
    tied, two = (dataclasses.replace(MODEL, tied=tied, dtype="bfloat16") for tied in (True, False))
    sums = [sum(e.bytes for e in traffic.exchanges(job(model, data=8)) if e.axis == "data") for model in (tied, two)]
    assert sums[0] == sums[1]  # one matrix twice, or two
