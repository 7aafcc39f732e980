"""Runs one coroutine in an event loop of its own and always comes back, whatever it does."""

from __future__ import annotations

import asyncio
import io
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final, TypeVar

T = TypeVar("T")

GRACE_S: Final = 5.0
"""What a cancelled task may take to end; one that takes longer swallows its cancellation."""
BLOCKED_S: Final = 20.0
"""How long past its limit a loop may be blocked by synchronous code before a signal breaks it up."""


class CaseTimeout(AssertionError):
    """The case did not end within its limit; the text shows where it waits."""


def drive(
    main: Coroutine[Any, Any, T],
    *,
    limit_s: float,
    cleanup: Callable[[], Coroutine[Any, Any, None]] | None = None,
    complain: Callable[[str], None] = lambda text: None,
) -> T:
    """Run `main` to its end, then `cleanup`, then cancel what they left behind; return main's result.

    Raises what `main` raises, and CaseTimeout after `limit_s`. `complain` is told of everything
    that is wrong but no failure of the case: exceptions nobody fetched, tasks that do not end.
    """
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda _, context: complain(_described(context)))
    try:
        with _alarm(limit_s + GRACE_S + BLOCKED_S):
            try:
                return loop.run_until_complete(_bounded(main, limit_s))
            finally:
                loop.run_until_complete(_cleaned(cleanup, complain))
    finally:
        # Not shutdown_default_executor: it joins threads, and a handler under test may block one.
        loop.close()


async def _bounded(main: Coroutine[Any, Any, T], limit_s: float) -> T:
    task = asyncio.ensure_future(main)
    try:
        await asyncio.wait({task}, timeout=limit_s)
        if task.done():
            return task.result()
        where = io.StringIO()
        task.print_stack(file=where)
        raise CaseTimeout(f"not done after {limit_s:g} s\n{where.getvalue()}")
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=GRACE_S)


async def _cleaned(cleanup: Callable[[], Coroutine[Any, Any, None]] | None, complain: Callable[[str], None]) -> None:
    if cleanup is not None:
        try:
            await _bounded(cleanup(), 30.0)
        except Exception as error:
            complain(f"cleaning up: {error!r}")
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    if left:
        _, stuck = await asyncio.wait(left, timeout=GRACE_S)
        for task in stuck:
            complain(f"task {task!r} does not end when it is cancelled")
    await asyncio.get_running_loop().shutdown_asyncgens()


def _described(context: dict[str, Any]) -> str:
    text = str(context.get("message", "the event loop complains"))
    error = context.get("exception")
    return f"{text}: {error!r}" if error is not None else text


@contextmanager
def _alarm(after_s: float) -> Iterator[None]:
    """Break up synchronous code that blocks the loop; only where signals can be had."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def ring(_number: int, _frame: FrameType | None) -> None:
        raise CaseTimeout(f"the event loop was blocked for more than {BLOCKED_S:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, after_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
