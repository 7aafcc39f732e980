"""Senders: one write per batch; streams answer each message, matched by reply subject."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, NoReturn
from urllib.parse import quote

from messaging_sdk import spi
from messaging_sdk.errors import (
    Backpressure,
    ConnectionLost,
    InvalidMessage,
    MessagingError,
    TooLarge,
)
from messaging_sdk.model import SENT, Outgoing, SendResult, indeterminate, rejected

from . import errors

if TYPE_CHECKING:
    from .driver import Frame, Link

KEY, CORRELATION, CONTENT_TYPE, CREATED = (
    "messaging-key", "messaging-correlation", "messaging-content-type", "messaging-created",
)  # fmt: skip
MAX_HEADER: Final = 65535  # JetStream stores the length of the header block in 16 bits
UNSENT_LIMIT: Final = 8 << 20  # of a Signal sender: beyond it the server is not reading any more
STORED: Final = rb'\d++\r\n\{"stream":"[^{}\r\n]*+\}'
"""Size and body of a PubAck without an error, which would be an object inside; JSON has no line end inside."""


Numbers = range | list[int]


class Answers:
    """Takes answers of the expected form out of what was read: a run of them for the price of two regular expressions.

    `take` gets the last words of their subjects, which are numbers of ours: as a range where none is missing.
    """

    def __init__(self, inbox: bytes, sid: bytes, size_and_body: bytes, take: Callable[[Numbers], None]) -> None:
        number = re.escape(inbox) + rb"(\d++) "
        self._run = re.compile(rb"(?:MSG %b%b %b\r\n)++" % (number, sid, size_and_body))
        self._number = re.compile(number)
        self._take = take

    def read(self, buffer: bytes, at: int) -> int:
        """Where the run that starts at `at` ends."""
        run = self._run.match(buffer, at)
        if run is None:
            return at
        numbers = list(map(int, self._number.findall(buffer, at, run.end())))
        whole = range(numbers[0], numbers[-1] + 1)
        self._take(whole if numbers == list(whole) else numbers)
        return run.end()


def indexes(numbers: Numbers, first: int, count: int) -> Numbers:
    """Those of `numbers` that lie in the `count` from `first` on, counted from there."""
    if isinstance(numbers, range):
        return range(max(0, numbers.start - first), min(count, numbers.stop - first))
    return [number - first for number in numbers if 0 <= number - first < count]


class StreamSender(spi.Sender):
    """Publishes to a stream's subject; the server answers each message when it is stored."""

    def __init__(self, link: Link, subject: str, max_payload: int, header_room: int) -> None:
        self._link = link
        self._subject = subject
        self._head = Head((max_payload, max_payload - header_room))
        self._sid, self._inbox = b"", b""
        self._batches: list[_Batch] = []
        self._next = 1
        self._idle: asyncio.Future[None] | None = None
        self._error: ConnectionLost | None = link.error

    def start(self) -> None:
        self._sid, self._inbox = self._link.subscribe_inbox(self._on_answers)
        self._link.read_ahead(self._sid, Answers(self._inbox, self._sid, STORED, self._on_stored).read)
        self._link.listeners.add(self)

    def send_batch(self, messages: Sequence[Outgoing], on_outcomes: spi.OnOutcomes) -> None:
        if self._error is not None:
            raise self._error
        batch = _Batch(self._next, len(messages), on_outcomes)
        self._next += len(messages)
        start = f"HPUB {self._subject} {self._inbox.decode()}"
        blob: list[bytes] = []
        refused: list[tuple[int, SendResult]] = []
        encode, known, sizes = self._head.encode, (-1, -1), ""
        for number, message in enumerate(messages, batch.first):
            try:
                head = encode(message)
            except MessagingError as error:
                refused.append((number - batch.first, rejected(error)))
                continue
            body = message.body
            if (len(head), len(body)) != known:  # the messages of a program are often of one size
                known = len(head), len(body)
                sizes = f" {known[0]} {sum(known)}\r\n"
            blob += (f"{start}{number}{sizes}{head}".encode(), body, b"\r\n")
        self._link.write(b"".join(blob))
        self._batches.append(batch)
        self._resolve(batch, refused)

    def _on_stored(self, numbers: Numbers) -> None:
        for batch in self._batches[:]:
            mine = indexes(numbers, batch.first, batch.count)
            if isinstance(mine, range):
                self._resolve(batch, spi.accepted(mine.start, mine.stop) if mine else ())
            else:
                self._resolve(batch, [(index, SENT) for index in mine])

    def _on_answers(self, frames: list[Frame]) -> None:
        """All other answers, and those that were split between two reads."""
        for subject, _, header, body in frames:
            number = int(subject[len(self._inbox) :])
            if header or b'"error"' in body:
                result = rejected(_refusal(self._subject, header, body))
                for batch in self._batches[:]:
                    self._resolve(batch, [(i, result) for i in indexes([number], batch.first, batch.count)])
            else:
                self._on_stored([number])

    def _resolve(self, batch: _Batch, outcomes: spi.Outcomes) -> None:
        for index, _ in outcomes:
            batch.open[index] = 0
        batch.left -= len(outcomes)
        if batch.left <= 0 and batch in self._batches:
            self._batches.remove(batch)
        if outcomes:
            batch.on_outcomes(outcomes)
        if not self._batches and self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    def _end(self, make: type[MessagingError], error: MessagingError) -> None:
        """Resolve all that is open: INDETERMINATE for a lost connection, else REJECTED."""
        result = indeterminate if make is ConnectionLost else rejected
        for batch in self._batches[:]:
            left = [i for i, is_open in enumerate(batch.open) if is_open]
            self._resolve(batch, [(i, result(error)) for i in left])

    def on_lost(self, error: ConnectionLost) -> None:
        self._error = error
        self._link.listeners.discard(self)
        self._end(ConnectionLost, error)

    def on_denied(self, text: str) -> None:
        if "publish" in text and f'"{self._subject.lower()}"' in text:
            error = errors.denied(text)
            self._end(type(error), error)

    async def close(self) -> None:
        try:
            if self._batches and self._error is None:
                self._idle = asyncio.get_running_loop().create_future()
                await self._idle
        finally:
            self._link.unsubscribe(self._sid)
            self.on_lost(self._error or ConnectionLost("the sender was closed before the answer"))


