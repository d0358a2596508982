"""A process pool for CPU work: `count_primes` counts the primes below `below`.

A thread would not do. Python runs the code of one thread at a time, so the event loop
would have to take turns with the counting. So other processes count. The result is
{"primes": n, "pids": [the ids of the processes that have counted]}.

The work goes to the pool in slices of 10,000 numbers. Between two of them the handler
reports its progress, and can be cancelled. The pool ends with the queue.

This test takes some seconds. It runs on the real clock: processes know no other.
"""

import asyncio
import multiprocessing
import multiprocessing.connection
import os

import pytest

from taskqueue import HANDLERS

pytestmark = pytest.mark.anyio


@pytest.fixture
def clock():
    return None


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture(autouse=True)
def no_process_is_left():
    """A pool that works on would keep Python from ending."""
    yield
    for process in multiprocessing.active_children():
        process.kill()


async def submit(service, **payload):
    task = {"task_type": "count_primes", "payload": payload}
    answer = await service.client.post("/tasks", json=task)
    assert answer.status_code == 202, f"POST /tasks: {answer.text}"
    return answer.json()["id"]


async def test_it_counts_in_other_processes(serve):
    async with serve(HANDLERS) as service, asyncio.timeout(60):
        for below, primes in [(0, 0), (3, 1), (100, 25), (30_000, 3245)]:
            task = await service.end_of(await submit(service, below=below))
            assert task["status"] == "completed", task["error"]
            assert task["result"]["primes"] == primes, f"below {below}"
        assert task["result"]["pids"], "which processes have counted?"
        assert os.getpid() not in task["result"]["pids"], "the server should not"


async def test_the_payload_is_checked_and_has_a_default(serve):
    async with serve(HANDLERS) as service, asyncio.timeout(60):
        task = await service.end_of(await submit(service))
        assert task["status"] == "completed", "an empty payload should do"
        wrong = {"task_type": "count_primes", "payload": {"below": "many"}}
        answer = await service.client.post("/tasks", json=wrong)
        assert answer.status_code == 422


async def test_it_reports_progress_between_the_slices(serve):
    async with serve(HANDLERS) as service, asyncio.timeout(60):
        states = service.queue.watch(await submit(service, below=50_000))
        seen = [state.progress async for state in states]
        assert any(0 < percent < 100 for percent in seen), f"no progress in {seen}"


async def test_a_cancel_takes_effect_between_two_slices(serve):
    async with serve(HANDLERS, max_workers=1) as service, asyncio.timeout(60):
        endless = await submit(service, below=100_000_000)
        async for state in service.queue.watch(endless):
            if state.attempt == 1:
                break
        await service.client.delete(f"/tasks/{endless}?force=true")
        assert (await service.end_of(endless))["status"] == "cancelled"
        async with asyncio.timeout(20):  # else the pool still works for the first one
            task = await service.end_of(await submit(service, below=100))
        assert task["status"] == "completed"


async def test_the_pool_ends_with_the_queue(serve):
    async with serve(HANDLERS) as service, asyncio.timeout(60):
        await service.end_of(await submit(service, below=100))
    # WHY not join(): a thread of the pool may wait for the process already.
    for process in multiprocessing.active_children():
        ended = multiprocessing.connection.wait([process.sentinel], timeout=20)
        assert ended, "the queue has stopped, but a process of its pool still runs"
