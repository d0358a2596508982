"""The proof of taskqueue.py: that it keeps its promises, and that each trap it names is really handled.

The sections are those of the module, in its order, after one with the tools. For each `GOTCHA [slow-reader]` over there
a test here is called `test_…_slow_reader_…`, so `python -m pytest -k slow_reader` runs the proof of that one.

How they wait. A handler stands at a `Gate` until the test lets it go, so nothing here is a race. The event loop has a
virtual clock, so nothing takes long: where it would sleep, it sets its clock forward instead. `await quiet()` returns
once all has happened that can happen without time passing. Only what needs threads runs on the real clock.
"""

import asyncio, contextlib, dataclasses, gc, itertools, json, logging, math, os, pathlib, random, re, selectors, signal
import socket, subprocess, sys, threading, time, tomllib
from datetime import UTC, datetime

import httpx, pytest
from pydantic import BaseModel, ValidationError
from sse_starlette.sse import AppStatus

import taskqueue
from taskqueue import HANDLERS, PAYLOAD_MODELS, TRANSITIONS, IdempotencyKeyReused, IllegalTransition, Metrics, QueueFull
from taskqueue import QueueStopped, Settings, Shelf, Status, TaskNotCancellable, TaskNotFound, TaskQueue, TaskSubmission
from taskqueue import TaskType, backoff_delay, check_json, create_app, describe, process_task

pytestmark = pytest.mark.anyio
HERE = pathlib.Path(__file__).parent

# ======================================================================================================================
# Tools
# A clock that jumps, a handler that waits to be let go, a queue or an app around it, and a reader of live streams.

class JumpingSelector(selectors.DefaultSelector):
    """What an event loop waits with. This one waits for nothing, and adds what it was to wait to the clock."""
    now = 0.0

    def select(self, timeout=None):
        if timeout is None:
            raise RuntimeError("all wait, and no timer is set: this test would hang for ever")
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
posix_only = pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for another process")

@pytest.fixture(autouse=True)
async def nothing_is_left(anyio_backend, monkeypatch):
    """After every test: nothing runs on, nobody watches, and the books of every queue are balanced."""
    stores, made = [], taskqueue.TaskStore.__init__
    monkeypatch.setattr(taskqueue.TaskStore, "__init__", lambda self, settings: made(self, settings) or stores.append(self))
    yield
    left = {task.get_coro().__name__ for task in asyncio.all_tasks() - {asyncio.current_task()}}
    # The first is anyio's, to run this; the second sse-starlette's, one for each event loop until that ends.
    assert left <= {"_call_in_runner_task", "_shutdown_watcher"}
    for store in stores:
        assert (store.watchers, store._waiting) == (0, {})
        assert store.submitted == store.evicted + sum(store.count(status) for status in Status)

async def quiet():
    """Let all happen that can happen now. A timer is due only when nothing else is left to do."""
    await asyncio.sleep(2**-20)

def now():
    return asyncio.get_running_loop().time()

class Gate:
    """A handler in the hands of the test: it logs which tasks start, and holds each until it is let go.

    The subject of the e-mail is the name of a task here: `order("a")` makes the task "a"."""

    def __init__(self):
        self.log = []  # names, in the order in which they started
        self.held = {}  # those that run now: name → the future that ends it
        self.report = {}  # name → its update_progress
        self.most = 0  # that ran at once

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

    def let_go(self, name, outcome=None):
        if isinstance(outcome, BaseException):
            self.held[name].set_exception(outcome)
        else:
            self.held[name].set_result(outcome)

    async def let_all_go(self):
        await quiet()
        while self.held:
            self.let_go(min(self.held))
            await quiet()

def order(name="it", **fields):
    return TaskSubmission(task_type="send_email", payload={"subject": name}, **fields)

def running(handle, **knobs):
    return TaskQueue(Settings(**knobs), {TaskType.SEND_EMAIL: handle})

@contextlib.asynccontextmanager
async def serving(handle=None, **knobs):
    """An app in its lifespan, which httpx doesn't run; a client for it; and its queue."""
    app = create_app(Settings(**knobs), {TaskType.SEND_EMAIL: handle} if handle else HANDLERS)
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
    async with app.router.lifespan_context(app), client:
        yield app, client, app.state.queue

async def until(queue, task_id, condition=lambda state: state.status.is_final):
    """Watch the task until it is so; return its state then."""
    async with asyncio.timeout(100), contextlib.aclosing(queue.watch(task_id)) as states:
        async for state in states:
            if condition(state):
                return state
    return pytest.fail("the watch ended before that")

async def collect(iterator):
    return [item async for item in iterator]

async def bring_to(status, queue, gate):
    """Make the task "it", and bring it to this status; return its id."""
    task_id = queue.submit(order(delay=9 if status is Status.PENDING else 0)).id
    await quiet()
    if status is Status.COMPLETED:
        gate.let_go("it", "done")
    if status is Status.FAILED:
        gate.let_go("it", ValueError("broken"))
    if status is Status.CANCELLED:
        queue.cancel(task_id, force=True)
    await quiet()
    assert queue.get_task(task_id).status is status
    return task_id

def strict_json(text):
    """Parse JSON as a browser would: no NaN, no Infinity."""
    return json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))

class Stream:
    """A client of one live stream, on the bare ASGI interface: httpx would wait for the end.

    It reads frame by frame; it stops reading while `reading` is not set, and hangs up at the end of its block."""

    def __init__(self, app, path, last_event_id="", body=b""):
        self.app, self.body, self.text, self.messages = app, body, "", asyncio.Queue()
        self.scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "path": path,
                      "raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http",
                      "server": ("test", 80), "client": ("test", 1), "headers": [(b"last-event-id", last_event_id.encode())]}
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
        """The next frame, as a dict; or None at the clean end of the response."""
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

    async def rest(self):
        return [frame async for frame in self]

    def __aiter__(self):
        return self

    async def __anext__(self):
        if (frame := await self.next()) is None:
            raise StopAsyncIteration
        return frame

# ======================================================================================================================
# Settings
# What can be turned, and how far.

def test_settings_have_the_defaults_of_the_contract():
    assert dataclasses.asdict(Settings()) == {
        "max_workers": 3, "max_pending": 1000, "keep_finished": 1000, "drain_seconds": 5, "backoff_base": 0.5,
        "backoff_cap": 30, "send_timeout": 10, "ping_seconds": 15, "max_body": 65536, "failure_rate": 0.1, "pace": 1}

def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().max_workers = 4

@pytest.mark.parametrize("knob", [{"max_workers": 0}, {"max_pending": 0}, {"keep_finished": -1}, {"drain_seconds": -1},
                                  {"send_timeout": 0}, {"failure_rate": 1.1}, {"pace": math.nan}], ids=str)
def test_settings_out_of_range_are_refused(knob):
    with pytest.raises(ValidationError):
        Settings(**knob)

# ======================================================================================================================
# Models
# What is let in. What HTTP makes of a refusal stands under Routes.

def test_submission_has_the_defaults_of_the_contract():
    assert TaskSubmission(task_type="send_email").model_dump() == {
        "task_type": "send_email", "payload": {}, "priority": 5, "max_retries": 0, "timeout": 60, "delay": 0}

def test_submission_takes_each_bound():
    order(priority=1, max_retries=10, timeout=3600, delay=86400)
    order(priority=10, max_retries=0, timeout=0.001, delay=0)

@pytest.mark.parametrize("fields", [
    {"task_type": "bake_cake"}, {"priority": True}, {"priority": "1"}, {"priority": 1.0}, {"priority": 2},
    {"priority": 10**40}, {"priority": None}, {"max_retries": -1}, {"max_retries": 11}, {"max_retries": True},
    {"max_retries": 1.5}, {"timeout": 0}, {"timeout": 3601}, {"timeout": "60"}, {"timeout": True}, {"timeout": math.nan},
    {"delay": -1}, {"delay": 86401}, {"delay": math.inf}, {"colour": "red"}, {"payload": []}, {"payload": None},
    {"payload": {"subject": 5}}, {"payload": {"to": None}}, {"payload": {"extra": math.nan}}], ids=str)
def test_submission_refuses(fields):
    with pytest.raises(ValidationError):
        TaskSubmission.model_validate({"task_type": "send_email", **fields})

def test_submission_keeps_the_payload_as_it_was_sent():
    payload = {"width": 5, "note": {"further": ["keys", None]}}
    assert TaskSubmission(task_type="resize_image", payload=payload).payload == payload

@pytest.mark.parametrize("task_type", TaskType)
def test_every_task_type_has_a_handler_and_takes_an_empty_payload(task_type):
    assert task_type in HANDLERS
    PAYLOAD_MODELS[task_type].model_validate(TaskSubmission(task_type=task_type).payload)

@pytest.mark.parametrize("value", [math.nan, [-math.inf], "\ud800", {"\ud800": 1}, {1: 2}, {"a", "b"}, object(), 10**5000,
                                   json.loads("[" * 300 + "]" * 300)], ids=lambda value: type(value).__name__)
def test_check_json_refuses_what_json_cannot_carry(value):
    with pytest.raises(ValueError, match=r"."):
        check_json({"deeper": [value]})

def test_check_json_takes_what_json_can_carry():
    check_json({"a": [None, True, -1, 10**400, 1.5e300, "\0 é 😀", {"": json.loads("[" * 200 + "]" * 200)}]})

# ======================================================================================================================
# Queue
# Orders go in, and come out in the right order, or not at all. Who runs them here is a Gate.

