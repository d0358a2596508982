"""Long polling: `GET /tasks/{id}?wait=10` answers once the task has ended.

If it has not ended after 10 seconds, it answers with what the task is by then. `wait`
is a number of seconds, from 0 to 60. 0 is the default: answer at once.

And a Ctrl-C must not wait for a poll that is open.
"""

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from conftest import ROOT


async def poll(service, task_id, wait):
    """The answer, and how long it took."""
    began = service.clock.now()
    answer = await service.client.get(f"/tasks/{task_id}", params={"wait": wait})
    return answer, pytest.approx(service.clock.now() - began, abs=0.1)


@pytest.mark.anyio
async def test_it_answers_as_soon_as_the_task_has_ended(serve):
    async with serve() as service:
        answer, seconds = await poll(service, await service.submit(seconds=3), wait=10)
        assert answer.json()["status"] == "completed", "it should wait for the end"
        assert seconds == 3, "the task takes 3 s; its progress alone is no reason"


@pytest.mark.anyio
async def test_it_answers_with_the_present_state_when_the_time_is_up(serve):
    async with serve() as service:
        task_id = await service.submit(seconds=30)
        for progress in (0, 50):
            answer, seconds = await poll(service, task_id, wait=10)
            assert answer.status_code == 200, "that the time is up is no error"
            assert seconds == 10
            assert answer.json()["status"] == "running"
            assert answer.json()["progress"] == progress, "it shows the task as it is"


@pytest.mark.anyio
async def test_it_waits_for_a_task_that_has_not_begun(serve):
    async with serve() as service:
        answer, seconds = await poll(service, await service.submit(delay=5), wait=60)
        assert answer.json()["status"] == "completed"
        assert seconds == 5


@pytest.mark.anyio
async def test_it_answers_at_once_where_there_is_nothing_to_wait_for(serve):
    async with serve() as service:
        ended = await service.submit("short")
        running = await service.submit("long", seconds=30)
        for task_id, wait in [(ended, 10), (running, 0), ("unknown", 10)]:
            answer, seconds = await poll(service, task_id, wait)
            assert seconds == 0, f"wait={wait}: {answer.text}"
        assert answer.status_code == 404


@pytest.mark.anyio
async def test_it_answers_with_the_end_of_a_task_that_is_not_kept(serve):
    async with serve(keep_finished=0) as service:
        answer, _ = await poll(service, await service.submit(seconds=3), wait=10)
        assert answer.status_code == 200, "don't look it up again: it is gone by then"
        assert answer.json()["status"] == "completed"


@pytest.mark.anyio
@pytest.mark.parametrize("wait", [-1, 61, "soon", "nan"])
async def test_it_refuses_a_wait_that_makes_no_sense(serve, wait):
    async with serve() as service:
        answer, _ = await poll(service, await service.submit(), wait)
        assert answer.status_code == 422


@pytest.mark.anyio
async def test_it_leaves_nobody_waiting(serve):
    async with serve() as service:
        task_id = await service.submit(seconds=300)
        for _ in range(3):
            await poll(service, task_id, wait=10)
        assert service.queue.store.watchers == 0, "a poll that is over still watches"


@pytest.mark.anyio
async def test_it_answers_when_the_queue_stops(serve):
    async with serve(drain_seconds=0) as service:
        task_id = await service.submit(seconds=300)
        polling = asyncio.create_task(poll(service, task_id, wait=60))
        await service.clock.sleep(1)
        service.queue.begin_shutdown()
        answer, seconds = await polling
        assert answer.status_code == 200
        assert seconds == 1, "begin_shutdown() should end a poll"


def test_ctrl_c_does_not_wait_for_a_poll():
    """A real server and a real signal, and no stream that would notice it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "taskqueue:app", "--port", str(port)]
    server = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    transport = httpx.HTTPTransport(retries=6, trust_env=False)  # until it has begun
    url = f"http://127.0.0.1:{port}/tasks"
    with (
        ThreadPoolExecutor() as pool,
        httpx.Client(transport=transport, timeout=30) as client,
        contextlib.ExitStack() as at_the_end,
    ):
        at_the_end.callback(server.communicate)
        at_the_end.callback(server.kill)
        submission = {"task_type": "send_email", "delay": 3600}
        task = client.post(url, json=submission).json()
        poll = pool.submit(client.get, f"{url}/{task['id']}?wait=60")
        time.sleep(0.5)  # by now the server has the request
        assert not poll.done(), "the poll should wait"
        server.send_signal(signal.SIGINT)
        assert poll.result(timeout=5).status_code == 200
        log = server.communicate(timeout=5)[1].decode()
        assert "Traceback" not in log, log
