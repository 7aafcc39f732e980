"""CAP: what is declared is what happens, and what is not declared is refused before anything is sent."""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import pytest

from messaging_sdk import (
    Bus,
    CapabilityError,
    ConfigError,
    ConnectError,
    Delivery,
    Destination,
    HeaderRules,
    InvalidMessage,
    Level,
    MessagingError,
    Needs,
    Outcome,
    Queue,
    Reject,
    Retry,
    Signal,
    Topic,
)
from messaging_sdk.capabilities import FLAGS, NOTHING
from messaging_sdk.config import from_mapping

from ..cases import FAULT_LIMIT_S, SETTLED, case
from ..lab import Kind, Lab, eventually, key_before_colon, refusal_of
from ..probes import PROBES, agree
from . import dialled_by, driver_class_of, real, silence

OPTIONS: Final[Mapping[str, Mapping[str, Any]]] = {
    "delay": {"delay": 0.2},
    "ttl": {"ttl": 60.0},
    "priority": {"priority": 1},
    "headers": {"headers": {"x": "v"}},
}
"""What asks for a flag in one publish."""


@case("CAP-01", refusal=True, limit_s=FAULT_LIMIT_S)
@pytest.mark.parametrize("flag", FLAGS)
async def test_cap_01_the_declared_value_is_the_measured_one(lab: Lab, flag: str) -> None:
    """What the adapter declares for a flag is what is measured: neither more nor less."""
    capabilities = await lab.capabilities()
    if "tag" in capabilities.notes:
        lab.not_run(f"{lab.kind.name} is refused, which CAP-02 proves: {capabilities.notes['tag']}")
    declared = getattr(capabilities, flag)
    measured = await PROBES[flag](lab)
    lab.measured["value"] = measured
    if flag in ("order_redelivery", "order_competition") and measured and not (declared or lab.kind.ordered):
        lab.not_run("an unordered destination that happens to keep order is luck, no promise")
    if capabilities.level(flag) is Level.BEST_EFFORT and measured not in NOTHING and declared in NOTHING:
        lab.not_run(f"best effort, no promise: {capabilities.notes.get(flag, 'without a reason')}")
    assert agree(flag, declared, measured), f"{flag}: declared {declared!r}, measured {measured!r}"
    if declared in NOTHING:
        lab.refused()


@case("CAP-02", refusal=True)
async def test_cap_02_what_cannot_be_kept_is_refused_before_any_io(lab: Lab) -> None:
    """All unmet needs of all destinations come in one CapabilityError, before the backend is dialled."""
    destination = lab.destination()
    settings = from_mapping(lab.harness.settings())
    before_open = driver_class_of(lab)(
        settings.backends["test"].address,
        driver_class_of(lab).Options.model_validate(settings.backends["test"].options),
        {},
    ).capabilities(destination)
    known_before = bool(refusal_of(before_open, lab.kind))
    refused = bool(refusal_of(await lab.capabilities(), lab.kind))
    needs = None if refused else Needs(max_body=1 << 50, dedup_s=1e12)
    if not refused and not lab.kind.settles:
        lab.not_run("a Signal has no needs that this backend refuses")
    bus = lab.bus(needs=needs)
    bus.declare(destination)
    with dialled_by(lab) as dialled, pytest.raises(CapabilityError) as caught:
        await bus.open()
    assert all(item.destination == destination.name and item.remedy for item in caught.value.unmet)
    if refused:
        assert known_before or dialled, "the refusal came from nowhere"
        assert not (known_before and dialled), "a refusal known beforehand came after dialling"
    else:
        assert not dialled, "the backend was dialled before the needs were checked"
        flags = {item.need.partition("=")[0] for item in caught.value.unmet}
        assert flags >= {"max_body", "dedup_s"}, f"not all unmet needs at once: {flags}"
    lab.refused()


@case("CAP-03", kinds=("queue",), refusal=True, limit_s=90.0)
async def test_cap_03_one_script_gives_one_ledger_on_every_backend(lab: Lab) -> None:
    """The same program, unchanged, does the same work on every backend, or is refused as a whole."""
    script = Script(lab)
    refused = [d for d, kind in script.kinds.items() if refusal_of(await _capabilities(lab, d), kind)]
    bus = lab.bus()
    if refused:
        bus.declare(*script.kinds)
        with pytest.raises(CapabilityError) as caught:
            await bus.open()
        names = {item.destination for item in caught.value.unmet}
        assert names == {d.name for d in refused}
        lab.refused()
        return
    ledger = await script.run(bus)
    assert ledger == Script.LEDGER, f"unlike: {ledger - Script.LEDGER}, {Script.LEDGER - ledger}"


