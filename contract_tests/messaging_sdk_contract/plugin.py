"""The opt-in pytest plugin that runs the contract cases on one backend and keeps the evidence.

Load it with `-p messaging_sdk_contract.plugin`; nothing loads it by itself. It drives the cases'
coroutines, so no other asyncio plugin is needed and none can get in between.
"""

from __future__ import annotations

import random
import sys
import time
import zlib
from collections.abc import Generator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, cast

import pytest

pytest.register_assert_rewrite("messaging_sdk_contract.probes", "messaging_sdk_contract.suites")

from messaging_sdk import Capabilities  # noqa: E402
from messaging_sdk.config import from_mapping  # noqa: E402
from messaging_sdk.registry import driver_class, register  # noqa: E402
from messaging_sdk.spi import Driver  # noqa: E402

from .cases import Case, case_of  # noqa: E402
from .discovery import checked_profile, harness_class, harness_names  # noqa: E402
from .driving import drive  # noqa: E402
from .evidence import Evidence, Outcome, suite_hash, summary, versions, write  # noqa: E402
from .harness import Environment, Harness  # noqa: E402
from .lab import KINDS, Kind, Lab, NotRun, refusal_of  # noqa: E402

_RUN: Final = pytest.StashKey["Run"]()
_LAB: Final = pytest.StashKey[Lab]()
_STARTED: Final = pytest.StashKey[tuple[str, float]]()


class Run:
    """One session of the kit: one harness, started once, and what every case gave."""

    def __init__(self, harness: Harness, seed: int, double: str | None, flip: str | None) -> None:
        self.harness = harness
        self.seed = seed
        self.environment: Environment | None = None
        self.capabilities: dict[str, Capabilities] = {}
        self.evidence: list[Evidence] = []
        self.failures: list[tuple[Evidence, type[BaseException] | None]] = []
        self.driver: type[Driver] | None = None
        self._double = double
        self._flip = flip
        self._swapped: tuple[str, type[Driver]] | None = None

    def start(self) -> Environment:
        """Bring the backend up and ask it once what it promises for every kind."""
        self.harness.start()
        self._find_driver()
        drive(self._ask(), limit_s=60)
        self.environment = environment = self.harness.environment()
        return environment

    def stop(self) -> None:
        self.harness.stop()
        if self._swapped is not None:
            register(*self._swapped)

    def _find_driver(self) -> None:
        """Look the adapter up; put a double or another declaration in its place, if asked to."""
        from .flips import flipped, parse_flip

        table = {"backends": {"test": dict(self.harness.backend())}, "routes": {"*": "test"}}
        scheme = from_mapping(table).backends["test"].address.scheme
        honest = self.driver = driver_class(scheme)
        if self._double:
            from .doubles import double

            self.driver = double(self._double).driver
        if self._flip:
            from .flips import flipped, parse_flip

            self.driver = flipped(self.driver, *parse_flip(self._flip))
        if self.driver is not honest:
            self._swapped = scheme, honest
            register(scheme, self.driver)

    async def _ask(self) -> None:
        for kind in KINDS:
            lab = Lab(self.harness, kind, self.seed)
            try:
                self.capabilities[kind.name] = await lab.capabilities()
            finally:
                await lab.close()

    def refusal(self, kind: Kind) -> str:
        """Why the adapter refuses `kind`; empty if it does not."""
        return refusal_of(self.capabilities[kind.name], kind)


# --- options -------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("messaging", "messaging_sdk contract kit")
    option = group.addoption
    option("--messaging-adapter", metavar="NAME", help=f"adapter: {', '.join(harness_names())}")
    option("--messaging-profile", metavar="NAME", help="one of the harness's profiles")
    option("--messaging-kinds", metavar="LIST", help="such as queue,topic/ordered")
    option("--messaging-cases", metavar="LIST", help="ids or families: DEL-01,ACK,CAP-01.count")
    option("--messaging-seed", type=int, metavar="N", help="of the random numbers; default random")
    option("--messaging-evidence", metavar="FILE", help="write a JSON line per case run")
    option("--messaging-double", metavar="NAME", help="test a flawed memory driver")
    option("--messaging-flip", metavar="FLAG=VALUE", help="declare another value of one flag")


