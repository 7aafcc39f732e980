"""Folds evidence lines into a capability matrix: a cell says what was measured, not what was claimed."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from messaging_sdk.capabilities import FLAGS, NOTHING

from .evidence import Evidence, read, suite_hash
from .lab import KINDS

FRESH: Final = timedelta(days=90)
"""Brokers get a release about every quarter; what was measured before says little about today's."""


class State(StrEnum):
    """How far a cell can be believed. The order is the order of strength, weakest first."""

    CONTRADICTED = "contradicted"  # declared and measured differ, or a case of the flag failed
    STALE = "stale"  # measured by another suite, or too long ago
    UNVERIFIED = "unverified"  # declared, and no case could be run
    NO = "no"  # declared as absent, and the absence was proven
    YES = "yes"  # declared, and proven


_MARKS: Final[Mapping[State, str]] = {
    State.CONTRADICTED: " ✗",
    State.STALE: " (stale)",
    State.UNVERIFIED: " ?",
    State.NO: "",
    State.YES: " ✓",
}


@dataclass(frozen=True, slots=True, order=True)
class Column:
    """An emulator or another version of a server is another column, never merged."""

    adapter: str
    profile: str
    server: str
    kind: str


@dataclass(slots=True)
class Cell:
    """One flag in one column, and the lines it rests on."""

    state: State
    value: Any
    lines: list[Evidence] = field(default_factory=list)

    def text(self) -> str:
        return _shown(self.value) + _MARKS[self.state]


Matrix = dict[Column, dict[str, Cell]]


def load(folder: Path) -> list[Evidence]:
    """Every line of every evidence file in `folder`. FileNotFoundError if there is none."""
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise FileNotFoundError(f"no evidence in {folder}; `messaging contract <adapter> --evidence {folder}` makes it")
    return [line for file in files for line in read(file)]


def fold(lines: Iterable[Evidence], *, now: datetime | None = None, suite: str = "") -> Matrix:
    """The matrix of `lines`. A cell's own case is CAP-01.<flag>; others can only weaken it."""
    now = now or datetime.now(UTC)
    suite = suite or suite_hash()
    grouped: dict[Column, dict[str, list[Evidence]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        column = Column(line.adapter, line.profile, line.server, line.kind)
        for flag in line.flags:
            grouped[column][flag].append(line)
    return {
        column: {flag: _cell(flag, by_flag[flag], now, suite) for flag in FLAGS if flag in by_flag}
        for column, by_flag in sorted(grouped.items(), key=lambda item: _place(item[0]))
    }


def _place(column: Column) -> tuple[Any, ...]:
    names = [kind.name for kind in KINDS]
    return column.adapter, column.profile, column.server, names.index(column.kind)


def _cell(flag: str, lines: list[Evidence], now: datetime, suite: str) -> Cell:
    own = [line for line in lines if line.case == f"CAP-01.{flag}"]
    declared = lines[0].flags[flag]
    ran = [line for line in own if line.outcome != "not_run"]
    value = ran[0].measured.get("value", declared) if ran else declared
    return Cell(_state(declared, own, lines, now, suite), value, lines)


def _state(declared: Any, own: list[Evidence], lines: list[Evidence], now: datetime, suite: str) -> State:
    if any(line.outcome == "fail" for line in lines):
        return State.CONTRADICTED
    if any(_is_stale(line, now, suite) for line in lines):
        return State.STALE
    if not own or any(line.outcome == "not_run" for line in own):
        return State.UNVERIFIED
    return State.NO if declared in NOTHING else State.YES


def _is_stale(line: Evidence, now: datetime, suite: str) -> bool:
    return line.suite != suite or now - datetime.fromisoformat(line.started) > FRESH


# --- showing -------------------------------------------------------------------------------------


def markdown(matrix: Matrix) -> str:
    """One table per adapter, profile and server: flags down, kinds across."""
    tables: dict[tuple[str, str, str], list[Column]] = defaultdict(list)
    for column in matrix:
        tables[column.adapter, column.profile, column.server].append(column)
    parts = []
    for (adapter, profile, server), columns in tables.items():
        day = max(line.started for c in columns for cell in matrix[c].values() for line in cell.lines)
        parts.append(f"**{adapter}** / {profile} ({server}), measured {day[:10]}\n")
        parts.append(_table(matrix, columns))
    parts.append(
        "✓ proven; no mark: its absence is proven; ? declared, could not be measured here; "
        "✗ contradicted; (stale): measured by an older suite or over 90 days ago.\n"
    )
    return "\n".join(parts)


def _table(matrix: Matrix, columns: Sequence[Column]) -> str:
    rows = [["", *(c.kind for c in columns)]]
    for flag in FLAGS:
        cells = [matrix[c].get(flag) for c in columns]
        if any(cells):
            rows.append([flag, *(cell.text() if cell is not None else "" for cell in cells)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(t.ljust(w) for t, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines) + "\n"


def as_json(matrix: Matrix) -> str:
    """The same as one JSON document, for tools."""
    return json.dumps(
        [
            {
                "adapter": column.adapter,
                "profile": column.profile,
                "server": column.server,
                "kind": column.kind,
                "flags": {flag: {"value": cell.value, "state": cell.state} for flag, cell in cells.items()},
            }
            for column, cells in matrix.items()
        ],
        indent=1,
    )


def why(matrix: Matrix, adapter: str, flag: str) -> str:
    """The cases behind the cells of one flag of one adapter. LookupError if there are none."""
    lines = []
    for column, cells in matrix.items():
        if column.adapter != adapter or flag not in cells:
            continue
        cell = cells[flag]
        lines.append(f"{adapter} / {column.profile} / {column.kind} ({column.server}): {cell.text()}")
        for line in sorted(cell.lines, key=lambda line: line.case):
            reason = f": {line.reason}" if line.reason else ""
            lines.append(f"  {line.case:<18} {line.outcome:<13} {line.started[:10]}{reason}")
    if not lines:
        known = sorted({column.adapter for column in matrix})
        raise LookupError(f"no evidence for {flag!r} of {adapter!r}; there is some for {known}")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if value is True or value is False:
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return f"{value['charset']}, {value['max_count']} / {_size(value['max_bytes'])}"
    if isinstance(value, int) and value >= 1024:
        return _size(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _size(size_bytes: int) -> str:
    for unit, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if size_bytes >= unit:
            return f"{size_bytes / unit:.4g} {name}"
    return f"{size_bytes} B"
