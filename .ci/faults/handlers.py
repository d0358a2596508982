"""Bad handlers: whatever they raise, return or ignore.

Their task fails with a reason, and the service goes on.
"""

from pathlib import Path
from typing import Any

import httpx

import bad_server
from client import parse
from harness import Service, strict_json, wait_until

WORKERS = 4
SERVER = (str(Path(__file__).with_name("bad_server.py")), "{port}", str(WORKERS))
KINDS = {"async def": "send_email", "def": "generate_report"}


class Client(httpx.Client):
    def submit(self, kind: str, what: str, **fields: Any) -> str:
        answer = self.post(
            "/tasks", json={"task_type": KINDS[kind], "payload": {"do": what}, **fields}
        )
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def task(self, task_id: str) -> dict[str, Any]:
        return strict_json(self.get(f"/tasks/{task_id}").content)  # type: ignore[no-any-return]

    def in_the_end(self, task_id: str) -> dict[str, Any]:
        """The task, once it has ended; and its stream says the same."""
        wait_until(
            lambda: (
                self.task(task_id)["status"] in ("completed", "failed", "cancelled")
            ),
            "ended",
        )
        task = self.task(task_id)
        frames = parse(self.get(f"/tasks/{task_id}/stream").text)
        assert [frame.data["status"] for frame in frames] == [task["status"]], frames
        return task

    def check_service(self) -> None:
        """All slots are free, and everything answers."""
        ids = [self.submit(kind, "nothing") for kind in KINDS for _ in range(WORKERS)]
        assert {self.in_the_end(task_id)["result"] for task_id in ids} == {"done"}
        for path in ("/tasks?limit=1000", "/metrics", "/health"):
            answer = self.get(path)
            assert answer.status_code == 200, answer.text
            strict_json(answer.content)


def misdeeds() -> None:
    with (
        Service(*SERVER) as service,
        Client(base_url=service.url, timeout=20) as client,
    ):
        for kind in KINDS:
            for what in bad_server.MISDEEDS:
                task = client.in_the_end(client.submit(kind, what, max_retries=1))
                assert task["status"] == "failed", f"{kind}, {what}: {task}"
                attempts = 1 if what.startswith("return") else 2
                assert task["attempt"] == attempts, f"{kind}, {what}: {task}"
                assert task["error"], f"{kind}, {what}: {task}"
                assert len(task["error"]) < 2000
            client.check_service()
            print(
                f"  {kind}: {len(bad_server.MISDEEDS)} misdeeds, each failed with a reason",
                flush=True,
            )
        for kind in KINDS:
            task = client.in_the_end(client.submit(kind, "from threads"))
            assert task["result"] == {"reported": 1000}, task
        assert (
            "all refused"
            in client.in_the_end(client.submit("async def", "lie"))["error"]
        )
        late = client.in_the_end(client.submit("async def", "after the end"))
        assert (
            client.in_the_end(client.submit("async def", "block"))["result"] == "done"
        )
        assert client.task(late["id"]) == late, "a final state has changed"
        client.check_service()
        assert not service.trouble, service.trouble
        _, took = service.stop()
        assert took < 1.5, took
        assert not service.trouble, service.trouble


def deaf_to_cancellation() -> None:
    """Handlers that can't be stopped keep their slots, and nothing else.

    Not even a stop waits for them.
    """
    with (
        Service(*SERVER) as service,
        Client(base_url=service.url, timeout=20) as client,
    ):
        swallowed = client.submit("async def", "swallow", timeout=0.2)
        assert "TimeoutError" in client.in_the_end(swallowed)["error"]
        briefly = client.submit("def", "block a while", timeout=0.2)
        assert "TimeoutError" in client.in_the_end(briefly)["error"]
        stuck = [
            client.submit("async def", "ignore", timeout=0.2),
            client.submit("def", "block", timeout=0.2),
            client.submit("def", "block"),
        ]
        wait_until(
            lambda: client.get("/health").json()["tasks"]["running"] == 3,
            "all three running",
        )
        for task_id in stuck:
            assert client.delete(f"/tasks/{task_id}?force=true").status_code == 202
        ids = [
            client.submit("async def", "nothing") for _ in range(20)
        ]  # one slot is left
        assert {client.in_the_end(task_id)["status"] for task_id in ids} == {
            "completed"
        }
        assert {client.task(task_id)["status"] for task_id in stuck} == {"running"}
        _, took = service.stop()
        assert service.log.count("left behind") == 3, service.log
        assert not service.trouble, service.trouble
        print(
            f"  three that never let go: ended after {took:.2f} s (drain 1 s)",
            flush=True,
        )
        assert took < 2.5, took


def run() -> None:
    misdeeds()
    deaf_to_cancellation()
