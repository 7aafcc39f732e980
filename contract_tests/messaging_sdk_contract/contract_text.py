"""The suite's cases and the lines of CONTRACT.md that they stand for."""

from __future__ import annotations

import importlib
import pkgutil

from . import suites
from .cases import ALL, ORDERED, QUEUES, SETTLED, TOPICS, Case, case_of

_NAMES = {
    ALL: "Queue, Topic, Signal",
    SETTLED: "Queue, Topic",
    ORDERED: "ordered",
    TOPICS: "Topic",
    QUEUES: "Queue",
}


def all_cases() -> list[Case]:
    """Every case of the suites, sorted by id; two of one id are both in it."""
    found = []
    for module in pkgutil.iter_modules(suites.__path__):
        loaded = importlib.import_module(f"{suites.__name__}.{module.name}")
        for function in vars(loaded).values():
            case = case_of(function)
            if case is not None and function.__module__ == loaded.__name__:
                found.append(case)
    return sorted(found, key=lambda case: case.id)


def clause_line(case: Case) -> str:
    """The clause of `case` as CONTRACT.md has it."""
    kinds = tuple(kind.name for kind in case.kinds)
    where = _NAMES.get(kinds, ", ".join(kinds))
    promise = " ".join((case.body.__doc__ or "").split())
    return f"- **{case.id}** [{where}] {promise}"
