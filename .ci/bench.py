"""How fast is it, and does it stay so?

Prints ratios, with what was aimed at next to them. It never fails by time.

    python .ci/bench.py                      all sections, in about six minutes
    python .ci/bench.py core scale           some: core, http, streams, readers, scale
    python .ci/bench.py core --file copy.py  the same of another copy of taskqueue.py

Everything is CPU time of the process that does the work, because that is much the same
on a busy machine as on an idle one. Those compared take turns (A B A B …) on one core,
and a ratio is the median of the turns' ratios. All servers are plain uvicorn: h11, and
asyncio's own loop. What it needs is installed into .ci/.work/bench the first time.
Linux only: it reads /proc, and gives server and load a core each.
"""

import argparse
import asyncio
import contextlib
import gc
import importlib.util
import itertools
import json
import logging
import multiprocessing
import os
import random
import secrets
import select
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

HERE = Path(__file__).resolve().parent
WORK = HERE / ".work" / "bench"
CORES = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []
NEEDED = ("fastapi", "uvicorn", "sse_starlette", "httpx", "taskiq", "huey", "aiojobs")
Row = tuple[str, ...]


def install() -> None:
    """Go on in a venv of our own if something is not installed in this one."""
    if all(importlib.util.find_spec(name) for name in NEEDED):
        return
    python = WORK / "bin" / "python"
    files = [HERE.parent / "requirements.txt", HERE / "requirements-bench.txt"]
    print(f"Installing what is to be measured into {WORK}", flush=True)
    made = subprocess.run([sys.executable, "-m", "venv", WORK], check=False)
    pip = [python, "-m", "pip", "install", "-q", "-r", files[0], "-r", files[1]]
    got = subprocess.run(pip, check=False)
    if made.returncode or got.returncode or sys.prefix == str(WORK):
        sys.exit(f"That failed. Install {files[0]} and {files[1]} into a venv.")
    os.execv(python, [python, *sys.argv])


