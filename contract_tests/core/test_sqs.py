"""Laws of the SQS adapter that no emulator can be made to show: partial failures, copies, limits, encodings."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import math
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from _drive import drive, eventually
from botocore.exceptions import ClientError, ReadTimeoutError, SSLError
from botocore.parsers import ResponseParserError

from messaging_sdk import (
    AuthError,
    Backpressure,
    CapabilityError,
    ConfigError,
    ConnectError,
    ConnectionLost,
    InvalidDestination,
    InvalidMessage,
    MessagingError,
    NotFound,
    Outcome,
    Queue,
    TooLarge,
    Topic,
)
from messaging_sdk.config import Address
from messaging_sdk.model import Outgoing, SendResult, Session
from messaging_sdk.spi import ACCEPT, RELEASE
from messaging_sdk.threads import Calls
from messaging_sdk_sqs import Driver, Options, errors
from messaging_sdk_sqs.driver import Link
from messaging_sdk_sqs.receiver import MAX_REFUSALS, Receipt, Receiver, _delivery
from messaging_sdk_sqs.sender import Sender, Target, Terms

Answer = Callable[[Any, MessagingError | None], object]


class FakeLink:
    """Takes requests and answers them when it is told how."""

    def __init__(self) -> None:
        self.error: ConnectionLost | None = None
        self.listeners: set[Any] = set()
        self.asked: list[tuple[str, list[dict[str, Any]], Answer]] = []

    def post(self, request: Callable[[], Any], what: str, answer: Answer) -> None:
        self.asked.append((what, request(), answer))

    def fulfil(self, number: int = 0, *, failed: dict[int, tuple[str, bool]] | None = None) -> list[dict[str, Any]]:
        """Answer a request; `failed` maps an entry's place to (code, sender's fault)."""
        _, entries, answer = self.asked.pop(number)
        wrong = [
            {"Id": entries[n]["Id"], "Code": code, "SenderFault": fault} for n, (code, fault) in (failed or {}).items()
        ]
        stored = [{"Id": entry["Id"]} for n, entry in enumerate(entries) if n not in (failed or {})]
        answer({"Successful": stored, "Failed": wrong}, None)
        return entries

    def break_off(self, error: MessagingError, number: int = 0) -> None:
        self.asked.pop(number)[2](None, error)


class Bench:
    """A sender over a fake link, and the outcomes it told."""

    def __init__(self, targets: int = 1, *, ordered: bool = False, limit: int = 1 << 20, requests: int = 4) -> None:
        self.link = FakeLink()
        terms = Terms("q", body="MessageBody", ordered=ordered, can_delay=not ordered, limit=limit, requests=requests)
        made = [Target(f"t{n}", lambda entries: entries) for n in range(targets)]
        self.sender = Sender(self.link, made, terms)  # type: ignore[arg-type]
        self.told: list[tuple[int, SendResult]] = []

    def send(self, *messages: Outgoing) -> None:
        self.sender.send_batch(messages, self.told.extend)

    def outcomes(self) -> dict[int, Outcome]:
        assert len(self.told) == len({index for index, _ in self.told}), "an index was told twice"
        return {index: result.outcome for index, result in self.told}

    def error(self, index: int) -> MessagingError | None:
        return dict(self.told)[index].error


def message(number: int, key: str | None = None, body: bytes = b"x", **options: Any) -> Outgoing:
    return Outgoing(body, f"id-{number}", key, **options)


def test_a_request_has_at_most_ten_entries_with_ids_of_their_own() -> None:
    async def law() -> None:
        bench = Bench(requests=1)
        bench.send(*(message(n) for n in range(25)))
        sizes = []
        while bench.link.asked:
            entries = bench.link.fulfil()
            sizes.append(len(entries))
            assert len({e["Id"] for e in entries}) == len(entries)
        assert sizes == [10, 10, 5]
        assert set(bench.outcomes().values()) == {Outcome.OK}

    drive(law())


def test_a_request_is_cut_by_bytes_too() -> None:
    async def law() -> None:
        bench = Bench(requests=1, limit=1000)
        bench.send(*(message(n, body=b"x" * 400) for n in range(5)))
        while bench.link.asked:
            entries = bench.link.fulfil()
            size = sum(
                len(e["MessageBody"]) + len("messaging" + "String" + e["MessageAttributes"]["messaging"]["StringValue"])
                for e in entries
            )
            assert size <= 1000
        assert len(bench.outcomes()) == 5

    drive(law())


def test_one_refused_entry_is_told_alone() -> None:
    async def law() -> None:
        bench = Bench()
        bench.send(*(message(n) for n in range(3)))
        bench.link.fulfil(failed={1: ("InvalidMessageContents", True)})
        assert bench.outcomes() == {0: Outcome.OK, 1: Outcome.REJECTED, 2: Outcome.OK}
        assert isinstance(bench.error(1), InvalidMessage)

    drive(law())


def test_a_throttled_entry_is_surely_not_stored() -> None:
    async def law() -> None:
        bench = Bench(ordered=True)
        bench.send(message(0, "k"), message(1, "k"))
        bench.link.fulfil(failed={0: ("RequestThrottled", False)})
        assert bench.outcomes() == {0: Outcome.REJECTED, 1: Outcome.OK}
        assert isinstance(bench.error(0), Backpressure)

    drive(law())


def test_an_entry_that_failed_inside_the_service_is_sent_again_only_where_nothing_can_be_behind_it() -> None:
    async def law() -> None:
        for ordered in (False, True):
            bench = Bench(ordered=ordered)
            bench.send(message(0, "k"), message(1, "k"))
            bench.link.fulfil(failed={0: ("InternalError", False)})
            assert bench.outcomes() == {0: Outcome.INDETERMINATE, 1: Outcome.OK}
            # core sends again what a ConnectionLost left unsure; here it would come behind its key's next
            assert isinstance(bench.error(0), ConnectionLost) is not ordered

    drive(law())


def test_an_ordered_key_has_one_request_under_way_and_nothing_behind_a_lost_one() -> None:
    async def law() -> None:
        bench = Bench(ordered=True)
        bench.send(*(message(n, "k") for n in range(25)))
        assert len(bench.link.asked) == 1
        bench.link.fulfil()
        assert len(bench.link.asked) == 1
        bench.link.break_off(ConnectionLost("reset"))
        assert bench.link.asked == []
        told = bench.outcomes()
        assert [told[n] for n in range(10)] == [Outcome.OK] * 10
        assert [told[n] for n in range(10, 25)] == [Outcome.INDETERMINATE] * 15
        with pytest.raises(ConnectionLost):
            bench.send(message(99, "k"))

    drive(law())


def test_keys_of_an_ordered_queue_share_requests_in_several_lanes() -> None:
    async def law() -> None:
        bench = Bench(ordered=True)
        bench.send(*(message(n, f"k{n}") for n in range(60)))
        assert 1 < len(bench.link.asked) <= 4
        lanes = [{e["MessageGroupId"] for e in entries} for _, entries, _ in bench.link.asked]
        assert sum(map(len, lanes)) == len(set.union(*lanes)), "a key is in two requests at once"

    drive(law())


def test_a_copy_for_every_group_or_not_ok() -> None:
    async def law() -> None:
        bench = Bench(targets=3)
        bench.send(message(0), message(1))
        bench.link.fulfil()
        bench.link.fulfil()
        assert bench.outcomes() == {}, "one group has no answer yet"
        bench.link.fulfil(failed={1: ("RequestThrottled", False)})
        assert bench.outcomes() == {0: Outcome.OK, 1: Outcome.INDETERMINATE}
        assert "2 of 3" in str(bench.error(1))
        assert not isinstance(bench.error(1), ConnectionLost)

    drive(law())


def test_rejected_is_said_of_copies_only_when_no_group_has_one() -> None:
    async def law() -> None:
        bench = Bench(targets=2)
        bench.send(message(0))
        bench.link.break_off(NotFound("gone"))
        bench.link.break_off(NotFound("gone"))
        assert bench.outcomes() == {0: Outcome.REJECTED}
        assert isinstance(bench.error(0), NotFound)

    drive(law())


def test_a_copy_without_an_answer_makes_core_send_all_again() -> None:
    async def law() -> None:
        bench = Bench(targets=2)
        bench.send(message(0))
        bench.link.fulfil()
        bench.link.break_off(ConnectionLost("reset"))
        assert bench.outcomes() == {0: Outcome.INDETERMINATE}
        assert isinstance(bench.error(0), ConnectionLost)

    drive(law())


def test_a_sender_that_is_closed_early_tells_the_rest_once() -> None:
    async def law() -> None:
        bench = Bench(requests=1)
        bench.send(*(message(n) for n in range(15)))
        closing = asyncio.ensure_future(bench.sender.close())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert set(bench.outcomes().values()) == {Outcome.INDETERMINATE}
        assert len(bench.outcomes()) == 15
        bench.link.fulfil()  # the late answer is told to nobody
        assert len(bench.told) == 15

    drive(law())


def test_a_refused_message_is_told_once_though_its_batch_is_given_up() -> None:
    async def law() -> None:
        bench = Bench()
        bench.send(message(0), message(1, delay_s=2_000.0))
        bench.sender.on_lost(ConnectionLost("gone"))
        closing = asyncio.ensure_future(bench.sender.close())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert bench.outcomes() == {0: Outcome.INDETERMINATE, 1: Outcome.REJECTED}

    drive(law())


def test_an_entry_that_the_answer_does_not_name_is_unsure_and_ends_the_sender() -> None:
    async def law() -> None:
        bench = Bench(ordered=True)
        bench.send(message(0, "k"), message(1, "k"))
        _, entries, answer = bench.link.asked.pop()
        answer({"Successful": [{"Id": entries[0]["Id"]}]}, None)
        assert bench.outcomes() == {0: Outcome.OK, 1: Outcome.INDETERMINATE}
        assert isinstance(bench.error(1), ConnectionLost)
        with pytest.raises(ConnectionLost):
            bench.send(message(2, "k"))

    drive(law())


class FakeQueue:
    """boto3's client of one queue, as far as a receiver uses it; polls end when they are told to."""

    def __init__(self) -> None:
        self.polled = threading.Event()
        self.found: list[dict[str, Any]] = []
        self.requests: list[tuple[str, list[Any]]] = []

    def receive_message(self, **_: Any) -> dict[str, Any]:
        self.polled.wait(10)
        found, self.found = self.found, []
        return {"Messages": found}

    def delete_message_batch(self, *, QueueUrl: str, Entries: list[dict[str, Any]]) -> dict[str, Any]:
        self.requests.append(("delete", [e["ReceiptHandle"] for e in Entries]))
        return {"Successful": [{"Id": e["Id"]} for e in Entries]}

    def change_message_visibility_batch(self, *, QueueUrl: str, Entries: list[dict[str, Any]]) -> dict[str, Any]:
        self.requests.append(("hide", [e["ReceiptHandle"] for e in Entries]))
        return {"Successful": [{"Id": e["Id"]} for e in Entries]}


