"""Connections and topology: one thread, a connection to publish, one to consume, and one for each ordered receiver."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from itertools import count
from typing import Any, ClassVar, Final, TypeVar, cast
from urllib.parse import unquote

import pika
from pika import frame
from pika.adapters.asyncio_connection import AsyncioConnection
from pika.adapters.utils.io_services_utils import _AsyncPlaintextTransport
from pika.channel import Channel
from pika.exceptions import StreamLostError
from pydantic import BaseModel

from messaging_sdk.capabilities import Capabilities
from messaging_sdk.config import Address
from messaging_sdk.destination import Destination
from messaging_sdk.errors import ConfigError, ConnectError, MessagingError, NotFound
from messaging_sdk.spi import Driver as DriverContract
from messaging_sdk.spi import OnRevoke, Provision
from messaging_sdk.threads import Hop, LoopThread

from .errors import loss, refusal
from .options import (
    SIGNALS,
    DestinationOptions,
    Options,
    arguments_of,
    check_physical,
    physical_name,
    promises,
    queue_name,
)
from .receiver import Inbox, Receiver, parse
from .sender import Encoder, Sender

T = TypeVar("T")

_PRIVATE: Final = (
    "_frame_buffer",
    "_on_data_available",
    "_output_marshaled_frames",
    "_process_frame",
    "_terminate_stream",
)
_WRITE_BYTES: Final = 1 << 18
"""pika copies what one send left over: a blob of 16 MiB in one piece would be copied a hundred times."""
_POLITE_S: Final = 1.0
"""How long `close` waits for the broker's goodbye; a paused broker never says it."""
_MAX_PREFETCH: Final = 65_535

for _name in _PRIVATE[1:]:
    if not hasattr(AsyncioConnection, _name):
        raise ImportError(f"pika {pika.__version__} has no {_name}; install pika>=1.4.4,<1.5")


_Untyped: Any = AsyncioConnection  # the published stubs of pika lack what is private


class Wire(_Untyped):  # type: ignore[misc]
    """One connection. Everything runs on the thread; `lost` may be read anywhere."""

    def __init__(self, parameters: pika.ConnectionParameters, opened: asyncio.Future[None]) -> None:
        self.inboxes: dict[int, Inbox] = {}
        self._frame_buffer = b""
        self.lost: BaseException | None = None
        self.ended = asyncio.Event()
        self._when_open = opened
        super().__init__(parameters, self._on_open, self._on_end, self._on_end, asyncio.get_running_loop())

    def _on_open(self, _: object) -> None:
        if not self._when_open.done():
            self._when_open.set_result(None)

    def _on_end(self, _: object, error: BaseException) -> None:
        self.lost = error
        self.ended.set()
        if not self._when_open.done():
            self._when_open.set_exception(error)

    def _on_data_available(self, data_in: bytes) -> None:
        if not self.inboxes:
            super()._on_data_available(data_in)
            return
        buffer = self._frame_buffer + data_in if self._frame_buffer else data_in
        used = parse(buffer, self.inboxes, self._to_pika)
        self._frame_buffer = buffer[used:]
        self.bytes_received += used  # pika's heartbeat check looks at it

    def put(self, frames: bytes) -> None:
        """Write whole frames: at once where nothing waits before them.

        pika would wait until the socket is reported to be writable: a turn of the loop and two system calls more, a
        fifth of the time of one awaited publish.
        """
        transport, sent = self._transport, 0
        if type(transport) is _AsyncPlaintextTransport and not transport.get_write_buffer_size():
            private: Any = transport  # the published stubs of pika lack it
            with suppress(OSError, AttributeError):  # full, broken or gone: pika's own way comes to know it
                sent = private._sock.send(frames)
            self.bytes_sent += sent
        self._output_marshaled_frames([frames[at : at + _WRITE_BYTES] for at in range(sent, len(frames), _WRITE_BYTES)])

    def _to_pika(self, whole_frame: bytes) -> None:
        self._process_frame(frame.decode_frame(whole_frame)[1])

    def drop(self) -> None:
        """End at once, without a word to the broker: it returns all unsettled deliveries together."""
        if not (self.is_closed or self.ended.is_set()):
            with suppress(Exception):  # racing with a stream that has just ended by itself
                self._terminate_stream(StreamLostError("dropped by us"))

    async def end(self) -> None:
        """Close politely, within a second."""
        if self.ended.is_set():
            return
        with suppress(Exception):
            self.close()
            await asyncio.wait_for(self.ended.wait(), _POLITE_S)
        self.drop()


