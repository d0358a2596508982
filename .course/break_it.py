"""Bring a trap back: make one edit in a copy of taskqueue.py, and see what it does.

    .venv/bin/python .course/break_it.py                     the names of all traps
    .venv/bin/python .course/break_it.py tie-break           the edit, and what fails
    .venv/bin/python .course/break_it.py tie-break --demo    the tour, with the bug in
    .venv/bin/python .course/break_it.py tie-break --page    the server, with the bug in

What stands after --demo or --page is for taskqueue.py: `--page --port 8001`.

For maintainers: `--check` tries all of them, and `--table` prints README.md's table.
"""

import ast
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import edits

HERE = Path(__file__).resolve().parent
PYTHON = os.path.relpath(sys.executable)  # as one types it here
ROOT = HERE.parent
MODULE = (ROOT / "taskqueue.py").read_text(encoding="utf-8")
README = HERE / "README.md"
SECONDS = 60  # a test that takes longer hangs


def read_breaks() -> dict[str, dict[str, str]]:
    """All breaks by name, in the order of the module."""
    text = (HERE / "breaks.toml").read_text(encoding="utf-8")
    return {entry["name"]: entry for entry in tomllib.loads(text)["break"]}


BREAKS = read_breaks()


def gotchas() -> dict[str, int]:
    """The name of each GOTCHA in the module, and its line."""
    found = {}
    for number, line in enumerate(MODULE.splitlines(), start=1):
        match = re.match(r"\s*(# )?GOTCHA \[([a-z0-9-]+)\]:", line)
        if match:
            found[match[2]] = number
    return found


def apply(name: str) -> str:
    """The module with this bug in it."""
    try:
        broken = edits.apply_edit(MODULE, BREAKS[name])
        ast.parse(broken)
    except (edits.EditError, SyntaxError) as error:
        sys.exit(f"{name}: {error}")
    return broken


def can_run(name: str) -> bool:
    """Whether all is installed that this break needs."""
    needs = BREAKS[name].get("needs")
    return needs is None or importlib.util.find_spec(needs) is not None


def place(name: str) -> str:
    """The function that the edit is in, for example "TaskStore.move"."""
    before = MODULE.splitlines()
    after = apply(name).splitlines()
    line = 1
    for old, new in zip(before, after, strict=False):
        if old != new:
            break
        line += 1
    names: list[str] = []
    nodes: Any = ast.parse(MODULE).body
    while nodes:
        found = [each for each in nodes if is_scope(each, line)]
        names += [each.name for each in found]
        nodes = found[0].body if found else []
    return ".".join(names)


def is_scope(node: Any, line: int) -> bool:
    """Whether the node is a function or a class that this line is in."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return node.lineno <= line <= (node.end_lineno or 0)
    return False


def table() -> str:
    """The table for README.md, in Markdown."""
    lines = ["| name | the edit, and what comes of it | where |", "|---|---|---|"]
    for name, entry in BREAKS.items():
        lines.append(f"| `{name}` | {entry['reason']} | `{place(name)}` |")
    return "\n".join(lines) + "\n"


# -- To run it -------------------------------------------------------------------------


def make_copy(folder: str, source: str) -> None:
    """Copy the project's own files into the folder, with `source` as taskqueue.py."""
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, folder)
    Path(folder, "taskqueue.py").write_text(source, encoding="utf-8")
    shutil.copy(HERE / "brief.py", folder)