async def test_queue_submit_answers_with_the_task_as_it_waits():
    async with running(Gate().handle) as queue:
        status = queue.submit(order(priority=1, max_retries=2), request_id="r-1")
        assert (status.status, status.priority, status.progress, status.attempt) == ("pending", 1, 0, 0)
        assert (status.request_id, status.max_retries, status.payload) == ("r-1", 2, {"subject": "it"})
        assert status == queue.get_task(status.id)
        assert status.created_at.tzinfo is UTC

async def test_queue_runs_lower_priority_numbers_first():
    gate = Gate()
    async with running(gate.handle, max_workers=1) as queue:
        for name, priority in [("low", 10), ("medium", 5), ("high", 1), ("medium 2", 5), ("high 2", 1)]:
            queue.submit(order(name, priority=priority))
        await gate.let_all_go()
    assert gate.log == ["high", "high 2", "medium", "medium 2", "low"]

async def test_queue_tie_break_is_the_order_of_submission_whatever_the_clock_does(monkeypatch):
    """GOTCHA [tie-break]: this clock runs backwards."""
    class Backwards(datetime):
        seconds = itertools.count(2_000_000_000, -1)

        @classmethod
        def now(cls, tz=None):
            return datetime.fromtimestamp(next(cls.seconds), tz)

    monkeypatch.setattr(taskqueue, "datetime", Backwards)
    gate = Gate()
    async with running(gate.handle, max_workers=1) as queue:
        for name in "abcdefgh":
            queue.submit(order(name))
        await gate.let_all_go()
    assert gate.log == list("abcdefgh")

async def test_queue_lists_pages_newest_first_and_counts_every_match():
    """More tasks than one block of a shelf holds, so that pages cross from one to the next."""
    async with running(Gate().handle, max_pending=2000) as queue:
        newest_first = [queue.submit(order(delay=9)).id for _ in range(1100)][::-1]
        for task_id in newest_first[::3]:
            queue.cancel(task_id)
        waiting = [task_id for task_id in newest_first if task_id not in set(newest_first[::3])]
        for status, ids in (None, newest_first), (Status.CANCELLED, newest_first[::3]), (Status.PENDING, waiting):
            for offset in (0, 70, 72, 588, len(ids) - 2, len(ids), 10**30):
                page, total = queue.list_tasks(status, limit=5, offset=offset)
                assert ([task.id for task in page], total) == (ids[offset : offset + 5], len(ids))

async def test_queue_cancels_a_waiting_task_at_once():
    gate = Gate()
    async with running(gate.handle) as queue:
        task_id = await bring_to(Status.PENDING, queue, gate)
        status = queue.cancel(task_id)
        assert (status.status, status.error, status.result) == ("cancelled", None, None)
        await asyncio.sleep(20)  # beyond its delay
    assert gate.log == []

@pytest.mark.parametrize(("status", "force"), [("running", False), ("completed", False), ("completed", True),
                                               ("failed", True), ("cancelled", False), ("cancelled", True)])
async def test_queue_refuses_to_cancel(status, force):
    gate = Gate()
    async with running(gate.handle) as queue:
        task_id = await bring_to(Status(status), queue, gate)
        before = queue.get_task(task_id)
        with pytest.raises(TaskNotCancellable, match=status):
            queue.cancel(task_id, force)
        await quiet()
        assert queue.get_task(task_id) == before

async def test_queue_force_stops_a_running_task_once_its_handler_lets_go():
    gate = Gate()
    async with running(gate.handle) as queue:
        task_id = await bring_to(Status.RUNNING, queue, gate)
        assert queue.cancel(task_id, force=True).status == "running"
        await quiet()
        assert queue.get_task(task_id).status == "cancelled"
        assert gate.held == {}

async def test_queue_lazy_cancel_does_not_run_count_or_hold_up_the_cancelled():
    """GOTCHA [lazy-cancel]: the entry of a cancelled task stays in the heap for a while."""
    gate = Gate()
    async with running(gate.handle, max_workers=1, max_pending=1) as queue:
        queue.submit(order("first"))
        await quiet()
        queue.cancel(queue.submit(order("cancelled", priority=1)).id)
        queue.submit(order("second"))
        await gate.let_all_go()
    assert gate.log == ["first", "second"]

async def test_queue_lazy_cancel_does_not_fill_the_memory():
    """GOTCHA [lazy-cancel]: the workers are busy, so nobody takes the dead out of the heap."""
    async with running(Gate().handle, max_workers=1, keep_finished=10) as queue:
        waiting = [queue.submit(order()).id for _ in range(30)]
        await quiet()
        for _ in range(1000):
            queue.cancel(queue.submit(order()).id)
        assert queue._ready.qsize() < 200
        assert {queue.get_task(task_id).status for task_id in waiting[1:]} == {Status.PENDING}

async def test_queue_counts_only_the_waiting_against_its_bound():
    gate = Gate()
    async with running(gate.handle, max_workers=1, max_pending=2) as queue:
        await bring_to(Status.RUNNING, queue, gate)
        queue.submit(order("delayed", delay=9))
        queue.submit(order("ready"))
        with pytest.raises(QueueFull, match="2 tasks"):
            queue.submit(order("one more"))
        gate.let_go("it")
        await quiet()
        queue.submit(order("now there is room"))

async def test_queue_unbounded_history_evicts_the_oldest_finished_and_nothing_else():
    """GOTCHA [unbounded-history]: the two oldest tasks of all are not finished, and stay."""
    gate = Gate()
    async with running(gate.handle, max_workers=2, keep_finished=2) as queue:
        waits = queue.submit(order("waits", delay=9)).id
        runs = queue.submit(order("runs")).id
        await quiet()
        ended = [await bring_to(Status.CANCELLED, queue, gate) for _ in range(4)]
        assert [task.id for task in queue.list_tasks()[0]] == [ended[3], ended[2], runs, waits]
        with pytest.raises(TaskNotFound):
            queue.get_task(ended[1])
        assert queue.evicted == 2

async def test_queue_can_keep_nothing_that_has_finished():
    gate = Gate()
    async with running(gate.handle, keep_finished=0) as queue:
        task_id = await bring_to(Status.PENDING, queue, gate)
        assert queue.cancel(task_id).status == "cancelled"
        assert (queue.list_tasks(), queue.evicted) == (([], 0), 1)

async def test_queue_answers_an_idempotency_key_with_the_task_it_has_made():
    async with running(Gate().handle, max_pending=1) as queue:
        task = queue.submit(order(delay=9), idempotency_key="k")
        with pytest.raises(QueueFull):
            queue.submit(order(delay=9), idempotency_key="other")
        assert queue.submit(order(delay=9), idempotency_key="k") == task
        with pytest.raises(IdempotencyKeyReused):
            queue.submit(order(delay=8), idempotency_key="k")

async def test_queue_forgets_an_idempotency_key_with_its_task():
    async with running(Gate().handle, keep_finished=1) as queue:
        first = queue.submit(order(delay=9), idempotency_key="k")
        queue.cancel(first.id)
        assert queue.submit(order(delay=9), idempotency_key="k").id == first.id
        queue.cancel(queue.submit(order(delay=9)).id)  # evicts the first
        assert queue.submit(order(delay=7), idempotency_key="k").id != first.id

@pytest.mark.parametrize("status", [Status.COMPLETED, Status.FAILED, Status.CANCELLED])
async def test_queue_terminal_is_final(status):
    """GOTCHA [terminal-is-final]: whoever comes second gets an exception, and the task stays as it is."""
    gate = Gate()
    async with running(gate.handle) as queue:
        task_id = await bring_to(status, queue, gate)
        before = queue.get_task(task_id)
        for target in Status:
            with pytest.raises(IllegalTransition):
                queue._move(queue._tasks[task_id], target, result="late")
        assert queue.get_task(task_id) == before

def test_queue_only_these_moves_are_legal():
    moves = {(source.value, target.value) for source, targets in TRANSITIONS.items() for target in targets}
    assert moves == {("pending", "running"), ("pending", "cancelled"), ("running", "completed"), ("running", "failed"),
                     ("running", "cancelled"), ("running", "pending")}

@pytest.mark.parametrize("steps", range(6))
async def test_queue_watch_snapshot_then_subscribe_loses_no_change(steps):
    """GOTCHA [snapshot-then-subscribe]: the change comes so many steps of the loop after the watcher's last look."""
    gate = Gate()
    async with running(gate.handle) as queue:
        task_id = await bring_to(Status.RUNNING, queue, gate)
        async with contextlib.aclosing(queue.watch(task_id)) as states:
            await anext(states)
            following = asyncio.create_task(anext(states))
            for _ in range(steps):
                await asyncio.sleep(0)
            gate.report["it"](50)
            assert (await asyncio.wait_for(following, 5)).progress == 50

async def test_queue_watch_yields_only_what_is_newer_than_the_last_event_id():
    gate = Gate()
    async with running(gate.handle) as queue:
        task_id = await bring_to(Status.RUNNING, queue, gate)
        async with contextlib.aclosing(queue.watch(task_id, queue.get_task(task_id).version)) as states:
            following = asyncio.create_task(anext(states))
            await quiet()
            assert not following.done()
            gate.report["it"](10)
            assert (await following).progress == 10

async def test_queue_watch_ends_when_the_queue_stops():
    async with running(Gate().handle) as queue:
        task_id = queue.submit(order(delay=9)).id
        watching = asyncio.create_task(collect(queue.watch(task_id)))
        await quiet()
    assert [state.status for state in await watching] == ["pending"]

async def test_queue_watch_refuses_an_unknown_task():
    async with running(Gate().handle) as queue:
        with pytest.raises(TaskNotFound):
            await anext(queue.watch("no such id"))

