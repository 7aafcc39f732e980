"""What an adapter's author supplies so that the kit can test the adapter: an address, a native client, faults.

A harness may declare what it cannot provoke; it can never change a case. Everything it says about its backend is
either used to reach the backend or checked.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from messaging_sdk import Destination, MessagingError

if TYPE_CHECKING:
    from .live import LiveService

Fault = Literal["cut", "restart", "kill", "subprocess"]


@dataclass(frozen=True, slots=True)
class Environment:
    """What the evidence was measured on."""

    server: str  # as the server says itself: "RabbitMQ 4.3.6"
    image: str = ""
    image_digest: str = ""


@dataclass(frozen=True, slots=True)
class Refusal:
    """An address at which `open` must fail: why, with what, and a text that must not appear in the error."""

    why: str
    backend: Mapping[str, Any]
    error: type[MessagingError]
    secret: str = ""


@dataclass(slots=True)
class NativeMessage:
    """A message as the broker's own client sees it."""

    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    id: str | None = None


class Harness(ABC):
    """One backend under test. Made once per run; `start` and `stop` are called once, the rest per case."""

    name: ClassVar[str]
    """The adapter's name, as in `Driver.name`."""
    profiles: ClassVar[Sequence[str]] = ("default",)
    """Server versions or configurations that make columns of their own, as ("4.3", "4.0"). The first is default."""
    faults: ClassVar[frozenset[Fault]] = frozenset()
    """What this harness can provoke; a case that needs another is reported as skipped, with the reason."""
    takeover_s: float = 5.0
    """Within this time of a consumer's abrupt death its unsettled messages reach another one, beyond any lease."""
    recovery_s: float = 30.0
    """Within this time of a broker restart traffic flows again: boot time plus core's longest back-off."""
    quiet_s: float = 0.5
    """How long nothing may arrive before a sentinel is sent; it only bounds patience, the sentinel is the proof."""
    at_once: ClassVar[int] = 5
    """How many kinds of destination a whole run tries at the same time, each with a broker of its own. Fewer for a
    broker that keeps a core busy while it boots."""
    lanes: int = 1
    """How many sequences, each of its own, an unordered destination consists of (Kafka: partitions), dealt in turn to
    messages without a key. Silence is proven by a sentinel down each."""
    settle_before_kill_s: float = 0.0
    """How long a fresh destination must exist before the broker may be killed (RabbitMQ's quorum queues: 2 s)."""

    def __init__(self, profile: str = "default") -> None:
        self.profile = profile

    @abstractmethod
    def start(self) -> None:
        """Bring the broker up (a container, or the URL in MESSAGING_TEST_<NAME>_URL) until it works. Synchronous."""

    @abstractmethod
    def stop(self) -> None:
        """Remove what `start` made. Never raises."""

    @abstractmethod
    def backend(self) -> Mapping[str, Any]:
        """A `[backends.x]` table for the broker: {"url": ..., and options}."""

    def fault_backend(self) -> Mapping[str, Any]:
        """Like `backend`, but by a way that `cut` can break (a TCP proxy)."""
        return self.backend()

    def dead_letter_backend(self) -> Mapping[str, Any] | None:
        """Where "*.dead" is routed: a backend that stores, for one that stores nothing; None = like everything else."""
        return None

    def settings(self, backend: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """A whole configuration for `backend` (by default `backend()`), with everything routed to it."""
        made: dict[str, Any] = {"backends": {"test": dict(backend or self.backend())}, "routes": {"*": "test"}}
        graves = self.dead_letter_backend()
        if graves is not None:
            made["backends"]["graves"] = dict(graves)
            made["routes"]["*.dead"] = "graves"
        return made

    @abstractmethod
    def environment(self) -> Environment:
        """What is running. Called after `start`."""

    @abstractmethod
    async def native_send(
        self, destination: Destination[Any], body: bytes, headers: Mapping[str, str], id: str | None
    ) -> None:
        """Publish with the broker's own client, as a foreign program would, to a provisioned destination."""

    @abstractmethod
    async def native_receive(
        self, destination: Destination[Any], group: str | None, count: int, wait_s: float
    ) -> list[NativeMessage]:
        """Take and settle up to `count` messages with the broker's own client; fewer if `wait_s` passes."""

    @abstractmethod
    async def depth(self, destination: Destination[Any], group: str | None) -> int | None:
        """Messages that the broker holds for it, unsettled ones included; None where the broker cannot say."""

    @abstractmethod
    async def remove(self, destinations: Sequence[Destination[Any]]) -> None:
        """Delete from the broker what provisioning made for these (groups too). Absent ones are fine."""

    async def forget(self, destination: Destination[Any]) -> bool:
        """Delete all that a Topic stores by now, as its retention would. False where that cannot be provoked."""
        return False

    def refusals(self) -> Sequence[Refusal]:
        """Addresses where `open` must fail with a typed error: nobody listens, wrong password, no such feature."""
        return ()

    def needs_client(self) -> Sequence[str]:
        """Import names of the client library, for the test of a missing extra."""
        return ()

    # faults; each only if named in `faults`

    async def cut(self) -> None:
        """Reset every TCP connection made by `fault_backend` so far; new ones work at once."""
        raise NotImplementedError(f"{self.name}: the harness does not provoke 'cut'")

    async def restart(self) -> None:
        """Stop the broker gracefully and start it again at the same address. Returns when it works."""
        raise NotImplementedError(f"{self.name}: the harness does not provoke 'restart'")

    async def kill(self) -> None:
        """SIGKILL the broker and start it again at the same address. Returns when it works."""
        raise NotImplementedError(f"{self.name}: the harness does not provoke 'kill'")


class ContainerHarness(Harness):
    """A harness of one broker in a container: its restart and kill are the container's."""

    _service: LiveService | None = None
    """Made by `start`; None at a URL of yours, where no broker is stopped."""

    @abstractmethod
    def _probe(self) -> None:
        """Return when the broker works, raise while it does not."""

    async def restart(self) -> None:
        await asyncio.to_thread(self._again, "stop")

    async def kill(self) -> None:
        await asyncio.to_thread(self._again, "kill")

    def _again(self, end: Literal["stop", "kill"]) -> None:
        assert self._service is not None, "a broker at a URL of yours is not stopped"
        self._service.kill() if end == "kill" else self._service.stop()
        self._service.start()
        self._service.wait_ready(self._probe)
