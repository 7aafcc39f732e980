"""Laws of configuration: overlays replace, routes are explicit, and no text ever shows a secret."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from _drive import fresh
from _scripted import RecordingDriver
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from messaging_sdk import Bus, ConfigError, MessagingError, Queue, Settings
from messaging_sdk.config import (
    Address,
    Seconds,
    TlsFiles,
    from_env,
    from_file,
    from_mapping,
    from_url,
    parse_address,
    seconds,
)
from messaging_sdk.registry import make_driver, register

SECRET = "S3CR3T"


def toml(folder: Path, text: str) -> Path:
    path = folder / "messaging.toml"
    path.write_text(text, encoding="utf-8")
    return path


FULL = """
[backends.work]
url = "memory://work"
password = "first"
[backends.events]
url = "memory://events"
provision = "verify"
[routes]
"billing.*" = "work"
"*" = "events"
[destinations."orders.placed"]
memory = {}
[env.staging.backends]
work = { url = "memory://staging" }
[env.staging.routes]
"audit.*" = "work"
"""


# --- where it comes from


def test_a_toml_file_becomes_settings(tmp_path: Path) -> None:
    settings = from_file(toml(tmp_path, FULL))
    assert sorted(settings.backends) == ["events", "work"]
    assert settings.backends["events"].provision == "verify"
    assert settings.backends["work"].address.password == "first"


def test_an_overlay_replaces_a_backend_and_never_merges_its_password(tmp_path: Path) -> None:
    work = from_file(toml(tmp_path, FULL), env="staging").backends["work"]
    assert work.address.host == "staging"
    assert work.address.password is None


def test_an_overlay_leaves_what_it_does_not_name(tmp_path: Path) -> None:
    settings = from_file(toml(tmp_path, FULL), env="staging")
    assert settings.backends["events"].address.host == "events"
    assert settings.routes == {"billing.*": "work", "*": "events", "audit.*": "work"}


def test_an_overlay_that_does_not_exist_is_refused_naming_those_that_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no overlay \[env\.prod\]; there are: staging"):
        from_file(toml(tmp_path, FULL), env="prod")


def test_from_config_takes_the_overlay_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESSAGING_ENV", "staging")
    bus = Bus.from_config(toml(tmp_path, FULL.replace('password = "first"\n', "")))
    assert bus.settings.backends["work"].address.host == "staging"


def test_a_url_is_one_backend_for_everything() -> None:
    settings = from_url("memory://x")
    assert settings.backend_of("any.name") == "main"


def test_an_absent_file_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml: No such file"):
        from_file(tmp_path / "absent.toml")


def test_a_file_that_is_not_toml_is_refused_with_the_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not TOML.*line 2"):
        from_file(toml(tmp_path, "[backends]\nwork = = 1"))


def test_messaging_url_alone_is_enough() -> None:
    assert from_env({"MESSAGING_URL": "memory://env"}).backends["main"].address.host == "env"


def test_messaging_config_names_the_file_and_messaging_env_its_overlay(tmp_path: Path) -> None:
    settings = from_env({"MESSAGING_CONFIG": str(toml(tmp_path, FULL)), "MESSAGING_ENV": "staging"})
    assert settings.backends["work"].address.host == "staging"


def test_url_and_config_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="both set"):
        from_env({"MESSAGING_URL": "memory://", "MESSAGING_CONFIG": "x.toml"})


def test_no_configuration_at_all_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"MESSAGING_URL or MESSAGING_CONFIG, or write messaging.toml"):
        from_env({})


def test_variables_of_a_backend_together_replace_its_table(tmp_path: Path) -> None:
    environ = {
        "MESSAGING_CONFIG": str(toml(tmp_path, FULL)),
        "MESSAGING_BACKENDS__WORK__URL": "memory://variable",
        "MESSAGING_BACKENDS__WORK__PROVISION": "none",
    }
    work = from_env(environ).backends["work"]
    assert (work.address.host, work.provision, work.address.password) == ("variable", "none", None)


def test_a_single_backend_from_variables_gets_every_route(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = from_env({"MESSAGING_BACKENDS__MAIN__URL": "memory://v"})
    assert settings.backend_of("anything") == "main"


# --- what is wrong is named, with what is near


def config(**tables: Any) -> dict[str, Any]:
    return {"backends": {"main": {"url": "memory://x"}}, "routes": {"*": "main"}} | tables


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (config(rotues={}), "unknown key 'rotues'; did you mean 'routes'"),
        (config(backends={}), "no .backends.<name>. table"),
        (config(backends={"main": {}}), "backends.main: no url"),
        (config(backends={"main": 7}), "backends.main must be a table, not int"),
        (config(backends={"main": {"url": 7}}), "backends.main.url: a backend URL is text, not int"),
        (config(backends={"main": {"url": "memory"}}), "not a backend URL"),
        (config(backends={"main": {"url": "memory://x", "provision": "yes"}}), "provision must be one of create"),
        (config(backends={"main": {"url": "memory://x", "emulation": "no"}}), "emulation must be one of allow"),
        (config(backends={"main": {"url": "memory://x", "password": 7}}), "password must be text"),
        (config(routes={"*": "mian"}), "must name one of the backends main"),
        (config(routes={"a*b": "main"}), "'\\*' stands only at the end"),
        (config(routes=[]), "routes must be a table, not list"),
        (config(destinations={"d": 1}), "destinations.d must be a table"),
        (config(destinations={"d": {"memory": 1}}), "destinations.d.memory must be a table"),
    ],
)
def test_a_wrong_configuration_is_refused_naming_the_place(raw: Mapping[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        from_mapping(raw)


@pytest.mark.parametrize(
    ("key", "near"),
    [("relase", "release"), ("provison", "provision"), ("pasword", "password"), ("emulaton", "emulation")],
)
def test_an_unknown_key_of_a_backend_names_the_nearest_valid_one(key: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown key '{key}'; did you mean '{near}'"):
        Bus(config(backends={"main": {"url": "memory://x", key: "now"}}))


def test_an_unknown_option_of_a_url_names_the_nearest_valid_one() -> None:
    with pytest.raises(ConfigError, match="unknown key 'relase'; did you mean 'release'"):
        Bus("memory://x?relase=now")


def test_all_wrong_keys_of_a_backend_come_together() -> None:
    with pytest.raises(ConfigError, match=r"relase.*cuont"):
        Bus("memory://x?relase=now&cuont=exact")


def test_an_unknown_scheme_names_the_installed_ones() -> None:
    with pytest.raises(ConfigError, match=r"scheme 'pigeon'; installed: .*amqp.*memory.*nats"):
        Bus("pigeon://x")


def test_a_key_both_in_the_url_and_in_the_table_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"release stand.* both"):
        from_mapping(config(backends={"main": {"url": "memory://x?release=now", "release": "none"}}))


def test_a_password_both_in_the_url_and_in_the_table_is_refused() -> None:
    with pytest.raises(ConfigError, match="keep one"):
        from_mapping(config(backends={"main": {"url": "memory://u:a@x", "password": "b"}}))


class BlockOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    partitions: int = 1


def inactive_adapter() -> str:
    """The name of an installed adapter that no backend of a test uses."""
    name = fresh("other")
    kind = type("Other", (RecordingDriver,), {"made": [], "name": name, "DestinationOptions": BlockOptions})
    register(name, kind)
    return name


def test_a_destination_block_of_an_adapter_in_no_use_is_checked_too() -> None:
    name = inactive_adapter()
    with pytest.raises(ConfigError, match=f"destinations.orders.{name}: unknown key 'partition'; did you mean 'partit"):
        Bus(config(destinations={"orders": {name: {"partition": 12}}}))


def test_a_right_block_of_an_adapter_in_no_use_is_accepted() -> None:
    Bus(config(destinations={"orders": {inactive_adapter(): {"partitions": 12}}}))


def test_a_block_of_an_adapter_that_is_not_installed_is_left_alone() -> None:
    Bus(config(destinations={"orders": {"not-here": {"anything": 1}}}))


# --- routes


def routed(routes: dict[str, str], name: str) -> str:
    backends = {b: {"url": f"memory://{b}"} for b in ("a", "b", "c")}
    return from_mapping({"backends": backends, "routes": routes}).backend_of(name)


def test_an_exact_route_wins() -> None:
    assert routed({"*": "a", "orders.*": "b", "orders.placed": "c"}, "orders.placed") == "c"


def test_else_the_longest_prefix_wins() -> None:
    assert routed({"*": "a", "orders.*": "b", "orders.eu.*": "c"}, "orders.eu.placed") == "c"


def test_an_ending_wins_over_a_prefix_and_loses_to_the_whole_name() -> None:
    backends = {name: {"url": "memory://x"} for name in ("all", "graves", "mine")}
    routes = {"*": "all", "billing.*": "all", "*.dead": "graves", "billing.x.dead": "mine"}
    settings = from_mapping({"backends": backends, "routes": routes})
    names = ("billing.charge.dead", "dead", "billing.x.dead", "a.dead.letters", "a.undead")
    assert [settings.backend_of(n) for n in names] == ["graves", "all", "mine", "all", "all"]


@pytest.mark.parametrize("route", ["*.a.b", "a.*.dead", "*dead", "*.*"])
def test_an_ending_is_one_word(route: str) -> None:
    with pytest.raises(ConfigError, match="'\\*' stands only"):
        from_mapping({"backends": {"main": {"url": "memory://x"}}, "routes": {route: "main"}})


def test_a_prefix_ends_where_it_was_written() -> None:
    assert routed({"*": "a", "orders.*": "b"}, "orders") == "a"


def test_no_route_is_an_error_that_tells_what_to_add() -> None:
    with pytest.raises(ConfigError, match='no route for destination \'mail\'.*add "mail" = "<backend>"'):
        routed({"orders.*": "b"}, "mail")


@given(st.lists(st.sampled_from(["a", "ab", "abc", "b", "bc", ""]), unique=True), st.text("abc", min_size=1))
def test_the_chosen_prefix_fits_and_no_longer_one_does(prefixes: list[str], name: str) -> None:
    backends = {f"to-{p}": {"url": "memory://x"} for p in prefixes}
    if not backends:
        return
    settings = from_mapping({"backends": backends, "routes": {f"{p}*": f"to-{p}" for p in prefixes}})
    fitting = [p for p in prefixes if name.startswith(p)]
    if not fitting:
        with pytest.raises(ConfigError):
            settings.backend_of(name)
        return
    assert settings.backend_of(name) == f"to-{max(fitting, key=len)}"


# --- addresses


def test_an_address_has_its_parts() -> None:
    address = parse_address("amqps://shop%40eu:p%2Fw@mq1:5671,mq2,[::1]:7/vhost%2F?heartbeat_s=5&x=")
    assert address.scheme == "amqps" and address.user == "shop@eu" and address.password == "p/w"
    assert address.hosts == (("mq1", 5671), ("mq2", None), ("::1", 7))
    assert address.path == "/vhost%2F" and address.query == {"heartbeat_s": "5", "x": ""}


def test_an_address_written_again_has_no_password() -> None:
    assert str(parse_address("amqp://u:p@h:1,[::1]:2/v?q=1")) == "amqp://u@h:1,[::1]:2/v"


@pytest.mark.parametrize(
    "url",
    ["", "memory", "MEMORY://x", "amqp://h:0", "amqp://h:65536", "amqp://h:x", "amqp://[::1", "amqp://h?a", "amqp://h?a=1&a=2"],
)  # fmt: skip
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        parse_address(url)


@pytest.mark.parametrize("url", ["amqp://u:1/2@host/v", "amqp://u:1?a=2@host", "amqp://u:1/2@host:5672"])
def test_an_at_sign_behind_the_host_is_an_unescaped_password_and_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="percent-encode"):
        parse_address(url)


HOSTS = st.from_regex(r"[a-z][a-z0-9-]{0,10}(\.[a-z0-9]{1,5})?", fullmatch=True)


@given(HOSTS, st.one_of(st.none(), st.integers(1, 65535)), st.text(min_size=1), st.text())
def test_percent_encoded_credentials_come_out_as_they_went_in(
    host: str, port: int | None, user: str, password: str
) -> None:
    from urllib.parse import quote

    try:
        url = f"amqp://{quote(user, safe='')}:{quote(password, safe='')}@{host}" + (f":{port}" if port else "")
    except UnicodeEncodeError:  # a lone surrogate has no percent-encoded form
        return
    address = parse_address(url)
    assert (address.user, address.password, address.hosts) == (user, password, ((host, port),))


@given(st.text())
def test_any_text_is_an_address_or_a_config_error(text: str) -> None:
    with suppress(ConfigError):
        assert isinstance(parse_address(text), Address)


def test_a_tls_key_without_its_certificate_is_refused() -> None:
    with pytest.raises(ValidationError, match="key_file needs cert_file"):
        TlsFiles(key_file="key.pem")
    assert TlsFiles(key_file="key.pem", cert_file="cert.pem").key_file == "key.pem"


@pytest.mark.parametrize("url", ["amqps://shop@mq", "nats+tls://shop@mq", "kafka+tls://shop@mq"])
def test_every_adapter_with_client_certificates_refuses_a_key_alone(url: str) -> None:
    settings = from_mapping({"backends": {"work": {"url": url, "key_file": "key.pem"}}, "routes": {"*": "work"}})
    with pytest.raises(ConfigError, match="key_file needs cert_file"):
        make_driver(settings.backends["work"], settings)


@pytest.mark.parametrize(
    ("text", "value"), [("250ms", 0.25), ("1.5s", 1.5), ("2m", 120), ("1h", 3600), ("7d", 604800), (3, 3), (0.5, 0.5)]
)
def test_durations_are_seconds(text: float | str, value: float) -> None:
    assert seconds(text) == value


@pytest.mark.parametrize("wrong", ["", "5", "5 years", "-1s", -1, True, None, float("nan"), [1]])
def test_what_is_no_duration_is_refused_naming_the_option(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="delay: not a duration"):
        seconds(wrong, "delay")


# --- secrets


def test_a_password_by_environment_reference_is_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MQ_PASSWORD", SECRET)
    settings = from_mapping(config(backends={"main": {"url": "memory://u@x", "password": "${env:MQ_PASSWORD}"}}))
    assert settings.backends["main"].address.password == SECRET


def test_a_password_by_file_reference_is_resolved_without_its_line_end(tmp_path: Path) -> None:
    secret = tmp_path / "mq"
    secret.write_text(f"{SECRET}\n")
    settings = from_mapping(config(backends={"main": {"url": "memory://u@x", "password": f"${{file:{secret}}}"}}))
    assert settings.backends["main"].address.password == SECRET


def test_a_reference_of_an_unknown_kind_is_refused_instead_of_taken_literally() -> None:
    with pytest.raises(ConfigError, match=r"\$\{vault:\.\.\.\} is unknown; \$\{env:NAME\} and"):
        from_mapping({"backends": {"a": {"url": "memory://", "password": "${vault:mq}"}}, "routes": {"*": "a"}})


def test_a_file_that_is_not_utf8_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "messaging.toml"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"messaging\.toml is not TOML"):
        from_file(file)


def test_a_reference_to_nothing_is_refused_naming_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="environment variable NO_SUCH is not set"):
        from_mapping(config(backends={"main": {"url": "memory://x", "password": "${env:NO_SUCH}"}}), environ={})
    with pytest.raises(ConfigError, match="/no/such: No such file"):
        from_mapping(config(backends={"main": {"url": "memory://x", "password": "${file:/no/such}"}}))


def told_of(call: Any) -> str:
    """Everything that a program could print of what `call()` gives or raises, tracebacks included."""
    try:
        found = call()
    except MessagingError as error:
        chain: BaseException | None = error
        text = "".join(traceback.format_exception(error))
        while chain is not None:
            text += repr(chain) + repr(chain.args)
            chain = chain.__cause__ or (None if chain.__suppress_context__ else chain.__context__)
        # The line of source that a traceback quotes is the test's own; it names the variable, not the value.
        return text
    assert isinstance(found, (Bus, Settings, Address))
    text = repr(found) + str(found)
    known = found.settings if isinstance(found, Bus) else found if isinstance(found, Settings) else None
    for backend in known.backends.values() if known is not None else ():
        text += repr(backend) + str(backend) + repr(backend.address) + str(backend.address)
    return text


NOISE = st.text(alphabet="/?#@:&=%[]${} ,aZ09é\n", max_size=6)
PLACES = st.sampled_from(["url", "url and table", "password", "query", "env"])


@settings(max_examples=80)
@given(NOISE, NOISE, PLACES, st.sampled_from(["memory", "amqp", "nats", "amqps", "kafka", "x y"]))
def test_a_password_never_shows_in_a_text_however_it_is_written(
    before: str, after: str, place: str, scheme: str
) -> None:
    password = before + SECRET + after
    url = f"{scheme}://shop:{password}@mq.internal/v"
    tables: dict[str, dict[str, Any]] = {
        "url": {"url": url},
        "url and table": {"url": url, "password": password},
        "password": {"url": f"{scheme}://shop@mq.internal/v", "password": password, "provision": "yes"},
        "query": {"url": f"{scheme}://mq.internal", "password": password, "heartbeat_s": password, "unknown": password},
        "env": {"url": f"{scheme}://shop@mq.internal", "password": "${env:MQ}", "provision": "${env:MQ}"},
    }
    raw = config(backends={"main": tables[place]})
    environ = {"MQ": password, "MESSAGING_URL": url}
    texts = [
        told_of(lambda: from_mapping(raw, environ=environ)),
        told_of(lambda: Bus(from_mapping(raw, environ=environ))),
        told_of(lambda: from_env({"MESSAGING_URL": url})),
        told_of(lambda: parse_address(url)),
    ]
    assert [t for t in texts if SECRET in t] == []


def test_a_token_among_the_options_shows_in_no_text() -> None:
    assert SECRET not in told_of(lambda: Bus(f"nats://h?token={SECRET}"))


def test_a_secret_shows_in_no_error_of_a_route(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = from_mapping({"backends": {"m": f"memory://u:{SECRET}@x"}, "routes": {"a": "m"}})
    with pytest.raises(ConfigError) as caught:
        settings.backend_of(Queue("b", bytes).name)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("wrong", ["inf", "nan", "", True, 10**400, None])
def test_a_configured_duration_is_a_finite_number_or_a_duration(wrong: object) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Seconds).validate_python(wrong)
    assert TypeAdapter(Seconds).validate_python("2m") == 120.0
