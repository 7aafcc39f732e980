"""Laws of the public surface: complete, sorted, documented, and typed without Any where a user passes values."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType

import pytest

import messaging_sdk
import messaging_sdk.sync
import messaging_sdk.testing

MODULES = sorted(m.name for m in pkgutil.iter_modules(messaging_sdk.__path__, "messaging_sdk.") if not m.ispkg)


def test_all_is_sorted_and_names_nothing_twice() -> None:
    assert messaging_sdk.__all__ == sorted(set(messaging_sdk.__all__))


def test_all_is_exactly_what_can_be_imported() -> None:
    found = {
        name
        for name, value in vars(messaging_sdk).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    borrowed = {"PackageNotFoundError", "version"}  # importlib.metadata's, for __version__
    assert found - borrowed | {"__version__"} == set(messaging_sdk.__all__)


def test_every_error_is_exported_and_is_one_of_ours() -> None:
    errors = importlib.import_module("messaging_sdk.errors")
    defined = {n for n, v in vars(errors).items() if inspect.isclass(v) and v.__module__ == errors.__name__}
    assert defined <= set(messaging_sdk.__all__)
    for_handlers = {"Reject", "RetryLater"}  # raised by users, so not failures of ours
    ours = {n for n in defined if issubclass(getattr(errors, n), Exception)} - for_handlers
    assert all(issubclass(getattr(errors, n), messaging_sdk.MessagingError) for n in ours)


def test_the_tree_of_errors_in_the_docstring_is_the_tree() -> None:
    errors = importlib.import_module("messaging_sdk.errors")
    drawn = [line for line in (errors.__doc__ or "").splitlines() if "─" in line]
    names = {line.split("─ ")[1].split()[0]: line.index("─") for line in drawn}
    real = {
        n: (1 + len(v.__mro__) - v.__mro__[::-1].index(messaging_sdk.MessagingError) - 1)
        for n, v in vars(errors).items()
        if inspect.isclass(v) and issubclass(v, messaging_sdk.MessagingError) and v is not messaging_sdk.MessagingError
    }
    assert set(names) == set(real)
    nested = {n for n, v in vars(errors).items() if n in real and v.__bases__ != (messaging_sdk.MessagingError,)}
    margin = min(names.values())
    assert {n for n, column in names.items() if column > margin} == nested


def surface() -> Iterator[tuple[str, object]]:
    """Public classes, functions, methods and properties of all public modules of the core, each once."""
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", None) != module_name:
                continue
            if inspect.isfunction(value) or inspect.isclass(value):
                yield f"{module_name}.{name}", value


@pytest.mark.parametrize("module_name", ["messaging_sdk", *MODULES])
def test_every_module_starts_with_what_it_is_for(module_name: str) -> None:
    doc = importlib.import_module(module_name).__doc__ or ""
    assert len(doc.strip().splitlines()[0]) > 20


@pytest.mark.parametrize("path", [path for path, _ in surface()])
def test_every_public_class_and_function_says_what_it_promises(path: str) -> None:
    module_name, _, name = path.rpartition(".")
    assert (vars(importlib.import_module(module_name))[name].__doc__ or "").strip()


def members(kind: type) -> Iterator[str]:
    for name, value in vars(kind).items():
        if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, (property, classmethod))):
            yield name


EXPORTED = [
    *(getattr(messaging_sdk, n) for n in messaging_sdk.__all__ if inspect.isclass(getattr(messaging_sdk, n))),
    messaging_sdk.sync.Bus, messaging_sdk.sync.Publisher, messaging_sdk.sync.Stream, messaging_sdk.sync.Delivery,
    messaging_sdk.sync.Replay,
    *(v for v in vars(importlib.import_module("messaging_sdk.spi")).values()
      if inspect.isclass(v) and v.__module__ == "messaging_sdk.spi"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind in EXPORTED for name in members(kind)],
    ids=lambda part: part if isinstance(part, str) else f"{part.__module__}.{part.__name__}",
)
def test_every_public_member_of_an_exported_class_says_what_it_promises(kind: type, name: str) -> None:
    member = inspect.getattr_static(kind, name)
    assert (inspect.getdoc(getattr(kind, name)) or getattr(member, "__doc__", "") or "").strip()


def test_the_version_is_the_distributions() -> None:
    from importlib.metadata import version

    assert messaging_sdk.__version__ == version("portable-messaging")


@pytest.mark.parametrize(
    "package", ["messaging_sdk", "messaging_sdk_rabbitmq", "messaging_sdk_nats", "messaging_sdk_contract"]
)
def test_every_package_tells_type_checkers_that_it_is_typed(package: str) -> None:
    from importlib.util import find_spec
    from pathlib import Path

    spec = find_spec(package)
    assert spec is not None and spec.origin is not None
    assert (Path(spec.origin).parent / "py.typed").exists()
