"""Reading a topic's history: a consumer of given partitions, in no group."""

from __future__ import annotations

import asyncio
import math
import re
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, Final

from confluent_kafka import OFFSET_BEGINNING, OFFSET_END, Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka import Message as Record

from messaging_sdk import spi
from messaging_sdk.errors import ConnectError, MessagingError, OutOfRange, UsageError
from messaging_sdk.model import Message

from .errors import TABLE, UNKNOWN_TOPIC, Solitude, loss, refusal
from .receiver import BATCH, message_of

ANSWER_S: Final = 5.0
POLL_S: Final = 0.1
CLOSE_POLL_S: Final = 0.01
_GONE: Final = (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE)
_OF_GROUPS: Final = (KafkaError.GROUP_AUTHORIZATION_FAILED,)
"""The client looks for a coordinator although it joins nothing."""


class HistoryReader(spi.Reader):
    """A position is the topic's id and the offset to go on with of each partition, as "<id>/0:17,1:4".

    The client is asked in a thread of the loop's pool, a batch at a time; what it gave waits in a buffer.
    """

    def __init__(self, config: Mapping[str, Any], topic: str, topic_id: str, what: str) -> None:
        self._topic = topic
        self._topic_id = topic_id
        self._what = what
        own = {
            **Solitude(self._on_error).config(),
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
        self._short: dict[int, int] = {}  # of those where the log ended sooner than it was said to: where
        self._buffer: deque[Record] = deque()
        self._failed: MessagingError | None = None
        self._one = threading.Lock()  # a cancelled read's thread may still be at it
        self._closer: threading.Thread | None = None

    async def start(self, partitions: int, since: float | str | None) -> None:
        """Raises OutOfRange, UsageError, KafkaException; after the last it may be called again."""
        await asyncio.to_thread(self._begin, partitions, since)

    def _begin(self, partitions: int, since: float | str | None) -> None:
        every = range(partitions)
        ends, firsts = self._offsets(every, OFFSET_END), self._offsets(every, OFFSET_BEGINNING)
        if isinstance(since, str):
            start = self._parsed(since, ends)
        elif since is None:
            start = firsts
        else:
            found = self._offsets(every, math.floor(since * 1000))
            start = {p: ends[p] if offset < 0 else offset for p, offset in found.items()}
        self._next, self._end = start, ends
        for p in every:
            if start[p] < firsts[p]:
                raise self._gone(p, f"the oldest is {firsts[p]}")
        self._left = {p for p in every if start[p] < ends[p]}
        self._consumer.assign([TopicPartition(self._topic, p, start[p]) for p in self._left])

    def _parsed(self, position: str, ends: Mapping[int, int]) -> dict[int, int]:
        """The offsets of a position; a partition that came later is read from its beginning."""
        topic_id, _, offsets = position.rpartition("/")  # an id may have one of its own
        if not re.fullmatch(r"\d+:\d+(,\d+:\d+)*", offsets):
            raise UsageError(f"{self._what}: {position[:60]!r} is no position of it")
        if topic_id != self._topic_id:
            raise OutOfRange(f"{self._what}: the topic was deleted and made again; begin at the start")
        start = {int(p): int(offset) for p, offset in re.findall(r"(\d+):(\d+)", offsets)}
        if start.keys() - ends.keys():
            raise ConnectError(f"{self._what}: the broker does not know all partitions yet; try again")
        cut = [p for p, end in ends.items() if start.get(p, 0) > end]
        if cut:
            raise OutOfRange(
                f"{self._what}: partition {cut[0]} ends at {ends[cut[0]]}, before the position: its log was cut"
            )
        return {p: start.get(p, 0) for p in ends}

    def _offsets(self, partitions: Iterable[int], moment: int) -> dict[int, int]:
        """Of the first message at `moment` (ms since the epoch) or later, of each partition; -1 = none."""
        if self._closer is not None:
            raise loss(None, self._what)
        return offsets_at(self._consumer, self._topic, partitions, moment)

    async def read(self) -> Message[Any] | None:
        while True:
            is_whole = not self._left  # before the buffer is looked at: a cancelled read's thread may still fill it
            if self._buffer:
                break
            if self._failed is not None:
                raise self._failed
            if is_whole:
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
            if self._buffer or self._failed is not None or not self._left:
                return
            if self._closer is not None:
                self._failed = loss(None, self._what)
                return
            records = self._consumer.consume(BATCH, POLL_S)
            for record in records:
                self._take(record)
            if self._short and not records:
                self._look_for_the_end()

    def _take(self, record: Record) -> None:
        """An error ends the reading behind what was fetched before and with it."""
        error, partition, offset = record.error(), record.partition(), record.offset()
        if error is not None and error.code() != KafkaError._PARTITION_EOF:
            self._failed = self._failed or self._failure(error, partition)
        elif partition in self._left and offset is not None:
            if error is not None and offset < self._end[partition]:
                self._short[partition] = offset
                return
            if error is None and offset < self._end[partition]:
                self._short.pop(partition, None)
                self._buffer.append(record)
            if error is not None or offset + 1 >= self._end[partition]:
                self._finish(partition)

    def _finish(self, partition: int) -> None:
        self._left.discard(partition)
        self._consumer.pause([TopicPartition(self._topic, partition)])

    def _look_for_the_end(self) -> None:
        """A new leader may not know yet what was acknowledged by the old one; then it gives no answer either. If it
        does, and the log is shorter, it was cut."""
        with suppress(KafkaException):
            for partition, end in self._offsets(list(self._short), OFFSET_END).items():
                if end <= self._short[partition]:
                    self._end[partition] = end
                    self._finish(partition)
                del self._short[partition]

    def _failure(self, error: KafkaError, partition: int | None) -> MessagingError | None:
        code = error.code()
        if code in _GONE:
            return self._gone(partition, "retention was faster than this reader")
        if code == KafkaError.TOPIC_AUTHORIZATION_FAILED:
            return refusal(error, self._what)
        if code in _OF_GROUPS or (code in TABLE and code not in UNKNOWN_TOPIC and not error.fatal()):
            return None  # the client tries again by itself
        return loss(error, self._what)

    def _gone(self, partition: int | None, why: str) -> OutOfRange:
        at = f"partition {partition}, offset {self._next.get(partition or 0)}"
        return OutOfRange(f"{self._what}: {at} is deleted: {why}; raise retention_s, or begin at the start")

    def _on_error(self, error: KafkaError) -> None:
        """Within a poll."""
        if error.code() == KafkaError._ALL_BROKERS_DOWN or error.fatal():
            self._failed = self._failed or loss(error, self._what)

    def position(self) -> str:
        return f"{self._topic_id}/" + ",".join(f"{p}:{offset}" for p, offset in sorted(self._next.items()))

    async def close(self) -> None:
        closer = self.let_go()
        while closer.is_alive():  # noqa: ASYNC110  # nothing tells the loop, and nobody is in a hurry
            await asyncio.sleep(CLOSE_POLL_S)

    def let_go(self) -> threading.Thread:
        """Close without waiting: the client may be waiting for a broker that does not answer."""
        if self._closer is None:
            self._closer = threading.Thread(target=self._close, name="messaging-sdk-kafka-reader", daemon=True)
            self._closer.start()
        return self._closer

    def _close(self) -> None:
        with self._one:
            self._consumer.close()


def offsets_at(client: Consumer, topic: str, partitions: Iterable[int], moment: int) -> dict[int, int]:
    """Of the first message at `moment` (ms since the epoch, OFFSET_BEGINNING or OFFSET_END) or later, of each
    partition; -1 = none. Raises KafkaException."""
    found = client.offsets_for_times([TopicPartition(topic, p, moment) for p in partitions], timeout=ANSWER_S)
    for partition in found:
        if partition.error is not None:
            raise KafkaException(partition.error)
    return {p.partition: p.offset for p in found}
