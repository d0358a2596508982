"""The proof of taskqueue.py: that it keeps its promises, and that each trap it names is really handled.

The sections are those of the module, in its order, after one with the tools. For each `GOTCHA [slow-reader]` over there
a test here has `slow_reader` in its name, so `python -m pytest -k slow_reader` runs the proof of that one.

How the tests wait. A handler stands at a `Gate` until the test lets it go, so nothing is a race. The event loop has a
virtual clock, so nothing takes long: where it would sleep, it sets its clock forward. `await quiet()` returns once all
has happened that can happen without time passing. Only what needs a thread runs on the real clock.
"""

import asyncio, base64, contextlib, dataclasses, gc, hashlib, inspect, itertools, json, logging, math, os, pathlib
import random, re, secrets, selectors, signal, socket, subprocess, sys, threading, time, tomllib
from datetime import UTC, datetime
from types import SimpleNamespace

import httpx, pytest
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from sse_starlette.sse import AppStatus

import taskqueue
from taskqueue import HANDLERS, IllegalTransition, QueueFull, QueueStopped, Settings, Status, TaskNotCancellable
from taskqueue import TaskNotFound, TaskQueue, TaskSubmission, TaskType, backoff_delay, create_app, process_task

pytestmark = pytest.mark.anyio
HERE = pathlib.Path(__file__).parent
FINAL = {"completed", "failed", "cancelled"}

# ===== Tools ==========================================================================================================
# A clock that jumps, a handler that waits to be let go, a queue or an app around it, and a reader of live streams.

class JumpingSelector(selectors.DefaultSelector):
    """What an event loop waits with. This one doesn't wait: it moves the clock by as much."""
    now = 0.0

    def select(self, timeout=None):
        if timeout is None:
            raise RuntimeError("everything waits, and no timer is set: this test would hang for ever")
        self.now += timeout
        return super().select(0)

class VirtualClockLoop(asyncio.SelectorEventLoop):
    def __init__(self):
        self.selector = JumpingSelector()
        super().__init__(self.selector)

    def time(self):
        return self.selector.now

@pytest.fixture
def anyio_backend():
    return "asyncio", {"loop_factory": VirtualClockLoop}

real_clock = pytest.mark.parametrize("anyio_backend", [("asyncio", {})], ids=["real clock"])
posix_only = pytest.mark.skipif(os.name == "nt", reason="Windows can't send another process a SIGINT")

def now():
    return asyncio.get_running_loop().time()

async def quiet():
    """Let everything happen that can happen now: a timer's turn comes when nothing else is left to do."""
    await asyncio.sleep(2**-20)

@pytest.fixture(autouse=True)
async def nothing_is_left(anyio_backend, monkeypatch):
    """After every test nothing runs on, nobody watches, no alarm is set, and the books of each queue are balanced."""
    stores, init = [], taskqueue.TaskStore.__init__
    monkeypatch.setattr(taskqueue.TaskStore, "__init__", lambda self, *args: stores.append(self) or init(self, *args))
    yield
    left = {task.get_coro().__name__ for task in asyncio.all_tasks() - {asyncio.current_task()}}
    # The first is anyio's, to run this function; the second sse-starlette's, one for each event loop, to its end.
    assert left <= {"_call_in_runner_task", "_shutdown_watcher"}
    for store in stores:
        assert (store.watchers, store._events, store._alarm) == (0, {}, None)
        assert store.submitted == store.evicted + sum(store.count(status) for status in Status)
        assert all(all(shelf.blocks.values()) for shelf in store._shelves.values())  # no empty block is kept

class Gate:
    """A handler in the hands of the test: it logs which tasks start, and holds each until it is let go.
    The subject of the e-mail is the name of a task: `order("a")` makes the task "a"."""

    def __init__(self):
        self.log = []  # names, in the order in which they started
        self.held = {}  # those that run now: name → the future that ends it
        self.report = {}  # name → its update_progress
        self.most = 0  # that were held at once

    async def handle(self, payload, update_progress):
        name = payload.subject
        self.log.append(name)
        self.held[name] = asyncio.get_running_loop().create_future()
        self.report[name] = update_progress
        self.most = max(self.most, len(self.held))
        try:
            return await self.held[name]
        finally:
            del self.held[name]

    def let_go(self, name="it", outcome=None):
        if isinstance(outcome, Exception):
            self.held[name].set_exception(outcome)
        else:
            self.held[name].set_result(outcome)

    async def let_all_go(self):
        """One after the other, and those too that start meanwhile."""
        await quiet()
        while self.held:
            self.let_go(min(self.held))
            await quiet()

@pytest.fixture
def gate():
    return Gate()

def order(name="it", **fields):
    return TaskSubmission(task_type="send_email", payload={"subject": name}, **fields)

def handlers(handle):
    return {TaskType.SEND_EMAIL: handle.handle if isinstance(handle, Gate) else handle}

def running(handle, **knobs):
    return TaskQueue(Settings(**knobs), handlers(handle))

@contextlib.asynccontextmanager
async def serving(handle=None, **knobs):
    """An app in its lifespan, which httpx doesn't run; a client of it; and its queue."""
    app = create_app(Settings(**knobs), handlers(handle) if handle else HANDLERS)
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
    async with app.router.lifespan_context(app), client:
        yield app, client, app.state.queue

async def until(queue, task_id, condition=lambda state: state.status in FINAL):
    """Watch a task until it is so; return its state then."""
    async with asyncio.timeout(5), contextlib.aclosing(queue.watch(task_id)) as states:
        async for state in states:
            if condition(state):
                return state
    return pytest.fail("the watch ended before it was so")

async def outcome(handle, knobs=None, **fields):
    """Run the task "it" in a queue of its own; return its final state."""
    async with running(handle, **(knobs or {})) as queue:
        return await until(queue, queue.submit(order(**fields)).id)

async def bring_to(status, queue, gate):
    """Make the task "it", and bring it to this status; return its id."""
    task_id = queue.submit(order(delay=9 if status == "pending" else 0)).id
    await quiet()
    if status == "completed":
        gate.let_go("it", "done")
    if status == "failed":
        gate.let_go("it", ValueError("broken"))
    if status == "cancelled":
        queue.cancel(task_id, force=True)
    await quiet()
    assert queue.get_task(task_id).status == status
    return task_id

def throw(error):
    raise error

def strict_json(text):
    """Parse JSON as everyone but Python does: without NaN and Infinity."""
    return json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))

def deep(levels):
    return "[" * levels + "]" * levels

@contextlib.asynccontextmanager
async def streaming(gate, status, path="/tasks/{}/stream", last_event_id="", **knobs):
    """A queue that has the task "it" in this status, and a stream of that task."""
    async with serving(gate, **knobs) as (app, _, queue):
        task_id = await bring_to(status, queue, gate)
        async with Stream(app, path.format(task_id), last_event_id) as stream:
            yield queue, stream

class Stream:
    """A client of one live stream, on the bare ASGI interface: httpx would wait for the end of it.
    It reads frame by frame; while `reading` is not set it reads nothing; and it hangs up at the end of its block."""

    def __init__(self, app, path, last_event_id="", body=b""):
        self.app, self.body, self.text, self.messages = app, body, "", asyncio.Queue()
        self.scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "scheme": "http",
            "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "client": ("test", 1),
            "server": ("test", 80), "headers": [(b"last-event-id", last_event_id.encode("latin-1"))]}
        self.reading, self.hung_up = asyncio.Event(), asyncio.Event()
        self.reading.set()

    async def __aenter__(self):
        self.call = asyncio.create_task(self.app(self.scope, self.receive, self.send))
        return self

    async def __aexit__(self, *_):
        self.hung_up.set()
        async with asyncio.timeout(5):
            await self.call  # raises what the app has raised

    async def receive(self):
        if self.body:
            body, self.body = self.body, b""
            return {"type": "http.request", "body": body, "more_body": True}
        await self.hung_up.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        await self.reading.wait()
        self.messages.put_nowait(message)

    async def next(self):
        """The next frame, as a dict of its fields; or None, at the clean end of the response."""
        while "\n\n" not in self.text:
            async with asyncio.timeout(5):
                message = await self.messages.get()
            if message["type"] == "http.response.start":
                self.status, self.headers = message["status"], httpx.Headers(message["headers"])
            elif message.get("more_body"):
                self.text += message["body"].decode()
            else:
                return None
        frame, self.text = self.text.split("\n\n", 1)
        fields = dict(line.split(": ", 1) for line in frame.split("\n"))
        return fields | {"data": strict_json(fields["data"])} if "data" in fields else fields

    async def take(self, count):
        return [await self.next() for _ in range(count)]

    async def rest(self):
        frames = []
        while frame := await self.next():
            frames.append(frame)
        return frames

# ===== Settings =======================================================================================================
# What can be turned, and how far.

def test_settings_are_frozen_and_have_the_defaults_of_the_contract():
    contract = {
        "max_workers": 3, "max_pending": 1000, "keep_finished": 1000, "drain_seconds": 5, "backoff_base": 0.5,
        "backoff_cap": 30, "send_timeout": 10, "ping_seconds": 15, "max_body": 65536, "failure_rate": 0.1, "pace": 1}
    assert contract.items() <= dataclasses.asdict(Settings()).items()  # a learner may add one
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().max_workers = 4

@pytest.mark.parametrize("knob", [
    {"max_workers": 0}, {"max_pending": 0}, {"keep_finished": -1}, {"drain_seconds": -1}, {"backoff_base": -1},
    {"backoff_cap": -1}, {"backoff_cap": math.inf}, {"send_timeout": 0}, {"ping_seconds": 0}, {"failure_rate": 1.1},
    {"pace": math.nan}], ids=str)
def test_settings_out_of_range_are_refused(knob):
    with pytest.raises(ValidationError):
        Settings(**knob)

# ===== Models =========================================================================================================
# What an order may say. What HTTP makes of a refusal stands under Routes.

def test_submission_has_the_defaults_of_the_contract():
    assert TaskSubmission(task_type="send_email").model_dump() == {
        "task_type": "send_email", "payload": {}, "priority": 5, "max_retries": 0, "timeout": 60, "delay": 0}

def test_submission_takes_each_bound_and_keeps_the_payload_as_it_was_sent():
    order(priority=1, max_retries=10, timeout=3600, delay=86400)
    order(priority=10, max_retries=0, timeout=0.001, delay=0)
    payload = {"width": 5, "note": {"further": ["keys", None]}}
    assert TaskSubmission(task_type="resize_image", payload=payload).payload == payload

@pytest.mark.parametrize("fields", [
    {"task_type": "bake_cake"}, {"priority": True}, {"priority": "1"}, {"priority": 1.0}, {"priority": 2},
    {"priority": 10**40}, {"priority": None}, {"max_retries": -1}, {"max_retries": 11}, {"max_retries": True},
    {"max_retries": 1.5}, {"timeout": 0}, {"timeout": 3601}, {"timeout": "60"}, {"timeout": True},
    {"timeout": math.nan}, {"delay": -1}, {"delay": 86401}, {"delay": math.inf}, {"hue": "red"}, {"payload": []},
    {"payload": None}, {"payload": {"subject": 5}}, {"payload": {"to": None}}, {"payload": {"x": math.nan}}], ids=str)
