"""Clients of the two streams, quick or slow. They check what any client may rely on."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import taskqueue
from clock import VirtualLoop
from taskqueue import FINAL, TaskQueue, TaskStatus

totals: Counter[str] = Counter()  # over all runs: what was done, and how often


class AnyReader:
    """What both have in common."""

    def __init__(self, loop: VirtualLoop, queue: TaskQueue, slow: bool) -> None:
        self.loop = loop
        self.queue = queue
        self.slow = slow
        self.begun = False
        self.ended = False
        self.permits = asyncio.Semaphore(0)

    async def digest(self) -> None:
        """A slow one takes its time after each frame."""
        self.begun = True
        if self.slow:
            await self.permits.acquire()

    @property
    def is_digesting(self) -> bool:
        """It has still to digest its latest frame."""
        digesting = self.slow and self.begun and not self.ended
        return digesting and self.permits.locked()

    def check_job(self, job: "asyncio.Task[None]") -> None:
        """It has not failed."""
        if job.done() and not job.cancelled():
            assert job.exception() is None, job.exception()


class Reader(AnyReader):
    """Reads the stream of one task."""

    def __init__(
        self,
        loop: VirtualLoop,
        queue: TaskQueue,
        task_id: str,
        last_event_id: int,
        slow: bool,
    ) -> None:
        super().__init__(loop, queue, slow)
        self.record = queue.store.by_id[task_id]
        self.sent = last_event_id if last_event_id <= self.record.version else 0
        self.seen: list[TaskStatus] = []
        states = loop.peek(lambda: queue.watch(task_id, last_event_id))
        self.job = loop.create_task(self.read(states))

    async def read(self, states: taskqueue.Snapshots) -> None:
        """Until the stream ends."""
        async for status in states:
            self.take(status)
            await self.digest()
        self.ended = True

    def take(self, status: TaskStatus) -> None:
        """Check a new state."""
        totals["frames"] += 1
        assert status.version > self.sent, "an old or repeated frame"
        assert status.version == self.record.version, "not the latest state"
        if self.seen:
            before = self.seen[-1]
            assert before.status not in FINAL, "a frame after the terminal one"
            was, now = before.progress, status.progress
            assert status.attempt >= before.attempt
            assert status.attempt > before.attempt or now >= was, "progress runs back"
        self.sent = status.version
        self.seen.append(status)

    def check_quiet(self) -> None:
        """Is anything missing?"""
        self.check_job(self.job)
        if self.is_digesting:
            return
        final = self.record.status in FINAL
        closed = self.queue.store.closed
        assert self.ended == (final or closed), f"{self.record}: {self.ended}"
        if not closed:
            assert self.sent >= self.record.version, "a change was missed"
            assert not final or not self.seen or self.seen[-1].status in FINAL


class EventsReader(AnyReader):
    """Reads the stream of all tasks, frame by frame, as it is on the wire."""

    def __init__(
        self, loop: VirtualLoop, queue: TaskQueue, last_event_id: int, slow: bool
    ) -> None:
        super().__init__(loop, queue, slow)
        store = queue.store
        self.sent = 0
        self.begins_after = store.version  # what is older needn't be sent
        present = sorted(record.version for record in store.by_id.values())
        self.expected = present[-taskqueue.NEWS :]  # in the first batch
        if store.life <= last_event_id <= store.version:
            self.sent = self.begins_after = last_event_id
            newer = [version for version in present if version > last_event_id]
            self.expected = newer[: taskqueue.NEWS]
        self.first_batch: list[int] = []
        self.had_first_batch = False
        self.latest: dict[str, dict[str, Any]] = {}
        self.versions: dict[str, int] = {}
        self.got_at = 0.0
        self.job = loop.create_task(self.read(last_event_id))

    async def read(self, last_event_id: int) -> None:
        """Until the stream ends."""
        async for piece in taskqueue.all_frames(self.queue, last_event_id):
            totals["pieces"] += 1
            self.got_at = self.loop.time()
            for frame in piece.decode().split("\n\n")[:-1]:
                fields = dict(line.split(": ", 1) for line in frame.split("\n"))
                data = json.loads(fields["data"])
                take: dict[str, Callable[[Any, Any], None]] = {
                    "task": self.take_task,
                    "queue": self.take_numbers,
                    "shutdown": self.take_end,
                }
                take[fields["event"]](data, fields.get("id"))
            await self.digest()
            self.got_at = self.loop.time()
        assert self.ended

    def take_task(self, task: dict[str, Any], version_text: str) -> None:
        """Check the frame of a task."""
        totals["frames of all tasks"] += 1
        version = int(version_text)
        assert version > self.sent, "an old or repeated frame"
        assert "payload" not in task
        if not self.had_first_batch:
            self.first_batch.append(version)
        record = self.queue.store.by_id.get(task["id"])
        assert record is None or version <= record.version
        if before := self.latest.get(task["id"]):
            assert before["status"] not in FINAL, "a frame after the terminal one"
            was = before["attempt"], before["progress"]
            assert (task["attempt"], task["progress"]) >= was, "progress runs back"
        self.sent = version
        self.latest[task["id"]] = task
        self.versions[task["id"]] = version

    def take_numbers(self, numbers: dict[str, Any], version: None) -> None:
        """Check the frame that ends a batch."""
        assert version is None
        assert numbers["submitted"] == self.queue.store.submitted
        for status, count in numbers["tasks"].items():
            assert count == self.queue.count(status)
        if not self.had_first_batch:
            self.had_first_batch = True
            assert self.first_batch == self.expected

    def take_end(self, data: Any, version: None) -> None:
        """The server stops."""
        assert version is None
        assert self.queue.store.closed, "the stream has ended without a stop"
        assert not self.ended
        self.ended = True

    def check_quiet(self) -> None:
        """Is anything missing?"""
        self.check_job(self.job)
        holds = self.loop.time() < self.got_at + taskqueue.HOLD_SECONDS
        if self.is_digesting or (self.begun and holds):
            return
        assert self.ended == self.queue.store.closed
        if not self.ended and self.had_first_batch:
            for record in self.queue.store.by_id.values():
                if record.version > self.begins_after:
                    assert self.versions[record.id] == record.version, "missed"
