"""Cron: a schedule that submits a task again and again.

`POST /schedules` takes {"every": seconds, "task": what POST /tasks takes}, and answers
201 {"id": …}. The first task is submitted after `every` seconds, the next one `every`
seconds later. `DELETE /schedules/{id}` ends it with a 2xx. An unknown id is a 404.
Schedules end with the queue.
"""

import pytest

from taskqueue import HANDLERS

pytestmark = pytest.mark.anyio


async def schedule(service, every=60, name="it", **fields):
    """Make a schedule, and return its id."""
    task = {"task_type": "send_email", "payload": {"name": name}, **fields}
    answer = await service.client.post(
        "/schedules", json={"every": every, "task": task}
    )
    assert answer.status_code == 201, f"POST /schedules: {answer.text}"
    return answer.json()["id"]


async def test_it_submits_again_and_again(serve, clock):
    async with serve() as service:
        await schedule(service, every=60)
        await clock.sleep(59)
        assert service.queue.store.submitted == 0, "the first one comes after 60 s"
        await clock.sleep(2)
        assert service.queue.store.submitted == 1
        await clock.sleep(540)
        assert service.queue.store.submitted == 10, "these were 601 s"


async def test_what_it_submits_is_a_task_like_any_other(serve, clock):
    async with serve() as service:
        fields = {"task_type": "resize_image", "priority": 10, "max_retries": 3}
        await schedule(service, every=60, **fields)
        await clock.sleep(61)
        [task] = (await service.client.get("/tasks")).json()["tasks"]
        for field, value in fields.items():
            assert task[field] == value
        assert task["payload"] == {"name": "it"}
        assert task["status"] == "completed"


@pytest.mark.parametrize(
    "wrong",
    [
        {"every": 0},
        {"every": "noon"},
        {"every": None},
        {"task": {"task_type": "unknown"}},
        {"task": None},
        {"task": {"task_type": "resize_image", "payload": {"width": "wide"}}},
    ],
    ids=str,
)
async def test_what_is_wrong_is_refused_at_once(serve, wrong):
    async with serve(HANDLERS) as service:
        body = {"every": 60, "task": {"task_type": "send_email"}, **wrong}
        answer = await service.client.post("/schedules", json=body)
        assert answer.status_code == 422, "a 422 now, and not a failure each time"


async def test_schedules_do_not_get_in_each_others_way(serve, clock):
    async with serve() as service:
        await schedule(service, 20, "often")
        await schedule(service, 50, "seldom")
        await clock.sleep(101)
        assert service.names.count("often") == 5
        assert service.names.count("seldom") == 2


async def test_a_schedule_can_be_deleted(serve, clock):
    async with serve() as service:
        deleted = await schedule(service, 20, "deleted")
        await schedule(service, 20, "kept")
        await clock.sleep(41)
        answer = await service.client.delete(f"/schedules/{deleted}")
        assert answer.is_success
        await clock.sleep(100)
        assert service.names.count("deleted") == 2, "it should submit nothing more"
        assert service.names.count("kept") == 7, "the other one should go on"
        for schedule_id in (deleted, "unknown"):
            answer = await service.client.delete(f"/schedules/{schedule_id}")
            assert answer.status_code == 404
            assert "detail" in answer.json()


async def test_it_does_not_drift(serve, clock):
    async with serve() as service:
        await schedule(service, every=60)
        await clock.sleep(50)
        clock.block(40)  # something holds up the event loop, until 90 s
        await clock.sleep(25)
        assert len(service.started) == 1, "what was due at 60 s comes late, but comes"
        await clock.sleep(10)
        assert len(service.started) == 2, "the next was due at 120 s all the same"


async def test_it_outlives_a_full_queue(serve, clock):
    async with serve(max_pending=1, max_workers=1) as service:
        await schedule(service, every=60)
        await service.submit("busy", seconds=200)
        await service.submit("waiting")
        await clock.sleep(170)
        assert service.queue.store.submitted == 2, "nothing can be submitted now"
        await clock.sleep(80)
        assert "it" in service.names, "once there is room, it should go on"


async def test_it_ends_with_the_queue(serve, clock, caplog):
    async with serve() as service:
        await schedule(service, every=60)
        await clock.sleep(61)
    said = len(caplog.records)
    await clock.sleep(1000)
    assert service.queue.store.submitted == 1
    assert len(caplog.records) == said, "a schedule still tries, and says so"