def test_submission_refuses(fields):
    with pytest.raises(ValidationError):
        TaskSubmission.model_validate({"task_type": "send_email", **fields})

# ===== Queue ==========================================================================================================
# Tasks go in, and come out in the right order, or not at all.

async def test_queue_takes_tasks_only_from_its_start_to_its_stop(gate):
    queue = TaskQueue(handlers=handlers(gate))
    with pytest.raises(QueueStopped):
        queue.submit(order())
    async with queue:
        assert queue.submit(order(delay=9)).status == "pending"
    assert (queue.settings, queue.is_running) == (Settings(), False)
    with pytest.raises(QueueStopped):
        queue.submit(order())

@real_clock
async def test_queue_refuses_to_be_called_in_another_thread(gate):
    async with running(gate) as queue:
        with pytest.raises(RuntimeError, match="no running event loop"):
            await asyncio.to_thread(queue.submit, order(delay=9))
        assert (queue.submitted, queue.count(Status.PENDING), queue.list_tasks()) == (0, 0, ([], 0))

async def test_queue_runs_lower_priority_numbers_first(gate):
    async with running(gate, max_workers=1) as queue:
        for name, priority in [("low", 10), ("medium", 5), ("high", 1), ("medium 2", 5), ("high 2", 1)]:
            queue.submit(order(name, priority=priority))
        await gate.let_all_go()
    assert gate.log == ["high", "high 2", "medium", "medium 2", "low"]

async def test_queue_tie_break_is_the_order_of_submission_whatever_the_clock_does(gate, monkeypatch):
    """GOTCHA [tie-break]: this clock runs backwards."""
    seconds = itertools.count(2_000_000_000, -1)
    backwards = SimpleNamespace(now=lambda zone: datetime.fromtimestamp(next(seconds), zone))
    monkeypatch.setattr(taskqueue, "datetime", backwards)
    async with running(gate, max_workers=1) as queue:
        for name in "abcdefgh":
            queue.submit(order(name))
        await gate.let_all_go()
    assert gate.log == list("abcdefgh")

async def test_queue_lists_pages_newest_first_and_counts_every_match(gate, monkeypatch):
    monkeypatch.setattr(taskqueue.Shelf, "BLOCK", 8)  # so that pages cross from one block to the next
    async with running(gate) as queue:
        every = [queue.submit(order(delay=9)).id for _ in range(50)][::-1]
        cancelled = every[5:15] + every[20::3]
        for task_id in cancelled:
            queue.cancel(task_id)
        waiting = [task_id for task_id in every if task_id not in cancelled]
        for status, ids in (None, every), (Status.CANCELLED, cancelled), (Status.PENDING, waiting):
            for offset in (*range(len(ids) + 1), 10**30):
                page, total = queue.list_tasks(status, limit=5, offset=offset)
                assert ([task.id for task in page], total) == (ids[offset : offset + 5], len(ids))

async def test_queue_cancels_a_running_task_only_by_force(gate):
    async with running(gate) as queue:
        task_id = await bring_to("running", queue, gate)
        with pytest.raises(TaskNotCancellable, match="is running"):
            queue.cancel(task_id)

async def test_queue_says_when_a_delay_will_end(gate):
    async with running(gate) as queue:
        task = queue.submit(order(delay=3600))
        assert (task.not_before - task.created_at).total_seconds() == pytest.approx(3600, abs=60)
        assert queue.submit(order()).not_before is None

async def test_queue_lazy_cancel_does_not_run_count_or_hold_up_the_cancelled(gate):
    """GOTCHA [lazy-cancel]: the entry of a cancelled task stays in the heap for a while."""
    async with running(gate, max_workers=1, max_pending=1) as queue:
        queue.submit(order("first"))
        await quiet()
        queue.cancel(queue.submit(order("cancelled", priority=1)).id)
        queue.submit(order("second"))
        await gate.let_all_go()
    assert gate.log == ["first", "second"]

async def test_queue_lazy_cancel_does_not_fill_the_memory(gate, monkeypatch):
    """GOTCHA [lazy-cancel]: the workers are busy, so nobody takes the dead out of the heap. It is swept at times."""
    async with running(gate, max_workers=1, keep_finished=10) as queue:
        prune, sweeps = queue._ready.prune, []
        monkeypatch.setattr(queue._ready, "prune", lambda: sweeps.append(1) or prune())
        for number in range(30):
            queue.submit(order(str(number), timeout=1000))
        await quiet()
        for delay in (0, 9) * 500:
            queue.cancel(queue.submit(order("cancelled", delay=delay)).id)
        await asyncio.sleep(10)
        assert queue._ready.qsize() < 200
        assert len(sweeps) < 15
        await gate.let_all_go()
    assert gate.log == [str(number) for number in range(30)]

async def test_queue_lazy_cancel_keeps_the_order_of_those_that_stay(gate):
    """GOTCHA [lazy-cancel]: a heap without some of its entries is no heap any more."""
    async with running(gate, max_workers=1) as queue:
        queue.submit(order("busy"))
        await quiet()
        doomed = [queue.submit(order("doomed", priority=1)).id for _ in range(150)]
        for priority in (10,) * 15 + (5,) * 15 + (1,) * 15:
            queue.submit(order(str(priority), priority=priority))
        for task_id in doomed:
            queue.cancel(task_id)
        assert queue._ready.qsize() < 60
        await gate.let_all_go()
    assert gate.log == ["busy"] + ["1"] * 15 + ["5"] * 15 + ["10"] * 15

async def test_queue_unbounded_history_evicts_the_oldest_finished_and_nothing_else(gate):
    """GOTCHA [unbounded-history]: the two oldest tasks of all have not finished, and stay."""
    async with running(gate, max_workers=2, keep_finished=2) as queue:
        waits, runs = queue.submit(order("waits", delay=9)).id, queue.submit(order("runs")).id
        await quiet()
        ended = [await bring_to("cancelled", queue, gate) for _ in range(4)]
        assert [task.id for task in queue.list_tasks()[0]] == [ended[3], ended[2], runs, waits]
        assert queue.evicted == 2
        with pytest.raises(TaskNotFound):
            queue.get_task(ended[1])

async def test_queue_forgets_an_idempotency_key_with_its_task(gate):
    async with running(gate, keep_finished=1) as queue:
        first = queue.submit(order(delay=9), idempotency_key="k")
        queue.cancel(first.id)
        assert queue.submit(order(delay=9), idempotency_key="k").id == first.id
        queue.cancel(queue.submit(order(delay=9)).id)  # evicts the first
        assert queue.submit(order(delay=7), idempotency_key="k").id != first.id

@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
async def test_queue_terminal_is_final(status, gate):
    """GOTCHA [terminal-is-final]: whoever comes second gets an exception, and the task stays as it is."""
    async with running(gate) as queue:
        task_id = await bring_to(status, queue, gate)
        before = queue.get_task(task_id)
        for target in Status:
            with pytest.raises(IllegalTransition):
                queue._move(queue._tasks[task_id], target, result="late")
        assert queue.get_task(task_id) == before

@pytest.mark.parametrize("steps", range(6))
async def test_queue_snapshot_then_subscribe_loses_no_change(steps, gate):
    """GOTCHA [snapshot-then-subscribe]: the change comes so many steps of the loop after the watcher's last look."""
    async with running(gate) as queue:
        task_id = await bring_to("running", queue, gate)
        async with contextlib.aclosing(queue.watch(task_id)) as states:
            await anext(states)
            following = asyncio.create_task(anext(states))
            for _ in range(steps):
                await asyncio.sleep(0)
            gate.report["it"](50)
            assert (await asyncio.wait_for(following, 5)).progress == 50

async def test_queue_numbers_its_changes_above_those_of_an_earlier_life(gate):
    """A client may come back with a Last-Event-ID that it got before the server was started again."""
    async with running(gate) as queue:
        old = queue.submit(order())
    async with running(gate) as queue:
        assert queue.submit(order()).version > old.version

# ===== Handlers =======================================================================================================
# How one is called: in the loop or in a thread, and with what. And the three that only simulate.

async def test_process_task_gives_the_handler_the_validated_model():
    async def handle(payload, update_progress):
        return payload

    got = await process_task(TaskType.RESIZE_IMAGE, {"width": 5, "note": "x"}, print, {TaskType.RESIZE_IMAGE: handle})
    assert (type(got), got.width, got.height, got.note) == (taskqueue.ResizeImagePayload, 5, 600, "x")
    with pytest.raises(ValidationError):
        await process_task(TaskType.RESIZE_IMAGE, {"width": "5"}, print)
    with pytest.raises(LookupError, match="send_email"):
        await process_task(TaskType.SEND_EMAIL, {}, print, {})

async def test_handler_registers_a_function_and_the_model_in_its_annotation(monkeypatch):
    class Letter(BaseModel):
        stamp: int

    monkeypatch.setitem(taskqueue.PAYLOAD_MODELS, TaskType.SEND_EMAIL, None)  # so that both are put back afterwards
    monkeypatch.setitem(HANDLERS, TaskType.SEND_EMAIL, None)

    @taskqueue.handler(TaskType.SEND_EMAIL)
    async def post(payload: Letter, update_progress):
        return payload

    assert HANDLERS[TaskType.SEND_EMAIL] is post
    assert await process_task(TaskType.SEND_EMAIL, {"stamp": 1}, print) == Letter(stamp=1)
    with pytest.raises(ValidationError, match="stamp"):
        TaskSubmission(task_type="send_email", payload={})

async def test_handlers_start_each_attempt_with_the_payload_as_it_was_sent():
    async def handle(payload, update_progress):
        seen.append(list(payload.files))
        payload.files.append("one more")
        raise ValueError

    seen = []
    async with running(handle, backoff_base=0) as queue:
        task = queue.submit(TaskSubmission(task_type="send_email", payload={"files": ["a"]}, max_retries=1))
        assert (await until(queue, task.id)).payload == {"files": ["a"]}
    assert seen == [["a"], ["a"]]

@real_clock
async def test_handlers_blocking_handler_leaves_the_loop_free():
    """GOTCHA [blocking-handler]: it blocks until the loop has seen its progress, and lets it go."""
    def handle(payload, update_progress):
        update_progress(50)
        return "let go" if let_go.wait(2) else "nobody was free to let it go"

    let_go = threading.Event()
    async with running(handle) as queue:
        task = queue.submit(order())
        await until(queue, task.id, lambda state: state.progress == 50)
        let_go.set()
        assert (await until(queue, task.id)).result == "let go"

