"""Flaws in order."""

from __future__ import annotations

import asyncio
import bisect
import time
from typing import Final

from messaging_sdk.memory import Broker, Entry, MemoryReceiver, Store
from messaging_sdk.model import Outgoing

from .planting import Double, with_broker, with_store


class LastInFirstOut(Store):
    def put(self, message: Outgoing) -> None:
        entry = Entry(message, -next(self.serials), time.monotonic())
        bisect.insort(self.waiting, entry, key=Entry.rank)
        self.offer()


class ReturnedToTheTail(Store):
    def give_back(self, entry: Entry) -> None:
        self.held.discard(entry)
        entry.serial = next(self.serials)
        self._wait(entry)


class KeyIgnored(Store):
    def _keys_elsewhere(self, receiver: MemoryReceiver) -> frozenset[str | None]:
        return frozenset()


class PriorityIgnored(Store):
    def put(self, message: Outgoing) -> None:
        message.priority = None
        super().put(message)


class SwapsNeighbours(Broker):
    """Now and then a message is overtaken, as with two connections in one pool."""

    def __init__(self) -> None:
        super().__init__()
        self.passed = 0

    def store(self, store: Store, message: Outgoing) -> None:
        self.passed += 1
        if self.passed % 40:
            super().store(store, message)
        else:
            asyncio.get_running_loop().call_soon(super().store, store, message)


DOUBLES: Final = (
    Double("last-in-first-out", "the newest message comes first", ("ORD-01",),
     "the sequence of arrivals is compared", with_store(LastInFirstOut)),
    Double("returned-to-the-tail", "what comes back comes behind later messages of its key",
     ("ORD-04", "ORD-05"), "order is looked at after a death", with_store(ReturnedToTheTail)),
    Double("key-ignored", "two consumers run one key at once", ("ORD-02", "ORD-06", "CAP-01.order_competition"),
     "runs of one key must not overlap", with_store(KeyIgnored)),
    Double("priority-ignored", "priorities are accepted and do nothing", ("CAP-01.priority",),
     "a waiting backlog is read in order of priority", with_store(PriorityIgnored)),
    Double("swaps-neighbours", "now and then a message is overtaken", ("ORD-01", "ORD-02"),
     "all of a long sequence is compared", with_broker(SwapsNeighbours)),
)  # fmt: skip
