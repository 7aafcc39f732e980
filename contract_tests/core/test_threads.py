"""Laws of `Calls`: bounded threads, answers on the loop, and an end that waits for nobody."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from _drive import drive

from messaging_sdk.threads import Calls, Hop


def driven(law: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run an async law as a plain test."""

    @functools.wraps(law)
    def test() -> None:
        drive(law())

    return test


@driven
async def test_an_answer_comes_on_the_loops_thread() -> None:
    calls = Calls("t", 2)
    seen: list[tuple[int | None, BaseException | None, int]] = []
    done = asyncio.Event()

    def answer(result: int | None, error: BaseException | None) -> None:
        seen.append((result, error, threading.get_ident()))
        done.set()

    calls.post(threading.get_ident, answer)
    await asyncio.wait_for(done.wait(), 5)
    ((result, error, thread),) = seen
    assert error is None
    assert thread == threading.get_ident()
    assert result != thread, "the call itself ran elsewhere"
    calls.stop()


@driven
async def test_what_a_call_raises_is_the_answer() -> None:
    calls = Calls("t", 1)

    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await calls.run(fail)
    with pytest.raises(RuntimeError, match="StopIteration"):  # a future takes none
        await calls.run(lambda: next(iter(())))
    assert await calls.run(lambda: 7) == 7, "the thread lives on"
    calls.stop()


@driven
async def test_no_more_threads_than_the_size_and_none_before_they_are_needed() -> None:
    calls = Calls("bounded", 3)

    def named() -> int:
        return sum(t.name.startswith("bounded-") for t in threading.enumerate())

    assert named() == 0
    most = await asyncio.gather(*(calls.run(lambda: (time.sleep(0.01), named())[1]) for _ in range(20)))
    assert max(most) == 3
    calls.stop()


@driven
async def test_cancelling_the_wait_leaves_the_call_running() -> None:
    calls = Calls("t", 1)
    begun, ended = threading.Event(), threading.Event()
    goes_on = threading.Event()

    def slow() -> None:
        begun.set()
        goes_on.wait(5)
        ended.set()

    waiting = asyncio.create_task(calls.run(slow))
    await asyncio.to_thread(begun.wait, 5)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    goes_on.set()
    assert await asyncio.to_thread(ended.wait, 5)
    calls.stop()


@driven
async def test_stop_ends_the_threads_behind_what_was_posted() -> None:
    calls = Calls("ending", 2)
    answers: list[object] = []
    for _ in range(6):
        calls.post(lambda: 1, lambda result, _: answers.append(result))
    calls.stop()
    calls.stop()
    with pytest.raises(RuntimeError):
        calls.post(lambda: 1, lambda *_: None)
    deadline = time.monotonic() + 5
    while any(t.name.startswith("ending-") for t in threading.enumerate()) or len(answers) < 6:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


def test_an_answer_to_a_closed_loop_is_dropped_and_the_thread_ends() -> None:
    ended = threading.Event()

    async def main() -> None:
        calls = Calls("orphan", 1)
        calls.post(lambda: (time.sleep(0.05), ended.set()), lambda *_: None)
        calls.stop()

    asyncio.run(main())
    assert ended.wait(5)
    deadline = time.monotonic() + 5
    while any(t.name.startswith("orphan-") for t in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_every_post_to_a_closed_loop_raises() -> None:
    loop = asyncio.new_event_loop()
    hop = Hop(loop)
    assert not hop.is_closed
    loop.close()
    for _ in range(2):
        with pytest.raises(RuntimeError):
            hop.post(print)
    assert hop.is_closed
