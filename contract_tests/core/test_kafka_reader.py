"""Laws of Kafka's history reader that need no broker: a scripted client."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from _drive import drive
from confluent_kafka import OFFSET_BEGINNING, OFFSET_END, KafkaError, KafkaException, TopicPartition

from messaging_sdk import AuthError, ConnectError, ConnectionLost, OutOfRange, UsageError
from messaging_sdk_kafka.reader import HistoryReader

ID = "BbEyKMpISF6Y8HZc/Tsdeg"


class Record:
    """A record, or with `code` what comes in place of one."""

    def __init__(self, partition: int, offset: int, code: int | None = None) -> None:
        self._partition, self._offset, self._code = partition, offset, code

    def error(self) -> KafkaError | None:
        return None if self._code is None else KafkaError(self._code)

    def partition(self) -> int:
        return self._partition

    def offset(self) -> int:
        return self._offset

    def topic(self) -> str:
        return "t"

    def key(self) -> None:
        return None

    def value(self) -> bytes:
        return f"{self._partition}:{self._offset}".encode()

    def headers(self) -> None:
        return None


def eof(partition: int, offset: int) -> Record:
    return Record(partition, offset, KafkaError._PARTITION_EOF)


class Client:
    """Gives one list of `batches` per call, then nothing; `ends` and `firsts` are what the broker answers."""

    def __init__(self, ends: dict[int, int], firsts: dict[int, int], batches: Sequence[Sequence[Record]]) -> None:
        self.ends, self.firsts, self.batches = ends, firsts, [list(b) for b in batches]
        self.at: dict[int, int] = {}
        self.closed = False
        self.is_sure = True

    def offsets_for_times(self, asked: list[TopicPartition], timeout: float) -> list[TopicPartition]:
        if not self.is_sure:
            raise KafkaException(KafkaError(KafkaError.OFFSET_NOT_AVAILABLE))
        found = {OFFSET_END: self.ends, OFFSET_BEGINNING: self.firsts}
        return [TopicPartition("t", p.partition, found.get(p.offset, self.ends)[p.partition]) for p in asked]

    def assign(self, partitions: list[TopicPartition]) -> None:
        self.at = {p.partition: p.offset for p in partitions}

    def pause(self, partitions: list[TopicPartition]) -> None:
        """Nothing more is fetched."""

    def consume(self, most: int, wait_s: float) -> list[Record]:
        return self.batches.pop(0) if self.batches else []

    def close(self) -> None:
        self.closed = True


def reader(ends: dict[int, int], *batches: Sequence[Record], firsts: dict[int, int] | None = None) -> HistoryReader:
    made = HistoryReader({"test.mock.num.brokers": 1}, "t", ID, "a replay of t")
    made._consumer.close()
    made._consumer = Client(ends, firsts or dict.fromkeys(ends, 0), batches)  # type: ignore[assignment]
    return made


def client_of(made: HistoryReader) -> Client:
    found: Any = made._consumer
    return found


async def all_of(made: HistoryReader) -> list[bytes]:
    found = []
    while (message := await made.read()) is not None:
        found.append(bytes(message.body))
    return found


def law(body: Callable[[], Any]) -> None:
    drive(body())


def test_it_ends_where_the_log_ended_and_leaves_out_what_came_later() -> None:
    async def main() -> None:
        made = reader({0: 2, 1: 1}, [Record(0, 0), Record(1, 0)], [Record(0, 1), Record(0, 2), Record(1, 1)])
        await made.start(2, None)
        assert await all_of(made) == [b"0:0", b"1:0", b"0:1"]
        assert made.position() == f"{ID}/0:2,1:1"

    law(main)


def test_an_end_of_markers_or_compacted_away_is_an_end() -> None:
    async def main() -> None:
        made = reader({0: 5}, [Record(0, 0), eof(0, 5)])
        await made.start(1, None)
        assert await all_of(made) == [b"0:0"]
        assert made.position() == f"{ID}/0:5"

    law(main)


def test_an_error_within_a_batch_comes_behind_its_records_and_stays() -> None:
    async def main() -> None:
        gone = Record(1, 0, KafkaError._AUTO_OFFSET_RESET)
        made = reader({0: 9, 1: 9}, [Record(0, 5), gone, Record(0, 6)], [Record(0, 7)])
        await made.start(2, f"{ID}/0:5,1:0")
        assert [bytes(m.body) for _ in range(2) if (m := await made.read())] == [b"0:5", b"0:6"]
        for _ in range(2):
            with pytest.raises(OutOfRange):
                await made.read()
        assert made.position() == f"{ID}/0:7,1:0"

    law(main)


def test_a_log_that_seems_shorter_is_waited_for_until_the_broker_is_sure() -> None:
    async def main() -> None:
        made = reader({0: 3}, [Record(0, 0), eof(0, 1)], [], [])
        await made.start(1, None)
        client_of(made).is_sure = False
        assert await made.read() is not None
        reading = asyncio.ensure_future(all_of(made))
        await asyncio.sleep(0.05)
        assert not reading.done()
        client_of(made).batches = [[Record(0, 1), Record(0, 2)]]
        assert await reading == [b"0:1", b"0:2"]

    law(main)


def test_a_log_that_was_cut_off_ends_where_it_ends_now() -> None:
    async def main() -> None:
        made = reader({0: 3}, [Record(0, 0), eof(0, 1)])
        await made.start(1, None)
        client_of(made).ends = {0: 1}
        assert await all_of(made) == [b"0:0"]
        assert made.position() == f"{ID}/0:1"

    law(main)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (KafkaError.TOPIC_AUTHORIZATION_FAILED, AuthError),
        (KafkaError.UNKNOWN_TOPIC_OR_PART, ConnectionLost),
        (KafkaError.KAFKA_STORAGE_ERROR, ConnectionLost),
        (KafkaError.GROUP_AUTHORIZATION_FAILED, None),
        (KafkaError._TRANSPORT, None),
    ],
)
def test_what_an_error_of_the_client_means(code: int, kind: type[Exception] | None) -> None:
    async def main() -> None:
        made = reader({0: 1}, [Record(0, 0, code)], [Record(0, 0)])
        await made.start(1, None)
        if kind is None:
            assert await all_of(made) == [b"0:0"]
        else:
            with pytest.raises(kind):
                await made.read()

    law(main)


@pytest.mark.parametrize(
    ("since", "kind"),
    [
        ("x", UsageError),
        (f"{ID}/0", UsageError),
        ("other/0:1", OutOfRange),  # made again
        (f"{ID}/0:1", OutOfRange),  # deleted by retention
        (f"{ID}/0:9", OutOfRange),  # cut off
        (f"{ID}/0:4,1:0", ConnectError),  # a broker that does not know partition 1 yet
    ],
)
def test_where_a_replay_cannot_begin(since: str, kind: type[Exception]) -> None:
    async def main() -> None:
        made = reader({0: 5}, firsts={0: 3})
        with pytest.raises(kind):
            await made.start(1, since)

    law(main)


def test_a_partition_that_came_later_is_read_from_its_beginning_or_not_at_all() -> None:
    async def main() -> None:
        made = reader({0: 5, 1: 2}, [Record(1, 0), Record(1, 1)])
        await made.start(2, f"{ID}/0:5")
        assert await all_of(made) == [b"1:0", b"1:1"]
        with pytest.raises(OutOfRange):
            await reader({0: 5, 1: 2}, firsts={0: 0, 1: 1}).start(2, f"{ID}/0:5")

    law(main)


def test_close_ends_a_read_that_waits_and_the_client() -> None:
    async def main() -> None:
        made = reader({0: 1})
        await made.start(1, None)
        reading = asyncio.ensure_future(made.read())
        await asyncio.sleep(0.02)
        await made.close()
        with pytest.raises(ConnectionLost):
            await reading
        assert client_of(made).closed
        await made.close()

    law(main)


def test_a_cancelled_read_loses_nothing() -> None:
    async def main() -> None:
        made = reader({0: 200}, *([Record(0, n)] for n in range(200)))
        await made.start(1, None)
        found: list[bytes] = []
        for pause_s in itertools.cycle((0, 0, 0.0002, 0.001)):
            reading = asyncio.ensure_future(made.read())
            await asyncio.sleep(pause_s)
            reading.cancel()
            try:
                message = await reading
            except asyncio.CancelledError:
                continue
            if message is None:
                break
            found.append(bytes(message.body))
        assert found == [f"0:{n}".encode() for n in range(200)]

    law(main)
