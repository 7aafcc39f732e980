"""RED: what fails runs again as asked, ends in the dead letters exactly once, and never vanishes."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any

import pytest
from pydantic import BaseModel

from messaging_sdk import (
    CapabilityError,
    MessagingError,
    Reject,
    Retry,
    RetryLater,
)
from messaging_sdk.spi import ACCEPT, Disposition

from ..cases import ALL, SETTLED, TOPICS, case
from ..lab import Lab, eventually
from . import (
    WAIT_S,
    arrived,
    assert_exactly,
    bodies,
    body_of,
    dead_letters,
    dead_queue,
    disorder,
    handling,
    key_in,
    opened,
    publish_all,
    real,
    register,
    rest,
    series,
    silence,
    spread,
    take,
    takeover,
    victim,
)


class Order(BaseModel):
    """A typed body, so that garbage cannot be decoded."""

    customer: str
    amount: int


@case("RED-01", kinds=SETTLED, flags=("release",))
async def test_red_01_release_hands_back_at_once(lab: Lab) -> None:
    """A released delivery comes again, at once and as attempt 1; where it cannot be, release is refused."""
    destination = lab.destination()
    caps = await lab.capabilities()
    bus = await opened(lab, destination)
    async with bus.consume(destination, group=lab.group) as stream:
        body = body_of(destination, "k0", 1)
        await bus.publish(destination, body)
        (first,) = await take(stream, 1)
        if caps.release == "none":
            with pytest.raises(CapabilityError):
                await first.release()
            await first.ack()  # the refusal did not settle it
            lab.refused()
        else:
            began = time.monotonic()
            await first.release()
            (again,) = await take(stream, 1, lab.harness.takeover_s)
            lab.measured["returned_s"] = round(time.monotonic() - began, 3)
            assert (again.body, again.attempt) == (body, 1)
            await again.ack()
        assert await stream.next(lab.harness.quiet_s) is None
    await bus.close()
    assert bodies(await rest(lab, caps, destination)) == []


@case("RED-02", kinds=SETTLED, flags=("count",), faults=("cut",))
async def test_red_02_the_broker_counts_as_declared(lab: Lab) -> None:
    """After each death the delivery's count is 1, 2, 3, or its flag False, True, True, or nothing, as declared."""
    destination = lab.destination()
    caps = await lab.capabilities()
    body = body_of(destination, "k0", 1)
    await (await opened(lab, destination)).publish(destination, body)
    counts: list[int | None] = []
    flags: list[bool | None] = []
    for turn in range(3):
        async with victim(lab, destination) as holder:
            (delivery,) = await holder.take(1, takeover(lab, caps) + 1)
            assert delivery.body == body
            counts.append(delivery.deliveries)
            flags.append(delivery.redelivered)
            if turn == 2:
                await delivery.ack()
                await asyncio.sleep(lab.harness.quiet_s)
            await holder.die()
    if caps.count == "exact":
        assert counts == [1, 2, 3]
    else:
        assert counts == [None, None, None], "a count that is not kept must not be made up"
        lab.refused()
    if caps.count == "flag":
        assert flags == [False, True, True]


@case("RED-03", kinds=SETTLED, flags=("release", "hold_s"))
async def test_red_03_a_delay_is_neither_shorter_nor_much_longer(lab: Lab) -> None:
    """A retry, and the broker's delayed release, come after their delay and soon; a longer hold is refused."""
    destination = lab.destination()
    caps = await lab.capabilities()
    bus = await opened(lab, destination)
    delay_s = 0.35
    async with bus.consume(destination, group=lab.group) as stream:
        await bus.publish(destination, body_of(destination, "k0", 1))
        (first,) = await take(stream, 1)
        began = time.monotonic()
        await first.retry(delay_s)
        (again,) = await take(stream, 1)
        after_s = time.monotonic() - began
        assert again.attempt == 2
        await again.ack()
    assert delay_s * 0.98 <= after_s <= delay_s + 3, f"{after_s:.3f} s instead of {delay_s:g}"
    lab.measured["retry_s"] = round(after_s, 3)
    if caps.release == "delay":
        lab.measured["release_s"] = await _released_after(lab, destination, delay_s)
    elif caps.hold_s < 1e6:  # a policy that fits neither a hold nor the broker
        bus = lab.bus()
        register(bus, destination, _nothing, group=lab.group, retry=Retry(3, caps.hold_s, max=2 * caps.hold_s))
        with pytest.raises(CapabilityError):
            await bus.open()


