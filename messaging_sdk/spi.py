"""The driver interface: lists in, one outcome per element out.

An adapter implements `Driver`, `Sender` and `Receiver` and nothing else. It never retries (provisioning's wait for a
fresh topic aside), never sleeps for back-off, never logs payloads, never runs user code, never reconnects by itself,
and imports no middleware and no other adapter. It translates every native error through one table. Core owns
batching, windows, lanes, retry, dead letters, deadlines and reconnection.

One connection, one life: a Sender or Receiver lives on one connection. When that is lost, its pending sends resolve
INDETERMINATE, and every later call raises ConnectionLost, for ever. Core opens a new one.

All coroutines run on the loop that opened the driver; core never calls one object's method concurrently with itself
unless it is said below. Core bounds every call by a deadline of its own, by cancelling it: each must be cancellable.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from asyncio import Future
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, ClassVar, Final, Literal, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict

from .capabilities import Capabilities
from .config import Address
from .destination import Destination
from .errors import CapabilityError, MessagingError, Unmet
from .model import SENT, Delivery, Message, Outgoing, SendResult, Session

Provision = Literal["create", "verify", "none"]


class Disposition:
    """How a delivery is settled on the broker. ACCEPT is mandatory; RELEASE only where `Capabilities.release` says."""

    __slots__ = ("delay_s", "kind")

    def __init__(self, kind: Literal["accept", "release"], delay_s: float = 0.0) -> None:
        self.kind: Final = kind
        self.delay_s: Final = delay_s


ACCEPT: Final = Disposition("accept")
RELEASE: Final = Disposition("release")
"""Hand back at once, uncounted where the broker can."""

Outcomes = Sequence[tuple[int, SendResult]]
OnOutcomes = Callable[[Outcomes], None]
OnRevoke = Callable[[Sequence[Session], float], Awaitable[None]]
_ACCEPTED: Final[Outcomes] = tuple((index, SENT) for index in range(1000))


def accepted(start: int, stop: int) -> Outcomes:
    """The outcomes of a run of messages that are all OK, from index `start` up to before `stop`."""
    if stop <= len(_ACCEPTED):
        return _ACCEPTED[start:stop]  # nothing is allocated per message
    return [(index, SENT) for index in range(start, stop)]


class NoOptions(BaseModel):
    """An adapter without options of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Driver(ABC):
    """One backend: an address, its options, and what can be opened on it."""

    name: ClassVar[str]
    """The adapter's name, as in `[destinations.x] <name> = {...}` and in the matrix: "rabbitmq"."""
    client: ClassVar[str]
    """Distribution of the client library, for the evidence: "pika"."""
    brokerless: ClassVar[bool] = False
    """Senders and receivers speak with many peers directly, and outlive the loss of one of them: the deliveries of its
    `Session` are lost (`on_revoke` with deadline 0), everything else goes on; ConnectionLost only after close."""
    Options: ClassVar[type[BaseModel]] = NoOptions
    """Model of a `[backends.x]` table's own keys and of the URL's query; extra = forbid."""
    DestinationOptions: ClassVar[type[BaseModel]] = NoOptions
    """Model of a `[destinations.y] <name>` block; extra = forbid."""

    def __init__(self, address: Address, options: BaseModel, destinations: Mapping[str, BaseModel]) -> None:
        """No I/O. `options` is an `Options`; `destinations` maps a destination's name to its `DestinationOptions`.

        Raises ConfigError for an address this adapter cannot use.
        """
        self.address = address
        self.options = options
        self.destinations = destinations

    @abstractmethod
    def capabilities(self, destination: Destination[Any]) -> Capabilities:
        """The promises for `destination`. Plain, no I/O: before `open` what the options allow; after it narrowed to
        what the live server has. For a tag that this backend refuses: `Capabilities()` with `notes["tag"]` set to the
        reason and the remedy; core turns that into a CapabilityError."""

    @abstractmethod
    def check(self, destination: Destination[Any]) -> None:
        """Raise InvalidDestination if a physical name made of `destination` (with each of its groups) is not allowed,
        naming the physical name, the limit and the next step. No I/O."""

    @abstractmethod
    async def open(self) -> None:
        """Connect, and fail on anything that will not work later: ConnectError, AuthError, ConfigError."""

    @abstractmethod
    async def provision(self, destinations: Sequence[Destination[Any]], mode: Provision) -> None:
        """Make (create), or only check (verify), all that `destinations` and their groups need; "none" does nothing.

        Idempotent; concurrent calls of several processes are safe. Raises NotFound (verify: absent), ConfigError (it
        exists with other properties: which, found, wanted), CapabilityError, AuthError. Signals need nothing.
        """

    @abstractmethod
    async def open_sender(self, destination: Destination[Any]) -> Sender:
        """A sender that is ready. Raises ConnectError, NotFound. Reconnects the driver if its connection was lost."""

    @abstractmethod
    async def open_receiver(
        self, destination: Destination[Any], group: str | None, window: int, on_revoke: OnRevoke
    ) -> Receiver:
        """A receiver that is listening: a message published after this returns reaches it (or its group).

        `window` is the most unsettled deliveries it ever hands out. `on_revoke(sessions, deadline_s)` is called by the
        adapter on the opener's loop before it gives up `sessions`; deadline 0 = already lost.
        """

    async def open_reader(self, destination: Destination[Any], since: float | str | None) -> Reader:
        """A reader of what Topic `destination` stores now, where `Capabilities.replay` says so; core asks nowhere else.

        It begins at `since`: None = the oldest message, a number = the first one that was stored at that time (seconds
        since the epoch, by the backend's times) or later, a text = a `Reader.position` of the same destination. Raises
        OutOfRange for a position whose next message is no longer stored, UsageError for one that is none, NotFound.
        """
        remedy = "a backend that keeps what its groups have settled"
        raise CapabilityError([Unmet(destination.name, "replay", self.name, remedy)])

    async def lag(self, destination: Destination[Any], group: str | None) -> int:
        """How many messages Queue `destination`, or the `group` of a Topic, has yet to handle, counted as
        `Capabilities.lag` says; core asks only where it says so. It is asked of the backend at each call, beside
        senders and receivers, changes nothing there, and may be called concurrently with itself.

        Raises NotFound, ConnectError, ConnectionLost. Reconnects the driver if its connection was lost.
        """
        raise CapabilityError([Unmet(destination.name, "lag", self.name, "a backend that counts what it stores")])

    @abstractmethod
    async def close(self) -> None:
        """Close all connections. Idempotent, never raises for a broken one; ends promptly when cancelled."""

    def server(self) -> str:
        """Name and version of the live server, as it says itself: "RabbitMQ 4.3.6". Empty before `open`."""
        return ""

    def native(self) -> object:
        """The client library's connection object, for what the portable interface does not have."""
        return None


