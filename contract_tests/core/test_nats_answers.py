"""Laws of how the NATS adapter reads answers in runs: only what has the expected form is taken for an OK."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from messaging_sdk import Backpressure, Outcome
from messaging_sdk.model import Outgoing, SendResult
from messaging_sdk_nats.driver import _Parser
from messaging_sdk_nats.sender import StreamSender

INBOX, SID = b"_INBOX.of-ours.", b"7"
STORED = b'{"stream":"queue__work","seq":41}'
FULL = b'{"error":{"code":503,"err_code":10077,"description":"store full"},"stream":"queue__work","seq":0}'


class Link:
    """What a sender needs of a connection."""

    error = None

    def __init__(self) -> None:
        self.listeners: set[Any] = set()
        self.parser = _Parser(cast(Any, None))

    def write(self, blob: bytes) -> None:
        """Nobody reads it."""

    def subscribe_inbox(self, sink: Any) -> tuple[bytes, bytes]:
        self.parser.sinks[SID] = sink
        return SID, INBOX

    def read_ahead(self, sid: bytes, reader: Any) -> None:
        self.parser.readers[sid] = reader


def answer(number: int, body: bytes) -> bytes:
    return b"MSG %b%d %b %d\r\n%b\r\n" % (INBOX, number, SID, len(body), body)


def outcomes_of(reads: list[bytes], count: int) -> dict[int, SendResult]:
    """The outcomes of one batch of `count` messages when `reads` arrive one after the other; each told once."""
    told: list[tuple[int, SendResult]] = []

    async def main() -> None:
        link = Link()
        sender = StreamSender(cast(Any, link), "queue.work", 1 << 20, 1 << 14)
        sender.start()
        sender.send_batch([Outgoing(b"x", f"m{n}") for n in range(count)], told.extend)
        for read in reads:
            await link.parser.parse(read)

    asyncio.run(main())
    assert len({index for index, _ in told}) == len(told), "told twice"
    return dict(told)


def test_a_refusal_among_stored_answers_rejects_that_message_alone() -> None:
    found = outcomes_of([b"".join(answer(n, FULL if n == 3 else STORED) for n in range(1, 6))], 5)
    assert [found[n].outcome for n in range(5)] == [Outcome.OK] * 2 + [Outcome.REJECTED] + [Outcome.OK] * 2
    assert isinstance(found[2].error, Backpressure)


@pytest.mark.parametrize("at", range(1, 160, 7))
def test_answers_that_are_split_between_reads_are_all_told(at: int) -> None:
    whole = b"".join(answer(n, STORED) for n in range(1, 4))
    found = outcomes_of([whole[:at], whole[at:]], 3)
    assert [found[n].outcome for n in range(3)] == [Outcome.OK] * 3


def test_answers_out_of_turn_are_told_to_their_messages() -> None:
    found = outcomes_of([answer(3, STORED) + answer(1, FULL) + answer(2, STORED)], 3)
    assert [found[n].outcome for n in range(3)] == [Outcome.REJECTED, Outcome.OK, Outcome.OK]
