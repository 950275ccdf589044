"""The same run on one device and on eight pretended ones: the same 50 losses, whatever the mesh."""

import json
import os
import pathlib
import random
import subprocess
import sys

import numpy as np
import pytest

SCRIPT = """
from lmtrain import config
def get_config(arg=""):
    c = config.experiment(seed=1, tensorboard=False)
    c.stages.tokenizer = config.tokenizer("bytes")
    c.stages.pretrain = config.stage(
        steps=50, batch_size=16, log_every=1, eval_every=0, checkpoint_every=0, samples=0,
        model=config.model(layers=2, width=64, heads=4, kv_heads=4, experts=4 if arg else 0),
        data=config.data("text", path=TEXT, row_length=64, heldout_fraction=0.2, heldout_rows=16, document="paragraph"),
        optim=config.optim("adamw" if arg == "moe-adamw" else "muon"))
    return c
"""
MESHES = {
    "data": (8, "", dict(data=8)),
    "fsdp": (8, "", dict(fsdp=8)),
    "tensor": (4, "", dict(tensor=4)),
    "context": (4, "", dict(context=4)),
    "fsdp x tensor x context": (8, "", dict(fsdp=2, tensor=2, context=2)),
    "expert": (4, "moe", dict(expert=4)),
    "expert x fsdp, AdamW": (8, "moe-adamw", dict(expert=4, fsdp=2)),
    "expert x fsdp": (8, "moe", dict(expert=4, fsdp=2)),
}


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    """(devices, arg, flags) -> 50 losses; each run happens once."""
    folder = tmp_path_factory.mktemp("devices")
    rng = random.Random(0)
    words = "the cat sat on a mat and then it ran far away under one old tree".split()
    paragraphs = [" ".join(rng.choices(words, k=rng.randrange(3, 60))) for _ in range(500)]
    (folder / "text.txt").write_text("\n\n".join(paragraphs))
    (folder / "tiny.py").write_text(SCRIPT.replace("TEXT", repr(str(folder / "text.txt"))))
    known = {}

    def run(devices, arg, flags):
        key = (devices, arg, *flags)
        if key not in known:
            workdir = folder / f"run{len(known)}"
            environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
            argv = [
                sys.executable,
                "-m",
                "lmtrain.cli",
                "run",
                "--config",
                f"{folder}/tiny.py:{arg}",
                "--workdir",
                workdir,
            ]
            done = subprocess.run([*argv, *flags], env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            rows = pathlib.Path(workdir, "pretrain/metrics.jsonl").read_text().splitlines()
            known[key] = np.array([json.loads(row)["loss"] for row in rows])
            assert len(known[key]) == 51 and known[key][-1] < 0.8 * known[key][0]
        return known[key]

    return run


# An open defect, cause unknown: see BUILD_NOTES.md. Strict, so that whoever mends it is told.
OPEN = pytest.mark.xfail(strict=True, reason="a mixture under Muon, its batch split: 5e-3 apart from step 13 on")


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=OPEN) if n == "expert x fsdp" else n for n in MESHES])
def test_eight_devices_give_the_losses_of_one(losses, name):
    devices, arg, sizes = MESHES[name]
    flags = tuple(f"--config.mesh.{axis}={size}" for axis, size in sizes.items())
    np.testing.assert_allclose(losses(devices, arg, flags), losses(1, arg, ()), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("arg", ["", "moe-adamw", pytest.param("moe", marks=OPEN)])
def test_four_microbatches_give_the_losses_of_one(losses, arg):
    four = losses(1, arg, ("--config.stages.pretrain.accumulate=4",))
    np.testing.assert_allclose(four, losses(1, arg, ()), rtol=1e-4)
