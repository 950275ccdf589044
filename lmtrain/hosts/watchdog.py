"""A thread that ends a run which takes no more steps, with the stacks of all its threads."""

from __future__ import annotations

import faulthandler
import threading
import time
from collections.abc import Callable
from typing import Protocol

HUNG = 77  # exit status: no step for too long. All begin again from the newest checkpoint
TICK = 1.0  # seconds between two looks
KNOWN = 5  # steps that have to be timed before the median is trusted


class Pulse(Protocol):
    """What the watchdog reads (log.Meter): steps so far, their median in seconds, whether they are paused."""

    steps: int
    pausing: bool

    def median(self) -> float | None: ...


class Patience:
    """How long nothing may happen: `multiple` median steps, at least `least` seconds. Counts in its own ticks, so that
    a process which was stopped and goes on, or a laptop that slept, is not thought to hang."""

    def __init__(self, multiple: float, least: float) -> None:
        self.multiple, self.least = multiple, least
        self.quiet = 0.0
        self._steps = -1

    def limit(self, pulse: Pulse) -> float | None:
        """Seconds; None while too few steps were timed to tell, as during the first compilation."""
        median = pulse.median()
        return None if median is None or pulse.steps < KNOWN else max(self.least, self.multiple * median)

    def exhausted(self, pulse: Pulse, elapsed: float) -> bool:
        """True once the limit has passed. `elapsed`: seconds since it was asked before."""
        if pulse.steps != self._steps or pulse.pausing:
            self._steps, self.quiet = pulse.steps, 0.0
            return False
        self.quiet += min(elapsed, 5 * TICK)
        limit = self.limit(pulse)
        return limit is not None and self.quiet > limit


class Watchdog:
    """`with Watchdog(...)`: looks every second, in a thread.

    Args:
      multiple: of the median step; 0: never.
      end: what ends the process, given a message and an exit status.
    """

    def __init__(self, pulse: Pulse, multiple: float, least: float, end: Callable[[str, int], None]) -> None:
        self._pulse, self._patience, self._end = pulse, Patience(multiple, least), end
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True) if multiple else None

    def __enter__(self) -> Watchdog:
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leave.set()
        if self._thread:
            self._thread.join()

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._leave.wait(TICK):
            now = time.monotonic()
            if self._patience.exhausted(self._pulse, now - last):
                faulthandler.dump_traceback(file=2, all_threads=True)
                self._end(
                    f"no step for {self._patience.quiet:.0f} s after step {self._pulse.steps} of this start, which "
                    f"is more than watchdog={self._patience.multiple:g} times the median of "
                    f"{self._pulse.median():.3g} s (and watchdog_least={self._patience.least:g} s). The stacks of all "
                    "threads stand above; the newest checkpoint stands, and the same command goes on from it.",
                    HUNG,
                )
                return
            last = now
