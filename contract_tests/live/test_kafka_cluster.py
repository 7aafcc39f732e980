"""Three Kafka brokers, of which one at a time is killed, ended or frozen: nothing is lost and no key overtaken."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Final

import pytest
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient, ClusterMetadata, TopicMetadata

from messaging_sdk import Bus, Queue
from messaging_sdk_contract.live import LiveService, start_service

PORTS: Final = {1: 9092, 2: 9094, 3: 9095}
"""Broker -> its port in the container, which is published."""
WAIT_S: Final = 120.0
KEYS: Final = tuple(f"k{n}" for n in range(12))
AFTER: Final = 10
"""Messages of each key that have to be accepted and handled between one event and the next."""
PROPERTIES: Final = """
process.roles=broker,controller
node.id={n}
controller.quorum.voters=1@127.0.0.1:9191,2@127.0.0.1:9192,3@127.0.0.1:9193
controller.listener.names=CONTROLLER
listeners=EXTERNAL://0.0.0.0:{port},INTERNAL://127.0.0.1:929{n},CONTROLLER://127.0.0.1:919{n}
advertised.listeners=EXTERNAL://ADDRESS,INTERNAL://127.0.0.1:929{n}
listener.security.protocol.map=EXTERNAL:PLAINTEXT,INTERNAL:PLAINTEXT,CONTROLLER:PLAINTEXT
inter.broker.listener.name=INTERNAL
log.dirs=/tmp/kafka-{n}
auto.create.topics.enable=false
min.insync.replicas=2
offsets.topic.replication.factor=3
offsets.topic.num.partitions=3
group.initial.rebalance.delay.ms=0
group.min.session.timeout.ms=1000
group.consumer.min.session.timeout.ms=1000
group.consumer.session.timeout.ms=4000
group.consumer.min.heartbeat.interval.ms=200
group.consumer.heartbeat.interval.ms=400
log.segment.bytes=67108864
log.index.size.max.bytes=1048576
log.cleaner.dedupe.buffer.size=2097152
controller.quorum.election.timeout.ms=500
controller.quorum.fetch.timeout.ms=1500
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
replica.lag.time.max.ms=5000
"""
BROKER: Final = """
n=$1 properties=/tmp/$1.properties jars='/opt/kafka/libs/*'
eval "sed s/ADDRESS/\\$BROKER_$n/ /cluster/$n" > $properties
[ -d /tmp/kafka-$n ] || java -cp "$jars" kafka.tools.StorageTool format -t MkU3OEVBNTcwNTJENDM2Qk -c $properties
exec java -Xms96m -Xmx256m -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -XX:+IgnoreUnrecognizedVMOptions \
    -XX:AOTCache=/opt/kafka/kafka.aot -Dlog4j2.configurationFile=/opt/kafka/log4j2.yaml \
    -cp "$jars" kafka.Kafka $properties