def _receiver(queue: FakeQueue, *, ordered: bool = False) -> tuple[Receiver, Link]:
    link = Link(None, Calls("law", 4))  # type: ignore[arg-type]
    options = Options.model_validate({"max_polls": 1})
    return Receiver(link, queue, "http://x/q", 10, options, ordered=ordered), link  # type: ignore[arg-type]


def _arrived(handle: str, group: str | None = None, until_s: float = math.inf) -> tuple[Receipt, dict[str, Any]]:
    attributes = {"MessageGroupId": group} if group else {}
    return Receipt(handle, until_s), {"Body": handle, "MessageId": handle, "Attributes": attributes}


def test_what_waits_behind_a_lost_message_of_its_group_is_not_handed_out() -> None:
    async def law() -> None:
        receiver, _ = _receiver(FakeQueue(), ordered=True)
        receiver._stopped = True  # no polls here
        receiver._buffer.extend([_arrived("m1", "k", until_s=0.0), _arrived("m2", "k"), _arrived("n1", "other")])
        assert [d.id for d in await receiver.receive_batch(10)] == ["n1"]

    drive(law())


def test_an_ack_does_not_wait_behind_a_release_that_waits_for_the_last_poll() -> None:
    async def law() -> None:
        queue = FakeQueue()
        receiver, link = _receiver(queue)
        receiver._buffer.extend([_arrived("a"), _arrived("b")])
        first, second = await receiver.receive_batch(2)  # a poll is under way from here on
        stopping = asyncio.ensure_future(receiver.stop())
        await asyncio.sleep(0)
        settled = receiver.settle_batch([(first.receipt, RELEASE), (second.receipt, ACCEPT)])
        await eventually(lambda: queue.requests == [("delete", ["b"])])
        queue.polled.set()
        await stopping
        assert list(await settled) == []
        assert queue.requests == [("delete", ["b"]), ("hide", ["a"])]
        await receiver.close()
        link._calls.stop()

    drive(law())


