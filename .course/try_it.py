"""Try a task queue service over HTTP: does it work, and which traps does it fall into?

    .venv/bin/python .course/try_it.py naive          .course/naive.py
    .venv/bin/python .course/try_it.py my_queue.py    your own file, with an `app`

Each check starts a server of its own, on a free port, and takes some seconds.
"""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

try:
    import httpx
except ImportError:
    sys.exit("There is no httpx here. Run it with .venv/bin/python.")

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
ENDED = ("completed", "failed", "cancelled")
REPORT = {"task_type": "generate_report"}
IMAGE = {"task_type": "resize_image"}
EMAIL = {"task_type": "send_email"}
BAD_EMAIL = {"task_type": "send_email", "payload": {"to": "ada@example.invalid"}}
JSON = {"Content-Type": "application/json"}

TASKQUEUE = """
import sys, uvicorn, taskqueue
settings = taskqueue.Settings(failure_rate=0, pace=0.5, keep_finished=20)
uvicorn.run(taskqueue.create_app(settings), port=int(sys.argv[1]), log_level="error")
"""
OTHER = """
import sys, uvicorn
sys.path.insert(0, sys.argv[2])
app = __import__(sys.argv[3]).app
uvicorn.run(app, port=int(sys.argv[1]), log_level="critical")
"""


Check = Callable[["Service"], bool]
WORKS: dict[str, Check] = {}
TRAPS: dict[str, Check] = {}


def check(table: dict[str, Check], name: str) -> Callable[[Check], Check]:
    """Put a function into this table."""

    def register(function: Check) -> Check:
        table[name] = function
        return function

    return register


class Service:
    """A server in a process of its own, and a client of it."""

    def __init__(self, program: str, *arguments: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = str(probe.getsockname()[1])
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, port, *arguments],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        url = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=url, timeout=10, trust_env=False)
        for _ in range(300):  # until it listens
            time.sleep(0.05)
            with contextlib.suppress(httpx.ConnectError):
                self.client.get("/health")
                break

    def close(self) -> None:
        self.client.close()
        self.process.kill()
        self.process.wait()

    def submit(self, task: dict[str, Any], **fields: Any) -> str:
        """Submit a task, and return its path."""
        answer = self.client.post("/tasks", json={**task, **fields})
        return f"/tasks/{answer.json()['id']}"

    def get(self, path: str) -> Any:
        return self.client.get(path).json()

    def wait(self, path: str, *statuses: str, seconds: float = 20) -> Any:
        """The task once it has such a status, or when the time is up."""
        deadline = time.monotonic() + seconds
        while True:
            task = self.get(path)
            if task["status"] in statuses or time.monotonic() > deadline:
                return task
            time.sleep(0.05)

    def end_of(self, path: str, seconds: float = 20) -> Any:
        """The task once it has ended, or when the time is up."""
        return self.wait(path, *ENDED, seconds=seconds)

    def fill(self) -> list[str]:
        """Submit as many tasks as there are slots, and let them start."""
        paths = [self.submit(IMAGE) for _ in range(3)]
        time.sleep(0.2)
        return paths

    def read_stream(self, path: str, seconds: float = 5, **headers: str) -> list[str]:
        """The lines of a stream up to its end. An error if it doesn't end in time."""
        lines = []
        deadline = time.monotonic() + seconds
        stream = self.client.stream("GET", path, headers=headers, timeout=seconds)
        with stream as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                lines.append(line)
                if time.monotonic() > deadline:
                    raise TimeoutError("the stream does not end")
        return lines


# -- What works. Each returns whether it does. -----------------------------------------


@check(WORKS, "submit and poll")
def submit_and_poll(service: Service) -> bool:
    """POST is answered with 202, and the task completes with a result."""
    answer = service.client.post("/tasks", json=EMAIL)
    task = service.end_of(f"/tasks/{answer.json()['id']}")
    return answer.status_code == 202 and task["status"] == "completed"


@check(WORKS, "follow live")
def follow_live(service: Service) -> bool:
    """A stream shows the progress, and ends after the last state."""
    lines = service.read_stream(f"{service.submit(IMAGE)}/stream")
    text = "\n".join(lines)
    return '"progress":50' in text and text.count('"completed"') == 1


@check(WORKS, "run three at once")
def run_three_at_once(service: Service) -> bool:
    """Three tasks run at once, and a fourth one waits."""
    paths = [*service.fill(), service.submit(IMAGE)]
    time.sleep(0.2)
    statuses = [service.get(path)["status"] for path in paths]
    return statuses == ["running"] * 3 + ["pending"]


