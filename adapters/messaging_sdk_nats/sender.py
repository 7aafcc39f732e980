"""Senders: one write per batch; streams answer each message, matched by reply subject."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final
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


class StreamSender(spi.Sender):
    """Publishes to a stream's subject; the server answers each message when it is stored."""

    def __init__(self, link: Link, subject: str, max_payload: int, header_room: int) -> None:
        self._link = link
        self._subject = subject
        self._limits = (max_payload, max_payload - header_room)
        self._sid, self._inbox = b"", b""
        self._batches: dict[bytes, _Batch] = {}
        self._count = 0
        self._idle: asyncio.Future[None] | None = None
        self._error: ConnectionLost | None = link.error

    def start(self) -> None:
        self._sid, self._inbox = self._link.subscribe_inbox(self._on_answers)
        self._link.listeners.add(self)

    def send_batch(self, messages: Sequence[Outgoing], on_outcomes: spi.OnOutcomes) -> None:
        if self._error is not None:
            raise self._error
        self._count += 1
        token = b"%x" % self._count
        batch = _Batch(len(messages), on_outcomes)
        subject = self._subject.encode()
        reply = b"%b%b." % (self._inbox, token)
        blob: list[bytes] = []
        refused: list[tuple[int, SendResult]] = []
        for index, message in enumerate(messages):
            try:
                head = _head(message, self._limits)
            except MessagingError as error:
                refused.append((index, rejected(error)))
                continue
            body, size = message.body, len(head)
            blob.append(b"HPUB %b %b%d %d %d\r\n%b%b\r\n" % (subject, reply, index, size, size + len(body), head, body))
        self._link.write(b"".join(blob))
        self._batches[token] = batch
        self._resolve(token, batch, refused)

    def _on_answers(self, frames: list[Frame]) -> None:
        answers: dict[bytes, list[tuple[int, SendResult]]] = {}
        last, outcomes = b"", list[tuple[int, SendResult]]()
        for subject, _, header, body in frames:
            _, token, index = subject.rsplit(b".", 2)
            result = SENT
            if header or b'"error"' in body:
                result = rejected(_refusal(self._subject, header, body))
            if token != last:
                last, outcomes = token, answers.setdefault(token, [])
            outcomes.append((int(index), result))
        for token, outcomes in answers.items():
            batch = self._batches.get(token)
            if batch is not None:
                self._resolve(token, batch, outcomes)

    def _resolve(self, token: bytes, batch: _Batch, outcomes: list[tuple[int, SendResult]]) -> None:
        for index, _ in outcomes:
            batch.open[index] = 0
        batch.left -= len(outcomes)
        if batch.left <= 0:
            self._batches.pop(token, None)
        if outcomes:
            batch.on_outcomes(outcomes)
        if not self._batches and self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    def _end(self, make: type[MessagingError], error: MessagingError) -> None:
        """Resolve all that is open: INDETERMINATE for a lost connection, else REJECTED."""
        result = indeterminate if make is ConnectionLost else rejected
        for token, batch in list(self._batches.items()):
            left = [i for i, is_open in enumerate(batch.open) if is_open]
            self._resolve(token, batch, [(i, result(error)) for i in left])

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
        self._subject = subject.encode()
        self._limits = (max_payload, max_payload - header_room)
        self._closed: ConnectionLost | None = None

    def send_batch(self, messages: Sequence[Outgoing], on_outcomes: spi.OnOutcomes) -> None:
        if self._closed is not None:
            raise self._closed
        outcomes: list[tuple[int, SendResult]] = []
        blob: list[bytes] = []
        full = self._link.unsent_bytes() > UNSENT_LIMIT
        for index, message in enumerate(messages):
            try:
                head = _head(message, self._limits, stream=False)
                if full:
                    raise Backpressure("the NATS server does not take the signals; send fewer")
            except MessagingError as error:
                outcomes.append((index, rejected(error)))
                continue
            body, size = message.body, len(head)
            blob.append(b"HPUB %b %d %d\r\n%b%b\r\n" % (self._subject, size, size + len(body), head, body))
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

    __slots__ = ("left", "on_outcomes", "open")

    def __init__(self, count: int, on_outcomes: spi.OnOutcomes) -> None:
        self.left = count
        self.on_outcomes = on_outcomes
        self.open = bytearray(b"\1") * count


def _refusal(subject: str, header: bytes, body: bytes) -> MessagingError:
    if header:
        api_error = errors.ApiError(503, f"no stream takes {subject}")
    else:
        error = json.loads(body)["error"]
        api_error = errors.ApiError(error.get("err_code", 0), error.get("description", ""))
    return errors.from_api(api_error, f"a message to {subject}")


def _head(message: Outgoing, limits: tuple[int, int], *, stream: bool = True) -> bytes:
    """The header block. Raises InvalidMessage, TooLarge or CapabilityError: nothing was sent."""
    if not _plain(message.id):
        raise InvalidMessage("the message id must be printable ASCII to travel as Nats-Msg-Id")
    lines = [f"NATS/1.0\r\nNats-Msg-Id: {message.id}\r\n"]
    if message.key is not None:
        lines.append(f"{KEY}: {_quoted(message.key)}\r\n")
    if message.correlation_id is not None:
        lines.append(f"{CORRELATION}: {_quoted(message.correlation_id)}\r\n")
    if message.content_type is not None:
        lines.append(f"{CONTENT_TYPE}: {_quoted(message.content_type)}\r\n")
    if message.created_s:
        lines.append(f"{CREATED}: {message.created_s:.6f}\r\n")
    if message.headers:
        lines.extend(_line(name, value) for name, value in message.headers.items())
    if message.delay_s is not None or message.priority is not None or not stream:
        _refuse_absent(message, stream)
    if message.ttl_s is not None:
        if message.ttl_s < 1 or message.ttl_s % 1:  # the server cuts 1.5 s to 1 s (seen on 2.15)
            raise InvalidMessage(f"ttl of {message.ttl_s} s: NATS takes whole seconds from 1 s up")
        lines.append(f"Nats-TTL: {message.ttl_s:.0f}\r\n")
    lines.append("\r\n")
    head = "".join(lines).encode()
    _check_size(len(head), len(message.body), limits)
    return head


def _check_size(head: int, body: int, limits: tuple[int, int]) -> None:
    payload, max_body = limits
    if body > max_body:
        raise TooLarge(
            f"a body of {body} bytes; NATS takes {max_body} here (max_payload less the headers)",
            size_bytes=body,
            limit_bytes=max_body,
        )
    if head > MAX_HEADER or head + body > payload:
        limit = min(MAX_HEADER, payload - body)
        raise TooLarge(f"headers of {head} bytes, the limit is {limit}", size_bytes=head, limit_bytes=limit)


def _refuse_absent(message: Outgoing, stream: bool) -> None:
    for name, value in (
        ("delay", message.delay_s),
        ("priority", message.priority),
        ("ttl", None if stream else message.ttl_s),
    ):
        if value is not None:
            raise errors.absent("this destination", f"{name}=", f"a backend that has {name}")


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
