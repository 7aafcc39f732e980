"""One table: Kafka's error codes as the SDK's errors. Kafka's texts quote neither bodies nor credentials."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

from confluent_kafka import KafkaError, KafkaException

from messaging_sdk.errors import (
    AuthError,
    Backpressure,
    CapabilityError,
    ConfigError,
    ConnectError,
    ConnectionLost,
    DeadlineExceeded,
    InvalidMessage,
    MessagingError,
    NotFound,
    TooLarge,
    Unmet,
)
from messaging_sdk.model import SendResult, indeterminate, rejected

M = TypeVar("M", bound=MessagingError)
Row = tuple[type[MessagingError], bool, bool, str]
"""Our class, transient?, surely not stored (of a send)?, what to do."""

TABLE: Final[dict[int, Row]] = {
    KafkaError._AUTHENTICATION: (AuthError, False, True, "check user, password and sasl_mechanism"),
    KafkaError.SASL_AUTHENTICATION_FAILED: (AuthError, False, True, "check user, password and sasl_mechanism"),
    KafkaError.TOPIC_AUTHORIZATION_FAILED: (AuthError, False, True, "the user lacks an ACL on this topic"),
    KafkaError.GROUP_AUTHORIZATION_FAILED: (AuthError, False, True, "the user lacks an ACL on this group"),
    KafkaError.CLUSTER_AUTHORIZATION_FAILED: (AuthError, False, True, "the user lacks an ACL on the cluster"),
    KafkaError._SSL: (ConnectError, False, True, "check ca_file, and that this port speaks TLS"),
    KafkaError._RESOLVE: (ConnectError, True, True, "the host name is unknown"),
    KafkaError._TRANSPORT: (ConnectError, True, False, "nobody listens there, or the network does not reach it"),
    KafkaError._ALL_BROKERS_DOWN: (ConnectError, True, False, "no broker of the cluster answers"),
    KafkaError._TIMED_OUT: (ConnectError, True, False, "no answer in time"),
    KafkaError._MSG_TIMED_OUT: (DeadlineExceeded, True, False, "no answer within send_timeout_s"),
    KafkaError._PURGE_QUEUE: (ConnectionLost, True, False, "the connection was lost before its answer came"),
    KafkaError._PURGE_INFLIGHT: (ConnectionLost, True, False, "the connection was lost before its answer came"),
    KafkaError.UNKNOWN_TOPIC_OR_PART: (NotFound, False, True, 'set provision = "create", or make the topic'),
    KafkaError._UNKNOWN_TOPIC: (NotFound, False, True, 'set provision = "create", or make the topic'),
    KafkaError.UNKNOWN_TOPIC_ID: (NotFound, False, True, "the topic was deleted"),
    KafkaError.INCONSISTENT_TOPIC_ID: (NotFound, False, True, "the topic was deleted and made again"),
    KafkaError._DESTROY: (NotFound, False, True, "the topic was deleted meanwhile"),
    KafkaError._UNKNOWN_PARTITION: (NotFound, False, True, "the topic was deleted, or made anew with fewer partitions"),
    KafkaError.MSG_SIZE_TOO_LARGE: (TooLarge, False, True, "raise message.max.bytes and max_message_bytes"),
    KafkaError.INVALID_RECORD: (InvalidMessage, False, True, "the topic does not take such a message (compacted?)"),
    KafkaError._QUEUE_FULL: (Backpressure, True, True, "too much is under way in this process; wait"),
    KafkaError.NOT_ENOUGH_REPLICAS: (Backpressure, True, True, "fewer replicas are in sync than min.insync.replicas"),
    KafkaError.THROTTLING_QUOTA_EXCEEDED: (Backpressure, True, True, "over this client's quota; wait"),
    KafkaError.POLICY_VIOLATION: (ConfigError, False, True, "the cluster's policy forbids it"),
    KafkaError.INVALID_REPLICATION_FACTOR: (ConfigError, False, True, "fewer brokers than replication_factor"),
    KafkaError.INVALID_PARTITIONS: (ConfigError, False, True, "check partitions"),
    KafkaError.INVALID_CONFIG: (ConfigError, False, True, "the broker does not take this topic configuration"),
    KafkaError.TOPIC_EXCEPTION: (ConfigError, False, True, "a topic with the same name in metrics exists (. equals _)"),
    KafkaError._INVALID_ARG: (ConfigError, False, True, "the client does not take this configuration"),
}  # fmt: skip
UNKNOWN_TOPIC: Final = (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError.UNKNOWN_TOPIC_ID, KafkaError._UNKNOWN_TOPIC)
_UNKNOWN: Final[Row] = (ConnectError, True, False, "the broker did not do it")


class Solitude:
    """Notices that a client has no broker left. librdkafka 2.16 may not say so, and then looks for none: one that
    stops can answer, for a moment, that its cluster has no brokers (librdkafka issue 5301). Its statistics show it.
    """

    def __init__(self, on_error: Callable[[KafkaError], object]) -> None:
        self._on_error = on_error
        self._alone = 0

    def config(self) -> Mapping[str, Any]:
        """What a client needs to tell of it, within its polls."""
        return {"statistics.interval.ms": 2000, "stats_cb": self.look}

    def look(self, statistics: str) -> None:
        """`on_error` when there was twice in a row no broker but those that stand for a role."""
        brokers = json.loads(statistics).get("brokers", {}).values()
        self._alone = 0 if any(b.get("source") in ("learned", "configured") for b in brokers) else self._alone + 1
        if self._alone > 1:
            self._on_error(KafkaError(KafkaError._ALL_BROKERS_DOWN))


def is_miscount(error: KafkaError) -> bool:
    """Is it in doubt that all brokers are down? librdkafka 2.16 says "0/2 brokers are down" of a whole connection when
    it drops the address that it began with in favour of the broker found there; of a lost one now and then too."""
    text = error.str()
    return error.code() == KafkaError._ALL_BROKERS_DOWN and text.startswith("0/") and not text.startswith("0/1 ")


def native_of(error: object) -> KafkaError | None:
    """The KafkaError inside what the client raised."""
    found: Any = error.args[0] if isinstance(error, KafkaException) and error.args else None
    return found if isinstance(found, KafkaError) else None


def refusal(error: KafkaError | BaseException, what: str) -> MessagingError:
    """The error of an attempt to do `what`: connect, provision, join a group."""
    native = error if isinstance(error, KafkaError) else native_of(error)
    if native is None:
        if isinstance(error, MessagingError):
            return error
        return _chained(ConnectError(f"{what}: {error!r}"), error)
    kind, transient, _, advice = TABLE.get(native.code(), _UNKNOWN)
    return _chained(_made(kind, f"{what}: {advice} ({_text(native)})", transient), error)


def report(error: KafkaError, what: str) -> SendResult:
    """The result of a message whose delivery report says `error`."""
    kind, transient, unstored, advice = TABLE.get(error.code(), (MessagingError, True, False, "outcome unknown"))
    if kind is ConnectError:  # of a send: core sends it again, on a new connection
        kind = ConnectionLost
    made = _chained(_made(kind, f"{what}: {advice} ({_text(error)})", transient), error)
    return rejected(made) if unstored else indeterminate(made)


def loss(error: KafkaError | BaseException | None, what: str) -> ConnectionLost:
    """The error of a connection or membership that worked."""
    native = error if isinstance(error, KafkaError) else None if error is None else native_of(error) or error
    text = "closed" if native is None else _text(native) if isinstance(native, KafkaError) else repr(native)
    return _chained(ConnectionLost(f"{what}: {text}"), error)


def no_protocol(what: str) -> CapabilityError:
    """A server without the group protocol of KIP-848."""
    remedy = 'Kafka 4 with group.coordinator.rebalance.protocols=classic,consumer; or group_protocol = "classic"'
    return CapabilityError([Unmet(what, 'group_protocol="kip848"', "kafka", remedy)])


def no_release(what: str) -> CapabilityError:
    """A disposition that core never sends here: the delivery stays unsettled."""
    remedy = "hold it (retry), or close the receiver: what is unsettled then goes to another member"
    return CapabilityError([Unmet(what, "release", "kafka", remedy)])


def _made(kind: type[MessagingError], text: str, transient: bool) -> MessagingError:
    if kind is TooLarge:
        return TooLarge(text, size_bytes=0, limit_bytes=0)
    return kind(text, transient=transient)


def _chained(made: M, error: KafkaError | BaseException | None) -> M:
    made.__cause__ = KafkaException(error) if isinstance(error, KafkaError) else error
    return made


def _text(error: KafkaError) -> str:
    return f"{error.name()}: {error.str()}"[:300]
