"""The plan against TPU's own compiler: the table of docs/plan.md, row by row. Needs libtpu, and minutes for each row.

pytest -m slow -s tests/plan/test_compiled.py        # prints the rows
"""

import importlib.util
import pathlib

import pytest

from lmtrain.plan import ahead, chips, describe, job, memory
from lmtrain.plan.show import mesh as said

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason='needs libtpu: pip install "lmtrain[tpu]"'),
]
CONFIG = pathlib.Path(__file__).parents[2] / "experiments/pretrain.py"
GIB = 2**30

#: model, topology, slices, mesh, rows of a batch, their length, whether it fits, what else differs
ROWS = [
    ("117m", "v5e:2x4", 1, {"data": 8}, 64, 1024, True, ()),
    ("117m", "v5e:2x4", 1, {"data": 8}, 128, 2048, True, ("model.remat=dots", "accumulate=4")),
    ("117m", "v5e:2x4", 1, {"data": 8}, 128, 1024, True, ("model.remat=none", "optim.name=adamw")),
    ("117m", "v5e:2x4", 1, {"fsdp": 8}, 64, 1024, True, ("model.remat=full", "optim.name=adamw")),
    ("117m", "v6e:2x4", 1, {"data": 8}, 32, 1024, True, ("model.remat=full", "optim.name=adamw", "accumulate=4")),
    ("1b", "v5e:2x4", 1, {"fsdp": 8}, 8, 2048, True, ("model.remat=none", "optim.name=adamw")),
    ("1b", "v5e:2x4", 1, {"fsdp": 8}, 32, 2048, False, ("model.remat=none", "optim.name=adamw")),
    ("1b", "v5e:2x4", 1, {"data": 8}, 8, 2048, False, ("model.remat=full", "optim.name=adamw")),
    ("1b", "v5e:4x4", 1, {"fsdp": 16}, 64, 2048, True, ("model.remat=dots", "accumulate=4")),
    ("1b", "v5e:4x4", 1, {"data": 2, "fsdp": 4, "tensor": 2}, 32, 2048, True, ("model.remat=full", "optim.name=adamw")),
    ("1b", "v6e:2x4", 1, {"fsdp": 8}, 64, 2048, True, ()),
    ("8b", "v5e:4x4", 1, {"fsdp": 16}, 16, 4096, True, ()),
    ("8b", "v5e:4x4", 1, {"fsdp": 16}, 32, 4096, True, ()),
    ("8b", "v5e:4x4", 1, {"fsdp": 16}, 64, 4096, True, ("optim.name=adamw", "accumulate=4")),
    ("8b", "v5e:4x4", 1, {"fsdp": 16}, 16, 4096, False, ("model.remat=dots", "optim.name=adamw")),
    ("8b", "v5p:2x2x2", 1, {"fsdp": 8}, 16, 4096, True, ("optim.name=adamw",)),
    ("8b", "v5p:4x4x4", 1, {"fsdp": 64}, 64, 8192, True, ()),
    ("8b", "v5p:4x4x4", 1, {"fsdp": 64}, 64, 4096, True, ("model.remat=dots", "optim.name=adamw")),
    ("8b", "v5p:4x4x4", 1, {"fsdp": 16, "context": 4}, 16, 32768, True, ()),
    ("8b", "v6e:4x4", 1, {"fsdp": 8, "tensor": 2}, 16, 4096, True, ("model.remat=dots",)),
    ("8b", "v6e:8x8", 1, {"fsdp": 16, "tensor": 4}, 64, 8192, True, ()),
    ("70b", "v5e:8x8", 1, {"fsdp": 64}, 64, 4096, False, ()),
    ("70b", "v5e:16x16", 1, {"fsdp": 256}, 256, 2048, True, ("optim.name=adamw",)),
    ("70b", "v6e:4x8", 1, {"fsdp": 32}, 32, 2048, False, ()),
    ("70b", "v6e:8x8", 1, {"fsdp": 16, "tensor": 4}, 32, 4096, True, ("optim.name=adamw", "accumulate=2")),
    ("70b", "v5p:8x8x8", 1, {"fsdp": 512}, 512, 8192, True, ()),
    ("mixtral-8x7b", "v5e:8x8", 1, {"fsdp": 8, "expert": 8}, 64, 4096, False, ()),
    ("mixtral-8x7b", "v6e:4x8", 1, {"fsdp": 4, "expert": 8}, 32, 2048, True, ()),
    ("mixtral-8x7b", "v6e:8x8", 1, {"fsdp": 8, "expert": 8}, 64, 2048, True, ("optim.name=adamw",)),
    ("mixtral-8x7b", "v5p:4x4x4", 1, {"fsdp": 8, "expert": 8}, 64, 4096, True, ()),
    ("mixtral-8x7b", "v5p:4x4x4", 1, {"fsdp": 64}, 64, 4096, True, ("optim.name=adamw",)),
    ("8b", "v5e:16x16", 4, {"data": 4, "fsdp": 256}, 1024, 2048, True, ()),
    ("8b", "v5p:8x16x16", 1, {"data": 4, "fsdp": 512}, 2048, 8192, True, ()),
]


def planned(model, topology, slices, mesh, rows, length, more=()):
    overrides = [f"--config.mesh.{axis}={n}" for axis, n in ({"data": 1} | mesh).items()]
    stage = (f"batch_size={rows}", f"data.row_length={length}", *more)
    overrides += [f"--config.stages.pretrain.{setting}" for setting in stage]
    e, name = job.read(f"{CONFIG}:{model}", "", overrides)
    return job.make(e, name, chips.parse(topology, slices))


@pytest.mark.parametrize("model, topology, slices, mesh, rows, length, fits, more", ROWS)
def test_the_estimate_is_the_compilers_within_15_percent(model, topology, slices, mesh, rows, length, fits, more):
    made = planned(model, topology, slices, mesh, rows, length, more)
    need, plan = memory.estimate(made), describe(made)
    estimate, says = need.total, need.says(made.topology.chip.memory)
    compiled = ahead.compile(made)
    row = [model, str(made.topology), f"{made.topology.devices:,}", said(mesh), f"{rows:,} x {length:,}",
           f"{made.model.remat}, {made.stage.optim.name}, {made.stage.accumulate}",
           f"{estimate / GIB:.2f}", f"{compiled.peak / GIB:.2f}", f"{estimate / compiled.peak - 1:+.0%}",
           "yes" if compiled.fits else "no", f"{plan['mfu_serial']:.0%} to {plan['mfu']:.0%}",
           f"{compiled.seconds:.0f}"]  # fmt: skip
    print(f"\n| {' | '.join(row)} |")
    found: dict[str, float] = {}
    for c in compiled.exchanged:
        found[c.kind] = found.get(c.kind, 0) + c.bytes / 1e9
    print({kind: round(size, 2) for kind, size in found.items()})
    assert compiled.fits == fits and says in ("fits" if fits else "does not fit", "at the limit")
    if fits:  # where it does not, the compiler stops before it has packed memory as tightly as it could
        assert estimate == pytest.approx(compiled.peak, rel=0.15)
