"""What one case works with: fresh destinations of one kind, buses that are closed for it, and what it measured."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NoReturn

from messaging_sdk import (
    Bus,
    Capabilities,
    Closed,
    Destination,
    MessagingError,
    Publisher,
    Queue,
    Sent,
    SettleLost,
    Signal,
    Topic,
)
from messaging_sdk.capabilities import meets
from messaging_sdk.config import from_mapping
from messaging_sdk.registry import make_driver
from messaging_sdk.spi import Driver

from .harness import Harness

_counter: Final = itertools.count()
PATIENCE_S: Final = float(os.environ.get("MESSAGING_CONTRACT_PATIENCE_S", "30"))
"""How long a case waits for what must come: it bounds only how late a failure is told; a busy machine needs long."""

SETTLED_TOGETHER: Final = 50
"""Most messages that a collecting consumer settles with one wait."""


LASTING_S: Final = 300.0
"""Where a message waits in its sender: the deadline of a publish, beyond any case's end."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One row of what an adapter can be asked for; with adapter and server it names a column of the matrix."""

    name: str  # "queue", "queue/ordered", "topic", "topic/ordered", "signal"

    @property
    def tag(self) -> str:
        return self.name.split("/")[0]

    @property
    def ordered(self) -> bool:
        return self.name.endswith("/ordered")

    @property
    def settles(self) -> bool:
        return self.tag != "signal"


KINDS: Final = tuple(Kind(n) for n in ("queue", "queue/ordered", "topic", "topic/ordered", "signal"))


def refusal_of(capabilities: Capabilities, kind: Kind) -> str:
    """Why a backend that declares `capabilities` must refuse `kind`; empty if it must not."""
    if "tag" in capabilities.notes:
        return capabilities.notes["tag"]
    for flag, needed in minimum(kind).items():
        if not meets(flag, getattr(capabilities, flag), needed):
            return f"{kind.name} needs {flag}={needed!r}: {capabilities.notes.get(flag, 'absent')}"
    return ""


def minimum(kind: Kind) -> dict[str, Any]:
    """What makes a backend one that can offer `kind` at all."""
    if not kind.settles:
        return {}
    needed: dict[str, Any] = {"settle": "individual", "lease": "timeout", "confirm": "received"}
    needed |= {"groups": "durable"} if kind.tag == "topic" else {"backlog": True}
    if kind.ordered:
        needed |= {"order": "publisher", "order_redelivery": True, "order_competition": True}
    return needed


class NotRun(Exception):
    """A third result beside pass and fail: the case could not be run, and why. Never counted as a pass."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One line of a ledger: what arrived, in which order, where. Never de-duplicated."""

    body: bytes
    id: str
    key: str | None
    attempt: int
    deliveries: int | None
    at_s: float
    by: str = ""


async def while_outcomes_come(left: Callable[[], int]) -> None:
    """Where ok means settled: wait until none is left, or for some turns of 10 ms none has come.

    Turns and not seconds: on a busy machine they take as much longer as everything else in this process. The first
    outcome may take longer: the sender has yet to find its consumer.
    """
    before, quiet, patience = left(), 0, 80
    while before and quiet < patience:
        await asyncio.sleep(0.01)
        quiet += 1
        if (now := left()) != before:
            before, quiet, patience = now, 0, 40


class LastingPublisher(Publisher[Any]):
    """A publisher whose end waits as long as outcomes come, and then leaves the rest to come by itself."""

    async def flush(self) -> None:
        await while_outcomes_come(lambda: self._out)


