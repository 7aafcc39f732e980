"""What `bus.on` registers: a handler checked when it is registered, and made callable with one message."""

from __future__ import annotations

import asyncio
import inspect
import typing
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any, Concatenate, Generic, Literal, ParamSpec, TypeVar, overload

from .config import seconds
from .consumer import OnFailure
from .destination import Destination, Queue, Signal, Topic
from .errors import UsageError
from .model import Delivery, Message
from .pipeline import Call
from .retry import Retry

T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R")

DEFAULT_WINDOW = 500  # isolation ends at the window: a smaller one lets a few held retries stall the rest


@dataclass(frozen=True, slots=True)
class Registration:
    """One `on`: what it consumes, how, and with which function."""

    destination: Destination[Any]
    group: str | None
    handler: Callable[..., Any]
    takes_message: bool
    provided: tuple[str, ...]
    concurrency: int
    window: int
    retry: Retry
    on_failure: OnFailure
    settle_before: bool
    timeout_s: float | None
    max_deliveries: int

    @property
    def blocking(self) -> bool:
        handler = self.handler
        return not (inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(type(handler).__call__))


class _Decorator(Generic[T]):
    """Checks a handler, registers it, and gives it back unchanged."""

    def __init__(self, register: Callable[[Callable[..., Any]], None]) -> None:
        self._register = register

    def __call__(self, handler: Callable[Concatenate[T, P], R]) -> Callable[Concatenate[T, P], R]:
        self._register(handler)
        return handler


class Handlers:
    """A set of handlers to be included in a Bus, for programs of several modules."""

    def __init__(self) -> None:
        self.registrations: list[Registration] = []

    @overload
    def on(
        self,
        destination: Queue[T] | Topic[T],
        *,
        group: str | None = None,
        concurrency: int = 1,
        window: int | None = None,
        retry: Retry | None = None,
        on_failure: OnFailure = "dead_letter",
        settle: Literal["after", "before"] = "after",
        timeout: float | str | None = None,
        max_deliveries: int = 20,
    ) -> _Decorator[T]: ...
    @overload
    def on(
        self,
        destination: Signal[T],
        *,
        group: str | None = None,
        concurrency: int = 1,
        window: int | None = None,
        timeout: float | str | None = None,
    ) -> _Decorator[T]: ...
    def on(
        self,
        destination: Destination[Any],
        *,
        group: str | None = None,
        concurrency: int = 1,
        window: int | None = None,
        retry: Retry | None = None,
        on_failure: OnFailure = "dead_letter",
        settle: Literal["after", "before"] = "after",
        timeout: float | str | None = None,
        max_deliveries: int = 20,
    ) -> _Decorator[Any]:
        """Run the decorated function for each message of `destination`, `concurrency` at a time.

        The handler takes `(value)` or `(value, delivery)` (on a Signal `(value, message)`), and by name whatever
        `Bus(provide=...)` offers; it may be async, or plain, which then runs in a thread. Returning settles the
        message; an exception or RetryLater runs it again by `retry`; Reject, an undecodable body or used-up attempts
        go to `on_failure`. A message that the broker delivered more than `max_deliveries` times (it kills the
        process) goes there too, where the backend counts. `window` bounds the unsettled messages in this process,
        held retries included; default 500 or twice the concurrency. `timeout` bounds one run.
        `settle="before"` makes it at most once: settled first, then run once; a failure is a counted drop.

        Raises UsageError for a wrong signature, group or number. A group is required on a Topic.
        """
        group = check_group(destination, group)
        if not isinstance(concurrency, int) or concurrency < 1:
            raise UsageError(f"on({destination}): concurrency must be a whole number from 1, not {concurrency!r}")
        check_failure(destination, on_failure, max_deliveries)
        if settle not in ("after", "before"):
            raise UsageError(f"on({destination}): settle is 'after' or 'before', not {settle!r}")
        if settle == "before" and destination.ordered:
            raise UsageError(f"on({destination}): settle='before' gives up the order; use an unordered destination")
        if retry is not None and not isinstance(retry, Retry):
            raise UsageError(f"on({destination}): retry must be a Retry(...), not {type(retry).__name__}")
        window = check_window(destination, window, concurrency)

        def register(handler: Callable[..., Any]) -> None:
            takes_message, provided = check_handler(handler, destination)
            self.registrations.append(
                Registration(
                    destination, group, handler, takes_message, provided, concurrency, window, retry or Retry(),
                    on_failure, settle == "before", None if timeout is None else seconds(timeout, "timeout"),
                    max_deliveries,
                )
            )  # fmt: skip

        return _Decorator(register)


