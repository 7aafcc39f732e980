"""Publishing: one producer and the thread that serves it (`Link`), and a `Sender` per destination on top of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final, cast

from confluent_kafka import KafkaError, KafkaException, Producer
from confluent_kafka import Message as Record

from messaging_sdk.errors import CapabilityError, ConnectionLost, InvalidMessage, MessagingError, TooLarge, Unmet
from messaging_sdk.model import SENT, Outgoing, SendResult, indeterminate, rejected
from messaging_sdk.spi import OnOutcomes, Outcomes
from messaging_sdk.spi import Sender as SenderContract
from messaging_sdk.threads import Hop

from .errors import Solitude, is_miscount, loss, native_of, refusal, report

ID: Final = "messaging-id"
CONTENT_TYPE: Final = "messaging-content-type"
CORRELATION: Final = "messaging-correlation"
OURS: Final = (ID, CONTENT_TYPE, CORRELATION)
"""Headers of the SDK beside a message's own. Its key is the record's key, its time the record's timestamp."""

_PAIRS: Final[Outcomes] = tuple((n, SENT) for n in range(SenderContract.max_batch))
"""Slices of it are the outcomes of a batch without refusals: nothing is allocated per message."""
_POLL_S: Final = 0.1
"""Longest time until the thread sees that it is to end; delivery reports wake it at once."""
_RUN: Final = 64
"""Most messages without a key that go to one partition in a row: a request of their own, but not the whole load."""
_BY_KEY: Final = -1  # librdkafka's "any partition": its partitioner chooses


