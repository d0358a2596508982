"""Re-running: `POST /tasks/{id}/rerun` submits what a failed task was to do once more, as a new task.

It answers as POST /tasks does: 202, the new task, its Location. The old one stays as it is, for a final state never
changes. A task that has not failed is a 409, an unknown one a 404.
"""

import pytest

pytestmark = pytest.mark.anyio


async def rerun(service, task_id, **headers):
    answer = await service.client.post(f"/tasks/{task_id}/rerun", headers=headers)
    assert answer.status_code == 202, f"a failed task's rerun should be a 202, not {answer.status_code} {answer.text}"
    return answer


async def test_a_failed_task_is_run_again_as_a_new_one(serve):
    async with serve() as service:
        old = await service.end_of(await service.submit(fails=1))
        answer = await rerun(service, old["id"], **{"X-Request-ID": "again"})
        new = answer.json()
        assert new["id"] != old["id"], "it should be a new task, with an id of its own"
        assert answer.headers.get("Location") == f"/tasks/{new['id']}", "it should say where the new task is"
        assert (new["status"], new["attempt"]) == ("pending", 0), "the new task should begin from the beginning"
        assert new["request_id"] == "again", "the new task should carry the id of the request that made it"
        assert (await service.end_of(new["id"]))["status"] == "completed", "the new task should run, like any other"
        assert await service.task(old["id"]) == old, "the old task should stay as it was"


async def test_the_new_task_is_the_same_order(serve):
    fields = {"task_type": "resize_image", "priority": 10, "max_retries": 1, "timeout": 7}
    async with serve(backoff_base=0) as service:
        old = await service.end_of(await service.submit(seconds=100, **fields))
        new = await service.end_of((await rerun(service, old["id"])).json()["id"])
        for field in ("task_type", "payload", "priority", "max_retries"):
            assert new[field] == old[field], f"the new task should have the old one's {field}"
        assert new["error"] == old["error"], "the new task should have the old one's timeout"
        assert new["attempt"] == 2, "the new task should have all its retries"


async def test_only_what_has_failed_can_be_rerun(serve):
    async with serve(max_workers=1) as service:
        tasks = {"completed": await service.submit(), "running": await service.submit(seconds=50),
                 "pending": await service.submit()}
        for status, task_id in tasks.items():
            answer = await service.client.post(f"/tasks/{task_id}/rerun")
            assert answer.status_code == 409, f"the rerun of a {status} task should be a 409"
            assert status in str(answer.json()["detail"]), "the 409 should name the task's status"
        answer = await service.client.post("/tasks/unknown/rerun")
        assert (answer.status_code, "id" in answer.text) == (404, True), "an unknown task should be a 404 that says so"
        assert service.queue.submitted == 3, "a rerun that is refused should submit nothing"


async def test_it_goes_through_the_same_door_as_any_task(serve):
    async with serve(max_workers=1, max_pending=1) as service:
        failed = await service.submit(fails=9)
        await service.submit(seconds=50)
        await service.submit()
        answer = await service.client.post(f"/tasks/{failed}/rerun")
        assert answer.status_code == 503, "when the queue is full, a rerun should be refused like any submission"
