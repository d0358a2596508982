"""The proof of taskqueue.py: it keeps its promises, and each trap is really handled.

The sections are those of the module, in the same order, after one with the tools. For
each `GOTCHA [slow-reader]` there, a test here has `slow_reader` in its name. So
`python -m pytest -k slow_reader` runs the proof of that one, and the first of its tests
has the same words above it: # GOTCHA [slow-reader].
"""

import asyncio
import contextlib
import contextvars
import ctypes
import dataclasses
import enum
import functools
import gc
import importlib
import inspect
import itertools
import json
import logging
import math
import operator
import os
import pathlib
import random
import re
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import uuid
import weakref
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from typing import Any

import anyio
import httpx
import pytest
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from sse_starlette.sse import AppStatus
from starlette.datastructures import Headers

import taskqueue
from taskqueue import (
    FINAL,
    HANDLERS,
    DoNotRetry,
    GenerateReportPayload,
    IdempotencyKeyReused,
    IllegalTransition,
    Payload,
    Priority,
    QueueFull,
    QueueStopped,
    ResizeImagePayload,
    SendEmailPayload,
    Settings,
    Status,
    TaskNotCancellable,
    TaskNotFound,
    TaskQueue,
    TaskRecord,
    TaskSubmission,
    TaskType,
    backoff_delay,
    create_app,
    process_task,
)

pytestmark = pytest.mark.anyio
HERE = pathlib.Path(__file__).parent
posix_only = pytest.mark.skipif(os.name == "nt", reason="there is no SIGINT to send")


# ===== Tools ==========================================================================
# Skip this at first. The tests read without it, if you know six words:
#
#     gate              a handler that holds each of its tasks until the test lets it go
#     email("a")        a submission whose task has the name "a"; without a name, "it"
#     running(gate)     a queue that runs, with this handler
#     serving(gate)     an app that runs: `async with serving(gate) as (client, queue)`
#     await quiet()     let all happen that can happen without time passing
#     Stream(app, path) a client of a live stream, that reads it frame by frame
#
# Nothing here really sleeps. The event loop has a virtual clock: where another one
# would wait, it sets its clock forward. So an hour takes no time, and two hours that
# are measured are exactly two hours. Only what needs a thread runs on the real clock.


class JumpingSelector(selectors.DefaultSelector):
    """What an event loop waits with. This one doesn't wait: it moves the clock."""

    now = 0.0

    def select(self, timeout=None):
        """Look what has happened, and pretend that `timeout` seconds have passed."""
        if timeout is None:
            raise RuntimeError("all wait, and no timer is set: this would hang")
        self.now += timeout
        return super().select(0)


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """An event loop whose time passes only when all wait."""

    def __init__(self):
        self.jumping_selector = JumpingSelector()
        super().__init__(self.jumping_selector)

    def time(self):
        """Seconds since the test has begun."""
        return self.jumping_selector.now


@pytest.fixture
def anyio_backend():
    """Where the anyio plugin runs our async tests."""
    return "asyncio", {"loop_factory": VirtualClockLoop}


# For a test that needs a thread: the virtual clock would not wait for it.
real_clock = pytest.mark.parametrize(
    "anyio_backend", [("asyncio", {})], ids=["real clock"]
)


def now():
    """Seconds on the clock of the event loop; in most tests, since its beginning."""
    return asyncio.get_running_loop().time()


async def quiet():
    """Let all happen that can happen now. A timer comes only when nothing else can."""
    await asyncio.sleep(2**-20)


@pytest.fixture(autouse=True)
async def nothing_is_left(anyio_backend, monkeypatch):
    """After each test nothing runs on, nobody watches, and all books are balanced."""
    stores = []

    class KnownStore(taskqueue.TaskStore):
        """A store that this fixture can find again."""

        def __init__(self, settings):
            super().__init__(settings)
            stores.append(self)

    monkeypatch.setattr(taskqueue, "TaskStore", KnownStore)
    yield
    left = asyncio.all_tasks() - {asyncio.current_task()}
    # The first is anyio's: it runs this. The second is sse-starlette's, for ever.
    expected = {"_call_in_runner_task", "_shutdown_watcher"}
    assert {each.get_coro().__name__ for each in left} <= expected
    for store in stores:
        counts = {status: len(store.by_status[status]) for status in Status}
        assert store.watchers == 0
        assert store.submitted == sum(counts.values()) + store.evicted
        assert counts[Status.PENDING] == 0
        assert counts[Status.RUNNING] == 0


class Gate:
    """A handler in the hands of the test: it holds each task until it is let go.

    The subject of the e-mail is the name of the task.
    """

    def __init__(self):
        self.started = []  # the names of all tasks, in the order of their start
        self.held = {}  # name → the future that ends it
        self.report = {}  # name → its update_progress

    async def __call__(self, payload, update_progress):
        """Wait for let_go()."""
        name = payload.subject
        self.started.append(name)
        self.report[name] = update_progress
        self.held[name] = asyncio.get_running_loop().create_future()
        try:
            return await self.held[name]
        finally:
            del self.held[name]

    def let_go(self, name="it", result=None):
        """End this task: with an exception if `result` is one."""
        if isinstance(result, BaseException):
            self.held[name].set_exception(result)
        else:
            self.held[name].set_result(result)

    async def let_all_go(self):
        """End all tasks, one after the other, and those that start meanwhile."""
        await quiet()
        while self.held:
            self.let_go(next(iter(self.held)))
            await quiet()


@pytest.fixture
def gate():
    """A gate with no task at it."""
    return Gate()


def email(name="it", **fields):
    """A submission whose task has this name."""
    return TaskSubmission(task_type="send_email", payload={"subject": name}, **fields)


def running(handler, **settings):
    """A queue with this handler for e-mails: `async with running(gate) as queue`."""
    return TaskQueue(Settings(**settings), {TaskType.SEND_EMAIL: handler})


@contextlib.asynccontextmanager
async def serving(handler=None, **settings):
    """An app that runs: yields a client of it, and its queue. `client.app` is the app.

    httpx alone would not run the app's lifespan.
    """
    handlers = HANDLERS
    if handler is not None:
        handlers = {TaskType.SEND_EMAIL: handler}
    app = create_app(Settings(**settings), handlers)
    transport = httpx.ASGITransport(app)
    client = httpx.AsyncClient(transport=transport, base_url="http://test")
    client.app = app
    async with app.router.lifespan_context(app), client:
        yield client, app.state.queue


async def until(queue, task_id, condition=lambda task: task.status in FINAL):
    """Watch a task until it is so, or else until its end. Return it as it is then."""
    async with asyncio.timeout(5), contextlib.aclosing(queue.watch(task_id)) as states:
        async for task in states:
            if condition(task):
                return task
    return pytest.fail("the watch ended before it was so")


async def outcome(handler, *, settings=None, **fields):
    """Run the task "it" in a queue of its own. Return it as it is at its end."""
    async with running(handler, **(settings or {})) as queue:
        return await until(queue, queue.submit(email(**fields)).id)


async def bring_to(status, queue, gate):
    """Make the task "it", and bring it to this status. Return its id."""
    delay = 0
    if status == "pending":
        delay = 9
    task_id = queue.submit(email(delay=delay)).id
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


def seconds_of_work(function):
    """The time that the processor works on it: the least of three calls.

    Compare it with that of something else: a slow machine is slow with both.
    """
    seconds = []
    for _ in range(3):
        began = time.thread_time()
        function()
        seconds.append(time.thread_time() - began)
    return min(seconds)


def throw(error):
    """Raise it: for a lambda, which can't."""
    raise error


def refuse_constant(name):
    """For json.loads: NaN and Infinity are not JSON, though Python reads them."""
    pytest.fail(f"{name} is not JSON")


def refuse_twins(pairs):
    """For json.loads: Python takes the last value of a key that comes twice."""
    keys = [key for key, _ in pairs]
    assert len(set(keys)) == len(keys), f"a key comes twice: {keys}"
    return dict(pairs)


def strict_json(text):
    """Parse JSON as everyone but Python does."""
    return json.loads(
        text, parse_constant=refuse_constant, object_pairs_hook=refuse_twins
    )


def nested(levels):
    """The text of a list in a list in a list …, so many levels deep."""
    return "[" * levels + "]" * levels


class Stream:
    """A client of one live stream, on the bare ASGI interface.

    httpx would wait for the end of the answer. This one reads frame by frame. While
    `reading` is not set, it reads nothing. At the end of its block it hangs up.

        async with Stream(app, "/events") as stream:
            frame = await stream.next()
    """

    def __init__(self, app, path, last_event_id=None):
        self.app = app
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [],
            "client": ("test", 1),
            "server": ("test", 80),
        }
        if last_event_id is not None:
            header = (b"last-event-id", str(last_event_id).encode("latin-1"))
            self.scope["headers"].append(header)
        self.status = None  # known once a frame has been read
        self.headers = None
        self.messages = asyncio.Queue()  # what the app has sent, and we have received
        self.unread = b""  # what we have received, and next() has not yet returned
        self.hung_up = asyncio.Event()
        self.reading = asyncio.Event()
        self.reading.set()

    async def __aenter__(self):
        """Call the app, as a server would, and don't wait for the end of it."""
        self.call = asyncio.create_task(self.app(self.scope, self.receive, self.send))
        return self

    async def __aexit__(self, *_):
        """Hang up, and wait until the app has noticed. Raise what the app raises."""
        self.hung_up.set()
        async with asyncio.timeout(5):
            await self.call

    async def receive(self):
        """What the app hears of the client: nothing, until it hangs up."""
        await self.hung_up.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        """What the app does to send something. It waits while nobody reads."""
        await self.reading.wait()
        self.messages.put_nowait(message)

    async def next(self):
        """The next frame, as a dict of its fields. None: the answer has ended well."""
        while b"\n\n" not in self.unread:
            async with asyncio.timeout(60):
                message = await self.messages.get()
            if message["type"] == "http.response.start":
                self.status = message["status"]
                self.headers = httpx.Headers(message["headers"])
                continue
            self.unread += message["body"]
            if not message.get("more_body"):
                assert self.unread == b"", "the answer ended within a frame"
                return None
        text, self.unread = self.unread.split(b"\n\n", 1)
        frame = dict(line.split(": ", 1) for line in text.decode().split("\n"))
        if "data" in frame:
            frame["data"] = strict_json(frame["data"])
        return frame

    async def take(self, count):
        """The next frames, so many of them."""
        return [await self.next() for _ in range(count)]

    async def rest(self):
        """All frames up to the end of the answer."""
        frames = []
        while True:
            frame = await self.next()
            if frame is None:
                return frames
            frames.append(frame)


# ===== Settings =======================================================================


def test_settings_have_the_defaults_of_the_contract():
    assert Settings().model_dump() == {
        "max_workers": 3,
        "max_pending": 1000,
        "keep_finished": 1000,
        "drain_seconds": 5.0,
        "backoff_base": 0.5,
        "backoff_cap": 30.0,
        "send_timeout": 10.0,
        "ping_seconds": 15.0,
        "max_body": 65_536,
        "max_result": 65_536,
        "failure_rate": 0.1,
        "pace": 1.0,
    }


def test_settings_are_frozen():
    settings = Settings()
    with pytest.raises(ValidationError):
        settings.max_workers = 4
    assert settings.max_workers == 3


def test_settings_with_a_misspelt_name_are_refused():
    with pytest.raises(ValueError, match="max_worker\n"):
        Settings(max_worker=4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_workers", 1),
        ("max_workers", 1000),
        ("max_pending", 1),
        ("keep_finished", 0),
        ("drain_seconds", 0),
        ("backoff_base", 0),
        ("backoff_cap", 0),
        ("backoff_cap", 10**9),
        ("send_timeout", 0.001),
        ("ping_seconds", 0.001),
        ("max_body", 1),
        ("max_result", 1),
        ("failure_rate", 0),
        ("failure_rate", 1),
        ("pace", 0),
    ],
)
def test_settings_take_their_bounds(name, value):
    assert getattr(Settings(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_workers", 0),
        ("max_workers", 1001),
        ("max_pending", 0),
        ("keep_finished", -1),
        ("drain_seconds", -1),
        ("drain_seconds", math.inf),
        ("backoff_base", -1),
        ("backoff_cap", -1),
        ("backoff_cap", 10**9 + 1),
        ("backoff_cap", math.inf),
        ("send_timeout", 0),
        ("ping_seconds", 0),
        ("max_body", 0),
        ("max_result", 0),
        ("failure_rate", 1.1),
        ("failure_rate", -0.1),
        ("pace", -1),
        ("pace", math.nan),
    ],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        Settings(**{name: value})


# ===== Models =========================================================================
# What a submission may say, and what a snapshot shows.


def test_submission_has_the_defaults_of_the_contract():
    assert TaskSubmission(task_type="send_email").model_dump() == {
        "task_type": "send_email",
        "payload": {},
        "priority": 5,
        "max_retries": 0,
        "timeout": 60,
        "delay": 0,
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("priority", 1),
        ("priority", Priority.LOW),
        ("max_retries", 10),
        ("timeout", 0.001),
        ("timeout", 3600),
        ("delay", 0),
        ("delay", 86_400),
    ],
)
def test_submission_takes_its_bounds(name, value):
    submission = TaskSubmission(task_type="send_email", **{name: value})
    assert getattr(submission, name) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("task_type", "bake_cake"),
        ("priority", True),
        ("priority", "1"),
        ("priority", 1.0),
        ("priority", 2),
        ("priority", 10**40),
        ("priority", None),
        ("max_retries", -1),
        ("max_retries", 11),
        ("max_retries", True),
        ("max_retries", 1.5),
        ("timeout", 0),
        ("timeout", 3601),
        ("timeout", "60"),
        ("timeout", True),
        ("timeout", math.nan),
        ("delay", -1),
        ("delay", 86_401),
        ("delay", math.inf),
        ("hue", "red"),
        ("payload", []),
        ("payload", None),
    ],
)
def test_submission_refuses(name, value):
    fields = {"task_type": "send_email", name: value}
    with pytest.raises(ValidationError, match=name):
        TaskSubmission.model_validate(fields)


def test_submission_keeps_its_payload_as_it_was_sent():
    payload = {"width": 5, "note": {"further": ["keys", None, 1.5, True, "é"]}}
    assert TaskSubmission(task_type="resize_image", payload=payload).payload == payload


# GOTCHA [bad-result]
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (math.nan, "payload.x is nan, and JSON has only finite numbers"),
        ([1, -math.inf], r"payload.x\[1\] is -inf"),
        ("\ud800", "surrogates not allowed"),
        ({"\ud800": 1}, "surrogates not allowed"),
        ({1: 2}, "payload.x has a key of type int"),
        ({1, 2}, "payload.x is of type set, which JSON has no form for"),
        (object(), "payload.x is of type object"),
        (10**5000, "more than 4,200 digits"),
    ],
    ids=["NaN", "inf", "text", "key", "number as key", "set", "object", "long number"],
)
def test_submission_refuses_as_payload_what_would_be_a_bad_result(value, reason):
    with pytest.raises(ValidationError, match=reason):
        TaskSubmission(task_type="send_email", payload={"x": value})


def test_submission_takes_a_payload_of_100_levels():
    payload = {"x": json.loads(nested(99))}
    assert TaskSubmission(task_type="send_email", payload=payload).payload == payload


def test_submission_takes_a_value_within_100_levels():
    payload = {"x": json.loads("[" * 99 + "1" + "]" * 99)}
    assert TaskSubmission(task_type="send_email", payload=payload).payload == payload


@pytest.mark.parametrize("levels", [99, 200, 900, 5000])
def test_submission_refuses_a_payload_that_is_too_deep(levels):
    """The payload is one level more, and so is the list in the middle."""
    deep = []
    for _ in range(levels):
        deep = [deep]
    with pytest.raises(ValidationError, match="more than 100 levels"):
        TaskSubmission(task_type="send_email", payload={"x": deep})


# GOTCHA [one-error-each]
def test_submission_makes_not_one_error_each_but_stops_at_the_first():
    payload = {"x": [math.nan] * 16_000}
    with pytest.raises(ValidationError) as caught:
        TaskSubmission(task_type="send_email", payload=payload)
    assert caught.value.error_count() == 1


NAN_BOMB = "[" * 90 + ",".join(["NaN"] * 16_000) + "]" * 90

NASTY_PAYLOADS = [
    pytest.param(NAN_BOMB, id="one error each"),
    pytest.param(f'{{"{"k" * 32_000}": {NAN_BOMB}}}', id="under a long key"),
    pytest.param("[" + ",".join(["[]"] * 21_000) + "]", id="empty lists"),
    pytest.param("[" + ",".join(["0"] * 32_000) + "]", id="numbers"),
    pytest.param('"' + "é" * 32_000 + '"', id="text"),
    pytest.param("[" + ",".join([nested(90)] * 360) + "]", id="deep lists"),
    pytest.param(
        "{" + ",".join(f'"{number}": 1' for number in range(6_000)) + "}", id="keys"
    ),
]


@pytest.mark.parametrize("text", NASTY_PAYLOADS)
async def test_submission_costs_little_whatever_is_in_it(text, gate):
    """The promise is 50 ms. The 32,000 numbers that fit into a body take half of it."""
    payload = {"x": json.loads(text)}

    def submit():
        with contextlib.suppress(ValidationError):
            queue.submit(TaskSubmission(task_type="send_email", payload=payload))

    async with running(gate) as queue:
        cost = seconds_of_work(submit)
    numbers = [0] * 32_000
    assert cost < 5 * seconds_of_work(lambda: taskqueue.check_json(numbers, "x"))


@pytest.mark.parametrize(
    "model", [ResizeImagePayload, GenerateReportPayload, SendEmailPayload]
)
def test_payloads_need_no_field_and_keep_further_keys(model):
    payload = model.model_validate({"further": [1]})
    assert payload.further == [1]


def test_payload_image_may_have_one_pixel():
    assert ResizeImagePayload(width=1, height=1).width == 1


@pytest.mark.parametrize("report_id", ["weekly", 7])
def test_payload_report_id_is_text_or_a_whole_number(report_id):
    assert GenerateReportPayload(report_id=report_id).report_id == report_id


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        (ResizeImagePayload, {"width": "800"}),
        (ResizeImagePayload, {"height": 0}),
        (ResizeImagePayload, {"url": 5}),
        (GenerateReportPayload, {"report_id": 1.5}),
        (GenerateReportPayload, {"format": None}),
        (SendEmailPayload, {"to": None}),
        (SendEmailPayload, {"subject": 5}),
    ],
)
def test_payload_of_a_wrong_type_is_refused(model, fields):
    with pytest.raises(ValidationError):
        model(**fields)


async def test_task_status_shows_the_fields_of_the_contract(gate):
    async with running(gate) as queue:
        task = queue.submit(email())
    assert list(strict_json(task.model_dump_json())) == [
        "id",
        "task_type",
        "priority",
        "status",
        "progress",
        "attempt",
        "max_retries",
        "error",
        "request_id",
        "created_at",
        "not_before",
        "started_at",
        "completed_at",
        "payload",
        "result",
    ]


async def test_task_status_is_a_snapshot_that_never_changes(gate):
    async with running(gate) as queue:
        before = queue.submit(email())
        await quiet()
        assert queue.get_task(before.id).status == "running"
        assert before.status == "pending"
        with pytest.raises(ValidationError):
            before.status = Status.FAILED


async def test_task_status_gives_each_reader_a_payload_of_their_own(gate):
    async with running(gate) as queue:
        task = queue.submit(email("a"))
        task.payload["subject"] = "changed"
        assert queue.get_task(task.id).payload == {"subject": "a"}


async def test_task_status_has_times_in_utc(gate):
    async with running(gate) as queue:
        task = queue.submit(email())
    shown = strict_json(task.model_dump_json())["created_at"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", shown)


@pytest.mark.parametrize(
    ("status", "shown"),
    [
        ("pending", {"status": "pending", "progress": 0, "attempt": 0}),
        ("running", {"status": "running", "progress": 0, "attempt": 1}),
        (
            "completed",
            {"status": "completed", "progress": 100, "attempt": 1, "result": "done"},
        ),
        ("cancelled", {"status": "cancelled", "progress": 0, "attempt": 1}),
    ],
)
async def test_progress_json_is_what_a_stream_of_one_task_sends(status, shown, gate):
    async with running(gate) as queue:
        task = queue.get_task(await bring_to(status, queue, gate))
        assert strict_json(task.progress_json) == shown


async def test_progress_json_of_a_failed_task_says_why(gate):
    async with running(gate) as queue:
        task = queue.get_task(await bring_to("failed", queue, gate))
    shown = strict_json(task.progress_json)
    assert list(shown) == ["status", "progress", "attempt", "error"]
    assert shown["error"].startswith("ValueError: broken")


async def test_summary_json_is_all_but_the_payload(gate):
    async with running(gate) as queue:
        task = queue.get_task(await bring_to("completed", queue, gate))
    everything = strict_json(task.model_dump_json())
    del everything["payload"]
    assert strict_json(task.summary_json) == everything


# ===== Handlers =======================================================================
# How one is registered and called. And the three that only pretend to work.


class Letter(BaseModel):
    """A payload whose one field has no default."""

    stamp: int


async def post(payload: Letter, update_progress):
    """A handler with a model of its own."""
    return {"stamp": payload.stamp}


class Sender:
    """Handlers come as methods and as callable objects, too."""

    async def post(self, payload: Letter, update_progress):
        return {"stamp": payload.stamp}

    async def __call__(self, payload: Letter, update_progress):
        return {"stamp": payload.stamp}


async def post_by(office, payload: Letter, update_progress):
    """A handler once its office is given, by functools.partial."""
    return {"stamp": payload.stamp}


def post_plainly(payload: "Letter", update_progress):
    """A plain `def`, and its annotation is a text."""
    return {"stamp": payload.stamp}


POSTS = [
    pytest.param(post, id="async def"),
    pytest.param(post_plainly, id="def"),
    pytest.param(functools.partial(post_by, "main office"), id="partial"),
    pytest.param(Sender().post, id="bound method"),
    pytest.param(Sender(), id="callable object"),
]


@pytest.fixture
def registry(monkeypatch):
    """HANDLERS, with what a test registers taken out again."""
    for task_type, function in HANDLERS.items():
        monkeypatch.setitem(HANDLERS, task_type, function)
    return HANDLERS


def nothing_to_do():
    """No handler: it takes no payload."""


def only_payload(payload):
    """No handler: it takes no update_progress."""


async def test_process_task_gives_the_handler_the_validated_model():
    async def handle(payload, update_progress):
        return payload

    handlers = {TaskType.SEND_EMAIL: handle}
    payload = await process_task(TaskType.SEND_EMAIL, {"stamp": 1}, print, handlers)
    assert isinstance(payload, Payload)
    assert payload.stamp == 1


async def test_process_task_refuses_a_payload_of_a_wrong_type():
    with pytest.raises(ValidationError, match="width"):
        await process_task(TaskType.RESIZE_IMAGE, {"width": "5"}, print)


async def test_process_task_takes_a_dict_that_was_validated_already():
    async def handle(payload: dict[str, datetime], update_progress):
        return payload["due"].year

    handlers = {TaskType.SEND_EMAIL: handle}
    payload = {"due": datetime(2026, 11, 26, tzinfo=UTC)}
    assert await process_task(TaskType.SEND_EMAIL, payload, print, handlers) == 2026


async def test_submission_makes_not_one_error_each_of_a_model_of_yours():
    """Each item that fits none of the types makes an error. That takes time."""

    async def handle(payload: dict[str, list[int]], update_progress):
        """It is never called."""

    async with serving(handle) as (client, _):
        payload = {"rows": ["x"] * 1001}
        body = {"task_type": "send_email", "payload": payload}
        answer = await client.post("/tasks", json=body)
    assert answer.status_code == 422
    assert answer.json() == {"detail": "The payload has 1001 errors"}


async def test_submission_tells_the_first_of_1000_errors_of_a_model_of_yours():
    async def handle(payload: dict[str, list[int]], update_progress):
        """It is never called."""

    async with serving(handle) as (client, _):
        body = {"task_type": "send_email", "payload": {"rows": ["x"] * 1000}}
        answer = await client.post("/tasks", json=body)
    first, *others = answer.json()["detail"]
    assert first["loc"] == ["body", "payload", "rows", 0]
    assert len(others) == 19


async def test_process_task_names_the_task_type_that_has_no_handler():
    with pytest.raises(LookupError, match="send_email"):
        await process_task(TaskType.SEND_EMAIL, {}, print, {})


@real_clock
@pytest.mark.parametrize("function", POSTS)
async def test_handler_can_be_registered(function, registry):
    assert taskqueue.handler(TaskType.SEND_EMAIL)(function) is function
    result = await process_task(TaskType.SEND_EMAIL, {"stamp": 1}, print)
    assert result == {"stamp": 1}


@real_clock
@pytest.mark.parametrize("function", POSTS)
async def test_handler_can_be_given_to_a_queue(function):
    submission = TaskSubmission(task_type="send_email", payload={"stamp": 1})
    async with running(function) as queue:
        task = await until(queue, queue.submit(submission).id)
    assert task.result == {"stamp": 1}


@pytest.mark.parametrize("function", POSTS)
async def test_handler_has_its_payload_checked_by_its_own_annotation(function):
    async with running(function) as queue:
        with pytest.raises(ValidationError, match="stamp"):
            queue.submit(email())
        assert queue.store.submitted == 0


async def test_handler_may_ask_for_a_dict_of_what_json_has_no_form_for():
    async def handle(payload: dict[str, datetime], update_progress):
        return {name: value.year for name, value in payload.items()}

    payload = {"due": "2026-11-26T12:00:00Z"}
    submission = TaskSubmission(task_type="send_email", payload=payload)
    async with running(handle) as queue:
        task = await until(queue, queue.submit(submission).id)
    assert task.result == {"due": 2026}


def test_handlers_are_registered_for_all_task_types():
    assert set(HANDLERS) == set(TaskType)


def test_handler_takes_the_name_of_a_task_type(registry):
    taskqueue.handler("send_email")(post)
    assert registry[TaskType.SEND_EMAIL] is post


@pytest.mark.parametrize("no_task_type", ["bake_cake", post])
def test_handler_refuses_an_unknown_task_type(no_task_type, registry):
    before = dict(registry)
    with pytest.raises(ValueError, match="is not a valid TaskType"):
        taskqueue.handler(no_task_type)(post)
    assert registry == before


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (nothing_to_do, "too many positional arguments"),
        (only_payload, "too many positional arguments"),
        (None, "None is not a callable object"),
        ("send", "'send' is not a callable object"),
    ],
)
def test_handler_refuses_what_is_none_and_says_what_is_missing(
    function, reason, registry
):
    before = dict(registry)
    with pytest.raises(TypeError, match=reason):
        taskqueue.handler(TaskType.SEND_EMAIL)(function)
    assert registry == before


async def test_handler_that_is_none_fails_its_task():
    async with running(only_payload) as queue:
        task_id = queue.submit(email()).id
        await until(queue, task_id)
    assert "TypeError" in queue.get_task(task_id).error


async def test_handler_gets_its_payload_anew_for_each_attempt():
    seen = []

    async def handle(payload, update_progress):
        seen.append(list(payload.files))
        payload.files.append("one more")
        raise ValueError

    submission = TaskSubmission(
        task_type="send_email", payload={"files": ["a"]}, max_retries=1
    )
    async with running(handle, backoff_base=0) as queue:
        task = await until(queue, queue.submit(submission).id)
    assert seen == [["a"], ["a"]]
    assert task.payload == {"files": ["a"]}


