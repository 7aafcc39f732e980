"""Measures every capability flag on the live backend, by what happens and not by what is declared.

Below the Bus, on the adapter itself, so that core cannot cover an adapter's lie. A declared number
is used only to know how long to wait or where to put a ladder of sizes. What cannot be measured
here raises NotRun with the reason.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, Literal, cast

from messaging_sdk import (
    Capabilities,
    CapabilityError,
    ConnectionLost,
    Delivery,
    Destination,
    HeaderRules,
    MessagingError,
    NotFound,
    Outcome,
    Topic,
    UsageError,
)
from messaging_sdk.model import SENT, Outgoing, SendResult, Session, rejected
from messaging_sdk.spi import ACCEPT, RELEASE, Disposition, Driver, Leased, Outcomes, Receiver, Sender

from .lab import PATIENCE_S, Lab, NotRun, while_outcomes_come

WAIT_S: Final = PATIENCE_S
"""For what must happen: far more than any honest broker needs."""
LONGEST_WAIT_S: Final = 6.0
"""A lease or window longer than this is not waited for: the harness can configure a shorter one."""
CLOSE_S: Final = 3.0
CEILING_BYTES: Final = 64 << 20
"""No body larger than this is made: two copies of it would not fit a small machine."""

Probe = Callable[[Lab], Awaitable[Any]]
_ids: Final = itertools.count()


def soon(lab: Lab) -> float:
    """Seconds for what may or may not happen; what comes later does not count as having happened."""
    return max(0.6, 4 * lab.harness.quiet_s)


# --- the bench: one destination, senders and receivers of the adapter itself -----------------------


class Tap:
    """A receiver whose deliveries are collected as they come. It settles nothing by itself."""

    def __init__(self, receiver: Receiver) -> None:
        self.receiver = receiver
        self.got: list[tuple[float, Delivery[Any]]] = []
        self._came = asyncio.Event()
        self._task: asyncio.Task[None] | None = asyncio.create_task(self._collect())
        self._on: Callable[[Delivery[Any]], None] | None = None

    async def _collect(self) -> None:
        with suppress(ConnectionLost):
            while True:
                for delivery in cast("list[Delivery[Any]]", await self.receiver.receive_batch(100)):
                    self.got.append((time.monotonic(), delivery))
                    if self._on is not None:
                        self._on(delivery)
                self._came.set()

    @property
    def bodies(self) -> list[bytes]:
        return [bytes(delivery.body) for _, delivery in self.got]

    def on_delivery(self, act: Callable[[Delivery[Any]], None]) -> None:
        """Have `act` called with every delivery, also with those that are here."""
        self._on = act
        for _, delivery in self.got:
            act(delivery)

    async def until(self, done: Callable[[], object], wait_s: float) -> bool:
        """Wait until `done()`, looked at after each arrival; False after `wait_s`."""
        deadline = time.monotonic() + wait_s
        while not done():
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return False
            self._came.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(min(left_s, 0.05)):
                    await self._came.wait()
        return True

    async def take(self, count: int, wait_s: float = WAIT_S) -> list[Delivery[Any]]:
        """The first `count` deliveries; fewer if no more come within `wait_s`."""
        await self.until(lambda: len(self.got) >= count, wait_s)
        return [delivery for _, delivery in self.got[:count]]

    async def settle(self, disposition: Disposition, *deliveries: Delivery[Any]) -> int:
        """Settle and wait for the broker's answer; return how many failed."""
        answer = self.receiver.settle_batch([(d.receipt, disposition) for d in deliveries])
        if answer is None:
            return 0
        async with asyncio.timeout(WAIT_S):
            return len(await answer)

    def accept_soon(self, delivery: Delivery[Any]) -> None:
        """Settle without waiting for the answer."""
        with suppress(ConnectionLost):
            self.receiver.settle_batch([(delivery.receipt, ACCEPT)])

    async def pause(self) -> None:
        """Take no more from the receiver."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task}, timeout=CLOSE_S)

    async def close(self) -> None:
        await self.pause()
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await self.receiver.close()


class Bench:
    """One provisioned destination of a case, and what was opened on it."""

    def __init__(self, lab: Lab, driver: Driver, destination: Destination[Any]) -> None:
        self.lab = lab
        self.driver = driver
        self.destination = destination
        self.declared = driver.capabilities(destination)
        self._sender: Sender | None = None
        self._numbers = itertools.count()

    @property
    def lease_s(self) -> float:
        return self.declared.lease_s if self.declared.lease == "timeout" else 0.0

    @property
    def return_s(self) -> float:
        """How long what a dead consumer held may take to come back."""
        return max(self.declared.lease_s, self.lease_s) * 1.5 + self.lab.harness.takeover_s

    def body(self, key: str = "k") -> bytes:
        return f"{key}:{next(self._numbers)}".encode()

    def outgoing(self, body: bytes, id: str | None = None, **options: Any) -> Outgoing:
        headers: Mapping[str, str] = options.pop("headers", {})
        return Outgoing(
            body,
            id or f"{self.destination.name}-{next(_ids)}",
            self.destination.key_of(body) if self.destination.ordered else None,
            headers,
            created_s=time.time(),
            **options,
        )

    async def sender(self) -> Sender:
        if self._sender is None:
            self._sender = await self.driver.open_sender(self.destination)
        return self._sender

    async def send(self, *messages: Outgoing) -> list[SendResult]:
        """Send as one batch; return one result per message. A lost sender is replaced next time."""
        sender = await self.sender()
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        results: dict[int, SendResult] = {}

        def on_outcomes(outcomes: Sequence[tuple[int, SendResult]]) -> None:
            results.update(outcomes)
            if len(results) == len(messages) and not answer.done():
                answer.set_result(None)

        try:
            sender.send_batch(messages, on_outcomes)
            if self.declared.confirm == "settled":
                await while_outcomes_come(lambda: len(messages) - len(results))
                results = {n: results.get(n, SENT) for n in range(len(messages))}  # the rest is on its way
            else:
                async with asyncio.timeout(WAIT_S):
                    await answer
        except ConnectionLost as error:
            self._sender = None
            return [rejected(error) for _ in messages]
        if any(isinstance(r.error, ConnectionLost) for r in results.values()):
            self._sender = None
        return [results[i] for i in range(len(messages))]

    async def put(self, *bodies: bytes) -> None:
        """Send what must be accepted."""
        results = await self.send(*(self.outgoing(body) for body in bodies))
        wrong = [r for r in results if r.outcome is not Outcome.OK]
        assert not wrong, f"{len(wrong)} of {len(bodies)} sends were not ok: {wrong[0].error!r}"

    async def tap(self, *, window: int = 500, driver: Driver | None = None, group: str | None = None) -> Tap:
        group = group if group is not None else self.lab.group
        opener = driver or self.driver
        return Tap(await opener.open_receiver(self.destination, group, window, _ignore_revocation))

    async def sentinel(self, tap: Tap) -> None:
        """Send one more message down each lane, which must arrive: silence before it was silence."""
        sent = {self.body() + b":sentinel" for _ in range(self.lab.harness.lanes)}
        for body in sent:
            await self.put(body)
        assert await tap.until(lambda: sent <= set(tap.bodies), WAIT_S), "the sentinel must arrive"


async def _ignore_revocation(sessions: Sequence[Session], deadline_s: float) -> None:
    for session in sessions:
        session.closing = True
        session.lost = session.lost or deadline_s == 0


async def bench(lab: Lab, destination: Destination[Any] | None = None, *, faulty: bool = False) -> Bench:
    """Provision a fresh destination of the lab's kind; by the way that `cut` breaks if `faulty`."""
    destination = destination or lab.destination()
    driver = await lab.driver(lab.harness.fault_backend() if faulty else None)
    try:
        await driver.provision([destination], "create")
    except CapabilityError as error:
        raise NotRun(f"the adapter refuses to provision it: {error.unmet[0].remedy}") from error
    return Bench(lab, driver, destination)


