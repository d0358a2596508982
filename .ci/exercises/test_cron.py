"""Cron: a schedule that submits.

`POST /schedules` with {"every": seconds, "task": what POST /tasks takes} answers 201 {"id": …}. The first task is
submitted after `every` seconds, and each next one `every` seconds later. `DELETE /schedules/{id}` (a 2xx) ends it; an
unknown id is a 404. Schedules end with the queue.
"""

import pytest

pytestmark = pytest.mark.anyio


async def schedule(service, every=60, name="it", **fields):
    task = {"task_type": "send_email", "payload": {"name": name}, **fields}
    answer = await service.client.post("/schedules", json={"every": every, "task": task})
    assert answer.status_code == 201, f"POST /schedules should answer 201, not {answer.status_code} {answer.text}"
    return answer.json()["id"]


async def test_it_submits_again_and_again(serve, clock):
    async with serve() as service:
        await schedule(service, every=60)
        await clock.sleep(59)
        assert service.queue.submitted == 0, "the first task should come after `every` seconds, not before"
        await clock.sleep(2)
        assert service.queue.submitted == 1, "after 61 s there should be one task"
        await clock.sleep(540)
        assert service.queue.submitted == 10, "after 601 s there should be ten tasks"


async def test_what_it_submits_is_a_task_like_any_other(serve, clock):
    async with serve() as service:
        await schedule(service, every=60, task_type="resize_image", priority=10, max_retries=3)
        await clock.sleep(61)
        [task] = (await service.client.get("/tasks")).json()["tasks"]
        found = {key: task[key] for key in ("task_type", "payload", "priority", "max_retries", "status")}
        assert found == {"task_type": "resize_image", "payload": {"name": "it"}, "priority": 10, "max_retries": 3,
                         "status": "completed"}


@pytest.mark.parametrize("order", [
    {"every": 0}, {"every": -5}, {"every": "noon"}, {"every": None}, {"task": {"task_type": "unknown"}}, {"task": None},
    {"task": {"task_type": "resize_image", "payload": {"width": "wide"}}}], ids=str)
async def test_an_order_that_is_wrong_is_refused_at_once(serve, order):
    async with serve() as service:
        order = {"every": 60, "task": {"task_type": "send_email"}} | order
        answer = await service.client.post("/schedules", json=order)
        assert answer.status_code == 422, f"it should be a 422 now, and not a failure each time: {answer.status_code}"


async def test_schedules_do_not_get_in_each_others_way(serve, clock):
    async with serve() as service:
        await schedule(service, 20, "often")
        await schedule(service, 50, "seldom")
        await clock.sleep(101)
        assert service.names.count("often") == 5
        assert service.names.count("seldom") == 2


async def test_a_schedule_can_be_deleted(serve, clock):
    async with serve() as service:
        deleted, _ = await schedule(service, 20, "deleted"), await schedule(service, 20, "kept")
        await clock.sleep(41)
        answer = await service.client.delete(f"/schedules/{deleted}")
        assert answer.is_success, f"DELETE /schedules/{{id}} should answer with a 2xx, not {answer.status_code}"
        await clock.sleep(100)
        assert service.names.count("deleted") == 2, "once it is deleted, it should submit nothing more"
        assert service.names.count("kept") == 7, "the other schedule should go on"
        for schedule_id in (deleted, "unknown"):
            answer = await service.client.delete(f"/schedules/{schedule_id}")
            assert (answer.status_code, "detail" in answer.json()) == (404, True), "there is no such schedule: a 404"


async def test_it_does_not_drift(serve, clock):
    async with serve() as service:
        await schedule(service, every=60)
        await clock.sleep(50)
        clock.block(40)  # something holds up the event loop, until 90 s
        await clock.sleep(25)
        assert len(service.started) == 1, "the task that was due at 60 s should come late, but come"
        await clock.sleep(10)
        assert len(service.started) == 2, (
            "the next task was due at 120 s, though the last one was late: count from when that was due, not from now")


async def test_it_outlives_a_full_queue(serve, clock):
    async with serve(max_pending=1, max_workers=1) as service:
        await schedule(service, every=60)
        await service.submit("busy", seconds=200)
        await service.submit("waiting")
        await clock.sleep(170)
        assert service.queue.submitted == 2, "while the queue is full, nothing can be submitted"
        await clock.sleep(80)
        assert "it" in service.names, "once there is room again, the schedule should go on submitting"


async def test_it_ends_with_the_queue(serve, clock, caplog):
    async with serve() as service:
        await schedule(service, every=60)
        await clock.sleep(61)
    said = len(caplog.records)
    await clock.sleep(1000)
    assert service.queue.submitted == 1, "nothing should be submitted once the queue has stopped"
    assert len(caplog.records) == said, f"a schedule still tries, and says so: {caplog.records[-1].getMessage()}"
