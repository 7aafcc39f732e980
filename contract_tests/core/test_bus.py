"""Laws of a bus: all refusals together before any I/O, one loop, one process, and an end in every state."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from _drive import drive, eventually, fresh, turns
from _scripted import RecordingDriver, memory, recording

from messaging_sdk import (
    Bus,
    Capabilities,
    CapabilityError,
    Closed,
    ConfigError,
    ConnectError,
    Destination,
    InvalidDestination,
    Level,
    MessagingError,
    Needs,
    NotFound,
    Outcome,
    Queue,
    Reject,
    Retry,
    Signal,
    Topic,
    UsageError,
)
from messaging_sdk.memory import DURABLE, MemoryReceiver, MemorySender

QUEUE = Queue("work", bytes)


def law(body: Callable[[], Awaitable[None]]) -> None:
    drive(body())  # type: ignore[arg-type]


def poor(destination: Destination[Any]) -> Capabilities:
    """Claims the least that still stores something."""
    return Capabilities(settle="individual", lease="connection", confirm="received", max_body=100)


async def never() -> Any:
    await asyncio.Event().wait()


# --- refusals: all together, before any I/O


def test_every_unmet_need_of_every_destination_comes_in_one_error_before_any_io() -> None:
    async def body() -> None:
        poor_url, poor_kind = recording(claims=poor)
        rich_url, rich_kind = recording()
        config = {
            "backends": {"poor": poor_url, "rich": rich_url},
            "routes": {"orders.*": "poor", "mail": "poor", "*": "rich"},
        }
        bus = Bus(config, needs=Needs(dedup_s=60.0))
        mail = Queue("mail", bytes)
        bus.declare(Topic("orders.placed", bytes, groups=["g"]), Queue("orders.o", bytes, key=str, ordered=True))

        @bus.on(mail, retry=Retry(3, "1h"))
        async def take(value: bytes) -> None: ...

        with pytest.raises(CapabilityError) as caught:
            await bus.open()
        found = {(u.destination, u.need.split("=")[0]) for u in caught.value.unmet}
        assert found >= {
            ("orders.placed", "groups"), ("orders.placed", "dedup_s"),
            ("orders.o", "order"), ("orders.o", "order_redelivery"), ("orders.o", "order_competition"),
            ("orders.o", "backlog"), ("mail", "backlog"), ("mail", "dedup_s"),
        }  # fmt: skip
        assert "orders.o" in str(caught.value) and "mail" in str(caught.value)
        assert caught.value.outcome is Outcome.REJECTED
        assert [d.calls for d in [*poor_kind.made, *rich_kind.made]] == [[], []]

    law(body)


def test_a_retry_policy_longer_than_a_delivery_may_be_held_is_refused_before_io() -> None:
    async def body() -> None:
        url, kind = recording(claims=lambda destination: replace(DURABLE, hold_s=60.0))
        bus = Bus(url)

        @bus.on(QUEUE, retry=Retry(5, "1m"))
        async def take(value: bytes) -> None: ...

        with pytest.raises(CapabilityError, match=r"hold_s=.*retry policy"):
            await bus.open()
        assert kind.made[0].calls == []

    law(body)


def test_handler_time_counts_towards_the_hold() -> None:
    async def body() -> None:
        url, _ = recording(claims=lambda destination: replace(DURABLE, hold_s=60.0))
        bus = Bus(url)

        @bus.on(QUEUE, retry=Retry(3, "1ms"), timeout="30s")
        async def take(value: bytes) -> None: ...

        with pytest.raises(CapabilityError, match="hold_s"):
            await bus.open()

    law(body)


def test_a_refused_tag_comes_with_the_reason_of_the_adapter() -> None:
    async def body() -> None:
        url, kind = recording(claims=lambda d: Capabilities(notes={"tag": "start the server with JetStream"}))
        bus = Bus(url)
        bus.declare(QUEUE, Topic("t", bytes))
        with pytest.raises(CapabilityError, match="start the server with JetStream") as caught:
            await bus.open()
        assert len(caught.value.unmet) == 2 and kind.made[0].calls == []

    law(body)


def test_emulation_can_be_forbidden_by_configuration() -> None:
    emulated = replace(DURABLE, levels={"backlog": Level.EMULATED}, notes={"backlog": "kept by us"})

    async def body() -> None:
        url, _ = recording(claims=lambda destination: emulated)
        config = {"backends": {"main": {"url": url, "emulation": "forbid"}}, "routes": {"*": "main"}}
        bus = Bus(config)
        bus.declare(QUEUE)
        with pytest.raises(CapabilityError, match="kept by us"):
            await bus.open()
        allowed = Bus(url)
        allowed.declare(QUEUE)
        await allowed.open()
        assert allowed.promises()[0].emulated == {"backlog": "kept by us"}
        await allowed.close()

    law(body)


def test_a_destination_without_a_route_is_refused_before_io() -> None:
    async def body() -> None:
        url, kind = recording()
        bus = Bus({"backends": {"main": url}, "routes": {"billing.*": "main"}})
        bus.declare(QUEUE)
        with pytest.raises(ConfigError, match="no route for destination 'work'"):
            await bus.open()
        assert kind.made[0].calls == []

    law(body)


def test_dead_letters_without_a_route_are_refused_before_io() -> None:
    async def body() -> None:
        url, kind = recording()
        bus = Bus({"backends": {"main": url}, "routes": {"work": "main"}})

        @bus.on(QUEUE)
        async def take(value: bytes) -> None: ...

        with pytest.raises(ConfigError, match=r"work\.dead"):
            await bus.open()
        assert kind.made[0].calls == []

    law(body)


def test_a_physical_name_that_only_the_dead_letters_make_too_long_is_refused_before_io() -> None:
    class Short(RecordingDriver):
        def check(self, destination: Destination[Any]) -> None:
            if len(destination.name) > 6:
                raise InvalidDestination(f"{destination.name}: {len(destination.name)} characters, the limit is 6")

    async def body() -> None:
        url, kind = recording(check=Short.check)
        bus = Bus(url)

        @bus.on(QUEUE)
        async def take(value: bytes) -> None: ...

        with pytest.raises(InvalidDestination, match="the limit is 6"):
            await bus.open()
        assert kind.made[0].calls == []

    law(body)


def test_names_routes_and_needs_that_are_wrong_are_told_together() -> None:
    class Short(RecordingDriver):
        def check(self, destination: Destination[Any]) -> None:
            if len(destination.name) > 6:
                raise InvalidDestination(f"{destination.name}: the limit is 6")

    async def body() -> None:
        url, kind = recording(check=Short.check)
        bus = Bus({"backends": {"main": url}, "routes": {"a*": "main"}}, needs=Needs(dedup_s=1e9))
        bus.declare(Queue("a.much.longer", bytes), Queue("astray.too.long", bytes), Queue("elsewhere", bytes))
        with pytest.raises(InvalidDestination) as caught:
            await bus.open()
        assert "3 problems, nothing was sent" in str(caught.value)
        bus.declare(Queue("a", bytes))
        with pytest.raises(CapabilityError) as both:
            await bus.open()
        assert [item.destination for item in both.value.unmet] == ["a"]
        for text in ("a.much.longer: the limit is 6", "no route for destination 'elsewhere'", "dedup_s"):
            assert text in str(both.value)
        assert kind.made[0].calls == []

    law(body)


def test_needs_are_checked_again_with_what_the_live_server_has() -> None:
    async def body() -> None:
        live = False

        def claims(destination: Destination[Any]) -> Capabilities:
            return Capabilities(notes={"tag": "this server has no JetStream"}) if live else DURABLE

        class Narrowed(RecordingDriver):
            async def open(self) -> None:
                nonlocal live
                live = True
                await RecordingDriver.open(self)

        url, kind = recording(claims=claims, open=Narrowed.open)
        bus = Bus(url)
        bus.declare(QUEUE)
        with pytest.raises(CapabilityError, match="no JetStream"):
            await bus.open()
        assert kind.made[0].calls == ["open", "close"], "what was opened is closed again"

    law(body)


def test_a_publish_to_a_destination_never_declared_is_checked_too() -> None:
    async def body() -> None:
        url, kind = recording(claims=poor)
        async with Bus(url) as bus:
            with pytest.raises(CapabilityError, match="backlog"):
                await bus.publish(QUEUE, b"x")
            assert kind.made[0].calls == ["open"]

    law(body)


def test_declare_takes_destinations_only() -> None:
    with pytest.raises(UsageError, match="not str"):
        Bus("memory://").declare("work")  # type: ignore[arg-type]


# --- life


def test_the_constructor_does_no_io() -> None:
    url, kind = recording()
    Bus(url)
    assert kind.made[0].calls == []


def test_a_publish_opens_the_bus() -> None:
    async def body() -> None:
        url, kind = recording()
        bus = Bus(url)
        await bus.publish(QUEUE, b"x")
        assert kind.made[0].calls == ["open", "provision work", "open_sender work"]
        await bus.close()

    law(body)


def test_concurrent_first_publishes_open_the_bus_and_the_sender_once() -> None:
    async def body() -> None:
        url, kind = recording()
        bus = Bus(url)
        await asyncio.gather(*(bus.publish(QUEUE, b"x") for _ in range(20)))
        calls = kind.made[0].calls
        assert calls.count("open") == 1 and calls.count("open_sender work") == 1
        await bus.close()

    law(body)


def test_open_and_close_are_idempotent() -> None:
    async def body() -> None:
        url, kind = recording()
        bus = Bus(url)
        await bus.open()
        await bus.open()
        await bus.close()
        await bus.close()
        assert kind.made[0].calls == ["open", "close"]

    law(body)


def test_an_open_that_failed_can_be_tried_again() -> None:
    class FailsOnce(RecordingDriver):
        async def open(self) -> None:
            self.calls.append("open")
            if self.calls.count("open") == 1:
                raise ConnectError("nobody listens")

    async def body() -> None:
        url, _ = recording(open=FailsOnce.open)
        bus = Bus(url)
        with pytest.raises(ConnectError):
            await bus.open()
        await bus.publish(QUEUE, b"x")
        await bus.close()

    law(body)


@pytest.mark.parametrize("was_open", [True, False])
def test_a_closed_bus_refuses_everything_as_rejected(was_open: bool) -> None:
    async def body() -> None:
        bus = memory()
        if was_open:
            await bus.publish(QUEUE, b"x")
        await bus.close()
        with pytest.raises(Closed) as caught:
            await bus.publish(QUEUE, b"x")
        assert caught.value.outcome is Outcome.REJECTED
        with pytest.raises(Closed):
            await bus.open()
        with pytest.raises(Closed):
            async with bus.consume(QUEUE):
                pass
        with pytest.raises(Closed):
            async with bus.consuming():
                pass

    law(body)


def test_a_publisher_of_a_closed_bus_reports_closed() -> None:
    async def body() -> None:
        bus = memory()
        async with bus.publisher(QUEUE) as publisher:
            await bus.close()
            await publisher.send(b"x")
        assert [type(f.error) for f in publisher.failed] == [Closed]

    law(body)


def test_an_open_bus_refuses_another_loop() -> None:
    bus = memory()
    with asyncio.Runner() as home:
        home.run(bus.open())
        with pytest.raises(UsageError, match="another event loop"):
            in_another_loop(lambda: bus.publish(QUEUE, b"x"))
        with pytest.raises(UsageError, match="another event loop"):
            in_another_loop(bus.open)
        with pytest.raises(UsageError, match="another event loop"):
            in_another_loop(bus.close)
        home.run(bus.publish(QUEUE, b"x"))
        home.run(bus.close())


def in_another_loop(call: Callable[[], Any]) -> None:
    """Run `call` on a loop in a thread; raise here what it raised."""
    caught: list[BaseException] = []

    def main() -> None:
        async def body() -> None:
            await call()

        try:
            asyncio.run(body())
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=main)
    thread.start()
    thread.join(10)
    if caught:
        raise caught[0]


def test_lifespan_opens_and_closes() -> None:
    async def body() -> None:
        url, kind = recording()
        bus = Bus(url)
        async with bus.lifespan(object()):
            assert kind.made[0].calls == ["open"]
        assert kind.made[0].calls == ["open", "close"]

    law(body)


def test_run_handles_messages_until_a_signal_and_restores_the_signal_handlers() -> None:
    bus, before = memory(), signal.getsignal(signal.SIGTERM)

    @bus.on(QUEUE)
    async def take(value: bytes) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    async def publish_soon() -> None:
        await eventually(lambda: bus._consumers)
        await bus.publish(QUEUE, b"x")

    async def body() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(bus.serve(1.0))
            group.create_task(publish_soon())

    law(body)
    assert signal.getsignal(signal.SIGTERM) is before


# --- several backends


def test_each_destination_lives_on_the_backend_of_its_route() -> None:
    async def body() -> None:
        one_url, one = recording()
        two_url, two = recording()
        config = {"backends": {"one": one_url, "two": two_url}, "routes": {"a.*": "one", "*": "two"}}
        async with Bus(config) as bus:
            await bus.publish(Queue("a.x", bytes), b"")
            await bus.publish(Queue("b.x", bytes), b"")
        assert "open_sender a.x" in one.made[0].calls and "open_sender b.x" not in one.made[0].calls
        assert "open_sender b.x" in two.made[0].calls and "open_sender a.x" not in two.made[0].calls

    law(body)


def test_promises_tell_backend_adapter_and_server() -> None:
    async def body() -> None:
        bus = memory()
        bus.declare(QUEUE)
        async with bus:
            (promise,) = bus.promises()
            assert (promise.destination, promise.backend, promise.adapter) == (QUEUE, "main", "memory")
            assert promise.server.startswith("memory ") and promise.ok_means == "memory"

    law(body)


def test_an_unknown_backend_name_is_refused_naming_the_known() -> None:
    with pytest.raises(UsageError, match="'mian'; there are: main"):
        Bus("memory://").native("mian")


# --- handlers and what stops them


def test_what_stops_a_consumer_for_good_cancels_the_body_and_is_raised_by_consuming() -> None:
    class Broken(MemoryReceiver):
        async def receive_batch(self, max_deliveries: int) -> Any:
            await MemoryReceiver.receive_batch(self, max_deliveries)
            raise NotFound("the queue was deleted")

    async def body() -> None:
        url, _ = recording(receiver_class=Broken)
        bus = Bus(url)

        @bus.on(QUEUE)
        async def take(value: bytes) -> None: ...

        async with bus:
            with pytest.raises(NotFound, match="deleted"):
                async with bus.consuming():
                    await bus.publish(QUEUE, b"x")
                    await never()

    law(body)


@pytest.mark.parametrize("what", ["receive_batch", "settle_batch"])
def test_an_adapters_bug_surfaces_at_consuming(what: str) -> None:
    def bug(self: Any, *args: Any) -> Any:
        raise ZeroDivisionError(what)

    async def body() -> None:
        url, _ = recording(receiver_class=type("Buggy", (MemoryReceiver,), {what: bug}))
        bus = Bus(url)

        @bus.on(QUEUE)
        async def take(value: bytes) -> None: ...

        async with bus:
            with pytest.raises(ZeroDivisionError, match=what):
                async with bus.consuming():
                    await bus.publish(QUEUE, b"x")
                    await never()

    law(body)


def test_on_failure_stop_raises_at_consuming_and_the_message_waits_for_the_next_start() -> None:
    async def body() -> None:
        bus, fixed, seen = memory(), False, []

        @bus.on(QUEUE, on_failure="stop")
        async def take(value: bytes) -> None:
            if not fixed:
                raise Reject("a bug of ours")
            seen.append(value)

        async with bus:
            await bus.publish(QUEUE, b"x")
            with pytest.raises(MessagingError, match="on_failure = stop"):
                async with bus.consuming():
                    await never()
            fixed = True
            async with bus.consuming():
                await eventually(lambda: seen == [b"x"])

    law(body)


def test_a_cancelled_body_of_consuming_stays_cancelled() -> None:
    async def body() -> None:
        bus, inside = memory(), asyncio.Event()

        @bus.on(QUEUE)
        async def take(value: bytes) -> None: ...

        async def consume() -> None:
            async with bus.consuming():
                inside.set()
                await never()

        async with bus:
            task = asyncio.create_task(consume())
            await inside.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    law(body)


def test_an_exception_of_the_body_leaves_consuming_unchanged() -> None:
    async def body() -> None:
        async with memory() as bus:
            with pytest.raises(KeyError, match="mine"):
                async with bus.consuming():
                    raise KeyError("mine")

    law(body)


def test_consuming_listens_when_it_is_entered() -> None:
    async def body() -> None:
        bus, heard = memory(), []
        pulse = Signal("pulse", bytes)

        @bus.on(pulse)
        async def listen(value: bytes) -> None:
            heard.append(value)

        async with bus, bus.consuming():
            await bus.publish(pulse, b"now")  # a signal waits for nobody
            await eventually(lambda: heard == [b"now"])

    law(body)


def test_a_handler_that_cannot_start_stops_those_that_have() -> None:
    class Refusing(RecordingDriver):
        async def open_receiver(self, destination: Any, *args: Any) -> MemoryReceiver:
            if destination.name == "second":
                raise NotFound("deleted meanwhile")
            return await RecordingDriver.open_receiver(self, destination, *args)

    async def body() -> None:
        url, _ = recording(open_receiver=Refusing.open_receiver)
        bus = Bus(url)
        for name in ("first", "second"):

            @bus.on(Queue(name, bytes))
            async def take(value: bytes) -> None: ...

        async with bus:
            with pytest.raises(NotFound):
                async with bus.consuming():
                    raise AssertionError("must not be entered")
            assert bus.idle and not bus._consumers

    law(body)


def test_stats_add_up_all_consumers_of_a_destination() -> None:
    async def body() -> None:
        topic = Topic("t", bytes, groups=["a", "b"])
        bus = memory()
        for group in topic.groups:

            @bus.on(topic, group=group)
            async def take(value: bytes) -> None: ...

        async with bus, bus.consuming():
            await bus.publish(topic, b"x")
            await eventually(lambda: bus.stats(topic).settled == 2)
            assert bus.stats(topic, "a").settled == 1

    law(body)


# --- bounded, whatever the driver does


@pytest.mark.parametrize("method", ["open", "provision", "open_receiver"])
def test_a_driver_that_hangs_ends_in_a_connect_error_within_the_deadline(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("messaging_sdk.bus.OPEN_S", 0.05)

    async def hang(self: Any, *args: Any) -> Any:
        await never()

    async def body() -> None:
        url, _ = recording(**{method: hang})
        bus = Bus(url, timeout_s=0.05)
        bus.declare(QUEUE)
        with pytest.raises(ConnectError, match=r"within 0\.05 s: the broker does not answer"):
            async with bus, bus.consume(QUEUE):
                pass
        await bus.close()

    law(body)


def test_a_publish_whose_sender_never_opens_is_rejected_at_its_deadline() -> None:
    async def hang(self: Any, *args: Any) -> Any:
        await never()

    async def body() -> None:
        url, _ = recording(open_sender=hang)
        async with Bus(url) as bus:
            with pytest.raises(MessagingError) as caught:
                await bus.publish(QUEUE, b"x", timeout_s=0.05)
            assert caught.value.outcome is Outcome.REJECTED

    law(body)


@pytest.mark.parametrize("part", ["driver", "sender", "receiver", "stop"])
def test_close_is_bounded_whatever_part_of_the_adapter_hangs(part: str) -> None:
    async def hang(self: Any, *args: Any) -> Any:
        await never()

    changes: dict[str, Any] = {
        "driver": {"close": hang},
        "sender": {"sender_class": type("S", (MemorySender,), {"close": hang})},
        "receiver": {"receiver_class": type("R", (MemoryReceiver,), {"close": hang})},
        "stop": {"receiver_class": type("R", (MemoryReceiver,), {"stop": hang})},
    }

    async def body() -> None:
        url, _ = recording(**changes[part])
        bus = Bus(url)
        await bus.publish(QUEUE, b"x")
        async with bus.consume(QUEUE) as stream:
            assert await stream.next(5) is not None
            async with asyncio.timeout(1.5):
                await bus.close(0.3)

    law(body)


def test_close_resolves_sends_that_nobody_answers() -> None:
    class Silent(MemorySender):
        def send_batch(self, messages: Any, on_outcomes: Any) -> None:
            pass

    async def body() -> None:
        url, _ = recording(sender_class=Silent)
        bus = Bus(url)
        await bus.open()
        sending = asyncio.create_task(bus.publish(QUEUE, b"x"))
        await turns(50)
        async with asyncio.timeout(3):
            await bus.close(0.2)
        with pytest.raises(Closed) as caught:
            await sending
        assert caught.value.outcome is Outcome.INDETERMINATE

    law(body)


def test_close_is_quiet_about_a_driver_that_raises() -> None:
    async def broken(self: Any) -> None:
        raise OSError("already gone")

    async def body() -> None:
        url, _ = recording(close=broken)
        bus = Bus(url)
        await bus.open()
        await bus.close()

    law(body)


def test_close_while_a_handler_hangs_hands_its_message_back() -> None:
    async def body() -> None:
        name, entered = fresh(), asyncio.Event()
        bus = Bus(f"memory://{name}")

        @bus.on(QUEUE)
        async def take(value: bytes) -> None:
            entered.set()
            await never()

        await bus.publish(QUEUE, b"x", id="m1")
        with pytest.raises(asyncio.CancelledError):
            async with asyncio.timeout(5), bus.consuming(grace_s=0.05):
                await entered.wait()
                raise asyncio.CancelledError
        async with Bus(f"memory://{name}") as second, second.consume(QUEUE) as stream:
            found = await stream.next(5)
            assert found is not None and found.id == "m1"
            await found.ack()
        await bus.close(0.5)

    law(body)


# --- fork


def in_child(body: Callable[[], None]) -> None:
    """Run `body` in a forked child; AssertionError with its traceback if it raised or hung."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        try:
            body()
            os.write(writing, b"ok")
        except BaseException:
            os.write(writing, traceback.format_exc().encode()[-3000:])
        os._exit(0)
    os.close(writing)
    told = b""
    while part := os.read(reading, 4096):
        told += part
    os.close(reading)
    os.waitpid(child, 0)
    assert told == b"ok", told.decode() or "the child died"


