"""Laws of a Kafka member and sender that need no broker: a scripted client, or librdkafka's own mock cluster."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from messaging_sdk import (
    AuthError,
    ConfigError,
    ConnectError,
    ConnectionLost,
    InvalidMessage,
    NotFound,
    Outcome,
    SettleLost,
    TooLarge,
)
from messaging_sdk.config import Address
from messaging_sdk.model import Outgoing
from messaging_sdk.spi import ACCEPT, Outcomes
from messaging_sdk_kafka import Driver
from messaging_sdk_kafka.driver import producer_config
from messaging_sdk_kafka.errors import TABLE, Solitude, refusal, report
from messaging_sdk_kafka.options import group_id
from messaging_sdk_kafka.receiver import (
    ASIDE,
    BUSY_POLL_S,
    Answers,
    Claim,
    Member,
    Receiver,
    ahead_of,
    message_of,
    meta_of,
)
from messaging_sdk_kafka.sender import Link, Sender

MOCK = {"test.mock.num.brokers": 1, "allow.auto.create.topics": True}
HOST = (("127.0.0.1", 9092),)


class Record:
    """What a consumer's poll gives."""

    def __init__(self, offset: int, headers: list[tuple[str, bytes | None]] | None = None, partition: int = 0) -> None:
        self._offset, self._headers, self._partition = offset, headers, partition

    def error(self) -> None:
        return None

    def topic(self) -> str:
        return "t"

    def partition(self) -> int:
        return self._partition

    def offset(self) -> int:
        return self._offset

    def key(self) -> None:
        return None

    def value(self) -> bytes:
        return b"x"

    def headers(self) -> list[tuple[str, bytes | None]] | None:
        return self._headers

    def timestamp(self) -> tuple[int, int]:
        return 1, 1500


