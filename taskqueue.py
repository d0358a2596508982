"""An async task queue service in one file: FastAPI, asyncio and Server-Sent Events.

A client posts a task and gets its answer at once. Workers run the task later, a few
at a time, the most urgent first. Until it is done the client can ask how far it is,
or watch it live. Everything is kept in memory, in one process.

    POST /tasks ──► submit() ──► ready heap ──► worker_loop() ──► your handler
                        │            ▲                                  │
                        │            └── retry, after a backoff ────────┤
                        ▼                                               │
                   TaskRecord ◄──── progress, then a result or error ───┘
                        │
                        └── each change wakes watch() ──► GET /tasks/{id}/stream

The life of a task. It can be cancelled while it waits, and while it runs. No other way
is possible than these arrows: one function, move(), sees to that.

    pending ──► running ──► completed
     │  ▲          ├──────► failed
     │  └─ retry ──┤
     └─────────────┴──────► cancelled


TWO IDEAS CARRY THE FILE

1.  One thread, taking turns. All requests, streams and `async def` handlers share one
    thread. Each runs until it comes to an `await` that has to wait, and only there can
    another one run. So a function without `await` is atomic: it runs to its end before
    any other coroutine runs. It needs no lock. (A plain `def` handler runs in a thread
    of its own, beside all that. The queue raises an error if it is called from there.)

2.  Look, then wait. Some coroutines wait for something: a stream waits for news. It
    looks first. If there is nothing new, it waits for a signal, and looks again. The
    signal only says "something has changed". What counts is the state, and that is
    always there to look at. The news itself is never sent around. So none of it can be
    lost, come twice, or pile up in memory.


THE MAP. Read from top to bottom: each section uses only what stands above it. At the
right is the course module that a section belongs to.

    Settings     what an operator can set
    Models       what comes in and goes out, and who checks it         module 02
    Handlers     the functions that do the work                        module 05
    Queue        the books: where each task stands, and who watches    module 05
    Workers      who starts a task, and how an attempt ends            module 05
    Middleware   what every request has in common                      module 07
    Routes       the queue over HTTP, and the stream of a task         module 07
    App          the parts put together                                module 05

Then the lesson ends. A live page, with its stream of all tasks, and a guided tour show
it at work.

THE FIRST READING takes about 90 minutes. It is the comment at the head of each section,
all that begins with NEW, and these functions and classes. Each of them has the line
`# First reading.` above it. Leave the rest for a second time.

    Settings
    TaskSubmission · TaskStatus
    handler · call_handler · process_task · run_in_thread · send_email
    TRANSITIONS · Signal · TaskRecord · TaskStore: __init__ · move · changed · states
    backoff_delay · TaskQueue: __aenter__ · submit · cancel · watch · _schedule
    _make_ready · worker_loop · _attempt · _begin · _run_handler · _interrupt · _settle
    __aexit__
    RequestMiddleware
    submit_task · get_task · cancel_task · event_stream · stream_task · task_frames
    end_watches_at_a_signal · create_app

THE WORDS

    task          one piece of work that a client has asked for
    handler       the function that does the work of one task type
    backoff       the wait before a retry; it grows, and it is random
    evicted       forgotten, because too many finished tasks are kept
    attempt       one call of a handler for a task; a retry is the next attempt
    slot          the right to run one attempt; there are `max_workers` of them
    ready heap    the tasks that may start; a heap gives its smallest entry first
    worker loop   the one coroutine that takes a slot, then the best task
    record        what the queue knows of a task (TaskRecord); it changes
    snapshot      a copy of a record at one moment (TaskStatus); it never changes
    version       the number of a change; a stream sends it as its `id:`
    coroutine     what a call of an `async def` function returns; `await` runs it
    asyncio task  a coroutine that runs beside the others; never just "task" here
    lifespan      what an app does before its first request and after its last one

THE SIGNS

    NEW:            a tool of asyncio, of the web or of Pydantic, where it is first used
    GOTCHA [name]   a trap: how everybody writes it, what happens then, what we do.
                    `pytest -k name` runs its test, with "_" for each "-" in the name.
    WHY             a choice, and what was rejected
    SIMPLIFIED      what a production system would do instead

`python taskqueue.py` is a live demo. `uvicorn taskqueue:app --reload` is the service.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(f"taskqueue.py needs Python 3.11 or newer, and this is {sys.version[:6]}.")

import argparse
import asyncio
import contextlib
import contextvars
import functools
import hashlib
import inspect
import itertools
import json
import logging
import math
import os
import random
import re
import secrets
import signal
import socket
import sysconfig
import textwrap
import threading
import time
import traceback
from collections import Counter, defaultdict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import IntEnum, StrEnum
from types import FrameType
from typing import Annotated, Any, Self

import httpx
import uvicorn
from fastapi import APIRouter, FastAPI, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import (
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    StreamingResponse,
)
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    computed_field,
    field_validator,
)
from pydantic_core import to_json
from sse_starlette.sse import AppStatus, EventSourceResponse, SendTimeoutError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("taskqueue")


# ===== Settings =======================================================================
# What an operator can set. It is an object, and no setting is a global: two apps with
# different settings can live in one process, and in the tests they do.
#
# NEW: A Pydantic model is a class whose fields have types. Pydantic checks each value
# when an object is made, and raises ValidationError if one is wrong:
#     Settings(max_workers=0)  →  "Input should be greater than or equal to 1"
# `Field(...)` holds the default, the limits (`ge` is ≥, `le` is ≤, `gt` is >), and a
# description. The demo makes its command line flags from these.


# First reading.
class Settings(BaseModel):
    """The settings of one queue. Times are in seconds, sizes in bytes.

    Raises ValidationError, which is a ValueError, for a value out of range.
    """

    # frozen: nobody can change a setting later, halfway through its use.
    # extra="forbid": a misspelt name is an error, and is not ignored.
    # allow_inf_nan=False: infinity is refused, and so is NaN, "not a number".
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    max_workers: int = Field(default=3, ge=1, le=1000, description="attempts at once")
    max_pending: int = Field(default=1000, ge=1, description="tasks that may wait")
    keep_finished: int = Field(default=1000, ge=0, description="finished, kept")
    # At a stop, handlers that run may go on for this many seconds.
    drain_seconds: float = Field(default=5.0, ge=0, description="at a stop")
    # A retry waits at most base, 2 x base, 4 x base …, and never longer than cap.
    backoff_base: float = Field(default=0.5, ge=0, description="longest 1st wait")
    backoff_cap: float = Field(default=30.0, ge=0, le=10**9, description="longest wait")
    # A client that has not read for this many seconds is dropped from its stream.
    send_timeout: float = Field(default=10.0, gt=0, description="for readers")
    # A stream without news sends pings: a proxy closes a connection that is silent.
    ping_seconds: float = Field(default=15.0, gt=0, description="between pings")
    max_body: int = Field(default=65_536, ge=1, description="bytes of a body")
    max_result: int = Field(default=65_536, ge=1, description="bytes of a result")
    # The handlers in this file only pretend to work. These two are for them.
    failure_rate: float = Field(default=0.1, ge=0, le=1, description="chance to fail")
    pace: float = Field(default=1.0, ge=0, description="multiplies their seconds")


DEFAULTS = Settings()  # frozen, so all who set nothing can share it


# ===== Models ======================================================= module 02 =======
# What may come in, and what goes out. What comes in is checked here, at the door, and
# is refused with the place and the reason. One thing can't be checked here: whether a
# payload fits its handler. TaskQueue.submit() does that.
#
# NEW: Three words decide how strict a Pydantic model is.
#     strict=True       "800" is not 800. Without it Pydantic converts, and guesses.
#     extra="forbid"    an unknown field is an error. The default ignores it: a client
#                       who writes "retries" for "max_retries" never learns why there
#                       are none.
#     extra="allow"     an unknown field is kept.


class TaskType(StrEnum):
    """The kinds of work. A new one takes a member here, a payload model, a handler."""

    RESIZE_IMAGE = "resize_image"
    GENERATE_REPORT = "generate_report"
    SEND_EMAIL = "send_email"


class Priority(IntEnum):
    """How urgent a task is. A lower number runs first."""

    HIGH = 1
    MEDIUM = 5
    LOW = 10


class Status(StrEnum):
    """Where a task is in its life."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


FINAL = {Status.COMPLETED, Status.FAILED, Status.CANCELLED}


class Payload(BaseModel):
    """What a handler works on. Each task type has a model of its own, below.

    In this file each field has a default, so that `{}` is a valid payload. Yours need
    none. Further keys are kept, unless your model says `extra="forbid"`.
    """

    model_config = ConfigDict(strict=True, extra="allow")


class ResizeImagePayload(Payload):
    """For TaskType.RESIZE_IMAGE. Width and height are in pixels."""

    url: str = "https://example.com/cat.jpg"
    width: int = Field(default=800, ge=1)
    height: int = Field(default=600, ge=1)


class GenerateReportPayload(Payload):
    """For TaskType.GENERATE_REPORT."""

    report_id: str | int = "weekly"
    format: str = "pdf"


class SendEmailPayload(Payload):
    """For TaskType.SEND_EMAIL."""

    to: str = "someone@example.com"
    subject: str = "Hello"
    body: str = ""


# Writes JSON. It refuses NaN, and leaves "é" as it is.
JSON = json.JSONEncoder(allow_nan=False, ensure_ascii=False, separators=(",", ":"))
MAX_DEPTH = 100  # levels of lists and objects. Pydantic can't read more than 200


def check_json(value: Any, where: str, room: float = math.inf, depth: int = 0) -> float:
    """Check that `value` is plain JSON, and not too large. `where` names it.

    Plain JSON is an object with text keys, a list or tuple, text, a finite number,
    True, False or None. Anything else raises ValueError, and so do more than MAX_DEPTH
    levels. The message mostly says where: "result.rows[3] is of type date, which JSON
    has no form for".

    `room` is a budget: the number of bytes that the JSON may have. Each value costs
    some of them, never more than its JSON will have. What is left is returned.

    GOTCHA [bad-result]: a handler returns a date, or a payload holds a NaN. Often such
    a value is kept as it came. Then every later `GET /tasks` that shows this task is a
    500, for all clients: "Out of range float values are not JSON compliant", or
    "surrogates not allowed". (A surrogate is half of a character. Alone it can't be
    written as UTF-8.) So what JSON can't carry is refused where it comes in. Only that
    one task suffers.

    GOTCHA [one-error-each]: Pydantic collects every error of a body. With its type
    JsonValue, 64 KB of NaN are 16,000 errors, each with its whole path: three seconds
    of work for one 422. A payload is checked here instead. The first error ends it.
    """
    if depth >= MAX_DEPTH and isinstance(value, dict | list | tuple):
        raise ValueError(f"{where:.200} has more than {MAX_DEPTH} levels")
    room -= 2  # at least one character, and a comma or a bracket
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where} has a key of type {type(key).__name__}")
            room = check_json(key, f"a key of {where}", room, depth)  # no new level
            room = check_json(item, f"{where}.{key:.40}", room, depth + 1)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            room = check_json(item, f"{where}[{index}]", room, depth + 1)
    elif isinstance(value, str):
        room -= len(value)
        if room >= 0:  # else it is refused below
            value.encode()  # UnicodeEncodeError, which is a ValueError, for "\ud800"
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value}, and JSON has only finite numbers")
    elif isinstance(value, int):  # True and False are ints, too
        if value.bit_length() > 14_000:  # 4,200 digits: Python reads back 4,300
            raise ValueError(f"{where} is a number of more than 4,200 digits")
        room -= value.bit_length() // 5  # a digit has 3.3 bits: never too much
    elif value is not None:
        kind = type(value).__name__
        raise ValueError(f"{where} is of type {kind}, which JSON has no form for")
    if room < 0:
        raise ValueError(f"{where:.200} goes over max_result: return a path or an id")
    return room


def show_payloads(schema: dict[str, Any]) -> None:
    """Put the fields of all payload models into the API's documentation.

    It is for `/docs` alone, so skip it at first. `__subclasses__()` are the classes
    that inherit from Payload. Pydantic describes each of them in JSON Schema, the
    language of that document. Such a description can point to a part of itself, by a
    path. The path begins at the top of the document: hence `here`.
    """
    here = "#/components/schemas/TaskSubmission/properties/payload/anyOf"
    schema["anyOf"] = [
        model.model_json_schema(ref_template=f"{here}/{number}/$defs/{{model}}")
        for number, model in enumerate(Payload.__subclasses__())
    ]


# First reading.
class TaskSubmission(BaseModel):
    """What a client sends to submit a task. Unknown fields are refused."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    # JSON has no enums: the text "send_email" is turned into one. Hence not strict.
    task_type: TaskType = Field(strict=False, description="which handler does it")
    # Each submission gets a copy of its own of this {}: Pydantic sees to it.
    payload: dict[str, Any] = Field(default={}, json_schema_extra=show_payloads)
    priority: Priority = Field(default=Priority.MEDIUM, strict=False)
    max_retries: int = Field(default=0, ge=0, le=10, description="further attempts")
    timeout: float = Field(default=60, gt=0, le=3600, description="seconds for each")
    delay: float = Field(
        default=0, ge=0, le=86_400, description="seconds to wait first"
    )

    # NEW: A validator is a function of ours that Pydantic calls for one field. It
    # returns the value, or raises ValueError with the reason. With mode="before" it
    # sees what came in, before Pydantic has converted it.

    @field_validator("priority", mode="before")
    @classmethod
    def check_priority(cls, priority: Any) -> Any:
        """In Python `True == 1` and `1.0 == 1`: an enum alone would take them."""
        if type(priority) not in (int, Priority):
            raise ValueError("must be 1, 5 or 10, as a whole number")
        return priority

    @field_validator("payload")
    @classmethod
    def check_payload(cls, payload: dict[str, Any]) -> dict[str, Any]:
        """Is it plain JSON? Its size is limited by `max_body`, in the middleware."""
        check_json(payload, "payload")
        return payload


# First reading.
class TaskStatus(BaseModel):
    """A snapshot of a task at one moment. Unlike the queue's own record it can't change
    in its reader's hands."""

    # from_attributes: `TaskStatus.model_validate(record)` reads the fields it needs
    # from the attributes of any object.
    model_config = ConfigDict(frozen=True, from_attributes=True)

    id: str
    task_type: TaskType
    priority: Priority
    status: Status
    progress: int = Field(ge=0, le=100, description="per cent of this attempt")
    attempt: int = Field(description="0 before the first")
    max_retries: int
    error: str | None = Field(description="why the last attempt failed, if it has")
    request_id: str | None = Field(description="X-Request-ID of the submission")
    created_at: datetime
    not_before: datetime | None = Field(description="end of its delay or backoff")
    started_at: datetime | None = Field(description="start of the latest attempt")
    completed_at: datetime | None = Field(description="when it reached a final status")

    # exclude: these are for Python. They are not part of the answer.
    version: int = Field(exclude=True)
    payload_json: bytes = Field(exclude=True)
    result_json: bytes = Field(exclude=True)

    # NEW: A computed field is a property that is part of the answer, too. The queue
    # keeps payload and result as JSON text, and here they are parsed when asked for.
    # WHY text: `[[],[],[]…]` takes 64 KB as text, and 1.4 MB as Python lists. Nobody
    # can change a text by accident. Each reader and each attempt gets its own copy.

    @computed_field(description="as it was sent")  # type: ignore[prop-decorator]
    @property
    def payload(self) -> dict[str, Any]:
        """What was submitted, without the defaults of its model."""
        return dict(json.loads(self.payload_json))

    @computed_field(description="what the handler returned")  # type: ignore[prop-decorator]
    @property
    def result(self) -> Any:
        """None until the task is completed. It may be None then, too."""
        return json.loads(self.result_json)

    def as_json(self) -> bytes:
        """The whole answer. Payload and result are JSON text already, and stay it."""
        # All but those two, as in {"id": "…", "attempt": 0}. Without the "}" for now.
        rest = self.model_dump_json(exclude={"payload", "result"}).removesuffix("}")
        payload = b',"payload":' + self.payload_json
        return rest.encode() + payload + b',"result":' + self.result_json + b"}"

    # A stream sends one of these two forms. However many clients watch a task, a form
    # is encoded once for each change: a cached_property keeps what it has returned.
    # (It does so in a frozen model, too. Only the fields are frozen.)

    @functools.cached_property
    def progress_json(self) -> bytes:
        """For the stream of this one task."""
        fields = {"status", "progress", "attempt"}
        outcome = {Status.COMPLETED: {"result"}, Status.FAILED: {"error"}}
        fields |= outcome.get(self.status, set())
        return self.model_dump_json(include=fields).encode()

    @functools.cached_property
    def summary_json(self) -> bytes:
        """For the stream of all tasks, on the page. It leaves the payload out."""
        return self.model_dump_json(exclude={"payload"}).encode()


