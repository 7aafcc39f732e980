"""Laws of ZeroMQ's links, for which no broker is needed: listed endpoints, strangers, garbage, freezing, lost acks."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq
from _drive import drive, fresh

from messaging_sdk import (
    Backpressure,
    Bus,
    CapabilityError,
    ConfigError,
    ConnectError,
    DeadlineExceeded,
    MessagingError,
    Outcome,
    Queue,
    Signal,
    Topic,
)
from messaging_sdk.model import Outgoing
from messaging_sdk_zeromq.driver import Wire
from messaging_sdk_zeromq.sender import FRAME_BYTES, Batch, Run, cut, weight

HEAD = struct.Struct("<cBII")


def free_endpoint() -> str:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return f"tcp://127.0.0.1:{found.getsockname()[1]}"


def config(url: str, destinations: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    return {
        "backends": {"main": {"url": url, **options}, "graves": {"url": "memory://graves"}},
        "routes": {"*": "main", "*.dead": "graves"},
        "destinations": {name: {"zeromq": block} for name, block in (destinations or {}).items()},
    }


def announced(tmp_path: Path, queue: Queue[bytes]) -> tuple[str, bytes]:
    """Where the one consumer of `queue` listens, and what a sender has to call the place."""
    file = next((tmp_path / "meet" / f"queue.{queue.name}").glob("*.at"))
    endpoint: str = json.loads(file.read_text())["endpoint"]
    return endpoint, file.parent.name.encode()


@asynccontextmanager
async def buses(count: int, configuration: dict[str, Any], *declared: Any) -> AsyncIterator[list[Bus]]:
    made = [Bus(configuration) for _ in range(count)]
    for bus in made:
        bus.declare(*declared)
        await bus.open()
    try:
        yield made
    finally:
        for bus in made:
            await bus.close(1.0)


def test_workers_of_a_queue_bind_the_listed_endpoints_and_share() -> None:
    async def main() -> None:
        queue = Queue(fresh(), bytes)
        ends = [free_endpoint(), free_endpoint()]
        table = config("zeromq://", {queue.name: {"consumers": ends}})
        async with (
            buses(4, table, queue) as (sender, one, two, three),
            one.consume(queue, window=5) as a,
            two.consume(queue, window=5) as b,
        ):
            with pytest.raises(ConnectError, match="another process listens there") as caught:
                async with three.consume(queue):
                    pass
            assert caught.value.__cause__ is not None
            sends = [asyncio.ensure_future(sender.publish(queue, b"%d" % n)) for n in range(10)]
            taken = [await stream.next(5) for stream in (a, b) for _ in range(5)]
            assert sorted(d.body for d in taken if d) == [b"%d" % n for n in range(10)]
            assert not any(s.done() for s in sends), "ok before it is settled"
            for delivery in taken:
                assert delivery is not None
                await delivery.ack()
            await asyncio.gather(*sends)

    drive(main(), 40)


def test_a_topic_and_a_signal_have_listed_endpoints_too() -> None:
    async def main() -> None:
        topic, pulse = Topic(fresh(), bytes, groups=["g1", "g2"]), Signal(fresh("s"), bytes)
        table = config(
            "zeromq://",
            {
                topic.name: {"groups": {"g1": [free_endpoint()], "g2": [free_endpoint()]}},
                pulse.name: {"consumers": [free_endpoint()]},
            },
        )
        async with (
            buses(2, table, topic, pulse) as (sender, reader),
            reader.consume(topic, group="g1") as g1,
            reader.consume(topic, group="g2") as g2,
            reader.consume(pulse) as heard,
        ):
            sending = asyncio.ensure_future(sender.publish(topic, b"news"))
            for stream in (g1, g2):
                delivery = await stream.next(5)
                assert delivery is not None and not sending.done()
                await delivery.ack()
            await sending
            while (message := await heard.next(0.05)) is None:  # without announcements nobody knows when it is heard
                await sender.publish(pulse, b"beat")
            assert message.body == b"beat"

    drive(main(), 40)


@pytest.mark.parametrize(
    ("url", "block", "missing"),
    [
        ("zeromq://", {}, "consumers"),
        ("zeromq://", {"consumers": ["tcp://h:1", "tcp://h:2"]}, "one endpoint only"),
    ],
)
def test_what_the_addresses_do_not_allow_is_refused_with_the_remedy(
    url: str, block: dict[str, Any], missing: str
) -> None:
    queue = Queue(fresh(), bytes, key=lambda b: "k", ordered=True)
    bus = Bus(config(url, {queue.name: block} if block else None))
    bus.declare(queue)
    with pytest.raises(CapabilityError, match=missing):
        drive(bus.open())


async def _ignore(value: bytes) -> None:
    """A handler that is never run."""


def test_dead_letters_need_a_backend_that_stores(tmp_path: Path) -> None:
    queue = Queue(fresh(), bytes)
    bus = Bus(f"zeromq://{tmp_path}")
    bus.on(queue)(_ignore)
    with pytest.raises(CapabilityError, match=r"\*\.dead"):
        drive(bus.open())


def test_a_group_without_endpoints_is_a_config_error() -> None:
    topic = Topic(fresh(), bytes, groups=["g1", "g2"])
    bus = Bus(config("zeromq://", {topic.name: {"groups": {"g1": [free_endpoint()]}}}))
    bus.declare(topic)
    with pytest.raises(ConfigError, match="g2"):
        drive(bus.open())


def keys() -> tuple[str, str]:
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


@pytest.mark.parametrize("who", ["a stranger", "in clear", "a wrong consumer"])
def test_a_key_that_is_not_known_gets_nothing_in_and_nothing_out(tmp_path: Path, who: str) -> None:
    (public, secret), (other, other_secret) = keys(), keys()
    url = f"zeromq://127.0.0.1{tmp_path}/meet"
    honest = {"curve_public": public, "curve_secret": secret, "curve_consumer": public, "curve_senders": [public]}
    foreign: dict[str, dict[str, Any]] = {
        "a stranger": {"curve_public": other, "curve_secret": other_secret, "curve_consumer": public},
        "in clear": {},
        "a wrong consumer": {**honest, "curve_consumer": other},
    }

    async def main() -> None:
        queue = Queue(fresh(), bytes)
        async with (
            buses(2, config(url, **honest), queue) as (reader, friend),
            buses(1, config(url, **foreign[who]), queue) as (stranger,),
            reader.consume(queue) as stream,
        ):
            with pytest.raises(DeadlineExceeded) as caught:
                await stranger.publish(queue, b"foreign", timeout_s=1.5)
            assert caught.value.outcome is Outcome.REJECTED
            sending = asyncio.ensure_future(friend.publish(queue, b"ours"))
            delivery = await stream.next(5)
            assert delivery is not None and delivery.body == b"ours"
            await delivery.ack()
            await sending

    drive(main(), 40)


@pytest.mark.parametrize("half", ["curve_consumer", "curve_senders"])
def test_with_half_of_curve_nothing_is_done_in_clear(tmp_path: Path, half: str) -> None:
    public, secret = keys()
    table = {"curve_public": public, "curve_secret": secret, half: public if half == "curve_consumer" else [public]}

    async def main() -> None:
        queue = Queue(fresh(), bytes)
        async with buses(1, config(f"zeromq://{tmp_path}/meet", **table), queue) as (bus,):
            with pytest.raises(ConfigError, match="with CURVE"):
                if half == "curve_consumer":
                    async with bus.consume(queue):
                        pass
                else:
                    await bus.publish(queue, b"x", timeout_s=2)

    drive(main(), 20)


def test_secrets_are_in_no_repr(tmp_path: Path) -> None:
    public, secret = keys()
    bus = Bus(config(f"zeromq://{tmp_path}", curve_public=public, curve_secret=secret, curve_senders=[public]))
    assert secret not in repr(bus) + repr(bus.settings) + repr(vars(bus)["_drivers"]["main"].options)


def test_garbage_reaches_nobody_and_harms_nobody(tmp_path: Path) -> None:
    """Frames cut short, of another version, another session or another destination."""

    async def main() -> None:
        queue = Queue(fresh(), bytes)
        async with (
            buses(2, config(f"zeromq://127.0.0.1{tmp_path}/meet"), queue) as (sender, reader),
            reader.consume(queue) as stream,
        ):
            endpoint, place_name = announced(tmp_path, queue)
            context: zmq.Context[Any] = zmq.Context()
            foreign = context.socket(zmq.DEALER)
            foreign.connect(endpoint)
            good = struct.pack("<I", 1), struct.pack("<I", 3), b"abc", b"id", struct.pack("<d", 0), b"{}"
            for parts in (
                [b""], [b"B"], [b"\xff" * 300], [HEAD.pack(b"H", 1, 1, 0)], [HEAD.pack(b"H", 9, 1, 0), b"x", b"y"],
                [HEAD.pack(b"H", 1, 1, 0), b"sender", b"queue.another"], [HEAD.pack(b"B", 1, 5, 1), *good],
                [HEAD.pack(b"H", 1, 1, 0), b"sender", place_name],
                *[[HEAD.pack(b"B", 1, 1, n), *good[:n]] for n in range(6)],
                [HEAD.pack(b"B", 1, 1, 9), *good[:1], struct.pack("<I", 9), *good[2:]],
                [HEAD.pack(b"B", 1, 1, 9), *good[:5], b"[]"], [HEAD.pack(b"B", 1, 1, 9), *good[:5], b'{"k": 7}'],
            ):  # fmt: skip
                foreign.send_multipart(parts)
            sending = asyncio.ensure_future(sender.publish(queue, b"ours"))
            delivery = await stream.next(5)
            assert delivery is not None and delivery.body == b"ours", "garbage was delivered"
            await delivery.ack()
            await sending
            assert await stream.next(0.2) is None
            answers = set()
            while foreign.poll(200):
                answers.add(foreign.recv_multipart()[0][:1])
            assert answers >= {b"N", b"?", b"W"}
            foreign.close(0)
            context.term()

    drive(main(), 40)


def test_a_settlement_that_was_lost_with_its_link_runs_no_handler_again(tmp_path: Path) -> None:
    """A sender that hears no A sends again at attempt 2; who has settled it says A again."""

    async def main() -> None:
        queue = Queue(fresh(), bytes)
        async with (
            buses(1, config(f"zeromq://127.0.0.1{tmp_path}/meet"), queue) as (reader,),
            reader.consume(queue) as stream,
        ):
            endpoint, place_name = announced(tmp_path, queue)
            context: zmq.Context[Any] = zmq.Context()
            for session, attempt in ((1, 1), (2, 2)):
                foreign = context.socket(zmq.DEALER)
                foreign.connect(endpoint)
                foreign.send_multipart([HEAD.pack(b"H", 1, session, 0), b"sender-1", place_name])
                rest = struct.pack("<I", 3), b"abc", b"id-1", struct.pack("<d", 1.5), b"{}"
                foreign.send_multipart([HEAD.pack(b"B", 1, session, 7), struct.pack("<I", attempt), *rest])
                if attempt == 1:
                    delivery = await stream.next(5)
                    assert delivery is not None and delivery.deliveries == 1
                    await delivery.ack()
                else:
                    assert await stream.next(0.3) is None, "it ran again"
                said = []
                while not said or said[-1][0][:1] != b"A":
                    assert await asyncio.to_thread(foreign.poll, 5000), "no settlement"
                    said.append(foreign.recv_multipart())
                assert struct.unpack("<3I", said[-1][1]) == (7, 1, 0)
                foreign.close(0)
            context.term()

    drive(main(), 40)


WORKER = """
import asyncio, sys
from messaging_sdk import Bus, Queue
async def main():
    bus = Bus(sys.argv[1])
    async with bus, bus.consume(Queue(sys.argv[2], bytes), window=5, on_failure="drop") as stream:
        print("ready", flush=True)
        async for d in stream:
            print("got", flush=True)
            await asyncio.sleep(60)
