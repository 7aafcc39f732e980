"""The in-process reference backend. Every promise is a switch: `memory://name?release=none&count=flag` declares so
and behaves so, which is how the contract suite checks its own cases, and how unit tests get another backend's refusals
(`memory://?profile=rabbitmq`). Same name = same broker, within one process; nothing survives the process.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
import math
import time
from asyncio import Future
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Final

from pydantic import BaseModel, ConfigDict

from . import capabilities as c
from .capabilities import Capabilities, HeaderRules
from .config import Address
from .destination import Destination
from .errors import (
    CapabilityError,
    ConfigError,
    ConnectionLost,
    MessagingError,
    NotFound,
    SettleLost,
    TooLarge,
    Unmet,
    UsageError,
)
from .memory_history import HISTORY, History, MemoryReader, meta_of
from .model import SENT, Delivery, Message, Outgoing, SendResult, Session, indeterminate, rejected
from .spi import Disposition, OnOutcomes, OnRevoke, Provision, Reader, Receiver, Sender
from .spi import Driver as AbstractDriver

HEADERS: Final = HeaderRules(max_count=1000, max_bytes=1 << 20)
SIGNAL_BUFFER: Final = 65_536  # messages a listener may lag behind before it loses some, counted
LATE_S: Final = 0.02  # how long after its OK a message is stored when confirm is not "stored"

DURABLE: Final = Capabilities(
    settle="individual",
    release="delay",
    lease="connection",
    count="exact",
    backlog=True,
    order="publisher",
    compete="demand",
    lag="unsettled",
    confirm="stored",
    route_error=True,
    dedup_s=120.0,
    batch="entries",
    ttl=True,
    delay=True,
    priority=10,
    max_body=16 << 20,
    headers=HEADERS,
    window=True,
    ok_means="memory",
    notes={"durable": "nothing survives the process", "ok_means": "in this process's memory"},
)
SIGNAL: Final = Capabilities(
    order="publisher", compete="round_robin", groups="live", batch="entries", max_body=16 << 20, headers=HEADERS,
    route_error=False, notes={"confirm": "a signal is never confirmed"},
)  # fmt: skip
SIGNAL_SWITCHES: Final = ("order", "groups", "batch", "max_body", "headers")


class Switches(BaseModel):
    """The switches: each flag of Capabilities; unset = the reference's (or the profile's) value."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    profile: str | None = None
    settle: c.Settle | None = None
    release: c.Release | None = None
    lease: c.Lease | None = None
    lease_s: float | None = None
    hold_s: float | None = None
    count: c.Count | None = None
    backlog: bool | None = None
    order: c.Order | None = None
    order_redelivery: bool | None = None
    order_competition: bool | None = None
    compete: c.Compete | None = None
    groups: c.Groups | None = None
    replay: bool | None = None
    lag: c.Lag | None = None
    confirm: c.Confirm | None = None
    route_error: bool | None = None
    durable: c.Durable | None = None
    dedup_s: float | None = None
    batch: c.BatchMode | None = None
    ttl: bool | None = None
    delay: bool | None = None
    priority: int | None = None
    max_body: int | None = None
    headers: bool | None = None
    window: bool | None = None
    ok_means: c.OkMeans | None = None


class Entry:
    """One stored message of one queue or group."""

    __slots__ = (
        "deliveries",
        "expires_s",
        "first_s",
        "holder",
        "lease_end_s",
        "message",
        "serial",
        "visible_s",
    )

    def __init__(self, message: Outgoing, serial: int, now: float) -> None:
        self.message = message
        self.serial = serial
        self.deliveries = 0
        self.visible_s = now + (message.delay_s or 0.0)
        self.expires_s = math.inf if message.ttl_s is None else now + message.ttl_s
        self.first_s = 0.0
        self.lease_end_s = math.inf
        self.holder: MemoryReceiver | None = None

    def rank(self) -> tuple[int, int]:
        return (-(self.message.priority or 0), self.serial)


