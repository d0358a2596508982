"""Model-based test of the queue, on a virtual clock.

Hypothesis calls everything in any order; the model judges.

    python .ci/model/machine.py [--seed N] [--runs N] [--steps N] [--no-shrink]

The same seed gives the same run. On a failure hypothesis prints the shortest sequence
of calls that it could find.
"""

import argparse
import asyncio
import functools
import gc
import itertools
import json
import logging
import math
import queue as thread_queue
import random
import sys
import threading
from collections.abc import Callable, Coroutine
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import taskqueue
from clock import VirtualLoop
from model import Ended, Manner, Model, ModelTask
from readers import EventsReader, Reader, totals
from taskqueue import (
    FINAL,
    DoNotRetry,
    Settings,
    Status,
    TaskQueue,
    TaskRecord,
    TaskStatus,
    TaskStore,
    TaskSubmission,
    TaskType,
)

PATIENCE = 20  # real seconds until a thread that doesn't answer is a failure
IN_THREAD = TaskType.GENERATE_REPORT  # the handler of this type is a plain `def`


# ======================================================================================
# Handlers that do as they are told


class Says:
    """Equal to any text with these words in it.

    An error has to name its cause. How it puts it is its own affair.
    """

    def __init__(self, *words: str) -> None:
        self.words = words

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and all(word in other for word in self.words)

    def __hash__(self) -> int:
        return 0

    def __repr__(self) -> str:
        return f"Says{self.words}"


class Awkward(Exception):
    """Can't be shown."""

    def __str__(self) -> str:
        raise SystemExit("no text for you")


def deep(levels: int) -> list[Any]:
    """Lists in lists."""
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def circular() -> list[Any]:
    """A list that is in itself."""
    value: list[Any] = []
    value.append(value)
    return value


GOOD_RESULTS: list[tuple[Any, Any]] = [
    (None, None),
    (0, 0),
    ("", ""),
    ({"a": [1, 2.5, True, None]}, {"a": [1, 2.5, True, None]}),
    ((1, 2), [1, 2]),
    (Status.PENDING, "pending"),
    (deep(50), deep(50)),
    ("\x00\u2028é", "\x00\u2028é"),
]
BAD_RESULTS: list[Callable[[], Any]] = [
    object,
    itertools.count,
    lambda: float("nan"),
    lambda: {"x": float("inf")},
    lambda: "\ud800",
    lambda: deep(5000),
    circular,
    lambda: 10**5000,
    lambda: {"\udfff": 1},
    lambda: {1: "x"},
    lambda: {"a", "set"},
    lambda: b"\xff",
    lambda: "x" * 70_000,
]
CANT_RETRY = (Says("DoNotRetry", "useless"), False)
ERRORS: list[tuple[Callable[[], BaseException], tuple[Says, bool]]] = [
    (lambda: ValueError("no"), (Says("ValueError: no (machine.py:"), True)),
    (lambda: TimeoutError("theirs"), (Says("TimeoutError", "theirs"), True)),
    (lambda: asyncio.CancelledError("mine"), (Says("CancelledError", "mine"), True)),
    (lambda: KeyboardInterrupt("k"), (Says("KeyboardInterrupt", "k"), True)),
    (lambda: ValueError("\ud800"), (Says("ValueError"), True)),
    # Python makes a RuntimeError of it.
    (lambda: StopIteration(1), (Says("RuntimeError"), True)),
    (SystemExit, (Says("SystemExit"), True)),
    (RecursionError, (Says("RecursionError"), True)),
    (GeneratorExit, (Says("GeneratorExit"), True)),
    (Awkward, (Says("Awkward"), True)),
    (lambda: DoNotRetry("useless"), CANT_RETRY),
    (lambda: ExceptionGroup("g", [OSError(1), DoNotRetry("useless")]), CANT_RETRY),
]
PERCENTS = (0, 1, 49.9, 50, 99, 100, 100.00000000000001, Fraction(1, 3), Decimal("7.5"))
NONSENSE = (-1, 101, float("nan"), float("inf"), "50", None, True, 100.1, 1j, 10**400)


class Attempt:
    """One call of a handler, and the way to tell it what to do next."""

    def __init__(self, task: ModelTask, update_progress: taskqueue.Reporter) -> None:
        self.task = task
        self.update_progress = update_progress
        self.thread = threading.current_thread()
        self.inbox: asyncio.Queue[Order] = asyncio.Queue()
        self.thread_inbox: thread_queue.SimpleQueue[Order] = thread_queue.SimpleQueue()
        self.answers: thread_queue.SimpleQueue[None] = thread_queue.SimpleQueue()
        self.over = False


