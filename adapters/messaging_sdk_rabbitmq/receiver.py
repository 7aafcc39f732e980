"""Consuming: the frame parser that replaces pika's for deliveries and confirms, and the receiver on top of it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from struct import Struct
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

from pika import data, spec

from messaging_sdk.errors import MessagingError, SettleLost
from messaging_sdk.model import Delivery, Message, Meta, Session
from messaging_sdk.spi import Disposition
from messaging_sdk.spi import Receiver as ReceiverContract

from .sender import HIDDEN, KEY_HEADER

if TYPE_CHECKING:
    from .driver import Home, Link

Item = tuple[int, bool, bytes, bytes]
"""Delivery tag, redelivered, the properties as they came, body."""

_FRAME: Final = Struct(">BHI")
_ID_AND_TAG: Final = Struct(">IQ")
_U32: Final = Struct(">I")
_U64: Final = Struct(">Q")
_SIZE: Final = Struct(">4xQ")  # of a content header: class and weight, body size
_SETTLE: Final = Struct(">BHIIQBB")  # of basic.ack and basic.nack
_DELIVER: Final = b"\x00\x3c\x00\x3c"
_ACK: Final = 0x003C0050
_NACK: Final = 0x003C0078
_END: Final = 0xCE
_KEY_FIRST: Final = bytes((len(KEY_HEADER),)) + KEY_HEADER.encode() + b"S"
_KEY_NAME: Final = KEY_HEADER.encode()
_EPOCH_BITS: Final = 48
"""Receipt = receiver's number in the upper bits, delivery tag below: a stale receipt never settles another delivery."""


class Inbox:
    """What the parser found for one channel in one read, and the delivery that is not complete yet."""

    __slots__ = (
        "_body",
        "_chunks",
        "_missing",
        "_props",
        "_redelivered",
        "_tag",
        "confirms",
        "items",
        "on_confirms",
        "on_items",
    )

    def __init__(self) -> None:
        self.items: list[Item] = []
        self.confirms: list[tuple[int, bool, bool]] = []
        self.on_items: Callable[[list[Item]], None] | None = None
        self.on_confirms: Callable[[list[tuple[int, bool, bool]]], None] | None = None
        self._tag = 0
        self._redelivered = False
        self._props = b""
        self._missing = -1  # bytes of body; -1: its header has not come
        self._chunks: list[bytes] = []

    def take(self, kind: int, buffer: bytes, start: int, end: int) -> bool:
        """Take one frame's payload, `buffer[start:end]`. False: it is pika's."""
        if kind == 1:
            return self._method(buffer, start)
        if not self._tag:
            return False  # of a basic.return or get-ok, which pika assembles
        if kind == 2:
            self._missing = _SIZE.unpack_from(buffer, start)[0]
            self._props = buffer[start + 12 : end]
            if not self._missing:
                self._complete(b"")
        elif kind == 3:
            self._missing -= end - start
            if self._missing:
                self._chunks.append(buffer[start:end])
            elif self._chunks:
                self._chunks.append(buffer[start:end])
                self._complete(b"".join(self._chunks))
                self._chunks = []
            else:
                self._complete(buffer[start:end])
        else:
            return False
        return True

    def _method(self, buffer: bytes, start: int) -> bool:
        if buffer.startswith(_DELIVER, start):
            at = start + 5 + buffer[start + 4]  # behind the consumer tag
            self._tag = _U64.unpack_from(buffer, at)[0]
            self._redelivered = buffer[at + 8] != 0
            return True
        if self.on_confirms is None:
            return False
        method: int = _U32.unpack_from(buffer, start)[0]
        if method not in (_ACK, _NACK):
            return False
        tag: int = _U64.unpack_from(buffer, start + 4)[0]
        self.confirms.append((tag, buffer[start + 12] & 1 == 1, method == _ACK))
        return True

    def _complete(self, body: bytes) -> None:
        self.items.append((self._tag, self._redelivered, self._props, body))
        self._tag = 0

    def flush(self) -> None:
        if self.items and self.on_items is not None:
            items, self.items = self.items, []
            self.on_items(items)
        if self.confirms and self.on_confirms is not None:
            confirms, self.confirms = self.confirms, []
            self.on_confirms(confirms)


def parse(buffer: bytes, inboxes: Mapping[int, Inbox], to_pika: Callable[[bytes], None]) -> int:
    """Deal out every whole frame of `buffer`; return how many bytes that was. Frames of no inbox go to pika."""
    at, size = 0, len(buffer)
    touched: set[Inbox] = set()
    while size - at > 7:
        kind, channel, length = _FRAME.unpack_from(buffer, at)
        end = at + 7 + length
        if end >= size:
            break
        inbox = inboxes.get(channel)
        if inbox is not None and buffer[end] == _END and inbox.take(kind, buffer, at + 7, end):
            touched.add(inbox)
        else:
            _flush(touched)  # pika's callbacks must not overtake what came before
            to_pika(buffer[at : end + 1])
        at = end + 1
    _flush(touched)
    return at