class Store:
    """The messages of one queue, or of one group of a topic, and who holds them."""

    def __init__(self, caps: Capabilities, ordered: bool) -> None:
        self.caps = caps
        self.ordered = ordered
        self.waiting: list[Entry] = []  # by rank
        self.held: set[Entry] = set()
        self.receivers: list[MemoryReceiver] = []
        self.turn = 0
        self.look_s = math.inf  # before this, nothing here runs out
        self.serials = itertools.count()
        self.watched: dict[Outgoing, Callable[[], None]] = {}
        """With confirm="settled": whom to tell when a message is."""

    def put(self, message: Outgoing) -> None:
        now = time.monotonic()
        if self.caps.order == "none":  # newest first: an order nobody would call one
            entry = Entry(message, -next(self.serials), now)
        else:
            entry = Entry(message, next(self.serials), now)
        self._wait(entry)
        if self.caps.ttl:
            self.look_s = min(self.look_s, entry.expires_s)
        self.offer()

    def _wait(self, entry: Entry) -> None:
        entry.holder = None
        if self.caps.compete == "round_robin" and self.receivers:
            self.turn += 1
            entry.holder = self.receivers[self.turn % len(self.receivers)]
        bisect.insort(self.waiting, entry, key=Entry.rank)

    def offer(self) -> None:
        for receiver in self.receivers:
            receiver.notify()

    def take(self, receiver: MemoryReceiver, count: int) -> list[Entry]:
        """Up to `count` entries for `receiver`, now held by it."""
        self.expire()
        now = time.monotonic()
        taken: list[Entry] = []
        if self.caps.compete == "standby" and receiver is not self.receivers[0]:
            return taken
        busy: frozenset[str | None] = frozenset()
        if self.ordered and self.caps.order_competition and len(self.held) > len(receiver.open):
            busy = self._keys_elsewhere(receiver)
        for entry in self.waiting:
            if len(taken) >= count:
                break
            if entry.visible_s > now:
                receiver.notify_at(entry.visible_s)
                if self.ordered:
                    busy = busy | {entry.message.key}
            elif entry.holder in (None, receiver) and not (busy and entry.message.key in busy):
                taken.append(entry)
        self._remove(taken)
        end = math.inf
        for entry in taken:
            entry.deliveries += 1
            entry.first_s = now
            entry.holder = receiver
            entry.lease_end_s = now + self.caps.lease_s if self.caps.lease == "timeout" else math.inf
            self.held.add(entry)
            end = min(end, entry.lease_end_s, entry.first_s + self.caps.hold_s)
        self.look_s = min(self.look_s, end)
        receiver.notify_at(end)
        return taken

    def _remove(self, taken: list[Entry]) -> None:
        if taken and self.waiting[len(taken) - 1] is taken[-1]:  # the usual case: the oldest, without a gap
            del self.waiting[: len(taken)]
        elif taken:
            gone = set(taken)
            self.waiting = [e for e in self.waiting if e not in gone]

    def _keys_elsewhere(self, receiver: MemoryReceiver) -> frozenset[str | None]:
        return frozenset(e.message.key for e in self.held if e.holder is not receiver)

    def expire(self) -> None:
        """Drop what outlived its ttl; take back what outlived its lease or hold."""
        now = time.monotonic()
        if now < self.look_s:
            return
        if self.caps.ttl:
            self.waiting = [e for e in self.waiting if e.expires_s > now]
        late = [e for e in self.held if self._end(e) <= now]
        for entry in sorted(late, key=Entry.rank):
            self.give_back(entry)
        ends = [*map(self._end, self.held), *(e.expires_s for e in self.waiting if self.caps.ttl)]
        self.look_s = min(ends, default=math.inf)
        for receiver in self.receivers:
            receiver.notify_at(self.look_s)
        if late:
            self.offer()

    def _end(self, entry: Entry) -> float:
        """When a held entry is taken back."""
        return min(entry.lease_end_s, entry.first_s + self.caps.hold_s)

    def lag(self) -> int:
        """As `caps.lag` counts."""
        self.expire()
        return len(self.waiting) + (len(self.held) if self.caps.lag == "unsettled" else 0)

    def accept(self, receiver: MemoryReceiver, entry: Entry) -> bool:
        """Settle as done; False if `receiver` no longer holds it."""
        if entry not in self.held or entry.holder is not receiver:
            return False
        self.held.discard(entry)
        if self.watched and (settled := self.watched.pop(entry.message, None)) is not None:
            settled()
        if self.ordered:
            self.offer()
        return True

    def release(self, receiver: MemoryReceiver, entry: Entry, delay_s: float) -> bool:
        if entry not in self.held or entry.holder is not receiver:
            return False
        entry.visible_s = time.monotonic() + delay_s
        self.give_back(entry)
        self.offer()
        return True

    def give_back(self, entry: Entry) -> None:
        self.held.discard(entry)
        if entry.holder is not None:
            entry.holder.open.discard(entry)
        if not (self.ordered and self.caps.order_redelivery):
            entry.serial = next(self.serials)  # to the tail; else it keeps its place
        self._wait(entry)

    def extend(self, receiver: MemoryReceiver, entry: Entry) -> None:
        if entry in self.held and entry.holder is receiver:
            entry.lease_end_s = time.monotonic() + self.caps.lease_s
            receiver.notify_at(entry.lease_end_s)

    def join(self, receiver: MemoryReceiver) -> None:
        self.receivers.append(receiver)
        if self.caps.compete == "none" and len(self.receivers) > 1:
            self.receivers.remove(receiver)
            raise NotFound("this destination takes one consumer at a time, and has one")
        for entry in self.held:  # a dead consumer's leases may end while this one waits
            receiver.notify_at(min(entry.lease_end_s, entry.first_s + self.caps.hold_s))

    def hand_back(self, receiver: MemoryReceiver) -> None:
        """A polite close does not wait for a lease: all that `receiver` holds is there again, in order."""
        for entry in sorted((e for e in self.held if e.holder is receiver), key=Entry.rank):
            self.give_back(entry)

    def leave(self, receiver: MemoryReceiver) -> None:
        """The receiver's connection is gone, politely or not."""
        if receiver in self.receivers:
            self.receivers.remove(receiver)
        mine = sorted((e for e in self.held if e.holder is receiver), key=Entry.rank)
        if self.caps.lease == "connection":
            for entry in mine:
                self.give_back(entry)
        elif self.caps.lease == "none":
            self.held.difference_update(mine)
        for entry in self.waiting:
            if entry.holder is receiver:
                entry.holder = None
        if self.caps.lease == "timeout":
            for other in self.receivers:
                for entry in mine:
                    other.notify_at(entry.lease_end_s)
        self.offer()

    def restart(self, keep: bool) -> None:
        if keep:
            for entry in sorted(self.held, key=Entry.rank):
                self.give_back(entry)
        else:
            self.waiting.clear()
            self.held.clear()


