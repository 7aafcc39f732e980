"""The driver: physical names, promises, provisioning; and `Link`, one connection that lives once."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar, Final, Protocol, cast

from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.protocol.parser import Parser
from pydantic import BaseModel

from messaging_sdk import spi
from messaging_sdk.capabilities import Capabilities, HeaderRules, Level
from messaging_sdk.config import Address
from messaging_sdk.destination import Destination
from messaging_sdk.errors import (
    ConfigError,
    ConnectionLost,
    DeadlineExceeded,
    InvalidDestination,
    MessagingError,
)

from . import errors
from . import options as nats
from .reader import HistoryReader
from .receiver import SignalReceiver, StreamReceiver
from .sender import SignalSender, StreamSender

Frame = tuple[bytes, bytes, bytes, bytes]  # subject, reply, header block (b"" without one), body
Sink = Callable[[list[Frame]], None]
Reader = Callable[[bytes, int], int]
"""(what was read, where a frame of its subscription starts) -> where the frames end that it took; there if none."""
NOTHING: Final[Frame] = (b"", b"", b"", b"")

NO_BLOCK: Final = nats.DestinationOptions.model_validate({})
M, H = b"MH"  # first bytes of MSG and HMSG
MAX_NAME: Final = 255  # nats-server's JSMaxNameLen; a stream is a directory of that name
GROUP: Final = "ordered"  # the one priority group of an ordered durable
QUEUE_DURABLE: Final = "workers"
DEFAULT_MAX_PAYLOAD: Final = 1 << 20
HEADER_ROOM: Final = 16 << 10  # of max_payload: 8 KiB user headers, their separators, id, key
API_WAIT_S: Final = 5.0  # nats.go's default; a healthy server answers in milliseconds
CREATE_TRIES: Final = 20  # a name deleted a moment ago answers 10049 for some 100 ms (server 2.15)
HEADERS: Final = HeaderRules(max_count=100, max_bytes=8192, charset="ascii", names="token")
STREAM_NOT_FOUND, STREAM_EXISTS, STREAM_CREATE_FAILED = 10059, 10058, 10049
CONSUMER_NOT_FOUND, CONSUMER_EXISTS = 10014, (10148, 10013, 10105)


class Driver(spi.Driver):
    """One NATS server or cluster over one connection, remade at the next `open_...` after a loss."""

    name: ClassVar[str] = "nats"
    client: ClassVar[str] = "nats-py"
    Options: ClassVar[type[BaseModel]] = nats.Options
    DestinationOptions: ClassVar[type[BaseModel]] = nats.DestinationOptions

    def __init__(self, address: Address, options: BaseModel, destinations: Mapping[str, BaseModel]) -> None:
        super().__init__(address, options, destinations)
        if not address.host:
            raise ConfigError("nats: the url names no host; write nats://host or nats://host:4222")
        if address.path not in ("", "/"):
            raise ConfigError("nats: the url has a path; write nats://host without one")
        self._options = cast("nats.Options", options)
        self._link: Link | None = None
        self._attempt: asyncio.Task[Link] | None = None

    # promises

    def capabilities(self, destination: Destination[Any]) -> Capabilities:
        link = self._link
        max_body = (link.client.max_payload if link else DEFAULT_MAX_PAYLOAD) - HEADER_ROOM
        if not destination.settles:
            return Capabilities(
                order="publisher",
                compete="round_robin",
                groups="live",
                batch="entries",
                max_body=max_body,
                headers=HEADERS,
                notes={"compete": "a NATS queue group picks a member at random, busy or not"},
            )
        if link and link.no_jetstream:
            return Capabilities(notes={"tag": link.no_jetstream})
        return self._stream_capabilities(destination, max_body)

    def _stream_capabilities(self, destination: Destination[Any], max_body: int) -> Capabilities:
        modern = self._link is None or self._link.version >= (2, 11)
        ordered = destination.ordered and modern
        notes = {
            "ok_means": "JetStream acks before fsync (sync_interval, default 2 min): NATS docs",
            "lease_s": "option ack_wait_s",
            "dedup_s": "option duplicate_window_s",
            "hold_s": "core extends the lease",
        }
        if not modern:
            notes |= dict.fromkeys(("ttl", "order_redelivery"), "nats-server 2.11 or newer")
        if ordered:
            notes["release"] = "a delayed release stops the whole group until it is back"
            notes["compete"] = "one member of a group is active (pinned client), the others stand by"
        return Capabilities(
            settle="individual",
            release="delay",
            lease="timeout",
            lease_s=self._options.ack_wait_s,
            count="exact",
            backlog=True,
            order="publisher",
            order_redelivery=ordered,
            order_competition=ordered,
            compete="standby" if ordered else "demand",
            groups="durable" if destination.tag == "topic" else "none",
            replay=self._keeps_history(destination),
            lag="unsettled",
            confirm="stored",
            route_error=True,
            durable="kill" if self._options.storage == "file" else "none",
            dedup_s=self._options.duplicate_window_s,
            batch="entries",
            ttl=modern,
            max_body=max_body,
            headers=HEADERS,
            window=True,
            ok_means="page_cache" if self._options.storage == "file" else "memory",
            levels={} if self._options.storage == "file" else {"durable": Level.CONFIG},
            notes=notes if self._options.storage == "file" else notes | {"durable": 'storage = "file"'},
        )

    def check(self, destination: Destination[Any]) -> None:
        names = [self._stream(destination)] if destination.settles else []
        for physical in [*names, *map(_word, destination.groups)]:
            if len(physical) > MAX_NAME:
                raise InvalidDestination(
                    f"{destination}: the NATS name {physical[:40]}... has {len(physical)} characters,"
                    f" the limit is {MAX_NAME} ('.' is written '__'); shorten it or set nats.address"
                )

    def server(self) -> str:
        return f"NATS {'.'.join(map(str, self._link.version))}" if self._link else ""

    def native(self) -> object:
        return self._link.client if self._link else None

    # connections

    async def open(self) -> None:
        await self._connected()

    async def open_sender(self, destination: Destination[Any]) -> spi.Sender:
        link = await self._connected()
        subject, limit = self._subject(destination), link.client.max_payload
        if not destination.settles:
            return SignalSender(link, subject, limit, HEADER_ROOM)
        await self._found(link, f"STREAM.INFO.{self._stream(destination)}", destination)
        sender = StreamSender(link, subject, limit, HEADER_ROOM)
        sender.start()
        return sender

    async def open_receiver(
        self, destination: Destination[Any], group: str | None, window: int, on_revoke: spi.OnRevoke
    ) -> spi.Receiver:
        link = await self._connected()
        if not destination.settles:
            signals = SignalReceiver(link, self._options.signal_buffer)
            queue = _word(group) if group else ""
            await signals.start(self._subject(destination), queue)
            return signals
        stream, durable = self._stream(destination), _durable(group)
        config = (await self._found(link, f"CONSUMER.INFO.{stream}.{durable}", destination))["config"]
        if destination.ordered and config.get("priority_policy") != "pinned_client":
            raise _old_server(destination)
        if 0 < (bound := config.get("max_ack_pending", -1)) < window:
            window = bound
        receiver = StreamReceiver(link, f"{stream}.{durable}", window, config["ack_wait"] / 1e9, on_revoke)
        await receiver.start(GROUP if destination.ordered else None)
        return receiver

    async def open_reader(self, destination: Destination[Any], since: float | str | None) -> spi.Reader:
        if not self._keeps_history(destination):
            return await super().open_reader(destination, since)
        reader = HistoryReader(await self._connected(), self._stream(destination))
        try:
            await reader.start(since)
        except BaseException:
            reader.let_go()
            raise
        return reader

    async def lag(self, destination: Destination[Any], group: str | None) -> int:
        if not destination.settles:
            return await super().lag(destination, group)
        path = f"CONSUMER.INFO.{self._stream(destination)}.{_durable(group)}"
        found = await self._found(await self._connected(), path, destination)
        return int(found["num_pending"]) + int(found["num_ack_pending"])

    def _keeps_history(self, destination: Destination[Any]) -> bool:
        return destination.tag == "topic" and self._block(destination).retention == "limits"

    async def close(self) -> None:
        attempt, link = self._attempt, self._link
        if attempt is not None:
            attempt.cancel()
        if link is not None:
            await link.close()

    async def _connected(self) -> Link:
        """The living connection; concurrent callers share one attempt to make it."""
        if self._link is not None and self._link.error is None:
            return self._link
        if self._attempt is None or self._attempt.done():
            self._attempt = asyncio.create_task(self._connect())
            self._attempt.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(self._attempt)

    async def _connect(self) -> Link:
        link = Link(self.address, self._options)
        await link.open()
        self._link = link
        return link

    async def _found(self, link: Link, path: str, destination: Destination[Any]) -> dict[str, Any]:
        try:
            return await link.api(path)
        except errors.ApiError as error:
            raise errors.from_api(error, f"{path} of {destination}") from error

    # names

    def _block(self, destination: Destination[Any]) -> nats.DestinationOptions:
        block = self.destinations.get(destination.name)
        return cast("nats.DestinationOptions", block) if block else NO_BLOCK

    def _subject(self, destination: Destination[Any]) -> str:
        return self._block(destination).address or f"{destination.tag}.{destination.name}"

    def _stream(self, destination: Destination[Any]) -> str:
        return _word(self._subject(destination))

    # provisioning

    async def provision(self, destinations: Sequence[Destination[Any]], mode: spi.Provision) -> None:
        wanted = [d for d in destinations if d.settles]
        if mode == "none" or not wanted:
            return
        link = await self._connected()
        for destination in wanted:
            if link.no_jetstream:
                raise errors.absent(destination.name, destination.tag, link.no_jetstream)
            if destination.ordered and link.version < (2, 11):
                raise _old_server(destination)
            try:
                await self._provision(link, destination, mode)
            except errors.ApiError as error:
                raise errors.from_api(error, f"provisioning of {destination}") from error

    async def _provision(self, link: Link, destination: Destination[Any], mode: spi.Provision) -> None:
        stream = self._stream(destination)
        config = self._stream_config(destination, link.version)
        found = await _made(link, f"STREAM.INFO.{stream}", f"STREAM.CREATE.{stream}", config, mode)
        _compare(f"stream {stream} of {destination}", found, config)
        groups: Sequence[str | None] = destination.groups if destination.tag == "topic" else [None]
        for durable in map(_durable, groups):
            durable_config = self._durable_config(destination, durable)
            body = {"stream_name": stream, "config": durable_config, "action": "create"}
            info, path = f"CONSUMER.INFO.{stream}.{durable}", f"CONSUMER.CREATE.{stream}.{durable}"
            found = await _made(link, info, path, body, mode)
            if destination.ordered and "priority_policy" not in found:
                raise _old_server(destination)
            _compare(f"consumer {durable} of {destination}", found, durable_config)

    def _stream_config(self, destination: Destination[Any], version: tuple[int, ...]) -> dict[str, Any]:
        """What a stream must have. A Queue refuses what does not fit; a Topic drops its oldest."""
        options, block = self._options, self._block(destination)
        queue = destination.tag == "queue"
        max_age_s = block.max_age_s or (0.0 if queue else options.topic_max_age_s)
        window_s = min(options.duplicate_window_s, max_age_s or options.duplicate_window_s)
        config: dict[str, Any] = {
            "name": self._stream(destination),
            "subjects": [self._subject(destination)],
            "retention": "workqueue" if queue else block.retention,
            "discard": block.discard or ("new" if queue else "old"),
            "storage": options.storage,
            "num_replicas": block.replicas or options.replicas,
            "max_age": _ns(max_age_s),
            "duplicate_window": _ns(window_s),
            "max_bytes": block.max_bytes or -1,
            "max_msgs": block.max_msgs or -1,
        }
        return config | ({"allow_msg_ttl": True} if version >= (2, 11) else {})

    def _durable_config(self, destination: Destination[Any], durable: str) -> dict[str, Any]:
        config: dict[str, Any] = {
            "durable_name": durable,
            "ack_policy": "explicit",
            "ack_wait": _ns(self._options.ack_wait_s),
            "max_deliver": -1,  # with a limit the message would stay in the stream for ever
            "deliver_policy": "new" if destination.tag == "topic" else "all",
            "max_ack_pending": -1,
        }
        if destination.ordered:
            config |= {
                "max_ack_pending": self._options.max_ack_pending,
                "priority_policy": "pinned_client",
                "priority_groups": [GROUP],
                "priority_timeout": _ns(self._options.ack_wait_s),
            }
        return config


async def _made(link: Link, info: str, create: str, body: Mapping[str, Any], mode: spi.Provision) -> dict[str, Any]:
    """The config that the server echoes; made first if absent and `mode` is create."""
    for _ in range(CREATE_TRIES):
        try:
            return cast("dict[str, Any]", (await link.api(info))["config"])
        except errors.ApiError as error:
            if error.err_code not in (STREAM_NOT_FOUND, CONSUMER_NOT_FOUND) or mode == "verify":
                raise
        try:
            return cast("dict[str, Any]", (await link.api(create, body))["config"])
        except errors.ApiError as error:
            if error.err_code == STREAM_CREATE_FAILED:
                await asyncio.sleep(0.1)
            elif error.err_code not in (STREAM_EXISTS, *CONSUMER_EXISTS):  # someone was faster
                raise
    raise errors.ApiError(STREAM_CREATE_FAILED, f"{create} failed {CREATE_TRIES} times")


def _compare(what: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise ConfigError for a property that differs. Servers leave zero values out of their echo."""
    for key, value in wanted.items():
        if (have := found.get(key)) != value and (have or value):
            raise ConfigError(
                f"{what} exists with {key}={have!r}, wanted {value!r}: change the option, edit or "
                'remove it on the server, or set provision = "none"'
            )


