"""A trace of some steps for xprof: what the devices did when, operation by operation.

lmtrain run ... --config.profile=100:5        five steps, from the 101st on, of every stage that gets there
pip install xprof; xprof --logdir runs/NAME/STAGE/profile
"""

from __future__ import annotations

import pathlib
from typing import Any

import jax

from lmtrain import log
from lmtrain.schema import ConfigError


def parse(text: str) -> tuple[int, int]:
    """ "100:5" -> (100, 5): from which step on, and how many; "" -> (0, 0), none.

    Raises:
      ConfigError: anything else.
    """
    if not text:
        return 0, 0
    first, _, count = text.partition(":")
    if not (first.isdecimal() and count.isdecimal() and int(count)):
        raise ConfigError(f"profile is {text!r}, but takes STEP:COUNT, such as 100:5 (five steps after the 100th).")
    return int(first), int(count)


class Trace:
    """Traces the steps that `ask` names ("100:5") into a folder; process 0's devices, as they stand for the others.

    Nothing of it is left running when the loop ends early: use it in a `with`.
    """

    def __init__(self, ask: str, folder: pathlib.Path) -> None:
        self.first, self.count = parse(ask)
        self.folder, self.running = folder, False

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *why: Any) -> None:
        if self.running:
            self._end()

    def step(self, done: int, result: Any) -> None:
        """Called before each step with how many are done, and what the last one is to give (waited for, so that the
        trace has whole steps)."""
        if not self.count or jax.process_index():
            return
        if self.running and done >= self.first + self.count:
            jax.block_until_ready(result)
            self._end()
        elif not self.running and done == self.first:
            jax.block_until_ready(result)
            jax.profiler.start_trace(str(self.folder))
            self.running = True

    def _end(self) -> None:
        jax.profiler.stop_trace()
        self.running = False
        log.say(f"a trace of steps {self.first + 1} to {self.first + self.count}: xprof --logdir {self.folder}")