async def test_queue_numbers_its_changes_above_those_of_an_earlier_life():
    """A client may come back with a Last-Event-ID that the server gave before it was started again."""
    async with running(Gate().handle) as queue:
        old = queue.submit(order())
    async with running(Gate().handle) as queue:
        assert queue.submit(order()).version > old.version

async def test_shelf_pages_like_a_sorted_list():
    chance, shelf, kept = random.Random(4), Shelf(), []
    async with running(Gate().handle, max_pending=3000) as queue:
        tasks = [queue._tasks[queue.submit(order(delay=9)).id] for _ in range(2000)]
    for task in chance.sample(tasks, 2000):
        shelf.add(task)
        kept.append(task)
        if chance.random() < 0.6:
            shelf.remove(kept.pop(chance.randrange(len(kept))))
    kept.sort(key=lambda task: -task.sequence)
    for offset in range(0, len(kept) + 50, 37):
        assert shelf.page(40, offset) == kept[offset : offset + 40]

# ======================================================================================================================
# Handlers
# How one is called: in the loop or in a thread, and with what; and the three that only simulate.

async def test_process_task_gives_the_handler_the_validated_model():
    async def handle(payload, update_progress):
        return payload

    payload = await process_task(TaskType.RESIZE_IMAGE, {"width": 5, "note": "x"}, print, {TaskType.RESIZE_IMAGE: handle})
    assert isinstance(payload, taskqueue.ResizeImagePayload)
    assert (payload.width, payload.height, payload.note) == (5, 600, "x")

async def test_process_task_refuses_a_wrong_payload_and_an_unknown_type():
    with pytest.raises(ValidationError):
        await process_task(TaskType.RESIZE_IMAGE, {"width": "5"}, print)
    with pytest.raises(LookupError, match="send_email"):
        await process_task(TaskType.SEND_EMAIL, {}, print, {})

def test_handler_registers_a_function_and_the_model_in_its_annotation(monkeypatch):
    class Letter(BaseModel):
        stamp: int

    for registry in HANDLERS, PAYLOAD_MODELS:
        monkeypatch.setitem(registry, TaskType.SEND_EMAIL, None)  # so that it is put back afterwards

    @taskqueue.handler(TaskType.SEND_EMAIL)
    def post(payload: Letter, update_progress):
        pass

    assert (HANDLERS[TaskType.SEND_EMAIL], PAYLOAD_MODELS[TaskType.SEND_EMAIL]) == (post, Letter)

async def test_handlers_start_each_attempt_with_the_payload_as_it_was_sent():
    seen = []

    async def handle(payload, update_progress):
        seen.append(list(payload.files))
        payload.files.append("one more")
        raise ValueError

    async with running(handle, backoff_base=0) as queue:
        task = queue.submit(TaskSubmission(task_type="send_email", payload={"files": ["a"]}, max_retries=1))
        assert (await until(queue, task.id)).payload == {"files": ["a"]}
    assert seen == [["a"], ["a"]]

@real_clock
async def test_handlers_blocking_handler_leaves_the_loop_free():
    """GOTCHA [blocking-handler]: it blocks until the loop has seen its progress and let it go."""
    let_go = threading.Event()

    def handle(payload, update_progress):
        update_progress(50)
        return "let go" if let_go.wait(2) else "nobody was free to let it go"

    async with running(handle) as queue:
        task = queue.submit(order())
        await until(queue, task.id, lambda state: state.progress == 50)
        let_go.set()
        assert (await until(queue, task.id)).result == "let go"

@real_clock
async def test_handlers_thread_is_asked_to_stop_and_keeps_its_slot_until_it_has():
    go_on, log = threading.Event(), []

    def handle(payload, update_progress):
        log.append(payload.subject)
        update_progress(1)
        go_on.wait(5)
        update_progress(2)
        log.append("was not stopped")

    async with running(handle, max_workers=1) as queue:
        first, second = queue.submit(order("first")), queue.submit(order("second", delay=0.001))
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
@pytest.mark.parametrize(("error", "named"), [
    (SystemExit(3), "SystemExit: 3"), (asyncio.CancelledError(), "CancelledError"), (StopIteration(), "StopIteration")])
async def test_handlers_thread_may_raise_anything(error, named):
    def handle(payload, update_progress):
        raise error

    async with running(handle) as queue:
        state = await until(queue, queue.submit(order()).id)
        assert state.status == "failed"
        assert named in state.error

@real_clock
@pytest.mark.parametrize("task_type", TaskType)
async def test_simulated_handlers_report_rising_progress_up_to_100(task_type):
    reported = []
    async with TaskQueue(Settings(pace=0, failure_rate=0)) as queue:
        taskqueue.current_settings.set(queue.settings)
        check_json(await process_task(task_type, {}, reported.append))
        assert (await until(queue, queue.submit(TaskSubmission(task_type=task_type)).id)).status == "completed"
    assert reported == sorted(set(reported))
    assert (len(reported) >= 3, reported[-1]) == (True, 100)

async def test_simulated_handlers_fail_at_the_rate_that_is_set():
    async with TaskQueue(Settings(failure_rate=1)) as queue:
        state = await until(queue, queue.submit(TaskSubmission(task_type="resize_image")).id)
        assert state.error.startswith("RuntimeError: simulated failure while ")

async def test_simulated_handlers_keep_the_pace_that_is_set():
    async with TaskQueue(Settings(failure_rate=0, pace=3)) as queue:
        await until(queue, queue.submit(TaskSubmission(task_type="resize_image")).id)
    assert now() == pytest.approx(4 * 0.5 * 3)

# ======================================================================================================================
# Workers
# Slots, order, attempts, time, and every way for an attempt to end.

@pytest.mark.parametrize("limit", [1, 3, 7])
async def test_workers_run_as_many_at_once_as_they_may_and_no_more(limit):
    gate = Gate()
    async with running(gate.handle, max_workers=limit) as queue:
        for number in range(10):
            queue.submit(order(str(number)))
        await quiet()
        assert list(gate.held) == [str(number) for number in range(limit)]
        await gate.let_all_go()
        assert (gate.most, queue.count(Status.COMPLETED)) == (limit, 10)

async def test_workers_slot_before_get_lets_a_late_high_overtake_every_low():
    """GOTCHA [slot-before-get]: no LOW is in hand already when the slot becomes free."""
    gate = Gate()
    async with running(gate.handle, max_workers=1) as queue:
        for name in ("busy", "low", "low 2"):
            queue.submit(order(name, priority=10))
        await quiet()
        queue.submit(order("late high", priority=1))
        await gate.let_all_go()
    assert gate.log == ["busy", "late high", "low", "low 2"]

async def test_workers_start_a_delayed_task_on_time_and_hold_no_slot_for_it():
    gate = Gate()
    async with running(gate.handle, max_workers=1) as queue:
        queue.submit(order("later", delay=30, priority=1))
        queue.submit(order("now"))
        await gate.let_all_go()
        assert gate.log == ["now"]
        await asyncio.sleep(29.9 - now())
        assert gate.log == ["now"]
        await asyncio.sleep(0.2)
        assert list(gate.held) == ["later"]
        await gate.let_all_go()

async def test_workers_retry_until_an_attempt_succeeds(monkeypatch):
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    started = []

    async def handle(payload, update_progress):
        started.append(now())
        if len(started) < 3:
            raise ValueError("not yet")
        return "at last"

    async with running(handle, backoff_base=2) as queue:
        state = await until(queue, queue.submit(order(max_retries=5)).id)
    assert (state.status, state.attempt, state.result, state.error) == ("completed", 3, "at last", None)
    assert started == pytest.approx([0, 2, 6], abs=0.001)  # 2 s of backoff, then 4

async def test_workers_fail_a_task_after_its_last_attempt():
    gate = Gate()
    async with running(gate.handle, backoff_base=0) as queue:
        task = queue.submit(order(max_retries=1))
        await quiet()
        gate.let_go("it", ConnectionError("no route"))
        await quiet()
        gate.let_go("it", ConnectionError("still no route"))
        state = await until(queue, task.id)
    assert (state.status, state.attempt, state.error) == ("failed", 2, "ConnectionError: still no route")
    assert (state.result, len(gate.log)) == (None, 2)

async def test_workers_backoff_holds_slot_of_nobody(monkeypatch):
    """GOTCHA [backoff-holds-slot]: while the one task waits for its next attempt, the other runs."""
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    gate = Gate()
    async with running(gate.handle, max_workers=1, backoff_base=8) as queue:
        queue.submit(order("fails", max_retries=1))
        queue.submit(order("waits"))
        await quiet()
        gate.let_go("fails", ValueError())
        await quiet()
        assert (list(gate.held), queue.list_tasks()[0][1].status) == (["waits"], "pending")

async def test_workers_retry_keeps_priority_and_place():
    """GOTCHA [retry-keeps-priority]: it failed, and yet it comes before all that were behind it."""
    gate = Gate()
    async with running(gate.handle, max_workers=1, backoff_base=0) as queue:
        for name, priority in [("medium", 5), ("high", 1), ("high 2", 1)]:
            queue.submit(order(name, priority=priority, max_retries=1))
        await quiet()
        gate.let_go("high", ValueError())
        await gate.let_all_go()
    assert gate.log == ["high", "high", "high 2", "medium"]

def test_backoff_doubles_up_to_its_cap_with_full_jitter(monkeypatch):
    monkeypatch.setattr(random, "uniform", lambda low, high: (low, high))
    spans = [backoff_delay(attempt, Settings(backoff_base=0.5, backoff_cap=30)) for attempt in range(1, 9)]
    assert spans == [(0, high) for high in (0.5, 1, 2, 4, 8, 16, 30, 30)]

