"""ORD: order where it is claimed, alone, under failure and under competition; only positions are compared."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter, defaultdict
from typing import Any

import pytest

from messaging_sdk import CapabilityError, Delivery, Queue, Retry, Topic

from ..cases import ALL, ORDERED, SETTLED, case
from ..lab import Kind, Lab, eventually, key_before_colon, refusal_of
from ..worker import Worker
from . import (
    WAIT_S,
    arrived,
    assert_exactly,
    bodies,
    disorder,
    first_times,
    handling,
    key_in,
    number_in,
    opened,
    overlaps,
    publish_all,
    real,
    repeated,
    rest,
    series,
    silence,
    take,
    takeover,
    victim,
)


@case("ORD-01", kinds=ALL, flags=("order",), refusal=True)
async def test_ord_01_one_publishers_order_is_kept(lab: Lab) -> None:
    """One consumer sees one publisher's messages as they were accepted; where not claimed, ordered is refused."""
    destination = lab.destination()
    caps = await lab.capabilities()
    if caps.order == "none" or "tag" in caps.notes:
        await _ordered_is_refused(lab, destination)
        return
    bus = await opened(lab, destination)
    sent = series(destination, 400)
    async with lab.collecting(bus, destination) as arrivals:
        await publish_all(bus, destination, sent[:200])
        await publish_all(bus, destination, sent[200:])
        if destination.settles:
            await arrived(arrivals, len(sent))
        await silence(lab, bus, destination, arrivals)
    seen = bodies(real(arrivals))
    if destination.settles:
        assert_exactly(seen, sent)
    assert seen
    # where ordered, keys are lanes that overtake each other; elsewhere there is one order of all
    assert disorder(seen, per_key=destination.ordered) == []


@case("ORD-02", kinds=ORDERED, flags=("order", "order_competition"))
async def test_ord_02_a_key_is_handled_one_at_a_time_in_order(lab: Lab) -> None:
    """Ten workers with uneven handlers start and finish each key's messages in order, never two of a key at once."""
    destination = lab.destination()
    keys = [f"k{n}" for n in range(8)]
    sent = series(destination, 240, keys=keys)
    started: list[bytes] = []
    finished: list[bytes] = []
    spans: dict[str, list[tuple[float, float]]] = defaultdict(list)
    busy: Counter[int] = Counter()

    async def uneven(value: bytes) -> None:
        began = time.monotonic()
        started.append(value)
        busy[len(started) - len(finished)] += 1
        await asyncio.sleep(lab.random.choice((0, 0.001, 0.008)))
        finished.append(value)
        spans[key_in(value)].append((began, time.monotonic()))

    async with handling(lab, destination, uneven, concurrency=10) as bus:
        await publish_all(bus, destination, sent)
        await eventually(lambda: len(finished) >= len(sent), WAIT_S, "all must be handled")
        await asyncio.sleep(lab.harness.quiet_s)
    assert_exactly(finished, sent)
    assert disorder(started, per_key=True) == []
    assert disorder(finished, per_key=True) == []
    assert overlaps(spans) == []
    lab.measured["at_once"] = max(busy)
    assert max(busy) > 1, "keys must not wait for each other"


@case("ORD-03", kinds=ORDERED, flags=("order",))
async def test_ord_03_a_key_stays_itself_across_publishers(lab: Lab) -> None:
    """Messages of a key keep their key and order although three publishers, the last in another process, sent them."""
    destination = lab.destination()
    reader = await opened(lab, destination)
    sent = series(destination, 120)
    if not lab.lasting:  # else a publish is accepted only when it is consumed
        await _by_three(lab, destination, sent)
    async with lab.collecting(reader, destination) as arrivals:
        if lab.lasting:
            await _by_three(lab, destination, sent)
        await arrived(arrivals, len(sent))
        await silence(lab, reader, destination, arrivals)
    seen = real(arrivals)
    assert_exactly(bodies(seen), sent)
    assert all(a.key == key_in(a.body) for a in seen)
    assert disorder(bodies(seen), per_key=True) == []