def test_a_cancelled_stop_hands_back_with_its_last_poll_and_only_what_is_still_its_own() -> None:
    async def law() -> None:
        queue = FakeQueue()
        receiver, link = _receiver(queue)
        receiver._fill()
        receiver._buffer.extend([_arrived("a"), _arrived("dead", until_s=0.0)])
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(receiver.stop(), 0.02)
        assert queue.requests == []
        queue.found = [{"Body": "c", "MessageId": "c", "ReceiptHandle": "c"}]
        queue.polled.set()
        await eventually(lambda: queue.requests == [("hide", ["a", "c"])])
        await receiver.close()
        link._calls.stop()

    drive(law())


def test_a_service_that_refuses_polls_for_its_load_counts_as_lost_in_the_end() -> None:
    async def law() -> None:
        receiver, link = _receiver(FakeQueue())
        receiver._refusals = MAX_REFUSALS
        receiver._poll_failed(Backpressure("busy"))
        assert isinstance(link.error, ConnectionLost)
        with pytest.raises(ConnectionLost):
            await receiver.receive_batch(1)
        link._calls.stop()

    drive(law())


def test_no_extension_asks_for_more_than_sqs_allows_in_all() -> None:
    async def law() -> None:
        queue = FakeQueue()
        receiver, link = _receiver(queue)
        now = time.monotonic()
        near, spent = Receipt("near", now + 5, now + 12.5), Receipt("spent", now + 5, now + 4)
        asked: list[Any] = []
        link.post = lambda request, *_: asked.append(request)  # type: ignore[method-assign]
        receiver._extend([near, spent])
        ((entry,),) = [request.keywords["Entries"] for request in asked]
        assert (entry["ReceiptHandle"], entry["VisibilityTimeout"]) == ("near", 12)
        link._calls.stop()

    drive(law())


