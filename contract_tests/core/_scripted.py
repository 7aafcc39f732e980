"""Senders, receivers and drivers that do what a test tells them, and keep a record of what core asked of them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, ClassVar

from _drive import fresh
from pydantic import BaseModel

from messaging_sdk import Bus, ConnectionLost, Delivery, Destination, MessagingError, Queue, Retry
from messaging_sdk.capabilities import Capabilities
from messaging_sdk.config import Address
from messaging_sdk.consumer import Consumer, Terms
from messaging_sdk.memory import Driver as MemoryDriver
from messaging_sdk.memory import MemoryReceiver, MemorySender
from messaging_sdk.model import SENT, Message, Outgoing, SendResult, Session, indeterminate
from messaging_sdk.registry import register
from messaging_sdk.retry import Retry as RetryPolicy
from messaging_sdk.spi import Disposition, OnOutcomes, OnRevoke, Provision, Receiver, Sender
from messaging_sdk.workers import Workers

# --- sending


class Taken:
    """One batch that a scripted sender has taken, to be answered by the test."""

    def __init__(self, messages: Sequence[Outgoing], on_outcomes: OnOutcomes) -> None:
        self.messages = list(messages)
        self._on_outcomes = on_outcomes
        self.open = set(range(len(messages)))

    @property
    def ids(self) -> list[str]:
        return [m.id for m in self.messages]

    def answer(self, results: Mapping[int, SendResult]) -> None:
        self.open -= set(results)
        if results:
            self._on_outcomes(list(results.items()))

    def ok(self) -> None:
        self.answer(dict.fromkeys(sorted(self.open), SENT))

    def lose(self) -> None:
        if self.open:
            self.answer({i: indeterminate(ConnectionLost("cut")) for i in sorted(self.open)})


class ScriptedSender(Sender):
    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.max_batch, self.max_batch_bytes, self.max_in_flight = wire.limits
        self.open: list[Taken] = []
        self.lost = False

    def send_batch(self, messages: Sequence[Outgoing], on_outcomes: OnOutcomes) -> None:
        if self.lost:
            raise ConnectionLost("cut")
        taken = Taken(messages, on_outcomes)
        self.wire.taken.append(taken)
        self.open = [t for t in self.open if t.open]
        try:
            self.wire.on_batch(self, taken)
        except BaseException:  # raising = nothing was taken
            self.wire.taken.remove(taken)
            raise
        if taken.open:
            self.open.append(taken)

    def lose(self) -> None:
        """The connection breaks: all that is open is unsure, nothing more is taken."""
        self.lost = True
        for taken in list(self.open):
            taken.lose()

    async def close(self) -> None:
        self.wire.closes += 1
        if self.wire.close_hangs:
            await asyncio.Event().wait()


class Wire:
    """Gives a Batcher its senders. `on_batch(sender, taken)` decides: answer, keep, or raise."""

    def __init__(
        self,
        on_batch: Callable[[ScriptedSender, Taken], None] = lambda sender, taken: taken.ok(),
        *,
        max_batch: int = 500,
        max_batch_bytes: int = 1 << 20,
        max_in_flight: int = 2,
    ) -> None:
        self.on_batch = on_batch
        self.limits = (max_batch, max_batch_bytes, max_in_flight)
        self.senders: list[ScriptedSender] = []
        self.taken: list[Taken] = []
        self.closes = 0
        self.close_hangs = False
        self.refusals: deque[BaseException] = deque()
        """Raised by the next openings, in turn."""
        self.openings = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def open_sender(self) -> ScriptedSender:
        self.openings += 1
        await self.gate.wait()
        if self.refusals:
            raise self.refusals.popleft()
        sender = ScriptedSender(self)
        self.senders.append(sender)
        return sender

    @property
    def ids(self) -> list[list[str]]:
        return [taken.ids for taken in self.taken]


def keep(sender: ScriptedSender, taken: Taken) -> None:
    """A script: take the batch and never answer."""


# --- receiving


class ScriptedReceiver(Receiver):
    """Hands out what the test puts in; records settlements, extensions and closings."""

    def __init__(self, name: str = "c") -> None:
        self.session = Session(name)
        self.inbox: deque[list[Delivery[Any]] | BaseException] = deque()
        self.settled: list[tuple[str, str]] = []
        self.extended: list[str] = []
        self.stopped = self.closed = 0
        self.lost = False
        self.answers: Callable[[Sequence[tuple[Any, Disposition]]], Any] = lambda settlements: None
        self._arrived = asyncio.Event()

    def put(self, *deliveries: Delivery[Any]) -> None:
        self.inbox.append(list(deliveries))
        self._arrived.set()

    def give(self, id: str, body: bytes = b"x", key: str | None = None, deliveries: int | None = None) -> Delivery[Any]:
        """One delivery, put in; its receipt is its id."""
        made: Delivery[Any] = Delivery(body, id, key, receipt=id, session=self.session, deliveries=deliveries)
        self.put(made)
        return made

    def break_with(self, error: BaseException) -> None:
        self.lost = isinstance(error, ConnectionLost)
        self.inbox.append(error)
        self._arrived.set()

    async def receive_batch(self, max_deliveries: int) -> list[Delivery[Any]]:
        while not self.inbox:
            self._arrived.clear()
            await self._arrived.wait()
        found = self.inbox.popleft()
        if isinstance(found, BaseException):
            raise found
        return found

    def settle_batch(self, settlements: Sequence[tuple[Any, Disposition]]) -> Any:
        if self.lost:
            raise ConnectionLost("cut")
        self.settled += [(receipt, disposition.kind) for receipt, disposition in settlements]
        return self.answers(settlements)

    async def stop(self) -> None:
        self.stopped += 1

    async def close(self) -> None:
        self.closed += 1


class LeasedScriptedReceiver(ScriptedReceiver):
    def extend_batch(self, receipts: Sequence[Any]) -> None:
        self.extended += receipts


class Bench:
    """A Consumer on scripted receivers, with a handler; everything it did is on record."""

    def __init__(
        self,
        destination: Destination[Any] | None = None,
        *,
        window: int = 500,
        on_failure: Any = "dead_letter",
        max_deliveries: int = 20,
        retry: Retry | None = None,
        capabilities: Capabilities | None = None,
        kind: type[ScriptedReceiver] = ScriptedReceiver,
    ) -> None:
        self.kind = kind
        self.receivers: list[ScriptedReceiver] = []
        self.buried: list[tuple[str, str, int]] = []
        self.bury_error: MessagingError | None = None
        """While set, no dead letter can be stored."""
        self.bury_tries = 0
        self.stopped_by: list[BaseException] = []
        self.refusals: deque[BaseException] = deque()
        self.terms = Terms(
            destination or Queue("work", bytes),
            None,
            window,
            on_failure,
            max_deliveries,
            capabilities or Capabilities(settle="individual", lease="connection", release="now"),
            retry or RetryPolicy(5, 0.001, jitter=0),
        )
        self.consumer = Consumer(self.terms, self._open, self._bury, self.stopped_by.append)
        self.workers: Workers | None = None

    @property
    def receiver(self) -> ScriptedReceiver:
        return self.receivers[-1]

    async def _open(self, on_revoke: OnRevoke) -> Receiver:
        if self.refusals:
            raise self.refusals.popleft()
        self.receivers.append(self.kind(f"connection {len(self.receivers)}"))
        return self.receiver

    async def _bury(self, terms: Terms, message: Message[Any], reason: str, error: str, attempts: int) -> None:
        self.bury_tries += 1
        if self.bury_error is not None:
            raise self.bury_error
        self.buried.append((message.id, reason, attempts))

    async def start(
        self,
        handler: Callable[[Message[Any]], Awaitable[None]] | None = None,
        *,
        concurrency: int = 1,
        timeout_s: float | None = None,
        settle_before: bool = False,
        blocking: bool = False,
    ) -> ScriptedReceiver:
        await self.consumer.start()
        if handler is not None:
            self.workers = Workers(self.consumer, handler, concurrency, timeout_s, settle_before, blocking=blocking)
            self.workers.start()
        return self.receiver

    async def stop(self, grace_s: float = 1.0) -> None:
        await self.consumer.stop_intake()
        if self.workers is not None:
            await self.workers.stop(grace_s)
        await self.consumer.close(grace_s)


# --- a whole driver


class Options(BaseModel, extra="forbid", frozen=True):
    pass


class RecordingDriver(MemoryDriver):
    """The memory driver, with a record of every call that would do I/O. Subclasses change what it claims or does."""

    name = "recording"
    claims: ClassVar[Callable[[Destination[Any]], Capabilities] | None] = None
    made: ClassVar[list[RecordingDriver]]

    def __init__(self, address: Address, options: BaseModel, destinations: Mapping[str, BaseModel]) -> None:
        super().__init__(address, options, destinations)
        self.calls: list[str] = []
        type(self).made.append(self)

    def capabilities(self, destination: Destination[Any]) -> Capabilities:
        claims = type(self).claims
        return super().capabilities(destination) if claims is None else claims(destination)

    async def open(self) -> None:
        if self not in self.broker.connections:  # the memory driver calls this before everything else too
            self.calls.append("open")
        await super().open()

    async def provision(self, destinations: Sequence[Destination[Any]], mode: Provision) -> None:
        self.calls.append(f"provision {' '.join(d.name for d in destinations)}")
        await super().provision(destinations, mode)

    async def open_sender(self, destination: Destination[Any]) -> MemorySender:
        self.calls.append(f"open_sender {destination.name}")
        return await super().open_sender(destination)

    async def open_receiver(
        self, destination: Destination[Any], group: str | None, window: int, on_revoke: OnRevoke
    ) -> MemoryReceiver:
        self.calls.append(f"open_receiver {destination.name}")
        return await super().open_receiver(destination, group, window, on_revoke)

    async def close(self) -> None:
        self.calls.append("close")
        await super().close()


def recording(**attributes: Any) -> tuple[str, type[RecordingDriver]]:
    """A scheme of its own for a fresh subclass of RecordingDriver with these attributes; (url, class)."""
    if attributes.get("claims") is not None:
        attributes["claims"] = staticmethod(attributes["claims"])
    kind: type[RecordingDriver] = type("Made", (RecordingDriver,), {"made": [], **attributes})
    scheme = fresh("rec").replace("_", "-")
    register(scheme, kind)
    return f"{scheme}://{scheme}", kind


def memory(**options: Any) -> Bus:
    """A Bus on a memory broker of its own."""
    return Bus(f"memory://{fresh()}", **options)
