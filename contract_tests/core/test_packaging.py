"""Laws of what is shipped: the wheel works in an empty environment, and so does a third party's adapter on it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Sequence
from email.parser import HeaderParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("messaging_sdk", "messaging_sdk_rabbitmq", "messaging_sdk_nats", "messaging_sdk_contract")
ORDER_FLOW = """
import asyncio
from messaging_sdk.cli.order_flow import order_flow
ledger, _ = asyncio.run(order_flow("memory://shop"))
assert ledger.charged("ann") == ["o1", "o3", "o5"], ledger.rows
print(len(ledger.rows), "rows")
"""


def run(arguments: Sequence[str | Path], cwd: Path, *, ok: bool = True) -> str:
    """What the command printed; AssertionError with all of it if it failed."""
    environ = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        list(map(str, arguments)), cwd=cwd, env=environ, capture_output=True, text=True, timeout=120, check=False
    )
    text = done.stdout + done.stderr
    assert (done.returncode == 0) is ok, text
    return text


def counts(told: str) -> dict[str, int]:
    """Pytest's own last line as numbers, without what was deselected."""
    (line,) = re.findall(r"=+ (.*\d+ (?:passed|failed).*) in .*=", told)
    return {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", line)}


class Installed:
    """A fresh environment with our wheel, far from the source tree. Dependencies come from the running one by a .pth
    file, so that no network is needed; our own distribution does not, because it is installed editable there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        venv.create(folder / "env", with_pip=False, symlinks=True)
        self.python = folder / "env" / "bin" / "python"
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        self.site = folder / "env" / "lib" / version / "site-packages"
        dependencies = folder / "dependencies"
        dependencies.mkdir()
        for found in Path(sysconfig.get_path("purelib")).iterdir():
            if "portable_messaging" not in found.name and found.suffix != ".pth":
                (dependencies / found.name).symlink_to(found)
        (self.site / "dependencies.pth").write_text(f"{dependencies}\n")

    def install(self, wheel: Path) -> None:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", self.python, "install"]
        run([*pip, "--no-deps", "--no-index", "--quiet", wheel], self.elsewhere)

    def __call__(self, *arguments: str | Path, ok: bool = True) -> str:
        return run([self.python, *arguments], self.elsewhere, ok=ok)

    def messaging(self, *arguments: str, ok: bool = True) -> str:
        return run([self.folder / "env" / "bin" / "messaging", *arguments], self.elsewhere, ok=ok)


def build(source: Path, target: Path) -> Path:
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", target, source], source)
    (wheel,) = target.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git would give a fresh clone, so that what lies about here cannot help the build."""
    copy = tmp_path_factory.mktemp("clone")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    names = listed.stdout.decode().split("\0")
    if listed.returncode or len(names) < 10:  # not a git checkout: an unpacked sdist, say
        ignored = shutil.ignore_patterns(".venv", ".git", "__pycache__", ".mypy_cache", ".ruff_cache", "dist", "build")
        shutil.copytree(ROOT, copy, dirs_exist_ok=True, ignore=ignored)
        return copy
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    made = Installed(tmp_path_factory.mktemp("installed"))
    made.install(wheel)
    return made


# --- the wheel


def test_the_wheel_holds_every_module_of_the_tree_and_nothing_else(wheel: Path, source: Path) -> None:
    roots = [source / "messaging_sdk", *(source / "adapters").glob("messaging_sdk_*")]
    roots.append(source / "contract_tests" / "messaging_sdk_contract")
    expected = {str(f.relative_to(r.parent)) for r in roots for f in r.rglob("*.py")}
    with zipfile.ZipFile(wheel) as archive:
        found = {n for n in archive.namelist() if n.endswith(".py")}
    assert found == expected


def test_the_wheel_tells_type_checkers_that_it_is_typed(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        assert {f"{p}/py.typed" for p in PACKAGES} <= set(archive.namelist())


def test_the_wheel_carries_its_license_and_readme(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("/METADATA")]
        metadata = HeaderParser().parsestr(archive.read(name).decode())
        assert any(n.endswith("licenses/LICENSE") for n in archive.namelist())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {"rabbitmq", "nats", "contract", "cli", "all"} <= set(metadata.get_all("Provides-Extra", []))


def test_the_installed_packages_come_from_the_wheel(installed: Installed) -> None:
    told = installed("-c", f"import {', '.join(PACKAGES)}; print({', '.join(p + '.__file__' for p in PACKAGES)})")
    assert len(told.split()) == len(PACKAGES)
    assert all(path.startswith(str(installed.site)) for path in told.split())


def test_an_order_flow_runs_on_memory_from_the_wheel(installed: Installed) -> None:
    assert "17 rows" in installed("-c", ORDER_FLOW)


def test_the_command_is_installed(installed: Installed) -> None:
    assert "contract" in installed.messaging("--help")


def test_the_kit_runs_from_the_wheel(installed: Installed) -> None:
    told = installed.messaging("contract", "memory", "--cases", "DEL-01")
    assert counts(told) == {"passed": 5}


def test_a_program_without_the_command_lines_dependencies_is_told_the_extra(installed: Installed) -> None:
    program = "import sys; sys.modules['typer'] = None; from messaging_sdk.cli import main; main()"
    assert "pip install 'portable-messaging[cli]'" in installed("-c", program, ok=False)


@pytest.mark.parametrize(("client", "url", "extra"), [("pika", "amqp://x", "rabbitmq"), ("nats", "nats://x", "nats")])
def test_a_missing_extra_is_named_by_the_wheel_too(installed: Installed, client: str, url: str, extra: str) -> None:
    program = f"import sys; sys.modules[{client!r}] = None; from messaging_sdk import Bus; Bus({url!r})"
    told = installed("-c", program, ok=False)
    assert f"ConfigError: backends.main.url: the adapter for '{url.partition(':')[0]}' needs" in told
    assert f"pip install 'portable-messaging[{extra}]'" in told


# --- an editable install


def test_an_editable_install_finds_every_package_in_the_tree(source: Path, tmp_path: Path) -> None:
    made = Installed(tmp_path)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", made.python, "install", "--quiet"]
    run([*pip, "--no-deps", "--no-index", "--no-build-isolation", "-e", source], made.elsewhere)
    told = made("-c", f"import {', '.join(PACKAGES)}; print({', '.join(p + '.__file__' for p in PACKAGES)})")
    assert all(path.startswith(str(source)) for path in told.split())


# --- a third party's adapter, in a wheel of its own

FOO = {
    "pyproject.toml": """
[build-system]
requires = ["hatchling>=1.27"]
build-backend = "hatchling.build"

[tool.hatch.build.targets.wheel]
packages = ["messaging_sdk_foo"]

[project]
name = "messaging-foo"
version = "0.1"
dependencies = ["portable-messaging"]

[project.entry-points."messaging_sdk.adapters"]
foo = "messaging_sdk_foo:Driver"

[project.entry-points."messaging_sdk.harnesses"]
foo = "messaging_sdk_foo.contract:Harness"
""",
    "messaging_sdk_foo/__init__.py": '''
"""Foo behind messaging_sdk: the memory backend under another name."""

from messaging_sdk import memory


class Driver(memory.Driver):
    """The foo adapter."""

    name = "foo"
    client = "messaging-foo"
''',
    "messaging_sdk_foo/contract.py": '''
"""How the kit reaches foo."""

from messaging_sdk_contract import memory_harness


class Harness(memory_harness.Harness):
    """Foo in this process."""

    name = "foo"

    def backend(self):
        return {"url": super().backend()["url"].replace("memory://", "foo://")}

    def fault_backend(self):
        return {"url": super().fault_backend()["url"].replace("memory://", "foo://")}
''',
}


@pytest.fixture(scope="module")
def with_foo(installed: Installed, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    tree = tmp_path_factory.mktemp("foo")
    for name, text in FOO.items():
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_text(text.lstrip())
    installed.install(build(tree, tmp_path_factory.mktemp("foo-wheel")))
    return installed


def test_a_third_partys_adapter_is_found_by_its_scheme(with_foo: Installed) -> None:
    assert "Bus(main=foo://x; new)" in with_foo("-c", "from messaging_sdk import Bus; print(Bus('foo://x'))")


def test_the_kit_runs_on_a_third_partys_adapter(with_foo: Installed) -> None:
    told = with_foo.messaging("contract", "foo", "--cases", "DEL-01,ACK-01")
    assert "messaging contract: foo / default" in told
    assert counts(told) == {"passed": 9}, "DEL-01 on five kinds, ACK-01 on the four that settle"


def test_the_kit_fails_on_a_third_partys_adapter_that_repeats_messages(with_foo: Installed) -> None:
    module = with_foo.site / "messaging_sdk_foo" / "__init__.py"
    honest = module.read_text()
    try:
        module.write_text(
            honest
            + """

class Repeating(memory.MemorySender):
    def take(self, message):
        self.broker.route(self.destination, message)
        self.broker.route(self.destination, message)


Driver.sender_class = Repeating
"""
        )
        told = with_foo.messaging("contract", "foo", "--cases", "DEL-01", ok=False)
    finally:
        module.write_text(honest)
    assert counts(told)["failed"] == 5, told