"""
AWAIT_END: Final = 'while [ -n "$(cat /proc/$(cat /tmp/{n}.pid)/cmdline 2> /dev/null)" ]; do sleep 0.2; done'
START: Final = "setsid sh /cluster/broker {n} >> /tmp/{n}.log 2>&1 < /dev/null & echo $! > /tmp/{n}.pid"
ALL: Final = " ; ".join(START.format(n=n) for n in PORTS) + " ; exec sleep infinity"


class Cluster:
    """Three brokers in one container, so that one of them can be hurt."""

    def __init__(self) -> None:
        files = {f"/cluster/{n}": PROPERTIES.format(n=n, port=port).encode() for n, port in PORTS.items()}
        told = {f"BROKER_{n}": f"127.0.0.1:{port}" for n, port in PORTS.items()}
        self.service: LiveService = start_service(
            "kafka", files={**files, "/cluster/broker": BROKER.encode()}, command=["sh", "-c", ALL], environment=told
        )
        self.servers = ",".join("{}:{}".format(*self.service.address(port)) for port in PORTS.values())
        self.service.wait_ready(self._is_complete)

    def _metadata(self, wait_s: float) -> ClusterMetadata:
        return AdminClient({"bootstrap.servers": self.servers, "log_level": 0}).list_topics(timeout=wait_s)

    def _is_complete(self) -> None:
        brokers = self._metadata(2).brokers
        assert len(brokers) == len(PORTS), f"{len(brokers)} of {len(PORTS)} brokers are there"

    def send(self, n: int, what: signal.Signals) -> None:
        self.service.exec("sh", "-c", f"kill -{what.value} $(cat /tmp/{n}.pid)")

    def start(self, n: int) -> None:
        """Again, when what was killed or is ending has let go of its files and port."""
        self.service.exec("sh", "-c", f"{AWAIT_END.format(n=n)}; {START.format(n=n)}")

    def topics(self) -> dict[str, TopicMetadata]:
        return self._metadata(5).topics

    def is_whole(self) -> bool:
        """Has each partition all its replicas in sync?"""
        partitions = [p for topic in self.topics().values() for p in topic.partitions.values()]
        return all(p.leader > 0 and set(p.isrs) == set(p.replicas) for p in partitions)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    found = Cluster()
    try:
        yield found
    finally:
        found.service.remove()


async def eventually(is_so: Callable[[], Awaitable[bool]], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            if await is_so():
                return
        except KafkaException:
            pass
        assert time.monotonic() < deadline, f"not within {WAIT_S:g} s: {what}"
        await asyncio.sleep(0.1)


class Traffic:
    """Numbers of each key, published one after the other, and in which sequence they were first handled."""

    def __init__(self, queue: Queue[str]) -> None:
        self.queue = queue
        self.accepted: Counter[str] = Counter()
        """Key -> the last number that publish has returned for; each number before it was accepted, too."""
        self.handled: dict[str, list[int]] = defaultdict(list)
        self.seen: set[str] = set()
        self.ended = False
        self.publishing: asyncio.Future[list[None]]

    def consumer(self, url: str) -> Bus:
        bus = Bus(url)

        @bus.on(self.queue, concurrency=len(KEYS))
        async def handle(text: str) -> None:
            key, _, number = text.partition(":")
            if text not in self.seen:
                self.seen.add(text)
                self.handled[key].append(int(number))
            await asyncio.sleep(0.002)

        return bus

    async def publish(self, bus: Bus, key: str) -> None:
        while not self.ended:
            await bus.publish(self.queue, f"{key}:{self.accepted[key] + 1}", timeout_s=WAIT_S)
            self.accepted[key] += 1
            await asyncio.sleep(0.002)

    async def go_on(self) -> None:
        """Return when of each key `AFTER` more were accepted, and as many handled."""
        accepted, handled = dict(self.accepted), {key: len(found) for key, found in self.handled.items()}

        async def went_on() -> bool:
            if self.publishing.done():
                await self.publishing  # raises what a publish raised
            return all(
                self.accepted[key] >= accepted.get(key, 0) + AFTER
                and len(self.handled[key]) >= handled.get(key, 0) + AFTER
                for key in KEYS
            )

        await eventually(went_on, f"{AFTER} more of each key, accepted and handled, than {accepted} and {handled}")


@pytest.mark.parametrize("protocol", ["classic", "kip848"])
def test_no_message_is_lost_and_no_key_overtaken_while_brokers_come_and_go(cluster: Cluster, protocol: str) -> None:
    """SIGKILL, then SIGTERM, which moves its leaders in good order, then SIGSTOP, which leaves connections open."""
    queue = Queue(f"cluster.{protocol}", str, key=lambda text: text.partition(":")[0], ordered=True)
    url = f"kafka://{cluster.servers}?replication_factor=3&partitions=6&session_timeout_s=4&group_protocol={protocol}"

    async def body() -> Traffic:
        traffic = Traffic(queue)
        publisher, consumers = Bus(url), [traffic.consumer(url) for _ in range(2)]
        async with AsyncExitStack() as stack:
            for bus in (publisher, *consumers):
                await stack.enter_async_context(bus)
            for bus in consumers:
                await stack.enter_async_context(bus.consuming())
            traffic.publishing = asyncio.gather(*(traffic.publish(publisher, key) for key in KEYS))
            await traffic.go_on()
            for number, what in enumerate((signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP)):
                await asyncio.to_thread(hurt, 1 + number, what)
                await traffic.go_on()
                await asyncio.to_thread(mend, 1 + number, what)
                await eventually(lambda: asyncio.to_thread(cluster.is_whole), "all replicas in sync")
                await traffic.go_on()
            traffic.ended = True
            await traffic.publishing

            async def all_came() -> bool:
                return all(len(traffic.handled[key]) >= last for key, last in traffic.accepted.items())

            await eventually(all_came, "each accepted message handled")
        return traffic

    def hurt(n: int, what: signal.Signals) -> None:
        assert any(p.leader == n for p in cluster.topics()[queue.name].partitions.values()), f"{n} leads nothing"
        cluster.send(n, what)

    def mend(n: int, what: signal.Signals) -> None:
        if what is signal.SIGSTOP:
            cluster.send(n, signal.SIGCONT)
        else:
            cluster.start(n)

    traffic = asyncio.run(body())
    for key in KEYS:
        assert traffic.handled[key] == list(range(1, traffic.accepted[key] + 1)), key