def test_an_unopened_bus_opens_in_the_child_of_a_fork() -> None:
    bus = memory()
    in_child(lambda: publish_and_consume(bus))
    publish_and_consume(bus)


def publish_and_consume(bus: Bus) -> None:
    async def body() -> None:
        async with bus, bus.consume(QUEUE) as stream:
            sent = await bus.publish(QUEUE, b"x")
            found = await stream.next(5)
            assert found is not None and found.id == sent.id
            await found.ack()

    drive(body())


def test_an_opened_bus_starts_anew_in_the_child_and_touches_nothing_of_the_parent() -> None:
    url, kind = recording()
    bus = Bus(url)
    with asyncio.Runner() as home:
        first = home.run(bus.publish(QUEUE, b"parent"))
        (parents,) = kind.made
        calls = list(parents.calls)

        def child() -> None:
            parents.lose = lambda: pytest.fail("the child touched the parent's connection")  # type: ignore[method-assign]
            sent = asyncio.run(bus.publish(QUEUE, b"child"))
            assert len(kind.made) == 2 and kind.made[1].calls[0] == "open"
            assert parents.calls == calls
            assert sent.id.partition("-")[0] != first.id.partition("-")[0], "ids must not repeat the parent's"

        in_child(child)
        home.run(bus.publish(QUEUE, b"parent again"))
        home.run(bus.close())


