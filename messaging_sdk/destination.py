"""Destinations carry the semantic tag, the key and the order; which broker they live on is configuration."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Final, Generic, TypeVar, cast

from .codec import Codec, codec_of
from .errors import InvalidDestination, InvalidMessage, Outcome, UsageError

T = TypeVar("T")

NAME_RULE: Final = (
    "words of letters, digits, '-' and '_' joined by '.', no '__', no leading or trailing '_' or '-' in a word, "
    "at most 200 characters"
)
_WORD: Final = r"[A-Za-z0-9](?:[A-Za-z0-9_-]*[A-Za-z0-9])?"
_NAME: Final = re.compile(rf"{_WORD}(?:\.{_WORD})*\Z")
MAX_NAME: Final = 200
DEAD: Final = "dead"  # last word of a dead-letter queue's name


def check_name(kind: str, name: object) -> str:
    """Return `name` if it follows NAME_RULE, else raise InvalidDestination naming it and the rule."""
    if not isinstance(name, str):
        raise InvalidDestination(f"{kind} name must be a str, not {type(name).__name__}")
    if len(name) > MAX_NAME or "__" in name or not _NAME.match(name):
        raise InvalidDestination(f"{kind} name {name[:80]!r} is not allowed: {NAME_RULE}")
    return name


class Destination(Generic[T]):
    """A named place that messages of type `T` are published to. Broker-free, immutable, equal by all it was made of."""

    tag: ClassVar[str]
    settles: ClassVar[bool] = True

    def __init__(
        self,
        name: str,
        type: type[T],
        *,
        key: str | Callable[[T], str] | None = None,
        ordered: bool = False,
        groups: Sequence[str] = (),
    ) -> None:
        self.name: Final = check_name(self.tag, name)
        self.type: Final = type
        self.codec: Final[Codec[T]] = codec_of(type)
        self.key: Final = key
        if key is not None and not callable(key) and not isinstance(key, str):
            raise UsageError(f"{self}: key must be a field name or a callable, not {key!r}")
        if isinstance(key, str):
            tables = ("model_fields", "__dataclass_fields__", "_fields")  # of models, dataclasses, named tuples
            fields = next((f for f in (getattr(type, t, None) for t in tables) if f), None)
            if fields is None:
                raise UsageError(f"{self}: messages of this type have no fields; give key= a callable, not {key!r}")
            if key not in fields:
                raise UsageError(f"{self}: {type.__name__} has no field {key!r}; it has {sorted(fields)}")
        if ordered and key is None:
            raise UsageError(f"{self}: ordered=True needs key=: order holds among messages that share a key")
        if isinstance(groups, str):
            raise UsageError(f"{self}: groups must be a list of names, not the one string {groups!r}")
        self.ordered: Final = ordered
        self.groups: Final = tuple(check_name("group", g) for g in groups)
        if len(set(self.groups)) != len(self.groups):
            raise UsageError(f"{self}: a group is named twice in {list(self.groups)}")
        self._identity = (self.tag, name, type, key, ordered, self.groups)
        self._hash = hash(self._identity)  # once: publishing looks destinations up

    def key_of(self, value: T) -> str | None:
        """The ordering key of `value`, or None where the destination has no key. Always a str."""
        key = self.key
        if key is None:
            return None
        found = cast(Any, getattr(value, key) if isinstance(key, str) else key(value))
        text = found if isinstance(found, str) else "" if found is None else str(found)
        if text.isascii() and text:
            return text
        problem = "is empty; related messages share a non-empty key"
        if text:
            try:
                text.encode()
                return text
            except UnicodeEncodeError:
                problem = "holds a lone surrogate and has no UTF-8 form"
        raise InvalidMessage(f"{self}: the key of this message {problem}", outcome=Outcome.REJECTED)

    def __repr__(self) -> str:
        return f"{self.__class__.__name__}({self.name!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Destination) and self._identity == other._identity

    def __hash__(self) -> int:
        return self._hash


class Queue(Destination[T]):
    """Point-to-point: each message is done by one of the competing consumers, at least once.

    `ordered=True` needs `key`: messages of one key are handled one at a time, in the order they were accepted, also
    under redelivery and with several consumers; a backend that cannot do that refuses.
    """

    tag = "queue"

    def __init__(
        self,
        name: str,
        type: type[T],
        *,
        key: str | Callable[[T], str] | None = None,
        ordered: bool = False,
    ) -> None:
        super().__init__(name, type, key=key, ordered=ordered)

    def dead_letters(self) -> Queue[bytes]:
        """Where messages end that can not be handled: bodies as they came, `provenance` tells why."""
        return Queue(f"{self.name}.{DEAD}", bytes)


class Topic(Destination[T]):
    """Pub-sub: every declared group gets each message at least once; inside a group one member does.

    Groups are durable and provisioned before the first publish; a new one starts at now. With no groups a publish is
    accepted and goes nowhere.
    """

    tag = "topic"

    def __init__(
        self,
        name: str,
        type: type[T],
        *,
        key: str | Callable[[T], str] | None = None,
        ordered: bool = False,
        groups: Sequence[str] = (),
    ) -> None:
        super().__init__(name, type, key=key, ordered=ordered, groups=groups)

    def dead_letters(self, group: str) -> Queue[bytes]:
        """Where messages of `group` end that can not be handled."""
        if group not in self.groups:
            raise UsageError(f"{self} has no group {group!r}; it declares {list(self.groups)}")
        return Queue(f"{self.name}.{group}.{DEAD}", bytes)


class Signal(Destination[T]):
    """Fire-and-forget: every connected listener gets it, at most once; nothing waits for the absent.

    With `group=` at the listener, one connected member of that group gets it. There is nothing to settle.
    """

    tag = "signal"
    settles = False

    def __init__(self, name: str, type: type[T], *, key: str | Callable[[T], str] | None = None) -> None:
        super().__init__(name, type, key=key)
