"""`lmtrain bench`: the speed of this machine on this code, as a share of a matmul ceiling taken in the same run."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmtrain import compilation, engine, log, optim, schema, step
from lmtrain import mesh as mesh_lib
from lmtrain.models import attention as attention_lib
from lmtrain.models import presets, transformer
from lmtrain.objectives import pretrain
from lmtrain.types import LmtrainError

#: preset -> rows, positions of a row, microbatches, rematerialisation
BATCHES = {"S": (16, 256, 8, "none"), "M": (4, 512, 4, "none"), "1b": (32, 2048, 2, "dots")}
WARMUP = 2
VOCABULARY = 65536  # of presets that leave it to the tokenizer


def train(
    preset: str = "S", rows: int = 0, row_length: int = 0, accumulate: int = 0, steps: int = 6,
    attention: str = "auto", remat: str = "", optimizer: str = "adamw", cache: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Times whole training steps (forward, backward, optimizer) on random tokens, one document a row.

    Prints a table and, last, one line of JSON; returns what the line holds. 0 and "" take the preset's own values.
    """
    for name, value, low in (("steps", steps, 1), ("rows", rows, 0), ("row-length", row_length, 0),
                             ("accumulate", accumulate, 0)):  # fmt: skip
        if not low <= value < 1 << 31:
            raise LmtrainError(f"--{name} is {value}, but takes at least {low}.")
    if cache:
        compilation.use_cache()
    b, t, a, r = BATCHES.get(preset, (8, 1024, 1, "none"))
    rows, row_length, accumulate = rows or b, row_length or t, accumulate or a
    cfg = dataclasses.replace(presets.get(preset), attention=attention, remat=remat or r)
    cfg = transformer.resolve(cfg, cfg.vocab_size or VOCABULARY)
    mesh = mesh_lib.make(schema.Mesh())
    if rows % (accumulate * mesh.size):
        raise LmtrainError(
            f"--rows {rows} does not divide into {accumulate} microbatches (--accumulate) on {mesh.size} devices."
        )
    forward, axes = transformer.Forward(cfg, mesh), transformer.axes(cfg)
    tx, schedule = optim.make(schema.Optim(name=optimizer, lr=3e-4, weight_decay=0.1), 1000, axes, mesh)
    start, abstract = step.make_init(lambda key: transformer.init(cfg, key), tx, axes, mesh)
    update = step.make_update(pretrain.pretrain, forward, tx, schedule, abstract, mesh, pretrain.Pretrain(), accumulate)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (rows, row_length + 1), dtype=np.int32)
    batch = mesh_lib.put(
        {
            "tokens_BT": tokens[:, :-1],
            "targets_BT": tokens[:, 1:],
            "weights_BT": np.ones((rows, row_length), np.float32),
        },
        mesh,
    )
    state = start(jax.random.key(0))
    state, metrics = update(state, batch)
    first_loss = float(metrics["loss"])
    first_step = process_age()
    for _ in range(WARMUP - 1):
        state, metrics = update(state, batch)
    float(metrics["loss"])
    seconds = []
    with log.Progress(steps, 0, name=f"bench {preset}") as progress:
        for i in range(steps):
            begin = time.perf_counter()
            state, metrics = update(state, batch)
            loss = float(metrics["loss"])
            seconds.append(time.perf_counter() - begin)
            progress.show(i + 1, {"loss": loss, "tokens_per_second": rows * row_length / seconds[-1]})
    peak = log.peak_flops()
    peak_mb = peak_memory_mb()  # before the ceiling's own matrices
    ceiling = log.matmul_ceiling(forward.dtype.name) * (mesh.size if peak else 1)
    backend = attention_lib.choose(
        cfg.attention, attention_lib.platform(mesh), length=row_length, head_dim=cfg.head_dim,
        softcap=cfg.attn_softcap, dtype=forward.dtype, mesh=mesh,
    )  # fmt: skip
    rate = rows * row_length / statistics.median(seconds)
    flops = rate * transformer.flops_per_token(cfg, row_length)
    result = {
        "bench": "train", "preset": preset, "jax": jax.__version__, "device": jax.devices()[0].device_kind,
        "devices": mesh.size, "dtype": forward.dtype.name, "attention": backend, "optimizer": optimizer,
        "parameters": transformer.count(cfg)["total"], "rows": rows, "row_length": row_length, "accumulate": accumulate,
        "tokens_per_second": round(rate), "tokens_per_second_best": round(rows * row_length / min(seconds)),
        "gflops": round(flops / 1e9, 1), "ceiling_gflops": round(ceiling / 1e9, 1), "share": round(flops / ceiling, 3),
        "mfu": round(flops / (peak * mesh.size), 3) if peak else None,
        "first_step_s": round(first_step, 1), "peak_mb": peak_mb, "loss": [round(first_loss, 4), round(loss, 4)],
    }  # fmt: skip
    for name in ("parameters", "tokens_per_second", "gflops", "ceiling_gflops", "share", "first_step_s", "peak_mb"):
        log.say(f"    {name:<20} {result[name]:>14,}")
    log.say(
        f"lmtrain bench: {preset}, {result['tokens_per_second']:,} tokens/s on {mesh.size} x {result['device']}; "
        "as JSON:"
    )
    print(json.dumps(result), flush=True)
    return result


