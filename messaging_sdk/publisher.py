"""The publish side of a destination: checks and encodes a value, and counts what a windowed publisher has out."""

from __future__ import annotations

import asyncio
import itertools
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import get_ident
from time import time
from types import TracebackType
from typing import Any, Final, Generic, TypeVar

from .batcher import Batcher
from .capabilities import Capabilities, HeaderRules, unmet
from .config import seconds
from .consumer import current
from .destination import Destination
from .errors import CapabilityError, ConfigError, InvalidMessage, MessagingError, Outcome, TooLarge, UsageError
from .model import NO_HEADERS, RESERVED_PREFIX, Outgoing
from .pipeline import Middleware

T = TypeVar("T")

_TOKEN: Final = re.compile(r"[A-Za-z0-9!#$%&'*+\-.^_`|~]+\Z")
_ASCII: Final = re.compile(r"[\x20-\x7e]*\Z")
MAX_ID: Final = 200  # characters: fits AMQP's 255-byte short string, and every broker's deduplication id but SQS's 128
_new_number: Final = itertools.count().__next__


def new_id_prefix() -> str:
    """Unique per bus and process; a counter behind it makes message ids, at a tenth of a uuid4's cost."""
    return f"{secrets.token_hex(8)}-"


class Outlet(Generic[T]):
    """What the bus keeps per published destination."""

    def __init__(
        self,
        destination: Destination[T],
        backend: str,
        capabilities: Capabilities,
        batcher: Batcher,
        middleware: tuple[Middleware, ...],
        id_prefix: str,
    ) -> None:
        self.destination = destination
        self.backend = backend
        self.capabilities = capabilities
        self.batcher = batcher
        self._middleware = middleware
        self._id_prefix = id_prefix
        self._encode = destination.codec.encode
        self._content_type = destination.codec.content_type
        self._max_body = capabilities.max_body
        self._keyed = destination.key is not None

    def disown(self) -> None:
        """In the child of a fork: the connection behind this is the parent's, so every use raises."""

        def refuse(value: T) -> bytes:
            raise UsageError("this publisher belongs to the parent process; open one in the child")

        self._encode = refuse

    def encode(
        self,
        value: T,
        headers: Mapping[str, str] | None = None,
        id: str | None = None,
        correlation_id: str | None = None,
        delay: float | str | None = None,
        ttl: float | str | None = None,
        priority: int | None = None,
    ) -> Outgoing:
        """The message for `value`. Raises InvalidMessage, TooLarge or CapabilityError; nothing was sent."""
        try:
            body = self._encode(value)
        except InvalidMessage as error:
            raise InvalidMessage(f"{self.destination}: {error}", outcome=Outcome.REJECTED) from error.__cause__
        if len(body) > self._max_body:
            raise self._too_large(len(body))
        if correlation_id is not None:
            self._text("correlation_id", correlation_id)
        elif (handled := current.get()) is not None:
            correlation_id = handled.correlation_id or handled.id
        message = Outgoing(
            body,
            f"{self._id_prefix}{_new_number()}" if id is None else self._text("id", id),
            self.destination.key_of(value) if self._keyed else None,
            NO_HEADERS if headers is None else self._headers(headers),
            self._content_type,
            correlation_id,
            time(),
        )
        if delay is not None or ttl is not None or priority is not None:
            self._options(message, delay, ttl, priority)
        for layer in self._middleware:
            message = layer.publish(self.destination, message)
        return message

    def _too_large(self, size_bytes: int) -> TooLarge:
        return TooLarge(
            f"{self.destination}: the encoded message has {size_bytes} bytes, backend {self.backend!r} takes "
            f"{self._max_body}; send a reference to it, or raise the limit where the backend has an option for it",
            size_bytes=size_bytes,
            limit_bytes=self._max_body,
        )

    def _text(self, what: str, text: str) -> str:
        if not isinstance(text, str) or not 0 < len(text) <= MAX_ID or not _ASCII.match(text) or text != text.strip():
            raise InvalidMessage(
                f"{self.destination}: {what} must be 1 to {MAX_ID} printable ASCII characters without outer blanks",
                outcome=Outcome.REJECTED,
            )
        return text

    def _duration(self, what: str, value: float | str) -> float:
        try:
            return seconds(value, what)
        except ConfigError as error:
            raise InvalidMessage(f"{self.destination}: {error}", outcome=Outcome.REJECTED) from None

    def _options(
        self,
        message: Outgoing,
        delay: float | str | None,
        ttl: float | str | None,
        priority: int | None,
    ) -> None:
        wanted: dict[str, Any] = {}
        if delay is not None:
            message.delay_s, wanted["delay"] = self._duration("delay", delay), True
        if ttl is not None:
            message.ttl_s, wanted["ttl"] = self._duration("ttl", ttl), True
            if message.ttl_s <= 0:
                raise InvalidMessage(f"{self.destination}: ttl must be over 0", outcome=Outcome.REJECTED)
        if priority is not None:
            if not isinstance(priority, int) or isinstance(priority, bool) or priority < 0:
                raise InvalidMessage(
                    f"{self.destination}: priority is a whole number from 0",
                    outcome=Outcome.REJECTED,
                )
            message.priority, wanted["priority"] = priority, priority + 1
        missing = unmet(self.capabilities, wanted, destination=self.destination.name, backend=repr(self.backend))
        if missing:
            raise CapabilityError(missing)

    def _headers(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        rules = self.capabilities.headers
        if not isinstance(headers, Mapping):
            raise InvalidMessage(
                f"{self.destination}: headers must be a mapping of str to str, not {type(headers).__name__}",
                outcome=Outcome.REJECTED,
            )
        for name, value in headers.items():
            problem = header_problem(name, value, rules)
            if problem:
                raise InvalidMessage(
                    f"{self.destination}: header {str(name)[:60]!r} {problem}",
                    outcome=Outcome.REJECTED,
                )
        if rules is not None and headers:
            size = sum(len(n.encode()) + len(v.encode()) for n, v in headers.items())
            if len(headers) > rules.max_count or size > rules.max_bytes:
                raise InvalidMessage(
                    f"{self.destination}: {len(headers)} headers of {size} bytes; backend {self.backend!r} takes "
                    f"{rules.max_count} headers of {rules.max_bytes} bytes together",
                    outcome=Outcome.REJECTED,
                )
        return dict(headers)


def header_problem(name: object, value: object, rules: HeaderRules | None) -> str:
    """Why this header would not arrive as it is; "" if it would."""
    if rules is None:
        return "cannot be sent: this backend has no headers"
    if not isinstance(name, str) or not isinstance(value, str):
        return "must be a str with a str value"
    if not name:
        return "has an empty name"
    if name.lower().startswith(RESERVED_PREFIX):
        return f"starts with {RESERVED_PREFIX!r}, which is the SDK's own"
    if rules.names == "token" and not _TOKEN.match(name):
        return "has a name that this backend would alter or refuse: letters, digits and !#$%&'*+-.^_`|~ are allowed"
    try:
        (name + value).encode()
    except UnicodeEncodeError:
        return "holds a lone surrogate, which has no UTF-8 form"
    if rules.charset != "text" and not _ASCII.match(value):
        return "has a value that this backend would alter: printable ASCII is allowed"
    if rules.charset == "field" and value != value.strip():
        return "has a value with outer blanks, which this backend would cut"
    return ""


@dataclass(frozen=True, slots=True)
class Failed:
    """A message of a publisher that was not accepted; `error.outcome` tells whether it may be stored."""

    id: str
    error: MessagingError


class Publisher(Generic[T]):
    """Windowed publishing: `send` returns as soon as the message is queued and waits only while `window` are out.

    Leaving the block waits for every outcome and does not raise: look at `failed`. Safe for several tasks of one
    loop; order is the order of the `send` calls.
    """

    def __init__(self, open_outlet: Callable[[], Any], window: int, timeout_s: float) -> None:
        if not isinstance(window, int) or window < 1:
            raise UsageError(f"publisher: window must be a whole number from 1, not {window!r}")
        self.sent = 0
        self.failed: list[Failed] = []
        self._open_outlet = open_outlet
        self._window = window
        self._timeout_s = timeout_s
        self._out = 0
        self._room = asyncio.Event()
        self._outlet: Outlet[T] | None = None

    async def __aenter__(self) -> Publisher[T]:
        self._outlet = await self._open_outlet()
        self._loop = asyncio.get_running_loop()
        self._thread = get_ident()  # a third of the price of asking for the running loop per message
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            await self.flush()
        finally:
            self._outlet = None

    async def send(
        self,
        value: T,
        *,
        headers: Mapping[str, str] | None = None,
        id: str | None = None,
        correlation_id: str | None = None,
        delay: float | str | None = None,
        ttl: float | str | None = None,
        priority: int | None = None,
    ) -> str:
        """Queue one message and return its id. Raises what `Bus.publish` raises before sending; later failures are in
        `failed`."""
        outlet = self._outlet
        if outlet is None:
            raise UsageError("a publisher is used inside `async with bus.publisher(...) as p:`")
        if get_ident() != self._thread:
            raise UsageError("this publisher belongs to another event loop; from threads use messaging_sdk.sync")
        message = outlet.encode(value, headers, id, correlation_id, delay, ttl, priority)
        while self._out >= self._window:
            self._room.clear()
            await self._room.wait()
        message.waiter = self
        message.deadline_s = self._loop.time() + self._timeout_s
        self._out += 1
        outlet.batcher.submit(message)
        return message.id

    async def flush(self) -> None:
        """Wait until all sent so far have an outcome: at most the timeout."""
        while self._out:
            self._room.clear()
            await self._room.wait()

    def accepted(self, count: int) -> None:
        """The batcher's call: `count` more messages are accepted."""
        self._out -= count
        self.sent += count
        self._room.set()

    def refused(self, message: Outgoing, error: MessagingError) -> None:
        """The batcher's call: this message is not accepted, or not known to be."""
        self._out -= 1
        self.failed.append(Failed(message.id, error))
        self._room.set()
