"""A new task type: `transcode_video`, with `url` (text) and `format` ("mp4" or "webm"; "mp4" if it isn't given).

Its result is {"url": …, "format": …}. Like the other handlers it only simulates, and reports its progress in some four
stages. It takes one member of TaskType, one payload model, and one decorated function.
"""

import pytest
from taskqueue import HANDLERS

pytestmark = pytest.mark.anyio


async def transcode(serve, payload):
    """Submit one task; return the answer to the POST and, if it was taken, how the task has ended."""
    async with serve(HANDLERS, failure_rate=0) as service:
        answer = await service.client.post("/tasks", json={"task_type": "transcode_video", "payload": payload})
        return answer, answer.status_code == 202 and await service.end_of(answer.json()["id"])


async def test_the_type_is_known_and_its_handler_gives_the_result(serve):
    answer, task = await transcode(serve, {"url": "https://example.com/a.mov", "format": "webm"})
    assert answer.status_code == 202, f"POST /tasks should take a transcode_video; it says {answer.text}"
    assert task["status"] == "completed", f"the task should complete, but it ended with {task['error']}"
    expected = {"url": "https://example.com/a.mov", "format": "webm"}
    assert task["result"] == expected, "the result should say what was made of what"
    assert task["progress"] == 100


async def test_it_reports_its_progress(serve):
    async with serve(HANDLERS, failure_rate=0) as service:
        answer = await service.client.post("/tasks", json={"task_type": "transcode_video"})
        assert answer.status_code == 202, f"POST /tasks should take a transcode_video; it says {answer.text}"
        seen = [state.progress async for state in service.queue.watch(answer.json()["id"])]
        assert any(0 < percent < 100 for percent in seen), f"there should be progress between 0 and 100: {seen}"


async def test_every_field_of_the_payload_has_a_default(serve):
    answer, task = await transcode(serve, {})
    assert answer.status_code == 202, f"an empty payload should do, as with the other types; the answer: {answer.text}"
    assert task["status"] == "completed", f"the handler should cope with the defaults; it ended with {task['error']}"
    assert task["result"]["format"] == "mp4", "the default of `format` should be mp4"
    assert isinstance(task["result"]["url"], str), "the default of `url` should be some text"


@pytest.mark.parametrize(("field", "wrong"), [("url", 5), ("format", "avi"), ("format", None)])
async def test_a_wrong_payload_is_refused_at_the_door(serve, field, wrong):
    answer, _ = await transcode(serve, {field: wrong})
    assert answer.status_code == 422, f"{field} = {wrong!r} should be a 422: does the handler's payload name its model?"
    places = [problem["loc"] for problem in answer.json()["detail"]]
    assert ["body", "payload", field] in places, f"the 422 should point at payload.{field}, not at {places}"
