"""`@case`: a test function becomes a numbered case that runs once per kind of destination."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from .harness import Fault
from .lab import KINDS, PATIENCE_S, Kind

LIMIT_S: Final = 2.5 * PATIENCE_S
"""A case that takes longer is stuck: more than its own patience, so that it can say what it waited for."""
FAULT_LIMIT_S: Final = max(180.0, 5 * PATIENCE_S)
"""A broker may take a minute to come back from a SIGKILL, and a case may kill it twice."""

ALL: Final = tuple(k.name for k in KINDS)
SETTLED: Final = tuple(k.name for k in KINDS if k.settles)
"""Every kind but the Signal."""
ORDERED: Final = tuple(k.name for k in KINDS if k.ordered)
TOPICS: Final = ("topic", "topic/ordered")
QUEUES: Final = ("queue", "queue/ordered")

_ATTRIBUTE: Final = "messaging_case"

Body = Callable[..., Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Case:
    """One numbered case: its clause in CONTRACT.md, where it runs, what it exercises and needs."""

    id: str
    kinds: tuple[Kind, ...]
    flags: tuple[str, ...]
    faults: tuple[Fault, ...]
    limit_s: float
    refusal: bool
    """Runs also for a kind that the adapter refuses, because the refusal is what it proves."""
    body: Body

    @property
    def family(self) -> str:
        return self.id.split("-")[0]


def case(
    id: str,
    *,
    kinds: Sequence[str | Kind] = ALL,
    flags: Sequence[str] = (),
    faults: Sequence[Fault] = (),
    limit_s: float | None = None,
    refusal: bool = False,
) -> Callable[[Body], Callable[..., NoReturn]]:
    """Make an `async def test_...(lab: Lab)` a case of clause `id`.

    It runs once per kind of `kinds` as `test_...[queue/ordered]`, in a loop of its own, within
    `limit_s` (by default 60 s; 180 s if it needs `faults`). `flags` are the capabilities whose
    cells of the matrix rest on it. The docstring is one sentence: the clause's promise as tested.
    Further parameters come from `pytest.mark.parametrize` and fixtures as usual.
    """
    by_name = {k.name: k for k in KINDS}
    chosen = tuple(k if isinstance(k, Kind) else by_name[k] for k in kinds)
    limit = limit_s if limit_s is not None else (FAULT_LIMIT_S if faults else LIMIT_S)

    def decorate(body: Body) -> Callable[..., NoReturn]:
        if not body.__doc__:
            raise TypeError(f"{body.__name__}: a case needs a docstring of one sentence")

        # Not a coroutine function, so that no other asyncio plugin of the user's takes it over.
        @functools.wraps(body)
        def test(**_: Any) -> NoReturn:
            raise RuntimeError("contract cases need `-p messaging_sdk_contract.plugin`")

        setattr(
            test,
            _ATTRIBUTE,
            Case(id, chosen, tuple(flags), tuple(faults), limit, refusal, body),
        )
        return test

    return decorate


def case_of(function: object) -> Case | None:
    """The case that `function` was decorated as, or None."""
    found = getattr(function, _ATTRIBUTE, None)
    return found if isinstance(found, Case) else None
