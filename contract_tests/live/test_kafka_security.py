"""A Kafka that asks for TLS and a password: who may in, and what the others are told."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._scram import ScramCredentialInfo, ScramMechanism, UserScramCredentialUpsertion
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from messaging_sdk import AuthError, Bus, ConnectError, MessagingError, Queue
from messaging_sdk.config import from_mapping
from messaging_sdk_contract.live import LiveService, make_tls, start_service

PROPERTIES: Final = "/mnt/shared/config/server.properties"
STORE: Final = "/opt/kafka/tls.pem"
WAIT_S: Final = 30.0
SECURED: Final = f"""
listener.security.protocol.map=EXTERNAL:PLAINTEXT,PROXIED:PLAINTEXT,SASL:SASL_SSL,INTERNAL:PLAINTEXT,CONTROLLER:PLAINTEXT
listener.name.sasl.ssl.keystore.type=PEM
listener.name.sasl.ssl.keystore.location={STORE}
listener.name.sasl.sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256,SCRAM-SHA-512
listener.name.sasl.scram-sha-256.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.sasl.scram-sha-512.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;
"""
SCRAM: Final = {"SCRAM-SHA-256": ScramMechanism.SCRAM_SHA_256, "SCRAM-SHA-512": ScramMechanism.SCRAM_SHA_512}
SECRET: Final = "open-sesame"
JOBS: Final = Queue("security.jobs", bytes)


@pytest.fixture(scope="module")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LiveService, Path]]:
    """A broker whose port 9095 asks for TLS and a password, and the file with its authority's certificate."""
    tls = make_tls()
    ca = tmp_path_factory.mktemp("tls") / "ca.pem"
    ca.write_bytes(tls.ca_pem)
    key = load_pem_private_key(tls.key_pem, None).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    plain = (Path(__file__).parents[1] / "containers/config/kafka/server.properties").read_bytes()
    service = start_service("kafka", files={PROPERTIES: plain + SECURED.encode(), STORE: tls.cert_pem + key})
    try:
        admin = AdminClient({"bootstrap.servers": "{}:{}".format(*service.address(9092)), "log_level": 0})
        service.wait_ready(lambda: admin.list_topics(timeout=2.0))
        for mechanism in SCRAM.values():  # one after the other: a request may name a user once
            user = UserScramCredentialUpsertion("shop", ScramCredentialInfo(mechanism, 4096), SECRET.encode())
            for altered in admin.alter_user_scram_credentials([user]).values():
                altered.result(WAIT_S)
        yield service, ca
    finally:
        service.remove()


def at(kafka: tuple[LiveService, Path], user: str, password: str, **options: Any) -> Mapping[str, Any]:
    """A configuration of one backend there."""
    host, port = kafka[0].address(9095)
    url = f"{options.pop('scheme', 'kafka+tls')}://{user}@{host}:{port}"
    work = {"url": url, "password": password, "partitions": 1, **options}
    return {"backends": {"work": work}, "routes": {"*": "work"}}


async def passed_on(settings: Mapping[str, Any]) -> bytes:
    """A message published and taken there."""
    async with asyncio.timeout(WAIT_S), Bus(from_mapping(settings)) as bus:
        await bus.publish(JOBS, b"hello")
        async with bus.consume(JOBS) as stream:
            found = await stream.next(WAIT_S)
            assert found is not None
            await found.ack()
            return found.body


@pytest.mark.parametrize(
    ("user", "password", "mechanism"),
    [("sdk", "sdk", "PLAIN"), *(("shop", SECRET, mechanism) for mechanism in SCRAM)],
)
def test_who_has_the_password_publishes_and_consumes_over_tls(
    kafka: tuple[LiveService, Path], user: str, password: str, mechanism: str
) -> None:
    settings = at(kafka, user, password, ca_file=str(kafka[1]), sasl_mechanism=mechanism)
    assert asyncio.run(passed_on(settings)) == b"hello"


@pytest.mark.parametrize(
    ("user", "options", "error"),
    [
        ("shop", {"sasl_mechanism": "SCRAM-SHA-512"}, AuthError),
        ("nobody", {"sasl_mechanism": "SCRAM-SHA-512"}, AuthError),
        ("sdk", {"sasl_mechanism": "PLAIN"}, AuthError),
        ("shop", {"sasl_mechanism": "SCRAM-SHA-512", "ca_file": None}, ConnectError),
        ("shop", {"sasl_mechanism": "SCRAM-SHA-512", "ca_file": None, "scheme": "kafka"}, ConnectError),
    ],
    ids=["wrong password", "unknown user", "wrong plain password", "unknown authority", "no TLS"],
)
def test_the_others_are_told_why_before_the_time_is_up(
    kafka: tuple[LiveService, Path], user: str, options: Mapping[str, Any], error: type[MessagingError]
) -> None:
    chosen = {"ca_file": str(kafka[1]), **options}
    settings = at(kafka, user, "wr0ng-secret", **{k: v for k, v in chosen.items() if v is not None})
    with pytest.raises(error) as raised:
        asyncio.run(passed_on(settings))
    assert "wr0ng-secret" not in str(raised.value)
    print(raised.value)
