"""What can be configured, what a destination is called on the service, and what is promised for it."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from messaging_sdk.capabilities import Capabilities, HeaderRules, Level
from messaging_sdk.config import Seconds
from messaging_sdk.destination import Destination
from messaging_sdk.errors import InvalidDestination

MAX_NAME: Final = 80
"""Characters of a queue's name, `.fifo` included (SQS quotas page)."""
MAX_TOPIC_NAME: Final = 256
MAX_MESSAGE: Final = 1 << 20
"""Bytes of a message with its attributes, and of a whole batch request (SQS quotas page); emulators take more."""
MAX_SNS_MESSAGE: Final = 1 << 18
"""The same for SNS (SNS quotas page)."""
ATTRIBUTE_ROOM: Final = 64 << 10
"""Kept for our one attribute: 8 KiB of headers, each character of which JSON may write as six."""
MAX_DELAY_S: Final = 900
MAX_VISIBILITY_S: Final = 12 * 3600
"""From its receipt on a message can be kept invisible for this long, extensions included."""
HOLD_S: Final = 11 * 3600.0
DEDUP_S: Final = 300.0
HEADERS: Final = HeaderRules(max_count=1000, max_bytes=8192)
GROUP_MARK: Final = "___"
"""Between a Topic's name and a group: `__` is a '.', and no word begins with '_'."""


class Options(BaseModel):
    """Keys of a `[backends.x]` table, or of the URL's query. Region, profile, role and credentials that are not given
    are found by boto3's own rules (environment, ~/.aws, container and instance roles)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    endpoint: str | None = Field(None, pattern=r"^https?://[^\s@]+$")
    """URL of the service where it is not the region's own: a VPC endpoint, an emulator."""
    sns_endpoint: str | None = Field(None, pattern=r"^https?://[^\s@]+$")
    """The same for SNS; `endpoint` where absent."""
    profile: str | None = None
    """A profile of ~/.aws/config; it may name a role to assume."""
    session_token: str | None = Field(None, repr=False)
    """Belongs to temporary credentials in the URL."""
    ca_file: str | None = None
    """PEM of the authorities to trust instead of the client's own."""
    visibility_timeout_s: int = Field(30, ge=1, le=MAX_VISIBILITY_S)
    """The lease, in whole seconds. Shorter: quicker take-over after a crash, more requests to extend it."""
    wait_s: int = Field(1, ge=1, le=20)
    """How long a poll waits for a message. Longer: fewer paid empty replies, but a receiver ends only when its polls
    have; above 2 a stopping process may leave messages invisible for a lease."""
    max_polls: int = Field(4, ge=1, le=100)
    """Most polls that a receiver has under way, of 10 messages each. One while there is little to fetch."""
    request_threads: int = Field(16, ge=2, le=200)
    """Most requests at once beside the polls, of all senders and receivers of this backend together."""
    send_requests: int = Field(4, ge=1, le=100)
    """Most requests at once of one sender."""
    connect_timeout_s: Seconds = Field(5.0, gt=0)
    request_timeout_s: Seconds = Field(10.0, gt=0)
    """Longest silence of the service within one request; a send is indeterminate then."""
    topics: Literal["fanout", "sns"] = "fanout"
    """How a Topic reaches its groups: the sender stores one copy for each, or SNS does."""
    retention_s: Seconds = Field(14 * 86400.0, ge=60, le=14 * 86400)
    """What a queue made here keeps its messages for; SQS's own default is 4 days."""
    max_deliveries: int = Field(20, ge=1)
    """The largest `max_deliveries` of your handlers: a redrive policy of a queue must allow as many receipts."""


class DestinationOptions(BaseModel):
    """Keys of a `[destinations.y] sqs = {...}` block."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    address: str | None = Field(None, pattern=r"^[A-Za-z0-9_-]+$")
    """Name on the service instead of prefix and destination; `.fifo` and groups are still appended."""
    topics: Literal["fanout", "sns"] | None = None
    """As in the backend's table, for this Topic."""
    retention_s: Seconds | None = Field(None, ge=60, le=14 * 86400)


def physical_name(prefix: str, destination: Destination[object], block: DestinationOptions, group: str | None) -> str:
    """The queue of a Queue or of one group of a Topic; without a group a Topic's SNS topic."""
    name = block.address or prefix + _word(destination.name)
    if group is not None:
        name += GROUP_MARK + _word(group)
    return f"{name}.fifo" if destination.ordered else name


