"""Bring a trap back: apply one small edit to a copy of taskqueue.py, and see the test of that name turn red.

    .venv/bin/python .ci/break_it.py slow-reader    one of them: the reason, the edit, the failing assertion
    .venv/bin/python .ci/break_it.py                all of them, a line each; this is what the gate runs

An edit that is not found exactly once, that breaks nothing, or that hangs is an error; so is a GOTCHA without an edit.
"""

import ast
import difflib
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULE = (ROOT / "taskqueue.py").read_text()
BREAKS = {entry.pop("name"): entry for entry in tomllib.loads((ROOT / ".ci/breaks.toml").read_text())["break"]}
SECONDS = 60


def gotchas(source: str) -> dict[str, str]:
    """The text of each GOTCHA, by its name: it is a comment, or stands in a docstring."""
    lines, found = [line.strip() for line in source.splitlines()], {}
    for number, line in enumerate(lines):
        if match := re.match(r"(# )?GOTCHA \[([a-z0-9-]+)\]: (.*)", line):
            mark, text = match[1] or "", [match[3]]
            for following in lines[number + 1 :]:
                ends = not following.startswith(mark or following[:1] or "#") or text[-1].endswith('"""')
                if ends or re.match(r"(# )?(GOTCHA|WHY)|def |class ", following):
                    break
                text.append(following.removeprefix(mark))
            found[match[2]] = " ".join(text).removesuffix('"""')
    return found


def broken(name: str) -> str:
    find, replace = BREAKS[name]["find"].strip("\n"), BREAKS[name]["replace"].strip("\n")
    if MODULE.count(find) != 1:
        sys.exit(f"{name}: the text to replace stands {MODULE.count(find)} times in taskqueue.py:\n{find}")
    source = MODULE.replace(find, replace)
    ast.parse(source)
    return source


def run(source: str, *tests: str) -> tuple[int, str]:
    """pytest's exit status and output for these tests, with `source` as taskqueue.py; 1 for a hang, too."""
    with tempfile.TemporaryDirectory() as folder:
        for file in ("test_taskqueue.py", "requirements.txt", ".pytest.ini"):
            shutil.copy(ROOT / file, folder)
        (Path(folder) / "taskqueue.py").write_text(source)
        command = [sys.executable, "-m", "pytest", "-x", "--tb=short", "-p", "no:cacheprovider"]
        try:
            ran = subprocess.run([*command, *(f"test_taskqueue.py::{test}" for test in tests)], cwd=folder, text=True,
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return 1, f"It still ran after {SECONDS} seconds."
        return ran.returncode, ran.stdout


def show(name: str) -> None:
    entry = BREAKS[name]
    print(f"GOTCHA [{name}]\n\n  {gotchas(MODULE)[name]}\n\nThe edit that brings it back:\n")
    before, after = MODULE.splitlines(), broken(name).splitlines()
    diff = difflib.unified_diff(before, after, "taskqueue.py", "broken", n=2, lineterm="")
    print("\n".join(diff))
    status, output = run(broken(name), entry["test"])
    print(f"\n{entry['test']} is now {'red' if status == 1 else 'NOT RED'}:\n\n{output}")
    status = run(MODULE, entry["test"])[0]
    print(f"Without the edit it is {'green' if status == 0 else 'NOT GREEN'}.")


def check_all() -> None:
    if odd := set(gotchas(MODULE)) ^ set(BREAKS):
        sys.exit(f"Without an edit, or without a GOTCHA: {', '.join(sorted(odd))}")
    status, output = run(MODULE, *(entry["test"] for entry in BREAKS.values()))
    if status != 0:
        sys.exit(f"The tests are not green to begin with:\n{output}")
    print(f"{len(BREAKS)} tests are green on the original.")
    with ThreadPoolExecutor(2) as pool:
        for name, (status, output) in zip(
                BREAKS, pool.map(lambda name: run(broken(name), BREAKS[name]["test"]), BREAKS), strict=True):
            if status != 1:
                sys.exit(f"{name}: {BREAKS[name]['test']} is not red, but ended with {status}:\n{output}")
            print(f"red, as it should be: {name}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        check_all()
    elif sys.argv[1] in BREAKS:
        show(sys.argv[1])
    else:
        sys.exit("There is none of that name. These are:\n  " + "\n  ".join(BREAKS))