class Client:
    """A consumer that always has another record and never answers a commit; it notes what it is asked."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.next = 0

    def poll(self, _wait_s: float) -> Record:
        self.next += 1
        return Record(self.next - 1)

    def __getattr__(self, name: str) -> Callable[..., list[Any]]:
        def call(*_args: object, **_named: object) -> list[Any]:
            self.calls.append(name)
            return []

        return call


def member(window: int = 1) -> tuple[Member, Client, Claim]:
    async def ignore(sessions: object, deadline_s: float) -> None:
        """Nobody holds work here."""

    receiver = Receiver("t", limit=None)
    made = Member(receiver, {}, "t", "t", window=window, start=None, on_revoke=ignore, revoke_timeout_s=0.1)
    receiver.member = made
    client, claim = Client(), Claim("t", 0, 0, set())
    made._consumer = client  # type: ignore[assignment]
    made._claims[0] = claim
    return made, client, claim


def within(body: Callable[[], object]) -> None:
    """Run `body` where a loop runs."""

    async def main() -> None:
        body()

    asyncio.run(main())


def noting(made: Member) -> list[Any]:
    """What `made` tells the loop from now on, as (call, *arguments)."""
    told: list[Any] = []
    made.tell = lambda call, *args: told.append((call, *args))  # type: ignore[method-assign]
    return told


def settled(made: Member, claim: Claim, *offsets: int) -> None:
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    made.settle(Answers([((claim, offset), ACCEPT) for offset in offsets], future))


def records(*offsets: int) -> Any:
    return [Record(offset) for offset in offsets]


def test_a_full_window_takes_one_record_aside_per_wait_while_a_commit_is_under_way() -> None:
    """Or it would pause at once, which throws away what was prefetched and costs up to a second."""

    def body() -> None:
        made, client, _ = member()
        made._out, made._commit = 1, ([], [])
        began = time.monotonic()
        for _ in range(10):
            made._serve()
        assert len(made._aside) == 10
        assert time.monotonic() - began >= 10 * BUSY_POLL_S * 0.9
        assert "pause" not in client.calls

    within(body)


def test_a_member_that_cannot_hand_out_pauses_and_wakes_the_client_up_when_it_resumes() -> None:
    def body() -> None:
        made, client, _ = member()
        made._out, made._commit = 1, ([], [])
        for _ in range(ASIDE):
            made._serve()
        assert client.calls == ["pause"]
        made._resume()
        assert client.calls == ["pause", "resume", "offsets_for_times"]

    within(body)


def test_a_settlement_makes_room_and_an_order_cuts_the_wait_short() -> None:
    def body() -> None:
        made, _, claim = member()
        made._take(records(0))
        assert made._room() == 0
        made.order(lambda: settled(made, claim, 0))
        began = time.monotonic()
        made._serve()
        assert not made._aside and time.monotonic() - began < 0.01
        made._obey()
        assert made._room() == 1 and claim.ledger.position == 1

    within(body)


@pytest.mark.parametrize(("code", "is_lost"), [("STALE_MEMBER_EPOCH", False), ("FENCED_MEMBER_EPOCH", True)])
def test_a_commit_of_a_member_that_is_merely_late_is_made_again(code: str, is_lost: bool) -> None:
    def body() -> None:
        made, client, claim = member(window=10)
        told = noting(made)
        made._take(records(0))
        settled(made, claim, 0)
        made._begin_commit()
        told.clear()
        made._on_commit(KafkaError(getattr(KafkaError, code)), [TopicPartition("t", 0, 1)])
        assert bool(told) is is_lost
        if is_lost:
            ((_, [(_, [(index, error)])]),) = told
            assert index == 0 and isinstance(error, SettleLost)
            return
        made._next_commit_s = 0.0
        made._begin_commit()
        made._on_commit(None, [TopicPartition("t", 0, 1)])
        ((_, [(_, failed)]),) = told
        assert failed == [] and client.calls == ["commit", "commit"]

    within(body)


def test_a_settlement_under_way_while_core_gives_its_session_up_is_recorded() -> None:
    """Core flushes, then says `lost`; the thread learns of both afterwards."""

    def body() -> None:
        made, _, claim = member(window=10)
        made._take(records(0))
        claim.session.lost = True
        settled(made, claim, 0)
        assert not made._settled[0].failed and claim.ledger.position == 1

    within(body)


def test_what_waits_for_a_commit_of_a_partition_that_was_lost_is_told_so() -> None:
    def body() -> None:
        made, _, claim = member(window=10)
        made._take(records(0, 1))
        settled(made, claim, 0)
        made._begin_commit()
        settled(made, claim, 1)
        under_way, waiting = made._commit, made._settled
        assert under_way is not None
        made._forget([claim])
        assert [list(a.failed) for a in (*under_way[1], *waiting)] == [[0], [0]]
        assert made._out == 0

    within(body)


def test_a_commit_keeps_the_note_of_an_earlier_owner_until_it_has_come_to_it() -> None:
    def body() -> None:
        made, _, claim = member(window=10)
        claim.done = {1, 2, 7}
        made._take(records(0, 1))
        assert ahead_of(0, made._note_of(claim, 0)) == {1, 2, 7}
        settled(made, claim, 0)
        assert ahead_of(2, made._note_of(claim, 2)) == {2, 7}

    within(body)


def test_a_log_that_was_cut_off_is_read_again_by_a_claim_of_its_own() -> None:
    def body() -> None:
        made, _, claim = member(window=10)
        made._take(records(0, 1, 2, 3, 4, 5, 6))
        settled(made, claim, 0, 1, 2, 3, 4)
        told = noting(made)
        made._hand_over = lambda claims, deadline_s: None  # type: ignore[method-assign]
        made._take(records(7, 2, 3))
        ((_, found),) = told
        assert [d.receipt[1] for d in found] == [2, 3]
        assert claim.session.lost and made._claims[0] is found[0].receipt[0] is not claim
        assert made._out == 2 and made._lost is None

    within(body)


def test_a_client_that_reads_again_from_amid_what_is_out_costs_the_connection() -> None:
    """Going on there would forget what is out before it: only another member, from the commit on, gets that again."""

    def body() -> None:
        made, client, claim = member(window=10)
        made._joined_s = 1.0
        made._take(records(0, 1, 2, 3, 4))
        settled(made, claim, 0, 3)
        told = noting(made)
        committed: list[TopicPartition] = []
        client.commit = lambda offsets, asynchronous: committed.extend(offsets)  # type: ignore[attr-defined]
        made._take(records(5, 2, 3))
        assert [call for call, *_ in told] == [made._receiver.lose, made._receiver.arrived]
        ((_, error), (_, found)) = told
        assert isinstance(error, ConnectionLost) and "again from offset 2" in str(error)
        assert [d.receipt[1] for d in found] == [5]
        made._leave()
        assert [(p.partition, p.offset, p.metadata) for p in committed] == [(0, 1, "")], "3 may be another message now"

    within(body)


def test_what_lies_aside_when_a_log_was_cut_off_belongs_to_the_new_claim() -> None:
    def body() -> None:
        made, _, claim = member(window=10)
        claim.end = 500
        made._hand_over = lambda claims, deadline_s: None  # type: ignore[method-assign]
        made._aside = records(1, 2)
        made._take(records(0))
        assert [record.offset() for record in made._aside] == [1, 2]  # type: ignore[attr-defined]

    within(body)


def test_a_message_that_meets_a_fatal_error_of_the_client_is_sent_again() -> None:
    class Producer:
        def produce(self, *_args: object) -> None:
            raise KafkaException(KafkaError(KafkaError._FATAL))

    link: Any = Link.__new__(Link)
    link.lost, link.producer = None, Producer()
    told: list[Any] = []
    Sender(link, "t", 1, "t", max_body=1000, confirmed=True).send_batch([Outgoing(b"x", "0")], told.extend)
    ((_, result),) = told
    assert result.outcome is Outcome.INDETERMINATE and isinstance(result.error, ConnectionLost)


def test_a_broker_that_takes_no_note_of_our_size_gets_none() -> None:
    def body() -> None:
        made, _, claim = member(window=10)
        made._take(records(0, 1))
        settled(made, claim, 1)
        made._begin_commit()
        made._on_commit(KafkaError(KafkaError.OFFSET_METADATA_TOO_LARGE), [TopicPartition("t", 0, 0)])
        assert made._note_of(claim, 0) == ""

    within(body)


def test_a_commit_that_will_never_be_allowed_ends_the_receiver() -> None:
    def body() -> None:
        made, _, claim = member(window=10)
        told = noting(made)
        made._take(records(0))
        settled(made, claim, 0)
        made._begin_commit()
        made._on_commit(KafkaError(KafkaError.GROUP_AUTHORIZATION_FAILED), [TopicPartition("t", 0, 1)])
        assert isinstance(made._lost, AuthError) and isinstance(told[-1][1], AuthError)
        (waiting,) = made._settled
        made._leave()
        assert isinstance(waiting.failed[0], SettleLost)

    within(body)


@pytest.mark.parametrize(("code", "is_given_up"), [("UNKNOWN", True), ("REBALANCE_IN_PROGRESS", False)])
def test_a_broker_that_goes_on_refusing_commits_costs_the_connection_a_rebalance_does_not(
    code: str, is_given_up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("messaging_sdk_kafka.receiver.REFUSED_S", 0.02)

    def body() -> None:
        made, _, claim = member(window=10)
        made._joined_s = 1.0
        made._take(records(0))
        settled(made, claim, 0)

        def refused() -> bool:
            made._next_commit_s = 0.0
            made._begin_commit()
            made._on_commit(KafkaError(getattr(KafkaError, code)), [TopicPartition("t", 0, claim.ledger.position)])
            return made._lost is not None

        assert not refused(), "once is no reason"
        time.sleep(0.03)
        assert made._commit_now() and claim.refused_since_s is None, "what is stored in between ends the count"
        made._take(records(1))
        settled(made, claim, 1)
        assert not refused(), "the first of a new count"
        time.sleep(0.03)
        assert refused() is is_given_up
        if is_given_up:
            assert isinstance(made._lost, ConnectionLost) and code in str(made._lost)

    within(body)


class Failed(Record):
    """An error in place of a record."""

    def __init__(self, code: int) -> None:
        super().__init__(0)
        self._code = code

    def error(self) -> KafkaError:  # type: ignore[override]
        return KafkaError(self._code)


@pytest.mark.parametrize(("joined_s", "kind"), [(1.0, ConnectionLost), (0.0, ConnectError)])
def test_an_error_that_nobody_knows_costs_the_connection_and_not_the_consumer(
    joined_s: float, kind: type[Exception]
) -> None:
    def body() -> None:
        made, _, _ = member()
        told = noting(made)
        made._joined_s = joined_s
        made._take([Failed(KafkaError.KAFKA_STORAGE_ERROR)])  # type: ignore[list-item]
        ((_, error),) = told
        assert type(error) is kind and error.transient

    within(body)


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_topic_is_deleted_when_it_stays_unknown(comes_back: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker that has just come up may not know it yet."""
    monkeypatch.setattr("messaging_sdk_kafka.receiver.UNKNOWN_S", 0.2)

    def body() -> None:
        made, client, _ = member()
        answers = [KafkaError(KafkaError.UNKNOWN_TOPIC_OR_PART), None if comes_back else KafkaError(3)]

        def list_topics(topic: str, _wait_s: float) -> Any:
            error = answers.pop(0) if len(answers) > 1 else answers[0]
            return SimpleNamespace(topics={topic: SimpleNamespace(error=error)})

        client.list_topics = list_topics  # type: ignore[attr-defined]
        made._joined_s = 1.0
        if comes_back:
            made._take([Failed(KafkaError.UNKNOWN_TOPIC_OR_PART)])  # type: ignore[list-item]
            assert made._lost is None
        else:
            with pytest.raises(NotFound):
                made._take([Failed(KafkaError.UNKNOWN_TOPIC_OR_PART)])  # type: ignore[list-item]

    within(body)