asyncio.run(main())
"""


@asynccontextmanager
async def foreign_sender(tmp_path: Path, queue: Queue[bytes], session: int = 1) -> AsyncIterator[Any]:
    """A DEALER that has greeted the one consumer of `queue`; of another sender id each time."""
    endpoint, place_name = announced(tmp_path, queue)
    context: zmq.Context[Any] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    try:
        dealer.connect(endpoint)
        dealer.send_multipart([HEAD.pack(b"H", 1, session, 0), os.urandom(8), place_name])
        yield dealer
    finally:
        dealer.close(0)
        context.term()


def frame_of(
    frame: int,
    ids: Sequence[str] = ("id-1",),
    *,
    body: bytes = b"x",
    rest: bytes = b"{}",
    attempt: int = 1,
    created_s: float = 1.5,
) -> list[bytes]:
    """A frame of session 1 with a message of this body for each id."""
    count = len(ids)
    lengths, created = struct.pack(f"<{count}I", *[len(body)] * count), struct.pack(f"<{count}d", *[created_s] * count)
    block = [lengths, body * count, "\n".join(ids).encode(), created, rest]
    return [HEAD.pack(b"B", 1, 1, frame), struct.pack("<I", attempt), *block]


@asynccontextmanager
async def foreign_consumer(queue: Queue[bytes]) -> AsyncIterator[tuple[Any, Bus]]:
    """A ROUTER that is no receiver of ours, and a bus that has it as the one consumer of `queue`."""
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    try:
        endpoint = f"tcp://127.0.0.1:{router.bind_to_random_port('tcp://127.0.0.1')}"
        async with buses(1, config("zeromq://", {queue.name: {"consumers": [endpoint]}}), queue) as (sender,):
            yield router, sender
    finally:
        router.close(0)
        context.term()


def welcome(router: Any, identity: bytes, hello: bytes, limit: int) -> int:
    """Give a sender that said `hello` its credit; return the session."""
    session: int = HEAD.unpack(hello)[2]
    router.send_multipart([identity, HEAD.pack(b"W", 1, session, limit)])
    return session


@pytest.mark.parametrize("created_s", [2.5, 0.0])
def test_an_id_that_is_published_again_is_another_message(tmp_path: Path, created_s: float) -> None:
    """Settled once under this id; the second one comes at attempt 2, since its first delivery was given back."""

    async def main() -> None:
        queue = Queue(fresh(), bytes)
        async with (
            buses(1, config(f"zeromq://127.0.0.1{tmp_path}/meet"), queue) as (reader,),
            reader.consume(queue) as stream,
            foreign_sender(tmp_path, queue) as dealer,
        ):
            dealer.send_multipart(frame_of(1, body=b"first", created_s=1.5 if created_s else 0.0))
            delivery = await stream.next(5)
            assert delivery is not None
            await delivery.ack()
            dealer.send_multipart(frame_of(2, body=b"second", attempt=2, created_s=created_s))
            delivery = await stream.next(5)
            assert delivery is not None and delivery.body == b"second"

    drive(main(), 40)


@pytest.mark.parametrize(
    "rest", [b'{"k": [[1]]}', b'{"t": []}', b'{"t": 5}', b'{"h": [5]}', b'{"c": [7]}', b"[" * 200_000], ids=range(6)
)
def test_a_malformed_frame_harms_neither_the_consumer_nor_others_in_its_burst(tmp_path: Path, rest: bytes) -> None:
    async def main() -> None:
        queue = Queue(fresh(), bytes)
        async with (
            buses(1, config(f"zeromq://127.0.0.1{tmp_path}/meet"), queue) as (reader,),
            reader.consume(queue) as stream,
            foreign_sender(tmp_path, queue) as bad,
            foreign_sender(tmp_path, queue) as good,
        ):
            await asyncio.sleep(0.1)  # both are greeted
            bad.send_multipart(frame_of(1, body=b"bad", rest=rest))
            good.send_multipart(frame_of(1, body=b"good"))
            time.sleep(0.2)  # noqa: ASYNC251  # so that both arrive in one burst
            delivery = await stream.next(5)
            assert delivery is not None and delivery.body == b"good"
            assert await stream.next(0.05) is None

    drive(main(), 40)


def test_a_sender_whose_session_was_dropped_while_it_stood_still_is_told_so(tmp_path: Path) -> None:
    async def main() -> None:
        queue = Queue(fresh(), bytes)
        table = config(f"zeromq://127.0.0.1{tmp_path}/meet", silence_s=0.5)
        async with (
            buses(1, table, queue) as (reader,),
            reader.consume(queue) as stream,
            foreign_sender(tmp_path, queue) as dealer,
        ):
            dealer.send_multipart(frame_of(1, body=b"x"))
            assert await stream.next(5) is not None
            deadline = time.monotonic() + 5  # it sends no ping: after `silence_s` its session ends
            kinds = []
            while b"?" not in kinds:
                assert time.monotonic() < deadline, f"it was told {kinds}"
                if await asyncio.to_thread(dealer.poll, 100):
                    kinds.append(dealer.recv_multipart()[0][:1])

    drive(main(), 40)


def test_a_consumer_that_talks_nonsense_loses_its_link_and_no_message(tmp_path: Path) -> None:
    """A frame that is too short ends the link; the sender calls again and sends what is unsettled."""

    async def main() -> None:
        queue = Queue(fresh(), bytes)
        greeted, got = 0, []
        async with foreign_consumer(queue) as (router, sender):
            sending = asyncio.ensure_future(sender.publish(queue, b"x", timeout_s=10))
            while len(got) < 2:
                assert await asyncio.to_thread(router.poll, 5000), "the sender gave up"
                identity, head, *rest = router.recv_multipart()
                if head[:1] == b"H":
                    greeted += 1
                    welcome(router, identity, head, 5)
                elif head[:1] == b"B":
                    got.append(rest[2])
                    router.send_multipart([identity, b"A"])
            sending.cancel()
        assert (greeted, got) == (2, [b"x", b"x"])

    drive(main(), 40)


def test_a_frame_is_cut_by_what_its_headers_may_weigh() -> None:
    light = Outgoing(b"x" * 10, "a")
    heavy = Outgoing(b"x" * 10, "b", "k" * 100, headers={"n": "\u00e9" * 899})
    assert (weight(light), weight(heavy)) == (10, 10 + 12 * 1000)


@pytest.mark.parametrize("key", ["x" * 39, "~" * 40, "#" * 40, "\u00e9" * 40])
def test_what_cannot_be_a_curve_key_is_refused(tmp_path: Path, key: str) -> None:
    public, secret = (k.decode() for k in zmq.curve_keypair())
    keys = {"curve_public": public, "curve_secret": secret, "curve_senders": [public, key]}
    with pytest.raises(ConfigError, match="no CURVE key"):
        Bus(config(f"zeromq://127.0.0.1{tmp_path}/meet", **keys))


@pytest.mark.parametrize(
    "block",
    [
        {"groups": {"g1": ["tcp://127.0.0.1:1"], "g2": ["tcp://127.0.0.1:1"]}},
        {"consumers": ["tcp://127.0.0.1:1"]},
    ],
)
def test_endpoints_that_would_reach_nobody_are_a_config_error(tmp_path: Path, block: dict[str, Any]) -> None:
    topic = Topic(fresh(), bytes, groups=["g1", "g2"])
    bus = Bus(config(f"zeromq://{tmp_path}/meet", {topic.name: block}))
    bus.declare(topic)
    with pytest.raises(ConfigError, match="endpoint|groups"):
        drive(bus.open())


def test_a_listener_that_stands_still_keeps_no_more_than_it_may(tmp_path: Path) -> None:
    """What its loop does not take waits in libzmq, which drops beyond `signal_frames`; nothing piles up here."""

    async def main() -> None:
        pulse = Signal(fresh("s"), bytes)
        table = config(f"zeromq://127.0.0.1{tmp_path}/meet", signal_frames=5)

        async def send() -> None:
            async with Bus(table) as sender:
                for n in range(200):
                    await sender.publish(pulse, b"%d" % n)

        async with buses(1, table, pulse) as (reader,), reader.consume(pulse) as stream:
            wire = stream._consumer._receiver._wire  # type: ignore[union-attr]
            bursts, sink = [], wire._sink
            wire._sink = lambda frames: (bursts.append(len(frames)), sink(frames))
            sending = threading.Thread(target=lambda: asyncio.run(send()))
            sending.start()
            assert await stream.next(5) is not None
            time.sleep(1)  # noqa: ASYNC251
            assert wire._untold <= 5
            await asyncio.to_thread(sending.join)
            await asyncio.sleep(0.1)
            assert max(bursts) <= 5

    drive(main(), 40)


def test_what_a_frozen_consumer_holds_goes_to_another(tmp_path: Path) -> None:
    async def main() -> None:
        queue, url = Queue(fresh(), bytes), f"zeromq://127.0.0.1{tmp_path}/meet?silence_s=1"
        worker = subprocess.Popen(  # noqa: ASYNC220  # before anything else is under way
            [sys.executable, "-c", WORKER, url, queue.name],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        assert worker.stdout is not None
        try:
            assert await asyncio.to_thread(worker.stdout.readline) == b"ready\n"
            async with Bus(url) as bus:
                sends = [asyncio.ensure_future(bus.publish(queue, b"%d" % n)) for n in range(3)]
                assert await asyncio.to_thread(worker.stdout.readline) == b"got\n"
                worker.send_signal(signal.SIGSTOP)
                async with bus.consume(queue, on_failure="drop") as stream:
                    found = []
                    while len(found) < 3:
                        delivery = await stream.next(20)
                        assert delivery is not None
                        assert delivery.redelivered
                        found.append(delivery.body)
                        await delivery.ack()
                    await asyncio.gather(*sends)
                    worker.send_signal(signal.SIGCONT)
                    assert sorted(found) == [b"0", b"1", b"2"]
                    assert await stream.next(0.5) is None
        finally:
            worker.kill()
            worker.wait(10)

    drive(main(), 60)


def test_a_sender_that_dials_before_the_endpoint_is_bound_is_welcomed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its greeting comes in the same turn of a busy loop in which the consumer learns that it is bound."""
    endpoint = free_endpoint()
    heard: set[bytes] = set()

    def dial() -> None:
        context = zmq.Context()
        dealer = context.socket(zmq.DEALER)
        dealer.set(zmq.RECONNECT_IVL, 10)
        dealer.set(zmq.LINGER, 0)
        dealer.connect(endpoint)
        dealer.send_multipart([HEAD.pack(b"H", 1, 1, 0), b"sender-1", b"queue.jobs"])
        end = time.monotonic() + 10.0
        while b"W" not in heard and time.monotonic() < end:
            if dealer.poll(100):
                heard.add(dealer.recv_multipart()[0][:1])
        dealer.close()
        context.term()

    bound = Wire.bind

    async def bind(self: Wire, endpoint: str) -> str:
        asyncio.get_running_loop().call_soon(time.sleep, 0.5)
        return await bound(self, endpoint)

    monkeypatch.setattr(Wire, "bind", bind)

    async def body() -> None:
        jobs = Queue("jobs", bytes)
        settings = config("zeromq://", {"jobs": {"consumers": [endpoint]}})
        async with buses(1, settings, jobs) as (bus,):
            stranger = threading.Thread(target=dial)
            stranger.start()
            async with bus.consume(jobs):
                await asyncio.to_thread(stranger.join)
        assert b"W" in heard

    drive(body())


