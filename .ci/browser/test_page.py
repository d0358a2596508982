"""The live page, as a browser shows it.

Each test starts a server, and uses the page as a person would.

    TASKQUEUE=/path/to/taskqueue.py pytest test_page.py

Without TASKQUEUE it is the taskqueue.py two folders up. Nothing here sleeps: `expect` tries again
until what it expects is so, or its time is up.
"""

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import (
    Browser,
    BrowserContext,
    Error,
    Locator,
    Page,
    expect,
    sync_playwright,
)

HERE = Path(__file__).resolve()
TASKQUEUE = Path(os.environ.get("TASKQUEUE") or HERE.parents[2] / "taskqueue.py")
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SLOW = ("--pace", "100", "--failure-rate", "0")  # what runs, runs on
CALM = ("--pace", "1", "--failure-rate", "0")
FAST = ("--pace", "0.02", "--failure-rate", "0", "--backoff-base", "0.05")
HOSTILE = "<img src=x onerror=hacked=1><script>hacked=1</script>"

# What a browser reports by itself for the refusals that the tests provoke.
EXPECTED = re.compile(
    "Failed to load resource: .*"
    "(409|422|502|503|ERR_CONNECTION_REFUSED|ERR_CONNECTION_RESET|ERR_EMPTY_RESPONSE|ERR_FAILED"
    "|ERR_INCOMPLETE_CHUNKED)"
)

# Runs before the page's own script: counts its streams, and hears of all that its policy forbids.
INIT = """
  window.streams = [];
  window.mostStreams = 0;
  window.violations = [];
  window.EventSource = class extends EventSource {
    constructor(...args) {
      super(...args);
      streams.push(this);
      const open = streams.filter((stream) => stream.readyState !== EventSource.CLOSED);
      mostStreams = Math.max(mostStreams, open.length);
    }
  };
  addEventListener("securitypolicyviolation", (event) => {
    violations.push(event.violatedDirective);
  });
"""

# The same app behind a path prefix, as a proxy that keeps the prefix hands it on.
UNDER_A_PREFIX = """
    import importlib
    import sys
    import uvicorn

    module = importlib.import_module(sys.argv[1])

    async def app(scope, receive, send):
        if scope["type"] == "http":
            scope = {**scope, "root_path": "/x"}
        await module.app(scope, receive, send)

    uvicorn.run(app, port=int(sys.argv[2]), http="h11", log_level="warning")
"""

expect.set_options(timeout=15_000)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]  # type: ignore[no-any-return]


