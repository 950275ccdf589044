"""Where compiled programs are kept, so that a second start does not compile."""

from __future__ import annotations

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
