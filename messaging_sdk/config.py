"""Configuration: a TOML file, the environment or a URL becomes frozen values; overlays replace, never merge.

No value of the configuration is ever quoted in an error: it may be a secret.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, TypeVar, cast
from urllib.parse import parse_qsl, unquote

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from .errors import ConfigError

M = TypeVar("M", bound=BaseModel)

_UNITS_S: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)\Z")
_REFERENCE: Final = re.compile(r"\$\{(\w+):([^}]+)\}")
BACKEND_KEYS: Final = ("url", "password", "provision", "emulation")
_TOP_KEYS: Final = ("backends", "routes", "destinations", "env")
ENV_PREFIX: Final = "MESSAGING_"
DEFAULT_FILE: Final = "messaging.toml"


def seconds(value: float | str, what: str = "duration") -> float:
    """`"250ms"`, `"1.5s"`, `"2m"`, `"1h"`, `"7d"` or a number of seconds, as seconds. Raises ConfigError otherwise."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0:
        return float(value)
    match = _DURATION.match(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ConfigError(
            f"{what}: not a duration; write a number of seconds, or like '250ms', '1.5s', '2m', '1h', '7d'"
        )
    return float(match[1]) * _UNITS_S[match[2]]


def _seconds_option(value: object) -> float:
    """A number (a URL brings it as text) or a duration."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError("not a duration")
    try:
        return float(value)
    except OverflowError:
        raise ValueError("not a duration") from None
    except ValueError:
        pass
    try:
        return seconds(value)
    except ConfigError as error:
        raise ValueError(str(error)) from None


Seconds = Annotated[float, BeforeValidator(_seconds_option), Field(allow_inf_nan=False)]
"""For an adapter's Options: a number of seconds, or a duration such as "2m"."""


class TlsFiles(BaseModel):
    """For an adapter's Options: whom to trust, and how to prove who we are."""

    ca_file: str | None = None
    """PEM of the authorities to trust; the system's when absent."""
    cert_file: str | None = None
    key_file: str | None = None

    @model_validator(mode="after")
    def _key_has_certificate(self) -> Self:
        if self.key_file and not self.cert_file:
            raise ValueError("key_file needs cert_file")
        return self


@dataclass(frozen=True, slots=True)
class Address:
    """A parsed backend URL. `password` shows in neither repr nor str."""

    scheme: str
    hosts: tuple[tuple[str, int | None], ...] = ()
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    path: str = ""
    query: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def host(self) -> str:
        """The first host; "" where the URL names none."""
        return self.hosts[0][0] if self.hosts else ""

    def port(self, default: int) -> int:
        """The first host's port, or `default`."""
        return (self.hosts[0][1] if self.hosts else None) or default

    def __str__(self) -> str:
        hosts = ",".join(f"{_bracket(h)}:{p}" if p else _bracket(h) for h, p in self.hosts)
        user = f"{self.user}@" if self.user else ""
        return f"{self.scheme}://{user}{hosts}{self.path}"


def _bracket(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def parse_address(url: str, where: str = "url") -> Address:
    """Parse `scheme://[user[:password]@]host[:port][,host...][/path][?option=value]`. ConfigError names the part."""
    if not isinstance(url, str):
        raise ConfigError(f"{where}: a backend URL is text, not {type(url).__name__}")
    scheme, separator, rest = url.strip().partition("://")
    if not separator or not re.match(r"[a-z][a-z0-9+.-]*\Z", scheme):
        raise ConfigError(
            f"{where}: not a backend URL; it starts with a lower-case scheme, as in amqp://host or memory://"
        )
    rest, _, query_text = rest.partition("?")
    authority, slash, path = rest.partition("/")
    if "@" in path or "@" in query_text:  # else a part of the password would be taken for a path, and shown
        raise ConfigError(f"{where}: an '@' behind the host; percent-encode '/', '?' and '@' in user and password")
    credentials, at, host_text = authority.rpartition("@")
    user, colon, password = credentials.partition(":")
    hosts = tuple(_host(part, where) for part in host_text.split(",")) if host_text else ()
    try:
        pairs = parse_qsl(query_text, keep_blank_values=True, strict_parsing=bool(query_text))
    except ValueError:
        raise ConfigError(f"{where}: the part behind '?' must be option=value pairs joined by '&'") from None
    names = [name for name, _ in pairs]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise ConfigError(f"{where}: option {twice!r} stands twice behind '?'")
    return Address(
        scheme,
        hosts,
        unquote(user) if at and user else None,
        unquote(password) if colon else None,
        slash + path,
        dict(pairs),
    )


def _host(text: str, where: str) -> tuple[str, int | None]:
    match = re.match(r"(?:\[(?P<six>[0-9a-fA-F:.]+)\]|(?P<name>[^:\[\]]+))(?::(?P<port>\d+))?\Z", text)
    if match is None or (match["port"] and not 0 < int(match["port"]) < 65536):
        raise ConfigError(f"{where}: a host is written name, name:port or [ipv6]:port with a port of 1 to 65535")
    return match["six"] or match["name"], int(match["port"]) if match["port"] else None


def validated(model: type[M], values: Mapping[str, Any], where: str, also: Sequence[str] = ()) -> M:
    """`values` as `model`, or ConfigError with every wrong key, without any value. `also`: keys valid beside it."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = []
        for item in error.errors(include_url=False, include_context=False, include_input=False):
            key = ".".join(str(part) for part in item["loc"])
            if item["type"] == "extra_forbidden":
                problems.append(_unknown(key, [*model.model_fields, *also]))
            else:
                problems.append(f"{key or 'value'}: {item['msg']}")
        raise ConfigError(f"{where}: {'; '.join(problems)}") from None


def _unknown(key: str, known: Any) -> str:
    near = difflib.get_close_matches(key, list(known), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known)) or 'none'}"
    return f"unknown key {key!r}; {hint}"


@dataclass(frozen=True, slots=True)
class BackendSettings:
    """One `[backends.<name>]` table: the address, and what the adapter's own Options model will check."""

    name: str
    address: Address
    provision: Literal["create", "verify", "none"] = "create"
    emulation: Literal["allow", "forbid"] = "allow"
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class Settings:
    """A whole configuration. `destinations` maps a logical name to {adapter name: its block}."""

    backends: Mapping[str, BackendSettings]
    routes: Mapping[str, str]
    destinations: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)

    def backend_of(self, name: str) -> str:
        """The backend of destination `name`: exact route, else "*.<last word>", else the longest matching prefix.
        ConfigError if none."""
        if name in self.routes:
            return self.routes[name]
        rest, _, last = name.rpartition(".")
        if rest and (ending := f"*.{last}") in self.routes:
            return self.routes[ending]
        fitting = [r for r in self.routes if r.endswith("*") and name.startswith(r[:-1])]
        if not fitting:
            raise ConfigError(
                f"no route for destination {name!r}; [routes] has {', '.join(sorted(self.routes)) or 'none'}: "
                f'add "{name}" = "<backend>" or "*" = "<backend>"'
            )
        return self.routes[max(fitting, key=len)]


def from_url(url: str) -> Settings:
    """One backend for everything."""
    return from_mapping({"backends": {"main": {"url": url}}, "routes": {"*": "main"}})


def from_file(path: str | os.PathLike[str], *, env: str | None = None) -> Settings:
    """Read a TOML file; `env` picks its `[env.<name>]` overlay."""
    return from_mapping(_read(path), env=env, where=os.fspath(path))


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"configuration file {os.fspath(path)}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {os.fspath(path)} is not TOML: {error}") from None


