"""The way of a message to its Sender: flush at once when idle, batch what queued up meanwhile, resend what is unsure.

One Batcher per destination. Its connection comes and goes; a message stays until it has an outcome or its deadline
passes. Order of acceptance is the order of `submit`.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any, Final

from .errors import Closed, ConnectionLost, DeadlineExceeded, MessagingError, Outcome
from .model import Outgoing, SendResult, indeterminate, rejected
from .retry import Backoff
from .spi import Outcomes, Sender

log: Final = logging.getLogger("messaging_sdk")


class _Batch:
    __slots__ = ("left", "messages", "serial")

    def __init__(self, messages: list[Outgoing], serial: int) -> None:
        self.messages = messages
        self.serial = serial
        self.left = len(messages)


class Batcher:
    """`submit` takes a message whose `waiter` is a Future[SendResult], or has `accepted(count)` and
    `refused(message, error)`."""

    def __init__(self, name: str, open_sender: Callable[[], Awaitable[Sender]]) -> None:
        self._name = name
        self._open_sender = open_sender
        self._loop = asyncio.get_running_loop()
        self._sender: Sender | None = None
        self._max_batch = 1
        self._opening: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._pending: deque[Outgoing] = deque()
        self._in_flight: list[_Batch] = []
        self._resend: list[tuple[int, list[Outgoing]]] = []
        self._serial = 0
        self._armed = False
        self._flushing = False
        self._timer: asyncio.TimerHandle | None = None
        self._due_s = math.inf
        self._idle = asyncio.Event()
        self._idle.set()
        self._last_error: MessagingError | None = None
        self._closed = False

    @property
    def unresolved(self) -> int:
        """Messages without an outcome."""
        resend = sum(len(messages) for _, messages in self._resend)
        return len(self._pending) + resend + sum(b.left for b in self._in_flight)

    def submit(self, message: Outgoing) -> None:
        """Queue `message`; never blocks. Its waiter gets exactly one result, by `message.deadline_s` at the latest."""
        pending = self._pending
        pending.append(message)
        if message.deadline_s < self._due_s:
            self._watch(message.deadline_s)
        sender = self._sender
        if sender is None:
            self._reopen()
        elif not self._in_flight:
            self._send()
        elif len(self._in_flight) < sender.max_in_flight:
            if len(pending) >= self._max_batch:  # a loop that never suspends still flushes, by chunk
                self._send()
            elif not self._armed:
                self._armed = True
                self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._armed = False
        if self._flushing:  # an outcome that came inside send_batch: the loop below goes on, not one call in another
            return
        self._flushing = True
        try:
            while (sender := self._sender) and self._pending and len(self._in_flight) < sender.max_in_flight:
                if not self._send():
                    break
        finally:
            self._flushing = False
        if not self._in_flight and not self._resend:
            if not self._pending:
                self._idle.set()
            elif self._sender is None:
                self._reopen()

    def _send(self) -> bool:
        sender, pending = self._sender, self._pending
        if sender is None or self._resend:
            return False
        if len(pending) == 1 and not _gone(pending[0]):  # the common case of one awaited publish
            batch = [pending.popleft()]
        else:
            batch = self._cut(sender)
            if not batch:
                return bool(pending)
        self._serial += 1
        entry = _Batch(batch, self._serial)
        self._in_flight.append(entry)
        if self._idle.is_set():
            self._idle.clear()
        try:
            sender.send_batch(batch, partial(self._outcomes, entry))
        except ConnectionLost as error:
            self._in_flight.remove(entry)
            pending.extendleft(reversed(batch))
            self._lost(error)
            return False
        except Exception as error:  # an adapter's bug must not look like a message that is merely late
            self._in_flight.remove(entry)
            problem = MessagingError(f"{self._name}: the adapter failed to take a batch: {error!r}")
            problem.__cause__ = error
            for message in batch:
                self._resolve(message, indeterminate(problem))
            self._settled()
        return True

    def _cut(self, sender: Sender) -> list[Outgoing]:
        pending, size = self._pending, 0
        batch: list[Outgoing] = []
        limit_bytes, future = sender.max_batch_bytes, asyncio.Future
        for _ in range(min(len(pending), sender.max_batch)):
            message = pending[0]
            size += len(message.body)
            if size > limit_bytes and batch:
                break
            del pending[0]
            waiter = message.waiter
            if waiter is not None and (waiter.__class__ is not future or not waiter.done()):  # as _gone, without a call
                batch.append(message)
        return batch

    def _outcomes(self, batch: _Batch, outcomes: Outcomes) -> None:
        messages = batch.messages
        batch.left -= len(outcomes)
        publisher, accepted = None, 0  # a run of one publisher's messages is told to it at once
        for index, result in outcomes:
            message = messages[index]
            waiter = message.waiter
            if result.error is not None:
                self._not_accepted(message, result)
            elif waiter is publisher and waiter is not None:
                message.waiter = None
                accepted += 1
            elif waiter.__class__ is asyncio.Future:
                self._resolve(message, result)
            elif waiter is not None:
                message.waiter = None
                if publisher is not None:
                    publisher.accepted(accepted)
                publisher, accepted = waiter, 1
        if publisher is not None:
            publisher.accepted(accepted)
        if batch.left == 0:
            self._in_flight.remove(batch)
            unsure = [m for m in messages if m.waiter is not None]
            if unsure:
                self._resend.append((batch.serial, unsure))
                self._drop_sender()
            self._settled()

    def _not_accepted(self, message: Outgoing, result: SendResult) -> None:
        if result.outcome is Outcome.INDETERMINATE and isinstance(result.error, ConnectionLost):
            message.maybe_stored = True  # keeps its waiter: it is sent again when the batch is complete
            self._last_error = result.error
        else:
            self._resolve(message, result)

    def _settled(self) -> None:
        if self._in_flight:
            if self._pending and not self._resend:
                self._flush()
            return
        if self._resend:  # back to where they were, in the order of submission
            self._pending.extendleft(reversed(self._waiting_to_resend()))
            self._resend = []
        if self._pending:
            self._flush()
        else:
            self._idle.set()

    def _waiting_to_resend(self) -> list[Outgoing]:
        return [message for _, messages in sorted(self._resend, key=lambda r: r[0]) for message in messages]

    # --- connection

    def _drop_sender(self) -> None:
        sender, self._sender = self._sender, None
        if sender is not None:
            self._closing = self._loop.create_task(_bounded(sender.close(), 1.0))

    def _lost(self, error: MessagingError) -> None:
        self._drop_sender()
        self._last_error = error
        self._settled()  # the loss may have left earlier batches unsure: they go before this one

    def _reopen(self) -> None:
        if self._closed:
            self._fail_pending(Closed(f"{self._name}: the bus was closed; nothing was sent"))
            return
        self._idle.clear()
        if self._opening is None:
            self._opening = self._loop.create_task(self._open(), name=f"open sender {self._name}")

    async def _open(self) -> None:
        backoff = Backoff()
        try:
            while self._pending:
                try:
                    sender = await self._open_sender()
                except MessagingError as error:
                    self._last_error = error
                    if not error.transient:
                        self._fail_pending(error)
                        return
                    await asyncio.sleep(backoff.wait_s())
                    continue
                self._sender, self._max_batch = sender, sender.max_batch
                break
        except Exception as error:  # an adapter's bug: surface it at every waiting publish
            problem = MessagingError(f"{self._name}: the adapter failed to open a sender: {error!r}")
            problem.__cause__ = error
            self._fail_pending(problem)
        finally:
            self._opening = None
        self._flush()
        if not self._pending and not self._in_flight:
            self._idle.set()

    def _fail_pending(self, error: MessagingError) -> None:
        pending, self._pending = self._pending, deque()
        for message in pending:
            self._resolve(message, self._unsent(message, error))
        if not self._in_flight:
            self._idle.set()

    @staticmethod
    def _unsent(message: Outgoing, error: MessagingError) -> SendResult:
        """The result of a message that waits here: it is only unsure if an earlier sending of it was."""
        own = type(error).__new__(type(error))  # one error object per message: each carries its own outcome
        own.__dict__.update(error.__dict__)
        own.args = error.args
        own.__cause__ = error.__cause__ or error
        return indeterminate(own) if message.maybe_stored else rejected(own)

    @staticmethod
    def _resolve(message: Outgoing, result: SendResult) -> None:
        waiter, message.waiter = message.waiter, None
        if waiter is None:
            return
        if waiter.__class__ is asyncio.Future:
            if not waiter.done():
                waiter.set_result(result)
        elif result.error is not None:
            waiter.refused(message, result.error)

    # --- deadlines: one timer, at the earliest of them

    def _watch(self, deadline_s: float) -> None:
        self._due_s = deadline_s
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(deadline_s, self._expire)

    def _expire(self) -> None:
        now, due = self._loop.time(), math.inf
        self._timer = None
        waiting = [m for m in (*self._waiting_to_resend(), *self._pending) if m.waiter is not None]
        flying = [m for b in self._in_flight for m in b.messages if m.waiter is not None]
        late = []
        for message in (*waiting, *flying):
            if message.deadline_s > now:
                due = min(due, message.deadline_s)
            else:
                late.append(message)
        self._handed_over([m for m in flying if m.deadline_s <= now])
        for message in late:
            self._resolve(message, self._unsent(message, self._late(message)))
        self._pending = deque(m for m in self._pending if m.waiter is not None)
        if not self._pending and not self._in_flight and not self._resend:
            self._idle.set()
        self._due_s = math.inf
        if due < math.inf:
            self._watch(due)

    def _handed_over(self, messages: list[Outgoing]) -> None:
        """Core gives up on them: they may be stored, unless the sender kept them here all the while."""
        unsent = set(map(id, self._sender.withdraw(messages))) if self._sender is not None and messages else set()
        for message in messages:
            message.maybe_stored = message.maybe_stored or id(message) not in unsent

    def _late(self, message: Outgoing) -> DeadlineExceeded:
        what = "no outcome within the deadline" if message.maybe_stored else "nobody took it within the deadline"
        error = DeadlineExceeded(
            f"{self._name}: {what}"
            + (f"; the connection's last error: {self._last_error}" if self._last_error and not self._sender else "")
        )
        error.__cause__ = self._last_error if not self._sender else None
        return error

    # --- the end

    async def flush(self) -> None:
        """Wait until everything submitted so far has an outcome."""
        await self._idle.wait()

    async def close(self, timeout_s: float, reason: MessagingError) -> int:
        """Flush for at most `timeout_s`, then resolve what is left with `reason`; return how many that were."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        self._closed = True
        if self._opening is not None:
            self._opening.cancel()
        left = self.unresolved
        flying = [m for batch in self._in_flight for m in batch.messages if m.waiter is not None]
        self._handed_over(flying)
        sender, self._sender = self._sender, None
        for message in flying:
            self._resolve(message, self._unsent(message, reason))
        for message in (*self._waiting_to_resend(), *self._pending):
            self._resolve(message, self._unsent(message, reason))
        self._pending.clear()
        self._resend.clear()
        if self._timer is not None:
            self._timer.cancel()
        if sender is not None:
            await _bounded(sender.close(), max(0.2, timeout_s / 2) if not left else 0.2)
        return left


def _gone(message: Outgoing) -> bool:
    """It expired, or its publish was cancelled before it was handed over."""
    waiter = message.waiter
    return waiter is None or (waiter.__class__ is asyncio.Future and waiter.done())


async def _bounded(work: Awaitable[Any], timeout_s: float) -> None:
    """Await `work` for at most `timeout_s`; its errors are logged, it is closing anyway."""
    try:
        async with asyncio.timeout(timeout_s):
            await work
    except TimeoutError:
        log.debug("a close did not end within %.1f s and was abandoned", timeout_s)
    except Exception as error:
        log.debug("error while closing: %r", error)
