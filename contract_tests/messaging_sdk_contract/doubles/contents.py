"""Flaws in what arrives: bodies, headers, ids and counts that are not what was sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from messaging_sdk import Delivery, Destination, memory
from messaging_sdk.memory import Broker, Entry, MemoryReceiver
from messaging_sdk.model import Meta, Outgoing

from .planting import Double, with_broker, with_receiver

Arrived = Delivery[Any]


def changed(alter: Callable[[Arrived, Entry], None]) -> type[memory.Driver]:
    """A driver that lets `alter` at every delivery."""

    class Altering(MemoryReceiver):
        def delivery(self, message: Outgoing, entry: Entry) -> Arrived:
            made = super().delivery(message, entry)
            alter(made, entry)
            return made

    return with_receiver(Altering)


def _headers(change: Callable[[dict[str, str]], dict[str, str]]) -> type[memory.Driver]:
    def alter(made: Arrived, entry: Entry) -> None:
        old = made.meta
        headers = change(dict(old.headers))
        made._meta = Meta(headers, old.content_type, old.correlation_id, old.created_s)

    return changed(alter)


def _as_text(made: Arrived, entry: Entry) -> None:
    made.body = made.body.decode("utf-8", "replace").encode()


def _cut(made: Arrived, entry: Entry) -> None:
    made.body = made.body[: 1 << 16]


def _new_id(made: Arrived, entry: Entry) -> None:
    if entry.deliveries > 1:
        made._id = f"{made.id}-{entry.deliveries}"


def _other_body(made: Arrived, entry: Entry) -> None:
    if entry.deliveries > 1:
        made.body += b"\n"


def _no_key(made: Arrived, entry: Entry) -> None:
    made.key = None


def _counts_one(made: Arrived, entry: Entry) -> None:
    if made.deliveries is not None:
        made.deliveries = 1


def _no_correlation(made: Arrived, entry: Entry) -> None:
    old = made.meta
    made._meta = Meta(old.headers, old.content_type, None, old.created_s)


class EmptyBodyLost(Broker):
    def route(self, destination: Destination[Any], message: Outgoing) -> None:
        if message.body:
            super().route(destination, message)


class LargeBodyLost(Broker):
    def route(self, destination: Destination[Any], message: Outgoing) -> None:
        if len(message.body) < 1 << 19:
            super().route(destination, message)


DOUBLES: Final = (
    Double("binary-mangled", "bodies pass through a text codec", ("MSG-01",),
     "all byte values are sent", changed(_as_text)),
    Double("cut-at-64-kib", "large bodies are cut off", ("MSG-02", "CAP-01.max_body"),
     "the declared size must arrive whole", changed(_cut)),
    Double("empty-body-lost", "an empty body is taken for nothing", ("MSG-01",),
     "an empty body is sent", with_broker(EmptyBodyLost)),
    Double("large-body-lost", "bodies near the limit are confirmed and dropped", ("MSG-02", "CAP-01.max_body"),
     "the declared size must arrive", with_broker(LargeBodyLost)),
    Double("headers-dropped", "headers do not arrive", ("MSG-03", "CAP-07"),
     "headers are compared", _headers(lambda h: {})),
    Double("header-trimmed", "outer blanks of header values are cut", ("MSG-03", "CAP-01.headers"),
     "values with outer blanks are sent", _headers(lambda h: {k: v.strip() for k, v in h.items()})),
    Double("header-lower-cased", "header names lose their case", ("MSG-04", "CAP-01.headers"),
     "K and k are sent together", _headers(lambda h: {k.lower(): v for k, v in h.items()})),
    Double("constant-delivery-count", "every delivery says it is the first", ("RED-02", "CAP-01.count"),
     "the count is read after deaths", changed(_counts_one)),
    Double("id-changed-on-redelivery", "a message gets a new id when it comes again", ("RED-02", "MSG-10", "RED-01"),
     "ids are compared", changed(_new_id)),
    Double("redelivered-body-differs", "a message that comes again is not the same", ("MSG-10",),
     "bodies are compared", changed(_other_body)),
    Double("key-lost", "the ordering key does not arrive", ("DEL-01",),
     "the key is compared", changed(_no_key)),
    Double("correlation-id-lost", "the correlation id does not arrive", ("MSG-05",),
     "properties are compared", changed(_no_correlation)),
)  # fmt: skip