class TaskList(BaseModel):
    """One page of a list of tasks."""

    tasks: list[TaskStatus]
    total: int = Field(description="all that match, not only those on this page")


# ===== Handlers ===================================================== module 05 =======
# The functions that do the work, and how one of them is called. A handler is given its
# payload, and a function to report its progress with. What it returns is the result.
# It knows nothing of the queue. So it can be tested alone, and moved elsewhere.
#
# NEW: `async def` makes a coroutine function. A call of it runs nothing yet. It returns
# a coroutine, and `await` runs that. Forget the `await`, and Python only warns:
# "coroutine 'send_email' was never awaited". At an `await` that has to wait, the
# coroutine is put aside. The event loop, which is asyncio's list of what can go on,
# gives the next one its turn.
#
# GOTCHA [blocking-handler]: `time.sleep(5)` in an `async def` has no `await`, so it
# never gives up its turn. For five seconds no request is answered, no stream moves, no
# timer fires. Write `await asyncio.sleep(5)`. Or write a plain `def` handler, as you
# must for a library that blocks. Those run in a thread of their own.

Reporter = Callable[[float], None]  # of progress: takes per cent, from 0 to 100
Handler = Callable[[Any, Reporter], Any]  # an `async def`, or a plain `def`
Handlers = Mapping[TaskType, Handler]

HANDLERS: dict[TaskType, Handler] = {}  # filled by @handler


class DoNotRetry(Exception):
    """A handler raises this where a retry is useless: the task fails now."""


class BadResult(DoNotRetry):
    """What a handler has returned is not plain JSON, or it is too large."""


def payload_type(function: Handler) -> TypeAdapter[Any]:
    """The type in the annotation of the handler's first parameter.

    It is `SendEmailPayload` for `def send(payload: SendEmailPayload, update_progress)`.
    Without an annotation, or for Any, it is Payload. Raises TypeError if the function
    can't be called with a payload and an `update_progress`.
    """
    # NEW: A TypeAdapter makes a model out of any type. For example
    # TypeAdapter(list[int]).validate_json("[1, 2]") returns [1, 2].
    try:
        signature = inspect.signature(function, eval_str=True)
        signature.bind("payload", "update_progress")  # do two arguments fit?
        first = next(iter(signature.parameters.values()))
        if first.annotation in (first.empty, Any):
            return TypeAdapter(Payload)
        return TypeAdapter(first.annotation)
    except Exception as error:
        text = f"{function!r} can't be called as handler(payload, update_progress)"
        raise TypeError(f"{text}: {error}") from error


# For a task type without a valid handler. submit() takes any payload then, and the task
# fails later, with the reason.
ANYTHING: TypeAdapter[Any] = TypeAdapter(dict[str, Any])


# First reading.
def handler(task_type: TaskType) -> Callable[[Handler], Handler]:
    """Register a function as the handler of a task type: `@handler(TaskType.X)`.

    Python first calls handler(), and then what that returns, register(), with the
    function that stands below the `@`.

    Raises ValueError for an unknown task type, and TypeError for what is no handler.
    """
    task_type = TaskType(task_type)

    def register(function: Handler) -> Handler:
        payload_type(function)  # raises before anything is registered
        HANDLERS[task_type] = function
        return function

    return register


def is_async(function: Handler) -> bool:
    """Whether a call of the handler returns a coroutine.

    A handler may also be an object with an `async def __call__`.
    """
    if inspect.iscoroutinefunction(function):
        return True
    return inspect.iscoroutinefunction(type(function).__call__)


# NEW: A context variable is a global variable with a value of its own in each asyncio
# task. (That is a coroutine that runs beside the others: see Workers.) A new asyncio
# task begins with the value of the code that has started it. Each worker loop sets this
# one. So the handlers that it starts see the settings of their queue.
current_settings = ContextVar("current_settings", default=DEFAULTS)


def find_handler(task_type: TaskType, handlers: Handlers) -> Handler:
    """The handler of that type. Raises LookupError if there is none."""
    function = handlers.get(task_type)
    if function is None:
        raise LookupError(f"no handler for {task_type}: is its module imported?")
    return function


# First reading.
async def call_handler(
    function: Handler,
    payload: Any,
    update_progress: Reporter,
    finish: Callable[[Any], Any] = lambda result: result,
) -> Any:
    """Call a handler, and return `finish(result)`. Raises whatever the handler raises.

    The queue passes a `finish` that makes JSON of the result. That takes its time, if
    the result is large. If it is called in here, a plain `def` handler spends the time
    of its own thread on it. The event loop goes on meanwhile.
    """
    if is_async(function):
        return finish(await function(payload, update_progress))
    return await run_in_thread(lambda: finish(function(payload, update_progress)))


# First reading.
async def process_task(
    task_type: TaskType,
    payload: Any,
    update_progress: Reporter,
    handlers: Handlers = HANDLERS,
) -> Any:
    """Do what a task does, without a queue: for a test, or in another handler.

    `payload` is a model, or a dict. A dict is validated first, as if it had come as
    JSON. Raises LookupError if there is no handler, ValidationError for a bad dict, and
    whatever the handler raises.
    """
    function = find_handler(task_type, handlers)
    if isinstance(payload, dict):
        payload = payload_type(function).validate_json(to_json(payload))
    return await call_handler(function, payload, update_progress)


# First reading.
async def run_in_thread(function: Callable[[], Any]) -> Any:
    """Call the function in a new thread. Return what it returns, raise what it raises.

    NEW: `asyncio_task.cancel()` raises CancelledError inside a coroutine, at the
    `await` where it waits. A coroutine can be interrupted in this way. A thread can't.
    If whoever awaits this is cancelled, the thread runs on, and nobody waits for it.
    Its slot would be free, and yet it works. So the queue doesn't cancel such an
    attempt before it gives up on it, at its stop. Until then it asks the thread: the
    next `update_progress` raises CancelledError in there.

    NEW: A future is a box for one outcome that comes later. A coroutine can await an
    asyncio.Future, but no thread may fill it. A thread may fill a
    concurrent.futures.Future, but no coroutine can await it. asyncio.wrap_future()
    takes one of the second kind, and makes one of the first. It passes the outcome on.
    (It passes a cancel back, too.)

    GOTCHA [executor-limit]: `asyncio.to_thread()` is shorter. It uses a pool, a group
    of threads that are used again and again. But that has only min(32, CPUs + 4) of
    them. With 8 CPUs, 12 of 40 slots could run. And Python waits for the pool when it
    exits: one handler that is stuck, and Ctrl-C hangs. A daemon thread of our own has
    no such limit, and Python doesn't wait for it.
    """
    outcome: Future[tuple[Any, BaseException | None]] = Future()
    # Mark it as running: so it can't be cancelled. Else a cancel of whoever awaits is
    # passed back to it, and the thread that fills it gets an InvalidStateError.
    outcome.set_running_or_notify_cancel()

    def work() -> None:
        """All that the thread does.

        An exception travels as a part of the result, and run_in_thread() raises it
        again. WHY not set_exception(): asyncio refuses a StopIteration there, and
        whoever awaits it would wait for ever.
        """
        try:
            outcome.set_result((function(), None))
        except BaseException as error:
            outcome.set_result((None, error))

    # The thread gets a copy of our context variables, so that it sees current_settings.
    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(work,), daemon=True).start()
    result, error = await asyncio.wrap_future(outcome)
    if error is not None:
        raise error
    return result


# -- Three handlers. They only pretend to work, and now and then they fail. ------------


def simulate(stages: list[str], seconds: float) -> Iterator[tuple[float, float]]:
    """Yield, for each stage, its seconds and the per cent that is done then.

    By chance (`failure_rate`) it raises RuntimeError after one of them.
    """
    settings = current_settings.get()
    fails = random.random() < settings.failure_rate
    fails_at = random.choice(stages)
    for number, stage in enumerate(stages, start=1):
        yield seconds * settings.pace, 100 * number / len(stages)
        if fails and stage == fails_at:
            raise RuntimeError(f"simulated failure while {stage}")


@handler(TaskType.RESIZE_IMAGE)
async def resize_image(payload: ResizeImagePayload, update_progress: Reporter) -> Any:
    """Pretend to resize an image, in about 2 seconds."""
    stages = ["downloading", "decoding", "scaling", "saving"]
    for seconds, percent in simulate(stages, 0.5):
        await asyncio.sleep(seconds)
        update_progress(percent)
    return {"url": payload.url, "size": f"{payload.width}x{payload.height}"}


@handler(TaskType.GENERATE_REPORT)
def generate_report(payload: GenerateReportPayload, update_progress: Reporter) -> Any:
    """Pretend to write a report, in about 3 seconds.

    It is a plain `def`, as you would write it around a library that blocks.
    """
    stages = ["querying", "adding", "charting", "printing"]
    for seconds, percent in simulate(stages, 0.75):
        time.sleep(seconds)
        update_progress(percent)
    return {"file": f"report-{payload.report_id}.{payload.format}"}


# First reading.
@handler(TaskType.SEND_EMAIL)
async def send_email(payload: SendEmailPayload, update_progress: Reporter) -> Any:
    """Pretend to send a mail, in about 1 second.

    It fails for an address under `.invalid`, a domain that can't exist (RFC 2606).
    """
    for seconds, percent in simulate(["rendering", "connecting", "sending"], 0.3):
        await asyncio.sleep(seconds)
        if payload.to.endswith(".invalid"):
            raise ConnectionError(f"no mail server for {payload.to}")
        update_progress(percent)
    return {"to": payload.to, "message_id": f"<{secrets.token_hex(6)}@example.com>"}


# ===== Queue ======================================================== module 05 =======
# The books: one record for each task, and who may change it. Each fact has one owner.
# Only `move` writes a task's `status`, and only `changed` its `version`. To find out
# how a task came to its state, there is one line to set a breakpoint on.
#
# In this section only a watcher waits. All other functions are atomic (idea 1), and
# there is no lock. The price: they may be called in the thread of the event loop only.
#
# SIMPLIFIED: when the process ends, all is lost. Production keeps its tasks in a
# database, or in a broker, which is a server for queues. There they survive a crash,
# and many processes can share them.


class QueueError(Exception):
    """What a caller of the queue did wrong, or what must be refused."""


class TaskNotFound(QueueError):
    """No task has this id: it never was, or it was evicted."""


class TaskNotCancellable(QueueError):
    """The task has ended. Or it runs, and `force` was not given."""


class IdempotencyKeyReused(QueueError):
    """The key came with another submission before. See submit()."""


class QueueFull(QueueError):
    """`max_pending` tasks are waiting."""


class QueueStopped(QueueError):
    """The queue is not running: it was not started yet, or it stops."""


class IllegalTransition(Exception):
    """A bug in this file: a task was to move where it can't go."""


# First reading.
# Where a task can go from each status. From a final one it can't go anywhere.
TRANSITIONS: dict[Status, set[Status]] = {status: set() for status in Status}
TRANSITIONS[Status.PENDING] = {Status.RUNNING, Status.CANCELLED}
TRANSITIONS[Status.RUNNING] = FINAL | {Status.PENDING}  # back to PENDING: a retry


# First reading.
class Signal:
    """Wakes all who wait for the next change of something.

    It carries no message. Whoever wakes up looks for themselves what is new (idea 2).

    NEW: An asyncio.Event is a flag that coroutines can wait for. `await event.wait()`
    waits until somebody calls `event.set()`. It then stays set, and nobody waits any
    more, until somebody clears it. Here nobody has to: each event is used once. fire()
    sets it and drops it, and whoever waits after that makes a new one. While nobody
    waits there is none, and that saves 800 bytes for each task.
    """

    __slots__ = ("_event",)  # there is one for each task: keep it small

    def __init__(self) -> None:
        self._event: asyncio.Event | None = None  # None while nobody waits

    def fire(self) -> None:
        """Wake those who wait now."""
        if self._event is not None:
            self._event.set()  # those who wait still have a reference to it
            self._event = None

    async def wait(self) -> None:
        """Wait until it fires. What fired before doesn't count: look first."""
        if self._event is None:
            self._event = asyncio.Event()
        await self._event.wait()


# First reading.
@dataclass(slots=True, eq=False)  # eq=False: a record is equal to itself alone
class TaskRecord:
    """All that is known of a task. It changes, so it never leaves Queue and Workers.

    Everyone else is given a TaskStatus, which is a snapshot of it.
    """

    id: str
    sequence: int  # the number of its submission, which a retry keeps
    created_at: datetime
    request_id: str | None
    idempotency_key: str | None  # see submit()
    fingerprint: bytes  # a hash of its submission, to go with that key
    task_type: TaskType
    payload_json: bytes
    priority: Priority
    max_retries: int
    timeout: float
    status: Status = Status.PENDING
    progress: int = 0
    attempt: int = 0
    result_json: bytes = b"null"
    error: str | None = None
    not_before: datetime | None = None
    started_at: datetime | None = None
    completed_at: datetime | None = None

    # For those who watch.
    version: int = 0  # the number of its latest change
    news: Signal = field(default_factory=Signal)  # fires at each change
    snapshot: TaskStatus | None = None  # of this version, once somebody has looked

    # While an attempt runs.
    asyncio_task: "asyncio.Task[None] | None" = None
    cancel_requested: bool = False
    timed_out: bool = False

    # While it waits, this fires at the end of its delay. While it runs, at its timeout.
    timer: asyncio.TimerHandle | None = None


Snapshots = AsyncGenerator[TaskStatus, None]