BODIES = (
    b"",
    b"-",
    b"plain",
    "gr\u00fc\u00df \u2603".encode(),
    b"\x00",
    b"a\rb",
    b"\xff\xfe",
    "\ufffe".encode(),
    b"\t\n",
)


@pytest.mark.parametrize("body", BODIES)
def test_every_body_arrives_as_it_was_sent_in_characters_that_sqs_allows(body: bytes) -> None:
    async def law() -> None:
        bench = Bench()
        bench.send(message(0, "k\u00e9y", body, headers={"a": "\x00\u2603"}, content_type="t", correlation_id="c"))
        ((_, (entry,), _),) = bench.link.asked
        text = entry["MessageBody"]
        assert text and all(c in "\t\n" or " " <= c < "\ufffe" for c in text)
        assert entry["MessageAttributes"]["messaging"]["StringValue"].isascii()
        arrived = _delivery(
            {"Body": text, "MessageAttributes": entry["MessageAttributes"], "MessageId": "m", "ReceiptHandle": "r"},
            Receipt("r", 0.0),
            Session("s"),
        )
        assert (arrived.body, arrived.id, arrived.key) == (body, "id-0", "k\u00e9y")
        assert (dict(arrived.headers), arrived.content_type, arrived.correlation_id) == ({"a": "\x00\u2603"}, "t", "c")

    drive(law())


