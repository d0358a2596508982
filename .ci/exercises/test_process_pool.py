"""A process pool for CPU work: the task type `count_primes` counts the primes below `below`, in other processes.

A thread would not do: Python runs the code of one thread at a time, so the event loop would have to take turns with the
counting. The result is {"primes": n, "pids": [the ids of the processes that counted]}. The work goes to the pool in
slices of 10,000 numbers: between two of them the handler reports its progress, and can be cancelled. The pool ends with
the queue.

This test runs on the real clock, for processes know no other, and takes a few seconds.
"""

import asyncio, multiprocessing.connection, os

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
    """A pool that goes on working would keep Python from exiting."""
    yield
    for process in multiprocessing.active_children():
        process.kill()


async def submit(service, **payload):
    answer = await service.client.post("/tasks", json={"task_type": "count_primes", "payload": payload})
    assert answer.status_code == 202, f"POST /tasks should take a count_primes; it says {answer.text}"
    return answer.json()["id"]


async def test_it_counts_in_other_processes(serve):
    async with serve(HANDLERS) as service, asyncio.timeout(60):
        for below, primes in (0, 0), (3, 1), (100, 25), (30_000, 3245):
            task = await service.end_of(await submit(service, below=below))
            assert task["status"] == "completed", f"counting below {below} ended with {task['error']}"
            assert task["result"]["primes"] == primes, f"there are {primes} primes below {below}"
            assert os.getpid() not in task["result"]["pids"], "the process of the server should not count itself"
        assert task["result"]["pids"], "the result should name the processes that have counted"


async def test_a_payload_is_checked_and_has_a_default(serve):
    async with serve(HANDLERS) as service, asyncio.timeout(60):
        assert (await service.end_of(await submit(service)))["status"] == "completed", "an empty payload should do"
        order = {"task_type": "count_primes", "payload": {"below": "many"}}
        answer = await service.client.post("/tasks", json=order)
        assert answer.status_code == 422, "a wrong payload should be refused at the door"


async def test_it_reports_progress_between_the_slices(serve):
    async with serve(HANDLERS) as service, asyncio.timeout(60):
        task_id = await submit(service, below=50_000)
        seen = [state.progress async for state in service.queue.watch(task_id)]
        assert any(0 < percent < 100 for percent in seen), f"there should be progress between 0 and 100: {seen}"


async def test_a_cancel_takes_effect_between_two_slices(serve):
    async with serve(HANDLERS, max_workers=1) as service, asyncio.timeout(60):
        endless = await submit(service, below=100_000_000)
        async for state in service.queue.watch(endless):
            if state.progress or state.attempt:
                break
        await service.client.delete(f"/tasks/{endless}", params={"force": True})
        assert (await service.end_of(endless))["status"] == "cancelled"
        try:
            async with asyncio.timeout(20):
                task = await service.end_of(await submit(service, below=100))
        except TimeoutError:
            pytest.fail("the pool still works for the cancelled task: are the slices small enough?")
        assert task["status"] == "completed", "after a cancel the pool should go on working"


async def test_the_pool_ends_with_the_queue(serve):
    async with serve(HANDLERS) as service, asyncio.timeout(60):
        await service.end_of(await submit(service, below=100))
    for process in multiprocessing.active_children():  # not join(): the pool's own thread may do that already
        ended = multiprocessing.connection.wait([process.sentinel], timeout=20)
        assert ended, "the queue has stopped, but a process of its pool still runs"
