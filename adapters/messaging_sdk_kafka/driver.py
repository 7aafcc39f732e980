"""The driver: promises, provisioning, and what senders and receivers are opened with."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Final, TypeVar, cast
from uuid import uuid4

from confluent_kafka import (
    OFFSET_BEGINNING,
    OFFSET_END,
    Consumer,
    KafkaError,
    KafkaException,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._config import ConfigResource  # where its type is known; the same as in `admin`
from confluent_kafka.admin._listoffsets import OffsetSpec
from confluent_kafka.cimpl import NewTopic
from pydantic import BaseModel

from messaging_sdk import spi
from messaging_sdk.capabilities import Capabilities
from messaging_sdk.config import Address
from messaging_sdk.destination import Destination
from messaging_sdk.errors import ConfigError, ConnectError, NotFound

from . import options as kafka
from .errors import is_miscount, native_of, no_protocol, refusal
from .options import MESSAGE_ROOM, Options, group_id, promises, topic_name
from .reader import HistoryReader, offsets_at
from .receiver import Member, Receiver, ahead_of
from .sender import Link, Sender

T = TypeVar("T")

_NO_BLOCK: Final = kafka.DestinationOptions.model_validate({})
_POLL_S: Final = 0.02
"""How often an attempt to connect is asked for what went wrong."""
_FRESH_S: Final = 10.0
"""How long a topic may take until each partition has a leader."""
_FRESH_POLL_S: Final = 0.05
_LED_S: Final = 3.0
"""How long a sender waits for leaders; a partition that has none is not to keep messages from the others."""
_ANSWER_S: Final = 5.0
_SIGNAL_RETENTION_S: Final = 60.0
"""Nobody reads an old signal."""
_PATIENCE_S: Final = 60.0
"""librdkafka's socket.timeout.ms. Leaving the only broker gains nothing: what it may have stored is then sent again."""
_RECONNECT_MS: Final = {"reconnect.backoff.ms": 20, "reconnect.backoff.max.ms": 500}
"""The admin's client outlives a broker; by default it would try again after up to 10 s."""
_FRESH: Final = (
    KafkaError.UNKNOWN_TOPIC_OR_PART,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.UNKNOWN_LEADER_EPOCH,
    KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
    KafkaError.COORDINATOR_NOT_AVAILABLE,
    KafkaError.NOT_COORDINATOR,
)
_UNLED: Final = (*_FRESH, KafkaError._NOENT)  # the client's own word for: no leader is known
_LIVELY: Final = (
    KafkaError.UNKNOWN_MEMBER_ID,
    KafkaError.ILLEGAL_GENERATION,
    KafkaError.REBALANCE_IN_PROGRESS,
    KafkaError.STALE_MEMBER_EPOCH,
)
"""Answers to a commit of a stranger that say: the group has members."""
_PROTOCOLS: Final = "group.coordinator.rebalance.protocols"


