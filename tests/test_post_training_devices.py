"""SFT, reward, DPO with adapters, GRPO and PPO on eight pretended devices: the losses, rewards and replies of one.

Gradients that are zero but for rounding (those of the keys' biases) are kept from moving anything by Adam's epsilon:
with its default and lr=0.01, SFT parts by 4e-4 within 40 steps, and in float64 by 4e-10 within 30.
"""

import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest

SCRIPT = """
from lmtrain import config
GPT2 = dict(positions="learned", max_positions=64, norm="layernorm", qk_norm=False, activation="gelu", qkv_bias=True,
            out_bias=True, mlp_bias=True)
def get_config(arg=""):
    def stage(objective, steps=3, **fields):
        return config.stage(objective=objective, steps=steps, batch_size=8, log_every=1, eval_every=0,
                            checkpoint_every=0, optim=config.optim("adamw", lr=0.003, eps=1e-4), **fields)
    def rollout(group):
        return config.rollout("addition(digits=1)", group=group, slots=8, max_tokens=5,
                              rewards=("score", "model(reward)"))
    c = config.experiment(seed=1, tensorboard=False)
    c.stages.tokenizer = config.tokenizer("bytes")
    pairs = config.data("jsonl", path=PAIRS, row_length=64, heldout_rows=8)
    prompts = config.data(row_length=48, heldout_rows=8)
    c.stages.sft = stage("sft", steps=30, samples=2, sample_tokens=8,
        model=config.model(layers=2, width=32, heads=4, **(dict(experts=4) if arg else GPT2)),
        data=config.data("task", path="addition(digits=1)", limit=200, row_length=64, heldout_rows=8))
    c.stages.reward = stage("reward", samples=0, data=pairs, init_from="sft")
    c.stages.dpo = stage("dpo", samples=0, data=pairs, init_from="sft", model=config.model(lora=dict(rank=2)))
    c.stages.grpo = stage("grpo", data=prompts, init_from="sft", rollout=rollout(4))
    c.stages.ppo = stage("ppo", data=prompts, init_from="sft", rollout=rollout(1))
    return c
"""
STAGES = ("sft", "reward", "dpo", "grpo", "ppo")
#: name -> argument of the experiment ("moe": a mixture, else a GPT-2), axes of the mesh
MESHES = {
    "stage x fsdp x tensor": ("", dict(stage=2, fsdp=2, tensor=2)),
    "fsdp x context": ("", dict(fsdp=2, context=4)),
    "fsdp x expert": ("moe", dict(fsdp=2, expert=4)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """(argument, axes) -> the folder of a run on as many devices as the axes take; each run happens once."""
    place = tmp_path_factory.mktemp("post-training")
    rng = random.Random(0)
    pairs = [{"prompt": f"Number {n} of {i}?", "chosen": f"It is {n}.", "rejected": f"No, {rng.randrange(9)}!"}
             for i, n in enumerate(rng.choices(range(100), k=120))]  # fmt: skip
    (place / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (place / "tiny.py").write_text(SCRIPT.replace("PAIRS", repr(str(place / "pairs.jsonl"))))

    def run(arg, axes):
        where = place / "-".join(["run", arg, *axes])
        if not where.exists():
            count = int(np.prod(list(axes.values())))
            env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}
            env |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # it is compilers that these runs wait for
            argv = [sys.executable, "-m", "lmtrain.cli", "run", "--config", f"{place}/tiny.py:{arg}"]
            argv += ["--workdir", where, *(f"--config.mesh.{axis}={size}" for axis, size in axes.items())]
            done = subprocess.run(argv, env=env, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        return where

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_eight_devices_post_train_as_one_does(folder, name):
    arg, axes = MESHES[name]
    one, eight = folder(arg, {}), folder(arg, axes)
    for stage in STAGES:
        a, b = ([json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
                for run in (one, eight))  # fmt: skip
        for number in ("loss", "grad_norm", "reward", "heldout_loss", "heldout_score"):
            expected, got = ([m[number] for m in rows if number in m] for rows in (a, b))
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6, err_msg=f"{stage}: {number}")
        if stage in ("sft", "grpo", "ppo"):
            assert (one / stage / "samples.jsonl").read_text() == (eight / stage / "samples.jsonl").read_text()
        assert max(m.get("grad_norm", 0) for m in a) > 1e-3  # there was something to learn
    assert 0 < np.mean([m["reward"] for m in a if "reward" in m]) < 1
