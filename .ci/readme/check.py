"""Check that README.md tells the truth. It takes some 40 seconds.

    check.py          all checks
    check.py show     what the commands of the tour print today

Each recipe is run as it is printed, in a folder of its own. So is the tour, two times,
because it can be repeated without a restart. The answers must be those of the README.
Ids and the numbers of lines may be others. Only the port is replaced, by a free one.
"""

import contextlib
import html
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULE = (ROOT / "taskqueue.py").read_text(encoding="utf-8")
SUITE = (ROOT / "test_taskqueue.py").read_text(encoding="utf-8")
PLAIN = re.sub(r"^```.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE)
MAX_LINES = 220
MAX_WORDS = 20  # in a sentence
SECONDS = 40  # for one command
PORT = "8000"  # as printed

# What a recipe's command must print: a pattern.
RECIPES = {
    "my_client.py": r"'status': 'running'.*'status': 'completed'",
    "my_script.py": r"1 completed .*\n5 completed .*\n10 completed ",
    "test_my_service.py": r"\b2 passed\b",
}
# The service with a handler of its own is asked this.
MAIL = """
id=$(curl -s http://127.0.0.1:8000/tasks -H 'Content-Type: application/json' \
 -d '{"task_type": "send_email", "payload": {"to": "ada@example.com"}}' | grep -oE '[0-9a-f]{32}')
curl -s http://127.0.0.1:8000/tasks/$id/stream
"""
# Node has no EventSource, and no page that an address can be relative to.
BROWSER = """
const realFetch = fetch;
const at = (path) => new URL(path, "http://127.0.0.1:8000/");
globalThis.fetch = (path, options) => realFetch(at(path), options);
globalThis.EventSource = class {
  constructor(path) { this.answer = realFetch(at(path)); }
  async addEventListener(name, hear) {
    const text = await (await this.answer).text();
    for (const frame of text.split("\\n\\n").filter((each) => each.startsWith(`event: ${name}\\n`)))
      hear({data: frame.split("data: ")[1]});
  }
  close() { console.log("closed"); }
};
"""


def section(title: str) -> str:
    """The part of the README below this heading, up to the next one."""
    pattern = rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)"
    found = re.search(pattern, README, re.DOTALL | re.MULTILINE)
    if found is None:
        sys.exit(f"README.md has no section {title!r}")
    return found[1]


def blocks(text: str, language: str) -> list[str]:
    """The blocks of code in that language."""
    pattern = rf"^```{language}\n(.*?)^```$"
    return re.findall(pattern, text, re.DOTALL | re.MULTILINE)


def codes(text: str) -> list[str]:
    """All that is printed as `code` within the text."""
    return re.findall(r"`([^`\n]+)`", text) + re.findall(r"<code>(.*?)</code>", text)


# -- To run what is printed ------------------------------------------------------------


class Workshop:
    """A folder with taskqueue.py and a .venv, as a learner has it, and a free port."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        for name in ("taskqueue.py", ".pytest.ini"):
            shutil.copy(ROOT / name, self.folder)
        (self.folder / ".venv").symlink_to(sys.prefix)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = str(probe.getsockname()[1])
        # Whatever is set on this machine: no proxy, no .curlrc, and a python3.
        path = f"{sys.prefix}/bin{os.pathsep}{os.environ['PATH']}"
        self.environment = {"PATH": path, "HOME": folder, "LC_ALL": "C.UTF-8"}

    def write(self, name: str, text: str) -> None:
        """Write a file."""
        text = text.replace(PORT, self.port)
        (self.folder / name).write_text(text, encoding="utf-8")

    def run(self, command: str) -> str:
        """Run a command in bash, and return what it has printed."""
        ran = subprocess.run(
            ["bash", "-c", command.replace(PORT, self.port)],
            check=False,  # what it has printed says enough
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            timeout=SECONDS,
        )
        return ran.stdout.replace(self.port, PORT)

    @contextlib.contextmanager
    def serve(self, command: str) -> Iterator[None]:
        """Run a server as long as the block lasts. Its log may tell of no error."""
        log = self.folder / "server.log"
        with log.open("wb") as output:
            server = subprocess.Popen(
                shlex.split(command.replace(PORT, self.port)),
                cwd=self.folder,
                env=self.environment,
                stdout=output,
                stderr=output,
            )
        try:
            self.wait_for(server)
            yield
            server.send_signal(signal.SIGINT)
            server.wait(10)
        finally:
            server.kill()
            server.wait()
        text = log.read_text(encoding="utf-8")
        # A traceback of a handler is no error of ours. It has a bar before each line.
        assert not re.search("^Traceback|ERROR|CRITICAL", text, re.MULTILINE), text

    def wait_for(self, server: "subprocess.Popen[bytes]") -> None:
        """Wait until the server answers."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        for _ in range(100 * SECONDS):
            with contextlib.suppress(OSError):
                opener.open(f"http://127.0.0.1:{self.port}/health").close()
                return
            assert server.poll() is None, (self.folder / "server.log").read_text()
            time.sleep(0.01)
        raise TimeoutError("the server does not answer")