@case("CAP-04", kinds=("queue",), refusal=True, limit_s=FAULT_LIMIT_S)
async def test_cap_04_every_refusal_of_a_backend_is_a_typed_error(lab: Lab) -> None:
    """A wrong address, password or option fails as the class that says what to do, with its cause chained."""
    refusals = lab.harness.refusals()
    if not refusals:
        lab.not_run(f"the {lab.harness.name} harness names no address that must be refused")
    for refusal in refusals:
        error = await _open_error(lab, refusal.backend)
        assert isinstance(error, refusal.error), f"{refusal.why}: {error!r}"
        assert str(error), f"{refusal.why}: an error without a text"
        if isinstance(error, ConnectError):
            assert error.__cause__ is not None, f"{refusal.why}: the native error is not chained"
        _assert_hidden(refusal.secret, f"{refusal.why}: the error", "".join(_chain(error)))
    lab.measured["refusals"] = [refusal.why for refusal in refusals]


@case("CAP-05", kinds=("queue",), refusal=True)
async def test_cap_05_no_text_ever_shows_a_secret(lab: Lab) -> None:
    """A password of a URL is in no repr, error, log line or counter, whether the backend takes it or not."""
    secret = "S3cr3t-Pa55w0rd"
    table = dict(lab.harness.backend())
    table.pop("password", None)
    scheme, _, rest = str(table["url"]).partition("://")
    table["url"] = f"{scheme}://shop:{secret}@{rest.rpartition('@')[2]}"
    with _logged() as lines:
        error = await _open_error(lab, table)
        settings = from_mapping(lab.harness.settings(table))
        texts = [repr(settings), str(settings), str(settings.backends["test"].address)]
        if not isinstance(error, ConfigError):
            bus = lab.bus(table)
            texts += [repr(bus), str(bus), repr(vars(bus).get("settings")), repr(bus.promises())]
            texts += [repr(driver) for driver in vars(bus).get("_drivers", {}).values()]
            texts.append(repr(bus.stats(lab.destination())))
    for text in (*texts, *lines, *(_chain(error) if error is not None else ())):
        _assert_hidden(secret, "a text", text)
    for refusal in lab.harness.refusals():
        if refusal.secret:
            with _logged() as lines:
                error = await _open_error(lab, refusal.backend)
            for text in (*lines, *(_chain(error) if error is not None else ())):
                _assert_hidden(refusal.secret, refusal.why, text)


@case("CAP-06")
@pytest.mark.parametrize("flag", sorted(OPTIONS))
async def test_cap_06_an_option_works_or_is_refused_before_it_is_sent(lab: Lab, flag: str) -> None:
    """A publish with an option that is not claimed raises CapabilityError and sends nothing; a claimed one is taken."""
    destination = lab.destination()
    bus = await lab.open_bus()
    claimed = getattr(bus.capabilities(destination), flag) not in NOTHING
    async with lab.collecting(bus, destination) as arrivals:
        if claimed:
            await bus.publish(destination, b"k:option", **OPTIONS[flag])
            await eventually(lambda: arrivals, 10, "a message with a claimed option arrives")
            return
        wrong = (CapabilityError, InvalidMessage) if flag == "headers" else CapabilityError
        with pytest.raises(wrong) as caught:
            await bus.publish(destination, b"k:option", **OPTIONS[flag])
        assert caught.value.outcome is Outcome.REJECTED
        await silence(lab, bus, destination, arrivals)
        assert not real(arrivals), "what was refused has been sent"
    lab.refused()


@case("CAP-07", flags=("headers",))
async def test_cap_07_a_header_arrives_unaltered_or_is_refused(lab: Lab) -> None:
    """Each header that the rules do not cover raises InvalidMessage before it is sent; the next publish works."""
    destination = lab.destination()
    bus = await lab.open_bus()
    rules = bus.capabilities(destination).headers
    if rules is None:
        lab.not_run("no headers here, which CAP-06.headers proves")
    seen: list[Mapping[str, str]] = []
    async with bus.consume(destination, group=lab.group) as stream:
        for headers in _odd_headers(rules):
            try:
                await bus.publish(destination, b"k:x", headers=headers)
            except InvalidMessage as error:
                assert error.outcome is Outcome.REJECTED
                continue
            arrived = await stream.next(10)
            assert arrived is not None, f"{headers!r} was accepted and did not arrive"
            seen.append(arrived.headers)
            assert dict(arrived.headers) == headers
            if isinstance(arrived, Delivery):
                await arrived.ack()
        await bus.publish(destination, b"k:sentinel")
        last = await stream.next(10)
        assert last is not None and last.body == b"k:sentinel", "a refused header was sent"
    lab.measured["unaltered"] = len(seen)


@case("CAP-08", kinds=SETTLED, flags=("release",))
async def test_cap_08_release_works_or_is_refused(lab: Lab) -> None:
    """`release()` gives a delivery back at once where it is claimed, and raises CapabilityError where it is not."""
    destination = lab.destination()
    bus = await lab.open_bus()
    claimed = bus.capabilities(destination).release != "none"
    async with bus.consume(destination, group=lab.group) as stream:
        await bus.publish(destination, b"k:1")
        first = await stream.next(10)
        assert first is not None
        if claimed:
            await first.release()
            again = await stream.next(10)
            assert again is not None and again.id == first.id and again.attempt == 1
            await again.ack()
            return
        with pytest.raises(CapabilityError):
            await first.release()
        await first.ack()
    lab.refused()