def _flush(touched: set[Inbox]) -> None:
    while touched:
        touched.pop().flush()


def identify(props: bytes, redelivered: bool) -> tuple[str | None, str | None, int | None]:
    """Message id, key and delivery count, without decoding more than needed.

    The broker puts its counters ahead of our headers on a redelivery, so those are searched. `x-acquired-count` (4.3)
    counts every hand-out; `x-delivery-count` does so on 4.0, but skips basic.nack on 4.3.
    """
    flags = props[0] << 8 | props[1]
    at = 2
    key: str | None = None
    deliveries: int | None = None if redelivered else 1
    for flag in (0x8000, 0x4000):
        if flags & flag:
            at += 1 + props[at]
    if flags & 0x2000:
        end = at + 4 + _U32.unpack_from(props, at)[0]
        if not redelivered and props.startswith(_KEY_FIRST, at + 4):
            start = at + 8 + len(_KEY_FIRST)
            key = props[start : start + _U32.unpack_from(props, start - 4)[0]].decode("utf-8", "replace")
        elif redelivered or props.find(_KEY_NAME, at, end) >= 0:
            table: Any = data.decode_table(props, at)[0]
            key = _text(table[KEY_HEADER]) if KEY_HEADER in table else None
            count = table.get("x-acquired-count", table.get("x-delivery-count"))
            deliveries = count + 1 if redelivered and count is not None else deliveries
        at = end
    at += (flags >> 12 & 1) + (flags >> 11 & 1)  # delivery mode, priority
    if flags & 0x0700:
        for flag in (0x0400, 0x0200, 0x0100):
            if flags & flag:
                at += 1 + props[at]
    if not flags & 0x0080:
        return None, key, deliveries
    return props[at + 1 : at + 1 + props[at]].decode("utf-8", "replace"), key, deliveries


def meta_of(props: bytes) -> Meta:
    """The rest of the properties, by pika's decoder."""
    found = spec.BasicProperties()
    found.decode(props)
    headers = {_text(name): _text(value) for name, value in (found.headers or {}).items()}
    headers = {n: v for n, v in headers.items() if not n.startswith(HIDDEN) and n != KEY_HEADER}
    return Meta(
        headers,
        None if found.content_type is None else _text(found.content_type),
        None if found.correlation_id is None else _text(found.correlation_id),
        None if found.timestamp is None else float(found.timestamp),
    )


def _parsed_here(*_: object) -> None:
    """pika asks for a callback; `parse` takes the deliveries before pika sees them."""


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _message(_tag: int, redelivered: bool, props: bytes, body: bytes) -> Message[Any]:
    id, key, _ = identify(props, redelivered)
    return Message(body, id or _foreign_id(), key, partial(meta_of, props))


def _foreign_id() -> str:
    return f"foreign-{uuid4().hex}"