async def test_workers_stop_an_attempt_at_its_timeout():
    gate = Gate()
    async with running(gate.handle, backoff_base=0) as queue:
        state = await until(queue, queue.submit(order(timeout=3, max_retries=1)).id)
    assert (state.status, state.attempt, state.error) == ("failed", 2, "TimeoutError: no result within 3 s")
    assert now() == pytest.approx(6, abs=0.001)

# What an attempt does when it is asked to stop: it lets go, it raises something else, it returns as if nothing were, or
# it is slow about it, so that its deadline passes too.
async def lets_go():
    raise asyncio.CancelledError

async def replaces():
    raise TimeoutError("mine")

async def swallows():
    return "done anyway"

async def dawdles():
    await asyncio.sleep(60)

@pytest.mark.parametrize("reaction", [lets_go, replaces, swallows, dawdles])
@pytest.mark.parametrize(("cause", "status", "error"), [
    ("timeout", "failed", "TimeoutError: no result within 5 s"), ("cancel", "cancelled", None), ("shutdown", "cancelled", None)])
async def test_workers_whose_timeout_is_known_from_its_cause(cause, status, error, reaction, monkeypatch):
    """GOTCHA [whose-timeout]: what came out of the handler does not matter; who has stopped it does."""
    async def handle(payload, update_progress):
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return await reaction()

    monkeypatch.setattr(TaskQueue, "STUBBORN_SECONDS", 100)
    async with running(handle, drain_seconds=2) as queue:
        task_id = queue.submit(order(timeout=5)).id
        await quiet()
        if cause == "cancel":
            queue.cancel(task_id, force=True)
        if cause != "shutdown":
            await asyncio.sleep(100)
    assert (queue.get_task(task_id).status, queue.get_task(task_id).error) == (status, error)

async def test_workers_whose_timeout_is_not_the_handlers_own():
    """GOTCHA [whose-timeout]: a TimeoutError that a handler raises by itself is an error like any other."""
    gate = Gate()
    async with running(gate.handle) as queue:
        task = queue.submit(order())
        await quiet()
        gate.let_go("it", TimeoutError("the database"))
        assert (await until(queue, task.id)).error == "TimeoutError: the database"

async def test_workers_do_not_retry_what_was_cancelled():
    gate = Gate()
    async with running(gate.handle, backoff_base=0) as queue:
        task = queue.submit(order(max_retries=5))
        await quiet()
        queue.cancel(task.id, force=True)
        assert (await until(queue, task.id)).status == "cancelled"
    assert gate.log == ["it"]

class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("no words for it")

def endless():
    return endless()

def throw(error):
    raise error

@pytest.mark.parametrize(("misbehave", "named"), [
    (lambda: throw(ValueError("x")), "ValueError: x"), (lambda: throw(StopIteration(1)), "StopIteration"),
    (lambda: throw(GeneratorExit()), "GeneratorExit"), (lambda: throw(KeyboardInterrupt()), "KeyboardInterrupt"),
    (lambda: throw(Unprintable()), "Unprintable"), (lambda: throw(ValueError("\ud800")), "ValueError: ?"),
    (lambda: throw(ValueError("x" * 10**6)), "ValueError: xxx"), (endless, "RecursionError"),
    (lambda: throw(ExceptionGroup("two", [ValueError(), KeyError()])), "ExceptionGroup: two"),
], ids=range(9))
async def test_workers_survive_a_handler_that_raises(misbehave, named):
    async def handle(payload, update_progress):
        return misbehave() if payload.subject == "it" else "fine"

    async with running(handle, max_workers=1) as queue:
        state = await until(queue, queue.submit(order()).id)
        assert state.status == "failed"
        assert named in state.error
        assert len(state.model_dump_json()) < 2000
        assert (await until(queue, queue.submit(order("next")).id)).result == "fine"

@pytest.mark.parametrize(("error", "named"), [(asyncio.CancelledError(), "CancelledError"), (SystemExit(3), "SystemExit: 3")])
async def test_workers_cancelled_error_and_system_exit_fail_their_task_only(error, named):
    """GOTCHA [cancelled-error]: `except Exception` lets both of them pass."""
    async def handle(payload, update_progress):
        return throw(error) if payload.subject == "it" else "fine"

    async with running(handle, max_workers=1) as queue:
        state = await until(queue, queue.submit(order()).id)
        assert (state.status, named in state.error) == ("failed", True)
        assert (await until(queue, queue.submit(order("next")).id)).result == "fine"

async def test_workers_cancel_before_first_step_frees_the_slot(monkeypatch):
    """GOTCHA [cancel-before-first-step]: the attempt is cancelled in the very step that makes it."""
    gate, start = Gate(), TaskQueue._start

    def start_and_cancel(queue, task):
        start(queue, task)
        if task.payload["subject"] == "it":
            queue.cancel(task.id, force=True)

    monkeypatch.setattr(TaskQueue, "_start", start_and_cancel)
    async with running(gate.handle, max_workers=1) as queue:
        task = queue.submit(order())
        queue.submit(order("next"))
        await quiet()
        assert (queue.get_task(task.id).status, gate.log) == ("cancelled", ["next"])

async def test_workers_strong_reference_keeps_an_attempt_alive():
    """GOTCHA [strong-reference]: nothing but its task refers to the future that this handler waits for."""
    async def handle(payload, update_progress):
        await asyncio.get_running_loop().create_future()

    async with running(handle) as queue:
        task = queue.submit(order())
        await quiet()
        gc.collect()
        queue.cancel(task.id, force=True)
        assert (await until(queue, task.id)).status == "cancelled"

BAD_RESULTS = {
    "nan": math.nan, "infinity": [-math.inf], "lone surrogate": "\ud800", "surrogate key": {"\ud800": 1}, "object": object(),
    "huge int": 10**5000, "deep": json.loads("[" * 400 + "]" * 400), "function": print, "in itself": (loop := [])}
loop.append(loop)

@pytest.mark.parametrize("result", BAD_RESULTS.values(), ids=BAD_RESULTS)
async def test_workers_bad_result_fails_its_task_and_spoils_nothing(result):
    """GOTCHA [bad-result]: the list of tasks shows it to everybody."""
    async def handle(payload, update_progress):
        return result

    async with serving(handle) as (_, client, queue):
        task = await until(queue, queue.submit(order()).id)
        assert (task.status, task.result, bool(task.error)) == ("failed", None, True)
        assert strict_json((await client.get("/tasks")).text)["tasks"][0]["status"] == "failed"
        assert "event: progress" in (await client.get(f"/tasks/{task.id}/stream")).text

@pytest.mark.parametrize(("result", "shown"), [
    (None, None), ({7}, [7]), ((1, "é"), [1, "é"]), ({1: 2}, {"1": 2}), (datetime(2030, 1, 1, tzinfo=UTC), "2030-01-01T00:00:00Z"),
    (taskqueue.ResizeImagePayload(url="u"), {"url": "u", "width": 800, "height": 600})], ids=str)
async def test_workers_turn_a_result_into_plain_json(result, shown):
    async def handle(payload, update_progress):
        return result

    async with running(handle) as queue:
        state = await until(queue, queue.submit(order()).id)
        assert (state.status, state.result) == ("completed", shown)

@pytest.mark.parametrize("percent", [-1, 100.1, math.nan, math.inf, "50", None, True, 10**400])
async def test_progress_refuses_what_is_no_percentage(percent):
    async def handle(payload, update_progress):
        update_progress(percent)

    async with running(handle) as queue:
        state = await until(queue, queue.submit(order()).id)
        assert state.error.startswith("ValueError: progress must be a number from 0 to 100")

async def test_progress_never_runs_backwards_within_an_attempt():
    gate, shown = Gate(), []
    async with running(gate.handle) as queue:
        task_id = await bring_to(Status.RUNNING, queue, gate)
        for percent in (0, 50, 20, 50.9, 60, 60):
            gate.report["it"](percent)
            shown.append(queue.get_task(task_id).progress)
    assert shown == [0, 50, 50, 50, 60, 60]

async def test_progress_begins_anew_with_each_attempt_and_passes_over_late_reports():
    gate = Gate()
    async with running(gate.handle, backoff_base=0) as queue:
        task = queue.submit(order(max_retries=1))
        await quiet()
        first_report = gate.report["it"]
        first_report(80)
        gate.let_go("it", ValueError())
        await quiet()
        first_report(90)
        assert (queue.get_task(task.id).attempt, queue.get_task(task.id).progress) == (2, 0)
        gate.let_go("it")
        await quiet()
        gate.report["it"](50)
        assert queue.get_task(task.id).progress == 100

@real_clock
async def test_progress_from_thread_reaches_the_queue_in_its_own_thread(monkeypatch):
    """GOTCHA [progress-from-thread]: what is not thread-safe is touched by the thread of the loop alone."""
    threads = []

    def handle(payload, update_progress):
        for percent in (10, 20, 30):
            update_progress(percent)

    async with running(handle) as queue:
        changed = queue._changed
        monkeypatch.setattr(queue, "_changed", lambda task: threads.append(threading.get_ident()) or changed(task))
        assert (await until(queue, queue.submit(order()).id)).progress == 100
    assert threads == [threading.get_ident()] * 6  # submitted, started, three reports, completed

async def test_workers_dead_loop_is_unhealthy_and_logged(monkeypatch, caplog):
    """GOTCHA [dead-loop]: it dies of a bug, so no flag is cleared."""
    async with serving(Gate().handle) as (_, client, queue):
        assert (await client.get("/health")).json()["status"] == "healthy"
        monkeypatch.setattr(queue, "_start", lambda task: throw(RuntimeError("a bug")))
        queue.submit(order())
        await quiet()
        answer = await client.get("/health")
        assert (answer.status_code, answer.json()["status"]) == (503, "unhealthy")
    assert "the worker loop has died" in caplog.text

