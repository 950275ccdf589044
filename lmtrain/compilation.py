"""Where compiled programs are kept, so that a second start does not compile; and how long compiling took."""

from __future__ import annotations

import functools
import hashlib
import pathlib

import jax


def use_cache() -> None:
    """Keeps compiled programs in ~/.cache/lmtrain, apart for each kind of CPU; JAX_COMPILATION_CACHE_DIR moves it."""
    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        cpu = pathlib.Path("/proc/cpuinfo")
        flags = next((x for x in cpu.read_text().splitlines() if x.startswith("flags")), "") if cpu.exists() else ""
        kind = hashlib.sha256(flags.encode()).hexdigest()[:8]
        jax.config.update(
            "jax_compilation_cache_dir", str(pathlib.Path("~/.cache/lmtrain").expanduser() / f"xla-{kind}")
        )
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@functools.cache  # JAX tells each listener of every event, so there is one
def spent() -> dict[str, float]:
    """compile_seconds and cache_hits (programs found in the cache) of this process, counted from the first call on."""
    counts = {"compile_seconds": 0.0, "cache_hits": 0.0}

    def lasted(event: str, duration_secs: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            counts["compile_seconds"] += duration_secs

    def happened(event: str, **_: object) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            counts["cache_hits"] += 1

    jax.monitoring.register_event_duration_secs_listener(lasted)
    jax.monitoring.register_event_listener(happened)
    return counts
