"""Runs the coroutine of one law, and waits for a condition instead of for a time."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_numbers = itertools.count()


class Stuck(BaseException):
    """Synchronous code kept the loop from turning; no `except Exception` may swallow it."""


def drive(main: Coroutine[Any, Any, T], limit_s: float = 15.0) -> T:
    """Run `main` on a fresh loop, at most `limit_s`; what the loop itself complains of fails the test too."""
    complaints: list[str] = []

    async def bounded() -> T:
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: complaints.append(f"{context.get('message')}: {context.get('exception')!r}")
        )
        return await asyncio.wait_for(main, limit_s)

    def ring(number: int, frame: object) -> None:
        raise Stuck(f"the loop was blocked for more than {limit_s:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, limit_s + 5, 1.0)  # again and again: whoever catches it may go on
    try:
        result = asyncio.run(bounded())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not complaints, complaints
    return result


async def eventually(condition: Callable[[], object], what: str = "the condition", wait_s: float = 5.0) -> None:
    """Return as soon as `condition()` is true; AssertionError after `wait_s`."""
    deadline = time.monotonic() + wait_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not hold within {wait_s:g} s")
        await asyncio.sleep(0.001)


async def turns(count: int = 20) -> None:
    """Let everything that is ready on the loop run: for laws that say that something does not happen."""
    for _ in range(count):
        await asyncio.sleep(0)


def fresh(stem: str = "law") -> str:
    """A name nobody else in this process uses."""
    return f"{stem}-{os.getpid()}-{next(_numbers)}"