def test_a_bus_that_is_just_opening_opens_anew_in_the_child() -> None:
    parent = os.getpid()

    class Slow(RecordingDriver):
        async def open(self) -> None:
            if os.getpid() == parent:
                await never()
            await RecordingDriver.open(self)

    bus = Bus(recording(open=Slow.open)[0])
    with asyncio.Runner() as home:

        async def begin() -> asyncio.Task[Any]:
            task = asyncio.create_task(bus.publish(QUEUE, b"x"))
            await turns()
            return task

        task = home.run(begin())
        in_child(lambda: asyncio.run(asyncio.wait_for(bus.publish(QUEUE, b"child"), 5)) and None)
        task.cancel()


def test_a_consumer_of_the_parent_raises_in_the_child() -> None:
    bus = memory()
    with asyncio.Runner() as home:
        home.run(bus.open())
        stream = bus.consume(QUEUE)
        home.run(stream.__aenter__())

        def child() -> None:
            with pytest.raises(UsageError, match="belongs to the parent"):
                asyncio.run(asyncio.wait_for(stream.__anext__(), 5))

        in_child(child)
        home.run(bus.close())


def test_a_publisher_of_the_parent_raises_in_the_child_and_sends_nothing() -> None:
    url, kind = recording()
    bus = Bus(url)
    with asyncio.Runner() as home:
        publisher = bus.publisher(QUEUE)
        home.run(publisher.__aenter__())
        home.run(publisher.send(b"parent"))

        def child() -> None:
            (sender,) = kind.made[0].senders
            sender.send_batch = lambda *_: pytest.fail("the parent's connection was used")  # type: ignore[method-assign]
            with pytest.raises(UsageError, match="belongs to"):
                asyncio.run(publisher.send(b"child"))

        in_child(child)
        home.run(publisher.send(b"parent again"))
        home.run(bus.close())
