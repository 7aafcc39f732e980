"""What stands behind `messaging contract`, `doubles`, `flips` and `matrix`."""

from __future__ import annotations

import contextlib
import io
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from messaging_sdk.capabilities import FLAGS, NOTHING

from . import matrix as cells
from .discovery import all_profiles, checked_profile, harness_class
from .driving import drive
from .evidence import read, summary
from .harness import Harness
from .lab import KINDS, Lab
from .parallel import run_kinds

if TYPE_CHECKING:
    from .plugin import Run

HERE: Final = Path(__file__).parent
USAGE: Final = 2
PROCESSES: Final = 6
"""Doubles tried at once: a case waits nine tenths of its time, so two cores take six."""

LIVE_FLIPS: Final = ("count", "release", "ttl", "dedup_s", "route_error", "backlog", "groups", "replay", "lag")
"""Flags that are measured within seconds on any broker; memory flips every flag."""
BEYOND: Final = ("fsync", "quorum")
"""Values of ok_means that only a power cut could tell from page_cache: a flip to one goes unnoticed."""


def contract(
    adapter: str,
    profile: str | None = None,
    cases: str | None = None,
    kinds: str | None = None,
    evidence: Path | str | None = None,
    propose: bool = False,
    pytest_args: Sequence[str] = (),
) -> int:
    """Run the suite on one profile of an adapter, or on "all"; return the worst exit code.

    A whole run takes one process per kind. `evidence` is a folder; each profile writes
    `<adapter>-<profile>.jsonl` in it.
    """
    try:
        harness = harness_class(adapter)
        profiles = harness.profiles if profile == "all" else [checked_profile(harness, profile)]
    except LookupError as error:
        print(error, file=sys.stderr)
        return USAGE
    if evidence is not None and (cases or kinds or pytest_args):
        print("evidence is written by whole runs: leave the filters out", file=sys.stderr)
        return USAGE
    if propose:
        return max(_propose(harness(name)) for name in profiles)
    worst = 0
    for name in profiles:
        args = ["--messaging-profile", name, *pytest_args]
        if cases or kinds or pytest_args:
            args += ["--messaging-cases", cases] if cases else []
            args += ["--messaging-kinds", kinds] if kinds else []
            worst = max(worst, int(pytest.main(_arguments(adapter, args))))
        else:
            worst = max(worst, _whole(adapter, name, args, evidence))
    return worst


def _whole(adapter: str, profile: str, args: Sequence[str], folder: Path | str | None) -> int:
    """All kinds side by side, and at the end what they gave together."""
    at_once = harness_class(adapter).at_once
    print(f"{adapter} / {profile}: one process and one broker per kind of destination, {at_once} at once", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch if folder is None else folder, f"{adapter}-{profile}.jsonl")
        code = run_kinds([kind.name for kind in KINDS], _arguments(adapter, args), file, at_once)
        lines = read(file) if file.exists() else []
    print("\n".join(summary(lines)))
    return code


def _arguments(adapter: str, more: Sequence[str]) -> list[str]:
    return [
        "-c",
        str(HERE / "kit.ini"),
        "--rootdir",
        str(HERE),
        "-p",
        "messaging_sdk_contract.plugin",
        "-p",
        "no:cacheprovider",
        "--tb=short",
        "--pyargs",
        "messaging_sdk_contract.suites",
        "--messaging-adapter",
        adapter,
        *more,
    ]


def _propose(harness: Harness) -> int:
    """Print a Capabilities(...) per kind, with what was measured."""
    from .probes import propose

    harness.start()
    try:
        for kind in KINDS:
            found = drive(_measured(Lab(harness, kind, random.randrange(1 << 32))), limit_s=600)
            print(f"# {harness.name} / {harness.profile} / {kind.name}")
            print("Capabilities(")
            for flag, value in found.items():
                unknown = isinstance(value, str) and value.startswith("? ")
                print(f"    # {flag}: {value[2:]}" if unknown else f"    {flag}={value!r},")
            print(")")
    finally:
        harness.stop()
    del propose
    return 0


async def _measured(lab: Lab) -> Mapping[str, Any]:
    from .probes import propose

    try:
        return await propose(lab)
    finally:
        await lab.close()


# --- the suite on trial --------------------------------------------------------------------------


