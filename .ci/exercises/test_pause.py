"""Pause and resume: after `POST /queue/pause` no attempt begins, until `POST /queue/resume`.

Meanwhile tasks are taken in and cancelled as ever, and what runs, runs on. Both calls answer with a 2xx, twice in a row
too. `GET /health` shows `"paused": true` or `false`, and the service stays healthy.
"""

import pytest

pytestmark = pytest.mark.anyio


async def call(service, verb):
    answer = await service.client.post(f"/queue/{verb}")
    assert answer.is_success, f"POST /queue/{verb} should answer with a 2xx, not {answer.status_code} {answer.text}"


async def test_a_paused_queue_starts_nothing_until_it_is_resumed(serve, clock):
    async with serve() as service:
        await call(service, "pause")
        task_id = await service.submit()
        await clock.sleep(100)
        assert (await service.task(task_id))["status"] == "pending", (
            "the task was started: the worker loop had been waiting for a task since before the pause")
        await call(service, "resume")
        assert (await service.end_of(task_id))["status"] == "completed", "after the resume it should run"


async def test_what_runs_runs_on_and_what_waits_waits(serve, clock):
    async with serve(max_workers=1) as service:
        running, waiting = await service.submit("running", seconds=10), await service.submit("waiting")
        await call(service, "pause")
        await clock.sleep(50)
        assert (await service.task(running))["status"] == "completed", "a pause should not touch what runs"
        assert (await service.task(waiting))["status"] == "pending", "the slot that came free should stay free"
        await call(service, "resume")
        assert (await service.end_of(waiting))["status"] == "completed", "after the resume it should run"


async def test_after_the_resume_the_best_task_is_first(serve, clock):
    async with serve(max_workers=1) as service:
        await call(service, "pause")
        for priority in (10, 5, 1):
            await service.submit(f"priority {priority}", priority=priority)
        await call(service, "resume")
        await clock.settle()
        assert service.names == ["priority 1", "priority 5", "priority 10"], (
            "tasks should be started by priority: does the worker loop keep one in hand during the pause?")


async def test_a_delay_or_a_backoff_that_ends_during_the_pause_starts_nothing(serve, clock):
    async with serve(backoff_base=1) as service:
        await service.submit("retried", seconds=5, fails=1, max_retries=1)
        await service.submit("delayed", delay=5)
        await call(service, "pause")
        await clock.sleep(50)
        assert service.names == ["retried"], "neither a retry nor a delayed task may start during the pause"
        await call(service, "resume")
        await clock.settle()
        assert sorted(service.names[1:]) == ["delayed", "retried"], "both should start after the resume"


async def test_tasks_are_taken_in_and_cancelled_as_ever(serve, clock):
    async with serve() as service:
        await call(service, "pause")
        task_id = await service.submit("cancelled")
        assert (await service.client.delete(f"/tasks/{task_id}")).status_code == 200
        await service.submit("kept")
        await call(service, "resume")
        await clock.settle()
        assert service.names == ["kept"], "a task that was cancelled during the pause should not run after it"


async def test_pausing_and_resuming_twice_is_the_same_as_once(serve, clock):
    async with serve() as service:
        for verb in ("resume", "pause", "pause", "resume", "resume"):
            await call(service, verb)
        await service.submit("a")
        await call(service, "pause")
        await service.submit("b")
        await call(service, "resume")
        await call(service, "pause")
        await service.submit("c")
        await clock.sleep(10)
        assert service.names[:1] == ["a"], "after as many pauses one resume should do"
        assert "c" not in service.names, "the second pause should hold like the first"


async def test_health_shows_the_pause_and_is_healthy(serve):
    async with serve() as service:
        for verb, paused in ("resume", False), ("pause", True), ("resume", False):
            await call(service, verb)
            answer = await service.client.get("/health")
            assert answer.status_code == 200, "a paused queue is healthy"
            assert answer.json().get("paused") is paused, f'GET /health should have "paused": {paused} after a {verb}'


async def test_a_paused_queue_can_be_stopped(serve, clock):
    async with serve() as service:
        await call(service, "pause")
        task_id = await service.submit()
    assert service.queue.get_task(task_id).status == "cancelled", "the stop should cancel what still waits"
    assert clock.now() < 1, "a pause should not hold up the stop"
