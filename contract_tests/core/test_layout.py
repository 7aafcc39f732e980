"""Laws of the layout: an adapter is the same files in the same order, and no file outgrows its reader."""

from __future__ import annotations

import ast
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from messaging_sdk.spi import Driver

ROOT = Path(__file__).parents[2]
ADAPTERS = sorted(p for p in (ROOT / "adapters").iterdir() if p.is_dir() and p.name.startswith("messaging_sdk_"))
FILES = {"README.md", "__init__.py", "options.py", "driver.py", "sender.py", "receiver.py", "errors.py", "contract.py"}
MODULES = sorted(f for a in [ROOT / "messaging_sdk", *ADAPTERS] for f in a.rglob("*.py"))
CAP = 900
"""Lines of one module, docstrings included. Beyond it a file holds two ideas."""


def names(paths: list[Path]) -> list[str]:
    return [str(p.relative_to(ROOT)) for p in paths]


@pytest.mark.parametrize("adapter", ADAPTERS, ids=names(ADAPTERS))
def test_an_adapter_is_its_readme_and_the_same_seven_modules_and_a_reader_if_it_has_history(adapter: Path) -> None:
    found = {p.name for p in adapter.iterdir() if p.name != "__pycache__"}
    assert found - {"py.typed", "reader.py"} == FILES


@pytest.mark.parametrize("adapter", ADAPTERS, ids=names(ADAPTERS))
def test_an_adapter_exports_its_driver_and_options(adapter: Path) -> None:
    module = import_module(adapter.name)
    assert {"Driver", "Options"} <= set(module.__all__)
    assert issubclass(module.Driver, Driver)
    assert module.Driver.name == adapter.name.removeprefix("messaging_sdk_")


@pytest.mark.parametrize("adapter", ADAPTERS, ids=names(ADAPTERS))
def test_an_adapter_has_a_scheme_and_a_harness_among_the_entry_points(adapter: Path) -> None:
    for group in ("messaging_sdk.adapters", "messaging_sdk.harnesses"):
        assert [p for p in entry_points(group=group) if p.module.split(".")[0] == adapter.name]


@pytest.mark.parametrize("adapter", ADAPTERS, ids=names(ADAPTERS))
def test_an_adapters_readme_tells_of_every_type_and_of_native_access(adapter: Path) -> None:
    text = (adapter / "README.md").read_text(encoding="utf-8")
    assert [word for word in ("Queue", "Topic", "Signal", "native") if word not in text] == []


@pytest.mark.parametrize("adapter", ADAPTERS, ids=names(ADAPTERS))
def test_every_option_of_an_adapter_is_in_its_readme(adapter: Path) -> None:
    text = (adapter / "README.md").read_text(encoding="utf-8")
    driver = import_module(adapter.name).Driver
    options = {**driver.Options.model_fields, **driver.DestinationOptions.model_fields}
    assert [name for name in options if f"`{name}" not in text and f"{name} " not in text] == []


@pytest.mark.parametrize("path", MODULES, ids=names(MODULES))
def test_no_module_is_longer_than_its_reader_can_hold(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= CAP


@pytest.mark.parametrize("path", MODULES, ids=names(MODULES))
def test_every_module_says_first_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_the_directory_of_adapters_is_no_package() -> None:
    assert not (ROOT / "adapters" / "__init__.py").exists()
