"""What travels and what arrives: `Outgoing` towards a broker, `Message` and `Delivery` from it.

Plain slotted classes: one is made per message on the hot path, where a slotted class costs 0.2 us, a frozen
dataclass 0.9 and a pydantic model more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from .errors import MessagingError, Outcome, UsageError

if TYPE_CHECKING:
    from .consumer import Settler

T = TypeVar("T")

RESERVED_PREFIX: Final = "messaging-"
"""Header names with this prefix belong to the SDK (key, dead-letter provenance); users' ones are refused."""

NO_HEADERS: Final[Mapping[str, str]] = {}


class Outgoing:
    """One encoded message on its way to a Sender. Read-only for adapters.

    `body` is bytes (never mutated by the SDK, copied from mutable buffers), `id` unique per message and kept when it
    is sent again, `key` the ordering key or None. `headers` are the user's plus the SDK's own reserved ones, str to
    str, already checked against `Capabilities.headers`. `delay_s`, `ttl_s` and `priority` are None unless asked for;
    an adapter that does not declare the capability answers REJECTED with CapabilityError, it never ignores them.
    """

    __slots__ = (
        "body", "content_type", "correlation_id", "created_s", "deadline_s", "delay_s", "headers", "id", "key",
        "maybe_stored", "priority", "ttl_s", "waiter",
    )  # fmt: skip

    def __init__(
        self,
        body: bytes,
        id: str,
        key: str | None = None,
        headers: Mapping[str, str] = NO_HEADERS,
        content_type: str | None = None,
        correlation_id: str | None = None,
        created_s: float = 0.0,
        *,
        delay_s: float | None = None,
        ttl_s: float | None = None,
        priority: int | None = None,
    ) -> None:
        self.body = body
        self.id = id
        self.key = key
        self.headers = headers
        self.content_type = content_type
        self.correlation_id = correlation_id
        self.created_s = created_s
        self.delay_s = delay_s
        self.ttl_s = ttl_s
        self.priority = priority
        # core's part; adapters never touch it
        self.waiter: Any = None
        self.deadline_s = 0.0
        self.maybe_stored = False


class SendResult:
    """What became of one message of a batch: an outcome, and the error unless it is OK.

    `error.transient` tells core whether sending again may help. OK without a position is the shared constant `SENT`,
    so that a batch of them costs no allocation.
    """

    __slots__ = ("error", "outcome", "position")

    def __init__(self, outcome: Outcome, error: MessagingError | None = None, position: str | None = None) -> None:
        self.outcome = outcome
        self.error = error
        self.position = position


SENT: Final = SendResult(Outcome.OK)


def rejected(error: MessagingError) -> SendResult:
    """The result of a message that is surely not stored."""
    error.outcome = Outcome.REJECTED
    return SendResult(Outcome.REJECTED, error)


def indeterminate(error: MessagingError) -> SendResult:
    """The result of a message that may be stored."""
    error.outcome = Outcome.INDETERMINATE
    return SendResult(Outcome.INDETERMINATE, error)


@dataclass(slots=True)
class Sent:
    """What `publish` returns: the message was accepted as the backend's `ok_means` says.

    `position` is the broker's own coordinate (a stream sequence, say) or None.
    """

    id: str
    position: str | None = None


