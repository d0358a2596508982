"""A journal: with `Settings(journal="tasks.jsonl")` the tasks survive a restart.

The queue writes into that file what it will need again, before it answers. At its start
it reads the file. What had ended is shown as it was, with its result. All else waits
and runs, with its id and in its order. What ran when the server died runs once more.
A server that is killed may leave half a line at the end. It must start all the same.
The file must not grow for ever: it is made anew at a start. By default there is none.
"""

import os
import pathlib
import shutil

import pytest

pytestmark = pytest.mark.anyio


@pytest.fixture
def journal(tmp_path):
    return str(tmp_path / "tasks.jsonl")


async def killed(journal):
    """What a server leaves that is killed now: a copy of the journal as it is."""
    return shutil.copy(journal, journal + ".left")


async def test_what_was_submitted_is_run_after_a_restart(serve, clock, journal):
    async with serve(journal=journal, drain_seconds=0) as service:
        await service.submit("running", seconds=9)
        fields = {"task_type": "resize_image", "priority": 10, "max_retries": 2}
        before = await service.task(await service.submit("waiting", delay=9, **fields))
    async with serve(journal=journal) as service:
        after = await service.task(before["id"])
        for field in ("id", "payload", "created_at", "request_id", *fields):
            assert after[field] == before[field], f"the {field} should be the old one"
        await clock.sleep(20)
        assert sorted(service.names) == ["running", "waiting"]
        assert (await service.task(before["id"]))["status"] == "completed"


async def test_it_is_written_before_the_answer(serve, journal):
    async with serve(journal=journal) as service:
        await service.submit("it", seconds=9)
        left = await killed(journal)
    async with serve(journal=left) as service:
        await service.clock.sleep(10)
        assert service.names == ["it"], "a client that has its 202 relies on the task"


async def test_what_has_ended_is_not_run_again(serve, journal):
    async with serve(journal=journal, max_workers=1) as service:
        done = await service.end_of(await service.submit("done"))
        failed = await service.end_of(await service.submit("failed", fails=1))
        await service.submit("busy", seconds=9)
        cancelled = await service.submit("cancelled")
        await service.client.delete(f"/tasks/{cancelled}")
        cancelled = await service.task(cancelled)
        await service.clock.sleep(10)
    async with serve(journal=journal) as service:
        await service.clock.sleep(10)
        assert service.names == []
        for task in (done, failed, cancelled):
            assert await service.task(task["id"]) == task, "it is shown as it was"


async def test_the_order_is_kept(serve, clock, journal):
    async with serve(journal=journal, max_workers=1, drain_seconds=0) as service:
        await service.submit("busy", seconds=100)
        for name, priority in [("a", 10), ("b", 10), ("c", 1)]:
            await service.submit(name, priority=priority)
    async with serve(journal=journal, max_workers=1) as service:
        await service.submit("d", priority=10)
        await clock.sleep(200)
        assert [name for name in service.names if name != "busy"] == list("cabd")


async def test_a_retry_is_not_forgotten(serve, clock, journal):
    async with serve(journal=journal, backoff_base=1000, backoff_cap=1000) as service:
        task_id = await service.submit("it", fails=1, max_retries=1)
    async with serve(journal=journal) as service:
        await clock.sleep(1000)
        assert service.names == ["it"]
        assert (await service.task(task_id))["attempt"] == 2, "the first one counts"


async def test_half_a_line_at_the_end_is_no_reason_not_to_start(serve, clock, journal):
    async with serve(journal=journal, drain_seconds=0) as service:
        await service.submit("before", seconds=100)
        await service.submit("torn", seconds=100)
    os.truncate(journal, os.path.getsize(journal) - 10)
    async with serve(journal=journal, drain_seconds=0) as service:
        await clock.settle()
        assert "before" in service.names
        await service.submit("after", seconds=100)
    async with serve(journal=journal, drain_seconds=0) as service:
        await clock.settle()
        assert "after" in service.names, "it was written behind half a line"


async def test_it_does_not_grow_for_ever(serve, clock, journal):
    for _ in range(3):
        async with serve(journal=journal, keep_finished=5) as service:
            for _ in range(50):
                await service.submit()
            await clock.sleep(1)
    async with serve(journal=journal, keep_finished=5):
        lines = pathlib.Path(journal).read_text().splitlines()
        assert len(lines) <= 10, "at a start, only what is kept"


async def test_without_the_setting_nothing_is_kept(serve):
    async with serve(drain_seconds=0) as service:
        task_id = await service.submit(seconds=9)
    async with serve() as service:
        answer = await service.client.get(f"/tasks/{task_id}")
        assert answer.status_code == 404
        assert service.queue.store.submitted == 0