def run_tests(source: str, *names: str, quick: bool = False) -> tuple[int, str]:
    """Run the tests of these traps. Return pytest's exit code, and what it has said.

    Pytest rewrites each assert, so that it shows its values. That takes a second.
    `quick` leaves it out.
    """
    keywords = " or ".join(name.replace("-", "_") for name in names)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "brief", "-rN"]
    command += ["-o", "addopts=", "-p", "no:cacheprovider"]
    command += ["--no-header", "--show-capture=no"]
    if quick:
        command += ["--assert=plain"]
    command += ["test_taskqueue.py", "-k", keywords]
    with tempfile.TemporaryDirectory() as folder:
        make_copy(folder, source)
        try:
            ran = subprocess.run(
                command,
                cwd=folder,
                check=False,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired:
            return -1, f"It still ran after {SECONDS} seconds."
        return ran.returncode, ran.stdout


def show(name: str) -> None:
    """Show edit and test, wait for a guess, and show the assertion that fails."""
    if not can_run(name):
        needs = BREAKS[name]["needs"]
        sys.exit(f"This one needs a package: {PYTHON} -m pip install {needs}")
    broken = apply(name)
    print(f"GOTCHA [{name}], explained in taskqueue.py, line {gotchas()[name]}.\n")
    print(textwrap.fill(BREAKS[name]["reason"], 88) + "\n")
    print(edits.diff(MODULE, broken))
    print("\nIts tests run…", flush=True)
    code, output = run_tests(broken, name)
    red = re.search(r"^_+ (\w+)", output, re.MULTILINE)
    if code != 1 or red is None:
        print(output)
        sys.exit(f"No test has failed as it should: pytest's exit code is {code}.")
    if sys.stdin.isatty():
        print(f"This one is red: {red[1]}")
        print("Find it in test_taskqueue.py. Which of its assertions fails, and why?")
        input("[Enter] ")
    print(f"\n{output}")
    keyword = name.replace("-", "_")
    print(f"Without the edit it is green: {PYTHON} -m pytest -k {keyword}")


def serve(name: str, arguments: list[str]) -> int:
    """Run taskqueue.py with the bug in it, until it ends or Ctrl-C."""
    print(textwrap.fill(BREAKS[name]["reason"], 88) + "\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        make_copy(folder, apply(name))
        command = [sys.executable, "taskqueue.py", *arguments]
        server = subprocess.Popen(command, cwd=folder)
        # Ctrl-C reaches the server, too. It is for the server alone.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return server.wait()


def check(names: list[str]) -> None:
    """Check that each trap has its edit, and that the edit turns its test red."""
    odd = set(gotchas()) ^ set(BREAKS)
    if odd:
        sys.exit(f"Without an edit, or without a GOTCHA: {', '.join(sorted(odd))}")
    if table() not in README.read_text(encoding="utf-8"):
        sys.exit("The table in .course/README.md is old: see break_it.py --table")
    code, output = run_tests(MODULE, *names, quick=True)
    if code != 0:
        sys.exit(f"The tests are not green to begin with:\n{output}")
    print(f"The tests of {len(names)} traps are green on the original.", flush=True)
    wrong = []
    for name in names:
        if not can_run(name):
            print(f"left out, because it needs {BREAKS[name]['needs']}: {name}")
    names = [name for name in names if can_run(name)]
    with ThreadPoolExecutor(4) as pool:  # some of them mostly wait
        outcomes = pool.map(
            lambda name: run_tests(apply(name), name, quick=True), names
        )
        for name, (code, output) in zip(names, outcomes, strict=True):
            if code == 1:
                print(f"red, as it should be: {name}", flush=True)
            else:
                print(f"NOT RED: {name} ({code})\n{output}", flush=True)
                wrong.append(name)
    if wrong:
        sys.exit(f"These edits did not turn their test red: {', '.join(wrong)}")


def main() -> None:
    """Do what the command line says."""
    edits.demand_packages()
    name, *rest = sys.argv[1:] or [""]
    if name == "--check":
        check(rest or list(BREAKS))
    elif name == "--table":
        print(table(), end="")
    elif name not in BREAKS:
        print(__doc__)
        sys.exit("These are the traps:\n  " + "\n  ".join(BREAKS))
    elif rest[:1] == ["--demo"]:
        sys.exit(serve(name, ["--once", "--port", "0", *rest[1:]]))
    elif rest[:1] == ["--page"]:
        sys.exit(serve(name, ["--no-tour", *rest[1:]]))
    else:
        show(name)


if __name__ == "__main__":
    main()