def test_workers_one_loop_after_another():
    """GOTCHA [one-loop]: the second life of an app, in another event loop, inherits nothing from the first."""
    async def handle(payload, update_progress):
        await asyncio.sleep(0)

    async def live():
        async with app.router.lifespan_context(app):
            tasks = [app.state.queue.submit(order()) for _ in range(3)]
            return [(await until(app.state.queue, task.id)).status for task in tasks]

    app = create_app(Settings(max_workers=1), {TaskType.SEND_EMAIL: handle})
    for _ in range(2):
        assert asyncio.run(live()) == ["completed"] * 3

async def test_shutdown_gives_running_handlers_time_to_finish():
    gate = Gate()
    async with running(gate.handle, drain_seconds=5) as queue:
        task_id = await bring_to(Status.RUNNING, queue, gate)
        asyncio.get_running_loop().call_later(4, gate.let_go, "it", "done")
    assert (queue.get_task(task_id).status, now()) == ("completed", pytest.approx(4, abs=0.001))

async def test_shutdown_cancels_all_that_has_not_finished():
    gate = Gate()
    async with running(gate.handle, max_workers=2, drain_seconds=5, backoff_base=0) as queue:
        for name in ("runs", "fails while it drains", "waits"):
            queue.submit(order(name, max_retries=1))
        queue.submit(order("delayed", delay=60))
        await quiet()
        asyncio.get_running_loop().call_later(1, gate.let_go, "fails while it drains", ValueError())
    assert {task.status for task in queue.list_tasks()[0]} == {Status.CANCELLED}
    assert (len(gate.log), now()) == (2, pytest.approx(5, abs=0.001))

async def test_shutdown_takes_no_more_tasks():
    async with running(Gate().handle) as queue:
        queue.submit(order())
    with pytest.raises(QueueStopped):
        queue.submit(order())

async def test_shutdown_leaves_a_handler_behind_that_ignores_it(caplog):
    let_go = asyncio.Event()

    async def handle(payload, update_progress):
        while not let_go.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await let_go.wait()

    async with running(handle, drain_seconds=5) as queue:
        task = queue.submit(order())
        await quiet()
    assert now() == pytest.approx(5.3, abs=0.001)
    assert f"task {task.id} ignores its cancellation" in caplog.text
    let_go.set()
    await quiet()
    assert queue.get_task(task.id).status == "cancelled"

async def test_workers_log_has_the_request_id_and_no_line_of_a_client(caplog):
    caplog.set_level(logging.INFO, "taskqueue")
    async with serving() as (_, client, queue):
        body = {"task_type": "send_email", "payload": {"to": "x\n2030-01-01 INFO forged.invalid"}}
        task = (await client.post("/tasks", json=body, headers={"X-Request-ID": "r-1"})).json()
        assert (await until(queue, task["id"])).status == "failed"
    lines = [record.getMessage() for record in caplog.records if task["id"] in record.getMessage()]
    assert lines
    assert all(line.startswith("[r-1] ") and "\n" not in line for line in lines)

async def test_workers_keep_every_rule_whatever_comes(monkeypatch):
    """500 steps at random: submit, end, cancel, let time pass. After each of them all rules hold."""
    gate, chance, ended = Gate(), random.Random(7), {}
    monkeypatch.setattr(random, "uniform", chance.uniform)
    async with running(gate.handle, max_workers=3, max_pending=9, keep_finished=9, backoff_base=1) as queue:
        for step in range(500):
            match chance.randrange(6):
                case 0 | 1:
                    with contextlib.suppress(QueueFull):
                        queue.submit(order(str(step), priority=chance.choice([1, 5, 10]), timeout=chance.randint(1, 20),
                                           delay=chance.choice([0, 0, 3]), max_retries=chance.randint(0, 2)))
                case 2 | 3 if gate.held:
                    gate.let_go(chance.choice(list(gate.held)), chance.choice(["done", ValueError("x")]))
                case 4 if queue.submitted > queue.evicted:
                    with contextlib.suppress(TaskNotCancellable):
                        queue.cancel(chance.choice(queue.list_tasks()[0]).id, force=chance.random() < 0.5)
                case 5:
                    await asyncio.sleep(chance.uniform(0, 3))
            await quiet()
            tasks = queue.list_tasks()[0]
            assert len(tasks) == queue.submitted - queue.evicted == sum(queue.count(status) for status in Status)
            assert queue.count(Status.RUNNING) == len(gate.held) <= 3
            assert queue.count(Status.PENDING) <= 9 + 3  # three may come back for a retry
            assert len(gate.held) == 3 or queue._ready.empty()  # nobody waits beside a free slot
            for task in tasks:
                if task.status.is_final:
                    assert ended.setdefault(task.id, task) == task
                assert (task.result is None or task.error is None) and task.attempt <= task.max_retries + 1
    assert gate.most == 3
    assert {task.status for task in ended.values()} == {Status.COMPLETED, Status.FAILED, Status.CANCELLED}

# ======================================================================================================================
# Middleware
# What it does to every request: an id, a line in the log, a place in the metrics.

@pytest.mark.parametrize("sane", ["abc-1_2.Z", "x" * 64])
async def test_middleware_keeps_a_sane_request_id(sane):
    async with serving() as (_, client, _):
        assert (await client.get("/health", headers={"X-Request-ID": sane})).headers["X-Request-ID"] == sane

@pytest.mark.parametrize("odd", ["", "x" * 65, "a b", "a\nforged line", "a\x1b[2J", "é"])
async def test_middleware_replaces_an_odd_request_id(odd):
    async with serving() as (_, client, _):
        answer = await client.get("/health", headers={"X-Request-ID": odd.encode()})
        assert re.fullmatch("[0-9a-f]{16}", answer.headers["X-Request-ID"])

async def test_middleware_puts_the_request_id_on_every_answer_and_on_the_task(caplog):
    caplog.set_level(logging.INFO, "taskqueue")
    async with serving(Gate().handle) as (_, client, queue):
        for method, path in [("GET", "/"), ("GET", "/docs"), ("GET", "/nothing"), ("PUT", "/tasks"), ("DELETE", "/tasks/x"),
                             ("GET", "/tasks?limit=0"), ("GET", "/tasks/x/stream")]:
            answer = await client.request(method, path, headers={"X-Request-ID": "r-1"})
            assert (answer.headers.get_list("X-Request-ID"), answer.headers.get_list("X-Request-ID")) == (["r-1"], ["r-1"])
        task = (await client.post("/tasks", json={"task_type": "send_email"}, headers={"X-Request-ID": "r-2"})).json()
        assert task["request_id"] == queue.get_task(task["id"]).request_id == "r-2"
    assert caplog.text.count("[r-1] ") == 7

async def test_middleware_cannot_be_made_to_write_a_forged_log_line(caplog):
    caplog.set_level(logging.INFO, "taskqueue")
    async with serving() as (_, client, _):
        await client.request("GET\nforged", "/x%0A2030-01-01%20forged", headers={"X-Request-ID": "a\nforged"})
    [line] = [record.getMessage() for record in caplog.records if "forged" in record.getMessage()]
    assert re.fullmatch(r"\[[0-9a-f]{16}\] OTHER '/x\\n2030-01-01 forged' 404 \d+\.\d ms", line)

async def test_metrics_count_requests_by_status_and_take_their_time(monkeypatch):
    async with serving() as (app, client, _):
        async def slow():
            clock.append(clock[-1] + 0.2)

        clock = [100.0]
        monkeypatch.setattr(taskqueue.time, "perf_counter", lambda: clock[-1])
        app.add_api_route("/slow", slow)
        for path in ("/slow", "/slow", "/health", "/nothing"):
            await client.get(path)
        numbers = (await client.get("/metrics")).json()
    assert (numbers["total_requests"], numbers["avg_duration_ms"]) == (4, 100.0)
    assert numbers["status_counts"] == {"200": 3, "404": 1}
    assert numbers["routes"]["GET /slow"] == {"count": 2, "avg_duration_ms": 200.0, "up_to_seconds": {"0.25": 2}}

async def test_metrics_raw_path_labels_are_not_used():
    """GOTCHA [raw-path-labels]: whatever a scanner tries, it makes no new series."""
    async with serving() as (_, client, _):
        for number in range(3):
            await client.get(f"/tasks/{number}")
            await client.get(f"/admin/{number}")
            await client.request(f"BREW{number}", "/health")
        assert set((await client.get("/metrics")).json()["routes"]) <= {
            "GET /tasks/{task_id}", "GET (other)", "OTHER /health", "OTHER (other)"}

async def test_metrics_stream_latency_ends_with_the_first_byte(monkeypatch):
    """GOTCHA [stream-latency]: this stream is watched for an hour, and has taken no time."""
    gate = Gate()
    async with serving(gate.handle) as (app, client, queue):
        monkeypatch.setattr(taskqueue.time, "perf_counter", now)
        task_id = queue.submit(order(timeout=3600)).id
        async with Stream(app, f"/tasks/{task_id}/stream") as stream:
            await stream.next()
            await asyncio.sleep(3500)
            counted = (await client.get("/metrics")).json()["routes"]["GET /tasks/{task_id}/stream"]
        assert (counted["count"], counted["avg_duration_ms"]) == (1, pytest.approx(0, abs=1))

