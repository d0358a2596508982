"""Check that README.md tells the truth: `check.py`, or `check.py show` to see what the tour's commands print today.

It runs the tour, command by command, in one bash, against a server started as the tour says, and compares what comes
with what is printed there. A line `…` in the README stands for any number of lines. Ids, version numbers and times
differ from run to run: any are taken, but what is the same id in the README must be the same here, and the reverse.
Then it compares the tables with the code, and looks whether everything exists that the README names.
"""

import contextlib
import difflib
import os
import re
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()
MAX_LINES = 310
SECONDS = 50  # for the whole tour
PORT = "8000"  # as printed
VARIES = re.compile(r"\b[0-9a-f]{12,32}\b")  # ids of tasks, requests and messages, versions
TIME = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+Z")


def section(title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.DOTALL | re.MULTILINE)
    return found[1] if found else sys.exit(f"README.md has no section {title!r}")


def rows(text: str) -> list[list[str]]:
    """The cells of each row of the tables in a text, without their heads."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    heads = {number + step for number, line in enumerate(lines) if re.match(r"\|[\s|:-]+$", line) for step in (-1, 0)}
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            for number, line in enumerate(lines) if number not in heads]


# The tour: what it prints

@dataclass
class Step:
    command: str
    printed: list[str]


def read_tour() -> tuple[str, list[Step]]:
    """The command that starts the server, and what is typed after it."""
    server, steps = "", []
    for language, block in re.findall(r"^```(bash|console)\n(.*?)^```$", section("The tour"), re.DOTALL | re.MULTILINE):
        if language == "console":
            for line in block.splitlines():
                if line.startswith("$ "):
                    steps.append(Step(line[2:], []))
                else:
                    steps[-1].printed.append(line)
        elif "taskqueue.py" in block:
            server = block.strip()
        else:
            steps.append(Step(block.strip(), []))
    assert PORT in server, "the tour starts no server"
    return server, steps


# The tour: what comes

def hexless(line: str) -> str:
    return VARIES.sub("<id>", line)


def align(printed: list[str], came: list[str]) -> list[tuple[str, str]] | None:
    """Pair the lines of both; None if they don't fit."""
    if not printed:
        return None if came else []
    if printed[0] == "…":
        return next((pairs for skip in range(len(came) + 1)
                     if (pairs := align(printed[1:], came[skip:])) is not None), None)
    if not came or hexless(printed[0]) != hexless(came[0]):
        return None
    rest = align(printed[1:], came[1:])
    return None if rest is None else [(printed[0], came[0]), *rest]


class Ids:
    """Which id of the README is which one here."""

    def __init__(self) -> None:
        self.here: dict[str, str] = {}
        self.there: dict[str, str] = {}

    def agree(self, printed: str, came: str) -> bool:
        pairs = zip(VARIES.findall(printed), VARIES.findall(came), strict=True)
        return all(self.here.setdefault(a, b) == b and self.there.setdefault(b, a) == a for a, b in pairs)


def lines(text: str) -> list[str]:
    return [TIME.sub("<time>", line.rstrip()) for line in text.strip().splitlines()]


