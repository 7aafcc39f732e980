"""What the README tells a newcomer to type works, and does the same on every backend that needs no container."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from messaging_sdk.cli.demo import embedded_server

ROOT = Path(__file__).parents[2]
LIMIT_S = 60


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        cwd=ROOT,
        env=os.environ | environment,
        check=False,
    )


def swap_config(folder: Path, url: str) -> Path:
    """A copy of the example whose overlay names `url`."""
    text = (ROOT / "examples/swap.toml").read_text().replace("nats://127.0.0.1:4222", url)
    (folder / "swap.toml").write_text(text)
    (folder / "swap.py").write_text((ROOT / "examples/swap.py").read_text())
    return folder / "swap.py"


def test_the_swap_example_prints_the_same_on_memory_and_on_nats(tmp_path: Path) -> None:
    on_memory = run("examples/swap.py")
    with embedded_server() as url:
        on_nats = run(str(swap_config(tmp_path, url)), MESSAGING_ENV="nats")
    assert (on_memory.returncode, on_nats.returncode) == (0, 0), on_memory.stderr + on_nats.stderr
    assert on_memory.stdout == on_nats.stdout
    assert "ann: charged 10 for o1 at attempt 2" in on_nats.stdout


def test_the_swap_example_without_its_broker_ends_with_one_clear_line(tmp_path: Path) -> None:
    found = run(str(swap_config(tmp_path, "nats://127.0.0.1:9")), MESSAGING_ENV="nats")
    assert found.returncode == 1
    assert found.stderr.startswith("error: cannot connect to nats://127.0.0.1:9")
    assert "Traceback" not in found.stderr


def test_the_demo_runs_one_program_on_two_backends_with_equal_ledgers() -> None:
    found = run("-m", "messaging_sdk.cli", "demo")
    assert found.returncode == 0, found.stdout + found.stderr
    assert "ledgers equal: yes" in found.stdout
    assert "o5 waited for o3's retries: yes" in found.stdout
