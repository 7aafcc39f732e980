"""The contract's cases, and what they share: series of messages, consumers that die, proven silence.

Bodies look like b"k1:17:<destination>": the key, the number, and where they belong, so that a
message that strays to another destination is seen.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from typing import Any, Final

from messaging_sdk import Bus, Capabilities, Delivery, Destination
from messaging_sdk.config import from_mapping
from messaging_sdk.registry import driver_class
from messaging_sdk.spi import Driver

from ..lab import PATIENCE_S, Arrival, Lab, eventually

WAIT_S: Final = PATIENCE_S
"""Patience for what must happen without any fault; far above any honest latency."""
KEYS: Final = ("k0", "k1", "k2", "k3")

_tokens: Final = itertools.count()


# --- messages


def body_of(destination: Destination[Any], key: str, number: int) -> bytes:
    return f"{key}:{number}:{destination.name}".encode()


def series(destination: Destination[Any], count: int, *, keys: Sequence[str] = KEYS, start: int = 0) -> list[bytes]:
    """`count` bodies, their keys in turn, their numbers ascending from `start`."""
    return [body_of(destination, keys[n % len(keys)], n) for n in range(start, start + count)]


def key_in(body: bytes) -> str:
    return body.split(b":")[0].decode()


def number_in(body: bytes) -> int:
    return int(body.split(b":")[1])


def bodies(arrivals: Iterable[Arrival]) -> list[bytes]:
    return [a.body for a in arrivals]


def real(arrivals: Iterable[Arrival]) -> list[Arrival]:
    """The arrivals that are no sentinels."""
    return [a for a in arrivals if not a.body.endswith(b"sentinel")]


# --- comparing; nothing here removes a repeat before it is counted


def assert_exactly(arrived: Iterable[bytes], expected: Iterable[bytes], what: str = "") -> None:
    """Each expected body arrived as often as it is expected, and nothing else did."""
    have, want = Counter(arrived), Counter(expected)
    missing, extra = want - have, have - want
    assert not missing, f"{what} {missing.total()} missing, such as {sorted(missing)[:3]}"
    assert not extra, f"{what} {extra.total()} repeated or foreign, such as {sorted(extra)[:3]}"


def repeated(arrived: Iterable[bytes]) -> Counter[bytes]:
    """How often each body came beyond the first time."""
    return Counter({body: n - 1 for body, n in Counter(arrived).items() if n > 1})


def first_times(arrived: Iterable[bytes]) -> list[bytes]:
    """The order in which bodies were seen first: what order means where repeats are allowed."""
    return list(dict.fromkeys(arrived))


def disorder(arrived: Iterable[bytes], *, per_key: bool) -> list[tuple[bytes, bytes]]:
    """Each pair of neighbours (of a key, or of all) of which the later does not have the higher number."""
    last: dict[str, bytes] = {}
    found = []
    for body in arrived:
        lane = key_in(body) if per_key else ""
        before = last.get(lane)
        if before is not None and number_in(body) <= number_in(before):
            found.append((before, body))
        last[lane] = body
    return found


# --- buses and traffic


async def opened(lab: Lab, *destinations: Destination[Any], faulty: bool = False, **options: Any) -> Bus:
    """An open bus that declares `destinations`; with `faulty` by the way that `cut` breaks."""
    bus = lab.bus(lab.harness.fault_backend() if faulty else None, **options)
    bus.declare(*destinations)
    await bus.open()
    return bus


async def publish_all(bus: Bus, destination: Destination[Any], values: Iterable[Any], **options: Any) -> None:
    """Publish all of `values` in order through one publisher; every one must be accepted."""
    async with bus.publisher(destination) as publisher:
        for value in values:
            await publisher.send(value, **options)
    assert not publisher.failed, f"{len(publisher.failed)} sends failed: {publisher.failed[:2]}"


def driver_class_of(lab: Lab) -> type[Driver]:
    return driver_class(from_mapping(lab.harness.settings()).backends["test"].address.scheme)


@contextmanager
def dialled_by(lab: Lab) -> Iterator[list[Driver]]:
    """Every driver of the backend under test whose `open` is called meanwhile."""
    opened: list[Driver] = []
    driver = driver_class_of(lab)
    honest = driver.open

    async def spying(self: Driver) -> None:
        opened.append(self)
        await honest(self)

    driver.open = spying  # type: ignore[method-assign]
    try:
        yield opened
    finally:
        driver.open = honest  # type: ignore[method-assign]


def lease_of(caps: Capabilities) -> float:
    """How long an unsettled delivery of a dead consumer may stay away because of a lease."""
    return caps.lease_s if caps.lease == "timeout" else 0.0


def takeover(lab: Lab, caps: Capabilities) -> float:
    """Within this time an unsettled delivery of a dead consumer reaches another one."""
    return lease_of(caps) + lab.harness.takeover_s


async def arrived(arrivals: Sequence[Arrival], count: int, wait_s: float = WAIT_S) -> None:
    """Wait until `count` arrivals that are no sentinels are there."""
    try:
        await eventually(lambda: len(real(arrivals)) >= count, wait_s, "")
    except AssertionError:
        raise AssertionError(f"{len(real(arrivals))} of {count} messages arrived within {wait_s:g} s") from None


async def silence(
    lab: Lab,
    bus: Bus,
    destination: Destination[Any],
    arrivals: Sequence[Arrival],
    *,
    keys: Sequence[str] = KEYS,
    wait_s: float = WAIT_S,
) -> None:
    """Wait `quiet_s`, then send a sentinel (one per key where ordered, else per lane), each of which must arrive."""
    await asyncio.sleep(lab.harness.quiet_s)
    names = list(keys) if destination.ordered else [keys[0]] * lab.harness.lanes
    sentinels = [f"{key}:{next(_tokens)}:{destination.name}:sentinel".encode() for key in names]
    for sentinel in sentinels:
        await bus.publish(destination, sentinel)
    wanted = Counter(sentinels)
    await eventually(lambda: not wanted - Counter(a.body for a in arrivals), wait_s, "the sentinel must arrive")


async def rest(
    lab: Lab,
    caps: Capabilities,
    destination: Destination[Any],
    *,
    expected: Sequence[bytes] = (),
    group: str | None = None,
    keys: Sequence[str] = KEYS,
    beyond_lease: bool = False,
) -> list[Arrival]:
    """All that the broker still has, read on a new connection to a sentinel; without the sentinels.

    `expected` must be among it: these are waited for as long as a lease may keep them, and what else a dead consumer
    held comes with them. Where nothing is expected of it, `beyond_lease` waits until a lease would have run out.
    """
    bus = await opened(lab, destination)
    async with lab.collecting(bus, destination, group=group, by="rest") as arrivals:
        with suppress(AssertionError):  # the caller's comparison says more
            await arrived(arrivals, len(expected), takeover(lab, caps) + WAIT_S / 2)
        if beyond_lease:
            await asyncio.sleep(1.5 * lease_of(caps))
        await silence(lab, bus, destination, arrivals, keys=keys)
        found = real(arrivals)
    await bus.close(timeout_s=3)
    missing = Counter(expected) - Counter(bodies(found))
    assert not missing, f"{missing.total()} never came back, such as {sorted(missing)[:3]}"
    return found


async def dead_letters(
    lab: Lab, caps: Capabilities, destination: Destination[Any], *, expected: int, group: str | None = None
) -> list[Delivery[bytes]]:
    """Everything in the dead-letter queue of `destination`, read to a sentinel; at least `expected`."""
    queue = dead_queue(lab, destination, group)
    bus = await opened(lab, queue)
    found: list[Delivery[bytes]] = []
    async with bus.consume(queue) as stream:
        deadline = time.monotonic() + WAIT_S
        while len(found) < expected and time.monotonic() < deadline:
            letter = await stream.next(0.2)
            if letter is not None:
                await letter.ack()
                found.append(letter)
        await asyncio.sleep(lab.harness.quiet_s)
        for _ in range(lab.harness.lanes):
            await bus.publish(queue, b"sentinel")
        sentinels = 0
        while sentinels < lab.harness.lanes:
            letter = await stream.next(WAIT_S)
            assert letter is not None, "the sentinel must arrive in the dead letters"
            await letter.ack()
            if letter.body == b"sentinel":
                sentinels += 1
            else:
                found.append(letter)
    await bus.close(timeout_s=3)
    return found


def dead_queue(lab: Lab, destination: Destination[Any], group: str | None = None) -> Destination[Any]:
    """The dead-letter queue of `destination`, removed when the case ends."""
    if destination.tag == "topic":
        return lab.track(destination.dead_letters(group or lab.group))  # type: ignore[attr-defined]
    return lab.track(destination.dead_letters())  # type: ignore[attr-defined]


async def take(stream: Any, count: int, wait_s: float = WAIT_S) -> list[Any]:
    """Exactly the next `count` deliveries of a stream, unsettled."""
    taken: list[Any] = []
    deadline = time.monotonic() + wait_s
    while len(taken) < count:
        left_s = deadline - time.monotonic()
        delivery = await stream.next(left_s) if left_s > 0 else None
        assert delivery is not None, f"{len(taken)} of {count} deliveries within {wait_s:g} s"
        taken.append(delivery)
    return taken


class Victim:
    """A consumer on connections of its own that dies as a killed process does: cut, and never back."""

    def __init__(self, lab: Lab, bus: Bus, stack: AsyncExitStack, stream: Any) -> None:
        self._lab = lab
        self._stack = stack
        self.bus = bus
        self.stream = stream

    async def take(self, count: int, wait_s: float = WAIT_S) -> list[Any]:
        return await take(self.stream, count, wait_s)

    async def die(self) -> None:
        """Every connection is reset, then the bus is dropped before it can open new ones."""
        await self._lab.harness.cut()
        await self._stack.aclose()
        await self.bus.close(timeout_s=0.5)


@asynccontextmanager
async def victim(
    lab: Lab, destination: Destination[Any], *, group: str | None = None, **options: Any
) -> AsyncIterator[Victim]:
    """A `Victim` that consumes `destination`; the case is not run where nothing can be cut."""
    lab.require_fault("cut")
    bus = await opened(lab, destination, faulty=True)
    async with AsyncExitStack() as stack:
        group = group if group is not None else lab.group
        stream = await stack.enter_async_context(bus.consume(destination, group=group, **options))
        yield Victim(lab, bus, stack, stream)


def register(bus: Any, destination: Destination[Any], handler: Callable[..., Any], **options: Any) -> None:
    """`bus.on` for a kind that is known only at run time: its types tell a Signal from the rest."""
    bus.on(destination, **options)(handler)


@asynccontextmanager
async def handling(
    lab: Lab,
    destination: Destination[Any],
    handler: Callable[..., Any],
    *,
    group: str | None = None,
    faulty: bool = False,
    **options: Any,
) -> AsyncIterator[Bus]:
    """A bus that runs `handler` for `destination`, which it also publishes to; closed at the end."""
    bus = lab.bus(lab.harness.fault_backend() if faulty else None)
    register(bus, destination, handler, group=group if group is not None else lab.group, **options)
    await bus.open()
    try:
        async with bus.consuming():
            yield bus
    finally:
        await bus.close(timeout_s=3)


def spread(destination: Destination[Any], count: int) -> list[bytes]:
    """`count` bodies, each with a key of its own, so that all can be out at once where ordered."""
    return series(destination, count, keys=[f"k{n}" for n in range(count)])


def overlaps(spans: Mapping[str, Sequence[tuple[float, float]]]) -> list[str]:
    """Keys of which two handler runs (start, end) were going on at the same time."""
    return [key for key, runs in spans.items() if any(a[1] > b[0] for a, b in itertools.pairwise(sorted(runs)))]
