"""Laws of who may import whom, read from the source: what keeps backends swappable."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = sorted((ROOT / "messaging_sdk").rglob("*.py"))
ADAPTERS = sorted(p for p in (ROOT / "adapters").iterdir() if p.is_dir() and p.name.startswith("messaging_sdk_"))
ADAPTER_FILES = [f for a in ADAPTERS for f in sorted(a.rglob("*.py"))]
CLIENTS = {"pika", "nats", "aio_pika", "aiormq", "kombu", "confluent_kafka", "aiokafka", "boto3", "botocore", "zmq"}
NAMES = {a.name.removeprefix("messaging_sdk_") for a in ADAPTERS}
WORDS = NAMES | {"amqp", "amqps", "nats+tls", "kafka", "sqs", "zeromq", "jetstream", "memory"}


def place(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[str]:
    """Every module that `path` imports, anywhere in it, with relative ones resolved."""
    package = list(path.relative_to(path.parents[len(path.parts) - 2]).parts)
    root = next(p for p in path.parents if p.name in ("adapters", "contract_tests") or p == ROOT)
    package = list(path.relative_to(root).with_suffix("").parts[:-1])
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))


def tops(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", CORE, ids=place)
def test_the_core_imports_no_adapter_and_no_client(path: Path) -> None:
    found = tops(path)
    kit = {"messaging_sdk_contract"} if path.parent.name == "cli" else set()  # `messaging contract` starts the kit
    assert {t for t in found if t.startswith("messaging_sdk_")} - kit == set()
    assert found & CLIENTS == set()


@pytest.mark.parametrize("path", [p for p in CORE if p.parent.name != "cli"], ids=place)
def test_the_core_needs_nothing_but_pydantic(path: Path) -> None:
    import sys

    foreign = {t for t in tops(path) if t not in sys.stdlib_module_names and t != "messaging_sdk"}
    assert foreign <= {"pydantic"}


@pytest.mark.parametrize("path", [p for p in CORE if p.name != "memory.py"], ids=place)
def test_the_core_does_not_import_the_memory_backend_either(path: Path) -> None:
    assert "messaging_sdk.memory" not in set(imports(path))


@pytest.mark.parametrize("path", CORE, ids=place)
def test_the_core_does_not_import_the_command_line(path: Path) -> None:
    if path.parent.name != "cli":
        assert not any(name.startswith("messaging_sdk.cli") for name in imports(path))


@pytest.mark.parametrize("path", ADAPTER_FILES, ids=place)
def test_an_adapter_imports_no_other_adapter(path: Path) -> None:
    own = path.relative_to(ROOT / "adapters").parts[0]
    others = {t for t in tops(path) if t.startswith("messaging_sdk_")} - {own}
    kit = {"messaging_sdk_contract"} if path.name == "contract.py" else set()
    assert others - kit == set()


@pytest.mark.parametrize("path", ADAPTER_FILES, ids=place)
def test_an_adapter_imports_the_vocabulary_and_the_spi_only(path: Path) -> None:
    allowed = {"capabilities", "config", "destination", "errors", "model", "offsets", "spi", "threads"}
    modules = {n.split(".")[1] for n in imports(path) if n.startswith("messaging_sdk.")}
    if path.name != "contract.py":
        assert modules <= allowed


def conditions(path: Path) -> Iterator[ast.expr]:
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.If, ast.IfExp, ast.While, ast.Assert)):
            yield node.test
        elif isinstance(node, ast.Compare):
            yield node
        elif isinstance(node, ast.comprehension):
            yield from node.ifs
        elif isinstance(node, ast.match_case):
            yield from (p.value for p in ast.walk(node.pattern) if isinstance(p, ast.MatchValue))


@pytest.mark.parametrize("path", [p for p in CORE if p.parent.name != "cli" and p.name != "memory.py"], ids=place)
def test_no_condition_of_the_core_asks_for_a_backend_by_name(path: Path) -> None:
    asked = {
        part.value
        for condition in conditions(path)
        for part in ast.walk(condition)
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    }
    assert asked & WORDS == set()


def test_the_base_installation_needs_pydantic_only() -> None:
    base = [r for r in requires("portable-messaging") or [] if "extra ==" not in r]
    assert [r.split(">")[0] for r in base] == ["pydantic"]


def test_the_walk_sees_what_it_is_meant_to_see(tmp_path: Path) -> None:
    """The laws above pass when they look at nothing; this one shows that they look."""
    planted = ROOT / "messaging_sdk" / "planted.py"
    source = "import pika.channel\nfrom messaging_sdk_nats import Driver\nx = 1 if name == 'rabbitmq' else 2\n"
    tree.cache_clear()
    try:
        tree_of_planted = ast.parse(source)
        tree_before = globals()["tree"]
        globals()["tree"] = lambda path: tree_of_planted
        assert tops(planted) >= {"pika", "messaging_sdk_nats"}
        assert any("rabbitmq" in ast.unparse(c) for c in conditions(planted))
    finally:
        globals()["tree"] = tree_before
    assert len(CORE) > 20 and len(ADAPTERS) >= 2 and packages_distributions()
