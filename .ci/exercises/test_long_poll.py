"""Long polling: `GET /tasks/{id}?wait=10` answers once the task has ended, or after 10 seconds with what it is by then.

`wait` is a number of seconds, from 0 (the default: answer at once) to 60.
"""

import asyncio

import pytest

pytestmark = pytest.mark.anyio


async def poll(service, task_id, wait):
    """Return the answer, and how long it took."""
    began = service.clock.now()
    answer = await service.client.get(f"/tasks/{task_id}", params={"wait": wait})
    return answer, pytest.approx(service.clock.now() - began, abs=0.1)


async def test_it_answers_as_soon_as_the_task_has_ended(serve):
    async with serve() as service:
        answer, took = await poll(service, await service.submit(seconds=3), wait=10)
        assert answer.json()["status"] == "completed", "the answer should wait until the task has ended"
        assert took == 3, "the answer should come when the task ends, after 3 s; progress alone must not end the wait"


async def test_it_answers_with_the_present_state_when_the_time_is_up(serve):
    async with serve() as service:
        task_id = await service.submit(seconds=30)
        answer, took = await poll(service, task_id, wait=10)
        assert answer.status_code == 200, f"that the time is up is no error: {answer.text}"
        assert took == 10, "the task runs for 30 s, so the answer should come after `wait`"
        state = answer.json()["status"], answer.json()["progress"]
        assert state == ("running", 0), "the answer should show the task as it is"
        answer, took = await poll(service, task_id, wait=10)
        assert (took, answer.json()["progress"]) == (10, 50), "the answer should show the task as it is by now"


async def test_it_waits_for_a_task_that_has_not_begun(serve):
    async with serve() as service:
        answer, took = await poll(service, await service.submit(delay=5), wait=60)
        assert (answer.json()["status"], took) == ("completed", 5)


async def test_it_answers_at_once_where_there_is_nothing_to_wait_for(serve):
    async with serve() as service:
        ended, running = await service.submit("short"), await service.submit("long", seconds=30)
        for task_id, wait in (ended, 10), (running, 0), ("unknown", 10):
            _, took = await poll(service, task_id, wait)
            assert took == 0, f"wait={wait} for a task that is {(await service.task(task_id)).get('status')}"
        answer, _ = await poll(service, "unknown", wait=10)
        assert answer.status_code == 404


@pytest.mark.parametrize("wait", [-1, 61, "soon", "nan"])
async def test_it_refuses_a_wait_that_makes_no_sense(serve, wait):
    async with serve() as service:
        answer, _ = await poll(service, await service.submit(), wait)
        assert answer.status_code == 422, f"wait={wait} should be a 422"


async def test_it_leaves_nobody_waiting(serve):
    async with serve() as service:
        task_id = await service.submit(seconds=300)
        for _ in range(3):
            await poll(service, task_id, wait=10)
        assert service.queue.watchers == 0, "a poll that is over should not go on watching"


async def test_it_answers_when_the_queue_stops(serve):
    async with serve(drain_seconds=0) as service:
        polling = asyncio.create_task(poll(service, await service.submit(seconds=300), wait=60))
        await service.clock.sleep(1)
        service.queue.begin_shutdown()
        answer, took = await polling
        assert (answer.status_code, took) == (200, 1), "queue.begin_shutdown() should end a poll: none holds up a stop"