@real_clock
async def test_handlers_thread_is_asked_to_stop_and_keeps_its_slot_until_it_has():
    def handle(payload, update_progress):
        log.append(payload.subject)
        update_progress(1)
        go_on.wait(5)
        update_progress(2)
        log.append("was not stopped")

    go_on, log = threading.Event(), []
    async with running(handle, max_workers=1) as queue:
        first, second = queue.submit(order("first")), queue.submit(order("second"))
        await until(queue, first.id, lambda state: state.progress == 1)
        queue.cancel(first.id, force=True)
        for _ in range(10):
            await asyncio.sleep(0)
        assert (queue.get_task(first.id).status, log) == ("running", ["first"])
        go_on.set()
        assert (await until(queue, first.id)).status == "cancelled"
        assert (await until(queue, second.id)).status == "completed"
    assert log == ["first", "second", "was not stopped"]

@real_clock
async def test_process_task_passes_a_cancel_on_once_the_thread_has_ended():
    def handle(payload, update_progress):
        began.set()
        go_on.wait(5)

    began, go_on = threading.Event(), threading.Event()
    call = asyncio.create_task(process_task(TaskType.SEND_EMAIL, {}, print, handlers(handle)))
    await asyncio.to_thread(began.wait, 5)
    call.cancel()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await call

@real_clock
@pytest.mark.parametrize("task_type", [TaskType.RESIZE_IMAGE, TaskType.GENERATE_REPORT, TaskType.SEND_EMAIL])
async def test_simulated_handlers_report_rising_progress_up_to_100(task_type):
    async with TaskQueue(Settings(pace=0, failure_rate=0)) as queue:
        task, seen = queue.submit(TaskSubmission(task_type=task_type)), []
        changed = queue._changed
        queue._changed = lambda task: seen.append(task.progress) or changed(task)
        state = await until(queue, task.id)
    assert (state.status, type(state.result)) == ("completed", dict)
    assert (len(set(seen)) > 3, seen[-1], seen) == (True, 100, sorted(seen))

SIMULATED = pytest.mark.parametrize(("task_type", "payload", "stages", "seconds", "result"), [
    ("resize_image", {"url": "a.jpg", "width": 4, "height": 3}, ["downloading", "decoding", "scaling", "saving"], 0.5,
     {"url": "a.jpg", "size": "4x3"}),
    ("generate_report", {"report_id": 7}, ["querying", "aggregating", "charting", "rendering"], 0.75,
     {"file": "report-7.pdf", "pages": 9}),
    ("send_email", {"to": "a@example.com"}, ["rendering", "connecting", "sending"], 0.3,
     {"to": "a@example.com", "message_id": "<c0ffee@taskqueue.example>"})], ids=lambda value: str(value)[:9])

async def simulated(task_type, payload, monkeypatch):
    """Call the handler as a plain function, without a queue; return its result, and the seconds that it has taken."""
    slept, began = [], now()
    monkeypatch.setattr(time, "sleep", slept.append)
    result = HANDLERS[task_type](taskqueue.parse_payload(task_type, payload), lambda percent: None)
    result = await result if inspect.isawaitable(result) else result
    return result, now() - began + sum(slept)

@SIMULATED
async def test_simulated_handlers_need_no_queue(task_type, payload, stages, seconds, result, monkeypatch):
    monkeypatch.setattr(random, "random", lambda: 0.99)
    monkeypatch.setattr(random, "randint", lambda low, high: 9)
    monkeypatch.setattr(secrets, "token_hex", lambda size: "c0ffee")
    returned, taken = await simulated(task_type, payload, monkeypatch)
    assert (returned, taken) == (result, pytest.approx(seconds * len(stages), abs=0.001))

@SIMULATED
async def test_simulated_handlers_can_fail_in_each_stage(task_type, payload, stages, seconds, result, monkeypatch):
    monkeypatch.setattr(random, "random", lambda: 0.0)
    for stage in stages:
        monkeypatch.setattr(random, "choice", lambda among, stage=stage: among[stages.index(stage)])
        with pytest.raises(RuntimeError, match=f"^simulated failure while {stage}$"):
            await simulated(task_type, payload, monkeypatch)

async def test_simulated_handlers_keep_the_pace_and_the_failure_rate_that_are_set(monkeypatch):
    monkeypatch.setattr(random, "random", lambda: 0.0)  # the least that there is: a rate of 0 means never
    for failure_rate, status in (0, "completed"), (1, "failed"):
        async with TaskQueue(Settings(failure_rate=failure_rate, pace=2)) as queue:
            state = await until(queue, queue.submit(TaskSubmission(task_type="resize_image")).id)
            assert state.status == status
    assert state.error.startswith("RuntimeError: simulated failure while ")
    assert 4 * 0.5 * 2 < now() <= 2 * 4 * 0.5 * 2  # four stages of half a second; the second task fails after one

# ===== Workers ========================================================================================================
# Slots, order, attempts, time, and every way for an attempt to end.

@pytest.mark.parametrize("limit", [1, 3, 7])
async def test_workers_run_as_many_at_once_as_they_may_and_no_more(limit, gate):
    names = [str(number) for number in range(10)]
    async with running(gate, max_workers=limit) as queue:
        for name in names:
            queue.submit(order(name))
        await quiet()
        assert list(gate.held) == names[:limit]
        await gate.let_all_go()
        assert (gate.log, gate.most, queue.count(Status.COMPLETED)) == (names, limit, 10)

async def test_workers_slot_before_get_lets_a_late_high_overtake_every_low(gate):
    """GOTCHA [slot-before-get]: no LOW is in hand already when the slot becomes free."""
    async with running(gate, max_workers=1) as queue:
        for name in ("busy", "low", "low 2"):
            queue.submit(order(name, priority=10))
        await quiet()
        queue.submit(order("late high", priority=1))
        await gate.let_all_go()
    assert gate.log == ["busy", "late high", "low", "low 2"]

async def test_workers_start_a_delayed_task_on_time_and_hold_no_slot_for_it(gate):
    async with running(gate, max_workers=1) as queue:
        queue.submit(order("later", delay=30, priority=1))
        queue.submit(order("now"))
        await gate.let_all_go()
        await asyncio.sleep(29.9)
        assert gate.log == ["now"]
        await asyncio.sleep(0.2)
        assert list(gate.held) == ["later"]
        await gate.let_all_go()

async def test_workers_retry_until_an_attempt_succeeds(monkeypatch):
    async def handle(payload, update_progress):
        started.append(now())
        return "at last" if len(started) == 3 else throw(ValueError("not yet"))

    started = []
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    state = await outcome(handle, {"backoff_base": 1}, max_retries=5)
    assert (state.status, state.attempt, state.result, state.error) == ("completed", 3, "at last", None)
    assert started == pytest.approx([0, 1, 3], abs=0.001)  # 1 s of backoff, then 2

async def test_workers_backoff_holds_slot_of_nobody(gate, monkeypatch):
    """GOTCHA [backoff-holds-slot]: while one task waits for its next attempt, another runs."""
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    async with running(gate, max_workers=1, backoff_base=8) as queue:
        queue.submit(order("fails", max_retries=1))
        queue.submit(order("waits"))
        await quiet()
        gate.let_go("fails", ValueError())
        await quiet()
        assert (list(gate.held), queue.count(Status.PENDING)) == (["waits"], 1)

async def test_workers_show_why_an_attempt_has_failed_until_the_next_one(gate):
    async with running(gate, backoff_base=8) as queue:
        task_id = queue.submit(order(max_retries=1)).id
        await quiet()
        gate.let_go("it", ValueError("broken"))
        await quiet()
        waits = queue.get_task(task_id)
        assert (waits.status, waits.attempt, waits.error) == ("pending", 1, "ValueError: broken")
        await asyncio.sleep(8)
        runs = queue.get_task(task_id)
        assert (runs.status, runs.attempt, runs.error) == ("running", 2, None)

async def test_workers_retry_keeps_priority_and_place(gate):
    """GOTCHA [retry-keeps-priority]: it has failed, and yet it comes before all that were behind it."""
    async with running(gate, max_workers=1, backoff_base=0) as queue:
        for name, priority in [("medium", 5), ("high", 1), ("high 2", 1)]:
            queue.submit(order(name, priority=priority, max_retries=1))
        await quiet()
        gate.let_go("high", ValueError())
        await gate.let_all_go()
    assert gate.log == ["high", "high", "high 2", "medium"]

def test_backoff_doubles_up_to_its_cap_with_full_jitter(monkeypatch):
    monkeypatch.setattr(random, "uniform", lambda low, high: (low, high))
    spans = [backoff_delay(attempt, Settings(backoff_base=0.5, backoff_cap=30)) for attempt in range(1, 9)]
    assert spans == [(0, longest) for longest in (0.5, 1, 2, 4, 8, 16, 30, 30)]

async def test_workers_stop_an_attempt_at_its_timeout_and_retry_it(gate):
    async with running(gate, backoff_base=0) as queue:
        queue.submit(order("longer", timeout=50))
        state = await until(queue, queue.submit(order(timeout=2, max_retries=1)).id)
        assert (state.status, state.attempt, state.error) == ("failed", 2, "TimeoutError: no result within 2 s")
        assert (list(gate.held), now()) == (["longer"], pytest.approx(4, abs=0.001))

async def test_workers_have_one_alarm_for_all_deadlines(gate, monkeypatch):
    rings, check = [], TaskQueue._check_deadlines
    monkeypatch.setattr(TaskQueue, "_check_deadlines", lambda queue: rings.append(round(now(), 3)) or check(queue))
    async with running(gate) as queue:
        for timeout in (30, 20, 10):  # so each one has to be set earlier
            queue.submit(order(str(timeout), timeout=timeout))
        await asyncio.sleep(50)
    assert rings == [0, 0, 0, 10, 20, 30, 50]  # the last one at the stop

async def test_workers_interrupt_an_attempt_once_however_often_it_is_cancelled():
    async def handle(payload, update_progress):
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(3)
            tidied.append(now())

    tidied = []
    async with running(handle) as queue:
        task = queue.submit(order())
        for _ in range(3):
            await asyncio.sleep(1)
            queue.cancel(task.id, force=True)
        await until(queue, task.id)
    assert tidied == [pytest.approx(4, abs=0.001)]

@pytest.mark.parametrize("reaction", ["lets go", "raises another error", "returns all the same", "takes its time"])
@pytest.mark.parametrize(("causes", "status", "error"), [
    ({"timeout"}, "failed", "TimeoutError: no result within 5 s"), ({"cancel"}, "cancelled", None),
    ({"timeout", "cancel"}, "cancelled", None), ({"shutdown"}, "cancelled", None),
    (set(), "failed", "TimeoutError: mine")], ids=["timeout", "cancel", "timeout, then cancel", "shutdown", "nobody"])