class Holder:
    """A consumer on a connection of its own that dies without a goodbye."""

    def __init__(self, on: Bench, tap: Tap, driver: Driver) -> None:
        self._lab = on.lab
        self.tap = tap
        self._driver = driver

    @classmethod
    async def open(cls, on: Bench, window: int = 500) -> Holder:
        lab = on.lab
        driver = await lab.driver(lab.harness.fault_backend())
        return cls(on, await on.tap(window=window, driver=driver), driver)

    async def die(self) -> None:
        """Reset its connection where the harness can; else drop it as a cancelled close does."""
        await self.tap.pause()
        if "cut" in self._lab.harness.faults:
            await self._lab.harness.cut()
        closing = asyncio.create_task(self.tap.receiver.close())
        if "cut" not in self._lab.harness.faults:
            closing.cancel()
        await asyncio.wait({closing}, timeout=CLOSE_S)
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await self._driver.close()


# --- settling ------------------------------------------------------------------------------------


async def measure_settle(lab: Lab) -> str:
    """Take three down each lane, accept the middle ones, die: exactly the others come back."""
    on = await bench(lab)
    holder = await Holder.open(on)
    keys = [f"k{n}" for n in range(max(3, lab.harness.lanes))]
    rounds = [[on.body(key) for key in keys] for _ in range(3)]
    for together in rounds:
        await on.put(*together)
    bodies = [body for together in rounds for body in together]
    taken = await holder.tap.take(len(bodies), soon(lab))
    assert taken, "nothing arrived"
    # Where a key has one out at a time, none of the middle ones did.
    accepted = [d for d in taken if d.body in rounds[1]] or taken[-1:]
    done = [bytes(d.body) for d in accepted]
    if lab.kind.settles:
        await holder.tap.settle(ACCEPT, *accepted)
        await asyncio.sleep(lab.harness.quiet_s)  # where the broker never answers, ACK-12 measures how soon it holds
    await holder.die()
    if not lab.kind.settles:
        return await _nothing_held(on)
    tap = await on.tap()
    tap.on_delivery(tap.accept_soon)
    expected = Counter(bodies) - Counter(done)
    await tap.until(lambda: not expected - Counter(tap.bodies), on.return_s + soon(lab))
    if on.lease_s:
        await asyncio.sleep(on.lease_s)
    await on.sentinel(tap)
    came = [b for b in tap.bodies if not b.endswith(b"sentinel")]
    again = [body for body in came if body in done]
    lab.measured |= {"returned": len(came), "accepted_returned": len(again)}
    if again:
        return "none"
    return "individual" if Counter(came) == expected else f"others lost or repeated: {came}"


async def _nothing_held(on: Bench) -> str:
    """A Signal's messages are gone once handed out; a later listener sees only what is new."""
    tap = await on.tap()
    await asyncio.sleep(on.lab.harness.quiet_s)
    await on.sentinel(tap)
    return "none" if len(tap.bodies) == on.lab.harness.lanes else "kept"


