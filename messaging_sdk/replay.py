"""Reading a Topic's history again, beside its groups."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import datetime
from types import TracebackType
from typing import Any, Final, Generic, Literal, TypeVar

from .destination import Topic
from .errors import Closed, MessagingError, UsageError
from .model import Message
from .retry import Backoff
from .spi import Reader

T = TypeVar("T")
log: Final = logging.getLogger("messaging_sdk")

START: Final = "start"
CLOSE_S: Final = 2.0

OpenReader = Callable[[float | str | None], Awaitable[Reader]]
_parents: Final[list[Reader]] = []
"""In a forked child: the parent's readers, whose clients must not even be destroyed here."""


class Replay(Generic[T]):
    """What `bus.replay()` gives: a context manager, and inside it an async iterator of messages that ends.

    It ends at what was stored when the block was entered (or, after a lost connection, when that was made again).
    Messages of one key come in the order in which they were accepted where the destination is ordered, each once. What
    the topic's groups have settled, hold or wait for is neither looked at nor changed. One task iterates at a time.
    """

    def __init__(self, topic: Topic[T], place: str, open_reader: OpenReader, since: float | str | None) -> None:
        self._topic: Final = topic
        self._place: Final = place
        self._open_reader: Final = open_reader
        self._since = since
        self._reader: Reader | None = None
        self._state: Literal["new", "entered", "left", "closed", "forked"] = "new"
        self._over = asyncio.Event()
        """It is left or closed: who waits for the next attempt need not."""
        self._is_reading = False

    async def __aenter__(self) -> Replay[T]:
        if self._state != "new":
            raise UsageError("this replay was entered before; call bus.replay() again")
        self._state = "entered"
        try:
            await self._opened()
        except BaseException:
            self._state = "left"
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._state == "entered":
            self._state = "left"
        self._over.set()
        await self._let_go()

    def __aiter__(self) -> Replay[T]:
        return self

    async def __anext__(self) -> Message[T]:
        """The next message, decoded. Cancelling loses nothing.

        Raises DecodeError for a body that does not fit the topic's type (the next call goes on behind it), OutOfRange
        when the backend's retention has deleted what comes next, NotFound when the topic was deleted, Closed once the
        bus is closed. After a lost connection it goes on where it was, as soon as the backend can be reached.
        """
        self._is_reading = True
        try:
            message = await self._next()
        finally:
            self._is_reading = False
        if message is None:
            raise StopAsyncIteration
        message.data = self._topic.codec.decode(message.body)
        return message

    async def _next(self) -> Message[Any] | None:
        while True:
            self._check()
            reader = self._reader or await self._reopened()
            try:
                return await reader.read()
            except MessagingError as error:
                self._check()
                if not error.transient:
                    raise
                log.info("replay of %s: connection lost, reopening: %s", self._topic, error)
                await self._let_go()

    @property
    def position(self) -> str:
        """Where to go on, as `since` of another replay of this topic: behind the last message that was yielded. To be
        stored as it is; it means nothing to another topic or backend. Raises UsageError before the block is entered.
        """
        position = self._since if self._reader is None else self._reader.position()
        if not isinstance(position, str):
            raise UsageError("a replay has a position once it is entered")
        return f"{self._place} {position}"

    async def close(self) -> None:
        """The bus was closed: the next call, and one that waits, raises Closed. Returns when that has been told."""
        self._state = "closed"
        self._over.set()
        await self._let_go()
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                while self._is_reading:  # noqa: ASYNC110  # at a close only; an event would cost on each message
                    await asyncio.sleep(0.005)

    def disown(self) -> None:
        """In a forked child: the reader is the parent's."""
        self._state = "forked"
        if self._reader is not None:
            self._since = self._reader.position()
            _parents.append(self._reader)
            self._reader = None

    def _check(self) -> None:
        if self._state == "closed":
            raise Closed(f"replay of {self._topic}: the bus was closed")
        if self._state == "forked":
            raise UsageError("this replay belongs to the parent process; start one in the child at its position")
        if self._state != "entered":
            raise UsageError("a replay is used inside `async with bus.replay(...) as history:`")

    async def _opened(self) -> Reader:
        reader = await self._open_reader(self._since)
        self._reader = reader
        if self._state != "entered":  # left or closed meanwhile
            await self._let_go()
            self._check()
        return reader

    async def _reopened(self) -> Reader:
        backoff = Backoff()
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(backoff.wait_s()):
                    await self._over.wait()
            self._check()
            try:
                return await self._opened()
            except MessagingError as error:
                if not error.transient:
                    raise
                log.warning("replay of %s: cannot reopen, trying again: %s", self._topic, error)

    async def _let_go(self) -> None:
        reader, self._reader = self._reader, None
        if reader is None:
            return
        self._since = reader.position()
        try:
            async with asyncio.timeout(CLOSE_S):
                await reader.close()
        except Exception as error:
            log.debug("replay of %s: error while closing a reader: %r", self._topic, error)


def parsed_since(topic: Topic[Any], place: str, since: datetime | str) -> float | str | None:
    """`since` as an adapter takes it. Raises UsageError."""
    if isinstance(since, datetime):
        if since.tzinfo is None:
            raise UsageError(f"replay of {topic}: since={since} has no time zone; use datetime.now(UTC), say")
        return since.timestamp()
    if not isinstance(since, str):
        raise UsageError(f"replay of {topic}: since is {START!r}, a datetime or a position, not {since!r}")
    if since == START:
        return None
    home, _, position = since.rpartition(" ")
    if home != place or not position:
        raise UsageError(f"replay of {topic}: since={since[:60]!r} is no position of it on this backend")
    return position
