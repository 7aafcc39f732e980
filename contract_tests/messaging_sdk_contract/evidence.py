"""One JSON line per case run: what was tested, on what, with which outcome."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, Literal

from messaging_sdk.spi import Driver

SDK: Final = "portable-messaging"

Outcome = Literal["pass", "pass_negative", "fail", "not_run"]
OUTCOMES: Final[tuple[Outcome, ...]] = ("pass", "pass_negative", "fail", "not_run")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """One run of one case on one kind. The fields are the JSON object's keys."""

    case: str
    """Clause id; for a case with a parameter also that: "CAP-01.count"."""
    kind: str
    outcome: Outcome
    reason: str = ""
    flags: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The capabilities that the case rests on, with the declared values."""
    measured: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    adapter: str
    profile: str
    server: str
    image: str = ""
    image_digest: str = ""
    sdk: str
    client: str
    suite: str
    seed: int
    started: str
    duration_s: float

    def line(self) -> str:
        """The JSON line, without the line end."""
        return json.dumps(jsonable(dataclasses.asdict(self)), ensure_ascii=False)

    @classmethod
    def parse(cls, line: str) -> Evidence:
        """The inverse of `line`. Raises ValueError for anything else."""
        raw = json.loads(line)
        try:
            return cls(**raw)
        except TypeError as error:
            raise ValueError(f"not an evidence line: {error}") from None


def write(path: Path, lines: Iterable[Evidence]) -> None:
    """Replace `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line.line()}\n" for line in lines), encoding="utf-8")


def read(path: Path) -> list[Evidence]:
    """All lines of `path`. ValueError names the file and the line that is none."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found.append(Evidence.parse(line))
        except ValueError as error:
            raise ValueError(f"{path.name}, line {number}: {error}") from None
    return found


def jsonable(value: Any) -> Any:
    """`value` as what JSON has; an unlimited number as "unlimited"."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return jsonable(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(v) for v in value]
    if isinstance(value, float) and math.isinf(value):
        return "unlimited"
    if isinstance(value, float):
        return round(value, 4)
    if value is None or isinstance(value, (str, int)):
        return value
    return repr(value)


@cache
def suite_hash() -> str:
    """Hash of everything that decides a case's outcome; evidence of another hash is stale."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for path in [*sorted((here / "suites").glob("*.py")), here / "probes.py", here / "lab.py"]:
        text = path.read_text(encoding="utf-8")
        digest.update(path.name.encode() + b"\0" + text.encode() + b"\0")
    return f"sha256:{digest.hexdigest()}"


def versions(driver: type[Driver] | None) -> tuple[str, str]:
    """(version of the SDK, "client 1.2.3" of the driver's client library)."""
    client = driver.client if driver is not None else ""
    return _version(SDK), f"{client} {_version(client)}".strip() if client else ""


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


# --- telling -------------------------------------------------------------------------------------

_COLUMNS: Final[Mapping[Outcome, str]] = {
    "pass": "passed",
    "pass_negative": "refused as promised",
    "fail": "failed",
    "not_run": "not run",
}


def summary(lines: Sequence[Evidence]) -> list[str]:
    """What the terminal shows at the end: cases per kind, and every reason not to run one."""
    if not lines:
        return []
    tally: dict[str, Counter[str]] = defaultdict(Counter)
    reasons: dict[str, list[str]] = defaultdict(list)
    for line in lines:
        tally[line.kind][line.outcome] += 1
        if line.outcome == "not_run":
            reasons[line.reason].append(f"{line.case}[{line.kind}]")
    first = lines[0]
    shown = ["", f"messaging contract: {first.adapter} / {first.profile} ({first.server})"]
    shown.append(f"  {'kind':<14}" + "".join(f"  {_COLUMNS[o]}" for o in OUTCOMES))
    for kind, counts in tally.items():
        cells = (f"  {counts[o]:>{len(_COLUMNS[o])}}" for o in OUTCOMES)
        shown.append(f"  {kind:<14}" + "".join(cells))
    if reasons:
        shown.append("  not run, and therefore not proven:")
    for reason, which in sorted(reasons.items(), key=lambda item: -len(item[1])):
        some = ", ".join(which[:4]) + (f" and {len(which) - 4} more" if len(which) > 4 else "")
        shown.append(f"    {len(which)} x {reason}: {some}")
    ran = sum(1 for line in lines if line.outcome != "not_run")
    shown.append(f"live cases {first.adapter} {first.profile} ({first.server}): {ran}")
    return shown