async def test_workers_whose_timeout_is_known_by_its_cause(causes, status, error, reaction, monkeypatch):
    """GOTCHA [whose-timeout]: it matters who has stopped a handler, not what comes out of it then."""
    async def handle(payload, update_progress):
        if not causes:
            raise TimeoutError("mine")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if reaction == "raises another error":
                raise ValueError from None
            if reaction == "takes its time":
                await asyncio.sleep(60)  # its deadline passes meanwhile
            if reaction != "returns all the same":
                raise

    monkeypatch.setattr(TaskQueue, "STUBBORN_SECONDS", 100)
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    async with running(handle, drain_seconds=2) as queue:
        task_id = queue.submit(order(timeout=5, max_retries=0 if status == "failed" else 1)).id
        await quiet()
        if "cancel" in causes:
            asyncio.get_running_loop().call_later(5 if "timeout" in causes else 0, queue.cancel, task_id, True)
        await asyncio.sleep(0 if "shutdown" in causes else 100)
    state = queue.get_task(task_id)
    assert (state.status, state.error, state.attempt) == (status, error, 1)

@pytest.mark.parametrize(("error", "text"), [
    (ConnectionError("no route"), "ConnectionError: no route"), (ValueError(), "ValueError"),
    (ValueError("\ud800"), "ValueError: ?"), (ValueError("x" * 10**6), "ValueError: " + "x" * 988),
    (type("Silent", (Exception,), {"__str__": None})(), "Silent"),
    (type("Loud", (Exception,), {"__str__": lambda error: sys.exit()})(), "Loud")], ids=lambda value: str(type(value)))
def test_workers_describe_any_error_in_one_short_text(error, text):
    assert taskqueue.describe(error) == text

@pytest.mark.parametrize(("misbehave", "named"), [
    (lambda: throw(SystemExit(3)), "SystemExit: 3"), (lambda: throw(asyncio.CancelledError()), "CancelledError"),
    (lambda: throw(ValueError("x")), "ValueError: x"), (lambda: throw(StopIteration()), "StopIteration"),
    (lambda: throw(GeneratorExit()), "GeneratorExit"),
    (lambda: throw(type("Unprintable", (Exception,), {"__str__": None})()), "Unprintable"),
    (lambda: throw(ValueError("\ud800")), "ValueError: ?"), (lambda: throw(ValueError("x" * 10**6)), "ValueError: xxx"),
    (lambda: throw(RecursionError()), "RecursionError"),
    (lambda: throw(ExceptionGroup("two", [ValueError()])), "ExceptionGroup: two"),
    (lambda: throw(KeyboardInterrupt()), "KeyboardInterrupt")])
@pytest.mark.parametrize("kind", ["async def", "def", "def that returns an awaitable"])
@real_clock
async def test_workers_cancelled_error_or_any_other_fails_its_task_and_no_more(kind, misbehave, named):
    """GOTCHA [cancelled-error]: `except Exception` lets some of these pass. SystemExit even stops the whole server."""
    def handle(payload, update_progress):
        return misbehave() if payload.subject == "it" else "fine"

    async def handle_async(payload, update_progress):
        return handle(payload, update_progress)

    kinds = {"async def": handle_async, "def": handle}
    async with running(kinds.get(kind, lambda *args: handle_async(*args)), max_workers=1) as queue:
        state = await until(queue, queue.submit(order()).id)
        assert (state.status, named in state.error, len(state.error) <= 1000) == ("failed", True, True)
        strict_json(state.model_dump_json())
        assert (await until(queue, queue.submit(order("next")).id)).result == "fine"

def test_workers_tiny_timeouts_do_not_kill_the_loop_on_uvloop():
    """uvicorn's default loop counts milliseconds: a timer that is due at once is another kind of handle there."""
    uvloop = pytest.importorskip("uvloop", reason="uvicorn brings it on Unix only")

    async def main():
        async with TaskQueue(Settings(backoff_cap=0), {TaskType.SEND_EMAIL: lambda payload, report: None}) as queue:
            tasks = [queue.submit(order(timeout=0.0001)).id for _ in range(6)]
            for task in tasks:
                await until(queue, task)
            return queue.is_running

    assert uvloop.run(main())

async def test_workers_cancel_before_first_step_frees_the_slot(gate, monkeypatch):
    """GOTCHA [cancel-before-first-step]: the attempt is cancelled in the very step that makes it."""
    def start_and_cancel(queue, task):
        start(queue, task)
        if task.payload["subject"] == "it":
            queue.cancel(task.id, force=True)

    start = TaskQueue._start
    monkeypatch.setattr(TaskQueue, "_start", start_and_cancel)
    async with running(gate, max_workers=1) as queue:
        task = queue.submit(order())
        queue.submit(order("next"))
        await quiet()
        assert (queue.get_task(task.id).status, list(gate.held)) == ("cancelled", ["next"])

async def test_workers_strong_reference_keeps_an_attempt_alive():
    """GOTCHA [strong-reference]: nobody else holds the future that this handler waits for."""
    async def handle(payload, update_progress):
        await asyncio.get_running_loop().create_future()

    async with running(handle) as queue:
        task = queue.submit(order())
        await quiet()
        gc.collect()
        queue.cancel(task.id, force=True)
        assert (await until(queue, task.id)).status == "cancelled"

circle = []
circle.append(circle)

@pytest.mark.parametrize("result", [
    math.nan, [-math.inf], "\ud800", {"\ud800": 1}, object(), print, iter([1]), {"rows": itertools.count()},
    {iter([1])}, 10**5000, circle, json.loads(deep(400))], ids=lambda value: type(value).__name__)
async def test_workers_bad_result_fails_its_task_and_spoils_nothing(result):
    """GOTCHA [bad-result]: it would be in everybody's list of tasks."""
    async def handle(payload, update_progress):
        return result

    async with serving(handle) as (_, client, queue):
        task = await until(queue, queue.submit(order()).id)
        assert (task.status, task.result, bool(task.error)) == ("failed", None, True)
        assert strict_json((await client.get("/tasks")).text)["tasks"][0]["status"] == "failed"
        assert '"failed"' in (await client.get(f"/tasks/{task.id}/stream")).text

@pytest.mark.parametrize(("result", "shown"), [
    (None, None), ({7}, [7]), ((1, "é"), [1, "é"]), ({1: 2}, {"1": 2}), (10**30, 10**30),
    (json.loads(deep(150)), json.loads(deep(150))),
    (taskqueue.ResizeImagePayload(url="u"), {"url": "u", "width": 800, "height": 600}),
    (datetime(2030, 1, 1, tzinfo=UTC), "2030-01-01T00:00:00Z")], ids=lambda value: type(value).__name__)
async def test_workers_turn_a_result_into_plain_json(result, shown):
    async def handle(payload, update_progress):
        return result

    async with serving(handle) as (_, client, queue):
        task = await until(queue, queue.submit(order()).id)
        assert (task.status, task.error) == ("completed", None)
        assert strict_json((await client.get("/tasks")).text)["tasks"][0]["result"] == shown

@pytest.mark.parametrize("percent", [-1, 100.1, math.nan, math.inf, "50", None, True, 10**400], ids=str)
async def test_progress_refuses_what_is_no_percentage(percent):
    async def handle(payload, update_progress):
        update_progress(percent)

    assert (await outcome(handle)).error.startswith("ValueError: progress must be a number from 0 to 100")

async def test_progress_never_runs_backwards_and_passes_over_late_reports(gate):
    async with running(gate, backoff_base=0) as queue:
        task, shown = queue.submit(order(max_retries=1)), []
        await quiet()
        first_report = gate.report["it"]
        for percent in (0, 50, 20, 50.9, 60):
            first_report(percent)
            shown.append(queue.get_task(task.id).progress)
        gate.let_go("it", ValueError())
        await quiet()
        first_report(90)
        shown.append(queue.get_task(task.id).progress)
        gate.let_go("it", ValueError())
        await quiet()
        gate.report["it"](50)
        assert (shown, queue.get_task(task.id).progress) == ([0, 50, 50, 50, 60, 0], 0)

async def test_progress_that_is_no_progress_is_no_change(gate):
    async with running(gate) as queue:
        task_id, versions = await bring_to("running", queue, gate), set()
        for percent in (0, 50, 50, 50.9, 20):
            gate.report["it"](percent)
            versions.add(queue.get_task(task_id).version)
        assert len(versions) == 2

@real_clock
async def test_progress_from_thread_reaches_the_queue_in_its_own_thread():
    """GOTCHA [progress-from-thread]: what is not thread-safe is touched by the thread of the loop alone."""
    def handle(payload, update_progress):
        for percent in (10, 20, 30):
            update_progress(percent)

    threads = []
    async with running(handle) as queue:
        changed = queue._changed
        queue._changed = lambda task: threads.append(threading.get_ident()) or changed(task)
        assert (await until(queue, queue.submit(order()).id)).progress == 100
    assert threads == [threading.get_ident()] * 6  # submitted, started, three reports, completed

async def test_workers_dead_loop_is_unhealthy_and_logged(gate, monkeypatch, caplog):
    """GOTCHA [dead-loop]: it dies of a bug, so nobody clears a flag."""
    async with serving(gate) as (_, client, queue):
        assert (await client.get("/health")).json()["status"] == "healthy"
        monkeypatch.setattr(queue, "_start", lambda task: throw(RuntimeError("a bug")))
        queue.submit(order())
        await quiet()
        answer = await client.get("/health")
        assert (answer.status_code, answer.json()["status"]) == (503, "unhealthy")
    assert "the worker loop has died" in caplog.text

def test_workers_one_loop_after_another():
    """GOTCHA [one-loop]: the second life of an app, in another event loop, inherits nothing of the first."""
    async def handle(payload, update_progress):
        await asyncio.sleep(0)

    async def live():
        async with app.router.lifespan_context(app):
            tasks = [app.state.queue.submit(order()) for _ in range(3)]
            return [(await until(app.state.queue, task.id)).status for task in tasks]

    app = create_app(Settings(max_workers=1), handlers(handle))
    assert [asyncio.run(live()) for _ in range(2)] == [["completed"] * 3] * 2

async def test_shutdown_gives_running_handlers_time_and_takes_no_more_tasks(gate):
    async with serving(gate, drain_seconds=5) as (_, client, queue):
        task_id = await bring_to("running", queue, gate)
        asyncio.get_running_loop().call_later(4, gate.let_go, "it", "done")
        queue.begin_shutdown()
        answer = await client.post("/tasks", json={"task_type": "send_email"})
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert (queue.get_task(task_id).status, now()) == ("completed", pytest.approx(4, abs=0.001))

async def test_shutdown_leaves_a_queue_that_can_be_entered_again(gate):
    queue = running(gate, max_workers=1)
    for _ in range(2):
        async with queue:
            await bring_to("completed", queue, gate)  # and so the loop holds the slot again, and waits for a task

async def test_shutdown_that_is_cancelled_itself_still_ends_every_task(gate):
    async def live():
        async with queue:
            for name in ("runs", "waits"):
                queue.submit(order(name))
            await quiet()

    queue = running(gate, max_workers=1, drain_seconds=5)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(live(), 1)
    assert ([task.status for task in queue.list_tasks()[0]], now()) == (["cancelled"] * 2, pytest.approx(1, abs=0.001))