def test_what_a_loop_held_that_was_closed_without_its_bus_goes_to_another(tmp_path: Path) -> None:
    jobs = Queue(fresh("jobs"), bytes)
    settings = config(f"zeromq://{tmp_path}/meet", silence_s=1)
    held: list[Any] = []

    def leave_it_open() -> None:
        async def take() -> None:
            bus = Bus(settings)
            bus.declare(jobs)
            await bus.open()
            consuming = bus.consume(jobs, window=5)
            held.extend((bus, consuming, await (await consuming.__aenter__()).next(10.0)))

        loop = asyncio.new_event_loop()
        loop.run_until_complete(take())
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()

    async def body() -> None:
        async with buses(1, settings, jobs) as (bus,):
            victim = threading.Thread(target=leave_it_open)
            victim.start()
            publish = asyncio.create_task(bus.publish(jobs, b"x", timeout_s=20))
            await asyncio.to_thread(victim.join)
            async with bus.consume(jobs) as stream:
                found = await stream.next(10.0)
                assert found is not None and held[2].id == found.id
                await found.ack()
            await publish

    drive(body())


def test_a_blocked_loop_loses_no_link(tmp_path: Path) -> None:
    """The I/O thread answers pings while the loop stands still."""

    async def main() -> None:
        queue = Queue(fresh(), bytes)
        table = config(f"zeromq://127.0.0.1{tmp_path}/meet", silence_s=0.5)
        async with buses(2, table, queue) as (sender, reader), reader.consume(queue) as stream:
            sending = asyncio.ensure_future(sender.publish(queue, b"x"))
            delivery = await stream.next(5)
            assert delivery is not None
            time.sleep(2)  # noqa: ASYNC251  # that is what is tested
            await asyncio.sleep(0.5)
            assert not delivery.session.lost
            await delivery.ack()
            await sending
            assert await stream.next(0.3) is None

    drive(main(), 40)


