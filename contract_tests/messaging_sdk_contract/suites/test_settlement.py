"""ACK: a settlement holds, whatever dies afterwards, and what is not settled comes back."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import suppress
from typing import Any

import pytest

from messaging_sdk import AlreadySettled, Capabilities, Destination, SettleLost, UsageError
from messaging_sdk import sync as sync_api
from messaging_sdk.config import from_mapping
from messaging_sdk.spi import ACCEPT

from ..cases import ALL, SETTLED, case
from ..lab import Arrival, Lab, drain, eventually
from . import (
    WAIT_S,
    assert_exactly,
    bodies,
    body_of,
    dead_letters,
    handling,
    lease_of,
    opened,
    publish_all,
    real,
    register,
    repeated,
    rest,
    series,
    silence,
    spread,
    take,
    takeover,
    victim,
)


@case("ACK-01", kinds=SETTLED, flags=("settle",), faults=("cut",))
async def test_ack_01_an_acked_message_never_returns(lab: Lab) -> None:
    """Acked messages do not return, neither to the living connection nor after its abrupt death to a new one."""
    destination = lab.destination()
    caps = await lab.capabilities()
    async with victim(lab, destination) as holder:
        sent = series(destination, 12)
        await publish_all(holder.bus, destination, sent)
        seen = []
        for _ in sent:
            (delivery,) = await holder.take(1)
            seen.append(delivery.body)
            await delivery.ack()
            assert delivery.settled
        assert_exactly(seen, sent)
        assert await holder.stream.next(lab.harness.quiet_s) is None
        await holder.die()
    assert bodies(await rest(lab, caps, destination, beyond_lease=True)) == []


@case("ACK-02", kinds=ALL, flags=("lease",), faults=("cut",))
async def test_ack_02_the_unsettled_returns_after_death(lab: Lab) -> None:
    """What a dead consumer held unsettled comes to another one, once each; of a Signal nothing comes again."""
    destination = lab.destination()
    caps = await lab.capabilities()
    async with victim(lab, destination, window=3) as holder:
        sent = spread(destination, 5 if destination.settles else 3)
        await publish_all(holder.bus, destination, sent)
        held = await holder.take(3)
        await holder.die()
    if caps.lease == "none" or not destination.settles:
        expected = [b for b in sent if b not in {d.body for d in held}]
        assert_exactly(bodies(await rest(lab, caps, destination)), expected)
        lab.refused()
        return
    began = time.monotonic()
    found = await rest(lab, caps, destination, expected=sent)
    assert_exactly(bodies(found), sent)
    last = max(a.at_s for a in found)
    lab.measured["returned_s"] = round(last - began, 2)
    assert last - began <= takeover(lab, caps) + 1


@case("ACK-03", kinds=SETTLED, flags=("release", "lease"))
async def test_ack_03_the_unsettled_returns_after_a_graceful_close(lab: Lab) -> None:
    """What a closing consumer holds comes to another one, at once where it can be released, else after its lease."""
    destination = lab.destination()
    caps = await lab.capabilities()
    sent = spread(destination, 3)
    bus = await opened(lab, destination)
    async with bus.consume(destination, group=lab.group) as stream:
        await publish_all(bus, destination, sent)
        held = await take(stream, 3)
        assert_exactly([d.body for d in held], sent)
    closed_s = time.monotonic()
    await bus.close()
    prompt = caps.release != "none" or caps.lease in ("connection", "membership")
    # where it is the release that must do it, waiting for the lease would not prove it
    limit = min(lab.harness.takeover_s, 0.8 * lease_of(caps) or 1e9) if prompt else takeover(lab, caps)
    found = await rest(lab, caps, destination, expected=sent)
    assert_exactly(bodies(found), sent)
    returned_s = max(a.at_s for a in found) - closed_s
    lab.measured["returned_s"] = round(returned_s, 3)
    assert returned_s <= limit, f"{returned_s:.2f} s after close, declared {limit:g} s"
    assert all(a.attempt == 1 for a in found), "a hand-back costs no attempt"


@case("ACK-04", kinds=SETTLED, flags=("lease", "lease_s"))
async def test_ack_04_a_lease_ends_when_declared(lab: Lab) -> None:
    """An abandoned lease hands the message over after `lease_s`, not sooner; without one it stays while connected.

    What a membership holds may move when another consumer joins; the holder's ack then raises SettleLost.
    """
    destination = lab.destination()
    caps = await lab.capabilities()
    publisher = await opened(lab, destination)
    body = body_of(destination, "k0", 1)
    if caps.lease != "timeout":
        await _stays_while_connected(lab, caps, destination, body)
        return
    first = await _receiver(lab, destination)
    await publisher.publish(destination, body)
    async with asyncio.timeout(WAIT_S):
        (held,) = await first.receive_batch(10)
    taken_s = time.monotonic()
    assert held.body == body
    again: list[tuple[float, bytes]] = []
    second = await _receiver(lab, destination)
    tasks = [asyncio.ensure_future(_note_and_accept(r, again)) for r in (first, second)]
    try:
        await eventually(lambda: again, takeover(lab, caps), "the lease must end")
    finally:
        for task in tasks:
            task.cancel()
    after_s = again[0][0] - taken_s
    lab.measured["handed_over_s"] = round(after_s, 2)
    assert again[0][1] == body
    assert after_s >= 0.7 * caps.lease_s, f"handed over after {after_s:.2f} of {caps.lease_s:g} s"


@case("ACK-05", kinds=SETTLED, flags=("lease", "hold_s"))
async def test_ack_05_a_long_handler_keeps_its_message(lab: Lab) -> None:
    """A handler that runs over two leases long, and what waits behind it, runs once and is handed to nobody else.

    What waits may move with a membership that is dealt anew; what runs may not.
    """
    destination = lab.destination()
    caps = await lab.capabilities()
    sent = series(destination, 3, keys=["k0"])
    runs: list[bytes] = []
    done: list[bytes] = []
    moved: list[bytes] = []

    async def slow(value: bytes) -> None:
        runs.append(value)
        if len(runs) == 1:
            await asyncio.sleep(max(2.3 * lease_of(caps), 2 * lab.harness.quiet_s))
        done.append(value)

    async with handling(lab, destination, slow, concurrency=1) as bus:
        await publish_all(bus, destination, sent)
        await eventually(lambda: runs, WAIT_S, "the handler must start")
        if not destination.ordered:  # one that waits for work, if any were handed over
            other = await opened(lab, destination)
            async with lab.collecting(other, destination, window=1) as strays:
                await eventually(lambda: done, 3 * lease_of(caps) + WAIT_S, "the handler must end")
            moved = bodies(real(strays))
            may_move = set(sent) - {runs[0]} if caps.lease == "membership" else set()
            assert set(moved) <= may_move, "it was handed over while its handler ran"
        await eventually(lambda: len(done) + len(moved) >= 3, 3 * lease_of(caps) + WAIT_S, "all must be handled")
        await asyncio.sleep(lab.harness.quiet_s)
    assert_exactly([*runs, *moved], sent)
    assert bodies(await rest(lab, caps, destination)) == []


@case("ACK-06", kinds=SETTLED, flags=("lease",), faults=("cut",))
async def test_ack_06_a_stale_ack_is_named(lab: Lab) -> None:
    """An ack after the delivery was lost either raises SettleLost and it comes again, or settles it for good."""
    destination = lab.destination()
    caps = await lab.capabilities()
    body = body_of(destination, "k0", 1)
    if caps.lease == "timeout":
        bus = await opened(lab, destination)
        async with bus.consume(destination, group=lab.group) as stream:
            await bus.publish(destination, body)
            (stale,) = await take(stream, 1)
            time.sleep(1.4 * caps.lease_s)  # noqa: ASYNC251  # a loop that is blocked extends no lease
            lost = False
            try:
                await stale.ack()
            except SettleLost:
                lost = True
        lab.measured["stale_ack"] = "lost" if lost else "settled"
        await bus.close()
        expected = [body] if lost else []
        assert_exactly(bodies(await rest(lab, caps, destination, expected=expected)), expected)
        return
    other = await opened(lab, destination)
    async with victim(lab, destination) as holder:
        await holder.bus.publish(destination, body)
        (stale,) = await holder.take(1)
        async with other.consume(destination, group=lab.group) as stream:
            await lab.harness.cut()
            if destination.ordered:  # should it come to the same consumer, then behind the stale one
                await _stale(lab, stale)
            waits = [asyncio.ensure_future(s.next(takeover(lab, caps))) for s in (stream, holder.stream)]
            first, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            fresh = first.pop().result()
            for wait in waits:
                wait.cancel()
            assert fresh is not None, "the cut delivery never came again"
            assert fresh.body == body
            if not destination.ordered:
                await _stale(lab, stale)
            await fresh.ack()
            await asyncio.sleep(lab.harness.quiet_s)
        await holder.die()
    assert bodies(await rest(lab, caps, destination)) == []


@case("ACK-07", kinds=SETTLED, flags=("settle",), faults=("cut",))
async def test_ack_07_a_second_ack_harms_nobody(lab: Lab) -> None:
    """Acking twice raises AlreadySettled, and the three siblings in flight stay valid and unrepeated."""
    destination = lab.destination()
    caps = await lab.capabilities()
    async with victim(lab, destination) as holder:
        sent = spread(destination, 4)
        await publish_all(holder.bus, destination, sent)
        first, *siblings = await holder.take(4)
        await first.ack()
        with pytest.raises(AlreadySettled):
            await first.ack()
        assert await holder.stream.next(lab.harness.quiet_s) is None, "a sibling was repeated"
        for sibling in siblings:
            await sibling.ack()
        await asyncio.sleep(lab.harness.quiet_s)
        await holder.die()
    assert bodies(await rest(lab, caps, destination)) == []


@case("ACK-08", kinds=SETTLED, flags=("settle",))
async def test_ack_08_the_first_settlement_wins(lab: Lab) -> None:
    """Of two settlements of one delivery the second raises AlreadySettled and changes nothing."""
    destination = lab.destination()
    caps = await lab.capabilities()
    bus = await opened(lab, destination)
    sent = spread(destination, 5)
    async with bus.consume(destination, group=lab.group) as stream:
        await publish_all(bus, destination, sent)
        held = {d.body: d for d in await take(stream, 5)}
        acked, acked_too, rejected, retried, left = (held[b] for b in sent)
        await acked.ack()
        with pytest.raises(AlreadySettled):
            await acked.retry(0.0)
        await acked_too.ack()
        with pytest.raises(AlreadySettled):
            await acked_too.reject("too late")
        await rejected.reject("no good")
        with pytest.raises(AlreadySettled):
            await rejected.ack()
        await retried.retry(0.15)
        with pytest.raises((AlreadySettled, UsageError)):  # it is held, the next arrival is to be settled
            await retried.ack()
        (again,) = await take(stream, 1)
        assert (again.body, again.attempt) == (retried.body, 2)
        await again.ack()
        if caps.release == "none":
            await left.ack()
        else:
            await left.release()
            with pytest.raises(AlreadySettled):
                await left.ack()
            (again,) = await take(stream, 1, takeover(lab, caps))
            assert again.body == left.body
            await again.ack()
        assert await stream.next(lab.harness.quiet_s) is None
    await bus.close()
    assert bodies(await rest(lab, caps, destination)) == []
    letters = await dead_letters(lab, caps, destination, expected=1)
    assert [d.body for d in letters] == [rejected.body]


@case("ACK-09", kinds=SETTLED, flags=("settle",), faults=("cut",))
async def test_ack_09_settling_some_leaves_the_others(lab: Lab) -> None:
    """Of held deliveries, several down each lane, a half chosen by chance is acked; after an abrupt death exactly the
    rest return."""
    destination = lab.destination()
    caps = await lab.capabilities()
    async with victim(lab, destination) as holder:
        sent = spread(destination, 3 * max(3, lab.harness.lanes))
        acked = random.Random(3).sample(sent, len(sent) // 2)  # behind others and before others, in lanes of any number
        left = [body for body in sent if body not in acked]
        await publish_all(holder.bus, destination, sent)
        for delivery in await holder.take(len(sent)):
            if delivery.body in acked:
                await delivery.ack()
        await asyncio.sleep(lab.harness.quiet_s)
        await holder.die()
    found = await rest(lab, caps, destination, expected=left)
    assert_exactly(bodies(found), left)


@case("ACK-10", kinds=SETTLED, flags=("settle",))
async def test_ack_10_another_task_settles_and_another_thread_is_told(lab: Lab) -> None:
    """Any task may settle; a foreign thread gets UsageError without effect; the sync face takes any thread."""
    destination = lab.destination()
    caps = await lab.capabilities()
    bus = await opened(lab, destination)
    async with bus.consume(destination, group=lab.group) as stream:
        await publish_all(bus, destination, spread(destination, 2))
        by_task, by_thread = await take(stream, 2)
        await asyncio.create_task(by_task.ack())
        with pytest.raises(UsageError):
            await asyncio.to_thread(lambda: asyncio.run(by_thread.ack()))
        assert not by_thread.settled
        await by_thread.ack()
        await asyncio.sleep(lab.harness.quiet_s)
    await bus.publish(destination, body_of(destination, "k1", 100))
    await bus.close()
    await asyncio.to_thread(_settled_across_threads, lab, destination)
    assert bodies(await rest(lab, caps, destination)) == []


@case("ACK-11", kinds=SETTLED, flags=("settle", "lease"), faults=("cut",))
async def test_ack_11_an_ack_on_a_dead_connection_is_an_error(lab: Lab) -> None:
    """Once the connection is known to be lost an ack raises SettleLost, and the message comes again by itself."""
    destination = lab.destination()
    caps = await lab.capabilities()
    async with victim(lab, destination) as holder:
        body = body_of(destination, "k0", 1)
        await holder.bus.publish(destination, body)
        (held,) = await holder.take(1)
        await lab.harness.cut()
        await eventually(lambda: held.session.lost, lab.harness.takeover_s, "the loss must be noticed")
        with pytest.raises(SettleLost):
            await held.ack()
        (again,) = await holder.take(1, takeover(lab, caps))
        assert again.body == body
        await again.ack()
        await asyncio.sleep(lab.harness.quiet_s)
        await holder.die()
    assert bodies(await rest(lab, caps, destination)) == []


@case("ACK-12", kinds=SETTLED, flags=("settle",), faults=("cut",))
async def test_ack_12_an_answered_ack_survives_the_connection(lab: Lab) -> None:
    """Where the broker answers acks, none that was answered is repeated after a cut; else the repeats are measured."""
    lab.require_fault("cut")
    destination = lab.destination()
    caps = await lab.capabilities()
    publisher = await opened(lab, destination)
    # keys of their own, since a broker may hand out few of a key until some are settled; few where a lease runs
    sent = spread(destination, 60 if caps.lease == "timeout" else 300)
    await publish_all(publisher, destination, sent)
    receiver = await _receiver(lab, destination, faulty=True, window=len(sent))
    held: list[Any] = []
    async with asyncio.timeout(WAIT_S):
        while len(held) < len(sent):
            held += await receiver.receive_batch(len(sent))
    answer = receiver.settle_batch([(d.receipt, ACCEPT) for d in held])
    if answer is not None:
        async with asyncio.timeout(WAIT_S):
            assert list(await answer) == []
    await lab.harness.cut()
    with suppress(Exception):
        async with asyncio.timeout(2):
            await receiver.close()
    found = bodies(await rest(lab, caps, destination, beyond_lease=True))
    lab.measured.update(answered=answer is not None, acked=len(held), repeats=len(found))
    assert set(found) <= set(sent)
    assert not repeated(found)
    if answer is not None:
        assert found == [], f"{len(found)} acks that the broker had answered were forgotten"


@case("ACK-13", kinds=SETTLED, flags=("settle",), faults=("cut",))
async def test_ack_13_settled_before_the_handler_is_at_most_once(lab: Lab) -> None:
    """With settle="before" a message whose handler fails or dies never returns."""
    destination = lab.destination()
    if destination.ordered:  # the next of a key would not wait for the handler
        with pytest.raises(UsageError):
            register(lab.bus(), destination, _nothing, group=lab.group, settle="before")
        lab.refused()
        return
    caps = await lab.capabilities()
    runs: list[bytes] = []
    sent = spread(destination, 2)

    async def failing(value: bytes) -> None:
        runs.append(value)
        if len(runs) == 1:
            raise ValueError("the handler fails")
        await asyncio.sleep(60)

    async with handling(lab, destination, failing, faulty=True, settle="before", concurrency=1) as bus:
        for body in sent:
            await bus.publish(destination, body)
        await eventually(lambda: len(runs) >= 2, WAIT_S, "both must be started")
        await asyncio.sleep(lab.harness.quiet_s)
        await lab.harness.cut()
        await bus.close(timeout_s=0.5)
    assert_exactly(runs, sent)
    assert bodies(await rest(lab, caps, destination, beyond_lease=True)) == []


# --- helpers


async def _stale(lab: Lab, delivery: Any) -> None:
    # a broker that never answers acks cannot name it before the loss shows in this process
    await eventually(lambda: delivery.session.lost, lab.harness.takeover_s, "the loss must be noticed")
    with pytest.raises(SettleLost):
        await delivery.ack()


async def _nothing(value: bytes) -> None:
    """A handler that is never run."""


async def _receiver(lab: Lab, destination: Destination[Any], *, faulty: bool = False, window: int = 10) -> Any:
    driver = await lab.driver(lab.harness.fault_backend() if faulty else None)

    async def on_revoke(sessions: object, deadline_s: float) -> None:
        """Nothing to hand over: this test keeps no work."""

    return await driver.open_receiver(destination, lab.group, window, on_revoke)


async def _note_and_accept(receiver: Any, into: list[tuple[float, bytes]]) -> None:
    while True:
        for delivery in await receiver.receive_batch(10):
            into.append((time.monotonic(), delivery.body))
            receiver.settle_batch([(delivery.receipt, ACCEPT)])


async def _stays_while_connected(lab: Lab, caps: Capabilities, destination: Destination[Any], body: bytes) -> None:
    holder = await opened(lab, destination)
    both: list[Arrival] = []
    async with holder.consume(destination, group=lab.group) as stream:
        await holder.publish(destination, body)
        (held,) = await take(stream, 1)
        other = await opened(lab, destination)
        async with other.consume(destination, group=lab.group) as second:
            tasks = [asyncio.ensure_future(drain(s, destination, both)) for s in (stream, second)]
            await asyncio.sleep(2 * lab.harness.quiet_s)
            await silence(lab, holder, destination, both, keys=["k1"])
            for task in tasks:
                task.cancel()
        if real(both):
            assert caps.lease == "membership", "it was handed over although its consumer is connected"
            with pytest.raises(SettleLost):
                await held.ack()
            return
        await held.ack()


def _settled_across_threads(lab: Lab, destination: Destination[Any]) -> None:
    """One message taken by this thread and settled by another, through the sync face."""
    import threading

    settings = from_mapping(lab.harness.settings())
    made: Any = sync_api.Bus(settings)
    with made as bus, bus.consume(destination, group=lab.group) as stream:
        delivery = stream.next(WAIT_S)
        assert delivery is not None
        errors: list[BaseException] = []

        def settle() -> None:
            try:
                delivery.ack()
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=settle)
        thread.start()
        thread.join(WAIT_S)
        assert not errors, errors
        time.sleep(lab.harness.quiet_s)