async def test_shutdown_cancels_all_that_has_not_finished_by_then(gate, caplog):
    async with running(gate, max_workers=2, drain_seconds=5, backoff_base=0) as queue:
        for name in ("runs", "fails while it drains", "waits"):
            queue.submit(order(name, max_retries=1))
        queue.submit(order("delayed", delay=3))
        await quiet()
        asyncio.get_running_loop().call_later(1, gate.let_go, "fails while it drains", ValueError())
    assert {task.status for task in queue.list_tasks()[0]} == {"cancelled"}
    assert (len(gate.log), now(), caplog.text) == (2, pytest.approx(5, abs=0.001), "")

async def test_shutdown_leaves_a_handler_behind_that_ignores_it(caplog):
    async def handle(payload, update_progress):
        while not let_go.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await let_go.wait()

    let_go = asyncio.Event()
    async with running(handle, drain_seconds=5) as queue:
        task = queue.submit(order())
        await quiet()
    assert now() == pytest.approx(5 + 0.2, abs=0.001)
    assert f"task {task.id} ignores its cancellation" in caplog.text
    let_go.set()
    await quiet()
    assert queue.get_task(task.id).status == "cancelled"

STUBBORN = """
import asyncio
from taskqueue import Settings, TaskQueue, TaskSubmission, TaskType

async def handle(payload, update_progress):
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            pass

async def main():
    async with TaskQueue(Settings(drain_seconds=0), {TaskType.SEND_EMAIL: handle}) as queue:
        queue.submit(TaskSubmission(task_type="send_email"))
        await asyncio.sleep(0.1)

asyncio.run(main())
"""

def test_shutdown_lets_the_process_end_whatever_a_handler_does():
    ran = subprocess.run([sys.executable, "-c", STUBBORN], cwd=HERE, capture_output=True, text=True, timeout=20)
    assert (ran.returncode, ran.stderr.count("\n"), "left behind" in ran.stderr) == (0, 1, True)

async def test_workers_log_names_the_request_and_holds_no_line_of_a_client(caplog):
    caplog.set_level(logging.INFO, "taskqueue")
    async with serving() as (_, client, queue):
        body = {"task_type": "send_email", "payload": {"to": "x\n2030-01-01 INFO forged.invalid"}}
        task = (await client.post("/tasks", json=body, headers={"X-Request-ID": "r-1"})).json()
        assert (await until(queue, task["id"])).status == "failed"
    [line] = [record.getMessage() for record in caplog.records if task["id"] in record.getMessage()]
    assert line.startswith("[r-1] ")
    assert "forged" in line.splitlines()[0]

async def test_workers_keep_every_rule_whatever_comes(gate, monkeypatch):
    """500 steps at random: submit, end, cancel, let time pass. After each of them every rule holds."""
    chance, ended = random.Random(7), {}
    monkeypatch.setattr(random, "uniform", chance.uniform)
    async with running(gate, max_workers=3, max_pending=9, keep_finished=9, backoff_base=1) as queue:
        for step in range(500):
            match chance.randrange(6):
                case 0 | 1:
                    with contextlib.suppress(QueueFull):
                        queue.submit(order(
                            str(step), priority=chance.choice([1, 5, 10]), delay=chance.choice([0, 0, 3]),
                            timeout=chance.randint(1, 20), max_retries=chance.randint(0, 2)))
                case 2 | 3 if gate.held:
                    gate.let_go(chance.choice(list(gate.held)), chance.choice(["done", ValueError("x")]))
                case 4 if tasks := queue.list_tasks()[0]:
                    with contextlib.suppress(TaskNotCancellable):
                        queue.cancel(chance.choice(tasks).id, force=chance.random() < 0.5)
                case 5:
                    await asyncio.sleep(chance.uniform(0, 3))
            await quiet()
            tasks, total = queue.list_tasks()
            assert len(tasks) == total == queue.submitted - queue.evicted
            assert queue.count(Status.RUNNING) == len(gate.held) <= 3
            assert queue.count(Status.PENDING) <= 9 + 3  # three may come back for a retry
            assert len(gate.held) == 3 or queue._ready.empty()  # nobody waits beside a free slot
            for task in tasks:
                assert task.attempt <= task.max_retries + 1
                assert task.status not in FINAL or ended.setdefault(task.id, task) == task
                assert task.status != "failed" or (task.error and task.result is None)
    assert (gate.most, {task.status for task in ended.values()}) == (3, {"completed", "failed", "cancelled"})

# ===== Middleware =====================================================================================================
# What it gives every request: an id, a line in the log, a place in the metrics.

@pytest.mark.parametrize(("sent", "kept"), [
    ("abc-1_2.Z", True), ("x" * 64, True), ("x" * 65, False), ("", False), ("a b", False), ("é", False),
    ("a\nforged line", False), ("a\x1b[2J", False)])
async def test_middleware_keeps_a_sane_request_id_and_replaces_another(sent, kept):
    async with serving() as (_, client, _):
        answer = await client.get("/health", headers={"X-Request-ID": sent.encode()})
        [request_id] = answer.headers.get_list("X-Request-ID")
        assert (request_id == sent, bool(re.fullmatch("[0-9a-f]{16}", request_id))) == (kept, not kept)

async def test_middleware_puts_the_request_id_on_every_answer_and_on_the_task(gate, caplog):
    caplog.set_level(logging.INFO, "taskqueue")
    async with serving(gate) as (_, client, queue):
        client.headers["X-Request-ID"] = "r-1"
        for call in ("GET /", "GET /docs", "GET /nothing", "PUT /tasks", "GET /tasks?limit=0", "DELETE /tasks/x",
                     "GET /tasks/x/stream", "POST /tasks"):
            answer = await client.request(*call.split(), json={"task_type": "send_email"})
            assert answer.headers.get_list("X-Request-ID") == ["r-1"]
        assert answer.json()["request_id"] == queue.list_tasks()[0][0].request_id == "r-1"
    assert caplog.text.count("[r-1] ") == 8

async def test_middleware_cannot_be_made_to_write_a_forged_log_line(caplog):
    caplog.set_level(logging.INFO, "taskqueue")
    async with serving() as (_, client, _):
        await client.request("GET\nforged", "/x%0A2030-01-01%20forged", headers={"X-Request-ID": "a\nforged"})
    [line] = [record.getMessage() for record in caplog.records if "forged" in record.getMessage()]
    assert re.fullmatch(r"\[[0-9a-f]{16}\] OTHER '/x\\n2030-01-01 forged' 404 \d+\.\d ms", line)

def parse_prometheus(text):
    """A strict little reader of the text format 0.0.4: the samples of a metric follow its TYPE line, in one group."""
    family, families, samples = None, [], {}
    for line in text.removesuffix("\n").split("\n"):
        if declared := re.fullmatch(r"# TYPE (\w+) (?:counter|gauge|histogram)", line):
            families.append(family := declared[1])
        else:
            name, value = re.fullmatch(r'(\w+(?:\{(?:\w+="[^"\\\n]*",?)+\})?) (\S+)', line).groups()
            assert re.sub("_(bucket|sum|count)$", "", name.partition("{")[0]) == family
            assert name not in samples
            samples[name] = float(value)
    assert len(families) == len(set(families))
    return samples

async def test_metrics_count_requests_by_status_and_by_time(gate, monkeypatch):
    async def slow():
        clock.append(clock[-1] + 0.2)

    clock = [100.0]
    monkeypatch.setattr(taskqueue.time, "perf_counter", lambda: clock[-1])
    async with serving(gate) as (app, client, queue):
        queue.submit(order(delay=9))
        app.add_api_route("/slow", slow)
        for path in ("/slow", "/slow", "/health", "/tasks/x"):
            await client.get(path)
        numbers = (await client.get("/metrics", headers={"Accept": "application/json, text/plain, */*"})).json()
        texts = [await client.get("/metrics", headers={"Accept": accept}) for accept in (
            "text/plain", "application/openmetrics-text;version=1.0.0;q=0.9,*/*;q=0.1")]
    assert (numbers["total_requests"], numbers["avg_duration_ms"]) == (4, 100.0)
    assert numbers["status_counts"] == {"200": 3, "404": 1}
    assert numbers["routes"]["GET /slow"] == {"count": 2, "avg_duration_ms": 200.0, "up_to_seconds": {"0.25": 2}}
    for text in texts:
        samples = parse_prometheus(text.text)
        assert text.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert samples['taskqueue_http_requests_total{method="GET",route="/tasks/{task_id}",status="404"}'] == 1
        buckets = [value for name, value in samples.items() if "_bucket" in name and 'route="/slow"' in name]
        assert buckets == [0] * 7 + [2] * 5  # each holds what the smaller ones hold, too
        assert (samples['taskqueue_tasks{status="pending"}'], samples["taskqueue_submitted_total"]) == (1, 1)

def test_metrics_are_written_for_prometheus_line_by_line():
    metrics, labels = taskqueue.Metrics(), 'method="GET",route="/x"'
    for seconds in (0.001, 0.0011, 0.3, 2.5, 9):
        metrics.record(("GET", "/x"), 200 if seconds < 9 else 404, seconds)
    buckets = {"0.001": 1, "0.0025": 2, "0.005": 2, "0.01": 2, "0.025": 2, "0.05": 2, "0.1": 2, "0.25": 2, "0.5": 3,
               "1.0": 3, "2.5": 4, "+Inf": 5}
    assert list(metrics.as_prometheus()) == [
        "# TYPE taskqueue_http_requests_total counter",
        f'taskqueue_http_requests_total{{{labels},status="200"}} 4',
        f'taskqueue_http_requests_total{{{labels},status="404"}} 1',
        "# TYPE taskqueue_http_request_seconds histogram",
        *(f'taskqueue_http_request_seconds_bucket{{{labels},le="{le}"}} {n}' for le, n in buckets.items()),
        f"taskqueue_http_request_seconds_sum{{{labels}}} 11.802100",
        f"taskqueue_http_request_seconds_count{{{labels}}} 5"]

def test_metrics_give_averages_to_the_microsecond():
    metrics = taskqueue.Metrics()
    metrics.record(("GET", "/x"), 200, 1 / 3000)
    numbers = metrics.as_json()
    assert numbers["avg_duration_ms"] == numbers["routes"]["GET /x"]["avg_duration_ms"] == 0.333

async def test_metrics_count_each_known_method_by_its_name():
    known = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
    async with serving() as (_, client, _):
        for method in [*known, "TRACE", "get"]:
            await client.send(client.build_request(method, "/nothing"))
        routes = (await client.get("/metrics")).json()["routes"]
    assert list(routes) == [f"{method} (other)" for method in [*known, "OTHER"]]

async def test_metrics_raw_path_labels_are_not_used():
    """GOTCHA [raw-path-labels]: whatever a scanner tries, it makes no new series."""
    async with serving() as (_, client, _):
        for number in range(3):
            await client.get(f"/tasks/{number}")
            await client.get(f"/admin/{number}")
            await client.request(f"BREW{number}", "/admin")
        assert set((await client.get("/metrics")).json()["routes"]) == {
            "GET /tasks/{task_id}", "GET (other)", "OTHER (other)"}

