"""One interface over real message brokers, with promises that are kept or refused.

    from messaging_sdk import Bus, Queue

    hello = Queue("hello", str)
    bus = Bus("memory://")          # or amqp://..., nats://...; or Bus.from_config("messaging.toml")

See README.md for a first program, DESIGN.md beside this file for the decisions.
"""

from importlib.metadata import PackageNotFoundError, version

from .bus import Bus, Promise
from .capabilities import Capabilities, HeaderRules, Level, Needs
from .config import Settings
from .consumer import Stats
from .destination import Destination, Queue, Signal, Topic
from .errors import (
    AlreadySettled,
    AuthError,
    Backpressure,
    CapabilityError,
    Closed,
    ConfigError,
    ConnectError,
    ConnectionLost,
    DeadlineExceeded,
    DecodeError,
    InvalidDestination,
    InvalidMessage,
    MessagingError,
    NotFound,
    Outcome,
    OutOfRange,
    Reject,
    RetryLater,
    SettleLost,
    TooLarge,
    Unmet,
    UsageError,
)
from .handlers import Handlers
from .model import Delivery, Message, Sent
from .pipeline import Middleware
from .publisher import Failed, Publisher
from .replay import Replay
from .retry import Retry
from .stream import Stream

try:
    __version__ = version("portable-messaging")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0"

__all__ = [
    "AlreadySettled",
    "AuthError",
    "Backpressure",
    "Bus",
    "Capabilities",
    "CapabilityError",
    "Closed",
    "ConfigError",
    "ConnectError",
    "ConnectionLost",
    "DeadlineExceeded",
    "DecodeError",
    "Delivery",
    "Destination",
    "Failed",
    "Handlers",
    "HeaderRules",
    "InvalidDestination",
    "InvalidMessage",
    "Level",
    "Message",
    "MessagingError",
    "Middleware",
    "Needs",
    "NotFound",
    "OutOfRange",
    "Outcome",
    "Promise",
    "Publisher",
    "Queue",
    "Reject",
    "Replay",
    "Retry",
    "RetryLater",
    "Sent",
    "Settings",
    "SettleLost",
    "Signal",
    "Stats",
    "Stream",
    "TooLarge",
    "Topic",
    "Unmet",
    "UsageError",
    "__version__",
]