def printed_command(text: str, end: str) -> str:
    """The command in the text that ends so."""
    for code in codes(text):
        if code.startswith(".venv/bin/python ") and code.endswith(end):
            return code
    sys.exit(f"README.md has no command that ends in {end}")


def check_recipes() -> Iterator[str]:
    """Run each recipe."""
    text = section("Recipes")
    files = {block.split()[1]: block for block in blocks(text, "python")}
    serve = printed_command(text, "--no-tour") + f" --failure-rate 0 --port {PORT}"
    with tempfile.TemporaryDirectory() as folder:
        shop = Workshop(folder)
        outputs = {}
        for name, block in files.items():
            shop.write(name, block)
        with shop.serve(serve):
            outputs["my_client.py"] = shop.run(printed_command(text, "my_client.py"))
            for block in blocks(text, "bash"):
                output = shop.run(block)
                if '"status":"completed","progress":100' not in output:
                    yield f"curl printed:\n{output}"
            yield from check_javascript(shop, *blocks(text, "js"))
        production = section("Before you put it to use")
        line = printed_command(production, "--timeout-graceful-shutdown 5")
        for serve in (printed_command(text, "my_service.py"), f"{line} --port {PORT}"):
            with shop.serve(serve):
                output = shop.run(MAIL)
            if "sent to ada@example.com" not in output:
                yield f"{serve} answered:\n{output}"
        for name in ("my_script.py", "test_my_service.py"):
            outputs[name] = shop.run(printed_command(text, name))
    for name, output in outputs.items():
        if not re.search(RECIPES[name], output, re.DOTALL):
            yield f"{name} printed:\n{output}"
    for name in set(files) - set(RECIPES) - {"my_service.py"}:
        yield f"nobody has run {name}"


def check_javascript(shop: Workshop, block: str) -> Iterator[str]:
    """Run it in Node, if there is one. Its names may be none of the page's own."""
    ours = set(re.findall(r"^(?:const|let) \{?(\w+)", block, re.MULTILINE))
    script = MODULE.partition("<script")[2].partition("</script>")[0]
    names = r"^(?:const|let|(?:async )?function) (\w+)"
    for name in ours & set(re.findall(names, script, re.MULTILINE)):
        yield f"the page's own script has a {name}, too"
    if shutil.which("node") is None:
        print("There is no Node here, so nobody has run the JavaScript.")
        return
    shop.write("recipe.mjs", BROWSER + block)
    output = shop.run("node recipe.mjs")
    if not output.endswith("completed, 100 %\nclosed\n"):
        yield f"the JavaScript printed:\n{output}"


# -- The tour --------------------------------------------------------------------------


def read_tour() -> tuple[str, str, list[tuple[str, str]]]:
    """The server's command, the helpers, and each step with its printed answer."""
    text = section("The tour")
    serve = next(code for code in codes(text) if code.startswith(".venv/bin/python"))
    helpers, *steps = blocks(text, "bash")
    answers = re.findall(r"<summary>Answer</summary><code>(.*?)</code>", text)
    answers = [html.unescape(each.replace("<br>", "\n")) for each in answers]
    return serve, helpers, list(zip(steps, answers, strict=True))


def same(text: str) -> list[str]:
    """The lines, with a name for each id: what is one id stays one id."""
    names: dict[str, str] = {}

    def name(match: re.Match[str]) -> str:
        """The first id becomes <1>, the next <2>."""
        return names.setdefault(match[0], f"<{len(names) + 1}>")

    text = re.sub(r"\b[0-9a-f]{16,32}\b", name, text)
    text = re.sub(r"\.py:\d+ in", ".py:N in", text)
    return [line.rstrip() for line in text.strip().splitlines()]


def take_tour(rounds: int) -> Iterator[tuple[str, str, str]]:
    """Take all steps. Yield each command, what is printed for it, and what came."""
    serve, helpers, steps = read_tour()
    with tempfile.TemporaryDirectory() as folder:
        shop = Workshop(folder)
        with shop.serve(f"{serve} --port {PORT}"):
            for command, answer in steps * rounds:
                yield command, answer, shop.run(helpers + command)


def check_tour() -> Iterator[str]:
    """Compare the answers."""
    for command, answer, came in take_tour(rounds=2):
        if same(answer) != same(came):
            yield f"{command}\nprinted here:\n{came}\nprinted in the README:\n{answer}"


# -- What is named ---------------------------------------------------------------------


def check_files() -> Iterator[str]:
    """Each file that is linked or named exists."""
    found = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", README)
    targets = {first or second for first, second in found}
    targets |= set(re.findall(r"\.course/[\w./-]*\w", README))
    for target in sorted(targets):
        if "://" not in target and not (ROOT / target).exists():
            yield f"no such file: {target}"


