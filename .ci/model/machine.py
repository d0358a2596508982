"""Model-based test of the queue: hypothesis calls everything in any order, on a virtual clock; the model judges.

    python .ci/model/machine.py [--seed N] [--runs N] [--steps N] [--no-shrink]

The same seed gives the same run. On a failure hypothesis prints the shortest sequence of calls that it could find."""

import argparse, asyncio, functools, gc, logging, queue as thread_queue, random, sys, threading
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, seed, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import taskqueue
from clock import VirtualLoop
from model import Manner, Model, ModelTask
from taskqueue import FINAL, Settings, Shelf, Status, Task, TaskQueue, TaskStatus, TaskSubmission, TaskType

PATIENCE = 20  # real seconds until a thread that doesn't answer is a failure
IN_THREAD = TaskType.GENERATE_REPORT  # the handler of this type is a plain `def`
totals: Counter[str] = Counter()  # over all runs: what was done, and how often


# ======================================================================================================================
# Handlers that do as they are told

class Says:
    """Equal to any text with these words in it: an error has to name its cause; how it puts it is its own affair."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and all(word in other for word in self.words)

class Awkward(Exception):
    def __str__(self) -> str:
        raise SystemExit("no text for you")

def deep(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value

def circular() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value

GOOD_RESULTS: list[tuple[Any, Any]] = [
    (None, None), (0, 0), ("", ""), ({"a": [1, 2.5, True, None]}, {"a": [1, 2.5, True, None]}), ((1, 2), [1, 2]),
    ({1: "x"}, {"1": "x"}), (Status.PENDING, "pending"), (deep(50), deep(50)), ("\x00\u2028é", "\x00\u2028é")]
BAD_RESULTS: list[Callable[[], Any]] = [
    object, lambda: float("nan"), lambda: {"x": float("inf")}, lambda: "\ud800", lambda: deep(5000), circular,
    lambda: 10**5000, lambda: {"\udfff": 1}, lambda: b"\xff"]
ERRORS: list[tuple[Callable[[], BaseException], Says]] = [
    (lambda: ValueError("no"), Says("ValueError", "no")),
    (lambda: TimeoutError("theirs"), Says("TimeoutError", "theirs")),
    (lambda: asyncio.CancelledError("mine"), Says("CancelledError", "mine")),
    (lambda: KeyboardInterrupt("k"), Says("KeyboardInterrupt", "k")),
    (lambda: ValueError("\ud800"), Says("ValueError")),
    (lambda: StopIteration(1), Says("RuntimeError")),  # which is what Python makes of it
    (SystemExit, Says("SystemExit")), (RecursionError, Says("RecursionError")), (GeneratorExit, Says("GeneratorExit")),
    (Awkward, Says("Awkward"))]

class Attempt:
    """One call of a handler, and the way to tell it what to do next."""

    def __init__(self, task: ModelTask, update_progress: taskqueue.UpdateProgress) -> None:
        self.task, self.update_progress, self.thread = task, update_progress, threading.current_thread()
        self.inbox: asyncio.Queue[Callable[[Attempt], Any]] = asyncio.Queue()
        self.thread_inbox: thread_queue.SimpleQueue[Callable[[Attempt], Any]] = thread_queue.SimpleQueue()
        self.answers: thread_queue.SimpleQueue[None] = thread_queue.SimpleQueue()
        self.over = False
        self.cancellations = 0

class Carry(Exception):
    """Takes a result, or an error, out of the loop of a scripted handler."""

    def __init__(self, value: Any = None, error: BaseException | None = None) -> None:
        self.value, self.error = value, error

    def deliver(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.value


# ======================================================================================================================
# Readers: clients of a stream, quick or slow

class Reader:
    """Reads the stream of one task, and checks what any client may rely on."""

    def __init__(self, machine: "QueueMachine", task: ModelTask, last_event_id: int, slow: bool) -> None:
        self.machine, self.queue, self.task, self.slow = machine, machine.queue, task, slow
        record = machine.queue._tasks[task.id]
        self.sent = last_event_id if last_event_id <= record.version else 0
        self.record, self.seen, self.ended = record, list[TaskStatus](), False
        self.permits = asyncio.Semaphore(0)
        self.job = machine.loop.create_task(self.read(last_event_id))

    async def read(self, last_event_id: int) -> None:
        async for status in self.queue.watch(self.task.id, last_event_id):
            self.take(status)
            if self.slow:
                await self.permits.acquire()
        self.ended = True

    def take(self, status: TaskStatus) -> None:
        totals["frames"] += 1
        assert status.version > self.sent, "an old or repeated frame"
        assert status.version == self.record.version, "not the latest state"
        if self.seen:
            before = self.seen[-1]
            assert before.status not in FINAL, "a frame after the terminal one"
            assert status.attempt >= before.attempt
            assert status.attempt > before.attempt or status.progress >= before.progress, "progress runs backwards"
        self.sent = status.version
        self.seen.append(status)

    def check_quiet(self) -> None:
        assert not self.job.done() or self.job.cancelled() or self.job.exception() is None, self.job.exception()
        if self.slow and not self.ended and self.seen and self.permits.locked():
            return  # it has still to digest its latest frame
        final = self.record.status in FINAL
        assert self.ended == (final or self.queue.stopping), f"{self.task}: ended is {self.ended}"
        if not self.queue.stopping:
            assert self.sent >= self.record.version, "a change was missed"
            assert not final or not self.seen or self.seen[-1].status in FINAL

class EventsReader:
    """Reads the stream of all tasks."""

    def __init__(self, machine: "QueueMachine", last_event_id: int, slow: bool) -> None:
        self.machine, self.queue, self.slow = machine, machine.queue, slow
        self.resumes = self.queue.first_version < last_event_id <= self.queue.version
        self.sent, self.ended = last_event_id if self.resumes else 0, False
        self.latest: dict[str, TaskStatus] = {}
        self.began: int | None = None  # the version of the queue at the first batch
        self.permits = asyncio.Semaphore(0)
        self.job = machine.loop.create_task(self.read(last_event_id))

    async def read(self, last_event_id: int) -> None:
        async for batch in self.queue.watch_all(last_event_id):
            self.take(batch)
            if self.slow:
                await self.permits.acquire()
        self.ended = True

    def take(self, batch: list[TaskStatus]) -> None:
        totals["batches"] += 1
        versions = [status.version for status in batch]
        assert versions == sorted(set(versions))
        assert all(version > self.sent for version in versions), "an old or repeated frame"
        if self.began is None:
            present = sorted(task.version for task in self.queue._tasks.values())
            if self.resumes:
                assert versions == [version for version in present if version > self.sent]
            else:
                assert versions == present[-self.queue.SNAPSHOT:]
            self.began = self.queue.version
        else:
            assert batch, "an empty batch"
        for status in batch:
            assert status.version == self.queue._tasks[status.id].version, "not the latest state"
            if before := self.latest.get(status.id):
                assert before.status not in FINAL, "a frame after the terminal one"
                assert (status.attempt, status.progress) >= (before.attempt, before.progress), "progress runs backwards"
            self.latest[status.id] = status
        self.sent = max([self.sent, *versions])

    def check_quiet(self) -> None:
        assert not self.job.done() or self.job.cancelled() or self.job.exception() is None, self.job.exception()
        if self.slow and not self.ended and self.began and self.permits.locked():
            return
        assert self.ended == self.queue.stopping
        if not self.queue.stopping and self.began is not None:
            for task in self.queue._tasks.values():
                assert task.version <= self.began or self.latest[task.id].version == task.version, "missed"


# ======================================================================================================================
# The queue under test, with a witness

class WitnessedQueue(TaskQueue):
    """The queue itself; each of its moves is shown to the model at the moment when it is made."""

    SNAPSHOT = 3  # small, so that a few tasks reach it
    machine: "QueueMachine"
    model: Model

    def _move(self, task: Task, status: Status, result: Any = None, error: str | None = None) -> None:
        super()._move(task, status, result, error)
        totals[f"→ {status}"] += 1
        self.machine.moved(self, task, status, result, error)

    def _changed(self, task: Task) -> None:
        assert threading.get_ident() == self._thread_id, "a change from another thread"
        super()._changed(task)

Shelf.BLOCK = 4  # likewise

def watch_backoff(original: Callable[[int, Settings], float], machine: "QueueMachine") -> Callable[..., float]:
    def backoff_delay(attempt: int, settings: Settings) -> float:
        delay = original(attempt, settings)
        assert 0 <= delay <= min(settings.backoff_cap, settings.backoff_base * 2 ** (attempt - 1))
        assert machine.last_moved.status == "pending"
        machine.last_moved.ready_at = machine.loop.time() + delay
        return delay
    return backoff_delay

PICK = st.integers(0, 30)
MANNERS: tuple[Manner, ...] = ("polite", "polite", "stubborn", "relents", "returns", "raises")
SUBMISSIONS = st.fixed_dictionaries({
    "task_type": st.sampled_from(list(TaskType)),
    "priority": st.sampled_from([1, 5, 10]),
    "max_retries": st.sampled_from([0, 0, 1, 2, 10]),
    "timeout": st.sampled_from([0.25, 1.0, 60.0, 60.0, 3600.0]),
    "delay": st.sampled_from([0.0, 0.0, 0.0, 0.1, 5.0, 3600.0, 86_400.0]),
    "manner": st.sampled_from(MANNERS),
})
ACTIONS = st.one_of(
    st.tuples(st.just("submit"), SUBMISSIONS),
    st.tuples(st.just("cancel"), PICK, st.booleans()),
    st.tuples(st.just("progress"), PICK, st.sampled_from([0, 1, 49.9, 50, 99, 100])),
    st.tuples(st.just("return"), PICK, st.sampled_from(range(len(GOOD_RESULTS)))),
    st.tuples(st.just("raise"), PICK, st.sampled_from(range(len(ERRORS)))),
)

class QueueMachine(RuleBasedStateMachine):
    """Each rule is something that a client, a handler, the clock or the server does."""

    # -- the world

    def __init__(self) -> None:
        super().__init__()
        self.loop = VirtualLoop()
        self.loop.after_iteration = self.await_threads
        self.handlers = {task_type: self.obey_in_thread if task_type is IN_THREAD else self.obey
                         for task_type in TaskType}
        self.numbers = 0
        self.by_number: dict[int, ModelTask] = {}
        self.attempts: dict[ModelTask, Attempt] = {}  # the current one of each task
        self.over: list[Attempt] = []
        self.left_behind: list[Attempt] = []
        self.begun: thread_queue.SimpleQueue[Attempt] = thread_queue.SimpleQueue()
        self.threads_started = self.threads_begun = 0
        self.ambushed: set[int] = set()
        self.readers: list[Reader | EventsReader] = []
        self.exiting: asyncio.Task[None] | None = None
        self.retired: list[WitnessedQueue] = []
        self.warnings: list[str] = []
        self.originals = taskqueue.backoff_delay, taskqueue.run_in_thread
        taskqueue.backoff_delay = watch_backoff(taskqueue.backoff_delay, self)
        taskqueue.run_in_thread = self.counting(taskqueue.run_in_thread)
        self.log = logging.Handler(logging.WARNING)
        self.log.emit = lambda record: self.warnings.append(record.getMessage())  # type: ignore[method-assign]
        taskqueue.logger.addHandler(self.log)

    @initialize(max_workers=st.integers(1, 4), max_pending=st.integers(1, 12), keep_finished=st.integers(0, 6),
                drain_seconds=st.sampled_from([0.0, 1.0, 5.0]),
                backoff=st.sampled_from([(0.0, 30.0), (0.5, 30.0), (3600.0, 1e6)]))
    def enter(self, max_workers: int, max_pending: int, keep_finished: int, drain_seconds: float,
              backoff: tuple[float, float]) -> None:
        knobs = Settings(max_workers=max_workers, max_pending=max_pending, keep_finished=keep_finished,
                         drain_seconds=drain_seconds, backoff_base=backoff[0], backoff_cap=backoff[1])
        self.model = Model(max_workers, max_pending, keep_finished, drain_seconds, TaskQueue.STUBBORN_SECONDS)
        self.queue = self.loop.call(lambda: WitnessedQueue(knobs, self.handlers))
        self.queue.machine, self.queue.model = self, self.model
        self.exiting = None
        self.run(self.queue.__aenter__())

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        job = self.loop.create_task(coroutine)
        self.loop.settle()
        return job.result()

    def counting(self, original: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Coroutine[Any, Any, Any]]:
        async def run_in_thread(*args: Any) -> Any:
            self.threads_started += 1
            return await original(*args)
        return run_in_thread

    def await_threads(self) -> None:
        """Wait until each thread that was started has reported to us: from here on it waits for its orders."""
        while self.threads_begun < self.threads_started:
            self.begun.get(timeout=PATIENCE)
            self.threads_begun += 1

    def moved(self, queue: WitnessedQueue, record: Task, status: Status, result: Any, error: str | None) -> None:
        task = self.by_number[record.payload["n"]]
        self.last_moved = task
        queue.model.accept(task, str(status), result, error, self.loop.time())
        queue.model.check()
        if status is Status.RUNNING and task.number in self.ambushed:
            self.ambushed.discard(task.number)
            self.loop.call_soon(self.do_cancel, task, True)  # before the first step of the attempt
        if status is not Status.RUNNING and (attempt := self.attempts.pop(task, None)):
            self.over.append(attempt)
            if record.run:
                self.left_behind.append(attempt)

    # -- the handlers

    def begin(self, payload: Any, update_progress: taskqueue.UpdateProgress) -> Attempt:
        task = self.by_number[payload.model_extra["n"]]
        assert task.payload == {**payload.model_extra}, "the handler sees what was sent"
        payload.model_extra["deep"][0]["er"] = "spoiled"  # its own copy: the next attempt must not see this
        task.begun = True
        attempt = self.attempts[task] = Attempt(task, update_progress)
        return attempt

    async def obey(self, payload: Any, update_progress: taskqueue.UpdateProgress) -> Any:
        attempt = self.begin(payload, update_progress)
        while True:
            try:
                order = await attempt.inbox.get()
            except asyncio.CancelledError:
                match attempt.task.manner:
                    case "polite":
                        raise
                    case "returns":
                        return "too late"
                    case "raises":
                        raise OSError("while cleaning up") from None
                    case "relents":
                        attempt.cancellations += 1
                        if attempt.cancellations > 1:
                            raise
                continue
            try:
                order(attempt)
            except Carry as carry:
                return carry.deliver()

    def obey_in_thread(self, payload: Any, update_progress: taskqueue.UpdateProgress) -> Any:
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

    def tell(self, attempt: Attempt, order: Callable[[Attempt], None], last: bool = False) -> None:
        """Give an order; a thread has carried it out when this returns, and if it was its last, has ended."""
        if attempt.task.in_thread:
            attempt.thread_inbox.put(order)
            attempt.answers.get(timeout=PATIENCE)
            if last or attempt.over:
                attempt.thread.join(PATIENCE)
                assert not attempt.thread.is_alive()
        else:
            attempt.inbox.put_nowait(order)

    def finish(self, attempt: Attempt, carry: Carry, ended: tuple[Any, Any]) -> None:
        def order(attempt: Attempt) -> None:
            attempt.task.ended, attempt.over = ended, True
            raise carry
        self.tell(attempt, order, last=True)

    # -- what is done, and what the model expects of it: to be called inside the loop

    def do(self, action: tuple[Any, ...]) -> None:
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
                    self.finish(attempt, Carry(value), (expected, None))
            case "raise", pick, number:
                if attempt := self.pick_attempt(pick):
                    make, text = ERRORS[number]
                    self.finish(attempt, Carry(error=make()), (None, text))

    def do_submit(self, fields: dict[str, Any], key: str | None = None, ambush: bool = False) -> None:
        self.numbers += 1
        manner, wanted = fields["manner"], {name: value for name, value in fields.items() if name != "manner"}
        payload = {"n": self.numbers, "manner": manner, "deep": [{"er": 1}]}
        task = ModelTask(
            self.numbers, str(wanted["task_type"]), wanted["priority"], payload, wanted["max_retries"],
            wanted["timeout"], manner, key, f"r-{self.numbers}", self.loop.time() + wanted["delay"],
            wanted["task_type"] is IN_THREAD)
        self.by_number[self.numbers] = task
        submission = TaskSubmission(payload=payload, **wanted)
        submit = functools.partial(self.queue.submit, submission, request_id=task.request_id, idempotency_key=key)
        if key and key in self.model.keys:  # the payload has another number, so it is another body
            self.expect(taskqueue.IdempotencyKeyReused, submit)
        elif self.queue.stopping:
            self.expect(taskqueue.QueueStopped, submit)
        elif len(self.model.having("pending")) >= self.model.max_pending:
            self.expect(taskqueue.QueueFull, submit)
        else:
            status = submit()
            assert (status.status, status.attempt, status.progress) == (Status.PENDING, 0, 0)
            task.id = status.id
            self.model.submit(task)
            if ambush:
                self.ambushed.add(task.number)
            if key:
                again = self.queue.submit(submission, request_id="another", idempotency_key=key)
                assert (again.id, again.request_id) == (task.id, task.request_id)

    def do_cancel(self, task: ModelTask, force: bool) -> None:
        cancel = functools.partial(self.queue.cancel, task.id, force)
        if task.id not in self.model.tasks:
            self.expect(taskqueue.TaskNotFound, cancel)
        elif task.status == "pending":
            task.cancel_asked = True
            assert cancel().status is Status.CANCELLED
        elif task.status == "running" and force:
            task.cancel_asked = True
            assert cancel().status is Status.RUNNING
        else:
            error = self.expect(taskqueue.TaskNotCancellable, cancel)
            assert task.status in str(error)

    def do_progress(self, attempt: Attempt, percent: float) -> None:
        task, was_quiet = attempt.task, self.loop.is_quiet

        def order(attempt: Attempt) -> None:
            try:
                attempt.update_progress(percent)
            except asyncio.CancelledError as error:
                assert task.in_thread, "an update_progress awaits nothing"
                assert task.told_to_stop, "nobody has asked this attempt to stop"
                if task.manner == "polite":
                    task.ended, attempt.over = (None, "CancelledError: this attempt was asked to stop"), True
                    raise Carry(error=error) from None
            else:
                assert not (task.in_thread and task.told_to_stop and was_quiet), "it was asked to stop"
                if task.status == "running":
                    task.progress = max(task.progress, int(percent))
        self.tell(attempt, order)

    def expect(self, error: type[Exception], call: Callable[[], Any]) -> Exception:
        try:
            call()
        except error as caught:
            totals[error.__name__] += 1
            return caught
        raise AssertionError(f"no {error.__name__}")

    def pick_task(self, pick: int) -> ModelTask | None:
        known = [*self.model.evicted[-3:], *self.model.tasks.values()]
        return known[-1 - pick % len(known)] if known else None

    def pick_attempt(self, pick: int) -> Attempt | None:
        running = [attempt for attempt in self.attempts.values() if not attempt.over]
        return running[pick % len(running)] if running else None

    # -- the rules

    @rule(fields=SUBMISSIONS, key=st.sampled_from([None, None, "a", "b"]), ambush=st.integers(0, 7))
    def submit(self, fields: dict[str, Any], key: str | None, ambush: int) -> None:
        self.loop.call(lambda: self.do_submit(fields, key, ambush == 0))
        self.loop.settle()

    @rule(action=ACTIONS)
    def act(self, action: tuple[Any, ...]) -> None:
        self.loop.call(lambda: self.do(action))
        self.loop.settle()

    @rule(actions=st.lists(ACTIONS, min_size=2, max_size=5))
    def act_at_once(self, actions: list[tuple[Any, ...]]) -> None:
        """Several things in one turn of the loop."""
        self.loop.call(lambda: [self.do(action) for action in actions])
        self.loop.settle()

    @rule(action=ACTIONS, turns=st.integers(0, 6))
    def act_and_interrupt(self, action: tuple[Any, ...], turns: int) -> None:
        """Whatever comes next comes in the middle of this."""
        self.loop.call(lambda: self.do(action))
        for _ in range(turns):
            self.loop.iterate()

    @precondition(lambda self: not self.queue.stopping)
    @rule(fields=SUBMISSIONS, count=st.sampled_from([5, 100]))
    def submit_and_cancel_all_day(self, fields: dict[str, Any], count: int) -> None:
        """The workers are busy, so nothing is taken from the heap."""
        for _ in range(self.model.max_workers):
            self.loop.call(lambda: self.do_submit({**fields, "priority": 1, "delay": 0.0, "timeout": 3600.0}))
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
        if attempt := self.pick_attempt(pick):
            self.loop.call(lambda: self.finish(attempt, Carry(make()), (None, Says("Error"))))
            self.loop.settle()

    @rule(pick=PICK, percent=st.sampled_from([-1, 101, float("nan"), float("inf"), "50", None, True, 100.0001]))
    def report_nonsense(self, pick: int, percent: Any) -> None:
        if attempt := self.pick_attempt(pick):
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
        if self.over:
            late = self.over[-1 - pick % len(self.over)]

            def report() -> None:
                try:
                    late.update_progress(50)
                except asyncio.CancelledError:
                    assert late.task.in_thread
            self.loop.call(report)

    @rule(seconds=st.sampled_from([0.01, 0.3, 1.0, 7.0, 60.0, 3600.0, 100_000.0]))
    def let_time_pass(self, seconds: float) -> None:
        self.loop.advance(seconds)

    @rule()
    def let_the_next_timer_fire(self) -> None:
        self.loop.settle()
        if (due := self.loop.next_timer) < float("inf"):
            self.loop.advance(due - self.loop.time())

    @rule(pick=PICK, slow=st.booleans(), since=st.sampled_from(["", "", "present", "older", "future", "junk"]))
    def watch(self, pick: int, slow: bool, since: str) -> None:
        if not (task := self.pick_task(pick)):
            return
        if task.id not in self.model.tasks:
            self.expect(taskqueue.TaskNotFound, lambda: self.run(anext(self.queue.watch(task.id))))
            return
        version = self.queue._tasks[task.id].version
        last = {"": 0, "present": version, "older": version - 1, "future": version + 10**9, "junk": -7}[since]
        self.readers.append(Reader(self, task, last, slow))

    @rule(slow=st.booleans(), since=st.sampled_from(["", "present", "older", "future", "an earlier life"]))
    def watch_all(self, slow: bool, since: str) -> None:
        version = self.queue.version
        last = {"": 0, "present": version, "older": version - 4, "future": version + 10**9,
                "an earlier life": self.queue.first_version - 5}[since]
        self.loop.settle()  # the version of the queue must not change before the reader begins
        if self.queue.version == version:
            self.readers.append(EventsReader(self, last, slow))
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
        if (task := self.pick_task(pick)) and task.id in self.model.tasks:
            self.queue.watch(task.id)
            self.queue.watch_all()

    @rule(status=st.sampled_from([None, *Status]), limit=st.integers(1, 5), offset=st.integers(0, 8))
    def page(self, status: Status | None, limit: int, offset: int) -> None:
        page, total = self.queue.list_tasks(status, limit, offset)
        wanted = [task for task in reversed(self.model.tasks.values()) if status is None or task.status == status]
        assert total == len(wanted)
        assert [view.id for view in page] == [task.id for task in wanted[offset : offset + limit]]

    @precondition(lambda self: self.model.submitted > 6)
    @rule(chance=st.integers(0, 4))
    def hear_the_signal(self, chance: int) -> None:
        """What the server does at once when it is told to stop; the lifespan ends later."""
        if chance == 0:
            self.loop.call(self.queue.begin_shutdown)
            self.loop.settle()

    @precondition(lambda self: self.exiting is None and self.model.submitted > 6)
    @rule(chance=st.integers(0, 2))
    def begin_to_stop(self, chance: int) -> None:
        if chance == 0:
            self.loop.settle()
            totals["stops"] += 1
            self.exiting = self.loop.create_task(self.queue.__aexit__(None, None, None))
            self.model.exit_began = self.loop.time()
            self.exiting.add_done_callback(self.note_exit)
            self.loop.settle()

    def note_exit(self, exiting: asyncio.Task[None]) -> None:
        exiting.result()
        self.model.exit_ended = self.loop.time()

    @precondition(lambda self: self.model.exit_ended is not None)
    @rule(knobs=st.tuples(st.integers(1, 4), st.integers(1, 12), st.integers(0, 6)))
    def start_again(self, knobs: tuple[int, int, int]) -> None:
        totals["restarts"] += 1
        self.retire()
        self.enter(*knobs, 1.0, (0.5, 30.0))

    # -- the invariants

    @invariant()
    def holds_at_every_moment(self) -> None:
        totals["steps"] += 1
        assert not self.loop.errors, self.loop.errors
        self.model.check()
        assert self.queue.submitted == self.model.submitted
        assert self.queue.evicted == len(self.model.evicted)
        for status in Status:
            assert self.queue.count(status) == len(self.model.having(status))

    @invariant()
    def holds_when_all_is_quiet(self) -> None:
        if not self.loop.is_quiet:
            return
        totals["quiet moments"] += 1
        self.model.check_quiet(self.loop.time())
        for task, view in zip(self.model.tasks.values(), reversed(self.queue.list_tasks(None, 1000)[0]), strict=True):
            self.compare(task, view)
            assert self.queue.get_task(task.id) == view
        for reader in self.readers:
            reader.check_quiet()
        live = sum(not reader.ended for reader in self.readers)
        if self.queue.watchers != live:
            gc.collect()  # a generator in a reference cycle is closed only then
            self.loop.settle()
        assert self.queue.watchers == live
        assert len(self.queue._events) <= self.queue.count(Status.PENDING) + self.queue.count(Status.RUNNING) + 1
        dead = self.queue._ready.qsize() - self.queue.count(Status.PENDING)
        assert dead <= 65 + 0.1 * self.model.max_pending or self.exiting, "cancelled tasks pile up in the heap"
        self.check_exit()

    def compare(self, task: ModelTask, view: TaskStatus) -> None:
        for name in ("id", "task_type", "priority", "payload", "status", "progress", "attempt", "max_retries", "result",
                     "error", "request_id"):
            assert getattr(view, name) == getattr(task, name), f"{name}: {getattr(view, name)!r}, not {task!r}"
        assert (view.completed_at is not None) == (view.status in FINAL)
        assert (view.started_at is not None) == (view.attempt > 0)

    def check_exit(self) -> None:
        if (began := self.model.exit_began) is None:
            return
        patience = self.model.drained_at + self.model.stubborn_seconds
        if self.model.exit_ended is None:
            assert self.loop.time() < patience, "the stop hangs"
            assert self.model.having("running"), "the stop waits for nothing"
        else:
            assert began <= self.model.exit_ended <= patience

    # -- the end

    def stop(self) -> None:
        self.loop.settle()
        if self.exiting is None:
            self.exiting = self.loop.create_task(self.queue.__aexit__(None, None, None))
            self.model.exit_began = self.loop.time()
            self.exiting.add_done_callback(self.note_exit)
        self.loop.advance(self.model.drain_seconds + self.model.stubborn_seconds)
        self.holds_at_every_moment()
        self.holds_when_all_is_quiet()
        assert self.model.exit_ended is not None

    def retire(self) -> None:
        """Release whatever a stopped queue has left behind, and see that this changes nothing more."""
        for reader in self.readers:
            reader.permits.release()
            for _ in range(3):
                reader.permits.release()
        self.loop.settle()
        assert all(reader.ended for reader in self.readers)
        self.readers.clear()
        versions = {record.id: record.version for record in self.queue._tasks.values()}
        for attempt in self.left_behind:
            totals["left behind"] += 1
            self.loop.call(lambda attempt=attempt: self.do_progress(attempt, 77))  # type: ignore[misc]
            self.loop.settle()
            if not attempt.over:
                self.loop.call(lambda attempt=attempt: self.finish(attempt, Carry(), (None, None)))  # type: ignore[misc]
            self.loop.settle()
        assert versions == {record.id: record.version for record in self.queue._tasks.values()}, "a final state changed"
        assert self.queue._slots._value == self.model.max_workers, "a slot was lost"
        assert sum("ignores its cancellation" in line for line in self.warnings) == len(self.left_behind)
        self.holds_at_every_moment()
        self.holds_when_all_is_quiet()
        assert not asyncio.all_tasks(self.loop), "an asyncio task is left"
        assert self.loop.next_timer == float("inf"), "a timer is left"
        assert not self.queue.watchers
        assert not self.queue._events
        assert not self.queue._keys or self.model.keys
        self.warnings.clear()
        self.attempts.clear()
        self.over.clear()
        self.left_behind.clear()
        self.by_number.clear()
        self.ambushed.clear()

    def teardown(self) -> None:
        failed = sys.exc_info()[0] is not None
        try:
            if hasattr(self, "queue") and not failed:
                self.stop()
                self.retire()
        finally:
            taskqueue.backoff_delay, taskqueue.run_in_thread = self.originals
            taskqueue.logger.removeHandler(self.log)
            self.abandon()

    def abandon(self) -> None:
        """After a failure: end all threads and asyncio tasks, however."""
        for attempt in [*self.attempts.values(), *self.over]:
            if attempt.task.in_thread and attempt.thread.is_alive():
                attempt.thread_inbox.put(lambda attempt: (_ for _ in ()).throw(Carry()))
                attempt.thread.join(PATIENCE)
        self.loop.after_iteration = lambda: None
        for job in asyncio.all_tasks(self.loop):
            job.cancel()
        for _ in range(20):
            self.loop.iterate()
        self.loop.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--no-shrink", action="store_true", help="report the first failure as it was found")
    args = parser.parse_args()
    random.seed(args.seed)
    phases = [Phase.generate] if args.no_shrink else [Phase.generate, Phase.shrink]
    profile = settings(max_examples=args.runs, stateful_step_count=args.steps, phases=phases, deadline=None,
                       database=None, suppress_health_check=list(HealthCheck))
    print(f"model: seed {args.seed}, {args.runs} runs of up to {args.steps} steps", flush=True)
    run_state_machine_as_test(seed(args.seed)(QueueMachine), settings=profile)
    print("model: " + ", ".join(f"{count} {name}" for name, count in sorted(totals.items())))

if __name__ == "__main__":
    main()
