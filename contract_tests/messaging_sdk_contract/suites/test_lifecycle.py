"""LIF: opening, closing, cancelling, forking and being stopped lose nothing and leave nothing behind."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from messaging_sdk import Closed, UsageError

from ..cases import ALL, SETTLED, case
from ..lab import Lab, eventually
from ..worker import Worker
from . import (
    WAIT_S,
    arrived,
    assert_exactly,
    bodies,
    body_of,
    handling,
    key_in,
    opened,
    publish_all,
    real,
    register,
    repeated,
    rest,
    series,
    silence,
    take,
)

CLOSE_S = 1.0
"""A blocked call ends this soon after close()."""


@case("LIF-01", kinds=ALL)
async def test_lif_01_closing_twice_is_fine(lab: Lab) -> None:
    """Close is idempotent: before open, twice, and by several tasks at once; a closed bus stays closed."""
    destination = lab.destination()
    unopened = lab.bus()
    await unopened.close()
    await unopened.close()
    with pytest.raises(Closed):
        await unopened.open()
    bus = await opened(lab, destination)
    stream = bus.consume(destination, group=lab.group)
    async with stream:
        await bus.publish(destination, body_of(destination, "k0", 1))
        await take(stream, 1)
        await asyncio.gather(*(bus.close() for _ in range(3)))
        await bus.close()
        with pytest.raises(Closed):
            await stream.next(0.1)
    for use in (bus.open(), bus.publish(destination, b"k0:late")):
        with pytest.raises(Closed):
            await use


@case("LIF-02", kinds=ALL)
async def test_lif_02_close_frees_blocked_receivers(lab: Lab) -> None:
    """A task that waits in next, take or `async for` gets Closed within a second of close()."""
    destination = lab.destination()

    async def iterate(stream: Any) -> None:
        async for _ in stream:
            pass

    for wait in (lambda s: s.next(60), lambda s: s.take(5, 60), iterate):
        bus = await opened(lab, destination)
        async with bus.consume(destination, group=lab.group) as stream:
            waiting = asyncio.ensure_future(wait(stream))
            await asyncio.sleep(0.05)
            assert not waiting.done()
            began = time.monotonic()
            closing = asyncio.ensure_future(bus.close())
            await asyncio.wait({waiting}, timeout=CLOSE_S + 5)
            took = time.monotonic() - began
            assert waiting.done(), "close left a task waiting"
            with pytest.raises(Closed):
                waiting.result()
            await closing
            assert took <= CLOSE_S, f"{took:.2f} s"


@case("LIF-03", kinds=SETTLED, flags=("release", "settle"))
async def test_lif_03_stopping_drains_what_runs_and_returns_the_rest(lab: Lab) -> None:
    """Stopping under a backlog lets handlers finish, cancels those over the grace, and hands all else back once."""
    destination = lab.destination()
    caps = await lab.capabilities()
    sent = series(destination, 150, keys=[f"k{n}" for n in range(8)])
    done: list[bytes] = []
    started: list[bytes] = []

    async def handle(value: bytes) -> None:
        started.append(value)
        await asyncio.sleep(0.01)
        done.append(value)

    publisher = await opened(lab, destination)
    await publish_all(publisher, destination, sent)
    async with handling(lab, destination, handle, concurrency=4, window=50):
        await eventually(lambda: len(done) >= 20, WAIT_S, "some must be handled")
    at_stop = list(done)
    await asyncio.sleep(2 * 0.01)
    assert started == done or sorted(started) == sorted(done), "a handler was cut off within its grace"
    assert done == at_stop, "a handler ran on after stopping had returned"
    # one whose handler outlives the grace, for which there is no room in a drain
    stubborn: list[bytes] = []

    async def endless(value: bytes) -> None:
        stubborn.append(value)
        await asyncio.sleep(60)

    bus = lab.bus()
    # a window over more than one key: a partitioned log may hand out one partition first, which can be one key
    register(bus, destination, endless, group=lab.group, concurrency=2, window=50)
    await bus.open()
    async with bus.consuming(grace_s=0.2):
        await eventually(lambda: len(stubborn) >= 2, WAIT_S, "two must be started")
        began = time.monotonic()
    assert time.monotonic() - began < 5
    await bus.close()
    left = [b for b in sent if b not in done]
    found = await rest(lab, caps, destination, expected=left)
    assert_exactly(bodies(found), left)
    counts = [a.deliveries for a in found if a.deliveries is not None]
    if counts:
        lab.measured["deliveries"] = max(counts)
        assert max(counts) <= 3, "each stop may cost a waiting message one delivery at most"


@case("LIF-04", kinds=ALL)
async def test_lif_04_a_cancelled_receive_loses_nothing(lab: Lab) -> None:
    """Two hundred receives cancelled at random moments under load lose and repeat no message."""
    destination = lab.destination()
    caps = await lab.capabilities()
    bus, publisher = await opened(lab, destination), await opened(lab, destination)
    sent = series(destination, 300)
    seen: list[bytes] = []
    acks: list[asyncio.Future[None]] = []
    cancelled = 0

    async def feed() -> None:
        for at in range(0, len(sent), 5):
            await publish_all(publisher, destination, sent[at : at + 5])
            await asyncio.sleep(0.002)

    async with bus.consume(destination, group=lab.group) as stream:
        feeding = asyncio.ensure_future(feed())
        deadline = time.monotonic() + WAIT_S
        while (len(seen) < len(sent) or cancelled < 200) and time.monotonic() < deadline:
            message = await _cancelled_next(lab, stream)
            if message is None:
                cancelled += 1
                if cancelled % 100 == 0 and feeding.done():
                    message = await stream.next(lab.harness.quiet_s)
            if message is not None:
                seen.append(message.body)
                if destination.settles:  # not awaited one by one: an answer may cost a request
                    acks.append(asyncio.ensure_future(message.ack()))
        await feeding
        await asyncio.gather(*acks)
    lab.measured["cancelled"] = cancelled
    assert cancelled >= 200
    if not destination.settles:
        assert not repeated(seen)
        assert set(seen) <= set(sent)
        assert len(seen) >= 0.9 * len(sent)
        return
    assert_exactly(seen, sent)
    assert bodies(await rest(lab, caps, destination)) == []


@case("LIF-05", kinds=ALL)
async def test_lif_05_a_receive_ends_at_its_time(lab: Lab) -> None:
    """next() gives None after 0, 0.05 and 0.3 seconds, neither early nor late; a negative time is a UsageError."""
    destination = lab.destination()
    bus = await opened(lab, destination)
    async with bus.consume(destination, group=lab.group) as stream:
        for wait_s in (0.0, 0.05, 0.3):
            began = time.monotonic()
            assert await stream.next(wait_s) is None
            took = time.monotonic() - began
            assert wait_s - 0.02 <= took <= wait_s + 2, f"{took:.3f} s instead of {wait_s:g}"
        with pytest.raises(UsageError):
            await stream.next(-1)
        with pytest.raises(UsageError):
            await stream.take(0, 1)
        await bus.publish(destination, body_of(destination, "k0", 1))
        await take(stream, 1)


@case("LIF-06", kinds=("queue",), refusal=True)
async def test_lif_06_a_wrong_address_is_a_typed_error(lab: Lab) -> None:
    """At each address that must refuse, open fails in time with the right error and no secret in it."""
    refusals = lab.harness.refusals()
    if not refusals:
        lab.not_run(f"the {lab.harness.name} harness names no address that refuses")
    for refusal in refusals:
        texts: list[str] = []
        began = time.monotonic()
        with pytest.raises(refusal.error) as caught:
            bus = lab.bus(refusal.backend, timeout_s=5)
            texts.append(repr(bus))
            bus.declare(lab.destination())
            await bus.open()
        took = time.monotonic() - began
        assert took < 8, f"{refusal.why}: {took:.1f} s with a deadline of 5"
        texts += [str(caught.value), repr(caught.value)]
        cause: BaseException | None = caught.value
        while cause is not None:
            texts.append(str(cause))
            cause = cause.__cause__ or cause.__context__
        if refusal.secret:
            assert not [t for t in texts if refusal.secret in t], f"{refusal.why}: the secret is in the error"
    lab.measured["refusals"] = len(refusals)


@case("LIF-07", kinds=ALL)
async def test_lif_07_opening_and_closing_leaks_nothing(lab: Lab) -> None:
    """Rounds of open, publish, consume and close leave no more files, threads, tasks or ghost consumers."""
    destination = lab.destination()

    async def round_trip(n: int) -> None:
        bus = await opened(lab, destination)
        async with bus.consume(destination, group=lab.group) as stream:
            await bus.publish(destination, body_of(destination, "k0", n))
            (message,) = await take(stream, 1)
            if destination.settles:
                await message.ack()
        await bus.close()

    for n in range(3):
        await round_trip(n)
    before = _footprint()
    for n in range(3, 15):
        await round_trip(n)

    def grown() -> list[str]:
        gc.collect()
        return [f"{what}: {before[what]} -> {n}" for what, n in _footprint().items() if n > before[what] + 1]

    try:
        await eventually(lambda: not grown(), 5, "", 0.1)
    except AssertionError:
        raise AssertionError(f"leaked in 12 rounds: {', '.join(grown())}") from None
    bus = await opened(lab, destination)
    async with lab.collecting(bus, destination) as arrivals:  # a ghost would take its share
        later = series(destination, 20, start=100)
        await publish_all(bus, destination, later)
        await arrived(arrivals, len(later))
    assert_exactly(bodies(arrivals), later)


@case("LIF-08", kinds=ALL)
async def test_lif_08_loops_threads_and_forks_are_kept_apart(lab: Lab) -> None:
    """An open bus refuses another loop or thread and works on; a bus works on both sides of a fork."""
    destination = lab.destination()
    bus = await opened(lab, destination)
    async with lab.collecting(bus, destination) as arrivals:
        for use in (
            lambda: bus.publish(destination, body_of(destination, "k0", 1)),
            lambda: _enter(bus.consume(destination, group=lab.group)),
            bus.close,
        ):
            with pytest.raises(UsageError):
                await asyncio.to_thread(lambda use=use: asyncio.run(use()))  # type: ignore[misc]
        await bus.publish(destination, body_of(destination, "k0", 2))
        await arrived(arrivals, 1)
        with Worker(lab, destination, "fork", group="") as worker:
            code = await worker.ended()
            told = worker.bodies("published")
            assert code == 0, worker.complaint()
        assert [key_in(b) for b in told] == ["before", "child", "unopened", "parent"]
        if "subprocess" in lab.harness.faults:
            await arrived(arrivals, 5 if destination.settles else 1)
        await silence(lab, bus, destination, arrivals)
    expected = [body_of(destination, "k0", 2)]
    expected += told if "subprocess" in lab.harness.faults else []
    assert_exactly(bodies(real(arrivals)), expected)


@case("LIF-09", kinds=SETTLED, flags=("settle",), faults=("subprocess",))
async def test_lif_09_sigterm_finishes_what_runs_and_returns_the_rest(lab: Lab) -> None:
    """At SIGTERM bus.run() finishes and acks what its handler has, hands back the rest, and exits with 0."""
    destination = lab.destination()
    caps = await lab.capabilities()
    bus = await opened(lab, destination)
    sent = series(destination, 12)
    with Worker(lab, destination, "run", delay_s=0.4) as worker:
        await publish_all(bus, destination, sent)
        await worker.until("start", 2)
        worker.terminate()
        began = time.monotonic()
        assert await worker.ended() == 0, worker.complaint()
        lab.measured["stopped_s"] = round(time.monotonic() - began, 2)
        started, done = worker.bodies("start"), worker.bodies("done")
    assert started == done, "a handler was cut off although it was within its grace"
    assert len(done) < len(sent)
    left = [b for b in sent if b not in done]
    assert_exactly(bodies(await rest(lab, caps, destination, expected=left)), left)


# --- helpers


async def _cancelled_next(lab: Lab, stream: Any) -> Any:
    """Cancel a next() after a random moment; what it returned all the same, or None if it was cancelled."""
    receiving = asyncio.ensure_future(stream.next(5))
    for _ in range(lab.random.randrange(4)):
        await asyncio.sleep(lab.random.choice((0, 0, 0.001)))
    receiving.cancel()
    try:
        return await receiving
    except asyncio.CancelledError:
        return None


async def _enter(stream: Any) -> None:
    async with stream:
        pass


def _footprint() -> dict[str, int]:
    found = {"threads": threading.active_count(), "tasks": len(asyncio.all_tasks())}
    if Path("/proc/self/fd").is_dir():
        found["files"] = len(os.listdir("/proc/self/fd"))
    return found
