"""What the tests of the exercises share: a clock that jumps, and a service to call.

The event loop of these tests never sleeps. Where it would, it sets its clock forward.
So a test may wait for an hour, and takes a millisecond. `time.time()` and
`time.monotonic()` follow that clock. A solution may use them all.
"""

import asyncio
import contextlib
import functools
import logging
import selectors
import sys
import time
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # `python -m pytest` does it anyway, a bare `pytest` not

import taskqueue


class Clock(selectors.DefaultSelector):
    """What the event loop waits with. It doesn't wait, it moves the time on."""

    def __init__(self):
        super().__init__()
        self.seconds = 0.0
        self.wall_clock_is_ahead = 0.0

    def select(self, timeout=None):
        if timeout is None:
            raise RuntimeError("all wait for what will never happen: it would hang")
        # As in life, a timer is a little late, and a step takes a moment.
        self.seconds += timeout + (1e-5 if timeout else 1e-9)
        return super().select(0)

    def now(self):
        """Seconds since the test began."""
        return self.seconds

    def wall_clock(self):
        """What time.time() is: it can be set, forward and back."""
        return 1_700_000_000 + self.seconds + self.wall_clock_is_ahead

    async def sleep(self, seconds):
        """Let that much time pass, and all happen that happens in it."""
        await asyncio.sleep(seconds)

    async def settle(self):
        """Let all happen that can happen at once."""
        await asyncio.sleep(0.001)

    def block(self, seconds):
        """Hold up the event loop for so long: time passes, and nothing happens."""
        self.seconds += seconds


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop on that clock."""

    def __init__(self, clock):
        self.clock = clock
        super().__init__(clock)

    def time(self):
        return self.clock.now()


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock.now)
    monkeypatch.setattr(time, "time", clock.wall_clock)
    return clock


@pytest.fixture
def anyio_backend(clock):
    return "asyncio", {"loop_factory": functools.partial(VirtualLoop, clock)}


class Service:
    """The app, a client of it, and handlers that do what their payload says.

    `name` goes into `started`, with the time. It takes `seconds`, with 50 % half way.
    The first `fails` attempts of that name raise an error.
    """

    def __init__(self, clock, settings, handlers):
        self.clock = clock
        self.started = []
        if handlers is None:
            handlers = dict.fromkeys(taskqueue.TaskType, self.work)
        self.app = taskqueue.create_app(settings, handlers)
        transport = httpx.ASGITransport(self.app)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://test")

    async def work(self, payload, update_progress):
        """The handler of all task types."""
        told = {"name": "it", "seconds": 0, "fails": 0, **payload.model_extra}
        self.started.append((told["name"], self.clock.now()))
        await asyncio.sleep(told["seconds"] / 2)
        update_progress(50)
        await asyncio.sleep(told["seconds"] / 2)
        if self.names.count(told["name"]) <= told["fails"]:
            raise RuntimeError("it fails, as it was told")
        return told["name"]

    @property
    def queue(self):
        return self.app.state.queue

    @property
    def names(self):
        """The names of the tasks that were started, in that order."""
        return [name for name, _ in self.started]

    async def submit(self, name="it", *, seconds=0, fails=0, **fields):
        """Submit a task, and let it start if it can. Return its id."""
        payload = {"name": name, "seconds": seconds, "fails": fails}
        body = {"task_type": "send_email", "payload": payload, "timeout": 3600}
        answer = await self.client.post("/tasks", json={**body, **fields})
        assert answer.status_code == 202, f"POST /tasks: {answer.text}"
        await self.clock.settle()
        return answer.json()["id"]

    async def task(self, task_id):
        """The task as it is now."""
        return (await self.client.get(f"/tasks/{task_id}")).json()

    async def end_of(self, task_id):
        """The task as it is once it has ended."""
        async with asyncio.timeout(1000):
            async for state in self.queue.watch(task_id):
                if state.status in taskqueue.FINAL:
                    return await self.task(task_id)
        return pytest.fail("the queue has stopped before the task had ended")


@pytest.fixture
def serve(clock, caplog):
    """`async with serve(max_workers=1) as service: …` with these settings."""

    @contextlib.asynccontextmanager
    async def serve(handlers=None, **settings):
        for name in settings:
            if name not in taskqueue.Settings.model_fields:
                pytest.fail(f"Settings has no `{name}` yet", pytrace=False)
        before = asyncio.all_tasks()
        service = Service(clock, taskqueue.Settings(**settings), handlers)
        async with service.app.router.lifespan_context(service.app), service.client:
            await asyncio.sleep(0.001)  # by now the worker loop waits for a task
            yield service
        # The stop must leave nothing that runs on, or that goes wrong later.
        await asyncio.sleep(0)
        left = asyncio.all_tasks() - before
        left = [task for task in left if "_shutdown_watcher" not in repr(task)]
        assert not left, f"the queue has stopped, but these still run: {left}"
        errors = []
        for record in caplog.records:
            if record.levelno >= logging.ERROR:
                errors.append(record.getMessage())
        assert not errors, f"the log has errors: {errors}"

    return serve