async def test_metrics_stream_latency_ends_with_the_first_byte(gate, monkeypatch):
    """GOTCHA [stream-latency]: this stream is watched for an hour, and has taken no time."""
    async with serving(gate) as (app, client, queue):
        monkeypatch.setattr(taskqueue.time, "perf_counter", now)
        async with Stream(app, f"/tasks/{queue.submit(order(delay=9000)).id}/stream") as stream:
            await stream.next()
            await asyncio.sleep(3600)
        counted = (await client.get("/metrics")).json()["routes"]["GET /tasks/{task_id}/stream"]
        assert (counted["count"], counted["avg_duration_ms"]) == (1, pytest.approx(0, abs=1))

async def test_middleware_unhandled_is_500_and_counted(caplog):
    """GOTCHA [unhandled-is-500]: the client gets JSON, and the id under which the traceback is in the log."""
    async def broken():
        raise RuntimeError("a bug")

    async with serving() as (app, client, _):
        app.add_api_route("/broken", broken)
        answer = await client.get("/broken")
        assert (answer.status_code, answer.json()) == (500, {"detail": "Internal Server Error"})
        assert f"[{answer.headers['X-Request-ID']}] unhandled exception" in caplog.text
        assert (await client.get("/metrics")).json()["routes"]["GET /broken"]["count"] == 1

async def test_middleware_unhandled_is_500_only_before_the_response_has_begun():
    """GOTCHA [unhandled-is-500]: after that, the server has to learn of it, and to cut the connection."""
    async def broken(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})
        raise RuntimeError("a bug")

    async def send(message):
        sent.append((message["type"], message["status"]))

    sent, scope = [], {"type": "http", "method": "GET", "path": "/", "headers": []}
    with pytest.raises(RuntimeError, match="a bug"):
        await taskqueue.RequestMiddleware(broken, taskqueue.Metrics(), max_body=9)(scope, None, send)
    assert sent == [("http.response.start", 200)]

async def test_middleware_base_http_middleware_is_not_in_the_way():
    """GOTCHA [base-http-middleware]: a route runs in the very asyncio task in which the server calls the app."""
    async def which_task():
        seen.append(asyncio.current_task())

    seen = []
    async with serving() as (app, client, _):
        app.add_api_route("/which", which_task)
        await client.get("/which")
    assert seen == [asyncio.current_task()]

# ===== Page ===========================================================================================================
# How it looks is for the eye, and for a browser. This must be so in any case:

async def test_page_is_html_and_builds_none_out_of_data():
    async with serving() as (_, client, _):
        answer = await client.get("/")
        assert (answer.headers["Content-Type"], "<title>" in answer.text) == ("text/html; charset=utf-8", True)
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", answer.text)

async def test_page_runs_only_the_script_and_the_style_that_its_policy_names():
    async with serving() as (_, client, _):
        answer = await client.get("/")
    policy = answer.headers["Content-Security-Policy"]
    for kind in ("style", "script"):
        [text] = re.findall(f"<{kind}>(.*)</{kind}>", answer.text, re.DOTALL)
        assert f"{kind}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in policy
    assert "default-src 'none'" in policy

# ===== Routes =========================================================================================================
# The contract, call by call: what goes well, and what is refused. Then the streams.

async def test_routes_submit_answers_202_with_the_task_and_its_place(gate):
    async with serving(gate) as (_, client, _):
        answer = await client.post("/tasks", json={"task_type": "send_email", "payload": {"more": [1]}, "priority": 1})
        task = answer.json()
        assert (answer.status_code, answer.headers["Location"]) == (202, f"/tasks/{task['id']}")
        assert (task["status"], task["priority"], task["payload"]) == ("pending", 1, {"more": [1]})
        assert {"task_type", "progress", "attempt", "max_retries", "result", "error", "request_id", "created_at",
                "started_at", "completed_at"} <= set(task)
        assert datetime.fromisoformat(task["created_at"]).tzinfo == UTC

@pytest.mark.parametrize("status", Status)
async def test_routes_get_shows_a_task_in_every_state(status, gate):
    async with serving(gate) as (_, client, queue):
        answer = await client.get(f"/tasks/{await bring_to(status, queue, gate)}")
        task = answer.json()
        assert (answer.status_code, task["status"], bool(task["completed_at"])) == (200, status, status in FINAL)
        assert (task["result"], task["error"]) == {
            "completed": ("done", None), "failed": (None, "ValueError: broken")}.get(status, (None, None))

@pytest.mark.parametrize(("status", "force", "code", "detail"), [
    ("pending", False, 200, "Task cancelled"), ("pending", True, 200, "Task cancelled"),
    ("running", False, 409, ".* is running: .*"), ("running", True, 202, "Cancellation requested"),
    ("completed", False, 409, ".* is completed: .*"), ("completed", True, 409, ".* is completed: .*"),
    ("failed", True, 409, ".* is failed: .*"), ("cancelled", True, 409, ".* is cancelled: .*")])
async def test_routes_delete_cancels_what_may_be_cancelled(status, force, code, detail, gate):
    async with serving(gate) as (_, client, queue):
        task_id = await bring_to(status, queue, gate)
        before = queue.get_task(task_id)
        answer = await client.delete(f"/tasks/{task_id}", params={"force": True} if force else {})
        assert (answer.status_code, bool(re.fullmatch(detail, answer.json()["detail"]))) == (code, True)
        assert answer.json().get("task_id") == (None if code == 409 else task_id)
        assert queue.get_task(task_id).status == ("cancelled" if code == 200 else status)
        await quiet()
        assert queue.get_task(task_id).status == (status if code == 409 else "cancelled")
        assert code != 409 or queue.get_task(task_id) == before

async def test_routes_list_filters_and_pages(gate):
    async with serving(gate, max_workers=1) as (_, client, queue):
        ids = [queue.submit(order(str(number))).id for number in range(5)][::-1]
        await quiet()
        assert [task["id"] for task in (await client.get("/tasks")).json()["tasks"]] == ids
        answer = (await client.get("/tasks?status=pending&limit=2&offset=1")).json()
        assert ([task["id"] for task in answer["tasks"]], answer["total"]) == (ids[1:3], 4)
        assert (await client.get("/tasks?status=failed&limit=1000")).json() == {"tasks": [], "total": 0}

async def test_routes_list_shows_the_latest_100_unless_it_is_told_otherwise(gate):
    async with serving(gate) as (_, client, queue):
        ids = [queue.submit(order(delay=9)).id for _ in range(102)][::-1]
        answer = (await client.get("/tasks")).json()
        assert ([task["id"] for task in answer["tasks"]], answer["total"]) == (ids[:100], 102)
        assert [task.id for task in queue.list_tasks()[0]] == ids[:100]

@pytest.mark.parametrize(("call", "headers", "place"), [
    *((f"GET /tasks?{query}", {}, ["query", query.split("=")[0]]) for query in (
        "limit=0", "limit=1001", "limit=x", f"limit={10**4000}", "offset=-1", "offset=x", "status=x", "status=%ED%A0")),
    *(("POST /tasks", {"Idempotency-Key": key}, ["header", "idempotency-key"]) for key in ("", "x" * 256)),
    *(("POST /tasks", {"Content-Type": kind}, ["body"]) for kind in ("text/plain", "multipart/form-data"))])
async def test_routes_refuse_a_bad_query_or_header_with_its_place(call, headers, place):
    async with serving() as (_, client, _):
        headers = {"Content-Type": "application/json", **headers}
        answer = await client.request(*call.split(), content=b'{"task_type": "send_email"}', headers=headers)
        assert (answer.status_code, strict_json(answer.text)["detail"][0]["loc"]) == (422, place)

@pytest.mark.parametrize("call", ["GET /tasks/x", "GET /tasks/x/stream", "DELETE /tasks/x", "GET /tasks/%00", "GET /x"])
async def test_routes_404_after_200_cannot_happen(call):
    """GOTCHA [404-after-200]: an unknown id is a 404 with a JSON detail, on the streams too."""
    async with serving() as (_, client, _):
        answer = await client.request(*call.split())
        assert (answer.status_code, type(answer.json()["detail"])) == (404, str)

async def test_routes_await_put_is_not_how_a_full_queue_answers(gate):
    """GOTCHA [await-put]: it says no, and at once."""
    async with serving(gate, max_pending=1) as (_, client, queue):
        queue.submit(order(delay=60))
        async with asyncio.timeout(5):
            answer = await client.post("/tasks", json={"task_type": "send_email"})
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
        assert "waiting" in answer.json()["detail"]

async def test_routes_idempotency_key_makes_one_task_even_when_the_queue_is_full(gate):
    async with serving(gate, max_pending=1) as (_, client, queue):
        answers = []
        for key, body in [("k", {}), ("k", {"priority": 5}), ("k", {"priority": 1}), ("another", {})]:
            body |= {"task_type": "send_email", "delay": 9}
            answers.append(await client.post("/tasks", json=body, headers={"Idempotency-Key": key}))
        assert [answer.status_code for answer in answers] == [202, 202, 422, 503]
        assert (answers[0].json()["id"], queue.submitted) == (answers[1].json()["id"], 1)
        [problem] = answers[2].json()["detail"]
        assert ("another" in problem.pop("msg"), problem) == (
            True, {"type": "value_error", "loc": ["header", "Idempotency-Key"]})

def submission(value, fields=""):
    return f'{{"task_type": "send_email", "payload": {{"x": {value}}} {fields}}}'.encode()

HOSTILE = {
    "nan": submission("NaN"), "infinity": submission("[-Infinity]"), "1e400": submission("1e400"),
    "surrogate": submission(r'"\ud800"'), "surrogate key": submission(r'{"\udfff": 1}'), "cut short": submission('"'),
    "deep": submission(deep(300)), "very deep": submission(deep(50_000)), "null byte": submission("\0"),
    "long int": submission("9" * 5000), "nan priority": submission(1, ', "priority": NaN'),
    "true priority": submission(1, ', "priority": true'), "float priority": submission(1, ', "priority": 1.0'),
    "deep priority": submission(1, f', "priority": {deep(300)}'), "huge priority": submission(1, ', "priority": 1e400'),
    "huge timeout": submission(1, ', "timeout": 1e400'), "surrogate type": submission(1, r', "task_type": "\ud800"'),
    "surrogate in unknown": submission(1, r', "x": "\ud800"'), "surrogate unknown": submission(1, r', "\ud800": 1'),
    "deep unknown": submission(1, f', "x": {deep(300)}'), "no json": b"task_type=send_email", "empty": b"",
    "null": b"null", "array": b"[]", "string": b'"x"', "bare nan": b"NaN", "bare surrogate": rb'"\ud800"',
    "not utf-8": b'{"task_type": "\xff"}'}

@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
async def test_routes_echoed_input_and_hostile_bodies_break_nothing(body):
    """GOTCHA [echoed-input]: the refusal is JSON, and so is every later answer."""
    async with serving() as (_, client, queue):
        answer = await client.post("/tasks", content=body, headers={"Content-Type": "application/json"})
        assert (answer.is_client_error, queue.submitted, "X-Request-ID" in answer.headers) == (True, 0, True)
        assert strict_json(answer.text)["detail"]
        for path in ("/tasks", "/metrics", "/health", "/openapi.json"):
            strict_json((await client.get(path)).text)