class SignalSender(spi.Sender):
    """Publishes on a core subject: no answer; OK means handed to the connection."""

    def __init__(self, link: Link, subject: str, max_payload: int, header_room: int) -> None:
        self._link = link
        self._subject = subject
        self._head = Head((max_payload, max_payload - header_room), stream=False)
        self._closed: ConnectionLost | None = None

    def send_batch(self, messages: Sequence[Outgoing], on_outcomes: spi.OnOutcomes) -> None:
        if self._closed is not None:
            raise self._closed
        outcomes: list[tuple[int, SendResult]] = []
        blob: list[bytes] = []
        full = self._link.unsent_bytes() > UNSENT_LIMIT
        for index, message in enumerate(messages):
            try:
                head = self._head.encode(message)
                if full:
                    raise Backpressure("the NATS server does not take the signals; send fewer")
            except MessagingError as error:
                outcomes.append((index, rejected(error)))
                continue
            body, size = message.body, len(head)
            blob += (f"HPUB {self._subject} {size} {size + len(body)}\r\n{head}".encode(), body, b"\r\n")
            outcomes.append((index, SENT))
        self._link.write(b"".join(blob))
        on_outcomes(outcomes)

    async def close(self) -> None:
        if self._closed is None:
            self._closed = ConnectionLost("the sender was closed")
            if self._link.error is None:
                try:
                    await self._link.flush()
                except ConnectionLost:
                    return


class _Batch:
    """What of one `send_batch` has no outcome yet."""

    __slots__ = ("count", "first", "left", "on_outcomes", "open")

    def __init__(self, first: int, count: int, on_outcomes: spi.OnOutcomes) -> None:
        self.first = first
        self.count = self.left = count
        self.on_outcomes = on_outcomes
        self.open = bytearray(b"\1") * count