class Link:
    """One channel. Everything runs on the thread; `lost`, once set for ever, may be read anywhere."""

    def __init__(self, wire: Wire, what: str) -> None:
        self.wire = wire
        self.what = what
        self.lost: MessagingError | None = None
        self.inbox = Inbox()
        self.number = 0
        self._waiting: set[asyncio.Future[Any]] = set()
        self._on_lost: Callable[[MessagingError], object] = lambda _: None

    async def open(self, on_lost: Callable[[MessagingError], object] | None = None) -> Channel:
        self._on_lost = on_lost or self._on_lost
        await self._answer(self._open)
        return self.channel

    def _open(self, done: Callable[[object], None]) -> None:
        self.channel = self.wire.channel(on_open_callback=done)
        self.number = self.channel.channel_number
        self.wire.inboxes[self.number] = self.inbox
        self.channel.add_on_close_callback(self._ended)

    async def call(self, method: Callable[..., object], *args: Any, **options: Any) -> Any:
        """Do one request of pika's channel and return the broker's answer; raises pika's error if the channel ends."""
        return await self._answer(lambda done: method(*args, callback=done, **options))

    def write(self, blob: bytes) -> bool:
        """Put whole frames on the wire. False: the channel is gone, nothing was written."""
        if self.lost is not None or not self.channel.is_open:
            return False
        self.wire.put(blob)
        return True

    @property
    def unsent_bytes(self) -> int:
        transport = self.wire._transport
        return transport.get_write_buffer_size() if transport is not None else 0

    async def cancel(self, consumer: str) -> None:
        if self.channel.is_open:
            await self.call(self.channel.basic_cancel, consumer)

    def cancelled(self) -> None:
        """The broker cancelled the consumer: queue deleted or moved, consumer timeout. Opening again will tell."""
        self._end(loss(None, f"{self.what}: the broker cancelled this consumer"))
        self.abandon()

    async def close(self) -> None:
        """Return when the broker has done all that was written."""
        if self.lost is None and self.channel.is_open:
            with suppress(Exception):
                await self._answer(self._close)

    def _close(self, done: Callable[[object], None]) -> None:
        self._on_lost = done
        self.channel.close()

    def abandon(self) -> None:
        """Close without waiting."""
        with suppress(Exception):  # never opened, or gone
            self.channel.close()

    def _ended(self, channel: Channel, reason: BaseException) -> None:
        self.wire.inboxes.pop(channel.channel_number, None)
        for promise in self._waiting:
            if not promise.done():
                promise.set_exception(reason)
        self._end(loss(reason, self.what))

    def _end(self, error: MessagingError) -> None:
        if self.lost is None:
            self.lost = error
            self._on_lost(error)

    async def _answer(self, request: Callable[[Callable[[object], None]], object]) -> Any:
        """Make a request and wait for what it calls back with; raises what ends the channel meanwhile."""
        promise: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.add(promise)
        try:
            request(lambda answer: None if promise.done() else promise.set_result(answer))
            return await promise
        finally:
            self._waiting.discard(promise)


class Home:
    """The thread where connections live, and the way back to the loop that opened the driver."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.thread = LoopThread("messaging-sdk-rabbitmq")
        self._outward = Hop(loop)

    def tell(self, call: Callable[..., object], *args: Any) -> None:
        """From the thread: run `call(*args)` on the opener's loop, in order."""
        with suppress(RuntimeError):  # that loop was closed without closing the driver: nobody listens
            self._outward.post(call, *args)

    async def run(self, work: Coroutine[Any, Any, T], what: str) -> T:
        """Run `work` on the thread; what it raises becomes ours."""
        try:
            return await self.thread.run(work)
        except MessagingError:
            raise
        except Exception as error:
            raise refusal(error, what) from error


