"""How much of a checkpoint is on the host at once while it is read into the shards of a mesh."""

import json
import os
import subprocess
import sys

import ml_dtypes  # noqa: F401  (it teaches NumPy bfloat16)
import numpy as np
import pytest
from safetensors.numpy import save_file

from lmtrain.interop.families import FAMILIES
from lmtrain.interop.huggingface import read_values
from lmtrain.interop.layout import expected

CHILD = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
from lmtrain import mesh as meshes, schema
from lmtrain.interop import huggingface
from lmtrain.models import transformer
folder = huggingface.open_folder(sys.argv[1])
mesh = meshes.make(schema.Mesh(data=1, fsdp=8))

def most():  # of this process alone: getrusage's figure begins with its parent's
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

before = most()
params = jax.block_until_ready(folder.params(meshes.shardings(transformer.axes(folder.model), mesh), dtype="stored"))
peak = most()
held = sum(s.data.nbytes for x in jax.tree.leaves(params) for s in x.addressable_shards)
matrices = [x for x in jax.tree.leaves(params) if x.nbytes > 1 << 20]
largest = max(s.data.nbytes / x.nbytes for x in matrices for s in x.addressable_shards)
print(peak * 1024, before * 1024, held, largest)
"""


def folder(to, dtype, **sizes):
    """A random Llama's folder, written shard by shard."""
    values = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": dtype, **sizes}
    (to / "config.json").write_text(json.dumps(values))
    _, model = read_values(values, "config.json")
    block = np.random.default_rng(0).normal(0, 0.02, 1 << 22).astype(np.dtype(dtype))
    shards: list[dict] = [{}]
    for name, shape in expected(FAMILIES["llama"], model).items():
        n = int(np.prod(shape))
        shards[-1][name] = np.resize(block, n).reshape(shape)
        if sum(x.nbytes for x in shards[-1].values()) > 1 << 29:
            save_file(shards[-1], to / f"{len(shards)}.safetensors")
            shards[-1] = dict.fromkeys(shards[-1])
            shards.append({})
    save_file(shards[-1], to / f"{len(shards)}.safetensors")
    mapped = {name: f"{i + 1}.safetensors" for i, held in enumerate(shards) for name in held}
    (to / "model.safetensors.index.json").write_text(json.dumps({"weight_map": mapped}))
    return sum(p.stat().st_size for p in to.glob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_billion_parameters_are_read_onto_eight_devices_in_little_more_than_their_size(dtype, tmp_path):
    size = folder(tmp_path, dtype, vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=18,
                  num_attention_heads=16, num_key_value_heads=16)  # fmt: skip
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)], capture_output=True, text=True, env={**os.environ, **flags}
    )
    assert done.returncode == 0, done.stderr
    peak, before, held, largest = map(float, done.stdout.split())
    assert size > 1e9 * np.dtype(dtype).itemsize and held == pytest.approx(size, rel=1e-3)
    assert largest <= 0.126  # no device has more than its share of any matrix
    print(f"{dtype}: {size / 1e9:.2f} GB of checkpoint, {peak / 1e9:.2f} GB at most: {peak / size:.2f}")
    assert peak < 1.3 * size, f"{peak / size:.2f} times the checkpoint, {before / 1e9:.2f} GB of it before reading"
