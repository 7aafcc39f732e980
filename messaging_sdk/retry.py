"""The retry policy of a handler, and the jittered back-off with which core reopens connections."""

from __future__ import annotations

import random
from dataclasses import dataclass

from .config import seconds
from .errors import UsageError


@dataclass(frozen=True, slots=True, init=False)
class Retry:
    """How often and how far apart a failing handler runs. `attempts` counts all runs, so 1 means no retry.

    The delay before run n+1 is `delay * factor**(n-1)`, at most `max`, varied by up to `jitter` (0.1 = ten percent)
    either way. The message is held meanwhile: it stays unsettled in this process and its lease is extended.
    """

    attempts: int
    delay_s: float
    factor: float
    max_s: float
    jitter: float

    def __init__(
        self,
        attempts: int = 5,
        delay: float | str = "100ms",
        *,
        factor: float = 2.0,
        max: float | str = "1m",
        jitter: float = 0.1,
    ) -> None:
        if not isinstance(attempts, int) or attempts < 1:
            raise UsageError(f"Retry: attempts must be a whole number from 1, not {attempts!r}")
        if factor < 1 or not 0 <= jitter < 1:
            raise UsageError(f"Retry: factor must be >= 1 and jitter in [0, 1), not {factor!r} and {jitter!r}")
        object.__setattr__(self, "attempts", attempts)
        object.__setattr__(self, "delay_s", seconds(delay, "Retry.delay"))
        object.__setattr__(self, "factor", factor)
        object.__setattr__(self, "max_s", seconds(max, "Retry.max"))
        object.__setattr__(self, "jitter", jitter)

    def wait_s(self, attempt: int) -> float:
        """Seconds to wait after failed run number `attempt` (from 1)."""
        exponent = min(attempt - 1, 60)  # far beyond any max; keeps the power finite
        wait = min(self.delay_s * self.factor**exponent, self.max_s)
        return wait * (1 + self.jitter * random.uniform(-1, 1)) if self.jitter else wait

    def total_s(self) -> float:
        """The longest that all delays together can take: it must fit the destination's hold."""
        return sum(
            min(self.delay_s * self.factor ** min(n, 60), self.max_s) * (1 + self.jitter)
            for n in range(self.attempts - 1)
        )


class Backoff:
    """Seconds between attempts to reopen: doubling from 0.05 s (a dropped connection heals at once) to 5 s (a broker
    that is down is not hammered), each anywhere in the upper half so that clients do not return in step."""

    __slots__ = ("_next_s",)
    FIRST_S = 0.05
    LAST_S = 5.0

    def __init__(self) -> None:
        self._next_s = self.FIRST_S

    def wait_s(self) -> float:
        wait = self._next_s
        self._next_s = min(wait * 2, self.LAST_S)
        return wait * random.uniform(0.5, 1.0)

    def reset(self) -> None:
        self._next_s = self.FIRST_S
