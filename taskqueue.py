# /// script
# requires-python = ">=3.11"
# dependencies = ["fastapi>=0.120.1", "uvicorn[standard]>=0.30", "pydantic>=2.10", "sse-starlette>=3.4.1",
#                 "httpx>=0.27", "pytest>=8"]
# ///
"""An async task queue service in one file: FastAPI, asyncio and Server-Sent Events, all in memory.

The life of one task, from its request to the last frame of its stream:
    POST /tasks ──► TaskSubmission ──► submit() ──► ready heap ◄────── timer ◄──────┐
                    refuses bad input     │         best first         delay and    │
                                          ▼             │              backoff      │ retry
                                     Task record        ▼                           │
                                          ▲        worker_loop() takes a slot,      │
                                _move() and _report()   │     then the best task    │
                                write it, and wake      ▼                           │
                                          │        _attempt() ──► your handler      │
                                          ▼                            │            │
    GET /tasks/{id}/stream ◄────────── watch()          _settle() ◄────┴────────────┘

The words used throughout:
    task         one piece of work: a `Task` record inside, a `TaskStatus` picture of it outside
    handler      the function that does the work of one task type
    attempt      one run of a handler for a task; a retry is the next attempt
    slot         the right to run one attempt; there are `max_workers` of them
    worker loop  the one coroutine that takes a slot, then the best task, and starts an attempt
    sequence     the number of a submission: the order within one priority, and no time of day
    version      the number of a change: a stream sends it as `id:` and gets it back as Last-Event-ID
    watcher      a stream that waits for changes; all it holds is the last version that it sent

Read it top to bottom; no section needs to know those below it:
    Settings · Models · Queue · Handlers · Workers · Middleware · Page · Routes · App · Demo
`WHY` gives the choice made and the one rejected. `GOTCHA [name]` is a bug that the code beside it prevents, and there
is a test of that name. `SIMPLIFIED` says what production would do instead.
`python taskqueue.py` is a live demo, `uvicorn taskqueue:app --reload` the service alone, `python -m pytest` its proof.
"""

import argparse, asyncio, base64, bisect, contextlib, functools, gc, hashlib, heapq, inspect, itertools, json, logging
import math, os, random, re, secrets, socket, sys, threading, time
from collections import Counter, defaultdict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from enum import IntEnum, StrEnum
from types import FrameType, SimpleNamespace
from typing import Annotated, Any, Self, get_type_hints

import httpx, pydantic.dataclasses, uvicorn
from fastapi import APIRouter, FastAPI, Header, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, StrictInt, TypeAdapter
from pydantic import ValidationError, ValidationInfo, field_validator
from pydantic_core import from_json, to_json, to_jsonable_python
from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import AppStatus, EventSourceResponse, SendTimeoutError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("taskqueue")

# ===== Settings =======================================================================================================
# Every knob for operators, with its unit, range and default. The object is frozen, and no setting is a global: two apps
# with different settings can live in one process, as in the tests. The demo's flags are made from this class.

@pydantic.dataclasses.dataclass(frozen=True)
class Settings:
    """The knobs of one queue. Raises ValidationError, a ValueError, for a value out of range."""

    max_workers: int = Field(default=3, ge=1, le=1000, description="attempts that run at once")
    max_pending: int = Field(default=1000, ge=1, description="tasks that may wait; one more gets a 503, no retry does")
    keep_finished: int = Field(default=1000, ge=0, description="finished tasks that are kept; the oldest goes first")
    drain_seconds: float = Field(default=5.0, ge=0, description="seconds that running handlers get at shutdown")
    backoff_base: float = Field(default=0.5, ge=0, description="longest backoff before the first retry, in seconds")
    backoff_cap: float = Field(default=30.0, ge=0, le=10**9, description="longest backoff of all, in seconds")
    send_timeout: float = Field(default=10.0, gt=0, description="seconds until a stalled stream reader is dropped")
    ping_seconds: float = Field(default=15.0, gt=0, description="seconds between the keep-alives of a stream")
    max_body: int = Field(default=65_536, ge=1, description="largest request body, in bytes; parsed, some 40 times it")
    failure_rate: float = Field(default=0.1, ge=0, le=1, description="simulated handlers: their chance to fail")
    pace: float = Field(default=1.0, ge=0, description="simulated handlers: their seconds are multiplied by this")

# ===== Models ================================================================================== course module 02 =====
# What may come in, and what goes out. TaskSubmission is strict: an order that is wrong in any detail is refused at the
# door, with the place and the reason; only the payload may have keys that its model doesn't name.

class TaskType(StrEnum):
    """The kinds of work. A new one takes a member here, a payload model, and a function under @handler."""
    RESIZE_IMAGE = "resize_image"
    GENERATE_REPORT = "generate_report"
    SEND_EMAIL = "send_email"

class Priority(IntEnum):  # lower runs first
    HIGH = 1
    MEDIUM = 5
    LOW = 10

class Status(StrEnum):
    """Where a task is in its life. TRANSITIONS, in the next section, says where it can go from there."""
    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

FINAL = frozenset({Status.COMPLETED, Status.FAILED, Status.CANCELLED})

class Payload(BaseModel):
    """What a handler is given. Strict: "800" is not 800. Keys that the model doesn't name are kept."""
    model_config = ConfigDict(strict=True, extra="allow")

class ResizeImagePayload(Payload):
    url: str = "https://example.com/cat.jpg"
    width: int = Field(800, ge=1)
    height: int = Field(600, ge=1)

class GenerateReportPayload(Payload):
    report_id: str | int = "weekly"
    format: str = "pdf"

class SendEmailPayload(Payload):
    to: str = "someone@example.com"
    subject: str = "Hello"
    body: str = ""

PAYLOAD_MODELS: defaultdict[TaskType, TypeAdapter[Any]] = defaultdict(lambda: TypeAdapter(Payload))  # @handler fills it

def plain_json(value: Any) -> Any:
    """Return a copy of `value` as JSON carries it: (1, 2) → [1, 2], a model → a dict. Raises what `json` raises."""
    # GOTCHA [bad-result]: a handler returns anything. NaN would show as null; but one "\ud800", object() or too deep
    # list in one task, and every later GET /tasks is a 500. So what doesn't survive the way to JSON and back is refused
    # where it comes in: here, by failing that one task. A payload goes that way in `parse_payload`, and gets a 422.
    return None if value is None else from_json(JSON_ENCODER.encode(value), allow_inf_nan=False)  # None: the usual one

def make_jsonable(part: Any) -> Any:
    """Turn what `json` doesn't know (a model, a date, a set) into what it does."""
    if isinstance(part, Iterator):  # Pydantic would run it, here on the event loop, as it does one in a dataclass
        raise ValueError("a result can't hold an iterator, nor can a handler yield")
    return list(part) if isinstance(part, set | frozenset | deque) else to_jsonable_python(part)

JSON_ENCODER = json.JSONEncoder(default=make_jsonable)

def parse_payload(task_type: TaskType, payload: dict[str, Any]) -> Any:
    """The payload as its task type's model. By way of JSON: nothing is shared, strict models take text for a date."""
    return PAYLOAD_MODELS[task_type].validate_json(to_json(payload))

# An enum alone would also take True and 1.0, which are equal to 1.
PlainPriority = Annotated[Priority, Field(strict=False), BeforeValidator(TypeAdapter(StrictInt).validate_python)]

class TaskSubmission(BaseModel):
    """An order for a task. Unknown fields are refused: a typo is a 422, not a surprise."""
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    task_type: Annotated[TaskType, Field(strict=False, examples=["resize_image"])]
    payload: dict[str, JsonValue] = Field({}, validate_default=True, examples=[{"url": "a.jpg", "width": 400}])
    priority: PlainPriority = Field(Priority.MEDIUM, description="1 high, 5 medium, 10 low")
    max_retries: int = Field(0, ge=0, le=10, description="further attempts after a failed one")
    timeout: float = Field(60, gt=0, le=3600, description="seconds for one attempt")
    delay: float = Field(0, ge=0, le=86_400, description="seconds before it may start")

    @field_validator("payload")
    @classmethod
    def check_payload(cls, payload: dict[str, Any], info: ValidationInfo) -> Any:
        """Check it against its task type's model, whose errors Pydantic merges into ours; keep it as it was sent."""
        if "task_type" in info.data:  # else it was refused already
            parse_payload(info.data["task_type"], payload)
        return payload

class TaskStatus(BaseModel):
    """A picture of a task at one moment. WHY not the queue's own `Task`: that one changes, in its reader's hands."""
    model_config = ConfigDict(frozen=True, from_attributes=True)
    id: str
    task_type: TaskType
    priority: Priority
    payload: dict[str, Any] = Field(description="as it was sent")
    status: Status
    progress: int = Field(ge=0, le=100, description="per cent of this attempt")
    attempt: int = Field(description="0 before the first")
    max_retries: int
    result: Any = Field(description="what the handler returned, once completed")
    error: str | None = Field(description="why the latest attempt failed; null once another begins")
    request_id: str | None = Field(description="X-Request-ID of the request that submitted it")
    created_at: datetime
    not_before: datetime | None = Field(description="the end of its delay, or of its latest backoff")
    started_at: datetime | None = Field(description="when the latest attempt began")
    completed_at: datetime | None = Field(description="when it reached its final status")
    version: int = Field(exclude=True)  # over HTTP it is the `id:` of a frame

    @functools.cached_property
    def progress_frame(self) -> bytes:
        """This change, as the task's own stream sends it: encoded once, however many watch."""
        extra = {Status.COMPLETED: {"result"}, Status.FAILED: {"error"}}.get(self.status, set())
        data = self.model_dump_json(include={"status", "progress", "attempt"} | extra)
        return encode_frame("progress", data, self.version)

    @functools.cached_property
    def task_frame(self) -> bytes:
        """This change, as the stream of all tasks sends it: without the payload, which can be large."""
        return encode_frame("task", self.model_dump_json(exclude={"payload"}), self.version)