@check(WORKS, "refuse nonsense")
def refuse_nonsense(service: Service) -> bool:
    """An unknown task type is a 422, an unknown id a 404."""
    wrong = service.client.post("/tasks", json={"task_type": "unknown"})
    return wrong.status_code == 422 and service.client.get("/tasks/x").is_error


@check(WORKS, "cancel waiting")
def cancel_waiting(service: Service) -> bool:
    """A task that waits can be cancelled, one that runs can not."""
    running = service.fill()[0]
    waiting = service.submit(IMAGE)
    first = service.client.delete(running).status_code
    second = service.client.delete(waiting).status_code
    return first == 409 and second == 200


@check(WORKS, "fail with an error")
def fail_with_an_error(service: Service) -> bool:
    """A handler that raises makes its task `failed`, with an error."""
    task = service.end_of(service.submit(BAD_EMAIL))
    return task["status"] == "failed" and "no mail server" in task["error"]


# -- The traps. Each returns whether the service avoids it. ----------------------------


@check(TRAPS, "slot-before-get")
def slot_before_get(service: Service) -> bool:
    """All slots are taken. A HIGH task comes last, and runs after the LOW ones."""
    service.fill()
    low = [service.submit(IMAGE, priority=10) for _ in range(4)]
    high = service.submit(IMAGE, priority=1)
    service.wait(high, "running")
    return all(service.get(path)["status"] != "completed" for path in low)


@check(TRAPS, "terminal-is-final")
def terminal_is_final(service: Service) -> bool:
    """A task is cancelled with a 200 while it waits, and it runs all the same."""
    service.fill()
    waiting = service.submit(EMAIL)
    service.client.delete(waiting)
    service.end_of(service.submit(EMAIL, priority=10))
    return bool(service.get(waiting)["status"] == "cancelled")


@check(TRAPS, "backoff-holds-slot")
def backoff_holds_slot(service: Service) -> bool:
    """Three tasks that fail wait for their retry, and keep a healthy one waiting."""
    for _ in range(3):
        service.submit(BAD_EMAIL, max_retries=3)
    return bool(
        service.end_of(service.submit(EMAIL), seconds=4)["status"] == "completed"
    )


@check(TRAPS, "blocking-handler")
def blocking_handler(service: Service) -> bool:
    """While a library blocks in a handler, no request is answered."""
    slowest = 0.0
    for _ in range(5):
        began = time.monotonic()
        service.submit(REPORT)
        service.get("/health")
        slowest = max(slowest, time.monotonic() - began)
    return slowest < 0.7


@check(TRAPS, "whose-timeout")
def whose_timeout(service: Service) -> bool:
    """A task has run out of time, and its error is an empty text."""
    task = service.end_of(service.submit(IMAGE, timeout=0.1))
    return "timeout" in task["error"].lower()


@check(TRAPS, "bad-result")
def bad_result(service: Service) -> bool:
    """One client sends half a character, and from then on the list is a 500 for all."""
    body = '{"task_type": "send_email", "payload": {"subject": "\\ud83d"}}'
    service.client.post("/tasks", content=body, headers=JSON)
    return service.client.get("/tasks").status_code == 200


@check(TRAPS, "echoed-input")
def echoed_input(service: Service) -> bool:
    """A submission is wrong, and the answer is not a 422 but a 500."""
    body = '{"task_type": "unknown", "payload": {"x": NaN}, "priority": NaN}'
    answer = service.client.post("/tasks", content=body, headers=JSON)
    return answer.status_code == 422


@check(TRAPS, "missing-content-type")
def missing_content_type(service: Service) -> bool:
    """`curl -d` is answered with a riddle: nobody names the header that is missing."""
    answer = service.client.post("/tasks", content=json.dumps(EMAIL))
    return "Content-Type" in answer.text


@check(TRAPS, "unhandled-is-500")
def unhandled_is_500(service: Service) -> bool:
    """The metrics do not count the requests that have crashed."""
    body = '{"task_type": "unknown", "payload": {"x": NaN}, "priority": NaN}'
    answer = service.client.post("/tasks", content=body, headers=JSON)
    if answer.status_code != 500:
        return True
    return "500" in service.client.get("/metrics").text


@check(TRAPS, "raw-path-labels")
def raw_path_labels(service: Service) -> bool:
    """Each path that a scanner tries gets a line in the metrics, for ever."""
    for number in range(50):
        service.client.get(f"/wp-admin/{number}.php")
    text = service.client.get("/metrics", headers={"Accept": "text/plain"}).text
    return "/49.php" not in text


@check(TRAPS, "unbounded-history")
def unbounded_history(service: Service) -> bool:
    """No task is ever forgotten. The memory grows by each one."""
    for _ in range(40):
        path = service.submit(EMAIL)
        service.client.delete(path)
    return bool(service.get("/tasks")["total"] <= 25)


