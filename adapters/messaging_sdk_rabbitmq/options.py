"""What can be configured, and what a destination is called on the broker."""

from __future__ import annotations

from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field

from messaging_sdk.capabilities import Capabilities, HeaderRules
from messaging_sdk.config import TlsFiles
from messaging_sdk.destination import Destination
from messaging_sdk.errors import InvalidDestination

MAX_NAME_BYTES: Final = 255
"""AMQP 0-9-1's short string: no queue, exchange or routing key is longer."""
SIGNALS: Final = "amq.direct"
"""The exchange of all signals: the broker's own, so that a signal needs no provisioning and leaves nothing behind."""


class Options(TlsFiles):
    """Keys of a `[backends.x]` table, or of the URL's query."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    heartbeat_s: int = Field(30, ge=1, le=3600)
    """A silent peer is given up after this time plus 5 s."""
    connect_timeout_s: float = Field(10.0, gt=0)
    """For name lookup, TCP, TLS and AMQP handshake together."""
    max_body: int = Field(16 * 1024 * 1024, gt=0)
    """The broker's `max_message_size` (16 MiB by default since RabbitMQ 4.0: rabbitmq.com/docs/configure)."""
    consumer_timeout_s: float = Field(1800.0, gt=0)
    """The broker's `consumer_timeout` (30 min by default): it takes a delivery back that is not settled by then."""
    signal_buffer: int = Field(10_000, ge=1)
    """Most signals that wait in a listener, and in its queue; beyond, the oldest are dropped."""
    signal_group_expires_s: float = Field(60.0, ge=1)
    """A signal group's queue that nobody uses goes away after this time."""
    server_name: str | None = None
    """The name that the server's certificate must have, where it is not the URL's host. amqps only, as the files."""


class DestinationOptions(BaseModel):
    """Keys of a `[destinations.y] rabbitmq = {...}` block."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    address: str | None = Field(None, min_length=1)
    """Name on the broker instead of the destination's."""
    max_length: int | None = Field(None, ge=1)
    """Most messages in each queue; a publish beyond is refused with Backpressure (x-overflow = reject-publish)."""
    quorum_size: int | None = Field(None, ge=1)
    """Members of each quorum queue when it is made (x-quorum-initial-group-size); the broker's default is 3."""


def physical_name(destination: Destination[Any], options: BaseModel | None) -> str:
    """The queue of a Queue, the exchange of a Topic, the routing key of a Signal."""
    address = options.address if isinstance(options, DestinationOptions) else None
    name = address or destination.name
    return name if destination.settles else f"signal.{name}"


def queue_name(name: str, group: str | None) -> str:
    """The queue of one group. No name may contain ':', so these never meet the queue of a Queue."""
    return name if group is None else f"{name}:{group}"


def check_physical(kind: str, name: str) -> None:
    """Raise InvalidDestination if RabbitMQ would refuse `name`."""
    size = len(name.encode())
    if size > MAX_NAME_BYTES:
        raise InvalidDestination(
            f"RabbitMQ {kind} {name[:60]!r}... has {size} bytes and may have {MAX_NAME_BYTES}; "
            "use a shorter destination or group name, or give it an `address`"
        )
    if name.startswith("amq."):
        raise InvalidDestination(
            f"RabbitMQ {kind} {name!r}: names that begin with 'amq.' belong to the broker; "
            "use another name, or give the destination an `address`"
        )


def arguments_of(destination: Destination[Any], options: BaseModel | None) -> dict[str, Any]:
    """Arguments of the quorum queues behind a Queue or Topic.

    Without the delivery limit of -1, RabbitMQ 4 drops a message after 20 returns (rabbitmq.com/docs/quorum-queues).
    """
    found: dict[str, Any] = {"x-queue-type": "quorum", "x-delivery-limit": -1}
    if destination.ordered:
        found["x-single-active-consumer"] = True
    if isinstance(options, DestinationOptions):
        if options.max_length is not None:
            found |= {"x-max-length": options.max_length, "x-overflow": "reject-publish"}
        if options.quorum_size is not None:
            found["x-quorum-initial-group-size"] = options.quorum_size
    return found


HEADERS: Final = HeaderRules(max_count=1000, max_bytes=100_000)
"""They travel in one frame of 128 KiB, with 6 bytes each for lengths, our ids, and room for the broker's x-death."""

_NOTES: Final = {
    "release": "basic.nack(requeue); no delay: RabbitMQ has none before 4.3",
    "count": "x-acquired-count (4.3) or x-delivery-count (4.0), plus 1: every hand-out counts, a hand-back too",
    "hold_s": "the broker's consumer_timeout less a margin; raise it there and as consumer_timeout_s here",
    "lag": "message-count of a passive queue.declare: messages ready to be handed out (AMQP 0-9-1); what is in a "
    "consumer's window is not counted",
    "ttl": "per-message expiration: an expired message is dropped when it gets to the head of its queue",
    "delay": "RabbitMQ has no delayed publish without a plugin",
    "priority": "quorum queues have two levels on 4.0 and 32 on 4.3, and they break order",
    "max_body": "max_message_size is 16 MiB by default since 4.0; raise it there and as max_body here",
    "ok_means": "written and fsynced by a majority of the queue's members, on one node by that node "
    "(rabbitmq.com/docs/quorum-queues)",
    "durable": "a queue must be older than a second: 4.3.6 lost one that was declared 0.3 s before SIGKILL",
    "headers": "a name has at most 255 bytes; CC, BCC and the broker's own x- names are refused",
    "route_error": "of a Topic whose exchange was deleted only the last message in flight is surely not stored",
    "dedup_s": "RabbitMQ has no deduplication without a plugin",
}
_ORDERED_NOTES: Final = {
    "release": "a requeued message comes back behind later ones; closing the receiver hands back in order",
    "compete": "one consumer is active, the others stand by (x-single-active-consumer)",
}


def promises(destination: Destination[Any], options: Options) -> Capabilities:
    """What is kept for `destination`. A Signal promises little: it goes to who listens, at most once."""
    if not destination.settles:
        notes = {
            "ok_means": "in the socket's buffer",
            "compete": "in a group the broker deals in turn",
            "headers": _NOTES["headers"],
            "max_body": _NOTES["max_body"],
        }
        return Capabilities(
            order="publisher",
            compete="round_robin",
            groups="live",
            batch="entries",
            max_body=options.max_body,
            headers=HEADERS,
            notes=notes,
        )
    ordered, is_topic = destination.ordered, destination.tag == "topic"
    timeout_s = options.consumer_timeout_s
    return Capabilities(
        settle="individual",
        release="none" if ordered else "now",
        lease="connection",
        hold_s=timeout_s - min(300.0, timeout_s / 6),  # the broker looks once a minute
        count="exact",
        backlog=True,
        order="publisher",
        order_redelivery=ordered,
        order_competition=ordered,
        compete="standby" if ordered else "demand",
        groups="durable" if is_topic else "none",
        lag="waiting",
        confirm="stored",
        route_error=not is_topic or bool(destination.groups),
        durable="kill",
        batch="entries",
        ttl=True,
        max_body=options.max_body,
        headers=HEADERS,
        window=True,
        ok_means="fsync",
        notes=_NOTES | _ORDERED_NOTES if ordered else _NOTES,
    )
