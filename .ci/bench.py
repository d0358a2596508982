"""How fast is it, and does it stay so? Prints ratios, with what was aimed at next to them; it never fails by time.

    python .ci/bench.py                      all four sections, in about five minutes
    python .ci/bench.py core scale           some of them: core, http, streams, scale
    python .ci/bench.py core --file copy.py  the same of another copy of taskqueue.py

Everything is CPU time of the process that does the work, because that is much the same on a busy machine as on an idle
one. Those compared take turns (A B A B …) on one core, and a ratio is the median of the turns' ratios. What it needs is
installed into .ci/.work/bench the first time. Linux only: it reads /proc, and gives server and load a core each.
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
from typing import Any

HERE = Path(__file__).resolve().parent
WORK = HERE / ".work" / "bench"
CORES = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []
NEEDED = ("fastapi", "uvicorn", "sse_starlette", "httpx", "taskiq", "huey", "aiojobs")
Row = tuple[str, ...]


def install() -> None:
    """Go on in a venv of our own if what is to be measured isn't installed in this one."""
    if all(importlib.util.find_spec(name) for name in NEEDED):
        return
    python, files = WORK / "bin" / "python", [HERE.parent / "requirements.txt", HERE / "requirements-bench.txt"]
    print(f"Installing what is to be measured into {WORK}", flush=True)
    made = subprocess.run([sys.executable, "-m", "venv", WORK])
    got = subprocess.run([python, "-m", "pip", "install", "-q", "-r", files[0], "-r", files[1]])
    if made.returncode or got.returncode or sys.prefix == str(WORK):
        sys.exit(f"That failed. Install {files[0]} and {files[1]} into a venv, and run this with its Python.")
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
    print(f"\n{title}\n")
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        first, *others = (text.ljust(w) if n == 0 else text.rjust(w)
                          for n, (text, w) in enumerate(zip(line, widths, strict=True)))
        print("  " + "   ".join([first, *others]), flush=True)


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


# == core: 20,000 no-op tasks, from submit to completed ================================================================

TASKS, WORKERS = 20_000, 3


async def no_op(payload: Any, update_progress: Any) -> None:
    pass


async def core_taskqueue(tq: Any) -> None:
    """Records, history with eviction, priorities, deadlines, results that JSON can carry, and a watcher."""
    settings = tq.Settings(max_workers=WORKERS, max_pending=TASKS)
    async with tq.TaskQueue(settings, dict.fromkeys(tq.TaskType, no_op)) as queue:
        submission = tq.TaskSubmission(task_type=tq.TaskType.SEND_EMAIL)
        for _ in range(TASKS):
            last = queue.submit(submission)
        async for status in queue.watch(last.id):
            last = status
        assert last.status == "completed"


async def core_bare() -> None:
    """What asyncio itself costs: the same order and bound, and no record of anything."""
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
    """At its best: queue and execution in one thread, without the consumer's three, and no results."""
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
        "bare asyncio": (core_bare, "≥ 0.30"),
        "taskiq InMemoryBroker": (core_taskiq, "≥ 1.7"),
        "huey MemoryHuey": (core_huey, "≥ 0.75"),
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
        ((name, f"{statistics.median(seconds[name]) / TASKS * 1e6:.1f}",
          f"{median_ratio(seconds[name], seconds['taskqueue']):.2f} × as fast", target)
         for name, (_, target) in contestants.items()),
    )


# == The servers of the next two sections, each a process of its own ===================================================


STARTED = asyncio.Event()  # in a server: the streams are open, the steps may begin


async def steps(payload: Any, update_progress: Callable[[float], None]) -> None:
    """99 steps of progress at 100 a second; then it fails, to be tried again."""
    await STARTED.wait()
    for percent in range(1, 100):
        await asyncio.sleep(0.01)
        update_progress(percent)
    raise RuntimeError("again")


def our_app(tq: Any) -> Any:
    """The service as it is, but with handlers that take no time, and room for what the load leaves waiting."""
    handlers = {tq.TaskType.SEND_EMAIL: no_op, tq.TaskType.RESIZE_IMAGE: steps}
    return tq.create_app(tq.Settings(max_pending=1_000_000, backoff_base=0), handlers)


