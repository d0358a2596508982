"""Re-running: `POST /tasks/{id}/rerun` submits a failed task once more, as a new task.

It answers as POST /tasks does: 202, the new task, its Location. The old one stays as it
is, for a final state never changes. A task that has not failed is a 409, an unknown one
a 404.
"""

import pytest

pytestmark = pytest.mark.anyio


async def rerun(service, task_id, **headers):
    """The answer to a rerun that should succeed."""
    answer = await service.client.post(f"/tasks/{task_id}/rerun", headers=headers)
    assert answer.status_code == 202, f"{answer.status_code} {answer.text}"
    return answer


async def test_a_failed_task_is_run_again_as_a_new_one(serve):
    async with serve() as service:
        old = await service.end_of(await service.submit(fails=1))
        answer = await rerun(service, old["id"], **{"X-Request-ID": "again"})
        new = answer.json()
        assert new["id"] != old["id"], "it should be a new task, with an id of its own"
        assert answer.headers.get("Location") == f"/tasks/{new['id']}"
        assert new["status"] == "pending", "the new task begins from the beginning"
        assert new["attempt"] == 0
        assert new["request_id"] == "again", "of the request that has made it"
        assert (await service.end_of(new["id"]))["status"] == "completed"
        assert await service.task(old["id"]) == old, "the old task stays as it was"


async def test_the_new_task_is_the_same_submission(serve):
    fields = {"task_type": "resize_image", "priority": 10, "max_retries": 1}
    async with serve(backoff_base=0) as service:
        old_id = await service.submit(seconds=100, timeout=7, **fields)
        old = await service.end_of(old_id)
        new = await service.end_of((await rerun(service, old_id)).json()["id"])
        for field in ("task_type", "payload", "priority", "max_retries"):
            assert new[field] == old[field]
        assert new["error"] == old["error"], "it has the old one's timeout, too"
        assert new["attempt"] == 2, "the new task has all its retries"


async def test_only_what_has_failed_can_be_run_again(serve):
    async with serve(max_workers=1) as service:
        tasks = {
            "completed": await service.submit(),
            "running": await service.submit(seconds=50),
            "pending": await service.submit(),
        }
        for status, task_id in tasks.items():
            answer = await service.client.post(f"/tasks/{task_id}/rerun")
            assert answer.status_code == 409, f"for a task that is {status}"
            assert status in str(answer.json()["detail"]), "the 409 names the status"
        answer = await service.client.post("/tasks/unknown/rerun")
        assert answer.status_code == 404
        assert "id" in answer.text, "the 404 says that no task has this id"
        assert service.queue.store.submitted == 3, "what is refused submits nothing"


async def test_it_goes_through_the_same_door_as_any_task(serve):
    async with serve(max_workers=1, max_pending=1) as service:
        failed = await service.submit(fails=9)
        await service.submit(seconds=50)
        await service.submit()
        answer = await service.client.post(f"/tasks/{failed}/rerun")
        assert answer.status_code == 503, "the queue is full, for a rerun as well"
