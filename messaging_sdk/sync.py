"""The same Bus without `await`, for scripts, Django, Celery and plain threads.

The async Bus runs on a private loop thread; every call here may be made from any thread and costs one hop to it.
`publisher()` is a queue with one wake-up per burst. Handlers are plain functions and run in a thread pool.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from types import TracebackType
from typing import Any, Final, Generic, Self, TypeVar, overload

from . import bus as _async
from .capabilities import Capabilities, Needs
from .config import Settings
from .consumer import OnFailure, Stats
from .destination import Destination, Queue, Signal, Topic
from .errors import Closed, MessagingError, UsageError
from .handlers import Handlers
from .model import Delivery as AsyncDelivery
from .model import Message, Outgoing, Sent
from .pipeline import Middleware
from .publisher import Failed, Outlet
from .replay import Replay as AsyncReplay
from .stream import Stream as AsyncStream
from .threads import LoopThread

T = TypeVar("T")
M = TypeVar("M")

SLACK_S: Final = 5.0  # how much longer than the async call's own bound a thread waits before it gives up
_buses: Final[weakref.WeakSet[Bus]] = weakref.WeakSet()


class Bus(Handlers):
    """See messaging_sdk.Bus: same arguments, names, guarantees and errors. Safe for use by several threads."""

    def __init__(
        self,
        config: str | Mapping[str, Any] | Settings,
        *,
        needs: Needs | None = None,
        middleware: Sequence[Middleware] = (),
        provide: Mapping[str, Callable[[], Any]] | None = None,
        timeout_s: float = 30.0,
    ) -> None:
        super().__init__()
        self._bus = _async.Bus(config, needs=needs, middleware=middleware, provide=provide, timeout_s=timeout_s)
        self.registrations = self._bus.registrations
        self._lock = threading.Lock()
        self._thread: LoopThread | None = None
        _buses.add(self)

    @classmethod
    def from_config(cls, path: str | os.PathLike[str], *, env: str | None = None, **options: Any) -> Bus:
        """See messaging_sdk.Bus.from_config."""
        from .config import from_file

        return cls(from_file(path, env=env or os.environ.get("MESSAGING_ENV")), **options)

    @classmethod
    def from_env(cls, **options: Any) -> Bus:
        """See messaging_sdk.Bus.from_env."""
        from .config import from_env

        return cls(from_env(), **options)

    def declare(self, *destinations: Destination[Any]) -> None:
        """See messaging_sdk.Bus.declare."""
        self._bus.declare(*destinations)

    def include(self, handlers: Handlers) -> None:
        """See messaging_sdk.Bus.include."""
        self._bus.include(handlers)

    def open(self) -> None:
        """See messaging_sdk.Bus.open."""
        self._call(self._bus.open(), self._bus.timeout_s * 4)

    def close(self, timeout_s: float = 10.0) -> None:
        """See messaging_sdk.Bus.close. Ends the loop thread."""
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is None:
            self._bus._state = "closed"  # nothing of this process is open
            return
        try:
            thread.submit(self._bus.close(timeout_s), timeout_s + SLACK_S)
        finally:
            thread.stop()

    def __enter__(self) -> Bus:
        self.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @contextmanager
    def consuming(self, grace_s: float = 10.0) -> Iterator[None]:
        """Run the registered handlers while the block runs. What stops a consumer for good is raised at the end."""
        leave = self._call(_entered(self._bus, grace_s), self._bus.timeout_s * 4)
        try:
            yield
        finally:
            self._call(leave(), grace_s * 2 + SLACK_S)

    def run(self, grace_s: float = 10.0) -> None:
        """See messaging_sdk.Bus.run; must be called on the main thread, on a bus that is not open."""
        if self._thread is not None:
            raise UsageError("run() opens the bus itself; call it on a bus that is not open")
        self._bus.run(grace_s)

    def publish(
        self,
        destination: Destination[T],
        value: T,
        *,
        headers: Mapping[str, str] | None = None,
        id: str | None = None,
        correlation_id: str | None = None,
        delay: float | str | None = None,
        ttl: float | str | None = None,
        priority: int | None = None,
        timeout_s: float | None = None,
    ) -> Sent:
        """See messaging_sdk.Bus.publish."""
        bound = self._bus.timeout_s if timeout_s is None else timeout_s
        sending = self._bus.publish(
            destination, value, headers=headers, id=id, correlation_id=correlation_id, delay=delay, ttl=ttl,
            priority=priority, timeout_s=timeout_s,
        )  # fmt: skip
        return self._call(sending, bound + self._bus.timeout_s)

    def publisher(
        self, destination: Destination[T], *, window: int = 2000, timeout_s: float | None = None
    ) -> Publisher[T]:
        """See messaging_sdk.Bus.publisher; `send` may be called by several threads."""
        return Publisher(self, destination, window, self._bus.timeout_s if timeout_s is None else timeout_s)

    @overload
    def consume(
        self,
        destination: Queue[T] | Topic[T],
        *,
        group: str | None = None,
        window: int | None = None,
        on_failure: OnFailure = "dead_letter",
        max_deliveries: int = 20,
    ) -> Stream[Delivery[T]]: ...
    @overload
    def consume(
        self, destination: Signal[T], *, group: str | None = None, window: int | None = None
    ) -> Stream[Message[T]]: ...
    def consume(
        self,
        destination: Destination[Any],
        *,
        group: str | None = None,
        window: int | None = None,
        on_failure: OnFailure = "dead_letter",
        max_deliveries: int = 20,
    ) -> Stream[Any]:
        """See messaging_sdk.Bus.consume: `with bus.consume(queue) as stream: for d in stream: ...; d.ack()`."""
        stream: AsyncStream[Any] = self._bus.consume(
            destination,
            group=group,
            window=window,
            on_failure=on_failure,
            max_deliveries=max_deliveries,
        )
        return Stream(self, stream)

    def replay(self, topic: Topic[T], *, since: datetime | str = "start") -> Replay[T]:
        """See messaging_sdk.Bus.replay: `with bus.replay(topic) as history: for message in history: ...`."""
        return Replay(self, self._bus.replay(topic, since=since))

    def lag(self, destination: Destination[Any], group: str | None = None) -> int:
        """See messaging_sdk.Bus.lag."""
        return self._call(self._bus.lag(destination, group), self._bus.timeout_s * 4)

    def capabilities(self, destination: Destination[Any]) -> Capabilities:
        """See messaging_sdk.Bus.capabilities."""
        return self._bus.capabilities(destination)

    def promises(self) -> list[_async.Promise]:
        """See messaging_sdk.Bus.promises."""
        return self._bus.promises()

    def stats(self, destination: Destination[Any], group: str | None = None) -> Stats:
        """See messaging_sdk.Bus.stats."""
        return self._bus.stats(destination, group)

    @property
    def idle(self) -> bool:
        """See messaging_sdk.Bus.idle."""
        return self._bus.idle

    def held(self, destination: Destination[Any]) -> int:
        """See messaging_sdk.Bus.held."""
        return self._bus.held(destination)

    def __repr__(self) -> str:
        return f"sync.{self._bus!r}"

    def _home(self) -> LoopThread:
        """The loop thread, started on first use; a forked child gets one of its own."""
        thread = self._thread
        if thread is None:
            with self._lock:
                thread = self._thread = self._thread or LoopThread("messaging-bus")
        return thread

    def _forked(self) -> None:
        """In the child of a fork: the thread was not copied, and nobody is left to let go of the lock."""
        self._lock, self._thread = threading.Lock(), None

    def _call(self, work: Coroutine[Any, Any, M], wait_s: float | None) -> M:
        thread = self._home()
        if threading.current_thread() is thread.thread:
            work.close()
            raise UsageError("messaging_sdk.sync was called on its own loop thread; use the async Bus there")
        return thread.submit(work, None if wait_s is None else wait_s + SLACK_S)


def _after_fork() -> None:
    for bus in list(_buses):
        bus._forked()


os.register_at_fork(after_in_child=_after_fork)


async def _entered(bus: _async.Bus, grace_s: float) -> Callable[[], Coroutine[Any, Any, None]]:
    """Enter `bus.consuming()` in a task of its own; return what leaves it."""
    listening, leave = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        async with bus.consuming(grace_s):
            listening.set()
            await leave.wait()

    task = asyncio.create_task(hold())
    waiting = asyncio.create_task(listening.wait())
    await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if task.done():
        await task

    async def left() -> None:
        leave.set()
        await task

    return left


class Publisher(Generic[T]):
    """Windowed publishing from threads: `send` waits only while `window` are out. See messaging_sdk.Publisher."""

    def __init__(self, bus: Bus, destination: Destination[T], window: int, timeout_s: float) -> None:
        if not isinstance(window, int) or window < 1:
            raise UsageError(f"publisher: window must be a whole number from 1, not {window!r}")
        self.sent = 0
        self.failed: list[Failed] = []
        self._bus = bus
        self._destination = destination
        self._window = window
        self._timeout_s = timeout_s
        self._room = threading.Condition()
        self._out = 0
        self._outlet: Outlet[T] | None = None

    def __enter__(self) -> Publisher[T]:
        self._home = self._bus._home()
        self._outlet = self._bus._call(self._bus._bus._outlet(self._destination), self._bus._bus.timeout_s * 4)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.flush()
        finally:
            self._outlet = None

    def send(
        self,
        value: T,
        *,
        headers: Mapping[str, str] | None = None,
        id: str | None = None,
        correlation_id: str | None = None,
        delay: float | str | None = None,
        ttl: float | str | None = None,
        priority: int | None = None,
    ) -> str:
        """Queue one message and return its id. Raises what `publish` raises before sending."""
        outlet = self._outlet
        if outlet is None:
            raise UsageError("a publisher is used inside `with bus.publisher(...) as p:`")
        message = outlet.encode(value, headers, id, correlation_id, delay, ttl, priority)
        with self._room:
            if not self._room.wait_for(lambda: self._out < self._window, self._timeout_s + SLACK_S):
                raise Closed("no room in the window: the bus was closed")
            self._out += 1
            message.waiter = self
            message.deadline_s = self._home.loop.time() + self._timeout_s
            self._home.inward.post(outlet.batcher.submit, message)  # inside the lock: order of send = order of submit
        return message.id

    def flush(self) -> None:
        """Wait until all sent so far have an outcome: at most the timeout."""
        with self._room:
            if not self._room.wait_for(lambda: self._out == 0, self._timeout_s + SLACK_S):
                raise Closed("messages have no outcome: the bus was closed")

    def accepted(self, count: int) -> None:
        """The batcher's call, on the loop thread."""
        with self._room:
            self._out -= count
            self.sent += count
            self._room.notify_all()

    def refused(self, message: Outgoing, error: MessagingError) -> None:
        """The batcher's call, on the loop thread."""
        with self._room:
            self._out -= 1
            self.failed.append(Failed(message.id, error))
            self._room.notify_all()


