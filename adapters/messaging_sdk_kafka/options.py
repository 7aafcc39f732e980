"""What can be configured, what a destination is called on the broker, and what is promised for it."""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from messaging_sdk.capabilities import Capabilities, HeaderRules, Level
from messaging_sdk.config import Seconds, TlsFiles
from messaging_sdk.destination import Destination
from messaging_sdk.errors import InvalidDestination

MAX_NAME: Final = 249
"""Longest name of a topic (org.apache.kafka.common.internals.Topic); a group has no limit of its own."""
PARTITIONS: Final = 12
"""More than most groups have members, and 2, 3, 4, 6 or 12 members share them evenly. It cannot be lowered later, and
raising it moves keys."""
QUEUE_GROUP: Final = "workers"
MESSAGE_ROOM: Final = 16 << 10
"""Of max_message_bytes: 8 KiB of user headers with their lengths, ids, key, and what a batch of one costs."""
HEADERS: Final = HeaderRules(max_count=1000, max_bytes=8192)


class Options(TlsFiles):
    """Keys of a `[backends.x]` table, or of the URL's query. User and password belong into the URL."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    group_protocol: Literal["classic", "kip848"] = "classic"
    """kip848: the group protocol of Kafka 4, which moves only what must move; a server without it is refused."""
    connect_timeout_s: Seconds = Field(10.0, gt=0)
    """Longest wait for the cluster, and for a group to let a receiver in."""
    session_timeout_s: Seconds = Field(30.0, ge=1)
    """A member that died is noticed after this time. classic only: with kip848 the server decides it
    (group.consumer.session.timeout.ms)."""
    revoke_timeout_s: Seconds = Field(10.0, gt=0)
    """How long handlers of a partition that goes to another member may take to end; the group waits for them."""
    request_timeout_s: Seconds = Field(6.0, ge=1)
    """A broker of several that leaves a request unanswered for this long is taken for gone, and its partitions' new
    leaders are asked: one that froze or lost its power keeps its connections open. Sends wait a third of send_timeout_s
    at most, so that there is time to send again; members of classic groups revoke_timeout_s and a second at least."""
    send_timeout_s: Seconds = Field(20.0, ge=1)
    """A message without an answer from the broker is given up as indeterminate after this time."""
    partitions: int = Field(PARTITIONS, ge=1)
    """Of topics made here."""
    replication_factor: int | None = Field(None, ge=1)
    """Of topics made here; the broker's default.replication.factor when absent."""
    retention_s: Seconds = Field(7 * 86400.0, ge=1)
    """How long topics made here keep messages, settled or not."""
    max_message_bytes: int = Field(1_000_000, ge=32_768)
    """The broker's message.max.bytes (1 MiB by default): for body, key and headers together."""
    compression: Literal["none", "gzip", "snappy", "lz4", "zstd"] = "none"
    signal_buffer: int = Field(65_536, ge=1)
    """Messages that wait in a Signal listener; more are dropped, the oldest first, and counted."""
    tls: bool = False
    """TLS with a `kafka://` URL too."""
    check_host_name: bool = True
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "PLAIN"
    """How the URL's user proves itself. PLAIN shows the password to whoever answers: use TLS with it."""


class DestinationOptions(BaseModel):
    """Keys of a `[destinations.y] kafka = {...}` block. What is set is compared with a topic that exists."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    address: str | None = Field(None, pattern=r"^[A-Za-z0-9._-]{1,249}$")
    """The topic outright."""
    partitions: int | None = Field(None, ge=1)
    replication_factor: int | None = Field(None, ge=1)
    retention_s: Seconds | None = Field(None, ge=1)


def topic_name(destination: Destination[Any], options: BaseModel | None) -> str:
    """The topic. Raises InvalidDestination.

    `_` is doubled: Kafka refuses a topic `a_b` beside `a.b`, because both have the same name in its metrics.
    """
    address = options.address if isinstance(options, DestinationOptions) else None
    name = address or destination.name.replace("_", "__")
    if len(name) > MAX_NAME:
        raise InvalidDestination(
            f"Kafka topic {name[:60]!r}... has {len(name)} characters and may have {MAX_NAME}; "
            "use a shorter destination name, or give it an `address`"
        )
    return name


def group_id(topic: str, group: str | None) -> str:
    """A group reads one topic only: members of one group id that subscribe to different topics disturb each other.

    No topic has a colon in its name, so no two pairs give the same id.
    """
    return f"{topic}:{group or QUEUE_GROUP}"


_NOTES: Final = {
    "settle": "the committed offset, and beside it in the commit's metadata what is settled ahead of it",
    "release": "a partition has no way back for one message: hold it (retry), or close the receiver",
    "lease": "membership of the group: a closed or cut receiver gives up at once, a killed one is noticed after "
    "session_timeout_s",
    "hold_s": "a partition stalls at 16,384 messages behind an unsettled one",
    "count": "Kafka counts no deliveries",
    "order": "a partition is a sequence, several are not: give the destination a key and ordered=True, or partitions=1",
    "order_redelivery": "per partition only: ordered=True",
    "order_competition": "per partition only: ordered=True",
    "compete": "partitions are dealt to the members; one that works slowly keeps those it has",
    "replay": "for retention_s, by the messages' own times in milliseconds",
    "lag": "offsets behind the group's commits, less those that the commits note as settled; offsets that carry no "
    "message (compacted, aborted, a transaction's marks) count until the group has passed them",
    "durable": "in the page cache of the replicas in sync; min.insync.replicas and replication_factor say of how many",
    "ok_means": "acks=all: in the page cache of all replicas in sync (kafka.apache.org, design, replication)",
    "dedup_s": "the idempotent producer removes its own repeats only",
    "ttl": "a topic has one retention for all its messages",
    "delay": "Kafka has no delayed messages",
    "priority": "Kafka has no priorities",
    "max_body": "raise message.max.bytes on the broker or topic, and max_message_bytes here",
}


def promises(destination: Destination[Any], options: Options, partitions: int) -> Capabilities:
    """What is kept for `destination` on a topic of `partitions`."""
    max_body = options.max_message_bytes - MESSAGE_ROOM
    alone = partitions == 1
    if not destination.settles:
        return Capabilities(
            order="publisher" if alone else "none",
            compete="none" if alone else "round_robin",
            groups="live",
            batch="entries",
            max_body=max_body,
            headers=HEADERS,
            notes={k: _NOTES[k] for k in ("order", "compete", "max_body", "ttl", "delay", "priority")}
            | {"ok_means": "handed to the socket (acks=0)"},
        )
    in_order = destination.ordered or alone
    return Capabilities(
        settle="individual",
        lease="membership",
        backlog=True,
        order="publisher" if in_order else "none",
        order_redelivery=in_order,
        order_competition=in_order,
        compete="standby" if alone else "round_robin",
        groups="durable" if destination.tag == "topic" else "none",
        replay=destination.tag == "topic",
        lag="unsettled",
        confirm="stored",
        route_error=True,
        durable="kill",
        batch="entries",
        max_body=max_body,
        headers=HEADERS,
        window=True,
        ok_means="page_cache",
        levels={"settle": Level.EMULATED},
        notes=_NOTES,
    )