class Shell:
    """One bash, for all commands: what one of them sets, the next one has."""

    def __init__(self, cwd: Path, environment: dict[str, str], deadline: float) -> None:
        self.deadline = deadline
        self.process = subprocess.Popen(
            ["bash", "--noprofile", "--norc"], cwd=cwd, env=environment, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def run(self, command: str) -> str:
        assert self.process.stdin
        end = "--- the end of a command ---"
        self.process.stdin.write(f"{{\n{command}\n}} </dev/null\nprintf '\\n{end}\\n'\n".encode())
        self.process.stdin.flush()
        return read_until(self.process, f"\n{end}\n", self.deadline)


def read_until(process: subprocess.Popen[bytes], end: str, deadline: float) -> str:
    """What the process writes up to `end`."""
    assert process.stdout
    output = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while end.encode() not in output:
            if not selector.select(max(0, deadline - time.monotonic())):
                raise TimeoutError(f"no end after {SECONDS} s, but: {output.decode()}")
            chunk = os.read(process.stdout.fileno(), 65536)
            if not chunk:
                raise EOFError(f"it ended early: {output.decode()}")
            output += chunk
    return output.decode().split(end)[0]


def end_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def take_tour() -> Iterator[tuple[Step, list[str]]]:
    """Each step of the tour, and the lines that come."""
    server_command, steps = read_tour()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    deadline = time.monotonic() + SECONDS
    with contextlib.ExitStack() as stack:
        cwd = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        shutil.copy(ROOT / "taskqueue.py", cwd)
        (cwd / ".venv").symlink_to(sys.prefix)
        # Whoever's machine this is: no proxy, no .curlrc, a python3 on the path.
        environment = {"PATH": f"{sys.prefix}/bin:{os.environ['PATH']}", "HOME": str(cwd), "CURL_HOME": str(cwd),
                       "NO_PROXY": "*", "LC_ALL": "C.UTF-8", "PYTHONUNBUFFERED": "1"}
        with open(cwd / "server.log", "wb") as log:
            server = subprocess.Popen(["bash", "-c", f"exec {server_command.replace(PORT, port)}"], cwd=cwd,
                                      env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=log)
        stack.callback(end_group, server)
        try:
            read_until(server, "documentation", deadline)
        except EOFError:
            sys.exit(f"the server does not start: {(cwd / 'server.log').read_text()}")
        shell = Shell(cwd, environment, deadline)
        stack.callback(end_group, shell.process)
        for step in steps:
            try:
                output = shell.run(step.command.replace(PORT, port))
            except (TimeoutError, EOFError) as error:
                sys.exit(f"$ {step.command}\n{error}")
            yield step, lines(output.replace(port, PORT))
        log_text = (cwd / "server.log").read_text()
        assert not re.search("Traceback|ERROR|CRITICAL", log_text), log_text


def check_tour() -> Iterator[str]:
    ids = Ids()
    for step, came in take_tour():
        printed = lines("\n".join(step.printed))
        pairs = align(printed, came)
        if pairs is None:
            diff = difflib.unified_diff(printed, came, "in the README", "as it came", lineterm="")
            yield "\n".join([f"$ {step.command}", *diff])
        else:
            yield from (f"$ {step.command}\nan id is not the one that it is elsewhere:\n- {a}\n+ {b}"
                        for a, b in pairs if not ids.agree(a, b))


# The tables, and what is named

def differences(what: str, in_readme: set[str], in_code: set[str]) -> Iterator[str]:
    if missing := in_code - in_readme:
        yield f"{what}: not in the README: {', '.join(sorted(missing))}"
    if surplus := in_readme - in_code:
        yield f"{what}: only in the README: {', '.join(sorted(surplus))}"


def check_api() -> Iterator[str]:
    sys.path.insert(0, str(ROOT))
    import taskqueue
    paths = taskqueue.create_app().openapi()["paths"]
    routes = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    printed = {re.sub(r"\?.*", "", call) for row in rows(section("The API")) for call in re.findall("`(.*?)`", row[0])}
    plain = [{re.sub(r"\{\w+\}", "{}", call) for call in calls} for calls in (printed - {"GET /"}, routes)]
    yield from differences("routes", *plain)


def check_breaks() -> Iterator[str]:
    in_code = set(re.findall(r"GOTCHA \[([a-z0-9-]+)\]", (ROOT / "taskqueue.py").read_text())) - {"name"}
    printed = {row[0].strip("`"): row[-1].strip("`") for row in rows(section("Break it yourself"))}
    yield from differences("traps", set(printed), in_code)
    yield from (f"the test of {name} does not bear its name: {test}" for name, test in printed.items()
                if name.replace("-", "_") not in test)
    if (path := ROOT / ".ci/breaks.toml").exists():
        breaks = {entry["name"]: entry["test"] for entry in tomllib.loads(path.read_text())["break"]}
        yield from (f"the test of {name} is {breaks.get(name)} in .ci/breaks.toml" for name, test in printed.items()
                    if breaks.get(name) != test)


def check_exercises() -> Iterator[str]:
    in_code = {path.stem.removeprefix("test_") for path in (ROOT / ".ci/exercises").glob("test_*.py")}
    yield from differences("exercises", {row[0].strip("`") for row in rows(section("Exercises"))}, in_code)


def check_names() -> Iterator[str]:
    tests = ROOT / "test_taskqueue.py"
    if tests.exists():
        defined = set(re.findall(r"def (test_\w+)", tests.read_text()))
        named = set(re.findall(r"\btest_\w+\b(?!\.py|\*)", README)) - {"test_taskqueue"}
        yield from (f"no such test: {name}" for name in sorted(named - defined))
    links = set(re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"", README))
    targets = {a or b for a, b in links} | set(re.findall(r"(\.ci/[\w./-]*\w)", README))
    for target in sorted(targets):
        if target.startswith("#"):
            headings = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
            if target[1:] not in anchors:
                yield f"no such heading: {target}"
        elif "://" not in target and not (ROOT / target).exists():
            yield f"no such file: {target}"


def check_form() -> Iterator[str]:
    if (count := README.count("\n")) > MAX_LINES:
        yield f"{count} lines, more than {MAX_LINES}"
    for name in ("run", "test"):
        command = [sys.executable, ROOT / ".ci/readme.py", "command", name]
        found = subprocess.run(command, capture_output=True, text=True)
        if found.returncode:
            yield found.stderr.strip()


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    if sys.argv[1:] == ["show"]:
        for step, came in take_tour():
            print(f"$ {step.command}", *came, sep="\n", flush=True)
        return
    failed = 0
    for check in (check_form, check_names, check_breaks, check_exercises, check_api, check_tour):
        began, failures = time.monotonic(), list(check())
        print(f"{check.__name__.replace('_', ' ')}: {'FAILED' if failures else 'ok'}, {time.monotonic() - began:.1f} s")
        print(*failures, sep="\n", end="\n" if failures else "")
        failed += len(failures)
    sys.exit(f"README.md: {failed} things are not so" if failed else None)


if __name__ == "__main__":
    main()
