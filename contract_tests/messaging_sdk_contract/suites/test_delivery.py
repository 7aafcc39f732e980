"""DEL: what is published arrives, exactly as often as promised, and every send says what became of it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
from collections import Counter
from contextlib import suppress
from typing import Any

import pytest

from messaging_sdk import (
    CapabilityError,
    Closed,
    ConnectionLost,
    Destination,
    MessagingError,
    Needs,
    NotFound,
    Outcome,
    Publisher,
    Sent,
    SettleLost,
    UsageError,
)
from messaging_sdk import sync as sync_api
from messaging_sdk.config import from_mapping
from messaging_sdk.model import Outgoing, SendResult
from messaging_sdk.spi import Outcomes

from ..cases import SETTLED, case
from ..lab import Lab, eventually, key_before_colon
from ..worker import Worker
from . import (
    KEYS,
    WAIT_S,
    arrived,
    assert_exactly,
    bodies,
    body_of,
    opened,
    publish_all,
    real,
    repeated,
    rest,
    series,
    silence,
    take,
)


@case("DEL-01")
async def test_del_01_a_published_message_arrives_once(lab: Lab) -> None:
    """One published message reaches a listening consumer once, with its body, id and key."""
    destination = lab.destination(key=key_before_colon)
    bus = await opened(lab, destination)
    async with lab.collecting(bus, destination) as arrivals:
        body = body_of(destination, "k1", 1)
        sent = await bus.publish(destination, body)
        await arrived(arrivals, 1)
        await silence(lab, bus, destination, arrivals)
    assert [(a.body, a.id, a.key) for a in real(arrivals)] == [(body, sent.id, "k1")]


@case("DEL-02", flags=("settle",))
async def test_del_02_every_message_arrives_exactly_once(lab: Lab) -> None:
    """Without faults the multiset of arrived (id, body) equals what was sent; a Signal may have gaps, counted."""
    destination = lab.destination()
    bus = await opened(lab, destination)
    sent = {f"{destination.name}-{n}": b for n, b in enumerate(series(destination, 400))}
    async with lab.collecting(bus, destination) as arrivals:
        async with bus.publisher(destination) as publisher:
            for id, body in sent.items():
                await publisher.send(body, id=id)
                if not destination.settles and len(arrivals) % 20 == 0:
                    await asyncio.sleep(0)
        assert (publisher.sent, publisher.failed) == (len(sent), [])
        if destination.settles:
            await arrived(arrivals, len(sent))
        await silence(lab, bus, destination, arrivals)
    got = Counter((a.id, a.body) for a in real(arrivals))
    if destination.settles:
        assert got == Counter(sent.items()), "the ledger differs from what was sent"
        return
    assert set(got) <= set(sent.items()), "a foreign or altered message arrived"
    assert not repeated(bodies(real(arrivals))), "a Signal must not repeat"
    lab.measured["gap"] = len(sent) - len(got)
    assert lab.measured["gap"] <= len(sent) // 10, "an idle listener lost more than a tenth"


@case("DEL-03", flags=("backlog",))
async def test_del_03_a_backlog_waits_or_is_honestly_gone(lab: Lab) -> None:
    """What is published before the first consumer waits where claimed, and else must not arrive; after it, it does."""
    destination = lab.destination()
    caps = await lab.capabilities()
    publisher = await opened(lab, destination)
    early = series(destination, 20)
    await publish_all(publisher, destination, early)
    consumer = await opened(lab, destination)
    async with lab.collecting(consumer, destination) as arrivals:
        # at once, with nothing in between: listening must be true when the block is entered
        late = body_of(destination, "k0", 100)
        await publisher.publish(destination, late)
        await arrived(arrivals, 1 + len(early) * caps.backlog)
        await silence(lab, publisher, destination, arrivals)
    assert_exactly(bodies(real(arrivals)), [*early, late] if caps.backlog else [late])
    if not caps.backlog:
        lab.refused()
    for n in range(5):
        async with lab.collecting(consumer, destination) as arrivals:
            await publisher.publish(destination, body_of(destination, "k0", 200 + n))
            await arrived(arrivals, 1)
        assert_exactly(bodies(arrivals), [body_of(destination, "k0", 200 + n)])


@case("DEL-04", kinds=SETTLED, flags=("confirm",), faults=("cut",))
async def test_del_04_a_publish_that_returned_is_stored(lab: Lab) -> None:
    """What publish returned for arrives, although its publisher was killed right after; else the need is refused."""
    destination = lab.destination()
    caps = await lab.capabilities()
    if caps.confirm not in ("stored", "settled"):
        await _need_is_refused(lab, destination, Needs(confirm="stored"))
        return
    provisioner = await opened(lab, destination)
    if caps.confirm == "settled":  # then nothing is confirmed unless somebody consumes meanwhile
        async with lab.collecting(provisioner, destination) as arrivals:
            confirmed, unsure = await _confirmed_before_its_death(lab, destination)
            await silence(lab, provisioner, destination, arrivals)
            found = bodies(real(arrivals))
    else:
        confirmed, unsure = await _confirmed_before_its_death(lab, destination)
        await provisioner.close()
        found = bodies(await rest(lab, caps, destination, expected=confirmed))
    assert_exactly([b for b in found if b not in unsure], confirmed)
    assert all(n <= 1 for n in Counter(found).values()), "nothing was sent twice"
    lab.measured["confirmed"] = len(confirmed)


@case("DEL-05", flags=("route_error",))
async def test_del_05_a_message_that_nobody_takes_is_visible(lab: Lab) -> None:
    """A publish to what does not exist is rejected with NotFound where claimed; a Topic without groups is fine."""
    caps = await lab.capabilities()
    known = lab.destination()
    await (await opened(lab, known)).close()
    bus = lab.bus({**lab.harness.backend(), "provision": "none"})
    await bus.open()
    absent = lab.destination()
    if lab.kind.tag == "signal":
        assert isinstance(await bus.publish(absent, b"to nobody"), Sent)
    elif caps.route_error:
        with pytest.raises(NotFound) as caught:
            await bus.publish(absent, body_of(absent, "k0", 1), timeout_s=10)
        assert caught.value.outcome is Outcome.REJECTED
    else:
        await bus.publish(absent, body_of(absent, "k0", 1), timeout_s=10)
        lab.refused()
    if lab.kind.tag == "topic":
        lonely = lab.destination(groups=())
        assert isinstance(await (await opened(lab, lonely)).publish(lonely, b"to nobody"), Sent)
    if lab.kind.settles:
        body = body_of(known, "k0", 2)
        await bus.publish(known, body)  # the connection is still good
        assert_exactly(bodies(await rest(lab, caps, known, expected=[body])), [body])


@case("DEL-06")
async def test_del_06_publish_after_close_fails_at_once(lab: Lab) -> None:
    """After close a publish raises Closed within half a second, and nothing of it arrives."""
    destination = lab.destination()
    other = await opened(lab, destination)
    async with lab.collecting(other, destination) as arrivals:
        bus = await opened(lab, destination)
        async with bus.publisher(destination) as publisher:
            pass
        with pytest.raises((Closed, UsageError)):  # its block was left: never usable again
            await publisher.send(body_of(destination, "k0", 1))
        await bus.close()
        began = time.monotonic()
        with pytest.raises(Closed) as caught:
            await bus.publish(destination, body_of(destination, "k0", 2))
        assert time.monotonic() - began < 0.5
        assert caught.value.outcome is Outcome.REJECTED
        await silence(lab, other, destination, arrivals)
    assert not real(arrivals), "a message arrived whose publish was refused"


@case("DEL-07", flags=("confirm",))
async def test_del_07_close_flushes_or_fails_each_publish(lab: Lab) -> None:
    """Each publish under way when the bus closes has an outcome, and what arrives agrees with it."""
    destination = lab.destination()
    caps = await lab.capabilities()
    other = await opened(lab, destination)
    async with lab.collecting(other, destination) as arrivals:
        bus = await opened(lab, destination, lasting=False)
        sent = series(destination, 1000)
        tasks = [asyncio.ensure_future(bus.publish(destination, body)) for body in sent]
        for _ in range(lab.random.randrange(1, 6)):
            await asyncio.sleep(0)
        await bus.close()
        async with asyncio.timeout(WAIT_S):
            results = await asyncio.gather(*tasks, return_exceptions=True)
        await silence(lab, other, destination, arrivals)
        found = bodies(real(arrivals))
    told = [_told(result) for result in results]
    ok = [b for b, outcome in zip(sent, told, strict=True) if outcome is Outcome.OK]
    gone = {b for b, outcome in zip(sent, told, strict=True) if outcome is Outcome.REJECTED}
    lab.measured.update({outcome.value: n for outcome, n in Counter(told).items()})
    assert not repeated(found), "close sent something twice"
    assert not gone & set(found), "a rejected message arrived"
    assert set(found) <= set(sent)
    if destination.settles and caps.confirm != "none":
        assert set(ok) <= set(found), f"{len(set(ok) - set(found))} accepted messages are lost"


@case("DEL-08", kinds=SETTLED, flags=("confirm",), faults=("cut",))
async def test_del_08_a_lost_connection_never_means_ok(lab: Lab) -> None:
    """Cut off before its confirm a send is unsure, never OK or rejected by guess; without a broker it is sent again."""
    destination = lab.destination()
    caps = await lab.capabilities()
    if lab.brokerless:
        await _cut_between_peers(lab, destination)
        return
    if caps.confirm != "stored":
        await _need_is_refused(lab, destination, Needs(confirm="stored"))
        return
    lab.require_fault("cut")
    await (await opened(lab, destination)).close()
    ok: list[bytes] = []
    rejected: set[bytes] = set()
    unsure: set[bytes] = set()
    for turn in range(4):
        for body, result in await _cut_off(lab, destination, turn):
            if result.outcome is Outcome.OK:
                ok.append(body)
            else:
                assert result.error is not None
                (rejected if result.outcome is Outcome.REJECTED else unsure).add(body)
    found = bodies(await rest(lab, caps, destination, expected=ok))
    lab.measured.update(ok=len(ok), unsure=len(unsure), stored_unsure=len(unsure & set(found)))
    assert not rejected & set(found), "a rejected message is stored"
    assert set(found) <= set(ok) | unsure
    assert not repeated(found), "nothing was sent twice"


@case("DEL-09", kinds=SETTLED, flags=("dedup_s",))
async def test_del_09_the_same_id_again_is_stored_as_declared(lab: Lab) -> None:
    """A message published again with its id is stored once where dedup is claimed, and else exactly twice."""
    destination = lab.destination()
    caps = await lab.capabilities()
    bus = await opened(lab, destination)
    body = body_of(destination, "k0", 1)
    for _ in range(2):
        sent = await bus.publish(destination, body, id=f"{destination.name}-again")
        assert sent.id == f"{destination.name}-again"
    copies = 1 if caps.dedup_s else 2
    found = await rest(lab, caps, destination, expected=[body] * copies)
    assert [(a.body, a.id) for a in found] == [(body, f"{destination.name}-again")] * copies
    if not caps.dedup_s:
        await _need_is_refused(lab, destination, Needs(dedup_s=0.1))


@case("DEL-10")
async def test_del_10_a_shared_publisher_is_safe(lab: Lab) -> None:
    """Fifty tasks share a publisher whose window is far too small and all proceed; a foreign thread is refused."""
    destination = lab.destination()
    bus = await opened(lab, destination)
    sent = series(destination, 300)
    async with lab.collecting(bus, destination) as arrivals:
        async with bus.publisher(destination, window=3) as publisher:

            async def send(part: list[bytes]) -> None:
                for body in part:
                    await publisher.send(body)

            async with asyncio.timeout(WAIT_S):  # a lost wake-up of a sender that waits for space ends here
                await asyncio.gather(*(send(sent[n::50]) for n in range(50)))
            stray = asyncio.get_running_loop().run_in_executor(
                None, lambda: asyncio.run(_send_one(publisher, destination))
            )
            with pytest.raises(UsageError):
                await stray
        assert (publisher.sent, publisher.failed) == (len(sent), [])
        await arrived(arrivals, len(sent))
        assert_exactly(bodies(real(arrivals)), sent)
        threaded = series(destination, 160, start=1000)
        await asyncio.to_thread(_send_from_threads, lab, destination, threaded)
        await arrived(arrivals, len(sent) + len(threaded))
        await silence(lab, bus, destination, arrivals)
    assert_exactly(bodies(real(arrivals)), [*sent, *threaded])


@case("DEL-11")
async def test_del_11_a_cancelled_publish_leaves_no_wreck(lab: Lab) -> None:
    """Of publishes cancelled at random points each message arrives at most once, and what returned did."""
    destination = lab.destination()
    bus = await opened(lab, destination)
    sent = series(destination, 200)
    async with lab.collecting(bus, destination) as arrivals:
        tasks = []
        for body in sent:
            tasks.append(asyncio.ensure_future(bus.publish(destination, body)))
            if lab.random.random() < 0.3:
                await asyncio.sleep(lab.random.choice((0, 0, 0.001)))
            lab.random.choice(tasks).cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        returned = [b for b, r in zip(sent, results, strict=True) if isinstance(r, Sent)]
        await bus.publish(destination, body_of(destination, "k0", 999))
        await arrived(arrivals, 1 + len(returned) * destination.settles)
        await silence(lab, bus, destination, arrivals)
    found = bodies(real(arrivals))
    lab.measured.update(returned=len(returned), arrived=len(found) - 1)
    assert all(isinstance(r, Sent | asyncio.CancelledError) for r in results)
    assert not repeated(found)
    assert set(found) <= {*sent, body_of(destination, "k0", 999)}
    assert body_of(destination, "k0", 999) in found, "the bus no longer works"
    if destination.settles:
        assert set(returned) <= set(found)


# --- helpers


async def _confirmed_before_its_death(lab: Lab, destination: Destination[Any]) -> tuple[list[bytes], set[bytes]]:
    """What publish returned for in a process that was killed then, and what it had under way."""
    if "subprocess" in lab.harness.faults:
        with Worker(lab, destination, "publish") as worker:
            await worker.until("published", 1)
            await worker.until("published", len(worker.events()) + lab.random.randrange(20, 60))
            worker.kill()
            confirmed = worker.bodies("published")
        return confirmed, {body_of(destination, KEYS[len(confirmed) % 4], len(confirmed))}
    lab.require_fault("cut")
    confirmed = []
    for n in range(5):
        bus = await opened(lab, destination, faulty=True)
        body = body_of(destination, "k0", n)
        await bus.publish(destination, body)
        await lab.harness.cut()
        confirmed.append(body)
        await bus.close(timeout_s=0.5)
    return confirmed, set()


async def _need_is_refused(lab: Lab, destination: Destination[Any], needs: Needs) -> None:
    bus = lab.bus(needs=needs)
    bus.declare(destination)
    with pytest.raises(CapabilityError):
        await bus.open()
    lab.refused()


async def _cut_off(lab: Lab, destination: Destination[Any], turn: int) -> list[tuple[bytes, SendResult]]:
    """Give 200 messages to a Sender, cut its connection, and return each with its one outcome."""
    driver = await lab.driver(lab.harness.fault_backend())
    sender = await driver.open_sender(destination)
    sent = series(destination, 200, start=1000 * turn)
    told: list[tuple[int, SendResult]] = []
    for at in (0, 100):

        def on_outcomes(chunk: Outcomes, first: int = at) -> None:
            told.extend((first + index, result) for index, result in chunk)

        sender.send_batch([_outgoing(b) for b in sent[at : at + 100]], on_outcomes)
    if turn:
        await asyncio.sleep(lab.random.uniform(0, 0.01 * turn))
    await lab.harness.cut()
    await eventually(lambda: len(told) >= len(sent), WAIT_S, "every send has an outcome")
    assert sorted(index for index, _ in told) == list(range(len(sent))), "exactly one outcome each"

    def refuses() -> bool:
        try:
            sender.send_batch([_outgoing(body_of(destination, "k0", 9999))], lambda _: None)
        except ConnectionLost:
            return True
        return False

    if any(result.outcome is not Outcome.OK for _, result in told):  # else nothing was under way that could be lost
        await eventually(refuses, WAIT_S, "a lost sender takes no more, from the moment it knows")
    return [(sent[index], result) for index, result in told]


async def _cut_between_peers(lab: Lab, destination: Destination[Any]) -> None:
    """Nothing is told of a send before it is settled; a cut only makes it come again, and the sender goes on."""
    reader = await opened(lab, destination)
    sent = series(destination, 200)
    driver = await lab.driver(lab.harness.fault_backend())
    sender = await driver.open_sender(destination)
    told: list[tuple[int, SendResult]] = []
    async with reader.consume(destination, group=lab.group, window=50) as stream:
        for at in (0, 100):

            def on_outcomes(chunk: Outcomes, first: int = at) -> None:
                told.extend((first + index, result) for index, result in chunk)

            sender.send_batch([_outgoing(b) for b in sent[at : at + 100]], on_outcomes)
        held = await take(stream, 4)  # one of each key
        await lab.harness.cut()
        assert not told, "OK for what nobody has settled"
        await eventually(lambda: all(d.session.lost for d in held), lab.harness.takeover_s, "the cut must be noticed")
        for delivery in held:
            with pytest.raises(SettleLost):
                await delivery.ack()
        found = [d.body for d in held]
        deadline = time.monotonic() + 2 * WAIT_S
        while len(told) < len(sent):
            assert time.monotonic() < deadline, f"{len(told)} of {len(sent)} have an outcome"
            delivery = await stream.next(0.2)
            if delivery is None:
                continue
            found.append(delivery.body)
            with suppress(SettleLost):
                await delivery.ack()
            await asyncio.sleep(0)
    assert sorted(index for index, _ in told) == list(range(len(sent))), "exactly one outcome each"
    assert {result.outcome for _, result in told} == {Outcome.OK}
    assert set(found) == set(sent)
    lab.measured["again"] = repeated(found).total()
    await sender.close()


def _told(result: object) -> Outcome:
    if isinstance(result, Sent):
        return Outcome.OK
    assert isinstance(result, MessagingError), f"not an error of ours: {result!r}"
    outcome = result.outcome
    assert outcome is Outcome.REJECTED or outcome is Outcome.INDETERMINATE, f"no outcome: {result!r}"
    return outcome


def _outgoing(body: bytes) -> Outgoing:
    return Outgoing(body, body.decode(), key_before_colon(body), created_s=time.time())


async def _send_one(publisher: Publisher[bytes], destination: Destination[Any]) -> None:
    await publisher.send(body_of(destination, "k0", 5000))


def _send_from_threads(lab: Lab, destination: Destination[Any], sent: list[bytes]) -> None:
    settings = from_mapping(lab.harness.settings())
    with sync_api.Bus(settings) as bus, concurrent.futures.ThreadPoolExecutor(8) as threads:
        parts = [sent[n::8] for n in range(8)]
        for done in [threads.submit(_send_part, bus, destination, part) for part in parts]:
            done.result(WAIT_S)
        time.sleep(lab.harness.quiet_s)  # where OK is not "stored" a close may be too early: see DEL-07


def _send_part(bus: sync_api.Bus, destination: Destination[Any], part: list[bytes]) -> None:
    for body in part:
        bus.publish(destination, body)
