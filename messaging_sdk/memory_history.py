"""What the memory backend keeps of a topic, to be read again."""

from __future__ import annotations

import time
from collections import deque
from typing import Any, Final

from .errors import ConnectionLost, OutOfRange
from .model import Message, Meta, Outgoing
from .spi import Reader

HISTORY: Final = 10_000
"""Messages of a topic that can be read again."""


class History:
    """What was stored in a topic, whatever became of it: the last `HISTORY` messages, numbered from 0."""

    def __init__(self) -> None:
        self.entries: deque[tuple[float, Outgoing]] = deque()
        self.first = 0

    @property
    def end(self) -> int:
        return self.first + len(self.entries)

    def append(self, message: Outgoing) -> None:
        self.entries.append((time.time(), message))
        if len(self.entries) > HISTORY:
            self.forget(1)

    def forget(self, count: int) -> None:
        """The oldest are gone."""
        for _ in range(min(count, len(self.entries))):
            self.entries.popleft()
            self.first += 1

    def number_at(self, moment_s: float) -> int:
        """Of the first message that was stored then or later."""
        return next((self.first + n for n, (at_s, _) in enumerate(self.entries) if at_s >= moment_s), self.end)


class MemoryReader(Reader):
    """Reads a topic's history up to the number that it had reached. A position is the number to go on with."""

    def __init__(self, history: History, start: int) -> None:
        self.history = history
        self.next = start
        self.end = history.end
        self.lost = False
        if start < history.first:
            raise OutOfRange(f"the message at {start} is gone; the oldest is {history.first}")

    async def read(self) -> Message[Any] | None:
        if self.lost:
            raise ConnectionLost("the memory connection was cut")
        if self.next >= self.end:
            return None
        if self.next < self.history.first:
            raise OutOfRange(f"the next message, number {self.next}, is gone; the oldest is {self.history.first}")
        _, message = self.history.entries[self.next - self.history.first]
        self.next += 1
        return Message(message.body, message.id, message.key, meta_of(message))

    def position(self) -> str:
        return str(self.next)

    async def close(self) -> None:
        self.lost = True


def meta_of(message: Outgoing) -> Meta:
    """What arrives beside body, id and key."""
    return Meta(message.headers, message.content_type, message.correlation_id, message.created_s or None)
