"""One table from what NATS says to our errors. Server texts carry no credentials; bodies are never quoted."""

from __future__ import annotations

import ssl
from typing import Final

from nats.errors import Error as NatsError

from messaging_sdk.errors import (
    AuthError,
    Backpressure,
    CapabilityError,
    ConfigError,
    ConnectError,
    ConnectionLost,
    InvalidMessage,
    MessagingError,
    NotFound,
    TooLarge,
    Unmet,
)


class ApiError(Exception):
    """A JetStream error reply, as the server words it."""

    def __init__(self, err_code: int, text: str) -> None:
        super().__init__(f"{text} ({err_code})")
        self.err_code = err_code


class TlsMissing(NatsError):
    """TLS was asked for and the transport has none; raised before CONNECT is written."""


# JetStream err_code (server/errors.json) -> (our class, transient). All of them say: nothing was stored.
TABLE: Final[dict[int, tuple[type[MessagingError], bool]]] = {
    503: (NotFound, False),  # no responders: no stream has this subject
    10059: (NotFound, False),  # stream not found
    10014: (NotFound, False),  # consumer not found
    10149: (NotFound, False),  # consumer does not exist
    10077: (Backpressure, True),  # store failed: a limit with discard=new, or a full disk
    10023: (Backpressure, True),  # insufficient resources
    10028: (Backpressure, True),  # memory limit of the account
    10047: (Backpressure, True),  # storage limit of the account
    10167: (Backpressure, True),  # too many requests
    10008: (Backpressure, True),  # temporarily unavailable
    10009: (Backpressure, True),  # no leader now
    10054: (TooLarge, False),  # over the stream's max_msg_size
    10165: (InvalidMessage, False),  # Nats-TTL not understood
    10166: (InvalidMessage, False),  # stream without allow_msg_ttl
}  # fmt: skip


def from_api(error: ApiError, what: str) -> MessagingError:
    """The error for a JetStream error reply to `what`. Unknown codes: the configuration does not fit the server."""
    kind, transient = TABLE.get(error.err_code, (ConfigError, False))
    made = _made(kind, f"NATS refused {what}: {error}", transient)
    made.__cause__ = error
    return made


def from_connect(error: BaseException, address: str, wait_s: float) -> MessagingError:
    """The error for a failed connect. `address` shows no password."""
    text, lowered = str(error), str(error).lower()
    made: MessagingError
    if isinstance(error, MessagingError):
        return error
    if "authorization" in lowered or "authentication" in lowered:
        made = AuthError(f"{address} refused the credentials: {text}; check user, password or token")
    elif isinstance(error, TlsMissing):
        made = ConnectError(
            f"TLS was asked for and {address} does not offer it: no credentials were sent; "
            "turn TLS on at the server, or find out who answers there",
            transient=False,
        )
    elif isinstance(error, ssl.SSLError):
        made = ConnectError(f"TLS with {address} failed: {text}; check ca_file and server_name", transient=False)
    elif isinstance(error, TimeoutError):
        made = ConnectError(f"{address} did not answer within {wait_s} s; is it a running NATS server?")
    elif isinstance(error, OSError):
        made = ConnectError(f"cannot connect to {address}: {text}; is the server running and the port right?")
    else:
        made = ConnectError(f"{address} does not speak NATS: {text or type(error).__name__}")
    made.__cause__ = error
    return made


def lost(error: BaseException | None, address: str) -> ConnectionLost:
    """The connection ended; what was in flight has an unknown outcome."""
    made = ConnectionLost(f"connection to {address} lost: {error or 'closed'}")
    made.__cause__ = error
    return made


def denied(text: str) -> AuthError:
    """The server's "permissions violation" for one subject; the connection goes on."""
    made = AuthError(f"NATS refused it: {text}; grant the user this subject")
    made.__cause__ = NatsError(text)
    return made


def absent(destination: str, feature: str, remedy: str) -> CapabilityError:
    return CapabilityError([Unmet(destination, feature, "nats", remedy)])


def _made(kind: type[MessagingError], text: str, transient: bool) -> MessagingError:
    if kind is TooLarge:
        return TooLarge(text, size_bytes=0, limit_bytes=0)
    return kind(text, transient=transient)
