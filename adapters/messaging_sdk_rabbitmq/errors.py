"""One table: what pika or the operating system raises, as the SDK's errors."""

from __future__ import annotations

import re
import socket
import ssl
from dataclasses import dataclass
from typing import Any, Final

from pika import exceptions as pika

from messaging_sdk.errors import (
    AuthError,
    ConfigError,
    ConnectError,
    ConnectionLost,
    MessagingError,
    NotFound,
    Outcome,
)


@dataclass(frozen=True, slots=True)
class Row:
    """`native` (with this AMQP reply code, if one is given) becomes `error`; what was in flight is always unknown."""

    native: type[BaseException]
    code: int | None
    error: type[MessagingError]
    transient: bool
    advice: str


TABLE: Final = (
    Row(pika.ProbableAuthenticationError, None, AuthError, False, "check user and password"),
    Row(pika.AuthenticationError, None, AuthError, False, "the broker does not offer PLAIN; check its mechanisms"),
    Row(pika.ProbableAccessDeniedError, None, AuthError, False, "no such vhost, or the user may not use it"),
    Row(pika.ConnectionClosedByBroker, 403, AuthError, False, "check user, password and permissions"),
    Row(pika.ConnectionClosedByBroker, 530, AuthError, False, "no such vhost, or the user may not use it"),
    Row(pika.ChannelClosedByBroker, 403, AuthError, False, "the user lacks this permission on the vhost"),
    Row(pika.ChannelClosedByBroker, 404, NotFound, False, 'set provision = "create", or declare it on the broker'),
    Row(pika.ChannelClosedByBroker, 405, ConnectError, True, "another connection holds it exclusively"),
    Row(pika.ChannelClosedByBroker, 406, ConfigError, False, "it exists with other properties: delete it or adapt"),
    Row(pika.IncompatibleProtocolError, None, ConnectError, True, "no AMQP 0-9-1 there, or the broker is down"),
    Row(ssl.SSLCertVerificationError, None, ConnectError, False, "set ca_file, or server_name for another name"),
    Row(ssl.SSLError, None, ConnectError, False, "amqps needs the broker's TLS port, usually 5671"),
    Row(socket.gaierror, None, ConnectError, True, "the host name is unknown"),
    Row(TimeoutError, None, ConnectError, True, "nothing answered within connect_timeout_s"),
    Row(OSError, None, ConnectError, True, "nobody listens there, or the network does not reach it"),
    Row(Exception, None, ConnectError, True, "the broker broke off; it may be starting"),
)

_UNEQUAL: Final = re.compile(r"inequivalent arg '([^']+)'(?:.*received (.+?) but current is (.+))?", re.S)
"""Which, wanted, found; the last two are missing where a long name fills the 255 bytes of the broker's text."""
_ABSENT: Final = ("NOT_FOUND - no queue", "NOT_FOUND - no exchange")
"""Other 404s say that a queue has no leader or its node is down: that heals by itself."""


def refusal(error: BaseException, what: str) -> MessagingError:
    """The error of an attempt to do `what`: open a connection or a channel, declare, consume."""
    native = _innermost(error)
    code = getattr(native, "reply_code", None)
    text = str(getattr(native, "reply_text", None) or native)
    row = next(r for r in TABLE if isinstance(native, r.native) and r.code in (None, code))
    if row.error is NotFound and not text.startswith(_ABSENT):
        return ConnectError(f"{what}: the queue is not ready ({text})")
    unequal = _UNEQUAL.search(text) if row.error is ConfigError else None
    if unequal is not None:
        which, wanted, found = unequal.groups()
        values = f"is {found}, wanted {wanted}" if found else "differs"
        return ConfigError(
            f"{what}: it exists with other properties: {which} {values}; delete it, or adapt the configuration"
        )
    return row.error(f"{what}: {row.advice} ({_short(native, text)})", transient=row.transient)


def loss(error: BaseException | None, what: str) -> ConnectionLost:
    """The error of a channel or connection that worked. What it carried may or may not be done."""
    native = _innermost(error) if error is not None else None
    text = getattr(native, "reply_text", None) or str(native)
    found = ConnectionLost(what if native is None else f"{what}: {_short(native, text)}", outcome=Outcome.INDETERMINATE)
    found.__cause__ = native
    return found


def _innermost(error: BaseException) -> BaseException:
    """The cause inside pika's wrappers (workflow failed -> connector error -> socket error)."""
    while True:
        held: Any = getattr(error, "exceptions", None) or getattr(error, "exception", None) or error.args[:1]
        inner = held[-1] if isinstance(held, tuple) and held else held
        if not isinstance(inner, BaseException):
            return error
        error = inner


def _short(native: BaseException, text: str) -> str:
    return f"{type(native).__name__}: {text}"[:300]
