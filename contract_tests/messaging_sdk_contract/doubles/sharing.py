"""Flaws in who gets what: groups, competing consumers, neighbours of similar name."""

from __future__ import annotations

import asyncio
import bisect
import time
from typing import Any, Final

from messaging_sdk import Capabilities, Destination, memory
from messaging_sdk.memory import Broker, Entry, MemoryReceiver, Store
from messaging_sdk.model import Outgoing
from messaging_sdk.spi import OnRevoke

from .planting import Double, with_broker, with_receiver, with_store


class EveryMemberGetsAll(Store):
    def put(self, message: Outgoing) -> None:
        members: list[MemoryReceiver | None] = [*self.receivers] or [None]
        for receiver in members:
            entry = Entry(message, next(self.serials), time.monotonic())
            entry.holder = receiver
            bisect.insort(self.waiting, entry, key=Entry.rank)
        self.offer()


class OneTakesAll(Store):
    def take(self, receiver: MemoryReceiver, count: int) -> list[Entry]:
        return super().take(receiver, count) if receiver is self.receivers[0] else []


class OnlyFirstGroup(Broker):
    def route(self, destination: Destination[Any], message: Outgoing) -> None:
        groups = self.topics.get(f"topic {destination.name}", [])
        if destination.tag == "topic" and groups:
            self.store(self.stores[f"topic {destination.name}", groups[0]], message)
        else:
            super().route(destination, message)


class OfflineGroupLoses(Broker):
    def store(self, store: Store, message: Outgoing) -> None:
        if store.receivers:
            super().store(store, message)


class NewGroupGetsHistory(Broker):
    def __init__(self) -> None:
        super().__init__()
        self.history: dict[str, list[Outgoing]] = {}

    def route(self, destination: Destination[Any], message: Outgoing) -> None:
        self.history.setdefault(destination.name, []).append(message)
        super().route(destination, message)

    def open_group(self, destination: Destination[Any], group: str, caps: Capabilities) -> Store:
        known = group in self.topics.get(f"topic {destination.name}", [])
        store = super().open_group(destination, group, caps)
        for message in () if known else self.history.get(destination.name, ()):
            store.put(message)
        return store


class PrefixCrosstalk(Broker):
    def route(self, destination: Destination[Any], message: Outgoing) -> None:
        super().route(destination, message)
        for (name, _), store in list(self.stores.items()):
            bare = name.removeprefix("topic ")
            if bare != destination.name and bare.startswith(destination.name):
                store.put(message)
        for name, listeners in self.listeners.items():
            if name != destination.name and name.startswith(destination.name):
                for listener in listeners:
                    listener.overhear(message)


class SignalGroupGetsAll(Broker):
    def signal(self, destination: Destination[Any], message: Outgoing) -> None:
        for listener in self.listeners.get(destination.name, ()):
            listener.overhear(message)


class SignalKeepsThePast(memory.Driver):
    class KeepingBroker(Broker):
        def __init__(self) -> None:
            super().__init__()
            self.past: dict[str, list[Outgoing]] = {}

        def signal(self, destination: Destination[Any], message: Outgoing) -> None:
            self.past.setdefault(destination.name, []).append(message)
            super().signal(destination, message)

    broker_class = KeepingBroker

    async def open_receiver(
        self, destination: Destination[Any], group: str | None, window: int, on_revoke: OnRevoke
    ) -> MemoryReceiver:
        receiver = await super().open_receiver(destination, group, window, on_revoke)
        for message in getattr(self.broker, "past", {}).get(destination.name, ()):
            receiver.overhear(message)
        return receiver


class SignalRepeats(MemoryReceiver):
    def overhear(self, message: Outgoing) -> None:
        super().overhear(message)
        super().overhear(message)


class GroupsShareSettlement(Broker):
    """One stored copy for all groups: whoever settles it, settles it for everyone."""

    class SharedStore(Store):
        def accept(self, receiver: MemoryReceiver, entry: Entry) -> bool:
            for other in self.__dict__.get("siblings", ()):
                if other is not self:
                    other.waiting = [e for e in other.waiting if e.message is not entry.message]
                    other.held = {e for e in other.held if e.message is not entry.message}
            return super().accept(receiver, entry)

    store_class = SharedStore

    def open_group(self, destination: Destination[Any], group: str, caps: Capabilities) -> Store:
        opened = super().open_group(destination, group, caps)
        name = f"topic {destination.name}"
        siblings = [self.stores[name, g] for g in self.topics[name]]
        for store in siblings:
            store.__dict__["siblings"] = siblings
        return opened


class WindowUnbounded(MemoryReceiver):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.limit = 1 << 30


class CancelledReceiveLoses(MemoryReceiver):
    async def receive_batch(self, max_deliveries: int) -> list[Any]:
        found = await super().receive_batch(max_deliveries)
        await asyncio.sleep(0.002)  # cancelled here, `found` is held by nobody
        return found


DOUBLES: Final = (
    Double("every-member-gets-all", "consumers of one group do not share", ("GRP-01",),
     "the members' messages must be disjoint", with_store(EveryMemberGetsAll)),
    Double("one-takes-all", "only the first consumer gets anything", ("GRP-01", "ORD-10"),
     "each member must get some", with_store(OneTakesAll)),
    Double("only-first-group", "a topic's later groups get nothing", ("GRP-06",),
     "each group must get all", with_broker(OnlyFirstGroup)),
    Double("offline-group-loses", "a durable group misses what comes while it is away", ("GRP-08",),
     "it must catch up", with_broker(OfflineGroupLoses)),
    Double("new-group-gets-history", "a new group starts at the beginning", ("GRP-10",),
     "it must start at now", with_broker(NewGroupGetsHistory)),
    Double("prefix-crosstalk", "orders also reaches orders.created", ("MSG-06",),
     "every message names its destination", with_broker(PrefixCrosstalk)),
    Double("signal-group-gets-all", "every member of a signal's group gets a copy", ("GRP-01", "GRP-07"),
     "one member must get it", with_broker(SignalGroupGetsAll)),
    Double("signal-keeps-the-past", "a late listener gets old signals", ("DEL-03", "GRP-09"),
     "nothing may wait for the absent", SignalKeepsThePast),
    Double("signal-repeats", "a signal arrives twice", ("DEL-01", "DEL-02"),
     "at most once", with_receiver(SignalRepeats)),
    Double("groups-share-settlement", "what one group settles is gone for the others", ("GRP-06", "GRP-11"),
     "each group must get all", with_broker(GroupsShareSettlement)),
    Double("window-unbounded", "a consumer is flooded beyond its window", ("CAP-01.window", "BAT-01"),
     "unsettled deliveries are counted", with_receiver(WindowUnbounded)),
    Double("cancelled-receive-loses", "a message fetched by a cancelled receive is gone", ("SPI-01",),
     "the ledger over many cancellations must be whole", with_receiver(CancelledReceiveLoses)),
)  # fmt: skip