class Broker:
    """What all drivers of one name share."""

    store_class: ClassVar[type[Store]] = Store
    history_class: ClassVar[type[History]] = History

    def __init__(self) -> None:
        self.stores: dict[tuple[str, str | None], Store] = {}
        self.topics: dict[str, list[str]] = {}
        self.listeners: dict[str, list[MemoryReceiver]] = {}
        self.histories: dict[str, History] = {}
        self.seen: dict[tuple[str, str], float] = {}
        self.connections: list[Driver] = []
        self.turns = itertools.count()

    def provision(self, destination: Destination[Any], caps: Capabilities) -> None:
        if destination.tag == "queue":
            self.stores.setdefault((destination.name, None), self.store_class(caps, destination.ordered))
        elif destination.tag == "topic":
            self.topics.setdefault(f"topic {destination.name}", [])
            if caps.replay:
                self.histories.setdefault(destination.name, self.history_class())
            for group in destination.groups if caps.groups == "durable" else ():
                self.open_group(destination, group, caps)

    def open_group(self, destination: Destination[Any], group: str, caps: Capabilities) -> Store:
        name = f"topic {destination.name}"
        groups = self.topics.setdefault(name, [])
        if group not in groups:
            groups.append(group)
            self.stores[name, group] = self.store_class(caps, destination.ordered)
        return self.stores[name, group]

    def close_group(self, destination: Destination[Any], group: str) -> None:
        name = f"topic {destination.name}"
        if group in self.topics.get(name, []):
            self.topics[name].remove(group)
            del self.stores[name, group]

    def missing(self, destination: Destination[Any]) -> bool:
        if destination.tag == "queue":
            return (destination.name, None) not in self.stores
        return destination.tag == "topic" and f"topic {destination.name}" not in self.topics

    def store_of(self, destination: Destination[Any], group: str | None) -> Store:
        """Of a queue or group. Raises NotFound."""
        key = (destination.name, None) if destination.tag == "queue" else (f"topic {destination.name}", group)
        store = self.stores.get(key)
        if store is None:
            raise NotFound(f"{destination} does not exist in this memory broker; provision it first")
        return store

    def route(self, destination: Destination[Any], message: Outgoing) -> None:
        """Store one accepted message everywhere it belongs."""
        if destination.settles:
            self.remember(destination, message)
            for store in self.targets(destination):
                self.store(store, message)
        else:
            self.signal(destination, message)

    def remember(self, destination: Destination[Any], message: Outgoing) -> None:
        """In the topic's history."""
        history = self.histories.get(destination.name)
        if history is not None and destination.tag == "topic":
            history.append(message)

    def targets(self, destination: Destination[Any]) -> list[Store]:
        """Each store that gets a copy."""
        if destination.tag == "queue":
            found = self.stores.get((destination.name, None))
            return [] if found is None else [found]
        name = f"topic {destination.name}"
        return [self.stores[name, group] for group in self.topics.get(name, ())]

    def store(self, store: Store, message: Outgoing) -> None:
        if store.receivers or store.caps.backlog:
            store.put(message)

    def signal(self, destination: Destination[Any], message: Outgoing) -> None:
        by_group: dict[str | None, list[MemoryReceiver]] = {}
        for listener in self.listeners.get(destination.name, ()):
            by_group.setdefault(listener.group, []).append(listener)
        turn = next(self.turns)
        for group, members in by_group.items():
            for member in members if group is None else [members[turn % len(members)]]:
                member.overhear(message)

    def is_repeat(self, destination: Destination[Any], message: Outgoing, caps: Capabilities) -> bool:
        if not caps.dedup_s:
            return False
        key, now = (f"{destination.tag} {destination.name}", message.id), time.monotonic()
        if now - self.seen.get(key, -math.inf) < caps.dedup_s:
            return True
        self.seen[key] = now
        return False

    def cut(self) -> None:
        """Drop every connection abruptly."""
        for driver in list(self.connections):
            driver.lose()

    def restart(self, kill: bool = False) -> None:
        """As a broker's restart: connections drop; what the queues keep is what `durable` says."""
        self.cut()
        for history in self.histories.values():
            history.forget(HISTORY)
        for store in self.stores.values():
            store.restart(store.caps.durable == "kill" or (store.caps.durable == "restart" and not kill))


