"""Laws of the face without await: same names, any thread, and a process of its own after a fork."""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from _drive import fresh
from _scripted import RecordingDriver, recording
from test_bus import in_child

from messaging_sdk import (
    AlreadySettled,
    CapabilityError,
    Closed,
    ConfigError,
    ConnectError,
    InvalidMessage,
    Queue,
    Reject,
    Retry,
    Signal,
    Topic,
    UsageError,
)
from messaging_sdk import Bus as AsyncBus
from messaging_sdk import Delivery as AsyncDelivery
from messaging_sdk import Publisher as AsyncPublisher
from messaging_sdk import Replay as AsyncReplay
from messaging_sdk import Stream as AsyncStream
from messaging_sdk.memory import MemorySender
from messaging_sdk.model import rejected
from messaging_sdk.sync import Bus, Delivery, Publisher, Replay, Stream

QUEUE = Queue("work", bytes)
NEWS = Topic("news", bytes, groups=("g",))


def memory(**options: Any) -> Bus:
    return Bus(f"memory://{fresh()}", **options)


# --- the same names


def public(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


NOT_HERE = {
    # asynchronous by nature: an ASGI lifespan, a coroutine to be awaited, the loop-bound client object
    AsyncBus: {"lifespan", "serve", "native"},
    AsyncPublisher: {"accepted"},  # the batcher's call, not the user's
    AsyncStream: set(),
    AsyncReplay: {"close", "disown"},  # the bus calls them
    AsyncDelivery: {"meta", "settler", "session", "receipt", "native"},
}


@pytest.mark.parametrize(
    ("asynchronous", "synchronous"),
    [
        (AsyncBus, Bus),
        (AsyncPublisher, Publisher),
        (AsyncStream, Stream),
        (AsyncReplay, Replay),
        (AsyncDelivery, Delivery),
    ],
)
def test_every_public_name_of_the_async_class_is_here_too(asynchronous: type, synchronous: type) -> None:
    with memory() as bus:
        bus.publish(QUEUE, b"x")
        with bus.consume(QUEUE) as stream, bus.publisher(QUEUE) as publisher, bus.replay(NEWS) as replay:
            delivery = stream.next(5)
            have = {Bus: bus, Publisher: publisher, Stream: stream, Replay: replay, Delivery: delivery}[synchronous]
            wanted = public(asynchronous) - NOT_HERE[asynchronous]
            assert sorted(name for name in wanted if not hasattr(have, name)) == []


@pytest.mark.parametrize(
    "name",
    ["publish", "publisher", "consume", "replay", "lag", "close", "run", "consuming", "declare", "include", "on",
     "__init__"],
)  # fmt: skip
def test_calls_take_the_same_arguments(name: str) -> None:
    def parameters(kind: type) -> list[tuple[str, Any]]:
        return [(p.name, p.default) for p in inspect.signature(getattr(kind, name)).parameters.values()]

    assert parameters(Bus) == parameters(AsyncBus)


# --- publish and consume


def test_a_message_goes_round_without_a_loop() -> None:
    with memory() as bus, bus.consume(QUEUE) as stream:
        sent = bus.publish(QUEUE, b"x", headers={"a": "1"}, correlation_id="c-1")
        found = stream.next(5)
        assert found is not None
        assert (found.id, found.data, found.headers, found.correlation_id) == (sent.id, b"x", {"a": "1"}, "c-1")
        found.ack()


def test_history_is_read_again_without_a_loop() -> None:
    with memory() as bus:
        for body in (b"1", b"2", b"3"):
            bus.publish(NEWS, body)
        with bus.replay(NEWS) as history:
            assert next(history).data == b"1"
            position = history.position
        with bus.replay(NEWS, since=position) as history:
            assert [message.data for message in history] == [b"2", b"3"]


def test_the_lag_is_told_without_a_loop() -> None:
    bus = memory()
    assert bus.lag(QUEUE) == 0
    bus.publish(QUEUE, b"x")
    assert (bus.lag(QUEUE), bus.lag(NEWS, "g")) == (1, 0)
    bus.close()


def test_publish_opens_the_bus() -> None:
    bus = memory()
    assert bus.publish(QUEUE, b"x").id
    bus.close()


def test_errors_are_the_async_ones() -> None:
    with memory() as bus:
        with pytest.raises(InvalidMessage):
            bus.publish(QUEUE, "text")  # type: ignore[arg-type]
        with pytest.raises(UsageError):
            bus.consume(Topic("t", bytes, groups=["g"]))
        bus.publish(QUEUE, b"x")


def test_unmet_needs_come_at_open_and_the_thread_can_still_end() -> None:
    bus = Bus(f"memory://{fresh()}?backlog=false")
    bus.declare(QUEUE)
    with pytest.raises(CapabilityError, match="backlog"):
        bus.open()
    bus.close()


def test_a_wrong_configuration_is_refused_by_the_constructor() -> None:
    with pytest.raises(ConfigError):
        Bus("memory")


def test_a_broker_that_never_answers_is_a_connect_error_within_the_deadline() -> None:
    class Silent(RecordingDriver):
        async def open(self) -> None:
            await asyncio.Event().wait()

    url, _ = recording(open=Silent.open)
    bus = Bus(url, timeout_s=0.05)
    with pytest.raises(ConnectError):
        bus.open()
    bus.close()


def test_a_stream_can_be_iterated() -> None:
    with memory() as bus, bus.consume(QUEUE) as stream:
        for n in range(3):
            bus.publish(QUEUE, b"%d" % n)
        got = []
        for delivery in stream:
            got.append(delivery.data)
            delivery.ack()
            if len(got) == 3:
                break
        assert got == [b"0", b"1", b"2"]


def test_the_verbs_of_a_delivery_block_and_raise() -> None:
    with memory() as bus, bus.consume(QUEUE) as stream:
        bus.publish(QUEUE, b"x")
        first = stream.next(5)
        assert first is not None
        first.retry(0.01)
        second = stream.next(5)
        assert second is not None and second.attempt == 2
        second.release()
        third = stream.next(5)
        assert third is not None and third.deliveries == 2
        third.reject("tin")
        with bus.consume(QUEUE.dead_letters()) as graves:
            grave = graves.next(5)
            assert grave is not None and grave.provenance["error"] == "tin"
            grave.ack()
            with pytest.raises(AlreadySettled):
                grave.ack()


def test_a_signal_yields_messages_without_verbs() -> None:
    pulse = Signal("pulse", bytes)
    with memory() as bus, bus.consume(pulse) as stream:
        bus.publish(pulse, b"x")
        found = stream.next(5)
        assert found is not None and found.data == b"x" and not hasattr(found, "ack")


def test_next_returns_none_when_nothing_comes() -> None:
    with memory() as bus, bus.consume(QUEUE) as stream:
        assert stream.next(0.02) is None


# --- threads


def test_one_bus_publishes_from_many_threads() -> None:
    with memory() as bus, bus.consume(QUEUE) as stream, ThreadPoolExecutor(4) as pool:
        sent = {s.id for s in pool.map(lambda n: bus.publish(QUEUE, b"%d" % n), range(40))}
        got: set[str] = set()
        while len(got) < 40:
            deliveries = stream.take(40, 5)
            assert deliveries, "messages are missing"
            for delivery in deliveries:
                got.add(delivery.id)
                delivery.ack()
        assert got == sent


def test_threads_that_use_the_bus_first_at_once_share_one_loop_thread() -> None:
    for _ in range(10):
        bus, start = memory(), threading.Barrier(6)

        def first(bus: Bus, start: threading.Barrier) -> str:
            start.wait(5)
            return bus.publish(QUEUE, b"x").id

        before = set(threading.enumerate())
        with ThreadPoolExecutor(6) as pool:
            assert len({f.result(10) for f in [pool.submit(first, bus, start) for _ in range(6)]}) == 6
            ours = [t for t in set(threading.enumerate()) - before if t.name == "messaging-bus"]
        assert len(ours) == 1
        bus.close()


def test_a_publisher_is_shared_by_four_threads_and_each_keeps_its_order() -> None:
    with memory() as bus, bus.consume(QUEUE) as stream:
        with bus.publisher(QUEUE, window=50) as publisher:

            def send(thread: int) -> None:
                for n in range(200):
                    publisher.send(b"%d:%d" % (thread, n))

            threads = [threading.Thread(target=send, args=(t,)) for t in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(20)
        assert (publisher.sent, publisher.failed) == (800, [])
        got: dict[str, list[int]] = {str(t): [] for t in range(4)}
        while sum(map(len, got.values())) < 800:
            deliveries = stream.take(500, 5)
            assert deliveries, "messages are missing"
            for delivery in deliveries:
                thread_name, _, number = delivery.data.decode().partition(":")
                got[thread_name].append(int(number))
                delivery.ack()
        assert got == {str(t): list(range(200)) for t in range(4)}


def test_a_publisher_lists_failures() -> None:
    class Refusing(MemorySender):
        def send_batch(self, messages: Any, on_outcomes: Any) -> None:
            on_outcomes([(i, rejected(InvalidMessage("no"))) for i in range(len(messages))])

    url, _ = recording(sender_class=Refusing)
    with Bus(url) as bus:
        with bus.publisher(QUEUE) as publisher:
            id = publisher.send(b"x")
        assert [(f.id, f.error.outcome) for f in publisher.failed] == [(id, "rejected")]


def test_a_publisher_is_used_inside_its_block_only() -> None:
    with memory() as bus, pytest.raises(UsageError, match="with"):
        bus.publisher(QUEUE).send(b"x")


def test_the_thread_of_a_closed_bus_has_ended() -> None:
    before = set(threading.enumerate())
    bus = memory()
    bus.publish(QUEUE, b"x")
    (thread,) = set(threading.enumerate()) - before
    bus.close()
    thread.join(5)
    assert not thread.is_alive()


@pytest.mark.parametrize("was_open", [True, False])
def test_a_closed_bus_refuses(was_open: bool) -> None:
    bus = memory()
    if was_open:
        bus.publish(QUEUE, b"x")
    bus.close()
    bus.close()
    with pytest.raises(Closed):
        bus.publish(QUEUE, b"x")


def test_a_refusing_closed_bus_leaves_no_thread_behind() -> None:
    bus = memory()
    bus.publish(QUEUE, b"x")
    bus.close()
    before = set(threading.enumerate())
    with pytest.raises(Closed):
        bus.publish(QUEUE, b"x")
    bus.close()
    assert set(threading.enumerate()) <= before


# --- handlers


def test_plain_handlers_run_while_the_block_runs() -> None:
    bus, done, names = memory(), threading.Event(), []

    @bus.on(QUEUE, retry=Retry(3, "1ms"))
    def take(value: bytes, delivery: AsyncDelivery[bytes]) -> None:
        names.append(threading.current_thread().name)
        if delivery.attempt < 2:
            raise ConnectionError("down")
        done.set()

    with bus, bus.consuming():
        bus.publish(QUEUE, b"x")
        assert done.wait(5)
    assert all(name.startswith("messaging-handler") for name in names)


def test_a_handler_may_publish_on_the_same_bus_and_its_correlation_id_flows() -> None:
    bus, child = memory(), Queue("child", bytes)

    @bus.on(QUEUE)
    def take(value: bytes) -> None:
        bus.publish(child, value)
        with bus.publisher(child) as publisher:
            publisher.send(value)

    with bus, bus.consuming(), bus.consume(child) as stream:
        bus.publish(QUEUE, b"x", correlation_id="c-1")
        for _ in range(2):
            found = stream.next(5)
            assert found is not None and found.correlation_id == "c-1"
            found.ack()


def test_what_stops_a_consumer_for_good_is_raised_when_the_block_ends() -> None:
    bus, tried = memory(), threading.Event()

    @bus.on(QUEUE, on_failure="stop")
    def take(value: bytes) -> None:
        tried.set()
        raise Reject("never")

    with bus, pytest.raises(Exception, match="on_failure = stop"), bus.consuming():
        bus.publish(QUEUE, b"x")
        assert tried.wait(5)


def test_an_async_handler_is_told_not_to_use_the_sync_bus_on_the_loop() -> None:
    bus, caught = memory(), []
    done = threading.Event()

    @bus.on(QUEUE)
    async def take(value: bytes) -> None:
        try:
            bus.publish(QUEUE, value)
        except UsageError as error:
            caught.append(str(error))
        done.set()

    with bus, bus.consuming():
        bus.publish(QUEUE, b"x")
        assert done.wait(5)
    assert "own loop thread" in caught[0]


# --- fork


def publish_and_consume(bus: Bus) -> None:
    with bus.consume(QUEUE) as stream:
        sent = bus.publish(QUEUE, b"child %d" % os.getpid())
        while (found := stream.next(5)) is not None:
            found.ack()
            if found.id == sent.id:
                return
    raise AssertionError("the message did not arrive")


@pytest.mark.parametrize("was_open", [False, True])
def test_a_bus_works_in_the_child_of_a_fork_whether_it_was_open_or_not(was_open: bool) -> None:
    bus = memory()
    if was_open:
        bus.publish(QUEUE, b"parent")
    in_child(lambda: publish_and_consume(bus))
    publish_and_consume(bus)
    bus.close()


def test_a_child_forked_while_other_threads_publish_works_too() -> None:
    bus, stop = memory(), threading.Event()

    def publish() -> None:
        while not stop.is_set():
            bus.publish(QUEUE, b"busy")

    threads = [threading.Thread(target=publish) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(5):
            in_child(lambda: bus.publish(QUEUE, b"child") and None)
    finally:
        stop.set()
        for thread in threads:
            thread.join(10)
    bus.close()


def test_a_publisher_of_the_parent_raises_in_the_child() -> None:
    with memory() as bus, bus.publisher(QUEUE, timeout_s=1) as publisher:
        publisher.send(b"x")

        def child() -> None:
            with pytest.raises(UsageError, match="parent"):
                publisher.send(b"y")

        in_child(child)
