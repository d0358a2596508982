"""Check the exercises: see ./run, which calls this."""

import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / ".course"))

import edits
import exercise

MODULE = (ROOT / "taskqueue.py").read_text(encoding="utf-8")
# What is left out of the suite: the two that list all settings and all routes, what
# starts processes, and what is slow.
LEFT_OUT = (
    "settings_have_the_defaults or openapi_has_the_api or tour or ctrl_c or terminate "
    "or server or address or port or host or help or bad_value or import or pipelined "
    "or forty or flood or costs or payloads or traceback"
)


MYPY = ["mypy", "--strict", f"--cache-dir={ROOT / '.ci/.work/exercises/mypy'}"]


class Wrong(Exception):
    """An exercise is not as it should be."""


def run(folder: str, *command: str) -> tuple[int, str]:
    """Run a Python module in this folder. Return its exit code and what it has said."""
    ran = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    return ran.returncode, ran.stdout


def demand(holds: bool, what: str, output: str = "") -> None:
    """Raise Wrong, unless it holds."""
    if not holds:
        raise Wrong(f"{what}\n{output[-4000:]}")


def check(name: str) -> str:
    """Check one exercise in a copy of the project. Return a line about it."""
    pytest = ["pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    pytest += ["--assert=plain"]  # to rewrite the asserts takes a second each time
    left_out = ["-k", f"not ({LEFT_OUT})"]
    tests = f".course/exercises/test_{name}.py"
    with tempfile.TemporaryDirectory() as folder:
        ignore = shutil.ignore_patterns(".git", ".work", ".venv", "__pycache__")
        shutil.copytree(ROOT, folder, ignore=ignore, dirs_exist_ok=True)
        code, red = run(folder, *pytest, tests)
        demand(code == 1, "it should be red on the original", red)
        summary = red.strip().splitlines()[-1]
        demand("error" not in summary, "it should fail, and not break", red)

        try:
            solved = exercise.solve(name, MODULE)
        except edits.EditError as error:
            raise Wrong(f"the solution does not fit: {error}") from error
        Path(folder, "taskqueue.py").write_text(solved, encoding="utf-8")
        code, green = run(folder, *pytest, tests)
        demand(code == 0, "it should be green with the solution", green)
        code, suite = run(folder, *pytest, "-x", "test_taskqueue.py", *left_out)
        demand(code == 0, "the solution breaks the suite", suite)
        code, output = run(folder, *MYPY, "taskqueue.py")
        demand(code == 0, "mypy", output)
        code, output = run(
            folder, "ruff", "format", "--check", "--diff", "taskqueue.py"
        )
        demand(code == 0, "ruff format", output)
    lines = [output.strip().splitlines()[-1] for output in (red, green, suite)]
    counts = [line.partition(" in ")[0] for line in lines]
    return f"{name:14} red: {counts[0]}, green: {counts[1]}, suite: {counts[2]}"


def check_files(names: set[str]) -> None:
    """Check that each exercise has its tests, its solution, and its line in README."""
    tests = {path.stem[5:] for path in exercise.FOLDER.glob("test_*.py")}
    solutions = {path.stem for path in exercise.FOLDER.glob("solutions/*.toml")}
    demand(tests == solutions == names, "tests, solutions and exercises.toml differ")
    readme = (exercise.HERE / "README.md").read_text(encoding="utf-8")
    demand(exercise.table() in readme, "the table of README.md is old")


def main() -> None:
    """Check all, or those that are named."""
    wrong = 0
    check_files(set(exercise.EXERCISES))
    with ThreadPoolExecutor(2) as pool:
        futures = {
            name: pool.submit(check, name)
            for name in sys.argv[1:] or exercise.EXERCISES
        }
        for name, future in futures.items():
            try:
                print(future.result(), flush=True)
            except Wrong as error:
                wrong += 1
                print(f"{name}: {error}", flush=True)
    if wrong:
        sys.exit(f"{wrong} exercises are not as they should be.")


if __name__ == "__main__":
    main()