def test_a_sender_holds_no_more_than_it_may_and_says_what_became_of_each(tmp_path: Path) -> None:
    async def main() -> None:
        queue = Queue(fresh(), bytes)
        table = config(f"zeromq://127.0.0.1{tmp_path}/meet", max_held=5)
        async with buses(2, table, queue) as (sender, reader):
            async with reader.consume(queue, window=2) as stream:
                sends = [asyncio.ensure_future(sender.publish(queue, b"%d" % n, timeout_s=1.5)) for n in range(8)]
                taken = [await stream.next(5), await stream.next(5)]
                assert taken[0] is not None
                await taken[0].ack()
                done = await asyncio.gather(*sends, return_exceptions=True)
            told = [e.outcome if isinstance(e, MessagingError) else None for e in done]
            assert told[0] is None, "settled"
            assert told[1:3] == [Outcome.INDETERMINATE] * 2, "in the consumer's hands at the deadline"
            assert told[3:] == [Outcome.REJECTED] * 5, "never left"
            assert [isinstance(e, Backpressure) for e in done] == [False] * 5 + [True] * 3

    drive(main(), 40)


def test_a_host_that_no_socket_can_be_bound_to_is_refused() -> None:
    for host in ("localhost", "0.0.0.0", "no.such.host"):
        with pytest.raises(ConfigError, match="IPv4 address"):
            Bus(config(f"zeromq://{host}/run/app"))
    Bus(config("zeromq://lo/run/app"))