# GOTCHA [blocking-handler]
@real_clock
async def test_blocking_handler_leaves_the_event_loop_free():
    """It blocks until the loop has seen its progress, and lets it go."""
    let_go = threading.Event()

    def handle(payload, update_progress):
        update_progress(50)
        return let_go.wait(2)

    async with running(handle) as queue:
        task_id = queue.submit(email()).id
        await until(queue, task_id, lambda task: task.progress == 50)
        let_go.set()
        assert (await until(queue, task_id)).result is True


# GOTCHA [executor-limit]
@real_clock
async def test_threads_have_no_executor_limit_so_40_slots_run_40():
    """Each waits for the 39 others."""
    barrier = threading.Barrier(40, timeout=3)

    def handle(payload, update_progress):
        barrier.wait()

    async with running(handle, max_workers=40) as queue:
        for _ in range(40):
            queue.submit(email())
        async with asyncio.timeout(10):
            await queue.join()
        assert queue.count(Status.COMPLETED) == 40


@real_clock
async def test_thread_of_a_handler_holds_up_no_exit_of_python():
    def handle(payload, update_progress):
        return threading.current_thread().daemon

    assert (await outcome(handle)).result is True


@real_clock
async def test_thread_runs_on_when_nobody_waits_for_it_any_more():
    began = threading.Event()
    go_on = threading.Event()
    ended = threading.Event()

    def handle(payload, update_progress):
        began.set()
        go_on.wait(5)
        ended.set()

    handlers = {TaskType.SEND_EMAIL: handle}
    call = asyncio.create_task(process_task(TaskType.SEND_EMAIL, {}, print, handlers))
    await asyncio.to_thread(began.wait, 5)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    go_on.set()
    assert await asyncio.to_thread(ended.wait, 5)


@real_clock
async def test_thread_ends_well_also_if_nobody_waits_for_it_any_more(monkeypatch):
    """It has nobody to give its result to, and raises nothing for that."""
    threads = []
    raised = []
    began = threading.Event()
    go_on = threading.Event()

    def handle(payload, update_progress):
        threads.append(threading.current_thread())
        began.set()
        go_on.wait(5)

    monkeypatch.setattr(threading, "excepthook", raised.append)
    handlers = {TaskType.SEND_EMAIL: handle}
    call = asyncio.create_task(process_task(TaskType.SEND_EMAIL, {}, print, handlers))
    await asyncio.to_thread(began.wait, 5)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    go_on.set()
    await asyncio.to_thread(threads[0].join, 5)
    assert raised == []


async def simulated(task_type, payload, monkeypatch):
    """Call the handler without a queue. Return its result, reports and seconds."""
    reports = []
    naps = []
    monkeypatch.setattr(time, "sleep", naps.append)
    began = now()
    result = HANDLERS[task_type](payload, reports.append)
    if inspect.isawaitable(result):
        result = await result
    return result, reports, now() - began + sum(naps)


SIMULATED = pytest.mark.parametrize(
    ("task_type", "payload", "seconds"),
    [
        ("resize_image", ResizeImagePayload(width=4, height=3), 2.0),
        ("generate_report", GenerateReportPayload(report_id=7), 3.0),
        ("send_email", SendEmailPayload(), 0.9),
    ],
    ids=["resize_image", "generate_report", "send_email"],
)


@SIMULATED
async def test_simulated_handlers_need_no_queue(
    task_type, payload, seconds, monkeypatch
):
    monkeypatch.setattr(random, "random", lambda: 0.99)
    _, _, taken = await simulated(task_type, payload, monkeypatch)
    assert taken == pytest.approx(seconds, abs=0.01)


@SIMULATED
async def test_simulated_handlers_report_rising_progress_up_to_100(
    task_type, payload, seconds, monkeypatch
):
    monkeypatch.setattr(random, "random", lambda: 0.99)
    _, reports, _ = await simulated(task_type, payload, monkeypatch)
    assert reports == sorted(set(reports))
    assert reports[-1] == 100


@SIMULATED
async def test_simulated_handlers_can_fail_in_each_stage(
    task_type, payload, seconds, monkeypatch
):
    monkeypatch.setattr(random, "random", lambda: 0.0)
    failures = set()
    for number in range(3):
        monkeypatch.setattr(random, "choice", operator.itemgetter(number))
        with pytest.raises(RuntimeError, match="simulated failure while") as caught:
            await simulated(task_type, payload, monkeypatch)
        failures.add(str(caught.value))
    assert len(failures) == 3


async def test_simulated_image_has_the_size_that_was_asked_for(monkeypatch):
    monkeypatch.setattr(random, "random", lambda: 0.99)
    payload = ResizeImagePayload(url="a.jpg", width=4, height=3)
    result, _, _ = await simulated("resize_image", payload, monkeypatch)
    assert result == {"url": "a.jpg", "size": "4x3"}


async def test_simulated_report_has_the_id_and_format_that_were_asked_for(monkeypatch):
    monkeypatch.setattr(random, "random", lambda: 0.99)
    payload = GenerateReportPayload(report_id=7, format="txt")
    result, _, _ = await simulated("generate_report", payload, monkeypatch)
    assert result == {"file": "report-7.txt"}


async def test_simulated_mail_says_whom_it_went_to(monkeypatch):
    monkeypatch.setattr(random, "random", lambda: 0.99)
    payload = SendEmailPayload(to="a@example.com")
    result, _, _ = await simulated("send_email", payload, monkeypatch)
    assert result["to"] == "a@example.com"
    assert re.fullmatch(r"<\w+@example.com>", result["message_id"])


async def test_simulated_mail_to_a_domain_that_cannot_exist_fails(monkeypatch):
    monkeypatch.setattr(random, "random", lambda: 0.99)
    payload = SendEmailPayload(to="a@nowhere.invalid")
    with pytest.raises(ConnectionError, match="a@nowhere.invalid"):
        await simulated("send_email", payload, monkeypatch)


@pytest.mark.parametrize(
    ("failure_rate", "status"), [(0, "completed"), (1, "failed")], ids=["0", "1"]
)
async def test_simulated_handlers_fail_as_often_as_is_set(failure_rate, status):
    async with TaskQueue(Settings(failure_rate=failure_rate)) as queue:
        task_ids = [
            queue.submit(TaskSubmission(task_type="resize_image")).id for _ in range(5)
        ]
        await queue.join()
        assert {queue.get_task(each).status for each in task_ids} == {status}


async def test_simulated_handlers_never_fail_at_a_rate_of_0(monkeypatch):
    monkeypatch.setattr(random, "random", lambda: 0.0)  # the least that it returns
    async with TaskQueue(Settings(failure_rate=0)) as queue:
        submission = TaskSubmission(task_type="resize_image")
        task = await until(queue, queue.submit(submission).id)
    assert task.status == "completed"


async def test_simulated_handlers_take_their_time_from_the_pace_of_their_own_queue():
    slow = TaskQueue(Settings(failure_rate=0, pace=20))
    async with slow, TaskQueue(Settings(failure_rate=0, pace=10)) as queue:
        slow.submit(TaskSubmission(task_type="resize_image"))
        queue.submit(TaskSubmission(task_type="resize_image"))
        await queue.join()
        assert now() == pytest.approx(20, abs=0.01)
        await slow.join()
        assert now() == pytest.approx(40, abs=0.01)


@real_clock
async def test_simulated_report_keeps_the_pace_in_its_thread():
    """With the default pace it would take 3 seconds."""
    async with TaskQueue(Settings(failure_rate=0, pace=0)) as queue:
        submission = TaskSubmission(task_type="generate_report")
        began = now()
        task = await until(queue, queue.submit(submission).id)
        assert task.status == "completed"
        assert now() - began < 2


# ===== Queue ==========================================================================
# The books: what they show, that they stay right, and how changes are watched.


async def states_of(queue, task_id, last_event_id=0):
    """All states that a watcher is shown, up to the end."""
    states = queue.watch(task_id, last_event_id)
    async with asyncio.timeout(5), contextlib.aclosing(states):
        return [task async for task in states]


async def test_queue_finds_no_task_that_never_was(gate):
    async with running(gate) as queue:
        with pytest.raises(TaskNotFound):
            queue.get_task("no-such-task")


@pytest.mark.parametrize("status", list(Status))
async def test_queue_shows_a_task_in_every_status(status, gate):
    async with running(gate) as queue:
        task_id = await bring_to(status, queue, gate)
        assert queue.get_task(task_id).status == status
        assert queue.count(status) == 1


async def test_queue_lists_the_latest_submission_first(gate):
    async with running(gate) as queue:
        task_ids = [queue.submit(email(delay=9)).id for _ in range(5)]
        tasks, total = queue.list_tasks()
        assert [task.id for task in tasks] == task_ids[::-1]
        assert total == 5


async def test_queue_lists_a_status_by_when_it_was_entered(gate):
    async with running(gate) as queue:
        task_ids = [queue.submit(email(delay=9)).id for _ in range(4)]
        for number in (2, 0, 3):
            queue.cancel(task_ids[number])
        tasks, total = queue.list_tasks(Status.CANCELLED)
        assert [task_ids.index(task.id) for task in tasks] == [3, 0, 2]
        assert total == 3


@pytest.mark.parametrize("offset", [0, 3, 9, 10, 10**30])
async def test_queue_lists_one_page_and_counts_all(offset, gate):
    async with running(gate) as queue:
        for _ in range(10):
            queue.submit(email(delay=9))
        everything, _ = queue.list_tasks()
        page, total = queue.list_tasks(limit=3, offset=offset)
        assert page == everything[offset : offset + 3]
        assert total == 10


# GOTCHA [unbounded-history]
async def test_queue_has_no_unbounded_history_and_evicts_only_what_has_finished(gate):
    """The two oldest tasks of all have not finished, so they stay."""
    async with running(gate, max_workers=2, keep_finished=2) as queue:
        waits = queue.submit(email("waits", delay=9)).id
        runs = queue.submit(email("runs")).id
        await quiet()
        ended = [await bring_to("cancelled", queue, gate) for _ in range(4)]
        tasks, _ = queue.list_tasks()
        assert [task.id for task in tasks] == [ended[3], ended[2], runs, waits]
        with pytest.raises(TaskNotFound):
            queue.get_task(ended[1])


async def test_queue_counts_what_it_has_evicted(gate):
    async with running(gate, keep_finished=0) as queue:
        for _ in range(3):
            await quiet()
            queue.cancel(queue.submit(email(delay=9)).id)
        assert queue.list_tasks() == ([], 0)
        assert queue.store.evicted == 3


# GOTCHA [terminal-is-final]
@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
@pytest.mark.parametrize("target", list(Status))
async def test_queue_terminal_is_final_for_each_move(status, target, gate):
    """Whoever comes second gets an exception, and the task stays as it is."""
    async with running(gate) as queue:
        task_id = await bring_to(status, queue, gate)
        before = queue.get_task(task_id)
        with pytest.raises(IllegalTransition, match=f"{status} → {target}"):
            queue.store.move(queue.store.find(task_id), target)
        assert queue.get_task(task_id) == before


async def test_queue_refuses_to_complete_what_does_not_run(gate):
    async with running(gate) as queue:
        task_id = await bring_to("pending", queue, gate)
        with pytest.raises(IllegalTransition, match="pending → completed"):
            queue.store.move(queue.store.find(task_id), Status.COMPLETED)


async def test_watch_shows_the_current_state_at_once(gate):
    async with running(gate) as queue:
        task_id = await bring_to("running", queue, gate)
        async with contextlib.aclosing(queue.watch(task_id)) as states:
            assert await anext(states) == queue.get_task(task_id)


async def test_watch_ends_after_the_one_final_state(gate):
    async with running(gate) as queue:
        task_id = queue.submit(email()).id
        watching = asyncio.create_task(states_of(queue, task_id))
        await quiet()
        gate.let_go("it", "done")
        statuses = [task.status for task in await watching]
    assert statuses == ["pending", "running", "completed"]


async def test_watch_of_an_unknown_task_raises_before_it_is_iterated_over(gate):
    async with running(gate) as queue:
        with pytest.raises(TaskNotFound):
            queue.watch("no-such-task")


async def test_watch_shows_only_what_is_newer_than_the_last_event_id(gate):
    async with running(gate) as queue:
        task_id = await bring_to("running", queue, gate)
        known = queue.get_task(task_id).version
        watching = asyncio.create_task(states_of(queue, task_id, known))
        await quiet()
        gate.let_go()
        assert [task.status for task in await watching] == ["completed"]


async def test_watch_shows_nothing_to_who_knows_the_final_state(gate):
    async with running(gate) as queue:
        task_id = await bring_to("completed", queue, gate)
        known = queue.get_task(task_id).version
        assert await states_of(queue, task_id, known) == []


async def test_watch_ignores_an_id_of_the_future(gate):
    async with running(gate) as queue:
        task_id = await bring_to("completed", queue, gate)
        future = queue.get_task(task_id).version + 1
        assert len(await states_of(queue, task_id, future)) == 1


async def test_watch_ids_grow_with_every_change_of_any_task(gate):
    async with running(gate) as queue:
        versions = [queue.submit(email(str(number))).version for number in range(3)]
        await quiet()
        for number in range(3):
            gate.let_go(str(number))
        await quiet()
        tasks, _ = queue.list_tasks(Status.COMPLETED)
        versions += [task.version for task in reversed(tasks)]
    assert versions == sorted(set(versions))


async def test_watch_ids_are_above_those_of_an_earlier_life(gate):
    """A client may come back with one, after the server was started again."""
    async with running(gate) as queue:
        old_task = queue.submit(email())
    async with running(gate) as queue:
        task = queue.submit(email(delay=9))
        assert task.version > old_task.version
        states = queue.watch(task.id, old_task.version)
        async with contextlib.aclosing(states):
            assert (await anext(states)).status == "pending"


# GOTCHA [slow-reader]
async def test_watch_gives_a_slow_reader_the_latest_state_and_no_backlog(gate):
    async with running(gate) as queue:
        task_id = await bring_to("running", queue, gate)
        async with contextlib.aclosing(queue.watch(task_id)) as states:
            await anext(states)
            for percent in range(1, 51):
                gate.report["it"](percent)
                await quiet()
            assert (await anext(states)).progress == 50
            gate.let_go()
            assert (await anext(states)).status == "completed"


async def test_watch_holds_nothing_for_a_slow_reader(gate):
    """However much it has missed: no state that it was not shown is in memory."""
    async with running(gate) as queue:
        task_id = await bring_to("running", queue, gate)
        missed = []
        async with contextlib.aclosing(queue.watch(task_id)) as states:
            await anext(states)
            for percent in range(1, 51):
                gate.report["it"](percent)
                missed.append(weakref.ref(queue.get_task(task_id)))
                await quiet()
            gc.collect()
            assert [state() for state in missed[:-1]] == [None] * 49


# GOTCHA [snapshot-then-subscribe]
@pytest.mark.parametrize("steps", range(6))
async def test_watch_snapshot_then_subscribe_loses_no_change(steps, gate):
    """The change comes so many steps of the event loop after the last look."""
    async with running(gate) as queue:
        task_id = await bring_to("running", queue, gate)
        async with contextlib.aclosing(queue.watch(task_id)) as states:
            await anext(states)
            following = asyncio.create_task(anext(states))
            for _ in range(steps):
                await asyncio.sleep(0)
            gate.report["it"](50)
            async with asyncio.timeout(5):
                assert (await following).progress == 50


# GOTCHA [never-entered]
async def test_watch_that_was_never_entered_leaves_nothing_behind(gate):
    async with running(gate) as queue:
        task_id = await bring_to("running", queue, gate)
        states = queue.watch(task_id)
        await states.aclose()
        assert queue.store.watchers == 0


async def test_watch_is_counted_while_it_is_open(gate):
    async with running(gate) as queue:
        task_id = await bring_to("running", queue, gate)
        async with contextlib.aclosing(queue.watch(task_id)) as states:
            await anext(states)
            assert queue.store.watchers == 1
        assert queue.store.watchers == 0


async def test_watch_ends_without_a_final_state_when_the_queue_stops(gate):
    async with running(gate) as queue:
        task_id = await bring_to("running", queue, gate)
        watching = asyncio.create_task(states_of(queue, task_id))
        await quiet()
        queue.begin_shutdown()
        assert [task.status for task in await watching] == ["running"]


async def test_watch_encodes_a_change_once_for_all_who_watch(gate):
    async with running(gate) as queue:
        task_id = await bring_to("running", queue, gate)
        watching = [asyncio.create_task(states_of(queue, task_id)) for _ in range(2)]
        await quiet()
        gate.let_go()
        first, second = await asyncio.gather(*watching)
        assert first[-1] is second[-1]
        assert first[-1].progress_json is second[-1].progress_json


# ===== Workers ========================================================================
# Who may start, how an attempt ends, and what is left of it.


def test_backoff_doubles_up_to_its_cap(monkeypatch):
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    settings = Settings(backoff_base=0.5, backoff_cap=30)
    delays = [backoff_delay(attempt, settings) for attempt in range(1, 9)]
    assert delays == [0.5, 1, 2, 4, 8, 16, 30, 30]


def test_backoff_has_full_jitter(monkeypatch):
    monkeypatch.setattr(random, "uniform", lambda low, high: low)
    assert backoff_delay(5, Settings()) == 0


# -- Progress --------------------------------------------------------------------------


async def reported(*reports):
    """Run a handler that makes these reports and waits. Return how the task stands."""

    async def handle(payload, update_progress):
        for percent in reports:
            update_progress(percent)
        await asyncio.Event().wait()

    async with running(handle, drain_seconds=0) as queue:
        task_id = queue.submit(email()).id
        await quiet()
        return queue.get_task(task_id)


@pytest.mark.parametrize(
    ("percent", "shown"),
    [
        (0, 0),
        (7, 7),
        (7.9, 7),
        (100, 100),
        (Decimal("7.5"), 7),
        (Fraction(15, 2), 7),
        (100.00000000000001, 100),
        (100.004, 100),
        (-0.00000000000001, 0),
        (Decimal("100.0000000000000000001"), 100),
    ],
    ids=str,
)
async def test_progress_is_any_real_number_from_0_to_100(percent, shown):
    task = await reported(percent)
    assert task.status == "running"
    assert task.progress == shown


@pytest.mark.parametrize(
    "percent",
    [
        -1,
        100.006,
        math.nan,
        math.inf,
        10**400,
        "50",
        None,
        True,
        1j,
        Decimal("NaN"),
        Decimal("sNaN"),
        Fraction(-1, 2),
        Fraction(10**400),
    ],
    ids=lambda percent: repr(percent)[:20],
)
async def test_progress_refuses_what_is_no_percentage(percent):
    task = await reported(percent)
    assert task.status == "failed"
    assert task.error.startswith("ValueError: ")


# GOTCHA [rounded-progress]
@pytest.mark.parametrize("steps", [7, 13, 49])
async def test_progress_takes_the_rounded_progress_of_equal_steps(steps):
    done = 0.0
    reports = []
    for _ in range(steps):
        done += 100 / steps
        reports.append(done)
    task = await reported(*reports)
    assert task.status == "running"
    assert task.progress == 100


async def test_progress_takes_the_rounded_progress_of_single_precision():
    """numpy's float32 has seven digits: 156 steps of 100/156 make 100.0002."""
    step = ctypes.c_float(100 / 156).value
    done = 0.0
    for _ in range(156):
        done = ctypes.c_float(done + step).value
    assert done > 100.0002
    assert (await reported(done)).progress == 100


async def test_progress_never_runs_backwards():
    assert (await reported(50, 20)).progress == 50


async def test_progress_that_is_no_progress_is_no_change(gate):
    async with running(gate) as queue:
        task_id = await bring_to("running", queue, gate)
        gate.report["it"](50)
        before = queue.get_task(task_id).version
        for percent in (50, 50.9, 20):
            gate.report["it"](percent)
        assert queue.get_task(task_id).version == before


@real_clock
async def test_progress_of_a_thread_that_comes_late_is_ignored():
    """An `async def` may report from a thread of its own, too."""

    async def handle(payload, update_progress):
        thread = threading.Thread(target=update_progress, args=(50,))
        thread.start()
        thread.join()  # what it has reported waits for the event loop
        update_progress(60)
        await quiet()  # and now it comes

    seen = []
    async with running(handle) as queue:
        task_id = queue.submit(email()).id
        async for task in queue.watch(task_id):
            seen.append(task.progress)
    assert seen == [0, 60, 100]


async def test_progress_begins_again_with_each_attempt(gate):
    async with running(gate, backoff_base=0) as queue:
        task_id = queue.submit(email(max_retries=1)).id
        await quiet()
        gate.report["it"](60)
        gate.let_go("it", ValueError())
        await quiet()
        assert queue.get_task(task_id).attempt == 2
        assert queue.get_task(task_id).progress == 0


async def test_progress_of_an_earlier_attempt_is_ignored(gate):
    async with running(gate, backoff_base=0) as queue:
        task_id = queue.submit(email(max_retries=1)).id
        await quiet()
        late_report = gate.report["it"]
        gate.let_go("it", ValueError())
        await quiet()
        late_report(90)
        assert queue.get_task(task_id).progress == 0


async def test_progress_after_the_end_is_ignored(gate):
    async with running(gate) as queue:
        task_id = await bring_to("failed", queue, gate)
        before = queue.get_task(task_id)
        gate.report["it"](90)
        assert queue.get_task(task_id) == before


# GOTCHA [progress-from-thread]
@real_clock
async def test_progress_from_thread_is_noted_in_the_thread_of_the_loop(monkeypatch):
    def handle(payload, update_progress):
        for percent in (10, 20, 30):
            update_progress(percent)

    async with running(handle) as queue:
        changed = queue.store.changed
        threads = []

        def noted(record):
            threads.append(threading.get_ident())
            changed(record)

        monkeypatch.setattr(queue.store, "changed", noted)
        await until(queue, queue.submit(email()).id)
    assert len(threads) == 6  # submitted, running, three reports, completed
    assert set(threads) == {threading.get_ident()}


@real_clock
async def test_progress_from_thread_is_shown():
    go_on = threading.Event()

    def handle(payload, update_progress):
        update_progress(50)
        go_on.wait(5)

    async with running(handle) as queue:
        task_id = queue.submit(email()).id
        task = await until(queue, task_id, lambda task: task.progress > 0)
        assert task.progress == 50
        go_on.set()
        await until(queue, task_id)


# GOTCHA [progress-flood]
@real_clock
async def test_progress_flood_of_a_thread_costs_the_loop_a_hundred_steps(monkeypatch):
    def handle(payload, update_progress):
        for row in range(1, 100_001):
            update_progress(100 * row / 100_000)

    loop = asyncio.get_running_loop()
    hand_over = loop.call_soon_threadsafe
    calls = []

    def counted(*args, **options):
        calls.append(args)
        return hand_over(*args, **options)

    monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
    async with running(handle) as queue:
        await until(queue, queue.submit(email()).id)
    assert len(calls) == 101  # from 1 to 100 per cent, and the end


async def test_progress_flood_of_a_coroutine_is_a_hundred_changes(gate):
    async with running(gate) as queue:
        await bring_to("running", queue, gate)
        before = queue.store.version
        for row in range(1, 10_001):
            gate.report["it"](100 * row / 10_000)
        assert queue.store.version - before == 100


# -- Results ---------------------------------------------------------------------------


def returning(result):
    """A handler that returns this."""

    async def handle(payload, update_progress):
        return result

    return handle


@pytest.mark.parametrize(
    ("result", "shown"),
    [
        pytest.param(None, None, id="None"),
        pytest.param(True, True, id="bool"),
        pytest.param("é\u2028😀", "é\u2028😀", id="text"),
        pytest.param(10**30, 10**30, id="long number"),
        pytest.param(0.1, 0.1, id="float"),
        pytest.param((1, [2, ()]), [1, [2, []]], id="tuple"),
        pytest.param({"a": {"b": None}}, {"a": {"b": None}}, id="dict"),
        pytest.param(Priority.HIGH, 1, id="enum of numbers"),
        pytest.param(Status.FAILED, "failed", id="enum of texts"),
        pytest.param(json.loads(nested(100)), json.loads(nested(100)), id="deep"),
    ],
)
async def test_result_is_kept_as_plain_json(result, shown):
    task = await outcome(returning(result))
    assert task.status == "completed"
    assert strict_json(task.model_dump_json())["result"] == shown


@dataclasses.dataclass
class Report:
    """Pydantic would read its endless pages to the end."""

    pages: Any


CIRCLE = []
CIRCLE.append(CIRCLE)

BAD_RESULTS = [
    pytest.param(math.nan, "result is nan", id="NaN"),
    pytest.param([1, -math.inf], r"result\[1\] is -inf", id="inf"),
    pytest.param(
        {"rows": [datetime.now()]}, r"result.rows\[0\] is of type datetime", id="date"
    ),
    pytest.param({"a": {1}}, "result.a is of type set", id="set"),
    pytest.param(object(), "result is of type object", id="object"),
    pytest.param(b"bytes", "result is of type bytes", id="bytes"),
    pytest.param(print, "result is of type builtin_function", id="function"),
    pytest.param({1: 2}, "result has a key of type int", id="key"),
    pytest.param("\ud800", "surrogates not allowed", id="half a surrogate pair"),
    pytest.param({"\ud800": 1}, "surrogates not allowed", id="the same as key"),
    pytest.param(10**5000, "more than 4,200 digits", id="long number"),
    pytest.param(CIRCLE, "more than 100 levels", id="circle"),
    pytest.param(json.loads(nested(101)), "more than 100 levels", id="deep"),
    pytest.param(json.loads("[" * 100 + "{}" + "]" * 100), "100 levels", id="deep {}"),
    pytest.param((json.loads(nested(100)),), "more than 100 levels", id="deep tuple"),
    pytest.param(iter([1]), "result is of type list_iterator", id="iterator"),
    pytest.param(itertools.count(), "result is of type count", id="endless"),
    pytest.param(
        {"x": itertools.count()}, "result.x is of type count", id="endless in dict"
    ),
    pytest.param(Report(itertools.count()), "result is of type Report", id="dataclass"),
    pytest.param(Payload(x=itertools.count()), "result is of type Payload", id="model"),
    pytest.param("x" * 70_000, "max_result", id="too large"),
    pytest.param(["x" * 1_000] * 70, "max_result", id="too large in all"),
    pytest.param("é" * 40_000, "max_result", id="too large in UTF-8"),
]


@pytest.mark.parametrize(("result", "reason"), BAD_RESULTS)
async def test_bad_result_fails_its_task_at_once_and_says_why(result, reason):
    task = await outcome(returning(result), max_retries=3)
    assert task.status == "failed"
    assert task.attempt == 1
    assert re.search(reason, task.error)


@pytest.mark.parametrize(("result", "reason"), BAD_RESULTS)
async def test_bad_result_spoils_no_list_of_tasks(result, reason):
    async with serving(returning(result)) as (client, queue):
        task_id = queue.submit(email()).id
        await queue.join()
        answer = await client.get("/tasks")
        assert answer.status_code == 200
        assert strict_json(answer.text)["tasks"][0]["id"] == task_id


