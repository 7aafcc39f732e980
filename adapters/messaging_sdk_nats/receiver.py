"""Receivers: a pull loop of our own with credit, double acks, and the take-over of an ordered group."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import deque
from collections.abc import Coroutine, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

from messaging_sdk import spi
from messaging_sdk.errors import ConnectionLost, MessagingError, NotFound, SettleLost
from messaging_sdk.model import Delivery, Message, Meta, Session

from . import errors
from .sender import CONTENT_TYPE, CORRELATION, CREATED, KEY, Answers, Numbers, indexes

if TYPE_CHECKING:
    from .driver import Frame, Link

Failures = Sequence[tuple[int, MessagingError]]

PULL_EXPIRES_S: Final = 30.0  # a pull request is renewed then; longer saves nothing
MAX_TICK_S: Final = 5.0  # idle heartbeat; three missed ones end the receiver
TAKE_OVER_POLL_S: Final = 0.1  # there is no notice of another member's last ack, only its count
TAKE_OVER_PULL: Final = 64  # credit beyond the window while the other member's messages come back
MESSAGE: Final = (
    rb"HMSG [^ ]++ %b (\$JS\.ACK\.%b\.(\d++)\.(\d++)\.\d++\.\d++\.\d++) (\d++) (\d++)\r\n"
    rb"NATS/1\.0\r\nNats-Msg-Id: ([!-~]++)\r\n(?:messaging-key: ([^%%\r\n]++)\r\n)?+"
)
"""A message as our senders write it, up to id and key; others, and those of servers that put a domain into the reply
subject, go the longer way."""
ACK: Final = b" 4\r\n+ACK\r\n"
EMPTY: Final = rb"0\r\n"  # size and body of the answer to a settlement
OURS: Final = frozenset((KEY, CORRELATION, CONTENT_TYPE, CREATED))


class Receipt:
    """What settles one delivery: where to, and until when it is ours."""

    __slots__ = ("reply", "seq", "until_s")

    def __init__(self, reply: bytes, seq: int, until_s: float) -> None:
        self.reply = reply
        self.seq = seq
        self.until_s = until_s


class StreamReceiver(spi.Receiver):
    """One member of a durable pull consumer.

    Ordered: the durable has a pinned client, so that one member gets messages. A member that gets
    the pin may be handed newer messages while the previous one still holds older ones, which come
    back when they are released or their lease ends. So it hands out nothing until the durable's
    unsettled messages are all its own, and then goes by stream sequence.
    """

    def __init__(self, link: Link, path: str, window: int, ack_wait_s: float, on_revoke: spi.OnRevoke) -> None:
        self._link = link
        self._path = path
        self._stream = path.partition(".")[0]
        self._window = window
        self._ack_wait_s = ack_wait_s
        self._on_revoke = on_revoke
        self._session = Session(path)
        self._buffer: deque[Delivery[Any]] = deque()
        self._held: dict[int, Receipt] = {}
        self._credit = 0  # messages asked for that have not come
        self._settles: list[_Settles] = []
        self._next = 1
        self._waiter: asyncio.Future[None] | None = None
        self._error: MessagingError | None = None
        self._stopped = self._closed = False
        self._tick_s = min(MAX_TICK_S, ack_wait_s / 3)
        self._heard_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._group: str | None = None
        self._pin = b""
        self._taking_over = False

    async def start(self, group: str | None) -> None:
        """Listen. `group` is the priority group of an ordered durable."""
        self._group = group
        self._sid, self._inbox = self._link.subscribe_inbox(self._on_frames)
        self._ack_sid, self._ack_inbox = self._link.subscribe_inbox(self._on_answers)
        if group is None:
            self._message = re.compile(MESSAGE % (self._sid, re.escape(self._path.encode())))
            self._link.read_ahead(self._sid, self._read)
        self._link.read_ahead(self._ack_sid, Answers(self._ack_inbox, self._ack_sid, EMPTY, self._on_settled).read)
        self._link.listeners.add(self)
        self._pull()
        await self._link.flush()
        self._heard_s = time.monotonic()
        self._tick()

    # arriving

    async def receive_batch(self, max_deliveries: int) -> list[Delivery[Any]]:
        while not self._buffer or self._taking_over or len(self._held) >= self._window:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self._error is not None:
            raise self._error
        return self._claim(min(max_deliveries, self._window - len(self._held)))

    def _claim(self, most: int) -> list[Delivery[Any]]:
        buffer, held = self._buffer, self._held
        batch = [buffer.popleft() for _ in range(min(most, len(buffer)))]
        for delivery in batch:
            held[delivery.receipt.seq] = delivery.receipt
        return batch

    def _read(self, buffer: bytes, at: int) -> int:
        """Take the run of messages at `at`, as far as they are ours: at half the price of `_on_frames`."""
        match, size, arrive, before = self._message.match, len(buffer), self._arrive, at
        until_s = time.monotonic() + self._ack_wait_s
        known, head_bytes, all_bytes = (b"", b""), 0, 0
        while (found := match(buffer, at)) is not None:
            reply, count, seq, head_size, total, id, key = found.groups()
            if (head_size, total) != known:  # neighbours are often of one size
                known, head_bytes, all_bytes = (head_size, total), int(head_size), int(total)
            start = found.end(5) + 2
            body, stop = start + head_bytes, start + all_bytes
            if stop + 2 > size:
                break
            header = buffer[start:body]
            key = key.decode() if key is not None else key_of(header)
            again = 1 if count == b"1" else int(count)
            arrive(reply, again, int(seq), id.decode(), key, header, buffer[body:stop], until_s)
            at = stop + 2
        if at > before:
            self._arrived()
        return at

    def _arrive(
        self, reply: bytes, count: int, seq: int, id: str, key: str | None, header: bytes, body: bytes, until_s: float
    ) -> None:
        self._credit -= 1
        self._buffer.append(
            Delivery(
                body,
                id,
                key,
                partial(meta_of, header),
                receipt=Receipt(reply, seq, until_s),
                session=self._session,
                deliveries=count,
                redelivered=count > 1,
            )
        )

    def _on_frames(self, frames: list[Frame]) -> None:
        """Messages of other clients and of ordered groups, status messages, and what was split between two reads."""
        until_s = time.monotonic() + self._ack_wait_s
        again = False
        for subject, reply, header, body in frames:
            if not reply.startswith(b"$JS.ACK."):
                self._on_status(subject, header)
                continue
            count, seq, *_ = numbers_of(reply)
            again = again or count > 1
            id = id_of(header, self._stream, seq)
            self._arrive(reply, count, seq, id, key_of(header), header, body, until_s)
            if self._group is not None:
                self._see_pin(header)
        if again and self._group is not None and not self._stopped:
            self._sort()
        self._arrived()

    def _arrived(self) -> None:
        self._heard_s = time.monotonic()
        if self._stopped:
            self._hand_back_buffer()
        self._pull()
        self._wake()

    def _on_status(self, subject: bytes, header: bytes) -> None:
        code, text = header[9:12], header[13 : header.find(b"\r\n")].decode("ascii", "replace")
        asked = subject.rpartition(b".")[2]
        if code == b"100" or asked == b"pin":
            return
        if code == b"423":
            self._lose_pin()
        elif b"Consumer Deleted" in header or b"404 Stream" in header:
            self._fail(NotFound(f"the NATS consumer {self._path} was deleted"))
        elif code in (b"404", b"408", b"409"):
            left = _value(header, b"\r\nNats-Pending-Messages:")
            self._credit = max(0, self._credit - int(left or asked))
            if b"Leadership Change" in header or b"Server Shutdown" in header:
                self._credit = 0
        else:
            self._fail(ConnectionLost(f"NATS refused a pull of {self._path}: {text}"))

    def _pull(self) -> None:
        """Ask for what fits into the window, when at least half of it has been used up."""
        if self._stopped or self._error is not None:
            return
        free = self._window - len(self._held) - len(self._buffer) - self._credit
        if self._taking_over:
            free = max(free, TAKE_OVER_PULL - self._credit)
        if free < max(1, self._credit) or (self._group and not self._pin and self._credit):
            return
        self._credit += free
        self._write_pull(free, b"%d" % free)

    def _write_pull(self, batch: int, token: bytes, max_bytes: int = 0) -> None:
        request: dict[str, Any] = {"batch": batch}
        request["expires"] = round(PULL_EXPIRES_S * 1e9)
        request["idle_heartbeat"] = round(self._tick_s * 1e9)
        if max_bytes:
            request = {"batch": 1, "max_bytes": max_bytes, "expires": 1_000_000}
        if self._group is not None:
            request["group"] = self._group
            if self._pin:
                request["id"] = self._pin.decode()
        body = json.dumps(request).encode()
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._path}".encode()
        self._link.write(b"PUB %b %b%b %d\r\n%b\r\n" % (subject, self._inbox, token, len(body), body))

    def _tick(self) -> None:
        """Every third of a lease, at most 5 s: keep what waits in the buffer, and the pin."""
        if self._error is not None or self._closed:
            return
        now = time.monotonic()
        if self._credit > 0 and now - self._heard_s > 3 * self._tick_s and not self._stopped:
            self._fail(ConnectionLost(f"NATS sent no heartbeat for a pull of {self._path}"))
            return
        self._extend(delivery.receipt for delivery in self._buffer)
        if self._pin and not self._stopped:
            # A request too small for any message: it renews the pin and never takes one.
            self._write_pull(1, b"pin", max_bytes=1)
        self._pull()
        self._timer = asyncio.get_running_loop().call_later(self._tick_s, self._tick)

    # settling

    def settle_batch(self, settlements: Sequence[tuple[Any, spi.Disposition]]) -> asyncio.Future[Failures]:
        if self._error is not None:
            raise self._error
        settles = _Settles(self._next, len(settlements), self._path)
        self._next += len(settlements)
        now, held, reply_to = time.monotonic(), self._held, self._ack_inbox
        blob: list[bytes] = []
        released = False
        receipt: Receipt
        for number, (receipt, disposition) in enumerate(settlements, settles.first):
            if held.get(receipt.seq) is receipt:
                del held[receipt.seq]
                if receipt.until_s > now:
                    end = ACK
                    if disposition.kind == "release":
                        end, released = _nak(disposition.delay_s), True
                    blob += (b"PUB ", receipt.reply, b" ", reply_to, b"%d" % number, end)
                    continue
            lost = SettleLost(f"{self._path}: the lease of {self._ack_wait_s} s ran out, or was taken")
            settles.fail(number - settles.first, lost)
        if blob:
            self._settles.append(settles)
            self._link.write(b"".join(blob))
        if released and self._group is not None and not self._stopped:
            self._take_over()
        self._pull()
        if self._waiter is not None:
            self._wake()
        return settles.future

    def extend_batch(self, receipts: Sequence[Any]) -> None:
        if self._error is None:
            self._extend(r for r in receipts if self._owns(r))

    def _extend(self, receipts: Iterable[Receipt]) -> None:
        now = time.monotonic()
        blob: list[bytes] = []
        for receipt in receipts:
            if receipt.until_s > now:
                receipt.until_s = now + self._ack_wait_s
                blob.append(b"PUB %b 4\r\n+WPI\r\n" % receipt.reply)
        if blob:
            self._link.write(b"".join(blob))

    def _owns(self, receipt: Receipt) -> bool:
        """False for a delivery whose message has come again: only the newest one settles it."""
        return self._held.get(receipt.seq) is receipt

    def _on_settled(self, numbers: Numbers) -> None:
        for settles in self._settles[:]:
            settles.done(indexes(numbers, settles.first, settles.count))
            if not settles.left:
                self._settles.remove(settles)

    def _on_answers(self, frames: list[Frame]) -> None:
        """All other answers, and those that were split between two reads."""
        for subject, _, header, _ in frames:
            number = int(subject[len(self._ack_inbox) :])
            if header:  # 503: the stream or the consumer is gone
                for settles in self._settles:
                    for index in indexes([number], settles.first, settles.count):
                        settles.fail(index, SettleLost(f"the NATS consumer {self._path} is gone"))
            self._on_settled([number])

    # one active member

    def _see_pin(self, header: bytes) -> None:
        at = header.rfind(b"\r\nNats-Pin-Id:")
        pin = header[at + 14 : header.find(b"\r\n", at + 2)].strip()
        if pin != self._pin:
            arrived = self._buffer.pop()
            if self._pin:
                self._lose_pin()
            arrived.session = self._session
            self._buffer.append(arrived)
            self._pin = pin
            self._take_over()

    def _lose_pin(self) -> None:
        """Another member is active: give up what has not started, let the rest end in its lease."""
        self._pin, self._credit = b"", 0
        self._hand_back_buffer()
        session, self._session = self._session, Session(self._path)
        session.closing = True
        if self._held:
            self._spawn(self._revoke(session, list(self._held.values())))

    async def _revoke(self, session: Session, receipts: list[Receipt]) -> None:
        until_s = min(receipt.until_s for receipt in receipts)
        await self._on_revoke([session], max(0.0, until_s - time.monotonic()))
        session.lost = True
        left = [r for r in receipts if self._owns(r)]
        for receipt in left:
            del self._held[receipt.seq]
        self._hand_back(left)

    def _take_over(self) -> None:
        if not self._taking_over:
            self._taking_over = True
            self._spawn(self._wait_for_others())

    async def _wait_for_others(self) -> None:
        """Until the durable's unsettled messages are all here, then in stream order."""
        while not self._stopped:
            before = self._mine()
            info = await self._link.api(f"CONSUMER.INFO.{self._path}")
            if info["num_ack_pending"] <= len(before & self._mine()):
                break
            await asyncio.sleep(TAKE_OVER_POLL_S)
        self._sort()
        self._taking_over = False
        self._wake()

    def _mine(self) -> set[int]:
        return {delivery.receipt.seq for delivery in self._buffer} | set(self._held)

    def _sort(self) -> None:
        """By stream sequence; of two arrivals of one message the later, whose lease is valid."""
        latest = {delivery.receipt.seq: delivery for delivery in self._buffer}
        self._buffer = deque(latest[seq] for seq in sorted(latest))

    # leaving

    async def stop(self) -> None:
        if not self._stopped and self._error is None:
            self._stopped = True
            self._link.unsubscribe(self._sid, forget=False)  # the server drops our pull requests
            with suppress(ConnectionLost):
                await self._link.flush()
        self._hand_back_buffer()

    async def close(self) -> None:
        try:
            await self.stop()
            if self._settles:
                await asyncio.wait([s.future for s in self._settles])
            if self._pin and self._error is None:  # core leaves the hand-back to us when ordered
                self._hand_back(list(self._held.values()))
                self._held.clear()
                with suppress(MessagingError, errors.ApiError):
                    await self._link.api(f"CONSUMER.UNPIN.{self._path}", {"group": self._group})
        finally:
            self._closed = True
            self._link.unsubscribe(self._sid)
            self._link.unsubscribe(self._ack_sid)
            self._fail(ConnectionLost("the receiver was closed"))

    def _hand_back_buffer(self) -> None:
        receipts = [delivery.receipt for delivery in self._buffer]
        self._buffer.clear()
        self._hand_back(receipts)

    def _hand_back(self, receipts: Sequence[Receipt]) -> None:
        now = time.monotonic()
        blob = [b"PUB %b 4\r\n-NAK\r\n" % r.reply for r in receipts if r.until_s > now]
        if blob and self._error is None:
            self._link.write(b"".join(blob))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, errors.ApiError):
            error = errors.from_api(error, f"a look at {self._path}")
        if isinstance(error, MessagingError):
            self._fail(error)
        elif error is not None:
            self._fail(ConnectionLost(f"the take-over of {self._path} failed: {error!r}"))

    def on_lost(self, error: ConnectionLost) -> None:
        self._fail(error)

    def on_denied(self, text: str) -> None:
        mine = (self._inbox.decode(), self._ack_inbox.decode(), f"msg.next.{self._path}")
        if any(subject.lower() in text for subject in mine):
            self._fail(errors.denied(text))

    def _fail(self, error: MessagingError) -> None:
        if self._error is not None:
            return
        self._error = error
        self._link.listeners.discard(self)
        self._session.closing = self._session.lost = True
        self._buffer.clear()
        for settles in self._settles:
            settles.give_up(error)
        self._settles.clear()
        for task in self._tasks:
            task.cancel()
        if self._timer is not None:
            self._timer.cancel()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _Settles:
    """The answers of one `settle_batch` that are still to come."""

    __slots__ = ("_failed", "_open", "_path", "count", "first", "future", "left")

    def __init__(self, first: int, count: int, path: str) -> None:
        self.first = first
        self.count = self.left = count
        self.future: asyncio.Future[Failures] = asyncio.get_running_loop().create_future()
        self._open = bytearray(b"\1") * count
        self._failed: list[tuple[int, MessagingError]] = []
        self._path = path
        if not count:
            self.future.set_result(())

    def done(self, indexes: Numbers) -> None:
        if isinstance(indexes, range):
            self.left -= self._open[indexes.start : indexes.stop].count(1)
            self._open[indexes.start : indexes.stop] = bytes(len(indexes))
        else:
            for index in indexes:
                self.left -= self._open[index]
                self._open[index] = 0
        if not self.left and not self.future.done():
            self.future.set_result(self._failed)

    def fail(self, index: int, error: MessagingError) -> None:
        self._failed.append((index, error))
        self.done([index])

    def give_up(self, error: MessagingError) -> None:
        for index in [i for i, is_open in enumerate(self._open) if is_open]:
            lost = SettleLost(f"{self._path}: no answer to the settlement: {error}")
            lost.__cause__ = error
            self.fail(index, lost)


