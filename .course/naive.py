"""What a good engineer writes in half an hour. It works. See `try_it.py naive`."""

import asyncio
import time
import uuid
from collections import Counter, defaultdict
from contextlib import asynccontextmanager
from typing import Any, Literal

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel
from sse_starlette.sse import EventSourceResponse


class TaskSubmission(BaseModel):
    task_type: Literal["resize_image", "generate_report", "send_email"]
    payload: dict[str, Any] = {}
    priority: Literal[1, 5, 10] = 5
    max_retries: int = 0
    timeout: float = 60


class Task(TaskSubmission):
    id: str
    status: str = "pending"
    progress: int = 0
    result: Any = None
    error: str | None = None


tasks = {}
queue = asyncio.PriorityQueue()
slots = asyncio.Semaphore(3)
subscribers = defaultdict(list)
requests = Counter()


def update(task, **changes):
    for name, value in changes.items():
        setattr(task, name, value)
    for subscriber in subscribers[task.id]:
        subscriber.put_nowait(task.model_copy())


async def do_the_work(task):
    for step in range(1, 5):
        if task.task_type == "generate_report":
            time.sleep(0.25)  # a library that blocks
        else:
            await asyncio.sleep(0.25)
        if str(task.payload.get("to")).endswith(".invalid"):
            raise ConnectionError("no mail server")
        update(task, progress=25 * step)
    return {"done": task.task_type}


async def run(task):
    async with slots:
        for attempt in range(task.max_retries + 1):
            update(task, status="running", progress=0)
            try:
                result = await asyncio.wait_for(do_the_work(task), task.timeout)
                return update(task, status="completed", result=result)
            except Exception as error:
                task.error = str(error)
                await asyncio.sleep(0.5 * 2**attempt)
        update(task, status="failed")


async def worker():
    while True:
        _, _, task = await queue.get()
        if task.status == "pending":  # it was not cancelled
            asyncio.create_task(run(task))


@asynccontextmanager
async def lifespan(app):
    worker_task = asyncio.create_task(worker())
    yield
    worker_task.cancel()


app = FastAPI(lifespan=lifespan)


@app.middleware("http")
async def count_requests(request, call_next):
    response = await call_next(request)
    requests[request.method, request.url.path, response.status_code] += 1
    return response


@app.post("/tasks", status_code=202)
async def submit(submission: TaskSubmission):
    task = Task(id=str(uuid.uuid4()), **submission.model_dump())
    tasks[task.id] = task
    queue.put_nowait((task.priority, time.time(), task))
    return task


@app.get("/tasks")
async def list_tasks():
    return {"tasks": list(tasks.values())[::-1], "total": len(tasks)}


@app.get("/tasks/{task_id}")
async def get_task(task_id: str):
    if task_id not in tasks:
        raise HTTPException(404, "Task not found")
    return tasks[task_id]


@app.delete("/tasks/{task_id}")
async def cancel(task_id: str):
    task = await get_task(task_id)
    if task.status != "pending":
        raise HTTPException(409, f"Task is {task.status}")
    update(task, status="cancelled")
    return {"detail": "Task cancelled", "task_id": task_id}


@app.get("/tasks/{task_id}/stream")
async def stream(task_id: str):
    async def events():
        subscriber = asyncio.Queue()
        yield {"event": "progress", "data": tasks[task_id].model_dump_json()}
        subscribers[task_id].append(subscriber)
        status = ""
        while status not in ("completed", "failed", "cancelled"):
            task = await subscriber.get()
            status = task.status
            yield {"event": "progress", "data": task.model_dump_json()}

    return EventSourceResponse(events())


@app.get("/health")
async def health():
    watchers = sum(len(each) for each in subscribers.values())
    return {"status": "healthy", "watchers": watchers}


@app.get("/metrics")
async def metrics():
    lines = [f"{count} {' '.join(map(str, key))}" for key, count in requests.items()]
    return {"total_requests": requests.total(), "requests": lines}