def bare_app(tq: Any) -> Any:
    """The least that FastAPI and sse-starlette can do for the same answers: no queue, no middleware.

    It has the same models, and the same one log line for each request; its frame is ready-made."""
    from fastapi import FastAPI, Request, Response
    from sse_starlette.sse import EventSourceResponse

    app, tasks, log = FastAPI(), {}, logging.getLogger("bare")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    settings = tq.Settings()
    frame, stepped = b"", asyncio.Event()

    def log_line(request: Request, request_id: str, status: int) -> None:
        log.info("[%s] %s %a %d %.1f ms", request_id, request.method, request.scope["path"][:200], status, 1.5)

    @app.post("/tasks", status_code=202)
    async def submit(submission: tq.TaskSubmission, request: Request, response: Response) -> tq.TaskStatus:
        task = tq.TaskStatus(
            id=secrets.token_hex(16), task_type=submission.task_type, priority=submission.priority,
            payload=submission.payload, status="pending", progress=0, attempt=0, max_retries=submission.max_retries,
            result=None, error=None, request_id="0123456789abcdef", created_at=datetime.now(UTC), not_before=None,
            started_at=None, completed_at=None, version=1)
        tasks[task.id] = task
        if len(tasks) > settings.keep_finished:
            del tasks[next(iter(tasks))]
        response.headers["Location"] = f"/tasks/{task.id}"
        log_line(request, "0123456789abcdef", 202)
        return task

    @app.get("/tasks/{task_id}")
    async def get(task_id: str, request: Request) -> tq.TaskStatus:
        log_line(request, "0123456789abcdef", 200)
        return tasks[task_id]

    async def frames() -> AsyncIterator[bytes]:
        yield tq.encode_frame("progress", '{"status":"pending","progress":0,"attempt":0}', 1)
        while True:
            await stepped.wait()
            yield frame

    async def step() -> None:
        nonlocal frame, stepped
        await STARTED.wait()
        for number in itertools.count():
            await asyncio.sleep(0.01)
            data = f'{{"status":"running","progress":{number % 100},"attempt":1}}'
            frame = tq.encode_frame("progress", data, 1_795_504_324_828_483 + number)
            stepped.set()
            stepped = asyncio.Event()

    @app.get("/tasks/{task_id}/stream", response_class=Response)
    async def stream(task_id: str) -> EventSourceResponse:
        if not hasattr(app.state, "step"):
            app.state.step = asyncio.create_task(step())
        return EventSourceResponse(frames(), ping=settings.ping_seconds, send_timeout=settings.send_timeout, sep="\n")

    return app