class Driver(spi.Driver):
    """Kafka at `kafka://host:port,host:port`, or `kafka+tls://`; a user in the URL means SASL."""

    name: ClassVar[str] = "kafka"
    client: ClassVar[str] = "confluent-kafka"
    Options = Options
    DestinationOptions = kafka.DestinationOptions

    def __init__(self, address: Address, options: BaseModel, destinations: Mapping[str, BaseModel]) -> None:
        super().__init__(address, options, destinations)
        if not address.hosts:
            raise ConfigError("kafka: the url names no host; write kafka://host:9092 or kafka://h1:9092,h2:9092")
        if address.path not in ("", "/"):
            raise ConfigError("kafka: the url has a path; write kafka://host:9092 without one")
        self._options = cast(Options, options)
        self._tls = self._options.tls or address.scheme.endswith("+tls")
        keys = [k for k in ("ca_file", "cert_file", "key_file") if getattr(options, k) is not None]
        if keys and not self._tls:
            raise ConfigError(f"{address}: {', '.join(keys)} need TLS: write kafka+tls://, or tls = true")
        self._admin: AdminClient | None = None
        self._troubles: list[KafkaError] = []
        self._links: dict[bool, Link] = {}
        self._members: list[Member] = []
        self._partitions: dict[str, int] = {}
        self._server = ""
        self._brokers = 1  # known when it is open

    # --- promises

    def capabilities(self, destination: Destination[Any]) -> Capabilities:
        block = self._block(destination)
        partitions = self._partitions.get(topic_name(destination, block)) or block.partitions
        return promises(destination, self._options, partitions or self._options.partitions)

    def check(self, destination: Destination[Any]) -> None:
        topic_name(destination, self._block(destination))

    # --- connecting

    async def open(self) -> None:
        if self._admin is not None:
            return
        config: dict[str, Any] = self.config() | {"error_cb": self._troubles.append}
        try:
            admin = self._admin = AdminClient(config)
        except KafkaException as error:
            raise refusal(error, str(self.address)) from error
        try:
            cluster = await self._reached(admin)
            self._server = "Apache Kafka"
            self._brokers = len(cluster.nodes)
            if self._options.group_protocol == "kip848":
                await self._check_protocol(admin, cluster)
        except BaseException:
            await self.close()
            raise

    async def _reached(self, admin: AdminClient) -> Any:
        """The cluster's description; or, at once, what keeps us from it."""
        wait_s = self._options.connect_timeout_s
        asked = admin.describe_cluster(request_timeout=wait_s)
        waiting = asyncio.wrap_future(asked)
        deadline = time.monotonic() + wait_s
        while not waiting.done() and time.monotonic() < deadline:
            await asyncio.wait([waiting], timeout=_POLL_S)
            admin.poll(0)
            codes = {error.code() for error in self._troubles if not is_miscount(error)}
            alone = len(self.address.hosts) == 1  # one bad host of several is the client's business
            is_hopeless = KafkaError._ALL_BROKERS_DOWN in codes or (alone and codes - {KafkaError._TRANSPORT})
            if is_hopeless and not waiting.done():
                waiting.cancel()
                worst = min(self._troubles, key=lambda e: e.code() == KafkaError._ALL_BROKERS_DOWN)
                raise refusal(worst, str(self.address))
        if not waiting.done():
            waiting.cancel()
            said = f" (the client said: {self._troubles[-1].str()})" if self._troubles else ""
            raise ConnectError(f"{self.address}: no answer within {wait_s:g} s; is it a running Kafka?{said}")
        try:
            return waiting.result()
        except KafkaException as error:
            raise refusal(error, str(self.address)) from error

    async def _check_protocol(self, admin: AdminClient, cluster: Any) -> None:
        """Refuse a server that would never let a member of the new protocol in."""
        resource = ConfigResource(ConfigResource.Type.BROKER, str(cluster.nodes[0].id))
        try:
            found = await asyncio.wrap_future(admin.describe_configs([resource])[resource])
        except KafkaException as error:
            native = native_of(error)
            if native is not None and native.code() == KafkaError.CLUSTER_AUTHORIZATION_FAILED:
                return  # who may not look is told when the first receiver is opened
            raise refusal(error, str(self.address)) from error
        if _PROTOCOLS not in found or "consumer" not in str(found[_PROTOCOLS].value).split(","):
            raise no_protocol(str(self.address))

    async def close(self) -> None:
        admin, self._admin = self._admin, None
        links, self._links = self._links, {}
        for link in links.values():
            link.close()
        for member in self._members:  # a receiver that nobody closed would keep its partitions
            member.order(member.drop)
        self._members = []
        self._troubles = []
        await asyncio.to_thread(_end, [link.thread for link in links.values()], admin)

    def server(self) -> str:
        return self._server

    def native(self) -> object:
        """The AdminClient, or None before `open`. Deliveries carry the client's own message as `native`."""
        return self._admin

    # --- provisioning

    async def provision(self, destinations: Sequence[Destination[Any]], mode: spi.Provision) -> None:
        if mode == "none" or not destinations:
            return
        admin = self._opened()
        if mode == "create":
            await self._create(admin, destinations)
        for destination in destinations:
            topic = topic_name(destination, self._block(destination))
            if destination.settles or mode == "create":
                await self._compare(admin, destination, topic, is_made=mode == "create")
            for group in destination.groups:
                await self._provision_group(destination, topic, group_id(topic, group), mode)

    async def _create(self, admin: AdminClient, destinations: Sequence[Destination[Any]]) -> None:
        wanted = {}
        for destination in destinations:
            block = self._block(destination)
            topic = topic_name(destination, block)
            replicas = block.replication_factor or self._options.replication_factor or -1
            config = {"retention.ms": str(round(self._retention_s(destination) * 1000))}
            partitions = block.partitions or self._options.partitions
            wanted[topic] = NewTopic(topic, partitions, replicas, config=config)
        for topic, made in admin.create_topics(list(wanted.values())).items():
            try:
                await asyncio.wrap_future(made)
            except KafkaException as error:
                native = native_of(error)
                if native is None or native.code() != KafkaError.TOPIC_ALREADY_EXISTS:
                    raise refusal(error, f"topic {topic!r} on {self.address}") from error

    def _retention_s(self, destination: Destination[Any]) -> float:
        otherwise = self._options.retention_s if destination.settles else _SIGNAL_RETENTION_S
        return self._block(destination).retention_s or otherwise

    async def _compare(self, admin: AdminClient, destination: Destination[Any], topic: str, *, is_made: bool) -> None:
        """Raise NotFound without the topic, ConfigError where it is not what the destination's block says."""
        block = self._block(destination)
        described = await self._described(admin, topic, is_made=is_made)
        found: dict[str, float] = {
            "partitions": len(described.partitions),
            "replication_factor": len(described.partitions[0].replicas),
        }
        if block.retention_s is not None:
            resource = ConfigResource(ConfigResource.Type.TOPIC, topic)
            config = await self._asked(lambda: admin.describe_configs([resource])[resource], f"topic {topic!r}")
            found["retention_s"] = int(config["retention.ms"].value) / 1000
        for name, value in found.items():
            wanted = getattr(block, name)
            if wanted is not None and wanted != value:
                raise ConfigError(
                    f"topic {topic!r} on {self.address} exists with other properties: {name} is {value}, wanted "
                    f"{wanted}; change the topic, or adapt the configuration"
                )

    async def _provision_group(
        self, destination: Destination[Any], topic: str, group: str, mode: spi.Provision
    ) -> None:
        """A new group starts at now, so its first commit is made here."""
        what, count = f"{destination} on {self.address}", self._partitions[topic]
        missing = await self._in_group(group, partial(_missing_commits, topic, count, makes=mode == "create"))
        if missing < count:
            return  # partitions that came later are read from their beginning
        if mode == "verify":
            raise NotFound(
                f"{what}: group {group!r} has no committed offsets, so it would start at the oldest message; "
                'provision = "create" lets it start at now'
            )
        raise ConnectError(f"{what}: the first commit of group {group!r} was not recorded; try again")

    async def _in_group(self, group: str, work: Callable[[Consumer], T]) -> T:
        """Do `work` with a client that names `group` and does not join it.

        Not by the AdminClient: confluent-kafka 2.16.1 now and then crashes the process when the answer to its
        list_consumer_group_offsets is an error.
        """
        config = self.config() | {"group.id": group, "enable.auto.commit": False}

        def ask() -> T:
            client = Consumer(config)
            try:
                return work(client)
            finally:
                client.close()

        return await self._when_fresh(lambda: asyncio.to_thread(ask), f"group {group!r}")

    async def _described(self, admin: AdminClient, topic: str, *, is_made: bool = False) -> Any:
        """The topic as the broker describes it; one that was just made may not be known to it yet."""

        def ask() -> Any:
            return admin.describe_topics(TopicCollection([topic]))[topic]

        found = await self._asked(ask, f"topic {topic!r}", is_made=is_made)
        self._partitions[topic] = len(found.partitions)
        return found

    async def _asked(self, ask: Callable[[], Any], what: str, *, is_made: bool = True) -> Any:
        """One request of the AdminClient."""
        try:
            return await self._when_fresh(lambda: asyncio.wrap_future(ask()), what, is_made=is_made)
        except ConnectError:
            self._renew_admin()
            raise

    def _renew_admin(self) -> None:
        """One that got no answer may be asking a controller that is no more, for ever."""
        if self._admin is None:  # closed meanwhile
            return
        old, self._admin = self._admin, AdminClient(self.config())
        threading.Thread(target=_end, args=((), old), daemon=True).start()

    async def _when_fresh(self, work: Callable[[], Awaitable[T]], what: str, *, is_made: bool = True) -> T:
        """Do it, again while a topic or group that was just made is not ready; `is_made`: or not even known."""
        deadline = time.monotonic() + _FRESH_S
        while True:
            try:
                return await work()
            except KafkaException as error:
                native = native_of(error)
                fresh = native is not None and native.code() in (_FRESH if is_made else _FRESH[1:])
                if not fresh or time.monotonic() > deadline:
                    raise refusal(error, f"{what} on {self.address}") from error
            await asyncio.sleep(_FRESH_POLL_S)

    # --- senders and receivers

    async def open_sender(self, destination: Destination[Any]) -> Sender:
        topic, _ = await self._topic(destination)
        what = f"{destination} on {self.address}"
        link = self._link(destination.settles)
        try:  # by the producer, so that it is connected, and knows when it is not any more
            known = await asyncio.to_thread(link.producer.list_topics, topic, self._options.connect_timeout_s)
        except KafkaException as error:
            raise refusal(error, what) from error
        except RuntimeError as error:  # the link was lost, and its client has ended
            raise ConnectError(f"{what}: {error}") from error
        found = known.topics[topic]
        if found.error is not None:
            raise refusal(found.error, what)
        await self._led(topic, len(found.partitions))
        if link.lost is not None:
            raise ConnectError(str(link.lost))
        self._partitions[topic] = len(found.partitions)
        limit = self._options.max_message_bytes - MESSAGE_ROOM
        return Sender(link, topic, len(found.partitions), what, max_body=limit, confirmed=destination.settles)

    async def _topic(self, destination: Destination[Any]) -> tuple[str, int]:
        """The topic's name and partitions. A Signal's is made when it is first used, whatever `provision` says."""
        admin = self._opened()
        topic = topic_name(destination, self._block(destination))
        try:
            found = await self._described(admin, topic)
        except NotFound:
            if destination.settles:
                raise
            await self._create(admin, [destination])
            found = await self._described(admin, topic, is_made=True)
        return topic, len(found.partitions)

    async def _led(self, topic: str, count: int) -> None:
        """Wait until each partition's leader knows that it is one, for a moment at most: one that was just made refuses
        a producer's first messages, and may by then take those behind them."""
        latest = cast(Any, OffsetSpec).latest()  # which has no types
        ends = {TopicPartition(topic, n): latest for n in range(count)}
        end = time.monotonic() + _LED_S
        while (left_s := end - time.monotonic()) > 0:
            answers = self._opened().list_offsets(ends, request_timeout=left_s).values()
            asked = asyncio.gather(*map(asyncio.wrap_future, answers), return_exceptions=True)
            await asyncio.wait([asked], timeout=left_s)  # a client that was replaced meanwhile never answers
            if not asked.done():  # nor is it cancelled: the client would set the result all the same, and fail
                return
            errors = [native_of(answer) for answer in asked.result()]
            if not any(error is not None and error.code() in _UNLED for error in errors):
                return
            await asyncio.sleep(_FRESH_POLL_S)

    def _link(self, confirmed: bool) -> Link:
        """The producer that all senders of a kind share; a new one when it was lost."""
        link = self._links.get(confirmed)
        if link is not None and link.lost is None:
            return link
        if link is not None:
            link.close()
            if link.refused is not None:
                del self._links[confirmed]
                raise link.refused
        config = producer_config(self, confirmed=confirmed)
        link = self._links[confirmed] = Link(config, asyncio.get_running_loop(), str(self.address))
        return link

    async def open_receiver(
        self, destination: Destination[Any], group: str | None, window: int, on_revoke: spi.OnRevoke
    ) -> Receiver:
        options = self._options
        topic, count = await self._topic(destination)
        what = f"{destination}{f' group {group!r}' if group else ''} on {self.address}"
        start: list[TopicPartition] | None = None
        if not destination.settles and group is None:
            name = f"messaging-listener-{uuid4().hex}"
            start = await self._in_group(name, partial(_ends, topic, count))
        else:
            name = group_id(topic, group)
            if not destination.settles:
                await self._in_group(name, partial(_start_at_now, topic, count))
        receiver = Receiver(what, limit=None if destination.settles else options.signal_buffer)
        member = Member(
            receiver,
            self._consumer_config(name, window),
            topic,
            what,
            window=window if destination.settles else None,
            start=start,
            on_revoke=on_revoke,
            revoke_timeout_s=options.revoke_timeout_s,
        )
        self._members = [m for m in self._members if m.thread.is_alive()] + [member]
        await receiver.open(member, options.connect_timeout_s)
        return receiver

    async def open_reader(self, destination: Destination[Any], since: float | str | None) -> spi.Reader:
        if destination.tag != "topic":
            return await super().open_reader(destination, since)
        topic = topic_name(destination, self._block(destination))
        described = await self._described(self._opened(), topic)
        what = f"a replay of {destination} on {self.address}"
        reader = HistoryReader(self.config() | self.patience(), topic, str(described.topic_id), what)
        try:
            await self._when_fresh(lambda: reader.start(len(described.partitions), since), what)
        except BaseException:
            reader.let_go()
            raise
        return reader

    async def lag(self, destination: Destination[Any], group: str | None) -> int:
        if not destination.settles:
            return await super().lag(destination, group)
        topic = topic_name(destination, self._block(destination))
        count = len((await self._described(self._opened(), topic)).partitions)
        return await self._in_group(group_id(topic, group), partial(_lag, topic, count))

    def _consumer_config(self, group: str, window: int) -> dict[str, Any]:
        options = self._options
        config: dict[str, Any] = self.config() | {
            "group.id": group,
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "auto.offset.reset": "earliest",  # where a commit has expired: rather again than never
            "queued.min.messages": max(1000, 2 * window),
            "queued.max.messages.kbytes": 16_384,
            "fetch.queue.backoff.ms": 5,  # of a full queue; the default of 1 s starves what drains it in between
        }
        if options.group_protocol == "kip848":
            return config | self.patience() | {"group.protocol": "consumer"}
        session_ms = round(options.session_timeout_s * 1000)
        # a commit waits on the same connection behind the member's own JoinGroup, and that for the slowest handler
        config |= self.patience(least_s=options.revoke_timeout_s + 1)
        return config | {
            "partition.assignment.strategy": "cooperative-sticky",
            "session.timeout.ms": session_ms,
            "heartbeat.interval.ms": max(100, session_ms // 10),
        }

    def config(self) -> dict[str, Any]:
        """What every client needs to connect."""
        address, options = self.address, self._options
        config: dict[str, Any] = {
            "bootstrap.servers": ",".join(f"{_bracket(host)}:{port or 9092}" for host, port in address.hosts),
            "client.id": "messaging-sdk",
            "log_level": 0,  # what it would write to stderr comes as an error to its callback as well
            "socket.connection.setup.timeout.ms": max(1000, round(options.connect_timeout_s * 1000)),
            **_RECONNECT_MS,
        }
        if self._tls:
            files = {
                "ssl.ca.location": options.ca_file,
                "ssl.certificate.location": options.cert_file,
                "ssl.key.location": options.key_file,
            }
            config |= {key: path for key, path in files.items() if path is not None}
            config["ssl.endpoint.identification.algorithm"] = "https" if options.check_host_name else "none"
        if address.user is not None:
            config |= {
                "sasl.mechanism": options.sasl_mechanism,
                "sasl.username": address.user,
                "sasl.password": address.password or "",
            }
        protocol = ("SASL_" if address.user is not None else "") + ("SSL" if self._tls else "PLAINTEXT")
        return config | {"security.protocol": protocol}

    def patience(self, *, least_s: float = 0.0, most_s: float = _PATIENCE_S) -> dict[str, int]:
        """How long a broker may be silent until another is asked; where there is no other, the client's default."""
        wait_s = min(most_s, max(least_s, self._options.request_timeout_s)) if self._brokers > 1 else _PATIENCE_S
        return {"socket.timeout.ms": round(wait_s * 1000)}

    def _opened(self) -> AdminClient:
        if self._admin is None:
            raise ConnectError(f"{self.address}: the driver is not open")
        return self._admin

    def _block(self, destination: Destination[Any]) -> kafka.DestinationOptions:
        block = self.destinations.get(destination.name)
        return block if isinstance(block, kafka.DestinationOptions) else _NO_BLOCK


def producer_config(driver: Driver, *, confirmed: bool) -> dict[str, Any]:
    """What a producer is made with; `confirmed`: for a Queue or Topic."""
    options = cast(Options, driver.options)
    config: dict[str, Any] = driver.config() | {
        "partitioner": "murmur2_random",  # the Java client's; librdkafka's own sends keys elsewhere
        "linger.ms": 0,
        "message.max.bytes": options.max_message_bytes,
        "message.timeout.ms": round(options.send_timeout_s * 1000),
        "allow.auto.create.topics": False,  # a topic that was deleted would come back with the broker's defaults
        "topic.metadata.propagation.max.ms": 3000,  # how long a topic that is unknown may be merely new
        "compression.type": options.compression,
        **driver.patience(most_s=options.send_timeout_s / 3),
    }
    return config | ({"enable.idempotence": True} if confirmed else {"acks": 0})


def _ends(topic: str, count: int, client: Consumer) -> list[TopicPartition]:
    """The end of each partition."""
    return [TopicPartition(topic, p, end) for p, end in offsets_at(client, topic, range(count), OFFSET_END).items()]


def _commits(topic: str, count: int, client: Consumer) -> list[TopicPartition]:
    return client.committed([TopicPartition(topic, n) for n in range(count)], timeout=_ANSWER_S)


def _uncommitted(topic: str, count: int, client: Consumer) -> int:
    return sum(p.offset < 0 for p in _commits(topic, count, client))


def _missing_commits(topic: str, count: int, client: Consumer, *, makes: bool) -> int:
    """How many partitions the group has no commit for; if that is all of them, and `makes`, commit their ends.

    The ends are read before the commits are: of two programs that provision at once none then skips a message, whoever
    comes last. Kafka has no commit-if-absent.
    """
    ends = _ends(topic, count, client)
    missing = _uncommitted(topic, count, client)
    if missing < count or not makes:
        return missing
    _commit_as_stranger(ends, client)
    return _uncommitted(topic, count, client)


def _start_at_now(topic: str, count: int, client: Consumer) -> None:
    """A Signal's group keeps nothing for later: who comes first starts it anew."""
    _commit_as_stranger(_ends(topic, count, client), client)


def _commit_as_stranger(ends: list[TopicPartition], client: Consumer) -> None:
    """A group that has members refuses: it lives, and has commits of its own."""
    try:
        client.commit(offsets=ends, asynchronous=False)
    except KafkaException as error:
        native = native_of(error)
        if native is None or native.code() not in _LIVELY:
            raise


def _lag(topic: str, count: int, client: Consumer) -> int:
    """The ends are read after the commits are: what is published meanwhile counts, and nothing is counted below 0."""
    commits = _commits(topic, count, client)
    firsts, ends = (offsets_at(client, topic, range(count), moment) for moment in (OFFSET_BEGINNING, OFFSET_END))
    return sum(left_of(at, firsts[at.partition], ends[at.partition]) for at in commits)


def left_of(committed: TopicPartition, first: int, end: int) -> int:
    """How many offsets of a log from `first` to before `end` a group has yet to settle. Raises KafkaException."""
    if committed.error is not None:
        raise KafkaException(committed.error)
    start = max(committed.offset, first)  # without a commit, or with one that retention overtook: from the log's start
    ahead = ahead_of(committed.offset, committed.metadata)
    return max(0, end - start) - sum(start <= offset < end for offset in ahead)


def _bracket(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _end(threads: Iterable[Any], admin: Any) -> None:
    """On a thread of its own: a client's end joins the client's threads."""
    if admin is not None:
        admin.__exit__(None, None, None)  # it has no `close`
    for thread in threads:
        thread.join(1.0)