def pytest_configure(config: pytest.Config) -> None:
    get = config.getoption
    adapter = get("--messaging-adapter")
    if adapter is None:
        return  # cases are skipped, so that a user's own test run may load the plugin
    if get("--messaging-evidence") and get("--messaging-cases"):
        raise pytest.UsageError("--messaging-evidence is for whole runs: not with --messaging-cases")
    try:
        found = harness_class(adapter)
        harness = found(checked_profile(found, get("--messaging-profile")))
    except LookupError as error:
        raise pytest.UsageError(str(error)) from None
    seed = get("--messaging-seed")
    if seed is None:
        seed = random.SystemRandom().randrange(1 << 32)
    run = Run(harness, seed, get("--messaging-double"), get("--messaging-flip"))
    config.stash[_RUN] = run
    config.pluginmanager.register(_Session(config, run), "messaging-contract-session")


def run_of(config: pytest.Config) -> Run | None:
    """The run of this session, None without --messaging-adapter."""
    return config.stash.get(_RUN, None)


def pytest_report_header(config: pytest.Config) -> str | None:
    run = run_of(config)
    if run is None:
        return None
    return f"messaging contract: {run.harness.name} / {run.harness.profile}, seed {run.seed}"


# --- collecting ----------------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    found = case_of(metafunc.function)
    if found is not None:
        names = [kind.name for kind in found.kinds]
        metafunc.parametrize("lab", found.kinds, ids=names, indirect=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if _case(item) is not None:
            # Beats a user's filterwarnings=error: a warning of a client library is no verdict.
            item.add_marker(pytest.mark.filterwarnings("default"))
    chosen = _words(config.getoption("--messaging-cases"))
    kinds = _words(config.getoption("--messaging-kinds"))
    if not chosen and not kinds:
        return
    kept: list[pytest.Item] = []
    dropped: list[pytest.Item] = []
    for item in items:
        (kept if _wanted(item, chosen, kinds) else dropped).append(item)
    if not kept:
        raise pytest.UsageError(f"no case matches {', '.join([*chosen, *kinds])}")
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)


def _words(text: str | None) -> list[str]:
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def _wanted(item: pytest.Item, chosen: Sequence[str], kinds: Sequence[str]) -> bool:
    found = _case(item)
    if found is None:
        return False
    if kinds and _kind(item).name not in kinds:
        return False
    return not chosen or any(w in (found.family, found.id, _case_id(item)) for w in chosen)


def _case(item: pytest.Item) -> Case | None:
    return case_of(getattr(item, "function", None))


def _kind(item: pytest.Item) -> Kind:
    return cast(Kind, cast(Any, item).callspec.params["lab"])


def _flag(item: pytest.Item) -> str | None:
    flag = cast(Any, item).callspec.params.get("flag")
    return flag if isinstance(flag, str) else None


def _case_id(item: pytest.Item) -> str:
    found = _case(item)
    assert found is not None
    flag = _flag(item)
    return f"{found.id}.{flag}" if flag is not None else found.id


# --- running -------------------------------------------------------------------------------------


@pytest.fixture
def lab(request: pytest.FixtureRequest) -> Lab:
    """The workplace of one case on one kind; closed by the plugin inside the case's own loop."""
    run = run_of(request.config)
    if run is None:
        pytest.skip("no --messaging-adapter given")
    found, kind = _case(request.node), cast(Kind, request.param)
    assert found is not None, "the lab fixture is for functions decorated with @case"
    _start_once(request.config, run)
    for fault in found.faults:
        if fault not in run.harness.faults:
            pytest.skip(f"the {run.harness.name} harness cannot provoke {fault!r}")
    refusal = run.refusal(kind)
    if refusal and not found.refusal:
        pytest.skip(f"{kind.name} is refused, which CAP-02 proves: {refusal}")
    made = Lab(run.harness, kind, zlib.crc32(f"{run.seed}/{request.node.name}".encode()))
    request.node.stash[_LAB] = made
    return made