def check_group(destination: Destination[Any], group: str | None) -> str | None:
    """The group to consume with; UsageError if the destination's type asks for another."""
    if not isinstance(destination, Destination):
        raise UsageError(f"a destination is a Queue, Topic or Signal, not {type(destination).__name__}")
    if isinstance(destination, Topic):
        if group is None:
            raise UsageError(f"{destination}: name the group to consume with: group= one of {list(destination.groups)}")
        if group not in destination.groups:
            raise UsageError(
                f"{destination} has no group {group!r}; it declares {list(destination.groups)}: add it to groups=, "
                "so that it exists before the first publish"
            )
    elif isinstance(destination, Queue) and group is not None:
        raise UsageError(f"{destination}: a Queue has no groups, its consumers compete; use a Topic for copies")
    return group


def check_failure(destination: Destination[Any], on_failure: object, max_deliveries: object) -> None:
    """UsageError if these do not say what becomes of messages that cannot be handled."""
    if on_failure not in ("dead_letter", "drop", "stop"):
        raise UsageError(f"{destination}: on_failure is 'dead_letter', 'drop' or 'stop', not {on_failure!r}")
    if not isinstance(max_deliveries, int) or max_deliveries < 1:
        raise UsageError(f"{destination}: max_deliveries must be a whole number from 1, not {max_deliveries!r}")


def check_window(destination: Destination[Any], window: int | None, concurrency: int) -> int:
    """The window to consume with; UsageError for one that `concurrency` handlers would not fit into."""
    if window is None:
        return max(DEFAULT_WINDOW, 2 * concurrency)
    if not isinstance(window, int) or window < concurrency:
        raise UsageError(f"{destination}: window must be a whole number >= concurrency ({concurrency}), not {window!r}")
    return window


def check_handler(handler: Callable[..., Any], destination: Destination[Any]) -> tuple[bool, tuple[str, ...]]:
    """(takes the message as second argument?, names to provide), or UsageError telling what a handler looks like."""
    name = getattr(handler, "__qualname__", repr(handler))
    second = "Delivery" if destination.settles else "Message"
    shape = f"a handler of {destination} is (value) or (value, {second}), plus names that Bus(provide=...) offers"
    if not callable(handler) or inspect.isgeneratorfunction(handler) or inspect.isasyncgenfunction(handler):
        raise UsageError(f"{name} is not a plain or async function; {shape}")
    try:
        parameters = list(inspect.signature(handler).parameters.values())
    except (TypeError, ValueError):
        raise UsageError(f"{name} has no readable signature; {shape}") from None
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise UsageError(f"{name} takes *args or **kwargs, so its arguments cannot be checked; {shape}")
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if not positional:
        raise UsageError(f"{name} takes no argument; {shape}")
    hints = _hints(handler)
    _check_value_hint(name, hints.get(positional[0].name), destination)
    takes_message = False
    rest = positional[1:]
    if rest:
        hint = hints.get(rest[0].name)
        origin = typing.get_origin(hint) or hint
        by_name = rest[0].name in ("delivery", "message", "d", "m", "_") and hint is None
        takes_message = by_name or (isinstance(origin, type) and issubclass(origin, Message))
        if takes_message and not destination.settles and origin is Delivery:
            raise UsageError(f"{name}: a Signal has nothing to settle; take a Message instead of a Delivery")
    named = rest[1:] if takes_message else rest
    named += [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    return takes_message, tuple(p.name for p in named if p.default is p.empty)


def _hints(handler: Callable[..., Any]) -> Mapping[str, Any]:
    try:
        return typing.get_type_hints(handler)
    except Exception:  # a name only defined for type checkers: then there is nothing to compare
        return {}


def _check_value_hint(name: str, hint: Any, destination: Destination[Any]) -> None:
    wanted: Any = destination.type
    if hint is not Any and isinstance(hint, type) and isinstance(wanted, type) and not issubclass(wanted, hint):
        raise UsageError(
            f"{name} takes a {hint.__name__}, but {destination} carries {wanted.__name__}; annotate the same type"
        )


def bind(registration: Registration, provide: Mapping[str, Callable[[], Any]], pool: Executor | None) -> Call:
    """The handler as a function of one message. UsageError if a name it takes is not provided."""
    missing = [n for n in registration.provided if n not in provide]
    if missing:
        raise UsageError(
            f"handler {getattr(registration.handler, '__qualname__', '?')} takes {missing}, which Bus(provide=...) "
            f"does not offer; it offers {sorted(provide)}"
        )
    handler, takes_message = registration.handler, registration.takes_message
    factories = {n: provide[n] for n in registration.provided}
    if not registration.blocking and not factories:
        if takes_message:
            return lambda message: handler(message.data, message)
        return lambda message: handler(message.data)

    async def call(message: Message[Any]) -> None:
        args = (message.data, message) if takes_message else (message.data,)
        named = {}
        for name, factory in factories.items():
            value = factory()
            named[name] = await value if inspect.isawaitable(value) else value
        if registration.blocking:
            work = partial(handler, *args, **named)
            result = await asyncio.get_running_loop().run_in_executor(pool, copy_context().run, work)
            if inspect.isawaitable(result):  # a plain function around an async one: done means awaited
                await result
        else:
            await handler(*args, **named)

    return call
