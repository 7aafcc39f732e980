"""Finds adapters by URL scheme through entry points; in-tree adapters use them like anyone's."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final

from pydantic import BaseModel

from .config import BACKEND_KEYS, BackendSettings, Settings, validated
from .errors import ConfigError
from .spi import Driver

GROUP: Final = "messaging_sdk.adapters"
_registered: Final[dict[str, type[Driver]]] = {}


def register(scheme: str, driver: type[Driver]) -> None:
    """Use `driver` for `scheme` in this process, ahead of entry points: for tests and adapters in the making."""
    _registered[scheme] = driver


@cache
def adapters() -> Mapping[str, EntryPoint]:
    """Installed adapters by URL scheme."""
    return {point.name: point for point in entry_points(group=GROUP)}


def driver_class(scheme: str, where: str = "url") -> type[Driver]:
    """The Driver class for a URL scheme. ConfigError: nobody offers the scheme, or its client is not installed."""
    if scheme in _registered:
        return _registered[scheme]
    point = adapters().get(scheme)
    if point is None:
        known = ", ".join(sorted({*adapters(), *_registered}))
        raise ConfigError(f"{where}: no installed adapter offers the scheme {scheme!r}; installed: {known}")
    try:
        loaded = point.load()
    except ModuleNotFoundError as error:
        extra = point.module.rpartition("messaging_sdk_")[2]
        package = point.dist.name if point.dist is not None else "portable-messaging"
        raise ConfigError(
            f"{where}: the adapter for {scheme!r} needs {error.name!r}, which is not installed; "
            f"run: pip install '{package}[{extra}]'"
        ) from error
    except ImportError as error:
        raise ConfigError(f"{where}: the adapter for {scheme!r} cannot be loaded: {error}") from error
    if not (isinstance(loaded, type) and issubclass(loaded, Driver)):
        raise ConfigError(f"{where}: entry point {point.name!r} = {point.value!r} is not a Driver class")
    return loaded


def scheme_of(name: str) -> str | None:
    """A URL scheme of the adapter whose Driver has this `name`; None if it (with its client) is not installed."""
    for scheme in (*_registered, *adapters()):
        try:
            if driver_class(scheme).name == name:
                return scheme
        except ConfigError:
            continue
    return None


def driver_by_name(name: str) -> type[Driver] | None:
    """The Driver class whose `name` is `name`, or None if no such adapter (with its client) is installed."""
    scheme = scheme_of(name)
    return None if scheme is None else driver_class(scheme)


def make_driver(backend: BackendSettings, settings: Settings) -> Driver:
    """Build the driver of one backend, without I/O. ConfigError for a wrong option of it or of its destinations."""
    where = f"backends.{backend.name}"
    found = driver_class(backend.address.scheme, f"{where}.url")
    options = validated(found.Options, backend.options, where, BACKEND_KEYS)
    destinations: dict[str, BaseModel] = {}
    for name, blocks in settings.destinations.items():
        if found.name in blocks and settings.backend_of(name) == backend.name:
            destinations[name] = validated(
                found.DestinationOptions, blocks[found.name], f"destinations.{name}.{found.name}"
            )
    return found(backend.address, options, destinations)


def check_blocks(settings: Settings) -> None:
    """Check every `[destinations.x] <adapter>` block, also those of adapters that no backend uses now.

    A block of an adapter that is not installed cannot be checked and is left alone.
    """
    blocks: list[tuple[str, str, Mapping[str, Any]]] = [
        (name, adapter, block)
        for name, by_adapter in settings.destinations.items()
        for adapter, block in by_adapter.items()
    ]
    for name, adapter, block in blocks:
        found = driver_by_name(adapter)
        if found is not None:
            validated(found.DestinationOptions, block, f"destinations.{name}.{adapter}")