class TaskStore:
    """The books of one queue: its records, their order, and who watches them.

    A Python dict keeps its entries in the order in which they were put in. `reversed()`
    reads it newest first. So a few dicts are all the indexes we need.
    """

    # First reading.
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.submitted = 0
        self.evicted = 0
        self.watchers = 0  # open watches
        self.closed = False  # there will be no more news: the queue stops
        self.loop: asyncio.AbstractEventLoop | None = None  # None until it starts

        # Versions begin at the clock, in microseconds, and not at 0. WHY: a client of
        # the stream of all tasks was cut off. It comes back with the last version that
        # it saw. Meanwhile this server may have started again. All versions of its new
        # life, from its start to its end, must be above those of the old one.
        self.life = time.time_ns() // 1000
        self.version = self.life
        self.news = Signal()  # fires when any task changes

        self.by_id: dict[str, TaskRecord] = {}  # in order of submission
        # In order of the latest change, for the stream of all tasks, below the lesson.
        self.by_change: dict[str, TaskRecord] = {}
        # In order of entering that status.
        self.by_status: dict[Status, dict[str, TaskRecord]] = {s: {} for s in Status}
        # By idempotency key: see submit(). Who has no key asks for None, in vain.
        self.by_key: dict[str | None, TaskRecord] = {}
        self._finished: deque[TaskRecord] = deque()  # in order of finishing

    # -- To read -----------------------------------------------------------------------

    def check_caller(self) -> None:
        """Raise RuntimeError in any thread or event loop but the queue's own.

        FastAPI runs a plain `def` route in a thread. There get_running_loop() itself
        raises "no running event loop". Write `async def`, also if nothing is awaited.
        If a part of the route must block, call that with `await asyncio.to_thread(f)`.
        """
        loop = asyncio.get_running_loop()
        if self.loop is not None and self.loop is not loop:
            raise RuntimeError("the queue belongs to another event loop")

    def find(self, task_id: str) -> TaskRecord:
        """The record with this id. Raises TaskNotFound."""
        self.check_caller()
        if task_id not in self.by_id:
            raise TaskNotFound("No task has this id: it never was, or it was evicted")
        return self.by_id[task_id]

    def snapshot(self, record: TaskRecord) -> TaskStatus:
        """The task as it is now, for those who watch it.

        It is kept until the task changes, and all who watch get the same one. Those who
        only ask once get a new one: to keep that would just take memory.
        """
        if record.snapshot is None:
            record.snapshot = TaskStatus.model_validate(record)
        return record.snapshot

    # -- To change ---------------------------------------------------------------------

    def add(self, record: TaskRecord) -> None:
        """Take in a new record."""
        self.submitted += 1
        self.by_id[record.id] = record
        self.by_status[record.status][record.id] = record
        if record.idempotency_key is not None:
            self.by_key[record.idempotency_key] = record
        self.changed(record)

    # First reading.
    def move(self, record: TaskRecord, status: Status) -> None:
        """Move a task to another status: the one writer of `status`.

        GOTCHA [terminal-is-final]: a client cancels a task just when its handler
        returns. Where both just write the status, the later one wins, and a stream
        sends two ends. Here the first one wins, and the second raises
        IllegalTransition. Callers look at the status first: it never comes to that.
        """
        if status not in TRANSITIONS[record.status]:
            raise IllegalTransition(f"{record.id}: {record.status} → {status}")
        if record.timer is not None:
            record.timer.cancel()
            record.timer = None
        del self.by_status[record.status][record.id]
        self.by_status[status][record.id] = record
        record.status = status
        if status in FINAL:
            record.completed_at = datetime.now(UTC)
            self._finished.append(record)
        self.changed(record)
        self._evict()

    # First reading.
    def changed(self, record: TaskRecord) -> None:
        """Number a change, and wake those who wait for one."""
        self.version += 1
        record.version = self.version
        record.snapshot = None
        # Taken out and put in again, it stands last in the dict.
        self.by_change.pop(record.id, None)
        self.by_change[record.id] = record
        record.news.fire()
        self.news.fire()

    def _evict(self) -> None:
        """Forget the oldest finished tasks, if there are too many.

        GOTCHA [unbounded-history]: a dict of every task that there ever was is a leak.
        But to drop simply the oldest may hit one that still runs. Only finished ones
        stand in this deque.
        """
        while len(self._finished) > self.settings.keep_finished:
            record = self._finished.popleft()
            self.evicted += 1
            del self.by_id[record.id]
            del self.by_change[record.id]
            del self.by_status[record.status][record.id]
            self.by_key.pop(record.idempotency_key, None)

    def close(self) -> None:
        """End all watches. To be called when the queue stops."""
        self.check_caller()
        self.closed = True
        for record in self.by_id.values():
            record.news.fire()
        self.news.fire()

    # -- To watch ----------------------------------------------------------------------
    # GOTCHA [slow-reader]: the usual design gives each stream a queue, and puts every
    # change into all of them. Then a phone on a train, in a tunnel, stops reading. What
    # it doesn't read piles up in our memory. Once back, it gets an hour of history.
    #
    # Here a watcher holds one number, the last version that it has sent. While a client
    # doesn't read, the send to it has to wait. Meanwhile the generator below stands at
    # its `yield`. When it goes on, it takes the latest state. What came in between is
    # kept nowhere.
    #
    # GOTCHA [snapshot-then-subscribe]: to subscribe is to ask for all changes from now
    # on. Read the state first and subscribe then, and a change between the two is lost.
    # Subscribe first, and old changes follow a newer state: progress runs backwards.
    # Here nobody subscribes. Look, and if there is nothing new, wait. Can a change come
    # between the two? No. `await news.wait()` first runs Signal.wait(), in the same
    # turn. That makes the Event. Only when it awaits the Event, others have their turn.
    # And then fire() finds the Event.
    #
    # NEW: `yield` in an `async def` makes an async generator. `async for` takes from it
    # what it yields, one by one. In between, the generator stands still at its `yield`.
    # Before somebody takes the first one, it runs no line at all, and so no `finally`.

    # First reading.
    async def states(self, record: TaskRecord, sent: int) -> Snapshots:
        """Yield the task as it is now, then its latest state whenever it has changed.

        It ends after the final state, or when the queue stops. `sent` is the version
        that the reader knows already.
        """
        if sent > record.version:  # it never had that version: the number is junk
            sent = 0
        # GOTCHA [never-entered]: a client can be gone before its response has begun.
        # Then this generator is never started, and runs no `finally`. If its caller had
        # counted it, nobody would ever take it off again. So it is counted here.
        self.watchers += 1
        try:
            while True:
                if record.version > sent:
                    sent = record.version
                    yield self.snapshot(record)
                elif record.status in FINAL or self.closed:
                    return
                else:
                    await record.news.wait()
        finally:
            self.watchers -= 1


# ===== Workers ====================================================== module 05 =======
# Who starts a task, and how an attempt ends. One coroutine, the worker loop, takes a
# slot and then the best task. Each attempt is an asyncio task of its own, and gives
# the slot back at its end.
#
# NEW: An asyncio task runs a coroutine beside all others. `asyncio.create_task(c)`
# returns at once, and `c` takes its first step at the next turn. `await` a coroutine to
# wait for it. Make an asyncio task of it if it shall run while you go on.
#
# WHY one loop with a counter of free slots, and not N workers that each take one task
# after another? N workers are right as well. But this way there is one place where a
# task is chosen, and one where the free slots are counted.


# First reading.
def backoff_delay(attempt: int, settings: Settings) -> float:
    """Seconds to wait after attempt number `attempt` has failed.

    With base 0.5 and cap 30 it is at most 0.5, 1, 2, 4, 8, 16, 30, 30 … ("exponential,
    capped"). It is random from 0 up to that ("full jitter"): tasks that failed together
    must not come back together. Source: M. Brooker, "Exponential Backoff And Jitter",
    AWS Architecture Blog, 2015.
    """
    longest = settings.backoff_base * 2 ** (attempt - 1)
    return random.uniform(0, min(settings.backoff_cap, longest))


def whole_percent(percent: float) -> int:
    """A handler's progress as a whole number from 0 to 100.

    Any real number will do: a Decimal, a Fraction, one of numpy's. Raises ValueError
    for one outside of 0 to 100 and for NaN. It also does for text, for True, and for
    whatever else is no number.

    GOTCHA [rounded-progress]: `done += 100 / 7`, seven times, is 100.00000000000001.
    To refuse that fails a task whose work is done. So we round before we check.
    """
    rounded = math.nan
    if not isinstance(percent, bool | str | bytes):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            rounded = round(float(percent), 2)
    if not 0 <= rounded <= 100:  # a NaN fails this test, too
        raise ValueError(f"progress must be from 0 to 100, not {percent!r:.40}")
    return int(rounded)


def encode_result(result: Any, max_bytes: int) -> bytes:
    """A result as JSON text. Raises BadResult if it is not plain JSON, or too large.

    GOTCHA [unbounded-result]: a handler returns 50 MB. They are encoded, in one step of
    the event loop, kept with the task, and copied for each slow reader. Return a
    reference instead: a path, an id, an address. The check ends as soon as the limit is
    passed.
    """
    try:
        check_json(result, "result", room=max_bytes + 1)  # no comma after the whole
        encoded = JSON.encode(result).encode()
    except ValueError as error:
        raise BadResult(str(error)) from None
    if len(encoded) > max_bytes:
        raise BadResult(f"over max_result ({max_bytes} bytes): return a path or an id")
    return encoded


# Where installed code stands. describe() looks for lines that stand elsewhere. (A
# module that is built into Python has a path such as "<frozen importlib>".)
LIBRARIES = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "<frozen ")


def explain(error: BaseException) -> tuple[str, str, bool]:
    """Say in text what happened, and let go of what the exception holds on to.

    Returns the error for the client, the traceback for the log, and whether a retry
    makes sense. Nothing can be relied on here: an exception's own `__str__` can raise,
    and so can the `__name__` of its class. An attempt must be settled all the same.
    """
    # "<class 'mail.MailError'>, which …": type.__repr__ runs no code of that class.
    text = f"{type.__repr__(type(error))}, which can't be shown"
    report = ""
    retry = True
    try:
        leaves = list(find_leaves(error))
        retry = not any(isinstance(leaf, DoNotRetry) for leaf in leaves)
        shown = leaves[:5]  # a group can hold thousands, and to read all takes long
        text = "; ".join(describe(leaf) for leaf in shown)
        text = text.encode(errors="backslashreplace").decode()
        for leaf in shown:
            report += "".join(traceback.format_exception(leaf))
        report = report[-10_000:]
    except BaseException:
        report = "No traceback: to read the exception raised another one."
    finally:
        with contextlib.suppress(BaseException):
            forget_frames(error)
    return text, report, retry


def find_leaves(error: BaseException) -> Iterator[BaseException]:
    """The exception itself. For a group of exceptions: all that are in it.

    GOTCHA [hidden-cause]: an `asyncio.TaskGroup` runs some asyncio tasks, and puts what
    they raise into a group of exceptions. Whatever went wrong, `str(error)` of that
    is "unhandled errors in a TaskGroup (1 sub-exception)". What went wrong is inside.
    """
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from find_leaves(inner)
    else:
        yield error


def describe(error: BaseException) -> str:
    """For example "ConnectionError: no route (mail.py:12 in send)".

    The place is the innermost line of yours: in no library, and not in this file. For a
    handler that stands in this file it is the innermost line here.
    """
    this_file = describe.__code__.co_filename
    here = ""
    yours = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        path = frame.f_code.co_filename
        place = f" ({os.path.basename(path)}:{line} in {frame.f_code.co_name})"
        if path == this_file:
            here = place
        elif not path.startswith(LIBRARIES):
            yours = place
    if isinstance(error, BadResult):
        here = ""  # it was raised after the handler had returned
    text = f"{type(error).__name__}: {error}"[:500]  # cut it, but never the place
    return text.removesuffix(": ") + (yours or here)


def printable(text: str) -> str:
    """Escape line breaks, control characters and halves of a surrogate pair.

    GOTCHA [forged-log]: a client puts a line break into what we log. What follows it
    looks like a line of ours. Escaped, it stays inside of its own line.
    """
    if text.isprintable():  # as nearly always
        return text
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def indent(report: str) -> str:
    """A traceback for the log. Each of its lines begins with a bar, so that none can
    pass for a line of the log itself."""
    return "".join(f"\n    | {printable(line)}" for line in report.splitlines())


def forget_frames(error: BaseException) -> None:
    """Take the traceback from the exception, and from those that it came from.

    GOTCHA [traceback-keeps-everything]: Python frees an object as soon as nobody refers
    to it. But an exception refers to its traceback. That refers to the functions it
    came through, and those to all their local variables. If one of these is the
    exception itself, the circle is closed: somebody always refers to it. Say that a
    handler fails with 20 MB in its hands. They are kept until Python looks for circles,
    and that may be much later. Text is all that we keep.
    """
    todo: list[BaseException | None] = [error]
    seen: set[int] = set()
    while todo:
        each = todo.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        # A class can forbid `each.__traceback__ = None`, but not this.
        BaseException.with_traceback(each, None)
        todo += [each.__cause__, each.__context__]
        if isinstance(each, BaseExceptionGroup):
            todo += each.exceptions


# -- The queue itself ----------------------------------------------------------------


