"""Chips and how they are joined: what a plan calculates with. Figures are the makers'; 1 GB is 1e9 bytes, 1 GiB 2**30.

TPU: https://cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e (memory bandwidth, network); one direction of one link of
the interconnect and the network of a host, which its chips share, by https://jax-ml.github.io/scaling-book/tpus.
Memory is what libtpu lets a program have: it names the figure where a program does not fit.
GPU: NVIDIA's data sheets for A100 SXM 80 GB, H100 SXM, H200 SXM, HGX B200. NVLink in one direction; the network is
one port for each GPU, as in DGX systems: 200 Gb/s for A100, 400 Gb/s for the others. Memory is three quarters of the
chip's: XLA_CLIENT_MEM_FRACTION, .75 unless set. Peak FLOP/s stand in log.PEAKS.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Mapping
from typing import Any

from lmtrain import log, schema
from lmtrain.mesh import AXES

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of device. memory: bytes that a program may use. flops: peak, bfloat16 (float32 on a CPU). hbm, link,
    network: bytes a second of its memory; of one link to a neighbour (a switch, where `torus` is 0) in one direction;
    of its share of the network between slices or hosts. torus: dimensions of the interconnect. host: chips of a host.
    """

    name: str
    platform: str
    device_kind: str
    memory: float
    hbm: float
    link: float
    network: float
    torus: int
    host: int
    peak: float = 0.0  # 0: that of log.PEAKS

    @property
    def flops(self) -> float:
        return self.peak or log.peak_flops(self) or 0.0


def chips() -> dict[str, Chip]:
    """All chips by name. That of a CPU is without numbers: `cpu` measures them."""
    # platform device_kind   memory, GiB   hbm      link     network  torus host
    rows: dict[str, tuple[Any, ...]] = {
        "v4": ("tpu", "TPU v4", 30.5, 1.228e12, 4.5e10, 6.25e9, 3, 4),
        "v5e": ("tpu", "TPU v5 lite", 15.75, 0.819e12, 5.0e10, 3.125e9, 2, 8),
        "v5p": ("tpu", "TPU v5", 95.74, 2.765e12, 1.0e11, 6.25e9, 3, 4),
        "v6e": ("tpu", "TPU v6 lite", 31.25, 1.638e12, 1.0e11, 12.5e9, 2, 8),
        "a100": ("gpu", "A100", 0.75 * 80e9 / GIB, 2.039e12, 3.0e11, 25e9, 0, 8),
        "h100": ("gpu", "H100", 0.75 * 80e9 / GIB, 3.35e12, 4.5e11, 50e9, 0, 8),
        "h200": ("gpu", "H200", 0.75 * 141e9 / GIB, 4.8e12, 4.5e11, 50e9, 0, 8),
        "b200": ("gpu", "B200", 0.75 * 180e9 / GIB, 7.7e12, 9.0e11, 50e9, 0, 8),
        "cpu": ("cpu", "cpu", 0.0, 0.0, 0.0, 0.0, 0, 1 << 20),
    }
    return {name: Chip(name, row[0], row[1], row[2] * GIB, *row[3:]) for name, row in rows.items()}


