"""What a task queue must do, said a second time and more simply: lists, no heap, no timers, no asyncio.

The model does not predict the order of what happens inside one instant. It is told of each move of a task, and judges
whether that move was right at that moment (`accept`); and when all is quiet, whether anything is missing that should
have happened by then (`check_quiet`)."""

import math
from dataclasses import dataclass
from typing import Any, Literal

FINAL = ("completed", "failed", "cancelled")
# How a handler takes its cancellation. One that relents gives in to the second: a cancel or a shutdown that comes after
# a timeout, a shutdown after a cancel.
Manner = Literal["polite", "stubborn", "relents", "returns", "raises"]


@dataclass(eq=False)
class ModelTask:
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
    progress: int = 0
    attempt: int = 0
    result: Any = None
    error: str | None = None
    deadline: float = 0.0
    cancel_asked: bool = False
    timed_out: bool = False
    cut_off: bool = False  # by a shutdown
    begun: bool = False  # this attempt's handler has been called
    ended: tuple[Any, Any] | None = None  # what it has returned or raised

    @property
    def told_to_stop(self) -> int:
        """How many have told it: each of the three does it once."""
        return self.cancel_asked + self.timed_out + self.cut_off

    @property
    def has_let_go(self) -> bool:
        """Whether the handler has ended, or was stopped before it began."""
        if self.ended is not None:
            return True
        patience = {"stubborn": math.inf, "relents": 2}.get(self.manner, 1)
        return self.told_to_stop >= (1 if not self.begun else math.inf if self.in_thread else patience)


class Model:
    def __init__(self, max_workers: int, max_pending: int, keep_finished: int, drain_seconds: float,
                 stubborn_seconds: float) -> None:
        self.max_workers, self.max_pending, self.keep_finished = max_workers, max_pending, keep_finished
        self.drain_seconds, self.stubborn_seconds = drain_seconds, stubborn_seconds
        self.tasks: dict[str, ModelTask] = {}  # those that were not evicted, in order of submission
        self.evicted: list[ModelTask] = []
        self.finished: list[ModelTask] = []
        self.keys: dict[str, ModelTask] = {}
        self.submitted = 0
        self.stopping = False
        self.exit_began: float | None = None
        self.exit_ended: float | None = None

    @property
    def drained_at(self) -> float:
        return float("inf") if self.exit_began is None else self.exit_began + self.drain_seconds

    def having(self, status: str) -> list[ModelTask]:
        return [task for task in self.tasks.values() if task.status == status]

    # -- what callers do

    def submit(self, task: ModelTask) -> None:
        self.submitted += 1
        self.tasks[task.id] = task
        if task.key:
            self.keys[task.key] = task

    # -- what the queue does

    def accept(self, task: ModelTask, status: str, result: Any, error: str | None, now: float) -> None:
        """One move of one task, at the moment when it is made."""
        allowed = {"pending": {"running", "cancelled"}, "running": {"pending", *FINAL}}.get(task.status, set())
        assert status in allowed, f"{task}: → {status}"
        self._update_stops(task, now)
        if status == "running":
            self._accept_start(task, now)
        elif task.status == "running":
            self._accept_end(task, status, result, error, now)
        else:
            assert task.cancel_asked or self.exit_began is not None, f"nobody has cancelled {task}"
        task.status, task.result, task.error = status, result, error
        if status in FINAL:
            self.finished.append(task)
            if len(self.finished) > self.keep_finished:
                self._evict(self.finished.pop(0))

    def _accept_start(self, task: ModelTask, now: float) -> None:
        assert self.exit_began is None, f"{task} starts after the end"
        assert len(self.having("running")) < self.max_workers, f"{task} is one too many"
        eligible = [other for other in self.having("pending") if other.ready_at <= now]
        best = min(eligible, key=lambda other: (other.priority, other.number), default=None)
        assert task is best, f"{task} starts, but {best} comes first"
        task.attempt += 1
        task.progress, task.deadline = 0, now + task.timeout
        task.timed_out, task.begun, task.ended = False, False, None

    def _accept_end(self, task: ModelTask, status: str, result: Any, error: str | None, now: float) -> None:
        left_behind = task.cut_off and now >= self.drained_at + self.stubborn_seconds
        assert task.has_let_go or left_behind, f"{task} ends, but its handler runs"
        if task.cancel_asked or task.cut_off:
            expected: tuple[str, Any, str | None] = ("cancelled", None, None)
        elif task.timed_out:
            expected = ("failed", None, f"TimeoutError: no result within {task.timeout:g} s")
        else:
            assert task.ended is not None
            expected = ("failed" if task.ended[1] else "completed", *task.ended)
        if expected[0] == "failed" and task.attempt <= task.max_retries:
            expected = ("pending", *expected[1:])
        assert (status, result, error) == expected, f"{task}: {(status, result, error)}, not {expected}"
        if status == "completed":
            task.progress = 100

    def _update_stops(self, task: ModelTask, now: float) -> None:
        """Who has told this task to stop, by the clock alone."""
        if task.status != "running":
            return
        if now >= task.deadline and not task.told_to_stop:
            task.timed_out = True
        task.cut_off = now >= self.drained_at

    def _evict(self, task: ModelTask) -> None:
        self.evicted.append(task)
        del self.tasks[task.id]
        if task.key:
            del self.keys[task.key]

    # -- what must hold

    def check(self) -> None:
        """At every moment."""
        counts = {status: len(self.having(status)) for status in ("pending", "running")}
        assert counts["running"] <= self.max_workers
        assert self.submitted == sum(counts.values()) + len(self.finished) + len(self.evicted)
        assert len(self.finished) <= self.keep_finished

    def check_quiet(self, now: float) -> None:
        """Once nothing is left to do but to wait: is anything overdue?"""
        for task in self.having("running"):
            self._update_stops(task, now)
            assert not task.has_let_go, f"{task} has let go, and is running still"
        if self.exit_began is None:
            waiting = [task for task in self.having("pending") if task.ready_at <= now]
            free = self.max_workers - len(self.having("running"))
            assert not (waiting and free), f"{waiting} could start: {free} slots are free"
        elif self.exit_ended is not None:
            assert all(task.status in FINAL for task in self.tasks.values())
