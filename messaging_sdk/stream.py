"""Pull style: iterate over what arrives and settle it yourself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from types import TracebackType
from typing import Any, Generic, TypeVar, cast

from .consumer import Consumer
from .errors import Closed, UsageError
from .model import Delivery, Message

M = TypeVar("M", bound=Message[Any])


class Stream(Generic[M]):
    """What `bus.consume()` gives: a context manager, and inside it an async iterator of deliveries.

    Leaving the block hands back what is unsettled. One task iterates at a time; `take` and `next` may be cancelled
    without loss. On an ordered destination the next message of a key comes only after the former was settled.
    """

    def __init__(self, start: Callable[[], Awaitable[Consumer]], stop: Callable[[Consumer], Awaitable[None]]) -> None:
        self._start = start
        self._stop = stop
        self._consumer: Consumer | None = None

    async def __aenter__(self) -> Stream[M]:
        if self._consumer is not None:
            raise UsageError("this stream was entered before; call bus.consume() again")
        self._consumer = await self._start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._consumer is not None:
            await self._stop(self._consumer)

    def _ours(self) -> Consumer:
        if self._consumer is None:
            raise UsageError("a stream is used inside `async with bus.consume(...) as stream:`")
        return self._consumer

    def __aiter__(self) -> AsyncIterator[M]:
        return self

    async def __anext__(self) -> M:
        """The next delivery; waits for it. Raises Closed once the stream or its bus is closed, and what stopped it."""
        consumer = self._ours()
        while (message := self._pop(consumer)) is None:
            await consumer.wait_ready()
        return message

    async def next(self, wait_s: float) -> M | None:
        """The next delivery, or None after `wait_s` seconds (0 = only what is here)."""
        found = await self.take(1, wait_s)
        return found[0] if found else None

    async def take(self, max_deliveries: int, wait_s: float) -> list[M]:
        """At least one delivery if one comes within `wait_s`, at most `max_deliveries`, oldest first; [] otherwise.

        Does not wait to fill the list. Raises Closed, and what stopped the consumer.
        """
        if max_deliveries < 1 or wait_s < 0:
            raise UsageError(f"take: needs max_deliveries >= 1 and wait_s >= 0, not {max_deliveries} and {wait_s}")
        consumer = self._ours()
        await asyncio.sleep(0)  # a loop over take() must let the intake work
        found = self._drain(consumer, max_deliveries)  # nothing is awaited behind a drain: cancelling loses nothing
        if found or not wait_s:
            return found
        try:
            async with asyncio.timeout(wait_s):
                while not found:
                    await consumer.wait_ready()
                    found = self._drain(consumer, max_deliveries)
        except TimeoutError:
            pass
        return found

    async def ack(self, deliveries: Iterable[M]) -> None:
        """Ack many with one wait; the first error, if any, is raised after all were sent."""
        await self._ours().ack_all(cast("Iterable[Delivery[Any]]", deliveries))

    def _drain(self, consumer: Consumer, limit: int) -> list[M]:
        found: list[M] = []
        while len(found) < limit and (message := self._pop(consumer)) is not None:
            found.append(message)
        return found

    def _pop(self, consumer: Consumer) -> M | None:
        if consumer.failure is not None:
            if isinstance(consumer.failure, Closed):
                raise Closed(str(consumer.failure))
            raise consumer.failure
        if consumer.closing:  # a backend may take a while to stop; who waits here is told at once
            raise Closed(f"{consumer.terms.destination}: the consumer is closing")
        message = consumer.next()
        if isinstance(message, Delivery):
            message.settler = consumer
        return cast("M | None", message)