def cpu(devices: int) -> Chip:
    """This machine as so many pretended devices: its memory and the speed it shows here and now, divided by them."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    flops = log.matmul_ceiling("float32", seconds=0.2)
    bandwidth = 2e10 / devices  # of a laptop's two channels, not measured: steps on a CPU wait for products
    return dataclasses.replace(chips()["cpu"], memory=total / devices, hbm=bandwidth, link=bandwidth / 2,
                               network=bandwidth / 2, peak=flops / devices)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of one kind. shape: of a slice's torus; for GPUs, of one host and then how many hosts; for a CPU, how
    many. slices: how many slices a slow network joins."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def devices(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    def __str__(self) -> str:
        return self.name + (f" x {self.slices} slices" if self.slices > 1 else "")


def parse(text: str, slices: int = 1) -> Topology:
    """ "v5p:8x8x8" | "v5e:4x4" | "h200:8x4" (8 GPUs a host, 4 hosts) | "cpu:8".

    Raises:
      ConfigError: no such chip, or none that its maker joins so, with the nearest that is.
    """
    name, _, sizes = text.partition(":")
    known = chips()
    if name not in known:
        near = difflib.get_close_matches(name, known, len(known), 0.3)
        whole = [f"{other}:{sizes}" for other in near if _valid(f"{other}:{sizes}")]
        hint = f" Did you mean {(whole or near)[0]}?" if near else ""
        raise schema.ConfigError(f"--topology {text}: {name!r} is no chip.{hint} (known: {', '.join(known)})")
    chip = known[name]
    sample = {"tpu": "v5p:8x8x8" if chip.torus == 3 else f"{name}:4x4", "gpu": f"{name}:8x4", "cpu": "cpu:8"}
    if not re.fullmatch(r"[1-9]\d{0,5}(x[1-9]\d{0,5})*", sizes):
        raise schema.ConfigError(f"--topology {text}: takes sizes after the colon, as {sample[chip.platform]}.")
    if not 1 <= slices <= 4096:
        raise schema.ConfigError(f"--slices is {slices}, but takes 1 to 4096.")
    shape = tuple(int(n) for n in sizes.split("x"))
    if chip.platform == "tpu":
        valid = shapes(chip)
        if shape not in valid:
            padded: Any = (*sorted(shape), 1, 1, 1)

            def far(s: Any) -> tuple[float, float]:
                return abs(math.log(math.prod(s) / math.prod(shape))), math.dist(s, padded[: len(s)])

            rule = "three sizes, in rising order, multiples of 4 from 4x4x4 on"
            takes = rule if chip.torus == 3 else ", ".join("x".join(map(str, s)) for s in valid)
            raise schema.ConfigError(f"--topology {text}: no slice of {name} has this shape. Did you mean {name}:"
                                     f"{'x'.join(map(str, min(valid, key=far)))}? (it takes {takes})")  # fmt: skip
        return Topology(chip, shape, slices)
    if chip.platform == "gpu":
        shape = shape if len(shape) > 1 else (shape[0], 1)
        if len(shape) != 2 or shape[0] not in (1, 2, 4, 8):
            raise schema.ConfigError(
                f"--topology {text}: takes GPUs of a host (1, 2, 4 or 8), then hosts. Did you mean {name}:8x"
                f"{max(1, math.prod(shape) // 8)}?"
            )
    elif len(shape) > 1:
        raise schema.ConfigError(f"--topology {text}: a CPU takes one number. Did you mean cpu:{math.prod(shape)}?")
    if slices > 1:
        raise schema.ConfigError(
            f"--slices is {slices}, but only TPUs have slices; hosts are the second size: {name}:8x4."
        )
    return Topology(cpu(shape[0]) if chip.platform == "cpu" else chip, shape)


def _valid(text: str) -> bool:
    try:
        parse(text)
    except schema.ConfigError:
        return False
    return True


def shapes(chip: Chip) -> list[tuple[int, ...]]:
    """The slices that Google offers (https://cloud.google.com/tpu/docs/v5p, /v5e)."""
    if chip.torus == 2:
        return [(1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)]
    small: list[tuple[int, ...]] = [(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)]
    fours: list[tuple[int, ...]] = [
        (a, b, c) for a in range(4, 29, 4) for b in range(a, 29, 4) for c in range(b, 29, 4)
    ]
    most = 4096 if chip.name == "v4" else 6144
    return small + [s for s in fours if math.prod(s) <= most]


def of_devices(devices: list[Any]) -> Topology | None:
    """What JAX's devices are; None for a kind that the table lacks."""
    kind = devices[0].device_kind
    if devices[0].platform == "cpu":
        return Topology(cpu(len(devices)), (len(devices),))
    chip = next((c for c in sorted(chips().values(), key=lambda c: -len(c.device_kind)) if c.device_kind in kind), None)
    if chip is None:
        return None
    if chip.platform == "gpu":
        hosts = len({d.process_index for d in devices})
        return Topology(chip, (max(1, len(devices) // hosts), hosts))
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    shape = tuple(max(d.coords[i] for d in devices) + 1 for i in range(chip.torus))
    return Topology(chip, shape if math.prod(shape) * slices == len(devices) else (len(devices) // slices,), slices)


# ------------------------------------------------------------------------------------------------------------ networks
def bandwidths(topology: Topology, sizes: Mapping[str, int]) -> dict[str, float]:
    """Bytes a second that a device receives in a ring along each axis of the mesh; "dcn": between slices.

    Inner axes get the neighbours, as `mesh.make` lays them out. Along a dimension of the torus that an axis takes whole
    and that closes to a ring (a multiple of 4 chips on v4 and v5p, 16 on v5e and v6e), both directions count.
    Between hosts of GPUs, each sends through a port of its own.
    """
    chip = topology.chip
    out = {"dcn": chip.network}
    left = list(topology.shape if chip.platform == "tpu" else topology.shape[:1])
    for axis in reversed(AXES):
        need = sizes[axis] // (topology.slices if axis == "data" else 1)
        rate, near = 0.0, 1
        for i in sorted(range(len(left)), key=lambda i: (need % left[i] != 0, -left[i])):
            part = math.gcd(left[i], need)
            if part == 1:
                continue
            whole = part == topology.shape[i]
            ring = whole and part % (4 if chip.torus == 3 else 16) == 0
            rate += chip.link * (2 if chip.platform == "tpu" and ring else 1)
            left[i], need, near = left[i] // part, need // part, near * part
        if need > 1:  # reaches other hosts
            rate = min(rate or chip.link, chip.network * near) if chip.platform == "gpu" else chip.link
        out[axis] = rate or chip.link
    return out
