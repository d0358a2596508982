"""An event loop whose clock is turned by hand.

Hours of backoff take milliseconds, and no test sleeps.
"""

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time stands still while anything is ready to run; `advance` jumps to the timers.

    It is driven from outside, one iteration at a time, so that a test can look at, and
    act on, any moment between two of them. `after_iteration` is called after each.
    """

    STEPS = 10_000  # more iterations than that without a rest are a livelock

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.after_iteration: Callable[[], None] = lambda: None
        self.errors: list[dict[str, object]] = []
        self.set_exception_handler(lambda _, context: self.errors.append(context))

    def time(self) -> float:
        return self.now

    def call(self, function: Callable[[], T]) -> T:
        """Call `function` in an iteration of its own; return or raise what it does."""
        answer: asyncio.Future[T] = self.create_future()

        def callback() -> None:
            try:
                answer.set_result(function())
            except Exception as error:
                answer.set_exception(error)

        self.call_soon(callback)
        while not answer.done():
            self.iterate()
        return answer.result()

    def peek(self, function: Callable[[], T]) -> T:
        """Call `function` as if from inside of the loop, without turning it."""
        asyncio._set_running_loop(self)
        try:
            return function()
        finally:
            asyncio._set_running_loop(None)

    def iterate(self) -> None:
        """One turn: what is ready now runs. What that makes ready waits."""
        self.stop()
        self.run_forever()
        self.after_iteration()

    @property
    def next_timer(self) -> float:
        """When the first live timer is due; infinity if there is none."""
        live = (timer.when() for timer in self._scheduled if not timer.cancelled())
        return min(live, default=float("inf"))

    @property
    def is_quiet(self) -> bool:
        return not self._ready and self.next_timer > self.now

    def settle(self) -> None:
        """Run all that can run without the clock moving."""
        for _ in range(self.STEPS):
            if self.is_quiet:
                return
            self.iterate()
        raise AssertionError(f"never quiet: {list(self._ready)[:5]}")

    def advance(self, seconds: float) -> None:
        """Turn the clock on by `seconds`, stopping at each timer on the way."""
        self.advance_to(self.now + seconds)

    def advance_to(self, until: float) -> None:
        """Turn the clock on to that time, stopping at each timer on the way."""
        self.settle()
        while (due := self.next_timer) <= until:
            self.now = due
            self.settle()
        self.now = until
        self.settle()