ALONE = json.dumps({"brokers": {"GroupCoordinator": {"source": "logical"}}})
ACCOMPANIED = json.dumps({"brokers": {"b:9092/1": {"source": "learned"}, "GroupCoordinator": {"source": "logical"}}})


def test_a_member_that_is_left_without_brokers_is_lost_although_the_client_does_not_say_so() -> None:
    def body() -> None:
        made, _, _ = member()
        told = noting(made)
        made._joined_s = 1.0
        for statistics in (ALONE, ACCOMPANIED, ALONE):
            made._solitude.look(statistics)
        assert made._lost is None
        made._solitude.look(ALONE)
        assert type(made._lost) is ConnectionLost and told[-1][1] is made._lost

    within(body)


def test_so_is_a_link() -> None:
    async def main() -> None:
        made = Link(dict(MOCK), asyncio.get_running_loop(), "k")
        made._solitude.look(ALONE)
        assert made.lost is None
        made._solitude.look(ALONE)
        assert isinstance(made.lost, ConnectionLost)
        made.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("text", "is_used", "is_lost"),
    [("1/1", False, True), ("0/1", False, True), ("0/2", False, False), ("0/12", False, False), ("0/2", True, True)],
)
def test_a_link_that_has_sent_nothing_yet_outlives_a_miscount_of_its_client(
    text: str, is_used: bool, is_lost: bool
) -> None:
    async def main() -> None:
        link = Link(dict(MOCK), asyncio.get_running_loop(), "k")
        if is_used:
            Sender(link, "t", 1, "t", max_body=1000, confirmed=True).send_batch([Outgoing(b"x", "0")], lambda _: None)
        link._on_error(KafkaError(KafkaError._ALL_BROKERS_DOWN, f"{text} brokers are down"))
        assert (link.lost is not None) == is_lost
        link.close()

    asyncio.run(main())


