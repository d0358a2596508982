"""A while of mixed random load: many clients who do everything at once."""

import asyncio
import random
import time
from collections import Counter
from typing import Any

import httpx

from client import Stream, follow
from harness import Service, strict_json

SERVER = (
    "taskqueue.py",
    "--no-tour",
    "--port",
    "{port}",
    "--pace",
    "0.02",
    "--failure-rate",
    "0.3",
    "--max-workers",
    "3",
    "--max-pending",
    "15",
    "--keep-finished",
    "300",
    "--backoff-base",
    "0.05",
    "--drain-seconds",
    "1",
)
CLIENTS = 30


class Visitor:
    """One client. What it does is drawn from its own seed."""

    def __init__(
        self, service: Service, client: httpx.AsyncClient, seed: int, seen: Counter[str]
    ) -> None:
        self.service, self.client, self.random, self.seen = (
            service,
            client,
            random.Random(seed),
            seen,
        )
        self.known: list[str] = []

    async def visit(self, until: float) -> None:
        acts = [self.submit] * 6 + [
            self.repeat,
            self.look,
            self.page,
            self.cancel,
            self.force,
            self.watch,
            self.peek,
            self.events,
            self.nonsense,
        ]
        while time.monotonic() < until:
            act = self.random.choice(acts)
            self.seen[act.__name__] += 1
            await act()

    async def ask(self, method: str, path: str, allowed: set[int], **more: Any) -> Any:
        answer = await self.client.request(method, path, **more)
        self.seen[str(answer.status_code)] += 1
        assert answer.status_code in allowed, (
            f"{method} {path} {more}: {answer.status_code} {answer.text[:500]}"
        )
        assert answer.status_code != 503 or answer.headers["retry-after"]
        return strict_json(answer.content)

    def order(self) -> dict[str, Any]:
        chance = self.random
        return {
            "task_type": chance.choice(
                ["resize_image", "generate_report", "send_email"]
            ),
            "priority": chance.choice([1, 5, 10]),
            "max_retries": chance.choice([0, 0, 1, 3]),
            "timeout": chance.choice([0.005, 0.05, 60]),
            "delay": chance.choice([0, 0, 0, 0.1, 1]),
        }

    def some(self) -> str:
        return self.random.choice(self.known) if self.known else "/tasks/nobody"

    async def submit(self) -> None:
        task = await self.ask("POST", "/tasks", {202, 503}, json=self.order())
        if "id" in task:
            self.known = [*self.known[-50:], f"/tasks/{task['id']}"]

    async def repeat(self) -> None:
        key, order = {"Idempotency-Key": str(self.random.random())}, self.order()
        both = [
            await self.ask("POST", "/tasks", {202, 503}, json=order, headers=key)
            for _ in range(2)
        ]
        ids = {task["id"] for task in both if "id" in task}
        assert len(ids) < 2 or await self.was_evicted(both[0]["id"]), (
            f"one key, two tasks: {ids}"
        )

    async def was_evicted(self, task_id: str) -> bool:
        return (await self.client.get(f"/tasks/{task_id}")).status_code == 404

    async def look(self) -> None:
        await self.ask("GET", self.some(), {200, 404})

    async def page(self) -> None:
        page = await self.ask(
            "GET", f"/tasks?limit=50&offset={self.random.randrange(300)}", {200}
        )
        stamps = [task["created_at"] for task in page["tasks"]]
        assert stamps == sorted(stamps, reverse=True)

    async def cancel(self) -> None:
        await self.ask("DELETE", self.some(), {200, 404, 409})

    async def force(self) -> None:
        await self.ask("DELETE", self.some() + "?force=true", {200, 202, 404, 409})

    async def watch(self) -> None:
        """A stream to its end: ids and progress grow, one last frame has the end."""
        stream = await asyncio.wait_for(
            follow(self.service.port, self.some() + "/stream", Stream()), 60
        )
        if stream.status != 200:
            assert stream.status == 404
            return
        self.seen["frames"] += len(stream.frames)
        assert stream.clean
        assert stream.last in ("completed", "failed", "cancelled"), stream.last
        states = [frame.data["status"] for frame in stream.frames]
        assert not {"completed", "failed", "cancelled"} & set(states[:-1]), states
        ids = [frame.id for frame in stream.frames]
        assert ids == sorted(set(ids)), ids  # type: ignore[type-var]
        progress = [
            (frame.data["attempt"], frame.data["progress"]) for frame in stream.frames
        ]
        assert progress == sorted(progress), progress

    async def peek(self) -> None:
        await self.leave(self.some() + "/stream", self.random.random() * 0.05)

    async def events(self) -> None:
        await self.leave("/events", self.random.random() * 0.5)

    async def leave(self, path: str, after: float) -> None:
        """Hang up after a while."""
        reading = asyncio.create_task(follow(self.service.port, path, Stream()))
        await asyncio.wait([reading], timeout=after)
        reading.cancel()
        await asyncio.wait([reading])

    async def nonsense(self) -> None:
        wrong = b'{"task_type": "x"}', b'{"task_type": "send_email", "delay": NaN}'
        body = self.random.choice([b"", b"{", b"[]", *wrong])
        await self.ask(
            "POST",
            "/tasks",
            {400, 422},
            content=body,
            headers={"Content-Type": "application/json"},
        )


def check_books(health: dict[str, Any]) -> None:
    assert health["submitted"] == sum(health["tasks"].values()) + health["evicted"], (
        health
    )
    assert health["tasks"]["running"] <= health["workers"], health


async def audit(client: httpx.AsyncClient, until: float) -> None:
    while time.monotonic() < until:
        check_books(strict_json((await client.get("/health")).content))
        await asyncio.sleep(0.1)


async def load(service: Service, seed: int, seconds: float) -> None:
    seen = Counter[str]()
    async with httpx.AsyncClient(base_url=service.url, timeout=30) as client:
        half, memory = seconds / 2, []
        for part in range(2):
            until = time.monotonic() + half
            async with asyncio.TaskGroup() as group:
                group.create_task(audit(client, until))
                for number in range(CLIENTS):
                    visitor = Visitor(
                        service, client, seed * 1000 + part * 100 + number, seen
                    )
                    group.create_task(visitor.visit(until))
            memory.append(service.memory)
        async with asyncio.timeout(60):
            while (health := (await client.get("/health")).json())["tasks"][
                "pending"
            ] + health["tasks"]["running"]:
                await asyncio.sleep(0.05)
        check_books(health)
        numbers = (await client.get("/metrics")).json()
        assert set(numbers["status_counts"]) <= {
            "200",
            "202",
            "204",
            "400",
            "404",
            "409",
            "422",
            "503",
        }, numbers
        print(
            f"  {numbers['total_requests']} requests, {health['submitted']} tasks, "
            f"{health['evicted']} evicted, "
            f"{seen['frames']} frames; by status {numbers['status_counts']}; "
            f"memory {memory[0]} KB at half-time, "
            f"{memory[1]} at the end",
            flush=True,
        )
        assert memory[1] < memory[0] + 10_000


def run(seed: int, seconds: float) -> None:
    with Service(*SERVER) as service:
        asyncio.run(load(service, seed, seconds))
        code, took = service.stop()
        assert took < 2.5, took
        assert code in (0, -15), code
        assert not service.trouble, service.trouble
