"""MSG: what arrives is byte for byte what was sent, or the send is refused; destinations do not leak."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from messaging_sdk import (
    CapabilityError,
    HeaderRules,
    InvalidDestination,
    InvalidMessage,
    Outcome,
    Queue,
    Signal,
    TooLarge,
    Topic,
)

from ..cases import ALL, SETTLED, case
from ..lab import Lab, key_before_colon
from . import (
    WAIT_S,
    arrived,
    assert_exactly,
    bodies,
    body_of,
    opened,
    real,
    silence,
    take,
    takeover,
    victim,
)

BODIES = (
    b"",
    b"\x00",
    b"1",
    bytes(range(256)),
    b"\xff\xfe invalid \xc3\x28 utf-8",
    b"\r\n.\r\n",
    b"+OK\r\nMSG",
    b"x" * 65_537,
    bytes(range(256)) * 400,
)
VALUES = (
    "plain",
    "",
    " outer blanks ",
    "two  blanks",
    'a: b, c; d="e"',
    "line\r\nInjected: yes",
    "tab\there",
    "nul\x00",
    "☃ grüß",
    "x" * 8192,
)
NAMES = ("X-Plain", "x.y_z-1", "with blank", "colon:", "grün", "new\nline")
SAFE_BYTES = 32 << 20
"""Bodies above this are not sent: a declared limit of 128 MiB is refused one byte above it, unsent."""


class _Reader:
    """A stream of which each message is settled when it is read."""

    def __init__(self, destination: Any, stream: Any) -> None:
        self._settles = destination.settles
        self._stream = stream

    async def read(self) -> Any:
        (message,) = await take(self._stream, 1)
        if self._settles:
            await message.ack()
        return message

    async def nothing(self, wait_s: float) -> bool:
        return await self._stream.next(wait_s) is None


@asynccontextmanager
async def _listening(lab: Lab, destination: Any) -> AsyncIterator[tuple[Any, _Reader]]:
    """A bus and a reader of `destination` on it."""
    bus = await opened(lab, destination)
    async with bus.consume(destination, group=lab.group) as stream:
        yield bus, _Reader(destination, stream)


@case("MSG-01", kinds=ALL)
async def test_msg_01_bodies_are_exact(lab: Lab) -> None:
    """Empty, binary, invalid UTF-8 and protocol-like bodies arrive byte for byte."""
    destination = lab.destination(key=lambda _: "k")  # the same for all: a body is no good key
    caps = await lab.capabilities()
    async with _listening(lab, destination) as (bus, reader):
        for body in [b for b in BODIES if len(b) <= caps.max_body]:
            await bus.publish(destination, body)
            message = await reader.read()
            assert message.body == body
            assert message.data == body
        assert await reader.nothing(lab.harness.quiet_s)


@case("MSG-02", kinds=ALL, flags=("max_body",))
async def test_msg_02_sizes_up_to_the_limit_pass_and_above_are_refused(lab: Lab) -> None:
    """A body of the declared limit arrives; one byte more is TooLarge before it is sent, and the bus works on."""
    destination = lab.destination()
    caps = await lab.capabilities()
    limit = caps.max_body
    assert limit > 0, "max_body must be declared"
    ladder = [n for n in (1 << 10, (64 << 10) + 1, 1 << 20, limit - 1, limit) if n <= min(limit, SAFE_BYTES)]
    async with _listening(lab, destination) as (bus, reader):
        for size in sorted(set(ladder)):
            body = _sized(destination, size)
            await bus.publish(destination, body)
            message = await reader.read()
            assert len(message.body) == size
            assert message.body == body
        with pytest.raises(TooLarge) as caught:
            await bus.publish(destination, _sized(destination, limit + 1))
        assert caught.value.outcome is Outcome.REJECTED
        assert (caught.value.size_bytes, caught.value.limit_bytes) == (limit + 1, limit)
        await bus.publish(destination, b"k0:after")
        assert (await reader.read()).body == b"k0:after"
        assert await reader.nothing(lab.harness.quiet_s)
    lab.measured["largest"] = max(ladder)


@case("MSG-03", kinds=ALL, flags=("headers",))
async def test_msg_03_headers_arrive_exactly_or_are_refused(lab: Lab) -> None:
    """Each header that the declared rules allow arrives unaltered; each other one is refused, never changed."""
    destination = lab.destination()
    rules = (await lab.capabilities()).headers
    wanted = [{"x-value": value} for value in VALUES] + [{name: "v"} for name in NAMES]
    refused = 0
    async with _listening(lab, destination) as (bus, reader):
        for headers in wanted:
            body = body_of(destination, "k0", wanted.index(headers))
            if not _allowed(headers, rules):
                refused += 1
                with pytest.raises((InvalidMessage, CapabilityError)) as caught:
                    await bus.publish(destination, body, headers=headers)
                assert caught.value.outcome is Outcome.REJECTED
                continue
            await bus.publish(destination, body, headers=headers)
            message = await reader.read()
            assert (message.body, dict(message.headers)) == (body, headers)
        with pytest.raises(InvalidMessage):
            await bus.publish(destination, body_of(destination, "k0", 98), headers={"": "v"})
        with pytest.raises(InvalidMessage):
            await bus.publish(destination, body_of(destination, "k0", 99), headers={"n": 1})
        await bus.publish(destination, b"k0:after")
        assert (await reader.read()).body == b"k0:after", "a refused message arrived"
    lab.measured["refused"] = refused
    if rules is None:
        lab.refused()


@case("MSG-04", kinds=ALL, flags=("headers",))
async def test_msg_04_header_case_and_count_are_kept(lab: Lab) -> None:
    """Names that differ in case stay two, many headers all arrive, and one more than declared is refused."""
    destination = lab.destination()
    rules = (await lab.capabilities()).headers
    if rules is None:
        lab.not_run("no headers are claimed: MSG-03 proves the refusal")
    async with _listening(lab, destination) as (bus, reader):
        for count in (1, 10, 11, 100):
            headers = {f"x-{n}": str(n) for n in range(count)} | {"Trace": "upper", "trace": "lower"}
            if len(headers) > rules.max_count or _size(headers) > rules.max_bytes:
                continue
            await bus.publish(destination, b"k0:%d" % count, headers=headers)
            assert dict((await reader.read()).headers) == headers
        for over in (
            {f"h{n}": "" for n in range(rules.max_count + 1)},
            {"x-big": "x" * (rules.max_bytes + 1)},
        ):
            if len(over) > 100_000 or _size(over) > SAFE_BYTES:
                continue
            with pytest.raises((InvalidMessage, CapabilityError)):
                await bus.publish(destination, b"k0:over", headers=over)
        await bus.publish(destination, b"k0:after")
        assert (await reader.read()).body == b"k0:after"


@case("MSG-05", kinds=ALL, flags=("ttl", "delay", "priority"))
async def test_msg_05_properties_arrive_and_unknown_ones_are_refused(lab: Lab) -> None:
    """Id, correlation, type, key and time arrive as sent; delay, ttl and priority are refused where not claimed."""
    destination = lab.destination(str, key=lambda text: text.partition(":")[0])
    caps = await lab.capabilities()
    id = f"{destination.name}-id"
    async with _listening(lab, destination) as (bus, reader):
        began = time.time()
        sent = await bus.publish(destination, "grüß:1", id=id, correlation_id="corr 1/2")
        message = await reader.read()
        assert (sent.id, message.id, message.correlation_id, message.key) == (id, id, "corr 1/2", "grüß")
        assert message.content_type == "text/plain; charset=utf-8"
        assert message.data == "grüß:1"
        assert message.created_s is not None
        assert abs(message.created_s - began) < 5
        await bus.publish(destination, "k:2")
        message = await reader.read()
        assert message.correlation_id is None
        assert message.id not in ("", id)
        options: dict[str, Any] = {"delay": 0.05, "ttl": 60, "priority": 0}
        for name, value in options.items():
            if getattr(caps, name):
                await bus.publish(destination, f"k:{name}", **{name: value})
                assert (await reader.read()).data == f"k:{name}"
            else:
                with pytest.raises(CapabilityError) as caught:
                    await bus.publish(destination, f"k:{name}", **{name: value})
                assert caught.value.outcome is Outcome.REJECTED
                assert len(caught.value.unmet) == 1
        with pytest.raises(CapabilityError):
            await bus.publish(destination, "k:too high", priority=caps.priority)
        for bad in ("", "x" * 201, "line\nbreak"):
            with pytest.raises(InvalidMessage):
                await bus.publish(destination, "k:bad", id=bad)
        assert await reader.nothing(lab.harness.quiet_s)


@case("MSG-06", kinds=ALL)
async def test_msg_06_similar_names_are_kept_apart(lab: Lab) -> None:
    """Destinations of confusable names get only their own messages; names outside the rule are InvalidDestination."""
    stem = lab.fresh_name()
    names = [stem, f"{stem}1", f"{stem}.x", f"{stem}.x.y", f"{stem}-x", f"{stem}_x", f"x.{stem}", stem.upper()]
    destinations = [lab.destination(name=name) for name in names]
    bus = await opened(lab, *destinations)
    for first in range(0, len(destinations), 4):  # a few at a time: each stream costs a connection where ordered
        some = destinations[first : first + 4]
        async with (
            lab.collecting(bus, some[0]) as a,
            lab.collecting(bus, some[1]) as b,
            lab.collecting(bus, some[2]) as c,
            lab.collecting(bus, some[3]) as d,
        ):
            for destination in destinations:
                await bus.publish(destination, body_of(destination, "k0", first))
            views = list(zip(some, (a, b, c, d), strict=True))
            for _, arrivals in views:
                await arrived(arrivals, 1)
            await asyncio.gather(*(silence(lab, bus, of, arrivals, keys=["k0"]) for of, arrivals in views))
        expected = [first] if not lab.kind.settles else range(0, first + 1, 4)
        for destination, arrivals in views:
            assert_exactly(bodies(real(arrivals)), [body_of(destination, "k0", n) for n in expected])
    for bad in ("", ".", "t..x", ".t", "t.", "t/x", "t*", "t.>", "#", "t x", "t__x", "-t", "tür", "t\n", "x" * 201):
        with pytest.raises(InvalidDestination):
            {"queue": Queue, "topic": Topic, "signal": Signal}[lab.kind.tag](bad, bytes)
    longest = lab.destination(name=f"{stem}-long-".ljust(200, "x"))
    try:  # too long for this broker, or with the ending of its dead letters: then both ends say so
        bus = await opened(lab, longest)
        async with lab.collecting(bus, longest) as arrivals:
            await bus.publish(longest, b"k0:1")
            await arrived(arrivals, 1)
        lab.measured["longest"] = 200
    except InvalidDestination as error:
        lab.measured["longest"] = f"refused: {str(error)[:120]}"


@case("MSG-07", kinds=ALL)
async def test_msg_07_the_sdks_headers_stay_internal(lab: Lab) -> None:
    """A user header with the SDK's prefix is refused, in any case, and the user sees none of the SDK's."""
    destination = lab.destination(key=key_before_colon)
    caps = await lab.capabilities()
    async with _listening(lab, destination) as (bus, reader):
        for name in ("messaging-key", "messaging-anything", "Messaging-Key"):
            with pytest.raises((InvalidMessage, CapabilityError)):
                await bus.publish(destination, b"k0:1", headers={name: "mine"})
        headers = {"message": "mine"} if caps.headers is not None else None
        await bus.publish(destination, b"k0:2", headers=headers)
        message = await reader.read()
        assert (message.body, message.key, dict(message.headers)) == (b"k0:2", "k0", headers or {})


@case("MSG-08", kinds=ALL)
async def test_msg_08_foreign_programs_can_talk_to_us(lab: Lab) -> None:
    """A message of the broker's own client is consumed with body, id and headers; ours is readable by that client."""
    destination = lab.destination()
    caps = await lab.capabilities()
    headers = {"x-from": "abroad"} if caps.headers is not None else {}
    async with _listening(lab, destination) as (bus, reader):
        await lab.harness.native_send(destination, b"k0:foreign", headers, f"{destination.name}-1")
        message = await reader.read()
        assert message.body == b"k0:foreign"
        assert message.headers.items() >= headers.items()
        await lab.harness.native_send(destination, b"k0:bare", {}, None)
        message = await reader.read()
        assert message.body == b"k0:bare"
        assert message.id, "an id is made up for a message that has none"
    ours = {"x-from": "here"} if caps.headers is not None else {}
    reading = asyncio.ensure_future(lab.harness.native_receive(destination, lab.group, 1, WAIT_S))
    for n in range(100):  # a Signal reaches only who listens already, and when that is nobody can say
        if destination.settles and n:
            await asyncio.wait({reading}, timeout=WAIT_S)
            break
        await bus.publish(destination, b"k0:ours", headers=ours or None)
        await asyncio.wait({reading}, timeout=0.1)
        if reading.done():
            break
    (native,) = (await reading)[:1]
    assert native.body == b"k0:ours"
    assert {k: v for k, v in native.headers.items() if k == "x-from"} == ours