async def measure_release(lab: Lab) -> str:
    """Hand one back: at once, and with a delay."""
    if not lab.kind.settles:
        return await measure_settle(lab)
    on = await bench(lab)
    tap = await on.tap()
    patience_s = min(soon(lab), 0.6 * on.lease_s or soon(lab))
    if await _back_after(on, tap, RELEASE, patience_s) is None:
        return "none"
    wait_s = 0.3
    back_s = await _back_after(on, tap, Disposition("release", wait_s), wait_s + soon(lab))
    lab.measured["delayed_s"] = back_s
    return "delay" if back_s is not None and back_s >= 0.9 * wait_s else "now"


async def _back_after(on: Bench, tap: Tap, disposition: Disposition, wait_s: float) -> float | None:
    """Seconds until a released message is back; None if it is not, or cannot be released."""
    body, start = on.body(), len(tap.got)
    await on.put(body)
    taken = await tap.take(start + 1)
    assert len(taken) > start, "nothing arrived"
    began = time.monotonic()
    try:
        if await tap.settle(disposition, taken[start]):
            return None
    except Exception:  # an adapter may refuse in its own way what core would never send
        return None
    if not await tap.until(lambda: len(tap.got) > start + 1, wait_s):
        return None
    back_s, again = tap.got[start + 1]
    await tap.settle(ACCEPT, again)
    return back_s - began


async def measure_lease(lab: Lab) -> str:
    """Hold one in a living consumer, then let it die: what brings it back?"""
    return (await _lease(lab))[0]


async def measure_lease_s(lab: Lab) -> float:
    """Seconds until a held message leaves a living consumer; 0 if it does not."""
    return (await _lease(lab))[1]


async def _lease(lab: Lab) -> tuple[str, float]:
    on = await bench(lab)
    declared_s = on.declared.lease_s
    if declared_s > LONGEST_WAIT_S:
        raise NotRun(f"a lease of {declared_s:g} s is too long to wait for")
    holder = await Holder.open(on)
    sent = 2 * lab.harness.lanes  # some down each: whichever is moved holds one
    await on.put(*(on.body(f"k{n}") for n in range(sent)))
    assert len(await holder.tap.take(sent)) == sent, "nothing arrived"
    began = holder.tap.got[0][0]
    if await holder.tap.until(lambda: len(holder.tap.got) > sent, 1.5 * declared_s + lab.harness.quiet_s):
        lease_s = lab.measured["lease_s"] = holder.tap.got[sent][0] - began
        close = abs(lease_s - declared_s) <= 0.25 * declared_s + 0.15
        return "timeout", declared_s if close else round(lease_s, 2)
    other = await on.tap()
    joins_s = on.return_s if on.declared.lease == "membership" else 2 * lab.harness.quiet_s  # others give nothing up
    if await other.until(lambda: other.got, joins_s):
        return "membership", 0.0
    died_s = time.monotonic()
    await holder.die()
    if await other.until(lambda: other.got, on.return_s + soon(lab)):
        lab.measured["takeover_s"] = other.got[0][0] - died_s
        return "connection", 0.0
    return "none", 0.0


async def measure_hold_s(lab: Lab) -> float:
    """Hold one with its lease extended, on both sides of the declared limit."""
    if not lab.kind.settles:
        raise NotRun("a Signal's messages are not held")
    on = await bench(lab)
    limit_s = on.declared.hold_s
    if math.isfinite(limit_s) and limit_s > LONGEST_WAIT_S:
        raise NotRun(f"holding for {limit_s:g} s is too long to wait for")
    tap = await on.tap()
    await on.put(on.body())
    (delivery,) = await tap.take(1)
    began = time.monotonic()
    end = began + (1.5 * limit_s + 0.2 if math.isfinite(limit_s) else 2.0)
    while time.monotonic() < end and len(tap.got) == 1:
        if isinstance(tap.receiver, Leased):
            tap.receiver.extend_batch([delivery.receipt])
        await asyncio.sleep(max(0.02, min(0.25, on.lease_s / 4)))
    if len(tap.got) > 1:
        held_s = lab.measured["held_s"] = tap.got[1][0] - began
        return limit_s if 0.7 * limit_s <= held_s else round(held_s, 2)
    if math.isinf(limit_s):
        raise NotRun("held for 2 s; that there is no limit at all cannot be waited for")
    return math.inf


async def measure_count(lab: Lab) -> str:
    """Three consumers die with the same message in hand: what do they read on it?"""
    on = await bench(lab)
    seen: list[Delivery[Any]] = []
    holder = await Holder.open(on)
    await on.put(on.body())
    for _ in range(3):
        taken = await holder.tap.take(1, on.return_s + soon(lab))
        await holder.die()
        if not taken:
            break
        seen += taken
        if len(seen) < 3:
            holder = await Holder.open(on)
    counts = lab.measured["deliveries"] = [getattr(d, "deliveries", None) for d in seen]
    flags = lab.measured["redelivered"] = [getattr(d, "redelivered", None) for d in seen]
    if len(seen) < 3:
        return "none"
    if counts == [1, 2, 3]:
        return "exact"
    if counts != [None, None, None]:
        return f"wrong: {counts}"
    return "flag" if flags == [False, True, True] else "none"


# --- who gets what, and in which order -----------------------------------------------------------


async def measure_backlog(lab: Lab) -> bool:
    """Publish before any consumer came."""
    on = await bench(lab)
    early = on.body()
    await on.put(early)
    tap = await on.tap()
    await tap.until(lambda: early in tap.bodies, max(soon(lab) / 4, lab.harness.quiet_s))
    await on.sentinel(tap)
    return early in tap.bodies


