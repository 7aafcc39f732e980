"""A thread of its own for a client whose heartbeat must survive a blocking handler; many posts cost one wake-up."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


class Hop:
    """One direction between two threads: `post` from anywhere, run in order on `loop`, one armed wake-up per burst."""

    __slots__ = ("_armed", "_loop", "_posts")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._posts: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._armed = False

    def post(self, call: Callable[..., object], *args: Any) -> None:
        """Run `call(*args)` on the loop, after everything posted before. Raises RuntimeError if the loop is closed."""
        self._posts.append((call, args))
        if not self._armed:  # a lost race only wakes the loop twice
            self._armed = True
            self._loop.call_soon_threadsafe(self._run)

    def _run(self) -> None:
        self._armed = False  # before the drain: a post after the last popleft arms again
        posts = self._posts
        while posts:
            call, args = posts.popleft()
            try:
                call(*args)
            except Exception as error:  # one bad post must not eat the ones behind it
                self._loop.call_exception_handler({"message": "a posted call failed", "exception": error})


class LoopThread:
    """A daemon thread that runs an event loop until `stop`."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self.inward = Hop(self.loop)
        self.thread = threading.Thread(target=self._main, name=name, daemon=True)
        self.thread.start()

    def _main(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
        finally:
            with suppress(Exception):
                self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.close()

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on the thread and await it from the caller's loop. Cancelling the wait cancels `work`."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self.loop))

    def submit(self, work: Coroutine[Any, Any, T], wait_s: float | None = None) -> T:
        """Run `work` on the thread and block for it, at most `wait_s`. Must not be called on the thread itself."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(wait_s)

    @property
    def is_alive(self) -> bool:
        return self.thread.is_alive()

    def stop(self, wait_s: float = 2.0) -> bool:
        """End the loop; True if the thread ended within `wait_s`. Safe to call twice."""
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.loop.stop)
        if threading.current_thread() is not self.thread:
            self.thread.join(wait_s)
        return not self.thread.is_alive()
