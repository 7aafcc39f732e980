"""The error tree: one class per thing a caller can do about it.

    MessagingError
    ├── ConfigError            a key, URL, file or extra is wrong; fix the configuration
    ├── CapabilityError        the backend cannot keep a promise that was asked for; lists every unmet need
    ├── UsageError             a call or a handler is wrong; fix the code
    ├── InvalidDestination     a destination name, or the physical name made of it, is not allowed
    ├── InvalidMessage         a body, header, key or option of one message is not allowed
    │   └── TooLarge           the encoded message is over the backend's limit
    ├── DecodeError            a body that arrived does not fit the destination's type
    ├── ConnectError           no connection could be made: nobody answers, or it is not that broker
    │   └── AuthError          the broker answered and refused the credentials or the permission
    ├── ConnectionLost         a connection that worked is gone; core reopens it
    ├── NotFound               the destination does not exist on the broker, or nothing is bound to it
    ├── OutOfRange             a replay was to begin, or go on, where the backend keeps nothing any more
    ├── Backpressure           the broker or a local window refuses more for now
    ├── DeadlineExceeded       a call did not end within its deadline
    ├── SettleLost             the delivery is no longer ours: its lease, session or connection is gone
    ├── AlreadySettled         the delivery was settled before by this process
    └── Closed                 the bus, publisher or stream was closed

Every error has `transient` (may the same call succeed later?) and `outcome` (for a send: may the message be stored?).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Outcome(StrEnum):
    """What is known of one send. There is no fourth value: a timeout is `INDETERMINATE`, never a failure."""

    OK = "ok"
    REJECTED = "rejected"  # surely not stored
    INDETERMINATE = "indeterminate"  # may be stored: deadline passed or connection lost


class MessagingError(Exception):
    """Base of all errors raised by this SDK. The native error, where there is one, is `__cause__`."""

    transient: bool = False

    def __init__(self, text: str, *, transient: bool | None = None, outcome: Outcome | None = None) -> None:
        super().__init__(text)
        if transient is not None:
            self.transient = transient
        self.outcome = outcome


class ConfigError(MessagingError):
    """A configuration key, URL, file or missing extra. Never quotes a value, which may be a secret."""


class UsageError(MessagingError):
    """A call that cannot be right on any backend: wrong handler signature, missing group, wrong thread or state."""


class InvalidDestination(MessagingError):
    """A logical name against the naming rule, or a physical name over the backend's limit."""


class InvalidMessage(MessagingError):
    """A value of the wrong type, or a header, key or option that the backend would alter or refuse."""


class TooLarge(InvalidMessage):
    """The encoded message is over the backend's limit."""

    def __init__(self, text: str, *, size_bytes: int, limit_bytes: int) -> None:
        super().__init__(text, outcome=Outcome.REJECTED)
        self.size_bytes = size_bytes
        self.limit_bytes = limit_bytes


class DecodeError(MessagingError):
    """A body that arrived cannot be turned into the destination's type. Never quotes the body."""


class ConnectError(MessagingError):
    """No connection within the deadline."""

    transient = True


class AuthError(ConnectError):
    """The broker refused user, password, certificate or permission. Trying again does not help."""

    transient = False


class ConnectionLost(MessagingError):
    """The connection this sender or receiver lived on is gone. It never comes back: core opens a new one."""

    transient = True


class NotFound(MessagingError):
    """No such destination on the broker, or a message that no queue would take."""


class OutOfRange(MessagingError):
    """The next message of a replay has been deleted by the backend's retention. Nothing was skipped in silence."""


class Backpressure(MessagingError):
    """The broker (full queue, alarm, quota) or a local bound refuses more for now."""

    transient = True


class DeadlineExceeded(MessagingError):
    """A call did not end within its deadline. For a send, `outcome` tells whether it may be stored."""

    transient = True


class SettleLost(MessagingError):
    """The delivery is no longer owned by this consumer; the broker gives it to someone again."""


class AlreadySettled(MessagingError):
    """The first settlement of a delivery wins; later ones have no effect on the broker."""


class Closed(MessagingError):
    """The object was closed; nothing was sent."""

    def __init__(self, text: str) -> None:
        super().__init__(text, outcome=Outcome.REJECTED)


@dataclass(frozen=True, slots=True)
class Unmet:
    """One need that the backend of a destination cannot meet, and what would meet it."""

    destination: str
    need: str
    backend: str
    remedy: str

    def __str__(self) -> str:
        return (
            f"{self.destination!r} needs {self.need}; backend {self.backend} does not have it. "
            f"Would be met by: {self.remedy}"
        )


class CapabilityError(MessagingError):
    """Promises that were asked for and cannot be kept. `unmet` lists all of them, never only the first.

    `problems` says what else is wrong with the same destinations (a name that the backend does not allow, no route).
    """

    def __init__(self, unmet: Sequence[Unmet], problems: Sequence[str] = ()) -> None:
        self.unmet = tuple(unmet)
        self.problems = tuple(problems)
        lines = "\n".join(f"  - {item}" for item in (*self.unmet, *self.problems))
        besides = f" and {len(self.problems)} other problem(s)" if self.problems else ""
        super().__init__(
            f"{len(self.unmet)} unmet need(s){besides}, nothing was sent:\n{lines}", outcome=Outcome.REJECTED
        )


class Reject(Exception):
    """Raised by a handler: this message can never succeed. No retry; straight to `on_failure`."""


class RetryLater(Exception):
    """Raised by a handler: run again after `after_s` seconds, whatever the retry policy's delay is.

    Counts as an attempt. The message is held, so its key waits where the destination is ordered.
    """

    def __init__(self, after_s: float, reason: str = "") -> None:
        super().__init__(reason or f"handler asked to run again after {after_s} s")
        self.after_s = after_s