def test_the_statistics_of_a_client_that_has_brokers_show_them() -> None:
    seen: list[str] = []
    consumer = Consumer(
        {**MOCK, "group.id": "g", "log_level": 0, "statistics.interval.ms": 50, "stats_cb": seen.append}
    )
    consumer.subscribe(["t"])
    deadline = time.monotonic() + 5
    while len(seen) < 5 and time.monotonic() < deadline:
        consumer.poll(0.05)
    consumer.close()
    told: list[KafkaError] = []
    solitude = Solitude(told.append)
    for statistics in seen:
        solitude.look(statistics)
    assert len(seen) >= 5 and not told


def test_what_the_client_raises_in_a_member_that_worked_is_a_lost_connection() -> None:
    async def main() -> None:
        made, _, _ = member()
        made._config = {"group.id": "g", "bootstrap.servers": "127.0.0.1:1", "log_level": 0}

        def fail() -> None:
            made._joined_s = 1.0
            raise KafkaException(KafkaError(KafkaError._STATE))

        made._begin = lambda: None  # type: ignore[method-assign]
        made._turn = fail  # type: ignore[method-assign]
        made.thread.start()
        async with asyncio.timeout(10):
            with pytest.raises(ConnectionLost):
                await made._receiver.receive_batch(1)

    asyncio.run(main())


