"""lmtrain: raw text to a chat model, in JAX.

    import lmtrain
    run = lmtrain.run("experiments/quickstart.py", workdir="runs/quickstart")
    print(run.metrics[-1]["loss"], run.generate("def "))

Every room can be imported by itself; importing this package alone starts nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmtrain.train import Run as Run
    from lmtrain.train import run as run

__version__ = "0.1.0"
__all__ = ["__version__", "load", "run"]


def __getattr__(name: str) -> Any:
    # JAX takes a second to import: `lmtrain --help` and `import lmtrain.config` should not wait for it.
    if name in ("run", "load", "Run"):
        from lmtrain import experiment

        return getattr(experiment, name)
    raise AttributeError(f"module 'lmtrain' has no attribute {name!r}")