async def test_bad_result_does_not_hide_in_a_class_of_its_own():
    """What is checked is what is shown. Pydantic would show the fields only."""

    @dataclasses.dataclass
    class Stats(dict):
        mean: float

    async with serving(returning(Stats(mean=float("nan")))) as (client, queue):
        task_id = queue.submit(email()).id
        await queue.join()
        answer = await client.get(f"/tasks/{task_id}")
    assert strict_json(answer.text)["result"] == {}


@pytest.mark.parametrize(
    "result",
    [
        "x" * 98,
        [9] * 9,
        9,
        [[[1]], [0, 2]],
        {"a": [1], "b": None},
        [10**30, 32, 99, 1.5],
        {},
        "é" * 40,
    ],
    ids=repr,
)
async def test_result_may_have_as_many_bytes_as_is_set(result):
    text = json.dumps(result, separators=(",", ":"), ensure_ascii=False)
    task = await outcome(returning(result), settings={"max_result": len(text.encode())})
    assert task.status == "completed"


# GOTCHA [unbounded-result]
async def test_unbounded_result_of_a_byte_more_is_refused():
    task = await outcome(returning("x" * 99), settings={"max_result": 100})
    assert task.status == "failed"
    assert "100 bytes" in task.error


async def test_unbounded_result_is_told_to_be_a_reference():
    task = await outcome(returning("é" * 98), settings={"max_result": 100})
    assert "return a path or an id" in task.error


@pytest.mark.parametrize(
    ("value", "most"),
    [(1, 500), ("x" * 100, 10), (1 << 13_999, 1)],
    ids=["small", "text", "huge"],
)
async def test_unbounded_result_is_looked_at_only_as_far_as_it_may_go(value, most):
    """With its comma, each value takes two bytes at least. A huge number takes many."""
    looked_at = 0

    class Rows(list):
        """A list that notes how far somebody has read it."""

        def __iter__(self):
            nonlocal looked_at
            for _ in range(100_000):
                looked_at += 1
                yield value

    await outcome(returning(Rows()), settings={"max_result": 1000})
    assert looked_at <= most


@real_clock
async def test_unbounded_result_of_a_thread_is_encoded_in_that_thread():
    threads = []

    class Table(dict):
        """A dict that notes which thread has read it."""

        def items(self):
            threads.append(threading.get_ident())
            return super().items()

    def handle(payload, update_progress):
        threads.append(threading.get_ident())
        return Table(rows=1)

    task = await outcome(handle)
    assert task.result == {"rows": 1}
    assert len(set(threads)) == 1
    assert threads[0] != threading.get_ident()


# -- Errors ----------------------------------------------------------------------------


def raising(error):
    """A handler that raises this."""

    async def handle(payload, update_progress):
        raise error

    return handle


def shrink():
    """A function that a handler calls, and that fails."""
    raise ValueError("bad image")


async def test_error_says_what_and_where():
    async def handle(payload, update_progress):
        shrink()

    task = await outcome(handle)
    line = shrink.__code__.co_firstlineno + 2
    file = os.path.basename(__file__)
    assert task.error == f"ValueError: bad image ({file}:{line} in shrink)"


@real_clock
async def test_error_of_a_thread_says_where():
    def handle(payload, update_progress):
        shrink()

    assert (await outcome(handle)).error.endswith(" in shrink)")


async def test_error_names_the_handlers_line_and_not_that_of_a_library():
    async def handle(payload, update_progress):
        json.loads("{")

    line = handle.__code__.co_firstlineno + 1
    assert (await outcome(handle)).error.endswith(f":{line} in handle)")


async def test_error_names_the_handlers_line_and_not_that_of_the_import_machinery():
    """It is built into Python: its file is called "<frozen importlib._bootstrap>"."""

    async def handle(payload, update_progress):
        importlib.import_module("no_such_module")

    line = handle.__code__.co_firstlineno + 1
    assert (await outcome(handle)).error.endswith(f":{line} in handle)")


async def test_error_of_a_wrong_progress_names_the_handlers_line():
    async def handle(payload, update_progress):
        update_progress("half")

    line = handle.__code__.co_firstlineno + 1
    assert (await outcome(handle)).error.endswith(f":{line} in handle)")


async def test_error_of_a_handler_in_the_module_itself_names_its_line():
    payload = {"to": "ada@example.invalid"}
    submission = TaskSubmission(task_type="send_email", payload=payload)
    async with TaskQueue(Settings(failure_rate=0)) as queue:
        task = await until(queue, queue.submit(submission).id)
    assert re.search(r" \(taskqueue.py:\d+ in send_email\)$", task.error)


async def test_error_of_a_bad_result_names_no_line():
    """It was raised by the queue, after the handler had returned."""
    assert "(" not in (await outcome(returning(float("nan")))).error


async def test_error_without_a_message_ends_with_its_type():
    assert (await outcome(raising(ValueError()))).error.startswith("ValueError (")


async def test_error_without_a_message_says_its_line_all_the_more():
    async def handle(payload, update_progress):
        assert payload.subject == "something else"

    task = await outcome(handle)
    assert re.match(r"AssertionError\b.* in handle\)$", task.error, re.DOTALL)


async def test_error_with_a_long_message_still_says_where():
    async def handle(payload, update_progress):
        raise ValueError("x" * 5000)

    error = (await outcome(handle)).error
    assert error.endswith(" in handle)")
    assert len(error) <= 1000


# GOTCHA [hidden-cause]
async def test_error_names_the_hidden_cause_in_a_group():
    async def fail():
        raise ConnectionError("no route")

    async def handle(payload, update_progress):
        async with asyncio.TaskGroup() as group:
            group.create_task(fail())

    task = await outcome(handle)
    assert task.error.startswith("ConnectionError: no route (")
    assert "TaskGroup" not in task.error


async def test_error_names_each_hidden_cause_in_a_group_of_groups():
    inner = ExceptionGroup("inner", [KeyError("b"), OSError("c")])
    task = await outcome(raising(ExceptionGroup("outer", [ValueError("a"), inner])))
    assert task.error == "ValueError: a; KeyError: 'b'; OSError: c"


async def test_error_names_the_first_five_of_many_leaves():
    leaves = [ValueError(number) for number in range(7)]
    task = await outcome(raising(ExceptionGroup("seven", leaves)))
    assert task.error == "; ".join(f"ValueError: {number}" for number in range(5))


async def test_error_of_many_leaves_costs_little():
    """As from a TaskGroup that sends thousands of mails: a few of them are read."""

    class Counted(Exception):
        def __str__(self):
            read.add(id(self))
            return "no route"

    def with_a_cause():
        error = Counted()
        error.__cause__ = Counted()
        return error

    read = set()
    group = ExceptionGroup("many", [with_a_cause() for _ in range(6000)])
    task = await outcome(raising(group))
    assert task.error.startswith("Counted: no route; Counted: no route; ")
    assert len(read) == 10  # five of them, each with its cause


async def test_error_of_an_attempt_is_shown_until_the_next_one_begins(gate):
    async with running(gate, backoff_base=8) as queue:
        task_id = queue.submit(email(max_retries=1)).id
        await quiet()
        gate.let_go("it", ValueError("broken"))
        await quiet()
        assert queue.get_task(task_id).status == "pending"
        assert queue.get_task(task_id).error.startswith("ValueError: broken")
        await asyncio.sleep(8)
        assert queue.get_task(task_id).status == "running"
        assert queue.get_task(task_id).error is None


async def test_error_is_none_once_an_attempt_has_succeeded(gate):
    async with running(gate, backoff_base=0) as queue:
        task_id = queue.submit(email(max_retries=1)).id
        await quiet()
        gate.let_go("it", ValueError("broken"))
        await quiet()
        gate.let_go("it", "done")
        await quiet()
        assert queue.get_task(task_id).result == "done"
        assert queue.get_task(task_id).error is None


class NamelessMeta(type):
    """A class whose name can't be read."""

    @property
    def __name__(cls):
        raise RuntimeError("no name")


class Nameless(Exception, metaclass=NamelessMeta):
    """An error of such a class."""


class Silent(Exception):
    """An error that can't be shown."""

    __str__ = None
    __repr__ = None


class Loud(Exception):
    """An error that ends the program if one looks at it."""

    def __str__(self):
        raise SystemExit("loud")

    __repr__ = __str__


class Listing(Exception):
    """It has an attribute of the same name as an ExceptionGroup has, but texts."""

    exceptions = ("first", "second")


class Trap(Exception):
    """The same attribute, and one can't even read it."""

    @property
    def exceptions(self):
        raise RuntimeError("trap")


class OddGroup(ExceptionGroup):
    """A group that shows no leaves."""

    @property
    def exceptions(self):
        raise RuntimeError("trap")


def in_a_circle():
    """Two errors, each the cause of the other."""
    error = ValueError("egg")
    error.__cause__ = ValueError("hen")
    error.__cause__.__cause__ = error
    return error


UNFRIENDLY = {
    "an ordinary one": ValueError("x"),
    "half a surrogate pair": ValueError("\ud800"),
    "a long text": ValueError("x" * 1_000_000),
    "its class has no name": Nameless("x"),
    "it can't be shown": Silent("x"),
    "to look at it ends the program": Loud("x"),
    "texts where a group has its leaves": Listing("x"),
    "a trap where a group has its leaves": Trap("x"),
    "causes in a circle": in_a_circle(),
    "a group of such": ExceptionGroup("two", [Silent("x"), Nameless("y")]),
    "a group without leaves": OddGroup("odd", [ValueError("x")]),
    "RecursionError": RecursionError(),
    "MemoryError": MemoryError(),
    "StopIteration": StopIteration("x"),
    "StopAsyncIteration": StopAsyncIteration("x"),
    "GeneratorExit": GeneratorExit("x"),
    "SystemExit": SystemExit(3),
    "KeyboardInterrupt": KeyboardInterrupt(),
    "CancelledError": asyncio.CancelledError(),
    "TimeoutError": TimeoutError(),
}


# GOTCHA [cancelled-error]
@real_clock
@pytest.mark.parametrize("error", UNFRIENDLY.values(), ids=UNFRIENDLY.keys())
@pytest.mark.parametrize("kind", ["async def", "def"])
async def test_cancelled_error_or_any_other_fails_its_task_and_frees_the_slot(
    kind, error
):
    """`except Exception` lets some pass. Some can't even be shown."""

    def handle(payload, update_progress):
        if payload.subject == "it":
            raise error
        return "fine"

    async def handle_async(payload, update_progress):
        return handle(payload, update_progress)

    handler = handle
    if kind == "async def":
        handler = handle_async
    async with running(handler, max_workers=1, drain_seconds=0) as queue:
        task = await until(queue, queue.submit(email()).id)
        assert task.status == "failed"
        assert 0 < len(strict_json(task.model_dump_json())["error"]) <= 1000
        assert (await until(queue, queue.submit(email("next")).id)).result == "fine"


async def test_error_that_can_not_be_read_is_tried_again():
    odd = OddGroup("odd", [ValueError("x")])
    task = await outcome(raising(odd), settings={"backoff_base": 0}, max_retries=1)
    assert task.attempt == 2


class Away(logging.Handler):
    """A log handler as people write it: without the try that logging asks for."""

    def emit(self, record):
        raise ConnectionError("the log's database is away")


class Refusing(logging.Filter):
    """A log filter that raises."""

    def filter(self, record):
        raise KeyError("no such field")


@pytest.fixture
def broken_log(request):
    """The log, with a handler or a filter that raises."""
    taskqueue.logger.setLevel(logging.DEBUG)
    if request.param == "handler":
        broken = Away()
        taskqueue.logger.addHandler(broken)
        yield
        taskqueue.logger.removeHandler(broken)
    else:
        broken = Refusing()
        taskqueue.logger.addFilter(broken)
        yield
        taskqueue.logger.removeFilter(broken)
    taskqueue.logger.setLevel(logging.NOTSET)


@pytest.mark.parametrize("broken_log", ["handler", "filter"], indirect=True)
@pytest.mark.parametrize(
    ("handler", "status"),
    [(raising(ValueError()), Status.FAILED), (returning(1), Status.COMPLETED)],
    ids=["failed", "completed"],
)
async def test_attempt_is_settled_before_it_is_logged_whatever_that_raises(
    handler, status, broken_log
):
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda loop, context: None)  # it would log that, too
    async with running(handler, max_workers=1) as queue:
        queue.submit(email())
        queue.submit(email())
        await queue.join()
        assert queue.count(status) == 2
    gc.collect()  # so that asyncio says now what it has to say


async def test_log_has_the_traceback_of_a_failed_attempt(caplog):
    async def handle(payload, update_progress):
        shrink()

    async with running(handle) as queue:
        queue.submit(email(), request_id="r-1")
        await queue.join()
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("[r-1] task ")
    assert 'raise ValueError("bad image")' in record.getMessage()


async def test_log_has_the_traceback_of_each_leaf_and_of_its_cause(caplog):
    async def fail():
        try:
            shrink()
        except ValueError as error:
            raise ConnectionError("no route") from error

    async def handle(payload, update_progress):
        async with asyncio.TaskGroup() as group:
            group.create_task(fail())

    await outcome(handle)
    [record] = caplog.records
    assert 'raise ValueError("bad image")' in record.getMessage()
    assert "ConnectionError: no route" in record.getMessage()


async def test_log_tells_of_an_attempt_that_has_succeeded(caplog):
    caplog.set_level(logging.INFO, "taskqueue")
    async with running(returning("done")) as queue:
        task = queue.submit(email(), request_id="r-1")
        await queue.join()
    [record] = caplog.records
    assert record.levelname == "INFO"
    assert (
        record.getMessage() == f"[r-1] task {task.id} (send_email) attempt 1: completed"
    )


# GOTCHA [forged-log]
async def test_log_has_no_forged_log_line_of_a_client(caplog):
    """Each line begins with the id of the request, or with a bar."""
    async with running(
        raising(ValueError("x\n2030-01-01 ERROR forged\r\x1b[2J"))
    ) as queue:
        queue.submit(email(), request_id="r-1")
        await queue.join()
    [record] = caplog.records
    first, *rest = re.split("[\r\n]", record.getMessage())
    assert first.startswith("[r-1] task ")
    assert r"x\n2030-01-01 ERROR forged\r\x1b[2J" in first
    assert all(line.startswith("    | ") for line in rest)
    assert "\x1b" not in record.getMessage()


# -- What a failure keeps --------------------------------------------------------------


class Image:
    """Stands for the 20 MB that a handler has in its hands."""


@pytest.fixture
def no_garbage_collection():
    """Without it, only what nobody refers to is freed. A circle stays."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


async def fail_with(image):
    """Raise an error that is a circle: its frame holds it, and an image."""
    error = ValueError("bad image")
    raise error


async def fail_from(image):
    """The same, behind another error that was never raised."""
    hidden = KeyError("never raised")
    try:
        await fail_with(image)
    except ValueError as error:
        cause = error
        hidden.__cause__ = cause
    raise RuntimeError("x") from hidden


async def fail_in_group(image):
    """The same, as a leaf, and so that only the group leads to it."""
    leaf = None
    try:
        await fail_with(image)
    except ValueError as error:
        leaf = error
    raise ExceptionGroup("group", [leaf])


async def wait_for_ever(image):
    """For the timeout, and for a cancel."""
    error = None
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError as cancelled:
        error = cancelled
        raise error


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    """An exception to which nothing can be assigned."""

    reason: str = "frozen"


class MuteDoNotRetry(DoNotRetry):
    """Its text can't be had."""

    def __str__(self):
        raise ValueError("no text")


async def fail_frozen(image):
    """The same, with an exception that can't be changed."""
    error = Frozen()
    raise error


async def test_do_not_retry_counts_also_if_its_text_raises():
    async def handle(payload, update_progress):
        raise MuteDoNotRetry

    task = await outcome(handle, max_retries=3)
    assert task.attempt == 1


# GOTCHA [traceback-keeps-everything]
@pytest.mark.parametrize(
    "fail", [fail_with, fail_from, fail_in_group, fail_frozen, wait_for_ever]
)
async def test_traceback_keeps_everything_no_longer(fail, no_garbage_collection):
    images = []

    async def handle(payload, update_progress):
        image = Image()
        images.append(weakref.ref(image))
        await fail(image)

    task = await outcome(handle, timeout=1)
    assert task.status == "failed"
    assert images[0]() is None


@real_clock
async def test_traceback_keeps_everything_no_longer_for_a_thread(
    no_garbage_collection,
):
    images = []

    def handle(payload, update_progress):
        image = Image()
        images.append(weakref.ref(image))
        error = ValueError("bad image")
        raise error

    await outcome(handle)
    assert images[0]() is None


@real_clock
@pytest.mark.parametrize("kind", ["async def", "def"])
async def test_traceback_keeps_everything_no_longer_for_one_error_of_many_tasks(kind):
    """It would grow with each task that raises it."""
    error = ValueError("the one and only")
    handler = raising(error)
    if kind == "def":

        def handler(payload, update_progress):
            raise error

    async with running(handler) as queue:
        for _ in range(3):
            await until(queue, queue.submit(email()).id)
    assert error.__traceback__ is None


# -- Its life --------------------------------------------------------------------------


async def test_queue_takes_no_task_before_its_start(gate):
    queue = running(gate)
    assert not queue.is_running
    with pytest.raises(QueueStopped):
        queue.submit(email())


async def test_queue_takes_no_task_after_its_stop(gate):
    async with running(gate) as queue:
        assert queue.is_running
    assert not queue.is_running
    with pytest.raises(QueueStopped):
        queue.submit(email())


async def test_queue_can_be_entered_again(gate):
    queue = running(gate, max_workers=1)
    for _ in range(2):
        async with queue:
            await bring_to("completed", queue, gate)


# GOTCHA [one-loop]
def test_one_loop_after_another_can_serve_the_same_app():
    """The second life of an app, in another event loop, inherits nothing."""

    async def live():
        async with app.router.lifespan_context(app):
            queue = app.state.queue
            for _ in range(3):
                queue.submit(email())
            async with asyncio.timeout(2):
                await queue.join()
            return queue.count(Status.COMPLETED)

    async def handle(payload, update_progress):
        await asyncio.sleep(0)

    app = create_app(Settings(max_workers=1), {TaskType.SEND_EMAIL: handle})
    assert asyncio.run(live()) == 3
    assert asyncio.run(live()) == 3


# GOTCHA [strong-reference]
async def test_strong_reference_keeps_an_attempt_alive():
    """Nobody else refers to what this handler waits for."""

    async def handle(payload, update_progress):
        await asyncio.get_running_loop().create_future()

    async with running(handle) as queue:
        task_id = queue.submit(email()).id
        queue.submit(email())  # the worker loop refers to the latest attempt, too
        await quiet()
        gc.collect()
        await quiet()
        assert queue.get_task(task_id).status == "running"
        queue.cancel(task_id, force=True)
        assert (await until(queue, task_id)).status == "cancelled"


# GOTCHA [dead-loop]
async def test_dead_loop_is_noticed(gate, monkeypatch, caplog):
    async def die(queue):
        raise RuntimeError("a bug")

    monkeypatch.setattr(TaskQueue, "worker_loop", die)
    async with running(gate) as queue:
        assert queue.is_running
        await quiet()
        assert not queue.is_running
        with pytest.raises(QueueStopped):
            queue.submit(email())
    assert "RuntimeError: a bug" in caplog.text


async def test_dead_loop_ends_join_and_every_watch(gate, monkeypatch):
    async def die(queue):
        await asyncio.sleep(1)
        raise RuntimeError("a bug")

    monkeypatch.setattr(TaskQueue, "worker_loop", die)
    async with running(gate) as queue:
        task_id = queue.submit(email()).id
        with pytest.raises(RuntimeError, match="the worker loop has died"):
            await queue.join()
        states = [task.status async for task in queue.watch(task_id)]
        assert states == ["pending"]


async def test_queue_with_a_handler_that_has_a_wrong_annotation_fails_its_tasks():
    """It must not be called with another model than the one that it names."""

    async def handle(payload: "Missing", update_progress):  # noqa: F821
        called.append(payload)

    called = []
    task = await outcome(handle)
    assert task.error.startswith("TypeError: ")
    assert called == []


class RaisingLog(logging.Handler):
    """A log handler without the `try` that logging asks for."""

    def emit(self, record):
        raise ConnectionError("the log is away")


async def test_stop_ends_every_task_also_if_the_log_raises(gate):
    async def deaf(payload, update_progress):
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(3600)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(3600)

    log = RaisingLog(logging.WARNING)
    queue = running(deaf, drain_seconds=0)
    with pytest.raises(ConnectionError):
        async with queue:
            ids = [queue.submit(email()).id for _ in range(2)]
            await quiet()
            taskqueue.logger.addHandler(log)
    taskqueue.logger.removeHandler(log)
    assert {queue.get_task(task_id).status for task_id in ids} == {"cancelled"}
    await quiet()


async def test_queue_that_is_entered_again_has_as_many_slots_as_before(gate):
    async def deaf(payload, update_progress):
        for _ in range(2):
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(100)

    queue = TaskQueue(
        Settings(max_workers=1, drain_seconds=0),
        {TaskType.SEND_EMAIL: deaf, TaskType.RESIZE_IMAGE: HeldGate(gate)},
    )
    async with queue:
        queue.submit(email())
        await quiet()
    async with queue:
        await asyncio.sleep(200)  # on the virtual clock: the deaf one has ended now
        for _ in range(3):
            queue.submit(TaskSubmission(task_type="resize_image"))
        await quiet()
        assert queue.count(Status.RUNNING) == 1


class HeldGate:
    """A handler that never ends by itself."""

    def __init__(self, gate):
        self.gate = gate

    async def __call__(self, payload, update_progress):
        await asyncio.Event().wait()


class BrokenHandlers(dict):
    """A mapping of handlers that can't give one out: a plugin that doesn't load."""

    def get(self, task_type, default=None):
        raise ImportError("no such plugin")


async def test_queue_settles_a_task_whose_handler_can_not_be_found():
    handlers = BrokenHandlers({TaskType.SEND_EMAIL: print})
    async with TaskQueue(Settings(max_workers=1), handlers) as queue:
        for _ in range(2):
            task = await until(queue, queue.submit(email()).id)
            assert task.error.startswith("ImportError: no such plugin")


async def test_queue_needs_no_request_id(gate):
    async with running(gate) as queue:
        assert queue.submit(email()).request_id is None


async def test_list_has_a_hundred_tasks_if_nothing_else_is_asked_for(gate):
    async with running(gate) as queue:
        for _ in range(101):
            queue.submit(email(delay=9))
        page, total = queue.list_tasks()
        assert (len(page), total) == (100, 101)


@pytest.mark.parametrize("request_id", [uuid.UUID(int=1), "a\nb", "\ud800"])
async def test_queue_takes_any_request_id_and_makes_it_harmless(request_id, gate):
    async with running(gate) as queue:
        queue.submit(email(), request_id=request_id)
        [task], _ = queue.list_tasks()
        assert task.request_id.isprintable()


async def test_stop_gives_running_handlers_time(gate):
    async with running(gate, drain_seconds=5) as queue:
        task_id = await bring_to("running", queue, gate)
        asyncio.get_running_loop().call_later(4, gate.let_go, "it", "done")
    assert queue.get_task(task_id).result == "done"
    assert now() == pytest.approx(4, abs=0.01)


async def test_stop_takes_no_more_tasks(gate):
    async with running(gate) as queue:
        queue.begin_shutdown()
        with pytest.raises(QueueStopped):
            queue.submit(email())


async def test_stop_cancels_handlers_whose_time_is_up(gate):
    async with running(gate, drain_seconds=5) as queue:
        task_id = await bring_to("running", queue, gate)
    assert queue.get_task(task_id).status == "cancelled"
    assert now() == pytest.approx(5, abs=0.01)
    assert gate.held == {}


async def test_stop_cancels_what_waits_at_once(gate):
    cancelled = set()

    def note_who_is_cancelled():
        tasks, _ = queue.list_tasks(Status.CANCELLED)
        cancelled.update(task.id for task in tasks)

    async with running(gate, max_workers=1) as queue:
        queue.submit(email("runs"))
        waits = queue.submit(email("waits"))
        delayed = queue.submit(email("delayed", delay=1))
        await quiet()
        asyncio.get_running_loop().call_later(3, gate.let_go, "runs")
        asyncio.get_running_loop().call_later(2, note_who_is_cancelled)
    assert cancelled == {waits.id, delayed.id}
    assert gate.started == ["runs"]


async def test_stop_cancels_what_came_back_for_a_retry_meanwhile(gate):
    async with running(gate, backoff_base=0) as queue:
        task_id = queue.submit(email(max_retries=1)).id
        await quiet()
        asyncio.get_running_loop().call_later(1, gate.let_go, "it", ValueError())
    assert queue.get_task(task_id).status == "cancelled"
    assert queue.get_task(task_id).attempt == 1


async def test_stop_leaves_a_handler_behind_that_ignores_it(caplog):
    let_go = asyncio.Event()

    async def handle(payload, update_progress):
        while not let_go.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await let_go.wait()
        return "too late"

    async with running(handle, drain_seconds=5) as queue:
        task_id = queue.submit(email()).id
        await quiet()
    assert now() == pytest.approx(5.2, abs=0.01)
    [warning] = caplog.records
    assert task_id in warning.getMessage()
    let_go.set()
    await quiet()
    assert queue.get_task(task_id).status == "cancelled"
    assert queue.get_task(task_id).result is None


@real_clock
async def test_stop_leaves_a_thread_behind_that_does_not_return(caplog, monkeypatch):
    monkeypatch.setattr(TaskQueue, "GRACE_SECONDS", 0)
    go_on = threading.Event()

    def handle(payload, update_progress):
        go_on.wait(5)

    async with running(handle, drain_seconds=0) as queue:
        task_id = queue.submit(email()).id
        await until(queue, task_id, lambda task: task.status == "running")
    assert queue.get_task(task_id).status == "cancelled"
    assert task_id in caplog.text
    go_on.set()


async def leave_by_timeout(use):
    """One cancel, by asyncio."""
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await use


async def leave_by_two_cancels(use):
    """The second one comes while the queue stops."""
    using = asyncio.create_task(use)
    await asyncio.sleep(1)
    using.cancel()
    await quiet()
    using.cancel()
    with pytest.raises(asyncio.CancelledError):
        await using


async def leave_by_anyio(use):
    """Inside of a cancelled scope of anyio's, each await is cancelled again."""
    with anyio.move_on_after(1):
        await use


@pytest.mark.parametrize(
    "leave", [leave_by_timeout, leave_by_two_cancels, leave_by_anyio]
)
async def test_stop_that_is_cancelled_itself_ends_all_tasks(leave):
    async def handle(payload, update_progress):
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(60)  # it cleans up

    queue = running(handle, max_workers=1, drain_seconds=50)
    watching = []

    async def use():
        async with queue:
            for number in range(3):
                queue.submit(email(str(number)))
            delayed = queue.submit(email("delayed", delay=9)).id
            watching.append(asyncio.create_task(states_of(queue, delayed)))
            await asyncio.sleep(3600)

    await leave(use())
    await quiet()
    assert queue.count(Status.CANCELLED) == 4
    assert watching[0].done()


