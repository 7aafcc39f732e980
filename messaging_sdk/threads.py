"""A thread of its own for a client whose heartbeat must survive a blocking handler; many posts cost one wake-up."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeVar, cast

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
            try:
                self._loop.call_soon_threadsafe(self._run)
            except RuntimeError:
                self._armed = False  # the next post raises, too
                self._posts.clear()
                raise

    @property
    def is_closed(self) -> bool:
        """The loop was closed: what is posted, or was posted shortly before, never runs."""
        return self._loop.is_closed()

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
        """Run `work` on the thread and block for it, at most `wait_s`. Must not be called on the thread itself.

        A KeyboardInterrupt meanwhile cancels `work`.
        """
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result(wait_s)
        except (KeyboardInterrupt, SystemExit):
            future.cancel()
            raise

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


class Calls:
    """At most `size` daemon threads for a blocking client: calls go out to them, answers come back to the loop.

    Made on the loop that gets the answers, which come one wake-up per burst. Threads start when they are needed.
    Calls begin in the order of `post`; with several threads they may end in another.
    """

    def __init__(self, name: str, size: int) -> None:
        self._name = name
        self._size = size
        self._homeward = Hop(asyncio.get_running_loop())
        self._waiting: SimpleQueue[tuple[Callable[[], Any], Callable[[Any, BaseException | None], object]] | None]
        self._waiting = SimpleQueue()
        self._threads = 0
        self._unanswered = 0
        self._stopped = False

    def post(self, call: Callable[[], T], answer: Callable[[T | None, BaseException | None], object]) -> None:
        """Run `call()` on a thread, then `answer(result, None)` or `answer(None, error)` on the loop. Never blocks.

        Only from the loop's own thread. Raises RuntimeError after `stop`.
        """
        if self._stopped:
            raise RuntimeError(f"{self._name}: its threads were stopped")
        self._unanswered += 1
        self._waiting.put((call, answer))
        if self._threads < min(self._size, self._unanswered):
            self._threads += 1
            threading.Thread(target=self._work, name=f"{self._name}-{self._threads}", daemon=True).start()

    async def run(self, call: Callable[[], T]) -> T:
        """Await `call()`. Cancelling ends the wait at once; the call itself runs to its end and its answer is lost."""
        waiting: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def answer(result: T | None, error: BaseException | None) -> None:
            if waiting.done():
                return
            if error is None:
                waiting.set_result(cast("T", result))
            elif isinstance(error, StopIteration):  # which a future does not take
                waiting.set_exception(RuntimeError(f"the call raised {error!r}"))
            else:
                waiting.set_exception(error)

        self.post(call, answer)
        return await waiting

    def stop(self) -> None:
        """End the threads behind what was posted; does not wait for them."""
        if not self._stopped:
            self._stopped = True
            for _ in range(self._threads):
                self._waiting.put(None)

    def _work(self) -> None:
        while (item := self._waiting.get()) is not None:
            call, answer = item
            result, error = None, None
            try:
                result = call()
            except BaseException as raised:
                error = raised
            with suppress(RuntimeError):  # the loop was closed: nobody waits any more
                self._homeward.post(self._answered, answer, result, error)
            del item, call, answer, result, error  # an idle thread keeps nothing alive

    def _answered(
        self, answer: Callable[[Any, BaseException | None], object], result: Any, error: BaseException | None
    ) -> None:
        self._unanswered -= 1
        answer(result, error)
