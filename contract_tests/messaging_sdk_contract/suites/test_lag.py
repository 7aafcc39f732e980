"""LAG: how many messages a Queue, or a group of a Topic, has yet to handle."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from messaging_sdk import Bus, CapabilityError, NotFound, UsageError

from ..cases import SETTLED, TOPICS, case
from ..lab import Lab
from . import WAIT_S, dialled_by, opened, publish_all, spread, take

POLL_S = 0.05
N = 12


@case("LAG-01", kinds=SETTLED, flags=("lag",))
async def test_lag_01_it_is_what_was_published_less_what_was_settled(lab: Lab) -> None:
    """Asked elsewhere, a backlog of N reads N, what is left of it reads that, nothing reads 0; and it stays so."""
    if await _is_refused(lab):
        return
    destination = lab.destination()
    bus, other = await opened(lab, destination), await opened(lab, destination)
    await _reads(lab, other, destination, 0)
    await publish_all(bus, destination, spread(destination, N))
    await _reads(lab, other, destination, N)
    async with bus.consume(destination, group=lab.group) as stream:
        for delivery in await take(stream, N // 2):
            await delivery.ack()
    await _reads(lab, other, destination, N - N // 2)
    async with bus.consume(destination, group=lab.group) as stream:
        for delivery in await take(stream, N - N // 2):
            await delivery.ack()
        await _reads(lab, other, destination, 0)


@case("LAG-02", kinds=SETTLED, flags=("lag",))
async def test_lag_02_what_is_handed_out_counts_as_declared(lab: Lab) -> None:
    """While k of N are with a consumer the lag is N where it counts the unsettled, N-k where it counts the waiting."""
    if await _is_refused(lab):
        return
    destination = lab.destination()
    bus, other = await opened(lab, destination), await opened(lab, destination)
    out = 4
    await publish_all(bus, destination, spread(destination, N))
    async with bus.consume(destination, group=lab.group, window=out) as stream:
        held = await take(stream, out)
        counts_all = bus.capabilities(destination).lag == "unsettled"
        await _reads(lab, other, destination, N if counts_all else N - out)
        for delivery in held:
            await delivery.ack()
        await take(stream, out)
        await _reads(lab, other, destination, N - out if counts_all else N - 2 * out)
    await _reads(lab, other, destination, N - out)


@case("LAG-03", kinds=TOPICS, flags=("lag",))
async def test_lag_03_each_group_has_its_own(lab: Lab) -> None:
    """What one group of a Topic has settled is left to the other: each has a lag of its own."""
    if await _is_refused(lab):
        return
    destination = lab.destination(groups=("g1", "g2"))
    bus = await opened(lab, destination)
    await publish_all(bus, destination, spread(destination, N))
    for group, settled in (("g1", N - 3), ("g2", 2)):
        async with bus.consume(destination, group=group) as stream:
            for delivery in await take(stream, settled):
                await delivery.ack()
        await _reads(lab, bus, destination, N - settled, group)
    await _reads(lab, bus, destination, 3, "g1")


@case("LAG-04", kinds=SETTLED, flags=("lag",))
async def test_lag_04_what_is_settled_out_of_turn_is_not_counted(lab: Lab) -> None:
    """Of N messages the last is settled, then all but the first: N-1 are left, then 1, and 1 without the consumer."""
    if await _is_refused(lab):
        return
    destination = lab.destination()
    bus = await opened(lab, destination)
    await publish_all(bus, destination, spread(destination, N))
    counts_all = bus.capabilities(destination).lag == "unsettled"
    async with bus.consume(destination, group=lab.group, window=N) as stream:
        held = await take(stream, N)
        await held[-1].ack()
        await _reads(lab, bus, destination, N - 1 if counts_all else 0)
        for delivery in reversed(held[1:-1]):
            await delivery.ack()
        await _reads(lab, bus, destination, 1 if counts_all else 0)
    await _reads(lab, bus, destination, 1)


@case("LAG-05")
async def test_lag_05_what_cannot_be_told_is_refused_before_anything_is_sent(lab: Lab) -> None:
    """A Signal's lag and an unclaimed one raise CapabilityError, a wrong group's UsageError; nothing is dialled."""
    if await _is_refused(lab):
        return
    destination = lab.destination()
    wrong = ("g1",) if lab.kind.tag == "queue" else (None, "g2")
    with dialled_by(lab) as dialled:
        for group in wrong:
            with pytest.raises(UsageError):
                await lab.bus().lag(destination, group)
    assert not dialled, "the backend was dialled for a wrong group"


@case("LAG-06", kinds=SETTLED, flags=("lag",))
async def test_lag_06_of_what_does_not_exist_it_is_not_found(lab: Lab) -> None:
    """The lag of what does not exist raises NotFound, and is not 0; the bus works on."""
    if await _is_refused(lab):
        return
    destination, absent = lab.destination(), lab.destination()
    bus = await opened(lab, destination, absent)
    await lab.harness.remove([absent])
    async with bus.consume(destination, group=lab.group) as stream:
        for number, body in enumerate(spread(destination, 2)):
            with pytest.raises(NotFound):
                await bus.lag(absent, lab.group)
            await bus.publish(destination, body)
            (delivery,) = await take(stream, 1)
            await delivery.ack()
            assert delivery.body == body, f"message {number} is another"
        await _reads(lab, bus, destination, 0)


# --- helpers -------------------------------------------------------------------------------------


async def _is_refused(lab: Lab) -> bool:
    """Where nothing is claimed, asking must fail before the backend is dialled."""
    if (await lab.capabilities()).lag != "none":
        return False
    with dialled_by(lab) as dialled, pytest.raises(CapabilityError) as caught:
        await lab.bus().lag(lab.destination(), lab.group)
    assert not dialled, "the backend was dialled before the need was checked"
    assert caught.value.unmet[0].need.startswith("lag"), f"not named: {caught.value}"
    lab.refused()
    return True


async def _reads(lab: Lab, bus: Bus, destination: Any, expected: int, group: str | None = None) -> None:
    """Wait until that many are told of, for a broker may answer late; from then on it must stay so."""
    group = group or lab.group
    deadline = time.monotonic() + WAIT_S
    while (found := await bus.lag(destination, group)) != expected:
        assert time.monotonic() < deadline, f"the lag reads {found}, {expected} are left"
        await asyncio.sleep(POLL_S)
    end = time.monotonic() + lab.harness.quiet_s
    while time.monotonic() < end:
        await asyncio.sleep(POLL_S)
        found = await bus.lag(destination, group)
        assert found == expected, f"the lag reads {found} after the right {expected}, and nothing has happened"
