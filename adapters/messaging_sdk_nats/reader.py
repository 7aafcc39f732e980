"""Reading a stream's history: an ephemeral pull consumer that needs no acks."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from messaging_sdk import spi
from messaging_sdk.errors import ConnectionLost, MessagingError, OutOfRange, UsageError
from messaging_sdk.model import Message

from . import errors
from .receiver import id_of, key_of, meta_of, numbers_of

if TYPE_CHECKING:
    from .driver import Frame, Link

BATCH: Final = 500
BATCH_BYTES: Final = 8 << 20  # the server cuts off a client that is 64 MB behind, and all that shares the connection
PULL_S: Final = 5.0  # a pull that got less than it asked for ends then
SILENCE_S: Final = 10.0  # and without a word of the server by then the connection is taken for lost
IDLE_S: Final = 300.0  # a program may be as long between two messages before the server forgets where it was
DELETE_S: Final = 1.0
_BEGIN_ANEW: Final = (503, 10014)  # JetStream comes up; the consumer went with its server


class HistoryReader(spi.Reader):
    """A position is when the stream was made, and the sequence to go on with: "2026-11-26T10:00:00Z/17"."""

    def __init__(self, link: Link, stream: str) -> None:
        self._link = link
        self._stream = stream
        self._made = ""
        self._consumer = ""
        self._next = 0
        self._end = 0  # the last sequence that is read
        self._buffer: deque[Frame] = deque()
        self._asked = 0  # messages of the pull under way that have not come
        self._arrived = 0  # messages since the consumer was made: it counts them too
        self._waiter: asyncio.Future[None] | None = None
        self._error: MessagingError | None = None
        self._sid, self._inbox = link.subscribe_inbox(self._on_frames)
        link.listeners.add(self)

    async def start(self, since: float | str | None) -> None:
        """Find the end, then make the consumer. Raises NotFound, OutOfRange, UsageError, ConnectionLost."""
        state = await self._state()
        self._end = state["last_seq"]
        start: Mapping[str, Any] = {"deliver_policy": "all"}
        if isinstance(since, str):
            self._next = self._parsed(since)
            self._check_kept(state)
            start = {"deliver_policy": "by_start_sequence", "opt_start_seq": max(1, self._next)}
        elif since is not None:
            moment = datetime.fromtimestamp(since, UTC).isoformat(timespec="microseconds")
            start = {"deliver_policy": "by_start_time", "opt_start_time": moment}
        config = {"ack_policy": "none", "mem_storage": True, "inactive_threshold": round(IDLE_S * 1e9), **start}
        made = await self._api(f"CONSUMER.CREATE.{self._stream}", {"stream_name": self._stream, "config": config})
        self._consumer = made["name"]
        # what the consumer delivered so far, and so what comes first, is one behind
        self._next = self._next or made["delivered"]["stream_seq"] + 1
        if not made["num_pending"]:
            self._next = self._end + 1

    def _parsed(self, position: str) -> int:
        made, _, number = position.rpartition("/")
        if not made or not number.isdecimal():
            raise UsageError(f"NATS stream {self._stream}: {position[:60]!r} is no position of it")
        if made != self._made or int(number) > self._end + 1:
            raise OutOfRange(f"NATS stream {self._stream} was deleted and made again; begin at the start")
        return int(number)

    async def read(self) -> Message[Any] | None:
        while self._next <= self._end:
            if not self._buffer:
                if self._error is not None:
                    raise self._error
                await self._more()
                await self._look()
                continue
            reply, header, body = self._buffer[0][1:]
            _, number, _, pending = numbers_of(reply)
            if number > self._next:
                self._check_kept(await self._state())  # a gap may also be a message that expired alone
            self._buffer.popleft()
            self._next = number + 1 if pending else self._end + 1
            if number <= self._end:
                return Message(body, id_of(header, self._stream, number), key_of(header), partial(meta_of, header))
        return None

    def position(self) -> str:
        return f"{self._made}/{min(self._next, self._end + 1)}"

    async def close(self) -> None:
        is_alive = self._error is None
        self.let_go()
        if self._consumer and is_alive:
            with suppress(MessagingError, errors.ApiError, TimeoutError):
                async with asyncio.timeout(DELETE_S):
                    await self._link.api(f"CONSUMER.DELETE.{self._stream}.{self._consumer}")

    def let_go(self) -> None:
        """Listen no more. The server forgets the consumer by itself."""
        self._link.unsubscribe(self._sid)
        self._fail(ConnectionLost("the reader was closed"))

    async def _more(self) -> None:
        """Wait for messages, or for the word that there are no more."""
        if not self._asked:
            self._asked = BATCH
            most = max(BATCH_BYTES, 2 * self._link.client.max_payload)
            request = json.dumps({"batch": BATCH, "max_bytes": most, "expires": round(PULL_S * 1e9)}).encode()
            subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{self._consumer}".encode()
            self._link.write(b"PUB %b %bpull %d\r\n%b\r\n" % (subject, self._inbox, len(request), request))
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(SILENCE_S):
                await self._waiter
        except TimeoutError:
            self._fail(ConnectionLost(f"NATS did not answer a pull of {self._stream} within {SILENCE_S:g} s"))
        finally:
            self._waiter = None

    async def _look(self) -> None:
        """After a pull that got nothing: what was to come may have been deleted meanwhile, or lost on its way."""
        if self._buffer or self._error is not None:
            return
        self._check_kept(await self._state())
        found = await self._api(f"CONSUMER.INFO.{self._stream}.{self._consumer}")
        if self._buffer:
            return
        if found["delivered"]["consumer_seq"] != self._arrived:
            self._fail(ConnectionLost(f"messages of {self._stream} were lost on their way"))
        elif not found["num_pending"]:
            self._next = self._end + 1

    def _on_frames(self, frames: list[Frame]) -> None:
        for frame in frames:
            if frame[1].startswith(b"$JS.ACK."):
                self._asked -= 1
                self._arrived += 1
                if numbers_of(frame[1])[2] != self._arrived:
                    self._fail(ConnectionLost(f"messages of {self._stream} were lost on their way"))
                if self._error is None:
                    self._buffer.append(frame)
            elif frame[2][9:12] in (b"404", b"408", b"409") and b"Deleted" not in frame[2]:
                self._asked = 0  # pulled again, and told again what is pending
            elif frame[2][9:12] != b"100":
                self._fail(ConnectionLost(f"the reader of {self._stream} is gone: {frame[2][:80].decode()!r}"))
        self._wake()

    async def _state(self) -> dict[str, Any]:
        found = await self._api(f"STREAM.INFO.{self._stream}")
        made = found["created"]
        if self._made not in ("", made):
            raise OutOfRange(f"NATS stream {self._stream} was deleted and made again; begin at the start")
        self._made = made
        state: dict[str, Any] = found["state"]
        return state

    async def _api(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        try:
            return await self._link.api(path, body)
        except errors.ApiError as error:
            made = errors.from_api(error, f"a replay of stream {self._stream}")
            if not made.transient and error.err_code not in _BEGIN_ANEW:
                raise made from error
            raise ConnectionLost(str(made)) from error

    def _check_kept(self, state: Mapping[str, Any]) -> None:
        if self._next < state["first_seq"] and self._next <= state["last_seq"]:
            raise OutOfRange(
                f"NATS stream {self._stream}: message {self._next} is deleted, the oldest is {state['first_seq']}; "
                "raise max_age_s, or begin at the start"
            )

    def on_lost(self, error: ConnectionLost) -> None:
        self._fail(error)

    def on_denied(self, text: str) -> None:
        if any(name.lower() in text for name in (self._inbox.decode(), f"msg.next.{self._stream}")):
            self._fail(errors.denied(text))

    def _fail(self, error: MessagingError) -> None:
        self._error = self._error or error
        self._link.listeners.discard(self)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