def _old_server(destination: Destination[Any]) -> MessagingError:
    return errors.absent(destination.name, "order_competition=True", "nats-server 2.11 or newer")


def _durable(group: str | None) -> str:
    return _word(group) if group else QUEUE_DURABLE


def _word(name: str) -> str:
    return name.replace(".", "__")


def _ns(duration_s: float) -> int:
    return round(duration_s * 1e9)


class Link:
    """One connection, one life: after `error` is set nothing is written and nobody waits any more."""

    def __init__(self, address: Address, options: nats.Options) -> None:
        self.client: Final = _Client(self)
        self.error: ConnectionLost | None = None
        self.no_jetstream = ""
        self.version: tuple[int, ...] = (0,)
        self.listeners: Final[set[Listener]] = set()
        self._address = address
        self._options = options
        self._noted: BaseException | None = None
        self._sid = 1 << 32  # far from nats-py's own subscriptions on the same connection
        self._inbox = b""
        self._requests: dict[bytes, asyncio.Future[Frame]] = {}

    async def open(self) -> None:
        """Connect and find out about JetStream, within `connect_timeout_s`."""
        wait_s = self._options.connect_timeout_s
        try:
            async with asyncio.timeout(wait_s):
                await self.client.connect(**self._connect_options(wait_s))
                self._inbox = self.subscribe_inbox(self._on_replies)[1]
                self.version = _version(self.client)
                await self._probe_jetstream()
        except Exception as error:
            cause = self._noted if _is_vague(error) and self._noted else error
            self.fail(cause)
            made = errors.from_connect(cause, str(self._address), wait_s)
            if made is cause:
                raise
            raise made from cause
        except BaseException as error:
            self.fail(error)
            raise

    def _connect_options(self, wait_s: float) -> dict[str, Any]:
        address, options = self._address, self._options
        hosts = [f"[{h}]:{p or 4222}" if ":" in h else f"{h}:{p or 4222}" for h, p in address.hosts]
        asked: dict[str, Any] = {"servers": [f"nats://{host}" for host in hosts]}
        if self.wants_tls:
            asked["tls"] = _tls_context(options)
        for key, value in (
            ("user", address.user),
            ("password", address.password),
            ("token", options.token),
            ("user_credentials", options.creds_file),
            ("tls_hostname", options.server_name),
        ):
            asked |= {key: value} if value is not None else {}
        return asked | {
            "allow_reconnect": False,
            "max_reconnect_attempts": 1,  # 0 would mean: no limit
            "reconnect_time_wait": 0,
            "connect_timeout": wait_s,
            "ping_interval": options.ping_interval_s,
            "error_cb": self._note,
            "closed_cb": self._closed,
            "name": "messaging_sdk",
        }

    @property
    def wants_tls(self) -> bool:
        files = self._options.ca_file or self._options.cert_file
        return self._options.tls or bool(files) or self._address.scheme in ("tls", "nats+tls")

    async def _probe_jetstream(self) -> None:
        try:
            await self.api("INFO")
        except errors.ApiError as error:
            self.no_jetstream = (
                f"a NATS server with JetStream: {self._address} has none for this account "
                f"({error}); start it with -js or a jetstream block"
            )

    # traffic

    def write(self, blob: bytes) -> None:
        """Hand `blob` to the transport, behind what nats-py has buffered. Raises ConnectionLost."""
        if self.error is not None:
            raise self.error
        client = self.client
        assert client._transport is not None
        if client._pending:
            client._transport.writelines(client._pending[:])
            client._pending = []
            client._pending_data_size = 0
        client._transport.write(blob)

    def unsent_bytes(self) -> int:
        """Bytes that the server has not taken from us yet."""
        transport = self.client.raw_transport()
        return transport.get_write_buffer_size() if transport else 0

    def subscribe(self, subject: str, sink: Sink, queue: str = "") -> bytes:
        """Subscribe and return the subscription's id. Processed by the server after `flush`."""
        self._sid += 1
        sid = b"%d" % self._sid
        self.client.parser.sinks[sid] = sink
        self.write(f"SUB {subject} {queue} {self._sid}\r\n".encode())
        return sid

    def subscribe_inbox(self, sink: Sink) -> tuple[bytes, bytes]:
        """A subject prefix of our own, b"_INBOX.x."; all below it goes to `sink`."""
        inbox = self.client.new_inbox()
        return self.subscribe(f"{inbox}.>", sink), f"{inbox}.".encode()

    def read_ahead(self, sid: bytes, reader: Reader) -> None:
        """Offer the frames of `sid` to `reader` first; its sink gets those that `reader` does not take."""
        self.client.parser.readers[sid] = reader

    def unsubscribe(self, sid: bytes, *, forget: bool = True) -> None:
        """Stop the subscription; with `forget` what is still on its way is thrown away too."""
        if forget:
            self.client.parser.sinks.pop(sid, None)
            self.client.parser.readers.pop(sid, None)
        with suppress(ConnectionLost):
            self.write(b"UNSUB %b\r\n" % sid)

    async def flush(self) -> None:
        """One round trip: the server has processed all that was written. Raises ConnectionLost."""
        self._sid += 1
        token = b"%d" % self._sid
        waiting = self._requests[token] = asyncio.get_running_loop().create_future()
        # nats-py sets this future without looking: a cancelled one would end its read loop.
        pong: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        pong.add_done_callback(lambda _: _answer(waiting, NOTHING))
        try:
            self.write(b"PING\r\n")
            self.client._pongs.append(pong)
            await waiting
        finally:
            del self._requests[token]

    async def request(self, subject: str, body: bytes, wait_s: float = API_WAIT_S) -> Frame:
        """One reply. Raises ApiError(503) without a responder, DeadlineExceeded, ConnectionLost."""
        self._sid += 1
        token = b"%d" % self._sid
        reply = self._requests[token] = asyncio.get_running_loop().create_future()
        try:
            head = b"PUB %b %b%b %d\r\n" % (subject.encode(), self._inbox, token, len(body))
            self.write(b"%b%b\r\n" % (head, body))
            async with asyncio.timeout(wait_s):
                frame: Frame = await reply
        except TimeoutError as error:
            raise DeadlineExceeded(f"NATS did not answer {subject} within {wait_s} s") from error
        finally:
            del self._requests[token]
        if frame[2].startswith(b"NATS/1.0 503"):
            raise errors.ApiError(503, f"nobody answers {subject}")
        return frame

    async def api(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """One JetStream API call. Raises ApiError, and what `request` raises."""
        text = b"" if body is None else json.dumps(body).encode()
        reply = cast("dict[str, Any]", json.loads((await self.request(f"$JS.API.{path}", text))[3]))
        if error := reply.get("error"):
            raise errors.ApiError(error.get("err_code", 0), error.get("description", ""))
        return reply

    def _on_replies(self, frames: list[Frame]) -> None:
        for frame in frames:
            waiting = self._requests.get(frame[0][len(self._inbox) :])
            if waiting is not None:
                _answer(waiting, frame)

    # the end

    def fail(self, error: BaseException | None) -> None:
        """The connection is gone, once and for all: tell everybody, drop the socket."""
        if self.error is not None:
            return
        self.error = errors.lost(error, str(self._address))
        for reply in self._requests.values():
            if not reply.done():
                reply.set_exception(self.error)
        for listener in list(self.listeners):
            listener.on_lost(self.error)
        if transport := self.client.raw_transport():
            transport.abort()

    def refuse(self, text: str) -> None:
        """The server's "permissions violation": only the senders or receivers of that subject end."""
        for listener in list(self.listeners):
            listener.on_denied(text)

    async def close(self) -> None:
        """Send what is buffered if the server takes it, then end. Bounded by 1 s; never raises."""
        with suppress(Exception):
            if self.error is None and self.unsent_bytes():
                async with asyncio.timeout(1.0):
                    await self.flush()
        self.fail(None)
        with suppress(Exception):
            async with asyncio.timeout(1.0):
                await self.client.close()

    async def _note(self, error: Exception) -> None:
        self._noted = error

    async def _closed(self) -> None:
        self.fail(self.client.last_error)


class Listener(Protocol):
    """What a Link tells its senders and receivers."""

    def on_lost(self, error: ConnectionLost) -> None: ...

    def on_denied(self, text: str) -> None: ...


class _Client(Client):
    """nats-py's client that reports its end at once and never sends credentials in clear by accident.

    nats-py 2.16 writes CONNECT with the password although TLS was asked for and the server (or
    someone in between) does not announce it; only its successor nats-core checks (PR 912).
    """

    def __init__(self, link: Link) -> None:
        super().__init__()
        self._link = link
        self.parser: Final = _Parser(self)
        self._ps = self.parser

    def raw_transport(self) -> asyncio.WriteTransport | None:
        writer = getattr(self._transport, "_io_writer", None)
        return writer.transport if writer is not None else None

    def lost(self, error: BaseException) -> None:
        self._link.fail(error)

    def _connect_command(self) -> bytes:
        transport = self.raw_transport()
        if self._link.wants_tls and not (transport and transport.get_extra_info("cipher")):
            raise errors.TlsMissing
        return super()._connect_command()

    async def _process_op_err(self, e: Exception) -> None:
        self._link.fail(e)
        await super()._process_op_err(e)

    async def _process_err(self, err_msg: str) -> None:
        if "permissions violation" in err_msg:
            self._link.refuse(err_msg)
        elif "authorization violation" not in err_msg or self.is_connected:
            self._link.fail(NatsError(f"nats: {err_msg}"))
        await super()._process_err(err_msg)


class _Parser(Parser):
    """Collects the messages of one read per subscription; all else goes to nats-py's parser.

    nats-py tries six regular expressions per message and awaits a coroutine for each: 4.7 us.
    """

    def __init__(self, client: _Client) -> None:
        super().__init__(client)
        self.sinks: dict[bytes, Sink] = {}
        self.readers: dict[bytes, Reader] = {}
        self._client = client
        self._chunks: list[bytes] = []
        self._have = self._need = 0

    async def parse(self, data: bytes = b"") -> None:
        self._chunks.append(data)
        self._have += len(data)
        if self._have < self._need:  # in the middle of a large message: join once, not per read
            return
        buffer = data if len(self._chunks) == 1 else b"".join(self._chunks)
        self._need = 0
        rest = buffer[await self._frames(buffer) :]
        self._chunks, self._have = [rest] if rest else [], len(rest)

    async def _frames(self, buffer: bytes) -> int:
        """Handle every complete frame of `buffer`; return where the first incomplete one starts."""
        at, end = 0, len(buffer)
        batches: dict[bytes, list[Frame]] = {}
        sid, frames = b"", list[Frame]()
        while (line := buffer.find(b"\r\n", at)) >= 0:
            kind, start = buffer[at], line + 2
            if kind not in (M, H):
                self._hand_over(batches)  # a PONG or an error comes after the messages before it
                await super().parse(buffer[at:start])
                at, sid = start, b""
                continue
            words = buffer[at:line].split()
            if words[2] != sid:
                if (reader := self.readers.get(words[2])) and (past := self._read_ahead(reader, buffer, at)) > at:
                    at, sid = past, b""
                    continue
                sid, frames = words[2], batches.setdefault(words[2], [])
            stop = start + int(words[-1])
            if stop + 2 > end:
                self._need = stop + 2 - at
                break
            if sid not in self.sinks:
                await super().parse(buffer[at : stop + 2])
            elif kind == H:
                body = start + int(words[-2])
                reply = words[3] if len(words) == 6 else b""
                frames.append((words[1], reply, buffer[start:body], buffer[body:stop]))
            else:
                reply = words[3] if len(words) == 5 else b""
                frames.append((words[1], reply, b"", buffer[start:stop]))
            at = stop + 2
        self._hand_over(batches)
        return at

    def _read_ahead(self, reader: Reader, buffer: bytes, at: int) -> int:
        try:
            return reader(buffer, at)
        except Exception as error:
            self._client.lost(error)
            return at

    def _hand_over(self, batches: dict[bytes, list[Frame]]) -> None:
        for sid, frames in batches.items():
            try:
                if sink := self.sinks.get(sid):
                    sink(frames)
            except Exception as error:  # nats-py would log it and stop reading for ever
                self._client.lost(error)
        batches.clear()


def _answer(waiting: asyncio.Future[Frame], frame: Frame) -> None:
    if not waiting.done():
        waiting.set_result(frame)


def _tls_context(options: nats.Options) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=options.ca_file)
        if options.cert_file:
            context.load_cert_chain(options.cert_file, options.key_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"nats: ca_file, cert_file or key_file cannot be used: {error.strerror or error}") from error
    return context


def _is_vague(error: BaseException) -> bool:
    """nats-py hides the reason of a failed TCP connect behind "no servers available"."""
    return isinstance(error, NatsError) and "no servers" in str(error)


def _version(client: Client) -> tuple[int, ...]:
    version = client.connected_server_version
    return (version.major, version.minor, version.patch)