@case("MSG-09", kinds=ALL)
async def test_msg_09_a_newer_envelope_is_tolerated(lab: Lab) -> None:
    """A message with reserved headers that this version does not know is read all the same, and they stay reserved."""
    destination = lab.destination()
    caps = await lab.capabilities()
    if caps.headers is None:
        lab.not_run("no headers, so there is no envelope")
    strange = {"messaging-version": "99", "messaging-future": "a,b;c", "x-user": "u"}
    async with _listening(lab, destination) as (bus, reader):
        await lab.harness.native_send(destination, b"k0:newer", strange, f"{destination.name}-1")
        message = await reader.read()
        assert message.body == b"k0:newer"
        assert dict(message.headers) == {"x-user": "u"}
        assert message.provenance["future"] == "a,b;c"
        await bus.publish(destination, b"k0:after")
        assert (await reader.read()).body == b"k0:after"


@case("MSG-10", kinds=SETTLED, faults=("cut",))
async def test_msg_10_a_repeat_is_the_same_message(lab: Lab) -> None:
    """Retried and redelivered, a message keeps body, id, key and headers, whatever became of the sender's buffer."""
    destination = lab.destination(key=lambda value: bytes(value)[:2].decode())
    caps = await lab.capabilities()
    headers = {"x-trace": "abc"} if caps.headers is not None else {}
    original = b"k0:original " + bytes(range(256))
    buffer = bytearray(original)
    async with victim(lab, destination) as holder:
        async with holder.bus.publisher(destination) as publisher:
            await publisher.send(buffer, headers=headers or None)
            buffer[:] = b"k9:overwritten".ljust(len(buffer))
        (first,) = await holder.take(1)
        told = [_told(first)]
        await first.retry(0.05)
        (second,) = await holder.take(1)
        told.append(_told(second))
        await holder.die()
    bus = await opened(lab, destination)
    async with bus.consume(destination, group=lab.group) as stream:
        (third,) = await take(stream, 1, takeover(lab, caps) + 1)
        told.append(_told(third))
        await third.ack()
    assert told == [(original, first.id, "k0", headers)] * 3


# --- helpers


def _told(message: Any) -> tuple[bytes, str, str | None, dict[str, str]]:
    return message.body, message.id, message.key, dict(message.headers)


def _sized(destination: Any, size: int) -> bytes:
    """A body of exactly `size` bytes that is not all the same."""
    pattern: bytes = b"k0:" + destination.name.encode() + bytes(range(256))
    return (pattern * (size // len(pattern) + 1))[:size]


def _size(headers: dict[str, str]) -> int:
    return sum(len(k.encode()) + len(v.encode()) for k, v in headers.items())


def _allowed(headers: dict[str, str], rules: HeaderRules | None) -> bool:
    """What the declaration says of these headers, written here anew so that it is not core's own answer."""
    if rules is None:
        return False
    ((name, value),) = headers.items()
    if rules.names == "token" and not re.fullmatch(r"[A-Za-z0-9!#$%&'*+\-.^_`|~]+", name):
        return False
    printable = all(" " <= c <= "~" for c in value)
    if rules.charset != "text" and not printable:
        return False
    if rules.charset == "field" and value.strip(" ") != value:
        return False
    return _size(headers) <= rules.max_bytes
