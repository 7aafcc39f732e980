"""Flaws in how many messages are said to be left."""

from __future__ import annotations

from typing import Any, Final

from messaging_sdk import Destination, NotFound, memory
from messaging_sdk.memory import Entry, MemoryReceiver, Store

from .planting import Double, with_store


class AlwaysZero(Store):
    def lag(self) -> int:
        return 0


class CountsTheSettled(Store):
    """As a broker that keeps what was settled, and is asked for how much it keeps."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.settled = 0

    def accept(self, receiver: MemoryReceiver, entry: Entry) -> bool:
        is_done = super().accept(receiver, entry)
        self.settled += is_done
        return is_done

    def lag(self) -> int:
        return super().lag() + self.settled


class ForgetsWhatIsOut(Store):
    def lag(self) -> int:
        return len(self.waiting)


class CountsWhatIsOut(Store):
    def lag(self) -> int:
        return len(self.waiting) + len(self.held)


class CountsFromTheFirstUnsettled(Store):
    """As a log whose one number is all that is looked at: what is settled ahead of it counts as left."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.ahead: set[int] = set()

    def accept(self, receiver: MemoryReceiver, entry: Entry) -> bool:
        self.ahead.add(entry.serial)
        return super().accept(receiver, entry)

    def lag(self) -> int:
        first = min((e.serial for e in (*self.held, *self.waiting)), default=1 << 62)
        return super().lag() + sum(serial > first for serial in self.ahead)


class AllGroupsTogether(memory.Driver):
    async def lag(self, destination: Destination[Any], group: str | None) -> int:
        await super().lag(destination, group)
        return sum(store.lag() for store in self.broker.targets(destination))


class KnowsItsOwnOnly(memory.Driver):
    """As an adapter that counts what its own process sent and settled, and never asks."""

    async def lag(self, destination: Destination[Any], group: str | None) -> int:
        found = await super().lag(destination, group)
        return found if self.senders or self.receivers else 0


class AbsentIsEmpty(memory.Driver):
    async def lag(self, destination: Destination[Any], group: str | None) -> int:
        try:
            return await super().lag(destination, group)
        except NotFound:
            return 0


DOUBLES: Final = (
    Double("lag-always-zero", "nothing is ever said to be left", ("LAG-01", "CAP-01.lag"),
     "a known backlog must be told of", with_store(AlwaysZero)),
    Double("lag-counts-the-settled", "what was handled counts as left", ("LAG-01", "CAP-01.lag"),
     "the number must fall with each settlement", with_store(CountsTheSettled)),
    Double("lag-forgets-what-is-out", "what a consumer holds is not counted, though it is said to be",
     ("LAG-02", "CAP-01.lag"), "it is asked while a window is full", with_store(ForgetsWhatIsOut)),
    Double("lag-counts-what-is-out", "what a consumer holds is counted, though it is said not to be",
     ("LAG-02", "CAP-01.lag"), "it is asked while a window is full", with_store(CountsWhatIsOut), "lease"),
    Double("lag-of-all-groups", "a topic's groups are counted together", ("LAG-03",),
     "one group settles, the other does not", AllGroupsTogether),
    Double("lag-from-the-first-unsettled", "what is settled ahead of an open message counts as left", ("LAG-04",),
     "it is settled from the last to the first", with_store(CountsFromTheFirstUnsettled)),
    Double("lag-of-this-process", "what other processes published is not counted", ("LAG-01", "LAG-02"),
     "it is asked elsewhere than where it was published and settled", KnowsItsOwnOnly),
    Double("lag-of-the-absent", "what does not exist is said to be empty", ("LAG-06",),
     "NotFound must be raised", AbsentIsEmpty),
)  # fmt: skip