def generate(
    preset: str = "S", batches: str = "1,32", new: int = 128, prompt: int = 16, reps: int = 3,
    temperature: float = 0.0, cache: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Times replies of `new` tokens to random prompts of `prompt` tokens, at several numbers of prompts at once.

    A share is that of the faster of two ceilings taken in the same run: the time to read the weights and the keys and
    values once a step, and the time to multiply. Prints a table and, last, one line of JSON; returns what it holds.
    """
    try:
        sizes = [int(b) for b in batches.split(",")]
    except ValueError:
        raise LmtrainError(f"--batches is {batches!r}, but takes whole numbers with commas between: 1,32.") from None
    for name, value in (("new", new), ("prompt", prompt), ("reps", reps), ("batches", min(sizes))):
        if not 1 <= value < 1 << 20:
            raise LmtrainError(f"--{name} is {value}, but takes at least 1.")
    if cache:
        compilation.use_cache()
    cfg = presets.get(preset)
    cfg = transformer.resolve(cfg, cfg.vocab_size or VOCABULARY)
    mesh = mesh_lib.make(schema.Mesh()) if jax.device_count() > 1 else None
    shardings = None if mesh is None else mesh_lib.shardings(transformer.axes(cfg), mesh)
    params = jax.jit(lambda key: transformer.init(cfg, key), out_shardings=shardings)(jax.random.key(0))
    dtype = transformer.Forward(cfg, mesh).dtype
    begin = time.perf_counter()
    ready = jax.block_until_ready(engine.Engine(cfg, mesh).prepare(params))
    prepare_s = time.perf_counter() - begin
    by_batch: dict[str, dict[str, Any]] = {}
    for b in sizes:
        rng = np.random.default_rng(b)
        how = engine.Sampling(new, temperature)
        requests = [(rng.integers(1, cfg.vocab_size, prompt).tolist(), how.numbered(i)) for i in range(b)]
        player, seconds = engine.Engine(cfg, mesh, slots=b), []
        for _ in range(1 + reps):
            begin = time.perf_counter()
            done = player.run(ready, requests)
            seconds.append(time.perf_counter() - begin)
        assert all(len(c.tokens) == new for c in done)
        rates = sorted(b * new / s for s in seconds[1:])
        by_batch[str(b)] = {"tokens_per_second": round(statistics.median(rates)), "min": round(rates[0]),
                            "max": round(rates[-1]), "first_call_s": round(seconds[0], 2)}  # fmt: skip
    peak_mb = peak_memory_mb()  # before the ceilings' own matrices
    devices = 1 if mesh is None else mesh.size
    flops = log.matmul_ceiling(dtype.name) * (devices if log.peak_flops() else 1)
    bandwidth = memory_ceiling(dtype.name) * (devices if log.peak_flops() else 1)
    for b in sizes:
        row = by_batch[str(b)]
        length = prompt + new / 2  # of a row, on average
        weights = transformer.flops_per_token(cfg, 0) / 6  # in products, each of which a token uses once
        kept = 2 * cfg.layers * cfg.kv_heads * cfg.head_dim * length  # keys and values of a row
        floors = {"memory": (weights + b * kept) * dtype.itemsize / bandwidth,
                  "matmul": b * transformer.flops_per_token(cfg, round(length)) / 3 / flops}  # fmt: skip
        row["bound"] = max(floors, key=lambda name: floors[name])
        row["share"] = round(floors[row["bound"]] * row["tokens_per_second"] / b, 3)
    result = {
        "bench": "generate", "preset": preset, "jax": jax.__version__, "device": jax.devices()[0].device_kind,
        "devices": devices, "dtype": dtype.name, "parameters": transformer.count(cfg)["total"], "prompt": prompt,
        "new": new, "temperature": temperature, "by_batch": by_batch, "bandwidth_gbs": round(bandwidth / 1e9, 1),
        "ceiling_gflops": round(flops / 1e9, 1), "prepare_s": round(prepare_s, 2), "peak_mb": peak_mb,
    }  # fmt: skip
    log.say(f"    {'prompts':>7} {'tokens/s':>10} {'min':>8} {'max':>8} {'ms a token':>11}   share of a ceiling")
    for b in sizes:
        row = by_batch[str(b)]
        log.say(f"    {b:>7} {row['tokens_per_second']:>10,} {row['min']:>8,} {row['max']:>8,} "
                f"{1e3 * b / row['tokens_per_second']:>11.2f}   {row['share']:.3f} ({row['bound']})")  # fmt: skip
    log.say(f"lmtrain bench: {preset}, {new} tokens after {prompt}, on {devices} x {result['device']}, memory "
            f"{result['bandwidth_gbs']} GB/s, matmul {result['ceiling_gflops']} GFLOP/s; as JSON:")  # fmt: skip
    print(json.dumps(result), flush=True)
    return result


def memory_ceiling(dtype: str, seconds: float = 0.5) -> float:
    """Bytes a second that one device reads here and now, in products of a large matrix and a vector: the best."""
    size = 8192 if jax.default_backend() == "cpu" else 32768
    matrix, vector = jnp.ones((size, size), dtype), jnp.ones(size, dtype)
    product = jax.jit(jnp.matmul)
    product(matrix, vector).block_until_ready()
    best, end = 0.0, time.monotonic() + seconds
    while time.monotonic() < end:
        begin = time.perf_counter()
        product(matrix, vector).block_until_ready()
        best = max(best, matrix.nbytes / (time.perf_counter() - begin))
    return best


def process_age() -> float:
    """Seconds since this process was started, imports and compilation included (Linux; elsewhere since import)."""
    try:
        with open("/proc/self/stat") as f:
            ticks = int(f.read().rsplit(")", 1)[1].split()[19])
        with open("/proc/uptime") as f:
            return float(f.read().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    except OSError:
        return time.process_time()


def peak_memory_mb() -> int:
    """Most memory used so far: of the device where it says, else of the process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"] >> 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