def _refusal(subject: str, header: bytes, body: bytes) -> MessagingError:
    if header:
        api_error = errors.ApiError(503, f"no stream takes {subject}")
    else:
        error = json.loads(body)["error"]
        api_error = errors.ApiError(error.get("err_code", 0), error.get("description", ""))
    return errors.from_api(api_error, f"a message to {subject}")


class Head:
    """Makes header blocks. What neighbouring messages share is made once: formatting took half of the time."""

    def __init__(self, limits: tuple[int, int], *, stream: bool = True) -> None:
        self._max_payload, self._max_body = limits
        self._stream = stream
        self._created_ms, self._created = 0, ""
        self._content_type: str | None = None
        self._type = ""

    def encode(self, message: Outgoing) -> str:
        """The header block, all ASCII. Raises InvalidMessage, TooLarge or CapabilityError: nothing was sent."""
        id, created_ms = message.id, int(message.created_s * 1000)
        if not (id.isascii() and id.isprintable()):
            raise InvalidMessage("the message id must be printable ASCII to travel as Nats-Msg-Id")
        if message.content_type != self._content_type:
            self._content_type = message.content_type
            self._type = _optional(CONTENT_TYPE, message.content_type)
        if created_ms != self._created_ms:
            self._created_ms = created_ms
            self._created = f"{CREATED}: {created_ms / 1000:.3f}\r\n" if created_ms else ""
        key = (
            "" if message.key is None else _optional(KEY, message.key)
        )  # behind the id: the receiver looks there first
        head = f"NATS/1.0\r\nNats-Msg-Id: {id}\r\n{key}{self._type}{self._created}"
        if message.correlation_id is not None:
            head += _optional(CORRELATION, message.correlation_id)
        if message.headers:
            head += "".join([_line(name, value) for name, value in message.headers.items()])
        if message.ttl_s is not None or message.delay_s is not None or message.priority is not None:
            head += self._ttl(message)
        head += "\r\n"
        size, body = len(head), len(message.body)
        if body > self._max_body or size > MAX_HEADER or size + body > self._max_payload:
            self._refuse(size, body)
        return head

    def _ttl(self, message: Outgoing) -> str:
        ttl_s = message.ttl_s
        asked = {"delay": message.delay_s, "priority": message.priority, "ttl": None if self._stream else ttl_s}
        for name, value in asked.items():
            if value is not None:
                raise errors.absent("this destination", f"{name}=", f"a backend that has {name}")
        if ttl_s is None or ttl_s < 1 or ttl_s % 1:  # the server cuts 1.5 s to 1 s (seen on 2.15)
            raise InvalidMessage(f"ttl of {ttl_s} s: NATS takes whole seconds from 1 s up")
        return f"Nats-TTL: {ttl_s:.0f}\r\n"

    def _refuse(self, head: int, body: int) -> NoReturn:
        if body > self._max_body:
            raise TooLarge(
                f"a body of {body} bytes; NATS takes {self._max_body} here (max_payload less the headers)",
                size_bytes=body,
                limit_bytes=self._max_body,
            )
        limit = min(MAX_HEADER, self._max_payload - body)
        raise TooLarge(f"headers of {head} bytes, the limit is {limit}", size_bytes=head, limit_bytes=limit)


def _optional(name: str, value: str | None) -> str:
    return "" if value is None else f"{name}: {_quoted(value)}\r\n"


def _line(name: str, value: str) -> str:
    """One user header. One blank behind the colon is ours; all others belong to the value."""
    if name[:5].lower() == "nats-" or ":" in name or not _plain(name):
        raise InvalidMessage(f"header {name[:40]!r}: names are tokens; Nats-... is the server's")
    if not _plain(value):
        raise InvalidMessage(f"header {name!r}: the value must be printable ASCII")
    return f"{name}: {value}\r\n"


def _plain(text: str) -> bool:
    return text.isascii() and text.isprintable()


def _quoted(value: str) -> str:
    """`value` as it is, or percent-encoded where a header line could not carry it unchanged."""
    if value.isascii() and value.isprintable() and "%" not in value:
        return value
    return quote(value, safe=" ")