class Sender(ABC):
    """Puts messages of one destination on the wire, in call order."""

    max_batch: int = 500
    """Most messages that one `send_batch` takes; core cuts."""
    max_batch_bytes: int = 1 << 20
    """Most body bytes that one `send_batch` takes, unless it is a single message; core cuts."""
    max_in_flight: int = 2
    """Most batches without all outcomes that core keeps. More than 2 gained nothing in measurements."""

    @abstractmethod
    def send_batch(self, messages: Sequence[Outgoing], on_outcomes: OnOutcomes) -> None:
        """Take the whole batch before returning; never blocks; call order = wire order.

        `on_outcomes` is called on the opener's loop with chunks of (index in `messages`, result) as they are known,
        each index exactly once, possibly before this returns. When the connection is lost the rest comes as
        INDETERMINATE. Raises ConnectionLost = nothing was taken. `messages` must not be changed by either side.
        """

    def withdraw(self, messages: Sequence[Outgoing]) -> Sequence[Outgoing]:
        """Core gives up on `messages` (deadline, close): forget those that never left this process and return them.
        They are REJECTED then, the others INDETERMINATE. Their outcome is reported afterwards, as any. Only a sender
        that keeps messages by itself has any to return."""
        return ()

    @abstractmethod
    async def close(self) -> None:
        """Flush what was taken, then resolve what is left INDETERMINATE. Idempotent, never raises. When cancelled:
        resolves at once."""


class Receiver(ABC):
    """Hands out deliveries of one destination (and group)."""

    dropped: int = 0
    """Signals only: messages known to have been lost here (local buffer full). A floor, not exact."""

    @abstractmethod
    async def receive_batch(self, max_deliveries: int) -> list[Delivery[Any]] | list[Message[Any]]:
        """Wait for at least one delivery (on a Signal: Message); return at most `max_deliveries`, oldest first.

        Takes from the buffer after its last await, so cancelling it loses nothing. Raises ConnectionLost, and any
        other error only for what will not heal by itself (NotFound: the queue was deleted): that stops the bus.
        """

    @abstractmethod
    def settle_batch(
        self, settlements: Sequence[tuple[Any, Disposition]]
    ) -> Future[Sequence[tuple[int, MessagingError]]] | None:
        """Take (receipt, disposition) pairs; never blocks. None where the broker never answers, else a future of the
        elements that failed as (index, error), empty if none did; SettleLost for a lost lease or session.

        Raises ConnectionLost = nothing was taken. Core sends RELEASE only where declared, and each receipt once.
        """

    @abstractmethod
    async def stop(self) -> None:
        """Take no more from the broker and hand back what `receive_batch` has not returned. Settling still works."""

    @abstractmethod
    async def close(self) -> None:
        """Flush settlements, leave. Unsettled deliveries come back as `Capabilities.lease` says. Idempotent, never
        raises; when cancelled drops the connection."""


class Reader(ABC):
    """Reads a Topic's history up to what was stored when it was opened. It is in no group and settles nothing."""

    @abstractmethod
    async def read(self) -> Message[Any] | None:
        """The next message; None at the end, and from then on. Those of one sequence (a key, where ordered) come in the
        order in which they were stored. Cancelling loses nothing.

        Raises OutOfRange when retention has deleted the next message, NotFound, ConnectionLost; again when asked again.
        """

    @abstractmethod
    def position(self) -> str:
        """Where a new reader goes on: all that `read` has returned is before it, everything else behind it.
        ASCII without blanks."""

    @abstractmethod
    async def close(self) -> None:
        """Idempotent, never raises; a `read` that waits raises ConnectionLost. When cancelled lets go all the same."""


@runtime_checkable
class Leased(Protocol):
    """A receiver whose deliveries have a lease that runs out (`Capabilities.lease == "timeout"`)."""

    def extend_batch(self, receipts: Sequence[Any]) -> None:
        """Start the lease of each receipt anew. Never blocks; a receipt that is already lost is ignored."""