async def test_stop_puts_all_timers_away(gate):
    """A timer that is set would hold the queue until it fires."""

    async def live():
        async with running(gate, drain_seconds=0) as queue:
            queue.submit(email("runs", timeout=3600))
            queue.submit(email("delayed", delay=86_400))
            await quiet()
            return weakref.ref(queue)

    queue = await live()
    gate.report.clear()
    await quiet()
    gc.collect()
    assert queue() is None


NO_MAIL = TaskSubmission(task_type="send_email", payload={"subject": 1})
CALLS = [
    pytest.param(lambda queue, task_id: queue.submit(email()), id="submit"),
    pytest.param(lambda queue, task_id: queue.submit(NO_MAIL), id="submit a bad one"),
    pytest.param(
        lambda queue, task_id: queue.submit(email(delay=9), None, "key"),
        id="submit again",
    ),
    pytest.param(lambda queue, task_id: queue.cancel(task_id), id="cancel"),
    pytest.param(lambda queue, task_id: queue.get_task(task_id), id="get_task"),
    pytest.param(lambda queue, task_id: queue.list_tasks(), id="list_tasks"),
    pytest.param(lambda queue, task_id: queue.count(Status.PENDING), id="count"),
    pytest.param(lambda queue, task_id: queue.watch(task_id), id="watch"),
    pytest.param(lambda queue, task_id: queue.begin_shutdown(), id="begin_shutdown"),
]


@real_clock
@pytest.mark.parametrize("call", CALLS)
async def test_queue_refuses_another_thread(call, gate):
    async with running(gate) as queue:
        task = queue.submit(email(delay=9), None, "key")
        with pytest.raises(RuntimeError, match="no running event loop"):
            await asyncio.to_thread(call, queue, task.id)
        assert queue.list_tasks() == ([task], 1)
        assert not queue.store.closed


@real_clock
@pytest.mark.parametrize("call", CALLS)
async def test_queue_refuses_another_event_loop(call, gate):
    async def in_another_loop():
        call(queue, task.id)

    async with running(gate) as queue:
        task = queue.submit(email(delay=9), None, "key")
        with pytest.raises(RuntimeError, match="another event loop"):
            await asyncio.to_thread(asyncio.run, in_another_loop())
        assert queue.list_tasks() == ([task], 1)
        assert not queue.store.closed


@real_clock
async def test_join_refuses_another_event_loop(gate):
    async with running(gate) as queue:
        with pytest.raises(RuntimeError, match="another event loop"):
            await asyncio.to_thread(asyncio.run, queue.join())


# -- What callers use ------------------------------------------------------------------


async def test_submit_returns_the_first_snapshot(gate):
    submission = email("a", priority=1, max_retries=2)
    async with running(gate) as queue:
        task = queue.submit(submission, request_id="r-1")
    assert task.task_type == "send_email"
    assert task.priority == 1
    assert task.payload == {"subject": "a"}
    assert task.status == "pending"
    assert task.progress == 0
    assert task.attempt == 0
    assert task.max_retries == 2
    assert task.result is None
    assert task.error is None
    assert task.request_id == "r-1"
    assert task.started_at is None
    assert task.completed_at is None


async def test_submit_says_when_a_delay_will_end(gate):
    async with running(gate) as queue:
        task = queue.submit(email(delay=3600))
        delay = (task.not_before - task.created_at).total_seconds()
        assert delay == pytest.approx(3600, abs=60)
        assert queue.submit(email()).not_before is None


async def test_submit_refuses_a_payload_that_does_not_fit_the_handler(gate):
    async def handle(payload: SendEmailPayload, update_progress):
        await gate(payload, update_progress)

    async with running(handle) as queue:
        submission = TaskSubmission(task_type="send_email", payload={"to": 5})
        with pytest.raises(ValidationError, match="to\n"):
            queue.submit(submission)
        assert queue.store.submitted == 0


# GOTCHA [await-put]
async def test_submit_does_not_await_put_but_says_at_once_that_the_queue_is_full(gate):
    """A bounded asyncio.Queue would let it wait for room."""
    async with running(gate, max_pending=2) as queue:
        first = queue.submit(email(delay=9))
        queue.submit(email(delay=9))
        with pytest.raises(QueueFull):
            queue.submit(email(delay=9))
        queue.cancel(first.id)
        queue.submit(email(delay=9))


async def test_submit_counts_only_what_waits(gate):
    async with running(gate, max_workers=1, max_pending=1) as queue:
        queue.submit(email("runs"))
        await quiet()
        queue.submit(email("waits"))
        with pytest.raises(QueueFull):
            queue.submit(email("one too many"))
        await gate.let_all_go()


async def test_idempotency_key_answers_with_the_task_that_it_has_made(gate):
    async with running(gate) as queue:
        first = queue.submit(email(), idempotency_key="k")
        await quiet()
        second = queue.submit(email(), idempotency_key="k")
        assert second.id == first.id
        assert second.status == "running"
        assert queue.store.submitted == 1


async def test_idempotency_key_is_known_to_a_full_queue_too(gate):
    async with running(gate, max_pending=1) as queue:
        first = queue.submit(email(delay=9), idempotency_key="k")
        assert queue.submit(email(delay=9), idempotency_key="k").id == first.id


async def test_idempotency_key_of_another_task_makes_another_task(gate):
    async with running(gate) as queue:
        first = queue.submit(email(), idempotency_key="k")
        assert queue.submit(email(), idempotency_key="l").id != first.id
        assert queue.submit(email()).id != first.id


@pytest.mark.parametrize(
    "other",
    [
        email("another subject"),
        email(priority=1),
        email(delay=9),
        TaskSubmission(task_type="resize_image", payload={"subject": "it"}),
    ],
    ids=["payload", "priority", "delay", "task type"],
)
async def test_idempotency_key_is_refused_for_another_submission(other, gate):
    async with running(gate) as queue:
        queue.submit(email(), idempotency_key="k")
        with pytest.raises(IdempotencyKeyReused):
            queue.submit(other, idempotency_key="k")


async def test_idempotency_key_does_not_mind_the_order_of_keys(gate):
    """At no depth: clients build objects from hash maps."""
    texts = [
        '{"subject": "it", "rows": [{"a": 1, "b": {"c": 2, "d": 3}}]}',
        '{"rows": [{"b": {"d": 3, "c": 2}, "a": 1}], "subject": "it"}',
    ]
    async with running(gate) as queue:
        tasks = [
            queue.submit(
                TaskSubmission(task_type="send_email", payload=json.loads(text)),
                idempotency_key="k",
            )
            for text in texts
        ]
        assert tasks[0] == tasks[1]


async def test_idempotency_key_does_mind_the_order_of_a_list(gate):
    async with running(gate) as queue:
        queue.submit(
            TaskSubmission(task_type="send_email", payload={"to": [1, 2]}),
            idempotency_key="k",
        )
        with pytest.raises(IdempotencyKeyReused):
            queue.submit(
                TaskSubmission(task_type="send_email", payload={"to": [2, 1]}),
                idempotency_key="k",
            )


async def test_idempotency_key_goes_when_its_task_is_evicted(gate):
    async with running(gate, keep_finished=0) as queue:
        first = queue.submit(email(delay=9), idempotency_key="k")
        queue.cancel(first.id)
        second = queue.submit(email("another", delay=9), idempotency_key="k")
        assert second.id != first.id


async def test_cancel_of_a_waiting_task_is_done_at_once(gate):
    async with running(gate) as queue:
        task = queue.cancel(queue.submit(email(delay=9)).id)
        assert task.status == "cancelled"
        assert task.completed_at is not None
        await asyncio.sleep(10)
        assert gate.started == []


async def test_cancel_of_a_running_task_needs_force(gate):
    async with running(gate) as queue:
        task_id = await bring_to("running", queue, gate)
        with pytest.raises(TaskNotCancellable, match="is running"):
            queue.cancel(task_id)


async def test_cancel_by_force_is_over_once_the_handler_has_let_go():
    async def handle(payload, update_progress):
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(3)

    async with running(handle) as queue:
        task_id = queue.submit(email()).id
        await quiet()
        assert queue.cancel(task_id, force=True).status == "running"
        await asyncio.sleep(2.9)
        assert queue.get_task(task_id).status == "running"
        await asyncio.sleep(0.2)
        assert queue.get_task(task_id).status == "cancelled"


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
async def test_cancel_of_a_finished_task_is_refused(status, force, gate):
    async with running(gate) as queue:
        task_id = await bring_to(status, queue, gate)
        with pytest.raises(TaskNotCancellable, match=f"is {status}"):
            queue.cancel(task_id, force=force)


async def test_cancel_by_force_reaches_a_handler_that_was_taken_away_meanwhile(gate):
    async with running(gate) as queue:
        task_id = await bring_to("running", queue, gate)
        del queue.handlers[TaskType.SEND_EMAIL]
        queue.cancel(task_id, force=True)
        await quiet()
        assert queue.get_task(task_id).status == "cancelled"


async def test_cancel_of_an_unknown_task_is_refused(gate):
    async with running(gate) as queue:
        with pytest.raises(TaskNotFound):
            queue.cancel("no-such-task", force=True)


async def test_join_returns_at_once_when_there_is_nothing_to_do(gate):
    async with running(gate) as queue:
        await queue.join()
        assert now() == 0


async def test_join_waits_for_delays_retries_and_handlers(gate, monkeypatch):
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    loop = asyncio.get_running_loop()
    async with running(gate, backoff_base=4) as queue:
        queue.submit(email(delay=2, max_retries=1))
        loop.call_later(3, gate.let_go, "it", ValueError())
        loop.call_later(9, gate.let_go, "it", "done")
        await queue.join()
        assert now() == pytest.approx(9, abs=0.01)


async def test_join_ends_when_the_queue_stops(gate):
    async with running(gate) as queue:
        queue.submit(email(delay=9))
        joining = asyncio.create_task(queue.join())
        await quiet()
        assert not joining.done()
    await joining


async def test_join_waits_for_what_a_stop_lets_run_on(gate):
    async with running(gate, drain_seconds=5) as queue:
        queue.submit(email("first"))
        queue.submit(email("second"))
        await quiet()
        joining = asyncio.create_task(queue.join())
        asyncio.get_running_loop().call_later(3, gate.let_go, "first")
        asyncio.get_running_loop().call_later(4, gate.let_go, "second")
    await joining
    assert now() == pytest.approx(4, abs=0.01)


async def test_join_is_not_held_up_by_cancelled_tasks(gate):
    async with running(gate, max_workers=1) as queue:
        queue.submit(email("runs"))
        waits = queue.submit(email("waits"))
        await quiet()
        joining = asyncio.create_task(queue.join())
        queue.cancel(waits.id)
        await quiet()
        assert not joining.done()
        gate.let_go("runs")
        await joining
        assert gate.started == ["runs"]


# -- To start a task -------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 3, 7])
async def test_workers_run_as_many_at_once_as_they_may(limit, gate):
    names = [str(number) for number in range(10)]
    async with running(gate, max_workers=limit) as queue:
        for name in names:
            queue.submit(email(name))
        await quiet()
        assert list(gate.held) == names[:limit]
        gate.let_go("0")
        await quiet()
        assert list(gate.held) == names[1 : limit + 1]
        await gate.let_all_go()
        assert gate.started == names


@real_clock
async def test_workers_run_no_more_threads_than_they_may():
    go_on = threading.Event()
    started = []

    def handle(payload, update_progress):
        started.append(payload.subject)
        update_progress(1)
        go_on.wait(5)

    async with running(handle, max_workers=2) as queue:
        task_ids = [queue.submit(email(name)).id for name in "abcd"]
        for task_id in task_ids[:2]:
            await until(queue, task_id, lambda task: task.progress == 1)
        assert sorted(started) == ["a", "b"]
        assert queue.count(Status.RUNNING) == 2
        go_on.set()
        async with asyncio.timeout(5):
            await queue.join()


async def test_workers_start_lower_priorities_first(gate):
    async with running(gate, max_workers=1) as queue:
        queue.submit(email("low", priority=10))
        queue.submit(email("medium", priority=5))
        queue.submit(email("high", priority=1))
        queue.submit(email("high 2", priority=1))
        await gate.let_all_go()
    assert gate.started == ["high", "high 2", "medium", "low"]


# GOTCHA [tie-break]
async def test_workers_tie_break_is_the_order_of_submission(gate):
    async with running(gate, max_workers=1) as queue:
        for name in "abcdefgh":
            queue.submit(email(name))
        await gate.let_all_go()
    assert gate.started == list("abcdefgh")


async def test_workers_tie_break_does_not_look_at_the_clock(gate, monkeypatch):
    """This one runs backwards."""

    class Backwards(datetime):
        """Each time that it is asked, it is a second earlier."""

        seconds = itertools.count(2_000_000_000, -1)

        @classmethod
        def now(cls, zone=None):
            return datetime.fromtimestamp(next(cls.seconds), zone)

    monkeypatch.setattr(taskqueue, "datetime", Backwards)
    async with running(gate, max_workers=1) as queue:
        for name in "abcdefgh":
            queue.submit(email(name))
        await gate.let_all_go()
    assert gate.started == list("abcdefgh")


# GOTCHA [slot-before-get]
async def test_workers_take_a_slot_before_get_so_a_late_high_overtakes_each_low(gate):
    async with running(gate, max_workers=1) as queue:
        for name in ("busy", "low", "low 2"):
            queue.submit(email(name, priority=10))
        await quiet()
        queue.submit(email("late high", priority=1))
        await gate.let_all_go()
    assert gate.started == ["busy", "late high", "low", "low 2"]


async def test_workers_start_a_delayed_task_on_time(gate):
    async with running(gate) as queue:
        queue.submit(email(delay=30))
        await asyncio.sleep(29.9)
        assert list(gate.held) == []
        await asyncio.sleep(0.2)
        assert list(gate.held) == ["it"]


async def test_workers_hold_no_slot_for_a_delayed_task(gate):
    async with running(gate, max_workers=1) as queue:
        queue.submit(email("later", delay=30, priority=1))
        queue.submit(email("now"))
        await quiet()
        assert list(gate.held) == ["now"]


# GOTCHA [backoff-holds-slot]
async def test_workers_backoff_holds_slot_of_nobody(gate, monkeypatch):
    """While one task waits for its next attempt, another runs."""
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    async with running(gate, max_workers=1, backoff_base=8) as queue:
        task_id = queue.submit(email("fails", max_retries=1)).id
        queue.submit(email("waits"))
        await quiet()
        gate.let_go("fails", ValueError())
        await quiet()
        assert queue.get_task(task_id).status == "pending"
        assert list(gate.held) == ["waits"]


async def test_workers_say_when_a_backoff_will_end(gate, monkeypatch):
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    async with running(gate, backoff_base=20) as queue:
        task_id = queue.submit(email(max_retries=1)).id
        await quiet()
        gate.let_go("it", ValueError())
        await quiet()
        task = queue.get_task(task_id)
        backoff = (task.not_before - task.started_at).total_seconds()
        assert backoff == pytest.approx(20, abs=5)


# GOTCHA [retry-keeps-priority]
async def test_workers_retry_keeps_priority_and_place(gate):
    """It has failed, and yet it comes before all that were behind it."""
    async with running(gate, max_workers=1, backoff_base=0) as queue:
        queue.submit(email("medium", priority=5))
        queue.submit(email("high", priority=1, max_retries=1))
        queue.submit(email("high 2", priority=1))
        await quiet()
        gate.let_go("high", ValueError())
        await gate.let_all_go()
    assert gate.started == ["high", "high", "high 2", "medium"]


session = contextvars.ContextVar("session")


# GOTCHA [kept-context]
@pytest.mark.parametrize("delay", [0, 86_400])
async def test_workers_have_no_kept_context_of_who_has_submitted(delay, gate):
    """A day is long, for a database session that nobody needs any more."""
    sessions = []

    async def request():
        session.set(Image())
        sessions.append(weakref.ref(session.get()))
        queue.submit(email(delay=delay))

    async with running(gate, max_workers=1, drain_seconds=0) as queue:
        queue.submit(email("busy"))
        await quiet()
        await asyncio.create_task(request())
        await quiet()
        gc.collect()
        assert sessions[0]() is None


# GOTCHA [lazy-cancel]
async def test_workers_lazy_cancel_does_not_run_the_cancelled(gate):
    async with running(gate, max_workers=1) as queue:
        queue.submit(email("first"))
        cancelled = queue.submit(email("cancelled", priority=1)).id
        queue.submit(email("second"))
        queue.cancel(cancelled)
        await gate.let_all_go()
    assert gate.started == ["first", "second"]


async def test_workers_lazy_cancel_does_not_count_the_cancelled(gate):
    async with running(gate, max_workers=1, max_pending=1) as queue:
        queue.submit(email("busy"))
        await quiet()
        for _ in range(3):
            queue.cancel(queue.submit(email("cancelled")).id)
        queue.submit(email("last"))
        await gate.let_all_go()
    assert gate.started == ["busy", "last"]


async def test_workers_lazy_cancel_does_not_fill_the_memory(gate):
    """All workers are busy, so nobody takes the cancelled out of the heap."""
    async with running(gate, max_workers=1, keep_finished=0) as queue:
        queue.submit(email("busy"))
        await quiet()
        for delay in (0, 9) * 500:
            queue.cancel(queue.submit(email("cancelled", delay=delay)).id)
        gc.collect()
        records = [each for each in gc.get_objects() if type(each) is TaskRecord]
        assert len(records) < 200


async def test_workers_lazy_cancel_costs_no_more_than_a_submission(gate):
    """However many wait: not each cancel looks through all of them."""
    async with running(gate, max_pending=5000, keep_finished=0) as queue:
        began = time.thread_time()
        ids = [queue.submit(email()).id for _ in range(3000)]
        to_submit = time.thread_time() - began
        began = time.thread_time()
        for task_id in ids[:1000]:
            queue.cancel(task_id)
        to_cancel = time.thread_time() - began
    assert to_cancel < to_submit


async def test_workers_lazy_cancel_keeps_the_order_of_those_that_stay(gate):
    async with running(gate, max_workers=1) as queue:
        queue.submit(email("busy"))
        await quiet()
        doomed = [queue.submit(email("doomed", priority=1)).id for _ in range(300)]
        for name, priority in [("c", 10), ("b", 5), ("d", 10), ("a", 1)]:
            queue.submit(email(name, priority=priority))
        queue.submit(email("later", delay=9))
        for task_id in doomed:
            queue.cancel(task_id)
        await gate.let_all_go()
        assert gate.started == ["busy", "a", "b", "c", "d"]
        await asyncio.sleep(10)
        await gate.let_all_go()
        assert gate.started[-1] == "later"


async def test_workers_lazy_cancel_in_one_turn_loses_nobody(gate):
    """Hundreds come and go before the worker loop has its next turn."""
    async with running(gate, max_workers=1) as queue:
        await quiet()
        doomed = [queue.submit(email("doomed")).id for _ in range(300)]
        queue.submit(email("stays", max_retries=1))
        for task_id in doomed:
            queue.cancel(task_id)
        queue.submit(email("high", priority=1))
        await gate.let_all_go()
        assert sorted(gate.started) == ["high", "stays"]


async def test_workers_lazy_cancel_in_one_turn_starts_nobody_twice(gate, monkeypatch):
    """The same, and then the one that stays waits for its second attempt."""
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    async with running(gate, max_workers=1, backoff_base=8) as queue:
        await quiet()
        queue.submit(email("stays", priority=1, max_retries=1))
        for task_id in [queue.submit(email("doomed")).id for _ in range(300)]:
            queue.cancel(task_id)
        await quiet()
        gate.let_go("stays", ValueError())
        await asyncio.sleep(7)
        assert list(gate.held) == []
        await asyncio.sleep(2)
        assert list(gate.held) == ["stays"]


# GOTCHA [cancel-before-first-step]
@pytest.mark.parametrize("steps", range(6))
async def test_workers_cancel_before_first_step_frees_the_slot(steps, gate):
    """The cancel comes so many steps of the event loop after the submission."""
    async with running(gate, max_workers=1) as queue:
        await quiet()
        task_id = queue.submit(email()).id
        queue.submit(email("next"))
        for _ in range(steps):
            await asyncio.sleep(0)
        queue.cancel(task_id, force=True)
        await quiet()
        assert queue.get_task(task_id).status == "cancelled"
        assert list(gate.held) == ["next"]


# -- To end an attempt -----------------------------------------------------------------


async def test_attempt_notes_when_it_has_begun_and_ended(gate):
    async with running(gate) as queue:
        task = queue.get_task(await bring_to("completed", queue, gate))
    assert task.created_at <= task.started_at <= task.completed_at


async def test_attempts_go_on_until_one_succeeds(monkeypatch):
    started = []

    async def handle(payload, update_progress):
        started.append(round(now(), 3))
        if len(started) < 3:
            raise ValueError("not yet")
        return "at last"

    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    task = await outcome(handle, settings={"backoff_base": 1}, max_retries=5)
    assert task.result == "at last"
    assert task.attempt == 3
    assert started == [0, 1, 3]  # 1 s of backoff, then 2


async def test_attempts_end_with_the_last_retry(gate):
    task = await outcome(
        raising(ValueError("x")), settings={"backoff_base": 0}, max_retries=2
    )
    assert task.status == "failed"
    assert task.attempt == 3


@pytest.mark.parametrize(
    "error",
    [
        taskqueue.DoNotRetry("no such user"),
        ExceptionGroup("two", [ValueError(), taskqueue.DoNotRetry("no such user")]),
        type("NoSuchUser", (taskqueue.DoNotRetry,), {})("no such user"),
    ],
    ids=["alone", "in a group", "a kind of it"],
)
async def test_attempts_end_at_once_with_do_not_retry(error):
    task = await outcome(raising(error), max_retries=5)
    assert task.status == "failed"
    assert task.attempt == 1
    assert "no such user" in task.error


async def test_attempt_ends_at_its_timeout(gate):
    task = await outcome(gate, timeout=2)
    assert task.status == "failed"
    assert task.error == "TimeoutError: no result within 2 s"
    assert now() == pytest.approx(2, abs=0.01)


async def test_attempt_is_tried_again_after_a_timeout(gate):
    task = await outcome(gate, settings={"backoff_base": 0}, timeout=2, max_retries=1)
    assert task.attempt == 2
    assert now() == pytest.approx(4, abs=0.01)


async def test_attempt_can_succeed_after_one_whose_time_was_up(gate):
    async with running(gate, backoff_base=0) as queue:
        task_id = queue.submit(email(timeout=2, max_retries=1)).id
        await asyncio.sleep(3)
        gate.let_go("it", "done")
        task = await until(queue, task_id)
    assert task.status == "completed"
    assert task.attempt == 2


async def test_attempt_has_its_whole_time_again_after_a_retry(gate):
    async with running(gate, backoff_base=0) as queue:
        task_id = queue.submit(email(timeout=10, max_retries=1)).id
        await asyncio.sleep(9)
        gate.let_go("it", ValueError())
        await asyncio.sleep(9)
        assert queue.get_task(task_id).status == "running"
        gate.let_go()
        assert (await until(queue, task_id)).status == "completed"


# GOTCHA [whose-timeout]
async def test_whose_timeout_is_it_if_the_handler_raises_one_itself():
    task = await outcome(raising(TimeoutError("mine")), timeout=5)
    assert task.status == "failed"
    assert task.error.startswith("TimeoutError: mine")


async def let_go_at_once():
    """How a handler can take a CancelledError: as it should."""
    raise asyncio.CancelledError


async def fail_otherwise():
    """It raises something else."""
    raise ValueError("interrupted")


async def return_all_the_same():
    """It swallows it."""


async def take_a_minute():
    """It cleans up first."""
    await asyncio.sleep(60)
    raise asyncio.CancelledError


REACTIONS = pytest.mark.parametrize(
    "react", [let_go_at_once, fail_otherwise, return_all_the_same, take_a_minute]
)


def reacting(react):
    """A handler that waits, and takes the first CancelledError so."""

    async def handle(payload, update_progress):
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await react()

    return handle


@REACTIONS
async def test_whose_timeout_is_it_if_the_time_is_up(react):
    async with running(reacting(react), backoff_base=0) as queue:
        task_id = queue.submit(email(timeout=5, max_retries=1)).id
        await queue.join()
        task = queue.get_task(task_id)
    assert task.status == "failed"
    assert task.attempt == 2
    assert task.error == "TimeoutError: no result within 5 s"


@REACTIONS
async def test_whose_timeout_is_it_if_a_client_cancels(react):
    async with running(reacting(react)) as queue:
        task_id = queue.submit(email(max_retries=1)).id
        await quiet()
        queue.cancel(task_id, force=True)
        await queue.join()
        task = queue.get_task(task_id)
    assert task.status == "cancelled"
    assert task.error is None
    assert task.attempt == 1


@REACTIONS
async def test_whose_timeout_is_it_if_a_client_cancels_after_it(react):
    """A cancel outranks a timeout."""

    async def both():
        queue.cancel(task_id, force=True)
        await react()

    async with running(reacting(both)) as queue:
        task_id = queue.submit(email(timeout=5, max_retries=1)).id
        await queue.join()
        task = queue.get_task(task_id)
    assert task.status == "cancelled"
    assert task.error is None


@REACTIONS
async def test_whose_timeout_is_it_if_the_queue_stops(react):
    async with running(reacting(react), drain_seconds=2) as queue:
        task_id = queue.submit(email(max_retries=1)).id
        await quiet()
    assert queue.get_task(task_id).status == "cancelled"
    assert queue.get_task(task_id).error is None
    await asyncio.sleep(60)


async def test_whose_timeout_is_it_if_nobody_has_asked():
    """A bug of the handler's own, or of a library."""
    task = await outcome(raising(asyncio.CancelledError()))
    assert task.status == "failed"
    assert task.error.startswith("CancelledError")


async def test_terminal_is_final_if_a_cancel_and_a_result_come_in_one_turn(gate):
    async with running(gate) as queue:
        task_id = await bring_to("running", queue, gate)
        watching = asyncio.create_task(states_of(queue, task_id))
        await quiet()
        gate.let_go("it", "done")
        queue.cancel(task_id, force=True)
        statuses = [task.status for task in await watching]
    assert statuses == ["running", "cancelled"]


def swallowing(number):
    """A handler that swallows so many CancelledErrors."""

    async def handle(payload, update_progress):
        for _ in range(number):
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(3600)
        await asyncio.sleep(3600)

    return handle


async def test_cancel_by_force_can_be_asked_for_again():
    async with running(swallowing(2)) as queue:
        task_id = queue.submit(email()).id
        await quiet()
        for _ in range(2):
            queue.cancel(task_id, force=True)
            await quiet()
            assert queue.get_task(task_id).status == "running"
        queue.cancel(task_id, force=True)
        await quiet()
        assert queue.get_task(task_id).status == "cancelled"


async def test_timeout_interrupts_a_handler_again_that_has_swallowed_a_cancel():
    async with running(swallowing(1)) as queue:
        task_id = queue.submit(email(timeout=5)).id
        await quiet()
        queue.cancel(task_id, force=True)
        assert (await until(queue, task_id)).status == "cancelled"
        assert now() == pytest.approx(5, abs=0.01)


async def test_stop_interrupts_a_handler_again_that_has_swallowed_a_cancel(caplog):
    async with running(swallowing(1), drain_seconds=5) as queue:
        task_id = queue.submit(email()).id
        await quiet()
        queue.cancel(task_id, force=True)
        await quiet()
    assert queue.get_task(task_id).status == "cancelled"
    assert caplog.text == ""  # it was not left behind


