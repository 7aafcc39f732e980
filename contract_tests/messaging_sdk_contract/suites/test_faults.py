"""FLT: connections, consumers and brokers die, and nothing that was confirmed dies with them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import pytest

from messaging_sdk import CapabilityError, MessagingError, Needs, Outcome, SettleLost
from messaging_sdk.capabilities import meets

from ..cases import ALL, FAULT_LIMIT_S, SETTLED, case
from ..lab import Lab, eventually
from ..worker import Worker
from . import (
    WAIT_S,
    arrived,
    assert_exactly,
    bodies,
    body_of,
    handling,
    opened,
    publish_all,
    real,
    repeated,
    rest,
    series,
    silence,
    spread,
    takeover,
    victim,
)


@case("FLT-01", kinds=ALL, faults=("cut",))
async def test_flt_01_an_idle_consumer_survives_a_cut(lab: Lab) -> None:
    """After a reset of its idle connection a consumer gets new messages, and its bus publishes, without user code."""
    destination = lab.destination()
    caps = await lab.capabilities()
    publisher = await opened(lab, destination)
    bus = await opened(lab, destination, faulty=True)
    async with lab.collecting(bus, destination) as arrivals:
        for turn in range(2):
            await publisher.publish(destination, body_of(destination, "k0", 100 * turn))
            await eventually(lambda: arrivals, WAIT_S, "the first must arrive")
            await asyncio.sleep(lab.harness.quiet_s)
            arrivals.clear()
            await lab.harness.cut()
            began = time.monotonic()
            sent: list[bytes] = []
            while not arrivals:  # a Signal published before the listener is back is gone, as promised
                # a lease too: the broker may have handed the message to the dead connection
                assert time.monotonic() - began < takeover(lab, caps), "the consumer did not come back"
                if destination.settles and sent:
                    await asyncio.sleep(0.01)
                    continue
                sent.append(body_of(destination, "k0", 100 * turn + len(sent) + 1))
                await publisher.publish(destination, sent[-1])
                await asyncio.sleep(0.05)
            lab.measured[f"back_{turn}_s"] = round(time.monotonic() - began, 2)
            own = body_of(destination, "k0", 100 * turn + 99)
            await bus.publish(destination, own)
            if destination.settles:  # this one may have been handed to the dead connection as well
                await arrived(arrivals, len(sent) + 1, takeover(lab, caps))
            await silence(lab, publisher, destination, arrivals)
            found = bodies(real(arrivals))
            assert not repeated(found)
            assert set(found) <= {*sent, own}
            if destination.settles:
                assert set(found) == {*sent, own}
            arrivals.clear()


@case("FLT-02", kinds=SETTLED, flags=("lease", "settle"), faults=("cut",))
async def test_flt_02_a_cut_with_work_in_flight_returns_it(lab: Lab) -> None:
    """What was in flight at a reset comes again, old acks are SettleLost, and nothing else repeats."""
    destination = lab.destination()
    caps = await lab.capabilities()
    sent = spread(destination, 5)
    async with victim(lab, destination) as holder:
        await publish_all(holder.bus, destination, sent)
        held = await holder.take(5)
        await lab.harness.cut()
        await eventually(lambda: all(d.session.lost for d in held), lab.harness.takeover_s, "the loss must be noticed")
        for delivery in held:
            with pytest.raises(SettleLost):
                await delivery.ack()
        again = await holder.take(5, takeover(lab, caps))
        assert_exactly([d.body for d in again], sent)
        for delivery in again:
            await delivery.ack()
        assert await holder.stream.next(lab.harness.quiet_s) is None
        await holder.die()
    runs: Counter[bytes] = Counter()
    running = asyncio.Event()
    goes_on = asyncio.Event()

    async def handle(value: bytes) -> None:
        runs[value] += 1
        if len(runs) == 5:
            running.set()
        await goes_on.wait()

    first, later = (
        series(destination, 5, keys=[f"k{n}" for n in range(5)], start=100),
        series(destination, 20, start=200),
    )
    async with handling(lab, destination, handle, faulty=True, concurrency=5) as bus:
        await publish_all(bus, destination, first)
        async with asyncio.timeout(WAIT_S):
            await running.wait()
        await lab.harness.cut()
        await asyncio.sleep(lab.harness.quiet_s)
        goes_on.set()
        await publish_all(bus, destination, later)
        await eventually(lambda: set(runs) >= {*first, *later}, takeover(lab, caps) + WAIT_S, "all must be handled")
        await asyncio.sleep(1.5 * (caps.lease_s if caps.lease == "timeout" else 0) + lab.harness.quiet_s)
    lab.measured["run_twice"] = sum(n - 1 for n in runs.values())
    assert all(runs[b] <= 2 for b in first), "one cut may repeat a message once"
    assert set(runs) == {*first, *later}, "an acked message came again"
    assert all(runs[b] == 1 for b in later), "a message that came after the cut was repeated"
    assert bodies(await rest(lab, caps, destination)) == []


@case("FLT-04", kinds=SETTLED, flags=("durable",), limit_s=FAULT_LIMIT_S)
async def test_flt_04_a_graceful_restart_keeps_what_was_confirmed(lab: Lab) -> None:
    """Confirmed messages outlive a restart of the broker, once each, and the bus goes on; else the need is refused."""
    destination = lab.destination()
    caps = await lab.capabilities()
    if not meets("durable", caps.durable, "restart"):
        await _durability_is_refused(lab, destination, "restart")
        return
    lab.require_fault("restart")
    bus = await opened(lab, destination, timeout_s=lab.harness.recovery_s)
    sent = series(destination, 300)
    await publish_all(bus, destination, sent)
    await asyncio.sleep(lab.harness.settle_before_kill_s)
    began = time.monotonic()
    await lab.harness.restart()
    after = series(destination, 20, start=1000)
    await publish_all(bus, destination, after)
    lab.measured["back_s"] = round(time.monotonic() - began, 1)
    found = bodies(await rest(lab, caps, destination, expected=[*sent, *after]))
    assert_exactly([b for b in found if b in set(sent)], sent)
    assert set(found) == {*sent, *after}
    assert repeated(found).total() <= len(after), "only what was under way may repeat"


@case("FLT-05", kinds=SETTLED, flags=("durable", "confirm"), limit_s=FAULT_LIMIT_S)
async def test_flt_05_a_killed_broker_keeps_what_was_confirmed(lab: Lab) -> None:
    """Five publishers go on through a broker's SIGKILL; every confirmed message is there, only unsure ones twice."""
    destination = lab.destination()
    caps = await lab.capabilities()
    if not meets("durable", caps.durable, "kill"):
        await _durability_is_refused(lab, destination, "kill")
        return
    lab.require_fault("kill")
    await (await opened(lab, destination)).close()
    await asyncio.sleep(lab.harness.settle_before_kill_s)
    confirmed: list[bytes] = []
    unsure: list[bytes] = []
    back = asyncio.Event()

    async def publish(n: int) -> None:
        bus = await opened(lab, destination, timeout_s=lab.harness.recovery_s)
        number, more = 10_000 * n, 10
        while more:
            body = body_of(destination, f"k{n}", number)
            number += 1
            await asyncio.sleep(0.002)
            try:
                await bus.publish(destination, body)
            except MessagingError as error:
                assert error.outcome is not None, f"no outcome: {error!r}"
                if error.outcome is Outcome.INDETERMINATE:
                    unsure.append(body)
                continue
            confirmed.append(body)
            if back.is_set():
                more -= 1

    tasks = [asyncio.ensure_future(publish(n)) for n in range(5)]
    await eventually(lambda: len(confirmed) >= 100, WAIT_S, "publishing must be under way")
    await asyncio.sleep(lab.random.uniform(0.05, 0.4))
    at_kill = len(confirmed)
    await lab.harness.kill()
    back.set()
    async with asyncio.timeout(2 * lab.harness.recovery_s):
        await asyncio.gather(*tasks)
    keys = [f"k{n}" for n in range(5)]
    found = bodies(await rest(lab, caps, destination, expected=confirmed, keys=keys))
    again = repeated(found)
    lab.measured.update(confirmed=len(confirmed), before_kill=at_kill, unsure=len(unsure), repeats=again.total())
    assert not set(confirmed) - set(found), f"{len(set(confirmed) - set(found))} confirmed messages are lost"
    assert set(found) <= {*confirmed, *unsure}
    assert again.total() <= 5, "only the one message that each publisher had under way may be there twice"