def serve(tq: Any, name: str, port: str, core: str) -> None:
    import uvicorn

    os.sched_setaffinity(0, {int(core)})
    app = our_app(tq) if name == "taskqueue" else bare_app(tq)

    @app.get("/start")
    async def start() -> None:
        STARTED.set()

    @app.get("/usage")
    async def usage() -> dict[str, float]:
        queue = getattr(app.state, "queue", None)
        return {"cpu": time.process_time(), "memory": resident_bytes(),
                "unfinished": queue.count("pending") + queue.count("running") if queue else 0}

    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="warning", access_log=False)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Client:
    """One server process, and blocking sockets to it: far less work than it gives the server."""

    def __init__(self, path: str, name: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port: int = probe.getsockname()[1]
        command = [sys.executable, __file__, "serve", name, str(self.port), str(CORES[0]), "--file", path]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(200):
            with contextlib.suppress(OSError):
                self.usage()
                return
            time.sleep(0.1)
        raise RuntimeError(f"the server {name} did not start")

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def connect(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def drive(self, request: bytes, count: int, connections: int = 16) -> Any:
        """Send `count` requests, `connections` at a time, and return the last answer."""
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


def post_task(**order: Any) -> bytes:
    body = json.dumps(order)
    head = f"POST /tasks HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return f"{head}\r\n\r\n{body}".encode()


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


# == http: the server's CPU for one request ============================================================================

REQUESTS = 3_200


def http(tq: Any, path: str) -> None:
    used: dict[tuple[str, str], list[float]] = {}

    def note(name: str, call: str, cpu: float) -> None:
        used.setdefault((name, call), []).append(cpu / REQUESTS * 1e6)

    with Client(path, "taskqueue") as ours, Client(path, "bare") as bare:
        for turn, (name, client) in itertools.product(range(8), (("taskqueue", ours), ("bare", bare))):
            began = client.cpu_when_idle()
            task = client.drive(post_task(task_type="send_email"), REQUESTS)
            posted = client.cpu_when_idle()
            client.drive(get(f"/tasks/{task['id']}"), REQUESTS)
            if turn:  # the first only warms up
                note(name, "POST /tasks", posted - began)
                note(name, "GET /tasks/{id}", client.cpu_when_idle() - posted)
    table(
        "http: one server process on one core, 16 connections; the POST's share includes running its task",
        ("CPU µs/request", "taskqueue", "bare FastAPI", "taskqueue is", "aimed at"),
        ((call, f"{statistics.median(used['taskqueue', call]):.0f}", f"{statistics.median(used['bare', call]):.0f}",
          f"{median_ratio(used['bare', call], used['taskqueue', call]):.2f} × as fast", target)
         for call, target in (("POST /tasks", "≥ 0.70"), ("GET /tasks/{id}", "≥ 0.90"))),
    )


# == streams: the server's CPU for one delivered frame, and the memory of a stream that waits ==========================

LIVE, IDLE, SECONDS = 500, 2_000, 3.0


def open_streams(client: Client, task_id: str, count: int) -> list[socket.socket]:
    """Open them, and read the first frame of each."""
    streams = []
    for _ in range(count):
        streams.append(client.connect())
        streams[-1].sendall(get(f"/tasks/{task_id}/stream"))
        data = b""
        while b"data: " not in data:
            data += streams[-1].recv(65_536)
    return streams


def live_frame_cpu(client: Client, task_id: str) -> tuple[float, float]:
    """CPU µs per frame that arrived, and how many arrive per second."""
    streams = {stream.fileno(): stream for stream in open_streams(client, task_id, LIVE)}
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
            order = post_task(task_type="resize_image", max_retries=10)
            cpu, frames = live_frame_cpu(client, client.drive(order, 1, connections=1)["id"])
            used[name].append(cpu)
            arrived[name].append(frames)
    for name in used:
        with Client(path, name) as client:
            order = post_task(task_type="send_email", delay=3600)
            memory[name] = idle_stream_bytes(client, client.drive(order, 1, connections=1)["id"])
    table(
        f"streams: {LIVE} live ones on a task that takes 100 steps a second, then {IDLE:,} idle ones;\n"
        "bare: an sse-starlette generator that waits on a shared event and sends a ready-made frame, with the same\n"
        "ping and send timeout",
        ("", "taskqueue", "bare", "taskqueue needs", "aimed at"),
        [("CPU µs per delivered frame", f"{statistics.median(used['taskqueue']):.1f}",
          f"{statistics.median(used['bare']):.1f}", f"{median_ratio(used['taskqueue'], used['bare']):.2f} × as much",
          "≤ 1.10"),
         ("frames delivered per second", f"{statistics.median(arrived['taskqueue']):,.0f}",
          f"{statistics.median(arrived['bare']):,.0f}", "", ""),
         ("memory per idle stream, KB", f"{memory['taskqueue'] / 1000:.1f}", f"{memory['bare'] / 1000:.1f}",
          f"{memory['taskqueue'] / memory['bare']:.2f} × as much", "")],
    )


# == scale: what a call costs when 1,000 … 1,000,000 tasks wait, and how long the event loop stands still ==============

SIZES = (1_000, 10_000, 100_000, 1_000_000)


@contextlib.asynccontextmanager
async def waiting_queue(tq: Any, settings: Any) -> AsyncIterator[Any]:
    """A service whose workers are all busy, so that whatever comes waits."""
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


def cpu_of(call: Callable[[Any], Any], arguments: Iterable[Any], batch: int = 50) -> float:
    """CPU µs per call: the median of batches, so that a garbage collection here or there does not count."""
    values, costs = iter(arguments), []
    while group := list(itertools.islice(values, batch)):
        began = time.process_time()
        for argument in group:
            call(argument)
        costs.append((time.process_time() - began) / len(group) * 1e6)
    return statistics.median(costs)


async def costs_at(tq: Any, size: int) -> dict[str, float]:
    settings = tq.Settings(max_pending=size + 10_000, drain_seconds=0)
    async with waiting_queue(tq, settings) as queue:
        order = tq.TaskSubmission(task_type="send_email")
        gc.collect()
        before = resident_bytes()
        ids = [queue.submit(order).id for _ in range(size)]
        gc.collect()
        memory = (resident_bytes() - before - sys.getsizeof(ids)) / size
        costs = {"submit": cpu_of(queue.submit, [order] * 1000), "get": cpu_of(queue.get_task, ids[:1000])}
        costs["list, first page"] = cpu_of(lambda _: queue.list_tasks(), range(100), 10)
        for status in (tq.Status.PENDING, tq.Status.RUNNING):
            costs[f"list {status}, first page"] = cpu_of(queue.list_tasks, [status] * 100, 10)
        random.Random(1).shuffle(ids)
        costs["cancel"] = cpu_of(queue.cancel, ids[: settings.keep_finished])
        more = [queue.submit(order).id for _ in range(2000)]
        costs["cancel, and evict another"] = cpu_of(queue.cancel, more)
        return {**costs, "bytes per waiting task": memory}


async def longest_stalls(tq: Any, size: int) -> dict[str, float]:
    """The most CPU milliseconds between two turns of the event loop, while `size` tasks come, are listed, and go."""
    settings = tq.Settings(max_pending=size, keep_finished=size // 2, drain_seconds=0)
    ids: list[str] = []
    async with waiting_queue(tq, settings) as queue:
        order = tq.TaskSubmission(task_type="send_email")
        stalls: dict[str, float] = {}
        for name, call, arguments in (
            ("submit", lambda _: ids.append(queue.submit(order).id), range(size)),
            ("list, 1,000 a page", lambda n: queue.list_tasks(limit=1000, offset=n), range(0, size, 1000)),
            ("cancel and evict", queue.cancel, iter(lambda: ids.pop() if ids else None, None)),
        ):
            gc.collect()
            stalls[name] = await longest_step(call, arguments)
        return stalls


async def longest_step(call: Callable[[Any], Any], arguments: Iterable[Any]) -> float:
    longest, last = 0.0, time.process_time()
    for argument in arguments:
        call(argument)
        await asyncio.sleep(0)
        now = time.process_time()
        longest, last = max(longest, now - last), now
    return longest * 1000


def in_a_fresh_process(path: str, function: Callable[[Any, int], Any], size: int) -> dict[str, float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(run_measurement, (path, function, size))


def run_measurement(path: str, function: Callable[[Any, int], Any], size: int) -> dict[str, float]:
    tq = load_module(path)
    gc.freeze()  # as `python taskqueue.py` does
    logging.disable()
    return asyncio.run(function(tq, size))  # type: ignore[no-any-return]


def scale_rows(path: str) -> Iterator[Row]:
    results = [in_a_fresh_process(path, costs_at, size) for size in SIZES]
    for name in results[0]:
        first, *rest = values = [result[name] for result in results]
        growth = "" if "bytes" in name else f"{max(rest) / first:.1f} ×"
        yield (name, *(f"{value:.0f}" if value >= 100 else f"{value:.1f}" for value in values), growth,
               "≤ 1800" if "bytes" in name else "≤ 2 ×")


def scale(tq: Any, path: str) -> None:
    table("scale: CPU µs per call, by the number of tasks that wait",
          ("", *(f"{size:,}" for size in SIZES), "growth", "aimed at"), scale_rows(path))
    bounds, many = 1_000, 100_000
    at_bounds, at_many = (in_a_fresh_process(path, longest_stalls, size) for size in (bounds, many))
    table("the event loop's longest stall, CPU ms, while so many tasks are submitted, listed, cancelled and evicted",
          ("", f"{bounds:,} (the default bounds)", "aimed at", f"{many:,}", "aimed at"),
          ((name, f"{at_bounds[name]:.1f}", "≤ 10", f"{at_many[name]:.1f}", "≤ 80") for name in at_bounds))


SECTIONS: dict[str, Callable[[Any, str], None]] = {"core": core, "http": http, "streams": streams, "scale": scale}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", default=list(SECTIONS), metavar="section", help=", ".join(SECTIONS))
    parser.add_argument("--file", default=str(HERE.parent / "taskqueue.py"), help="a copy of taskqueue.py to measure")
    args = parser.parse_args()
    if args.sections[0] == "serve":  # this is one of the servers that the sections start
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