@real_clock
async def test_thread_is_asked_to_stop_by_its_next_report():
    """What that raises is no Exception, so that nobody catches it by accident."""
    go_on = threading.Event()
    log = []

    def handle(payload, update_progress):
        update_progress(1)
        go_on.wait(5)
        with contextlib.suppress(Exception):
            update_progress(2)
        log.append("was not stopped")

    async with running(handle) as queue:
        task_id = queue.submit(email()).id
        await until(queue, task_id, lambda task: task.progress == 1)
        assert queue.cancel(task_id, force=True).status == "running"
        go_on.set()
        assert (await until(queue, task_id)).status == "cancelled"
    assert log == []


@real_clock
async def test_thread_keeps_its_slot_until_it_has_returned():
    go_on = threading.Event()

    def handle(payload, update_progress):
        update_progress(1)
        if payload.subject == "first":
            go_on.wait(5)

    async with running(handle, max_workers=1) as queue:
        first = queue.submit(email("first")).id
        second = queue.submit(email("second")).id
        await until(queue, first, lambda task: task.progress == 1)
        queue.cancel(first, force=True)
        for _ in range(10):
            await asyncio.sleep(0)
        assert queue.get_task(first).status == "running"
        assert queue.get_task(second).status == "pending"
        go_on.set()
        assert (await until(queue, first)).status == "cancelled"
        assert (await until(queue, second)).status == "completed"


@real_clock
async def test_thread_is_asked_to_stop_by_its_timeout():
    never = threading.Event()

    def handle(payload, update_progress):
        while not never.wait(0.001):
            update_progress(1)

    task = await outcome(handle, timeout=0.01)
    assert task.status == "failed"
    assert task.error == "TimeoutError: no result within 0.01 s"


@real_clock
async def test_thread_that_returns_too_late_has_failed():
    go_on = threading.Event()

    def handle(payload, update_progress):
        go_on.wait(5)
        return "too late"

    asyncio.get_running_loop().call_later(0.02, go_on.set)
    task = await outcome(handle, timeout=0.01)
    assert task.status == "failed"
    assert task.result is None


# -- All of it together ----------------------------------------------------------------

TASK_FACTORIES = [pytest.param(None, id="lazy")]
if sys.version_info >= (3, 12):
    TASK_FACTORIES.append(pytest.param(asyncio.eager_task_factory, id="eager"))


@pytest.mark.parametrize("factory", TASK_FACTORIES)
async def test_eager_tasks_change_nothing_for_a_handler_that_cancels_itself(factory):
    """Such a task takes its first step inside of create_task()."""

    async def handle(payload, update_progress):
        [task], _ = queue.list_tasks(Status.RUNNING)
        queue.cancel(task.id, force=True)
        await asyncio.sleep(1)
        return "it ran to its end"

    asyncio.get_running_loop().set_task_factory(factory)
    async with running(handle) as queue:
        task_id = queue.submit(email()).id
        await queue.join()
        assert queue.get_task(task_id).status == "cancelled"


@pytest.mark.parametrize("factory", TASK_FACTORIES)
async def test_eager_tasks_give_the_loop_a_turn_between_two_of_ours(factory):
    """Also if each task ends at once and submits the next one."""

    async def successor(payload, update_progress):
        if len(started) < 1_000:
            started.append(queue.submit(email()).id)

    asyncio.get_running_loop().set_task_factory(factory)
    started = []
    begin = now()
    async with running(successor) as queue:
        queue.submit(email())
        await asyncio.sleep(0)
        for _ in range(10):
            await asyncio.sleep(0)
        assert len(started) < 100
        await queue.join()
        assert now() == begin  # it gives up its turn, and no time


@pytest.mark.parametrize("factory", TASK_FACTORIES)
async def test_eager_tasks_change_nothing_at_a_stop(factory, caplog):
    asyncio.get_running_loop().set_task_factory(factory)
    error = ValueError("x")
    async with running(raising(error), backoff_base=100, drain_seconds=0) as queue:
        for _ in range(3):
            queue.submit(email(max_retries=1))
        await quiet()
        caplog.clear()
    assert queue.count(Status.CANCELLED) == 3
    assert caplog.text == ""  # nobody was left behind


@pytest.mark.parametrize("factory", TASK_FACTORIES)
async def test_eager_tasks_change_nothing_for_the_order_and_the_slots(factory, gate):
    asyncio.get_running_loop().set_task_factory(factory)
    async with running(gate, max_workers=2) as queue:
        await quiet()
        for name, priority in [("low", 10), ("high", 1), ("medium", 5)]:
            queue.submit(email(name, priority=priority))
        await quiet()
        assert len(gate.held) == 2
        await gate.let_all_go()
        assert gate.started == ["high", "medium", "low"]


async def test_payloads_are_held_as_the_text_that_they_were(gate):
    """As Python lists these 20 would take 25 MB."""
    text = "[" + ",".join(["[]"] * 21_000) + "]"
    payload = {"x": json.loads(text)}
    submission = TaskSubmission(task_type="send_email", payload=payload, delay=9)
    async with running(gate) as queue:
        tracemalloc.start()
        for _ in range(20):
            queue.submit(submission)
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert held < 3 * 20 * len(text)


@pytest.mark.parametrize("seed", range(3))
async def test_all_rules_hold_whatever_comes(seed, gate, monkeypatch):
    """200 steps by chance: submit, end, cancel, let time pass."""
    chance = random.Random(seed)
    ended = {}
    monkeypatch.setattr(random, "uniform", chance.uniform)
    settings = {"max_pending": 9, "keep_finished": 9, "backoff_base": 1}
    async with running(gate, **settings) as queue:
        for step in range(200):
            await do_something(queue, gate, chance, str(step))
            tasks, total = queue.list_tasks()
            assert len(tasks) == total
            assert total == queue.store.submitted - queue.store.evicted
            assert queue.count(Status.RUNNING) == len(gate.held)
            assert len(gate.held) <= 3
            for task in tasks:
                assert task.attempt <= task.max_retries + 1
                if task.status in FINAL:  # and then it never changes
                    assert ended.setdefault(task.id, task) == task
        while queue.count(Status.PENDING) + queue.count(Status.RUNNING) > 0:
            await gate.let_all_go()
            await asyncio.sleep(1)
    assert {task.status for task in ended.values()} == FINAL


async def do_something(queue, gate, chance, name):
    """One step of the test above."""
    tasks, _ = queue.list_tasks()
    match chance.choice(["submit", "submit", "end", "cancel", "wait"]):
        case "submit":
            with contextlib.suppress(QueueFull):
                queue.submit(
                    email(
                        name,
                        priority=chance.choice([1, 5, 10]),
                        delay=chance.choice([0, 0, 3]),
                        timeout=chance.randint(1, 20),
                        max_retries=chance.randint(0, 2),
                    )
                )
        case "end" if gate.held:
            result = chance.choice(["done", ValueError("x")])
            gate.let_go(chance.choice(list(gate.held)), result)
        case "cancel" if tasks:
            with contextlib.suppress(TaskNotCancellable):
                queue.cancel(chance.choice(tasks).id, force=chance.random() < 0.5)
        case "wait":
            await asyncio.sleep(chance.uniform(0, 3))
    await quiet()


# ===== Middleware =====================================================================
# What all requests have in common: an id, a line in the log, a place in the metrics,
# a limit for the body.


@pytest.mark.parametrize("sent", ["abc-1_2.Z", "x" * 64])
async def test_a_sane_request_id_is_kept(sent):
    async with serving() as (client, _):
        answer = await client.get("/health", headers={"X-Request-ID": sent})
    assert answer.headers.get_list("X-Request-ID") == [sent]


@pytest.mark.parametrize("sent", ["", "x" * 65, "a b", "é", "a\nb", "a\x1b[2J"])
async def test_another_request_id_is_replaced_by_one_of_ours(sent):
    async with serving() as (client, _):
        answer = await client.get("/health", headers={"X-Request-ID": sent.encode()})
    assert re.fullmatch("[0-9a-f]{16}", answer.headers["X-Request-ID"])


async def test_each_request_without_an_id_gets_one_of_its_own():
    async with serving() as (client, _):
        first = await client.get("/health")
        second = await client.get("/health")
    assert first.headers["X-Request-ID"] != second.headers["X-Request-ID"]


@pytest.mark.parametrize(
    "call",
    [
        "GET /",
        "GET /docs",
        "GET /openapi.json",
        "GET /metrics",
        "POST /tasks",
        "PUT /tasks",
        "GET /tasks?limit=0",
        "DELETE /tasks/unknown",
        "GET /tasks/unknown/stream",
        "GET /nothing",
    ],
)
async def test_every_answer_has_the_request_id(call):
    async with serving() as (client, _):
        answer = await client.request(*call.split(), headers={"X-Request-ID": "r-1"})
    assert answer.headers["X-Request-ID"] == "r-1"


async def test_a_stream_has_the_request_id(gate):
    async with serving(gate) as (client, queue):
        task_id = await bring_to("completed", queue, gate)
        path = f"/tasks/{task_id}/stream"
        answer = await client.get(path, headers={"X-Request-ID": "r-1"})
    assert answer.headers["X-Request-ID"] == "r-1"


async def test_a_task_has_the_request_id_of_its_submission(gate):
    async with serving(gate) as (client, _):
        body = {"task_type": "send_email"}
        headers = {"X-Request-ID": "r-1"}
        answer = await client.post("/tasks", json=body, headers=headers)
    assert answer.json()["request_id"] == "r-1"


async def test_the_log_has_the_request_id_in_what_it_says_of_a_task(gate, caplog):
    caplog.set_level(logging.INFO, "taskqueue")
    async with serving(gate) as (client, _):
        body = {"task_type": "send_email", "payload": {"subject": "it"}}
        await client.post("/tasks", json=body, headers={"X-Request-ID": "r-1"})
        await quiet()
        gate.let_go()
        await quiet()
    assert "[r-1] task " in caplog.messages[-1]


async def test_the_log_has_a_line_for_each_request(caplog):
    caplog.set_level(logging.INFO, "taskqueue")
    async with serving() as (client, _):
        await client.get("/health", headers={"X-Request-ID": "r-1"})
    assert re.fullmatch(r"\[r-1\] GET /health 200 \d+\.\d ms", caplog.messages[0])


async def test_forged_log_lines_cannot_be_made_by_a_path(caplog):
    caplog.set_level(logging.INFO, "taskqueue")
    async with serving() as (client, _):
        await client.get("/x%0A2030-01-01%20forged")
    assert "GET /x\\n2030-01-01 forged 404" in caplog.messages[0]


@pytest.mark.parametrize("character", ["\r", "\x1b", "\u2028", "\x85", "\ud800"])
async def test_forged_log_lines_cannot_be_made_by_an_odd_character(character, caplog):
    """Some viewers take these for a line break, or for a command to the terminal."""
    caplog.set_level(logging.INFO, "taskqueue")
    async with serving() as (client, _):
        request = Stream(client.app, "/x")
        request.scope["path"] = f"/x{character}forged"
        async with request:
            await quiet()
    assert character not in caplog.text


async def test_forged_log_lines_cannot_be_made_by_a_method(caplog):
    caplog.set_level(logging.INFO, "taskqueue")
    async with serving() as (client, _):
        await client.request("GET\nforged", "/x")
    assert "GET\\nFORGED /x 404" in caplog.messages[0]


async def test_forged_log_lines_cannot_be_made_by_a_request_id(caplog):
    caplog.set_level(logging.INFO, "taskqueue")
    async with serving() as (client, _):
        await client.get("/health", headers={"X-Request-ID": b"a\nforged"})
    assert "forged" not in caplog.text


async def test_a_long_path_is_cut_in_the_log(caplog):
    caplog.set_level(logging.INFO, "taskqueue")
    async with serving() as (client, _):
        await client.get("/" + "x" * 5000)
    assert len(caplog.messages[0]) < 300


async def test_metrics_count_each_answer_by_its_status():
    async with serving() as (client, _):
        await client.get("/health")
        await client.get("/health")
        await client.get("/tasks/unknown")
        numbers = (await client.get("/metrics")).json()
    assert numbers["total_requests"] == 3
    assert numbers["status_counts"] == {"200": 2, "404": 1}


async def test_metrics_give_the_average_in_milliseconds(monkeypatch):
    async def slow():
        await asyncio.sleep(0.2)

    async with serving() as (client, _):
        monkeypatch.setattr(taskqueue.time, "perf_counter", now)
        client.app.add_api_route("/slow", slow)
        await client.get("/slow")
        await client.get("/health")
        numbers = (await client.get("/metrics")).json()
    assert numbers["avg_duration_ms"] == pytest.approx(100, abs=0.1)


def test_metrics_round_the_average_to_a_thousandth():
    metrics = taskqueue.Metrics()
    metrics.record("GET", "/tasks", 200, 2.0)
    assert metrics.as_json()["avg_duration_ms"] == 2000
    metrics.record("GET", "/tasks", 200, 0)
    metrics.record("GET", "/tasks", 200, 0)
    assert metrics.as_json()["avg_duration_ms"] == 666.667


async def test_metrics_before_the_first_request_are_zero():
    async with serving() as (client, _):
        numbers = (await client.get("/metrics")).json()
    assert numbers["total_requests"] == 0
    assert numbers["avg_duration_ms"] == 0


async def samples_of(client):
    """The metrics in the text format: a dict from sample to value."""
    answer = await client.get("/metrics", headers={"Accept": "text/plain"})
    samples = {}
    for line in answer.text.splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            samples[name] = float(value)
    return samples


async def series_of(client):
    """The labels of all series for which the metrics count requests."""
    samples = await samples_of(client)
    names = [name for name in samples if "request_seconds_count" in name]
    return {name.partition("{")[2].rstrip("}") for name in names}


# GOTCHA [raw-path-labels]
async def test_metrics_raw_path_labels_are_not_used_for_tasks():
    async with serving() as (client, _):
        for number in range(3):
            await client.get(f"/tasks/{number}")
        series = await series_of(client)
    assert series == {'method="GET",route="/tasks/{task_id}",status="404"'}


async def test_metrics_raw_path_labels_are_not_used_for_what_a_scanner_tries():
    async with serving() as (client, _):
        for number in range(3):
            await client.get(f"/admin/{number}")
        series = await series_of(client)
    assert series == {'method="GET",route="(none)",status="404"'}


async def test_metrics_raw_path_labels_are_not_used_for_methods_either():
    async with serving() as (client, _):
        for number in range(3):
            await client.request(f"BREW{number}", "/admin")
        series = await series_of(client)
    assert series == {'method="OTHER",route="(none)",status="404"'}


@pytest.mark.parametrize(
    "method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
)
async def test_metrics_count_each_known_method_by_its_name(method):
    async with serving() as (client, _):
        await client.request(method, "/nothing")
        series = await series_of(client)
    assert series == {f'method="{method}",route="(none)",status="404"'}


# GOTCHA [stream-latency]
async def test_metrics_stream_latency_ends_with_the_first_byte(gate, monkeypatch):
    async with serving(gate) as (client, queue):
        task_id = await bring_to("running", queue, gate)
        monkeypatch.setattr(taskqueue.time, "perf_counter", now)
        async with Stream(client.app, f"/tasks/{task_id}/stream") as stream:
            await stream.next()
            await asyncio.sleep(60)
        numbers = (await client.get("/metrics")).json()
    assert numbers["total_requests"] == 1
    assert numbers["avg_duration_ms"] < 1


@contextlib.asynccontextmanager
async def serving_a_bug():
    """An app with a route that raises."""

    async def broken():
        raise RuntimeError("a bug")

    async with serving() as (client, queue):
        client.app.add_api_route("/broken", broken)
        yield client, queue


# GOTCHA [unhandled-is-500]
async def test_unhandled_is_500_with_a_detail_and_an_id():
    async with serving_a_bug() as (client, _):
        answer = await client.get("/broken", headers={"X-Request-ID": "r-1"})
    assert answer.json() == {"detail": "Internal Server Error"}
    assert answer.headers["X-Request-ID"] == "r-1"


async def test_unhandled_is_500_also_for_a_model_of_ours_that_is_wrong():
    """Only the model of a payload tells of a client's mistake."""

    async def broken():
        Settings(max_workers=0)

    async with serving() as (client, _):
        client.app.add_api_route("/broken", broken)
        answer = await client.get("/broken")
    assert answer.status_code == 500


async def test_unhandled_is_500_and_forges_no_line_of_the_log(caplog):
    async def broken():
        raise RuntimeError("x\nforged")

    async with serving() as (client, _):
        client.app.add_api_route("/broken", broken)
        await client.get("/broken")
    assert "\nforged" not in caplog.text


async def test_unhandled_is_500_in_the_metrics():
    async with serving_a_bug() as (client, _):
        await client.get("/broken")
        series = await series_of(client)
    assert series == {'method="GET",route="/broken",status="500"'}


async def test_unhandled_is_500_and_the_log_has_its_traceback(caplog):
    async with serving_a_bug() as (client, _):
        await client.get("/broken", headers={"X-Request-ID": "r-1"})
    assert "[r-1] unhandled exception" in caplog.text
    assert "RuntimeError: a bug" in caplog.text


async def test_unhandled_is_500_only_before_the_answer_has_begun():
    """After that only the server can say that something is wrong: it cuts it off."""

    async def broken(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("a bug")

    async def send(message):
        sent.append(message["status"])

    sent = []
    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    middleware = taskqueue.RequestMiddleware(
        broken, taskqueue.Metrics(), Settings(max_body=9)
    )
    with pytest.raises(RuntimeError, match="a bug"):
        await middleware(scope, None, send)
    assert sent == [200]


async def test_an_answer_without_any_header_gets_its_id():
    """ASGI lets an app leave out the headers of its answer."""

    async def bare(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})

    async def send(message):
        sent.append(Headers(scope=message))

    sent = []
    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    middleware = taskqueue.RequestMiddleware(bare, taskqueue.Metrics(), Settings())
    await middleware(scope, None, send)
    assert sent[0]["X-Request-ID"] == scope["state"]["request_id"]


# GOTCHA [base-http-middleware]
async def test_base_http_middleware_is_not_in_the_way():
    """A route runs in the very asyncio task in which the server calls the app."""

    async def which_task():
        seen.append(asyncio.current_task())

    seen = []
    async with serving() as (client, _):
        client.app.add_api_route("/which", which_task)
        await client.get("/which")
    assert seen == [asyncio.current_task()]


async def test_what_is_no_http_request_is_passed_on_untouched():
    async def inner(*arguments):
        seen.append(arguments)

    seen = []
    middleware = taskqueue.RequestMiddleware(
        inner, taskqueue.Metrics(), Settings(max_body=9)
    )
    await middleware({"type": "websocket"}, "receive", "send")
    assert seen == [({"type": "websocket"}, "receive", "send")]


JSON_TYPE = {"Content-Type": "application/json"}
FINE = b'{"task_type": "send_email"}'


async def test_a_cookie_is_not_even_looked_at(gate):
    """To unquote one of 64 KB takes seconds in some versions of Python."""

    async def cookies_of(request: Request):
        return request.cookies

    async with serving(gate) as (client, _):
        client.app.add_api_route("/cookies", cookies_of)
        answer = await client.get("/cookies", headers={"Cookie": 'a="b"'})
    assert answer.json() == {}


async def test_a_body_over_the_limit_is_413_and_the_limit_is_named():
    async with serving(max_body=100) as (client, _):
        answer = await client.post("/tasks", content=b" " * 101, headers=JSON_TYPE)
    assert answer.status_code == 413
    assert "100 bytes" in answer.json()["detail"]


async def test_a_body_of_just_the_limit_is_taken(gate):
    async with serving(gate, max_body=100) as (client, _):
        content = FINE.ljust(100)
        answer = await client.post("/tasks", content=content, headers=JSON_TYPE)
    assert answer.status_code == 202


async def test_a_body_that_comes_in_chunks_is_read_no_further_than_the_limit():
    async def chunks():
        for number in range(1000):
            taken.append(number)
            yield b" " * 10

    taken = []
    async with serving(max_body=100) as (client, _):
        answer = await client.post("/tasks", content=chunks(), headers=JSON_TYPE)
    assert answer.status_code == 413
    assert len(taken) == 11


async def test_a_stream_ignores_a_large_body_that_nobody_asked_for(gate):
    async with serving(gate, max_body=100) as (client, queue):
        task_id = await bring_to("completed", queue, gate)
        path = f"/tasks/{task_id}/stream"
        answer = await client.request("GET", path, content=b" " * 101)
    assert answer.status_code == 200


