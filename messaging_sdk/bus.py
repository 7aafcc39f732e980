"""The Bus: routes logical destinations to backends, refuses what they cannot keep, publishes and consumes."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from types import TracebackType
from typing import Any, Final, TypeVar, overload

from .batcher import Batcher
from .capabilities import FLAGS, Capabilities, Level, Needs, unmet
from .config import Settings, from_env, from_file, from_mapping, from_url
from .consumer import Consumer, OnFailure, Stats, Terms
from .destination import DEAD, Destination, Queue, Signal, Topic
from .errors import (
    CapabilityError,
    Closed,
    ConfigError,
    ConnectError,
    InvalidDestination,
    MessagingError,
    Unmet,
    UsageError,
)
from .handlers import Handlers, Registration, bind, check_failure, check_group, check_window
from .model import RESERVED_PREFIX, Delivery, Message, Outgoing, Sent, Session
from .pipeline import Middleware, around, outward
from .publisher import Outlet, Publisher, header_problem, new_id_prefix
from .registry import check_blocks, make_driver
from .replay import Replay, parsed_since
from .retry import Retry
from .spi import Driver, Reader, Receiver, Sender
from .stream import Stream
from .workers import Workers

T = TypeVar("T")
R = TypeVar("R")
log: Final = logging.getLogger("messaging_sdk")

OPEN_S: Final = 10.0  # one attempt to open a sender or receiver; then core tries again
MAX_POOL: Final = 64  # threads for plain handlers of one bus
PROVENANCE_CHARS: Final = 500  # an error text of a dead letter; longer ones would eat the header budget

_buses: Final[weakref.WeakSet[Bus]] = weakref.WeakSet()


@dataclass(frozen=True, slots=True)
class Promise:
    """One line of what is printed at start: a destination, where it lives, and what that backend can not do itself."""

    destination: Destination[Any]
    backend: str
    adapter: str
    server: str
    ok_means: str
    emulated: Mapping[str, str]
    """Flag -> how we emulate it."""


class Bus(Handlers):
    """Everything a program needs: publish, handlers, streams, over one or several backends.

    `config` is a URL (one backend for everything), a mapping like the TOML file, or Settings. The constructor does no
    I/O; it raises ConfigError for anything wrong in the configuration. A Bus belongs to the event loop it is opened
    on; for plain threads use messaging_sdk.sync. In a forked child it starts unopened again.
    """

    def __init__(
        self,
        config: str | Mapping[str, Any] | Settings,
        *,
        needs: Needs | None = None,
        middleware: Sequence[Middleware] = (),
        provide: Mapping[str, Callable[[], Any]] | None = None,
        timeout_s: float = 30.0,
    ) -> None:
        super().__init__()
        if isinstance(config, str):
            config = from_url(config)
        elif not isinstance(config, Settings):
            config = from_mapping(config)
        self.settings: Final = config
        self.timeout_s = check_timeout(timeout_s)
        if needs is not None and not isinstance(needs, Needs):
            raise UsageError(f"Bus: needs must be a Needs(...), not {type(needs).__name__}")
        strange = [m for m in middleware if not isinstance(m, Middleware)]
        if strange:
            raise UsageError(f"Bus: middleware must be Middleware objects, not {type(strange[0]).__name__}")
        self._needs = needs or Needs()
        self._middleware = tuple(middleware)
        self._provide = dict(provide or {})
        check_blocks(config)
        self._declared: dict[Destination[Any], None] = {}
        self._reset()
        _buses.add(self)

    def _reset(self) -> None:
        self._drivers: dict[str, Driver] = {
            name: make_driver(backend, self.settings) for name, backend in self.settings.backends.items()
        }
        self._state = "new"
        self._loop: asyncio.AbstractEventLoop | None = None
        self._opening: asyncio.Lock | None = None
        self._outlets: dict[Destination[Any], Outlet[Any]] = {}
        self._provisioned: set[Destination[Any]] = set()
        self._consumers: dict[Consumer, Workers | None] = {}
        self._replays: weakref.WeakSet[Replay[Any]] = weakref.WeakSet()
        self._pool: ThreadPoolExecutor | None = None
        self._id_prefix = new_id_prefix()
        self._owner: asyncio.Task[Any] | None = None
        self.failure: BaseException | None = None

    @classmethod
    def from_config(cls, path: str | os.PathLike[str], *, env: str | None = None, **options: Any) -> Bus:
        """A Bus from a TOML file; `env` (default: MESSAGING_ENV) picks its overlay. `options` as for Bus()."""
        return cls(from_file(path, env=env or os.environ.get("MESSAGING_ENV")), **options)

    @classmethod
    def from_env(cls, **options: Any) -> Bus:
        """A Bus from MESSAGING_URL, or from MESSAGING_CONFIG or messaging.toml with MESSAGING_ENV's overlay."""
        return cls(from_env(), **options)

    # --- declaring

    def declare(self, *destinations: Destination[Any]) -> None:
        """Have `destinations` checked and provisioned when the bus opens; handlers' ones are anyway."""
        for destination in destinations:
            if not isinstance(destination, Destination):
                raise UsageError(f"declare takes Queue, Topic or Signal objects, not {type(destination).__name__}")
            self._declared[destination] = None

    def include(self, handlers: Handlers) -> None:
        """Add the handlers of another module."""
        self.registrations.extend(handlers.registrations)

    # --- life

    async def open(self) -> None:
        """Check every need of everything declared, connect, provision. Idempotent.

        All refusals come together and before any I/O: CapabilityError lists every unmet need, InvalidDestination and
        ConfigError name what is wrong. Then ConnectError or AuthError, within `timeout_s`.
        """
        if self._state == "open":
            self._check_loop()
            return
        if self._state == "closed":
            raise Closed("this bus was closed; make a new one")
        if self._opening is None:
            self._opening = asyncio.Lock()
        async with self._opening:
            if self._state == "new":
                await self._open()

    async def _open(self) -> None:
        self._loop = asyncio.get_running_loop()
        dead = [_dead_letters(r.destination, r.group) for r in self.registrations if _buries(r)]
        destinations = list(dict.fromkeys([*self._declared, *(r.destination for r in self.registrations), *dead]))
        wanted = [(d, _wanted(d, self._needs)) for d in destinations]
        wanted += [(r.destination, _wanted_by(r)) for r in self.registrations]
        self._check_needs(wanted)
        for registration in self.registrations:
            bind(registration, self._provide, None)
        opened: list[Driver] = []
        try:
            for name, driver in self._drivers.items():
                opened.append(driver)
                await self._within(driver.open(), self.timeout_s, f"open backend {name!r}")
            self._check_needs(wanted)  # again: now narrowed by the live servers
            await self._provision(destinations)
        except BaseException:
            for driver in opened:
                await self._quietly(driver.close(), 1.0)
            raise
        self._state = "open"
        for promise in self.promises():
            for flag, how in promise.emulated.items():
                log.info("%s on %s: %s is emulated: %s", promise.destination, promise.backend, flag, how)

    async def close(self, timeout_s: float = 10.0) -> None:
        """Stop handlers and streams (what runs may end, the rest is handed back), flush publishes, disconnect.

        Ends within about `timeout_s` in every state; sends without an outcome by then raise with INDETERMINATE, or
        REJECTED if they never left. Idempotent, never raises for a broken connection.
        """
        if self._state in ("new", "closed") or self._loop is None:
            self._state = "closed"
            return
        self._check_loop()
        self._state = "closed"
        deadline = self._loop.time() + timeout_s
        await asyncio.gather(*(replay.close() for replay in list(self._replays)))
        await self._stop_consumers(list(self._consumers), timeout_s * 0.5)
        reason = Closed("the bus was closed before this message had an outcome")
        budget = max(0.1, (deadline - self._loop.time()) * 0.7)
        if self._outlets:
            await asyncio.gather(*(o.batcher.close(budget, reason) for o in self._outlets.values()))
        budget = max(0.2, deadline - self._loop.time())
        await asyncio.gather(*(self._quietly(d.close(), budget) for d in self._drivers.values()))
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    async def __aenter__(self) -> Bus:
        await self.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    @asynccontextmanager
    async def lifespan(self, app: object) -> AsyncIterator[None]:
        """An ASGI lifespan that opens the bus for publishing: FastAPI(lifespan=bus.lifespan)."""
        async with self:
            yield

    @asynccontextmanager
    async def consuming(self, grace_s: float = 10.0) -> AsyncIterator[None]:
        """Run all registered handlers. Entered = every receiver is listening; left = stopped and handed back.

        If a consumer fails for good (its queue was deleted, on_failure="stop", an adapter's bug), the body is
        cancelled and that error raised here.
        """
        await self.open()
        owner = asyncio.current_task()
        self._owned_by(owner)
        started: list[Consumer] = []
        try:
            for registration in self.registrations:
                started.append(await self._start_handler(registration))
            yield
        except asyncio.CancelledError:
            if self.failure is None or owner is None:
                raise
            owner.uncancel()
        finally:
            self._owner = None
            await self._stop_consumers(started, grace_s)
        if self.failure is not None:
            raise self.failure

    def run(self, grace_s: float = 10.0) -> None:
        """Open, run the handlers until SIGTERM or SIGINT, then stop gracefully. Blocking; the only installer of signal
        handlers."""
        asyncio.run(self.serve(grace_s))

    async def serve(self, grace_s: float = 10.0) -> None:
        """What `run` runs."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        try:
            async with self, self.consuming(grace_s):
                await stop.wait()
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    # --- publishing

    async def publish(
        self,
        destination: Destination[T],
        value: T,
        *,
        headers: Mapping[str, str] | None = None,
        id: str | None = None,
        correlation_id: str | None = None,
        delay: float | str | None = None,
        ttl: float | str | None = None,
        priority: int | None = None,
        timeout_s: float | None = None,
    ) -> Sent:
        """Send one message and wait for its outcome; concurrent calls share batches. Opens the bus if need be.

        Returns when the backend has it, as `capabilities(destination).ok_means` says. Raises before any byte is sent:
        InvalidMessage, TooLarge, CapabilityError (an option that the backend lacks), UsageError, Closed. Raises
        afterwards with `.outcome`: REJECTED (surely not stored: NotFound, Backpressure, DeadlineExceeded...) or
        INDETERMINATE (may be stored: the connection or the deadline ended first). After a lost connection the
        message is sent again with the same id until `timeout_s` (default: the bus's). Cancelling may or may not
        have sent it.
        """
        outlet = self._outlets.get(destination)
        if outlet is None or self._state != "open" or self._loop is not asyncio.get_running_loop():
            outlet = await self._outlet(destination)
        loop = self._loop
        assert loop is not None
        message = outlet.encode(value, headers, id, correlation_id, delay, ttl, priority)
        return await self._sent(
            outlet, message, self.timeout_s if timeout_s is None else check_timeout(timeout_s), loop
        )

    @staticmethod
    async def _sent(outlet: Outlet[Any], message: Outgoing, timeout_s: float, loop: asyncio.AbstractEventLoop) -> Sent:
        future = loop.create_future()
        message.waiter = future
        message.deadline_s = loop.time() + timeout_s
        outlet.batcher.submit(message)
        result = await future
        if result.error is not None:
            raise result.error
        return Sent(message.id, result.position)

    def publisher(
        self, destination: Destination[T], *, window: int = 2000, timeout_s: float | None = None
    ) -> Publisher[T]:
        """The fast way to publish many: `async with bus.publisher(d) as p: await p.send(value)`. See Publisher."""
        return Publisher(
            partial(self._outlet, destination),
            window,
            self.timeout_s if timeout_s is None else check_timeout(timeout_s),
        )

    async def _outlet(self, destination: Destination[T]) -> Outlet[T]:
        """The slow way to an outlet: first publish to a destination, or one with something wrong."""
        await self._ready(destination)
        found = self._outlets.get(destination)
        if found is not None:
            return found
        driver, backend = self._driver_of(destination)
        batcher = Batcher(repr(destination), partial(self._open_sender, driver, destination))
        made = Outlet(
            destination,
            backend,
            driver.capabilities(destination),
            batcher,
            outward(self._middleware),
            self._id_prefix,
        )
        self._outlets[destination] = made
        return made

    async def _ready(self, destination: Destination[Any]) -> None:
        """Open the bus and check and provision `destination`, if that has not been done."""
        if not isinstance(destination, Destination):
            raise UsageError(f"a destination is a Queue, Topic or Signal, not {type(destination).__name__}")
        await self.open()
        if destination in self._provisioned:
            return
        self._check_needs([(destination, _wanted(destination, self._needs))])
        await self._provision([destination])

    async def _open_sender(self, driver: Driver, destination: Destination[Any]) -> Sender:
        return await self._within(driver.open_sender(destination), OPEN_S, f"open a sender for {destination}")

    async def _bury(self, terms: Terms, message: Message[Any], reason: str, error: str, attempts: int) -> None:
        dead = _dead_letters(terms.destination, terms.group)
        outlet = await self._outlet(dead)
        rules = outlet.capabilities.headers
        headers = {n: v for n, v in message.headers.items() if not header_problem(n, v, rules)}
        provenance = {
            "reason": reason,
            "error": error,
            "source": terms.destination.name,
            "group": terms.group or "",
            "attempts": str(attempts),
            "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        }
        for name, value in provenance.items():
            if value and rules is not None:  # a backend without headers keeps the body; the log has the reason
                headers[RESERVED_PREFIX + name] = _plain(value)
        grave = Outgoing(
            message.body, message.id, message.key, headers,
            content_type=message.content_type, correlation_id=message.correlation_id,
            created_s=message.created_s or 0.0,
        )  # fmt: skip
        loop = asyncio.get_running_loop()
        await self._sent(outlet, grave, self.timeout_s, loop)

    # --- consuming

    @overload
    def consume(
        self,
        destination: Queue[T] | Topic[T],
        *,
        group: str | None = None,
        window: int | None = None,
        on_failure: OnFailure = "dead_letter",
        max_deliveries: int = 20,
    ) -> Stream[Delivery[T]]: ...
    @overload
    def consume(
        self, destination: Signal[T], *, group: str | None = None, window: int | None = None
    ) -> Stream[Message[T]]: ...
    @overload
    def consume(
        self,
        destination: Destination[Any],
        *,
        group: str | None = None,
        window: int | None = None,
        on_failure: OnFailure = "dead_letter",
        max_deliveries: int = 20,
    ) -> Stream[Any]: ...
    def consume(
        self,
        destination: Destination[Any],
        *,
        group: str | None = None,
        window: int | None = None,
        on_failure: OnFailure = "dead_letter",
        max_deliveries: int = 20,
    ) -> Stream[Any]:
        """Pull style: `async with bus.consume(queue) as stream: async for d in stream: ...; await d.ack()`.

        Entered = listening. At most `window` deliveries are unsettled at a time. Undecodable and rejected messages go
        to `on_failure`. Raises UsageError for a wrong group, CapabilityError for an unmet need, when entered also
        ConnectError and AuthError.
        """
        group = check_group(destination, group)
        check_failure(destination, on_failure, max_deliveries)
        registration = Registration(
            destination, group, _no_handler, False, (), 1, check_window(destination, window, 1), Retry(1), on_failure,
            False, None, max_deliveries,
        )  # fmt: skip

        async def stop(consumer: Consumer) -> None:
            await self._stop_consumers([consumer], 2.0)

        return Stream(partial(self._start_consumer, registration), stop)

    def replay(self, topic: Topic[T], *, since: datetime | str = "start") -> Replay[T]:
        """Read what `topic` stores again: `async with bus.replay(topic) as history: async for message in history: ...`.

        `since` is "start", an aware datetime (by the backend's times), or the `position` of another replay of this
        topic on the same backend. It ends at what was stored when it was entered; nothing is settled, and groups do
        not notice. How far back it reaches is the backend's retention. Raises UsageError for a wrong `since`; when
        entered CapabilityError where the backend keeps no history, OutOfRange for a position whose next message is
        gone, ConnectError and AuthError.
        """
        if not isinstance(topic, Topic):
            raise UsageError(f"replay: only a Topic has a history, not {topic!r}")
        driver, backend = self._driver_of(topic)
        place = f"{driver.name} {backend} {topic.name}"

        async def open_reader(since: float | str | None) -> Reader:
            await self._ready(topic)
            self._check_needs([(topic, {"replay": True})])
            return await self._within(driver.open_reader(topic, since), OPEN_S, f"open a reader of {topic}")

        made = Replay(topic, place, open_reader, parsed_since(topic, place, since))
        self._replays.add(made)
        return made

    async def _start_consumer(self, registration: Registration) -> Consumer:
        destination, group = registration.destination, registration.group
        await self._ready(destination)
        self._check_needs([(destination, _wanted_by(registration))])
        if _buries(registration):
            await self._ready(_dead_letters(destination, group))
        driver, _ = self._driver_of(destination)
        terms = Terms(
            destination, group, registration.window, registration.on_failure, registration.max_deliveries,
            driver.capabilities(destination), registration.retry,
        )  # fmt: skip

        async def open_receiver(
            on_revoke: Callable[[Sequence[Session], float], Awaitable[None]],
        ) -> Receiver:
            opening = driver.open_receiver(destination, group, registration.window, on_revoke)
            return await self._within(opening, OPEN_S, f"open a receiver for {destination}")

        consumer = Consumer(terms, open_receiver, self._bury, self._fail)
        await consumer.start()
        self._consumers[consumer] = None
        return consumer

    async def _start_handler(self, registration: Registration) -> Consumer:
        if registration.blocking and self._pool is None:
            threads = sum(r.concurrency for r in self.registrations if r.blocking)
            self._pool = ThreadPoolExecutor(min(MAX_POOL, threads), thread_name_prefix="messaging-handler")
        call = bind(registration, self._provide, self._pool)
        call = around(self._middleware, registration.destination, call)
        consumer = await self._start_consumer(registration)
        workers = Workers(
            consumer,
            call,
            registration.concurrency,
            registration.timeout_s,
            registration.settle_before,
            blocking=registration.blocking,
        )
        self._consumers[consumer] = workers
        workers.start()
        return consumer

    async def _stop_consumers(self, consumers: Iterable[Consumer], grace_s: float) -> None:
        async def stop(consumer: Consumer) -> None:
            await consumer.stop_intake(min(2.0, grace_s))
            workers = self._consumers.pop(consumer, None)
            if workers is not None:
                await workers.stop(grace_s)
            await consumer.close(max(min(1.0, grace_s), grace_s / 2))

        known = [c for c in consumers if c in self._consumers]
        if known:
            await asyncio.gather(*(stop(c) for c in known))

    def _owned_by(self, task: asyncio.Task[Any] | None) -> None:
        self._owner, self.failure = task, None

    def _fail(self, error: BaseException) -> None:
        if self.failure is None and self._owner is not None:
            self.failure = error
            self._owner.cancel()

    # --- looking

    async def lag(self, destination: Destination[Any], group: str | None = None) -> int:
        """How many messages `destination` (of a Topic: its `group`) has yet to handle.

        Asked of the backend at each call, for all of its consumers and not only for this bus's; opens the bus if need
        be. With `capabilities(destination).lag` "unsettled" it counts what waits and what is handed out and not
        settled (what waits for a retry, too): 0 = all is done. With "waiting" only what no consumer has got. A
        momentary figure: others publish and settle meanwhile, and where a backend counts late its note on `lag` says
        so. On an open bus it answers within 10 s, or raises.

        Raises before any byte is sent UsageError for a wrong group, CapabilityError on a Signal and where the backend
        cannot tell, Closed; then NotFound where what would be counted does not exist (with `provision = "create"` it is
        made), ConnectError and ConnectionLost when the backend does not answer, AuthError.
        """
        group = check_group(destination, group)
        if isinstance(destination, Signal):
            remedy = "a Queue or Topic: nothing waits for a Signal's listeners"
            raise CapabilityError([Unmet(destination.name, "lag", "a Signal", remedy)])
        wanted = [(destination, {"lag": "waiting"})]
        self._check_needs(wanted)
        await self._ready(destination)
        self._check_needs(wanted)  # again: now narrowed by the live server
        driver, _ = self._driver_of(destination)
        return await self._within(driver.lag(destination, group), OPEN_S, f"ask for the lag of {destination}")

    def capabilities(self, destination: Destination[Any]) -> Capabilities:
        """What the backend of `destination` promises for it: as configured before `open`, as measured-by-name after."""
        return self._driver_of(destination)[0].capabilities(destination)

    def promises(self) -> list[Promise]:
        """One line per declared or handled destination, in the order of declaration."""
        lines = []
        for destination in dict.fromkeys([*self._declared, *(r.destination for r in self.registrations)]):
            driver, backend = self._driver_of(destination)
            found = driver.capabilities(destination)
            emulated = {f: found.notes.get(f, "") for f in FLAGS if found.level(f) is Level.EMULATED}
            lines.append(Promise(destination, backend, driver.name, driver.server(), found.ok_means, emulated))
        return lines

    def stats(self, destination: Destination[Any], group: str | None = None) -> Stats:
        """Counters of this bus's consumers of `destination` (and group), added up."""
        total = Stats()
        for consumer in self._consumers:
            if consumer.terms.destination == destination and group in (None, consumer.terms.group):
                for name in Stats.__slots__:
                    setattr(total, name, getattr(total, name) + getattr(consumer.stats, name))
        return total

    @property
    def idle(self) -> bool:
        """Nothing is running, waiting or held in this bus's consumers."""
        return all(c.idle for c in self._consumers)

    def held(self, destination: Destination[Any]) -> int:
        """Deliveries that wait here for their next attempt."""
        return sum(c.held for c in self._consumers if c.terms.destination == destination)

    def native(self, backend: str) -> object:
        """The client library's own connection of a backend, for what the portable interface does not have."""
        if backend not in self._drivers:
            raise UsageError(f"no backend {backend!r}; there are: {', '.join(sorted(self._drivers))}")
        return self._drivers[backend].native()

    def __repr__(self) -> str:
        backends = ", ".join(f"{n}={b.address}" for n, b in self.settings.backends.items())
        return f"Bus({backends}; {self._state})"

    # --- inside

    def _driver_of(self, destination: Destination[Any]) -> tuple[Driver, str]:
        backend = self.settings.backend_of(destination.name)
        return self._drivers[backend], backend

    def _check_loop(self) -> None:
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is not self._loop:
            raise UsageError(
                "this bus was opened on another event loop; a Bus belongs to one loop. "
                "From other threads use messaging_sdk.sync.Bus"
            )

    def _check_needs(self, wanted: Iterable[tuple[Destination[Any], Mapping[str, Any]]]) -> None:
        missing: dict[str, Unmet] = {}
        wrong: dict[str, MessagingError] = {}
        for destination, flags in wanted:
            try:
                found = self._unmet_by(destination, flags)
            except (ConfigError, InvalidDestination) as error:
                wrong.setdefault(str(error), error)
            else:
                for item in found:
                    missing.setdefault(str(item), item)
        if missing:
            raise CapabilityError(list(missing.values()), list(wrong))
        if len(wrong) > 1:
            first = next(iter(wrong.values()))
            raise type(first)(f"{len(wrong)} problems, nothing was sent:\n  - " + "\n  - ".join(wrong)) from first
        for alone in wrong.values():
            raise alone

    def _unmet_by(self, destination: Destination[Any], flags: Mapping[str, Any]) -> list[Unmet]:
        """What its backend lacks; raises ConfigError without a route, InvalidDestination for a name it cannot have."""
        driver, backend = self._driver_of(destination)
        forbid = "forbid" in (self.settings.backends[backend].emulation, self._needs.emulation)
        label = f"{backend!r} ({driver.name})"
        found = driver.capabilities(destination)
        if "tag" in found.notes:
            return [Unmet(destination.name, f"a {type(destination).__name__}", label, found.notes["tag"])]
        driver.check(destination)
        return unmet(
            found,
            flags,
            destination=destination.name,
            backend=label,
            forbid_emulation=forbid,
            reasons=_REASONS,
        )

    async def _provision(self, destinations: Iterable[Destination[Any]]) -> None:
        new = [d for d in dict.fromkeys(destinations) if d not in self._provisioned]
        by_backend: dict[str, list[Destination[Any]]] = {}
        for destination in new:
            by_backend.setdefault(self._driver_of(destination)[1], []).append(destination)
        for backend, mine in by_backend.items():
            mode = self.settings.backends[backend].provision
            await self._within(
                self._drivers[backend].provision(mine, mode),
                self.timeout_s,
                f"provision on backend {backend!r}",
            )
        self._provisioned.update(new)

    async def _within(self, work: Awaitable[R], timeout_s: float, what: str) -> R:
        try:
            async with asyncio.timeout(timeout_s):
                return await work
        except TimeoutError as error:
            raise ConnectError(f"could not {what} within {timeout_s:g} s: the broker does not answer") from error

    @staticmethod
    async def _quietly(work: Awaitable[object], timeout_s: float) -> None:
        with suppress(Exception):
            async with asyncio.timeout(timeout_s):
                await work

    def _forked(self) -> None:
        """In the child of a fork: nothing of the parent's connections may be touched."""
        if self._state == "open" or (self._state == "new" and self._opening is not None):
            for consumer in self._consumers:
                consumer.failure = UsageError("this consumer belongs to the parent process; start it in the child")
            for outlet in self._outlets.values():
                outlet.disown()
            for replay in self._replays:
                replay.disown()
            self._reset()


def check_timeout(timeout_s: object) -> float:
    """`timeout_s` if it is a number of seconds over 0, else UsageError; nothing was sent."""
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or not timeout_s > 0:
        raise UsageError(f"timeout_s must be a number of seconds over 0, not {timeout_s!r}")
    return timeout_s


def _after_fork() -> None:
    for bus in list(_buses):
        bus._forked()


os.register_at_fork(after_in_child=_after_fork)


async def _no_handler(value: object) -> None:
    raise UsageError("a stream has no handler")


def _dead_letters(destination: Destination[Any], group: str | None) -> Queue[bytes]:
    middle = f".{group}" if group else ""
    return Queue(f"{destination.name}{middle}.{DEAD}", bytes)


def _buries(registration: Registration) -> bool:
    destination = registration.destination
    is_grave = destination.tag == "queue" and destination.name.endswith(f".{DEAD}")
    return destination.settles and registration.on_failure == "dead_letter" and not is_grave


_REASONS: Final = {
    "settle": "deliveries are settled",
    "lease": "an unsettled message must come back",
    "backlog": "messages wait for their consumer",
    "confirm": "a send is confirmed",
    "groups": "groups are declared or asked for",
    "lag": "the lag is asked for",
    "order": "ordered=True",
    "order_redelivery": "ordered=True",
    "order_competition": "ordered=True",
    "hold_s": "the retry policy's delays and handler time",
}


def _wanted(destination: Destination[Any], needs: Needs) -> dict[str, Any]:
    """What the use of a destination implies, and what was asked for explicitly."""
    wanted: dict[str, Any] = {}
    if destination.settles:
        wanted.update(settle="individual", lease="timeout", confirm="received")
        if isinstance(destination, Topic):
            if destination.groups:
                wanted["groups"] = "durable"
        else:
            wanted["backlog"] = True
        if destination.ordered:
            wanted.update(order="publisher", order_redelivery=True, order_competition=True)
        wanted.update(needs.wanted())
    return wanted


def _wanted_by(registration: Registration) -> dict[str, Any]:
    wanted: dict[str, Any] = {}
    if isinstance(registration.destination, Signal):
        if registration.group is not None:
            wanted["groups"] = "live"
    else:
        hold_s = registration.retry.total_s() + (registration.timeout_s or 0.0) * registration.retry.attempts
        if hold_s > 0:
            wanted["hold_s"] = round(hold_s, 3)
    return wanted


def _plain(text: str) -> str:
    """Header text that every backend carries unaltered."""
    ascii_text = text.encode("ascii", "backslashreplace").decode()
    return "".join(c if c.isprintable() else " " for c in ascii_text)[:PROVENANCE_CHARS].strip() or "-"