@check(TRAPS, "snapshot-then-subscribe")
def snapshot_then_subscribe(service: Service) -> bool:
    """Who comes to a stream after the end of the task waits for ever."""
    path = service.submit(EMAIL)
    service.end_of(path)
    try:
        return any(
            '"completed"' in line for line in service.read_stream(f"{path}/stream", 2)
        )
    except (httpx.HTTPError, TimeoutError):
        return False


@check(TRAPS, "reconnect-for-ever")
def reconnect_for_ever(service: Service) -> bool:
    """An EventSource that has seen the end comes back again and again: no 204."""
    path = service.submit(EMAIL)
    lines = service.read_stream(f"{path}/stream")
    ids = [line for line in lines if line.startswith("id: ")]
    if not ids:
        return False
    last = {"Last-Event-ID": ids[-1].removeprefix("id: ")}
    return service.client.get(f"{path}/stream", headers=last).status_code == 204


@check(TRAPS, "404-after-200")
def late_404(service: Service) -> bool:
    """The stream of an unknown task is a 200, and then it breaks off."""
    try:
        return service.client.get("/tasks/unknown/stream").status_code == 404
    except httpx.HTTPError:
        return False


@check(TRAPS, "never-entered")
def never_entered(service: Service) -> bool:
    """A reader that has gone is still counted as a watcher, and it is still fed."""
    path = service.submit(IMAGE)
    for _ in range(5):
        with service.client.stream("GET", f"{path}/stream") as answer:
            next(answer.iter_lines())
            time.sleep(0.1)
    for _ in range(30):
        if service.get("/health")["watchers"] == 0:
            return True
        time.sleep(0.1)
    return False


@check(TRAPS, "six-connections")
def six_connections(service: Service) -> bool:
    """A page needs one stream per task, and a browser opens six of them at most."""
    with service.client.stream("GET", "/events") as answer:
        return answer.status_code == 200


@check(TRAPS, "shutdown-order")
def shutdown_order(service: Service) -> bool:
    """At Ctrl-C a stream is cut off, without a word and without a clean end."""
    service.fill()
    path = [service.submit(IMAGE) for _ in range(9)][-1]  # it waits for some seconds
    lines = []
    with service.client.stream("GET", f"{path}/stream") as answer:
        for line in answer.iter_lines():
            if not lines:
                service.process.send_signal(signal.SIGINT)
            lines.append(line)
    return "event: shutdown" in lines


# -- To run them -----------------------------------------------------------------------


def run(function: Check, program: str, *arguments: str) -> bool:
    """Run one check on a server of its own. A broken connection is a "no"."""
    service = Service(program, *arguments)
    try:
        return function(service)
    except (httpx.HTTPError, TimeoutError):
        return False
    finally:
        service.close()


def compare(table: dict[str, Check], other: str, words: tuple[str, str]) -> list[str]:
    """Run all checks of a table on both. Print a line for each, return what fails."""
    path = Path(other)
    failed = []
    with ThreadPoolExecutor(4) as pool:
        outcomes = {}
        for name, function in table.items():
            outcomes[name] = (
                pool.submit(run, function, OTHER, str(path.parent), path.stem),
                pool.submit(run, function, TASKQUEUE),
            )
        for name, (theirs, ours) in outcomes.items():
            marks = f"{words[theirs.result()]:10} {words[ours.result()]:12}"
            print(f"{name:24} {marks} {table[name].__doc__}", flush=True)
            if not theirs.result():
                failed.append(name)
            if not ours.result():
                failed.append(f"taskqueue.py: {name}")
    return failed


def main() -> None:
    """Do what the command line says."""
    other = sys.argv[1] if sys.argv[1:] else "naive"
    if other == "naive":
        other = str(HERE / "naive.py")
    if not Path(other).is_file():
        sys.exit(__doc__)
    name = Path(other).name
    print(f"{'DOES IT WORK?':24} {name:10} taskqueue.py")
    broken = compare(WORKS, other, ("no", "yes"))
    print(f"\n{'THE TRAPS':24} {name:10} taskqueue.py")
    fallen = compare(TRAPS, other, ("FALLS IN", "-"))
    works = len(WORKS) - len(broken)
    traps = f"{len(fallen)} of {len(TRAPS)} traps"
    print(f"\n{name}: {works} of {len(WORKS)} work. It falls into {traps}.")
    print("Each has its name in taskqueue.py: search for GOTCHA [slot-before-get].")
    if sys.argv[2:] == ["--check"]:  # for the gate
        sys.exit(broken != [] or fallen != list(TRAPS))


if __name__ == "__main__":
    main()