def _start_once(config: pytest.Config, run: Run) -> None:
    if run.environment is not None:
        return
    name = f"{run.harness.name} / {run.harness.profile}"
    _say(config, f"\nmessaging contract: starting {name} ...")
    began = time.monotonic()
    try:
        environment = run.start()
    except Exception as error:
        run.stop()
        pytest.exit(f"{name} did not start: {error!r}", returncode=3)
    took = time.monotonic() - began
    _say(config, f"messaging contract: {environment.server} is up after {took:.1f} s\n")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    found = _case(pyfuncitem)
    if found is None:
        return None
    made = pyfuncitem.stash[_LAB]
    names = pyfuncitem._fixtureinfo.argnames
    arguments = {name: pyfuncitem.funcargs[name] for name in names}

    async def main() -> None:
        await found.body(**arguments)
        made.judge()

    def complain(text: str) -> None:
        pyfuncitem.add_report_section("call", "event loop", text)

    try:
        drive(main(), limit_s=found.limit_s, cleanup=made.close, complain=complain)
    except NotRun as reason:
        pytest.skip(str(reason))
    return True


class _Session:
    """The hooks that exist only when an adapter is under test."""

    def __init__(self, config: pytest.Config, run: Run) -> None:
        self._config = config
        self._run = run

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        item.stash[_STARTED] = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if _case(item) is not None and (call.when == "call" or not report.passed):
            error = call.excinfo
            self._record(item, report, error.type if error is not None else None)
            if report.failed:
                report.sections.append(("seed", f"--messaging-seed {self._run.seed}"))
        return report

    def _record(self, item: pytest.Item, report: pytest.TestReport, error: type[BaseException] | None) -> None:
        found, run = _case(item), self._run
        assert found is not None
        made = item.stash.get(_LAB, None)
        kind, flag = _kind(item), _flag(item)
        declared = run.capabilities.get(kind.name)
        flags = (flag,) if flag is not None else found.flags
        outcome: Outcome = "fail"
        if report.skipped:
            outcome = "not_run"
        elif report.passed:
            outcome = "pass_negative" if made is not None and made.negative else "pass"
        environment = run.environment or Environment("")
        sdk, client = versions(run.driver)
        started, began = item.stash[_STARTED]
        line = Evidence(
            case=_case_id(item),
            kind=kind.name,
            outcome=outcome,
            reason=_reason(report),
            flags={name: getattr(declared, name, None) for name in flags},
            measured=dict(made.measured) if made is not None else {},
            adapter=run.harness.name,
            profile=run.harness.profile,
            server=environment.server,
            image=environment.image,
            image_digest=environment.image_digest,
            sdk=sdk,
            client=client,
            suite=suite_hash(),
            seed=run.seed,
            started=started,
            duration_s=round(time.monotonic() - began, 3),
        )
        run.evidence.append(line)
        if outcome == "fail":
            run.failures.append((line, error))

    def pytest_sessionfinish(self) -> None:
        if self._run.environment is not None:
            self._run.stop()
        file = self._config.getoption("--messaging-evidence")
        if file and self._run.evidence:
            write(Path(file), self._run.evidence)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for line in summary(self._run.evidence):
            terminalreporter.write_line(line)


def _reason(report: pytest.TestReport) -> str:
    if report.skipped and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        return str(crash.message if crash is not None else report.longrepr).split("\n")[0][:300]
    return ""


# --- telling -------------------------------------------------------------------------------------


def _say(config: pytest.Config, text: str) -> None:
    """A progress line past pytest's capturing, so that a starting broker does not look like a hang."""
    capture: Any = config.pluginmanager.getplugin("capturemanager")
    if capture is None:
        print(text, file=sys.stderr, flush=True)
        return
    with capture.global_and_fixture_disabled():
        print(text, file=sys.stderr, flush=True)