class LastingBus(Bus):
    """A bus for a backend whose ok means that a consumer has settled the message, which lives in its sender until then.

    A case whose consumer comes later, or settles later, would wait for itself. As a program for such a backend does,
    this bus publishes beside the case: it waits for an outcome while outcomes come, then lets it come by itself.
    And it outlives its consumers: `close` ends these at once, the sender and its messages only with the case.
    What came of them is judged at the end (`failures`).
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._beside: list[asyncio.Task[Sent]] = []
        self._publishers: list[LastingPublisher] = []

    async def publish(self, destination: Destination[Any], value: Any, **options: Any) -> Sent:
        id = options["id"] if options.get("id") is not None else f"beside-{os.getpid()}-{next(_counter)}"
        task = asyncio.ensure_future(super().publish(destination, value, **{**options, "id": id}))
        try:
            await asyncio.wait({task}, timeout=0.01)  # the usual case needs no turn of its own
            await while_outcomes_come(lambda: not task.done())
        except asyncio.CancelledError:
            task.cancel()
            raise
        if task.done():
            return task.result()
        self._beside.append(task)
        return Sent(id)

    def publisher(self, destination: Destination[Any], **options: Any) -> Any:
        options.setdefault("window", 2000)
        made = LastingPublisher(partial(self._outlet, destination), options["window"], self.timeout_s)
        self._publishers.append(made)
        return made

    async def close(self, timeout_s: float = 10.0) -> None:
        if self._state != "open" or not any(o.batcher.unresolved for o in self._outlets.values()):
            await super().close(timeout_s)
            return
        self._check_loop()
        self._state = "closed"
        await self._stop_consumers(list(self._consumers), timeout_s * 0.5)

    def failures(self) -> list[BaseException]:
        """Sends that ended in an error after the case had gone on."""
        found = [error for t in self._beside if t.done() and not t.cancelled() and (error := t.exception())]
        found += [f.error for p in self._publishers for f in p.failed]
        return [error for error in found if not isinstance(error, Closed)]

    async def finish(self) -> None:
        """The end of the sender, too."""
        if self._outlets and self._state == "closed" and self._loop is not None:
            self._state = "open"
        await super().close(1.0)
        for task in self._beside:
            with suppress(MessagingError, asyncio.CancelledError):
                await task


class Lab:
    """One case on one kind of destination of one backend."""

    def __init__(self, harness: Harness, kind: Kind, seed: int) -> None:
        self.harness = harness
        self.kind = kind
        self.random = random.Random(seed)
        self.measured: dict[str, Any] = {}
        """Numbers for the evidence line."""
        self.negative = False
        """Set by `refused`: the case proved an honest "no"."""
        self._made: list[Destination[Any]] = []
        self._buses: list[Bus] = []
        self._drivers: list[Driver] = []
        self._lasting: bool | None = None

    # --- destinations

    @property
    def group(self) -> str | None:
        """The group to consume with: "g1" on a Topic, None elsewhere."""
        return "g1" if self.kind.tag == "topic" else None

    def destination(
        self,
        type: type[Any] = bytes,
        *,
        key: str | Callable[[Any], str] | None = None,
        groups: Sequence[str] = ("g1",),
        name: str | None = None,
    ) -> Destination[Any]:
        """A destination of this case's kind with a name no other case or run has. Removed from the broker at the end.

        Ordered kinds need a key; without `key` the part of the body before the first ":" is taken.
        """
        name = name or self.fresh_name()
        if key is None and self.kind.ordered:
            key = key_before_colon
        made: Destination[Any]
        if self.kind.tag == "queue":
            made = Queue(name, type, key=key, ordered=self.kind.ordered)
        elif self.kind.tag == "topic":
            made = Topic(name, type, key=key, ordered=self.kind.ordered, groups=groups)
        else:
            made = Signal(name, type, key=key)
        return self.track(made)

    def track(self, destination: Destination[Any]) -> Destination[Any]:
        """Have `destination` removed from the broker when the case ends."""
        self._made.append(destination)
        return destination

    def fresh_name(self, stem: str = "t") -> str:
        return f"{stem}{os.getpid():x}-{time.time_ns() // 1_000_000 % 0xFFFFFFF:x}-{next(_counter)}"

    # --- buses and drivers

    def bus(self, backend: Mapping[str, Any] | None = None, **options: Any) -> Bus:
        """A Bus, not yet open, with everything routed to the backend under test. Closed when the case ends.

        Where ok means settled it is a LastingBus, unless `lasting=False`.
        """
        lasting = options.pop("lasting", True) and self.lasting
        if lasting:
            options.setdefault("timeout_s", LASTING_S)
        bus = (LastingBus if lasting else Bus)(from_mapping(self.harness.settings(backend)), **options)
        self._buses.append(bus)
        return bus

    @property
    def lasting(self) -> bool:
        """Does a message of this backend live in its sender until it is settled?"""
        if self._lasting is None:
            self._lasting = self._unopened().capabilities(Queue("any", bytes)).confirm == "settled"
        return self._lasting

    @property
    def brokerless(self) -> bool:
        """Do senders and receivers of this backend speak with each other directly?"""
        return self._unopened().brokerless

    def _unopened(self) -> Driver:
        settings = from_mapping(self.harness.settings())
        return make_driver(settings.backends["test"], settings)

    async def open_bus(self, backend: Mapping[str, Any] | None = None, **options: Any) -> Bus:
        bus = self.bus(backend, **options)
        await bus.open()
        return bus

    async def driver(self, backend: Mapping[str, Any] | None = None) -> Driver:
        """The adapter itself, opened, for what is measured below the Bus. Closed when the case ends."""
        settings = from_mapping(self.harness.settings(backend))
        driver = make_driver(settings.backends["test"], settings)
        self._drivers.append(driver)
        async with asyncio.timeout(30):
            await driver.open()
        return driver

    async def capabilities(self) -> Capabilities:
        """What the adapter declares for this kind, narrowed by the live server."""
        driver = await self.driver()
        return driver.capabilities(self.destination())

    def judge(self) -> None:
        """A send that the case no longer waited for must not have failed."""
        failed = [error for bus in self._buses if isinstance(bus, LastingBus) for error in bus.failures()]
        assert not failed, f"{len(failed)} sends failed after the case had gone on: {failed[:2]!r}"

    async def close(self) -> None:
        """Close all that the case opened and delete all that it made; never raises."""
        for bus in self._buses:
            with suppress(Exception):
                await (bus.finish() if isinstance(bus, LastingBus) else bus.close(timeout_s=3))
        for driver in self._drivers:
            with suppress(Exception):
                async with asyncio.timeout(3):
                    await driver.close()
        with suppress(Exception):
            async with asyncio.timeout(10):
                await self.harness.remove([*self._made, *_dead_letters(self._made)])

    # --- consuming

    @asynccontextmanager
    async def collecting(
        self,
        bus: Bus,
        destination: Destination[Any],
        *,
        group: str | None = None,
        settle: bool = True,
        by: str = "",
        **options: Any,
    ) -> AsyncIterator[list[Arrival]]:
        """Consume in the background into the list that is yielded; with settle=False nothing is settled."""
        arrivals: list[Arrival] = []
        group = group if group is not None else (self.group if destination.tag == "topic" else None)
        async with bus.consume(destination, group=group, **options) as stream:
            task = asyncio.create_task(drain(stream, destination, arrivals, by, settle=settle))
            try:
                yield arrivals
            except BaseException as error:
                if task.done() and not task.cancelled() and task.exception() is not None:
                    error.add_note(f"consumer {by!r} had ended before: {task.exception()!r}")
                raise
            finally:
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task

    # --- results

    def refused(self) -> None:
        """Say that this run of the case proved the refusal, not the feature."""
        self.negative = True

    def not_run(self, reason: str) -> NoReturn:
        raise NotRun(reason)

    def require_fault(self, fault: Any) -> None:
        if fault not in self.harness.faults:
            self.not_run(f"the {self.harness.name} harness cannot provoke {fault!r}")


async def drain(
    stream: Any, destination: Destination[Any], into: list[Arrival], by: str = "", *, settle: bool = True
) -> None:
    """Note and, unless told otherwise, settle everything that a stream yields, until it is cancelled."""
    while True:  # what is here together is settled together: an answer each may cost a request each
        batch = await stream.take(SETTLED_TOGETHER, 3600)
        for message in batch:
            into.append(
                Arrival(
                    message.body,
                    message.id,
                    message.key,
                    getattr(message, "attempt", 1),
                    getattr(message, "deliveries", None),
                    time.monotonic(),
                    by,
                )
            )
        if settle and destination.settles:
            with suppress(SettleLost):  # a fault came between: it arrives again, and is noted again
                await stream.ack(batch)


def _dead_letters(destinations: Sequence[Destination[Any]]) -> list[Destination[Any]]:
    """The dead-letter queues that consuming from `destinations` has made."""
    made: list[Destination[Any]] = []
    for destination in destinations:
        if isinstance(destination, Topic):
            made += [destination.dead_letters(group) for group in destination.groups]
        elif isinstance(destination, Queue) and not destination.name.endswith(".dead"):
            made.append(destination.dead_letters())
    return made


def key_before_colon(value: Any) -> str:
    """Key of a test body: b"k1:17" -> "k1"; a body without a colon is its own key."""
    text = value if isinstance(value, bytes) else str(value).encode()
    return text.partition(b":")[0].decode("latin-1") or "k"


async def eventually(condition: Callable[[], object], wait_s: float, what: str, poll_s: float = 0.01) -> None:
    """Wait until `condition()` is true; AssertionError naming `what` after `wait_s`."""
    deadline = time.monotonic() + wait_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {wait_s:g} s")
        await asyncio.sleep(poll_s)
