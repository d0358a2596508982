"""Pause and resume: from `POST /queue/pause` to `POST /queue/resume` no attempt begins.

Meanwhile tasks are taken in and cancelled as ever, and what runs, runs on. Both calls
answer with a 2xx, twice in a row too. `GET /health` shows `"paused": true` or `false`,
and the service stays healthy.
"""

import pytest

pytestmark = pytest.mark.anyio


async def call(service, verb):
    answer = await service.client.post(f"/queue/{verb}")
    assert answer.is_success, f"POST /queue/{verb}: {answer.text}"


async def test_a_paused_queue_starts_nothing_until_it_is_resumed(serve, clock):
    async with serve() as service:
        await call(service, "pause")
        task_id = await service.submit()
        await clock.sleep(100)
        task = await service.task(task_id)
        assert task["status"] == "pending", "the loop waited for a task since before"
        await call(service, "resume")
        assert (await service.end_of(task_id))["status"] == "completed"


async def test_what_runs_runs_on_and_what_waits_waits(serve, clock):
    async with serve(max_workers=1) as service:
        running = await service.submit("running", seconds=10)
        waiting = await service.submit("waiting")
        await call(service, "pause")
        await clock.sleep(50)
        assert (await service.task(running))["status"] == "completed"
        assert (await service.task(waiting))["status"] == "pending"
        await call(service, "resume")
        assert (await service.end_of(waiting))["status"] == "completed"


async def test_after_the_resume_the_best_task_is_first(serve, clock):
    async with serve(max_workers=1) as service:
        await call(service, "pause")
        for priority in (10, 5, 1):
            await service.submit(priority, priority=priority)
        await call(service, "resume")
        await clock.settle()
        assert service.names == [1, 5, 10], "was one kept in hand during the pause?"


async def test_a_delay_or_a_backoff_that_ends_meanwhile_starts_nothing(serve, clock):
    async with serve(backoff_base=1) as service:
        await service.submit("retried", seconds=5, fails=1, max_retries=1)
        await service.submit("delayed", delay=5)
        await call(service, "pause")
        await clock.sleep(50)
        assert service.names == ["retried"], "neither may start during the pause"
        await call(service, "resume")
        await clock.settle()
        assert sorted(service.names[1:]) == ["delayed", "retried"]


async def test_tasks_are_taken_in_and_cancelled_as_ever(serve, clock):
    async with serve() as service:
        await call(service, "pause")
        task_id = await service.submit("cancelled")
        answer = await service.client.delete(f"/tasks/{task_id}")
        assert answer.status_code == 200
        await service.submit("kept")
        await call(service, "resume")
        await clock.settle()
        assert service.names == ["kept"]


async def test_to_pause_or_resume_twice_is_the_same_as_once(serve, clock):
    async with serve() as service:
        for verb in ("resume", "pause", "pause", "resume", "resume"):
            await call(service, verb)
        await service.submit("a")
        for verb in ("pause", "resume", "pause"):
            await call(service, verb)
        await service.submit("b")
        await clock.sleep(10)
        assert service.names == ["a"]


async def test_health_shows_the_pause_and_is_healthy(serve):
    async with serve() as service:
        for verb, paused in [("resume", False), ("pause", True), ("resume", False)]:
            await call(service, verb)
            answer = await service.client.get("/health")
            assert answer.status_code == 200, "a paused queue is healthy"
            assert answer.json().get("paused") is paused


async def test_a_paused_queue_can_be_stopped(serve, clock):
    async with serve() as service:
        await call(service, "pause")
        task_id = await service.submit()
    assert service.queue.get_task(task_id).status == "cancelled"
    assert clock.now() < 1, "a pause should not hold up the stop"