@case("RED-04", kinds=SETTLED)
async def test_red_04_no_hot_loop_by_default(lab: Lab) -> None:
    """A handler that always fails runs five times with growing pauses by default, then no more."""
    destination = lab.destination()
    runs: list[float] = []

    async def failing(value: bytes) -> None:
        runs.append(time.monotonic())
        raise ValueError("always")

    dead_queue(lab, destination)
    async with handling(lab, destination, failing) as bus:
        await bus.publish(destination, body_of(destination, "k0", 1))
        await eventually(lambda: bus.stats(destination).dead_lettered, WAIT_S, "it must be given up")
        await asyncio.sleep(lab.harness.quiet_s)
    assert len(runs) == 5
    gaps = [b - a for a, b in itertools.pairwise(runs)]
    assert all(gap >= floor for gap, floor in zip(gaps, (0.09, 0.18, 0.36, 0.72), strict=True)), gaps


@case("RED-05", kinds=SETTLED)
async def test_red_05_a_failing_message_does_not_starve_others(lab: Lab) -> None:
    """While one message waits for its retry the rest is handled; where ordered only its own key waits, in order."""
    destination = lab.destination()
    caps = await lab.capabilities()
    poison = body_of(destination, "k0", 0)
    sent = [poison, *series(destination, 100, start=1)]
    hold_s = max(4.0, WAIT_S / 6)  # a hundred messages, each of a request or three, pass on a busy machine
    done: list[bytes] = []
    poison_runs: list[int] = []  # how many were done when it ran

    async def handle(value: bytes) -> None:
        if value == poison:
            poison_runs.append(len(done))
            if len(poison_runs) < 2:
                raise ValueError("not yet")
        done.append(value)

    waiting = [b for b in sent if destination.ordered and key_in(b) == "k0"] or [poison]
    async with handling(lab, destination, handle, concurrency=1, retry=Retry(5, hold_s, factor=1)) as bus:
        # beside the case: where ok means settled they return only when all is over
        feeding: list[asyncio.Future[Any]] = [asyncio.ensure_future(bus.publish(destination, poison))]
        await eventually(lambda: poison_runs, WAIT_S, "it must run")
        feeding.append(asyncio.ensure_future(publish_all(bus, destination, sent[1:])))
        others = len(sent) - len(waiting)
        await eventually(lambda: len(done) >= others, 0.9 * hold_s, "the others must not wait for the retry", 0.001)
        assert len(poison_runs) == 1
        assert not set(done) & set(waiting)
        await eventually(lambda: len(done) >= len(sent), WAIT_S, "all must be handled")
        await asyncio.gather(*feeding)
        await asyncio.sleep(lab.harness.quiet_s)
    assert_exactly(done, sent)
    assert poison_runs == [0, others]
    if destination.ordered:
        assert disorder(done, per_key=True) == []
    assert bodies(await rest(lab, caps, destination)) == []


@case("RED-06", kinds=SETTLED)
async def test_red_06_used_up_attempts_end_in_the_dead_letters_once(lab: Lab) -> None:
    """A message that always fails runs exactly that often, is dead-lettered once, and is gone from its source."""
    destination = lab.destination()
    caps = await lab.capabilities()
    sent = spread(destination, 3)
    runs: list[bytes] = []

    async def failing(value: bytes) -> None:
        runs.append(value)
        if value == sent[1]:
            raise RetryLater(0.05, "asked to")
        if value == sent[2]:
            raise ValueError("always")

    dead_queue(lab, destination)
    async with handling(lab, destination, failing, retry=Retry(3, 0.02)) as bus:
        await publish_all(bus, destination, sent)
        await eventually(lambda: bus.stats(destination).dead_lettered >= 2, WAIT_S, "both must be given up")
        await asyncio.sleep(lab.harness.quiet_s)
    assert_exactly(runs, [sent[0], *[sent[1]] * 3, *[sent[2]] * 3])
    letters = await dead_letters(lab, caps, destination, expected=2)
    assert_exactly([d.body for d in letters], sent[1:])
    assert {d.provenance["reason"] for d in letters} == {"attempts"}
    assert bodies(await rest(lab, caps, destination)) == []


@case("RED-07", kinds=SETTLED, flags=("headers",))
async def test_red_07_a_dead_letter_tells_its_story(lab: Lab) -> None:
    """A dead letter has the message's exact body, id and headers, and why, whence, how often and when it failed."""
    destination = lab.destination()
    caps = await lab.capabilities()
    if caps.headers is None:
        lab.not_run("no headers, so there is nothing to write provenance into")
    rejected, failed, garbage = body_of(destination, "k0", 1), body_of(destination, "k1", 2), b"k2:\xff\x00\xfe"
    headers = {"x-trace": "abc-123", "x-kind": "order"}

    async def failing(value: bytes) -> None:
        if value == failed:
            raise ValueError("no such customer")
        raise Reject("the amount must be positive")

    dead_queue(lab, destination)
    began = time.time()
    ids = {}
    async with handling(lab, destination, failing, retry=Retry(2, 0.02)) as bus:
        for body in (rejected, failed, garbage):
            ids[body] = (await bus.publish(destination, body, headers=headers)).id
        await eventually(lambda: bus.stats(destination).dead_lettered >= 3, WAIT_S, "all must be given up")
    letters = {d.body: d for d in await dead_letters(lab, caps, destination, expected=3)}
    assert set(letters) == {rejected, failed, garbage}, "a body was altered"
    for body, letter in letters.items():
        story = letter.provenance
        assert dict(letter.headers) == headers
        assert letter.id == ids[body]
        assert story["source"] == destination.name
        assert story.get("group") == lab.group
        assert story["reason"] == ("attempts" if body == failed else "rejected")
        assert story["attempts"] == ("2" if body == failed else "1")
        assert ("no such customer" if body == failed else "must be positive") in story["error"]
        assert _moment(story["at"]) >= began - 60