async def test_a_body_is_no_longer_measured_once_the_answer_has_begun():
    """An app may answer before it has read a body. Then there is no 413 to send."""

    async def answer_first(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        read.append(await receive())
        await send({"type": "http.response.body", "body": b"fine"})

    async def receive():
        return {"type": "http.request", "body": b" " * 101}

    async def send(message):
        sent.append(message["type"])

    read = []
    sent = []
    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    settings = Settings(max_body=100)
    middleware = taskqueue.RequestMiddleware(
        answer_first, taskqueue.Metrics(), settings
    )
    await middleware(scope, receive, send)
    assert len(read[0]["body"]) == 101
    assert sent == ["http.response.start", "http.response.body"]


async def test_a_list_ignores_a_large_body_that_nobody_asked_for(gate):
    async with serving(gate, max_body=100) as (client, _):
        answer = await client.request("GET", "/tasks", content=b" " * 101)
    assert answer.json() == {"tasks": [], "total": 0}


# ===== Routes =========================================================================
# The contract, call by call: what goes well, and what is refused.


async def post_email(client, **fields):
    """Submit an e-mail over HTTP."""
    return await client.post("/tasks", json={"task_type": "send_email", **fields})


async def test_submit_answers_202_with_the_task(gate):
    async with serving(gate) as (client, queue):
        answer = await post_email(client)
        task = queue.get_task(answer.json()["id"])
    assert answer.status_code == 202
    assert answer.json() == task.model_dump(mode="json")


async def test_submit_shows_each_field_of_the_contract(gate):
    async with serving(gate) as (client, _):
        answer = await post_email(client)
    assert set(answer.json()) == {
        "id",
        "task_type",
        "priority",
        "payload",
        "status",
        "progress",
        "attempt",
        "max_retries",
        "result",
        "error",
        "request_id",
        "created_at",
        "not_before",
        "started_at",
        "completed_at",
    }


async def test_submit_shows_the_payload_as_it_was_sent(gate):
    payload = {"subject": "Hi", "further": [1, None, {"é": "\u2028"}]}
    async with serving(gate) as (client, _):
        answer = await post_email(client, payload=payload)
    assert answer.json()["payload"] == payload


async def test_submit_has_defaults(gate):
    async with serving(gate) as (client, _):
        task = (await post_email(client)).json()
    assert task["payload"] == {}
    assert task["priority"] == 5


async def test_submit_tells_times_in_utc(gate):
    async with serving(gate) as (client, _):
        task = (await post_email(client, delay=60)).json()
    created_at = datetime.fromisoformat(task["created_at"])
    not_before = datetime.fromisoformat(task["not_before"])
    assert created_at.tzinfo == UTC
    assert (not_before - created_at).total_seconds() == pytest.approx(60, abs=1)


async def test_submit_says_where_the_task_is(gate):
    async with serving(gate) as (client, _):
        answer = await post_email(client)
    assert answer.headers["Location"] == f"/tasks/{answer.json()['id']}"


async def test_submit_says_where_the_task_is_behind_a_prefix(gate):
    async with serving(gate) as (client, _):
        transport = httpx.ASGITransport(client.app, root_path="/proxy/8000")
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as user:
            answer = await post_email(user)
    assert answer.headers["Location"] == f"/proxy/8000/tasks/{answer.json()['id']}"


@pytest.mark.parametrize("status", list(Status))
async def test_get_shows_a_task_in_every_state(status, gate):
    async with serving(gate) as (client, queue):
        task_id = await bring_to(status, queue, gate)
        answer = await client.get(f"/tasks/{task_id}")
    assert answer.status_code == 200
    assert answer.json()["status"] == status


async def test_get_shows_the_result(gate):
    async with serving(gate) as (client, queue):
        task_id = await bring_to("completed", queue, gate)
        task = (await client.get(f"/tasks/{task_id}")).json()
    assert task["result"] == "done"
    assert task["error"] is None


async def test_get_shows_the_error(gate):
    async with serving(gate) as (client, queue):
        task_id = await bring_to("failed", queue, gate)
        task = (await client.get(f"/tasks/{task_id}")).json()
    assert task["error"].startswith("ValueError: broken")
    assert task["result"] is None


@pytest.mark.parametrize("query", ["", "?force=false", "?force=true"])
async def test_delete_cancels_a_waiting_task(query, gate):
    async with serving(gate) as (client, queue):
        task_id = await bring_to("pending", queue, gate)
        answer = await client.delete(f"/tasks/{task_id}{query}")
        task = queue.get_task(task_id)
    assert answer.json() == {"detail": "Task cancelled", "task_id": task_id}
    assert answer.status_code == 200
    assert task.status == "cancelled"


async def test_delete_by_force_asks_a_running_task_to_stop(gate):
    async with serving(gate) as (client, queue):
        task_id = await bring_to("running", queue, gate)
        answer = await client.delete(f"/tasks/{task_id}?force=true")
    assert answer.status_code == 202
    assert answer.json() == {"detail": "Cancellation requested", "task_id": task_id}


async def test_delete_by_force_ends_a_task_once_its_handler_has_let_go(gate):
    async with serving(gate) as (client, queue):
        task_id = await bring_to("running", queue, gate)
        await client.delete(f"/tasks/{task_id}?force=true")
        at_once = queue.get_task(task_id).status
        await quiet()
        assert at_once == "running"
        assert queue.get_task(task_id).status == "cancelled"


async def test_delete_by_force_again_interrupts_the_handler_again():
    async def swallows_one(payload, update_progress):
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(3600)
        await asyncio.sleep(3600)

    async with serving(swallows_one) as (client, queue):
        task_id = queue.submit(email()).id
        await quiet()
        for _ in range(2):
            assert queue.get_task(task_id).status == "running"
            await client.delete(f"/tasks/{task_id}?force=true")
            await quiet()
        assert queue.get_task(task_id).status == "cancelled"


@pytest.mark.parametrize("status", ["running", "completed", "failed", "cancelled"])
async def test_delete_names_the_status_that_forbids_it(status, gate):
    async with serving(gate) as (client, queue):
        task_id = await bring_to(status, queue, gate)
        answer = await client.delete(f"/tasks/{task_id}")
    assert answer.status_code == 409
    assert status in answer.json()["detail"].partition(":")[0]


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
async def test_delete_by_force_does_not_change_an_end(status, gate):
    async with serving(gate) as (client, queue):
        task_id = await bring_to(status, queue, gate)
        before = queue.get_task(task_id)
        answer = await client.delete(f"/tasks/{task_id}?force=true")
        assert answer.status_code == 409
        assert queue.get_task(task_id) == before


def ids_of(answer):
    """The ids in a list of tasks, in its order."""
    return [task["id"] for task in answer.json()["tasks"]]


async def test_list_shows_the_newest_first(gate):
    async with serving(gate) as (client, queue):
        ids = [queue.submit(email(str(number))).id for number in range(5)]
        answer = await client.get("/tasks")
    assert ids_of(answer) == ids[::-1]


@pytest.mark.parametrize("status", ["completed", "failed", "pending"])
async def test_list_shows_each_task_as_it_is_shown_alone(status, gate):
    async with serving(gate) as (client, queue):
        task_id = await bring_to(status, queue, gate)
        alone = await client.get(f"/tasks/{task_id}")
        answer = await client.get("/tasks")
    assert answer.json() == {"tasks": [alone.json()], "total": 1}


async def test_list_of_nasty_payloads_costs_little(gate):
    """They are not parsed and encoded anew."""
    payload = {"x": [[]] * 20_000}
    text = json.dumps(payload)
    anew = 30 * seconds_of_work(lambda: json.dumps(json.loads(text)))
    async with serving(gate) as (client, queue):
        submission = TaskSubmission(task_type="send_email", payload=payload, delay=60)
        for _ in range(30):
            queue.submit(submission)
        seconds = []
        for _ in range(3):
            began = time.thread_time()
            answer = await client.get("/tasks")
            seconds.append(time.thread_time() - began)
    assert len(answer.content) > 30 * 60_000
    assert min(seconds) < anew / 2  # the least of three, as on the other side


async def test_list_waits_for_its_reader_after_each_piece(gate):
    """So a client that doesn't read holds one piece, and not the whole page."""
    async with serving(gate) as (client, queue):
        for _ in range(20):
            queue.submit(email("x" * 60_000, delay=60))
        async with Stream(client.app, "/tasks") as stream:
            stream.reading.clear()
            await quiet()
            stream.reading.set()
            await quiet()
            sizes = [len(m.get("body", b"")) for m in stream.messages._queue]
    assert sum(sizes) > 1_200_000
    assert max(sizes) < 130_000


async def test_list_gives_others_a_turn_after_each_piece(gate):
    async with serving(gate) as (client, queue):
        for _ in range(6):
            queue.submit(email("x" * 60_000, delay=60))
        async with Stream(client.app, "/tasks") as stream:
            await stream.messages.get()  # the head
            for _ in range(3):
                await stream.messages.get()
                assert stream.messages.empty()


async def test_list_of_small_tasks_is_one_piece_of_json(gate):
    async with serving(gate) as (client, queue):
        for number in range(50):
            queue.submit(email(str(number), delay=60))
        async with Stream(client.app, "/tasks") as stream:
            await quiet()
            head = await stream.messages.get()
            body = await stream.messages.get()
    assert Headers(scope=head)["Content-Type"] == "application/json"
    assert len(strict_json(body["body"])["tasks"]) == 50


async def test_list_by_status_shows_first_what_entered_it_last(gate):
    async with serving(gate) as (client, queue):
        first = queue.submit(email("first")).id
        second = queue.submit(email("second")).id
        await quiet()
        gate.let_go("second")
        await quiet()
        gate.let_go("first")
        await quiet()
        answer = await client.get("/tasks?status=completed")
    assert ids_of(answer) == [first, second]


async def test_list_total_counts_every_match(gate):
    async with serving(gate, max_workers=1) as (client, queue):
        for number in range(5):
            queue.submit(email(str(number)))
        await quiet()
        answer = await client.get("/tasks?status=pending&limit=2")
    assert len(ids_of(answer)) == 2
    assert answer.json()["total"] == 4


async def test_list_gives_pages(gate):
    async with serving(gate) as (client, queue):
        ids = [queue.submit(email(delay=9)).id for _ in range(5)]
        answer = await client.get("/tasks?limit=2&offset=1")
    assert ids_of(answer) == [ids[3], ids[2]]


async def test_list_gives_100_unless_it_is_told_otherwise(gate):
    async with serving(gate) as (client, queue):
        ids = [queue.submit(email(delay=9)).id for _ in range(102)]
        answer = await client.get("/tasks")
    assert ids_of(answer) == ids[:1:-1]


@pytest.mark.parametrize("query", ["offset=5", f"offset={10**100}", "status=failed"])
async def test_list_may_be_empty(query, gate):
    async with serving(gate) as (client, queue):
        queue.submit(email(delay=9))
        answer = await client.get(f"/tasks?{query}&limit=1000")
    assert answer.json()["tasks"] == []


async def test_list_leaves_out_what_was_evicted(gate):
    async with serving(gate, keep_finished=0) as (client, queue):
        queue.cancel(queue.submit(email(delay=9)).id)
        answer = await client.get("/tasks")
    assert answer.json() == {"tasks": [], "total": 0}


# -- Idempotency-Key -------------------------------------------------------------------


async def post_with_key(client, key, text='{"task_type": "send_email", "delay": 9}'):
    """Submit this JSON text with an Idempotency-Key."""
    headers = {"Idempotency-Key": key, **JSON_TYPE}
    return await client.post("/tasks", content=text, headers=headers)


async def test_the_same_idempotency_key_gives_the_same_task(gate):
    async with serving(gate) as (client, queue):
        first = await post_with_key(client, "k")
        second = await post_with_key(client, "k")
        assert second.json()["id"] == first.json()["id"]
        assert second.headers["Location"] == first.headers["Location"]
        assert queue.count(Status.PENDING) == 1


async def test_an_idempotency_key_gives_its_task_in_whatever_state_it_is(gate):
    async with serving(gate) as (client, queue):
        first = await post_with_key(client, "k")
        queue.cancel(first.json()["id"])
        second = await post_with_key(client, "k")
    assert second.status_code == 202
    assert second.json()["status"] == "cancelled"


async def test_another_idempotency_key_gives_another_task(gate):
    async with serving(gate) as (client, queue):
        await post_with_key(client, "k")
        await post_with_key(client, "l")
        assert queue.count(Status.PENDING) == 2


async def test_an_idempotency_key_does_not_mind_the_order_of_keys(gate):
    one = '{"task_type": "send_email", "payload": {"a": {"x": 1, "y": 2}, "b": 3}}'
    same = '{"payload": {"b": 3, "a": {"y": 2, "x": 1}}, "task_type": "send_email"}'
    async with serving(gate) as (client, _):
        first = await post_with_key(client, "k", one)
        second = await post_with_key(client, "k", same)
    assert second.json()["id"] == first.json()["id"]


async def test_an_idempotency_key_with_another_body_is_a_422(gate):
    async with serving(gate) as (client, _):
        await post_with_key(client, "k")
        answer = await post_with_key(client, "k", FINE.decode())
    assert answer.status_code == 422
    [problem] = answer.json()["detail"]
    assert problem["type"] == "value_error"
    assert problem["loc"] == ["header", "idempotency-key"]
    assert problem["msg"].startswith("This key came with another submission")


async def test_a_known_idempotency_key_is_answered_by_a_full_queue_too(gate):
    async with serving(gate, max_pending=1) as (client, _):
        await post_with_key(client, "k")
        answer = await post_with_key(client, "k")
    assert answer.status_code == 202


async def test_an_idempotency_key_of_a_refused_task_is_free(gate):
    async with serving(gate, max_pending=1) as (client, queue):
        blocker = queue.submit(email(delay=9))
        await post_with_key(client, "k")
        queue.cancel(blocker.id)
        answer = await post_with_key(client, "k", FINE.decode())
    assert answer.status_code == 202


async def test_an_idempotency_key_goes_with_its_task(gate):
    async with serving(gate, keep_finished=0) as (client, queue):
        first = await post_with_key(client, "k")
        queue.cancel(first.json()["id"])
        second = await post_with_key(client, "k")
    assert second.json()["id"] != first.json()["id"]


@pytest.mark.parametrize("key", ["", "x" * 256])
async def test_an_idempotency_key_has_1_to_255_characters(key):
    async with serving() as (client, _):
        answer = await post_with_key(client, key)
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["header", "idempotency-key"]


# -- The stream of one task ------------------------------------------------------------


@contextlib.asynccontextmanager
async def streaming(gate, status, path="/tasks/{}/stream", last_event_id=None, **more):
    """The task "it" in this status, and a stream of it: yields client, queue, stream.

    `more` are settings.
    """
    async with serving(gate, **more) as (client, queue):
        task_id = await bring_to(status, queue, gate)
        stream = Stream(client.app, path.format(task_id), last_event_id)
        async with stream:
            yield client, queue, stream


async def to_the_end(stream):
    """All frames that are still to come. It must end within a minute."""
    async with asyncio.timeout(60):
        return await stream.rest()


BOTH_STREAMS = pytest.mark.parametrize("path", ["/tasks/{}/stream", "/events"])


async def watchers(client):
    """How many streams are open, as GET /health says."""
    return (await client.get("/health")).json()["watchers"]


def data_of(frames):
    """The data of each frame."""
    return [frame["data"] for frame in frames]


def statuses_of(frames):
    """The status in each frame."""
    return [frame["data"]["status"] for frame in frames]


@pytest.mark.parametrize("status", ["pending", "running"])
async def test_stream_sends_the_current_state_at_once(status, gate):
    async with streaming(gate, status) as (_, _, stream):
        begin = now()
        frame = await stream.next()
        assert frame["data"]["status"] == status
        assert now() == begin


async def test_stream_is_an_event_stream_that_no_cache_keeps(gate):
    async with streaming(gate, "running") as (_, _, stream):
        await stream.next()
    assert stream.headers["Content-Type"].startswith("text/event-stream")
    assert stream.headers["Cache-Control"] == "no-store"


async def test_stream_sends_each_change_as_it_comes(gate):
    async with streaming(gate, "running") as (_, _, stream):
        await stream.next()
        for percent in (10, 20, 30):
            gate.report["it"](percent)
            frame = await stream.next()
            assert frame["data"]["progress"] == percent


async def test_stream_frames_are_named_progress(gate):
    async with streaming(gate, "running") as (_, _, stream):
        frame = await stream.next()
    assert frame["event"] == "progress"
    assert frame["data"] == {"status": "running", "progress": 0, "attempt": 1}


async def test_stream_ends_with_the_result(gate):
    async with streaming(gate, "running") as (_, _, stream):
        await stream.next()
        gate.let_go("it", {"n": 1})
        [end] = data_of(await to_the_end(stream))
    assert end == {
        "status": "completed",
        "progress": 100,
        "attempt": 1,
        "result": {"n": 1},
    }


async def test_stream_ends_with_a_result_that_is_null(gate):
    async with streaming(gate, "running") as (_, _, stream):
        await stream.next()
        gate.let_go("it", None)
        [end] = data_of(await to_the_end(stream))
    assert end["result"] is None


async def test_stream_ends_with_the_error(gate):
    async with streaming(gate, "failed") as (_, _, stream):
        [end] = data_of(await to_the_end(stream))
    assert end["error"].startswith("ValueError: broken")
    assert set(end) == {"status", "progress", "attempt", "error"}


async def test_stream_ends_with_a_cancel(gate):
    async with streaming(gate, "running") as (client, queue, stream):
        await stream.next()
        [task], _ = queue.list_tasks()
        await client.delete(f"/tasks/{task.id}?force=true")
        frames = await to_the_end(stream)
    assert statuses_of(frames) == ["cancelled"]


async def test_stream_ids_grow_with_each_change(gate):
    async with streaming(gate, "running") as (_, _, stream):
        frames = [await stream.next()]
        for percent in (10, 20):
            gate.report["it"](percent)
            frames.append(await stream.next())
        gate.let_go()
        frames += await to_the_end(stream)
    ids = [int(frame["id"]) for frame in frames]
    assert len(ids) == 4
    assert ids == sorted(set(ids))


async def test_stream_shows_a_retry_as_a_new_attempt(gate):
    async with serving(gate, backoff_base=0) as (client, queue):
        task_id = queue.submit(email(max_retries=1)).id
        async with Stream(client.app, f"/tasks/{task_id}/stream") as stream:
            for _ in range(2):
                await quiet()
                gate.report["it"](40)
                gate.let_go("it", ValueError("broken"))
            frames = data_of(await to_the_end(stream))
    places = [(frame["attempt"], frame["progress"]) for frame in frames]
    assert places == sorted(places)
    assert frames[-1]["attempt"] == 2


async def test_stream_sends_exactly_one_end_and_sends_it_last(gate):
    async with serving(gate, backoff_base=0) as (client, queue):
        task_id = queue.submit(email(max_retries=1)).id
        async with Stream(client.app, f"/tasks/{task_id}/stream") as stream:
            for _ in range(2):
                await quiet()
                gate.let_go("it", ValueError("broken"))
            frames = await to_the_end(stream)
    ends = [status in FINAL for status in statuses_of(frames)]
    assert ends.count(True) == 1
    assert ends[-1]


async def test_stream_of_a_finished_task_sends_its_end(gate):
    async with streaming(gate, "completed") as (_, _, stream):
        frames = await to_the_end(stream)
    assert statuses_of(frames) == ["completed"]


async def test_stream_data_is_one_line_whatever_is_in_it(gate):
    async with streaming(gate, "running") as (_, _, stream):
        await stream.next()
        gate.let_go("it", "a\nb\rc\u2028d\x85e\n\nf")
        [end] = data_of(await to_the_end(stream))
    assert end["result"] == "a\nb\rc\u2028d\x85e\n\nf"


# GOTCHA [reconnect-for-ever]
async def test_stream_reconnect_for_ever_is_stopped_with_204(gate):
    async with serving(gate) as (client, queue):
        task_id = await bring_to("failed", queue, gate)
        headers = {"Last-Event-ID": str(queue.get_task(task_id).version)}
        answer = await client.get(f"/tasks/{task_id}/stream", headers=headers)
    assert answer.status_code == 204
    assert answer.content == b""


async def test_stream_reconnect_for_ever_is_not_stopped_before_the_end_is_known(gate):
    async with serving(gate) as (client, queue):
        task_id = await bring_to("failed", queue, gate)
        headers = {"Last-Event-ID": str(queue.get_task(task_id).version - 1)}
        answer = await client.get(f"/tasks/{task_id}/stream", headers=headers)
    assert answer.status_code == 200
    assert answer.text.count("data: ") == 1


async def test_stream_resumes_with_what_is_newer(gate):
    async with serving(gate) as (client, queue):
        task_id = await bring_to("running", queue, gate)
        last = queue.get_task(task_id).version
        async with Stream(client.app, f"/tasks/{task_id}/stream", last) as stream:
            await quiet()
            gate.let_go()
            frames = await to_the_end(stream)
    assert statuses_of(frames) == ["completed"]


JUNK_IDS = ["", "junk", "-1", "0x1", "²", "1e3", " ", "9" * 18, "9" * 19, "9" * 5000]


@pytest.mark.parametrize("junk", JUNK_IDS)
async def test_stream_ignores_a_junk_last_event_id(junk, gate):
    async with streaming(gate, "running", last_event_id=junk) as (_, _, stream):
        frame = await stream.next()
    assert frame["data"]["status"] == "running"


@pytest.mark.parametrize("junk", JUNK_IDS)
async def test_stream_of_a_finished_task_ignores_a_junk_last_event_id(junk, gate):
    async with streaming(gate, "completed", last_event_id=junk) as (_, _, stream):
        frames = await to_the_end(stream)
    assert statuses_of(frames) == ["completed"]


async def test_stream_ignores_a_last_event_id_from_the_future(gate):
    async with serving(gate) as (client, queue):
        task_id = await bring_to("running", queue, gate)
        future = queue.get_task(task_id).version + 1
        async with Stream(client.app, f"/tasks/{task_id}/stream", future) as stream:
            frame = await stream.next()
    assert frame["data"]["status"] == "running"


async def test_stream_slow_reader_gets_the_latest_state_and_no_backlog(gate):
    """It gets what was on its way already, and then how things stand now."""
    async with streaming(gate, "running") as (_, _, stream):
        await stream.next()
        stream.reading.clear()
        for percent in range(1, 51):
            gate.report["it"](percent)
            await quiet()
        stream.reading.set()
        frames = await stream.take(2)
    assert [frame["data"]["progress"] for frame in frames] == [1, 50]


@BOTH_STREAMS
async def test_stream_drops_a_reader_that_has_stopped_reading(path, gate):
    settings = {"send_timeout": 7, "ping_seconds": 60}
    async with streaming(gate, "running", path, **settings) as (client, _, stream):
        await stream.next()
        await asyncio.sleep(1)
        stream.reading.clear()
        gate.report["it"](50)
        await asyncio.sleep(6.9)
        assert await watchers(client) == 1
        await asyncio.sleep(0.2)
        assert await watchers(client) == 0


@pytest.mark.parametrize("messages", [1, 2, 3], ids="after {} of 4".format)
async def test_list_drops_a_reader_that_has_stopped_reading(messages, gate):
    """It would keep all tasks of its page in memory, those that are evicted, too."""

    class Reader(Stream):
        async def send(self, message):
            if self.messages.qsize() == messages:
                self.reading.clear()
            await super().send(message)

    async with serving(gate, send_timeout=7) as (client, queue):
        for _ in range(3):
            payload = {"subject": "x" * 60_000}
            queue.submit(TaskSubmission(task_type="send_email", payload=payload))
        async with Reader(client.app, "/tasks") as stream:
            await asyncio.sleep(6.9)
            assert not stream.call.done()
            await asyncio.sleep(0.2)
            assert stream.call.done()
            assert stream.messages.qsize() == messages


async def test_stream_says_in_the_log_that_it_has_dropped_a_reader(gate, caplog):
    async with streaming(gate, "running", send_timeout=7) as (_, _, stream):
        await stream.next()
        stream.reading.clear()
        gate.report["it"](50)
        await asyncio.sleep(8)
    assert "a reader has stopped reading" in caplog.text


@BOTH_STREAMS
async def test_stream_drops_a_reader_that_does_not_even_read_the_pings(path, gate):
    settings = {"send_timeout": 7, "ping_seconds": 4}
    async with streaming(gate, "running", path, **settings) as (client, _, stream):
        await stream.next()
        stream.reading.clear()
        await asyncio.sleep(12)
        assert await watchers(client) == 0


@BOTH_STREAMS
async def test_stream_forgets_a_reader_that_hangs_up(path, gate):
    async with serving(gate) as (client, queue):
        task_id = await bring_to("running", queue, gate)
        async with Stream(client.app, path.format(task_id)) as stream:
            await stream.next()
            assert await watchers(client) == 1
        assert await watchers(client) == 0


@BOTH_STREAMS
async def test_stream_forgets_a_reader_that_hangs_up_while_it_does_not_read(path, gate):
    async with serving(gate) as (client, queue):
        task_id = await bring_to("running", queue, gate)
        async with Stream(client.app, path.format(task_id)) as stream:
            await stream.next()
            stream.reading.clear()
            gate.report["it"](50)
            await asyncio.sleep(1)
        assert await watchers(client) == 0


@BOTH_STREAMS
async def test_stream_never_entered_leaves_nothing_behind(path, gate):
    """The client has gone before the answer began."""
    async with serving(gate) as (client, queue):
        task_id = await bring_to("running", queue, gate)
        async with Stream(client.app, path.format(task_id)) as stream:
            stream.reading.clear()
            await quiet()
        assert stream.messages.empty()
        assert await watchers(client) == 0


async def test_stream_keeps_an_idle_connection_alive_with_comments(gate):
    async with streaming(gate, "running", ping_seconds=4) as (_, _, stream):
        await stream.next()
        begin = now()
        comment = await stream.next()
        assert now() - begin == pytest.approx(4, abs=0.01)
        assert list(comment) == [""]  # a line that begins with a colon, for nobody


async def test_stream_encodes_a_change_once_however_many_watch(gate, monkeypatch):
    def count_and_dump(task, **options):
        encoded.append(task)
        return dump(task, **options)

    encoded = []
    dump = taskqueue.TaskStatus.model_dump_json
    monkeypatch.setattr(taskqueue.TaskStatus, "model_dump_json", count_and_dump)
    async with streaming(gate, "completed") as (client, _queue, first):
        async with Stream(client.app, first.scope["path"]) as second:
            await first.next()
            await second.next()
    assert len(encoded) == 1


@BOTH_STREAMS
async def test_stream_says_goodbye_when_the_queue_stops(path, gate):
    async with streaming(gate, "running", path) as (_, queue, stream):
        await stream.next()
        queue.begin_shutdown()
        frames = await to_the_end(stream)
    assert frames[-1]["event"] == "shutdown"
    assert "id" not in frames[-1]  # the next life shall not be asked for it


async def test_stream_says_goodbye_to_a_reader_that_knows_everything(gate):
    async with serving(gate) as (client, queue):
        task_id = await bring_to("running", queue, gate)
        last = queue.get_task(task_id).version
        async with Stream(client.app, f"/tasks/{task_id}/stream", last) as stream:
            await quiet()
            queue.begin_shutdown()
            frames = await to_the_end(stream)
    assert [frame["event"] for frame in frames] == ["shutdown"]


async def test_stream_of_a_finished_task_says_no_goodbye(gate):
    async with serving(gate) as (client, queue):
        task_id = await bring_to("completed", queue, gate)
        queue.begin_shutdown()
        answer = await client.get(f"/tasks/{task_id}/stream")
    assert "event: shutdown" not in answer.text


@BOTH_STREAMS
async def test_stream_that_is_opened_while_the_queue_stops_ends_at_once(path, gate):
    async with serving(gate) as (client, queue):
        task_id = await bring_to("running", queue, gate)
        queue.begin_shutdown()
        async with Stream(client.app, path.format(task_id)) as stream:
            frames = await to_the_end(stream)
    assert frames[-1]["event"] == "shutdown"


# -- How it is doing -------------------------------------------------------------------


async def test_health_is_200_while_the_worker_loop_runs():
    async with serving() as (client, _):
        answer = await client.get("/health")
    assert answer.status_code == 200
    assert answer.json()["status"] == "healthy"


async def test_health_is_503_for_a_dead_loop(monkeypatch):
    async def dies(queue):
        raise RuntimeError("a bug")

    monkeypatch.setattr(TaskQueue, "worker_loop", dies)
    async with serving() as (client, _):
        await quiet()
        answer = await client.get("/health")
    assert answer.status_code == 503
    assert answer.json()["status"] == "unhealthy"


async def test_submit_is_503_for_a_dead_loop(monkeypatch):
    async def dies(queue):
        raise RuntimeError("a bug")

    monkeypatch.setattr(TaskQueue, "worker_loop", dies)
    async with serving() as (client, _):
        await quiet()
        answer = await post_email(client)
    assert answer.status_code == 503


async def test_health_shows_the_process():
    async with serving() as (client, _):
        answer = await client.get("/health")
    assert answer.json()["pid"] == os.getpid()


async def test_health_counts_tasks_by_status(gate):
    async with serving(gate) as (client, queue):
        await bring_to("running", queue, gate)
        queue.submit(email(delay=9))
        numbers = (await client.get("/health")).json()
    assert numbers["tasks"] == {
        "pending": 1,
        "running": 1,
        "completed": 0,
        "failed": 0,
        "cancelled": 0,
    }


async def test_health_counts_workers_and_bounds(gate):
    async with serving(gate, max_workers=7, max_pending=8) as (client, queue):
        await bring_to("running", queue, gate)
        numbers = (await client.get("/health")).json()
    assert numbers["workers"] == 7
    assert numbers["busy"] == 1
    assert numbers["max_pending"] == 8


async def test_health_counts_what_was_submitted_and_evicted(gate):
    async with serving(gate, keep_finished=0) as (client, queue):
        queue.cancel(queue.submit(email(delay=9)).id)
        numbers = (await client.get("/health")).json()
    assert numbers["submitted"] == 1
    assert numbers["evicted"] == 1


async def test_health_tells_one_life_from_the_next():
    async with serving() as (client, _):
        first = (await client.get("/health")).json()["life"]
    async with serving() as (client, _):
        second = (await client.get("/health")).json()["life"]
    assert first < second


async def test_metrics_have_the_queue_in_numbers():
    async with serving() as (client, _):
        numbers = (await client.get("/metrics")).json()
        health = (await client.get("/health")).json()
    assert numbers["queue"].items() <= health.items()


@pytest.mark.parametrize(
    "accept",
    [None, "*/*", "application/json", "application/json, text/plain, */*", "text/html"],
)
async def test_metrics_are_json_unless_text_is_asked_for(accept):
    headers = {}
    if accept is not None:
        headers["Accept"] = accept
    async with serving() as (client, _):
        answer = await client.get("/metrics", headers=headers)
    assert answer.headers["Content-Type"] == "application/json"


@pytest.mark.parametrize(
    "accept",
    [
        "text/plain",
        "application/openmetrics-text",
        "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;q=0.4,*/*;q=0.1",
    ],
)
async def test_metrics_are_text_for_prometheus(accept):
    async with serving() as (client, _):
        answer = await client.get("/metrics", headers={"Accept": accept})
    kind = "text/plain; version=0.0.4; charset=utf-8"
    assert answer.headers["Content-Type"] == kind


@pytest.mark.parametrize("accept", ["application/json", "text/plain"])
async def test_metrics_tell_caches_that_there_are_two_formats(accept):
    async with serving() as (client, _):
        answer = await client.get("/metrics", headers={"Accept": accept})
    assert answer.headers["Vary"] == "Accept"


async def prometheus_lines(client):
    """The metrics in the text format, line by line. It must end with a line break."""
    await client.get("/health")
    text = (await client.get("/metrics", headers={"Accept": "text/plain"})).text
    assert text.endswith("\n")
    return text.removesuffix("\n").split("\n")


async def test_metrics_text_says_of_each_metric_what_it_is():
    """HELP, TYPE, and its samples after them: so Prometheus wants it."""
    async with serving() as (client, _):
        lines = await prometheus_lines(client)
    helped = [line.split()[2] for line in lines if line.startswith("# HELP ")]
    types = dict(line.split()[2:] for line in lines if line.startswith("# TYPE "))
    assert types == {
        "taskqueue_http_request_seconds": "summary",
        "taskqueue_tasks": "gauge",
    }
    assert helped == list(types)


async def test_metrics_text_has_each_sample_below_its_type():
    async with serving() as (client, _):
        lines = await prometheus_lines(client)
    metric = None
    for line in lines:
        if line.startswith("# TYPE "):
            metric = line.split()[2]
        if not line.startswith("#"):
            name = re.fullmatch(r'(\w+)(\{(\w+="[^"\\]*",?)*\})? [0-9.]+', line)[1]
            assert name.removesuffix("_sum").removesuffix("_count") == metric


async def test_metrics_text_has_the_seconds_of_each_route(monkeypatch):
    async def slow():
        await asyncio.sleep(0.2)

    async with serving() as (client, _):
        monkeypatch.setattr(taskqueue.time, "perf_counter", now)
        client.app.add_api_route("/slow", slow)
        await client.get("/slow")
        await client.get("/slow")
        samples = await samples_of(client)
    labels = '{method="GET",route="/slow",status="200"}'
    name = "taskqueue_http_request_seconds"
    assert samples[f"{name}_sum{labels}"] == pytest.approx(0.4, abs=0.001)
    assert samples[f"{name}_count{labels}"] == 2


async def test_metrics_text_counts_the_tasks(gate):
    async with serving(gate) as (client, queue):
        queue.submit(email(delay=9))
        samples = await samples_of(client)
    assert samples['taskqueue_tasks{status="pending"}'] == 1
    assert samples['taskqueue_tasks{status="running"}'] == 0


# -- What is refused, and how ----------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        "GET /tasks/unknown",
        "GET /tasks/%00",
        "DELETE /tasks/unknown",
        "DELETE /tasks/unknown?force=true",
        "GET /nothing",
        "GET /tasks/",
    ],
)
async def test_what_is_unknown_is_a_404_with_a_detail(call):
    async with serving() as (client, _):
        answer = await client.request(*call.split())
    assert answer.status_code == 404
    assert isinstance(answer.json()["detail"], str)


