"""SPI: what core relies on below the Bus, asked of the adapter's own senders and receivers."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress
from typing import Any, cast

import pytest

from messaging_sdk import ConnectionLost, Delivery, Outcome
from messaging_sdk.spi import ACCEPT, Outcomes

from ..cases import case
from ..lab import PATIENCE_S, Lab, eventually
from ..probes import Bench, Tap, bench


@case("SPI-01")
async def test_spi_01_a_cancelled_receive_batch_loses_nothing(lab: Lab) -> None:
    """Receives of the adapter cancelled at random moments under load lose and repeat nothing."""
    on = await bench(lab)
    receiver = (await _bare(on)).receiver
    sent = [on.body() for _ in range(200)]
    got: list[bytes] = []
    cancelled = 0

    async def feed() -> None:
        for start in range(0, len(sent), 4):
            await on.put(*sent[start : start + 4])
            await asyncio.sleep(0.002)

    feeding = asyncio.create_task(feed())
    async with asyncio.timeout(PATIENCE_S):
        while len(got) < len(sent):
            receiving = asyncio.create_task(receiver.receive_batch(3))
            last = feeding.done()  # then what is still missing is waited for
            patience_s = 10.0 if last else lab.random.choice((0, 0, 0.001, 0.003))
            done, _ = await asyncio.wait({receiving}, timeout=patience_s)
            if not done:
                receiving.cancel()
                cancelled += 1
                with suppress(asyncio.CancelledError):
                    await receiving
                if last:
                    break
            if receiving.done() and not receiving.cancelled():
                arrived = cast("list[Delivery[Any]]", receiving.result())
                got += [bytes(d.body) for d in arrived]
                if lab.kind.settles:
                    receiver.settle_batch([(d.receipt, ACCEPT) for d in arrived])
    await feeding
    lab.measured["cancelled"] = cancelled
    assert Counter(got) == Counter(sent), f"{len(got)} of {len(sent)}"


@case("SPI-02", faults=("cut",))
async def test_spi_02_a_lost_connection_never_comes_back_by_itself(lab: Lab) -> None:
    """After a cut, that sender and receiver raise ConnectionLost for ever; without a broker only a session is lost."""
    on = await bench(lab, faulty=True)
    if lab.brokerless:
        await _only_the_session_is_lost(on)
        return
    tap = await _bare(on)
    await on.put(on.body())
    sender = await on.sender()
    await lab.harness.cut()
    for _ in range(3):
        with pytest.raises(ConnectionLost):
            async with asyncio.timeout(10):
                while True:  # what was here already may still be handed out
                    await tap.receiver.receive_batch(10)

    def refuses() -> bool:
        try:
            sender.send_batch([on.outgoing(on.body())], lambda outcomes: None)
        except ConnectionLost:
            return True
        return False

    await eventually(refuses, 10, "a sender notices that its connection is lost")
    assert refuses() and refuses(), "a lost sender came back"
    again = Bench(lab, on.driver, on.destination)
    fresh = await again.tap()
    await again.sentinel(fresh)


@case("SPI-03")
async def test_spi_03_every_element_of_a_batch_gets_one_outcome(lab: Lab) -> None:
    """Two batches sent one right after the other: each index gets exactly one outcome, and call order is kept."""
    on = await bench(lab)
    tap = await on.tap()
    if lab.kind.settles:
        tap.on_delivery(tap.accept_soon)
    sender = await on.sender()
    batches = [[on.outgoing(on.body()) for _ in range(50)] for _ in range(2)]
    seen: list[list[int]] = [[], []]

    for number, batch in enumerate(batches):

        def on_outcomes(outcomes: Outcomes, number: int = number) -> None:
            assert all(result.outcome is Outcome.OK for _, result in outcomes)
            seen[number] += [index for index, _ in outcomes]

        sender.send_batch(batch, on_outcomes)
    await eventually(lambda: sum(map(len, seen)) >= 100, 10, "all outcomes")
    sent = [m.body for batch in batches for m in batch]
    await tap.take(len(sent))
    await asyncio.sleep(lab.harness.quiet_s)
    assert [sorted(s) for s in seen] == [list(range(50))] * 2
    assert Counter(tap.bodies) == Counter(sent)
    if on.declared.order == "publisher":
        assert tap.bodies == sent


async def _only_the_session_is_lost(on: Bench) -> None:
    """The delivery in hand is lost and comes again, by the same sender and to the same receiver."""
    tap, body = await on.tap(), on.body()
    await on.put(body)
    (held,) = await tap.take(1)
    await on.lab.harness.cut()
    if not on.lab.kind.settles:  # it may take some time until the listener is heard again

        async def again() -> None:
            while len(tap.got) < 2:
                await on.put(on.body())
                await asyncio.sleep(0.05)

        async with asyncio.timeout(on.lab.harness.takeover_s):
            await again()
        return
    await eventually(lambda: held.session.lost, on.lab.harness.takeover_s, "the loss must be noticed")
    assert await tap.settle(ACCEPT, held) == 1, "a lost delivery cannot be settled"
    assert await tap.until(lambda: len(tap.got) == 2, on.lab.harness.takeover_s), "it must come again"
    assert [bytes(b) for b in tap.bodies] == [body, body]
    await tap.settle(ACCEPT, tap.got[1][1])
    await on.sentinel(tap)
    assert len(tap.got) == 3, "nothing else came again"


async def _bare(on: Bench) -> Tap:
    """A receiver that nobody reads but the case."""
    tap = await on.tap()
    await tap.pause()
    tap.got.clear()
    return tap