@case("RED-08", kinds=SETTLED, flags=("route_error",))
async def test_red_08_without_dead_letters_the_original_is_kept(lab: Lab) -> None:
    """When the dead letter cannot be written the message is not settled: it is there for the next consumer."""
    destination = lab.destination()
    caps = await lab.capabilities()
    queue = dead_queue(lab, destination)
    if not (await opened(lab, queue)).capabilities(queue).route_error:  # maybe of another backend, that stores
        lab.not_run("a write into a deleted queue is not reported here, so none can be made to fail")
    body = body_of(destination, "k0", 1)
    runs: list[bytes] = []

    async def rejecting(value: bytes) -> None:
        runs.append(value)
        raise Reject("no")

    async with handling(lab, destination, rejecting) as bus:
        await lab.harness.remove([queue])
        await bus.publish(destination, body)
        await eventually(lambda: runs, WAIT_S, "the handler must run")
        await asyncio.sleep(2 * lab.harness.quiet_s)
        recovered = bus.stats(destination).dead_lettered
    letters = await dead_letters(lab, caps, destination, expected=recovered)
    found = bodies(await rest(lab, caps, destination, expected=[] if recovered else [body]))
    assert_exactly([*found, *(d.body for d in letters)], [body], "the source and its dead letters together:")
    assert runs == [body], "a rejected message is not run again while its dead letter waits"


@case("RED-09", kinds=SETTLED, flags=("count",), faults=("cut",))
async def test_red_09_a_message_that_kills_its_consumers_is_stopped(lab: Lab) -> None:
    """After `max_deliveries` dead consumers a message is dead-lettered; without a count it goes on."""
    destination = lab.destination()
    caps = await lab.capabilities()
    body = body_of(destination, "k0", 1)
    queue = dead_queue(lab, destination)
    await (await opened(lab, destination, queue)).publish(destination, body)
    for _ in range(2):
        async with victim(lab, destination, max_deliveries=2) as holder:
            (delivery,) = await holder.take(1, takeover(lab, caps) + 1)
            assert delivery.body == body
            await holder.die()
    bus = await opened(lab, destination)
    async with bus.consume(destination, group=lab.group, max_deliveries=2) as stream:
        if caps.count != "exact":
            (third,) = await take(stream, 1, takeover(lab, caps) + 1)  # nothing may stop it
            await third.ack()
            lab.refused()
            return
        waiting = asyncio.ensure_future(stream.next(takeover(lab, caps) + 2))  # a stream works when it is read
        await eventually(
            lambda: bus.stats(destination).dead_lettered or waiting.done(),
            takeover(lab, caps) + 2,
            "it must be given up",
        )
        assert not waiting.done(), "delivered a third time with max_deliveries=2"
        waiting.cancel()
    letters = await dead_letters(lab, caps, destination, expected=1)
    assert [(d.body, d.provenance["reason"]) for d in letters] == [(body, "deliveries")]
    assert bodies(await rest(lab, caps, destination)) == []


@case("RED-10", kinds=ALL)
async def test_red_10_an_undecodable_message_does_not_wedge_the_consumer(lab: Lab) -> None:
    """Garbage of a foreign program reaches no handler and is dead-lettered once as it came; on a Signal dropped."""
    destination = lab.destination(Order, key=lambda order: order.customer)
    caps = await lab.capabilities()
    garbage = [b"\xff\x00 not json", b'{"customer": "c1", "amount": "many"}', b""]
    handled: list[int] = []

    async def handle(value: Order) -> None:
        handled.append(value.amount)

    if destination.settles:
        dead_queue(lab, destination)
    async with handling(lab, destination, handle) as bus:
        for n, body in enumerate(garbage):
            await lab.harness.native_send(destination, body, {}, f"{destination.name}-{n}")
        gone = "dead_lettered" if destination.settles else "dropped"
        await eventually(lambda: getattr(bus.stats(destination), gone) >= 3, WAIT_S, f"garbage must be {gone}")
        await bus.publish(destination, Order(customer="c1", amount=7))
        await eventually(lambda: handled, WAIT_S, "the consumer must live on")
        await asyncio.sleep(lab.harness.quiet_s)
        assert getattr(bus.stats(destination), gone) == 3, "it went round in a loop"
    assert handled == [7]
    if destination.settles:
        letters = await dead_letters(lab, caps, destination, expected=3)
        assert_exactly([d.body for d in letters], garbage)
        assert {d.provenance["reason"] for d in letters} == {"undecodable"}


