"""One table from what boto3 raises and SQS answers to our errors. Neither quotes bodies or secret keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from botocore import exceptions as boto
from botocore.parsers import ResponseParserError

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
    SettleLost,
    TooLarge,
    Unmet,
)


class ServiceDown(ConnectionLost):
    """The service answered 5xx: nobody knows whether it was done, and other requests may still go through."""


_ABSENT: Final = (NotFound, 'set provision = "create", or make it; check region and account')
_DENIED: Final = (AuthError, "grant the role or user this action on this resource")
_UNKNOWN_KEY: Final = (AuthError, "check the access key, its secret, and the region's partition")
_EXPIRED: Final = (AuthError, "the credentials have run out: renew them (aws sso login), or restart with fresh ones")
_CLOCK: Final = (AuthError, "the clock of this machine is off: set it right")
_BUSY: Final = (Backpressure, "send fewer, or in larger batches; FIFO queues take 300 requests a second")
_WRONG: Final = (InvalidMessage, "the service does not take this value")
_TAKEN: Final = (ConfigError, "it exists with other attributes: adapt the configuration, or delete it")
_NOT_OURS: Final = (SettleLost, "the receipt is no longer valid: the message comes again")

Row = tuple[type[MessagingError], str]

CODES: Final[Mapping[str, Row]] = {
    "QueueDoesNotExist": _ABSENT,
    "NonExistentQueue": _ABSENT,
    "NotFound": _ABSENT,
    "NotFoundException": _ABSENT,
    "InvalidAddress": _ABSENT,
    "QueueDeletedRecently": (ConnectError, "a queue of this name was deleted within the last minute: wait"),
    "QueueNameExists": _TAKEN,
    "QueueAlreadyExists": _TAKEN,
    "InvalidAttributeName": (ConfigError, "the service does not know this attribute"),
    "AccessDenied": _DENIED,
    "AccessDeniedException": _DENIED,
    "AuthorizationError": _DENIED,
    "KmsAccessDenied": _DENIED,
    "OptInRequired": _DENIED,
    "InvalidClientTokenId": _UNKNOWN_KEY,
    "UnrecognizedClientException": _UNKNOWN_KEY,
    "InvalidAccessKeyId": _UNKNOWN_KEY,
    "SignatureDoesNotMatch": _UNKNOWN_KEY,
    "InvalidSignatureException": _UNKNOWN_KEY,
    "IncompleteSignature": _UNKNOWN_KEY,
    "MissingAuthenticationToken": _UNKNOWN_KEY,
    "InvalidSecurity": _UNKNOWN_KEY,
    "ExpiredToken": _EXPIRED,
    "ExpiredTokenException": _EXPIRED,
    "RequestExpired": _CLOCK,
    "RequestTimeTooSkewed": _CLOCK,
    "OverLimit": _BUSY,
    "RequestThrottled": _BUSY,
    "RequestLimitExceeded": _BUSY,
    "Throttling": _BUSY,
    "ThrottlingException": _BUSY,
    "ThrottledException": _BUSY,
    "TooManyRequestsException": _BUSY,
    "KmsThrottled": _BUSY,
    "KMSThrottling": _BUSY,
    "InvalidMessageContents": _WRONG,
    "InvalidParameterValue": _WRONG,
    "InvalidParameter": _WRONG,
    "InvalidAttributeValue": _WRONG,
    "MissingParameter": _WRONG,
    "BatchRequestTooLong": (TooLarge, "the queue's MaximumMessageSize is lower than SQS's own"),
    "ReceiptHandleIsInvalid": _NOT_OURS,
    "MessageNotInflight": _NOT_OURS,
}
"""Error codes, without their prefix. All but the 5xx say: nothing was done."""

BEFORE: Final[tuple[tuple[type[BaseException], type[MessagingError], str], ...]] = (
    (boto.NoRegionError, ConfigError, "no region: write sqs://eu-west-1/, or set AWS_REGION or a profile with one"),
    (boto.InvalidRegionError, ConfigError, "that is no region: the URL's host is one, as in sqs://eu-west-1/prefix-"),
    (boto.ProfileNotFound, ConfigError, "check option profile, AWS_PROFILE and ~/.aws/config"),
    (boto.NoCredentialsError, AuthError, "no credentials: set AWS_ACCESS_KEY_ID and its secret, a profile or a role"),
    (boto.PartialCredentialsError, AuthError, "a part of the credentials is missing"),
    (boto.TokenRetrievalError, AuthError, "the session has run out: aws sso login"),
    (boto.SSOError, AuthError, "the session has run out or was never begun: aws sso login"),
    (boto.CredentialRetrievalError, AuthError, "the credential process or role gave none"),
    (boto.SSLError, ConnectError, "TLS failed: set ca_file, or use http:// for an emulator"),
)
"""(client's error, ours, next step) where no request left this machine. The first that fits counts."""

NOT_TRUSTED: Final = ("CERTIFICATE", "WRONG_VERSION", "hostname")
"""In the text of an SSLError that does not pass by itself; else a peer may have broken off: a lost connection."""
TRANSPORT: Final = (boto.HTTPClientError, boto.EndpointConnectionError, boto.ConnectionError, OSError)


def code_of(code: str) -> str:
    """`code` without the prefix that the query protocol's names have: "AWS.SimpleQueueService."."""
    return code.rpartition(".")[2].rpartition("#")[2]


def from_native(error: BaseException, what: str) -> MessagingError:
    """The error for a request to do `what`, its cause set. ConnectionLost (or ServiceDown): outcome unknown."""
    made = _made(error, what)
    made.__cause__ = error
    return made


def _made(error: BaseException, what: str) -> MessagingError:
    if isinstance(error, MessagingError):
        return error
    text = " ".join(str(error).split())[:300]
    if isinstance(error, boto.ClientError):
        answer: Any = error.response
        code = code_of(str(answer.get("Error", {}).get("Code", "")))
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if code not in CODES and status >= 500:
            return ServiceDown(f"{what}: the service failed with {status} ({text})")
        return from_code(code, what, text)
    for native, ours, advice in BEFORE:
        if isinstance(error, native):
            if native is boto.SSLError and not any(word in text for word in NOT_TRUSTED):
                break
            transient = False if ours is ConnectError else None
            return ours(f"{what}: {advice} ({text})", transient=transient)
    if isinstance(error, TRANSPORT):
        return ConnectionLost(f"{what}: no answer ({type(error).__name__}: {text})")
    if isinstance(error, (ResponseParserError, LookupError)):
        return ServiceDown(f"{what}: the answer cannot be read ({type(error).__name__})")
    return MessagingError(f"{what}: {type(error).__name__}: {text}")


def from_code(code: str, what: str, text: str = "") -> MessagingError:
    """The error for an error code of the service, also of one entry of a batch."""
    kind, advice = CODES.get(code_of(code), (MessagingError, "the service refused it"))
    said = f"{what}: {advice} ({code}{': ' if text else ''}{text})"
    return TooLarge(said, size_bytes=0, limit_bytes=0) if issubclass(kind, TooLarge) else kind(said)


def unreachable(error: MessagingError, address: str, endpoint: str) -> MessagingError:
    """What `open` raises for `error`: nothing worked yet that could have been lost."""
    if not isinstance(error, ConnectionLost):
        return error
    made = ConnectError(
        f"{address}: nobody answers at {endpoint}: {error}; check region, endpoint, proxy and network route"
    )
    made.__cause__ = error.__cause__ or error
    return made


def absent(destination: str, feature: str, remedy: str) -> CapabilityError:
    return CapabilityError([Unmet(destination, feature, "sqs", remedy)])