# GOTCHA [404-after-200]
async def test_404_after_200_cannot_happen_on_a_stream():
    async with serving() as (client, _):
        answer = await client.get("/tasks/unknown/stream")
    assert answer.status_code == 404
    assert "No task has this id" in answer.json()["detail"]


async def test_404_after_200_cannot_come_from_an_eviction_either(gate):
    """The task was there for the route. It is gone when the answer begins."""
    async with serving(gate, keep_finished=0) as (client, queue):
        task_id = await bring_to("running", queue, gate)
        async with Stream(client.app, f"/tasks/{task_id}/stream") as stream:
            stream.reading.clear()
            await quiet()
            gate.let_go()
            await quiet()
            stream.reading.set()
            frames = await to_the_end(stream)
    assert [frame["data"]["status"] for frame in frames] == ["completed"]


async def test_an_unknown_path_is_a_404_with_a_detail():
    async with serving() as (client, _):
        answer = await client.get("/nowhere")
    assert answer.status_code == 404
    assert answer.json() == {"detail": "Not Found"}


@pytest.mark.parametrize("status", [400, 409])
async def test_a_refusal_of_a_route_of_yours_is_told_as_it_is(status):
    async def refuse():
        raise HTTPException(status, "no")

    async with serving() as (client, _):
        client.app.add_api_route("/refuse", refuse)
        answer = await client.get("/refuse")
    assert (answer.status_code, answer.json()) == (status, {"detail": "no"})


async def test_a_refusal_does_not_show_what_it_came_from():
    async def refuse():
        raise HTTPException(409, "taken") from KeyError("a secret")

    async with serving() as (client, _):
        client.app.add_api_route("/refuse", refuse)
        answer = await client.get("/refuse")
    assert answer.json() == {"detail": "taken"}


async def test_a_known_path_with_another_method_is_a_405_with_a_detail():
    async with serving() as (client, _):
        answer = await client.put("/tasks/unknown")
    assert answer.status_code == 405
    assert answer.json() == {"detail": "Method Not Allowed"}


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=1001",
        "limit=x",
        f"limit={10**4000}",
        "offset=-1",
        "offset=x",
        "status=unknown",
        "status=%ED%A0%80",
    ],
)
async def test_a_bad_query_is_a_422_with_its_place(query):
    async with serving() as (client, _):
        answer = await client.get(f"/tasks?{query}")
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["query", query.partition("=")[0]]


async def test_a_bad_force_is_a_422_and_cancels_nothing(gate):
    async with serving(gate) as (client, queue):
        task_id = await bring_to("pending", queue, gate)
        answer = await client.delete(f"/tasks/{task_id}?force=maybe")
        assert answer.status_code == 422
        assert queue.get_task(task_id).status == "pending"


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"task_type": "unknown"}, ["task_type"]),
        ({"priority": 2}, ["priority"]),
        ({"priority": True}, ["priority"]),
        ({"priority": "1"}, ["priority"]),
        ({"priority": 1.0}, ["priority"]),
        ({"max_retries": 11}, ["max_retries"]),
        ({"timeout": 0}, ["timeout"]),
        ({"delay": -1}, ["delay"]),
        ({"payload": []}, ["payload"]),
        ({"payload": {"to": 5}}, ["payload", "to"]),
        ({"retries": 3}, ["retries"]),
    ],
)
async def test_a_bad_field_is_a_422_with_its_place(fields, place):
    async with serving() as (client, _):
        answer = await post_email(client, **fields)
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", *place]


async def test_a_422_is_json():
    async with serving() as (client, _):
        answer = await client.post("/tasks", json={})
    assert answer.headers["Content-Type"] == "application/json"


async def test_a_422_has_the_first_20_errors_and_no_more():
    fields = {f"unknown_{number}": 1 for number in range(100)}
    async with serving() as (client, _):
        answer = await post_email(client, **fields)
    assert len(answer.json()["detail"]) == 20


async def test_await_put_is_not_how_a_full_queue_answers(gate):
    async with serving(gate, max_pending=1) as (client, queue):
        queue.submit(email(delay=60))
        async with asyncio.timeout(5):
            answer = await post_email(client)
    assert answer.status_code == 503
    assert answer.headers["Retry-After"] == "1"


async def test_a_full_queue_says_why_it_refuses(gate):
    async with serving(gate, max_pending=1) as (client, queue):
        queue.submit(email(delay=60))
        answer = await post_email(client)
    assert answer.json() == {"detail": "1 tasks are waiting already"}


async def test_a_queue_that_stops_answers_503(gate):
    async with serving(gate) as (client, queue):
        queue.begin_shutdown()
        answer = await post_email(client)
    assert answer.status_code == 503
    assert answer.headers["Retry-After"] == "1"


async def test_a_queue_that_stops_can_still_be_read(gate):
    async with serving(gate) as (client, queue):
        task_id = await bring_to("running", queue, gate)
        queue.begin_shutdown()
        answer = await client.get(f"/tasks/{task_id}")
    assert answer.status_code == 200


# -- Bodies that people send by mistake, and bodies that are meant to hurt -------------


# GOTCHA [missing-content-type]
@pytest.mark.parametrize(
    "sent",
    [
        None,
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "text/plain",
        "text/json",
        "application/x-json",
        "json",
    ],
)
async def test_missing_content_type_is_named(sent):
    headers = {}
    if sent is not None:
        headers["Content-Type"] = sent
    async with serving() as (client, _):
        answer = await client.post("/tasks", content=FINE, headers=headers)
    assert answer.status_code == 422
    assert "Content-Type: application/json" in answer.json()["detail"][0]["msg"]


async def test_missing_content_type_is_named_beside_what_was_sent():
    headers = {"Content-Type": "text/plain"}
    async with serving() as (client, _):
        answer = await client.post("/tasks", content=FINE, headers=headers)
    assert answer.json()["detail"][0]["msg"].endswith(" was: text/plain")


async def test_missing_content_type_is_told_apart_from_a_wrong_one():
    async with serving() as (client, _):
        answer = await client.post("/tasks", content=FINE)
    assert answer.json()["detail"][0]["msg"].endswith(" was: none")


async def test_missing_content_type_is_not_blamed_for_a_list():
    async with serving() as (client, _):
        answer = await client.post("/tasks", json=[])
    assert "valid dictionary" in answer.json()["detail"][0]["msg"]


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "a/b+json"])
async def test_an_unusual_content_type_is_taken(kind, gate):
    kind = kind.replace("a/b", "application/b")
    async with serving(gate) as (client, _):
        headers = {"Content-Type": kind}
        answer = await client.post("/tasks", content=FINE, headers=headers)
    assert answer.status_code == 202


async def test_a_body_that_is_missing_is_named():
    async with serving() as (client, _):
        answer = await client.post("/tasks")
    [problem] = answer.json()["detail"]
    assert problem == {"type": "missing", "loc": ["body"], "msg": "Field required"}


async def test_an_error_in_the_json_keeps_its_place():
    body = b'{"task_type"; "send_email"}'
    async with serving() as (client, _):
        answer = await client.post("/tasks", content=body, headers=JSON_TYPE)
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", body.index(b";")]


async def test_an_error_in_the_json_keeps_its_reason():
    body = b"{'task_type': 'send_email'}"
    async with serving() as (client, _):
        answer = await client.post("/tasks", content=body, headers=JSON_TYPE)
    assert "enclosed in double quotes" in answer.json()["detail"][0]["msg"]


@pytest.mark.parametrize("body", [b'{"to": "Jos\xe9"}', b"\x1f\x8b\x08\x00"])
async def test_a_body_that_is_no_text_is_told_how_to_be_sent(body):
    """Latin-1, as cmd.exe sends it, or compressed."""
    async with serving() as (client, _):
        answer = await client.post("/tasks", content=body, headers=JSON_TYPE)
    assert answer.status_code == 400
    assert "can't decode byte" in answer.json()["detail"]
    assert answer.json()["detail"].endswith("Send JSON in UTF-8, not compressed")


async def test_a_body_of_too_many_levels_is_told_why_it_can_not_be_read():
    async with serving() as (client, _):
        answer = await client.post("/tasks", content=b"[" * 20_000, headers=JSON_TYPE)
    assert answer.status_code == 400
    assert "parsing the body: " in answer.json()["detail"]


def body_with(value, fields=""):
    """A submission with this value in its payload, and with more fields."""
    text = f'{{"task_type": "send_email", "payload": {{"x": {value}}} {fields}}}'
    return text.encode()


HOSTILE = {
    "nan": body_with("NaN"),
    "infinity": body_with("[-Infinity]"),
    "a number too large": body_with("1e400"),
    "half a character": body_with(r'"\ud800"'),
    "half a character as key": body_with(r'{"\udfff": 1}'),
    "cut short": body_with('"'),
    "deep": body_with(nested(300)),
    "very deep": body_with(nested(30_000)),
    "a null byte": body_with("\0"),
    "a long number": body_with("9" * 5000),
    "nan as priority": body_with(1, ', "priority": NaN'),
    "deep priority": body_with(1, f', "priority": {nested(300)}'),
    "endless timeout": body_with(1, ', "timeout": Infinity'),
    "nan as delay": body_with(1, ', "delay": NaN'),
    "half a character as type": body_with(1, r', "task_type": "\ud800"'),
    "half a character, unknown": body_with(1, r', "x": "\ud800"'),
    "half a character as field": body_with(1, r', "\ud800": 1'),
    "nan, unknown": body_with(1, ', "x": NaN'),
    "deep, unknown": body_with(1, f', "x": {nested(300)}'),
    "null": b"null",
    "a text": b'"x"',
    "only a nan": b"NaN",
    "only half a character": rb'"\ud800"',
    "bad utf-8": b'{"task_type": "\xff"}',
    "16,000 nans": body_with("[" + ",".join(["NaN"] * 16_000) + "]"),
    "7,000 unknown fields": body_with(
        1, "".join(f', "{number:x}": 1' for number in range(5000))
    ),
}


# GOTCHA [echoed-input]
@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
async def test_echoed_input_does_not_make_a_500_of_a_hostile_body(body):
    async with serving() as (client, _):
        answer = await client.post("/tasks", content=body, headers=JSON_TYPE)
    assert answer.is_client_error
    assert strict_json(answer.text)["detail"]


async def test_echoed_input_is_not_in_the_answer():
    async with serving() as (client, _):
        answer = await post_email(client, max_retries="secret")
    assert "secret" not in answer.text


async def test_echoed_input_in_a_reason_is_made_to_fit():
    """A validator of somebody's payload may quote what it refuses."""

    async def refuse():
        problem = {"type": "picky", "loc": ["x"], "msg": "no \ud800é", "input": 1}
        raise RequestValidationError([problem])

    async with serving() as (client, _):
        client.app.add_api_route("/picky", refuse)
        answer = await client.get("/picky")
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["msg"] == "no \ud800é"


async def test_the_answer_to_16_000_errors_is_short():
    async with serving() as (client, _):
        body = HOSTILE["16,000 nans"]
        answer = await client.post("/tasks", content=body, headers=JSON_TYPE)
    assert len(answer.content) < 1000


async def test_a_hostile_body_leaves_nothing_behind():
    async with serving() as (client, _):
        for body in HOSTILE.values():
            await client.post("/tasks", content=body, headers=JSON_TYPE)
        answer = await client.get("/tasks")
    assert answer.json() == {"tasks": [], "total": 0}


UNUSUAL = {
    "deep": nested(90),
    "control characters": r'"\u0000\u001b\ud83d\ude00"',
    "a long number": "1" + "0" * 400,
    "minus zero": "-0.0",
    "an empty key": '{"": {}}',
    "odd keys": '{"__class__": 1, "model_config": 2, "self": 3}',
    "line separators": '"\u2028\u0085"',
}


@pytest.mark.parametrize("value", UNUSUAL.values(), ids=UNUSUAL)
async def test_an_unusual_payload_comes_back_as_it_was(value, gate):
    async with serving(gate) as (client, _):
        await client.post("/tasks", content=body_with(value), headers=JSON_TYPE)
        [task] = strict_json((await client.get("/tasks")).text)["tasks"]
    assert task["payload"] == {"x": json.loads(value)}


@pytest.mark.parametrize("value", UNUSUAL.values(), ids=UNUSUAL)
async def test_an_unusual_payload_reaches_the_handler(value):
    async def keep(payload, update_progress):
        kept.append(payload.x)

    kept = []
    async with serving(keep) as (client, _):
        await client.post("/tasks", content=body_with(value), headers=JSON_TYPE)
        await quiet()
    assert kept == [json.loads(value)]


LARGE = {
    "empty lists": "[" + ",".join(["[]"] * 5_000) + "]",
    "numbers and a smiley": "[" + "0," * 8_000 + '"\U0001f600"]',
    "text and a smiley": '"' + "a" * 16_000 + '\U0001f600"',
}


@pytest.mark.parametrize("value", LARGE.values(), ids=LARGE)
async def test_large_payloads_are_kept_in_a_few_times_their_size(value, gate):
    """So 65 MB of them, in whatever shape, hold less than 300 MB."""
    body = body_with(value, ', "delay": 9')
    async with serving(gate) as (client, _):
        await client.post("/tasks", content=body, headers=JSON_TYPE)
        tracemalloc.start()
        for _ in range(2):
            await client.post("/tasks", content=body, headers=JSON_TYPE)
        kept, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert kept < 4 * 2 * len(body)


# -- What the API says about itself ----------------------------------------------------


def openapi():
    """The description of the API, as programs read it."""
    return taskqueue.app.openapi()


@pytest.mark.parametrize(
    ("method", "path", "statuses"),
    [
        ("post", "/tasks", {"202", "400", "413", "422", "503"}),
        ("get", "/tasks", {"200", "422"}),
        ("get", "/tasks/{task_id}", {"200", "404"}),
        ("delete", "/tasks/{task_id}", {"200", "202", "404", "409", "422"}),
        ("get", "/tasks/{task_id}/stream", {"200", "204", "404"}),
        ("get", "/events", {"200"}),
        ("get", "/health", {"200", "503"}),
        ("get", "/metrics", {"200"}),
    ],
)
def test_openapi_names_every_status_that_a_route_answers(method, path, statuses):
    responses = openapi()["paths"][path][method]["responses"]
    assert set(responses) >= statuses


def test_openapi_has_the_api_and_nothing_else():
    assert set(openapi()["paths"]) == {
        "/tasks",
        "/tasks/{task_id}",
        "/tasks/{task_id}/stream",
        "/events",
        "/health",
        "/metrics",
    }


def test_openapi_says_what_a_list_looks_like():
    answer = openapi()["paths"]["/tasks"]["get"]["responses"]["200"]
    schema = answer["content"]["application/json"]["schema"]
    assert schema == {"$ref": "#/components/schemas/TaskList"}


@pytest.mark.parametrize("path", ["/tasks/{task_id}/stream", "/events"])
def test_openapi_says_that_a_stream_is_a_stream(path):
    answer = openapi()["paths"][path]["get"]["responses"]["200"]
    assert list(answer["content"]) == ["text/event-stream"]


def test_openapi_has_no_reference_that_leads_nowhere():
    """A learner's payload may have an enum in it."""
    try:

        class Mode(enum.Enum):
            ONE = 1

        class WithEnum(Payload):
            mode: Mode = Mode.ONE

        document = create_app().openapi()
        references = re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(document))
        assert any("anyOf" in reference for reference in references)
        for reference in references:
            part = document
            for name in reference.split("/"):
                part = part[int(name)] if isinstance(part, list) else part[name]
    finally:
        del Mode, WithEnum
        gc.collect()  # so that no other test sees this model


def test_openapi_says_that_metrics_come_in_two_formats():
    answer = openapi()["paths"]["/metrics"]["get"]["responses"]["200"]
    assert set(answer["content"]) == {"application/json", "text/plain"}


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/tasks/{task_id}/stream", ["event: progress", "id: ", "data: ", "shutdown"]),
        ("/events", ["event: task", "event: queue", "id: ", "data: "]),
    ],
)
def test_openapi_shows_the_frames_of_both_streams(path, words):
    description = openapi()["paths"][path]["get"]["description"]
    assert [word for word in words if word not in description] == []


def test_openapi_says_how_far_progress_goes():
    schema = openapi()["components"]["schemas"]["TaskStatus"]["properties"]["progress"]
    assert (schema["minimum"], schema["maximum"]) == (0, 100)


def test_openapi_shows_the_fields_of_all_payloads():
    schema = openapi()["components"]["schemas"]["TaskSubmission"]
    shown = [
        set(each["properties"]) for each in schema["properties"]["payload"]["anyOf"]
    ]
    assert {"url", "width", "height"} in shown
    assert {"report_id", "format"} in shown
    assert {"to", "subject", "body"} in shown


@pytest.mark.parametrize("sign", ["GOTCHA", "NEW:", "WHY", "SIMPLIFIED", "First read"])
def test_openapi_has_none_of_the_notes_for_readers_of_the_file(sign):
    assert sign not in json.dumps(openapi())


async def test_openapi_is_served_and_has_only_relative_addresses():
    async with serving() as (client, _):
        answer = await client.get("/openapi.json")
    assert answer.json()["servers"] == [{"url": "."}]


async def test_openapi_has_only_relative_addresses_behind_a_prefix_too():
    async with serving() as (client, _):
        transport = httpx.ASGITransport(client.app, root_path="/prefix")
        behind = httpx.AsyncClient(transport=transport, base_url="http://test")
        answer = await behind.get("/openapi.json")
    assert answer.json()["servers"] == [{"url": "."}]


# ===== App ============================================================================
# Apps side by side, and one within another.


async def test_two_apps_have_a_queue_each(gate):
    async with serving(gate) as (first, _), serving(gate) as (second, _):
        await post_email(first)
        assert (await first.get("/tasks")).json()["total"] == 1
        assert (await second.get("/tasks")).json()["total"] == 0


async def test_two_apps_have_metrics_of_their_own():
    async with serving() as (first, _), serving() as (second, _):
        await first.get("/health")
        assert (await first.get("/metrics")).json()["total_requests"] == 1
        assert (await second.get("/metrics")).json()["total_requests"] == 0


async def test_two_apps_have_settings_of_their_own():
    async with serving(max_workers=1) as (first, _), serving() as (second, _):
        assert (await first.get("/health")).json()["workers"] == 1
        assert (await second.get("/health")).json()["workers"] == 3


async def test_two_apps_have_handlers_of_their_own(gate):
    async with serving(gate) as (_, first), serving(lambda *_: 1) as (_, second):
        first.submit(email())
        task = await until(second, second.submit(email()).id)
        assert list(gate.held) == ["it"]
        assert task.result == 1


async def test_the_end_of_one_app_is_nothing_to_another(gate):
    async with serving(gate) as (client, _queue):
        async with Stream(client.app, "/events") as stream:
            await read_batch(stream)
            async with serving() as (other, _):
                await other.get("/health")
            assert (await post_email(client)).status_code == 202
            assert len((await read_batch(stream))[0]) == 1


