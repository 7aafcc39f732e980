"""What runs the handlers: workers that take from a Consumer what it has ready, and tell it how each ended."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

from .consumer import Consumer, current, log
from .errors import AlreadySettled, SettleLost
from .model import Delivery, Message
from .pipeline import Call


class Workers:
    """`concurrency` coroutines that run a handler on what a consumer has ready."""

    def __init__(
        self,
        consumer: Consumer,
        call: Call,
        concurrency: int,
        timeout_s: float | None,
        settle_before: bool,
        *,
        blocking: bool = False,
    ) -> None:
        self._consumer = consumer
        self._call = call
        self._concurrency = concurrency
        self._timeout_s = timeout_s
        self._settle_before = settle_before
        self._tasks: list[asyncio.Task[None]] = []
        self._at: dict[asyncio.Task[None] | None, Message[Any]] = {}  # what each worker took last
        self._revoked: set[Message[Any]] = set()
        if not blocking:  # a thread cannot be cancelled: it keeps its lane, and its id is remembered
            consumer.cancel_handlers = self._cancel

    def start(self) -> None:
        work = self._work_plain if self._timeout_s is None and not self._settle_before else self._work_guarded
        self._tasks = [
            asyncio.create_task(self._root(work), name=f"worker {n} {self._consumer.terms.destination.name}")
            for n in range(self._concurrency)
        ]

    def _cancel(self, overdue: set[Delivery[Any]]) -> None:
        for task, message in self._at.items():
            if task is not None and message in overdue:
                self._revoked.add(message)
                task.cancel()

    def _was_revoked(self, message: Message[Any], error: BaseException | None) -> bool:
        """Was its handler cancelled, because another member has it now? Then it is handed back; the worker goes on."""
        if message not in self._revoked:
            return False
        self._revoked.discard(message)
        task = asyncio.current_task()
        if task is not None and task.uncancel() and isinstance(error, asyncio.CancelledError):
            raise error  # the worker itself is to end, too
        self._consumer.hand_over(cast("Delivery[Any]", message))
        return True

    async def _root(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._consumer.fail(error)

    async def _wait_idle(self) -> None:
        """Until there may be something; meanwhile nobody's handler is to be cancelled here."""
        self._at.pop(asyncio.current_task(), None)
        await self._consumer.wait_ready()

    async def _work_plain(self) -> None:
        consumer, call, settles = (
            self._consumer,
            self._call,
            self._consumer.terms.destination.settles,
        )
        at, me = self._at, asyncio.current_task()
        while not consumer.closing and consumer.failure is None:
            message = consumer.next()
            if message is None:
                await self._wait_idle()
                continue
            current.set(message)
            at[me] = message
            try:
                await call(message)
            except (Exception, asyncio.CancelledError) as error:
                if not self._was_revoked(message, error):
                    _only_if_not_ours(error)
                    consumer.failed(message, error)
            else:
                if self._revoked and self._was_revoked(message, None):
                    continue  # it swallowed its cancellation
                if settles:
                    consumer.accept(message)  # type: ignore[arg-type]  # a settling destination yields Deliveries

    async def _work_guarded(self) -> None:
        """With a time limit, or settled before the handler runs: the same, at the price of a timer or a round trip."""
        consumer = self._consumer
        while not consumer.closing and consumer.failure is None:
            message = consumer.next()
            if message is None:
                await self._wait_idle()
                continue
            current.set(message)
            self._at[asyncio.current_task()] = message
            if self._settle_before and isinstance(message, Delivery):
                try:
                    await consumer.ack(message)
                except (SettleLost, AlreadySettled):
                    continue
            try:
                async with asyncio.timeout(self._timeout_s):
                    await self._call(message)
            except (Exception, asyncio.CancelledError) as error:
                if self._was_revoked(message, error):
                    continue
                _only_if_not_ours(error)
                if self._settle_before and isinstance(message, Delivery):
                    consumer.stats.failed += 1
                    consumer.stats.dropped += 1
                    log.warning(
                        "%s: handler failed after settling, dropped: %r",
                        consumer.terms.destination,
                        error,
                    )
                else:
                    consumer.failed(message, error)
            else:
                if isinstance(message, Delivery) and not (self._settle_before or self._was_revoked(message, None)):
                    consumer.accept(message)

    async def stop(self, timeout_s: float) -> None:
        """Let running handlers end for at most `timeout_s`, then cancel them; their messages are handed back."""
        self._consumer.release_takers()
        if not self._tasks:
            return
        _, late = await asyncio.wait(self._tasks, timeout=timeout_s)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late, timeout=min(1.0, timeout_s))  # one that refuses to be cancelled is abandoned


def _only_if_not_ours(error: BaseException) -> None:
    """Raise `error` if it cancels this worker; a CancelledError out of the handler itself is one of its failures."""
    task = asyncio.current_task()
    if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
        raise error
