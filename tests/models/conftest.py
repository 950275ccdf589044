"""Tiny models spend their time in the compiler: these tests ask it for less."""

import jax
import pytest


@pytest.fixture(autouse=True)
def quick_compiles():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