def test_a_thread_whose_loop_is_closed_ends() -> None:
    def open_one() -> Member:
        made, _client, _claim = member()
        made._begin = lambda: None  # type: ignore[method-assign]
        made._turn = lambda: time.sleep(0.01)  # type: ignore[method-assign]
        return made

    async def main() -> Member:
        return open_one()

    made = asyncio.run(main())
    made._config = {"group.id": "g", "bootstrap.servers": "127.0.0.1:1", "log_level": 0}
    made.thread.start()
    made.thread.join(10)
    assert not made.thread.is_alive()


def test_a_fatal_error_of_the_client_ends_its_link_and_says_what_will_not_heal() -> None:
    class Producer:
        def poll(self, _wait_s: float) -> None:
            raise KafkaException(KafkaError(KafkaError.CLUSTER_AUTHORIZATION_FAILED, fatal=True))

    link: Any = Link.__new__(Link)
    link.lost = link.refused = None
    link._what, link.producer = "here", Producer()
    link._poll(0)
    assert isinstance(link.lost, ConnectionLost) and isinstance(link.refused, AuthError)


def test_a_group_id_tells_topic_and_group_apart() -> None:
    assert group_id("orders", "eu.billing") != group_id("orders.eu", "billing")


def test_what_an_earlier_owner_settled_ahead_is_not_handed_out() -> None:
    def body() -> None:
        made, _, claim = member(window=10)
        claim.done = {1}
        told = noting(made)
        made._take(records(0, 1, 2))
        ((_, found),) = told
        assert [d.receipt[1] for d in found] == [0, 2]
        assert (made._out, claim.ledger.ahead()) == (2, [1])

    within(body)


def test_a_member_whose_connections_were_lost_asks_its_coordinator_before_it_leaves() -> None:
    """So that the leave is told: else the group would wait for the end of its session."""

    def body() -> None:
        made, client, _ = member()
        made._lost = ConnectionLost("gone")
        made._leave()
        assert client.calls == ["committed", "close"]

    within(body)


def test_a_member_that_was_dropped_leaves_without_a_word() -> None:
    def body() -> None:
        made, client, _ = member()
        made.drop()
        made._leave()
        assert client.calls == ["close"]

    within(body)


def test_a_foreign_record_has_its_place_as_id_and_all_its_headers() -> None:
    record: Any = Record(7, [("x", b"1"), ("messaging-id", None)], partition=3)
    assert meta_of(record).id == "t/3/7"
    assert dict(meta_of(record).headers) == {"x": "1"}
    assert meta_of(record).created_s == 1.5


class Misnamed(Record):
    """With a header whose name is not UTF-8: as confluent-kafka 2.16.1 does, but for the crash."""

    asked = 0

    def headers(self) -> list[tuple[str, bytes | None]] | None:
        self.asked += 1
        if self._headers is not None:
            return self._headers
        assert self.asked == 1, "the second call would crash the process"
        raise SystemError("returned a result with an exception set")

    def set_headers(self, headers: list[tuple[str, bytes | None]]) -> None:
        self._headers = headers


def test_a_foreign_record_with_a_header_that_cannot_be_read_has_none() -> None:
    record: Any = Misnamed(7, partition=3)
    made = message_of(record)
    assert (made.id, made.headers, made.body) == ("t/3/7", {}, b"x")
    assert meta_of(record).headers == {}


def test_our_headers_are_taken_off() -> None:
    pairs: list[tuple[str, bytes | None]] = [
        ("messaging-id", b"i"),
        ("messaging-content-type", b"text/plain"),
        ("messaging-correlation", b"c"),
        ("x", b"\xff"),
    ]
    record: Any = Record(0, pairs)
    meta = meta_of(record)
    assert (meta.id, meta.content_type, meta.correlation_id) == ("i", "text/plain", "c")
    assert dict(meta.headers) == {"x": "\ufffd"}


@pytest.mark.parametrize("code", sorted(TABLE))
def test_every_error_of_the_table_has_its_class_and_says_what_to_do(code: int) -> None:
    kind, transient, unstored, advice = TABLE[code]
    found = refusal(KafkaException(KafkaError(code)), "here")
    assert type(found) is kind and found.transient is transient and advice in str(found)
    sent = report(KafkaError(code), "here")
    assert sent.outcome is (Outcome.REJECTED if unstored else Outcome.INDETERMINATE)