async def measure_order(lab: Lab) -> str:
    """Two hundred messages, one publisher, one consumer, no failures."""
    on = await bench(lab)
    tap = await on.tap()
    if lab.kind.settles:
        tap.on_delivery(tap.accept_soon)
    bodies = [on.body() for _ in range(200)]
    for start in range(0, len(bodies), 40):
        await on.put(*bodies[start : start + 40])
    await tap.take(len(bodies))
    assert Counter(tap.bodies) == Counter(bodies), "what arrived is not what was sent"
    return "publisher" if tap.bodies == bodies else "none"


async def measure_order_redelivery(lab: Lab) -> bool:
    """One consumer dies with the first five of ten in hand, while another is there."""
    on = await bench(lab)
    if not lab.kind.settles:
        return await _nothing_held(on) != "none"
    holder = await Holder.open(on, window=5)
    bodies = [on.body() for _ in range(10)]
    for body in bodies:
        await on.put(body)
    held = await holder.tap.take(5, soon(lab))
    assert held, "nothing arrived"
    other = await on.tap(window=20)
    other.on_delivery(other.accept_soon)
    await other.until(lambda: len(other.got) + len(held) == 10, soon(lab) / 2)
    await holder.die()
    await other.until(lambda: set(other.bodies) >= set(bodies), on.return_s + soon(lab))
    assert set(other.bodies) >= set(bodies), "what the dead consumer held did not come back"
    lab.measured["arrived"] = [int(b.split(b":")[1]) for b in other.bodies]
    return list(dict.fromkeys(other.bodies)) == bodies and len(other.bodies) == len(bodies)


async def measure_order_competition(lab: Lab) -> bool:
    """Two consumers at once: never both with a message of one key, and each key in order."""
    on = await bench(lab)
    if not lab.kind.settles:
        return False  # two listeners of a Signal both run every message
    taps = [await on.tap(window=5) for _ in range(2)]
    holding: dict[str, Counter[int]] = defaultdict(Counter)
    seen: dict[str, list[bytes]] = defaultdict(list)
    breaches: list[str] = []
    working: set[asyncio.Task[None]] = set()

    def take(member: int, tap: Tap, delivery: Delivery[Any]) -> None:
        key = bytes(delivery.body).split(b":")[0].decode()
        holding[key][member] += 1
        seen[key].append(bytes(delivery.body))
        if holding[key][1 - member]:
            breaches.append(key)
        task = asyncio.create_task(work(key, member, tap, delivery))
        working.add(task)
        task.add_done_callback(working.discard)

    async def work(key: str, member: int, tap: Tap, delivery: Delivery[Any]) -> None:
        await asyncio.sleep(lab.random.uniform(0, 0.004))
        holding[key][member] -= 1  # before it is settled: from then on it may be the other's turn
        tap.accept_soon(delivery)

    for member, tap in enumerate(taps):
        tap.on_delivery(lambda d, m=member, t=tap: take(m, t, d))  # type: ignore[misc]
    if lab.harness.lanes > 1:  # until each has its share: what is dealt anew meanwhile is lost to these taps
        await _until_both_work(on, *taps)
    sent: dict[str, list[bytes]] = defaultdict(list)
    for before in (seen, breaches, holding):
        before.clear()
    for n in range(60):
        key = f"k{n % 3}"
        sent[key].append(on.body(key))
        await on.put(sent[key][-1])
    await taps[0].until(lambda: sum(map(len, seen.values())) >= 60, WAIT_S)
    lab.measured["overlaps"] = len(breaches)
    return not breaches and dict(seen) == dict(sent)


async def _until_both_work(on: Bench, one: Tap, other: Tap) -> None:
    """Send to several keys until either has got something, and nothing is under way any more."""
    deadline = time.monotonic() + on.lab.harness.takeover_s
    count = 0
    while time.monotonic() < deadline and not (one.got and other.got):
        await on.put(*(on.body(f"k{n}") for n in range(4)))
        count += 4
        await one.until(lambda: one.got and other.got, 0.2)
    await one.until(lambda: len(one.got) + len(other.got) >= count, WAIT_S)
    await asyncio.sleep(on.lab.harness.quiet_s)


async def measure_compete(lab: Lab) -> str:
    """Two consumers of one group, one of them frozen with its window full."""
    on = await bench(lab)
    group = "g1" if lab.kind.tag == "signal" else None
    try:
        frozen = await on.tap(window=5, group=group)
        active = await on.tap(window=500, group=group)
    except MessagingError:  # one consumer at a time, or no groups here
        return "none"
    if not lab.kind.settles:
        return await _signal_competition(on, frozen, active)
    active.on_delivery(active.accept_soon)
    bodies = [on.body(f"k{n}") for n in range(60)]
    for start in range(0, 60, 6):
        await on.put(*bodies[start : start + 6])
    patience_s = soon(lab) if not on.lease_s else 0.5 * on.lease_s
    await active.until(lambda: len(active.got) + len(frozen.got) >= 60, patience_s)
    await asyncio.sleep(min(lab.harness.quiet_s, patience_s))
    if lab.harness.lanes > 1:  # who joined a moment ago may still wait for a share
        await active.until(lambda: active.got and frozen.got, lab.harness.takeover_s)
    a, f = len(set(active.bodies)), len(set(frozen.bodies))
    lab.measured |= {"active": a, "frozen": f}
    if a + f > 60:  # both get the same
        return "copies"
    if not a or not f:
        return "standby"
    return "demand" if a + f == 60 and f <= 5 else "round_robin"


