"""GRP: who gets a copy, who shares, and what joining, leaving and dying do to the others."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from contextlib import AsyncExitStack
from typing import Any

import pytest

from messaging_sdk import CapabilityError, MessagingError, Topic, UsageError

from ..cases import ALL, SETTLED, TOPICS, case
from ..lab import Arrival, Lab, drain, eventually
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

COPIES = ("topic", "topic/ordered", "signal")
SHARED = ("queue", "topic")
"""Where load spreads over all consumers, whatever their keys."""


@case("GRP-01", kinds=ALL, flags=("compete",))
async def test_grp_01_consumers_share_without_overlap(lab: Lab) -> None:
    """Three consumers of a queue or group get every message between them, none of them twice."""
    destination = lab.destination()
    caps = await lab.capabilities()
    group = lab.group or ("g1" if lab.kind.tag == "signal" else None)
    publisher = await opened(lab, destination)
    if group and caps.groups == "none":
        await _group_is_refused(lab, destination)
        return
    if caps.compete == "none":
        await _second_is_refused(lab, destination, group)
        return
    sent = series(destination, 300)
    together: list[Arrival] = []
    async with AsyncExitStack() as stack:
        for n in range(3):
            bus = await opened(lab, destination)
            stream = await stack.enter_async_context(bus.consume(destination, group=group))
            task = asyncio.ensure_future(drain(stream, destination, together, str(n)))
            stack.callback(task.cancel)
        await _publish_gently(lab, publisher, destination, sent)
        if destination.settles:  # the sentinel reaches one of the three, and says nothing of what the others still have
            await arrived(together, len(sent))
        await silence(lab, publisher, destination, together)
    lab.measured["shares"] = sorted(Counter(a.by for a in real(together)).values())
    if destination.settles:
        assert_exactly(bodies(real(together)), sent)
    else:
        _mostly(lab, bodies(real(together)), sent)


@case("GRP-02", kinds=SHARED, flags=("compete", "window"))
async def test_grp_02_a_frozen_consumer_holds_no_more_than_its_window(lab: Lab) -> None:
    """A consumer that does nothing keeps at most its window from the others; round robin: its share is measured."""
    destination = lab.destination()
    caps = await lab.capabilities()
    if caps.compete in ("none", "standby"):
        lab.not_run("consumers do not share here")
    frozen_bus, bus = await opened(lab, destination), await opened(lab, destination)
    sent = series(destination, 100)
    async with (
        frozen_bus.consume(destination, group=lab.group, window=5) as frozen,
        lab.collecting(bus, destination, window=5) as arrivals,
    ):
        await publish_all(bus, destination, sent)
        if caps.compete == "demand":
            await arrived(arrivals, len(sent) - 5)
            await silence(lab, bus, destination, arrivals)
        else:  # a sentinel may be the frozen one's, too
            await arrived(arrivals, 1)
            await asyncio.sleep(lab.harness.quiet_s)
        held = await frozen.take(100, lab.harness.quiet_s)
        if caps.window:
            assert len(held) <= 5
        if caps.compete == "demand":
            assert set(sent) - set(bodies(arrivals)) == {d.body for d in held}
    stuck = set(sent) - set(bodies(arrivals))
    lab.measured["stuck"] = len(stuck)
    assert len(stuck) < len(sent), "the frozen one has it all"
    found = bodies(await rest(lab, caps, destination, expected=sorted(stuck)))
    assert_exactly([*found, *bodies(real(arrivals))], sent)


@case("GRP-03", kinds=SHARED, flags=("compete",))
async def test_grp_03_a_late_joiner_gets_work(lab: Lab) -> None:
    """A consumer that joins while work is waiting gets some of it soon."""
    destination = lab.destination()
    caps = await lab.capabilities()
    if caps.compete != "demand" or not caps.window:
        lab.not_run("what a consumer was dealt stays with it here, so a late one may find nothing")
    publisher = await opened(lab, destination)
    sent = series(destination, 480)
    done: list[tuple[str, bytes]] = []

    def worker(name: str) -> Any:
        async def handle(value: bytes) -> None:
            await asyncio.sleep(0.005)
            done.append((name, value))

        return handling(lab, destination, handle, window=5)

    async with worker("early"):
        feeding = asyncio.ensure_future(publish_all(publisher, destination, sent))
        await eventually(lambda: len(done) >= 60, WAIT_S, "some must be handled")
        joined = time.monotonic()
        async with worker("late"):
            await eventually(
                lambda: any(n == "late" for n, _ in done), lab.harness.takeover_s, "the late one must get work"
            )
            lab.measured["first_work_s"] = round(time.monotonic() - joined, 3)
            await eventually(lambda: len(done) >= len(sent), 2 * WAIT_S, "all must be handled")
            await feeding
            await asyncio.sleep(lab.harness.quiet_s)
    assert_exactly([b for _, b in done], sent)


@case("GRP-04", kinds=SETTLED, flags=("compete",))
async def test_grp_04_a_leaving_consumer_loses_nothing(lab: Lab) -> None:
    """One of two consumers leaves in the middle of its work: every message is finished exactly once."""
    destination = lab.destination()
    caps = await lab.capabilities()
    publisher = await opened(lab, destination)
    sent = series(destination, 200)
    done: list[tuple[str, bytes]] = []

    def worker(name: str) -> Any:
        async def handle(value: bytes) -> None:
            await asyncio.sleep(0.002)
            done.append((name, value))

        return handling(lab, destination, handle, window=20)

    feeding = asyncio.ensure_future(publish_all(publisher, destination, sent))
    async with worker("stays"):
        async with worker("leaves"):
            await eventually(lambda: len(done) >= 60, WAIT_S, "some must be handled")
        left = len(done)
        await feeding
        await eventually(lambda: len(done) >= len(sent), WAIT_S + takeover(lab, caps), "all must be handled")
        await asyncio.sleep(lab.harness.quiet_s)
    assert_exactly([b for _, b in done], sent)
    assert not [n for n, _ in done[left:] if n == "leaves"], "it worked on after it had left"
    assert bodies(await rest(lab, caps, destination)) == []


@case("GRP-05", kinds=SETTLED, flags=("compete", "lease"), faults=("cut",))
async def test_grp_05_a_killed_members_work_moves_on(lab: Lab) -> None:
    """What a killed one of two consumers held reaches the other: none lost, none repeated that it had settled."""
    destination = lab.destination()
    caps = await lab.capabilities()
    survivor = await opened(lab, destination)
    sent = series(destination, 120)
    acked: list[bytes] = []
    async with victim(lab, destination, window=10) as holder:
        await publish_all(survivor, destination, sent[:30])
        for _ in range(6):
            (delivery,) = await holder.take(1)
            acked.append(delivery.body)
            await delivery.ack()
        held = {d.body for d in await holder.stream.take(3, WAIT_S)}
        async with lab.collecting(survivor, destination, window=10) as arrivals:
            await publish_all(survivor, destination, sent[30:])
            await asyncio.sleep(lab.harness.quiet_s)
            died = time.monotonic()
            await holder.die()
            await arrived(arrivals, len(sent) - len(acked), takeover(lab, caps) + WAIT_S)
            await silence(lab, survivor, destination, arrivals)
    found = real(arrivals)
    lab.measured["moved_s"] = round(max((a.at_s for a in found if a.body in held), default=died) - died, 2)
    assert_exactly(bodies(found), [b for b in sent if b not in acked])


@case("GRP-06", kinds=ALL, flags=("groups",))
async def test_grp_06_every_group_gets_every_message(lab: Lab) -> None:
    """Three groups each get the whole stream once; a Queue has no groups, which is said before anything happens."""
    if lab.kind.tag == "queue":
        destination = lab.destination()
        bus = lab.bus()
        with pytest.raises(UsageError):
            bus.consume(destination, group="g1")
        with pytest.raises(UsageError):
            register(bus, destination, _nothing, group="g1")
        lab.refused()
        return
    groups = ("g1", "g2", "g3")
    destination = lab.destination(groups=groups)
    caps = await lab.capabilities()
    if caps.groups == "none":
        await _group_is_refused(lab, destination)
        return
    for wrong in (None, "g4"):
        if lab.kind.tag == "topic":
            with pytest.raises(UsageError):
                lab.bus().consume(destination, group=wrong)
    await _each_gets_all(lab, destination, dict.fromkeys(groups, 1))


@case("GRP-07", kinds=COPIES, flags=("groups", "compete"))
async def test_grp_07_groups_copy_and_their_members_share(lab: Lab) -> None:
    """Two groups of two members each: every group gets every message once, whichever member it is."""
    destination = lab.destination(groups=("g1", "g2"))
    caps = await lab.capabilities()
    if caps.groups == "none":
        await _group_is_refused(lab, destination)
        return
    if caps.compete == "none":
        await _second_is_refused(lab, destination, "g1")
        return
    await _each_gets_all(lab, destination, {"g1": 2, "g2": 2})


@case("GRP-08", kinds=COPIES, flags=("groups",))
async def test_grp_08_a_durable_group_catches_up(lab: Lab) -> None:
    """A group that was away gets what was published meanwhile where it is durable; elsewhere that must not arrive."""
    destination = lab.destination()
    caps = await lab.capabilities()
    group = lab.group or ("g1" if caps.groups != "none" else None)
    publisher = await opened(lab, destination)
    first, missed, late = (series(destination, 10, start=100 * n) for n in range(3))
    member = await opened(lab, destination)
    async with lab.collecting(member, destination, group=group) as before:
        await publish_all(publisher, destination, first)
        await arrived(before, len(first))
    await member.close()
    await publish_all(publisher, destination, missed)
    back = await opened(lab, destination)
    durable = caps.groups == "durable" and destination.settles
    async with lab.collecting(back, destination, group=group) as after:
        await publish_all(publisher, destination, late)
        await arrived(after, len(late) + len(missed) * durable)
        await silence(lab, publisher, destination, after)
    assert_exactly(bodies(real(before)), first)
    assert_exactly(bodies(real(after)), [*missed, *late] if durable else late)
    if not durable:
        lab.refused()


@case("GRP-09", kinds=("signal",), flags=("backlog",))
async def test_grp_09_a_gone_listener_leaves_nothing(lab: Lab) -> None:
    """When the last listener of a Signal, alone or in a group, has left, nothing is kept for it anywhere."""
    destination = lab.destination()
    caps = await lab.capabilities()
    publisher = await opened(lab, destination)
    groups = (None, "g1") if caps.groups != "none" else (None,)
    for group in groups:
        async with lab.collecting(await opened(lab, destination), destination, group=group) as arrivals:
            await publisher.publish(destination, body_of(destination, "k0", 1))
            await arrived(arrivals, 1)
    await publish_all(publisher, destination, series(destination, 10, start=100))
    for group in groups:
        assert await lab.harness.depth(destination, group) in (None, 0)
        async with lab.collecting(await opened(lab, destination), destination, group=group) as arrivals:
            await silence(lab, publisher, destination, arrivals)
        assert bodies(real(arrivals)) == []


@case("GRP-10", kinds=TOPICS, flags=("groups",))
async def test_grp_10_a_new_group_starts_at_now(lab: Lab) -> None:
    """A group declared after messages were published gets none of them but all later ones; the old group gets all."""
    before = lab.destination(groups=("g1",))
    publisher = await opened(lab, before)
    old = series(before, 10)
    await publish_all(publisher, before, old)
    await asyncio.sleep(lab.harness.quiet_s)  # where OK is not "stored" it may not be there yet
    after = Topic(before.name, bytes, key=before.key, ordered=before.ordered, groups=("g1", "g2"))
    lab.track(after)
    newcomer = await opened(lab, after)
    new = series(before, 10, start=100)
    await publish_all(newcomer, after, new)
    for group, expected in (("g2", new), ("g1", [*old, *new])):
        async with lab.collecting(newcomer, after, group=group) as arrivals:
            await arrived(arrivals, len(expected))
            await silence(lab, newcomer, after, arrivals)
        sentinels = len(arrivals) - len(real(arrivals))
        assert sentinels, "silence was proven"
        assert_exactly(bodies(real(arrivals)), expected, f"group {group}:")


@case("GRP-11", kinds=TOPICS, flags=("groups",))
async def test_grp_11_a_blocked_group_stops_no_other(lab: Lab) -> None:
    """While a group of window 1 settles nothing another one gets everything."""
    destination = lab.destination(groups=("g1", "g2"))
    caps = await lab.capabilities()
    blocked, free = await opened(lab, destination), await opened(lab, destination)
    sent = series(destination, 100)
    async with (
        blocked.consume(destination, group="g1", window=1) as stuck,
        lab.collecting(free, destination, group="g2") as arrivals,
    ):
        await publish_all(free, destination, sent)
        (held,) = await take(stuck, 1)
        await arrived(arrivals, len(sent))
        await silence(lab, free, destination, arrivals)
        assert_exactly(bodies(real(arrivals)), sent)
        firsts = sent[:4] if destination.ordered else sent[:1]  # keys have no order among them
        assert held.body in firsts or caps.order == "none"
    found = real(await rest(lab, caps, destination, group="g1", expected=sent))
    assert_exactly(bodies(found), sent)


@case("GRP-13", kinds=ALL)
async def test_grp_13_leaving_ends_delivery(lab: Lab) -> None:
    """Nothing more reaches a stream or handler that was left; what is kept reaches the next consumer."""
    destination = lab.destination()
    caps = await lab.capabilities()
    publisher = await opened(lab, destination)
    handled: list[bytes] = []

    async def handle(value: bytes) -> None:
        handled.append(value)

    bus = await opened(lab, destination)
    async with lab.collecting(bus, destination) as arrivals:
        await publisher.publish(destination, body_of(destination, "k0", 1))
        await arrived(arrivals, 1)
    async with handling(lab, destination, handle):
        await publisher.publish(destination, body_of(destination, "k0", 2))
        await eventually(lambda: handled, WAIT_S, "the handler must run")
    later = spread(destination, 20)
    await publish_all(publisher, destination, later)
    kept = later if destination.settles else []
    found = bodies(await rest(lab, caps, destination, expected=kept))
    assert_exactly(found, kept)
    assert bodies(arrivals) == [body_of(destination, "k0", 1)]
    assert handled == [body_of(destination, "k0", 2)]


# --- helpers


async def _nothing(value: bytes) -> None:
    """A handler that is never run."""


async def _publish_gently(lab: Lab, bus: Any, destination: Any, sent: list[bytes]) -> None:
    """Publish all; a Signal, which nobody holds back, in small bursts."""
    step = len(sent) if destination.settles else 20
    for at in range(0, len(sent), step):
        await publish_all(bus, destination, sent[at : at + step])
        await asyncio.sleep(0)


def _mostly(lab: Lab, found: list[bytes], sent: list[bytes]) -> None:
    """A Signal: no repeat, nothing foreign, a gap that is counted and small."""
    assert not repeated(found), "a Signal must not repeat"
    assert set(found) <= set(sent)
    lab.measured["gap"] = len(sent) - len(found)
    assert lab.measured["gap"] <= len(sent) // 10


async def _each_gets_all(lab: Lab, destination: Any, members: dict[str, int]) -> None:
    publisher = await opened(lab, destination)
    sent = series(destination, 100)
    views: dict[str, list[Arrival]] = {group: [] for group in members}
    async with AsyncExitStack() as stack:
        for group, count in members.items():
            for n in range(count):
                bus = await opened(lab, destination)
                stream = await stack.enter_async_context(bus.consume(destination, group=group))
                task = asyncio.ensure_future(drain(stream, destination, views[group], str(n)))
                stack.callback(task.cancel)
        await _publish_gently(lab, publisher, destination, sent)
        for view in views.values():
            if destination.settles:
                await arrived(view, len(sent))
        await asyncio.gather(*(silence(lab, publisher, destination, view) for view in views.values()))
    for group, view in views.items():
        if destination.settles:
            assert_exactly(bodies(real(view)), sent, f"group {group}:")
        else:
            _mostly(lab, bodies(real(view)), sent)


async def _second_is_refused(lab: Lab, destination: Any, group: str | None) -> None:
    bus, other = await opened(lab, destination), await opened(lab, destination)
    async with bus.consume(destination, group=group):
        with pytest.raises(MessagingError):
            async with other.consume(destination, group=group):
                pass
    lab.refused()


async def _group_is_refused(lab: Lab, destination: Any) -> None:
    bus = await opened(lab, destination)
    with pytest.raises(CapabilityError):
        async with bus.consume(destination, group="g1"):
            pass
    lab.refused()