def check_names() -> Iterator[str]:
    """Each function, class, test, trap and exercise that is named exists."""
    tests = set(re.findall(r"\bdef (test_\w+)", SUITE))
    functions = set(re.findall(r"\b(?:def|class) (\w+)", MODULE))
    traps = set(re.findall(r"GOTCHA \[([a-z0-9-]+)\]", MODULE))
    exercises = {each.stem for each in (ROOT / ".course/exercises").glob("test_*.py")}
    for code in codes(PLAIN):
        if re.fullmatch(r"test_\w+", code) and code not in tests:
            yield f"no such test: {code}"
        if re.fullmatch(r"_?\w+\(\)", code) and code[:-2] not in functions | OTHERS:
            yield f"no such function: {code}"
        if re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", code) and code not in traps:
            yield f"no such trap: {code}"
    for row in rows(section("The course")):
        for name in codes(row[4]):
            if f"test_{name}" not in exercises:
                yield f"no such exercise: {name}"
        for name in codes(row[2]):
            if name.removesuffix("()") not in functions | tests:
                yield f"no such function: {name}"
    count = len(traps - {"name"})
    if f"some {5 * round(count / 5)} traps" not in README:
        yield f"the number of traps is {count}"


OTHERS = {"update_progress", "task_done", "iter_lines"}  # functions of no section


def check_messages() -> Iterator[str]:
    """Each message is quoted in the module. So are the words after which one looks."""
    module = " ".join(re.sub(r"^\s*# ?", "", MODULE, flags=re.MULTILINE).split())
    for row in rows(section("I saw this message")):
        for message, place in (row[:2], row[2:]):
            parts = re.split(r" … |, or ", message)
            if "recipes" not in place and not all(part in module for part in parts):
                yield f"not in taskqueue.py: {message}"


def rows(text: str) -> list[list[str]]:
    """The cells of a table's rows, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def check_api() -> Iterator[str]:
    """The table has the routes of the app, and no other."""
    sys.path.insert(0, str(ROOT))
    import taskqueue

    paths = taskqueue.create_app().openapi()["paths"]
    routes = {f"{method.upper()} {path}" for path in paths for method in paths[path]}
    calls = [code for row in rows(section("The API")) for code in codes(row[0])]
    named = {re.sub(r"\?.*", "", call).replace("{id}", "{task_id}") for call in calls}
    for route in sorted(named ^ routes):
        yield f"only in the README, or only in the app: {route}"


# -- How it is written -----------------------------------------------------------------


def check_form() -> Iterator[str]:
    """It is short, and so are its sentences. Both commands are there."""
    count = README.count("\n")
    if count > MAX_LINES:
        yield f"{count} lines, and at most {MAX_LINES} are allowed"
    for name in ("run", "test"):
        command = [sys.executable, str(ROOT / ".ci/readme.py"), "command", name]
        if subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode:
            yield f"there is no command for {name}"
    text = re.sub(r"<code>.*?</code>|`[^`\n]+`", "code", PLAIN)
    text = re.sub(r"\]\([^)]*\)", "", text)  # where a link leads to
    text = re.sub(r"<[^>]*>|\||\n", "\n", text)
    for sentence in re.split(r"(?<=[.?!])[)*]*\s|\n", html.unescape(text)):
        if len(re.findall(r"\w[\w’'./-]*", sentence)) > MAX_WORDS:
            yield f"a long sentence: {sentence.strip()}"
        if ";" in sentence:
            yield f"a semicolon: {sentence.strip()}"


CHECKS: list[Callable[[], Iterator[str]]] = [check_form, check_files, check_names]
CHECKS += [check_messages, check_api, check_recipes, check_tour]


def run_check(check: Callable[[], Iterator[str]]) -> int:
    """Run one check, and print what is wrong. Return how much that is."""
    began = time.monotonic()
    try:
        failures = list(check())
    except (AssertionError, OSError, subprocess.SubprocessError) as error:
        failures = [f"{type(error).__name__}: {error}"]
    outcome = "FAILED" if failures else "ok"
    seconds = time.monotonic() - began
    head = f"{check.__name__.replace('_', ' ')}: {outcome}, {seconds:.1f} s"
    print("\n".join([head, *failures]), flush=True)
    return len(failures)


def main() -> None:
    """Run all checks, two at a time: most of the time they wait."""
    if sys.argv[1:] == ["show"]:
        for command, _, came in take_tour(rounds=1):
            print(f"{command}{came}", flush=True)
        return
    with ThreadPoolExecutor(2) as pool:
        failed = sum(pool.map(run_check, CHECKS))
    if failed > 0:
        sys.exit(f"README.md: {failed} wrong")


if __name__ == "__main__":
    main()