def encode_frame(event: str, data: str, version: int | None = None) -> bytes:
    """A frame: id:, event: and data: lines, and an empty one (HTML standard, 9.2.5). "error" is EventSource's own."""
    return ServerSentEvent(data, event=event, id=None if version is None else str(version), sep="\n").encode()

class TaskList(BaseModel):
    tasks: list[TaskStatus]
    total: int = Field(description="every match, not just this page")

# ===== Queue =================================================================================== course module 05 =====
# The records of all tasks, and who may change them. Each fact has one owner: `_move` is the only writer of a task's
# `status`, `_changed` of its `version`, and `_schedule` the only way into the ready heap. Except for the watchers, all
# this is plain functions that never await: no other coroutine can run between two of their lines, so no lock is needed.
# Another thread can: call them in the loop's own, as from an `async def` route. Of HTTP nothing is known here.

class QueueError(Exception): """What a caller of the queue can get wrong, or be refused."""
class TaskNotFound(QueueError): """No such task: the id is wrong, or the task was evicted."""
class TaskNotCancellable(QueueError): """The task has ended; or it runs, and `force` was not given."""
class IdempotencyKeyReused(QueueError): """The key came with another submission before."""
class QueueFull(QueueError): """`max_pending` tasks are waiting."""
class QueueStopped(QueueError): """The queue is not running: it was not entered yet, or it stops."""
class IllegalTransition(Exception): """A bug in this file: a task was to move where it can't go."""

TRANSITIONS: dict[Status, set[Status]] = {
    Status.PENDING: {Status.RUNNING, Status.CANCELLED},
    Status.RUNNING: {Status.COMPLETED, Status.FAILED, Status.CANCELLED, Status.PENDING},  # PENDING: a retry
    Status.COMPLETED: set(), Status.FAILED: set(), Status.CANCELLED: set()}
STOP_CAUSES = (None, "timeout", "cancel", "shutdown")  # why an attempt was asked to stop; each outranks those before

@dataclass(slots=True, eq=False)  # eq=False: a record is equal to itself alone, and can be a dict's key
class Task:
    """All that is known of one task. Private to the queue and its workers."""
    id: str
    sequence: int
    created_at: datetime
    request_id: str | None
    idempotency_key: str | None  # the client's name for its order: sent again, it makes no second task
    task_type: TaskType
    priority: Priority
    payload: dict[str, Any]
    max_retries: int
    timeout: float
    status: Status = Status.PENDING
    progress: int = 0
    attempt: int = 0
    result: Any = None
    error: str | None = None
    not_before: datetime | None = None
    started_at: datetime | None = None
    completed_at: datetime | None = None
    version: int = 0
    view: TaskStatus | None = None  # the picture of this version, once it was asked for
    timer: asyncio.TimerHandle | None = None  # the end of its delay or backoff
    deadline: float = math.inf  # of the attempt that runs, by the clock of the event loop
    run: "asyncio.Task[None] | None" = None  # the attempt that runs now, as asyncio's kind of task
    stop_cause: str | None = None  # one of STOP_CAUSES

# GOTCHA [tie-break]: a heap compares its entries from left to right, and no two of ours have the same sequence, so it
# never gets to the task. By a time instead, a clock that steps back shuffles tasks, and a tie compares two Tasks:
# a TypeError, as (priority, task) is one for equal priorities.
ReadyEntry = tuple[Priority, int, Task]

class ReadyHeap(asyncio.PriorityQueue[ReadyEntry]):
    """The tasks that may start now. A heap is a list whose first entry is always the best; this one can also forget."""

    def prune(self) -> None:
        """Drop the entries of tasks that no longer wait."""
        heap: list[ReadyEntry] = self._queue  # type: ignore[attr-defined]  # asyncio's own, for subclasses
        heap[:] = [entry for entry in heap if entry[2].status is Status.PENDING]
        heapq.heapify(heap)

