"""`lmtrain plan`: what a stage takes on a topology, before the money is spent. See docs/plan.md."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

from lmtrain import log
from lmtrain.models import transformer
from lmtrain.plan import ahead, chips, job, memory, search, show, traffic
from lmtrain.types import LmtrainError


def plan(
    file: str, topology: str, stage: str = "", slices: int = 1, compile: bool = False, price: float = 0.0,
    searches: bool = False, tokens: float = 0.0, overrides: list[str] | tuple[str, ...] = (), to_json: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Plans a stage of an experiment, prints a table, and returns what it says.

    Args:
      file: "FILE[:arg]".
      topology: chips.parse's "v5p:8x8x8".
      stage: whose update; "": the first that trains.
      slices: of that topology, joined by a slow network.
      compile: whether the update is compiled, too.
      price: of one chip for an hour; 0: no money is spoken of.
      searches: whether other meshes, microbatches and rematerialisations are ranked.
      tokens: of the whole stage; 0: its steps' own.
      overrides: "--config.a.b=value".
      to_json: a file that the result goes to.

    Raises:
      LmtrainError: what cannot be planned, in one message.
    """
    for name, value in (("price", price), ("tokens", tokens)):
        if not 0 <= value < float("inf"):
            raise LmtrainError(f"--{name} is {value}, but takes at least 0.")
    where = chips.parse(topology, slices)
    e, name = job.read(file, stage, overrides)
    if e.mesh.auto or searches:
        blank = search.make_any(e, name, where)
        choices = search.ranked(blank, same_batches=not searches)
        if not choices:
            raise LmtrainError(f"{file}: no mesh of {where.devices} devices divides stages.{name}: batch_size="
                               f"{blank.stage.batch_size}, accumulate={blank.stage.accumulate}.")  # fmt: skip
    made = search.ranked(blank, same_batches=True)[0].job if e.mesh.auto else job.make(e, name, where)
    result = describe(made, price, tokens)
    if searches:
        result["search"] = [search_row(c) for c in choices[:10]]
    if compile:
        log.say(f"compiling the update of {name} for {where}: a minute or more")
        result["compiled"] = compiled_row(made, ahead.compile(made), result["memory"]["total"])
    show.table(result)
    if to_json:
        pathlib.Path(to_json).write_text(json.dumps(result, indent=1) + "\n")
    return result


def describe(made: job.Job, price: float = 0.0, tokens: float = 0.0) -> dict[str, Any]:
    """The plan of a job as a nested dict of numbers; bytes, seconds, FLOPs."""
    counted = transformer.count(made.model)
    need, roof, exchanged = memory.estimate(made), traffic.roofline(made), traffic.exchanges(made)
    rates = chips.bandwidths(made.topology, made.sizes)
    total = tokens or made.tokens * made.stage.steps
    days = total / made.tokens * roof.overlapped / 86400
    chip = made.topology.chip
    return {
        "stage": made.name, "topology": str(made.topology), "devices": made.topology.devices,
        "mesh": {axis: n for axis, n in made.sizes.items() if n > 1} or {"data": 1}, "slices": made.topology.slices,
        "batch_size": made.stage.batch_size, "row_length": made.stage.data.row_length,
        "accumulate": made.stage.accumulate, "remat": made.model.remat, "optimizer": made.stage.optim.name,
        "attention": made.attention, "parameters": counted["total"], "active": counted["active"],
        "flops_per_token": transformer.flops_per_token(made.model, made.stage.data.row_length),
        "memory": {**{part: size for part, size in need.parts.items() if size},
                   "height": max(need.heights, key=lambda name: need.heights[name]), "total": need.total,
                   "available": chip.memory, "fits": need.total <= chip.memory, "says": need.says(chip.memory)},
        "traffic": [{**dataclasses.asdict(x), "seconds": x.bytes / rates[x.axis], "bandwidth": rates[x.axis]}
                    for x in exchanged],
        "time": {"compute": roof.compute, "memory": roof.memory, **roof.axes, "step": roof.overlapped,
                 "serial": roof.serial, "bound": roof.bound},
        "mfu": roof.mfu, "mfu_serial": roof.mfu_serial,
        "tokens_per_day": made.tokens / roof.overlapped * 86400, "tokens": total, "days": days,
        "days_serial": days * roof.serial / roof.overlapped,
        "cost": price * days * 24 * made.topology.devices if price else None,
        "chips": {"flops": chip.flops, "hbm": chip.hbm, "memory": chip.memory},
        "tested": made.topology.devices <= 2048,
    }  # fmt: skip


def search_row(c: search.Choice) -> dict[str, Any]:
    """A choice of a search as a dict."""
    return {
        "mesh": {a: n for a, n in c.job.sizes.items() if n > 1} or {"data": 1},
        "accumulate": c.job.stage.accumulate, "remat": c.job.model.remat, "memory": c.memory.total,
        "fits": c.fits, "says": c.memory.says(c.job.topology.chip.memory),
        "seconds": c.seconds, "mfu": c.roofline.mfu, "mfu_serial": c.roofline.mfu_serial, "bound": c.roofline.bound,
    }  # fmt: skip


def compiled_row(made: job.Job, c: ahead.Compiled, estimate: float) -> dict[str, Any]:
    """What a compiler said, beside the estimate."""
    return {"fits": c.fits, "peak": c.peak, "available": c.memory, "estimate": estimate,
            "off": estimate / c.peak - 1 if c.peak else 0.0, "seconds": c.seconds,
            "collectives": [dataclasses.asdict(x) for x in c.exchanged]}  # fmt: skip
