"""What a task queue must do, said a second time and more simply.

It has lists, and no heap, no timers, no asyncio. The model does not predict the order
of what happens inside one instant. It is told of each choice and each move of a task,
and judges whether that was right at that moment (`choose`, `accept`). And when all is
quiet, it says whether anything is missing that should have happened (`check_quiet`).
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

FINAL = ("completed", "failed", "cancelled")
TICK = 1e-9  # the resolution of asyncio's clock: a timer may be so much early

# How a handler takes its cancellation. One that relents gives in to the second.
Manner = Literal["polite", "stubborn", "relents", "returns", "raises"]


class Ended(NamedTuple):
    """What a handler has returned or raised."""

    result: Any
    error: Any
    retry: bool = True


@dataclass(eq=False)
class ModelTask:
    """A task as the model knows it."""

    number: int
    task_type: str
    priority: int
    payload: dict[str, Any]
    max_retries: int
    timeout: float
    manner: Manner
    key: str | None
    request_id: str | None
    ready_at: float
    in_thread: bool
    id: str = ""
    status: str = "pending"
    entered: int = 0  # the number of the move into this status
    chosen: bool = False  # it is to start in the next turn
    progress: int = 0
    attempt: int = 0
    result: Any = None
    error: str | None = None
    deadline: float = 0.0
    cancels: int = 0  # how often it was asked to stop by a cancel
    timed_out: bool = False
    cut_off: bool = False  # by a shutdown
    interruptions: int = 0  # that its handler has felt
    least: int = 0  # that it must have felt by now
    told_before: int = 0  # when all was last quiet
    ended: Ended | None = None

    @property
    def told_to_stop(self) -> int:
        """How often it was told."""
        return self.cancels + self.timed_out + self.cut_off

    @property
    def patience(self) -> float:
        """How many interruptions its handler takes before it lets go."""
        if self.in_thread:
            return math.inf
        return {"stubborn": math.inf, "relents": 2}.get(self.manner, 1)

    @property
    def has_let_go(self) -> bool:
        """Whether its handler has ended."""
        return self.ended is not None or self.interruptions >= self.patience

    def begin(self, now: float) -> None:
        """A new attempt."""
        self.attempt += 1
        self.progress = 0
        self.deadline = now + self.timeout
        self.cancels = 0
        self.interruptions = 0
        self.least = 0
        self.told_before = 0
        self.timed_out = False
        self.cut_off = False
        self.ended = None


class Model:
    """The books of a queue."""

    def __init__(
        self,
        max_workers: int,
        max_pending: int,
        keep_finished: int,
        drain_seconds: float,
        grace_seconds: float,
    ) -> None:
        self.max_workers = max_workers
        self.max_pending = max_pending
        self.keep_finished = keep_finished
        self.drain_seconds = drain_seconds
        self.grace_seconds = grace_seconds
        self.tasks: dict[str, ModelTask] = {}  # those that were not evicted
        self.evicted: list[ModelTask] = []
        self.finished: list[ModelTask] = []
        self.keys: dict[str, ModelTask] = {}
        self.submitted = 0
        self.moves = 0
        self.drained_at = math.inf  # when handlers are interrupted by the stop
        self.left_behind_at = math.inf  # when it waits no longer
        self.exit_began: float | None = None
        self.exit_ended: float | None = None

    def having(self, status: str) -> list[ModelTask]:
        """The tasks of that status, by submission."""
        return [task for task in self.tasks.values() if task.status == status]

    def newest_first(self, status: str | None) -> list[ModelTask]:
        """As a list of tasks is to be: by submission, or by when they entered."""
        if status is None:
            return list(reversed(self.tasks.values()))
        return sorted(self.having(status), key=lambda task: -task.entered)

    # -- what callers do

    def submit(self, task: ModelTask) -> None:
        """A task comes in."""
        self.submitted += 1
        self.moves += 1
        task.entered = self.moves
        self.tasks[task.id] = task
        if task.key:
            self.keys[task.key] = task

    def begin_exit(self, now: float) -> None:
        """The stop begins."""
        self.exit_began = now
        self.drained_at = now + self.drain_seconds
        self.left_behind_at = self.drained_at + self.grace_seconds

    def cancel_exit(self, now: float) -> None:
        """Somebody cancels the stop: that cuts a wait short, and leaves out nothing."""
        if now < self.drained_at:
            self.drained_at = now
            self.left_behind_at = now + self.grace_seconds
        else:
            self.left_behind_at = min(now, self.left_behind_at)

    # -- what the queue does

    def choose(self, task: ModelTask, now: float) -> None:
        """The worker loop has taken this task: it starts in the next turn."""
        assert self.exit_began is None, f"{task} is chosen after the end"
        assert task.status == "pending"
        assert not task.chosen
        waiting = [other for other in self.having("pending") if not other.chosen]
        busy = len(self.tasks) - len(waiting) - len(self.finished)
        assert busy < self.max_workers, f"{task} is one too many"
        eligible = [other for other in waiting if other.ready_at <= now + TICK]
        assert task in eligible, f"{task} is chosen before its time"
        best = min(eligible, key=lambda other: (other.priority, other.number))
        assert task is best, f"{task} is chosen, but {best} comes first"
        task.chosen = True

    def accept(
        self, task: ModelTask, status: str, result: Any, error: str | None, now: float
    ) -> None:
        """One move of one task, at the moment when it is made."""
        allowed = {"pending": {"running", "cancelled"}, "running": {"pending", *FINAL}}
        assert status in allowed.get(task.status, set()), f"{task}: → {status}"
        self._update_stops(task, now)
        if status == "running":
            assert task.chosen, f"{task} starts, and was not chosen"
            task.begin(now)
        elif task.status == "running":
            self._accept_end(task, status, result, error, now)
        else:
            asked = task.cancels or self.exit_began is not None
            assert asked, f"nobody has cancelled {task}"
        task.chosen = False
        self.moves += 1
        task.entered = self.moves
        task.status = status
        task.result = result
        task.error = error
        if status in FINAL:
            self.finished.append(task)
            if len(self.finished) > self.keep_finished:
                self._evict(self.finished.pop(0))

    def _accept_end(
        self, task: ModelTask, status: str, result: Any, error: str | None, now: float
    ) -> None:
        left_behind = task.cut_off and now + TICK >= self.left_behind_at
        assert task.has_let_go or left_behind, f"{task} ends, but its handler runs"
        expected = [self._expected_end(task, bool(task.cancels) or task.cut_off)]
        if abs(now - self.drained_at) <= TICK and not task.cancels and not left_behind:
            # In that very instant the end may have come before the cut.
            expected.append(self._expected_end(task, stopped=False))
        found = (status, result, error)
        assert found in expected, f"{task}: {found}, not {expected}"
        if status == "completed":
            task.progress = 100

    def _expected_end(
        self, task: ModelTask, stopped: bool
    ) -> tuple[str, Any, str | None]:
        if stopped:
            return "cancelled", None, None
        ended = task.ended
        if task.timed_out:
            error = f"TimeoutError: no result within {task.timeout:g} s"
            ended = Ended(None, error)
        if ended is None:
            return "cancelled", None, None  # it was cut off
        status = "failed" if ended.error else "completed"
        if ended.error and ended.retry and task.attempt <= task.max_retries:
            status = "pending"
        return status, ended.result, ended.error

    def _update_stops(self, task: ModelTask, now: float) -> None:
        """Who has told this task to stop, by the clock alone."""
        if task.status == "running":
            task.timed_out = now + TICK >= task.deadline
            task.cut_off = now + TICK >= self.drained_at

    def _evict(self, task: ModelTask) -> None:
        self.evicted.append(task)
        del self.tasks[task.id]
        if task.key:
            del self.keys[task.key]

    # -- what must hold

    def check(self) -> None:
        """At every moment."""
        pending = len(self.having("pending"))
        running = len(self.having("running"))
        assert running <= self.max_workers
        gone = len(self.finished) + len(self.evicted)
        assert self.submitted == pending + running + gone
        assert len(self.finished) <= self.keep_finished

    def check_quiet(self, now: float) -> None:
        """Once nothing is left to do but to wait: is anything overdue?"""
        assert not any(task.chosen for task in self.tasks.values())
        for task in self.having("running"):
            self._update_stops(task, now)
            assert not task.has_let_go, f"{task} has let go, and is running still"
            if not task.in_thread:
                self._check_interruptions(task)
        if self.exit_began is None:
            waiting = [each for each in self.having("pending") if each.ready_at <= now]
            free = self.max_workers - len(self.having("running"))
            assert not (waiting and free), f"{waiting} could start: {free} are free"
        elif self.exit_ended is not None:
            assert all(task.status in FINAL for task in self.tasks.values())

    def _check_interruptions(self, task: ModelTask) -> None:
        """Two that come in one turn may be felt as one."""
        if task.told_to_stop > task.told_before:
            task.told_before = task.told_to_stop
            task.least += 1
        assert task.interruptions >= task.least, f"{task} was not interrupted"
        assert task.interruptions <= task.told_to_stop, f"{task}: once too often"
