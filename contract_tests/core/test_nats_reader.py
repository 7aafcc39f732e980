"""Laws of the NATS history reader that need no server: a scripted link."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from _drive import drive, turns

from messaging_sdk import ConnectionLost, OutOfRange, UsageError
from messaging_sdk_nats.driver import Link
from messaging_sdk_nats.errors import ApiError
from messaging_sdk_nats.reader import HistoryReader

MADE = "2026-11-26T10:00:00Z"


class Wire:
    """What the reader uses of a link. `frames` answer the first pull; each ends with a 408."""

    def __init__(self, first: int, last: int, frames: list[Any] | None = None, *, delivered: int | None = None) -> None:
        self.first, self.last, self.frames = first, last, frames or []
        self.delivered = len(self.frames) if delivered is None else delivered
        self.pending = 1
        self.made = MADE
        self.refusal: ApiError | None = None
        self.listeners: set[Any] = set()
        self.subscribed = 0
        self.asked: list[str] = []
        self.client = self
        self.max_payload = 1 << 20

    def subscribe_inbox(self, sink: Any) -> tuple[bytes, bytes]:
        self.sink, self.subscribed = sink, self.subscribed + 1
        return b"1", b"_INBOX.x."

    def unsubscribe(self, sid: bytes) -> None:
        self.subscribed -= 1

    def write(self, blob: bytes) -> None:
        frames, self.frames = self.frames, []
        loop = asyncio.get_running_loop()
        loop.call_soon(self.sink, frames)
        loop.call_later(0.01, self.sink, [(b"_INBOX.x.pull", b"", b"NATS/1.0 408 Request Timeout\r\n\r\n", b"")])

    async def api(self, path: str, body: object = None) -> dict[str, Any]:
        self.asked.append(path)
        if path.startswith("STREAM.INFO"):
            return {"created": self.made, "state": {"first_seq": self.first, "last_seq": self.last}}
        if self.refusal is not None:
            raise self.refusal
        seqs = {"consumer_seq": self.delivered, "stream_seq": self.first - 1}
        return {"name": "c", "delivered": seqs, "num_pending": self.pending}


def frame(number: int, consumer_number: int, pending: int) -> Any:
    reply = f"$JS.ACK.s.c.1.{number}.{consumer_number}.1.{pending}".encode()
    return (b"_INBOX.x.pull", reply, b"NATS/1.0\r\n\r\n", b"%d" % number)


def reader(wire: Wire) -> HistoryReader:
    return HistoryReader(cast(Link, wire), "s")


async def all_of(made: HistoryReader) -> list[int]:
    found = []
    while (message := await made.read()) is not None:
        found.append(int(message.body))
    return found


def test_it_ends_at_the_last_sequence_and_goes_over_what_expired_alone() -> None:
    async def main() -> None:
        made = reader(Wire(1, 4, [frame(1, 1, 3), frame(3, 2, 2), frame(4, 3, 1), frame(5, 4, 0)]))
        await made.start(None)
        assert await all_of(made) == [1, 3, 4]
        assert made.position() == f"{MADE}/5"

    drive(main())


def test_a_gap_that_retention_made_is_an_error_and_stays_one() -> None:
    async def main() -> None:
        wire = Wire(1, 9, [frame(1, 1, 8), frame(7, 2, 2)])
        made = reader(wire)
        await made.start(None)
        assert await made.read() is not None
        wire.first = 7
        for _ in range(2):
            with pytest.raises(OutOfRange):
                await made.read()
        assert made.position() == f"{MADE}/2"

    drive(main())


@pytest.mark.parametrize("frames", [[frame(1, 1, 3), frame(3, 3, 1)], [frame(1, 1, 3)]])
def test_what_was_lost_on_its_way_is_no_gap(frames: list[Any]) -> None:
    """The consumer counts what it sent: in the middle by the next message, at the end by what it says itself."""

    async def main() -> None:
        made = reader(Wire(1, 4, list(frames), delivered=3))
        await made.start(None)
        assert await made.read() is not None
        with pytest.raises(ConnectionLost, match="on their way"):
            await made.read()
        assert made.position() == f"{MADE}/2"

    drive(main())


def test_what_was_to_come_and_was_deleted_alone_is_not_waited_for() -> None:
    async def main() -> None:
        wire = Wire(1, 4, [frame(1, 1, 3)])
        made = reader(wire)
        await made.start(None)
        assert await made.read() is not None
        wire.pending = 0
        assert await made.read() is None

    drive(main())


@pytest.mark.parametrize("code", [10014, 503, 10008])
def test_a_consumer_that_went_with_its_server_is_a_lost_connection(code: int) -> None:
    async def main() -> None:
        wire = Wire(1, 4, [frame(1, 1, 3)])
        made = reader(wire)
        await made.start(None)
        assert await made.read() is not None
        wire.refusal = ApiError(code, "gone")
        with pytest.raises(ConnectionLost):
            await made.read()

    drive(main())


@pytest.mark.parametrize(
    ("since", "kind"),
    [("x", UsageError), ("5", UsageError), ("2020-01-01T00:00:00Z/2", OutOfRange), (f"{MADE}/1", OutOfRange)],
)
def test_where_a_replay_cannot_begin(since: str, kind: type[Exception]) -> None:
    async def main() -> None:
        with pytest.raises(kind):
            await reader(Wire(3, 5)).start(since)

    drive(main())


def test_close_ends_a_read_that_waits_and_leaves_nothing_behind() -> None:
    async def main() -> None:
        wire = Wire(1, 4)
        wire.write = lambda blob: None  # type: ignore[method-assign]
        made = reader(wire)
        await made.start(None)
        reading = asyncio.ensure_future(made.read())
        await turns()
        await made.close()
        with pytest.raises(ConnectionLost):
            await reading
        assert (wire.subscribed, wire.listeners, wire.asked[-1]) == (0, set(), "CONSUMER.DELETE.s.c")

    drive(main())


def test_a_reader_that_lost_its_connection_leaves_nothing_behind_either() -> None:
    async def main() -> None:
        wire = Wire(1, 4)
        made = reader(wire)
        await made.start(None)
        made.on_lost(ConnectionLost("cut"))
        await made.close()
        assert (wire.subscribed, wire.listeners) == (0, set())
        assert not wire.asked[-1].startswith("CONSUMER.DELETE")

    drive(main())
