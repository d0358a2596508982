"""A server whose handlers do everything that a handler should not.

`payload["do"]` says what.
"""

import asyncio
import sys
import threading
import time
from typing import Any

import uvicorn

import taskqueue
from taskqueue import Payload, Reporter, TaskType


class Rude(BaseException):
    """Not even an Exception."""


class Mute(Exception):
    def __str__(self) -> str:
        raise SystemExit("no text")


class Hydra(Exception):
    """Its repr and its str are too long, and not even UTF-8."""

    def __str__(self) -> str:
        return "\ud800\n\x1b[31m" * 100_000


class Trap:
    """Looks like something that JSON could carry."""

    def __iter__(self) -> Any:
        raise SystemExit("iterated")

    def __repr__(self) -> str:
        raise KeyboardInterrupt


def recurse(depth: int = 0) -> int:
    return recurse(depth + 1) + 1


def circle() -> list[Any]:
    ring: list[Any] = []
    ring.append(ring)
    return ring


def deep(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


def throw(error: BaseException) -> None:
    raise error


MISDEEDS: dict[str, Any] = {  # what each of them does ends in a failed task
    "raise": lambda: throw(ValueError("no")),
    "raise a timeout": lambda: throw(TimeoutError("my own")),
    "raise a group": lambda: throw(ExceptionGroup("two", [ValueError(), Mute()])),
    "exit": lambda: sys.exit(3),
    "interrupt": lambda: throw(KeyboardInterrupt()),
    "cancel": lambda: throw(asyncio.CancelledError()),
    "stop iteration": lambda: throw(StopIteration()),
    "generator exit": lambda: throw(GeneratorExit()),
    "rude": lambda: throw(Rude()),
    "mute": lambda: throw(Mute()),
    "hydra": lambda: throw(Hydra()),
    "memory": lambda: throw(MemoryError()),
    "recurse": recurse,
    "return nan": lambda: float("nan"),
    "return an object": object,
    "return a surrogate": lambda: {"a": ["\udc80"]},
    "return a circle": circle,
    "return a depth": lambda: deep(100_000),
    "return more depth than can be shown": lambda: deep(210),
    "return a huge number": lambda: 10**10_000,
    "return bytes": lambda: b"\xff\xfe",
    "return a trap": Trap,
    "return a function": lambda: recurse,
    "return a nan as key": lambda: {float("nan"): object()},
    "return a lock": threading.Lock,
    "return a module": lambda: {"a": asyncio},
}


def from_threads(update_progress: Reporter) -> dict[str, int]:
    """Ten threads report progress, all at once; nothing of that may break."""

    def report() -> None:
        for percent in range(100):
            update_progress(percent)

    threads = [threading.Thread(target=report) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"reported": 1000}


async def bad(payload: Payload, update_progress: Reporter) -> Any:
    match payload.model_extra["do"]:  # type: ignore[index]
        case "nothing":
            return "done"
        case "ignore":
            while True:
                try:
                    await asyncio.sleep(3600)
                except asyncio.CancelledError:
                    update_progress(50)
        case "swallow":
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                return "as if nothing had been"
        case "block":
            time.sleep(0.5)  # noqa: ASYNC251  # a bug that people write
            return "done"
        case "lie":
            for percent in (-1, 101, float("nan"), "50", None, 10**400, 1j):
                try:
                    update_progress(percent)  # type: ignore[arg-type]
                except ValueError:
                    continue
                return f"{percent} was taken"
            raise ValueError("all refused")
        case "from threads":
            return await asyncio.to_thread(from_threads, update_progress)
        case "after the end":
            asyncio.get_running_loop().call_later(0.05, update_progress, 33)
            return "done"
        case what:
            return MISDEEDS[what]()


def bad_in_thread(payload: Payload, update_progress: Reporter) -> Any:
    match payload.model_extra["do"]:  # type: ignore[index]
        case "nothing":
            return "done"
        case "block":
            return time.sleep(3600)
        case "block a while":
            return time.sleep(1)
        case "from threads":
            return from_threads(update_progress)
        case what:
            return MISDEEDS[what]()


if __name__ == "__main__":
    port, workers = int(sys.argv[1]), int(sys.argv[2])
    settings = taskqueue.Settings(
        max_workers=workers, drain_seconds=1, backoff_base=0.01
    )
    app = taskqueue.create_app(
        settings, {TaskType.SEND_EMAIL: bad, TaskType.GENERATE_REPORT: bad_in_thread}
    )
    uvicorn.run(app, port=port, http="h11", log_level="warning")