@case("RED-11", kinds=SETTLED, flags=("settle",), faults=("cut",))
async def test_red_11_a_rejected_message_never_returns(lab: Lab) -> None:
    """reject() and on_failure decide once: "drop" is gone for good and counted, "stop" stops and keeps the message."""
    destination = lab.destination()
    caps = await lab.capabilities()
    dropped, kept = spread(destination, 2)
    dead_queue(lab, destination)
    async with victim(lab, destination, on_failure="drop") as holder:
        await holder.bus.publish(destination, dropped)
        (delivery,) = await holder.take(1)
        await delivery.reject("of no use")
        assert await holder.stream.next(lab.harness.quiet_s) is None
        assert holder.bus.stats(destination).dropped == 1
        await holder.die()
    assert bodies(await rest(lab, caps, destination, beyond_lease=True)) == []

    async def rejecting(value: bytes) -> None:
        raise Reject("no")

    with pytest.raises(MessagingError):
        async with handling(lab, destination, rejecting, on_failure="stop") as bus:
            await bus.publish(destination, kept)
            await asyncio.sleep(WAIT_S)
    assert_exactly(bodies(await rest(lab, caps, destination, expected=[kept])), [kept])
    assert await dead_letters(lab, caps, destination, expected=0) == []


@case("RED-13", kinds=TOPICS, flags=("groups",))
async def test_red_13_a_failure_in_one_group_is_unseen_by_another(lab: Lab) -> None:
    """What g1 retries, rejects and dead-letters, g2 gets once, as attempt 1, and without dead letters of its own."""
    destination = lab.destination(groups=("g1", "g2"))
    caps = await lab.capabilities()
    sent = spread(destination, 6)
    runs: list[bytes] = []

    async def failing(value: bytes) -> None:
        runs.append(value)
        if value == sent[0]:
            raise Reject("no")
        if value == sent[1] or runs.count(value) == 1:
            raise ValueError("not yet")

    for group in ("g1", "g2"):
        dead_queue(lab, destination, group)
    other = await opened(lab, destination)
    async with (
        lab.collecting(other, destination, group="g2") as arrivals,
        handling(lab, destination, failing, group="g1", retry=Retry(2, 0.05)) as bus,
    ):
        await publish_all(bus, destination, sent)
        await eventually(lambda: len(runs) >= 11, WAIT_S, "g1 must run all and repeat five")
        await eventually(lambda: bus.stats(destination).dead_lettered >= 2, WAIT_S, "two dead letters")
        await arrived(arrivals, len(sent))
        await silence(lab, other, destination, arrivals)
    seen = real(arrivals)
    assert_exactly(bodies(seen), sent)
    assert all(a.attempt == 1 and a.deliveries in (1, None) for a in seen)
    mine = await dead_letters(lab, caps, destination, expected=2, group="g1")
    assert_exactly([d.body for d in mine], sent[:2])
    assert await dead_letters(lab, caps, destination, expected=0, group="g2") == []


# --- helpers


async def _nothing(value: bytes) -> None:
    """A handler that is never run."""


async def _released_after(lab: Lab, destination: Any, delay_s: float) -> float:
    """Release with a delay, below the Bus, and return when it came again; asserts floor and ceiling."""
    driver = await lab.driver()

    async def on_revoke(sessions: object, deadline_s: float) -> None:
        """Nothing to hand over."""

    receiver: Any = await driver.open_receiver(destination, lab.group, 10, on_revoke)
    bus = await opened(lab, destination)
    await bus.publish(destination, body_of(destination, "k0", 2))
    async with asyncio.timeout(WAIT_S):
        (first,) = await receiver.receive_batch(10)
        began = time.monotonic()
        receiver.settle_batch([(first.receipt, Disposition("release", delay_s))])
        (again,) = await receiver.receive_batch(10)
        after_s = time.monotonic() - began
        answer = receiver.settle_batch([(again.receipt, ACCEPT)])
        if answer is not None:
            await answer
    assert again.body == first.body
    assert delay_s * 0.98 <= after_s <= delay_s + lab.harness.takeover_s, f"{after_s:.3f} s"
    return round(after_s, 3)


def _moment(text: str) -> float:
    """Seconds since the epoch of a number or an ISO time."""
    from datetime import datetime

    try:
        return float(text)
    except ValueError:
        return datetime.fromisoformat(text).timestamp()