def from_env(environ: Mapping[str, str] | None = None) -> Settings:
    """`MESSAGING_URL` (one backend for everything), else the file named by `MESSAGING_CONFIG` or `messaging.toml`.

    `MESSAGING_ENV` picks the file's overlay. `MESSAGING_BACKENDS__WORK__URL` (and `__PASSWORD`, `__PROVISION`, ...)
    together replace the whole backend table `work`.
    """
    environ = os.environ if environ is None else environ
    url = environ.get(f"{ENV_PREFIX}URL")
    file = environ.get(f"{ENV_PREFIX}CONFIG")
    if url and file:
        raise ConfigError("MESSAGING_URL and MESSAGING_CONFIG are both set; set one of them")
    if url:
        return from_url(url)
    overlays: dict[str, dict[str, str]] = {}
    for variable, value in environ.items():
        parts = variable.split("__")
        if parts[0] == f"{ENV_PREFIX}BACKENDS" and len(parts) == 3:
            overlays.setdefault(parts[1].lower(), {})[parts[2].lower()] = value
    path = Path(file or DEFAULT_FILE)
    raw: dict[str, Any] = {}
    if file or path.exists():
        raw = _read(path)
    elif not overlays:
        raise ConfigError(f"no configuration: set MESSAGING_URL or MESSAGING_CONFIG, or write {DEFAULT_FILE} here")
    raw = _overlaid(raw, environ.get(f"{ENV_PREFIX}ENV"), str(path))
    raw["backends"] = {**_table(raw.get("backends", {}), "backends"), **overlays}
    if not raw.get("routes") and len(raw["backends"]) == 1:
        raw["routes"] = {"*": next(iter(raw["backends"]))}
    return from_mapping(raw, where=str(path), environ=environ)