# --- CAP-03's program ----------------------------------------------------------------------------


class Script:
    """A queue with a message that fails twice and one that is rejected, a topic with two groups, a signal."""

    LEDGER: Final = Counter(
        {
            ("work", b"k:good", 1): 1,
            ("work", b"k:flaky", 1): 1,
            ("work", b"k:flaky", 2): 1,
            ("work", b"k:flaky", 3): 1,
            ("work", b"k:poison", 1): 1,
            ("dead", b"k:poison", 1): 1,
            ("billing", b"k:news", 1): 1,
            ("audit", b"k:news", 1): 1,
            ("pulse", b"k:beat", 1): 1,
        }
    )

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        name = lab.fresh_name
        self.work: Queue[bytes] = Queue(name("work"), bytes, key=key_before_colon)
        self.news: Topic[bytes] = Topic(name("news"), bytes, groups=("billing", "audit"))
        self.pulse: Signal[bytes] = Signal(name("pulse"), bytes)
        self.kinds: dict[Destination[Any], Kind] = {
            self.work: Kind("queue"),
            self.news: Kind("topic"),
            self.pulse: Kind("signal"),
        }
        for destination in (*self.kinds, self.work.dead_letters()):
            lab.track(destination)
        for group in self.news.groups:
            lab.track(self.news.dead_letters(group))

    async def run(self, bus: Bus) -> Counter[tuple[str, bytes, int]]:
        ledger: Counter[tuple[str, bytes, int]] = Counter()

        @bus.on(self.work, retry=Retry(5, "20ms"))
        async def work(body: bytes, delivery: Delivery[bytes]) -> None:
            ledger["work", body, delivery.attempt] += 1
            if body == b"k:flaky" and delivery.attempt < 3:
                raise ValueError("not yet")
            if body == b"k:poison":
                raise Reject("never")

        @bus.on(self.work.dead_letters())
        async def dead(body: bytes) -> None:
            ledger["dead", body, 1] += 1

        def reading(group: str) -> Callable[[bytes], Awaitable[None]]:
            async def read(body: bytes) -> None:
                ledger[group, body, 1] += 1

            return read

        for group in self.news.groups:
            bus.on(self.news, group=group)(reading(group))

        @bus.on(self.pulse)
        async def beat(body: bytes) -> None:
            ledger["pulse", body, 1] += 1

        await bus.open()
        async with bus.consuming():
            for body in (b"k:good", b"k:flaky", b"k:poison"):
                await bus.publish(self.work, body)
            await bus.publish(self.news, b"k:news")
            await bus.publish(self.pulse, b"k:beat")
            await eventually(lambda: ledger.total() >= self.LEDGER.total(), 20, "the script's end")
            await asyncio.sleep(self._lab.harness.quiet_s)
        return ledger


# --- helpers -------------------------------------------------------------------------------------


async def _capabilities(lab: Lab, destination: Destination[Any]) -> Any:
    return (await lab.driver()).capabilities(destination)


async def _open_error(lab: Lab, backend: Mapping[str, Any]) -> MessagingError | None:
    """What opening a bus on `backend` raises within 15 s; None if it opens."""
    try:
        async with asyncio.timeout(15):
            bus = lab.bus(backend, timeout_s=10)
            bus.declare(lab.destination())
            await bus.open()
    except MessagingError as error:
        return error
    return None


def _chain(error: BaseException) -> list[str]:
    """The error and all that led to it, as a user's log would show it."""
    return [*traceback.format_exception(error), repr(error)]


def _assert_hidden(secret: str, where: str, text: str) -> None:
    assert not secret or secret not in text, f"{where} shows the secret"


@contextmanager
def _logged() -> Iterator[list[str]]:
    """Every line that is logged meanwhile, by anybody, as it would be printed."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    handler, root = Keep(), logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


def _odd_headers(rules: HeaderRules) -> list[dict[str, str]]:
    values = ["", " ", " lead", "trail ", "a\r\nb: c", "a\nb", "\0", "ä", "\u2603", "x" * 2000]
    names = ["X", "x", "with blank", "a:b", "a\nb", "grün", "messaging-key", "x" * 100]
    odd: list[dict[str, str]] = [{"x": value} for value in values] + [{n: "v"} for n in names]
    odd += [{f"h{n}": "v" for n in range(count)} for count in (2, 11, min(100, rules.max_count))]
    odd += [{f"h{n}": "v" for n in range(rules.max_count + 1)}]
    odd += [{"size": "v" * (rules.max_bytes + 1)}, {"K": "upper", "k": "lower"}]
    return odd