class Receiver(ReceiverContract):
    """One consumer on one channel. The thread fills `_buffer` (a deque needs no lock), all else is the caller's loop's.

    With settling, the broker's prefetch bounds the buffer. Without (signals), `limit` does: the oldest are dropped.
    An ordered receiver has a connection of its own and leaves by dropping it: after a polite close the next single
    active consumer gets new messages before the returned ones.
    """

    def __init__(self, home: Home, link: Link, what: str, *, epoch: int, ordered: bool, limit: int | None) -> None:
        self._home = home
        self._link = link
        self._what = what
        self._epoch = epoch << _EPOCH_BITS
        self._ordered = ordered
        self._settles = limit is None
        self._session = Session(what)
        self._buffer: deque[Item] = deque(maxlen=limit)
        self._waiter: asyncio.Future[None] | None = None
        self._consumer = ""
        self._arrived = 0  # written by the thread only
        self._taken = 0
        self._next = 1  # the first tag that was not handed out
        self._low = 1  # the first tag that is not settled
        self._settled: set[int] = set()  # above _low

    async def open(self, queue: str, window: int) -> None:
        """On the thread. Returns once the broker has the consumer."""
        channel = await self._link.open(lambda _: self._home.tell(self._lost))
        self._link.inbox.on_items = self._take
        if self._settles:
            await self._link.call(channel.basic_qos, prefetch_count=window)
        channel.add_on_cancel_callback(lambda _: self._link.cancelled())
        consuming = await self._link.call(
            channel.basic_consume, queue, on_message_callback=_parsed_here, auto_ack=not self._settles
        )
        self._consumer = consuming.method.consumer_tag

    def _take(self, items: list[Item]) -> None:
        """On the thread, once per read."""
        self._buffer.extend(items)
        self._arrived += len(items)  # after extend, so that `dropped` is never too high
        self._home.tell(self._wake)

    async def receive_batch(self, max_deliveries: int) -> list[Delivery[Any]] | list[Message[Any]]:
        while not self._buffer or (self._settles and (self._link.lost is not None or self._session.closing)):
            if self._link.lost is not None:
                raise self._link.lost
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        take = self._buffer.popleft
        number = min(max_deliveries, len(self._buffer))
        if self._settles:
            return [self._delivery(*take()) for _ in range(number)]
        self.dropped = max(self.dropped, self._arrived - self._taken - len(self._buffer))
        self._taken += number
        return [_message(*take()) for _ in range(number)]

    def _delivery(self, tag: int, redelivered: bool, props: bytes, body: bytes) -> Delivery[Any]:
        id, key, deliveries = identify(props, redelivered)
        self._next = tag + 1
        return Delivery(
            body,
            id or _foreign_id(),
            key,
            partial(meta_of, props),
            receipt=self._epoch + tag,
            session=self._session,
            deliveries=deliveries,
            redelivered=redelivered,
        )

    def settle_batch(
        self, settlements: Sequence[tuple[Any, Disposition]]
    ) -> asyncio.Future[Sequence[tuple[int, MessagingError]]] | None:
        if self._link.lost is not None:
            raise self._link.lost
        accepted: list[int] = []
        released: list[int] = []
        refused: list[tuple[int, MessagingError]] = []
        for index, (receipt, disposition) in enumerate(settlements):
            tag = receipt - self._epoch
            if not self._low <= tag < self._next or tag in self._settled:
                refused.append((index, SettleLost(f"{self._what}: this delivery is not of this receiver")))
                continue
            if disposition.kind == "accept":
                accepted.append(tag)
            elif self._ordered:
                continue  # later messages are on their way already: it comes back in order with the connection's end
            else:
                released.append(tag)
            self._settled.add(tag)
        # Released first: the ack of a prefix takes all below it that is still outstanding.
        blob = self._encode(_NACK, released, 2) + self._acks(accepted)
        if blob:
            self._home.thread.inward.post(self._link.write, blob)
        if not refused:
            return None
        answer: asyncio.Future[Sequence[tuple[int, MessagingError]]] = asyncio.get_running_loop().create_future()
        answer.set_result(refused)
        return answer

    def _acks(self, tags: list[int]) -> bytes:
        """One ack for the prefix in which all is settled, naming a tag of `tags` (the broker closes the channel over
        one that it does not know any more), and one for each other."""
        low, settled, prefix = self._low, self._settled, 0
        fresh = set(tags)
        while low in settled:
            settled.remove(low)
            if low in fresh:
                prefix = low
            low += 1
        self._low = low
        if not prefix:
            return self._encode(_ACK, tags, 0)
        return self._encode(_ACK, [prefix], 1) + self._encode(_ACK, [t for t in tags if t > prefix], 0)

    def _encode(self, method: int, tags: Sequence[int], bits: int) -> bytes:
        pack, channel = _SETTLE.pack, self._link.number
        return b"".join([pack(1, channel, 13, method, tag, bits, _END) for tag in tags])

    async def stop(self) -> None:
        self._session.closing = True
        if self._ordered or self._link.lost is not None:
            return
        with suppress(MessagingError):
            await self._home.run(self._link.cancel(self._consumer), self._what)
        if self._settles and self._buffer:
            tags = [item[0] for item in self._buffer]
            alone = self._low == self._next  # nothing that was handed out is unsettled
            blob = self._encode(_NACK, tags[-1:], 3) if alone else self._encode(_NACK, tags, 2)
            self._buffer.clear()
            self._home.thread.inward.post(self._link.write, blob)

    async def close(self) -> None:
        self._session.closing = True
        try:
            with suppress(MessagingError):
                await self._home.run(self._leave(), self._what)
        except asyncio.CancelledError:
            self._home.thread.inward.post(self.abandon)
            raise
        finally:
            self._lost()

    async def _leave(self) -> None:
        """On the thread, behind all settlements."""
        if not self._ordered:
            await self._link.close()
            return
        with suppress(Exception):  # lost meanwhile: gone is gone
            await self._link.call(self._link.channel.basic_qos, prefetch_count=1)
        self._link.wire.drop()
        await self._link.wire.ended.wait()

    def abandon(self) -> None:
        """On the thread: leave without waiting."""
        if self._ordered:
            self._link.wire.drop()
        else:
            self._link.abandon()

    def _lost(self) -> None:
        self._session.closing = self._session.lost = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
