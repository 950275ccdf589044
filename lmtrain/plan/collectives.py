"""What a compiled program sends between devices: kinds, bytes and mesh axes of its collectives, read off its HLO text.

A loop's body counts as often as it runs. One kind of measure for all: the bytes that each device receives on a ring,

    all-gather          result * (n - 1) / n          all-to-all          operand * (n - 1) / n
    reduce-scatter      operand * (n - 1) / n         collective-permute  operand
    all-reduce      2 * operand * (n - 1) / n         ragged-all-to-all   its rows * (n - 1) / n, were all alike

for a group of n (Thakur et al. 2005; https://jax-ml.github.io/scaling-book/sharding). Between slices a TPU's program
has no collective: it hands an array to its host and takes the sum back, which stands here as what it is, along "dcn".
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import jax
import numpy as np

KINDS = "ragged-all-to-all|all-gather|reduce-scatter|all-reduce|all-to-all|collective-permute"
BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
         "f32": 4, "s64": 8, "u64": 8, "f64": 8}  # fmt: skip

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|called_computations)=\{?%?([\w.\-]+)")
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of exchange. axes: those of the mesh that its groups run along, or dcn. bytes: what a device receives in
    one step, all repetitions together. times: how often it runs. dtypes: of what is sent."""

    kind: str
    axes: tuple[str, ...]
    bytes: float
    times: int
    dtypes: tuple[str, ...]


def collectives(hlo: str, mesh: jax.sharding.Mesh) -> list[Collective]:
    """All collectives of a compiled program's text, those of one kind along the same axes added up, largest first."""
    lines, entry = _computations(hlo)
    times = _times(lines, entry)
    fused = {name for body in lines.values() for line in body for name in re.findall(r"calls=%?([\w.\-]+)", line)}
    found: dict[tuple[str, tuple[str, ...]], list[tuple[float, int, str]]] = collections.defaultdict(list)
    seen: set[tuple[str, str, float]] = set()  # an asynchronous one stands in several fused parts, under one channel
    for name, body in lines.items():
        for line in body:
            for kind, dtype, size, groups, channel in _collective(line, body):
                if not times[name] or name in fused and (kind, channel, size) in seen:
                    continue
                seen.add((kind, channel, size))
                n = max(map(len, groups))
                ring = 1.0 if kind == "collective-permute" else (n - 1) / n * (2 if kind == "all-reduce" else 1)
                if ring and size:
                    axes = ("dcn",) if " send(" in line else _axes(groups, mesh, kind == "collective-permute")
                    found[kind, axes].append((size * ring * times[name], times[name], dtype))
    out = [Collective(kind, axes, sum(b for b, _, _ in parts), sum(t for _, t, _ in parts),
                      tuple(sorted({d for _, _, d in parts}))) for (kind, axes), parts in found.items()]  # fmt: skip
    return sorted(out, key=lambda c: -c.bytes)


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    lines: dict[str, list[str]] = {}
    name = entry = ""
    for line in hlo.splitlines():
        if begins := _COMPUTATION.match(line):
            name = begins[2]
            entry = name if begins[1] else entry
            lines[name] = []
        elif name:
            lines[name].append(line)
    return lines, entry


def _times(lines: Mapping[str, list[str]], entry: str) -> collections.Counter[str]:
    """How often each computation runs in one run of the program."""
    times: collections.Counter[str] = collections.Counter()

    def visit(name: str, n: int) -> None:
        times[name] += n
        for line in lines.get(name, ()):
            trips = _trips(line, lines) if " while(" in line else 1
            for called in _CALLED.findall(line):
                if called in lines:
                    visit(called, n * trips)

    visit(entry, 1)
    return times