@case("FLT-10", kinds=SETTLED, flags=("lease", "settle"), faults=("subprocess",))
async def test_flt_10_a_storm_of_killed_consumers_loses_nothing(lab: Lab) -> None:
    """Four consumers SIGKILLed in turn lose none of 400 messages; repeats are at most kills times window."""
    destination = lab.destination()
    caps = await lab.capabilities()
    bus = await opened(lab, destination)
    sent = series(destination, 400, keys=[f"k{n}" for n in range(8)])
    await publish_all(bus, destination, sent)
    kills, window = 4, 20
    seen: list[bytes] = []
    for _ in range(kills):
        with Worker(lab, destination, "consume", window=window, delay_s=0.002) as worker:
            await worker.until("got", lab.random.randrange(5, 50), takeover(lab, caps) + WAIT_S)
            worker.kill()
            seen += worker.bodies("got")
    left = [b for b in sent if b not in set(seen)]
    found = bodies(await rest(lab, caps, destination, expected=left))
    again = repeated([*seen, *found])
    lab.measured.update(kills=kills, repeats=again.total(), left=len(left))
    assert set(seen) | set(found) == set(sent)
    assert again.total() <= kills * window
    assert max(again.values(), default=0) <= kills


# --- helpers


async def _durability_is_refused(lab: Lab, destination: object, want: str) -> None:
    bus = lab.bus(needs=Needs(durable=want))  # type: ignore[arg-type]
    bus.declare(destination)  # type: ignore[arg-type]
    with pytest.raises(CapabilityError) as caught:
        await bus.open()
    assert any("durable" in item.need for item in caught.value.unmet)
    lab.refused()