async def _signal_competition(on: Bench, frozen: Tap, active: Tap) -> str:
    bodies = [on.body() for _ in range(60)]
    await on.put(*bodies)
    await active.until(lambda: len(active.got) + len(frozen.got) >= 60, soon(on.lab))
    await on.put(on.body())
    both = Counter(active.bodies) + Counter(frozen.bodies)
    on.lab.measured |= {"active": len(active.got), "other": len(frozen.got)}
    if not active.got or not frozen.got or max(both.values()) > 1:
        return "none"
    await frozen.pause()
    start = len(active.got)
    await on.put(*(on.body() for _ in range(60)))
    return "demand" if await active.until(lambda: len(active.got) >= start + 60, soon(on.lab)) else "round_robin"


async def measure_groups(lab: Lab) -> str:
    """Two groups, one of them away for a while."""
    if lab.kind.tag == "queue":
        queue = lab.destination()
        bus = await lab.open_bus()
        try:
            async with bus.consume(queue, group="g1"):
                return "accepted on a Queue"
        except UsageError:
            return "none"
    destination: Destination[Any] = lab.destination(groups=("g1", "g2"))
    on = await bench(lab, destination)
    try:
        first, second = await on.tap(group="g1"), await on.tap(group="g2")
    except MessagingError:
        return "none"
    both, away = on.body(), on.body()
    await on.put(both)
    if not await first.until(lambda: both in first.bodies and both in second.bodies, 4 * soon(lab)):
        return "none"
    if lab.kind.settles:
        for tap in (first, second):
            await tap.settle(ACCEPT, tap.got[0][1])
    await second.close()
    await on.put(away)
    again = await on.tap(group="g2")
    await again.until(lambda: away in again.bodies, max(soon(lab) / 4, lab.harness.quiet_s))
    await on.sentinel(again)
    if again.bodies.count(both):
        return "repeated"
    return "durable" if away in again.bodies else "live"


async def measure_window(lab: Lab) -> bool:
    """Ten wait, three may be out: three are, and the next comes for one that is settled."""
    on = await bench(lab)
    tap = await on.tap(window=3)
    for key in "abcdefghij":
        await on.put(on.body(key))
    await tap.take(1)
    patience_s = max(lab.harness.quiet_s, 0.1)
    await asyncio.sleep(min(patience_s, 0.5 * on.lease_s or patience_s))
    first = lab.measured["unsettled"] = len(tap.got)
    if first > 3:
        return False
    before = len(tap.got)
    await tap.settle(ACCEPT, tap.got[0][1])
    assert await tap.until(lambda: len(tap.got) > before, WAIT_S), "nothing follows a settlement"
    return True


# --- sending -------------------------------------------------------------------------------------


async def measure_replay(lab: Lab) -> bool:
    """Settle some messages, then ask for all that is stored."""
    on = await bench(lab)
    bodies = [on.body() for _ in range(6)]
    tap = await on.tap()
    if lab.kind.settles:
        tap.on_delivery(tap.accept_soon)
    await on.put(*bodies)
    await tap.take(len(bodies))
    try:
        reader = await on.driver.open_reader(on.destination, None)
    except CapabilityError:
        return False
    found = []
    async with asyncio.timeout(WAIT_S):
        while (message := await reader.read()) is not None:
            found.append(bytes(message.body))
    await reader.close()
    return Counter(found) == Counter(bodies)


async def measure_lag(lab: Lab) -> str:
    """Six are stored, two of them handed out, one settled: how many are told of at each step?"""
    on = await bench(lab)
    try:
        await on.driver.lag(on.destination, lab.group)
    except CapabilityError:
        return "none"
    if not await _lags(on, 0, WAIT_S):
        return f"wrong: {lab.measured['lag']} of an empty one"
    await on.put(*(on.body(key) for key in "abcdef"))
    if not await _lags(on, 6, WAIT_S):
        return f"wrong: {lab.measured['lag']} of 6 stored"
    tap = await on.tap(window=2)
    taken = await tap.take(2)
    assert len(taken) == 2, "nothing arrived"
    wait_s = WAIT_S if on.declared.lag == "waiting" else soon(lab)
    value, out = ("waiting", 2) if await _lags(on, 4, wait_s, tap) else ("unsettled", 0)
    if not await _lags(on, 6 - out, WAIT_S, tap):
        return f"wrong: {lab.measured['lag']} of 6 stored, 2 of them handed out"
    assert not await tap.settle(ACCEPT, taken[0]), "the settlement was not recorded"
    assert len(await tap.take(3)) == 3, "nothing follows a settlement"
    if not await _lags(on, 5 - out, WAIT_S):
        return f"wrong: {lab.measured['lag']} of 6 stored, one of them settled"
    return value


async def _lags(on: Bench, count: int, wait_s: float, tap: Tap | None = None) -> bool:
    """Is that many told of within `wait_s`, and still so a moment later? A broker may be late. `tap` keeps leases."""
    deadline = time.monotonic() + wait_s
    while True:
        for _ in range(2):
            if tap is not None and isinstance(tap.receiver, Leased):
                tap.receiver.extend_batch([delivery.receipt for _, delivery in tap.got])
            found = on.lab.measured["lag"] = await on.driver.lag(on.destination, on.lab.group)
            if found != count:
                break
            await asyncio.sleep(on.lab.harness.quiet_s / 2)
        else:
            return True
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.05)