async def test_an_app_can_be_started_again(gate):
    async with serving(gate) as (client, _):
        await post_email(client)
    async with client.app.router.lifespan_context(client.app):
        transport = httpx.ASGITransport(client.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as user:
            assert (await user.get("/tasks")).json()["total"] == 0
            assert (await post_email(user)).status_code == 202


async def test_an_app_ends_its_tasks_with_its_lifespan(gate):
    async with serving(gate, drain_seconds=0) as (_, queue):
        task_id = await bring_to("running", queue, gate)
    assert queue.get_task(task_id).status == "cancelled"


async def test_an_app_ends_its_streams_with_its_lifespan(gate):
    async with contextlib.AsyncExitStack() as later:
        async with serving(gate) as (client, _):
            stream = Stream(client.app, "/events")
            await later.enter_async_context(stream)
            await read_batch(stream)
        frames = await to_the_end(stream)
    assert frames[-1]["event"] == "shutdown"


async def test_an_app_leaves_nothing_behind_when_its_lifespan_is_broken_off():
    before = asyncio.all_tasks()
    with pytest.raises(ValueError, match="a bug"):
        async with serving():
            raise ValueError("a bug")
    await quiet()
    assert asyncio.all_tasks() == before


async def test_the_signal_of_an_earlier_server_is_no_stop_of_this_one(
    gate, monkeypatch
):
    """sse-starlette never takes it back. In a notebook that would end each stream."""
    monkeypatch.setattr(AppStatus, "should_exit", True)
    async with streaming(gate, "running") as (_, _, stream):
        await stream.next()
        await asyncio.sleep(2)
        gate.report["it"](50)
        assert (await stream.next())["data"]["progress"] == 50


async def test_an_app_works_within_another(gate):
    async with serving(gate) as (client, _):
        site = FastAPI()
        site.mount("/queue", client.app)
        transport = httpx.ASGITransport(site)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as user:
            answer = await user.post("/queue/tasks", content=FINE, headers=JSON_TYPE)
            place = answer.headers["Location"]
            assert place == f"/queue/tasks/{answer.json()['id']}"
            assert (await user.get(place)).status_code == 200


async def test_an_app_within_another_has_a_page_and_docs():
    async with serving() as (client, _):
        site = FastAPI()
        site.mount("/queue", client.app)
        transport = httpx.ASGITransport(site)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as user:
            assert (await user.get("/queue/")).status_code == 200
            assert "'openapi.json'" in (await user.get("/queue/docs")).text


# GOTCHA [shutdown-order]
@BOTH_STREAMS
async def test_stream_shutdown_order_is_goodbye_first(path, gate, monkeypatch):
    """The server was told to stop, and waits for the streams. The app still runs."""
    async with streaming(gate, "running", path) as (_, _, stream):
        await stream.next()
        # sse-starlette sets this when the server gets a signal.
        monkeypatch.setattr(AppStatus, "should_exit", True)
        began = now()
        frames = await to_the_end(stream)
        assert now() - began < 0.2
    assert frames[-1]["event"] == "shutdown"


async def read_until_progress(stream, percent):
    """Read until a frame says that a task is so far."""
    frame = await stream.next()
    while frame["data"].get("progress") != percent:
        frame = await stream.next()


class OtherServer:
    """Another uvicorn server in this process: the newest, as far as signals say."""

    should_exit = True  # somebody has set it: no signal came

    def handle_exit(self, *_):
        """What uvicorn makes the handler of signals."""


# GOTCHA [whose-stop]
@BOTH_STREAMS
async def test_stream_whose_stop_is_it_when_another_server_ends(
    path, gate, monkeypatch
):
    """Not ours: the streams go on, and so does the queue."""
    handle_exit = OtherServer().handle_exit
    monkeypatch.setattr(signal, "getsignal", lambda _: handle_exit)
    async with streaming(gate, "running", path) as (client, _, stream):
        await stream.next()
        await asyncio.sleep(2)
        gate.report["it"](50)
        await read_until_progress(stream, 50)
        assert (await post_email(client)).status_code == 202


@BOTH_STREAMS
async def test_stream_whose_stop_is_it_when_a_signal_comes_after_that(
    path, gate, monkeypatch
):
    """Ours, too, also for a stream that has outlived the other server."""
    handle_exit = OtherServer().handle_exit
    monkeypatch.setattr(signal, "getsignal", lambda _: handle_exit)
    async with streaming(gate, "running", path) as (_, _, stream):
        await stream.next()
        await asyncio.sleep(2)
        monkeypatch.setattr(AppStatus, "should_exit", True)
        frames = await to_the_end(stream)
    assert frames[-1]["event"] == "shutdown"


def run_python(program):
    """Run this in a process of its own. Return what it prints, and its errors."""
    ran = subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return ran.stdout, ran.stderr


def test_an_import_starts_nothing_and_prints_nothing():
    output, errors = run_python(
        "import logging, threading, taskqueue;"
        "print(threading.active_count(), logging.root.handlers)"
    )
    assert output == "1 []\n"
    assert errors == ""


# Signals, sockets and sse-starlette's AppStatus belong to a whole process. So two real
# servers get one of their own. The second is ended by a flag, the first by a signal.
TWO_SERVERS = """
import asyncio
import os
import signal

import httpx
import uvicorn

import taskqueue

signal.signal(signal.SIGINT, lambda *_: None)  # uvicorn raises the signal once more


async def start():
    app = taskqueue.create_app()
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    return server, serving, f"http://127.0.0.1:{port}"


async def main():
    first, serving_first, url = await start()
    second, serving_second, other_url = await start()
    async with httpx.AsyncClient(trust_env=False, timeout=20) as client:
        async with client.stream("GET", f"{url}/events") as events:
            lines = events.aiter_lines()
            await anext(lines)

            async with client.stream("GET", f"{other_url}/events"):
                second.should_exit = True
                await asyncio.sleep(0.7)  # sse-starlette looks each half second
            await serving_second
            body = {"task_type": "send_email", "delay": 60}
            answer = await client.post(f"{url}/tasks", json=body)
            print("after the end of the second, the first answers", answer.status_code)

            os.kill(os.getpid(), signal.SIGINT)
            async with asyncio.timeout(5):
                rest = [line async for line in lines]
                await serving_first
            print("the first has ended its stream with", rest[-3])


asyncio.run(main())
"""


LATE_IMPORT = """
import asyncio, contextlib, logging, os, signal, uvicorn

async def main():
    config = uvicorn.Config("taskqueue:app", port=0, log_level="error")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /events HTTP/1.1\\r\\nHost: test\\r\\n\\r\\n")
    await reader.readuntil(b"event: queue")
    os.kill(os.getpid(), signal.SIGINT)
    await reader.readuntil(b"event: shutdown")
    print("the stream has ended")
    await serving

with contextlib.suppress(KeyboardInterrupt):  # uvicorn may hand the signal on
    asyncio.run(main())
print("the server has ended")
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_shutdown_order_is_right_if_the_server_imports_the_app_itself():
    """As with `--reload`: the app is imported after the signal handlers are set."""
    output, _ = run_python(LATE_IMPORT)
    assert output.splitlines() == ["the stream has ended", "the server has ended"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_stream_whose_stop_is_it_with_two_real_servers():
    output, errors = run_python(TWO_SERVERS)
    assert output.splitlines() == [
        "after the end of the second, the first answers 202",
        "the first has ended its stream with event: shutdown",
    ]
    assert errors == ""


# ===== Page ===========================================================================
# The stream that the page lives on, the page, and the docs. How the page looks is for
# the eye, and for a browser. What is tested here must be so in any case.


# -- The stream of all tasks -----------------------------------------------------------


async def read_batch(stream):
    """The task frames up to the next queue frame, and that one."""
    tasks = []
    while True:
        frame = await stream.next()
        if frame["event"] == "queue":
            return tasks, frame
        tasks.append(frame)


# GOTCHA [six-connections]
async def test_events_six_connections_are_not_needed_to_watch_many_tasks(gate):
    async with serving(gate, max_workers=10) as (client, queue):
        async with Stream(client.app, "/events") as stream:
            await read_batch(stream)
            ids = {queue.submit(email(str(number))).id for number in range(10)}
            await gate.let_all_go()
            tasks, _ = await read_batch(stream)
    assert {task["data"]["id"] for task in tasks} == ids
    assert set(statuses_of(tasks)) == {"completed"}


async def test_events_begin_with_the_latest_100_the_oldest_first(gate):
    async with serving(gate) as (client, queue):
        submitted = [queue.submit(email(delay=60)) for _ in range(130)]
        async with Stream(client.app, "/events") as stream:
            tasks, _ = await read_batch(stream)
    assert [task["id"] for task in tasks] == [str(t.version) for t in submitted[30:]]


async def test_events_after_a_fresh_start_do_not_send_what_is_older(gate):
    async with serving(gate) as (client, queue):
        for _ in range(130):
            queue.submit(email(delay=60))
        async with Stream(client.app, "/events") as stream:
            await read_batch(stream)
            await asyncio.sleep(1)
            assert stream.messages.empty()


async def test_events_tell_of_an_old_task_that_changes(gate):
    """Also if one that came later has not changed since."""
    async with serving(gate, max_workers=1) as (client, queue):
        old = queue.submit(email("old")).id
        queue.submit(email("new"))
        await quiet()
        async with Stream(client.app, "/events") as stream:
            await read_batch(stream)
            gate.report["old"](50)
            news, _ = await read_batch(stream)
    assert [(each["data"]["id"], each["data"]["progress"]) for each in news] == [
        (old, 50)
    ]


async def test_events_show_a_task_without_its_payload(gate):
    async with streaming(gate, "running", "/events") as (client, _queue, stream):
        [task], _ = await read_batch(stream)
        [shown] = (await client.get("/tasks")).json()["tasks"]
    del shown["payload"]
    assert task["event"] == "task"
    assert task["data"] == shown


async def test_events_tell_of_the_queue_after_each_batch(gate):
    async with streaming(gate, "running", "/events") as (_client, _queue, stream):
        await read_batch(stream)
        gate.let_go()
        [task], numbers = await read_batch(stream)
    assert task["data"]["status"] == "completed"
    assert numbers["data"]["tasks"]["completed"] == 1
    assert "id" not in numbers


async def test_events_tell_of_the_queue_what_health_tells(gate):
    async with streaming(gate, "running", "/events") as (client, _, stream):
        _, numbers = await read_batch(stream)
        health = (await client.get("/health")).json()
    assert numbers["data"].items() <= health.items()
    assert numbers["data"]["busy"] == 1


async def test_events_end_at_a_stop_although_there_is_always_news(gate):
    async with serving(gate) as (client, queue):
        task_id = await bring_to("running", queue, gate)
        async with Stream(client.app, "/events") as stream:
            await read_batch(stream)
            queue.begin_shutdown()
            for percent in range(1, 90):
                gate.report["it"](percent)
                await asyncio.sleep(0.02)
            frames = [frame["event"] for frame in await stream.rest()]
        assert queue.get_task(task_id).status == "running"
    assert frames[-1] == "shutdown"
    assert len(frames) < 8


async def test_events_ids_grow_over_all_tasks(gate):
    async with serving(gate, max_workers=10) as (client, queue):
        async with Stream(client.app, "/events") as stream:
            await read_batch(stream)
            for number in range(10):
                queue.submit(email(str(number)))
            first, _ = await read_batch(stream)
            await gate.let_all_go()
            second, _ = await read_batch(stream)
    ids = [int(task["id"]) for task in first + second]
    assert len(ids) == 20
    assert ids == sorted(set(ids))


@contextlib.asynccontextmanager
async def resuming(gate, count, last_event_id):
    """A stream of all tasks that begins after an id. `count` tasks wait.

    `last_event_id` is a function of their snapshots. Yields these, and the stream.
    """
    async with serving(gate) as (client, queue):
        tasks = [queue.submit(email(str(n), delay=60)) for n in range(count)]
        last = last_event_id(tasks)
        async with Stream(client.app, "/events", last) as stream:
            yield tasks, stream


async def test_events_resume_after_the_last_event_id(gate):
    async with resuming(gate, 5, lambda tasks: tasks[1].version) as (tasks, stream):
        news, _ = await read_batch(stream)
    assert [n["data"]["id"] for n in news] == [task.id for task in tasks[2:]]


async def test_events_resume_with_nothing_when_all_is_known(gate):
    async with resuming(gate, 5, lambda tasks: tasks[-1].version) as (_, stream):
        news, _ = await read_batch(stream)
    assert news == []


@pytest.mark.parametrize(
    "junk",
    [
        lambda tasks: "junk",
        lambda tasks: tasks[-1].version + 1,
        lambda tasks: tasks[0].version - 2,
    ],
    ids=["no number", "from the future", "of a life before"],
)
async def test_events_begin_anew_if_the_last_event_id_is_junk(junk, gate):
    async with resuming(gate, 130, junk) as (_, stream):
        news, _ = await read_batch(stream)
        await asyncio.sleep(1)
        assert len(news) == 100
        assert stream.messages.empty()


# GOTCHA [frame-by-frame]
async def test_events_frame_by_frame_is_not_how_a_resume_is_sent(gate):
    """It comes in slices, each as large as a fresh start is."""
    async with resuming(gate, 250, lambda tasks: tasks[0].version) as (_, stream):
        sizes = [len((await read_batch(stream))[0]) for _ in range(3)]
    assert sizes == [100, 100, 49]


async def test_events_miss_nothing_when_they_resume_in_slices(gate):
    async with resuming(gate, 250, lambda tasks: tasks[0].version) as (tasks, stream):
        news = []
        for _ in range(3):
            news += (await read_batch(stream))[0]
    assert [n["data"]["id"] for n in news] == [task.id for task in tasks[1:]]


async def test_events_frame_by_frame_is_not_how_a_batch_is_sent(gate):
    """It is one send, whatever is in it."""
    async with serving(gate) as (client, queue):
        async with Stream(client.app, "/events") as stream:
            await read_batch(stream)
            for number in range(50):
                queue.submit(email(str(number), delay=60))
            await asyncio.sleep(1)
            assert stream.messages.qsize() == 1


@contextlib.asynccontextmanager
async def a_large_batch(gate, **settings):
    """Five results of 60 KB are on their way to a reader of all tasks."""
    async with serving(gate, max_workers=5, **settings) as (client, queue):
        async with Stream(client.app, "/events") as stream:
            await read_batch(stream)
            for number in range(5):
                queue.submit(email(str(number)))
            await quiet()
            for number in range(5):
                gate.let_go(str(number), "x" * 60_000)
            yield stream


async def test_events_frame_by_frame_gives_way_to_pieces_of_64_kb(gate):
    async with a_large_batch(gate) as stream:
        await asyncio.sleep(1)
        sizes = []
        while not stream.messages.empty():
            sizes.append(len(stream.messages.get_nowait()["body"]))
    assert sum(sizes) > 300_000
    assert max(sizes) <= 65_536


async def test_events_send_a_frame_that_is_larger_than_a_piece_as_it_is(gate):
    async with streaming(gate, "running", "/events") as (_, _, stream):
        await read_batch(stream)
        gate.let_go("it", "x" * 65_530)
        await asyncio.sleep(1)
        message = stream.messages.get_nowait()
    assert len(message["body"]) > 65_536
    assert stream.messages.empty()


async def test_events_frame_by_frame_does_not_keep_the_turn(gate):
    """Whoever waits for a piece gets a turn before the next one is sent."""
    async with a_large_batch(gate) as stream:
        for _ in range(5):
            await stream.messages.get()
            assert stream.messages.empty()


async def test_events_ping_never_comes_within_a_frame(gate):
    """A reader is so slow that a ping is due in the middle of a batch."""
    async with a_large_batch(gate, ping_seconds=4, send_timeout=60) as stream:
        stream.reading.clear()
        await asyncio.sleep(5)
        stream.reading.set()
        await asyncio.sleep(1)
        frames = await stream.take(7)  # five tasks, the ping, the queue
    assert sum(len(frame["data"]["result"]) for frame in frames if "id" in frame) == (
        5 * 60_000
    )


async def test_events_send_first_news_at_once(gate):
    settings = {"ping_seconds": 600}
    async with streaming(gate, "running", "/events", **settings) as (_, _, stream):
        await read_batch(stream)
        await asyncio.sleep(60)
        begin = now()
        gate.report["it"](50)
        await read_batch(stream)
        assert now() == begin


async def test_events_send_at_most_20_batches_a_second(gate):
    async with streaming(gate, "running", "/events") as (_, _, stream):
        await read_batch(stream)
        for step in range(1, 101):
            await asyncio.sleep(0.01)
            gate.report["it"](step)
        assert stream.messages.qsize() == pytest.approx(20, abs=1)


async def test_events_send_what_changes_twice_once(gate):
    async with streaming(gate, "running", "/events") as (_, _, stream):
        await read_batch(stream)
        gate.report["it"](10)
        await quiet()
        gate.report["it"](20)
        [task], _ = await read_batch(stream)
    assert task["data"]["progress"] == 20


async def test_events_slow_reader_gets_each_task_in_its_latest_state(gate):
    """It gets what was on its way already, and then each task once."""
    async with serving(gate) as (client, queue):
        async with Stream(client.app, "/events") as stream:
            await read_batch(stream)
            stream.reading.clear()
            for name in ("a", "b", "c"):
                queue.submit(email(name))
            for percent in range(1, 51):
                await asyncio.sleep(0.1)
                for name in gate.held:
                    gate.report[name](percent)
            stream.reading.set()
            await read_batch(stream)
            tasks, _ = await read_batch(stream)
    assert [task["data"]["progress"] for task in tasks] == [50, 50, 50]


# -- The page and the docs -------------------------------------------------------------


async def test_the_page_is_html():
    async with serving() as (client, _):
        answer = await client.get("/")
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "<title>" in answer.text


def nonce_of(answer):
    """The nonce in the policy of a page."""
    policy = answer.headers["Content-Security-Policy"]
    return re.search("script-src 'nonce-([^']+)'", policy)[1]


async def test_the_nonce_of_the_page_is_fresh_in_each_answer():
    async with serving() as (client, _):
        first = nonce_of(await client.get("/"))
        second = nonce_of(await client.get("/"))
    assert first != second
    assert len(first) >= 20


async def test_the_policy_allows_what_has_the_nonce_and_nothing_else():
    async with serving() as (client, _):
        answer = await client.get("/")
    nonce = nonce_of(answer)
    policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ")
    assert f"style-src 'nonce-{nonce}'; " in policy


@pytest.mark.parametrize("tag", ["style", "script"])
async def test_each_style_and_script_of_the_page_has_the_nonce(tag):
    async with serving() as (client, _):
        answer = await client.get("/")
    with_nonce = answer.text.count(f'<{tag} nonce="{nonce_of(answer)}">')
    assert with_nonce == answer.text.count(f"<{tag}")


async def test_the_page_builds_no_html_out_of_data():
    pattern = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\("
    async with serving() as (client, _):
        answer = await client.get("/")
    assert re.findall(pattern, answer.text) == []


@pytest.mark.parametrize("path", ["/", "/docs"])
async def test_a_page_has_no_address_that_leaves_the_prefix(path):
    """An address that begins with a slash would leave a proxy's prefix, or a mount."""
    pattern = r"""(?:href|src|action)=["']?/(?!/)[^>]*|["'`]/[a-z][^"'`]*["'`]"""
    async with serving() as (client, _):
        answer = await client.get(path)
    assert re.findall(pattern, answer.text) == []


async def test_the_docs_read_the_description_beside_them():
    async with serving() as (client, _):
        answer = await client.get("/docs")
    assert "url: 'openapi.json'" in answer.text
    assert "swagger-ui" in answer.text


async def test_the_docs_say_what_to_do_offline():
    async with serving() as (client, _):
        answer = await client.get("/docs")
    assert "loads its scripts from the internet" in answer.text
    assert '<a href="openapi.json">' in answer.text


# ===== Demo ===========================================================================
# Each server is a process of its own: signals belong to a whole process. Where nobody
# reads what it prints, it may print no more than a pipe holds.

# -- Tools -----------------------------------------------------------------------------

PLAIN = [sys.executable, "taskqueue.py"]


def demo_with(source):
    """The command of a demo that first runs these lines. `t` is the module."""
    program = (
        "import asyncio, threading, time, concurrent.futures, anyio.to_thread\n"
        "import taskqueue as t\n"
        f"{source}\n"
        "t.main()\n"
    )
    return [sys.executable, "-c", program]


@contextlib.contextmanager
def demo(*flags, command=PLAIN, **options):
    """The demo as a process, and a client of it. After 30 seconds it is killed."""
    process = subprocess.Popen(
        [*command, "--port", "0", *flags],
        cwd=HERE,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **options,
    )
    alarm = threading.Timer(30, process.kill)
    alarm.start()
    try:
        url = re.search(r"http://\S+:\d+", process.stdout.readline())[0]
        process.stdout.readline()
        with httpx.Client(base_url=url, timeout=10, trust_env=False) as client:
            yield process, client
    finally:
        alarm.cancel()
        process.kill()
        process.wait()
        process.stdout.close()


def run(*flags, command=PLAIN, env=None):
    """Run the demo to its end; return its exit code and all that it has printed."""
    ended = subprocess.run(
        [*command, *flags],
        check=False,
        cwd=HERE,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=60,
    )
    return ended.returncode, ended.stdout.decode("ascii")


def interrupt(process):
    process.send_signal(signal.SIGINT)


def end(process):
    """Wait for its end; return its exit code and the rest of its output."""
    output, _ = process.communicate(timeout=20)
    assert not re.search("Traceback|ERROR|CRITICAL|Exception", output), output
    return process.returncode, output


def wait_until(condition):
    """Look again and again. If it never holds, demo() kills the server in the end."""
    while not condition():
        time.sleep(0.02)


def is_running(client, **fields):
    """Submit an e-mail, and wait until it runs. Return its path."""
    fields = {"task_type": "send_email", **fields}
    task = client.post("/tasks", json=fields).json()
    path = f"/tasks/{task['id']}"
    wait_until(lambda: client.get(path).json()["status"] == "running")
    return path


def open_stream(client, path="/events"):
    """A raw connection with the head of its answer read."""
    connection = socket.create_connection((client.base_url.host, client.base_url.port))
    connection.settimeout(10)
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
    assert connection.recv(15) == b"HTTP/1.1 200 OK"
    return connection


# -- The tour --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tour():
    """The lines of one tour, which has held."""
    code, output = run("--once", "--port", "0", "--pace", "0.1")
    assert code == 0, output
    return output.splitlines()


def test_tour_claims_something_in_every_step(tour):
    output = "\n".join(tour)
    assert len(re.findall(r"Step \d of 7\n(?:.+\n)+?   ok: ", output)) == 7
    assert "NOT SO" not in output
    assert "not shown" not in output


def test_tour_names_the_page_first(tour):
    assert re.fullmatch(r"The live page is http://127\.0\.0\.1:\d+/", tour[0])
    assert re.fullmatch(r"and the API is shown at http://.*:\d+/docs", tour[1])


def test_tour_fits_into_80_columns(tour):
    assert max(len(line) for line in tour) < 80


def test_tour_gives_each_attempt_of_a_retry_a_line_of_its_own(tour):
    ends = [line.split("attempt ")[1].strip() for line in tour if "attempt " in line]
    assert {"1, pending", "2, pending", "3, failed"} <= set(ends)


@pytest.mark.parametrize(
    "flags",
    [
        "--failure-rate 1 --max-workers 1 --max-pending 1 --backoff-base 0",
        "--max-workers 50 --ping-seconds 0.001",
        "--keep-finished 0",
        "--step",  # it waits for nobody, because there is no terminal
    ],
)
def test_tour_holds_with_unusual_settings(flags):
    code, output = run("--once", "--port", "0", "--pace", "0", *flags.split())
    assert code == 0, output
    assert "NOT SO" not in output


NO_WORK = """
t.handler("resize_image")(lambda payload, update_progress: 1 / 0)"""
NO_PRIORITY = """
submit = t.TaskQueue.submit
def in_order(queue, submission, *rest):
    medium = submission.model_copy(update={"priority": t.Priority.MEDIUM})
    return submit(queue, medium, *rest)
t.TaskQueue.submit = in_order"""


@pytest.mark.parametrize("bug", [NO_WORK, NO_PRIORITY], ids=["work", "priority"])
def test_tour_says_what_is_not_so_and_then_exits_with_1(bug):
    code, output = run("--once", "--port", "0", "--pace", "0", command=demo_with(bug))
    assert "NOT SO: " in output
    assert code == 1


# GOTCHA [trust-env]
@pytest.mark.parametrize(
    "environment",
    [
        {"ALL_PROXY": "socks5://127.0.0.1:9", "NO_PROXY": "localhost,[::1]"},
        {
            "http_proxy": "http://127.0.0.1:9",
            "SSL_CERT_FILE": "/nonexistent.pem",
            "PYTHONIOENCODING": "cp1252",
            "PYTHONUTF8": "0",
        },
    ],
    ids=["trust-env, all", "trust-env, http"],
)
def test_tour_does_not_mind_the_environment_trust_env_cp1252(environment):
    code, output = run("--once", "--port", "0", "--pace", "0", env=environment)
    assert code == 0, output


@posix_only
def test_tour_by_step_asks_and_waits_for_enter_at_a_terminal():
    import pty

    keyboard, terminal = pty.openpty()
    with demo("--once", "--step", "--pace", "0", stdin=terminal) as (process, _):
        for _ in range(7):
            output = ""
            while not output.endswith("[Enter] "):
                output += process.stdout.read(1)
            assert "predict: " in output
            os.write(keyboard, b"\n")
        code, _ = end(process)
    assert code == 0


def test_tour_ends_although_nobody_reads_what_it_prints():
    """As in `python taskqueue.py --once | head -1`."""
    with demo("--once", "--pace", "0") as (process, _):
        process.stdout.close()
        assert process.wait(20) == 0


# GOTCHA [line-separators]
def test_tour_line_separators_do_not_end_a_line():
    class Stream:
        """Of httpx.Response, what is used here."""

        def iter_text(self):
            yield "data: \u2028\x85\x0b\r"
            yield "\nid"
            yield ": 1\rdata: b\n\n"

    lines = list(taskqueue.read_lines(Stream()))
    assert lines == ["data: \u2028\x85\x0b", "id: 1", "data: b", ""]


@posix_only
@pytest.mark.parametrize(("flags", "code"), [([], 0), (["--once"], 1)])
def test_tour_is_silent_after_ctrl_c(flags, code):
    with demo("--pace", "1000", "--drain-seconds", "0", *flags) as (process, _):
        while "attempt 1" not in process.stdout.readline():
            pass
        interrupt(process)
        ended = end(process)
    assert ended[0] == code
    assert re.fullmatch(r"\nStopping: 1 running .*\n", ended[1])


# -- The server ------------------------------------------------------------------------


@posix_only
def test_ctrl_c_ends_open_streams_cleanly():
    with demo("--no-tour", "--pace", "1000", "--drain-seconds", "0") as (
        process,
        client,
    ):
        path = is_running(client)
        with (
            client.stream("GET", f"{path}/stream") as stream,
            client.stream("GET", "/events") as events,
        ):
            interrupt(process)
            assert "event: shutdown" in list(stream.iter_lines())
            assert "event: shutdown" in list(events.iter_lines())
        assert end(process)[0] == 0


@posix_only
def test_ctrl_c_says_what_is_waited_for_and_what_is_cancelled():
    flags = ["--no-tour", "--pace", "1000", "--drain-seconds", "0.1"]
    with demo(*flags, "--max-workers", "1") as (process, client):
        is_running(client)
        client.post("/tasks", json={"task_type": "send_email"})
        client.post("/tasks", json={"task_type": "send_email"})
        interrupt(process)
        _, output = end(process)
    assert "Stopping: 1 running get 0.1 s to end, 2 waiting are cancelled." in output


STUCK = """
def in_thread(): time.sleep(60)
async def deaf():
    while True:
        try: await asyncio.sleep(60)
        except asyncio.CancelledError: pass
async def in_executor():
    pool = concurrent.futures.ThreadPoolExecutor()
    await asyncio.get_running_loop().run_in_executor(pool, in_thread)
async def beside_a_thread():
    threading.Thread(target=in_thread).start()
    await asyncio.sleep(60)
ways = {
    "to_thread": lambda: asyncio.to_thread(in_thread),
    "anyio": lambda: anyio.to_thread.run_sync(in_thread),
    "executor": in_executor,
    "thread": beside_a_thread,
    "deaf": deaf,
}
@t.handler("send_email")
async def work(payload, update_progress): await ways[payload.subject]()
@t.handler("generate_report")
def work(payload, update_progress): in_thread()"""


@contextlib.contextmanager
def stuck_demo(*flags):
    """The demo, with a handler stuck in each way that Python has to offer."""
    flags = ["--no-tour", "--max-workers", "6", *flags]
    with demo(*flags, command=demo_with(STUCK)) as (process, client):
        for way in ("to_thread", "anyio", "executor", "thread", "deaf"):
            is_running(client, payload={"subject": way})
        is_running(client, task_type="generate_report")
        yield process


@posix_only
def test_ctrl_c_is_not_held_up_by_handlers_that_are_stuck():
    with stuck_demo("--drain-seconds", "0") as process:
        interrupt(process)
        code, _ = end(process)
    assert code == 0


@posix_only
def test_ctrl_c_for_the_second_time_is_not_held_up_by_them_either():
    with stuck_demo("--drain-seconds", "60") as process:
        interrupt(process)
        while "Stopping" not in process.stdout.readline():
            pass
        interrupt(process)
        code, _ = end(process)
    assert code == 128 + signal.SIGINT


@posix_only
def test_ctrl_c_does_not_wait_for_a_reader_that_has_stopped_reading():
    flags = ["--no-tour", "--pace", "0", "--failure-rate", "0", "--max-body", "2000000"]
    with demo(*flags, "--max-result", "2000000") as (process, client):
        image = {"url": "x" * 1_000_000}
        for _ in range(8):  # more than the buffers on the way can hold
            client.post("/tasks", json={"task_type": "resize_image", "payload": image})
        wait_until(lambda: client.get("/health").json()["tasks"]["completed"] == 8)
        with open_stream(client):
            interrupt(process)
            assert end(process)[0] == 0


@posix_only
def test_ctrl_c_does_not_wait_for_half_a_request():
    with demo("--no-tour") as (process, client):
        address = (client.base_url.host, client.base_url.port)
        with socket.create_connection(address) as half:
            half.sendall(
                b"POST /tasks HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{"
            )
            client.get("/health")
            interrupt(process)
            assert end(process)[0] == 0


@posix_only
def test_terminate_goes_the_same_way():
    with demo("--no-tour", "--pace", "1000", "--drain-seconds", "0") as (
        process,
        client,
    ):
        is_running(client)
        process.send_signal(signal.SIGTERM)
        code, output = end(process)
    assert "Stopping: 1 running" in output
    assert code in (0, -signal.SIGTERM)


def test_server_that_is_told_to_stop_ends_its_streams_and_not_the_process():
    """As in a notebook: the server in a thread, and no signal."""
    app = taskqueue.create_app()
    config = uvicorn.Config(app, port=0, log_level="warning")
    server = taskqueue.Server(config, app)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    with httpx.stream("GET", f"http://127.0.0.1:{port}/events") as events:
        server.should_exit = True
        assert "event: shutdown" in list(events.iter_lines())
    thread.join(10)
    assert not thread.is_alive()


# GOTCHA [forty-milliseconds]
def test_answers_come_without_forty_milliseconds_of_delay():
    with demo("--no-tour") as (_, client):
        seconds = []
        for _ in range(20):
            began = time.perf_counter()
            client.get("/health")
            seconds.append(time.perf_counter() - began)
    assert sorted(seconds)[10] < 0.03


# GOTCHA [pipelined-behind-a-stream]
def test_pipelined_behind_a_stream_a_request_does_not_keep_its_watcher():
    with demo("--no-tour", "--ping-seconds", "0.1") as (_, client):
        with open_stream(client) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: test\r\n\r\n")
            wait_until(lambda: client.get("/health").json()["watchers"] == 1)
        wait_until(lambda: client.get("/health").json()["watchers"] == 0)


def test_without_a_tour_the_requests_are_logged():
    with demo("--no-tour") as (process, client):
        client.get("/health")
        while "GET /health 200" not in process.stdout.readline():
            pass


# -- The handler with a bug on purpose -------------------------------------------------


@pytest.mark.anyio
async def test_blocking_handler_blocks_only_if_it_is_asked_to(monkeypatch):
    blocked = []
    monkeypatch.setattr(time, "sleep", blocked.append)
    taskqueue.current_settings.set(Settings(pace=0, failure_rate=0))
    handlers = {TaskType.RESIZE_IMAGE: taskqueue.resize_that_may_block}
    for payload in ({}, {"block_the_loop": False}, {"block_the_loop": True}):
        await taskqueue.process_task(
            TaskType.RESIZE_IMAGE, {"width": 7, **payload}, lambda _: None, handlers
        )
    assert blocked == [3]


# -- The flags -------------------------------------------------------------------------


def test_port_in_use_is_one_clear_line_and_exit_1():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, output = run("--port", str(taken.getsockname()[1]))
    assert code == 1
    assert output.startswith("Can't listen on 127.0.0.1:")
    assert output.count("\n") == 1


@pytest.mark.parametrize(
    "address", [["--port", "70000"], ["--port", "-1"], ["--host", "a..b"]]
)
def test_address_that_is_none_is_one_clear_line_and_exit_1(address):
    code, output = run(*address)
    assert code == 1
    assert output.startswith("Can't listen on ")
    assert output.count("\n") == 1


@pytest.mark.skipif(not socket.has_ipv6, reason="there is no IPv6")
def test_host_can_be_of_ipv6():
    code, output = run("--once", "--port", "0", "--host", "::1", "--pace", "0")
    assert code == 0
    assert "http://[::1]:" in output


def exit_code(monkeypatch, *flags):
    """Call main() with these flags, in this process. Return what it exits with."""
    monkeypatch.setattr(sys, "argv", ["taskqueue.py", *flags])
    with pytest.raises(SystemExit) as ended:
        taskqueue.main()
    return ended.value.code


@pytest.mark.parametrize(
    "flags",
    [
        ["--max-workers", "0"],
        ["--max-workers", "many"],
        ["--pace", "nan"],
        ["--failure-rate", "2"],
        ["--max-workres", "3"],
    ],
    ids=" ".join,
)
def test_bad_value_is_one_clear_line_and_exit_2(flags, monkeypatch, capsys):
    assert exit_code(monkeypatch, "--port", "0", *flags) == 2
    usage, error = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: ")
    assert flags[0].removeprefix("--") in error.replace("_", "-")


def test_help_has_a_flag_for_each_setting_with_its_default(monkeypatch, capsys):
    assert exit_code(monkeypatch, "--help") == 0
    output = capsys.readouterr().out
    for name, info in Settings.model_fields.items():
        flag = "--" + name.replace("_", "-")
        assert re.search(
            rf"{flag}\b.*?\(default:\s+{info.default}\)", output, re.DOTALL
        )


def test_older_python_gets_one_clear_line():
    pretend = (
        "import sys; sys.version_info = (3, 10, 9); sys.version = '3.10.9 (main)'\n"
        "import taskqueue"
    )
    code, output = run(command=[sys.executable, "-c", pretend])
    assert code == 1
    assert "3.11" in output
    assert output.count("\n") == 1