def test_an_error_that_is_not_in_the_table_leaves_a_send_unsure() -> None:
    assert report(KafkaError(KafkaError._FAIL), "here").outcome is Outcome.INDETERMINATE


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (KafkaError.TOPIC_AUTHORIZATION_FAILED, AuthError),
        (KafkaError.UNKNOWN_TOPIC_OR_PART, NotFound),
        (KafkaError._TRANSPORT, ConnectionLost),
    ],
)
def test_the_result_of_a_send_that_failed(code: int, kind: type[Exception]) -> None:
    assert type(report(KafkaError(code), "here").error) is kind


@pytest.mark.parametrize(
    ("address", "options", "said"),
    [
        (Address("kafka"), {}, "names no host"),
        (Address("kafka", HOST, path="/x"), {}, "has a path"),
        (Address("kafka", HOST), {"ca_file": "ca.pem"}, "need TLS"),
    ],
)
def test_what_cannot_be_connected_to_is_refused_when_it_is_configured(
    address: Address, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        Driver(address, Driver.Options(**options), {})


@pytest.mark.parametrize(
    ("brokers", "options", "sends_ms", "member_ms"),
    [
        (1, {}, 60_000, 60_000),
        (3, {}, 6_000, 11_000),
        (3, {"revoke_timeout_s": 2.0}, 6_000, 6_000),
        (3, {"send_timeout_s": 9.0}, 3_000, 11_000),
        (3, {"group_protocol": "kip848"}, 6_000, 6_000),
    ],
)
def test_a_silent_broker_is_left_where_there_is_another(
    brokers: int, options: dict[str, Any], sends_ms: int, member_ms: int
) -> None:
    """In time to send again, and not before the slowest handler of a rebalance."""
    driver = Driver(Address("kafka", HOST), Driver.Options(**options), {})
    driver._brokers = brokers
    assert producer_config(driver, confirmed=True)["socket.timeout.ms"] == sends_ms
    assert driver._consumer_config("group", 500)["socket.timeout.ms"] == member_ms


def test_a_bad_message_is_refused_alone_and_before_it_reaches_the_client() -> None:
    driver = Driver(Address("kafka", HOST), Driver.Options(), {})
    config = {**producer_config(driver, confirmed=True), **MOCK}
    messages = [
        Outgoing(b"x", "0"),
        Outgoing(b"x" * 1001, "1"),
        Outgoing(b"x", "2", headers={"a\0b": "x"}),
        Outgoing(b"x", "3", headers={"\ud800": "x"}),
        Outgoing(b"x", "4", ttl_s=1.0),
        Outgoing(b"x", "5"),
    ]

    async def body() -> Outcomes:
        link = Link(config, asyncio.get_running_loop(), "mock")
        told: asyncio.Future[Outcomes] = asyncio.get_running_loop().create_future()
        Sender(link, "t", 4, "mock", max_body=1000, confirmed=True).send_batch(messages, told.set_result)
        async with asyncio.timeout(30):
            found = await told
        link.close()
        await asyncio.to_thread(link.thread.join)
        return found

    results = dict(asyncio.run(body()))
    assert [results[n].outcome for n in range(6)] == [
        Outcome.OK, Outcome.REJECTED, Outcome.REJECTED, Outcome.REJECTED, Outcome.REJECTED, Outcome.OK,
    ]  # fmt: skip
    assert isinstance(results[1].error, TooLarge) and isinstance(results[2].error, InvalidMessage)


@pytest.mark.parametrize(
    ("confirmed", "is_full", "is_given_up", "sent", "outcome"),
    [
        (True, False, False, [b"0", b"1", b"0"], Outcome.OK),
        (True, True, False, [b"0", b"1"], Outcome.INDETERMINATE),
        (True, False, True, [b"0", b"1"], Outcome.INDETERMINATE),
        (False, False, False, [b"0", b"1"], Outcome.OK),
    ],
)
def test_a_message_that_got_no_answer_of_its_own_is_sent_again(
    confirmed: bool, is_full: bool, is_given_up: bool, sent: list[bytes], outcome: Outcome
) -> None:
    """librdkafka calls it delivered when a later one of its partition was, although the broker refused it."""
    produced: list[tuple[Any, ...]] = []
    nowhere: Any = None

    class Producer:
        def produce(self, *args: Any) -> None:
            if is_full and len(produced) == 2:
                raise BufferError("Local: Queue full")
            produced.append(args)

    link: Any = Link.__new__(Link)
    link.lost, link.producer = None, Producer()
    link.tell = lambda call, *args: call(*args)
    told: list[Any] = []
    sender = Sender(link, "t", 1, "t", max_body=1000, confirmed=confirmed)
    sender.send_batch([Outgoing(b"0", "0"), Outgoing(b"1", "1")], told.extend)
    if is_given_up:
        sender._give_up()
    produced[0][4](None, Record(nowhere))
    produced[1][4](None, Record(0))
    if len(produced) == 3:
        assert not told
        produced[2][4](None, Record(1))
    assert [args[1] for args in produced] == sent
    results = dict(told)
    assert results[0].outcome is outcome and len(told) == 2
    assert results[0].error is None or isinstance(results[0].error, ConnectionLost), (
        "core sends it again for that alone"
    )


class Admin:
    """An AdminClient whose partition has the leaders that `codes` tell of, one after the other; None: no answer."""

    def __init__(self, *codes: int | None) -> None:
        self.codes = list(codes)

    def list_offsets(self, ends: dict[TopicPartition, object], *, request_timeout: float) -> dict[object, Any]:
        assert 0 < request_timeout <= 3
        code = self.codes.pop(0)
        asked: dict[object, Any] = {end: Future() for end in ends}
        for future in asked.values():
            if code == 0:
                future.set_result(None)
            elif code is not None:
                future.set_exception(KafkaException(KafkaError(code)))
        return asked


@pytest.mark.parametrize(
    "codes",
    [
        (KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError.LEADER_NOT_AVAILABLE, KafkaError._NOENT, 0),
        (KafkaError.TOPIC_AUTHORIZATION_FAILED,),
        (None,),
    ],
)
def test_a_sender_waits_for_leaders_that_do_not_know_yet_and_for_nothing_else(
    codes: tuple[int | None, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("messaging_sdk_kafka.driver._LED_S", 0.1 if codes == (None,) else 3.0)
    driver = Driver(Address("kafka", HOST), Driver.Options(), {})
    admin = Admin(*codes)
    driver._admin = admin  # type: ignore[assignment]
    asyncio.run(asyncio.wait_for(driver._led("t", 2), 2))
    assert not admin.codes


def test_what_a_link_still_has_when_it_ends_is_given_up_as_unsure() -> None:
    async def body() -> Outcomes:
        with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection, and says nothing
            driver = Driver(Address("kafka", (("127.0.0.1", silent.getsockname()[1]),)), Driver.Options(), {})
            link = Link(producer_config(driver, confirmed=True), asyncio.get_running_loop(), "silent")
            sender = Sender(link, "t", 1, "silent", max_body=1000, confirmed=True)
            told: asyncio.Future[Outcomes] = asyncio.get_running_loop().create_future()
            sender.send_batch([Outgoing(b"x", "0")], told.set_result)
            await asyncio.sleep(0.05)
            assert not told.done()
            link.close()
            async with asyncio.timeout(30):
                found = await told
        with pytest.raises(ConnectionLost):
            sender.send_batch([Outgoing(b"x", "1")], told.set_result)
        await asyncio.to_thread(link.thread.join)
        return found

    ((_, result),) = asyncio.run(body())
    assert result.outcome is Outcome.INDETERMINATE and isinstance(result.error, ConnectionLost)


@pytest.mark.parametrize(
    ("lost", "outcome"), [(None, Outcome.REJECTED), (ConnectionLost("gone"), Outcome.INDETERMINATE)]
)
def test_a_topic_that_vanishes_under_a_message_is_not_found_unless_the_client_is_what_vanished(
    lost: ConnectionLost | None, outcome: Outcome
) -> None:
    class Gone:
        pass

    link: Any = Gone()
    link.lost = lost
    result = Sender(link, "t", 1, "t", max_body=1000, confirmed=True)._failure(KafkaError(KafkaError._DESTROY))
    assert result.outcome is outcome


def test_a_topic_partition_is_asked_for_by_its_end() -> None:
    """The question that wakes the client up names the end, which every leader knows."""
    asked: list[TopicPartition] = []

    def body() -> None:
        made, client, _ = member()
        client.offsets_for_times = lambda found, timeout: asked.extend(found)  # type: ignore[attr-defined]
        made._flow([0, 2])

    within(body)
    assert [(p.topic, p.partition, p.offset) for p in asked] == [("t", 0, -1), ("t", 2, -1)]