def load_module(path: str) -> Any:
    """taskqueue.py, or a copy of it, as the module `taskqueue`."""
    spec = importlib.util.spec_from_file_location("taskqueue", path)
    assert spec
    assert spec.loader
    sys.modules["taskqueue"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def table(title: str, head: Row, rows: Iterable[Row]) -> None:
    """Print a table whose first column is text, and whose others are numbers."""
    print(f"\n{title}\n")
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        cells = [text.rjust(width) for text, width in zip(line, widths, strict=True)]
        cells[0] = line[0].ljust(widths[0])
        print("  " + "   ".join(cells), flush=True)


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    return statistics.median(
        a / b for a, b in zip(numerators, denominators, strict=True)
    )


# == core: 20,000 no-op tasks, from submit to completed ================================

TASKS, WORKERS = 20_000, 3


async def no_op(payload: Any, update_progress: Any) -> None:
    pass


async def core_taskqueue(tq: Any) -> None:
    """Records, history, priorities, deadlines, checked results, and a watcher."""
    settings = tq.Settings(max_workers=WORKERS, max_pending=TASKS)
    async with tq.TaskQueue(settings, dict.fromkeys(tq.TaskType, no_op)) as queue:
        submission = tq.TaskSubmission(task_type=tq.TaskType.SEND_EMAIL)
        for _ in range(TASKS):
            last = queue.submit(submission)
        async for status in queue.watch(last.id):
            last = status
        assert last.status == "completed"


async def core_bare() -> None:
    """What asyncio itself costs: the same order and bound, and no record."""
    ready: asyncio.PriorityQueue[tuple[int, int]] = asyncio.PriorityQueue()
    slots = asyncio.Semaphore(WORKERS)

    async def attempt() -> None:
        try:
            await no_op({}, None)
        finally:
            slots.release()

    async with asyncio.TaskGroup() as group:
        for number in range(TASKS):
            ready.put_nowait((5, number))
        for _ in range(TASKS):
            await slots.acquire()
            await ready.get()
            group.create_task(attempt())


async def core_taskiq() -> None:
    import taskiq

    broker = taskiq.InMemoryBroker()

    @broker.task
    async def task() -> None:
        pass

    await broker.startup()
    for _ in range(TASKS):
        await task.kiq()
    await broker.wait_all()
    await broker.shutdown()


async def core_huey() -> None:
    """At its best: all in one thread, without the consumer's three, no results."""
    import huey

    app = huey.MemoryHuey(results=False)

    @app.task()
    def task() -> None:
        pass

    for _ in range(TASKS):
        task()
    while message := app.dequeue():
        app.execute(message)


async def core_aiojobs() -> None:
    import aiojobs

    async with aiojobs.Scheduler(limit=WORKERS, pending_limit=0) as scheduler:
        for _ in range(TASKS):
            await scheduler.spawn(no_op({}, None))
        await scheduler.wait_and_close()


def core(tq: Any, path: str) -> None:
    contestants: dict[str, tuple[Callable[[], Awaitable[None]], str]] = {
        "taskqueue": (lambda: core_taskqueue(tq), ""),
        "bare asyncio": (core_bare, "≥ 0.22"),
        "taskiq InMemoryBroker": (core_taskiq, "≥ 1.3"),
        "huey MemoryHuey": (core_huey, ""),
        "aiojobs": (core_aiojobs, ""),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _, (name, (contestant, _)) in itertools.product(range(7), contestants.items()):
        gc.collect()
        began = time.process_time()
        asyncio.run(contestant())
        seconds[name].append(time.process_time() - began)
    table(
        f"core: {TASKS:,} no-op tasks, {WORKERS} workers, from submit to completed",
        ("", "CPU µs/task", "taskqueue is", "aimed at"),
        (
            (
                name,
                f"{statistics.median(seconds[name]) / TASKS * 1e6:.1f}",
                f"{median_ratio(seconds[name], seconds['taskqueue']):.2f} × as fast",
                target,
            )
            for name, (_, target) in contestants.items()
        ),
    )


# == The servers of the next three sections, each a process of its own =================


STARTED = asyncio.Event()  # in a server: the streams are open, the steps may begin


async def steps(payload: Any, update_progress: Callable[[float], None]) -> None:
    """99 steps of progress at 100 a second; then it fails, to be tried again."""
    await STARTED.wait()
    for percent in range(1, 100):
        await asyncio.sleep(0.01)
        update_progress(percent)
    raise RuntimeError("again")


def our_app(tq: Any) -> Any:
    """The service as it is, with handlers that take no time, and room for the load."""
    handlers = {tq.TaskType.SEND_EMAIL: no_op, tq.TaskType.RESIZE_IMAGE: steps}
    settings = tq.Settings(max_pending=1_000_000, backoff_base=0)
    return tq.create_app(settings, handlers)


def simulating_app(tq: Any) -> Any:
    """The service with its own handlers, a hundred times as quick."""
    settings = tq.Settings(
        max_pending=1_000_000, max_workers=20, pace=0.01, failure_rate=0
    )
    return tq.create_app(settings)


def bare_app(tq: Any) -> Any:
    """The least that FastAPI and sse-starlette can do for the same answers.

    It has no queue and no middleware. It has the same models, its routes on the app
    itself, and the same one log line for each request. Its frame is ready-made.
    """
    from fastapi import FastAPI, Request, Response

    app = FastAPI()
    tasks: dict[str, Any] = {}
    log = logging.getLogger("bare")
    keep_finished = tq.Settings().keep_finished

    def log_line(request: Request, status: int) -> None:
        line = "[%s] %s %a %d %.1f ms"
        path = request.scope["path"][:200]
        log.info(line, "0123456789abcdef", request.method, path, status, 1.5)

    @app.post("/tasks", status_code=202)
    async def submit(
        submission: tq.TaskSubmission, request: Request, response: Response
    ) -> tq.TaskStatus:
        task = bare_status(tq, submission)
        tasks[task.id] = task
        if len(tasks) > keep_finished:
            del tasks[next(iter(tasks))]
        response.headers["Location"] = f"/tasks/{task.id}"
        log_line(request, 202)
        return task

    @app.get("/tasks/{task_id}")
    async def get(task_id: str, request: Request) -> tq.TaskStatus:
        log_line(request, 200)
        return tasks[task_id]

    add_bare_stream(tq, app)
    return app


def bare_status(tq: Any, submission: Any) -> Any:
    """The answer to a POST, from the same model as ours."""
    from pydantic_core import to_json

    return tq.TaskStatus(
        id=secrets.token_hex(16),
        task_type=submission.task_type,
        priority=submission.priority,
        status="pending",
        progress=0,
        attempt=0,
        max_retries=submission.max_retries,
        error=None,
        request_id="0123456789abcdef",
        created_at=datetime.now(UTC),
        not_before=None,
        started_at=None,
        completed_at=None,
        version=1,
        payload_json=to_json(submission.payload),
        result_json=b"null",
    )


def add_bare_stream(tq: Any, app: Any) -> None:
    """A stream that waits on a shared event, and sends a ready-made frame."""
    from fastapi import Response
    from sse_starlette.sse import EventSourceResponse

    settings = tq.Settings()
    frame = b""
    stepped = asyncio.Event()

    async def frames() -> AsyncIterator[bytes]:
        first = b'{"status":"pending","progress":0,"attempt":0}'
        yield tq.encode_frame("progress", first, 1)
        while True:
            await stepped.wait()
            yield frame

    async def step() -> None:
        nonlocal frame, stepped
        await STARTED.wait()
        for number in itertools.count():
            await asyncio.sleep(0.01)
            data = f'{{"status":"running","progress":{number % 100},"attempt":1}}'
            version = 1_795_504_324_828_483 + number
            frame = tq.encode_frame("progress", data.encode(), version)
            stepped.set()
            stepped = asyncio.Event()

    @app.get("/tasks/{task_id}/stream", response_class=Response)
    async def stream(task_id: str) -> EventSourceResponse:
        if not hasattr(app.state, "step"):
            app.state.step = asyncio.create_task(step())
        return EventSourceResponse(
            frames(),
            ping=settings.ping_seconds,
            send_timeout=settings.send_timeout,
            sep="\n",
        )


APPS = {"taskqueue": our_app, "simulating": simulating_app, "bare": bare_app}


def serve(tq: Any, name: str, port: str, core: str) -> None:
    """Be a server, until somebody kills it."""
    import uvicorn

    os.sched_setaffinity(0, {int(core)})
    form = "%(asctime)s %(levelname)s %(name)s %(message)s"
    logging.basicConfig(level=logging.INFO, format=form)
    app = APPS[name](tq)

    @app.get("/start")
    async def start() -> None:
        STARTED.set()

    @app.get("/usage")
    async def usage() -> dict[str, float]:
        unfinished = 0
        if queue := getattr(app.state, "queue", None):
            unfinished = queue.count("pending") + queue.count("running")
        return {
            "cpu": time.process_time(),
            "memory": resident_bytes(),
            "unfinished": unfinished,
        }

    uvicorn.run(
        app,
        host="127.0.0.1",
        port=int(port),
        http="h11",
        loop="asyncio",
        log_level="warning",
        access_log=False,
    )


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf(
        "SC_PAGE_SIZE"
    )


class Client:
    """One server process, and blocking sockets to it.

    They have far less work than they give the server.
    """

    def __init__(self, path: str, name: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port: int = probe.getsockname()[1]
        command = [sys.executable, __file__, "serve", name, str(self.port)]
        command += [str(CORES[0]), "--file", path]
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(200):
            with contextlib.suppress(OSError):
                self.usage()
                return
            time.sleep(0.1)
        raise RuntimeError(f"the server {name} did not start")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def connect(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def drive(self, request: bytes, count: int, connections: int = 16) -> Any:
        """Send `count` requests, `connections` at a time; return the last answer."""
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(self.connect()) for _ in range(connections)]
            for _ in range(count // connections):
                for each in sockets:
                    each.sendall(request)
                for each in sockets:
                    answer = read_answer(each)
        return answer

    def usage(self) -> dict[str, float]:
        return self.drive(get("/usage"), 1, connections=1)  # type: ignore[no-any-return]

    def cpu_when_idle(self) -> float:
        """The CPU seconds it has used, once all queued work is done."""
        while (usage := self.usage())["unfinished"]:
            time.sleep(0.05)
        return usage["cpu"]


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


def post_task(**submission: Any) -> bytes:
    body = json.dumps(submission)
    head = "POST /tasks HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
    return f"{head}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


def read_answer(connection: socket.socket) -> Any:
    data = connection.recv(65_536)
    while b"\r\n\r\n" not in data:
        data += connection.recv(65_536)
    head, body = data.split(b"\r\n\r\n", 1)
    if b" 20" not in head[:12]:
        raise RuntimeError(f"the server answered {head.decode()}\n{body.decode()}")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    while len(body) < length:
        body += connection.recv(65_536)
    return json.loads(body)


# == http: the server's CPU for one request ============================================

REQUESTS = 3_200


def http(tq: Any, path: str) -> None:
    used: dict[tuple[str, str], list[float]] = {}

    def note(name: str, call: str, cpu: float) -> None:
        used.setdefault((name, call), []).append(cpu / REQUESTS * 1e6)

    with Client(path, "taskqueue") as ours, Client(path, "bare") as bare:
        both = (("taskqueue", ours), ("bare", bare))
        for turn, (name, client) in itertools.product(range(8), both):
            began = client.cpu_when_idle()
            task = client.drive(post_task(task_type="send_email"), REQUESTS)
            posted = client.cpu_when_idle()
            client.drive(get(f"/tasks/{task['id']}"), REQUESTS)
            if turn:  # the first only warms up
                note(name, "POST /tasks", posted - began)
                note(name, "GET /tasks/{id}", client.cpu_when_idle() - posted)
    rows = []
    for call, target in (("POST /tasks", "≥ 0.60"), ("GET /tasks/{id}", "≥ 0.80")):
        mine, theirs = used["taskqueue", call], used["bare", call]
        ratio = f"{median_ratio(theirs, mine):.2f} × as fast"
        numbers = (f"{statistics.median(each):.0f}" for each in (mine, theirs))
        rows.append((call, *numbers, ratio, target))
    table(
        "http: one server process on one core, 16 connections. A POST includes running\n"
        "its task. The bare app has its routes on the app itself, without a router.",
        ("CPU µs/request", "taskqueue", "bare FastAPI", "taskqueue is", "aimed at"),
        rows,
    )


# == streams: the CPU for one delivered frame, and the memory of a stream that waits ===

LIVE, IDLE, SECONDS = 500, 2_000, 3.0


def open_streams(client: Client, task_id: str, count: int) -> list[socket.socket]:
    """Open them, and read the first frame of each."""
    streams = []
    for _ in range(count):
        streams.append(client.connect())
        streams[-1].sendall(get(f"/tasks/{task_id}/stream"))
        data = b""
        while b"data: " not in data:
            received = streams[-1].recv(65_536)
            assert received, "the server has closed a stream"
            data += received
    return streams


def live_frame_cpu(client: Client, task_id: str) -> tuple[float, float]:
    """CPU µs per frame that arrived, and how many arrive per second."""
    opened = open_streams(client, task_id, LIVE)
    streams = {stream.fileno(): stream for stream in opened}
    arrivals = select.epoll()
    for number in streams:
        arrivals.register(number, select.EPOLLIN)

    def frames_within(seconds: float) -> int:
        frames, end = 0, time.perf_counter() + seconds
        while time.perf_counter() < end:
            for number, _ in arrivals.poll(0.1):
                frames += streams[number].recv(262_144).count(b"data: ")
        return frames

    client.drive(get("/start"), 1, connections=1)
    frames_within(1)
    before = client.usage()["cpu"]
    frames = frames_within(SECONDS)
    cpu = client.usage()["cpu"] - before
    for stream in streams.values():
        stream.close()
    return cpu / frames * 1e6, frames / SECONDS


def idle_stream_bytes(client: Client, task_id: str) -> float:
    warm = open_streams(client, task_id, 100)
    before = client.usage()["memory"]
    idle = open_streams(client, task_id, IDLE)
    after = client.usage()["memory"]
    for stream in warm + idle:
        stream.close()
    return (after - before) / IDLE


def streams(tq: Any, path: str) -> None:
    used: dict[str, list[float]] = {"taskqueue": [], "bare": []}
    arrived: dict[str, list[float]] = {"taskqueue": [], "bare": []}
    memory: dict[str, float] = {}
    for _, name in itertools.product(range(7), used):
        with Client(path, name) as client:
            request = post_task(task_type="resize_image", max_retries=10)
            task = client.drive(request, 1, connections=1)
            cpu, frames = live_frame_cpu(client, task["id"])
            used[name].append(cpu)
            arrived[name].append(frames)
    for name in used:
        with Client(path, name) as client:
            request = post_task(task_type="send_email", delay=3600)
            task = client.drive(request, 1, connections=1)
            memory[name] = idle_stream_bytes(client, task["id"])
    ratio = f"{median_ratio(used['taskqueue'], used['bare']):.2f} × as much"
    more_memory = f"{memory['taskqueue'] / memory['bare']:.2f} × as much"
    table(
        f"streams: {LIVE} live ones on a task that takes 100 steps a second, then\n"
        f"{IDLE:,} idle ones. The bare one is an sse-starlette generator that waits on a\n"
        "shared event and sends a ready-made frame, with the same ping and send timeout.",
        ("", "taskqueue", "bare", "taskqueue needs", "aimed at"),
        [
            (
                "CPU µs per delivered frame",
                *(f"{statistics.median(used[name]):.1f}" for name in used),
                ratio,
                "≤ 1.20",
            ),
            (
                "frames delivered per second",
                *(f"{statistics.median(arrived[name]):,.0f}" for name in used),
                "",
                "",
            ),
            (
                "memory per idle stream, KB",
                *(f"{memory[name] / 1000:.1f}" for name in used),
                more_memory,
                "",
            ),
        ],
    )


# == readers: what is left of the POSTs while many read the stream of all tasks ========

READERS = 200


def read_events(port: int, core: int) -> None:
    """Be READERS readers of /events, until somebody kills this process."""
    os.sched_setaffinity(0, {core})
    arrivals = select.epoll()
    connections: dict[int, socket.socket] = {}
    for _ in range(READERS):
        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall(get("/events"))
        connections[connection.fileno()] = connection
        arrivals.register(connection, select.EPOLLIN)
    while True:
        for number, _ in arrivals.poll():
            connections[number].recv(1 << 20)


@contextlib.contextmanager
def reading_events(client: Client) -> Iterator[None]:
    """READERS readers of /events, in a process of their own."""
    context = multiprocessing.get_context("spawn")
    arguments = (client.port, CORES[-1])
    process = context.Process(target=read_events, args=arguments, daemon=True)
    process.start()
    while client.drive(get("/health"), 1, connections=1)["watchers"] < READERS:
        time.sleep(0.1)
    try:
        yield
    finally:
        process.kill()
        process.join()
        while client.drive(get("/health"), 1, connections=1)["watchers"]:
            time.sleep(0.1)


def posts_per_second(client: Client, count: int) -> tuple[float, float]:
    """POSTs a second of the server's CPU time, and of the clock."""
    cpu = client.usage()["cpu"]
    began = time.perf_counter()
    client.drive(post_task(task_type="send_email"), count)
    took = time.perf_counter() - began
    return count / (client.usage()["cpu"] - cpu), count / took


def readers(tq: Any, path: str) -> None:
    alone: list[tuple[float, float]] = []
    watched: list[tuple[float, float]] = []
    for _ in range(3):
        with Client(path, "simulating") as client:
            posts_per_second(client, 1_600)  # to warm up, and to have news for all
            alone.append(posts_per_second(client, 3_200))
            with reading_events(client):
                watched.append(posts_per_second(client, 1_600))
    rows = []
    for number, name, target in ((0, "CPU time", "≥ 0.33"), (1, "clock", "")):
        before = [each[number] for each in alone]
        after = [each[number] for each in watched]
        rows.append(
            (
                f"POSTs a second, by {name}",
                f"{statistics.median(before):,.0f}",
                f"{statistics.median(after):,.0f}",
                f"{median_ratio(after, before):.2f}",
                target,
            )
        )
    table(
        f"readers: POSTs, 16 connections, while {READERS} clients read /events",
        ("", "0 readers", f"{READERS} readers", "left", "aimed at"),
        rows,
    )


# == scale: what a call costs while many tasks wait, and how long the loop stands still =

SIZES = (1_000, 10_000, 100_000, 1_000_000)


@contextlib.asynccontextmanager
async def waiting_queue(tq: Any, settings: Any) -> AsyncIterator[Any]:
    """A queue whose workers are all busy, so that whatever comes waits."""
    never = asyncio.Event()

    async def busy(payload: Any, update_progress: Any) -> None:
        await never.wait()

    app = tq.create_app(settings, dict.fromkeys(tq.TaskType, busy))
    async with app.router.lifespan_context(app):
        queue = app.state.queue
        for _ in range(settings.max_workers):
            queue.submit(tq.TaskSubmission(task_type="send_email", priority=1))
        while queue.count("pending"):
            await asyncio.sleep(0)
        yield queue
        never.set()


def cpu_of(
    call: Callable[[Any], Any], arguments: Iterable[Any], batch: int = 50
) -> float:
    """CPU µs per call: the median of batches, so that no garbage collection counts."""
    values = iter(arguments)
    costs = []
    while group := list(itertools.islice(values, batch)):
        began = time.process_time()
        for argument in group:
            call(argument)
        costs.append((time.process_time() - began) / len(group) * 1e6)
    return statistics.median(costs)


async def costs_at(tq: Any, size: int) -> dict[str, float]:
    """CPU µs per call, while `size` tasks wait."""
    settings = tq.Settings(max_pending=size + 10_000, drain_seconds=0)
    async with waiting_queue(tq, settings) as queue:
        submission = tq.TaskSubmission(task_type="send_email")
        gc.collect()
        before = resident_bytes()
        ids = [queue.submit(submission).id for _ in range(size)]
        gc.collect()
        memory = (resident_bytes() - before - sys.getsizeof(ids)) / size
        costs = {
            "submit": cpu_of(queue.submit, [submission] * 1000),
            "get": cpu_of(queue.get_task, ids[:1000]),
            "list, first page": cpu_of(lambda _: queue.list_tasks(), range(100), 10),
        }
        for status in (tq.Status.PENDING, tq.Status.RUNNING):
            name = f"list {status}, first page"
            costs[name] = cpu_of(queue.list_tasks, [status] * 100, 10)
        random.Random(1).shuffle(ids)
        costs["cancel"] = cpu_of(queue.cancel, ids[: settings.keep_finished])
        more = [queue.submit(submission).id for _ in range(2000)]
        costs["cancel, and evict another"] = cpu_of(queue.cancel, more)
        return {**costs, "bytes per waiting task": memory}


async def longest_stalls(tq: Any, size: int) -> dict[str, float]:
    """The most CPU ms between two turns of the event loop.

    Meanwhile `size` tasks are submitted, listed, cancelled and evicted.
    """
    settings = tq.Settings(max_pending=size, keep_finished=size // 2, drain_seconds=0)
    ids: list[str] = []
    async with waiting_queue(tq, settings) as queue:
        submission = tq.TaskSubmission(task_type="send_email")

        def submit(_: int) -> None:
            ids.append(queue.submit(submission).id)

        def list_page(offset: int) -> None:
            queue.list_tasks(limit=1000, offset=offset)

        def cancel(_: int) -> None:
            queue.cancel(ids.pop())

        stalls: dict[str, float] = {}
        for name, call, arguments in (
            ("submit", submit, range(size)),
            ("list, 1,000 a page", list_page, range(0, size, 1000)),
            ("cancel and evict", cancel, range(size)),
        ):
            gc.collect()
            stalls[name] = await longest_step(call, arguments)
        return stalls


async def longest_step(call: Callable[[int], None], arguments: range) -> float:
    """The longest of all calls, in CPU ms, with the turn of the loop after it."""
    longest = 0.0
    last = time.process_time()
    for argument in arguments:
        call(argument)
        await asyncio.sleep(0)
        now = time.process_time()
        longest = max(longest, now - last)
        last = now
    return longest * 1000


Measurement = Callable[[Any, int], Any]


def in_a_fresh_process(path: str, function: Measurement, size: int) -> dict[str, float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(run_measurement, (path, function, size))


def run_measurement(path: str, function: Measurement, size: int) -> dict[str, float]:
    tq = load_module(path)
    logging.disable()
    return asyncio.run(function(tq, size))  # type: ignore[no-any-return]


def scale_rows(path: str) -> Iterator[Row]:
    results = [in_a_fresh_process(path, costs_at, size) for size in SIZES]
    for name in results[0]:
        values = [result[name] for result in results]
        if "bytes" in name:
            yield name, *(f"{value:,.0f}" for value in values), "", ""
        else:
            growth = f"{max(values) / values[0]:.1f} ×"
            yield name, *(f"{value:.1f}" for value in values), growth, "≤ 2 ×"


def scale(tq: Any, path: str) -> None:
    table(
        "scale: CPU µs per call, by the number of tasks that wait",
        ("", *(f"{size:,}" for size in SIZES), "growth", "aimed at"),
        scale_rows(path),
    )
    at_bounds = in_a_fresh_process(path, longest_stalls, 1_000)
    at_many = in_a_fresh_process(path, longest_stalls, 100_000)
    table(
        "scale: the event loop's longest stall, in CPU ms, while so many tasks are\n"
        "submitted, listed, cancelled and evicted",
        ("", "1,000 (default bounds)", "aimed at", "100,000", "aimed at"),
        (
            (name, f"{at_bounds[name]:.1f}", "≤ 10", f"{at_many[name]:.1f}", "≤ 200")
            for name in at_bounds
        ),
    )


SECTIONS: dict[str, Callable[[Any, str], None]] = {
    "core": core,
    "http": http,
    "streams": streams,
    "readers": readers,
    "scale": scale,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", default=list(SECTIONS))
    parser.add_argument("--file", default=str(HERE.parent / "taskqueue.py"))
    args = parser.parse_args()
    if (
        args.sections[0] == "serve"
    ):  # this is one of the servers that the sections start
        return serve(load_module(args.file), *args.sections[1:])
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"no such section: {', '.join(unknown)}")
    if sys.platform != "linux":
        sys.exit("The benchmark runs on Linux only.")
    install()
    os.sched_setaffinity(0, {CORES[-1]})
    print(f"Python {sys.version.split()[0]}, {len(CORES)} cores")
    tq = load_module(args.file)
    for name in args.sections:
        SECTIONS[name](tq, args.file)
    return None


if __name__ == "__main__":
    main()