Order = Callable[[Attempt], Any]


class Carry(Exception):
    """Takes a result, or an error, out of the loop of a scripted handler."""

    def __init__(self, value: Any = None, error: BaseException | None = None) -> None:
        self.value = value
        self.error = error

    def deliver(self) -> Any:
        """Return the one, or raise the other."""
        if self.error is not None:
            raise self.error
        return self.value


# ======================================================================================
# The queue under test, with a witness


class WitnessedStore(TaskStore):
    """The store itself. Each of its moves is shown to the model when it is made."""

    machine: "QueueMachine"

    def move(self, record: TaskRecord, status: Status) -> None:
        """Move, and show."""
        left_behind = record.asyncio_task is not None and status is not Status.RUNNING
        super().move(record, status)
        totals[f"→ {status}"] += 1
        self.machine.witness(self.machine.moved, record, left_behind)

    def changed(self, record: TaskRecord) -> None:
        """Change, in the one thread that may."""
        thread = threading.current_thread()
        assert thread is threading.main_thread(), "a change from another thread"
        super().changed(record)


class WitnessedQueue(TaskQueue):
    """The queue itself. Each of its choices is shown to the model when it is made."""

    machine: "QueueMachine"

    def _attempt(self, record: TaskRecord) -> Coroutine[Any, Any, None]:
        self.machine.witness(self.machine.chosen, record)
        return super()._attempt(record)


def watch_backoff(
    original: Callable[[int, Settings], float], machine: "QueueMachine"
) -> Callable[[int, Settings], float]:
    """Tell the model how long a backoff will be."""

    def backoff_delay(attempt: int, settings: Settings) -> float:
        delay = original(attempt, settings)
        longest = settings.backoff_base * 2 ** (attempt - 1)
        assert 0 <= delay <= min(settings.backoff_cap, longest)
        assert machine.last_moved.status == "pending"
        machine.last_moved.ready_at = machine.loop.time() + delay
        return delay

    return backoff_delay


class Joiner:
    """Waits in join()."""

    def __init__(self, loop: VirtualLoop, queue: TaskQueue) -> None:
        self.idle_seen = False  # since it began, there was a moment without work
        self.job = loop.create_task(queue.join())


PICK = st.integers(0, 30)
MANNERS: tuple[Manner, ...] = (
    "polite",
    "polite",
    "stubborn",
    "relents",
    "returns",
    "raises",
)
SUBMISSIONS = st.fixed_dictionaries(
    {
        "task_type": st.sampled_from(list(TaskType)),
        "priority": st.sampled_from([1, 5, 10]),
        "max_retries": st.sampled_from([0, 0, 1, 2, 10]),
        "timeout": st.sampled_from([0.25, 1.0, 60.0, 60.0, 3600.0]),
        "delay": st.sampled_from([0.0, 0.0, 0.0, 0.1, 5.0, 3600.0, 86_400.0]),
        "manner": st.sampled_from(MANNERS),
    }
)
ACTIONS = st.one_of(
    st.tuples(st.just("submit"), SUBMISSIONS),
    st.tuples(st.just("cancel"), PICK, st.booleans()),
    st.tuples(st.just("progress"), PICK, st.sampled_from(PERCENTS)),
    st.tuples(st.just("return"), PICK, st.sampled_from(range(len(GOOD_RESULTS)))),
    st.tuples(st.just("raise"), PICK, st.sampled_from(range(len(ERRORS)))),
)


