"""Topologies: their names, what is refused, and how fast the axes of a mesh are over them."""

import types

import pytest

from lmtrain.mesh import AXES
from lmtrain.plan import chips
from lmtrain.schema import ConfigError


@pytest.mark.parametrize(
    "text, slices, devices", [("v5p:8x16x16", 1, 2048), ("v5e:16x16", 4, 1024), ("h200:8x4", 1, 32), ("v6e:2x4", 1, 8),
                              ("v5p:16x16x24", 16, 98304), ("cpu:8", 1, 8)])  # fmt: skip
def test_a_topology_has_so_many_devices(text, slices, devices):
    assert chips.parse(text, slices).devices == devices


@pytest.mark.parametrize(
    "text, slices, says", [
        ("v5q:8x8x8", 1, r"'v5q' is no chip. Did you mean v5p:8x8x8\?"),
        ("v5q:4x4", 1, r"Did you mean v5e:4x4\?"),  # v5p is as near, but takes three sizes
        ("v5q:5x5", 1, r"Did you mean v5[ep]\?"),
        ("v5e:5x5", 1, r"no slice of v5e has this shape. Did you mean v5e:4x8\?"),
        ("v5e:16x8", 1, r"Did you mean v5e:8x16\?"),
        ("v5p:8x8", 1, r"no slice of v5p has this shape. Did you mean v5p:4x4x4\?"),
        ("v5p:8x8x9", 1, r"Did you mean v5p:4x12x12\?"),
        ("v5p", 1, r"takes sizes after the colon, as v5p:8x8x8"),
        ("v5p:0x4x4", 1, r"takes sizes after the colon"),
        ("h200:16x2", 1, r"GPUs of a host .* Did you mean h200:8x4\?"),
        ("cpu:2x4", 1, r"Did you mean cpu:8\?"),
        ("h200:8x4", 2, r"--slices is 2, but only TPUs have slices"),
        ("v5e:4x4", 0, r"--slices is 0, but takes 1 to 4096"),
        ("v5e:4x4", 1000000, r"--slices is 1000000, but takes 1 to 4096"),
    ])  # fmt: skip
def test_a_wrong_topology_is_refused_with_the_nearest(text, slices, says):
    with pytest.raises(ConfigError, match=says):
        chips.parse(text, slices)


def sizes(**axes):
    return dict.fromkeys(AXES, 1) | axes


def test_an_axis_has_the_links_of_the_dimensions_it_takes():
    pod, link = chips.parse("v5e:16x16"), 5e10
    assert chips.bandwidths(pod, sizes(fsdp=256))["fsdp"] == 4 * link  # two rings, both ways
    both = chips.bandwidths(pod, sizes(fsdp=16, tensor=16))
    assert both["fsdp"] == both["tensor"] == 2 * link
    assert chips.bandwidths(chips.parse("v5e:4x4"), sizes(fsdp=16))["fsdp"] == 2 * link  # no ring closes


def test_gpus_of_several_hosts_share_their_ports():
    pod = chips.parse("h200:8x4")
    rates = chips.bandwidths(pod, sizes(fsdp=4, tensor=8))
    assert rates["tensor"] == 4.5e11 and rates["fsdp"] == 5e10
    assert chips.bandwidths(pod, sizes(fsdp=32))["fsdp"] == 8 * 5e10


@pytest.mark.parametrize("name", sorted(set(chips.chips()) - {"cpu"}))
def test_every_chip_has_a_peak_and_is_found_by_its_devices(name):
    chip = chips.chips()[name]
    assert chip.flops > 1e14 and chip.hbm > 5e11
    kind = {"H200": "NVIDIA H200", "H100": "NVIDIA H100 80GB HBM3"}.get(chip.device_kind, chip.device_kind)
    devices = [types.SimpleNamespace(device_kind=kind, platform=chip.platform, process_index=i // 4,
                                     coords=(i % 2, i // 2, 0)) for i in range(8)]  # fmt: skip
    assert chips.of_devices(devices).chip.name == name and chips.of_devices(devices).devices == 8