async def measure_confirm(lab: Lab) -> str:
    """At the moment of each ok, is the message there? And does a dead connection still say ok?"""
    if await _ok_only_when_settled(lab):
        return "settled"
    on = await bench(lab)
    if await lab.harness.depth(on.destination, lab.group) is not None:
        sent = 10
        there = 0  # a broker's statistics may lag now and then; an ok before the message is stored never finds it
        for n in range(1, sent + 1):
            await on.put(on.body())
            there += await lab.harness.depth(on.destination, lab.group) == n
        lab.measured["there_at_ok"] = there
        if there > sent / 2:
            return "stored"
        await asyncio.sleep(lab.harness.quiet_s)
        if await lab.harness.depth(on.destination, lab.group) == sent:
            return "received"
    if "cut" not in lab.harness.faults:
        raise NotRun("whether ok is said without an answer shows only on a cut connection")
    return await _confirm_when_cut(lab)


async def _ok_only_when_settled(lab: Lab) -> bool:
    """Does a send stay without an outcome while its message is in a consumer's hands, and get it then?"""
    if not lab.kind.settles:
        return False
    on = await bench(lab)
    tap, sender = await on.tap(), await on.sender()
    outcomes: list[SendResult] = []
    sender.send_batch([on.outgoing(on.body())], lambda found: outcomes.extend(r for _, r in found))
    taken = await tap.take(1)
    assert taken, "nothing arrived"
    await asyncio.sleep(lab.harness.quiet_s)
    if outcomes:
        return False
    await tap.settle(ACCEPT, taken[0])
    await tap.until(lambda: outcomes, WAIT_S)
    return [r.outcome for r in outcomes] == [Outcome.OK]


async def _confirm_when_cut(lab: Lab) -> str:
    """Cut, then send: an ok for what cannot have reached anybody proves nothing."""
    oks = unknown = 0
    for _ in range(5):
        on = await bench(lab, faulty=True)
        await on.put(on.body())
        sender = await on.sender()
        outcomes: list[SendResult] = []

        def keep(found: Outcomes, into: list[SendResult] = outcomes) -> None:
            into += [result for _, result in found]

        cutting = asyncio.ensure_future(lab.harness.cut())
        for _ in range(20):
            message = on.outgoing(on.body())
            with suppress(ConnectionLost):
                sender.send_batch([message], keep)
            await asyncio.sleep(0)
        await cutting
        await asyncio.sleep(0.1)
        reader = await on.lab.driver()
        oks += sum(r.outcome is Outcome.OK for r in outcomes)
        unknown += sum(r.outcome is Outcome.INDETERMINATE for r in outcomes)
        with suppress(MessagingError, TimeoutError):
            await reader.close()
    lab.measured["ok_on_a_cut_connection"] = oks
    return "received" if unknown and not oks else "none"


async def measure_route_error(lab: Lab) -> bool:
    """Send to what was deleted behind the sender's back."""
    on = await bench(lab)
    sender = await on.sender()
    await lab.harness.remove([on.destination])
    (result,) = await on.send(on.outgoing(on.body()))
    lab.measured["result"] = f"{result.outcome}: {type(result.error).__name__}"
    del sender
    return result.outcome is Outcome.REJECTED and isinstance(result.error, NotFound)


async def measure_durable(lab: Lab) -> str:
    """What confirmed messages survive: the broker's SIGKILL, or only its graceful restart."""
    on = await bench(lab)
    if not await _waits(on):
        return "none"
    for fault, value in (("kill", "kill"), ("restart", "restart")):
        lab.require_fault(fault)
        if await _survives(lab, fault):
            return value
    return "none"


async def _waits(on: Bench) -> bool:
    """Is anything stored at all? What is not cannot survive."""
    body = on.body()
    await on.put(body)
    tap = await on.tap()
    if on.lab.kind.settles:
        tap.on_delivery(tap.accept_soon)
    await tap.until(lambda: body in tap.bodies, max(soon(on.lab) / 4, on.lab.harness.quiet_s))
    await on.sentinel(tap)
    return body in tap.bodies


async def _survives(lab: Lab, fault: str) -> bool:
    on = await bench(lab)
    await asyncio.sleep(lab.harness.settle_before_kill_s)
    bodies = [on.body() for _ in range(20)]
    await on.put(*bodies)
    await asyncio.sleep(lab.harness.quiet_s)  # an ok that means "received" is stored a little later
    await (lab.harness.kill() if fault == "kill" else lab.harness.restart())
    deadline = time.monotonic() + lab.harness.recovery_s
    while True:
        try:
            after = Bench(lab, await lab.driver(), on.destination)
            tap = await after.tap()
            break
        except NotFound:
            return False
        except (MessagingError, TimeoutError):
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.2)
    if lab.kind.settles:
        tap.on_delivery(tap.accept_soon)
    await tap.take(len(bodies), soon(lab))
    await after.sentinel(tap)
    lab.measured[f"survived_{fault}"] = len(set(bodies) & set(tap.bodies))
    return set(bodies) <= set(tap.bodies)


async def measure_ok_means(lab: Lab) -> str:
    """Where is a message when its send says ok? Only a kill of the broker can tell."""
    if await _ok_only_when_settled(lab):
        return "settled"
    on = await bench(lab)
    if await lab.harness.depth(on.destination, lab.group) is None or not await _waits(on):
        return "buffer"
    lab.require_fault("kill")
    if not await _survives(lab, "kill"):
        return "memory"
    if on.declared.ok_means in ("fsync", "quorum"):
        raise NotRun("survived a kill; what lies beyond the page cache shows only without power")
    return "page_cache"