async def test_routes_echoed_input_in_a_reason_is_made_to_fit_and_20_reasons_are_enough():
    """GOTCHA [echoed-input]: a validator of a payload may quote what it refuses."""
    async def refuse():
        raise RequestValidationError([{"type": "picky", "loc": ("body", "x"), "msg": "no \ud800é", "input": 1}] * 30)

    async with serving() as (app, client, _):
        app.add_api_route("/picky", refuse)
        answer = await client.get("/picky")
    assert (answer.status_code, answer.headers["Content-Type"]) == (422, "application/json")
    assert answer.json() == {"detail": [{"type": "picky", "loc": ["body", "x"], "msg": "no ?é"}] * 20}

@pytest.mark.parametrize("value", [deep(64), deep(150), r'"\u0000 \ud83d\ude00"', "1" + "0" * 400, "-0.0", '{"": {}}'])
async def test_routes_take_an_unusual_body_that_is_fine(value, gate):
    async with serving(gate) as (_, client, _):
        answer = await client.post("/tasks", content=submission(value), headers={"Content-Type": "application/json"})
        assert answer.status_code == 202
        await quiet()
        assert strict_json((await client.get("/tasks")).text)["tasks"][0]["payload"] == {"x": json.loads(value)}
        assert list(gate.held) == ["Hello"]  # the handler has it, too

@pytest.mark.parametrize("chunked", [False, True])
async def test_routes_refuse_a_body_over_the_limit(chunked, gate):
    async def chunks():
        for _ in range(20):
            yield b" " * 5000

    async with serving(gate) as (_, client, _):
        answer = await client.post("/tasks", content=chunks() if chunked else b" " * 65_537)
        assert (answer.status_code, "65536 bytes" in answer.json()["detail"]) == (413, True)
        just_fits = submission(1).ljust(65_536)
        assert (await client.post("/tasks", content=just_fits, headers={"Content-Type": "application/json"})).is_success

DOCUMENTED = {
    "post /tasks": {"202 application/json TaskStatus", "400 application/json Problem", "413 application/json Problem",
                    "422 application/json HTTPValidationError", "503 application/json Problem"},
    "get /tasks": {"200 application/json TaskList", "422 application/json HTTPValidationError"},
    "get /tasks/{task_id}": {"200 application/json TaskStatus", "404 application/json Problem"},
    "delete /tasks/{task_id}": {"200 application/json object", "202 application/json object",
                                "404 application/json Problem", "409 application/json Problem",
                                "422 application/json HTTPValidationError"},
    "get /tasks/{task_id}/stream": {"200 text/event-stream", "204", "404 application/json Problem"},
    "get /events": {"200 text/event-stream"},
    "get /health": {"200 application/json object", "503 application/json object"},
    "get /metrics": {"200 application/json", "200 text/plain string"}}

@pytest.mark.parametrize("call", DOCUMENTED)
async def test_routes_document_every_answer_that_they_give(call):
    """With its media type and its model: clients are generated from it."""
    method, path = call.split()
    async with serving() as (_, client, _):
        responses = (await client.get("/openapi.json")).json()["paths"][path][method]["responses"]
    documented = set()
    for status in {answer.split()[0] for answer in DOCUMENTED[call]}:
        for media_type, content in responses[status].get("content", {"": {}}).items():
            schema = content.get("schema", {})
            model = schema.get("$ref", "").removeprefix("#/components/schemas/") or schema.get("type", "")
            documented.add(f"{status} {media_type} {model}".strip())
    assert documented == DOCUMENTED[call]

async def test_routes_document_themselves_for_people_and_programs():
    async with serving() as (_, client, _):
        paths = (await client.get("/openapi.json")).json()["paths"]
        assert "swagger" in (await client.get("/docs")).text
    full = paths["/tasks"]["post"]["responses"]["503"]
    assert full["headers"] == {"Retry-After": {"schema": {"type": "integer"}}}
    assert "/" not in paths  # the page is no part of the API

async def test_routes_health_gives_the_queue_in_numbers(gate):
    async with serving(gate, keep_finished=0) as (app, client, queue):
        await bring_to("running", queue, gate)
        queue.cancel(queue.submit(order(delay=9)).id)
        async with Stream(app, "/events") as stream:
            await stream.next()
            numbers = (await client.get("/health")).json()
            assert (await client.get("/metrics")).json()["queue"].items() <= numbers.items()
    tasks = {"pending": 0, "running": 1, "completed": 0, "failed": 0, "cancelled": 0}
    shown = {"status": "healthy", "pid": os.getpid(), "life": queue.first_version, "workers": 3, "watchers": 1,
             "submitted": 2, "evicted": 1, "tasks": tasks}
    assert shown.items() <= numbers.items()

async def test_stream_sends_each_change_live_and_ends_with_the_result(gate):
    async with serving(gate, max_workers=1) as (app, _, queue):
        queue.submit(order("before"))
        async with Stream(app, f"/tasks/{queue.submit(order()).id}/stream") as stream:
            frames = [await stream.next()]
            gate.let_go("before")
            frames.append(await stream.next())
            for percent in (10, 20, 30):
                gate.report["it"](percent)
                frames.append(await stream.next())
            gate.let_go("it", {"n": 1})
            frames += await stream.rest()
    running = [{"status": "running", "progress": percent, "attempt": 1} for percent in (0, 10, 20, 30)]
    assert [frame["data"] for frame in frames] == [
        {"status": "pending", "progress": 0, "attempt": 0}, *running,
        {"status": "completed", "progress": 100, "attempt": 1, "result": {"n": 1}}]
    ids = [int(frame["id"]) for frame in frames]
    assert (ids, {frame["event"] for frame in frames}) == (sorted(set(ids)), {"progress"})
    assert stream.headers["Content-Type"].startswith("text/event-stream")

async def test_stream_shows_a_retry_as_a_new_attempt_and_one_end_with_the_error(gate):
    async with serving(gate, backoff_base=0) as (app, _, queue):
        task = queue.submit(order(max_retries=1))
        async with Stream(app, f"/tasks/{task.id}/stream") as stream:
            for _ in range(2):
                await quiet()
                gate.report["it"](40)
                gate.let_go("it", ValueError("broken"))
            frames = [frame["data"] for frame in await stream.rest()]
    assert frames[-1] == {"status": "failed", "progress": 40, "attempt": 2, "error": "ValueError: broken"}
    assert [frame["status"] for frame in frames].count("failed") == 1
    places = [(frame["attempt"], frame["progress"]) for frame in frames]
    assert places == sorted(places)

@pytest.mark.parametrize("last_event_id", ["", "junk", "-1", "0x1", "²", "1e3", "9" * 19, "9" * 5000])
async def test_stream_of_a_finished_task_sends_its_end_whatever_the_last_event_id(last_event_id, gate):
    async with streaming(gate, "completed", last_event_id=last_event_id) as (_, stream):
        assert [frame["data"]["status"] for frame in await stream.rest()] == ["completed"]

async def test_stream_reconnect_for_ever_is_stopped_with_204(gate):
    """GOTCHA [reconnect-for-ever]: it comes back with the id of the last frame. With one before, it gets that frame."""
    async with serving(gate) as (_, client, queue):
        task_id = await bring_to("failed", queue, gate)
        last = queue.get_task(task_id).version
        for last_event_id, code, frames in (last, 204, 0), (last - 1, 200, 1):
            answer = await client.get(f"/tasks/{task_id}/stream", headers={"Last-Event-ID": str(last_event_id)})
            assert (answer.status_code, answer.text.count("data: ")) == (code, frames)

async def test_stream_last_event_id_of_a_running_task_gets_only_what_is_newer(gate):
    async with serving(gate) as (app, _, queue):
        task_id = await bring_to("running", queue, gate)
        async with Stream(app, f"/tasks/{task_id}/stream", str(queue.get_task(task_id).version)) as stream:
            await quiet()
            gate.let_go("it")
            assert [frame["data"]["status"] for frame in await stream.rest()] == ["completed"]

async def test_stream_slow_reader_gets_the_latest_state_and_no_backlog(gate):
    """GOTCHA [slow-reader]: it gets what was on its way already, and then how things stand now."""
    async with streaming(gate, "running") as (_, stream):
        await stream.next()
        stream.reading.clear()
        for percent in range(1, 51):
            gate.report["it"](percent)
            await quiet()
        stream.reading.set()
        assert [frame["data"]["progress"] for frame in await stream.take(2)] == [1, 50]
        gate.let_go("it")
        assert [frame["data"]["progress"] for frame in await stream.rest()] == [100]

async def test_stream_drops_a_reader_that_has_stopped_reading(gate, caplog):
    async with streaming(gate, "running", send_timeout=7) as (queue, stream):
        await stream.next()
        stream.reading.clear()
        gate.report["it"](50)
        await asyncio.sleep(6.9)
        assert queue.watchers == 1
        await asyncio.sleep(0.2)
        assert (queue.watchers, stream.call.done(), "stopped reading" in caplog.text) == (0, True, True)

@pytest.mark.parametrize("path", ["/tasks/{}/stream", "/events"])
async def test_stream_forgets_a_watcher_that_hangs_up(path, gate):
    async with serving(gate) as (app, _, queue):
        task_id = await bring_to("running", queue, gate)
        for _ in range(9):
            async with Stream(app, path.format(task_id)) as stream:
                await stream.next()
                assert queue.watchers == 1
            assert queue.watchers == 0
        gate.let_go("it")
        await quiet()
        assert queue._events == {}

@pytest.mark.parametrize("path", ["/tasks/{}/stream", "/events"])
async def test_stream_never_entered_leaves_nothing_behind(path, gate):
    """GOTCHA [never-entered]: the client has gone before the response began."""
    async with serving(gate) as (app, _, queue):
        async with Stream(app, path.format(queue.submit(order()).id)) as stream:
            stream.reading.clear()
            await quiet()
        assert (queue.watchers, stream.messages.empty()) == (0, True)

async def test_stream_404_after_200_cannot_come_from_an_eviction_either(gate):
    """GOTCHA [404-after-200]: the task was there for the route, and is gone when the response begins."""
    async with streaming(gate, "running", keep_finished=0) as (queue, stream):
        stream.reading.clear()
        await quiet()
        gate.let_go("it")
        await quiet()
        assert queue.evicted == 1
        stream.reading.set()
        assert [frame["data"]["status"] for frame in await stream.rest()] == ["completed"]

async def test_stream_keeps_an_idle_connection_alive_with_comments(gate):
    async with streaming(gate, "running", ping_seconds=4) as (_, stream):
        await stream.next()
        assert list(await stream.next()) == [""]  # a line that begins with a colon, for nobody
        assert now() == pytest.approx(4, abs=0.001)