async def test_metrics_as_prometheus_text_parse():
    async with serving() as (_, client, queue):
        queue.submit(order())
        for path in ("/health", "/tasks/x"):
            await client.get(path)
        answer = await client.get("/metrics", headers={"Accept": "application/openmetrics-text;q=0.9,text/plain;q=0.5,*/*"})
    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    samples = parse_prometheus(answer.text)
    assert samples['taskqueue_http_requests_total{method="GET",route="/tasks/{task_id}",status="404"}'] == 1
    buckets = [value for name, value in samples.items() if "_bucket" in name and 'route="/health"' in name]
    assert (buckets == sorted(buckets), buckets[-1]) == (True, 1)
    assert samples['taskqueue_http_request_seconds_count{method="GET",route="/health"}'] == 1
    assert (samples['taskqueue_tasks{status="pending"}'], samples["taskqueue_submitted_total"]) == (1, 1)

def parse_prometheus(text):
    """A strict little reader of the text format 0.0.4: the samples of a metric follow its TYPE line, in one group."""
    family, seen, samples = None, set(), {}
    for line in text.removesuffix("\n").split("\n"):
        if line.startswith("# TYPE "):
            _, _, family, kind = line.split(" ")
            assert family not in seen
            assert kind in ("counter", "gauge", "histogram")
            seen.add(family)
        else:
            name, value = re.fullmatch(r'(\w+(?:\{(?:\w+="[^"\\\n]*",?)+\})?) (\S+)', line).groups()
            assert re.sub("_(bucket|sum|count)?$", "", name.partition("{")[0]) == family
            assert name not in samples
            samples[name] = float(value)
    return samples

async def test_middleware_unhandled_is_500_and_counted(caplog):
    """GOTCHA [unhandled-is-500]: and the client gets JSON, with the id that stands in the log."""
    async with serving() as (app, client, _):
        async def broken():
            raise RuntimeError("a bug")

        app.add_api_route("/broken", broken)
        answer = await client.get("/broken")
        assert (answer.status_code, answer.json()) == (500, {"detail": "Internal Server Error"})
        assert f"[{answer.headers['X-Request-ID']}] unhandled exception" in caplog.text
        assert (await client.get("/metrics")).json()["routes"]["GET /broken"]["count"] == 1

async def test_middleware_base_http_middleware_is_not_in_the_way():
    """GOTCHA [base-http-middleware]: a route runs in the very asyncio task in which the server has called the app."""
    async with serving() as (app, client, _):
        async def which_task():
            seen.append(asyncio.current_task())

        seen = []
        app.add_api_route("/which", which_task)
        await client.get("/which")
    assert seen == [asyncio.current_task()]

# ======================================================================================================================
# Page
# The page is looked at by eye, and in a browser. What must be so in any case:

async def test_page_is_html_that_builds_no_html_out_of_data():
    async with serving() as (_, client, _):
        answer = await client.get("/")
        assert answer.headers["Content-Type"].startswith("text/html")
        assert "<title>" in answer.text
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", answer.text)

# ======================================================================================================================
# Routes
# The contract, call by call: what goes well, what is refused, and then the streams.

async def test_routes_submit_answers_202_with_the_task_and_its_place():
    async with serving(Gate().handle) as (_, client, _):
        answer = await client.post("/tasks", json={"task_type": "send_email", "payload": {"more": [1]}, "priority": 1})
        task = answer.json()
        assert (answer.status_code, answer.headers["Location"]) == (202, f"/tasks/{task['id']}")
        assert (task["status"], task["priority"], task["payload"]) == ("pending", 1, {"more": [1]})
        assert {"progress", "attempt", "max_retries", "result", "error", "request_id", "created_at", "started_at",
                "completed_at"} <= set(task)
        assert datetime.fromisoformat(task["created_at"]).tzinfo == UTC

@pytest.mark.parametrize("status", Status)
async def test_routes_get_shows_a_task_in_every_state(status):
    gate = Gate()
    async with serving(gate.handle) as (_, client, queue):
        answer = await client.get(f"/tasks/{await bring_to(status, queue, gate)}")
        assert (answer.status_code, answer.json()["status"]) == (200, status)
        assert (answer.json()["result"], answer.json()["error"]) == {
            "completed": ("done", None), "failed": (None, "ValueError: broken")}.get(status, (None, None))
        assert (answer.json()["completed_at"] is not None) == status.is_final

@pytest.mark.parametrize(("status", "force", "code", "detail"), [
    ("pending", False, 200, "Task cancelled"), ("pending", True, 200, "Task cancelled"), ("running", False, 409, "running"),
    ("running", True, 202, "Cancellation requested"), ("completed", True, 409, "completed"), ("failed", False, 409, "failed"),
    ("cancelled", True, 409, "cancelled")])
async def test_routes_delete_cancels_what_may_be_cancelled(status, force, code, detail):
    gate = Gate()
    async with serving(gate.handle) as (_, client, queue):
        task_id = await bring_to(Status(status), queue, gate)
        answer = await client.delete(f"/tasks/{task_id}", params={"force": force})
        assert answer.status_code == code
        assert detail in answer.json()["detail"]
        assert answer.json().get("task_id", task_id) == task_id
        await quiet()
        assert queue.get_task(task_id).status == (status if code == 409 else "cancelled")

async def test_routes_list_filters_and_pages():
    async with serving(Gate().handle, max_workers=1) as (_, client, queue):
        ids = [queue.submit(order(str(number))).id for number in range(5)][::-1]
        await quiet()
        assert [task["id"] for task in (await client.get("/tasks")).json()["tasks"]] == ids
        answer = (await client.get("/tasks?status=pending&limit=2&offset=1")).json()
        assert ([task["id"] for task in answer["tasks"]], answer["total"]) == (ids[1:3], 4)
        assert (await client.get("/tasks?status=failed")).json() == {"tasks": [], "total": 0}

@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=x", "offset=-1", "status=lost", "offset=1e3", "limit=" + "9" * 5000])
async def test_routes_list_refuses_a_bad_query(query):
    async with serving() as (_, client, _):
        answer = await client.get(f"/tasks?{query}")
        assert (answer.status_code, answer.json()["detail"][0]["loc"]) == (422, ["query", query.partition("=")[0]])

@pytest.mark.parametrize(("method", "path"), [
    ("GET", "/tasks/x"), ("GET", "/tasks/x/stream"), ("DELETE", "/tasks/x?force=true"), ("GET", "/tasks/%00"), ("GET", "/nothing")])
async def test_routes_404_after_200_cannot_happen(method, path):
    """GOTCHA [404-after-200]: an unknown id is a 404 with a JSON detail, on the streams too."""
    async with serving() as (_, client, _):
        answer = await client.request(method, path)
        assert (answer.status_code, type(answer.json()["detail"])) == (404, str)

async def test_routes_await_put_is_not_how_a_full_queue_answers():
    """GOTCHA [await-put]: it says no, and at once."""
    async with serving(Gate().handle, max_pending=1) as (_, client, queue):
        queue.submit(order(delay=60))
        async with asyncio.timeout(5):
            answer = await client.post("/tasks", json={"task_type": "send_email"})
        assert (answer.status_code, int(answer.headers["Retry-After"])) == (503, 1)
        assert "waiting" in answer.json()["detail"]

async def test_routes_answer_503_while_the_queue_stops():
    async with serving(Gate().handle) as (_, client, queue):
        queue.stop_watching()
        answer = await client.post("/tasks", json={"task_type": "send_email"})
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")

async def test_routes_idempotency_key_makes_one_task():
    async with serving(Gate().handle) as (_, client, queue):
        first, again, other = [await client.post("/tasks", json={"task_type": "send_email", **more}, headers={
            "Idempotency-Key": "k"}) for more in ({}, {"priority": 5}, {"priority": 1})]
        assert (again.status_code, again.json()["id"], queue.submitted) == (202, first.json()["id"], 1)
        assert (other.status_code, other.json()["detail"][0]["loc"]) == (422, ["header", "Idempotency-Key"])

@pytest.mark.parametrize("key", ["", "x" * 256])
async def test_routes_refuse_an_idempotency_key_of_odd_length(key):
    async with serving() as (_, client, _):
        answer = await client.post("/tasks", json={"task_type": "send_email"}, headers={"Idempotency-Key": key})
        assert (answer.status_code, answer.json()["detail"][0]["loc"][0]) == (422, "header")

HOSTILE = {  # name → the body; %s is put in as the payload's one value
    "nan": "NaN", "infinity": "[-Infinity]", "1e400": "1e400", "surrogate": r'"\ud800"', "surrogate key": r'{"\udfff": 1}',
    "deep": "[" * 300 + "]" * 300, "very deep": "[" * 50_000 + "]" * 50_000, "long int": "9" * 5000, "null byte": "\0",
    "nan priority": '1}, "priority": NaN, "x": {"y": 1', "true priority": '1}, "priority": true, "x": {"y": 1',
    "unknown surrogate": r'1}, "x": "\ud800", "y": {"z": 1', "unknown surrogate key": r'1}, "\ud800": {"z": 1',
    "deep priority": '1}, "priority": ' + "[" * 300 + "]" * 300 + ', "x": {"y": 1', "huge timeout": '1}, "timeout": 1e400, "x": {"y": 1',
    "surrogate type": r'1}, "task_type": "\ud800", "x": {"y": 1', "cut short": '"'}
WHOLE = {"empty": b"", "null": b"null", "array": b"[]", "string": b'"x"', "not utf-8": b'{"task_type": "\xff"}',
         "nan": b"NaN", "surrogate": rb'"\ud800"'}
BODIES = {name: (b'{"task_type": "send_email", "payload": {"x": %s}}' % value.encode()) for name, value in HOSTILE.items()}