class SignalReceiver(spi.Receiver):
    """A core subscription with a bounded buffer; nothing to settle."""

    def __init__(self, link: Link, buffer: int) -> None:
        self._link = link
        self._limit = buffer
        self._buffer: deque[Frame] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._error: MessagingError | None = None
        self._subject = ""
        self._sid = b""
        self._seen = 0

    async def start(self, subject: str, group: str) -> None:
        self._subject = subject
        self._sid = self._link.subscribe(subject, self._on_frames, group)
        self._link.listeners.add(self)
        await self._link.flush()
        if self._error is not None:
            raise self._error

    async def receive_batch(self, max_deliveries: int) -> list[Message[Any]]:
        while not self._buffer:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        buffer = self._buffer
        return [self._message(*buffer.popleft()[2:]) for _ in range(min(max_deliveries, len(buffer)))]

    def _message(self, header: bytes, body: bytes) -> Message[Any]:
        self._seen += 1
        return Message(
            body,
            id_of(header, self._subject, self._seen),
            key_of(header),
            partial(meta_of, header),
        )

    def _on_frames(self, frames: list[Frame]) -> None:
        room = self._limit - len(self._buffer)
        self.dropped += max(0, len(frames) - room)
        self._buffer.extend(frames[:room])
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def settle_batch(self, settlements: Sequence[tuple[Any, spi.Disposition]]) -> None:
        """Nothing to settle."""

    async def stop(self) -> None:
        self._link.unsubscribe(self._sid)
        self._buffer.clear()

    async def close(self) -> None:
        await self.stop()
        self.on_lost(ConnectionLost("the receiver was closed"))

    def on_lost(self, error: ConnectionLost) -> None:
        self._end(error)

    def on_denied(self, text: str) -> None:
        if "subscription" in text and f'"{self._subject.lower()}"' in text:
            self._end(errors.denied(text))

    def _end(self, error: MessagingError) -> None:
        self._error = self._error or error
        self._link.listeners.discard(self)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _nak(delay_s: float) -> bytes:
    verb = b'-NAK {"delay": %d}' % round(delay_s * 1e9) if delay_s > 0 else b"-NAK"
    return b" %d\r\n%b\r\n" % (len(verb), verb)