_brokers: Final[dict[tuple[type[Broker], str], Broker]] = {}


def _both(one: Callable[[], None], other: Callable[[], None]) -> None:
    one()
    other()


class MemorySender(Sender):
    """Stores each message before `send_batch` returns."""

    def __init__(self, driver: Driver, destination: Destination[Any], caps: Capabilities) -> None:
        self.driver = driver
        self.broker = driver.broker
        self.destination = destination
        self.caps = caps
        self.lost = False
        self.unsettled: dict[Outgoing, Callable[..., None]] = {}
        """With confirm="settled": who is yet to be told of what."""
        self.max_in_flight = 1 << 30 if caps.confirm == "settled" else 2  # an outcome may wait for a handler

    def send_batch(self, messages: Sequence[Outgoing], on_outcomes: OnOutcomes) -> None:
        if self.lost:
            raise ConnectionLost("the memory connection was cut")
        problems = [self.problem(m) for m in messages]
        first = next((i for i, p in enumerate(problems) if p is not None), None)
        if first is not None and self.caps.batch != "entries":
            start = 0 if self.caps.batch == "atomic" else first
            for index in range(start, len(problems)):
                if problems[index] is None:
                    problems[index] = MessagingError(
                        "refused together with another message of its batch", transient=True
                    )
        outcomes: list[tuple[int, SendResult]] = []
        for index, (message, problem) in enumerate(zip(messages, problems, strict=True)):
            if problem is None and self.caps.confirm == "settled":
                self.unsettled[message] = partial(self.tell, message, index, on_outcomes)
                self.take_until_settled(message, self.unsettled[message])
            elif problem is None:
                self.take(message)
                outcomes.append((index, SENT))
            else:
                outcomes.append((index, rejected(problem)))
        if outcomes:
            on_outcomes(outcomes)

    def problem(self, message: Outgoing) -> MessagingError | None:
        caps, name = self.caps, self.destination.name
        if len(message.body) > caps.max_body:
            return TooLarge(
                f"{name}: {len(message.body)} bytes, the limit is {caps.max_body}",
                size_bytes=len(message.body), limit_bytes=caps.max_body,
            )  # fmt: skip
        asked = {"ttl": message.ttl_s, "delay": message.delay_s, "priority": message.priority}
        lacking = [flag for flag, value in asked.items() if value is not None and not getattr(caps, flag)]
        if message.priority is not None and message.priority >= caps.priority and "priority" not in lacking:
            lacking.append("priority")
        if message.headers and caps.headers is None:
            lacking.append("headers")
        if lacking:
            return CapabilityError([Unmet(name, flag, "memory", f"switch {flag} on") for flag in lacking])
        if caps.route_error and self.broker.missing(self.destination):
            return NotFound(f"{name}: no such {self.destination.tag} in this memory broker; provision it first")
        return None

    def take(self, message: Outgoing) -> None:
        if self.broker.is_repeat(self.destination, message, self.caps):
            return
        if self.caps.confirm in ("stored", "none"):
            self.broker.route(self.destination, message)
        else:
            self.driver.later(LATE_S, lambda: self.broker.route(self.destination, message))

    def take_until_settled(self, message: Outgoing, tell: Callable[[], None]) -> None:
        """`tell` on the sender's loop when every store that got a copy has had it settled."""
        repeat = self.broker.is_repeat(self.destination, message, self.caps)
        stores = [s for s in self.broker.targets(self.destination) if s.receivers or s.caps.backlog]
        firsts = [(s, m) for s in stores for m in s.watched if m.id == message.id]
        loop, left = asyncio.get_running_loop(), len(firsts if repeat else stores)

        def settled() -> None:
            nonlocal left
            left -= 1
            if left <= 0 and not loop.is_closed():
                loop.call_soon_threadsafe(tell)

        if not left:
            settled()
        elif repeat:  # ok when the first one is
            for store, first in firsts:
                store.watched[first] = partial(_both, store.watched[first], settled)
        else:
            self.broker.remember(self.destination, message)
            for store in stores:
                store.watched[message] = settled
                store.put(message)

    def tell(self, message: Outgoing, index: int, on_outcomes: OnOutcomes, result: SendResult = SENT) -> None:
        if self.unsettled.pop(message, None) is not None:
            on_outcomes([(index, result)])

    def lose(self) -> None:
        self.lost = True
        for tell in list(self.unsettled.values()):
            tell(indeterminate(ConnectionLost("the memory connection was cut")))

    async def close(self) -> None:
        self.lose()


