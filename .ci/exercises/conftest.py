"""What the acceptance tests share: a clock that jumps, a service around handlers that do as they are told.

The event loop of these tests never sleeps. Where it would, it sets its clock forward instead, so that a test may wait
for an hour and take a millisecond. `time.time()` and `time.monotonic()` follow that clock; a solution may use them all.
"""

import asyncio, contextlib, functools, logging, selectors, sys, time
from pathlib import Path

import httpx, pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # for a bare `pytest`; `python -m pytest` puts the working directory there anyway

import taskqueue  # noqa: E402


class Clock(selectors.DefaultSelector):
    """What the event loop waits with; it moves the time on instead."""

    def __init__(self):
        super().__init__()
        self.seconds = self.wall_clock_is_ahead = 0.0

    def select(self, timeout=None):
        if timeout is None:
            raise RuntimeError("everything waits for something that will never happen: this would hang for ever")
        self.seconds += timeout + (1e-5 if timeout else 1e-9)  # as in life: a timer is late, and a step takes a moment
        return super().select(0)

    def now(self):
        """Seconds since the test began."""
        return self.seconds

    async def sleep(self, seconds):
        """Let that much time pass, and everything happen that happens in it."""
        await asyncio.sleep(seconds)

    async def settle(self):
        """Let everything happen that can happen at once."""
        await asyncio.sleep(0.001)

    def block(self, seconds):
        """The event loop is held up for so long: time passes, and nothing happens."""
        self.seconds += seconds


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self, clock):
        self.clock = clock
        super().__init__(clock)

    def time(self):
        return self.clock.now()


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock.now)
    monkeypatch.setattr(time, "time", lambda: 1_700_000_000 + clock.now() + clock.wall_clock_is_ahead)
    return clock


@pytest.fixture
def anyio_backend(clock):
    return "asyncio", {"loop_factory": functools.partial(VirtualLoop, clock)}


class Service:
    """The app, a client of it, and handlers that do what a payload says:

    `name` goes into `started`, with the time; `seconds` is how long it takes, with its progress at 50 % half way; and
    the first `fails` attempts under that name raise an error."""

    def __init__(self, clock, settings, handlers):
        self.clock, self.started = clock, []
        self.app = taskqueue.create_app(settings, handlers or dict.fromkeys(taskqueue.TaskType, self._work))
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://test")

    async def _work(self, payload, update_progress):
        told = {"name": "it", "seconds": 0, "fails": 0} | payload.model_extra
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
        """Submit a task and let it start if it can; return its id."""
        payload = {"name": name, "seconds": seconds, "fails": fails}
        order = {"task_type": "send_email", "payload": payload, "timeout": 3600, **fields}
        answer = await self.client.post("/tasks", json=order)
        assert answer.status_code == 202, f"POST /tasks {order} was answered {answer.status_code} {answer.text}"
        await self.clock.settle()
        return answer.json()["id"]

    async def task(self, task_id):
        """The task as it is now."""
        return (await self.client.get(f"/tasks/{task_id}")).json()

    async def end_of(self, task_id):
        """The task as it is once it has ended."""
        async with asyncio.timeout(1000):
            async for state in self.queue.watch(task_id):
                if state.status in ("completed", "failed", "cancelled"):
                    return await self.task(task_id)
        return pytest.fail("the queue has stopped before the task had ended")


@pytest.fixture
def serve(clock, caplog):
    """`async with serve(max_workers=1) as service: …` for a Service with these settings."""

    @contextlib.asynccontextmanager
    async def serve(handlers=None, **knobs):
        before = asyncio.all_tasks()
        for knob in knobs:
            if knob not in taskqueue.Settings.__dataclass_fields__:
                pytest.fail(f"Settings has no `{knob}` yet", pytrace=False)
        service = Service(clock, taskqueue.Settings(**knobs), handlers)
        async with service.app.router.lifespan_context(service.app), service.client:
            await asyncio.sleep(0.001)  # by now the worker loop waits for a task
            yield service
        # The shutdown must leave nothing behind that runs, or that goes wrong later.
        await asyncio.sleep(0)
        left = [task for task in asyncio.all_tasks() - before if task.get_coro().__name__ != "_shutdown_watcher"]
        assert not left, f"the queue has stopped, but these tasks of asyncio still run: {left}"
        errors = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
        assert not errors, f"the log has errors: {errors}"

    return serve