@pytest.mark.parametrize("body", [*BODIES.values(), *WHOLE.values()], ids=[*BODIES, *("all " + name for name in WHOLE)])
async def test_routes_echoed_input_and_hostile_bodies_break_nothing(body):
    """GOTCHA [echoed-input]: the refusal is JSON itself, and every later answer too."""
    async with serving() as (_, client, queue):
        answer = await client.post("/tasks", content=body, headers={"Content-Type": "application/json"})
        assert answer.is_client_error
        assert (bool(strict_json(answer.text)["detail"]), "X-Request-ID" in answer.headers) == (True, True)
        assert queue.submitted == 0
        for path in ("/tasks", "/metrics", "/health", "/openapi.json"):
            strict_json((await client.get(path)).text)

@pytest.mark.parametrize("value", ["[" * 64 + "]" * 64, "[" * 200 + "]" * 200, '"\\u0000 \\ud83d\\ude00"', "1" + "0" * 400, "-0.0"],
                         ids=["deep", "deeper", "escapes", "big", "minus"])
async def test_routes_take_unusual_bodies_that_are_fine(value):
    async with serving(Gate().handle) as (app, client, _):
        body = '{"task_type": "send_email", "payload": {"x": %s}}' % value
        answer = await client.post("/tasks", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 202
        assert strict_json((await client.get("/tasks")).text)["tasks"][0]["payload"] == strict_json(body)["payload"]

@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
async def test_routes_refuse_another_content_type(content_type):
    async with serving() as (_, client, _):
        answer = await client.post("/tasks", content=b'{"task_type": "send_email"}', headers={"Content-Type": content_type})
        assert (answer.status_code, bool(answer.json()["detail"])) == (422, True)

@pytest.mark.parametrize("chunked", [False, True])
async def test_routes_refuse_a_body_over_the_limit(chunked):
    async def chunks():
        for _ in range(20):
            yield b" " * 5000

    async with serving() as (_, client, _):
        answer = await client.post("/tasks", content=chunks() if chunked else b" " * 65_537)
        assert (answer.status_code, "65536 bytes" in answer.json()["detail"]) == (413, True)
        body = b'{"task_type": "send_email"}'.ljust(65_536)
        assert (await client.post("/tasks", content=body, headers={"Content-Type": "application/json"})).status_code == 202

async def test_routes_document_every_status_that_they_give():
    async with serving() as (_, client, _):
        paths = (await client.get("/openapi.json")).json()["paths"]
        assert (await client.get("/docs")).status_code == 200
    given = {"post /tasks": "202 400 413 422 503", "get /tasks": "200 422", "get /tasks/{task_id}": "200 404",
             "delete /tasks/{task_id}": "200 202 404 409 422", "get /tasks/{task_id}/stream": "200 204 404",
             "get /events": "200", "get /health": "200 503", "get /metrics": "200"}
    for route, statuses in given.items():
        method, path = route.split()
        documented = paths[path][method]["responses"]
        assert set(statuses.split()) <= set(documented), route
        assert all("application/json" in documented[status]["content"] for status in statuses.split() if status[0] == "4")
    for path in ("/tasks/{task_id}/stream", "/events"):
        assert "text/event-stream" in paths[path]["get"]["responses"]["200"]["content"]

async def test_stream_sends_each_change_live_and_ends_with_the_result():
    gate = Gate()
    async with serving(gate.handle, max_workers=1) as (app, _, queue):
        queue.submit(order("before"))
        task_id = queue.submit(order("it")).id
        async with Stream(app, f"/tasks/{task_id}/stream") as stream:
            frames = [await stream.next()]
            gate.let_go("before")
            frames.append(await stream.next())
            for percent in (10, 20, 30):
                gate.report["it"](percent)
                frames.append(await stream.next())
            gate.let_go("it", {"n": 1})
            frames.append(await stream.next())
            assert await stream.next() is None
    seen = [(frame["data"]["status"], frame["data"]["progress"], frame["data"]["attempt"]) for frame in frames]
    assert seen == [("pending", 0, 0), *(("running", percent, 1) for percent in (0, 10, 20, 30)), ("completed", 100, 1)]
    assert [frame["data"].get("result") for frame in frames] == [None] * 5 + [{"n": 1}]
    assert {frame["event"] for frame in frames} == {"progress"}
    ids = [int(frame["id"]) for frame in frames]
    assert ids == sorted(set(ids))
    assert (stream.status, stream.headers["Content-Type"][:17], "X-Request-ID" in stream.headers) == (200, "text/event-stream", True)

async def test_stream_shows_a_retry_as_a_new_attempt_and_a_failure_with_its_error():
    gate = Gate()
    async with serving(gate.handle, backoff_base=0) as (app, _, queue):
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
async def test_stream_of_a_finished_task_sends_its_end_for_whatever_last_event_id(last_event_id):
    gate = Gate()
    async with serving(gate.handle) as (app, _, queue):
        task_id = await bring_to(Status.COMPLETED, queue, gate)
        async with Stream(app, f"/tasks/{task_id}/stream", last_event_id=last_event_id) as stream:
            assert [frame["data"]["status"] for frame in await stream.rest()] == ["completed"]

async def test_stream_reconnect_for_ever_is_stopped_with_204():
    """GOTCHA [reconnect-for-ever]: it comes back with the id of the terminal frame; one before that gets that frame."""
    gate = Gate()
    async with serving(gate.handle) as (_, client, queue):
        task_id = await bring_to(Status.FAILED, queue, gate)
        last = queue.get_task(task_id).version
        answers = [await client.get(f"/tasks/{task_id}/stream", headers={"Last-Event-ID": str(n)}) for n in (last, last - 1)]
        assert [(answer.status_code, answer.text.count("data: ")) for answer in answers] == [(204, 0), (200, 1)]

async def test_stream_last_event_id_of_a_running_task_gets_only_what_is_newer():
    gate = Gate()
    async with serving(gate.handle) as (app, _, queue):
        task_id = await bring_to(Status.RUNNING, queue, gate)
        async with Stream(app, f"/tasks/{task_id}/stream", last_event_id=str(queue.get_task(task_id).version)) as stream:
            await quiet()
            gate.let_go("it")
            assert [frame["data"]["status"] for frame in await stream.rest()] == ["completed"]

async def test_stream_slow_reader_gets_the_latest_state_and_no_backlog():
    """GOTCHA [slow-reader]: it gets what was on its way already, then how things stand now."""
    gate = Gate()
    async with serving(gate.handle) as (app, _, queue):
        task_id = await bring_to(Status.RUNNING, queue, gate)
        async with Stream(app, f"/tasks/{task_id}/stream") as stream:
            await stream.next()
            stream.reading.clear()
            for percent in range(1, 51):
                gate.report["it"](percent)
                await quiet()
            stream.reading.set()
            assert [(await stream.next())["data"]["progress"] for _ in range(2)] == [1, 50]
            gate.let_go("it")
            assert [frame["data"]["progress"] for frame in await stream.rest()] == [100]

async def test_stream_drops_a_reader_that_has_stopped_reading(caplog):
    gate = Gate()
    async with serving(gate.handle, send_timeout=7) as (app, _, queue):
        task_id = await bring_to(Status.RUNNING, queue, gate)
        async with Stream(app, f"/tasks/{task_id}/stream") as stream:
            await stream.next()
            stream.reading.clear()
            gate.report["it"](50)
            await asyncio.sleep(6.9)
            assert queue.watchers == 1
            await asyncio.sleep(0.2)
            assert (queue.watchers, stream.call.done()) == (0, True)
    assert "stopped reading" in caplog.text

@pytest.mark.parametrize("path", ["/tasks/{}/stream", "/events"])
async def test_stream_forgets_a_watcher_that_hangs_up(path):
    gate = Gate()
    async with serving(gate.handle) as (app, _, queue):
        task_id = await bring_to(Status.RUNNING, queue, gate)
        for _ in range(20):
            async with Stream(app, path.format(task_id)) as stream:
                await stream.next()
                assert queue.watchers == 1
            assert queue.watchers == 0
        gate.let_go("it")
        await quiet()
        assert queue._waiting == {}

@pytest.mark.parametrize("path", ["/tasks/{}/stream", "/events"])
async def test_stream_never_entered_leaves_nothing_behind(path):
    """GOTCHA [never-entered]: its client has gone before the response began."""
    async with serving(Gate().handle) as (app, _, queue):
        async with Stream(app, path.format(queue.submit(order()).id)) as stream:
            stream.reading.clear()
            await quiet()
        assert stream.messages.empty()
        assert queue.watchers == 0

async def test_stream_of_a_task_that_is_evicted_before_the_response_begins_still_ends_with_its_end():
    gate = Gate()
    async with serving(gate.handle, keep_finished=0) as (app, _, queue):
        task_id = await bring_to(Status.RUNNING, queue, gate)
        async with Stream(app, f"/tasks/{task_id}/stream") as stream:
            stream.reading.clear()
            await quiet()
            gate.let_go("it", "done")
            await quiet()
            stream.reading.set()
            assert [frame["data"]["status"] for frame in await stream.rest()] == ["completed"]

async def test_stream_keeps_an_idle_connection_alive_with_comments():
    async with serving(Gate().handle, ping_seconds=4) as (app, _, queue):
        async with Stream(app, f"/tasks/{queue.submit(order(delay=60)).id}/stream") as stream:
            assert (await stream.next())["event"] == "progress"
            assert list(await stream.next()) == [""]  # a line that begins with a colon: the client ignores it
        assert now() == pytest.approx(4, abs=0.01)

@pytest.mark.parametrize("path", ["/tasks/{}/stream", "/events"])
async def test_stream_shutdown_order_lets_streams_say_goodbye_first(path, monkeypatch):
    """GOTCHA [shutdown-order]: the server has been told to stop, and waits for the streams. The lifespan runs on."""
    async with serving(Gate().handle) as (app, _, queue):
        async with Stream(app, path.format(queue.submit(order(delay=60)).id)) as stream:
            await stream.next()
            monkeypatch.setattr(AppStatus, "should_exit", True)  # as sse-starlette does on the server's signal
            assert [frame["event"] for frame in await stream.rest()][-1] == "shutdown"
            assert not stream.hung_up.is_set()

async def test_stream_ignores_a_body_that_nobody_asked_for():
    async with serving(Gate().handle) as (app, _, queue):
        async with Stream(app, f"/tasks/{queue.submit(order()).id}/stream", body=b" " * 100_000) as stream:
            assert (await stream.next())["event"] == "progress"

async def test_events_six_connections_are_not_needed_to_watch_many_tasks():
    """GOTCHA [six-connections]: one stream follows them all, live."""
    gate = Gate()
    async with serving(gate.handle, max_workers=10) as (app, _, queue):
        async with Stream(app, "/events") as stream:
            assert (await stream.next())["event"] == "queue"  # no tasks yet
            ids = [queue.submit(order(str(number))).id for number in range(10)]
            await gate.let_all_go()
            completed = []
            while len(completed) < 10:
                frame = await stream.next()
                if frame["data"].get("status") == "completed":
                    completed.append(frame["data"]["id"])
        assert sorted(completed) == sorted(ids)

async def test_events_begin_with_the_latest_tasks_oldest_first_and_without_payload():
    async with serving(Gate().handle) as (app, _, queue):
        ids = [queue.submit(order(delay=60)).id for _ in range(130)]
        async with Stream(app, "/events") as stream:
            frames = [await stream.next() for _ in range(101)]
    assert [frame["event"] for frame in frames] == ["task"] * 100 + ["queue"]
    assert [frame["data"]["id"] for frame in frames[:100]] == ids[30:]
    assert [int(frame["id"]) for frame in frames[:100]] == sorted({int(frame["id"]) for frame in frames[:100]})
    assert set(frames[0]["data"]) == set(taskqueue.TaskStatus.model_fields) - {"payload", "version"}
    assert frames[100]["data"]["tasks"]["pending"] == 130

@pytest.mark.parametrize("resumes", [True, False])
async def test_events_resume_after_the_last_event_id_or_begin_anew_if_it_is_junk(resumes):
    async with serving(Gate().handle) as (app, _, queue):
        tasks = [queue.submit(order(str(number), delay=60)) for number in range(5)]
        last_event_id = str(tasks[2].version if resumes else tasks[4].version + 1)
        async with Stream(app, "/events", last_event_id=last_event_id) as stream:
            frames = [await stream.next() for _ in range(3 if resumes else 6)]
    assert [frame["data"]["id"] for frame in frames[:-1]] == [task.id for task in tasks[3 if resumes else 0 :]]
    assert frames[-1]["event"] == "queue"

async def test_events_slow_reader_gets_each_task_once_in_its_latest_state():
    gate = Gate()
    async with serving(gate.handle) as (app, _, queue):
        async with Stream(app, "/events") as stream:
            await stream.next()
            stream.reading.clear()
            ids = [queue.submit(order(str(number))).id for number in range(3)]
            for percent in range(1, 51):
                await quiet()
                for name in gate.held:
                    gate.report[name](percent)
            await quiet()
            stream.reading.set()
            frames = [await stream.next() for _ in range(8)]
    latest = [(frame["data"]["id"], frame["data"]["progress"]) for frame in frames if frame["event"] == "task"][3:]
    assert latest == [(task_id, 50) for task_id in ids]

# ======================================================================================================================
# App
# Apps side by side, what an import does, and what the file says about itself.

async def test_app_has_a_queue_and_metrics_of_its_own():
    async with serving(Gate().handle) as (_, first, _), serving(Gate().handle) as (_, second, _):
        await first.post("/tasks", json={"task_type": "send_email"})
        assert (await first.get("/tasks")).json()["total"] == 1
        assert (await second.get("/tasks")).json()["total"] == 0
        assert (await second.get("/metrics")).json()["total_requests"] == 1

@pytest.mark.parametrize(("arguments", "environment"), [(["--workers", "2"], {}), (["-w4"], {}), ([], {"WEB_CONCURRENCY": "2"})])
async def test_app_says_that_more_processes_are_more_queues(arguments, environment, monkeypatch, caplog):
    monkeypatch.setattr(sys, "argv", ["uvicorn", "taskqueue:app", *arguments])
    monkeypatch.setenv("WEB_CONCURRENCY", environment.get("WEB_CONCURRENCY", "1"))
    async with serving():
        assert "more than one process" in caplog.text.lower()

def test_app_import_starts_nothing_and_prints_nothing():
    check = "import logging, threading, taskqueue; print(threading.active_count(), logging.root.handlers, taskqueue.app.title)"
    ran = subprocess.run([sys.executable, "-c", check], cwd=HERE, capture_output=True, text=True, timeout=30)
    assert (ran.stdout, ran.stderr) == ("1 [] taskqueue\n", "")

def test_app_inline_metadata_equals_the_requirements():
    """The block of comments by which `uv run taskqueue.py` knows what to install (PEP 723)."""
    source = (HERE / "taskqueue.py").read_text(encoding="utf-8")
    block = re.search(r"^# /// script\n((?:#(?: .*)?\n)+?)# ///$", source, re.MULTILINE)[1]
    metadata = tomllib.loads(re.sub("^# ?", "", block, flags=re.MULTILINE))
    assert metadata["dependencies"] == (HERE / "requirements.txt").read_text(encoding="utf-8").split()
    assert metadata["requires-python"] == ">=3.11"

# ======================================================================================================================
# Demo
# A real server, in a process of its own: signals, sockets and sse-starlette's AppStatus belong to a whole process.

@contextlib.contextmanager
def demo(*arguments):
    """`python taskqueue.py …`, and a client for it. It is killed in the end, and after 30 seconds in any case."""
    process = subprocess.Popen([sys.executable, "taskqueue.py", "--port", "0", "--no-tour", *arguments], cwd=HERE,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8")
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

@posix_only
@pytest.mark.parametrize("task_type", ["resize_image", "generate_report"])  # the latter blocks a thread that can't be stopped
def test_demo_ctrl_c_ends_open_streams_cleanly_and_exits(task_type):
    with demo("--pace", "1000", "--drain-seconds", "0") as (process, client):
        task = client.post("/tasks", json={"task_type": task_type}).json()
        with client.stream("GET", f"/tasks/{task['id']}/stream") as stream, client.stream("GET", "/events") as events:
            lines = stream.iter_lines()
            while "running" not in next(lines):
                pass
            process.send_signal(signal.SIGINT)
            assert "event: shutdown" in list(lines)
            assert "event: shutdown" in list(events.iter_lines())
        output, _ = process.communicate(timeout=5)
    assert process.returncode == 0
    assert not re.search("Traceback|ERROR|CRITICAL", output)

@posix_only
def test_demo_second_ctrl_c_ends_it_at_once():
    with demo("--pace", "1000", "--drain-seconds", "600") as (process, client):
        task = client.post("/tasks", json={"task_type": "resize_image"}).json()
        with client.stream("GET", f"/tasks/{task['id']}/stream") as stream:
            lines = stream.iter_lines()
            while "running" not in next(lines):
                pass
            process.send_signal(signal.SIGINT)
            list(lines)  # to its end: from here on the server waits for the handler
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=5) == 128 + signal.SIGINT

@posix_only
def test_demo_ctrl_c_does_not_wait_for_a_reader_that_has_stopped_reading():
    with demo("--pace", "0", "--failure-rate", "0", "--send-timeout", "600") as (process, client):
        for _ in range(100):  # 6 MB of results, more than the sockets in between can hold
            client.post("/tasks", json={"task_type": "resize_image", "payload": {"url": "x" * 60_000}})
        while client.get("/health").json()["tasks"]["completed"] < 100:
            pass
        with socket.create_connection((client.base_url.host, client.base_url.port)) as stalled:
            stalled.sendall(b"GET /events HTTP/1.1\r\nHost: test\r\n\r\n")
            assert stalled.recv(15) == b"HTTP/1.1 200 OK"
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=5)
    assert (process.returncode, re.findall("Traceback|ERROR|CRITICAL", output)) == (0, [])

def run_demo(*arguments):
    return subprocess.run([sys.executable, "taskqueue.py", *arguments], cwd=HERE, capture_output=True, text=True,
                          encoding="utf-8", timeout=30)

def test_demo_once_takes_the_tour_and_exits_with_0():
    ran = run_demo("--once", "--port", "0", "--pace", "0.02")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ("✓" in ran.stdout, "✗" in ran.stdout) == (True, False)

def test_demo_port_in_use_is_one_clear_line_and_exit_1():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ran = run_demo("--port", str(taken.getsockname()[1]))
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (1, "", 1)
    assert "Can't listen on 127.0.0.1" in ran.stderr

def test_demo_has_a_flag_for_each_setting(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["taskqueue.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        taskqueue.main()
    flags = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert flags >= {"--host", "--port", "--once", "--no-tour"}
    assert flags >= {"--" + field.name.replace("_", "-") for field in dataclasses.fields(Settings)}

def test_demo_refuses_a_flag_out_of_range(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["taskqueue.py", "--port", "0", "--max-workers", "0"])
    with pytest.raises(SystemExit, match="2"):
        taskqueue.main()
    assert "max_workers" in capsys.readouterr().err