@case("ORD-04", kinds=ORDERED, flags=("order_redelivery",))
async def test_ord_04_order_holds_under_retry_and_release(lab: Lab) -> None:
    """A message that fails or is released comes again, marked, before any later one of its key; other keys go on."""
    destination = lab.destination()
    caps = await lab.capabilities()
    sent = series(destination, 60)
    failing = {sent[0], sent[9], sent[30]}
    runs: list[tuple[bytes, int]] = []
    done: list[bytes] = []

    async def handle(value: bytes, delivery: Delivery[bytes]) -> None:
        runs.append((value, delivery.attempt))
        if value in failing and delivery.attempt < 3:
            raise ValueError("not yet")
        done.append(value)

    async with handling(lab, destination, handle, concurrency=4, retry=Retry(5, 0.15, factor=1)) as bus:
        await publish_all(bus, destination, sent)
        await eventually(lambda: len(done) >= len(sent), WAIT_S, "all must be handled")
        await asyncio.sleep(lab.harness.quiet_s)
    expected = [(b, n) for b in sent for n in ((1, 2, 3) if b in failing else (1,))]
    assert sorted(runs) == sorted(expected), "a repeat must be marked as attempt 2, 3"
    assert disorder(done, per_key=True) == []
    if caps.release == "none":
        return
    again = series(destination, 12, keys=["k0", "k1"], start=100)
    bus = await opened(lab, destination)
    seen: list[bytes] = []
    async with bus.consume(destination, group=lab.group, window=10) as stream:
        await publish_all(bus, destination, again)
        (first,) = await take(stream, 1)
        assert first.body in again[:2]  # of one key or the other
        await asyncio.sleep(lab.harness.quiet_s / 2)  # the rest of the key is here too, behind it
        await first.release()
        for _ in again:
            (delivery,) = await take(stream, 1, takeover(lab, caps) + 1)
            seen.append(delivery.body)
            await delivery.ack()
    assert_exactly(seen, again)
    assert disorder(seen, per_key=True) == [], "a released message was overtaken by its own key"


@case("ORD-05", kinds=ORDERED, flags=("order_redelivery",), faults=("cut",))
async def test_ord_05_order_holds_when_the_holder_dies(lab: Lab) -> None:
    """After a consumer with a window of ten died, the next gets each key from its first unsettled message on."""
    destination = lab.destination()
    caps = await lab.capabilities()
    publisher = await opened(lab, destination)
    sent = series(destination, 60)
    await publish_all(publisher, destination, sent)
    acked: list[bytes] = []
    async with victim(lab, destination, window=10) as holder:
        for _ in range(7):
            (delivery,) = await holder.take(1)
            acked.append(delivery.body)
            await delivery.ack()
        held = await holder.take(2)
        await asyncio.sleep(lab.harness.quiet_s)  # recorded by the broker, and the window full again
        await holder.die()
    found = bodies(await rest(lab, caps, destination, expected=[b for b in sent if b not in acked]))
    assert_exactly(found, [b for b in sent if b not in acked])
    assert disorder(acked, per_key=True) == []
    assert disorder(found, per_key=True) == []
    assert {d.body for d in held} <= set(found)


@case("ORD-06", kinds=ORDERED, flags=("order_competition",))
async def test_ord_06_order_holds_while_consumers_come_and_go(lab: Lab) -> None:
    """While consumers join and leave no key is handled in two places at once, or out of order, or twice to its end."""
    destination = lab.destination()
    caps = await lab.capabilities()
    publisher = await opened(lab, destination)
    sent = series(destination, 400)
    finished: list[bytes] = []
    spans: dict[str, list[tuple[float, float]]] = defaultdict(list)
    by: Counter[int] = Counter()
    cut_short: list[bytes] = []

    async def consumer(turn: int, upto: int) -> None:
        async def handle(value: bytes) -> None:
            began = time.monotonic()
            try:
                await asyncio.sleep(0.002)
            except asyncio.CancelledError:
                cut_short.append(value)
                raise
            finished.append(value)
            by[turn] += 1
            spans[key_in(value)].append((began, time.monotonic()))

        async with handling(lab, destination, handle, concurrency=4, window=20):
            await eventually(lambda: len(finished) >= upto, 2 * takeover(lab, caps) + WAIT_S, f"{upto} must be handled")

    feeding = asyncio.ensure_future(publish_all(publisher, destination, sent))
    # always at least one is there: 0 and 1 together, then 1 and 2, then 2 alone
    await asyncio.gather(consumer(0, 120), consumer(1, 260), _later(finished, 100, consumer(2, len(sent))))
    await feeding
    await asyncio.sleep(lab.harness.quiet_s)
    lab.measured.update(shares=[by[n] for n in range(3)], cut_short=len(cut_short))
    assert_exactly(finished, sent)
    assert disorder(finished, per_key=True) == []
    assert overlaps(spans) == []
    assert bodies(await rest(lab, caps, destination)) == []