def test_a_publish_that_nobody_takes_says_so(tmp_path: Path) -> None:
    async def main() -> None:
        queue = Queue(fresh(), bytes)
        async with buses(1, config(f"zeromq://127.0.0.1{tmp_path}/meet"), queue) as (sender,):
            with pytest.raises(DeadlineExceeded, match="nobody took it") as caught:
                await sender.publish(queue, b"x", timeout_s=0.2)
            assert caught.value.outcome is Outcome.REJECTED

    drive(main())


def test_without_a_free_descriptor_nobody_is_taken_for_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        queue = Queue(fresh(), bytes)
        listed = os.listdir
        async with (
            buses(2, config(f"zeromq://127.0.0.1{tmp_path}/meet"), queue) as (sender, reader),
            reader.consume(queue) as stream,
        ):
            sending = asyncio.ensure_future(sender.publish(queue, b"x"))
            delivery = await stream.next(5)
            assert delivery is not None

            def exhausted(path: str) -> list[str]:
                raise OSError(errno.EMFILE, "Too many open files")

            monkeypatch.setattr(os, "listdir", exhausted)
            (tmp_path / "meet" / f"queue.{queue.name}" / "touched").touch()  # so that the sender looks
            await asyncio.sleep(0.4)
            monkeypatch.setattr(os, "listdir", listed)
            await delivery.ack()
            await asyncio.wait_for(sending, 5)
            assert not delivery.redelivered and await stream.next(0.3) is None

    drive(main(), 40)