class Delivery(Generic[T]):
    """A messaging_sdk.Delivery whose verbs block. Everything else is read through."""

    def __init__(self, bus: Bus, delivery: AsyncDelivery[T]) -> None:
        self._bus = bus
        self._delivery = delivery
        self.data: T = delivery.data
        self.body = delivery.body
        self.key = delivery.key
        self.attempt = delivery.attempt
        self.deliveries = delivery.deliveries
        self.redelivered = delivery.redelivered

    @property
    def id(self) -> str:
        """See messaging_sdk.Message.id."""
        return self._delivery.id

    @property
    def headers(self) -> Mapping[str, str]:
        """See messaging_sdk.Message.headers."""
        return self._delivery.headers

    @property
    def provenance(self) -> Mapping[str, str]:
        """See messaging_sdk.Message.provenance."""
        return self._delivery.provenance

    @property
    def correlation_id(self) -> str | None:
        """See messaging_sdk.Message.correlation_id."""
        return self._delivery.correlation_id

    @property
    def content_type(self) -> str | None:
        """See messaging_sdk.Message.content_type."""
        return self._delivery.content_type

    @property
    def created_s(self) -> float | None:
        """See messaging_sdk.Message.created_s."""
        return self._delivery.created_s

    @property
    def settled(self) -> bool:
        """Was it settled, or handed back?"""
        return self._delivery.settled

    def ack(self) -> None:
        """See messaging_sdk.Delivery.ack."""
        self._bus._call(self._delivery.ack(), self._bus._bus.timeout_s)

    def retry(self, after_s: float = 0.0) -> None:
        """See messaging_sdk.Delivery.retry."""
        self._bus._call(self._delivery.retry(after_s), self._bus._bus.timeout_s)

    def reject(self, reason: str) -> None:
        """See messaging_sdk.Delivery.reject."""
        self._bus._call(self._delivery.reject(reason), self._bus._bus.timeout_s)

    def release(self) -> None:
        """See messaging_sdk.Delivery.release."""
        self._bus._call(self._delivery.release(), self._bus._bus.timeout_s)

    def __repr__(self) -> str:
        return repr(self._delivery)