async def measure_dedup_s(lab: Lab) -> float:
    """Send one id again at once, shortly before and shortly after the declared window ends."""
    on = await bench(lab)
    window_s = on.declared.dedup_s
    tap = await on.tap()
    if lab.kind.settles:
        tap.on_delivery(tap.accept_soon)  # an unsettled message may keep its key, or come again by itself
    twice = on.outgoing(on.body())
    await on.send(twice)
    await on.send(twice)
    await on.sentinel(tap)
    if tap.bodies.count(twice.body) > 1:
        return 0.0
    if not window_s:
        return math.inf
    if window_s > LONGEST_WAIT_S:
        lab.measured["partly"] = "stored once; the window's end was not waited for"
        return window_s
    for _ in range(2):
        with suppress(NotRun):
            return await _dedup_edges(on, tap, window_s)
    return await _dedup_edges(on, tap, window_s)


async def _dedup_edges(on: Bench, tap: Tap, window_s: float) -> float:
    message = on.outgoing(on.body())
    await on.send(message)
    began = time.monotonic()
    for moment, stored in ((0.65 * window_s, False), (1.35 * window_s + 0.1, True)):
        await asyncio.sleep(began + moment - time.monotonic())
        if not stored and time.monotonic() - began > 0.9 * window_s:
            raise NotRun("this machine is too busy to hit the window's end")
        before = tap.bodies.count(message.body)
        await on.send(message)
        await on.sentinel(tap)
        if (tap.bodies.count(message.body) > before) != stored:
            return math.inf if stored else round(moment, 2)
        began = began if not stored else time.monotonic()
    return window_s


async def measure_batch(lab: Lab) -> str:
    """Ten messages, the fourth of them impossible: what becomes of the others?"""
    on = await bench(lab)
    tap = await on.tap()
    if lab.kind.settles:
        tap.on_delivery(tap.accept_soon)
    messages = [on.outgoing(on.body()) for _ in range(10)]
    messages[3] = _impossible(on)
    results = await on.send(*messages)
    assert results[3].outcome is Outcome.REJECTED, f"the bad one was {results[3].outcome}"
    ok = [n for n, r in enumerate(results) if r.outcome is Outcome.OK]
    expected = Counter(messages[n].body for n in ok)
    await tap.until(lambda: not expected - Counter(tap.bodies), soon(lab))
    await on.sentinel(tap)
    came = Counter(b for b in tap.bodies if not b.endswith(b"sentinel"))
    lab.measured["ok"] = ok
    if came != expected:
        return f"said ok for {sum(expected.values())}, delivered {sum(came.values())}"
    modes: dict[tuple[int, ...], Literal["entries", "sequential", "atomic"]] = {
        (0, 1, 2, 4, 5, 6, 7, 8, 9): "entries",
        (0, 1, 2): "sequential",
        (): "atomic",
    }
    return modes.get(tuple(ok), f"ok for {ok}")


def _impossible(on: Bench) -> Outgoing:
    """A message that the adapter must answer REJECTED: an option it does not have, or too large."""
    declared = on.declared
    if not declared.delay:
        return on.outgoing(on.body(), delay_s=0.1)
    if not declared.ttl:
        return on.outgoing(on.body(), ttl_s=60.0)
    if not declared.priority:
        return on.outgoing(on.body(), priority=1)
    if declared.max_body > CEILING_BYTES:
        raise NotRun("every option is supported and the size limit is too far")
    return on.outgoing(on.body().ljust(declared.max_body + 1, b"."))


async def measure_ttl(lab: Lab) -> bool | str:
    """One that expires before the consumer comes, one that does not."""
    on = await bench(lab)
    dead, alive = on.body(), on.body()
    refused = _refused(await on.send(on.outgoing(dead, ttl_s=0.2), on.outgoing(alive, ttl_s=60.0)))
    if refused:
        return False
    await asyncio.sleep(0.5)
    tap = await on.tap()
    await tap.until(lambda: alive in tap.bodies, soon(lab))
    await on.sentinel(tap)
    if dead in tap.bodies or alive not in tap.bodies:
        return "ignored" if dead in tap.bodies else "the unexpired one is lost"
    return True


async def measure_delay(lab: Lab) -> bool | str:
    """A delayed message comes no sooner, and comes."""
    on = await bench(lab)
    tap = await on.tap()
    body, wait_s = on.body(), 0.45
    began = time.monotonic()
    if _refused(await on.send(on.outgoing(body, delay_s=wait_s))):
        return False
    if not await tap.until(lambda: tap.got, wait_s + soon(lab)):
        return "lost"
    took_s = lab.measured["after_s"] = tap.got[0][0] - began
    return True if took_s >= wait_s else f"early, after {took_s:.2f} s"


async def measure_priority(lab: Lab) -> int | str:
    """A backlog sent from the lowest priority to the highest, read by one consumer."""
    on = await bench(lab)
    levels = 2 * max(on.declared.priority, 2)
    accepted: list[bytes] = []
    for priority in range(levels):
        message = on.outgoing(on.body(), priority=priority)
        if not _refused(await on.send(message), but=NotFound):
            accepted.append(message.body)
    if not accepted:
        return 0
    tap = await on.tap(window=1)
    if lab.kind.settles:
        tap.on_delivery(tap.accept_soon)
    await tap.take(len(accepted), soon(lab))
    lab.measured["accepted"], lab.measured["read"] = len(accepted), len(tap.bodies)
    if sorted(tap.bodies) != sorted(accepted):
        return "some are lost" if lab.kind.settles else 0
    rank = [accepted.index(b) for b in tap.bodies]
    return 0 if rank == sorted(rank) else 1 + sum(a > b for a, b in itertools.pairwise(rank))