def _trips(line: str, lines: Mapping[str, list[str]]) -> int:
    """How often a loop runs: as the compiler notes, else until its counter reaches the constant it is compared with."""
    if known := re.search(r"known_trip_count[^\d]*(\d+)", line):
        return int(known[1])
    names = re.search(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
    condition, body = (_definitions(lines.get(names[i], [])) if names else {} for i in (1, 2))
    for text in condition.values():
        compared = re.search(r"compare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=LT", text)
        if compared:
            end = re.search(r"constant\((\d+)\)", condition.get(compared[2], ""))
            place = re.search(r"get-tuple-element\(.*index=(\d+)", condition.get(compared[1], ""))
            if end:
                return -(-int(end[1]) // (_increment(body, int(place[1])) if place else 1))
    return 1


def _definitions(body: list[str]) -> dict[str, str]:
    """Name -> its line; the result's under "ROOT" as well."""
    found = {}
    for line in body:
        if match := re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line):
            found[match[2]] = line
            if match[1]:
                found["ROOT"] = line
    return found


def _increment(body: Mapping[str, str], place: int) -> int:
    """What one turn of a loop adds to the counter at this place of what it carries: more than 1 where the compiler has
    unrolled it."""
    root = re.search(r" tuple\((.*?)\)(, |$)", re.sub(r"/\*.*?\*/", "", body.get("ROOT", "")))
    name = root[1].split(",")[place].strip().lstrip("%") if root else ""
    total = 0
    while added := re.search(r" add\(%?([\w.\-]+), %?([\w.\-]+)\)", body.get(name, "")):
        step = re.search(r"constant\((\d+)\)", body.get(added[2], ""))
        total, name = total + (int(step[1]) if step else 1), added[1]
    return max(1, total)


def _collective(line: str, body: list[str]) -> Iterator[tuple[str, str, float, list[tuple[int, ...]], str]]:
    """(kind, dtype, bytes before the ring's factor, groups, channel) of a line that is one; done-halves are not."""
    if sent := re.search(r" = \((.*?\]).* send\(.*_xla_megascale_target=\"\{([\d,]+)\}.*transfer_type=\"(\w+)\"", line):
        dtype, dims = _SHAPE.findall(sent[1])[0]
        size = math.prod(int(n) for n in dims.split(",") if n) * BYTES.get(dtype, 4)
        channel = re.search(r"channel_id=(\d+)", line)
        slices = tuple(map(int, sent[2].split(",")))
        yield sent[3].lower().replace("_", "-"), dtype, size, [slices], channel[1] if channel else ""
        return
    found = re.search(rf" = (.*?) ({KINDS})(-start)?\(", line)
    if not found:
        return
    kind, start = found[2], bool(found[3])
    shapes = [(d, math.prod(int(n) for n in dims.split(",") if n) * BYTES.get(d, 4)) for d, dims in
              _SHAPE.findall(re.sub(r"\{[^}]*\}", "", found[1]))]  # fmt: skip
    groups = _groups(line, kind)
    if not shapes or not groups:
        return
    sizes = [size for _, size in shapes]
    if kind == "ragged-all-to-all":  # one side has room for the rows of all devices, the other for its own
        operand = re.search(rf"{kind}(?:-start)?\(%?([\w.\-]+)", line)
        given = _SHAPE.search(_definitions(body).get(operand[1] if operand else "", ""))
        other = math.prod(int(n) for n in given[2].split(",") if n) * BYTES.get(given[1], 4) if given else sizes[0]
        sizes = [min(sizes[0], other)]
    # A start's tuple holds operands and results; a permute's two flags besides.
    if start and kind == "collective-permute":
        total = sizes[0]
    elif start and kind == "all-gather":
        total = max(sizes) if len(sizes) == 2 else sum(sizes[len(sizes) // 2 :])
    else:
        total = sum(sizes)
    if kind == "reduce-scatter":
        total *= max(map(len, groups))
    channel = re.search(r"channel_id=(\d+)", line)
    yield kind, shapes[0][0], total, groups, channel[1] if channel else ""


def _groups(line: str, kind: str) -> list[tuple[int, ...]]:
    """The devices of each group, by their place in the mesh; a permute's pairs."""
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
        return [tuple(map(int, p.split(","))) for p in re.findall(r"\{?(\d+,\d+)\}?", pairs[1])] if pairs else []
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", line):
        return [tuple(map(int, g.split(","))) for g in re.findall(r"\{([\d,]+)\}", listed[1])]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, dims = ([int(n) for n in iota[i].split(",")] for i in (1, 2))
        ids = np.arange(math.prod(dims)).reshape(dims)
        ids = ids.transpose([int(n) for n in iota[3].split(",")]) if iota[3] else ids
        return [tuple(int(i) for i in row) for row in ids.reshape(shape)]
    named = re.search(
        r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{(.*?)\}", line
    )
    if named:
        axes = [(name, int(n)) for name, n in re.findall(r"'([^']+)'=(\d+)", named[1])]
        along = re.findall(r"'([^']+)'", named[4])
        ids = np.arange(math.prod(n for _, n in axes))
        if named[2]:  # the devices in another order
            ids = ids.reshape([int(n) for n in named[2].split(",")])
            ids = ids.transpose([int(n) for n in named[3].split(",")]) if named[3] else ids
        ids = ids.reshape([n for _, n in axes])
        order = [i for i, (name, _) in enumerate(axes) if name not in along] + [
            i for name in along for i, (other, _) in enumerate(axes) if other == name]  # fmt: skip
        size = math.prod(n for name, n in axes if name in along)
        return [tuple(int(i) for i in row) for row in ids.transpose(order).reshape(-1, size)]
    return []


def _axes(groups: list[tuple[int, ...]], mesh: jax.sharding.Mesh, pairs: bool) -> tuple[str, ...]:
    """The axes of the mesh along which the members of a group differ."""
    varies: set[str] = set()
    for group in groups[:64] if pairs else groups[:1]:
        places = np.array(np.unravel_index(np.array(group), mesh.devices.shape))
        varies |= {axis for axis, at in zip(mesh.axis_names, places, strict=True) if len(set(at.tolist())) > 1}
    return tuple(axis for axis in mesh.axis_names if axis in varies)