@pytest.mark.parametrize(
    "attribute",
    [
        "no json",
        "[]",
        "[" * 100_000,
        '{"id": 7}',
        '{"headers": []}',
        '{"enc": "base64"}',
        '{"key": {}}',
        '{"at": "x"}',
    ],
    ids=itertools.count(),
)
def test_an_attribute_that_is_not_as_we_write_it_harms_nothing(attribute: str) -> None:
    message = {
        "Body": "not base64!",
        "MessageId": "m-1",
        "MessageAttributes": {"messaging": {"StringValue": attribute}, "n": {"StringValue": "1"}},
    }
    arrived = _delivery(message, Receipt("r", 0.0), Session("s"))
    assert (arrived.body, arrived.id, arrived.key) == (b"not base64!", "m-1", None)
    assert dict(arrived.headers) == {"n": "1"}
    assert arrived.created_s is None


def test_ids_and_keys_that_sqs_refuses_travel_as_their_digest() -> None:
    async def law() -> None:
        bench = Bench(ordered=True)
        bench.send(
            message(0, "plain.key"), Outgoing(b"x", "x" * 129, "gr\u00fcn"), Outgoing(b"x", "y" * 129, "gr\u00fcn")
        )
        entries = [entry for _, entries, _ in bench.link.asked for entry in entries]
        plain, *odd = sorted(entries, key=lambda e: e["MessageGroupId"] != "plain.key")
        assert (plain["MessageGroupId"], plain["MessageDeduplicationId"]) == ("plain.key", "id-0")
        assert len({e["MessageGroupId"] for e in odd}) == 1
        assert len({e["MessageDeduplicationId"] for e in odd}) == 2
        assert all(len(e["MessageDeduplicationId"]) <= 128 and e["MessageGroupId"].isascii() for e in odd)

    drive(law())


def test_what_the_service_would_refuse_is_refused_before_a_byte_is_sent() -> None:
    async def law() -> None:
        bench = Bench(limit=1000)
        bench.send(
            message(0, body=b"x" * 1001),
            message(1, delay_s=901.0),
            message(2, ttl_s=1.0),
            message(3, priority=1),
            message(4, delay_s=0.2),
        )
        kinds = {n: type(bench.error(n)) for n in range(4)}
        assert kinds == {0: TooLarge, 1: InvalidMessage, 2: CapabilityError, 3: CapabilityError}
        ((_, (entry,), _),) = bench.link.asked
        assert entry["DelaySeconds"] == 1

    drive(law())


def _driver(**options: Any) -> Driver:
    return Driver(Address("sqs", (("eu-west-1", None),), path="/shop-"), Options(**options), {})


def test_the_largest_body_fits_in_base64_with_the_largest_headers() -> None:
    for options in ({}, {"topics": "sns"}):
        caps = _driver(**options).capabilities(Topic("t", bytes, groups=["g"]))
        assert caps.headers is not None
        encoded = len(base64.b64encode(b"\xff" * caps.max_body))
        headers = json.dumps({"h": "\x00" * caps.headers.max_bytes})
        assert encoded + len(headers) <= (1 << 18 if options else 1 << 20)


@pytest.mark.parametrize(
    "destination",
    [Queue("x" * 76, bytes), Queue("x" * 71, bytes, key=str, ordered=True), Topic("x" * 60, bytes, groups=["g" * 13])],
)
def test_the_whole_physical_name_is_checked(destination: Any) -> None:
    with pytest.raises(InvalidDestination, match="80"):
        _driver().check(destination)


