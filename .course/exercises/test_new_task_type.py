"""A new task type: `transcode_video`, with `url` (text) and `format`.

Both have a default, so that `{}` is a valid payload. `format` is "mp4" or "webm", and
"mp4" if it isn't given. The result has both, `url` and `format`. Like the other
handlers it only pretends, and reports its progress in some four stages. It takes a
member of TaskType, a payload model, and a decorated function.
"""

import pytest

from taskqueue import HANDLERS

pytestmark = pytest.mark.anyio


async def post(service, payload):
    task = {"task_type": "transcode_video", "payload": payload}
    return await service.client.post("/tasks", json=task)


async def transcode(serve, payload):
    """Submit one task, and return how it has ended."""
    async with serve(HANDLERS, failure_rate=0) as service:
        answer = await post(service, payload)
        assert answer.status_code == 202, f"it is not taken: {answer.text}"
        task = await service.end_of(answer.json()["id"])
        assert task["status"] == "completed", f"it has ended with {task['error']}"
        return task


async def test_its_handler_says_what_was_made_of_what(serve):
    payload = {"url": "https://example.com/a.mov", "format": "webm"}
    task = await transcode(serve, payload)
    assert task["result"] == payload
    assert task["progress"] == 100


async def test_it_reports_its_progress(serve):
    async with serve(HANDLERS, failure_rate=0) as service:
        answer = await post(service, {})
        assert answer.status_code == 202, f"it is not taken: {answer.text}"
        states = service.queue.watch(answer.json()["id"])
        seen = [state.progress async for state in states]
        assert any(0 < percent < 100 for percent in seen), f"no progress in {seen}"


async def test_every_field_of_the_payload_has_a_default(serve):
    task = await transcode(serve, {})
    assert task["result"]["format"] == "mp4", "the default of `format` is mp4"
    assert isinstance(task["result"]["url"], str), "the default of `url` is a text"


@pytest.mark.parametrize(
    ("field", "wrong"), [("url", 5), ("format", "avi"), ("format", None)]
)
async def test_a_wrong_payload_is_refused_at_the_door(serve, field, wrong):
    async with serve(HANDLERS) as service:
        answer = await post(service, {field: wrong})
        assert answer.status_code == 422, (
            "does the handler's annotation name the model?"
        )
        places = [problem["loc"] for problem in answer.json()["detail"]]
        assert ["body", "payload", field] in places, "the 422 should name the field"
