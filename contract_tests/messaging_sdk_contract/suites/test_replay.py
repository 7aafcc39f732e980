"""REP: a Topic's history is read again, and its groups do not notice."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import pytest

from messaging_sdk import Bus, CapabilityError, Message, OutOfRange

from ..cases import TOPICS, case
from ..lab import Lab
from . import WAIT_S, assert_exactly, disorder, opened, publish_all, series, silence, take

APART_S = 0.3
"""Between a moment and the messages before and after it: brokers count in milliseconds, by their own clock."""


@case("REP-01", kinds=TOPICS, flags=("replay",))
async def test_rep_01_history_comes_again_whole_and_in_order(lab: Lab) -> None:
    """Settled or not, each stored message is read once, unaltered and in order where ordered; then the replay ends."""
    destination, bus = await _topic(lab)
    if await _is_refused(lab, bus, destination):
        return
    sent = series(destination, 60)
    for n, body in enumerate(sent):
        await bus.publish(destination, body, headers={"n": str(n)}, correlation_id=f"c{n}")
    settled: list[Any] = []
    async with bus.consume(destination, group=lab.group) as stream:
        while len(settled) < 40:
            settled += await take(stream, 1)
            await settled[-1].ack()
    async with bus.replay(destination) as history:
        await publish_all(bus, destination, series(destination, 5, start=1000))  # later than the end
        again = await _all(history)
        with pytest.raises(StopAsyncIteration):
            await anext(history)
    assert_exactly([m.body for m in again], sent)
    _assert_in_order(destination, again)
    assert {_shown(m) for m in settled} <= {_shown(m) for m in again}


@case("REP-02", kinds=TOPICS, flags=("replay",))
async def test_rep_02_a_time_is_where_it_begins(lab: Lab) -> None:
    """A replay since a time yields what was stored at that time or later, nothing earlier, of the future nothing."""
    destination, bus = await _topic(lab)
    if await _is_refused(lab, bus, destination):
        return
    sent = series(destination, 24)
    await publish_all(bus, destination, sent[:12])
    await asyncio.sleep(APART_S)
    moment = datetime.now(UTC)
    await asyncio.sleep(APART_S)
    await publish_all(bus, destination, sent[12:])
    for since, expected in (
        (moment, sent[12:]),
        (moment.replace(year=moment.year - 1), sent),
        (moment.replace(year=moment.year + 1), []),
    ):
        async with bus.replay(destination, since=since) as history:
            assert_exactly([m.body for m in await _all(history)], expected, f"since {since}:")


@case("REP-03", kinds=TOPICS, flags=("replay",))
async def test_rep_03_a_position_is_where_it_goes_on(lab: Lab) -> None:
    """Left after some messages and begun again at its position, by another bus, a replay yields the others, once."""
    destination, bus = await _topic(lab)
    if await _is_refused(lab, bus, destination):
        return
    sent = series(destination, 40)
    await publish_all(bus, destination, sent)
    read: list[Message[bytes]] = []
    position = "start"
    for count in (0, 1, 16, 23, 0):
        async with (await opened(lab, destination)).replay(destination, since=position) as history:
            for _ in range(count):
                read.append(await _next(history))
            position = history.position
    assert_exactly([m.body for m in read], sent)
    _assert_in_order(destination, read)
    later = series(destination, 8, start=40)
    await publish_all(bus, destination, later)
    async with bus.replay(destination, since=position) as history:
        assert_exactly([m.body for m in await _all(history)], later, "behind the former end:")


@case("REP-04", kinds=TOPICS, flags=("replay",))
async def test_rep_04_a_replay_leaves_the_groups_alone(lab: Lab) -> None:
    """A replay takes nothing from a group, and gives it nothing: what it holds, waits for and settled stays so."""
    destination, bus = await _topic(lab)
    if await _is_refused(lab, bus, destination):
        return
    sent = series(destination, 40)
    await publish_all(bus, destination, sent[:20])
    async with bus.consume(destination, group=lab.group, window=5) as stream:
        (settled,) = await take(stream, 1)
        await settled.ack()
        (held,) = await take(stream, 1)  # of ordered keys one at a time is sure to be there
        async with bus.replay(destination) as history:
            assert_exactly([m.body for m in await _all(history)], sent[:20])
        await publish_all(bus, destination, sent[20:])
        await held.ack()
        rest: list[Any] = []
        while len(rest) < len(sent) - 2:
            rest += await take(stream, 1)
            await rest[-1].ack()
    assert_exactly([m.body for m in [settled, held, *rest]], sent)
    async with lab.collecting(bus, destination) as late:
        await silence(lab, bus, destination, late)
        assert not [a for a in late if not a.body.endswith(b"sentinel")], "what was settled came again"


@case("REP-05", kinds=TOPICS, flags=("replay",))
async def test_rep_05_what_retention_deleted_is_an_error(lab: Lab) -> None:
    """A position whose next message was deleted raises OutOfRange, never skips; from the start comes what is left."""
    destination, bus = await _topic(lab)
    if await _is_refused(lab, bus, destination):
        return
    await publish_all(bus, destination, series(destination, 40))
    async with bus.replay(destination) as history:
        for _ in range(3):
            await _next(history)
        position = history.position
    if not await lab.harness.forget(destination):
        lab.not_run(f"the {lab.harness.name} harness cannot delete what a topic stores")
    left = series(destination, 8, start=40)
    await publish_all(bus, destination, left)
    with pytest.raises(OutOfRange):
        async with bus.replay(destination, since=position) as history:
            await _all(history)
    async with bus.replay(destination) as history:
        assert_exactly([m.body for m in await _all(history)], left)


@case("REP-06", kinds=TOPICS, flags=("replay",), faults=("cut",))
async def test_rep_06_a_replay_survives_a_cut(lab: Lab) -> None:
    """A replay whose connection is cut goes on behind its last message: none is missing, none comes twice."""
    destination, bus = await _topic(lab)
    if await _is_refused(lab, bus, destination):
        return
    sent = series(destination, 3000)  # more than is read ahead
    await publish_all(bus, destination, sent)
    faulty = await opened(lab, destination, faulty=True)
    async with faulty.replay(destination) as history:
        read = []
        for _ in range(2):
            read += [await _next(history) for _ in range(100)]
            await lab.harness.cut()
        read += await _all(history)
    assert_exactly([m.body for m in read], sent)
    _assert_in_order(destination, read)


# --- helpers -------------------------------------------------------------------------------------


async def _topic(lab: Lab) -> tuple[Any, Bus]:
    destination = lab.destination()
    return destination, await opened(lab, destination)


async def _is_refused(lab: Lab, bus: Bus, destination: Any) -> bool:
    """Where nothing is claimed, the replay must be refused, before it yields anything."""
    if bus.capabilities(destination).replay:
        return False
    with pytest.raises(CapabilityError):
        async with bus.replay(destination):
            pass
    lab.refused()
    return True


async def _all(history: Any) -> list[Message[bytes]]:
    """Whatever comes until the end, which must come."""
    async with asyncio.timeout(WAIT_S):
        return [message async for message in history]


async def _next(history: Any) -> Message[bytes]:
    async with asyncio.timeout(WAIT_S):
        message: Message[bytes] | None = await anext(history, None)
    assert message is not None, "the history ended too early"
    return message


def _assert_in_order(destination: Any, messages: Iterable[Message[bytes]]) -> None:
    wrong = disorder([m.body for m in messages], per_key=True) if destination.ordered else []
    assert not wrong, f"{len(wrong)} out of order, such as {wrong[0]}"


def _shown(message: Message[bytes]) -> tuple[Any, ...]:
    return (message.id, message.body, message.key, frozenset(message.headers.items()), message.correlation_id)