class Link:
    """One producer; lost once, lost for ever. Only `_serve` runs on the thread; `lost` may be read anywhere.

    librdkafka connects again by itself and would deliver late what core has sent again by then: what a lost link still
    has is purged.
    """

    def __init__(self, config: Mapping[str, Any], loop: asyncio.AbstractEventLoop, what: str) -> None:
        self.lost: MessagingError | None = None
        self.refused: MessagingError | None = None
        """Why it was lost, if that will not heal by itself: a missing ACL."""
        self.is_used = False
        """Until then nothing can be lost with a connection, so a doubtful loss is none."""
        self.trouble = ""
        """What the client said last, for errors that know no more than that there was no answer."""
        self.hop = Hop(loop)
        self._what = what
        self._ended = False
        self._solitude = Solitude(self._on_error)
        self.producer = Producer({**config, **self._solitude.config(), "error_cb": self._on_error})
        self.thread = threading.Thread(target=self._serve, name="messaging-sdk-kafka-sender", daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        producer = self.producer
        try:
            while not self._ended:
                self._poll(_POLL_S)
                if self.lost is not None:
                    producer.purge()
            producer.purge()
            self._poll(0)
        finally:  # here, since it joins the client's threads; left to the collector, the loop might be who does
            producer.close()

    def _poll(self, wait_s: float) -> None:
        try:
            self.producer.poll(wait_s)
        except KafkaException as error:  # a fatal error is raised here, not told to `_on_error`
            self.lost = self.lost or loss(error, self._what)
            refused = refusal(error, self._what)
            self.refused = None if refused.transient else refused

    def _on_error(self, error: KafkaError) -> None:
        """On the thread. A single broker that is down is the client's business, all of them ours."""
        self.trouble = error.str()
        if error.code() == KafkaError._ALL_BROKERS_DOWN and (self.is_used or not is_miscount(error)):
            self.lost = self.lost or loss(error, self._what)

    def tell(self, call: Callable[..., object], *args: Any) -> None:
        """From the thread: run `call(*args)` on the opener's loop, in order."""
        with suppress(RuntimeError):  # that loop was closed without closing the driver: nobody listens
            self.hop.post(call, *args)

    def close(self) -> None:
        """What is still unsent is given up. Returns at once; the thread ends within a moment."""
        self.lost = self.lost or loss(None, self._what)
        self._ended = True


class Slot:
    """One batch under way: counts its delivery reports on the thread, one hop to the loop for all of them.

    Reused, because its callbacks, one per index, are what would cost most to make.
    """

    __slots__ = ("failed", "messages", "on_outcomes", "refused", "reported", "reports", "sender", "taken")

    def __init__(self, sender: Sender) -> None:
        self.sender = sender
        self.reports = [partial(self._report, index) for index in range(sender.max_batch)]
        self.messages: Sequence[Outgoing] = ()
        self.on_outcomes: OnOutcomes | None = None
        self.failed: dict[int, KafkaError | None] = {}
        self.refused: dict[int, SendResult] = {}
        self.reported = 0  # the thread's
        self.taken = -1  # the loop's; known when the whole batch was handed over

    def _report(self, index: int, error: KafkaError | None, record: Record) -> None:
        if error is not None or (record.offset() is None and self.sender.confirmed):
            if error is None and self._is_sent_again(index, record):
                return
            self.failed[index] = error
        self.reported += 1
        if self.reported == self.taken:
            self.sender.link.tell(self.sender.finish, self)

    def _is_sent_again(self, index: int, record: Record) -> bool:
        """The client took the message for stored since a later one of its partition was. That is not so where the
        partition had just got its leader, which refused the one and takes any sequence from a producer that it has no
        record of (librdkafka 2.16; confluent-kafka-go issue 921)."""
        if self.on_outcomes is None:  # given up
            return False
        sender, message, produce = self.sender, self.messages[index], self.sender.link.producer.produce
        target, created_ms = cast(int, record.partition()), int(message.created_s * 1000)
        on_report, headers = self.reports[index], _headers(message)
        try:
            produce(sender._topic, message.body, record.key(), target, on_report, None, created_ms, headers)
        except (KafkaException, BufferError):
            return False
        return True


class Sender(SenderContract):
    """Messages of one topic over the driver's producer.

    With a key the partition is the Java client's (murmur2); without one they go round the partitions.
    """

    max_in_flight = 2

    def __init__(self, link: Link, topic: str, partitions: int, what: str, *, max_body: int, confirmed: bool) -> None:
        self.link = link
        self.confirmed = confirmed
        self._topic = topic
        self._partitions = partitions
        self._what = what
        self._max_body = max_body
        self._next = 0
        self._free: list[Slot] = []
        self._open: set[Slot] = set()
        self._idle: asyncio.Future[None] | None = None
        self._closed = False

    def send_batch(self, messages: Sequence[Outgoing], on_outcomes: OnOutcomes) -> None:
        if self._closed or self.link.lost is not None:
            raise ConnectionLost(str(self.link.lost or f"{self._what}: closed"))
        self.link.is_used = True
        slot = self._free.pop() if self._free else Slot(self)
        slot.messages, slot.on_outcomes = messages, on_outcomes
        reports, refused = slot.reports, slot.refused
        if len(messages) > len(reports):  # core never does
            reports += [partial(slot._report, n) for n in range(len(reports), len(messages))]
        self._open.add(slot)
        produce, topic, limit = self.link.producer.produce, self._topic, self._max_body
        spread = min(_RUN, max(1, len(messages) // self._partitions))
        for index, message in enumerate(messages):
            body, key = message.body, message.key
            if key is None:
                target = self._next // spread % self._partitions
                self._next += 1
            else:
                target = _BY_KEY
            try:
                if len(body) > limit or message.ttl_s or message.delay_s or message.priority is not None:
                    raise self._impossible(message)
                raw_key = None if key is None else key.encode()
                created_ms = int(message.created_s * 1000)
                produce(topic, body, raw_key, target, reports[index], None, created_ms, _headers(message))
            except (MessagingError, KafkaException, BufferError, UnicodeEncodeError) as error:
                native = native_of(error)
                if native is not None and native.code() == KafkaError._FATAL:  # as the thread is about to see
                    refused[index] = indeterminate(loss(error, self._what))
                else:
                    refused[index] = rejected(self._refusal(error, message))
        slot.taken = len(messages) - len(refused)
        if slot.reported == slot.taken:
            self.finish(slot)

    def finish(self, slot: Slot) -> None:
        """On the loop: all reports of `slot` are there. Both sides may see that first."""
        on_outcomes, count = slot.on_outcomes, len(slot.messages)
        if on_outcomes is None or slot.reported != slot.taken:
            return
        if not slot.failed and not slot.refused and count <= len(_PAIRS):
            outcomes: Outcomes = _PAIRS[:count]
        else:
            bad = {**slot.refused, **{n: self._failure(error) for n, error in slot.failed.items()}}
            outcomes = [(n, bad.get(n, SENT)) for n in range(count)]
        slot.on_outcomes, slot.messages = None, ()
        slot.failed, slot.refused = {}, {}
        slot.reported, slot.taken = 0, -1
        self._open.discard(slot)
        self._free.append(slot)
        if not self._open and self._idle is not None and not self._idle.done():
            self._idle.set_result(None)
        on_outcomes(outcomes)

    def _failure(self, error: KafkaError | None) -> SendResult:
        if error is None:
            return indeterminate(ConnectionLost(f"{self._what}: no answer for this message, only for a later one"))
        if error.code() == KafkaError._DESTROY and self.link.lost is not None:  # the client was, not the topic
            return indeterminate(loss(error, self._what))
        trouble = self.link.trouble if error.code() == KafkaError._MSG_TIMED_OUT else ""
        return report(error, self._what + (f" (the client said: {trouble})" if trouble else ""))

    async def close(self) -> None:
        self._closed = True
        try:
            if self._open:
                self._idle = asyncio.get_running_loop().create_future()
                await self._idle
        except asyncio.CancelledError:
            self._give_up()
            raise

    def _give_up(self) -> None:
        """Nothing more will be told of what is open."""
        slots, self._open = self._open, set()
        for slot in slots:
            on_outcomes, count = slot.on_outcomes, len(slot.messages)
            slot.on_outcomes = None  # its reports may still come
            if on_outcomes is not None:
                error = f"{self._what}: closed before the broker answered"
                unknown = [(n, indeterminate(ConnectionLost(error))) for n in range(count) if n not in slot.refused]
                on_outcomes([*slot.refused.items(), *unknown])

    def _impossible(self, message: Outgoing) -> MessagingError:
        size = len(message.body)
        if size > self._max_body:
            return TooLarge(
                f"message {message.id!r} has {size} bytes and may have {self._max_body}; raise message.max.bytes on "
                "the broker and max_message_bytes here, or send a reference",
                size_bytes=size,
                limit_bytes=self._max_body,
            )
        asked = {"ttl": message.ttl_s, "delay": message.delay_s, "priority": message.priority}
        remedy = "no such option on Kafka; a backend that declares it"
        return CapabilityError([Unmet(message.id, n, "kafka", remedy) for n, v in asked.items() if v is not None])

    def _refusal(self, error: BaseException, message: Outgoing) -> MessagingError:
        if isinstance(error, UnicodeEncodeError):
            return InvalidMessage(f"message {message.id!r}: key or header is not UTF-8 text")
        if isinstance(error, BufferError):
            error = KafkaException(KafkaError(KafkaError._QUEUE_FULL))
        return refusal(error, f"{self._what}: message {message.id!r}")


def _headers(message: Outgoing) -> list[tuple[str, str | bytes | None]]:
    """The SDK's headers and the message's own, as bytes: confluent-kafka 2.16.1 cuts a text at its first NUL.

    Raises UnicodeEncodeError, InvalidMessage.
    """
    found: list[tuple[str, str | bytes | None]] = [(ID, message.id.encode())]
    if message.content_type is not None:
        found.append((CONTENT_TYPE, message.content_type.encode()))
    if message.correlation_id is not None:
        found.append((CORRELATION, message.correlation_id.encode()))
    for name, value in message.headers.items():
        if not name.isascii():
            name.encode()  # confluent-kafka 2.16.1 crashes the process over a lone surrogate
        if "\0" in name:
            raise InvalidMessage(f"message {message.id!r}: a header's name holds a NUL, which ends it on Kafka")
        found.append((name, value.encode()))
    return found