class TaskQueue:
    """The queue: `async with TaskQueue(settings, handlers) as queue: ...`

    NEW: `async with` awaits `__aenter__()` at its start, and `__aexit__()` at its end.

    It runs while the block lasts. At the end of the block it stops (see `__aexit__`),
    and cancels what still waits: call `await queue.join()` before, to let all end.

    No method here may be called in another thread, or in another event loop. It would
    raise RuntimeError, before it has touched anything.
    """

    GRACE_SECONDS = 0.2  # at a stop, for handlers that ignore their cancellation

    def __init__(
        self, settings: Settings = DEFAULTS, handlers: Handlers = HANDLERS
    ) -> None:
        self.settings = settings
        self.handlers = handlers
        self.store = TaskStore(settings)
        # What checks the payloads of each type, and makes a model of them.
        self._adapters: dict[TaskType, TypeAdapter[Any]] = {}
        for task_type, function in handlers.items():
            with contextlib.suppress(TypeError):  # it is no handler
                self._adapters[task_type] = payload_type(function)

    # -- To start it -------------------------------------------------------------------

    # First reading.
    async def __aenter__(self) -> Self:
        """Start the worker loop."""
        self.store.loop = asyncio.get_running_loop()
        self.store.closed = False
        # NEW: An asyncio.PriorityQueue keeps a heap. That is a list in which the
        # smallest entry stands first. To put one in or take it out costs little,
        # however many there are. `await heap.get()` waits while it is empty.
        self._heap: asyncio.PriorityQueue[tuple[Priority, int, TaskRecord]]
        self._heap = asyncio.PriorityQueue()
        # NEW: A semaphore is a counter that never goes below 0. acquire() waits until
        # it is above 0 and takes one off. release() adds one.
        self._slots = asyncio.Semaphore(self.settings.max_workers)
        # GOTCHA [one-loop]: both belong to the event loop in which somebody first waits
        # for them. Made at import, they serve one app, or one test. The next one gets
        # "... is bound to a different event loop". So they are made here.

        # GOTCHA [strong-reference]: of an asyncio task that waits, the event loop has
        # only a weak reference. That doesn't keep an object alive. If nobody else
        # refers to it, it can be thrown away in the middle of its work: "Task was
        # destroyed but it is pending!" So we keep it in an attribute.
        self._worker = asyncio.create_task(self.worker_loop(), name="worker loop")
        self._worker.add_done_callback(self._report_death)  # calls it at the end
        return self

    @property
    def is_running(self) -> bool:
        """Whether the worker loop is alive.

        GOTCHA [dead-loop]: a flag that is set at the start is still set when a bug has
        killed the loop. Health says "healthy", and nothing runs. So ask the loop.
        """
        return self.store.loop is not None and not self._worker.done()

    def _report_death(self, worker: "asyncio.Task[None]") -> None:
        """Log the exception that has ended the worker loop, and end all watches.

        Nobody awaits the loop. Without this, its exception shows up late or never:
        "Task exception was never retrieved".
        """
        if not worker.cancelled():
            self.begin_shutdown()
            message = "the worker loop has died: no task will run"
            logger.critical(message, exc_info=worker.exception())

    # -- What callers use --------------------------------------------------------------

    # First reading.
    def submit(
        self,
        submission: TaskSubmission,
        request_id: str | None = None,
        idempotency_key: str | None = None,
    ) -> TaskStatus:
        """Take in a task, and return its first snapshot. Nothing in here awaits.

        1. Check the payload against the model of the handler: ValidationError.
        2. If the idempotency key is known, return the task that it has made. Raise
           IdempotencyKeyReused if it came with another submission then.
        3. Refuse, if the queue doesn't run (QueueStopped) or is full (QueueFull).
        4. Make the record, and let it wait for its turn.

        NEW: An idempotency key is the client's own name for a submission. A client that
        got no answer can't know whether the task exists. It sends the same key again,
        and gets the one task, not a second. A key is forgotten with its task.
        """
        self.store.check_caller()
        payload_json = to_json(submission.payload)
        # Only a check. Each attempt makes a model of its own from the text.
        self._adapters.get(submission.task_type, ANYTHING).validate_json(payload_json)

        fingerprint = self._fingerprint(submission, idempotency_key)
        earlier = self.store.by_key.get(idempotency_key)
        if earlier is not None and earlier.fingerprint != fingerprint:
            raise IdempotencyKeyReused("This key came with another submission")
        if earlier is not None:
            return TaskStatus.model_validate(earlier)

        # GOTCHA [await-put]: with a bounded asyncio.Queue one writes `await put(task)`.
        # It waits until there is room, and the client waits with it. To them the server
        # hangs. So they try again, and make it worse. Say no, and say it at once.
        # No await stands between this check and add(): nobody can take the last place.
        if not self.is_running or self.store.closed:
            raise QueueStopped("The queue takes no tasks now: it is not running")
        if self.count(Status.PENDING) >= self.settings.max_pending:
            raise QueueFull(f"{self.settings.max_pending} tasks are waiting already")

        record = TaskRecord(
            id=secrets.token_hex(16),
            sequence=self.store.submitted,
            created_at=datetime.now(UTC),
            request_id=request_id and printable(str(request_id)),
            idempotency_key=idempotency_key,
            fingerprint=fingerprint,
            payload_json=payload_json,
            task_type=submission.task_type,
            priority=submission.priority,
            max_retries=submission.max_retries,
            timeout=submission.timeout,
        )
        self.store.add(record)
        self._schedule(record, submission.delay)
        return TaskStatus.model_validate(record)

    def _fingerprint(self, submission: TaskSubmission, key: str | None) -> bytes:
        """32 bytes that are the same for the same submission, and for no other.

        Without a key nobody asks for them. sort_keys: {"a": 1, "b": 2} and
        {"b": 2, "a": 1} are the same JSON object.
        """
        if key is None:
            return b""
        text = json.dumps(submission.model_dump(), sort_keys=True)
        return hashlib.sha256(text.encode()).digest()

    # First reading.
    def cancel(self, task_id: str, force: bool = False) -> TaskStatus:
        """Cancel a waiting task at once. With `force`, ask a running one to stop.

        A running task is returned with the status `running`. It keeps that until its
        handler has ended. To force it again interrupts the handler again. Raises
        TaskNotFound, and TaskNotCancellable.
        """
        record = self.store.find(task_id)
        if record.status is Status.PENDING:
            self.store.move(record, Status.CANCELLED)
            self._sweep()  # removes dead entries from the heap, if there are many
        elif record.status is Status.RUNNING and force:
            record.cancel_requested = True
            self._interrupt(record)
        else:
            reason = "a waiting one can be cancelled, and a running one by force"
            raise TaskNotCancellable(f"The task is {record.status}: {reason}")
        return TaskStatus.model_validate(record)

    def get_task(self, task_id: str) -> TaskStatus:
        """The task as it is now. Raises TaskNotFound."""
        return TaskStatus.model_validate(self.store.find(task_id))

    def list_tasks(
        self, status: Status | None = None, limit: int = 100, offset: int = 0
    ) -> tuple[list[TaskStatus], int]:
        """One page of the tasks with that status (None: all), and how many there are.

        Without a status, the last one submitted comes first. With a status, the last
        one to enter that status comes first.

        SIMPLIFIED: it steps over `offset` tasks. That is nothing for the first pages,
        and some milliseconds for an offset of a million. A database has an index.
        """
        self.store.check_caller()
        records = self.store.by_id
        if status is not None:
            records = self.store.by_status[status]
        start = min(offset, len(records))  # islice() refuses a number over 2**63
        page = itertools.islice(reversed(records.values()), start, start + limit)
        return [TaskStatus.model_validate(record) for record in page], len(records)

    def count(self, status: Status) -> int:
        """How many tasks have that status."""
        self.store.check_caller()
        return len(self.store.by_status[status])

    # First reading.
    def watch(self, task_id: str, last_event_id: int = 0) -> Snapshots:
        """Iterate over the states of a task after version `last_event_id`.

        Raises TaskNotFound here, and not when it is iterated over. So this is a plain
        function, and it returns the generator.
        """
        return self.store.states(self.store.find(task_id), last_event_id)

    async def join(self) -> None:
        """Wait until no task waits and none runs. Raises RuntimeError if none can run.

        A delayed task waits, too. WHY not `PriorityQueue.join()`: that one counts calls
        of task_done(). If one is forgotten, it hangs for ever. If there is one too
        many, as for a cancelled task, "task_done() called too many times" is raised.
        """
        while self.count(Status.PENDING) + self.count(Status.RUNNING) > 0:
            if self._worker.done() and not self._worker.cancelled():
                raise RuntimeError("the worker loop has died")
            await self.store.news.wait()

    # -- To start a task ---------------------------------------------------------------

    # First reading.
    def _schedule(self, record: TaskRecord, delay: float) -> None:
        """Let the task start, now or `delay` seconds later.

        NEW: `loop.call_later(5, f, x)` calls `f(x)` in five seconds, and costs nothing
        until then. It returns a handle with a `cancel()`.

        GOTCHA [backoff-holds-slot]: `await asyncio.sleep(backoff)` before the retry is
        shorter. But the attempt keeps its slot meanwhile. Some tasks that fail, and all
        slots are asleep. A timer holds no slot.

        GOTCHA [kept-context]: call_later keeps a copy of the caller's context
        variables until it fires, for up to a day. Maybe a database session is among
        them. So it gets an empty context.
        """
        if delay <= 0:
            self._make_ready(record)
            return
        record.not_before = datetime.now(UTC) + timedelta(seconds=delay)
        loop = asyncio.get_running_loop()
        empty = contextvars.Context()
        record.timer = loop.call_later(delay, self._make_ready, record, context=empty)

    # First reading.
    def _make_ready(self, record: TaskRecord) -> None:
        """Put the task into the heap: it may start as soon as its turn has come.

        Python compares tuples from left to right: (1, 17, a) < (5, 3, b) < (5, 4, c).

        GOTCHA [tie-break]: `(priority, record)` works until two priorities are equal.
        Then the records are compared: "TypeError: '<' not supported between instances
        of 'TaskRecord' and 'TaskRecord'". `(priority, time, record)` is no cure. Clocks
        step back, and two calls can get the same time. A counter does neither.

        GOTCHA [retry-keeps-priority]: a retry that takes a new number stands behind
        all that came since. Its old number gives it its old place.
        """
        self._heap.put_nowait((record.priority, record.sequence, record))

    def _sweep(self) -> None:
        """Throw the dead entries out of the heap, if most are dead.

        GOTCHA [lazy-cancel]: a heap can't cheaply lose an entry from its middle. The
        entry of a cancelled task stays until worker_loop takes it out and drops it.
        But while all slots are taken, it takes out nothing. Clients that submit and
        cancel all day then fill the memory. So each cancel looks how many are dead. If
        that is far more than half, all are taken out, and those that live are put back.
        """
        size = self._heap.qsize()
        if size > 100 + 2 * self.count(Status.PENDING):
            for entry in [self._heap.get_nowait() for _ in range(size)]:
                if entry[2].status is Status.PENDING:
                    self._heap.put_nowait(entry)

    # First reading.
    async def worker_loop(self) -> None:
        """For ever: take a slot, then the best task, and start an attempt.

        GOTCHA [slot-before-get]: the other way round is the usual one. Take the best
        task, then wait for a slot with the task in hand. A HIGH task that comes in the
        meantime is late: the LOW one in hand runs first. And if the loop is cancelled
        while it waits, the task in its hand is lost. With the slot first, a task is
        chosen when it can start.
        """
        current_settings.set(self.settings)  # the attempts inherit it
        while True:
            await self._slots.acquire()
            _, _, record = await self._heap.get()
            while record.status is not Status.PENDING:  # cancelled: a dead entry
                _, _, record = await self._heap.get()
            # GOTCHA [strong-reference] is no danger here: the event loop keeps an
            # asyncio task until its first step. There, this one puts itself into the
            # record.
            attempt = asyncio.create_task(self._attempt(record))
            # Usually it has not begun yet. But Python 3.12 has an option for eager
            # asyncio tasks: create_task() itself runs the first step. If then no
            # handler has to wait, each slot comes back at once. This loop would go on
            # until the heap is empty, and nobody else would have a turn. sleep(0) gives
            # up the turn, once.
            if attempt.done():
                await asyncio.sleep(0)

    # First reading.
    async def _attempt(self, record: TaskRecord) -> None:
        """Call the handler once, and settle what comes of it.

        A task becomes `running` in here, in the first step, and not in worker_loop.
        Until then it is still `pending`, although it is no longer in the heap.

        GOTCHA [cancel-before-first-step]: an asyncio task that is cancelled before its
        first step runs none of its code, and no `finally`. The usual worker_loop marks
        the task as `running`, and keeps the asyncio task in the record. If a client
        cancels it by force before that step, it stays `running` for ever, and its slot
        is lost. Here, both are done in the first step. Until then the task is
        `pending`: cancel() moves it to `cancelled`, and the first lines here see that.
        And nobody can find the asyncio task to cancel it.

        GOTCHA [cancelled-error]: `except Exception` misses CancelledError, and then
        nobody records the end of the task. It also misses SystemExit, which asyncio
        hands on to whoever runs the loop: one sys.exit() in a handler ends the server.
        To catch them all is wrong nearly everywhere. It is right here, in the outermost
        function of an asyncio task, where nothing follows but the books.
        """
        slots = self._slots  # a queue that is started a second time has others
        if record.status is not Status.PENDING:  # cancelled since it was taken
            slots.release()
            return
        self._begin(record)
        result_json = b"null"
        error: str | None = None
        report = ""
        retry = False  # whether the exception, if there is one, allows it
        try:
            result_json = await self._run_handler(record)
        except BaseException as exception:
            error, report, retry = explain(exception)
        # The slot is given back first: whatever is raised below, it is not lost. Nobody
        # can take it before all is settled, because there is no await in between.
        slots.release()
        self._settle(record, result_json, error, retry)
        # To log comes last. A log handler may raise, and then all is settled already.
        self._log(record, report)

    # First reading.
    def _begin(self, record: TaskRecord) -> None:
        """Note that an attempt begins, and set its deadline."""
        record.attempt += 1
        record.progress = 0
        record.error = None
        record.timed_out = False
        record.started_at = datetime.now(UTC)
        record.asyncio_task = asyncio.current_task()
        self.store.move(record, Status.RUNNING)
        # This comes after move(), because move() stops the timer. And it needs no empty
        # context: the one that it keeps is this attempt's, which lasts as long.
        loop = asyncio.get_running_loop()
        record.timer = loop.call_later(record.timeout, self._time_out, record)

    # First reading.
    async def _run_handler(self, record: TaskRecord) -> bytes:
        """Call the handler, and return its result as JSON text."""
        function = find_handler(record.task_type, self.handlers)
        # For what is no handler, payload_type() raises here: its tasks fail.
        adapter = self._adapters.get(record.task_type) or payload_type(function)
        result_json: bytes = await call_handler(
            function,
            payload=adapter.validate_json(record.payload_json),
            update_progress=self._make_update_progress(record),
            finish=lambda result: encode_result(result, self.settings.max_result),
        )
        return result_json

    def _make_update_progress(self, record: TaskRecord) -> Reporter:
        """Make the `update_progress` of one attempt. Any thread may call it.

        NEW: From another thread, nothing of asyncio may be touched. There are a few
        exceptions, made for that. `loop.call_soon_threadsafe(f, x)` asks the event loop
        to call `f(x)` at its next turn, in its own thread.

        GOTCHA [progress-from-thread]: wake a stream from a handler's thread, and it may
        sleep on until something else happens. So a thread asks the loop to do it.

        GOTCHA [progress-flood]: a handler reports once per row, a million times. Each
        report would be a call for the loop to make, and no request gets its turn. Only
        a higher whole per cent is passed on: a hundred calls at most.
        """
        loop = asyncio.get_running_loop()
        loop_thread = threading.get_ident()
        attempt = record.attempt
        highest = 0

        def update_progress(percent: float) -> None:
            """Report how far this attempt is, in per cent: 0 to 100."""
            nonlocal highest  # the variable of the function around this one
            in_other_thread = threading.get_ident() != loop_thread
            # These two are about the attempt that runs now. It is that of this thread:
            # a plain `def` handler is not tried again before its thread has ended.
            asked_to_stop = record.cancel_requested or record.timed_out
            if in_other_thread and asked_to_stop:
                # An exception here is the one way to stop a thread. Of all exceptions
                # this one, because `except Exception` in a handler doesn't catch it.
                raise asyncio.CancelledError("this attempt was asked to stop")
            progress = whole_percent(percent)
            if progress <= highest:
                return
            highest = progress
            if in_other_thread:
                note = self._note_progress
                loop.call_soon_threadsafe(note, record, attempt, progress)
            else:
                self._note_progress(record, attempt, progress)

        return update_progress

    def _note_progress(self, record: TaskRecord, attempt: int, progress: int) -> None:
        """Note how far an attempt is. It never goes back, and an end is an end.

        A report can come late: from something that a handler has left running.
        """
        current = record.status is Status.RUNNING and record.attempt == attempt
        if current and progress > record.progress:
            record.progress = progress
            self.store.changed(record)

    # -- To end an attempt -------------------------------------------------------------

    def _time_out(self, record: TaskRecord) -> None:
        """The attempt has had `timeout` seconds."""
        record.timed_out = True
        self._interrupt(record)

    # First reading.
    def _interrupt(self, record: TaskRecord) -> None:
        """Ask the handler that runs to stop. What comes of it, _settle() decides.

        A cancel is a request: the coroutine can clean up first, or even catch the error
        and go on. To ask again raises it again.

        A thread can't be reached in this way (see run_in_thread). Its next
        `update_progress` will raise. If it never calls that, it runs to its end and
        keeps its slot, whatever the timeout says.
        """
        function = self.handlers.get(record.task_type)
        in_thread = function is not None and not is_async(function)
        if record.asyncio_task is not None and not in_thread:
            record.asyncio_task.cancel()

    # First reading.
    def _settle(
        self, record: TaskRecord, result_json: bytes, error: str | None, retry: bool
    ) -> None:
        """Decide what becomes of a task after an attempt. The first row that fits:

            a cancel was asked for                      →  cancelled
            the handler returned, in time               →  completed
            it failed, and may be tried again           →  pending, with a backoff
            it failed                                   →  failed

        A handler that ends after its time was up has failed, whatever it returns or
        raises. It may be tried again.

        GOTCHA [whose-timeout]: what comes out of a handler doesn't say why. A
        TimeoutError may be our deadline, or that of the handler's own HTTP client. A
        CancelledError may be a client's cancel, a stop, or a bug. And a handler can
        swallow each of them. So nothing is concluded from exceptions. We noted down
        what we did: `cancel_requested`, `timed_out`.
        """
        record.asyncio_task = None
        if record.status is not Status.RUNNING:
            return  # the queue has stopped without it: see _cancel_all()
        if record.cancel_requested:
            self.store.move(record, Status.CANCELLED)
            return
        if record.timed_out:
            error = f"TimeoutError: no result within {record.timeout:g} s"
            retry = True
        record.error = error
        if error is None:
            record.progress = 100
            record.result_json = result_json
            self.store.move(record, Status.COMPLETED)
        elif retry and record.attempt <= record.max_retries:
            self.store.move(record, Status.PENDING)
            self._schedule(record, backoff_delay(record.attempt, self.settings))
        else:
            self.store.move(record, Status.FAILED)

    def _log(self, record: TaskRecord, report: str) -> None:
        """Write how an attempt has ended, and why, if it has failed."""
        text = "[%s] task %s (%s) attempt %d: %s"
        ids = (record.request_id, record.id, record.task_type, record.attempt)
        if record.error is None:
            logger.info(text, *ids, record.status)
        else:
            why = printable(record.error) + indent(report)
            logger.warning(text, *ids, f"{record.status}, {why}")

    # -- To stop it --------------------------------------------------------------------

    def begin_shutdown(self) -> None:
        """From now on refuse submissions, and end every watch. What runs, runs on.

        Under a server this comes some time before `__aexit__`: see the section App.
        """
        self.store.close()

    # First reading.
    async def __aexit__(self, *_: object) -> None:
        """Stop the queue.

        1. Refuse submissions, and end all watches.
        2. Start no more tasks, and cancel those that wait.
        3. Give the handlers that run `drain_seconds` to finish.
        4. Ask those that still run to stop, and wait GRACE_SECONDS for them.
        5. Leave behind whoever doesn't stop, with a warning.

        We can be cancelled ourselves while we wait in step 3 or 4: by a Ctrl-C under
        asyncio.run(), or by a timeout around the whole block. Then CancelledError comes
        out of that `await`. The two `finally` see to it that the other steps are done
        all the same, however often that happens.
        """
        self.begin_shutdown()
        self._worker.cancel()
        self._cancel_all(Status.PENDING)
        try:
            await self._wait_for_attempts(self.settings.drain_seconds)
        finally:
            # A dict must not change during a `for`. This one doesn't: to ask a handler
            # changes no status.
            for record in self.store.by_status[Status.RUNNING].values():
                record.cancel_requested = True
                self._interrupt(record)
            try:
                await self._wait_for_attempts(self.GRACE_SECONDS)
            finally:
                # Pending are those that came back for a retry meanwhile.
                self._cancel_all(Status.RUNNING, Status.PENDING)

    async def _wait_for_attempts(self, seconds: float) -> None:
        """Wait until the worker loop and all attempts have ended, but not longer.

        NEW: asyncio.wait() waits for some asyncio tasks until the time is up. It
        cancels none of them, and raises none of their exceptions.
        """
        running = self.store.by_status[Status.RUNNING].values()
        attempts = [record.asyncio_task for record in running if record.asyncio_task]
        await asyncio.wait([self._worker, *attempts], timeout=seconds)

    def _cancel_all(self, *statuses: Status) -> None:
        """End all tasks with one of these statuses as cancelled.

        A handler that runs is asked a last time to stop. Nobody waits for it any more,
        nor for its thread.
        """
        left_behind = []
        for status in statuses:
            for record in list(self.store.by_status[status].values()):
                self.store.move(record, Status.CANCELLED)
                if record.asyncio_task is not None:
                    record.asyncio_task.cancel()
                    left_behind.append(record)
        # To log comes last: a log handler may raise, and then all is done already.
        message = "[%s] task %s doesn't let go: its handler is left behind"
        for record in left_behind:
            logger.warning(message, record.request_id, record.id)


