"""Flaws in what a replay reads."""

from __future__ import annotations

from collections import deque
from typing import Any, Final

from messaging_sdk import Destination, Message, memory
from messaging_sdk.memory import Broker
from messaging_sdk.memory_history import History, MemoryReader
from messaging_sdk.spi import Reader

from .planting import Double, with_broker, with_reader


class FollowsTheEnd(MemoryReader):
    async def read(self) -> Message[Any] | None:
        self.end = self.history.end
        return await super().read()


class PositionReadAhead(MemoryReader):
    def position(self) -> str:
        return str(min(self.end, self.next + 7))


class PositionBeforeTheLast(MemoryReader):
    def position(self) -> str:
        return str(max(self.history.first, self.next - 1))


class JumpsOverGaps(MemoryReader):
    def __init__(self, history: History, start: int) -> None:
        super().__init__(history, max(start, history.first))


class NewestFirst(MemoryReader):
    def __init__(self, history: History, start: int) -> None:
        super().__init__(history, start)
        self.history = History()
        self.history.entries, self.history.first = deque(reversed(history.entries)), history.first


class BodyOnly(MemoryReader):
    async def read(self) -> Message[Any] | None:
        found = await super().read()
        return found and Message(found.body, found.id, found.key)


class WholeMinutes(Broker):
    class Rounding(History):
        def number_at(self, moment_s: float) -> int:
            return super().number_at(moment_s // 60 * 60)

    history_class = Rounding


class TakesFromTheGroups(memory.Driver):
    async def open_reader(self, destination: Destination[Any], since: float | str | None) -> Reader:
        for store in self.broker.targets(destination):
            store.waiting.clear()
        return await super().open_reader(destination, since)


DOUBLES: Final = (
    Double("replay-follows-the-end", "a replay yields what was published after it was entered", ("REP-01",),
     "it must end at what was stored then", with_reader(FollowsTheEnd)),
    Double("replay-newest-first", "history is read backwards", ("REP-01", "REP-03"),
     "order must be that of storing", with_reader(NewestFirst)),
    Double("replay-body-only", "headers and correlation ids are not in the history", ("REP-01",),
     "what is read again is compared whole", with_reader(BodyOnly)),
    Double("replay-position-read-ahead", "a position is behind what was fetched, not what was yielded", ("REP-03",),
     "what lies between is missing", with_reader(PositionReadAhead)),
    Double("replay-position-before-the-last", "a position is before the last message", ("REP-03", "REP-06"),
     "one comes twice", with_reader(PositionBeforeTheLast)),
    Double("replay-jumps-over-gaps", "what retention deleted is skipped in silence", ("REP-05",),
     "OutOfRange must be raised", with_reader(JumpsOverGaps)),
    Double("replay-whole-minutes", "a replay's time is cut to minutes", ("REP-02",),
     "earlier messages come with it", with_broker(WholeMinutes)),
    Double("replay-takes-from-the-groups", "what a replay reads is gone for the groups", ("REP-04",),
     "the group must get it all", TakesFromTheGroups),
)  # fmt: skip
