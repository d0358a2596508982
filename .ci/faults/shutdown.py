"""Signals, whatever is going on.

The server ends in time, its clients see a proper end, and the log stays clean.
"""

import asyncio
import signal
import subprocess
import sys
import time
from collections import Counter

import httpx

from client import Stream, follow
from harness import HOST, ROOT, Service, wait_until

COMMANDS = {
    "python taskqueue.py": (
        "taskqueue.py",
        "--no-tour",
        "--port",
        "{port}",
        "--drain-seconds",
        "2",
        "--pace",
        "3",
    ),
    "uvicorn taskqueue:app": ("-m", "uvicorn", "taskqueue:app", "--port", "{port}"),
}
DRAIN = {"python taskqueue.py": 2.0, "uvicorn taskqueue:app": 5.0}
SLACK = 0.5  # seconds, for a machine that has other things to do
STUBBORN = (
    "taskqueue.py",
    "--no-tour",
    "--port",
    "{port}",
    "--drain-seconds",
    "60",
    "--pace",
    "100",
)


Reading = tuple[list[Stream], list[asyncio.Task[Stream]]]


async def submit_and_watch(service: Service, tasks: int, watchers: int) -> Reading:
    """Tasks that run, wait or are delayed, a stream for each, and streams of all."""
    async with httpx.AsyncClient(base_url=service.url, timeout=30) as client:
        paths = ["/events"] * watchers
        for number in range(tasks):
            order = {
                "task_type": ["generate_report", "resize_image", "send_email"][
                    number % 3
                ],
                "delay": 3600 if number % 2 else 0,
                "max_retries": 5,
            }
            answer = await client.post("/tasks", json=order)
            paths.append(answer.headers["location"] + "/stream")
        streams = [Stream() for _ in paths]
        jobs = [
            asyncio.create_task(follow(service.port, path, stream))
            for path, stream in zip(paths, streams, strict=True)
        ]
        async with asyncio.timeout(30):
            await asyncio.gather(*(stream.opened.wait() for stream in streams))
        counts = (await client.get("/health")).json()["tasks"]
        assert counts["running"], counts
        assert counts["pending"] > tasks / 2, counts
    return streams, jobs


async def stop_with_streams(name: str, how: signal.Signals) -> None:
    with Service(*COMMANDS[name]) as service:
        streams, jobs = await submit_and_watch(service, tasks=200, watchers=20)
        began = time.monotonic()
        service.process.send_signal(how)
        async with asyncio.timeout(30):
            await asyncio.gather(*jobs)
        streams_took = time.monotonic() - began
        code = await asyncio.to_thread(service.process.wait, 30)
        took = time.monotonic() - began
        ends = Counter(stream.last for stream in streams)
        print(
            f"{name}, {how.name}: streams ended after {streams_took:.2f} s, "
            f"the process after {took:.2f} s "
            f"(code {code}); {dict(ends)}",
            flush=True,
        )
        assert all(stream.clean for stream in streams), "a stream was cut off"
        assert set(ends) <= {"shutdown", "completed", "failed"}, ends
        assert all(
            sum(frame.event == "shutdown" for frame in stream.frames) <= 1
            for stream in streams
        )
        assert took < DRAIN[name] + 1 + SLACK, f"{took:.2f} s"
        assert not service.trouble, service.trouble
        assert code in (0, -how, 128 + how), code


def stop_twice() -> None:
    """A second Ctrl-C ends at once what would have waited for handlers and readers."""
    with Service(*STUBBORN) as service:
        for _ in range(3):
            httpx.post(f"{service.url}/tasks", json={"task_type": "generate_report"})
        with service.connect() as deaf:
            deaf.sendall(b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n")
            service.process.send_signal(signal.SIGINT)
            wait_until(lambda: refused(service), "deaf to new connections")
            assert service.process.poll() is None, "it has not waited for its handlers"
            code, took = service.stop(signal.SIGINT, seconds=10)
        print(f"a second Ctrl-C: ended after {took:.2f} s (code {code})", flush=True)
        assert took < SLACK
        assert not service.trouble, service.trouble


def refused(service: Service) -> bool:
    try:
        service.connect().close()
    except OSError:
        return True
    return False


def stop_during_the_tour() -> None:
    with Service("taskqueue.py", "--port", "{port}", "--drain-seconds", "1") as service:
        wait_until(lambda: "ok: " in service.log, "on tour")
        code, took = service.stop(signal.SIGINT)
        print(
            f"Ctrl-C during the tour: ended after {took:.2f} s (code {code})",
            flush=True,
        )
        assert took < 2 + SLACK
        assert not service.trouble, service.trouble


def port_in_use() -> None:
    with Service(*STUBBORN) as service:
        command = [
            sys.executable,
            "taskqueue.py",
            "--no-tour",
            "--port",
            str(service.port),
        ]
        second = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False
        )
        said = (second.stdout + second.stderr).strip()
        assert second.returncode == 1, second.returncode
        assert f"{HOST}:{service.port}" in said, said
        assert len(said.splitlines()) == 1, said
        assert httpx.get(f"{service.url}/health").status_code == 200
        service.process.send_signal(signal.SIGINT)
    print(f"port in use: {said}", flush=True)


def run() -> None:
    for name in COMMANDS:
        for how in (signal.SIGINT, signal.SIGTERM):
            asyncio.run(stop_with_streams(name, how))
    stop_twice()
    stop_during_the_tour()
    port_in_use()
