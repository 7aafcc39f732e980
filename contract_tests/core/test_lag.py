"""Laws of `bus.lag`: what it refuses and when, what memory counts, and how Kafka's commits and notes are reckoned."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from _drive import drive, fresh
from confluent_kafka import TopicPartition
from hypothesis import given
from hypothesis import strategies as st

from messaging_sdk import (
    Bus,
    CapabilityError,
    Closed,
    ConnectError,
    NotFound,
    Queue,
    Retry,
    Signal,
    Topic,
    UsageError,
)
from messaging_sdk import memory as reference
from messaging_sdk.spi import Driver as AbstractDriver
from messaging_sdk_kafka.driver import left_of
from messaging_sdk_kafka.receiver import noted

WORK = Queue("work", int)
NEWS = Topic("news", int, groups=("g1", "g2"))
BEAT = Signal("beat", int)


def law(body: Callable[[Bus], Awaitable[None]], options: str = "") -> None:
    """Run `body` with an open bus on a fresh memory broker."""

    async def main() -> None:
        async with Bus(f"memory://{fresh()}{options}") as bus:
            await body(bus)

    drive(main())


# --- refusals


@pytest.mark.parametrize(
    ("destination", "group"), [(WORK, "g1"), (NEWS, None), (NEWS, "g3"), ("work", None), (None, None)]
)
def test_a_wrong_group_is_a_mistake_before_the_bus_is_opened(destination: Any, group: str | None) -> None:
    async def main() -> None:
        bus = Bus(f"memory://{fresh()}")
        with pytest.raises(UsageError):
            await bus.lag(destination, group)
        assert vars(bus)["_state"] == "new"

    drive(main())


@pytest.mark.parametrize(
    ("url", "destination", "group", "named"),
    [
        ("?lag=none", WORK, None, "lag='waiting'"),
        ("?lag=none", NEWS, "g1", "lag='waiting'"),
        ("", BEAT, None, "nothing waits"),
        ("", BEAT, "g", "nothing waits"),
    ],
)
def test_where_there_is_none_it_is_refused_before_the_bus_is_opened(
    url: str, destination: Any, group: str | None, named: str
) -> None:
    async def main() -> None:
        bus = Bus(f"memory://{fresh()}{url}")
        with pytest.raises(CapabilityError, match=named) as caught:
            await bus.lag(destination, group)
        assert [item.destination for item in caught.value.unmet] == [destination.name]
        assert vars(bus)["_state"] == "new"

    drive(main())


def test_what_only_the_live_server_knows_is_refused_by_then(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = reference.Driver.capabilities

    def narrowed(self: reference.Driver, destination: Any) -> Any:
        found = honest(self, destination)
        is_open = self in self.broker.connections
        return found if not is_open else reference.replace(found, lag="none")

    async def main() -> None:
        monkeypatch.setattr(reference.Driver, "capabilities", narrowed)
        with pytest.raises(CapabilityError, match="lag='waiting'"):
            await Bus(f"memory://{fresh()}").lag(WORK)

    drive(main())


def test_an_adapter_that_has_none_refuses_by_itself() -> None:
    async def body(bus: Bus) -> None:
        driver = next(iter(vars(bus)["_drivers"].values()))
        with pytest.raises(CapabilityError, match="lag"):
            await AbstractDriver.lag(driver, WORK, None)

    law(body)


def test_a_closed_bus_says_so() -> None:
    async def main() -> None:
        bus = Bus(f"memory://{fresh()}")
        await bus.open()
        await bus.close()
        with pytest.raises(Closed):
            await bus.lag(WORK)

    drive(main())


@pytest.mark.parametrize(("destination", "group"), [(WORK, None), (NEWS, "g1")])
def test_what_does_not_exist_is_not_found_and_not_empty(destination: Any, group: str | None) -> None:
    async def main() -> None:
        table = {"url": f"memory://{fresh()}", "provision": "none"}
        async with Bus({"backends": {"m": table}, "routes": {"*": "m"}}) as bus:
            with pytest.raises(NotFound):
                await bus.lag(destination, group)

    drive(main())


def test_a_backend_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def silent(*_: Any) -> int:
        await asyncio.Event().wait()
        return 0

    async def body(bus: Bus) -> None:
        with pytest.raises(ConnectError, match="lag of"):
            await bus.lag(WORK)

    monkeypatch.setattr("messaging_sdk.bus.OPEN_S", 0.05)
    monkeypatch.setattr(reference.Driver, "lag", silent)
    law(body)


# --- what is counted


def test_it_opens_the_bus_and_needs_no_consumer() -> None:
    async def main() -> None:
        name = f"memory://{fresh()}"
        async with Bus(name) as bus:
            for number in range(3):
                await bus.publish(WORK, number)
        other = Bus(name)
        assert await other.lag(WORK) == 3
        await other.close()

    drive(main())


@pytest.mark.parametrize(("kind", "while_out"), [("unsettled", 5), ("waiting", 3)])
def test_what_is_out_counts_as_the_flag_says(kind: str, while_out: int) -> None:
    async def body(bus: Bus) -> None:
        for number in range(5):
            await bus.publish(WORK, number)
        async with bus.consume(WORK, window=2) as stream:
            first, second = await stream.take(2, wait_s=5)
            assert await bus.lag(WORK) == while_out
            await second.ack()
            await stream.next(5)
            assert await bus.lag(WORK) == while_out - 1
            await first.ack()
        assert await bus.lag(WORK) == 3  # the others were handed back

    law(body, f"?lag={kind}")


def test_each_group_has_its_own() -> None:
    async def body(bus: Bus) -> None:
        bus.declare(NEWS)
        for number in range(4):
            await bus.publish(NEWS, number)
        async with bus.consume(NEWS, group="g1") as stream:
            await stream.ack(await stream.take(3, wait_s=5))
            assert (await bus.lag(NEWS, "g1"), await bus.lag(NEWS, "g2")) == (1, 4)

    law(body)


def test_a_message_that_waits_for_its_retry_is_yet_to_be_handled() -> None:
    async def body(bus: Bus) -> None:
        failed = asyncio.Event()

        @bus.on(WORK, retry=Retry(2, "1h"))
        async def fail(number: int) -> None:
            failed.set()
            raise ValueError(number)

        async with bus.consuming(grace_s=0.1):
            await bus.publish(WORK, 1)
            await failed.wait()
            assert await bus.lag(WORK) == 1

    law(body)


def test_what_has_expired_is_not_left() -> None:
    async def body(bus: Bus) -> None:
        await bus.publish(WORK, 1, ttl=0.01)
        await bus.publish(WORK, 2, delay=60)
        await asyncio.sleep(0.02)
        assert await bus.lag(WORK) == 1

    law(body)


@pytest.mark.parametrize(("profile", "kind"), [("rabbitmq", "waiting"), ("kafka", "unsettled"), ("zeromq", "none")])
def test_a_profile_counts_as_its_adapter_does(profile: str, kind: str) -> None:
    assert Bus(f"memory://{fresh()}?profile={profile}").capabilities(WORK).lag == kind


# --- a log's commits


def committed(offset: int, metadata: str = "") -> TopicPartition:
    return TopicPartition("t", 0, offset, metadata)


@pytest.mark.parametrize(
    ("at", "first", "end", "left"),
    [
        (committed(3), 0, 10, 7),
        (committed(10), 0, 10, 0),
        (committed(-1001), 0, 10, 10),  # no commit: from the start of the log
        (committed(-1001), 4, 10, 6),
        (committed(3), 5, 10, 5),  # retention went past the commit
        (committed(3, noted(3, [4, 9])), 0, 10, 5),
        (committed(3, noted(3, [4, 9])), 5, 10, 4),  # the noted 4 is gone like the 3
        (committed(3, noted(3, [4, 12])), 0, 10, 6),  # a log that was cut ends before what was settled
        (committed(12), 0, 10, 0),
        (committed(3, "another program's"), 0, 10, 7),
    ],
)
def test_a_group_has_left_what_is_behind_its_commit_and_not_noted(
    at: TopicPartition, first: int, end: int, left: int
) -> None:
    assert left_of(at, first, end) == left


@given(st.integers(0, 1 << 40), st.lists(st.booleans(), max_size=300), st.integers(0, 20))
def test_it_is_the_number_of_messages_that_are_not_settled(first: int, settled: list[bool], deleted: int) -> None:
    """Whatever is settled: the commit is the first open offset, its note says what is settled behind that."""
    end = first + len(settled)
    is_open = {first + n for n, done in enumerate(settled) if not done}
    position = min(is_open, default=end)
    note = noted(position, [offset for offset in range(position, end) if offset not in is_open])
    start = min(first + deleted, end)
    assert left_of(committed(position, note), start, end) == len([o for o in is_open if o >= start])