async def settlements(dealer: Any, count: int) -> list[tuple[int, ...]]:
    """The next `count` A's of a consumer: frame, how many, their indexes."""
    said: list[tuple[int, ...]] = []
    while len(said) < count:
        assert await asyncio.to_thread(dealer.poll, 5000), f"it said only {said}"
        parts = dealer.recv_multipart()
        if parts[0][:1] == b"A":
            said.append(struct.unpack(f"<{len(parts[1]) // 4}I", parts[1]))
    return said


def test_each_outcome_is_told_once_whatever_the_settlements_name(tmp_path: Path) -> None:
    """In no order, some twice, some of no message, of no frame: what is named is settled, what is not comes again."""

    async def main() -> None:
        queue = Queue(fresh(), bytes)
        async with foreign_consumer(queue) as (router, sender):

            async def heard(kind: bytes) -> list[bytes]:
                while True:
                    assert await asyncio.to_thread(router.poll, 5000), f"no {kind!r}"
                    parts: list[bytes] = router.recv_multipart()
                    if parts[1][:1] == kind:
                        return parts

            sends = [asyncio.ensure_future(sender.publish(queue, b"%d" % n, timeout_s=20)) for n in range(6)]
            identity, head, *_ = await heard(b"H")
            session = welcome(router, identity, head, 10)
            got: dict[tuple[int, int], int] = {}
            while len(got) < 6:
                _, head, _, lengths, joined, *_ = await heard(b"B")
                for index in range(len(lengths) // 4):
                    got[HEAD.unpack(head)[3], index] = int(joined[index : index + 1])
            of = {number: key for key, number in got.items()}
            named = [(4, 0, 1), (4, 2, 1)]  # by their numbers
            for numbers in named:
                keys = [of[n] for n in numbers] + [(of[0][0], 77), (99, 0)]
                said = [part for frame, index in keys for part in (frame, 1, index)]
                router.send_multipart([identity, HEAD.pack(b"A", 1, session, 0), struct.pack(f"<{len(said)}I", *said)])
            frame, index = of[5]
            back = struct.pack("<IId", frame, index, 0.0) * 2
            router.send_multipart([identity, HEAD.pack(b"R", 1, session, 0), back])
            _, _, attempt, _, body, *_ = await heard(b"B")
            assert (attempt, body) == (struct.pack("<I", 2), b"5")
            assert [s.done() for s in sends] == [True, True, True, False, True, False]
            router.send_multipart([identity, HEAD.pack(b"?", 1, session, 0)])  # the link ends: the rest comes again
            identity, head, *_ = await heard(b"H")
            welcome(router, identity, head, 10)
            again = {(await heard(b"B"))[4] for _ in range(2)}
            assert again == {b"3", b"5"}, "in two frames, since 5 has one attempt more"
            for send in sends:
                send.cancel()

    drive(main(), 40)


def test_of_a_frame_that_is_settled_in_part_the_other_part_comes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was settled longest ago is forgotten, at twice `REMEMBERED`."""
    monkeypatch.setattr("messaging_sdk_zeromq.receiver.REMEMBERED", 10)

    async def main() -> None:
        queue = Queue(fresh(), bytes)
        async with (
            buses(1, config(f"zeromq://127.0.0.1{tmp_path}/meet"), queue) as (reader,),
            reader.consume(queue) as stream,
            foreign_sender(tmp_path, queue) as dealer,
        ):
            dealer.send_multipart(frame_of(1, ["a", "b", "c"]))
            found = await stream.take(3, 5)
            await stream.ack([found[1]])
            assert await settlements(dealer, 1) == [(1, 1, 1)]
            dealer.send_multipart(frame_of(2, ["a", "b", "c"], attempt=2))
            assert await settlements(dealer, 1) == [(2, 1, 1)]
            assert [d.id for d in await stream.take(3, 5)] == ["a", "c"]
            for n in range(3):
                dealer.send_multipart(frame_of(3 + n, [f"{n}-{i}" for i in range(11)]))
                await stream.ack(await stream.take(11, 5))
                await settlements(dealer, 1)
            dealer.send_multipart(frame_of(9, ["b", "2-5"], attempt=2))
            assert await settlements(dealer, 1) == [(9, 1, 1)]
            assert [d.id for d in await stream.take(2, 5)] == ["b"]

    drive(main(), 40)


def test_half_a_window_is_settled_before_the_other_half_is_worked_on(tmp_path: Path) -> None:
    async def main() -> None:
        queue, ran = Queue(fresh(), bytes), 0
        bus = Bus(config(f"zeromq://127.0.0.1{tmp_path}/meet"))

        @bus.on(queue, window=200)
        async def handle(_: bytes) -> None:
            nonlocal ran
            ran += 1

        async with bus, bus.consuming(), foreign_sender(tmp_path, queue) as dealer:
            dealer.send_multipart(frame_of(1, [f"id-{n}" for n in range(200)]))
            first, second = await settlements(dealer, 2)
            assert (first[:2], second[:2]) == ((1, 100), (1, 100))
            assert sorted((*first[2:], *second[2:])) == [*range(200)]
            assert ran == 200

    drive(main(), 40)


def test_a_frame_is_cut_by_count_weight_and_attempt() -> None:
    def batch(*sizes: int, serial: int = 0) -> Batch:
        return Batch([Outgoing(b"x" * size, str(n)) for n, size in enumerate(sizes)], lambda _: None, serial)

    small, large = batch(*[10] * 6), batch(FRAME_BYTES + 1, FRAME_BYTES - 1, 1, 1)
    waiting = deque([Run(small, 0, 6), Run(large, 0, 4), Run(small, 0, 2, attempt=2)])
    cuts = []
    while waiting:
        cuts.append([(run.batch, run.first, run.stop) for run in cut(waiting, 4)])
    assert cuts == [
        [(small, 0, 4)], [(small, 4, 6)], [(large, 0, 1)], [(large, 1, 3)], [(large, 3, 4)], [(small, 0, 2)],
    ]  # fmt: skip