def _refused(results: Sequence[SendResult], but: type[MessagingError] | None = None) -> bool:
    """Did the adapter answer every one REJECTED, with an error that says what it cannot do?"""
    refusals = [r for r in results if r.outcome is Outcome.REJECTED]
    for result in refusals:
        assert isinstance(result.error, MessagingError), f"refused with {result.error!r}"
        assert but is None or not isinstance(result.error, but), f"refused with {result.error!r}"
    return len(refusals) == len(results)


async def measure_max_body(lab: Lab) -> int:
    """A body of the declared size arrives whole; one of twice the size cannot be sent."""
    on = await bench(lab)
    declared = on.declared.max_body
    if declared > CEILING_BYTES:
        raise NotRun(f"bodies of {declared} bytes are too large for this machine")
    tap = await on.tap()
    largest = lab.random.randbytes(max(declared - 2, 0))
    largest = b"k:" + largest if declared > 2 else b"k" * declared
    if declared and not await _arrives(on, tap, largest):
        lab.measured["less_than"] = declared
        return declared - 1
    over = b"k:".ljust(max(2 * declared, 64), b".")
    if await _arrives(on, tap, over):
        return len(over)
    return declared


async def _arrives(on: Bench, tap: Tap, body: bytes) -> bool:
    try:
        (result,) = await on.send(on.outgoing(body))
    except TimeoutError:
        return False
    if result.outcome is not Outcome.OK:
        return False
    return await tap.until(lambda: body in tap.bodies, WAIT_S if on.lab.kind.settles else soon(on.lab))


_TEXTS: Final[Mapping[str, Sequence[str]]] = {
    "field": ("plain", "", "a:b;c=d", '"quoted"', "inner  blanks", "~" * 200),
    "ascii": (" leading", "trailing ", " "),
    "text": ("\u2603 snow", "ä", "line\nbreak", "tab\there", "nul\0"),
}
_NAMES: Final[Mapping[str, Sequence[str]]] = {
    "token": ("x", "X", "x-1.y_z", "!#$%&'*+.^`|~"),
    "text": ("with blank", "a:b", "grün", "\u2603"),
}


async def measure_headers(lab: Lab) -> HeaderRules | str | None:
    """Which values and names arrive as they were sent, and whether the declared amount does."""
    on = await bench(lab)
    declared = on.declared.headers
    tap = await on.tap()
    charset = names = ""
    for level, values in _TEXTS.items():
        if not await _travels(on, tap, [{"x": value} for value in values]):
            break
        charset = level
    if not charset:
        return None
    for level, samples in _NAMES.items():
        if not await _travels(on, tap, [{name: "v"} for name in samples]):
            break
        names = level
    lab.measured |= {"charset": charset, "names": names}
    if declared is None:
        return HeaderRules(max_count=1, max_bytes=200, charset=charset, names=names)  # type: ignore[arg-type]
    count, size = declared.max_count, declared.max_bytes
    many = {f"h{n}": "v" for n in range(min(count, size // 6))}
    if not await _travels(on, tap, [many, {"long": "v" * (size - len("long"))}]):
        count, size = 0, 0
    return HeaderRules(max_count=count, max_bytes=size, charset=charset, names=names)  # type: ignore[arg-type]


async def _travels(on: Bench, tap: Tap, samples: Sequence[Mapping[str, str]]) -> bool:
    """Do all of these headers arrive exactly?"""
    for headers in samples:
        body = on.body()
        try:
            (result,) = await on.send(on.outgoing(body, headers=headers))
        except (MessagingError, ValueError, TypeError, TimeoutError):
            return False
        if result.outcome is not Outcome.OK:
            return False
        patience_s = WAIT_S if on.lab.kind.settles else soon(on.lab)  # what was accepted must arrive
        if not await tap.until(lambda body=body: body in tap.bodies, patience_s):  # type: ignore[misc]
            return False
        arrived = next(d for _, d in tap.got if d.body == body)
        if dict(arrived.headers) != dict(headers):
            on.lab.measured["altered"] = repr(headers)[:80]
            return False
        if on.lab.kind.settles:
            tap.accept_soon(arrived)
    return True


PROBES: Final[Mapping[str, Probe]] = {
    name.removeprefix("measure_"): probe for name, probe in list(globals().items()) if name.startswith("measure_")
}


async def propose(lab: Lab) -> Mapping[str, Any]:
    """Measure every flag one after the other; a NotRun becomes its reason as a text."""
    found: dict[str, Any] = {}
    for flag, probe in PROBES.items():
        try:
            found[flag] = await probe(lab)
        except NotRun as reason:
            found[flag] = f"? {reason}"
    return found


def agree(flag: str, declared: Any, measured: Any) -> bool:
    """Is what was measured what is declared?"""
    if isinstance(declared, float) and isinstance(measured, (int, float)):
        return math.isclose(declared, measured, rel_tol=1e-6)
    return bool(declared == measured) and isinstance(declared, bool) == isinstance(measured, bool)


__all__ = ["PROBES", "Bench", "Capabilities", "Holder", "Tap", "Topic", "agree", "bench", "propose"]
