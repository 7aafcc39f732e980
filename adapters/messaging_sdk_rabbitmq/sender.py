"""Publishing: a batch becomes one run of AMQP frames; confirms come back as a watermark."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from struct import Struct
from typing import TYPE_CHECKING, Final

from pika import frame, spec

from messaging_sdk.errors import (
    Backpressure,
    CapabilityError,
    ConnectionLost,
    InvalidMessage,
    MessagingError,
    NotFound,
    TooLarge,
    Unmet,
)
from messaging_sdk.model import SENT, Outgoing, SendResult, indeterminate, rejected
from messaging_sdk.spi import OnOutcomes, Outcomes, accepted
from messaging_sdk.spi import Sender as SenderContract

if TYPE_CHECKING:
    from .driver import Home, Link

KEY_HEADER: Final = "messaging-key"
HIDDEN: Final = ("x-delivery-count", "x-acquired-count", "x-first-death", "x-last-death", "x-death", "x-opt-")
"""Header names (or their beginnings) that the broker writes; hidden on arrival, refused on publish."""
_ROUTING: Final = ("CC", "BCC")
"""RabbitMQ routes by these headers and closes the channel when they are text."""

_HEADER: Final = Struct(">BHIHHQH")  # frame type, channel, size, class, weight, body size, flags
_FRAME: Final = Struct(">BHI")
_U32: Final = Struct(">I")
_U64: Final = Struct(">Q")
_LENGTH: Final = tuple(bytes((n,)) for n in range(256))
_END: Final = b"\xce"
_MODE_AND_ID: Final = 0x1080  # the flags of delivery_mode and message_id
_UNSENT_BYTES: Final = 1 << 18
"""A signal counts as sent once less than this waits for the socket; much more would hide a stalled broker."""
_UNSENT_POLL_S: Final = 0.005


class Encoder:
    """Makes the frames of messages that go to one exchange and routing key.

    What neighbouring messages share (content type, second, sizes) is packed once: packing took half of the time.
    """

    def __init__(self, exchange: str, key: str, *, durable: bool, mandatory: bool, max_body: int) -> None:
        self._publish = spec.Basic.Publish(exchange=exchange, routing_key=key, mandatory=mandatory)
        self._durable = durable
        self._max_body = max_body
        self._mode = b"\x02" if durable else b"\x01"
        self._plain: tuple[str | None, int, bytes] = (None, _MODE_AND_ID, self._mode)
        self._second, self._stamp = 0, b""
        self.bind(0, 4096)

    def bind(self, channel: int, frame_max: int) -> None:
        """Make frames for this channel from now on, of at most `frame_max` bytes."""
        self._channel = channel
        self._room = frame_max - 8
        method: bytes = frame.Method(channel, self._publish).marshal()
        self._method = method
        self._sizes, self._head, self._start = (-1, -1, -1), b"", b""

    def encode(self, m: Outgoing) -> Sequence[bytes]:
        """All frames of `m`, in pieces. Raises what makes it REJECTED: see `_resize`, `_properties` and `_short`."""
        body, created_s, content_type = m.body, m.created_s, m.content_type
        asked = m.delay_s is not None or m.priority is not None or m.ttl_s is not None
        if asked or m.key is not None or m.headers or m.correlation_id is not None:
            flags, properties = self._properties(m)
        else:
            if content_type != self._plain[0]:
                typed = _MODE_AND_ID if content_type is None else _MODE_AND_ID | 0x8000
                self._plain = (content_type, typed, _type(content_type) + self._mode)
            _, flags, properties = self._plain
        properties += _short(m.id, "message id")
        if created_s:
            flags |= 0x0040
            if (second := int(created_s)) != self._second:
                self._second, self._stamp = second, _U64.pack(second)
            properties += self._stamp
        sizes = (len(properties), len(body), flags)
        if sizes != self._sizes:
            self._resize(m, sizes)
        if 0 < sizes[1] <= self._room:
            return self._head, properties, self._start, body, b"\xce"
        parts = [self._head, properties, b"\xce"]
        for start in range(0, sizes[1], self._room):
            piece = body[start : start + self._room]
            parts += (_FRAME.pack(3, self._channel, len(piece)), piece, b"\xce")
        return parts

    def _resize(self, m: Outgoing, sizes: tuple[int, int, int]) -> None:
        """Pack what precedes the properties and a body of one frame."""
        length, size, flags = sizes
        if size > self._max_body:
            raise TooLarge(
                f"message {m.id!r} has {size} bytes and may have {self._max_body}; raise max_message_size "
                "on the broker and max_body here, or send a reference",
                size_bytes=size,
                limit_bytes=self._max_body,
            )
        if 14 + length > self._room:
            raise InvalidMessage(f"headers of message {m.id!r} take {14 + length} bytes, over one frame")
        self._sizes = sizes
        self._head = self._method + _HEADER.pack(2, self._channel, 14 + length, 60, 0, size, flags)
        self._start = b"\xce" + _FRAME.pack(3, self._channel, min(size, self._room))

    def _properties(self, m: Outgoing) -> tuple[int, bytes]:
        """Flags and properties up to the message id, of a message that has more than most."""
        flags, properties = _MODE_AND_ID, b""
        if m.content_type is not None:
            flags |= 0x8000
            properties = _type(m.content_type)
        if m.key is not None or m.headers:
            flags |= 0x2000
            properties += _table(m.key, m.headers)
        properties += self._mode
        if m.correlation_id is not None:
            flags |= 0x0400
            properties += _short(m.correlation_id, "correlation id")
        if m.ttl_s is not None or m.delay_s is not None or m.priority is not None:
            flags |= 0x0100
            properties += _short(self._expiration(m), "ttl")
        return flags, properties

    def _expiration(self, m: Outgoing) -> str:
        asked = {"delay": m.delay_s, "priority": m.priority, "ttl": None if self._durable else m.ttl_s}
        missing = [name for name, value in asked.items() if value is not None]
        if missing:
            remedy = "no such option on RabbitMQ; a backend that declares it"
            raise CapabilityError([Unmet(m.id, name, "rabbitmq", remedy) for name in missing])
        return str(max(1, round((m.ttl_s or 0) * 1000)))


def _short(text: str, what: str) -> bytes:
    try:
        raw = text.encode()
        return _LENGTH[len(raw)] + raw
    except (IndexError, UnicodeEncodeError) as error:
        raise InvalidMessage(f"{what} must be UTF-8 text of at most 255 bytes") from error


def _type(content_type: str | None) -> bytes:
    return b"" if content_type is None else _short(content_type, "content type")


def _table(key: str | None, headers: Mapping[str, str]) -> bytes:
    """The headers as an AMQP table of long strings, the key first: the receiver looks there first."""
    fields = [] if key is None else [_field(KEY_HEADER, key)]
    for name, value in headers.items():
        if name.startswith(HIDDEN) or name in _ROUTING:
            raise InvalidMessage(f"header {name!r} belongs to RabbitMQ; use another name")
        fields.append(_field(name, value))
    table = b"".join(fields)
    return _U32.pack(len(table)) + table


def _field(name: str, value: str) -> bytes:
    try:
        raw = value.encode()
    except UnicodeEncodeError as error:
        raise InvalidMessage(f"the value of header {name!r} is not UTF-8 text") from error
    return b"".join((_short(name, "a header's name"), b"S", _U32.pack(len(raw)), raw))


class Batch:
    """What one `send_batch` put on the wire. `first` is the thread's; the rest belongs to the caller's loop."""

    __slots__ = ("count", "first", "ids", "indexes", "messages", "on_outcomes", "told")

    def __init__(self, messages: Sequence[Outgoing], indexes: Sequence[int], on_outcomes: OnOutcomes) -> None:
        self.messages = messages
        self.indexes = indexes  # of the encoded ones, in `messages`
        self.on_outcomes = on_outcomes
        self.count = len(indexes)
        self.told = 0
        self.first = 0
        self.ids: dict[str, int] | None = None  # message id -> position, made by the first return

    def chunk(self, upto: int, bad: Mapping[int, SendResult]) -> Outcomes:
        """The outcomes from `told` up to `upto`; `bad` maps positions to what was not OK."""
        start, self.told = self.told, upto
        if not bad and self.count == len(self.messages):
            return accepted(start, upto)
        return [(self.indexes[n], bad.get(n, SENT)) for n in range(start, upto)]


class Sender(SenderContract):
    """One channel on the publish connection. Frames are made on the caller's loop; tags and confirms are the thread's.

    Outcomes come in the order of publishing: what RabbitMQ confirms out of turn (a fanout's slower queue) waits for
    the ones before it. Without confirms (signals), OK means that the bytes went to the operating system's buffer.
    """

    def __init__(self, home: Home, link: Link, what: str, encoder: Encoder, *, confirms: bool) -> None:
        self._home = home
        self._link = link
        self._what = what
        self._encoder = encoder
        self._confirms = confirms
        self._closed = False
        self._open: deque[Batch] = deque()
        self._idle: asyncio.Future[None] | None = None
        # the thread's
        self._unconfirmed: deque[Batch] = deque()
        self._low = 1
        self._next = 1
        self._early: set[int] = set()
        self._bad: dict[int, SendResult] = {}

    async def open(self) -> None:
        """On the thread."""
        channel = await self._link.open(self._lost)
        self._encoder.bind(self._link.number, self._link.wire.params.frame_max)
        if self._confirms:
            channel.add_on_return_callback(lambda _c, _m, properties, _b: self._returned(properties))
            self._link.inbox.on_confirms = self._confirmed
            await self._link.call(channel.confirm_delivery, ack_nack_callback=lambda _: None)

    def send_batch(self, messages: Sequence[Outgoing], on_outcomes: OnOutcomes) -> None:
        if self._closed or self._link.lost is not None:
            raise self._link.lost or _closed(self._what)
        encode = self._encoder.encode
        blobs: list[bytes] = []
        indexes: list[int] = []
        refused: list[tuple[int, SendResult]] = []
        for index, message in enumerate(messages):
            try:
                blobs += encode(message)
            except MessagingError as error:
                refused.append((index, rejected(error)))
            else:
                indexes.append(index)
        if blobs:
            batch = Batch(messages, indexes, on_outcomes)
            self._open.append(batch)
            self._home.thread.inward.post(self._write, batch, b"".join(blobs))
        if refused:
            on_outcomes(refused)

    async def close(self) -> None:
        self._closed = True
        try:
            if self._open:
                self._idle = asyncio.get_running_loop().create_future()
                await self._idle
            with suppress(MessagingError):
                await self._home.run(self._link.close(), self._what)
        except asyncio.CancelledError:
            self._fail(_closed(self._what))
            self._home.thread.inward.post(self.abandon)
            raise

    def _told(self, batch: Batch, upto: int, bad: Mapping[int, SendResult]) -> None:
        """On the caller's loop: pass on what is known of `batch`."""
        if batch.told >= upto:
            return  # given up before by a cancelled close
        chunk = batch.chunk(upto, bad)
        if batch.told == batch.count:
            self._open.remove(batch)
            self._wake_closer()
        batch.on_outcomes(chunk)

    def _fail(self, error: MessagingError, unstored: Batch | None = None) -> None:
        """On the caller's loop: nothing more will be known of what is open, but that the last of `unstored` is not."""
        batches, self._open = self._open, deque()
        self._wake_closer()
        for batch in batches:
            bad = {n: _unknown(error) for n in range(batch.told, batch.count)}
            if batch is unstored:
                bad[batch.count - 1] = rejected(NotFound(str(error)))
            batch.on_outcomes(batch.chunk(batch.count, bad))

    def _wake_closer(self) -> None:
        if not self._open and self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    # the rest runs on the thread

    def abandon(self) -> None:
        self._link.abandon()

    def _lost(self, error: MessagingError) -> None:
        """404: the exchange is gone. Which publish met that is unknown, but the last came then or later."""
        is_absent = getattr(error.__cause__, "reply_code", None) == 404 and self._next - 1 not in self._early
        last = self._unconfirmed[-1] if is_absent and self._unconfirmed else None
        self._home.tell(self._fail, error, last)

    def _write(self, batch: Batch, blob: bytes) -> None:
        batch.first = self._next
        if not self._link.write(blob):
            self._home.tell(self._fail, self._link.lost or _closed(self._what))
            return
        self._next += batch.count
        if self._confirms:
            self._unconfirmed.append(batch)
        else:
            self._written(batch)

    def _written(self, batch: Batch) -> None:
        """OK for a signal once it has left, looked at again and again while the broker does not read."""
        if self._link.lost is not None:
            return
        if self._link.unsent_bytes < _UNSENT_BYTES:
            self._home.tell(self._told, batch, batch.count, {})
        else:
            self._home.thread.loop.call_later(_UNSENT_POLL_S, self._written, batch)

    def _returned(self, properties: spec.BasicProperties) -> None:
        """Nothing is bound to take it. The return comes before the ack, which still counts the tag."""
        text = f"{self._what}: no queue takes this message; provision the destination and its groups"
        for batch in self._unconfirmed:
            if batch.ids is None:
                batch.ids = {batch.messages[index].id: n for n, index in enumerate(batch.indexes)}
            position = batch.ids.get(str(properties.message_id))
            if position is not None and batch.first + position not in self._bad:
                self._bad[batch.first + position] = rejected(NotFound(text))
                return

    def _confirmed(self, confirms: Sequence[tuple[int, bool, bool]]) -> None:
        """(tag, multiple, ok) as they came in one read."""
        low, early = self._low, self._early
        for tag, multiple, ok in confirms:
            if not ok:
                self._refuse(t for t in (range(low, tag + 1) if multiple else (tag,)) if t not in early)
            if multiple:
                early -= {t for t in early if t <= tag}
                low = max(low, tag + 1)
            elif tag == low:
                low += 1
            else:
                early.add(tag)
            while low in early:
                early.remove(low)
                low += 1
        while self._unconfirmed and self._low < low:
            batch = self._unconfirmed[0]
            upto = min(low, batch.first + batch.count)
            bad = self._bad and {t - batch.first: self._bad.pop(t) for t in range(self._low, upto) if t in self._bad}
            self._home.tell(self._told, batch, upto - batch.first, bad or {})
            self._low = upto
            if upto == batch.first + batch.count:
                self._unconfirmed.popleft()

    def _refuse(self, tags: Iterable[int]) -> None:
        for tag in tags:
            text = f"{self._what}: the broker refused it: a queue is full or has no quorum; wait, or raise max_length"
            self._bad.setdefault(tag, rejected(Backpressure(text)))


def _closed(what: str) -> ConnectionLost:
    return ConnectionLost(f"{what}: closed")


def _unknown(error: MessagingError) -> SendResult:
    return indeterminate(ConnectionLost(str(error)))
