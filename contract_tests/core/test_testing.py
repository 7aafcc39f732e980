"""Laws of the helpers for users' tests, and of the switches of the memory backend behind them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from _drive import drive, fresh, turns

from messaging_sdk import (
    Bus,
    CapabilityError,
    ConfigError,
    InvalidMessage,
    Level,
    NotFound,
    Queue,
    Retry,
    Signal,
    Topic,
)
from messaging_sdk.config import parse_address
from messaging_sdk.registry import driver_by_name
from messaging_sdk.testing import memory_bus, settled

QUEUE = Queue("work", bytes)
KINDS = [
    QUEUE, Queue("o", bytes, key=str, ordered=True), Topic("t", bytes, groups=["g"]),
    Topic("to", bytes, key=str, ordered=True, groups=["g"]), Signal("s", bytes),
]  # fmt: skip


def law(body: Callable[[], Awaitable[None]]) -> None:
    drive(body())  # type: ignore[arg-type]


# --- memory_bus and settled


def test_every_memory_bus_is_alone() -> None:
    async def body() -> None:
        async with memory_bus() as one, memory_bus() as two, two.consume(QUEUE) as stream:
            await one.publish(QUEUE, b"x")
            assert await stream.next(0.02) is None

    law(body)


def test_settled_returns_when_retries_are_over_too() -> None:
    async def body() -> None:
        bus, attempts = memory_bus(), []

        @bus.on(QUEUE, retry=Retry(3, "10ms"))
        async def take(value: bytes) -> None:
            attempts.append(value)
            if len(attempts) < 3:
                raise ConnectionError("down")

        async with bus, bus.consuming():
            await bus.publish(QUEUE, b"x")
            await settled(bus)
            assert len(attempts) == 3

    law(body)


def test_settled_waits_for_what_handlers_publish() -> None:
    async def body() -> None:
        bus, seen, child = memory_bus(), [], Queue("child", bytes)

        @bus.on(QUEUE)
        async def take(value: bytes) -> None:
            await bus.publish(child, value)

        @bus.on(child)
        async def take_child(value: bytes) -> None:
            await turns()
            seen.append(value)

        async with bus, bus.consuming():
            await bus.publish(QUEUE, b"x")
            await settled(bus)
            assert seen == [b"x"]

    law(body)


def test_settled_gives_up_after_its_wait() -> None:
    async def body() -> None:
        bus, let_go = memory_bus(), asyncio.Event()

        @bus.on(QUEUE)
        async def take(value: bytes) -> None:
            await let_go.wait()

        async with bus, bus.consuming():
            await bus.publish(QUEUE, b"x")
            with pytest.raises(TimeoutError):
                await settled(bus, 0.05)
            let_go.set()

    law(body)


def test_options_of_the_bus_pass_through() -> None:
    assert memory_bus(timeout_s=3.0).timeout_s == 3.0


# --- profiles


@pytest.mark.parametrize(("adapter", "scheme"), [("rabbitmq", "amqp"), ("nats", "nats")])
@pytest.mark.parametrize("destination", KINDS, ids=[repr(d) for d in KINDS])
def test_a_profile_declares_what_the_adapter_declares(adapter: str, scheme: str, destination: Any) -> None:
    kind = driver_by_name(adapter)
    assert kind is not None
    real = kind(parse_address(f"{scheme}://h"), kind.Options(), {}).capabilities(destination)
    assert memory_bus(adapter).capabilities(destination) == real


def test_a_profile_refuses_what_the_adapter_refuses() -> None:
    async def body() -> None:
        async with memory_bus("rabbitmq") as bus:
            with pytest.raises(CapabilityError, match=r"delay.*without a plugin"):
                await bus.publish(QUEUE, b"x", delay="1s")

    law(body)


def test_an_unknown_profile_is_refused() -> None:
    with pytest.raises(ConfigError, match="memory profile 'telegraph'"):
        memory_bus("telegraph")


def test_a_profile_carries_messages() -> None:
    async def body() -> None:
        async with memory_bus("nats") as bus, bus.consume(QUEUE) as stream:
            await bus.publish(QUEUE, b"x")
            found = await stream.next(5)
            assert found is not None and found.body == b"x"
            await found.ack()

    law(body)


# --- switches: declared so, and so it behaves


def switched(switches: str, destination: Any = QUEUE) -> Any:
    return Bus(f"memory://{fresh()}?{switches}").capabilities(destination)


@pytest.mark.parametrize(
    ("flag", "text", "value"),
    [
        ("release", "none", "none"), ("lease", "timeout", "timeout"), ("lease_s", "0.5", 0.5), ("hold_s", "9", 9.0),
        ("count", "flag", "flag"), ("backlog", "false", False), ("order", "none", "none"),
        ("compete", "round_robin", "round_robin"), ("confirm", "received", "received"),
        ("route_error", "false", False), ("durable", "kill", "kill"), ("dedup_s", "0", 0.0),
        ("batch", "atomic", "atomic"), ("ttl", "false", False), ("delay", "false", False), ("priority", "0", 0),
        ("max_body", "10", 10), ("headers", "false", None), ("window", "false", False),
        ("ok_means", "fsync", "fsync"), ("settle", "none", "none"),
    ],
)  # fmt: skip
def test_a_switch_changes_what_is_declared_and_nothing_else(flag: str, text: str, value: object) -> None:
    plain, changed = dict(switched("").items()), dict(switched(f"{flag}={text}").items())
    assert {f: v for f, v in changed.items() if v != plain[f]} == {flag: value}


def test_a_switch_for_order_changes_ordered_destinations_only() -> None:
    ordered = Queue("o", bytes, key=str, ordered=True)
    assert switched("order_redelivery=false", ordered).order_redelivery is False
    assert switched("order_redelivery=true").order_redelivery is False


def test_a_wrong_value_of_a_switch_is_refused_naming_it() -> None:
    with pytest.raises(ConfigError, match="release: Input should be 'none', 'now' or 'delay'"):
        Bus("memory://x?release=later")


async def first_of(switches: str, **options: Any) -> Any:
    async with Bus(f"memory://{fresh()}?{switches}") as bus, bus.consume(QUEUE) as stream:
        await bus.publish(QUEUE, b"x", **options)
        found = await stream.next(5)
        assert found is not None
        await found.ack()
        return found


@pytest.mark.parametrize(
    ("count", "deliveries", "redelivered"), [("exact", 1, False), ("flag", None, False), ("none", None, None)]
)
def test_without_a_count_deliveries_have_none(count: str, deliveries: int | None, redelivered: bool | None) -> None:
    found = drive(first_of(f"count={count}"))
    assert (found.deliveries, found.redelivered) == (deliveries, redelivered)


@pytest.mark.parametrize(("dedup_s", "stored"), [("60", 1), ("0", 2)])
def test_a_repeated_id_is_stored_once_only_where_declared(dedup_s: str, stored: int) -> None:
    async def body() -> None:
        async with Bus(f"memory://{fresh()}?dedup_s={dedup_s}") as bus:
            for _ in range(2):
                await bus.publish(QUEUE, b"x", id="same")
            async with bus.consume(QUEUE) as stream:
                assert len(await stream.take(5, 5)) == stored

    law(body)


def test_a_message_expires_after_its_ttl() -> None:
    async def body() -> None:
        async with Bus(f"memory://{fresh()}") as bus:
            await bus.publish(QUEUE, b"short", ttl="1ms")
            await bus.publish(QUEUE, b"long", ttl="1h")
            await asyncio.sleep(0.002)
            async with bus.consume(QUEUE) as stream:
                assert [d.body for d in await stream.take(5, 5)] == [b"long"]

    law(body)


def test_a_delayed_message_arrives_no_sooner() -> None:
    async def body() -> None:
        loop = asyncio.get_running_loop()
        async with Bus(f"memory://{fresh()}") as bus, bus.consume(QUEUE) as stream:
            began = loop.time()
            await bus.publish(QUEUE, b"later", delay="50ms")
            await bus.publish(QUEUE, b"now")
            assert [(await stream.next(5)).body for _ in range(2)] == [b"now", b"later"]  # type: ignore[union-attr]
            assert loop.time() - began >= 0.05

    law(body)


def test_higher_priorities_go_first() -> None:
    async def body() -> None:
        async with Bus(f"memory://{fresh()}") as bus:
            for priority in (1, 9, 5):
                await bus.publish(QUEUE, b"%d" % priority, priority=priority)
            async with bus.consume(QUEUE) as stream:
                assert [d.body for d in await stream.take(3, 5)] == [b"9", b"5", b"1"]

    law(body)


def test_a_priority_beyond_the_levels_is_refused() -> None:
    with pytest.raises(CapabilityError, match="priority"):
        drive(first_of("priority=3", priority=3))


def test_headers_are_refused_where_there_are_none() -> None:
    with pytest.raises(InvalidMessage, match="no headers"):
        drive(first_of("headers=false", headers={"a": "1"}))


def test_what_is_not_provisioned_is_not_found() -> None:
    async def body() -> None:
        config = {"backends": {"m": {"url": f"memory://{fresh()}", "provision": "none"}}, "routes": {"*": "m"}}
        async with Bus(config) as bus:
            with pytest.raises(NotFound, match="provision it first"):
                await bus.publish(QUEUE, b"x")

    law(body)


def test_verifying_finds_what_is_absent() -> None:
    async def body() -> None:
        config = {"backends": {"m": {"url": f"memory://{fresh()}", "provision": "verify"}}, "routes": {"*": "m"}}
        with pytest.raises(NotFound, match="does not exist"):
            async with Bus(config) as bus:
                await bus.publish(QUEUE, b"x")

    law(body)


def test_a_lease_that_nobody_extends_runs_out_and_the_message_comes_again() -> None:
    async def body() -> None:
        async with Bus(f"memory://{fresh()}?lease=timeout&lease_s=0.05") as bus, bus.consume(QUEUE) as stream:
            await bus.publish(QUEUE, b"x")
            first = await stream.next(5)
            assert first is not None
            stream._ours()._extender.cancel()  # type: ignore[union-attr]  # as if the process hung
            again = await stream.next(5)
            assert again is not None and (again.id, again.deliveries) == (first.id, 2)
            await again.ack()

    law(body)


def test_a_lease_that_is_extended_never_runs_out() -> None:
    async def body() -> None:
        async with Bus(f"memory://{fresh()}?lease=timeout&lease_s=0.05") as bus, bus.consume(QUEUE) as stream:
            await bus.publish(QUEUE, b"x")
            first = await stream.next(5)
            assert first is not None
            assert await stream.next(0.2) is None, "four leases long it must stay ours"
            await first.ack()

    law(body)


def test_two_consumers_of_an_ordered_queue_never_hold_one_key_at_once() -> None:
    async def body() -> None:
        url, ordered = f"memory://{fresh()}", Queue("o", bytes, key=lambda b: b.decode()[0], ordered=True)
        async with Bus(url) as one, Bus(url) as two, one.consume(ordered) as first, two.consume(ordered) as second:
            await one.publish(ordered, b"a1")
            await one.publish(ordered, b"a2")
            streams = (first, second)
            held = [d for s in streams for d in await s.take(5, 0.02)]
            assert [d.body for d in held] == [b"a1"]
            await held[0].ack()
            found = [d for s in streams for d in await s.take(5, 0.05)]
            assert [d.body for d in found] == [b"a2"]

    law(body)


def test_the_memory_backend_says_that_nothing_survives_it() -> None:
    capabilities = switched("")
    assert capabilities.level("durable") is Level.NONE and "process" in capabilities.notes["durable"]