class MemoryReceiver(Receiver):
    """Takes from the store of a queue or group, or overhears a signal."""

    def __init__(
        self,
        driver: Driver,
        destination: Destination[Any],
        group: str | None,
        window: int,
        caps: Capabilities,
    ) -> None:
        self.driver = driver
        self.destination = destination
        self.group = group
        self.caps = caps
        self.limit = window if caps.window else 1 << 30
        self.session = Session(f"memory {destination.name}")
        self.loop = asyncio.get_running_loop()
        self.open: set[Entry] = set()
        self.overheard: deque[Outgoing] = deque()
        self.stopped = False
        self.waiter: Future[None] | None = None
        self.store: Store | None = None
        self.alarm_s = 0.0  # when it looks again by itself, if that is to come

    # --- intake

    async def receive_batch(self, max_deliveries: int) -> list[Delivery[Any]] | list[Message[Any]]:
        while True:
            if self.session.lost:
                raise ConnectionLost("the memory connection was cut")
            found = self.poll(max_deliveries)
            if found:
                return found
            self.waiter = self.loop.create_future()
            await self.waiter

    def poll(self, count: int) -> list[Delivery[Any]] | list[Message[Any]]:
        if self.store is None:
            taken = [self.overheard.popleft() for _ in range(min(count, len(self.overheard)))]
            return [Message(m.body, m.id, m.key, meta_of(m)) for m in taken]
        room = min(count, self.limit - len(self.open))
        if self.stopped or room <= 0:
            return []
        entries = self.store.take(self, room)
        if self.caps.settle == "none":
            for entry in entries:
                self.store.accept(self, entry)
        else:
            self.open.update(entries)
        return [self.delivery(e.message, e) for e in entries]

    def delivery(self, message: Outgoing, entry: Entry) -> Delivery[Any]:
        count = self.caps.count
        return Delivery(
            message.body, message.id, message.key, meta_of(message), receipt=entry, session=self.session,
            deliveries=entry.deliveries if count == "exact" else None,
            redelivered=entry.deliveries > 1 if count != "none" else None,
        )  # fmt: skip

    def overhear(self, message: Outgoing) -> None:
        if len(self.overheard) >= SIGNAL_BUFFER:
            self.dropped += 1
            return
        if self.caps.order == "none":
            self.overheard.appendleft(message)
        else:
            self.overheard.append(message)
        self.notify()

    def notify(self) -> None:
        """Look again; callable from another loop's thread."""
        try:
            here = asyncio.get_running_loop() is self.loop
        except RuntimeError:
            here = False
        if here:
            self._wake()
        elif not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        waiter, self.waiter = self.waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def notify_at(self, when_s: float) -> None:
        now = time.monotonic()
        if when_s < math.inf and not now < self.alarm_s <= when_s and not self.loop.is_closed():
            self.alarm_s = when_s
            delay = max(0.0, when_s - now) + 0.001
            self.loop.call_soon_threadsafe(self.loop.call_later, delay, self._wake)

    # --- settling

    def settle_batch(
        self, settlements: Sequence[tuple[Any, Disposition]]
    ) -> Future[Sequence[tuple[int, MessagingError]]] | None:
        if self.session.lost or self.store is None:
            raise ConnectionLost("the memory connection was cut")
        failed: list[tuple[int, MessagingError]] = []
        self.store.expire()
        for index, (entry, disposition) in enumerate(settlements):
            if not self.settle(entry, disposition):
                failed.append(
                    (
                        index,
                        SettleLost("the lease ran out and the message was given to someone again"),
                    )
                )
        if len(self.open) < self.limit:
            self.notify()
        if not failed:
            return None
        answer: Future[Sequence[tuple[int, MessagingError]]] = self.loop.create_future()
        answer.set_result(failed)
        return answer

    def settle(self, entry: Entry, disposition: Disposition) -> bool:
        assert self.store is not None
        if disposition.kind == "release" and self.caps.release == "none":
            return False  # it stays held; core never asks for this
        self.open.discard(entry)
        if disposition.kind == "accept":
            return self.store.accept(self, entry)
        delay_s = disposition.delay_s if self.caps.release == "delay" else 0.0
        return self.store.release(self, entry, delay_s)

    # --- the end

    async def stop(self) -> None:
        self.stopped = True

    async def close(self) -> None:
        if not self.session.lost and self.store is not None and self.caps.release != "none":
            self.store.hand_back(self)
        self.lose()

    def lose(self) -> None:
        if self.session.lost:
            return
        self.session.lost = True
        self.driver.leave(self)
        self.notify()