def test_names_of_queues_groups_and_dead_letters_never_meet() -> None:
    driver = _driver()
    topic = Topic("a", bytes, groups=["b", "b.dead"])
    names = [
        driver._physical(Queue("a", bytes), None),
        driver._physical(Queue("a.b", bytes), None),
        driver._physical(topic, "b"),
        driver._physical(topic, "b.dead"),
        driver._physical(topic.dead_letters("b"), None),
    ]
    assert len(set(names)) == len(names)
    assert names[1:3] == ["shop-a__b", "shop-a___b"]


@pytest.mark.parametrize(
    ("code", "status", "expected"),
    [
        ("AWS.SimpleQueueService.NonExistentQueue", 400, NotFound),
        ("QueueDoesNotExist", 400, NotFound),
        ("AccessDenied", 403, AuthError),
        ("ExpiredToken", 403, AuthError),
        ("InvalidClientTokenId", 403, AuthError),
        ("ThrottlingException", 400, Backpressure),
        ("QueueNameExists", 400, ConfigError),
        ("InternalFailure", 500, errors.ServiceDown),
        ("ServiceUnavailable", 503, errors.ServiceDown),
        ("Surprise", 400, MessagingError),
    ],
)
def test_each_answer_of_the_service_has_its_error(code: str, status: int, expected: type[MessagingError]) -> None:
    native = ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "SendMessage")  # type: ignore[typeddict-item]
    found = errors.from_native(native, "send to q")
    assert type(found) is expected
    assert found.__cause__ is native
    assert "send to q" in str(found)


def test_silence_is_a_lost_connection_and_at_open_an_address_that_is_wrong() -> None:
    silent = errors.from_native(ReadTimeoutError(endpoint_url="http://x"), "receive from q")
    assert isinstance(silent, ConnectionLost)
    assert not isinstance(silent, errors.ServiceDown)
    found = errors.unreachable(silent, "sqs://eu-west-1/", "http://x")
    assert isinstance(found, ConnectError)
    assert found.transient


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed certificate", ConnectError),
        ("[SSL: WRONG_VERSION_NUMBER] wrong version number", ConnectError),
        ("EOF occurred in violation of protocol", ConnectionLost),
    ],
)
def test_a_peer_that_breaks_off_inside_tls_is_no_misconfiguration(text: str, expected: type[MessagingError]) -> None:
    assert type(errors.from_native(SSLError(endpoint_url="https://x", error=text), "send to q")) is expected


def test_an_answer_that_cannot_be_read_leaves_the_outcome_open() -> None:
    for native in (ResponseParserError("no XML"), KeyError("PublishBatchResult")):
        assert type(errors.from_native(native, "send to q")) is errors.ServiceDown


def test_a_foreign_message_of_a_fifo_queue_has_its_group_as_key() -> None:
    message = {"Body": "x", "MessageId": "m-1", "Attributes": {"MessageGroupId": "k"}}
    assert _delivery(message, Receipt("r", 0.0), Session("s")).key == "k"
    ours = {**message, "MessageAttributes": {"messaging": {"StringValue": '{"id": "i"}'}}}
    assert _delivery(ours, Receipt("r", 0.0), Session("s")).key is None


def test_an_attribute_that_breaks_a_promise_is_a_config_error() -> None:
    driver = _driver(max_deliveries=20)
    driver._check_queue(
        "queue q", {"MaximumMessageSize": "1048576", "RedrivePolicy": '{"maxReceiveCount": 20}'}, 1 << 20
    )
    driver._check_queue("queue q", {}, 1 << 20)
    for found in ({"MaximumMessageSize": "262144"}, {"RedrivePolicy": '{"maxReceiveCount": "5"}'}):
        with pytest.raises(ConfigError, match="wanted"):
            driver._check_queue("queue q", found, 1 << 20)
