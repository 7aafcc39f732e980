"""Laws of the Kafka adapter that need no broker: where a key goes, and what a commit's note says."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from messaging_sdk import Outcome, Queue
from messaging_sdk.config import Address
from messaging_sdk.model import Outgoing
from messaging_sdk.spi import Outcomes
from messaging_sdk_kafka import Driver
from messaging_sdk_kafka.driver import producer_config
from messaging_sdk_kafka.receiver import ahead_of, noted
from messaging_sdk_kafka.sender import Link, Sender

JAVA_MURMUR2 = {  # org.apache.kafka.common.utils.UtilsTest.testMurmur2
    "21": -973932308,
    "foobar": -790332482,
    "a-little-bit-long-string": -985981536,
    "a-little-bit-longer-string": -1486304829,
    "lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
    "abc": 479470107,
}
MOCK = {"test.mock.num.brokers": 1, "allow.auto.create.topics": True}
PARTITIONS = 4  # what librdkafka's mock cluster gives a topic


def test_a_key_goes_where_the_java_client_sends_it() -> None:
    driver = Driver(Address("kafka", (("127.0.0.1", 9092),)), Driver.Options(), {})
    config = {**producer_config(driver, confirmed=True), **MOCK}
    found: dict[str, int] = {}

    async def body() -> None:
        link = Link(config, asyncio.get_running_loop(), "mock")
        sender = Sender(link, "t", PARTITIONS, "mock", max_body=1000, confirmed=True)
        told: asyncio.Future[Outcomes] = asyncio.get_running_loop().create_future()
        produce = link.producer.produce
        messages = [Outgoing(b"x", key, key) for key in JAVA_MURMUR2]
        sender.send_batch(messages, told.set_result)
        async with asyncio.timeout(30):
            assert all(result.outcome is Outcome.OK for _, result in await told)
        placed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def note(error: object, message: object) -> None:
            found[message.key().decode()] = message.partition()  # type: ignore[attr-defined]
            if len(found) == len(JAVA_MURMUR2):
                link.tell(placed.set_result, None)

        for key in JAVA_MURMUR2:
            produce("t", b"x", key=key.encode(), on_delivery=note)
        async with asyncio.timeout(30):
            await placed
        link.close()
        await asyncio.to_thread(link.thread.join)

    asyncio.run(body())
    assert found == {key: (value & 0x7FFFFFFF) % PARTITIONS for key, value in JAVA_MURMUR2.items()}


@given(position=st.integers(0, 1 << 40), ahead=st.sets(st.integers(0, 16_383 + 500)))
def test_a_note_tells_exactly_what_is_settled_ahead_and_fits_into_a_commit(position: int, ahead: set[int]) -> None:
    offsets = sorted(position + n for n in ahead)
    note = noted(position, offsets)
    assert ahead_of(position, note) == set(offsets)
    assert len(note) <= 4096, "offset.metadata.max.bytes"


@pytest.mark.parametrize("note", [None, "", "somebody else's", "ahead1:", "ahead1:%%%", "ahead2:AA=="])
def test_a_note_of_another_program_settles_nothing(note: str | None) -> None:
    assert ahead_of(7, note) == set()


def test_a_name_with_underscores_never_meets_one_with_dots() -> None:
    from messaging_sdk_kafka.options import topic_name

    dotted, scored = topic_name(Queue("a.b", bytes), None), topic_name(Queue("a_b", bytes), None)
    assert dotted == "a.b" and dotted.replace(".", "_") != scored.replace(".", "_")