class QueueMachine(RuleBasedStateMachine):
    """Each rule is something that a client, a handler, the clock or the server does."""

    # -- the world

    def __init__(self) -> None:
        super().__init__()
        self.loop = VirtualLoop()
        self.loop.after_iteration = self.after_iteration
        self.handlers: dict[TaskType, taskqueue.Handler] = {}
        for task_type in TaskType:
            self.handlers[task_type] = self.obey
        self.handlers[IN_THREAD] = self.obey_in_thread
        self.numbers = 0
        self.by_number: dict[int, ModelTask] = {}
        self.attempts: dict[ModelTask, Attempt] = {}  # the current one of each task
        self.over: list[Attempt] = []
        self.left_behind: list[Attempt] = []
        self.begun: thread_queue.SimpleQueue[Attempt] = thread_queue.SimpleQueue()
        self.threads_started = 0
        self.threads_begun = 0
        self.ambushes: dict[int, str] = {}  # by number: when to cancel the task
        self.readers: list[Reader | EventsReader] = []
        self.joiners: list[Joiner] = []
        self.exiting: asyncio.Task[None] | None = None
        self.warnings: list[str] = []
        self.objections: list[AssertionError] = []  # of the model
        self.abandoned = False  # after a failure
        self.patch()
        self.log = logging.Handler(logging.WARNING)
        self.log.emit = self.note_warning  # type: ignore[method-assign]
        taskqueue.logger.addHandler(self.log)

    def note_warning(self, record: logging.LogRecord) -> None:
        """Keep what is logged."""
        self.warnings.append(record.getMessage())

    def patch(self) -> None:
        """Put our witnesses into the module, and make what is large there small."""
        names = ("TaskStore", "backoff_delay", "run_in_thread", "NEWS", "PIECE")
        names += ("forget_frames",)
        self.originals = {name: getattr(taskqueue, name) for name in names}
        WitnessedStore.machine = self
        WitnessedQueue.machine = self
        taskqueue.TaskStore = WitnessedStore  # type: ignore[misc]
        taskqueue.backoff_delay = watch_backoff(taskqueue.backoff_delay, self)
        taskqueue.run_in_thread = self.counting(taskqueue.run_in_thread)
        taskqueue.NEWS = 3
        taskqueue.PIECE = 700  # two frames, or one

    @initialize(
        max_workers=st.integers(1, 4),
        max_pending=st.integers(1, 12),
        keep_finished=st.integers(0, 6),
        drain_seconds=st.sampled_from([0.0, 1.0, 5.0]),
        backoff=st.sampled_from([(0.0, 30.0), (0.5, 30.0), (3600.0, 1e6)]),
    )
    def enter(
        self,
        max_workers: int,
        max_pending: int,
        keep_finished: int,
        drain_seconds: float,
        backoff: tuple[float, float],
    ) -> None:
        """Start a queue."""
        chosen = Settings(
            max_workers=max_workers,
            max_pending=max_pending,
            keep_finished=keep_finished,
            drain_seconds=drain_seconds,
            backoff_base=backoff[0],
            backoff_cap=backoff[1],
        )
        self.model = Model(
            max_workers,
            max_pending,
            keep_finished,
            drain_seconds,
            TaskQueue.GRACE_SECONDS,
        )
        self.queue = WitnessedQueue(chosen, self.handlers)
        self.store = self.queue.store
        self.exiting = None
        self.run(self.queue.__aenter__())

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine that ends without the clock moving."""
        job = self.loop.create_task(coroutine)
        self.loop.settle()
        return job.result()

    def counting(
        self, original: Callable[[Any], Coroutine[Any, Any, Any]]
    ) -> Callable[[Any], Coroutine[Any, Any, Any]]:
        """Count the threads that are started."""

        async def run_in_thread(function: Any) -> Any:
            self.threads_started += 1
            return await original(function)

        return run_in_thread

    def witness(self, look: Callable[..., None], *args: Any) -> None:
        """Let the model judge. The queue may swallow what it raises; we don't."""
        try:
            look(*args)
        except AssertionError as objection:
            self.objections.append(objection)
            raise

    def after_iteration(self) -> None:
        """Raise what the model has to say.

        Wait until each thread has reported to us: then it waits for its orders.
        """
        if self.objections:
            raise self.objections[0]
        while self.threads_begun < self.threads_started:
            self.begun.get(timeout=PATIENCE)
            self.threads_begun += 1

    def task_of(self, record: TaskRecord) -> ModelTask:
        """What the model calls this one."""
        return self.by_number[json.loads(record.payload_json)["n"]]

    def chosen(self, record: TaskRecord) -> None:
        """The worker loop has taken a task."""
        task = self.task_of(record)
        self.model.choose(task, self.loop.time())
        self.spring_ambush(task, "chosen")

    def moved(self, record: TaskRecord, left_behind: bool) -> None:
        """A task has moved."""
        if self.abandoned:
            return
        task = self.task_of(record)
        self.last_moved = task
        result = json.loads(record.result_json)
        now = self.loop.time()
        self.model.accept(task, str(record.status), result, record.error, now)
        self.model.check()
        self.look_for_idleness()
        if record.status is Status.RUNNING:
            self.spring_ambush(task, "started")
        elif attempt := self.attempts.pop(task, None):
            self.over.append(attempt)
            if left_behind:
                self.left_behind.append(attempt)

    def spring_ambush(self, task: ModelTask, moment: str) -> None:
        """Cancel the task in the next turn, if that was planned for this moment."""
        if self.ambushes.get(task.number) == moment:
            del self.ambushes[task.number]
            totals[f"cancelled when just {moment}"] += 1
            self.loop.call_soon(self.do_cancel, task, True)

    def look_for_idleness(self) -> None:
        """Tell all who join that there is no work, if that is so."""
        if not self.model.having("pending") and not self.model.having("running"):
            for joiner in self.joiners:
                joiner.idle_seen = True

    # -- the handlers

    def begin(self, payload: Any, update_progress: taskqueue.Reporter) -> Attempt:
        """An attempt begins. Its payload is its own: the next must see no change."""
        task = self.by_number[payload.model_extra["n"]]
        assert task.payload == payload.model_extra, "the handler sees what was sent"
        payload.model_extra["deep"][0]["er"] = "spoiled"
        attempt = Attempt(task, update_progress)
        self.attempts[task] = attempt
        return attempt

    async def obey(self, payload: Any, update_progress: taskqueue.Reporter) -> Any:
        """The handler of most task types."""
        attempt = self.begin(payload, update_progress)
        task = attempt.task
        while True:
            try:
                order = await attempt.inbox.get()
            except asyncio.CancelledError:
                task.interruptions += 1
                if self.abandoned:
                    raise
                if task.interruptions < task.patience:
                    continue
                if task.manner == "returns":
                    return "too late"
                if task.manner == "raises":
                    raise OSError("while cleaning up") from None
                raise
            try:
                order(attempt)
            except Carry as carry:
                return carry.deliver()

    def obey_in_thread(self, payload: Any, update_progress: taskqueue.Reporter) -> Any:
        """The handler of one task type."""
        attempt = self.begin(payload, update_progress)
        self.begun.put(attempt)
        while True:
            order = attempt.thread_inbox.get()
            try:
                order(attempt)
            except Carry as carry:
                attempt.answers.put(None)
                return carry.deliver()
            attempt.answers.put(None)

    def tell(self, attempt: Attempt, order: Order, last: bool = False) -> None:
        """Give an order.

        A thread has carried it out when this returns. If it was its last, it has ended.
        """
        if not attempt.task.in_thread:
            attempt.inbox.put_nowait(order)
            return
        attempt.thread_inbox.put(order)
        attempt.answers.get(timeout=PATIENCE)
        if last or attempt.over:
            attempt.thread.join(PATIENCE)
            assert not attempt.thread.is_alive()

    def finish(self, attempt: Attempt, carry: Carry, ended: Ended) -> None:
        """Let the handler end."""

        def order(attempt: Attempt) -> None:
            attempt.task.ended = ended
            attempt.over = True
            raise carry

        self.tell(attempt, order, last=True)

    # -- what is done, and what the model expects of it: to be called inside the loop

    def do(self, action: tuple[Any, ...]) -> None:
        """Do one of ACTIONS."""
        match action:
            case "submit", fields:
                self.do_submit(fields)
            case "cancel", pick, force:
                if task := self.pick_task(pick):
                    self.do_cancel(task, force)
            case "progress", pick, percent:
                if attempt := self.pick_attempt(pick):
                    self.do_progress(attempt, percent)
            case "return", pick, number:
                if attempt := self.pick_attempt(pick):
                    value, expected = GOOD_RESULTS[number]
                    self.finish(attempt, Carry(value), Ended(expected, None))
            case "raise", pick, number:
                if attempt := self.pick_attempt(pick):
                    make, (text, retry) = ERRORS[number]
                    ended = Ended(None, text, retry)
                    self.finish(attempt, Carry(error=make()), ended)

    def do_submit(
        self, fields: dict[str, Any], key: str | None = None, ambush: str = ""
    ) -> None:
        """Submit a task, or be refused."""
        self.numbers += 1
        wanted = {**fields}
        manner = wanted.pop("manner")
        task = ModelTask(
            number=self.numbers,
            task_type=str(wanted["task_type"]),
            priority=wanted["priority"],
            payload={"n": self.numbers, "manner": manner, "deep": [{"er": 1}]},
            max_retries=wanted["max_retries"],
            timeout=wanted["timeout"],
            manner=manner,
            key=key,
            request_id=f"r-{self.numbers}",
            ready_at=self.loop.time() + wanted["delay"],
            in_thread=wanted["task_type"] is IN_THREAD,
        )
        self.by_number[self.numbers] = task
        submission = TaskSubmission(payload=task.payload, **wanted)
        submit = functools.partial(self.queue.submit, submission, task.request_id, key)
        waiting = len(self.model.having("pending"))
        if key and key in self.model.keys:  # the payload has another number
            self.expect(taskqueue.IdempotencyKeyReused, submit)
        elif self.store.closed:
            self.expect(taskqueue.QueueStopped, submit)
        elif waiting >= self.model.max_pending:
            self.expect(taskqueue.QueueFull, submit)
        else:
            status = submit()
            assert status.status is Status.PENDING
            assert status.attempt == status.progress == 0
            task.id = status.id
            self.model.submit(task)
            self.ambushes[task.number] = ambush
            if key:
                self.repeat(task, wanted, key)

    def repeat(self, task: ModelTask, wanted: dict[str, Any], key: str) -> None:
        """The same submission again, in another order: it is the same task."""
        payload = dict(reversed(task.payload.items()))
        again = TaskSubmission(payload=payload, **wanted)
        status = self.queue.submit(again, "another", key)
        assert status.id == task.id
        assert status.request_id == task.request_id

    def do_cancel(self, task: ModelTask, force: bool) -> None:
        """Cancel a task, or be refused."""
        cancel = functools.partial(self.queue.cancel, task.id, force)
        if task.id not in self.model.tasks:
            self.expect(taskqueue.TaskNotFound, cancel)
        elif task.status == "pending":
            task.cancels += 1
            assert cancel().status is Status.CANCELLED
        elif task.status == "running" and force:
            task.cancels += 1
            assert cancel().status is Status.RUNNING
        else:
            error = self.expect(taskqueue.TaskNotCancellable, cancel)
            assert task.status in str(error)

    def do_progress(self, attempt: Attempt, percent: Any) -> None:
        """Let a handler report its progress."""
        task = attempt.task
        was_quiet = self.loop.is_quiet

        def order(attempt: Attempt) -> None:
            try:
                attempt.update_progress(percent)
            except asyncio.CancelledError as error:
                assert task.in_thread, "an update_progress awaits nothing"
                assert task.told_to_stop, "nobody has asked this attempt to stop"
                if task.manner == "polite":
                    task.ended = Ended(None, Says("CancelledError", "asked to stop"))
                    attempt.over = True
                    raise Carry(error=error) from None
            else:
                must_raise = task.in_thread and task.told_to_stop and was_quiet
                assert not must_raise, "it was asked to stop"
                if task.status == "running":
                    whole = math.floor(float(percent) + 1e-9)
                    task.progress = max(task.progress, whole)

        self.tell(attempt, order)

    def expect(self, error: type[Exception], call: Callable[[], Any]) -> Exception:
        """Call it: it must raise that."""
        try:
            call()
        except error as caught:
            totals[error.__name__] += 1
            return caught
        raise AssertionError(f"no {error.__name__}")

    def pick_task(self, pick: int) -> ModelTask | None:
        """Any task, or one that was evicted."""
        known = [*self.model.evicted[-3:], *self.model.tasks.values()]
        if not known:
            return None
        return known[-1 - pick % len(known)]

    def pick_attempt(self, pick: int) -> Attempt | None:
        """Any attempt that runs."""
        running = [each for each in self.attempts.values() if not each.over]
        if not running:
            return None
        return running[pick % len(running)]

    # -- the rules

    @rule(
        fields=SUBMISSIONS,
        key=st.sampled_from([None, None, "a", "b"]),
        ambush=st.sampled_from(["", "", "", "", "chosen", "started"]),
    )
    def submit(self, fields: dict[str, Any], key: str | None, ambush: str) -> None:
        self.loop.call(lambda: self.do_submit(fields, key, ambush))
        self.loop.settle()

    @rule(action=ACTIONS)
    def act(self, action: tuple[Any, ...]) -> None:
        self.loop.call(lambda: self.do(action))
        self.loop.settle()

    @rule(actions=st.lists(ACTIONS, min_size=2, max_size=5))
    def act_at_once(self, actions: list[tuple[Any, ...]]) -> None:
        """Several things in one turn of the loop."""

        def do_all() -> None:
            for action in actions:
                self.do(action)

        self.loop.call(do_all)
        self.loop.settle()

    @rule(action=ACTIONS, turns=st.integers(0, 6))
    def act_and_interrupt(self, action: tuple[Any, ...], turns: int) -> None:
        """Whatever comes next comes in the middle of this."""
        self.loop.call(lambda: self.do(action))
        for _ in range(turns):
            self.loop.iterate()

    @precondition(lambda self: not self.store.closed)
    @rule(fields=SUBMISSIONS, count=st.sampled_from([5, 200]))
    def submit_and_cancel_all_day(self, fields: dict[str, Any], count: int) -> None:
        """The workers are busy, so nothing is taken from the heap."""
        busy = {**fields, "priority": 1, "delay": 0.0, "timeout": 3600.0}
        for _ in range(self.model.max_workers):
            self.loop.call(lambda: self.do_submit(busy))
        self.loop.settle()

        def submit_and_cancel() -> None:
            before = self.model.submitted
            self.do_submit(fields)
            if self.model.submitted > before:
                self.do_cancel(self.by_number[self.numbers], force=False)

        for _ in range(count):
            self.loop.call(submit_and_cancel)

    @rule(pick=PICK, make=st.sampled_from(BAD_RESULTS))
    def return_what_json_cannot_carry(self, pick: int, make: Callable[[], Any]) -> None:
        """It fails at once, without a retry."""
        if attempt := self.pick_attempt(pick):
            ended = Ended(None, Says("BadResult"), retry=False)
            self.loop.call(lambda: self.finish(attempt, Carry(make()), ended))
            self.loop.settle()

    @rule(pick=PICK, percent=st.sampled_from(NONSENSE))
    def report_nonsense(self, pick: int, percent: Any) -> None:
        """It is refused, in the handler."""
        attempt = self.pick_attempt(pick)
        if attempt is None:
            return
        refused: list[bool] = []

        def order(attempt: Attempt) -> None:
            try:
                attempt.update_progress(percent)
                refused.append(False)
            except (ValueError, asyncio.CancelledError):
                refused.append(True)

        self.loop.call(lambda: self.tell(attempt, order))
        self.loop.settle()
        assert all(refused)

    @rule(pick=PICK)
    def report_after_the_end(self, pick: int) -> None:
        """It changes nothing."""
        if self.over:
            late = self.over[-1 - pick % len(self.over)]

            def report() -> None:
                try:
                    late.update_progress(50)
                except asyncio.CancelledError:
                    assert late.task.in_thread

            self.loop.call(report)

    @rule(seconds=st.sampled_from([0.01, 0.06, 0.3, 1.0, 7.0, 60.0, 3600.0, 100_000.0]))
    def let_time_pass(self, seconds: float) -> None:
        self.loop.advance(seconds)

    @rule()
    def let_the_next_timer_fire(self) -> None:
        self.loop.settle()
        due = self.loop.next_timer
        if due < math.inf:
            self.loop.advance_to(due)

    @rule(
        pick=PICK,
        slow=st.booleans(),
        since=st.sampled_from(["", "", "present", "older", "future", "junk"]),
    )
    def watch(self, pick: int, slow: bool, since: str) -> None:
        """Open the stream of a task."""
        task = self.pick_task(pick)
        if task is None:
            return
        if task.id not in self.model.tasks:
            watch = functools.partial(self.queue.watch, task.id)
            self.loop.peek(lambda: self.expect(taskqueue.TaskNotFound, watch))
            return
        version = self.store.by_id[task.id].version
        last = {
            "": 0,
            "present": version,
            "older": version - 1,
            "future": version + 10**9,
            "junk": -7,
        }
        reader = Reader(self.loop, self.queue, task.id, last[since], slow)
        self.readers.append(reader)

    @rule(
        slow=st.booleans(),
        since=st.sampled_from(["", "present", "older", "old", "future", "earlier"]),
    )
    def watch_all(self, slow: bool, since: str) -> None:
        """Open the stream of all tasks."""
        self.loop.settle()
        last = {
            "": 0,
            "present": self.store.version,
            "older": self.store.version - 4,
            "old": self.store.life + 1,
            "future": self.store.version + 10**9,
            "earlier": self.store.life - 5,  # of an earlier life
        }
        reader = EventsReader(self.loop, self.queue, last[since], slow)
        self.readers.append(reader)
        self.loop.settle()

    @precondition(lambda self: self.readers)
    @rule(pick=PICK)
    def read_on(self, pick: int) -> None:
        self.readers[pick % len(self.readers)].permits.release()
        self.loop.settle()

    @precondition(lambda self: self.readers)
    @rule(pick=PICK)
    def hang_up(self, pick: int) -> None:
        reader = self.readers.pop(pick % len(self.readers))
        reader.job.cancel()
        self.loop.settle()

    @rule(pick=PICK)
    def hang_up_before_the_stream_begins(self, pick: int) -> None:
        task = self.pick_task(pick)
        if task is not None and task.id in self.model.tasks:
            self.loop.peek(lambda: self.queue.watch(task.id))
            taskqueue.all_frames(self.queue, 0)

    @precondition(lambda self: len(self.joiners) < 3)
    @rule()
    def join(self) -> None:
        """Wait until there is no work."""
        self.joiners.append(Joiner(self.loop, self.queue))
        self.look_for_idleness()

    @rule(
        status=st.sampled_from([None, *Status]),
        limit=st.integers(1, 5),
        offset=st.integers(0, 8),
    )
    def page(self, status: Status | None, limit: int, offset: int) -> None:
        """List tasks."""
        list_tasks = functools.partial(self.queue.list_tasks, status, limit, offset)
        page, total = self.loop.peek(list_tasks)
        wanted = self.model.newest_first(status)
        assert total == len(wanted)
        expected = [task.id for task in wanted[offset : offset + limit]]
        assert [status.id for status in page] == expected

    @precondition(lambda self: self.model.submitted > 6)
    @rule(chance=st.integers(0, 4))
    def hear_the_signal(self, chance: int) -> None:
        """What the server does when it is told to stop. The lifespan ends later."""
        if chance == 0:
            self.loop.call(self.queue.begin_shutdown)
            self.loop.settle()

    @precondition(lambda self: self.exiting is None and self.model.submitted > 6)
    @rule(chance=st.integers(0, 2))
    def begin_to_stop(self, chance: int) -> None:
        if chance == 0:
            self.loop.settle()
            totals["stops"] += 1
            self.begin_exit()
            self.loop.settle()

    def begin_exit(self) -> None:
        """The lifespan ends."""
        self.exiting = self.loop.create_task(self.queue.__aexit__(None, None, None))
        self.model.begin_exit(self.loop.time())
        self.exiting.add_done_callback(self.note_exit)

    @precondition(lambda self: self.exiting and not self.exiting.done())
    @rule()
    def cancel_the_stop(self) -> None:
        """A second Ctrl-C, or an anyio scope: again and again."""
        self.loop.settle()
        if self.exiting and not self.exiting.done():
            totals["stops cancelled"] += 1
            self.model.cancel_exit(self.loop.time())
            self.loop.call(self.exiting.cancel)
            self.loop.settle()

    def note_exit(self, exiting: "asyncio.Task[None]") -> None:
        """The stop has ended."""
        if not exiting.cancelled():
            exiting.result()
        self.model.exit_ended = self.loop.time()

    @precondition(lambda self: self.model.exit_ended is not None)
    @rule(bounds=st.tuples(st.integers(1, 4), st.integers(1, 12), st.integers(0, 6)))
    def start_again(self, bounds: tuple[int, int, int]) -> None:
        totals["restarts"] += 1
        self.retire()
        self.enter(*bounds, 1.0, (0.5, 30.0))

    # -- the invariants

    @invariant()
    def holds_at_every_moment(self) -> None:
        totals["steps"] += 1
        assert not self.loop.errors, self.loop.errors
        self.model.check()
        assert self.store.submitted == self.model.submitted
        assert self.store.evicted == len(self.model.evicted)
        for status in Status:
            assert len(self.store.by_status[status]) == len(self.model.having(status))

    @invariant()
    def holds_when_all_is_quiet(self) -> None:
        if not self.loop.is_quiet:
            return
        totals["quiet moments"] += 1
        self.model.check_quiet(self.loop.time())
        self.loop.peek(self.check_statuses)
        for reader in self.readers:
            reader.check_quiet()
        self.check_joiners()
        live = sum(reader.begun and not reader.ended for reader in self.readers)
        waiting = sum(not (each.begun or each.ended) for each in self.readers)
        if self.store.watchers not in range(live, live + waiting + 1):
            gc.collect()  # a generator in a reference cycle is closed only then
            self.loop.settle()
        assert live <= self.store.watchers <= live + waiting
        assert set(self.store.by_key) == set(self.model.keys)
        self.check_heap_and_slots()
        self.check_exit()

    def check_statuses(self) -> None:
        """What the queue tells of each task is what the model knows."""
        shown = self.queue.list_tasks(None, 1000)[0]
        for task, status in zip(self.model.newest_first(None), shown, strict=True):
            self.compare(task, status)
            assert self.queue.get_task(task.id) == status

    def compare(self, task: ModelTask, status: TaskStatus) -> None:
        """One task."""
        names = ("id", "task_type", "priority", "payload", "status", "progress")
        names += ("attempt", "max_retries", "result", "error", "request_id")
        for name in names:
            shown, known = getattr(status, name), getattr(task, name)
            assert shown == known, f"{name}: {shown!r}, not {known!r}"
        assert (status.completed_at is not None) == (status.status in FINAL)
        assert (status.started_at is not None) == (status.attempt > 0)

    def check_joiners(self) -> None:
        """Who joins returns when there is no work, and not before."""
        self.look_for_idleness()
        idle = not self.model.having("pending") and not self.model.having("running")
        for joiner in list(self.joiners):
            assert joiner.job.done() or not idle, "join() hangs"
            if joiner.job.done():
                joiner.job.result()
                assert joiner.idle_seen, "join() has returned too early"
                totals["joined"] += 1
                self.joiners.remove(joiner)

    def check_heap_and_slots(self) -> None:
        """No slot is lost, and no heap of dead entries grows."""
        if self.exiting:
            return
        running = len(self.model.having("running"))
        free = self.queue._slots._value  # type: ignore[attr-defined]
        # The worker loop holds one while it waits for a task.
        assert free == max(0, self.model.max_workers - running - 1), "a slot was lost"
        length = self.queue._heap.qsize()
        assert length <= 101 + 3 * self.model.max_pending, "the heap grows"

    def check_exit(self) -> None:
        """The stop takes its time, and no more."""
        began = self.model.exit_began
        if began is None:
            return
        if self.model.exit_ended is None:
            assert self.loop.time() < self.model.left_behind_at, "the stop hangs"
            assert self.model.having("running"), "the stop waits for nothing"
        else:
            assert began <= self.model.exit_ended <= self.model.left_behind_at

    # -- the end

    def stop(self) -> None:
        """Stop the queue, if nobody has."""
        self.loop.settle()
        if self.exiting is None:
            self.begin_exit()
        patience = self.model.drain_seconds + self.model.grace_seconds
        self.loop.advance(patience + 0.01)
        self.holds_at_every_moment()
        self.holds_when_all_is_quiet()
        assert self.model.exit_ended is not None

    def retire(self) -> None:
        """Release what a stopped queue has left behind: this changes nothing more."""
        self.end_readers()
        versions = self.versions()
        for attempt in self.left_behind:
            totals["left behind"] += 1
            self.loop.call(functools.partial(self.do_progress, attempt, 77))
            self.loop.settle()
            if not attempt.over:
                ended = Ended(None, None)
                self.loop.call(functools.partial(self.finish, attempt, Carry(), ended))
            self.loop.settle()
        assert versions == self.versions(), "a final state has changed"
        said = sum("left behind" in line for line in self.warnings)
        assert said == len(self.left_behind)
        self.holds_at_every_moment()
        self.holds_when_all_is_quiet()
        assert not asyncio.all_tasks(self.loop), "an asyncio task is left"
        assert self.loop.next_timer == math.inf, "a timer is left"
        assert not self.store.watchers
        assert not self.joiners
        self.warnings.clear()
        self.attempts.clear()
        self.over.clear()
        self.left_behind.clear()
        self.by_number.clear()
        self.ambushes.clear()

    def end_readers(self) -> None:
        """All streams end."""
        for reader in self.readers:
            for _ in range(20):
                reader.permits.release()
        for _ in range(10):
            self.loop.advance(taskqueue.HOLD_SECONDS)
        assert all(reader.ended for reader in self.readers)
        self.readers.clear()

    def versions(self) -> dict[str, int]:
        """The version of each task."""
        return {record.id: record.version for record in self.store.by_id.values()}

    def teardown(self) -> None:
        failed = sys.exc_info()[0] is not None
        try:
            if hasattr(self, "queue") and not failed:
                self.stop()
                self.retire()
        finally:
            self.abandon()
            taskqueue.logger.removeHandler(self.log)
            for name, original in self.originals.items():
                setattr(taskqueue, name, original)

    def abandon(self) -> None:
        """After a failure: end all threads and asyncio tasks, however."""
        self.abandoned = True
        taskqueue.forget_frames = lambda error: None  # ours are still of use

        def end(attempt: Attempt) -> None:
            raise Carry

        for attempt in [*self.attempts.values(), *self.over]:
            if attempt.task.in_thread and attempt.thread.is_alive():
                attempt.thread_inbox.put(end)
                attempt.thread.join(PATIENCE)
        self.loop.after_iteration = lambda: None
        for job in asyncio.all_tasks(self.loop):
            job.cancel()
        for _ in range(20):
            self.loop.iterate()
        self.loop.close()


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--no-shrink", action="store_true")
    args = parser.parse_args()
    random.seed(args.seed)
    phases = [Phase.generate, Phase.shrink]
    if args.no_shrink:
        phases = [Phase.generate]
    profile = settings(
        max_examples=args.runs,
        stateful_step_count=args.steps,
        phases=phases,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    runs = f"{args.runs} runs of up to {args.steps} steps"
    print(f"model: seed {args.seed}, {runs}", flush=True)
    run_state_machine_as_test(seed(args.seed)(QueueMachine), settings=profile)
    counts = (f"{count} {name}" for name, count in sorted(totals.items()))
    print("model: " + ", ".join(counts))


if __name__ == "__main__":
    main()