@case("ORD-07", kinds=ORDERED, flags=("order", "confirm"), faults=("cut",))
async def test_ord_07_order_holds_when_pipelined_sends_are_repeated(lab: Lab) -> None:
    """A connection cut in the middle of 500 pipelined sends loses no accepted message and inverts none of a key."""
    destination = lab.destination()
    caps = await lab.capabilities()
    sent = series(destination, 500)
    cuts = sorted(lab.random.sample(range(50, 450), 2))
    if lab.lasting:  # a publish is accepted only when it is consumed
        reader = await opened(lab, destination)
        async with lab.collecting(reader, destination) as arrivals:
            await _pipelined(lab, destination, sent, cuts)
            await silence(lab, reader, destination, arrivals)
            found = bodies(real(arrivals))
    else:
        await _pipelined(lab, destination, sent, cuts)
        found = bodies(await rest(lab, caps, destination, expected=sent))
    again = repeated(found)
    lab.measured["sent_again"] = again.total()
    assert set(found) == set(sent)
    assert disorder(first_times(found), per_key=True) == []
    if caps.dedup_s:
        assert not again, "stored twice although dedup is claimed"
    assert max(again.values(), default=0) <= len(cuts), "each cut may store a message once more"


@case("ORD-08", kinds=ORDERED, flags=("durable", "order"), faults=("restart",))
async def test_ord_08_order_holds_across_a_broker_restart(lab: Lab) -> None:
    """A restart in the middle of a stream of messages inverts none of a key for the consumer that lived through it."""
    destination = lab.destination()
    caps = await lab.capabilities()
    if caps.durable == "none":
        lab.not_run("nothing survives a restart here, so there is no order to keep: see FLT-04")
    bus = await opened(lab, destination, timeout_s=3 * lab.harness.recovery_s)
    sent = series(destination, 200)
    await asyncio.sleep(lab.harness.settle_before_kill_s)
    async with lab.collecting(bus, destination) as arrivals:
        await publish_all(bus, destination, sent[:100])
        feeding = asyncio.ensure_future(publish_all(bus, destination, sent[100:150]))
        await lab.harness.restart()
        await feeding
        await publish_all(bus, destination, sent[150:])
        await arrived(arrivals, len(sent), lab.harness.recovery_s + takeover(lab, caps))
        await eventually(lambda: not set(sent) - set(bodies(arrivals)), lab.harness.recovery_s, "all must arrive")
        await silence(lab, bus, destination, arrivals, wait_s=lab.harness.recovery_s)
    found = bodies(real(arrivals))
    lab.measured["repeats"] = repeated(found).total()
    assert set(found) == set(sent)
    assert disorder(first_times(found), per_key=True) == []