class _Block:
    """A block of the async face, entered and left on the loop thread."""

    def __init__(self, bus: Bus, inner: AsyncStream[Any] | AsyncReplay[Any]) -> None:
        self._bus = bus
        self._inner = inner

    def __enter__(self) -> Self:
        self._bus._call(self._inner.__aenter__(), self._bus._bus.timeout_s * 4)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bus._call(self._inner.__aexit__(None, None, None), 10.0)


class Stream(_Block, Generic[M]):
    """See messaging_sdk.Stream."""

    def __init__(self, bus: Bus, stream: AsyncStream[Any]) -> None:
        super().__init__(bus, stream)
        self._stream = stream

    def __iter__(self) -> Iterator[M]:
        while True:
            yield self._wrapped(self._bus._call(self._stream.__anext__(), None))

    def next(self, wait_s: float) -> M | None:
        """See messaging_sdk.Stream.next."""
        found = self.take(1, wait_s)
        return found[0] if found else None

    def take(self, max_deliveries: int, wait_s: float) -> list[M]:
        """See messaging_sdk.Stream.take."""
        found = self._bus._call(self._stream.take(max_deliveries, wait_s), wait_s)
        return [self._wrapped(m) for m in found]

    def ack(self, deliveries: Iterable[M]) -> None:
        """See messaging_sdk.Stream.ack."""
        mine = [d._delivery for d in deliveries if isinstance(d, Delivery)]
        self._bus._call(self._stream.ack(mine), self._bus._bus.timeout_s)

    def _wrapped(self, message: Any) -> M:
        wrapped: Any = Delivery(self._bus, message) if isinstance(message, AsyncDelivery) else message
        return wrapped  # type: ignore[no-any-return]  # M is Delivery[T] or Message[T] by the overloads of consume


class Replay(_Block, Generic[T]):
    """See messaging_sdk.Replay."""

    def __init__(self, bus: Bus, replay: AsyncReplay[T]) -> None:
        super().__init__(bus, replay)
        self._replay = replay

    def __iter__(self) -> Replay[T]:
        return self

    def __next__(self) -> Message[T]:
        """See messaging_sdk.Replay.__anext__."""
        message = self._bus._call(self._next(), None)
        if message is None:
            raise StopIteration
        return message

    async def _next(self) -> Message[T] | None:
        return await anext(self._replay, None)

    @property
    def position(self) -> str:
        """See messaging_sdk.Replay.position."""
        return self._replay.position