class _Recorder:
    """A pytest plugin that keeps the session's Run."""

    run: Run | None = None

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        from .plugin import run_of

        self.run = run_of(session.config)


def _silently(adapter: str, args: Sequence[str]) -> tuple[Run, str]:
    """Run pytest without a word; return what it found and what it said. Raises RuntimeError if it broke."""
    recorder, said = _Recorder(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = pytest.main(_arguments(adapter, ["-q", *args]), plugins=[recorder])
    if recorder.run is None or int(code) > 1:
        raise RuntimeError(f"pytest ended with {int(code)}:\n{said.getvalue()[-3000:]}")
    return recorder.run, said.getvalue()


def doubles() -> int:
    """Run the suite against every flawed double; each must fail at a clause that is meant to catch it.

    The honest adapter must pass all those clauses. Several processes, because most of it is waiting.
    """
    from .doubles import DOUBLES

    os.environ.setdefault("MESSAGING_CONTRACT_PATIENCE_S", "10")  # a double often fails by what never comes
    began, survived = time.monotonic(), 0
    honest = {(d.profile, c.split(".")[0].split("-")[0]): set[str]() for d in DOUBLES for c in d.clauses}
    for profile, family in honest:
        honest[profile, family] = {
            c for d in DOUBLES for c in d.clauses if d.profile == profile and c.startswith(family)
        }
    width = max(len(d.name) for d in DOUBLES)
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool:
        passing = [pool.submit(_honest, profile, ",".join(sorted(clauses))) for (profile, _), clauses in honest.items()]
        verdicts = [pool.submit(_verdict, d.name) for d in DOUBLES]
        for flawed, verdict in zip(DOUBLES, verdicts, strict=True):
            caught, text = verdict.result()
            survived += not caught
            print(f"{flawed.name:<{width}}  {text}", flush=True)
        failures = [text for job in passing if (text := job.result())]
    for text in failures:
        print(f"the honest memory adapter fails: {text}")
    total = len(DOUBLES)
    print(f"the honest adapter {'fails' if failures else 'passes'} all of these clauses")
    print(f"in {time.monotonic() - began:.0f} s")
    print(f"{total} doubles, {total - survived} caught, {survived} survived")
    return 1 if survived or failures else 0


def _honest(profile: str, clauses: str) -> str:
    """What the honest adapter fails of `clauses`; empty if nothing."""
    run, _ = _silently("memory", ["--messaging-cases", clauses, "--messaging-profile", profile])
    return "; ".join(f"{line.case}[{line.kind}] {line.reason}" for line, _ in run.failures)


def _verdict(name: str) -> tuple[bool, str]:
    """Was the double caught, and by which clause with which words?"""
    from .doubles import double

    flawed = double(name)
    args = ["--messaging-double", name, "--messaging-cases", ",".join(flawed.clauses)]
    run, _ = _silently("memory", [*args, "--messaging-profile", flawed.profile, "--maxfail=1"])
    for line, error in run.failures:
        if _is_verdict(error):
            return True, f"{line.case} [{line.kind}]  {line.reason[:100]}"
    wrong = "; ".join(f"{line.case}: {line.reason}" for line, _ in run.failures)
    return False, f"SURVIVED {', '.join(flawed.clauses)} {wrong}"


def _is_verdict(error: type[BaseException] | None) -> bool:
    """Did the case judge (an assertion, or an error of the SDK that it did not expect), or break?"""
    from messaging_sdk import MessagingError

    return error is not None and issubclass(
        error, (AssertionError, MessagingError, TimeoutError, pytest.fail.Exception)
    )


def flips(adapter: str, profile: str | None = None) -> int:
    """Declare every neighbouring value of every flag and demand that CAP-01 fails on every kind.

    On a live adapter only LIVE_FLIPS, in one profile. A flag is flipped in every profile up to the
    first that measures a promise of it wholly; one that no profile measures counts as survived.
    """
    try:
        harness = harness_class(adapter)
        profiles = [checked_profile(harness, profile)] if profile else all_profiles(harness)
    except LookupError as error:
        print(error, file=sys.stderr)
        return USAGE
    in_process = adapter == "memory"
    flags = list(FLAGS if in_process else LIVE_FLIPS)
    profiles = profiles if in_process else profiles[:1]
    began = time.monotonic()
    with _workers(PROCESSES if in_process else 0) as map_all:
        honest = list(map_all(partial(_measured_honestly, adapter, flags), profiles))
        planned: list[_Flip] = []
        for name, (values, wrong) in zip(profiles, honest, strict=True):
            if wrong:
                print(f"{adapter} / {name} fails as it is: {wrong}")
                return 1
            planned += [flip for flag in flags for flip in _planned(name, flag, values[flag])]
            # where a flag was wholly measured and promises something, other profiles add nothing
            flags = [f for f in flags if all(v in NOTHING for v in values[f].values())]
        flags = [flag for flag in flags if flag not in {flip.flag for flip in planned}]
        total = sum(len(flip.kinds) for flip in planned) + len(flags)
        survived = len(flags)
        for flip, missed in zip(planned, map_all(partial(_unnoticed, adapter), planned), strict=True):
            survived += len(missed)
            verdict = f"SURVIVED on {', '.join(missed)}" if missed else "caught"
            what, where = f"{flip.flag}={flip.value}", f"{adapter} / {flip.profile}, {len(flip.kinds)} kinds"
            print(f"{what:<28} {where:<30} {verdict}", flush=True)
    for flag in flags:
        print(f"{adapter} / {flag}: SURVIVED, no profile measures it")
    print(
        f"{adapter}: {total} flips, {total - survived} caught, {survived} survived, in {time.monotonic() - began:.0f} s"
    )
    return 1 if survived else 0


@contextmanager
def _workers(processes: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """A `map` over that many processes; the plain one for 0, where each run has a broker to boot."""
    if not processes:
        yield map
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield pool.map


@dataclass(frozen=True, slots=True)
class _Flip:
    profile: str
    flag: str
    value: str
    kinds: tuple[str, ...]
    """Where the honest adapter declares a neighbour of `value`."""


def _planned(profile: str, flag: str, honest: Mapping[str, Any]) -> list[_Flip]:
    from .flips import alternatives

    values = dict.fromkeys(v for have in honest.values() for v in alternatives(flag, have))
    return [
        _Flip(
            profile,
            flag,
            value,
            tuple(kind for kind, have in honest.items() if value in alternatives(flag, have)),
        )
        for value in values
        if value not in BEYOND
    ]


def _measured_honestly(adapter: str, flags: Sequence[str], profile: str) -> tuple[dict[str, dict[str, Any]], str]:
    """Per flag the declared value on each kind where it was wholly measured; and what failed, if anything."""
    chosen = ",".join(f"CAP-01.{flag}" for flag in flags)
    run, _ = _silently(adapter, ["--messaging-profile", profile, "--messaging-cases", chosen])
    found: dict[str, dict[str, Any]] = {flag: {} for flag in flags}
    for line in run.evidence:
        if line.outcome.startswith("pass") and "partly" not in line.measured:
            flag = line.case.removeprefix("CAP-01.")
            found[flag][line.kind] = getattr(run.capabilities[line.kind], flag)
    wrong = "; ".join(f"{line.case}[{line.kind}] {line.reason}" for line, _ in run.failures)
    return found, wrong


def _unnoticed(adapter: str, flip: _Flip) -> list[str]:
    """The kinds on which CAP-01 did not fail by its own judgement with the flipped declaration."""
    run, _ = _silently(
        adapter,
        [
            *("--messaging-profile", flip.profile),
            *("--messaging-flip", f"{flip.flag}={flip.value}"),
            *("--messaging-cases", f"CAP-01.{flip.flag}"),
            *("--messaging-kinds", ",".join(flip.kinds)),
        ],
    )
    caught = {line.kind for line, error in run.failures if _is_verdict(error)}
    return [kind for kind in flip.kinds if kind not in caught]


# --- the matrix ----------------------------------------------------------------------------------


def matrix(evidence_dir: Path | str, format: str = "markdown", why: str | None = None) -> str:
    """The capability matrix of the evidence as "markdown" or "json"; with why="adapter:flag" its reasons."""
    try:
        folded = cells.fold(cells.load(Path(evidence_dir)))
        if why is not None:
            adapter, _, flag = why.partition(":")
            return cells.why(folded, adapter, flag)
    except (FileNotFoundError, LookupError, ValueError) as error:
        return str(error)
    return cells.as_json(folded) if format == "json" else cells.markdown(folded)
