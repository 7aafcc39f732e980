"""pyzmq's asyncio sockets as its documentation shows them ("usual"), over Unix sockets, with a peer in another process.

A queue is a DEALER that sends and a ROUTER that answers each message; a signal is PUB and SUB.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import zmq
import zmq.asyncio

from .job import WARM_UP, WINDOW, Job, Sample, Stopwatch
from .peers import beside, ready

TOPIC = b"topic"


def usual_queue(job: Job) -> Sample:
    """Send with an id; the clock stops when each has its answer. At most WINDOW are without one."""

    async def main() -> Sample:
        with _socket(job, zmq.DEALER, binds=True) as socket, beside(job):
            watch = Stopwatch()
            await _answered(socket, job.body, WARM_UP)
            watch.start()
            await _answered(socket, job.body, job.count)
            return watch.stop(job.count)

    return asyncio.run(main())


async def _answered(socket: zmq.asyncio.Socket, body: bytes, count: int) -> None:
    room = asyncio.Semaphore(WINDOW)

    async def take() -> None:
        for _ in range(count):
            await socket.recv_multipart()
            room.release()

    taking = asyncio.create_task(take())
    for number in range(count):
        await room.acquire()
        await socket.send_multipart([b"%d" % number, body])
    await taking


def peer_queue(job: Job) -> None:
    async def main() -> None:
        with _socket(job, zmq.ROUTER, binds=False) as socket:
            socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
            ready()
            while True:
                sender, number, _ = await socket.recv_multipart()
                await socket.send_multipart([sender, number])

    asyncio.run(main())


def usual_signal_send(job: Job) -> Sample:
    async def main() -> Sample:
        with _socket(job, zmq.XPUB, binds=True) as socket, beside(job):
            await socket.recv()  # the subscription
            watch = Stopwatch()
            watch.start()
            for _ in range(job.count):
                await socket.send_multipart([TOPIC, job.body])
            return watch.stop(job.count)

    return asyncio.run(main())


def peer_signal_send(job: Job) -> None:
    with _socket(job, zmq.SUB, binds=False) as socket:
        plain = zmq.Socket.shadow(socket.underlying)
        plain.subscribe(TOPIC)
        ready()
        while True:
            plain.recv_multipart()


def usual_signal_receive(job: Job) -> Sample:
    async def main() -> Sample:
        with _socket(job, zmq.SUB, binds=True) as socket:
            socket.subscribe(TOPIC)
            with beside(job):
                await socket.recv_multipart()
                watch = Stopwatch()
                watch.start()
                for _ in range(job.count - 1):
                    await socket.recv_multipart()
                return watch.stop(job.count - 1)

    return asyncio.run(main())


def peer_signal_receive(job: Job) -> None:
    with _socket(job, zmq.XPUB, binds=False) as socket:
        plain = zmq.Socket.shadow(socket.underlying)
        ready()
        plain.recv()  # the subscription
        for _ in range(job.count):
            plain.send_multipart([TOPIC, job.body])
        plain.poll(60_000)  # until it is killed


@contextmanager
def _socket(job: Job, kind: int, *, binds: bool) -> Iterator[zmq.asyncio.Socket]:
    """The measured side binds; nothing is dropped, since no queue has a limit."""
    with zmq.asyncio.Context() as context, context.socket(kind) as socket:
        socket.linger = 0
        socket.sndhwm = socket.rcvhwm = 0
        attach: Callable[[str], object] = socket.bind if binds else socket.connect
        attach(f"ipc://{job.url.partition('://')[2]}/{job.name}")
        yield socket