def check_physical(destination: Destination[object], name: str, limit: int) -> None:
    """Raise InvalidDestination if the service would refuse `name` for its length."""
    if len(name) > limit:
        raise InvalidDestination(
            f"{destination}: the SQS name {name[:40]}... has {len(name)} characters and may have {limit} ('.' is "
            "written '__'); use a shorter destination, group or prefix, or give the destination an `address`"
        )


def _word(name: str) -> str:
    return name.replace(".", "__")


def max_message(sns: bool) -> int:
    """Bytes of one message with its attributes."""
    return MAX_SNS_MESSAGE if sns else MAX_MESSAGE


_NOTES: Final = {
    "lease_s": "option visibility_timeout_s",
    "hold_s": "SQS keeps a message invisible for at most 12 h, extensions included",
    "release": "ChangeMessageVisibility: in whole seconds, rounded up",
    "count": "ApproximateReceiveCount",
    "lag": "approximate, and may be late by a minute or more (GetQueueAttributes, SQS API reference)",
    "ttl": "SQS has retention per queue, none per message",
    "priority": "SQS has none; use a queue for each",
    "max_body": "1 MiB with attributes; a body that is no plain text travels as base64",
    "headers": "in one message attribute, as JSON: SQS allows ten",
}
_STANDARD: Final = {
    "order": "best effort on a standard queue; ordered=True makes it a FIFO queue",
    "dedup_s": "FIFO queues only: ordered=True",
    "delay": "DelaySeconds: at most 900, in whole seconds, rounded up",
}
_FIFO: Final = {
    "order": "per message group, which is the key",
    "dedup_s": "MessageDeduplicationId is the message id",
    "delay": "a FIFO queue has no delay per message",
    "release": "the message's group waits until it is back; in whole seconds, rounded up",
}
_AWS: Final = {
    "ok_means": "stored redundantly in several availability zones before the answer (SQS developer guide)",
    "durable": "the service is not yours to kill: cited, not measured",
}
_ELSEWHERE: Final = {
    "ok_means": "what answers at `endpoint` is not Amazon's: emulators keep messages in memory",
    "durable": "what answers at `endpoint` is not Amazon's: emulators keep messages in memory",
}
_FANOUT: Final = 'the sender stores one copy for each declared group, ok when all are stored; topics = "sns" is native'
_SNS: Final = {
    "confirm": "SNS has it, and hands it to the queues by itself, in a moment and for days (SNS developer guide)",
    "delay": "SNS has no delay",
    "max_body": "256 KiB with attributes; a body that is no plain text travels as base64",
}
NO_SIGNAL: Final = (
    "a backend with transient delivery (NATS, RabbitMQ, ZeroMQ): SQS stores every message, may hand it out twice, "
    "and no queue goes away with its listener"
)


def promises(destination: Destination[object], options: Options, *, sns: bool, aws: bool) -> Capabilities:
    """What is kept for `destination`; `aws` = the real service answers, `sns` = a Topic goes through SNS."""
    if not destination.settles:
        return Capabilities(notes={"tag": NO_SIGNAL})
    ordered, topic = destination.ordered, destination.tag == "topic"
    notes = _NOTES | (_FIFO if ordered else _STANDARD) | (_SNS if sns else {}) | (_AWS if aws else _ELSEWHERE)
    levels = {} if ordered else {"order": Level.BEST_EFFORT}
    if topic and not sns:
        levels |= dict.fromkeys(("groups", "confirm", "batch"), Level.EMULATED)
        notes |= dict.fromkeys(("groups", "confirm", "batch"), _FANOUT)
    return Capabilities(
        settle="individual",
        release="delay",
        lease="timeout",
        lease_s=float(options.visibility_timeout_s),
        hold_s=HOLD_S,
        count="exact",
        backlog=True,
        order="publisher" if ordered else "none",
        order_redelivery=ordered,
        order_competition=ordered,
        compete="demand",
        groups="durable" if topic else "none",
        lag="unsettled",
        confirm="stored",
        route_error=True,
        durable="kill" if aws else "none",
        dedup_s=DEDUP_S if ordered else 0.0,
        batch="entries",
        delay=not ordered and not sns,
        max_body=(max_message(sns) - ATTRIBUTE_ROOM) // 4 * 3,
        headers=HEADERS,
        window=True,
        ok_means="quorum" if aws else "memory",
        levels=levels,
        notes=notes,
    )
