"""Middleware: what sees every message of a bus on its way out and around its handler, whatever the backend."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from .destination import Destination
from .model import Message, Outgoing

Call = Callable[[Message[Any]], Awaitable[None]]


class Middleware:
    """Override either side. Composed once per destination; the first of `Bus(middleware=[...])` is outermost."""

    def publish(self, destination: Destination[Any], message: Outgoing) -> Outgoing:
        """See or replace a message before it is queued. Runs on the caller's task, so it must not block.

        An exception refuses the publish: nothing is sent.
        """
        return message

    async def handle(self, destination: Destination[Any], message: Message[Any], call: Call) -> None:
        """Run around one handler run; await `call(message)` once to go on. An exception counts as the handler's."""
        await call(message)


def around(middleware: Sequence[Middleware], destination: Destination[Any], call: Call) -> Call:
    """`call` wrapped in every middleware that overrides `handle`."""
    for layer in reversed(middleware):
        if type(layer).handle is not Middleware.handle:
            call = _wrapped(layer, destination, call)
    return call


def _wrapped(layer: Middleware, destination: Destination[Any], inner: Call) -> Call:
    async def call(message: Message[Any]) -> None:
        await layer.handle(destination, message, inner)

    return call


def outward(middleware: Sequence[Middleware]) -> tuple[Middleware, ...]:
    """Those that override `publish`, in order."""
    return tuple(m for m in middleware if type(m).publish is not Middleware.publish)