@case("ORD-09", kinds=SETTLED, flags=("order",), refusal=False)
async def test_ord_09_each_of_five_publishers_keeps_its_order(lab: Lab) -> None:
    """Of five publishers at once each one's own sequence is kept, per key where ordered, in every group."""
    groups = ("g1", "g2")
    destination = lab.destination(groups=groups)
    caps = await lab.capabilities()
    if caps.order == "none":
        await _ordered_is_refused(lab, destination)
        return
    sent = [series(destination, 60, keys=["k0", "k1"], start=1000 * p) for p in range(5)]
    publishers = [await opened(lab, destination) for _ in sent]
    consumer = await opened(lab, destination)
    views: list[list[bytes]] = []
    for group in groups if lab.kind.tag == "topic" else (None,):
        if not views:
            await asyncio.gather(
                *(publish_all(bus, destination, part) for bus, part in zip(publishers, sent, strict=True))
            )
        async with lab.collecting(consumer, destination, group=group) as arrivals:
            await arrived(arrivals, 300)
            await silence(lab, consumer, destination, arrivals)
        views.append(bodies(real(arrivals)))
    for view in views:
        assert_exactly(view, list(itertools.chain(*sent)))
        for p in range(5):
            mine = [b for b in view if number_in(b) // 1000 == p]
            assert disorder(mine, per_key=destination.ordered) == [], f"publisher {p}"
    if destination.ordered:
        for key in ("k0", "k1"):
            sequences = [[b for b in view if key_in(b) == key] for view in views]
            # measured, not required: what two publishers send at once has no order that was promised
            lab.measured[f"groups_agree_{key}"] = all(s == sequences[0] for s in sequences)


@case("ORD-10", kinds=("queue", "topic"), flags=("compete",))
async def test_ord_10_load_without_keys_spreads(lab: Lab) -> None:
    """Of three consumers none gets all of a load that has no keys."""
    destination = lab.destination()
    caps = await lab.capabilities()
    if caps.compete in ("none", "standby"):
        lab.not_run("consumers do not share here")
    publisher = await opened(lab, destination)
    sent = series(destination, 300)
    by: Counter[int] = Counter()
    done: list[bytes] = []

    def consumer(n: int) -> Any:
        async def handle(value: bytes) -> None:
            await asyncio.sleep(0.001)
            by[n] += 1
            done.append(value)

        return handling(lab, destination, handle, window=10)

    async with consumer(0), consumer(1), consumer(2):
        await publish_all(publisher, destination, sent)
        await eventually(lambda: len(done) >= len(sent), WAIT_S, "all must be handled")
        end = time.monotonic() + lab.harness.takeover_s  # one that came a moment ago may still wait for its share
        while not all(by[n] for n in range(3)) and time.monotonic() < end:
            more = series(destination, 30, start=len(sent))
            sent.extend(more)
            await publish_all(publisher, destination, more)
            await eventually(lambda: len(done) >= len(sent), WAIT_S, "all must be handled")
        await asyncio.sleep(lab.harness.quiet_s)
    lab.measured["shares"] = [by[n] for n in range(3)]
    assert_exactly(done, sent)
    assert all(by[n] > 0 for n in range(3)), f"shares {by}"


# --- helpers


async def _pipelined(lab: Lab, destination: Any, sent: list[bytes], cuts: list[int]) -> None:
    bus = await opened(lab, destination, faulty=True)
    async with bus.publisher(destination, window=200) as publisher:
        for n, body in enumerate(sent):
            await publisher.send(body)
            if n % 20 == 0:
                await asyncio.sleep(0)
            if n in cuts:
                await lab.harness.cut()
    assert (publisher.sent, publisher.failed) == (len(sent), []), "what is unsure is sent again"


async def _by_three(lab: Lab, destination: Any, sent: list[bytes]) -> None:
    """A third of `sent` by each of three publishers, one after the other; the last in a process of its own."""
    third = len(sent) // 3
    first = await opened(lab, destination)
    await publish_all(first, destination, sent[:third])
    await first.close()
    await publish_all(await opened(lab, destination), destination, sent[third : 2 * third])
    sent = sent[2 * third :]
    if "subprocess" not in lab.harness.faults:
        await publish_all(await opened(lab, destination), destination, sent)
        return
    with Worker(lab, destination, "publish", start=number_in(sent[0]), count=len(sent)) as worker:
        await worker.until("published", len(sent))
        await worker.ended()


async def _later(finished: list[bytes], count: int, work: Any) -> None:
    """Begin `work` when `count` are done."""
    await eventually(lambda: len(finished) >= count, 3 * WAIT_S, f"{count} must be handled")
    await work


async def _ordered_is_refused(lab: Lab, destination: Any) -> None:
    """Asking for order where none is promised fails when the bus opens. A Signal cannot ask.

    Where ordered=True is another thing on the broker, which promises it, there is nothing to refuse.
    """
    if lab.kind.settles:
        name = lab.fresh_name()
        wanted: Any = (
            Queue(name, bytes, key=key_before_colon, ordered=True)
            if lab.kind.tag == "queue"
            else Topic(name, bytes, key=key_before_colon, ordered=True, groups=["g1"])
        )
        ordered = Kind(f"{lab.kind.tag}/ordered")
        if not refusal_of((await lab.driver()).capabilities(wanted), ordered):
            lab.not_run(f"no order is promised here; ordered=True is offered, which {ordered.name} proves")
        bus = lab.bus()
        bus.declare(wanted)
        with pytest.raises(CapabilityError):
            await bus.open()
    lab.refused()
