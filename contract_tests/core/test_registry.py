"""Laws of finding adapters: by scheme, through entry points, with typed errors for what is missing."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from typing import Any

import pytest
from _drive import fresh
from _scripted import RecordingDriver

from messaging_sdk import Bus, ConfigError, registry
from messaging_sdk.memory import Driver as MemoryDriver
from messaging_sdk.registry import adapters, driver_by_name, driver_class, register


def test_in_tree_adapters_are_found_by_entry_point_like_anyones() -> None:
    assert {"memory", "amqp", "amqps", "nats"} <= set(adapters())
    assert driver_class("memory") is MemoryDriver


def test_a_registered_scheme_goes_before_entry_points() -> None:
    scheme, kind = fresh("mine"), type("Mine", (RecordingDriver,), {"made": []})
    register(scheme, kind)
    assert driver_class(scheme) is kind


def test_an_adapter_is_found_by_its_name() -> None:
    found = driver_by_name("rabbitmq")
    assert found is not None and found.name == "rabbitmq"


def test_a_name_nobody_has_is_none() -> None:
    assert driver_by_name("telegraph") is None


@pytest.mark.parametrize(
    ("client", "url", "extra"), [("pika", "amqp://u:S3CR3T@x", "rabbitmq"), ("nats", "nats://u:S3CR3T@x", "nats")]
)
def test_a_missing_client_is_a_config_error_that_names_the_extra(client: str, url: str, extra: str) -> None:
    program = f"""
import sys
sys.modules[{client!r}] = None
from messaging_sdk import Bus, ConfigError
Bus("memory://")
try:
    Bus({url!r})
except ConfigError as error:
    print(error)
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert f"pip install 'portable-messaging[{extra}]'" in told.stdout
    assert client in told.stdout and "S3CR3T" not in told.stdout + told.stderr


def broken_entry(monkeypatch: pytest.MonkeyPatch, value: str) -> str:
    scheme = fresh("broken")
    point = EntryPoint(scheme, value, registry.GROUP)
    monkeypatch.setattr(registry, "adapters", lambda: {scheme: point})
    return scheme


def test_an_entry_point_that_is_no_driver_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = broken_entry(monkeypatch, "json:dumps")
    with pytest.raises(ConfigError, match="is not a Driver class"):
        Bus(f"{scheme}://x")


def test_an_adapter_that_refuses_its_installed_client_is_a_config_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    (tmp_path / "adapter_of_old_client.py").write_text("raise ImportError('client 1.0 is too old; install client>=2')")
    monkeypatch.syspath_prepend(tmp_path)
    scheme = broken_entry(monkeypatch, "adapter_of_old_client:Driver")
    with pytest.raises(ConfigError, match=r"client 1\.0 is too old"):
        Bus(f"{scheme}://x")


def test_looking_for_an_adapter_by_name_passes_over_broken_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    broken_entry(monkeypatch, "json:dumps")
    assert driver_by_name("telegraph") is None


def test_importing_the_core_loads_no_client() -> None:
    program = "import sys, messaging_sdk; print([m for m in ('pika', 'nats', 'typer', 'rich') if m in sys.modules])"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert told.stdout.strip() == "[]"