class Driver(DriverContract):
    """RabbitMQ 4 at `amqp://user@host:5672/vhost`, or `amqps://` for TLS; several hosts are tried in turn."""

    name: ClassVar[str] = "rabbitmq"
    client: ClassVar[str] = "pika"
    Options = Options
    DestinationOptions = DestinationOptions

    def __init__(self, address: Address, options: BaseModel, destinations: Mapping[str, BaseModel]) -> None:
        super().__init__(address, options, destinations)
        self._options = cast(Options, options)
        if address.scheme not in ("amqp", "amqps") or not address.hosts:
            raise ConfigError("a RabbitMQ URL is amqp://user@host/vhost or amqps://user@host/vhost")
        tls_keys = [k for k in ("ca_file", "cert_file", "key_file", "server_name") if getattr(options, k) is not None]
        if tls_keys and address.scheme == "amqp":
            raise ConfigError(f"{address}: {', '.join(tls_keys)} need TLS: write amqps://")
        self._home: Home | None = None
        self._wires: dict[str, asyncio.Task[Wire]] = {}
        self._live: set[Wire] = set()  # the thread's
        self._epochs = count(1)
        self._server = ""

    def capabilities(self, destination: Destination[Any]) -> Capabilities:
        return promises(destination, self._options)

    def check(self, destination: Destination[Any]) -> None:
        name = self._name(destination)
        check_physical("name", name)
        for group in destination.groups:
            check_physical("queue", queue_name(name, group))

    async def open(self) -> None:
        if self._home is None:
            self._home = Home(asyncio.get_running_loop())
        try:
            wire = await self._wire("publish")
        except BaseException:
            await self.close()
            raise
        properties: Mapping[str, Any] = wire.server_properties or {}
        self._server = f"{properties.get('product', 'AMQP')} {properties.get('version', '')}".strip()

    async def provision(self, destinations: Sequence[Destination[Any]], mode: Provision) -> None:
        settled = [d for d in destinations if d.settles]
        if mode == "none" or not settled:
            return
        wire = await self._wire("publish")
        for destination in settled:
            await self._opened_home().run(self._provision(wire, destination, mode == "verify"), str(destination))

    async def _provision(self, wire: Wire, destination: Destination[Any], verify: bool) -> None:
        name, options = self._name(destination), self.destinations.get(destination.name)
        arguments = arguments_of(destination, options)
        is_topic = destination.tag == "topic"
        if is_topic:
            await self._declare(wire, f"exchange {name!r}", verify, "exchange_declare", name, exchange_type="fanout")
        for group in destination.groups if is_topic else (None,):
            queue = queue_name(name, group)
            await self._declare(wire, f"queue {queue!r}", verify, "queue_declare", queue, arguments=arguments)
            if is_topic and not verify:
                await self._ask(wire, f"queue {queue!r}", "queue_bind", queue, name)

    async def _declare(self, wire: Wire, what: str, verify: bool, method: str, name: str, **rest: Any) -> None:
        if verify:
            passive = {k: v for k, v in rest.items() if k == "exchange_type"}
            await self._ask(wire, what, method, name, passive=True, **passive)
        try:
            await self._ask(wire, what, method, name, durable=True, **rest)
        except MessagingError as error:
            refused = getattr(error.__cause__, "reply_code", None) == 403
            if not (verify and refused):  # who may not declare cannot have the properties compared
                raise

    async def _ask(self, wire: Wire, what: str, method: str, *args: Any, **options: Any) -> Any:
        """One request on a channel of its own: a refusal closes the channel."""
        link = Link(wire, what)
        try:
            await link.open()
            return await link.call(getattr(link.channel, method), *args, **options)
        except MessagingError:
            raise
        except Exception as error:
            raise refusal(error, what) from error
        finally:
            link.abandon()

    async def open_sender(self, destination: Destination[Any]) -> Sender:
        name, home = self._name(destination), self._opened_home()
        wire = await self._wire("publish")
        what = f"{destination} on {self.address}"
        is_topic = destination.tag == "topic"
        exchange, key = (name, "") if is_topic else ("", name) if destination.settles else (SIGNALS, name)
        encoder = Encoder(
            exchange,
            key,
            durable=destination.settles,
            mandatory=destination.settles and (not is_topic or bool(destination.groups)),
            max_body=self._options.max_body,
        )
        sender = Sender(home, Link(wire, what), what, encoder, confirms=destination.settles)

        async def ready() -> None:
            if destination.settles:
                method = "exchange_declare" if is_topic else "queue_declare"
                await self._ask(wire, what, method, name, passive=True)
            await sender.open()

        await self._or_undo(home.run(ready(), what), sender.abandon)
        return sender

    async def open_receiver(
        self, destination: Destination[Any], group: str | None, window: int, on_revoke: OnRevoke
    ) -> Receiver:
        name, home = self._name(destination), self._opened_home()
        check_physical("queue", queue_name(name, group))
        what = f"{destination}{f' group {group!r}' if group else ''} on {self.address}"
        wire = await self._connect(home) if destination.ordered else await self._wire("consume")
        limit = None if destination.settles else self._options.signal_buffer
        receiver = Receiver(
            home, Link(wire, what), what, epoch=next(self._epochs), ordered=destination.ordered, limit=limit
        )

        async def ready() -> None:
            queue = queue_name(name, group)
            if not destination.settles:
                queue = await self._signal_queue(wire, what, name, group)
            await receiver.open(queue, min(window, _MAX_PREFETCH))

        await self._or_undo(home.run(ready(), what), receiver.abandon)
        return receiver

    async def lag(self, destination: Destination[Any], group: str | None) -> int:
        if not destination.settles:
            return await super().lag(destination, group)
        queue = queue_name(self._name(destination), group)
        what = f"queue {queue!r} of {destination} on {self.address}"
        wire = await self._wire("consume")  # an alarm blocks those that publish (rabbitmq.com/docs/alarms)
        asking = self._ask(wire, what, "queue_declare", queue, passive=True)
        answer = await self._opened_home().run(asking, what)
        return int(answer.method.message_count)

    async def close(self) -> None:
        home, self._home = self._home, None
        if home is None:
            return
        for task in self._wires.values():
            task.cancel()
        self._wires.clear()

        async def part() -> None:
            await asyncio.gather(*(wire.end() for wire in tuple(self._live)))

        try:
            with suppress(Exception):
                await home.thread.run(part())
        finally:
            with suppress(RuntimeError):
                for wire in tuple(self._live):
                    home.thread.inward.post(wire.drop)
            home.thread.stop()
            self._live.clear()

    def server(self) -> str:
        return self._server

    def native(self) -> object:
        """The pika connection that publishes, or None. It lives on a thread: use `ioloop.call_soon_threadsafe`."""
        task = self._wires.get("publish")
        return task.result() if task is not None and _is_usable(task) else None

    def _name(self, destination: Destination[Any]) -> str:
        return physical_name(destination, self.destinations.get(destination.name))

    def _opened_home(self) -> Home:
        if self._home is None:
            raise ConnectError(f"{self.address}: the driver is not open")
        return self._home

    async def _wire(self, role: str) -> Wire:
        """The shared connection of `role`; one attempt, however many ask, when there is none or it was lost."""
        home, task = self._opened_home(), self._wires.get(role)
        if task is None or (task.done() and not _is_usable(task)):
            task = self._wires[role] = asyncio.get_running_loop().create_task(self._connect(home))
            task.add_done_callback(lambda t: t.cancelled() or t.exception())  # nobody may be left to look
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if self._home is home:
                raise
            raise ConnectError(f"{self.address}: the driver was closed") from None

    async def _connect(self, home: Home) -> Wire:
        return await home.run(self._dial(), str(self.address))

    async def _dial(self) -> Wire:
        """On the thread: the first host that lets us in; raises the last one's error."""
        options, hosts = self._options, self.address.hosts
        context = _tls_context(options) if self.address.scheme == "amqps" else None
        failure: Exception = ConnectError("no host")
        for host, port in hosts:
            wire = None
            try:
                async with asyncio.timeout(options.connect_timeout_s / len(hosts)):
                    opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                    wire = Wire(self._parameters(host, port, context), opened)
                    await opened
            except Exception as error:
                failure = error
            else:
                self._live = {w for w in self._live if w.lost is None} | {wire}
                return wire
            finally:
                if wire is not None and wire not in self._live:
                    wire.drop()
        raise failure

    def _parameters(self, host: str, port: int | None, context: ssl.SSLContext | None) -> pika.ConnectionParameters:
        options, address = self._options, self.address
        return pika.ConnectionParameters(
            host,
            port or (5671 if context else 5672),
            unquote(address.path[1:]) or "/",
            pika.PlainCredentials(address.user or "guest", address.password or "guest"),
            heartbeat=options.heartbeat_s,
            ssl_options=context and pika.SSLOptions(context, options.server_name or host),
            socket_timeout=options.connect_timeout_s,
            stack_timeout=options.connect_timeout_s + 1,  # ours ends first
            client_properties={"connection_name": "messaging-sdk"},
        )

    async def _signal_queue(self, wire: Wire, what: str, key: str, group: str | None) -> str:
        """On the thread: a queue for one listener, or the one that a group's listeners share."""
        arguments = {
            "x-max-length": self._options.signal_buffer,
            "x-expires": round(self._options.signal_group_expires_s * 1000),
        }
        # Durable, because RabbitMQ 4 deprecates transient queues that several connections share.
        kind = {"exclusive": True} if group is None else {"durable": True}
        name = "" if group is None else queue_name(key, group)
        try:
            made = await self._ask(wire, what, "queue_declare", name, auto_delete=True, arguments=arguments, **kind)
            queue: str = made.method.queue
            await self._ask(wire, what, "queue_bind", queue, SIGNALS, routing_key=key)
        except NotFound as error:  # the group's last listener left in between, and the queue with it
            raise ConnectError(str(error)) from error.__cause__
        return queue

    async def _or_undo(self, work: Awaitable[None], undo: Callable[[], object]) -> None:
        """A cancelled or failed open must not leave a consumer behind that nobody reads."""
        try:
            await work
        except BaseException:
            if self._home is not None:
                self._home.thread.inward.post(undo)
            raise


def _is_usable(task: asyncio.Task[Wire]) -> bool:
    if not task.done() or task.cancelled() or task.exception() is not None:
        return False
    wire = task.result()
    return wire.lost is None and bool(wire.is_open)  # closed comes first, why it was lost a moment later


def _tls_context(options: Options) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=options.ca_file)
        if options.cert_file is not None:
            context.load_cert_chain(options.cert_file, options.key_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError("ca_file, cert_file or key_file cannot be read as PEM") from error
    return context
