"""The exercises: which are red, which are green, and what to try next.

    .venv/bin/python .course/exercise.py                     the board: all of them
    .venv/bin/python .course/exercise.py rerun               what to build
    .venv/bin/python .course/exercise.py rerun --hint 2      the first two hints
    .venv/bin/python .course/exercise.py rerun --solution    one way to solve it

You work in taskqueue.py itself. --solution does not touch that file. It shows the
solution as a diff against the original, and writes the solved file beside yours.

For maintainers: `--table` prints README.md's table.
"""

import ast
import contextlib
import os
import re
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import edits

HERE = Path(__file__).resolve().parent
PYTHON = os.path.relpath(sys.executable)  # as one types it here
ROOT = HERE.parent
FOLDER = HERE / "exercises"


def read_toml(path: Path) -> dict[str, Any]:
    """What stands in a TOML file."""
    return tomllib.loads(path.read_text(encoding="utf-8"))


EXERCISES = {
    each["name"]: each for each in read_toml(FOLDER / "exercises.toml")["exercise"]
}


def say(text: str, indent: str = "") -> None:
    """Print it in lines that fit a terminal."""
    print(textwrap.fill(text, 88, initial_indent=indent, subsequent_indent=indent))


def run_tests(name: str, *options: str) -> tuple[int, int, str]:
    """How many tests of an exercise pass, how many there are, and pytest's output."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "brief", "-rN"]
    command += ["-o", "addopts=", "-p", "no:cacheprovider"]
    command += ["--no-header", "--show-capture=no", *options]
    paths = [str(HERE), os.environ.get("PYTHONPATH", "")]
    ran = subprocess.run(
        [*command, str(FOLDER / f"test_{name}.py")],
        cwd=ROOT,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},  # where brief.py is
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    counts = {"passed": 0, "failed": 0, "error": 0}
    summary = re.search(r"^(\d+ .*) in [\d.]+s", ran.stdout, re.MULTILINE)
    if summary:  # "2 failed, 4 passed in 0.31s"
        for number, word in re.findall(r"(\d+) (passed|failed|error)", summary[1]):
            counts[word] = int(number)
    if counts["passed"] + counts["failed"] == 0:
        sys.exit(f"taskqueue.py can't be tested:\n{ran.stdout}")
    return counts["passed"], sum(counts.values()), ran.stdout


def board() -> None:
    """Run the tests of all exercises, and show where you stand."""
    print("The tests of all exercises run. It takes some 15 seconds.", flush=True)
    red = []
    with ThreadPoolExecutor(2) as pool:
        outcomes = pool.map(run_tests, EXERCISES)
        for (name, entry), (passed, total, _) in zip(
            EXERCISES.items(), outcomes, strict=True
        ):
            color = "green" if passed == total else "red"
            count = f"{passed} of {total}"
            print(f"\n{color:5}  {name:14} {count:9} {entry['time']}", flush=True)
            if passed < total:
                red.append(name)
                say(entry["hints"][0], indent=" " * 7)
    if red:
        print(f"\nThe next step: {PYTHON} .course/exercise.py {red[0]}")


def show(name: str) -> None:
    """Say what to build, and show the first test that fails."""
    entry = EXERCISES[name]
    test = (FOLDER / f"test_{name}.py").read_text(encoding="utf-8")
    print(ast.get_docstring(ast.parse(test)))
    print(f"\nSections: {entry['sections']}. Time: {entry['time']}.")
    passed, total, output = run_tests(name, "-x")
    print(f"\n{output}")
    if passed == total:
        print(f"It is green. Is all the rest? {PYTHON} -m pytest")
        print("Then compare: --solution")
    else:
        print(f"A hint? {PYTHON} .course/exercise.py {name} --hint 1")
        test = os.path.relpath(FOLDER / f"test_{name}.py")
        print(f"All that pytest says: {PYTHON} -m pytest {test}")


def originals() -> Iterator[str]:
    """taskqueue.py as the course has it, the most likely one first.

    A learner works in taskqueue.py, and may commit that. What a clone has come from is
    under the name origin/HEAD. A plain download has no git, and only the file is left.
    """
    for commit in ("origin/HEAD", "HEAD"):
        show = ["git", "-C", str(ROOT), "show", f"{commit}:taskqueue.py"]
        with contextlib.suppress(OSError):  # there is no git
            shown = subprocess.run(show, capture_output=True, check=False)
            if shown.returncode == 0:
                yield shown.stdout.decode()
    yield (ROOT / "taskqueue.py").read_text(encoding="utf-8")


def solve(name: str, source: str) -> str:
    """The module with the solution of an exercise."""
    solution = read_toml(FOLDER / "solutions" / f"{name}.toml")
    return edits.apply_edits(source, solution["edit"])


def show_solution(name: str) -> None:
    """Show the solution as a diff, and write the solved file beside the learner's."""
    for before in originals():
        with contextlib.suppress(edits.EditError):  # it is not the original
            after = solve(name, before)
            break
    else:
        sys.exit("It fits the original only, and that is not here: clone it anew.")
    print(edits.diff(before, after))
    file = ROOT / f"taskqueue_{name}.py"
    file.write_text(after, encoding="utf-8")
    print(f"\nThe whole file is {file.name} now, beside your own taskqueue.py.")


def table() -> str:
    """The table for README.md, in Markdown."""
    lines = ["| name | time | build | sections |", "|---|---|---|---|"]
    for each in EXERCISES.values():
        cells = [f"`{each['name']}`", each["time"], each["build"], each["sections"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Do what the command line says."""
    edits.demand_packages()
    name, *rest = sys.argv[1:] or [""]
    if name == "":
        board()
    elif name == "--table":
        print(table(), end="")
    elif name not in EXERCISES:
        sys.exit(f"{__doc__}\nThese are the exercises: {', '.join(EXERCISES)}")
    elif rest[:1] == ["--hint"]:
        number = int(rest[1]) if rest[1:] else 1
        for hint in EXERCISES[name]["hints"][:number]:
            say(hint)
    elif rest == ["--solution"]:
        show_solution(name)
    else:
        show(name)


if __name__ == "__main__":
    main()