def _value(header: bytes, name: bytes) -> str | None:
    """The value of the first header `name` (given with its line start and colon), or None."""
    at = header.find(name)
    if at < 0:
        return None
    at += len(name)
    value = header[at : header.find(b"\r\n", at)]
    if value[:1] == b" ":  # one blank is the separator's, as all clients write it
        value = value[1:]
    return value.decode("utf-8", "replace")


def numbers_of(reply: bytes) -> tuple[int, int, int, int]:
    """Of a JetStream reply subject: how often the message was delivered, its sequence in the stream and in the
    consumer, how many are behind it."""
    words = reply.split(b".")
    at = 4 if len(words) == 9 else 6  # newer replies carry domain and account first
    return int(words[at]), int(words[at + 1]), int(words[at + 2]), int(words[at + 4])


def id_of(header: bytes, place: str, number: int) -> str:
    """The publisher's id; of a foreign message its place."""
    return _value(header, b"\r\nNats-Msg-Id:") or f"foreign-{place}-{number}"


def key_of(header: bytes) -> str | None:
    key = _value(header, b"\r\nmessaging-key:")
    return unquote(key) if key is not None and "%" in key else key


def meta_of(header: bytes) -> Meta:
    """Everything that most handlers never look at. `Nats-...` headers are the server's."""
    fields: dict[str, str] = {}
    for line in header.split(b"\r\n")[1:]:
        name, colon, value = line.decode("utf-8", "replace").partition(":")
        if colon and not name.startswith("Nats-"):
            fields[name] = value[1:] if value.startswith(" ") else value
    own = {name: unquote(fields.pop(name)) for name in OURS if name in fields}
    created = own.get(CREATED)
    with suppress(ValueError):
        return Meta(fields, own.get(CONTENT_TYPE), own.get(CORRELATION), float(created) if created else None)
    return Meta(fields, own.get(CONTENT_TYPE), own.get(CORRELATION))
