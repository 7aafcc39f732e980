"""One table from what libzmq and the file system say to our errors."""

from __future__ import annotations

import errno
from typing import Final

import zmq

from messaging_sdk.errors import (
    AuthError,
    CapabilityError,
    ConfigError,
    ConnectError,
    ConnectionLost,
    MessagingError,
    SettleLost,
    TooLarge,
    Unmet,
)

TABLE: Final[dict[int, tuple[type[MessagingError], str]]] = {
    zmq.EADDRINUSE: (ConnectError, "another process listens there"),
    zmq.EADDRNOTAVAIL: (ConnectError, "that is no address of this machine"),
    errno.EINVAL: (ConfigError, "libzmq does not understand the endpoint"),
    errno.ENODEV: (ConnectError, "no such host or network interface"),
    zmq.ETERM: (ConnectionLost, "the driver was closed"),
    zmq.ENOTSOCK: (ConnectionLost, "the socket was closed"),
    errno.EACCES: (AuthError, "this user may not use it; check owner and mode"),
    errno.EPERM: (AuthError, "this user may not use it; check owner and mode"),
    errno.EROFS: (AuthError, "the file system is read-only"),
    errno.EMFILE: (ConnectError, "too many open files; raise the limit of the process"),
    errno.ENOSPC: (ConnectError, "the file system is full"),
    errno.ENOTDIR: (ConnectError, "a part of the path is no directory"),
    errno.ENOENT: (ConnectError, "it does not exist"),
}  # fmt: skip


def from_native(error: OSError | zmq.ZMQError, what: str) -> MessagingError:
    """The error for a call that failed; unknown numbers are ConnectError."""
    kind, advice = TABLE.get(error.errno or 0, (ConnectError, ""))
    text = error.strerror or type(error).__name__
    made = kind(f"{what}: {text}" + (f"; {advice}" if advice else ""))
    made.__cause__ = error
    return made


def closed(what: str) -> ConnectionLost:
    return ConnectionLost(f"{what}: this driver was closed")


def settle_lost() -> SettleLost:
    return SettleLost("the link to the sender was lost: it gives the message to someone again")


def too_large(size: int, limit: int) -> TooLarge:
    return TooLarge(f"{size} bytes, a body has at most {limit}", size_bytes=size, limit_bytes=limit)


def absent(destination: str, feature: str) -> CapabilityError:
    return CapabilityError([Unmet(destination, feature, "zeromq", "a backend that has it: ZeroMQ stores nothing")])