# ===== Middleware =================================================== module 07 =======
# What all requests have in common: an id, a line in the log, a place in the metrics, a
# limit for the body. It knows nothing of tasks.
#
# NEW: ASGI in a minute. It is the interface between a server, such as uvicorn, and a
# Python app. An ASGI app is a callable of three arguments.
#     scope     a dict that describes the request: method, path, headers
#     receive   `await receive()` gives the next part of its body, and after that the
#               news that the client has hung up
#     send      `await send(message)` takes the parts of the answer: one
#               "http.response.start" with status and headers, then the body in pieces
# FastAPI is such an app. A middleware is one, too, and it calls the next one. To see
# the answer go by, it hands down a `send` of its own, as below.
#
# GOTCHA [base-http-middleware]: Starlette's BaseHTTPMiddleware is shorter to write. But
# it runs the rest of the app in a second asyncio task. That one hands each piece of the
# answer to the first. So a context variable that a route sets is unknown here:
# it was set in the other asyncio task. Each piece of a stream makes a detour. And when
# a client hangs up, two asyncio tasks must be stopped in the right order. A plain ASGI
# class, as below, starts no asyncio task at all.

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Metrics:
    """How often each route was asked, how it answered, and how soon: to the first byte.

    GOTCHA [raw-path-labels]: with a counter for each path, each task has one of its
    own. A scanner who tries a million paths makes a million. The templates of the
    routes are few: "/tasks/{task_id}". A method is free text of the client's, too.

    SIMPLIFIED: production has the package prometheus_client, for Prometheus, a program
    that collects such numbers from many services.
    """

    def __init__(self) -> None:
        # Both by (method, route template, status).
        self.requests: Counter[tuple[str, str, int]] = Counter()
        self.seconds: defaultdict[tuple[str, str, int], float] = defaultdict(float)

    def record(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one answer."""
        if method not in METHODS:
            method = "OTHER"
        self.requests[method, route, status] += 1
        self.seconds[method, route, status] += seconds

    def as_json(self) -> dict[str, Any]:
        """Totals over all routes. The Prometheus format has each route by itself."""
        statuses: Counter[int] = Counter()
        for (_, _, status), count in self.requests.items():
            statuses[status] += count
        milliseconds = 1000 * sum(self.seconds.values())
        return {
            "total_requests": statuses.total(),
            "avg_duration_ms": round(milliseconds / max(1, statuses.total()), 3),
            "status_counts": statuses,
        }

    def as_prometheus(self) -> Iterator[str]:
        """Lines of the Prometheus text format, version 0.0.4."""
        name = "taskqueue_http_request_seconds"
        yield f"# HELP {name} Seconds until the first byte of an answer."
        yield f"# TYPE {name} summary"
        for (method, route, status), count in self.requests.items():
            labels = f'{{method="{method}",route="{route}",status="{status}"}}'
            yield f"{name}_sum{labels} {self.seconds[method, route, status]:.6f}"
            yield f"{name}_count{labels} {count}"


# First reading.
class RequestMiddleware:
    """Gives each request its id, its limit, its line in the log, and its metrics."""

    def __init__(self, app: ASGIApp, metrics: Metrics, settings: Settings) -> None:
        self.app = app  # the next one: FastAPI gives it
        self.metrics = metrics
        self.settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, from its first byte in to its last one out."""
        if scope["type"] != "http":  # "lifespan" or "websocket"
            await self.app(scope, receive, send)
            return

        started_at = time.perf_counter()
        answer_started = False
        body_size = 0
        request_id = self._request_id(scope)
        # FastAPI parses the cookies for each route, even if none wants them. In some
        # versions of Python, 64 KB of backslashes in one take five seconds.
        scope["headers"] = [pair for pair in scope["headers"] if pair[0] != b"cookie"]
        # What stands in the scope's "state" is `request.state` in a route.
        scope.setdefault("state", {})["request_id"] = request_id

        async def receive_limited() -> Message:
            """Pass on a part of the body, as long as it is not too large."""
            nonlocal body_size
            message = await receive()
            body_size += len(message.get("body", b""))
            # FastAPI calls this while it reads the body of a POST. It catches an
            # HTTPException, and makes an answer of it. Once the answer has begun, it is
            # too late for that. And a GET is left alone: its body is not read. But its
            # stream calls this, too, to hear that the client has gone. An exception
            # would break the stream.
            has_body = scope["method"] != "GET" and not answer_started
            max_body = self.settings.max_body
            if has_body and body_size > max_body:
                raise HTTPException(413, f"The body has over {max_body} bytes")
            return message

        async def send_with_id(message: Message) -> None:
            """Pass on a part of the answer. The first one gets the id."""
            nonlocal answer_started
            if message["type"] == "http.response.start":
                answer_started = True
                message.setdefault("headers", [])
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
                # GOTCHA [stream-latency]: a stream lasts as long as somebody watches
                # it, maybe an hour. Some of those, and the average says nothing about
                # all the others. So the clock stops at the first byte.
                seconds = time.perf_counter() - started_at
                self._record(scope, message["status"], seconds)
            await send(message)

        try:
            await self.app(scope, receive_limited, send_with_id)
        except SendTimeoutError:
            # A stream or a list has given up: see Routes. Its generator is closed.
            # SIMPLIFIED: the last piece, which uvicorn could not send, stays in memory
            # until the client reads on or hangs up. A proxy in front would hang up. And
            # uvicorn logs "ASGI callable returned without completing response."
            logger.warning("[%s] a reader has stopped reading: dropped", request_id)
        except Exception as error:
            # GOTCHA [unhandled-is-500]: the 500 for an unhandled exception is made by
            # Starlette's outermost layer. That is outside of this one: no id, not in
            # the metrics. So we make it here, unless the answer has begun already.
            if answer_started:
                raise
            _, report, _ = explain(error)
            logger.error("[%s] unhandled exception%s", request_id, indent(report))
            answer = JSONResponse({"detail": "Internal Server Error"}, 500)
            await answer(scope, receive, send_with_id)  # an answer is an ASGI app, too

    def _request_id(self, scope: Scope) -> str:
        """The client's own id if it is harmless, else a new one.

        With the client's own, one id follows a request through a chain of services.
        """
        inbound = Headers(scope=scope).get("X-Request-ID", "")
        if SANE_ID.fullmatch(inbound):
            return inbound
        return secrets.token_hex(8)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        """Count an answer that begins, and write its line into the log."""
        # The router has put its route into the scope by now, if there is one.
        route = getattr(scope.get("route"), "path", "(none)")
        self.metrics.record(scope["method"], route, status, seconds)
        request_id = scope["state"]["request_id"]
        line = f"{scope['method'][:20]} {scope['path'][:200]} {status}"
        # Both are free text of the client's: a path with %0A in it has a line break.
        logger.info("[%s] %s %.1f ms", request_id, printable(line), 1000 * seconds)


# ===== Routes ======================================================= module 07 =======
# The queue over HTTP. A route translates a request into a call of the queue. What the
# queue raises is turned into a status code by one table, HTTP_STATUS, for all routes.
#
# All are `async def`, also where nothing is awaited. FastAPI calls a plain `def` route
# in a thread. That takes as long again as the rest of the request, and the queue
# refuses it.
#
# SIMPLIFIED: whoever reaches the port may do everything. Production asks who it is.

router = APIRouter()
PIECE = 65_536  # bytes that are sent at once, more or less
MOST_ERRORS = 20  # that a 422 tells

HTTP_STATUS: dict[type[QueueError], int] = {
    TaskNotFound: 404,
    TaskNotCancellable: 409,
    IdempotencyKeyReused: 422,
    QueueFull: 503,
    QueueStopped: 503,
}


def queue_of(request: Request) -> TaskQueue:
    """The queue of the app. It is there once the lifespan has begun.

    Without that: "'State' object has no attribute 'queue'". httpx's ASGITransport runs
    no lifespan, and none is run for an app that is mounted in another one. Write
    `async with app.router.lifespan_context(app):` in your test, or in the outer
    lifespan.
    """
    queue: TaskQueue = request.app.state.queue
    return queue


# First reading.
@router.post("/tasks", status_code=202, responses={400: {}, 413: {}, 503: {}})
async def submit_task(
    submission: TaskSubmission,
    request: Request,
    response: Response,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> TaskStatus:
    """Submit a task. 202 means: it is kept, and not done yet.

    With an `Idempotency-Key`, a repeated request gets the task of the first one.
    """
    request_id = request.state.request_id
    try:
        task = queue_of(request).submit(submission, request_id, idempotency_key)
    except ValidationError as error:  # the payload doesn't fit its handler's model
        if error.error_count() > 1000:  # to make a list of them would take its time
            detail = f"The payload has {error.error_count()} errors"
            raise HTTPException(422, detail) from None
        # Make of it what FastAPI raises for a bad body: so both get the same 422.
        problems = error.errors(include_url=False, include_input=False)[:MOST_ERRORS]
        for problem in problems:
            problem["loc"] = ("body", "payload", *problem["loc"])
        raise RequestValidationError(problems) from None
    root_path = request.scope.get("root_path", "")  # the prefix of a proxy or a mount
    response.headers["Location"] = f"{root_path}/tasks/{task.id}"
    return task


@router.get("/tasks", response_model=TaskList)
async def list_tasks(
    request: Request,
    status: Status | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    offset: Annotated[int, Query(ge=0)] = 0,
) -> Response:
    """List the tasks, newest first, a page at a time.

    A task has its whole payload here. A page of 1,000 large ones is 64 MB. If yours are
    large, ask for fewer: `limit`.
    """
    queue = queue_of(request)
    tasks, total = queue.list_tasks(status, limit, offset)
    return TimedResponse(list_pieces(tasks, total), queue.settings.send_timeout)


class TimedResponse(StreamingResponse):
    """JSON in pieces. It gives up on a client that has stopped reading."""

    def __init__(self, pieces: AsyncIterator[bytes], send_timeout: float) -> None:
        super().__init__(pieces, media_type="application/json")
        self.send_timeout = send_timeout

    async def stream_response(self, send: Send) -> None:
        """Send all pieces. Raises SendTimeoutError if one has to wait too long.

        A piece waits until the client has read most of those before it. Meanwhile all
        tasks of the page stay in memory, also those that are evicted.

        NEW: asyncio.timeout() cancels what stands in its block when the time is up, and
        makes a TimeoutError of that.
        """

        async def send_in_time(message: Message) -> None:
            """Send one piece."""
            try:
                async with asyncio.timeout(self.send_timeout):
                    await send(message)
            except TimeoutError:
                raise SendTimeoutError from None

        await super().stream_response(send_in_time)


async def list_pieces(tasks: list[TaskStatus], total: int) -> AsyncIterator[bytes]:
    """The JSON of a TaskList, piece by piece.

    WHY not just return a TaskList: each payload would be parsed and encoded again, in
    one step. A hundred large ones take a second, and nobody else is served meanwhile.
    And 64 MB would wait in memory for a client that doesn't read. Here the server waits
    for it after each piece, and others get their turn.
    """
    piece = bytearray(b'{"tasks":[')
    for number, task in enumerate(tasks):
        if number > 0:
            piece += b","
        piece += task.as_json()
        if len(piece) > PIECE:
            yield bytes(piece)
            piece.clear()
            await asyncio.sleep(0)
    yield bytes(piece) + b'],"total":%d}' % total


# First reading.
@router.get("/tasks/{task_id}", responses={404: {}})
async def get_task(task_id: str, request: Request) -> TaskStatus:
    """Show one task, in whatever state it is."""
    return queue_of(request).get_task(task_id)


# First reading.
@router.delete("/tasks/{task_id}", responses={202: {}, 404: {}, 409: {}})
async def cancel_task(
    task_id: str, request: Request, response: Response, force: bool = False
) -> dict[str, str]:
    """Cancel a task that waits. With `force=true`, also ask a running one to stop.

    That one is `cancelled` once its handler has let go.
    """
    task = queue_of(request).cancel(task_id, force)
    if task.status is Status.CANCELLED:
        return {"detail": "Task cancelled", "task_id": task_id}
    response.status_code = 202
    return {"detail": "Cancellation requested", "task_id": task_id}


# -- The stream of a task --------------------------------------------------------------
# NEW: Server-Sent Events (SSE) are an HTTP answer that doesn't end. It is text, made of
# frames. A frame is a few lines and an empty one:
#
#     event: progress
#     id: 1795656515327839
#     data: {"status": "running", "progress": 40, "attempt": 1}
#
# In a browser, `new EventSource("/tasks/1/stream")` reads it. If the connection breaks,
# it comes back by itself. It then sends the last `id` in the header Last-Event-ID.
# Frames with a name reach only `addEventListener("progress", …)`, and not `onmessage`.
# WHY SSE: a WebSocket talks both ways, and is another protocol. Polling asks a hundred
# times for nothing. Here only the server talks, and it is plain HTTP.

LastEventId = Annotated[str, Header(description="resume after this `id:`")]


# What a stream is, for the API's documentation.
STREAM: dict[str, Any] = {"content": {"text/event-stream": {}}}


def parse_event_id(text: str) -> int:
    """The number in a Last-Event-ID. Anything else is 0, which means "nothing seen".

    It is no error. EventSource sends it by itself, and its user can't mend it.
    """
    if re.fullmatch("[0-9]{1,18}", text):
        return int(text)
    return 0


def encode_frame(event: str, data: bytes, version: int | None = None) -> bytes:
    """One frame. `data` is JSON, and so one line: in a text, JSON writes a line break
    as the two characters \\n.

    No event is named "error": EventSource has one of that name.
    """
    id_line = ""
    if version is not None:
        id_line = f"id: {version}\n"
    return f"event: {event}\n{id_line}data: ".encode() + data + b"\n\n"


SHUTDOWN_FRAME = encode_frame("shutdown", b'{"detail": "The server is stopping"}')


# First reading.
def event_stream(queue: TaskQueue, frames: AsyncIterator[bytes]) -> EventSourceResponse:
    """Send the frames until they end, or until the client has gone.

    sse-starlette's EventSourceResponse does three things beside each other. It sends
    the frames. It sends a ping every `ping` seconds. It listens for the client's
    hang-up. And a client that has stopped reading? That goes like this:

    1. For a while nobody notices. What is sent goes into buffers of the operating
       system, here and at the client. They hold a hundred KB or more. If the task ends
       before they are full, nobody ever notices, and nobody needs to.
    2. When they are full, `await send(…)` has to wait.
    3. After `send_timeout` seconds, EventSourceResponse closes the generator of the
       frames, and raises SendTimeoutError. So the `finally` in states() counts the
       watcher off.
    4. RequestMiddleware catches that error, and writes a line into the log.

    When a server is told to stop, sse-starlette cuts each stream off after a grace
    period. We make that endless, because our streams end by themselves: as soon as the
    queue is closed.
    """
    return EventSourceResponse(
        frames,
        ping=queue.settings.ping_seconds,
        send_timeout=queue.settings.send_timeout,
        sep="\n",  # how a line of a ping ends: as ours do
        shutdown_grace_period=math.inf,
    )


# First reading.
@router.get(
    "/tasks/{task_id}/stream",
    response_class=EventSourceResponse,
    responses={200: STREAM, 204: {}, 404: {}},
)
async def stream_task(
    task_id: str, request: Request, last_event_id: LastEventId = ""
) -> Response:
    """Watch one task: its state now, then what changes, until it has ended.

        event: progress
        id: 1795656515327839
        data: {"status": "running", "progress": 40, "attempt": 1}

    204: it has ended, and your `Last-Event-ID` is that of its last frame. `event:
    shutdown`: the server stops.
    """
    queue = queue_of(request)
    sent = parse_event_id(last_event_id)
    # GOTCHA [404-after-200]: an error that is raised inside of the generator comes
    # after the status line. The client has a 200, and then a broken stream. The log has
    # "Caught handled exception, but response already started." Look it up out here.
    task = queue.get_task(task_id)
    # GOTCHA [reconnect-for-ever]: EventSource takes the end of a stream for a lost
    # connection, and comes back, again and again. A 204 tells it to stop (HTML
    # standard, 9.2 Server-sent events).
    if task.status in FINAL and task.version == sent:
        return Response(status_code=204)
    return event_stream(queue, task_frames(queue.watch(task_id, sent)))


# First reading.
async def task_frames(states: Snapshots) -> AsyncIterator[bytes]:
    """The frames of one task's stream.

    NEW: When a client hangs up, the asyncio task that sends to it is cancelled. It
    takes frames from this generator, and this one takes states from the one in
    states(). There are two places where it may wait.

    - In states(), at its `await`. CancelledError comes out there. On its way up it
      passes the `finally` there, and the `async with` here.
    - In a send. Then both generators stand at their `yield`. sse-starlette closes this
      one: Python raises the exception GeneratorExit at the `yield`. It knows nothing of
      the other one, whose watcher would still be counted. `async with aclosing(states)`
      closes that one as soon as this one is left.
    """
    ended = False
    async with contextlib.aclosing(states):
        async for task in states:
            ended = task.status in FINAL
            yield encode_frame("progress", task.progress_json, task.version)
    if not ended:
        yield SHUTDOWN_FRAME


# -- How it is doing -------------------------------------------------------------------


def overview(queue: TaskQueue) -> dict[str, Any]:
    """The queue in numbers. `life` tells one start of the server from another."""
    return {
        "life": queue.store.life,
        "workers": queue.settings.max_workers,
        "busy": queue.count(Status.RUNNING),
        "watchers": queue.store.watchers,
        "max_pending": queue.settings.max_pending,
        "submitted": queue.store.submitted,
        "evicted": queue.store.evicted,
        "tasks": {status.value: queue.count(status) for status in Status},
    }


@router.get("/health", responses={503: {}})
async def health(request: Request, response: Response) -> dict[str, Any]:
    """Say whether tasks are run.

    Each process has a queue of its own. With `--workers 2`, a task that one process has
    taken is a 404 in the other. If this answer shows two different `pid`s, it is so.
    """
    queue = queue_of(request)
    answer = {"status": "healthy", "pid": os.getpid(), **overview(queue)}
    if not queue.is_running:
        answer["status"] = "unhealthy"
        response.status_code = 503
    return answer


@router.get("/metrics", responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request, accept: Annotated[str, Header()] = "") -> Response:
    """Count requests and tasks.

    JSON, or the text format of Prometheus if `Accept` asks for text/plain or for
    application/openmetrics-text.
    """
    queue = queue_of(request)
    counted: Metrics = request.app.state.metrics
    vary = {"Vary": "Accept"}  # a cache must not give the one for the other
    wants_text = "text/plain" in accept or "application/openmetrics-text" in accept
    if "application/json" in accept or not wants_text:
        body = {**counted.as_json(), "queue": overview(queue)}
        return JSONResponse(body, headers=vary)
    lines = list(counted.as_prometheus())
    lines.append("# HELP taskqueue_tasks Tasks that are kept, by status.")
    lines.append("# TYPE taskqueue_tasks gauge")
    for status in Status:
        lines.append(f'taskqueue_tasks{{status="{status}"}} {queue.count(status)}')
    text = "\n".join(lines) + "\n"
    return PlainTextResponse(text, headers=vary, media_type="text/plain; version=0.0.4")


# -- Answers that are no success -------------------------------------------------------


async def answer_queue_error(request: Request, error: Exception) -> Response:
    """Say what the queue has refused, with the status code from the table."""
    assert isinstance(error, QueueError)  # for the type checker
    status = HTTP_STATUS[type(error)]
    detail: Any = str(error)
    if status == 422:  # in the shape of every other 422: a list
        loc = ("header", "idempotency-key")
        detail = [{"type": "value_error", "loc": loc, "msg": detail}]
    headers = {}
    if status == 503:
        headers["Retry-After"] = "1"
    return JSONResponse({"detail": detail}, status, headers)


async def answer_invalid(request: Request, error: Exception) -> Response:
    """422, with place and reason of each error, up to MOST_ERRORS of them.

    GOTCHA [echoed-input]: FastAPI's own answer repeats the input that it refuses. If
    that is a NaN, the answer can't be encoded, and the client's mistake is our 500.
    """
    assert isinstance(error, RequestValidationError)  # for the type checker
    detail = []
    for problem in error.errors()[:MOST_ERRORS]:
        message = problem["msg"]
        if problem["type"] == "json_invalid":
            message = f"{message}: {problem['ctx']['error']}"
        # GOTCHA [missing-content-type]: `curl -d` sends a form. FastAPI then takes the
        # body for bytes: "Input should be a valid dictionary or object to extract
        # fields from". That helps nobody.
        if isinstance(problem.get("input"), bytes):
            content_type = request.headers.get("Content-Type", "none")
            message = "Send JSON, with the header Content-Type: application/json"
            message += f". The Content-Type was: {content_type:.100}"
        detail.append({"type": problem["type"], "loc": problem["loc"], "msg": message})
    # json.dumps() writes ASCII. So a lone surrogate in a field's name does no harm.
    body = json.dumps({"detail": detail})
    return Response(body, 422, media_type="application/json")


async def answer_http_error(request: Request, error: Exception) -> Response:
    """As FastAPI does it, with one thing added.

    If it can't read a body (no UTF-8, or a million brackets), its 400 has no reason.
    The reason is the exception that it came from.
    """
    assert isinstance(error, HTTPException)  # for the type checker
    detail = str(error.detail)
    if error.status_code == 400 and error.__cause__ is not None:
        detail += f": {error.__cause__}"
    if isinstance(error.__cause__, UnicodeDecodeError):
        detail += ". Send JSON in UTF-8, not compressed"
    return JSONResponse({"detail": detail}, error.status_code, error.headers)


# ===== App ========================================================== module 05 =======
# The parts put together.


def hear_signals() -> None:
    """See to it that sse-starlette learns of a Ctrl-C or SIGTERM.

    Skip it at first. It is needed with uvicorn's `--reload` and `--workers` alone.

    NEW: With a signal, the operating system tells a process something. SIGINT is
    Ctrl-C, and `kill` sends SIGTERM. For each, a process can register a function that
    Python then calls. (Our class Signal has only the name in common.)

    uvicorn registers a method of its server, handle_exit(). sse-starlette wants to
    know, too. So it changes uvicorn's class, as soon as it is imported. In the place of
    handle_exit() it puts a function of its own. That notes the signal, and then calls
    uvicorn's. But with those two options, uvicorn starts a process, registers its
    method there, and imports this file only then. It is too late: what is registered
    is uvicorn's own.

    So we look what is registered. The `__self__` of a method is its object. If
    that is a server, we register the server's handle_exit() again. By now, that is
    the one of sse-starlette.
    """
    if threading.current_thread() is not threading.main_thread():
        return  # Python gives signals to the main thread alone
    for number in (signal.SIGINT, signal.SIGTERM):
        server = getattr(signal.getsignal(number), "__self__", None)
        if isinstance(server, uvicorn.Server):
            signal.signal(number, server.handle_exit)


# First reading.
async def end_watches_at_a_signal(queue: TaskQueue) -> None:
    """Wait for a Ctrl-C or SIGTERM, and end all watches then.

    GOTCHA [shutdown-order]: at Ctrl-C, uvicorn waits until all answers have ended. Only
    then it ends the lifespan, and with it the queue. But a stream doesn't end by
    itself. So Ctrl-C hangs: "Waiting for connections to close. (CTRL+C to force quit)".
    Here the app looks out for the signal itself. This is what a Ctrl-C does:

    1. uvicorn notes it, in a flag of its server. sse-starlette notes it, in
       AppStatus.should_exit, a flag for the whole process.
    2. uvicorn looks at its flag ten times a second. It takes no new connections from
       then on, and waits for the answers that have begun.
    3. This function looks at the other flag, just as often. It calls begin_shutdown().
    4. That wakes all watches, and they end. Each stream sends its last frame, of the
       event "shutdown", and ends, too.
    5. Now that all answers have ended, uvicorn ends the lifespan: see create_app().
    6. So `__aexit__` of the queue runs. Handlers get `drain_seconds`, as it says.

    (`python taskqueue.py` adds two things, in its class Server, below the lesson. A
    second after the Ctrl-C it drops the connections of clients that don't read: else
    step 2 would wait for them. And a second Ctrl-C calls os._exit(), which ends the
    process at once.)

    GOTCHA [whose-stop]: in a notebook, or in tests, two servers live in one process.
    Code ends one of them, by `server.should_exit = True`. Then the streams of the other
    must go on. So this function does not look at the flag of a server. It looks only at
    AppStatus.should_exit, which a signal sets: a signal is meant for all. The price:
    whoever ends a server by its own flag calls `queue.begin_shutdown()` first. The
    demo's Server does. (sse-starlette looks at both flags. Without the endless grace
    period in event_stream(), it would cut off the streams of the wrong server, too.)
    """
    while not AppStatus.should_exit:
        await asyncio.sleep(0.1)
    queue.begin_shutdown()


# First reading.
def create_app(settings: Settings = DEFAULTS, handlers: Handlers = HANDLERS) -> FastAPI:
    """An app with a queue of its own."""

    # NEW: A lifespan is what an app does before its first request and after its last.
    # It is written as one function with a `yield` in the middle. asynccontextmanager
    # makes something of it that `async with` takes: up to the `yield` runs at the
    # start, the rest at the end. Here belongs what needs the event loop and an end.
    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        """Run the queue for as long as the app runs."""
        # The whole process has this one flag. An earlier server may have left it set.
        AppStatus.should_exit = False
        hear_signals()
        async with TaskQueue(settings, handlers) as queue:
            app.state.queue = queue
            lookout = asyncio.create_task(end_watches_at_a_signal(queue))
            try:
                yield
            finally:
                lookout.cancel()  # it has nothing to clean up: no need to wait

    app = FastAPI(
        title="taskqueue",
        summary="An async task queue, in memory",
        lifespan=lifespan,
        docs_url=None,  # see docs(), below the lesson
        redoc_url=None,
        redirect_slashes=False,  # behind a proxy, a redirect would leave its prefix
        # For the API's documentation: its addresses are relative, for the same reason.
        servers=[{"url": "."}],
        root_path_in_servers=False,
    )
    app.state.metrics = Metrics()
    app.include_router(router)
    app.add_middleware(RequestMiddleware, metrics=app.state.metrics, settings=settings)
    app.add_exception_handler(QueueError, answer_queue_error)
    app.add_exception_handler(RequestValidationError, answer_invalid)
    app.add_exception_handler(HTTPException, answer_http_error)
    return app


# ======================================================================================
# The lesson ends here. What follows shows it at work: a live page, and a guided tour.
# ======================================================================================


# ===== Page ===========================================================================
# `GET /` answers with this text: one HTML page that shows the queue at work. It uses
# the API as any client does, and it loads nothing from another host.
#
# WHY no `innerHTML`: what a client has sent must stay text, and never become HTML.
# WHY "tasks", and not "/tasks": a relative address also works behind a path prefix.
# The route puts a fresh nonce in the place of NONCE, so no other script can run.

PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>taskqueue</title>
<style nonce="NONCE">
  :root {
    color-scheme: light dark;
    color: light-dark(#17212d, #e8edf3);
    background: light-dark(#e3eaf1, #0e1319);
    --card: light-dark(#ffffff, #1b232e);
    font: clamp(16px, 0.6vw + 9px, 28px) / 1.4 system-ui, sans-serif;
  }
  .HIGH { --tone: light-dark(#a6370a, #ffab6b); }
  .MEDIUM { --tone: light-dark(#0a5bb0, #84bdff); }
  .LOW, .cancelled { --tone: light-dark(#4d5a68, #b3bfcb); }
  .completed, .live, .good { --tone: light-dark(#0b6e31, #62d68c); }
  .failed, .gone, .bad { --tone: light-dark(#b3151f, #ff9393); }
  * { box-sizing: border-box; margin: 0; padding: 0; }
  body { padding: 0.6rem; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
  body, header, nav, ol, li { display: flex; flex-wrap: wrap; gap: 0.3rem 0.7rem; }
  main { flex: 99 1 38rem; min-width: 0; }
  aside { flex: 1 1 19rem; min-width: 0; }
  h1, h2 { font-size: 1rem; }
  h2 { margin: 0.7rem 0 0.1rem; }
  a { color: inherit; }
  b, output, summary { color: var(--tone); }
  p, pre, form, main > ol { padding: 0.3rem 0.6rem; background: var(--card); }
  pre { font: inherit; white-space: pre-wrap; max-height: 16rem; overflow: auto; }
  pre:empty { display: none; }
  button, input, select, textarea { padding: 0 0.4rem; font: inherit; }
  label, .slot { display: grid; grid-template-columns: 4.5rem minmax(0, 1fr); }
  .slot { grid-template-columns: 3.4rem minmax(0, 1fr); }
  :focus-visible { outline: 3px solid; }
  .stale { filter: grayscale(1); opacity: 0.85; }
  header, li { width: 100%; min-height: 1.8rem; align-items: center; }
  li b { width: 4.8rem; }
  li a { width: 11.8rem; }
  progress, details { flex: 1 1 12rem; min-width: 0; accent-color: var(--tone); }
  details:not([open]) summary { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
  .slot ol:empty::before { content: "free"; }
  .track { position: relative; grid-column: 2; height: 1.6rem; overflow: hidden; }
  .bar { position: absolute; height: 1.4rem; overflow: hidden; }
  .bar, #ready li { border-radius: 0.3rem; background: var(--tone); color: var(--card); }
  #ready { max-height: 13rem; overflow: hidden auto; }
  #ready li { width: auto; padding: 0 0.5rem; animation: arrive 0.6s; }
  #ready :is(a, b) { width: auto; color: inherit; }
  #ready details { display: none; }
  @keyframes arrive { from { transform: translateX(60vw); } }
  @media (prefers-reduced-motion) { #ready li { animation: none; } }
</style>

<header>
  <h1>taskqueue</h1>
  <b><output id="state">connecting…</output></b>
  <span id="heard"></span>
  <a href="docs">API docs</a>
  <a href="metrics">Metrics</a>
</header>
<main>
  <nav id="scenarios" aria-label="Scenarios"></nav>
  <p id="caption" role="status">Press a button. Here it says what to watch, and what does it.</p>
  <h2 id="slots-title">Slots</h2>
  <ol id="slots"></ol>
  <h2 id="ready-title">Ready heap</h2>
  <ol id="ready"></ol>
  <h2 id="waiting-title">Delay or backoff</h2>
  <ol id="waiting"></ol>
  <h2 id="finished-title">Finished</h2>
  <ol id="finished"></ol>
</main>
<aside>
  <h2>Submit a task</h2>
  <form>
    <label>Type <select name="task_type">TYPES</select></label>
    <label>Priority <input name="priority" value="5" title="1 high, 5 medium, 10 low"></label>
    <label>Retries <input name="max_retries" value="0"></label>
    <label>Timeout <input name="timeout" value="60"></label>
    <label>Delay <input name="delay" value="0"></label>
    <label>Payload <textarea name="payload" rows="3">{}</textarea></label>
    <button>Submit</button>
  </form>
  <h2>The last request <span id="counter"></span></h2>
  <b id="request"></b>
  <b><output id="answer"></output></b>
  <pre id="curl"></pre>
  <button id="copy">Copy as curl</button>
  <pre id="details"></pre>
</aside>

<script nonce="NONCE">
// EventSource in six lines. It opens one GET that does not end: the answer is a stream of frames.
// A frame with `event: task` reaches addEventListener("task", …), and nothing else.
// `onmessage` hears only frames without a name. With named ones it stays silent.
// When the connection breaks, the browser opens it again by itself, after some seconds.
// It then sends the last `id:` as Last-Event-ID, and the server goes on from there.
// An answer 204 says that nothing more will come, and the browser stops asking.

const MINUTE = 60_000;
const PRIORITIES = {1: "HIGH", 5: "MEDIUM", 10: "LOW"};
const tasks = new Map();  // by id: what the server has told last
let queue = null;  // the latest `queue` event
let heardAt = 0;  // when it came
let rightAt = 0;  // when the page last knew of no more tasks than the server
let source = null;  // the EventSource
let late = 0;  // the timer that says after two seconds that there is no connection

const find = (selector) => document.querySelector(selector);
const seconds = (milliseconds) => `${(Math.max(0, milliseconds) / 1000).toFixed(1)} s`;
const keyOf = (task) => `${task.id} ${task.attempt}`;
const percent = (milliseconds) => `${(100 * milliseconds) / MINUTE}%`;
const startsAt = (task) => Date.parse(task.not_before) || 0;
function say(selector, text) {
  const node = find(selector);
  if (node.textContent !== text) node.textContent = text;  // else it would be read out again
}
function element(tag, text = "", properties = {}) {
  return Object.assign(document.createElement(tag), {textContent: text, ...properties});
}

// ----- What the server tells
const hearTask = (task) => tasks.set(task.id, task);
function connect() {
  source?.close();
  source = new EventSource("events");
  tasks.clear();
  rightAt = Date.now();
  late = setTimeout(setState, 2000, "bad", "No connection. A browser has six: close other tabs?");
  source.onopen = () => {
    setState("live", "● live");
    askFor("running").catch(() => {});  // the server is gone again: onerror says so
    askFor("pending").catch(() => {});
  };
  source.onerror = () => {
    setState("gone", "The server is gone. This is what was. Trying again…");
    if (source.readyState === EventSource.CLOSED) setTimeout(connect, 2000);  // a proxy's 502
  };
  source.addEventListener("task", (event) => hearTask(JSON.parse(event.data)));
  source.addEventListener("queue", (event) => hearQueue(JSON.parse(event.data)));
}
function setState(state, text) {
  clearTimeout(late);
  find("#state").className = state;
  find("main").className = state === "gone" ? "stale" : "";
  say("#state", text);
}
function hearQueue(news) {
  if (queue && queue.life !== news.life) location.reload();  // the server was started again
  if (!queue) makeSlots(news.workers);
  queue = news;
  heardAt = Date.now();
}
// The stream begins with the latest 100 tasks. More may run or wait: the page asks for those.
async function askFor(status) {
  const answer = await fetch(`tasks?status=${status}&limit=1000`);
  const page = await answer.json();
  for (const task of page.tasks) hearTask(tasks.get(task.id) ?? task);
}
// A browser has six connections for a server and all its tabs. A hidden page gives its own back.
document.addEventListener("visibilitychange", () => {
  if (document.hidden) source.close();
  else connect();
});

// ----- Slots: in each the task that runs there, and a strip of the last minute
function makeSlots(count) {
  for (let number = 1; number <= count; number += 1) {
    const slot = element("li", `slot ${number}`, {className: "slot"});
    slot.append(element("ol"), element("div", "", {className: "track"}));
    find("#slots").append(slot);
  }
}
function drawSlots(running, finished, now) {
  const slots = [...find("#slots").children];
  for (const slot of slots) {
    slot.task = running.find((task) => keyOf(task) === slot.bar?.dataset.key);
  }
  // Also those that have ended: the page may never have heard that they run.
  for (const task of [...finished.toReversed(), ...running]) {
    if (task.started_at && !find(`.bar[data-key="${keyOf(task)}"]`)) addBar(task, slots, now);
  }
  for (const slot of slots) {
    if (slot.task) slot.bar.end = now;
    arrange(slot.firstElementChild, slot.task ? [slot.task] : []);
  }
  for (const bar of document.querySelectorAll(".bar")) {
    bar.style.right = percent(now - bar.end);
    bar.style.width = percent(bar.end - bar.start);
    if (now - bar.end > MINUTE) bar.remove();
  }
}
// The server does not tell which slot a task has. The page gives it the first that was free.
// The two clocks may differ: then it takes any that is free now.
function addBar(task, slots, now) {
  const start = Date.parse(task.started_at);
  const end = Date.parse(task.completed_at) || now;
  const free = slots.filter((slot) => !slot.task);
  const slot = free.find((slot) => !slot.bar || slot.bar.end <= start) ?? free[0];
  if (!slot || now - end > MINUTE) return;
  const className = `bar ${PRIORITIES[task.priority]}`;
  slot.bar = element("span", task.id.slice(0, 4), {className, start, end});
  slot.bar.dataset.key = keyOf(task);
  slot.lastElementChild.append(slot.bar);
  if (task.status === "running") slot.task = task;
}

// ----- Rows. A task has the same row in every list. The style makes a chip of it in the heap.
function makeRow(task) {
  const name = `${task.task_type} ${task.id.slice(0, 4)}`;
  const runs = task.status === "running";
  const row = element("li", "", {className: PRIORITIES[task.priority]});
  const details = element("details");
  const button = element("button", runs ? "Stop" : "×", {value: task.id});
  button.ariaLabel = `${runs ? "Stop" : "Cancel"} ${name}`;
  button.onclick = async () => {
    const answer = await send("DELETE", `tasks/${task.id}?force=${runs}`);
    if (answer.status === 202) button.textContent = "stopping…";
  };
  details.append(element("summary", describe(task), {className: task.status}));
  row.dataset.key = keyOf(task);
  row.append(element("b", row.className), element("a", name, {href: `tasks/${task.id}/stream`}));
  if (runs) row.append(element("progress", "", {max: 100, ariaLabel: name}));
  row.append(details);
  if (!task.completed_at) row.append(button);
  return row;
}
function describe(task) {
  const attempt = `attempt ${task.attempt} of ${task.max_retries + 1}`;
  const wait = seconds(startsAt(task) - Date.now());
  if (task.status === "pending") return `starts in ${wait}, ${attempt} ${task.error ?? ""}`;
  const begun = Date.parse(task.started_at ?? task.completed_at);
  const ran = seconds((Date.parse(task.completed_at) || Date.now()) - begun);
  if (task.status === "running") return `${task.progress} %, ${ran}, ${attempt}`;
  const waited = seconds(begun - Date.parse(task.created_at));
  const outcome = task.status === "completed" ? JSON.stringify(task.result) : task.error ?? "";
  return `${task.status}, ${attempt}, waited ${waited}, ran ${ran} ${outcome}`;
}
// Make the rows of a list those of `wanted`, in their order. A row that stays is kept.
function arrange(list, wanted) {
  const known = new Map([...list.children].map((row) => [row.dataset.key, row]));
  const rows = wanted.map((task) => known.get(keyOf(task)) ?? makeRow(task));
  for (const row of known.values()) {
    if (!rows.includes(row)) row.remove();
  }
  for (const [place, row] of rows.entries()) {
    const task = wanted[place];
    if (list.children[place] !== row) list.insertBefore(row, list.children[place]);
    if (!task.completed_at) row.querySelector("summary").textContent = describe(task);
    if (task.status === "running") row.querySelector("progress").value = task.progress;
  }
}

// ----- Drawing: ten times a second, however many news have come
function draw() {
  if (!queue || document.hidden) return;
  const now = Date.now();
  const focused = document.activeElement.value;
  const all = [...tasks.values()];
  const running = all.filter((task) => task.status === "running");
  const pending = all.filter((task) => task.status === "pending");
  const finished = all.filter((task) => task.completed_at);
  const ready = pending.filter((task) => startsAt(task) <= now);
  const waiting = pending.filter((task) => startsAt(task) > now);
  ready.sort((a, b) => a.priority - b.priority || a.created_at.localeCompare(b.created_at));
  waiting.sort((a, b) => startsAt(a) - startsAt(b));
  finished.sort((a, b) => b.completed_at.localeCompare(a.completed_at));
  for (const task of finished.splice(50)) tasks.delete(task.id);
  drawSlots(running, finished, now);
  arrange(find("#ready"), ready.slice(0, 40));
  arrange(find("#waiting"), waiting.slice(0, 20));
  arrange(find("#finished"), finished);
  if (document.activeElement === document.body) find(`main [value="${focused}"]`)?.focus();
  const {tasks: counts, workers} = queue;
  say("#heard", `last heard from the server ${seconds(now - heardAt)} ago`);
  say("#slots-title", `Slots: ${counts.running} of ${workers} are busy`);
  say("#ready-title", `Ready heap: ${counts.pending - waiting.length} wait, the next one first`);
  say("#waiting-title", `Delay or backoff: ${waiting.length} wait for their time`);
  say("#finished-title", `Finished: ${counts.completed} completed, ${counts.failed} failed`);
  // A task may be evicted before its end is told. Then the page knows one too many, and asks anew.
  const tooMany = running.length + pending.length > counts.running + counts.pending;
  if (!tooMany) rightAt = now;
  if (now - rightAt > 2000) connect();
}

// ----- Requests
async function send(method, path, body) {
  const url = new URL(path, location.href);
  const headers = {"Content-Type": "application/json"};
  const quoted = body?.replaceAll("'", "'\\''");
  const data = body ? ` -H 'Content-Type: application/json' -d '${quoted}'` : "";
  const slow = setTimeout(say, 2000, "#answer", "No answer for two seconds…");
  let answer = Response.error();  // until there is another: its status is 0
  let text = "";
  try {
    answer = await fetch(url, {method, headers, body});
    text = JSON.stringify(await answer.json(), null, 1);
  } catch (error) {
    text = `${error}. Is the server gone?`;
  }
  clearTimeout(slow);
  const lines = [...answer.headers].map((pair) => pair.join(": "));
  find("#answer").className = answer.ok ? "good" : "bad";
  say("#request", `${method} ${url.pathname}${url.search}`);
  say("#curl", `curl -i -X ${method} '${url}'${data}`);
  say("#answer", answer.status ? `${answer.status} ${answer.statusText}` : "No answer");
  say("#details", [...lines, text].join("\n"));
  return answer;
}
// What was typed goes out as it is: so the API says what is wrong with it, and 1.0 stays 1.0.
find("form").onsubmit = (event) => {
  event.preventDefault();
  const {task_type, ...others} = Object.fromEntries(new FormData(event.target));
  const fields = Object.entries(others).map(([name, value]) => `"${name}": ${value}`);
  send("POST", "tasks", `{"task_type": "${task_type}", ${fields.join(", ")}}`);
};
find("#copy").onclick = () => navigator.clipboard.writeText(find("#curl").textContent);

// ----- Scenarios
const image = {task_type: "resize_image"};
const report = {task_type: "generate_report", priority: 1};
const low = {task_type: "send_email", priority: 10};
const high = {task_type: "send_email", priority: 1};
const lost = {...high, max_retries: 4, payload: {to: "nobody@example.invalid"}};
const blocker = {...image, priority: 1, payload: {block_the_loop: true}};
async function submit(submissions) {
  for (const [place, submission] of submissions.entries()) {
    const answer = await send("POST", "tasks", JSON.stringify(submission));
    say("#counter", `(${place + 1} sent)`);
    if (!answer.ok) break;
  }
}
async function block() {
  const others = Array(Math.min(2, queue.workers - 1)).fill(image);
  await submit([...others, blocker]);
  send("GET", "health");
}
async function cancelAll() {
  for (const task of [...tasks.values()].reverse()) {
    if (task.status === "pending") await send("DELETE", `tasks/${task.id}`);
  }
}
function addScenario(name, play, caption) {
  const button = element("button", name);
  button.onclick = () => {
    say("#caption", caption);
    play();
  };
  find("#scenarios").append(button);
}
addScenario("Burst of mixed", () => submit(Array(6).fill([low, image, report, high]).flat()),
  "submit() puts each into the heap. worker_loop() takes the best one when a slot is free.");
addScenario("One HIGH behind ten LOW", () => submit([...Array(10).fill(low), high]),
  "The HIGH one comes last and starts next: worker_loop() takes a slot, then the best task.");
addScenario("Fails and retries", () => submit([lost, ...Array(6).fill(image)]),
  "_settle() sends it back to wait out a backoff_delay(). Meanwhile others have its slot.");
addScenario("Fill the queue", () => submit(Array(queue.max_pending + 100).fill(low)),
  "When no more may wait, submit() raises QueueFull: a 503 with Retry-After. No POST waits.");
addScenario("Block the loop", block,
  "A handler calls time.sleep(3) within _attempt(). Nobody else has a turn: no news, no answer.");
addScenario("Cancel all that wait", cancelAll, "A DELETE for each. cancel() ends it at once.");

connect();
setInterval(draw, 100);
</script>
"""  # noqa: E501
TYPES = "".join(f"<option>{task_type}</option>" for task_type in TaskType)
PAGE = PAGE.replace("TYPES", TYPES)


# -- The stream of all tasks -----------------------------------------------------------
# The page lives on one stream for all tasks.
#
# GOTCHA [six-connections]: over HTTP/1.1 a browser opens six connections to a host. A
# page with a stream for each row has none left for its seventh row, nor for a click.

NEWS = 100  # changes that are sent at once, at most
HOLD_SECONDS = 0.05  # between two batches to the same reader


def changes_since(store: TaskStore, version: int) -> list[TaskStatus]:
    """The tasks that have changed after that version, the oldest change first.

    At most NEWS of them: ask again with the version of the last one. If `version` is
    none of this life's, it is the latest NEWS tasks.
    """
    known = store.life <= version <= store.version
    changed: list[TaskRecord] = []
    for record in reversed(store.by_change.values()):
        if known and record.version <= version:
            break  # from here on, the reader knows all
        if not known and len(changed) == NEWS:
            break
        changed.append(record)
    changed.reverse()
    return [store.snapshot(record) for record in changed[:NEWS]]


@router.get("/events", response_class=EventSourceResponse, responses={200: STREAM})
async def stream_events(request: Request, last_event_id: LastEventId = "") -> Response:
    """Watch all tasks: the latest 100, then what changes.

        event: task
        id: 17
        data: (a task, without its payload)

        event: queue
        data: {"workers": 3, "busy": 1, "tasks": {"pending": 0, "running": 1}}

    This answer doesn't end. Read it with `curl -N`, and not with "Try it out".
    """
    queue = queue_of(request)
    return event_stream(queue, all_frames(queue, parse_event_id(last_event_id)))


async def all_frames(queue: TaskQueue, sent: int) -> AsyncIterator[bytes]:
    """The frames of the stream of all tasks, some at a time.

    GOTCHA [frame-by-frame]: a generator that yields frame after frame never waits. So
    the event loop gets no turn, and each frame is a send of its own. 200 readers, and
    41 POSTs a second are all that is left. Here the frames of a batch are one piece.
    After each piece others get their turn. And who has just been sent something waits a
    moment: what changes twice in it is sent once.
    """
    store = queue.store
    store.watchers += 1
    try:
        while True:
            closed = store.closed  # then this batch is the last
            changes = changes_since(store, sent)
            sent = store.version
            if len(changes) == NEWS:
                sent = changes[-1].version  # there may be more
            piece = bytearray()
            for task in changes:
                frame = encode_frame("task", task.summary_json, task.version)
                if piece and len(piece) + len(frame) > PIECE:
                    yield bytes(piece)  # at the end of a frame: a ping may follow
                    piece.clear()
                    await asyncio.sleep(0)
                piece += frame
            piece += encode_frame("queue", to_json(overview(queue)))
            yield bytes(piece)
            if closed:
                break
            await asyncio.sleep(HOLD_SECONDS)
            while store.version == sent and not store.closed:
                await store.news.wait()
    finally:
        store.watchers -= 1
    yield SHUTDOWN_FRAME


@router.get("/", include_in_schema=False)
async def page() -> HTMLResponse:
    """The live page. A nonce lets its own style and script run, and nothing else."""
    nonce = secrets.token_urlsafe(16)
    policy = (
        f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; require-trusted-types-for 'script'"
    )
    html = PAGE.replace("NONCE", nonce)
    return HTMLResponse(html, headers={"Content-Security-Policy": policy})


@router.get("/docs", include_in_schema=False)
async def docs() -> HTMLResponse:
    """FastAPI's own page of the API, with relative addresses, and a word if offline."""
    answer = get_swagger_ui_html(openapi_url="openapi.json", title="taskqueue: the API")
    box = '<div id="swagger-ui">'
    offline = (
        "This page loads its scripts from the internet. If you read this, it could not."
        ' The API is described in <a href="openapi.json">openapi.json</a>.'
    )
    return HTMLResponse(bytes(answer.body).decode().replace(box, box + offline))


app = create_app()  # for `uvicorn taskqueue:app`; nothing runs before it is served


# ===== Demo ===========================================================================
# `python taskqueue.py` serves the app, and takes a tour of it. The tour is a client
# like any other: what it shows comes over HTTP. Copy from it what you need.
#
# There are two threads. The server has the main one, because Python gives signals to
# that one alone. The tour has the other one, and may block there as it likes.


async def resize_that_may_block(
    payload: ResizeImagePayload, update_progress: Reporter
) -> Any:
    """Resize an image. In the demo, the payload may also have one of these keys.

    `{"block_the_loop": true}` shows GOTCHA [blocking-handler] live. For three seconds
    no page, no stream and no request moves.

    `{"for_the_tour": true}` never fails by chance, and is never too quick to be seen.
    So what the tour claims holds with any `--failure-rate` and any `--pace`.
    """
    if payload.model_extra == {"block_the_loop": True}:
        # The bug, on purpose. Right is `await asyncio.sleep(3)`. ruff knows it, too:
        time.sleep(3)  # noqa: ASYNC251
        return "the event loop stood still for 3 seconds"
    if payload.model_extra == {"for_the_tour": True}:
        settings = current_settings.get()
        calm = {"failure_rate": 0.0, "pace": max(0.1, settings.pace)}
        # Each attempt is an asyncio task, so this is set for this attempt alone.
        current_settings.set(settings.model_copy(update=calm))
    return await resize_image(payload, update_progress)


def say(text: str, end: str = "\n") -> None:
    """Print at once. Into a pipe, Python would print only when it has 8 KB together."""
    with contextlib.suppress(OSError):  # the pipe's reader has gone: `… | head -1`
        print(text, end=end, flush=True)


# -- The server ------------------------------------------------------------------------


class Server(uvicorn.Server):
    """uvicorn's server, and it also ends what uvicorn alone would wait for.

    What a Ctrl-C does:

    1.  handle_exit() notes it. uvicorn looks at that note ten times a second.
    2.  shutdown() says what runs and what waits, and ends all streams.
    3.  uvicorn closes the port, and waits until each answer is sent.
    4.  After a second, cut_off() drops the clients that have stopped reading.
    5.  The lifespan ends: the queue gives its handlers `drain_seconds`.
    6.  serve_and_leave() ends the process.

    A second Ctrl-C ends the process at once, wherever it is. A Server that you start
    yourself, as in a notebook, does all this but number 6.
    """

    def __init__(self, config: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(config)
        self.app = app

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called for a signal: Ctrl-C is SIGINT, and `kill` sends SIGTERM."""
        # A second one. An exception would not do: Python waits for all threads before
        # it ends. os._exit() asks nobody. 128 + sig is what a shell would report.
        if self.should_exit:
            os._exit(128 + sig)
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop serving, for whatever reason: a signal, `--once`, or `should_exit`."""
        queue: TaskQueue = self.app.state.queue
        if AppStatus.should_exit:  # sse-starlette's note that a signal has come
            counts = overview(queue)["tasks"]
            seconds = f"{queue.settings.drain_seconds:g} s"
            text = f"{counts['running']} running get {seconds} to end"
            say(f"\nStopping: {text}, {counts['pending']} waiting are cancelled.")
        # First of all, because uvicorn's own shutdown waits for the streams to end.
        queue.begin_shutdown()
        timer = asyncio.get_running_loop().call_later(1, self.cut_off)
        await super().shutdown(sockets)
        timer.cancel()

    def cut_off(self) -> None:
        """Drop the connections that are still open.

        Their clients have stopped reading, or have sent half a request. uvicorn waits
        for them for ever. WHY not its `timeout_graceful_shutdown`: that cancels the
        requests, logs an ERROR, and leaves the connections open.
        """
        for connection in list(self.server_state.connections):
            connection.transport.abort()


# -- The tour --------------------------------------------------------------------------

LINE_END = re.compile(r"\r\n|\n|\r(?!\Z)")  # a CR at the very end may be half a CRLF


def read_lines(stream: httpx.Response) -> Iterator[str]:
    """Yield the lines of a stream of Server-Sent Events.

    GOTCHA [line-separators]: `stream.iter_lines()` looks made for this. But it also
    ends a line at U+2028 and U+0085. JSON carries these as they are, and breaks in two:
    "Unterminated string starting at". In a stream only CR, LF and CRLF end a line.
    """
    rest = ""
    for text in stream.iter_text():
        *lines, rest = LINE_END.split(rest + text)
        yield from lines


@dataclass
class Tour:
    """A guided tour over HTTP.

    Each step is a method. Its docstring is printed before it: what will happen, what to
    watch, and after an empty line a question for a class.
    """

    server: Server
    client: httpx.Client
    once: bool  # stop the server after the tour
    by_hand: bool  # wait for Enter before each step
    left: int = 1  # steps that did not hold, or not yet

    def run(self) -> None:
        """Take all steps. This is what the tour's thread does."""
        steps = [self.watch_live, self.knock_at_the_door, self.share_the_slots]
        steps += [self.send_it_twice, self.fail_and_retry, self.cancel, self.count]
        self.left = len(steps)
        for number, step in enumerate(steps, start=1):
            self.take(f"\nStep {number} of {len(steps)}", step)
        verdict = "every step held"
        if self.left > 0:
            verdict = f"{self.left} of its steps did not hold"
        self.say(f"\nThe tour is over: {verdict}.")
        self.server.should_exit = self.once
        self.say("The server goes on, until Ctrl-C.")
        logging.disable(logging.NOTSET)  # from here on, all is logged

    def take(self, number: str, step: Callable[[], None]) -> None:
        """Say what will happen, wait for Enter if that is wanted, and do it."""
        coming, _, question = (inspect.getdoc(step) or "").partition("\n\n")
        self.say(f"{number}\n{coming}")
        if self.by_hand:
            self.say(f"{question}  [Enter] ", end="")
            sys.stdin.readline()
        try:
            step()
            self.left -= 1
        except httpx.HTTPStatusError:  # in follow()
            self.say("   not shown: the task is forgotten, as --keep-finished has it")
            self.left -= 1
        except Exception as error:
            self.say(textwrap.fill(f"   NOT SO: {error!r}", 79))

    # -- The steps ---------------------------------------------------------------------

    def watch_live(self) -> None:
        """POST /tasks asks for an image to be resized, and is answered at once.
        Then GET /tasks/{id}/stream tells how far the work is. Watch the bar.

        predict: which status has the task in the answer to the POST?
        """
        answer = self.post()
        self.check(answer.status_code == 202, f"202: it is {answer.json()['status']}")
        task = self.follow(answer.json())
        self.check(task["status"] == "completed", f"the result: {task['result']}")

    def knock_at_the_door(self) -> None:
        """A submission is checked at the door, before there is a task.
        In this one `width` is the text "800", and no number. Watch the reason.

        predict: is it corrected, refused now, or will the task fail later?
        """
        answer = self.post(payload={"width": "800"})
        problem = answer.json()["detail"][0]
        reason = f"{answer.status_code}, for {problem['loc']}: {problem['msg']}"
        self.check("width" in problem["loc"], reason)

    def share_the_slots(self) -> None:
        """Concurrency and priority. MEDIUM tasks take all slots (--max-workers).
        LOW ones come, and must wait. A HIGH one comes last.
        Watch which one starts when a slot is given back.

        predict: how many run at once? Who starts next, and who then?
        """
        health = self.client.get("/health").json()
        slots = health["workers"]
        order = [5] * min(slots, 9) + [10] * min(3, health["max_pending"] - 1) + [1]
        *others, high = [self.post(priority=each).json() for each in order]
        busy = self.client.get("/health").json()["busy"]
        # With more than 9 slots there are too few tasks to fill them all at once.
        self.check(busy == slots or 9 < slots, f"{busy} run, in {slots} slots")
        high, *others = [self.follow(task) for task in [high, *others]]
        tasks = sorted([high, *others], key=lambda task: task["started_at"])
        starts = ", ".join(Priority(task["priority"]).name for task in tasks)
        # Of those that did not have a slot already, HIGH must be the first.
        late = [task for task in tasks if task["started_at"] > high["created_at"]]
        self.check(late[0] is high, f"they started in this order: {starts}")

    def send_it_twice(self) -> None:
        """A client sends a task, but the answer gets lost. So the client sends it
        again, with the same Idempotency-Key.

        predict: how many tasks are there now?
        """
        key = {"Idempotency-Key": secrets.token_hex(8)}
        first = self.post(headers=key).json()
        second = self.post(headers=key).json()
        self.check(first["id"] == second["id"], "both answers name the same task")
        self.follow(first)

    def fail_and_retry(self) -> None:
        """A mail goes to an address that can't exist: its handler raises an error.
        Before each retry it waits for a random time. `max_retries` is 2.

        predict: how many attempts will there be?
        """
        nobody = {"to": "nobody@example.invalid"}
        answer = self.post(task_type="send_email", payload=nobody, max_retries=2)
        task = self.follow(answer.json())
        self.check(task["attempt"] == 3, f"3 attempts, and then: {task['error']}")

    def cancel(self) -> None:
        """DELETE cancels a task that waits. One that runs is only asked to stop,
        and only with ?force=true. Watch the status codes.

        predict: what is the difference between a 200 and a 202?
        """
        task = self.post(delay=3600).json()
        answer = self.client.delete(f"/tasks/{task['id']}")
        self.check(answer.status_code == 200, "200: the waiting one is cancelled")
        task = self.post().json()
        self.follow(task, until="running")
        answer = self.client.delete(f"/tasks/{task['id']}?force=true")
        self.check(answer.status_code == 202, "202: the running one is asked to stop")
        task = self.follow(task)
        self.check(task["status"] == "cancelled", f"then it is {task['status']}")

    def count(self) -> None:
        """GET /metrics counts all requests: those of the tour, and those of others.

        predict: which status codes will it name?
        """
        counts = self.client.get("/metrics").json()["status_counts"]
        self.check(counts["422"] > 0, f"requests by status: {counts}")

    # -- What the steps are made of ----------------------------------------------------

    def post(self, headers: Any = None, **fields: Any) -> httpx.Response:
        """Submit a task. By default it is one that can't fail by chance."""
        task = {"task_type": "resize_image", "payload": {"for_the_tour": True}}
        return self.client.post("/tasks", json={**task, **fields}, headers=headers)

    def follow(self, task: Any, until: str = "") -> Any:
        """Draw what the task's stream tells, to its end or until it has that status.

        Return the task as it is then.
        """
        path = f"/tasks/{task['id']}"
        # timeout=None: else httpx gives up when no frame has come for a while.
        with self.client.stream("GET", f"{path}/stream", timeout=None) as stream:
            for line in read_lines(stream):
                if line.startswith("data:"):
                    state = json.loads(line.removeprefix("data:"))
                    last = state["status"] in {until, *FINAL}
                    self.draw(Priority(task["priority"]), state, last)
                    if last:
                        break
        return self.client.get(path).raise_for_status().json()

    # -- What is printed ---------------------------------------------------------------

    def say(self, text: str, end: str = "\n") -> None:
        """Print it. But once the server stops, end the tour's thread instead."""
        if self.server.should_exit:
            sys.exit()
        say(text, end)

    def draw(self, priority: Priority, state: Any, last: bool) -> None:
        """Draw the bar of a task. In a terminal, the next one is drawn over it.

        But each attempt keeps a line, and so does its end.
        """
        bar = "#" * (state["progress"] // 5)
        text = f"{priority.name:6} [{bar:.<20}] attempt {state['attempt']}"
        again = os.isatty(1) and state["status"] == "running" and not last
        self.say(f"   {text}, {state['status']:9}", end="\r" if again else "\n")

    def check(self, holds: bool, claim: str) -> None:
        """Say that a claim holds, or raise an error that ends the step."""
        if not holds:
            raise AssertionError(claim)
        self.say(textwrap.fill(f"   ok: {claim}", 79, subsequent_indent=" " * 7))


async def serve_and_leave(tour: Tour, listener: socket.socket) -> None:
    """Serve until the server is told to stop. Then end the process.

    WHY not just return: Python would wait, and maybe for ever. asyncio.run() waits for
    coroutines that ignore their cancellation, and for the threads of to_thread(). Then
    Python waits for those of every ThreadPoolExecutor. One handler that is stuck there
    holds up the end. All that is ours is settled by now: the streams have ended, and
    each task is in a final state. So nothing is lost.
    """
    await tour.server.serve(sockets=[listener])
    say("", end="")  # os._exit() drops what handlers have printed, unless it is flushed
    os._exit(int(tour.once and tour.left > 0))


# -- The start -------------------------------------------------------------------------


def read_flags() -> tuple[argparse.Namespace, Settings]:
    """Read the command line: some flags of the demo's own, and one for each setting."""
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(usage="%(prog)s [flags]", formatter_class=style)
    parser.add_argument("--host", default="127.0.0.1", help="where to listen")
    parser.add_argument("--port", default=8000, type=int, help="0 takes any free one")
    parser.add_argument("--step", action="store_true", help="wait for Enter, and ask")
    parser.add_argument("--once", action="store_true", help="exit after the tour")
    parser.add_argument("--no-tour", action="store_true", help="only serve")
    for name, info in Settings.model_fields.items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, default=info.default, help=info.description)
    args = parser.parse_args()
    values = {name: getattr(args, name) for name in Settings.model_fields}
    try:
        return args, Settings.model_validate(values)  # it makes 3 of the text "3"
    except ValidationError as error:
        problem = error.errors()[0]
        parser.error(f"{problem['loc'][0]}: {problem['msg']}")


def main() -> None:
    """Start the server, and the tour beside it."""
    args, settings = read_flags()
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    # WHY not let uvicorn take the port: nobody could ask it what port 0 became.
    try:
        listener = socket.create_server((args.host, args.port), family=family)
    except (OSError, OverflowError, ValueError) as error:
        sys.exit(f"Can't listen on {args.host}:{args.port}: {error}. Already running?")
    # GOTCHA [forty-milliseconds]: a socket that asyncio makes itself sends what it has
    # at once. Ours would wait until the client has confirmed what came before. The head
    # and the body of an answer are two such pieces, so each answer takes 40 ms more.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    handlers = dict(HANDLERS)
    if handlers[TaskType.RESIZE_IMAGE] is resize_image:  # else it is one of yours
        handlers[TaskType.RESIZE_IMAGE] = resize_that_may_block
    app = create_app(settings, handlers)
    # GOTCHA [pipelined-behind-a-stream]: if httptools is installed, uvicorn takes it.
    # A client sends a second request behind a stream, and goes. With httptools nobody
    # tells the stream: its watcher stays for ever. With h11 the next ping ends it.
    config = uvicorn.Config(app, http="h11", ws="none", log_level="warning")
    server = Server(config, app)
    url = httpx.URL(scheme="http", host=args.host, port=listener.getsockname()[1])
    # GOTCHA [trust-env]: httpx obeys HTTP_PROXY, ALL_PROXY and SSL_CERT_FILE, also for
    # 127.0.0.1. A stale one of these ends the demo.
    client = httpx.Client(base_url=url, timeout=30, trust_env=False)
    tour = Tour(server, client, args.once, args.step and os.isatty(0))
    with contextlib.suppress(KeyboardInterrupt):  # it came before the server was there
        say(f"The live page is {url}/\nand the API is shown at {url}/docs")
        if not args.no_tour:
            logging.disable(logging.WARNING)  # the log would drown the tour
            threading.Thread(target=tour.run, daemon=True).start()
        asyncio.run(serve_and_leave(tour, listener))


if __name__ == "__main__":
    main()