class LeasedReceiver(MemoryReceiver):
    """With lease=timeout."""

    def extend_batch(self, receipts: Sequence[Any]) -> None:
        if self.store is not None:
            for entry in receipts:
                self.store.extend(self, entry)


class Driver(AbstractDriver):
    """The memory adapter."""

    name = "memory"
    client = "portable-messaging"
    Options = Switches
    broker_class: ClassVar[type[Broker]] = Broker
    sender_class: ClassVar[type[MemorySender]] = MemorySender
    receiver_class: ClassVar[type[MemoryReceiver]] = MemoryReceiver
    leased_receiver_class: ClassVar[type[MemoryReceiver]] = LeasedReceiver
    reader_class: ClassVar[type[MemoryReader]] = MemoryReader
    options: Switches

    def __init__(self, address: Address, options: BaseModel, destinations: Mapping[str, BaseModel]) -> None:
        super().__init__(address, options, destinations)
        if address.path not in ("", "/") or len(address.hosts) > 1 or address.user:
            raise ConfigError("a memory URL is memory://name, without user, port list or path")
        self.broker = broker(address.host, self.broker_class)
        self.senders: list[MemorySender] = []
        self.receivers: list[MemoryReceiver] = []
        self.readers: list[MemoryReader] = []
        self.profile = _profile(self.options.profile) if self.options.profile else None

    def capabilities(self, destination: Destination[Any]) -> Capabilities:
        if self.profile is not None:
            base = self.profile.capabilities(destination)
            if "tag" in base.notes:
                return base
        elif destination.tag == "signal":
            base = SIGNAL
        else:
            base = replace(
                DURABLE,
                order_redelivery=destination.ordered,
                order_competition=destination.ordered,
                groups="durable" if destination.tag == "topic" else "none",
                replay=destination.tag == "topic",
            )
        switched = {f: v for f, v in self.options.model_dump(exclude={"profile"}).items() if v is not None}
        if "headers" in switched:
            switched["headers"] = (base.headers or HEADERS) if switched["headers"] else None
        if destination.tag == "signal":
            switched = {f: v for f, v in switched.items() if f in SIGNAL_SWITCHES}
        if destination.tag == "queue":
            switched.pop("groups", None)
            switched.pop("replay", None)
        if not destination.ordered:
            switched.pop("order_redelivery", None)
            switched.pop("order_competition", None)
        return replace(base, **switched)

    def check(self, destination: Destination[Any]) -> None:
        """Any logical name will do."""

    async def open(self) -> None:
        if self not in self.broker.connections:
            self.broker.connections.append(self)

    async def provision(self, destinations: Sequence[Destination[Any]], mode: Provision) -> None:
        for destination in destinations:
            if mode == "verify" and self.broker.missing(destination):
                raise NotFound(f'{destination} does not exist in this memory broker; provision = "create" makes it')
            if mode == "create":
                self.broker.provision(destination, self.capabilities(destination))

    async def open_sender(self, destination: Destination[Any]) -> MemorySender:
        await self.open()
        sender = self.sender_class(self, destination, self.capabilities(destination))
        self.senders.append(sender)
        return sender

    async def open_receiver(
        self, destination: Destination[Any], group: str | None, window: int, on_revoke: OnRevoke
    ) -> MemoryReceiver:
        await self.open()
        caps = self.capabilities(destination)
        kind = self.leased_receiver_class if caps.lease == "timeout" else self.receiver_class
        receiver = kind(self, destination, group, window, caps)
        if group is not None and caps.groups == "none":
            raise CapabilityError([Unmet(destination.name, f"group={group!r}", "memory", "switch groups on")])
        if destination.tag == "signal":
            self.broker.listeners.setdefault(destination.name, []).append(receiver)
        else:
            if destination.tag == "topic" and caps.groups == "live" and group is not None:
                self.broker.open_group(destination, group, caps)
            store = self.broker.store_of(destination, group)
            store.join(receiver)
            receiver.store = store
        self.receivers.append(receiver)
        return receiver

    async def open_reader(self, destination: Destination[Any], since: float | str | None) -> Reader:
        history = self.broker.histories.get(destination.name)
        if destination.tag != "topic" or history is None:
            return await super().open_reader(destination, since)
        await self.open()
        if isinstance(since, str):
            if not since.isdecimal() or int(since) > history.end:
                raise UsageError(f"{destination}: {since!r} is no position")
            start = int(since)
        else:
            start = history.first if since is None else history.number_at(since)
        reader = self.reader_class(history, start)
        self.readers.append(reader)
        return reader

    async def lag(self, destination: Destination[Any], group: str | None) -> int:
        if self.capabilities(destination).lag == "none":
            return await super().lag(destination, group)
        await self.open()
        return self.broker.store_of(destination, group).lag()

    def leave(self, receiver: MemoryReceiver) -> None:
        """A receiver's connection is gone."""
        if receiver in self.receivers:
            self.receivers.remove(receiver)
        if receiver.store is not None:
            receiver.store.leave(receiver)
            last = not receiver.store.receivers
            if last and receiver.caps.groups == "live" and receiver.group is not None:
                self.broker.close_group(receiver.destination, receiver.group)
        else:
            listeners = self.broker.listeners.get(receiver.destination.name, [])
            if receiver in listeners:
                listeners.remove(receiver)

    def lose(self) -> None:
        """Drop this connection and all that lives on it."""
        for sender in self.senders:
            sender.lose()
        self.senders.clear()
        for receiver in list(self.receivers):
            receiver.lose()
        for reader in self.readers:
            reader.lost = True
        self.readers.clear()

    def later(self, delay_s: float, call: Callable[[], None]) -> None:
        asyncio.get_running_loop().call_later(delay_s, call)

    async def close(self) -> None:
        self.lose()
        if self in self.broker.connections:
            self.broker.connections.remove(self)

    def server(self) -> str:
        from . import __version__

        return f"memory {__version__}"

    def native(self) -> Broker:
        return self.broker


def broker(name: str, kind: type[Broker] = Broker) -> Broker:
    """The broker that every `memory://<name>` of this process shares; "" is one too."""
    return _brokers.setdefault((kind, name), kind())


def forget(names: Iterable[str]) -> None:
    """Throw brokers away, so that a test starts empty."""
    for key in [k for k in _brokers if k[1] in names]:
        del _brokers[key]


def _profile(name: str) -> AbstractDriver:
    """A driver of adapter `name`, never opened, only asked what it declares."""
    from .registry import adapters, driver_class, scheme_of

    scheme = scheme_of(name)
    if scheme is None or name == "memory":
        raise ConfigError(
            f"memory profile {name!r}: no installed adapter has that name; installed schemes: "
            f"{', '.join(sorted(adapters()))}"
        )
    found = driver_class(scheme)
    return found(Address(scheme, (("127.0.0.1", None),)), found.Options(), {})
