"""BAT: batches are invisible: nothing lost, nothing reordered, one bad message spoils none but itself."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any

import pytest

from messaging_sdk import Capabilities, Destination, Outcome, TooLarge
from messaging_sdk.model import Outgoing, SendResult

from ..cases import ALL, SETTLED, case
from ..lab import Lab, eventually, key_before_colon
from . import (
    WAIT_S,
    arrived,
    assert_exactly,
    bodies,
    body_of,
    disorder,
    first_times,
    handling,
    lease_of,
    opened,
    publish_all,
    real,
    repeated,
    rest,
    series,
    silence,
    spread,
    victim,
)


@case("BAT-01", kinds=SETTLED, flags=("window",))
async def test_bat_01_a_thousand_in_batches_flow_through_a_small_window(lab: Lab) -> None:
    """A thousand messages sent in batches pass a window of a hundredth of them exactly once and without a stall."""
    destination = lab.destination()
    caps = await lab.capabilities()
    sent = series(destination, 1000, keys=[f"k{n}" for n in range(16)])
    done: list[bytes] = []
    at: list[float] = []
    busy = 0
    most = 0

    async def handle(value: bytes) -> None:
        nonlocal busy, most
        busy += 1
        most = max(most, busy)
        await asyncio.sleep(0)
        busy -= 1
        done.append(value)
        at.append(time.monotonic())

    async with handling(lab, destination, handle, concurrency=10, window=10) as bus:
        async with bus.publisher(destination) as publisher:
            for body in sent:
                await publisher.send(body)
        assert (publisher.sent, publisher.failed) == (len(sent), [])
        await eventually(lambda: len(done) >= len(sent), 2 * WAIT_S, "all must be handled")
        await asyncio.sleep(lab.harness.quiet_s)
    assert_exactly(done, sent)
    assert most <= 10
    pause_s = max(b - a for a, b in itertools.pairwise(at))
    lab.measured.update(per_s=round(len(at) / (at[-1] - at[0])), longest_pause_s=round(pause_s, 3))
    stall_s = lease_of(caps) or lab.harness.takeover_s  # what a window that nobody refills waits for
    assert pause_s < stall_s, f"the window stalled for {pause_s:.2f} s"
    assert bodies(await rest(lab, caps, destination)) == []


@case("BAT-02", kinds=ALL, flags=("batch",))
async def test_bat_02_one_bad_message_spoils_none_but_itself(lab: Lab) -> None:
    """One bad message among ten: through the Bus nine arrive; below it the outcome is what the batch mode declares."""
    destination = lab.destination()
    caps = await lab.capabilities()
    bus = await opened(lab, destination)
    sent = series(destination, 10)
    async with lab.collecting(bus, destination) as arrivals:
        async with bus.publisher(destination) as publisher:
            for n, body in enumerate(sent):
                if n == 4:
                    with pytest.raises(TooLarge):
                        await publisher.send(b"k0:".ljust(caps.max_body + 1, b"x"))
                    continue
                await publisher.send(body)
        good = [b for n, b in enumerate(sent) if n != 4]
        assert (publisher.sent, publisher.failed) == (9, [])
        await arrived(arrivals, 9)
        await silence(lab, bus, destination, arrivals)
        assert_exactly(bodies(real(arrivals)), good)
        arrivals.clear()
        told, batch = await _sent_below(lab, destination, caps)
        ok = {batch[i] for i, result in told.items() if result.outcome is Outcome.OK}
        await silence(lab, bus, destination, arrivals)
        found = bodies(real(arrivals))
    lab.measured["ok"] = len(ok)
    assert told[4].outcome is Outcome.REJECTED
    assert not repeated(found)
    if destination.settles:
        assert set(found) == ok, "outcomes and what is stored differ"
    indexes = [i for i in range(10) if batch[i] in ok]
    if caps.batch == "entries":
        assert indexes == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    elif caps.batch == "atomic":
        assert indexes == []
    else:
        assert indexes == [0, 1, 2, 3]


@case("BAT-03", kinds=ALL, flags=("order",))
async def test_bat_03_splitting_keeps_order(lab: Lab) -> None:
    """More messages, and more bytes, than one batch takes arrive complete and in the order they were sent."""
    destination = lab.destination()
    caps = await lab.capabilities()
    bus = await opened(lab, destination, timeout_s=WAIT_S)
    small = series(destination, await _beyond_one_batch(lab, destination))
    big = [b.ljust(12_000, b".") for b in series(destination, 180, start=5000)]
    sent = small + big * (caps.max_body >= 12_000) if destination.settles else small[:600]
    async with lab.collecting(bus, destination) as arrivals:
        await publish_all(bus, destination, sent)
        if destination.settles:
            await arrived(arrivals, len(sent))
        await silence(lab, bus, destination, arrivals)
    found = bodies(real(arrivals))
    if destination.settles:
        assert_exactly(found, sent)
    else:
        assert not repeated(found)
        assert set(found) <= set(sent)
        assert len(found) >= len(sent) * 0.9
    if caps.order != "none":
        assert disorder(first_times(found), per_key=destination.ordered) == []


@case("BAT-04", kinds=ALL)
async def test_bat_04_take_gives_what_there_is(lab: Lab) -> None:
    """take() returns one to `max` messages without waiting to fill up, [] after its time, and never more than asked."""
    destination = lab.destination()
    bus = await opened(lab, destination)
    sent = spread(destination, 25)
    seen: list[bytes] = []
    async with bus.consume(destination, group=lab.group) as stream:
        began = time.monotonic()
        assert await stream.take(10, 0.2) == []
        assert 0.15 <= time.monotonic() - began < 5
        await bus.publish(destination, sent[0])
        began = time.monotonic()
        got = await stream.take(10, WAIT_S)
        assert [d.body for d in got] == [sent[0]], "it must not wait for ten"
        assert time.monotonic() - began < WAIT_S / 2
        if destination.settles:
            await got[0].ack()
        await publish_all(bus, destination, sent[1:])
        sizes = []
        while len(seen) < 24:
            got = await stream.take(7, WAIT_S)
            assert got, f"{len(seen)} of 24"
            sizes.append(len(got))
            seen += [d.body for d in got]
            if destination.settles:
                await stream.ack(got)
        assert max(sizes) <= 7
        assert await stream.take(7, lab.harness.quiet_s) == []
    assert_exactly(seen, sent[1:])


@case("BAT-05", kinds=SETTLED, flags=("settle",), faults=("cut",))
async def test_bat_05_a_partly_acked_batch_returns_its_rest(lab: Lab) -> None:
    """Of ten deliveries taken together three are acked in one call; after a death exactly the other seven return."""
    destination = lab.destination()
    caps = await lab.capabilities()
    async with victim(lab, destination) as holder:
        sent = spread(destination, 10)
        await publish_all(holder.bus, destination, sent)
        held = await holder.take(10)
        await holder.stream.ack([held[1], held[4], held[8]])
        await asyncio.sleep(lab.harness.quiet_s)
        await holder.die()
    others = [d.body for n, d in enumerate(held) if n not in (1, 4, 8)]
    assert_exactly(bodies(await rest(lab, caps, destination, expected=others)), others)


# --- helpers


async def _beyond_one_batch(lab: Lab, destination: Destination[Any]) -> int:
    """How many messages make several batches, the last of them a part of one."""
    driver = await lab.driver()
    sender = await driver.open_sender(destination)
    most = sender.max_batch
    await sender.close()
    return most * 13 // 5


async def _sent_below(lab: Lab, destination: object, caps: Capabilities) -> tuple[dict[int, SendResult], list[bytes]]:
    """Hand ten messages to a Sender in one batch, the fifth with something it must refuse."""
    driver = await lab.driver()
    sender = await driver.open_sender(destination)  # type: ignore[arg-type]
    batch = [body_of(destination, "k0", 100 + n) for n in range(10)]  # type: ignore[arg-type]
    messages = [Outgoing(b, b.decode(), key_before_colon(b), created_s=time.time()) for b in batch]
    bad = messages[4]
    if not caps.priority:
        bad.priority = 1
    elif not caps.delay:
        bad.delay_s = 0.01
    elif not caps.ttl:
        bad.ttl_s = 60.0
    else:
        batch[4] = bad.body = b"k0:104:".ljust(caps.max_body + 1, b"x")
    told: list[tuple[int, SendResult]] = []
    sender.send_batch(messages, told.extend)
    await eventually(lambda: len(told) >= 10, WAIT_S, "every message has an outcome")
    assert sorted(i for i, _ in told) == list(range(10)), "exactly one outcome each"
    await sender.close()
    return dict(told), batch
