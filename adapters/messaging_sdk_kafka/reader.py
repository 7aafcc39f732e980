"""Reading a topic's history: a consumer of given partitions, in no group."""

from __future__ import annotations

import asyncio
import math
import re
import threading
from collections import deque
from collections.abc import Mapping
from typing import Any, Final

from confluent_kafka import OFFSET_BEGINNING, OFFSET_END, Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka import Message as Record

from messaging_sdk import spi
from messaging_sdk.errors import OutOfRange, UsageError
from messaging_sdk.model import Message

from .errors import loss, refusal
from .receiver import BATCH, message_of

ANSWER_S: Final = 5.0
POLL_S: Final = 0.1


class HistoryReader(spi.Reader):
    """A position is the offset to go on with of each partition, as "0:17,1:4".

    The client is asked in a thread of the loop's pool, a batch at a time; what it gave waits in a buffer.
    """

    def __init__(self, config: Mapping[str, Any], topic: str, what: str) -> None:
        self._topic = topic
        self._what = what
        self._lost: KafkaError | None = None
        own = {
            "group.id": "messaging-sdk-reader",  # the client wants one; it is never joined
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "auto.offset.reset": "error",
            "queued.max.messages.kbytes": 16_384,
            "error_cb": self._on_error,
        }
        self._consumer = Consumer({**config, **own})
        self._next: dict[int, int] = {}
        self._end: dict[int, int] = {}
        self._left: set[int] = set()  # partitions that are not at their end, by what was fetched
        self._buffer: deque[Record] = deque()
        self._one = threading.Lock()  # a cancelled read's thread may still be at it
        self._is_closed = False

    async def start(self, partitions: int, since: float | str | None) -> None:
        """Raises OutOfRange, UsageError, KafkaException; after the last it may be called again."""
        await asyncio.to_thread(self._begin, partitions, since)

    def _begin(self, partitions: int, since: float | str | None) -> None:
        every = range(partitions)
        ends, firsts = self._offsets(every, OFFSET_END), self._offsets(every, OFFSET_BEGINNING)
        if isinstance(since, str):
            start = _parsed(since)
            if not start or any(offset > ends.get(p, -1) for p, offset in start.items()):
                raise UsageError(f"{self._what}: {since!r} is no position of it")
            start = {p: start.get(p, firsts[p]) for p in every}  # a partition that came later is read whole
        elif since is None:
            start = firsts
        else:
            start = self._offsets(every, math.floor(since * 1000))
        self._end = ends
        self._next = {p: ends[p] if start[p] < 0 else start[p] for p in every}
        for p in every:
            if self._next[p] < firsts[p]:
                raise self._gone(p, f"the oldest is {firsts[p]}")
        self._left = {p for p in every if self._next[p] < ends[p]}
        self._consumer.assign([TopicPartition(self._topic, p, self._next[p]) for p in self._left])

    def _offsets(self, partitions: range, moment: int) -> dict[int, int]:
        """Of the first message at `moment` (ms since the epoch) or later, of each partition; -1 = none."""
        asked = [TopicPartition(self._topic, p, moment) for p in partitions]
        found = self._consumer.offsets_for_times(asked, timeout=ANSWER_S)
        for partition in found:
            if partition.error is not None:
                raise KafkaException(partition.error)
        return {p.partition: p.offset for p in found}

    async def read(self) -> Message[Any] | None:
        while not self._buffer:
            if not self._left:
                self._next = dict(self._end)
                return None
            await asyncio.to_thread(self._fetch)
        record = self._buffer.popleft()
        partition, offset = record.partition(), record.offset()
        assert partition is not None and offset is not None
        self._next[partition] = offset + 1
        return message_of(record)

    def _fetch(self) -> None:
        with self._one:
            if self._buffer or not self._left:
                return
            if self._lost is not None or self._is_closed:
                raise loss(self._lost, self._what)
            for record in self._consumer.consume(BATCH, POLL_S):
                self._take(record)

    def _take(self, record: Record) -> None:
        error, partition, offset = record.error(), record.partition(), record.offset()
        if error is not None and error.code() != KafkaError._PARTITION_EOF:
            self._refuse(error, partition)
        elif partition in self._left and offset is not None:
            if error is None and offset < self._end[partition]:
                self._buffer.append(record)
            if error is not None or offset + 1 >= self._end[partition]:
                self._left.discard(partition)
                self._consumer.pause([TopicPartition(self._topic, partition)])

    def _refuse(self, error: KafkaError, partition: int | None) -> None:
        if error.code() in (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE):
            raise self._gone(partition, "retention was faster than this reader")
        made = refusal(error, self._what)
        if not made.transient:
            raise made
        self._lost = self._lost or (error if error.fatal() else None)  # else the client tries again by itself

    def _gone(self, partition: int | None, why: str) -> OutOfRange:
        at = f"partition {partition}, offset {self._next.get(partition or 0)}"
        return OutOfRange(f"{self._what}: {at} is deleted: {why}; raise retention_s, or begin at the start")

    def _on_error(self, error: KafkaError) -> None:
        if error.code() == KafkaError._ALL_BROKERS_DOWN or error.fatal():
            self._lost = self._lost or error

    def position(self) -> str:
        return ",".join(f"{p}:{offset}" for p, offset in sorted(self._next.items()))

    async def close(self) -> None:
        self._is_closed = True
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        with self._one:
            self._consumer.close()


def _parsed(position: str) -> dict[int, int]:
    """Offset by partition; of a text that is no position: nothing."""
    found = re.fullmatch(r"\d+:\d+(,\d+:\d+)*", position)
    return {int(p): int(offset) for p, offset in re.findall(r"(\d+):(\d+)", position)} if found else {}
