"""Eight fake CPU devices for every test, and a compiler that does less: tiny models spend their time in it.

`make test-gpu` sets LMTRAIN_TEST_DEVICE=gpu: then neither, and tests/test_gpu.py is what should be run.
"""

import os

import jax

if os.environ.get("LMTRAIN_TEST_DEVICE") != "gpu":
    os.environ["JAX_PLATFORMS"] = "cpu"  # for the processes that tests start
    jax.config.update("jax_platforms", "cpu")
    flags = os.environ.get("XLA_FLAGS", "")
    if "host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()
    jax.config.update("jax_disable_most_optimizations", True)
