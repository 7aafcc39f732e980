"""Laws of a replay: what it refuses, where it goes on, and when it ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import pytest
from _drive import drive, fresh, turns

from messaging_sdk import (
    Bus,
    CapabilityError,
    Closed,
    ConnectError,
    ConnectionLost,
    DeadlineExceeded,
    DecodeError,
    Message,
    Queue,
    Signal,
    Topic,
    UsageError,
)
from messaging_sdk.replay import Replay
from messaging_sdk.spi import Driver as AbstractDriver
from messaging_sdk.spi import Reader

NEWS = Topic("news", int, groups=("g",))


@asynccontextmanager
async def told(*values: int, **options: Any) -> AsyncIterator[Bus]:
    """An open bus with `values` in NEWS."""
    async with Bus(f"memory://{fresh()}", **options) as bus:
        for value in values:
            await bus.publish(NEWS, value)
        yield bus


async def left_of(history: Replay[int]) -> list[int]:
    return [message.data async for message in history]


# --- refusals


@pytest.mark.parametrize("destination", [Queue("q", int), Signal("s", int), "news"])
def test_only_a_topic_has_a_history(destination: Any) -> None:
    with pytest.raises(UsageError, match="Topic"):
        Bus("memory://").replay(destination)


@pytest.mark.parametrize("since", ["", "now", "memory news", "memory other 3", "kafka news 0:1", 5, None])
def test_what_is_no_position_of_this_topic_on_this_backend_is_refused_at_once(since: Any) -> None:
    with pytest.raises(UsageError, match="replay of"):
        Bus("memory://").replay(NEWS, since=since)


def test_a_time_needs_a_zone() -> None:
    with pytest.raises(UsageError, match="time zone"):
        Bus("memory://").replay(NEWS, since=datetime(2026, 1, 1))  # that is the point


@pytest.mark.parametrize("position", ["99", "-1", "x"])
def test_a_position_that_the_backend_never_gave_is_refused_when_entered(position: str) -> None:
    async def main() -> None:
        async with told(1) as bus:
            with pytest.raises(UsageError):
                async with bus.replay(NEWS, since=f"memory default news {position}"):
                    pass

    drive(main())


def test_a_backend_without_history_refuses_it_and_says_what_would_have_one() -> None:
    async def main() -> None:
        async with Bus(f"memory://{fresh()}?replay=false") as bus:
            await bus.publish(NEWS, 1)
            with pytest.raises(CapabilityError, match="replay") as caught:
                async with bus.replay(NEWS):
                    pass
            assert [item.destination for item in caught.value.unmet] == ["news"]
            await bus.publish(NEWS, 2)

    drive(main())


def test_an_adapter_that_has_no_reader_refuses_by_itself() -> None:
    async def main() -> None:
        async with told() as bus:
            driver = next(iter(vars(bus)["_drivers"].values()))
            with pytest.raises(CapabilityError, match="replay"):
                await AbstractDriver.open_reader(driver, NEWS, None)

    drive(main())


# --- using it


def test_it_is_used_inside_its_block_and_once() -> None:
    async def main() -> None:
        async with told(1) as bus:
            history = bus.replay(NEWS)
            with pytest.raises(UsageError, match="inside"):
                await anext(history)
            with pytest.raises(UsageError, match="entered"):
                assert history.position
            async with history:
                assert await left_of(history) == [1]
            with pytest.raises(UsageError, match="inside"):
                await anext(history)
            with pytest.raises(UsageError, match="before"):
                async with history:
                    pass
            assert history.position  # what is to be stored may be asked for behind the block

    drive(main())


def test_a_position_survives_its_replay_and_its_bus() -> None:
    async def main() -> None:
        name = f"memory://{fresh()}"
        async with Bus(name) as bus:
            for value in range(5):
                await bus.publish(NEWS, value)
            async with bus.replay(NEWS) as history:
                assert [(await anext(history)).data for _ in range(2)] == [0, 1]
        async with Bus(name) as other, other.replay(NEWS, since=history.position) as rest:
            assert await left_of(rest) == [2, 3, 4]

    drive(main())


def test_a_time_is_where_it_begins() -> None:
    async def main() -> None:
        async with told(1, 2) as bus:
            await asyncio.sleep(0.01)
            moment = datetime.now(UTC)
            await bus.publish(NEWS, 3)
            async with bus.replay(NEWS, since=moment) as history:
                assert await left_of(history) == [3]

    drive(main())


def test_what_cannot_be_decoded_is_raised_and_the_next_call_goes_on_behind_it() -> None:
    async def main() -> None:
        async with told(1) as bus:
            await bus.publish(Topic("news", bytes, groups=("g",)), b"no number")
            await bus.publish(NEWS, 3)
            async with bus.replay(NEWS) as history:
                assert (await anext(history)).data == 1
                with pytest.raises(DecodeError):
                    await anext(history)
                assert await left_of(history) == [3]

    drive(main())


# --- losses


class Unsteady(Reader):
    """Gives 0, 1, 2... up to `end`; breaks once before each number of `breaks`."""

    def __init__(self, start: int, end: int, breaks: set[int], log: list[str]) -> None:
        self.at, self.end, self.breaks, self.log = start, end, breaks, log

    async def read(self) -> Message[Any] | None:
        if self.at in self.breaks:
            self.breaks.remove(self.at)
            raise ConnectionLost("cut")
        if self.at == self.end:
            return None
        self.at += 1
        return Message(b"%d" % (self.at - 1), "id")

    def position(self) -> str:
        return str(self.at)

    async def close(self) -> None:
        self.log.append(f"closed at {self.at}")


def unsteady(breaks: set[int], log: list[str], *refusals: Exception) -> Replay[int]:
    waiting = list(refusals)

    async def open_reader(since: float | str | None) -> Reader:
        log.append(f"open {since}")
        if since is not None and waiting:
            raise waiting.pop(0)
        return Unsteady(int(since or 0), 5, breaks, log)

    return Replay(NEWS, "scripted news", open_reader, None)


def test_a_lost_connection_is_replaced_and_nothing_is_missing_or_read_twice() -> None:
    async def main() -> None:
        log: list[str] = []
        async with unsteady({0, 3}, log) as history:
            assert await left_of(history) == [0, 1, 2, 3, 4]
        assert log == ["open None", "closed at 0", "open 0", "closed at 3", "open 3", "closed at 5"]

    drive(main())


def test_an_attempt_that_fails_for_now_is_made_again_one_that_fails_for_good_is_raised() -> None:
    async def main() -> None:
        log: list[str] = []
        async with unsteady({2}, log, ConnectError("not yet"), ConnectionLost("nor now")) as history:
            assert await left_of(history) == [0, 1, 2, 3, 4]
        assert log.count("open 2") == 3
        async with unsteady({2}, log, ConnectError("wrong port", transient=False)) as history:
            with pytest.raises(ConnectError, match="wrong port"):
                await left_of(history)
            assert history.position == "scripted news 2"

    drive(main())


def test_any_error_that_may_heal_costs_the_reader_and_not_the_replay() -> None:
    class Slow(Unsteady):
        async def read(self) -> Message[Any] | None:
            if self.breaks:
                self.breaks.clear()
                raise DeadlineExceeded("no answer")
            return await super().read()

    async def main() -> None:
        breaks = {0}

        async def open_reader(since: float | str | None) -> Reader:
            return Slow(int(since or 0), 2, breaks, [])

        async with Replay(NEWS, "scripted news", open_reader, None) as history:
            assert await left_of(history) == [0, 1]

    drive(main())


class Waiting(Unsteady):
    """Never has anything, until it is closed."""

    closed: asyncio.Event

    async def read(self) -> Message[Any] | None:
        self.closed = asyncio.Event()
        await self.closed.wait()
        raise ConnectionLost("closed")

    async def close(self) -> None:
        await super().close()
        self.closed.set()


def test_who_waits_when_the_bus_closes_is_told_before_close_returns() -> None:
    async def main() -> None:
        log: list[str] = []

        async def open_reader(since: float | str | None) -> Reader:
            return Waiting(0, 1, set(), log)

        async with Replay(NEWS, "scripted news", open_reader, None) as history:
            waiting = asyncio.ensure_future(anext(history))
            await turns()
            await history.close()
            assert waiting.done() and isinstance(waiting.exception(), Closed)
            with pytest.raises(Closed):
                await anext(history)
        assert log == ["closed at 0"]

    drive(main())


def test_who_waits_for_the_next_attempt_is_told_at_once_too() -> None:
    async def main() -> None:
        refusals = [ConnectError("not now") for _ in range(30)]
        async with unsteady({1}, [], *refusals) as history:
            assert (await anext(history)).data == 0
            waiting = asyncio.ensure_future(anext(history))
            await asyncio.sleep(0.5)  # by now the pauses between attempts are long
            began = time.monotonic()
            await history.close()
            assert isinstance(waiting.exception(), Closed) and time.monotonic() - began < 0.2

    drive(main())


def test_a_reader_that_comes_too_late_is_closed() -> None:
    """The block was left while another reader was being opened: an interrupt of a plain thread, say."""

    async def main() -> None:
        log: list[str] = []
        opening = asyncio.Event()

        async def open_reader(since: float | str | None) -> Reader:
            log.append(f"open {since}")
            if since is not None:
                await opening.wait()
            return Unsteady(int(since or 0), 5, {1} if since is None else set(), log)

        async with Replay(NEWS, "scripted news", open_reader, None) as history:
            await anext(history)
            orphan = asyncio.ensure_future(anext(history))
            await asyncio.sleep(0.3)
        opening.set()
        with pytest.raises(UsageError, match="inside"):
            await orphan
        assert log == ["open None", "closed at 1", "open 1", "closed at 1"]
        assert history.position == "scripted news 1"

    drive(main())


def test_the_child_of_a_fork_leaves_the_parents_reader_alone() -> None:
    async def main() -> None:
        log: list[str] = []
        async with unsteady(set(), log) as history:
            await anext(history)
            history.disown()
            with pytest.raises(UsageError, match="parent"):
                await anext(history)
        assert log == ["open None"] and history.position == "scripted news 1"

    drive(main())


def test_a_forked_bus_disowns_its_replays() -> None:
    async def main() -> None:
        async with told(1) as bus, bus.replay(NEWS) as history:
            bus._forked()
            with pytest.raises(UsageError, match="parent"):
                await anext(history)

    drive(main())


def test_a_bus_that_is_closed_ends_its_replays() -> None:
    async def main() -> None:
        async with told(1, 2) as bus, bus.replay(NEWS) as history:
            await anext(history)
            await bus.close()
            with pytest.raises(Closed):
                await anext(history)

    drive(main())


def test_a_reader_that_breaks_while_closing_is_not_the_users_business() -> None:
    class Broken(Unsteady):
        async def close(self) -> None:
            raise RuntimeError("an adapter's bug")

    async def main() -> None:
        async def open_reader(since: float | str | None) -> Reader:
            return Broken(0, 1, set(), [])

        async with Replay(NEWS, "scripted news", open_reader, None) as history:
            assert await left_of(history) == [0]

    drive(main())