class Session:
    """What a receiver owns for a while: a connection, a partition of one assignment, a single-active slot.

    The adapter sets the flags; core reads them before a worker starts: `closing` = start nothing more,
    `lost` = settle nothing more.
    """

    __slots__ = ("closing", "lost", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.closing = False
        self.lost = False


@dataclass(frozen=True, slots=True)
class Meta:
    """The part of an arrived message that most handlers never look at, decoded on first use."""

    headers: Mapping[str, str] = field(default_factory=lambda: NO_HEADERS)
    content_type: str | None = None
    correlation_id: str | None = None
    created_s: float | None = None
    id: str = ""
    """Where an adapter finds the message's id among all this; `Message.id` is then decoded on first use, too."""


NO_META: Final = Meta()


class Message(Generic[T]):
    """One arrived message, without settlement: what a `Signal` yields.

    `data` is the decoded value, `body` the bytes as they came. `id` is the publisher's message id, or one made up by
    the adapter for a foreign message that has none. `headers` are exactly the publisher's.
    """

    __slots__ = ("_id", "_meta", "body", "data", "key")

    data: T

    def __init__(
        self,
        body: bytes,
        id: str | None,
        key: str | None = None,
        meta: Meta | Callable[[], Meta] = NO_META,
    ) -> None:
        """`id` None: it is `meta`'s."""
        self.body = body
        self._id = id
        self.key = key
        self._meta = meta

    @property
    def id(self) -> str:
        """The publisher's message id, or the adapter's for a foreign message."""
        id = self._id
        if id is None:
            id = self._id = self.meta.id
        return id

    @property
    def meta(self) -> Meta:
        """All that arrived beside the body, the SDK's own headers included; decoded on first use."""
        meta = self._meta
        if not isinstance(meta, Meta):
            meta = self._meta = meta()
        return meta

    @property
    def headers(self) -> Mapping[str, str]:
        """The publisher's headers, without the SDK's own. May be empty."""
        return {k: v for k, v in self.meta.headers.items() if not k.startswith(RESERVED_PREFIX)}

    @property
    def provenance(self) -> Mapping[str, str]:
        """The SDK's own headers with their prefix cut: on a dead letter `reason`, `error`, `source`, `attempts`..."""
        n = len(RESERVED_PREFIX)
        return {k[n:]: v for k, v in self.meta.headers.items() if k.startswith(RESERVED_PREFIX)}

    @property
    def content_type(self) -> str | None:
        """The publisher's content type; None for a foreign message without one."""
        return self.meta.content_type

    @property
    def correlation_id(self) -> str | None:
        """What ties messages of one conversation together; None if the publisher gave none."""
        return self.meta.correlation_id

    @property
    def created_s(self) -> float | None:
        """When it was published, seconds since the epoch by the publisher's clock; None if unknown."""
        return self.meta.created_s

    def __repr__(self) -> str:
        return f"{type(self).__name__}(id={self.id!r}, key={self.key!r}, {len(self.body)} bytes)"


class Delivery(Message[T]):
    """One arrival of a message on a Queue or Topic, to be settled once.

    `attempt` counts handler runs in this hold, from 1. `deliveries` is the broker's own count from 1, or None where
    the backend has none (`Capabilities.count`); `redelivered` is its flag, or None. In pull style settle with exactly
    one of `ack`, `retry`, `reject`, `release`; handlers return or raise instead.
    """

    __slots__ = (
        "attempt", "deliveries", "native", "receipt", "redelivered", "session", "settled", "settler",
    )  # fmt: skip

    def __init__(
        self,
        body: bytes,
        id: str | None,
        key: str | None = None,
        meta: Meta | Callable[[], Meta] = NO_META,
        *,
        receipt: Any = None,
        session: Session,
        deliveries: int | None = None,
        redelivered: bool | None = None,
        native: Any = None,
    ) -> None:
        self.body = body
        self._id = id
        self.key = key
        self._meta = meta
        self.receipt = receipt
        self.session = session
        self.deliveries = deliveries
        self.redelivered = redelivered
        self.native = native
        # core's part; adapters never touch it
        self.attempt = 1
        self.settled = False
        self.settler: Settler | None = None

    async def ack(self) -> None:
        """Settle: done. Returns when the broker's answer is known, or at once where it never answers.

        Raises SettleLost if the delivery is no longer ours (it will come again), AlreadySettled on a second call.
        """
        await self._owner().ack(self)

    async def retry(self, after_s: float = 0.0) -> None:
        """Hold it and yield it again after `after_s` seconds with `attempt` one higher. Its key waits if ordered."""
        await self._owner().retry(self, after_s)

    async def reject(self, reason: str) -> None:
        """Give up on it: `on_failure` of the stream decides (dead letter by default)."""
        await self._owner().reject(self, reason)

    async def release(self) -> None:
        """Hand it back to the broker, costing no attempt. CapabilityError where the backend cannot."""
        await self._owner().release(self)

    def _owner(self) -> Settler:
        if self.settler is None:
            raise UsageError("this delivery does not come from a stream: it is settled by its handler")
        return self.settler