def launch(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-u", *arguments],
        cwd=TASKQUEUE.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


# A server needs a second to start. Those with the flags that are most used start beforehand.
spares: dict[tuple[str, ...], subprocess.Popen[str]] = {}


def launch_spare(*flags: str) -> None:
    spares[flags] = launch(TASKQUEUE.name, "--no-tour", "--port", "0", *flags)


@pytest.fixture(scope="session", autouse=True)
def keep_spares() -> Iterator[None]:
    launch_spare(*SLOW)
    launch_spare(*SLOW, "--max-workers", "1")
    launch_spare(*FAST)
    yield
    for process in spares.values():
        process.kill()
        process.communicate()


class Server:
    """A taskqueue.py in a process of its own, ready to serve."""

    def __init__(self, *flags: str, port: int = 0, prefix: str = "") -> None:
        if prefix:
            program = textwrap.dedent(UNDER_A_PREFIX)
            self.process = launch("-c", program, TASKQUEUE.stem, str(port))
        elif flags in spares and port == 0:
            self.process = spares[flags]
            launch_spare(*flags)
        else:
            self.process = launch(
                TASKQUEUE.name, "--no-tour", "--port", str(port), *flags
            )
        origin = f"http://127.0.0.1:{port}"
        if not prefix:
            origin = self._read_origin()
        self.url = origin + prefix + "/"
        self.port = int(origin.rpartition(":")[2])
        self.client = httpx.Client(base_url=self.url, timeout=30, trust_env=False)
        self._wait_until_it_answers()

    def _read_origin(self) -> str:
        assert self.process.stdout
        for line in self.process.stdout:
            if found := re.search(r"http://[\w.]+:\d+", line):
                return found[0]
        raise AssertionError("the server ended before it said where it is")

    def _wait_until_it_answers(self) -> None:
        end = time.monotonic() + 20
        while True:
            try:
                self.client.get("health").raise_for_status()
                return
            except httpx.TransportError:
                assert time.monotonic() < end, "the server does not answer"

    def submit(self, task_type: str = "send_email", **fields: Any) -> str:
        answer = self.client.post("tasks", json={"task_type": task_type, **fields})
        return answer.raise_for_status().json()["id"]  # type: ignore[no-any-return]

    def get(self, task_id: str) -> dict[str, Any]:
        return self.client.get(f"tasks/{task_id}").json()  # type: ignore[no-any-return]

    def tasks(self) -> list[dict[str, Any]]:
        return self.client.get("tasks", params={"limit": 1000}).json()["tasks"]  # type: ignore[no-any-return]

    def count(self, status: str) -> int:
        return self.client.get("health").json()["tasks"][status]  # type: ignore[no-any-return]

    def stop(self, sig: int = signal.SIGKILL) -> None:
        self.client.close()
        self.process.send_signal(sig)
        self.process.wait(20)
        assert self.process.stdout
        self.process.stdout.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    with contextlib.ExitStack() as stack:

        def start(*flags: str, **options: Any) -> Server:
            server = Server(*flags, **options)
            stack.callback(lambda: server.process.poll() is None and server.stop())
            return server

        yield start


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Open the page of a server. After the test, nothing may have gone wrong behind the scenes."""
    visits: list[tuple[Page, list[str]]] = []

    def open_page(
        server: Server, context: BrowserContext | None = None, **options: Any
    ) -> Page:
        defaults = {
            "viewport": {"width": 1280, "height": 800},
            "reduced_motion": "reduce",
        }
        page = (context or browser.new_context(**defaults | options)).new_page()
        problems: list[str] = []

        def note_message(message: Any) -> None:
            if message.type in ("error", "warning"):
                problems.append(message.text)

        def note_request(request: Any) -> None:
            if not request.url.startswith((server.url, "data:")):
                problems.append(f"not under its prefix: {request.url}")

        page.on("console", note_message)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", note_request)
        page.add_init_script(INIT)
        page.set_default_timeout(15_000)
        visits.append((page, problems))
        page.goto(server.url)
        expect(page.locator("#state")).to_have_text("● live")
        return page

    yield open_page
    for page, problems in visits:
        problems += page.evaluate("violations")
        if page.evaluate("'hacked' in window"):
            problems.append("the page has been hacked")
        most = page.evaluate("mostStreams")
        page.close()
        assert [problem for problem in problems if not EXPECTED.search(problem)] == []
        assert most == 1
    for context in browser.contexts:
        context.close()


# The page's parts. Rows and chips are found by the id of their task.


def rows(page: Page, name: str) -> Locator:
    return page.locator(f"#{name} li[data-key]")


def row_of(page: Page, task_id: str) -> Locator:
    return page.locator(f"li[data-key^='{task_id} ']")


def bars(page: Page, task_id: str) -> Locator:
    return page.locator(f".bar[data-key^='{task_id} ']")


def slots(page: Page) -> Locator:
    return page.locator("#slots > li")


def ids(page: Page, name: str) -> list[str]:
    keys = rows(page, name).evaluate_all("rows => rows.map((row) => row.dataset.key)")
    return [key.split(" ")[0] for key in keys]


def answer(page: Page) -> Locator:
    return page.locator("#answer")


def details(page: Page) -> Locator:
    return page.locator("#details")


def play(page: Page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def hide(page: Page, hidden: bool) -> None:
    """Tell the page that its tab was hidden, or is shown again."""
    page.evaluate(
        """(hidden) => {
            Object.defineProperty(document, "hidden", {value: hidden, configurable: true});
            document.dispatchEvent(new Event("visibilitychange"));
        }""",
        hidden,
    )


# ===== What it shows ==================================================================


def test_one_stream_feeds_it_and_nothing_polls(serve, visit):
    server = serve(*FAST)
    page = visit(server)
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    for _ in range(20):
        server.submit()
    expect(page.locator("#finished-title")).to_contain_text("20 completed")
    assert requests == []
    assert page.evaluate("streams.map((stream) => stream.url)") == [
        f"{server.url}events"
    ]


def test_its_policy_has_a_new_nonce_for_each_answer(serve):
    server = serve(*SLOW)
    nonces = set()
    for _ in range(2):
        reply = server.client.get("")
        policy = reply.headers["content-security-policy"]
        nonce = re.search("script-src 'nonce-([^']+)'", policy)[1]
        assert f"style-src 'nonce-{nonce}'" in policy
        assert f'<script nonce="{nonce}">' in reply.text
        assert f'<style nonce="{nonce}">' in reply.text
        assert "NONCE" not in reply.text
        nonces.add(nonce)
    assert len(nonces) == 2


def test_its_policy_forbids_html_out_of_data(serve, browser):
    server = serve(*SLOW)
    page = browser.new_page()
    page.goto(server.url)
    with pytest.raises(Error, match="TrustedHTML"):
        page.evaluate("document.body.innerHTML = '<b>no</b>'")


def test_there_is_a_lane_for_each_slot_and_a_free_one_says_so(serve, visit):
    server = serve(*SLOW, "--max-workers", "2")
    page = visit(server)
    expect(slots(page)).to_have_count(2)
    task = server.submit("resize_image", priority=1, max_retries=2)
    first, second = slots(page).all()
    expect(first).to_contain_text(
        re.compile(r"slot 1.*HIGH.*resize_image.*0 %, \d+\.\d s, attempt 1 of 3")
    )
    expect(row_of(page, task).get_by_role("progressbar")).to_have_attribute(
        "max", "100"
    )
    free = "list => getComputedStyle(list, '::before').content"
    assert second.locator("ol").evaluate(free) == '"free"'
    expect(page.locator("#slots-title")).to_have_text("Slots: 1 of 2 are busy")


def test_a_task_keeps_its_lane_while_others_come_and_go(serve, visit):
    server = serve(*SLOW, "--max-workers", "3")
    page = visit(server)
    tasks = [server.submit() for _ in range(3)]
    expect(rows(page, "slots")).to_have_count(3)
    assert ids(page, "slots") == tasks
    server.client.delete(f"tasks/{tasks[0]}?force=true")
    expect(rows(page, "slots")).to_have_count(2)
    new = server.submit()
    expect(rows(page, "slots")).to_have_count(3)
    assert ids(page, "slots") == [new, *tasks[1:]]


def test_progress_is_live(serve, visit):
    server = serve(*CALM)
    page = visit(server)
    page.evaluate(
        """() => {
            window.seen = [];
            const note = () => seen.push(document.querySelector("#slots progress")?.value);
            setInterval(note, 50);
        }"""
    )
    server.submit("resize_image")
    expect(rows(page, "finished")).to_have_count(1)
    seen = [value for value in page.evaluate("seen") if value is not None]
    assert seen == sorted(seen)
    assert len({0, 25, 50, 75} & set(seen)) >= 3


def test_the_ready_stand_in_the_order_in_which_they_will_run(serve, visit):
    server = serve(*SLOW, "--max-workers", "1")
    page = visit(server)
    server.submit()
    low = [server.submit(priority=10) for _ in range(3)]
    medium = server.submit()
    expect(rows(page, "ready")).to_have_count(4)
    assert ids(page, "ready") == [medium, *low]
    high = server.submit(priority=1)
    expect(rows(page, "ready")).to_have_count(5)
    assert ids(page, "ready") == [high, medium, *low]
    expect(row_of(page, high)).to_have_class("HIGH")
    expect(row_of(page, low[0])).to_have_class("LOW")


def test_in_a_burst_they_run_in_the_order_on_the_screen(serve, visit):
    server = serve("--pace", "0.05", "--failure-rate", "0", "--max-workers", "1")
    page = visit(server)
    for _ in range(20):  # they hold the slot for three seconds
        server.submit("generate_report", priority=1)
    types = ("resize_image", "send_email", "generate_report")
    for number in range(16):
        server.submit(types[number % 3], priority=(10, 5, 1, 5)[number % 4])
    expect(page.locator("#ready .LOW")).to_have_count(4)
    shown = ids(page, "ready")
    assert len(shown) > 15
    expect(page.locator("#finished-title")).to_contain_text("36 completed")
    started = {task["id"]: task["started_at"] for task in server.tasks()}
    assert shown == sorted(shown, key=lambda task: started[task])


def test_who_overtakes_is_seen_to_move(serve, visit):
    server = serve(*SLOW, "--max-workers", "1")
    page = visit(server, reduced_motion="no-preference")
    server.submit()
    server.submit(priority=10)
    expect(rows(page, "ready")).to_have_count(1)
    high = server.submit(priority=1)
    moving = "row => row.getAnimations().map((animation) => animation.animationName)"
    assert row_of(page, high).evaluate(moving) == ["arrive"]


def test_nothing_moves_where_less_motion_is_asked_for(serve, visit):
    server = serve(*SLOW, "--max-workers", "1")
    page = visit(server, reduced_motion="reduce")
    server.submit()
    task = server.submit()
    assert row_of(page, task).evaluate("row => row.getAnimations().length") == 0


def test_a_delay_is_counted_down_apart_and_then_the_task_is_ready(serve, visit):
    server = serve(*SLOW, "--max-workers", "1")
    page = visit(server)
    server.submit()
    low = server.submit(priority=10)
    task = server.submit(priority=1, delay=1.5)
    expect(row_of(page, task)).to_contain_text(re.compile(r"starts in 0\.\d s"))
    assert ids(page, "waiting") == [task]
    expect(rows(page, "ready")).to_have_count(2)
    assert ids(page, "ready") == [task, low]


def test_a_backoff_is_counted_down_with_the_error_before_it(serve, visit):
    server = serve(*FAST[:4], "--backoff-base", "60", "--backoff-cap", "60")
    page = visit(server)
    task = server.submit(payload={"to": "a@b.invalid"}, max_retries=3)
    expect(page.locator("#waiting").locator(row_of(page, task))).to_contain_text(
        re.compile(
            r"starts in \d+\.\d s, attempt 1 of 4 ConnectionError: no mail server"
        )
    )
    expect(page.locator("#waiting-title")).to_have_text(
        "Delay or backoff: 1 wait for their time"
    )


def test_the_finished_are_newest_first_and_fifty_at_most(serve, visit):
    server = serve(*FAST, "--max-workers", "1")
    page = visit(server)
    tasks = [server.submit() for _ in range(60)]
    expect(page.locator("#finished-title")).to_contain_text("60 completed")
    expect(row_of(page, tasks[-1])).to_contain_text("completed")
    assert ids(page, "finished") == tasks[:9:-1]
    assert page.evaluate("tasks.size") == 50


def test_a_finished_row_tells_what_came_out_and_its_times(serve, visit):
    server = serve(*FAST)
    page = visit(server)
    done = server.submit(
        "resize_image", payload={"width": 321, "height": 123}, max_retries=2
    )
    lost = server.submit(payload={"to": "a@b.invalid"}, priority=10)
    expect(row_of(page, done)).to_contain_text(
        re.compile(r"completed, attempt 1 of 3, waited 0\.\d s, ran \d\.\d s .*321x123")
    )
    expect(row_of(page, lost)).to_contain_text(
        re.compile("LOW.*failed, attempt 1 of 1.*Connection")
    )


def test_a_long_result_is_one_line_that_opens(serve, visit):
    server = serve(*FAST)
    page = visit(server)
    short = server.submit()
    row = row_of(page, server.submit(payload={"to": "x " * 500}))
    height = "row => row.getBoundingClientRect().height"
    expect(row).to_contain_text("completed")
    assert row.evaluate(height) <= row_of(page, short).evaluate(height) + 1
    row.locator("summary").click()
    assert row.evaluate(height) > 3 * row_of(page, short).evaluate(height)
    server.submit()
    expect(rows(page, "finished")).to_have_count(3)
    expect(row.locator("details")).to_have_attribute("open", "")


def test_the_strip_shows_what_ran_in_which_slot_and_when(serve, visit):
    server = serve(*CALM, "--max-workers", "1")
    page = visit(server)
    first, second = server.submit(), server.submit()
    expect(rows(page, "finished")).to_have_count(2)
    one, two = bars(page, first).bounding_box(), bars(page, second).bounding_box()
    assert one["x"] + one["width"] <= two["x"] + 2
    minute = page.locator("#slots .track").bounding_box()["width"]
    assert (
        minute / 120 < one["width"] < minute / 30
    )  # it ran for about a second of the sixty
    assert (
        two["x"] + two["width"]
        <= page.locator("#slots .track").bounding_box()["x"] + minute
    )


def test_the_strip_shows_each_attempt_of_a_retried_task(serve, visit):
    server = serve("--pace", "0.5", "--failure-rate", "0", "--backoff-base", "0.3")
    page = visit(server)
    task = server.submit(payload={"to": "a@b.invalid"}, max_retries=2)
    expect(row_of(page, task)).to_contain_text("failed, attempt 3 of 3")
    expect(bars(page, task)).to_have_count(3)


def test_hostile_text_is_shown_as_text(serve, visit):
    server = serve(*FAST)
    page = visit(server)
    server.submit(payload={"to": HOSTILE})
    server.submit(payload={"to": HOSTILE + ".invalid"})
    expect(rows(page, "finished").filter(has_text=HOSTILE)).to_have_count(2)
    page.get_by_label("Retries").fill(f'0, "{HOSTILE}": 1')
    play(page, "Submit")
    expect(answer(page)).to_contain_text("422")
    expect(details(page)).to_contain_text(HOSTILE)
    assert (
        page.evaluate("document.images.length + document.scripts.length") == 1
    )  # its own script


def test_a_page_that_comes_late_learns_of_all_that_wait_and_run(serve, visit):
    server = serve(*SLOW, "--max-workers", "2")
    tasks = [server.submit() for _ in range(150)]
    page = visit(server)
    expect(page.locator("#ready-title")).to_contain_text("148 wait")
    expect(row_of(page, tasks[2])).to_be_visible()
    assert sorted(ids(page, "slots")) == sorted(tasks[:2])
    assert ids(page, "ready") == tasks[2:42]


# ===== Scenarios ======================================================================


def test_each_scenario_has_a_caption_that_stays_and_names_a_function(serve, visit):
    server = serve(*SLOW)
    page = visit(server)
    source = TASKQUEUE.read_text()
    captions = []
    for button in page.locator("#scenarios button").all():
        button.click()
        caption = page.locator("#caption").inner_text()
        captions.append(caption)
        names = re.findall(r"([a-z_]+)\(\)", caption)
        assert names
        for name in names:
            assert f"def {name}(" in source, caption
    assert len(set(captions)) == len(captions) == 6


def test_scenario_burst(serve, visit):
    server = serve(*SLOW)
    page = visit(server)
    play(page, "Burst of mixed")
    expect(page.locator("#counter")).to_have_text("(24 sent)")
    assert {task["priority"] for task in server.tasks()} == {1, 5, 10}
    assert len({task["task_type"] for task in server.tasks()}) == 3


def test_scenario_high_overtakes_low(serve, visit):
    server = serve(*SLOW)
    page = visit(server)
    play(page, "One HIGH behind ten LOW")
    expect(rows(page, "ready").locator("b")).to_have_text(["HIGH", *["LOW"] * 7])


def test_scenario_fails_and_retries(serve, visit):
    server = serve("--pace", "0.2", "--failure-rate", "0", "--backoff-cap", "1")
    page = visit(server)
    play(page, "Fails and retries")
    expect(rows(page, "waiting")).to_contain_text(["ConnectionError"])
    expect(
        rows(page, "finished").filter(has_text="failed, attempt 5 of 5")
    ).to_have_count(1)


def test_scenario_fill_ends_with_a_503(serve, visit):
    server = serve(*SLOW, "--max-pending", "30")
    page = visit(server)
    play(page, "Fill the queue")
    expect(answer(page)).to_have_text("503 Service Unavailable")
    expect(details(page)).to_contain_text("retry-after: 1")
    expect(page.locator("#counter")).to_have_text("(34 sent)")
    expect(page.locator("#ready-title")).to_contain_text("30 wait")


def test_a_report_that_is_stopped_goes_on_for_a_moment(serve, visit):
    server = serve("--pace", "2", "--failure-rate", "0")
    page = visit(server)
    task = server.submit("generate_report")
    row_of(page, task).get_by_role("button", name="Stop").click()
    expect(rows(page, "slots").get_by_role("button")).to_have_text("stopping…")
    expect(answer(page)).to_have_text("202 Accepted")
    expect(rows(page, "finished")).to_contain_text(["cancelled, attempt 1 of 1"])


def test_scenario_block_the_loop(serve, visit):
    server = serve(*CALM)
    page = visit(server)
    play(page, "Block the loop")
    expect(page.locator("#heard")).to_contain_text(re.compile(r"2\.\d s"))
    expect(answer(page)).to_have_text("No answer for two seconds…")
    expect(answer(page)).to_have_text("200 OK")
    expect(rows(page, "finished")).to_have_count(3)
    expect(page.locator("#slots .bar.HIGH")).to_have_count(1)


def test_scenario_cancel_all_that_wait(serve, visit):
    server = serve(*SLOW, "--max-workers", "1")
    page = visit(server)
    running = server.submit()
    for delay in (0, 0, 500):
        server.submit(delay=delay)
    expect(rows(page, "waiting")).to_have_count(1)
    expect(rows(page, "ready")).to_have_count(2)
    play(page, "Cancel all that wait")
    expect(rows(page, "finished")).to_have_count(3)
    assert server.get(running)["status"] == "running"
    assert server.count("cancelled") == 3


# ===== What a person does =============================================================


def test_form_submits_what_was_typed(serve, visit):
    server = serve(*SLOW)
    page = visit(server)
    page.get_by_label("Type").select_option("generate_report")
    fields = {
        "Priority": "1",
        "Retries": "2",
        "Timeout": "7.5",
        "Payload": '{"report_id": 7}',
    }
    for label, text in fields.items():
        page.get_by_label(label).fill(text)
    play(page, "Submit")
    expect(answer(page)).to_have_text("202 Accepted")
    task = server.tasks()[0]
    assert task["task_type"] == "generate_report"
    assert task["priority"] == 1
    assert task["max_retries"] == 2
    assert task["payload"] == {"report_id": 7}
    expect(page.locator("#curl")).to_contain_text('"timeout": 7.5')


def test_form_shows_an_error_as_the_api_gives_it(serve, visit):
    page = visit(serve(*SLOW))
    for label, wrong, right, error in (
        ("Payload", '{"width": "wide"}', "{}", "payload"),
        ("Payload", '{"height": 1.0}', "{}", "height"),
        ("Payload", "{oops", "{}", "JSON"),
        ("Priority", "7", "5", "priority"),
        ("Retries", "11", "0", "less than or equal to 10"),
        ("Timeout", "0", "60", "greater than 0"),
        ("Delay", "", "0", "JSON"),
    ):
        page.get_by_label(label).fill(wrong)
        play(page, "Submit")
        expect(details(page)).to_contain_text(error)
        expect(answer(page)).to_contain_text("422")
        expect(answer(page)).to_have_class("bad")
        page.get_by_label(label).fill(right)
    play(page, "Submit")
    expect(answer(page)).to_have_text("202 Accepted")
    expect(answer(page)).to_have_class("good")


def test_a_click_on_a_row_cancels_what_waits_and_stops_what_runs(serve, visit):
    server = serve(*SLOW, "--max-workers", "1")
    page = visit(server)
    running, waiting = server.submit(), server.submit()
    row_of(page, waiting).get_by_role("button", name="Cancel").click()
    expect(answer(page)).to_have_text("200 OK")
    row_of(page, running).get_by_role("button", name="Stop").click()
    expect(answer(page)).to_have_text("202 Accepted")
    expect(rows(page, "finished")).to_have_count(2)
    assert {task["status"] for task in server.tasks()} == {"cancelled"}
    expect(rows(page, "finished").get_by_role("button")).to_have_count(0)


def test_a_cancel_that_comes_too_late_shows_the_409(serve, visit):
    server = serve(*FAST)
    page = visit(server)
    task = server.submit(delay=500)
    button = row_of(page, task).get_by_role("button")
    expect(button).to_be_visible()

    def be_late(route: Any) -> None:
        server.client.delete(f"tasks/{task}")
        route.continue_()

    page.route("**/tasks/*", be_late)
    button.click()
    expect(answer(page)).to_contain_text("409")
    expect(answer(page)).to_have_class("bad")


def test_the_last_request_is_shown_with_its_answer(serve, visit):
    server = serve(*SLOW)
    page = visit(server)
    play(page, "Submit")
    expect(page.locator("#request")).to_have_text("POST /tasks")
    expect(answer(page)).to_have_text("202 Accepted")
    expect(answer(page)).to_have_class("good")
    expect(details(page)).to_contain_text(f"location: /tasks/{server.tasks()[0]['id']}")


def test_the_last_request_can_be_copied_for_a_shell(serve, visit):
    server = serve(*SLOW)
    page = visit(server, permissions=["clipboard-read", "clipboard-write"])
    page.get_by_label("Payload").fill('{"url": "it\'s"}')
    play(page, "Submit")
    expect(answer(page)).to_have_text("202 Accepted")
    play(page, "Copy as curl")
    command = shlex.split(page.evaluate("navigator.clipboard.readText()"))
    assert command[:4] == ["curl", "-i", "-X", "POST"]
    body = command[command.index("-d") + 1]
    reply = server.client.post(
        command[4], content=body, headers={"Content-Type": "application/json"}
    )
    assert reply.json()["payload"] == {"url": "it's"}


def test_a_request_without_an_answer_says_so(serve, visit):
    server = serve(*SLOW)
    page = visit(server)
    play(page, "Submit")
    expect(answer(page)).to_have_text("202 Accepted")
    server.stop()
    expect(page.locator("#state")).to_contain_text("gone")
    play(page, "Submit")
    expect(answer(page)).to_have_text("No answer")
    expect(answer(page)).to_have_class("bad")
    expect(details(page)).to_contain_text("Failed to fetch")
    expect(details(page)).not_to_contain_text("location")


# ===== When the server goes ===========================================================


def test_after_a_shutdown_the_next_server_shows_its_own_truth(serve, visit):
    server = serve(*SLOW, "--drain-seconds", "0", "--max-workers", "2")
    page = visit(server)
    for _ in range(5):
        server.submit()
    expect(rows(page, "ready")).to_have_count(3)
    server.stop(signal.SIGINT)
    expect(page.locator("#state")).to_contain_text("The server is gone")
    expect(page.locator("main")).to_have_class("stale")

    server = serve(*SLOW, "--max-workers", "4", port=server.port)
    task = server.submit()
    expect(page.locator("#state")).to_have_text("● live")
    expect(page.locator("#slots-title")).to_have_text("Slots: 1 of 4 are busy")
    expect(slots(page)).to_have_count(4)
    expect(rows(page, "ready")).to_have_count(0)
    assert ids(page, "slots") == [task]


def test_a_lost_connection_is_said_and_mended(serve, visit):
    server = serve(*SLOW)
    page = visit(server)
    server.client.delete(f"tasks/{server.submit(delay=600)}")
    expect(rows(page, "finished")).to_have_count(1)
    server.stop()
    expect(page.locator("#state")).to_contain_text("The server is gone")
    expect(page.locator("main")).to_have_class("stale")
    expect(rows(page, "finished")).to_have_count(1)  # what was
    serve(*SLOW, port=server.port)
    expect(page.locator("#state")).to_have_text("● live")
    expect(page.locator("main")).not_to_have_class("stale")
    expect(rows(page, "finished")).to_have_count(0)


def test_a_stream_that_was_refused_is_tried_again(serve, visit):
    """EventSource gives up when it is answered with anything but a stream: a proxy's 502, say."""
    server = serve(*SLOW)
    page = visit(server)
    page.route("**/events", lambda route: route.fulfill(status=502))
    with page.expect_response("**/events"):
        server.stop()
    expect(page.locator("#state")).to_contain_text("gone")
    server = serve(*SLOW, port=server.port)
    page.unroute_all()
    server.submit()
    expect(page.locator("#state")).to_have_text("● live")
    expect(rows(page, "slots")).to_have_count(1)


def test_a_row_whose_end_was_never_told_goes(serve, visit):
    """A task that ends and is evicted before the page could be told: its row must not stay."""
    server = serve("--pace", "0.5", "--failure-rate", "0", "--keep-finished", "0")
    page = visit(server)
    task = server.submit()
    expect(row_of(page, task)).to_be_visible()
    server.client.get(f"tasks/{task}/stream")  # until it has ended
    waiting = server.submit(delay=600)
    expect(row_of(page, waiting)).to_be_visible()
    expect(row_of(page, task)).to_have_count(0)
    assert ids(page, "waiting") == [waiting]


def test_a_hidden_page_closes_its_stream_and_comes_back(serve, visit):
    server = serve(*SLOW)
    page = visit(server)
    hide(page, True)
    open_streams = (
        "streams.filter((stream) => stream.readyState !== EventSource.CLOSED).length"
    )
    assert page.evaluate(open_streams) == 0
    task = server.submit()
    hide(page, False)
    expect(row_of(page, task)).to_be_visible()
    expect(page.locator("#state")).to_have_text("● live")
    assert page.evaluate(open_streams) == 1


def test_two_tabs_show_the_same(serve, visit):
    server = serve(*SLOW, "--max-workers", "2")
    one = visit(server)
    two = visit(server, context=one.context)
    play(one, "One HIGH behind ten LOW")
    for page in (one, two):
        expect(rows(page, "ready")).to_have_count(9)
    assert ids(one, "ready") == ids(two, "ready")
    assert ids(one, "slots") == ids(two, "slots")


def test_six_taken_connections_are_told_after_two_seconds(serve, visit):
    server = serve(*SLOW)
    page = visit(server)
    hide(page, True)
    other = page.context.new_page()
    other.goto(f"{server.url}health")
    other.evaluate("for (let i = 0; i < 6; i += 1) new EventSource('events')")
    hide(page, False)
    expect(page.locator("#state")).to_contain_text("A browser has six")
    other.close()
    expect(page.locator("#state")).to_have_text("● live")


def test_everything_works_under_a_path_prefix(serve, visit):
    server = serve(port=free_port(), prefix="/x")
    page = visit(server)
    play(page, "Submit")
    expect(page.locator("#request")).to_have_text("POST /x/tasks")
    expect(details(page)).to_contain_text("location: /x/tasks/")
    row = page.locator("li[data-key]")
    expect(row).to_have_count(1)
    for name in ("API docs", "Metrics"):
        link = page.get_by_role("link", name=name).evaluate("link => link.href")
        assert link.startswith(server.url)
        assert httpx.get(link, trust_env=False).status_code == 200
    assert (
        row.locator("a").evaluate("link => link.href").startswith(f"{server.url}tasks/")
    )


# ===== For everyone ===================================================================


def test_narrow_and_zoomed_screens_need_no_sideways_scrolling(serve, visit):
    server = serve(*FAST, "--max-workers", "1")
    page = visit(server, viewport={"width": 375, "height": 700})
    server.submit(payload={"to": "x" * 400})
    server.submit(payload={"to": "y" * 400 + ".invalid"})
    server.submit("generate_report", delay=600, priority=1)
    expect(rows(page, "finished")).to_have_count(2)
    page.get_by_label("Retries").fill(f'0, "{"z" * 300}": 1')
    play(page, "Submit")
    expect(details(page)).to_contain_text("zzz")
    rights = "nodes => nodes.map((node) => node.getBoundingClientRect().right)"
    for width in (320, 375, 640, 960):  # 640 and 960: screens of 1280 and 1920 at 200 %
        page.set_viewport_size({"width": width, "height": 700})
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert max(page.locator("body *:not(summary)").evaluate_all(rights)) <= width


def test_on_a_narrow_screen_tasks_stand_before_the_form(serve, visit):
    page = visit(serve(*SLOW), viewport={"width": 375, "height": 800})
    tops = []
    for name in ("#scenarios", "#slots", "#ready", "#finished", "form"):
        tops.append(page.locator(name).bounding_box()["y"])
    assert tops == sorted(tops)
    assert tops[1] < 400  # tasks are seen without scrolling


def test_on_a_projector_text_is_large_and_nothing_is_cut_off(serve, visit):
    server = serve(*SLOW)
    page = visit(server, viewport={"width": 1920, "height": 1080})
    play(page, "Burst of mixed")
    expect(rows(page, "ready")).to_have_count(21)
    sizes = page.evaluate(
        """[...document.querySelectorAll("body *:not(script, style, option)")]
            .filter((node) => node.getClientRects().length)
            .map((node) => parseFloat(getComputedStyle(node).fontSize))"""
    )
    assert min(sizes) >= 20
    for name in ("#slots", "#ready-title", "form"):
        box = page.locator(name).bounding_box()
        assert box["y"] + box["height"] < 1080


def test_keyboard_reaches_everything_with_visible_focus(serve, visit):
    server = serve(*SLOW, "--max-workers", "1")
    page = visit(server)
    server.submit()
    expect(rows(page, "slots")).to_have_count(1)
    server.submit()
    expect(rows(page, "ready")).to_have_count(1)
    everything = "a, button, input, select, textarea, summary"
    visible = page.locator(everything).filter(visible=True)
    for _ in range(visible.count()):
        page.keyboard.press("Tab")
        focused = page.locator(":focus")
        outline = focused.evaluate("node => getComputedStyle(node).outline")
        assert re.search(r"\bsolid 3px$", outline)
        focused.evaluate("node => { node.reached = true; }")
    unreached = (
        "nodes => nodes.filter((node) => !node.reached).map((node) => node.outerHTML)"
    )
    assert visible.evaluate_all(unreached) == []


def test_keyboard_cancels_and_keeps_its_place(serve, visit):
    """A row that moves from one list to another takes the focus with it."""
    server = serve(*SLOW, "--max-workers", "1")
    page = visit(server)
    running, waiting = server.submit(), server.submit()
    row_of(page, waiting).get_by_role("button").focus()
    server.client.delete(f"tasks/{running}?force=true")
    button = slots(page).get_by_role("button")
    expect(button).to_have_accessible_name(f"Stop send_email {waiting[:4]}")
    expect(button).to_be_focused()
    page.keyboard.press("Enter")
    expect(row_of(page, waiting)).to_contain_text("cancelled")


def test_names_and_roles(serve, visit):
    server = serve(*SLOW, "--max-workers", "1")
    page = visit(server)
    for task, verb in ((server.submit(), "Stop"), (server.submit(), "Cancel")):
        name = f"send_email {task[:4]}"
        expect(row_of(page, task).get_by_role("button")).to_have_accessible_name(
            f"{verb} {name}"
        )
    expect(page.locator("#slots").get_by_role("progressbar")).to_have_accessible_name(
        re.compile("send")
    )
    for field in page.locator("input, select, textarea").all():
        expect(field).to_have_accessible_name(
            re.compile("Type|Priority|Retries|Timeout|Delay|Payload")
        )
    assert page.evaluate("document.documentElement.lang") == "en"
    assert page.evaluate("document.title") == "taskqueue"


def test_only_three_places_are_read_out_and_a_scenario_only_once(serve, visit):
    page = visit(serve(*SLOW))
    expect(page.get_by_role("status")).to_have_count(3)  # connection, caption, answer
    assert page.locator("[aria-live]").count() == 0
    page.evaluate(
        """() => {
            window.announced = [];
            for (const node of document.querySelectorAll("output, [role=status]")) {
                const note = () => announced.push(node.textContent);
                new MutationObserver(note).observe(node, {childList: true, characterData: true});
            }
        }"""
    )
    play(page, "Burst of mixed")
    expect(page.locator("#counter")).to_have_text("(24 sent)")
    announced = page.evaluate("announced")
    assert len(announced) == 2
    assert announced[1] == "202 Accepted"


CONTRASTS = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].map((value) => value / 255);
  };
  const over = ([r, g, b, a], under) => [r, g, b].map((v, i) => v * a + under[i] * (1 - a));
  const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const weights = [0.2126, 0.7152, 0.0722];
  const luminance = (rgb) => rgb.reduce((sum, v, i) => sum + linear(v) * weights[i], 0);
  const page = getComputedStyle(document.documentElement).backgroundColor;
  const behind = (node) => {
    if (!node) return rgba(page).slice(0, 3);
    return over(rgba(getComputedStyle(node).backgroundColor), behind(node.parentElement));
  };
  const found = {};
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let text = walker.nextNode(); text; text = walker.nextNode()) {
    const node = text.parentElement;
    if (!text.data.trim() || !node.getClientRects().length) continue;
    if (node.matches("script, style, option")) continue;
    const under = behind(node);
    const color = over(rgba(getComputedStyle(node).color), under);
    const [dark, light] = [luminance(color), luminance(under)].sort((a, b) => a - b);
    const kind = `${node.tagName} ${node.id} ${node.className} in ${node.parentElement.className}`;
    found[kind] = Math.min(found[kind] ?? 99, (light + 0.05) / (dark + 0.05));
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(serve, visit, scheme):
    server = serve("--pace", "0.3", "--failure-rate", "0", "--max-workers", "2")
    page = visit(server, color_scheme=scheme)
    server.submit(payload={"to": "a@b.invalid"})
    server.submit()
    server.client.delete(f"tasks/{server.submit(delay=600)}")
    expect(rows(page, "finished")).to_have_count(3)
    server.submit(delay=600)
    play(page, "One HIGH behind ten LOW")
    server.submit("generate_report", priority=5)
    expect(rows(page, "ready")).not_to_have_count(0)
    found = page.evaluate(CONTRASTS)
    assert len(found) > 15
    assert {kind: ratio for kind, ratio in found.items() if ratio < 4.5} == {}
    for state in ("gone", "bad"):  # of the connection
        page.evaluate("(state) => setState(state, 'text')", state)
        found = page.evaluate(CONTRASTS)
        assert {kind: ratio for kind, ratio in found.items() if ratio < 4.5} == {}


FRAMES = """async () => {
  const gaps = [];
  const began = performance.now();
  let changes = 0;
  let nodes = 0;
  let last = began;
  streams.at(-1).addEventListener("task", () => { changes += 1; });
  while (gaps.length < 240 && queue.tasks.pending) {
    const now = await new Promise(requestAnimationFrame);
    gaps.push(now - last);
    nodes = Math.max(nodes, document.getElementsByTagName("*").length);
    last = now;
  }
  gaps.sort((a, b) => a - b);
  const [median, late] = [0.5, 0.95].map((share) => gaps[Math.floor(gaps.length * share)]);
  return {rate: 1000 * changes / (last - began), nodes, median, late};
}"""


def test_smooth_with_1000_tasks_at_200_changes_a_second(serve, visit):
    """The bounds (frames: milliseconds) leave room for a busy machine."""
    server = serve("--pace", "0.15", "--failure-rate", "0", "--max-workers", "14")
    page = visit(server, reduced_motion="no-preference")
    start = time.monotonic() + 4
    for number in range(1000):
        delay = max(0, start - time.monotonic())
        server.submit(priority=(1, 5, 10)[number % 3], delay=delay)
    expect(rows(page, "slots")).not_to_have_count(0)
    measured = page.evaluate(FRAMES)
    print(measured)
    assert measured["rate"] > 100
    assert measured["median"] < 50
    assert measured["late"] < 250
    assert measured["nodes"] < 3000


# ===== The README's pictures ==========================================================


@pytest.mark.skipif("SCREENSHOTS" not in os.environ, reason="only when asked for")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_take_a_picture(serve, visit, scheme):
    server = serve("--failure-rate", "0", "--backoff-base", "20", "--backoff-cap", "20")
    page = visit(server, color_scheme=scheme, viewport={"width": 1280, "height": 900})
    play(page, "Fails and retries")
    expect(rows(page, "finished").nth(3)).to_be_visible()
    play(page, "Burst of mixed")
    expect(rows(page, "finished").nth(11)).to_be_attached()
    folder = Path(os.environ["SCREENSHOTS"])
    folder.mkdir(exist_ok=True)
    path = folder / f"dashboard-{scheme}.png"
    page.screenshot(path=path)
    assert path.stat().st_size < 250_000
