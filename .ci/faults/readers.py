"""Bad readers: a hundred that never read, a thousand that hang up.

All that they cost is given back.
"""

import asyncio
import random
import socket
import statistics
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import httpx

from client import Stream, follow
from harness import Service, wait_until

# A large result makes large frames. They soon fill the buffers of those who don't read.
SERVER = (
    "taskqueue.py",
    "--no-tour",
    "--port",
    "{port}",
    "--send-timeout",
    "2",
    "--pace",
    "0",
    "--failure-rate",
    "0",
    "--keep-finished",
    "200",
    "--drain-seconds",
    "1",
)
LARGE = {"task_type": "resize_image", "payload": {"url": "x" * 30_000}}
# What may be missing when all have gone, in KB: an allocator doesn't give back every
# page. If each reader left one buffer of 64 KB behind, that would be 19,200.
BACK = 14_000
PATIENCE = 5  # seconds that somebody else may wait, on a busy machine


class Onlooker(threading.Thread):
    """Somebody else, who wants a quick answer all the time."""

    def __init__(self, service: Service) -> None:
        super().__init__(daemon=True)
        self.service, self.stop_asking, self.waited = (
            service,
            threading.Event(),
            list[float](),
        )

    def run(self) -> None:
        with httpx.Client(base_url=self.service.url, timeout=20) as client:
            while not self.stop_asking.wait(0.02):
                began = time.monotonic()
                assert client.get("/health").status_code == 200
                self.waited.append(time.monotonic() - began)

    def __str__(self) -> str:
        waited = [1000 * seconds for seconds in self.waited]
        median = statistics.median(waited)
        times = f"{median:.1f} ms (median of {len(waited)}), {max(waited):.0f} at most"
        return f"others waited {times}"


@contextmanager
def onlooker(service: Service) -> Iterator[Onlooker]:
    person = Onlooker(service)
    person.start()
    try:
        yield person
    finally:
        person.stop_asking.set()
        person.join(30)
    assert person.waited, "the onlooker got no answer"
    assert max(person.waited) < PATIENCE, person


def watchers(client: httpx.Client) -> int:
    return int(client.get("/health").json()["watchers"])


def make_changes(client: httpx.Client, count: int) -> None:
    for _ in range(count):
        assert client.post("/tasks", json=LARGE).status_code in (202, 503)


def settle(service: Service, client: httpx.Client, descriptors: int) -> None:
    wait_until(lambda: watchers(client) == 0, "without watchers")
    wait_until(
        lambda: service.descriptors <= descriptors, f"back to {descriptors} descriptors"
    )


def never_read(
    service: Service, client: httpx.Client, count: int
) -> list[socket.socket]:
    """Connections whose streams are dropped, because nobody reads them."""
    deaf = [service.connect(receive_buffer=4096) for _ in range(count)]
    for connection in deaf:
        connection.sendall(b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n")
    wait_until(lambda: watchers(client) == count, f"all {count} watching")

    def dropped() -> bool:
        make_changes(client, 10)
        return watchers(client) == 0

    wait_until(dropped, "without watchers", seconds=60)
    return deaf


def deaf_readers() -> None:
    with (
        Service(*SERVER) as service,
        httpx.Client(base_url=service.url, timeout=20) as client,
    ):
        make_changes(client, 300)  # fill the history before measuring
        for _ in range(2):  # to warm up
            for connection in never_read(service, client, 100):
                connection.close()
            settle(service, client, service.descriptors)
        before, descriptors = service.memory, service.descriptors
        with onlooker(service) as person:
            for _ in range(3):
                deaf = never_read(service, client, 100)
                assert asyncio.run(one_stream_works(service))
                for connection in deaf:
                    connection.close()
                settle(service, client, descriptors)
        print(
            f"  three times 100 that never read: {before} KB before, "
            f"{service.memory} after; {descriptors} descriptors "
            f"before, {service.descriptors} after; {person}",
            flush=True,
        )
        assert service.memory < before + BACK
        deaf = [
            service.connect(receive_buffer=4096) for _ in range(50)
        ]  # and now a stop in the middle of it
        for connection in deaf:
            connection.sendall(b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_until(lambda: watchers(client) == 50, "all 50 watching")
        make_changes(client, 100)
        code, took = service.stop()
        print(
            f"  a stop with 50 that never read: {took:.2f} s (code {code})", flush=True
        )
        assert took < 3.5, took
        # Uvicorn's word for a stream that was dropped.
        dropped = "ASGI callable returned without completing response"
        assert not [line for line in service.trouble if dropped not in line], (
            service.trouble
        )
        for connection in deaf:
            connection.close()


async def one_stream_works(service: Service) -> bool:
    async with httpx.AsyncClient(base_url=service.url, timeout=20) as client:
        path = (await client.post("/tasks", json={"task_type": "send_email"})).headers[
            "location"
        ] + "/stream"
        async with asyncio.timeout(20):
            stream = await follow(service.port, path, Stream())
        return stream.clean and stream.last == "completed"


def hang_up(service: Service, random: random.Random, path: str) -> None:
    """Ask for a stream, and go: before, in or after its first bytes."""
    with service.connect() as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        if random.random() < 0.7:
            with suppress(ConnectionError):
                connection.recv(random.choice([1, 100, 65_536]))
        if random.random() < 0.5:
            connection.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )  # RST at close


def hang_up_often(
    service: Service,
    client: httpx.Client,
    random: random.Random,
    times: int,
    paths: list[str],
) -> None:
    for number in range(times):
        hang_up(service, random, random.choice(paths))
        if number % 20 == 0:
            make_changes(client, 1)


def quitters() -> None:
    with (
        Service(*SERVER) as service,
        httpx.Client(base_url=service.url, timeout=20) as client,
    ):
        paths = ["/events"]
        for number in range(50):
            answer = client.post(
                "/tasks", json={**LARGE, "delay": 3600 if number % 2 else 0}
            )
            paths.append(answer.headers["location"] + "/stream")
        chance = random.Random(1)
        make_changes(client, 300)  # fill the history before measuring
        hang_up_often(service, client, chance, 400, paths)  # a round to warm up
        wait_until(lambda: watchers(client) == 0, "without watchers")
        before, descriptors = service.memory, service.descriptors
        with onlooker(service) as person:
            hang_up_often(service, client, chance, 1000, paths)
            settle(service, client, descriptors)
        print(
            f"  1000 that hang up: {before} KB before, "
            f"{service.memory} after; {descriptors} descriptors "
            f"before, {service.descriptors} after; {person}",
            flush=True,
        )
        assert service.memory < before + BACK
        assert asyncio.run(one_stream_works(service))
        assert not service.trouble, service.trouble


def run() -> None:
    quitters()
    deaf_readers()
