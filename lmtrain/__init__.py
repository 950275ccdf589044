"""lmtrain: raw text to a chat model, in JAX.

    import lmtrain
    run = lmtrain.run("experiments/quickstart.py", workdir="runs/quickstart")
    print(run.metrics[-1]["loss"], run.generate("def "))

Every room can be imported by itself; importing this package alone starts nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmtrain.experiment import run as run
    from lmtrain.runs import Run as Run
    from lmtrain.runs import load as load
    from lmtrain.types import LmtrainError as LmtrainError

__version__ = "0.1.0"
__all__ = ["LmtrainError", "Run", "__version__", "load", "run"]


def __getattr__(name: str) -> Any:
    # JAX takes a second to import: `lmtrain --help` and `import lmtrain.config` should not wait for it.
    if name == "run":
        from lmtrain.experiment import run

        return run
    if name in ("load", "Run"):
        from lmtrain import runs

        return getattr(runs, name)
    if name == "LmtrainError":
        from lmtrain.types import LmtrainError

        return LmtrainError
    raise AttributeError(f"module 'lmtrain' has no attribute {name!r}")
