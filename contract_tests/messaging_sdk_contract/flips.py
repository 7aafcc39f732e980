"""Declares another value of one flag on top of an honest driver: CAP-01 must notice every one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, ClassVar, Final

from pydantic import BaseModel

from messaging_sdk import Capabilities, Destination, HeaderRules
from messaging_sdk.capabilities import FLAGS, choices
from messaging_sdk.config import Address
from messaging_sdk.spi import Driver, OnRevoke, Provision, Reader, Receiver, Sender

_HEADER_CHOICES: Final[Mapping[str, tuple[str, ...]]] = {
    "charset": ("field", "ascii", "text"),
    "names": ("token", "text"),
}
_WHEN_ZERO: Final[Mapping[str, float]] = {"lease_s": 0.3, "dedup_s": 0.3, "priority": 2}
"""What a number that is 0 is flipped up to: small, so that a test can wait for it."""


class Flipped(Driver):
    """Behaves as `honest` and declares `value` for `flag`.

    By composition: a driver that looks at its own declaration to decide what it does must not
    change what it does.
    """

    honest: ClassVar[type[Driver]]
    flag: ClassVar[str]
    value: ClassVar[Any]

    def __init__(self, address: Address, options: BaseModel, destinations: Mapping[str, BaseModel]) -> None:
        super().__init__(address, options, destinations)
        self._honest = self.honest(address, options, destinations)

    def capabilities(self, destination: Destination[Any]) -> Capabilities:
        declared = self._honest.capabilities(destination)
        if "tag" in declared.notes:
            return declared
        changed = _applied(getattr(declared, self.flag), self.value)
        return replace(declared, **{self.flag: changed})

    def check(self, destination: Destination[Any]) -> None:
        self._honest.check(destination)

    async def open(self) -> None:
        await self._honest.open()

    async def provision(self, destinations: Sequence[Destination[Any]], mode: Provision) -> None:
        await self._honest.provision(destinations, mode)

    async def open_sender(self, destination: Destination[Any]) -> Sender:
        return await self._honest.open_sender(destination)

    async def open_receiver(
        self, destination: Destination[Any], group: str | None, window: int, on_revoke: OnRevoke
    ) -> Receiver:
        return await self._honest.open_receiver(destination, group, window, on_revoke)

    async def open_reader(self, destination: Destination[Any], since: float | str | None) -> Reader:
        return await self._honest.open_reader(destination, since)

    async def lag(self, destination: Destination[Any], group: str | None) -> int:
        return await self._honest.lag(destination, group)

    async def close(self) -> None:
        await self._honest.close()

    def server(self) -> str:
        return self._honest.server()

    def native(self) -> object:
        return self._honest.native()


def flipped(honest: type[Driver], flag: str, value: Any) -> type[Driver]:
    """A driver class that behaves as `honest` and declares `value` for `flag`."""
    same = ("name", "client", "brokerless", "Options", "DestinationOptions")
    body = {name: getattr(honest, name) for name in same}
    return type("Flipped", (Flipped,), {**body, "honest": honest, "flag": flag, "value": value})


def alternatives(flag: str, value: Any) -> list[str]:
    """The neighbouring values of `value`, up and down, as `--messaging-flip` takes them."""
    ranks = choices(flag)
    if ranks is not None:
        return _neighbours(ranks, value)
    if isinstance(value, bool):
        return [str(not value).lower()]
    if flag == "headers":
        return ["100/8192"] if value is None else _header_alternatives(value)
    if math.isinf(value):
        return ["1"]
    if value == 0:
        return [f"{_WHEN_ZERO.get(flag, 1024):g}"]
    return [_number(value / 2, value), _number(value * 2, value)]


def parse_flip(text: str) -> tuple[str, Any]:
    """`flag=value` as a flag and what to declare. Raises ValueError."""
    flag, equals, value = text.partition("=")
    if flag not in FLAGS or not equals:
        raise ValueError(f"a flip is FLAG=VALUE with one of {', '.join(FLAGS)}")
    kind = {f.name: str(f.type) for f in fields(Capabilities)}[flag]
    if kind == "bool":
        return flag, value == "true"
    if kind == "int":
        return flag, int(value)
    if kind == "float":
        return flag, float(value)
    return flag, value


def _neighbours(ranks: Sequence[str], value: str) -> list[str]:
    at = ranks.index(value)
    return [ranks[i] for i in (at - 1, at + 1) if 0 <= i < len(ranks)]


def _number(value: float, like: float) -> str:
    return str(max(1, int(value))) if isinstance(like, int) else f"{value:g}"


def _header_alternatives(rules: HeaderRules) -> list[str]:
    changed = ["none"]
    for name, ranks in _HEADER_CHOICES.items():
        changed += [f"{name}={other}" for other in _neighbours(ranks, getattr(rules, name))]
    return changed


def _applied(declared: Any, value: Any) -> Any:
    """`value` as the flag's type; header rules are written "none", "count/bytes" or "name=value"."""
    if not isinstance(value, str) or not (declared is None or isinstance(declared, HeaderRules)):
        return value
    if value == "none":
        return None
    name, equals, text = value.partition("=")
    if equals:
        rules = declared or HeaderRules(max_count=100, max_bytes=8192)
        changed: dict[str, Any] = {name: text}
        return replace(rules, **changed)
    count, _, size = value.partition("/")
    return HeaderRules(max_count=int(count), max_bytes=int(size))
