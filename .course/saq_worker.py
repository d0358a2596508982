"""The handlers of taskqueue.py, unchanged, run by SAQ on Redis. See OUTGROW.md."""

import asyncio
import os
import sys
from typing import Any

import saq

import taskqueue

queue = saq.Queue.from_url(os.environ.get("REDIS_URL", "redis://127.0.0.1"))


async def run(context: Any, *, task_type: str, payload: dict[str, Any]) -> Any:
    """The one function that SAQ calls: run the handler of a task type."""
    job = context["job"]
    loop = asyncio.get_running_loop()
    changed = asyncio.Event()
    writing = asyncio.Lock()

    def update_progress(percent: float) -> None:
        """A plain call, maybe in a thread. job.update() is a coroutine of the loop."""
        job.progress = percent / 100
        loop.call_soon_threadsafe(changed.set)

    async def report() -> None:
        """Write the latest progress. It is the one writer, so nothing is overtaken."""
        while await changed.wait():
            changed.clear()
            async with writing:
                await job.update()

    reporter = asyncio.create_task(report())
    try:
        kind = taskqueue.TaskType(task_type)
        return await taskqueue.process_task(kind, payload, update_progress)
    finally:
        # Not in the middle of a write. One that arrives after the end of the job would
        # make it "active" again, for ever.
        async with writing:
            reporter.cancel()


async def startup(context: Any) -> None:
    """Sweep before a job is taken. The first sweep would abort it: see OUTGROW.md."""
    await queue.sweep()


settings = {
    "queue": queue,
    "functions": [run],
    "startup": startup,
    "concurrency": 3,
    "shutdown_grace_period_s": 5,
}


async def submit(task: taskqueue.TaskSubmission) -> None:
    """Submit a task, and show it to its end."""
    job = await queue.enqueue(
        "run",
        task_type=task.task_type,
        payload=task.payload,
        timeout=task.timeout,
        retries=1 + task.max_retries,
        retry_delay=0.5,
        retry_backoff=30,
    )
    while not job.completed:
        await asyncio.sleep(0.2)
        await job.refresh()
        progress = f"attempt {job.attempts}  {job.progress:4.0%}"
        print(f"{job.status.value:8}  {progress}", flush=True)
    print(job.result or job.error)
    await queue.disconnect()


if __name__ == "__main__":
    asyncio.run(submit(taskqueue.TaskSubmission.model_validate_json(sys.argv[1])))