def from_mapping(
    raw: Mapping[str, Any],
    *,
    env: str | None = None,
    where: str = "configuration",
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """Check a configuration given as nested mappings. ConfigError names the key, and the nearest valid one."""
    raw = _overlaid(raw, env, where)
    for key in raw:
        if key not in _TOP_KEYS:
            raise ConfigError(f"{where}: {_unknown(key, _TOP_KEYS)}")
    environ = os.environ if environ is None else environ
    backends = {
        name: _backend(name, table, f"{where}: backends.{name}", environ)
        for name, table in _table(raw.get("backends", {}), f"{where}: backends").items()
    }
    if not backends:
        raise ConfigError(f"{where}: no [backends.<name>] table; each needs a url")
    routes = _table(raw.get("routes", {}), f"{where}: routes")
    for pattern, backend in routes.items():
        if not isinstance(backend, str) or backend not in backends:
            raise ConfigError(
                f"{where}: routes.{pattern!r} must name one of the backends {', '.join(sorted(backends))}"
            )
        ending = pattern[2:] if pattern.startswith("*.") and pattern.count(".") == 1 else pattern[:-1]
        if "*" in ending:
            raise ConfigError(f"{where}: routes.{pattern!r}: '*' stands only at the end, or as '*.<last word>'")
    destinations = {}
    for name, blocks in _table(raw.get("destinations", {}), f"{where}: destinations").items():
        place = f"{where}: destinations.{name}"
        destinations[name] = {a: _table(b, f"{place}.{a}") for a, b in _table(blocks, place).items()}
    return Settings(backends, cast("dict[str, str]", routes), destinations)


def _overlaid(raw: Mapping[str, Any], env: str | None, where: str) -> dict[str, Any]:
    """The configuration with overlay `env` laid over it: each named backend, route and destination is replaced."""
    plain = {k: v for k, v in raw.items() if k != "env"}
    if env is None:
        return plain | ({"env": raw["env"]} if "env" in raw else {})
    overlays = _table(raw.get("env", {}), f"{where}: env")
    if env not in overlays:
        raise ConfigError(f"{where}: no overlay [env.{env}]; there are: {', '.join(sorted(overlays)) or 'none'}")
    for section, entries in _table(overlays[env], f"{where}: env.{env}").items():
        if section not in _TOP_KEYS[:3]:
            raise ConfigError(f"{where}: env.{env}: {_unknown(section, _TOP_KEYS[:3])}")
        base = _table(plain.get(section, {}), f"{where}: {section}")
        plain[section] = {**base, **_table(entries, f"{where}: env.{env}.{section}")}
    return plain


def _table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must be a table, not {type(value).__name__}")
    return dict(value)


def _backend(name: str, table: Any, where: str, environ: Mapping[str, str]) -> BackendSettings:
    values = {"url": table} if isinstance(table, str) else _table(table, where)
    values = {k: _resolved(v, f"{where}.{k}", environ) for k, v in values.items()}
    if "url" not in values:
        near = next((k for k in values if difflib.get_close_matches(k, BACKEND_KEYS, n=1)), None)
        raise ConfigError(f"{where}: no url" + (f" (found {near!r})" if near else ""))
    address = parse_address(values.pop("url"), f"{where}.url")
    password = values.pop("password", None)
    if password is not None:
        if not isinstance(password, str):
            raise ConfigError(f"{where}.password must be text")
        if address.password is not None:
            raise ConfigError(f"{where}: a password stands both in the url and in password; keep one")
        address = Address(address.scheme, address.hosts, address.user, password, address.path, address.query)
    provision = _choice(values.pop("provision", "create"), ("create", "verify", "none"), f"{where}.provision")
    emulation = _choice(values.pop("emulation", "allow"), ("allow", "forbid"), f"{where}.emulation")
    both = sorted(set(values) & set(address.query))
    if both:
        raise ConfigError(f"{where}: {', '.join(both)} stand(s) both in the url and in the table; keep one")
    options = {**address.query, **values}
    return BackendSettings(name, address, provision, emulation, options)


def _choice(value: Any, allowed: tuple[str, ...], where: str) -> Any:
    if value not in allowed:
        raise ConfigError(f"{where} must be one of {', '.join(allowed)}")
    return value


def _resolved(value: Any, where: str, environ: Mapping[str, str]) -> Any:
    """`${env:NAME}` and `${file:/path}` inside text, replaced. A file's trailing line end is cut."""
    if not isinstance(value, str):
        return value
    for kind, name in _references(value):
        if kind == "env":
            if name not in environ:
                raise ConfigError(f"{where}: environment variable {name} is not set")
            found = environ[name]
        elif kind != "file":
            raise ConfigError(f"{where}: ${{{kind}:...}} is unknown; ${{env:NAME}} and ${{file:/path}} are known")
        else:
            try:
                found = Path(name).read_text(encoding="utf-8").rstrip("\r\n")
            except (OSError, UnicodeDecodeError) as error:
                reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
                raise ConfigError(f"{where}: secret file {name}: {reason}") from None
        value = value.replace(f"${{{kind}:{name}}}", found)
    return value


def _references(value: str) -> Iterator[tuple[str, str]]:
    for match in _REFERENCE.finditer(value):
        yield match[1], match[2]