async def test_stream_ignores_a_body_that_nobody_asked_for(gate):
    async with serving(gate) as (app, _, _), Stream(app, "/events", body=b" " * 100_000) as stream:
        assert (await stream.next())["event"] == "queue"

async def test_stream_says_goodbye_to_a_reader_that_has_seen_everything(gate):
    async with serving(gate) as (app, _, queue):
        task_id = await bring_to("running", queue, gate)
        async with Stream(app, f"/tasks/{task_id}/stream", str(queue.get_task(task_id).version)) as stream:
            await quiet()
            queue.begin_shutdown()
            assert [frame["event"] for frame in await stream.rest()] == ["shutdown"]

@pytest.mark.parametrize("path", ["/tasks/{}/stream", "/events"])
async def test_stream_shutdown_order_lets_streams_say_goodbye_first(path, gate, monkeypatch):
    """GOTCHA [shutdown-order]: the server was told to stop, and waits for the streams. The lifespan still runs."""
    async with streaming(gate, "running", path) as (_, stream):
        await stream.next()
        monkeypatch.setattr(AppStatus, "should_exit", True)  # as sse-starlette does on the server's signal
        assert [frame["event"] for frame in await stream.rest()][-1] == "shutdown"

async def test_stream_shutdown_order_does_not_wait_for_a_reader_that_has_stopped_reading(gate, monkeypatch):
    """GOTCHA [shutdown-order]: it has two seconds for the goodbye, from when the signal is noticed."""
    async with streaming(gate, "running", send_timeout=60) as (_, stream):
        await stream.next()
        stream.reading.clear()
        monkeypatch.setattr(AppStatus, "should_exit", True)
        await asyncio.sleep(1.9)
        assert not stream.call.done()
        await asyncio.sleep(0.8)
        assert stream.call.done()

async def test_events_six_connections_are_not_needed_to_watch_many_tasks(gate):
    """GOTCHA [six-connections]: one stream follows them all, live."""
    async with serving(gate, max_workers=10) as (app, _, queue), Stream(app, "/events") as stream:
        assert (await stream.next())["event"] == "queue"  # there are no tasks yet
        ids, completed = {queue.submit(order(str(number))).id for number in range(10)}, set()
        await gate.let_all_go()
        while completed != ids:
            frame = await stream.next()
            if frame["data"].get("status") == "completed":
                completed.add(frame["data"]["id"])

async def test_events_begin_with_the_latest_tasks_oldest_first_and_without_payload(gate):
    async with serving(gate) as (app, _, queue):
        tasks = [queue.submit(order(delay=60)) for _ in range(130)]
        async with Stream(app, "/events") as stream:
            *frames, counts = await stream.take(101)
    assert [(frame["event"], frame["id"]) for frame in frames] == [("task", str(task.version)) for task in tasks[30:]]
    assert set(frames[0]["data"]) == set(taskqueue.TaskStatus.model_fields) - {"payload", "version"}
    assert (counts["event"], counts["data"]["tasks"]["pending"]) == ("queue", 130)

@pytest.mark.parametrize(("last_event_id", "missed"), [
    (lambda queue, tasks: tasks[2].version, 2), (lambda queue, tasks: tasks[4].version, 0),
    (lambda queue, tasks: tasks[4].version + 1, 3), (lambda queue, tasks: queue.first_version, 3)],
    ids=["of an earlier change", "of the latest change", "from the future", "of no change"])
async def test_events_resume_after_the_last_event_id_or_begin_anew_if_it_is_junk(
        last_event_id, missed, gate, monkeypatch):
    monkeypatch.setattr(TaskQueue, "SNAPSHOT", 3)
    async with serving(gate) as (app, _, queue):
        tasks = [queue.submit(order(str(number), delay=60)) for number in range(5)]
        async with Stream(app, "/events", str(last_event_id(queue, tasks))) as stream:
            *frames, counts = await stream.take(missed + 1)
    assert [frame["data"]["id"] for frame in frames] == [task.id for task in tasks[5 - missed :]]
    assert counts["event"] == "queue"

async def test_events_slow_reader_gets_each_task_in_its_latest_state(gate):
    """GOTCHA [slow-reader]: it gets what was on its way already, and then each task once."""
    async with serving(gate) as (app, _, queue), Stream(app, "/events") as stream:
        await stream.next()
        stream.reading.clear()
        ids = [queue.submit(order(str(number))).id for number in range(3)]
        for percent in range(1, 51):
            await quiet()
            for name in gate.held:
                gate.report[name](percent)
        await quiet()
        stream.reading.set()
        frames = await stream.take(8)  # the three as submitted, the counts; the same again as they are now
    latest = [(frame["data"]["id"], frame["data"]["progress"]) for frame in frames[4:7]]
    assert latest == [(task_id, 50) for task_id in ids]

# ===== App ============================================================================================================
# Apps side by side, what an import does, and what the file says about itself.

async def test_app_has_a_queue_and_metrics_of_its_own(gate):
    async with serving(gate) as (_, first, _), serving(gate) as (_, second, _):
        await first.post("/tasks", json={"task_type": "send_email"})
        assert [(await client.get("/tasks")).json()["total"] for client in (first, second)] == [1, 0]
        assert [(await client.get("/metrics")).json()["total_requests"] for client in (first, second)] == [2, 1]

@pytest.mark.parametrize(("arguments", "concurrency"), [(["--workers", "2"], "1"), (["-w4"], "1"), ([], "2")])
async def test_app_says_that_more_processes_are_more_queues(arguments, concurrency, monkeypatch, caplog):
    monkeypatch.setattr(sys, "argv", ["uvicorn", "taskqueue:app", *arguments])
    monkeypatch.setenv("WEB_CONCURRENCY", concurrency)
    async with serving():
        assert "more than one process" in caplog.text

def test_app_import_starts_nothing_and_prints_nothing():
    check = "import logging, threading, taskqueue; print(threading.active_count(), logging.root.handlers)"
    ran = subprocess.run([sys.executable, "-c", check], cwd=HERE, capture_output=True, text=True, timeout=30)
    assert (ran.stdout, ran.stderr) == ("1 []\n", "")

def test_app_inline_metadata_equals_the_requirements():
    """The block of comments by which `uv run taskqueue.py` knows what to install (PEP 723)."""
    source = (HERE / "taskqueue.py").read_text(encoding="utf-8")
    block = re.search(r"^# /// script\n((?:#(?: .*)?\n)+?)# ///$", source, re.MULTILINE)[1]
    metadata = tomllib.loads(re.sub("^# ?", "", block, flags=re.MULTILINE))
    assert metadata["dependencies"] == (HERE / "requirements.txt").read_text(encoding="utf-8").split()
    assert metadata["requires-python"] == ">=3.11"

# ===== Demo ===========================================================================================================
# A real server, in a process of its own: signals, sockets and sse-starlette's AppStatus belong to a whole process.

@contextlib.contextmanager
def demo(*arguments):
    """`python taskqueue.py …`, and a client of it. It is killed in the end, and after 30 seconds in any case."""
    process = subprocess.Popen([sys.executable, "taskqueue.py", "--port", "0", *arguments], cwd=HERE, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")
    deadline = threading.Timer(30, process.kill)
    deadline.start()
    try:
        url = re.search(r"http://\S+:\d+", process.stdout.readline())[0]
        with httpx.Client(base_url=url, timeout=10) as client:
            yield process, client
    finally:
        deadline.cancel()
        process.kill()
        process.communicate()

@contextlib.contextmanager
def watching(client, task_type):
    """The lines of the stream of a task that runs, and will for long."""
    task = client.post("/tasks", json={"task_type": task_type}).json()
    with client.stream("GET", f"/tasks/{task['id']}/stream") as stream:
        lines = stream.iter_lines()
        while "running" not in next(lines):
            pass
        yield lines

def end(process):
    """Wait for its end; return its exit status, and what is alarming in its output."""
    output, _ = process.communicate(timeout=20)
    return process.returncode, re.findall("Traceback|ERROR|CRITICAL", output)

@posix_only
@pytest.mark.parametrize("task_type", ["resize_image", "generate_report"])  # the latter in a thread that can't stop
def test_demo_ctrl_c_ends_open_streams_cleanly_and_then_itself(task_type):
    with demo("--no-tour", "--pace", "1000", "--drain-seconds", "0") as (process, client):
        with watching(client, task_type) as lines, client.stream("GET", "/events") as events:
            process.send_signal(signal.SIGINT)
            assert "event: shutdown" in list(lines)
            assert "event: shutdown" in list(events.iter_lines())
        assert end(process) == (0, [])

@posix_only
def test_demo_second_ctrl_c_ends_it_at_once():
    with demo("--no-tour", "--pace", "1000", "--drain-seconds", "600") as (process, client):
        with watching(client, "resize_image") as lines:
            process.send_signal(signal.SIGINT)
            list(lines)  # to its end: from here on the server waits for the handler
        process.send_signal(signal.SIGINT)
        assert end(process) == (128 + signal.SIGINT, [])

@posix_only
def test_demo_ctrl_c_does_not_wait_for_a_reader_that_has_stopped_reading():
    with demo("--no-tour", "--pace", "0", "--failure-rate", "0", "--max-body", "2000000") as (process, client):
        for _ in range(8):  # 8 MB of results: more than the buffers on the way can hold
            client.post("/tasks", json={"task_type": "resize_image", "payload": {"url": "x" * 1_000_000}})
        while client.get("/health").json()["tasks"]["completed"] < 8:
            pass
        with socket.create_connection((client.base_url.host, client.base_url.port)) as stalled:
            stalled.sendall(b"GET /events HTTP/1.1\r\nHost: test\r\n\r\n")
            assert stalled.recv(15) == b"HTTP/1.1 200 OK"
            process.send_signal(signal.SIGINT)
            assert end(process) == (0, [])

def run_demo(*arguments):
    ran = subprocess.run([sys.executable, "taskqueue.py", *arguments], cwd=HERE, capture_output=True, timeout=30)
    return ran.returncode, ran.stdout.decode(), ran.stderr.decode()

def test_demo_once_takes_the_tour_and_exits_with_0():
    status, output, errors = run_demo("--once", "--port", "0", "--pace", "0.1")
    assert (status, errors) == (0, "")
    assert ("✓" in output, "✗" in output) == (True, False)

def test_demo_port_in_use_is_one_clear_line_and_exit_1():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        status, output, errors = run_demo("--port", str(taken.getsockname()[1]))
    assert (status, output, errors.count("\n")) == (1, "", 1)
    assert errors.startswith("Can't listen on 127.0.0.1:")

def test_demo_has_a_flag_for_each_setting_and_checks_it(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["taskqueue.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        taskqueue.main()
    flags = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert flags >= {"--" + field.name.replace("_", "-") for field in dataclasses.fields(Settings)}
    assert flags >= {"--host", "--port", "--once", "--no-tour"}
    monkeypatch.setattr(sys, "argv", ["taskqueue.py", "--port", "0", "--max-workers", "0"])
    with pytest.raises(SystemExit, match="2"):
        taskqueue.main()
    assert "max_workers" in capsys.readouterr().err
