"""Prove what .course/OUTGROW.md says of saq_worker.py. Run in a folder with it.

It submits jobs with the command that the text prints, and reads what that shows. The
worker is started when they all wait, which is the hardest moment for it.
"""

import asyncio
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

TEXT = Path(__file__).resolve().parents[2] / ".course/OUTGROW.md"
SECONDS = 60  # for all that is proved here: much more than it takes
SHOWN = re.compile(r"(\w+) +attempt (\d+) +(\d+)%")
Shown = tuple[str, int, int]  # status, attempt, per cent


def printed_body() -> str:
    """The job that the text itself submits."""
    lines = TEXT.read_text(encoding="utf-8").splitlines()
    command = next(line for line in lines if "python saq_worker.py '" in line)
    return shlex.split(command)[2]


async def submit(body: str) -> tuple[list[Shown], str]:
    """Run `python saq_worker.py BODY` to its end.

    Return what it showed, and the result or error after that.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "saq_worker.py",
        body,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        output = (await process.communicate())[0].decode()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, output
    lines = output.splitlines()
    shown = [
        (match[1], int(match[2]), int(match[3]))
        for match in map(SHOWN.fullmatch, lines)
        if match
    ]
    assert shown, output
    return shown, "\n".join(lines[len(shown) :])


async def completes(body: str) -> None:
    """It completes, and some progress is seen on the way.

    Retries take care of the simulated failures.
    """
    name = json.loads(body)["task_type"]
    shown, result = await submit(body)
    assert shown[-1][0] == "complete", (name, shown, result)
    assert shown[-1][2] == 100, (name, shown)
    seen = sorted(
        {
            percent
            for status, _, percent in shown
            if status == "active" and 0 < percent < 100
        }
    )
    assert seen, f"{name}: no progress was seen in {shown}"
    print(f"{name}: complete, seen at {seen} %: {result}")


async def fails(body: dict[str, object], attempts: int, error: str) -> None:
    """It is tried `attempts` times, and fails with `error` in its last line."""
    shown, traceback = await submit(json.dumps(body))
    assert shown[-1][:2] == ("failed", attempts), (body, shown, traceback)
    assert traceback.strip().splitlines()[-1] == error, traceback
    print(f"{body['task_type']}: failed after attempt {attempts}: {error}")


async def nothing_is_left(queue: Any) -> None:
    """Each job has ended, and no late write of progress has brought one back."""
    info = await queue.info()
    assert info["queued"] == info["active"] == info["scheduled"] == 0, info
    jobs = [job async for job in queue.iter_jobs()]
    found = [
        (job.kwargs, job.status.value, job.attempts, job.completed) for job in jobs
    ]
    assert len(found) == 6, found
    assert all(
        status in ("complete", "failed") and completed
        for _, status, _, completed in found
    ), found
    print(f"{len(found)} jobs, all ended, none left in the queue")


async def prove() -> None:
    sys.path.insert(0, "")
    from saq_worker import queue

    nobody = {"to": "nobody@example.invalid"}
    async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as group:
        for proof in (
            completes(printed_body()),
            completes(json.dumps({"task_type": "resize_image", "max_retries": 10})),
            completes(json.dumps({"task_type": "send_email", "max_retries": 10})),
            fails(
                {"task_type": "send_email", "payload": nobody, "max_retries": 2},
                3,
                "ConnectionError: no mail server for nobody@example.invalid",
            ),
            fails({"task_type": "resize_image", "timeout": 0.2}, 1, "TimeoutError"),
            fails({"task_type": "generate_report", "timeout": 0.2}, 1, "TimeoutError"),
        ):
            group.create_task(proof)
        while await queue.count("queued") < 6:
            await asyncio.sleep(0.05)
        print("6 jobs wait for a worker")  # ./run starts it when it reads this
    await nothing_is_left(queue)
    await queue.disconnect()


if __name__ == "__main__":
    asyncio.run(prove())