class Shelf:
    """The tasks of one status, by sequence, in blocks of neighbouring numbers. To add or remove one costs the same for
    any number of them, in whatever order they come and go; and a page of a list sorts only the blocks it touches."""
    BLOCK = 2048

    def __init__(self) -> None:
        self.blocks: defaultdict[int, dict[int, Task]] = defaultdict(dict)
        self.count = 0

    def add(self, task: Task) -> None:
        self.blocks[task.sequence // self.BLOCK][task.sequence] = task
        self.count += 1

    def remove(self, task: Task) -> None:
        block = self.blocks[task.sequence // self.BLOCK]
        del block[task.sequence]
        if not block:
            del self.blocks[task.sequence // self.BLOCK]
        self.count -= 1

class TaskStore:
    """Submit, look up, list, cancel and watch tasks. TaskQueue, further down, adds those who run them."""
    SNAPSHOT = 100  # tasks that a new watcher of everything is shown

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.stopping = True  # until `async with` begins
        self.submitted = self.evicted = self.watchers = 0
        # WHY from the clock and not from 0: a client may come back with the Last-Event-ID of an earlier life of this
        # server, so each life must number its changes above those of all lives before.
        self.version = self.first_version = time.time_ns() // 1000
        self._tasks: dict[str, Task] = {}  # by id; the one that changed last stands last
        self._shelves = {status: Shelf() for status in Status}
        self._ready = ReadyHeap()
        self._finished: deque[Task] = deque()  # in the order in which they finished
        self._keys: dict[str, tuple[Task, bytes]] = {}  # by idempotency key, with a hash of its submission
        self._events: dict[Task | None, asyncio.Event] = {}  # what watchers wait on; None: any change

    # -- what callers use
    def submit(self, submission: TaskSubmission, request_id: str | None = None,
               idempotency_key: str | None = None) -> TaskStatus:
        """Take in a task and return its first status; or, if it came before with that idempotency key, its present one.
        Raises QueueFull, QueueStopped and IdempotencyKeyReused."""
        asyncio.get_running_loop()  # raises in a thread, as of a plain `def` route: no half-made task
        fingerprint = hashlib.sha256(submission.model_dump_json().encode()).digest() if idempotency_key else b""
        if idempotency_key and (earlier := self._keys.get(idempotency_key)):
            if earlier[1] != fingerprint:
                raise IdempotencyKeyReused("this idempotency key came with another submission before")
            return TaskStatus.model_validate(earlier[0])
        if self.stopping:
            raise QueueStopped("The queue is not running, and takes no tasks")
        # GOTCHA [await-put]: with a bounded queue, `await queue.put()` waits until there is room, and with it the
        # client, who sees a server that hangs. Nothing in here awaits: it says yes or no, and at once.
        if self.count(Status.PENDING) >= self.settings.max_pending:
            raise QueueFull(f"{self.settings.max_pending} tasks are waiting already; try again later")
        self.submitted += 1
        task = Task(secrets.token_hex(16), self.submitted, datetime.now(UTC), request_id, idempotency_key,
            submission.task_type, submission.priority, submission.payload, submission.max_retries, submission.timeout)
        self._shelves[Status.PENDING].add(task)
        if idempotency_key:
            self._keys[idempotency_key] = task, fingerprint
        self._schedule(task, submission.delay)
        self._changed(task)
        return TaskStatus.model_validate(task)

    def get_task(self, task_id: str) -> TaskStatus:
        """The task as it is now. Raises TaskNotFound."""
        return self._view(self._find(task_id))

    def list_tasks(
            self, status: Status | None = None, limit: int = 100, offset: int = 0) -> tuple[list[TaskStatus], int]:
        """One page, newest first, and how many tasks there are with that status (None: with any)."""
        statuses = list(Status) if status is None else [status]
        total = sum(map(self.count, statuses))
        start = min(offset, total)
        page = itertools.islice(self._newest_first(*statuses), start, start + limit)
        return [TaskStatus.model_validate(task) for task in page], total

    def count(self, status: Status) -> int:
        return self._shelves[status].count

    def cancel(self, task_id: str, force: bool = False) -> TaskStatus:
        """Cancel a waiting task at once; with `force`, ask a running one to stop. That one is returned as `running`: it
        is so until its handler has let go. Raises TaskNotFound, and TaskNotCancellable."""
        task = self._find(task_id)
        if task.status is Status.PENDING:
            self._move(task, Status.CANCELLED)
            # GOTCHA [lazy-cancel]: a heap can't cheaply lose an entry from its middle. That of a cancelled task stays
            # until it is popped, where `worker_loop` skips it. But while no slot is free nothing is popped: submit
            # and cancel all day, and memory is full. So at 64, and a tenth, more entries than tasks wait, it is swept.
            if self._ready.qsize() > 64 + 1.1 * self.count(Status.PENDING):
                self._ready.prune()
        elif task.status is Status.RUNNING and force:
            self._stop(task, "cancel")
        else:
            raise TaskNotCancellable(f"The task is {task.status}: pending ones can be cancelled, running ones by force")
        return TaskStatus.model_validate(task)

    def watch(self, task_id: str, last_event_id: int = 0) -> AsyncGenerator[TaskStatus, None]:
        """Iterate over the task's states after version `last_event_id`: the present one, then the latest when it has
        changed, to the final one, or until the queue stops. Raises TaskNotFound here, not when iterated."""
        return self._watch(self._find(task_id), last_event_id)

    async def _watch(self, task: Task, sent: int) -> AsyncGenerator[TaskStatus, None]:
        sent = sent if sent <= task.version else 0  # junk, if the task never had that version
        # GOTCHA [never-entered]: if the client is gone before its response begins, this generator is never started, and
        # its `finally` never runs: what was registered for it outside would stay for ever. So both happen in here.
        self.watchers += 1
        try:
            # GOTCHA [snapshot-then-subscribe]: read the state, then subscribe, and a change between the two is lost;
            # subscribe first, and older events follow a newer state. Here there is nothing to subscribe to: look, and
            # wait if there is nothing new. Nothing runs between the two, for there is no await before the wait.
            # GOTCHA [slow-reader]: with a queue for each watcher, a browser on a bad line has us keep all that it has
            # not read. One that holds just a number wakes up to the latest state; what it missed is kept nowhere.
            while True:
                if task.version > sent:
                    sent = task.version
                    yield self._view(task)
                elif task.status in FINAL or self.stopping:
                    return
                else:
                    await self._next_change(task)
        finally:
            self.watchers -= 1

    async def watch_all(self, last_event_id: int = 0) -> AsyncGenerator[list[TaskStatus], None]:
        """Yield lists of tasks in their latest state, the one that changed first in front.
        First the latest SNAPSHOT tasks or, if `last_event_id` is a version of ours, all that have changed since; then
        what changes, until the queue stops. The first list can be empty."""
        sent = last_event_id if self.first_version < last_event_id <= self.version else 0
        changes = self._changes_since(sent, at_most=None if sent else self.SNAPSHOT)
        self.watchers += 1
        try:
            while True:
                yield changes
                sent = changes[-1].version if changes else sent
                while not (changes := self._changes_since(sent)):
                    if self.stopping:
                        return
                    await self._next_change(None)
        finally:
            self.watchers -= 1

    def _changes_since(self, version: int, at_most: int | None = None) -> list[TaskStatus]:
        newest_first = itertools.takewhile(lambda task: task.version > version, reversed(self._tasks.values()))
        return [self._view(task) for task in itertools.islice(newest_first, at_most)][::-1]

    def _next_change(self, of: Task | None) -> Awaitable[object]:
        """To await: until `of` changes (None: until any task does), or the queue stops."""
        if not (event := self._events.get(of)):
            event = self._events[of] = asyncio.Event()
        return event.wait()

    def begin_shutdown(self) -> None:
        """From now on refuse submissions, and end every watch. What runs, runs on; what waits may still be started."""
        self.stopping = True
        while self._events:
            self._events.popitem()[1].set()

    # -- the owners of the facts
    def _find(self, task_id: str) -> Task:
        if task := self._tasks.get(task_id):
            return task
        raise TaskNotFound("No task has this id: it never was, or it was evicted")

    def _newest_first(self, *statuses: Status) -> Iterator[Task]:
        """Those tasks. Each block is a copy: tasks may move meanwhile, and one that did may still come."""
        shelves = [self._shelves[status] for status in statuses]
        for number in sorted(set[int]().union(*(shelf.blocks for shelf in shelves)), reverse=True):
            block: dict[int, Task] = {}
            for shelf in shelves:
                block |= shelf.blocks.get(number, {})
            yield from (block[sequence] for sequence in sorted(block, reverse=True))

    def _view(self, task: Task) -> TaskStatus:
        """The picture of this version, kept with its frames for all who watch or poll it; a list makes it anew."""
        if task.view is None:
            task.view = TaskStatus.model_validate(task)
        return task.view

    def _changed(self, task: Task) -> None:
        """Number a change, and wake those who wait for it."""
        self.version += 1
        task.version = self.version
        task.view = None
        self._tasks[task.id] = self._tasks.pop(task.id, task)  # a new one comes in; a known one moves to the end
        for of in (task, None) if self._events else ():
            if event := self._events.pop(of, None):  # who waits next makes a new one
                event.set()

    def _schedule(self, task: Task, delay: float) -> None:
        """Put the task into the ready heap, now or `delay` seconds later."""
        # GOTCHA [retry-keeps-priority]: a retry must come back to where it stood, not behind all that came since.
        entry = (task.priority, task.sequence, task)
        if delay > 0:
            task.not_before = datetime.now(UTC) + timedelta(seconds=delay)
            # GOTCHA [backoff-holds-slot]: `await asyncio.sleep(backoff)` in the attempt keeps its slot all the while;
            # a few tasks that fail, and nothing else runs. A timer holds nothing.
            task.timer = asyncio.get_running_loop().call_later(delay, self._ready.put_nowait, entry)
        else:
            self._ready.put_nowait(entry)

    def _move(self, task: Task, status: Status, result: Any = None, error: str | None = None) -> None:
        """Move a task to another state: the one writer of `status`."""
        # GOTCHA [terminal-is-final]: a cancel and a completion can meet in one step of the loop. Where each just
        # writes, the later one wins, and a stream sends two endings. Here the first one wins; a second one raises.
        if status not in TRANSITIONS[task.status]:
            raise IllegalTransition(f"task {task.id}: {task.status} → {status}")
        if task.timer:
            task.timer.cancel()
            task.timer = None
        self._shelves[task.status].remove(task)
        self._shelves[status].add(task)
        task.status, task.result, task.error = status, result, error
        if status in FINAL:
            task.completed_at = datetime.now(UTC)
            self._finished.append(task)
        self._changed(task)
        # GOTCHA [unbounded-history]: a dict of every task there ever was is a leak; but to evict simply the oldest can
        # hit one that still runs. `_finished` holds only ended ones.
        if len(self._finished) > self.settings.keep_finished:
            self._evict(self._finished.popleft())

    def _evict(self, task: Task) -> None:
        self.evicted += 1
        del self._tasks[task.id]
        self._shelves[task.status].remove(task)
        if task.idempotency_key:
            del self._keys[task.idempotency_key]

    def _stop(self, task: Task, cause: str) -> None:
        """Ask the attempt that runs to stop; `_settle`, under Workers, sees to what comes of it.
        WHY not `asyncio.timeout()`: it knows but one of the three causes, and says it by an exception."""
        # GOTCHA [whose-timeout]: our deadline, a handler's own TimeoutError, a client's cancel and a shutdown can look
        # alike when they come out of a handler, and it may swallow or replace any of them. So nobody guesses from an
        # exception: the cause is written down before the cancel, and a lesser one can't replace it.
        if task.run and STOP_CAUSES.index(cause) > STOP_CAUSES.index(task.stop_cause):
            task.stop_cause = cause
            # GOTCHA [cancel-before-first-step]: an asyncio task that is cancelled before its first step runs none of
            # its code, not even a `finally`. So `_settle` would not be called: the slot lost, the task `running` for
            # ever. call_soon() is first in, first out, and the first step was put in there before.
            task.run.get_loop().call_soon(task.run.cancel)

# ===== Handlers ================================================================================ course module 05 =====
# The functions that do the work, and how one of them is called. A handler takes its payload, as the model that it names
# in its annotation, and a function to report progress with; it returns what JSON can carry. A plain `def` runs in a
# thread of its own. Handlers know nothing of queues, so each can be tested, or moved to another one, as it is.

UpdateProgress = Callable[[float], None]  # per cent, from 0 to 100; raises ValueError for anything else
Handler = Callable[[Any, UpdateProgress], Any]  # an `async def` returns an awaitable of its result
HANDLERS: dict[TaskType, Handler] = {}
current_settings = ContextVar("current_settings", default=Settings())  # each queue's attempts see their own

def handler(task_type: TaskType) -> Callable[[Handler], Handler]:
    """Register the function, and its payload's annotation as the type's model, whatever `handlers` an app has."""
    def register(function: Handler) -> Handler:
        HANDLERS[task_type] = function
        first_parameter = next(iter(inspect.signature(function).parameters))
        PAYLOAD_MODELS[task_type] = TypeAdapter(get_type_hints(function).get(first_parameter, Payload))
        return function
    return register

async def process_task(task_type: TaskType, payload: BaseModel | dict[str, Any], update_progress: UpdateProgress,
                       handlers: Mapping[TaskType, Handler] | None = None) -> Any:
    """Call the handler of `task_type` and return its result; a plain dict is validated first.
    Raises ValidationError for a bad dict, LookupError if there is no handler, and what the handler raises."""
    function = (HANDLERS if handlers is None else handlers).get(task_type)
    if function is None:
        raise LookupError(f"no handler is registered for {task_type}")
    if isinstance(payload, dict):
        payload = parse_payload(task_type, payload)
    if inspect.iscoroutinefunction(function):
        return await function(payload, update_progress)
    result = await run_in_thread(function, payload, update_progress)
    return await result if inspect.isawaitable(result) else result  # of a `def` that wraps an `async def`

async def run_in_thread(function: Handler, payload: Any, update_progress: UpdateProgress) -> Any:
    """Call a plain `def` handler in a thread, wait for its end, and return or raise as it did. A thread can't be
    interrupted: when we are cancelled, its next `update_progress` raises CancelledError, and we wait on, with its slot.
    WHY not `asyncio.to_thread()`: Python joins its threads at exit, so one stuck handler would hang Ctrl-C for ever. So
    would this wait: don't copy it without `TaskQueue.__aexit__`, which leaves behind whoever doesn't stop."""
    loop, stopped = asyncio.get_running_loop(), threading.Event()
    ended: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()

    def report(percent: float) -> None:
        if stopped.is_set():
            raise asyncio.CancelledError("this attempt was asked to stop")
        update_progress(percent)

    def work() -> None:
        try:
            outcome: tuple[Any, BaseException | None] = function(payload, report), None
        except BaseException as error:
            outcome = None, error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(ended.set_result, outcome)

    # GOTCHA [blocking-handler]: on the event loop, `time.sleep(5)` stops every request, stream and timer of the process
    # for five seconds. In a thread it holds only its slot.
    threading.Thread(target=copy_context().run, args=(work,), name="handler", daemon=True).start()
    while not ended.done():
        try:
            await asyncio.wait([ended])  # unlike `await ended`, a cancel of us leaves it alone
        except asyncio.CancelledError:
            stopped.set()
    result, error = ended.result()
    if error is not None or stopped.is_set():
        raise asyncio.CancelledError() if error is None else error
    return result

def simulate(stages: list[str], seconds: float) -> Iterator[tuple[float, float]]:
    """The handlers below only simulate. Yield, for each stage, its seconds and the per cent done then; maybe fail."""
    settings = current_settings.get()
    fails_at = random.choice(stages) if random.random() < settings.failure_rate else None
    for number, stage in enumerate(stages, start=1):
        yield seconds * settings.pace, 100 * number / len(stages)
        if stage == fails_at:
            raise RuntimeError(f"simulated failure while {stage}")

@handler(TaskType.RESIZE_IMAGE)
async def resize_image(payload: ResizeImagePayload, update_progress: UpdateProgress) -> dict[str, Any]:
    for seconds, percent in simulate(["downloading", "decoding", "scaling", "saving"], 0.5):
        await asyncio.sleep(seconds)
        update_progress(percent)
    return {"url": payload.url, "size": f"{payload.width}x{payload.height}"}

@handler(TaskType.GENERATE_REPORT)
def generate_report(payload: GenerateReportPayload, update_progress: UpdateProgress) -> dict[str, Any]:
    """A plain `def`, as one writes it around a library that blocks."""
    for seconds, percent in simulate(["querying", "aggregating", "charting", "rendering"], 0.75):
        time.sleep(seconds)
        update_progress(percent)
    return {"file": f"report-{payload.report_id}.{payload.format}", "pages": random.randint(3, 40)}

@handler(TaskType.SEND_EMAIL)
async def send_email(payload: SendEmailPayload, update_progress: UpdateProgress) -> dict[str, Any]:
    """Fails for every address under `.invalid`, a domain that can't exist (RFC 2606)."""
    for seconds, percent in simulate(["rendering", "connecting", "sending"], 0.3):
        await asyncio.sleep(seconds)
        if payload.to.endswith(".invalid"):
            raise ConnectionError(f"no mail server for {payload.to}")
        update_progress(percent)
    return {"to": payload.to, "message_id": f"<{secrets.token_hex(6)}@taskqueue.example>"}

# ===== Workers ================================================================================= course module 05 =====
# What runs the tasks. One loop takes a slot, and then the best task. Each attempt is an asyncio task of its own,
# and whatever its end, `_settle` deals with it: there the slot is given back that `worker_loop` took. No HTTP here.

def backoff_delay(attempt: int, settings: Settings) -> float:
    """Seconds to wait after attempt number `attempt` has failed: exponential, capped, with full jitter.
    With base 0.5 and cap 30, at most 0.5, 1, 2, 4, 8, 16, 30, 30 … Random over the whole range, so that tasks that
    failed together don't come back together (Brooker, "Exponential Backoff And Jitter", AWS, 2015)."""
    return random.uniform(0, min(settings.backoff_cap, settings.backoff_base * 2 ** (attempt - 1)))

def describe(error: BaseException) -> str:
    """ConnectionError("no route") → "ConnectionError: no route". Short, and always text that JSON can carry."""
    try:
        text = f"{type(error).__name__}: {error}".removesuffix(": ")
    except BaseException:  # its own __str__ can raise anything too
        text = type(error).__name__
    return text[:1000].encode(errors="replace").decode()

class TaskQueue(TaskStore):
    """The store and its workers: `async with TaskQueue(settings, handlers) as queue: …`
    Leaving the block stops it: no new tasks; `drain_seconds` for the handlers that run, then they are asked to
    stop; and all that is left ends as `cancelled`."""
    STUBBORN_SECONDS = 0.2  # how long a stop waits for handlers that ignore their cancellation

    def __init__(self, settings: Settings | None = None, handlers: Mapping[TaskType, Handler] | None = None) -> None:
        super().__init__(settings or Settings())
        self.handlers = HANDLERS if handlers is None else handlers
        # GOTCHA [one-loop]: asyncio's primitives belong to the event loop in which they are first waited for. Made at
        # import, they break in the second app, or the second test, of a process. So each queue makes its own.
        self._slots = asyncio.Semaphore(self.settings.max_workers)
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_at = math.inf  # the next deadline

    async def __aenter__(self) -> Self:
        self._loop, self._thread_id = asyncio.get_running_loop(), threading.get_ident()
        self._worker = asyncio.create_task(self.worker_loop(), name="worker loop")
        self._worker.add_done_callback(self._report_death)
        self.stopping = False
        return self

    async def __aexit__(self, *_: object) -> None:
        self.begin_shutdown()
        self._worker.cancel()
        try:
            await self._wait_for_running(self.settings.drain_seconds)
        finally:  # who is cancelled while it drains, as by a Ctrl-C, cuts that short and no more
            for task in self._newest_first(Status.RUNNING):
                self._stop(task, "shutdown")
            await self._wait_for_running(self.STUBBORN_SECONDS)
            for task in self._newest_first(Status.RUNNING, Status.PENDING):
                if task.run:
                    logger.warning("[%s] task %s ignores its cancellation: left behind", task.request_id, task.id)
                    asyncio._unregister_task(task.run)  # or asyncio.run() would wait for it, for ever
                    task.run._log_destroy_pending = False  # type: ignore[attr-defined]  # we have said so already
                self._move(task, Status.CANCELLED)
            self._check_deadlines()  # none is left: this puts the alarm away

    async def _wait_for_running(self, seconds: float) -> None:
        runs = [task.run for task in self._newest_first(Status.RUNNING) if task.run]
        await asyncio.wait([self._worker, *runs], timeout=seconds)

    @property
    def is_running(self) -> bool:
        """Whether the worker loop is alive; it is made when the queue is entered."""
        # GOTCHA [dead-loop]: a flag that is set at the start and cleared at the stop is still set when the loop has
        # died of a bug: health says healthy, and nothing runs. So we ask the loop itself.
        return not self._worker.done()

    def _report_death(self, worker: asyncio.Task[None]) -> None:
        if not worker.cancelled() and (error := worker.exception()):
            logger.critical("the worker loop has died: no task will run", exc_info=error)

    async def worker_loop(self) -> None:
        """For ever: take a slot, then the best task that is ready, and start an attempt."""
        current_settings.set(self.settings)  # an attempt inherits it: asyncio tasks copy the context
        while True:
            # GOTCHA [slot-before-get]: take a LOW task first, wait for a slot with it, and it runs before a HIGH
            # that came since. With the slot first, the best task is chosen when it can start.
            await self._slots.acquire()
            try:
                _, _, task = await self._ready.get()
            except BaseException:  # the queue stops; in this event loop it can be entered again
                self._slots.release()
                raise
            if task.status is Status.PENDING:
                self._start(task)
            else:
                self._slots.release()  # it was cancelled while it waited

    def _start(self, task: Task) -> None:
        task.attempt, task.progress, task.stop_cause = task.attempt + 1, 0, None
        task.started_at, task.deadline = datetime.now(UTC), self._loop.time() + task.timeout
        self._move(task, Status.RUNNING)
        # GOTCHA [strong-reference]: the event loop itself keeps only weak references to its tasks. One that nobody else
        # refers to can be collected in the middle of its work.
        task.run = self._loop.create_task(self._attempt(task))
        if task.deadline < self._alarm_at:
            self._check_deadlines()

    def _check_deadlines(self) -> None:
        """Stop the attempts that are past their deadline, and set the alarm for the next one.
        WHY not a timer for each attempt: it would be a fifth of all that a short task costs."""
        running, now = list(self._newest_first(Status.RUNNING)), self._loop.time()
        for task in running:
            if task.deadline <= now:
                task.deadline = math.inf
                self._stop(task, "timeout")
        if self._alarm:
            self._alarm.cancel()
        self._alarm_at = min((task.deadline for task in running), default=math.inf)
        self._alarm = self._loop.call_at(self._alarm_at, self._check_deadlines) if running else None

    async def _attempt(self, task: Task) -> None:
        """Run the handler once, and settle what came of it; raises nothing."""
        result = error = None
        try:
            update_progress = functools.partial(self._report, task, task.attempt)
            result = plain_json(await process_task(task.task_type, task.payload, update_progress, self.handlers))
        # GOTCHA [cancelled-error]: `except Exception` misses CancelledError, and then nobody records the end of the
        # task. It also misses SystemExit, which asyncio passes on to whoever runs the loop: one sys.exit() in a handler
        # stops the server. Elsewhere to swallow these is wrong; but this is the outermost frame of its asyncio task.
        except BaseException as exception:
            logger.debug("[%s] task %s, attempt %d", task.request_id, task.id, task.attempt, exc_info=True)
            error = describe(exception)
        self._settle(task, result, error)

    def _report(self, task: Task, attempt: int, percent: float) -> None:
        """What a handler calls as `update_progress(percent)`, from whatever thread."""
        if isinstance(percent, bool) or not isinstance(percent, int | float) or not 0 <= percent <= 100:  # or nan
            raise ValueError(f"progress must be a number from 0 to 100, not {percent!r:.40}")
        # GOTCHA [progress-from-thread]: asyncio's objects are not thread-safe. A watcher that is woken from another
        # thread may sleep on until something else happens in the loop.
        if threading.get_ident() != self._thread_id:
            self._loop.call_soon_threadsafe(self._report, task, attempt, percent)
        elif task.status is Status.RUNNING and task.attempt == attempt and int(percent) > task.progress:
            task.progress = int(percent)  # it never goes back, and what comes after the end is passed over
            self._changed(task)

    def _settle(self, task: Task, result: Any, error: str | None) -> None:
        """The end of an attempt: give its slot back, then say what becomes of the task."""
        self._slots.release()
        task.run = None
        if task.status is not Status.RUNNING:
            return  # it was left behind by a shutdown
        if task.stop_cause == "timeout":
            error = f"TimeoutError: no result within {task.timeout:g} s"
        if task.stop_cause in ("cancel", "shutdown"):
            self._move(task, Status.CANCELLED)
        elif error is None:
            task.progress = 100
            self._move(task, Status.COMPLETED, result=result)
        elif task.attempt > task.max_retries:
            self._move(task, Status.FAILED, error=error)
        else:
            self._move(task, Status.PENDING, error=error)
            self._schedule(task, backoff_delay(task.attempt, self.settings))
        # %a escapes all but printable ASCII: an error may quote a payload, and must not begin a log line of its own.
        logger.info("[%s] task %s (%s) attempt %d: %s %a", task.request_id, task.id, task.task_type, task.attempt,
                    task.status, task.error)

# ===== Middleware ============================================================================== course module 07 =====
# What all requests have in common: an id, a line in the log, a place in the metrics, a limit to the body. It is pure
# ASGI: a callable of (scope, receive, send), which are the request, where its body comes from, and where the answer
# goes; it wraps another one. It knows nothing of tasks.
# GOTCHA [base-http-middleware]: Starlette's BaseHTTPMiddleware is shorter to write, but puts a queue and a second task
# in between: `request.is_disconnected()` stays False, context variables don't come back out, streams are hard to stop.

BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)  # upper bounds, in seconds
LABELS = [*map(str, BOUNDS), "+Inf"]
KNOWN_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}

class Metrics:
    """Counts the requests to each route, and how long they took.
    GOTCHA [raw-path-labels]: counted by URL, every task makes a counter of its own, and a scanner millions. Route
    templates are few. A method is a client's free text too."""

    def __init__(self) -> None:
        self.statuses: dict[tuple[str, str], Counter[int]] = {}  # by method and route
        self.seconds: defaultdict[tuple[str, str], float] = defaultdict(float)
        self.buckets: dict[tuple[str, str], list[int]] = {}

    def record(self, route: tuple[str, str], status: int, seconds: float) -> None:
        if route not in self.statuses:
            self.statuses[route], self.buckets[route] = Counter(), [0] * len(LABELS)
        self.statuses[route][status] += 1
        self.seconds[route] += seconds
        self.buckets[route][bisect.bisect_left(BOUNDS, seconds)] += 1

    def as_json(self) -> dict[str, Any]:
        counts = sum(self.statuses.values(), Counter[int]())
        return {"total_requests": counts.total(), "status_counts": counts,
                "avg_duration_ms": round(1000 * sum(self.seconds.values()) / max(1, counts.total()), 3),
                "routes": {" ".join(route): {
                    "count": sum(buckets), "avg_duration_ms": round(1000 * self.seconds[route] / sum(buckets), 3),
                    "up_to_seconds": {le: n for le, n in zip(LABELS, buckets, strict=True) if n},
                } for route, buckets in self.buckets.items()}}

    def as_prometheus(self) -> Iterator[str]:
        """Lines of the text format 0.0.4. Unlike in JSON, a bucket counts the ones below too."""
        labels = {route: f'method="{route[0]}",route="{route[1]}"' for route in self.statuses}
        yield "# TYPE taskqueue_http_requests_total counter"
        for route, statuses in self.statuses.items():
            for status, n in statuses.items():
                yield f'taskqueue_http_requests_total{{{labels[route]},status="{status}"}} {n}'
        yield "# TYPE taskqueue_http_request_seconds histogram"
        for route, buckets in self.buckets.items():
            for le, n in zip(LABELS, itertools.accumulate(buckets), strict=True):
                yield f'taskqueue_http_request_seconds_bucket{{{labels[route]},le="{le}"}} {n}'
            yield f"taskqueue_http_request_seconds_sum{{{labels[route]}}} {self.seconds[route]:.6f}"
            yield f"taskqueue_http_request_seconds_count{{{labels[route]}}} {sum(buckets)}"

class RequestMiddleware:
    """Gives every request its id, its limit, its line in the log and its place in the metrics."""
    SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

    def __init__(self, app: ASGIApp, metrics: Metrics, max_body: int) -> None:
        self.app, self.metrics, self.max_body = app, metrics, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, body_size, started = time.perf_counter(), 0, False
        request_id = self._request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id  # for routes: `request.state.request_id`

        async def receive_limited() -> Message:
            # WHY not FastAPI's max_body_size: its 413 is plain text and without our id, if there is a Content-Length.
            nonlocal body_size
            message = await receive()
            body_size += len(message.get("body", b""))
            if body_size > self.max_body and not started:  # once the answer goes out, nobody waits for a body
                raise HTTPException(413, f"The body has more than {self.max_body} bytes")
            return message

        def send_with_id(message: Message) -> Awaitable[None]:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
                # GOTCHA [stream-latency]: a stream "takes" as long as somebody watches it, and a few of those drown the
                # average of all others. Measured to its first byte it is a request like any.
                self._record(scope, request_id, message["status"], time.perf_counter() - began)
            return send(message)

        try:
            await self.app(scope, receive_limited, send_with_id)
        except SendTimeoutError:
            # SIMPLIFIED: uvicorn logs an ERROR, and keeps the socket until it is flushed; a proxy would drop it.
            logger.warning("[%s] a reader has stopped reading: its stream is ended", request_id)
        except Exception:
            # GOTCHA [unhandled-is-500]: the answer to an unhandled exception is made further out, by Starlette or the
            # server, where no middleware sees it pass and none can count it.
            if started:
                raise
            logger.exception("[%s] unhandled exception", request_id)
            await JSONResponse({"detail": "Internal Server Error"}, 500)(scope, receive, send_with_id)

    def _request_id(self, scope: Scope) -> str:
        inbound = str(dict(scope["headers"]).get(b"x-request-id", b""), "latin-1")
        return inbound if self.SANE_ID.fullmatch(inbound) else secrets.token_hex(8)

    def _record(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        method = scope["method"] if scope["method"] in KNOWN_METHODS else "OTHER"
        route = getattr(scope.get("route"), "path", "(other)")  # the router has set it by now
        self.metrics.record((method, route), status, seconds)
        # %a again: a path with %0A in it can't begin a log line of its own.
        logger.info("[%s] %s %a %d %.1f ms", request_id, method, scope["path"][:200], status, 1000 * seconds)

# ===== Page ===========================================================================================================
# GET / shows the queue at work: one page, no framework, nothing from another host. It uses the API as any client would;
# all that it shows of tasks comes through one EventSource, and as `textContent` alone. Skip it at a first reading.

PAGE = """<!doctype html><html lang=en><title>taskqueue</title><meta name=viewport content=width=device-width><style>
:root { color-scheme: light dark; --ink: light-dark(#17212d, #e8edf3); --card: light-dark(#fff, #1b222c);
  background: light-dark(#f1f4f8, #11161d); font: clamp(16px, .5vw + 11px, 26px)/1.4 system-ui, sans-serif; }
* { --tone: color-mix(in srgb, var(--hue, #1976f2), var(--ink) 45%); box-sizing: border-box; margin: 0; padding: 0;
  font: inherit; color: var(--ink); overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.pending { --hue: #e90; } .completed { --hue: #0b3; } .failed { --hue: #f22; } .cancelled { --hue: gray; }
header, section, li, form { display: flex; flex-wrap: wrap; gap: .2rem .75rem; align-items: center; }
body, aside, form { display: grid; gap: .7rem; align-content: start; padding: .8rem; } aside { padding: 0; }
h1, h2, strong { display: block; font-weight: 650; font-size: 2rem; } h2 { font-size: 1.2rem; padding: .7rem 0 .2rem; }
p, form, ol { background: var(--card); border-radius: .5rem; } #pending { max-height: 30vh; overflow: auto; }
p { flex: 1 0 6.5rem; padding: .4rem .5rem; border-top: .25rem solid var(--tone); } label { display: contents; }
form { grid-template-columns: auto 1fr; } form button { grid-column: span 2; } button:empty { display: none; }
label > *, button, b { padding: .2rem .5rem; background: none; border: 1px solid; border-radius: .4rem; min-width: 0; }
form button, .HIGH b { background: var(--ink); color: var(--card); } small, time { color: light-dark(#567, #abc); }
li { position: relative; padding: .3em 1em; border-bottom: 1px solid #8883; } small { font-weight: 400; }
li :first-child, #state { color: var(--tone); font-weight: 600; } b { text-align: center; font-size: .8em; }
i { position: absolute; inset: auto auto 0 0; height: .25rem; background: var(--tone); } li button, b { padding: 0; }
@media (min-width: 62rem) { body { grid-template: auto 1fr / 15.5rem minmax(0, 1fr); gap: 1rem 1.5rem; padding: 1rem; }
  li { display: grid; grid-template-columns: 6rem 11.5rem 4.5rem minmax(0, 1fr) 4.75rem 5rem; } }
@media (prefers-reduced-motion: no-preference) { li { animation: arrive .8s; } i { transition: width .5s; } }
@keyframes arrive { from { background: #8884; } } :focus-visible { outline: 3px solid var(--tone); }
</style><link rel=icon href=data:,><header><h1>taskqueue</h1><output id=state></output><a href=/docs>API docs</a>
<a href=/metrics>Metrics</a></header><section>TILES</section><aside><form><label>Type<select name=task_type>TYPES
</select></label><label>Priority<select name=priority><option value=5>MEDIUM<option value=1>HIGH<option value=10>LOW
</select></label><label>Retries<input name=max_retries value=0></label><label>Delay, s<input name=delay value=0></label>
<label>Payload<textarea name=payload rows=3 aria-describedby=answer>{}</textarea></label><button>Submit</button></form>
<output id=answer></output></aside><main><h2>Running <small id=workers></small></h2><ol id=running></ol>
<h2>Pending <small>up to 50, in the order in which they will run</small></h2><ol id=pending></ol>
<h2>Finished <small>up to 50, newest first</small></h2><ol id=finished></ol></main><template><li><span></span>
<a target=_blank></a><b></b><bdi></bdi><time></time><button></button><i role=progressbar></i></template>
<script>const tasks = new Map(), form = document.forms[0], PRIORITIES = {1: "HIGH", 5: "MEDIUM", 10: "LOW"};
const find = selector => document.querySelector(selector), seconds = ms => `${Math.max(0, Math.round(ms / 1000))} s`;
const showState = (className, textContent) => Object.assign(find("#state"), {className, textContent});
let source, server, life, frame, doubt;  // the stream, its latest `queue` event, whose it is, since when we differ
function connect() {  // afresh; after a mere loss of connection EventSource does so itself, and gets what changed since
  source?.close(); tasks.clear(); server = {tasks: {}}; life = doubt = null;
  source = new EventSource("/events");
  source.onopen = () => showState("completed", "● Live");
  source.onerror = () => showState("failed", "Connection lost, trying again…");
  const listen = (name, listener) => source.addEventListener(name, event => listener(JSON.parse(event.data)));
  listen("shutdown", () => { source.onerror = () => showState("pending", "The server has shut down, waiting…"); });
  listen("task", task => tasks.set(task.id, {...tasks.get(task.id), ...task}));
  listen("queue", queue => { server = queue; life ??= queue.life; frame ??= requestAnimationFrame(draw); }); }
function draw() {  // once for all changes since the last frame, however many
  const now = Date.now(), focused = document.activeElement, counts = server.tasks; frame = null;
  // The server is another; or a task has ended and was evicted unseen, and its row stays; or EventSource has given up.
  if (life != server.life || doubt && now - doubt > 2000 || source.readyState === EventSource.CLOSED) return connect();
  for (const task of tasks.values()) task.wait = Math.max(0, Date.parse(task.not_before) - now) || 0;
  const inTurn = (a, b) => a.wait - b.wait || a.priority - b.priority || (a.created_at < b.created_at ? -1 : 1);
  const {running = [], pending = [], finished = []} = Object.groupBy(
    [...tasks.values()].sort(inTurn), task => task.completed_at ? "finished" : task.status);
  finished.sort((a, b) => a.completed_at < b.completed_at ? 1 : -1).splice(50).forEach(old => tasks.delete(old.id));
  for (const [name, group] of Object.entries({running, pending, finished})) {
    const list = find(`#${name}`), rows = group.slice(0, 50).map(drawRow);
    for (const row of [...list.children]) if (!rows.includes(row)) row.remove();
    rows.forEach((row, at) => { if (list.children[at] !== row) list.insertBefore(row, list.children[at] ?? null); }); }
  if (focused !== document.activeElement) focused.focus({preventScroll: true});  // a row that moves loses it
  for (const status in counts) find(`.${status} strong`).textContent = counts[status];
  find("#workers").textContent = `${running.length} of ${server.workers} workers are busy`;
  doubt = running.length <= counts.running && pending.length <= counts.pending ? null : doubt ?? now; }
function drawRow(task) {
  const row = task.row ??= find("template").content.firstChild.cloneNode(true), {id, status, attempt, progress} = task;
  const name = `${task.task_type} ${id.slice(0, 4)}`, priority = PRIORITIES[task.priority], runs = status === "running";
  const verb = runs ? "Stop" : status === "pending" ? "Cancel" : "", age = Date.now() - Date.parse(task.created_at);
  const notes = [attempt && `attempt ${attempt}/${task.max_retries + 1}`, runs && `${progress} %`, task.error, task.wait
    && `${attempt ? "retries" : "starts"} in ${seconds(task.wait)}`, JSON.stringify(task.result ?? undefined)];
  const texts = [status, name, priority, notes.filter(Boolean).join(" · ").slice(0, 200), `${seconds(age)} ago`, verb];
  texts.forEach((text, at) => { if (row.children[at].textContent !== text) row.children[at].textContent = text; });
  row.className = `${status} ${priority}`; row.children[1].href = `/tasks/${id}/stream`;
  Object.assign(row.children[5], {ariaLabel: `${verb} ${name}`, value: `/tasks/${id}?force=${runs}`});
  Object.assign(row.lastChild, {ariaLabel: name, ariaValueNow: progress, style: `width: ${progress}%`}); return row; }
async function send(method, path, ...bodies) {  // one after another, until one is refused; the last answer is shown
  let answer = {ok: true}; const headers = {"Content-Type": "application/json"};
  for (const body of bodies) if (answer.ok) answer = await fetch(path, {method, body, headers});
  const {detail = answer.statusText} = await answer.json(), wait = answer.headers.get("Retry-After");
  const text = Array.isArray(detail) ? detail.map(({loc, msg}) => `${loc.join(".")}: ${msg}`).join("; ") : detail;
  find("#answer").textContent = `${answer.status} ${text}${wait ? `, Retry-After: ${wait} s` : ""}`; }
find("main").onclick = ({target}) => target.value && send("DELETE", target.value, null);
form.onsubmit = () => {  // each field goes out as it was typed, so that its error is the API's, and 1.0 stays 1.0
  send("POST", "/tasks", `{${[...new FormData(form)].map(([name, value]) => `"${name}": ${value}`)}}`); return false; };
const low = {task_type: "send_email", priority: 10}, types = [...form.task_type].map(option => option.text);
for (const [textContent, orders] of Object.entries({
  "Burst of 20 mixed": Array.from({length: 20}, (_, i) => ({task_type: types[i % 3], priority: [10, 5, 1, 5][i % 4]})),
  "One HIGH behind ten LOW": [...Array(10).fill(low), {...low, priority: 1}], "Fill the queue": Array(9999).fill(low),
  "A task that fails and retries": [{...low, max_retries: 3, payload: {to: "nobody@example.invalid"}}]})) {
  const onclick = () => send("POST", "/tasks", ...orders.map(order => JSON.stringify(order)));
  form.before(Object.assign(document.createElement("button"), {textContent, onclick})); }
connect(); setInterval(draw, 1000);
</script>""".replace("TYPES", "".join(f"<option value='\"{kind}\"'>{kind}" for kind in TaskType)).replace(
    "TILES", "".join(f"<p class={status}>{status.title()}<strong>0</strong></p>" for status in Status))

# The policy names the one style and the one script by their hashes: nothing else runs here, however it got in.
PAGE_HEADERS = {"Content-Security-Policy": "style-src 'sha256-{}'; script-src 'sha256-{}'; connect-src 'self'; img-src "
    "data:; default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; trusted-types 'none'; "
    "require-trusted-types-for 'script'".format(*(base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
                                                  for text in re.split("</?(?:style|script)>", PAGE)[1::2]))}

# ===== Routes ================================================================================== course module 07 =====
# The HTTP face: a route turns a request into calls of the queue; one table, its exceptions into status codes.
# SIMPLIFIED: whoever reaches the port may do it all. Production asks who calls, and keeps their ids and keys apart.

router = APIRouter()
HTTP_STATUS: dict[type[QueueError], int] = {
    TaskNotFound: 404, TaskNotCancellable: 409, IdempotencyKeyReused: 422, QueueFull: 503, QueueStopped: 503}

class Problem(BaseModel):
    detail: str

ANSWERS: dict[int | str, dict[str, Any]] = {  # for OpenAPI: what else routes may answer
    "stream": {"content": {"text/event-stream": {}}},
    404: {"model": Problem, "description": "No task has this id"},
    409: {"model": Problem, "description": "The task has ended; or it runs, and was not forced"},
    413: {"model": Problem, "description": "The body is too large"},
    503: {"model": Problem, "description": "No room", "headers": {"Retry-After": {"schema": {"type": "integer"}}}}}

def queue_of(request: Request) -> TaskQueue:
    """The app's queue. WHY not Depends(): FastAPI would resolve it for each request, at a tenth of its whole cost."""
    return request.app.state.queue  # type: ignore[no-any-return]  # it is there once the lifespan has begun

LastEventId = Annotated[str, Header(description="resume after this `id:`; a junk or future one is ignored")]

@router.post("/tasks", status_code=202, responses={400: {"model": Problem}, 413: ANSWERS[413], 503: ANSWERS[503]})
async def submit_task(
    submission: TaskSubmission, request: Request, response: Response,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> TaskStatus:
    """Submit a task. With an `Idempotency-Key`, a repeated request gets the first one's task, until that is evicted."""
    status = queue_of(request).submit(submission, request.state.request_id, idempotency_key)
    response.headers["Location"] = f"/tasks/{status.id}"
    return status

@router.get("/tasks")
async def list_tasks(
    request: Request, status: Status | None = None, limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    offset: Annotated[int, Query(ge=0)] = 0,
) -> TaskList:
    tasks, total = queue_of(request).list_tasks(status, limit, offset)
    return TaskList(tasks=tasks, total=total)

@router.get("/tasks/{task_id}", responses={404: ANSWERS[404]})
async def get_task(task_id: str, request: Request) -> TaskStatus:
    return queue_of(request).get_task(task_id)

@router.delete("/tasks/{task_id}", responses={
    404: ANSWERS[404], 409: ANSWERS[409], 202: {"model": dict[str, str], "description": "It was asked to stop"}})
async def cancel_task(task_id: str, request: Request, response: Response, force: bool = False) -> dict[str, str]:
    """Cancel a waiting task; with `force=true`, also ask a running one to stop."""
    if queue_of(request).cancel(task_id, force).status is Status.CANCELLED:
        return {"detail": "Task cancelled", "task_id": task_id}
    response.status_code = 202
    return {"detail": "Cancellation requested", "task_id": task_id}

def event_stream(queue: TaskQueue, frames: AsyncIterator[bytes]) -> EventSourceResponse:
    """Send `frames` as Server-Sent Events, until they end, the client goes, or the server stops."""
    # GOTCHA [shutdown-order]: the server runs a lifespan's shutdown only when all responses have ended, and a stream
    # doesn't end by itself: Ctrl-C waits for ever, or cuts it off and the client sees an error. sse-starlette notices
    # the signal and calls `shutdown_event.set()`: on an object of ours, whose `set` has the queue end all watches.
    settings, farewell = queue.settings, SimpleNamespace(set=queue.begin_shutdown)
    return EventSourceResponse(frames, ping=settings.ping_seconds, send_timeout=settings.send_timeout, sep="\n",
                               shutdown_event=farewell, shutdown_grace_period=2)  # type: ignore[arg-type]

SHUTDOWN_FRAME = encode_frame("shutdown", '{"detail":"The server is stopping"}')

def event_id(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0  # int() refuses very long ones

@router.get("/tasks/{task_id}/stream", response_class=Response, responses={
    404: ANSWERS[404], 200: ANSWERS["stream"], 204: {"description": "Ended, and its last event is known"}})
async def stream_task(task_id: str, request: Request, last_event_id: LastEventId = "") -> Response:
    """Watch one task: its state now, then the latest whenever it has changed, until it has ended.
    GOTCHA [404-after-200]: an error raised inside the generator comes after the status line has gone out with a 200. So
    the task is looked up here, before there is a response.
    GOTCHA [reconnect-for-ever]: EventSource takes the normal end of a stream for a lost connection and comes back,
    again and again. A 204 tells it to stop (HTML standard, 9.2)."""
    queue, sent = queue_of(request), event_id(last_event_id)
    status = queue.get_task(task_id)
    if status.status in FINAL and sent == status.version:
        return Response(status_code=204)
    return event_stream(queue, task_frames(queue.watch(task_id, sent)))

async def task_frames(states: AsyncGenerator[TaskStatus, None]) -> AsyncIterator[bytes]:
    status = None
    async with contextlib.aclosing(states):  # who closes us, closes it
        async for status in states:
            yield status.progress_frame
    if status is None or status.status not in FINAL:
        yield SHUTDOWN_FRAME

@router.get("/events", response_class=Response, responses={200: ANSWERS["stream"]})
async def stream_events(request: Request, last_event_id: LastEventId = "") -> Response:
    """Watch all tasks: the latest 100, then what has changed. After each batch: a `queue` event with the counts.
    GOTCHA [six-connections]: over HTTP/1.1 a browser opens six connections per host. A page with a stream per row has
    no connection left for its seventh row, nor for a click. It needs one stream for all rows."""
    queue = queue_of(request)
    return event_stream(queue, all_frames(queue, event_id(last_event_id)))

async def all_frames(queue: TaskQueue, sent: int) -> AsyncIterator[bytes]:
    async with contextlib.aclosing(queue.watch_all(sent)) as batches:
        async for tasks in batches:
            for task in tasks:
                yield task.task_frame
            yield encode_frame("queue", json.dumps(overview(queue)))
    yield SHUTDOWN_FRAME

def overview(queue: TaskQueue) -> dict[str, Any]:
    """The queue in numbers. `life` tells one start of the server from another."""
    tasks = {status.value: queue.count(status) for status in Status}
    return {"life": queue.first_version, "workers": queue.settings.max_workers, "watchers": queue.watchers,
            "submitted": queue.submitted, "evicted": queue.evicted, "tasks": tasks}

@router.get("/health", responses={503: {"model": dict[str, Any], "description": "The worker loop does not run"}})
async def health(request: Request, response: Response) -> dict[str, Any]:
    """Whether the worker loop is alive. The `pid` tells processes apart: each has a queue of its own."""
    queue = queue_of(request)
    response.status_code = 200 if queue.is_running else 503
    return {"status": "healthy" if queue.is_running else "unhealthy", "pid": os.getpid(), **overview(queue)}

@router.get("/metrics", responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
async def metrics(request: Request, accept: Annotated[str, Header()] = "") -> Response:
    """JSON; or the text format of Prometheus, where `Accept` asks for text/plain or application/openmetrics-text."""
    metrics: Metrics = request.app.state.metrics
    queue = queue_of(request)
    if "application/json" in accept or not re.search("text/plain|application/openmetrics-text", accept):
        return JSONResponse({**metrics.as_json(), "queue": overview(queue)})
    lines = [*metrics.as_prometheus(), "# TYPE taskqueue_tasks gauge",
             *(f'taskqueue_tasks{{status="{status}"}} {queue.count(status)}' for status in Status),
             "# TYPE taskqueue_submitted_total counter", f"taskqueue_submitted_total {queue.submitted}"]
    return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

@router.get("/", response_class=HTMLResponse, include_in_schema=False)
async def page() -> HTMLResponse:
    return HTMLResponse(PAGE, headers=PAGE_HEADERS)

async def answer_queue_error(_: Request, error: Exception) -> Response:
    status, detail = HTTP_STATUS[type(error)], str(error)  # type: ignore[index]
    if status == 422:  # in the shape of every other 422
        detail = [{"type": "value_error", "loc": ["header", "Idempotency-Key"], "msg": detail}]  # type: ignore
    return JSONResponse({"detail": detail}, status, headers={"Retry-After": "1"} if status == 503 else None)

async def answer_invalid(_: Request, error: Exception) -> Response:
    """422 with the place and the reason of each error, up to 20.
    GOTCHA [echoed-input]: FastAPI's own answer repeats the input that it refuses. If that is a NaN or a lone surrogate,
    the answer can't be encoded, and the client's mistake becomes our 500."""
    assert isinstance(error, RequestValidationError)
    detail = [{key: problem[key] for key in ("type", "loc", "msg")} for problem in error.errors()[:20]]
    body = json.dumps({"detail": detail}, ensure_ascii=False).encode(errors="replace")
    return Response(body, 422, media_type="application/json")

# ===== App ===================================================================================== course module 05 =====
# Ties the sections together. The lifespan is what runs before the first request and after the last one: the place for
# what must be made inside the event loop, and must be stopped.

def create_app(settings: Settings = Settings(), handlers: Mapping[TaskType, Handler] = HANDLERS) -> FastAPI:
    """An app with a queue of its own. The queue is made when the lifespan begins, in `app.state.queue`."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
        warn_of_more_processes()
        AppStatus.should_exit = False  # of the whole process: an earlier server may have left it set
        async with TaskQueue(settings, handlers) as app.state.queue:
            yield

    # WHY not include_router(): a newer FastAPI matches each request twice. The price: dependency_overrides don't work.
    app = FastAPI(title="taskqueue", summary="An async task queue, in memory", lifespan=lifespan, routes=router.routes)
    app.state.metrics = Metrics()
    app.add_middleware(RequestMiddleware, metrics=app.state.metrics, max_body=settings.max_body)
    app.add_exception_handler(QueueError, answer_queue_error)
    app.add_exception_handler(RequestValidationError, answer_invalid)
    return app

def warn_of_more_processes() -> None:
    """Warn where several processes seem asked for. SIMPLIFIED: the queue lives in one; production has a broker."""
    words = " ".join(sys.argv) + " --workers " + os.environ.get("WEB_CONCURRENCY", "1")
    if any(int(count) > 1 for count in re.findall(r"(?:--workers|-w)[ =]?(\d+)", words)):
        logger.warning("more than one process: each has a queue of its own, whose tasks are a 404 in the others")

app = create_app()

# ===== Demo ===========================================================================================================
# `python taskqueue.py` serves such an app, and then uses it as any client would: over HTTP, with httpx. Each step of
# the tour says what it shows, and checks that it is so.

@dataclass
class Tour:
    client: httpx.AsyncClient
    workers: int
    held: bool = True

    async def run(self) -> bool:
        """Take all steps; return whether everything held that they claim."""
        print("\nPOST /tasks answers at once; GET /tasks/{id}/stream then follows the work, live.", flush=True)
        task = await self.submit(TaskType.GENERATE_REPORT, max_retries=10)
        self.check(task["status"] == "pending", "the POST is answered before the work begins")
        task = await self.follow(task, show=True)
        self.check(task["status"] == "completed", f"the result: {task['result']}")
        print("\nWith more tasks than workers, the rest wait for a slot.", flush=True)
        tasks = [await self.submit(TaskType.RESIZE_IMAGE, max_retries=10) for _ in range(2 * self.workers)]
        seen = [0]
        while (counts := (await self.call("GET", "/health"))["tasks"])["pending"] + counts["running"]:
            seen.append(counts["running"])
            await asyncio.sleep(0.005)
        self.check(max(seen) == self.workers, f"of {len(tasks)} tasks, {max(seen)} ran at a time")
        print("\nA HIGH task that comes last overtakes every LOW one that waits.", flush=True)
        tasks = [await self.submit(TaskType.RESIZE_IMAGE, max_retries=10) for _ in range(self.workers)]
        tasks += [await self.submit(TaskType.SEND_EMAIL, priority=priority) for priority in (10, 10, 10, 1)]
        waited = [await self.follow(task) for task in tasks][self.workers :]
        waited = [task for task in waited if task["started_at"] > waited[-1]["created_at"]]  # not before HIGH came
        order = [task["priority"] for task in sorted(waited, key=lambda task: task["started_at"])]
        self.check(len(order) > 1 and order == sorted(order), f"they were started by priority: {order}")
        print("\nA handler that raises is tried again, after a backoff; in the end the task has failed.", flush=True)
        task = await self.submit(TaskType.SEND_EMAIL, payload={"to": "nobody@example.invalid"}, max_retries=2)
        task = await self.follow(task, show=True)
        self.check((task["status"], task["attempt"]) == ("failed", 3), f"after 3 attempts: {task['error']}")
        print("\nDELETE cancels a task that waits; with ?force=true also one that runs.", flush=True)
        waiting = await self.submit(TaskType.SEND_EMAIL, delay=60)
        await self.call("DELETE", f"/tasks/{waiting['id']}")
        self.check((await self.follow(waiting))["status"] == "cancelled", "the waiting one is cancelled at once")
        running = await self.submit(TaskType.GENERATE_REPORT, max_retries=10)
        answer = await self.call("DELETE", f"/tasks/{running['id']}?force=true")
        ends = answer["detail"], (await self.follow(running))["status"]
        self.check(ends == ("Cancellation requested", "cancelled"), "the running one, once its handler lets go")
        print("\nGET /metrics counts requests, by route and by status.", flush=True)
        numbers = await self.call("GET", "/metrics")
        self.check(numbers["total_requests"] > 0, f"{numbers['total_requests']}, by status {numbers['status_counts']}")
        print("\nEvery claim held." if self.held else "\nNot every claim held.", flush=True)
        return self.held

    def check(self, holds: bool, claim: str) -> None:
        self.held = self.held and holds
        print(f"   {'✓' if holds else '✗ NOT SO:'} {claim}", flush=True)

    async def call(self, method: str, path: str, **body: Any) -> Any:
        return (await self.client.request(method, path, json=body or None)).raise_for_status().json()

    async def submit(self, task_type: TaskType, **fields: Any) -> Any:
        return await self.call("POST", "/tasks", task_type=task_type, **fields)

    async def follow(self, task: Any, show: bool = False) -> Any:
        """Read the task's stream to its end, drawing what comes if `show`; return the task as it is then."""
        async with self.client.stream("GET", f"/tasks/{task['id']}/stream", timeout=None) as stream:
            async for line in stream.aiter_lines():
                if show and line.startswith("data: "):
                    now = json.loads(line.removeprefix("data: "))
                    bar = "█" * (now["progress"] // 5) + "░" * (20 - now["progress"] // 5)
                    redraw = sys.stdout.isatty() and now["status"] not in FINAL
                    print(f"   {bar} {now['progress']:3} %, attempt {now['attempt']}, {now['status']:9}",
                          end="\r" if redraw else "\n", flush=True)
        return await self.call("GET", f"/tasks/{task['id']}")

class Server(uvicorn.Server):
    """A second Ctrl-C ends the process at once, whatever it is waiting for."""
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            os._exit(128 + sig)
        super().handle_exit(sig, frame)

async def demo(server: Server, url: str, workers: int, tour: bool, once: bool) -> bool:
    """Serve until Ctrl-C or, with `once`, until the end of the tour; return whether its claims held."""
    serving = asyncio.create_task(server.serve())
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    print(f"The live page is {url}/ and the documentation of the API {url}/docs", flush=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logger.setLevel(logging.ERROR if tour else logging.INFO)  # the log would drown the tour
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        touring = asyncio.create_task(Tour(client, workers).run() if tour else asyncio.sleep(0, True))
        while not touring.done() and not server.should_exit:
            await asyncio.sleep(0.02)
        interrupted = touring.cancel() or server.should_exit  # cancel() says whether there was anything to cancel
        [held] = await asyncio.gather(touring, return_exceptions=True)
    logger.setLevel(logging.INFO)
    if isinstance(held, Exception) and not interrupted:
        print(f"\nThe tour broke off: {held!r}", flush=True)
    if not once and not interrupted:
        print("\nServing on; Ctrl-C stops it.", flush=True)
    while not server.should_exit:
        server.should_exit = once or server.should_exit
        await asyncio.sleep(0.02)
    # uvicorn waits until every response is sent; to a client that has stopped reading, that is for ever.
    def cut_off() -> None:
        for connection in list(server.server_state.connections):
            connection.transport.abort()
    asyncio.get_running_loop().call_later(1, cut_off)
    await serving
    return held is True and not interrupted

def main() -> None:
    parser = argparse.ArgumentParser(description="The task queue, with a guided tour.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one (%(default)s)")
    parser.add_argument("--once", action="store_true", help="exit after the tour: with 0 if every claim held")
    parser.add_argument("--no-tour", action="store_true", help="only serve")
    for knob in fields(Settings):
        info: Any = knob.default  # Pydantic's FieldInfo
        parser.add_argument("--" + knob.name.replace("_", "-"), type=knob.type, default=info.default,
                            help=f"{info.description} (%(default)s)")
    args = parser.parse_args()
    try:
        settings = Settings(**{knob.name: getattr(args, knob.name) for knob in fields(Settings)})
        family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
        with socket.create_server((args.host, args.port), family=family) as probe:
            host, port = probe.getsockname()[:2]
    except ValidationError as error:
        parser.error(str(error))
    except (OSError, OverflowError) as error:
        sys.exit(f"Can't listen on {args.host}:{args.port}: {error}. Does it run already? Try another --port.")
    gc.freeze()  # WHY: the imports stay for good; a full garbage collection would walk them each time, for 10 ms
    server = Server(uvicorn.Config(create_app(settings), host, port, log_level="warning"))
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    held = not args.once
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again, once it has stopped
        held = asyncio.run(demo(server, url, settings.max_workers, not args.no_tour, args.once))
    sys.exit(0 if held else 1)

if __name__ == "__main__":
    main()
